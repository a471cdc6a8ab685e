"""Grams and MinHash. Ground truth: regular expressions and tuples of words, minima in Python's integers; Numba against
NumPy bit for bit."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import minhash_numba, threads
from retro_np.kernels.minhash import gram_hashes, minhash, multipliers

KINDS = pytest.mark.parametrize("kind", ["numpy", "numba"])
WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\x00-\x20\x7f]")
ALPHABET = [b"a", b"B", b"b", b"_", b"7", b"(", b"=", b" ", b"\n", b"\0", b"\x7f", "é".encode(), b"\xff", b"  ", b"if"]
texts = st.lists(st.sampled_from(ALPHABET), max_size=60).map(b"".join)


def as_array(data):
    return np.frombuffer(data, np.uint8)


def joined(parts):
    return as_array(b"".join(parts)), np.cumsum([0, *map(len, parts)])


def grams_as_tuples(data, words):
    all_words = [word.lower() for word in WORD.findall(data)]
    length = min(words, len(all_words))
    return [tuple(all_words[i : i + length]) for i in range(len(all_words) - length + 1)] if all_words else []


def random_text(rng, words, longest=12):
    """Words of few characters and all lengths, separated by gaps of all lengths."""
    lengths, gaps = rng.integers(1, longest, words), rng.integers(0, longest, words)
    pairs = zip(lengths, gaps, strict=True)
    return b"".join(bytes(rng.choice([97, 66, 40, 200], n)) + b" " * gap for n, gap in pairs)


@KINDS
@settings(deadline=None)  # Numba compiles on the first call
@given(data=texts, more=texts, words=st.integers(1, 15))
def test_two_grams_have_equal_hashes_if_and_only_if_their_words_are_equal(kind, data, more, words):
    kernels.use(kind)
    hashes = [gram for text in (data, more) for gram in gram_hashes(as_array(text), words).tolist()]
    expected = grams_as_tuples(data, words) + grams_as_tuples(more, words)
    assert len(hashes) == len(expected)
    assert len(set(zip(hashes, expected, strict=True))) == len(set(hashes)) == len(set(expected))


@settings(deadline=None)
@given(data=st.binary(max_size=300), words=st.integers(1, 15))
def test_numba_and_numpy_give_a_gram_the_same_hash(data, words):
    results = []
    for kind in ("numpy", "numba"):
        kernels.use(kind)
        results.append(gram_hashes(as_array(data), words))
    assert results[0].dtype == results[1].dtype == np.uint64
    np.testing.assert_array_equal(*results)


@KINDS
@settings(deadline=None)
@given(parts=st.lists(texts, max_size=5), words=st.integers(1, 6), hashes=st.integers(1, 9))
def test_a_signature_holds_the_minimum_of_each_hash_function(kind, parts, words, hashes):
    kernels.use(kind)
    factors = multipliers(hashes)
    signatures = minhash(*joined(parts), words, factors)
    assert signatures.shape == (len(parts), hashes)
    assert signatures.dtype == np.uint32
    for text, signature in zip(parts, signatures, strict=True):
        grams = [divmod(gram, 2**32) for gram in gram_hashes(as_array(text), words).tolist()]
        for k, factor in enumerate(factors.tolist()):
            values = [(low + factor * high) % 2**32 for high, low in grams]
            assert signature[k] == min(values, default=2**32 - 1)


@pytest.mark.parametrize("words", [1, 13])
@pytest.mark.parametrize("longest", [3, 12, 3000])  # words and gaps longer than a block, too
def test_a_text_in_blocks_of_any_number_of_grams_has_the_signature_of_the_whole_text(words, longest, monkeypatch):
    rng = np.random.default_rng(longest)
    parts = [random_text(rng, int(count), longest) for count in (0, 1, 5, 12, 13, 40)] + [random_text(rng, 9000, 9)]
    parts += [b" " * 5000 + b"two words" + b" " * 5000, b"x" * 20_000, b" " * 20_000, b"a " * 9 + b" " * 9000 + b"end"]
    factors = multipliers(8)
    kernels.use("numpy")
    expected = minhash(*joined(parts), words, factors)
    kernels.use("numba")
    for block in (1, 64, 1000, 1 << 20):
        monkeypatch.setattr(minhash_numba, "BLOCK_GRAMS", block)
        for count in (1, 3):
            threads.use_threads(count)
            np.testing.assert_array_equal(minhash(*joined(parts), words, factors), expected)


def test_the_hash_functions_are_always_the_same():
    expected = []
    for k in range(1, 1001):
        x = k * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD % 2**64
        x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
        expected.append((x ^ x >> 33) >> 32)
    assert multipliers(1000).tolist() == expected
    assert len(set(expected)) == 1000


@KINDS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(4), [0, 4], 13, multipliers(2)), "minhash: a text must be"),
        ((np.zeros((2, 2), np.uint8), [0, 4], 13, multipliers(2)), "minhash: a text must be"),
        ((np.zeros(4, np.uint8), [0, 5], 13, multipliers(2)), "offsets must be"),
        ((np.zeros(4, np.uint8), [-1, 4], 13, multipliers(2)), "offsets must be"),
        ((np.zeros(4, np.uint8), [0, 3, 2], 13, multipliers(2)), "offsets must be"),
        ((np.zeros(4, np.uint8), [0, 4], 0, multipliers(2)), "at least one word"),
        ((np.zeros(4, np.uint8), [0, 4], 13, np.ones(2)), "factors must be"),
    ],
)
def test_the_error_for_arguments_that_are_not_texts_names_them(kind, arguments, message):
    kernels.use(kind)
    with pytest.raises(UserError, match=message):
        minhash(*arguments)
