"""The work of a build on one shard: tokenise, embed, index, search. Paper §2.3.

Each task is a pure function of files and writes its own files atomically. Tasks may run on any machine that sees the
folder, more than once, and again after a kill: the bytes are the same. `advance(n)` reports progress, in chunks unless
a docstring says otherwise.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import mapped, remove_folder, replacing, write_array
from retro_np.kernels.search import merge_lists
from retro_np.retrieval.deduplicate import DedupConfig, band_index, find_duplicates, signatures
from retro_np.retrieval.documents import write_records
from retro_np.retrieval.embedders import Embedder, TokenEmbedder, embed_chunks
from retro_np.retrieval.hashing import BUCKETS, count_features
from retro_np.retrieval.index import INDEX, QUERIES_PER_BLOCK, build_hnsw, hnswlib_installed
from retro_np.retrieval.neighbours import NEIGHBOUR, Shard, packed, search_shard
from retro_np.retrieval.sharded import is_in
from retro_np.retrieval.texts import Lines, Text, read_texts
from retro_np.retrieval.tokenizer import END_OF_TEXT, encode_batch, load_tokenizer

CHUNKS_PER_SAVE = 256  # An embedder of texts is slow: its keys are saved this often.
CHUNKS_PER_BLOCK = 16_384  # Embedders of tokens and the counting of features take this many chunks at a time.
CHARACTERS_PER_BLOCK = 1 << 21  # Texts of about this length are processed together.

Advance = Callable[..., None]
Numbering = tuple[int, np.ndarray]  # the first document's id, and the sorted corpus numbers of documents left out


class IndexShard(NamedTuple):
    """A shard to search in: its folder, the id of its first chunk, and its deleted rows, sorted."""

    folder: Path
    first_id: int
    deleted: np.ndarray


def silent(steps: int, note: str = "") -> None:
    """A progress callback that does nothing."""


def tokenise_shard(
    texts: Path, out: Path, records: Path, tokenizer: Path, m: int, numbering: Numbering, advance: Advance = silent
) -> None:
    """Write a text shard's tokens.npy (N, m) and documents.npy (N,) to `out`, and a line per document to `records`.

    Progress is in documents.
    """
    first_id, left_out = numbering
    bpe = _tokenizer(tokenizer, *_identity(tokenizer))
    dtype = np.uint16 if bpe.get_vocab_size() <= 2**16 else np.uint32
    tokens, documents, lines = [np.empty((0, m), dtype)], [np.empty(0, np.int64)], []
    for block in _text_blocks(texts):
        included = [text for text in block if not is_in(text.number, left_out)]
        for text, ids in zip(included, encode_batch(bpe, [text.text for text in included]), strict=True):
            number = first_id + text.number - int(np.searchsorted(left_out, text.number))
            chunks = np.zeros((-(-(len(ids) + 1) // m), m), dtype)
            chunks.reshape(-1)[: len(ids)] = ids
            chunks.reshape(-1)[len(ids)] = END_OF_TEXT
            tokens.append(chunks)
            documents.append(np.full(len(chunks), number, np.int64))
            lines.append(_record(number, text, len(ids) + 1, len(chunks), texts.parent.name))
        advance(len(block), note=f"{sum(record['tokens'] for record in lines):,} tokens in {texts.stem}")
    write_records(records, lines)
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
        if size >= CHARACTERS_PER_BLOCK:
            yield block
            block, size = [], 0
    yield block


def count_shard(shard: Path, out: Path, advance: Advance = silent) -> None:
    """Write, for each hashed feature, how many chunks of a shard contain it: (BUCKETS,) uint32."""
    tokens = mapped(shard / "tokens.npy")
    counts = np.zeros(BUCKETS, np.uint32)
    for start in range(0, len(tokens), CHUNKS_PER_BLOCK):
        part = tokens[start : start + CHUNKS_PER_BLOCK]
        count_features(part, counts)
        advance(len(part))
    write_array(out, counts)


def embed_shard(
    shard: Path, work: Path, tokenizer: Path, embedder: Embedder, dtype: str, advance: Advance = silent
) -> None:
    """Write keys.npy (N, d_key), `dtype`, from a shard's tokens.

    An embedder of texts is slow, so each block of its keys is saved in `work`. The blocks' bounds are fixed, because a
    key's bits may depend on its block. An embedder of tokens (`embed_tokens`) is fast and saves nothing.
    """
    tokens, bpe = mapped(shard / "tokens.npy"), _tokenizer(tokenizer, *_identity(tokenizer))
    fast = isinstance(embedder, TokenEmbedder)
    size = CHUNKS_PER_BLOCK if fast else CHUNKS_PER_SAVE
    with replacing(shard / "keys.npy") as file:  # block by block, since a shard's keys may not fit into memory
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(tokens), int(embedder.d_key))}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(tokens), size):
            chunks, block_file = tokens[start : start + size], work / f"{start // size:06d}.npy"
            if block_file.exists():
                keys = np.load(block_file, allow_pickle=False)
            else:
                keys = _checked_keys(embed_chunks(embedder, bpe, chunks), len(chunks), embedder, dtype, shard, start)
                if not fast:
                    write_array(block_file, keys)
            file.write(keys.tobytes())
            advance(len(chunks))
    remove_folder(work)


def _checked_keys(keys, count, embedder, dtype, shard, start) -> np.ndarray:
    """The keys as stored. Raises UserError if their shape is wrong or a key is not finite in `dtype`."""
    keys = np.asarray(keys, np.float32)
    if keys.shape != (count, embedder.d_key):
        raise UserError(
            f"embedder {embedder.name} made keys of shape {keys.shape}, not {(count, embedder.d_key)}, "
            f"for {count} chunks from {start} of {shard}: check the embedder and run the same command again"
        )
    with np.errstate(over="ignore"):
        keys = keys.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(keys).all(axis=1))
    if len(bad):
        raise UserError(
            f"embedder {embedder.name} made a key that is not finite in {dtype} for chunk {start + bad[0]} of {shard}: "
            "check the embedder and run the same command again"
        )
    return keys


def index_shard(shard: Path, advance: Advance = silent) -> None:
    """Build the index of a shard's keys."""
    keys = mapped(shard / "keys.npy")
    build_hnsw(keys, shard / INDEX)
    advance(len(keys))


def query_shard(
    query: Path, shard: IndexShard, out: Path, candidates: int, ef_margin: int, advance: Advance = silent
) -> None:
    """For each chunk of the shard `query`, write its nearest keys in `shard`: (N, candidates) NEIGHBOUR.

    If both are the same shard, chunks of the query's own document are left out. No document is in two shards.
    ef_margin: see `HnswIndex`.
    """
    keys = mapped(query / "keys.npy")
    documents = np.load(query / "documents.npy", allow_pickle=False) if query == shard.folder else None
    opened = _shard(shard.folder, ef_margin, *_identity(shard.folder / "keys.npy"))
    lists = [np.empty((0, candidates), NEIGHBOUR)]
    for start in range(0, len(keys), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        queries = np.asarray(keys[block], np.float32)
        own_documents = None if documents is None else documents[block]
        rows, distances = search_shard(opened, queries, candidates, own=own_documents, deleted=shard.deleted)
        lists.append(packed(np.where(rows >= 0, rows + shard.first_id, -1), distances))
        advance(len(queries))
    write_array(out, np.concatenate(lists))


def merge_shard(
    parts: list[Path], out: Path, candidates: int, known: Path | None = None, advance: Advance = silent
) -> None:
    """Merge the lists that several index shards gave for a query shard into ids.npy and distances.npy in `out`.

    known: a folder with the ids.npy and distances.npy of other index shards, which are merged too.
    """
    lists = [(part["id"], part["distance"]) for part in map(mapped, parts)]
    if known is not None:
        lists.append((mapped(known / "ids.npy"), mapped(known / "distances.npy")))
    ids = np.empty((len(lists[0][0]), candidates), np.int64)
    distances = np.empty(ids.shape, np.float32)
    for start in range(0, len(ids), QUERIES_PER_BLOCK):
        rows = slice(start, start + QUERIES_PER_BLOCK)
        ids[rows], distances[rows] = merge_lists([(i[rows], distance[rows]) for i, distance in lists], candidates)
        advance(len(ids[rows]))
    write_array(out / "ids.npy", ids)
    write_array(out / "distances.npy", distances)


def forget_shard() -> None:
    """Free the cached shard's index."""
    _shard.cache_clear()


def _identity(path):
    """A cache key that changes when the file is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=1)
def _tokenizer(path, *_identity) -> Tokenizer:
    """A tokenizer. It is cached because the library never frees the memory of one that has encoded text."""
    return load_tokenizer(path)


@functools.lru_cache(maxsize=1)
def _shard(folder, ef_margin, *_identity) -> Shard:
    """A shard with its index. The cache holds one shard, so that one index is in memory at a time.

    A shard without a graph, or one that is read without hnswlib, is searched exactly.
    """
    has_graph = hnswlib_installed() and (folder / INDEX).exists()
    return Shard.open(folder, ef_margin if has_graph else None)


def sign_shard(texts: Path, out: Path, config: DedupConfig, advance: Advance = silent) -> None:
    """Write the MinHash signatures of a text shard, (documents, hashes) uint32. Progress is in documents."""
    parts = [np.empty((0, config.hashes), np.uint32)]
    for block in _text_blocks(texts):
        parts.append(signatures([text.text for text in block], config))
        advance(len(block))
    write_array(out, np.concatenate(parts))


def compare_shard(
    texts: Path, out: Path, held: list[Path], signed: list[Path], config: DedupConfig, advance: Advance = silent
) -> None:
    """Write a record for each document of a text shard that nearly duplicates a held-out one. Progress is in documents.

    held: the held-out text shards. signed: their signatures.
    """
    held_signatures = [np.load(path, allow_pickle=False) for path in signed]
    index, readers = band_index(np.concatenate(held_signatures), config), [Lines(path) for path in held]
    ends = np.cumsum([0, *map(len, held_signatures)])

    def held_out(row):
        shard = int(np.searchsorted(ends, row, side="right")) - 1
        return Text(*json.loads(readers[shard][row - ends[shard]]))

    records = []
    for block in _text_blocks(texts):
        for match in find_duplicates([text.text for text in block], index, lambda row: held_out(row).text, config):
            text, other = block[match.row], held_out(match.held)
            record = {"number": text.number, "name": text.name, "source": text.source, "held_out": other.name}
            record |= {"estimated": round(match.estimated, 6), "exact": round(match.exact, 6)}
            records.append(record | {"sha256": text.sha256})
        advance(len(block))
    write_records(out, records)
