"""RETRO, the retrieval-enhanced transformer, in NumPy, with every forward and backward pass written by hand.

Importing this package loads the core, which needs only NumPy. The names of the data layer, training and evaluation load
on first use, together with the packages that they need."""

# ruff: noqa: E402
import importlib
import sys
from typing import TYPE_CHECKING, Any

from retro_np import runtime

runtime.tune()  # before the import of NumPy, so that OpenBLAS, if it is not loaded yet, starts with its settings

from retro_np import reference
from retro_np.checking import gradcheck
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import GradientError, GradientReport, UserError
from retro_np.nn.model import hidden_states, retro, retro_loss
from retro_np.optim import adamw_init, adamw_update
from retro_np.parameters import count_parameters, init_params

__version__ = "0.2.0"

if TYPE_CHECKING:  # Type checkers and editors do not run __getattr__.
    from retro_np.checkpoint import load_params, save_params
    from retro_np.evaluation.bits_per_byte import score, score_tokens
    from retro_np.evaluation.bootstrap import paired_bootstrap
    from retro_np.evaluation.compare import evaluate
    from retro_np.generation import generate
    from retro_np.nn.attention_maps import attention_maps
    from retro_np.nn.decoders import DecoderConfig
    from retro_np.pretrained.bundled import trained_on
    from retro_np.pretrained.models import load_pretrained
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.build import BuildConfig, build_database
    from retro_np.retrieval.database import Database
    from retro_np.training.config import TrainingConfig
    from retro_np.training.loop import retrofit, train

_ON_FIRST_USE = {
    "BuildConfig": "retrieval.build", "build_database": "retrieval.build", "load_pretrained": "pretrained.models",
    "Database": "retrieval.database", "load_bert": "retrieval.bert", "generate": "generation", "train": "training.loop",
    "TrainingConfig": "training.config", "evaluate": "evaluation.compare", "score": "evaluation.bits_per_byte",
    "score_tokens": "evaluation.bits_per_byte", "paired_bootstrap": "evaluation.bootstrap", "retrofit": "training.loop",
    "DecoderConfig": "nn.decoders", "attention_maps": "nn.attention_maps",
    "load_params": "checkpoint", "save_params": "checkpoint", "trained_on": "pretrained.bundled",
}  # fmt: skip

__all__ = [
    "BuildConfig", "Database", "DecoderConfig", "EncoderConfig", "GradientError", "GradientReport", "RetroConfig",
    "TrainingConfig", "UserError", "__version__", "adamw_init", "adamw_update", "attention_maps", "build_database",
    "count_parameters", "evaluate", "generate", "gradcheck", "hidden_states", "init_params", "load_bert", "load_params",
    "load_pretrained", "paired_bootstrap", "reference", "retro", "retro_loss", "retrofit", "save_params", "score",
    "score_tokens", "train", "trained_on",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name of the data layer, training or evaluation when it is first used (PEP 562).

    Raises ImportError, which names the package to install, if a package that the name needs is missing."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)
    except ImportError as error:
        package = (error.name or __name__).partition(".")[0]
        if sys.modules.get(package):  # The package is installed, so something else is wrong.
            raise
        line = f"{__name__}.{name} needs {package}, which is not installed: pip install {package}"
        raise ImportError(line, name=package) from error
    return globals()[name]


def __dir__() -> list[str]:
    """All public names, including those that are not loaded yet."""
    return sorted({*globals(), *__all__})
