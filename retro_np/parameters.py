"""The tree of parameters: its shapes, its first values, its count, its file."""

import math

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.tree import Tree, leaves, map_tree

_EMBEDDINGS = ("embedding", "encoder.embedding", "readout")

# of `_begin_copying`; found by trial on the standard library
SHARP, STEEP = 20, 3.4  # sinusoids that find the next token, and how surely
SHADOW, QUIET = 1.2, 0.3  # how much of the next token is added, and how little of all else
LIKENESS, COPIED = 1.2, 0.1  # how surely equal tokens are found, and how much of what was found goes to the stream


def parameter_shapes(config: RetroConfig) -> Tree:
    """The tree with a shape at each leaf: the one place that says which parameters there are."""
    d, vocabulary = config.d_model, config.vocabulary_size

    def attention(width, d_context, n_heads, d_head, positions=True):
        inner = n_heads * d_head
        shapes = {"norm": (width,), "w_q": (width, inner), "w_k": (d_context, inner), "w_v": (d_context, inner)}
        shapes["w_o"] = (inner, width)
        if positions:
            shapes |= {"w_r": (width, inner), "u": (n_heads, d_head), "v": (n_heads, d_head)}
        return shapes

    def ffw(width, d_ffw):
        return {"norm": (width,), "w_in": (width, d_ffw), "w_out": (d_ffw, width)}

    def decoder_layer(p):
        layer = {"attention": attention(d, d, config.n_heads, config.d_head)}
        if p in config.cca_layers:
            context = config.encoder.d_model
            layer["cca"] = attention(d, context, config.n_heads, config.d_head, config.cca_positions)
        return layer | {"ffw": ffw(d, config.d_ffw)}

    def encoder_layer(p, e):
        layer = {"attention": attention(e.d_model, e.d_model, e.n_heads, e.d_head)}
        if p in e.ca_layers:
            layer["cross_attention"] = attention(e.d_model, d, e.n_heads, e.d_head) | {"norm_context": (d,)}
        return layer | {"ffw": ffw(e.d_model, e.d_ffw)}

    tree = {
        "embedding": (vocabulary, d),
        "layers": [decoder_layer(p) for p in range(1, config.n_layers + 1)],
        "norm": (d,),
    }
    if not config.tie_readout:
        tree["readout"] = (d, vocabulary)
    if config.retrieves:
        e = config.encoder
        tree["encoder"] = {} if config.share_embeddings else {"embedding": (vocabulary, e.d_model)}
        tree["encoder"]["layers"] = [encoder_layer(p, e) for p in range(1, e.n_layers + 1)]
        tree["encoder"]["norm"] = (e.d_model,)
    return tree


def count_parameters(config: RetroConfig, embeddings: bool = False) -> int:
    """How many numbers a model has, without allocating one. Embeddings and readout are left out, as in table 2."""
    shapes = leaves(parameter_shapes(config))
    return sum(math.prod(shape) for name, shape in shapes if embeddings or name not in _EMBEDDINGS)


def init_params(config: RetroConfig, rng: np.random.Generator) -> Tree:
    """Fresh float32 parameters.

    Matrices are normal with variance 1 / d_in; those that write to the residual stream (w_o, w_out) are divided by
    √(2 L) more, so that the stream's variance does not grow with depth (Radford et al. 2019). Embeddings have standard
    deviation 0.02 where they are read out again, for small logits; else 1, somewhat more than what layers add to the
    stream, so that a token can still be told in the encoder's output when training begins. Gains are 1, the biases u
    and v are 0.

    `config.copying_start`: encoder and CCA begin as a rough copying machine, see `_begin_copying`.
    """

    def leaf(name, shape):
        last = name.rsplit(".", 1)[-1]
        if last in ("norm", "norm_context"):
            return np.ones(shape, np.float32)
        if last in ("u", "v"):
            return np.zeros(shape, np.float32)
        deviation = shape[0] ** -0.5
        if last == "embedding":
            deviation = 0.02 if config.tie_readout and name == last else 1.0
        if last in ("w_o", "w_out"):
            depth = config.encoder.n_layers if name.startswith("encoder.") else config.n_layers
            deviation /= math.sqrt(2 * depth)
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)

    params = map_tree(leaf, parameter_shapes(config))
    if config.copying_start and config.retrieves:
        _begin_copying(params, config)
    return params


def _begin_copying(params: Tree, config: RetroConfig) -> None:
    """Let CCA find the token at hand among the neighbours' and hand on the one behind it. In place; not the paper's.

    The encoder's embeddings begin as a copy of the decoder's: shared ones would be pulled from both sides, and the
    decoder would learn its language later. In the encoder's first layer the first head looks at the next token, by
    position alone (the sinusoids of distance δ, turned by one, peak at δ = −1), and adds a shadow of it to each token;
    what else the encoder adds is small. In CCA w_k = w_q, so that a query finds the keys of tokens like its own, and
    w_o is a part of w_vᵀ, which adds the token found, with its shadow, to the stream. The rest is soon learned.
    """
    if "embedding" in params["encoder"]:
        params["encoder"]["embedding"] = params["embedding"].copy()
    first = params["encoder"]["layers"][0]
    attention, c, width = first["attention"], config.encoder.d_head, config.encoder.d_model
    half, sharp = width // 2, min(width // 2, SHARP)
    frequencies = 10000.0 ** (-2 * np.arange(sharp) / width)
    peak = np.zeros(width, np.float32)
    peak[:sharp], peak[half : half + sharp] = -np.sin(frequencies), np.cos(frequencies)
    for name in ("w_q", "w_k", "w_r"):
        attention[name][:, :c] = 0
    attention["w_r"][:, 0], attention["v"][0, 0] = STEEP * peak, STEEP
    attention["w_o"][c:] *= QUIET
    attention["w_o"][:c] = SHADOW * attention["w_v"][:, :c].T
    for name, matrix in (("ffw", "w_out"), ("cross_attention", "w_o")):
        if name in first:
            first[name][matrix] *= QUIET
    for p in config.cca_layers:
        cca = params["layers"][p - 1]["cca"]
        cca["w_q"] *= LIKENESS
        cca["w_k"], cca["w_o"] = cca["w_q"].copy(), COPIED * cca["w_v"].T


def check_tree(params: Tree, config: RetroConfig, retrieving: bool = True) -> None:
    """Raise UserError unless params has what config wants. retrieving=False: CCA and encoder may be absent."""
    found = dict(leaves(params))
    if len(params.get("layers", ())) != config.n_layers:
        raise UserError(f"the parameters have {len(params.get('layers', ()))} layers, and config {config.n_layers}")
    for name, shape in leaves(parameter_shapes(config)):
        if not retrieving and is_retrieval(name):
            continue
        have = np.shape(found[name]) if name in found else "absent"
        if have != shape:
            raise UserError(f"parameter {name} is {have}, and config wants {shape}: they are of different models")


def is_retrieval(name: str) -> bool:
    """Whether a parameter belongs to what RETRO adds to a baseline: CCA and the encoder. What RETROfit trains."""
    return name.startswith("encoder.") or ".cca." in name
