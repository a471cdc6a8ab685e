"""The elementwise steps of the frozen BERT: residual and LayerNorm, bias and GELU by the error function, in place."""

import numpy as np

from retro_np.kernels import Array, kernel
from retro_np.kernels.rowwise import polynomial, row_blocks


def _add_layer_norm(x: Array, bias: Array, residual: Array, gain: Array, shift: Array, eps: float) -> None:
    """x = (y − mean) / √(variance + eps) · gain + shift, y = x + bias + residual, over the last axis. Ba et al. 2016.

    x, residual: (rows, d); bias, gain, shift: (d,). x is overwritten."""
    x += bias
    x += residual
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    x *= 1 / np.sqrt(variance + x.dtype.type(float(eps)))
    x *= gain
    x += shift


def _add_gelu_erf(x: Array, bias: Array) -> None:
    """x = y/2 · (1 + erf(y / √2)), y = x + bias. x: (rows, d) float32, overwritten; bias: (d,)."""
    for block in row_blocks(x):
        part = x[block]
        part += bias
        gate = erf(part * np.float32(2**-0.5))
        gate += 1
        gate *= 0.5
        part *= gate


# erf(x) ≈ x P(x²) / Q(x²) on [−4, 4], and constant beyond, to 5e-7: from the Eigen library, highest power first.
ERF_P = tuple(map(np.float32, (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)))  # fmt: skip
ERF_Q = tuple(map(np.float32, (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)))  # fmt: skip


def erf(x: Array) -> Array:
    """The error function, elementwise, in float32. NumPy does not have one."""
    x = np.clip(x, -4, 4)
    square = x * x
    return np.asarray(x * polynomial(ERF_P, square) / polynomial(ERF_Q, square))


_NORM = {"x": "f Nd!", "bias": "f d", "residual": "f Nd", "gain": "f d", "shift": "f d"}
add_layer_norm = kernel("add_layer_norm", numpy=_add_layer_norm, numba=True, arrays=_NORM)
_GELU = {"x": "f Nd!", "bias": "f d"}
add_gelu_erf = kernel("add_gelu_erf", numpy=_add_gelu_erf, numba=True, arrays=_GELU)
