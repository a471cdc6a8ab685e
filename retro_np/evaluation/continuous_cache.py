"""The continuous cache (Grave et al. 2017): a frozen model that also looks at its own earlier hidden states.

p = λ p_cache + (1 − λ) p_LM. The cache holds the last `window` positions i of the document, and
p_cache(w) ∝ Σ exp(θ h·h_i), summed over the positions that were followed by w. θ and λ are tuned as in `knn_lm.py`."""

import numpy as np

from retro_np.evaluation.bits_per_byte import ScoredTokens
from retro_np.evaluation.knn_lm import Tuned, knn_probability, tuned
from retro_np.kernels import Array, ignore_underflow
from retro_np.retrieval.documents import document_runs

CACHE_SIZE = 1000  # positions
CACHE_BLOCK = 256  # positions whose scores are computed together


@ignore_underflow
def continuous_cache(scored: ScoredTokens, hidden: Array, documents: Array, window: int = CACHE_SIZE) -> Tuned:
    """Mix the cache into a frozen model's predictions. Tunes θ and λ, as in `tuned`.

    scored, hidden, documents: from `frozen_model`. window: positions that the cache holds."""

    def probability(theta):
        cached = cache_probability(hidden, scored.tokens, documents, theta, window)
        return np.where(np.isnan(cached), np.exp(-scored.nats), cached)  # an empty cache does not change the prediction

    return tuned(scored, documents, probability, 3.0 ** np.arange(-7, 1))


def cache_probability(hidden: Array, tokens: Array, documents: Array, theta: float, window: int = CACHE_SIZE) -> Array:
    """p_cache of each token: (N,) float64, NaN at the first token of a document, where the cache is empty.

    hidden: (N, d); tokens: (N,), the token that follows each hidden state; documents: (N,), ascending."""
    out = np.full(len(tokens), np.nan)
    for begin, end in document_runs(documents):
        for start in range(begin + 1, end, CACHE_BLOCK):
            stop, oldest = min(start + CACHE_BLOCK, end), max(begin, start - window)
            age = np.arange(start, stop)[:, None] - np.arange(oldest, stop)
            similarity = hidden[start:stop] @ hidden[oldest:stop].T
            distances = np.where((age > 0) & (age <= window), -similarity, np.inf)
            out[start:stop] = knn_probability(distances, tokens[start:stop, None] == tokens[oldest:stop], theta)
    return out
