"""Exact nearest neighbours by squared L2: every key is compared with every query."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, c_extension, check_arrays, ignore_underflow, kernel, threads

LANES = 16  # partial sums of a distance, as in csrc/search.c
QUERIES_PER_JOB = 64
NUMPY_KEYS = 512  # keys that the NumPy code compares in one operation
MAX_CONVERTED_KEYS = 65536  # keys of a dtype other than the queries' that are converted in one operation
# The rest is for the C code and was found by measuring.
KEYS_PER_JOB = 8192
MIN_SCREENED_QUERIES = 32  # With fewer queries a matrix product costs more than it saves.
MIN_KEYS_PER_SCREENED_NEIGHBOUR = 16  # If k is a larger share of the keys, screening excludes too few.
MAX_PRODUCT_ENTRIES = 1024 * 2048  # entries of one matrix product, 8 MB in float32
MAX_PRODUCT_QUERIES, MAX_PRODUCT_KEYS = 1024, 16384


def _search_numpy(queries: Array, keys: Array, k: int) -> tuple[Array, Array]:
    """The k nearest keys of each query by squared L2, compared one by one.
    queries: (N, d) float32 or float64. keys: (M, d) of a float dtype. Keys whose dtype is not the queries', such as
    float16, are converted MAX_CONVERTED_KEYS at a time, so a memory-mapped array stays on disk. k ≥ 1, also above M.
    Returns ids (N, k) int64 and distances (N, k) of the queries' dtype, ascending by (distance, id): among equal
    distances the lowest id comes first. Entries beyond the M keys have id −1 and distance inf.
    A distance is Σ (q − k)² summed in one fixed order, so it depends only on q and k: NumPy and C give the same bits.
    Raises UserError for shapes that do not match, other dtypes, k < 1, and entries that are NaN or infinite."""
    return _search(queries, keys, k, _update_numpy)


def _search(queries: Array, keys: Array, k: int, update: Callable[..., None]) -> tuple[Array, Array]:
    """Convert the keys where needed, and let `update` add each part of them to the lists.
    A query's list is a row of ids and a row of distances, ascending, with −1 and inf in the rest."""
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, queries.dtype)
    fits = keys.dtype == queries.dtype and keys.flags.c_contiguous and keys.flags.aligned
    size = max(1, len(keys)) if fits else MAX_CONVERTED_KEYS
    for start in range(0, max(1, len(keys)), size):
        update(queries, np.require(keys[start : start + size], queries.dtype, ["C", "A"]), start, ids, distances)
    return ids, distances


def merge_lists(lists: Sequence[tuple[Array, Array]], k: int) -> tuple[Array, Array]:
    """The first k entries by (distance, id) of several lists of ids (N, ·) int64 and distances (N, ·).
    A missing entry has id −1 and distance inf, in the lists and the result. Returns ids (N, k) and distances (N, k)."""
    ids, distances = (np.concatenate(part, axis=1) for part in zip(*lists, strict=True))
    order = np.lexsort((ids.view(np.uint64), distances))[:, :k]  # as an unsigned integer −1 comes after every id
    ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
    rest = [(0, 0), (0, k - ids.shape[1])]
    return np.pad(ids, rest, constant_values=-1), np.pad(distances, rest, constant_values=np.inf)


def _update_numpy(queries: Array, keys: Array, start: int, ids: Array, distances: Array) -> None:
    _check_finite(queries, keys, start)
    k = ids.shape[1]
    for rows in threads.blocks(len(queries), QUERIES_PER_JOB):
        for part in threads.blocks(len(keys), NUMPY_KEYS):
            block = _distances(queries[rows, None], keys[None, part])
            nearest = np.argsort(block, axis=1, kind="stable")[:, :k]
            new = nearest + (start + part.start), np.take_along_axis(block, nearest, 1)
            ids[rows], distances[rows] = merge_lists([(ids[rows], distances[rows]), new], k)


def listed_distances(queries: Array, keys: Array, ids: Array) -> Array:
    """The squared distance of each query (N, d) from its listed keys: ids (N, k) → (N, k), with exact_search's bits.
    keys: (M, d) of any float dtype. Only the listed rows are read, one part at a time."""
    distances = np.empty(ids.shape, queries.dtype)

    def measure(rows: slice) -> None:
        distances[rows] = _distances(queries[rows, None], np.asarray(keys[ids[rows]], queries.dtype))

    threads.parallel_for(measure, threads.blocks(len(queries), QUERIES_PER_JOB))
    return distances


def _distances(queries: Array, keys: Array) -> Array:
    """Σ (q − k)² over the last axis. Column t is added to lane t mod LANES; then the lanes are folded in half."""
    lanes = np.zeros((*np.broadcast_shapes(queries.shape, keys.shape)[:-1], LANES), queries.dtype)
    with np.errstate(over="ignore", under="ignore"):  # the distance of two finite vectors may be inf, or 0
        for t in range(0, queries.shape[-1], LANES):
            difference = queries[..., t : t + LANES] - keys[..., t : t + LANES]
            lanes[..., : difference.shape[-1]] += difference * difference
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _update_c(queries: Array, keys: Array, start: int, ids: Array, distances: Array) -> None:
    """Choose one of three methods. They give the same bits, and each uses all threads."""
    few, k = len(queries) < max(1, MIN_SCREENED_QUERIES), ids.shape[1]
    if few and len(keys) > KEYS_PER_JOB:
        update = _update_few
    elif few or k > len(keys) // MIN_KEYS_PER_SCREENED_NEIGHBOUR:
        update = _update_all
    else:
        update = _update_screened
    try:
        update(queries, keys, start, ids, distances)
    except ValueError:
        _check_finite(queries, keys, start)  # The C code only detects NaN; this names its row.
        raise


def _update_few(queries: Array, keys: Array, start: int, ids: Array, distances: Array) -> None:
    """For few queries: the keys are split into jobs, each of which has its own lists."""
    jobs = []
    for part in threads.blocks(len(keys), KEYS_PER_JOB):
        shape = len(queries), min(ids.shape[1], part.stop - part.start)
        lists = np.full(shape, -1, np.int64), np.full(shape, np.inf, queries.dtype)
        jobs.append((queries, keys[part], start + part.start, *lists))
    threads.parallel_for(lambda job: c_extension().nearest(*job), jobs)
    ids[:], distances[:] = merge_lists([(ids, distances), *(job[3:] for job in jobs)], ids.shape[1])


def _update_all(queries: Array, keys: Array, start: int, ids: Array, distances: Array) -> None:
    """For few keys, or for queries that ask for a large share of them: all pairs are measured, by blocks of queries."""
    rows = threads.blocks(max(1, len(queries)), QUERIES_PER_JOB)  # The C code also checks keys without queries.
    for part in threads.blocks(max(1, len(keys)), KEYS_PER_JOB):  # short calls, so that Ctrl-C takes effect soon
        jobs = [(queries[i], keys[part], start + part.start, ids[i], distances[i]) for i in rows]
        threads.parallel_for(lambda job: c_extension().nearest(*job), jobs)


def _update_screened(queries: Array, keys: Array, start: int, ids: Array, distances: Array) -> None:
    """For many queries: a matrix product, on BLAS's threads, finds the few pairs that are worth measuring."""
    query_norms = _lower_norms(queries)
    height = min(len(queries), MAX_PRODUCT_QUERIES)
    width = min(len(keys), MAX_PRODUCT_KEYS, max(1, MAX_PRODUCT_ENTRIES // height))
    memory = np.empty(height * width, queries.dtype)
    for part in threads.blocks(len(keys), width):
        block, first_id = keys[part], start + part.start
        key_norms = _lower_norms(block)
        for rows in threads.blocks(len(queries), height):
            products = memory[: (rows.stop - rows.start) * len(block)].reshape(-1, len(block))
            with np.errstate(over="ignore", invalid="ignore"):  # the norms are −inf where a product may overflow
                np.matmul(queries[rows], block.T, out=products)
            arrays = queries[rows], products, query_norms[rows], ids[rows], distances[rows]
            parts = [[array[i] for array in arrays] for i in threads.blocks(len(products), QUERIES_PER_JOB)]
            jobs = [(q, block, p, q_norms, key_norms, first_id, *lists) for q, p, q_norms, *lists in parts]
            threads.parallel_for(lambda job: c_extension().nearest_screened(*job), jobs)


def _lower_norms(x: Array) -> Array:
    """Σ x² of rows, less csrc/search.h's share for rounding; −inf if products may overflow. ValueError if infinite."""
    d, info = x.shape[1], np.finfo(x.dtype)
    share, slack = (4 * d + 64) * float(info.eps) / 2, 8 * (d + 8) * float(info.tiny)
    with np.errstate(over="ignore"):
        norms = np.einsum("nd,nd->n", x, x)
    if not np.isfinite(norms).all() and not np.isfinite(x).all():
        raise ValueError("NaN or infinity")
    safe = (norms <= info.max / 16) & (share < 1 / 8)
    return np.where(safe, norms * (1 - share) - slack, -np.inf).astype(x.dtype)


def _checked(queries: Any, keys: Any, k: Any) -> tuple[Array, Array, int]:
    queries, keys = np.asarray(queries), np.asarray(keys)
    check_arrays("exact_search", {"queries": "f Nd", "keys": "f Mc"}, {"queries": queries, "keys": keys})
    if queries.dtype not in (np.float32, np.float64):
        raise UserError(f"exact_search: queries are {queries.dtype}; convert them to float32 or float64")
    if queries.shape[1] != keys.shape[1]:
        widths = f"queries have width {queries.shape[1]} and keys {keys.shape[1]}"
        raise UserError(f"exact_search: {widths}; both must come from the same embedder")
    if not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"exact_search: k is {k!r}; it must be a whole number, at least 1")
    return np.require(queries, queries.dtype.newbyteorder("="), ["C", "A"]), keys, int(k)


def _check_finite(queries: Array, keys: Array, start: int) -> None:
    for name, array, offset in (("queries", queries, 0), ("keys", keys, start)):
        for first in range(0, len(array), MAX_CONVERTED_KEYS):
            bad = ~np.isfinite(array[first : first + MAX_CONVERTED_KEYS]).all(axis=1)
            if bad.any():
                where = f"{name}: row {offset + first + int(bad.argmax())}"
                raise UserError(f"exact_search: {where} holds NaN or infinity; check the embedder that made it")


_search_c = ignore_underflow(functools.partial(_search, update=_update_c))
exact_search = kernel("exact_search", numpy=_search_numpy, c=_search_c, check=_checked)
