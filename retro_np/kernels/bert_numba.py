"""The steps of bert.py in Numba, a block of rows at a time."""

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels.bert import ERF_P, ERF_Q
from retro_np.kernels.jit import jit
from retro_np.kernels.rowwise import row_blocks
from retro_np.kernels.rowwise_numba import polynomial
from retro_np.kernels.threads import parallel_for


def add_layer_norm(x: Array, bias: Array, residual: Array, gain: Array, shift: Array, eps: float) -> None:
    """Like retro_np.kernels.bert.add_layer_norm."""
    eps = x.dtype.type(float(eps))
    parallel_for(lambda rows: _add_layer_norm(x[rows], bias, residual[rows], gain, shift, eps), row_blocks(x))


def add_gelu_erf(x: Array, bias: Array) -> None:
    """Like retro_np.kernels.bert.add_gelu_erf."""
    parallel_for(lambda rows: _add_gelu_erf(x[rows], bias), row_blocks(x))


@jit
def _add_layer_norm(x: Array, bias: Array, residual: Array, gain: Array, shift: Array, eps: float) -> None:
    rows, d = x.shape
    one, width = x.dtype.type(1), x.dtype.type(d)
    for i in range(rows):
        mean = x.dtype.type(0)
        for t in range(d):
            x[i, t] += bias[t] + residual[i, t]
            mean += x[i, t]
        mean /= width
        square = x.dtype.type(0)
        for t in range(d):
            x[i, t] -= mean
            square += x[i, t] * x[i, t]
        factor = one / np.sqrt(square / width + eps)
        for t in range(d):
            x[i, t] = x[i, t] * factor * gain[t] + shift[t]


@jit
def _add_gelu_erf(x: Array, bias: Array) -> None:
    half, one, root = np.float32(0.5), np.float32(1), np.float32(0.7071067811865476)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            value = x[i, t] + bias[t]
            clipped = min(max(value * root, np.float32(-4)), np.float32(4))
            square = clipped * clipped
            erf = clipped * polynomial(ERF_P, square) / polynomial(ERF_Q, square)
            x[i, t] = half * value * (one + erf)
