"""Checks of tutorial 3's exercises. Ground truth: the library's operators and kernel, and finite differences."""

import numpy as np

from retro_np.kernels.attention import attention_backward, attention_forward
from retro_np.nn import decoders
from retro_np.nn.attention import attend
from retro_np.tutorials.checks.judge import compare, exercise, pullback


@exercise("3.1", "swish", right="the value is x σ(x), and finite differences agree with the pullback")
def check_3_1(swish):
    for shape in ((3, 4), (5,)):
        x = np.random.default_rng(len(shape)).standard_normal(shape)
        sigma = 1 / (1 + np.exp(-x))

        def vjp(dy, x=x, sigma=sigma):
            return (dy * sigma * (1 + x * (1 - sigma)),)

        yield pullback(swish, x, expected=(x * sigma, vjp), parts=("x",), where=f"x of shape {shape}")


@exercise("3.2", "layer_norm", right="value and gradients are the library's, and finite differences agree")
def check_3_2(layer_norm):
    for shape, options in (((3, 5), {}), ((4, 3), {"eps": 0.5}), ((2, 4, 3), {})):
        rng = np.random.default_rng(shape[0])
        x, gain, bias = rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
        value, library_vjp = decoders.norm({"norm": gain, "norm_bias": bias}, x, options.get("eps", 1e-12))

        def vjp(dy, library_vjp=library_vjp):
            grads, dx = library_vjp(dy)
            return dx, grads["norm"], grads["norm_bias"]

        parts, where = ("x", "gain", "bias"), f"x of shape {shape}" + ", eps = 0.5" * bool(options)
        yield pullback(layer_norm, x, gain, bias, expected=(value, vjp), parts=parts, where=where, **options)


@exercise(
    "3.3",
    "attention_pullback",
    right="the blocks of keys together give the gradients of the kernel, for 1 to 3 of them",
)
def check_3_3(attention_pullback):
    def as_one_head(x):
        return x[None, None, :, None]

    for n_blocks in (1, 2, 3):
        rng, n, r, c = np.random.default_rng(n_blocks), 3, 4, 5
        q, dout = rng.standard_normal((2, n, c))
        keys, values = rng.standard_normal((2, n_blocks * r, c))
        arrays = [as_one_head(x) for x in (q, keys, values)]
        out, lse = attention_forward(*arrays)
        expected = [x[0, 0, :, 0] for x in attention_backward(as_one_head(dout), lse, *arrays)[:3]]
        dq = np.zeros_like(q)
        for number in range(n_blocks):
            block = slice(number * r, (number + 1) * r)
            result = attention_pullback(dout, out[0, 0, :, 0], lse[0, 0, 0], q, keys[block], values[block])
            where, names = f"block {number + 1} of {n_blocks}", ("dq", "dkeys", "dvalues")
            if n_blocks == 1:
                yield compare(result, tuple(expected), "the pullback's answer", names, where)
            else:
                dq_of_block, *others = result
                yield compare(tuple(others), (expected[1][block], expected[2][block]), "the rest", names[1:], where)
                dq = dq + np.asarray(dq_of_block)
        if n_blocks > 1:
            yield compare(dq, expected[0], "the sum of the blocks' dq", where=f"{n_blocks} blocks")


@exercise(
    "3.4",
    "cross_attention",
    right="value and gradients are the library's for 1, 2 and 3 heads, and finite differences agree",
)
def check_3_4(cross_attention):
    for n_heads in (1, 2, 3):
        rng, n, r, c = np.random.default_rng(n_heads), 3, 5, 2
        d, d_context, columns = 4, 6, n_heads * c
        shapes = {"w_q": (d, columns), "w_k": (d_context, columns), "w_v": (d_context, columns), "w_o": (columns, d)}
        params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        x, y = rng.standard_normal((n, d)), rng.standard_normal((r, d_context))
        value, library_vjp = attend(params, x[None, None], y[None, None], n_heads)

        def vjp(dout, library_vjp=library_vjp):
            grads, dx, dy = library_vjp(dout[None, None])
            return grads, dx[0, 0], dy[0, 0]

        given, where = (params, x, y, n_heads), f"n_heads = {n_heads}, c = {c}"
        yield pullback(cross_attention, *given, expected=(value[0, 0], vjp), parts=("params", "x", "y"), where=where)
    value = attend(params, 1000 * x[None, None], y[None, None], n_heads)[0]
    got = cross_attention(params, 1000 * x, y, n_heads)[0]
    yield compare(got, value[0, 0], "the value", where="scores of several thousand")
