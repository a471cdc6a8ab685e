"""Attention with Transformer-XL's relative positions: the one loop that self-attention, CCA and CA_enc share.

Queries stand in g groups of n, keys in k groups of r; a query attends to all k·r keys under one softmax, and the
distance between query i and key j counts within their groups. So self-attention is g = k = 1; chunked
cross-attention g = 1, k the neighbours; the encoder's cross-attention g the neighbours, k = 1 (the chunk).
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from retro_np.kernels import kernel


def skewed(logits, n_keys):
    """View logits by distance (..., n, n + r − 1) as logits by key (..., n, r), without a copy.

    Column e of the first stands for a distance that falls by one as e grows, and row i's key j is found at column
    (n − 1 − i) + j. Walking one row down therefore means one column back: a stride of one row less one element.
    """
    *batch, n, _ = logits.shape
    *outer, down, right = logits.strides
    return as_strided(logits[..., n - 1 :], (*batch, n, n_keys), (*outer, down - right, right))


def forward_numpy(q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    """softmax_j(((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √c) · values_j. Dai et al. 2019; paper B.1.2.

    q: (B, g, n, h, c). keys, values: (B, k, r, h, c). u, v: (h, c).
    table: (T, h, c), the projected position of each distance, falling: row (n − 1 − i) + j is that of query i, key j.
      T = n + r − 1, or fewer where the rest is masked. None: no positions, the logit is q_i·k_j / √c.
    causal_offset: query i sees keys j ≤ i + causal_offset alone. key_mask: (B, k, r), False where a key is not there.
    Returns out (B, g, n, h, c), zero where no key is left, and the probabilities (B, h, g, n, k, r).
    """
    batch, g, n, h, c = q.shape
    k, r = keys.shape[1:3]
    content_query = _heads_first(q if u is None else q + u)
    logits = content_query @ _heads_first(keys).swapaxes(-1, -2)  # (B, h, g·n, k·r)
    logits = logits.reshape(batch, h, g, n, k, r)
    if table is not None:
        by_distance = np.zeros((batch, h, g * n, n + r - 1), q.dtype)
        by_distance[..., : len(table)] = _heads_first(q + v) @ table.transpose(1, 2, 0)
        logits += skewed(by_distance.reshape(batch, h, g, n, n + r - 1), r)[..., None, :]
    logits *= q.dtype.type(c**-0.5)
    if causal_offset is not None:
        hidden = np.arange(r) > np.arange(n)[:, None] + causal_offset
        np.copyto(logits, -np.inf, where=hidden[:, None, :])
    if key_mask is not None:
        np.copyto(logits, -np.inf, where=~key_mask[:, None, None, None])
    probabilities = _softmax(logits.reshape(batch, h, g * n, k * r))
    out = probabilities @ _heads_first(values)
    out = out.reshape(batch, h, g, n, c).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(out), probabilities.reshape(batch, h, g, n, k, r)


def backward_numpy(dout, probabilities, q, keys, values, table=None, u=None, v=None):
    """The pullback of attention_forward. Returns dq, dkeys, dvalues, dtable, du, dv; None for what is absent."""
    batch, g, n, h, c = q.shape
    k, r = keys.shape[1:3]
    dheads = _heads_first(dout)
    flat = probabilities.reshape(batch, h, g * n, k * r)
    dvalues = flat.swapaxes(-1, -2) @ dheads
    dlogits = dheads @ _heads_first(values).swapaxes(-1, -2)
    dlogits -= np.sum(dlogits * flat, axis=-1, keepdims=True)
    dlogits *= flat
    dlogits *= q.dtype.type(c**-0.5)
    dcontent = dlogits @ _heads_first(keys)  # of q + u
    dkeys = dlogits.swapaxes(-1, -2) @ _heads_first(q if u is None else q + u)
    dq, dtable, du, dv = dcontent, None, None, None
    if table is not None:
        by_distance = np.zeros((batch, h, g, n, n + r - 1), q.dtype)
        skewed(by_distance, r)[...] = dlogits.reshape(batch, h, g, n, k, r).sum(axis=4)
        by_distance = by_distance.reshape(batch, h, g * n, n + r - 1)[..., : len(table)]
        dposition = by_distance @ table.transpose(1, 0, 2)  # of q + v
        dtable = np.sum(by_distance.swapaxes(-1, -2) @ _heads_first(q + v), axis=0).transpose(1, 0, 2)
        du, dv = dcontent.sum(axis=(0, 2)), dposition.sum(axis=(0, 2))
        dq = dcontent + dposition
    return _groups_first(dq, q), _groups_first(dkeys, keys), _groups_first(dvalues, values), dtable, du, dv


attention_forward = kernel("attention_forward", numpy=forward_numpy)
attention_backward = kernel("attention_backward", numpy=backward_numpy)


def _softmax(logits):
    """Softmax over the last axis, in place; a row with nothing to attend to (all −inf) is all zero."""
    peak = logits.max(axis=-1, keepdims=True)
    logits -= np.where(np.isfinite(peak), peak, 0)
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    logits /= np.where(total > 0, total, 1)
    return logits


def _heads_first(x):
    """(B, g, n, h, c) → (B, h, g·n, c), contiguous: one product a head."""
    batch, g, n, h, c = x.shape
    return np.ascontiguousarray(x.reshape(batch, g * n, h, c).transpose(0, 2, 1, 3))


def _groups_first(heads, like):
    """The way back, (B, h, g·n, c) → like.shape."""
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(like.shape)
