"""Curriculum for small models, not in the paper and off by default: oracle neighbours, and sequences without any.

A decoder that does not copy learns nothing from its neighbours, and neighbours that seldom contain the next tokens
teach no copying. A small run ends before this deadlock is broken. So early in training some chunks get an oracle
neighbour, which no retrieval could find: a noisy, shifted copy of the chunk itself and its own continuation. The share
of such chunks falls linearly to 0. Evaluation never uses oracle neighbours.

Some sequences are trained without neighbours, so that the decoder stays a good language model with retrieval off.
"""

import numpy as np

from retro_np.training.config import TrainingConfig

STREAM = 7  # keeps these random draws apart from those of batches and dropout
MAX_NOISE = 0.4  # the largest share of an oracle neighbour's tokens that are replaced at random


def with_curriculum(neighbours, tokens, training: TrainingConfig, step: int) -> np.ndarray:
    """A step's neighbours after the curriculum: a function of the seed and the step's number.

    neighbours: (B, l, k, 2m), as retrieved; tokens: (B, n), the sequences. The oracle neighbour of chunk u is 2m tokens
    of the same sequence that start within m / 2 of the chunk's start. Returns (B, l, k, 2m).
    """
    share = training.oracle_share * max(0.0, 1 - step / training.oracle_steps) if training.oracle_steps else 0.0
    if share == 0 and training.retrieval_off == 0:
        return neighbours
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([training.seed, step, STREAM])))
    neighbours = neighbours.copy()
    if share:
        insert_oracle_neighbours(neighbours, tokens, share, rng)
    neighbours[rng.random(len(neighbours)) < training.retrieval_off] = 0
    return neighbours


def insert_oracle_neighbours(neighbours, tokens, share: float, rng: np.random.Generator) -> None:
    """Replace one neighbour of a share of the chunks by a noisy copy of the chunk and its continuation. In place."""
    batch, n_chunks, k, r = neighbours.shape
    m = r // 2
    b, u = np.nonzero(rng.random((batch, n_chunks)) < share)
    start = u * m + rng.integers(-(m // 2), m // 2 + 1, len(b))
    position = start[:, None] + np.arange(r)
    copies = np.where((position >= 0) & (position < tokens.shape[1]), tokens[b[:, None], position % tokens.shape[1]], 0)
    noise = rng.random((len(b), 1)) * MAX_NOISE
    others = rng.choice(tokens.reshape(-1), copies.shape)
    replaced = (rng.random(copies.shape) < noise) & (copies != 0)
    neighbours[b, u, rng.integers(0, k, len(b))] = np.where(replaced, others, copies)
