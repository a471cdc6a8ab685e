"""The cost of building a database: seconds per stage, BERT's share, memory by corpus size, and the index's recall.

    python benchmarks/build.py [--megabytes 20] [--bert 3.5] [--sizes 1.5 3 6 12] [-o results.json] [--plot memory.png]

The text is Python code: a slice of the standard library and the installed packages, copied into a folder. Each build
runs in its own process. The hashing embedder is used with the default settings. With MiniLM a shard is a third of the
text, so that each shard has too many keys to be searched exactly. A stage's documents, chunks and MB per second are the
totals of the corpus, including held-out documents, divided by the stage's seconds, so that stages can be compared.

Memory is measured in builds with shards and tokenizer samples as large as the smallest corpus, with all threads and
with RETRO_NP_THREADS=1. Chunks have 8 neighbours, which affects the time but hardly the memory. "Peak" is VmHWM, which
includes pages of mapped files that the system can reclaim. "Anonymous" is RssAnon, the process's own memory, sampled
every 10 ms. Both are available only on Linux.

Recall@k is the share of the k exact neighbours that `Database.search_keys` finds with its default settings. The queries
are held-out chunks, one at a time and as one batch, for which a different search method may be chosen. Any neighbour
that is as near as the k-th exact one counts, because equal chunks are equally good; "same ids" counts only equal ids.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import re
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import retro_np  # imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from turns import machine, save

from retro_np.errors import UserError
from retro_np.files import hash_fraction
from retro_np.kernels import threads
from retro_np.retrieval import bert, build, stages, workers
from retro_np.retrieval.corpus import Source, find_corpus
from retro_np.retrieval.weights import find_bert

PYTHON, PACKAGES = ("*.py",), ("site-packages", "dist-packages")  # packages may be in the stdlib folder
MAX_FILE_BYTES = 200_000
SHARDS = {"hashing": 4, "MiniLM": 3}  # minimum number of shards in the databases whose recall is measured
TRAINING_SHARE = 0.93  # approximate share of text for training, so that the last shard is nearly full
QUERIES, SAMPLING_SECONDS = 1000, 0.01
REST = "the rest"
BUILD_STAGES = {"write_texts": "reading", "_tokenizer": "tokenizer", "write_records": "list of documents"}
BUILD_STAGES |= {"_manifest": "hashing of files"}
RUN_STAGES = {"signatures of held-out documents": "duplicates", "looking for duplicates": "duplicates"}
BERT_PARTS = {"prepacked_matmul": "products", "attention_forward": "attention", "add_layer_norm": "LayerNorm"}


def copied(folder, megabytes):
    """A folder with a slice of the installed Python files. A larger slice contains the smaller ones."""
    out, size = folder / f"{megabytes:g}MB", 0
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    sources = [Source(f"{number}", path) for number, path in enumerate(folders) if Path(path).is_dir()]
    entries = find_corpus(sources, None, PYTHON, PACKAGES).entries(lambda name: None)
    fitting = (entry for entry in entries if entry.size <= MAX_FILE_BYTES)
    for entry in sorted(fitting, key=lambda entry: hash_fraction("slice " + entry.name)):
        if size >= megabytes * 1e6:
            break
        document = entry.read()
        path = out / document.source / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.text.encode())
        size += entry.size
    return out


def in_new_process(function, *arguments, one_thread=False):
    """Call a function in a new process and return its result."""
    previous = os.environ.pop(threads.THREADS_VARIABLE, None)
    if one_thread:
        os.environ[threads.THREADS_VARIABLE] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.pop(threads.THREADS_VARIABLE, None)
        os.environ |= {} if previous is None else {threads.THREADS_VARIABLE: previous}


def measured(corpus, out, embedder, settings):
    """Build a database; return the seconds of its stages and of BERT's parts, memory in MB, and counts."""
    seconds, bert_times, current = Counter(), Counter(), [REST]

    def timed(name, function, counter=seconds):
        def call(*args, **kwargs):
            outer_stage, start = current[0], time.perf_counter()
            current[0] = name if counter is seconds else outer_stage
            try:
                return function(*args, **kwargs)
            finally:
                current[0] = outer_stage
                counter[name] += time.perf_counter() - start

        return call

    def run(description, *args, run_here=workers.run_here, **kwargs):
        name = RUN_STAGES.get(description, re.sub(" in .* shards", "", description))
        timed(name, run_here)(description, *args, **kwargs)

    workers.run_here = run
    for name, stage in BUILD_STAGES.items():
        setattr(build, name, timed(stage, getattr(build, name)))
    build.Database = SimpleNamespace(open=timed("opening", build.Database.open))
    for name, part in BERT_PARTS.items():
        setattr(bert, name, timed(part, getattr(bert, name), bert_times))
    bert.ACTIVATIONS |= {name: timed("activation", function, bert_times) for name, function in bert.ACTIVATIONS.items()}
    bert.Bert.word_pieces = timed("word pieces", bert.Bert.word_pieces, bert_times)
    embedder = build.HASHED if embedder == "hashing" else retro_np.load_bert()
    peaks, start = {}, time.perf_counter()
    with sampled(peaks, current):
        database = build.build_database(corpus, out, build.BuildConfig(include=PYTHON, **settings), embedder)
    total = time.perf_counter() - start
    seconds[REST] = total - sum(seconds.values())
    count = {name: sum(s[name] for s in database.manifest["splits"].values()) for name in ("documents", "chunks")}
    count |= {"megabytes": sum(s["bytes"] for s in database.manifest["splits"].values()) / 1e6}
    memory = {"peak_mb": status("VmHWM"), "anonymous_mb": max(peaks.values(), default=None), "stages_mb": peaks}
    count |= {"shards": len(database.first_ids), "retrievable": database.n_chunks, "seconds": total}
    return count | {"stages": dict(seconds), "bert": dict(bert_times), "memory": memory}


def status(name):
    """An entry of /proc/self/status in MB, or None if there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


@contextlib.contextmanager
def sampled(peaks, current):
    """Sample the anonymous memory. peaks receives its value before the work, and the highest value of each stage."""
    finished = threading.Event()

    def sample():
        while not finished.wait(SAMPLING_SECONDS):
            peaks[current[0]] = max(peaks.get(current[0], 0), status("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    if (initial := status("RssAnon")) is not None:
        peaks["before"] = initial
        thread.start()
    try:
        yield
    finally:
        finished.set()


def searchable(corpus, out, settings):
    """Build a database of hashed keys without neighbours, which searches do not need."""
    stages.write_neighbours = lambda *_: None
    build.build_database(corpus, out, build.BuildConfig(include=PYTHON, **settings), build.HASHED)


def recalls(out, ks=(2, 10)):
    """The recall@k of a database, with held-out chunks as queries, for single queries and for a batch."""
    database = retro_np.Database.open(out)
    keys, rows = database.keys("valid"), []
    queries = keys[np.random.default_rng(0).permutation(len(keys))[:QUERIES]].astype(np.float32)

    def search(parts, k, exact=False):
        database.search_keys(parts[0], k, exact=exact)
        start = time.perf_counter()
        results = [database.search_keys(part, k, exact=exact) for part in parts]
        milliseconds = 1e3 * (time.perf_counter() - start) / sum(map(len, parts))
        return (*map(np.concatenate, zip(*results, strict=True)), milliseconds)

    for k in ks if len(queries) else ():
        single, row = list(queries[:, None]), {"k": k}
        true_ids, true_distances, row["exact_batch_ms"] = search([queries], k, exact=True)
        *_, row["exact_alone_ms"] = search(single[: QUERIES // 10], k, exact=True)
        for name, parts in (("alone", single), ("batch", [queries])):
            ids, distances, row[f"{name}_ms"] = search(parts, k)
            row[f"{name}_recall"] = (distances <= true_distances[:, -1:]).mean()
            row[f"{name}_same_ids"] = (ids[:, :, None] == true_ids[:, None, :]).any(axis=1).mean()
        rows.append(row)
    sizes = np.diff([*database.first_ids, database.n_chunks]).tolist()
    return {"shards": len(sizes), "keys": database.n_chunks, "smallest": min(sizes), "queries": len(queries), "k": rows}


def memory_rows(folder, sizes):
    """Figures of builds with growing corpora, with all threads and with one."""
    corpora, rows = {size: copied(folder, size) for size in sizes}, []
    size = int(min(sizes) * 1e6)
    settings = {"shard_bytes": size, "tokenizer_bytes": size, "neighbours": 2, "extra_candidates": 6}
    for number, (single, size) in enumerate(itertools.product((False, True), sizes)):
        out = folder / f"memory{number}"
        build = in_new_process(measured, corpora[size], out, "hashing", settings, one_thread=single)
        row = {"threads": 1 if single else threads.cores(), "megabytes": build["megabytes"], "shards": build["shards"]}
        rows.append(row | {"seconds": build["seconds"]} | build["memory"])
        print("  {megabytes:6.1f} MB of text, {shards} shards, {threads} threads".format(**row), end=": ")
        print(f"peak {mb(rows[-1]['peak_mb'])}, anonymous {mb(rows[-1]['anonymous_mb'])}", flush=True)
    return rows


def draw(rows, path):
    """Plot memory against the size of the corpus."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4))
    for count, style in zip(sorted({row["threads"] for row in rows}, reverse=True), ("-", "--"), strict=False):
        selected = [row for row in rows if row["threads"] == count]
        text = [row["megabytes"] for row in selected]
        for colour, (name, kind) in enumerate((("peak_mb", "peak, with mapped files"), ("anonymous_mb", "anonymous"))):
            label = f"{kind}, {count} thread{'s' * (count > 1)}"
            panel.plot(text, [row[name] for row in selected], f"o{style}", color=f"C{colour}", label=label)
    panel.plot(text, text, ":", color="0.5", label="size of the text")
    panel.set(xlabel="MB of text in the corpus", ylabel="MB of memory", xlim=(0, None), ylim=(0, None))
    panel.legend(frameon=False, fontsize="small")
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def mb(size):
    """A size as text; "unknown" if the system does not report it."""
    return "unknown" if size is None else f"{size:.0f} MB"


def show(name, build):
    """Print a build's stages, the slowest first."""
    counts = "{megabytes:.1f} MB, {documents:,} documents, {chunks:,} chunks, {shards} shards".format(**build)
    print(f"{name}: {counts}: {build['seconds']:.1f} s, peak {mb(build['memory']['peak_mb'])}")
    for stage, seconds in sorted(build["stages"].items(), key=lambda item: -item[1]):
        documents, chunks, size = (build[name] / max(seconds, 1e-9) for name in ("documents", "chunks", "megabytes"))
        rates = f"{documents:12,.0f} documents/s {chunks:12,.0f} chunks/s {size:8.1f} MB/s"
        print(f"  {stage:20} {seconds:7.2f} s {seconds / build['seconds']:6.1%} {rates}")
    for part, seconds in build["bert"].items():
        print(f"  BERT's {part:12} {seconds:7.2f} s {seconds / build['seconds']:6.1%}", flush=True)


def main():
    """Print, plot and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20, help="MB of text for the hashing embedder")
    parser.add_argument("--bert", type=float, default=3.5, help="MB of text for MiniLM; 0 skips MiniLM")
    parser.add_argument(
        "--sizes", type=float, nargs="*", default=[1.5, 3, 6, 12], help="MB of text for measuring memory"
    )
    parser.add_argument("--plot", help="write the plot of memory to this file")
    parser.add_argument("-o", "--out", help="write the figures to this JSON file")
    parser.add_argument("--note", help="a remark to save with the figures")
    options = parser.parse_args()
    figures = {"builds": {}, "recall": [], "memory": []}
    sizes = {"hashing": options.megabytes} | ({"MiniLM": options.bert} if options.bert and has_bert() else {})
    with tempfile.TemporaryDirectory() as name:
        folder, databases = Path(name), []
        for embedder, size in sizes.items():
            corpus, out = copied(folder / f"text for {embedder}", size), folder / embedder
            sharded = {"shard_bytes": int(size * 1e6 * TRAINING_SHARE / SHARDS[embedder])}
            settings = sharded if embedder == "MiniLM" else {}
            figures["builds"][embedder] = in_new_process(measured, corpus, out, embedder, settings)
            show(embedder, figures["builds"][embedder])
            databases.append((embedder, out))
            if embedder == "hashing":
                databases.append((embedder, folder / "sharded"))
                in_new_process(searchable, corpus, folder / "sharded", sharded)
        for embedder, out in databases:
            figures["recall"].append({"embedder": embedder} | in_new_process(recalls, out))
            show_recall(figures["recall"][-1])
        if options.sizes:
            figures["memory"] = memory_rows(folder, options.sizes)
    if options.plot and figures["memory"] and figures["memory"][0]["peak_mb"]:
        draw(figures["memory"], options.plot)
    if options.note:
        figures["note"] = options.note
    save(options.out, figures | {"machine": machine()})


def show_recall(row):
    """Print a database's recall."""
    print("{embedder}: {keys:,} keys in {shards} shards of at least {smallest:,}".format(**row))
    for point, name in itertools.product(row["k"], ("alone", "batch")):
        recall, same, time_ms = (point[f"{name}_{figure}"] for figure in ("recall", "same_ids", "ms"))
        times = f"{time_ms:.2f} ms per query, exact search {point[f'exact_{name}_ms']:.2f} ms"
        print(f"  {name}, recall@{point['k']:<2} {recall:.3f} (same ids {same:.3f}), {times}", flush=True)


def has_bert():
    """Whether MiniLM's weights are installed. Prints a line if not."""
    try:
        find_bert()
    except UserError as error:
        print(f"MiniLM is skipped: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
