"""Our answers to tutorial 8's exercises."""

import numpy as np


def similarity(a, b, size=13):
    def grams_of(words):
        return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}

    ours, theirs = grams_of(a), grams_of(b)
    return len(ours & theirs) / len(ours | theirs)


def leakage(chunk, values):
    longest = 0
    for value in values:
        for i in range(len(chunk)):
            for j in range(len(value)):
                run = 0
                while i + run < len(chunk) and j + run < len(value) and chunk[i + run] == value[j + run] != 0:
                    run += 1
                longest = max(longest, run)
    return longest / len(chunk)


def filtered(nats, n_bytes, ratios, alpha):
    kept = ratios <= alpha
    if n_bytes[kept].sum() == 0:
        return None
    return nats[kept].sum() / np.log(2) / n_bytes[kept].sum()
