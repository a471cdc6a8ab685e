"""RETRO, the retrieval-enhanced transformer, in NumPy: every forward and every backward pass written by hand.

The core needs NumPy alone and is imported at once. The data layer, training and evaluation load on first use, with
the packages that they need.
"""

# ruff: noqa: E402
import importlib
from typing import TYPE_CHECKING, Any

from retro_np import runtime

runtime.settle()  # before NumPy is loaded: OpenBLAS reads its settings only once

from retro_np import reference
from retro_np.checking import GradientError, gradcheck
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.nn.model import attention_maps, hidden_states, retro, retro_loss
from retro_np.optim import adamw_init, adamw_update
from retro_np.parameters import count_parameters, init_params

__version__ = "0.2.0"

if TYPE_CHECKING:  # type checkers and editors do not run __getattr__
    from retro_np.checkpoint import load_params, save_params
    from retro_np.evaluation.bits_per_byte import score
    from retro_np.evaluation.compare import evaluate
    from retro_np.generation import generate
    from retro_np.pretrained.bundled import load_pretrained
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.build import BuildConfig, build_database
    from retro_np.retrieval.database import Database
    from retro_np.training.config import TrainingConfig
    from retro_np.training.loop import retrofit, train

_ON_FIRST_USE = {
    "BuildConfig": "retrieval.build",
    "Database": "retrieval.database",
    "TrainingConfig": "training.config",
    "build_database": "retrieval.build",
    "evaluate": "evaluation.compare",
    "generate": "generation",
    "load_bert": "retrieval.bert",
    "load_params": "checkpoint",
    "load_pretrained": "pretrained.bundled",
    "retrofit": "training.loop",
    "save_params": "checkpoint",
    "score": "evaluation.bits_per_byte",
    "train": "training.loop",
}

__all__ = [
    "BuildConfig",
    "Database",
    "EncoderConfig",
    "GradientError",
    "RetroConfig",
    "TrainingConfig",
    "UserError",
    "__version__",
    "adamw_init",
    "adamw_update",
    "attention_maps",
    "build_database",
    "count_parameters",
    "evaluate",
    "generate",
    "gradcheck",
    "hidden_states",
    "init_params",
    "load_bert",
    "load_params",
    "load_pretrained",
    "reference",
    "retro",
    "retro_loss",
    "retrofit",
    "save_params",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name of the data layer, training or evaluation when it is first used (PEP 562)."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
