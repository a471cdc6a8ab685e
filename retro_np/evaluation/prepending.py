"""In-context retrieval: what RETRO reads by cross-attention, put in front of a plain baseline's context instead.

The baseline sees the neighbours of the chunk before as text that came first, the nearest last. Nothing is trained, and
each chunk costs a forward of its own: its neighbours are not those of the chunk before.
"""

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import nats_of
from retro_np.evaluation.knn_lm import ScoredTokens, in_order, places_of
from retro_np.nn.model import hidden_states, readout
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.sequences import check_fit, evaluation_windows, scored_windows, sequence_chunks, sequence_neighbours

PROMPTS_A_BATCH = 16


def prepended(
    params,
    config: RetroConfig,
    database: Database,
    *,
    k: int = 2,
    sequence_length: int = 512,
    limit: int | None = None,
    retrieval: Retrieval | None = None,
) -> ScoredTokens:
    """A model with k neighbours in its context, at the held-out tokens that `score` scores; retrieval as there.

    Windows are `frozen_model`'s. Where neighbours and context are more than sequence_length together, the context's
    beginning gives way. Raises UserError where that would leave less context than a chunk.
    """
    check_fit(config, database)
    m = config.chunk_size
    length = sequence_chunks(sequence_length, m)
    if 2 * k * m > sequence_length - 2 * m:
        raise UserError(f"{k} neighbours of {2 * m} tokens leave no context in {sequence_length}: take fewer")
    retrieval = retrieval or Retrieval.own(database, "valid")
    split, found = retrieval.split, []
    rows, first = evaluation_windows(split, length, max(1, length // 2), limit)
    with progress_bar("prepended neighbours", len(rows)) as advance:
        for window, tokens, targets in scored_windows(split, rows, first):
            neighbours = sequence_neighbours(retrieval.database, split, window, k)
            nats = prepended_nats(params, config, tokens, targets, neighbours, sequence_length)
            b, t = np.nonzero(targets)
            found.append((places_of(window, b, t, m), targets[b, t], nats[b, t]))
            advance(len(window))
    places, tokens, nats = in_order(found)
    within = np.searchsorted(places, len(split.tokens[:limit]) * m)
    return ScoredTokens(places[:within], tokens[:within], nats[:within])


def prepended_nats(params, config: RetroConfig, tokens, targets, neighbours, sequence_length: int) -> np.ndarray:
    """Negative log-likelihood of each target, the neighbours in front of its context: (B, n) float64, 0 for padding.

    tokens, targets: (B, n); neighbours: (B, l, k, 2m), those of chunk u for what chunk u's last token and the next
    chunk's others predict, which is where CCA has them.
    """
    prompts = list(_prompts(tokens, targets, neighbours, config.chunk_size, sequence_length))
    prompts.sort(key=lambda prompt: len(prompt[0]))
    nats = np.zeros(tokens.shape)
    for start in range(0, len(prompts), PROMPTS_A_BATCH):
        batch = prompts[start : start + PROMPTS_A_BATCH]
        padded = np.zeros((len(batch), len(batch[-1][0])), np.int64)  # behind the text, where no token looks
        for row, (text, _, _) in enumerate(batch):
            padded[row, : len(text)] = text
        hidden = hidden_states(params, config, padded, None)
        scored = [hidden[row, len(text) - len(t) : len(text)] for row, (text, _, t) in enumerate(batch)]
        b, t = (np.concatenate([np.broadcast_to(prompt[i], prompt[2].shape) for prompt in batch]) for i in (1, 2))
        nats[b, t] = nats_of(np.concatenate(scored) @ readout(params, config), targets[b, t])
    return nats


def _prompts(tokens, targets, neighbours, m, sequence_length):
    """For each chunk of each window: neighbours and context up to the last position scored, the window, positions."""
    batch, n = tokens.shape
    for b in range(batch):
        for u in range(-1, n // m):  # whose neighbours are read; −1: none, in the first chunk
            begin, end = max(0, (u + 1) * m - 1), min((u + 2) * m - 1, n)
            if not targets[b, begin:end].any():
                continue
            retrieved = neighbours[b, u, ::-1].reshape(-1) if u >= 0 else np.empty(0, np.int64)
            retrieved = retrieved[retrieved != 0]
            context = tokens[b, :end][-(sequence_length - len(retrieved)) :]
            yield np.concatenate([retrieved, context]), b, np.arange(begin, end)
