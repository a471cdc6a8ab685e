"""The tokens, targets and neighbours of a training step: a function of the seed and the step's number."""

import functools
from collections.abc import Sequence

import numpy as np

from retro_np.errors import UserError
from retro_np.retrieval.database import Database, Split
from retro_np.sequences import sequence_chunks, sequence_neighbour_ids, tokens_and_targets

Batch = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # tokens (B, n), targets (B, n), neighbours (B, l, k, 2m)
Ranges = Sequence[tuple[int, int]]  # the (start, stop) of a source's rows
RANDOM_STREAM = 8  # separates the random numbers of random neighbours from those of curriculum and dropout
SHARE_BITS = 53  # a share is an integer multiple of 2⁻⁵³, so that turns are counted exactly however long a run is


def sequence_rows(n_rows: int, length: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The chunks of a step's sequences: (batch_size, length) row numbers of the split, −1 for padding.

    n_rows: chunks in the split; length: chunks per sequence. Each epoch cuts the stream of chunks into sequences, from
    a random offset, and visits them in a random order. Offset and order depend on (seed, epoch) alone. The stream is
    a ring, so the few chunks that an epoch leaves out are not always the last ones."""
    return mixture_rows([[(0, n_rows)]], [1], length, batch_size, seed, step)


def mixture_rows(
    ranges: Sequence[Ranges], weights: Sequence[float], length: int, batch_size: int, seed: int, step: int
) -> np.ndarray:
    """Like `sequence_rows`, but for several sources, which are sampled by weight (paper table 1).

    ranges: for each source, the (start, stop) of its rows, which form one ring. weights: one per source, on any scale.
    Sequence t = step · batch_size + b comes from one source and is the next sequence of that source's epochs. After t
    sequences, the number from a source differs from its share of t by at most ½ if there are two sources, and by less
    than 2 for any number of sources (see `_balanced_tree`). Raises UserError if a weight is negative or not finite, if
    all weights are 0, or if a source with a weight has no rows."""
    tree, rows = _balanced_tree(_shares(ranges, weights)), []
    for turn in range(int(step) * batch_size, (int(step) + 1) * batch_size):
        source, number = _turn(tree, turn)
        starts, stops = np.array(ranges[source]).T
        ends = np.cumsum(stops - starts)
        ring = _ring_sequence(int(ends[-1]), length, number, seed, source)
        part = np.searchsorted(ends, ring, side="right")
        rows.append(np.where(ring >= 0, stops[part] - ends[part] + ring, -1))
    return np.array(rows)


def _ring_sequence(n_rows: int, length: int, number: int, seed: int, source: int) -> np.ndarray:
    """The sequence with this number on a source's ring of rows, (length,)."""
    if n_rows < length:
        return np.pad(np.arange(n_rows), (0, length - n_rows), constant_values=-1)
    epoch, index = divmod(number, n_rows // length)
    offset, order = _epoch(n_rows, length, seed, epoch, source)
    return (offset + order[index] * length + np.arange(length)) % n_rows


@functools.lru_cache(maxsize=16)
def _epoch(n_rows: int, length: int, seed: int, epoch: int, source: int) -> tuple[int, np.ndarray]:
    """The offset of a source's epoch, and the order of its sequences."""
    entropy = [seed, epoch, source] if source else [seed, epoch]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    return int(rng.integers(n_rows)), rng.permutation(n_rows // length)


def _shares(ranges, weights) -> list[tuple[float, int]]:
    """(weight, source) of each source with a weight above 0, the heaviest first."""
    if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
        raise UserError(f"weights must be finite, at least 0, and one of them above 0, not {weights}")
    shares = [(weight / max(weights), source) for source, weight in enumerate(weights) if weight > 0]
    for _, source in shares:
        if not any(stop > start for start, stop in ranges[source]):
            raise UserError(f"source {source + 1} of {len(weights)} has a weight but no chunks to train on; omit it")
    return sorted(shares, key=lambda share: (-share[0], share[1]))


def _balanced_tree(shares: list[tuple[float, int]]):
    """A binary tree over sources: a source, or (share of the left part · 2⁵³, left part, right part).

    The two parts of a node are as even as possible. The left part gets a turn whenever round(share · turns) increases.
    This adds an error of at most ½ to the part's share of the node's own error. Because the shares are sorted, a part
    with several sources has at most ⅔ of its node, so its error E satisfies E ≤ ⅔ E + ½, hence E ≤ 1½. A single source
    errs by less than 1½ + ½ = 2, and by at most ½ directly below the root."""
    if len(shares) == 1:
        return shares[0][1]
    weights = np.array([weight for weight, _ in shares])
    left = weights.cumsum()[:-1] / weights.sum()
    cut = int(np.argmin(abs(left - 0.5)))
    return round(float(left[cut]) * 2**SHARE_BITS), _balanced_tree(shares[: cut + 1]), _balanced_tree(shares[cut + 1 :])


def _turn(tree, turn: int) -> tuple[int, int]:
    """The source that a turn goes to, and how many earlier turns went to the same source."""
    while isinstance(tree, tuple):
        share, left, right = tree
        left_before, left_after = ((share * n + 2 ** (SHARE_BITS - 1)) >> SHARE_BITS for n in (turn, turn + 1))
        tree, turn = (left, left_before) if left_after > left_before else (right, turn - left_before)
    return tree, turn


def training_batch(
    database: Database, split: Split, k: int, *, sequence_length: int, batch_size: int, seed: int, step: int,
    random_share: float = 0.0,
) -> Batch:  # fmt: skip
    """The tokens, targets and neighbours of a step. k = 0: retrieval off. random_share: as in `TrainingConfig`."""
    length = sequence_chunks(sequence_length, database.chunk_size)
    weighted = any(weight is not None for weight, _ in split.sources)
    weights, ranges = zip(*split.sources, strict=True) if weighted else ([1], [[(0, len(split.tokens))]])
    rows = mixture_rows(ranges, weights, length, batch_size, seed, step)
    if not k:
        return *tokens_and_targets(split, rows), None
    ids = sequence_neighbour_ids(database, split, rows, k)
    if random_share:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, RANDOM_STREAM])))
        chosen = (rng.random(rows.shape) < random_share) & (rows >= 0)
        ids = np.where(chosen[..., None], irrelevant(database, split, rows, ids, rng), ids)
    return *tokens_and_targets(split, rows), database.value(ids)


def irrelevant(
    database: Database, split: Split, rows: np.ndarray, ids: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """For each chunk, the neighbours of a random chunk of another sequence, or random ones for a single sequence.

    rows: (B, l); ids: (B, l, k), what the chunks retrieved. A neighbour from a document of the chunk's own sequence is
    left out. Those of another sequence are in the batch already, so a model that encodes neighbours need not encode
    more. Returns (B, l, k) ids, −1 where there is none."""
    batch, length, _ = ids.shape
    if batch == 1:
        drawn = rng.integers(database.n_chunks, size=ids.shape)
        drawn = np.where(database.removed(drawn), -1, drawn)
    else:
        others = (np.arange(batch)[:, None] + rng.integers(1, batch, (batch, length))) % batch
        drawn = ids[others, rng.integers(length, size=(batch, length))]
    documents = np.where(rows >= 0, split.documents[np.maximum(rows, 0)], -1)
    own = (database.document_of(drawn)[..., None] == documents[:, None, None, :]).any(axis=-1)
    return np.where(own, -1, drawn)
