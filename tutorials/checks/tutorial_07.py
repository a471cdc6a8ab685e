"""Checks of tutorial 7's exercises. Ground truth: one code after the other by loops, properties, and the library."""

import math

import numpy as np

from retro_np.training.config import learning_rate
from retro_np.tutorials.checks.judge import compare, exercise, holds


def exam_by_loops(logits, tokens, places):
    """The share of codes that are entirely right, and the mean bits per code, one digit after the other."""
    right, bits = 0, 0.0
    for row, code_places in zip(range(len(tokens)), places.tolist(), strict=True):
        hits = 0
        for place in code_places:
            scores = logits[row, place - 1].tolist()
            highest, digit = max(scores), int(tokens[row, place])
            hits += scores.index(highest) == digit
            bits += (highest + math.log(sum(math.exp(z - highest) for z in scores)) - scores[digit]) / math.log(2)
        right += hits == len(code_places)
    return right / len(tokens), bits / len(tokens)


@exercise("7.1", "graded", right="share and bits are those of a loop over all codes and digits, also for large logits")
def check_7_1(graded):
    for seed, size in ((0, 1.0), (1, 1.0), (2, 2000.0)):
        rng = np.random.default_rng(seed)
        tokens, logits = rng.integers(0, 10, (8, 20)), rng.standard_normal((8, 20, 10)) * size
        places = rng.integers(6, 14, 8)[:, None] + np.arange(5)
        for row in range(5):  # five codes are entirely right, and of the sixth all digits but one
            logits[row, places[row] - 1, tokens[row, places[row]]] = 3.5 * size
        logits[5, places[5, 1:] - 1, tokens[5, places[5, 1:]]] = 3.5 * size
        logits[5, places[5, 0] - 1, tokens[5, places[5, 0]]] = -4 * size
        where = f"logits of about {size:g}"
        names = ("the share of right codes", "the number of bits per code")
        yield compare(graded(logits, tokens, places), exam_by_loops(logits, tokens, places), parts=names, where=where)


@exercise("7.2", "lenders", right="for 2 to 100 chunks nobody borrows from itself, and seeds tell permutations apart")
def check_7_2(lenders):
    for n in (10, 2, 3, 100):
        for seed in range(20):
            lent, where = np.asarray(lenders(n, seed)), f"n_chunks = {n}, seed = {seed}"
            yield compare(np.sort(lent), np.arange(n), "the sorted list of lenders", where=where)
            yield holds(lent.dtype.kind in "iu", f"lenders of type {lent.dtype} are no indices: return integers", where)
            own = np.flatnonzero(lent == np.arange(len(lent)))
            yield holds(not len(own), f"chunk {own[0] if len(own) else 0} keeps its own neighbours", where=where)
    first, again, other = (np.asarray(lenders(100, seed)) for seed in (0, 0, 1))
    yield holds(np.array_equal(first, again), "the same seed gives two permutations", where="n_chunks = 100, seed = 0")
    yield holds(
        not np.array_equal(first, other), "two seeds give the same permutation", where="n_chunks = 100, seeds 0 and 1"
    )
    steps = len(np.unique((first - np.arange(100)) % 100))
    yield holds(
        steps > 30, "nearly all chunks borrow from the same distance, so it is not random", where="n_chunks = 100"
    )


@exercise("7.3", "rate", right="each step of four runs has the rate that the library gives it")
def check_7_3(rate):
    for peak, warmup, steps in ((4e-3, 20, 200), (1e-3, 0, 50), (2e-4, 10, 11), (1e-3, 50, 1000)):
        mine = np.array([rate(step, peak, warmup, steps) for step in range(steps)], object)
        expected = np.array([learning_rate(step, peak=peak, warmup=warmup, steps=steps) for step in range(steps)])
        if any(np.ndim(x) or not isinstance(x, (int, float, np.number, np.ndarray)) for x in mine):
            yield compare(mine[0], expected[0], "rate(0, …)")
            continue
        where = f"peak = {peak}, warmup = {warmup}, steps = {steps}"
        yield compare(mine.astype(float), expected, "the rate of steps 0 … steps − 1", where=where)
