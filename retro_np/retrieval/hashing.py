"""The embedder without weights: a chunk's tokens and pairs of tokens, the rarer the heavier, under random signs.

TF-IDF (Spärck Jones 1972) of hashed features, projected to d_key columns: chunks that share rare words and turns of
phrase get near keys, which is what retrieval by continuation asks for, at about a thousand times BERT's speed.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import write_array
from retro_np.kernels.hashing import BUCKETS, count_features, project_features
from retro_np.progress import progress_bar
from retro_np.retrieval.sources import checked_texts
from retro_np.retrieval.tokenizer import encode_batch, tokenizer_sha256

__all__ = ["BUCKETS", "D_KEY", "HashingEmbedder", "count_features", "load_hashing", "save_hashing"]

VERSION = 1  # of the algorithm: another one makes other keys
D_KEY = 128
MARGIN = 640
UNIT = 64  # a weight of one, as an integer
BATCH_TOKENS = 1 << 18  # of a padded batch of texts
FILE = np.dtype(
    [("version", "<u4"), ("d_key", "<u4"), ("tokenizer", "u1", 32), ("chunks", "<u8"), ("counts", "<u4", BUCKETS)]
)


@dataclass(frozen=True, eq=False)
class HashingEmbedder:
    """Keys of token counts. `embed` makes them; name and sha256 tell it from another.

    counts: (2^BITS,) uint32, in how many of `chunks` chunks each bucket of features stands, by `count_features`.
    """

    tokenizer: Tokenizer = field(repr=False)
    counts: np.ndarray = field(repr=False)
    chunks: int
    d_key: int = D_KEY

    def __post_init__(self):
        if self.counts.shape != (BUCKETS,) or self.counts.dtype != np.uint32:
            found = f"{self.counts.shape} {self.counts.dtype}"
            raise UserError(f"counts are {found}, and must be ({BUCKETS},) uint32: use count_features")
        if self.d_key < 1:
            raise UserError(f"a key of {self.d_key} columns can't be made: ask for one or more")
        most = self.counts.max()
        if most > self.chunks:
            raise UserError(
                f"a feature stands in {most} of {self.chunks} chunks: give the counts' own number of chunks"
            )

    @property
    def margin(self) -> int:
        """Candidates that an index keeps beyond k: random signs leave keys nearly as far from each other as they can
        be, where a graph needs ten times BERT's margin to find 95 % of what is nearest.
        """
        return MARGIN

    @property
    def name(self) -> str:
        """What a manifest calls it."""
        return "hashing"

    @cached_property
    def sha256(self) -> str:
        """A hash over the algorithm's version, d_key, counts and tokenizer: equal hashes, equal keys."""
        return hashlib.sha256(_record(self).tobytes()).hexdigest()

    @cached_property
    def weights(self) -> np.ndarray:
        """A bucket's weight, (2^BITS,) int32: √idf in units of 1/64, idf = log(1 + chunks / (1 + count)) > 0.

        The root, and each occurrence counting, were found by measuring: a projection's noise is the same for all
        pairs of chunks, and similarities that rest on a few rare features alone drown in it.
        """
        idf = np.log1p(self.chunks / (1.0 + self.counts))
        return np.maximum(1, np.rint(UNIT * np.sqrt(idf))).astype(np.int32)

    def embed(self, texts: list[str], show_progress: bool = True) -> np.ndarray:
        """Keys of texts of any length: (N, d_key) float32, those that `embed_tokens` gives for their tokens.

        Raises UserError for what is no text.
        """
        ids = encode_batch(self.tokenizer, checked_texts(texts))
        keys = np.empty((len(texts), self.d_key), np.float32)
        with progress_bar("embedding", len(texts) if show_progress else 0) as advance:
            for rows in _batches(np.array([len(tokens) for tokens in ids], np.int64)):
                padded = np.zeros((len(rows), len(ids[rows[-1]])), np.int64)  # the last one is the longest
                for tokens, row in zip(padded, rows, strict=True):
                    tokens[: len(ids[row])] = ids[row]
                keys[rows] = self.embed_tokens(padded)
                if show_progress:
                    advance(len(rows))
        return keys

    def embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Keys of rows of tokens: (N, t) integers to (N, d_key) float32 of length one.

        A key depends on its row alone, to the bit. Padding and end-of-text count nothing, and break a pair. Rows
        without a token share one key, that is as far from the others as unrelated chunks are. Raises UserError for
        what are no tokens.
        """
        return project_features(tokens, self.weights, self.d_key)


def save_hashing(embedder: HashingEmbedder, path) -> None:
    """Write what was counted as .npy, whole or not at all; the same embedder gives the same bytes."""
    write_array(path, _record(embedder))


def load_hashing(path, tokenizer: Tokenizer) -> HashingEmbedder:
    """Read what `save_hashing` wrote. Raises UserError for a damaged file, and for a tokenizer that isn't its own."""
    path = Path(path)
    again = "build the database anew"
    if not path.is_file():
        raise UserError(f"no counts of features at {path}: {again}")
    if path.stat().st_size > 2 * FILE.itemsize:
        raise UserError(f"{path} is too large for counts of features: {again}")
    try:
        record = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, SyntaxError) as error:
        raise UserError(f"{path} holds no counts of features ({type(error).__name__}): {again}") from error
    if not isinstance(record, np.ndarray) or record.dtype != FILE or record.shape != ():
        raise UserError(f"{path} holds something else than counts of features: {again}")
    if record["version"] != VERSION:
        raise UserError(f"{path} is of version {record['version']}, and this is {VERSION}: {again}")
    if record["tokenizer"].tobytes() != bytes.fromhex(tokenizer_sha256(tokenizer)):
        raise UserError(f"{path} was counted with another tokenizer: take the tokenizer.json beside it, or {again}")
    if record["d_key"] < 1 or record["counts"].max() > record["chunks"]:
        raise UserError(f"{path} is damaged, its numbers don't fit together: {again}")
    return HashingEmbedder(tokenizer, record["counts"].astype(np.uint32), int(record["chunks"]), int(record["d_key"]))


def _record(embedder):
    """The file's one entry."""
    record = np.zeros((), FILE)
    record["version"], record["d_key"], record["chunks"] = VERSION, embedder.d_key, embedder.chunks
    record["tokenizer"] = np.frombuffer(bytes.fromhex(tokenizer_sha256(embedder.tokenizer)), np.uint8)
    record["counts"] = embedder.counts
    return record


def _batches(lengths):
    """Row numbers in order of length, cut so that a padded batch holds about BATCH_TOKENS tokens."""
    order, start = np.argsort(lengths, kind="stable"), 0
    while start < len(order):
        # the room that a batch takes when it ends at each of the rows that are left
        room = lengths[order[start:]] * np.arange(1, len(order) - start + 1)
        end = start + max(1, int(np.searchsorted(room, BATCH_TOKENS, "right")))
        yield order[start:end]
        start = end
