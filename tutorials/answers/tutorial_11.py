"""Our answers to the exercises of tutorial 11."""

import numpy as np


def in_slices(attend, q, keys, values, table, b_c, b_p, size):
    parts = [slice(start, start + size) for start in range(0, len(q), size)]
    found = [attend(q[part], keys[part], values[part], table, b_c, b_p) for part in parts]
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


def attend_by_blocks(q, keys, values, size):
    peak, total, out = np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros((len(q), values.shape[1]))
    for start in range(0, len(keys), size):
        scores = q @ keys[start : start + size].T / np.sqrt(q.shape[1])
        higher = np.maximum(peak, scores.max(axis=1))
        shrink, weights = np.exp(peak - higher), np.exp(scores - higher[:, None])
        total = total * shrink + weights.sum(axis=1)
        out = out * shrink[:, None] + weights @ values[start : start + size]
        peak = higher
    return out / total[:, None], peak + np.log(total)


def times_as_long(a, b):
    return np.median(b / a)
