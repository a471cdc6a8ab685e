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
# # 3 · Backward passes by hand
#
# A language model has many million parameters and one loss. Which way should each parameter move so that the loss
# falls? Trying them one by one would take a run of the model for each. One **backward pass** answers for all of them at
# once, at the price of about two runs. Frameworks such as PyTorch derive this pass for you. This book has no framework.
# Each differentiable function in it, also called an *operator*, returns two things: its value and its **pullback**,
# which sends gradients back from the value to the arguments. In this tutorial you derive the pullbacks that a
# transformer needs, from a matrix product to attention, each in a few lines. Then you turn to a question that is harder
# than it looks: how do you know that a pullback is right?
#
# *Reading: about 75 minutes · runs in 6 s on one core · needs NumPy and the chain rule.* [Tutorial
# 0](00_a_language_model.ipynb) shows where these functions stand in a language model.
#
# Afterwards you can
#
# - derive a pullback from a small change and an inner product, without writing a Jacobian;
# - write an operator as value and pullback, and compose pullbacks in reverse;
# - write the backward pass of RMSNorm, of FFW, of cross-entropy and of attention;
# - say four ways in which a finite difference lies, and check an operator of your own with `gradcheck`.
#
# Previous: [2 · A frozen BERT](02_a_frozen_bert.ipynb) · Next: [4 · Chunked cross-attention, and why it needs
# positions](04_relative_positions.ipynb) · All letters: [symbols](../docs/symbols.md)

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from retro_np import gradcheck
from retro_np.checking import GradientError
from retro_np.nn.checks import checks
from retro_np.nn.ffw import ffw as library_ffw
from retro_np.nn.operators import cross_entropy as library_cross_entropy
from retro_np.nn.operators import rms_norm as library_rms_norm
from retro_np.tutorials.checks.tutorial_03 import check_3_1, check_3_2, check_3_3, check_3_4

BLUE, NAVY, ORANGE, GREY = "#2b7bba", "#16405f", "#e07b1f", "#8c8c8c"
rng = np.random.default_rng(0)

# %% [markdown]
# ## What $\mathrm{d}x$ means
#
# Let $\mathcal L$ be the loss, a single number. In this book the **gradient $\mathrm{d}x$ is
# $\partial\mathcal L / \partial x$**, for any array $x$ that takes part in the computation of the loss. In code it is
# called `dx`. It has the shape of $x$, and each of its entries is a partial derivative:
#
# $$\mathrm{d}x_{ij} = \frac{\partial \mathcal L}{\partial x_{ij}}.$$
#
# So `dx` is not a small change of $x$. It says what a small change would do. Write $\dot x$ for a small change of
# $x$, an array of the same shape. Then the loss changes, to first order, by the sum of all
# $\mathrm{d}x_{ij}\,\dot x_{ij}$. This sum is the **inner product** of the two arrays:
#
# $$\dot{\mathcal L} = \langle \mathrm{d}x, \dot x\rangle = \sum_{ij} \mathrm{d}x_{ij}\, \dot x_{ij}.$$
#
# Everything below follows from this line.
#
# A function $y = f(x)$ stands somewhere in the middle of the computation. Suppose we know $\mathrm{d}y$. We want
# $\mathrm{d}x$. The map from $\mathrm{d}y$ to $\mathrm{d}x$ is the **pullback** of $f$ at $x$. In code it is called
# `vjp`, for vector-Jacobian product. If $x$ and $y$ are written as vectors, the chain rule says $\mathrm{d}x = J^\top
# \mathrm{d}y$, where the Jacobian $J$ is the matrix of all $\partial y_i / \partial x_j$.
#
# Nobody wants $J$ itself. Let $x$ hold the vectors of 2,048 tokens, and let $W$ be a $d \times d$ matrix of the
# paper's smallest model, where $d = 896$:

# %%
n, d = 2048, 896
print(f"x has {n * d / 1e6:.1f} million entries, the Jacobian of x ↦ x W {(n * d) ** 2 / 1e12:.1f} million million")

# %% [markdown]
# ## A small change and an inner product
#
# What we want is how $J^\top$ acts on $\mathrm{d}y$. A recipe finds it for everything in a transformer. Let us try it
# on the matrix product $y = xW$.
#
# First, change the arguments a little and see how the value changes:
#
# $$\dot y = \dot x\, W + x\, \dot W \qquad\text{(product rule; the term with two dots is too small to count)}$$
#
# Second, write down how the loss changes, and move everything but the change to the left side of the inner product:
#
# $$\begin{aligned}
# \langle \mathrm{d}y, \dot y\rangle &= \langle \mathrm{d}y,\ \dot x\, W\rangle +
# \langle \mathrm{d}y,\ x\, \dot W\rangle && \text{put in } \dot y\\
# &= \langle \mathrm{d}y\, W^\top,\ \dot x\rangle + \langle x^\top \mathrm{d}y,\ \dot W\rangle
# && \text{a factor that changes sides is transposed}
# \end{aligned}$$
#
# Third, compare. The loss changes by $\langle \mathrm{d}x, \dot x\rangle + \langle \mathrm{d}W, \dot W\rangle$,
# whatever the small changes are. So what stands beside $\dot x$ is $\mathrm{d}x$, and what stands beside $\dot W$ is
# $\mathrm{d}W$:
#
# $$\mathrm{d}x = \mathrm{d}y\, W^\top, \qquad \mathrm{d}W = x^\top \mathrm{d}y.$$
#
# Why may a factor change sides? Write the indices. The first term is
# $\sum_{ij} \mathrm{d}y_{ij} \sum_a \dot x_{ia} W_{aj}$. Sum over $j$ first, and it reads
# $\sum_{ia} \bigl(\sum_j \mathrm{d}y_{ij} W_{aj}\bigr) \dot x_{ia}$. The inner sum is the entry $(i, a)$ of
# $\mathrm{d}y\, W^\top$. A factor that stood on the right stays on the right, and one that stood on the left stays on
# the left.
#
# Now in code. Leading axes of `x`, such as a batch, are more rows. A pullback returns a tuple, here and in the
# library: a gradient for each argument. Is $\langle \mathrm{d}y, \dot y\rangle$ equal to $\langle \mathrm{d}x, \dot
# x\rangle + \langle \mathrm{d}W, \dot W\rangle$? We can try it at once:


# %%
def linear(x, w):
    """y = x W. x: (..., d_in); w: (d_in, d_out)."""

    def vjp(dy):
        return dy @ w.T, x.reshape(-1, w.shape[0]).T @ dy.reshape(-1, w.shape[1])

    return x @ w, vjp


x, w = rng.standard_normal((5, 3)), rng.standard_normal((3, 4))
xdot, wdot = rng.standard_normal(x.shape), rng.standard_normal(w.shape)
y, vjp = linear(x, w)
dy = rng.standard_normal(y.shape)
dx, dw = vjp(dy)
left, right = np.sum(dy * (xdot @ w + x @ wdot)), np.sum(dx * xdot) + np.sum(dw * wdot)
print(f"⟨dy, ẏ⟩ = {left:.6f}, ⟨dx, ẋ⟩ + ⟨dW, Ẇ⟩ = {right:.6f}")
assert np.isclose(left, right)

# %% [markdown]
# This test uses our own $\dot y$. If we got $\dot y$ wrong, the test would be wrong too. The library's `gradcheck`
# needs no $\dot y$. It draws a random $\mathrm{d}y$. The $\mathrm{d}y$ that a pullback is given is also called its
# **cotangent**. Then `gradcheck` moves the entries of each argument by a small step $\pm\varepsilon$, one by one if
# there are not too many. From the two values it takes the **finite difference** $\langle \mathrm{d}y,\ f(x +
# \varepsilon) - f(x - \varepsilon)\rangle / 2\varepsilon$ and compares it with the entry that the pullback returns. Its
# error is the distance of the two numbers, divided by the larger of their absolute values. The entry is right if its
# error is at most the **tolerance**, `3e-09` unless you set another.
#
# Here `gradcheck` judges `linear`, and then a version that forgets to transpose. Mostly the shapes would not fit
# then. With a square matrix both $W$ and $W^\top$ fit.


# %%
def tried(name, f, *arrays, **options):
    """What gradcheck says, whether it raises or not."""
    try:
        print(f"{name}: right within {gradcheck(f, *arrays, **options).error:.0e}")
    except GradientError as error:
        print(textwrap.fill(f"{name}: {error}", 88, subsequent_indent="    "))


def linear_untransposed(x, w):
    y, vjp = linear(x, w)
    return y, lambda dy: (dy @ w, vjp(dy)[1])


tried("linear", linear, x, w)
tried("without the transpose", linear_untransposed, rng.standard_normal((2, 3)), rng.standard_normal((3, 3)))

# %% [markdown]
# ## One entry at a time: GELU
#
# The easiest functions treat each entry by itself: $y_i = f(x_i)$. The recipe takes two lines.
#
# $$\begin{aligned}
# \dot y_i &= f'(x_i)\, \dot x_i && \text{definition of the derivative}\\
# \langle \mathrm{d}y, \dot y\rangle &= \textstyle\sum_i \mathrm{d}y_i\, f'(x_i)\, \dot x_i && \text{so }\ \mathrm{d}x =
# \mathrm{d}y \odot f'(x)
# \end{aligned}$$
#
# The sign $\odot$ multiplies entry by entry. Our RETRO uses the function GELU ([Hendrycks & Gimpel
# 2016](https://arxiv.org/abs/1606.08415)), a smooth switch. Large positive numbers pass, large negative ones become
# 0:
#
# $$\mathrm{gelu}(x) = \tfrac12\, x\,(1 + \tanh a), \qquad a = \sqrt{2/\pi}\,(x + 0.044715\, x^3).$$
#
# Its derivative follows from the product rule and $\tanh' = 1 - \tanh^2$:
#
# $$\mathrm{gelu}'(x) = \tfrac12 (1 + \tanh a) +
# \tfrac12\, x\,(1 - \tanh^2 a)\,\sqrt{2/\pi}\,(1 + 3 \cdot 0.044715\, x^2).$$
#
# The pullback of a function of one argument returns a tuple, too, of one entry. Hence the comma in `(dy * slope,)`, and
# later in `(dhidden,) = gelu_vjp(dactive)`.


# %%
def gelu(x):
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    slope = (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return x / 2 * (1 + tanh), lambda dy: (dy * slope,)


tried("gelu", gelu, rng.standard_normal((3, 5)))
points = np.linspace(-4, 4, 201)
y, vjp = gelu(points)
figure, axes = plt.subplots(figsize=(4.5, 2.4))
axes.plot(points, y, color=BLUE, label="gelu($x$)")
axes.plot(points, vjp(np.ones_like(points))[0], "--", color=ORANGE, label="its derivative")
axes.axhline(0, color="black", linewidth=0.6)
axes.set(xlabel="$x$", ylabel="value, slope")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# *Figure 3.1.* GELU passes what is large and stops what is far below 0. Where it stops the value, it stops the
# gradient.
#
# ## Down, then up
#
# A model is a composition of functions. Its Jacobian is a product of Jacobians, and the transpose of a product is the
# product of the transposes in *reverse order*. So the pullbacks are called in reverse. Each gets what the pullback of
# the next function returned.
#
# One more rule is needed. If $h$ is used at two places, the small change $\dot h$ goes through both, and the loss
# changes by the sum of both effects. So **what is used twice gets two gradients, and they add**. A residual connection,
# $y = h + \text{update of } h$, uses its input twice, once in the sum and once inside. [Tutorial
# 0](00_a_language_model.ipynb) put two of them into each block of its decoder, attention and FFW. From here on each of
# the two is a block of its own, and what tutorial 0 called a block is a *layer*. Here is a block:


# %%
def block(h, w_in, w_out):
    """h + gelu(h W_in) W_out."""
    hidden, in_vjp = linear(h, w_in)
    active, gelu_vjp = gelu(hidden)
    update, out_vjp = linear(active, w_out)

    def vjp(dy):
        dactive, dw_out = out_vjp(dy)
        (dhidden,) = gelu_vjp(dactive)
        dh, dw_in = in_vjp(dhidden)
        return dy + dh, dw_in, dw_out

    return h + update, vjp


arguments = rng.standard_normal((2, 3)), rng.standard_normal((3, 4)), rng.standard_normal((4, 3))
tried("block", block, *arguments)


# %% [markdown]
# Read the function from top to bottom, and then its pullback. The same names come in reverse order, with a `d` before
# them. All blocks of the model are written like this. The classic mistake is to lose one of the two ways to `h`:


# %%
def block_without_the_residual(h, w_in, w_out):
    y, vjp = block(h, w_in, w_out)
    return y, lambda dy: (vjp(dy)[0] - dy, *vjp(dy)[1:])


tried("one way lost", block_without_the_residual, *arguments)

# %% [markdown]
# ## RMSNorm
#
# Every block of RETRO begins by bringing each token's vector to the same size, so that no block has to cope with
# vectors that grow from layer to layer. RMSNorm ([Zhang & Sennrich 2019](https://arxiv.org/abs/1910.07467)) divides a
# row $x$ of $d$ numbers by its root mean square. Then it multiplies with a learned gain $\gamma$, entry by entry:
#
# $$s = \Bigl(\frac1d \sum_i x_i^2 + \mathrm{eps}\Bigr)^{-1/2}, \qquad \hat x = s\,x, \qquad y = \gamma \odot \hat x.$$
#
# The constant eps is tiny. It keeps a row of zeros from being divided by zero. Call $\hat x$ the unit row: its root
# mean square is 1.
#
# The last product is easy. It gives $\mathrm{d}\hat x = \gamma \odot \mathrm{d}y$, and $\mathrm{d}\gamma = \mathrm{d}y
# \odot \hat x$, summed over all rows because they share $\gamma$. For the way from $\hat x$ to $x$, change $x$ a
# little:
#
# $$\begin{aligned}
# \dot s &= -\tfrac12\, s^3 \cdot \tfrac2d\, \langle x, \dot x\rangle
# && \text{chain rule: } s = a^{-1/2} \text{ has the derivative } -\tfrac12\, a^{-3/2} = -\tfrac12\, s^3\\
# &= -\tfrac{s^3}{d}\, \langle x, \dot x\rangle && \text{simplify}\\
# \dot{\hat x} &= s\,\dot x + \dot s\, x && \text{product rule}\\
# &= s\,\dot x - \tfrac{s^3}{d}\, x\, \langle x, \dot x\rangle && \text{put in } \dot s\\
# &= s\,\dot x - \tfrac{s}{d}\, \hat x\, \langle \hat x, \dot x\rangle && \text{since } s\,x = \hat x\text{, twice}\\
# \langle \mathrm{d}\hat x, \dot{\hat x}\rangle &= s \langle \mathrm{d}\hat x, \dot x\rangle -
# \tfrac{s}{d} \langle \mathrm{d}\hat x, \hat x\rangle \langle \hat x, \dot x\rangle
# && \text{take the inner product}\\
# &= \bigl\langle s\,\bigl(\mathrm{d}\hat x - \hat x\, \tfrac1d \langle \mathrm{d}\hat x, \hat x\rangle\bigr),\
# \dot x\bigr\rangle && \text{collect what stands beside } \dot x
# \end{aligned}$$
#
# So
#
# $$\mathrm{d}x = s\,\bigl(\mathrm{d}\hat x - \hat x \cdot \mathrm{mean}(\mathrm{d}\hat x \odot \hat x)\bigr).$$
#
# The second term has a meaning. A longer $x$ gives the same $y$, so the gradient must have no part along $x$. The
# second term takes away just that part. Up to eps, $\mathrm{d}x$ is orthogonal to $x$:


# %%
def rms_norm(x, gain, eps=1e-6):
    scale = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    unit = x * scale

    def vjp(dy):
        dunit = gain * dy
        dx = scale * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
        return dx, (dy * unit).reshape(-1, len(gain)).sum(axis=0)

    return gain * unit, vjp


x, gain, dy = rng.standard_normal((4, 6)), rng.standard_normal(6), rng.standard_normal((4, 6))
y, vjp = rms_norm(x, gain, eps=0)
dx, dgain = vjp(dy)
assert np.allclose(y, rms_norm(7 * x, gain, eps=0)[0])
print("⟨dx, x⟩ of each row:", np.abs(np.sum(dx * x, axis=-1)).round(12))
library_y, library_vjp = library_rms_norm(x, gain, eps=0)
for ours, theirs in zip((y, dx, dgain), (library_y, *library_vjp(dy)), strict=True):
    assert np.allclose(ours, theirs)
print("value and gradients equal the library's")

# %% [markdown]
# ## FFW
#
# Each layer of a transformer has two blocks. Attention, to which we come below, moves information from token to token.
# The other block, **FFW** for feed-forward, works on each token by itself. It asks many questions of a token's vector
# at once, and answers them:
#
# $$Y = H + \mathrm{gelu}\bigl(\mathrm{norm}(H)\, W_{\mathrm{in}}\bigr)\, W_{\mathrm{out}}.$$
#
# Each column of $W_{\mathrm{in}}$ is a question, a pattern to look for. GELU keeps the patterns that were found. Each
# row of $W_{\mathrm{out}}$ is what to add to the token's vector if its pattern was found. The paper asks four times
# as many questions as a vector has entries.
#
# There is nothing new to derive. FFW is a norm, a product, a GELU, a product and a sum, all of which have pullbacks
# by now. Down and up:


# %%
def ffw(params, h):
    """h + gelu(norm(h) W_in) W_out. h: (..., d). vjp(dy) → (gradients of params, dh)."""
    normed, norm_vjp = rms_norm(h, params["norm"])
    hidden, in_vjp = linear(normed, params["w_in"])
    active, gelu_vjp = gelu(hidden)
    update, out_vjp = linear(active, params["w_out"])

    def vjp(dy):
        dactive, dw_out = out_vjp(dy)
        (dhidden,) = gelu_vjp(dactive)
        dnormed, dw_in = in_vjp(dhidden)
        dh, dnorm = norm_vjp(dnormed)
        return {"norm": dnorm, "w_in": dw_in, "w_out": dw_out}, dy + dh

    return h + update, vjp


shapes = {"norm": 6, "w_in": (6, 24), "w_out": (24, 6)}
ffw_params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
h = rng.standard_normal((2, 5, 6))
assert np.allclose(ffw(ffw_params, h)[0], library_ffw(ffw_params, h)[0])
tried("FFW", ffw, ffw_params, h)

# %% [markdown]
# ## Embedding
#
# The first function of a language model looks up a row of a table for each token ([tutorial
# 0](00_a_language_model.ipynb)). How does a gradient go back through a lookup?
#
# Write the tokens as **one-hot** rows: an array $U$ with one row per token of the text and one column per token of the
# vocabulary $\mathcal V$, 1 where the token is and 0 elsewhere. Then the lookup is the product $Y = U\,W$ with the
# table $W$, and the recipe has been through it already:
#
# $$\mathrm{d}W = U^\top\, \mathrm{d}Y, \qquad\text{row by row:}\qquad
# \mathrm{d}W_a = \sum_{t\,:\,x_t = a} \mathrm{d}y_t.$$
#
# Here $x_t$ is the token at place $t$. A row of the table collects the gradients of all places at which its token
# occurs. A token that does not occur gets zero. With a large vocabulary, nobody multiplies with a matrix of zeros. One
# adds each $\mathrm{d}y_t$ to its row. But take care how. If a token occurs twice, NumPy's `dw[tokens] += dy` keeps
# only the last of its gradients:


# %%
def embedding(w, tokens):
    """w[tokens]. w: (|𝒱|, d); tokens: integers of any shape."""

    def vjp(dy):
        dw = np.zeros_like(w)
        np.add.at(dw, tokens, dy)  # adds at each occurrence
        return (dw,)

    return w[tokens], vjp


def embedding_loses_repeats(w, tokens):
    def vjp(dy):
        dw = np.zeros_like(w)
        dw[tokens] += dy
        return (dw,)

    return w[tokens], vjp


w, tokens = rng.standard_normal((4, 3)), np.array([2, 0, 2, 1])
one_hot, dy = np.eye(4)[tokens], rng.standard_normal((4, 3))
assert np.allclose(embedding(w, tokens)[1](dy)[0], one_hot.T @ dy)
tried("embedding", embedding, w, tokens)  # tokens are integers, so gradcheck does not move them
tried("repeats lost", embedding_loses_repeats, w, tokens)

# %% [markdown]
# ## Softmax
#
# The softmax turns a row of numbers $z$ into probabilities, $p_i = e^{z_i} / \sum_j e^{z_j}$. The logarithm of this sum
# is called **log-sum-exp**, $\mathrm{lse} = \ln \sum_j e^{z_j}$. With it, $p_i = e^{z_i - \mathrm{lse}}$. Then
#
# $$\begin{aligned}
# \dot p_i &= p_i\, (\dot z_i - \dot{\mathrm{lse}}) && \text{chain rule}\\
# \dot{\mathrm{lse}} &= \textstyle\sum_j e^{z_j}\, \dot z_j \big/ \sum_j e^{z_j} = \textstyle\sum_j p_j\, \dot z_j
# && \text{derivative of the logarithm}\\
# \dot p_i &= p_i\, \dot z_i - p_i \textstyle\sum_j p_j\, \dot z_j && \text{put in } \dot{\mathrm{lse}}\\
# \langle \mathrm{d}p, \dot p\rangle &= \textstyle\sum_j \mathrm{d}p_j\, p_j\, \dot z_j - \bigl(\sum_i \mathrm{d}p_i\,
# p_i\bigr) \sum_j p_j\, \dot z_j && \text{take the inner product}
# \end{aligned}$$
#
# Collect what stands beside $\dot z_j$:
#
# $$\mathrm{d}z_j = p_j\, \Bigl(\mathrm{d}p_j - \sum_i \mathrm{d}p_i\, p_i\Bigr).$$
#
# As in RMSNorm a mean is subtracted, here one weighted by $p$, and for the same kind of reason. A constant added to
# all $z_i$ changes nothing, so the entries of $\mathrm{d}z$ must sum to 0.
#
# The third line of the derivation is the Jacobian: $\partial p_i / \partial z_j$ is $p_i (1 - p_i)$ for $j = i$ and
# $-p_i\, p_j$ otherwise. For five numbers it is small enough to look at. The pullback of the unit vectors gives its
# rows.


# %%
def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))  # minus the largest: no overflow
    p /= p.sum(axis=-1, keepdims=True)

    def vjp(dp):
        return (p * (dp - np.sum(dp * p, axis=-1, keepdims=True)),)

    return p, vjp


tried("softmax", softmax, rng.standard_normal((3, 5)))
p, vjp = softmax(np.array([0.0, 1.0, 2.0, 0.5, -1.0]))
jacobian = np.array([vjp(row)[0] for row in np.eye(5)])
assert np.allclose(jacobian, np.diag(p) - np.outer(p, p))
figure, axes = plt.subplots(figsize=(3.8, 3))
image = axes.imshow(jacobian, cmap="PuOr", vmin=-0.3, vmax=0.3)
for (i, j), slope in np.ndenumerate(jacobian):
    axes.text(j, i, f"{slope:.2f}", ha="center", va="center", fontsize=8, color="white" if slope > 0.2 else "black")
axes.set(xlabel="$j$, of $z_j$", ylabel="$i$, of $p_i$", title=r"$\partial p_i\ /\ \partial z_j$")
figure.colorbar(image, shrink=0.9)
plt.show()

# %% [markdown]
# *Figure 3.2.* The Jacobian of a softmax. Raising $z_j$ raises $p_j$ and lowers all other probabilities; rows and
# columns sum to 0.
#
# ## Cross-entropy
#
# The last function of a language model turns logits into the loss ([tutorial 0](00_a_language_model.ipynb)). Take one
# token first. $z$ are the logits, $p = \mathrm{softmax}(z)$, and $y$ is the one-hot row of the token that really
# came. The loss is $-\ln p$ at that token, which is $\mathcal L = -\sum_i y_i \ln p_i$. Two pullbacks in a row lead
# to $\mathrm{d}z$:
#
# $$\begin{aligned}
# \mathrm{d}p_i &= -\,y_i / p_i && \text{derivative of the logarithm}\\
# \mathrm{d}z_j &= p_j \bigl(\mathrm{d}p_j - \textstyle\sum_i \mathrm{d}p_i\, p_i\bigr)
# && \text{the softmax, from above}\\
# &= p_j \bigl(-\,y_j / p_j + \textstyle\sum_i y_i\bigr) && \text{put in } \mathrm{d}p\\
# &= p_j - y_j && \text{since } \textstyle\sum_i y_i = 1
# \end{aligned}$$
#
# Predicted minus true: the whole chain collapses to one subtraction. For a text, the loss is the mean over $n$ tokens,
# so each row is divided by $n$. The pullback gets the gradient of the loss itself, which is 1. The library's version
# also leaves out padding, the filler with which a text that is too short is brought to length.
#
# Why not call the two pullbacks one after the other? Because the first line divides by $p_i$. If the model was so
# sure of another token that $p_i$ rounds to 0, the division fails. The one subtraction never does:


# %%
def cross_entropy(logits, targets):
    """Mean of −ln p(target), in nats. logits: (n, |𝒱|); targets: (n,)."""
    largest = logits.max(axis=-1, keepdims=True)
    log_sum = largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
    log_p, places = logits - log_sum, np.arange(len(targets))

    def vjp(dloss):
        dlogits = np.exp(log_p)
        dlogits[places, targets] -= 1  # p − y
        return (dlogits * dloss / len(targets),)

    return -log_p[places, targets].mean(), vjp


logits, targets = rng.standard_normal((4, 6)), rng.integers(0, 6, 4)
tried("cross-entropy", cross_entropy, logits, targets)
assert np.isclose(cross_entropy(logits, targets)[0], library_cross_entropy(logits, targets, padding_id=None)[0])
sure, came = np.array([[0.0, -800.0]]), np.array([1])  # the model is sure of token 0, and token 1 comes
p, softmax_vjp = softmax(sure)
with np.errstate(divide="ignore", invalid="ignore"):
    print("two pullbacks in a row:", softmax_vjp(np.array([[0.0, -1.0]]) / p)[0][0])
loss, vjp = cross_entropy(sure, came)
print("p − y:                 ", vjp(1.0)[0][0], f" loss {loss:.0f} nats")

# %% [markdown]
# ## Attention
#
# Attention mixes rows. Query $i$ compares itself with each key $j$, and takes a mean of the values, in which the
# values of similar keys count for more ([tutorial 0](00_a_language_model.ipynb) explains it from nothing). With
# queries $Q$, `(n, c)`, keys $K$ and values $V$, both `(r, c)`:
#
# $$Z = \frac{Q K^\top}{\sqrt c}, \qquad A = \operatorname{softmax}(Z) \text{ in each row}, \qquad O = A V.$$
#
# $Z$ are the scores, $A$ the weights and $O$ the output. Attention is two products with a softmax between them, and
# their pullbacks are known. On the way back the last product comes first:
#
# $$\begin{aligned}
# \dot O &= \dot A\, V + A\, \dot V && \text{product rule}\\
# \langle \mathrm{d}O, \dot O\rangle &= \langle \mathrm{d}O\, V^\top, \dot A\rangle + \langle A^\top \mathrm{d}O, \dot
# V\rangle && \text{factors change sides}\\
# \mathrm{d}A &= \mathrm{d}O\, V^\top, \qquad \mathrm{d}V = A^\top \mathrm{d}O && \text{collect}\\[4pt]
# \mathrm{d}Z_{ij} &= A_{ij} \bigl(\mathrm{d}A_{ij} - \textstyle\sum_{a} A_{ia}\, \mathrm{d}A_{ia}\bigr)
# && \text{softmax, row by row}\\[4pt]
# \dot Z &= (\dot Q K^\top + Q \dot K^\top) / \sqrt c && \text{product rule}\\
# \langle \mathrm{d}Z, \dot Z\rangle &= \langle \mathrm{d}Z\, K / \sqrt c, \dot Q\rangle +
# \langle \mathrm{d}Z^\top Q / \sqrt c, \dot K\rangle && \text{factors change sides}\\
# \mathrm{d}Q &= \mathrm{d}Z\, K / \sqrt c, \qquad \mathrm{d}K = \mathrm{d}Z^\top Q / \sqrt c && \text{collect}
# \end{aligned}$$
#
# One step is hidden in the last term, because $\dot K$ is transposed. An inner product stays the same if both its sides
# are transposed. So $\langle \mathrm{d}Z, Q \dot K^\top\rangle = \langle \mathrm{d}Z^\top, \dot K Q^\top\rangle =
# \langle \mathrm{d}Z^\top Q, \dot K\rangle$.

# %% tags=["hide-input"]
nodes = {"Q": (0, 2), "K": (0, 1), "V": (0, 0), "Z": (2.2, 1.5), "A": (4.4, 1.5), "O": (6.6, 0.75)}
wires = [("Q", "Z"), ("K", "Z"), ("Z", "A"), ("A", "O"), ("V", "O")]
back = {"Q": r"$\mathrm{d}Z\,K/\sqrt{c}$", "K": r"$\mathrm{d}Z^\top Q/\sqrt{c}$", "V": r"$A^\top\mathrm{d}O$"}
back |= {"Z": "softmax's pullback", "A": r"$\mathrm{d}O\,V^\top$"}
figure, axes = plt.subplots(figsize=(8, 2.8))
for begin, end in wires:
    (x0, y0), (x1, y1) = nodes[begin], nodes[end]
    for side, (start, stop), colour in ((0.06, (0, 1), BLUE), (-0.06, (1, 0), ORANGE)):
        xs, ys = (x0 + 0.32, x1 - 0.32), (y0 + side, y1 + side)
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5}
        axes.annotate("", (xs[stop], ys[stop]), (xs[start], ys[start]), arrowprops=arrow)
for name, (x, y) in nodes.items():
    axes.add_patch(plt.Rectangle((x - 0.3, y - 0.25), 0.6, 0.5, facecolor="white", edgecolor="black"))
    axes.text(x, y, f"${name}$", ha="center", va="center", fontsize=12)
for name, text in back.items():
    (x, y), below = nodes[name], name in "ZA"
    place = (x, y - 0.45) if below else (x - 0.4, y)
    axes.text(
        *place,
        rf"$\mathrm{{d}}{name}$ = {text}",
        color=ORANGE,
        ha="center" if below else "right",
        va="center",
        fontsize=9,
    )
for x, y, text in ((2.2, 2.0, r"$QK^\top/\sqrt{c}$"), (4.4, 2.0, "softmax of each row"), (6.6, 1.25, "$A\\,V$")):
    axes.text(x, y, text, color=BLUE, ha="center", va="center", fontsize=9)
axes.set(xlim=(-2.3, 7.2), ylim=(-0.4, 2.4))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 3.3.* Attention forwards (blue) and backwards (orange). Each orange label is the gradient of the array
# beside it.
#
# In code the last two axes are those of the formulas. Axes in front of them, say one for heads, are carried along.


# %%
def attention(q, keys, values):
    """q: (..., n, c); keys, values: (..., r, c). Returns (..., n, c)."""
    scale = q.shape[-1] ** -0.5
    A, softmax_vjp = softmax(q @ keys.swapaxes(-1, -2) * scale)

    def vjp(dout):
        dA, dvalues = dout @ values.swapaxes(-1, -2), A.swapaxes(-1, -2) @ dout
        (dZ,) = softmax_vjp(dA)
        return dZ @ keys * scale, dZ.swapaxes(-1, -2) @ q * scale, dvalues

    return A @ values, vjp


parts = rng.standard_normal((3, 4)), rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
tried("attention", attention, *parts)

# %% [markdown]
# Two things stand around this in a model. **Projections** make queries, keys and values from the tokens' vectors. Let
# the rows of $X$ be the vectors that ask, and those of $E$ the vectors that are read. Then $Q = X W_Q$, $K = E W_K$,
# $V = E W_V$. In self-attention $E = X$. In cross-attention the rows of $E$ come from another sequence, which is how
# RETRO reads its neighbours. And there are several **heads**. The columns of $Q$, $K$ and $V$ are cut into `n_heads`
# parts of $c$ columns. Each head attends by itself. Their outputs are put side by side again, and a last matrix $W_O$
# mixes them. Cutting and putting side by side only moves numbers, so the pullback of the one is the other. In
# exercise 3.4 you write all of it.
#
# ## A model, down and up
#
# Put the pieces together: embedding, self-attention with one head, FFW, readout, loss. The readout is one more
# `linear`, from a token's vector to its logits. To predict the next token, a query may not see later keys. A mask
# adds $-\infty$ to their scores, so that their weights are 0. The pullback of the softmax needs no change, because a
# weight of 0 passes no gradient.


# %%
def masked_attention(q, keys, values):
    """Attention under the causal mask: query i sees keys 0 … i."""
    scale = q.shape[-1] ** -0.5
    A, softmax_vjp = softmax(q @ keys.T * scale + np.triu(np.full((len(q), len(q)), -np.inf), 1))

    def vjp(dout):
        (dZ,) = softmax_vjp(dout @ values.T)
        return dZ @ keys * scale, dZ.T @ q * scale, A.T @ dout

    return A @ values, vjp


def model_loss(params, tokens):
    """Mean nats of tokens[1:], each predicted from the tokens before it. vjp(dloss) → gradients, a dict like params."""
    h, embedding_vjp = embedding(params["embedding"], tokens[:-1])
    normed, norm_vjp = rms_norm(h, params["norm"])
    (q, q_vjp), (keys, k_vjp), (values, v_vjp) = (linear(normed, params[name]) for name in ("w_q", "w_k", "w_v"))
    update, attention_vjp = masked_attention(q, keys, values)
    y, ffw_vjp = ffw(params["ffw"], h + update)
    logits, readout_vjp = linear(y, params["readout"])
    loss, loss_vjp = cross_entropy(logits, tokens[1:])

    def vjp(dloss):
        grads = {}
        (dlogits,) = loss_vjp(dloss)
        dy, grads["readout"] = readout_vjp(dlogits)
        grads["ffw"], dupdate = ffw_vjp(dy)  # the gradient of h + update goes to both terms
        dq, dkeys, dvalues = attention_vjp(dupdate)
        dnormed_q, grads["w_q"] = q_vjp(dq)
        dnormed_k, grads["w_k"] = k_vjp(dkeys)
        dnormed_v, grads["w_v"] = v_vjp(dvalues)
        dh, grads["norm"] = norm_vjp(dnormed_q + dnormed_k + dnormed_v)  # used three times
        (grads["embedding"],) = embedding_vjp(dupdate + dh)  # used twice
        return (grads,)

    return loss, vjp


shapes = {"embedding": (7, 6), "norm": 6, "w_q": (6, 4), "w_k": (6, 4), "w_v": (6, 6), "readout": (6, 7)}
params = {name: rng.standard_normal(shape) for name, shape in shapes.items()} | {"ffw": ffw_params}
tried("the loss of a transformer of one layer", model_loss, params, rng.integers(0, 7, 9))

# %% [markdown]
# This is the backward pass of a whole language model, and you have derived every line of it. Finite differences say
# that it is right. How far can we trust them? They lie in four ways.
#
# If you want to see RETRO first, go on to the exercises now, and to [tutorial 4](04_relative_positions.ipynb). What
# stands between here and the exercises is about checking gradients. Nothing later needs it. It is for the day on which
# a check of yours fails, or passes and should not.
#
# ## First lie: the step
#
# A Taylor series says how far a difference is off. The one-sided difference $(f(x + \varepsilon) - f(x)) /
# \varepsilon$ is off by a multiple of $\varepsilon$. The central one, $(f(x + \varepsilon) - f(x - \varepsilon)) /
# 2\varepsilon$, is off by a multiple of $\varepsilon^2$. So $\varepsilon$ should be small. But both values are
# rounded, each by up to a share $\eta$ of itself. Their difference is divided by $\varepsilon$, which leaves an error
# of about $\eta / \varepsilon$. This error *grows* as $\varepsilon$ shrinks.
#
# The two cells below take the slope of a softmax in 30 random directions, by differences and by the pullback. The
# line called extrapolated is explained after the figure.


# %%
def slope_errors(eps, dtype, kind):
    """Root mean square of (difference − pullback), relative to the slopes, over random directions."""
    rng = np.random.default_rng(1)
    x, cotangent = rng.standard_normal(8), rng.standard_normal(8)
    directions = rng.standard_normal((30, 8))
    true = directions @ softmax(x)[1](cotangent)[0]

    def value(step):
        return softmax((x + step * directions).astype(dtype))[0] @ cotangent

    def central(step):
        return (value(step) - value(-step)) / (2 * step)

    slopes = {
        "one-sided": (value(eps) - value(0)) / eps,
        "central": central(eps),
        "extrapolated": (16 * central(eps / 4) - central(eps)) / 15,
    }
    return np.sqrt(np.mean((slopes[kind] - true) ** 2) / np.mean(true**2))


# %%
for dtype in ("float64", "float32"):
    print(f"{dtype} rounds by up to η = {np.finfo(dtype).eps / 2:.1e} of a number")
steps = 10.0 ** np.arange(-12, 0.1, 0.25)
lines = (
    ("float64", "one-sided", BLUE, "--"),
    ("float64", "central", BLUE, "-"),
    ("float64", "extrapolated", NAVY, ":"),
    ("float32", "one-sided", ORANGE, "--"),
    ("float32", "central", ORANGE, "-"),
)
figure, axes = plt.subplots(figsize=(5.5, 3.6))
least = {}
for dtype, kind, colour, style in lines:
    errors = np.array([slope_errors(eps, dtype, kind) for eps in steps])
    name = f"{dtype}, {kind}"
    axes.loglog(steps, errors, style, color=colour, label=name)
    least[name] = errors.min()
    lowest = np.log10([errors.min(), steps[errors.argmin()]])
    print("{:21} least error about 1e{:.0f}, at ε about 1e{:.0f}".format(name, *lowest))
axes.axvline(2**-10, color=GREY, linewidth=1)
axes.text(1.3 * 2**-10, 3, "gradcheck\nbegins here", color=GREY, fontsize=8, va="center")
axes.set(xlabel=r"step $\varepsilon$", ylabel="relative error of the slope", ylim=(1e-14, 1e2))
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
assert least["float64, extrapolated"] < least["float64, central"] / 10
assert least["float64, central"] < 1e-8 < least["float64, one-sided"] * 10
assert least["float32, central"] > 1e-6

# %% [markdown]
# *Figure 3.4.* Right of the lowest point of a line, the error is that of the formula. Left of it, the error is that
# of the arithmetic. At the far left of the float32 lines, $x + \varepsilon$ rounds to $x$. The difference is 0 there,
# and the error is the whole slope.
#
# Where is the lowest point of a central difference? Where both errors are equal,
# $\varepsilon^2 = \eta / \varepsilon$, so near $\varepsilon = \eta^{1/3}$. The error there is about $\eta^{2/3}$.
#
# Two central differences do better than one. Let $D(\varepsilon)$ be the central difference. It is the slope plus a
# multiple of $\varepsilon^2$ plus terms of order $\varepsilon^4$. With a quarter of the step, the middle part is a
# sixteenth. So $(16\, D(\varepsilon/4) - D(\varepsilon)) / 15$ is free of it. This is Richardson extrapolation, the
# dotted line. Its lowest point is near $\eta^{1/5}$, and the error there is about $\eta^{4/5}$.
#
# `gradcheck` therefore makes float64 of arguments in float32. It begins with two steps, $2^{-10}$ and $2^{-12}$ times
# the size of the entry that moves. A fixed step would be lost beside an entry of $10^{12}$ and far too long for one
# of $10^{-12}$. An entry that is 0, or far smaller than the others, counts as a sixty-fourth of the median size of
# the entries that are not 0.
#
# If the result does not agree with the pullback, `gradcheck` tries longer and shorter steps. Where the errors of the
# formula and of the arithmetic are both small, neighbouring steps give nearly the same slope. What these slopes still
# differ by is called the *resolution*. A gradient is called wrong only if two things hold: its error is above the
# tolerance of `3e-09`, and it is also well above the resolution. The report has a row for each argument. Here is one
# for a function whose first argument is a billion times larger than its second. In the row of `x` the error is well
# above the resolution. The gradient is accepted all the same, because the error is below the tolerance. [Checking a
# backward pass](../docs/gradcheck.md) has more such reports.

# %%
x, gain = 1e9 * rng.standard_normal((4, 6)), rng.standard_normal(6)
print(gradcheck(lambda x, gain: rms_norm(x, gain, eps=0), x, gain))

# %% [markdown]
# ## Second lie: float32 on the way
#
# `gradcheck` cannot make float64 of what happens inside a function. If the function rounds to float32 on its way, the
# differences are too coarse to say much about the pullback. Below, the pullback is right if `slip` is 0:


# %%
def softmax_in_single(x, slip=0):
    """The gradient is too large by slip / 10,000 of itself."""
    p, vjp = softmax(x.astype(np.float32))
    return p, lambda dp: (vjp(dp)[0] * (1 + slip / 10_000),)


logits = rng.standard_normal((2, 4))
tried("float32 inside", softmax_in_single, logits)
for slip in (0, 5, 100):  # integers: gradcheck leaves them as they are
    report = gradcheck(softmax_in_single, logits, slip, tolerance=1e-3, raise_exception=False)
    print(f"with tolerance 1e-3, gradient {slip / 100} % too large: {report.rows[0].verdict}")

# %% [markdown]
# `gradcheck` cannot tell whether the pullback is right, and counts that as a failure. A tolerance that suits float32
# lets the function pass. It also lets a mistake of one part in two thousand pass. It is better to let the function
# run in the type of its arguments. What rounds on the way is usually a buffer that was made as float32, whatever came
# in.
#
# ## Third lie: ties
#
# The maximum of two numbers has a kink where they are equal. There a central difference takes the mean of two slopes.
# For $\max(x, 0)$ it says one half at 0, where the pullback says 0 or 1. In the picture, the step of the slope
# becomes a ramp of width $2\varepsilon$.
#
# Shorter steps do not help, and neighbouring steps agree. So `gradcheck` also compares the slopes on the two sides.
# Their difference shrinks with the step, except at a kink. The numbers that it prints are multiplied with the random
# $\mathrm{d}y$.


# %%
def maximum(x):
    """The largest entry of each row; its gradient goes to the first of them."""
    first = x.argmax(axis=-1)[..., None]

    def vjp(dy):
        dx = np.zeros_like(x)
        np.put_along_axis(dx, first, dy[..., None], axis=-1)
        return (dx,)

    return x.max(axis=-1), vjp


tied = np.array([[3.0, 3.0, 1.0], [0.0, 4.0, 1.0]])
tried("no ties", maximum, np.array([[3.0, 2.0, 1.0], [0.0, 4.0, 1.0]]))
tried("a tie   ", maximum, tied)
assert not gradcheck(maximum, tied, raise_exception=False)
eps, points = 0.3, np.linspace(-1, 1, 401)
figure, axes = plt.subplots(figsize=(4.5, 2.4))
axes.plot(points, points > 0, color=BLUE, label=r"slope of $\max(x, 0)$")
difference = (np.maximum(points + eps, 0) - np.maximum(points - eps, 0)) / (2 * eps)
axes.plot(points, difference, "--", color=ORANGE, label=r"central difference, $\varepsilon = 0.3$")
axes.plot([0], [0.5], "o", color=ORANGE)
axes.set(xlabel="$x$", ylabel=r"slope of $\max(x, 0)$")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# *Figure 3.5.* At the kink the central difference is one half for every $\varepsilon$.
#
# Neither side is wrong. At a kink there is no gradient, and any slope between the two may serve as one. Random
# numbers hardly ever tie, but integers, zeros and padding do. Check at a point without ties, and decide for yourself
# what should happen at ties.
#
# ## Fourth lie: a point at which everything is right
#
# A right pullback that fails is a nuisance. A wrong one that passes is worse. It can pass in three ways.
#
# **A gradient of ones.** Whoever checks the gradient of `y.sum()` sets $\mathrm{d}y = 1$ everywhere. The sum of a
# softmax is 1 whatever $x$ is. Its gradient is 0, and many a wrong pullback returns 0 there, too. `gradcheck` draws
# several random $\mathrm{d}y$. Two of them have no small entries. Others are 0 except at a single output, so that no
# output can hide behind a larger one.


# %%
def softmax_without_p(x):
    p, _ = softmax(x)
    return p, lambda dp: (dp - np.sum(dp * p, axis=-1, keepdims=True),)  # the factor p forgotten


def disagreement(f, x, dy, step=1e-5):
    """The largest difference between the pullback of dy and central differences: a check by hand."""
    (dx,) = f(x)[1](dy)
    moves = step * np.eye(x.size).reshape(-1, *x.shape)
    slopes = [np.sum(dy * (f(x + move)[0] - f(x - move)[0])) / (2 * step) for move in moves]
    return np.abs(dx.reshape(-1) - slopes).max()


print(
    f"dy = 1:    pullback and differences agree within {disagreement(softmax_without_p, logits, np.ones((2, 4))):.0e}"
)
print(f"random dy: they differ by up to {disagreement(softmax_without_p, logits, rng.standard_normal((2, 4))):.1f}")
tried("gradcheck", softmax_without_p, logits)

# %% [markdown]
# **Convenient arguments.** A gain begins at 1, and many other parameters at 0. At gain 1 nobody sees that the gain
# was forgotten. So check away from the values with which training begins.


# %%
def rms_norm_forgets_gain(x, gain):
    y, vjp = rms_norm(x, gain)
    _, plain_vjp = rms_norm(x, np.ones_like(gain))
    return y, lambda dy: (plain_vjp(dy)[0], vjp(dy)[1])


x = rng.standard_normal((2, 3))
tried("gain 1     ", rms_norm_forgets_gain, x, np.ones(3))
tried("random gain", rms_norm_forgets_gain, x, rng.standard_normal(3))

# %% [markdown]
# **Size.** Moving the entries of a large array one by one takes long. Moving all of them at once, along a random
# direction, is quick. But then one wrong entry among a hundred shows only as about a tenth of its error, and one
# among a million as about a thousandth. Below, one entry of $\mathrm{d}W$ is 1 % too large. The cell prints the error
# of $\mathrm{d}W$ along random directions, computed by hand, and then what `gradcheck` says. The entries of `x` and
# `dy` are 1 and −1, so that all entries of $\mathrm{d}W$ have the same size.


# %%
def linear_with_a_slip(x, w):
    y, vjp = linear(x, w)

    def slipped(dy):
        dx, dw = vjp(dy)
        dw[1, 2] *= 1.01
        return dx, dw

    return y, slipped


for size in (4, 16, 64, 256):
    x, dy = rng.choice([-1.0, 1.0], (2, 1, size))
    w, directions = rng.standard_normal((size, size)), rng.standard_normal((30, size, size))
    slopes = np.array([np.sum(dy * (linear(x, w + v)[0] - linear(x, w - v)[0])) / 2 for v in directions])
    _, dw = linear_with_a_slip(x, w)[1](dy)
    errors = np.sum(dw * directions, axis=(1, 2)) - slopes
    by_hand = np.sqrt(np.mean(errors**2) / np.mean(slopes**2))
    row = gradcheck(linear_with_a_slip, x, w, raise_exception=False).rows[1]
    print(f"{size:3} × {size:3}: by hand {by_hand:.0e}; gradcheck {row.error:.3f}, {row.verdict}, {row.where}")

# %% [markdown]
# By hand, a tolerance chosen by taste, say $10^{-4}$, would let the largest matrix pass. If there are many entries,
# `gradcheck` uses such directions, too, and moves only some entries one by one. But a right pullback agrees with the
# extrapolated slope to many digits, so `gradcheck` takes even a small disagreement for a mistake. It then halves the
# set of entries that move, again and again, until one is left. A small case is still checked more closely, and more
# quickly. Choose odd sizes that all differ.
#
# ## What no difference sees
#
# A gradient can have the right numbers and still harm its caller. The pullback below saves two temporary arrays by
# working inside the array that it was given. Now think of a residual block. It adds `dy` to what comes back from such
# a pullback, and `dy` is no longer what it was.


# %%
def softmax_in_place(x):
    p, _ = softmax(x)

    def vjp(dp):
        dp -= np.sum(dp * p, axis=-1, keepdims=True)
        dp *= p
        return (dp,)

    return p, vjp


tried("in place", softmax_in_place, logits)

# %% [markdown]
# `gradcheck` calls function and pullback several times. It compares everything that it handed over or got back with
# copies made before. It refuses a pullback that is right only once, that is not linear in $\mathrm{d}y$, or that
# reads what a later call has left behind. It also refuses gradients that share a buffer.
#
# ## The library's own
#
# The command `retro-np gradcheck` puts every operator of the library through this, up to the whole model with masked
# and missing neighbours. Here are seven of them:

# %%
for check in checks():
    if check.name in {"linear", "rms_norm", "gelu", "embedding", "cross_entropy", "attention, causal", "FFW"}:
        print(f"{check.name:18} right within {gradcheck(check.f, *check.arrays).error:.0e}")

# %% [markdown]
# ## Exercises
#
# Four steps from a function of one number to the whole of cross-attention. Write into the cell with the dots. The
# cell below it tells you whether your answer is right, and if not, where it goes wrong first.
#
# **3.1** Your first operator: $y = x\,\sigma(x)$ with $\sigma(x) = 1 / (1 + e^{-x})$. Return the value and the
# pullback, which returns a tuple of one gradient.


# %% tags=["exercise"]
def swish(x): ...


# %% tags=["check"]
check_3_1(swish)

# %% [markdown]
# **3.2** LayerNorm, which BERT has where RETRO has RMSNorm. Let $\mu$ be the mean of a row $x$, and let its variance be
# the mean of the squares of $x_i - \mu$. As in `rms_norm`, `x` may have axes in front: `(..., d)`. Then
#
# $$y = \gamma \odot \frac{x - \mu}{\sqrt{\mathrm{variance} + \mathrm{eps}}} + b.$$
#
# `gain` is $\gamma$ and `bias` is $b$, both `(d,)`. The pullback returns `dx`, `dgain` and `dbias`. Along which two
# directions has $\mathrm{d}x$ no part this time?


# %% tags=["exercise"]
def layer_norm(x, gain, bias, eps=1e-12): ...


# %% tags=["check"]
check_3_2(layer_norm)

# %% [markdown]
# **3.3** The pullback of attention, some keys at a time. A fast program for attention, a *kernel*, never stores the
# weights $A$. It goes through the keys in parts ([Dao et al. 2022](https://arxiv.org/abs/2205.14135)). The forward pass
# leaves two things for the way back. One is the output $O$. The other is one number for each query, the log-sum-exp of
# its scores:
#
# $$\mathrm{lse}_i = \ln \sum_j e^{Z_{ij}}, \qquad\text{so that}\qquad A_{ij} = e^{Z_{ij} - \mathrm{lse}_i}.$$
#
# The sums in $O_i$ and in $\mathrm{lse}_i$ run over *all* keys. Your function sees only a part of them, `keys` and
# `values` with $r$ rows each. It has to return that part's `dkeys` and `dvalues`, and what that part contributes to
# `dq`. One quantity seems to need all keys: the sum $\sum_j A_{ij}\, \mathrm{d}A_{ij}$ that the softmax's pullback
# subtracts. It is equal to the inner product of two rows that you have been given. Which?
#
# `q`, `out` and `dout` are `(n, c)`, `keys` and `values` are `(r, c)`, `lse` is `(n,)`. The scores are divided by
# $\sqrt c$ before the softmax. Return `dq`, `dkeys` and `dvalues`.


# %% tags=["exercise"]
def attention_pullback(dout, out, lse, q, keys, values): ...


# %% tags=["check"]
check_3_3(attention_pullback)

# %% [markdown]
# **3.4** Cross-attention with projections and heads. `x` is `(n, d)` and asks, `y` is `(r, d')` and answers. `params`
# is a dict: `w_q` is `(d, n_heads * c)`, `w_k` and `w_v` are `(d', n_heads * c)`, and `w_o` is `(n_heads * c, d)`.
# Head 0 has the first $c$ columns, head 1 the next, and so on. Each head attends with its own scores, divided by
# $\sqrt c$. Then the heads are put side by side and multiplied with `w_o`. There is no norm and no residual. Return
# the value `(n, d)` and the pullback, which takes `dout` and returns a dict of gradients like `params`, and then `dx`
# and `dy`.
#
# You may use `linear` and `attention` from above. To be ready for tutorial 5, try it without.


# %% tags=["exercise"]
def cross_attention(params, x, y, n_heads): ...


# %% tags=["check"]
check_3_4(cross_attention)

# %% [markdown]
# ## What you have gained
#
# - One recipe for every pullback: change the arguments a little, take the inner product with $\mathrm{d}y$, and
#   collect what stands beside each change.
# - The pullbacks of a whole transformer. A product transposes a factor, a sum passes its gradient to both sides, a
#   lookup adds rows up, a norm and a softmax subtract a mean, and cross-entropy is $p - y$.
# - A form in which to write them: the function from top to bottom, and the same names in reverse with a `d` before
#   them.
# - A sound distrust of finite differences. They lie by their step, by float32 on the way, at kinks, and at points
#   where everything is right.
#
# Next: [tutorial 4 · Chunked cross-attention, and why it needs positions](04_relative_positions.ipynb) lets a
# sequence read retrieved text, finds that attention is blind to order, and mends that.
