"""The settings of a training run: one frozen dataclass."""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real

from retro_np.errors import UserError
from retro_np.renamed import accept_old_names

SCHEDULES = ("cosine", "linear", "constant")  # of `learning_rate`
MAX_SIZE = 1 << 20  # A larger sequence or batch would overflow array sizes before memory runs out.
# Whole numbers that may be 0
FROM_ZERO = ("steps", "neighbours", "warmup", "seed", "oracle_steps", "eval_every", "cache_mb")


@accept_old_names
@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults suit a model of a few million parameters. Paper, appendix C.

    Raises UserError (a ValueError) for a value out of range and for values that do not fit together.

    steps: updates of the parameters; 0 stores the initial ones.
    sequence_length: tokens per sequence (n), a multiple of the chunk size.
    batch_size: sequences per step.
    micro_batches: equal parts that a step's batch is split into, to save memory; the gradient covers the whole batch.
    neighbours: neighbours per chunk (k); 0 trains with retrieval off.
    learning_rate: the peak of the schedule.
    warmup: steps of linear warm-up before the schedule.
    weight_decay: decoupled decay of matrices (AdamW).
    clip: the largest global norm of the gradient.
    seed: random seed for the initial parameters, the batches and dropout.
    checkpoint_every: steps between checkpoints; it does not change what is learned.
    retrieval_off: share of sequences trained without neighbours.
    oracle_share: share of chunks that get an oracle neighbour at step 0, a noisy copy of the chunk and its
        continuation; the share falls linearly to 0. Not in the paper; see `curriculum.py`.
    oracle_steps: steps until oracle_share has fallen to 0.
    random_share: share of chunks that read the neighbours of a random chunk of another sequence, so that a model learns
        to ignore what is irrelevant. Not in the paper.
    schedule: how the learning rate falls after the warm-up: cosine, linear or constant.
    min_learning_rate: the learning rate at the end of cosine and linear, as a share of the peak.
    beta1: decay of AdamW's mean of gradients per step.
    beta2: decay of AdamW's mean of squared gradients per step.
    eval_every: steps between evaluations on held-out documents, which do not change what is learned; 0 for none.
    eval_chunks: chunks that an evaluation scores, from the start of the held-out documents; None scores all of them.
    cache_mb: MB of encoded neighbours to keep; it changes no result. For a frozen decoder, see nn/memory.py.
    segments: the steps at which a finished run was prolonged, to repeat it. The learning rate of a step is that of a
        run that ends with the step's segment."""

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
    random_share: float = 0.0
    schedule: str = "cosine"
    min_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eval_every: int = 0
    eval_chunks: int | None = None
    cache_mb: int = 1024
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, minimum = getattr(self, field.name), 0 if field.name in FROM_ZERO else 1
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            is_whole = is_number and isinstance(value, Integral) and int(value) >= minimum
            if field.type in (int, int | None) and value is not field.default and not is_whole:
                raise UserError(f"{field.name} must be a whole number of at least {minimum}, not {value}")
            if field.type is float and not is_number:
                raise UserError(f"{field.name} must be a number, not {value!r}")
        if isinstance(self.segments, list):  # as JSON stores them
            object.__setattr__(self, "segments", tuple(self.segments))
        whole = isinstance(self.segments, tuple) and all(isinstance(end, Integral) for end in self.segments)
        increasing = whole and all(end < later for end, later in pairwise((0, *self.segments, self.steps or 1)))
        for name, valid, allowed in (
            ("learning_rate", 0 < self.learning_rate <= 1, "in (0, 1]"),
            ("clip", 0 < self.clip < math.inf, "above 0 and finite"),
            ("min_learning_rate", 0 <= self.min_learning_rate <= 1, "a share of learning_rate, in [0, 1]"),
            ("weight_decay", 0 <= self.weight_decay <= 1000, "in [0, 1000]"),
            *((name, 0 <= getattr(self, name) < 1, "in [0, 1)") for name in ("beta1", "beta2", "retrieval_off")),
            *((name, 0 <= getattr(self, name) <= 1, "in [0, 1]") for name in ("oracle_share", "random_share")),
            ("schedule", self.schedule in SCHEDULES, " or ".join(SCHEDULES)),
            ("segments", increasing, f"whole numbers that increase, above 0 and below steps ({self.steps})"),
            *((n, getattr(self, n) <= MAX_SIZE, f"at most {MAX_SIZE:,}") for n in ("sequence_length", "batch_size")),
            ("micro_batches", self.batch_size % self.micro_batches == 0, f"a divisor of batch_size {self.batch_size}"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"{name} must be {allowed}, not {getattr(self, name)}")
        if (self.oracle_share > 0) != (self.oracle_steps > 0):
            raise UserError("oracle_share and oracle_steps go together: give both, or neither")
        if not self.neighbours and (self.oracle_share or self.retrieval_off or self.random_share):
            names = "retrieval_off, oracle_share and random_share"
            raise UserError(f"without neighbours (k = 0), {names} have no effect: leave them out")

    def segment_end(self, step: int) -> int:
        """The number of steps for which the schedule of this step, counted from 0, was made."""
        return min((end for end in self.segments if step < end), default=self.steps)


def learning_rate(
    step: int, *, peak: float, warmup: int, steps: int, schedule: str = "cosine", end: float = 0.1, start: float = 1e-7
) -> float:
    """The learning rate of a step, 0 … steps − 1: linear from `start` to `peak`, then to end · peak by the schedule.

    Cosine is that of Loshchilov & Hutter 2017; constant stays at the peak."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    p = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * p)), "linear": 1 - p, "constant": 1.0}
    return peak * (end + (1 - end) * falling[schedule])
