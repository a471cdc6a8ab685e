"""Every operator of the model with arguments small enough for finite differences: what `retro-np gradcheck` runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.nn.attention import relative_attention, self_attention
from retro_np.nn.cca import cca
from retro_np.nn.encoder import encode, encoder_cross_attention
from retro_np.nn.ffw import ffw
from retro_np.nn.model import retro, retro_loss
from retro_np.nn.operators import cross_entropy, dropout, embedding, gelu, linear, rms_norm
from retro_np.parameters import init_params
from retro_np.tree import map_tree

CONFIG = RetroConfig(
    vocabulary_size=11,
    d_model=6,
    d_ffw=8,
    n_heads=2,
    d_head=4,
    n_layers=3,
    cca_layers=(2, 3),
    chunk_size=3,
    encoder=EncoderConfig(d_model=4, d_ffw=6, n_heads=2, d_head=3, n_layers=2, ca_layers=(1,)),
)


@dataclass(frozen=True)
class Check:
    """One line of the table: `f(*arrays) -> (value, vjp)`, as `gradcheck` takes it."""

    name: str
    source: str  # where the paper, or another, defines it
    f: Callable
    arrays: tuple


def perturbed_params(config: RetroConfig, seed: int = 0):
    """Parameters away from their first values, so that no gradient is zero by chance and no gain is one."""
    rng = np.random.default_rng(seed)
    params = init_params(config, rng)
    return map_tree(lambda _, array: array.astype(np.float64) + 0.3 * rng.standard_normal(array.shape), params)


def checks(seed: int = 0) -> Iterator[Check]:
    """All operators, from the smallest to the whole model, with odd shapes, padding and missing neighbours in them."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    m, n, k, r = CONFIG.chunk_size, 11, 2, 2 * CONFIG.chunk_size
    tokens = rng.integers(1, CONFIG.vocabulary_size, (2, n))
    targets = rng.integers(0, CONFIG.vocabulary_size, (2, n))  # some are padding
    neighbours = rng.integers(1, CONFIG.vocabulary_size, (2, n // m, k, r))
    neighbours[0, 0, 0, 4:] = 0  # a value that ends early
    neighbours[1, 1] = 0  # no neighbour at all
    mask = neighbours != 0
    params = perturbed_params(CONFIG, seed)
    layer, encoder, e = params["layers"][1], params["encoder"], CONFIG.encoder

    yield Check("linear", "x W", linear, (normal((2, 3, 4)), normal((4, 5))))
    yield Check("rms_norm", "Zhang & Sennrich 2019", rms_norm, (normal((3, 6)), normal(6)))
    yield Check("gelu", "Hendrycks & Gimpel 2016", gelu, (normal((3, 5)),))
    yield Check("embedding", "§2.4, EMB", lambda table: embedding(table, tokens), (normal((11, 4)),))
    yield Check("cross_entropy", "eq. 1", lambda x: cross_entropy(x, targets), (normal((2, n, 11)),))
    yield Check("dropout", "Srivastava et al. 2014", lambda x: dropout(x, 0.3, (1, 2), "here"), (normal((4, 5)),))

    def heads(groups, length):
        return normal((2, groups, length, 2, 3))

    bias = (normal((2, 3)), normal((2, 3)))

    def attention(**masks):
        return lambda *arrays: relative_attention(*arrays, **masks)

    square = (heads(1, 5), heads(1, 5), heads(1, 5))
    yield Check("attention, causal", "B.1.2", attention(causal_offset=0), (*square, normal((5, 2, 3)), *bias))
    yield Check("attention, both ways", "B.1.2", attention(), (*square, normal((9, 2, 3)), *bias))
    across = (heads(1, 3), heads(k, r), heads(k, r))
    table = normal((3 + r - 1, 2, 3))
    yield Check("attention, over neighbours", "eq. 3", attention(key_mask=mask[:, 1]), (*across, table, *bias))
    yield Check("attention, of neighbours", "§2.4", attention(), (heads(k, r), heads(1, 3), heads(1, 3), table, *bias))
    yield Check("attention, no positions", "table 13", attention(key_mask=mask[:, 1]), across)

    h = normal((2, n, CONFIG.d_model))
    yield Check("ATTN", "§2.4", lambda p, x: self_attention(p, x, CONFIG.n_heads, causal=True), (layer["attention"], h))
    one = normal((2, r, e.d_model))
    attention_enc = encoder["layers"][0]["attention"]
    yield Check(
        "ATTN_enc",
        "§2.4",
        lambda p, x: self_attention(p, x, e.n_heads, causal=False, key_mask=mask[0, :2, 0]),
        (attention_enc, one),
    )
    yield Check("FFW", "§2.4", ffw, (layer["ffw"], h))
    encoded = normal((*neighbours.shape, e.d_model))
    yield Check(
        "CCA",
        "eq. 3",
        lambda p, x, y: cca(p, x, y, mask, CONFIG.n_heads, CONFIG.chunk_size),
        (layer["cca"], h, encoded),
    )
    chunks, some = normal((3, m, CONFIG.d_model)), normal((3, k, r, e.d_model))
    yield Check(
        "CA_enc",
        "§2.4",
        lambda p, x, y: encoder_cross_attention(p, x, y, e.n_heads),
        (encoder["layers"][0]["cross_attention"], some, chunks),
    )
    blocks = {name: encoder[name] for name in ("layers", "norm")}
    yield Check(
        "ENCODER",
        "algorithm 1",
        lambda p, t, y: encode(p, t, neighbours[0], y, e),
        (blocks, encoder["embedding"], chunks),
    )
    yield Check("READ", "§2.4", lambda x, gain, w: _readout(x, gain, w), (h, params["norm"], params["readout"]))

    def model(config, with_neighbours):
        given = neighbours if with_neighbours else None
        return lambda p: retro_loss(p, config, tokens, targets, given, dropout_key=(seed, 0))

    yield Check("RETRO, logits", "algorithm 1", lambda p: retro(p, CONFIG, tokens, neighbours), (params,))
    yield Check("RETRO[ON], loss", "eq. 1", model(CONFIG, True), (params,))
    yield Check("RETRO[OFF], loss", "§4.2", model(CONFIG, False), (params,))
    ablations = {
        "dropout": {"dropout": 0.2},
        "no conditioning": {"encoder": replace(e, ca_layers=())},
        "no positions in CCA": {"cca_positions": False},
        "shared, tied embeddings": {
            "share_embeddings": True,
            "tie_readout": True,
            "encoder": replace(e, d_model=CONFIG.d_model),
        },
        "N only": {"retrieved_part": "N"},
        "F only": {"retrieved_part": "F"},
        "CCA in every layer": {"cca_layers": (1, 2, 3)},
    }
    for name, change in ablations.items():
        config = replace(CONFIG, **change)
        yield Check(f"RETRO, {name}", "table 13", model(config, True), (perturbed_params(config, seed),))


def _readout(h, gain, w):
    normed, norm_vjp = rms_norm(h, gain)
    logits, linear_vjp = linear(normed, w)

    def vjp(dlogits):
        dnormed, dw = linear_vjp(dlogits)
        return *norm_vjp(dnormed), dw

    return logits, vjp
