"""Correct functions at input scales from 1e-12 to 1e12: a gradient checker that rejects one raises a false alarm.

The tests and benchmarks/gradcheck.py use PAIRS. Every function is f(*arguments) -> (value, vjp) in NumPy, in the dtype
of its arguments, and accurate to a few roundings of the largest entry. A scale at which a value or a gradient would
overflow is left out. Random data does not lie on a kink, of relu for example, but may come close to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.linalg import inv, norm, slogdet

from retro_np.tree import map_tree

SCALES = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6, 1e9, 1e12)
GELU = 2 * np.sqrt(2 / np.pi).item()
TARGETS = np.array([2, 0, 3, 3])
TOKENS = np.array([1, 4, 1, 0])
CAUSAL = np.tri(4, 5, 1, dtype=bool)  # Query i sees keys 0 to i + 1.


@dataclass(frozen=True)
class ScaledFunction:
    """A correct function with arguments of one scale.

    name: the function, the scale and the dtype; unique in PAIRS. f(*arguments(rng)) -> (value, vjp). arguments(rng): a
    tuple of random arrays, scalars and dicts of arrays in `dtype`, already multiplied by the scale or a power of it.
    """

    name: str
    f: Callable[..., tuple[Any, Callable[..., tuple]]]
    arguments: Callable[[np.random.Generator], tuple]
    scale: float
    dtype: str


def family(name: str, f, *draws, powers=None, low=1e-12, high=1e12, single=True) -> list[ScaledFunction]:
    """f at all scales from `low` to `high`.

    draws: rng -> argument, one for each argument. powers: argument i is multiplied by scale ** powers[i], by default by
    the scale itself. If `single`, every third scale has float32 data; the length of the name decides which.
    """

    def arguments(rng, scale, dtype):
        factors = [scale**power for power in powers or [1] * len(draws)]
        trees = zip(draws, factors, strict=True)
        return tuple(map_tree(lambda _, leaf, c=c: (leaf * c).astype(dtype), draw(rng)) for draw, c in trees)

    pairs = []
    for i, scale in enumerate(SCALES):
        dtype = "float32" if single and (i + len(name)) % 3 == 0 else "float64"
        draw = partial(arguments, scale=scale, dtype=dtype)
        if low <= scale <= high:
            pairs.append(ScaledFunction(f"{name}, {scale:.0e}, {dtype}", f, draw, scale, dtype))
    return pairs


def normal(*shape):
    return lambda rng: rng.standard_normal(shape)


def positive(*shape):
    return lambda rng: rng.uniform(0.5, 2, shape)


def uneven(*shape):
    """Entries of very different sizes, from about 1e-3 to 1e3."""
    return lambda rng: rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape)


def invertible(n):
    return lambda rng: 3 * np.eye(n) + 0.5 * rng.standard_normal((n, n))


def gate_parameters(rng):
    draws = {"w": normal(3, 2), "u": normal(2, 2), "b": lambda _: np.zeros(2)}
    return {f"{name}_{part}": draw(rng) for part in "zc" for name, draw in draws.items()}


def elementwise(function, slope, reduced=lambda y: y):
    def f(x):
        slopes = slope(x).astype(x.dtype)
        return reduced(function(x)), lambda dy: (dy * slopes,)

    return f


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x > 0, 1, e) / (1 + e)


def sigmoid_slope(x):
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


def tanh_slope(x):
    return 4 * sigmoid_slope(2 * x)  # 1 − tanh² would cancel where tanh is near 1.


def gelu(x):
    """The tanh approximation, x/2 · (1 + tanh(u)), as x · sigmoid(2u)."""
    u2 = GELU * (x + 0.044715 * x**3)
    slopes = sigmoid(u2) + x * sigmoid_slope(u2) * GELU * (1 + 0.134145 * x**2)
    return x * sigmoid(u2), lambda dy: (dy * slopes,)


def probabilities(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probabilities_pullback(p, dp):
    """p · (dp − Σ p · dp), from differences of dp, because the formula itself cancels where p is near 1."""
    return p * ((dp[..., :, None] - dp[..., None, :]) * p[..., None, :]).sum(-1)


def excess(logits):
    """log Σ exp(logits) − max(logits), from the terms other than the largest, which is 1."""
    return np.log1p(np.sort(np.exp(logits - logits.max(-1, keepdims=True)))[..., :-1].sum(-1))


def softmax(x):
    p = probabilities(x)
    return p, lambda dy: (probabilities_pullback(p, dy),)


def cross_entropy(logits):
    rows = np.arange(len(logits))
    losses = logits.max(-1) - logits[rows, TARGETS] + excess(logits)

    def vjp(dy):
        dlogits = probabilities(logits)
        dlogits[rows, TARGETS] = 0
        dlogits[rows, TARGETS] = -dlogits.sum(-1)
        return (dlogits * (dy / len(logits)),)

    return losses.mean(), vjp


def mean_squared_error(prediction, target):
    slope = (prediction - target) * 2 / target.size
    return ((prediction - target) ** 2).mean(), lambda dy: (dy * slope, -dy * slope)


def product(x):
    others = np.where(np.eye(len(x), dtype=bool), 1, x).prod(-1)
    return x.prod(), lambda dy: (dy * others,)


def mixture(x, y):
    """Three outputs: two arrays and a scalar."""

    def vjp(dvalue):
        dproduct, dsum, dtotal = dvalue
        return dproduct * y + dsum + dtotal, dproduct * x + dsum - dtotal

    return (x * y, x + y, (x - y).sum()), vjp


def linear(x, w):
    return x @ w, lambda dy: (dy @ w.T, x.T @ dy)


def dense(x, w, b):
    """relu(x · w + b)."""
    h = x @ w + b

    def vjp(dy):
        dh = dy * (h > 0)
        return dh @ w.T, x.T @ dh, dh.sum(0)

    return np.maximum(h, 0), vjp


def gated_cell(params, x, h):
    """A GRU cell without its reset gate: (1 − z) · h + z · c."""
    a = x @ params["w_z"] + h @ params["u_z"] + params["b_z"]
    b = x @ params["w_c"] + h @ params["u_c"] + params["b_c"]
    z, c = sigmoid(a), np.tanh(b)

    def vjp(dy):
        da, db = dy * (c - h) * sigmoid_slope(a), dy * z * tanh_slope(b)
        dparams = {"w_z": x.T @ da, "u_z": h.T @ da, "b_z": da.sum(0)}
        dparams |= {"w_c": x.T @ db, "u_c": h.T @ db, "b_c": db.sum(0)}
        dh = dy * sigmoid(-a) + da @ params["u_z"].T + db @ params["u_c"].T
        return dparams, da @ params["w_z"].T + db @ params["w_c"].T, dh

    return sigmoid(-a) * h + z * c, vjp


def rms_norm(x, gain):
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    normed = x * scale

    def vjp(dy):
        dnormed = dy * gain
        return scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdims=True)), (dy * normed).sum(0)

    return normed * gain, vjp


def layer_norm(x, gain, bias):
    y, rms_norm_vjp = rms_norm(x - x.mean(-1, keepdims=True), gain)

    def vjp(dy):
        dcentred, dgain = rms_norm_vjp(dy)
        return dcentred - dcentred.mean(-1, keepdims=True), dgain, dy.sum(0)

    return y + bias, vjp


def attention(q, k, v):
    """Causal attention of 4 queries and 5 keys."""
    c = q.shape[-1] ** 0.5
    p = probabilities(np.where(CAUSAL, q @ k.T / c, -np.inf))

    def vjp(dy):
        dlogits = probabilities_pullback(p, dy @ v.T) / c
        return dlogits @ k, dlogits.T @ q, p.T @ dy

    return p @ v, vjp


def attention_with_key_bias(q, k, b, v):
    """The softmax does not depend on b, so the gradient of b is zero except for rounding."""
    value, attention_vjp = attention(q, k + b, v)

    def vjp(dy):
        dq, dk, dv = attention_vjp(dy)
        return dq, dk, dk.sum(0), dv

    return value, vjp


def convolution(x, w):
    """x (channels, n), w (outputs, channels, k) → (outputs, n − k + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2], axis=1)

    def vjp(dy):
        dx = np.zeros_like(x)
        for k in range(w.shape[2]):
            dx[:, k : k + dy.shape[1]] += w[:, :, k].T @ dy
        return dx, np.einsum("on,cnk->ock", dy, windows)

    return np.einsum("ock,cnk->on", w, windows), vjp


def gathered(order):
    """The entries of x at the indices order(x) along the last axis. The indices change only at ties."""

    def f(x):
        index = order(x)

        def vjp(dy):
            dx = np.zeros_like(x)
            np.put_along_axis(dx, index, dy, -1)
            return (dx,)

        return np.take_along_axis(x, index, -1), vjp

    return f


def bilinear(x, a, y):
    return x @ a @ y, lambda dy: (dy * (a @ y), dy * np.outer(x, y), dy * (x @ a))


summed = partial(elementwise, reduced=np.sum)
SINE, TANH = elementwise(np.sin, np.cos), elementwise(np.tanh, tanh_slope)
MAXIMUM = gathered(lambda x: x.argmax(-1, keepdims=True))
QKV = normal(4, 3), normal(5, 3), normal(5, 2)

FAMILIES = (
    family("sin", SINE, normal(3, 4)),
    family("sin of 400", SINE, normal(20, 20), high=1e2),
    family("sin, unused argument", lambda x, u: (np.sin(x), lambda dy: (dy * np.cos(x), 0 * u)), normal(5), normal(3)),
    family("cos", elementwise(np.cos, lambda x: -np.sin(x)), normal(3, 4), high=1e6),
    family("exp", elementwise(np.exp, np.exp), normal(3, 4), high=1.0),
    family("exp, far", elementwise(np.exp, np.exp), normal(3, 4), low=1e2, high=1e2, single=False),
    family("exp(−x²)", elementwise(lambda x: np.exp(-(x**2)), lambda x: -2 * x * np.exp(-(x**2))), normal(3, 4)),
    family("tanh", TANH, normal(3, 4)),
    family("tanh, uneven", TANH, uneven(3, 4)),
    family("sigmoid", elementwise(sigmoid, sigmoid_slope), normal(3, 4)),
    family("sigmoid at 40", elementwise(lambda x: sigmoid(x + 40), lambda x: sigmoid_slope(x + 40)), normal(6)),
    family("sigmoid at −40", elementwise(lambda x: sigmoid(x - 40), lambda x: sigmoid_slope(x - 40)), normal(6)),
    family("softplus", elementwise(lambda x: np.logaddexp(0, x), sigmoid), normal(3, 4)),
    family("gelu", gelu, normal(3, 4)),
    family("log", elementwise(np.log, lambda x: 1 / x), positive(3, 4)),
    family("sqrt", elementwise(np.sqrt, lambda x: 0.5 / np.sqrt(x)), positive(3, 4)),
    family("reciprocal", elementwise(lambda x: 1 / x, lambda x: -1 / x**2), positive(3, 4)),
    family("cube", elementwise(lambda x: x**3, lambda x: 3 * x**2), normal(3, 4)),
    family("1/(1+x²)", elementwise(lambda x: 1 / (1 + x**2), lambda x: -2 * x / (1 + x**2) / (1 + x**2)), normal(9)),
    family("x·|x|", elementwise(lambda x: x * np.abs(x), lambda x: 2 * np.abs(x)), normal(3, 4)),
    family("relu", elementwise(lambda x: np.maximum(x, 0), lambda x: x > 0), normal(3, 4)),
    family("leaky relu", elementwise(lambda x: np.maximum(x, x / 8), lambda x: np.where(x > 0, 1, 1 / 8)), normal(9)),
    family("abs", elementwise(np.abs, np.sign), normal(3, 4)),
    family("clip", elementwise(lambda x: np.clip(x, -0.5, 0.5), lambda x: np.abs(x) < 0.5), normal(9)),
    family("affine", lambda x, a, b: (a * x + b, lambda dy: (dy * a, dy @ x, dy.sum())), normal(4), normal(), normal()),
    family("sum of squares", summed(np.square, lambda x: 2 * x), normal(3, 4)),
    family("sum of squares, uneven", summed(np.square, lambda x: 2 * x), uneven(8)),
    family("100 + sum of squares", summed(lambda x: x**2 + 25, lambda x: 2 * x), normal(4), high=1e4),
    family("100 + x", elementwise(lambda x: 100 + x, np.ones_like), normal(5)),
    family("mean squared error", mean_squared_error, normal(2, 3), normal(2, 3)),
    family("mean squared error, prediction scaled", mean_squared_error, normal(2, 3), normal(2, 3), powers=(1, 0)),
    family("cross-entropy", cross_entropy, normal(4, 5)),
    family("huber", summed(lambda x: np.where(abs(x) < 1, x**2 / 2, abs(x) - 0.5), lambda x: x.clip(-1, 1)), normal(9)),
    family("logsumexp", lambda x: (x.max(-1) + excess(x), lambda dy: (dy[:, None] * probabilities(x),)), normal(3, 4)),
    family("norm", lambda x: (norm(x), lambda dy: (dy / norm(x) * x,)), normal(3, 4)),
    family("product", product, normal(3)),
    family("variance", lambda x: (x.var(), lambda dy: (dy * 2 / x.size * (x - x.mean()),)), normal(3, 4)),
    family("three outputs", mixture, normal(4), normal(4)),
    family("linear", linear, normal(3, 4), normal(4, 2)),
    family("linear, x scaled", linear, normal(3, 4), normal(4, 2), powers=(1, 0)),
    family("linear, w scaled", linear, normal(3, 4), normal(4, 2), powers=(0, 1)),
    family("linear, opposite scales", linear, normal(3, 4), normal(4, 2), powers=(1, -1)),
    family("linear, uneven", linear, uneven(3, 4), normal(4, 2)),
    family("dense", dense, normal(3, 4), normal(4, 3), lambda _: np.zeros(3)),
    family("dense, w scaled", dense, normal(3, 4), normal(4, 3), normal(3), powers=(0, 1, 0)),
    family("gated cell", gated_cell, gate_parameters, normal(4, 3), normal(4, 2)),
    family("gated cell, data scaled", gated_cell, gate_parameters, normal(4, 3), normal(4, 2), powers=(0, 1, 1)),
    family("rms norm", rms_norm, normal(3, 6), positive(6), powers=(1, 0)),
    family("layer norm", layer_norm, normal(3, 6), positive(6), lambda _: np.zeros(6), powers=(1, 0, 0)),
    family("layer norm of 320", layer_norm, normal(20, 16), positive(16), normal(16)),
    family("softmax", softmax, normal(3, 4)),
    family("softmax, uneven", softmax, uneven(3, 4)),
    family("attention", attention, *QKV),
    family("attention, q scaled", attention, *QKV, powers=(1, 0, 0)),
    family("attention, v scaled", attention, *QKV, powers=(0, 0, 1)),
    family("attention with key bias", attention_with_key_bias, *QKV[:2], normal(3), QKV[2]),
    family("convolution", convolution, normal(2, 9), normal(3, 2, 3)),
    family("embedding", lambda x: (x[TOKENS], lambda dy: ((np.arange(6)[:, None] == TOKENS) @ dy,)), normal(6, 3)),
    family("maximum", MAXIMUM, normal(3, 5)),
    family("minimum", gathered(lambda x: x.argmin(-1, keepdims=True)), normal(3, 5)),
    family("max-pool", MAXIMUM, normal(2, 4, 3)),
    family("sort", gathered(np.argsort), normal(2, 6)),
    family("cumsum", lambda x: (x.cumsum(-1), lambda dy: (dy[:, ::-1].cumsum(-1)[:, ::-1],)), normal(2, 6)),
    family("outer", lambda a, b: (a[:, None] * b, lambda dy: (dy @ b, a @ dy)), normal(4), normal(3)),
    family("bilinear", bilinear, normal(4), normal(4, 3), normal(3)),
    family("inverse", lambda a: (inv(a), lambda dy: (-inv(a).T @ dy @ inv(a).T,)), invertible(3)),
    family("log-determinant", lambda a: (slogdet(a)[1], lambda dy: (dy * inv(a).T,)), invertible(4)),
)
PAIRS: tuple[ScaledFunction, ...] = tuple(chain.from_iterable(FAMILIES))
