"""Finite differences against a pullback: for the project's own tests, and for yours."""

from collections.abc import Callable

import numpy as np

from retro_np.tree import leaves, map_tree

EVERY_ENTRY = 256  # arrays up to this size are checked entry by entry
DIRECTIONS = 8  # larger ones along so many random directions


class GradientError(AssertionError):
    """A pullback disagrees with finite differences; the message names argument, index and both values."""


def gradcheck(f: Callable, *arrays, eps: float = 1e-6, tolerance: float = 1e-6, seed: int = 0) -> float:
    """Check f's pullback against central differences in float64. Returns the worst error found.

    f(*arrays) -> (value, vjp), where vjp(dvalue) returns a tuple with one gradient for each array; for a single
    argument the bare gradient will do. An argument may be an array or a tree (dicts, lists) of arrays; a gradient
    that is None (frozen) is passed over. The value is an array or a scalar; a random cotangent makes one number of it.
    Arrays of at most 256 entries are checked entry by entry, larger ones along 8 random directions.

    The error of an entry is |analytic − numeric| over the largest entry of that argument's gradient, or over 0.01
    where all are smaller: below that, what differences can tell is lost in their rounding. Along a random direction
    of N entries a single wrong one shows as about 1/√N of its error: check a small case of your function too.
    Raises GradientError (an AssertionError) that names the worst entry if it exceeds `tolerance`, TypeError for
    arguments that are no floating-point arrays, ValueError where a gradient's form or shape is not its argument's, or
    where all are None.
    """
    rng = np.random.default_rng(seed)
    arguments = [map_tree(_as_float64, argument) for argument in arrays]
    value, vjp = f(*arguments)
    if not np.all(np.isfinite(value)):
        raise GradientError("the value itself is not finite, so that no difference can be taken")
    cotangent = rng.standard_normal(np.shape(value))
    grads = vjp(cotangent.copy() if np.ndim(value) else float(cotangent))  # a copy: a pullback may write into it
    if not isinstance(grads, tuple):
        grads = (grads,)
    if len(grads) != len(arguments):
        raise ValueError(f"the pullback returned {len(grads)} gradients for {len(arguments)} arguments")

    def slope(leaf, direction):
        """d⟨cotangent, f⟩ along a direction of one leaf, which is changed in place and restored."""
        kept = leaf.copy()
        sides = []
        for sign in (1, -1):
            leaf[...] = kept + sign * eps * direction
            sides.append(np.array(f(*arguments)[0], dtype=np.float64))
        leaf[...] = kept
        return float(np.sum((sides[0] - sides[1]) * cotangent)) / (2 * eps)

    worst, checked = (0.0, ""), 0
    for position, (argument, grad) in enumerate(zip(arguments, grads, strict=True)):
        found = dict(leaves(grad))
        for name, leaf in leaves(argument):
            label = f"argument {position}" + (f", {name}" if name else "")
            if grad is None or (name in found and found[name] is None):
                continue
            if name not in found:
                raise ValueError(f"{label}: the pullback returned no gradient of that name")
            checked += 1
            gradient = np.asarray(found[name], dtype=np.float64)
            if gradient.shape != leaf.shape:
                raise ValueError(f"{label}: the gradient is {gradient.shape} where the argument is {leaf.shape}")
            worst = max(worst, _worst_of(leaf, gradient, slope, label, rng), key=lambda pair: pair[0])
    if not checked:
        raise ValueError("every gradient is None, so that nothing was checked: does the pullback return what it makes?")
    error, message = worst
    if not error <= tolerance:
        raise GradientError(f"{message}; error {error:.3g} is above {tolerance:.3g}")
    return error


def _as_float64(name, array):
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        what = f"the leaf {name} is" if name else "an argument is"
        raise TypeError(f"{what} {array.dtype}: gradcheck differentiates floating-point arrays; bind the rest in f")
    return np.array(array, dtype=np.float64)


def _worst_of(leaf, gradient, slope, label, rng) -> tuple[float, str]:
    """The largest error in one leaf, and the sentence that says where."""
    worst = (0.0, "")
    scale = max(0.01, float(np.max(np.abs(gradient), initial=0)))
    for where, direction in _directions(leaf.shape, rng):
        numeric = slope(leaf, direction)
        analytic = float(np.sum(gradient * direction))
        error = abs(analytic - numeric) / scale
        if np.isnan(error):
            error = np.inf
        if error >= worst[0]:
            worst = (error, f"{label}, {where}: the pullback says {analytic:.9g}, finite differences {numeric:.9g}")
    return worst


def _directions(shape, rng):
    size = int(np.prod(shape))
    if size <= EVERY_ENTRY:
        for index in np.ndindex(*shape):
            direction = np.zeros(shape)
            direction[index] = 1
            yield f"index {index}", direction
    else:
        for number in range(DIRECTIONS):
            direction = rng.standard_normal(shape)
            yield f"random direction {number}", direction / np.linalg.norm(direction)
