"""Hypothesis strategies for models and batches, small enough for loops, odd enough to reveal off-by-one errors."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.nn.checks import perturbed_params

MANY = settings(max_examples=100, deadline=None)  # The first example may compile a kernel, so there is no deadline.


@dataclass
class Case:
    """A model with float64 parameters, and a batch for it."""

    config: RetroConfig
    params: dict
    tokens: np.ndarray  # (B, n), with padding
    targets: np.ndarray  # (B, n), at least one that is not padding
    neighbours: np.ndarray  # (B, floor(n / m), k, r)
    rng: np.random.Generator  # further random numbers for a test

    @property
    def arguments(self):
        """The arguments of `retro` and of its oracles."""
        return self.params, self.config, self.tokens, self.neighbours


def some_layers(depth: int, at_least_one: bool):
    """Tuples of layers, which count from 1: none, the first, all, or any."""
    drawn = st.sets(st.integers(1, depth), min_size=int(at_least_one)).map(lambda p: tuple(sorted(p)))
    fixed = [(1,), tuple(range(1, depth + 1))] + ([] if at_least_one else [()])
    return st.one_of(st.sampled_from(fixed), drawn)


@st.composite
def configs(draw) -> RetroConfig:
    """Configurations with retrieval and every ablation of table 13."""
    widths, sizes = st.sampled_from([2, 4, 6]), st.integers(1, 3)
    d, depth, encoder_depth = draw(widths), draw(sizes), draw(st.integers(1, 2))
    shared = draw(st.booleans())
    encoder = EncoderConfig(
        d_model=d if shared else draw(widths),
        d_ffw=draw(st.integers(1, 7)),
        n_heads=draw(sizes),
        d_head=draw(sizes),
        n_layers=encoder_depth,
        ca_layers=draw(some_layers(encoder_depth, at_least_one=False)),
    )
    return RetroConfig(
        vocabulary_size=draw(st.integers(3, 11)),
        d_model=d,
        d_ffw=draw(st.integers(1, 7)),
        n_heads=draw(sizes),
        d_head=draw(sizes),
        n_layers=depth,
        cca_layers=draw(some_layers(depth, at_least_one=True)),
        chunk_size=draw(st.integers(1, 4)),
        encoder=encoder,
        share_embeddings=shared,
        tie_readout=draw(st.booleans()),
        cca_positions=draw(st.booleans()),
        retrieved_part=draw(st.sampled_from(["NF", "N", "F"])),
    )


@st.composite
def cases(draw, retrieving: bool = False) -> Case:
    """A model and its batch. retrieving: each row has at least one whole chunk, and k ≥ 1 values without padding."""
    config = draw(configs())
    m, vocabulary = config.chunk_size, config.vocabulary_size
    n = draw(st.integers(m if retrieving else 1, 3 * m + 2))
    batch = draw(st.integers(1, 2))
    k = draw(st.sampled_from([1, 2, 3] if retrieving else [0, 1, 2, 3, 40]))
    r = 2 * m if retrieving else draw(st.sampled_from([2 * m, 2 * m, m, 2 * m + 1]))  # mostly [N, F]
    if k == 40:  # as many as in evaluation, but in one row, because the loops are slow
        batch, n = 1, min(n, m + 2)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (batch, n))
    targets = rng.integers(0, vocabulary, (batch, n))
    targets[0, rng.integers(n)] = 1
    neighbours = rng.integers(1, vocabulary, (batch, n // m, k, r))
    if not retrieving:
        ends = rng.choice([0, 1, r // 2, r, r], neighbours.shape[:3])  # 0: a value of padding only
        neighbours[np.arange(r) >= ends[..., None]] = 0
        neighbours[rng.random(neighbours.shape[:2]) < 0.2] = 0  # chunks without neighbours
    return Case(config, perturbed_params(config, seed), tokens, targets, neighbours, rng)


def baseline_of(case: Case):
    """(params, config) of the case's model without CCA and encoder, with the same weights."""
    layers = [{name: block for name, block in layer.items() if name != "cca"} for layer in case.params["layers"]]
    params = {name: part for name, part in case.params.items() if name != "encoder"} | {"layers": layers}
    return params, replace(case.config, cca_layers=(), encoder=None)
