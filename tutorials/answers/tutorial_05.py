"""Our answers to the exercises of tutorial 5. All in NumPy alone: chunked cross-attention from nothing."""

import numpy as np


def reads(t, m):
    return (t + 1) // m - 1


def cut(h, n_chunks, m):
    B, n, d = h.shape
    out = np.zeros((B, n_chunks * m, d))
    out[:, : n - (m - 1)] = h[:, m - 1 :]
    return out.reshape(B, n_chunks, m, d)


def lay_back(chunks, n):
    B, n_chunks, m, d = chunks.shape
    out = np.zeros((B, n, d))
    out[:, m - 1 :] = chunks.reshape(B, n_chunks * m, d)[:, : n - (m - 1)]
    return out


def places(m, r):
    """(m, r): the row of the table for query i and key j. Row 0 has the largest distance, 2m − 2."""
    distances = np.arange(m)[:, None] - np.arange(r) + m - 1
    return (2 * m - 2) - distances


def attention_value(q, keys, values, table, b_c, b_p, key_mask):
    b, m, n_heads, c = q.shape
    k, r = keys.shape[1:3]
    by_distance = np.einsum("bihc,thc->bhit", q + b_p, table)
    by_position = by_distance[:, :, np.arange(m)[:, None], places(m, r)]  # (b, n_heads, m, r)
    by_content = np.einsum("bihc,bkjhc->bhikj", q + b_c, keys)
    Z = (by_content + by_position[:, :, :, None]) / np.sqrt(c)
    Z = np.where(key_mask[:, None, None], Z, -np.inf).reshape(b, n_heads, m, k * r)
    largest = Z.max(axis=-1, keepdims=True)
    A = np.exp(Z - np.where(np.isfinite(largest), largest, 0))
    total = A.sum(axis=-1, keepdims=True)
    A = (A / np.where(total > 0, total, 1)).reshape(b, n_heads, m, k, r)
    return np.einsum("bhikj,bkjhc->bihc", A, values), A


def attention(q, keys, values, table, b_c, b_p, key_mask):
    m, c = q.shape[1], q.shape[-1]
    r = keys.shape[2]
    out, A = attention_value(q, keys, values, table, b_c, b_p, key_mask)

    def vjp(dout):
        dA = np.einsum("bihc,bkjhc->bhikj", dout, values)
        dvalues = np.einsum("bhikj,bihc->bkjhc", A, dout)
        mean = np.sum(A * dA, axis=(-2, -1), keepdims=True)  # over the keys of all neighbours: one softmax
        dZ = A * (dA - mean) / np.sqrt(c)
        dq_content = np.einsum("bhikj,bkjhc->bihc", dZ, keys)
        dkeys = np.einsum("bhikj,bihc->bkjhc", dZ, q + b_c)
        dby_position = dZ.sum(axis=3)  # the neighbours share their positions
        dby_distance = np.zeros((*dby_position.shape[:3], m + r - 1))
        dby_distance[:, :, np.arange(m)[:, None], places(m, r)] = dby_position
        dq_position = np.einsum("bhit,thc->bihc", dby_distance, table)
        dtable = np.einsum("bhit,bihc->thc", dby_distance, q + b_p)
        db_c, db_p = dq_content.sum(axis=(0, 1)), dq_position.sum(axis=(0, 1))
        return dq_content + dq_position, dkeys, dvalues, dtable, db_c, db_p

    return out, vjp


def linear(x, w):
    """y = x W, and its pullback."""

    def vjp(dy):
        return dy @ w.T, x.reshape(-1, w.shape[0]).T @ dy.reshape(-1, w.shape[1])

    return x @ w, vjp


def rms_norm(x, gain, eps=1e-6):
    """y = gain · x / rms(x), and its pullback."""
    scale = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    unit = x * scale

    def vjp(dy):
        dunit = dy * gain
        dx = scale * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True))
        return dx, np.sum(dy * unit, axis=tuple(range(x.ndim - 1)))

    return gain * unit, vjp


def sinusoids(distances, d):
    """R: a row of d sines and cosines for each distance."""
    angles = np.outer(distances, 10000.0 ** (-np.arange(0, d, 2) / d))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def cross(params, queries, context, key_mask, n_heads):
    b, m, d = queries.shape
    r = context.shape[2]
    q, q_vjp = linear(queries, params["w_q"])
    keys, keys_vjp = linear(context, params["w_k"])
    values, values_vjp = linear(context, params["w_v"])
    R = sinusoids(2 * m - 2 - np.arange(m + r - 1), d)
    table, table_vjp = linear(R, params["w_r"])

    def heads(x):
        return x.reshape(*x.shape[:-1], n_heads, -1)

    given = heads(q), heads(keys), heads(values), heads(table), params["u"], params["v"]
    out, attention_vjp = attention(*given, key_mask)
    y, y_vjp = linear(out.reshape(b, m, -1), params["w_o"])

    def vjp(dy):
        dout, dw_o = y_vjp(dy)
        dq, dkeys, dvalues, dtable, du, dv = attention_vjp(heads(dout))
        dqueries, dw_q = q_vjp(dq.reshape(q.shape))
        dcontext_k, dw_k = keys_vjp(dkeys.reshape(keys.shape))
        dcontext_v, dw_v = values_vjp(dvalues.reshape(values.shape))
        _, dw_r = table_vjp(dtable.reshape(table.shape))
        grads = {"w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o, "w_r": dw_r, "u": du, "v": dv}
        return grads, dqueries, dcontext_k + dcontext_v

    return y, vjp


def my_cca(params, h, encoded, key_mask, n_heads, m):
    B, n_chunks = encoded.shape[:2]
    n = h.shape[1]
    normed, norm_vjp = rms_norm(h, params["norm"])
    queries = cut(normed, n_chunks, m)
    rows = (x.reshape(B * n_chunks, *x.shape[2:]) for x in (queries, encoded, key_mask))
    update, cross_vjp = cross(params, *rows, n_heads)
    y = h + lay_back(update.reshape(queries.shape), n)

    def vjp(dy):
        dupdate = cut(dy, n_chunks, m)
        grads, dqueries, dencoded = cross_vjp(dupdate.reshape(update.shape))
        dnormed = lay_back(dqueries.reshape(queries.shape), n)
        dh, dnorm = norm_vjp(dnormed)
        return grads | {"norm": dnorm}, dy + dh, dencoded.reshape(encoded.shape)

    return y, vjp
