"""`retro-np gradcheck`, for our operators and for a user's function, FILE.py:FUNCTION."""

import difflib
import functools
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, getattr_static, signature
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.table import Table
from typer import Argument, Context, Exit, Option

from retro_np.commands.options import Seed, console, finite, is_typed
from retro_np.errors import UserError
from retro_np.progress import progress_bar, say


def gradcheck(
    name: Annotated[str, Argument(metavar="FILE.py:FUNCTION|NAME", help="Your function, or an operator: CCA, ….")] = "",
    shape: Annotated[list[str] | None, Option(metavar="X=3,4", help="Shape of X, repeatable. X= is a scalar.")] = None,
    frozen: Annotated[list[str] | None, Option(help="What needs no gradient, repeatable: a parameter, a leaf.")] = None,
    tolerance: Annotated[float, Option(min=0, help="Largest error that passes. For files the default is 3e-9.")] = 1e-6,
    seed: Seed = 0,
    *,
    context: Context,
) -> None:
    """Check your backward pass, or all of ours, against finite differences.

    FUNCTION returns (value, vjp), as `retro_np.gradcheck` describes. Its arguments come from example() in FILE.py. It
    returns a tuple or list of them, a dict of named ones, or a single array or number. A tree that is the only argument
    is returned as (tree,). With --shape, example() is not called: each parameter without a default needs one, and
    normal numbers are drawn. The exit status is 1 if the gradient is wrong or cannot be told, and 2 for a wrong call.

    Without a file, this checks every operator and the whole model, in float64. All checks take about ten seconds.

    Example: `retro-np gradcheck my_layer.py:my_function --shape x=3,4`"""
    from retro_np.checking import gradcheck as check_gradients

    tolerance = finite("--tolerance", tolerance)
    if ".py" in name or ":" in name:
        chosen = tolerance if is_typed(context, "tolerance") else None
        with _user_function(name, shape or [], seed) as (f, args):
            report = check_gradients(f, *args, raise_exception=False, frozen=frozen or (), tolerance=chosen, seed=seed)
        console.print(str(report), soft_wrap=True)
        if not report:
            say(report.message)
            raise Exit(1)
        console.print(f"{name} passed: no error above {report.error:.1e}")
        return
    if shape or frozen:
        raise UserError("--shape and --frozen need FILE.py:FUNCTION")
    from retro_np.nn.checks import checks

    table = Table("operator", "source", "worst error", title="pullback against central differences, float64")
    failures = []
    matching = [check for check in checks(seed) if name in check.name]
    if not matching:
        raise UserError(f"no operator's name contains {name!r}; choose from: {'; '.join(c.name for c in checks())}")
    with progress_bar("checking", len(matching)) as advance:
        for check in matching:
            report = check_gradients(check.f, *check.arrays, raise_exception=False, tolerance=tolerance, seed=seed)
            table.add_row(check.name, check.source, f"{report.error:.1e}" if report else "FAILS")
            failures += [] if report else [f"{check.name}: {report.message}"]
            advance(note=check.name)
    console.print(table)
    if failures:
        raise UserError("; ".join(failures))
    console.print(f"{len(matching)} of {len(matching)} passed: no error above {tolerance:g}")


@contextmanager
def _user_function(target: str, shapes: list[str], seed: int) -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """The function that `target` names, FILE.py:FUNCTION, and its arguments, in a context where it may be called.

    shapes: NAME=SIZE,SIZE,… for each parameter, drawn with `seed`; without any, the file's example() is called.
    Raises UserError if something is wrong with these, and for everything that the user's code raises in the context."""
    file, _, name = target.rpartition(":")
    if not file or name.endswith(".py"):
        file, name = target, ""
    path = Path(file)
    if path.is_dir() or not path.exists() or path.suffix != ".py":
        problem = "is a folder" if path.is_dir() else "is not a Python file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; write FILE.py:FUNCTION")
    path = path.absolute()
    with _imported(path) as module, _located(f"{path.name}:{name}", path.parent):
        f = _function(module, name, path.name)
        if shapes:
            f, sizes = _bound(f, dict(map(_size, shapes)), "--shape")
            normal = np.random.default_rng(seed).standard_normal
            yield f, [normal(size) for size in sizes]
        else:
            yield _bound(f, _example(f, module, path), f"example() of {path.name}")


@contextmanager
def _located(subject, folder):
    """Turn everything that is raised, even SystemExit, into a UserError with the last line in a file of the folder."""
    try:
        yield
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, UserError) and not frames):
            raise
        line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise UserError(f"{subject}: {type(error).__name__}: {error}{line}") from error


@contextmanager
def _imported(path):
    """The module of a file, in a context where the modules beside the file can be imported."""
    name = f"{path.stem} of the user" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # Dataclasses look for their module there.
    search_path = sys.path.copy()
    sys.path.insert(0, str(path.parent))
    try:
        with _located(f"importing {path.name}", path.parent):
            spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = search_path
        sys.modules.pop(name, None)


def _function(module, name, file):
    functions = [
        key for key, value in vars(module).items()
        if callable(value) and not isinstance(value, type) and not key.startswith("_") and key != "example"
        and (isinstance(value, functools.partial) or getattr(value, "__module__", None) == module.__name__)
    ]  # fmt: skip
    choice = f"choose from {', '.join(functions)}" if functions else f"{file} defines no function"
    if not name:
        raise UserError(f"no function is named; write {file}:FUNCTION; {choice}")
    owner, value = None, module
    for part in name.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(name, functions, 1)
            raise UserError(f"{file} has no {name}; {f'did you mean {close[0]}?' if close else choice}")
        owner, value = value, getattr(value, part)
    if owner is not module and not isinstance(getattr_static(owner, part), staticmethod):
        raise UserError(f"{file}:{name} is not a static function; write a function of the module that calls it")
    if not callable(value) or isinstance(value, type):
        raise UserError(f"{file}:{name} is {value!r:.60}, not a function; {choice}")
    return value


def _size(shape):
    match = re.fullmatch(r"(\w+)=((?:[0-9]+(?:,[0-9]+)*)?)", shape)
    if not match:
        raise UserError(f"--shape {shape} is not NAME=SIZE,SIZE,…; write x=3,4 for a matrix and x= for a scalar")
    return match[1], [int(size) for size in match[2].split(",") if size]


def _example(f, module, path):
    example = getattr(module, "example", None)
    if not callable(example):
        options = " ".join(f"--shape {name}=3,4" for name in signature(f).parameters)
        raise UserError(f"no arguments: write a function example() in {path.name} that returns them, or pass {options}")
    with _located(f"example() of {path.name}", path.parent):
        arguments = example()
    if hasattr(arguments, "__array__") or isinstance(arguments, int | float):
        return (arguments,)
    if not isinstance(arguments, tuple | list | dict) or not arguments:
        raise UserError(f"example() of {path.name} returns {arguments!r:.60}, not a tuple of arguments")
    return arguments


def _bound(f, arguments, source):
    """A function for `gradcheck` and the list of its arguments. Named arguments come in the order of f's parameters."""
    positional, named = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    parameters = signature(f).parameters
    try:
        signature(f).bind(*positional, **named)
    except TypeError as error:
        raise UserError(f"{source}: {error}; the parameters are {', '.join(parameters)}") from error
    if positional:
        return f, list(positional)
    names = sorted(named, key=[*parameters, *named].index)

    def call(*values):
        return f(**dict(zip(names, values, strict=True)))  # Parameters with defaults may be left out in between.

    call.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_ONLY) for name in names])
    return call, [named[name] for name in names]
