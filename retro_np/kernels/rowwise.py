"""Loops over rows and entries: RMSNorm, LayerNorm, GELU, scatter-add and AdamW, in float32 or float64.

In NumPy each step of such a loop passes through memory once more, and its temporaries are as large as the input. Numba
does all steps in one pass (rowwise_numba.py).
"""

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, check_shapes, kernel
from retro_np.kernels.threads import blocks

BLOCK_ENTRIES = 32768  # What a block reads and writes fits into the second-level cache.
GELU_SLOPE, GELU_CUBIC = float(np.sqrt(2 / np.pi)), 0.044715  # the tanh form


def _rms_norm_forward(x: Array, gain: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """y = gain · x · scale, scale = 1 / √(mean(x²) + eps), over the last axis. Zhang & Sennrich 2019.

    x: (rows, d); gain: (d,). Returns y (rows, d) and scale (rows,), which the backward pass needs.
    """
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
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
        part = x[block]
        y[block] = 0.5 * part * (1 + np.tanh(GELU_SLOPE * (part + GELU_CUBIC * part * part * part)))
    return y


def _gelu_backward(dy: Array, x: Array) -> Array:
    """The pullback of gelu_forward. dy, x: (N,). Returns dx (N,)."""
    dx = np.empty_like(x)
    for block in blocks(len(x), BLOCK_ENTRIES // 2):
        part = x[block]
        tanh = np.tanh(GELU_SLOPE * (part + GELU_CUBIC * part * part * part))
        dinner = GELU_SLOPE * (1 + 3 * GELU_CUBIC * part * part)
        dx[block] = dy[block] * (0.5 * (1 + tanh) + 0.5 * part * (1 - tanh * tanh) * dinner)
    return dx


def _scatter_add(rows: Array, indices: Array, count: int) -> Array:
    """out[indices[i]] += rows[i], the pullback of rows = table[indices].

    rows: (N, d); indices: (N,) integers below count. Returns out (count, d). Rows of one index are added in order.
    Raises UserError for an index outside the table.
    """
    check_indices(rows, indices, count)
    out = np.zeros((count, rows.shape[1]), rows.dtype)
    if len(rows):
        # Rows with equal indices are brought together and summed in one call; np.add.at would add one row at a time.
        order = np.argsort(indices, kind="stable")
        used, starts = np.unique(indices[order], return_index=True)
        out[used] = np.add.reduceat(rows[order], starts, axis=0)
    return out


def check_indices(rows: Array, indices: Array, count: int) -> None:
    """Raise UserError unless there is one index per row, from 0 to count − 1."""
    check_shapes("scatter_add", indices=(indices, rows.shape[:1]))
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise UserError(f"scatter_add: indices run from {indices.min()} to {indices.max()}, outside 0 … {count - 1}")


def _adamw(
    p: Array, g: Array, m: Array, v: Array, *,
    lr: float, betas: tuple[float, float], eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """One step of AdamW on one array, in place. g: the gradient; m, v: the moments. Loshchilov & Hutter 2019.

    m = β₁ m + (1 − β₁) g; v = β₂ v + (1 − β₂) g²; p = (1 − lr · decay) p − lr · m̂ / (√v̂ + ε), where m̂ and v̂ are
    m / (1 − β₁^step) and v / (1 − β₂^step).
    """
    (beta1, beta2), (rate, correction) = betas, adamw_rates(lr, betas, step)
    m *= beta1
    m += (1 - beta1) * g
    v *= beta2
    v += (1 - beta2) * (g * g)
    p *= 1 - lr * decay
    denominator = np.sqrt(v)
    denominator *= correction
    denominator += eps
    p -= rate * m / denominator


def adamw_rates(lr: float, betas: tuple[float, float], step: int) -> tuple[float, float]:
    """lr / (1 − β₁^step), and the factor that turns √v into √v̂."""
    return lr / (1 - betas[0] ** step), 1 / np.sqrt(1 - betas[1] ** step)


def row_blocks(x: Array) -> list[slice]:
    """Blocks of rows that fit into the second-level cache."""
    return blocks(len(x), max(1, BLOCK_ENTRIES // max(1, x.shape[1])))


_NUMBA = "retro_np.kernels.rowwise_numba:"
rms_norm_forward = kernel("rms_norm_forward", numpy=_rms_norm_forward, numba=f"{_NUMBA}rms_norm_forward", one_type=True)
rms_norm_backward = kernel(
    "rms_norm_backward", numpy=_rms_norm_backward, numba=f"{_NUMBA}rms_norm_backward", one_type=True
)
gelu_forward = kernel("gelu_forward", numpy=_gelu_forward, numba=f"{_NUMBA}gelu_forward", one_type=True)
gelu_backward = kernel("gelu_backward", numpy=_gelu_backward, numba=f"{_NUMBA}gelu_backward", one_type=True)
scatter_add = kernel("scatter_add", numpy=_scatter_add, numba=f"{_NUMBA}scatter_add", one_type=True)
adamw_step = kernel("adamw_step", numpy=_adamw, numba=f"{_NUMBA}adamw_step", one_type=True)
