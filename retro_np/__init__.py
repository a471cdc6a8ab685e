"""RETRO, the retrieval-enhanced transformer, in NumPy: every forward and every backward written by hand."""

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.gradcheck import gradcheck
from retro_np.nn.model import retro, retro_loss
from retro_np.parameters import count_parameters, init_params, load_params, save_params
