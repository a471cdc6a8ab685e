"""Nearest keys, exactly or by HNSW, behind one interface: search(queries, k) -> ids, squared distances."""

import errno
import os
from pathlib import Path

import hnswlib
import numpy as np

from retro_np.errors import UserError
from retro_np.files import beside_of, flush_folder, write_array
from retro_np.kernels import threads
from retro_np.kernels.search import exact_search, listed_distances

EQUAL = "equal.npy"  # beside index.hnsw
LINKS = 16  # M: links of a node a layer
EF_CONSTRUCTION = 200
EF_MARGIN = 64  # candidates kept beyond k while searching, where the embedder names no other number
QUERIES_A_BLOCK = 1024
# keys up to which exact search is as quick as the graph, and misses nothing: for a query alone; and for a batch, where
# it is a matrix product, of each candidate that the graph would keep (measured with 128 to 384 columns)
FEW, FEW_A_CANDIDATE = 4096, 600
BATCH = 32  # queries


class ExactIndex:
    """Search by comparing with every key: the truth that HNSW is measured against, and its fallback."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query: ids (N, k) int64 and squared L2 distances (N, k) float32.

        In order of (distance, id); −1 and inf where there are fewer than k keys.
        """
        return exact_search(np.asarray(queries, np.float32), self.keys, k)


class HnswIndex:
    """Approximate search in a navigable small world (Malkov & Yashunin 2018), by hnswlib; same interface.

    keys: what the graph was built from, for exact distances and for the queries that the graph can't serve. first: for
    each key the first row that equals it, which alone is in the graph, since equal keys would be linked to each other
    and to nothing else; empty where no two are equal. margin: candidates kept beyond k.
    """

    def __init__(self, graph: hnswlib.Index | None, keys: np.ndarray, first: np.ndarray, margin: int = EF_MARGIN):
        self.graph = graph
        self.keys = keys
        self.margin = margin
        self._by_first = np.argsort(first, kind="stable")
        self._firsts = np.asarray(first)[self._by_first]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As ExactIndex.search, but a neighbour may be missed: recall is a test's business."""
        queries = np.asarray(queries, np.float32)
        few = FEW if len(queries) < BATCH else max(FEW, FEW_A_CANDIDATE * (k + self.margin))
        if self.graph is None or k >= self.graph.get_current_count() or len(self.keys) <= few:
            return exact_search(queries, self.keys, k)
        return self.search_graph(queries, k)

    def search_graph(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The graph's own answer, however few the keys are; there is one, of at least k keys."""
        self.graph.set_ef(k + self.margin)
        parts = [self._block(queries[i : i + QUERIES_A_BLOCK], k) for i in range(0, len(queries), QUERIES_A_BLOCK)]
        if not parts:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _block(self, queries, k):
        try:
            labels, _ = self.graph.knn_query(queries, k, num_threads=threads.count())
        except RuntimeError:  # the graph reached fewer than k for one of them, as where many keys are equal
            if len(queries) == 1:
                return exact_search(queries, self.keys, k)
            halves = np.array_split(queries, 2)
            return tuple(np.concatenate(part) for part in zip(*(self._block(h, k) for h in halves), strict=True))
        ids = self._with_equals(labels.astype(np.int64))
        # the graph's own distances sum in another order than exact search: one meaning for both, to the bit
        distances = listed_distances(queries, self.keys, ids)
        order = np.lexsort((ids, distances))
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)

    def _with_equals(self, labels):
        """The first k rows of (N, k) labels, nearest first, where each stands for all rows whose key equals its own."""
        if not len(self._firsts):
            return labels
        begin = np.searchsorted(self._firsts, labels)
        count = np.searchsorted(self._firsts, labels, side="right") - begin
        before = np.cumsum(count, axis=1) - count
        count = np.clip(labels.shape[1] - before, 0, count).reshape(-1)  # of each, so many that a row has k
        within = np.arange(labels.size) - np.repeat(np.cumsum(count) - count, count)
        return self._by_first[np.repeat(begin.reshape(-1), count) + within].reshape(labels.shape)


def build_hnsw(keys: np.ndarray, path=None, *, seed: int = 100) -> HnswIndex:
    """Build the graph, with one thread so that the same keys give the same graph; write it to `path` if given.

    Beside it goes equal.npy, which of equal keys stands for the others. Where there are no keys there is no graph, and
    the file is empty. Raises UserError for keys that are not finite,
    OSError for a full disk.
    """
    if not np.all(np.isfinite(keys)):
        raise UserError("a key is NaN or infinite: the embedder that made it is broken")
    graph, first = None, _first_of_equal(keys)
    if len(keys):
        rows = np.unique(first) if len(first) else np.arange(len(keys))
        graph = hnswlib.Index(space="l2", dim=keys.shape[1])
        graph.init_index(len(rows), ef_construction=EF_CONSTRUCTION, M=LINKS, random_seed=seed)
        for start in range(0, len(rows), 65536):  # float16 keys become float32 a part at a time
            part = rows[start : start + 65536]
            graph.add_items(np.asarray(keys[part], np.float32), part, num_threads=1)
    if path is not None:
        write_array(Path(path).with_name(EQUAL), first)
        _save(graph, Path(path))
    return HnswIndex(graph, keys, first)


def _first_of_equal(keys) -> np.ndarray:
    """For each key the first row that has the same bytes, (N,) int64; empty where all differ."""
    if not len(keys):
        return np.empty(0, np.int64)
    rows = np.ascontiguousarray(keys).view(np.dtype((np.void, keys.dtype.itemsize * keys.shape[1]))).reshape(-1)
    _, first, member = np.unique(rows, return_index=True, return_inverse=True)
    return first[member] if len(first) < len(keys) else np.empty(0, np.int64)


def load_hnsw(path, keys: np.ndarray, margin: int = EF_MARGIN) -> HnswIndex:
    """Read a graph. Only of a file whose hash has been checked: hnswlib crashes on a corrupt one."""
    first = np.load(Path(path).with_name(EQUAL), allow_pickle=False)
    if not len(keys):
        return HnswIndex(None, keys, first, margin)
    graph = hnswlib.Index(space="l2", dim=keys.shape[1])
    try:
        graph.load_index(os.fspath(path), max_elements=len(keys))
    except RuntimeError as error:
        raise UserError(f"{path} is no index ({error}): build the database anew") from error
    return HnswIndex(graph, keys, first, margin)


def _save(graph: hnswlib.Index | None, path: Path) -> None:
    """Write a graph beside its name, flush it to the disk, rename it."""
    beside = beside_of(path)
    try:
        if graph is None:
            beside.write_bytes(b"")
        else:
            graph.save_index(os.fspath(beside))
            if beside.stat().st_size != graph.index_file_size():  # hnswlib says nothing where the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
