"""Loops over rows and entries: RMSNorm, GELU, scatter-add and AdamW, in float32 or float64.
In NumPy each step of such a loop passes through memory once more, and its temporaries are as large as the input. Numba
does all steps in one pass (rowwise_numba.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, kernel
from retro_np.kernels.threads import blocks

BLOCK_ENTRIES = 32768  # What a block reads and writes fits into the second-level cache.
GELU_SLOPE, GELU_CUBIC = float(np.sqrt(2 / np.pi)), 0.044715  # the tanh form
GELU_END = 16  # From here on tanh is exactly 1, and powers of x, which could overflow, are not needed.


def _rms_norm_forward(x: Array, gain: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """y = gain · x · scale, scale = 1 / √(mean(x²) + eps), over the last axis. Zhang & Sennrich 2019.
    x: (rows, d); gain: (d,). Returns y (rows, d) and scale (rows,), which the backward pass needs."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(float(eps)))
    return gain * (x * scale), scale[:, 0]


def _rms_norm_backward(dy: Array, x: Array, gain: Array, scale: Array) -> tuple[Array, Array]:
    """The pullback of rms_norm_forward. dy, x: (rows, d). Returns dx (rows, d) and dgain (d,)."""
    unit = x * scale[:, None]
    dunit = dy * gain
    dx = scale[:, None] * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
    return dx, np.sum(dy * unit, axis=0)


def _gelu_forward(x: Array) -> Array:
    """y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise. Hendrycks & Gimpel 2016, tanh form. x: (N,)."""
    y = np.empty_like(x)
    for block in blocks(len(x), BLOCK_ENTRIES // 2):  # the temporaries stay in the cache
        part, near = x[block], np.clip(x[block], -GELU_END, GELU_END)
        y[block] = 0.5 * part * (1 + np.tanh(GELU_SLOPE * (near + GELU_CUBIC * near * near * near)))
    return y


def _gelu_backward(dy: Array, x: Array) -> Array:
    """The pullback of gelu_forward. dy, x: (N,). Returns dx (N,)."""
    dx = np.empty_like(x)
    for block in blocks(len(x), BLOCK_ENTRIES // 2):
        near = np.clip(x[block], -GELU_END, GELU_END)
        tanh = np.tanh(GELU_SLOPE * (near + GELU_CUBIC * near * near * near))
        dinner = GELU_SLOPE * (1 + 3 * GELU_CUBIC * near * near)
        dx[block] = dy[block] * (0.5 * (1 + tanh) + 0.5 * near * (1 - tanh * tanh) * dinner)
    return dx


def polynomial(coefficients: tuple[Any, ...], x: Any) -> Any:
    """The polynomial with these coefficients, highest power first, at x. Numba compiles it for its loops."""
    value = coefficients[0] * x
    for k in range(1, len(coefficients) - 1):
        value += coefficients[k]
        value *= x
    return value + coefficients[-1]


def _scatter_add(rows: Array, indices: Array, count: int) -> Array:
    """out[indices[i]] += rows[i], the pullback of rows = table[indices].
    rows: (N, d); indices: (N,) integers below count. Returns out (count, d). Rows of one index are added in order.
    Raises UserError for an index outside the table."""
    out = np.zeros((count, rows.shape[1]), rows.dtype)
    np.add.at(out, indices, rows)
    return out


def _checked_indices(rows: Array, indices: Array, count: int) -> tuple[Array, Array, int]:
    """The arguments. Raises UserError unless all indices are from 0 to count − 1."""
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise UserError(f"scatter_add: indices run from {indices.min()} to {indices.max()}, outside 0 … {count - 1}")
    return rows, indices, count


def _adamw(
    p: Array, g: Array, m: Array, v: Array, *,
    lr: float, betas: tuple[float, float], eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """One step of AdamW on one array, in place. g: the gradient; m, v: the moments. Loshchilov & Hutter 2019.
    m = β₁ m + (1 − β₁) g; v = β₂ v + (1 − β₂) g²; p = (1 − lr · decay) p − lr · m̂ / (√v̂ + ε), where m̂ and v̂ are
    m / (1 − β₁^step) and v / (1 − β₂^step)."""
    beta1, beta2, rate, correction, keep, eps = adamw_numbers(lr, betas, eps, decay, step)
    m *= beta1
    m += (1 - beta1) * g
    v *= beta2
    v += (1 - beta2) * (g * g)
    p *= keep
    denominator = np.sqrt(v)
    denominator *= correction
    denominator += eps
    p -= rate * m / denominator


def adamw_numbers(lr: float, betas: tuple[float, float], eps: float, decay: float, step: int) -> tuple[float, ...]:
    """β₁, β₂, lr / (1 − β₁^step), the factor that turns √v into √v̂, 1 − lr · decay, and ε. Raises UserError."""
    if not (step >= 1 and all(0 <= beta < 1 for beta in betas)):
        raise UserError(f"adamw_step: step must be at least 1 and betas in [0, 1), not {step!r} and {betas!r}")
    rate, correction = lr / (1 - betas[0] ** step), 1 / np.sqrt(1 - betas[1] ** step)
    return *betas, rate, correction, 1 - lr * decay, float(eps)


def row_blocks(x: Array) -> list[slice]:
    """Blocks of rows that fit into the second-level cache."""
    return blocks(len(x), max(1, BLOCK_ENTRIES // max(1, x.shape[1])))


def _rowwise(name: str, numpy: Callable[..., Any], check: Any = None, **arrays: str) -> Callable[..., Any]:
    return kernel(name, numpy=numpy, numba=True, arrays=arrays, check=check)


rms_norm_forward = _rowwise("rms_norm_forward", _rms_norm_forward, x="f Nd", gain="f d")
rms_norm_backward = _rowwise("rms_norm_backward", _rms_norm_backward, x="f Nd", dy="f Nd", gain="f d", scale="f N")
gelu_forward = _rowwise("gelu_forward", _gelu_forward, x="f N")
gelu_backward = _rowwise("gelu_backward", _gelu_backward, x="f N", dy="f N")
scatter_add = _rowwise("scatter_add", _scatter_add, _checked_indices, rows="f Nd", indices="iu N")
adamw_step = _rowwise("adamw_step", _adamw, g="f *", **dict.fromkeys("pmv", "f *!"))
