"""Relative positions: one vector of sinusoids per distance. Dai et al. 2019; paper B.1.2."""

from functools import lru_cache

import numpy as np

from retro_np.tree import Array


@lru_cache(maxsize=64)
def sinusoids(first: int, count: int, d: int, dtype: str = "float64") -> Array:
    """R_δ for the distances δ = first, first − 1, …, first − count + 1, one per row. Returns (count, d), read-only.

    R_δ = [sin(δ ω_0) … sin(δ ω_{d/2−1}), cos(δ ω_0) … cos(δ ω_{d/2−1})], ω_i = 10000^(−2i/d).
    Computed in float64 whatever the dtype, because distances in the thousands need that precision."""
    distances = np.arange(first, first - count, -1, dtype=np.float64)
    angles = np.outer(distances, 10000.0 ** (-np.arange(0, d, 2) / d))
    rows = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(dtype)
    rows.flags.writeable = False
    return rows
