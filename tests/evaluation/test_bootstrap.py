"""Ground truth: a bootstrap of a few lines of NumPy, and the share of intervals that contain a known difference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses
from retro_np.evaluation.bootstrap import paired_bootstrap


def drawn(seed, n_documents, gain=0.03, spread=0.05):
    """Losses of two conditions on documents of several chunks; the first needs 1 − gain of the second's bits."""
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(n_documents) * 3, rng.integers(1, 6, n_documents))  # numbers with gaps
    n_bytes = rng.integers(20, 60, len(documents))
    against = n_bytes * rng.gamma(9, 1 / 9, len(documents))
    noise = rng.normal(0, spread, n_documents)[np.unique(documents, return_inverse=True)[1]]  # one for each document
    return Losses(against * (1 - gain + noise), n_bytes, documents), Losses(against, n_bytes, documents)


@given(seed=st.integers(0, 2**31), n_documents=st.integers(6, 30), samples=st.integers(1, 150))
def test_the_interval_is_that_of_a_plain_bootstrap_with_the_same_draws(seed, n_documents, samples):
    of, against = drawn(seed, n_documents)
    difference = paired_bootstrap(of, against, samples=samples, seed=seed)
    numbers = np.unique(of.documents)
    draws = np.random.default_rng(seed).integers(0, n_documents, (samples, n_documents))
    ratios = []
    for draw in draws:
        rows = [np.flatnonzero(of.documents == numbers[document]) for document in draw]
        sums = [sum(losses.nats[each].sum() for each in rows) for losses in (of, against)]
        ratios.append(100 * (sums[0] / sums[1] - 1))
    assert difference.difference_percent == pytest.approx(100 * (of.nats.sum() / against.nats.sum() - 1))
    assert difference.interval_percent == pytest.approx(np.quantile(ratios, [0.025, 0.975]))
    assert difference.documents == n_documents


@given(seed=st.integers(0, 2**31), n_documents=st.integers(6, 20), paired=st.booleans())
def test_of_several_seeds_documents_and_seeds_are_drawn(seed, n_documents, paired):
    pairs = [drawn(seed, n_documents, gain) for gain in (0.03, 0.1, -0.2)]
    of, against = [pair[0] for pair in pairs], [pairs[0][1]] * 3
    if paired:
        against = [Losses(pair[1].nats * (1 + i), pair[1].bytes, pair[1].documents) for i, pair in enumerate(pairs)]
    difference = paired_bootstrap(of, against if paired else against[0], samples=50, seed=seed)
    rng, ratios = np.random.default_rng(seed), []
    draws, seeds = rng.integers(0, n_documents, (50, n_documents)), rng.integers(0, 3, (3, 50))
    for draw, chosen in zip(draws, seeds.T, strict=True):
        sums = [sum(part[i].per_document()[1][draw].sum() for i in chosen) for part in (of, against)]
        ratios.append(100 * (sums[0] / sums[1] - 1))
    sums = [sum(losses.nats.sum() for losses in part) for part in (of, against)]
    assert difference.difference_percent == pytest.approx(100 * (sums[0] / sums[1] - 1))
    assert difference.interval_percent == pytest.approx(np.quantile(ratios, [0.025, 0.975]))


def test_a_list_of_one_seed_is_that_seed_and_other_numbers_of_seeds_are_refused():
    of, against = drawn(0, 9)
    assert paired_bootstrap([of], [against]) == paired_bootstrap(of, against)
    for seeds in ([of] * 3, []):
        with pytest.raises(UserError, match=f"{len(seeds)} and 2 seeds cannot be paired"):
            paired_bootstrap(seeds, [against] * 2)
    with pytest.raises(TypeError, match="must be of type Losses, not list"):
        paired_bootstrap([of], [[1.0]])


def test_blocks_of_draws_do_not_change_the_interval(monkeypatch):
    losses = drawn(0, 25)
    whole = paired_bootstrap(*losses, samples=101)
    monkeypatch.setattr("retro_np.evaluation.bootstrap.DRAWS_PER_BLOCK", 60)
    assert paired_bootstrap(*losses, samples=101).interval_percent == pytest.approx(whole.interval_percent)


def test_about_95_percent_of_the_intervals_contain_the_true_difference():
    intervals = [paired_bootstrap(*drawn(seed, 60), samples=400).interval_percent for seed in range(400)]
    inside = np.mean([low <= -3 <= high for low, high in intervals])
    # 400 trials have a standard error of 1.1 points; percentile intervals are a little too short.
    assert 0.90 <= inside <= 0.98


def test_the_interval_is_over_documents_not_chunks():
    rng = np.random.default_rng(0)
    factors, n_bytes = np.repeat(rng.normal(1, 0.1, 20), 100), np.full(2000, 10)  # chunks of a document agree
    documents = np.repeat(np.arange(20), 100)
    of, against = Losses(factors, n_bytes, documents), Losses(np.ones(2000), n_bytes, documents)
    low, high = paired_bootstrap(of, against).interval_percent
    assert high - low == pytest.approx(2 * 1.96 * 100 * factors[::100].std() / np.sqrt(20), rel=0.1)


def test_fewer_than_six_documents_have_no_interval_and_the_note_says_why():
    one = Losses(np.array([1.0, 2.0]), np.array([3, 4]), np.array([7, 7]))
    difference = paired_bootstrap(one, Losses(2 * one.nats, one.bytes, one.documents))
    assert (difference.difference_percent, difference.interval_percent, difference.documents) == (-50.0, None, 1)
    assert difference.note == "no interval: a bootstrap needs at least 6 documents"
    empty = Losses(np.array([1.0, 0.0]), np.array([3, 0]), np.array([7, 8]))  # the second has nothing that is scored
    assert paired_bootstrap(empty, empty).interval_percent is None
    assert [paired_bootstrap(*drawn(0, n)).interval_percent is None for n in (2, 5, 6)] == [True, True, False]
    assert paired_bootstrap(*drawn(0, 6)).note == ""


def test_what_cannot_be_compared_is_refused():
    of, against = drawn(0, 5)
    with pytest.raises(UserError, match="different texts"):
        paired_bootstrap(of, drawn(1, 5)[1])
    with pytest.raises(UserError, match="nothing to compare"):
        paired_bootstrap(*(Losses(np.zeros(2), np.zeros(2), np.arange(2)) for _ in range(2)))
    with pytest.raises(UserError, match="not finite"):
        paired_bootstrap(Losses(of.nats * np.nan, of.bytes, of.documents), against)
    with pytest.raises(UserError, match="must have the same length"):
        Losses(of.nats[1:], of.bytes, of.documents)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"samples": 2.5}, {"seed": -1}, {"seed": None}])
def test_samples_and_seeds_that_are_no_whole_numbers_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name} must be a whole number of at least"):
        paired_bootstrap(*drawn(0, 5), **wrong)


def test_arrays_instead_of_losses_are_a_type_error():
    of, against = drawn(0, 5)
    for pair in ((of.nats, against), (of, against.nats), (of, None)):
        with pytest.raises(TypeError, match="must be of type Losses, not"):
            paired_bootstrap(*pair)
