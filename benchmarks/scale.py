"""The tables in docs/scale.md: the cost of a retrieval database at internet scale, computed by scale_costs.py.

python benchmarks/scale.py           rewrite the tables from benchmarks/results/*.json
python benchmarks/scale.py --check   exit with status 1 if the tables do not show the results
python benchmarks/scale.py -o benchmarks/results/scale.json [--keys FILE.npy]
                                     measure the figures that no other benchmark measures; see scale_measure.py

--keys: real keys to measure as well as hashed ones; python benchmarks/search_keys.py writes such a file.
"""

import argparse

import retro_np  # noqa: F401  imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import scale_costs as costs
from report import ROOT, milliseconds, results, table, write_sections
from turns import machine, save

from retro_np.retrieval.config import D_KEY, BuildConfig
from retro_np.retrieval.index import LINKS

HEAD = ["10⁹ tokens", "10¹² tokens", "1.75 × 10¹² tokens"]
SHARDS = (BuildConfig.shard_bytes, 10**9, 32 * 10**9)  # bytes of text
GRAPHS = (10**4, 10**5, 10**6, 10**7, 10**8)  # keys


def size(number):
    """Bytes as text, in powers of a thousand."""
    return scaled(number, ("bytes", "kB", "MB", "GB", "TB", "PB", "EB"), 1000)


def count(number):
    """A number as text, with three significant digits."""
    if number < 1e4:
        return f"{number:,.0f}"
    for name, unit in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= unit:
            return f"{digits(number / unit)} {name}"


def span(seconds):
    """A time as text, in its largest unit."""
    for name, unit in (("years", 365 * costs.DAY), ("days", costs.DAY), ("hours", 3600), ("s", 1)):
        if seconds >= unit:
            return f"{digits(seconds / unit)} {name}"
    return milliseconds(seconds)


def scaled(number, units, step):
    """A number in the largest unit in which it is at least 1."""
    for unit in units:
        if number < step or unit == units[-1]:
            return f"{digits(number)} {unit}"
        number /= step


def digits(number):
    """A number as text, with three significant digits or all digits before the decimal point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def at_sizes(chunk_bytes):
    """Table cells: bytes per chunk, and in total at each size."""
    return [f"{chunk_bytes:,.0f}", *(size(costs.chunks_of(tokens) * chunk_bytes) for tokens in costs.SIZES)]


def sizes():
    """The size of a database on disk."""
    width, hashed, links = costs.MINILM, D_KEY, costs.link_bytes()
    rows = {
        f"tokens.npy, {BuildConfig.vocabulary_size:,} words: 2 bytes per token": costs.token_bytes(),
        f"tokens.npy, {costs.PAPER_VOCABULARY:,} words: 4 bytes per token": costs.token_bytes(costs.PAPER_VOCABULARY),
        "documents.npy, and equal.npy if some keys are equal: 8 bytes each": costs.ID_BYTES,
        f"keys.npy, MiniLM, float32: 4 × {width}": costs.key_bytes(),
        f"keys.npy, MiniLM, float16: 2 × {width}": costs.key_bytes(dtype="float16"),
        f"keys.npy, hashing, float32: 4 × {hashed}": costs.key_bytes(hashed),
        "product-quantised keys: 48 bytes and an id": costs.code_bytes(48),
        f"index.hnsw, links: {links:.1f} measured, M = {LINKS}": links,
        f"index.hnsw, in total: 4 × {width} + links": costs.node_bytes(),
        f"neighbours: ({BuildConfig.neighbours} + {BuildConfig.extra_candidates}) × 12": costs.list_bytes(),
        "documents.jsonl, measured": costs.document_bytes(),
        "**database, MiniLM, float32**": costs.database_bytes(),
        "**database, MiniLM, float16**": costs.database_bytes(dtype="float16"),
        "**database, hashing, float32**": costs.database_bytes(hashed),
    }
    counts = [count(costs.chunks_of(tokens)) for tokens in costs.SIZES]
    sentence = f"The three sizes are {counts[0]}, {counts[1]} and {counts[2]} chunks."
    cells = [[name, *at_sizes(chunk_bytes)] for name, chunk_bytes in rows.items()]
    return f"{sentence}\n\n{table(['file', 'bytes per chunk', *HEAD], cells)}"


def paper():
    """The paper's figures, and what the same arithmetic gives for its setup."""
    rows = []
    for tokens, total in costs.PAPER_INDEX.items():
        rows.append([f"the paper, {count(tokens)} tokens", size(total), *per_chunk(total / costs.chunks_of(tokens))])
    for width, dtype, values in ((768, "float32", 1), (768, "float32", 2), (768, "float16", 2), (1024, "float16", 2),
                                 (1024, "float32", 2)):  # fmt: skip
        chunk_bytes = costs.paper_value_bytes(width, dtype, values)
        name = f"4 billion: {width} × {dtype}, {'N and F' if values == 2 else 'only N'}"
        rows.append([name, size(chunk_bytes * costs.chunks_of(4 * 10**9)), *per_chunk(chunk_bytes)])
    chunk_bytes, name = costs.database_bytes(), "4 billion: this project, MiniLM, float32, all files"
    rows.append([name, size(chunk_bytes * costs.chunks_of(4 * 10**9)), *per_chunk(chunk_bytes)])
    knn_lm, index = costs.PAPER_KNN_LM, costs.PAPER_INDEX[4 * 10**9]
    n_and_f, only_n = (64 * costs.knn_lm_bytes() / costs.paper_value_bytes(768, "float32", n) for n in (2, 1))
    tokens, documents = costs.paper_tokens()
    return "\n\n".join(
        [
            table(["index", "size", "bytes per chunk", "relative to 215 GB", "relative to 215 GiB"], rows),
            f"kNN-LM: 15 TB for 4 × 10⁹ tokens are {knn_lm / 4e9:,.0f} bytes per token (15 TiB: "
            f"{knn_lm * 1.024**4 / 4e9:,.0f}). A float32 key of the Wikitext model and a token take "
            f"4 × {costs.WIKITEXT_WIDTH} + 4 = {costs.knn_lm_bytes():,} bytes. The ratio of the paper's two sizes is "
            f"{knn_lm / index:.1f} ({1.024 * knn_lm / index:.1f} in binary units). The arithmetic gives {n_and_f:.1f} "
            f"if N and F are stored and {only_n:.1f} if only N is.",
            f"MassiveText's counts, with {costs.PAPER_BOOKS:.0%} of the books, add up to {tokens / 1e12:.2f} × 10¹² "
            f"tokens and {documents / 1e6:,.0f} million documents, {tokens / documents:,.0f} tokens per document.",
        ]
    )


def per_chunk(chunk_bytes):
    """Table cells: bytes per chunk, and their ratio to the paper's 215 GB or 215 GiB."""
    ratio = chunk_bytes / (costs.PAPER_INDEX[4 * 10**9] / costs.chunks_of(4 * 10**9))
    return [f"{chunk_bytes:,.0f}", f"{ratio:.1%}", f"{ratio / 1.024**3:.1%}"]


def stages():
    """The time that one worker needs for the stages whose cost is proportional to the number of tokens."""
    sources = {
        "reading": "build.json", "tokenising": "build.json", "near-duplicates": "deduplicate.json",
        "keys by hashing": "embed_hashing.json", "keys by MiniLM": "embed.json", "indexing": "search.json",
        "hashing of files": "scale.json",
    }  # fmt: skip
    rows = []
    for name, seconds in costs.stage_seconds().items():
        totals = [span(seconds * costs.chunks_of(tokens)) for tokens in costs.SIZES]
        rows.append([name, sources[name], f"{1 / seconds:,.0f}", *totals])
    keys = costs.keys_per_shard()
    return "\n\n".join(
        [
            table(["stage, time of one worker", "measured in", "chunks per second", *HEAD], rows),
            f"A chunk is {costs.text_bytes():.0f} bytes of build.json's text, which is Python code. The rate of "
            f"indexing is for {count(keys)} keys, a default shard of {BuildConfig.shard_bytes // 10**6} MB of text.",
        ]
    )


def graphs():
    """The time of a query in one graph by the graph's size, and its recall if it was measured."""
    recalls = {}
    for measured in results("search")["tables"]:
        settings = measured["approximate"]["hnswlib"]["settings"]
        nearest = min(settings, key=lambda row: abs(row["setting"] - costs.K - costs.EF_MARGIN))
        kind = "MiniLM" if "minilm" in measured["keys"] else "hashed bigrams"
        recalls[measured["size"]] = f"{nearest['recall']:.3f}, {kind}"
    rows = []
    for keys in GRAPHS:
        cells = size(keys * costs.node_memory()), milliseconds(costs.query_seconds(keys))
        rows.append([f"{keys:,}", *cells, recalls.get(keys, "not measured"), f"{1 / costs.insert_seconds(keys):,.0f}"])
    return table(["keys in a graph", "memory", "time per query, one core", "recall@2", "keys indexed per second"], rows)


def shards():
    """The number of shards, and the time and space that searching all of them takes."""
    rows = []
    for shard in SHARDS:
        keys = costs.keys_per_shard(shard)
        for tokens, name in zip(costs.SIZES, HEAD, strict=True):
            memory = size(min(keys, costs.chunks_of(tokens)) * costs.node_memory())
            times = costs.search_seconds(tokens, shard), costs.neighbours_seconds(tokens, shard)
            lists = size(costs.temporary_list_bytes(tokens, shard))
            rows.append([name, size(shard), count(costs.shards_of(tokens, shard)), memory, *map(span, times), lists])
    build = results("build")["builds"]["hashing"]
    measured = 1e3 * build["stages"]["neighbours"] / build["chunks"] / build["shards"]
    head = ["size", "text per shard", "shards", "memory per graph", "one query of all shards, one core"]
    head += ["all neighbours, one worker", "temporary lists"]
    return "\n\n".join(
        [
            table(head, rows),
            f"The time for all neighbours is scaled from build.json, where a chunk takes {measured:.2f} ms in a shard "
            f"of {count(build['retrievable'] / build['shards'])} keys. Those are hashed keys, for which the graph "
            "keeps more candidates than for MiniLM's keys. In the chunk's own shard, twice as many are fetched.",
        ]
    )


def workers():
    """The number of workers that build the database in a week, and in a day."""
    rows = []
    for shard in SHARDS:
        for keys in ("keys by hashing", "keys by MiniLM"):
            cells = []
            for tokens in costs.SIZES:
                seconds = costs.build_seconds(tokens, shard, keys)
                week, day = (count(max(1, -(-seconds // time))) for time in (costs.WEEK, costs.DAY))
                cells.append(f"{week} / {day}")
            rows.append([size(shard), keys.split()[-1], *cells])
    return table(["text per shard", "keys by", *(f"{name}: week / day" for name in HEAD)], rows)


def memory():
    """The memory that a search needs, and the number of machines that have it."""
    links = costs.node_memory() - costs.key_bytes()
    rows = {
        f"HNSW, float32 keys: 4 × {costs.MINILM} + {links:.0f}, measured": costs.node_memory(),
        f"HNSW, float16 keys: 2 × {costs.MINILM} + {links:.0f}, not offered by hnswlib": links
        + costs.key_bytes(dtype="float16"),
        f"HNSW, hashing: 4 × {D_KEY} + {links:.0f}": costs.node_memory(D_KEY),
    }
    rows |= {f"IVF-PQ, {code} + 8": costs.code_bytes(code) for code in (96, 48, 24)}
    cells = []
    for name, chunk_bytes in rows.items():
        machines = [f"{costs.machines_for(tokens, chunk_bytes):,}" for tokens in costs.SIZES]
        capacity = count(costs.tokens_in(costs.MACHINE_BYTES, chunk_bytes))
        cells.append([name, f"{chunk_bytes:,.0f}", capacity, *machines])
    head = [f"machines for {name}" for name in HEAD]
    return table(["index", "bytes per chunk", f"tokens in {size(costs.MACHINE_BYTES)}", *head], cells)


def quantised():
    """The recall of product-quantised keys and of float16 keys."""
    rows, float16 = [], []
    for measured in results("scale")["quantised"]:
        name = "MiniLM" if "minilm" in measured["keys"] else "hashed bigrams"
        float16.append(f"{measured['float16_recall']:.3f} for {name}")
        for row in measured["rows"]:
            *_, point, full = row["settings"]
            cells = [
                f"{measured['size']:,} {name}",
                f"{row['code_bytes']} bytes",
                f"{point['lists']} of {full['lists']}",
            ]
            cells += [f"{point['recall']:.3f}", f"{point['reranked']:.3f}", milliseconds(point["seconds"])]
            rows.append(cells)
    rate, times = 1e-6 / costs.scan_seconds(48), [costs.inverted_seconds(tokens, 48) for tokens in costs.SIZES]
    head = ["keys", "code", "lists searched", "recall@2", "recall@2, 100 best codes reranked", "time per query"]
    return "\n\n".join(
        [
            table(head, rows),
            f"Exact search with float16 keys has a recall of {' and '.join(float16)}, relative to float32. One core "
            f"scans {rate:.0f} million codes of 48 bytes per second. With 2²⁰ lists, 64 of them searched and chosen by "
            f"a graph of their centroids, a query takes {', '.join(map(milliseconds, times))} at the three sizes, on "
            "one core and without reranking.",
        ]
    )


LIMITS = {
    "files": (f"{costs.OPEN_FILES:,} open files per process, systemd's hard limit", "shards",
              "larger shards, or map a shard only when it is searched"),
    "lists": ("10 TB of temporary neighbour lists", "chunks", "store fewer candidates"),
    "search": ("10 ms for one query of all shards, on one core", "shards", "larger shards, or search them in parallel"),
    "memory": ("256 GB of memory for the graphs", "chunks", "distribute shards over machines, then IVF-PQ"),
    "opening": ("10 minutes of SHA-256 when a database is opened", "bytes",
                "trust sizes and times when opening, and hash in `retro-np verify` or when a shard is first searched"),
    "reading": ("one day of reading, in one process", "bytes of text", "read sources in parallel"),
    "tasks": ("one day of Dask's scheduling", "shards squared", "one task per shard, with many queries"),
    "mappings": (f"{costs.MAPPINGS:,} memory mappings per process", "shards", "as for open files"),
    "numbers": ("16 GB of document numbers, read by `Database.fraction` and `Database.without`", "chunks",
                "process one shard at a time"),
    "offsets": ("16 GB of offsets in documents.jsonl, 8 bytes each", "documents",
                "an offset for every hundredth line, or a memory-mapped file of offsets"),
}  # fmt: skip


def limits():
    """The limits of this project, in the order in which a growing database meets them."""
    limits = sorted(costs.limits().items(), key=lambda item: item[1])
    rows = [[count(tokens), *LIMITS[name]] for name, tokens in limits]
    entry, shards = results("scale")["database"]["manifest_bytes"], costs.shards_of(costs.SIZES[-1])
    files = shards * costs.FILES_PER_SHARD
    return "\n\n".join(
        [
            table(["tokens", "limit", "grows with", "remedy"], rows),
            f"At {HEAD[-1]}, {count(shards)} training shards would have {count(files)} files. The manifest, with "
            f"{entry:.0f} bytes per file, would be {size(files * entry)} of JSON, read and hashed whenever the "
            "database is opened.",
        ]
    )


SECTIONS = {
    "sizes": sizes, "paper": paper, "stages": stages, "graphs": graphs, "shards": shards, "workers": workers,
    "memory": memory, "quantised": quantised, "limits": limits,
}  # fmt: skip


def main():
    """Rewrite or check the page, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-o", "--out", help="measure, and write the figures to this JSON file")
    parser.add_argument("--keys", help="real keys for product quantisation: .npy, (N, d) float32")
    parser.add_argument("--count", type=int, default=100_000, help="number of keys for product quantisation")
    options = parser.parse_args()
    if options.out:
        from scale_measure import measured

        save(options.out, measured(options.count, options.keys) | {"machine": machine()})
    else:
        sections = {name: section() for name, section in SECTIONS.items()}
        write_sections(ROOT / "docs" / "scale.md", "scale.py", sections, options.check)


if __name__ == "__main__":
    main()
