"""An embedder without trained weights: hashed tokens and pairs of tokens, weighted by rarity, under random signs.

It computes TF-IDF (Spärck Jones 1972) of hashed features and projects them to d_key columns. Chunks that share rare
words and phrases get near keys, which is what retrieval needs, at about a thousand times BERT's speed."""

import functools
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import write_array
from retro_np.files.untrusted import mapped
from retro_np.kernels.hashing import BUCKETS, MAX_SPECIAL_TOKEN, count_features, project_features
from retro_np.kernels.substring import checked_tokens
from retro_np.retrieval.batches import checked_texts, embed_in_batches
from retro_np.retrieval.config import D_KEY
from retro_np.retrieval.manifest import REBUILD
from retro_np.retrieval.tokenizer import encode_batch, tokenizer_sha256
from retro_np.retrieval.vocabulary import Special, special_ids, vocabulary

__all__ = ["BUCKETS", "D_KEY", "HASHED", "HashingEmbedder", "count_features", "load_hashing", "save_hashing"]

# The algorithm's version, for tokens of our own tokenizers and of others. A different version makes different keys.
VERSION, VERSION_OF_OTHERS = 1, 2
HASHED = "hashing"  # the `embedder` argument of `build_database` for a database's own hashing embedder
MAX_BATCH_TOKENS = 1 << 18
FILE = np.dtype(
    [("version", "<u4"), ("d_key", "<u4"), ("tokenizer", "u1", 32), ("chunks", "<u8"), ("counts", "<u4", BUCKETS)]
)


@dataclass(frozen=True, eq=False)
class HashingEmbedder:
    """Makes keys from token counts; an Embedder that reads tokens too (see `embedders.py`).

    counts: (BUCKETS,) uint32 from `count_features`: in how many of the `chunks` chunks each bucket's features occur.
    d_key: the width of a key. Raises UserError for counts and numbers that do not fit together."""

    tokenizer: Tokenizer = field(repr=False)
    counts: np.ndarray = field(repr=False)
    chunks: int
    d_key: int = D_KEY
    name: ClassVar[str] = HASHED
    # Random signs leave keys far from each other: for a recall of 95 %, a graph needs ten times BERT's candidates.
    ef_margin: ClassVar[int] = 640

    def __post_init__(self) -> None:
        if self.counts.shape != (BUCKETS,) or self.counts.dtype != np.uint32:
            actual = f"{self.counts.shape} {self.counts.dtype}"
            raise UserError(f"counts must be ({BUCKETS},) uint32, not {actual}: use count_features")
        if self.d_key < 1:
            raise UserError(f"d_key must be at least 1, not {self.d_key}")
        if self.counts.max() > self.chunks:
            raise UserError(f"a feature was counted in {self.counts.max()} of {self.chunks} chunks: pass all chunks")

    @cached_property
    def sha256(self) -> str:
        """A hash of the algorithm's version, d_key, counts and tokenizer: equal hashes, equal keys."""
        return hashlib.sha256(_record(self).tobytes()).hexdigest()

    @cached_property
    def weights(self) -> np.ndarray:
        """Each bucket's weight, (BUCKETS,) int32: √idf in units of 1/64, with idf = log(1 + chunks / (1 + count)) > 0.

        The square root was measured to be best: the projection's noise hides a similarity of few rare features."""
        return np.maximum(1, np.rint(64 * np.sqrt(np.log1p(self.chunks / (1.0 + self.counts))))).astype(np.int32)

    def embed(self, texts: list[str], show_progress: bool = True) -> np.ndarray:
        """The keys of N texts, (N, d_key) float32: those of their tokens. Raises UserError if one is not a string."""
        sequences = encode_batch(self.tokenizer, checked_texts(texts))
        padding = special_ids(self.tokenizer).padding
        embed_batch = lambda ids, mask: self.embed_tokens(np.where(mask, ids, padding))  # noqa: E731
        return embed_in_batches(sequences, MAX_BATCH_TOKENS, embed_batch, self.d_key, show_progress)

    def embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The keys of rows of tokens (N, t), integers: (N, d_key) float32 of length one.

        A key's bits depend only on its row. Padding and end-of-text are not counted (see `feature_ids`). All rows
        without tokens share one key, far from other keys. Raises UserError for anything but token ids."""
        return project_features(feature_ids(tokens, self.tokenizer), self.weights, self.d_key)


def feature_ids(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens (N, t) as the kernels take them, to which ids up to MAX_SPECIAL_TOKEN are no features.

    Those of the tokenizers that are trained here are such ids already. The large vocabularies of others have several
    tokens for a word, by case and by the space before it, which become one feature. Punctuation and blanks are left
    out, so that words on both sides are a pair, and so are ids without a text, which spare embeddings have. Raises
    UserError for anything but token ids."""
    if is_own(tokenizer):
        return tokens
    tokens, table = checked_tokens("feature_ids", "tokens", tokens, 2), _word_numbers(tokenizer)
    words = table[np.minimum(tokens, len(table) - 1)]
    return np.take_along_axis(words, np.argsort(words == 0, axis=1, kind="stable"), axis=1)


def is_own(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's special ids are those of the tokenizers that are trained here."""
    return special_ids(tokenizer) == Special()


@functools.lru_cache(maxsize=4)
def _word_numbers(tokenizer: Tokenizer) -> np.ndarray:
    """For each id, a number above MAX_SPECIAL_TOKEN that its word shares with other spellings, or 0 without letters."""
    known, numbers = vocabulary(tokenizer), dict[bytes, int]()
    table = np.zeros(len(known.pieces) + 1, np.int64)  # The last number is for ids beyond.
    for i, piece in enumerate(known.pieces):
        text = piece.decode(errors="replace")
        if i not in known.special and any(letter.isalnum() or not letter.isascii() for letter in text):
            word = piece if "\ufffd" in text else text.strip().lower().encode()  # Parts of characters stay different.
            table[i] = numbers.setdefault(word, len(numbers) + MAX_SPECIAL_TOKEN + 1)
    return table


def save_hashing(embedder: HashingEmbedder, path: Path | str) -> None:
    """Write an embedder's counts as .npy, atomically. The same embedder gives the same bytes."""
    write_array(path, _record(embedder))


def load_hashing(path: Path | str, tokenizer: Tokenizer) -> HashingEmbedder:
    """Read a file that `save_hashing` wrote. Raises UserError for a damaged file and for the wrong tokenizer."""
    if not Path(path).is_file():
        raise UserError(f"no feature counts at {path}: {REBUILD}")
    record = mapped(path, FILE, (), hint=REBUILD)
    if record["version"] != (version := VERSION if is_own(tokenizer) else VERSION_OF_OTHERS):
        raise UserError(f"{path} has version {record['version']}, but this version reads {version}: {REBUILD}")
    if record["tokenizer"].tobytes() != bytes.fromhex(tokenizer_sha256(tokenizer)):
        raise UserError(f"{path} was counted with another tokenizer: use the one in its folder, or {REBUILD}")
    if not 1 <= record["d_key"] < 2**20 or record["counts"].max() > record["chunks"]:
        raise UserError(f"{path} is damaged (its numbers do not fit together): {REBUILD}")
    return HashingEmbedder(tokenizer, record["counts"].astype(np.uint32), int(record["chunks"]), int(record["d_key"]))


def _record(embedder):
    record = np.zeros((), FILE)
    version = VERSION if is_own(embedder.tokenizer) else VERSION_OF_OTHERS
    record["version"], record["d_key"], record["chunks"] = version, embedder.d_key, embedder.chunks
    record["tokenizer"] = np.frombuffer(bytes.fromhex(tokenizer_sha256(embedder.tokenizer)), np.uint8)
    record["counts"] = embedder.counts
    return record
