"""Attention with Transformer-XL's relative positions: one loop for self-attention, CCA and CA_enc.

Queries come in g groups of n, and keys in k groups of r. A query attends to all k·r keys under one softmax, and the
distance between query i and key j counts within their groups. Self-attention has g = k = 1. In chunked cross-attention
g = 1 and k is the number of neighbours. In the encoder's cross-attention g is the number of neighbours, and the
chunk is the one group of keys (k = 1).

NumPy does one array operation after another. Numba (attention_numba.py) and C (csrc/attention.h) take a tile of queries
at a time. The backward pass needs one number per query from the forward pass: the log-sum-exp of its logits."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from retro_np.errors import UserError
from retro_np.kernels import Array, c_extension, ignore_underflow, kernel
from retro_np.kernels.threads import blocks, count, parallel_for

MAX_GRADIENT_PARTS = 8  # With positions, the backward pass splits a batch into at most 8 parts with their own sums.
MIN_PARALLEL_PRODUCTS = 1 << 20  # Products of two numbers; a smaller job is not worth a second thread.
CALLS_PER_THREAD = 4  # If one thread is delayed, the others take over its remaining calls.
Maybe = Array | None


def skewed(logits: Array, n_keys: int) -> Array:
    """View logits by distance (..., n, n + r − 1) as logits by key (..., n, r), without a copy.

    The distance falls by one from column to column, and row i has its key j in column (n − 1 − i) + j. So one row down
    is one column back: a stride of one row less one element."""
    *batch, n, _ = logits.shape
    *outer, down, right = logits.strides
    return as_strided(logits[..., n - 1 :], (*batch, n, n_keys), (*outer, down - right, right))


def _forward_numpy(
    q: Array, keys: Array, values: Array, table: Maybe = None, u: Maybe = None, v: Maybe = None, *,
    causal_offset: int | None = None, key_mask: Maybe = None,
) -> tuple[Array, Array]:  # fmt: skip
    """softmax_j(((q_i + u)·k_j + (q_i + v)·p_{i−j}) / √c) · values_j. Dai et al. 2019; paper B.1.2.

    q: (B, g, n, h, c). keys, values: (B, k, r, h, c). u, v: (h, c).
    table: (T, h, c), the projected positions by falling distance: row (n − 1 − i) + j is for query i and key j.
      T = n + r − 1, or less if the remaining rows are masked. None: no positions, the logit is q_i·k_j / √c.
    causal_offset: query i sees only keys j ≤ i + causal_offset. key_mask: (B, k, r), False for missing keys.
    Returns out (B, g, n, h, c) and lse (B, h, g, n), the logarithm of the sum of the logits' exponentials. For a query
    without keys, out is zero and lse is +inf."""
    batch, g, n, h, _ = q.shape
    weights, lse = _softmax(_logits(q, keys, table, u, v, causal_offset=causal_offset, key_mask=key_mask))
    return _groups_first(weights @ _heads_first(values), q), lse.reshape(batch, h, g, n)


@ignore_underflow
def attention_weights(q: Array, keys: Array, *positions: Maybe, **masks: Any) -> Array:
    """The weights that attention_forward gives the values, for inspection. The arguments are the same, without values.

    Returns (B, h, g, n, k, r). The weights of a query sum to 1 over its k·r keys, or are 0 if it has no key."""
    weights, _ = _softmax(_logits(q, keys, *positions, **masks))
    return weights.reshape(q.shape[0], q.shape[3], *q.shape[1:3], *keys.shape[1:3])


def _softmax(logits: Array) -> tuple[Array, Array]:
    """Weights, computed in place of the logits, and their log-sum-exp; 0 and +inf for a query without keys."""
    peak = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    logits -= np.where(np.isneginf(peak), 0, peak)
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    no_key = total == 0
    logits /= np.where(no_key, 1, total)
    return logits, np.where(no_key, np.inf, peak + np.log(np.where(no_key, 1, total)))


def _backward_numpy(
    dout: Array, lse: Array, q: Array, keys: Array, values: Array, table: Maybe = None, u: Maybe = None,
    v: Maybe = None, *, causal_offset: int | None = None, key_mask: Maybe = None, dlse: Maybe = None,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The pullback of attention_forward. It recomputes the probabilities as exp(logits − lse).

    dlse: (B, h, g, n), or None for zeros. For a query without keys it has no effect.
    Returns dq, dkeys, dvalues, dtable, du, dv; the last three are None without positions."""
    batch, g, n, h, c = q.shape
    k, r = keys.shape[1:3]
    dheads = _heads_first(dout)
    probabilities = _logits(q, keys, table, u, v, causal_offset=causal_offset, key_mask=key_mask)
    probabilities -= lse.reshape(batch, h, g * n, 1)
    np.exp(probabilities, out=probabilities)
    dvalues = probabilities.swapaxes(-1, -2) @ dheads
    dlogits = dheads @ _heads_first(values).swapaxes(-1, -2)
    dlogits -= np.sum(dlogits * probabilities, axis=-1, keepdims=True)
    if dlse is not None:
        dlogits += np.where(np.isposinf(lse), 0, dlse).reshape(batch, h, g * n, 1)
    dlogits *= probabilities
    dlogits *= q.dtype.type(c**-0.5)
    dcontent = dlogits @ _heads_first(keys)  # the gradient of q + u
    dkeys = dlogits.swapaxes(-1, -2) @ _heads_first(q if table is None else q + u)
    dq, dtable, du, dv = dcontent, None, None, None
    if table is not None:
        by_distance = np.zeros((batch, h, g, n, max(0, n + r - 1)), q.dtype)
        skewed(by_distance, r)[...] = dlogits.reshape(batch, h, g, n, k, r).sum(axis=4)
        by_distance = by_distance.reshape(batch, h, g * n, max(0, n + r - 1))[..., : len(table)]
        dposition = by_distance @ table.transpose(1, 0, 2)  # the gradient of q + v
        dtable = np.sum(by_distance.swapaxes(-1, -2) @ _heads_first(q + v), axis=0).transpose(1, 0, 2)
        du, dv = dcontent.sum(axis=(0, 2)), dposition.sum(axis=(0, 2))
        dq = dcontent + dposition
    return _groups_first(dq, q), _groups_first(dkeys, keys), _groups_first(dvalues, values), dtable, du, dv


def _logits(
    q: Array, keys: Array, table: Maybe = None, u: Maybe = None, v: Maybe = None, *,
    causal_offset: int | None = None, key_mask: Maybe = None,
) -> Array:  # fmt: skip
    """(B, h, g·n, k·r), −inf where a query does not see a key."""
    batch, g, n, h, c = q.shape
    k, r = keys.shape[1:3]
    logits: Array = _heads_first(q if table is None else q + u) @ _heads_first(keys).swapaxes(-1, -2)
    logits = logits.reshape(batch, h, g, n, k, r)
    if table is not None:
        by_distance = np.zeros((batch, h, g * n, max(0, n + r - 1)), q.dtype)
        by_distance[..., : len(table)] = _heads_first(q + v) @ table.transpose(1, 2, 0)
        logits += skewed(by_distance.reshape(batch, h, g, n, max(0, n + r - 1)), r)[..., None, :]
    logits *= q.dtype.type(c**-0.5)
    if causal_offset is not None:
        np.copyto(logits, -np.inf, where=np.arange(r) > np.arange(n)[:, None, None] + within(causal_offset, n, r))
    if key_mask is not None:
        np.copyto(logits, -np.inf, where=~key_mask[:, None, None, None])
    return logits.reshape(batch, h, g * n, k * r)


def in_order(
    q: Array, keys: Array, values: Array, table: Maybe = None, u: Maybe = None, v: Maybe = None, *,
    causal_offset: int | None = None, key_mask: Maybe = None,
) -> list[Any]:  # fmt: skip
    """The arguments of attention_forward in the order and the memory layout that the compiled functions need."""
    offset = None if causal_offset is None else within(causal_offset, q.shape[2], keys.shape[2])
    positions = (None, None, None) if table is None else (table, u, v)
    if table is not None and (u is None or v is None or len(table) > max(0, q.shape[2] + keys.shape[2] - 1)):
        raise UserError("attention: a table needs u and v, and at most n + r − 1 distances")
    return [*contiguous(q, keys, values, *positions, key_mask), offset]


def within(causal_offset: int, n: int, r: int) -> int:
    """An offset of the same mask: −n hides every key and r hides none, so that no sum with it overflows."""
    return min(max(operator.index(causal_offset), -n), r)


def forward_by_tasks(run: Callable[..., Any], *arguments: Any) -> tuple[Array, Array]:
    """out and lse from a compiled `run`. Task t is head t // (B·g) of group t % (B·g); a call does consecutive tasks.

    arguments: in the order of `in_order`, as `run` takes them."""
    q, keys, *_ = arguments
    batch, g, n, h, _ = q.shape
    out, lse = np.empty(q.shape, q.dtype), np.empty((batch, h, g, n), q.dtype)
    tasks = _task_blocks(h * batch * g, q, keys)
    parallel_for(lambda block: run(*arguments, out, lse, block.start, block.stop), tasks)
    return out, lse


def backward_by_tasks(run: Callable[..., Any], given: list[Any], *arguments: Any) -> tuple[Maybe, ...]:
    """The gradients from a compiled `run`. Task t is head t // P of part t % P of the batch. given: dout, lse and dlse.

    Each part has its own sums for table, u and v, so that they are added in a fixed order."""
    q, keys, values, table, u, v, *_ = arguments
    batch, h = q.shape[0], q.shape[3]
    parts = batch if table is None else min(MAX_GRADIENT_PARTS, batch)
    gradients = [np.empty(array.shape, array.dtype) for array in (q, keys, values)]
    sums = [None if array is None else np.empty((parts, *array.shape), q.dtype) for array in (table, u, v)]
    tasks = _task_blocks(h * parts, q, keys)
    parallel_for(lambda block: run(*given, *arguments, *gradients, *sums, block.start, block.stop), tasks)
    return *gradients, *(None if array is None else array.sum(axis=0) for array in sums)


def _forward_c(*arrays: Any, **masks: Any) -> tuple[Array, Array]:
    return forward_by_tasks(c_extension().attention_forward, *in_order(*arrays, **masks))


def _backward_c(dout: Array, lse: Array, *arrays: Any, dlse: Maybe = None, **masks: Any) -> tuple[Maybe, ...]:
    return backward_by_tasks(c_extension().attention_backward, contiguous(dout, lse, dlse), *in_order(*arrays, **masks))


_ARRAYS = dict(q="f Bgnhc", keys="f Bkrhc", values="f Bkrhc", table="f Thc?", u="f hc?", v="f hc?", key_mask="b Bkr?")
attention_forward = kernel("attention_forward", numpy=_forward_numpy, numba=True, c=_forward_c, arrays=_ARRAYS)
_ARRAYS = {"dout": "f Bgnhc", "lse": "f Bhgn"} | _ARRAYS | {"dlse": "f Bhgn?"}
attention_backward = kernel("attention_backward", numpy=_backward_numpy, numba=True, c=_backward_c, arrays=_ARRAYS)


def contiguous(*arrays: Maybe) -> list[Any]:
    """The arrays, copied where they are not contiguous, aligned and writable. None stays None."""
    return [a if a is None or a.flags.carray else np.require(a, requirements=["C", "A", "W"]) for a in arrays]


def _task_blocks(tasks: int, q: Array, keys: Array) -> list[slice]:
    """Split the tasks into one block per call. A head's tasks are consecutive: a call mostly uses one head's table."""
    large = q.size * keys.shape[1] * keys.shape[2] >= MIN_PARALLEL_PRODUCTS
    return blocks(tasks, max(1, -(-tasks // (CALLS_PER_THREAD * count() if large else 1))))


def _heads_first(x: Array) -> Array:
    """(B, g, n, h, c) → (B, h, g·n, c), contiguous, for one product per head."""
    batch, g, n, h, c = x.shape
    return np.ascontiguousarray(x.reshape(batch, g * n, h, c).transpose(0, 2, 1, 3))


def _groups_first(heads: Array, like: Array) -> Array:
    """The inverse, (B, h, g·n, c) → like.shape."""
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(like.shape)
