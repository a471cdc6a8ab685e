"""Which tokens, targets and neighbours a step sees: a function of the seed and the step's number."""

from collections.abc import Sequence

import numpy as np

from retro_np.errors import UserError
from retro_np.retrieval.database import Database, Split
from retro_np.sequences import batch_of, sequence_chunks

SHARE_BITS = 53  # a share is a whole number of 2⁻⁵³: integers count turns exactly, however many there were


def sequence_rows(n_rows: int, length: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The chunks of each sequence of a step. Returns (batch_size, length) row numbers of the split; −1 is padding.

    An epoch cuts the stream of chunks, from an offset of its own, into sequences and takes them in an order of its
    own; both are drawn from (seed, epoch). The stream is a ring, so that no chunk is left over at its end.
    """
    return _ring_sequences(n_rows, length, range(step * batch_size, (step + 1) * batch_size), seed)


def mixture_rows(
    ranges: list[list[tuple[int, int]]], weights: list[float], length: int, batch_size: int, seed: int, step: int
) -> np.ndarray:
    """As `sequence_rows`, of sources that are sampled by weight: (batch_size, length) row numbers, −1 is padding.

    ranges: for each source the (start, stop) of its rows, which form one ring; weights: of any scale. Sequence
    t = step · batch_size + b is of one source, the next of that source's own epochs. After t sequences a source has
    had its share of them within ½ where there are two sources, within 2 whatever the weights (see `_halved`). Raises
    UserError for a weight that is not 0 or more, where all are 0, and where a weighted source has no rows. Paper
    table 1.
    """
    tree = _halved(_shares(ranges, weights))
    rows = np.full((batch_size, length), -1)
    turns = [_turn(tree, int(step) * batch_size + b) for b in range(batch_size)]
    for source in {source for source, _ in turns}:
        starts, stops = np.array(ranges[source]).T
        ends = np.cumsum(stops - starts)
        mine = [b for b, (of, _) in enumerate(turns) if of == source]
        ring = _ring_sequences(int(ends[-1]), length, [turns[b][1] for b in mine], seed, source)
        which = np.searchsorted(ends, ring, side="right")
        rows[mine] = np.where(ring >= 0, stops[which] - ends[which] + ring, -1)
    return rows


def _ring_sequences(n_rows: int, length: int, numbers: Sequence[int], seed: int, stream: int = 0) -> np.ndarray:
    """The sequences of these numbers of a ring of rows, (len(numbers), length). Stream 0 is that of `sequence_rows`."""
    per_epoch = max(1, n_rows // length)
    rows = np.full((len(numbers), length), -1)
    orders: dict[int, tuple[int, np.ndarray]] = {}
    for b, number in enumerate(numbers):
        epoch, place = divmod(number, per_epoch)
        if epoch not in orders:
            entropy = [seed, epoch, stream] if stream else [seed, epoch]
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
            orders[epoch] = int(rng.integers(n_rows)), rng.permutation(per_epoch)
        offset, order = orders[epoch]
        if n_rows < length:
            rows[b, :n_rows] = np.arange(n_rows)
        else:
            rows[b] = (offset + order[place] * length + np.arange(length)) % n_rows
    return rows


def _shares(ranges, weights) -> list[tuple[float, int]]:
    """Weight and number of the sources that are drawn from, the heaviest first."""
    if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
        raise UserError(f"the weights {weights} are no mixture: give each source a number, and one at least above 0")
    drawn = [(weight / max(weights), source) for source, weight in enumerate(weights) if weight > 0]
    for _, source in drawn:
        if not any(stop > start for start, stop in ranges[source]):
            raise UserError(
                f"source {source + 1} of {len(weights)} has a weight and no chunks to train on: leave it out"
            )
    return sorted(drawn, key=lambda share: (-share[0], share[1]))


def _halved(shares: list[tuple[float, int]]):
    """A binary tree over sources, parts as even as may be: (share of the left part · 2⁵³, left, right), or a source.

    A part of two sources or more is at most 2/3 of its node, as shares fall. A node gives its left part a turn whenever
    share · turns, rounded, grows; so it errs by ½ at most, on top of the part's share of the node's own error. Such a
    part errs by E ≤ ⅔ E + ½, so at most 1½, and a source by less than 1½ + ½ = 2; at the tree's top, by ½.
    """
    if len(shares) == 1:
        return shares[0][1]
    weights = np.array([weight for weight, _ in shares])
    left = weights.cumsum()[:-1] / weights.sum()
    cut = int(np.argmin(abs(left - 0.5)))
    return round(float(left[cut]) * 2**SHARE_BITS), _halved(shares[: cut + 1]), _halved(shares[cut + 1 :])


def _turn(tree, turn: int) -> tuple[int, int]:
    """Which source a turn goes to, and which of that source's own turns it is."""
    while isinstance(tree, tuple):
        share, left, right = tree
        half = 1 << (SHARE_BITS - 1)
        before, after = (share * turn + half) >> SHARE_BITS, (share * (turn + 1) + half) >> SHARE_BITS
        tree, turn = (left, before) if after > before else (right, turn - before)
    return tree, turn


def training_batch(database: Database, split: Split, k: int, *, sequence_length, batch_size, seed, step):
    """Tokens (B, n), targets (B, n) and neighbours (B, l, k, 2m), None for k = 0, of a step."""
    length = sequence_chunks(sequence_length, database.chunk_size)
    if any(weight is not None for weight, _ in split.sources):
        weights, ranges = zip(*split.sources, strict=True)
        rows = mixture_rows(ranges, weights, length, batch_size, seed, step)
    else:
        rows = sequence_rows(len(split.tokens), length, batch_size, seed, step)
    return batch_of(database, split, rows, k)
