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
# The database of tutorial 1 had a few hundred tokens. The paper's has 1.75 · 10¹². Nothing in the idea changes on the
# way, but at almost every factor of ten something that was free becomes the problem: first the time of a search, then
# memory, then the time to build, then the disk. This tutorial measures small, counts, and extrapolates.
#
# Afterwards you can
#
# - say what a chunk weighs, part by part, and check it against files to the byte;
# - measure a search at three sizes and draw it on, as a line for exact search and as log *T* for a graph;
# - say at which size a laptop ends, and by which of its limits;
# - explain what sharding solves and what it makes quadratic, and what compressed keys cost;
# - name what the paper used at each of these places.
#
# The project's own accounting, with rates measured on one machine at more sizes, is `docs/scale.md`; its arithmetic is
# `benchmarks/scale_costs.py`, a line or two each.

# %%
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
from retro_np.retrieval.index import ExactIndex, build_hnsw

NEIGHBOUR = np.dtype([("id", np.int64), ("distance", np.float32)])  # an entry of a list of neighbours
threads.use_threads(1)  # all times below are one core's

# %% [markdown]
# ## What a chunk weighs
#
# A slice of Python's standard library, with the defaults of `retro-np build`: chunks of 64 tokens, keys of hashed
# words with 128 columns, 10 neighbours and 22 spares for each chunk.

# %%
config = BuildConfig(limit_bytes=60_000, held_out=0.0, duplicates=None, vocabulary_size=1024)
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
database = build_database(STDLIB, Path(temporary.name) / "db", config, "hashing")
m, n = database.chunk_size, database.n_chunks
shard, lists = database.path / "shards" / "00000", database.path / "neighbours" / "train" / "00000"
stored = {"tokens": shard / "tokens.npy", "document's number": shard / "documents.npy", "key": shard / "keys.npy"}
stored |= {"neighbours: ids": lists / "ids.npy", "neighbours: distances": lists / "distances.npy"}
weights = {name: np.load(path, mmap_mode="r").nbytes / n for name, path in stored.items()}
for name, weight in weights.items():
    print(f"{name:22} {weight:5.0f} bytes a chunk")
in_graph = (shard / "index.hnsw").stat().st_size / n
print(f"{'graph':22} {in_graph:5.0f} bytes a chunk, of which the key, once more: {weights['key']:.0f}")
assert weights["tokens"] == 2 * m
assert weights["key"] == 4 * database.d_key
assert weights["neighbours: ids"] + weights["neighbours: distances"] == 32 * NEIGHBOUR.itemsize
assert 140 < in_graph - weights["key"] < 170

# %% [markdown]
# Each is a number times a width: **128 bytes** for 64 tokens of two bytes (a vocabulary above 65,536 words takes four),
# **512 bytes** for the key. The value [N, F] is not stored: F is the next chunk, which is there anyway. The graph is
# what makes the search quick, each key linked to some that are near (more on it below); it holds each key again, since
# hnswlib computes distances of its own copy, and some 150 bytes of links.
#
# With BERT's keys, here MiniLM's 384 columns, the key, which the graph holds once more, outweighs the rest.

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
# **58 bytes a token**, of which two are the token. Beside it, what the paper says of its own (and of kNN-LM, which
# keeps a key for every *token*: tutorial 10):

# %%
paper = {"4 billion tokens": (215e9, 4e9), "1.75 trillion tokens": (93e12, 1.75e12)}
for name, (size, tokens) in paper.items():
    print(f"RETRO's index of {name}: {size / (tokens / 64):,.0f} bytes a chunk")
knn_lm = 15e12 / 4e9
print(f"kNN-LM's, of 4 billion tokens: {knn_lm:,.0f} bytes a token, {knn_lm * 4e9 / 215e9:.1f} times RETRO's")

# %% [markdown]
# The two figures of RETRO, **3,440 bytes** and **3,401 bytes**, agree within their rounding: the index grows with the
# tokens and with nothing else. What a key for each token costs is **69.8 times** as much: it is the chunk that makes
# trillions thinkable. (A key of 768 float32 columns and four bytes for each token of N and of F would be 3,584 bytes;
# the paper does not say.)
#
# ## Where a laptop ends: bytes
#
# Both axes are logarithmic, so what grows with the tokens is a line of slope one, and a weight per token only shifts
# it. The horizontal lines are a laptop of 16 GB of memory and a disk of 1 TB.

# %%
MEMORY, DISK = 16e9, 1e12


def said(number):
    """A large number in words, to three digits."""
    power = min(4, int(math.log10(number)) // 3)
    return f"{number / 1000**power:.3g} " + ["", "thousand", "million", "billion", "trillion"][power]


# %%
sizes = np.geomspace(1e4, 1e13, 10)
lines = {
    "tokens": (parts["tokens"] / m, "#8c8c8c", "-"),
    "keys, float32": (parts["keys, float32"] / m, "#2b7bba", "--"),
    "all of it": (whole / m, "#2b7bba", "-"),
    "kNN-LM (the paper's)": (knn_lm, "#e07b1f", "-"),
}
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name, (bytes_a_token, colour, style) in lines.items():
    axis.plot(sizes, bytes_a_token * sizes, style, color=colour, label=name)
    print(
        f"{name:22} fills memory at {said(MEMORY / bytes_a_token):>13} tokens, the disk at {said(DISK / bytes_a_token)}"
    )
for name, limit in (("16 GB of memory", MEMORY), ("1 TB of disk", DISK)):
    axis.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    axis.text(1.2e4, limit * 1.4, name, fontsize=8)
axis.plot([4e9, 1.75e12], [215e9, 93e12], "D", color="black", markersize=5, label="the paper's index")
axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="bytes")
axis.legend(frameon=False, fontsize=8)
plt.show()
print(f"this machine's disk has {shutil.disk_usage(database.path).total / 1e12:.2f} TB")

# %% [markdown]
# Keys fill the memory at **667 million** tokens: a graph that is walked at random must be in memory, its links too, so
# this is about where the index of one machine ends. All of it fills the disk at **17.1 billion**. A laptop could hold
# the *tokens* of half a trillion: it is the keys that end it, not the text.
#
# ## Where a laptop ends: the time of a search
#
# Exact search compares a query with every key. A navigable small world (Malkov & Yashunin 2018) walks a graph towards
# the query and looks at a few hundred keys, some more for each factor of ten. The keys here are made up: 64 columns
# that depend, like those of text, on fewer causes. Each query is asked alone, only the process's own time counts, and
# the searches take turns, so that none has the machine's good minutes for itself (tutorial 11): the best of five
# rounds.

# %%
rng = np.random.default_rng(0)
mixing = rng.standard_normal((16, 64)).astype(np.float32)
some_keys = (rng.standard_normal((9100, 16)) @ mixing + 0.5 * rng.standard_normal((9100, 64))).astype(np.float32)
queries, K, MARGIN = some_keys[:100], 2, 16
SIZES = (1000, 3000, 9000)


def seconds_a_query(search):
    """The process's time for a query of its own."""
    began = time.process_time()
    for query in queries:
        search(query[None], K)
    return (time.process_time() - began) / len(queries)


def recall(found):
    """The share of the true K nearest that were found."""
    return np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)])


# %%
graphs, building, recalls = {}, {}, {}
for size in SIZES:
    keys = some_keys[100 : 100 + size]
    began = time.process_time()
    graphs[size] = build_hnsw(keys)
    building[size] = (time.process_time() - began) / size
    truth, _ = exact_search(queries, keys, K)
    for margin in (0, MARGIN):
        graphs[size].ef_margin = margin  # candidates kept beyond those asked for
        recalls[margin, size] = recall(graphs[size].search_graph(queries, K)[0])
assert recalls[MARGIN, 9000] > 0.8
assert recalls[0, 9000] < recalls[0, 1000] - 0.05

# %%
searches = {
    "exact": {size: ExactIndex(some_keys[100 : 100 + size]).search for size in SIZES},
    "graph": {size: graphs[size].search_graph for size in SIZES},
}
rounds = [{n: {s: seconds_a_query(f) for s, f in of.items()} for n, of in searches.items()} for _ in range(5)]
measured = {name: {size: min(each[name][size] for each in rounds) for size in SIZES} for name in searches}
for size in SIZES:
    times = ", ".join(f"{name} {1e3 * of[size]:.2f} ms" for name, of in measured.items())
    print(f"{size:5,} keys: {times} a query; {1e3 * building[size]:.2f} ms a key to build; ", end="")
    print(f"recall@{K} {recalls[MARGIN, size]:.2f}, with no margin {recalls[0, size]:.2f}")

# %% [markdown]
# Two functions with two constants each are drawn on from there: a + b · keys for exact search, a + b · log(keys) for
# the graph. It is a long way from here to 10¹⁰ keys, so trust the slopes more than the digits. And note what the
# second line hides: with the number of candidates fixed recall falls as the keys crowd, as the figures without a margin
# show; more candidates mend that, and take longer. `docs/scale.md` has both at 10⁴ to 10⁶ real keys, of 384 columns.

# %%
x = np.array(sorted(measured["exact"]))
exact_line = np.polyfit(x, [measured["exact"][size] for size in x], 1)
graph_line = np.polyfit(np.log(x), [measured["graph"][size] for size in x], 1)
chunks = np.geomspace(x[0], 2.7e10, 60)
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
axis.plot(chunks * m, np.polyval(exact_line, chunks), "--", color="#8c8c8c", label="exact, drawn on")
axis.plot(chunks * m, np.polyval(graph_line, np.log(chunks)), "--", color="#2b7bba", label="one graph, drawn on")
shard_keys = 1e5
in_shards = np.maximum(1, chunks / shard_keys) * np.polyval(graph_line, np.log(np.minimum(chunks, shard_keys)))
axis.plot(chunks * m, in_shards, color="#e07b1f", label="graphs of 100,000 keys, one after the other")
for name, colour in (("exact", "#8c8c8c"), ("graph", "#2b7bba")):
    axis.plot(x * m, [measured[name][size] for size in x], "o", color=colour, markersize=5)
for name, limit in (("10 ms: the paper's, a chunk", 1e-2), ("a minute", 60)):
    axis.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    axis.text(chunks[0] * m, limit * 1.3, name, fontsize=8)
axis.axvline(MEMORY / (4 * MINILM / m), color="black", linewidth=0.8, linestyle=":")
axis.text(MEMORY / (4 * MINILM / m) * 1.3, 2e-5, "MiniLM's keys fill 16 GB", fontsize=8)
axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds a query, one core", ylim=(1e-5, 1e6))
axis.legend(fontsize=8, loc="upper left", framealpha=1, edgecolor="white")
plt.show()
print(f"exact search of 1.75e12 tokens: {np.polyval(exact_line, 1.75e12 / m) / 60:.0f} minutes a query on one core")

# %% [markdown]
# The paper's answer is in the 10 ms: an approximate index whose search costs O(log *T*), asked once a *chunk* and not
# once a token, so that its time is shared by 64 of them (§2.3). The library is ScaNN (Guo et al. 2020), compared in
# `docs/scale.md` with the one here; the interface is the same, `search(queries, k)` giving ids and distances.
#
# ## Shards, and what they make quadratic
#
# A graph larger than memory is cut into **shards**, a graph each. Each is asked for its *k* nearest, and the best *k*
# of all are kept. That loses nothing: whatever is among the *k* nearest of all is among the *k* nearest of its shard.

# %%
keys, cuts = some_keys[100:], [0, 2000, 5000, 9000]
found = []
for start, stop in itertools.pairwise(cuts):
    ids, distances = exact_search(queries, keys[start:stop], K)
    found.append((ids + start, distances))
merged, _ = merge_lists(found, K)
assert np.array_equal(merged, exact_search(queries, keys, K)[0])
print(f"{len(cuts) - 1} shards of {np.diff(cuts).tolist()} keys give what one search of {len(keys):,} keys gives")

# %% [markdown]
# But a query now pays for each shard (the orange line above is straight again), and training needs the neighbours of
# *every* chunk. The paper precomputes them, which it can because BERT is frozen: keys, and so neighbours, never
# change. Every chunk asks every shard, and both are proportional to the tokens. In this library each chunk has a list
# from every shard until the last one has answered.


# %%
def lasting(seconds):
    """A time in the unit that suits it."""
    units = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "s": 1}
    unit = next((unit for unit, size in units.items() if seconds >= 2 * size), "s")
    return f"{seconds / units[unit]:,.1f} {unit}"


text_a_chunk = sum(record["bytes"] for record in database.documents) / n
a_list = (config.neighbours + config.extra_candidates) * NEIGHBOUR.itemsize
sizes = [10.0**power for power in range(4, 13)] + [1.75e12]
print(f"{'tokens':>9} {'chunks':>9} {'shards':>8} {'chunk × shard':>14} {'lists, bytes':>13} {'one core':>14}")
for tokens in sizes:
    shards = max(1, math.ceil(tokens / m * text_a_chunk / config.shard_bytes))
    pairs = tokens / m * shards
    seconds = pairs * np.polyval(graph_line, math.log(max(1000, tokens / m / shards)))
    print(f"{tokens:9.3g} {tokens / m:9.2g} {shards:8,} {pairs:14.2g} {pairs * a_list:13.2g} {lasting(seconds):>14}")

# %% [markdown]
# From one shard on, here some 10⁷ tokens, ten times the tokens are a hundred times the work. Larger shards move the
# bend to the right, as far as one machine's memory; lists merged as they come keep the bytes linear; machines side by
# side divide the time. What bends it back is to ask *few* shards: put like keys together, and ask only where the query
# is near. Exercise 3 does that, and it is the idea of inverted files (Jégou et al. 2011) and of ScaNN's tree.
#
# ## The time to make the keys
#
# That stage is linear, and dear all the same.

# %%
chunks_of_text = [database.text(chunk) for chunk in database.split("train").tokens[:16]]
bert, rates = load_bert(), {}
for name, embed in (("hashing", database.embedder.embed), ("BERT (MiniLM)", bert.embed)):
    embed(chunks_of_text, show_progress=False)
    began = time.process_time()
    embed(chunks_of_text, show_progress=False)
    rates[name] = len(chunks_of_text) / (time.process_time() - began)
for name, rate in rates.items():
    taken = [f"{said(tokens)} tokens {lasting(tokens / m / rate)}" for tokens in (1e6, 1e9, 1.75e12)]
    print(f"{name:13} {rate:6,.0f} chunks a second: {', '.join(taken)}")

# %% [markdown]
# A billion tokens by BERT are days on a core, the paper's are years, for a BERT as small as MiniLM. It is work for
# accelerators, and needed only once.
#
# ## Breaking the keys
#
# The keys are what fills memory, so make them smaller, until the search breaks. Each column is rounded to 2ᵇ levels;
# the last row keeps a sign. Recall is the share of the two nearest that are found still; the last column measures the
# 50 best candidates again with their exact keys, as they would lie on a disk.


# %%
def rounded(x, bits):
    """Each number at the middle of one of 2 ** bits levels between −3 and 3 standard deviations."""
    step = 6 * some_keys.std() / 2**bits
    levels = np.clip(np.floor(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((levels + 0.5) * step).astype(np.float32)


# %%
truth, _ = exact_search(queries, keys, K)
recalls = {}
for bits in (32, 16, 8, 4, 3, 2, 1):
    small = {32: keys, 16: keys.astype(np.float16)}.get(bits, rounded(keys, bits) if bits < 16 else None)
    candidates, _ = exact_search(queries, small, 50)
    measured_again = listed_distances(queries, keys, candidates)
    best = np.take_along_axis(candidates, np.argsort(measured_again, axis=1), 1)[:, :K]
    recalls[bits] = recall(candidates[:, :K]), recall(best)
    print(f"{bits:2} bits: {MINILM * bits // 8:5,} bytes a MiniLM key, recall@2 {recalls[bits][0]:.2f}, ", end="")
    print(f"of 50 measured exactly {recalls[bits][1]:.2f}")
assert recalls[16][0] > 0.98
assert recalls[1][0] < recalls[8][0] - 0.2
assert recalls[1][1] > recalls[1][0] + 0.1

# %%
figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
for column, (name, colour) in enumerate((("as they are", "#e07b1f"), ("50 best measured exactly", "#2b7bba"))):
    found = [row[column] for row in recalls.values()]
    axis.plot([MINILM * bits / 8 for bits in recalls], found, "o-", color=colour, label=name)
axis.set(xscale="log", ylim=(0, 1.05), xlabel="bytes a key of 384 columns, as many bits each", ylabel="recall@2")
axis.set_xticks([MINILM * bits / 8 for bits in recalls], [f"{MINILM * bits // 8}" for bits in recalls])
axis.minorticks_off()
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# (The recall is that of our made-up keys of 64 columns; the bytes are what as many bits a column come to with MiniLM's
# 384.) Half precision costs next to nothing, a sign a column a great deal; but a poor key is good enough to *propose*,
# if better ones decide. `docs/scale.md` measures codes of 24 to 96 bytes (product quantisation, Jégou et al. 2011) on
# real keys: the same picture. This is what moves the vertical line of the figure above: 48-byte keys fill 16 GB at

# %%
print(f"{MEMORY / 48 * m / 1e9:.1f} billion tokens, not {MEMORY / (4 * MINILM) * m / 1e9:.2f} billion")

# %% [markdown]
# **21.3 billion** tokens.
#
# ## What breaks, in order
#
# | tokens | what is the trouble | what one does; what the paper did |
# | --- | --- | --- |
# | 10⁴ – 10⁵ | nothing: exact search is the quickest, and right | the library does so (`index.MAX_EXACT_KEYS`) |
# | 10⁶ | keys by BERT take minutes | make them once; BERT is frozen |
# | 10⁷ – 10⁸ | exact search comes near 10 ms a query | a graph or a tree: O(log *T*) |
# | 10⁹ | keys are more than 16 GB; days of queries for training's neighbours | shards; neighbours precomputed, once |
# | 10¹⁰ | the disk of a laptop; every chunk asks every shard | several machines; codes in memory, exact keys on disk |
# | 10¹¹ | lists before merging, open files, hashing of files at opening | merge as they come; ask few shards |
# | 10¹² | terabytes of keys, and years of BERT on a core | accelerators; a distributed index. The paper's is 93 TB |
# | 1.75 · 10¹² | the paper evaluates from so many, and trains from 6 · 10¹¹ | 10 ms a query, amortised over a chunk |
#
# `docs/scale.md` has the list for this project, with the size at which each limit is met. That the model keeps its
# size all the way is the paper's point: from 4 · 10⁹ to 1.7 · 10¹² tokens in the database its 7.5B model goes from
# .78 to .66 bits a byte on C4 with no parameter more.
#
# ## Exercises
#
# **1.** Search shards: `shards` is a list of (N_s, d) arrays, whose rows are numbered on from one shard to the next.
# Return the ids (k,) of the *k* nearest rows of all, nearest first; a shard may have fewer than *k*, even none.


# %% tags=["exercise"]
def search_shards(query, shards, k): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def search_shards(query, shards, k):
    ids, distances, first = [], [], 0
    for shard in shards:
        far = np.sum((shard - query) ** 2, axis=1)
        near = np.argsort(far, kind="stable")[:k]
        ids, distances, first = [*ids, near + first], [*distances, far[near]], first + len(shard)
    ids, distances = np.concatenate(ids), np.concatenate(distances)
    return ids[np.lexsort((ids, distances))[:k]]


# %% tags=["check"]
for bounds in ([9000], [3000, 6000], [1, 2, 4500], [0, 4500]):
    pieces = np.split(keys, bounds)
    for query, expected in zip(queries[:20], exact_search(queries[:20], keys, 5)[0], strict=True):
        found = search_shards(query, pieces, 5)
        assert np.array_equal(found, expected), f"shards of {[len(piece) for piece in pieces]}: {found}, not {expected}"
print("right: as if there were one shard")

# %% [markdown]
# **2.** What tokens, key and lists of neighbours of a chunk weigh on the disk, in bytes: from a `BuildConfig`, the
# vocabulary, and the width of its keys. Two bytes a token up to 65,536 words, else four.


# %% tags=["exercise"]
def bytes_a_chunk(config, vocabulary, d_key): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def bytes_a_chunk(config, vocabulary, d_key):
    tokens = config.chunk_size * (2 if vocabulary <= 65_536 else 4)
    key = d_key * {"float32": 4, "float16": 2}[config.key_dtype]
    return tokens + key + (config.neighbours + config.extra_candidates) * (8 + 4)


# %% tags=["check"]
on_disk = sum(weight for name, weight in weights.items() if name != "document's number")
for given, expected in (
    ((config, database.vocabulary_size, database.d_key), on_disk),
    ((BuildConfig(key_dtype="float16"), 128_000, MINILM), 256 + 768 + 384),
    ((BuildConfig(chunk_size=16, neighbours=2, extra_candidates=0), 65_536, 64), 32 + 256 + 24),
):
    assert bytes_a_chunk(*given) == expected, f"{given}: {bytes_a_chunk(*given)}, not {expected}"
print("right: as the files have it")

# %% [markdown]
# **3.** An inverted file. Each key belongs to the list of its nearest centroid, `owner` (N,). Look through the lists of
# the `probes` centroids that are nearest to the query, and return the ids (k,) of the nearest keys in them, nearest
# first, and how many keys were compared.


# %% tags=["exercise"]
def inverted_search(query, keys, centroids, owner, probes, k): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def inverted_search(query, keys, centroids, owner, probes, k):
    lists = np.argsort(np.sum((centroids - query) ** 2, axis=1), kind="stable")[:probes]
    members = np.flatnonzero(np.isin(owner, lists))
    far = np.sum((keys[members] - query) ** 2, axis=1)
    return members[np.argsort(far, kind="stable")[:k]], len(members)


# %% tags=["check"]
centroids = keys[:: len(keys) // 64][:64]
owner = exact_search(keys, centroids, 1)[0][:, 0]
for probes in (1, 16, 64):
    for query in queries:
        members = np.flatnonzero(np.isin(owner, exact_search(query[None], centroids, probes)[0][0]))
        found, compared = inverted_search(query, keys, centroids, owner, probes, K)
        assert compared == len(members), f"{probes} lists hold {len(members)} keys, not {compared}"
        expected = members[exact_search(query[None], keys[members], K)[0][0]]
        assert np.array_equal(found, expected), f"{probes} lists: {found}, not {expected}"
some = [inverted_search(query, keys, centroids, owner, 16, K) for query in queries]
share = np.mean([compared for _, compared in some]) / len(keys)
assert share < 0.5
assert recall([ids for ids, _ in some]) > 0.7
print(f"right: 16 of 64 lists hold {100 * share:.0f} % of the keys, and more than 70 % of the answers")
