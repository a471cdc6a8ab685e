"""The loops of minhash.py, for Numba."""

import numpy as np

from retro_np.kernels import minhash as in_numpy
from retro_np.kernels.jit import jit

SPACE, PART = in_numpy.SPACE, in_numpy.PART
KIND, FOLDED = in_numpy.KIND, in_numpy.FOLDED
WORD_BASE, GRAM_BASE, ONE = np.uint64(in_numpy.WORD_BASE), np.uint64(in_numpy.GRAM_BASE), np.uint64(1)
SHIFT, FIRST, SECOND = (np.uint64(number) for number in (in_numpy.MIX[0][0], in_numpy.MIX[0][1], in_numpy.MIX[1][1]))
HALF = np.uint64(32)
PIECE = 8192  # bytes: their grams stay in the first-level cache while every hash function goes over them


@jit
def mix(x):
    x = (x ^ (x >> SHIFT)) * FIRST
    x = (x ^ (x >> SHIFT)) * SECOND
    return x ^ (x >> SHIFT)


@jit
def scan(data, start, end, begin, stop, ring, out):
    """Write the grams of the text data[start:end] whose first word begins in [begin, stop); return how many.

    ring: (words,) uint64, scratch. out: (stop − begin,) uint64 at least, 1 at least. The scan goes on beyond stop, for
    the words that the last of these grams still lack; so the parts of a text give what the whole gives.
    """
    words = len(ring)
    ring[:] = 0
    leaving = ONE  # GRAM_BASE^words, by which the word that leaves a gram has been multiplied
    for _ in range(words):
        leaving *= GRAM_BASE
    at, slot, seen, own, count, gram = begin, 0, 0, 0, 0, np.uint64(0)
    if begin > start and KIND[data[begin - 1]] == PART:  # inside a word that began before
        while at < stop and KIND[data[at]] == PART:
            at += 1
    while at < end:
        if at >= stop and (own == 0 or seen >= own + words - 1):
            break
        kind = KIND[data[at]]
        if kind == SPACE:
            at += 1
            continue
        if at < stop:
            own += 1
        word = np.uint64(FOLDED[data[at]]) + ONE
        at += 1
        if kind == PART:
            while at < end and KIND[data[at]] == PART:
                word = word * WORD_BASE + (np.uint64(FOLDED[data[at]]) + ONE)
                at += 1
        word = mix(word)
        gram = gram * GRAM_BASE + word - ring[slot] * leaving
        ring[slot] = word
        slot = slot + 1 if slot + 1 < words else 0
        seen += 1
        if seen >= words:
            out[count] = mix(gram)
            count += 1
    if 0 < seen < words:  # the text ended first: if nothing came before, these are all of its words
        while begin > start and KIND[data[begin - 1]] == SPACE:
            begin -= 1
        if begin == start:
            out[0] = mix(gram)
            count = 1
    return count


@jit
def minhash(data, spans, words, factors, out):
    """Lower each row of `out` (spans, hashes) to a span's minima. spans: rows of `scan`'s start, end, begin, stop."""
    ring, grams = np.empty(words, np.uint64), np.empty(PIECE, np.uint64)
    low, high = np.empty(PIECE, np.uint32), np.empty(PIECE, np.uint32)
    for s in range(len(spans)):
        start, end, begin, stop = spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3]
        for piece in range(begin, stop, PIECE):
            count = scan(data, start, end, piece, min(piece + PIECE, stop), ring, grams)
            for g in range(count):
                low[g] = np.uint32(grams[g])
                high[g] = np.uint32(grams[g] >> HALF)
            for k in range(len(factors)):
                factor, least = factors[k], out[s, k]
                for g in range(count):
                    least = min(least, np.uint32(low[g] + factor * high[g]))
                out[s, k] = least


@jit
def band_matches(signatures, held, order, lows, highs, least, rows, equal):
    """A block of signatures, each against the held ones in its bands; a held one is looked at once."""
    hashes, limit = signatures.shape[1], rows.shape[1]
    looked_at = np.full(len(held), -1, np.int64)
    found = np.empty(len(held), np.int64)  # unequal entries · H + row: sorted, this is the order wanted
    for i in range(len(signatures)):
        count = 0
        for band in range(len(order)):
            for place in range(lows[i, band], highs[i, band]):
                row = order[band, place]
                if looked_at[row] == i:
                    continue
                looked_at[row] = i
                same = 0
                for k in range(hashes):
                    same += signatures[i, k] == held[row, k]
                if same >= least:
                    found[count] = (hashes - same) * len(held) + row
                    count += 1
        found[:count].sort()
        for place in range(min(count, limit)):
            rows[i, place] = found[place] % len(held)
            equal[i, place] = hashes - found[place] // len(held)
