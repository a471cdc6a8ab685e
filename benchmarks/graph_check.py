"""How long it takes to validate an HNSW graph, beside hashing and loading it. Prints seconds of processor time.

python benchmarks/graph_check.py [--keys 200000] [--width 128]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from retro_np.files import sha256_of
from retro_np.retrieval.graph import check_graph
from retro_np.retrieval.index import INDEX, build_hnsw, load_hnsw

REPETITIONS = 5


def seconds(function) -> float:
    """The median processor time of a call."""
    times = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return float(np.median(times))


def main() -> None:
    """Build a graph of random keys and time what an opening does with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    keys = np.random.default_rng(0).standard_normal((options.keys, options.width), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / INDEX
        build_hnsw(keys, path)
        labels = np.arange(len(keys))
        print(f"{options.keys:,} keys of {options.width} columns, {path.stat().st_size / 1e6:,.0f} MB")
        print(f"hash the file   {seconds(lambda: sha256_of(path)):.3f} s")
        print(f"read, validate  {seconds(lambda: check_graph(path, keys, labels)):.3f} s")
        print(f"load it in all  {seconds(lambda: load_hnsw(path, keys)):.3f} s")


if __name__ == "__main__":
    main()
