"""Checks of tutorial 4's exercises. Ground truth: the library's kernel, loops and finite differences."""

import numpy as np

from retro_np.kernels.attention import attention_weights, skewed
from retro_np.nn.attention import relative_attention
from retro_np.tutorials.checks.judge import compare, exercise, holds, pullback


@exercise("4.1", "skewed_by_reshaping", right="in four shapes every number is where the skew of the library puts it")
def check_4_1(skewed_by_reshaping):
    for n, r in ((2, 1), (2, 5), (4, 4), (5, 2)):
        by_distance = np.arange(n * (n + r - 1)).reshape(n, n + r - 1)
        what, where = "skewed_by_reshaping(by_distance, r)", f"n = {n}, r = {r}, by_distance counts 0, 1, 2, …"
        yield compare(skewed_by_reshaping(by_distance, r), skewed(by_distance, r).copy(), what, where=where)


@exercise("4.2", "position_scores", right="value and pullback are those of two loops, and finite differences agree")
def check_4_2(position_scores):
    for n, r in ((3, 4), (4, 2)):
        rng = np.random.default_rng(n)
        q, b_p, table = rng.standard_normal((n, 5)), rng.standard_normal(5), rng.standard_normal((n + r - 1, 5))
        value = np.array([[(q[i] + b_p) @ table[n - 1 - (i - j)] for j in range(r)] for i in range(n)])

        def vjp(dscores, n=n, r=r, q=q, b_p=b_p, table=table):
            dq, dtable = np.zeros_like(q), np.zeros_like(table)
            for i in range(n):
                for j in range(r):
                    dq[i] += dscores[i, j] * table[n - 1 - (i - j)]
                    dtable[n - 1 - (i - j)] += dscores[i, j] * (q[i] + b_p)
            return dq, dq.sum(axis=0), dtable

        parts, where = ("q", "b_p", "table"), f"n = {n}, r = {r}"
        yield pullback(position_scores, q, b_p, table, r, expected=(value, vjp), parts=parts, where=where)


@exercise(
    "4.3", "copying_table", right="for chunks of 2, 4 and 16 tokens, query i reads key m + i and hardly any other"
)
def check_4_3(copying_table):
    for m in (2, 4, 16):
        table, where = copying_table(m), f"m = {m}"
        fits = np.shape(table) == (3 * m - 1, 1, 1)
        yield holds(fits, f"the shape of the table is {np.shape(table)}, not {(3 * m - 1, 1, 1)}", where)
        if fits:
            falling, ones = np.asarray(table, np.float64), np.ones((1, 1))
            yield holds(np.isfinite(falling).all(), "inf is no score: a large number is enough", where)
            falling, contents = np.nan_to_num(falling), np.random.default_rng(m).standard_normal((1, 1, 2 * m, 1, 1))
            weights = attention_weights(np.zeros((1, 1, m, 1, 1)), contents, falling, 0 * ones, ones)[0, 0, 0, :, 0]
            read, most = weights.argmax(axis=1), weights.max(axis=1)
            yield compare(read, m + np.arange(m), "the key that each query reads most", where=where)
            little = f"a query gives the key only {most.min():.4f} of its weight, and more than 0.99 are asked for"
            yield holds(most.min() > 0.99, f"{little}: make the entry larger", where)


@exercise(
    "4.4", "attention_over_neighbours", right="value and gradients are the kernel's, and finite differences agree"
)
def check_4_4(attention_over_neighbours):
    for n, r, k in ((3, 4, 1), (4, 8, 2), (2, 5, 3)):
        rng, c = np.random.default_rng(n), 3
        q, table, (b_c, b_p) = (
            rng.standard_normal((n, c)),
            rng.standard_normal((n + r - 1, c)),
            rng.standard_normal((2, c)),
        )
        keys, values = rng.standard_normal((2, k, r, c))
        arrays = (
            q[None, None, :, None],
            keys[None, :, :, None],
            values[None, :, :, None],
            table[:, None],
            b_c[None],
            b_p[None],
        )
        out, library_vjp = relative_attention(*arrays)

        def vjp(dout, library_vjp=library_vjp):
            dq, dkeys, dvalues, dtable, db_c, db_p = library_vjp(dout[None, None, :, None])
            return dq[0, 0, :, 0], dkeys[0, :, :, 0], dvalues[0, :, :, 0], dtable[:, 0], db_c[0], db_p[0]

        given, where = (q, keys, values, table, b_c, b_p), f"n = {n}, r = {r}, k = {k}"
        parts = ("q", "keys", "values", "table", "b_c", "b_p")
        yield pullback(attention_over_neighbours, *given, expected=(out[0, 0, :, 0], vjp), parts=parts, where=where)
    out = relative_attention(1000 * arrays[0], *arrays[1:])[0]
    got = attention_over_neighbours(1000 * q, *given[1:])[0]
    yield compare(got, out[0, 0, :, 0], "the value", where="scores of several thousand")
