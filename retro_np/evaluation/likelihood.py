"""What a model makes of a batch of windows: its hidden states, and the nats of each target, in bounded memory."""

import numpy as np

from retro_np.config import RetroConfig
from retro_np.kernels.threads import blocks, parallel_for
from retro_np.nn.memory import StateCache, model_neighbours
from retro_np.nn.model import hidden_states, readout
from retro_np.nn.operators import ROWS_PER_BLOCK, linear, log_softmax
from retro_np.sequences import model_tokens
from retro_np.tree import Tree

# Numbers that are computed together, 67 MB in float32. Batches of our own models are whole, so that no figure changes
# by a bit. The limit of their logits is for vocabularies of others, of more than 65,536 tokens.
MAX_NUMBERS, MAX_LOGITS_OF_OURS = 1 << 24, 1 << 28


def token_nats(
    params: Tree, config: RetroConfig, tokens: np.ndarray, targets: np.ndarray, neighbours: np.ndarray | None = None,
    cache: StateCache | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The nats of the targets, (B, n), 0 where there is none (−1), and the hidden states (B, n, d) that predict them.

    tokens, targets: (B, n), as `scored_windows` yields them; neighbours: a database's, (B, l, k, 2m). cache: of those
    that the model itself has encoded."""
    hidden = read(params, config, tokens, neighbours, cache)
    return readout_nats(params, config, hidden, targets), hidden


def read(
    params: Tree, config: RetroConfig, tokens: np.ndarray, neighbours: np.ndarray | None = None,
    cache: StateCache | None = None,
) -> np.ndarray:  # fmt: skip
    """The hidden states (B, n, d) of a database's tokens (B, n). Of a wide decoder, few windows are read together."""
    tokens = model_tokens(config, tokens)
    width = 4 * config.d_model + 8 * config.d_ffw  # about as many numbers as a layer computes for a token
    size = len(tokens) if config.is_retro else max(1, MAX_NUMBERS // (tokens.shape[1] * width))
    parts = []
    for rows in blocks(len(tokens), size):
        retrieved = None if neighbours is None else neighbours[rows]
        parts.append(hidden_states(params, config, tokens[rows], model_neighbours(params, config, retrieved, cache)))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def readout_nats(params: Tree, config: RetroConfig, hidden: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The nats of targets (...), from the hidden states (..., d) that predict them; 0 where the target is −1.

    The logits of a large vocabulary are computed for a part of the rows at a time."""
    matrix, flat, wanted = readout(params, config), hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    nats = np.zeros(wanted.shape, hidden.dtype)

    def score(rows: np.ndarray) -> None:
        logits, _ = linear(flat[rows], matrix)

        def fill(part: slice) -> None:
            nats[rows[part]] = nats_of(logits[part], wanted[rows[part]])

        parallel_for(fill, blocks(len(rows), ROWS_PER_BLOCK))

    # Of our own models the rows without a target are multiplied as well, which keeps the shape of the product.
    rows = np.arange(len(wanted)) if config.is_retro else np.flatnonzero(wanted >= 0)
    limit = MAX_LOGITS_OF_OURS if config.is_retro else MAX_NUMBERS
    for block in blocks(len(rows), max(1, limit // config.vocabulary_size)):
        score(rows[block])
    return nats.reshape(targets.shape)


def nats_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target in nats; 0 where the target is −1.

    logits: (..., V); targets: (...), integers. Returns (...)."""
    log_likelihood = np.take_along_axis(log_softmax(logits), np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return np.where(targets < 0, 0, -log_likelihood)
