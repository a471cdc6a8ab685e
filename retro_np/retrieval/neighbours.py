"""Which values a chunk is given: the nearest ones, but none of any document in its training sequence. Paper §2.3."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_np.files import mapped
from retro_np.kernels.search import exact_search
from retro_np.retrieval.index import EF_MARGIN, ExactIndex, HnswIndex, load_hnsw

NEIGHBOUR = np.dtype([("id", "<i8"), ("distance", "<f4")])  # an entry of a list on its way between two stages
NONE_HIDDEN = np.empty(0, np.int64)
CROWDED = 4  # where at most one key in so many may be found, the graph is no help
SLICES = 8  # runs of rows that are searched where they lie; more are gathered first


@dataclass(frozen=True)
class Shard:
    """One shard of a database to search in. keys: (N, d_key); documents: (N,), ascending; folder: where its index is.

    margin: candidates that the graph keeps beyond those asked for; None: compare with every key.
    """

    folder: Path
    keys: np.ndarray
    documents: np.ndarray
    margin: int | None = EF_MARGIN

    @classmethod
    def open(cls, folder: Path, margin: int | None = EF_MARGIN) -> "Shard":
        """Map a shard's arrays; its index is read at the first search."""
        keys, documents = (mapped(folder / f"{name}.npy") for name in ("keys", "documents"))
        return cls(folder, keys, documents, margin)

    @cached_property
    def index(self) -> HnswIndex | ExactIndex:
        """What searches the keys."""
        if self.margin is None:
            return ExactIndex(self.keys)
        return load_hnsw(self.folder / "index.hnsw", self.keys, self.margin)


def search_shard(shard: Shard, queries, k: int, *, own=None, hidden=NONE_HIDDEN, exact: bool = False):
    """The k nearest rows of a shard for each query, but hidden ones and those of its own document.

    queries: (N, d_key) float32; own: (N,) document numbers, None: no document is left out; hidden: rows, sorted.
    Returns rows (N, k) and squared distances (N, k), nearest first; −1 and inf where fewer are left. More than k are
    fetched from the graph and filtered, then many more; where too few remain, exact search among the rows allowed.
    """
    size = len(shard.keys)
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    room = np.full(len(queries), size - len(hidden))
    begin = end = None
    if own is not None:
        begin, end = np.searchsorted(shard.documents, own), np.searchsorted(shard.documents, own, side="right")
        room = room - (end - begin) + _count_between(hidden, begin, end)
    wanted = np.minimum(room, k)
    short = np.flatnonzero(wanted > 0)
    if not exact and CROWDED * (size - len(hidden)) > size:
        plain = own is None and not len(hidden)
        for fetched in (k,) if plain else (2 * k, 8 * k):
            if not len(short) or (fetched >= size and not plain):
                break
            found, distance = shard.index.search(queries[short], fetched)
            allowed = ~is_in(found, hidden)
            if own is not None:
                allowed &= (found < begin[short, None]) | (found >= end[short, None])
            rows[short], distances[short] = keep_first(found, distance, allowed, k)
            short = short[(rows[short] >= 0).sum(axis=1) < wanted[short]]
    if len(short):
        bounds = None if own is None else np.stack([begin[short], end[short]], axis=1)
        rows[short], distances[short] = _exact_among(shard.keys, queries[short], k, bounds, hidden)
    return rows, distances


def _count_between(hidden, begin, end):
    return np.searchsorted(hidden, end) - np.searchsorted(hidden, begin)


def _exact_among(keys, queries, k, bounds, hidden):
    """Exact search among the rows that are neither hidden nor between a query's bounds (N, 2).

    Queries of one document are searched together, and equal ones, as of a file of equal lines, once.
    """
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    bounds = np.zeros((len(queries), 2), np.int64) if bounds is None else bounds
    groups, member = np.unique(bounds, axis=0, return_inverse=True)
    for number, (begin, end) in enumerate(groups):
        these = np.flatnonzero(member.reshape(-1) == number)
        distinct, place = np.unique(queries[these], axis=0, return_inverse=True)
        allowed = np.ones(len(keys), bool)
        allowed[hidden] = False
        allowed[begin:end] = False
        found = [_search_run(keys, run, distinct, k) for run in _runs(allowed)]
        if found:
            merged = merge_lists(found, k)
            rows[these], distances[these] = (part[place.reshape(-1)] for part in merged)
    return rows, distances


def _runs(allowed) -> list:
    """The rows allowed, as a few slices, or all of them as one array."""
    edges = np.flatnonzero(np.diff(allowed, prepend=False, append=False))
    if len(edges) > 2 * SLICES:
        return [np.flatnonzero(allowed)]
    return [slice(begin, end) for begin, end in edges.reshape(-1, 2)]


def _search_run(keys, run, queries, k):
    found, distances = exact_search(queries, keys[run], k)
    if isinstance(run, slice):
        return np.where(found >= 0, found + run.start, -1), distances
    return np.where(found >= 0, run[found], -1), distances


def is_in(ids, sorted_ids) -> np.ndarray:
    """Whether each id stands in a sorted array."""
    if not len(sorted_ids):
        return np.zeros(np.shape(ids), bool)
    place = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return sorted_ids[place] == ids


def merge_lists(lists: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k by (distance, id) of several lists of ids (N, ·) and distances (N, ·); −1 and inf fill the rest."""
    ids, distances = (np.concatenate(part, axis=1) for part in zip(*lists, strict=True))
    order = np.lexsort((ids.astype(np.uint64), distances))  # −1 comes after every id
    ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
    return keep_first(ids, distances, True, k)


def keep_first(ids, distances, allowed, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row that are allowed and there (id ≥ 0), in their order; −1 and inf fill the rest."""
    allowed = allowed & (ids >= 0)
    order = np.argsort(~allowed, axis=-1, kind="stable")[..., :k]
    kept = np.take_along_axis(allowed, order, -1)
    first = np.where(kept, np.take_along_axis(ids, order, -1), -1)
    nearest = np.where(kept, np.take_along_axis(distances, order, -1), np.inf)
    missing = k - first.shape[-1]
    if missing > 0:
        room = [(0, 0)] * (first.ndim - 1) + [(0, missing)]
        first, nearest = np.pad(first, room, constant_values=-1), np.pad(nearest, room, constant_values=np.inf)
    return first, nearest.astype(np.float32)


def packed(ids, distances) -> np.ndarray:
    """Ids and distances as one array of entries, which is saved whole or not at all."""
    entries = np.empty(ids.shape, NEIGHBOUR)
    entries["id"], entries["distance"] = ids, distances
    return entries
