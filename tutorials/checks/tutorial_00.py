"""Checks of tutorial 0's exercises."""

import math

import numpy as np

from retro_np.tutorials.checks.judge import compare, exercise, holds, pullback


@exercise("0.1", "bits_per_byte", right="for one document, for many, and for documents of very different lengths")
def check_0_1(bits_per_byte):
    rng = np.random.default_rng(1)
    for n_bytes in ([10], [100, 300], [1, 50, 2000], rng.integers(1, 500, size=20).tolist()):
        n_bytes = np.array(n_bytes)
        nats = n_bytes * rng.uniform(0.5, 3.0, size=len(n_bytes))
        total = sum(nats.tolist()) / (math.log(2) * sum(n_bytes.tolist()))
        yield compare(bits_per_byte(nats, n_bytes), total, "bits_per_byte", where=f"n_bytes = {n_bytes}")


@exercise(
    "0.2", "embed_with_positions", right="value and both gradients equal those of plain loops and finite differences"
)
def check_0_2(embed_with_positions):
    rng = np.random.default_rng(2)
    for batch, n, d, size in ((1, 3, 2, 9), (3, 4, 2, 5), (4, 5, 3, 3)):
        table, positions = rng.standard_normal((size, d)), rng.standard_normal((n, d))
        tokens = rng.integers(size, size=(batch, n)) if batch > 1 else rng.permutation(size)[None, :n]

        def looped(dy, tokens=tokens, table=table, positions=positions):
            dtable, dpositions = np.zeros_like(table), np.zeros_like(positions)
            for text, row in enumerate(tokens):
                for place, token in enumerate(row):
                    dtable[token] += dy[text, place]
                    dpositions[place] += dy[text, place]
            return dtable, dpositions

        value = np.array([[table[token] + positions[place] for place, token in enumerate(row)] for row in tokens])
        where = f"B = {batch}, n = {n}, |𝒱| = {size}"
        arguments = (table, positions, tokens)
        parts = ("table", "positions")
        yield pullback(embed_with_positions, *arguments, expected=(value, looped), parts=parts, where=where)


@exercise(
    "0.3", "many_heads", right="equal to plain loops over heads, queries and keys, and no token reads a later one"
)
def check_0_3(many_heads):
    rng = np.random.default_rng(3)
    for n, n_heads, c, scale in ((5, 2, 4, 1), (4, 1, 3, 1), (6, 4, 2, 1), (5, 2, 4, 1000)):
        q, keys, values = (rng.standard_normal((n, n_heads * c)) for _ in range(3))
        q *= scale
        expected = np.zeros_like(values)
        for head in range(n_heads):
            columns = slice(head * c, head * c + c)
            for i in range(n):
                scores = [q[i, columns] @ keys[j, columns] / math.sqrt(c) for j in range(i + 1)]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                expected[i, columns] = sum(weights[j] * values[j, columns] for j in range(i + 1))
        where = f"n = {n}, n_heads = {n_heads}, c = {c}" + ", scores of several thousand" * (scale > 1)
        yield compare(many_heads(q, keys, values, n_heads), expected, "the result", where=where)


@exercise("0.4", "likeliest", right="the other tokens have probability 0, and large logits do not overflow")
def check_0_4(likeliest):
    rng = np.random.default_rng(4)
    for size, temperature, top, scale in (
        (4, 1.0, 4, 1),
        (8, 1.0, 3, 1),
        (6, 0.5, 2, 2),
        (10, 2.0, 5, 1),
        (5, 0.1, 3, 400),
    ):
        logits = scale * rng.permutation(size) / 2 + rng.uniform(0, 0.1, size)
        chosen = sorted(range(size), key=lambda token: -logits[token])[:top]
        peak = max(logits)
        sizes = {token: math.exp((logits[token] - peak) / temperature) for token in chosen}
        expected = np.array([sizes.get(token, 0.0) / sum(sizes.values()) for token in range(size)])
        where = f"{size} tokens, temperature {temperature}, top {top}"
        p = likeliest(logits, temperature, top)
        yield compare(p, expected, "the array of probabilities", where=where)
        yield holds(np.count_nonzero(np.asarray(p)) <= top, f"more than {top} tokens have a probability", where=where)
