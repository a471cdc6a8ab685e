"""Attention in Numba: one head of one item, a tile of queries at a time. csrc/attention.h does the same in C.

The logits of a tile stay in the cache: nothing of their size is kept, and the backward pass recomputes them. Nearly all
of the work is in `_add_product`. Scratch rows and columns are padded with zeros to multiples of 4 for it."""

from __future__ import annotations  # without it, each call evaluates the annotations of `run`

import math
from typing import Any

import numpy as np

from retro_np.kernels import Array
from retro_np.kernels.attention import Maybe, backward_by_tasks, contiguous, forward_by_tasks, in_order
from retro_np.kernels.jit import jit
from retro_np.kernels.rowwise_numba import by_type, polynomial

TILE = 32  # queries

# exp(x) = 2ⁿ exp(x − n ln 2) for float32, the second factor by its Taylor polynomial, highest power first
LOG2_E, LN2, HALF, EXP_MIN = (np.float32(number) for number in (1 / math.log(2), math.log(2), 0.5, -87))
EXP_TAYLOR = tuple(np.float32(1 / math.factorial(degree)) for degree in range(7, -1, -1))


def attention_forward(*arrays: Any, **masks: Any) -> tuple[Array, Array]:
    """Like retro_np.kernels.attention.attention_forward."""
    q, keys, values, *others = _for_loops(*in_order(*arrays, **masks))
    parts = q.shape[0] * q.shape[1]  # for each group of queries a part, which is counted in dtable
    unused = [np.empty((parts, *(0,) * ndim), q.dtype) for ndim in (3, 3, 2, 2)]
    return forward_by_tasks(lambda *tasks: _forward(*tasks, False, q, keys, values, *unused), q, keys, values, *others)


def attention_backward(dout: Array, lse: Array, *arrays: Any, dlse: Maybe = None, **masks: Any) -> tuple[Maybe, ...]:
    """Like retro_np.kernels.attention.attention_backward."""
    q, keys, values, table, *others = in_order(*arrays, **masks)

    def run(dout: Array, lse: Array, dlse: Array, *arguments: Any) -> None:
        *inputs, dq, dkeys, dvalues, dtable, du, dv, first, last = arguments
        _forward(*inputs, dq, lse, first, last, True, dout, dkeys, dvalues, dlse, dtable, du, dv)

    given = contiguous(dout, lse, np.zeros_like(lse) if dlse is None else dlse)
    gradients = backward_by_tasks(run, given, *_for_loops(q, keys, values, table, *others))
    return (*gradients[:3], None, None, None) if table is None else gradients


def _for_loops(
    q: Array, keys: Array, values: Array, table: Maybe, u: Maybe, v: Maybe, mask: Maybe, causal_offset: int | None
) -> tuple[Any, ...]:
    """The arguments in the one form for which the loops are compiled."""
    (batch, _, _, h, c), (k, r), dtype = q.shape, keys.shape[1:3], q.dtype
    if table is None:
        table, u, v = np.empty((0, h, c), dtype), np.zeros((h, c), dtype), np.zeros((h, c), dtype)
    mask = np.ones((batch, k, r), bool) if mask is None else mask.astype(bool, copy=False)
    return q, keys, values, table, u, v, mask, r if causal_offset is None else causal_offset


@jit
def _padded(n: int) -> int:
    return (n + 3) // 4 * 4


@jit
def _add_product(out: Array, a: Array, b: Array, rows: int, columns: int, depth: int, first: int) -> None:
    """out[i, j] += Σ_t a[i, t] · b[t, first + j] for i < rows, j < columns, t < depth. rows and depth: multiples of 4.

    Each row of b that is loaded serves four rows of out, and each row of out takes four rows of b at a time."""
    for i in range(0, rows, 4):
        out0, out1, out2, out3 = out[i], out[i + 1], out[i + 2], out[i + 3]
        for t in range(0, depth, 4):
            b0, b1, b2, b3 = b[t][first:], b[t + 1][first:], b[t + 2][first:], b[t + 3][first:]
            a00, a01, a02, a03 = a[i, t], a[i, t + 1], a[i, t + 2], a[i, t + 3]
            a10, a11, a12, a13 = a[i + 1, t], a[i + 1, t + 1], a[i + 1, t + 2], a[i + 1, t + 3]
            a20, a21, a22, a23 = a[i + 2, t], a[i + 2, t + 1], a[i + 2, t + 2], a[i + 2, t + 3]
            a30, a31, a32, a33 = a[i + 3, t], a[i + 3, t + 1], a[i + 3, t + 2], a[i + 3, t + 3]
            for j in range(columns):  # along memory, so that the compiler vectorises this loop
                x0, x1, x2, x3 = b0[j], b1[j], b2[j], b3[j]
                out0[j] += a00 * x0 + a01 * x1 + a02 * x2 + a03 * x3
                out1[j] += a10 * x0 + a11 * x1 + a12 * x2 + a13 * x3
                out2[j] += a20 * x0 + a21 * x1 + a22 * x2 + a23 * x3
                out3[j] += a30 * x0 + a31 * x1 + a32 * x2 + a33 * x3


@jit
def _exp32(x: np.float32) -> np.float32:
    clipped = EXP_MIN if x < EXP_MIN else x  # NaN stays NaN
    n = np.floor(clipped * LOG2_E + HALF)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)  # 2ⁿ by its exponent bits
    return np.float32(0) if x < EXP_MIN else polynomial(EXP_TAYLOR, clipped - n * LN2) * power


_exp = by_type(_exp32, math.exp)  # for x ≤ 0: within 5e-7 of each other, and 0 below −87 in float32


@jit
def _n_seen(query: int, causal_offset: int, r: int) -> int:
    """How many keys of a group a query sees."""
    return min(max(query + causal_offset + 1, 0), r)


@jit
def _tile_logits(
    logits: Array, by_distance: Array, content: Array, position: Array, keys_t: Array, table_t: Array, mask: Array,
    first: int, n: int, rows: int, causal_offset: int,
) -> int:  # fmt: skip
    """Write the logits of queries first ≤ i < first + rows, −inf where a key is not seen.

    Returns the number of columns in use: fewer than all where causality hides the rest. The padding rows are zero."""
    (k, r), padded, seen = mask.shape, _padded(rows), _n_seen(first + rows - 1, causal_offset, mask.shape[1])
    used: int = _padded(seen) if k == 1 else logits.shape[1]
    logits[:padded, :used] = 0
    _add_product(logits, content, keys_t, padded, used, len(keys_t), 0)
    logits[rows:padded, :used] = 0
    has_positions = table_t.shape[1] > 0
    if has_positions and seen > 0:  # column rows − 1 − i + j is the distance of the tile's query i and key j
        by_distance[:padded, : seen + rows - 1] = 0
        _add_product(by_distance, position, table_t, padded, seen + rows - 1, len(table_t), n - first - rows)
    hidden = logits.dtype.type(-np.inf)
    for i in range(rows):
        seen = _n_seen(first + i, causal_offset, r)
        for group in range(k):
            row, present = logits[i][group * r :], mask[group]
            if has_positions:
                skewed = by_distance[i][rows - 1 - i :]
                for j in range(seen):
                    row[j] += skewed[j]
            for j in range(seen):
                row[j] = row[j] if present[j] else hidden
            row[seen : min(r, used)] = hidden
        logits[i, k * r : used] = hidden
    return used


@jit
def _forward(
    q: Array, keys: Array, values: Array, table: Array, u: Array, v: Array, mask: Array, causal_offset: int,
    out: Array, lse: Array, first_task: int, last_task: int, backward: bool, dout: Array, dkeys: Array, dvalues: Array,
    dlse: Array, dtable: Array, du: Array, dv: Array,
) -> None:  # fmt: skip
    """out and lse of the tasks first_task ≤ t < last_task: head t // P of part t % P, of P = len(dtable).

    backward: a part is some items of the batch. lse is given, and the logits that the forward pass had are turned into
    the gradients; dq is written to out. Otherwise a part is one group of an item's queries, and the arrays of gradients
    are not used."""
    batch, g, n, h, c = q.shape
    (k, r), kind, parts = mask.shape[1:], q.dtype.type, len(dtable)
    all_keys, all_values = keys.reshape((batch, k * r, h, c)), values.reshape((batch, k * r, h, c))
    all_dkeys, all_dvalues = dkeys.reshape((batch, k * r, h, c)), dvalues.reshape((batch, k * r, h, c))
    deep, wide, distances, scale = _padded(c), _padded(k * r), n + r + 4 if len(table) else 0, kind(1 / np.sqrt(c))
    head_keys, head_values = np.zeros((wide, deep), q.dtype), np.zeros((wide, deep), q.dtype)
    head_dkeys, head_dvalues = np.empty((wide, deep), q.dtype), np.empty((wide, deep), q.dtype)
    tiles = np.zeros((5, TILE, deep), q.dtype)  # indexed, because unpacked arrays would not be vectorised
    content, position, tile_out, dcontent, dposition = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    keys_t, values_t = np.empty((deep, wide), q.dtype), np.empty((deep, wide), q.dtype)
    logits, dlogits = np.empty((TILE, wide), q.dtype), np.empty((TILE, wide), q.dtype)
    rows_of_table, rows_of_dtable = np.zeros((distances, deep), q.dtype), np.empty((distances, deep), q.dtype)
    table_t, by_distance = np.empty((deep, distances), q.dtype), np.empty((TILE, TILE + r + 4), q.dtype)
    for task in range(first_task, last_task):
        head, part = task // parts, task % parts
        if len(table) and (task == first_task or part == 0):
            rows_of_table[: len(table), :c] = table[:, head]
            table_t[:] = rows_of_table.T
        if backward:
            items, groups = (part * batch // parts, (part + 1) * batch // parts), (0, g)
            du[part, head], dv[part, head], rows_of_dtable[:] = 0, 0, 0
        else:
            items, groups = (part // g, part // g + 1), (part % g, part % g + 1)
        for item in range(items[0], items[1]):
            if task == first_task or groups[0] == 0:  # otherwise the previous task has loaded them
                head_keys[: k * r, :c], head_values[: k * r, :c] = all_keys[item, :, head], all_values[item, :, head]
                keys_t[:] = head_keys.T
            if backward:
                values_t[:] = head_values.T
                head_dkeys[:], head_dvalues[:] = 0, 0
            for group in range(groups[0], groups[1]):
                for first in range(0, n, TILE):
                    rows = min(TILE, n - first)
                    padded, tile = _padded(rows), q[item, group, first : first + rows, head]
                    tiles[:3, rows:] = 0
                    content[:rows, :c], position[:rows, :c] = (tile + u[head]) * scale, (tile + v[head]) * scale
                    used = _tile_logits(
                        logits, by_distance, content, position, keys_t, table_t, mask[item], first, n, rows,
                        causal_offset,
                    )  # fmt: skip
                    if not backward:
                        factors = content[:, :1]  # content is no longer needed
                        for i in range(rows):
                            row = logits[i][:used]
                            peak = peak1 = peak2 = peak3 = kind(-np.inf)
                            for j in range(0, used, 4):  # four maxima, because each waits for the previous one
                                peak, peak1 = max(peak, row[j]), max(peak1, row[j + 1])
                                peak2, peak3 = max(peak2, row[j + 2]), max(peak3, row[j + 3])
                            peak = max(max(peak, peak1), max(peak2, peak3))
                            shift, total = peak if peak != -np.inf else kind(0), kind(0)
                            for j in range(used):
                                row[j] = _exp(row[j] - shift)
                                total += row[j]
                            lse[item, head, group, first + i] = peak + np.log(total) if total != 0 else kind(np.inf)
                            factors[i, 0] = kind(1) / total if total != 0 else kind(0)
                        tile_out[:] = 0
                        _add_product(tile_out, logits, head_values, padded, deep, used, 0)
                        out[item, group, first : first + rows, head] = tile_out[:rows, :c] * factors[:rows]
                        continue
                    tile_out[:rows, :c] = dout[item, group, first : first + rows, head]
                    for i in range(rows):
                        row, shift = logits[i], lse[item, head, group, first + i]
                        for j in range(used):
                            row[j] = _exp(row[j] - shift)
                    _add_product(head_dvalues, logits.T, tile_out, used, deep, padded, 0)
                    dlogits[:padded, :used] = 0
                    _add_product(dlogits, tile_out, values_t, padded, used, deep, 0)
                    for i in range(padded):
                        weights, row, mean = logits[i], dlogits[i], kind(0)
                        for j in range(used):
                            mean += weights[j] * row[j]
                        if i < rows and lse[item, head, group, first + i] != np.inf:  # not a query without keys
                            mean -= dlse[item, head, group, first + i]
                        for j in range(used):
                            row[j] = weights[j] * (row[j] - mean)
                    dcontent[:] = 0
                    _add_product(dcontent, dlogits, head_keys, padded, deep, used, 0)
                    _add_product(head_dkeys, dlogits.T, content, used, deep, padded, 0)
                    if len(table):
                        columns, start = _padded(min(r, used) + rows - 1), n - first - rows
                        by_distance[:padded, :columns] = 0
                        for i in range(rows):
                            skewed = by_distance[i][rows - 1 - i :]
                            for key_group in range(k):
                                row = dlogits[i][key_group * r :]
                                for j in range(min(r, used)):
                                    skewed[j] += row[j]
                        dposition[:] = 0
                        _add_product(dposition, by_distance, rows_of_table[start:], padded, deep, columns, 0)
                        _add_product(rows_of_dtable[start:], by_distance.T, position, columns, deep, padded, 0)
                    head_du, head_dv = du[part, head], dv[part, head]
                    for i in range(rows):
                        for t in range(c):
                            head_du[t] += dcontent[i, t] * scale
                            head_dv[t] += dposition[i, t] * scale
                            out[item, group, first + i, head, t] = (dcontent[i, t] + dposition[i, t]) * scale
            if backward:
                all_dkeys[item, :, head] = head_dkeys[: k * r, :c]
                all_dvalues[item, :, head] = head_dvalues[: k * r, :c]
        if backward:
            dtable[part, :, head] = rows_of_dtable[: len(table), :c]
