"""Measurements for benchmarks/scale.py: bytes, memory, product-quantised keys, hashing of files, Dask's tasks.

A small database of Python's standard library, with the hashing embedder, gives the bytes of a line of documents.jsonl
and of an entry of the manifest, and the number of files and of open files per shard. A graph of NODES distinct random
keys gives the bytes that a node takes in addition to its key, in index.hnsw and, on Linux, in memory after loading it
in a fresh process. Product quantisation is faiss's IVF-PQ. Its recall@2 is relative to exact search, as in
benchmarks/search.py, without reranking and with the CANDIDATES best codes reranked by their exact distances.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import search_keys

from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.kernels.search import exact_search
from retro_np.retrieval.build import HASHED, BuildConfig, build_database
from retro_np.retrieval.index import build_hnsw, load_hnsw
from retro_np.retrieval.manifest import DOCUMENTS, MANIFEST
from retro_np.retrieval.shards import silent
from retro_np.retrieval.workers import LOCAL, Task, workers

K, CANDIDATES = 2, 100
CODES = (24, 48, 96)  # bytes per key of 384 columns
LISTS, PROBES = 256, (4, 16, 64, 256)  # lists in the inverted file, and how many of them a query searches
QUERIES = 500
TRAINING_KEYS, KMEANS_ROUNDS = 25_000, 10  # keys and rounds that train the centroids
NODES = 20_000
SMALL = BuildConfig(limit_bytes=3_000_000, shard_bytes=800_000, include=("*.py",))
HASHED_BYTES, TASKS, ROUNDS = 1 << 27, 500, 3


def database_sizes():
    """The counts and bytes of a small database, and the open files per shard."""
    with tempfile.TemporaryDirectory() as folder:
        database = build_database("stdlib", Path(folder) / "db", SMALL, HASHED)
        initially_open = _open_files()
        splits = [database.split(name) for name in ("train", "valid")]
        database.search_keys(np.ones((1, database.d_key)), 1)
        manifest = database.manifest
        shards, files = len(database.first_ids), len(manifest["files"])
        figures = {
            "shards": shards,
            "files": files,
            "chunks": database.n_chunks,
            "documents": manifest["splits"]["train"]["documents"],
            "document_bytes": (database.path / DOCUMENTS).stat().st_size / len(database.documents),
            "manifest_bytes": (database.path / MANIFEST).stat().st_size / files,
        }
        if initially_open is not None:  # they include two files of each training shard
            figures["open_files"] = (_open_files() - initially_open + 2 * shards) / shards
        del splits
        return figures


def _open_files():
    """The number of files that this process has open, or None if the system does not report it."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def node_bytes():
    """Bytes of a node without its key, in index.hnsw and in memory (None if the system does not report it)."""
    keys = np.random.default_rng(0).standard_normal((NODES, search_keys.WIDTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.hnsw"
        np.save(Path(folder) / "keys.npy", keys)
        build_hnsw(keys, path)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            growth = pool.submit(_loading_growth, folder).result()
        sizes = {"file": path.stat().st_size, "memory": growth}
    return {name: None if size is None else size / NODES - 4 * keys.shape[1] for name, size in sizes.items()}


def _loading_growth(folder):
    """The bytes of memory that loading index.hnsw takes, or None if the system does not report them."""
    keys = np.load(Path(folder) / "keys.npy", mmap_mode="r")
    build_hnsw(np.ascontiguousarray(keys[:100]))  # one-time allocations
    initial = _anonymous_bytes()
    graph = load_hnsw(Path(folder) / "index.hnsw", keys)
    growth = None if initial is None else _anonymous_bytes() - initial
    del graph
    return growth


def _anonymous_bytes():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def quantised(label, keys, queries):
    """Figures of IVF-PQ for each code length, and the recall of float16 keys. None without faiss."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): product quantisation is skipped")
        return None
    faiss.omp_set_num_threads(1)  # queries run one at a time
    exact, _ = exact_search(queries, keys, K)
    float16, _ = exact_search(queries, keys.astype(np.float16), K)
    rows = []
    for size in CODES:
        # "np": without polysemous training, which would take most of the time and is not used
        index = faiss.index_factory(keys.shape[1], f"IVF{LISTS},PQ{size}np")
        index.pq.cp.niter = KMEANS_ROUNDS
        start = time.perf_counter()
        index.train(keys[:: max(1, len(keys) // TRAINING_KEYS)])
        add_start = time.perf_counter()
        index.add(keys)
        row = {"code_bytes": size, "train_seconds": add_start - start, "add_seconds": time.perf_counter() - add_start}
        row["bytes"] = len(faiss.serialize_index(index)) / len(keys)
        row["settings"] = [_probed(index, probes, queries, exact) for probes in PROBES]
        rows.append(row)
        shown = row["settings"][-2]
        print(
            f"  {label}: {size} bytes per code, {shown['lists']} of {LISTS} lists: recall@{K} {shown['recall']:.3f}, "
            f"{shown['reranked']:.3f} with {CANDIDATES} candidates reranked, {1e3 * shown['seconds']:.2f} ms",
            flush=True,
        )
    figures = {"keys": label, "size": len(keys), "width": keys.shape[1], "queries": len(queries)}
    return figures | {"float16_recall": search_keys.recall(float16, exact), "rows": rows}


def _probed(index, probes, queries, exact):
    """Recall with and without reranking, and seconds per query on one thread."""
    index.nprobe = probes
    ids, seconds = [], []
    for query in queries:
        start = time.perf_counter()
        ids.append(index.search(query[None], CANDIDATES)[1][0])
        seconds.append(time.perf_counter() - start)
    ids = np.stack(ids)
    recalls = {"recall": search_keys.recall(ids[:, :K], exact), "reranked": search_keys.recall(ids, exact)}
    return {"lists": probes} | recalls | {"seconds": statistics.median(seconds)}


def hash_rate():
    """Bytes per second of a cached file's SHA-256 on one core, the best of ROUNDS."""
    with tempfile.TemporaryDirectory() as folder:
        path, times = Path(folder) / "file", []
        path.write_bytes(os.urandom(HASHED_BYTES))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            sha256_of(path)
            times.append(time.perf_counter() - start)
    return HASHED_BYTES / min(times)


def task_seconds():
    """Seconds that a Dask scheduler takes per empty task, submitted as in a build. None without Dask."""
    try:
        with workers(LOCAL) as run:
            tasks = [Task(silent, (0,), 1)] * TASKS
            run("tasks", "", tasks[:10])
            times = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                run("tasks", "", tasks)
                times.append(time.perf_counter() - start)
            return min(times) / TASKS
    except UserError as error:
        print(error)
        return None


def measured(count, file=None):
    """All figures, with `count` hashed keys and, if `file` is given, as many keys from that file of search_keys.py."""
    rng, tables = np.random.default_rng(0), []
    label, keys = search_keys.hashed(count + QUERIES, rng)
    for name, vectors in ([search_keys.from_file(file)] if file else []) + [(label, keys)]:
        held_out, rest = search_keys.split(vectors, QUERIES, rng)
        tables.append(quantised(name, rest[:count], held_out))
    figures = {"database": database_sizes(), "node": node_bytes(), "sha256_bytes_a_second": hash_rate()}
    return figures | {"task_seconds": task_seconds(), "quantised": [table for table in tables if table]}
