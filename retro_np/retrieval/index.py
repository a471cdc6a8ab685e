"""Find the nearest keys of a shard, exactly or with HNSW. Both kinds of index offer the same method, `search`."""

import errno
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.files import replacing, write_array
from retro_np.files.untrusted import mapped
from retro_np.kernels import threads
from retro_np.kernels.search import exact_search, listed_distances
from retro_np.progress import say
from retro_np.retrieval.graph import EF_CONSTRUCTION, HINT, LINKS, check_graph, first_rows

try:
    import hnswlib
except ImportError:  # Without a wheel, hnswlib needs a C++ compiler.
    hnswlib = None

NOTICE = "hnswlib is not installed: search compares every key (pip install hnswlib for the graph index)"
INDEX, EQUAL = "index.hnsw", "equal.npy"  # the files of a graph, in its shard's folder
EF_MARGIN = 64  # default number of candidates that a search keeps beyond k
QUERIES_PER_BLOCK = 1024
# Up to this many keys, exact search is as fast as the graph and misses nothing. For a batch of queries, exact search is
# a matrix product, and the limit grows with the candidates that the graph would keep. Measured with 128 to 384 columns.
MAX_EXACT_KEYS, EXACT_KEYS_PER_CANDIDATE = 4096, 600
MIN_BATCH_QUERIES = 32


@functools.cache
def hnswlib_installed() -> bool:
    """Whether hnswlib is installed. If not, print NOTICE to standard error, once per process."""
    if hnswlib is None:
        say(NOTICE)
    return hnswlib is not None


class ExactIndex:
    """Search by comparing each query with every key: the ground truth for HNSW, and its fallback."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query (N, d_key): rows (N, k) int64 and squared L2 distances (N, k) float32.

        Sorted by (distance, row); −1 and inf where there are fewer than k keys."""
        return exact_search(np.asarray(queries, np.float32), self.keys, k)


class EfGate:
    """Searches with one ef run at once. Others wait, in order of arrival, because hnswlib keeps ef in the graph."""

    def __init__(self, graph: Any):
        self.graph, self._ef = graph, -1
        self._states: dict[int, Any] = {}  # of this process; and of its parents, whose searches do not run here

    def __reduce__(self) -> tuple[Any, ...]:
        return EfGate, (self.graph,)

    @contextmanager
    def at(self, ef: int) -> Iterator[None]:
        """Wait until the graph may have this ef, and keep it until the end of the context."""
        thread, new = threading.get_ident(), (threading.Lock(), threading.Condition(), set[int]())
        turn, idle, running = self._states.setdefault(os.getpid(), new)
        try:
            with turn, idle:
                while ef != self._ef and running - {thread}:
                    idle.wait()
                self.graph.set_ef(ef)
                self._ef = ef
                running.add(thread)
            yield
        finally:
            with idle:
                running.discard(thread)
                if not running:
                    idle.notify_all()


class HnswIndex:
    """Approximate search in a navigable small world (Malkov & Yashunin 2018), by hnswlib.

    keys: (n, d_key), what the graph was built from; they give the exact distances. first: (n,), for each key the first
    row with an equal key, or empty if all keys differ. Only these first rows are in the graph, because equal keys would
    be linked to each other and to nothing else. ef_margin: candidates that a search keeps beyond k."""

    def __init__(self, graph: Any, keys: np.ndarray, first: np.ndarray, ef_margin: int = EF_MARGIN):
        self.graph, self.keys, self.ef_margin = graph, keys, ef_margin
        self._first = np.asarray(first)
        self._by_first = np.argsort(first, kind="stable")
        self._sorted_first = self._first[self._by_first]
        self._gate = EfGate(graph)

    @property
    def n_entries(self) -> int:
        """The number of keys in the graph: one for each distinct key."""
        return self.graph.get_current_count() if self.graph is not None else 0

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `ExactIndex.search`. The graph may miss a neighbour. Where it is no faster, exact search is used."""
        queries = np.asarray(queries, np.float32)
        batch = len(queries) >= MIN_BATCH_QUERIES
        max_keys = max(MAX_EXACT_KEYS, batch * EXACT_KEYS_PER_CANDIDATE * (k + self.ef_margin))
        if k >= self.n_entries or len(self.keys) <= max_keys:
            return exact_search(queries, self.keys, k)
        return self.search_graph(queries, k)

    def search_graph(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The graph's own answer, however few keys there are. If k exceeds `n_entries`, search is exact."""
        if k > self.n_entries or queries.shape[1:] != self.keys.shape[1:]:  # hnswlib does not check a query's width.
            return exact_search(queries, self.keys, k)
        with self._gate.at(min(k + self.ef_margin, self.n_entries)):
            blocks = [self._block(queries[rows], k) for rows in threads.blocks(len(queries), QUERIES_PER_BLOCK)]
        return _stacked([(np.empty((0, k), np.int64), np.empty((0, k), np.float32)), *blocks])

    def graph_keys(self, rows: np.ndarray) -> np.ndarray:
        """The graph's copy of the keys of some rows, (N, d_key) float32."""
        return self.graph.get_items(self._first[rows] if len(self._first) else rows)

    def _block(self, queries, k):
        try:
            labels, _ = self.graph.knn_query(queries, k, num_threads=threads.count())
        except RuntimeError:  # The graph reached fewer than k keys for one of the queries.
            if len(queries) == 1:
                return exact_search(queries, self.keys, k)
            return _stacked([self._block(half, k) for half in np.array_split(queries, 2)])
        rows = self._with_equals(labels.astype(np.int64))
        # hnswlib sums in a different order. Distances are recomputed, so that both kinds of search return equal bits.
        distances = listed_distances(queries, self.keys, rows)
        if not np.isfinite(distances).all():
            return exact_search(queries, self.keys, k)  # This names a row that is not finite.
        order = np.lexsort((rows, distances))
        return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)

    def _with_equals(self, labels):
        """Replace each label by all rows with an equal key, and keep the first k of each query. labels: (N, k)."""
        if not len(self._first):
            return labels
        start = np.searchsorted(self._sorted_first, labels)
        count = np.searchsorted(self._sorted_first, labels, side="right") - start
        preceding = np.cumsum(count, axis=1) - count
        count = np.clip(labels.shape[1] - preceding, 0, count).reshape(-1)
        within = np.arange(labels.size) - np.repeat(np.cumsum(count) - count, count)
        return self._by_first[np.repeat(start.reshape(-1), count) + within].reshape(labels.shape)


def _stacked(blocks):
    return tuple(np.concatenate(parts) for parts in zip(*blocks, strict=True))


def build_hnsw(keys: np.ndarray, path: Path | str | None = None) -> HnswIndex:
    """Build the graph of keys (n, d_key), with one thread, so that the same keys give the same graph.

    path: where to write the graph, with equal.npy (the rows of equal keys) in the same folder. Without keys there is no
    graph, and the file is empty. Raises UserError if hnswlib is missing, a key is not finite, or the disk is full."""
    if not np.all(np.isfinite(keys)):
        raise UserError("a key is NaN or infinite: check the embedder that made it")
    # For each key the first row that has the same bytes; empty if all differ.
    parts = np.ascontiguousarray(keys).view(np.dtype((np.void, keys.dtype.itemsize * keys.shape[1]))).reshape(-1)
    _, distinct, member = np.unique(parts, return_index=True, return_inverse=True)
    graph, first = None, distinct[member] if len(distinct) < len(keys) else np.empty(0, np.int64)
    if len(keys):
        rows = first_rows(EQUAL, first, len(keys))
        graph = _empty_graph(keys)
        graph.init_index(len(rows), ef_construction=EF_CONSTRUCTION, M=LINKS, random_seed=100)
        for block in threads.blocks(len(rows), 65536):  # Float16 keys are converted to float32 in blocks.
            graph.add_items(np.asarray(keys[rows[block]], np.float32), rows[block], num_threads=1)
    if path is not None:
        write_array(Path(path).with_name(EQUAL), first)
        with replacing(path) as file:
            if graph is not None:
                graph.save_index(os.fsencode(file.name))  # a str must be UTF-8
                if os.stat(file.name).st_size != graph.index_file_size():  # hnswlib does not report a full disk.
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return HnswIndex(graph, keys, first)


def _empty_graph(keys):
    if hnswlib is None:
        raise UserError("a graph index needs hnswlib: pip install hnswlib")
    return hnswlib.Index(space="l2", dim=keys.shape[1])


def load_hnsw(path: Path | str, keys: np.ndarray, ef_margin: int = EF_MARGIN) -> HnswIndex:
    """Read the graph of these keys. Raises UserError for unfit files (see `check_graph`), and without hnswlib."""
    equal = Path(path).with_name(EQUAL)
    first = mapped(equal, np.int64, (None,), HINT)
    labels = first_rows(equal, first, len(keys))
    if not len(labels):
        return HnswIndex(None, keys, first, ef_margin)
    parts, empty = check_graph(path, keys, labels), _empty_graph(keys)
    empty.init_index(1, ef_construction=EF_CONSTRUCTION, M=LINKS)
    [settings] = empty.__getstate__()
    return HnswIndex(hnswlib.Index(params=settings | parts), keys, first, ef_margin)
