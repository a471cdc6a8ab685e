"""Exact nearest neighbours by squared L2: every key is compared with every query."""

import operator

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import c_extension, kernel

LANES = 16  # partial sums of a distance, as in csrc/search.c
QUERY_BLOCK = 64
KEY_BLOCK = 512  # keys that the NumPy code compares at once
CONVERTED_KEYS = 65536  # keys of another type that are converted at once


def _search_numpy(queries, keys, k):
    """The k nearest keys of each query, by squared L2, compared one by one.

    queries: (N, d) float32 or float64. keys: (M, d) of a float dtype; where it is not the queries', as with float16
    keys, they are converted CONVERTED_KEYS at a time, so a memory-mapped array stays on disk. k ≥ 1, also above M.
    Returns ids (N, k) int64 and distances (N, k) of the queries' dtype, ascending by (distance, id): of equal distances
    the lowest id comes first. Where there are fewer than k keys, id −1 and distance inf.
    A distance is Σ (q − k)² summed in one order, so it depends on q and k alone, and NumPy and C give the same bits.
    Raises UserError for shapes that do not fit, other dtypes, k < 1, and entries that are NaN or infinite.
    """
    return _search(queries, keys, k, _nearest_numpy)


def _search_c(queries, keys, k):
    return _search(queries, keys, k, _nearest_c)


exact_search = kernel("exact_search", numpy=_search_numpy, c=_search_c)


def _search(queries, keys, k, nearest):
    """Check, convert the keys where they need it, and merge what `nearest` finds in each part of them."""
    queries, keys, k = _checked(queries, keys, k)
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, queries.dtype)
    fits = keys.dtype == queries.dtype and keys.flags.c_contiguous and keys.flags.aligned
    part = max(1, len(keys)) if fits else CONVERTED_KEYS
    for start in range(0, max(1, len(keys)), part):
        some_keys = np.require(keys[start : start + part], queries.dtype, ["C", "A"])
        some_ids, some_distances = nearest(queries, some_keys, k, start)
        some_ids[some_ids >= 0] += start
        ids, distances = _merge(ids, distances, some_ids, some_distances)
    return ids, distances


def _merge(ids, distances, more_ids, more_distances):
    """The k first of two lists by (distance, id). Read as unsigned, −1 comes after every id: a missing one is last."""
    ids = np.concatenate([ids, more_ids], axis=1)
    distances = np.concatenate([distances, more_distances], axis=1)
    order = np.lexsort((ids.view(np.uint64), distances))[:, : ids.shape[1] - more_ids.shape[1]]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def _nearest_numpy(queries, keys, k, start):
    _check_finite(queries, keys, start)
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, queries.dtype)
    for first in range(0, len(queries), QUERY_BLOCK):
        rows = slice(first, first + QUERY_BLOCK)
        for key in range(0, len(keys), KEY_BLOCK):
            block = _distances(queries[rows], keys[key : key + KEY_BLOCK])
            block_ids = np.argsort(block, axis=1, kind="stable")[:, :k]
            block = np.take_along_axis(block, block_ids, 1)
            ids[rows], distances[rows] = _merge(ids[rows], distances[rows], block_ids + key, block)
    return ids, distances


def _distances(queries, keys):
    """Σ (q − k)² for each pair, (N, M). Column t is added to lane t mod LANES; then the lanes are folded in half."""
    lanes = np.zeros((len(queries), len(keys), LANES), queries.dtype)
    with np.errstate(over="ignore"):  # the distance of two finite vectors may be inf
        for t in range(0, queries.shape[1], LANES):
            difference = queries[:, None, t : t + LANES] - keys[None, :, t : t + LANES]
            lanes[..., : difference.shape[-1]] += difference * difference
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _nearest_c(queries, keys, k, start):
    ids = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k), queries.dtype)
    try:
        c_extension().nearest(queries, keys, k, ids, distances)
    except ValueError:
        _check_finite(queries, keys, start)  # C looks for NaN in its own pass; the row's number is made out here
        raise
    return ids, distances


def _checked(queries, keys, k):
    queries, keys = np.asarray(queries), np.asarray(keys)
    for name, array in (("queries", queries), ("keys", keys)):
        if array.ndim != 2:
            raise UserError(f"exact_search: {name} have shape {array.shape}; they must be a matrix, a row a vector")
        if array.dtype.kind != "f":
            raise UserError(f"exact_search: {name} are {array.dtype}; convert them to float32")
    if queries.dtype not in (np.float32, np.float64):
        raise UserError(f"exact_search: queries are {queries.dtype}; convert them to float32 or float64")
    if queries.shape[1] != keys.shape[1]:
        raise UserError(
            f"exact_search: queries have width {queries.shape[1]} and keys {keys.shape[1]}; "
            "both must come from the same embedder"
        )
    try:
        k = operator.index(k)
    except TypeError:
        raise UserError(f"exact_search: k is {k!r}; it must be an integer") from None
    if k < 1:
        raise UserError(f"exact_search: k is {k}; ask for at least one neighbour")
    return np.require(queries, queries.dtype.newbyteorder("="), ["C", "A"]), keys, k


def _check_finite(queries, keys, start):
    for name, array, offset in (("queries", queries, 0), ("keys", keys, start)):
        for first in range(0, len(array), CONVERTED_KEYS):
            bad = ~np.isfinite(array[first : first + CONVERTED_KEYS]).all(axis=1)
            if bad.any():
                row = offset + first + int(bad.argmax())
                raise UserError(f"exact_search: {name}: row {row} holds NaN or infinity; mend what made it")
