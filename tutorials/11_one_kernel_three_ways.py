# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · One kernel, three ways
#
# Chunked cross-attention is a handful of matrix products with a softmax between them. The library computes it in
# three ways: in NumPy, an array operation at a time; in Numba and in C, a tile of queries at a time.
# All three do the same arithmetic. This tutorial measures how far apart they are, and says why.
#
# Afterwards you can
#
# - count a kernel's operations and the bytes that it must move, and read their quotient, the **arithmetic intensity**;
# - measure two implementations so that a busy machine does not decide which one wins;
# - say what a tile is for, and show its effect in NumPy alone;
# - draw the **roofline** of your own machine (Williams et al. 2009) and place a kernel under it.
#
# The kernels are `retro_np/kernels/attention.py` (NumPy, and the calls of the others), `attention_numba.py` beside it,
# and `csrc/attention.h`, which `csrc/README.md` explains. Without a C compiler the library installs without the last,
# and this notebook goes on with two.
#
# All is measured on one core, and NumPy's BLAS must be told so before NumPy is loaded.

# %%
# ruff: noqa: E402
import os

for limit in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(limit, "1")

import statistics
import time
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from retro_np import kernels
from retro_np.info import kernel_table
from retro_np.kernels import threads
from retro_np.kernels.attention import attention_forward

threads_before = threads.count()
threads.use_threads(1)
there = {name: kinds for name, _, kinds in kernel_table()}["attention_forward"]
KINDS = [kind for kind in ("numpy", "numba", "c") if kind in there]
COLOURS = {"numpy": "#8c8c8c", "numba": "#e07b1f", "c": "#2b7bba"}
print("attention_forward:", ", ".join(KINDS))
print(f"vectors of the C kernel: {kernels.c_extension().vector_unit()}" if "c" in KINDS else "no C extension: two ways")

# %% [markdown]
# ## What is computed
#
# The kernel's shapes are wide enough for self-attention, chunked cross-attention and the encoder's alike: queries stand
# in *g* groups of *n*, keys in *k* groups of *r*. Chunked cross-attention has a batch of chunks, one group of *m*
# queries each (the attending chunk H_u⁺), and *k* neighbours of *r = 2m* tokens, all under one softmax:
#
# $$\text{logit}_{ij} = \frac{(q_i + u) \cdot k_j + (q_i + v) \cdot p_{i-j}}{\sqrt c}, \qquad
# \text{out}_i = \sum_j \text{softmax}_j(\text{logit}_{ij})\, \text{value}_j$$
#
# Ours are the paper's *m* = 64 and *k* = 2, the 32 chunks of a sequence of 2,048 tokens, with 4 heads of 64 columns.

# %%
B, h, m, k, r, c = 32, 4, 64, 2, 128, 64
normal = np.random.default_rng(0).standard_normal
q = normal((B, 1, m, h, c), dtype=np.float32)
keys, values = normal((2, B, k, r, h, c), dtype=np.float32)
table = normal((m + r - 1, h, c), dtype=np.float32)  # the projected positions, one of each distance, falling
u, v = normal((2, h, c), dtype=np.float32)
arrays = q, keys, values, table, u, v


def run(kind):
    """The kernel in one of its kinds: out (B, 1, m, h, c), and lse (B, h, 1, m)."""
    kernels.use(kind)
    return attention_forward(*arrays)


exact = attention_forward(*(array.astype(np.float64) for array in arrays))
first = {}
for kind in KINDS:
    began = time.perf_counter()
    out, lse = run(kind)
    first[kind] = time.perf_counter() - began
    error = max(np.abs(out - exact[0]).max(), np.abs(lse - exact[1]).max())
    assert error < 1e-4
    print(f"{kind:6} is within 1e-4 of float64; its out is {out.shape}")

# %% [markdown]
# The operations can be counted. A product of (a, b) and (b, c) takes 2abc of them, a multiplication and an addition
# each; there are three such products for each head of each chunk. A query needs *r* distances, whatever the number of
# neighbours, since all neighbours share their positions. (Exponentials are left out, as is usual: one a logit.)

# %%
products = {
    "content, q · k": 2 * m * k * r * c,
    "positions, q · p": 2 * m * r * c,
    "weights · values": 2 * m * k * r * c,
}
flops = B * h * sum(products.values())
for name, number in products.items():
    print(f"{name:18} {B * h * number / 1e9:.2f} GFLOP")
print(f"{'in all':18} {flops / 1e9:.2f} GFLOP, and {B * h * m * k * r / 1e6:.1f} million exponentials")

# %% [markdown]
# **0.67 GFLOP** whichever way it is done. So what differs is not the arithmetic.
#
# ## Measuring it wrong
#
# The first call of a compiled kernel loads it, or compiles it; the first call of any of them touches memory that it has
# not had before. So much for `time.perf_counter()` around one call, which is what the cell above did on purpose. (These
# figures, like all times in this notebook, are those of the machine that ran it last.)

# %%
for kind in KINDS:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run(kind)
        seconds.append(time.perf_counter() - began)
    print(f"{kind:6} first call {1e3 * first[kind]:8.1f} ms, best of three more {1e3 * min(seconds):8.1f} ms")

# %% [markdown]
# The other mistake is quieter. Machines have other work, and it comes and goes over seconds. Let *b* take exactly twice
# as long as *a*, on a machine that is three times too slow for the first half of eighteen calls, and let us be told
# only the eighteen times.

# %%
slowness = np.where(np.arange(18) < 9, 3.0, 1.0)
after_a, after_b = 1.0 * slowness[:9], 2.0 * slowness[9:]  # nine calls of a, then nine of b
turns_a, turns_b = 1.0 * slowness[0::2], 2.0 * slowness[1::2]  # by turns: a b a b …
print(f"one after the other, quotient of medians: {np.median(after_b) / np.median(after_a):.2f}")
print(f"by turns, quotient of medians:            {np.median(turns_b) / np.median(turns_a):.2f}")
print(f"by turns, median of quotients:            {np.median(turns_b / turns_a):.2f}")

# %% [markdown]
# The first two say that *b* takes **0.67** of *a*'s time; the third says **2.00**, which is right. A round is short
# against what disturbs it, so both of its calls are disturbed alike, and the few rounds in which something changed are
# outvoted. `benchmarks/turns.py` measures so, with each peer in a process of its own; a turn is two calls, of which
# the second counts, so that each starts from what it left in the caches itself.
#
# Here a second precaution is possible, since one core does all the work: `process_time` counts the time that the
# process was given, not the time that it waited for others.

# %%
ROUNDS = 5


def by_turns(runs, rounds=ROUNDS):
    """Seconds of each round, {name: (rounds,)}; a turn is two calls, of which the second counts."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            call()
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return {name: np.array(of) for name, of in seconds.items()}


seconds = by_turns({kind: lambda kind=kind: run(kind) for kind in KINDS})
for kind in KINDS:
    times, best = statistics.median(seconds[kind] / seconds["numpy"]), seconds[kind].min()
    print(f"{kind:6} {1e3 * best:7.2f} ms at best, {times:5.2f} × NumPy, {flops / best / 1e9:6.1f} GFLOP/s")

# %% [markdown]
# ## What stands in memory
#
# NumPy's way makes every array of the formula whole: the logits, the positions' products for every distance, the
# exponentials. Each is written to memory and read back by the next operation. `tracemalloc` sees NumPy's arrays (not
# what Numba and C take for themselves, here a scratch of some hundred KB).

# %%
peaks = {}
for kind in KINDS:
    tracemalloc.start()
    run(kind)
    peaks[kind] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{kind:6} at most {peaks[kind] / 1e6:5.1f} MB beside its arguments, with the result")
assert all(peaks["numpy"] > 3 * peaks[kind] for kind in KINDS[1:])

# %% [markdown]
# The picture shows the logits of one head of one chunk, queries down, keys along, and what of them is held at a time:
# in NumPy all, with those of the 127 other heads and chunks; in Numba and in C a tile of 32 rows. A tile is used up, by
# softmax and the sum of values, before the next one is made, and so it never leaves the cache.

# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 1.7), sharey=True, layout="constrained")
tile = slice(0, 32), "a tile of queries"
held = {"numpy": (slice(None), "all"), "numba": tile, "c": tile}
for axis, (kind, (rows, name)) in zip(axes, held.items(), strict=True):
    grid = np.ones((m, k * r, 3)) * 0.94
    grid[rows] = to_rgb(COLOURS[kind])
    axis.imshow(grid, aspect="auto")
    axis.axvline(r - 0.5, color="black", linewidth=0.8)  # between the two neighbours
    axis.set(title=f"{kind}: {name}", xlabel="key")
axes[0].set_ylabel("query")
plt.show()
for kind, (rows, name) in held.items():
    number = len(range(m)[rows]) * k * r * 4 * (B * h if kind == "numpy" else 1)
    print(f"{kind:6} logits of {name}: {number / 1024:,.0f} KB")

# %% [markdown]
# **8,192 KB** against **32 KB**: a core's first cache has 32 to 48 KB, its second one 0.25 to 2 MB. Nor is
# anything of that size kept for the backward pass. It keeps the logarithm of each query's sum of exponentials, *lse*,
# and makes the logits again: exp(logit − lse) are the weights at once.

# %%
one = normal((3, m, c))
alone = [array[None, None, :, None] for array in one]  # a head of a chunk, with one neighbour of m tokens
_, lse = attention_forward(*alone)
weights = np.exp(one[0] @ one[1].T / np.sqrt(c) - lse[0, 0, 0][:, None])
assert np.allclose(weights.sum(axis=1), 1)
print(f"weights of {B} chunks: {B * h * m * k * r * 4:,} bytes; their lse: {B * h * m * 4:,} bytes")
print(f"kept: {k * r} times less")

# %% [markdown]
# **256 times less**, for a product that is made twice: at these intensities it is the cheaper of the two.
#
# ## A tile's effect, in NumPy alone
#
# Chunks do not know of each other. So the NumPy kernel can be given a few at a time, and its arrays become small enough
# for a cache, while each operation comes with the same overhead of a Python call. The result is the same.

# %%
kernels.use("numpy")


def slices_of(size):
    """The NumPy kernel, `size` chunks at a time."""
    parts = [slice(start, start + size) for start in range(0, B, size)]
    return np.concatenate([attention_forward(q[s], keys[s], values[s], table, u, v)[0] for s in parts])


sizes = [1, 2, 4, 8, 16, 32]
assert all(np.allclose(slices_of(size), exact[0], atol=1e-4) for size in sizes)
by_size = by_turns({size: lambda size=size: slices_of(size) for size in sizes}, rounds=3)
figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
kilobytes = [size * h * m * k * r * 4 / 1024 for size in sizes]
axis.plot(kilobytes, [1e3 * by_size[size].min() for size in sizes], "o-", color=COLOURS["numpy"], label="NumPy, sliced")
for kind in KINDS[1:]:
    axis.axhline(1e3 * seconds[kind].min(), color=COLOURS[kind], label=kind)
axis.set(xscale="log", ylim=(0, None), xlabel="logits of a slice, KB", ylabel="ms for 32 chunks, at best")
axis.set_xticks(kilobytes, [f"{size:.0f}" for size in kilobytes])
axis.minorticks_off()
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Where the curve rises to the right, the arrays have left a cache; where it rises to the left, Python's overhead is
# paid too often. A flat curve says that the last cache held all of it anyway, or that the time is spent elsewhere.
# NumPy cannot do better than the lowest point; a compiled loop has no such overhead, and can use as small a tile as
# it likes.
#
# Where is it spent, then? Take some of the kernel's operations by themselves.

# %%
shapes = {"q": (m, c), "k": (c, k * r), "p": (c, m + r - 1), "w": (m, k * r), "v": (k * r, c)}
part = {name: normal((B * h, *shape), dtype=np.float32) for name, shape in shapes.items()}
room = np.empty_like(part["w"])
pieces = by_turns({
    "queries · keys": lambda: part["q"] @ part["k"],
    "queries · positions": lambda: part["q"] @ part["p"],
    "weights · values": lambda: part["w"] @ part["v"],
    "heads of the keys brought together": lambda: np.ascontiguousarray(keys.swapaxes(2, 3)),
    "exponentials of the logits": lambda: np.exp(part["w"], out=room),
    "logits scaled, a pass": lambda: np.multiply(part["w"], 0.125, out=room),
})  # fmt: skip
for name, taken in pieces.items():
    print(f"{name:34} {1e3 * taken.min():5.2f} ms")
print(f"{'the whole kernel':34} {1e3 * seconds['numpy'].min():5.2f} ms")

# %% [markdown]
# In our runs the three products, many small ones, take half of the time; the other half are passes, each cheap while
# the last cache holds what it reads, and copies. The whole C kernel takes about as long as NumPy's products alone.
#
# ## The roofline
#
# A machine has two limits: how many operations a second it does at best, and how many bytes a second come from memory.
# A kernel that does *I* operations for each byte from memory can do at most
#
# $$\min(\text{peak},\; I \cdot \text{bandwidth})$$
#
# operations a second. The peak is measured by a large product in BLAS, the bandwidth by copying arrays that no cache
# holds (a byte read and a byte written count as two). Both are best of several: a roof is what the machine can do.

# %%
side, long = 1024, 1 << 24
square = normal((2, side, side), dtype=np.float32)
source, target = np.ones(long, np.float32), np.zeros(long, np.float32)
roofs = by_turns({"product": lambda: square[0] @ square[1], "copy": lambda: np.copyto(target, source)})
peak = 2 * side**3 / roofs["product"].min()
bandwidth = 2 * source.nbytes / roofs["copy"].min()
print(f"peak {peak / 1e9:.0f} GFLOP/s, bandwidth {bandwidth / 1e9:.1f} GB/s, on one core")
print(f"ridge: {peak / bandwidth:.1f} FLOP a byte; a kernel with fewer is limited by memory")

# %% [markdown]
# What must move at least is each argument once in and the result once out. That is the traffic of the kernels whose
# intermediate results stay in the cache. For NumPy, count every array that an operation reads or writes, as if no cache
# held anything from one operation to the next: the most that it can be.

# %%
logits, by_distance = B * h * m * k * r * 4, B * h * m * (m + r - 1) * 4
least = sum(array.nbytes for array in arrays) + q.nbytes + B * h * m * 4
passes = {
    "q + u, q + v, and heads brought together": 8 * q.nbytes,
    "keys, values: heads brought together": 2 * (keys.nbytes + values.nbytes),
    "three products": 3 * q.nbytes + keys.nbytes + values.nbytes + table.nbytes + 2 * logits + by_distance,
    "positions copied, and added": 3 * by_distance + 2 * logits,
    "scaled": 2 * logits,
    "softmax: max, subtract, exp, sum, divide": 8 * logits,
    "result, heads last": 2 * q.nbytes,
}
for name, number in passes.items():
    print(f"  {number / 1e6:6.1f} MB  {name}")
traffic = {"numpy": sum(passes.values()), "numba": least, "c": least}
for kind in KINDS:
    print(f"{kind:6} {traffic[kind] / 1e6:6.1f} MB, {flops / traffic[kind]:5.1f} FLOP a byte")

# %% [markdown]
# NumPy does **3.0 FLOP a byte** at worst, the others **31.7 FLOP a byte** at best: more than half of NumPy's bytes are
# logits, which the others never write to memory.

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
intensity = np.geomspace(0.5, 200, 200)
axis.plot(intensity, np.minimum(peak, intensity * bandwidth) / 1e9, color="black")
axis.axvline(peak / bandwidth, color="#c0c0c0", linewidth=1, linestyle=":")
for kind, marker in zip(KINDS, "so^", strict=False):
    reached = flops / seconds[kind].min() / 1e9
    axis.plot(flops / traffic[kind], reached, marker, color=COLOURS[kind], markersize=9)
    axis.annotate(kind, (flops / traffic[kind], reached), (10, -4), textcoords="offset points")
best_size = min(sizes, key=lambda size: by_size[size].min())
sliced = flops / by_size[best_size].min() / 1e9
axis.plot(flops / traffic["numpy"], sliced, "s", color=COLOURS["numpy"], markersize=9, fillstyle="none")
axis.annotate(f"{best_size} chunks at a time", (flops / traffic["numpy"], sliced), (10, 6), textcoords="offset points")
axis.set(xscale="log", yscale="log", ylim=(peak / 3e10, peak / 5e8))
axis.set(xlabel="FLOP a byte of memory traffic", ylabel="GFLOP/s, one core")
for axis_of in (axis.xaxis, axis.yaxis):
    axis_of.set_major_formatter("{x:g}")
    axis_of.set_minor_formatter("")
plt.show()
for kind in KINDS:
    roof = min(peak, flops / traffic[kind] * bandwidth)
    print(f"{kind:6} reaches {100 * flops / seconds[kind].min() / roof:4.0f} % of its roof")

# %% [markdown]
# How to read it:
#
# - **NumPy** stands to the left of the ridge, where the roof slopes; a kernel that ran from memory would lie on the
#   slope or below it, and a point above it would say that caches held much of what we counted. Making every array
#   whole costs it copies and passes beside the products. (No kernel gets to its roof: exponentials take time, and
#   were not counted.)
# - **Numba** stands to the right, in our runs about as high as NumPy, though it moves a tenth of the bytes. Memory does
#   not limit it, nor does the peak. What does lies between the two: its inner loop adds four rows to four rows of sums,
#   and moves twelve vectors (four rows, the sums in, the sums out) for 32 operations a column.
# - **C** has the same traffic and comes nearer to the roof, because a block of sums stays in *registers* while the
#   index of the sum runs.
#
# The same quotient, counted at the registers instead of at the memory, tells the two apart.

# %%
lanes = 16  # float32 numbers in a vector of 64 bytes
numba_step = (2 * 4 * 4 * lanes) / (12 * lanes * 4)  # four rows by four; four rows in, four of sums in and out
c_step = (2 * 4 * 4 * lanes) / (4 * lanes * 4 + 4 * 4)  # four rows by four vectors; four vectors and four numbers in
print(f"numba {numba_step:.2f} FLOP a byte moved between cache and registers")
print(f"c     {c_step:.2f} FLOP a byte moved between cache and registers")

# %% [markdown]
# **0.67** against **1.88**: Numba's loop does not wait for memory, but it waits for the first cache.
# `csrc/README.md` goes through the steps, from a sum at a time to sixteen in registers.
#
# ## Threads
#
# Heads and chunks are independent, so they can be dealt out. The library's threads are Python's, which run at once
# since C and Numba let go of the interpreter's lock; NumPy has only what BLAS does by itself. A task's result depends
# on nothing else, so the bits are the same for any number of threads. With one core to share there is nothing to gain.

# %%
for kind in KINDS[1:]:
    results, wall = {}, {}
    for number in sorted({1, 2, threads.cores()}):
        threads.use_threads(number)
        taken = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            results[number] = run(kind)
            taken.append(time.perf_counter() - began)
        wall[number] = min(taken)
    assert all(np.array_equal(out, results[1][0]) for out, _ in results.values())
    gains = ", ".join(f"{wall[1] / wall[number]:.2f} × as fast with {number}" for number in wall)
    print(f"{kind:6} threads: {gains}; the same bits")
threads.use_threads(threads_before)
kernels.use("auto")

# %% [markdown]
# ## Exercises
#
# **1.** The forward pass, `size` chunks at a time: `out` and `lse` of all, while no more than a slice's arrays are in
# memory at once. `attend` is called like `attention_forward`.


# %% tags=["exercise"]
def in_slices(attend, q, keys, values, table, u, v, size): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def in_slices(attend, q, keys, values, table, u, v, size):
    parts = [slice(start, start + size) for start in range(0, len(q), size)]
    found = [attend(q[part], keys[part], values[part], table, u, v) for part in parts]
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


# %% tags=["check"]
kernels.use("numpy")
tracemalloc.start()
out, lse = in_slices(attention_forward, *arrays, 5)  # 32 chunks: the last slice is shorter
used = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
kernels.use("auto")
assert np.allclose(out, exact[0], atol=1e-4)
assert np.allclose(lse, exact[1], atol=1e-4)
assert used < peaks["numpy"] / 2, "all of it was in memory at once"
print("right: the same result, with less than half of the memory")

# %% [markdown]
# **2.** A tile can be cut along the keys, too, if the softmax is taken as they come (Milakov & Gimelshein 2018): keep a
# running maximum and a running sum, and shrink what was summed whenever the maximum rises. Write attention of one head
# without positions: `q` (n, c), `keys` and `values` (N, c), `size` keys at a time. Return out (n, c) and lse (n,).


# %% tags=["exercise"]
def attend_by_blocks(q, keys, values, size): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def attend_by_blocks(q, keys, values, size):
    peak, total, out = np.full(len(q), -np.inf), np.zeros(len(q)), np.zeros((len(q), values.shape[1]))
    for start in range(0, len(keys), size):
        block = q @ keys[start : start + size].T / np.sqrt(q.shape[1])
        higher = np.maximum(peak, block.max(axis=1))
        shrink, weights = np.exp(peak - higher), np.exp(block - higher[:, None])
        total = total * shrink + weights.sum(axis=1)
        out = out * shrink[:, None] + weights @ values[start : start + size]
        peak = higher
    return out / total[:, None], peak + np.log(total)


# %% tags=["check"]
queries, many = 100 * normal((16, 8)), normal((2, 4096, 8))  # logits of several hundred: exp alone would overflow
expected, expected_lse = attention_forward(*(array[None, None, :, None] for array in (queries, *many)))
for size in (1000, 64):
    tracemalloc.start()
    out, lse = attend_by_blocks(queries, *many, size)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.allclose(out, expected[0, 0, :, 0])
    assert np.allclose(lse, expected_lse[0, 0, 0])
assert used < 16 * 4096 * 8, "all logits were in memory at once"
print("right: as the kernel has it, 64 keys at a time")

# %% [markdown]
# **3.** How much longer *b* takes than *a*, from times (rounds,) that were measured by turns, and robust against a
# machine that changes its speed.


# %% tags=["exercise"]
def times_as_long(a, b): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def times_as_long(a, b):
    return np.median(b / a)


# %% tags=["check"]
assert np.isclose(times_as_long(turns_a, turns_b), 2)
assert np.isclose(times_as_long(turns_b, turns_a), 0.5)
drift = np.linspace(1, 4, 11)
drift[3] = 50  # something else ran in one round
assert np.isclose(times_as_long(drift, 1.5 * drift * np.where(np.arange(11) == 7, 9, 1)), 1.5)
print("right: neither drift nor a round that went wrong decides it")
