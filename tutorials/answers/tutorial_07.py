"""Our answers to tutorial 7's exercises."""

import numpy as np


def graded(logits, tokens, places):
    rows = np.arange(len(tokens))[:, None]
    before = logits[rows, places - 1].astype(np.float64)  # What stands at position t is predicted at t − 1.
    digits = tokens[rows, places]
    right = (before.argmax(axis=-1) == digits).all(axis=1)
    top = before.max(axis=-1)
    log_sums = np.log(np.exp(before - top[..., None]).sum(axis=-1)) + top
    nats = log_sums - np.take_along_axis(before, digits[..., None], axis=-1)[..., 0]
    return right.mean(), nats.sum(axis=1).mean() / np.log(2)


def lenders(n_chunks, seed):
    order = np.random.default_rng(seed).permutation(n_chunks)
    lent = np.empty(n_chunks, int)
    lent[order] = np.roll(order, 1)  # Each borrows from the one before it in a random ring.
    return lent


def rate(step, peak, warmup, steps):
    if step < warmup:
        return 1e-7 + (peak - 1e-7) * step / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2)
