"""The nearest chunks of a shard, without deleted ones and those of the query's own document. Paper §2.3."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels.search import exact_search, merge_lists
from retro_np.retrieval.index import EF_MARGIN, INDEX, ExactIndex, HnswIndex, load_hnsw
from retro_np.retrieval.sharded import is_in

NONE_DELETED = np.empty(0, np.int64)
MIN_GRAPH_SHARE = 0.25  # If no more than this share of the keys is allowed, exact search is faster than the graph.
MAX_SLICES = 8  # Up to this many runs of rows are searched in the memory map; more are gathered first.


@dataclass(frozen=True)
class Shard:
    """A shard to search. keys: (n, d_key). documents: (n,), sorted. ef_margin: see `HnswIndex`; None: exact search."""

    folder: Path
    keys: Array
    documents: Array
    ef_margin: int | None = EF_MARGIN

    @cached_property
    def index(self) -> ExactIndex | HnswIndex:
        """The index of the keys, which the first search reads."""
        if self.ef_margin is None:
            return ExactIndex(self.keys)
        return load_hnsw(self.folder / INDEX, self.keys, self.ef_margin)


def search_shard(
    shard: Shard, queries: Array, k: int, *, own: Array | None = None, deleted: Array = NONE_DELETED,
    exact: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """The k nearest rows of a shard for each query, without deleted rows and rows of the query's own document.

    queries: (N, d_key) float32. own: (N,) document numbers to leave out, or None. deleted: sorted rows. exact: do not
    use the graph. Returns rows (N, k) and squared distances (N, k), nearest first; −1 and inf where fewer remain.
    If rows are left out, the graph's answer for more than k is filtered. Queries left with too few: exact search."""
    size = len(shard.keys)
    rows, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf, np.float32)
    n_allowed = np.full(len(queries), size - len(deleted))
    start = stop = np.zeros(len(queries), np.int64)
    if own is not None:
        start, stop = np.searchsorted(shard.documents, own), np.searchsorted(shard.documents, own, side="right")
        n_allowed += start - stop + np.searchsorted(deleted, stop) - np.searchsorted(deleted, start)
    n_wanted = np.minimum(n_allowed, k)
    unfinished = np.flatnonzero(n_wanted > 0)
    if not exact and size - len(deleted) > MIN_GRAPH_SHARE * size:
        unfiltered = own is None and not len(deleted)
        for n_candidates in (k,) if unfiltered else (2 * k, 8 * k):
            if not len(unfinished) or (n_candidates >= size and not unfiltered):
                break
            candidates, candidate_distances = shard.index.search(queries[unfinished], n_candidates)
            outside = (candidates < start[unfinished, None]) | (candidates >= stop[unfinished, None])
            allowed = outside & ~is_in(candidates, deleted)
            rows[unfinished], distances[unfinished] = keep_first(candidates, candidate_distances, allowed, k)
            unfinished = unfinished[(rows[unfinished] >= 0).sum(axis=1) < n_wanted[unfinished]]
    if len(unfinished):
        bounds = np.stack([start[unfinished], stop[unfinished]], axis=1)
        rows[unfinished], distances[unfinished] = _exact_among(shard.keys, queries[unfinished], k, bounds, deleted)
    return rows, distances


def _exact_among(keys, queries, k, bounds, deleted):
    """Exact search among the rows that are neither deleted nor within a query's bounds (N, 2).

    Queries of one document are searched together. Equal queries, as in a file of equal lines, are searched once."""
    rows, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf, np.float32)
    groups, member = np.unique(bounds, axis=0, return_inverse=True)
    for number, (start, stop) in enumerate(groups):
        group = np.flatnonzero(member.reshape(-1) == number)
        distinct, position = np.unique(queries[group], axis=0, return_inverse=True)
        allowed = np.ones(len(keys), bool)
        allowed[deleted] = False
        allowed[start:stop] = False
        merged = merge_lists([_search_run(keys, run, distinct, k) for run in _runs(allowed)], k)
        rows[group], distances[group] = (part[position.reshape(-1)] for part in merged)
    return rows, distances


def _runs(allowed) -> list:
    """The allowed rows as a few slices, or all of them as one array."""
    edges = np.flatnonzero(np.diff(allowed, prepend=False, append=False))
    if len(edges) > 2 * MAX_SLICES:
        return [np.flatnonzero(allowed)]
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2)]


def _search_run(keys, run, queries, k):
    rows, distances = exact_search(queries, keys[run], k)
    return np.where(rows >= 0, rows + run.start if isinstance(run, slice) else run[rows], -1), distances


def keep_first(ids: Array, distances: Array, allowed: Any, k: int) -> tuple[Array, Array]:
    """The first k entries of each row that are allowed and not missing (id ≥ 0), in their order.

    ids, distances: (…, K). allowed: booleans that broadcast to it. Returns (…, k) of both; −1 and inf fill the rest."""
    allowed = allowed & (ids >= 0)
    order = np.argsort(~allowed, axis=-1, kind="stable")[..., :k]
    present = np.take_along_axis(allowed, order, -1)
    out_ids = np.full((*ids.shape[:-1], k), -1, ids.dtype)
    out_distances = np.full(out_ids.shape, np.inf, np.float32)
    out_ids[..., : order.shape[-1]] = np.where(present, np.take_along_axis(ids, order, -1), -1)
    out_distances[..., : order.shape[-1]] = np.where(present, np.take_along_axis(distances, order, -1), np.inf)
    return out_ids, out_distances
