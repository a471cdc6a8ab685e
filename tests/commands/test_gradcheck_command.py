"""`retro-np gradcheck FILE.py:FUNCTION`. Ground truth: functions whose gradients are known to be right or wrong."""

import builtins
import sys

import pytest
from support import run

from retro_np.cli import main

LAYER = """
import numpy as np

def product(x, w, scale=1.0, bias=None):
    y = scale * (x @ w)
    if bias is not None:
        y = y + bias
    def vjp(dy):
        grads = scale * dy @ w.T, scale * x.T @ dy
        return grads if bias is None else (*grads, dy.sum(axis=0))
    return y, vjp

def wrong(x):
    return x ** 3, lambda dy: 2 * x ** 2 * dy
"""
SQUARE = "def square(x):\n    return x * x, lambda dy: 2 * x * dy\n"


@pytest.fixture
def gradcheck(tmp_path, monkeypatch, capsys):
    """Write a source to layer.py and run the command in that folder. Returns its exit status, output and errors."""

    def command(source, *arguments):
        (tmp_path / "layer.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["retro-np", "gradcheck", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return command


@pytest.fixture
def refusal(gradcheck):
    """The one line that the command prints for a mistake."""

    def command(source, *arguments):
        status, _, err = gradcheck(source, *arguments)
        assert status == 2, err
        assert err.startswith("retro-np: ")
        assert err.count("\n") == 1, err
        return err.removeprefix("retro-np: ").strip()

    return command


def assert_passes(outcome):
    status, out, err = outcome
    assert (status, err) == (0, "")
    assert "passed" in out.splitlines()[-1]


def test_a_right_gradient_prints_the_table_and_passed(gradcheck):
    status, out, err = gradcheck(LAYER, "layer.py:product", "--shape", "x=3,4", "--shape", "w=4,2")
    assert (status, err) == (0, "")
    *table, last = out.splitlines()
    assert [line.split()[:3] for line in table[-2:]] == [["0", "x", "right"], ["1", "w", "right"]]
    assert last.startswith("layer.py:product passed: no error above ")
    assert float(last.split()[-1]) < 1e-6


def test_a_wrong_gradient_prints_the_table_and_the_message_and_ends_with_status_1(gradcheck):
    status, out, err = gradcheck(LAYER, "layer.py:wrong", "--shape", "x=3")
    assert status == 1
    assert "wrong" in out
    assert "passed" not in out
    assert "finite differences" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("value", "gradient", "words"),
    [
        ("x ** 2", "(2 * x * dy).sum()", "shape"),
        ("x ** 2", "None", "None"),
        ("np.maximum(x, 1)", "dy * (x > 1)", "cannot tell"),
    ],
    ids=["wrong shape", "no gradient", "kink"],
)
def test_a_gradient_of_the_wrong_form_or_that_cannot_be_told_ends_with_status_1_too(gradcheck, value, gradient, words):
    source = f"import numpy as np\ndef f(x):\n    return {value}, lambda dy: {gradient}\n"
    status, out, err = gradcheck(f"{source}\ndef example():\n    return np.ones(3)\n", "layer.py:f")
    assert status == 1
    assert words in err
    assert "passed" not in out
    assert "Traceback" not in err


def test_in_a_process_of_its_own_the_command_prints_and_ends_in_the_same_way(tmp_path):
    (tmp_path / "layer.py").write_text(LAYER)
    status, out, err = run("gradcheck", tmp_path / "layer.py:wrong", "--shape", "x=3", cwd=tmp_path)
    assert status == 1
    assert "wrong" in out
    assert "finite differences" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "returned",
    [
        "np.ones((3, 4)), np.ones((4, 2))",
        "[np.ones((3, 4)), np.ones((4, 2))]",
        "{'w': np.ones((4, 2)), 'x': np.ones((3, 4))}",
        "{'bias': np.ones(2), 'x': np.ones((3, 4)), 'w': np.ones((4, 2))}",
    ],
    ids=["tuple", "list", "dict", "dict without a parameter in between"],
)
def test_example_returns_a_tuple_a_list_or_a_dict_of_named_arguments(gradcheck, returned):
    assert_passes(gradcheck(f"{LAYER}\ndef example():\n    return {returned}\n", "layer.py:product"))


@pytest.mark.parametrize("returned", ["np.ones(3)", "np.float32(2)", "1.5"])
def test_example_returns_a_single_array_or_number(gradcheck, returned):
    source = f"import numpy as np\n{SQUARE}\ndef example():\n    return {returned}\n"
    assert_passes(gradcheck(source, "layer.py:square"))


@pytest.mark.parametrize(
    ("argument", "gradient"),
    [("{'w': np.ones(3)}", "{'w': 2 * tree['w'] * dy}"), ("[np.ones(3)]", "([2 * tree[0] * dy],)")],
)
def test_example_returns_a_tree_that_is_the_only_argument_in_a_tuple(gradcheck, argument, gradient):
    leaf = "tree['w']" if "{" in argument else "tree[0]"
    source = f"import numpy as np\ndef f(tree):\n    return {leaf} ** 2, lambda dy: {gradient}\n"
    assert_passes(gradcheck(f"{source}\ndef example():\n    return ({argument},)\n", "layer.py:f"))


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("None", "returns None, not a tuple of arguments"),
        ("()", "returns (), not a tuple of arguments"),
        ("'abc'", "returns 'abc', not a tuple of arguments"),
        ("{1, 2}", "returns {1, 2}, not a tuple of arguments"),
        ("(1.0,)", "missing a required argument: 'w'; the parameters are x, w, scale, bias"),
        ("(1.0,) * 5", "too many positional arguments; the parameters are x, w"),
        ("{'x': 1.0}", "missing a required argument: 'w'"),
        ("{'x': 1.0, 'w': 1.0, 'gain': 1.0}", "got an unexpected keyword argument 'gain'; the parameters are x, w"),
        ("{1: 1.0}", "the parameters are x, w"),
        ("1 / 0", "ZeroDivisionError: division by zero (layer.py, line 17)"),
        ("exit()", "SystemExit: None (layer.py, line 17)"),
    ],
)
def test_an_example_that_raises_or_returns_nonsense_is_refused(refusal, returned, problem):
    line = refusal(f"{LAYER}\ndef example():\n    return {returned}\n", "layer.py:product")
    assert "example() of layer.py" in line
    assert problem in line


def test_an_example_that_needs_an_argument_is_refused(refusal):
    line = refusal(f"{SQUARE}\ndef example(n):\n    return n\n", "layer.py:square")
    assert "example() missing 1 required positional argument: 'n'" in line


def test_arguments_that_the_checker_refuses_give_one_line(refusal):
    assert "layer.py:square: " in refusal(f"{SQUARE}\ndef example():\n    return ('abc',)\n", "layer.py:square")


def test_without_arguments_the_line_says_what_to_write(refusal):
    line = refusal(LAYER, "layer.py:product")
    assert "write a function example() in layer.py that returns them" in line
    assert "--shape x=3,4 --shape w=3,4" in line


def test_example_is_not_called_if_shapes_are_given(gradcheck, refusal):
    source = f"{LAYER}\ndef example():\n    raise RuntimeError('called')\n"
    assert_passes(gradcheck(source, "layer.py:product", "--shape", "w=4,2", "--shape", "x=3,4"))
    line = refusal(source, "layer.py:product", "--shape", "x=3,4")
    assert "--shape: missing a required argument: 'w'; the parameters are x, w, scale, bias" in line


RECORDED = """
import builtins

def f(x, y, z=None):
    if not builtins.arguments:
        builtins.arguments.extend([x, y, z])
    return x.sum() + y.sum(), lambda dy: (x * 0 + dy, y * 0 + dy)
"""


def test_shapes_are_standard_normal_in_the_order_of_the_parameters_and_follow_the_seed(gradcheck, monkeypatch):
    def arguments(*options):
        monkeypatch.setattr(builtins, "arguments", [], raising=False)
        assert_passes(gradcheck(RECORDED, "layer.py:f", *options))
        return builtins.arguments

    x, y, z = arguments("--shape", "x=40,50", "--shape", "y=")
    assert (x.shape, y.shape, z) == ((40, 50), (), None)
    assert abs(x.mean()) < 0.1  # 2000 numbers: 4.5 standard errors
    assert abs(x.std() - 1) < 0.1
    x_again, y_again, _ = arguments("--shape", "y=", "--shape", "x=40,50")
    assert (x == x_again).all()
    assert y == y_again
    x_other, _, _ = arguments("--shape", "x=40,50", "--shape", "y=", "--seed", 1)
    assert (x != x_other).all()


def test_parameters_with_defaults_may_be_left_out_in_between(gradcheck):
    options = ["--shape", "x=3,4", "--shape", "w=4,2", "--shape", "bias=2"]
    status, out, err = gradcheck(LAYER, "layer.py:product", *options)
    assert (status, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()[-4:-1]] == ["x", "w", "bias"]


@pytest.mark.parametrize(
    "shape", ["x=3,a", "x=-3", "x=3,-4", "x=3,,4", "x=3,", "x=(3,4)", "x 3", "=3", "x", "x=3.5", "x=³"]
)
def test_a_malformed_shape_is_refused(refusal, shape):
    line = refusal(SQUARE, "layer.py:square", f"--shape={shape}")
    assert line.startswith(f"--shape {shape} is not NAME=SIZE,SIZE,…; write x=3,4 for a matrix")


def test_a_shape_for_an_unknown_parameter_is_refused(refusal):
    line = refusal(SQUARE, "layer.py:square", "--shape", "x=3", "--shape", "y=3")
    assert "--shape: got an unexpected keyword argument 'y'; the parameters are x" in line


def test_a_shape_that_does_not_fit_into_memory_is_refused(refusal):
    assert "allocate" in refusal(SQUARE, "layer.py:square", "--shape", "x=1000000000,1000000")
    assert "too big" in refusal(SQUARE, "layer.py:square", "--shape", "x=10000000000,10000000000")


def test_the_tolerance_reaches_the_checker(gradcheck):
    source = "def f(x):\n    return x**3, lambda dy: 3.003 * x**2 * dy\n"
    assert gradcheck(source, "layer.py:f", "--shape", "x=3")[0] == 1
    assert_passes(gradcheck(source, "layer.py:f", "--shape", "x=3", "--tolerance", "0.1"))


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1"])
def test_a_tolerance_that_is_no_bound_is_refused(refusal, tolerance):
    assert "--tolerance" in refusal(SQUARE, "layer.py:square", "--shape", "x=3", "--tolerance", tolerance)


FROZEN = "def f(x, w, b):\n    return x * w * b, lambda dy: (w * b * dy, None, None)\n"


def test_frozen_parameters_may_have_no_gradient(gradcheck, refusal):
    command = ["layer.py:f", "--shape", "x=3", "--shape", "w=3", "--shape", "b=3", "--frozen", "w"]
    assert gradcheck(FROZEN, *command)[0] == 1
    assert_passes(gradcheck(FROZEN, *command, "--frozen", "b"))
    assert "'q'" in refusal(FROZEN, *command, "--frozen", "q")


@pytest.mark.parametrize("option", [("--shape", "x=3"), ("--frozen", "x")])
def test_options_for_a_function_are_refused_without_one(refusal, option):
    assert "need FILE.py:FUNCTION" in refusal(SQUARE, "rms_norm", *option)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("nowhere.py:f", "nowhere.py does not exist; write FILE.py:FUNCTION"),
        ("layer:square", "layer does not exist; write FILE.py:FUNCTION"),
        ("notes.txt:f", "notes.txt is not a Python file"),
        ("folder.py:f", "folder.py is a folder"),
        ("layer.py", "no function is named; write layer.py:FUNCTION; choose from square, twice, Norm_, closed"),
        ("layer.py:", "no function is named; write layer.py:FUNCTION; choose from square, twice, Norm_, closed"),
        ("layer.py:sqare", "layer.py has no sqare; did you mean square?"),
        ("layer.py:convolution", "layer.py has no convolution; choose from square, twice, Norm_, closed"),
        ("layer.py:size", "layer.py:size is 3, not a function; choose from square"),
        ("layer.py:Norm", "layer.py:Norm is <class 'layer.Norm'>, not a function; choose from square"),
        ("layer.py:Norm.method", "layer.py:Norm.method is not a static function"),
        ("layer.py:Norm.of_class", "layer.py:Norm.of_class is not a static function"),
        ("layer.py:Norm_.method", "layer.py:Norm_.method is not a static function"),
        ("layer.py:Norm.nothing", "layer.py has no Norm.nothing"),
        ("layer.py:Norm..static", "layer.py has no Norm..static"),
        ("layer.py:max", "layer.py has no max"),
        ("layer.py:largest", "no signature found for builtin"),
    ],
)
def test_a_target_that_is_no_function_is_refused(refusal, tmp_path, target, problem):
    (tmp_path / "notes.txt").write_text("def f(x): pass")
    (tmp_path / "folder.py").mkdir()
    source = f"""
import os
from functools import partial, reduce
{SQUARE}
size, _hidden, largest = 3, (lambda x: x), max
twice = partial(square)

class Norm:
    def __call__(self, x): return square(x)
    def method(self, x): return square(x)
    @classmethod
    def of_class(cls, x): return square(x)
    @staticmethod
    def static(x): return square(x)

Norm_ = Norm()
closed = lambda x: square(x)

def example():
    return (1.0,)
"""
    assert problem in refusal(source, target)


def test_a_file_without_functions_says_so(refusal):
    assert "layer.py defines no function" in refusal("import numpy as np\nsize = 3\n", "layer.py")


CALLABLES = """
import functools

def square(x, power=2):
    return x ** power, lambda dy: power * x ** (power - 1) * dy

def announced(f):
    @functools.wraps(f)
    def wrapper(*arguments, **options):
        print("called")
        return f(*arguments, **options)
    return wrapper

def bare(f):
    return lambda *arguments: f(*arguments)

class Power:
    def __init__(self, power): self.power = power
    def __call__(self, x): return square(x, self.power)
    @staticmethod
    def static(x): return square(x)
    class Inner:
        @staticmethod
        def static(x): return square(x)

class Derived(Power):
    pass

cube = functools.partial(square, power=3)
fourth = Power(4)
decorated = announced(square)
opaque = bare(square)

def keyword_only(*, x):
    return square(x)

def any_keyword(**arrays):
    return square(arrays["x"])

def example():
    return (1.5,)
"""


@pytest.mark.parametrize(
    "name",
    ["square", "cube", "fourth", "decorated", "Power.static", "Power.Inner.static", "Derived.static"],
)
def test_every_kind_of_callable_works_with_example_and_with_a_shape(gradcheck, name):
    assert_passes(gradcheck(CALLABLES, f"layer.py:{name}"))
    assert_passes(gradcheck(CALLABLES, f"layer.py:{name}", "--shape", "x=2,3"))


@pytest.mark.parametrize("name", ["keyword_only", "any_keyword"])
def test_parameters_that_are_keywords_are_passed_as_such(gradcheck, name):
    assert_passes(gradcheck(CALLABLES, f"layer.py:{name}", "--shape", "x=2,3"))


def test_a_function_of_unnamed_arguments_needs_example(gradcheck, refusal):
    assert_passes(gradcheck(CALLABLES, "layer.py:opaque"))
    assert "unexpected keyword argument 'x'" in refusal(CALLABLES, "layer.py:opaque", "--shape", "x=3")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1\ndef f(:\n", "importing layer.py: SyntaxError: invalid syntax (layer.py, line 2)"),
        ("if True:\nx = 1\n", "IndentationError: expected an indented block after 'if' statement on line 1 (layer.py"),
        ("x = 1\n\nx / 0\n", "importing layer.py: ZeroDivisionError: division by zero (layer.py, line 3)"),
        ("def g():\n    raise OSError('a\\nb')\ng()\n", "importing layer.py: OSError: a b (layer.py, line 2)"),
        ("import not_here\n", "ModuleNotFoundError: No module named 'not_here' (layer.py, line 1)"),
        ("import sys\nsys.exit(0)\n", "importing layer.py: SystemExit: 0 (layer.py, line 2)"),
        ("raise SystemExit\n", "importing layer.py: SystemExit: (layer.py, line 1)"),
        ("import typer\nraise typer.Exit(0)\n", "importing layer.py: Exit: 0 (layer.py, line 2)"),
        ("class Stop(BaseException): pass\nraise Stop('now')\n", "importing layer.py: Stop: now (layer.py, line 2)"),
        ("from retro_np.errors import UserError\nraise UserError('no')\n", "UserError: no (layer.py, line 2)"),
        ("from . import neighbour\n", "ImportError: attempted relative import with no known parent package (layer.py"),
        ("import broken\n", "SyntaxError: invalid syntax (broken.py, line 2) (layer.py, line 1)"),
        ("import json\njson.loads('x')\n", "(layer.py, line 2)"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_imported_gives_one_line(refusal, tmp_path, source, problem):
    (tmp_path / "broken.py").write_text("\ndef f(:\n")
    assert problem in refusal(source, "layer.py:f")


def test_a_file_that_is_not_text_gives_one_line(refusal, tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\xff\0\1")
    assert "importing binary.py: SyntaxError" in refusal("", "binary.py:f")


def test_an_interrupt_ends_as_elsewhere(gradcheck):
    for source in ("raise KeyboardInterrupt\n", "def f(x):\n    raise KeyboardInterrupt\n"):
        status, _, err = gradcheck(source, "layer.py:f", "--shape", "x=3")
        assert status == 130
        assert err.endswith("retro-np: interrupted; run the same command to resume\n")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise ValueError('too\\nlong')", "layer.py:f: ValueError: too long (layer.py, line 4)"),
        ("return x @ np.ones((2, 2)), None", "layer.py:f: ValueError: matmul"),
        ("sys.exit(0)", "layer.py:f: SystemExit: 0 (layer.py, line 4)"),
        ("next(iter(()))", "layer.py:f: StopIteration: (layer.py, line 4)"),
        ("return f(x)", "RecursionError"),
        ("return x, lambda dy: 1 / 0", "layer.py:f: ZeroDivisionError: division by zero (layer.py, line 4)"),
        ("return x", "must return (value, pullback)"),
        ("return None", "must return (value, pullback)"),
        ("return x, x", "must return (value, pullback)"),
        ("return x, (lambda dy: dy), 1", "must return (value, pullback)"),
        ("yield x", "must return (value, pullback)"),
    ],
)
def test_a_function_that_raises_or_returns_no_pullback_gives_one_line(refusal, body, problem):
    source = f"import sys\nimport numpy as np\ndef f(x):\n    {body}\n"
    assert problem in refusal(source, "layer.py:f", "--shape", "x=3")


def test_an_error_in_a_module_beside_the_file_names_that_modules_line(refusal, tmp_path):
    (tmp_path / "raising.py").write_text("def g(x):\n    raise ValueError('no')\n")
    line = refusal("import raising\nf = raising.g\n", "layer.py:f", "--shape", "x=3")
    assert "ValueError: no (raising.py, line 2)" in line


NEIGHBOURS = """
import neighbour_a

def f(x):
    import neighbour_b
    return neighbour_a.value(x), lambda dy: neighbour_b.slope(x) * dy
"""


def test_modules_beside_the_file_can_be_imported_and_the_path_is_restored(gradcheck, tmp_path, monkeypatch):
    (tmp_path / "neighbour_a.py").write_text("def value(x):\n    return x * x\n")
    (tmp_path / "neighbour_b.py").write_text("def slope(x):\n    return 2 * x\n")
    search_path = sys.path.copy()
    assert_passes(gradcheck(NEIGHBOURS, tmp_path / "layer.py:f", "--shape", "x=3"))
    assert sys.path == search_path
    assert "layer" not in sys.modules


def test_the_path_is_restored_if_the_import_raises(refusal):
    search_path = sys.path.copy()
    refusal("import sys\nsys.path.append('more')\nsys.exit()\n", "layer.py:f")
    assert sys.path == search_path
    assert "layer" not in sys.modules


def test_dataclasses_in_the_module_work(gradcheck):
    source = f"""
from __future__ import annotations
import dataclasses, typing
{SQUARE}
@dataclasses.dataclass
class Settings:
    power: typing.ClassVar[int] = 2
    name: str = "x"

def example():
    return (float(Settings.power),)
"""
    assert_passes(gradcheck(source, "layer.py:square"))


@pytest.mark.parametrize("name", ["numpy", "json", "retro_np", "typer", "colorsys"])
def test_a_file_may_have_the_name_of_an_installed_module(gradcheck, tmp_path, name):
    before = sys.modules.get(name)
    (tmp_path / f"{name}.py").write_text(
        "import json\nimport numpy as np\nnumbers = np.array(json.loads('[1]'))\n" + SQUARE
    )
    assert_passes(gradcheck("", f"{name}.py:square", "--shape", "x=3"))
    assert sys.modules.get(name) is before


def test_two_files_of_one_name_are_both_read(gradcheck, tmp_path):
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "layer.py").write_text(LAYER)
    assert_passes(gradcheck(SQUARE, "layer.py:square", "--shape", "x=3"))
    assert gradcheck(SQUARE, "second/layer.py:wrong", "--shape", "x=3")[0] == 1
    assert_passes(gradcheck(SQUARE, "second/../layer.py:square", "--shape", "x=3"))


def test_what_the_module_prints_stays_on_standard_output(gradcheck):
    source = f"print('hello')\n{SQUARE}"
    status, out, err = gradcheck(source, "layer.py:square", "--shape", "x=3")
    assert (status, err) == (0, "")
    assert out.startswith("hello\n")
