"""The bundled models: a RETRO and its baseline, trained on Python's standard library, and a memory for SmolLM2."""

import re
from collections.abc import Iterable
from pathlib import Path

from retro_np.checkpoint import ANOTHER, base_of, config_in, read_meta, read_tensors, write_tensors
from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files.untrusted import checked_tensor
from retro_np.nn.memory import is_added
from retro_np.tree import Tree, map_tree

BUNDLED = Path(__file__).parent / "stdlib"
MEMORY = Path(__file__).parent / "smollm2" / "memory.safetensors"
BASELINE, RETRO = "baseline", "retro"
HEXADECIMAL = re.compile("[0-9a-f]{16,64}")


def bundled_file(name: str) -> Path:
    """The safetensors file of "retro" or "baseline"."""
    return BUNDLED / f"{name}.safetensors"


def trained_on(model: Path | str) -> frozenset[str]:
    """The documents that a model was trained on: the first 16 hexadecimal digits of each text's SHA-256.

    model: "retro" or "baseline", as in `read_pretrained`, or the path of a checkpoint or a run's folder. The bundled
    models carry these hashes, and so do the checkpoints of runs that began from one. Other checkpoints give none.
    Raises UserError for anything else in their place."""
    path = bundled_file(model) if model in (BASELINE, RETRO) else model
    meta = read_meta(path)
    digests = meta.get("trained_on", meta.get("run", {}).get("data", {}).get("trained_on", []))
    if not isinstance(digests, list) or not all(isinstance(d, str) and HEXADECIMAL.fullmatch(d) for d in digests):
        raise UserError(f"{path}: 'trained_on' in its metadata is not a list of hashes: {ANOTHER}")
    return frozenset(digests)


def begun_as_bundled(params: Tree, config: RetroConfig, sha256: str) -> Tree | None:
    """The parameters of a decoder with an untrained memory, with the bundled memory in that one's place.

    params, config: as `add_memory` returns them. sha256: the decoder's. None if the bundled memory is of another
    decoder, other layers or another rank. Raises UserError if its file is damaged."""
    tensors, meta = read_tensors(MEMORY)
    stored, base = config_in(meta, MEMORY), base_of(meta, MEMORY)
    form = ("cca_layers", "rank", "changed")
    if not base or base["sha256"] != sha256 or any(getattr(stored, f, None) != getattr(config, f) for f in form):
        return None
    return map_tree(
        lambda name, leaf: checked_tensor(tensors, MEMORY, name, leaf.shape, ANOTHER) if is_added(name) else leaf,
        params,
    )


def write_memory(run: Path | str, hashes: Iterable[str], out: Path = MEMORY) -> None:
    """Write the memory that a run trained as the bundled one: without AdamW's moments, so that no run resumes from it.

    run: a run's folder or checkpoint. hashes: of the documents that it was trained on, as in `trained_on`. The file
    names the memory's base, its configuration and the settings of its training. Raises UserError if `run` is a model of
    its own."""
    tensors, meta = read_tensors(run, lambda name: not name.startswith("adamw."))
    if not base_of(meta, run):
        raise UserError(f"{run} holds a whole model, not a memory of one: give a run of train --retrofit")
    settings = {"training": meta.get("run", {}).get("training", {})}
    stored = {"base": meta["base"], "config": meta["config"], "run": settings, "trained_on": sorted(hashes)}
    write_tensors(out, tensors, stored)
