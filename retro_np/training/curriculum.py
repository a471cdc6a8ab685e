"""A curriculum for small models: oracle neighbours, and sequences without neighbours. Off by default; not in the paper.

A decoder that does not copy learns nothing from its neighbours, and neighbours that rarely contain the next tokens do
not teach it to copy. A small run ends before it escapes from this deadlock. So early in training some chunks get an
oracle neighbour: a noisy, shifted copy of the chunk and its continuation, which no retrieval could find. Their share
falls linearly to 0; evaluation has none. Some sequences get no neighbours, so that the decoder stays good alone."""

import numpy as np

from retro_np.kernels import Array
from retro_np.training.config import TrainingConfig

CURRICULUM_STREAM = 7  # separates these random numbers from those of batches and dropout
MAX_NOISE = 0.4  # the largest share of an oracle neighbour's tokens that random tokens replace


def with_curriculum(neighbours: Array, tokens: Array, training: TrainingConfig, step: int, padding: int = 0) -> Array:
    """Apply the curriculum to a step's neighbours. The result depends on the seed and the step's number alone.

    neighbours: (B, l, k, 2m), as retrieved, left unchanged; tokens: (B, n), the sequences; padding: its id. Returns
    (B, l, k, 2m)."""
    share = training.oracle_share * max(0.0, 1 - step / training.oracle_steps) if training.oracle_steps else 0.0
    if share == 0 and training.retrieval_off == 0:
        return neighbours
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([training.seed, step, CURRICULUM_STREAM])))
    neighbours = neighbours.copy()
    if share:
        insert_oracle_neighbours(neighbours, tokens, share, rng, padding)
    neighbours[rng.random(len(neighbours)) < training.retrieval_off] = padding
    return neighbours


def insert_oracle_neighbours(
    neighbours: Array, tokens: Array, share: float, rng: np.random.Generator, padding: int = 0
) -> None:
    """Give a share of the chunks an oracle neighbour in place of a retrieved one. Changes `neighbours` in place.

    The oracle neighbour of chunk u is a noisy copy of 2m tokens of its sequence, which start within m / 2 tokens of the
    chunk's own start. Arguments as in `with_curriculum`."""
    batch, n_chunks, k, r = neighbours.shape
    m = r // 2
    b, u = np.nonzero(rng.random((batch, n_chunks)) < share)
    start = u * m + rng.integers(-(m // 2), m // 2 + 1, len(b))
    position = start[:, None] + np.arange(r)
    inside = (position >= 0) & (position < tokens.shape[1])
    copies = np.where(inside, tokens[b[:, None], position % tokens.shape[1]], padding)
    noise = rng.random((len(b), 1)) * MAX_NOISE
    random_tokens = rng.choice(tokens.reshape(-1), copies.shape)
    replaced = (rng.random(copies.shape) < noise) & (copies != padding)
    neighbours[b, u, rng.integers(0, k, len(b))] = np.where(replaced, random_tokens, copies)
