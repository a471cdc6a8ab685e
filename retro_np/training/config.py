"""The settings of a training run: one frozen dataclass."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from retro_np.errors import UserError
from retro_np.renamed import accept_old_names


@accept_old_names
@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults suit a model of a few million parameters. Paper §2.5 and appendix C.

    Raises UserError (a ValueError) for a value out of range and for values that do not fit together.

    steps: updates of the parameters.
    sequence_length: tokens per sequence (n), a multiple of the chunk size.
    batch_size: sequences per step.
    micro_batches: equal parts that a step's batch is split into, to save memory; the gradient covers the whole batch.
    neighbours: neighbours per chunk (k); 0 trains with retrieval off.
    learning_rate: the peak of the schedule.
    warmup: steps of linear warm-up before the cosine decay.
    weight_decay: decoupled decay of matrices (AdamW).
    clip: the largest global norm of the gradient.
    seed: random seed for the initial parameters, the batches and dropout.
    checkpoint_every: steps between checkpoints; it does not change what is learned.
    retrieval_off: share of sequences trained without neighbours.
    oracle_share: share of chunks that get an oracle neighbour at step 0, a noisy copy of the chunk and its
        continuation; the share falls linearly to 0. Not in the paper; see `curriculum.py`.
    oracle_steps: steps until oracle_share has fallen to 0."""

    steps: int = 1000
    sequence_length: int = 512
    batch_size: int = 4
    micro_batches: int = 1
    neighbours: int = 2
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50
    retrieval_off: float = 0.0
    oracle_share: float = 0.0
    oracle_steps: int = 0

    def __post_init__(self) -> None:
        minima = dict.fromkeys(("steps", "sequence_length", "batch_size", "micro_batches", "checkpoint_every"), 1)
        for name, minimum in (minima | dict.fromkeys(("neighbours", "warmup", "seed", "oracle_steps"), 0)).items():
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) < minimum:
                raise UserError(f"{name} must be a whole number of at least {minimum}, not {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "clip", "retrieval_off", "oracle_share"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name} must be a number, not {getattr(self, name)!r}")
        for name, valid, allowed in (
            ("learning_rate", 0 < self.learning_rate <= 1, "in (0, 1]"), ("clip", self.clip > 0, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("retrieval_off", 0 <= self.retrieval_off < 1, "in [0, 1)"),
            ("oracle_share", 0 <= self.oracle_share <= 1, "in [0, 1]"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"{name} must be {allowed}, not {getattr(self, name)}")
        if (self.oracle_share > 0) != (self.oracle_steps > 0):
            raise UserError("oracle_share and oracle_steps go together: give both, or neither")
        if not self.neighbours and (self.oracle_share or self.retrieval_off):
            raise UserError("without neighbours (k = 0), retrieval_off and oracle_share have no effect: leave them out")
        if self.batch_size % self.micro_batches:
            raise UserError(f"micro_batches = {self.micro_batches} does not divide batch_size = {self.batch_size}")
