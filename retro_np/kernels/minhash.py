"""Texts as sets of word n-grams, their MinHash signatures, and the signatures that agree in a band. Paper §2.1.

Words are found in the bytes of UTF-8, whatever the tokenizer: a longest run of ASCII letters (case folded), digits,
underscores and bytes from 0x80 is a word, and so is any other single byte but ASCII's white space and control
characters. A gram is `words` words in a row; a text of fewer words has one gram, of them all, and a text of none has
none. Word and gram are polynomials of their bytes and words modulo 2⁶⁴, each put through a mixer: 64 bits a gram.

The k-th MinHash of a text is its grams' least lo + a_k · hi modulo 2³², hi and lo being a gram's halves. For two
functions and a random gram these values are, but for the common powers of two of a_j − a_k, independent and uniform:
the share of equal minima estimates the Jaccard similarity with the variance of independent draws. Broder 1997.
"""

import functools
import importlib
import itertools

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import check_shapes, kernel
from retro_np.kernels.threads import blocks, parallel_for

SPACE, PART, ALONE = 0, 1, 2  # kinds of byte: between words, of a word, a word by itself
WORD_BASE, GRAM_BASE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd
MIX = (
    (33, 0xFF51AFD7ED558CCD),
    (33, 0xC4CEB9FE1A85EC53),
    (33, 1),
)  # shift, then multiply: the finaliser of MurmurHash3
NO_GRAM = np.uint32(0xFFFFFFFF)  # every entry of the signature of a text without words
SPAN = 1 << 20  # bytes of a text that a thread takes at once
TEXTS, ROWS = 16, 64  # spans, and signatures, of one job


def _byte_tables():
    kind = np.full(256, ALONE, np.uint8)
    kind[[*range(33), 127]] = SPACE
    kind[[*range(128, 256), *b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *b"abcdefghijklmnopqrstuvwxyz", *b"0123456789_"]] = PART
    folded = np.arange(256, dtype=np.uint8)
    folded[ord("A") : ord("Z") + 1] += 32
    return kind, folded


KIND, FOLDED = _byte_tables()


def mix(x: np.ndarray) -> np.ndarray:
    """Turn 64-bit integers (N,) into others, one to one, so that each bit depends on all. Appleby 2011."""
    for shift, factor in MIX:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x


def multipliers(hashes: int) -> np.ndarray:
    """The a_k of the first so many hash functions, (hashes,) uint32: always the same ones."""
    return (mix(np.arange(1, hashes + 1, dtype=np.uint64) * np.uint64(WORD_BASE)) >> np.uint64(32)).astype(np.uint32)


def _grams_numpy(data, words):
    """The hashes of a text's grams, in the text's order, repeated ones too.

    data: (bytes,) uint8. words: of a gram, at least 1. Returns (grams,) uint64. Raises UserError for what is none.
    """
    data = _checked_bytes("gram_hashes", data, words)
    hashes = _word_hashes(data)
    length = min(words, len(hashes))
    if length == 0:
        return hashes
    count = len(hashes) - length + 1
    grams = np.zeros(count, np.uint64)
    for i in range(length):
        grams = grams * np.uint64(GRAM_BASE) + hashes[i : i + count]
    return mix(grams)


def _word_hashes(data):
    """(words,) uint64: Σ (folded byte + 1) · base^(bytes after it), mixed."""
    kind = np.concatenate([[SPACE], KIND[data], [SPACE]])
    here, before, after = kind[1:-1], kind[:-2], kind[2:]
    first = np.flatnonzero((here == ALONE) | ((here == PART) & (before != PART)))
    last = np.flatnonzero((here == ALONE) | ((here == PART) & (after != PART)))
    if len(first) == 0:
        return np.empty(0, np.uint64)
    sizes = last - first + 1
    powers = np.full(sizes.max(), WORD_BASE, np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    at = np.flatnonzero(here)  # words follow one another: what is no space is theirs, in order
    terms = (FOLDED[data[at]].astype(np.uint64) + np.uint64(1)) * powers[np.repeat(last, sizes) - at]
    return mix(np.add.reduceat(terms, np.cumsum(sizes) - sizes))


def _grams_numba(data, words):
    data = _checked_bytes("gram_hashes", data, words)
    out = np.empty(max(1, len(data)), np.uint64)
    found = _compiled("scan")(data, 0, len(data), 0, len(data), np.empty(words, np.uint64), out)
    return out[:found].copy()


gram_hashes = kernel("gram_hashes", numpy=_grams_numpy, numba=_grams_numba)


def _minhash_numpy(data, offsets, words, factors):
    """The MinHash signatures of texts.

    data: (bytes,) uint8, the texts one after another. offsets: (N + 1,) integers: text i is data[offsets[i] :
    offsets[i + 1]]. words: of a gram. factors: (hashes,) uint32, the a_k. Returns (N, hashes) uint32, NO_GRAM
    throughout where a text has no word. Raises UserError for other types and for offsets that leave the data.
    """
    data, offsets, factors = _checked_texts(data, offsets, words, factors)
    out = np.full((len(offsets) - 1, len(factors)), NO_GRAM, np.uint32)
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        grams = _grams_numpy(data[start:end], words)
        low, high = grams.astype(np.uint32), (grams >> np.uint64(32)).astype(np.uint32)
        for k in range(len(factors) if len(grams) else 0):
            out[row, k] = (low + factors[k] * high).min()
    return out


def _minhash_numba(data, offsets, words, factors):
    data, offsets, factors = _checked_texts(data, offsets, words, factors)
    starts, ends = offsets[:-1], offsets[1:]
    each = np.maximum(1, -(-(ends - starts) // SPAN))  # spans of a text
    row, first = np.repeat(np.arange(len(starts)), each), np.cumsum(each) - each
    begins = starts[row] + SPAN * (np.arange(len(row)) - first[row])
    spans = np.stack([starts[row], ends[row], begins, np.minimum(begins + SPAN, ends[row])], axis=1)
    out, loop = np.full((len(spans), len(factors)), NO_GRAM, np.uint32), _compiled("minhash")
    parallel_for(lambda some: loop(data, spans[some], words, factors, out[some]), blocks(len(spans), TEXTS))
    return np.minimum.reduceat(out, first) if len(first) < len(out) else out


minhash = kernel("minhash", numpy=_minhash_numpy, numba=_minhash_numba)


def _matches_numpy(signatures, held, order, lows, highs, least, limit):
    """For each signature the held ones that share a band with it, those with the most equal entries first.

    signatures: (N, hashes) uint32. held: (H, hashes) uint32. order: (bands, H) integers, the held rows sorted by each
    band. lows, highs: (N, bands) integers: order[b, lows[i, b] : highs[i, b]] agree with signature i in band b.
    least: entries that must be equal. limit: held rows kept for a signature. Where the number of equal entries is the
    same, the lower row is first. Returns rows (N, limit) int64, −1 where there is none, and equal (N, limit) int64.
    Raises UserError for shapes that do not go together.
    """
    arrays = _checked_bands(signatures, held, order, lows, highs)
    signatures, held, order, lows, highs = arrays
    rows, equal = np.full((len(signatures), limit), -1, np.int64), np.zeros((len(signatures), limit), np.int64)
    for i, signature in enumerate(signatures):
        near = [some[low:high] for some, low, high in zip(order, lows[i], highs[i], strict=True)]
        near = np.unique(np.concatenate(near)) if near else np.empty(0, np.int64)
        same = (held[near] == signature).sum(axis=1)
        near, same = near[same >= least], same[same >= least]
        best = np.lexsort((near, -same))[:limit]
        rows[i, : len(best)], equal[i, : len(best)] = near[best], same[best]
    return rows, equal


def _matches_numba(signatures, held, order, lows, highs, least, limit):
    signatures, held, order, lows, highs = _checked_bands(signatures, held, order, lows, highs)
    rows, equal = np.full((len(signatures), limit), -1, np.int64), np.zeros((len(signatures), limit), np.int64)
    loop = _compiled("band_matches")

    def job(some):
        loop(signatures[some], held, order, lows[some], highs[some], least, rows[some], equal[some])

    parallel_for(job, blocks(len(signatures), ROWS))
    return rows, equal


band_matches = kernel("band_matches", numpy=_matches_numpy, numba=_matches_numba)


@functools.cache
def _compiled(name):
    return getattr(importlib.import_module("retro_np.kernels.minhash_numba"), name)


def _checked_bytes(name, data, words):
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
        raise UserError(f"{name}: a text is a one-dimensional array of uint8, the bytes of UTF-8")
    if words < 1:
        raise UserError(f"{name}: a gram has at least one word, not {words}")
    return np.ascontiguousarray(data)


def _checked_texts(data, offsets, words, factors):
    data = _checked_bytes("minhash", data, words)
    offsets, factors = np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(factors)
    if factors.dtype != np.uint32 or factors.ndim != 1:
        raise UserError("minhash: factors are a one-dimensional array of uint32")
    steps = np.diff(offsets, prepend=0, append=len(data))
    if offsets.ndim != 1 or len(offsets) < 1 or (steps < 0).any():
        raise UserError(f"minhash: offsets are (texts + 1,) and rise from 0 or more to {len(data)} bytes or fewer")
    return data, offsets, factors


def _checked_bands(signatures, held, order, lows, highs):
    signatures, held = (np.ascontiguousarray(array, np.uint32) for array in (signatures, held))
    order, lows, highs = (np.ascontiguousarray(array, np.int64) for array in (order, lows, highs))
    bands = len(order)
    check_shapes(
        "band_matches",
        held=(held, (len(held), signatures.shape[1])),
        order=(order, (bands, len(held))),
        lows=(lows, (len(signatures), bands)),
        highs=(highs, (len(signatures), bands)),
    )
    inside = (order >= 0).all() and (order < len(held)).all() and (lows >= 0).all() and (highs <= len(held)).all()
    if not inside:
        raise UserError(f"band_matches: order, lows and highs must stay inside the {len(held)} held signatures")
    return signatures, held, order, lows, highs
