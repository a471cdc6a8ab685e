"""Our answers to tutorial 1's exercises."""

import numpy as np


def chunked(tokens, m):
    ended = [*tokens, 1]
    padded = ended + [0] * (-len(ended) % m)
    return np.array(padded).reshape(-1, m)


def value_of(row, tokens, documents):
    follows = row + 1 < len(tokens) and documents[row + 1] == documents[row]
    return np.concatenate([tokens[row], tokens[row + 1] if follows else np.zeros_like(tokens[row])])


def nearest(query, keys, k):
    distances = np.sum((keys - query) ** 2, axis=1)
    rows = np.argsort(distances, kind="stable")[:k]
    return np.concatenate([rows, np.full(k - len(rows), -1)])
