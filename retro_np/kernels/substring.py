"""Runs of tokens that two sequences share: longest common substrings, and the run that ends at each token."""

import functools

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import kernel
from retro_np.kernels.threads import blocks, parallel_for

CHUNKS = 64  # that a thread takes at once


def _longest_numpy(chunks, values):
    """The longest run of tokens that each chunk has in common with any one of its values.

    chunks: (N, m) integers. values: (N, k, r) integers. Token 0 is padding and matches nothing.
    Returns (N,) int64, from 0 (also where k = 0) to min(m, r). Divided by m it is r(C) of the paper, §2.6.
    Raises UserError for other shapes or dtypes.
    """
    chunks, values = _checked(chunks, values)
    longest = np.zeros(len(chunks), np.int64)
    runs = np.zeros(values.shape, np.int32)  # ending at chunk token i and value token j
    for token in chunks.T:
        runs = extend_runs(runs, token[:, None, None], values)
        np.maximum(longest, runs.max(axis=(1, 2), initial=0), out=longest)
    return longest


def _longest_numba(chunks, values):
    chunks, values = _checked(chunks, values)
    longest, loop = np.zeros(len(chunks), np.int64), _compiled()
    parallel_for(lambda some: loop(chunks[some], values[some], longest[some]), blocks(len(chunks), CHUNKS))
    return longest


longest_common_substring = kernel("longest_common_substring", numpy=_longest_numpy, numba=_longest_numba)


def common_prefix_lengths(tokens, values) -> np.ndarray:
    """For each token, the longest run of tokens that ends at it and also stands in one of the values.

    tokens: (n,) integers. values: (k, r) integers. Token 0 is padding and matches nothing. Returns (n,) int64.
    The colours of the paper's tables 6 and 7. Raises UserError for other shapes or dtypes.
    """
    tokens = _integers("common_prefix_lengths", "tokens", tokens, 1)
    values = _integers("common_prefix_lengths", "values", values, 2)
    lengths = np.zeros(len(tokens), np.int64)
    runs = np.zeros(values.shape, np.int64)
    for i, token in enumerate(tokens):
        runs = extend_runs(runs, token, values)
        lengths[i] = runs.max(initial=0)
    return lengths


def extend_runs(runs, token, values):
    """Runs in `values` (…, r) that end one token later: one longer than those before, where the tokens agree."""
    longer = np.ones_like(runs)
    longer[..., 1:] += runs[..., :-1]
    return np.where((values == token) & (token != 0), longer, 0)


@functools.cache
def _compiled():
    from retro_np.kernels.jit import jit

    return jit(_longest_loops)


def _longest_loops(chunks, values, longest):
    """The same with two rows of runs for one value at a time: what Numba compiles."""
    before, runs = np.zeros((2, values.shape[2] + 1), np.int64)  # place j at j + 1, so that none is before the first
    for n in range(values.shape[0]):
        best = 0
        for v in range(values.shape[1]):
            before[:] = 0
            for i in range(chunks.shape[1]):
                token = chunks[n, i]
                for j in range(values.shape[2]):  # no step needs the one before it: this loop is vectorised
                    run = before[j] + 1 if (token == values[n, v, j]) & (token != 0) else 0
                    runs[j + 1] = run
                    best = max(best, run)
                before, runs = runs, before
        longest[n] = best


def _checked(chunks, values):
    name = "longest_common_substring"
    chunks, values = _integers(name, "chunks", chunks, 2), _integers(name, "values", values, 3)
    if len(chunks) != len(values):
        raise UserError(f"{name}: {len(chunks)} chunks and values for {len(values)}; give each chunk its own")
    return chunks, values


def _integers(function, name, array, ndim):
    array = np.asarray(array)
    if array.ndim != ndim:
        raise UserError(f"{function}: {name} have shape {array.shape}; they must have {ndim} dimensions")
    if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
        raise UserError(f"{function}: {name} are {array.dtype}; tokens are integers, up to int64")
    return np.ascontiguousarray(array, np.int64)
