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
# Tutorial 10 gave a small model of our own a memory: fresh cross-attention and a fresh encoder, trained from nothing.
# A language model that others trained can already read. Its attention finds what matters in a context, and its layers
# make keys and values of any text. So the memory of `retro_np/nn/memory.py` adds almost nothing. The frozen model
# encodes each neighbour, and in some layers the neighbours' keys and values join the layer's own under one softmax.
#
# This idea has been tried in several forms. Parallel Context Windows (Ratner et al. 2023) is the untrained case: texts
# are encoded apart, and all of them are attended to together. CEPE (Yen et al. 2024) trains an encoder of its own for
# them. In-Context RALM (Ram et al. 2023) writes what was retrieved into the prompt. RETRO (Borgeaud et al. 2022)
# contributes the chunks: each chunk of a text retrieves again, and only the tokens after it read the result.
#
# Afterwards you can
#
# - join two attentions under one softmax, from their outputs and the logarithms of their sums alone;
# - write its backward pass, in which those logarithms have gradients as well;
# - say at which positions a neighbour's keys stand, and why;
# - show that a model with its memory off equals the original to the bit;
# - give a decoder a memory with the package, and tell whether it reads.

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import BuildConfig, TrainingConfig, build_database, gradcheck, init_params, retro, score, train
from retro_np.checking import GradientError
from retro_np.checkpoint import read_meta
from retro_np.experiments.facts import CHUNK, document, invent, write_facts
from retro_np.nn import memory
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.decoders import DecoderConfig, rotary
from retro_np.nn.memory import is_added
from retro_np.pretrained.bundled import MEMORY
from retro_np.sequences import sequence_neighbours
from retro_np.training.memory import add_memory
from retro_np.tree import named_leaves

BLUE, ORANGE, GREY = "#2b7bba", "#e07b1f", "#8c8c8c"
rng = np.random.default_rng(0)

# %% [markdown]
# ## One softmax over two sets of keys
#
# One query q attends to *own* keys k_j with values v_j, those of its sequence. With logits s_j = q·k_j / √c and Z₁ =
# Σ_j exp(s_j), the output is o₁ = Σ_j exp(s_j) v_j / Z₁. The neighbours' tokens, with logits t_i, give o₂ and Z₂ in the
# same way. One softmax over both sets has the sum Z₁ + Z₂, so that
#
# $$o = \frac{Z_1 o_1 + Z_2 o_2}{Z_1 + Z_2} = o_1 + \lambda\,(o_2 - o_1), \qquad
# \lambda = \frac{Z_2}{Z_1 + Z_2} = \sigma(\log Z_2 - \log Z_1),$$
#
# where σ(x) = 1 / (1 + exp(−x)). Two attentions that ran apart are joined exactly, if each returns log Z beside its
# output. This logarithm is called **lse**, for log-sum-exp. Attention kernels compute it in any case, since the
# backward pass needs it (tutorial 11).


# %%
def attention(q, keys, values):
    """q: (n, c); keys, values: (r, c) → out (n, c), lse (n,), and vjp(dout, dlse) → (dq, dkeys, dvalues)."""
    scale = q.shape[-1] ** -0.5
    logits = q @ keys.T * scale
    largest = logits.max(axis=-1, keepdims=True)
    sums = np.exp(logits - largest).sum(axis=-1, keepdims=True)
    weights, lse = np.exp(logits - largest) / sums, (largest + np.log(sums))[:, 0]
    out = weights @ values

    def vjp(dout, dlse):
        dweights = dout @ values.T
        delta = np.sum(dweights * weights, axis=-1, keepdims=True)
        dlogits = weights * (dweights - delta + dlse[:, None]) * scale
        return dlogits @ keys, dlogits.T @ q, weights.T @ dout

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
print(f"joined from two parts against one softmax: the largest difference is {np.abs(joint - together).max():.0e}")
assert np.allclose(joint, together, atol=1e-14)

# %% [markdown]
# The **gate** g is a number for each head that training may move. It is added to all logits of the neighbours, so it
# multiplies Z₂ by exp(g): λ = σ(lse₂ − lse₁ + g). The formula does not ask why one set of keys should count more than
# the other. Two sets need it: a context of 10 tokens meets 256 retrieved ones, whose sum Z₂ is large by their number
# alone. Here 8 heads have random logits, and the neighbours' share grows with how many tokens were retrieved.

# %%
counts = np.array([16, 64, 256, 1024])
own_sums = np.exp(rng.standard_normal((8, 64))).sum(axis=1)
shares = {}
for g in (-2.0, 0.0, 2.0):
    read_sums = np.array([np.exp(rng.standard_normal((8, count))).sum(axis=1) for count in counts])
    shares[g] = (1 / (1 + np.exp(np.log(own_sums) - np.log(read_sums) - g))).mean(axis=1)
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for (g, of_counts), colour in zip(shares.items(), (GREY, BLUE, ORANGE), strict=True):
    axis.plot(counts, of_counts, "o-", color=colour, label=f"gate {g:+.0f}")
axis.set(xscale="log", xlabel="retrieved tokens (the context has 64)", ylabel="the neighbours' share λ", ylim=(0, 1))
axis.set_xticks(counts, [str(count) for count in counts])
axis.legend(frameon=False)
plt.show()
print(f"64 own and 64 retrieved tokens share evenly: {shares[0.0][1]:.1f}")
assert abs(shares[0.0][1] - 0.5) < 0.05

# %% [markdown]
# They share evenly, at **0.5**, where both sets have the same size. Without training, the logits alone decide what is
# relevant. The package begins with gates of +0.5, and training moves them.
#
# ## The backward pass
#
# `join` is elementary: λ depends on lse₁, lse₂ and g through a sigmoid, whose slope is λ (1 − λ). What differs from
# tutorial 3 is inside `attention`. Its second output needs a gradient as well. With P the weights,
#
# ∂ lse / ∂ s_j = exp(s_j) / Z = P_j,
#
# so a small change ṡ changes lse by Σ_j P_j ṡ_j, and dlse adds P_j dlse to ds_j. The softmax of tutorial 3 gave
# ds = P ∘ (dP − δ) with δ = Σ_j dP_j P_j. Together
#
# $$ds = P \circ (dP - \delta + d\mathrm{lse}).$$
#
# The gradient of lse stands where δ stands. A kernel that already subtracts one number per query therefore only needs
# another number to subtract. `gradcheck` takes functions with several outputs, so it can judge both parts, and their
# composition.


# %%
def reading(q, own_keys, own_values, keys, values, gate):
    """A token's attention to its own sequence and to what was retrieved."""
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
        print(f"{name}: {str(error).splitlines()[0]}")


parts = q, own_keys, own_values, keys, values, np.array(0.3)
tried("the whole", reading, *parts)

# %% [markdown]
# ### Break it
#
# Forget the gradient of lse, as if each attention still had one output. The value is right, the loss goes down for a
# while, and queries and keys learn from half of the truth:


# %%
def forgetful(q, own_keys, own_values, keys, values, gate):
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
# The library's `join` is the same for heads and batches. One thing is added: besides the joint result it returns the
# neighbours' part of it, λ o₂, which a trained change of the output matrix reads.

# %%
heads = lambda x: x[None, :, None]  # noqa: E731  # a batch of one sequence, and one head
theirs, part, _ = memory.join(*map(heads, (own, own_lse, read, read_lse)), np.array([0.3]))
assert np.allclose(theirs[0, :, 0], join(own, own_lse, read, read_lse, 0.3)[0])
print(f"the library's join agrees; the neighbours' part has the shape {part.shape}")

# %% [markdown]
# ## Where the neighbours stand
#
# A decoder such as Llama turns queries and keys by angles that grow with their positions (rotary positions, tutorial
# 4). A logit then depends only on the distance from the query back to the key. A causal decoder has never met a
# negative distance: its keys are at or before its queries. The paper's CCA aligns a chunk with its neighbour, so that a
# query near the chunk's beginning has half of the neighbour ahead of it. A fresh cross-attention learns what that
# means; a frozen attention cannot. So the memory puts all keys in the past. Of a neighbour of r tokens they are at 1 …
# r, as if the neighbour were a text of its own behind a begin-of-text token, and query i of a chunk is at r + 1 + i.

# %%
m, r = 4, 8  # tokens of a chunk and of a neighbour [N, F]
query, key = np.arange(m)[:, None], np.arange(r)[None]
alignments = {"aligned as in the paper": m - 1 + query - key, "all keys in the past": (r + 1 + query) - (1 + key)}
for name, distance in alignments.items():
    print(f"{name}: distances from {distance.min()} to {distance.max()}")
figure, axes = plt.subplots(1, 2, figsize=(7, 2), layout="constrained", sharey=True)
for axis, (name, distance) in zip(axes, alignments.items(), strict=True):
    image = axis.imshow(distance, cmap="PuOr", vmin=-12, vmax=12)
    for (i, j), number in np.ndenumerate(distance):
        axis.text(j, i, number, ha="center", va="center", fontsize=8)
    axis.set(title=name, xlabel="the neighbour's token", ylabel="the chunk's query")
plt.show()
assert alignments["all keys in the past"].min() > 0

# %% [markdown]
# The chunk's own keys keep their own positions. So a query is turned twice, to its place in the sequence and to its
# place behind the neighbours, and the two kinds of logits meet only in the softmax. That both neighbours of a chunk
# stand at the same positions is no accident: neither of them precedes the other.

# %%
query, key = rng.standard_normal((2, 1, 1, 1, 8))
logits = [float(np.sum(rotary(query, at + 3, 100.0)[0] * rotary(key, at, 100.0)[0])) for at in (0, 5, 1000)]
print("the same distance at three places:", " ".join(f"{logit:.6f}" for logit in logits))
assert np.allclose(logits, logits[0])

# %% [markdown]
# ## Off is the original
#
# Where nothing was retrieved, Z₂ is an empty sum: lse₂ = −∞. Then λ = σ(−∞) is exactly 0, whatever the gate is, and
# o₁ + 0 · (o₂ − o₁) is o₁, to the bit. No branch in the code is needed for this. A model with a memory that retrieves
# nothing is the original model, and so is each token before the end of its first chunk.

# %%
config = DecoderConfig(40, 16, 32, n_heads=4, d_head=4, n_layers=3, n_kv_heads=2, chunk_size=m)
base = init_params(config, np.random.default_rng(1))
with_memory, added = add_memory(base, config, (2, 3), np.random.default_rng(2), begin_id=0, rank=2)
tokens, neighbours = rng.integers(1, 40, (1, 3 * m)), rng.integers(1, 40, (1, 3, 2, r))
original, off = retro(base, config, tokens, None)[0], retro(with_memory, added, tokens, None)[0]
on = retro(with_memory, added, tokens, neighbours)[0]
print(f"off against the original: {np.abs(off - original).max()}")
print("on, the largest change of a token's logits:", np.abs(on - original).max(axis=-1)[0].round(3))
assert np.array_equal(off, original)
assert np.array_equal(on[:, : m - 1], original[:, : m - 1])

# %% [markdown]
# The first three tokens are unchanged, since a chunk of four retrieves only when its last token is there (tutorial 5).
# Off differs from the original by **0.0**.
#
# ## A small decoder that learns to read
#
# Now the package's own functions, on a decoder that is small enough to be trained here. First it becomes a language
# model, of texts that state an invented fact twice, in other words. Such a model has a reason to look back: the second
# statement repeats the first one's name and code. Then its training is over, and it meets the corpus of tutorial 10.
# There a document states each fact once, and the other document of the same name stands in the database.

# %%
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
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


print(f"base: {bits(base, config, k=0):.3f} bits per byte of the held-out documents")

# %% [markdown]
# `add_memory` shares the base's arrays and adds to each layer that reads a gate for each head, and changes of rank 8 to
# the queries, keys, values and outputs of what is retrieved: W + D U, where D is (d, 8) and U is (8, d) (LoRA, Hu et
# al. 2022). U begins as zero, so an untrained memory reads with the base's own matrices. Training changes nothing else.
# A quarter of the chunks get random neighbours in training; otherwise the model would learn that what is retrieved is
# always of use.

# %%
untrained, config = add_memory(base, config, (1, 2, 3), np.random.default_rng(0), begin_id=1, rank=8)
settings = replace(training, steps=150, batch_size=4, random_share=0.25, weight_decay=0.0)
trained = train(database, config, settings, folder / "memory", begin_from=(untrained, "base"), trainable=is_added)
leaves, before = dict(named_leaves(trained)), dict(named_leaves(base))
numbers = {kind: sum(leaf.size for name, leaf in leaves.items() if is_added(name) == kind) for kind in (True, False)}
print(f"trained: {numbers[True]:,} numbers, beside {numbers[False]:,} of the base")
assert all(np.array_equal(leaves[name], array) for name, array in before.items())
conditions = {"off": {"k": 0}, "on": {"k": 1}, "others'": {"k": 1, "shuffle_seed": 0}}
results = {name: bits(trained, config, **condition) for name, condition in conditions.items()}
for name, figure in results.items():
    print(f"{name:8} {figure:.3f} bits per byte, {100 * (figure / results['off'] - 1):+.1f} %")
assert results["off"] == bits(base, replace(config, cca_layers=(), rank=None), k=0)
assert results["on"] < results["off"]
assert results["on"] < results["others'"]

# %% [markdown]
# Judge a memory by *on* against *others'*, in which each chunk reads what another chunk retrieved. A model that only
# learned how the corpus is written gains in both. One that reads gains with its own neighbours and loses with others'.
#
# `attention_maps` shows what was read. In a layer with a memory, the weights of a query sum to 1 over its own tokens
# and the retrieved ones together, so the neighbours' part of this sum is the share λ:

# %%
valid = database.split("valid")
names = np.array([record["name"].split()[0] for record in database.documents])
nearest = database.document_of(valid.neighbours[::2][:, 0])  # of each document's first chunk
first = 2 * np.flatnonzero(names[nearest] == names[valid.documents[::2]])[0]
rows = np.array([[first, first + 1]])
tokens = valid.tokens[rows[0]].reshape(1, -1).astype(np.int64)
retrieved = sequence_neighbours(database, valid, rows, 1)
maps = attention_maps(trained, config, tokens, memory.model_neighbours(trained, config, retrieved))
share = np.mean([w[0].sum(axis=(-1, -2)) for name, w in maps.items() if name.endswith("cca")], axis=0)  # (l, h, m)
print(f"text:      {database.text(tokens[0, :CHUNK])!r}, then {database.text(tokens[0, CHUNK:])!r}")
print(f"retrieved: {database.text(retrieved[0, 0, 0])!r}")
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
image = axis.imshow(share[0], aspect="auto", cmap="Greens", vmin=0, vmax=1)
predicted = [database.text([token]) for token in tokens[0, CHUNK : 2 * CHUNK]]
axis.set_xticks(range(CHUNK), [text if text.strip() else "·" for text in predicted])
axis.set(xlabel="the token that is predicted", ylabel="head", title="the share of the attention on what was retrieved")
figure.colorbar(image)
plt.show()
assert np.all((share[0] > 0) & (share[0] < 1))

# %% [markdown]
# ## A real language model
#
# `retro-np demo --memory FOLDER` does the same with SmolLM2, 135 million parameters, and a folder of yours; nothing is
# trained, because the package contains a trained memory. This is what its file says:

# %%
stored = read_meta(MEMORY)
model = stored["config"]
rank, layers = model["rank"], model["cca_layers"]
print(f"base: {stored['base']['name']}; layers that read: {layers} of {model['n_layers']}; rank {rank}")
print(f"{MEMORY.stat().st_size / 1e6:.1f} MB; chunks of {model['chunk_size']} tokens")

# %% [markdown]
# [docs/models.md](../docs/models.md) has the commands, and the memory's model card
# ([README.md](../retro_np/pretrained/smollm2/README.md)) says what it was trained on and what it gains.
#
# ## Exercises
#
# **1.** Three sets of keys. `parts` is a list of (out (n, c), lse (n,)). Return the output (n, c) of one softmax over
# all sets.


# %% tags=["exercise"]
def join_all(parts): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def join_all(parts):
    outs, lses = np.stack([out for out, _ in parts]), np.stack([lse for _, lse in parts])
    weights = np.exp(lses - lses.max(axis=0))
    return np.sum(outs * (weights / weights.sum(axis=0))[..., None], axis=0)


# %% tags=["check"]
sets = [(rng.standard_normal((size, c)), rng.standard_normal((size, c))) for size in (3, 1, 6)]
for shift in (0.0, 1000.0):  # Logits may be large: exp(1000) is not a number that float64 has.
    parts = [attention(q, keys, values)[0] for keys, values in sets]
    whole, _ = attention(q, *(np.concatenate(each) for each in zip(*sets, strict=True)))
    answer = join_all([(out, lse + shift) for out, lse in parts])
    assert answer.shape == (n, c), answer.shape
    assert np.allclose(answer, whole[0]), "not the softmax over all keys"
print("right: three sets, also with large logits")

# %% [markdown]
# **2.** The other way round: given the joint output, own and λ (n,), and dout, return the gradient (n,) of the logit of
# λ without o₂. (o₂ − o₁ = (o − o₁) / λ, so no division is needed.)


# %% tags=["exercise"]
def logit_gradient(joint, own, share, dout): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def logit_gradient(joint, own, share, dout):
    return (1 - share) * np.sum(dout * (joint - own), axis=-1)


# %% tags=["check"]
dout = rng.standard_normal((n, c))
for gate in (-1.0, 0.5):
    joint, join_vjp = join(own, own_lse, read, read_lse, gate)
    share = 1 / (1 + np.exp(own_lse - read_lse - gate))
    assert np.allclose(logit_gradient(joint, own, share, dout), join_vjp(dout)[3]), f"gate {gate}"
    assert np.isfinite(logit_gradient(own, own, np.zeros(n), dout)).all(), "λ = 0 must not divide by zero"
print("right: without the output of the second attention, and at λ = 0")

# %% [markdown]
# **3.** What does reading cost? A chunk of m tokens reads k neighbours of r = 2 m tokens. Count the products of a query
# and a key in one layer and head: those of self-attention in a text of n tokens (token t reads t keys, from 1 on), and
# those that the memory adds for all chunks but the last. Return both.


# %% tags=["exercise"]
def products(n, m, k): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def products(n, m, k):
    return n * (n + 1) // 2, (n // m - 1) * m * k * 2 * m


# %% tags=["check"]
for length, chunk, count in ((12, 4, 2), (512, 64, 2)):
    own_count = sum(1 for t in range(length) for j in range(length) if j <= t)
    read_count = sum(count * 2 * chunk for _ in range(length // chunk - 1) for _ in range(chunk))
    assert products(length, chunk, count) == (own_count, read_count), (length, chunk, count)
print("right; of 512 tokens in chunks of 64, reading two neighbours: own {:,}, read {:,}".format(*products(512, 64, 2)))
