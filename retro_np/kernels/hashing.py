"""Hashed features of chunks: in how many chunks each occurs, and their weighted sum under random signs.
A feature is a token, or two adjacent tokens. Ids 0 and 1, padding and end-of-text, are not features: they break a pair.
The hash of a feature is one of 2^BUCKET_BITS buckets (Weinberger et al. 2009). A row of the projection consists of
−1 and 1, which are the bits of a hash of its number (Achlioptas 2003), so no matrix is stored. All values are integers
until the last division, so sums have the same bits in any order, in NumPy and in Numba."""

from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import Array, kernel
from retro_np.kernels.substring import checked_tokens
from retro_np.kernels.threads import blocks

BUCKET_BITS = 18  # The quality was no better with 20.
BUCKETS = 1 << BUCKET_BITS
MAX_SPECIAL_TOKEN = 1  # tokens up to this one are not features
SIGNS_PER_HASH = 64
MAX_NUMPY_ROWS, MAX_NUMPY_SIGNS = 1024, 1 << 19  # rows and signs per block, which fit into the cache

# SplitMix64 (Steele, Lea & Flood 2014): its output number n is the hash of n.
SPLITMIX_STEP, SPLITMIX_FACTOR, SPLITMIX_FACTOR2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PAIR_SHIFT = 32  # A pair is hashed as (first << 32) + second, a single token as itself: no pair starts with token 0.
SIGN_SHIFT = 16  # Word w of a bucket's signs is the hash of (bucket << 16) + w.


def _count_features(tokens: Array, counts: Array) -> None:
    """Add to counts, for each bucket, the number of chunks that have a feature in it.
    tokens: (N, m) integers; tokens below 2 are not features. counts: (BUCKETS,) uint32, changed in place. A chunk
    counts once per bucket, however often the bucket occurs in it. Raises UserError for any other shape or dtype."""
    for rows in blocks(len(tokens), MAX_NUMPY_ROWS):
        buckets, real = _features(tokens[rows])
        buckets = np.sort(np.where(real, buckets, BUCKETS), axis=1)
        first = buckets < BUCKETS
        first[:, 1:] &= buckets[:, 1:] != buckets[:, :-1]
        counts += np.bincount(buckets[first], minlength=BUCKETS).astype(np.uint32)


def _project_features(tokens: Array, weights: Array, d_key: int) -> Array:
    """Keys: for each chunk the sum of weight · signs over its features, counting repetitions, scaled to length one.
    tokens: (N, t) integers; tokens below 2 are not features. weights: (BUCKETS,) int32. Returns (N, d_key) float32.
    A key depends only on its row, and has the same bits from NumPy and Numba. If a row's sum is zero, as without
    features, its key is the signs of a bucket that no feature has, as far from other keys as an unrelated chunk's. A
    smaller d_key gives the first columns of a larger one, but for scale. Raises UserError for other arrays."""
    keys = np.empty((len(tokens), d_key), np.float32)
    signs_per_row = max(1, 2 * tokens.shape[1] * padded_width(d_key))
    for rows in blocks(len(tokens), max(1, MAX_NUMPY_SIGNS // signs_per_row)):
        buckets, real = _features(tokens[rows])
        weight = np.where(real, weights[buckets], 0).astype(np.int64)
        keys[rows] = unit_length(np.einsum("nf,nfd->nd", weight, _signs(buckets, d_key)), d_key)
    return keys


def _features(tokens: Array) -> tuple[Array, Array]:
    """Buckets (N, 2t) int64 of the tokens and of the pairs that end at them, and whether each is a feature."""
    tokens = tokens.astype(np.int64)
    previous = np.zeros_like(tokens)
    previous[:, 1:] = tokens[:, :-1]
    single, second = tokens > MAX_SPECIAL_TOKEN, previous > MAX_SPECIAL_TOKEN
    numbers = np.concatenate([tokens, (previous << PAIR_SHIFT) + tokens], axis=1).astype(np.uint64)
    buckets = (split_mix(numbers) >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
    return buckets, np.concatenate([single, single & second], axis=1)


def padded_width(d_key: int) -> int:
    """The number of signs in whole hashes for keys of width d_key."""
    return -(-d_key // SIGNS_PER_HASH) * SIGNS_PER_HASH


def _signs(buckets: Array, d_key: int) -> Array:
    """Rows of the projection, −1 and 1: (…, padded width) int64."""
    words = np.arange(padded_width(d_key) // SIGNS_PER_HASH, dtype=np.uint64)
    numbers = (buckets.astype(np.uint64) << np.uint64(SIGN_SHIFT))[..., None] + words
    bits: Array = split_mix(numbers)[..., None] >> np.arange(SIGNS_PER_HASH, dtype=np.uint64) & np.uint64(1)
    return bits.astype(np.int64).reshape(*buckets.shape, padded_width(d_key)) * 2 - 1


def split_mix(numbers: Any) -> Any:
    """The hashes of numbers, uint64. Numba compiles it for its loops."""
    x = (numbers + np.uint64(1)) * np.uint64(SPLITMIX_STEP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(SPLITMIX_FACTOR)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SPLITMIX_FACTOR2)
    return x ^ (x >> np.uint64(31))


def unit_length(sums: Array, d_key: int) -> Array:
    """The first d_key columns, scaled to length one. Below 2^53 a sum of squares of integers is exact in float64."""
    sums = sums[:, :d_key].astype(np.float64)
    norms = np.sqrt((sums * sums).sum(axis=1))
    empty = norms == 0
    if empty.any():
        # A zero key would be at distance 1 from all keys, nearer than the 2 of unrelated chunks, and match every query.
        sums[empty] = _signs(np.array(BUCKETS), d_key)[:d_key]
        norms[empty] = np.sqrt(d_key)
    sums /= norms[:, None]
    return sums


def _checked_counting(tokens: Any, counts: Any) -> tuple[Array, Array]:
    """The tokens as an array, and counts. Raises UserError for arguments that `count_features` does not take."""
    fits = isinstance(counts, np.ndarray) and counts.shape == (BUCKETS,) and counts.dtype == np.uint32
    if not fits or not (counts.flags.writeable and counts.flags.c_contiguous):
        raise UserError(f"count_features: counts must be a contiguous, writable array of ({BUCKETS},) uint32")
    return checked_tokens("count_features", "tokens", tokens, 2), counts


def _checked_projection(tokens: Any, weights: Any, d_key: int) -> tuple[Array, Array, int]:
    """Arrays of tokens and weights, and d_key. Raises UserError for any other shape or dtype."""
    tokens, weights = checked_tokens("project_features", "tokens", tokens, 2), np.asarray(weights)
    if weights.shape != (BUCKETS,) or weights.dtype != np.int32:
        raise UserError(f"project_features: weights are {weights.shape} {weights.dtype}; give ({BUCKETS},) int32")
    if not 1 <= d_key <= SIGNS_PER_HASH << SIGN_SHIFT:
        raise UserError(f"project_features: d_key must be from 1 to {SIGNS_PER_HASH << SIGN_SHIFT}, not {d_key}")
    return tokens, np.ascontiguousarray(weights), d_key


count_features = kernel("count_features", numpy=_count_features, check=_checked_counting)
project_features = kernel("project_features", numpy=_project_features, numba=True, check=_checked_projection)
