"""The work of a build on one shard: tokenise, embed, index, search. Paper §2.3.

Each task is a pure function of files and writes its own files atomically. Tasks may run on any machine that sees the
folder, more than once, and after a kill: the bytes are the same. `advance(n)` reports progress, usually in chunks."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import remove_folder, replacing, write_array
from retro_np.files.untrusted import mapped
from retro_np.kernels import threads
from retro_np.kernels.search import merge_lists
from retro_np.retrieval.deduplicate import DedupConfig, find_duplicates, grouped, index_of_held, postings, signatures
from retro_np.retrieval.documents import write_records
from retro_np.retrieval.embedders import Embedder, embed_chunks
from retro_np.retrieval.hashing import BUCKETS, count_features, feature_ids
from retro_np.retrieval.index import INDEX, QUERIES_PER_BLOCK, build_hnsw, hnswlib_installed
from retro_np.retrieval.neighbours import Shard, search_shard
from retro_np.retrieval.sharded import is_in, shard_array
from retro_np.retrieval.texts import Lines, parse_text, read_texts
from retro_np.retrieval.tokenizer import encode_batch, load_tokenizer
from retro_np.retrieval.vocabulary import vocabulary

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
    """Write a text shard's tokens.npy (N, m) and documents.npy (N,), and its records. Progress is in documents."""
    first_id, left_out = numbering
    bpe = _tokenizer(tokenizer, *_identity(tokenizer))
    (padding, end_of_text), size = vocabulary(bpe).special, len(vocabulary(bpe).pieces)
    dtype = np.uint16 if size <= 2**16 else np.uint32
    tokens, documents, lines = [np.empty((0, m), dtype)], [np.empty(0, np.int64)], []
    for block in _text_blocks(texts):
        included = [text for text in block if not is_in(text.number, left_out)]
        for text, ids in zip(included, encode_batch(bpe, [text.text for text in included]), strict=True):
            number = first_id + text.number - int(np.searchsorted(left_out, text.number))
            chunks = np.full((-(-(len(ids) + 1) // m), m), padding, dtype)
            chunks.reshape(-1)[: len(ids)] = ids
            chunks.reshape(-1)[len(ids)] = end_of_text
            tokens.append(chunks)
            documents.append(np.full(len(chunks), number, np.int64))
            record = {"id": number, "name": text.name, "source": text.source, "split": texts.parent.name}
            record |= {"bytes": len(text.text.encode()), "tokens": len(ids) + 1, "chunks": len(chunks)}
            lines.append(record | {"replaced": text.replaced, "sha256": text.sha256})
        advance(len(block), note=f"{sum(record['tokens'] for record in lines):,} tokens in {texts.stem}")
    write_records(records, lines)
    write_array(out / "documents.npy", np.concatenate(documents))
    write_array(out / "tokens.npy", np.concatenate(tokens))


def _text_blocks(path):
    return grouped(read_texts(path), lambda text: len(text.text), CHARACTERS_PER_BLOCK)


def count_shard(shard: Path, out: Path, tokenizer: Path, advance: Advance = silent) -> None:
    """Write, for each hashed feature, how many chunks of a shard contain it: (BUCKETS,) uint32."""
    tokens, counts = shard_array(shard, "tokens"), np.zeros(BUCKETS, np.uint32)
    bpe = _tokenizer(tokenizer, *_identity(tokenizer))
    for rows in threads.blocks(len(tokens), CHUNKS_PER_BLOCK):
        count_features(feature_ids(tokens[rows], bpe), counts)
        advance(rows.stop - rows.start)
    write_array(out, counts)


def embed_shard(
    shard: Path, work: Path, tokenizer: Path, embedder: Embedder, dtype: str, advance: Advance = silent
) -> None:
    """Write keys.npy (N, d_key), `dtype`, from a shard's tokens.

    An embedder of texts is slow, so each block of its keys is saved in `work`. The blocks' bounds are fixed, because a
    key's bits may depend on its block. An embedder of tokens (`embed_tokens`) is fast and saves nothing."""
    tokens, bpe = shard_array(shard, "tokens"), _tokenizer(tokenizer, *_identity(tokenizer))
    fast = hasattr(embedder, "embed_tokens")
    size = CHUNKS_PER_BLOCK if fast else CHUNKS_PER_SAVE
    with replacing(shard / "keys.npy") as file:  # block by block, since a shard's keys may not fit into memory
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(tokens), embedder.d_key)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(tokens), size):
            chunks, block_file = tokens[start : start + size], work / f"{start // size:06d}.npy"
            if block_file.exists():
                keys = mapped(block_file, dtype, (len(chunks), embedder.d_key))
            else:
                keys = _stored(embed_chunks(embedder, bpe, chunks), embedder, dtype, shard, start)
                if not fast:
                    write_array(block_file, keys)
            file.write(keys.tobytes())
            advance(len(chunks))
    remove_folder(work)


def _stored(keys, embedder, dtype, shard, start) -> np.ndarray:
    """The keys as stored. Raises UserError if a key is not finite in `dtype`."""
    with np.errstate(over="ignore"):
        keys = keys.astype(dtype)
    if len(bad := np.flatnonzero(~np.isfinite(keys).all(axis=1))):
        fault = f"a key that is not finite in {dtype} for chunk {start + bad[0]} of {shard}"
        hint = "build another database with --key-dtype float32, or " * (dtype == "float16") + "correct the embedder"
        raise UserError(f"embedder {embedder.name} made {fault}: {hint} and run the same command again")
    return keys


def index_shard(shard: Path, advance: Advance = silent) -> None:
    """Build the index of a shard's keys."""
    index = build_hnsw(shard_array(shard, "keys"), shard / INDEX)
    advance(len(index.keys))


def query_shard(
    query: Path, shard: IndexShard, out: Path, known: Path | None, candidates: int, ef_margin: int,
    advance: Advance = silent,
) -> None:  # fmt: skip
    """For each chunk of the shard `query`, write its nearest keys in `shard` to ids.npy and distances.npy in `out`.

    Chunks of the query's own document, which is in no other shard, are left out. known: a folder with lists of other
    index shards, which are merged with the new ones. ef_margin: see `HnswIndex`."""
    keys = shard_array(query, "keys")
    documents = shard_array(query, "documents", len(keys)) if query == shard.folder else None
    others = None if known is None else [shard_array(known, name, len(keys)) for name in ("ids", "distances")]
    opened = cached_shard(shard.folder, ef_margin, *_identity(shard.folder / "keys.npy"))
    ids, distances = np.empty((len(keys), candidates), np.int64), np.empty((len(keys), candidates), np.float32)
    for block in threads.blocks(len(keys), QUERIES_PER_BLOCK):
        queries = np.asarray(keys[block], np.float32)
        own = None if documents is None else documents[block]
        rows, measured = search_shard(opened, queries, candidates, own=own, deleted=shard.deleted)
        lists = [(np.where(rows >= 0, rows + shard.first_id, -1), measured)]
        lists += [] if others is None else [(others[0][block], others[1][block])]
        ids[block], distances[block] = merge_lists(lists, candidates)
        advance(len(queries))
    write_array(out / "ids.npy", ids)
    write_array(out / "distances.npy", distances)


def _identity(path):
    """A cache key that changes when the file is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=1)
def _tokenizer(path, *_identity) -> Tokenizer:
    """A tokenizer. It is cached because the library never frees the memory of one that has encoded text."""
    return load_tokenizer(path)


@functools.lru_cache(maxsize=1)
def cached_shard(folder: Path, ef_margin: int, *_identity: int) -> Shard:
    """A shard with its index, cached so that one index is in memory. Without graph or hnswlib, search is exact."""
    keys, has_graph = shard_array(folder, "keys"), hnswlib_installed() and (folder / INDEX).exists()
    return Shard(folder, keys, shard_array(folder, "documents", len(keys)), ef_margin if has_graph else None)


def sign_shard(texts: Path, out: Path, config: DedupConfig, exact: bool, advance: Advance = silent) -> None:
    """Write MinHash signatures of a text shard, (documents, hashes) uint32, or, if `exact`, its `postings`.

    Progress is in documents."""

    def read():
        for text in read_texts(texts):
            yield text.text
            advance(1)

    write_array(out, postings(read(), config.words)[0] if exact else signatures(read(), config))


def compare_shard(
    texts: Path, out: Path, held: list[Path], signed: list[Path], config: DedupConfig, exact: bool,
    advance: Advance = silent,
) -> None:  # fmt: skip
    """Write a record of each near-duplicate of a text in `held`. signed, exact: see `sign_shard`."""
    readers, records = [Lines(path) for path in held], []
    ends = np.cumsum([0, *map(len, readers)])

    def held_out(row):
        shard = int(np.searchsorted(ends, row, side="right")) - 1
        return parse_text(readers[shard][row - ends[shard]], str(held[shard]))

    dtype, shape = (np.uint64, (2, None)) if exact else (np.uint32, (None, config.hashes))
    index = index_of_held([mapped(path, dtype, shape) for path in signed], list(map(len, readers)), config, exact)
    for block in _text_blocks(texts):
        for match in find_duplicates([text.text for text in block], index, lambda row: held_out(row).text):
            text, other = block[match.row], held_out(match.held)
            record = {"number": text.number, "name": text.name, "source": text.source, "held_out": other.name}
            record |= {"estimated": round(match.estimated, 6), "exact": round(match.exact, 6)}
            records.append(record | {"sha256": text.sha256})
        advance(len(block))
    write_records(out, records)
