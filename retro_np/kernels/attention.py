"""Attention with Transformer-XL's relative positions: the one loop that self-attention, CCA and CA_enc share.

Queries stand in g groups of n, keys in k groups of r; a query attends to all k·r keys under one softmax, and the
distance between query i and key j counts within their groups. So self-attention is g = k = 1; chunked
cross-attention g = 1, k the neighbours; the encoder's cross-attention g the neighbours, k = 1 (the chunk).

Three ways: NumPy, an array operation at a time; Numba, a query at a time (attention_numba.py); C, a tile of queries
at a time (csrc/attention.h). What the backward needs of the forward is one number a query: its logits' log-sum-exp.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from retro_np.kernels import c_extension, check_shapes, kernel
from retro_np.kernels.threads import blocks, count, parallel_for

PARTS = 8  # of a batch, at most, in the backward: each has its own sums for positions' gradients
SMALL = 1 << 20  # products of two numbers in a job that is not worth a second thread
SHARES = 4  # calls a thread: one that is held up then leaves its work to the others


def skewed(logits, n_keys):
    """View logits by distance (..., n, n + r − 1) as logits by key (..., n, r), without a copy.

    Column e of the first stands for a distance that falls by one as e grows, and row i's key j is found at column
    (n − 1 − i) + j. Walking one row down therefore means one column back: a stride of one row less one element.
    """
    *batch, n, _ = logits.shape
    *outer, down, right = logits.strides
    return as_strided(logits[..., n - 1 :], (*batch, n, n_keys), (*outer, down - right, right))


def _forward_numpy(q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    """softmax_j(((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √c) · values_j. Dai et al. 2019; paper B.1.2.

    q: (B, g, n, h, c). keys, values: (B, k, r, h, c). u, v: (h, c).
    table: (T, h, c), the projected position of each distance, falling: row (n − 1 − i) + j is that of query i, key j.
      T = n + r − 1, or fewer where the rest is masked. None: no positions, the logit is q_i·k_j / √c.
    causal_offset: query i sees keys j ≤ i + causal_offset alone. key_mask: (B, k, r), False where a key is not there.
    Returns out (B, g, n, h, c), zero where no key is left, and lse (B, h, g, n), the logarithm of the sum of the
    logits' exponentials, +inf where no key is left.
    """
    batch, g, n, h, _ = q.shape
    weights, lse = _softmax(_logits(q, keys, table, u, v, causal_offset, key_mask))
    return _groups_first(weights @ _heads_first(values), q), lse.reshape(batch, h, g, n)


def attention_weights(q, keys, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    """What attention_forward weighs the values by, to be looked at. Arguments as there.

    Returns (B, h, g, n, k, r): each query's weights of all k·r keys sum to 1, or are 0 where no key is left.
    """
    weights, _ = _softmax(_logits(q, keys, table, u, v, causal_offset, key_mask))
    return weights.reshape(q.shape[0], q.shape[3], *q.shape[1:3], *keys.shape[1:3])


def _softmax(logits):
    """Weights, in the place of the logits, and their log-sum-exp: 0 and +inf where no key is left."""
    peak = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    logits -= np.where(np.isneginf(peak), 0, peak)
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    nothing = total == 0
    logits /= np.where(nothing, 1, total)
    return logits, np.where(nothing, np.inf, peak + np.log(np.where(nothing, 1, total)))


def _backward_numpy(dout, lse, q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    """The pullback of attention_forward: the probabilities are made again, exp(logits − lse).

    Returns dq, dkeys, dvalues, dtable, du, dv; None for what is absent.
    """
    batch, g, n, h, c = q.shape
    k, r = keys.shape[1:3]
    dheads = _heads_first(dout)
    probabilities = _logits(q, keys, table, u, v, causal_offset, key_mask)
    probabilities -= lse.reshape(batch, h, g * n, 1)
    np.exp(probabilities, out=probabilities)
    dvalues = probabilities.swapaxes(-1, -2) @ dheads
    dlogits = dheads @ _heads_first(values).swapaxes(-1, -2)
    dlogits -= np.sum(dlogits * probabilities, axis=-1, keepdims=True)
    dlogits *= probabilities
    dlogits *= q.dtype.type(c**-0.5)
    dcontent = dlogits @ _heads_first(keys)  # of q + u
    dkeys = dlogits.swapaxes(-1, -2) @ _heads_first(q if u is None else q + u)
    dq, dtable, du, dv = dcontent, None, None, None
    if table is not None:
        by_distance = np.zeros((batch, h, g, n, max(0, n + r - 1)), q.dtype)
        skewed(by_distance, r)[...] = dlogits.reshape(batch, h, g, n, k, r).sum(axis=4)
        by_distance = by_distance.reshape(batch, h, g * n, max(0, n + r - 1))[..., : len(table)]
        dposition = by_distance @ table.transpose(1, 0, 2)  # of q + v
        dtable = np.sum(by_distance.swapaxes(-1, -2) @ _heads_first(q + v), axis=0).transpose(1, 0, 2)
        du, dv = dcontent.sum(axis=(0, 2)), dposition.sum(axis=(0, 2))
        dq = dcontent + dposition
    return _groups_first(dq, q), _groups_first(dkeys, keys), _groups_first(dvalues, values), dtable, du, dv


def _logits(q, keys, table, u, v, causal_offset, key_mask):
    """(B, h, g·n, k·r), −inf where a query does not see a key."""
    batch, g, n, h, c = q.shape
    k, r = keys.shape[1:3]
    logits = _heads_first(q if u is None else q + u) @ _heads_first(keys).swapaxes(-1, -2)
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
    return logits.reshape(batch, h, g * n, k * r)


def _forward_c(q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    batch, g, n, h, _ = q.shape
    out, lse = np.empty(q.shape, q.dtype), np.empty((batch, h, g, n), q.dtype)
    given = _contiguous(q, keys, values, table, u, v, key_mask)
    run = c_extension().attention_forward
    parallel_for(
        lambda tasks: run(*given, causal_offset, out, lse, tasks.start, tasks.stop), _shares(h * batch, q, keys)
    )
    return out, lse


def _backward_c(dout, lse, q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    dout, lse, *given = _contiguous(dout, lse, q, keys, values, table, u, v, key_mask)
    out = [np.empty(array.shape, array.dtype) for array in given[:3]]
    batch, _, _, h, c = q.shape
    parts, dpositions = batch, [None] * 3
    if table is not None:
        parts = min(PARTS, batch)
        dpositions = [np.empty((parts, *shape), q.dtype) for shape in (table.shape, (h, c), (h, c))]
    run = c_extension().attention_backward
    parallel_for(
        lambda tasks: run(dout, lse, *given, causal_offset, *out, *dpositions, tasks.start, tasks.stop),
        _shares(h * parts, q, keys),
    )
    return *out, *(None if array is None else array.sum(axis=0) for array in dpositions)


def _forward_numba(q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    batch, g, n, h, _ = q.shape
    out, lse = np.empty(q.shape, q.dtype), np.empty((batch, h, g, n), q.dtype)
    loop, head, seen, mask = _for_numba(q, keys, values, table, u, v, causal_offset, key_mask, "forward")

    def job(task):
        t, item = task // batch, task % batch
        given = [np.array(array[item, ..., t, :]) for array in (q, keys, values)]
        head_out = np.empty_like(given[0])
        loop(*given, *head(t), seen, np.array(mask[item]), head_out, lse[item, t])
        out[item, ..., t, :] = head_out

    parallel_for(job, range(h * batch))
    return out, lse


def _backward_numba(dout, lse, q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    batch, _, _, h, c = q.shape
    outs = [np.empty(array.shape, array.dtype) for array in (q, keys, values)]
    parts = blocks(batch, -(-batch // PARTS)) if batch else []
    n_table = 0 if table is None else len(table)
    dpositions = [np.zeros((len(parts), *shape), q.dtype) for shape in ((h, n_table, c), (h, c), (h, c))]
    check_shapes("attention_backward", dout=(dout, q.shape), lse=(lse, (batch, h, *q.shape[1:3])))
    loop, head, seen, mask = _for_numba(q, keys, values, table, u, v, causal_offset, key_mask, "backward")

    def job(task):
        t, part = task // len(parts), task % len(parts)
        for item in range(parts[part].start, parts[part].stop):
            head_dout, *given = (np.array(array[item, ..., t, :]) for array in (dout, q, keys, values))
            written = [np.empty_like(array) for array in given]
            masks = seen, np.array(mask[item])
            loop(
                head_dout, np.array(lse[item, t]), *given, *head(t), *masks, *written, *(x[part, t] for x in dpositions)
            )
            for array, of_head in zip(outs, written, strict=True):
                array[item, ..., t, :] = of_head

    parallel_for(job, range(h * len(parts)))
    if table is None:
        return *outs, None, None, None
    dtable, du, dv = (array.sum(axis=0) for array in dpositions)
    return *outs, np.ascontiguousarray(dtable.swapaxes(0, 1)), du, dv


def _for_numba(q, keys, values, table, u, v, causal_offset, key_mask, name):
    """The loop, a function that gives a head's table, u and v, the keys that each query sees, and the mask.

    All that a loop is given is a contiguous copy: Numba compiles it anew for each other layout, for half a minute.
    """
    from retro_np.kernels import attention_numba

    (batch, _, n, h, c), (k, r) = q.shape, keys.shape[1:3]
    heads, distances = (batch, k, r, h, c), 0 if table is None else min(len(table), n + r - 1)
    check_shapes(
        "attention", keys=(keys, heads), values=(values, heads), table=(table, (distances, h, c)), u=(u, (h, c)),
        v=(v, (h, c)), key_mask=(key_mask, heads[:3]),
    )  # fmt: skip
    empty = np.empty((0, c), q.dtype), np.empty(0, q.dtype), np.empty(0, q.dtype)
    seen = np.full(n, r) if causal_offset is None else np.clip(np.arange(n) + causal_offset + 1, 0, r)
    mask = np.ones(keys.shape[:3], bool) if key_mask is None else np.asarray(key_mask)

    def head(t):
        return empty if table is None else (np.array(table[:, t]), np.array(u[t]), np.array(v[t]))

    return getattr(attention_numba, name), head, seen, mask


BEST = ("c", "numpy", "numba")  # a query at a time cannot do what BLAS does with all of them
attention_forward = kernel(
    "attention_forward", numpy=_forward_numpy, numba=_forward_numba, c=_forward_c, best=BEST, one_type=True
)
attention_backward = kernel(
    "attention_backward", numpy=_backward_numpy, numba=_backward_numba, c=_backward_c, best=BEST, one_type=True
)


def _shares(tasks, q, keys):
    """The tasks in as many runs as there are calls; those of one head, which share its table, stay together."""
    calls = SHARES * count() if q.size * keys.shape[1] * keys.shape[2] >= SMALL else 1
    return blocks(tasks, max(1, -(-tasks // calls)))


def _contiguous(*arrays):
    return [None if array is None else np.require(array, requirements=["C", "A"]) for array in arrays]


def _heads_first(x):
    """(B, g, n, h, c) → (B, h, g·n, c), contiguous: one product a head."""
    batch, g, n, h, c = x.shape
    return np.ascontiguousarray(x.reshape(batch, g * n, h, c).transpose(0, 2, 1, 3))


def _groups_first(heads, like):
    """The way back, (B, h, g·n, c) → like.shape."""
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(like.shape)
