"""Ground truth: pullbacks that are known to be right or wrong."""

import numpy as np
import pytest

from retro_np import gradcheck
from retro_np.checking import GradientError
from retro_np.nn.checks import checks
from retro_np.nn.operators import linear, rms_norm

RNG = np.random.default_rng(0)


def is_long(check):
    """Whole models, one for each row of table 13; the quick tests hold such models against autograd."""
    return check.source == "table 13" and check.name.startswith("RETRO")


ALL = [pytest.param(check, id=check.name, marks=[pytest.mark.slow] if is_long(check) else []) for check in checks()]


@pytest.mark.parametrize("check", ALL)
def test_every_operator_agrees_with_finite_differences(check):
    assert gradcheck(check.f, *check.arrays) < 1e-6


def wrong_at(index, by):
    def f(x):
        def vjp(dy):
            dx = 2 * x * dy
            dx[index] += by
            return dx

        return x * x, vjp

    return f


def test_one_wrong_entry_is_named_with_both_values():
    x = RNG.standard_normal((3, 4))
    with pytest.raises(GradientError, match=r"argument 0, index \(1, 2\): the pullback says .*, finite differences"):
        gradcheck(wrong_at((1, 2), 1e-3), x)


def test_a_wrong_entry_of_a_large_array_is_found_by_random_directions():
    with pytest.raises(GradientError, match="random direction"):
        gradcheck(wrong_at((123, 4), 1.0), RNG.standard_normal((200, 50)))


def test_a_forgotten_factor_is_found_in_the_argument_that_lacks_it():
    def f(x, gain):
        y, vjp = rms_norm(x, gain)
        return y, lambda dy: (vjp(dy)[0], 2 * vjp(dy)[1])

    with pytest.raises(GradientError, match="argument 1"):
        gradcheck(f, RNG.standard_normal((2, 5)), RNG.standard_normal(5))


def test_a_gradient_that_is_not_a_number_fails():
    with pytest.raises(GradientError):
        gradcheck(lambda x: (x, lambda dy: dy * np.nan), RNG.standard_normal(3))


def test_trees_are_arguments_and_frozen_leaves_are_passed_over():
    tree = {"w": RNG.standard_normal((4, 3)), "frozen": [RNG.standard_normal(3)]}
    x = RNG.standard_normal((2, 4))

    def f(tree):
        y, vjp = linear(x, tree["w"])
        return y + tree["frozen"][0], lambda dy: {"w": vjp(dy)[1], "frozen": [None]}

    assert gradcheck(f, tree) < 1e-8


def test_a_bare_gradient_will_do_for_one_argument_and_a_scalar_for_a_value():
    assert gradcheck(lambda x: (np.sum(x**3), lambda dy: 3 * x**2 * dy), RNG.standard_normal(5)) < 1e-8


def test_float32_arguments_are_checked_in_float64_and_left_as_they_are():
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    before = x.copy()
    assert gradcheck(lambda x: (x**2, lambda dy: (2 * x * dy,)), x) < 1e-8
    assert x.dtype == np.float32
    assert np.array_equal(x, before)


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(TypeError, match="int64"):
        gradcheck(lambda x: (x, lambda dy: dy), np.arange(3))
    with pytest.raises(ValueError, match="2 gradients for 1"):
        gradcheck(lambda x: (x, lambda dy: (dy, dy)), np.ones(3))
    with pytest.raises(ValueError, match=r"\(2,\) where the argument is \(3,\)"):
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


def test_a_tree_that_is_frozen_as_a_whole_is_passed_over():
    tree, y = {"a": np.ones(3)}, np.ones(3)
    gradcheck(lambda p, y: ((p["a"] * y).sum(), lambda d: (None, d * p["a"])), tree, y)
