"""Clipping of gradients whose squares their dtype cannot hold. Ground truth: norms in exact or extended arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

from retro_np.optim import clip_by_global_norm

TYPES = [np.float32, np.float64]
SIZES = {
    "near the largest": lambda info: float(info.max) / 8,
    "with squares above the largest": lambda info: 3 * math.sqrt(info.max),
    "with squares below the smallest": lambda info: math.sqrt(info.tiny) / 9,
    "near the smallest": lambda info: 5 * float(info.tiny),
}


def exact_norm(arrays, unit):
    """The norm of all entries, as a multiple of `unit`."""
    return math.sqrt(sum((Fraction(float(x)) / Fraction(unit)) ** 2 for array in arrays for x in array.flat))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.5, 1e-3, 2.0])
def test_gradients_of_any_size_are_scaled_to_the_limit_in_their_direction(dtype, size, share):
    unit = SIZES[size](np.finfo(dtype))
    directions = [np.array([[3.0, -2.0], [1.0, 0.5]]), np.array([1.0, -4.0, 0.0])]
    grads = [(direction * unit).astype(dtype) for direction in directions]
    before, limit = exact_norm(grads, unit), share * 5.0 * unit
    tree = {"a": grads[0].copy(), "b": [grads[1].copy(), None]}
    with np.errstate(all="raise"):
        norm = clip_by_global_norm(tree, limit)
    assert norm == pytest.approx(before * unit, rel=1e-6, abs=0)
    scale = min(1.0, limit / norm)
    for grad, clipped in zip(grads, (tree["a"], tree["b"][0]), strict=True):
        np.testing.assert_allclose(clipped.astype(np.float64), grad.astype(np.float64) * scale, rtol=1e-6, atol=3e-45)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_gradients_are_scaled_to_a_norm_of_1(dtype):
    grads = {"a": np.full(7, np.finfo(dtype).max), "b": np.zeros(3, dtype)}
    clip_by_global_norm(grads, 1.0)
    assert np.linalg.norm(grads["a"]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("other", [1.0, 1e30])
def test_with_an_entry_that_is_not_finite_the_norm_is_not_and_nothing_is_scaled(odd, other):
    grads = {"a": np.array([odd, other], np.float32), "b": np.full(3, other, np.float32)}
    before = {name: grad.copy() for name, grad in grads.items()}
    assert not math.isfinite(clip_by_global_norm(grads, 0.5))
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, before[name])


def test_no_gradient_at_all_and_only_zeros_have_norm_0():
    zeros = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((0, 3)), "c": None}
    assert clip_by_global_norm({"a": None}, 1.0) == clip_by_global_norm(zeros, 1.0) == 0
    assert not zeros["a"].any()
