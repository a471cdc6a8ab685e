"""Hashed features in NumPy and Numba. Ground truth: Python's integers, one token at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.kernels.hashing import BUCKET_BITS, BUCKETS, count_features, project_features

MASK = 2**64 - 1
WEIGHTS = np.random.default_rng(7).integers(1, 300, BUCKETS).astype(np.int32)
both_kinds = pytest.mark.parametrize("kind", ["numpy", "numba"])
no_deadline = settings(deadline=None)  # the first call compiles


@st.composite
def chunks(draw, top=6):
    """(N, m) tokens drawn from few or many ids, including padding and end-of-text."""
    n, m = draw(st.integers(0, top)), draw(st.integers(0, 12))
    dtype = draw(st.sampled_from([np.uint16, np.uint32, np.int64]))
    n_ids = draw(st.sampled_from([3, 5, 4096, np.iinfo(dtype).max]))
    return np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, n_ids, (n, m)).astype(dtype)


def split_mix(number):
    """The output numbered `number` of Steele, Lea & Flood's generator, starting from state 0."""
    x = (number + 1) * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def features(row):
    """The buckets of one row: that of each token, then that of the pair that ends with it."""
    for i, token in enumerate(row):
        if token > 1:
            yield split_mix(token) >> 64 - BUCKET_BITS
            if i and row[i - 1] > 1:
                yield split_mix((row[i - 1] << 32) + token & MASK) >> 64 - BUCKET_BITS


def signs(bucket, d_key):
    return [1 if split_mix((bucket << 16) + j // 64) >> j % 64 & 1 else -1 for j in range(d_key)]


def key(row, d_key):
    sums = [0] * d_key
    for bucket in features(row):
        sums = [s + int(WEIGHTS[bucket]) * sign for s, sign in zip(sums, signs(bucket, d_key), strict=True)]
    sums = sums if any(sums) else signs(BUCKETS, d_key)
    return np.float32(np.array(sums) / np.sqrt(sum(s * s for s in sums)))


def counted(tokens):
    counts = np.zeros(BUCKETS, np.uint32)
    assert count_features(tokens, counts) is None
    return counts


def test_the_hash_is_split_mix_64():
    # the first outputs of the published generator from a state of 0
    assert [split_mix(i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@both_kinds
@no_deadline
@given(tokens=chunks())
def test_a_chunk_counts_once_in_each_bucket_of_its_tokens_and_pairs(kind, tokens):
    kernels.use(kind)
    expected = np.zeros(BUCKETS, np.uint32)
    for row in tokens.tolist():
        expected[list(set(features(row)))] += 1
    np.testing.assert_array_equal(counted(tokens), expected)


@both_kinds
@no_deadline
@given(tokens=chunks(), cut=st.integers(0, 6))
def test_counts_of_parts_add_up(kind, tokens, cut):
    kernels.use(kind)
    counts = counted(tokens[cut:])
    count_features(tokens[:cut], counts)
    np.testing.assert_array_equal(counts, counted(tokens))


@both_kinds
@no_deadline
@given(tokens=chunks(), d_key=st.sampled_from([1, 5, 63, 64, 65, 128, 150]))
def test_a_key_is_the_weighted_sum_of_signs_scaled_to_unit_length(kind, tokens, d_key):
    kernels.use(kind)
    keys = project_features(tokens, WEIGHTS, d_key)
    assert (keys.dtype, keys.shape) == (np.float32, (len(tokens), d_key))
    for actual, row in zip(keys, tokens.tolist(), strict=True):
        np.testing.assert_array_equal(actual, key(row, d_key))


def test_keys_and_counts_have_the_same_bits_for_any_kind_batch_and_number_of_threads():
    tokens = np.random.default_rng(0).zipf(1.3, (700, 64)).clip(0, 4095)  # several blocks of each kind
    keys, counts = [], []
    for kind in ("numpy", "numba"):
        kernels.use(kind)
        for n_threads in (1, 3):
            threads.use_threads(n_threads)
            keys += [project_features(tokens, WEIGHTS, 70)]
            keys += [np.concatenate([project_features(tokens[i : i + 9], WEIGHTS, 70) for i in range(0, 700, 9)])]
            counts.append(counted(tokens))
    for other in keys[1:]:
        np.testing.assert_array_equal(other, keys[0])
    for other in counts[1:]:
        np.testing.assert_array_equal(other, counts[0])


@both_kinds
def test_padding_and_end_of_text_are_not_features_and_break_a_pair(kind):
    kernels.use(kind)
    assert not counted(np.array([[0, 1, 0, 1]])).any()
    rows = np.array([[7, 0, 9, 0], [7, 1, 9, 1], [0, 7, 1, 9]])
    assert len(set(map(bytes, project_features(rows, WEIGHTS, 64)))) == 1
    assert counted(rows[:1]).sum() == 2
    assert counted(np.array([[7, 9, 0, 0]])).sum() == 3


@both_kinds
def test_a_row_without_features_is_as_far_from_other_rows_as_unrelated_rows_are(kind):
    kernels.use(kind)
    tokens = np.random.default_rng(0).integers(2, 4096, (200, 64))
    tokens[0], tokens[1] = 0, 1
    keys = project_features(tokens, WEIGHTS, 256)
    np.testing.assert_array_equal(keys[0], keys[1])
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, atol=1e-6)
    # Independent signs give 2, with a standard deviation of 2 / √d_key. Six of these are allowed.
    assert np.abs(((keys[2:] - keys[0]) ** 2).sum(axis=1) - 2).max() < 6 * 2 / 16


def test_signs_are_balanced_and_uncorrelated():
    kernels.use("numba")
    rows = project_features(np.arange(2, 4098)[:, None], np.ones(BUCKETS, np.int32), 128).astype(np.float64)
    np.testing.assert_allclose(np.abs(rows), 128**-0.5, rtol=1e-6)
    # products of independent signs: mean 0, deviation 1 / √4096; 8256 pairs of columns stay within six of these
    correlation = rows.T @ rows * (128 / 4096)
    assert np.abs(correlation - np.eye(128)).max() < 6 / 64
    assert np.abs(rows.mean(axis=0)).max() * 128**0.5 < 6 / 64


@both_kinds
@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        (np.ones(4, int), np.zeros(BUCKETS, np.uint32), "tokens have shape"),
        (np.ones((2, 4)), np.zeros(BUCKETS, np.uint32), "tokens are float64"),
        (np.ones((2, 4), np.uint64), np.zeros(BUCKETS, np.uint32), "tokens are uint64"),
        (np.ones((2, 4), int), np.zeros(BUCKETS, np.int64), "counts must be"),
        (np.ones((2, 4), int), np.zeros(BUCKETS - 1, np.uint32), "counts must be"),
        (np.ones((2, 4), int), np.zeros(2 * BUCKETS, np.uint32)[::2], "counts must be"),
        (np.ones((2, 4), int), np.broadcast_to(np.uint32(0), BUCKETS), "counts must be"),
    ],
)
def test_the_error_for_wrong_tokens_or_counts_names_them(kind, tokens, counts, message):
    kernels.use(kind)
    with pytest.raises(UserError, match=message):
        count_features(tokens, counts)


@both_kinds
@pytest.mark.parametrize(
    ("tokens", "weights", "d_key", "message"),
    [
        (np.ones(4, int), WEIGHTS, 8, "tokens have shape"),
        (np.ones((1, 4)), WEIGHTS, 8, "tokens are float64"),
        (np.ones((1, 4), int), WEIGHTS[1:], 8, "weights are"),
        (np.ones((1, 4), int), WEIGHTS.astype(float), 8, "weights are"),
        (np.ones((1, 4), int), WEIGHTS, 0, "d_key must be from 1"),
    ],
)
def test_the_error_for_an_argument_that_cannot_be_projected_names_it(kind, tokens, weights, d_key, message):
    kernels.use(kind)
    with pytest.raises(UserError, match=message):
        project_features(tokens, weights, d_key)
