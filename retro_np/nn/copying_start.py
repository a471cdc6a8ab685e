"""An initialisation that makes the encoder and CCA copy tokens. It is not in the paper; it helps small models."""

from typing import Any

import numpy as np

from retro_np.tree import Tree

# The scales of `init_copying` were tuned on the text of Python's standard library.
POSITION_FREQUENCIES = 20  # number of sinusoids that locate the next token
POSITION_SCALE = 3.4  # sharpness of the attention to the next token
NEXT_TOKEN_SCALE = 1.2  # share of the next token that the encoder adds to a token
DAMPING = 0.3  # scale of everything else that the encoder's first layer adds
MATCH_SCALE = 1.2  # sharpness of the attention to equal tokens
COPY_SCALE = 0.1  # share of the matching tokens that CCA adds to the residual stream


def init_copying(params: Tree, cca_layers: tuple[int, ...], encoder: Any) -> None:
    """Initialise CCA to find the current token in the neighbours and copy the token after it, in place.

    This is not in the paper. The encoder's embedding starts as a copy of the decoder's. A shared table would receive
    both gradients, and the decoder would learn its language more slowly. In the encoder's first layer, the first head
    attends to the next token by position alone, because the sinusoids of distance δ, shifted by one, peak at δ = −1. It
    adds a copy of the next token to each token; everything else that the layer adds is damped. In CCA, w_k = w_q makes
    a query match the keys of equal tokens, and w_o is a multiple of w_vᵀ, which adds the matching token, together with
    its next token, to the residual stream."""
    if "embedding" in params["encoder"]:
        params["encoder"]["embedding"] = params["embedding"].copy()
    first_layer = params["encoder"]["layers"][0]
    attention, c, width = first_layer["attention"], encoder.d_head, encoder.d_model
    half, count = width // 2, min(width // 2, POSITION_FREQUENCIES)
    frequencies = 10000.0 ** (-2 * np.arange(count) / width)
    peak = np.zeros(width, np.float32)
    peak[:count], peak[half : half + count] = -np.sin(frequencies), np.cos(frequencies)
    for name in ("w_q", "w_k", "w_r"):
        attention[name][:, :c] = 0
    attention["w_r"][:, 0], attention["v"][0, 0] = POSITION_SCALE * peak, POSITION_SCALE
    attention["w_o"][c:] *= DAMPING
    attention["w_o"][:c] = NEXT_TOKEN_SCALE * attention["w_v"][:, :c].T
    for name, matrix in (("ffw", "w_out"), ("cross_attention", "w_o")):
        if name in first_layer:
            first_layer[name][matrix] *= DAMPING
    for p in cca_layers:
        cca = params["layers"][p - 1]["cca"]
        cca["w_q"] *= MATCH_SCALE
        cca["w_k"], cca["w_o"] = cca["w_q"].copy(), COPY_SCALE * cca["w_v"].T
