"""Parameters and training runs on disk, as safetensors files with a JSON value in the header."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import write_atomically
from retro_np.files.untrusted import checked_tensor, has_types, parse_json, read_safetensors, reporting
from retro_np.nn.scope import every
from retro_np.parameters import check_tree, parameter_shapes
from retro_np.retrieval.database import Database
from retro_np.sequences import check_fit
from retro_np.tree import Tree, map_tree, named_leaves

CHECKPOINT = "checkpoint.safetensors"  # in a run's folder
ANOTHER = "use another checkpoint"
FOLDER = "of a model that others trained, give the folder"


def save_params(path: Path | str, params: Tree, config: RetroConfig) -> None:
    """Write a model to one safetensors file.

    path: the file, which is replaced if it exists; an interrupted write leaves the old file. params: arrays of any
    floating dtype, stored unchanged and named by their dotted path (`layers.0.attention.w_q`). config: stored with the
    arrays. The same input gives the same bytes. Raises UserError if params lacks config's tree or writing fails."""
    check_tree(params, config, storing=True)
    write_tensors(path, dict(named_leaves(params)), {"config": config.to_dict()})


def load_params(path: Path | str, given: dict[str, np.ndarray] | None = None) -> tuple[Tree, RetroConfig]:
    """Read a model that `save_params` or a training run wrote.

    path: the file, or the run's folder. given: by name, the parameters of a base, to which the file adds others; for
    such a file `load_pretrained` finds the base by itself. Returns (params, config). The arrays are float32, or float64
    if stored as float64; float16 and bfloat16 become float32. Raises UserError if the file is missing, damaged, not of
    retro_np, or not what its configuration needs."""
    return _model_in(*read_tensors(path, lambda name: not name.startswith("adamw.")), path, given)


def load_model(path: Path | str, database: Database) -> tuple[Tree, RetroConfig]:
    """Read a model that will retrieve from a database. Returns (params, config), as `load_params` does.

    Raises the errors of `load_params` and `fitted`."""
    params, config = load_params(path)
    tokenizer = read_meta(path).get("run", {}).get("data", {}).get("tokenizer")
    return params, fitted(config, database, tokenizer, path)


def fitted(config: RetroConfig, database: Database, tokenizer: str | None, name: Path | str) -> RetroConfig:
    """The configuration for use with a database: a decoder of others has no chunks, so it takes the database's.

    So does a model of ours that does not retrieve, if the database has nothing to retrieve. tokenizer: the hash of the
    model's, or None if only parameters were stored. name: what errors call the model. Raises UserError if the model and
    the database do not fit, for example with different tokenizers, in which the same ids mean other tokens."""
    if tokenizer not in (None, expected := database.identity["tokenizer"]):
        fault = f"a different tokenizer ({tokenizer!s:.6}…) from that of {database.path} ({expected[:6]}…)"
        hint = f"build another database, retro-np build CORPUS -o DB --tokenizer {name}"
        raise UserError(f"{name} has {fault}: use a database with the model's tokenizer, or {hint}")
    if not config.retrieves and (not config.is_retro or not database.n_chunks):
        config = replace(config, chunk_size=database.chunk_size)
    check_fit(config, database)
    return config


def save_checkpoint(
    path: Path | str, params: Tree, state: Tree, config: RetroConfig, run: dict[str, Any],
    base: dict[str, Any] | None = None, selects: Callable[[str], bool] = every,
) -> None:  # fmt: skip
    """Write a training run's parameters, AdamW's moments and step, and `run`, the plain values that identify it.

    base: {"base": {"name": …, "sha256": …}}, the model that the selected parameters are added to; the others are its.
    Raises UserError if a value is not finite; then the file, the last good checkpoint, is left as it was."""
    moments = named_leaves({"m": state["m"], "v": state["v"]}, "adamw")
    tensors = {name: leaf for name, leaf in named_leaves(params) if selects(name)}
    tensors |= {name: moment for name, moment in moments if moment is not None}
    write_tensors(path, tensors, {"config": config.to_dict(), "run": run, "step": state["step"], **(base or {})})


def load_checkpoint(
    path: Path | str, given: dict[str, np.ndarray] | None = None
) -> tuple[Tree, Tree, RetroConfig, dict[str, Any]]:
    """Read a training run's checkpoint, to resume it. Returns (params, AdamW's state, config, run).

    given: as in `load_params`. Raises the errors of `load_params`, and UserError for a file of parameters alone."""
    tensors, meta = read_tensors(path)
    if "run" not in meta or "step" not in meta:
        raise UserError(f"{path} holds only parameters, so training cannot resume: use it to evaluate or sample")
    params, config = _model_in(tensors, meta, path, given)

    frozen = meta["run"].get("data", {}).get("frozen")

    def moment(name, parameter):  # A frozen parameter has none.
        trained = isinstance(frozen, list) and name.split(".", 2)[2] not in frozen
        return checked_tensor(tensors, path, name, parameter.shape, ANOTHER) if trained or name in tensors else None

    moments = {key: map_tree(moment, params, f"adamw.{key}") for key in ("m", "v")}
    return params, {"step": meta["step"], **moments}, config, meta["run"]


def write_tensors(path: Path | str, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write tensors, and a JSON value in the file's header. The same input gives the same bytes."""
    for name, tensor in tensors.items():
        if not np.all(np.isfinite(tensor)):
            raise UserError(f"{name} is not finite everywhere, so {path} was not written: use a lower learning rate")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # safetensors writes several metadata entries in no fixed order, so there is only one
    write_atomically(path, save(contiguous, {"retro_np": json.dumps(meta, sort_keys=True)}))


def read_tensors(
    path: Path | str, selects: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the tensors whose names are selected, and the JSON value in the header, from a file or a run's folder.

    The value has "config", and for a training run "run" and "step". Raises UserError for any other file."""
    path = checkpoint_file(path)
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: give a run's folder, or a .safetensors file that a run wrote")
    tensors, metadata = read_safetensors(path, selects, ANOTHER)
    if "retro_np" not in metadata:
        raise UserError(f"{path} was not written by retro_np: its metadata has no configuration; {FOLDER}")
    meta = parse_json(metadata["retro_np"], f"the metadata of {path}", hint=ANOTHER)
    run = meta.get("run", {})
    if not isinstance(run, dict) or not all(isinstance(run.get(n, {}), dict) for n in ("model", "training", "data")):
        raise UserError(f"{path}: 'run' is missing from the metadata or does not describe a training run: {ANOTHER}")
    if "step" in meta and not has_types(meta, {"step": int}):
        raise UserError(f"{path}: 'step' in its metadata is not a number of steps: {ANOTHER}")
    return tensors, meta


def checkpoint_file(path: Path | str) -> Path:
    """The checkpoint in a run's folder, or the file itself."""
    # Unlike Path's methods, those of os.path accept names that are too long.
    return Path(path) / CHECKPOINT if os.path.isdir(path) else Path(path)


def read_meta(path: Path | str) -> dict[str, Any]:
    """The JSON value in a file's header, read without the tensors."""
    return read_tensors(path, lambda name: False)[1]


def config_in(meta: dict[str, Any], path: Path | str) -> RetroConfig:
    """The configuration in a file's metadata. Raises UserError if there is none, or if no model can have it."""
    with reporting(f"{path} has no retro_np configuration", "use a file that save_params or a training run wrote"):
        try:
            if "architecture" not in meta["config"]:
                return RetroConfig(**meta["config"])
            from retro_np.nn.decoders import DecoderConfig

            return DecoderConfig(**meta["config"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def base_of(meta: dict[str, Any], path: Path | str) -> dict[str, str] | None:
    """Name and sha256 of the model that a file's parameters are added to; None for a file that holds a whole model."""
    base = meta.get("base")
    if base is not None and not has_types(base, {"name": str, "sha256": str}):
        raise UserError(f"{path}: 'base' in its metadata does not name a model: {ANOTHER}")
    return base


def _model_in(
    tensors: dict[str, np.ndarray], meta: dict[str, Any], path: Path | str, given: dict[str, np.ndarray] | None
) -> tuple[Tree, RetroConfig]:
    """The configuration in the metadata, and the tensors as the tree that it describes, checked."""
    config, base = config_in(meta, path), base_of(meta, path)
    if base and not given:
        raise UserError(f"{path} holds only what was added to {base['name']:.80}: read it with load_pretrained")
    tensors = {**(given or {}), **tensors}
    n_layers = config.n_layers + (config.encoder.n_layers if config.retrieves and config.encoder else 0)
    if n_layers > len(tensors):  # Each layer has several tensors. The tree of millions of layers is not built.
        raise UserError(f"{path} has {len(tensors)} tensors, but its configuration has {n_layers:,} layers: {ANOTHER}")
    return map_tree(partial(checked_tensor, tensors, path, hint=ANOTHER), parameter_shapes(config)), config
