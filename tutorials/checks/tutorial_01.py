"""Checks of tutorial 1's exercises."""

import numpy as np

from retro_np.tutorials.checks.judge import compare, exercise, holds


@exercise(
    "1.1", "chunked", right="for texts of 0 to 12 tokens and chunks of 1 to 4, every chunk is as the database cuts it"
)
def check_1_1(chunked):
    for m in (4, 3, 2, 1):
        for length in range(3 * m + 1):
            tokens = list(range(5, 5 + length))
            ended = [*tokens, 1]
            while len(ended) % m:
                ended.append(0)
            expected = np.array([ended[start : start + m] for start in range(0, len(ended), m)])
            yield compare(chunked(tokens, m), expected, "chunked", where=f"{length} tokens, m = {m}")


@exercise("1.2", "value_of", right="in the middle of a document, at its end, and at the end of the database")
def check_1_2(value_of):
    tokens = np.arange(2, 2 + 7 * 3).reshape(7, 3)
    for documents in (np.array([0, 0, 0, 1, 2, 2, 2]), np.zeros(7, int)):
        for row in range(7):
            last = row == 6 or documents[row + 1] != documents[row]
            expected = [*tokens[row].tolist(), *([0, 0, 0] if last else tokens[row + 1].tolist())]
            place = f"row {row}, {'a' if last else 'not a'} document's last chunk"
            yield compare(value_of(row, tokens, documents), np.array(expected), "value_of", where=place)


@exercise("1.3", "nearest", right="as one distance after the other gives them, ties and missing keys included")
def check_1_3(nearest):
    rng = np.random.default_rng(3)
    for count, d, k in ((6, 2, 3), (30, 4, 5), (40, 2, 12), (3, 2, 5), (1, 3, 1)):
        keys, query = rng.integers(-3, 4, (count, d)).astype(float), rng.integers(-3, 4, d).astype(float)
        distance = [sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) for key in keys]
        order = sorted(range(count), key=lambda row: (distance[row], row))[:k]
        expected = np.array(order + [-1] * (k - count))
        where = f"{count} keys, k = {k}"
        got = nearest(query, keys, k)
        yield holds(np.shape(got) == (k,), f"nearest gives an answer of shape {np.shape(got)}, not {(k,)}", where=where)
        yield compare(got, expected, "nearest", where=where)
