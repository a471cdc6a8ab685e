"""Hashed features of chunks: how many chunks hold each, and their weighted sum under random signs.

A feature is a token, or two tokens that stand side by side; padding and end-of-text, 0 and 1, are none and make none.
Its hash is one of 2^BITS buckets (Weinberger et al. 2009), and a bucket's row of the projection is bits of a hash of
its number, as −1 and 1 (Achlioptas 2003), so that no matrix is stored. All is integers until the last division: sums
have the same bits in any order, in NumPy and in Numba.
"""

import functools

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import kernel
from retro_np.kernels.threads import blocks, parallel_for

BITS = 18  # of a bucket's number; quality no longer grew with 20
BUCKETS = 1 << BITS
NO_TOKEN = 1  # tokens up to this one are no features
WORD = 64  # signs that one hash gives
NUMPY_ROWS, NUMPY_SIGNS = 1024, 1 << 19  # rows, signs that the NumPy code takes at once: temporaries stay in the cache
ROWS = 256  # that a thread takes at once

# SplitMix64 (Steele, Lea & Flood 2014): its output at a place of the stream is the hash of that place.
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PAIR = 32  # bits that a token has in a pair's place; alone it stands behind 0, which begins no pair
PLACES = 16  # bits that a word of signs has behind its bucket


def _count_numpy(tokens, counts) -> None:
    """Add to counts, for each bucket, the number of chunks with a feature in it.

    tokens: (N, m) integers; what is below 2 is no feature. counts: (2^BITS,) uint32, changed in place. A chunk counts
    once a bucket, however often the bucket occurs in it. Raises UserError for other shapes or dtypes.
    """
    tokens, counts = _checked_tokens("count_features", tokens), _checked_counts(counts)
    for rows in blocks(len(tokens), NUMPY_ROWS):
        buckets, real = _features(tokens[rows])
        buckets = np.sort(np.where(real, buckets, BUCKETS), axis=1)
        first = buckets < BUCKETS
        first[:, 1:] &= buckets[:, 1:] != buckets[:, :-1]
        counts += np.bincount(buckets[first], minlength=BUCKETS).astype(np.uint32)


def _count_numba(tokens, counts) -> None:
    tokens, counts = _checked_tokens("count_features", tokens), _checked_counts(counts)
    loop, last = _compiled().count_features, np.full(BUCKETS, -1, np.int64)
    for rows in blocks(len(tokens), 1 << 16):  # tokens of another type become int64 a part at a time
        loop(np.ascontiguousarray(tokens[rows], np.int64), rows.start, last, counts)


def _project_numpy(tokens, weights, d_key):
    """Keys: for each chunk Σ weight · signs over its features, each as often as it occurs, scaled to length one.

    tokens: (N, t) integers; what is below 2 is no feature. weights: (2^BITS,) int32. Returns (N, d_key) float32.
    A key depends on its row alone, and has the same bits from NumPy and Numba. A row whose sum is zero, as one without
    features, gets the signs of a bucket that no feature has, scaled alike: a key like that of an unrelated chunk.
    Of d_key columns the first d are those that d_key = d has, but for the length.
    Raises UserError for other shapes or dtypes.
    """
    tokens, weights, words = _checked_projection(tokens, weights, d_key)
    keys = np.empty((len(tokens), d_key), np.float32)
    for rows in blocks(len(tokens), max(1, NUMPY_SIGNS // max(1, 2 * tokens.shape[1] * words * WORD))):
        buckets, real = _features(tokens[rows])
        weight = np.where(real, weights[buckets], 0).astype(np.int64)
        keys[rows] = _unit(np.einsum("nf,nfd->nd", weight, _signs(buckets, words)), d_key)
    return keys


def _project_numba(tokens, weights, d_key):
    tokens, weights, words = _checked_projection(tokens, weights, d_key)
    keys, loop = np.empty((len(tokens), d_key), np.float32), _compiled().project_features

    def job(rows):
        sums = np.zeros((rows.stop - rows.start, words * WORD), np.int64)
        loop(np.ascontiguousarray(tokens[rows], np.int64), weights, sums)
        keys[rows] = _unit(sums, d_key)

    parallel_for(job, blocks(len(tokens), ROWS))
    return keys


count_features = kernel("count_features", numpy=_count_numpy, numba=_count_numba)
project_features = kernel("project_features", numpy=_project_numpy, numba=_project_numba)


def _features(tokens):
    """Buckets (N, 2t) int64 of the tokens and of the pairs that end at them, and which are real."""
    tokens = tokens.astype(np.int64)
    before = np.zeros_like(tokens)
    before[:, 1:] = tokens[:, :-1]
    alone, second = tokens > NO_TOKEN, before > NO_TOKEN
    places = np.concatenate([tokens, (before << PAIR) + tokens], axis=1).astype(np.uint64)
    buckets = (_split_mix(places) >> np.uint64(64 - BITS)).astype(np.int64)
    return buckets, np.concatenate([alone, alone & second], axis=1)


def _signs(buckets, words):
    """Rows of the projection, −1 and 1: (…, words · 64) int64."""
    places = (buckets.astype(np.uint64) << np.uint64(PLACES))[..., None] + np.arange(words, dtype=np.uint64)
    bits = _split_mix(places)[..., None] >> np.arange(WORD, dtype=np.uint64) & np.uint64(1)
    return bits.astype(np.int64).reshape(*buckets.shape, words * WORD) * 2 - 1


def _split_mix(places):
    x = (places + np.uint64(1)) * np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
    return x ^ (x >> np.uint64(31))


def _unit(sums, d_key):
    """The first d_key columns at length one. Below 2^53 a sum of squares of integers is exact in float64."""
    sums = sums[:, :d_key].astype(np.float64)
    norms = np.sqrt((sums * sums).sum(axis=1))
    empty = norms == 0
    if empty.any():
        # a zero key would be at distance 1 from all, nearer than the 2 of unrelated chunks, and so be found by each
        sums[empty] = _signs(np.array(BUCKETS), -(-d_key // WORD))[:d_key]
        norms[empty] = np.sqrt(d_key)
    return sums / norms[:, None]


@functools.cache
def _compiled():
    from retro_np.kernels import hashing_numba

    return hashing_numba


def _checked_tokens(name, tokens):
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise UserError(f"{name}: tokens have shape {tokens.shape}; they must have 2 dimensions, chunks and places")
    if tokens.dtype.kind not in "iu" or not np.can_cast(tokens.dtype, np.int64):
        raise UserError(f"{name}: tokens are {tokens.dtype}; they are integers, up to int64")
    return tokens


def _checked_counts(counts):
    right = isinstance(counts, np.ndarray) and counts.shape == (BUCKETS,) and counts.dtype == np.uint32
    if not right or not (counts.flags.writeable and counts.flags.c_contiguous):
        raise UserError(f"count_features: counts are a contiguous, writable array of ({BUCKETS},) uint32; begin with 0")
    return counts


def _checked_projection(tokens, weights, d_key):
    tokens, weights = _checked_tokens("project_features", tokens), np.asarray(weights)
    if weights.shape != (BUCKETS,) or weights.dtype != np.int32:
        raise UserError(
            f"project_features: weights are {weights.shape} {weights.dtype}, and must be ({BUCKETS},) int32"
        )
    if not 1 <= d_key <= WORD << PLACES:
        raise UserError(f"project_features: a key of {d_key} columns; ask for 1 … {WORD << PLACES}")
    return tokens, np.ascontiguousarray(weights), -(-d_key // WORD)
