"""Build a database: corpus → tokenizer → chunks → keys → index → neighbours → manifest. Paper §2.3.

Each stage is a function of files that earlier ones left and leaves its own whole or not at all, so a build that was
killed anywhere goes on where it was and ends in the same bytes. The layout:

    manifest.json        what is here, and every file's SHA-256; written last
    build.json           what was asked for
    tokenizer.json       documents.jsonl       tombstones.npy
    shards/00000/        tokens.npy documents.npy keys.npy index.hnsw: the training documents, which can be retrieved
    splits/valid/00000/  tokens.npy documents.npy keys.npy: the held-out ones, which can't
    neighbours/SPLIT/00000/   ids.npy distances.npy
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import (
    disk_full_said,
    locked,
    replacing,
    sha256_of,
    visible,
    write_array,
    write_atomically,
    write_json,
)
from retro_np.progress import progress_bar
from retro_np.retrieval.corpus import Corpus, Document, find_corpus, held_out, limited
from retro_np.retrieval.database import FORMAT, MANIFEST, Database, manifest_bytes, manifest_sha256
from retro_np.retrieval.index import build_hnsw
from retro_np.retrieval.neighbours import precompute_neighbours
from retro_np.retrieval.tokenizer import (
    END_OF_TEXT,
    check_vocabulary_size,
    decode,
    encode,
    load_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)

REQUEST = "build.json"
BLOCK = 256  # chunks embedded between two saves
LONGEST_CHUNK, MOST_NEIGHBOURS = 65_536, 10_000  # far beyond use: a mistake is refused before anything is made


@dataclass(frozen=True)
class BuildConfig:
    """How to cut and index a corpus."""

    chunk_size: int = 64  # m
    vocabulary_size: int = 4096
    tokenizer: str | None = None  # an existing tokenizer.json; None: train one on the training documents
    held_out: float = 0.1  # share of documents, chosen by a hash of the name
    key_dtype: str = "float32"
    neighbours: int = 10  # k kept for each chunk
    spares: int = 22  # more candidates, for those that a training sequence's documents exclude
    limit_bytes: int | None = None  # a slice of the corpus, about so many bytes of text
    shard_chunks: int = 1_000_000

    def __post_init__(self):
        if self.chunk_size < 1 or self.neighbours < 1 or self.spares < 0 or self.shard_chunks < 1:
            raise UserError("chunk_size, neighbours and shard_chunks are at least 1, spares at least 0")
        if self.chunk_size > LONGEST_CHUNK or self.neighbours + self.spares > MOST_NEIGHBOURS:
            raise UserError(
                f"a chunk has at most {LONGEST_CHUNK:,} tokens, and at most {MOST_NEIGHBOURS:,} neighbours and spares"
            )
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is a share of at least 0 and below 1, not {self.held_out}")
        if self.key_dtype not in ("float16", "float32"):
            raise UserError(f"keys are float16 or float32, not {self.key_dtype}")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise UserError("a slice of the corpus has at least one byte")
        if self.tokenizer is None:
            check_vocabulary_size(self.vocabulary_size)


def build_database(source: str | Path, out: str | Path, config: BuildConfig, embedder) -> Database:
    """Build a database from a corpus (see `corpus.find_corpus`), go on with one that was begun, or open a finished one.

    embedder: an object with embed(texts, show_progress) -> (N, d_key) float32, d_key, name and sha256, as load_bert
    gives. Raises UserError for an empty corpus, for a folder that holds another build, that another process builds in,
    for a full disk, and for keys that are not finite.
    """
    out = Path(out)
    corpus = limited(find_corpus(source, leave_out=out), config.limit_bytes)
    if all(held_out(place.name, config.held_out) for place in corpus.places):
        raise UserError(f"every document of {source} is held out: give more documents, or --held-out 0")
    if out.is_dir() and not (out / REQUEST).exists() and any(visible(out)):
        raise UserError(f"{out} holds other files: give a new folder for the database")
    with locked(out, "build"):
        request = _request(corpus, config, embedder)
        _settle_request(out, request)
        if (out / MANIFEST).exists():
            print(f"{out} is a finished database of just this: it is used as it is", file=sys.stderr)
        else:
            with disk_full_said(out):
                _build(out, corpus, config, embedder, request["corpus"])
    return Database.open(out, embedder)


def _build(out: Path, corpus: Corpus, config: BuildConfig, embedder, digest: str) -> None:
    tokenizer = _tokenizer(out, corpus, config)
    if not (out / "documents.jsonl").exists():
        _write_chunks(out, corpus, config, tokenizer, digest)
    if not (out / "tombstones.npy").exists():
        write_array(out / "tombstones.npy", np.empty(0, np.int64))
    shards, held = sorted((out / "shards").iterdir()), sorted((out / "splits" / "valid").iterdir())
    for folder in [*shards, *held]:
        if not (folder / "keys.npy").exists():
            _write_keys(folder, tokenizer, embedder, config.key_dtype)
        for block in folder.glob("keys.*.npy"):  # also those that an earlier process was killed before removing
            block.unlink()
    for folder in shards:
        if not (folder / "index.hnsw").exists():
            with progress_bar(f"index of {folder.name}", 1) as advance:
                build_hnsw(np.load(folder / "keys.npy", allow_pickle=False, mmap_mode="r"), folder / "index.hnsw")
                advance()
    # the manifest of what is there so far lets the database be used to find its own neighbours
    _write_neighbours(out, {"train": shards, "valid": held}, config, _unfinished(out, config, tokenizer, embedder))
    manifest = _manifest(out, config, tokenizer, embedder)
    write_atomically(out / MANIFEST, manifest_bytes(manifest))


def _tokenizer(out, corpus, config):
    path = out / "tokenizer.json"
    if not path.exists():
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            training = corpus.where(lambda name: not held_out(name, config.held_out))
            with progress_bar("training the tokenizer", len(training.places)) as advance:
                texts = (_counted(document.text, advance) for document in training.documents())
                tokenizer = train_tokenizer(texts, config.vocabulary_size)
        save_tokenizer(tokenizer, path)
    return load_tokenizer(path)


def _counted(text: str, advance) -> str:
    advance()
    return text


def _write_chunks(out: Path, corpus: Corpus, config: BuildConfig, tokenizer, digest: str) -> None:
    """tokens.npy and documents.npy of every shard and split; documents.jsonl last, as the sign that all are there."""
    m = config.chunk_size
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    homes = {"train": out / "shards", "valid": out / "splits" / "valid"}
    pending = {split: ([], []) for split in homes}
    written = dict.fromkeys(homes, 0)
    lines, seen = [], hashlib.sha256()

    def flush(split, at_end=False):
        chunks, documents = pending[split]
        while len(chunks) >= config.shard_chunks or (at_end and (chunks or not written[split])):
            folder = homes[split] / f"{written[split]:05d}"
            here = slice(config.shard_chunks)
            write_array(folder / "tokens.npy", np.array(chunks[here], dtype).reshape(-1, m))
            write_array(folder / "documents.npy", np.array(documents[here], np.int64))
            del chunks[here], documents[here]
            written[split] += 1

    with progress_bar("tokenising", len(corpus.places)) as advance:
        for number, document in enumerate(corpus.documents()):
            split = "valid" if held_out(document.name, config.held_out) else "train"
            tokens = np.array([*encode(tokenizer, document.text), END_OF_TEXT], dtype)
            chunks = np.zeros((-(-len(tokens) // m), m), dtype)
            chunks.reshape(-1)[: len(tokens)] = tokens
            pending[split][0].extend(chunks)
            pending[split][1].extend([number] * len(chunks))
            record = {"id": number, "name": document.name, "source": corpus.source, "split": split}
            record |= {"bytes": len(document.text.encode()), "chunks": len(chunks), "replaced": document.replaced}
            lines.append(json.dumps(record) + "\n")
            seen.update(_digested(document))
            flush(split)
            advance()
    for split in homes:
        flush(split, at_end=True)
    if seen.hexdigest() != digest:
        raise UserError(f"the corpus changed while it was read for {out}: build it in another folder")
    write_atomically(out / "documents.jsonl", "".join(lines).encode())


def _write_keys(folder: Path, tokenizer, embedder, dtype: str) -> None:
    """keys.npy, embedded in blocks of fixed bounds that are saved one by one: a key's bits depend on its block."""
    tokens = np.load(folder / "tokens.npy", allow_pickle=False, mmap_mode="r")
    starts = range(0, len(tokens), BLOCK)
    blocks = [folder / f"keys.{start // BLOCK:06d}.npy" for start in starts]
    done = sum(block.exists() for block in blocks)
    with progress_bar(f"keys of {folder.parent.name}/{folder.name}", len(tokens), done * BLOCK) as advance:
        for start, block in zip(starts, blocks, strict=True):
            if not block.exists():
                texts = [decode(tokenizer, chunk) for chunk in tokens[start : start + BLOCK].tolist()]
                write_array(block, _checked_keys(embedder, texts, dtype, folder, start))
                advance(len(texts))
    shape = (len(tokens), int(embedder.d_key))
    with replacing(folder / "keys.npy") as file:  # a block at a time: a shard's keys may be larger than memory
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.load(block, allow_pickle=False).tobytes())


def _checked_keys(embedder, texts: list[str], dtype: str, folder: Path, start: int) -> np.ndarray:
    keys = np.asarray(embedder.embed(texts, show_progress=False), np.float32)
    if keys.shape != (len(texts), embedder.d_key):
        raise UserError(
            f"embedder {embedder.name} made keys of shape {keys.shape}, not {(len(texts), embedder.d_key)}, of the "
            f"chunks from {start} in {folder}: mend the embedder and run the same again"
        )
    with np.errstate(over="ignore"):
        keys = keys.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(keys).all(axis=1))
    if len(bad):
        raise UserError(
            f"embedder {embedder.name} made a key that is not finite, of chunk {start + bad[0]} in {folder} "
            f"({dtype}): mend the embedder and run the same again"
        )
    return keys


def _write_neighbours(out, splits, config, database) -> None:
    def exact(queries, k):
        return database.search_keys(queries, k, exact=True)

    chunks_of = np.array([document["chunks"] for document in database.documents])
    for split, folders in splits.items():
        own_chunks = chunks_of if split == "train" else None
        for folder in folders:
            home = out / "neighbours" / split / folder.name
            if (home / "distances.npy").exists():  # written second
                continue
            keys = np.load(folder / "keys.npy", allow_pickle=False, mmap_mode="r")
            documents = np.load(folder / "documents.npy", allow_pickle=False)
            with progress_bar(f"neighbours of {split}/{folder.name}", len(keys)) as advance:
                ids, distances = precompute_neighbours(
                    keys, documents, database.search_keys, exact, database.document_of,
                    config.neighbours + config.spares, own_chunks, advance,
                )  # fmt: skip
            write_array(home / "ids.npy", ids)
            write_array(home / "distances.npy", distances)


def _unfinished(out, config, tokenizer, embedder) -> Database:
    facts = _facts(out, config, tokenizer, embedder) | {"files": dict.fromkeys(_file_names(out))}
    return Database(out, facts, embedder, "hnsw")


def _facts(out, config, tokenizer, embedder) -> dict:
    with (out / "documents.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    splits = {
        split: {
            "documents": sum(d["split"] == split for d in documents),
            "chunks": sum(d["chunks"] for d in documents if d["split"] == split),
            "bytes": sum(d["bytes"] for d in documents if d["split"] == split),
        }
        for split in ("train", "valid")
    }
    return {
        "format": FORMAT,
        "chunk_size": config.chunk_size,
        "vocabulary_size": tokenizer.get_vocab_size(),
        "tokenizer": tokenizer_sha256(tokenizer),
        "embedder": {"name": embedder.name, "sha256": embedder.sha256, "d_key": int(embedder.d_key)},
        "neighbours": config.neighbours,
        "spares": config.spares,
        "splits": splits,
        "replaced": sum(d["replaced"] for d in documents),
    }


def _manifest(out, config, tokenizer, embedder) -> dict:
    manifest = _facts(out, config, tokenizer, embedder)
    manifest["files"] = {
        name: {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)} for name in _file_names(out)
    }
    return manifest | {"sha256": manifest_sha256(manifest)}


def _file_names(out: Path) -> list[str]:
    files = (p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".") and p.suffix != ".partial")
    return sorted(name for name in (p.relative_to(out).as_posix() for p in files) if name != MANIFEST)


def _request(corpus: Corpus, config: BuildConfig, embedder) -> dict:
    digest, count = hashlib.sha256(), 0
    for document in corpus.documents():
        digest.update(_digested(document))
        count += 1
    request = asdict(config) | {"documents": count, "corpus": digest.hexdigest(), "embedder": embedder.sha256}
    if config.tokenizer is not None:
        request |= {"tokenizer": tokenizer_sha256(load_tokenizer(config.tokenizer)), "vocabulary_size": None}
    return request | {"skipped": corpus.skipped}


def _digested(document: Document) -> bytes:
    """What a corpus is known by, of one document."""
    return json.dumps([document.name, document.text]).encode()


def _settle_request(out: Path, request: dict) -> None:
    """Record what is asked for, or hold it against what was asked for when this folder was begun."""
    path = out / REQUEST
    if not path.exists():
        write_json(path, request)
        return
    try:
        begun = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove {out}, or give another folder") from error
    for name, value in request.items():
        if begun.get(name) != value:
            raise UserError(
                f"{out} was begun with another {name} ({begun.get(name)}, now {value}): "
                "give the same as then, or another folder"
            )
