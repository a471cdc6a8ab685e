"""What an embedder must offer, and what all embedders share. An embedder turns a text into its key, a vector."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.progress import progress_bar
from retro_np.retrieval.index import EF_MARGIN
from retro_np.retrieval.sources import without_surrogates
from retro_np.retrieval.tokenizer import decode


class Embedder(Protocol):
    """Any object with these attributes can build and search a database; it needs no base class.

    Two more attributes are optional: `embed_tokens` (see TokenEmbedder), and `ef_margin`, the number of candidates that
    a graph search for its keys keeps beyond k (an int, by default EF_MARGIN)."""

    @property
    def name(self) -> str:
        """A human-readable name."""

    @property
    def sha256(self) -> str:
        """A hash of everything that determines a key: equal hashes, equal keys."""

    @property
    def d_key(self) -> int:
        """The width of a key."""

    def embed(self, texts: list[str], show_progress: bool = ...) -> np.ndarray:
        """The keys of N texts, (N, d_key) float32."""


@runtime_checkable
class TokenEmbedder(Protocol):
    """An embedder that also reads tokens, and is therefore fast: chunks are not decoded to text first."""

    def embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The keys (N, d_key) float32 of rows of tokens (N, t), padded with 0. A key depends on its row only."""


def checked_texts(texts: list[str]) -> list[str]:
    """An embedder's input without lone surrogates. Raises UserError unless it is a list of strings."""
    if isinstance(texts, str):
        raise UserError("embed takes a list of texts, not one string: pass [text]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {i} is {type(text).__name__}, not a string")
    return [without_surrogates(text) for text in texts]


def ef_margin_of(embedder: Embedder) -> int:
    """The embedder's own `ef_margin`, or the default."""
    return int(getattr(embedder, "ef_margin", EF_MARGIN))


def embed_chunks(embedder: Embedder, tokenizer: Tokenizer, chunks: np.ndarray) -> np.ndarray:
    """The keys of chunks of tokens (N, m), from the tokens if the embedder reads them, otherwise from their text."""
    if isinstance(embedder, TokenEmbedder):
        return embedder.embed_tokens(chunks)
    return embedder.embed([decode(tokenizer, chunk) for chunk in chunks.tolist()], show_progress=False)


def embed_in_batches(
    sequences: list[list[int]], batch_tokens: int, embed_batch: Callable[..., np.ndarray], d_key: int,
    show_progress: bool,
) -> np.ndarray:  # fmt: skip
    """The keys of N token sequences, (N, d_key) float32, in their order.

    Sequences are embedded in order of length, to save padding. embed_batch takes ids (B, t) int64, padded with 0, and
    a mask (B, t) that is false at padding. batch_tokens: see `_batches`."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    keys = np.empty((len(sequences), d_key), np.float32)
    with progress_bar("embedding", len(sequences) if show_progress else 0) as advance:
        for rows in _batches(lengths, batch_tokens):
            ids = np.zeros((len(rows), lengths[rows[-1]]), np.int64)  # The last row is the longest.
            mask = np.arange(ids.shape[1]) < lengths[rows, None]
            ids[mask] = np.concatenate([sequences[row] for row in rows])
            keys[rows] = embed_batch(ids, mask)
            if show_progress:
                advance(len(rows))
    return keys


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Row numbers in order of length, in batches padded to at most `batch_tokens`, unless a single row is longer."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > batch_tokens:
            yield order[start:end]
            start = end
