# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · From here to 1.75 trillion tokens
#
# The database of [tutorial 1](01_chunks_neighbours_and_a_database.ipynb) had a few hundred tokens. The paper's has
# $1.75 \cdot 10^{12}$. What happens on the way? Nothing changes in the idea. But at almost every factor of ten,
# something that was free becomes a problem: the time to make keys, the time of a search, memory, the disk. You cannot
# run such a database, and neither can we. But you can measure a small one, count, and extrapolate, and say at each step
# which of the three you did.
#
# *Reading: about 40 minutes · runs in 10 s on one core · needs tutorial 1 and BERT's weights.*
#
# Afterwards you can
#
# - say what a chunk weighs, part by part, and check it against files to the byte;
# - measure a search at three sizes and extrapolate it: as a line for exact search, as a logarithm for a graph;
# - say at which size a laptop ends, and by which of its limits;
# - explain what shards solve and what they make quadratic, and what compressed keys cost;
# - say what the paper did at each of these places.
#
# The project's own accounting is [docs/scale.md](../docs/scale.md). Its rates were measured with real keys at larger
# sizes, and its arithmetic is in `benchmarks/scale_costs.py`, a line or two for each figure.
#
# Previous: [tutorial 11, one kernel, three ways](11_one_kernel_three_ways.ipynb). Next: [tutorial 13, a memory for a
# language model](13_a_memory_for_a_language_model.ipynb).

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

import itertools
import math
import shutil
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import load_bert
from retro_np.kernels import threads
from retro_np.kernels.search import exact_search, listed_distances, merge_lists
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.corpus import STDLIB
from retro_np.retrieval.index import EF_MARGIN, ExactIndex, build_hnsw
from retro_np.tutorials.checks.tutorial_12 import check_12_1, check_12_2, check_12_3

NEIGHBOUR = np.dtype([("id", np.int64), ("distance", np.float32)])  # an entry of a list of neighbours
BLUE, ORANGE, GREY = "#2b7bba", "#e07b1f", "#8c8c8c"
threads.use_threads(1)  # All times that are measured below are those of one core.

# %% [markdown]
# ## What a chunk weighs
#
# We begin with something that exists: a small database of Python's standard library. Chunks have 64 tokens. Keys are
# made of hashed words, not by BERT, and have 128 columns. For each chunk the database stores 10 neighbours and 22 spare
# ones, in case some come from the chunk's own document. Let us weigh the files.

# %%
config = BuildConfig(limit_bytes=60_000, held_out=0.0, duplicates=None, vocabulary_size=1024)
temporary = tempfile.TemporaryDirectory()  # It is deleted when the notebook ends.
database = build_database(STDLIB, Path(temporary.name) / "db", config, "hashing")
m, n_chunks = database.chunk_size, database.n_chunks
shard, lists = database.path / "shards" / "00000", database.path / "neighbours" / "train" / "00000"
stored = {"tokens": shard / "tokens.npy", "document's number": shard / "documents.npy", "key": shard / "keys.npy"}
stored |= {"neighbours: ids": lists / "ids.npy", "neighbours: distances": lists / "distances.npy"}
weights = {name: np.load(path, mmap_mode="r").nbytes / n_chunks for name, path in stored.items()}
for name, weight in weights.items():
    print(f"{name:22} {weight:4.0f} bytes a chunk")
in_graph = (shard / "index.hnsw").stat().st_size / n_chunks
print(f"{'graph':22} {in_graph:4.0f} bytes a chunk; {weights['key']:.0f} of them are the key, once more")
assert weights["tokens"] == 2 * m
assert weights["key"] == 4 * database.d_key
assert weights["neighbours: ids"] + weights["neighbours: distances"] == 32 * NEIGHBOUR.itemsize
assert 140 < in_graph - weights["key"] < 170

# %% [markdown]
# Each of these but the graph is a count times a width. The **128 bytes** are 64 tokens of two bytes; a vocabulary of
# more than 65,536 words needs four. The **512 bytes** of the key are 128 columns of four bytes.
#
# Where is the value $[N, F]$? Nowhere in particular. $N$ is the chunk itself, and $F$ is the next chunk of the same
# document, which is stored anyway. A value is looked up as two chunks that follow each other, so the tokens are stored
# once.
#
# The graph makes the search fast. It links each key to some keys nearby, which takes about 150 bytes, and it contains
# each key a second time, because hnswlib, the library that makes the graph, computes distances with its own copy.
#
# Those were small keys. BERT's are wider. MiniLM, the small BERT of [tutorial 2](02_a_frozen_bert.ipynb), makes keys of
# 384 columns, and then key and graph outweigh everything else:

# %%
MINILM, LINKS = 384, 150
parts = {
    "tokens": 2 * m,
    "keys, float32": 4 * MINILM,
    "graph": 4 * MINILM + LINKS,
    "lists of neighbours": 32 * NEIGHBOUR.itemsize,
    "document's number": 8,
}
whole = sum(parts.values())
for name, weight in parts.items():
    print(f"{name:20} {weight:5,} bytes a chunk, {100 * weight / whole:3.0f} %")
print(f"{'in all':20} {whole:5,} bytes a chunk, {whole / m:.0f} bytes a token; a token itself is 2")

# %% [markdown]
# That is **58 bytes** for each token, of which two are the token. How does the paper's index compare? It reports two
# sizes, and also one for kNN-LM, which keeps a key for every *token* ([tutorial 10](10_retrofit_and_knn_lm.ipynb)).

# %%
paper = {
    "4 billion tokens": (215e9, 4e9),
    "1.75 trillion tokens": (93e12, 1.75e12),
}  # bytes and tokens; the paper, §4.1
for name, (size, tokens) in paper.items():
    print(f"RETRO's index of {name}: {size / (tokens / 64):,.0f} bytes a chunk")
knn_lm = 15e12 / 4e9
print(f"kNN-LM's, of 4 billion tokens: {knn_lm:,.0f} bytes a token, {knn_lm * 4e9 / 215e9:.1f} times RETRO's")

# %% [markdown]
# The two figures of RETRO, **3,440 bytes** and **3,401 bytes**, agree within their rounding. So the index grows in
# proportion to the tokens. kNN-LM's, with a key for each token, is **69.8 times** as large. It is the chunk that makes
# trillions of tokens thinkable.
#
# ## Where a laptop ends: bytes
#
# Now extrapolate. On logarithmic axes everything that grows in proportion to the tokens is a line of slope one, and a
# different weight per token only moves the line up or down. The horizontal lines are a laptop's 16 GB of memory and a
# disk of 1 TB.

# %%
MEMORY, DISK = 16e9, 1e12


def said(number):
    """A large number in words, to three digits."""
    power = min(4, int(math.log10(number)) // 3)
    return f"{number / 1000**power:.3g} " + ["", "thousand", "million", "billion", "trillion"][power]


sizes = np.geomspace(1e4, 1e13, 10)
lines = {
    "tokens": (parts["tokens"] / m, GREY, "-"),
    "keys, float32": (parts["keys, float32"] / m, BLUE, "--"),
    "all of it": (whole / m, BLUE, "-"),
    "kNN-LM (the paper's)": (knn_lm, ORANGE, "-"),
}
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name, (bytes_a_token, colour, style) in lines.items():
    axis.plot(sizes, bytes_a_token * sizes, style, color=colour, label=name)
    fills = [f"{said(limit / bytes_a_token):>13}" for limit in (MEMORY, DISK)]
    print(f"{name:20}: memory is full at {fills[0]}, the disk at {fills[1]} tokens")
for name, limit in (("16 GB of memory", MEMORY), ("1 TB of disk", DISK)):
    axis.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    axis.text(1.2e4, limit * 1.4, name, fontsize=8)
axis.plot([4e9, 1.75e12], [215e9, 93e12], "D", color="black", markersize=5, label="the paper's index")
axis.set(xscale="log", yscale="log", xlabel="tokens in the database", ylabel="bytes")
axis.set(title="Bytes, by arithmetic", xlim=(1e4, 1e13))
axis.legend(frameon=False, fontsize=8)
plt.show()
print(f"This machine's disk has {shutil.disk_usage(database.path).total / 1e12:.2f} TB.")

# %% [markdown]
# *Figure 12.1.* It is the keys that end a laptop, not the text. The paper's two points lie close to our line for *all
# of it*.
#
# Keys fill the memory at **667 million** tokens. A graph is walked at random, so it must be in memory, and one
# machine's index ends about there. All files together fill the disk at **17.1 billion** tokens. Of the tokens *alone*,
# the same disk could hold half a trillion.
#
# ## Where a laptop ends: the time of a search
#
# Exact search compares a query with every key. A *navigable small world* ([Malkov & Yashunin
# 2018](https://arxiv.org/abs/1603.09320)) is a graph, and its search walks through the graph towards the query. On its
# way it looks at a few hundred keys, and for each factor of ten in size at some more.
#
# We measure both, with made-up keys. Their 64 columns are mixed from 16 random numbers and some noise, since the
# columns of a text's key depend on one another, too. Each query is asked alone. Only the time of the process counts,
# the searches take turns ([tutorial 11](11_one_kernel_three_ways.ipynb)), and we keep the best of five rounds. A graph
# may miss a neighbour. Its *recall* is the share of the true two nearest keys that it finds. It rises with the
# *margin*, the number of candidates that a search keeps beyond the two.

# %%
rng = np.random.default_rng(0)
mixing = rng.standard_normal((16, 64)).astype(np.float32)
some_keys = (rng.standard_normal((9100, 16)) @ mixing + 0.5 * rng.standard_normal((9100, 64))).astype(np.float32)
queries, k, MARGIN = some_keys[:100], 2, 16
SIZES = (1000, 3000, 9000)


def seconds_a_query(search, k):
    """The process's time for one query."""
    began = time.process_time()
    for query in queries:
        search(query[None], k)
    return (time.process_time() - began) / len(queries)


def recall(found):
    """The share of the true k nearest that were found."""
    return np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)])


graphs, building, recalls = {}, {}, {}
for size in SIZES:
    keys = some_keys[100 : 100 + size]
    began = time.process_time()
    graphs[size] = build_hnsw(keys)
    building[size] = (time.process_time() - began) / size
    truth, _ = exact_search(queries, keys, k)
    for margin in (0, MARGIN):
        graphs[size].ef_margin = margin  # candidates that a search keeps beyond the k that are asked for
        recalls[margin, size] = recall(graphs[size].search_graph(queries, k)[0])
assert recalls[MARGIN, 9000] > 0.8
assert recalls[0, 9000] < recalls[0, 1000] - 0.05

# %%
searches = {
    "exact": {size: ExactIndex(some_keys[100 : 100 + size]).search for size in SIZES},
    "graph": {size: graphs[size].search_graph for size in SIZES},
}
rounds = [{n: {s: seconds_a_query(f, k) for s, f in of.items()} for n, of in searches.items()} for _ in range(5)]
measured = {name: {size: min(each[name][size] for each in rounds) for size in SIZES} for name in searches}
print("            ms a query        ms a key           recall@2")
print("   keys   exact    graph      to build    with a margin, without")
for size in SIZES:
    exact, graph = (1e3 * measured[name][size] for name in ("exact", "graph"))
    print(f"{size:7,} {exact:7.2f} {graph:8.2f} {1e3 * building[size]:13.2f} ", end="")
    print(f"{recalls[MARGIN, size]:16.2f} {recalls[0, size]:8.2f}")

# %% [markdown]
# From here we extrapolate, with two functions of two constants each: $a + b \cdot \text{keys}$ for exact search, and
# $a + b \cdot \log(\text{keys})$ for the graph. We measured one factor of nine and extrapolate over six factors of ten.
# The figure shows what is known and what is not. Its grey part is extrapolation. Its diamonds are other measurements,
# with real keys of 384 columns, up to a million of them. Those of the graph come from
# [docs/scale.md](../docs/scale.md), those of exact search, on two cores, from
# [docs/performance.md](../docs/performance.md). No line was fitted to them.

# %%
GRAPH_OF_DOCS = {1e4: 0.16e-3, 1e5: 0.27e-3, 1e6: 0.36e-3}  # seconds a query, one core; source: docs/scale.md
EXACT_OF_DOCS = {1e4: 0.94e-3, 1e5: 5.51e-3, 1e6: 33e-3}  # exact search, two cores; source: docs/performance.md
x = np.array(sorted(measured["exact"]))
exact_line = np.polyfit(x, [measured["exact"][size] for size in x], 1)
graph_line = np.polyfit(np.log(x), [measured["graph"][size] for size in x], 1)
chunks = np.geomspace(x[0], 2.7e10, 60)
shard_keys = 1e5
in_shards = np.maximum(1, chunks / shard_keys) * np.polyval(graph_line, np.log(np.minimum(chunks, shard_keys)))
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.axvspan(1e6 * m, 1e13, color="#f0f0f0")
axis.text(8e12, 2e5, "extrapolated:\nnothing was measured here", fontsize=8, ha="right", va="center")
axis.plot(chunks * m, np.polyval(exact_line, chunks), "--", color=GREY, label="exact")
axis.plot(chunks * m, np.polyval(graph_line, np.log(chunks)), "--", color=BLUE, label="one graph")
axis.plot(chunks * m, in_shards, ":", color=ORANGE, label="graphs of 100,000 keys, one after the other")
for (name, colour), of_docs in zip((("exact", GREY), ("graph", BLUE)), (EXACT_OF_DOCS, GRAPH_OF_DOCS), strict=True):
    axis.plot(x * m, [measured[name][size] for size in x], "o", color=colour, markersize=6)
    axis.plot(np.array(list(of_docs)) * m, list(of_docs.values()), "D", color=colour, markersize=5, fillstyle="none")
axis.plot([], [], "ko", markersize=6, label="measured here, 64 columns")
elsewhere = "measured elsewhere, 384 columns; exact search on two cores"
axis.plot([], [], "kD", markersize=5, fillstyle="none", label=elsewhere)
for name, limit in (("10 ms: the paper's, a chunk", 1e-2), ("a minute", 60)):
    axis.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    axis.text(8e12, limit * 1.3, name, fontsize=8, ha="right")
axis.set(xscale="log", yscale="log", xlabel="tokens in the database", ylabel="seconds a query")
axis.set(xlim=(3e4, 1e13), ylim=(1e-5, 1e6), title="The time of one query")
axis.legend(fontsize=8, loc="upper left", frameon=False)
plt.show()
minutes = np.polyval(exact_line, 1.75e12 / m) / 60
print(f"exact search of 1.75e12 tokens, extrapolated: some {10 ** round(math.log10(minutes)):.0f} minutes a query")

# %% [markdown]
# *Figure 12.2.* The time of exact search grows with the database, and that of a graph with its logarithm. Many small
# graphs, one after the other, are linear again. Trust the slopes, not the digits.
#
# The diamonds lie above our lines: their keys are wider, and their machine was another. Those of exact search rise
# nearly as steeply as our line. Those of the graph rise more than our line, which is nearly flat, but far less than
# those of exact search. More cannot be asked of an extrapolation from nine thousand keys.
#
# The blue line hides something. With a fixed number of candidates, recall can fall as the keys get more crowded; the
# last column of the table shows it. More candidates repair that, and take more time. [docs/scale.md](../docs/scale.md)
# reports recall and time together.
#
# The paper's answer is the line at 10 ms. It uses an approximate index whose search costs $O(\log T)$ for $T$ tokens,
# and asks once for each *chunk*, so that 64 tokens share the time (§2.3). Its library is ScaNN ([Guo et al.
# 2020](https://arxiv.org/abs/1908.10396)). Ours is hnswlib, behind a method `search(queries, k)` that returns ids and
# distances.
#
# ## Shards, and what they make quadratic
#
# A graph that is larger than memory must be cut into **shards**, with one graph each. Every shard is asked for its $k$
# nearest keys, and the best $k$ of all the answers are kept. Nothing is lost: a key that is among the $k$ nearest of
# all keys is certainly among the $k$ nearest of its own shard.

# %%
keys, cuts = some_keys[100:], [0, 2000, 5000, 9000]
found = []
for start, stop in itertools.pairwise(cuts):
    ids, distances = exact_search(queries, keys[start:stop], k)
    found.append((ids + start, distances))
merged, _ = merge_lists(found, k)
assert np.array_equal(merged, exact_search(queries, keys, k)[0])
print(f"{len(cuts) - 1} shards of {np.diff(cuts).tolist()} keys give what one search of {len(keys):,} keys gives")

# %% [markdown]
# But now each query pays for each shard. And training needs the neighbours of *every* chunk in advance. They can be
# computed in advance because BERT is frozen: keys never change, and so neighbours never change. Every chunk asks every
# shard. The number of chunks and the number of shards are both proportional to the tokens, so the work is proportional
# to their square.
#
# To turn the count into time, we need the time of one question from one chunk to one shard. Our measurement above was
# friendly: two neighbours, narrow keys. What does a real build ask? It asks for 32 neighbours, ten and the spares. Its
# margin is 64 candidates for BERT's keys and ten times as many for keys of hashed words. The project measured a
# build with hashed words on a machine with two cores. In a shard of the default size, this makes 0.328 ms for each
# chunk. First see what 32 neighbours and the smaller of these margins do to our own time:

# %%
BUILD_SECONDS = 0.328e-3  # one chunk asks one default shard, two cores; source: benchmarks/scale_costs.py
wanted = config.neighbours + config.extra_candidates
graph = graphs[SIZES[-1]]
graph.ef_margin = EF_MARGIN
as_in_build = min(seconds_a_query(graph.search_graph, wanted) for _ in range(5))
graph.ef_margin = MARGIN
factor = as_in_build / measured["graph"][SIZES[-1]]
print(
    f"{wanted} neighbours with a margin of {EF_MARGIN} take {factor:.0f} times as long as {k} with a margin of {MARGIN}"
)
print(f"a build's question: {1e3 * BUILD_SECONDS:.3f} ms, keys of {database.d_key} columns")
assert 1.5 < factor < 8


# %%
def lasting(seconds):
    """A time in the unit that suits it, to two digits."""
    units = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "s": 1}
    unit = next((unit for unit, size in units.items() if seconds >= 2 * size), "s")
    number = float(f"{seconds / units[unit]:.2g}")
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


text_a_chunk = sum(record["bytes"] for record in database.documents) / n_chunks
a_list = wanted * NEIGHBOUR.itemsize
print(f"{'tokens':>9} {'chunks':>8} {'shards':>8} {'chunk × shard':>14} {'our question':>14} {'as in a build':>14}")
for tokens in [10.0**power for power in range(5, 13)] + [1.75e12]:
    shards = max(1, math.ceil(tokens / m * text_a_chunk / config.shard_bytes))
    pairs = tokens / m * shards
    seconds = pairs * np.polyval(graph_line, math.log(max(1000, tokens / m / shards)))
    print(f"{tokens:9.3g} {tokens / m:8.2g} {shards:8,} {pairs:14.2g} ", end="")
    print(f"{lasting(seconds):>14} {lasting(pairs * BUILD_SECONDS):>14}")
print(f"a list from each shard, if all are kept until the end: {pairs * a_list:.1g} bytes")

# %% [markdown]
# From the second shard on, at some $10^7$ tokens, ten times the tokens are a hundred times the work. The last two
# columns count the same questions. They differ in what one question is:
#
# | column | keys | keys that it wants | cores |
# | --- | --- | --- | --- |
# | our question | made up, 64 columns | 2 | 1 |
# | as in a build | hashed words of real text, 128 columns | 32 | 2 |
#
# The last column is the one that [docs/scale.md](../docs/scale.md) has: about **49,000 years** for the paper's database
# in shards of 32 MB, with one machine.
#
# What helps? Larger shards, as large as memory allows, move the bend to the right. Merging the lists as they come keeps
# their bytes linear; otherwise they would fill more than the database itself. Machines side by side divide the time.
# But the square goes away only if a chunk asks *few* shards. Put like keys together, and ask only where the query is
# near. You will write this in exercise 12.3. It is the idea of inverted files ([Jégou et al.
# 2011](https://doi.org/10.1109/TPAMI.2010.57)) and of ScaNN's tree.
#
# ## The time to make the keys
#
# Making keys is linear in the tokens, and expensive all the same. Measure two ways to make them:

# %%
chunks_of_text = [database.text(chunk) for chunk in database.split("train").tokens[:16]]
bert, rates = load_bert(), {}
for name, embed in (("hashing", database.embedder.embed), ("BERT (MiniLM)", bert.embed)):
    embed(chunks_of_text, show_progress=False)
    began = time.process_time()
    embed(chunks_of_text, show_progress=False)
    rates[name] = len(chunks_of_text) / (time.process_time() - began)
for name, rate in rates.items():
    print(f"{name}: {float(f'{rate:.2g}'):,.0f} chunks a second")
    print("  " + ", ".join(f"{said(tokens)} tokens in {lasting(tokens / m / rate)}" for tokens in (1e6, 1e9, 1.75e12)))

# %% [markdown]
# On one core, BERT needs a day or two for a billion tokens and years for the paper's database, even a BERT as small as
# MiniLM. This is work for accelerators, processors that are built for large matrix products. Fortunately it must be
# done only once. Hashing is faster in a build than here: a build has the tokens already, and here the text had to be
# cut into tokens first.
#
# ## Breaking the keys
#
# It is the keys that fill the memory. So make them smaller until the search breaks. Each column is rounded to $2^b$
# levels, where $b$ is the number of bits. One bit is a sign. At 16 bits we take half-precision numbers instead. The
# output's recall@2 is the share of the two nearest keys that are still found. For the last number of each line, the 50
# best candidates are measured again with their exact keys, which may lie on a disk.


# %%
def rounded(x, bits):
    """Each number at the middle of one of 2 ** bits levels between −3 and 3 standard deviations."""
    step = 6 * some_keys.std() / 2**bits
    levels = np.clip(np.floor(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((levels + 0.5) * step).astype(np.float32)


truth, _ = exact_search(queries, keys, k)
recalls = {}
for bits in (32, 16, 8, 4, 3, 2, 1):
    small = {32: keys, 16: keys.astype(np.float16)}.get(bits, rounded(keys, bits) if bits < 16 else None)
    candidates, _ = exact_search(queries, small, 50)
    measured_again = listed_distances(queries, keys, candidates)
    best = np.take_along_axis(candidates, np.argsort(measured_again, axis=1), 1)[:, :k]
    recalls[bits] = recall(candidates[:, :k]), recall(best)
    print(f"{bits:2} bits: {MINILM * bits // 8:5,} bytes a MiniLM key, recall@2 {recalls[bits][0]:.2f}, ", end="")
    print(f"of 50 measured exactly {recalls[bits][1]:.2f}")
print(f"keys of 48 bytes fill 16 GB at {MEMORY / 48 * m / 1e9:.1f} billion tokens, float32 keys at ", end="")
print(f"{MEMORY / (4 * MINILM) * m / 1e9:.2f} billion")
assert recalls[16][0] > 0.98
assert recalls[1][0] < recalls[8][0] - 0.2
assert recalls[1][1] > recalls[1][0] + 0.1

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for column, (name, colour) in enumerate((("rounded keys alone", ORANGE), ("50 best measured exactly", BLUE))):
    found = [row[column] for row in recalls.values()]
    axis.plot([MINILM * bits / 8 for bits in recalls], found, "o-", color=colour, label=name)
axis.set(xscale="log", ylim=(0, 1.05), xlabel="bytes of a key with 384 columns", ylabel="recall@2")
axis.set_xticks([MINILM * bits / 8 for bits in recalls], [f"{MINILM * bits // 8}" for bits in recalls])
axis.set_title("Recall with rounded keys")
axis.minorticks_off()
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# *Figure 12.3.* A poor key is good enough to propose candidates, if a better key decides among them. Recall was
# measured with our made-up keys of 64 columns. The bytes are those of 384 columns with as many bits each.
#
# Half precision costs next to nothing. A single bit per column costs a great deal of recall, but most of it comes back
# when the exact keys decide. And keys of 48 bytes fill 16 GB of memory only at **21.3 billion** tokens.
# [docs/scale.md](../docs/scale.md) measures better ways to shorten a key, to codes of 24 to 96 bytes, on real keys
# (product quantisation, [Jégou et al. 2011](https://doi.org/10.1109/TPAMI.2010.57)), and the result has the same shape.
#
# ## What breaks, in order
#
# | tokens | the problem | what one does about it |
# | --- | --- | --- |
# | $10^4$ to $10^5$ | none: exact search is the fastest, and right | the library does so (`index.MAX_EXACT_KEYS`) |
# | $10^6$ | keys by BERT take minutes | make them once, since BERT is frozen |
# | $10^7$ to $10^8$ | exact search comes near 10 ms a query | a graph or a tree, $O(\log T)$ |
# | $10^9$ | keys outgrow memory; days to find all neighbours | shards; neighbours computed in advance, once |
# | $10^{10}$ | a laptop's disk; every chunk asks every shard | several machines; codes in memory, keys on disk |
# | $10^{11}$ | lists before merging; too many files | merge as they come; larger shards; ask few shards |
# | $10^{12}$ | terabytes of keys, years of BERT on a core | accelerators; an index on many machines |
#
# Too many files are a new problem, which no measurement above shows. Each shard is a handful of files. Our library
# keeps all of them open, and an operating system allows a process only so many. When it opens a database, it also reads
# the whole of it, to compare each file's hash with the one on record. [docs/scale.md](../docs/scale.md) says at which
# size each of these becomes a limit.
#
# The paper trains with a database of $6 \cdot 10^{11}$ tokens and evaluates with $1.75 \cdot 10^{12}$. Its index takes
# 93 TB. And what does it gain? From 4 billion to 1.7 trillion tokens in the database, its largest model goes from 0.78
# to 0.66 bits per byte on C4, without a single new parameter (§4.1, table 14).
#
# ## Exercises
#
# Write your answer into the cell with the dots and run the cell below it.
#
# **12.1** Search shards. `shards` is a list of arrays (N_s, d). Their rows are numbered on from one shard to the next.
# Return the ids (k,) of the `k` rows that are nearest to the `query` (d,), nearest first; of equally near ones, the
# smaller id first. A shard may have fewer than `k` rows, or none.


# %% tags=["exercise"]
def search_shards(query, shards, k): ...


# %% tags=["check"]
check_12_1(search_shards)

# %% [markdown]
# **12.2** How many bytes do the tokens, the key and the list of neighbours of a chunk take on disk? You get a
# `BuildConfig` (see its `chunk_size`, `key_dtype`, `neighbours` and `extra_candidates`), the size of the vocabulary,
# and the width of the keys. A token takes two bytes up to a vocabulary of 65,536 words, and four beyond.


# %% tags=["exercise"]
def bytes_a_chunk(config, vocabulary, d_key): ...


# %% tags=["check"]
check_12_2(bytes_a_chunk)

# %% [markdown]
# **12.3** An inverted file. The keys were divided into lists: `owner` has, for each key, the number of the list that
# the key belongs to. Each list has a *centroid*, a vector in the middle of its keys. Look only through the lists of the
# `probes` centroids nearest to the `query`. Return the ids (k,) of the nearest keys in these lists, nearest first, and
# the number of keys that the lists contain.


# %% tags=["exercise"]
def inverted_search(query, keys, centroids, owner, probes, k): ...


# %% tags=["check"]
check_12_3(inverted_search)

# %% [markdown]
# ## What you have gained
#
# - A chunk's weight is a sum of counts times widths. Keys dominate it, and a key for each chunk instead of each token
#   makes the paper's size possible.
# - You know which lines in the figures are arithmetic, which are measured, and which are extrapolated.
# - Approximate search is logarithmic in one graph and linear in the number of graphs. The neighbours of all chunks are
#   quadratic, unless chunks ask few shards.
# - Small keys propose, exact keys decide.
#
# Next: [tutorial 13, a memory for a language model](13_a_memory_for_a_language_model.ipynb).
