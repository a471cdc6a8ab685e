"""Ground truth: the weights times the number of sequences, the rows of each source, and `sequence_rows`."""

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
    """Sources of a few ranges each, which lie one after another in an order of their own, and weights."""
    lengths = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=5))
    owners = draw(st.permutations([s for s, own in enumerate(lengths) for _ in own]))
    ranges, left, start = [[] for _ in lengths], [list(own) for own in lengths], 0
    for s in owners:
        size = left[s].pop()
        ranges[s].append((start, start + size))
        start += size
    drawn = [draw(st.floats(1.0, 3.0)) if sum(own) else 0.0 for own in lengths]
    if not any(drawn):
        ranges[0], drawn[0] = [*ranges[0], (start, start + 3)], 1.0
    return ranges, drawn


def rows_of(ranges):
    return [row for start, stop in ranges for row in range(start, stop)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_source_has_had_its_share_after_every_sequence_within_what_is_proved(weights):
    ranges = [[(100 * s, 100 * s + 100)] for s in range(len(weights))]
    rows = np.concatenate([mixture_rows(ranges, weights, 1, 500, 0, step) for step in range(20)])
    counts = (rows[:, :1] // 100 == np.arange(len(weights))).cumsum(axis=0)
    shares = np.array(weights) / sum(weights)
    error = abs(counts - shares * np.arange(1, 10_001)[:, None]).max()
    assert error < (0.5 + 1e-9 if len(weights) == 2 else 2)
    assert not counts[-1][np.array(weights) == 0].any()


@settings(max_examples=40)
@given(mixtures(), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_of_a_source_visits_its_rows_once_but_for_the_remainder(mixture, length, seed):
    ranges, weights = mixture
    rows = mixture_rows(ranges, weights, length, 600, seed, 0)
    for own, weight in zip(ranges, weights, strict=True):
        mine = rows[np.isin(rows[:, 0], rows_of(own))]
        per_epoch = max(1, len(rows_of(own)) // length)
        assert weight == 0 or len(mine) >= per_epoch
        for epoch in range(len(mine) // per_epoch):
            seen = mine[epoch * per_epoch : (epoch + 1) * per_epoch]
            seen = seen[seen >= 0]
            assert set(seen) <= set(rows_of(own))
            assert len(set(seen)) == len(seen) == min(len(rows_of(own)), per_epoch * length)


@given(mixtures(), st.integers(1, 4), st.integers(0, 3))
def test_a_sequence_is_a_stretch_of_its_sources_ring(mixture, length, seed):
    ranges, weights = mixture
    for sequence in mixture_rows(ranges, weights, length, 50, seed, 1):
        (ring,) = (rows_of(own) for own in ranges if sequence[0] in rows_of(own))
        first, n = ring.index(sequence[0]), min(length, len(ring))
        assert list(sequence) == [ring[(first + i) % len(ring)] for i in range(n)] + [-1] * (length - n)


@given(mixtures(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9))
def test_a_step_does_not_depend_on_those_before_it_nor_on_how_sequences_are_cut_into_steps(
    mixture, length, batch, step
):
    alone = mixture_rows(*mixture, length, batch, 7, step)
    from_the_start = mixture_rows(*mixture, length, (step + 1) * batch, 7, 0)
    assert np.array_equal(alone, from_the_start[step * batch :])


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_a_mixture_of_one_source_is_the_whole_split(n_rows, length, batch, seed, step):
    cuts = [(0, n_rows // 3), (n_rows // 3, n_rows)]
    mixed = mixture_rows([cuts], [0.3], length, batch, seed, step)
    assert np.array_equal(mixed, sequence_rows(n_rows, length, batch, seed, step))


def test_sources_and_seeds_have_orders_of_their_own():
    ranges = [[(0, 400)], [(400, 800)]]
    rows = mixture_rows(ranges, [1, 1], 4, 200, 0, 0)
    first, second = (rows[np.isin(rows[:, 0], rows_of(own))] for own in ranges)
    assert not np.array_equal(first, second - 400)
    assert not np.array_equal(rows, mixture_rows(ranges, [1, 1], 4, 200, 1, 0))


def test_sequence_rows_are_those_that_runs_were_begun_with():
    # drawn by hand from NumPy's Philox, seeded with (seed, epoch)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([3, 2])))
    offset, order = int(rng.integers(23)), rng.permutation(5)
    expected = (offset + order[:, None] * 4 + np.arange(4)) % 23
    assert np.array_equal(sequence_rows(23, 4, 5, 3, 2), expected)


@pytest.mark.parametrize(
    ("ranges", "weights", "complaint"),
    [
        ([[(0, 4)], [(4, 4)]], [1, 1], "source 2 of 2 .* no chunks"),
        ([[(0, 4)], []], [1, 0.1], "source 2 of 2 .* no chunks"),
        ([[(0, 4)]], [0.0], "no mixture"),
        ([[(0, 4)], [(4, 9)]], [1, float("nan")], "no mixture"),
        ([[(0, 4)], [(4, 9)]], [1, -1], "no mixture"),
        ([[(0, 4)], [(4, 9)]], [1, float("inf")], "no mixture"),
    ],
)
def test_what_is_no_mixture_is_refused(ranges, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        mixture_rows(ranges, weights, 2, 2, 0, 0)


def test_a_source_without_rows_and_weight_is_no_mistake():
    assert mixture_rows([[(0, 4)], []], [1, 0], 2, 2, 0, 0).max() < 4
