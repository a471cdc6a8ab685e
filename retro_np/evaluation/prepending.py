"""In-context retrieval: a baseline reads the neighbours at the start of its context, without cross-attention.

The neighbours of the previous chunk precede the text, the nearest one last. Nothing is trained. Each chunk needs its
own forward pass, because its neighbours differ from those of other chunks."""

import itertools

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import ScoredTokens, nats_of, scored_tokens
from retro_np.nn.model import hidden_states, readout
from retro_np.retrieval.database import Database
from retro_np.sequences import check_fit, evaluation_windows, sequence_chunks, sequence_neighbours
from retro_np.tree import Tree


def prepended(
    params: Tree, config: RetroConfig, database: Database, *, k: int = 2, sequence_length: int = 512,
    limit: int | None = None,
) -> ScoredTokens:  # fmt: skip
    """Score the held-out tokens with k neighbours in the model's context.

    The windows are those of `frozen_model`, and the arguments those of `score`. If neighbours and context exceed
    sequence_length, the start of the context is dropped. Raises UserError if less than a chunk of it could be left."""
    check_fit(config, database)
    m = config.chunk_size
    if 2 * k * m > sequence_length - 2 * m:
        raise UserError(f"{k} neighbours of {2 * m} tokens leave no context in {sequence_length} tokens: use fewer")
    split = database.split("valid")

    def predict(window, tokens, targets):
        neighbours = sequence_neighbours(database, split, window, k)
        return (prepended_nats(params, config, tokens, targets, neighbours, sequence_length),)

    windows = evaluation_windows(split, sequence_chunks(sequence_length, m), limit=limit)
    return scored_tokens(split, windows, predict, "prepended neighbours", limit)[0]


def prepended_nats(
    params: Tree, config: RetroConfig, tokens: np.ndarray, targets: np.ndarray, neighbours: np.ndarray, length: int
) -> np.ndarray:
    """Negative log-likelihood of each target, with neighbours in front of its context. (B, n) float64, 0 for −1.

    tokens, targets: (B, n); neighbours: (B, l, k, 2m). The neighbours of chunk u are read where CCA reads them: by
    chunk u's last token and by all but the last token of the next chunk. length: how many tokens the model may read."""
    nats, (m, n) = np.zeros(tokens.shape), (config.chunk_size, tokens.shape[1])
    for u in range(-1, n // m):  # the chunk whose neighbours are read; −1 for the first chunk, which reads none
        begin, end = max(0, (u + 1) * m - 1), min((u + 2) * m - 1, n)
        windows, prompts = np.flatnonzero((targets[:, begin:end] >= 0).any(axis=1)), []
        for b in windows:
            retrieved = neighbours[b, u, ::-1].reshape(-1) if u >= 0 else tokens[b, :0]
            retrieved = retrieved[retrieved != 0]
            prompts.append(np.concatenate([retrieved, tokens[b, :end][-(length - len(retrieved)) :]]))
        if prompts:
            # Padding follows the text, so no token sees it.
            padded = np.array(list(itertools.zip_longest(*prompts, fillvalue=0)), np.int64).T
            hidden = hidden_states(params, config, padded, None)
            read = np.stack([h[len(text) + begin - end : len(text)] for h, text in zip(hidden, prompts, strict=True)])
            nats[windows, begin:end] = nats_of(read @ readout(params, config), targets[windows, begin:end])
    return nats
