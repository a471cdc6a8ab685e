"""Finite differences: the slopes of a function along directions, and how well they resolve them.

A central difference of step t has a truncation error of order t² and a rounding error of order u/t, where u is that of
the value. Richardson extrapolation from t and t/4 removes the first term of the truncation error. Where that does not
decide, a ladder of steps does. What extrapolated slopes of neighbouring steps differ by is the *resolution*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from retro_np.tree import Array

STEP, COARSE_STEP = 2.0**-10, 2.0**-2  # the first step in float64 and float32, relative to the size of the entry
RATIO = 4  # between neighbouring steps: a power of two, so that moved arguments are exact
MAX_EXHAUSTIVE = 512  # Arguments with at most this many entries in all are checked entry by entry.
N_ENTRIES, N_GROUPS = 24, 4  # of a larger array: single entries, and groups of entries with gradients of similar size
MANY_LEAVES = 16  # With more arrays, one random direction of each is enough, and one group.
MULTIPLES = (2.0**40, 2.0**-60, -1.0, 0.0)  # of the first cotangent, in rows 2 to 5; powers of two keep digits
N_CONFIRMED = 4  # After this many wrong slopes of an array, others are measured with fewer steps.
TOLERANCE, SAFETY = 3e-9, 16  # A slope is wrong if it is off by this part, and by this many resolutions.
NEGLIGIBLE = 2.0**-46  # A slope counts as zero if moving an entry by its own size changes the value by this part.


@dataclass
class Point:
    """A function at a point, and its pullback's answers there.

    evaluate: (leaves) → the value, flat, in float64; NaN where the function is not defined.
    leaves: the arrays. value: (outputs,). cotangents: (K, outputs). gradients: for each leaf, (K, entries).
    rounding: the relative rounding error of the value; coarse: why it is not that of float64, or "". wobble: for each
    leaf, what a rounding error of the arguments changes in its gradient. eps: a fixed step or None.
    """

    evaluate: Callable[[list[Array]], Array]
    leaves: list[Array]
    value: Array
    cotangents: Array
    gradients: list[Array]
    rounding: float
    coarse: str
    wobble: list[Array]
    eps: float | None
    rng: np.random.Generator

    def size(self, value: Array) -> Array:
        """(K,) the size of ⟨cotangent, value⟩, to which rounding errors are relative. A sum of 0 says nothing."""
        value = np.abs(value) if self.value.any() else np.maximum(np.abs(value), 1)
        largest = float(np.max(value)) if np.all(np.isfinite(value)) else 1.0
        squares = np.sqrt(self.cotangents**2 @ (value / (largest or 1.0)) ** 2) * largest
        return squares if squares.min() > 0 else np.abs(self.cotangents) @ value  # small squares are lost

    @cached_property
    def magnitude(self) -> Array:
        """(K,) the size that a zero slope is measured by: the value's, or 0 if all slopes are lost in its rounding."""
        pairs = zip(self.gradients, self.leaves, strict=True)
        slopes = np.max([np.max(np.abs(g) * (np.abs(x.reshape(-1)) + (not x.any())), axis=1) for g, x in pairs], axis=0)
        return self.size(self.value) * bool(np.any(slopes > NEGLIGIBLE * self.size(self.value)) or not slopes.any())


class Direction(NamedTuple):
    """The entries `indices` of one leaf (flat) move by `sizes`."""

    name: str
    indices: Array
    sizes: Array


@dataclass
class Slopes:
    """Along one direction and for each cotangent, (K,): the pullback's slope, and its `error` by the differences.

    scale: the size of the slope. steps: the best ones. tolerance: relative. verdict: "wrong", "kink" (the slopes on
    both sides differ, and the pullback's is between), "edge" (f is not finite on both sides), or "".
    """

    direction: Direction
    analytic: Array
    error: Array
    resolution: Array
    scale: Array
    steps: Array
    tolerance: float
    rounding: Any = 0.0
    verdict: str = ""

    def __post_init__(self) -> None:
        self.verdict = "wrong" if np.any(self.is_wrong()) else ""

    @property
    def relative(self) -> Array:
        """(K,) the errors relative to the slope, or to what the differences resolve if that is larger."""
        unresolved = np.maximum(self.resolution, self.rounding) / max(self.tolerance, TOLERANCE)
        size = np.where(self.is_wrong(), self.scale, np.maximum(self.scale, SAFETY * unresolved))
        return np.asarray(np.abs(self.error) / np.where(size > 0, size, np.where(self.error == 0, 1, 1e-300)))

    def step(self) -> float:
        """The typical best step of the cotangents whose slopes are not 0."""
        return float(np.median(self.steps[self.scale > 0] if np.any(self.scale > 0) else self.steps))

    def is_wrong(self) -> Array:
        """(K,) whether the errors are above the tolerance, and certain."""
        return np.asarray(
            np.abs(self.error)
            > np.maximum(self.tolerance * self.scale, SAFETY * np.maximum(self.resolution, self.rounding))
        )

    def digits(self, magnitude: Array) -> float:
        """The best relative resolution, NaN if all slopes are clearly 0. Agreement is resolution."""
        coarse, heard = SAFETY * self.resolution, (self.scale > 0) & (self.resolution > 0)
        zero = (np.abs(self.analytic) <= NEGLIGIBLE * magnitude) & (coarse <= 1e-6 * magnitude)
        agrees = np.abs(self.error) <= self.tolerance * self.scale
        coarse = np.where(agrees, np.minimum(coarse, max(self.tolerance, 1e-13) * self.scale), coarse)
        return float(np.min((coarse / self.scale)[heard & ~zero], initial=np.inf)) if not zero.all() else np.nan


def check_leaf(point: Point, leaf: int, tolerance: float, limit: float) -> tuple[str, Slopes, float, list[float]]:
    """Compare one leaf's gradients with differences along many directions.

    tolerance: the relative error that passes. limit: the relative resolution that is needed to say anything.
    Returns "right", "wrong", "kink", "edge" or "cannot tell", the worst slopes, the relative resolution, and the steps.
    """
    start, scans = point.eps or (STEP if point.rounding < 1e-10 else COARSE_STEP), 8
    every, wrong = list[Slopes](), list[Slopes]()
    for direction in _directions(point, leaf):
        effort = 0 if len(wrong) >= N_CONFIRMED else 2 if scans > 0 else 1
        slopes = _slopes(point, leaf, direction, tolerance, start, effort)
        if (step := slopes.step()) != start:  # A ladder was needed. The next directions start near where it ended.
            start, scans = step / RATIO**2, scans - 1
        every.append(slopes)
        wrong += [slopes] if slopes.verdict == "wrong" else []
    peak = lambda slopes: slopes.relative.max()  # noqa: E731
    digits = [slopes.digits(point.magnitude) for slopes in every]
    resolution = float(np.nanmin(digits)) if not np.all(np.isnan(digits)) else 0.0
    entries = [slopes for slopes in wrong if len(slopes.direction.indices) == 1]
    odd = [slopes for slopes in every if slopes.verdict in ("kink", "edge")]
    if wrong:
        verdict = "wrong"
        worst = max(entries, key=peak) if entries else _located(point, leaf, max(wrong, key=peak), start)
    elif odd:
        worst = min(odd, key=lambda slopes: len(slopes.direction.indices))
        verdict = worst.verdict
    else:
        verdict, worst = "right" if resolution <= limit else "cannot tell", max(every, key=peak)
    steps = [float(np.max(np.abs(slopes.direction.sizes)) * step) for slopes in every for step in slopes.steps]
    return verdict, worst, resolution, steps


def _typical(array: Array) -> float:
    """The median size of the entries that are not 0, or 0."""
    sizes = np.abs(array[array != 0])
    return float(np.median(sizes)) if len(sizes) else 0.0


def _directions(point: Point, leaf: int) -> Iterator[Direction]:
    """Random directions of all entries, groups of entries in a large array, and single entries."""
    array, rng, many = point.leaves[leaf], point.rng, len(point.leaves) > MANY_LEAVES
    size, largest = array.size, np.abs(point.gradients[leaf][:2]).max(axis=0)
    # Zeros say nothing about the scale on which the function varies; the value and the other leaves may.
    typical = _typical(array) or min([1.0, *(x for x in map(_typical, [point.value, *point.leaves]) if x)])
    sizes = 2.0 ** np.round(np.log2(np.maximum(np.abs(array.reshape(-1).astype(np.float64)), typical / 64)))
    further = 2.0 ** np.floor(np.log2(np.clip(_typical(largest) / np.maximum(largest, 1e-300), 1, 64)))
    sizes, further = (np.ones(size), np.ones(size)) if point.eps else (sizes, further)
    # With signs alone two equal errors could cancel. Five bits keep the moved arguments exact.
    random = rng.choice([-1, 1], (2, size)) * rng.integers(16, 32, (2, size)) / (32 if point.eps else 16) * sizes
    random[1] *= further  # so that entries with small gradients are heard
    entries = np.arange(size)
    for number in range(0 if size == 1 else 1 if many else 2):
        yield Direction(f"random direction {number}", entries, random[number])
    if sum(leaf.size for leaf in point.leaves) > MAX_EXHAUSTIVE:
        levels = np.floor(np.log2(np.maximum(largest, 1e-300)) / 10)  # within a factor of 1024
        distinct = np.unique(levels)
        groups = [np.flatnonzero(levels == level) for level in distinct]
        for members in groups[: 1 if many else N_GROUPS] if len(groups) > 1 + many else ():
            if len(members) > 1:
                yield Direction(f"random direction of {len(members)} entries", members, random[0, members])
        order, quota = np.argsort(largest), 0 if many else min(size, N_ENTRIES)
        alone = [members[0] for members in groups if len(members) == 1 and not many]
        picked = rng.choice(size, quota, replace=False)
        entries = np.unique(np.r_[order[:quota:4], order[size - quota :: 4], picked, alone]).astype(int)
    for entry in entries:
        index = tuple(map(int, np.unravel_index(entry, array.shape)))
        yield Direction(f"index {index}", np.array([entry]), sizes[entry : entry + 1])


def _central(point: Point, leaf: int, direction: Direction, step: float) -> tuple[Array, ...]:
    """(K,) each: slope by the pullback, by a central difference, rounding error, and jumps between two sides."""
    base, moved, values = point.leaves[leaf], [], []
    for sign in (1, -1):
        array = base.copy("K")
        array.flat[direction.indices] += (sign * step * direction.sizes).astype(base.dtype)
        moved.append(array.flat[direction.indices].astype(np.float64))
        value = point.evaluate([*point.leaves[:leaf], array, *point.leaves[leaf + 1 :]])
        values.append(value if value.shape == point.value.shape else np.full(point.value.shape, np.nan))
    # The pullback's slope is taken along what rounding left of the step, and is NaN if nothing is left.
    distance = moved[0] - moved[1]
    analytic = point.gradients[leaf][:, direction.indices] @ np.where(distance == 0, np.nan, distance) / (2 * step)
    numeric = point.cotangents @ (values[0] - values[1]) / (2 * step)
    rounding = 4 * point.rounding * point.size(np.maximum(np.abs(values[0]), np.abs(values[1]))) / step
    jump = np.abs(point.cotangents) @ np.abs(values[0] - 2 * point.value + values[1]) / step
    return analytic, numeric, rounding, jump


def _slopes(point: Point, leaf: int, direction: Direction, tolerance: float, start: float, effort: int) -> Slopes:
    """Compare the slopes along one direction, with more steps until they agree or are clearly different.

    start: the first step. effort: 0 for no other steps, 2 to look for others also where little is resolved.
    """
    tried: dict[float, tuple[Array, ...]] = {}

    def at(step: float) -> tuple[Array, ...]:
        return tried[step] if step in tried else tried.setdefault(step, _central(point, leaf, direction, step))

    def extrapolated(step: float) -> tuple[Array, Array, Array]:
        """Slopes by the pullback and by the differences, and the rounding error of the latter."""
        (a1, n1, *_), (a2, n2, rounding, _) = at(step), at(step / RATIO)
        return (RATIO**2 * a2 - a1) / (RATIO**2 - 1), (RATIO**2 * n2 - n1) / (RATIO**2 - 1), 2 * rounding

    several = len(direction.indices) > 1
    length = float(np.max(np.abs(direction.sizes)) * np.sqrt(len(direction.indices)))
    # A sum with random signs is about as large as the root of the sum of squares.
    spread = np.linalg.norm(point.gradients[leaf][:, direction.indices] * direction.sizes, axis=1) * several
    analytic, numeric, rounding = extrapolated(start)
    error, scale = analytic - numeric, np.fmax(np.fmax(np.abs(analytic), np.abs(numeric)), spread)
    resolution = rounding / SAFETY + np.abs(numeric - at(start / RATIO)[1]) / RATIO * bool(point.eps)
    right = np.abs(error) <= np.maximum(tolerance * scale, rounding)
    enough = (np.abs(error) <= tolerance * scale) | (rounding <= 1e-6 * scale) | (scale <= NEGLIGIBLE * point.magnitude)
    if point.eps or effort == 0 or np.all(right & (enough | (effort < 2))):
        return Slopes(direction, analytic, error, resolution, scale, np.full(len(error), start), tolerance)

    error, resolution, steps = _best_of([start * RATIO ** (2 - i) for i in range(8)], extrapolated, scale)
    # This is enough for a gradient that is right. A wrong one must also be wrong by the smallest steps.
    if not np.all((np.abs(error) <= np.maximum(tolerance * scale, SAFETY * resolution)) & (resolution <= 1e-6 * scale)):
        top = np.ceil(np.log2(max(4.0, 4 / np.max(np.abs(direction.sizes)))))  # up to an argument of about 1
        bottom = np.log2(point.rounding) + (7 if several else 3)  # below, moved arguments would not be exact
        if not several and (entry := abs(point.leaves[leaf].flat[direction.indices[0]])):
            bottom += min(0.0, np.log2(entry / length))
        error, resolution, steps = _best_of(list(2.0 ** np.arange(top, bottom, -2)), extrapolated, scale)
    analytic = np.array([at(step)[0][k] for k, step in enumerate(steps)])
    # The pullback rounds too, relative to terms that may be larger than their sum, and f what it makes of the argument.
    loudness, peak = np.abs(point.cotangents).max(axis=1), np.abs(point.gradients[leaf][:2]).max()
    terms = point.rounding / 2 * np.minimum(peak * loudness, point.size(point.value) * max(1, 1 / length))
    moved = np.abs(point.leaves[leaf].flat[direction.indices]).max() / np.abs(direction.sizes).max()
    inner = np.maximum(length * terms, point.rounding / 16 * np.abs(analytic) * min(1.0, moved) / steps)
    wobble = np.linalg.norm(point.wobble[leaf][direction.indices] * direction.sizes)
    rounding = np.maximum(inner, wobble / 4 * loudness)
    scale = np.fmax(np.fmax(np.abs(analytic), np.abs(analytic - error)), spread)
    _, numerics, roundings, jumps = map(np.array, zip(*(tried[step] for step in sorted(tried)), strict=True))
    # A value may change in stairs, as log(1 + x) does for a small x, or a sine in float32. They look flat.
    changes, sizes = (np.abs(part) * np.sort(list(tried))[:, None] for part in (numerics, roundings / point.rounding))
    quantum, reach = point.rounding * np.abs(point.leaves[leaf]).max() * loudness, np.max(np.nan_to_num(sizes), axis=0)
    smallest = np.min(changes, axis=0, where=changes > 0, initial=np.inf)
    stairs = smallest <= SAFETY * np.maximum(quantum, 1e-7 * reach)
    flat = np.abs(error - analytic) <= 1e-6 * np.abs(analytic)
    resolution = np.where(stairs & flat, np.maximum(resolution, np.abs(error)), resolution)
    slopes = Slopes(direction, analytic, error, resolution, scale, steps, tolerance, rounding)
    # The jump between the slopes on both sides vanishes with the step, except at a kink. Along a direction with several
    # kinks the pullback's slope need not lie between those of the two sides. `first`: not lost in rounding.
    lost = SAFETY * np.sqrt(len(point.value)) * roundings > np.abs(error) / 4
    first = np.minimum(np.argmin(lost, axis=0), len(jumps) - 3)
    smaller, larger = (jumps[first + i, np.arange(len(error))] for i in (0, 2))
    stays = (smaller > larger / 2) & (several | (np.abs(error) <= 0.501 * smaller)) & (np.abs(error) <= smaller)
    if slopes.verdict and np.all(stays[slopes.is_wrong()]):
        slopes.verdict = "kink"
    elif not several and np.all(np.isnan(numerics)):
        slopes.verdict = "edge"
    return slopes


def _best_of(ladder: list[float], slopes_at: Callable[..., Any], scale: Array) -> tuple[Array, Array, Array]:
    """For each cotangent: the error at a step where three neighbours agree, how well they do, and that step."""
    analytic, numeric, rounding = map(np.array, zip(*map(slopes_at, ladder), strict=True))
    with np.errstate(invalid="ignore", over="ignore"):
        # One more extrapolation removes the term of order t⁴.
        analytic, numeric = ((RATIO**4 * x[1:] - x[:-1]) / (RATIO**4 - 1) for x in (analytic, numeric))
        errors, sizes = analytic - numeric, np.abs(numeric)
        jumps, larger = np.abs(np.diff(errors, axis=0)), np.maximum(sizes[:-1], sizes[1:])
        # Steps far beyond the function's own scale give slopes near 0. They agree with one another, but not relatively.
        jumps[(np.abs(np.diff(numeric, axis=0)) > 1e-3 * larger) & (larger > 2 * SAFETY * rounding[2:])] = np.inf
        resolution = np.maximum(np.maximum(jumps[:-1], jumps[1:]), rounding[2:-1] / SAFETY)
    resolution, errors = np.where(np.isnan(resolution), np.inf, resolution), np.nan_to_num(errors, posinf=0, neginf=0)
    padded = np.pad(resolution, ((1, 1), (0, 0)), mode="edge")
    resolution = np.maximum(resolution, np.minimum(padded[:-2], padded[2:]))  # A dip in a single place is chance.
    for i in reversed(range(len(resolution) - 1)):  # Rounding errors do not shrink faster than steps grow.
        smaller = np.where(np.isfinite(resolution[i + 1]), resolution[i + 1] / RATIO, 0)
        resolution[i] = np.maximum(resolution[i], smaller)
    # A slope is a limit. Begin at the smallest steps that resolve anything, and go on to larger ones while they
    # resolve more and agree with the smaller ones. Steps beyond a kink, or beyond a period of the function, do not.
    every, chosen = np.arange(len(scale)), np.full(len(scale), -1)
    for i in reversed(range(len(resolution))):
        agrees = np.abs(errors[i + 1] - errors[chosen + 1, every]) <= SAFETY * resolution[chosen, every]
        better = agrees & (resolution[i] < resolution[chosen, every])
        chosen = np.where(np.where(chosen < 0, resolution[i] <= 0.03 * scale, better), i, chosen)
    lost, chosen = chosen < 0, np.where(chosen < 0, np.argmin(resolution, axis=0), chosen)
    error, certain = errors[chosen + 1, every], SAFETY / 4 * resolution
    # Windows may contradict each other. Rounding errors within f may be steady at small steps, but are small. At large
    # steps a slope may be steady and another. Smaller steps, which resolve less, may then still support the pullback.
    contrary = (np.abs(errors[1:-1]) <= certain) & (certain <= np.abs(error) / 2)
    contrary &= (np.arange(len(certain))[:, None] > chosen) | (np.abs(error) <= 1e-3 * scale)
    lost, resolution = lost | np.any(contrary, axis=0), resolution[chosen, every]
    resolution = np.where(lost, np.maximum(resolution, np.fmax(scale, np.abs(error))), resolution)
    return error, resolution, np.array(ladder)[chosen + 2]


def _located(point: Point, leaf: int, worst: Slopes, start: float) -> Slopes:
    """The entry that makes a direction wrong, by bisection, if it shows by itself; otherwise the direction."""
    k, part = int(worst.relative.argmax()), worst.direction
    while len(part.indices) > 1:
        halves = [slice(None, len(part.indices) // 2), slice(len(part.indices) // 2, None)]
        parts = [Direction("", part.indices[half], part.sizes[half]) for half in halves]
        part = max(parts, key=lambda half: abs(_slopes(point, leaf, half, worst.tolerance, start, 0).error[k]))
    index = tuple(map(int, np.unravel_index(part.indices[0], point.leaves[leaf].shape)))
    single = Direction(f"index {index}, found along {worst.direction.name}", part.indices, np.abs(part.sizes))
    entry = _slopes(point, leaf, single, worst.tolerance, start, 1)
    return entry if entry.verdict == "wrong" else worst


def likely_mistake(point: Point, leaf: int, worst: Slopes) -> str:
    """What the pattern of a wrong gradient suggests, or an empty string."""
    size, shape = point.leaves[leaf].size, point.leaves[leaf].shape
    if np.all(np.abs(worst.error) <= 1e-6 * worst.scale):
        return "is something computed in float32 on the way?"
    rows = point.gradients[leaf]
    if np.any(np.abs(rows[2:6] - np.outer(MULTIPLES, rows[0])) > 1e-6 * np.outer(np.abs(MULTIPLES), np.abs(rows[0]))):
        return "the pullback is not linear in its cotangent: is it clipped, or is a term independent of it?"
    if size > MAX_EXHAUSTIVE or not np.any(rows):
        return "" if np.any(rows) else "the gradient is zero, although the argument matters"
    k = 0 if worst.relative[0] > 1e-6 else int(worst.relative.argmax())
    array, start = rows[k].reshape(shape), worst.step() / RATIO**2
    sizes = np.abs(point.leaves[leaf].reshape(-1))
    moves = np.where(sizes > 0, sizes, sizes.max() or 1.0)
    entries = [Direction("", np.array([entry]), moves[entry : entry + 1]) for entry in range(size)]
    errors = [_slopes(point, leaf, entry, 1e-6, start, 0).error[k] for entry in entries]
    numeric = array - np.reshape(errors / moves, shape)
    largest, peak = np.max(np.abs(numeric)), np.unravel_index(np.argmax(np.abs(numeric)), shape)
    axes = range(len(shape))
    lengths = {size, len(point.value), *(n for other in point.leaves for n in (*other.shape, other.size))}
    if np.max(np.abs(array - numeric)) <= 1e-3 * largest:
        return ""  # too small an error for a pattern
    guesses = [(-array, "wrong sign?")]
    if ratio := float(array[peak] / numeric[peak]) if largest > 0 else 0.0:
        is_length = any(n > 2 and np.isclose(ratio, [n, 1 / n]).any() for n in lengths)
        text = f"{ratio:.4g} times too large" if abs(ratio) > 1 else f"too small by a factor of {1 / ratio:.4g}"
        guesses.append((array / ratio, f"{text}: {'a sum for a mean, or the reverse' if is_length else 'a factor'}?"))
    guesses += [(array.transpose(order), "transposed?") for order in list(permutations(axes))[1:]]
    guesses += [(np.flip(array, axis), f"reversed along axis {axis}?") for axis in axes]
    guesses += [
        (np.roll(array, i, axis), f"an index shifted by {-i} along axis {axis}?") for axis in axes for i in (-1, 1)
    ]
    others = [gradients[k] for i, gradients in enumerate(point.gradients) if i != leaf and gradients.shape[1] == size]
    guesses += [(other.reshape(shape), "swapped with the gradient of another argument?") for other in others]
    if point.cotangents.shape[1] == size:
        residual = point.cotangents[k].reshape(shape)
        guesses.append((array + residual, "is one branch missing, a residual connection perhaps?"))
    for guess, text in guesses:
        if guess.shape == shape and np.max(np.abs(guess - numeric)) <= 1e-3 * largest:
            return text
    wrong, negative = np.abs(array - numeric) > 1e-3 * largest, point.leaves[leaf] < 0
    for side, name in ((negative, "negative"), (~negative, "positive")):
        if min(side.sum(), (~side).sum()) > 1 and np.array_equal(wrong, side):
            return f"wrong only where the argument is {name}: is one branch missing?"
    for axis in axes:
        if shape[axis] > 1 and len(rows := np.unique(np.nonzero(wrong)[axis])) == 1:
            return f"wrong only at index {rows[0]} of axis {axis}"
    return ""
