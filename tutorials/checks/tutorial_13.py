"""Checks of tutorial 13's exercises. Ground truth: one softmax over all keys, the library's join, and counting."""

import numpy as np

from retro_np.kernels.attention import attention_forward
from retro_np.nn import memory
from retro_np.tutorials.checks.judge import compare, exercise


def attention(q, keys, values):
    """out (n, c) and lse (n,) of the library's kernel, for one head."""
    out, lse = attention_forward(*(array[None, None, :, None] for array in (q, keys, values)))
    return out[0, 0, :, 0], lse[0, 0, 0]


@exercise("13.1", "join_all", right="any number of sets gives one softmax over all keys, also with large scores")
def check_13_1(join_all):
    rng, n, c = np.random.default_rng(0), 5, 4
    q = rng.standard_normal((n, c))
    for sizes in ((3, 6), (3, 1, 6), (7,)):
        sets = [rng.standard_normal((2, size, c)) for size in sizes]
        whole, _ = attention(q, *np.concatenate(sets, axis=1))
        for low, high in ((0, 0), (1000, 1000), (-1000, 1000)):  # added to the scores of the first query … of the last
            shift, parts = np.linspace(low, high, n), [attention(q, *pair) for pair in sets]
            where = f"sets of {', '.join(map(str, sizes))} keys" + f", scores of {low:+} to {high:+}" * bool(high)
            yield compare(join_all([(out, lse + shift) for out, lse in parts]), whole, "the output", where=where)


@exercise("13.2", "logit_gradient", right="as with the output of the second attention, and finite at λ = 0")
def check_13_2(logit_gradient):
    rng, n, c = np.random.default_rng(0), 6, 4
    own, read, dout = rng.standard_normal((3, n, c))
    own_lse, read_lse = rng.standard_normal((2, n))
    read_lse[0] = -np.inf  # This query has retrieved nothing.
    for gate in (-1.0, 0.5):
        arrays = (x[None, :, None] for x in (own, own_lse, read, read_lse))
        joint, _, join_vjp = memory.join(*arrays, np.array([gate]))
        expected = join_vjp(dout[None, :, None], np.zeros((1, n, 1, c)))[3][0, :, 0]
        share = memory.neighbours_share(own_lse, read_lse, gate)
        yield compare(logit_gradient(joint[0, :, 0], own, share, dout), expected, "the gradient", where=f"gate {gate}")


@exercise("13.3", "products", right="own and read, counted token by token in three cases")
def check_13_3(products):
    for n, m, k in ((16, 4, 3), (512, 64, 2), (64, 64, 3)):
        own = sum(t + 1 for t in range(n))
        read = sum(k * 2 * m for t in range(n) if t >= m - 1)
        yield compare(products(n, m, k), (own, read), parts=("own", "read"), where=f"n = {n}, m = {m}, k = {k}")
