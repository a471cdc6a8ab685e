"""Databases that a stranger may have written: a file of a valid one is changed, and hashes and manifest fit it."""

import functools
import io
import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hostile import values
from hostile.values import dumped, mutated, mutated_array, mutated_lines, odd_text, odd_value, pick
from support import SMALL, CountingEmbedder, json_lines

from retro_np.retrieval.build import build_database
from retro_np.retrieval.edit import remove_documents
from retro_np.retrieval.manifest import manifest_bytes, manifest_sha256

CHUNK_SIZE = 8
SETTINGS = replace(
    SMALL, chunk_size=CHUNK_SIZE, vocabulary_size=262, neighbours=2, extra_candidates=2, shard_bytes=500, d_key=8
)
EXTRA_NAMES = (
    "../outside", "/etc/passwd", "a/../../b", "./tokenizer.json", "shards/x/keys.npy", "shards/00000",
    "shards/00007/keys.npy",
    "shards/99999999999999999999/keys.npy", "shards/-1/keys.npy", "shards/0/keys.npy", "shards/²/keys.npy",
    "shards//00000/tokens.npy",
    "a\nb", "a\x1b[2Jb", "\ud800", "", ".", "C:\\x", "edit/x", "work/x", "shards/00000/deep/er/keys.npy",
    "neighbours/train/x/ids.npy",
    "splits/test/00000/tokens.npy", "splits/train/00000/tokens.npy", "splits/test/tombstones.npy", "a" * 300,
    "user/notes.txt", "shards/00000/index.hnsw", "hashing.npy",
    "shards/\u0661/keys.npy",
)  # fmt: skip


class Stored(NamedTuple):
    """A valid database in memory: its folder, its files' bytes by name, and its manifest."""

    path: Path
    files: dict[str, bytes]
    manifest: dict[str, Any]


class Mutation(NamedTuple):
    """A hostile database: `files` are written over a copy of the valid one, None removes a file.

    past: whether the changed file gets past its hash and past the first parser of its format. what: the changed file.
    """

    files: dict[str, bytes | None]
    past: bool
    what: str


def texts(hostile: bool = False) -> dict[str, str]:
    """Documents of a few chunks, named so that some are held out. hostile: with escape sequences in names and texts."""
    found = {}
    for number in range(12):
        payload = values.PAYLOADS[number % len(values.PAYLOADS)] if hostile else ""
        text = " ".join(f"word{(number * 7 + i) % 13} is {i}{payload}" for i in range(4 + number))
        found[f"doc {number}{payload}"] = text + (
            values.PAYLOADS[(number + 12) % len(values.PAYLOADS)] if hostile else ""
        )
    return found


def build(folder: Path, hostile: bool = False, half: bool = False) -> Path:
    """Build a database of several shards with a removed document.

    half: with float16 keys of another embedder, and with documents for valid and for test."""
    corpus = json_lines(folder.with_suffix(".jsonl"), texts(hostile))
    config = replace(SETTINGS, key_dtype="float16", held_out=0.1, held_out_bytes=0.4) if half else SETTINGS
    database = build_database(corpus, folder, config, CountingEmbedder() if half else "hashing")
    removed = next(record for record in database.documents if record["split"] == "train")
    remove_documents(folder, [removed["id"]])
    return folder


def stored(path: Path) -> Stored:
    """A database's files in memory."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    return Stored(path, {name: (path / name).read_bytes() for name in manifest["files"]}, manifest)


def resealed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest with its own right hash, for whatever is in it; unsealed if that cannot be computed."""
    data = dumped({key: value for key, value in manifest.items() if key != "sha256"}, indent=2)
    try:
        value = json.loads(data)
        return manifest_bytes(value | {"sha256": manifest_sha256(value)})
    except (ValueError, RecursionError, TypeError, UnicodeError):
        return data


def facts(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": sha256(data).hexdigest()}


def _mutated_manifest(rng, base: Stored) -> Mutation:
    paths = values._paths({key: value for key, value in base.manifest.items() if key not in ("files", "sha256")})
    paths = [path for path in paths if path] + [
        ("files", name, key) for name in base.files for key in ("bytes", "sha256")
    ][:6]
    manifest = mutated(rng, base.manifest, paths)
    if rng.random() < 0.15:  # names of files
        files = manifest.get("files", {})
        if isinstance(files, dict):
            name = pick(rng, EXTRA_NAMES)
            files[name] = pick(rng, (facts(b""), files.pop(pick(rng, [*base.files]), facts(b"")), odd_value(rng)))
    data = resealed(manifest)
    past = values.parses_as_json(data) and b'"sha256"' in data[-100:]
    return Mutation({"manifest.json": data}, past, "manifest.json")


def _mutated_tokenizer(rng, data: bytes) -> bytes:
    state = json.loads(data)
    action = rng.random()
    if action < 0.3:
        paths = [path for path in values._paths({k: v for k, v in state.items() if k != "model"}) if path]
        return dumped(mutated(rng, state, paths + [("model", key) for key in state["model"]]))
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    token = pick(rng, [*vocabulary])
    if action < 0.55:
        vocabulary[token] = pick(rng, (0, 1, -1, 5, 300, 2**32, 2**32 + 5, 10**30, 1.5, "1", None, [1], True))
    elif action < 0.75:
        vocabulary[odd_text(rng)] = pick(rng, (len(vocabulary), 0, -1, 2**32 - 1))
    elif action < 0.8:
        del vocabulary[token]
    elif action < 0.95:
        extra = pick(
            rng,
            ([["a", "b"]], [["", ""]], [["a"]], ["a b"], [[1, 2]], [None], [["a", "b", "c"]], "ab", 5, [token, token]),
        )
        state["model"]["merges"] = pick(rng, (extra, merges + extra if isinstance(extra, list) else extra))
    else:
        added = {
            "id": 2,
            "content": "a",
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": False,
        }
        state["added_tokens"] = [added]
    return dumped(state)


def mutated_index(rng, data: bytes) -> bytes:
    """A graph of hnswlib with one to three words changed, or cut."""
    data = bytearray(data)
    if rng.random() < 0.1 or len(data) < 100:
        return bytes(data[: int(rng.integers(len(data) + 1))]) + b"\0" * int(pick(rng, (0, 0, 1, 1000)))
    for _ in range(int(pick(rng, (1, 1, 2, 3)))):
        size = int(pick(rng, (1, 4, 4, 8)))
        position = int(rng.integers(96)) // size * size if rng.random() < 0.5 else int(rng.integers(len(data) - size))
        word = pick(rng, (0, 1, 2, 3, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1, int(rng.integers(2**32))))
        data[position : position + size] = (word % 256**size).to_bytes(size, "little")
    return bytes(data)


def _first_parser(name: str):
    if name.endswith(".npy"):
        return values.parses_as_npy
    if name.endswith(".jsonl"):
        return values.parses_as_lines
    return (lambda data: len(data) > 96) if name.endswith(".hnsw") else values.parses_as_json


GROUPS = {  # a group of files, and how often one of it is changed
    "manifest.json": 20, "documents.jsonl": 14, "duplicates.jsonl": 3, "tokenizer.json": 9, "hashing.npy": 5,
    "build.json": 3,
    "tombstones.npy": 7, "tokens.npy": 8, "documents.npy": 8, "keys.npy": 7, "ids.npy": 6, "distances.npy": 4,
    "equal.npy": 2,
    "index.hnsw": 6, "edit": 2,
}  # fmt: skip


@functools.cache
def _choices(names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    groups = [
        g for g in GROUPS if g in ("manifest.json", "edit") or any(name.rpartition("/")[2] == g for name in names)
    ]
    weights = np.array([GROUPS[group] for group in groups], float)
    return groups, np.cumsum(weights / weights.sum())


def mutation(rng, base: Stored, canary: str, group: str | None = None) -> Mutation:
    """One change to a database, with hashes and manifest that fit it. canary: what an unpickled object would create."""
    if group is None:
        groups, bounds = _choices(tuple(base.files))
        group = groups[int(np.searchsorted(bounds, rng.random()))]
    if group == "manifest.json":
        return _mutated_manifest(rng, base)
    if group == "edit":
        return _forged_edit(rng, base)
    name = pick(rng, [name for name in base.files if name.rpartition("/")[2] == group])
    return with_file(rng, base, name, changed_file(rng, name, base.files[name], canary))


def changed_file(rng, name: str, data: bytes, canary: str) -> bytes:
    """Other contents for a file of a database."""
    if name == "tokenizer.json":
        return _mutated_tokenizer(rng, data)
    if name.endswith(".json"):
        return dumped(mutated(rng, json.loads(data)))
    if name.endswith(".jsonl"):
        return mutated_lines(rng, data)
    if name.endswith(".hnsw"):
        return mutated_index(rng, data)
    if name == "hashing.npy" and rng.random() < 0.5:
        record = np.load(io.BytesIO(data))
        field = pick(rng, ("version", "d_key", "chunks", "counts", "tokenizer"))
        record[field] = (
            pick(rng, (0, 1, 2, 7, 9, 255)) if field == "tokenizer" else pick(rng, (0, 1, 2, 7, 9, 2**31, 2**32 - 1))
        )
        return values.saved(record)
    return mutated_array(rng, np.load(io.BytesIO(data)), canary)


def with_file(rng, base: Stored, name: str, data: bytes) -> Mutation:
    """The database with other contents of one file, resealed. The identities that depend on it mostly fit, too."""
    manifest = base.manifest | {"files": base.manifest["files"] | {name: facts(data)}}
    if name == "hashing.npy" and rng.random() < 0.8 and len(data) > 2**20:
        record = data[-np.dtype(np.load(io.BytesIO(base.files[name])).dtype).itemsize :]
        manifest["embedder"] = manifest["embedder"] | {"sha256": sha256(record).hexdigest()}
    if name == "tombstones.npy" and rng.random() < 0.3:
        manifest["generation"] = int(rng.integers(9))
    return Mutation({name: data, "manifest.json": resealed(manifest)}, _first_parser(name)(data), name)


def _forged_edit(rng, base: Stored) -> Mutation:
    """An edit that seems committed: its manifest is mutated, and so is one of its files, or its request."""
    action = rng.random()
    if action < 0.3:
        return Mutation({"edit/request.json": dumped(odd_value(rng))}, True, "edit/request.json")
    changed = _mutated_manifest(rng, base).files["manifest.json"]
    if action < 0.7:
        return Mutation({"edit/manifest.json": changed}, True, "edit/manifest.json")
    name, data = pick(rng, ("a/new", "user/notes.txt", "shards/00000/tokens.npy")), b"forged"
    manifest = base.manifest | {"files": base.manifest["files"] | {name: facts(data)}}
    return Mutation({f"edit/{name}": data, "edit/manifest.json": resealed(manifest)}, True, "edit/manifest.json")


class Folder:
    """A copy of a valid database whose files are changed and put back, without copying the rest."""

    def __init__(self, base: Stored, path: Path):
        self.base, self.path = base, path
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base.path, path, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
        self._changed: list[str] = []

    def write(self, change: Mutation) -> Path:
        """Put the files of a mutation in place, after undoing the last one."""
        for name in self._changed:
            self._put(name, self.base.files.get(name))
        self._put("manifest.json", None)
        if "manifest.json" not in change.files:
            os.link(self.base.path / "manifest.json", self.path / "manifest.json")
        for folder in ("edit", "work"):
            if os.path.lexists(self.path / folder) and not any(n.startswith(folder) for n in change.files):
                shutil.rmtree(self.path / folder, ignore_errors=True)
        for name, data in change.files.items():
            self._put(name, data)
        self._changed = [name for name in change.files if name != "manifest.json"]
        return self.path

    def _put(self, name: str, data: bytes | None) -> None:
        file = self.path / name
        file.unlink(missing_ok=True)
        if data is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if data is self.base.files.get(name):
                os.link(self.base.path / name, file)
            else:
                file.write_bytes(data)
