"""The longest common substring in Numba, with two rows of runs for one value at a time."""

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels.jit import jit
from retro_np.kernels.threads import blocks, parallel_for

CHUNKS_PER_JOB = 64


def longest_common_substring(chunks: Array, values: np.ndarray, padding: int) -> Array:
    """Like retro_np.kernels.substring.longest_common_substring."""
    longest = np.zeros(len(chunks), np.int64)
    job = lambda rows: _longest(chunks[rows], values[rows], longest[rows], padding)  # noqa: E731
    parallel_for(job, blocks(len(chunks), CHUNKS_PER_JOB))
    return longest


@jit
def _longest(chunks: Array, values: Array, longest: np.ndarray, padding: int) -> None:
    previous, runs = np.zeros((2, values.shape[2] + 1), np.int64)  # position j is at j + 1, so that j − 1 always exists
    for n in range(values.shape[0]):
        best = 0
        for v in range(values.shape[1]):
            previous[:] = 0
            for i in range(chunks.shape[1]):
                token = chunks[n, i]
                for j in range(values.shape[2]):  # no step needs the previous one, so this loop is vectorised
                    run = previous[j] + 1 if (token == values[n, v, j]) & (token != padding) else 0
                    runs[j + 1] = run
                    best = max(best, run)
                previous, runs = runs, previous
        longest[n] = best
