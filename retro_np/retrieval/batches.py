"""What all embedders of texts share: texts are checked, and embedded in batches of similar length."""

from collections.abc import Callable, Iterator

import numpy as np

from retro_np.errors import UserError
from retro_np.progress import progress_bar
from retro_np.retrieval.sources import without_surrogates


def checked_texts(texts: list[str]) -> list[str]:
    """An embedder's input without lone surrogates. Raises UserError unless it is a list of strings."""
    if isinstance(texts, str):
        raise UserError("embed takes a list of texts, not one string: pass [text]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {i} is {type(text).__name__}, not a string")
    return [without_surrogates(text) for text in texts]


def embed_in_batches(
    sequences: list[list[int]], batch_tokens: int, embed_batch: Callable[..., np.ndarray], d_key: int,
    show_progress: bool,
) -> np.ndarray:  # fmt: skip
    """The keys of N token sequences, (N, d_key) float32, in their order.

    Sequences are embedded in order of length, to save padding. embed_batch takes ids (B, t) int64, padded with 0, and
    a mask (B, t) that is false at padding. batch_tokens: see `_batches`."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    keys = np.empty((len(sequences), d_key), np.float32)
    with progress_bar("embedding" if show_progress else "", len(sequences)) as advance:
        for rows in _batches(lengths, batch_tokens):
            ids = np.zeros((len(rows), lengths[rows[-1]]), np.int64)  # The last row is the longest.
            mask = np.arange(ids.shape[1]) < lengths[rows, None]
            ids[mask] = np.concatenate([sequences[row] for row in rows])
            keys[rows] = embed_batch(ids, mask)
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
