"""A gradient check of every operator, small enough for finite differences. `retro-np gradcheck` runs them all."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.nn import decoders, memory
from retro_np.nn.attention import relative_attention, self_attention
from retro_np.nn.cca import cca
from retro_np.nn.encoder import encode, encoder_cross_attention
from retro_np.nn.ffw import ffw
from retro_np.nn.model import retro, retro_loss
from retro_np.nn.operators import cross_entropy, dropout, embedding, gelu, linear, rms_norm
from retro_np.nn.scope import ROOT
from retro_np.parameters import init_params
from retro_np.tree import Array, Pullback, Tree, map_tree

ENCODER = EncoderConfig(d_model=4, d_ffw=6, n_heads=2, d_head=3, n_layers=2, ca_layers=(1,))
CONFIG = RetroConfig(
    vocabulary_size=11, d_model=6, d_ffw=8, n_heads=2, d_head=4, n_layers=3, cca_layers=(2, 3), chunk_size=3,
    encoder=ENCODER,
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One gradient check: the arguments of `gradcheck(f, *arrays)`.

    source: section, equation or paper that defines the operator. long: a whole model for one of table 13's rows."""

    name: str
    source: str
    f: Callable[..., tuple[Any, Pullback]]
    arrays: tuple[Any, ...]
    long: bool = False


def perturbed_params(config: RetroConfig, seed: int = 0) -> Tree:
    """Fresh parameters plus noise, float64, so that no gradient is zero by chance and no gain is 1."""
    rng = np.random.default_rng(seed)
    params = init_params(config, rng)
    return map_tree(lambda _, array: array.astype(np.float64) + 0.3 * rng.standard_normal(array.shape), params)


def decoder_checks(seed: int) -> Iterator[Check]:
    """The blocks of decoders that others trained, and a small Llama, Qwen2 and GPT-2."""
    rng = np.random.default_rng(seed)
    normal, tokens = rng.standard_normal, rng.integers(0, 11, (2, 5))
    targets = rng.integers(-1, 11, (2, 5))  # −1: nothing to predict
    sizes: dict[str, Any] = {"d_model": 6, "d_ffw": 8, "n_heads": 4, "d_head": 4, "n_layers": 2, "max_positions": 8}
    # A bias of the keys shifts all logits of a query alike. Without rotary positions its gradient is therefore 0.
    biases = ("w_q", "w_v", "w_o", "w_in", "w_out")
    configs = {
        "Llama": decoders.DecoderConfig(11, **sizes, n_kv_heads=2),
        "Qwen2": decoders.DecoderConfig(11, **sizes, n_kv_heads=2, biases=("w_q", "w_k", "w_v"), tie_readout=True),
        "GPT-2": decoders.DecoderConfig(11, **sizes, architecture="gpt2", biases=biases, tie_readout=True),
    }
    params = {name: perturbed_params(config, seed) for name, config in configs.items()}

    yield Check("swiglu", "Shazeer 2020", decoders.swiglu, (normal((3, 5)), normal((3, 5))))
    yield Check("rotary", "Su et al. 2021", partial(decoders.rotary, first=3, base=100.0), (normal((2, 5, 2, 4)),))
    layer_norm = partial(decoders.norm, eps=1e-5)
    yield Check(
        "layer_norm", "Ba et al. 2016", layer_norm, ({"norm": normal(6), "norm_bias": normal(6)}, normal((3, 6)))
    )
    for name, config in configs.items():
        layer, h = params[name]["layers"][0], normal((2, 5, 6))
        attention, ffw_block = partial(decoders.self_attention, config=config), partial(decoders.ffw, config=config)
        yield Check(f"{name}, attention", "Vaswani et al. 2017", attention, (layer["attention"], h))
        yield Check(f"{name}, feed-forward", "Vaswani et al. 2017", ffw_block, (layer["ffw"], h))
        loss = partial(retro_loss, config=config, tokens=tokens, targets=targets, neighbours=None)
        yield Check(f"{name}, loss", "eq. 1", loss, (params[name],))


def memory_checks(seed: int) -> Iterator[Check]:
    """The parts of a memory of such a decoder, and what a small Llama and GPT-2 train of it."""
    rng = np.random.default_rng(seed)
    normal, tokens, targets = rng.standard_normal, rng.integers(0, 11, (2, 5)), rng.integers(-1, 11, (2, 5))
    neighbours = rng.integers(0, 11, (2, 2, 2, 4))
    neighbours[0, 0, 1, 3:] = -1  # a value that ends in padding
    neighbours[1, 0] = -1  # no neighbour at all
    neighbours[1, 1, 0] = neighbours[0, 1, 1]
    sizes: dict[str, Any] = {"d_model": 6, "d_ffw": 8, "n_heads": 4, "d_head": 2, "n_layers": 2, "max_positions": 8}
    llama = decoders.DecoderConfig(11, **sizes, n_kv_heads=2, cca_layers=(1, 2), chunk_size=2, rank=1, begin_id=1)
    gpt2 = replace(llama, architecture="gpt2", cca_layers=(2,), biases=("w_k", "w_o"), changed=("w_q", "w_o"))

    def joint(*arrays: Array) -> tuple[Any, Pullback]:
        both, part, vjp = memory.join(*arrays)
        return (both, part), lambda d: vjp(*d)

    def attention(q: Array, keys: Array, values: Array) -> tuple[Any, Pullback]:
        out, lse, vjp = memory.attend_to_neighbours(q, keys, values, neighbours[0] >= 0, 1, llama)
        return (out, lse), lambda d: vjp(*d)

    def change(params: Tree, x: Array) -> tuple[Array, Pullback]:
        return decoders.changed(np.zeros((3, 4)), params, x, "q", ROOT)

    def loss(changes: list[Tree], config: decoders.DecoderConfig, params: Tree) -> tuple[Any, Pullback]:
        layers = [layer | new for layer, new in zip(params["layers"], changes, strict=True)]
        value, vjp = retro_loss(params | {"layers": layers}, config, tokens, targets, neighbours)
        return value, lambda d: [{"cca": layer["cca"]} if "cca" in layer else {} for layer in vjp(d)["layers"]]

    own, read = normal((2, 2, 3, 4, 2)), normal((2, 2, 3, 4))
    yield Check("joint softmax", "Ratner et al. 2023", joint, (own[0], read[0], own[1], read[1], normal(4)))
    shared = normal((2, 2, 2, 4, 2, 2))
    yield Check("attention, with log-sum-exp", "Ratner et al. 2023", attention, (normal((2, 3, 4, 2)), *shared))
    low_rank = {"down_q": normal((5, 2)), "up_q": normal((2, 4))}
    yield Check("low-rank change", "Hu et al. 2022", change, (low_rank, normal((3, 5))))
    for name, config in {"Llama": llama, "GPT-2": gpt2}.items():
        params = perturbed_params(config, seed)
        changes = [{"cca": layer["cca"]} if "cca" in layer else {} for layer in params["layers"]]
        of_memory = partial(loss, config=config, params=params)
        yield Check(f"{name} with a memory, loss", "eq. 1", of_memory, (changes,))


def checks(seed: int = 0) -> Iterator[Check]:
    """All checks, from the smallest operator to the whole model, with odd shapes, padding and missing neighbours."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    m, n, k, r = CONFIG.chunk_size, 11, 2, 2 * CONFIG.chunk_size
    tokens = rng.integers(1, CONFIG.vocabulary_size, (2, n))
    targets = rng.integers(0, CONFIG.vocabulary_size, (2, n))  # some are padding
    neighbours = rng.integers(1, CONFIG.vocabulary_size, (2, n // m, k, r))
    neighbours[0, 0, 0, 4:] = 0  # a value that ends in padding
    neighbours[1, 1] = 0  # no neighbour at all
    mask = neighbours != 0
    params = perturbed_params(CONFIG, seed)
    layer, encoder, e = params["layers"][1], params["encoder"], ENCODER

    yield Check("linear", "x W", linear, (normal((2, 3, 4)), normal((4, 5))))
    yield Check("rms_norm", "Zhang & Sennrich 2019", rms_norm, (normal((3, 6)), normal(6)))
    yield Check("gelu", "Hendrycks & Gimpel 2016", gelu, (normal((3, 5)),))
    yield Check("embedding", "§2.4, EMB", lambda table: embedding(table, tokens), (normal((11, 4)),))
    yield Check("cross_entropy", "eq. 1", lambda x: cross_entropy(x, targets), (normal((2, n, 11)),))
    yield Check("dropout", "Srivastava et al. 2014", lambda x: dropout(x, 0.3, (1, 2), "site"), (normal((4, 5)),))

    bias, self_arguments = normal((2, 2, 3)), normal((3, 2, 1, 5, 2, 3))  # u and v; q, k and v
    causal, masked = partial(relative_attention, causal_offset=0), partial(relative_attention, key_mask=mask[:, 1])
    yield Check("attention, causal", "B.1.2", causal, (*self_arguments, normal((5, 2, 3)), *bias))
    yield Check("attention, both ways", "B.1.2", relative_attention, (*self_arguments, normal((9, 2, 3)), *bias))
    cross_arguments, table = (normal((2, 1, 3, 2, 3)), *normal((2, 2, k, r, 2, 3))), normal((3 + r - 1, 2, 3))
    yield Check("attention, over neighbours", "eq. 3", masked, (*cross_arguments, table, *bias))
    neighbour_arguments = (normal((2, k, r, 2, 3)), *normal((2, 2, 1, 3, 2, 3)), table, *bias)
    yield Check("attention, of neighbours", "§2.4", relative_attention, neighbour_arguments)
    yield Check("attention, no positions", "table 13", masked, cross_arguments)

    h = normal((2, n, CONFIG.d_model))
    yield Check("ATTN", "§2.4", partial(self_attention, n_heads=CONFIG.n_heads, causal=True), (layer["attention"], h))
    values = normal((2, r, e.d_model))
    attention_enc = partial(self_attention, n_heads=e.n_heads, causal=False, key_mask=mask[0, :2, 0])
    yield Check("ATTN_enc", "§2.4", attention_enc, (encoder["layers"][0]["attention"], values))
    yield Check("FFW", "§2.4", ffw, (layer["ffw"], h))
    encoded = normal((*neighbours.shape, e.d_model))
    masked_cca = partial(cca, key_mask=mask, n_heads=CONFIG.n_heads, chunk_size=m)
    yield Check("CCA", "eq. 3", masked_cca, (layer["cca"], h, encoded))
    chunks, grouped = normal((3, m, CONFIG.d_model)), normal((3, k, r, e.d_model))
    cross_attention = partial(encoder_cross_attention, n_heads=e.n_heads)
    yield Check("CA_enc", "§2.4", cross_attention, (encoder["layers"][0]["cross_attention"], grouped, chunks))
    arguments = ({name: encoder[name] for name in ("layers", "norm")}, encoder["embedding"], chunks)
    yield Check("ENCODER", "algorithm 1", lambda p, table, x: encode(p, table, neighbours[0], x, e), arguments)
    yield Check("READ", "§2.4", linear, (h, params["readout"]))

    def loss(config: RetroConfig, retrieved: Array | None = neighbours) -> Callable[[Tree], tuple[Any, Pullback]]:
        return lambda p: retro_loss(p, config, tokens, targets, retrieved, dropout_key=(seed, 0))

    yield from decoder_checks(seed)
    yield from memory_checks(seed)
    yield Check("RETRO, logits", "algorithm 1", lambda p: retro(p, CONFIG, tokens, neighbours), (params,))
    yield Check("RETRO[ON], loss", "eq. 1", loss(CONFIG), (params,))
    yield Check("RETRO[OFF], loss", "§4.2", loss(CONFIG, None), (params,))
    wide = replace(e, d_model=CONFIG.d_model)
    ablations: dict[str, dict[str, Any]] = {
        "dropout": {"dropout": 0.2}, "no conditioning": {"encoder": replace(e, ca_layers=())},
        "no positions in CCA": {"cca_positions": False},
        "shared, tied embeddings": {"share_embeddings": True, "tie_readout": True, "encoder": wide},
        "N only": {"retrieved_part": "N"}, "F only": {"retrieved_part": "F"},
        "CCA in every layer": {"cca_layers": (1, 2, 3)},
    }  # fmt: skip
    for name, change in ablations.items():
        config = replace(CONFIG, **change)
        yield Check(f"RETRO, {name}", "table 13", loss(config), (perturbed_params(config, seed),), long=True)
