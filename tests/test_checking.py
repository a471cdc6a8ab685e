"""The gradient checker. Ground truth: pullbacks that are known to be correct or wrong.

`test_planted_bugs.py` has many more wrong pullbacks; here each test is about one sentence of the documentation.
"""

import subprocess
import sys

import numpy as np
import pytest

from retro_np import gradcheck
from retro_np.checking import GradientError, GradientFormError, GradientReport, from_torch
from retro_np.nn.checks import checks
from retro_np.nn.operators import linear, rms_norm

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2))
ROWS = np.array([1, 2, 1])
# The long checks are slow. The quick tests compare the models of table 13 with autograd.
CHECKS = [pytest.param(check, id=check.name, marks=[pytest.mark.slow] if check.long else []) for check in checks()]


def sine(edit=lambda dx: dx):
    """sin(x) with an edited gradient."""
    return lambda x: (np.sin(x), lambda dy: edit(np.cos(x) * dy))


def first_entry(factor):
    """An edit of a gradient: its first entry, times a factor."""
    return lambda dx: dx * np.where(np.arange(dx.size).reshape(dx.shape) == 0, factor, 1)


def product(x, w):
    return x @ w, lambda dy: (dy @ w.T, x.T @ dy)


def wrong_product(factor):
    """x @ w with a gradient of w that is wrong by a factor."""
    return lambda x, w: (x @ w, lambda dy: (dy @ w.T, factor * x.T @ dy))


def gather(x, rows):
    def vjp(dy):
        dx = np.zeros_like(x)
        np.add.at(dx, rows, dy)
        return dx, None

    return x[rows], vjp


def biased(db=lambda dy: dy.sum(axis=0)):
    """x + b with a given gradient of b."""
    return lambda x, b: (x + b, lambda dy: (dy.copy(), db(dy)))


def failure(f, *arguments, **options):
    """The false report of a check that fails."""
    report = gradcheck(f, *arguments, raise_exception=False, **options)
    assert isinstance(report, GradientReport)
    assert not report
    return report


def verdicts(report):
    return [row.verdict for row in report.rows]


@pytest.mark.parametrize("check", CHECKS)
def test_every_operator_agrees_with_finite_differences(check):
    assert gradcheck(check.f, *check.arrays).error < 1e-6


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


def test_a_wrong_entry_of_a_large_array_is_named():
    def f(x):
        return x * x, lambda dy: 2 * x * dy * (np.arange(x.size).reshape(x.shape) != 123 * 50 + 4)

    assert "index (123, 4)" in failure(f, RNG.standard_normal((200, 50))).message


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

    assert gradcheck(f, tree, frozen="frozen.0").error < 1e-8


def test_one_argument_may_have_a_bare_gradient_and_the_value_may_be_a_scalar():
    assert gradcheck(lambda x: (np.sum(x**3), lambda dy: 3 * x**2 * dy), RNG.standard_normal(5)).error < 1e-8


def test_float32_arguments_are_checked_in_float64_and_do_not_change():
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    original = x.copy()
    assert gradcheck(lambda x: (x**2, lambda dy: (2 * x * dy,)), x).error < 1e-8
    assert x.dtype == np.float32
    assert np.array_equal(x, original)


def test_arguments_and_gradients_that_cannot_be_checked_are_refused():
    with pytest.raises(ValueError, match="nothing was checked, because no argument is floating-point: int64"):
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
    report = gradcheck(lambda p, y: ((p["a"] * y).sum(), lambda d: (None, d * p["a"])), tree, y, frozen="p")
    assert verdicts(report) == ["frozen", "right"]


# The report


def test_a_check_in_a_test_suite_is_one_line():
    assert gradcheck(product, X, W)


def test_a_report_is_true_even_if_the_error_is_exactly_0():
    report = gradcheck(lambda x: (x, lambda dy: dy), 2.0)
    assert report.error == 0
    assert report


def test_the_report_as_a_float_is_the_worst_error_of_all_rows():
    report = gradcheck(wrong_product(1 + 1e-4), X, W, tolerance=1e-3)
    assert float(report) == report.error == max(row.error for row in report.rows)
    np.testing.assert_allclose(report.error, 1e-4, rtol=1e-2)


def test_the_report_has_one_row_per_argument_with_its_name_in_the_signature():
    def f(p, power):
        return p["a"] * p["b"], lambda dy: ({"a": dy * p["b"], "b": dy * p["a"]}, None)

    rows = gradcheck(f, {"a": X, "b": 2 * X}, 3).rows
    assert [(row.argument, row.name, row.verdict) for row in rows] == [(0, "p", "right"), (1, "power", "skipped")]


def test_a_row_says_where_the_worst_error_is_which_steps_were_used_and_what_they_resolve():
    row = failure(sine(first_entry(0.5)), X).rows[0]
    assert row.where == "index (0, 0)"
    assert 0 < row.steps[0] < row.steps[1]
    assert 0 < row.resolution < 1e-9


def test_the_table_has_a_line_for_each_argument_below_its_heading():
    heading, first, second = str(failure(wrong_product(2), X, W)).splitlines()
    assert heading.split() == ["argument", "verdict", "error", "resolution", "steps", "where", "note"]
    assert first.startswith("0 x       right")
    assert second.startswith("1 w       wrong    5.0e-01")


def test_the_error_has_the_report_that_is_returned_without_an_exception():
    with pytest.raises(GradientError) as raised:
        gradcheck(wrong_product(2), X, W)
    assert raised.value.report == failure(wrong_product(2), X, W)


def test_the_message_of_the_report_is_the_text_of_the_error():
    with pytest.raises(GradientError) as raised:
        gradcheck(wrong_product(2), X, W)
    assert str(raised.value) == raised.value.report.message
    assert gradcheck(product, X, W).message == ""


def test_a_gradient_of_the_wrong_form_is_a_gradient_error_a_value_error_and_a_type_error():
    for kind in (GradientFormError, GradientError, AssertionError, ValueError, TypeError):
        with pytest.raises(kind, match="sum it over axis 0"):
            gradcheck(biased(lambda dy: dy.copy()), X, X[0])


def test_a_gradient_of_the_wrong_form_makes_a_false_report_too():
    report = failure(biased(lambda dy: dy.copy()), X, X[0])
    assert verdicts(report) == ["not checked", "wrong"]
    assert "sum it over axis 0" in report.rows[1].note


def test_the_rows_of_a_function_without_a_signature_have_no_names():
    class Function:
        __signature__ = "none"

        def __call__(self, x):
            return sine()(x)

    assert gradcheck(Function(), X).rows[0].name == ""


# Options


@pytest.mark.parametrize("frozen", [1, "b", (1,), ["b"], "argument 1"])
def test_none_is_accepted_for_a_frozen_argument(frozen):
    assert verdicts(gradcheck(biased(lambda dy: None), X, X[0], frozen=frozen)) == ["right", "frozen"]


@pytest.mark.parametrize("frozen", ["b", "p.b", "0.b", ("b", "x")])
def test_none_is_accepted_for_a_frozen_leaf(frozen):
    def f(p, x):
        return x @ p["w"] + p["b"], lambda dy: ({"w": x.T @ dy, "b": None}, dy @ p["w"].T)

    assert gradcheck(f, {"w": W, "b": W[0]}, X, frozen=frozen)


def test_none_for_an_argument_that_matters_and_is_not_frozen_is_wrong():
    with pytest.raises(GradientError, match="None was returned; name it in frozen= if it is not trained"):
        gradcheck(biased(lambda dy: None), X, X[0], frozen="x")


def test_none_for_an_argument_that_does_not_matter_passes():
    assert gradcheck(lambda x, unused: (np.sin(x), lambda dy: (dy * np.cos(x), None)), X, W)


def test_the_gradient_of_a_frozen_argument_is_checked_if_there_is_one():
    assert verdicts(failure(wrong_product(2), X, W, frozen="w")) == ["right", "wrong"]


@pytest.mark.parametrize("options", [{"frozen": "bias"}, {"frozen": 2}, {"tolerance": {"bias": 1e-3}}])
def test_an_option_for_an_argument_that_does_not_exist_is_a_value_error(options):
    with pytest.raises(ValueError, match="there is no argument, and no leaf of one, with the name"):
        gradcheck(biased(), X, X[0], **options)


def test_a_sequence_of_tolerances_has_one_for_each_argument():
    with pytest.raises(ValueError, match="there are 1 tolerances for 2 arguments"):
        gradcheck(product, X, W, tolerance=[1e-3])


@pytest.mark.parametrize("tolerance", [1e-3, [1e-9, 1e-3], (1e-9, 1e-3), {"w": 1e-3}, {1: 1e-3}])
def test_an_error_below_the_tolerance_of_its_argument_passes(tolerance):
    assert gradcheck(wrong_product(1 + 1e-4), X, W, tolerance=tolerance)


@pytest.mark.parametrize("tolerance", [None, 1e-5, [1e-3, 1e-5], {"w": 1e-5}, {"x": 1e-3}])
def test_an_error_above_the_tolerance_of_its_argument_is_wrong(tolerance):
    assert verdicts(failure(wrong_product(1 + 1e-4), X, W, tolerance=tolerance)) == ["right", "wrong"]


def test_a_tolerance_that_the_differences_cannot_reach_leaves_the_check_undecided():
    assert verdicts(failure(sine(), X, tolerance=1e-17)) == ["cannot tell"]


def test_eps_fixes_the_steps_of_single_entries():
    steps = set()

    def f(x):
        if np.count_nonzero(x - X) == 1:
            steps.add(float(np.abs(x - X).max()))
        return 2 * x, lambda dy: 2 * dy

    gradcheck(f, X, eps=2.0**-9)
    # Slopes are extrapolated from eps and a quarter of it.
    np.testing.assert_allclose(sorted(steps), [2.0**-11, 2.0**-9], rtol=1e-9)


def first_cotangent(seed):
    cotangents = []

    def f(x):
        return np.sin(x), lambda dy: cotangents.append(dy) or dy * np.cos(x)

    gradcheck(f, X, seed=seed)
    return cotangents[0]


def test_the_seed_decides_the_cotangents():
    assert np.array_equal(first_cotangent(3), first_cotangent(3))
    assert not np.array_equal(first_cotangent(3), first_cotangent(4))


def test_no_cotangent_is_what_a_user_draws_first_with_the_same_seed():
    for draw in ("standard_normal", "random"):
        assert not np.isclose(first_cotangent(0), getattr(np.random.default_rng(0), draw)(X.shape)).any()


# Arguments


@pytest.mark.parametrize("rows", [ROWS, ROWS.tolist(), np.array([True, False, True]), np.int64(1), 1, slice(0, 2)])
def test_integers_booleans_and_other_objects_are_skipped(rows):
    assert verdicts(gradcheck(gather, X, rows)) == ["right", "skipped"]


def test_the_report_says_which_type_was_skipped():
    assert gradcheck(gather, X, ROWS).rows[1].note == "int64"
    assert "1 rows    skipped" in str(gradcheck(gather, X, ROWS))


@pytest.mark.parametrize("form", [lambda dx, none: (dx,), lambda dx, none: dx, lambda dx, none: [dx, none]])
def test_the_gradients_of_integers_may_be_left_out(form):
    assert gradcheck(lambda x, rows: (x[rows], lambda dy: form(*gather(x, rows)[1](dy))), X, ROWS)


def test_only_integer_arguments_are_a_value_error():
    with pytest.raises(ValueError, match="no argument is floating-point: bool, int64"):
        gradcheck(lambda x, mask: (1.0 * x, lambda dy: (dy, None)), ROWS, ROWS > 1)


@pytest.mark.parametrize("x", [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5)])
def test_a_scalar_argument_is_checked(x):
    assert gradcheck(sine(), x)
    assert verdicts(failure(sine(lambda dx: 1.01 * dx), x)) == ["wrong"]


def test_a_scalar_stays_a_scalar_and_a_0_dimensional_array_an_array():
    seen = set()

    def f(x, y):
        seen.add((type(x), type(y)))
        return x * y, lambda dy: (dy * y, dy * x)

    assert gradcheck(f, 0.5, np.array(0.5))
    assert seen == {(np.float64, np.ndarray)}


def test_none_and_strings_are_arguments_that_are_skipped():
    def f(x, mask, mode):
        assert (mask, mode) == (None, "sum")
        return x.sum(), lambda dy: (dy + 0 * x,)

    assert verdicts(gradcheck(f, X, None, "sum")) == ["right", "skipped", "skipped"]


@pytest.mark.parametrize(
    ("form", "flag"), [(np.asfortranarray, "F_CONTIGUOUS"), (np.ascontiguousarray, "C_CONTIGUOUS")]
)
def test_f_sees_arrays_in_the_memory_order_of_the_data(form, flag):
    def f(x):
        assert x.flags[flag]
        return sine()(x)

    assert gradcheck(f, form(X))


def test_data_may_be_views_that_are_not_contiguous_and_read_only():
    x = np.broadcast_to(X, (2, 3, 4))[::-1, ::2, 1::2]
    assert not x.flags.writeable
    assert gradcheck(sine(), x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble, ">f8"])
def test_f_sees_float64_whatever_the_dtype_of_the_data(dtype):
    def f(x):
        assert x.dtype == np.float64
        return sine()(x)

    assert gradcheck(f, X.astype(dtype))


def test_a_complex_argument_is_refused():
    with pytest.raises(TypeError, match="an argument is complex: pass its real and imaginary parts as two arguments"):
        gradcheck(sine(), X + 1j)


# What f and its pullback return


def test_a_value_without_floating_point_output_is_refused():
    with pytest.raises(GradientFormError, match="the value has no floating-point output, so it has no gradient"):
        gradcheck(lambda x: (x.argmax(axis=0), lambda dy: 0 * x), X)


def test_a_complex_value_is_refused():
    with pytest.raises(GradientFormError, match=r"the value is complex128.*return real and imaginary parts as two"):
        gradcheck(lambda x: (np.fft.fft(x), lambda dy: np.fft.fft(dy).real), X)


def test_the_pullback_may_come_before_the_value():
    assert gradcheck(lambda x, w: product(x, w)[::-1], X, W)


def test_the_gradients_may_come_in_a_list():
    assert gradcheck(lambda x, w: (x @ w, lambda dy: [dy @ w.T, x.T @ dy]), X, W)


@pytest.mark.parametrize(
    ("result", "shown"),
    [(X, "ndarray"), (None, "NoneType"), ((X, X), "a tuple of 2"), ((X, X, np.sin), "a tuple of 3")],
)
def test_an_f_that_returns_something_else_is_a_type_error(result, shown):
    with pytest.raises(TypeError, match=rf"f must return \(value, pullback\), not {shown}"):
        gradcheck(lambda x: result, X)


@pytest.mark.parametrize("where", ["f", "pullback"])
def test_an_exception_of_the_first_call_propagates(where):
    def fail(*_):
        raise KeyError("mistake")

    with pytest.raises(KeyError, match="mistake"):
        gradcheck(fail if where == "f" else lambda x: (np.sin(x), fail), X)


# Contracts


def test_f_must_not_change_a_container():
    def f(p):
        return p.pop("a") * p["b"], lambda dy: {"a": dy * p["b"], "b": dy}

    with pytest.raises(GradientError, match="f changes a dict, list or dataclass among its arguments: work on a copy"):
        gradcheck(f, {"a": X, "b": X})


def test_the_arguments_are_those_of_before_even_if_f_overwrites_them():
    def f(x):
        x *= 2
        return x.copy(), lambda dy: 2 * dy

    x = X.copy()
    failure(f, x)
    assert np.array_equal(x, X)


def test_gradients_may_be_read_only_and_share_one_number():
    def f(x, y):
        return x.sum() + y.sum(), lambda dy: (np.broadcast_to(dy, x.shape),) * 2

    assert gradcheck(f, X, X + 1)


def test_the_gradient_may_be_the_cotangent_itself():
    assert gradcheck(lambda x: (x + 1, lambda dy: dy), X)


# Second order, other libraries


def tanh_pullback(second):
    def f(x, dy):
        y = np.tanh(x)
        slope = 1 - y * y
        return dy * slope, lambda d: (second * y * slope * dy * d, slope * d)

    return f


def test_the_second_order_is_checked_by_passing_the_pullback():
    assert gradcheck(tanh_pullback(-2), X, X + 1)
    assert verdicts(failure(tanh_pullback(2), X, X + 1)) == ["wrong", "right"]


def torch_double_of(name):
    """A function of two trees of tensors in PyTorch; the first has an integer tensor and one that is not used."""
    import torch

    return lambda p, x: {"y": torch.tanh(x @ p["w"][0])[p["rows"]], "total": getattr(torch, name)(x)}


@pytest.mark.oracle
def test_from_torch_takes_trees_with_integers_and_unused_tensors():
    p = {"w": [W], "rows": np.array([2, 0]), "unused": X}
    assert verdicts(gradcheck(from_torch(torch_double_of("sum")), p, X)) == ["right", "right"]


@pytest.mark.oracle
def test_from_torch_takes_tensors_and_leaves_them_as_they_are():
    import torch

    x = torch.ones(3, requires_grad=True)
    assert gradcheck(from_torch(lambda x: (x**3).sum()), x)
    assert x.dtype == torch.float32
    assert x.grad is None


@pytest.mark.oracle
def test_a_wrong_autograd_function_of_torch_is_found():
    import torch

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] ** 2 * dy

    assert verdicts(failure(from_torch(Cube.apply), X)) == ["wrong"]


def test_from_torch_without_torch_says_what_to_import(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ImportError, match="from_torch needs PyTorch, which has not been imported: import torch first"):
        from_torch(np.sin)


def test_the_checker_does_not_import_torch():
    code = "import sys, retro_np.checking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.oracle
def test_jax_vjp_is_checked_as_it_is():
    code = """
import jax, numpy as np
from retro_np import gradcheck
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
f = lambda x, w: {"y": jax.numpy.tanh(x @ w), "total": x.sum()}
assert gradcheck(lambda x, w: jax.vjp(f, x, w), rng.standard_normal((2, 3)), rng.standard_normal((3, 4)))
"""
    # In its own process, because JAX adds dtypes to NumPy.
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.oracle
def test_make_vjp_of_autograd_is_checked_as_it_is():
    import autograd
    import autograd.numpy as anp

    assert gradcheck(autograd.make_vjp(lambda x, w: anp.tanh(anp.dot(x, w)), (0, 1)), X, W)


def test_arrays_of_one_entry_are_checked_in_a_large_tree_of_many_arrays():
    def double(tree):
        return [2 * array for array in tree], lambda dy: ([2 * array for array in dy],)

    def without_the_first(tree):
        return double(tree)[0], lambda dy: ([0 * dy[0], *(2 * array for array in dy[1:])],)

    tree = [np.ones(1), *(np.full(40, 1.5) for _ in range(20))]  # more than 16 arrays and 512 entries
    assert gradcheck(double, tree)
    assert not gradcheck(without_the_first, tree, raise_exception=False)
