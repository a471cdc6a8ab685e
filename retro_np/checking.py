"""The gradient checker: it compares a pullback with finite differences, and watches what f and the pullback touch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from retro_np.differences import MULTIPLES, TOLERANCE, Point, check_leaf, likely_mistake
from retro_np.errors import GradientError, GradientFormError, GradientReport, GradientRow
from retro_np.leaves import LeafFunction, flat_outputs, from_torch, kind_of, outputs_of, share_memory
from retro_np.tree import Array

__all__ = ["GradientError", "GradientFormError", "GradientReport", "GradientRow", "from_torch", "gradcheck"]
MIN_RESOLUTION = 1e-3  # relative; needed to say anything, unless the user sets a tolerance, which is then needed
VERDICTS = ("wrong", "cannot tell", "right", "frozen", "skipped")  # from worst to best


def gradcheck(
    f: Callable[..., Any],
    *arguments: Any,
    raise_exception: bool = True,
    frozen: int | str | Collection[int | str] = (),
    eps: float | None = None,
    tolerance: float | Sequence[float] | Mapping[int | str, float] | None = None,
    seed: int = 0,
) -> GradientReport:
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
    To check the second order, check the pullback as a function of the argument and the cotangent:

        def tanh_pullback(x, dy):
            y = np.tanh(x)
            slope = 1 - y * y
            return dy * slope, lambda d: (-2 * y * slope * dy * d, slope * d)

        gradcheck(tanh_pullback, x, dy)

    Returns a GradientReport. Raises GradientError (an AssertionError, with `.report`) if a gradient is wrong or if the
    differences cannot tell, and GradientFormError, which is also a ValueError and a TypeError, if a value or gradient
    has the wrong form; with raise_exception=False it returns the report instead. Always raises TypeError if an argument
    is complex or f does not return a value and a pullback, and ValueError if nothing can be checked.
    """
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

    Returns the point, and the pullback's answer.
    """
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

    def require_unshared(gradients: list[Any]) -> None:
        names = [*(f"the gradient of {label}" for label in labels), *labels]
        for (label, a), (other, b) in combinations(zip(names, [*gradients, *leaves], strict=True), 2):
            if share_memory(a, b):
                raise GradientError(f"{label} shares its buffer with {other}: return a copy")

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
    require_unshared(pull(np.ones(len(flat))))
    for n, gradient, leaf in zip(function.numbers, raw, leaves, strict=True):
        label, position = function.label(n), function.paths[n][0]
        if kind_of(gradient) == "f" and np.asarray(gradient).itemsize < 8 and not low:
            raise GradientError(
                f"{label}: the gradient is {gradient.dtype}, although the argument is float64", position
            )
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
