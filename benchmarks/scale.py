"""The tables of docs/scale.md: what a retrieval database costs at internet scale, by the arithmetic of scale_costs.py.

python benchmarks/scale.py           rewrite the tables, from benchmarks/results/*.json
python benchmarks/scale.py --check   exit with 1 where the tables are not what the results say
python benchmarks/scale.py -o benchmarks/results/scale.json [--keys FILE.npy]
                                     measure what no other benchmark does: see scale_measure.py

--keys: real keys beside the hashed ones, as python benchmarks/search_keys.py writes them.
"""

import argparse

import retro_np  # noqa: F401  first, so that BLAS threads sleep as they do in the commands

# isort: split
import scale_costs as costs
from report import ROOT, milliseconds, results, settle, table
from turns import machine, save

from retro_np.retrieval.build import BuildConfig
from retro_np.retrieval.index import LINKS

HEAD = ["10⁹ tokens", "10¹² tokens", "1.75 × 10¹² tokens"]
SHARDS = (BuildConfig.shard_bytes, 10**9, 32 * 10**9)  # bytes of text
GRAPHS = (10**4, 10**5, 10**6, 10**7, 10**8)  # keys


def size(number):
    """Bytes as text, in powers of a thousand."""
    return scaled(number, ("bytes", "kB", "MB", "GB", "TB", "PB", "EB"), 1000)


def count(number):
    """A number as text, with three digits."""
    if number < 1e4:
        return f"{number:,.0f}"
    for name, unit in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= unit:
            return f"{digits(number / unit)} {name}"


def span(seconds):
    """Seconds as text."""
    for name, unit in (("years", 365 * costs.DAY), ("days", costs.DAY), ("hours", 3600), ("s", 1)):
        if seconds >= unit:
            return f"{digits(seconds / unit)} {name}"
    return milliseconds(seconds)


def scaled(number, units, step):
    """A number in the largest unit that leaves it at one or more."""
    place = 0
    while number >= step and place < len(units) - 1:
        number, place = number / step, place + 1
    return f"{digits(number)} {units[place]}"


def digits(number):
    """As text, with three digits or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def at_sizes(bytes_a_chunk):
    """Bytes of a chunk, and of all chunks at each size."""
    return [f"{bytes_a_chunk:,.0f}", *(size(costs.chunks_of(tokens) * bytes_a_chunk) for tokens in costs.SIZES)]


def sizes():
    """What lies on the disk."""
    width, hashed, links = costs.MINILM, BuildConfig.d_key, costs.link_bytes()
    rows = {
        f"tokens.npy, {BuildConfig.vocabulary_size:,} words: 2 bytes a token": costs.token_bytes(),
        f"tokens.npy, {costs.PAPER_VOCABULARY:,} words: 4 bytes a token": costs.token_bytes(costs.PAPER_VOCABULARY),
        "documents.npy, and equal.npy where keys are equal: 8 bytes each": costs.NUMBER,
        f"keys.npy, MiniLM, float32: 4 × {width}": costs.key_bytes(),
        f"keys.npy, MiniLM, float16: 2 × {width}": costs.key_bytes(dtype="float16"),
        f"keys.npy, hashing, float32: 4 × {hashed}": costs.key_bytes(hashed),
        "product-quantised in 48 bytes, and an id": costs.code_bytes(48),
        f"index.hnsw, the links: {links:.1f} measured, M = {LINKS}": links,
        f"index.hnsw, whole: 4 × {width} + links": costs.node_bytes(),
        f"neighbours: ({BuildConfig.neighbours} + {BuildConfig.extra_candidates}) × 12": costs.list_bytes(),
        "documents.jsonl: its bytes over all chunks, measured": costs.document_bytes(),
        "**a database, MiniLM, float32**": costs.database_bytes(),
        "**a database, MiniLM, float16**": costs.database_bytes(dtype="float16"),
        "**a database, hashing, float32**": costs.database_bytes(hashed),
    }
    counted = ", ".join(f"{count(costs.chunks_of(tokens))}" for tokens in costs.SIZES)
    return "\n\n".join(
        [
            f"The three sizes are {counted} chunks.",
            table(["what", "bytes a chunk", *HEAD], [[name, *at_sizes(each)] for name, each in rows.items()]),
        ]
    )


def paper():
    """The paper's figures, and ours for its set-up."""
    rows = []
    for tokens, known in costs.PAPER_INDEX.items():
        rows.append([f"the paper, of {count(tokens)} tokens", size(known), *per_chunk(known / costs.chunks_of(tokens))])
    for width, dtype, values in ((768, "float32", 1), (768, "float32", 2), (768, "float16", 2), (1024, "float16", 2),
                                 (1024, "float32", 2)):  # fmt: skip
        each = costs.paper_value_bytes(width, dtype, values)
        name = f"4 billion: {width} × {dtype}, {'N and F' if values == 2 else 'N alone'}"
        rows.append([name, size(each * costs.chunks_of(4 * 10**9)), *per_chunk(each)])
    ours = costs.database_bytes()
    rows.append(
        [
            "4 billion: this project, MiniLM, float32, all files",
            size(ours * costs.chunks_of(4 * 10**9)),
            *per_chunk(ours),
        ]
    )
    knn_lm, index = costs.PAPER_KNN_LM, costs.PAPER_INDEX[4 * 10**9]
    both, alone = (64 * costs.knn_lm_bytes() / costs.paper_value_bytes(768, "float32", n) for n in (2, 1))
    tokens, documents = costs.paper_tokens()
    return "\n\n".join(
        [
            table(["index", "bytes", "bytes a chunk", "against 215 GB", "against 215 GiB"], rows),
            f"kNN-LM: 15 TB over 4 × 10⁹ tokens are {knn_lm / 4e9:,.0f} bytes a token (15 TiB: "
            f"{knn_lm * 1.024**4 / 4e9:,.0f}), and 4 × {costs.WIKITEXT_WIDTH} + 4, a float32 key of the Wikitext model "
            f"and a token, are {costs.knn_lm_bytes():,}. The quotient of the paper's two sizes is {knn_lm / index:.1f} "
            f"(or {1.024 * knn_lm / index:.1f} in binary units); the arithmetic gives {both:.1f} with N and F, "
            f"{alone:.1f} with N alone.",
            f"MassiveText's counts with {costs.PAPER_BOOKS:.0%} of the books add up to {tokens / 1e12:.2f} × 10¹² "
            f"tokens and {documents / 1e6:,.0f} million documents, {tokens / documents:,.0f} tokens a document.",
        ]
    )


def per_chunk(each):
    """Bytes of a chunk, and how they compare with the paper's of 4 billion tokens in either unit."""
    known = costs.PAPER_INDEX[4 * 10**9] / costs.chunks_of(4 * 10**9)
    return [f"{each:,.0f}", f"{each / known:.1%}", f"{each / known / 1.024**3:.1%}"]


def stages():
    """Days of a worker for what grows with the tokens alone, and how many workers do it in a week."""
    sources = {
        "reading": "build.json", "tokenising": "build.json", "near-duplicates": "deduplicate.json",
        "keys by hashing": "embed_hashing.json", "keys by MiniLM": "embed.json", "indexing": "search.json",
        "hashing of files": "scale.json",
    }  # fmt: skip
    rows = []
    for name, seconds in costs.stage_seconds().items():
        totals = [span(seconds * costs.chunks_of(tokens)) for tokens in costs.SIZES]
        rows.append([name, sources[name], f"{1 / seconds:,.0f}", *totals])
    keys = costs.keys_a_shard()
    return "\n\n".join(
        [
            table(["a worker's time", "measured in", "chunks a second", *HEAD], rows),
            f"A chunk is {costs.text_bytes():.0f} bytes of the text of build.json, Python. Indexing is of "
            f"{count(keys)} keys, the default shard of {BuildConfig.shard_bytes // 10**6} MB of text.",
        ]
    )


def graphs():
    """A query of one graph by its size, with its recall where it was measured."""
    recalls = {}
    for each in results("search")["tables"]:
        settings = each["approximate"]["hnswlib"]["settings"]
        near = min(settings, key=lambda at: abs(at["setting"] - costs.K - costs.EF_MARGIN))
        kind = "MiniLM's" if "minilm" in each["keys"] else "hashed bigrams"
        recalls[each["size"]] = f"{near['recall']:.3f}, {kind}"
    rows = []
    for keys in GRAPHS:
        graph = size(keys * costs.node_memory())
        known = recalls.get(keys, "not measured")
        asked, inserted = milliseconds(costs.query_seconds(keys)), f"{1 / costs.insert_seconds(keys):,.0f}"
        rows.append([f"{keys:,}", graph, asked, known, inserted])
    return table(["keys of a graph", "in memory", "a query, one core", "recall@2", "keys indexed a second"], rows)


def shards():
    """How many shards, and what asking all of them takes."""
    rows = []
    for shard in SHARDS:
        keys = costs.keys_a_shard(shard)
        for tokens, name in zip(costs.SIZES, HEAD, strict=True):
            few = costs.shards_of(tokens, shard)
            asked = span(costs.search_seconds(tokens, shard))
            memory = size(min(keys, costs.chunks_of(tokens)) * costs.node_memory())
            build = [span(costs.neighbours_seconds(tokens, shard)), size(costs.partial_list_bytes(tokens, shard))]
            rows.append([name, size(shard), count(few), memory, asked, *build])
    found = results("build")["builds"]["hashing"]
    each = 1e3 * found["stages"]["neighbours"] / found["chunks"] / found["shards"]
    head = [
        "size",
        "text a shard",
        "shards",
        "a graph",
        "a query of all, one core",
        "a worker's time for all neighbours",
    ]
    return "\n\n".join(
        [
            table([*head, "lists before merging"], rows),
            f"The neighbours' time is scaled from build.json, where a chunk takes {each:.2f} ms in a shard of "
            f"{count(found['retrievable'] / found['shards'])} keys: hashed ones, for which the graph keeps more "
            "candidates than for MiniLM's, and of the chunk's own shard, where twice as many are fetched.",
        ]
    )


def workers():
    """How many workers build it in a week and in a day."""
    rows = []
    for shard in SHARDS:
        for keys in ("keys by hashing", "keys by MiniLM"):
            found = []
            for tokens in costs.SIZES:
                seconds = costs.build_seconds(tokens, shard, keys)
                week, day = (count(max(1, -(-seconds // time))) for time in (costs.WEEK, costs.DAY))
                found.append(f"{week} / {day}")
            rows.append([size(shard), keys.split()[-1], *found])
    return table(["text a shard", "keys by", *(f"{name}: week / day" for name in HEAD)], rows)


def memory():
    """What must be in memory for a search, and how many machines hold it."""
    links = costs.node_memory() - costs.key_bytes()
    rows = {
        f"HNSW, float32 keys: 4 × {costs.MINILM} + {links:.0f}, measured": costs.node_memory(),
        f"HNSW, float16 keys: 2 × {costs.MINILM} + {links:.0f}, which hnswlib doesn't offer": links
        + costs.key_bytes(dtype="float16"),
        f"HNSW, hashing: 4 × {BuildConfig.d_key} + {links:.0f}": costs.node_memory(BuildConfig.d_key),
        "IVF-PQ, 96 + 8": costs.code_bytes(96),
        "IVF-PQ, 48 + 8": costs.code_bytes(48),
        "IVF-PQ, 24 + 8": costs.code_bytes(24),
    }
    found = []
    for name, each in rows.items():
        machines = [f"{costs.machines_for(tokens, each):,}" for tokens in costs.SIZES]
        found.append([name, f"{each:,.0f}", count(costs.tokens_in(costs.MACHINE, each)), *machines])
    return table(["in memory", "bytes a chunk", f"tokens in {size(costs.MACHINE)}", *HEAD], found)


def quantised():
    """Recall of product-quantised keys, and of float16."""
    rows, halved = [], []
    for found in results("scale")["quantised"]:
        name = "MiniLM" if "minilm" in found["keys"] else "hashed bigrams"
        halved.append(f"{found['float16_recall']:.3f} with {name}")
        for row in found["rows"]:
            for at in row["settings"][-2:-1]:
                rows.append(
                    [
                        f"{found['size']:,} {name}",
                        f"{row['code_bytes']} bytes",
                        f"{at['lists']} of {found['rows'][0]['settings'][-1]['lists']}",
                        f"{at['recall']:.3f}",
                        f"{at['reranked']:.3f}",
                        milliseconds(at["seconds"]),
                    ]
                )
    rate, times = 1e-6 / costs.scanned_seconds(48), [costs.inverted_seconds(tokens, 48) for tokens in costs.SIZES]
    return "\n\n".join(
        [
            table(["keys", "code", "lists", "recall@2", "of the 100 best, measured exactly", "a query"], rows),
            f"Keys in float16, searched exactly, find {' and '.join(halved)} of what float32 finds. A core looks "
            f"through {rate:.0f} million codes of 48 bytes a second. With 2²⁰ lists, of which 64 are looked through, "
            f"found by a graph of their centroids, a query then takes {', '.join(map(milliseconds, times))} at the "
            "three sizes, on one core and without the exact keys.",
        ]
    )


BREAKS = {
    "files": (f"open files, {costs.OPEN_FILES:,} a process", "shards; each mapped file stays open",
              "`ulimit -n`; larger shards; map a shard when it is asked"),
    "lists": ("10 TB for lists before they are merged", "chunks × shards, tokens squared",
              "merge each list into the one before: two lists a chunk, whatever the shards"),
    "search": ("10 ms for a query of every shard on one core", "shards", "larger shards; shards side by side"),
    "memory": ("256 GB for the graphs that a search loads", "chunks", "shards over machines; then IVF-PQ"),
    "opening": ("ten minutes of SHA-256 when a database is opened", "bytes",
                "trust sizes and times at opening, hash in `retro-np verify`; hash a shard when it is first asked"),
    "reading": ("a day of reading, in one process", "bytes of text", "sources that are read side by side"),
    "tasks": ("a day of Dask's scheduling", "shards squared", "one task a shard and many queries"),
    "mappings": (f"{costs.MAPPINGS:,} mappings a process", "shards", "as with open files"),
    "numbers": ("16 GB for documents' numbers, read whole by `Database.fraction` and `without`", "chunks",
                "a shard at a time"),
    "names": ("five digits of a shard's name, which are sorted as text", "shards",
              "more digits, or sort by number; beyond it ids would be wrong"),
    "offsets": ("16 GB for documents' offsets, 8 bytes each", "documents",
                "an offset for every hundredth line, or a file of offsets that is mapped"),
}  # fmt: skip


def limits():
    """What breaks first, in its order."""
    reached = sorted(costs.limits().items(), key=lambda each: each[1])
    rows = [[count(tokens), BREAKS[name][0], BREAKS[name][1], BREAKS[name][2]] for name, tokens in reached]
    found, shards = results("scale")["database"], costs.shards_of(costs.SIZES[-1])
    files = shards * costs.TRAINING_SHARD
    return "\n\n".join(
        [
            table(["at tokens", "what runs out", "grows with", "what one would do"], rows),
            f"At {HEAD[-1]} {count(shards)} shards would be {count(files)} files, without the held-out ones, and "
            f"the manifest, of {found['manifest_bytes']:.0f} bytes a file, {size(files * found['manifest_bytes'])} of "
            "JSON, read and hashed whenever the database is opened.",
        ]
    )


SECTIONS = {
    "sizes": sizes, "paper": paper, "stages": stages, "graphs": graphs, "shards": shards, "workers": workers,
    "memory": memory, "quantised": quantised, "limits": limits,
}  # fmt: skip


def main():
    """Rewrite, check or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-o", "--out", help="measure, and write the figures as JSON")
    parser.add_argument("--keys", help="real keys for product quantisation, .npy (N, d) float32")
    parser.add_argument("--count", type=int, default=100_000, help="keys of product quantisation")
    options = parser.parse_args()
    if options.out:
        from scale_measure import measured

        save(options.out, measured(options.count, options.keys) | {"machine": machine()})
    else:
        settle(ROOT / "docs" / "scale.md", "scale.py", {name: made() for name, made in SECTIONS.items()}, options.check)


if __name__ == "__main__":
    main()
