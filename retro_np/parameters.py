"""The tree of parameters: its shapes, its first values, its count, its file."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import write_atomically
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


def save_params(path, params: Tree, config: RetroConfig) -> None:
    """Write parameters and configuration as one safetensors file, named by dotted path; whole or not at all."""
    check_tree(params, config)
    write_tensors(path, dict(leaves(params)), {"config": config.to_dict()})


def load_params(path) -> tuple[Tree, RetroConfig]:
    """Read what `save_params` or a training run wrote. Returns (params, config).

    Raises UserError where the file is missing, broken, of another kind, or does not hold what its configuration says.
    """
    tensors, meta = read_tensors(path, wanted=lambda name: not name.startswith("adamw."))
    config = config_from(meta, path)
    return tree_from(tensors, config, path), config


def in_single_precision(params: Tree) -> Tree:
    """Half precision made single: halves are for storage, as in the box, and nothing computes with them."""
    return map_tree(lambda _, array: array.astype(np.float32) if array.dtype == np.float16 else array, params)


def config_from(meta: dict, path) -> RetroConfig:
    """The configuration in a checkpoint's metadata."""
    try:
        return RetroConfig(**meta["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds no configuration of retro_np ({error}): was it written by save_params?"
        ) from error


def tree_from(tensors: dict[str, np.ndarray], config: RetroConfig, path, prefix: str = "") -> Tree:
    """Arrange named tensors as the tree of `config`, checking that each is there, of its shape, and finite."""

    def leaf(name, shape):
        tensor = tensors.get(prefix + name)
        if tensor is None or tensor.shape != tuple(shape):
            found = "absent" if tensor is None else f"of shape {tensor.shape}"
            raise UserError(f"{path}: {prefix}{name} is {found}, and its configuration wants {tuple(shape)}")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise UserError(f"{path}: {prefix}{name} holds {tensor.dtype} and no floating-point numbers")
        if not np.all(np.isfinite(tensor)):
            raise UserError(f"{path}: {prefix}{name} is not finite everywhere: it is damaged, take another checkpoint")
        return tensor

    return map_tree(leaf, parameter_shapes(config))


def write_tensors(path, tensors: dict[str, np.ndarray], meta: dict) -> None:
    """Write tensors and one JSON value beside them; the same input gives the same bytes."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # one metadata entry alone: with several, safetensors writes them in no fixed order
    write_atomically(path, save(contiguous, {"retro_np": json.dumps(meta, sort_keys=True)}))


def read_tensors(path, wanted=lambda name: True) -> tuple[dict[str, np.ndarray], dict]:
    """Read the tensors whose name is wanted, and the JSON value beside them."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a .safetensors file that a training run wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get("retro_np", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): take another checkpoint") from error
    except TypeError as error:  # bfloat16, say
        raise UserError(f"{path} has tensors that NumPy can't hold ({error}): convert them to float32") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} was not written by retro_np: its metadata has no configuration")
    return tensors, meta


def read_meta(path) -> dict:
    """The JSON value beside a file's tensors, without reading them."""
    return read_tensors(path, wanted=lambda name: False)[1]
