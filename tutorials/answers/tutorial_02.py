"""Our answers to tutorial 2's exercises."""

import numpy as np


def pooled(states, mask):
    means = np.sum(states * mask[..., None], axis=1) / np.sum(mask, axis=1)[:, None]
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def order_by_distance(query, keys, squared_lengths):
    return np.argsort(squared_lengths - 2 * (keys @ query), kind="stable")  # ‖a‖² is the same for all keys.


def folded_bias(w_o, b_o, b_v):
    return b_o + w_o @ b_v
