"""Exact nearest neighbours by squared L2: every key is compared with every query."""

import operator

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import c_extension, kernel, threads

LANES = 16  # partial sums of a distance, as in csrc/search.c
QUERY_BLOCK = 64  # queries that a thread takes at once
KEY_BLOCK = 512  # keys that the NumPy code compares at once
CONVERTED_KEYS = 65536  # keys of another type that are converted at once
# of the C code, found by measuring
THREAD_KEYS = 8192  # keys that a thread takes at once
SCREENED_QUERIES = 32  # from so many on, a matrix product saves more than it costs
SCREENED_SHARE = 16  # where at most one key in so many is asked for
PRODUCT = 1024 * 2048  # entries of one matrix product, 8 MB in float32
PRODUCT_QUERIES, PRODUCT_KEYS = 1024, 16384  # no more than so many of either


def _search_numpy(queries, keys, k):
    """The k nearest keys of each query, by squared L2, compared one by one.

    queries: (N, d) float32 or float64. keys: (M, d) of a float dtype; where it is not the queries', as with float16
    keys, they are converted CONVERTED_KEYS at a time, so a memory-mapped array stays on disk. k ≥ 1, also above M.
    Returns ids (N, k) int64 and distances (N, k) of the queries' dtype, ascending by (distance, id): of equal distances
    the lowest id comes first. Where there are fewer than k keys, id −1 and distance inf.
    A distance is Σ (q − k)² summed in one order, so it depends on q and k alone, and NumPy and C give the same bits.
    Raises UserError for shapes that do not fit, other dtypes, k < 1, and entries that are NaN or infinite.
    """
    return _search(queries, keys, k, _update_numpy)


def _search_c(queries, keys, k):
    return _search(queries, keys, k, _update_c)


exact_search = kernel("exact_search", numpy=_search_numpy, c=_search_c)


def _search(queries, keys, k, update):
    """Check, convert the keys where they need it, and have `update` bring the lists up to date with each part of them.

    A query's list is a row of ids and one of distances, ascending, filled up with −1 and inf.
    """
    queries, keys, k = _checked(queries, keys, k)
    ids = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, queries.dtype)
    fits = keys.dtype == queries.dtype and keys.flags.c_contiguous and keys.flags.aligned
    part = max(1, len(keys)) if fits else CONVERTED_KEYS
    for start in range(0, max(1, len(keys)), part):
        some_keys = np.require(keys[start : start + part], queries.dtype, ["C", "A"])
        update(queries, some_keys, start, ids, distances)
    return ids, distances


def _merge(ids, distances, more_ids, more_distances):
    """Let lists keep the first by (distance, id) of what they have and more.

    Read as unsigned, −1 comes after every id: a missing one is last.
    """
    more_ids = np.concatenate([ids, more_ids], axis=1)
    more_distances = np.concatenate([distances, more_distances], axis=1)
    order = np.lexsort((more_ids.view(np.uint64), more_distances))[:, : ids.shape[1]]
    ids[:], distances[:] = np.take_along_axis(more_ids, order, 1), np.take_along_axis(more_distances, order, 1)


def _update_numpy(queries, keys, start, ids, distances):
    _check_finite(queries, keys, start)
    for rows in threads.blocks(len(queries), QUERY_BLOCK):
        for some in threads.blocks(len(keys), KEY_BLOCK):
            block = _distances(queries[rows, None], keys[None, some])
            block_ids = np.argsort(block, axis=1, kind="stable")[:, : ids.shape[1]]
            block = np.take_along_axis(block, block_ids, 1)
            _merge(ids[rows], distances[rows], block_ids + (start + some.start), block)


def listed_distances(queries, keys, ids) -> np.ndarray:
    """The squared distance of each query (N, d) from each of its listed keys: ids (N, k) → (N, k), exact_search's bits.

    keys: (M, d), of any float dtype; only the rows asked for are read, and a part at a time.
    """
    distances = np.empty(ids.shape, queries.dtype)

    def measure(rows):
        listed = np.asarray(keys[ids[rows]], queries.dtype)
        distances[rows] = _distances(queries[rows, None], listed)

    threads.parallel_for(measure, threads.blocks(len(queries), QUERY_BLOCK))
    return distances


def _distances(queries, keys):
    """Σ (q − k)² over the last axis. Column t is added to lane t mod LANES; then the lanes are folded in half."""
    lanes = np.zeros((*np.broadcast_shapes(queries.shape, keys.shape)[:-1], LANES), queries.dtype)
    with np.errstate(over="ignore"):  # the distance of two finite vectors may be inf
        for t in range(0, queries.shape[-1], LANES):
            difference = queries[..., t : t + LANES] - keys[..., t : t + LANES]
            lanes[..., : difference.shape[-1]] += difference * difference
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _update_c(queries, keys, start, ids, distances):
    """Three ways to the same bits, each with all threads."""
    if len(queries) < SCREENED_QUERIES or 0 in (len(queries), len(keys)):
        update = _update_few
    elif ids.shape[1] > len(keys) // SCREENED_SHARE:
        update = _update_crowded
    else:
        update = _update_screened
    try:
        update(queries, keys, start, ids, distances)
    except ValueError:
        _check_finite(queries, keys, start)  # C looks for NaN in passing; the row's number is made out here
        raise


def _update_few(queries, keys, start, ids, distances):
    """Few queries: the keys are dealt out, and each part has lists of its own."""
    if len(keys) <= THREAD_KEYS:
        c_extension().nearest(queries, keys, start, ids, distances)
        return
    parts = []
    for some in threads.blocks(len(keys), THREAD_KEYS):
        shape = len(queries), min(ids.shape[1], some.stop - some.start)
        lists = np.full(shape, -1, np.int64), np.full(shape, np.inf, queries.dtype)
        parts.append((queries, keys[some], start + some.start, *lists))
    _spread(c_extension().nearest, parts)
    *_, part_ids, part_distances = zip(*parts, strict=True)
    _merge(ids, distances, np.concatenate(part_ids, axis=1), np.concatenate(part_distances, axis=1))


def _update_crowded(queries, keys, start, ids, distances):
    """Many queries, and a good share of the keys asked for: every pair is measured, the queries dealt out."""
    for some in threads.blocks(len(keys), THREAD_KEYS):  # a call is short, so that Ctrl-C is heard
        rows = threads.blocks(len(queries), QUERY_BLOCK)
        parts = [(queries[i], keys[some], start + some.start, ids[i], distances[i]) for i in rows]
        _spread(c_extension().nearest, parts)


def _update_screened(queries, keys, start, ids, distances):
    """Many queries: a matrix product, on BLAS's threads, says which few pairs are worth measuring."""
    query_norms = _norms_from_below(queries)
    height = min(len(queries), PRODUCT_QUERIES)
    width = min(len(keys), PRODUCT_KEYS, max(1, PRODUCT // height))
    room = np.empty(height * width, queries.dtype)
    for some in threads.blocks(len(keys), width):
        block, first_id = keys[some], start + some.start
        key_norms = _norms_from_below(block)
        for rows in threads.blocks(len(queries), height):
            products = room[: (rows.stop - rows.start) * len(block)].reshape(-1, len(block))
            with np.errstate(over="ignore", invalid="ignore"):  # the norms are −inf where a product may overflow
                np.matmul(queries[rows], block.T, out=products)
            those = queries[rows], products, query_norms[rows], ids[rows], distances[rows]
            parts = [[array[i] for array in those] for i in threads.blocks(len(products), QUERY_BLOCK)]
            _spread(
                c_extension().nearest_screened,
                [(q, block, p, q_norms, key_norms, first_id, *lists) for q, p, q_norms, *lists in parts],
            )


def _spread(function, parts):
    threads.parallel_for(lambda part: function(*part), parts)


def _norms_from_below(x):
    """Σ x² of each row, less what csrc/search.h takes off for rounding; −inf where a product with it might overflow.

    Raises ValueError where an entry is NaN or infinite.
    """
    d, info = x.shape[1], np.finfo(x.dtype)
    share, slack = (4 * d + 64) * float(info.eps) / 2, 8 * (d + 8) * float(info.tiny)
    with np.errstate(over="ignore"):
        norms = np.einsum("nd,nd->n", x, x)
    if not np.isfinite(norms).all() and not np.isfinite(x).all():
        raise ValueError("NaN or infinity")
    safe = (norms <= info.max / 16) & (share < 1 / 8)
    return np.where(safe, norms * (1 - share) - slack, -np.inf).astype(x.dtype)


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
