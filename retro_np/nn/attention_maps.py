"""What each attention in a model attends to, for inspection."""

import numpy as np

from retro_np.config import RetroConfig
from retro_np.nn.cca import attending_chunks
from retro_np.nn.model import hidden_and_vjp
from retro_np.nn.scope import Scope
from retro_np.tree import Array, Tree


def attention_maps(params: Tree, config: RetroConfig, tokens: Array, neighbours: Array | None) -> dict[str, Array]:
    """The weights of every attention in the model, by the dotted name of its block.

    The arguments are those of `retro`; nothing is dropped. Raises UserError as `retro` does.
    Layers P count from 0, as in the names of a checkpoint. The shapes are, with l = floor(n / m):
    `layers.P.attention` (B, h, n, n): query, then key.
    `layers.P.cca` (B, l, h, m, k, r): query i of the attending chunk H_u^+, then neighbour and its token. With u
        counted from 1 and i from 0, this query is token u·m − 1 + i of the sequence, counted from 0.
    `encoder.layers.P.attention` (B, l, k, h, r, r): query, then key.
    `encoder.layers.P.cross_attention` (B, l, h, k, r, m): the neighbour's token is the query, the chunk's is the key.
    The weights of each query sum to 1, or are 0 if it has no key. In a layer with a memory (nn/memory.py), the sum is
    over both `attention` and `cca`."""
    weights_of: dict[str, Array] = {}
    hidden_and_vjp(params, config, tokens, neighbours, Scope(watch=weights_of.__setitem__, gradients=False))
    batch, k = len(tokens), 0 if neighbours is None else np.shape(neighbours)[2]
    for name in [name for name in weights_of if name.endswith(".share")]:
        share, own, read = weights_of.pop(name), name.replace("share", "attention"), name.replace("share", "cca")
        in_chunks = attending_chunks(share, len(weights_of[read]) // batch, config.chunk_size)
        weights_of[own] = weights_of[own] * (1 - share).transpose(0, 2, 1)[:, :, None, :, None, None]
        by_query = in_chunks.reshape(-1, *in_chunks.shape[2:]).transpose(0, 2, 1)
        weights_of[read] = weights_of[read] * by_query[:, :, None, :, None, None]

    # The weights are (B', h, g, n, k', r'), where B' counts sequences, their chunks, or the chunks' neighbours.
    def shaped(name: str, weights: Array) -> Array:
        if name.endswith("cca"):
            return weights[:, :, 0].reshape(batch, -1, *weights.shape[1:2], *weights.shape[3:])
        if name.endswith("cross_attention"):
            return weights[..., 0, :].reshape(batch, -1, *weights.shape[1:4], weights.shape[-1])
        square = weights[:, :, 0, :, 0]
        return square.reshape(batch, -1, k, *square.shape[1:]) if name.startswith("encoder") else square

    return {name: shaped(name, weights) for name, weights in weights_of.items()}
