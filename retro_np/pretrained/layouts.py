"""How others name and store the tensors of a decoder, and how they become our parameters.

A layout is a table from our names to theirs. Hugging Face stores the matrices of Llama's family as (d_out, d_in), and
those of GPT-2, its Conv1D, as (d_in, d_out). GGUF stores all matrices as (d_out, d_in). GPT-2's matrices of queries,
keys and values are one matrix, side by side. In GGUF, a head of Llama's queries and keys is interleaved: its outputs
i and i + c/2, which rotary positions turn together, are neighbours."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.nn.decoders import DecoderConfig
from retro_np.parameters import parameter_shapes
from retro_np.tree import Array, Tree, map_tree, named_leaves

AGAIN = "download the whole model again"
UNSUPPORTED = "it is not supported (docs/models.md lists what is); use another model"
# What old files hold besides the parameters: causal masks and the frequencies of rotary positions.
BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")


class Weights(NamedTuple):
    """The tensors that a file holds.

    path: the file or the folder, for errors. shapes: of each tensor. read: a function of a tensor's name, which reads
    the tensor as floating-point numbers of at least 32 bits and raises UserError for a type that is not supported."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Array]


class Layout(NamedTuple):
    """names: their name of a part by ours, without its ending .weight or .bias. transposed: whether their matrices are
    (d_out, d_in). interleaved: whether heads of queries and keys are (see above)."""

    names: dict[str, str]
    transposed: bool = True
    interleaved: bool = False


LLAMA = Layout({
    "embedding": "model.embed_tokens", "norm": "model.norm", "readout": "lm_head", "layers": "model.layers",
    "attention.norm": "input_layernorm", "attention.w_q": "self_attn.q_proj", "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj", "attention.w_o": "self_attn.o_proj", "ffw.norm": "post_attention_layernorm",
    "ffw.w_gate": "mlp.gate_proj", "ffw.w_in": "mlp.up_proj", "ffw.w_out": "mlp.down_proj",
})  # fmt: skip
GPT2_NAMES = {
    "embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "readout": "lm_head",
    "layers": "transformer.h", "attention.norm": "ln_1", "attention.w_o": "attn.c_proj", "ffw.norm": "ln_2",
    "ffw.w_in": "mlp.c_fc", "ffw.w_out": "mlp.c_proj",
} | dict.fromkeys(("attention.w_q", "attention.w_k", "attention.w_v"), "attn.c_attn")  # fmt: skip
GPT2 = Layout(GPT2_NAMES, transposed=False)
GGUF_NAMES = {
    "embedding": "token_embd", "positions": "position_embd", "norm": "output_norm", "readout": "output",
    "layers": "blk", "attention.norm": "attn_norm", "attention.w_q": "attn_q", "attention.w_k": "attn_k",
    "attention.w_v": "attn_v", "attention.w_o": "attn_output", "ffw.norm": "ffn_norm", "ffw.w_gate": "ffn_gate",
    "ffw.w_in": "ffn_up", "ffw.w_out": "ffn_down",
}  # fmt: skip
FUSED = dict.fromkeys(("attention.w_q", "attention.w_k", "attention.w_v"), "attn_qkv")
GGUF = {
    "llama": Layout(GGUF_NAMES, interleaved=True),
    "qwen2": Layout(GGUF_NAMES),
    "gpt2": Layout(GGUF_NAMES | FUSED),
}


def stored_name(leaf: str, names: dict[str, str]) -> str:
    """Their name of one of our parameters: "blk.0.attn_q.bias" for "layers.0.attention.b_q", for example."""
    *where, last = leaf.split(".")
    is_bias = last.startswith("b_") or last.endswith("_bias")
    part = "w_" + last[2:] if last.startswith("b_") else last.removesuffix("_bias")
    if where:
        layers, number, block = where
        part = f"{names[layers]}.{number}.{names[f'{block}.{part}']}"
    else:
        part = names[part]
    return part + (".bias" if is_bias else ".weight")


def params_reader(weights: Weights, config: DecoderConfig, layout: Layout) -> Callable[[], Tree]:
    """A function that reads a model's parameters, float32, one tensor at a time.

    Before it is returned, names and shapes are compared with the configuration. Raises UserError for a tensor that is
    missing, has another shape or belongs to no part of the model; the function also for numbers that are not finite."""
    names, path = layout.names, weights.path
    if config.n_layers > len(weights.shapes):  # The tree of millions of layers is not built.
        raise UserError(f"{path} has {len(weights.shapes)} tensors for {config.n_layers:,} layers: {AGAIN}")
    if names["embedding"] + ".weight" not in weights.shapes:  # Base models are stored without the prefix.
        prefix = names["embedding"].rpartition(".")[0] + "."
        names = {ours: theirs.removeprefix(prefix) for ours, theirs in names.items()}
    fused = names["attention.w_q"] == names["attention.w_k"]
    unknown = {name for name in weights.shapes if not BUFFERS.fullmatch(name)}
    for leaf, shape in named_leaves(shapes := parameter_shapes(config)):
        if fused and leaf[:-1].endswith(("attention.w_", "attention.b_")) and leaf[-1] in "qkv":
            shape = (*shape[:-1], 3 * shape[-1])
        needed, name = shape[::-1] if _is_matrix(leaf) and layout.transposed else shape, stored_name(leaf, names)
        if (actual := weights.shapes.get(name)) != needed:
            fault = "is missing" if actual is None else f"has shape {actual}, but its configuration needs {needed}"
            raise UserError(f"{path}: the tensor {name} {fault}: {AGAIN}")
        unknown.discard(name)
    tied = stored_name("readout", names) if config.tie_readout else ""
    for name in sorted(unknown - {tied}):
        raise UserError(f"{path}: {name!r:.99} is not a tensor of this architecture; {UNSUPPORTED}")

    def read() -> Tree:
        params = map_tree(partial(_parameter, weights, config, layout._replace(names=names)), shapes)
        if tied in weights.shapes and not np.array_equal(weights.read(tied), params["embedding"]):
            fault = f"{tied} differs from the embedding, to which the configuration ties it"
            raise UserError(f"{path}: {fault}: set tie_word_embeddings to false, or {AGAIN}")
        return params

    return read


def _is_matrix(leaf: str) -> bool:
    return leaf == "readout" or ".w_" in leaf


def _parameter(weights: Weights, config: DecoderConfig, layout: Layout, leaf: str, shape: tuple[int, ...]) -> Array:
    name, part = stored_name(leaf, layout.names), leaf.rpartition(".")[2]
    with np.errstate(all="ignore"):  # A float64 beyond float32 becomes an infinity.
        array = weights.read(name).astype(np.float32, copy=False)
    if not np.all(np.isfinite(array)):
        raise UserError(f"{weights.path}: {name} is not finite everywhere: the file is damaged; {AGAIN}")
    if _is_matrix(leaf) and layout.transposed:
        array = array.T
    if array.shape != shape:  # queries, keys and values side by side
        array = np.split(array, 3, axis=-1)["qkv".index(part[-1])]
    if layout.interleaved and part in ("w_q", "w_k", "b_q", "b_k"):
        array = array.reshape(*shape[:-1], -1, config.d_head // 2, 2).swapaxes(-1, -2).reshape(shape)
    return np.ascontiguousarray(array)
