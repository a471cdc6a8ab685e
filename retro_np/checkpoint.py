"""Parameters, and training runs, as safetensors files."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import write_atomically
from retro_np.parameters import check_tree, parameter_shapes
from retro_np.retrieval.database import Database
from retro_np.sequences import check_fit
from retro_np.tree import Tree, leaves, map_tree


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


def save_checkpoint(path, params: Tree, state: Tree, config: RetroConfig, run: dict) -> None:
    """Write parameters, AdamW's moments and step, and `run` (plain values: what identifies the run)."""
    tensors = dict(leaves(params))
    for moment in ("m", "v"):
        for name, array in leaves(state[moment], f"adamw.{moment}"):
            if array is not None:
                tensors[name] = array
    write_tensors(path, tensors, {"config": config.to_dict(), "run": run, "step": state["step"]})


def load_checkpoint(path) -> tuple[Tree, Tree, RetroConfig, dict]:
    """Read a checkpoint that a run can go on from. Returns (params, AdamW's state, config, run)."""
    tensors, meta = read_tensors(path)
    config = config_from(meta, path)
    if "run" not in meta or "step" not in meta:
        raise UserError(
            f"{path} holds parameters alone: evaluate it or sample from it, but training can't resume there"
        )
    params = tree_from(tensors, config, path)
    moments = {
        moment: map_tree(lambda name, _, moment=moment: tensors.get(f"adamw.{moment}.{name}"), params)
        for moment in ("m", "v")
    }
    return params, {"step": meta["step"], **moments}, config, meta["run"]


def load_model(path, database: Database) -> tuple[Tree, RetroConfig]:
    """Parameters and configuration of a checkpoint that is to work on a database.

    Raises UserError, beside what `load_params` raises, where vocabulary or chunks are not the database's, and where a
    training run's checkpoint was made with another tokenizer: the same ids would be other tokens.
    """
    params, config = load_params(path)
    check_fit(config, database)
    trained = read_meta(path)
    for name in ("run", "data", "tokenizer"):
        if trained is not None and not isinstance(trained, dict):
            raise UserError(f"{path}: its metadata hold no {name!r} of a training run: take another checkpoint")
        trained = None if trained is None else trained.get(name)
    ours = database.identity["tokenizer"]
    if trained not in (None, ours):  # None: parameters alone, which know of no tokenizer
        raise UserError(
            f"{path} was trained with another tokenizer ({trained!s:.6}…) than {database.path} has ({ours[:6]}…): use "
            "the database that it was trained with, or build this one with --tokenizer"
        )
    return in_single_precision(params), config
