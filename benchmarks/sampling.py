"""Sampling: tokens per second with and without the cache, and the share of time that retrieval takes.

    python benchmarks/sampling.py [--length 512] [--rounds 3] [-o results.json]

The model is the one in train_step.py, untrained. The database contains some modules of the standard library, with
MiniLM's keys. Without a cache, every token costs a forward pass over all tokens so far and the neighbours of all
chunks. This pass is timed at 16 evenly spaced lengths, without retrieval, and interpolated. The text of an untrained
model is not language and has more word pieces than real text. For this reason, retrieval for one chunk of real text is
also timed.
"""

import argparse
import shutil
import statistics
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import retro_np  # imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from train_step import setting
from turns import machine, save

from retro_np.retrieval.build import BuildConfig, build_database

MODULES = ("argparse.py", "ast.py", "datetime.py", "decimal.py", "inspect.py", "pathlib.py", "tarfile.py", "typing.py")


class Timed:
    """A database that counts the seconds spent on retrieval."""

    def __init__(self, database):
        self.database, self.seconds = database, 0.0

    def __getattr__(self, name):
        attribute = getattr(self.database, name)
        if name not in ("embed_chunks", "search_keys", "value"):
            return attribute

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = attribute(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def small_database(folder):
    """A database of some modules of the standard library."""
    corpus = folder / "modules"
    corpus.mkdir()
    for name in MODULES:
        source = Path(sysconfig.get_paths()["stdlib"]) / name
        if source.exists():
            shutil.copy(source, corpus)
    return build_database(corpus, folder / "db", BuildConfig(held_out=0.0), retro_np.load_bert())


def with_cache(params, config, database, length):
    """The seconds for all tokens, and the seconds of them that retrieval took."""
    timed = Timed(database)
    start = time.perf_counter()
    retro_np.generate(params, config, [1], length, database=timed)
    return time.perf_counter() - start, timed.seconds


def retrieval_seconds(database, count=50):
    """The median seconds of retrieval for one chunk of real text: BERT, the index, the values."""
    seconds = []
    for tokens in database.value(np.arange(count))[:, :64]:
        start = time.perf_counter()
        ids, _ = database.search_keys(database.embed_chunks(tokens[None]), 2)
        database.value(ids[0])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def without_cache(params, config, length, lengths=16):
    """The seconds for all tokens, estimated from forward passes of several lengths."""
    rng = np.random.default_rng(0)
    seconds = 0.0
    for n in np.linspace(1, length, lengths).astype(int):
        tokens = rng.integers(1, config.vocabulary_size, (1, n))
        neighbours = rng.integers(1, config.vocabulary_size, (1, n // config.chunk_size, 2, 2 * config.chunk_size))
        start = time.perf_counter()
        retro_np.retro(params, config, tokens, neighbours)
        seconds += time.perf_counter() - start
    return seconds / lengths * length


def main():
    """Print the figures, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        database = small_database(Path(folder))
        config = replace(setting()[0], vocabulary_size=database.vocabulary_size)  # a small corpus has fewer
        params = retro_np.init_params(config, np.random.default_rng(0))
        with_cache(params, config, database, 70)  # compiles, and computes the tables
        without_cache(params, config, 70, lengths=2)
        rounds = []
        for _ in range(options.rounds):
            cached, retrieving = with_cache(params, config, database, options.length)
            rounds.append((cached, without_cache(params, config, options.length), retrieving))
        retrieval, chunks = retrieval_seconds(database), database.n_chunks
    ratio = statistics.median(slow / fast for fast, slow, *_ in rounds)
    share = statistics.median(retrieving / fast for fast, _, retrieving in rounds)
    fast, slow, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"{options.length} tokens: {options.length / fast:.0f} tokens/s with the cache, {options.length / slow:.1f} "
          f"without: {ratio:.1f} times faster")  # fmt: skip
    print(f"retrieval takes {share:.1%} of the time; for a chunk of real text {1e3 * retrieval:.1f} ms, BERT included, "
          f"from {chunks} chunks")  # fmt: skip
    figures = {"length": options.length, "cached_s": fast, "uncached_s": slow, "times": ratio}
    figures |= {"retrieval_share": share, "retrieval_ms": 1e3 * retrieval}
    save(options.out, {"rows": figures, "machine": machine()})


if __name__ == "__main__":
    main()
