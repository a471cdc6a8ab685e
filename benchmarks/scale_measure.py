"""What benchmarks/scale.py needs and no other benchmark measures: bytes, memory, product-quantised keys, hashes, tasks.

A small database of Python's standard library, by the hashing embedder, tells what a line of documents.jsonl and an
entry of the manifest weigh, and how many files it has and keeps open. A graph of NODES random keys, all different,
tells what a node takes beside its key in index.hnsw, and, loaded in a fresh process, in memory (Linux alone says).
Product quantisation is faiss's IVF-PQ, recall@2 against exact search as in benchmarks/search.py: alone, and where the
CANDIDATES best codes are measured by their exact keys, which finds the two nearest wherever they are among these.
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
CODES = (24, 48, 96)  # bytes a key, of 384 columns: 16, 8, 4 columns a byte
LISTS, PROBES = 256, (4, 16, 64, 256)  # lists of the inverted file, and how many of them are looked through
QUERIES = 500
TRAINED, ROUNDS_OF_KMEANS = 25_000, 10  # keys that centroids are trained on
NODES = 20_000
SMALL = BuildConfig(limit_bytes=3_000_000, shard_bytes=800_000, include=("*.py",))
HASHED_BYTES, TASKS, ROUNDS = 1 << 27, 500, 3


def database_sizes():
    """Bytes and counts of a small database, each per node, per document, per file, per shard."""
    with tempfile.TemporaryDirectory() as folder:
        database = build_database("stdlib", Path(folder) / "db", SMALL, HASHED)
        before = _open_files()
        splits = [database.split(name) for name in ("train", "valid")]
        database.search_keys(np.ones((1, database.d_key)), 1)
        manifest = database.manifest
        nodes, shards = database.n_chunks, len(database.first_ids)
        files = len(manifest["files"])
        here = {
            "shards": shards,
            "files": files,
            "chunks": nodes,
            "documents": manifest["splits"]["train"]["documents"],
            "document_bytes": (database.path / DOCUMENTS).stat().st_size / len(database.documents),
            "manifest_bytes": (database.path / MANIFEST).stat().st_size / files,
        }
        if before is not None:  # the tokens and numbers of the training shards were open before
            here["open_files"] = (_open_files() - before + 2 * shards) / shards
        del splits
        return here


def _open_files():
    """How many files this process has open; None where the system doesn't tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def node_bytes():
    """Bytes that a node takes beside its key, in index.hnsw and, None where the system doesn't tell, in memory."""
    keys = np.random.default_rng(0).standard_normal((NODES, search_keys.WIDTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.hnsw"
        np.save(Path(folder) / "keys.npy", keys)
        build_hnsw(keys, path)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            grown = pool.submit(_loaded, folder).result()
        sizes = {"file": path.stat().st_size, "memory": grown}
    return {name: None if size is None else size / NODES - 4 * keys.shape[1] for name, size in sizes.items()}


def _loaded(folder):
    keys = np.load(Path(folder) / "keys.npy", mmap_mode="r")
    build_hnsw(np.ascontiguousarray(keys[:100]))  # whatever a first graph brings with it
    before = _anonymous()
    graph = load_hnsw(Path(folder) / "index.hnsw", keys)
    grown = None if before is None else _anonymous() - before
    del graph
    return grown


def _anonymous():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def quantised(label, keys, queries):
    """Rows of IVF-PQ for each length of code, and the recall of float16 keys; None without faiss."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): product quantisation is left out")
        return None
    faiss.omp_set_num_threads(1)  # a query at a time, and training that other work on the machine doesn't stall
    exact, _ = exact_search(queries, keys, K)
    halved, _ = exact_search(queries, keys.astype(np.float16), K)
    rows = []
    for size in CODES:
        # np: no order of the centroids by Hamming distance, which would take most of the time and isn't used
        index = faiss.index_factory(keys.shape[1], f"IVF{LISTS},PQ{size}np")
        index.pq.cp.niter = ROUNDS_OF_KMEANS
        began = time.perf_counter()
        index.train(keys[:: max(1, len(keys) // TRAINED)])
        trained = time.perf_counter()
        index.add(keys)
        row = {"code_bytes": size, "train_seconds": trained - began, "add_seconds": time.perf_counter() - trained}
        row["bytes"] = len(faiss.serialize_index(index)) / len(keys)
        row["settings"] = [_probed(index, probes, queries, exact) for probes in PROBES]
        rows.append(row)
        best = row["settings"][-2]
        print(
            f"  {label}: {size} bytes a code, {best['lists']} of {LISTS} lists: recall@{K} {best['recall']:.3f}, "
            f"{best['reranked']:.3f} with {CANDIDATES} measured exactly, {1e3 * best['seconds']:.2f} ms",
            flush=True,
        )
    found = {"keys": label, "size": len(keys), "width": keys.shape[1], "queries": len(queries)}
    return found | {"float16_recall": search_keys.recall(halved, exact), "rows": rows}


def _probed(index, probes, queries, exact):
    """Recall, with and without exact distances of the candidates, and seconds of a query on one thread."""
    index.nprobe = probes
    ids, seconds = [], []
    for query in queries:
        began = time.perf_counter()
        ids.append(index.search(query[None], CANDIDATES)[1][0])
        seconds.append(time.perf_counter() - began)
    ids = np.stack(ids)
    recalls = {"recall": search_keys.recall(ids[:, :K], exact), "reranked": search_keys.recall(ids, exact)}
    return {"lists": probes} | recalls | {"seconds": statistics.median(seconds)}


def hash_rate():
    """Bytes a second of a file's SHA-256 on one core, the file in the system's memory: the best of ROUNDS."""
    with tempfile.TemporaryDirectory() as folder:
        path, taken = Path(folder) / "file", []
        path.write_bytes(os.urandom(HASHED_BYTES))
        for _ in range(ROUNDS):
            began = time.perf_counter()
            sha256_of(path)
            taken.append(time.perf_counter() - began)
    return HASHED_BYTES / min(taken)


def task_seconds():
    """Seconds that a Dask scheduler takes for a task that does nothing, as a build submits them; None without Dask."""
    try:
        with workers(LOCAL) as run:
            tasks = [Task(silent, (0,), 1)] * TASKS
            run("tasks", "", tasks[:10])
            taken = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                run("tasks", "", tasks)
                taken.append(time.perf_counter() - began)
            return min(taken) / TASKS
    except UserError as error:
        print(error)
        return None


def measured(count, file=None):
    """All of it: `count` hashed keys, and as many of a file's, as benchmarks/search_keys.py writes."""
    rng, tables = np.random.default_rng(0), []
    label, keys = search_keys.hashed(count + QUERIES, rng)
    for name, those in ([search_keys.from_file(file)] if file else []) + [(label, keys)]:
        held_out, rest = search_keys.split(those, QUERIES, rng)
        tables.append(quantised(name, rest[:count], held_out))
    found = {"database": database_sizes(), "node": node_bytes(), "sha256_bytes_a_second": hash_rate()}
    return found | {"task_seconds": task_seconds(), "quantised": [table for table in tables if table]}
