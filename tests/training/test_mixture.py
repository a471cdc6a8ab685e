"""Ground truth: weights times the number of sequences, the rows of each source, and `sequence_rows`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np.errors import UserError
from retro_np.training.batches import mixture_rows, sequence_rows

WEIGHTS = [
    [0.55, 0.45],
    [0.999, 0.001],
    [5.0, 25.0, 50.0, 20.0],  # books, news and so on, in per cent
    [1.0] * 22,
    [0.31, 0.69, 0.0, 1e-6],
    list(0.5 ** np.arange(12)),
]


@st.composite
def mixtures(draw):
    """Sources with a few ranges each, interleaved in a random order, and their weights."""
    lengths = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=5))
    order = draw(st.permutations([s for s, sizes in enumerate(lengths) for _ in sizes]))
    ranges, remaining, start = [[] for _ in lengths], [list(sizes) for sizes in lengths], 0
    for s in order:
        size = remaining[s].pop()
        ranges[s].append((start, start + size))
        start += size
    weights = [draw(st.floats(1.0, 3.0)) if sum(sizes) else 0.0 for sizes in lengths]
    if not any(weights):
        ranges[0], weights[0] = [*ranges[0], (start, start + 3)], 1.0
    return ranges, weights


def rows_of(ranges):
    return [row for start, stop in ranges for row in range(start, stop)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_every_sequence_each_source_has_its_share_within_the_proven_bound(weights):
    ranges = [[(100 * s, 100 * s + 100)] for s in range(len(weights))]
    rows = np.concatenate([mixture_rows(ranges, weights, 1, 500, 0, step) for step in range(20)])
    counts = (rows[:, :1] // 100 == np.arange(len(weights))).cumsum(axis=0)
    shares = np.array(weights) / sum(weights)
    # The docstring of `_balanced_tree` in training/batches.py proves the bounds: ½ for two sources, 2 for any number.
    error = abs(counts - shares * np.arange(1, 10_001)[:, None]).max()
    assert error < (0.5 + 1e-9 if len(weights) == 2 else 2)
    assert not counts[-1][np.array(weights) == 0].any()


@settings(max_examples=40)
@given(mixtures(), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_of_a_source_visits_its_rows_once_except_for_the_remainder(mixture, length, seed):
    ranges, weights = mixture
    rows = mixture_rows(ranges, weights, length, 600, seed, 0)
    for source, weight in zip(ranges, weights, strict=True):
        sequences = rows[np.isin(rows[:, 0], rows_of(source))]
        per_epoch = max(1, len(rows_of(source)) // length)
        assert weight == 0 or len(sequences) >= per_epoch
        for epoch in range(len(sequences) // per_epoch):
            visited = sequences[epoch * per_epoch : (epoch + 1) * per_epoch]
            visited = visited[visited >= 0]
            assert set(visited) <= set(rows_of(source))
            assert len(set(visited)) == len(visited) == min(len(rows_of(source)), per_epoch * length)


@given(mixtures(), st.integers(1, 4), st.integers(0, 3))
def test_a_sequence_is_a_contiguous_part_of_its_sources_ring(mixture, length, seed):
    ranges, weights = mixture
    for sequence in mixture_rows(ranges, weights, length, 50, seed, 1):
        # The ring is a source's rows, joined end to start.
        (ring,) = (rows_of(source) for source in ranges if sequence[0] in rows_of(source))
        first, n = ring.index(sequence[0]), min(length, len(ring))
        assert list(sequence) == [ring[(first + i) % len(ring)] for i in range(n)] + [-1] * (length - n)


@given(mixtures(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9))
def test_a_step_depends_neither_on_earlier_steps_nor_on_the_batch_size(mixture, length, batch, step):
    one_step = mixture_rows(*mixture, length, batch, 7, step)
    from_the_start = mixture_rows(*mixture, length, (step + 1) * batch, 7, 0)
    assert np.array_equal(one_step, from_the_start[step * batch :])


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_a_mixture_of_one_source_gives_the_same_rows_as_the_whole_split(n_rows, length, batch, seed, step):
    cuts = [(0, n_rows // 3), (n_rows // 3, n_rows)]
    mixed = mixture_rows([cuts], [0.3], length, batch, seed, step)
    assert np.array_equal(mixed, sequence_rows(n_rows, length, batch, seed, step))


def test_sources_and_seeds_have_their_own_orders():
    ranges = [[(0, 400)], [(400, 800)]]
    rows = mixture_rows(ranges, [1, 1], 4, 200, 0, 0)
    first, second = (rows[np.isin(rows[:, 0], rows_of(source))] for source in ranges)
    assert not np.array_equal(first, second - 400)
    assert not np.array_equal(rows, mixture_rows(ranges, [1, 1], 4, 200, 1, 0))


def test_sequence_rows_are_those_of_earlier_versions():
    # Old runs can resume only if the order does not change: NumPy's Philox, seeded with (seed, epoch).
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([3, 2])))
    offset, order = int(rng.integers(23)), rng.permutation(5)
    expected = (offset + order[:, None] * 4 + np.arange(4)) % 23
    assert np.array_equal(sequence_rows(23, 4, 5, 3, 2), expected)


@pytest.mark.parametrize(
    ("ranges", "weights", "complaint"),
    [
        ([[(0, 4)], [(4, 4)]], [1, 1], "source 2 of 2 has a weight but no chunks"),
        ([[(0, 4)], []], [1, 0.1], "source 2 of 2 has a weight but no chunks"),
        ([[(0, 4)]], [0.0], "weights must be finite"),
        ([[(0, 4)], [(4, 9)]], [1, float("nan")], "weights must be finite"),
        ([[(0, 4)], [(4, 9)]], [1, -1], "weights must be finite"),
        ([[(0, 4)], [(4, 9)]], [1, float("inf")], "weights must be finite"),
    ],
)
def test_invalid_weights_are_refused(ranges, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        mixture_rows(ranges, weights, 2, 2, 0, 0)


def test_a_source_with_neither_rows_nor_weight_is_accepted():
    assert mixture_rows([[(0, 4)], []], [1, 0], 2, 2, 0, 0).max() < 4
