"""The bundled models: a RETRO and its baseline, trained on Python's standard library, and their tokenizer."""

import re
from pathlib import Path

from retro_np.checkpoint import ANOTHER, read_meta
from retro_np.errors import UserError

BUNDLED = Path(__file__).parent / "stdlib"
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
