"""What a build does to one shard: tokenise, embed, index, query. Paper §2.3.

Each is a pure function of files, and leaves its file whole or not at all: it may run in any order, on any machine that
sees the folder, twice or again after a kill, and the bytes are the same. `advance(n)` tells how far it is, in chunks.
"""

import functools
import json
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import mapped, remove_folder, replacing, write_array
from retro_np.retrieval.deduplicate import DedupConfig, band_index, find_duplicates, signatures
from retro_np.retrieval.documents import write_records
from retro_np.retrieval.hashing import BUCKETS, count_features
from retro_np.retrieval.index import build_hnsw
from retro_np.retrieval.neighbours import NEIGHBOUR, Shard, is_in, merge_lists, packed, search_shard
from retro_np.retrieval.texts import Lines, Text, read_texts
from retro_np.retrieval.tokenizer import END_OF_TEXT, decode, encode_batch, load_tokenizer

BLOCK = 256  # chunks that a slow embedder takes between two saves
QUICK_BLOCK = 16384  # chunks that a quick one takes at once
QUERIES_A_BLOCK = 1024
TEXTS_A_BLOCK = 1 << 21  # characters tokenised at once


def silent(steps: int, note: str = "") -> None:
    """Nobody is told."""


def tokenise_shard(texts: Path, out: Path, records: Path, tokenizer: Path, m: int, numbering: tuple, advance=silent):
    """A text shard becomes tokens.npy (N, m) and documents.npy (N,) in `out`, and a line a document in `records`.

    numbering: (first id, sorted corpus numbers of the documents that are left out). Steps are documents.
    """
    first_id, left_out = numbering
    bpe = loaded_tokenizer(tokenizer)
    dtype = np.uint16 if bpe.get_vocab_size() <= 2**16 else np.uint32
    tokens, documents, found = [np.empty((0, m), dtype)], [np.empty(0, np.int64)], []
    for block in _text_blocks(texts):
        kept = [text for text in block if not is_in(text.number, left_out)]
        for text, ids in zip(kept, encode_batch(bpe, [text.text for text in kept]), strict=True):
            number = first_id + text.number - int(np.searchsorted(left_out, text.number))
            chunks = np.zeros((-(-(len(ids) + 1) // m), m), dtype)
            chunks.reshape(-1)[: len(ids)] = ids
            chunks.reshape(-1)[len(ids)] = END_OF_TEXT
            tokens.append(chunks)
            documents.append(np.full(len(chunks), number, np.int64))
            found.append(_record(number, text, len(ids) + 1, len(chunks), texts.parent.name))
        advance(len(block), note=f"{sum(record['tokens'] for record in found):,} tokens in {texts.stem}")
    write_records(records, found)
    write_array(out / "documents.npy", np.concatenate(documents))
    write_array(out / "tokens.npy", np.concatenate(tokens))


def _record(number, text, tokens, chunks, split):
    record = {"id": number, "name": text.name, "source": text.source, "split": split}
    record |= {"bytes": len(text.text.encode()), "tokens": tokens, "chunks": chunks, "replaced": text.replaced}
    return record | {"sha256": text.sha256}


def _text_blocks(path):
    block, size = [], 0
    for text in read_texts(path):
        block.append(text)
        size += len(text.text)
        if size >= TEXTS_A_BLOCK:
            yield block
            block, size = [], 0
    yield block


def count_shard(shard: Path, out: Path, advance=silent):
    """How many chunks of a shard hold each hashed feature, for the hashing embedder's weights."""
    tokens = mapped(shard / "tokens.npy")
    counts = np.zeros(BUCKETS, np.uint32)
    for start in range(0, len(tokens), QUICK_BLOCK):
        part = tokens[start : start + QUICK_BLOCK]
        count_features(part, counts)
        advance(len(part))
    write_array(out, counts)


def embed_shard(shard: Path, work: Path, tokenizer: Path, embedder, dtype: str, advance=silent):
    """keys.npy (N, d_key), `dtype`, of a shard's tokens.

    An embedder that reads texts is slow: it takes blocks of fixed bounds, saved one by one in `work`, since a key's
    bits may depend on its block. One that has `embed_tokens` is quick and starts again.
    """
    tokens = mapped(shard / "tokens.npy")
    quick = hasattr(embedder, "embed_tokens")
    bpe = None if quick else loaded_tokenizer(tokenizer)
    size = QUICK_BLOCK if quick else BLOCK

    def keys_of(start):
        part = tokens[start : start + size]
        if quick:
            keys = embedder.embed_tokens(part)
        else:
            keys = embedder.embed([decode(bpe, chunk) for chunk in part.tolist()], show_progress=False)
        return checked_keys(keys, len(part), embedder, dtype, f"{shard} from chunk {start} on")

    shape = (len(tokens), int(embedder.d_key))
    if not quick:
        for start in range(0, len(tokens), size):
            block = work / f"{start // size:06d}.npy"
            if not block.exists():
                write_array(block, keys_of(start))
            advance(min(size, len(tokens) - start))
    with replacing(shard / "keys.npy") as file:  # a block at a time: a shard's keys may be larger than memory
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(tokens), size):
            if quick:
                file.write(keys_of(start).tobytes())
                advance(min(size, len(tokens) - start))
            else:
                file.write(np.load(work / f"{start // size:06d}.npy", allow_pickle=False).tobytes())
    remove_folder(work)


def checked_keys(keys, count: int, embedder, dtype: str, where: str) -> np.ndarray:
    """Keys as they are stored. Raises UserError for another shape, and for a key that is not finite in `dtype`."""
    keys = np.asarray(keys, np.float32)
    if keys.shape != (count, embedder.d_key):
        raise UserError(
            f"embedder {embedder.name} made keys of shape {keys.shape}, not {(count, embedder.d_key)}, of {where}: "
            "mend the embedder and run the same again"
        )
    with np.errstate(over="ignore"):
        keys = keys.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(keys).all(axis=1))
    if len(bad):
        raise UserError(
            f"embedder {embedder.name} made a key that is not finite in {dtype}, number {bad[0]} of {where}: "
            "mend the embedder and run the same again"
        )
    return keys


def index_shard(shard: Path, advance=silent):
    """index.hnsw of a shard's keys."""
    keys = mapped(shard / "keys.npy")
    build_hnsw(keys, shard / "index.hnsw")
    advance(len(keys))


def query_shard(query: Path, shard: Path, out: Path, first: int, hidden, candidates: int, margin: int, advance=silent):
    """The nearest `candidates` keys that one shard has for each chunk of another, or of itself: a list of lists.

    first: the id of the shard's first chunk; hidden: its rows that are not to be found, sorted. A chunk's own document
    is left out, which in another shard it cannot be: no document is of two. margin: see `HnswIndex`.
    """
    keys = mapped(query / "keys.npy")
    own = np.load(query / "documents.npy", allow_pickle=False) if query == shard else None
    searched = loaded_shard(shard, margin)
    lists = []
    for start in range(0, len(keys), QUERIES_A_BLOCK):
        rows = slice(start, start + QUERIES_A_BLOCK)
        queries = np.asarray(keys[rows], np.float32)
        rows_found, distances = search_shard(
            searched, queries, candidates, own=None if own is None else own[rows], hidden=hidden
        )
        lists.append(packed(np.where(rows_found >= 0, rows_found + first, -1), distances))
        advance(len(queries))
    write_array(out, np.concatenate([np.empty((0, candidates), NEIGHBOUR), *lists]))


def merge_shard(parts: list[Path], home: Path, candidates: int, known: Path | None = None, advance=silent):
    """ids.npy and distances.npy in `home` of the lists that index shards gave for a query shard.

    known: a folder with the ids.npy and distances.npy that come of further shards.
    """
    lists = [(part["id"], part["distance"]) for part in (mapped(p) for p in parts)]
    if known is not None:
        lists.append(tuple(mapped(known / f"{n}.npy") for n in ("ids", "distances")))
    ids = np.empty((len(lists[0][0]), candidates), np.int64)
    distances = np.empty(ids.shape, np.float32)
    for start in range(0, len(ids), QUERIES_A_BLOCK):
        rows = slice(start, start + QUERIES_A_BLOCK)
        ids[rows], distances[rows] = merge_lists([(found[rows], far[rows]) for found, far in lists], candidates)
        advance(len(ids[rows]))
    write_array(home / "ids.npy", ids)
    write_array(home / "distances.npy", distances)


def loaded_tokenizer(path: Path):
    """A tokenizer, the last one asked for kept: of each that has encoded, the library keeps megabytes for good."""
    return _tokenizer(path, *_identity(path))


def loaded_shard(folder: Path, margin: int) -> Shard:
    """A shard with its index in memory: the last one asked for is kept, so that one is in memory at a time."""
    return _loaded(folder, margin, *_identity(folder / "index.hnsw"))


def forget_shard() -> None:
    """Let go of the index in memory."""
    _loaded.cache_clear()


def _identity(path):
    """What changes when a file is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=1)
def _tokenizer(path, *_identity):
    return load_tokenizer(path)


@functools.lru_cache(maxsize=1)
def _loaded(folder, margin, *_identity):
    return Shard.open(folder, margin)


def sign_shard(texts: Path, out: Path, config: DedupConfig, advance=silent):
    """MinHash signatures (documents, hashes) of a text shard."""
    parts = [np.empty((0, config.hashes), np.uint32)]
    for block in _text_blocks(texts):
        parts.append(signatures([text.text for text in block], config))
        advance(len(block))
    write_array(out, np.concatenate(parts))


def compare_shard(texts: Path, held: list[Path], signed: list[Path], out: Path, config: DedupConfig, advance=silent):
    """The documents of a text shard that are too like a held-out one, a record a line.

    held: the held-out text shards; signed: their signatures.
    """
    index = band_index(np.concatenate([np.load(path, allow_pickle=False) for path in signed]), config)
    readers, ends = [Lines(path) for path in held], []
    for path in signed:
        ends.append(len(mapped(path)) + (ends[-1] if ends else 0))

    def held_out(row: int):
        shard = int(np.searchsorted(ends, row, side="right"))
        return Text(*json.loads(readers[shard][row - (ends[shard - 1] if shard else 0)]))

    records = []
    for block in _text_blocks(texts):
        for found in find_duplicates([text.text for text in block], index, lambda row: held_out(row).text, config):
            text, other = block[found.row], held_out(found.held)
            record = {"number": text.number, "name": text.name, "source": text.source, "held_out": other.name}
            record |= {"estimated": round(found.estimated, 6), "exact": round(found.exact, 6)}
            records.append(record | {"sha256": text.sha256})
        advance(len(block))
    write_records(out, records)
