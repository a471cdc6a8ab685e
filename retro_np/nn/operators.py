"""The smallest differentiable pieces: linear, RMSNorm, GELU, embedding, cross-entropy, dropout.

Each returns its value and its pullback; a pullback returns a tuple, one entry for each differentiable argument.
"""

import zlib

import numpy as np

from retro_np.errors import UserError

GELU_BLOCK = 16384  # entries: a handful of arrays of that many fit the second-level cache


def sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum the leading axes of x away that `shape` lacks: the pullback of broadcasting over them."""
    return x.reshape(-1, *shape).sum(axis=0)


def linear(x, w, trainable=True):
    """y = x w. x: (..., d_in); w: (d_in, d_out). A frozen w (trainable=False) costs no product and gets None."""
    flat = x.reshape(-1, w.shape[0])

    def vjp(dy):
        dflat = dy.reshape(-1, w.shape[1])
        return (dflat @ w.T).reshape(x.shape), flat.T @ dflat if trainable else None

    return (flat @ w).reshape(*x.shape[:-1], w.shape[1]), vjp


def rms_norm(x, gain, eps=1e-6):
    """y = gain · x / rms(x), rms(x)² = mean(x²) + eps. x: (..., d); gain: (d,). Zhang & Sennrich 2019."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    unit = x * scale

    def vjp(dy):
        dunit = dy * gain
        dx = scale * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
        return dx, sum_to(dy * unit, gain.shape)

    return gain * unit, vjp


def gelu(x):
    """y = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise. Hendrycks & Gimpel 2016, tanh form.

    A block of entries at a time: what stands between the steps then stays in the cache, and no temporary is as large as
    x, whose pages the system would have to hand out afresh each time.
    """
    slope = float(np.sqrt(2 / np.pi))
    flat = x.reshape(-1)
    blocks = [slice(start, start + GELU_BLOCK) for start in range(0, len(flat), GELU_BLOCK)]
    tanh, y = np.empty_like(flat), np.empty_like(flat)
    for block in blocks:
        some = flat[block]
        np.tanh(slope * (some + 0.044715 * some * some * some), out=tanh[block])
        y[block] = 0.5 * some * (1 + tanh[block])

    def vjp(dy):
        dflat, dx = dy.reshape(-1), np.empty_like(flat)
        for block in blocks:
            some, t = flat[block], tanh[block]
            dinner = slope * (1 + 3 * 0.044715 * some * some)
            dx[block] = dflat[block] * (0.5 * (1 + t) + 0.5 * some * (1 - t * t) * dinner)
        return (dx.reshape(x.shape),)

    return y.reshape(x.shape), vjp


def embedding(table, tokens, trainable=True):
    """y = table[tokens]. table: (V, d); tokens: integers of any shape. Returns (*tokens.shape, d)."""

    def vjp(dy):
        if not trainable:
            return (None,)
        dtable = np.zeros_like(table)
        if tokens.size:
            # rows of one token are brought together and summed at once: np.add.at would go one row at a time
            order = np.argsort(tokens, axis=None, kind="stable")
            rows = dy.reshape(-1, table.shape[1])[order]
            used, starts = np.unique(tokens.reshape(-1)[order], return_index=True)
            dtable[used] = np.add.reduceat(rows, starts, axis=0)
        return (dtable,)

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
    rows = np.flatnonzero(targets)
    chosen = targets.reshape(-1)[rows]
    flat = logits.reshape(-1, logits.shape[-1])
    log_probabilities = log_softmax(flat if len(rows) == len(flat) else flat[rows])
    count = max(len(rows), 1)

    def vjp(dloss):
        drows = np.exp(log_probabilities)
        drows[np.arange(len(rows)), chosen] -= 1
        drows *= logits.dtype.type(dloss / count)
        if len(rows) == len(flat):
            return (drows.reshape(logits.shape),)
        dflat = np.zeros_like(flat)
        dflat[rows] = drows
        return (dflat.reshape(logits.shape),)

    picked = log_probabilities[np.arange(len(rows)), chosen]
    return logits.dtype.type((0 - picked.sum()) / count), vjp  # 0 − 0, unlike −0, is 0


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
