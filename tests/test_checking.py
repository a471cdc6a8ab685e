"""Ground truth: pullbacks that are known to be correct or wrong."""

import numpy as np
import pytest

from retro_np import gradcheck
from retro_np.checking import GradientError
from retro_np.nn.checks import checks
from retro_np.nn.operators import linear, rms_norm

RNG = np.random.default_rng(0)


# The long checks are slow. The quick tests compare the models of table 13 with autograd.
CHECKS = [pytest.param(check, id=check.name, marks=[pytest.mark.slow] if check.long else []) for check in checks()]


@pytest.mark.parametrize("check", CHECKS)
def test_every_operator_agrees_with_finite_differences(check):
    assert gradcheck(check.f, *check.arrays) < 1e-6


def squared_with_error(index, error):
    def f(x):
        def vjp(dy):
            dx = 2 * x * dy
            dx[index] += error
            return dx

        return x * x, vjp

    return f


def test_one_wrong_entry_is_named_with_both_values():
    x = RNG.standard_normal((3, 4))
    with pytest.raises(GradientError, match=r"argument 0, index \(1, 2\): the pullback says .*, finite differences"):
        gradcheck(squared_with_error((1, 2), 1e-3), x)


def test_random_directions_find_a_wrong_entry_of_a_large_array():
    with pytest.raises(GradientError, match="random direction"):
        gradcheck(squared_with_error((123, 4), 1.0), RNG.standard_normal((200, 50)))


def test_an_error_names_the_argument_whose_gradient_is_wrong():
    def f(x, gain):
        y, vjp = rms_norm(x, gain)
        return y, lambda dy: (vjp(dy)[0], 2 * vjp(dy)[1])

    with pytest.raises(GradientError, match="argument 1"):
        gradcheck(f, RNG.standard_normal((2, 5)), RNG.standard_normal(5))


def test_a_nan_gradient_fails():
    with pytest.raises(GradientError):
        gradcheck(lambda x: (x, lambda dy: dy * np.nan), RNG.standard_normal(3))


def test_arguments_may_be_trees_and_frozen_leaves_are_not_checked():
    tree = {"w": RNG.standard_normal((4, 3)), "frozen": [RNG.standard_normal(3)]}
    x = RNG.standard_normal((2, 4))

    def f(tree):
        y, vjp = linear(x, tree["w"])
        return y + tree["frozen"][0], lambda dy: {"w": vjp(dy)[1], "frozen": [None]}

    assert gradcheck(f, tree) < 1e-8


def test_one_argument_may_have_a_bare_gradient_and_the_value_may_be_a_scalar():
    assert gradcheck(lambda x: (np.sum(x**3), lambda dy: 3 * x**2 * dy), RNG.standard_normal(5)) < 1e-8


def test_float32_arguments_are_checked_in_float64_and_do_not_change():
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    original = x.copy()
    assert gradcheck(lambda x: (x**2, lambda dy: (2 * x * dy,)), x) < 1e-8
    assert x.dtype == np.float32
    assert np.array_equal(x, original)


def test_arguments_and_gradients_that_cannot_be_checked_are_refused():
    with pytest.raises(TypeError, match="int64"):
        gradcheck(lambda x: (x, lambda dy: dy), np.arange(3))
    with pytest.raises(ValueError, match="2 gradients for 1"):
        gradcheck(lambda x: (x, lambda dy: (dy, dy)), np.ones(3))
    with pytest.raises(ValueError, match=r"the gradient has shape \(2,\), but the argument \(3,\)"):
        gradcheck(lambda x: (x, lambda dy: (dy[:2],)), np.ones(3))


def test_a_pullback_that_writes_into_its_cotangent_is_judged_by_what_it_returns():
    def wrong(x):
        def vjp(dy):
            dy *= 3
            return (dy,)

        return x.copy(), vjp

    with pytest.raises(GradientError):
        gradcheck(wrong, np.ones(4))


def test_a_pullback_that_returns_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing was checked"):
        gradcheck(lambda x: (np.sin(x), lambda dy: None), np.ones(3))


def test_a_completely_frozen_tree_is_not_checked():
    tree, y = {"a": np.ones(3)}, np.ones(3)
    gradcheck(lambda p, y: ((p["a"] * y).sum(), lambda d: (None, d * p["a"])), tree, y)
