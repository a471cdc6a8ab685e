"""The loops of minhash.py in Numba."""

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels import minhash as in_numpy
from retro_np.kernels.jit import jit
from retro_np.kernels.minhash import FOLDED, KIND, NO_GRAM, PART, SPACE
from retro_np.kernels.threads import blocks, parallel_for

# Longer texts are cut into spans, whose grams stay in the first-level cache while every hash function goes over them.
SPAN_BYTES, SPANS_PER_JOB = 8192, 32

ONE, HALF_BITS = np.uint64(1), np.uint64(32)
WORD_BASE, GRAM_BASE = np.uint64(in_numpy.WORD_BASE), np.uint64(in_numpy.GRAM_BASE)
_mix = jit(in_numpy.mix)


def gram_hashes(data: Array, words: int) -> Array:
    """Like retro_np.kernels.minhash.gram_hashes."""
    out = np.empty(max(1, len(data)), np.uint64)
    count = _scan(data, 0, len(data), 0, len(data), np.empty(words, np.uint64), out)
    return out[:count].copy()


def minhash(data: Array, offsets: Array, words: int, factors: Array) -> Array:
    """Like retro_np.kernels.minhash.minhash."""
    starts, ends = offsets[:-1], offsets[1:]
    n_spans = np.maximum(1, -(-(ends - starts) // SPAN_BYTES))  # spans per text
    row, first = np.repeat(np.arange(len(starts)), n_spans), np.cumsum(n_spans) - n_spans
    begins = starts[row] + SPAN_BYTES * (np.arange(len(row)) - first[row])
    spans = np.stack([starts[row], ends[row], begins, np.minimum(begins + SPAN_BYTES, ends[row])], axis=1)
    out = np.full((len(spans), len(factors)), NO_GRAM, np.uint32)
    parallel_for(lambda i: _minhash(data, spans[i], words, factors, out[i]), blocks(len(spans), SPANS_PER_JOB))
    return np.minimum.reduceat(out, first) if len(first) < len(out) else out


@jit
def _scan(data: Array, start: int, end: int, begin: int, stop: int, ring: Array, out: Array) -> int:
    """Write the grams of the text data[start:end] whose first word begins in [begin, stop), and return their number.

    ring: (words,) uint64, scratch. out: (stop − begin,) uint64 or more, and at least 1. The scan continues beyond stop
    for the words that the last of these grams still need, so the parts of a text together give all of its grams."""
    words = len(ring)
    ring[:] = 0
    leaving = ONE  # GRAM_BASE^words, by which the word that leaves a gram has been multiplied
    for _ in range(words):
        leaving *= GRAM_BASE
    position, slot, n_words, n_starting, count, gram = begin, 0, 0, 0, 0, np.uint64(0)
    if begin > start and KIND[data[begin - 1]] == PART:  # inside a word that began before
        while position < stop and KIND[data[position]] == PART:
            position += 1
    while position < end:
        if position >= stop and (n_starting == 0 or n_words >= n_starting + words - 1):
            break
        kind = KIND[data[position]]
        if kind == SPACE:
            position += 1
            continue
        if position < stop:
            n_starting += 1
        word = np.uint64(FOLDED[data[position]]) + ONE
        position += 1
        if kind == PART:
            while position < end and KIND[data[position]] == PART:
                word = word * WORD_BASE + (np.uint64(FOLDED[data[position]]) + ONE)
                position += 1
        word = _mix(word)
        gram = gram * GRAM_BASE + word - ring[slot] * leaving
        ring[slot] = word
        slot = slot + 1 if slot + 1 < words else 0
        n_words += 1
        if n_words >= words:
            out[count] = _mix(gram)
            count += 1
    if 0 < n_words < words:  # The text ended first. If nothing came before, these are all of its words.
        while begin > start and KIND[data[begin - 1]] == SPACE:
            begin -= 1
        if begin == start:
            out[0] = _mix(gram)
            count = 1
    return count


@jit
def _minhash(data: Array, spans: Array, words: int, factors: Array, out: Array) -> None:
    """Lower each row of `out` (spans, hashes) to a span's minima. spans: rows of _scan's start, end, begin, stop."""
    size = max(1, (spans[:, 3] - spans[:, 2]).max())
    ring, grams = np.empty(words, np.uint64), np.empty(size, np.uint64)
    low, high = np.empty(size, np.uint32), np.empty(size, np.uint32)
    for s in range(len(spans)):
        count = _scan(data, spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3], ring, grams)
        for g in range(count):
            low[g] = np.uint32(grams[g])
            high[g] = np.uint32(grams[g] >> HALF_BITS)
        for k in range(len(factors)):
            factor, minimum = factors[k], out[s, k]
            for g in range(count):
                minimum = min(minimum, np.uint32(low[g] + factor * high[g]))
            out[s, k] = minimum
