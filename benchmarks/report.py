"""The tables in docs/performance.md, made from benchmarks/results/*.json, which the benchmarks wrote with -o.

python benchmarks/report.py          rewrite the tables
python benchmarks/report.py --check  exit with status 1 if the page does not show the results
"""

import argparse
import itertools
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("numpy", "numba", "c", "PyTorch")
RATES = {"documents": 0, "chunks": 0, "megabytes": 1}  # rates of a build's stages, and the decimals to show


def results(name):
    """The figures that a benchmark wrote."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def ratio(row):
    """A peer's time divided by retro_np's: the median over the rounds, and their range."""
    return f"{row['times_ours']:.2f} ({row['from']:.2f} … {row['to']:.2f})"


def milliseconds(seconds):
    """A time as text: whole milliseconds from 20 ms, two decimals below."""
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.02 else f"{1e3 * seconds:.2f} ms"


def machine(benchmark="train_step"):
    """Where the figures of a benchmark were measured."""
    facts = results(benchmark)["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [f"Measured on {facts['cores']} cores of an {facts['processor']} with {versions}."]


def train_step():
    """The time of a training step, its peers' times, and its rate relative to sgemm's."""
    figures = results("train_step")
    rows = [
        [name, f"{row['seconds']:.2f} s", ratio(row), f"{row['peak_mb']:.0f} MB"]
        for name, row in figures["rows"].items()
    ]
    work = figures["work"]
    flop = work["linear_flop"] + work["attention_flop"]
    return [
        table(["implementation", "time per step", "relative time", "peak memory"], rows),
        f"A step does {flop / 1e9:.0f} GFLOP of matrix products, {work['linear_flop'] / 1e9:.0f} of them in linear "
        f"layers. retro_np does them at {work['gflops']:.0f} GFLOP/s, {work['share_of_sgemm']:.0%} of the rate that "
        "NumPy's sgemm reached on square matrices in the same rounds.",
    ]


def kernels():
    """The milliseconds of each kernel in each implementation."""
    rows = [
        [name, *(f"{row[kind]:.1f}" if kind in row else "" for kind in KINDS)]
        for name, row in results("kernels")["milliseconds"].items()
    ]
    return [table(["kernel, ms per call", "NumPy", "Numba", "C", "PyTorch"], rows), *machine("kernels")]


def embed():
    """Chunks embedded per second."""
    rows = [[name, f"{row['chunks_a_second']:.0f}", ratio(row)] for name, row in results("embed")["rows"].items()]
    return [table(["MiniLM in float32", "chunks per second", "relative time"], rows)]


def search():
    """Exact search compared with faiss, and the best setting of each approximate index."""
    exact, approximate = [], []
    for keys in results("search")["tables"]:
        database = f"{keys['size']:,} {keys['keys'].replace('keys of minilm.npy', 'keys of MiniLM')}"
        retro_np, faiss = keys["exact"]["retro_np"], keys["exact"]["faiss IndexFlatL2"]
        for kind, queries in (("batch", f"{keys['queries']} together"), ("single", "1")):
            times = (milliseconds(peer[kind]["seconds"]) for peer in (retro_np, faiss))
            exact.append([database, queries, *times, ratio(faiss[kind])])
        for peer, row in keys.get("approximate", {}).items():
            best = row["at_recall_0.95"] or max(row["settings"], key=lambda setting: setting["recall"])
            figures = best["setting"], f"{best['recall']:.3f}", milliseconds(best["median"])
            approximate.append([database, peer, f"{row['build_seconds']:.0f} s", *figures])
    return [
        table(["keys, exact search, k = 2", "queries", "retro_np", "faiss", "relative time of faiss"], exact),
        "For each approximate index the table gives the first setting that reaches a recall of 0.95, or the setting "
        "with the highest recall if none does. One query at a time, on one thread:",
        table(["keys", "index", "build time", "ef or leaves", "recall@2", "time per query"], approximate),
    ]


def build():
    """The stages of a build, BERT's share of the time, the memory it takes, and the recall of its index."""
    figures = results("build")
    hashing, minilm = figures["builds"]["hashing"], figures["builds"]["MiniLM"]
    bert, total = minilm["bert"], minilm["seconds"]
    stages, recalls = [], []
    for stage, seconds in sorted(hashing["stages"].items(), key=lambda item: -item[1]):
        rates = [f"{hashing[unit] / seconds:,.{decimals}f}" for unit, decimals in RATES.items()]
        minilm_seconds = minilm["stages"].get(stage)
        in_minilm = ("", "") if minilm_seconds is None else (f"{minilm_seconds:.2f} s", f"{minilm_seconds / total:.1%}")
        stages.append([stage, f"{seconds:.2f} s", *rates, f"{seconds / hashing['seconds']:.1%}", *in_minilm])
    for row in figures["recall"]:
        for by_k, name in itertools.product(row["k"], ("alone", "batch")):
            queries = "1" if name == "alone" else f"{row['queries']} together"
            times = (f"{by_k[f'{kind}{name}_ms']:.2f} ms" for kind in ("", "exact_"))
            keys = f"{row['keys']:,}, {row['embedder']}"
            recalls.append([keys, row["shards"], by_k["k"], queries, f"{by_k[f'{name}_recall']:.3f}", *times])
    memory = figures["memory"]
    smallest, largest = (extreme(row["anonymous_mb"] for row in memory) for extreme in (min, max))
    peaks = [row["peak_mb"] for row in memory]
    slowest = {name: max(build["stages"], key=build["stages"].get) for name, build in figures["builds"].items()}
    header = ["stage", "hashing", "documents/s", "chunks/s", "MB/s", "share", "MiniLM", "share"]
    return [
        *([f"{figures['note']}:"] if "note" in figures else []),
        table(header, stages),
        f"With the hashing embedder, {hashing['megabytes']:.0f} MB of Python ({hashing['chunks']:,} chunks) take "
        f"{hashing['seconds']:.0f} s; the slowest stage is {slowest['hashing']}. With MiniLM, "
        f"{minilm['megabytes']:.1f} MB ({minilm['chunks']:,} chunks) take {total:.0f} s; the slowest stage is "
        f"{slowest['MiniLM']}. BERT's matrix products take {bert['products'] / total:.1%} of that time, its attention "
        f"{bert['attention'] / total:.1%}, together {(bert['products'] + bert['attention']) / total:.1%}.",
        "Held-out chunks search the finished databases as `Database.search_keys` does by default. The last two columns "
        "are the time per query of this search and of exact search:",
        table(["keys", "shards", "k", "queries", "recall@k", "default search", "exact search"], recalls),
        f"Corpora of {memory[0]['megabytes']:.1f} to {max(row['megabytes'] for row in memory):.1f} MB, in shards as "
        f"large as the smallest corpus, need {smallest:.0f} to {largest:.0f} MB of memory, or {min(peaks):.0f} to "
        f"{max(peaks):.0f} MB if memory-mapped files are counted.",
    ]


def sampling():
    """The time of sampling with the cache and without it."""
    row = results("sampling")["rows"]
    return [
        f"Sampling {row['length']} tokens takes {row['cached_s']:.1f} s with the cache, which is "
        f"{row['length'] / row['cached_s']:.0f} tokens per second, and {row['times']:.1f} times as long without it. "
        f"Retrieval is {row['retrieval_share']:.1%} of the time. Retrieving the neighbours of one chunk of real text "
        f"takes {row['retrieval_ms']:.1f} ms, BERT included."
    ]


def import_order():
    """A training step by the order of imports."""
    rows = [
        [name, f"{row['seconds']:.2f} s", ratio(row), f"{row['least']:.2f} s", f"{row['least_ratio']:.2f}"]
        for name, row in results("import_order")["rows"].items()
    ]
    header = ["imported", "time per step", "relative time", "smallest time", "relative"]
    return [table(header, rows), *machine("import_order")]


def near_duplicates():
    """Both ways to find near-duplicates, by the size of the held-out text."""
    figures, rows = results("deduplicate_methods"), []
    for size in figures["sizes"]:
        for name, row in size["compare"].items():
            times = f"{size['sign_seconds'][name]:.1f} s", f"{row['seconds']:.1f} s", ratio(row)
            rows.append([f"{size['held_megabytes']:g} MB", size["threshold"], name, *times, f"{row['peak_mb']:.0f} MB"])
    header = ["held-out text", "threshold", "method", "held-out text read", "compared", "relative time", "peak memory"]
    return [table(header, rows), *machine("deduplicate_methods")]


def write_sections(path, program, sections, check):
    """Write each section, {name: text}, between its markers. check: only exit, with 1 if the file would change."""
    text = updated = path.read_text(encoding="utf-8")
    for name, section in sections.items():
        begin, end = f"<!-- {name}: python benchmarks/{program} -->", f"<!-- end of {name} -->"
        head, rest = updated.split(begin)
        updated = f"{head}{begin}\n{section}\n{end}{rest.split(end)[1]}"
    if check:
        raise SystemExit(int(updated != text))
    path.write_text(updated, encoding="utf-8")


def main(path, program, sections, description):
    """Rewrite a file's sections, or compare them with --check."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    write_sections(path, program, sections, parser.parse_args().check)


SECTIONS = {
    "machine": machine,
    "training step": train_step,
    "order of imports": import_order,
    "kernels": kernels,
    "embedding": embed,
    "search": search,
    "build": build,
    "near-duplicates": near_duplicates,
    "sampling": sampling,
}

if __name__ == "__main__":
    pages = {name: "\n\n".join(make()) for name, make in SECTIONS.items()}
    main(ROOT / "docs" / "performance.md", "report.py", pages, __doc__)
