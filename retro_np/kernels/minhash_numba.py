"""The loops of minhash.py in Numba."""

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels import minhash as in_numpy
from retro_np.kernels.jit import jit
from retro_np.kernels.minhash import FOLDED, KIND, NO_GRAM, PART, SPACE
from retro_np.kernels.threads import parallel_for

BLOCK_GRAMS = 1024  # grams that stay in the first-level cache while every hash function goes over them
ONE, HALF_BITS = np.uint64(1), np.uint64(32)
WORD_BASE, GRAM_BASE = np.uint64(in_numpy.WORD_BASE), np.uint64(in_numpy.GRAM_BASE)
_mix = jit(in_numpy.mix)


def gram_hashes(data: Array, words: int) -> Array:
    """Like retro_np.kernels.minhash.gram_hashes."""
    out = np.empty(max(1, len(data)), np.uint64)
    return out[: _scan(data, 0, 0, np.uint64(0), np.zeros(words, np.uint64), out)[0]].copy()


def minhash(data: Array, offsets: Array, words: int, factors: Array) -> Array:
    """Like retro_np.kernels.minhash.minhash."""
    out = np.full((len(offsets) - 1, len(factors)), NO_GRAM, np.uint32)

    def lower(i: int) -> None:
        _minhash(data[offsets[i] : offsets[i + 1]], words, factors, np.empty(BLOCK_GRAMS, np.uint64), out[i])

    parallel_for(lower, range(len(out)))
    return out


@jit
def _scan(
    data: Array, position: int, n_words: int, gram: np.uint64, ring: Array, out: Array
) -> tuple[int, int, int, np.uint64]:
    """Write the next grams of a text to `out`, until it is full or the text ends.

    position: where to go on. n_words: the words before it. gram: the sum over the last ones. ring: (words,) uint64, the
    last words, at first zeros. Returns how many grams were written, and the new position, n_words and gram."""
    words, count, leaving = len(ring), 0, ONE
    for _ in range(words):  # GRAM_BASE^words, by which the word that leaves a gram has been multiplied
        leaving *= GRAM_BASE
    slot = n_words % words
    while position < len(data) and count < len(out):
        kind = KIND[data[position]]
        if kind != SPACE:
            word = np.uint64(FOLDED[data[position]]) + ONE
            while kind == PART and position + 1 < len(data) and KIND[data[position + 1]] == PART:
                position += 1
                word = word * WORD_BASE + (np.uint64(FOLDED[data[position]]) + ONE)
            word = _mix(word)
            gram = gram * GRAM_BASE + word - ring[slot] * leaving
            ring[slot] = word
            slot = slot + 1 if slot + 1 < words else 0
            n_words += 1
            if n_words >= words:
                out[count] = _mix(gram)
                count += 1
        position += 1
    if position == len(data) and 0 < n_words < words:  # these are all of the text's words
        out[0] = _mix(gram)
        count = 1
    return count, position, n_words, gram


@jit
def _minhash(data: Array, words: int, factors: Array, grams: Array, out: Array) -> None:
    """Lower `out` (hashes,) to the minima over a text's grams. grams: scratch."""
    ring, low, high = np.zeros(words, np.uint64), np.empty(len(grams), np.uint32), np.empty(len(grams), np.uint32)
    position, n_words, gram = 0, 0, np.uint64(0)
    while position < len(data):
        count, position, n_words, gram = _scan(data, position, n_words, gram, ring, grams)
        for g in range(count):
            low[g] = np.uint32(grams[g])
            high[g] = np.uint32(grams[g] >> HALF_BITS)
        for k in range(len(factors)):
            factor, minimum = factors[k], out[k]
            for g in range(count):
                minimum = min(minimum, np.uint32(low[g] + factor * high[g]))
            out[k] = minimum
