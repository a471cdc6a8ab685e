"""The smallest differentiable pieces: linear, RMSNorm, GELU, embedding, cross-entropy, dropout.

Each returns its value and its pullback; a pullback returns a tuple, one entry for each differentiable argument.
"""

import zlib

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels.rowwise import gelu_backward, gelu_forward, rms_norm_backward, rms_norm_forward, scatter_add
from retro_np.kernels.threads import blocks, parallel_for

ROWS = 16  # of logits, at a time: V numbers each


def linear(x, w, trainable=True):
    """y = x w. x: (..., d_in); w: (d_in, d_out). A frozen w (trainable=False) costs no product and gets None."""
    flat = x.reshape(-1, w.shape[0])

    def vjp(dy):
        dflat = dy.reshape(-1, w.shape[1])
        return (dflat @ w.T).reshape(x.shape), flat.T @ dflat if trainable else None

    return (flat @ w).reshape(*x.shape[:-1], w.shape[1]), vjp


def rms_norm(x, gain, eps=1e-6):
    """y = gain · x / rms(x), rms(x)² = mean(x²) + eps. x: (..., d); gain: (d,). Zhang & Sennrich 2019."""
    flat = x.reshape(-1, x.shape[-1])
    y, scale = rms_norm_forward(flat, gain, eps)

    def vjp(dy):
        dx, dgain = rms_norm_backward(dy.reshape(flat.shape), flat, gain, scale)
        return dx.reshape(x.shape), dgain

    return y.reshape(x.shape), vjp


def gelu(x):
    """y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise. Hendrycks & Gimpel 2016, tanh form."""
    flat = x.reshape(-1)

    def vjp(dy):
        return (gelu_backward(dy.reshape(-1), flat).reshape(x.shape),)

    return gelu_forward(flat).reshape(x.shape), vjp


def embedding(table, tokens, trainable=True):
    """y = table[tokens]. table: (V, d); tokens: integers of any shape. Returns (*tokens.shape, d)."""

    def vjp(dy):
        return (scatter_add(dy.reshape(-1, table.shape[1]), tokens.reshape(-1), len(table)) if trainable else None,)

    return table[tokens], vjp


def log_softmax(logits):
    """Logarithms of the softmax over the last axis, without overflow. No pullback: see cross_entropy."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(logits, targets):
    """Mean negative log-likelihood in nats of the targets that are not padding. Paper eq. 1.

    logits: (..., V); targets: (...), integers, 0 where there is nothing to predict.
    Returns a scalar of logits' dtype: 0 where no target is left.
    """
    flat, chosen = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = chosen != 0
    count = max(np.count_nonzero(counted), 1)
    lse = np.empty(len(flat), logits.dtype)  # log Σ exp of each row: the probabilities are made again from it

    def sum_up(rows):
        peak = flat[rows].max(axis=-1)
        lse[rows] = peak + np.log(np.exp(flat[rows] - peak[:, None]).sum(axis=-1))

    parallel_for(sum_up, blocks(len(flat), ROWS))

    def vjp(dloss):
        dflat = np.empty_like(flat)
        factor = counted * logits.dtype.type(dloss / count)

        def subtract(rows):
            some = dflat[rows]
            np.subtract(flat[rows], lse[rows, None], out=some)
            np.exp(some, out=some)
            some[np.arange(len(some)), chosen[rows]] -= 1
            some *= factor[rows, None]

        parallel_for(subtract, blocks(len(flat), ROWS))
        return (dflat.reshape(logits.shape),)

    nats = lse - flat[np.arange(len(flat)), chosen]
    return logits.dtype.type(nats.sum(where=counted) / count), vjp


def dropout(x, rate, key, site=""):
    """Zero a share `rate` of x and scale the rest by 1 / (1 − rate). Srivastava et al. 2014.

    key: an integer or a tuple of integers of at least 0, e.g. (seed, step); None: nothing is dropped.
    site: where in the model this is. The mask is a function of key, site and x.shape alone: the random numbers are
    counter-based (Philox, Salmon et al. 2011), with no generator whose state a checkpoint would have to keep.
    """
    if key is None or rate == 0:
        return x, lambda dy: (dy,)
    entropy = [*np.atleast_1d(key).tolist(), zlib.crc32(site.encode())]
    if any(not isinstance(part, int) or part < 0 for part in entropy):
        raise UserError(f"dropout_key is an integer of at least 0 or a tuple of them, not {key!r}")
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    mask = (random.random(x.shape, dtype=np.float32) >= rate) * x.dtype.type(1 / (1 - rate))
    return x * mask, lambda dy: (dy * mask,)
