"""RETRO, the retrieval-enhanced transformer, in NumPy: every forward and every backward written by hand."""

# ruff: noqa: E402
from retro_np import runtime

runtime.settle()  # before NumPy is loaded, or BLAS does not hear of it

from retro_np import reference
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.generation import generate
from retro_np.gradcheck import gradcheck
from retro_np.nn.model import retro, retro_loss
from retro_np.parameters import count_parameters, init_params, load_params, save_params
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.database import Database
from retro_np.training.adamw import adamw_init, adamw_update

__all__ = [
    "Database",
    "EncoderConfig",
    "RetroConfig",
    "adamw_init",
    "adamw_update",
    "count_parameters",
    "generate",
    "gradcheck",
    "init_params",
    "load_bert",
    "load_params",
    "reference",
    "retro",
    "retro_loss",
    "save_params",
]
