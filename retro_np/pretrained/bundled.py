"""The bundled models: a RETRO and its baseline, trained on Python's standard library, and their tokenizer."""

from pathlib import Path

from tokenizers import Tokenizer

from retro_np.checkpoint import load_params
from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.retrieval.tokenizer import load_tokenizer
from retro_np.tree import Tree

BUNDLED = Path(__file__).parent / "stdlib"
BASELINE, RETRO = "baseline", "retro"


def load_pretrained(name: str = RETRO) -> tuple[Tree, RetroConfig, Tokenizer]:
    """Load a bundled model: "retro", or "baseline" without retrieval.

    Returns parameters (float32), config and tokenizer. Raises UserError for other names, missing or damaged files."""
    if name not in (BASELINE, RETRO):
        raise UserError(f"no pretrained model {name!r}; choose {RETRO} or {BASELINE}")
    return *load_params(bundled_file(name)), load_tokenizer(BUNDLED / "tokenizer.json")


def bundled_file(name: str) -> Path:
    """The safetensors file of "retro" or "baseline"."""
    return BUNDLED / f"{name}.safetensors"
