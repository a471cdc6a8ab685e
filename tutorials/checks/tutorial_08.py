"""Checks of tutorial 8's exercises. Ground truth: the library's filter, its kernel, and its filtered bits per byte."""

import numpy as np

from retro_np.evaluation.bits_per_byte import Losses
from retro_np.evaluation.leakage import ALPHAS, filtered_bits_per_byte
from retro_np.kernels.substring import longest_common_substring
from retro_np.retrieval.deduplicate import jaccard
from retro_np.tutorials.checks.judge import compare, exercise


@exercise("8.1", "similarity", right="as the filter computes it, for texts of 5 to 200 words and a text against itself")
def check_8_1(similarity):
    rng = np.random.default_rng(0)
    for length in (5, 12, 13, 14, 60, 200):
        a = [f"w{i}" for i in rng.integers(0, 1000, length)]
        b = [*a[: length // 2], "new", *a[length // 2 :], *a[:20]]  # Some of it comes a second time.
        where = f"{len(a)} and {len(b)} words"
        yield compare(similarity(list(a), list(b)), jaccard(" ".join(a), " ".join(b)), "the similarity", where=where)
        where = f"{len(b)} and {len(a)} words"
        yield compare(similarity(list(b), list(a)), jaccard(" ".join(a), " ".join(b)), "the similarity", where=where)
        yield compare(similarity(list(a), list(a)), 1.0, "the similarity", where=f"{len(a)} words and the same again")
    yield compare(similarity(list("abcd"), list("abce"), 2), 0.5, "the similarity", where="abcd and abce, size = 2")
    where = "the words ab, c and the words a, bc, size = 2"
    yield compare(similarity(["ab", "c"], ["a", "bc"], 2), 0.0, "the similarity", where=where)


@exercise("8.2", "leakage", right="as the kernel computes it, for 100 chunks, and with padding")
def check_8_2(leakage):
    apart, chunk = np.array([[9, 9, 1, 2], [3, 4, 9, 9]]), np.array([1, 2, 3, 4])
    yield compare(leakage(chunk, apart), 0.5, "s(C)", where="a run that begins in one value and goes on in the next")
    padded = np.array([1, 2, 0, 0])
    yield compare(leakage(padded, np.array([[2, 0, 0, 5]])), 0.25, "s(C)", where="two tokens of padding on both sides")
    rng = np.random.default_rng(1)
    for words in (3, 8):
        for number in range(50):
            chunk, values = rng.integers(0, words, 8), rng.integers(0, words, (3, 16))
            expected = longest_common_substring(chunk[None], values[None])[0] / 8
            yield compare(leakage(chunk, values), expected, "s(C)", where=f"chunk {number} of tokens below {words}")


@exercise("8.3", "filtered", right="as the library computes it, for 17 thresholds and four sets of chunks")
def check_8_3(filtered):
    rng = np.random.default_rng(2)
    for count in (4, 30, 200, 1):
        ratios = rng.integers(0, 17, count) / 16
        n_bytes = rng.integers(0, 60, count)
        nats = rng.gamma(2, 20, count) * (n_bytes > 0)
        losses = Losses(nats, n_bytes, np.zeros(count, int))
        for alpha, expected in zip(ALPHAS, filtered_bits_per_byte(losses, ratios), strict=True):
            with np.errstate(invalid="ignore", divide="ignore"):
                got = filtered(nats, n_bytes, ratios, alpha)
            yield compare(got, expected, "bpb(α)", where=f"α = {alpha}, {np.sum(ratios <= alpha)} of {count} chunks")
    got = filtered(np.zeros(2), np.zeros(2, int), np.zeros(2), 0.5)
    yield compare(got, None, "bpb(α)", where="α = 0.5, two chunks without a byte")
