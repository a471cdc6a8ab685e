"""What helps a small model to find out that neighbours are worth reading. Not the paper's; off by default.

A decoder that does not copy learns nothing from its neighbours, and neighbours that seldom say what comes next teach no
copying: the two wait for each other for longer than a small run lasts. So, at first, some chunks are lent what no
retrieval would give them: a noised and shifted copy of themselves and their own continuation, in the place of one
neighbour. The share falls in a straight line to none. Evaluation never sees one.

And some sequences are given no neighbours at all, so that the decoder without retrieval stays a good language model.
"""

import numpy as np

from retro_np.training.checkpoint import TrainingConfig

STREAM = 7  # tells these draws from those of batches and dropout
MOST_NOISE = 0.4  # share of a lent copy's tokens that others replace, at most; drawn for each


def with_curriculum(neighbours, tokens, training: TrainingConfig, step: int) -> np.ndarray:
    """A step's neighbours, some of them lent or taken away: a function of the seed and the step's number.

    neighbours: (B, l, k, 2m), of the paper's kind; tokens: (B, n), the sequences. What is lent to chunk u are 2m tokens
    of its own sequence, from at most m / 2 before the chunk's start or behind it. Returns (B, l, k, 2m).
    """
    share = training.lent * max(0.0, 1 - step / training.lent_steps) if training.lent_steps else 0.0
    if share == 0 and training.retrieval_off == 0:
        return neighbours
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([training.seed, step, STREAM])))
    neighbours = neighbours.copy()
    if share:
        lend(neighbours, tokens, share, rng)
    neighbours[rng.random(len(neighbours)) < training.retrieval_off] = 0
    return neighbours


def lend(neighbours, tokens, share: float, rng: np.random.Generator) -> None:
    """Put noised copies of chunks and their continuations in the place of a share of them, one a chunk. In place."""
    batch, n_chunks, k, r = neighbours.shape
    m = r // 2
    b, u = np.nonzero(rng.random((batch, n_chunks)) < share)
    start = u * m + rng.integers(-(m // 2), m // 2 + 1, len(b))
    place = start[:, None] + np.arange(r)
    copies = np.where((place >= 0) & (place < tokens.shape[1]), tokens[b[:, None], place % tokens.shape[1]], 0)
    noise = rng.random((len(b), 1)) * MOST_NOISE
    others = rng.choice(tokens.reshape(-1), copies.shape)
    replaced = (rng.random(copies.shape) < noise) & (copies != 0)
    neighbours[b, u, rng.integers(0, k, len(b))] = np.where(replaced, others, copies)
