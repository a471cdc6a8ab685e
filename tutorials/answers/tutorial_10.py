"""Our answers to the exercises of tutorial 10."""

import numpy as np

from retro_np import count_parameters
from retro_np.evaluation import knn_lm


def knn_distribution(hidden, keys, values, beta, vocabulary):
    ids, distances = knn_lm.nearest_keys(hidden, keys)
    weights = np.exp(-beta * (distances - distances[:, :1]).astype(np.float64))
    out = np.zeros((len(hidden), vocabulary))
    np.add.at(out, (np.arange(len(hidden))[:, None], values[ids]), weights)
    return out / out.sum(axis=1, keepdims=True)


def hindsight(nats, p):
    return np.minimum(nats, -np.log(np.maximum(p, 1e-300)))


def share_trained(baseline, retro):
    return 1 - count_parameters(baseline) / count_parameters(retro)
