"""Our answers to tutorial 0's exercises."""

import math

import numpy as np


def bits_per_byte(nats, n_bytes):
    return np.sum(nats) / (math.log(2) * np.sum(n_bytes))


def embed_with_positions(table, positions, tokens):
    def vjp(dy):
        dtable = np.zeros_like(table)
        np.add.at(dtable, tokens, dy)
        return dtable, dy.sum(axis=0)

    return table[tokens] + positions, vjp


def many_heads(q, keys, values, n_heads):
    n, d = q.shape
    q, keys, values = (z.reshape(n, n_heads, d // n_heads).swapaxes(0, 1) for z in (q, keys, values))
    scores = q @ keys.swapaxes(1, 2) / math.sqrt(d // n_heads)
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ values).swapaxes(0, 1).reshape(n, d)


def likeliest(logits, temperature, top):
    z = logits / temperature
    z = np.where(z >= np.sort(z)[-top], z, -np.inf)
    p = np.exp(z - z.max())
    return p / p.sum()
