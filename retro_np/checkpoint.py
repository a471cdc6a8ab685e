"""Parameters and training runs on disk, as safetensors files with a JSON value in the header."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import write_atomically
from retro_np.parameters import check_tree, parameter_shapes
from retro_np.retrieval.database import Database
from retro_np.sequences import check_fit
from retro_np.tree import Tree, map_tree, named_leaves


def save_params(path: Path | str, params: Tree, config: RetroConfig) -> None:
    """Write a model to one safetensors file.

    path: the file, which is replaced if it exists; an interrupted write leaves the old file. params: arrays of any
    floating dtype, stored unchanged and named by their dotted path (`layers.0.attention.w_q`). config: stored with the
    arrays. The same input gives the same bytes. Raises UserError if params does not have the tree of config, or if the
    file cannot be written.
    """
    check_tree(params, config)
    write_tensors(path, dict(named_leaves(params)), {"config": config.to_dict()})


def load_params(path: Path | str) -> tuple[Tree, RetroConfig]:
    """Read a model that `save_params` or a training run wrote.

    Returns (params, config). The arrays are float32, or float64 if stored as float64; half precision becomes
    float32. Raises UserError if the file is missing or damaged, was not written by retro_np, or does not hold the
    tensors that its configuration describes.
    """
    tensors, meta = read_tensors(path, lambda name: not name.startswith("adamw."))
    config = _config_in(meta, path)
    return _tree_of(tensors, config, path), config


def load_model(path: Path | str, database: Database) -> tuple[Tree, RetroConfig]:
    """Read a model that will retrieve from a database. Returns (params, config), as `load_params` does.

    Besides the errors of `load_params`, raises UserError if the model and the database differ in vocabulary size or
    chunk size, or if the checkpoint was trained with a different tokenizer, in which the same ids mean other tokens.
    """
    params, config = load_params(path)
    check_fit(config, database)
    entry: Any = read_meta(path)
    for name in ("run", "data", "tokenizer"):
        if entry is not None and not isinstance(entry, dict):
            raise UserError(
                f"{path}: {name!r} is missing from the metadata of its training run: use another checkpoint"
            )
        entry = None if entry is None else entry.get(name)
    expected, folder = database.identity["tokenizer"], database.path
    if entry not in (None, expected):  # a file that holds only parameters names no tokenizer
        raise UserError(
            f"{path} was trained with a different tokenizer ({entry!s:.6}…) from that of {folder} ({expected[:6]}…): "
            f"use the database that it was trained with, or rebuild {folder} with that tokenizer (--tokenizer)"
        )
    return params, config


def save_checkpoint(path: Path | str, params: Tree, state: Tree, config: RetroConfig, run: dict[str, Any]) -> None:
    """Write a training run's parameters, AdamW's moments and step, and `run`, the plain values that identify it."""
    moments = named_leaves({"m": state["m"], "v": state["v"]}, "adamw")
    tensors = dict(named_leaves(params)) | {name: moment for name, moment in moments if moment is not None}
    write_tensors(path, tensors, {"config": config.to_dict(), "run": run, "step": state["step"]})


def load_checkpoint(path: Path | str) -> tuple[Tree, Tree, RetroConfig, dict[str, Any]]:
    """Read a training run's checkpoint, to resume it. Returns (params, AdamW's state, config, run).

    Raises the errors of `load_params`, and UserError for a file that holds only parameters.
    """
    tensors, meta = read_tensors(path)
    config = _config_in(meta, path)
    if "run" not in meta or "step" not in meta:
        raise UserError(f"{path} holds only parameters, so training cannot resume: use it to evaluate or sample")
    params = _tree_of(tensors, config, path)
    moments = {key: map_tree(lambda name, _: tensors.get(name), params, f"adamw.{key}") for key in ("m", "v")}
    return params, {"step": meta["step"], **moments}, config, meta["run"]


def write_tensors(path: Path | str, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write tensors, and a JSON value in the file's header. The same input gives the same bytes."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # safetensors writes several metadata entries in no fixed order, so there is only one
    write_atomically(path, save(contiguous, {"retro_np": json.dumps(meta, sort_keys=True)}))


def read_tensors(
    path: Path | str, selects: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the tensors whose names are selected, and the JSON value in the header.

    Raises UserError for a file that retro_np did not write.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a .safetensors file that a training run wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get("retro_np", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys() if selects(name)}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): use another checkpoint") from error
    except TypeError as error:  # for example bfloat16
        raise UserError(f"{path} has tensors that NumPy cannot hold ({error}): convert them to float32") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} was not written by retro_np: its metadata has no configuration")
    return tensors, meta


def read_meta(path: Path | str) -> dict[str, Any]:
    """The JSON value in a file's header, read without the tensors."""
    return read_tensors(path, lambda name: False)[1]


def _config_in(meta: dict, path) -> RetroConfig:
    try:
        return RetroConfig(**meta["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} has no retro_np configuration ({error}): use a file that save_params or a training run wrote"
        ) from error


def _tree_of(tensors: dict[str, np.ndarray], config: RetroConfig, path) -> Tree:
    """Arrange named tensors as the tree of `config`, after checking each one's presence, shape, dtype and values."""

    def leaf(name, shape):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != tuple(shape):
            actual = "absent" if tensor is None else f"of shape {tensor.shape}"
            raise UserError(f"{path}: {name} is {actual}, but its configuration needs shape {tuple(shape)}")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise UserError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
        if not np.all(np.isfinite(tensor)):
            raise UserError(f"{path}: {name} is not finite everywhere: the file is damaged; use another checkpoint")
        return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor  # half precision is only for storage

    return map_tree(leaf, parameter_shapes(config))
