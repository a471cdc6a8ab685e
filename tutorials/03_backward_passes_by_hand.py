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
# Nothing in this library differentiates by itself. Each operator and each block of the model, in `retro_np/nn`, returns
# two things, its value and its **pullback**, in code `vjp` (vector–Jacobian product). The pullback takes the gradient
# of the loss with respect to the value, the **cotangent**, and returns the gradients with respect to the arguments.
# This tutorial derives a few, from a matrix product to attention, and then turns to what tells right ones from wrong
# ones: finite differences, which can be wrong themselves.
#
# Afterwards you can
#
# - derive a pullback from a small change and an inner product, without writing a Jacobian;
# - write an operator as value and pullback, and compose pullbacks in reverse;
# - write the backward pass of attention;
# - say four ways in which a finite difference lies, and put an operator of your own through `gradcheck`.

# %%
import matplotlib.pyplot as plt
import numpy as np

from retro_np import gradcheck
from retro_np.checking import GradientError
from retro_np.kernels.attention import attention_backward, attention_forward
from retro_np.kernels.bert import add_layer_norm
from retro_np.nn.attention import relative_attention
from retro_np.nn.checks import checks
from retro_np.nn.operators import gelu, linear, rms_norm

rng = np.random.default_rng(0)


def tried(name, f, *arrays, **options):
    """What gradcheck says, as one line, whether it raises or not."""
    try:
        print(f"{name}: right within {gradcheck(f, *arrays, **options).error:.0e}")
    except GradientError as error:
        print(f"{name}: {error}")


# %% [markdown]
# ## A small change and an inner product
#
# Let y = f(x) and let L be a number computed from y. The chain rule says dx = Jᵀ dy, where dy = ∂L/∂y and J is the
# Jacobian of f at x. J itself is never wanted, and often could not be stored. For the product of 2,048 tokens with a
# matrix of the smallest model of the paper, d = 896:

# %%
n, d = 2048, 896
print(f"x has {n * d / 1e6:.1f} million entries, the Jacobian of x ↦ x W {(n * d) ** 2 / 1e12:.1f} million million")

# %% [markdown]
# What is wanted is how Jᵀ acts on dy. A recipe finds it for anything made of products and sums. Change the arguments
# a little, by ẋ and Ẇ; to first order y = x W changes by
#
# ẏ = ẋ W + x Ẇ,
#
# and the loss by the inner product ⟨dy, ẏ⟩, the sum of all dy_ij ẏ_ij. Move everything but the change to the other
# side:
#
# ⟨dy, ẏ⟩ = ⟨dy, ẋ W⟩ + ⟨dy, x Ẇ⟩ = ⟨dy Wᵀ, ẋ⟩ + ⟨xᵀ dy, Ẇ⟩.
#
# (The step in indices: Σ_ij dy_ij Σ_k ẋ_ik W_kj, summed over *j* first, is Σ_ik (dy Wᵀ)_ik ẋ_ik. A factor that changes
# sides is transposed, and stays first or last.) The loss changes by ⟨dx, ẋ⟩ + ⟨dW, Ẇ⟩, whatever the changes are. So
# what stands beside ẋ is dx, and what stands beside Ẇ is dW. That is `linear`, and the identity can be tried at once:

# %%
x, w = rng.standard_normal((5, 3)), rng.standard_normal((3, 4))
xdot, wdot = rng.standard_normal(x.shape), rng.standard_normal(w.shape)
y, vjp = linear(x, w)
dy = rng.standard_normal(y.shape)
dx, dw = vjp(dy)
left, right = np.sum(dy * (xdot @ w + x @ wdot)), np.sum(dx * xdot) + np.sum(dw * wdot)
print(f"⟨dy, ẏ⟩ = {left:.6f}, ⟨dx, ẋ⟩ + ⟨dW, Ẇ⟩ = {right:.6f}")
assert np.isclose(left, right)

# %% [markdown]
# The identity uses our own ẏ. `gradcheck` needs none. It draws a random dy, moves each entry of each argument by ±ε,
# takes ⟨dy, f(x + ε) − f(x − ε)⟩ / 2ε, and compares that with the pullback's entry. Each entry is judged by itself: its
# error is the difference of the two numbers, divided by the larger one. Here `gradcheck` judges `linear`, and then a
# version without the transpose. Mostly the shapes would not fit then; with a square matrix, W and Wᵀ fit equally well.


# %%
def linear_untransposed(x, w):
    y, vjp = linear(x, w)
    return y, lambda dy: (dy @ w, vjp(dy)[1])


tried("linear", linear, x, w)
tried("without the transpose", linear_untransposed, rng.standard_normal((2, 3)), rng.standard_normal((3, 3)))

# %% [markdown]
# ## Down, then up
#
# Where f is a composition, J is a product of Jacobians, Jᵀ the product of their transposes in reverse order: the
# pullbacks are called in the reverse order of the values, each with what the one after it returned. What is used
# twice gets two gradients, and they add. A residual block uses its input twice:


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
# Read both from top to bottom: in the pullback the same names come in reverse order, with a d before them. The blocks
# of the model are all written so. The classic slip is to lose one of the two ways to h:


# %%
def block_without_the_residual(h, w_in, w_out):
    y, vjp = block(h, w_in, w_out)
    return y, lambda dy: (vjp(dy)[0] - dy, *vjp(dy)[1:])


tried("one way lost", block_without_the_residual, *arguments)

# %% [markdown]
# ## RMSNorm
#
# y = g ∘ x s with s = (mean(x²) + eps)^(−1/2), for one row x of *d* numbers and the gain g (∘ is entry by entry, and
# eps keeps a row of zeros from being divided by zero; Zhang & Sennrich 2019). Call unit = x s the row brought to length
# √d, so that y = g ∘ unit. By the last product dg = dy ∘ unit, summed over the rows, and dunit = g ∘ dy.
#
# From unit on to x: the change of s is ṡ = −s³ mean(x ∘ ẋ), so that of unit is ẋ s − x s³ mean(x ∘ ẋ), and
#
# ⟨dunit, change of unit⟩ = ⟨s dunit, ẋ⟩ − s² ⟨dunit, unit⟩ mean(x ∘ ẋ).
#
# In the second term mean(x ∘ ẋ) = ⟨x, ẋ⟩ / d = ⟨unit, ẋ⟩ / (s d). So it is ⟨s unit ⟨dunit, unit⟩ / d, ẋ⟩, and
#
# **dx = s (dunit − unit · mean(dunit ∘ unit))**.
#
# What is subtracted has a meaning: a longer x gives the same y, so the gradient must have no part along x. It takes
# away just that part. Up to eps, dx is orthogonal to x:

# %%
x, gain, dy = rng.standard_normal((4, 6)), rng.standard_normal(6), rng.standard_normal((4, 6))
y, vjp = rms_norm(x, gain, eps=0)
dx, dgain = vjp(dy)
s = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
unit, dunit = x * s, gain * dy
assert np.allclose(dx, s * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True)))
assert np.allclose(dgain, np.sum(dy * unit, axis=0))
assert np.allclose(y, rms_norm(7 * x, gain, eps=0)[0])
print("⟨dx, x⟩ of each row:", np.abs(np.sum(dx * x, axis=-1)).round(12))

# %% [markdown]
# ## Softmax
#
# p_i = exp(x_i) / Σ exp(x_j). Its Jacobian is small enough to look at once: ∂p_i/∂x_j = p_i (δ_ij − p_j), where δ_ij is
# 1 for i = j, else 0. Hence
#
# dx_j = Σ_i dp_i p_i (δ_ij − p_j) = **p_j (dp_j − Σ_i dp_i p_i)**.
#
# As in RMSNorm, a mean is subtracted, here one weighted by p, and for the same reason: a constant added to all x_i
# changes nothing, so Σ_j dx_j must be 0. In the picture, rows and columns sum to 0.


# %%
def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)

    def vjp(dp):
        return (p * (dp - np.sum(dp * p, axis=-1, keepdims=True)),)

    return p, vjp


tried("softmax", softmax, rng.standard_normal((3, 5)))
p, vjp = softmax(np.array([0.0, 1.0, 2.0, 0.5, -1.0]))
jacobian = np.array([vjp(row)[0] for row in np.eye(5)])  # the pullback of each unit vector is a row of J
assert np.allclose(jacobian, np.diag(p) - np.outer(p, p))
figure, axes = plt.subplots(figsize=(3.6, 3))
image = axes.imshow(jacobian, cmap="PuOr", vmin=-0.5, vmax=0.5)
for (i, j), slope in np.ndenumerate(jacobian):
    axes.text(j, i, f"{slope:.2f}", ha="center", va="center", fontsize=8)
axes.set(xlabel="x_j", ylabel="p_i", title="∂p_i / ∂x_j")
plt.show()

# %% [markdown]
# ## Attention
#
# One head of *c* columns: logits = queries keysᵀ / √c, weights = softmax of each row of them, out = weights values. All
# its pieces are above: two products and a softmax. (Down, `weights @ values` is the last product; up, the first.)


# %%
def attention(q, keys, values):
    """q: (n, c); keys, values: (r, c) → (n, c)."""
    scale = q.shape[-1] ** -0.5
    weights, softmax_vjp = softmax(q @ keys.T * scale)

    def vjp(dout):
        dweights, dvalues = dout @ values.T, weights.T @ dout
        (dlogits,) = softmax_vjp(dweights)
        dlogits = dlogits * scale
        return dlogits @ keys, dlogits.T @ q, dvalues

    return weights @ values, vjp


parts = rng.standard_normal((3, 4)), rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
tried("attention", attention, *parts)

# %% [markdown]
# The library's kernel takes a batch B of g groups of n queries, with h heads of c columns, (B, g, n, h, c), and has
# masks and positions beside (tutorials 4 and 5). With one of each, no mask and no positions it is the function above,
# value and gradients:


# %%
def as_one_head(x):
    return x[None, None, :, None, :]


out, vjp = attention(*parts)
dout = rng.standard_normal(out.shape)
library_out, library_vjp = relative_attention(*(as_one_head(part) for part in parts))
assert np.allclose(as_one_head(out), library_out)
for name, ours, theirs in zip(("dq", "dkeys", "dvalues"), vjp(dout), library_vjp(as_one_head(dout)), strict=True):
    assert np.allclose(as_one_head(ours), theirs)
    print(f"{name:8} equal to the kernel's")

# %% [markdown]
# ## First lie: the step
#
# A Taylor series says how far a difference is off: (f(x + ε) − f(x)) / ε by a multiple of ε, the central one, (f(x + ε)
# − f(x − ε)) / 2ε, by a multiple of ε². So ε should be small. But both values are rounded, each by a share η of itself
# (1.1 · 10⁻¹⁶ in float64, 6 · 10⁻⁸ in float32), and their difference is divided by ε: an error of about η/ε, which
# grows as ε shrinks. Below, the slope of the softmax in 30 random directions, by differences, against the pullback.


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
steps = 10.0 ** np.arange(-12, 0.1, 0.25)
lines = (
    ("float64", "one-sided", "#2b7bba", "--"),
    ("float64", "central", "#2b7bba", "-"),
    ("float64", "extrapolated", "#16405f", ":"),
    ("float32", "one-sided", "#e07b1f", "--"),
    ("float32", "central", "#e07b1f", "-"),
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
axes.axvline(2**-10, color="#8c8c8c", linewidth=1)
axes.text(1.3 * 2**-10, 3, "gradcheck\nbegins here", color="#8c8c8c", fontsize=8, va="center")
axes.set(xlabel="ε", ylabel="relative error of the slope", ylim=(1e-14, 1e2))
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
assert least["float64, extrapolated"] < least["float64, central"] / 10
assert least["float64, central"] < 1e-8 < least["float64, one-sided"] * 10
assert least["float32, central"] > 1e-6

# %% [markdown]
# To the right of the lowest point the formula is wrong, to the left the arithmetic. (At the far left of the float32
# lines, where x + ε rounds to x, the difference is 0 and the error 1: all of the slope.) Setting ε² = η/ε puts the
# lowest point of a central difference near η^(1/3), 5 · 10⁻⁶ in float64 and 4 · 10⁻³ in float32, and the error there is
# η^(2/3).
#
# Two central differences do better than one. D(ε) is the slope plus c ε² plus terms in ε⁴, so (16 D(ε/4) − D(ε)) / 15
# is free of c. This is Richardson extrapolation, the dotted line. Its lowest point is near η^(1/5), 6 · 10⁻⁴, and the
# error there is η^(4/5). So `gradcheck` makes float64 of its arguments whatever they were, and begins with ε = 2⁻¹⁰ and
# ε/4, in units of the entry that moves. A fixed step would be lost beside an entry of 10¹², and too long for 10⁻¹².
#
# If the result does not agree with the pullback, `gradcheck` tries longer and shorter steps. Until the formula or the
# arithmetic spoils them, neighbouring steps give the same slope. What they still differ by is the *resolution*, and a
# gradient is called wrong only if its error is well above that. The report has a row for each argument:

# %%
x, gain = 1e9 * rng.standard_normal((4, 6)), rng.standard_normal(6)
print(gradcheck(lambda x, gain: rms_norm(x, gain, eps=0), x, gain))

# %% [markdown]
# ## Second lie: float32 on the way
#
# `gradcheck` cannot make float64 of what happens inside. In a function that rounds to float32 on its way, differences
# are too coarse to say much about the pullback, which is right here:


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
# `gradcheck` cannot tell, and that counts as a failure. A tolerance that suits float32 lets the function pass, and with
# it a mistake of one part in two thousand. Better to let the function run in the type of its arguments. What rounds on
# the way is usually a buffer that was made as float32, whatever came in.
#
# ## Third lie: ties
#
# A maximum has a kink where two entries are equal, and there a central difference takes the mean of two slopes. For
# max(x, 0) it says 1/2 at 0, where the pullback says 0 or 1: the step becomes a ramp of width 2ε. (The numbers printed
# are times the random dy.) Shorter steps do not help, and neighbouring ones agree. So `gradcheck` also compares the
# slopes of the two sides. Their difference shrinks with the step, except at a kink:


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
axes.plot(points, points > 0, color="#2b7bba", label="slope of max(x, 0)")
difference = (np.maximum(points + eps, 0) - np.maximum(points - eps, 0)) / (2 * eps)
axes.plot(points, difference, "--", color="#e07b1f", label="central difference, ε = 0.3")
axes.set(xlabel="x")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Neither is wrong: at a kink there is no gradient, and any slope between the two sides' will do for descent. Random
# numbers hardly ever tie, but integers, zeros and padding do. Check at a point without ties, and decide what happens at
# ties by yourself.
#
# ## Fourth lie: a point at which everything is right
#
# Worse than a right pullback that fails is a wrong one that passes. Three ways to get there.
#
# **The cotangent of ones.** Who checks the gradient of `y.sum()` sets dy = 1. For a softmax that sum is 1 whatever x
# is; its gradient is 0, and so is that of many a mistake. `gradcheck` draws several random dy: two without small
# entries, and others that are 0 except at a single output, so that no output hides behind a larger one.


# %%
def softmax_without_p(x):
    p, _ = softmax(x)
    return p, lambda dp: (dp - np.sum(dp * p, axis=-1, keepdims=True),)  # the factor p forgotten


def summed(f):
    """f, and then the sum of all: what a check of y.sum() sees."""

    def total(x):
        y, vjp = f(x)
        return y.sum(), lambda dtotal: vjp(np.full(y.shape, dtotal))

    return total


tried("dy = 1   ", summed(softmax_without_p), logits)
tried("random dy", softmax_without_p, logits)

# %% [markdown]
# **Convenient arguments.** A gain begins at 1, and much else at 0. At gain 1 nobody sees that the gain was
# forgotten. So check away from where training begins.


# %%
def rms_norm_forgets_gain(x, gain):
    y, vjp = rms_norm(x, gain)
    _, plain_vjp = rms_norm(x, np.ones_like(gain))
    return y, lambda dy: (plain_vjp(dy)[0], vjp(dy)[1])


x = rng.standard_normal((2, 3))
tried("gain 1     ", rms_norm_forgets_gain, x, np.ones(3))
tried("random gain", rms_norm_forgets_gain, x, rng.standard_normal(3))

# %% [markdown]
# **Size.** Moving the entries of a large array one by one takes long. Moving all at once, along a random direction, is
# quick, but there a single wrong entry of N shows as about 1/√N of its error. Below, one entry of dW is 1 % too large.
# First its error in random directions, computed by hand (x and dy are signs, so that all entries of dW have the same
# size), then what `gradcheck` says about W:


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
# By hand, a tolerance chosen by taste, say 10⁻⁴, would let the last one pass. But a right pullback agrees with the
# extrapolated slope to many digits, so that `gradcheck` takes a small disagreement for a mistake too; halving the
# direction again and again finds the entry. With more than 512 entries in all it uses such directions, and moves a few
# entries by themselves. Still, a small case is checked more closely and more quickly. Choose odd sizes that all differ.
#
# ## What no difference sees
#
# A gradient can have the right numbers and still harm its caller. This pullback saves two temporary arrays by working
# in its cotangent. A residual block, which adds dy to what comes back from such a pullback, would lose its dy:


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
# `gradcheck` calls function and pullback several times, and compares all that it handed over or got back with copies.
# It refuses a pullback that is right only once, is not linear in dy, or reads what a later call has left behind. It
# also refuses gradients that share a buffer.
#
# ## The library's own
#
# `retro-np gradcheck` puts every operator through this, up to the whole model with masked and missing neighbours.
# Here, the small ones:

# %%
for check in checks():
    if check.name in {"linear", "rms_norm", "gelu", "cross_entropy", "attention, causal", "FFW"}:
        print(f"{check.name:18} right within {gradcheck(check.f, *check.arrays).error:.0e}")

# %% [markdown]
# ## Exercises
#
# **1.** Your first operator: y = x σ(x), with σ(x) = 1 / (1 + exp(−x)). Return the value and the pullback, which
# returns a tuple of one gradient.


# %% tags=["exercise"]
def swish(x): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def swish(x):
    gate = 1 / (1 + np.exp(-x))

    def vjp(dy):
        return (dy * (gate + x * gate * (1 - gate)),)

    return x * gate, vjp


# %% tags=["check"]
x = rng.standard_normal((3, 4))
assert np.allclose(swish(x)[0], x / (1 + np.exp(-x)))
print(f"right: within {gradcheck(swish, x).error:.0e}")

# %% [markdown]
# **2.** LayerNorm, which BERT has where RETRO has RMSNorm: y = g ∘ (x − mean(x)) / √(variance(x) + eps) + shift, over
# the last axis (the variance is the mean of (x − mean(x))²). The pullback returns dx, dgain and dshift. Along which two
# directions has dx no part this time? The value is held against the library's kernel for BERT.


# %% tags=["exercise"]
def layer_norm(x, gain, shift, eps=1e-12): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def layer_norm(x, gain, shift, eps=1e-12):
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
    unit = centred * scale

    def vjp(dy):
        dunit = dy * gain
        along = unit * np.mean(dunit * unit, axis=-1, keepdims=True)  # neither along x, nor along (1, …, 1)
        return scale * (dunit - dunit.mean(axis=-1, keepdims=True) - along), np.sum(dy * unit, axis=0), dy.sum(axis=0)

    return gain * unit + shift, vjp


# %% tags=["check"]
x, gain, shift = rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal(5)
expected = x.copy()
add_layer_norm(expected, np.zeros(5), np.zeros_like(x), gain, shift, 1e-12)  # in place, of x + 0 + 0
assert np.allclose(layer_norm(x, gain, shift)[0], expected)
print(f"right: within {gradcheck(layer_norm, x, gain, shift).error:.0e}")

# %% [markdown]
# **3.** The kernel keeps no weights for the backward pass: of each query it keeps `lse`, the logarithm of the sum of
# its logits' exponentials (1/√c is in the logits), and makes the weights again from it. Nor is a whole row of dweights
# needed to find the mean that the softmax subtracts (the kernel, which is not given out, does sum the row): Σ_j
# dweights_ij weights_ij is an inner product of two rows that are at hand. Which? Write attention's pullback with out,
# lse, and the arguments. q, out, dout: (n, c); keys, values: (r, c); lse: (n,). Return dq, dkeys, dvalues.


# %% tags=["exercise"]
def attention_pullback(dout, out, lse, q, keys, values): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def attention_pullback(dout, out, lse, q, keys, values):
    scale = q.shape[-1] ** -0.5
    weights = np.exp(q @ keys.T * scale - lse[:, None])
    # dweights = dout valuesᵀ, and out = weights values: the sum over j is that over c
    mean = np.sum(dout * out, axis=-1, keepdims=True)
    dlogits = scale * weights * (dout @ values.T - mean)
    return dlogits @ keys, dlogits.T @ q, weights.T @ dout


# %% tags=["check"]
heads = [as_one_head(part) for part in parts]
out, lse = attention_forward(*heads)
dout = rng.standard_normal(out.shape)
expected = attention_backward(dout, lse, *heads)[:3]
made = attention_pullback(dout[0, 0, :, 0], out[0, 0, :, 0], lse[0, 0, 0], *parts)
for name, ours, theirs in zip(("dq", "dkeys", "dvalues"), made, expected, strict=True):
    assert np.allclose(as_one_head(ours), theirs), name
print("right: as the kernel has them")
