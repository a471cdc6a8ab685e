"""The parameter tree: its shapes, its size, its initial values, and a check against a configuration."""

import math
import os
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.tree import Array, Tree, map_tree, named_leaves


def parameter_shapes(config: RetroConfig) -> Tree:
    """The parameter tree with a shape at each leaf. This is the only definition of which parameters a model has."""
    if not config.is_retro:
        from retro_np.nn.decoders import decoder_shapes

        return decoder_shapes(config, parameter_shapes)  # type: ignore[arg-type]
    d, vocabulary = config.d_model, config.vocabulary_size
    e: Any = config.encoder  # A part is the decoder, which `config` describes, or the encoder.

    def attention(part: Any, d_context: int, positions: bool = True) -> Tree:
        width, heads, inner = part.d_model, (part.n_heads, part.d_head), part.n_heads * part.d_head
        shapes = {"norm": (width,), "w_q": (width, inner), "w_k": (d_context, inner), "w_v": (d_context, inner)}
        shapes["w_o"] = (inner, width)
        return shapes | ({"w_r": (width, inner), "u": heads, "v": heads} if positions else {})

    def layers(part: Any, crossing_layers: tuple[int, ...], crossing: Tree) -> list[Tree]:
        width, hidden = part.d_model, part.d_ffw
        own, ffw = attention(part, width), {"norm": (width,), "w_in": (width, hidden), "w_out": (hidden, width)}
        numbers = range(1, part.n_layers + 1)
        return [{"attention": own} | (crossing if p in crossing_layers else {}) | {"ffw": ffw} for p in numbers]

    cca = {"cca": attention(config, e.d_model, config.cca_positions)} if config.retrieves else {}
    tree: Any = {"embedding": (vocabulary, d), "layers": layers(config, config.cca_layers, cca), "norm": (d,)}
    if not config.tie_readout:
        tree["readout"] = (d, vocabulary)
    if config.retrieves:
        cross_attention = {"cross_attention": attention(e, d) | {"norm_context": (d,)}}
        tree["encoder"] = {} if config.share_embeddings else {"embedding": (vocabulary, e.d_model)}
        tree["encoder"] |= {"layers": layers(e, e.ca_layers, cross_attention), "norm": (e.d_model,)}
    return tree


def count_parameters(config: RetroConfig, embeddings: bool = False) -> int:
    """The number of parameters of a model, without allocating them.

    embeddings: whether to count the embeddings and the readout, which table 2 leaves out."""
    uncounted = () if embeddings else ("embedding", "encoder.embedding", "positions", "readout")
    return sum(math.prod(shape) for name, shape in named_leaves(parameter_shapes(config)) if name not in uncounted)


def init_params(config: RetroConfig, rng: np.random.Generator, given: dict[str, Array] | None = None) -> Tree:
    """Random initial parameters: a tree of float32 arrays with the shapes that `parameter_shapes` gives.

    rng: the source of all random numbers. given: by name, arrays that stand in place of new ones.
    Raises UserError if the machine's memory cannot hold the parameters.
    Matrices are normal with variance 1 / d_in. Those that write to the residual stream (w_o, w_out) are also divided by
    √(2 L), so that the variance of the stream does not grow with depth (Radford et al. 2019). Embeddings have standard
    deviation 1, so that the encoder's output still identifies its tokens when training starts; if the readout is tied,
    the decoder's have 0.02, which keeps the logits small. Gains are 1; all biases are 0.
    With `config.copying_start` the encoder and CCA are initialised to copy tokens; see `nn.copying_start`."""

    def leaf(name: str, shape: tuple[int, ...]) -> Array:
        leaf_name = name.rsplit(".", 1)[-1]
        if given and name in given:
            return given[name]
        if leaf_name in ("norm", "norm_context"):
            return np.ones(shape, np.float32)
        if leaf_name in ("u", "v", "gate") or leaf_name.startswith(("b_", "up_")) or leaf_name.endswith("_bias"):
            return np.zeros(shape, np.float32)
        deviation = shape[0] ** -0.5
        if leaf_name == "embedding":
            deviation = 0.02 if config.tie_readout and name == leaf_name else 1.0
        if leaf_name in ("w_o", "w_out"):
            part: Any = config.encoder if name.startswith("encoder.") else config
            deviation /= math.sqrt(2 * part.n_layers)
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)

    needed = 4e-9 * count_parameters(config, embeddings=True)
    memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > memory:
        raise UserError(f"this model needs about {needed:,.1f} GB, but memory has {memory:,.1f} GB: use smaller sizes")
    params = map_tree(leaf, parameter_shapes(config))
    if config.copying_start and config.retrieves:
        from retro_np.nn.copying_start import init_copying

        init_copying(params, config.cca_layers, config.encoder)
    return params


def check_tree(params: Tree, config: RetroConfig, retrieving: bool = True, storing: bool = False) -> None:
    """Raise UserError unless params has the parameters of config. Without retrieving, CCA and encoder may be absent.

    Unless they are only stored, they must be float32 or wider."""
    arrays, depth = dict(named_leaves(params)), len(params.get("layers", ()))
    if depth != config.n_layers:
        raise UserError(f"the parameters have {depth} layers, but config has {config.n_layers}: use the model's config")
    for name, shape in named_leaves(parameter_shapes(config)):
        if not retrieving and is_retrieval(name):
            continue
        actual = f"has shape {np.shape(arrays[name])}" if name in arrays else "is absent"
        if actual != f"has shape {shape}":
            raise UserError(f"parameter {name} {actual}, but config has shape {shape}: use the model's config")
        dtype = np.asarray(arrays[name]).dtype
        if not storing and (dtype.kind != "f" or dtype.itemsize < 4):  # In half precision, sums overflow.
            raise UserError(f"parameter {name} is {dtype}: convert the parameters to float32 or float64")


def is_retrieval(name: str) -> bool:
    """Whether a parameter belongs to CCA or the encoder, which RETRO adds to a baseline and RETROfit trains."""
    return name.startswith("encoder.") or ".cca." in name
