"""The searches that benchmarks/search.py compares, each in its own process.

A peer is a function of the files of keys and queries. It returns a function for each command that it answers. NumPy is
imported inside the functions: if retro_np is imported before NumPy, it configures how BLAS's threads wait, and the
peers other than retro_np must run without this configuration.
"""

import time

K = 2  # neighbours, as in RETRO
RERANKED = 100  # candidates of ScaNN


def serve(peer, files, pipe):
    """Answer commands (name, argument) until None arrives."""
    commands = peer(*files)
    pipe.send(None)
    while (command := pipe.recv()) is not None:
        name, argument = command
        pipe.send(commands[name](argument))


def exact_retro_np(keys_file, queries_file):
    """exact_search with its default threads."""
    from retro_np.kernels.search import exact_search

    keys, queries = _load(keys_file, queries_file)
    return _exact(lambda batch: exact_search(batch, keys, K)[0], queries)


def exact_faiss(keys_file, queries_file):
    """IndexFlatL2 with one thread per core."""
    import os

    import faiss

    keys, queries = _load(keys_file, queries_file)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    faiss.omp_set_num_threads(cores)
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    return _exact(lambda batch: index.search(batch, K)[1], queries)


def hnsw_hnswlib(keys_file, queries_file):
    """hnswlib as in retro_np/retrieval/index.py. The setting is ef."""
    import hnswlib

    from retro_np.retrieval.index import EF_CONSTRUCTION, LINKS

    keys, queries = _load(keys_file, queries_file)
    index = hnswlib.Index(space="l2", dim=keys.shape[1])

    def build(threads):
        index.init_index(len(keys), ef_construction=EF_CONSTRUCTION, M=LINKS, random_seed=100)
        index.add_items(keys, num_threads=threads)

    return _approximate(build, index.set_ef, lambda query: index.knn_query(query, K, num_threads=1)[0][0], queries)


def hnsw_faiss(keys_file, queries_file):
    """IndexHNSWFlat with the same M and efConstruction. The setting is efSearch."""
    import faiss

    from retro_np.retrieval.index import EF_CONSTRUCTION, LINKS

    keys, queries = _load(keys_file, queries_file)
    index = faiss.IndexHNSWFlat(keys.shape[1], LINKS)
    index.hnsw.efConstruction = EF_CONSTRUCTION

    def build(threads):
        faiss.omp_set_num_threads(threads)
        index.add(keys)
        faiss.omp_set_num_threads(1)

    def set_ef(ef):
        index.hnsw.efSearch = ef

    return _approximate(build, set_ef, lambda query: index.search(query[None], K)[1][0], queries)


def scann(keys_file, queries_file):
    """ScaNN with √N leaves, quantised scores and RERANKED candidates. The setting is the number of leaves searched."""
    from scann import scann_ops_pybind

    keys, queries = _load(keys_file, queries_file)
    state = {}

    def build(threads):
        builder = scann_ops_pybind.builder(keys, K, "squared_l2").set_n_training_threads(threads)
        leaves = max(1, int(len(keys) ** 0.5))
        builder = builder.tree(leaves, 1, training_sample_size=min(len(keys), 250_000))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(RERANKED)
        state["index"] = builder.build()

    def set_leaves(leaves):
        state["leaves"] = leaves

    def search(query):
        return state["index"].search(query, final_num_neighbors=K, leaves_to_search=state["leaves"])[0]

    return _approximate(build, set_leaves, search, queries)


def _load(*files):
    import numpy as np

    return [np.load(file) for file in files]


def _exact(search, queries):
    """Commands for search(queries) → ids. batch() → (seconds, ids); single(count) → [seconds] of single queries."""

    def batch(_):
        start = time.perf_counter()
        ids = search(queries)
        return time.perf_counter() - start, ids

    def single(count):
        return [_seconds(search, queries[i : i + 1]) for i in range(min(count, len(queries)))]

    return {"batch": batch, "single": single}


def _approximate(build, choose, search, queries):
    """Commands for search(query) → ids (K,). build(threads) → seconds; search(setting) → (ids, [seconds])."""
    import numpy as np

    def measure(setting):
        """(ids, seconds of each query), with single queries on one thread."""
        choose(setting)
        ids, seconds = np.full((len(queries), K), -1, np.int64), []
        for row, query in enumerate(queries):
            start = time.perf_counter()
            nearest = search(query)
            seconds.append(time.perf_counter() - start)
            ids[row, : len(nearest)] = nearest
        return ids, seconds

    return {"build": lambda threads: _seconds(build, threads), "search": measure}


def _seconds(function, argument):
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start
