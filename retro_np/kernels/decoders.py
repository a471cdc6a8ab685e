"""The loops of decoders that others trained: their norms, SwiGLU and rotary positions, in float32 or float64."""

from collections.abc import Callable
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, c_extension, kernel
from retro_np.kernels.attention import Maybe, contiguous
from retro_np.kernels.rowwise import BLOCK_ENTRIES
from retro_np.kernels.threads import blocks, parallel_for

MAX_NORM_PARTS, MIN_NORM_ROWS = 16, 64  # The backward pass sums over at most 16 parts of at least 64 rows each.


def _norm_forward(x: Array, gain: Array, bias: Maybe, eps: float) -> Array:
    """y = gain · u + bias, u = (x − mean) · scale, scale = 1 / √(mean((x − mean)²) + eps), over the last axis.
    This is LayerNorm (Ba et al. 2016). Without a bias, 0 stands for the mean: RMSNorm (Zhang & Sennrich 2019).
    x: (N, d); gain, bias: (d,). Returns y (N, d)."""
    y: Array = gain * _normalised(x, bias, eps)[0]
    return y if bias is None else y + bias


def _norm_backward(dy: Array, x: Array, gain: Array, bias: Maybe, eps: float) -> tuple[Array, Array, Maybe]:
    """The pullback of norm_forward. dy, x: (N, d). Returns dx (N, d), dgain (d,) and dbias (d,) or None."""
    unit, scale = _normalised(x, bias, eps)
    dunit = dy * gain
    dx = scale * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
    if bias is None:
        return dx, np.sum(dy * unit, axis=0), None
    return dx - dx.mean(axis=-1, keepdims=True), np.sum(dy * unit, axis=0), dy.sum(axis=0)


def _normalised(x: Array, bias: Maybe, eps: float) -> tuple[Array, Array]:
    """(x − mean) · scale, and scale (N, 1)."""
    centred = x if bias is None else x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + x.dtype.type(float(eps)))
    return centred * scale, scale


def _swiglu_forward(gate: Array, up: Array) -> Array:
    """y = gate · σ(gate) · up, elementwise, σ the logistic function. Shazeer 2020. gate, up: (N,). Returns y (N,)."""
    y = np.empty_like(gate)
    for block in blocks(len(gate), BLOCK_ENTRIES // 2):
        y[block] = gate[block] * _logistic(gate[block])[0] * up[block]
    return y


def _swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """The pullback of swiglu_forward. dy, gate, up: (N,). Returns dgate and dup, (N,) each."""
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    for block in blocks(len(gate), BLOCK_ENTRIES // 2):
        sigmoid, rest = _logistic(gate[block])
        dup[block] = dy[block] * (gate[block] * sigmoid)
        dgate[block] = dy[block] * up[block] * (sigmoid * (1 + gate[block] * rest))
    return dgate, dup


def _logistic(x: Array) -> tuple[Array, Array]:
    """σ(x) = 1 / (1 + exp(−x)) and σ(−x) = 1 − σ(x), without overflow or cancellation."""
    small = np.exp(-np.abs(x))
    larger = 1 / (1 + small)
    smaller = small * larger
    return np.where(x < 0, smaller, larger), np.where(x < 0, larger, smaller)


def _rotary(x: Array, cos: Array, sin: Array) -> Array:
    """y: each pair (a, b) turned by an angle, (a cos − b sin, b cos + a sin). Su et al. 2021. Its pullback has −sin.
    x: (N, h, 2, d), a and b beside each other on the third axis; cos, sin: (T, d), for row i mod T. Returns y like x.
    Raises UserError unless N is a multiple of T."""
    y, turns = np.empty(x.shape, x.dtype), (len(x) // len(cos), len(cos), *x.shape[1:])
    (a, b), turned = (np.moveaxis(array.reshape(turns), 3, 0) for array in (x, y))
    turned[0], turned[1] = a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]
    return y


def _whole_turns(x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
    if len(cos) == 0 or len(x) % len(cos) or x.shape[2] != 2:
        raise UserError(f"rotary: x has shape {x.shape}; it must be pairs, (N, h, 2, d), N a multiple of {len(cos)}")
    return x, cos, sin


def _norm_forward_c(x: Array, gain: Array, bias: Maybe, eps: float) -> Array:
    y = np.empty(x.shape, x.dtype)
    arguments = *contiguous(x, gain, bias), float(eps), y
    _in_blocks(c_extension().norm_forward, arguments, len(x), max(1, BLOCK_ENTRIES // max(1, x.shape[1])))
    return y


def _norm_backward_c(dy: Array, x: Array, gain: Array, bias: Maybe, eps: float) -> tuple[Array, Array, Maybe]:
    parts = max(1, min(MAX_NORM_PARTS, len(x) // MIN_NORM_ROWS))
    dx, dgain = np.empty(x.shape, x.dtype), np.empty((parts, len(gain)), x.dtype)
    dbias = None if bias is None else np.empty_like(dgain)
    arguments = *contiguous(dy, x, gain, bias), float(eps), dx, dgain, dbias
    _in_blocks(c_extension().norm_backward, arguments, parts, 1)
    return dx, dgain.sum(axis=0), None if dbias is None else dbias.sum(axis=0)


def _swiglu_forward_c(gate: Array, up: Array) -> Array:
    y = np.empty(gate.shape, gate.dtype)
    _in_blocks(c_extension().swiglu_forward, (*contiguous(gate, up), y), len(y), BLOCK_ENTRIES)
    return y


def _swiglu_backward_c(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    dgate, dup = np.empty(gate.shape, gate.dtype), np.empty(up.shape, up.dtype)
    _in_blocks(c_extension().swiglu_backward, (*contiguous(dy, gate, up), dgate, dup), len(dup), BLOCK_ENTRIES)
    return dgate, dup


def _rotary_c(x: Array, cos: Array, sin: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    size = max(1, BLOCK_ENTRIES // max(1, x[:1].size))
    _in_blocks(c_extension().rotary, (*contiguous(x, cos, sin), y), len(x), size)
    return y


def _in_blocks(run: Callable[..., None], arguments: tuple[Any, ...], length: int, size: int) -> None:
    """Run a compiled function for 0 … length, in blocks of `size` that the threads share."""
    if length <= size:  # a decoded token: what threads and blocks cost would be half of the call
        return run(*arguments, 0, length)
    parallel_for(lambda block: run(*arguments, block.start, block.stop), blocks(length, size))


_NORM, _SWIGLU = {"x": "f Nd", "gain": "f d", "bias": "f d?"}, {"gate": "f N", "up": "f N"}
norm_forward = kernel("norm_forward", numpy=_norm_forward, c=_norm_forward_c, arrays=_NORM)
swiglu_forward = kernel("swiglu_forward", numpy=_swiglu_forward, c=_swiglu_forward_c, arrays=_SWIGLU)
_ROTARY = {"x": "f Nhpd", "cos": "f Td", "sin": "f Td"}
rotary = kernel("rotary", numpy=_rotary, c=_rotary_c, arrays=_ROTARY, check=_whole_turns)
_NORM, _SWIGLU = {"dy": "f Nd"} | _NORM, {"dy": "f N"} | _SWIGLU
norm_backward = kernel("norm_backward", numpy=_norm_backward, c=_norm_backward_c, arrays=_NORM)
swiglu_backward = kernel("swiglu_backward", numpy=_swiglu_backward, c=_swiglu_backward_c, arrays=_SWIGLU)
