"""The gradient checker: it compares a pullback with finite differences, and watches what f and the pullback touch.

A central difference of step t has a truncation error of order t² and a rounding error of order u/t, where u is that of
the value. Richardson extrapolation from t and t/4 removes the first term of the truncation error. Where that does not
decide, a ladder of steps does. What extrapolated slopes of neighbouring steps differ by is the *resolution*."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from typing import Any, NamedTuple

import numpy as np

from retro_np.errors import GradientError, GradientFormError, GradientReport, GradientRow
from retro_np.tree import Array, LeafFunction, Pullback, flat_outputs, flatten, index_of, kind_of, outputs_of, unflatten

__all__ = ["GradientError", "GradientFormError", "GradientReport", "GradientRow", "from_torch", "gradcheck"]
MIN_RESOLUTION = 1e-3  # relative; needed to say anything, unless the user sets a tolerance, which is then needed
VERDICTS = ("wrong", "cannot tell", "right", "frozen", "skipped")  # from worst to best
STEP, COARSE_STEP = 2.0**-10, 2.0**-2  # the first step in float64 and float32, relative to the size of the entry
RATIO = 4  # between neighbouring steps: a power of two, so that moved arguments are exact
MAX_EXHAUSTIVE = 512  # Arguments with at most this many entries in all are checked entry by entry.
N_ENTRIES, N_GROUPS = 24, 4  # how many single entries, and groups of similar gradients, are moved in a larger array
MANY_LEAVES = 16  # With more arrays, one random direction of each is enough, and one group.
MULTIPLES = (2.0**40, 2.0**-60, -1.0, 0.0)  # Cotangents 2 to 5 are cotangent 0 times these, which keep its digits.
N_CONFIRMED = 4  # After this many wrong slopes of an array, others are measured with fewer steps.
TOLERANCE, SAFETY = 3e-9, 16  # A slope is wrong if it is off by this part, and by this many resolutions.
NEGLIGIBLE = 2.0**-46  # A slope counts as zero if moving an entry by its own size changes the value by this part.


def gradcheck(
    f: Callable[..., Any], *arguments: Any, raise_exception: bool = True,
    frozen: int | str | Collection[int | str] = (), eps: float | None = None,
    tolerance: float | Sequence[float] | Mapping[int | str, float] | None = None, seed: int = 0,
) -> GradientReport:  # fmt: skip
    """Compare the pullback of f with central differences in float64, and check that both leave their inputs alone.

    f(*arguments) → (value, vjp), in either order. The value is an array, a number or a tree of them. vjp(dvalue)
    returns a tuple with one gradient per argument; for a single argument it may return the gradient itself. A tree
    consists of dicts, lists, tuples, namedtuples and dataclasses. float32 data is converted to float64. Integers and
    booleans are skipped; their gradients may be left out.

    frozen: arguments (position or name) and leaves (dotted name) whose gradient may be None.
    eps: a fixed step. By default, steps follow the size of each entry and change until the differences agree.
    tolerance: the relative error that passes, for all arguments or for each: a sequence, or a dict by position or
        name. By default 3e-9, or what the differences resolve if that is larger.
    seed: of the cotangents and directions.

    docs/gradcheck.md says what this can and cannot tell. In a test suite, `assert gradcheck(f, x, w)` is enough.
    To check the second order, check the pullback as a function of the argument and the cotangent (example there).

    Returns a GradientReport. Raises GradientError (an AssertionError, with `.report`) if a gradient is wrong or if the
    differences cannot tell, and GradientFormError, which is also a ValueError and a TypeError, if a value or gradient
    has the wrong form; with raise_exception=False it returns the report instead. Always raises TypeError if an argument
    is complex or f does not return a value and a pullback, and ValueError if nothing can be checked."""
    function = LeafFunction(f, arguments, (frozen,) if isinstance(frozen, int | str) else frozen)
    tolerances = function.by_argument(tolerance)
    if not all(option is None or option >= 0 for option in tolerances) or not (eps is None or eps > 0):
        raise ValueError("a tolerance must not be negative, and eps must be positive")
    try:
        with np.errstate(all="ignore"):
            report = _report(function, tolerances, *_probed(function, eps, seed))
        failure = GradientError(report.message)
    except GradientError as error:
        report, failure = GradientReport.of_failure(error, function.names), error
    if raise_exception and not report:
        failure.report = report
        raise failure
    return report


def _probed(function: LeafFunction, eps: float | None, seed: int) -> tuple[Point, list[Any]]:
    """Call f and its pullback several times, and raise GradientError where they break the rules.

    Returns the point, and the pullback's answer."""
    rng, low = np.random.default_rng((seed, 6020)), ""  # a generator that nobody draws data with
    leaves, labels = function.copies(np.float64), [function.label(n) for n in function.numbers]
    try:
        value, vjp = function.call(leaves)
    except Exception as error:
        leaves, low = function.copies(np.float32), f"f takes only float32 ({type(error).__name__} for float64)"
        try:
            value, vjp = function.call(leaves)
        except Exception:
            raise error from None
    originals = LeafFunction(function.f, function.arguments).filled(function.copies(leaves[0].dtype))

    def require_unchanged(actor: str) -> None:
        for n, (array, original) in enumerate(zip(function.filled(leaves), originals, strict=True)):
            if isinstance(array, np.ndarray) and array.tobytes() != original.tobytes():
                raise GradientError(f"{function.label(n)}: {actor} overwrites it: work on a copy", function.paths[n][0])

    def pull(cotangent: Array) -> list[Any]:
        """The pullback's answer in a call that is not the first."""
        try:
            return function.pull(value, vjp, cotangent)
        except GradientError:
            raise
        except Exception as error:
            message = f"the pullback fails when it is called again: {type(error).__name__}: {error}"
            raise GradientError(message) from error

    def require_same(gradients: list[Any], what: str) -> None:
        """Raise GradientError if the gradients depart from the first ones, relative to the largest entry of each."""
        new, sizes = function.flat(gradients), np.diff(function.ends, prepend=0)
        largest = [np.abs(leaf).max() or 1.0 for leaf in leaves]  # Below the floor there is only rounding of a zero.
        floor = 2.0**-46 * (np.repeat(np.abs(cotangents[0] * flat).max() / largest, sizes) + np.abs(first).max())
        bound = 1e-12 * np.repeat(np.maximum.reduceat(np.abs(first), function.ends - sizes), sizes) + floor
        excess = np.where(np.isfinite(new), np.abs(new - first) - bound, np.inf)
        place, position = function.place(worst := int(np.argmax(excess)))
        if excess[worst] > 0:
            raise GradientError(f"{place}: {what} {new[worst]:.9g} instead of {first[worst]:.9g}", position)

    require_unchanged("f")
    flat, floats = flat_outputs(value), [output for output in outputs_of(value) if output.dtype.kind == "f"]
    lowest = min((output.dtype for output in floats), key=lambda dtype: dtype.itemsize)
    if not np.all(np.isfinite(flat)):
        raise GradientError("the value is not finite, so its differences cannot be taken")
    if lowest.itemsize < 8 and not low:
        low = f"the value is {lowest}, although the arguments are float64"
    cotangents = _cotangents(flat, [output.size for output in floats], rng)
    raw = function.pull(value, vjp, cotangents[0])
    first = function.flat(raw)
    require_unchanged("the pullback")
    if all(gradient is None for gradient in raw):
        raise GradientFormError("every gradient is None, so nothing was checked: return gradients from the pullback")
    if not np.all(np.isfinite(first)):
        place, position = function.place(entry := int(np.argmin(np.isfinite(first))))
        raise GradientError(f"{place}: the pullback says {first[entry]}", position)
    names, arrays = [*(f"the gradient of {label}" for label in labels), *labels], [*pull(np.ones(len(flat))), *leaves]
    for (label, a), (other, b) in combinations(zip(names, arrays, strict=True), 2):
        if _share_memory(a, b):
            raise GradientError(f"{label} shares its buffer with {other}: return a copy")
    for n, gradient, leaf in zip(function.numbers, raw, leaves, strict=True):
        label, position = function.label(n), function.paths[n][0]
        if kind_of(gradient) == "f" and np.asarray(gradient).itemsize < 8 and not low:
            fault = f"the gradient is {gradient.dtype}, although the argument is float64"
            raise GradientError(f"{label}: {fault}", position)
        if n not in function.frozen and not np.all(np.isfinite(leaf)):
            raise GradientError(f"{label}: not finite, so it cannot be moved: name it in frozen=", position)
    require_same(pull(cotangents[0]), "called again, the pullback returns")
    value2, vjp2 = function.call(leaves)
    again = flat_outputs(value2)
    if again.shape != flat.shape or np.any(np.abs(again - flat) > 1e-12 * np.max(np.abs(flat))):
        raise GradientError("f returns another value when it is called again: draw random numbers with a fixed seed")
    function.pull(value2, vjp2, 0.71 * cotangents[-1])
    function.evaluate([np.asarray(leaf * (1 + 2.0**-6) + 2.0**-20, leaf.dtype) for leaf in leaves])
    if not np.array_equal(flat_outputs(value), flat):
        raise GradientError("f or its pullback overwrites the value that f had returned: return a new array")
    require_same(pull(cotangents[0]), "after another call of f, the pullback of the first call returns")
    rows = [first, *(function.flat(pull(cotangent)) for cotangent in cotangents[1:])]
    require_same(raw, "called again, the pullback overwrites its earlier gradient with")
    require_unchanged("f or its pullback")
    rounding = float(np.finfo(lowest).eps) / 2
    nudged = [leaf.copy("K") for leaf in leaves]
    for leaf in nudged:
        leaf *= (1 + 2 * rounding * rng.choice([-1, 1], leaf.shape)).astype(leaf.dtype)
    moved = function.flat(function.pull(*function.call(nudged), cotangents[0]))
    gradients = np.split(np.array(rows), function.ends[:-1], axis=1)
    change = np.nan_to_num(np.abs(moved - first))
    change[change > 1e-3 * np.abs(first).max()] = 0  # That is a jump, not rounding.
    ratio = np.median(change[first != 0] / np.abs(first[first != 0])) if first.any() else 0.0
    wobble = np.split(np.maximum(change, ratio * np.abs(first)), function.ends[:-1])
    return Point(function.evaluate, leaves, flat, cotangents, gradients, rounding, low, wobble, eps, rng), raw


def _report(leaves: LeafFunction, tolerances: list[Any], point: Point, raw: list[Any]) -> GradientReport:
    """One row per argument, that of its worst leaf."""
    rows = []  # with the message of each
    for i, name in enumerate(leaves.names):
        others = [n for n, (position, _) in enumerate(leaves.paths) if position == i and n not in leaves.numbers]
        rows.append((GradientRow(i, name, "skipped", note=leaves.types(others)), ""))
    for leaf, number in enumerate(leaves.numbers):
        (i, path), note, message = leaves.paths[number], "", ""
        finite = np.all(np.isfinite(point.leaves[leaf]))
        if number in leaves.frozen and not (finite and point.gradients[leaf].any()):
            rows.append((GradientRow(i, leaves.names[i], "frozen", where=path), ""))
            continue
        tolerance = tolerances[i]
        allowed, limit = (TOLERANCE, MIN_RESOLUTION) if tolerance is None else (tolerance, tolerance)
        verdict, worst, resolution, steps = check_leaf(point, leaf, allowed, limit)
        error, k = float(worst.relative.max()), int(worst.relative.argmax())
        unit = float(worst.direction.sizes[0]) if len(worst.direction.sizes) == 1 else 1.0
        analytic, numeric = worst.analytic[k] / unit, (worst.analytic[k] - worst.error[k]) / unit
        both = f"the pullback says {analytic:.9g}, finite differences {numeric:.9g}"
        size = np.max(np.abs(point.leaves[leaf]))
        if verdict == "wrong":
            missing = "None was returned; name it in frozen= if it is not trained"
            note = missing if raw[leaf] is None else likely_mistake(point, leaf, worst)
            message = f"{both}; error {error:.3g} is above {allowed:.3g}{': ' * bool(note)}{note}"
        elif verdict != "right" or (point.coarse and tolerance is None):
            value, slope = np.max(np.abs(point.value)), np.max(np.abs(point.gradients[leaf][:2]))
            advice = "rescale it" if 0.1 < size < 10 else f"divide the argument by {size:.0e}"
            advice = f"subtract about {value:.0e} from the value" if slope * size < 1e-6 * value else advice
            if np.any(point.value % 1) and np.array_equal(point.value.astype(np.float32), point.value):
                advice = "is something computed in float32 on the way?"
            advice = "set a larger tolerance" if resolution <= MIN_RESOLUTION else advice
            note = f"the differences resolve {resolution:.1e} of the gradient, not {limit:.0e}: {advice}"
            note = "there is a kink, the slopes on both sides differ: move the argument" if verdict == "kink" else note
            note = "f is not finite on both sides of it: move the argument" if verdict == "edge" else note
            note = f"{point.coarse}: compute in the arguments' dtype, or set tolerance=1e-3" if point.coarse else note
            verdict, message = "cannot tell", f"cannot tell whether this is right: {both}; {note}"
        where = ", ".join(part for part in (path, worst.direction.name) if part)
        span = min(steps), max(steps)
        rows.append((GradientRow(i, leaves.names[i], verdict, error, where, resolution, span, note), message))
    rows.sort(key=lambda pair: (VERDICTS.index(pair[0].verdict), -pair[0].error))
    worst_of = [next(pair for pair in rows if pair[0].argument == i) for i in range(len(leaves.names))]
    texts = [f"argument {row.argument}, {row.where}: {text}" for row, text in worst_of if text]
    return GradientReport(not texts, tuple(row for row, _ in worst_of), "\n".join(texts))


def _cotangents(value: Array, lengths: list[int], rng: np.random.Generator) -> Array:
    """(K, outputs): dense ones, multiples of the first, and some that hear few outputs. No entry heard is near 0."""
    size = len(value)
    dense = rng.choice([-1, 1], (2, size)) * rng.uniform(0.5, 1.5, (2, size))
    levels = np.floor(np.log2(np.maximum(np.abs(value), 1e-300)) / 10)
    heard = [levels == level for level in np.unique(levels)[:8]] if np.ptp(levels) else []
    heard += [np.repeat(np.arange(len(lengths)), lengths) == i for i in range(len(lengths)) if len(lengths) > 1]
    single = range(size) if size <= 16 else rng.choice(size, 4, replace=False)
    heard += [np.arange(size) == output for output in single if size > 1]
    return np.concatenate([dense, np.outer(MULTIPLES, dense[0]), np.reshape(heard, (-1, size)) * dense[0]])


# Finite differences


@dataclass
class Point:
    """A function at a point, and its pullback's answers there.

    evaluate: (leaves) → the value, flat, in float64; NaN where the function is not defined.
    leaves: the arrays. value: (outputs,). cotangents: (K, outputs). gradients: for each leaf, (K, entries).
    rounding: the relative rounding error of the value; coarse: why it is not that of float64, or "". wobble: for each
    leaf, what a rounding error of the arguments changes in its gradient. eps: a fixed step or None.
    rng: draws the directions."""

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
    both sides differ, and the pullback's is between), "edge" (f is not finite on both sides), or ""."""

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
        certain = SAFETY * np.maximum(self.resolution, self.rounding)
        return np.asarray(np.abs(self.error) > np.maximum(self.tolerance * self.scale, certain))

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
    Returns "right", "wrong", "kink", "edge" or "cannot tell", the worst slopes, relative resolution, and steps."""
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
        order, quota = np.argsort(largest), int(size == 1) if many else min(size, N_ENTRIES)
        alone = [members[0] for members in groups if len(members) == 1 and not many]
        picked = rng.choice(size, quota, replace=False)
        entries = np.unique(np.r_[order[:quota:4], order[size - quota :: 4], picked, alone]).astype(int)
    for entry in entries:
        yield Direction(index_of(int(entry), array.shape), np.array([entry]), sizes[entry : entry + 1])


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

    start: the first step. effort: 0 for no other steps, 2 to look for others also where little is resolved."""
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
    name = f"{index_of(int(part.indices[0]), point.leaves[leaf].shape)}, found along {worst.direction.name}"
    single = Direction(name, part.indices, np.abs(part.sizes))
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
    shifts = [(axis, i) for axis in axes for i in (-1, 1)]
    guesses += [(np.roll(array, i, axis), f"an index shifted by {-i} along axis {axis}?") for axis, i in shifts]
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


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two arrays that can be written to have an entry in common."""
    if not all(isinstance(array, np.ndarray) and array.flags.writeable for array in (a, b)):
        return False
    try:
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def from_torch(f: Callable[..., Any]) -> Callable[..., tuple[Any, Pullback]]:
    """A function of PyTorch tensors, or trees of them, as a function for `gradcheck`.

    `gradcheck(from_torch(f), x, w)` gives f float64 tensors. Raises ImportError if PyTorch has not been imported."""
    if (torch := sys.modules.get("torch")) is None:
        raise ImportError("from_torch needs PyTorch, which has not been imported: import torch first")

    def wrapped(*arguments: Any) -> tuple[Any, Pullback]:
        tensors = [torch.tensor(x) if isinstance(x, np.ndarray | np.generic) else x for _, x in flatten(arguments)]
        inputs = [x.requires_grad_() for x in tensors if torch.is_tensor(x) and x.is_floating_point()]
        value = f(*unflatten(arguments, iter(tensors)))
        outputs = [output for _, output in flatten(value)]

        def vjp(dvalue: Any) -> Any:
            zero = (0 * sum(x.sum() for x in inputs), torch.tensor(1.0).double())  # if no output depends on an input
            pairs = [(y, torch.tensor(dy)) for y, (_, dy) in zip(outputs, flatten(dvalue), strict=True)]
            ys, dys = zip(*[pair for pair in pairs if getattr(pair[0], "requires_grad", False)], zero, strict=True)
            grads = torch.autograd.grad(ys, inputs, dys, retain_graph=True, allow_unused=True)
            of_input = {id(x): dx.numpy().copy() for x, dx in zip(inputs, grads, strict=True) if dx is not None}
            return unflatten(arguments, (of_input.get(id(x)) for x in tensors))

        return unflatten(value, (y.detach().numpy().copy() if torch.is_tensor(y) else y for y in outputs)), vjp

    return wrapped
