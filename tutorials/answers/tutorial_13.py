"""Our answers to the exercises of tutorial 13."""

import numpy as np


def join_all(parts):
    outs, lses = np.stack([out for out, _ in parts]), np.stack([lse for _, lse in parts])
    weights = np.exp(lses - lses.max(axis=0))
    return np.sum(outs * (weights / weights.sum(axis=0))[..., None], axis=0)


def logit_gradient(joint, own, share, dout):
    """O₂ − O₁ is (O − O₁) / λ, so λ (1 − λ) (O₂ − O₁) needs no division."""
    return (1 - share) * np.sum(dout * (joint - own), axis=-1)


def products(n, m, k):
    return n * (n + 1) // 2, (n - m + 1) * k * 2 * m
