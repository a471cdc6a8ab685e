"""Milliseconds of each kernel in NumPy, Numba, C and PyTorch, at the sizes of a training step of train_step.py.

    python benchmarks/kernels.py [--rounds 9] [--only NAME] [-o results.json]

The implementations take turns in one process, on all cores. Before each turn there is a pause, so that the threads of
the previous implementation fall asleep. Figures are medians. A blank means that a kernel has no such implementation.
PyTorch's attention computes the positions' part of the logits with a product and a shift, and passes this part to
scaled_dot_product_attention as a bias, as in torch_peer.py. Its backward pass is autograd's, without the forward pass.
"""

import argparse
import statistics
import time

import retro_np  # noqa: F401 — imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
import torch
from torch_peer import positions_as_bias
from turns import machine, save

from retro_np import kernels
from retro_np.info import kernel_table
from retro_np.kernels import attention, bert, decoders, panels, rowwise, search, substring

PAUSE_SECONDS = 0.3
KINDS = ("numpy", "numba", "c")
NORMAL = np.random.default_rng(0).standard_normal


def normal(*shape):
    return NORMAL(shape, dtype=np.float32)


def attention_cases():
    """(name, arrays, masks): the four forms of attention in a training step, with heads of 64."""
    forms = {
        "causal self-attention, n 512": ((4, 1, 512, 4, 64), (4, 1, 512, 4, 64), 512, 0),
        "encoder's self-attention, r 128": ((64, 1, 128, 4, 64), (64, 1, 128, 4, 64), 255, None),
        "CCA, m 64, k·r 256": ((32, 1, 64, 4, 64), (32, 2, 128, 4, 64), 191, None),
        "CA_enc, r 128, m 64": ((32, 2, 128, 4, 64), (32, 1, 64, 4, 64), 191, None),
    }
    for name, (queries, keys, distances, causal) in forms.items():
        arrays = normal(*queries), normal(*keys), normal(*keys), normal(distances, 4, 64), normal(4, 64), normal(4, 64)
        mask = None if causal == 0 else np.ones(keys[:3], bool)
        yield name, arrays, {"causal_offset": causal, "key_mask": mask}


def cases():
    """(name, function that calls the kernel, function that does the same in PyTorch or None)."""
    for name, arrays, masks in attention_cases():
        _, lse = attention.attention_forward(*arrays, **masks)
        dout = normal(*arrays[0].shape)
        forward, backward = torch_attention(arrays, masks, dout)
        yield f"attention_forward: {name}", lambda a=arrays, m=masks: attention.attention_forward(*a, **m), forward
        yield (
            f"attention_backward: {name}",
            lambda a=arrays, m=masks, d=dout, s=lse: attention.attention_backward(d, s, *a, **m),
            backward,
        )
    x, dy, gain = normal(8192, 256), normal(8192, 256), normal(256)
    _, scale = rowwise.rms_norm_forward(x, gain)
    tx, tgain = torch.tensor(x, requires_grad=True), torch.tensor(gain, requires_grad=True)
    norm = lambda: torch.nn.functional.rms_norm(tx, (256,), tgain, 1e-6)  # noqa: E731
    yield "rms_norm_forward: 8192 × 256", lambda: rowwise.rms_norm_forward(x, gain), no_grad(norm)
    yield "rms_norm_backward", lambda: rowwise.rms_norm_backward(dy, x, gain, scale), pullback(norm, (tx, tgain), dy)
    yield from decoder_cases()
    h, dh = normal(8192 * 1024), normal(8192 * 1024)
    th = torch.tensor(h, requires_grad=True)
    gelu = lambda: torch.nn.functional.gelu(th, approximate="tanh")  # noqa: E731
    yield "gelu_forward: 8192 × 1024", lambda: rowwise.gelu_forward(h), no_grad(gelu)
    yield "gelu_backward", lambda: rowwise.gelu_backward(dh, h), pullback(gelu, (th,), dh)
    indices = np.random.default_rng(0).integers(0, 4096, 8192)
    tindices, tdy = torch.tensor(indices), torch.tensor(dy)
    yield (
        "scatter_add: 8192 × 256 into 4096",
        lambda: rowwise.scatter_add(dy, indices, 4096),
        lambda: torch.zeros(4096, 256).index_add_(0, tindices, tdy),
    )
    p, g, m, v = normal(8_000_000), normal(8_000_000), np.zeros(8_000_000, "f"), np.zeros(8_000_000, "f")
    options = {"lr": 1e-9, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1, "step": 1}
    tp = torch.tensor(p, requires_grad=True)
    tp.grad = torch.tensor(g)
    optimiser = torch.optim.AdamW([tp], lr=1e-9, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    yield "adamw_step: 8 million", lambda: rowwise.adamw_step(p, g, m, v, **options), optimiser.step
    x, hidden, bias, shift, wide = normal(1536, 384), normal(1536, 1536), normal(384), normal(384), normal(1536)
    tx, thidden, tbias, twide = map(torch.tensor, (x, hidden, bias, wide))
    yield (
        "add_layer_norm: 1536 × 384",
        lambda: bert.add_layer_norm(x.copy(), bias, x, bias, shift, 1e-12),
        no_grad(lambda: torch.nn.functional.layer_norm(tx + tbias + tx, (384,), tbias, tbias, 1e-12)),
    )
    yield (
        "add_gelu_erf: 1536 × 1536",
        lambda: bert.add_gelu_erf(hidden.copy(), wide),
        no_grad(lambda: torch.nn.functional.gelu(thidden + twide)),
    )
    pieces, packed = normal(32, 384), panels.prepack(normal(384, 1536))  # one text in MiniLM's feed-forward layer
    tpieces, tmatrix = torch.tensor(pieces), torch.tensor(packed.matrix)
    yield (
        "prepacked_matmul: 32 × 384 × 1536",
        lambda: panels.prepacked_matmul(pieces, packed),
        no_grad(lambda: tpieces @ tmatrix),
    )
    queries, keys = normal(200, 384), normal(20_000, 384)
    tqueries, tkeys = torch.tensor(queries), torch.tensor(keys)
    yield (
        "exact_search: 200 of 20,000 × 384",
        lambda: search.exact_search(queries, keys, 2),
        lambda: torch.cdist(tqueries, tkeys).topk(2, largest=False),
    )
    tokens = np.random.default_rng(0).integers(1, 50, (2000, 64))
    values = np.random.default_rng(1).integers(1, 50, (2000, 10, 128))
    yield (
        "longest_common_substring: 2000 × 10",
        lambda: substring.longest_common_substring(tokens, values),
        None,
    )


def decoder_cases():
    """Like `cases`: the norm, SwiGLU and rotary positions of SmolLM2 for 2,048 tokens."""
    x, dy, gain = normal(2048, 576), normal(2048, 576), normal(576)
    tx, tgain = torch.tensor(x, requires_grad=True), torch.tensor(gain, requires_grad=True)
    norm = lambda: torch.nn.functional.rms_norm(tx, (576,), tgain, 1e-5)  # noqa: E731
    yield "norm_forward: 2048 × 576", lambda: decoders.norm_forward(x, gain, None, 1e-5), no_grad(norm)
    backward = lambda: decoders.norm_backward(dy, x, gain, None, 1e-5)  # noqa: E731
    yield "norm_backward", backward, pullback(norm, (tx, tgain), dy)
    gate, up, dhidden = normal(2048 * 1536), normal(2048 * 1536), normal(2048 * 1536)
    tgate, tup = torch.tensor(gate, requires_grad=True), torch.tensor(up, requires_grad=True)
    swiglu = lambda: torch.nn.functional.silu(tgate) * tup  # noqa: E731
    yield "swiglu_forward: 2048 × 1536", lambda: decoders.swiglu_forward(gate, up), no_grad(swiglu)
    backward = lambda: decoders.swiglu_backward(dhidden, gate, up)  # noqa: E731
    yield "swiglu_backward", backward, pullback(swiglu, (tgate, tup), dhidden)
    pairs, cos, sin = normal(2048, 9, 2, 32), normal(2048, 32), normal(2048, 32)
    tpairs, tcos, tsin = torch.tensor(pairs), torch.tensor(cos)[:, None], torch.tensor(sin)[:, None]

    def turn():
        a, b = tpairs.unbind(2)
        return torch.stack((a * tcos - b * tsin, b * tcos + a * tsin), 2)

    yield "rotary: 2048 × 9 heads of 64", lambda: decoders.rotary(pairs, cos, sin), no_grad(turn)


def no_grad(function):
    """The function without autograd."""

    def call():
        with torch.no_grad():
            return function()

    return call


def pullback(function, inputs, dy):
    """A function that repeats autograd's backward pass of one forward pass."""
    y = function()
    cotangent = torch.tensor(dy).reshape(y.shape)
    return lambda: torch.autograd.grad(y, inputs, cotangent, retain_graph=True)


def torch_attention(arrays, masks, dout):
    """Functions that run attention's forward and backward pass in PyTorch."""
    q, keys, values, table, u, v = (torch.tensor(array, requires_grad=True) for array in arrays)

    def run():
        queries = q.flatten(1, 2).transpose(1, 2)
        bias = positions_as_bias(queries + v[:, None], table.permute(1, 2, 0), q.shape[1:3], keys.shape[1:3])
        if masks["causal_offset"] == 0:
            bias = bias + torch.full(bias.shape[-2:], -torch.inf).triu(1)
        heads = (x.flatten(1, 2).transpose(1, 2) for x in (keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(queries + u[:, None], *heads, attn_mask=bias)
        return out.transpose(1, 2).reshape(q.shape)

    return no_grad(run), pullback(run, (q, keys, values, table, u, v), dout)


def main():
    """Print one row per kernel, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    installed = {name: kinds for name, _, kinds in kernel_table()}
    results = {}
    print(f"{'milliseconds':52}" + "".join(f"{kind:>9}" for kind in (*KINDS, "PyTorch")))
    for name, call, in_torch in cases():
        if options.only not in name:
            continue
        kernel = name.split(":")[0]
        runs = {kind: chosen(kind, call) for kind in KINDS if kind in installed[kernel]}
        if in_torch is not None:
            runs["PyTorch"] = in_torch
        row = results[name] = median_times(runs, options.rounds)
        print(f"{name:52}" + "".join(f"{row[kind]:9.2f}" if kind in row else " " * 9 for kind in (*KINDS, "PyTorch")))
    save(options.out, {"milliseconds": results, "machine": machine()})


def chosen(kind, call):
    """A function that calls `call` with the kernels of one kind."""

    def run():
        kernels.use(kind)
        call()

    return run


def median_times(runs, rounds):
    """The median milliseconds of each call; the calls take turns."""
    times = {kind: [] for kind in runs}
    for _ in range(rounds):
        for kind, run in runs.items():
            time.sleep(PAUSE_SECONDS)
            run()
            start = time.perf_counter()
            run()
            times[kind].append(1e3 * (time.perf_counter() - start))
    return {kind: statistics.median(values) for kind, values in times.items()}


if __name__ == "__main__":
    main()
