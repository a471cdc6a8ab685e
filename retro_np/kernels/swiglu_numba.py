"""The loops of swiglu.py in Numba."""

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels.jit import jit
from retro_np.kernels.rowwise import BLOCK_ENTRIES
from retro_np.kernels.rowwise_numba import _tanh as tanh
from retro_np.kernels.threads import blocks, parallel_for


def swiglu_forward(gate: Array, up: Array) -> Array:
    """Like retro_np.kernels.swiglu.swiglu_forward."""
    y = np.empty_like(gate)
    parts = blocks(len(gate), 4 * BLOCK_ENTRIES)
    parallel_for(lambda block: _swiglu_forward(gate[block], up[block], y[block]), parts)
    return y


def swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Like retro_np.kernels.swiglu.swiglu_backward."""
    arrays = dy, gate, up, np.empty_like(gate), np.empty_like(up)
    parts = blocks(len(gate), 4 * BLOCK_ENTRIES)
    parallel_for(lambda block: _swiglu_backward(*(array[block] for array in arrays)), parts)
    return arrays[3], arrays[4]


@jit
def _swiglu_forward(gate: Array, up: Array, y: Array) -> None:
    half, one = gate.dtype.type(0.5), gate.dtype.type(1)
    for i in range(len(gate)):
        sigmoid = half * (one + tanh(half * gate[i]))
        y[i] = gate[i] * sigmoid * up[i]


@jit
def _swiglu_backward(dy: Array, gate: Array, up: Array, dgate: Array, dup: Array) -> None:
    half, one = gate.dtype.type(0.5), gate.dtype.type(1)
    for i in range(len(gate)):
        sigmoid = half * (one + tanh(half * gate[i]))
        dup[i] = dy[i] * (gate[i] * sigmoid)
        dgate[i] = dy[i] * up[i] * (sigmoid * (one + gate[i] * (one - sigmoid)))
