"""The loops of hashing.py, for Numba: a pass over a row's tokens for its buckets, then one over the buckets a word."""

import numpy as np

from retro_np.kernels import hashing as in_numpy
from retro_np.kernels.jit import jit

NO_TOKEN, WORD = in_numpy.NO_TOKEN, in_numpy.WORD
# all of one unsigned type: Numba makes a float of a uint64 and an int64
ONE, PAIR, PLACES = np.uint64(1), np.uint64(in_numpy.PAIR), np.uint64(in_numpy.PLACES)
SHIFT = np.uint64(64 - in_numpy.BITS)
GOLDEN, FIRST, SECOND = np.uint64(in_numpy.GOLDEN), np.uint64(in_numpy.FIRST), np.uint64(in_numpy.SECOND)


@jit
def split_mix(place):
    x = (place + ONE) * GOLDEN
    x = (x ^ (x >> np.uint64(30))) * FIRST
    x = (x ^ (x >> np.uint64(27))) * SECOND
    return x ^ (x >> np.uint64(31))


@jit
def features(tokens, buckets):
    """Write the buckets of one row's features; return how many they are."""
    count, before = 0, 0
    for token in tokens:
        if token > NO_TOKEN:
            buckets[count] = split_mix(np.uint64(token)) >> SHIFT
            count += 1
            if before > NO_TOKEN:
                buckets[count] = split_mix((np.uint64(before) << PAIR) + np.uint64(token)) >> SHIFT
                count += 1
        before = token
    return count


@jit
def count_features(tokens, start, last, counts):
    """last: the row, counted from `start` on, that was last counted in each bucket."""
    buckets = np.empty(2 * tokens.shape[1], np.uint64)
    for n in range(tokens.shape[0]):
        for i in range(features(tokens[n], buckets)):
            if last[buckets[i]] != start + n:
                last[buckets[i]] = start + n
                counts[buckets[i]] += np.uint32(1)


@jit
def project_features(tokens, weights, sums):
    buckets = np.empty(2 * tokens.shape[1], np.uint64)
    for n in range(tokens.shape[0]):
        count, total = features(tokens[n], buckets), 0
        for i in range(count):
            total += weights[buckets[i]]
        for w in range(sums.shape[1] // WORD):
            part = sums[n, w * WORD : (w + 1) * WORD]
            for i in range(count):
                weight = np.int64(weights[buckets[i]])
                bits = split_mix((buckets[i] << PLACES) + np.uint64(w))
                for j in range(WORD):  # no branch: this loop is vectorised
                    part[j] += weight if (bits >> np.uint64(j)) & ONE else 0
            for j in range(WORD):  # what was not added is to be subtracted
                part[j] = 2 * part[j] - total
