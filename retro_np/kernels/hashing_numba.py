"""The projection of hashing.py in Numba: one pass over a row's tokens for its buckets, then one per word of signs."""

import numpy as np

from retro_np.kernels import Array, hashing
from retro_np.kernels.hashing import MAX_SPECIAL_TOKEN, SIGNS_PER_HASH
from retro_np.kernels.jit import jit
from retro_np.kernels.threads import blocks, parallel_for

ROWS_PER_JOB = 256

# All constants are uint64, because Numba makes a float of a uint64 and an int64.
ONE, BUCKET_SHIFT = np.uint64(1), np.uint64(64 - hashing.BUCKET_BITS)
PAIR_SHIFT, SIGN_SHIFT = np.uint64(hashing.PAIR_SHIFT), np.uint64(hashing.SIGN_SHIFT)
_split_mix = jit(hashing.split_mix)


def project_features(tokens: Array, weights: Array, d_key: int) -> Array:
    """Like retro_np.kernels.hashing.project_features."""
    keys = np.empty((len(tokens), d_key), np.float32)

    def job(rows: slice) -> None:
        sums = np.zeros((rows.stop - rows.start, hashing.padded_width(d_key)), np.int64)
        _project_features(np.ascontiguousarray(tokens[rows], np.int64), weights, sums)
        keys[rows] = hashing.unit_length(sums, d_key)

    parallel_for(job, blocks(len(tokens), ROWS_PER_JOB))
    return keys


@jit
def _features(tokens: Array, buckets: Array) -> int:
    """Write the buckets of one row's features, and return their number."""
    count, previous = 0, 0
    for token in tokens:
        if token > MAX_SPECIAL_TOKEN:
            buckets[count] = _split_mix(np.uint64(token)) >> BUCKET_SHIFT
            count += 1
            if previous > MAX_SPECIAL_TOKEN:
                buckets[count] = _split_mix((np.uint64(previous) << PAIR_SHIFT) + np.uint64(token)) >> BUCKET_SHIFT
                count += 1
        previous = token
    return count


@jit
def _project_features(tokens: Array, weights: Array, sums: Array) -> None:
    buckets = np.empty(2 * tokens.shape[1], np.uint64)
    for n in range(tokens.shape[0]):
        count, total = _features(tokens[n], buckets), 0
        for i in range(count):
            total += weights[buckets[i]]
        for w in range(sums.shape[1] // SIGNS_PER_HASH):
            part = sums[n, w * SIGNS_PER_HASH : (w + 1) * SIGNS_PER_HASH]
            for i in range(count):
                weight = np.int64(weights[buckets[i]])
                bits = _split_mix((buckets[i] << SIGN_SHIFT) + np.uint64(w))
                for j in range(SIGNS_PER_HASH):  # without a branch, so that this loop is vectorised
                    part[j] += weight if (bits >> np.uint64(j)) & ONE else 0
            for j in range(SIGNS_PER_HASH):  # each weight that was not added is subtracted
                part[j] = 2 * part[j] - total
