"""The hot loops, and the switch that chooses which implementation of each one runs.
A kernel's meaning is its NumPy function. It may also have faster implementations, in Numba or in C. By default the
fastest one that is installed runs. `RETRO_NP_KERNELS=numpy|numba|c`, or `use(name)` in a program, makes one choice for
all kernels; a kernel that lacks the chosen kind runs in NumPy."""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from retro_np.errors import UserError
from retro_np.tree import Array as Array  # for the modules of this package

P = ParamSpec("P")
R = TypeVar("R")
COMPILED_TYPES = {np.dtype(np.float32), np.dtype(np.float64)}
DTYPE_KINDS = {"f": "floating-point numbers", "iu": "integers", "b": "booleans"}
CHOICES = ("numpy", "numba", "c", "auto")
KERNELS_VARIABLE = "RETRO_NP_KERNELS"

registered: dict[str, dict[str, Any]] = {}  # name: {"numpy": function, ...}, in order of preference
_choice: str | None = None  # None until the environment is read


def ignore_underflow(function: Callable[P, R]) -> Callable[P, R]:
    """The function, in which small probabilities and squares may become denormal or 0, whatever np.errstate says."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(under="ignore"):
            return function(*args, **kwargs)

    return run


def kernel(
    name: str, *, numpy: Callable[..., Any], numba: str | bool = False, c: Callable[..., Any] | None = None,
    arrays: dict[str, str] | None = None, check: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Register a kernel's implementations, and return the function that calls the chosen one.
    numpy, c: functions of one signature. c calls `c_extension`; if it computes in NumPy, underflow may raise there.
    numba: "module:function", imported on the first call; True: the function `name` of x_numba.py beside NumPy's x.py.
    arrays: by an argument's name its kind of dtype, a letter per axis or * for all, then ? if None may be given, ! if
      the kernel writes it: "f Thc?". Axes with one letter have one size. Other arguments raise UserError. Numba and C
      get one type, float32 or float64. Others, and mixtures, run in NumPy, by its promotion rules.
    check: takes the arguments and returns those that the implementations get, or raises UserError.
    The returned function has the NumPy function's signature and docstring."""
    path = f"{numpy.__module__}_numba:{name}" if numba is True else numba
    implementations = {"c": c, "numba": path, "numpy": ignore_underflow(numpy)}  # fastest first
    registered[name] = {kind: function for kind, function in implementations.items() if function}
    names = list(inspect.signature(numpy).parameters)

    @functools.wraps(numpy)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        kind = running(name)
        if arrays is not None and not check_arrays(name, arrays, dict(zip(names, args, strict=False)) | kwargs):
            kind = "numpy"
        if check is not None:
            args, kwargs = check(*args, **kwargs), {}
        function = registered[name][kind]
        return (_imported(function) if kind == "numba" else function)(*args, **kwargs)

    dispatch.__name__ = dispatch.__qualname__ = name
    return dispatch


def use(name: str) -> None:
    """Choose the kernels from now on: "numpy", "numba", "c", or "auto" for the fastest kind of each.
    Raises UserError for an unknown name, and for a kind that is not installed; the previous choice then stays."""
    global _choice
    _choice = _checked(name, "kernels.use")


def using() -> str:
    """The choice made by `use` or RETRO_NP_KERNELS: "numpy", "numba", "c" or "auto". Raises UserError like `use`."""
    global _choice
    if _choice is None:
        _choice = _checked(os.environ.get(KERNELS_VARIABLE) or "auto", KERNELS_VARIABLE)
    return _choice


@functools.cache
def c_extension() -> Any:
    """The compiled module retro_np._c, or None if it was not built."""
    try:
        return importlib.import_module("retro_np._c")
    except ImportError:
        return None


@functools.cache
def numba_error() -> Exception | None:
    """The exception that importing Numba raises, or None if Numba works."""
    try:
        importlib.import_module("numba")
    except Exception as error:  # for example a NumPy that this Numba does not support
        return error
    return None


def check_arrays(name: str, arrays: dict[str, str], arguments: dict[str, Any]) -> bool:
    """Raise UserError unless each argument is an array as `arrays` says: a compiled loop would read beyond its end.
    Returns whether all floating-point arrays are float32, or all are float64, in native byte order."""
    sizes, types = dict[str, Any](), set[Any]()
    for argument, form in arrays.items():
        array: Any = arguments.get(argument)
        kind, axes, is_optional, is_written = _parts(form)
        if array is None and is_optional:
            continue
        is_array = isinstance(array, np.ndarray)
        shape = () if not is_array else (array.shape,) if axes == "*" else array.shape
        fits = is_array and array.dtype.kind in kind and len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):  # A loop, because a comprehension takes twice as long.
            fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            wanted = f"{DTYPE_KINDS[kind]} of shape ({', '.join(str(sizes.get(axis, axis)) for axis in axes)})"
            actual = f"has shape {array.shape} and type {array.dtype}" if is_array else f"is {type(array).__name__}"
            raise UserError(f"{name}: {argument} {actual}; it must be an array of {wanted}")
        if is_written and not array.flags.writeable:
            raise UserError(f"{name}: {argument} is read-only; it must be writable")
        if kind == "f":
            types.add(array.dtype)
    return len(types) == 1 and types <= COMPILED_TYPES


@functools.cache
def _parts(form: str) -> tuple[str, str, bool, bool]:
    kind, axes = form.rstrip("?!").split()
    return kind, axes, "?" in form, "!" in form


@functools.cache
def _imported(path: str) -> Any:
    module, function = path.split(":")
    return ignore_underflow(getattr(importlib.import_module(module), function))


def is_installed(kind: str) -> bool:
    """Whether kernels of this kind can run here."""
    return kind == "numpy" or (numba_error() is None if kind == "numba" else c_extension() is not None)


def running(name: str) -> str:
    """The kind of a kernel that runs now. Raises UserError like `using`."""
    choice, kinds = using(), registered[name]
    if choice == "auto":
        return next(filter(is_installed, kinds))
    return choice if choice in kinds else "numpy"


def _checked(name: str, where: str) -> str:
    if name not in CHOICES:
        raise UserError(f"{where}: unknown kernels {name!r}; choose one of {', '.join(CHOICES)}")
    if name == "c" and not is_installed(name):
        hint = "install a C compiler and Python's headers and reinstall (pip install --force-reinstall --no-deps .)"
        raise UserError(f"{where}: the C kernels are not built; {hint}, or choose numpy, numba or auto")
    if name == "numba" and not is_installed(name):
        reason = str(numba_error()).partition("\n")[0]
        hint = "pip install -U numba, or choose numpy, c or auto"
        raise UserError(f"{where}: Numba cannot be imported ({reason}); {hint}")
    return name
