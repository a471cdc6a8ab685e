"""Finite differences and the checker's verdicts. Ground truth: derivatives in closed form, and planted mistakes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY

from retro_np import gradcheck
from retro_np.checking import GradientError

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2))
# Each function with its derivative; the arguments are drawn between 0.5 and 2.
FUNCTIONS = {
    "sin": (np.sin, np.cos),
    "exp": (np.exp, np.exp),
    "log": (np.log, lambda x: 1 / x),
    "square": (np.square, lambda x: 2 * x),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
    "reciprocal": (lambda x: 1 / x, lambda x: -1 / x**2),
}


def sine(edit=lambda dx: dx):
    """sin(x) with an edited gradient."""
    return lambda x: (np.sin(x), lambda dy: edit(np.cos(x) * dy))


def product(x, w, factor=1):
    """x @ w with a gradient of w that is right up to a factor."""
    return x @ w, lambda dy: (dy @ w.T, factor * x.T @ dy)


def biased(db=lambda dy: dy.sum(axis=0)):
    """x + b with a given gradient of b."""
    return lambda x, b: (x + b, lambda dy: (dy.copy(), db(dy)))


def verdict(f, *arguments, **options):
    """The verdict about the first argument."""
    return gradcheck(f, *arguments, raise_exception=False, **options).rows[0].verdict


@st.composite
def shifted_functions(draw):
    """f with f(1) = offset + size · g(x / scale), whose value is rounded relative to the offset; its argument; a seed.

    f(factor) has a gradient that is right up to that factor.
    """
    g, derivative = FUNCTIONS[draw(st.sampled_from(sorted(FUNCTIONS)))]
    scale, size = (10.0 ** draw(st.integers(-12, 12)) for _ in range(2))
    offset = size * draw(st.sampled_from([0, 1, -1])) * 10.0 ** draw(st.integers(0, 12))
    seed = draw(st.integers(0, 99))
    x = scale * np.random.default_rng(seed).uniform(0.5, 2, draw(st.sampled_from([(), (1,), (4,), (2, 3)])))

    def f(factor):
        return lambda x: (offset + size * g(x / scale), lambda dy: factor * dy * size / scale * derivative(x / scale))

    return f, x, seed


@MANY
@given(shifted_functions())
def test_the_error_of_the_differences_is_within_their_resolution(function):
    f, x, seed = function
    # With a tolerance of 0 an error is only allowed for by the resolution.
    assert verdict(f(1), x, tolerance=0, seed=seed) != "wrong"


@MANY
@given(shifted_functions())
def test_a_correct_gradient_of_a_rounded_value_is_never_called_wrong(function):
    f, x, seed = function
    assert verdict(f(1), x, seed=seed) != "wrong"


@MANY
@given(shifted_functions(), st.sampled_from([0.99, 1.01]))
def test_an_error_of_a_hundredth_is_found_wherever_the_correct_gradient_passes(function, factor):
    f, x, seed = function
    if verdict(f(1), x, seed=seed) == "right":
        assert verdict(f(factor), x, seed=seed) != "right"


@pytest.mark.parametrize(
    ("g", "derivative", "scale"), [(np.sin, np.cos, 1e12), (np.exp, np.exp, 1e-12), (np.log, np.reciprocal, 1e-300)]
)
def test_an_extreme_argument_is_judged(g, derivative, scale):
    x = scale * RNG.uniform(0.5, 2, 5)
    assert gradcheck(lambda x: (g(x), lambda dy: dy * derivative(x)), x)
    assert verdict(lambda x: (g(x), lambda dy: 1.01 * dy * derivative(x)), x) == "wrong"


@MANY
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=5), st.integers(0, 99))
def test_no_step_is_lost_in_the_rounding_of_its_argument(exponents, seed):
    x, seen = 10.0 ** np.array(exponents) * np.random.default_rng(seed).choice([-1, 1], len(exponents)), []

    def f(x):
        seen.append(x.copy())
        return 2 * x, lambda dy: 2 * dy

    gradcheck(f, x, seed=seed)
    # Two calls are there to compare their values.
    assert sum(np.array_equal(moved, x) for moved in seen) == 2


def test_a_fixed_step_that_is_lost_leaves_the_check_undecided():
    assert verdict(lambda x: (2 * x, lambda dy: 3 * dy), 1e12 * X, eps=1e-6) == "cannot tell"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("frequency", [1e2, 1e4, 1e5, 1e6, 1e8])
def test_steps_beyond_a_period_are_not_believed(frequency, seed):
    def oscillation(x, factor):
        return np.sin(frequency * x), lambda dy: factor * dy * frequency * np.cos(frequency * x)

    assert verdict(lambda x: oscillation(x, 1), X, seed=seed) != "wrong"
    # Long steps find no slope, so that they would support a gradient of 0.
    assert verdict(lambda x: oscillation(x, 0), X, seed=seed) != "right"


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("factor", [1, 2])
def test_the_same_seed_gives_the_same_report(seed, factor):
    f, large = (lambda x, w: product(x, w, factor)), RNG.standard_normal((4, 300))
    reports = [gradcheck(f, X, large, raise_exception=False, seed=seed) for _ in range(2)]
    assert reports[0] == reports[1]


def only_float32(x):
    assert x.dtype == np.float32
    return sine()(x)


def sine_in_float32(x):
    return np.sin(x.astype(np.float32)), lambda dy: dy * np.cos(x)


@pytest.mark.parametrize(
    ("f", "reason"), [(only_float32, "f takes only float32"), (sine_in_float32, "the value is float32")]
)
def test_a_function_in_float32_cannot_be_judged_without_a_tolerance(f, reason):
    assert verdict(f, X) == "cannot tell"
    with pytest.raises(GradientError, match=f"cannot tell whether this is right.*{reason}.*set tolerance=1e-3"):
        gradcheck(f, X)


@pytest.mark.parametrize("f", [only_float32, sine_in_float32])
def test_a_function_in_float32_passes_with_a_tolerance_of_its_precision(f):
    assert gradcheck(f, X, tolerance=1e-3)


@pytest.mark.parametrize("f", [only_float32, sine_in_float32])
def test_a_gradient_is_wrong_in_float32_if_it_is_off_by_more_than_the_tolerance(f):
    def wrong(x):
        y, vjp = f(x)
        return y, lambda dy: 1.01 * vjp(dy)

    assert verdict(wrong, X, tolerance=1e-3) == "wrong"


def relu(slope_at_0):
    return lambda x: (np.maximum(x, 0), lambda dy: dy * np.where(x == 0, slope_at_0, x > 0))


@pytest.mark.parametrize("slope", [0, 0.3, 1])
def test_a_kink_cannot_be_judged(slope):
    sentence = r"index \(0,\): cannot tell whether this is right.*a kink, .*the slopes on both sides differ: move the"
    assert verdict(relu(slope), np.array([0.0, 1.0])) == "cannot tell"
    with pytest.raises(GradientError, match=sentence):
        gradcheck(relu(slope), np.array([0.0, 1.0]))


KINKS = [np.zeros(3), np.array([0.0, 0, 1]), np.zeros((4, 5)), np.append(np.zeros(600), 1)]


@pytest.mark.parametrize("slope", [-1, 2])
@pytest.mark.parametrize("x", [np.array([0.0, 1]), *KINKS], ids=np.shape)
def test_a_gradient_outside_the_slopes_on_both_sides_of_a_kink_is_wrong(x, slope):
    assert verdict(relu(slope), x) == "wrong"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("x", KINKS, ids=np.shape)
def test_several_kinks_at_once_are_not_called_wrong(x, seed):
    assert verdict(relu(0), x, seed=seed) == "cannot tell"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("zero", ["x", "w"])
def test_a_layer_of_zeros_is_not_called_wrong(zero, seed):
    def f(x, w):
        y, pullback = product(x, w)
        return np.maximum(y, 0), lambda dy: pullback(dy * (y > 0))

    x, w = (0 * X, W) if zero == "x" else (X, 0 * W)
    report = gradcheck(f, x, w, raise_exception=False, seed=seed)
    assert "wrong" not in [row.verdict for row in report.rows]
    assert not report


def largest(factor):
    """The largest entry of each row; the gradient of the last row is right up to a factor."""

    def f(x):
        place = np.arange(x.shape[1]) == x.argmax(axis=1, keepdims=True)
        scale = np.append(np.ones(len(x) - 1), factor)
        return x.max(axis=1), lambda dy: place * (scale * dy)[:, None]

    return f


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tied", [2, 3])
def test_a_tie_cannot_be_judged_but_does_not_hide_another_mistake(tied, seed):
    x = np.array([[3.0, 3, 3 if tied == 3 else 1], [0, 4, 1]])
    assert verdict(largest(1), x, seed=seed) == "cannot tell"
    assert verdict(largest(1.5), x, seed=seed) == "wrong"


def test_an_argument_at_the_edge_of_the_domain_cannot_be_judged():
    def f(x):
        return x**1.5, lambda dy: 1.5 * dy * np.sqrt(x)

    with pytest.raises(GradientError, match=r"cannot tell .* f is not finite on both sides of it: move the argument"):
        gradcheck(f, np.array([0.0, 1, 2]))


@pytest.mark.parametrize(
    ("f", "x", "advice"),
    [
        (sine(), 1e17 * X, r"divide the argument by 1e\+17"),
        (lambda x: (x + 1e20, lambda dy: dy.copy()), X, r"subtract about 1e\+20 from the value"),
        (lambda x: (np.sin(np.float32(x)).astype(float), lambda dy: dy * np.cos(x)), X, "computed in float32"),
    ],
    ids=["argument", "value", "float32"],
)
def test_a_change_that_is_lost_in_rounding_cannot_be_judged(f, x, advice):
    with pytest.raises(GradientError, match=f"cannot tell whether this is right.* of the gradient, .*{advice}"):
        gradcheck(f, x)


# Messages


def where_first(edit):
    """The first row of a gradient edited."""
    return lambda dx: np.concatenate([edit(dx[:1]), dx[1:]])


def residual(x):
    return x + np.sin(x), lambda dy: dy * np.cos(x)


def leaky(negative, positive):
    return lambda x: (np.where(x > 0, x, 0.1 * x), lambda dy: dy * np.where(x > 0, positive, negative))


MISTAKES = [
    (sine(np.negative), (X,), r"wrong sign\?"),
    (sine(lambda dx: 2 * dx), (X,), r"2 times too large: a factor\?"),
    (sine(lambda dx: dx / 2), (X,), r"too small by a factor of 2: a factor\?"),
    (lambda x: (np.mean(x * x), lambda dy: 2 * dy * x), (X,), "12 times too large: a sum for a mean, or the reverse"),
    (lambda x, w: product(x, w, 1 / 3), (X, W), "too small by a factor of 3: a sum for a mean"),
    (lambda w: (X @ w, lambda dy: (X.T @ dy).T), (np.outer(X[0], X[1]),), r"transposed\?"),
    (biased(lambda dy: dy.copy()), (X, X[0]), "sum it over axis 0"),
    (lambda x: (np.roll(x, 1), lambda dy: np.roll(dy, -2)), (X[0],), "an index shifted by -1 along axis 0"),
    (lambda x: (x[:, ::-1].copy(), lambda dy: dy.copy()), (X,), "reversed along axis 1"),
    (lambda a, b: (a * b, lambda dy: (dy * a, dy * b)), (X, X + 1), "swapped with the gradient of another argument"),
    (residual, (X,), "is one branch missing, a residual connection perhaps"),
    (leaky(0, 1), (X,), "wrong only where the argument is negative: is one branch missing"),
    (leaky(0.1, 2), (X,), "wrong only where the argument is positive: is one branch missing"),
    (sine(where_first(lambda dx: 0 * dx)), (X,), "wrong only at index 0 of axis 0"),
    (sine(lambda dx: 0 * dx), (X,), "the gradient is zero, although the argument matters"),
    (biased(lambda dy: None), (X, X[0]), "None was returned"),
    (sine(lambda dx: dx.astype(np.float32)), (X,), "the gradient is float32, although"),
    (sine(lambda dx: dx.astype(np.float32).astype(float)), (X,), "is something computed in float32 on the way"),
    (sine(lambda dx: dx.clip(-10, 10)), (X,), "the pullback is not linear in its cotangent"),
    (lambda x: (np.sin(x), lambda dy: np.cos(x)), (X,), "the pullback is not linear in its cotangent"),
]  # fmt: skip


@pytest.mark.parametrize(("f", "arguments", "sentence"), MISTAKES)
def test_the_message_names_the_likely_mistake(f, arguments, sentence):
    with pytest.raises(GradientError, match=sentence):
        gradcheck(f, *arguments)


RIGHT = [
    (lambda x: (-np.sin(x), lambda dy: -dy * np.cos(x)), (X,)),
    (lambda x: (np.mean(x * x), lambda dy: dy * x / 6), (X,)),
    (lambda w: (X @ w, lambda dy: X.T @ dy), (np.outer(X[0], X[1]),)),
    (biased(), (X, X[0])),
    (lambda x: (np.roll(x, 1), lambda dy: np.roll(dy, -1)), (X[0],)),
    (lambda x: (x[:, ::-1].copy(), lambda dy: dy[:, ::-1].copy()), (X,)),
    (lambda a, b: (a * b, lambda dy: (dy * b, dy * a)), (X, X + 1)),
    (lambda x: (x + np.sin(x), lambda dy: dy + dy * np.cos(x)), (X,)),
    (leaky(0.1, 1), (X,)),
    (lambda x: (np.sin(x[1:]), lambda dy: np.concatenate([0 * x[:1], dy * np.cos(x[1:])])), (X,)),
    (lambda x: (np.full(3, 2.0), lambda dy: 0 * x), (X,)),
]


@pytest.mark.parametrize(("f", "arguments"), RIGHT)
def test_a_right_function_beside_these_mistakes_passes(f, arguments):
    assert gradcheck(f, *arguments)


@pytest.mark.parametrize(
    ("power", "x"),
    [(-1, [1e4, 1, 1e-4]), (3, [1e5, 1, 1e-5]), (2, [1e8, 1, 1e-8])],
)
def test_a_wrong_small_gradient_is_not_excused_by_the_rounding_of_a_large_one(power, x):
    signs = np.sign(np.abs(power * np.array(x) ** (power - 1.0)) - 1.0001)  # wrong where the gradient is small
    report = gradcheck(
        lambda x: (x**power, lambda dy: dy * power * x ** (power - 1.0) * signs), np.array(x), raise_exception=False
    )
    assert report.rows[0].verdict == "wrong"
    assert report.error > 1


def test_an_argument_that_is_not_finite_is_frozen_or_refused():
    def masked(x, mask):
        p = np.exp(x + mask)
        return p, lambda dy: (dy * p, dy * p)

    arguments = np.ones(3), np.array([0, -np.inf, 0])
    with pytest.raises(GradientError, match="argument 1: not finite, so it cannot be moved: name it in frozen="):
        gradcheck(masked, *arguments)
    assert gradcheck(masked, *arguments, frozen="mask")
