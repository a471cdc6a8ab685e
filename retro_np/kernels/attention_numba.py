"""The attention of attention.py as loops, for Numba: one head of one item, a query at a time.

The same in C, a tile of queries at a time and its sums in registers, is csrc/attention.h. Here a query's logits are a
row that stays in the cache. Rows are added up key by key, so that the innermost loop runs along memory: keys, values
and positions are turned for it where needed.
"""

import numpy as np

from retro_np.kernels.jit import jit


@jit
def _add_product(out, numbers, rows):
    """out[j] += Σ_t numbers[t] · rows[t, j]: four rows at a time, so that out is fetched a quarter as often."""
    depth = len(numbers)
    whole = depth - depth % 4
    for t in range(0, whole, 4):
        a, b, c, d = numbers[t], numbers[t + 1], numbers[t + 2], numbers[t + 3]
        for j in range(len(out)):
            out[j] += (a * rows[t, j] + b * rows[t + 1, j]) + (c * rows[t + 2, j] + d * rows[t + 3, j])
    for t in range(whole, depth):
        for j in range(len(out)):
            out[j] += numbers[t] * rows[t, j]


@jit
def _add_outer(out, numbers, row):
    """out[j, t] += numbers[j] · row[t]."""
    for j in range(len(numbers)):
        if numbers[j] != 0:
            for t in range(len(row)):
                out[j, t] += numbers[j] * row[t]


@jit
def _biased(query, bias, scale):
    """(query + bias) · scale; an empty bias is none."""
    out = query * scale
    for t in range(len(bias)):
        out[t] += bias[t] * scale
    return out


@jit
def _logits(logits, content, position, by_distance, i, n, keys_t, table_t, seen, mask):
    """The logits (k, r) of query i, −inf where it does not see a key. content, position: (q + u) / √c, (q + v) / √c."""
    k, r = logits.shape
    logits[:] = 0
    _add_product(logits.reshape(-1), content, keys_t)
    if len(position):
        first, last = n - 1 - i, min(n - 1 - i + r, table_t.shape[1])
        by_distance[:] = 0
        _add_product(by_distance[: max(0, last - first)], position, table_t[:, first:last])
        for group in range(k):
            for j in range(r):
                logits[group, j] += by_distance[j]
    for group in range(k):
        for j in range(r):
            if j >= seen or not mask[group, j]:
                logits[group, j] = -np.inf


@jit
def forward(q, keys, values, table, u, v, seen, mask, out, lse):
    """One head of one item. q, out: (g, n, c). keys, values: (k, r, c). table: (T, c), u, v: (c,), or all empty.

    seen: (n,) how many keys of a group a query sees. mask: (k, r). lse: (g, n).
    """
    g, n, c = q.shape
    k, r, _ = keys.shape
    scale = q.dtype.type(1 / np.sqrt(c))
    keys_t = np.ascontiguousarray(np.ascontiguousarray(keys).reshape(-1, c).T)
    table_t, flat = np.ascontiguousarray(table.T), np.ascontiguousarray(values).reshape(-1, c)
    logits, by_distance = np.empty((k, r), q.dtype), np.empty(r, q.dtype)
    for group in range(g):
        for i in range(n):
            query = q[group, i]
            content, position = _biased(query, u, scale), _biased(query, v, scale)[: len(v)]
            _logits(logits, content, position, by_distance, i, n, keys_t, table_t, seen[i], mask)
            row = logits.reshape(-1)
            peak = q.dtype.type(-np.inf)
            for j in range(k * r):
                peak = max(peak, row[j])
            total = q.dtype.type(0)
            shift = peak if peak != -np.inf else q.dtype.type(0)  # max passes over NaN: the sum must not
            for j in range(k * r):
                row[j] = np.exp(row[j] - shift)
                total += row[j]
            out[group, i, :] = 0
            if total == 0:
                lse[group, i] = np.inf
                continue
            lse[group, i] = peak + np.log(total)
            row /= total
            _add_product(out[group, i], row, flat)


@jit
def backward(dout, lse, q, keys, values, table, u, v, seen, mask, dq, dkeys, dvalues, dtable, du, dv):
    """The pullback; shapes as forward's. dkeys and dvalues are written, dtable, du and dv added to."""
    g, n, c = q.shape
    k, r, _ = keys.shape
    scale = q.dtype.type(1 / np.sqrt(c))
    flat_keys, rows_of_table = np.ascontiguousarray(keys).reshape(-1, c), np.ascontiguousarray(table)
    keys_t, table_t = np.ascontiguousarray(flat_keys.T), np.ascontiguousarray(table.T)
    values_t = np.ascontiguousarray(np.ascontiguousarray(values).reshape(-1, c).T)
    dflat_keys, dflat_values = np.zeros((k * r, c), q.dtype), np.zeros((k * r, c), q.dtype)
    logits, dlogits = np.empty((k, r), q.dtype), np.empty(k * r, q.dtype)
    by_distance, dposition = np.empty(r, q.dtype), np.empty(c, q.dtype)
    for group in range(g):
        for i in range(n):
            query, drow = q[group, i], np.ascontiguousarray(dout[group, i])
            content, position = _biased(query, u, scale), _biased(query, v, scale)[: len(v)]
            _logits(logits, content, position, by_distance, i, n, keys_t, table_t, seen[i], mask)
            probabilities = logits.reshape(-1)
            for j in range(k * r):
                probabilities[j] = np.exp(probabilities[j] - lse[group, i])
            _add_outer(dflat_values, probabilities, drow)
            dlogits[:] = 0
            _add_product(dlogits, drow, values_t)
            mean = q.dtype.type(0)
            for j in range(k * r):
                mean += probabilities[j] * dlogits[j]
            for j in range(k * r):
                dlogits[j] = probabilities[j] * (dlogits[j] - mean)
            dcontent = np.zeros(c, q.dtype)
            _add_product(dcontent, dlogits, flat_keys)
            _add_outer(dflat_keys, dlogits, content)
            dcontent *= scale
            dq[group, i, :] = dcontent
            if not len(u):
                continue
            by_distance[:] = 0
            for j in range(k * r):
                by_distance[j % r] += dlogits[j]
            first, last = n - 1 - i, min(n - 1 - i + r, len(table))
            some = by_distance[: max(0, last - first)]
            dposition[:] = 0
            _add_product(dposition, some, rows_of_table[first:last])
            _add_outer(dtable[first:last], some, position)
            dposition *= scale
            dq[group, i, :] += dposition
            du += dcontent
            dv += dposition
    dkeys[:] = dflat_keys.reshape(k, r, c)
    dvalues[:] = dflat_values.reshape(k, r, c)
