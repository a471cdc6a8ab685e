"""Texts as sets of word n-grams, and their MinHash signatures. Paper §2.1.

Words are found in UTF-8 bytes. A maximal run of ASCII letters (case folded), digits, underscores and bytes from 0x80
is a word. Every other single byte is a word too, except ASCII white space and control characters. A gram is `words`
consecutive words. A text with fewer words has one gram, of all of them, and a text without words has none. Words and
grams are hashed to 64 bits, as polynomials of their bytes and words modulo 2⁶⁴, each followed by a mixer.

The k-th MinHash of a text is the minimum over its grams of lo + a_k · hi modulo 2³², where hi and lo are the halves of
the gram. For two functions and a random gram these values are independent and uniform, up to the common powers of two
of a_j − a_k. So the share of equal minima estimates the Jaccard similarity as independent draws would. Broder 1997."""

import itertools
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, kernel

SPACE, PART, SINGLE = 0, 1, 2  # kinds of byte: between words, part of a word, a word of its own
WORD_BASE, GRAM_BASE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd
MURMUR_SHIFT, MURMUR_FACTOR, MURMUR_FACTOR2 = 33, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53  # as in MurmurHash3
MAX_WORDS = 1 << 20  # A larger number is refused before memory is allocated.
NO_GRAM = np.uint32(0xFFFFFFFF)  # every entry of the signature of a text without words
KIND = np.full(256, SINGLE, np.uint8)
KIND[[*range(33), 127]] = SPACE
KIND[[*range(128, 256), *b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *b"abcdefghijklmnopqrstuvwxyz", *b"0123456789_"]] = PART
FOLDED = np.arange(256, dtype=np.uint8)
FOLDED[ord("A") : ord("Z") + 1] += 32


def mix(x: Array) -> Array:
    """A one-to-one map of uint64. Each bit of the result depends on all bits of x. Numba compiles it. Appleby 2011."""
    x = (x ^ (x >> np.uint64(MURMUR_SHIFT))) * np.uint64(MURMUR_FACTOR)
    x = (x ^ (x >> np.uint64(MURMUR_SHIFT))) * np.uint64(MURMUR_FACTOR2)
    x = x ^ (x >> np.uint64(MURMUR_SHIFT))
    return x


def multipliers(hashes: int) -> Array:
    """The a_k of the first `hashes` hash functions, (hashes,) uint32. They are always the same."""
    return (mix(np.arange(1, hashes + 1, dtype=np.uint64) * np.uint64(WORD_BASE)) >> np.uint64(32)).astype(np.uint32)


def _gram_hashes(data: Array, words: int) -> Array:
    """The hashes of a text's grams, in the order of the text, with repetitions.
    data: (bytes,) uint8. words: per gram, at least 1. Returns (grams,) uint64. Raises UserError for invalid ones."""
    hashes = _word_hashes(data)
    length = min(words, len(hashes))
    if length == 0:
        return hashes
    count = len(hashes) - length + 1
    grams = np.zeros(count, np.uint64)
    for i in range(length):
        grams = grams * np.uint64(GRAM_BASE) + hashes[i : i + count]
    return mix(grams)


def _word_hashes(data: Array) -> Array:
    """(words,) uint64: the mixed sum of (folded byte + 1) · WORD_BASE^(bytes after it in the word)."""
    padded = np.concatenate([[SPACE], KIND[data], [SPACE]])
    kind, previous, following = padded[1:-1], padded[:-2], padded[2:]
    first = np.flatnonzero((kind == SINGLE) | ((kind == PART) & (previous != PART)))
    last = np.flatnonzero((kind == SINGLE) | ((kind == PART) & (following != PART)))
    if len(first) == 0:
        return np.empty(0, np.uint64)
    sizes = last - first + 1
    powers = np.full(sizes.max(), WORD_BASE, np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    positions = np.flatnonzero(kind)  # every byte that is not a space belongs to a word, in order
    terms = (FOLDED[data[positions]].astype(np.uint64) + np.uint64(1)) * powers[np.repeat(last, sizes) - positions]
    return mix(np.add.reduceat(terms, np.cumsum(sizes) - sizes))


def _minhash(data: Array, offsets: Array, words: int, factors: Array) -> Array:
    """The MinHash signatures of texts.
    data: (bytes,) uint8, the texts one after another. offsets: (N + 1,) integers: text i is data[offsets[i] :
    offsets[i + 1]]. words: words per gram. factors: (hashes,) uint32, the a_k. Returns (N, hashes) uint32; a text
    without words has NO_GRAM throughout. Raises UserError for wrong types, and for offsets outside the data."""
    out = np.full((len(offsets) - 1, len(factors)), NO_GRAM, np.uint32)
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        grams = _gram_hashes(data[start:end], words)
        low, high = grams.astype(np.uint32), (grams >> np.uint64(32)).astype(np.uint32)
        for k in range(len(factors) if len(grams) else 0):
            out[row, k] = (low + factors[k] * high).min()
    return out


def _checked_bytes(data: Any, words: int, name: str = "gram_hashes") -> tuple[Array, int]:
    """The bytes as a contiguous array. Raises UserError for other types and for grams without words or of too many."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
        raise UserError(f"{name}: a text must be a one-dimensional array of uint8, its UTF-8 bytes")
    if not 1 <= words <= MAX_WORDS:
        raise UserError(f"{name}: a gram must have at least one word and at most {MAX_WORDS:,}, not {words}")
    return np.ascontiguousarray(data), words


def _checked_texts(data: Any, offsets: Any, words: int, factors: Any) -> tuple[Array, Array, int, Array]:
    """Contiguous arrays. Raises UserError like `minhash`."""
    data, words = _checked_bytes(data, words, "minhash")
    offsets, factors = np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(factors)
    if factors.dtype != np.uint32 or factors.ndim != 1:
        raise UserError("minhash: factors must be a one-dimensional array of uint32")
    if offsets.ndim != 1 or len(offsets) < 1 or (np.diff(offsets, prepend=0, append=len(data)) < 0).any():
        raise UserError(f"minhash: offsets must be (texts + 1,) and not fall, from 0 to at most {len(data)} bytes")
    return data, offsets, words, factors


gram_hashes = kernel("gram_hashes", numpy=_gram_hashes, numba=True, check=_checked_bytes)
minhash = kernel("minhash", numpy=_minhash, numba=True, check=_checked_texts)
