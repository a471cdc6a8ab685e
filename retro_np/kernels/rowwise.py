"""Loops over rows and entries: RMSNorm, LayerNorm, GELU, summing rows of an embedding, AdamW.

In NumPy each step of such a loop walks through memory once more, and its temporaries are as large as the input. In
Numba one walk does it all, a block of rows at a time, the blocks on all threads (rows_numba.py). Inputs are float32 or
float64.
"""

import functools
import importlib

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import check_shapes, kernel
from retro_np.kernels.threads import blocks, parallel_for

BLOCK = 32768  # entries: what a block reads and writes fits the second-level cache
PARTS = 16  # of the rows, at most, where sums over rows are taken: each has its own sum
SLOPE, CUBIC = float(np.sqrt(2 / np.pi)), 0.044715  # of GELU by tanh


def _rms_norm_forward_numpy(x, gain, eps=1e-6):
    """y = gain · x · scale, scale = 1 / √(mean(x²) + eps), over the last axis. Zhang & Sennrich 2019.

    x: (rows, d); gain: (d,). Returns y (rows, d) and scale (rows,), which the backward needs.
    """
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    return gain * (x * scale), scale[:, 0]


def _rms_norm_backward_numpy(dy, x, gain, scale):
    """The pullback of rms_norm_forward. dy, x: (rows, d). Returns dx (rows, d) and dgain (d,)."""
    unit = x * scale[:, None]
    dunit = dy * gain
    dx = scale[:, None] * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
    return dx, np.sum(dy * unit, axis=0)


def _rms_norm_forward_numba(x, gain, eps=1e-6):
    check_shapes("rms_norm_forward", gain=(gain, x.shape[-1:]))
    y, scale = np.empty(x.shape, x.dtype), np.empty(len(x), x.dtype)
    loop = _compiled("rms_norm_forward")
    parallel_for(lambda rows: loop(x[rows], gain, x.dtype.type(eps), y[rows], scale[rows]), _row_blocks(x))
    return y, scale


def _rms_norm_backward_numba(dy, x, gain, scale):
    check_shapes("rms_norm_backward", dy=(dy, x.shape), gain=(gain, x.shape[-1:]), scale=(scale, x.shape[:1]))
    dx, parts = np.empty(x.shape, x.dtype), _parts(len(x))
    dgain = np.zeros((len(parts), len(gain)), x.dtype)
    loop = _compiled("rms_norm_backward")

    def job(part):
        rows = parts[part]
        loop(dy[rows], x[rows], gain, scale[rows], dx[rows], dgain[part])

    parallel_for(job, range(len(parts)))
    return dx, dgain.sum(axis=0)


def _gelu_forward_numpy(x):
    """y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise. Hendrycks & Gimpel 2016, tanh form. x: (N,)."""
    y = np.empty_like(x)
    for block in blocks(len(x), BLOCK // 2):  # temporaries stay in the cache
        some = x[block]
        y[block] = 0.5 * some * (1 + np.tanh(SLOPE * (some + CUBIC * some * some * some)))
    return y


def _gelu_backward_numpy(dy, x):
    """The pullback of gelu_forward. dy, x: (N,). Returns dx (N,)."""
    dx = np.empty_like(x)
    for block in blocks(len(x), BLOCK // 2):
        some = x[block]
        tanh = np.tanh(SLOPE * (some + CUBIC * some * some * some))
        dinner = SLOPE * (1 + 3 * CUBIC * some * some)
        dx[block] = dy[block] * (0.5 * (1 + tanh) + 0.5 * some * (1 - tanh * tanh) * dinner)
    return dx


def _gelu_forward_numba(x):
    y, loop = np.empty_like(x), _compiled("gelu_forward")
    parallel_for(lambda block: loop(x[block], y[block]), blocks(len(x), 4 * BLOCK))
    return y


def _gelu_backward_numba(dy, x):
    check_shapes("gelu_backward", dy=(dy, x.shape))
    dx, loop = np.empty_like(x), _compiled("gelu_backward")
    parallel_for(lambda block: loop(dy[block], x[block], dx[block]), blocks(len(x), 4 * BLOCK))
    return dx


def _scatter_add_numpy(rows, places, count):
    """out[places[i]] += rows[i], the pullback of rows = table[places].

    rows: (N, d); places: (N,) integers below count. Returns out (count, d). A place's rows are added in their order.
    """
    _check_places(rows, places, count)
    out = np.zeros((count, rows.shape[1]), rows.dtype)
    if len(rows):
        # rows of one place are brought together and summed at once: np.add.at would go one row at a time
        order = np.argsort(places, kind="stable")
        used, starts = np.unique(places[order], return_index=True)
        out[used] = np.add.reduceat(rows[order], starts, axis=0)
    return out


def _scatter_add_numba(rows, places, count):
    _check_places(rows, places, count)
    places = np.ascontiguousarray(places, np.int64)
    out, loop = np.zeros((count, rows.shape[1]), rows.dtype), _compiled("scatter_add")
    # each thread has columns of its own: every place's rows are added in one order
    columns = blocks(rows.shape[1], max(16, -(-rows.shape[1] // 8)))
    parallel_for(lambda some: loop(rows[:, some], places, out[:, some]), columns)
    return out


def _check_places(rows, places, count):
    check_shapes("scatter_add", places=(places, rows.shape[:1]))
    if len(places) and (places.min() < 0 or places.max() >= count):
        raise UserError(f"scatter_add: places run from {places.min()} to {places.max()}, outside 0 … {count - 1}")


def _adamw_numpy(p, g, m, v, *, lr, betas, eps, decay, step):
    """One step of AdamW in place, of one array. Loshchilov & Hutter 2019; g as its gradient, m and v its moments.

    m = β₁ m + (1 − β₁) g; v = β₂ v + (1 − β₂) g²; p = (1 − lr · decay) p − lr · m̂ / (√v̂ + ε), where m̂ and v̂ are
    m / (1 − β₁^step) and v / (1 − β₂^step).
    """
    (first, second), (rate, correction) = betas, _adamw_rates(lr, betas, step)
    m *= first
    m += (1 - first) * g
    v *= second
    v += (1 - second) * (g * g)
    p *= 1 - lr * decay
    denominator = np.sqrt(v)
    denominator *= correction
    denominator += eps
    p -= rate * m / denominator


def _adamw_numba(p, g, m, v, *, lr, betas, eps, decay, step):
    check_shapes("adamw_step", g=(g, p.shape), m=(m, p.shape), v=(v, p.shape))
    if not all(array.flags.c_contiguous for array in (p, g, m, v)):
        return _adamw_numpy(p, g, m, v, lr=lr, betas=betas, eps=eps, decay=decay, step=step)
    loop, kind = _compiled("adamw"), p.dtype.type
    numbers = [kind(number) for number in (*betas, *_adamw_rates(lr, betas, step), 1 - lr * decay, eps)]
    flat = [array.reshape(-1) for array in (p, g, m, v)]
    parallel_for(lambda block: loop(*(array[block] for array in flat), *numbers), blocks(p.size, 4 * BLOCK))


def _adamw_rates(lr, betas, step):
    """The learning rate over 1 − β₁^step, and what √v is multiplied by for √v̂."""
    return lr / (1 - betas[0] ** step), 1 / np.sqrt(1 - betas[1] ** step)


def _add_layer_norm_numpy(x, bias, residual, gain, shift, eps):
    """x = (y − mean) / √(variance + eps) · gain + shift, y = x + bias + residual, over the last axis. Ba et al. 2016.

    x, residual: (rows, d); bias, gain, shift: (d,). x is overwritten.
    """
    x += bias
    x += residual
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    x *= 1 / np.sqrt(variance + x.dtype.type(eps))
    x *= gain
    x += shift


def _add_layer_norm_numba(x, bias, residual, gain, shift, eps):
    row = x.shape[-1:]
    check_shapes("add_layer_norm", bias=(bias, row), residual=(residual, x.shape), gain=(gain, row), shift=(shift, row))
    loop, eps = _compiled("add_layer_norm"), x.dtype.type(eps)
    parallel_for(lambda rows: loop(x[rows], bias, residual[rows], gain, shift, eps), _row_blocks(x))


def _add_gelu_erf_numpy(x, bias):
    """x = y/2 · (1 + erf(y / √2)), y = x + bias. x: (rows, d) float32, overwritten; bias: (d,)."""
    for rows in _row_blocks(x):
        some = x[rows]
        some += bias
        gate = erf(some * np.float32(2**-0.5))
        gate += 1
        gate *= 0.5
        some *= gate


def _add_gelu_erf_numba(x, bias):
    check_shapes("add_gelu_erf", bias=(bias, x.shape[-1:]))
    loop = _compiled("add_gelu_erf")
    parallel_for(lambda rows: loop(x[rows], bias), _row_blocks(x))


# erf(x) ≈ x P(x²) / Q(x²) on [−4, 4], constant beyond: the rational approximation of the Eigen library, highest power
# first. A test holds it to math.erf within 5e-7.
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x):
    """The error function, elementwise, in float32 throughout (NumPy has none)."""
    x = np.clip(x, -4, 4)
    square = x * x
    above = _polynomial(ERF_P, square)
    above *= x
    above /= _polynomial(ERF_Q, square)
    return above


def _polynomial(coefficients, x):
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += x.dtype.type(coefficient)
    return value


rms_norm_forward = kernel(
    "rms_norm_forward", numpy=_rms_norm_forward_numpy, numba=_rms_norm_forward_numba, one_type=True
)
rms_norm_backward = kernel(
    "rms_norm_backward", numpy=_rms_norm_backward_numpy, numba=_rms_norm_backward_numba, one_type=True
)
gelu_forward = kernel("gelu_forward", numpy=_gelu_forward_numpy, numba=_gelu_forward_numba, one_type=True)
gelu_backward = kernel("gelu_backward", numpy=_gelu_backward_numpy, numba=_gelu_backward_numba, one_type=True)
scatter_add = kernel("scatter_add", numpy=_scatter_add_numpy, numba=_scatter_add_numba, one_type=True)
add_layer_norm = kernel("add_layer_norm", numpy=_add_layer_norm_numpy, numba=_add_layer_norm_numba, one_type=True)
add_gelu_erf = kernel("add_gelu_erf", numpy=_add_gelu_erf_numpy, numba=_add_gelu_erf_numba, one_type=True)
adamw_step = kernel("adamw_step", numpy=_adamw_numpy, numba=_adamw_numba, one_type=True)


def _row_blocks(x):
    return blocks(len(x), max(1, BLOCK // max(1, x.shape[1])))


def _parts(rows):
    return blocks(rows, max(64, -(-rows // PARTS)))


@functools.cache
def _compiled(name):
    return getattr(importlib.import_module("retro_np.kernels.rowwise_numba"), name)
