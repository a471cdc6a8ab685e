"""Nearest keys, exactly or by HNSW, behind one interface: search(queries, k) -> ids, squared distances."""

import errno
import os
from pathlib import Path

import hnswlib
import numpy as np

from retro_np.errors import UserError
from retro_np.files import beside_of, flush_folder
from retro_np.kernels.search import exact_search, listed_distances

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

    keys: what the graph was built from, for exact distances and for the queries that the graph can't serve. margin:
    candidates kept beyond k.
    """

    def __init__(self, graph: hnswlib.Index | None, keys: np.ndarray, margin: int = EF_MARGIN):
        self.graph = graph
        self.keys = keys
        self.margin = margin

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As ExactIndex.search, but a neighbour may be missed: recall is a test's business."""
        queries = np.asarray(queries, np.float32)
        few = FEW if len(queries) < BATCH else max(FEW, FEW_A_CANDIDATE * (k + self.margin))
        if self.graph is None or k >= len(self.keys) or len(self.keys) <= few:
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
            labels, _ = self.graph.knn_query(queries, k)
        except RuntimeError:  # the graph reached fewer than k for one of them, as where many keys are equal
            if len(queries) == 1:
                return exact_search(queries, self.keys, k)
            halves = np.array_split(queries, 2)
            return tuple(np.concatenate(part) for part in zip(*(self._block(h, k) for h in halves), strict=True))
        ids = labels.astype(np.int64)
        # the graph's own distances sum in another order than exact search: one meaning for both, to the bit
        distances = listed_distances(queries, self.keys, ids)
        order = np.lexsort((ids, distances))
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def build_hnsw(keys: np.ndarray, path=None, *, seed: int = 100) -> HnswIndex:
    """Build the graph, with one thread so that the same keys give the same graph; write it to `path` if given.

    Where there are no keys there is no graph, and the file is empty. Raises UserError for keys that are not finite,
    OSError for a full disk.
    """
    if not np.all(np.isfinite(keys)):
        raise UserError("a key is NaN or infinite: the embedder that made it is broken")
    graph = None
    if len(keys):
        graph = hnswlib.Index(space="l2", dim=keys.shape[1])
        graph.init_index(len(keys), ef_construction=EF_CONSTRUCTION, M=LINKS, random_seed=seed)
        for start in range(0, len(keys), 65536):  # float16 keys become float32 a part at a time
            part = np.asarray(keys[start : start + 65536], np.float32)
            graph.add_items(part, np.arange(start, start + len(part)), num_threads=1)
    if path is not None:
        _save(graph, Path(path))
    return HnswIndex(graph, keys)


def load_hnsw(path, keys: np.ndarray, margin: int = EF_MARGIN) -> HnswIndex:
    """Read a graph. Only of a file whose hash has been checked: hnswlib crashes on a corrupt one."""
    if not len(keys):
        return HnswIndex(None, keys, margin)
    graph = hnswlib.Index(space="l2", dim=keys.shape[1])
    graph.load_index(os.fspath(path), max_elements=len(keys))
    return HnswIndex(graph, keys, margin)


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
