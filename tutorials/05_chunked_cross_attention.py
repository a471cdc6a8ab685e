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
# # 5 · Chunked cross-attention, whole
#
# ![RETRO as a whole; you are here: chunked cross-attention](../docs/landing/retro-5.svg)
#
# You have read half a sentence. Somebody looks it up in a library and hands you the page where it goes on. From which
# word on may you use that page? If you take it too late, it no longer helps with the word that you needed it for. If
# you take it too early, you read what you are supposed to guess. Your guesses become wonderful and mean nothing. RETRO
# answers this question in one operator, chunked cross-attention or CCA, and the answer hangs on a single index.
#
# *Reading: about 60 minutes · runs in 10 s on one core · needs tutorials 3 and 4.*
#
# *On the path “Understand it” of the book's contents, read as far as the end of “The off-by-one”, and pass over
# what is said of pullbacks. Of tutorial 4 you need what stands before “A vector for each distance”, and of 3 nothing.*
#
# Afterwards you can
#
# - say which token reads which neighbours, and write it as an equation and as a matrix;
# - explain why the shift is $m - 1$: what $m$ wastes, and what $m - 2$ gives away;
# - test any model for such a leak from outside, without reading its code;
# - say what padding, a missing neighbour and another order of the neighbours do;
# - write the whole of CCA, forward and backward, in NumPy alone.
#
# Previous: [4 · Chunked cross-attention, and why it needs positions](04_relative_positions.ipynb) · Next: [6 · The
# neighbour encoder and the whole of algorithm 1](06_the_neighbour_encoder_and_algorithm_1.ipynb) · All letters:
# [symbols](../docs/symbols.md) · The paper: [Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426), section 2.4

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import matplotlib.pyplot as plt
import numpy as np

from retro_np import EncoderConfig, RetroConfig, adamw_init, adamw_update, gradcheck, init_params, reference, retro
from retro_np.nn.attention import attend, relative_attention, self_attention
from retro_np.nn.cca import cca
from retro_np.nn.checks import perturbed_params
from retro_np.nn.encoder import encode
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import cross_entropy, embedding, linear, log_softmax, rms_norm
from retro_np.nn.scope import Scope
from retro_np.tutorials.checks.tutorial_05 import check_5_1, check_5_2, check_5_3, check_5_4, check_5_5, check_5_6

BLUE, ORANGE, GREY, PALE, DARK = "#2b7bba", "#e07b1f", "#8c8c8c", "#c9dff0", "#1b4f7a"

# %% [markdown]
# ## Where we stand
#
# [Tutorial 4](04_relative_positions.ipynb) wrote the forward pass of CCA in fifteen lines, for one head and one
# sequence. A sequence of $n$ tokens is cut into chunks $C_1, \dots, C_\ell$ of $m$. As soon as its last token is
# there, $C_u$ is looked up. It finds $\mathrm{RET}(C_u)$, $k$ neighbours $[N, F]$ of $r = 2m$ tokens each. An encoder
# makes a vector of width $d'$ for each of their tokens. These vectors are $E_u$. The text and the figures count tokens
# and chunks from 1, as the paper does. Code counts from 0.

# %%
n, m, k = 12, 4, 2  # tokens of the sequence, tokens of a chunk, neighbours of a chunk
n_chunks, r = n // m, 2 * m  # ℓ chunks; tokens of a neighbour [N, F]

# %% tags=["hide-input"]
COLOURS = [PALE, BLUE, DARK]  # one for each chunk


def box(axes, left, bottom, width, height, text, colour="white"):
    """A rectangle with a text in it."""
    axes.add_patch(plt.Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="black", linewidth=0.6))
    ink = "white" if colour in (BLUE, DARK, ORANGE) else "black"
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", color=ink, fontsize=8)


def draw_path(axes):
    """From a chunk by way of the database to the tokens that read its neighbours."""

    def arrow(start, end, label=""):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY})
        middle_x, middle_y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(middle_x + 0.12, middle_y, label, fontsize=8, color="#444444", va="center")

    read = ["white"] * (m - 1) + [colour for colour in COLOURS for _ in range(m)]
    for t in range(n):
        box(axes, t, 7, 1, 0.6, t + 1, COLOURS[t // m])
        box(axes, t, 0, 1, 0.6, t + 1, read[t])
    box(axes, 0, 5.2, n, 0.7, "database: a key for each stored chunk $N$; the value is $[N, F]$", "#eeeeee")
    for u in range(n_chunks):
        middle = u * m + m / 2
        axes.text(middle, 7.75, f"$C_{u + 1}$", ha="center", fontsize=9)
        arrow((middle, 7), (middle, 5.9), "key, by a frozen BERT" if u == 0 else "key")
        arrow((middle, 5.2), (middle, 4.35), "nearest" if u == 0 else "")
        for j in reversed(range(k)):
            for part, name in enumerate("NF"):
                text = f"${name}$" if j == 0 else ""  # the first neighbour lies on top
                box(axes, u * m + 0.45 + 1.4 * part + 0.2 * j, 3.5 + 0.22 * j, 1.4, 0.6, text)
        arrow((middle, 3.5), (middle, 2.6), "encoder" if u == 0 else "")
        box(axes, middle - 0.6, 2, 1.2, 0.6, f"$E_{u + 1}$", COLOURS[u])
        first, last = (u + 1) * m - 1, min((u + 2) * m - 1, n)  # the attending chunk, as edges of its boxes
        arrow((middle, 2), ((first + last) / 2, 0.75), "")
        axes.plot([first + 0.1, last - 0.1], [0.7, 0.7], color="black", linewidth=1)
        axes.text((first + last) / 2, -0.15, f"$H_{u + 1}^+$", ha="center", va="top", fontsize=9)
    axes.text(-0.2, 7.3, "looked up", ha="right", va="center", fontsize=9)
    axes.text(-0.2, 0.3, "reads", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-1.8, n + 0.1), ylim=(-0.8, 8.3))
    axes.axis("off")


figure, axes = plt.subplots(figsize=(8, 4.4))
draw_path(axes)
plt.show()

# %% [markdown]
# *Figure 5.1.* The same twelve tokens twice: above as they are looked up, below coloured by the $E_u$ that they read.
# What $C_u$ has found is read from the last token of $C_u$ on.
#
# Why may the last token of $C_u$, token $um$, read $E_u$ already? Its output predicts the first token of $C_{u+1}$, and
# equation 1 allows that token the neighbours of $C_u$. The reading goes on for $m$ tokens, until $E_{u+1}$ takes over.
# These $m$ tokens are the **attending chunk** $H_u^+$. The paper's equation 3 says what happens to them. For every
# chunk $u = 1, \dots, \ell$ and every place $i = 1, \dots, m$ in its attending chunk,
#
# $$H_u^{+} = (h_{um},\, h_{um+1},\, \dots,\, h_{um+m-1}), \qquad
# \mathrm{CCA}(H, E)_t = h_t + \mathrm{CA}\bigl(\mathrm{norm}(h_t),\, E_u\bigr) \ \text{ for } t = um + i - 1 \le n.$$
#
# $h_t$ is the row of the activations $H$ that belongs to token $t$. CA is the attention of tutorial 4: one query, and
# one softmax over all $k\,r$ vectors of $E_u$. The norm and the sum are written out here. The paper counts the sum as
# part of its CA and leaves the norm out. Tokens $1, \dots, m-1$ stand in no attending chunk. For them CCA changes
# nothing, since nothing has been looked up yet. Their number, $m - 1$, is CCA's **shift**.
#
# ## The cut is a matrix
#
# A computer does not go through equation 3 token by token. It cuts the sequence into attending chunks, lets each of
# them attend to its own $E_u$, and lays the results back where the tokens came from. Call the cut $S$. Row $a$ of its
# result is row $a + m - 1$ of the sequence, counted from 0. Where the sequence has ended, the result is a row of zeros.
# That makes $S$ a matrix of zeros and ones with $\ell m$ rows and $n$ columns, and NumPy has a name for it: `np.eye`
# with its ones on another diagonal.

# %%
S = np.eye(n_chunks * m, n, k=m - 1)  # row a has its one in column a + m − 1
numbers = np.arange(1.0, n + 1)
print("attending chunks, 0 where there is no token:")
for u, row in enumerate((S @ numbers).reshape(n_chunks, m).astype(int)):
    print(f"  E_{u + 1} is read by tokens {row}")
print("laid back:", (S.T @ (S @ numbers)).astype(int))

# %% [markdown]
# The last line shows the way back. $S^\top$ puts each row of an attending chunk where it came from. It leaves zeros in
# the first $m - 1$ places, and it drops the rows that stood beyond the end.
#
# If $n$ is not a multiple of $m$, at most $m - 1$ tokens are left over at the end. They stand in the last attending
# chunk, $H_\ell^+$. So they read $E_\ell$, but they form no whole chunk, and nothing is looked up for them.
#
# A matrix is more than a notation here. As before, $\mathrm{d}x$ stands for $\partial \mathcal{L} / \partial x$, the
# gradient of the loss with respect to $x$, and a pullback computes $\mathrm{d}x$ from $\mathrm{d}y$. The pullback of
# $Y = S X$ is $\mathrm{d}X = S^\top \mathrm{d}Y$, as for every linear map ([tutorial
# 3](03_backward_passes_by_hand.ipynb)). So a part of CCA's backward pass is already written.
#
# ## Where does a neighbour stand?
#
# Attention with relative positions needs a distance for each pair of query and key. A neighbour comes from another
# document, so where does it stand? $N$ was found because it resembles $C_u$. Lay it beside $C_u$. Then $F$, which
# continues $N$, lies beside $C_{u+1}$, which continues $C_u$. Now every token of the neighbour stands beside a token of
# the sequence, and the distance is counted along the sequence.

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.4, 3.2))
for j in range(r):
    box(axes, j, 6.2, 1, 0.8, "", PALE if j < m else BLUE)
    box(axes, j, 5.1, 1, 0.8, f"$j={j}$")
    for i in range(m):
        distance = i - j + m - 1
        colour = {0: "#dddddd", -1: ORANGE}.get(distance, "white")
        box(axes, j, 3.8 - i, 0.96, 0.9, f"{distance}".replace("-", "−"), colour)
for i in range(m):
    axes.text(-0.2, 4.25 - i, f"query $i={i}$", ha="right", va="center", fontsize=9)
    axes.text(m - 0.5 + i, 6.6, f"$i={i}$", ha="center", va="center", fontsize=8, color="black" if i == 0 else "white")
for x, label in ((m / 2, "$C_u$"), (m + m / 2, "$C_{u+1}$")):
    axes.text(x, 7.15, label, ha="center", fontsize=9)
axes.text(-0.2, 6.6, "sequence", ha="right", va="center", fontsize=9)
axes.text(-0.2, 5.5, "neighbour $[N, F]$", ha="right", va="center", fontsize=9)
axes.set(xlim=(-2.6, r + 0.05), ylim=(0.7, 7.8))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 5.2.* The distance $i - j + m - 1$ of each query $i$ and key $j$, both counted from 0. Grey: the key beside
# the query itself, at distance 0. For query 0, the last token of $C_u$, this is key $m - 1$, and for each next query it
# is one key further right. Orange: the key at distance $-1$, beside the token that the query has to predict, as in
# figure 4.2.
#
# All $k$ neighbours lie in the same place, one on top of the other. With the distance $\delta = i - j + m - 1$, the
# score of query $i$ and key $j$ is that of tutorial 4:
#
# $$Z_{ij} = \frac{(Q_i + b_c) \cdot K_j + (Q_i + b_p) \cdot T_{\delta}}{\sqrt{c}}, \qquad T_\delta = R_\delta W_R$$
#
# Here $c$ is the width of a head. The content bias $b_c$ and the position bias $b_p$ are `params["u"]` and
# `params["v"]` in code. In short: $T_\delta$ is a vector for the distance $\delta$, made from fixed sines and cosines
# $R_\delta$ by a learned matrix $W_R$, and the biases are two learned vectors. So a head can prefer certain words,
# certain distances, or both.
#
# ## The whole forward pass
#
# Every block of RETRO normalises what it reads and adds its result to what came in. With $X = \mathrm{norm}(H)$,
#
# $$Y = H + S^\top\, \mathrm{CA}(S X,\, E)$$
#
# In words: normalise, cut, attend, lay back, add. Attending chunks do not see one another. So they become rows of a
# larger batch, and an array of shape `(B, n_chunks, …)` is reshaped to `(B * n_chunks, …)`.
#
# The library's `attend` is CA. It has the projections $W_Q, W_K, W_V, W_O$ and $W_R$, and the same function serves
# self-attention. The queries have shape `(rows, 1, m, d)`, a row for each attending chunk. The axis of length 1 is for
# groups of queries, and CCA has one group. The context has shape `(rows, k, r, d')`. `offset` is the constant in the
# distance. In the exercises you write all of this yourself.
#
# The function below is CCA for any batch, with all heads. One thing is more general than in the library: the shift is
# an argument. The distance goes with it. Query $i$ stands $i + \mathrm{shift}$ tokens behind the first token of $C_u$,
# and key $j$ is laid beside the token that stands $j$ behind it. So their distance is $i + \mathrm{shift} - j$. The
# lower half, `vjp`, is the pullback. Skip it for now. We come back to it when the forward pass is understood.


# %%
def cca_with(shift, params, h, encoded, key_mask, n_heads=2):
    """CCA in which the first `shift` tokens read nothing. The paper's shift is m − 1.

    h: (B, n, d). encoded: (B, ℓ, k, r, d'). key_mask: (B, ℓ, k, r), False at padding."""
    (B, n, d), (_, n_chunks, k, r, _) = h.shape, encoded.shape
    m, rows = r // 2, B * n_chunks
    S = np.eye(n_chunks * m, n, k=shift)

    normed, norm_vjp = rms_norm(h, params["norm"])
    queries = (S @ normed).reshape(rows, 1, m, d)
    context, mask = encoded.reshape(rows, k, r, -1), key_mask.reshape(rows, k, r)
    update, attend_vjp = attend(params, queries, context, n_heads, offset=shift, key_mask=mask)
    y = h + S.T @ update.reshape(B, n_chunks * m, d)

    def vjp(dy):
        dupdate = (S @ dy).reshape(update.shape)
        grads, dqueries, dcontext = attend_vjp(dupdate)
        dnormed = S.T @ dqueries.reshape(B, n_chunks * m, d)
        dh, grads["norm"] = norm_vjp(dnormed)
        return grads, dy + dh, dcontext.reshape(encoded.shape)

    return y, vjp


# %% [markdown]
# Is it right? Two judges can tell. One is the library's `cca`. The other is `reference.chunked_cross_attention`, which
# goes through equation 3 with plain loops, one token at a time, and shares no code with `cca`. For the parameters we
# take a small RETRO. `perturbed_params` moves its parameters away from their first values. At first all gains are one
# and both biases are zero, and a bias that was forgotten would not show.

# %%
encoder = EncoderConfig(d_model=6, d_ffw=12, n_heads=2, d_head=3, n_layers=1, ca_layers=())
# A vocabulary of 20 tokens, width d = 8, 16 columns inside the FFW.
config = RetroConfig(20, 8, 16, n_heads=2, d_head=4, n_layers=1, cca_layers=(1,), chunk_size=m, encoder=encoder)
params = perturbed_params(config)
layer = params["layers"][0]

rng = np.random.default_rng(0)
h = rng.standard_normal((1, n, 8))
encoded, key_mask = rng.standard_normal((1, n_chunks, k, r, 6)), np.ones((1, n_chunks, k, r), bool)
value, _ = cca_with(m - 1, layer["cca"], h, encoded, key_mask)
from_library, _ = cca(layer["cca"], h, encoded, key_mask, 2, m)
pairs = [[(np.ones(r), e) for e in encoded[0, u]] for u in range(n_chunks)]  # as the loops want them
by_loops = reference.chunked_cross_attention(layer["cca"], h[0], pairs, 2, m)
print(f"largest difference from the library {np.abs(value - from_library).max():.0e}")
print(f"largest difference from the loops   {np.abs(value - by_loops).max():.0e}")
assert np.allclose(value, from_library)
assert np.allclose(value, by_loops)

# %% [markdown]
# ## The off-by-one
#
# Why $m - 1$, and not $m$ or $m - 2$? The difference is one token, every shape stays the same, and no error is raised.
# Nor does the loss complain. It can be lowest with a wrong shift, as we shall see. So we need a test that does not
# trust the loss.
#
# For the test we put CCA into a model. It is the paper's algorithm 1 with a single layer, written out so that we can
# exchange the shift. The neighbour encoder belongs to the next tutorial. Here it only makes vectors of the retrieved
# tokens, and `ca_layers=()` above keeps it from looking at the chunk. The database is a stand-in. All that matters for
# the test is that its answer depends on every token of the chunk and on nothing else. So the tokens of the chunk seed
# a generator, and the generator draws the neighbours.


# %%
def retrieve(tokens):
    """RET of each whole chunk: (B, n) → (B, ℓ, k, r)."""
    chunks = tokens.reshape(len(tokens), -1, m)
    return np.array([[np.random.default_rng(chunk).integers(1, 20, (k, r)) for chunk in row] for row in chunks])


def logits_of(tokens, neighbours, shift=m - 1):
    """Algorithm 1 with one layer, and a shift of our choice."""
    h, _ = embedding(params["embedding"], tokens)
    h, _ = self_attention(layer["attention"], h, config.n_heads, causal=True)
    table, values = params["encoder"]["embedding"], neighbours.reshape(-1, k, r)
    e, _ = encode(params["encoder"], table, values, h.reshape(-1, m, 8), config.encoder)
    h, _ = cca_with(shift, layer["cca"], h, e.reshape(*neighbours.shape, -1), neighbours != 0)
    h, _ = ffw(layer["ffw"], h)
    h, _ = rms_norm(h, params["norm"])
    return linear(h, params["readout"])[0]


tokens = rng.integers(1, 20, (1, n))
difference = logits_of(tokens, retrieve(tokens)) - retro(params, config, tokens, retrieve(tokens))[0]
print(f"with shift m − 1, the largest difference from the library's model is {np.abs(difference).max():.0e}")
assert np.abs(difference).max() < 1e-9

# %% [markdown]
# ### A test from outside
#
# A language model's output at token $t$ predicts token $t + 1$. It may depend on tokens $1, \dots, t$ and on nothing
# later. Whether it does can be tried from outside:
#
# 1. change one token;
# 2. **look up the neighbours of its chunk again**;
# 3. see which outputs move.
#
# An output that moves although it stands before the changed token knows something of what is still to come. That is a
# leak.
#
# The second step is easily forgotten. If the neighbours are held fixed, the changed token cannot reach anybody by way
# of the database, and in our small model every shift passes. A second warning: a real database may well give the same
# answer to the changed chunk. The retrieval of a test must depend on every token, as ours does.


# %%
def reach(model, tokens):
    """(n, n): whether the output at token t, the column, moves when token s, the row, is changed."""
    before, moves = model(tokens), []
    for s in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[0, s] = changed[0, s] % 19 + 1  # another token, never padding
        moves.append(np.abs(model(changed) - before)[0].max(axis=1) > 1e-9)
    return np.array(moves)


def leaks(moves):
    """The pairs in which the output stands before the token that was changed."""
    return np.tril(moves, -1)


kept = retrieve(tokens)
print("shift   leaks   leaks, neighbours held fixed   first token that RET(C_1) helps to predict")
for shift in range(m, -1, -1):
    again = leaks(reach(lambda x, s=shift: logits_of(x, retrieve(x), s), tokens)).sum()
    fixed = leaks(reach(lambda x, s=shift: logits_of(x, kept, s), tokens)).sum()
    other = np.concatenate([kept[:, :1] % 19 + 1, kept[:, 1:]], axis=1)  # C_1 retrieves something else
    helped = np.abs(logits_of(tokens, other, shift) - logits_of(tokens, kept, shift))[0].max(axis=1) > 1e-9
    print(f"{shift:5} {again:7} {fixed:30} {np.argmax(helped) + 2:44}")
    assert (again == 0) == (shift >= m - 1)


# %% tags=["hide-input"]
def draw_reading(axes, shift):
    """Chunks above, what each retrieved below; a line from each token to what it reads if the first `shift` do not."""
    chunk_read = [None] * shift + [u for u in range(n_chunks) for _ in range(m)]
    for t, u in zip(range(n), chunk_read, strict=False):
        box(axes, t + 0.06, 2, 0.88, 0.8, t + 1, COLOURS[t // m])
        if u is not None:
            leak = t < (u + 1) * m - 1  # C_u has tokens after this one
            axes.plot([t + 0.5, u * m + 3], [1.95, 0.65], color=ORANGE if leak else GREY, linewidth=2 if leak else 1)
    for u in range(n_chunks):
        box(axes, u * m + 2, 0, 2, 0.6, f"$E_{u + 1}$", COLOURS[u])
    axes.set(xlim=(0, n), ylim=(-0.1, 2.9))
    axes.axis("off")


figure, panels = plt.subplots(2, 3, figsize=(9, 4.6), height_ratios=[1, 2])
for (above, below), shift in zip(panels.T, (m, m - 1, m - 2), strict=True):
    draw_reading(above, shift)
    above.set_title({m: "shift m: wasteful", m - 1: "shift m − 1: right", m - 2: "shift m − 2: a leak"}[shift])
    moves = reach(lambda x, s=shift: logits_of(x, retrieve(x), s), tokens)
    picture = np.ones((n, n, 3))
    picture[moves], picture[leaks(moves)] = [0.79, 0.87, 0.94], [0.88, 0.48, 0.12]
    below.imshow(picture)
    below.plot([-0.5, n - 0.5], [-0.5, n - 0.5], color=GREY, linewidth=0.8)
    below.set(xticks=range(0, n, 2), yticks=range(0, n, 2), xlabel="output at token, blue if it moves")
    below.set_xticklabels(range(1, n + 1, 2))
    below.set_yticklabels(range(1, n + 1, 2))
panels[1, 0].set_ylabel("token that is changed")
plt.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.3.* Above: which $E_u$ each token reads. Below: which outputs move when a token is changed. Below the
# diagonal, an output that moves is a leak, and is orange. By the table above the figure, $m - 1$ is the smallest shift
# that has none.
#
# With shift $m - 2$, token $um - 1$ reads what $C_u$ retrieved. Its output is to predict token $um$, the last of
# $C_u$, and that token was part of the search. This gives one leak for each chunk. With shift $m - 3$ there are three
# for each chunk: the output at token $um - 2$ knows two tokens too many, and the output at token $um - 1$ knows one.
#
# With shift $m$ there is no leak, but there is waste. $\mathrm{RET}(C_1)$ first helps to predict token $m + 2$. Token
# $m + 1$, the very first after the chunk, has to be predicted without it. Shift $m - 1$ is the only one that reads
# $\mathrm{RET}(C_u)$ as soon as equation 1 allows, and no sooner.
#
# There is one more way for a leak: through the encoder, when it looks at the chunk. [Tutorial
# 6](06_the_neighbour_encoder_and_algorithm_1.ipynb) tests for this leak, and finds what we found here: a leak with
# shift $m - 2$, and none with shift $m - 1$.
#
# ## What a leak is worth
#
# A model learns to use a leak. To see how much it is worth, take a text of which nothing can be known: each token is
# one of 15, drawn at random. An honest model that has no copy of the text cannot need less than $\ln 15$ nats per
# token on average. Now give a model a database, in one of two ways:
#
# - **What was asked.** $\mathrm{RET}(C_u) = [C_u, \text{padding}]$. The database repeats what the decoder has read
#   already, and nothing more. No honest model can gain from it.
# - **The continuation too.** $\mathrm{RET}(C_u) = [C_u, C_{u+1}]$, as if the database held a copy of the text. Then
#   every token from $C_2$ on can be read.
#
# The model is small: an embedding for the tokens, one CCA and a readout. It has no encoder. A second embedding,
# `values`, makes a vector of each retrieved token, and these vectors serve as $E$. We train the model with each shift
# for 150 steps. The pullback of CCA, which training needs, is the `vjp` above.


# %%
def one_step(params, tokens, targets, neighbours, shift):
    """The nats of each target, and the gradients of both embeddings, CCA and readout."""
    h, h_vjp = embedding(params["embedding"], tokens)
    e, e_vjp = embedding(params["values"], neighbours)
    y, cca_vjp = cca_with(shift, params["cca"], h, e, neighbours != 0)
    logits, readout_vjp = linear(y, params["readout"])
    _, loss_vjp = cross_entropy(logits, targets)
    (dlogits,) = loss_vjp(1.0)
    dy, dreadout = readout_vjp(dlogits)
    dcca, dh, de = cca_vjp(dy)
    (dembedding,), (dvalues,) = h_vjp(dh), e_vjp(de)
    grads = {"embedding": dembedding, "values": dvalues, "cca": dcca, "readout": dreadout}
    return -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0], grads


def learned(shift, continued, steps=150, chunks=6):
    """Nats by the place of the predicted token in its chunk: chunks 2 … ℓ, the mean of the last 20 steps."""
    rng, seen, d = np.random.default_rng(1), [], 32
    narrow = {"d_model": d, "d_ffw": d, "n_heads": 2, "d_head": 16, "n_layers": 1}
    small = RetroConfig(16, **narrow, cca_layers=(1,), chunk_size=m, encoder=EncoderConfig(**narrow))
    fresh = init_params(small, rng)
    params = {"embedding": fresh["embedding"], "values": fresh["encoder"]["embedding"], "readout": fresh["readout"]}
    params["cca"] = fresh["layers"][0]["cca"]
    state = adamw_init(params)
    for _ in range(steps):
        text = rng.integers(1, 16, (16, chunks * m + 1))
        asked = text[:, :-1].reshape(16, chunks, 1, m)  # one neighbour for each chunk: k = 1
        continuation = np.roll(asked, -1, axis=1) * (np.arange(chunks) < chunks - 1)[:, None, None] * continued
        retrieved = np.concatenate([asked, continuation], axis=-1)
        nats, grads = one_step(params, text[:, :-1], text[:, 1:], retrieved, shift)
        adamw_update(params, grads, state, lr=1e-2)
        seen.append(nats[:, m - 1 : -1].reshape(-1, m).mean(axis=0))
    return np.mean(seen[-20:], axis=0)


# %%
shifts = (m, m - 1, m - 2, m - 3)
results = {continued: [learned(shift, continued) for shift in shifts] for continued in (False, True)}
print(f"an honest model without a copy: ln 15 = {np.log(15):.2f} nats")
for continued, rows in results.items():
    answer = "[C_u, C_{u+1}]" if continued else "[C_u, padding]"
    print(f"\nRET(C_u) = {answer}: nats by the place of the predicted token in its chunk")
    for shift, row in zip(shifts, rows, strict=True):
        print(f"  shift {shift}:   " + "   ".join(f"{nats:.1f}" for nats in row), f"  mean {np.mean(row):.2f}")
(wasteful, right, leak, worse), (wasteful_f, right_f, _, _) = results.values()
assert min(right.min(), wasteful.min()) > 2.6  # nothing to be had honestly
assert leak[:-1].min() > 2.6
assert max(leak[-1], *worse[-2:], *right_f) < 0.5
assert wasteful_f[0] > 2.5

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
styles = [(GREY, "m"), (BLUE, "m − 1"), (ORANGE, "m − 2"), ("#f3c79b", "m − 3")]
for axes, (continued, rows) in zip(panels, results.items(), strict=True):
    for offset, ((colour, name), row) in enumerate(zip(styles, rows, strict=True)):
        axes.bar(np.arange(1, m + 1) + 0.2 * (offset - 1.5), row, 0.19, color=colour, label=f"shift {name}")
    axes.axhline(np.log(15), color="black", linewidth=0.8, linestyle="--")
    axes.text(4.55, np.log(15) + 0.05, "ln 15", fontsize=8, ha="right")
    axes.set(xticks=range(1, m + 1), xlabel="place of the predicted token in its chunk")
    title = "$[C_u, C_{u+1}]$: the continuation too" if continued else "$[C_u$, padding]: what was asked"
    axes.set_title(title, fontsize=9)
panels[0].set_ylabel("nats per token")
panels[1].legend(fontsize=8, loc="center right")
plt.show()

# %% [markdown]
# *Figure 5.4.* Left: where nothing can be known, only the leaky shifts get clearly below the dashed line of $\ln 15$
# nats. Right: where the continuation was found, shift $m - 1$ uses all of it, and shift $m$ misses it for each chunk's
# first token.
#
# Look at the left panel first. With shift $m - 2$, the last token of each chunk costs next to nothing. It stands in
# $N$, and $N$ is read before the token is predicted. With shift $m - 3$ the same holds for the last two tokens.
# Averaged over all tokens, such a loss would pass for a success of retrieval. With shift $m - 1$ nothing gets clearly
# below the line. Bars stand above it where a model expects some tokens more than others, although all 15 are equally
# likely.
#
# Now the right panel. The leaky shifts look like shift $m - 1$. A database that holds the text itself hides the leak
# of the shift behind a leak of another kind, that of the evaluated text into the database. No shift can help against
# that one. It is the subject of [tutorial 8](08_is_it_leakage.ipynb).

# %% [markdown]
# ## Masks, and neighbours that are missing
#
# Not every neighbour is complete. At the end of a document there is no $F$, and a small database may hold fewer than
# $k$ chunks that qualify. What is missing is filled up with padding, token 0. Padding must not be read, so `key_mask`
# sets its scores to $-\infty$. Its weights are then 0, and so are its gradients. Two things follow: it does not matter
# which vectors stand at padding, and a chunk that found nothing leaves its readers as they were.

# %%
found = retrieve(tokens)
found[0, 0, 0, 5:] = 0  # a neighbour of C_1 that ends early
found[0, 1] = 0  # C_2 found nothing at all
mask = found != 0
rubbish = np.where(mask[..., None], encoded, 1e6)
y, vjp = cca_with(m - 1, layer["cca"], h, encoded, mask)
dy = rng.standard_normal(y.shape)
_, dh, dencoded = vjp(dy)
same = np.array_equal(y, cca_with(m - 1, layer["cca"], h, rubbish, mask)[0])
print("the same output with a million at padding:", same)
print("largest gradient of E at padding:         ", np.abs(dencoded[~mask]).max())
print("tokens that CCA left as they were:        ", np.flatnonzero(np.all(y == h, axis=(0, 2))) + 1)
assert same
assert np.array_equal(dh[0, 7:11], dy[0, 7:11])

# %% [markdown]
# Tokens 1 to 3 read nothing yet. Tokens 8 to 11 are the attending chunk of $C_2$, and $C_2$ found nothing. There the
# update is zero, the activations pass through, and the gradient passes through as well:
# $\mathrm{d}h_t = \mathrm{d}y_t$.
#
# A softmax over no key at all needs a case of its own. Break it: give the textbook's formula a row of $-\infty$.

# %%
nothing = np.full(4, -np.inf)
with np.errstate(invalid="ignore"):
    shifted = nothing - nothing.max()
    print("textbook:", np.exp(shifted) / np.exp(shifted).sum())
q, keys = rng.standard_normal((1, 1, 1, 1, 3)), rng.standard_normal((1, 1, 4, 1, 3))
print("library: ", relative_attention(q, keys, keys, key_mask=np.zeros((1, 1, 4), bool))[0].ravel())

# %% [markdown]
# The difference $-\infty - (-\infty)$ is not a number, and from there on nothing else is. A score of `-1e9` instead of
# $-\infty$ is a tempting cure, and a wrong one. All scores of a chunk without keys are then equally low, and a softmax
# sees only differences. So it spreads the weight over the padding, where there should be none. The right cure has two
# parts. Where the maximum is $-\infty$, subtract 0 instead, so that all exponentials are 0. Where their sum is 0,
# divide by 1. The pullback needs no cure, because every term in it has a weight as a factor, and all weights are 0.
#
# The opposite mistake, to forget the mask, is silent. Padding has an embedding like any other token, so it takes its
# share of the weight:

# %%
unmasked, _ = cca_with(m - 1, layer["cca"], h, encoded, np.ones_like(mask))
wrong = np.abs(unmasked - y)[0].max(axis=1) > 1e-9
print("tokens whose output is wrong without the mask:", np.flatnonzero(wrong) + 1)

# %% [markdown]
# ## The order of the neighbours
#
# All $k$ neighbours stand under one softmax and in the same place. So CCA cannot tell which of them came first. Within
# a neighbour, the order of the tokens does count. And what if every neighbour is given twice? Each weight is halved
# and there are two of each, so the output stays the same. Repeat only one, and it gets more weight.


# %%
def change(other_encoded):
    """How far the output moves, at most."""
    full = np.ones(other_encoded.shape[:-1], bool)
    return np.abs(cca_with(m - 1, layer["cca"], h, other_encoded, full)[0] - value).max()


print(f"neighbours exchanged       {change(encoded[:, :, ::-1]):.1f}")
print(f"each neighbour given twice {change(np.repeat(encoded, 2, axis=2)):.1f}")
print(f"one of two given twice     {change(encoded[:, :, [0, 0, 1]]):.1f}")
print(f"tokens in reverse order    {change(encoded[:, :, :, ::-1]):.1f}")

# %% [markdown]
# ## The pullback
#
# Now the lower half of `cca_with`. Go through the forward pass from its end to its beginning. Write $X^+ = S X$ for
# the attending chunks, normalised, and $Y^+$ for what they read.
#
# *Table 5.1.* CCA, around CA.
#
# | forward | pullback | why |
# | --- | --- | --- |
# | $Y = H + S^\top Y^+$ | $\mathrm{d}H = \mathrm{d}Y$ | a sum hands its gradient to both terms |
# | | $\mathrm{d}Y^+ = S\, \mathrm{d}Y$ | the transpose of $S^\top$ is $S$ |
# | $Y^+ = \mathrm{CA}(X^+, E)$ | $\mathrm{d}X^+$, $\mathrm{d}E$, gradients of the parameters | table 5.2 |
# | $X^+ = S X$ | $\mathrm{d}X = S^\top \mathrm{d}X^+$ | transpose of the cut: lay it back |
# | $X = \mathrm{norm}(H)$ | add norm's pullback of $\mathrm{d}X$ to $\mathrm{d}H$ | $H$ was used twice |
#
# Compare it with `vjp` above, line by line. `S` and `S.T` have changed places, and the lines run in reverse.
#
# Inside CA everything is known from tutorials 3 and 4. Table 5.2 has it for one head. The sum over $j$ runs over the
# keys of **all** $k$ neighbours, and $\delta$ is the distance $i - j + m - 1$ within each.
#
# *Table 5.2.* CA, around the score.
#
# | forward | pullback |
# | --- | --- |
# | $Y^+ = O W_O$ | $\mathrm{d}O = \mathrm{d}Y^+ W_O^\top$ and $\mathrm{d}W_O = O^\top \mathrm{d}Y^+$ |
# | $O_i = \sum_j A_{ij} V_j$ | $\mathrm{d}A_{ij} = \mathrm{d}O_i \cdot V_j$ |
# | | $\mathrm{d}V_j = \sum_i A_{ij}\, \mathrm{d}O_i$ |
# | $A_i = \mathrm{softmax}(Z_i)$ | $\mathrm{d}Z_{ij} = A_{ij} (\mathrm{d}A_{ij} - A_i \cdot \mathrm{d}A_i)$ |
# | $Z_{ij} = \bigl((Q_i + b_c) \cdot K_j + (Q_i + b_p) \cdot T_\delta\bigr) / \sqrt c$ | table 5.3 |
# | $Q = X^+ W_Q$ | $\mathrm{d}X^+ = \mathrm{d}Q\, W_Q^\top$ and $\mathrm{d}W_Q = (X^+)^\top \mathrm{d}Q$ |
# | $K = E W_K$ | $\mathrm{d}E = \mathrm{d}K\, W_K^\top$ and $\mathrm{d}W_K = E^\top \mathrm{d}K$ |
# | $V = E W_V$ | add $\mathrm{d}V\, W_V^\top$ to $\mathrm{d}E$; $\mathrm{d}W_V = E^\top \mathrm{d}V$ |
# | $T = R W_R$ | $\mathrm{d}W_R = R^\top \mathrm{d}T$; the sinusoids $R$ are constants |
#
# The score is a sum of products, so each factor's gradient is $\mathrm{d}Z_{ij} / \sqrt c$ times the other factor,
# summed over all pairs in whose score the factor stands:
#
# *Table 5.3.* The five factors of the score.
#
# | gradient | sum | over |
# | --- | --- | --- |
# | $\mathrm{d}Q_i$ | $\frac{1}{\sqrt c} \sum \mathrm{d}Z_{ij}\, (K_j + T_\delta)$ | all keys |
# | $\mathrm{d}K_j$ | $\frac{1}{\sqrt c} \sum \mathrm{d}Z_{ij}\, (Q_i + b_c)$ | the queries of its attending chunk |
# | $\mathrm{d}T_\delta$ | $\frac{1}{\sqrt c} \sum \mathrm{d}Z_{ij}\, (Q_i + b_p)$ | all pairs at distance $\delta$ |
# | $\mathrm{d}b_c$ | $\frac{1}{\sqrt c} \sum \mathrm{d}Z_{ij}\, K_j$ | all pairs |
# | $\mathrm{d}b_p$ | $\frac{1}{\sqrt c} \sum \mathrm{d}Z_{ij}\, T_\delta$ | all pairs |
#
# Three sums are easily lost. $E$ is used twice, as keys and as values, so $\mathrm{d}E$ has two terms. All neighbours
# of a chunk share their places, so $\mathrm{d}T_\delta$ sums over the neighbours. And all chunks share the matrices and
# the biases, whose gradients therefore sum over the chunks. In code the last of these sums takes care of itself,
# because chunks are rows of a batch.
#
# Is the `vjp` above right? The library and finite differences both say so:

# %%
dy = rng.standard_normal(h.shape)
grads, dh, dencoded = cca_with(m - 1, layer["cca"], h, encoded, key_mask)[1](dy)
library_vjp = cca(layer["cca"], h, encoded, key_mask, 2, m)[1]
library_grads, library_dh, library_dencoded = library_vjp(dy)
assert np.allclose(dh, library_dh)
assert np.allclose(dencoded, library_dencoded)
assert all(np.allclose(grads[name], library_grads[name]) for name in library_grads)
report = gradcheck(lambda *given: cca_with(m - 1, *given, key_mask), layer["cca"], h, encoded)
print(f"as the library; finite differences agree within {report.error:.0e}")
print("gradients:", ", ".join(f"{name} {grad.shape}" for name, grad in sorted(grads.items())))

# %% [markdown]
# Which retrieved vectors get a gradient from the output at one token? Those that the token reads. Let us draw both: the
# weight with which each token reads each retrieved vector, and the gradient that its output sends back there. The
# library hands the weights of every attention to a function `watch`, if it is given one.

# %%
watched = {}
cca(layer["cca"], h, encoded, key_mask, 2, m, Scope(watch=watched.__setitem__))
(weights,) = watched.values()  # (chunks, n_heads, 1, m, k, r)
weights = weights[:, :, 0].max(axis=1).reshape(n_chunks * m, k * r)  # of the head that reads it more
laid_back = S.T @ weights  # a row for each token of the sequence, zeros where it reads nothing
read, gradient = np.zeros((2, n, n_chunks, k * r))
for u in range(n_chunks):
    attending = S[u * m : (u + 1) * m].any(axis=0)  # the tokens of H_u^+
    read[attending, u] = laid_back[attending]
for t in range(n):
    dy_t = np.zeros_like(h)
    dy_t[0, t] = rng.standard_normal(8)
    gradient[t] = np.linalg.norm(library_vjp(dy_t)[2][0], axis=-1).reshape(n_chunks, k * r)
assert np.array_equal(gradient > 0, read > 0)

# %% tags=["hide-input"]
figure, panels = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True)
forward = (read, "Blues", "weight", "forward: what a token reads")
backward = (gradient, "Oranges", "norm", "backward: where its output sends gradient")
for axes, (grid, colours, label, title) in zip(panels, (forward, backward), strict=True):
    grid = np.where(grid > 0, np.log10(np.maximum(grid, 1e-9)), np.nan).reshape(n, -1)
    image = axes.imshow(grid, cmap=colours, vmin=-3, vmax=0.3, aspect="auto")
    for edge in range(r, n_chunks * k * r, r):
        axes.axvline(edge - 0.5, color="black", linewidth=1.2 if edge % (k * r) == 0 else 0.4)
    axes.set(yticks=range(0, n, 2), ylabel="token", title=title, xticks=[7.5, 23.5, 39.5])
    axes.set_yticklabels(range(1, n + 1, 2))
    axes.set_xticklabels([f"$E_{u + 1}$: {k} neighbours of {r} tokens" for u in range(n_chunks)], fontsize=8)
    axes.title.set_fontsize(9)
    figure.colorbar(image, ax=axes, label=f"log10 of the {label}", extend="min")
plt.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.5.* Weight and gradient form the same staircase: the output at a token sends gradient back to exactly those
# retrieved vectors that the token reads. Outside the staircase all is zero; its palest cells are only small.
#
# ## Three wrong pullbacks
#
# Each of these runs without complaint. `gradcheck` says which argument's gradient is wrong, at which index, and
# sometimes why.


# %%
def broken(how):
    """CCA with one line of its pullback spoilt."""

    def f(params, h, encoded):
        y, vjp = cca_with(m - 1, params, h, encoded, key_mask)

        def spoilt(dy):
            grads, dh, dencoded = vjp(dy)
            if how == "no residual":
                dh = dh - dy
            elif how == "laid back one late":  # the transpose of another cut
                dh = dy + np.roll(dh - dy, 1, axis=1)
            elif how == "last neighbour only":  # assigned where it should be added
                dencoded = dencoded * (np.arange(k) == k - 1)[:, None, None]
            return grads, dh, dencoded

        return y, spoilt

    return f


for how in ("nothing", "no residual", "laid back one late", "last neighbour only"):
    report = gradcheck(broken(how), layer["cca"], h, encoded, raise_exception=False)
    wrong = [f"{row.name}, {row.where}; {row.note}".rstrip("; ") for row in report.rows if row.verdict == "wrong"]
    print(f"{how:20} {' '.join(wrong) or 'passes'}")

# %% [markdown]
# ## Exercises
#
# Six steps. At their end you have written the whole of chunked cross-attention, attention included, in NumPy alone. Use
# no function of the library in them. Each cell with dots is yours to fill. The cell below it checks what you wrote and
# says what is wrong and where.
#
# **Exercise 5.1: who reads what.** Write the chunk whose neighbours token $t$ reads, or $-1$ if it reads none. Token
# and chunk are counted from 0. One line is enough. It should take an array of tokens, too.


# %% tags=["exercise"]
def reads(t, m): ...


# %% tags=["check"]
check_5_1(reads)

# %% [markdown]
# **Exercise 5.2: cut and lay back.** Write $S$ and $S^\top$ without a matrix, by slices. `cut` takes a sequence
# `(B, n, d)` to attending chunks `(B, n_chunks, m, d)`. `lay_back` takes attending chunks to a sequence of $n$ tokens.
# The length $n$ need not be a multiple of $m$. It may even be shorter than a chunk; then `n_chunks` is 0.


# %% tags=["exercise"]
def cut(h, n_chunks, m): ...


def lay_back(chunks, n): ...


# %% tags=["check"]
check_5_2(cut, lay_back)

# %% [markdown]
# **Exercise 5.3: the attention, forward.** Write $Z$, $A$ and $O$ for `b` attending chunks with all their heads.
#
# | argument | shape | |
# | --- | --- | --- |
# | `q` | `(b, m, n_heads, c)` | queries |
# | `keys`, `values` | `(b, k, r, n_heads, c)` | of all neighbours |
# | `table` | `(m + r - 1, n_heads, c)` | $T_\delta$, a row for each distance |
# | `b_c`, `b_p` | `(n_heads, c)` | the two biases |
# | `key_mask` | `(b, k, r)` | False at padding |
#
# The first row of the table belongs to the largest distance that occurs, and each next row to a distance smaller by 1.
#
# Return the output `(b, m, n_heads, c)` and the weights $A$ as `(b, n_heads, m, k, r)`. Which row of the table belongs
# to query $i$ and key $j$? Figure 5.2 helps, and so does exercise 4.4, which was the same for one head and one chunk.
# One softmax runs over all $k\,r$ keys. An attending chunk may have no key at all. Then its weights and its output
# are zero. `np.einsum` saves you from counting axes: `np.einsum("bihc,bkjhc->bhikj", q, keys)` is every query times
# every key.


# %% tags=["exercise"]
def attention_value(q, keys, values, table, b_c, b_p, key_mask): ...


# %% tags=["check"]
check_5_3(attention_value)

# %% [markdown]
# **Exercise 5.4: the attention, backward.** Return the output of 5.3, and `vjp(dout)`, which returns the gradients of
# `q`, `keys`, `values`, `table`, `b_c` and `b_p` in this order. The rows of table 5.2 from $O$ to $Z$ and the whole of
# table 5.3 are what you need. How you get $\mathrm{d}T_\delta$ depends on your forward pass. If you multiplied the
# queries with the whole table, and then picked a score for each pair, put each $\mathrm{d}Z_{ij} / \sqrt c$, summed
# over the neighbours, into the place that you took the score from. This is $\mathrm{d}D$ of
# [tutorial 4](04_relative_positions.ipynb). Then $\mathrm{d}T = \mathrm{d}D^\top (Q + b_p)$, summed over the chunks. If
# you looked up $T_\delta$ for each pair first, add up with `np.add.at` ([tutorial
# 3](03_backward_passes_by_hand.ipynb), "Embedding").


# %% tags=["exercise"]
def attention(q, keys, values, table, b_c, b_p, key_mask): ...


# %% tags=["check"]
check_5_4(attention)

# %% [markdown]
# **Exercise 5.5: the projections.** Put the five matrices around your attention. `params` has `w_q`, `w_k`, `w_v`,
# `w_r`, `w_o` and the biases `u` and `v`, which are $b_c$ and $b_p$. `queries` is `(b, m, d)`, normalised already, and
# `context` is `(b, k, r, d')`. `w_q` and `w_r` are `(d, n_heads * c)`, `w_k` and `w_v` are `(d', n_heads * c)`, `w_o`
# is `(n_heads * c, d)`, and `u` and `v` are `(n_heads, c)`. Heads are cut from the last axis with
# `x.reshape(*x.shape[:-1], n_heads, -1)`. Exercise 3.4 had the same projections, without positions.
#
# $T_\delta$ is made of sinusoids as wide as the queries, with frequencies $\omega_f = 10000^{-2f/d}$:
#
# $$R_\delta = \bigl[\sin \omega_0 \delta, \dots, \sin \omega_{d/2-1} \delta,\;
# \cos \omega_0 \delta, \dots, \cos \omega_{d/2-1} \delta\bigr], \qquad T_\delta = R_\delta W_R$$
#
# Return the value `(b, m, d)`, and `vjp(dy)`, which returns a dict with the gradients of `params`, then `dqueries` and
# `dcontext`.


# %% tags=["exercise"]
def cross(params, queries, context, key_mask, n_heads): ...


# %% tags=["check"]
check_5_5(cross)

# %% [markdown]
# **Exercise 5.6: chunked cross-attention.** All of it, with your own `cut`, `cross` and `lay_back`. `h` is `(B, n, d)`,
# `encoded` is `(B, n_chunks, k, r, d')` and `key_mask` is `(B, n_chunks, k, r)`. `params` has the gain of the norm as
# `norm`. The norm is `gain * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)`, and [tutorial
# 3](03_backward_passes_by_hand.ipynb) derives its pullback. Return the value `(B, n, d)`, and `vjp(dy)`, which returns
# a dict with the gradients of `params`, then `dh` and `dencoded`.


# %% tags=["exercise"]
def my_cca(params, h, encoded, key_mask, n_heads, m): ...


# %% tags=["check"]
check_5_6(my_cca)

# %% [markdown]
# ## What you have gained
#
# - Equation 3, once as a sentence, once as a matrix and once as code. A chunk is complete at its last token, and from
#   that token on its neighbours are read.
# - The reason for the shift $m - 1$, and a test that finds a leak from outside: change a token, look up again, see
#   which outputs move.
# - The price of a leak. The loss rewards it, so the loss is no judge of it.
# - A backward pass that is the forward pass in reverse, with $S$ and $S^\top$ exchanged.
# - If you did the exercises, you have written the heart of [`mini_retro.py`](mini_retro.py), the whole of RETRO in one
#   file of plain NumPy. There, exercises 5.3 to 5.5 are the function `attention`, your `cut` is called
#   `attending_chunks`, `lay_back` is `in_sequence`, and `my_cca` is `cca`.
#
# Next: [tutorial 6, the neighbour encoder and the whole of algorithm
# 1](06_the_neighbour_encoder_and_algorithm_1.ipynb). There the vectors $E_u$ are made, and the whole model is put
# together.
