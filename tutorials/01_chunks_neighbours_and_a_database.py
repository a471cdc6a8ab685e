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
# RETRO is a language model with a second memory: beside its weights it has a database of text, and while it reads a
# document it looks up, again and again, what other documents said after something similar. This tutorial builds such
# a database from twenty lines of text, small enough to see all of it.
#
# Afterwards you can
#
# - cut a document into chunks of *m* tokens, and say what happens at its end;
# - say what a **key** and a **value** [N, F] are, and which of the two is compared, and which is read;
# - search a database, and explain the −1 in an answer;
# - explain why F, the continuation, is stored at all: it is where the next chunk's tokens are.
#
# Nothing is needed but the library. All of it runs in a few seconds.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np.kernels.substring import common_prefix_lengths
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.sequences import sequence_neighbours

# %% [markdown]
# ## Twenty lines of text
#
# Five recipes of four lines. They were written so that they have much in common: whoever has read one knows a good
# deal about the next.

# %%
dishes = {"pancakes": "flour", "waffles": "batter", "crumpets": "yeast", "scones": "butter", "muffins": "sugar"}
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
# `build_database` does all of the paper's §2.3: it learns a tokenizer, cuts documents into chunks, makes a key of each
# chunk, indexes the keys, and looks up each chunk's neighbours. The paper's chunks have 64 tokens; ours have 8, so that
# they fit on a line here. Keys need no weights here: each token and each pair of neighbouring tokens is added to some
# columns, the rarer the heavier, with columns and signs that a hash draws. The next tutorial makes keys as the paper
# does, with BERT.
#
# Of each chunk's nearest, `neighbours` are used in training, and `extra_candidates` more are kept for when some of
# these fall
# away, being of the very document that is read. Two of the settings are for so small a corpus: nothing is held out, and
# no document is left out for being like another.

# %%
config = BuildConfig(
    chunk_size=8, vocabulary_size=400, held_out=0.0, neighbours=2, extra_candidates=4, d_key=64, duplicates=None
)
database = build_database(corpus, corpus.parent / "db", config, "hashing")
m = database.chunk_size
print(f"{len(database.documents)} documents, {database.n_chunks} chunks of {m} tokens")
for path in sorted(p for p in database.path.rglob("*") if p.is_file() and not p.name.startswith(".")):
    print(f"  {path.relative_to(database.path).as_posix():32} {path.stat().st_size:7,} bytes")

# %% [markdown]
# ## Chunks
#
# A document is a row of tokens, ended by an end-of-text token, cut every *m* tokens; what is missing to a whole chunk
# at its end is padding, token 0. So chunks never straddle two documents, and chunk *i + 1* goes on where chunk *i*
# stops, as long as both are of the same document.

# %%
split = database.split("train")
which = next(d for d in database.documents if d["name"] == "scones.txt")["id"]
rows = np.flatnonzero(np.asarray(split.documents) == which)
for row in rows:
    tokens = split.tokens[row]
    print(f"chunk {row:3}  {tokens.tolist()!s:44} {database.text(tokens)!r}")

# %% [markdown]
# One chunk a row, a square a token, the shade its number: the last row of each document ends in padding (white).

# %%
figure, axes = plt.subplots(figsize=(5, 6))
tokens = np.asarray(split.tokens)
axes.imshow(np.where(tokens == 0, np.nan, tokens), aspect="auto", cmap="viridis")
for boundary in np.flatnonzero(np.diff(split.documents)) + 0.5:
    axes.axhline(boundary, color="black", linewidth=1)
axes.set(xlabel="token of the chunk", ylabel="chunk", title="the database's chunks; lines between documents")
plt.show()

# %% [markdown]
# ## Keys and values
#
# Each chunk is stored twice over. Its **key** is a vector that stands for what the chunk is about; keys are all that
# a search compares. Its **value** is what a search returns: the chunk itself, N, and the chunk that follows it in its
# document, F. At a document's end there is no F, and padding stands there.

# %%
ids = rows[[0, 1, -1]]
keys, values = np.asarray(database.keys("train")[ids]), database.value(ids)
print("keys  ", keys.shape, " one vector a chunk")
print("values", values.shape, "[N, F]: twice m tokens a chunk")
for chunk, value in zip(ids, values, strict=True):
    print(f"\nchunk {chunk}\n  N {database.text(value[:m])!r}\n  F {database.text(value[m:])!r}")

# %% [markdown]
# ## A search
#
# A query is made into a key in the same way, and the chunks with the nearest keys (squared L2 distance) are its
# neighbours. Ours knows nothing of pies.

# %%
query = "To make pies, take a bowl"
found, distances = database.search(query, k=3)
for chunk, distance in zip(found, distances, strict=True):
    n, f = database.value(chunk)[:m], database.value(chunk)[m:]
    print(f"{distance:.3f}  {database.text(n)!r}\n       and then {database.text(f)!r}")

# %% [markdown]
# Ask for more than there is, and the rest of the answer is −1, at distance infinity; the value of −1 is all padding,
# which the model reads as *no neighbour*.

# %%
found, distances = database.search(query, k=database.n_chunks + 2)
print(found[-4:], distances[-4:])
print(database.value(found[-1]))

# %% [markdown]
# ## Why F is there
#
# A decoder that has read chunk *u* looks up the neighbours of chunk *u* and then predicts chunk *u + 1*. N is like the
# chunk that it has *already read*: that was what it was searched by. What comes next in the neighbour's document is F.
# To see how much of the tokens to come stands in N, in F, and in both, let each document look up its neighbours among
# the *other* documents, as in training (a sequence must not retrieve its own text; tutorial 8 is about what happens if
# it does), and count the tokens of chunk *u + 1* at which a run of three or more ends that stands in a neighbour of
# chunk *u*, too (so the first two tokens of a run do not count).


# %%
def shared_runs(part):
    """The share of tokens to be predicted that end a run of ≥ 3 which stands in a part of a neighbour."""
    hits = total = 0
    for document in range(len(database.documents)):
        rows = np.flatnonzero(np.asarray(split.documents) == document)
        neighbours = sequence_neighbours(database, split, rows[None], k=2)[0]  # (l, k, 2m)
        for u in range(len(rows) - 1):
            following = split.tokens[rows[u + 1]]
            runs = common_prefix_lengths(following, neighbours[u][:, part])
            hits, total = hits + np.sum(runs >= 3), total + np.sum(following != 0)
    return hits / total


shares = {"N": shared_runs(slice(0, m)), "F": shared_runs(slice(m, 2 * m)), "[N, F]": shared_runs(slice(0, 2 * m))}
for name, share in shares.items():
    print(f"{name:7} {100 * share:5.1f} %")
figure, axes = plt.subplots(figsize=(4, 2.5))
axes.bar(list(shares), [100 * share for share in shares.values()], color=["#8c8c8c", "#2b7bba", "#2b7bba"])
axes.set_ylabel("% of the next chunk's tokens")
plt.show()
assert shares["F"] > 3 * shares["N"]

# %% [markdown]
# No run of three tokens to come stands in N, and **60.9 %** of the tokens end one in F. A search by what has been read,
# which gives back what was written after it: that is the whole idea. The paper asks a trained model (table 13, bits per
# byte on C4): .987 without retrieval, .950 with N alone, .895 with F alone, .822 with both. There N helps as well: it
# says what the continuation continues, which a count of shared tokens cannot show.
#
# ## Break it
#
# Chunks lie on a grid that begins with the document. Put one line before a recipe, and every chunk is cut elsewhere;
# the nearest neighbour is then found by what it has in common still, but its continuation begins at another place.

# %%
original = documents["muffins.txt"]
for text in (original, "Wash your hands.\n" + original):
    chunk = database.tokenizer.encode(text).ids[3 * m : 4 * m]
    ids, distances = database.search_keys(database.embed_chunks(np.array([chunk])), 1)
    near = database.text(database.value(ids[0, 0])[:m])
    print(f"{database.text(chunk)!r}\n  nearest, at {distances[0, 0]:.3f}: {near!r}")

# %% [markdown]
# The first chunk is in the database, and found at distance 0. The second is not, and what is nearest to it is cut
# differently. A longer chunk is searched for less often, but matches less well; a short one says less about what it is.
# The paper settles on 64 tokens; this project's small-scale experiments on 16.
#
# ## Exercises
#
# Write your answer in the cell that has the dots. The cell below it, folded away, holds one of ours: leave it folded,
# and delete it, or do not run it, while you try. The cell after that checks whichever was run last.
#
# **1.** Cut a row of tokens into chunks of *m*, ended by end-of-text (token 1), the last one padded with 0.


# %% tags=["exercise"]
def chunked(tokens, m): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def chunked(tokens, m):
    ended = [*tokens, 1]
    padded = ended + [0] * (-len(ended) % m)
    return np.array(padded).reshape(-1, m)


# %% tags=["check"]
for name, text in documents.items():
    which = next(d for d in database.documents if d["name"] == name)["id"]
    stored = split.tokens[np.flatnonzero(np.asarray(split.documents) == which)]
    assert np.array_equal(chunked(database.tokenizer.encode(text).ids, m), stored), name
for length in range(3 * m):
    cut = chunked([7] * length, m)
    expected = [7] * length + [1] + [0] * (m - 1 - length % m)
    assert cut.shape == (length // m + 1, m), f"{length} tokens: {cut.shape}"
    assert cut.reshape(-1).tolist() == expected, f"{length} tokens"
print("right: as the database cut them")

# %% [markdown]
# **2.** The value of chunk *i*, from `split.tokens` (chunks, m) and `split.documents` (chunks,) alone.


# %% tags=["exercise"]
def value_of(i, tokens, documents): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def value_of(i, tokens, documents):
    follows = i + 1 < len(tokens) and documents[i + 1] == documents[i]
    return np.concatenate([tokens[i], tokens[i + 1] if follows else 0 * tokens[i]])


# %% tags=["check"]
all_tokens, all_documents = np.asarray(split.tokens), np.asarray(split.documents)
for i in range(database.n_chunks):
    assert np.array_equal(value_of(i, all_tokens, all_documents), database.value(i)), i
print("right: as the database gives them")

# %% [markdown]
# **3.** Exact search: the ids of the *k* nearest keys, nearest first, where of two at the same distance the lower id
# is first. `keys` is (N, d), `query` is (d,).


# %% tags=["exercise"]
def nearest(query, keys, k): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def nearest(query, keys, k):
    distances = np.sum((keys - query) ** 2, axis=1)
    return np.argsort(distances, kind="stable")[:k]


# %% tags=["check"]
stored = np.asarray(database.keys("train")[:], np.float32)
asked = database.embedder.embed(["Stir the flour with an egg", "eat them warm", "heat the oven"], show_progress=False)
expected, _ = database.search_keys(asked, 5, exact=True)
for row, question in enumerate(asked):
    assert np.array_equal(nearest(question, stored, 5), expected[row]), f"question {row}, the five nearest"
tied = nearest(np.zeros(2), np.array([[1.0, 0], [0, 2], [0, 1], [-1, 0]]), 3)
assert np.array_equal(tied, [0, 2, 3]), f"three at the same distance, in the order of their ids: {tied}"
print("right: as the database finds them")
