"""What benchmarks/scale.py needs and no other benchmark measures: bytes, memory, product-quantised keys, hashes, tasks.

A small database of Python's standard library, by the hashing embedder, tells what its files weigh: a node of index.hnsw
beside its key, a line of documents.jsonl, an entry of the manifest, and how many files it has and keeps open. A graph of
`NODES` keys, loaded in a fresh process, tells what a node takes in memory (Linux alone says). Product quantisation is
faiss's IVF-PQ, recall@2 against exact search as in benchmarks/search.py: alone, and where the CANDIDATES best codes are
measured by their exact keys, which finds the two nearest wherever they are among the candidates.
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
NODES = 20_000
SMALL = BuildConfig(limit_bytes=3_000_000, shard_bytes=800_000, include=("*.py",))
HASHED_BYTES, TASKS = 1 << 27, 1000


def database_sizes():
    """Bytes and counts of a small database, each per node, per document, per file, per shard."""
    with tempfile.TemporaryDirectory() as folder:
        database = build_database("stdlib", Path(folder) / "db", SMALL, HASHED)
        before = _open_files()
        for split in ("train", "valid"):
            database.split(split)
        database.search_keys(np.ones((1, database.d_key)), 1)
        manifest = database.manifest
        graphs = [(size["bytes"], name) for name, size in manifest["files"].items() if name.endswith("index.hnsw")]
        nodes, shards = database.n_chunks, len(database.first_ids)
        files = len(manifest["files"])
        here = {
            "shards": shards,
            "files": files,
            "chunks": nodes,
            "documents": manifest["splits"]["train"]["documents"],
            "link_bytes": sum(size for size, _ in graphs) / nodes - 4 * database.d_key,
            "document_bytes": (database.path / DOCUMENTS).stat().st_size / len(database.documents),
            "manifest_bytes": (database.path / MANIFEST).stat().st_size / files,
        }
        if before is not None:  # the tokens and numbers of the training shards were open before
            here["open_files"] = (_open_files() - before + 2 * shards) / shards
        return here


def _open_files():
    """How many files this process has open; None where the system doesn't tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def node_memory(keys):
    """Bytes of memory that a loaded graph takes a node beside its key; None where the system doesn't tell."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "keys.npy", keys)
        build_hnsw(keys, Path(folder) / "index.hnsw")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            grown = pool.submit(_loaded, folder).result()
    return None if grown is None else grown / len(keys) - 4 * keys.shape[1]


def _loaded(folder):
    keys = np.load(Path(folder) / "keys.npy", mmap_mode="r")
    few = build_hnsw(np.ascontiguousarray(keys[:100]))  # whatever a first graph brings with it
    before = _anonymous()
    index = load_hnsw(Path(folder) / "index.hnsw", keys)
    after = _anonymous()
    return None if before is None or few is index else after - before


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
    exact, _ = exact_search(queries, keys, K)
    halved, _ = exact_search(queries, keys.astype(np.float16), K)
    rows = []
    for size in CODES:
        index = faiss.index_factory(keys.shape[1], f"IVF{LISTS},PQ{size}")
        began = time.perf_counter()
        index.train(keys)
        trained = time.perf_counter()
        index.add(keys)
        row = {"code_bytes": size, "train_seconds": trained - began, "add_seconds": time.perf_counter() - trained}
        row["bytes"] = len(faiss.serialize_index(index)) / len(keys)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        row["settings"] = [_probed(index, probes, queries, exact) for probes in PROBES]
        faiss.omp_set_num_threads(threads)
        rows.append(row)
        best = row["settings"][-2]
        print(f"  {label}: {size} bytes a code, {best['lists']} of {LISTS} lists: recall@{K} {best['recall']:.3f}, "
              f"{best['reranked']:.3f} with {CANDIDATES} measured exactly, {1e3 * best['seconds']:.2f} ms", flush=True)  # fmt: skip
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
    """Bytes a second of a file's SHA-256 on one core, the file in the system's memory: the best of three."""
    with tempfile.TemporaryDirectory() as folder:
        path, taken = Path(folder) / "file", []
        path.write_bytes(os.urandom(HASHED_BYTES))
        for _ in range(3):
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
            began = time.perf_counter()
            run("tasks", "", tasks)
            return (time.perf_counter() - began) / TASKS
    except UserError as error:
        print(error)
        return None


def measured(count, file=None):
    """All of it: `count` hashed keys, and as many of a file's, as benchmarks/search_keys.py writes."""
    rng, tables = np.random.default_rng(0), []
    label, keys = search_keys.hashed(count + QUERIES, rng)
    node = node_memory(keys[:NODES])
    for name, those in ([search_keys.from_file(file)] if file else []) + [(label, keys)]:
        held_out, rest = search_keys.split(those, QUERIES, rng)
        tables.append(quantised(name, rest[:count], held_out))
    found = {"database": database_sizes(), "node_memory": node, "sha256_bytes_a_second": hash_rate()}
    return found | {"task_seconds": task_seconds(), "quantised": [table for table in tables if table]}
