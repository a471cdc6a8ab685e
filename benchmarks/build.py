"""What building a database takes: seconds of each stage, BERT's share, memory by size of corpus, recall of the index.

    python benchmarks/build.py [--megabytes 20] [--bert 3.5] [--sizes 1.5 3 6 12] [-o results.json] [--plot memory.png]

The text is Python: a slice of the standard library and of the installed packages, copied into a folder. Each build runs
in a process of its own. With the hashing embedder it has the default settings; with MiniLM a shard is a third of the
text, so that each has more keys than are searched exactly anyway. A stage's documents, chunks and MB a second are those
of the whole corpus, held-out documents included, over its seconds, so that stages can be compared.

Memory: builds whose shards, and samples for the tokenizer, are as large as the smallest corpus, with all threads and
with RETRO_NP_THREADS=1; with 8 neighbours a chunk, on which the time depends and memory hardly. "Peak" is VmHWM, in
which the pages of mapped files count, that the system takes back when it needs them; "anonymous" is RssAnon, what the
process itself holds, looked at every 10 ms. Linux alone tells them.

Recall@k: the share of the k exact neighbours that `Database.search_keys` finds as it is set, of held-out chunks, one at
a time and all at once, which may be searched in another way. One that is as near as the k-th counts, since of equal
chunks either will do; "same ids" counts those that are the same.
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

import retro_np  # first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from turns import machine, save

from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.retrieval import bert, build, stages, workers
from retro_np.retrieval.corpus import Source, find_corpus, place_of
from retro_np.retrieval.weights import find_bert

PYTHON, OTHERS = ("*.py",), ("site-packages", "dist-packages")  # which may lie in the standard library's folder
LONGEST = 200_000  # bytes of a file
SHARDS = {"hashing": 4, "MiniLM": 3}  # at least so many in the databases that recall is measured in
TRAINING = 0.93  # of the text is for training, about, and the last shard no smaller by much than the others
QUERIES, LOOK = 1000, 0.01  # held-out chunks that are looked for; seconds between two looks at the memory
REST = "the rest"
OF_BUILD = {"write_texts": "reading", "_tokenizer": "tokenizer", "write_records": "list of documents"}
OF_BUILD |= {"_manifest": "hashing of files"}
OF_RUN = {"signatures of held-out documents": "duplicates", "looking for duplicates": "duplicates"}
OF_BERT = {"frozen_product": "products", "attention_forward": "attention", "add_layer_norm": "LayerNorm"}


def copied(folder, megabytes):
    """A folder with a slice of the Python files at hand, which holds the smaller slices."""
    out, size = folder / f"{megabytes:g}MB", 0
    homes = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    sources = [Source(f"{number}", home) for number, home in enumerate(homes) if Path(home).is_dir()]
    entries = find_corpus(sources, None, PYTHON, OTHERS).entries(lambda name: None)
    fitting = (entry for entry in entries if entry.size <= LONGEST)
    for entry in sorted(fitting, key=lambda entry: place_of("slice " + entry.name)):
        if size >= megabytes * 1e6:
            break
        document = entry.read()
        path = out / document.source / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.text.encode())
        size += entry.size
    return out


def alone(function, *arguments, one_thread=False):
    """What a function returns, called in a fresh process."""
    before = os.environ.pop(threads.VARIABLE, None)
    if one_thread:
        os.environ[threads.VARIABLE] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.pop(threads.VARIABLE, None)
        os.environ |= {} if before is None else {threads.VARIABLE: before}


def measured(corpus, out, embedder, settings):
    """Build a database and return what it took: seconds, of stages and of BERT's parts, memory in MB, counts."""
    seconds, inside, running = Counter(), Counter(), [REST]

    def timed(name, function, counter=seconds):
        def call(*args, **kwargs):
            before, began = running[0], time.perf_counter()
            running[0] = name if counter is seconds else before
            try:
                return function(*args, **kwargs)
            finally:
                running[0] = before
                counter[name] += time.perf_counter() - began

        return call

    def run(description, *args, here=workers.run_here, **kwargs):
        name = OF_RUN.get(description, re.sub(" in .* shards", "", description))
        timed(name, here)(description, *args, **kwargs)

    workers.run_here = run
    for name, stage in OF_BUILD.items():
        setattr(build, name, timed(stage, getattr(build, name)))
    build.Database = SimpleNamespace(open=timed("opening", build.Database.open))
    for name, part in OF_BERT.items():
        setattr(bert, name, timed(part, getattr(bert, name), inside))
    bert.ACTIVATIONS |= {name: timed("activation", each, inside) for name, each in bert.ACTIVATIONS.items()}
    bert.Bert.word_pieces = timed("word pieces", bert.Bert.word_pieces, inside)
    embedder = build.HASHED if embedder == "hashing" else retro_np.load_bert()
    highest, began = {}, time.perf_counter()
    with watched(highest, running):
        database = build.build_database(corpus, out, build.BuildConfig(include=PYTHON, **settings), embedder)
    total = time.perf_counter() - began
    seconds[REST] = total - sum(seconds.values())
    count = {name: sum(s[name] for s in database.manifest["splits"].values()) for name in ("documents", "chunks")}
    count |= {"megabytes": sum(s["bytes"] for s in database.manifest["splits"].values()) / 1e6}
    memory = {"peak_mb": status("VmHWM"), "anonymous_mb": max(highest.values(), default=None), "stages_mb": highest}
    count |= {"shards": len(database.first_ids), "retrievable": database.n_chunks, "seconds": total}
    return count | {"stages": dict(seconds), "bert": dict(inside), "memory": memory}


def status(name):
    """A line of /proc/self/status in MB; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


@contextlib.contextmanager
def watched(highest, running):
    """Look at the anonymous memory now and then, and note the most of each stage, beside what there was before."""
    over = threading.Event()

    def look():
        while not over.wait(LOOK):
            highest[running[0]] = max(highest.get(running[0], 0), status("RssAnon"))

    thread = threading.Thread(target=look, daemon=True)
    if (before := status("RssAnon")) is not None:
        highest["before"] = before
        thread.start()
    try:
        yield
    finally:
        over.set()


def searchable(corpus, out, settings):
    """A database of hashed keys to search in, without its list of neighbours, which searches don't need."""
    stages.write_neighbours = lambda *_: None
    build.build_database(corpus, out, build.BuildConfig(include=PYTHON, **settings), build.HASHED)


def recalls(out, ks=(2, 10)):
    """Recall@k of a database with its held-out chunks as queries, a row for each k: of queries alone and of a batch."""
    database = retro_np.Database.open(out)
    keys, rows = database.keys("valid"), []
    queries = keys[np.random.default_rng(0).permutation(len(keys))[:QUERIES]].astype(np.float32)

    def search(parts, k, exact=False):
        database.search_keys(parts[0], k, exact=exact)
        began = time.perf_counter()
        found = [database.search_keys(part, k, exact=exact) for part in parts]
        took = 1e3 * (time.perf_counter() - began) / sum(map(len, parts))
        return (*map(np.concatenate, zip(*found, strict=True)), took)

    for k in ks if len(queries) else ():
        singly, row = list(queries[:, None]), {"k": k}
        true_ids, true_distances, row["exact_batch_ms"] = search([queries], k, exact=True)
        *_, row["exact_alone_ms"] = search(singly[: QUERIES // 10], k, exact=True)
        for name, parts in (("alone", singly), ("batch", [queries])):
            ids, distances, row[f"{name}_ms"] = search(parts, k)
            row[f"{name}_recall"] = (distances <= true_distances[:, -1:]).mean()
            row[f"{name}_same_ids"] = (ids[:, :, None] == true_ids[:, None, :]).any(axis=1).mean()
        rows.append(row)
    sizes = np.diff([*database.first_ids, database.n_chunks]).tolist()
    return {"shards": len(sizes), "keys": database.n_chunks, "smallest": min(sizes), "queries": len(queries), "k": rows}


def memory_rows(folder, sizes):
    """Builds of growing corpora, with all threads and with one."""
    corpora, rows = {size: copied(folder, size) for size in sizes}, []
    part = int(min(sizes) * 1e6)
    settings = {"shard_bytes": part, "tokenizer_bytes": part, "neighbours": 2, "extra_candidates": 6}
    for number, (one, size) in enumerate(itertools.product((False, True), sizes)):
        found = alone(measured, corpora[size], folder / f"memory{number}", "hashing", settings, one_thread=one)
        row = {"threads": 1 if one else threads.cores(), "megabytes": found["megabytes"], "shards": found["shards"]}
        rows.append(row | {"seconds": found["seconds"]} | found["memory"])
        print("  {megabytes:6.1f} MB of text, {shards} shards, {threads} threads".format(**row), end=": ")
        print(f"peak {mb(rows[-1]['peak_mb'])}, anonymous {mb(rows[-1]['anonymous_mb'])}", flush=True)
    return rows


def draw(rows, path):
    """Memory against the size of the corpus, and the corpus itself."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4))
    for count, style in zip(sorted({row["threads"] for row in rows}, reverse=True), ("-", "--"), strict=False):
        those = [row for row in rows if row["threads"] == count]
        text = [row["megabytes"] for row in those]
        for number, (name, what) in enumerate(
            (("peak_mb", "peak, mapped files included"), ("anonymous_mb", "anonymous"))
        ):
            label = f"{what}, {count} thread{'s' * (count > 1)}"
            panel.plot(text, [row[name] for row in those], f"o{style}", color=f"C{number}", label=label)
    panel.plot(text, text, ":", color="0.5", label="the text itself")
    panel.set(xlabel="MB of text in the corpus", ylabel="MB of memory", xlim=(0, None), ylim=(0, None))
    panel.legend(frameon=False, fontsize="small")
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def mb(size):
    """As text; None is a system that doesn't tell."""
    return "unknown" if size is None else f"{size:.0f} MB"


def show(name, found):
    """Print a build's stages, the slowest first."""
    counts = "{megabytes:.1f} MB, {documents:,} documents, {chunks:,} chunks, {shards} shards".format(**found)
    print(f"{name}: {counts}: {found['seconds']:.1f} s, peak {mb(found['memory']['peak_mb'])}")
    for stage, seconds in sorted(found["stages"].items(), key=lambda each: -each[1]):
        documents, chunks, size = (found[of] / max(seconds, 1e-9) for of in ("documents", "chunks", "megabytes"))
        rates = f"{documents:12,.0f} documents/s {chunks:12,.0f} chunks/s {size:8.1f} MB/s"
        print(f"  {stage:20} {seconds:7.2f} s {seconds / found['seconds']:6.1%} {rates}")
    for part, seconds in found["bert"].items():
        print(f"  of BERT: {part:11} {seconds:7.2f} s {seconds / found['seconds']:6.1%}", flush=True)


def main():
    """Print the figures, draw and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20, help="of text for the hashing embedder")
    parser.add_argument("--bert", type=float, default=3.5, help="MB of text for MiniLM; 0 leaves it out")
    parser.add_argument("--sizes", type=float, nargs="*", default=[1.5, 3, 6, 12], help="MB of text, for the memory")
    parser.add_argument("--plot", help="write the drawing")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    parser.add_argument("--note", help="what to say of them, as where the machine had other work")
    options = parser.parse_args()
    figures = {"builds": {}, "recall": [], "memory": []}
    sizes = {"hashing": options.megabytes} | ({"MiniLM": options.bert} if options.bert and has_bert() else {})
    with tempfile.TemporaryDirectory() as name:
        folder, databases = Path(name), []
        for embedder, size in sizes.items():
            corpus, out = copied(folder / f"text for {embedder}", size), folder / embedder
            sharded = {"shard_bytes": int(size * 1e6 * TRAINING / SHARDS[embedder])}
            figures["builds"][embedder] = alone(
                measured, corpus, out, embedder, sharded if embedder == "MiniLM" else {}
            )
            show(embedder, figures["builds"][embedder])
            databases.append((embedder, out))
            if embedder == "hashing":
                databases.append((embedder, folder / "sharded"))
                alone(searchable, corpus, folder / "sharded", sharded)
        for embedder, out in databases:
            figures["recall"].append({"embedder": embedder} | alone(recalls, out))
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
    print("{embedder}: {keys:,} keys in {shards} shards, of {smallest:,} or more".format(**row))
    for at, name in itertools.product(row["k"], ("alone", "batch")):
        print(
            f"  {name}, recall@{at['k']:<2} {at[f'{name}_recall']:.3f} (same ids {at[f'{name}_same_ids']:.3f}), a "
            f"query takes {at[f'{name}_ms']:.2f} ms, exactly {at[f'exact_{name}_ms']:.2f} ms",
            flush=True,
        )


def has_bert():
    """Whether the weights are there; a line where they are not."""
    try:
        find_bert()
    except UserError as error:
        print(f"MiniLM is left out: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
