"""Checks of tutorial 6's exercises. Ground truth: the library, parameter counts of table 2 and finite differences."""

import numpy as np

from retro_np import EncoderConfig, RetroConfig, count_parameters, retro
from retro_np.config import PRESETS
from retro_np.nn.attention import self_attention
from retro_np.nn.cca import cca
from retro_np.nn.checks import perturbed_params
from retro_np.nn.encoder import encode, encoder_cross_attention
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import embedding, linear, rms_norm
from retro_np.tree import named_leaves
from retro_np.tutorials.checks.judge import compare, exercise, pullback


def model(n_layers, cca_layers, m=4):
    """A small RETRO with an encoder of two layers, of which the first looks at the chunk."""
    encoder = EncoderConfig(d_model=6, d_ffw=8, n_heads=2, d_head=3, n_layers=2, ca_layers=(1,))
    sizes = {"n_heads": 2, "d_head": 4, "n_layers": n_layers, "cca_layers": cca_layers, "chunk_size": m}
    config = RetroConfig(20, 8, 12, **sizes, encoder=encoder)
    return config, perturbed_params(config)


def texts(rng, n, k, m=4):
    """Tokens (2, n) and neighbours (2, ℓ, k, 2m) with padding: one ends early, one was not found."""
    tokens, neighbours = rng.integers(1, 20, (2, n)), rng.integers(1, 20, (2, n // m, k, 2 * m))
    neighbours[0, 0, -1, 5:] = neighbours[1, -1, 0] = 0
    return tokens, neighbours


def encoded(config, params, h, neighbours):
    """E of all chunks, and vjp(dE) → (gradients of the encoder, dh)."""
    batch, n_chunks, k, r = neighbours.shape
    m, d = config.chunk_size, h.shape[-1]
    chunks = h[:, : n_chunks * m].reshape(-1, m, d)
    e, encode_vjp = encode(params, params["embedding"], neighbours.reshape(-1, k, r), chunks, config.encoder)

    def vjp(de):
        grads, dtable, dchunks = encode_vjp(de.reshape(e.shape))
        dh = np.zeros_like(h)
        dh[:, : n_chunks * m] = dchunks.reshape(batch, n_chunks * m, d)
        return grads | {"embedding": dtable}, dh

    return e.reshape(*neighbours.shape, -1), vjp


def forward(config, params, tokens, neighbours):
    """Logits, and the pullback of every line of algorithm 1: what the notebook's `forward` returns."""
    kept = {"layers": []}
    h, kept["EMB"] = embedding(params["embedding"], tokens)
    for p, layer in enumerate(params["layers"], start=1):
        line = {}
        h, line["ATTN"] = self_attention(layer["attention"], h, config.n_heads, causal=True)
        if p == min(config.cca_layers):
            e, kept["ENCODER"] = encoded(config, params["encoder"], h, neighbours)
        if p in config.cca_layers:
            h, line["CCA"] = cca(layer["cca"], h, e, neighbours != 0, config.n_heads, config.chunk_size)
        h, line["FFW"] = ffw(layer["ffw"], h)
        kept["layers"].append(line)
    h, kept["norm"] = rms_norm(h, params["norm"])
    logits, kept["readout"] = linear(h, params["readout"])
    return logits, kept


@exercise("6.1", "conditioned", right="value and gradients are the library's, and finite differences agree with them")
def check_6_1(conditioned):
    _, params = model(2, (2,))
    weights = params["encoder"]["layers"][0]["cross_attention"]
    for b, k, n_heads in ((3, 2, 2), (2, 1, 3)):
        rng = np.random.default_rng(b)
        weights = weights | {name: weights[name].reshape(n_heads, -1) for name in ("u", "v")}
        e, chunks = rng.standard_normal((b, k, 8, 6)), rng.standard_normal((b, 4, 8))
        expected, where = encoder_cross_attention(weights, e, chunks, n_heads), f"b = {b}, k = {k}, n_heads = {n_heads}"
        parts = ("params", "e", "chunks")
        yield pullback(conditioned, weights, e, chunks, n_heads, expected=expected, parts=parts, where=where)


@exercise("6.2", "read", right="H gets its gradient by both ways, as finite differences say")
def check_6_2(read):
    for n, k, m in ((14, 2, 4), (8, 1, 3)):
        config, params = model(2, (2,), m)
        rng = np.random.default_rng(n)
        _, neighbours = texts(rng, n, k, m)
        h = rng.standard_normal((2, n, 8))
        e, encoder_vjp = encoded(config, params["encoder"], h, neighbours)
        y, cca_vjp = cca(params["layers"][1]["cca"], h, e, neighbours != 0, 2, m)

        def both_ways(dy, cca_vjp=cca_vjp, encoder_vjp=encoder_vjp):
            cca_grads, dh, de = cca_vjp(dy)
            encoder_grads, dcondition = encoder_vjp(de)
            return encoder_grads, cca_grads, dh + dcondition

        given = params["encoder"], params["layers"][1]["cca"], h, neighbours
        parts, where = ("encoder_params", "cca_params", "h"), f"n = {n}, m = {m}, k = {k}"
        yield pullback(read, *given, expected=(y, both_ways), parts=parts, where=where)


@exercise("6.3", "backward", right="all gradients of the model are the library's, for three sets P")
def check_6_3(backward):
    for P in ((2, 3), (1,), (1, 3)):
        config, params = model(3, P)
        rng = np.random.default_rng(len(P))
        tokens, neighbours = texts(rng, 14, 2)
        logits, kept = forward(config, params, tokens, neighbours)
        dlogits = rng.standard_normal(logits.shape)
        expected = retro(params, config, tokens, neighbours)[1](dlogits)
        got, where = backward(dlogits, kept, P), f"P = {set(P)}"
        leaves, expected_leaves = (dict(named_leaves(tree)) for tree in (got, expected))
        if leaves.keys() == expected_leaves.keys():
            order = as_they_come(expected_leaves, P)
            got, expected = ({name: tree[name] for name in order} for tree in (leaves, expected_leaves))
        yield compare(got, expected, "the tree", where=where)


def as_they_come(names, P):
    """The names of all parameters, in the order in which the pass backward makes their gradients."""
    places = ["readout", "norm"]
    for p in range(3, 0, -1):
        ffw, read, attention = (f"layers.{p - 1}.{block}" for block in ("ffw", "cca", "attention"))
        places += [ffw, read, "encoder.", attention] if p == min(P) else [ffw, read, attention]
    return [name for place in [*places, "embedding"] for name in names if name.startswith(place)]


@exercise("6.4", "by_hand", right="all eight sizes of table 2, to the last parameter")
def check_6_4(by_hand):
    for name in PRESETS:
        config = RetroConfig.preset(name)
        sizes = config.d_model, config.d_ffw, config.n_heads, config.d_head, config.n_layers, config.cca_layers
        yield compare(by_hand(*sizes, config.encoder), count_parameters(config), "the count", where=name)
