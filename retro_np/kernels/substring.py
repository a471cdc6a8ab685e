"""Runs of tokens that two sequences share: longest common substrings, and the run that ends at each token."""

from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, kernel


def _longest(chunks: Array, values: np.ndarray, padding: int = 0) -> Array:
    """The longest run of tokens that each chunk shares with any one of its values.
    chunks: (N, m) integers. values: (N, k, r) integers. Padding matches nothing. Returns (N,) int64,
    0 (also if k = 0) to min(m, r). Divided by m it is r(C) of §2.6. Raises UserError for any other shape or dtype."""
    return np.asarray(_run_lengths(chunks, values, padding).max(axis=1, initial=0))


def common_prefix_lengths(tokens: Array, values: np.ndarray, padding: int = 0) -> Array:
    """For each token, the longest run of tokens that ends at it and also occurs in one of the values.
    tokens: (n,) integers. values: (k, r) integers. Padding matches nothing. Returns (n,) int64.
    The colours of the paper's tables 6 and 7. Raises UserError for any other shape or dtype."""
    name = "common_prefix_lengths"
    tokens, values = checked_tokens(name, "tokens", tokens, 1), checked_tokens(name, "values", values, 2)
    lengths: Array = _run_lengths(tokens[None], values[None], padding)[0]
    return lengths


def _run_lengths(chunks: Array, values: np.ndarray, padding: int) -> Array:
    """For each token of each chunk, (N, m), the longest run that ends at it and occurs in one of the chunk's values."""
    lengths = np.zeros(chunks.shape, np.int64)
    runs = np.zeros(values.shape, np.int32)  # the run that ends at the current chunk token and value token j
    for i, token in enumerate(chunks.T):
        runs = extend_runs(runs, token[:, None, None], values, padding)
        lengths[:, i] = runs.max(axis=(1, 2), initial=0)
    return lengths


def extend_runs(runs: Array, token: Any, values: np.ndarray, padding: int = 0) -> Array:
    """The runs in `values` (…, r) that end one token later: one longer where the tokens agree, 0 elsewhere."""
    longer = np.ones_like(runs)
    longer[..., 1:] += runs[..., :-1]
    return np.where((values == token) & (token != padding), longer, 0)


def _checked_pairs(chunks: Array, values: np.ndarray, padding: int = 0) -> tuple[np.ndarray, Array, int]:
    """Chunks and values as contiguous int64. Raises UserError unless there is one set of values per chunk."""
    name = "longest_common_substring"
    chunks, values = checked_tokens(name, "chunks", chunks, 2), checked_tokens(name, "values", values, 3)
    if len(chunks) != len(values):
        raise UserError(f"{name}: {len(chunks)} chunks but values for {len(values)}; give each chunk its own")
    return np.ascontiguousarray(chunks, np.int64), np.ascontiguousarray(values, np.int64), int(padding)


longest_common_substring = kernel("longest_common_substring", numpy=_longest, numba=True, check=_checked_pairs)


def checked_tokens(kernel_name: str, name: str, tokens: Any, ndim: int) -> Array:
    """The tokens as an array. Raises UserError unless it has `ndim` dimensions and an integer dtype that fits int64."""
    array = np.asarray(tokens)
    if array.ndim != ndim:
        raise UserError(f"{kernel_name}: {name} have shape {array.shape}; they must have {ndim} dimensions")
    if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
        raise UserError(f"{kernel_name}: {name} are {array.dtype}; tokens must be integers that fit int64")
    return array
