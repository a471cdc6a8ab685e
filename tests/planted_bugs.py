"""Planted bugs: functions with a wrong pullback, or a broken contract, each with its correct twin.

The tests of the gradient checker expect every wrong function to be reported and every twin to pass.
benchmarks/gradcheck.py gives the same functions to other checkers and counts by kind.

A correct twin leaves its arguments, its cotangent and its value as they are, and its gradients are new arrays of the
arguments' dtype. Arguments are drawn away from kinks.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Function = Callable[..., tuple[Any, Callable[..., Any]]]
Arguments = Callable[[np.random.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class PlantedBug:
    """A wrong function and its correct twin: f(*arguments(rng)) -> (value, vjp). The name is "operator: slip"."""

    kind: str
    name: str
    arguments: Arguments
    wrong: Function
    correct: Function

    @property
    def operator(self) -> str:
        """What its bugs have in common, and their twin with them."""
        return self.name.partition(": ")[0]


_bugs: list[PlantedBug] = []
_state: dict[str, Any] = {}  # what wrong functions keep between calls
_noise = np.random.default_rng(7)


def planted(kind: str, arguments: Arguments, slips: str, note: str = "") -> Callable[..., Any]:
    """A decorator for operator(slip, *arguments) -> (value, vjp), which adds one bug for each slip.

    slips: separated by semicolons; each names what the pullback, or the function, does wrong. The empty slip is the
    correct twin. note: distinguishes arguments of the same operator.
    """

    def add(operator):
        title = operator.__name__.replace("_", " ") + note
        for slip in slips.split("; "):
            wrong, correct = partial(operator, slip), partial(operator, "")
            _bugs.append(PlantedBug(kind, f"{title}: {slip}", arguments, wrong, correct))
        return operator

    return add


class Edit(NamedTuple):
    """A wrong formula: the right gradients, of which the one at `position` is replaced by edit(gradient)."""

    position: int
    edit: Callable[[Any], Any]


def scaled(factor, index=(), position=0):
    """The gradient at `position` with one entry, or all entries, times a factor."""

    def edit(gradient):
        gradient = np.array(gradient)
        gradient[index] *= factor
        return gradient

    return Edit(position, edit)


def pure(kind: str, name: str, arguments: Arguments, value: Any, gradients: Any, fresh=True, **wrong):
    """Add one bug for each wrong formula, wrong(dy, *arguments) or an Edit of gradients(dy, *arguments).

    fresh: copy the wrong gradients as well as the right ones, so that they share no memory.
    """

    def operator(slip, *args):
        def vjp(dy):
            formula = wrong.get(slip.replace(" ", "_"), gradients)
            grads = (gradients if isinstance(formula, Edit) else formula)(dy, *args)
            grads = grads if isinstance(grads, tuple) else (grads,)
            if isinstance(formula, Edit):
                i, edit = formula
                grads = (*grads[:i], edit(grads[i]), *grads[i + 1 :])
            return tuple(deepcopy(grad) for grad in grads) if fresh or not slip else grads

        return deepcopy(value(*args)), vjp

    operator.__name__ = name
    planted(kind, arguments, "; ".join(wrong).replace("_", " "))(operator)


def normal(*shapes: Any) -> Arguments:
    """Standard normal arrays."""
    return lambda rng: tuple(rng.standard_normal(shape) for shape in shapes)


def from_seed_0(*shapes: Any) -> Arguments:
    """Standard normal arrays that always come from default_rng(0)."""
    return lambda rng: normal(*shapes)(np.random.default_rng(0))


def positive(*shapes: Any, size: float = 1.0) -> Arguments:
    """Entries between size / 2 and 2 · size."""
    return lambda rng: tuple(size * rng.uniform(0.5, 2, shape) for shape in shapes)


def signed(*shapes: Any) -> Arguments:
    """Absolute values between 0.3 and 2, with random signs."""
    return lambda rng: tuple(rng.choice([-1, 1], shape) * rng.uniform(0.3, 2, shape) for shape in shapes)


def two_sizes(small: float, large: float) -> Arguments:
    """Eight entries around small, −small, small, −small, large, −large, large and −large."""
    return lambda rng: (np.repeat([small, large], 4) * np.tile([1, -1], 4) * positive(8)(rng)[0],)


def distinct(shape: tuple[int, ...]) -> Arguments:
    """Entries between −2 and 2, any two of which differ by at least 2 / the number of entries."""

    def draw(rng):
        size = int(np.prod(shape))
        return (((rng.permutation(size) + rng.uniform(0.25, 0.75, size)) * 4 / size - 2).reshape(shape),)

    return draw


def invertible(*shapes: Any) -> Arguments:
    """A matrix (3, 3) with a large diagonal, then standard normal arrays."""
    return lambda rng: (rng.standard_normal((3, 3)) + 5 * np.eye(3), *normal(*shapes)(rng))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _one_wrong(index, position=0):
    """Formulas with one wrong entry, for `pure`."""
    return {f"one_entry_off_by_{error:g}": scaled(1 + error, index, position) for error in (1e-3, 1e-4, 1e-5)}


def _rounded(array, dtype=np.float32):
    return array.astype(dtype).astype(float)


def _layer(rng):
    return rng.standard_normal((3, 2)), {"w": rng.standard_normal((2, 2)), "b": rng.standard_normal(2)}


def _affine(x, w, b):
    return x @ w + b


def _affine_gradients(d, x, w, b):
    return d @ w.T, x.T @ d, d.sum(axis=0)


def _layer_gradients(d, x, parameters):
    dx, dw, db = _affine_gradients(d, x, **parameters)
    return dx, {"w": dw, "b": db}


def _matmul_gradients(d, x, w):
    return d @ w.T, x.T @ d


def _softmax_gradient(d, x):
    p = softmax(x)
    return p * (d - np.sum(d * p, axis=-1, keepdims=True))


def _added(d, x, rows):
    dx = np.zeros_like(x)
    np.add.at(dx, rows, d)
    return dx


def _assigned(d, x, rows):
    dx = np.zeros_like(x)
    dx[rows] = d
    return dx


def _products_of_others(x):
    return np.array([np.prod(np.delete(x, i)) for i in range(x.size)])


def _gelu_slope(x, cubic=0.134145, product_rule=1):
    p = sigmoid(1.6 * (x + 0.044715 * x**3))
    return p + product_rule * x * p * (1 - p) * 1.6 * (1 + cubic * x**2)


def _cholesky_gradient(m, dy, triangle=np.tril, diagonal=0.5):
    factor = np.linalg.cholesky(m @ m.T + 4 * np.eye(3))
    inner = triangle(factor.T @ np.tril(dy))
    inner, inverse = inner - diagonal * np.diag(np.diag(inner)), np.linalg.inv(factor)
    return inverse.T @ inner @ inverse


class Line(NamedTuple):
    """The parameters of straight lines."""

    slope: Any
    offset: Any


@dataclass
class Curve:
    """The parameters of parabolas."""

    line: Line
    bend: Any


# Operators that write where they must not, and operators that remember


@planted(
    "overwrites its argument",
    normal((3, 4)),
    "doubled in place; overwritten by the value before the pullback reads it; set to zero after the value is computed; "
    "overwritten by the pullback; one entry cleared by the pullback",
)
def sine_of_double(slip, x):
    if slip == "doubled in place":
        x *= 2
        return np.sin(x), lambda dy: (2 * dy * np.cos(x),)
    doubled = 2 * x
    y = np.sin(doubled)
    if slip.startswith("overwritten by the value"):
        x[...] = y
        return y, lambda dy: (2 * dy * np.cos(2 * x),)
    if slip.startswith("set to zero"):
        x.fill(0)

    def vjp(dy):
        dx = 2 * dy * np.cos(doubled)
        if slip == "overwritten by the pullback":
            x[...] = dx
        elif slip.startswith("one entry"):
            x[0, 0] = 0
        return (dx,)

    return y, vjp


def _table_and_tokens(rng):
    return rng.standard_normal((6, 3)), rng.permutation([1, 1, 2, 3, 4, 5])


@planted("overwrites its argument", _table_and_tokens, "tokens shifted in place")
def embedding(slip, table, tokens):
    y, rows = table[tokens], tokens.copy()
    tokens -= 1 if slip else 0
    return y, lambda dy: (_added(dy, table, rows), None)


@planted(
    "wrong the second time",
    normal((3, 4)),
    "accumulates into a buffer; accumulates into a global buffer; cache popped; cache popped, then zero; "
    "cache overwritten by the next forward call; saved activation multiplied in place; divided by the number of calls; "
    "mask inverted after each call; value depends on earlier calls; value buffer reused by the next forward call",
)
def cube(slip, x):
    slope, cache, calls = 3 * x**2, [x.copy()], []
    gradient, mask = np.zeros_like(x), np.ones(x.shape, bool)
    _state["cube"] = x.copy()

    def vjp(dy):
        calls.append(dy)
        match slip:
            case "accumulates into a buffer":
                np.add(gradient, slope * dy, out=gradient)
                return (gradient.copy(),)
            case "accumulates into a global buffer":
                _state["gradient"] = _state.get("gradient", 0) + slope * dy
                return (_state["gradient"].copy(),)
            case "cache popped":
                return (3 * cache.pop() ** 2 * dy,)
            case "cache popped, then zero":
                return (3 * (cache.pop() if cache else np.zeros_like(x)) ** 2 * dy,)
            case "cache overwritten by the next forward call":
                return (3 * _state["cube"] ** 2 * dy,)
            case "saved activation multiplied in place":
                np.multiply(slope, dy, out=slope)
                return (slope.copy(),)
            case "divided by the number of calls":
                return (slope * dy / len(calls),)
            case "mask inverted after each call":
                dx = slope * dy * mask
                np.logical_not(mask, out=mask)
                return (dx,)
        return (slope * dy,)

    y = x**3
    if slip == "value depends on earlier calls":
        _state["mean"] = 0.9 * _state.get("mean", 0.0) + 0.1 * x.mean()
        y -= _state["mean"]
    elif slip == "value buffer reused by the next forward call":
        y = np.copyto(_state.setdefault("buffer", np.empty_like(y)), y) or _state["buffer"]
    return y, vjp


@planted(
    "noise",
    normal((3, 4)),
    "value with noise of 1e-6; gradient with noise of 1e-4; gradient with noise of 1e-8; gradient with noise of 1e-11; "
    "mask drawn by every forward call; mask drawn again by the pullback",
)
def dropout(slip, x):
    mask = (_noise if slip == "mask drawn by every forward call" else np.random.default_rng(5)).random(x.shape) < 0.5
    y = np.sin(x) * mask * 2
    if slip.startswith("value with noise"):
        y += 1e-6 * _noise.standard_normal(x.shape)

    def vjp(dy):
        kept = _noise.random(x.shape) < 0.5 if slip.startswith("mask drawn again") else mask
        dx = dy * kept * np.cos(x) * 2
        noise = float(slip.split()[-1]) * _noise.standard_normal(x.shape) if slip.startswith("gradient") else 0
        return (dx * (1 + noise),)

    return y, vjp


@planted("shared buffers", normal((2, 5)), "one buffer for all calls of a pullback; one buffer for all pullbacks")
def sine_with_buffer(slip, x):
    buffers = {"one buffer for all calls of a pullback": np.empty_like(x)}
    if slip == "one buffer for all pullbacks":
        buffers[slip] = _state.setdefault("sine", np.empty_like(x))
    return np.sin(x), lambda dy: (np.multiply(dy, np.cos(x), out=buffers.get(slip)),)


@planted("in-place tricks", normal((4, 3)), "saved activation scaled in place; saved activation is a view of the value")
def three_squares(slip, x):
    saved = x.copy()
    y = saved if slip == "saved activation scaled in place" else x.copy()
    y *= 3 * x
    saved = y[:] if slip == "saved activation is a view of the value" else saved
    return y, lambda dy: (6 * dy * saved,)


@planted("in-place tricks", normal((2, 3), (3, 3)), "buffer of the hidden state reused; residual added to the branch")
def residual_layer(slip, x, w):
    hidden = np.sin(x)
    y = np.add(x, hidden @ w, out=hidden if slip == "buffer of the hidden state reused" else None)

    def vjp(dy):
        dhidden = dy @ w.T + (dy if slip == "residual added to the branch" else 0)
        return dhidden * np.cos(x) + (0 if slip == "residual added to the branch" else dy), hidden.T @ dy

    return y, vjp


@planted("writes into its value", normal((3, 4)), "value scaled in place by the pullback")
def exponential(slip, x):
    y = np.exp(x)
    return y, lambda dy: (np.multiply(dy, y, out=y if slip else None).copy(),)


@planted("complex numbers", normal(8), "value complex")
def real_part_of_spectrum(slip, x):
    spectrum = np.fft.fft(x)
    return spectrum if slip else spectrum.real.copy(), lambda dy: (np.fft.fft(dy).real.copy(),)


@planted("float32", normal((3, 4), (4, 2)), "saved in float32; saved in float16; value of type float32; value rounded")
def tanh_layer(slip, x, w):
    y = np.tanh(x @ w)
    saved = _rounded(y, slip.split()[-1]) if slip.startswith("saved") else y
    y = {"value of type float32": y.astype(np.float32), "value rounded": _rounded(y)}.get(slip, y.copy())

    def vjp(dy):
        dh = dy * (1 - saved**2)
        return dh @ w.T, x.T @ dh

    return y, vjp


# Scans, convolutions, attention, normalisation


@planted(
    "scans",
    normal((4, 2), 3, (2, 3), (3, 3)),
    "gradient of the state dropped; time not reversed; du of the last step only; state of the wrong step saved; "
    "gradient of the first state zero; recurrent weight not transposed",
)
def recurrent_network(slip, x, state, w, u):
    states = [state]
    for row in x:
        states.append(np.tanh(row @ w + states[-1] @ u))

    def vjp(dy):
        dx, dw, du, dstate = np.zeros_like(x), np.zeros_like(w), np.zeros_like(u), np.zeros_like(state)
        for t in range(4) if slip == "time not reversed" else reversed(range(4)):
            dh = (dy[t] + dstate * (slip != "gradient of the state dropped")) * (1 - states[t + 1] ** 2)
            dx[t] = w @ dh
            dw += np.outer(x[t], dh)
            step = np.outer(states[t + 1 if slip == "state of the wrong step saved" else t], dh)
            du = step if slip == "du of the last step only" else du + step
            dstate = (u.T if slip == "recurrent weight not transposed" else u) @ dh
        return dx, dstate * (slip != "gradient of the first state zero"), dw, du

    return np.stack(states[1:]), vjp


@planted("scans", normal((5, 2), (5, 2)), "wrong decay; da with the new state; carry lost; lost at one step")
def linear_scan(slip, a, x):
    states = [np.zeros(2)]
    for t in range(5):
        states.append(a[t] * states[t] + x[t])

    def vjp(dy):
        da, dx, carry = np.zeros_like(a), np.zeros_like(x), 0
        for t in reversed(range(5)):
            dx[t] = dy[t] + (0 if slip == "carry lost" or (slip == "lost at one step" and t == 2) else carry)
            da[t] = dx[t] * states[t + 1 if slip == "da with the new state" else t]
            carry = a[max(t - 1, 0) if slip == "wrong decay" else t] * dx[t]
        return da, dx

    return np.stack(states[1:]), vjp


@planted(
    "convolution",
    normal((2, 2, 5, 5), (3, 2, 3, 3), 3),
    "kernel flipped in dx; stride forgotten in dx; padding cropped at the wrong side; taps assigned, not added; "
    "taps of dw transposed; db of the first sample; dw averaged over the batch",
)
def convolution(slip, x, w, b):
    """Two dimensions, padding 1, stride 2: x (n, c, 5, 5), w (o, c, 3, 3) -> (n, o, 3, 3)."""
    padded, every = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (slice(None), slice(None))
    taps = [(i, j, (*every, slice(i, i + 5, 2), slice(j, j + 5, 2))) for i in range(3) for j in range(3)]

    def vjp(dy):
        dpadded, dw = np.zeros_like(padded), np.zeros_like(w)
        for i, j, window in taps:
            dw[:, :, i, j] = np.einsum("nohw,nchw->oc", dy, padded[window])
            tap = w[:, :, 2 - i, 2 - j] if slip == "kernel flipped in dx" else w[:, :, i, j]
            place = (*every, slice(i, i + 3), slice(j, j + 3)) if slip == "stride forgotten in dx" else window
            term = np.einsum("nohw,oc->nchw", dy, tap)
            dpadded[place] = term if slip == "taps assigned, not added" else dpadded[place] + term
        dw = dw.swapaxes(2, 3) if slip == "taps of dw transposed" else dw
        dw = dw / 2 if slip == "dw averaged over the batch" else dw
        first = 2 if slip == "padding cropped at the wrong side" else 1
        db = (dy[:1] if slip == "db of the first sample" else dy).sum(axis=(0, 2, 3))
        return dpadded[:, :, first : first + 5, first : first + 5].copy(), dw, db

    y = sum(np.einsum("nchw,oc->nohw", padded[window], w[:, :, i, j]) for i, j, window in taps)
    return y + b[:, None, None], vjp


@planted(
    "attention",
    normal((4, 3), (4, 3), (4, 3)),
    "mask ignored by the recomputation; scale missing from dq; scale missing from dk; "
    "sum of the softmax Jacobian forgotten; softmax Jacobian over the wrong axis; dk and dv swapped; "
    "scores not transposed in dk; weights not transposed in dv; mask of the next token in dv",
)
def causal_attention(slip, q, k, v):
    scores, causal = q @ k.T / np.sqrt(3), np.tril(np.ones((4, 4), bool))
    weights = softmax(np.where(causal, scores, -np.inf))

    def vjp(dy):
        p = softmax(scores) if slip == "mask ignored by the recomputation" else weights
        dp = dy @ v.T
        inner = np.sum(dp * p, axis=0 if slip == "softmax Jacobian over the wrong axis" else 1, keepdims=True)
        ds = p * (dp - (0 if slip == "sum of the softmax Jacobian forgotten" else inner))
        dq = ds @ k / (1 if slip == "scale missing from dq" else np.sqrt(3))
        dk = (ds if slip == "scores not transposed in dk" else ds.T) @ q
        dk = dk / (1 if slip == "scale missing from dk" else np.sqrt(3))
        p = np.tril(p, -1) if slip == "mask of the next token in dv" else p
        dv = (p if slip == "weights not transposed in dv" else p.T) @ dy
        return (dq, dv, dk) if slip == "dk and dv swapped" else (dq, dk, dv)

    return weights @ v, vjp


@planted(
    "normalisation",
    normal((3, 5), 5),
    "rms treated as a constant; eps left out; eps outside the root; gain forgotten in dx; dgain with x; 1/n forgotten; "
    "cube of the rms missing",
)
def rms_norm(slip, x, gain):
    mean, eps = np.mean(x**2, axis=1, keepdims=True), 1e-3
    rms = np.sqrt(mean + eps)

    def vjp(dy):
        other = {"eps left out": np.sqrt(mean), "eps outside the root": np.sqrt(mean) + eps}
        back = other.get(slip, rms)
        dgain = np.sum(dy * (x if slip == "dgain with x" else x / back), axis=0)
        dn = dy if slip == "gain forgotten in dx" else dy * gain
        inner = np.sum(dn * x, axis=1, keepdims=True) / (1 if slip == "1/n forgotten" else 5)
        term = x * inner / back ** (1 if slip == "cube of the rms missing" else 3)
        return dn / back - (0 if slip == "rms treated as a constant" else term), dgain

    return x / rms * gain, vjp


@planted(
    "normalisation",
    normal((4, 4), 4, 4),
    "mean term missing; variance term missing; variance of n - 1; dshift with the gain; deviation not divided; "
    "means over the batch",
)
def layer_norm(slip, x, gain, shift):
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    normed = (x - x.mean(axis=1, keepdims=True)) / deviation

    def vjp(dy):
        dn, axis = dy * gain, 0 if slip == "means over the batch" else 1
        mean = 0 if slip == "mean term missing" else dn.mean(axis=axis, keepdims=True)
        inner = np.sum(dn * normed, axis=axis, keepdims=True) / (3 if slip == "variance of n - 1" else 4)
        dx = dn - mean - (0 if slip == "variance term missing" else normed * inner)
        dshift = np.sum(dn if slip == "dshift with the gain" else dy, axis=0)
        return dx / (1 if slip == "deviation not divided" else deviation), np.sum(dy * normed, axis=0), dshift

    return normed * gain + shift, vjp


# Losses, several outputs, lost branches

_ONE_HOT = np.eye(4)[[2, 0, 1, 2]]
_SMOOTH = 0.9 * _ONE_HOT + 0.1 / 4


@planted(
    "losses",
    normal((4, 4)),
    "without the mean; one-hot missing; label shifted by one; softmax over the batch; mean over the entries; "
    "smoothing forgotten; smoothing of n - 1 classes",
)
def cross_entropy(slip, logits):
    """The mean over 4 rows, with label smoothing of 0.1."""
    top = logits.max(axis=1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top
    targets = {
        "one-hot missing": 0,
        "label shifted by one": np.roll(_SMOOTH, 1, axis=1),
        "smoothing forgotten": _ONE_HOT,
        "smoothing of n - 1 classes": 0.9 * _ONE_HOT + (1 - _ONE_HOT) * 0.1 / 3,
    }

    def vjp(dy):
        p = softmax(logits, axis=0 if slip == "softmax over the batch" else 1)
        n = {"without the mean": 1, "mean over the entries": 16}.get(slip, 4)
        return (dy * (p - targets.get(slip, _SMOOTH)) / n,)

    return np.sum(_SMOOTH * (lse - logits)) / 4, vjp


@planted(
    "lost branches",
    normal((3, 4), (4, 4)),
    "residual lost; residual added twice; branch lost; first use of the weight lost; second use of the weight lost; "
    "residual scaled like the branch",
)
def two_layers_with_one_weight(slip, x, w):
    h = np.tanh(x @ w)

    def vjp(dy):
        dbranch = 0 * dy if slip == "branch lost" else 0.5 * dy
        dh = dbranch @ w.T * (1 - h**2)
        first, second = x.T @ dh * (slip[:9] != "first use"), h.T @ dbranch * (slip[:10] != "second use")
        residual = {"residual lost": 0, "residual added twice": 2, "residual scaled like the branch": 0.5}.get(slip, 1)
        return residual * dy + dh @ w.T, first + second

    return x + 0.5 * h @ w, vjp


# Formulas: the value, the gradients, then wrong gradients by the names of the bugs

_SCALES = 10.0 ** -np.array([0, 0, 6, 9, 12])
_T = np.linspace(0.3, 2, 4)
_PERMUTATION = np.random.default_rng(3).permutation(60_000)
_TOKENS = np.append(np.random.default_rng(3).integers(5000, size=300), [7, 7])
_ROWS = np.array([1, 3, 1, 0])
_WINDOWS = np.tril(np.triu(np.ones((4, 6))), 2).T / 3  # four windows of three entries
_DISTANCE = np.arange(4)[:, None] - np.arange(4) + 3
_ROTATIONS = np.array([[[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]] for t in (0.3, 0.9, 1.5)])
_ROW = np.arange(12).reshape(3, 4) % 3 == 0
_LABELS = np.array([0, 1, 1, 0, 1, 0])
_inv, _solve, _one = np.linalg.inv, np.linalg.solve, np.ones_like

# fmt: off
for _draw, _note in ((normal, ""), (from_seed_0, "_of_seed_0")):
    pure("transposed matrix", f"square_layer{_note}", _draw((4, 4), (4, 4)), np.matmul, _matmul_gradients,
         dw_transposed=lambda d, x, w: (d @ w.T, d.T @ x), dx_with_w=lambda d, x, w: (d @ w, x.T @ d),
         cotangent_transposed=lambda d, x, w: (d.T @ w.T, x.T @ d.T))
    pure("transposed matrix", f"matrix_times_vector{_note}", _draw((4, 4), 4), np.matmul,
         lambda d, w, x: (np.outer(d, x), d @ w), dw_transposed=lambda d, w, x: (np.outer(x, d), d @ w),
         dx_with_w_transposed=lambda d, w, x: (np.outer(d, x), w @ d))
    pure("cotangent", f"layer{_note}", _draw((4, 4), (4, 4)), np.matmul, _matmul_gradients,
         x_in_place_of_the_cotangent=lambda d, x, w: (x @ w.T, x.T @ x))
pure("transposed matrix", "gram", normal((4, 4)), lambda x: x @ x.T, lambda d, x: (d + d.T) @ x,
     second_factor_forgotten=lambda d, x: d @ x, cotangent_not_transposed=lambda d, x: 2 * d @ x)
pure("overwrites its argument", "product", normal((2, 3), (2, 3)), np.multiply, lambda d, x, w: (d * w, d * x),
     gradient_written_into_x=lambda d, x, w: (d * w, np.multiply(d, x, out=x)),
     w_scaled_after_use=lambda d, x, w: (d * w, d * x, np.multiply(w, 2, out=w))[:2])
pure("shared buffers", "addition", normal((4, 4), (4, 4)), lambda a, b: a + b, lambda d, a, b: (d, d), fresh=False,
     both_are_the_cotangent=lambda d, a, b: (d, d), both_are_one_array=lambda d, a, b: ((g := 1 * d), g),
     both_are_views_of_one_array=lambda d, a, b: ((g := 1 * d)[:], g[:]))
pure("shared buffers", "sum_with_transposed", normal((3, 4), (4, 3)), lambda a, b: 2 * (a + b.T),
     lambda d, a, b: (2 * d, 2 * d.T), fresh=False, second_is_the_first_transposed=lambda d, a, b: ((g := 2 * d), g.T))
pure("shared buffers", "half_square", normal(6), lambda x: x @ x / 2, lambda d, x: d * x, fresh=False,
     argument_for_a_cotangent_of_1=lambda d, x: x if d == 1 else d * x,
     view_for_a_cotangent_of_1=lambda d, x: x[:] if d == 1 else d * x)
pure("shared buffers", "sum_of_list", lambda rng: (list(rng.standard_normal((3, 3))),),
     lambda p: 2 * (p[0] + p[1] + p[2]), lambda d, p: ([2 * d, 2 * d, 2 * d],), fresh=False,
     list_of_one_array=lambda d, p: ([2 * d] * 3,),
     last_two_leaves_are_one_array=lambda d, p: ([2 * d, (g := 2 * d), g],))
pure("writes into its cotangent", "double_rectifier", signed((3, 4)), lambda x: 2 * np.maximum(x, 0),
     lambda d, x: 2 * d * (x > 0), masked_in_place=lambda d, x: 2 * np.multiply(d, x > 0, out=d),
     doubled_in_place=lambda d, x: np.multiply(d, 2, out=d) * (x > 0),
     cleared_after_use=lambda d, x: (2 * d * (x > 0), d.fill(0))[0],
     one_entry_cleared_after_use=lambda d, x: (2 * d * (x > 0), d.put(0, 0))[0])
pure("writes into its cotangent", "softmax", normal((2, 5)), softmax, _softmax_gradient,
     centred_in_place=lambda d, x: softmax(x) * np.subtract(d, np.sum(d * softmax(x), axis=-1, keepdims=True), out=d))
pure("activations", "softmax_of_rows", normal((3, 3)), softmax, _softmax_gradient,
     sum_forgotten=lambda d, x: d * softmax(x), diagonal_only=lambda d, x: d * softmax(x) * (1 - softmax(x)),
     sum_over_the_wrong_axis=lambda d, x: softmax(x) * (d - np.sum(d * softmax(x), axis=0)))
pure("activations", "rectifier_with_slope", signed((3, 4)), lambda x: np.where(x > 0, x, x / 9),
     lambda d, x: d * np.where(x > 0, 1, 1 / 9), guided=lambda d, x: np.maximum(d, 0) * np.where(x > 0, 1, 1 / 9),
     mask_of_the_cotangent=lambda d, x: d * np.where(d > 0, 1, 1 / 9),
     negative_slope_forgotten=lambda d, x: d * (x > 0),
     slope_on_the_wrong_side=lambda d, x: d * np.where(x > 0, 1 / 9, 1), straight_through=lambda d, x: d)
pure("activations", "tanh", normal((2, 5)), np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2),
     tanh_of_the_tanh=lambda d, x: d * (1 - np.tanh(np.tanh(x)) ** 2), x_for_y=lambda d, x: d * (1 - x**2))
pure("activations", "sigmoid", normal((2, 5)), sigmoid, lambda d, x: d * sigmoid(x) * sigmoid(-x),
     sigmoid_of_the_sigmoid=lambda d, x: d * sigmoid(sigmoid(x)) * sigmoid(-sigmoid(x)),
     x_for_y=lambda d, x: d * x * (1 - x), factor_forgotten=lambda d, x: d * sigmoid(-x))
pure("activations", "elu", signed((2, 5)), lambda x: np.where(x > 0, x, np.expm1(x)),
     lambda d, x: d * np.exp(np.minimum(x, 0)), value_of_the_branch=lambda d, x: d * np.where(x > 0, 1, np.expm1(x)),
     both_sides_exponential=lambda d, x: d * np.exp(x))
pure("activations", "gelu", normal((2, 5)), lambda x: x * sigmoid(1.6 * (x + 0.044715 * x**3)),
     lambda d, x: d * _gelu_slope(x), product_rule_forgotten=lambda d, x: d * _gelu_slope(x, product_rule=0),
     three_forgotten=lambda d, x: d * _gelu_slope(x, 0.044715))
pure("activations", "clamp", two_sizes(0.3, 5), lambda x: np.clip(x, -1, 1), lambda d, x: d * (abs(x) < 1),
     straight_through=lambda d, x: d, sides_swapped=lambda d, x: d * (abs(x) > 1), one_sided=lambda d, x: d * (x < 1))
pure("activations", "gated_unit", normal(5, 5), lambda a, b: a * sigmoid(b),
     lambda d, a, b: (d * sigmoid(b), d * a * sigmoid(b) * sigmoid(-b)),
     slope_of_the_gate_forgotten=lambda d, a, b: (d * sigmoid(b), d * a),
     gate_and_value_swapped=lambda d, a, b: (d * a * sigmoid(b) * sigmoid(-b), d * sigmoid(b)))
pure("forgotten gradient", "affine_layer", normal((3, 2), (2, 2), 2), _affine, _affine_gradients,
     **{f"no_{name}": Edit(i, lambda g: None) for i, name in enumerate(("dx", "dw", "db"))},
     db_is_zero=scaled(0, position=2))
pure("forgotten gradient", "layer_with_tree", _layer, lambda x, p: _affine(x, **p), _layer_gradients,
     None_for_b=Edit(1, lambda g: {**g, "b": None}), None_for_the_tree=Edit(1, lambda g: None))
pure("broadcasting", "bias", normal((3, 3), (3, 3), 3), _affine, _affine_gradients,
     summed_over_the_wrong_axis=lambda d, *args: (*_affine_gradients(d, *args)[:2], d.sum(axis=1)),
     first_row_only=lambda d, *args: (*_affine_gradients(d, *args)[:2], d[0]), mean_for_sum=scaled(1 / 3, position=2),
     axis_kept=Edit(2, lambda g: g[None]))
pure("broadcasting", "scalar_times_vector", normal(4, ()), lambda x, g: x * g, lambda d, x, g: (d * g, np.sum(d * x)),
     mean_for_sum=lambda d, x, g: (d * g, np.mean(d * x)), not_summed=lambda d, x, g: (d * g, d * x))
pure("broadcasting", "column_plus_row", normal((4, 1), (1, 4)), lambda a, b: a + b,
     lambda d, a, b: (d.sum(axis=1, keepdims=True), d.sum(axis=0, keepdims=True)),
     axes_swapped=lambda d, a, b: (d.sum(axis=0)[:, None], d.sum(axis=1)[None]),
     first_column_only=lambda d, a, b: (d[:, :1], d.sum(axis=0, keepdims=True)),
     not_summed=lambda d, a, b: (d, d.sum(axis=0, keepdims=True)))
pure("broadcasting", "centred_rows", normal((3, 3)), lambda x: x - x.mean(axis=1, keepdims=True),
     lambda d, x: d - d.mean(axis=1, keepdims=True), mean_treated_as_a_constant=lambda d, x: d,
     wrong_axis=lambda d, x: d - d.mean(axis=0), sum_for_mean=lambda d, x: d - d.sum(axis=1, keepdims=True))
pure("wrong shape", "affine_layer", normal((3, 2), (2, 2), 2), _affine, _affine_gradients,
     dx_transposed=Edit(0, np.transpose), dw_flat=Edit(1, np.ravel), db_a_column=Edit(2, lambda g: g[:, None]),
     db_a_scalar=Edit(2, np.sum), surplus_gradient=lambda d, *args: (*_affine_gradients(d, *args), d),
     gradient_missing=lambda d, *args: _affine_gradients(d, *args)[:2])
pure("wrong dtype", "scaled_vector", normal(6), lambda x: 1.5 * x, lambda d, x: 1.5 * d,
     integers=lambda d, x: (1.5 * d).astype(int), objects=lambda d, x: (1.5 * d).astype(object),
     booleans=lambda d, x: 1.5 * d > 0)
pure("complex numbers", "real_spectrum", normal(8), lambda x: np.fft.fft(x).real, lambda d, x: np.fft.fft(d).real,
     gradient_complex=lambda d, x: np.fft.fft(d), imaginary_part_zero=lambda d, x: np.fft.fft(d).real + 0j)
pure("tree of gradients", "layer_with_tree", _layer, lambda x, p: _affine(x, **p), _layer_gradients,
     key_misspelt=Edit(1, lambda g: {"w": g["w"], "bias": g["b"]}), key_missing=Edit(1, lambda g: {"w": g["w"]}),
     surplus_key=Edit(1, lambda g: {**g, "c": g["b"]}), list_for_dict=Edit(1, lambda g: [g["w"], g["b"]]),
     array_for_dict=Edit(1, lambda g: g["w"]), nested_dict=Edit(1, lambda g: {"layer": g}))
pure("tree of gradients", "product_of_list", lambda rng: (list(rng.standard_normal((3, 2, 2))),),
     lambda p: p[0] @ p[1] @ p[2], lambda d, p: [d @ (p[1] @ p[2]).T, p[0].T @ d @ p[2].T, (p[0] @ p[1]).T @ d],
     too_short=Edit(0, lambda g: g[:2]), too_long=Edit(0, lambda g: [*g, g[0]]),
     reversed_order=Edit(0, lambda g: g[::-1]), array_for_list=Edit(0, np.stack))
pure("tree of gradients", "parabola", lambda rng: (Curve(Line(*rng.standard_normal((2, 4))), rng.standard_normal(4)),),
     lambda c: c.line.slope * _T + c.line.offset + c.bend * _T**2, lambda d, c: Curve(Line(d * _T, 1 * d), d * _T**2),
     slope_and_offset_swapped=lambda d, c: Curve(Line(1 * d, d * _T), d * _T**2),
     sign_of_bend=lambda d, c: Curve(Line(d * _T, 1 * d), -d * _T**2),
     offset_missing=lambda d, c: Curve((d * _T,), d * _T**2), no_bend=lambda d, c: Curve(Line(d * _T, 1 * d), None))
pure("small entries beside large ones", "scaled_squares", positive(5), lambda x: _SCALES * x**2,
     lambda d, x: 2 * d * _SCALES * x, **{"1e-6_doubled": scaled(2, 2), "1e-9_zero": scaled(0, 3),
     "1e-12_doubled": scaled(2, 4), "1e-12_of_wrong_sign": scaled(-1, 4)})
for _size in (1e-6, 1e-7, 1e-9):
    _slope = partial(lambda size, d, x: 2 * d * x * np.array([1, 1, 1, size]), _size)
    pure("small entries beside large ones", f"sum_with_term_of_{_size:g}", positive(4),
         partial(lambda size, x: np.array([1, 1, 1, size]) @ x**2, _size), _slope, doubled=scaled(2, 3),
         zero=scaled(0, 3))
pure("small entries beside large ones", "large_product_plus_bias", normal((2, 3), 3), lambda x, b: 1e7 * x + b,
     lambda d, x, b: (1e7 * d, d.sum(axis=0)), db_doubled=lambda d, x, b: (1e7 * d, 2 * d.sum(axis=0)),
     db_zero=lambda d, x, b: (1e7 * d, 0 * b))
pure("small entries beside large ones", "loss_of_confident_logits", lambda rng: (rng.normal([0, 1, -9, -19], 0.5),),
     lambda x: np.log(np.exp(x).sum()) - x[1], lambda d, x: d * (softmax(x) - np.eye(4)[1]),
     below_a_millionth_zero=lambda d, x: d * (softmax(x) * (softmax(x) > 1e-6) - np.eye(4)[1]))
pure("one entry of a large array", "tanh_of_50003", positive(50_003), np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2),
     **_one_wrong(12_345), tail_of_the_last_block_zero=scaled(0, slice(50_000, None)))
pure("one entry of a large array", "mean_square_of_60000", positive(60_000), lambda x: np.mean(x**2),
     lambda d, x: 2 * d * x / x.size, **_one_wrong(-1), first_entry_zero=scaled(0, 0))
pure("one entry of a large array", "large_layer", normal((3, 250), (250, 240)), np.matmul, _matmul_gradients,
     one_row_zero=scaled(0, 200, 1), **_one_wrong((123, 45), 1))
pure("one entry of a large array", "large_permutation", normal(60_000), lambda x: x[_PERMUTATION],
     lambda d, x: _assigned(d, x, _PERMUTATION),
     two_entries_swapped=Edit(0, lambda g: g[[*range(7), 8, 7, *range(9, 60_000)]]))
pure("one entry of a large array", "large_table", positive((5000, 12)), lambda x: x[_TOKENS],
     lambda d, x: _added(d, x, _TOKENS), last_token_missed=lambda d, x: _added(d[:-1], x, _TOKENS[:-1]),
     repeated_tokens_assigned=lambda d, x: _assigned(d, x, _TOKENS))
pure("large cotangents", "cosine", normal((3, 4)), np.cos, lambda d, x: -d * np.sin(x),
     **{f"clipped_at_{limit}": partial(lambda limit, d, x: -np.clip(d, -limit, limit) * np.sin(x), float(limit))
     for limit in ("1", "10", "100", "1e3", "1e4", "1e5", "1e6")},
     norm_clipped_at_1000=lambda d, x: -d * np.sin(x) * 1000 / max(np.sqrt(np.sum(d * d)), 1000),
     squashed_by_tanh=lambda d, x: -1000 * np.tanh(d / 1000) * np.sin(x))
pure("large cotangents", "mean_of_cubes", normal((4, 3)), lambda x: np.mean(x**3), lambda d, x: 3 * d * x**2 / x.size,
     gradient_clipped_at_10=Edit(0, lambda g: np.clip(g, -10, 10)),
     dloss_clipped_at_1000=lambda d, x: 3 * np.clip(d, -1000, 1000) * x**2 / x.size,
     **{"gradient_clipped_at_1e5": Edit(0, lambda g: np.clip(g, -1e5, 1e5))})
pure("small cotangents", "cosine", normal((3, 4)), np.cos, lambda d, x: -d * np.sin(x),
     **{f"zero_below_{limit}": partial(lambda limit, d, x: -d * (abs(d) >= limit) * np.sin(x), float(limit))
     for limit in ("1e-2", "1e-4", "1e-6", "1e-8")})
pure("small cotangents", "mean_of_cubes", normal((4, 3)), lambda x: np.mean(x**3), lambda d, x: 3 * d * x**2 / x.size,
     **{"dloss_zero_below_1e-5": lambda d, x: 3 * d * (abs(d) >= 1e-5) * x**2 / x.size,
     "gradient_zero_below_1e-7": Edit(0, lambda g: g * (abs(g) >= 1e-7))})
pure("float32", "layer", normal((3, 4), (4, 2)), np.matmul, _matmul_gradients,
     whole_pullback=lambda d, x, w: tuple(map(np.float64, _matmul_gradients(*map(np.float32, (d, x, w))))),
     type_of_both_gradients=lambda d, x, w: tuple(map(np.float32, _matmul_gradients(d, x, w))),
     type_of_dw=Edit(1, np.float32), values_of_dw=Edit(1, _rounded),
     cotangent=lambda d, x, w: _matmul_gradients(_rounded(d), x, w),
     product_with_w=lambda d, x, w: _matmul_gradients(d, x, _rounded(w)))
pure("float32", "tanh_of_50000", positive(50_000), np.tanh, lambda d, x: d * (1 - np.tanh(x) ** 2),
     gradient_rounded=Edit(0, _rounded))
for _size in ("1e6", "1e8", "1e10", "1e12", "1e-6", "1e-10", "1e-12"):
    _kind = "small arguments" if "-" in _size else "large arguments"
    pure(_kind, f"logarithm_at_{_size}", positive(5, size=float(_size)), np.log, lambda d, x: d / x, doubled=scaled(2),
         one_entry_zero=scaled(0, 2), off_by_a_thousandth=scaled(1.001))
    pure(_kind, f"sum_of_roots_at_{_size}", positive(5, size=float(_size)), lambda x: np.sqrt(x).sum(),
         lambda d, x: 0.5 * d / np.sqrt(x), wrong_sign=scaled(-1), zero=scaled(0))
pure("large arguments", "log_softmax_around_1e6", lambda rng: (1e6 + rng.standard_normal(4),),
     lambda x: x - x.max() - np.log(np.exp(x - x.max()).sum()), lambda d, x: d - softmax(x) * d.sum(),
     p_forgotten=lambda d, x: d)
for _size in ("1e-8", "1e-12", "1e-16", "1e-20", "1e15"):
    _slope = partial(lambda size, d, x, t: (size * d * (x - t), size * d * (t - x)), float(_size))
    pure("small losses" if "-" in _size else "large losses", f"squared_error_times_{_size}", normal(5, 5),
         partial(lambda size, x, t: size * np.sum((x - t) ** 2) / 2, float(_size)), _slope, doubled=scaled(2),
         zero=scaled(0, position=1), one_entry_off_by_a_thousandth=scaled(1.001, 2))
pure("cotangent", "arc_tangent", normal((3, 4)), np.arctan, lambda d, x: d / (1 + x**2),
     ignored=lambda d, x: 1 / (1 + x**2), absolute_value=lambda d, x: abs(d) / (1 + x**2),
     sign_only=lambda d, x: np.sign(d) / (1 + x**2), one_added=lambda d, x: (d + 1) / (1 + x**2),
     a_millionth_added=lambda d, x: (d + 1e-6) / (1 + x**2), mean_for_every_entry=lambda d, x: d.mean() / (1 + x**2),
     sum_for_every_entry=lambda d, x: d.sum() / (1 + x**2), first_for_every_entry=lambda d, x: d[0, 0] / (1 + x**2),
     squared=lambda d, x: d * d / (1 + x**2),
     normalised=lambda d, x: d / (np.sqrt(np.sum(d * d)) + 1e-300) / (1 + x**2),
     rounded=lambda d, x: np.round(d, 6) / (1 + x**2),
     negative_entries_dropped=lambda d, x: np.maximum(d, 0) / (1 + x**2),
     first_row_for_all=lambda d, x: d[:1] / (1 + x**2), last_column_dropped=lambda d, x: d * [1, 1, 1, 0] / (1 + x**2),
     sorted=lambda d, x: np.sort(d, axis=1) / (1 + x**2), shifted=lambda d, x: np.roll(d, 1) / (1 + x**2))
pure("cotangent", "sum_of_sines", normal(5), lambda x: np.sin(x).sum(), lambda d, x: d * np.cos(x),
     ignored=lambda d, x: np.cos(x), absolute_value=lambda d, x: abs(d) * np.cos(x),
     squared=lambda d, x: d**2 * np.cos(x), one_added=lambda d, x: (d + 1) * np.cos(x),
     sign_only=lambda d, x: np.sign(d) * np.cos(x))
pure("several outputs", "mean_and_power", normal((3, 4)), lambda x: (x.mean(axis=0), np.mean(x**2, axis=0)),
     lambda d, x: (d[0] + 2 * x * d[1]) / 3, second_dropped=lambda d, x: (d[0] + 0 * x) / 3,
     first_dropped=lambda d, x: 2 * x * d[1] / 3, swapped=lambda d, x: (d[1] + 2 * x * d[0]) / 3,
     first_twice=lambda d, x: (d[0] + 2 * x * d[0]) / 3)
pure("several outputs", "hidden_and_loss", normal(5), lambda x: {"hidden": np.sin(x), "loss": x @ x},
     lambda d, x: np.cos(x) * d["hidden"] + 2 * x * d["loss"],
     loss_dropped=lambda d, x: np.cos(x) * d["hidden"], hidden_dropped=lambda d, x: 2 * x * d["loss"],
     sign_of_the_loss=lambda d, x: np.cos(x) * d["hidden"] - 2 * x * d["loss"],
     cotangent_overwritten=lambda d, x: (np.cos(x) * d["hidden"] + 2 * x * d["loss"], d["hidden"].fill(0))[0])
pure("wrong factor", "layer", normal((4, 3), (3, 2)), np.matmul, _matmul_gradients, sign_of_dw=scaled(-1, (), 1),
     sign_of_dx=scaled(-1), dw_doubled=scaled(2, (), 1), dw_divided_by_the_batch_size=scaled(1 / 4, (), 1),
     dx_times_the_width=scaled(3), dx_zero=scaled(0), dx_off_by_a_millionth=scaled(1 + 1e-6),
     one_entry_of_wrong_sign=scaled(-1, (1, 1)), one_column_doubled=scaled(2, (slice(None), 0), 1))
pure("reductions", "mean_of_columns", normal((3, 4)), lambda x: x.mean(axis=0), lambda d, x: _one(x) * d / 3,
     without_n=lambda d, x: _one(x) * d, n_of_the_other_axis=lambda d, x: _one(x) * d / 4)
pure("reductions", "variance", normal(5), lambda x: x.var(ddof=1), lambda d, x: d * 2 * (x - x.mean()) / 4,
     divided_by_n=lambda d, x: d * 2 * (x - x.mean()) / 5, not_centred=lambda d, x: d * 2 * x / 4)
pure("reductions", "log_sum_exp", normal((3, 3)), lambda x: np.log(np.exp(x).sum(axis=1)),
     lambda d, x: d[:, None] * softmax(x), softmax_over_the_wrong_axis=lambda d, x: d[:, None] * softmax(x, 0),
     largest_entry_only=lambda d, x: d[:, None] * (x == x.max(axis=1, keepdims=True)))
pure("reductions", "product_with_zero", lambda rng: (rng.uniform(0.5, 2, 5) * [1, 1, 0, 1, 1],), np.prod,
     lambda d, x: d * _products_of_others(x), zero_skipped=lambda d, x: d * np.prod(x) / np.where(x == 0, 1, x),
     zero=lambda d, x: 0 * d * x)
pure("reductions", "cumulative_sum", normal(6), np.cumsum, lambda d, x: np.cumsum(d[::-1])[::-1],
     not_reversed=lambda d, x: np.cumsum(d), entry_itself_left_out=lambda d, x: np.cumsum(d[::-1])[::-1] - d)
pure("reductions", "cumulative_product", positive(5), np.cumprod,
     lambda d, x: np.cumsum((d * np.cumprod(x))[::-1])[::-1] / x,
     not_reversed=lambda d, x: np.cumsum(d * np.cumprod(x)) / x,
     not_divided=lambda d, x: np.cumsum((d * np.cumprod(x))[::-1])[::-1])
pure("reductions", "weighted_mean", positive(5, 5), lambda x, w: w @ x / w.sum(),
     lambda d, x, w: (d * w / w.sum(), d * (x - w @ x / w.sum()) / w.sum()),
     normaliser_treated_as_a_constant=lambda d, x, w: (d * w / w.sum(), d * x / w.sum()),
     dx_not_normalised=lambda d, x, w: (d * w, d * (x - w @ x / w.sum()) / w.sum()))
pure("normalisation", "unit_vector", normal(4), lambda v: v / np.sqrt(v @ v),
     lambda d, v: (d - (d @ v) * v / (v @ v)) / np.sqrt(v @ v),
     norm_treated_as_a_constant=lambda d, v: d / np.sqrt(v @ v),
     projection_doubled=lambda d, v: (d - 2 * (d @ v) * v / (v @ v)) / np.sqrt(v @ v))
pure("losses", "mean_squared_error", normal((3, 2), (3, 2)), lambda x, t: np.mean((x - t) ** 2),
     lambda d, x, t: (d * (x - t) / 3, d * (t - x) / 3),
     two_forgotten=lambda d, x, t: (d * (x - t) / 6, d * (t - x) / 6),
     mean_forgotten=lambda d, x, t: (2 * d * (x - t), 2 * d * (t - x)),
     sign_of_the_target=lambda d, x, t: (d * (x - t) / 3, d * (x - t) / 3))
pure("losses", "huber", two_sizes(0.3, 5), lambda x: np.where(abs(x) < 1, x * x / 2, abs(x) - 0.5).sum(),
     lambda d, x: d * np.clip(x, -1, 1), quadratic_branch_only=lambda d, x: d * x,
     linear_branch_only=lambda d, x: d * np.sign(x),
     branches_swapped=lambda d, x: d * np.where(abs(x) < 1, np.sign(x), x))
pure("losses", "binary_cross_entropy", normal(6),
     lambda x: np.mean((1 - _LABELS) * np.logaddexp(0, x) + 2.5 * _LABELS * np.logaddexp(0, -x)),
     lambda d, x: d * ((1 - _LABELS) * sigmoid(x) - 2.5 * _LABELS * sigmoid(-x)) / 6,
     wrong_sign=lambda d, x: d * (2.5 * _LABELS * sigmoid(-x) - (1 - _LABELS) * sigmoid(x)) / 6,
     weight_forgotten=lambda d, x: d * (sigmoid(x) - _LABELS) / 6, label_not_subtracted=lambda d, x: d * sigmoid(x) / 6)
pure("indexing", "roll", normal((3, 4)), lambda x: np.roll(x, 1, axis=1), lambda d, x: np.roll(d, -1, axis=1),
     rolled_forwards=lambda d, x: np.roll(d, 1, axis=1), along_the_wrong_axis=lambda d, x: np.roll(d, -1, axis=0))
pure("indexing", "padding", normal((4, 3)), lambda x: np.pad(x, ((1, 2), (0, 0))), lambda d, x: d[1:5],
     cropped_at_the_wrong_side=lambda d, x: d[2:6], off_by_one=lambda d, x: d[:4])
pure("indexing", "concatenation", normal((2, 3), (2, 3)), lambda a, b: np.concatenate([a, b], axis=1),
     lambda d, a, b: (d[:, :3], d[:, 3:]), parts_swapped=lambda d, a, b: (d[:, 3:], d[:, :3]),
     split_by_steps=lambda d, a, b: (d[:, ::2], d[:, 1::2]), second_part_lost=lambda d, a, b: (d[:, :3], 0 * b))
pure("indexing", "choice", normal((3, 4), (3, 4)), lambda a, b: np.where(_ROW, a, b),
     lambda d, a, b: (d * _ROW, d * ~_ROW), branches_swapped=lambda d, a, b: (d * ~_ROW, d * _ROW),
     condition_ignored=lambda d, a, b: (d, d))
pure("indexing", "sort", distinct((8,)), np.sort, lambda d, x: _assigned(d, x, np.argsort(x)),
     permutation_not_inverted=lambda d, x: d[np.argsort(x)],
     gradient_sorted=lambda d, x: _assigned(np.sort(d), x, np.argsort(x)),
     descending=lambda d, x: _assigned(d, x, np.argsort(-x)))
pure("indexing", "permuted_axes", normal((3, 3, 3)), lambda x: x.transpose(1, 2, 0), lambda d, x: d.transpose(2, 0, 1),
     permutation_not_inverted=lambda d, x: d.transpose(1, 2, 0), not_permuted=lambda d, x: d)
pure("indexing", "reshape", normal((3, 4)), lambda x: x.reshape(2, 6), lambda d, x: d.reshape(3, 4),
     order_of_Fortran=lambda d, x: d.reshape((3, 4), order="F"), transposed=lambda d, x: d.reshape(4, 3).T)
pure("indexing", "lower_triangle", normal((4, 4)), np.tril, lambda d, x: np.tril(d),
     upper_triangle=lambda d, x: np.triu(d), diagonal_left_out=lambda d, x: np.tril(d, -1),
     mask_forgotten=lambda d, x: d, diagonal_above=lambda d, x: np.tril(d, 1))
pure("indexing", "lookup", normal((4, 3)), lambda x: x[_ROWS], lambda d, x: _added(d, x, _ROWS),
     repeated_rows_assigned=lambda d, x: _assigned(d, x, _ROWS), next_row=lambda d, x: _added(d, x, _ROWS - 1),
     gathered=lambda d, x: d[_ROWS])
pure("linear algebra", "inverse", invertible(), _inv, lambda d, a: -_inv(a).T @ d @ _inv(a).T,
     not_transposed=lambda d, a: -_inv(a) @ d @ _inv(a), wrong_sign=lambda d, a: _inv(a).T @ d @ _inv(a).T,
     one_factor_only=lambda d, a: -_inv(a).T @ d)
pure("linear algebra", "solve", invertible(3), _solve,
     lambda d, a, b: (-np.outer(_solve(a.T, d), _solve(a, b)), _solve(a.T, d)),
     da_transposed=lambda d, a, b: (-np.outer(_solve(a, b), _solve(a.T, d)), _solve(a.T, d)),
     solved_with_a=lambda d, a, b: (-np.outer(_solve(a, d), _solve(a, b)), _solve(a, d)),
     da_with_b=lambda d, a, b: (-np.outer(_solve(a.T, d), b), _solve(a.T, d)),
     sign_of_da=lambda d, a, b: (np.outer(_solve(a.T, d), _solve(a, b)), _solve(a.T, d)))
pure("linear algebra", "determinant", invertible(), np.linalg.det, lambda d, a: d * np.linalg.det(a) * _inv(a).T,
     not_transposed=lambda d, a: d * np.linalg.det(a) * _inv(a), determinant_forgotten=lambda d, a: d * _inv(a).T)
pure("linear algebra", "cholesky", normal((3, 3)), lambda m: np.linalg.cholesky(m @ m.T + 4 * np.eye(3)),
     lambda d, m: (_cholesky_gradient(m, d) + _cholesky_gradient(m, d).T) @ m,
     diagonal_doubled=lambda d, m: (_cholesky_gradient(m, d, np.tril, 0) + _cholesky_gradient(m, d, np.tril, 0).T) @ m,
     triangle_forgotten=lambda d, m: (_cholesky_gradient(m, d, np.array) + _cholesky_gradient(m, d, np.array).T) @ m,
     not_symmetrised=lambda d, m: 2 * _cholesky_gradient(m, d) @ m)
pure("linear algebra", "quadratic_form", normal(3, (3, 3)), lambda x, a: x @ a @ x,
     lambda d, x, a: (d * (a + a.T) @ x, d * np.outer(x, x)),
     a_not_symmetrised=lambda d, x, a: (2 * d * a @ x, d * np.outer(x, x)),
     a_halved=lambda d, x, a: (d * (a + a.T) @ x, d * np.outer(x, x) / 2))
pure("swapped arguments", "quotient", positive(5, 5), lambda a, b: a / b, lambda d, a, b: (d / b, -d * a / b**2),
     gradients_swapped=lambda d, a, b: (-d * a / b**2, d / b), sign_of_db=lambda d, a, b: (d / b, d * a / b**2),
     square_forgotten=lambda d, a, b: (d / b, -d * a / b))
pure("in-place tricks", "exchanged_rows", normal((4, 3)), lambda x: x[[1, 0, 2, 3]], lambda d, x: d[[1, 0, 2, 3]],
     exchanged_through_views=lambda d, x: d[[1, 1, 2, 3]],
     other_rows_not_copied=lambda d, x: _assigned(d[[1, 0]], x, [0, 1]))
pure("attention", "relative_bias", normal((4, 4), 7), lambda s, b: s + b[_DISTANCE],
     lambda d, s, b: (1 * d, _added(d, b, _DISTANCE)),
     one_entry_of_each_diagonal=lambda d, s, b: (d, _assigned(d, b, _DISTANCE)),
     distance_reversed=lambda d, s, b: (d, _added(d.T, b, _DISTANCE)),
     off_by_one=lambda d, s, b: (d, _added(d, b, _DISTANCE - 1)))
pure("attention", "rotary_pairs", normal((3, 2)), lambda x: np.einsum("tij,tj->ti", _ROTATIONS, x),
     lambda d, x: np.einsum("tij,ti->tj", _ROTATIONS, d),
     rotated_forwards_again=lambda d, x: np.einsum("tij,tj->ti", _ROTATIONS, d),
     angle_of_the_next_position=lambda d, x: np.einsum("tij,ti->tj", np.roll(_ROTATIONS, 1, axis=0), d))
for _kind, _shape in (("reductions", (3, 4)), ("pooling", (6, 2))):
    pure(_kind, f"maximum_of_{_shape[1]}", distinct(_shape), lambda x: x.max(axis=1),
         lambda d, x: d[:, None] * (x == x.max(axis=1, keepdims=True)),
         routed_to_the_minimum=lambda d, x: d[:, None] * (x == x.min(axis=1, keepdims=True)),
         routed_to_the_next=lambda d, x: d[:, None] * np.roll(x == x.max(axis=1, keepdims=True), 1, axis=1),
         spread_evenly=lambda d, x: d[:, None] / x.shape[1] + 0 * x)
pure("pooling", "average_of_windows", normal((2, 6)), lambda x: x @ _WINDOWS, lambda d, x: d @ _WINDOWS.T,
     without_k=lambda d, x: 3 * d @ _WINDOWS.T, shifted_by_one=lambda d, x: np.roll(d @ _WINDOWS.T, 1, axis=1),
     last_window_missed=lambda d, x: d[:, :3] @ _WINDOWS.T[:3],
     windows_assigned_not_added=lambda d, x: np.repeat(d, [1, 1, 1, 3], axis=1) / 3)
# fmt: on

BUGS = tuple(_bugs)
