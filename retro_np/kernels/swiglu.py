"""SwiGLU, the gated activation of Llama's feed-forward blocks, in float32 or float64. Shazeer 2020."""

import numpy as np

from retro_np.kernels import Array, kernel
from retro_np.kernels.rowwise import BLOCK_ENTRIES
from retro_np.kernels.threads import blocks


def _swiglu_forward(gate: Array, up: Array) -> Array:
    """y = gate · σ(gate) · up, elementwise, σ the logistic function. Shazeer 2020. gate, up: (N,). Returns y (N,)."""
    y = np.empty_like(gate)
    for block in blocks(len(gate), BLOCK_ENTRIES // 2):
        y[block] = gate[block] * _sigmoid(gate[block]) * up[block]
    return y


def _swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """The pullback of swiglu_forward. dy, gate, up: (N,). Returns dgate and dup, (N,) each."""
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    for block in blocks(len(gate), BLOCK_ENTRIES // 2):
        sigmoid = _sigmoid(gate[block])
        dup[block] = dy[block] * (gate[block] * sigmoid)
        dgate[block] = dy[block] * up[block] * (sigmoid * (1 + gate[block] * (1 - sigmoid)))
    return dgate, dup


def _sigmoid(x: Array) -> Array:
    """σ(x) = 1 / (1 + exp(−x)), without overflow."""
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x < 0, small, 1) / (1 + small))


swiglu_forward = kernel("swiglu_forward", numpy=_swiglu_forward, numba=True, arrays={"gate": "f N", "up": "f N"})
_ARRAYS = {"gate": "f N", "dy": "f N", "up": "f N"}
swiglu_backward = kernel("swiglu_backward", numpy=_swiglu_backward, numba=True, arrays=_ARRAYS)
