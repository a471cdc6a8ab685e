"""The continuous cache (Grave et al. 2017): a frozen model that looks back on its own hidden states in the document.

p_cache(w) ∝ Σ exp(θ h·h_i) over those of the last `window` positions i behind which w came, and
p = λ p_cache + (1 − λ) p_LM. θ and λ are tuned as in `knn_lm.py`.
"""

import numpy as np

from retro_np.evaluation.knn_lm import ScoredTokens, tuned
from retro_np.retrieval.documents import document_runs

WINDOW = 1000  # positions
THETAS = 3.0 ** np.arange(-7, 1)
BLOCK = 256  # positions that look back at once


def continuous_cache(
    scored: ScoredTokens, hidden: np.ndarray, documents: np.ndarray, window: int = WINDOW
) -> tuple[ScoredTokens, list]:
    """Mix the cache into what a frozen model predicts. scored, hidden, documents: of `frozen_model`.

    Returns the tokens with new nats, and (θ, λ) of either half of the documents.
    """

    def probability(theta):
        cached = cache_probability(hidden, scored.tokens, documents, theta, window)
        return np.where(np.isnan(cached), np.exp(-scored.nats), cached)  # an empty cache leaves the model's prediction

    return tuned(scored, documents, probability, THETAS)


def cache_probability(
    hidden: np.ndarray, tokens: np.ndarray, documents: np.ndarray, theta: float, window: int = WINDOW
) -> np.ndarray:
    """What the cache gives each token: (N,) float64, NaN where the cache is empty, as at a document's first.

    hidden: (N, d), tokens: (N,) behind them, documents: (N,), ascending.
    """
    out = np.full(len(tokens), np.nan)
    for begin, end in document_runs(documents):
        for start in range(begin, end, BLOCK):
            stop, oldest = min(start + BLOCK, end), max(begin, start - window)
            back = np.arange(start, stop)[:, None] - np.arange(oldest, stop)
            scores = np.where(
                (back > 0) & (back <= window), theta * (hidden[start:stop] @ hidden[oldest:stop].T), -np.inf
            )
            peak = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
            hits = np.where(tokens[start:stop, None] == tokens[oldest:stop], weights, 0)
            total = weights.sum(axis=1, dtype=np.float64)
            np.divide(hits.sum(axis=1, dtype=np.float64), total, out=out[start:stop], where=total > 0)
    return out
