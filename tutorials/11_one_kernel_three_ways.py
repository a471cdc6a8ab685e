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
# Chunked cross-attention is a handful of matrix products with a softmax between them. A piece of code that does such
# work is called a *kernel*, and the library contains this one three times. NumPy computes it one array operation after
# the other. C, and Python loops that Numba compiles, compute it one *tile* of queries after the other. All three do
# nearly the same arithmetic, and yet in our runs on one core C is much faster than NumPy, and Numba is the slowest of
# the three. Why? It seems to be a matter of moving numbers, at two places. NumPy moves many between memory and the
# caches, and Numba moves many between the first cache and the registers. You will find the first with a clock, a count
# and one picture, the roofline. For the second, a count gives a likely reason, but no proof.
#
# *Reading: about 35 minutes · runs in 10 s on one core · needs tutorials 4 and 5; a C compiler for the third way.*
#
# Afterwards you can
#
# - count a kernel's operations and the bytes that it must move, and read their quotient, the **arithmetic intensity**;
# - measure two implementations so that a busy machine does not decide which one wins;
# - say what a tile is for, and what the backward pass need not store;
# - draw the **roofline** of your own machine ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785)) and
#   place a kernel under it.
#
# The kernels are in `retro_np/kernels/attention.py`, `retro_np/kernels/attention_numba.py` and `csrc/attention.h`;
# [csrc/README.md](../csrc/README.md) explains the last one. Without a C compiler the library installs without it, and
# this notebook goes on with two ways.
#
# Previous: [tutorial 10, RETROfit and kNN-LM](10_retrofit_and_knn_lm.ipynb). Next: [tutorial 12, from here to 1.75
# trillion tokens](12_from_here_to_1_75_trillion_tokens.ipynb).

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

import statistics
import time
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from retro_np import kernels
from retro_np.info import kernel_table
from retro_np.kernels import threads
from retro_np.kernels.attention import attention_forward, skewed
from retro_np.tutorials.checks.tutorial_11 import check_11_1, check_11_2, check_11_3

threads_before = threads.count()
threads.use_threads(1)
there = {name: kinds for name, _, kinds in kernel_table()}["attention_forward"]
KINDS = [kind for kind in ("numpy", "numba", "c") if kind in there]
COLOURS = {"numpy": "#8c8c8c", "numba": "#e07b1f", "c": "#2b7bba", "PyTorch": "#cfcfcf"}
print("attention_forward:", ", ".join(KINDS))
print(f"vectors of the C kernel: {kernels.c_extension().vector_unit()}" if "c" in KINDS else "no C extension: two ways")

# %% [markdown]
# ## What is computed
#
# One kernel serves self-attention, chunked cross-attention and the encoder. For chunked cross-attention it gets a batch
# of chunks. Each chunk has $m$ queries, those of its attending chunk $H_u^+$, and $k$ neighbours of $r = 2m$ tokens as
# keys. All neighbours share one softmax. With the rows $Q_i$, $K_j$, $V_j$ of queries, keys and values, width $c$ of a
# head, and a row $T_\delta$ of the table for each distance $\delta = i - j + m - 1$ ([tutorial
# 4](04_relative_positions.ipynb)):
#
# $$Z_{ij} = \frac{(Q_i + b_c) \cdot K_j + (Q_i + b_p) \cdot T_\delta}{\sqrt c}, \qquad
# A_{ij} = \frac{e^{Z_{ij}}}{\sum_{j'} e^{Z_{ij'}}}, \qquad O_i = \sum_j A_{ij} V_j .$$
#
# Beside the output $O$ the kernel returns $\text{lse}_i = \log \sum_j e^{Z_{ij}}$ for each query. You will see why.
#
# The sizes are the paper's: $m = 64$, $k = 2$, and the 32 chunks of a sequence of 2,048 tokens. Only the heads are
# fewer, four of 64 columns.

# %%
B, n_heads, m, k, r, c = 32, 4, 64, 2, 128, 64
normal = np.random.default_rng(0).standard_normal
q = normal((B, 1, m, n_heads, c), dtype=np.float32)  # 1: in CCA, the queries of a chunk are a single group
keys, values = normal((2, B, k, r, n_heads, c), dtype=np.float32)
table = normal((m + r - 1, n_heads, c), dtype=np.float32)  # a row for each distance, the largest distance first
b_c, b_p = normal((2, n_heads, c), dtype=np.float32)
arrays = q, keys, values, table, b_c, b_p


def run(kind):
    """The kernel in one of its kinds: out (B, 1, m, n_heads, c), and lse (B, n_heads, 1, m)."""
    kernels.use(kind)
    return attention_forward(*arrays)


print(f"{B} chunks of {m} tokens: a sequence of {B * m:,} tokens")
exact = attention_forward(*(array.astype(np.float64) for array in arrays))
first = {}
for kind in KINDS:
    began = time.perf_counter()
    out, lse = run(kind)
    first[kind] = time.perf_counter() - began
    error = max(np.abs(out - exact[0]).max(), np.abs(lse - exact[1]).max())
    assert error < 1e-4
    print(f"{kind:6} is within 1e-4 of float64; its out has the shape {out.shape}")

# %% [markdown]
# All three agree. Now count the operations. A product of shapes $(x, y)$ and $(y, z)$ takes $2xyz$ of them: $xyz$
# multiplications and as many additions. A billion operations on floating-point numbers is a GFLOP. Each head of each
# chunk needs three such products. A query meets only $r$ different distances per neighbour, and the same ones for every
# neighbour, since all neighbours share their positions. We do not count exponentials, as is usual; there is one for
# each score.

# %%
products = {
    "queries · keys": 2 * m * k * r * c,
    "queries · positions": 2 * m * r * c,
    "weights · values": 2 * m * k * r * c,
}
flops = B * n_heads * sum(products.values())
for name, number in products.items():
    print(f"{name:20} {B * n_heads * number / 1e9:.2f} GFLOP")
print(f"{'in all':20} {flops / 1e9:.2f} GFLOP, and {B * n_heads * m * k * r / 1e6:.1f} million exponentials")
left_out = B * n_heads * 2 * m * (m - 1) * c  # every query with all m + r − 1 rows of the table, of which it needs r
print(f"{'NumPy, beside these':20} {left_out / 1e9:.2f} GFLOP")

# %% [markdown]
# The formula asks for **0.67 GFLOP**. Each way does a little more. NumPy adds the most, **0.07 GFLOP**: it multiplies
# every query with all $m + r - 1$ rows of the table, and the skew of tutorial 4 then leaves out those that the query
# does not need. In a tile, a query meets fewer such rows. A tenth more arithmetic cannot make a program twice as slow.
# Below, a kernel's GFLOP/s are those 0.67 GFLOP divided by its time, the same numerator for all three.
#
# ## Measuring it wrong
#
# The first idea is to put a clock around one call. The cell above did so, on purpose. But the first call of a compiled
# kernel loads or compiles it, and the first call of any kernel touches memory that it has not used before. Compare the
# first call with later ones. All times in this notebook are those of the machine that ran it last.

# %%
for kind in KINDS:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run(kind)
        seconds.append(time.perf_counter() - began)
    print(f"{kind:6} first call {1e3 * first[kind]:8.1f} ms, best of three more {1e3 * min(seconds):8.1f} ms")

# %% [markdown]
# The second mistake is quieter. Machines have other work, which comes and goes over seconds. Suppose that $b$ takes
# exactly twice as long as $a$. During the first half of eighteen calls the machine takes three times as long as usual,
# and we do not know that. All that we see are the eighteen measured times.

# %%
slowness = np.where(np.arange(18) < 9, 3.0, 1.0)
after_a, after_b = 1.0 * slowness[:9], 2.0 * slowness[9:]  # nine calls of a, then nine of b
turns_a, turns_b = 1.0 * slowness[0::2], 2.0 * slowness[1::2]  # by turns: a b a b …
print(f"one after the other, quotient of medians: {np.median(after_b) / np.median(after_a):.2f}")
print(f"by turns, quotient of medians:            {np.median(turns_b) / np.median(turns_a):.2f}")
print(f"by turns, median of quotients:            {np.median(turns_b / turns_a):.2f}")

# %% [markdown]
# The first two answers say that $b$ takes **0.67** of $a$'s time. The third says **2.00**, and is right. A round of two
# calls is short, so whatever disturbs the machine disturbs both of them alike. The few rounds in which the machine
# changed its speed are outvoted by the median. `benchmarks/turns.py` measures this way. A turn there consists of two
# calls, of which only the second counts: so each implementation starts with what it left in the caches itself.
#
# Here we can take a second precaution, because one core does all the work. `time.process_time` counts only the time
# that the process was running, and not the time that it waited for others.

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
    print(f"{kind:6} {1e3 * best:5.1f} ms at best, {times:4.1f} times NumPy's, {flops / best / 1e9:5.1f} GFLOP/s")

# %% [markdown]
# ## What stands in memory
#
# Between a core and the memory lie *caches*: small, fast memories that keep what was used last. What does not fit must
# come from the next larger one, and in the end from memory, which is slow.
#
# NumPy makes every array of the formula whole: the scores, the products with every position, the exponentials. It
# writes each of them to memory, and the next operation reads it again. `tracemalloc` sees the arrays that NumPy
# allocates. It does not see the scratch memory of Numba and C, which is small.

# %%
peaks = {}
for kind in KINDS:
    tracemalloc.start()
    run(kind)
    peaks[kind] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{kind:6} at most {peaks[kind] / 1e6:3.0f} MB beside its arguments, with the result")
assert all(peaks["numpy"] > 3 * peaks[kind] for kind in KINDS[1:])

# %% [markdown]
# Numba and C work in another order. A **tile** of 32 queries meets all its keys at once. The scores of the tile are
# computed, turned into weights and multiplied with the values before the next tile begins. Here are the scores of one
# head of one chunk. Those in light grey are not in memory together with the others.

# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 1.9), sharey=True, layout="constrained")
tile = slice(0, 32), "a tile of queries"
held = {"numpy": (slice(None), "all scores"), "numba": tile, "c": tile}
for axis, (kind, (rows, name)) in zip(axes, held.items(), strict=True):
    grid = np.ones((m, k * r, 3)) * 0.94
    grid[rows] = to_rgb(COLOURS[kind])
    axis.imshow(grid, aspect="auto")
    axis.axvline(r - 0.5, color="black", linewidth=0.8)  # between the two neighbours
    axis.set(title=f"{kind}: {name}", xlabel="key j, two neighbours", xticks=(0, 128, 255), yticks=(0, 31, 63))
axes[0].set_ylabel("query i")
plt.show()
for kind, (rows, name) in held.items():
    number = len(range(m)[rows]) * k * r * 4 * (B * n_heads if kind == "numpy" else 1)
    print(f"{kind:6} {name}: {number / 1024:,.0f} KB at a time")

# %% [markdown]
# *Figure 11.1.* NumPy holds the scores of all heads and chunks at once, Numba and C those of half a head of one chunk.
#
# The difference is **8,192 KB** against **32 KB**. The first cache of a core holds some tens of KB, and its second one
# up to a few MB. So a tile never leaves the caches nearest to the core. NumPy's scores do, in every single pass over
# them.
#
# ### The backward pass keeps one number per query
#
# The backward pass needs the weights $A$ again. Must they be stored? No, and here $\text{lse}_i$ does its work. With
# the scores computed once more, $A_{ij} = e^{Z_{ij} - \text{lse}_i}$ gives the weights at once, without a maximum and
# without a sum.

# %%
one = normal((3, m, c))
alone = [array[None, None, :, None] for array in one]  # a head of a chunk, with one neighbour of m tokens
_, lse = attention_forward(*alone)
weights = np.exp(one[0] @ one[1].T / np.sqrt(c) - lse[0, 0, 0][:, None])
assert np.allclose(weights.sum(axis=1), 1)
print(f"weights of {B} chunks: {B * n_heads * m * k * r * 4:,} bytes; their lse: {B * n_heads * m * 4:,} bytes")
print(f"stored: {k * r} times less")

# %% [markdown]
# That is **256 times less** to store. This matters, because every layer of a model keeps what it stores until the
# backward pass comes. The price is that the scores are computed twice.
#
# ## Where NumPy's time goes
#
# Let us take the kernel apart and time its operations alone, with arrays of the same shapes. *Heads first* means a copy
# in which the columns of each head lie together, as a product of matrices wants them.

# %%
shapes = {"q": (m, c), "k": (c, k * r), "p": (c, m + r - 1), "w": (m, k * r), "v": (k * r, c)}
part = {name: normal((B * n_heads, *shape), dtype=np.float32) for name, shape in shapes.items()}
room, at_distances = np.empty_like(part["w"]), part["q"] @ part["p"]


def passes_of_softmax(scores):
    """Softmax but for its exponentials."""
    np.subtract(scores, scores.max(axis=-1, keepdims=True), out=room)
    np.divide(room, room.sum(axis=-1, keepdims=True), out=room)


def add_positions(scores):
    """The products with positions, copied into zeros, and looked up by both neighbours: a skewed view."""
    copied = np.zeros_like(at_distances)
    copied[...] = at_distances
    looked_up = skewed(copied, r)[:, :, None]
    np.add(scores.reshape(-1, m, k, r), looked_up, out=room.reshape(-1, m, k, r))


pieces = by_turns({
    "queries · keys": lambda: part["q"] @ part["k"],
    "queries · positions": lambda: part["q"] @ part["p"],
    "weights · values": lambda: part["w"] @ part["v"],
    "keys and values, heads first": lambda: [np.ascontiguousarray(x.swapaxes(2, 3)) for x in (keys, values)],
    "q + b_c and q + b_p, heads first": lambda: [np.ascontiguousarray((q + b).swapaxes(2, 3)) for b in (b_c, b_p)],
    "positions copied, and added": lambda: add_positions(part["w"]),
    "exponentials of the scores": lambda: np.exp(part["w"], out=room),
    "scores scaled, one pass": lambda: np.multiply(part["w"], 0.125, out=room),
    "softmax: max, subtract, sum, divide": lambda: passes_of_softmax(part["w"]),
})  # fmt: skip
taken = {name: 1e3 * of.min() for name, of in pieces.items()}
others = max(0.0, 1e3 * seconds["numpy"].min() - sum(taken.values()))
figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
shown = taken | {"everything else": others}
colours = [COLOURS["c"] if "·" in name else COLOURS["numpy"] for name in shown]
axis.barh(list(shown), list(shown.values()), color=colours)
axis.invert_yaxis()
axis.set(xlabel="ms", title="NumPy's kernel: products blue, the rest grey")
plt.show()
for name, ms in shown.items():
    print(f"{name:34} {ms:5.1f} ms")
for kind in KINDS:
    print(f"{'the whole kernel, ' + kind:34} {1e3 * seconds[kind].min():5.1f} ms")

# %% [markdown]
# *Figure 11.2.* About half of NumPy's time is not spent on products, but on passes over arrays and on copies.
#
# The three products are what the formula asks for. In our runs the whole C kernel takes not much longer than NumPy's
# products alone. Everything else but the exponentials is the cost of making each array whole. The pieces do not add up
# to the whole exactly: each of them ran many times alone, with what it left in the caches. The last bar is what
# remains, if anything does, such as the copy of the result in which heads are put last again.
#
# Would NumPy be faster if it were given only a few chunks at a time, so that its arrays fit into a cache? It is a
# natural idea, and exercise 11.1 lets you try it. On our machines it saves memory and no time. The passes get cheaper,
# but each of them now comes with the overhead of a Python call, many times. A compiled loop has no such overhead, and
# can make its tile as small as it likes.
#
# ## The roofline
#
# A machine has two limits: how many operations it can do in a second, its *peak*, and how many bytes can come from
# memory in a second, its *bandwidth*. A kernel that does $I$ operations for each byte that comes from memory can do at
# most
#
# $$\min(\text{peak},\; I \cdot \text{bandwidth})$$
#
# operations in a second. This is the roof, and $I$ is the arithmetic intensity. We measure the peak by a large product
# in BLAS, the library with which NumPy multiplies matrices, and the bandwidth by copying arrays that no cache can hold.
# A byte that is read and a byte that is written count as two. Both are the best of several runs, since a roof is what
# the machine *can* do.

# %%
side, long = 1024, 1 << 24
square = normal((2, side, side), dtype=np.float32)
source, target = np.ones(long, np.float32), np.zeros(long, np.float32)
roofs = by_turns({"product": lambda: square[0] @ square[1], "copy": lambda: np.copyto(target, source)})
peak = 2 * side**3 / roofs["product"].min()
bandwidth = 2 * source.nbytes / roofs["copy"].min()
print(f"peak {peak / 1e9:.0f} GFLOP/s, bandwidth {bandwidth / 1e9:.0f} GB/s, on one core")
print(f"ridge: {peak / bandwidth:.0f} FLOP for each byte; a kernel with fewer is limited by memory")

# %% [markdown]
# Now count the bytes. At the very least, each argument must come in once and the result must go out once. That is all
# the traffic of a kernel whose intermediate results stay in the cache. For NumPy, count every array that an operation
# reads or writes, as if no cache held anything from one operation to the next. That is the most that it can be.

# %%
scores, by_distance = B * n_heads * m * k * r * 4, B * n_heads * m * (m + r - 1) * 4
least = sum(array.nbytes for array in arrays) + q.nbytes + B * n_heads * m * 4
passes = {
    "q + b_c, q + b_p, and heads brought together": 8 * q.nbytes,
    "keys, values: heads brought together": 2 * (keys.nbytes + values.nbytes),
    "three products": 3 * q.nbytes + keys.nbytes + values.nbytes + table.nbytes + 2 * scores + by_distance,
    "positions copied, and added": 3 * by_distance + 2 * scores,
    "scaled": 2 * scores,
    "softmax: max, subtract, exp, sum, divide": 8 * scores,
    "result, heads last": 2 * q.nbytes,
}
for name, number in passes.items():
    print(f"  {number / 1e6:6.1f} MB  {name}")
traffic = {"numpy": sum(passes.values()), "numba": least, "c": least}
for kind in KINDS:
    print(f"{kind:6} {traffic[kind] / 1e6:6.1f} MB, {flops / traffic[kind]:5.1f} FLOP for each byte")

# %% [markdown]
# NumPy does **3.0 FLOP** for each byte at worst, and the tiled kernels do **31.7 FLOP** at best. More than half of
# NumPy's bytes are scores. The tiled kernels never write a score to memory.

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
intensity = np.geomspace(0.5, 200, 200)
axis.plot(intensity, np.minimum(peak, intensity * bandwidth) / 1e9, color="black")
axis.axvline(peak / bandwidth, color="#c0c0c0", linewidth=1, linestyle=":")
axis.text(190, 1.08 * peak / 1e9, "peak", fontsize=8, ha="right")
axis.text(1, 0.72 * bandwidth / 1e9, "bandwidth", fontsize=8)
axis.text(1.06 * peak / bandwidth, peak / 2.7e10, "ridge", fontsize=8)
for kind, marker in zip(KINDS, "so^", strict=False):
    reached = flops / seconds[kind].min() / 1e9
    axis.plot(flops / traffic[kind], reached, marker, color=COLOURS[kind], markersize=9)
    axis.annotate(kind, (flops / traffic[kind], reached), (10, -4), textcoords="offset points")
axis.set(xscale="log", yscale="log", ylim=(peak / 3e10, peak / 5e8), title="The roofline of this machine, one core")
axis.set(xlabel="arithmetic intensity: FLOP for each byte of memory traffic", ylabel="GFLOP/s")
for axis_of in (axis.xaxis, axis.yaxis):
    axis_of.set_major_formatter("{x:g}")
    axis_of.set_minor_formatter("")
plt.show()
for kind in KINDS:
    roof = min(peak, flops / traffic[kind] * bandwidth)
    print(f"{kind:6} reaches {100 * flops / seconds[kind].min() / roof:3.0f} % of its roof")

# %% [markdown]
# *Figure 11.3.* Only NumPy's kernel stands under the slope, where memory sets the limit.
#
# Read the picture from left to right.
#
# - **NumPy** stands left of the ridge, where the roof slopes. A kernel that got every array from memory would lie on
#   the slope or below it. A point above the slope would say that the caches held much of what we counted.
# - **Numba** stands right of the ridge and moves a tenth of the bytes. Yet in our runs it takes longer than NumPy, and
#   not by a little. So neither memory nor the peak limits it. Something between the two must.
# - **C** has Numba's traffic and comes nearer to its roof than Numba does.
#
# No kernel reaches its roof. For Numba, the next section has a reason.
#
# ## Between memory and peak: registers
#
# What slows Numba down? A core computes only with numbers in its *registers*, on our machines 32 places that each hold
# a vector of 16 numbers (the `avx512` that the first cell printed). Numba's inner loop adds four rows to each of four
# rows of sums, every time multiplied by another number: sixteen products at each place of a row. For each sixteen
# places, one vector wide, it moves twelve vectors between the first cache and the registers: four rows in, four sums
# in, four sums out. C keeps a block of sixteen vectors of sums in registers until they are finished. Compute the
# arithmetic intensity once more, this time for the traffic between registers and first cache.

# %%
lanes = 16  # float32 numbers in a vector of 64 bytes
numba_step = (2 * 4 * 4 * lanes) / (12 * lanes * 4)  # four rows by four; four rows in, four sums in and out
c_step = (2 * 4 * 4 * lanes) / (4 * lanes * 4 + 4 * 4)  # four rows by four vectors; four vectors and four numbers in
print(f"numba {numba_step:.2f} FLOP for each byte moved between cache and registers")
print(f"c     {c_step:.2f} FLOP for each byte moved between cache and registers")

# %% [markdown]
# It is **0.67 FLOP** for each byte against **1.88 FLOP**. For the same products, Numba's loop moves almost three times
# as many bytes between the first cache and the registers as C's. This is a likely reason for its slowness. We have not
# measured how fast that cache is, so it is not a proven one.
#
# How much do registers matter? `benchmarks/product_steps.c` measured the product of one tile in six ways. The numbers
# are those of the table in [csrc/README.md](../csrc/README.md), for one core of an AMD EPYC processor:

# %%
STEPS = {  # GFLOP/s; source: csrc/README.md
    "one sum at a time": 4.1,
    "along memory, 16-byte vectors": 16.7,
    "along memory, 64-byte vectors": 57.6,
    "in registers, 16-byte vectors": 21.4,
    "in registers, 32-byte vectors, fused": 106.1,
    "in registers, 64-byte vectors, fused": 115.8,
}
BLAS = 105  # GFLOP/s of large products on that core; source: csrc/README.md
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
axis.barh(list(STEPS), list(STEPS.values()), color=["#8c8c8c"] * 3 + [COLOURS["c"]] * 3)
axis.invert_yaxis()
axis.axvline(BLAS, color="black", linewidth=0.8, linestyle=":")
axis.text(BLAS - 1, 0, "BLAS, large matrices", fontsize=8, ha="right", va="center")
axis.set(xlabel="GFLOP/s", title="The product of one tile, step by step")
plt.show()
for name, number in STEPS.items():
    print(f"{name:38} {number:6.1f} GFLOP/s")

# %% [markdown]
# *Figure 11.4.* With the same 64-byte vectors, sums in registers and fused operations double the speed. *Fused* means
# that a multiplication and an addition are one instruction.
#
# From the plain loop to the last step the factor is 28, and no step changes what is computed. And in the library as a
# whole? `benchmarks/kernels.py` measured all four forms of attention at the sizes of a training step, on two cores. The
# numbers are from [docs/performance.md](../docs/performance.md).

# %%
MEASURED = {  # ms for forward and backward pass together; source: docs/performance.md
    "causal self-attention": {"numpy": 35.3 + 77.0, "numba": 10.1 + 26.3, "c": 6.2 + 14.5, "PyTorch": 20.9 + 40.4},
    "encoder's self-attention": {"numpy": 71.9 + 167.0, "numba": 23.7 + 58.2, "c": 11.9 + 27.7, "PyTorch": 22.6 + 50.3},
    "CCA": {"numpy": 26.7 + 60.2, "numba": 10.3 + 24.1, "c": 10.3 + 11.1, "PyTorch": 8.4 + 15.9},
    "CA_enc": {"numpy": 42.3 + 103.0, "numba": 13.9 + 32.4, "c": 6.7 + 14.0, "PyTorch": 16.5 + 34.3},
}
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
for number, kind in enumerate(COLOURS):
    axis.bar(
        np.arange(4) + 0.2 * (number - 1.5),
        [of[kind] for of in MEASURED.values()],
        0.18,
        color=COLOURS[kind],
        label=kind,
    )
axis.set_xticks(range(4), [name.replace(" self", "\nself") for name in MEASURED])
axis.set(ylabel="ms, forward and backward", title="Attention at the sizes of a training step, two cores")
axis.legend(frameon=False)
plt.show()
for name, of in MEASURED.items():
    print(f"{name:26}" + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in of.items()))

# %% [markdown]
# *Figure 11.5.* With both passes counted, the C kernel is the fastest in all four forms, and NumPy takes 4 to 7 times
# as long.
#
# Here Numba is much *faster* than NumPy, and above it was slower. CCA has the very sizes of our own measurement: its
# forward pass took NumPy **26.7 ms** there, Numba **10.3 ms** and C **10.3 ms**. But that was another machine, with two
# cores at work. We did not find out whether the machine or the second core turned the order of NumPy and Numba around.
# So an order of two programs belongs to the machine that it was measured on. In this forward pass PyTorch was faster
# than our C kernel, with **8.4 ms**. With both passes it was slower.
#
# ## Threads
#
# Heads and chunks do not depend on each other, so they can be given to several cores. The library uses Python's threads
# for this. They run at the same time because C and Numba release the interpreter's lock. Each task writes its own part
# of the result and nothing else, so the bits are the same for any number of threads. A second thread helps if a second
# core is free. On a busy machine the times below may show no gain, or even a loss.

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
    gains = ", ".join(f"{wall[1] / wall[number]:.1f} times as fast with {number}" for number in wall)
    print(f"{kind:6} threads: {gains}; the same bits")
threads.use_threads(threads_before)
kernels.use("auto")

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell with the dots and run the cell below it.
#
# **11.1** The forward pass, at most `size` chunks at a time. Return `out` and `lse` of all chunks, as one call of
# `attend` would. `attend` is called like `attention_forward`, and must never get more than `size` chunks at once. The
# number of chunks need not be a multiple of `size`.


# %% tags=["exercise"]
def in_slices(attend, q, keys, values, table, b_c, b_p, size): ...


# %% tags=["check"]
check_11_1(in_slices)

# %% [markdown]
# **11.2** A tile can be cut along the keys, too, if the softmax is taken as the keys come ([Milakov & Gimelshein
# 2018](https://arxiv.org/abs/1805.02867)). Keep a running maximum and a running sum, and shrink what was summed so far
# whenever the maximum rises. Write the attention of one head without positions: `q` (n, c), `keys` and `values` (r, c),
# at most `size` keys at a time. Return out (n, c) and lse (n,). Scores may be several thousand, where `np.exp` alone
# overflows.


# %% tags=["exercise"]
def attend_by_blocks(q, keys, values, size): ...


# %% tags=["check"]
check_11_2(attend_by_blocks)

# %% [markdown]
# **11.3** How many times as long does *b* take as *a*? You get two arrays of times (rounds,) that were measured by
# turns. The machine may change its speed, and single rounds may go wrong.


# %% tags=["exercise"]
def times_as_long(a, b): ...


# %% tags=["check"]
check_11_3(times_as_long)

# %% [markdown]
# ## What you have gained
#
# - Three kernels with nearly the same arithmetic differ in what they move. Count both, and the quotient tells you which
#   limit of the machine a kernel can reach.
# - A tile keeps scores in the cache, and lse lets the backward pass recompute the weights instead of storing them.
# - Operations for each byte can be counted at every level: between memory and cache, where NumPy moves too much, and
#   between cache and registers, where Numba does.
# - A comparison by turns, with the median of the quotients, survives a busy machine.
#
# Next: [tutorial 12, from here to 1.75 trillion tokens](12_from_here_to_1_75_trillion_tokens.ipynb).
