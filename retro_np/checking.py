"""The gradient checker: it compares a pullback with finite differences."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from retro_np.tree import Array, Pullback, map_tree, named_leaves

MAX_ENTRIES = 256  # Arrays with at most this many entries are checked entry by entry.
N_DIRECTIONS = 8  # Larger arrays are checked along this many random directions.


class GradientError(AssertionError):
    """A pullback disagrees with finite differences. The message names the argument, the entry and both values."""


def gradcheck(
    f: Callable[..., tuple[Any, Pullback]], *arrays: Any, eps: float = 1e-6, tolerance: float = 1e-6, seed: int = 0
) -> float:
    """Compare the pullback of f with central differences of step `eps` in float64. Returns the worst error.

    f(*arrays) -> (value, vjp), where the value is an array or a scalar and vjp(dvalue) returns a tuple with one
    gradient per argument. For a single argument it may return the gradient itself. An argument is an array or a tree
    (dicts and lists) of arrays. A gradient that is None (frozen) is not checked. A random cotangent, drawn with `seed`,
    reduces the value to one number. Arrays with at most 256 entries are checked entry by entry, larger ones along 8
    random directions.

    The error of an entry is |analytic − numeric|, divided by the largest entry of that array's gradient, or by 0.01 if
    all entries are smaller, because rounding then dominates the differences. Along a random direction of N entries,
    one wrong entry shows with about 1/√N of its error, so check a small case of your function too.
    Raises GradientError (an AssertionError) if the worst error, whose entry it names, is above `tolerance`, or if the
    value is not finite; TypeError if an argument is not floating-point; ValueError if a gradient does not have the form
    or shape of its argument, or if all gradients are None.
    """
    rng = np.random.default_rng(seed)
    arguments = [map_tree(_as_float64, argument) for argument in arrays]
    value, vjp = f(*arguments)
    if not np.all(np.isfinite(value)):
        raise GradientError("the value is not finite, so its differences cannot be taken")
    cotangent = rng.standard_normal(np.shape(value))
    grads = vjp(cotangent.copy() if np.ndim(value) else float(cotangent))  # The pullback may overwrite its cotangent.
    grads = grads if isinstance(grads, tuple) else (grads,)
    if len(grads) != len(arguments):
        raise ValueError(f"the pullback returned {len(grads)} gradients for {len(arguments)} arguments")

    def slope(leaf: Array, direction: Array) -> float:
        """The derivative of ⟨cotangent, f⟩ along a direction of one leaf, which is changed in place and restored."""
        original = leaf.copy()
        sides = []
        for sign in (1, -1):
            leaf[...] = original + sign * eps * direction
            sides.append(np.array(f(*arguments)[0], dtype=np.float64))
        leaf[...] = original
        return float(np.sum((sides[0] - sides[1]) * cotangent)) / (2 * eps)

    errors = []
    for position, (argument, grad) in enumerate(zip(arguments, grads, strict=True)):
        by_name = dict(named_leaves(grad))
        for name, leaf in named_leaves(argument):
            label = f"argument {position}" + (f", {name}" if name else "")
            if grad is None or (name in by_name and by_name[name] is None):
                continue
            if name not in by_name:
                raise ValueError(f"{label}: the pullback returned no gradient with that name")
            gradient = np.asarray(by_name[name], dtype=np.float64)
            if gradient.shape != leaf.shape:
                raise ValueError(f"{label}: the gradient has shape {gradient.shape}, but the argument {leaf.shape}")
            error, message = _worst_of(leaf, gradient, slope, rng)
            errors.append((error, f"{label}, {message}"))
    if not errors:
        raise ValueError("every gradient is None, so nothing was checked: return the gradients from the pullback")
    error, message = max(errors)
    if not error <= tolerance:
        raise GradientError(f"{message}; error {error:.3g} is above {tolerance:.3g}")
    return error


def _as_float64(name: str, array: Any) -> Array:
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        subject = f"the leaf {name} is" if name else "an argument is"
        raise TypeError(f"{subject} {array.dtype}, not floating-point: bind it in f, for example with a lambda")
    return np.array(array, dtype=np.float64)


def _worst_of(leaf: Array, gradient: Array, slope: Callable[..., float], rng: np.random.Generator) -> tuple[float, str]:
    """The largest error in one leaf, and a message that describes it."""
    errors = [(0.0, "")]
    scale = max(0.01, float(np.max(np.abs(gradient), initial=0)))
    for position, direction in _directions(leaf.shape, rng):
        numeric, analytic = slope(leaf, direction), float(np.sum(gradient * direction))
        error = abs(analytic - numeric) / scale
        message = f"{position}: the pullback says {analytic:.9g}, finite differences {numeric:.9g}"
        errors.append((np.inf if np.isnan(error) else error, message))
    return max(errors)


def _directions(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    size = int(np.prod(shape))
    if size <= MAX_ENTRIES:
        for index in np.ndindex(*shape):
            direction = np.zeros(shape)
            direction[index] = 1
            yield f"index {index}", direction
    else:
        for number in range(N_DIRECTIONS):
            direction = rng.standard_normal(shape)
            yield f"random direction {number}", direction / np.linalg.norm(direction)
