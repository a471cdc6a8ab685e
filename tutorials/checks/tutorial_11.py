"""Checks of tutorial 11's exercises. Ground truth: the library's kernel, and times of which the quotient is known."""

import tracemalloc

import numpy as np

from retro_np.kernels.attention import attention_forward
from retro_np.tutorials.checks.judge import compare, exercise, holds

RESULTS = ("out", "lse")


@exercise("11.1", "in_slices", right="the same result, and never more than the given number of chunks at once")
def check_11_1(in_slices):
    rng = np.random.default_rng(0)
    n_heads, m, k, r, c = 2, 4, 2, 8, 3
    for chunks, size in ((12, 2), (12, 5), (3, 8)):
        q = rng.standard_normal((chunks, 1, m, n_heads, c))
        keys, values = rng.standard_normal((2, chunks, k, r, n_heads, c))
        table, b = rng.standard_normal((m + r - 1, n_heads, c)), rng.standard_normal((2, n_heads, c))
        given, largest = (q, keys, values, table, *b), []

        def attend(q, *others, largest=largest):
            largest.append(len(q))
            return attention_forward(q, *others)

        where = f"{chunks} chunks, size {size}"
        expected = attention_forward(*given)
        got = in_slices(attend, *given, size)
        most = max(largest, default=0)
        yield holds(most <= size, f"attend was given {most} chunks at once", where)
        yield compare(got, expected, parts=RESULTS, where=where)


@exercise(
    "11.2", "attend_by_blocks", right="as the kernel has it, also with scores of several thousand, 64 keys at a time"
)
def check_11_2(attend_by_blocks):
    rng = np.random.default_rng(0)
    for n, count, scale, size in ((5, 12, 1, 4), (5, 12, 1, 5), (16, 4096, 1000, 64)):
        q, (keys, values) = scale * rng.standard_normal((n, 8)), rng.standard_normal((2, count, 8))
        out, lse = attention_forward(*(array[None, None, :, None] for array in (q, keys, values)))
        where = f"{count} keys, {size} at a time" + (", scores of several thousand" if scale > 1 else "")
        expected = out[0, 0, :, 0], lse[0, 0, 0]
        yield compare(attend_by_blocks(q, keys, values, size), expected, parts=RESULTS, where=where)
    tracemalloc.start()
    attend_by_blocks.original(q, keys, values, size)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    yield holds(used < n * count * 8, "all scores were in memory at once", where)


@exercise("11.3", "times_as_long", right="neither drift nor a round that went wrong decides it")
def check_11_3(times_as_long):
    slowness = np.where(np.arange(18) < 9, 3.0, 1.0)
    a, b = 1.0 * slowness[0::2], 2.0 * slowness[1::2]
    yield compare(times_as_long(a, b), 2.0, "the factor", where="a machine that is slow at first")
    yield compare(times_as_long(b, a), 0.5, "the factor", where="the same, a and b exchanged")
    drift = np.linspace(1, 4, 11)
    drift[3] = 50  # Something else ran in one round, and in two others during one call alone.
    slow_a, slow_b = (np.where(np.arange(11) == wrong, 9, 1) for wrong in (0, 7))
    given = drift * slow_a, 1.5 * drift * slow_b
    yield compare(times_as_long(*given), 1.5, "the factor", where="drift, and rounds that went wrong")
