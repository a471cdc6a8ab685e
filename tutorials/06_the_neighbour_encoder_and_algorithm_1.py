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
# # 6 · The neighbour encoder and the whole of algorithm 1
#
# ![RETRO as a whole; you are here: the neighbour encoder](../docs/landing/retro-6.svg)
#
# A detective and a tailor find the same photograph. The detective looks at the clock on the wall, the tailor at the
# coat. Now let two chunks of different texts retrieve the same passage. Should the model see the same vectors in both
# cases? RETRO says no. The encoder that reads a neighbour looks at the chunk that asked for it. This small idea has
# large consequences. It gives a leak a second way in, and it gives the gradient a second way back. Both are easily
# overlooked. When they are understood, nothing is missing any more, and we can write RETRO down whole, forward and
# backward.
#
# *Reading: about 50 minutes · runs in 5 s on one core · needs tutorials 3, 4 and 5.*
#
# *On the path “Understand it” of the book's contents, read as far as the end of the section “Algorithm 1”, and pass
# over what is said of pullbacks.*
#
# Afterwards you can
#
# - say what $E_u$ depends on, token by token, and why that gives nothing away;
# - say what conditioning on $H_u$ is, what is lost without it, and what it costs;
# - explain how the gradient flows from the loss through the neighbours back into the decoder, and where it is added;
# - build algorithm 1 and its pullback from its blocks;
# - count the parameters in table 2 of the paper.
#
# Previous: [5 · Chunked cross-attention, whole](05_chunked_cross_attention.ipynb) · Next: [7 · Train
# one](07_train_one.ipynb) · All letters: [symbols](../docs/symbols.md) · The paper: [Borgeaud et al.
# 2022](https://arxiv.org/abs/2112.04426), section 2.4 and algorithm 1

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

from retro_np import EncoderConfig, RetroConfig, count_parameters, gradcheck, reference, retro, retro_loss
from retro_np.config import PRESETS
from retro_np.nn.attention import attend, self_attention
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.cca import cca
from retro_np.nn.checks import perturbed_params
from retro_np.nn.encoder import encoder_cross_attention
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import cross_entropy, embedding, linear, rms_norm
from retro_np.parameters import is_retrieval, parameter_shapes
from retro_np.tree import named_leaves
from retro_np.tutorials.checks.tutorial_06 import check_6_1, check_6_2, check_6_3, check_6_4

BLUE, ORANGE, GREY, PALE = "#2b7bba", "#e07b1f", "#8c8c8c", "#c9dff0"

# %% [markdown]
# ## Algorithm 1
#
# This is the whole of RETRO, as the paper's algorithm 1 has it. $x_1, \dots, x_n$ are the tokens, $H$ is what the
# decoder makes of them, a row $h_t$ for each token, and $H_u$ are the rows of chunk $C_u$. $E_u$ are the encoded
# neighbours of $C_u$, and $E$ those of all chunks. $p$ is the number of a layer, and $P$ is the set of layers that read
# neighbours.
#
# $$
# \begin{array}{l}
# H \leftarrow \mathrm{EMB}(x_1, \dots, x_n) \\
# \textbf{for each layer } p = 1, 2, \dots \\
# \quad H \leftarrow \mathrm{ATTN}(H) \\
# \quad \textbf{if } p = \min(P): \quad E_u \leftarrow \mathrm{ENCODER}(\mathrm{RET}(C_u),\, H_u)
# \ \text{ for } u = 1, \dots, \ell \\
# \quad \textbf{if } p \in P: \quad H \leftarrow \mathrm{CCA}(H,\, E) \\
# \quad H \leftarrow \mathrm{FFW}(H) \\
# \text{logits} \leftarrow \mathrm{READ}(H)
# \end{array}
# $$
#
# The encoder is a small transformer. It reads every neighbour by itself, with the same weights for all chunks and all
# neighbours. Inside the encoder, $E$ has a row for each token of one neighbour. $p'$ is the number of a layer of the
# encoder, and $P_\mathrm{enc}$ is the set of its layers that look at the chunk.
#
# $$
# \begin{array}{l}
# \mathrm{ENCODER}(\text{one neighbour},\, H_u): \\
# \quad E \leftarrow \mathrm{EMB_{enc}}(\text{the neighbour's tokens}) \\
# \quad \textbf{for each layer } p' = 1, 2, \dots \\
# \quad \quad E \leftarrow \mathrm{ATTN_{enc}}(E) \\
# \quad \quad \textbf{if } p' \in P_\mathrm{enc}: \quad E \leftarrow \mathrm{CA_{enc}}(E,\, H_u) \\
# \quad \quad E \leftarrow \mathrm{FFW_{enc}}(E) \\
# \quad \textbf{return } \mathrm{norm}(E)
# \end{array}
# $$
#
# EMB looks vectors up in a table. READ is a norm and one matrix, the *readout*. The encoder ends in a norm, too,
# because no block normalises what it hands on. The paper's algorithm 1 shows neither of these two norms. They are our
# reading. All the rest are residual blocks: each normalises its input, computes an update from it, and adds the update
# to the input. [Tutorial 3](03_backward_passes_by_hand.ipynb) derives the pullbacks of EMB, of the norm, the readout,
# FFW, attention and the cross-entropy on top. [Tutorial 4](04_relative_positions.ipynb) adds positions to attention,
# and [tutorial 5](05_chunked_cross_attention.ipynb) is CCA. Three things are new:
#
# - $\mathrm{ATTN_{enc}}$ is self-attention that is **not** causal. A neighbour's tokens need not be predicted, so each
#   of them may look ahead, and $N$ can be read in the light of $F$.
# - $\mathrm{CA_{enc}}$ is cross-attention with the roles exchanged. The neighbour asks and the chunk answers: queries
#   are the $r$ vectors of the neighbour, keys and values the $m$ rows of $H_u$.
# - The order. The encoder runs once, in the first layer of $P$, after this layer's self-attention and before its CCA.
#   All later layers of $P$ read the same $E$, though $H$ has moved on by then.
#
# ## A model to take apart
#
# Our model has three decoder layers, of which the second and the third read neighbours, so $P = \{2, 3\}$. Its encoder
# has two layers, of which the first looks at the chunk, so $P_\mathrm{enc} = \{1\}$. The encoder has a width $d'$ of
# its own. In the paper it is 896 for decoders of all sizes. The text has 14 tokens in chunks of 4: the two that are
# left over form no whole chunk.

# %%
encoder = EncoderConfig(d_model=6, d_ffw=8, n_heads=2, d_head=3, n_layers=2, ca_layers=(1,))
# The first three numbers: tokens of the vocabulary, width d, width of FFW.
config = RetroConfig(20, 8, 12, n_heads=2, d_head=4, n_layers=3, cca_layers=(2, 3), chunk_size=4, encoder=encoder)
params = perturbed_params(config)  # away from their first values, so that nothing is zero or one by chance
rng = np.random.default_rng(0)
n, m, k, r = 14, 4, 2, 8
n_chunks = n // m
tokens = rng.integers(1, 20, (1, n))
neighbours = rng.integers(1, 20, (1, n_chunks, k, r))
neighbours[0, 0, 1, 5:] = 0  # a neighbour that ends early
neighbours[0, 2, 1] = 0  # a neighbour that was not found

# %% [markdown]
# Does the library run it in the order above? `attention_maps` returns the weights of every attention, in the order in
# which the attentions run. Here are its names, each with its line of the listing. EMB, FFW and READ contain no
# attention and do not appear. The names count layers from 0. The paper and `cca_layers` count them from 1.

# %%
decoder = {"attention": "H ← ATTN(H)", "cca": "H ← CCA(H, E)"}
inside = {"attention": "    E ← ATTN_enc(E)", "cross_attention": "    E ← CA_enc(E, H_u)"}
ran = list(attention_maps(params, config, tokens, neighbours))
for name in ran:
    lines = inside if name.startswith("encoder") else decoder
    print(f"{name:35}", lines[name.rsplit(".", 1)[-1]])
assert ran.index("encoder.layers.0.attention") == ran.index("layers.1.attention") + 1
assert ran.index("encoder.layers.1.attention") + 1 == ran.index("layers.1.cca")


# %% tags=["hide-input"]
def block(axes, x, y, name, width=2.2, colour=PALE):
    """A block with its name; x is its middle, y its lower edge."""
    axes.add_patch(plt.Rectangle((x - width / 2, y), width, 0.6, facecolor=colour, edgecolor="black", linewidth=0.6))
    ink = "white" if colour in (BLUE, ORANGE) else "black"
    axes.text(x, y + 0.3, name, ha="center", va="center", color=ink, fontsize=9)


def way(axes, *points, colour=BLUE, style="-"):
    """What one block hands to another: a line along some points, with an arrow at its end."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour, linestyle=style, linewidth=1.3)
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.3}
    axes.annotate("", points[-1], (0.9 * np.array(points[-1]) + 0.1 * np.array(points[-2])).tolist(), arrowprops=arrow)


def sum_of(axes, x, y):
    """Where gradients are added."""
    axes.plot(x, y, "o", color="white", markeredgecolor=ORANGE, markersize=11, zorder=3)
    axes.text(x, y - 0.02, "+", ha="center", va="center", color=ORANGE, fontsize=10, zorder=4)


figure, axes = plt.subplots(figsize=(8, 8))
left, right = 1.1, 8.3  # the middles of decoder and encoder
heights = {"EMB": 0, "ATTN 1": 1, "FFW 1": 2, "ATTN 2": 3.3, "CCA 2": 5.6, "FFW 2": 6.6}
heights |= {"ATTN 3": 7.8, "CCA 3": 9.2, "FFW 3": 10.2, "norm, readout": 11.4}
block(axes, left, -1.4, "tokens $x_1 … x_n$", colour="white")
below = -1.4
for name, y in heights.items():
    way(axes, (left, below + 0.6), (left, y))
    block(axes, left, y, name.rstrip(" 123"), colour=BLUE if name.startswith("CCA") else PALE)
    below = y
way(axes, (left, 12), (left, 12.7))
axes.text(left, 12.8, "predicts the next token", ha="center", fontsize=9)
tower = {"EMB": 0.8, "ATTN": 2.0, "CA": 4.2, "FFW": 5.2, "ATTN ": 6.4, "FFW ": 7.2}
block(axes, right, -1.4, "database", width=2.6, colour="#eeeeee")
way(axes, (left + 1.1, -1.1), (right - 1.3, -1.1), colour=GREY)
axes.text(4.3, -0.95, "$C_u$, by a frozen BERT", ha="center", fontsize=9, color="#444444")
below = -1.4
for name, y in tower.items():
    way(axes, (right, below + 0.6), (right, y), colour=GREY if name == "EMB" else BLUE)
    block(axes, right, y, f"$\\mathrm{{{name.strip()}_{{enc}}}}$", colour=BLUE if name == "CA" else PALE)
    below = y
axes.text(right + 0.15, 0.0, "$\\mathrm{RET}(C_u)$", fontsize=9, va="center")
block(axes, right, 8.0, "norm")
way(axes, (right, 7.8), (right, 8.0))
way(axes, (left, 4.65), (right - 1.1, 4.65))  # H_u
way(axes, (right + 0.2, 8.6), (right + 0.2, 9.65), (left + 1.1, 9.65))  # E to the last CCA
way(axes, (4.6, 9.65), (4.6, 6.05), (left + 1.1, 6.05))  # and to the first
back = {"colour": ORANGE, "style": "--"}
way(axes, (left + 1.1, 9.3), (right - 0.3, 9.3), (right - 0.3, 8.6), **back)
way(axes, (left + 1.1, 5.75), (5.1, 5.75), (5.1, 9.3), **back)
way(axes, (right - 1.1, 4.35), (left + 0.2, 4.35), **back)
sum_of(axes, 5.1, 9.3)
sum_of(axes, left, 4.35)
forward_labels = [(3.6, 4.8, "$H_u$"), (3.2, 9.8, "$E$"), (3.2, 6.2, "$E$")]
backward_labels = [(3.6, 3.95, "$dH_u$"), (3.2, 8.85, "$dE$"), (3.2, 5.3, "$dE$"), (6.1, 8.5, "$dE$, summed\nover $P$")]
for x, y, text in forward_labels:
    axes.text(x, y, text, fontsize=10, color=BLUE, ha="center")
for x, y, text in backward_labels:
    axes.text(x, y, text.replace("$d", "$\\mathrm{d}"), fontsize=10, color=ORANGE, ha="center")
for p, (low, high) in enumerate(((1, 2.6), (3.3, 7.2), (7.8, 10.8)), start=1):
    axes.plot([-0.3, -0.3], [low, high], color=GREY, linewidth=1)
    axes.text(-0.45, (low + high) / 2, f"layer {p}", ha="right", va="center", fontsize=9, color="#444444")
axes.set(xlim=(-2, 9.8), ylim=(-1.6, 13.2))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 6.1.* Blue goes forward. Dashed orange is the gradient's new way back: $\mathrm{d}E$ goes from the CCAs to the
# encoder, and $\mathrm{d}H_u$ from the encoder to the decoder. The ways back through the blocks are not drawn. The
# encoder runs once. $\mathrm{d}E$ is summed over all CCAs, and $\mathrm{d}H_u$ is added to the gradient of $H$ at the
# place where $H_u$ was taken. Through the database, grey, no gradient flows.
#
# ## The encoder, written out
#
# Here is the encoder for all chunks and neighbours at once, with its pullback. Each neighbour is a row of a batch, so
# that self-attention stays within it. For $\mathrm{CA_{enc}}$ the $k$ neighbours of a chunk are put side by side, since
# they look at the same $H_u$. Whether a layer looks at the chunk is seen from its parameters. Padding is no key.
#
# As in the tutorials before, $\mathrm{d}x$ stands for $\partial \mathcal{L} / \partial x$. The pullback goes through
# the layers in reverse. It returns the gradients of the encoder's parameters, and that of $H$, which is zero in the
# rows behind the last whole chunk.


# %%
def encode_all(params, h, neighbours, n_heads=2):
    """E (B, ℓ, k, r, d'), and vjp(dE) → (gradients of params, dh). params: the encoder's; h: (B, n, d)."""
    B, n_chunks, k, r = neighbours.shape
    m, d = r // 2, h.shape[-1]
    chunks = h[:, : n_chunks * m].reshape(B * n_chunks, m, d)  # H_u
    rows = neighbours.reshape(B * n_chunks * k, r)
    e, embedding_vjp = embedding(params["embedding"], rows)  # E ← EMB_enc
    vjps = []
    for layer in params["layers"]:
        attention, cross_vjp = layer["attention"], None
        e, self_vjp = self_attention(attention, e, n_heads, causal=False, key_mask=rows != 0)  # E ← ATTN_enc(E)
        if "cross_attention" in layer:  # E ← CA_enc(E, H_u)
            grouped = e.reshape(B * n_chunks, k, r, -1)
            grouped, cross_vjp = encoder_cross_attention(layer["cross_attention"], grouped, chunks, n_heads)
            e = grouped.reshape(e.shape)
        e, ffw_vjp = ffw(layer["ffw"], e)  # E ← FFW_enc(E)
        vjps.append((self_vjp, cross_vjp, ffw_vjp))
    encoded, norm_vjp = rms_norm(e, params["norm"])

    def vjp(dencoded):
        grads, dchunks = {"layers": []}, np.zeros_like(chunks)
        de, grads["norm"] = norm_vjp(dencoded.reshape(encoded.shape))
        for self_vjp, cross_vjp, ffw_vjp in reversed(vjps):
            layer = {}
            layer["ffw"], de = ffw_vjp(de)
            if cross_vjp is not None:
                layer["cross_attention"], dgrouped, dchunk = cross_vjp(de.reshape(B * n_chunks, k, r, -1))
                de, dchunks = dgrouped.reshape(de.shape), dchunks + dchunk
            layer["attention"], de = self_vjp(de)
            grads["layers"].insert(0, layer)
        (grads["embedding"],) = embedding_vjp(de)
        dh = np.zeros_like(h)
        dh[:, : n_chunks * m] = dchunks.reshape(B, n_chunks * m, d)
        return grads, dh

    return encoded.reshape(B, n_chunks, k, r, -1), vjp


h = rng.standard_normal((1, n, 8))  # drawn at random, in place of the decoder's H
encoded, _ = encode_all(params["encoder"], h, neighbours)
for u, j in np.ndindex(n_chunks, k):
    by_loops = reference.encode_neighbour(params, config, neighbours[0, u, j], h[0, u * m : (u + 1) * m])
    assert np.allclose(encoded[0, u, j], by_loops)
right = gradcheck(lambda params, h: encode_all(params, h, neighbours), params["encoder"], h)
print("E has shape", encoded.shape, "and is that of the loops")
print(f"finite differences agree with the pullback within {right.error:.0e}")

# %% [markdown]
# ## What E depends on
#
# Change what goes in, one thing at a time, and see which vectors of $E_1$ move. We change first the tokens of $C_1$'s
# two neighbours, then the rows of $H$ that belong to tokens 1 to 8, which are $H_1$ and $H_2$.

# %%
results = []
for j, i in np.ndindex(k, r):
    changed, given = neighbours.copy(), params["encoder"]
    if neighbours[0, 0, j, i]:
        changed[0, 0, j, i] = changed[0, 0, j, i] % 19 + 1
    else:  # padding stays padding, but another vector stands for it
        given = given | {"embedding": np.concatenate([given["embedding"][:1] + 1, given["embedding"][1:]])}
    results.append(encode_all(given, h, changed)[0])
for t in range(2 * m):
    moved = h.copy()
    moved[0, t] += rng.standard_normal(8)
    results.append(encode_all(params["encoder"], moved, neighbours)[0])
moves = np.array([np.abs(e - encoded)[0, 0].max(axis=-1).reshape(-1) > 1e-9 for e in results])
real = neighbours[0, 0].reshape(-1) != 0
moves &= real  # what stands at padding is read by nobody
assert moves[2 * r : 2 * r + m, real].all()
assert not moves[2 * r + m :].any()

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 5))
axes.imshow(moves, cmap="Blues", vmax=1.4, aspect="auto")
for edge in (r, 2 * r, 2 * r + m):
    axes.axhline(edge - 0.5, color="black", linewidth=0.8)
axes.axvline(r - 0.5, color="black", linewidth=0.8)
labels = [(11.5, 3.5, "another neighbour"), (3.5, 11.5, "another neighbour"), (14.5, 11.5, "padding")]
for x, y, label in [*labels, (3.5, 21.5, "another chunk"), (11.5, 21.5, "another chunk")]:
    axes.text(x, y, label, ha="center", va="center", fontsize=8, color=GREY, rotation=90 * (label == "padding"))
axes.set(xticks=[3.5, 11.5], yticks=[3.5, 11.5, 17.5, 21.5], xlabel="moves, if blue", ylabel="changed")
axes.set_xticklabels(["$E_1$: first neighbour", "$E_1$: second neighbour"])
axes.set_yticklabels(["first\nneighbour", "second\nneighbour", "$H_1$", "$H_2$"])
plt.show()

# %% [markdown]
# *Figure 6.2.* A vector of $E_1$ depends on every token of its own neighbour except padding, on every row of $H_1$, and
# on nothing else that was changed.
#
# The two blocks say that a neighbour is read as a whole and knows nothing of the other. The last three tokens of the
# second neighbour are padding. They are no keys: let another vector stand for padding, and nothing moves. The vectors
# at their places are left white, because nobody reads them. Below the blocks lies a band. Each row of $H_1$, **the last
# one too**, reaches all the other vectors of $E_1$. The rows of $H_2$ reach none. What holds for $E_1$ holds for every
# $E_u$. In the decoder, the rows of $H_u$ have come through causal attention, so by way of them $E_u$ also knows the
# tokens before $C_u$. Those are no secret: whoever reads $E_u$ has read them.
#
# ## The shift, once more
#
# That band settles the shift of tutorial 5 a second time. There a leak went through the database, and a test had to
# look up the neighbours again to see it. Now there is a second way. $E_u$ depends on the last token of $C_u$, because
# the encoder has looked at $H_u$. So $E_u$ may be read from token $um$ on, and not one token sooner, even if the
# neighbours stay what they were. Let us see: hold the neighbours fixed, move one row of $H$, and look which outputs of
# the second layer's CCA move. `cca_with` is the forward pass of tutorial 5, with a shift of our choice, for one
# sequence.


# %%
def cca_with(shift, params, h, encoded, key_mask):
    """CCA in which the first `shift` tokens read nothing; forward, for a batch of one."""
    S = np.eye(n_chunks * m, n, k=shift)
    normed, _ = rms_norm(h, params["norm"])
    queries = (S @ normed).reshape(n_chunks, 1, m, -1)
    update, _ = attend(params, queries, encoded[0], 2, offset=shift, key_mask=key_mask[0])
    return h + S.T @ update.reshape(n_chunks * m, -1)


def read_at(h, shift):
    """The second layer's CCA of neighbours that are encoded for h."""
    e, _ = encode_all(params["encoder"], h, neighbours)
    return cca_with(shift, params["layers"][1]["cca"], h, e, neighbours != 0)


for shift in (m - 1, m - 2):
    leaks, before = [], read_at(h, shift)
    for t in range(n):
        changed = h.copy()
        changed[0, t] += rng.standard_normal(8)
        moved = np.abs(read_at(changed, shift) - before)[0].max(axis=1) > 1e-9
        leaks += [(int(s) + 1, t + 1) for s in np.flatnonzero(moved[:t])]
    print(f"shift {shift}: outputs that move, each with the later token that was changed: {leaks}")
    assert bool(leaks) == (shift == m - 2)

# %% [markdown]
# With shift $m - 2$ the output at token 3 knows token 4, and so on, though nobody has looked anything up again. Now the
# whole model, with shift $m - 1$ and the neighbours held fixed. Tutorial 5 tried the other way, through the database.

# %%
before = retro(params, config, tokens, neighbours)[0]
reach = np.zeros((n, n), bool)
for t in range(n):
    changed = tokens.copy()
    changed[0, t] = changed[0, t] % 19 + 1
    reach[t] = np.abs(retro(params, config, changed, neighbours)[0] - before)[0].max(axis=1) > 1e-9
print("outputs that move before the token that was changed:", np.tril(reach, -1).sum())
assert not np.tril(reach, -1).any()

# %% [markdown]
# ## With and without conditioning
#
# Let all three chunks retrieve the very same text. What the encoder makes of it should depend on who asks: it is
# *conditioned* on $H_u$. How far apart are the three encodings, pair by pair, relative to their size? Then break it,
# and take $\mathrm{CA_{enc}}$ away. In the outputs and figures below, the norm of an array is its length.

# %%
same = np.broadcast_to(neighbours[:, :1, :1], (1, n_chunks, 1, r))
without = [dict(layer) for layer in params["encoder"]["layers"]]
del without[0]["cross_attention"]
alone = params["encoder"] | {"layers": without}
for name, weights in (("conditioned on H_u", params["encoder"]), ("without CA_enc", alone)):
    e, e_vjp = encode_all(weights, h, same)
    apart = [np.linalg.norm(e[0, u] - e[0, w]) / np.linalg.norm(e[0, u]) for u, w in ((0, 1), (0, 2), (1, 2))]
    _, dh = e_vjp(rng.standard_normal(e.shape))
    print(f"{name:20} apart: {' '.join(f'{x:.3f}' for x in apart)}   norm of dH: {np.linalg.norm(dh):.2f}")
    assert np.any(dh) == (weights is not alone)

# %% [markdown]
# Without $\mathrm{CA_{enc}}$ they are **0.000** apart: the encoding is a property of the text, whoever retrieved it.
# And no gradient comes back to $H$.
#
# How much is conditioning worth? In the paper's table 13, in which single parts are left out or changed, it is worth
# 0.007 bits per byte on C4: 0.822 with it and 0.829 without. That is little, perhaps because CCA's queries know the
# chunk anyway. What would one gain by leaving it out? A cache: every text of the database could be encoded once and for
# all. With conditioning, the encoder has to run again for each chunk that retrieves, over $k\,r$ tokens for each $m$
# tokens of the text. With the paper's two neighbours this is four tokens in the encoder for each token in the decoder.
#
# ## Algorithm 1, forward
#
# Now the whole model, with the line of the listing beside each line of code. Each block returns its pullback, and we
# keep it under the block's name. Like the paper, this function counts the layers from 1.


# %%
def forward(params, config, tokens, neighbours):
    """Logits, and the pullback of every line."""
    P, n_heads, kept = config.cca_layers, config.n_heads, {"layers": []}
    h, kept["EMB"] = embedding(params["embedding"], tokens)  # H ← EMB(x)
    for p, layer in enumerate(params["layers"], start=1):  # for p = 1, 2, …
        line = {}
        h, line["ATTN"] = self_attention(layer["attention"], h, n_heads, causal=True)  # H ← ATTN(H)
        if p == min(P):  # E ← ENCODER(RET, H)
            e, kept["ENCODER"] = encode_all(params["encoder"], h, neighbours)
        if p in P:  # H ← CCA(H, E)
            h, line["CCA"] = cca(layer["cca"], h, e, neighbours != 0, n_heads, config.chunk_size)
        h, line["FFW"] = ffw(layer["ffw"], h)  # H ← FFW(H)
        kept["layers"].append(line)
    h, kept["norm"] = rms_norm(h, params["norm"])  # logits ← READ(H): the norm, then the readout
    logits, kept["readout"] = linear(h, params["readout"])
    return logits, kept


logits, kept = forward(params, config, tokens, neighbours)
by_loops = reference.retro(params, config, tokens, neighbours)
print(f"from the library {np.abs(logits - retro(params, config, tokens, neighbours)[0]).max():.0e}")
print(f"from the loops   {np.abs(logits - by_loops).max():.0e}")
assert np.allclose(logits, by_loops)

targets = np.append(tokens[:, 1:], [[0]], axis=1)  # each token's successor; where there is none, 0, which is padding
loss, loss_vjp = cross_entropy(logits, targets)
(dlogits,) = loss_vjp(1.0)
assert np.isclose(loss, retro_loss(params, config, tokens, targets, neighbours)[0])
print(f"loss {loss:.3f} nats per token, and its gradient at the logits has shape {dlogits.shape}")

# %% [markdown]
# The loss leaves out a target of 0, and one of −1 as well, which is how tutorial 7 marks what is not to be predicted.
#
# `reference.retro` is the same model once more, as plain loops over tokens. It shares no code with the blocks. Would it
# tell a misreading of the algorithm from the right reading? Here are two plausible misreadings. In the first, the
# encoder sees $H$ as it was *before* the layer's self-attention. In the second, each CCA has its own $E$, made from $H$
# as it is by then.


# %%
def misread(how):
    """Algorithm 1, forward, with E made of another H."""
    h, _ = embedding(params["embedding"], tokens)
    for p, layer in enumerate(params["layers"], start=1):
        earlier = h
        h, _ = self_attention(layer["attention"], h, config.n_heads, causal=True)
        if p == 2 or (p == 3 and how == "anew in each layer"):
            e, _ = encode_all(params["encoder"], earlier if how == "before ATTN" else h, neighbours)
        if p in config.cca_layers:
            h, _ = cca(layer["cca"], h, e, neighbours != 0, config.n_heads, m)
        h, _ = ffw(layer["ffw"], h)
    return linear(rms_norm(h, params["norm"])[0], params["readout"])[0]


for how in ("after ATTN, once", "before ATTN", "anew in each layer"):
    differs = np.abs(misread(how) - by_loops)[0].max(axis=1) > 1e-9
    print(f"{how:20} tokens with other logits: {(np.flatnonzero(differs) + 1).tolist()}")

# %% [markdown]
# It would. The first row is the right reading. Tokens 1 to 3 are right in every row. They stand before the first
# attending chunk and read nothing, so a test on a text shorter than a chunk finds neither misreading.
#
# ## The gradient's two ways back
#
# In the first layer of $P$, the activations $H$ are used three times: in CCA's residual sum, as CCA's queries, and as
# what the encoder is conditioned on. So their gradient has three terms:
#
# $$\mathrm{d}H = \mathrm{d}Y \;+\; (\text{through the queries}) \;+\; (\text{through } E)$$
#
# $\mathrm{d}Y$ is the gradient of CCA's output, and comes through the residual sum unchanged. The first two terms are
# one way back, through CCA itself. The third is the other, through $E$: to the encoder, and from there to the $H_u$
# that it looked at. The pullback of `cca` returns the first two terms as `dh`. The third comes from the pullback of the
# encoder, which has to wait. $E$ is read by *every* layer of $P$, so $\mathrm{d}E$ is a sum over these layers, and the
# encoder needs the whole sum. On the way back the last layer comes first. Its CCA gives a first $\mathrm{d}E$, the CCA
# below adds its own, and so on down to the first layer of $P$. There the sum is complete, and the encoder's pullback is
# called, once. The gradient that it returns for $H$ is added between this layer's CCA and its ATTN, because that is
# where $H_u$ was taken.
#
# Which rows of $H$ get a gradient from the output at token $t$, and by which way?


# %%
layer = params["layers"][1]
e, encoder_vjp = encode_all(params["encoder"], h, neighbours)
y, cca_vjp = cca(layer["cca"], h, e, neighbours != 0, 2, m)
direct, through = np.zeros((n, n)), np.zeros((n, n))
for t in range(n):
    dy = np.zeros_like(y)
    dy[0, t] = rng.standard_normal(8)
    _, dh, de = cca_vjp(dy)
    _, dcondition = encoder_vjp(de)
    direct[t], through[t] = np.linalg.norm(dh[0], axis=-1), np.linalg.norm(dcondition[0], axis=-1)
assert not np.triu(through, 1).any()

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.6), sharey=True)
names = ("residual and queries: cca's dh", "through E: the encoder's dh")
for axes, gradient, name in zip(panels, (direct, through), names, strict=True):
    seen = np.where(gradient > 0, np.log10(np.maximum(gradient, 1e-9)), np.nan)
    image = axes.imshow(seen, cmap="Blues", vmin=-3, vmax=1)
    for edge in range(m, n, m):
        axes.axvline(edge - 0.5, color=GREY, linewidth=0.6)
    axes.set(xticks=range(0, n, 3), yticks=range(0, n, 3), xlabel="gradient at H of token", title=name)
    axes.set_xticklabels(range(1, n + 1, 3))
    axes.set_yticklabels(range(1, n + 1, 3))
    axes.title.set_fontsize(9)
panels[0].set_ylabel("output at token")
figure.colorbar(image, ax=panels, label="log10 of its norm; white: zero", shrink=0.8)
plt.show()

# %% [markdown]
# *Figure 6.3.* Through $E$, the output at each token of an attending chunk sends gradient back to all $m$ tokens of the
# chunk that retrieved; CCA by itself sends it to the token alone.
#
# On the left there is a diagonal, because CCA moves nothing between tokens of the sequence. On the right there are
# blocks. So a loss on chunk $C_{u+1}$ also trains the layers that made the activations of chunk $C_u$. Nothing lies
# above the diagonal. An entry there would say that an output depends on a later token.
#
# ### Forget the third term
#
# The pullback below is CCA's own. It is right as long as $E$ is a constant. Here $E$ is made of $H$, so it is wrong.


# %%
def read_and_forget(h):
    """CCA of encoded neighbours as a function of H, with a pullback that takes E for a constant."""
    e, _ = encode_all(params["encoder"], h, neighbours)
    y, cca_vjp = cca(layer["cca"], h, e, neighbours != 0, 2, m)

    def vjp(dy):
        _, dh, _ = cca_vjp(dy)
        return (dh,)

    return y, vjp


try:
    gradcheck(read_and_forget, h)
except AssertionError as error:
    print(error)
part, kept_part = np.linalg.norm(through), np.linalg.norm(direct)
print(f"\nthe norm of what was forgotten: {100 * part / kept_part:.0f} % of that of what was not")

# %% [markdown]
# At the entry in the message, what was forgotten is larger than what was not, and turns the gradient's sign. Hence the
# error of 2: it is relative to the larger of the two numbers, so it cannot be greater.
#
# In the whole model, this mistake spoils only a part. The gradients of the encoder, and of all blocks above
# the place where $H_u$ was taken, would still be right. Only the blocks below that place get a gradient that lacks a
# part: the embedding, layer 1 and the self-attention of layer 2. Exercise 6.2 mends the pullback.
#
# ## How many parameters?
#
# Table 2 of the paper gives the sizes of four baselines, which are decoders without retrieval, and of four RETROs,
# without embeddings. `count_parameters` makes no model for that. It sums up shapes. All eight counts agree to within
# 0.7 million or 0.05 %, whichever is larger.

# %%
table_2 = [132, 172, 368, 425, 1309, 1451, 6982, 7532]  # millions, as printed in the paper
order = ["baseline-132m", "retro-172m", "baseline-368m", "retro-425m"]
order += ["baseline-1.3b", "retro-1.5b", "baseline-7b", "retro-7.5b"]
assert set(order) == set(PRESETS)
for name, stated in zip(order, table_2, strict=True):
    counted = count_parameters(RetroConfig.preset(name)) / 1e6
    print(f"{name:15} {counted:8.1f} M   table 2: {stated:5,} M   P = {RetroConfig.preset(name).cca_layers}")
    assert abs(counted - stated) < max(0.7, 5e-4 * stated)

# %% [markdown]
# These counts have $P$ from layer 6 on. Table 10 of the paper prints a $P$ that begins at layer 9 for the two largest
# models. With that $P$ they would have one CCA less, and the counts would not agree with table 2:

# %%
for name, stated in (("retro-1.5b", 1451), ("retro-7.5b", 7532)):
    preset = RetroConfig.preset(name)
    fewer = replace(preset, cca_layers=preset.cca_layers[1:])
    counts = [count_parameters(c) / 1e6 - stated for c in (preset, fewer)]
    print(f"{name}: {counts[0]:+.1f} M from the table with P from 6, {counts[1]:+.1f} M with P from 9")

# %% [markdown]
# What does retrieval add to a decoder? A CCA in every third layer from layer 6 on, and the encoder. In the encoder,
# only what reads $H_u$ depends on the decoder's width.

# %%
parts = ["decoder", "CCA", "encoder"]
sums = np.zeros((4, 3))  # a row for each preset, a column for each part
for row, name in enumerate(order[1::2]):
    for leaf, shape in named_leaves(parameter_shapes(RetroConfig.preset(name))):
        if leaf not in ("embedding", "readout", "encoder.embedding"):
            part = "encoder" if leaf.startswith("encoder.") else "CCA" if is_retrieval(leaf) else "decoder"
            sums[row, parts.index(part)] += np.prod(shape)
added = sums[:, 1:].sum(axis=1) / sums[:, 0]
print("decoder, CCA, encoder, in millions:")
for name, row, share in zip(order[1::2], sums / 1e6, added, strict=True):
    print(f"  {name:11} {row[0]:7.1f} {row[1]:6.1f} {row[2]:5.1f}   added: {100 * share:.1f} %")

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 2.2))
start, places = np.zeros(4), np.arange(4)
for column, (name, colour) in enumerate(zip(parts, (PALE, BLUE, ORANGE), strict=True)):
    share = 100 * sums[:, column] / sums[:, 0]
    axes.barh(places, share, left=start, color=colour, label=name)
    start += share
for place, total in enumerate(start):
    axes.text(total + 1, place, f"+{total - 100:.1f} %", va="center", fontsize=8)
axes.set(yticks=places, xlabel="parameters, in % of the decoder's", xlim=(0, 150))
axes.set_yticklabels(order[1::2])
axes.invert_yaxis()
axes.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# *Figure 6.4.* Retrieval adds **30.6 %** to the smallest decoder and **7.9 %** to the largest.
#
# ## Exercises
#
# Four steps: the encoder's cross-attention, the gradient's two ways back, the backward pass of the whole model, and its
# size. You may use the library's blocks here, or your own of tutorial 5. Your `attention` fits exercise 6.1, if each
# neighbour is a row and the chunk is repeated for each of them. Your `cross` does not, since the $m - 1$ of CCA is
# built into it. Your `my_cca` fits exercise 6.2.
#
# **Exercise 6.1: the encoder looks at the chunk.** Write $\mathrm{CA_{enc}}$ and its pullback from `rms_norm` and
# `attend`.
#
# | argument | shape | |
# | --- | --- | --- |
# | `params` | | `w_q`, `w_k`, `w_v`, `w_o`, `w_r`, `u`, `v`, as in exercise 5.5, and the gains `norm`, `norm_context` |
# | `e` | `(b, k, r, d')` | the neighbours of `b` chunks: the queries, each neighbour a group |
# | `chunks` | `(b, m, d)` | $H_u$ of each of them: one group of keys and values, `(b, 1, m, d)` |
#
# `norm` is the gain for `e`, `norm_context` that for the chunks. `attend(params, queries, context, n_heads)` takes both
# normalised. It returns the update, and a pullback that returns the gradients of its parameters, `dqueries` and
# `dcontext`. The distance of token $i$ of a neighbour from token $j$ of the chunk is $i - j$, so `offset` stays 0. Like
# CCA, the block adds its update to what came in, here to `e`. Return the value, and `vjp(dy)`, which returns the
# gradients of `params`, `de` and `dchunks`.


# %% tags=["exercise"]
def conditioned(params, e, chunks, n_heads): ...


# %% tags=["check"]
check_6_1(conditioned)

# %% [markdown]
# **Exercise 6.2: both ways back.** Mend the forgetful pullback. `read` encodes the neighbours for `h`, and lets `h`
# read them by CCA. `neighbours` are tokens, `(B, n_chunks, k, r)`. Token 0 is padding, so `neighbours != 0` is CCA's
# mask. A chunk has `m = r // 2` tokens. Use `encode_all` and `cca` with 2 heads each, as `read_and_forget` does. Return
# the value `(B, n, d)`, and `vjp(dy)`, which returns the gradients of the encoder's parameters, those of the CCA's, and
# `dh`.


# %% tags=["exercise"]
def read(encoder_params, cca_params, h, neighbours): ...


# %% tags=["check"]
check_6_2(read)

# %% [markdown]
# **Exercise 6.3: algorithm 1, backward.** `kept` is what `forward` returned. Each entry of `kept["layers"]` has ATTN
# and FFW, and CCA where the layer has one. `P` is the set of layers that read neighbours, counted from 1. The pullbacks
# return:
#
# | block | its pullback returns |
# | --- | --- |
# | readout | `dh, dreadout` |
# | norm | `dh, dgain` |
# | FFW, ATTN | `gradients, dh` |
# | CCA | `gradients, dh, dE` |
# | ENCODER | `gradients, dh` |
# | EMB | `(dtable,)`, a tuple of one |
#
# Return the gradients as a tree like `params`: a dict of `embedding`, `layers`, `norm`, `readout` and `encoder`, where
# each layer is a dict of `attention`, `ffw` and, if it has one, `cca`.


# %% tags=["exercise"]
def backward(dlogits, kept, P): ...


# %% tags=["check"]
check_6_3(backward)

# %% [markdown]
# With `dlogits` from above, your `backward(dlogits, kept, config.cca_layers)` is the gradient of the loss with respect
# to every parameter of a RETRO. The pullback of the library's `retro_loss` returns the same, and it is all that AdamW
# needs to train the model.
#
# **Exercise 6.4: table 2 by hand.** How many parameters has a RETRO, embeddings and readout left out? `d`, `d_ffw`,
# `n_heads`, `c`, `n_layers` and `P` are the decoder's; `c` is the width of a head. `e` is not a vector here but the
# encoder's configuration, with `e.d_model`, `e.d_ffw`, `e.n_heads`, `e.d_head`, `e.n_layers` and `e.ca_layers`. This is
# what there is:
#
# - No projection has a bias.
# - Each attention has the gain of a norm, five matrices, and the vectors $b_c$ and $b_p$ of each head. One side of each
#   matrix is the width of all its heads together, `n_heads * c`. The other side of $W_Q$, $W_O$ and $W_R$ is the width
#   of what asks, and that of $W_K$ and $W_V$ the width of what is read. $\mathrm{CA_{enc}}$ has a second norm, for the
#   chunk.
# - Each FFW has the gain of a norm and two matrices.
# - Decoder and encoder each end in a norm.
#
# The check asks for the baselines, too. There `P` is empty and `e` is None.


# %% tags=["exercise"]
def by_hand(d, d_ffw, n_heads, c, n_layers, P, e): ...


# %% tags=["check"]
check_6_4(by_hand)

# %% [markdown]
# ## What you have gained
#
# - The whole of algorithm 1. Every line of it, forward and backward, is on the pages of tutorials 3 to 6 or in their
#   exercises.
# - What a retrieved vector knows: its own neighbour and the chunk that asked, with its last token. This is why the test
#   for leaks needs both ways, with neighbours looked up again and with neighbours held fixed.
# - The gradient's second way back: $\mathrm{d}E$ is summed over all layers that read, goes once through the encoder,
#   and is added to $\mathrm{d}H$ where $H_u$ was taken.
# - A count of parameters that agrees with table 2 of the paper, but not with the $P$ of its table 10.
# - The rest of the model in [`mini_retro.py`](mini_retro.py), RETRO in one file of plain NumPy. Its
#   `encoder_cross_attention` is your `conditioned`, its `encode` is `encode_all`, and its `retro` is `forward` with
#   your `backward` as the pullback. What is left of that file is the text, the database, the first weights, AdamW,
#   and the loops that train and sample.
#
# Next: [tutorial 7, Train one](07_train_one.ipynb). There a model learns to answer what only its database knows.
