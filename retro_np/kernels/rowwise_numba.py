"""The loops of rowwise.py in Numba: each does all its steps in one pass, a block of rows at a time."""

import math
from typing import Any

import numba
import numpy as np

from retro_np.kernels import Array, rowwise
from retro_np.kernels.jit import jit
from retro_np.kernels.rowwise import BLOCK_ENTRIES, GELU_CUBIC, GELU_END, GELU_SLOPE, adamw_numbers, row_blocks
from retro_np.kernels.threads import blocks, parallel_for

MAX_PARTIAL_SUMS, MIN_ROWS_PER_SUM = 16, 64  # Sums over rows are taken in parts; a part's rows are summed in order.


def rms_norm_forward(x: Array, gain: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """Like retro_np.kernels.rowwise.rms_norm_forward."""
    y, scale, eps = np.empty(x.shape, x.dtype), np.empty(len(x), x.dtype), x.dtype.type(float(eps))
    parallel_for(lambda rows: _rms_norm_forward(x[rows], gain, eps, y[rows], scale[rows]), row_blocks(x))
    return y, scale


def rms_norm_backward(dy: Array, x: Array, gain: Array, scale: Array) -> tuple[Array, Array]:
    """Like retro_np.kernels.rowwise.rms_norm_backward."""
    parts = blocks(len(x), max(MIN_ROWS_PER_SUM, -(-len(x) // MAX_PARTIAL_SUMS)))
    dx, dgain = np.empty(x.shape, x.dtype), np.zeros((len(parts), len(gain)), x.dtype)

    def job(part: int) -> None:
        rows = parts[part]
        _rms_norm_backward(dy[rows], x[rows], gain, scale[rows], dx[rows], dgain[part])

    parallel_for(job, range(len(parts)))
    return dx, dgain.sum(axis=0)


def gelu_forward(x: Array) -> Array:
    """Like retro_np.kernels.rowwise.gelu_forward."""
    y = np.empty_like(x)
    parallel_for(lambda block: _gelu_forward(x[block], y[block]), blocks(len(x), 4 * BLOCK_ENTRIES))
    return y


def gelu_backward(dy: Array, x: Array) -> Array:
    """Like retro_np.kernels.rowwise.gelu_backward."""
    dx = np.empty_like(x)
    parallel_for(lambda block: _gelu_backward(dy[block], x[block], dx[block]), blocks(len(x), 4 * BLOCK_ENTRIES))
    return dx


def scatter_add(rows: Array, indices: Array, count: int) -> Array:
    """Like retro_np.kernels.rowwise.scatter_add."""
    indices, out = np.ascontiguousarray(indices, np.int64), np.zeros((count, rows.shape[1]), rows.dtype)
    # Each job has its own columns, so the rows of one index are added in order.
    columns = blocks(rows.shape[1], max(16, -(-rows.shape[1] // 8)))
    parallel_for(lambda block: _scatter_add(rows[:, block], indices, out[:, block]), columns)
    return out


def adamw_step(p: Array, g: Array, m: Array, v: Array, **options: Any) -> None:
    """Like retro_np.kernels.rowwise.adamw_step."""
    if not all(array.flags.c_contiguous for array in (p, g, m, v)):
        return rowwise._adamw(p, g, m, v, **options)
    numbers = [p.dtype.type(number) for number in adamw_numbers(**options)]
    flat = [array.reshape(-1) for array in (p, g, m, v)]
    parallel_for(lambda block: _adamw(*(array[block] for array in flat), *numbers), blocks(p.size, 4 * BLOCK_ENTRIES))


@jit
def _rms_norm_forward(x: Array, gain: Array, eps: float, y: Array, scale: Array) -> None:
    rows, d = x.shape
    for i in range(rows):
        square = np.float64(0)  # Float64 for any dtype: rows near zero, and their roundings, grow a thousandfold.
        for t in range(d):
            square += np.float64(x[i, t]) * x[i, t]
        factor = 1 / np.sqrt(square / d + eps)
        scale[i] = factor
        for t in range(d):
            y[i, t] = gain[t] * (x[i, t] * factor)


@jit
def _rms_norm_backward(dy: Array, x: Array, gain: Array, scale: Array, dx: Array, dgain: Array) -> None:
    rows, d = x.shape
    width = x.dtype.type(d)
    for i in range(rows):
        factor = scale[i]
        along = x.dtype.type(0)
        for t in range(d):
            along += dy[i, t] * gain[t] * x[i, t]
        along *= factor * factor / width
        for t in range(d):
            dx[i, t] = factor * (dy[i, t] * gain[t] - x[i, t] * along)
            dgain[t] += dy[i, t] * (x[i, t] * factor)


# tanh(x) ≈ x P(x²) / Q(x²) for |x| ≤ 7.9, where tanh reaches 1 in float32: the rational approximation of the Eigen
# library, highest power first. It has no branch and no table, so the compiler can vectorise it.
TANH_P = tuple(map(np.float32, (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)))  # fmt: skip
TANH_Q = tuple(map(np.float32, (1.19825839466702e-06, 1.18534705686654e-04, 2.268434632439e-03, 4.89352518554385e-03)))
TANH_END = np.float32(7.90531110763549805)
polynomial = jit(rowwise.polynomial)


def by_type(single: Any, double: Any) -> Any:
    """A function for compiled loops: `single` of a float32, and `double` of a float64."""
    stub = lambda x: double(x)  # noqa: E731
    choose = lambda x: (lambda x: single(x)) if x is numba.float32 else (lambda x: double(x))  # noqa: E731
    numba.extending.overload(stub, strict=False)(choose)
    return stub


@jit
def _tanh32(x: np.float32) -> np.float32:
    square = min(x * x, TANH_END * TANH_END)
    if x >= TANH_END:  # exactly 1, because the pullback takes 1 − tanh²
        return np.float32(1)
    return np.float32(-1) if x <= -TANH_END else x * polynomial(TANH_P, square) / polynomial(TANH_Q, square)


_tanh = by_type(_tanh32, math.tanh)  # They differ by at most 5e-7.


@jit
def _gelu_forward(x: Array, y: Array) -> None:
    kind = x.dtype.type
    half, one, slope, cubic, end = kind(0.5), kind(1), kind(GELU_SLOPE), kind(GELU_CUBIC), kind(GELU_END)
    for i in range(len(x)):
        near = -end if x[i] < -end else end if x[i] > end else x[i]  # NaN stays NaN
        y[i] = half * x[i] * (one + _tanh(slope * (near + cubic * near * near * near)))


@jit
def _gelu_backward(dy: Array, x: Array, dx: Array) -> None:
    kind = x.dtype.type
    half, one, slope, cubic, end = kind(0.5), kind(1), kind(GELU_SLOPE), kind(GELU_CUBIC), kind(GELU_END)
    for i in range(len(x)):
        near = -end if x[i] < -end else end if x[i] > end else x[i]  # NaN stays NaN
        tanh = _tanh(slope * (near + cubic * near * near * near))
        inner = slope * (one + kind(3) * cubic * near * near)
        dx[i] = dy[i] * (half * (one + tanh) + half * near * (one - tanh * tanh) * inner)


@jit
def _scatter_add(rows: Array, indices: Array, out: Array) -> None:
    for i in range(len(rows)):
        index = indices[i]
        for t in range(rows.shape[1]):
            out[index, t] += rows[i, t]


@jit
def _adamw(
    p: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, rate: float, correction: float, decay: float,
    eps: float,
) -> None:  # fmt: skip
    one = p.dtype.type(1)
    for i in range(len(p)):
        m[i] = beta1 * m[i] + (one - beta1) * g[i]
        v[i] = beta2 * v[i] + (one - beta2) * g[i] * g[i]
        p[i] = p[i] * decay - rate * m[i] / (np.sqrt(v[i]) * correction + eps)
