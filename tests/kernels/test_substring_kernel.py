"""Common runs of tokens, in NumPy and Numba. Ground truth: brute force over Python slices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels.substring import common_prefix_lengths, longest_common_substring


@st.composite
def tokens_and_values(draw):
    """chunks (N, m) and values (N, k, r) with few different tokens, including 0, so that runs are long."""
    n, m, k, r = (draw(st.integers(0, top)) for top in (4, 9, 3, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_ids, dtypes = draw(st.integers(1, 4)), st.sampled_from([np.uint16, np.uint32, np.int64])
    return rng.integers(0, n_ids, (n, m)).astype(draw(dtypes)), rng.integers(0, n_ids, (n, k, r)).astype(draw(dtypes))


def occurs_in(run, values):
    return 0 not in run and any(run == value[j : j + len(run)] for value in values for j in range(len(value)))


def run_ending_at(tokens, end, values):
    """The length of the longest slice of tokens that ends there and occurs in a value."""
    return max(
        length for length in range(end + 2) if length == 0 or occurs_in(tokens[end + 1 - length : end + 1], values)
    )


@pytest.mark.parametrize("kind", ["numpy", "numba"])
@settings(deadline=None)  # Numba compiles on the first call
@given(drawn=tokens_and_values())
def test_the_longest_common_substring_equals_brute_force_over_all_slices(kind, drawn):
    chunks, values = drawn
    kernels.use(kind)
    longest = longest_common_substring(chunks, values)
    assert longest.dtype == np.int64
    rows = zip(chunks.tolist(), values.tolist(), strict=True)
    expected = [max((run_ending_at(c, i, v) for i in range(len(c))), default=0) for c, v in rows]
    np.testing.assert_array_equal(longest, np.array(expected, np.int64))


@settings(deadline=None)
@given(drawn=tokens_and_values())
def test_common_prefix_lengths_equal_brute_force_over_all_slices(drawn):
    for tokens, values in zip(*drawn, strict=True):
        expected = [run_ending_at(tokens.tolist(), i, values.tolist()) for i in range(len(tokens))]
        lengths = common_prefix_lengths(tokens, values)
        assert lengths.dtype == np.int64
        np.testing.assert_array_equal(lengths, np.array(expected, np.int64))


@pytest.mark.parametrize("kind", ["numpy", "numba"])
def test_a_run_may_not_be_pieced_together_from_two_values_nor_go_through_padding(kind):
    kernels.use(kind)
    chunks = [[1, 2, 3, 4], [5, 0, 6, 6], [7, 8, 9, 7]]
    values = [[[1, 2, 9, 9], [9, 9, 3, 4]], [[5, 0, 6, 6], [0, 0, 0, 0]], [[6, 7, 8, 9], [7, 7, 7, 7]]]
    assert longest_common_substring(np.array(chunks), np.array(values)).tolist() == [2, 2, 3]


@pytest.mark.parametrize("kind", ["numpy", "numba"])
def test_without_values_nothing_is_common(kind):
    kernels.use(kind)
    assert longest_common_substring(np.ones((3, 4), int), np.ones((3, 0, 8), int)).tolist() == [0, 0, 0]
    assert common_prefix_lengths(np.ones(4, int), np.ones((0, 8), int)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["numpy", "numba"])
@pytest.mark.parametrize(
    ("chunks", "values", "message"),
    [
        (np.ones(4, int), np.ones((1, 2, 4), int), "chunks have shape"),
        (np.ones((2, 4), int), np.ones((2, 4), int), "values have shape"),
        (np.ones((2, 4), int), np.ones((3, 1, 4), int), "2 chunks but values for 3"),
        (np.ones((2, 4)), np.ones((2, 1, 4), int), "chunks are float64"),
        (np.ones((2, 4), int), np.ones((2, 1, 4), np.uint64), "values are uint64"),
        (np.ones((2, 4), bool), np.ones((2, 1, 4), int), "chunks are bool"),
    ],
)
def test_the_error_for_wrong_chunks_or_values_names_them(kind, chunks, values, message):
    kernels.use(kind)
    with pytest.raises(UserError, match=message):
        longest_common_substring(chunks, values)


def test_the_error_for_wrong_tokens_or_values_names_them():
    with pytest.raises(UserError, match="tokens have shape"):
        common_prefix_lengths(np.ones((1, 4), int), np.ones((1, 4), int))
    with pytest.raises(UserError, match="values are float64"):
        common_prefix_lengths(np.ones(4, int), np.ones((1, 4)))
