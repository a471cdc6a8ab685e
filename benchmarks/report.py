"""The README's performance section from benchmarks/results/*.json, each of which a benchmark wrote with -o.

python benchmarks/report.py          rewrite the section
python benchmarks/report.py --check  exit with 1 where the section is not what the results say
"""

import argparse
import itertools
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("numpy", "numba", "c", "PyTorch")
RATES = {"documents": 0, "chunks": 0, "megabytes": 1}  # of a build, and the digits after the point


def results(name):
    """What a benchmark wrote."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def ratio(row):
    """A peer's time over ours, with the spread of the rounds."""
    return f"{row['times_ours']:.2f} ({row['from']:.2f} … {row['to']:.2f})"


def train_step():
    """The step, its peers, and how far it is from what the cores can do."""
    found = results("train_step")
    rows = [[name, f"{row['seconds']:.2f} s", ratio(row), f"{row['peak_mb']:.0f} MB"]
            for name, row in found["rows"].items()]  # fmt: skip
    work = found["work"]
    flop = work["linear_flop"] + work["attention_flop"]
    return [
        table(["a training step", "time", "times ours", "peak memory"], rows),
        f"The step is {flop / 1e9:.0f} GFLOP of products, {work['linear_flop'] / 1e9:.0f} of them in linear layers: it "
        f"runs at {work['gflops']:.0f} GFLOP/s, {work['share_of_sgemm']:.0%} of what NumPy's sgemm reaches with square "
        "matrices in the same rounds.",
    ]


def kernels():
    """Milliseconds of each kernel."""
    rows = [[name, *(f"{row[kind]:.1f}" if kind in row else "" for kind in KINDS)]
            for name, row in results("kernels")["milliseconds"].items()]  # fmt: skip
    return [table(["kernel, ms", "NumPy", "Numba", "C", "PyTorch"], rows)]


def embed():
    """Chunks a second."""
    rows = [[name, f"{row['chunks_a_second']:.0f}", ratio(row)] for name, row in results("embed")["rows"].items()]
    return [table(["MiniLM, float32", "chunks a second", "times our time"], rows)]


def search():
    """Exact search against faiss, and the best setting of each graph."""
    exact, graphs = [], []
    for one in results("search")["tables"]:
        where = f"{one['size']:,} {one['keys'].replace('keys of minilm.npy', 'keys of MiniLM')}"
        ours, faiss = one["exact"]["retro_np"], one["exact"]["faiss IndexFlatL2"]
        for kind, of in (("batch", f"{one['queries']} at once"), ("single", "one")):
            exact.append(
                [
                    where,
                    of,
                    milliseconds(ours[kind]["seconds"]),
                    milliseconds(faiss[kind]["seconds"]),
                    ratio(faiss[kind]),
                ]
            )
        for peer, row in one.get("approximate", {}).items():
            point = row["at_recall_0.95"] or max(row["settings"], key=lambda setting: setting["recall"])
            found = point["setting"], f"{point['recall']:.3f}", milliseconds(point["median"])
            graphs.append([where, peer, f"{row['build_seconds']:.0f} s", *found])
    return [
        table(["exact search, k 2", "queries", "ours", "faiss", "times ours"], exact),
        table(
            [
                "one query, one thread: the first setting with recall ≥ 0.95, or the best there is",
                "index",
                "built in",
                "ef, or leaves",
                "recall@2",
                "time",
            ],
            graphs,
        ),
    ]


def build():
    """A database's stages, BERT's part of them, memory by size of corpus, and the recall of the index."""
    found = results("build")
    hashing, minilm = found["builds"]["hashing"], found["builds"]["MiniLM"]
    inside, total = minilm["bert"], minilm["seconds"]
    stages, graphs = [], []
    for stage, seconds in sorted(hashing["stages"].items(), key=lambda each: -each[1]):
        rates = [f"{hashing[of] / seconds:,.{digits}f}" for of, digits in RATES.items()]
        other = minilm["stages"].get(stage)
        theirs = ("", "") if other is None else (f"{other:.2f} s", f"{other / total:.1%}")
        stages.append([stage, f"{seconds:.2f} s", *rates, f"{seconds / hashing['seconds']:.1%}", *theirs])
    for row in found["recall"]:
        for at, name in itertools.product(row["k"], ("alone", "batch")):
            of = "one" if name == "alone" else f"{row['queries']} at once"
            times = (f"{at[f'{kind}{name}_ms']:.2f} ms" for kind in ("", "exact_"))
            where = f"{row['keys']:,} of {row['embedder']}", row["shards"]
            graphs.append([*where, at["k"], of, f"{at[f'{name}_recall']:.3f}", *times])
    memory = found["memory"]
    least, most = (f([row["anonymous_mb"] for row in memory]) for f in (min, max))
    peaks = [row["peak_mb"] for row in memory]
    slowest = {name: max(each["stages"], key=each["stages"].get) for name, each in found["builds"].items()}
    return [
        *([f"{found['note']}:"] if "note" in found else []),
        table(["a build", "hashing", "documents/s", "chunks/s", "MB/s", "share", "MiniLM", "share"], stages),
        f"{hashing['megabytes']:.0f} MB of Python, {hashing['chunks']:,} chunks, take {hashing['seconds']:.0f} s with "
        f"the hashing embedder, most of it {slowest['hashing']}; {minilm['megabytes']:.1f} MB, {minilm['chunks']:,} "
        f"chunks, take {total:.0f} s with MiniLM, most of it {slowest['MiniLM']}. BERT's products are "
        f"{inside['products'] / total:.1%} of all that time and its attention {inside['attention'] / total:.1%}, "
        f"together {(inside['products'] + inside['attention']) / total:.1%}.",
        table(["held-out chunks look for keys", "shards", "k", "queries", "recall@k", "a query", "exactly"], graphs),
        f"Corpora from {memory[0]['megabytes']:.1f} to {max(row['megabytes'] for row in memory):.1f} MB, in shards as "
        f"large as the smallest: {least:.0f} to {most:.0f} MB of memory, {min(peaks):.0f} to {max(peaks):.0f} MB with "
        "the files that are mapped.",
        "![Memory of a build by size of corpus](docs/build_memory.png)",
    ]  # fmt: skip


def milliseconds(seconds):
    """As text, with the digits that count."""
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.02 else f"{1e3 * seconds:.2f} ms"


def sampling():
    """With the cache and without."""
    row = results("sampling")["rows"]
    return [
        f"Sampling {row['length']} tokens takes {row['cached_s']:.1f} s with the cache, "
        f"{row['length'] / row['cached_s']:.0f} tokens a second, and {row['times']:.1f} × as long without it; "
        f"{row['retrieval_share']:.1%} of it is retrieval. Retrieving for one chunk of text takes "
        f"{row['retrieval_ms']:.1f} ms, BERT included."
    ]


def section():
    """The text between the marks."""
    machine = results("train_step")["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"Measured on {machine['cores']} cores of an {machine['processor']}, {versions}: medians, and of ratios those "
        "within a round.",
        *train_step(), *kernels(), *embed(), *search(), *build(), *sampling(),
    ]  # fmt: skip
    return "\n\n".join(parts)


def settle(path, program, sections, check):
    """Write sections, {name: text}, between their marks in a file; check: exit with 1 where that would change it."""
    text = fresh = path.read_text(encoding="utf-8")
    for name, inside in sections.items():
        begin, end = f"<!-- {name}: python benchmarks/{program} -->", f"<!-- end of {name} -->"
        before, rest = fresh.split(begin)
        fresh = f"{before}{begin}\n{inside}\n{end}{rest.split(end)[1]}"
    if check:
        raise SystemExit(int(fresh != text))
    path.write_text(fresh, encoding="utf-8")


def main(path, program, sections, description):
    """Rewrite a file's sections, or with --check hold it against them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    settle(path, program, sections, parser.parse_args().check)


if __name__ == "__main__":
    main(ROOT / "README.md", "report.py", {"performance": section()}, __doc__)
