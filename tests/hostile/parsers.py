"""Hostile inputs for parsers and kernels that are called directly, in this process.

`PARSERS` maps a kind to a function of a generator and a `World`. It returns whether the input gets past its hash and
the first parser of its format, and a call without arguments, which must return or raise UserError.
"""

import io
import itertools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import embedder_folders
import numpy as np
from hostile import checkpoints, corpora, databases, decoders, values
from hostile.databases import Folder, changed_file, mutation
from hostile.values import mutated_array, odd_text, odd_value, pick

from retro_np import EncoderConfig, RetroConfig, UserError, load_bert, progress
from retro_np.checkpoint import load_checkpoint, load_params
from retro_np.files import untrusted
from retro_np.kernels import c_extension
from retro_np.kernels.attention import attention_backward, attention_forward
from retro_np.kernels.hashing import BUCKETS, count_features, project_features
from retro_np.kernels.minhash import gram_hashes, minhash
from retro_np.kernels.rowwise import scatter_add
from retro_np.kernels.search import exact_search
from retro_np.kernels.substring import common_prefix_lengths, longest_common_substring
from retro_np.pretrained import models
from retro_np.pretrained.bundled import trained_on
from retro_np.pretrained.models import read_pretrained
from retro_np.retrieval.build import BuildConfig
from retro_np.retrieval.corpus import _matcher, find_corpus, parse_source
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import Documents
from retro_np.retrieval.hashing import load_hashing
from retro_np.retrieval.index import load_hnsw
from retro_np.retrieval.manifest import read_manifest
from retro_np.retrieval.rows import Fields
from retro_np.retrieval.sources import RowReader, folder_files
from retro_np.retrieval.tokenizer import decode, encode, load_tokenizer
from retro_np.retrieval.verify import verify_database
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import read_log
from retro_np.tree import named_leaves

Call = Callable[[], object]


class World:
    """What the inputs are made from: valid databases and a checkpoint in `base`, and a scratch folder."""

    def __init__(self, base: Path, scratch: Path):
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch, self.canary = scratch, str(scratch / "unpickled")
        self.plain, self.half = (databases.stored(base / name) for name in ("plain", "half"))
        self.folders = {name: Folder(getattr(self, name), scratch / name) for name in ("plain", "half")}
        self.checkpoint = (base / "checkpoint.safetensors").read_bytes()
        self.lines = (base / "plain.jsonl").read_bytes()
        self.tokenizer = load_tokenizer(base / "plain" / "tokenizer.json")
        self.models = {kind: decoders.build_folder(scratch / kind, kind) for kind in ("llama", "qwen2", "gpt2")}
        self.memory = (base / "memory.safetensors").read_bytes()
        self.frozen = dict(named_leaves(read_pretrained(base / "decoder").params))
        types = {"llama": "Q8_0", "qwen2": "F16", "gpt2": "F32"}
        self.ggufs = [decoders.Gguf(scratch / f"{kind}.gguf", kind, name) for kind, name in types.items()]
        self.log = b"".join(json.dumps({"step": i, "loss": 3.5, "seconds": 0.1}).encode() + b"\n" for i in range(4))

    def write(self, name: str, data: bytes) -> Path:
        """Write a scratch file."""
        path = self.scratch / name
        path.write_bytes(data)
        return path


def prepare(base: Path) -> None:
    """Make what a `World` reads."""
    base.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "half"):
        databases.build(base / name, half=name == "half")
    manifest = json.loads((base / "plain" / "manifest.json").read_bytes())
    checkpoints.build(base / "checkpoint.safetensors", manifest["vocabulary_size"], manifest["chunk_size"])
    decoders.build_folder(base / "decoder", "llama")
    checkpoints.build_added(base / "memory.safetensors", base / "decoder")


def _manifest(rng, world: World) -> tuple[bool, Call]:
    change = mutation(rng, world.plain, world.canary, "manifest.json")
    path = world.write("manifest.json", change.files["manifest.json"])
    return change.past, lambda: read_manifest(path.parent)


def _documents(rng, world):
    data = changed_file(rng, "documents.jsonl", world.plain.files["documents.jsonl"], world.canary)
    path = world.write("documents.jsonl", data)

    def call():
        documents = Documents(path)
        return [documents[i] for i in range(min(len(documents), 20))]

    return values.parses_as_lines(data), call


def _tokenizer(rng, world):
    data = changed_file(rng, "tokenizer.json", world.plain.files["tokenizer.json"], world.canary)
    path = world.write("tokenizer.json", data)

    def call():
        tokenizer = load_tokenizer(path)
        return decode(tokenizer, encode(tokenizer, "some text é"))

    return values.parses_as_json(data), call


def _hashing(rng, world):
    data = changed_file(rng, "hashing.npy", world.plain.files["hashing.npy"], world.canary)
    path = world.write("hashing.npy", data)
    return values.parses_as_npy(data), lambda: load_hashing(path, world.tokenizer).embed(["word1 is 2"], False)


def _index(rng, world):
    name = pick(
        rng, [name for name in world.plain.files if name.endswith("index.hnsw") and len(world.plain.files[name]) > 96]
    )
    keys = np.load(io.BytesIO(world.plain.files[name.replace("index.hnsw", "keys.npy")]))
    equal = world.plain.files[name.replace("index.hnsw", "equal.npy")]
    data = world.plain.files[name]
    if rng.random() < 0.8:
        data = databases.mutated_index(rng, data)
    else:
        equal = mutated_array(rng, np.load(io.BytesIO(equal)), world.canary)
    path = world.write("index.hnsw", data)
    world.write("equal.npy", equal)

    def call():
        index = load_hnsw(path, keys)
        if index.n_entries >= 2:
            index.search_graph(keys[:3].astype(np.float32), 2)
        return index.graph_keys(np.arange(min(2, index.n_entries)))

    return len(data) > 96 and values.parses_as_npy(equal), call


def _mapped(rng, world):
    name = pick(rng, [name for name in world.plain.files if name.endswith(".npy") and name != "hashing.npy"])
    array = np.load(io.BytesIO(world.plain.files[name]))
    data = mutated_array(rng, array, world.canary)
    path = world.write("array.npy", data)
    shape = tuple(None if rng.random() < 0.5 else n for n in array.shape)
    return values.parses_as_npy(data), lambda: np.asarray(untrusted.mapped(path, array.dtype, shape)).sum()


def _json(rng, world):
    data = (
        values.dumped(odd_value(rng)) if rng.random() < 0.5 else values.dumped({"a": odd_value(rng), odd_text(rng): 1})
    )
    kind = pick(rng, (dict, list, dict))
    return values.parses_as_json(data), lambda: untrusted.parse_json(data, "a file", kind)


def _safetensors(rng, world):
    data = checkpoints.changed(rng, world.checkpoint)
    path = world.write("a.safetensors", data)
    return checkpoints.parses(data), lambda: untrusted.read_safetensors(path)


def _checkpoint(rng, world):
    data = checkpoints.changed(rng, world.checkpoint)
    path = world.write("checkpoint.safetensors", data)
    load = pick(rng, (load_params, load_params, load_checkpoint, trained_on))
    return checkpoints.parses(data), lambda: load(path)


def _log(rng, world):
    data = checkpoints.changed_run(rng, "log.jsonl", world.log)
    world.write("log.jsonl", data)
    return values.parses_as_lines(data), lambda: read_log(world.scratch)


def _lines(rng, world):
    path = corpora.write_file(rng, world.scratch, world.lines)
    return True, lambda: list(find_corpus(path).documents())


def _folder(rng, world):
    root = world.scratch / "folder"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    path, reader = corpora.write_folder(rng, root), RowReader("s", "", Fields(), lambda line: None)
    return True, lambda: [
        e.read() for e in folder_files(str(path), reader, lambda *_: None, lambda _: True, lambda _: True)
    ]


def _sources(rng, world):
    texts = [
        pick(rng, ("a=b:0.5", "hub:x", ":", "=", "a=", "=b", "x:1e999", "x:nan", odd_text(rng), odd_text(rng) + ":1"))
        for _ in "ab"
    ]
    return True, lambda: list(map(parse_source, texts[: int(rng.integers(1, 3))]))


PATTERN_PARTS = (
    "*",
    "**",
    "?",
    "[",
    "]",
    "[!a-z]",
    "[z-a]",
    "/",
    "\\",
    "{a,b}",
    "a",
    "é",
    "\x00",
    "\n",
    "(",
    "+",
    "\x1b[2J",
    "[[:x:]]",
)


def _patterns(rng, world):
    patterns = [
        "".join(pick(rng, PATTERN_PARTS) for _ in range(int(rng.integers(12)))) for _ in range(int(rng.integers(1, 3)))
    ]
    return True, lambda: [_matcher(patterns)(name) for name in ("a/b/c.py", "a" * 60, odd_text(rng))]


def _settings(rng, world):
    encoder = {"d_model": 4, "d_ffw": 4, "n_heads": 1, "d_head": 4, "n_layers": 1, "ca_layers": [1]}
    model = RetroConfig(262, 4, 4, 1, 4, 2, (2,), 8, EncoderConfig(**encoder)).to_dict()
    kind, fields = pick(rng, ((RetroConfig, model), (EncoderConfig, encoder), (BuildConfig, vars(BuildConfig())),
                              (TrainingConfig, vars(TrainingConfig(1)))))  # fmt: skip
    data = values.dumped({pick(rng, [*fields]): odd_value(rng) for _ in range(int(rng.integers(1, 3)))})
    if not values.parses_as_json(data):
        return False, lambda: None
    return True, lambda: kind(**(fields | json.loads(data)))


def _terminal(rng, world):
    text = "".join(odd_text(rng) for _ in range(int(rng.integers(1, 6))))

    def call():
        shown = progress.visible(text)
        if values.TERMINAL.search(shown) or "\ud800" in shown or "\udfff" in shown:
            raise AssertionError(f"sent to the terminal: {shown!r}")

    return True, call


EMBEDDERS = [embedder_folders.old(), embedder_folders.current(lowercase=False), embedder_folders.old()]
EMBEDDERS[2]["1_Pooling/config.json"] |= {"pooling_mode_cls_token": True, "include_prompt": False}
EMBEDDERS[2]["config_sentence_transformers.json"]["prompts"] = {"query": "abc ", "document": "x"}
EMBEDDERS[2]["sentence_bert_config.json"]["do_lower_case"] = True


def _embedder(rng, world):
    generator, folder = Random(int(rng.integers(2**32))), world.scratch / "embedder"
    files, name = embedder_folders.mutated(generator, generator.choice(EMBEDDERS))
    shutil.rmtree(folder, ignore_errors=True)
    data = embedder_folders.write_folder(folder, files).joinpath(name)

    def call():
        bert = load_bert(folder)
        return bert.embed(["a é [MASK]"], False), bert.embed_queries([""], False)

    return data.exists() and values.parses_as_json(data.read_bytes()), call


def _use(name):
    """Read a model, its parameters too, and encode a text."""
    model = read_pretrained(name)
    text = decode(model.tokenizer, encode(model.tokenizer, "some text é"))
    return model.params, model.sha256, repr(model), text


def _memory(rng, world):
    files = ("added.safetensors", "", "qwen2", "gpt2.gguf")
    names = "retro", "baseline", *(str(world.scratch / name) for name in files)
    if rng.random() < 0.4:
        data = checkpoints.changed_base(rng, world.memory, names)
    else:
        data = checkpoints.changed(rng, world.memory)
    path, given = world.write("added.safetensors", data), {"given": world.frozen}
    load = pick(rng, (_use, _use, load_params, partial(load_params, **given), partial(load_checkpoint, **given)))

    def call():
        refusal = UserError("there is no network")
        with mock.patch.object(models, "_from_hub", side_effect=refusal):  # The file may name a model on the hub.
            return load(path)

    return checkpoints.parses(data), call


def _model_folder(rng, world):
    files, name = decoders.changed_folder(rng, world.models[pick(rng, [*world.models])])
    folder = world.scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for other, data in files.items():
        (folder / other).write_bytes(data)
    parses = checkpoints.parses if name.endswith(".safetensors") else values.parses_as_json
    return name in files and parses(files[name]), lambda: _use(folder)


def _gguf(rng, world):
    data = decoders.changed_gguf(rng, pick(rng, world.ggufs))
    path = world.write("changed.gguf", data)
    return decoders.begins(data), lambda: _use(path)


def _database(rng, world):
    name = pick(rng, ("plain", "half"))
    change = mutation(rng, getattr(world, name), world.canary)
    path = world.folders[name].write(change)
    action = rng.random()

    def call():
        if action < 0.15:
            return verify_database(path)
        database = Database.open(path, index=pick(rng, ("hnsw", "exact")))
        keys = np.zeros((2, database.d_key), np.float32)
        ids, _ = database.search_keys(keys, 3)
        found = database.value(ids), database.document_of(ids)
        for split in ("train", "valid", "test"):
            rows = database.split(split)
            found += tuple(
                np.asarray(part[:5]) for part in (rows.tokens, rows.documents, rows.neighbours, rows.distances)
            )
            found += (database.keys(split)[:5], database.removed(ids))
        for row in found[0].reshape(-1, found[0].shape[-1]):
            database.text(row)
        for number in found[1].reshape(-1):
            if number >= 0:
                str(database.documents[int(number)]["name"])
        if name == "plain":
            database.search("word1 is 2", 2)
        return found

    return change.past, call


ARRAYS = (
    "<f4",
    "<f4",
    "<f4",
    "<f8",
    "<f2",
    ">f4",
    "<i8",
    "<i8",
    "<i4",
    "<u2",
    "|u1",
    "|b1",
    "|i1",
    "<u4",
    "<u8",
    "<c8",
    "|S1",
    "|O",
)
KERNEL_ERRORS = (ValueError, TypeError, OverflowError, IndexError, BufferError)  # UserError is a ValueError


def odd_array(rng, shape, dtype="<f4"):
    """An array that is mostly of the wanted shape and type, but may be neither, strided, read-only or of odd values."""
    shape = list(shape)
    if rng.random() < 0.15:
        action = pick(rng, ("drop", "add", "zero", "more"))
        if action == "drop" and shape:
            shape.pop(int(rng.integers(len(shape))))
        elif action == "add":
            shape.insert(int(rng.integers(len(shape) + 1)), pick(rng, (0, 1, 2)))
        elif shape:
            axis = int(rng.integers(len(shape)))
            shape[axis] = 0 if action == "zero" else shape[axis] + 1
    if rng.random() < 0.12:
        dtype = pick(rng, ARRAYS)
    dtype = np.dtype(dtype)
    with np.errstate(all="ignore"):
        array = np.array(rng.standard_normal(shape) * pick(rng, (1, 3, 300))).astype(dtype)
    if array.size and rng.random() < 0.25:
        odd = (
            (np.nan, np.inf, -np.inf, 3e38, 1e-45)
            if dtype.kind == "f"
            else (0, -1, 1, 2**31 - 1, -(2**31), 2**63 - 1, 65_535, 300)
        )
        if dtype.kind in "iuf":
            with np.errstate(all="ignore"):
                array.reshape(-1)[int(rng.integers(array.size))] = np.asarray(pick(rng, odd)).astype(
                    dtype, casting="unsafe"
                )
    layout = rng.random()
    if layout < 0.06:
        array = np.asfortranarray(array)
    elif layout < 0.1 and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif layout < 0.14 and array.ndim:
        array = array[::-1]
    elif layout < 0.17 and array.ndim and array.shape[0]:
        array = np.broadcast_to(array[:1], array.shape)
    elif layout < 0.2:
        array.flags.writeable = False
    elif layout < 0.23 and dtype.kind in "iuf":  # not aligned
        array = (
            np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(dtype).reshape(array.shape)
            if array.size
            else array
        )
    return array


ODD_INTEGERS = (0, 1, 2, 3, -1, 5, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63, 10**30, None, 1.0, True, "1")


def _number(rng, usual, odd=ODD_INTEGERS):
    return usual if rng.random() < 0.75 else pick(rng, odd)


def _attention(rng, backward: bool):
    batch, g, n, h, c, k, r = (int(rng.integers(1, 4)) for _ in range(7))
    c *= 2
    dtype = pick(rng, ("<f4", "<f8"))
    q = odd_array(rng, (batch, g, n, h, c), dtype)
    keys, held = (odd_array(rng, (batch, k, r, h, c), dtype) for _ in "kv")
    table, u, v = (odd_array(rng, shape, dtype) for shape in ((n + r - 1, h, c), (h, c), (h, c)))
    if rng.random() < 0.3:
        table = u = v = None
    mask = None if rng.random() < 0.5 else odd_array(rng, (batch, k, r), "|b1")
    offset = None if rng.random() < 0.3 else _number(rng, int(rng.integers(-3, 4)))
    if rng.random() < 0.5:
        options = {"causal_offset": offset, "key_mask": mask}
        arrays = (q, keys, held, table, u, v)
        if backward:
            lse, dout = odd_array(rng, (batch, h, g, n), dtype), odd_array(rng, (batch, g, n, h, c), dtype)
            options["dlse"] = None if rng.random() < 0.5 else odd_array(rng, (batch, h, g, n), dtype)
            return lambda: attention_backward(dout, lse, *arrays, **options)
        return lambda: attention_forward(*arrays, **options)
    bounds = _number(rng, 0), _number(rng, h * batch * (1 if backward else g))
    out, lse = odd_array(rng, (batch, g, n, h, c), dtype), odd_array(rng, (batch, h, g, n), dtype)
    if backward:
        parts = pick(rng, (1, batch))
        grads = [
            odd_array(rng, (batch, g, n, h, c), dtype),
            *(odd_array(rng, (batch, k, r, h, c), dtype) for _ in "kv"),
        ]
        sums = [
            None if table is None else odd_array(rng, (parts, *shape), dtype)
            for shape in ((n + r - 1, h, c), (h, c), (h, c))
        ]
        dlse = None if rng.random() < 0.5 else odd_array(rng, (batch, h, g, n), dtype)
        return lambda: c_extension().attention_backward(
            out, lse, dlse, q, keys, held, table, u, v, mask, offset, *grads, *sums, *bounds
        )
    return lambda: c_extension().attention_forward(q, keys, held, table, u, v, mask, offset, out, lse, *bounds)


def _search_kernel(rng):
    n, m, d, k = (int(rng.integers(1, 9)) for _ in range(4))
    dtype = pick(rng, ("<f4", "<f8"))
    queries = odd_array(rng, (n if rng.random() < 0.9 else 40, d), dtype)
    keys = odd_array(rng, (m, d), pick(rng, (dtype, dtype, "<f2")))
    if rng.random() < 0.5:
        return lambda: exact_search(queries, keys, min(k, 50))
    rows = len(queries)
    ids, distances = odd_array(rng, (rows, k), "<i8"), odd_array(rng, (rows, k), dtype)
    first = _number(rng, 0)
    if rng.random() < 0.5:
        return lambda: c_extension().nearest(queries, keys, first, ids, distances)
    products, q_norms, k_norms = (odd_array(rng, shape, dtype) for shape in ((rows, m), (rows,), (m,)))
    return lambda: c_extension().nearest_screened(queries, keys, products, q_norms, k_norms, first, ids, distances)


def _panels(rng):
    rows, depth, panels = (int(rng.integers(1, 4)) for _ in range(3))
    dtype = pick(rng, ("<f4", "<f8"))
    arrays = (
        odd_array(rng, (rows, depth), dtype),
        odd_array(rng, (panels, depth, 64), dtype),
        odd_array(rng, (rows, 64 * panels), dtype),
    )
    bounds = _number(rng, 0), _number(rng, panels)
    return lambda: c_extension().multiply_panels(*arrays, *bounds)


def _hash_kernels(rng):
    n, t = (int(rng.integers(1, 9)) for _ in range(2))
    tokens = odd_array(rng, (n, t), pick(rng, ("<i8", "<u2", "<u4", "<i4")))
    if rng.random() < 0.3:
        counts = odd_array(rng, (BUCKETS,), "<u4") if rng.random() < 0.1 else np.zeros(pick(rng, (BUCKETS, 5)), "<u4")
        return lambda: count_features(tokens, counts)
    weights = WEIGHTS if rng.random() < 0.9 else odd_array(rng, (9,), "<i4")
    return partial(project_features, tokens, weights, pick(rng, (1, 8, 8, 8, 63, 0, -1, 10**30, 1.5, None)))


def _text_kernels(rng):
    action = rng.random()
    data = np.frombuffer(odd_text(rng).encode("utf-8", "surrogatepass") * 3 + b"a b c", np.uint8)
    if action < 0.3:
        return partial(gram_hashes, odd_array(rng, (20,), "|u1") if rng.random() < 0.3 else data, _number(rng, 3))
    if action < 0.6:
        offsets = np.sort(rng.integers(0, len(data) + 1, 4)) if rng.random() < 0.6 else odd_array(rng, (4,), "<i8")
        factors = odd_array(rng, (8,), "<u8") if rng.random() < 0.5 else np.arange(1, 9, dtype=np.uint64)
        return partial(minhash, data, offsets, _number(rng, 2), factors)
    if action < 0.9:
        n, m, k, r = (int(rng.integers(1, 6)) for _ in range(4))
        return partial(longest_common_substring, odd_array(rng, (n, m), "<i8"), odd_array(rng, (n, k, r), "<i8"))
    if action < 0.95:
        return partial(common_prefix_lengths, odd_array(rng, (5,), "<i8"), odd_array(rng, (2, 6), "<i8"))
    return partial(scatter_add, odd_array(rng, (4, 3)), odd_array(rng, (4,), "<i8"), _number(rng, 5, ODD_INTEGERS[:6]))


WEIGHTS = np.ones(BUCKETS, np.int32)
KERNELS = (
    lambda rng: _attention(rng, False), lambda rng: _attention(rng, True), _search_kernel, _panels, _hash_kernels,
    _text_kernels,
)  # fmt: skip


def _kernel(rng, world):
    function = pick(rng, KERNELS)(rng)
    state = SimpleNamespace(past=True)

    def call():
        try:
            with np.errstate(all="ignore"):
                return function()
        except KERNEL_ERRORS:
            state.past = False

    return state, call


# Each kind of input, and how many of a thousand inputs are of it.
PARSERS = {
    "manifest": (_manifest, 100), "documents": (_documents, 100), "tokenizer": (_tokenizer, 60),
    "hashing counts": (_hashing, 5),
    "index": (_index, 60), "array": (_mapped, 100), "JSON": (_json, 60), "safetensors": (_safetensors, 80),
    "checkpoint": (_checkpoint, 60), "memory": (_memory, 20),
    "log": (_log, 25), "lines of JSON": (_lines, 45), "folder": (_folder, 5), "sources": (_sources, 20),
    "patterns": (_patterns, 20),
    "settings": (_settings, 30), "terminal": (_terminal, 30), "database": (_database, 10), "embedder": (_embedder, 20),
    "kernel": (_kernel, 110), "model folder": (_model_folder, 20), "gguf": (_gguf, 20),
}  # fmt: skip
SCHEDULE = tuple(itertools.chain.from_iterable([kind] * share for kind, (_, share) in PARSERS.items()))


def kind_of(number: int) -> str:
    """The kind of an input, by its number."""
    return SCHEDULE[number * 617 % len(SCHEDULE)]


def case(seed: int, number: int, world: World) -> tuple[str, object, Call]:
    """The kind of an input, whether it gets past the first parser, and the call."""
    kind = kind_of(number)
    past, call = PARSERS[kind][0](np.random.default_rng([seed, number]), world)
    return kind, past, call
