"""The smallest differentiable functions: linear, RMSNorm, GELU, embedding, cross-entropy, dropout.

Each returns its value and its pullback. A pullback returns a tuple with one entry per differentiable argument."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

import zlib
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import ignore_underflow
from retro_np.kernels.rowwise import gelu_backward, gelu_forward, rms_norm_backward, rms_norm_forward, scatter_add
from retro_np.kernels.threads import blocks, parallel_for
from retro_np.tree import Array, Pullback

DropoutKey = int | tuple[int, ...] | None
ROWS_PER_BLOCK = 16  # rows of logits, V numbers each, that a thread works on at a time


@ignore_underflow
def linear(x: Array, w: Array, trainable: bool = True) -> tuple[Array, Pullback]:
    """y = x w. x: (..., d_in); w: (d_in, d_out). If w is not trainable, its gradient is None and costs nothing."""
    flat = x.reshape(-1, w.shape[0])

    def vjp(dy: Array) -> tuple[Array, Array | None]:
        dflat = dy.reshape(-1, w.shape[1])
        with np.errstate(under="ignore"):
            return (dflat @ w.T).reshape(x.shape), flat.T @ dflat if trainable else None

    return (flat @ w).reshape(*x.shape[:-1], w.shape[1]), vjp


def rms_norm(x: Array, gain: Array, eps: float = 1e-6) -> tuple[Array, Pullback]:
    """y = gain · x / rms(x), rms(x)² = mean(x²) + eps. x: (..., d); gain: (d,). Zhang & Sennrich 2019."""
    flat = x.reshape(-1, x.shape[-1])
    y, scale = rms_norm_forward(flat, gain, eps)

    def vjp(dy: Array) -> tuple[Array, Array]:
        dx, dgain = rms_norm_backward(dy.reshape(flat.shape), flat, gain, scale)
        return dx.reshape(x.shape), dgain

    return y.reshape(x.shape), vjp


def gelu(x: Array) -> tuple[Array, Pullback]:
    """y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise. Hendrycks & Gimpel 2016, tanh form."""
    flat = x.reshape(-1)

    def vjp(dy: Array) -> tuple[Array]:
        return (gelu_backward(dy.reshape(-1), flat).reshape(x.shape),)

    return gelu_forward(flat).reshape(x.shape), vjp


def embedding(table: Array, tokens: Array, trainable: bool = True) -> tuple[Array, Pullback]:
    """y = table[tokens]. table: (V, d); tokens: integers of any shape. Returns (*tokens.shape, d)."""

    def vjp(dy: Array) -> tuple[Array | None]:
        return (scatter_add(dy.reshape(-1, table.shape[1]), tokens.reshape(-1), len(table)) if trainable else None,)

    return table[tokens], vjp


def present(tokens: Array, padding_id: int | None) -> Array:
    """Whether each token is real: neither padding nor −1, which stands for padding in every vocabulary."""
    return (tokens >= 0) if padding_id is None else (tokens >= 0) & (tokens != padding_id)


@ignore_underflow
def log_softmax(logits: Array) -> Array:
    """The logarithm of the softmax over the last axis, without overflow. It has no pullback; see cross_entropy."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@ignore_underflow
def cross_entropy(logits: Array, targets: Array, padding_id: int | None = 0) -> tuple[np.floating[Any], Pullback]:
    """Mean negative log-likelihood in nats of the targets that are not padding. Paper eq. 1.

    logits: (..., V); targets: (...), integers, padding_id or −1 where there is nothing to predict.
    Returns a scalar in the dtype of the logits, which is 0 if every target is padding."""
    flat, chosen = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = present(chosen, padding_id)
    count = max(int(np.count_nonzero(counted)), 1)
    lse = np.empty(len(flat), logits.dtype)  # log Σ exp of each row; the pullback recomputes the probabilities from it

    def sum_up(rows: slice) -> None:
        peak = flat[rows].max(axis=-1)
        lse[rows] = peak + np.log(np.exp(flat[rows] - peak[:, None]).sum(axis=-1))

    parallel_for(sum_up, blocks(len(flat), ROWS_PER_BLOCK))

    @ignore_underflow
    def vjp(dloss: float) -> tuple[Array]:
        dflat = np.empty_like(flat)
        factor = counted * logits.dtype.type(dloss / count)

        def subtract(rows: slice) -> None:
            drows = dflat[rows]
            np.subtract(flat[rows], lse[rows, None], out=drows)
            np.exp(drows, out=drows)
            drows[np.arange(len(drows)), chosen[rows]] -= 1
            drows *= factor[rows, None]

        parallel_for(subtract, blocks(len(flat), ROWS_PER_BLOCK))
        return (dflat.reshape(logits.shape),)

    nats = lse - flat[np.arange(len(flat)), chosen]
    return logits.dtype.type(nats.sum(where=counted) / count), vjp


@ignore_underflow
def dropout(x: Array, rate: float, key: DropoutKey, site: str = "") -> tuple[Array, Pullback]:
    """Set a share `rate` of x to zero and scale the rest by 1 / (1 − rate). Srivastava et al. 2014.

    key: an integer of at least 0 or a tuple of them, for example (seed, step); None: nothing is dropped.
    site: the dotted path of the block. The mask depends only on key, site and x.shape. Its random numbers are
    counter-based (Philox, Salmon et al. 2011), so that a checkpoint need not store a generator's state.
    Raises UserError for any other key."""
    if key is None or rate == 0:
        return x, lambda dy: (dy,)
    entropy = [*np.atleast_1d(key).tolist(), zlib.crc32(site.encode())]
    if any(not isinstance(part, int) or part < 0 for part in entropy):
        raise UserError(f"dropout_key must be an integer of at least 0, or a tuple of them, not {key!r}")
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    mask = (random.random(x.shape, dtype=np.float32) >= rate) * x.dtype.type(1 / (1 - rate))
    return x * mask, ignore_underflow(lambda dy: (dy * mask,))
