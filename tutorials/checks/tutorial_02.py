"""Checks of tutorial 2's exercises."""

import math

import numpy as np

from retro_np.tutorials.checks.judge import compare, exercise


@exercise("2.1", "pooled", right="padding changes no key, and every key has length one")
def check_2_1(pooled):
    rng = np.random.default_rng(1)
    for lengths, t, d in (([4, 4], 4, 3), ([5, 2, 3], 5, 4), ([1, 7], 7, 2)):
        states = rng.standard_normal((len(lengths), t, d)) + 0.5
        mask = np.arange(t) < np.array(lengths)[:, None]
        expected = []
        for row, length in enumerate(lengths):
            mean = sum(states[row, piece] for piece in range(length)) / length
            expected.append(mean / math.sqrt(sum(x * x for x in mean)))
        yield compare(pooled(states, mask), np.array(expected), "pooled", where=f"texts of {lengths} pieces, t = {t}")


@exercise("2.2", "order_by_distance", right="the same order as by differences, for keys of very different lengths")
def check_2_2(order_by_distance):
    rng = np.random.default_rng(2)
    for count, d in ((5, 2), (20, 8), (200, 4)):
        keys = rng.standard_normal((count, d)) * rng.uniform(0.2, 3, (count, 1))
        query = rng.standard_normal(d)
        distance = [sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) for key in keys]
        squared_lengths = np.array([sum(x * x for x in key) for key in keys])
        got = order_by_distance(query, keys, squared_lengths)
        yield compare(got, np.argsort(distance), "order_by_distance", where=f"{count} keys, d = {d}")


@exercise("2.3", "folded_bias", right="attention without the values' bias gives the same result with the new one")
def check_2_3(folded_bias):
    rng = np.random.default_rng(3)
    for t, d in ((1, 3), (4, 6), (5, 2)):
        values, w_o = rng.standard_normal((t, d)), rng.standard_normal((d, d))
        b_o, b_v = rng.standard_normal(d), rng.standard_normal(d)
        weights = rng.uniform(size=(t, t))
        weights /= weights.sum(axis=1, keepdims=True)
        with_bias = (weights @ (values + b_v)) @ w_o.T + b_o
        expected = (with_bias - (weights @ values) @ w_o.T)[0]
        yield compare(folded_bias(w_o, b_o, b_v), expected, "folded_bias", where=f"t = {t}, d = {d}")
