"""Checks of tutorial 5's exercises. Ground truth: the library, the reference by loops and finite differences."""

import itertools

import numpy as np

from retro_np import EncoderConfig, RetroConfig, reference
from retro_np.kernels.attention import attention_weights
from retro_np.nn.attention import attend, relative_attention
from retro_np.nn.cca import attended_sequence, attending_chunks, cca
from retro_np.nn.checks import perturbed_params
from retro_np.tutorials.checks.judge import compare, exercise, pullback

GRADIENTS = ("q", "keys", "values", "table", "b_c", "b_p")


def cca_params():
    """Parameters of a CCA block, d = 8, d' = 6, two heads of 4, as nn/checks.py perturbs them."""
    encoder = EncoderConfig(d_model=6, d_ffw=12, n_heads=2, d_head=3, n_layers=1, ca_layers=())
    config = RetroConfig(20, 8, 16, n_heads=2, d_head=4, n_layers=1, cca_layers=(1,), chunk_size=4, encoder=encoder)
    return perturbed_params(config)["layers"][0]["cca"]


def masks(rng, *shape):
    """Padding here and there; the first attending chunk has no key at all, the last one has all of them."""
    mask = rng.integers(0, 3, shape) > 0
    mask.reshape(-1, *shape[-2:])[0], mask.reshape(-1, *shape[-2:])[-1] = False, True
    return mask


def attention_cases(scale=1):
    """Arguments of 5.3 and 5.4, and the library's value and pullback for them. scale: of the queries."""
    for m, r, k in ((4, 8, 2), (3, 4, 1), (2, 4, 3)):
        rng = np.random.default_rng(m)
        b, n_heads, c = 3, 2, 3
        q = rng.standard_normal((b, m, n_heads, c)) * scale
        keys, values = rng.standard_normal((2, b, k, r, n_heads, c))
        table, (b_c, b_p) = rng.standard_normal((m + r - 1, n_heads, c)), rng.standard_normal((2, n_heads, c))
        key_mask = masks(rng, b, k, r)
        out, vjp = relative_attention(q[:, None], keys, values, table, b_c, b_p, key_mask=key_mask)
        weights = attention_weights(q[:, None], keys, table, b_c, b_p, key_mask=key_mask)

        def library_vjp(dout, vjp=vjp):
            dq, *rest = vjp(dout[:, None])
            return dq[:, 0], *rest

        arguments = q, keys, values, table, b_c, b_p, key_mask
        where = f"m = {m}, r = {r}, k = {k}" + ", scores of several thousand" * (scale > 1)
        yield arguments, out[:, 0], weights.reshape(b, n_heads, m, k, r), library_vjp, where


@exercise("5.1", "reads", right="for chunks of 1 to 5 tokens, each token reads what the library lays out for it")
def check_5_1(reads):
    for m in (4, 1, 2, 3, 5):
        chunk_numbers = np.broadcast_to(np.arange(5.0)[None, :, None, None], (1, 5, m, 1))
        laid_out = attended_sequence(chunk_numbers + 1, 5 * m)[0, :, 0] - 1  # zero, where nothing is read, becomes −1
        yield compare(reads(np.arange(5 * m), m), laid_out.astype(int), "reads(0 … n − 1, m)", where=f"m = {m}")


@exercise("5.2", "cut", "lay_back", right="both move every number to where the library does, and are transposes")
def check_5_2(cut, lay_back):
    m = 4
    for n in (12, 14, 15, 4, 5, 3, 2):  # The last two are too short for a chunk.
        rng, n_chunks, where = np.random.default_rng(n), n // m, f"n = {n}, m = {m}"
        x, y = rng.standard_normal((2, n, 3)), rng.standard_normal((2, n_chunks, m, 3))
        yield compare(cut(x, n_chunks, m), attending_chunks(x, n_chunks, m), "cut(h, n_chunks, m)", where=where)
        yield compare(lay_back(y, n), attended_sequence(y, n), "lay_back(chunks, n)", where=where)


@exercise("5.3", "attention_value", right="output and weights are those of the library's kernel, in three shapes")
def check_5_3(attention_value):
    for arguments, out, weights, _, where in itertools.chain(attention_cases(), attention_cases(scale=1000)):
        yield compare(attention_value(*arguments), (out, weights), parts=("the output", "A"), where=where)


@exercise("5.4", "attention", right="all six gradients are the library's, and finite differences agree with them")
def check_5_4(attention):
    for arguments, out, _, library_vjp, where in attention_cases():
        yield pullback(attention, *arguments, expected=(out, library_vjp), parts=GRADIENTS, where=where)


@exercise("5.5", "cross", right="value and gradients are the library's, and finite differences agree with them")
def check_5_5(cross):
    params = {name: array for name, array in cca_params().items() if name != "norm"}
    for m, r, k, n_heads in ((4, 8, 2, 2), (3, 6, 1, 4)):
        rng = np.random.default_rng(m)
        params |= {name: params[name].reshape(n_heads, -1) for name in ("u", "v")}
        queries, context = rng.standard_normal((3, m, 8)), rng.standard_normal((3, k, r, 6))
        key_mask = masks(rng, 3, k, r)
        y, vjp = attend(params, queries[:, None], context, n_heads, offset=m - 1, key_mask=key_mask)

        def library_vjp(dy, vjp=vjp):
            grads, dqueries, dcontext = vjp(dy[:, None])
            return grads, dqueries[:, 0], dcontext

        given = params, queries, context, key_mask, n_heads
        parts, where = ("params", "queries", "context"), f"m = {m}, r = {r}, k = {k}, n_heads = {n_heads}"
        yield pullback(cross, *given, expected=(y[:, 0], library_vjp), parts=parts, where=where)


@exercise(
    "5.6",
    "my_cca",
    right="the value is that of the paper's equation by loops, all gradients are the library's, and finite differences "
    "agree with them. Chunked cross-attention, forward and backward, is yours",
)
def check_5_6(my_cca):
    params, m, r, k, n_chunks = cca_params(), 4, 8, 2, 3
    for n, scale in ((12, 1), (14, 1), (15, 1e-3)):  # three whole chunks each; a small h shows the norm's 1e-6
        rng, where = np.random.default_rng(n), f"n = {n}, m = {m}" + ", h of about 0.001" * (scale < 1)
        h, encoded = scale * rng.standard_normal((2, n, 8)), rng.standard_normal((2, n_chunks, k, r, 6))
        key_mask = masks(rng, 2, n_chunks, k, r)
        by_loops = []
        for row in range(2):
            pairs = [list(zip(key_mask[row, u], encoded[row, u], strict=True)) for u in range(n_chunks)]
            by_loops.append(reference.chunked_cross_attention(params, h[row], pairs, 2, m))
        given = params, h, encoded, key_mask, 2, m
        expected = np.array(by_loops), cca(*given)[1]
        yield pullback(my_cca, *given, expected=expected, parts=("params", "h", "encoded"), where=where)
