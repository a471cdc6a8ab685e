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
# # 1 · Chunks, neighbours, and a database
#
# ![RETRO as a whole; you are here: the database](../docs/landing/retro-1.svg)
#
# Somebody has read "To make scones, take a bowl and" and is to guess what comes next. No knowledge of English will
# tell them. But if they have a cookbook at hand, they look for a page that begins like this one, and read there how
# it goes on. RETRO is a language model with such a cookbook. Beside its weights it has a database of text, and while
# it reads, it looks up again and again what other documents said after something similar. How does one build that
# database, what exactly is looked up, and what comes back? This tutorial answers with twenty lines of text, so few that
# you can see all of them.
#
# *Reading: about 30 minutes · runs in 5 s on one core · needs tutorial 0, or that you know what a language model is.*
#
# Afterwards you can
#
# - cut a document into chunks of $m$ tokens, and say what happens at its end;
# - say what a **key** and a **value** $[N, F]$ are, which of the two is compared, and which is read;
# - search a database, and explain the −1 in an answer;
# - read equation 1 of the paper;
# - explain why $F$, the continuation, is returned at all: it is where the next chunk's tokens are.
#
# Previous: [0 · A language model in NumPy](00_a_language_model.ipynb) · Next:
# [2 · A frozen BERT in a page of NumPy](02_a_frozen_bert.ipynb) · All letters: [symbols](../docs/symbols.md) · The
# paper: [Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426), sections 2.2 and 2.3

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np.kernels.substring import common_prefix_lengths
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.sequences import sequence_neighbours
from retro_np.tutorials.checks.tutorial_01 import check_1_1, check_1_2, check_1_3

BLUE, ORANGE, GREY, PALE, SAND = "#2b7bba", "#e07b1f", "#8c8c8c", "#c9dff0", "#f2b880"

# %% [markdown]
# ## The idea
#
# RETRO cuts its text into *chunks* of $m$ tokens. It predicts token after token, as every language model does. When a
# chunk is complete, it stops for a moment. It searches the database for chunks that resemble the one that it has just
# read, its *neighbours*. With each neighbour comes the chunk that followed it in its own document. The model may read
# all of this while it predicts the next chunk.


# %% tags=["hide-input"]
def card(axes, x, y, width, text, colour, edge="black", **style):
    axes.add_patch(plt.Rectangle((x, y), width, 1, facecolor=colour, edgecolor=edge, **style))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end, bend=0.0):
    style = {"arrowstyle": "-|>", "color": "black", "lw": 1.3, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)


figure, axes = plt.subplots(figsize=(10.5, 4.6))
axes.text(0, 5.25, "the document that is read", fontsize=10, color=GREY)
card(axes, 0, 4, 4, "To make scones, take\na bowl and", PALE)
card(axes, 4, 4, 4, "?", "white", linestyle="--")
axes.text(2, 3.75, "$C_u$: has been read", ha="center", va="top", fontsize=9)
axes.text(6, 3.75, "$C_{u+1}$: is to be predicted", ha="center", va="top", fontsize=9)
axes.text(0, -0.6, "another document, in the database", fontsize=10, color=GREY)
card(axes, 0, 0, 4, "To make muffins, take\na bowl and", PALE)
card(axes, 4, 0, 4, "some sugar. Stir\nthe sugar with", SAND)
axes.text(2, 1.2, "$N$: what resembles $C_u$", ha="center", fontsize=9)
axes.text(6, 1.2, "$F$: what was written after it", ha="center", fontsize=9)
arrow(axes, (2, 3.3), (2, 1.7))
axes.text(2.1, 2.5, "search by what\nhas been read", va="center", fontsize=10, color=BLUE)
arrow(axes, (6, 1.7), (6, 3.3))
axes.text(6.1, 2.5, "give back what was\nwritten after it", va="center", fontsize=10, color=ORANGE)
axes.set(xlim=(-0.1, 8.4), ylim=(-0.8, 5.7))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 1.1.* The whole idea of retrieval in RETRO: search by what has been read, and give back what was written
# after it.
#
# The neighbour does not know that scones need butter. It does know that an ingredient comes next, then a full stop,
# then "Stir the" and the ingredient once more. Fill in one word, and the rest can be copied.
#
# ### The same as an equation
#
# A language model gives each token a probability, given all tokens before it
# ([tutorial 0](00_a_language_model.ipynb)). RETRO adds to what is given. Let the sequence have $n$ tokens, here a
# multiple of $m$, in $\ell = n / m$ chunks $C_1, \ldots, C_\ell$. Let $\mathrm{RET}(C_u)$ be what the search for $C_u$
# gives back. Then equation 1 of the paper, in our letters, gives the logarithm of the probability of the sequence:
#
# $$\ln p(x_1, \ldots, x_n) = \sum_{u=1}^{\ell} \; \sum_{t=(u-1)m+1}^{um} \ln p\bigl(x_t \mid x_1, \ldots, x_{t-1}, \;
# \mathrm{RET}(C_1), \ldots, \mathrm{RET}(C_{u-1})\bigr).$$
#
# The outer sum goes over the chunks, and the inner one over the tokens of chunk $u$. Look at the last index. A
# token of chunk $u$ is predicted with what was found for the chunks *before* $u$. It cannot be otherwise: nobody
# can search for a chunk that has not been read to its end. While the tokens of $C_1$ are predicted, nothing has
# been retrieved yet. Everything that [tutorial 5](05_chunked_cross_attention.ipynb) does about indices serves this
# one line.
#
# ## Twenty lines of text
#
# Here are five recipes of four lines. They were written to have much in common: whoever has read one knows a good
# deal about the next.

# %%
dishes = {"pancakes": "flour", "waffles": "batter", "crumpets": "yeast"}
dishes |= {"scones": "butter", "muffins": "sugar"}
documents = {
    f"{dish}.txt": (
        f"To make {dish}, take a bowl and some {first}.\n"
        f"Stir the {first} with an egg and a cup of milk.\n"
        "Leave it alone for half an hour, and heat the oven.\n"
        f"Bake the {dish} until they are brown, and eat them warm.\n"
    )
    for dish, first in dishes.items()
}
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
corpus = Path(temporary.name) / "recipes"
corpus.mkdir()
for name, text in documents.items():
    (corpus / name).write_text(text)
print(documents["scones.txt"])

# %% [markdown]
# `build_database` trains a tokenizer and then does everything in section 2.3 of the paper. It cuts the documents into
# chunks, makes a key of each chunk, builds an index of the keys, and looks up the neighbours of each chunk. With an
# index, a search need not compare the query with every key, and may now and then miss the nearest one ([tutorial
# 12](12_from_here_to_1_75_trillion_tokens.ipynb)). For so few chunks that makes no difference. The paper's chunks have
# 64 tokens. Ours have 8, so that they fit on a line.
#
# The tokens are not bytes as in tutorial 0. The tokenizer begins with bytes and then merges, again and again, the two
# adjacent tokens that occur together most often, until the vocabulary is full
# ([Sennrich et al. 2016](https://aclanthology.org/P16-1162)). Frequent words become one token each.
#
# The keys need no trained weights here. Each token of a chunk, and each pair of adjacent tokens, has a random vector
# that a hash function determines. A chunk's key is the sum of these vectors, scaled to length 1, and rare tokens count
# more.
# Chunks that share rare words get keys that are near each other. The next tutorial makes keys as the paper does, with
# BERT.
#
# `neighbours=2` is the number of neighbours that the database looks up for each chunk. A model may read all of them or
# fewer, and how many it reads is called $k$. Four more are kept as `extra_candidates`. They step in when one of the
# nearest is of no use, because it comes from the very document that is read. The last two settings are for so small a
# *corpus*, as a collection of documents is called: nothing is held out, and no document is left out for being similar
# to another.

# %%
config = BuildConfig(
    chunk_size=8,
    vocabulary_size=400,
    d_key=64,
    neighbours=2,
    extra_candidates=4,
    held_out=0.0,
    duplicates=None,
)
database = build_database(corpus, corpus.parent / "db", config, "hashing")
m = database.chunk_size
print(f"{len(database.documents)} documents, {database.n_chunks} chunks of {m} tokens")
files = [p for p in database.path.rglob("*") if p.is_file() and not p.name.startswith(".")]
for path in sorted(files):
    name = path.relative_to(database.path).as_posix()
    print(f"  {name:36} {path.stat().st_size:9,} bytes")


# %% [markdown]
# A database is a folder of plain files. You can see the tokens, the keys, the neighbours and the index among them.
#
# ## Chunks
#
# A document is a row of tokens. A special token, end-of-text, is put behind the last one. Then the row is cut every
# $m$ tokens, and the last chunk is filled up with *padding*, token 0. So no chunk contains parts of two documents,
# and chunk $u + 1$ goes on where chunk $u$ stops, as long as both belong to the same document.

# %%
split = database.split("train")  # every document, since none is held out
number_of = {d["name"]: d["id"] for d in database.documents}


def rows_of(name):
    """The ids of a document's chunks: its rows in the database."""
    return np.flatnonzero(np.asarray(split.documents) == number_of[name])


rows = rows_of("scones.txt")
for row in rows:
    tokens = split.tokens[row]
    print(f"chunk {row:3}  {tokens.tolist()!s:42} {database.text(tokens)!r}")


# %% tags=["hide-input"]
def word(token):
    special = {0: "", 1: "end"}
    return special[token] if token in special else database.tokenizer.decode([token]).strip(" ").replace("\n", "⏎")


scones, muffins = (np.asarray(split.tokens[rows_of(f"{dish}.txt")]) for dish in ("scones", "muffins"))
figure, axes = plt.subplots(figsize=(9.5, 3.9))
for u, j in np.ndindex(scones.shape):
    token = scones[u, j]
    colour = "white" if token == 0 else GREY if token == 1 else PALE if token == muffins[u, j] else ORANGE
    axes.add_patch(plt.Rectangle((j, u), 1, 1, facecolor=colour, edgecolor="white" if token else "#dddddd", lw=2))
    axes.text(j + 0.5, u + 0.5, word(token), ha="center", va="center", fontsize=9)
axes.set(xlim=(0, m), ylim=(len(scones), 0), title="“scones”: what differs from “muffins” is orange")
axes.set_xticks(np.arange(m) + 0.5, range(1, m + 1))
axes.set_yticks(np.arange(len(scones)) + 0.5, [f"chunk {row}" for row in rows])
axes.set_xlabel("token of the chunk")
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
plt.show()
print(f"{np.sum(scones != muffins)} of {np.sum(scones != 0)} tokens differ")

# %% [markdown]
# *Figure 1.2.* One document in the database: seven chunks, of which the last ends with end-of-text and padding
# (white). All but four of its tokens stand at the same place in another recipe.
#
# ## Keys and values
#
# To the outside, the database is a dictionary with an entry for each chunk. The **key** is a vector that stands for
# what the chunk is about. A search compares keys and nothing else. The **value** is what a search returns. It is
# $[N, F]$: the chunk itself, $N$, and the chunk that follows it in its document, $F$. The last chunk of a document
# has no continuation. There $F$ is padding.
#
# A value has $2m$ tokens. That does not mean that each token is stored twice. The database stores the chunks one
# after the other, each of them once, and with each chunk the number of its document. When a value is read, it is put
# together from two rows that stand one below the other: the row of $N$, and the next row if that one belongs to the
# same document. [Tutorial 12](12_from_here_to_1_75_trillion_tokens.ipynb) counts the bytes.

# %%
ids = rows[[0, 1, -1]]
keys, values = np.asarray(database.keys("train")[ids]), database.value(ids)
print("keys  ", keys.shape, " one vector for each chunk")
print("values", values.shape, " [N, F]: 2m tokens for each chunk")
print("stored", split.tokens.shape, " tokens, and", split.documents.shape, "document numbers")
for chunk, value in zip(ids, values, strict=True):
    n_text, f_text = database.text(value[:m]), database.text(value[m:])
    print(f"\nchunk {chunk}\n  N {n_text!r}\n  F {f_text!r}")

# %% [markdown]
# ## A search
#
# A query is made into a key in the same way as a chunk. The neighbours of the query are the chunks whose keys are
# nearest to its key, by squared Euclidean distance. The word *neighbour* also stands for the value $[N, F]$ that comes
# back. Let us ask for something that is in no recipe.

# %%
query = "To make pies, take a bowl"
found, distances = database.search(query, k=3)
for chunk, distance in zip(found, distances, strict=True):
    neighbour, continuation = np.split(database.value(chunk), 2)
    print(f"{distance:.3f}  {database.text(neighbour)!r}")
    print(f"       and then {database.text(continuation)!r}")

# %% [markdown]
# If you ask for more chunks than there are, the rest of the answer is −1, at distance infinity. The value of −1 is
# all padding. The model reads that as *no neighbour*.

# %%
found, distances = database.search(query, k=database.n_chunks + 2)
print(found[-4:], distances[-4:])
print(database.value(found[-1]))

# %% [markdown]
# ## Why F is there
#
# When RETRO predicts chunk $C_{u+1}$, it reads the neighbours of $C_u$. Their $N$ resembles $C_u$, which the model
# has *already read*. What it needs now is more likely to stand in $F$. How much more? We can count.
#
# Each recipe looks up its neighbours among the *other* recipes, as in training. (A sequence must never retrieve its own
# text, and [tutorial 8](08_is_it_leakage.ipynb) shows what happens if it does.) Then we go through the tokens of
# $C_{u+1}$. A token counts as found if it is the last of a run of at least three tokens of $C_{u+1}$ that stands in
# $[N, F]$ of a neighbour of $C_u$, too. We also count for $N$ alone and for $F$ alone. A single common word is no
# evidence, and three in a row are. The first two tokens of a run do not count, and therefore the share cannot reach
# 100 %.
#
# One comparison keeps us honest. The recipes have so much in common that any text from another recipe might do. So we
# count once more for two *random* chunks of other recipes with their continuations.


# %%
def shared_runs(part, retrieved=True):
    """The percentage of tokens to be predicted that end a run of ≥ 3 found in `part`."""
    rng, hits, total = np.random.default_rng(0), 0, 0
    for name in documents:
        rows = rows_of(name)
        neighbours = sequence_neighbours(database, split, rows[None], k=2)[0]  # (ℓ, k, 2m)
        if not retrieved:
            others = np.setdiff1d(np.arange(database.n_chunks), rows)
            neighbours = database.value(rng.choice(others, (len(rows), 2)))
        for u in range(len(rows) - 1):
            following = split.tokens[rows[u + 1]]
            # For each token of `following`, the longest run of tokens that ends with it and stands in a neighbour:
            runs = common_prefix_lengths(following, neighbours[u][:, part])
            hits, total = hits + np.sum(runs >= 3), total + np.sum(following != 0)
    return 100 * hits / total


N, F, BOTH = slice(0, m), slice(m, 2 * m), slice(0, 2 * m)
shares = {
    "$[N, F]$ of random chunks": shared_runs(BOTH, retrieved=False),
    "$N$ of the neighbours": shared_runs(N),
    "$F$ of the neighbours": shared_runs(F),
    "$[N, F]$ of the neighbours": shared_runs(BOTH),
}
for name, share in shares.items():
    print(f"{name.replace('$', ''):26} {share:5.1f} %")
assert shares["$F$ of the neighbours"] > 3 * shares["$N$ of the neighbours"]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7, 2.5))
bars = axes.barh(list(shares), list(shares.values()), color=[GREY, SAND, ORANGE, BLUE])
axes.bar_label(bars, fmt="%.1f %%", padding=4)
axes.invert_yaxis()
axes.set(xlim=(0, 100), xlabel="% of the next chunk's tokens", title="where the tokens to be predicted stand")
plt.show()

# %% [markdown]
# *Figure 1.3.* What comes next stands in the continuation $F$ of the neighbours and not in $N$: no run of three
# tokens to come is in $N$, and 60.9 % of the tokens are the last of such a run in $F$.
#
# The random chunks reach 26.1 %, because these recipes repeat each other so much. The rest is what the search is
# worth. Most texts share less than these recipes. [Tutorial 8](08_is_it_leakage.ipynb) looks at Python's library.
#
# Is $N$ useless, then? A count of shared tokens cannot say. The paper asked trained models (table 13, bits per byte
# on C4, a data set of text from the web): 0.987 without retrieval, 0.950 with $N$ alone, 0.895 with $F$ alone, and
# 0.822 with both. So $N$ helps as well.
#
# ## Break it
#
# Chunks lie on a grid that begins with the document. Put one more line before a recipe, and every chunk is cut at
# another place. The search still finds a chunk with many of the same words. But the continuation of that chunk begins
# at another place, too.

# %%
original = documents["muffins.txt"]
for text in (original, "Wash your hands.\n" + original):
    tokens = np.array(database.tokenizer.encode(text).ids)
    chunk, following = tokens[3 * m : 4 * m], tokens[4 * m : 5 * m]
    ids, distances = database.search_keys(database.embed_chunks(chunk[None]), 1)
    near, continuation = np.split(database.value(ids[0, 0]), 2)
    print(f"read      {database.text(chunk)!r}\n  goes on {database.text(following)!r}")
    print(f"nearest   {database.text(near)!r}, at {distances[0, 0]:.3f}")
    print(f"  goes on {database.text(continuation)!r}\n")

# %% [markdown]
# The first chunk is in the database. It is found at distance 0, and its continuation is exactly what comes next. This
# search did not leave out the recipe's own text, but all five recipes have this line, so any of them could have
# answered. The second chunk is not in the database. The nearest chunk is cut differently, and its continuation begins
# with three words that have been read already.
#
# Here is a choice that no cutting avoids. A long chunk is searched for less often and matches less exactly. A short one
# says less about what the text is about, and costs more keys. The paper settles on 64 tokens. Most of this project's
# experiments, with much smaller models and databases, use 16.
#
# ## Exercises
#
# Write each answer into the cell with the dots. The cell below it judges what you wrote and gives a hint for the
# mistakes that we know.
#
# **1.1** Cut a row of tokens into chunks of $m$: `tokens` is a list of integers. Put end-of-text, token 1, behind it,
# and fill the last chunk up with 0. Return an array of shape (chunks, m).


# %% tags=["exercise"]
def chunked(tokens, m): ...


# %% tags=["check"]
check_1_1(chunked)

# %% [markdown]
# **1.2** The value $[N, F]$ of chunk number `row`, made of what is stored: `tokens` of shape (chunks, m), and
# `documents` of shape (chunks,), the number of each chunk's document. Return 2m tokens.


# %% tags=["exercise"]
def value_of(row, tokens, documents): ...


# %% tags=["check"]
check_1_2(value_of)

# %% [markdown]
# **1.3** Exact search, which compares the query with every key. `keys` has shape (chunks, d) and `query` (d,), where d
# is the width of a key. Return the numbers of the $k$ nearest keys by squared distance, the nearest first. Of two keys
# at the same distance, the lower number comes first. If there are fewer than $k$ keys, the rest of the answer is −1.


# %% tags=["exercise"]
def nearest(query, keys, k): ...


# %% tags=["check"]
check_1_3(nearest)

# %% [markdown]
# ## What you have gained
#
# - You know what RETRO's database holds: chunks, each once, and a key for each.
# - You know what it gives back: $[N, F]$, a chunk that resembles what was read, and what was written after it.
# - You can read equation 1: a token of chunk $u$ is predicted with the neighbours of the chunks before $u$.
# - You have seen that many of the tokens to come stand in $F$, and what happens when the grid of chunks is moved.
#
# Next: [tutorial 2 · A frozen BERT in a page of NumPy](02_a_frozen_bert.ipynb), which makes keys that hear meaning
# and not only words. If you would rather go straight to the model, go on with
# [tutorial 3](03_backward_passes_by_hand.ipynb), or with [tutorial 4](04_relative_positions.ipynb) if you do not want
# to write backward passes.
