"""The hot loops, and the switch that says which implementation of them runs.

A kernel has one meaning, its NumPy function, and may have faster implementations in Numba or in C. By default each
runs the best that is there; `RETRO_NP_KERNELS=numpy|numba|c`, or `use(name)` in a program, chooses for all of them.
A kernel that has no implementation of the chosen kind runs its NumPy one.
"""

import functools
import importlib
import os

import numpy as np

from retro_np.errors import UserError

COMPILED_TYPES = {np.dtype(np.float32), np.dtype(np.float64)}
CHOICES = ("numpy", "numba", "c", "auto")
VARIABLE = "RETRO_NP_KERNELS"
MODULES = ("attention", "hashing", "minhash", "panels", "rowwise", "search", "substring")  # those that register kernels

_kernels = {}  # name: {"numpy": function, ...}, in order of preference
_choice = None  # None: the environment has not been read


def kernel(name, *, numpy, numba=None, c=None, best=("c", "numba", "numpy"), one_type=False):
    """Register a kernel's implementations; return the function that calls the one chosen.

    numpy, numba, c: functions of one signature, None where there is none. That in Numba must import numba when it is
    first called, not before; that in C must find its function through `c_extension`. best: the kinds, best first.
    one_type: Numba and C take arrays of one type, float32 or float64; where a call mixes types or has another, NumPy's
    function runs, whose rules of promotion say what comes out.
    The function returned has the NumPy function's signature and docstring.
    """
    given = {"numpy": numpy, "numba": numba, "c": c}
    _kernels[name] = {kind: given[kind] for kind in best if given[kind] is not None}

    @functools.wraps(numpy)
    def dispatch(*args, **kwargs):
        kind = _running(name)
        if one_type and not _of_one_type((*args, *kwargs.values())):
            kind = "numpy"
        return _kernels[name][kind](*args, **kwargs)

    dispatch.__name__ = dispatch.__qualname__ = name
    return dispatch


def use(name: str) -> None:
    """Choose the kernels from here on: "numpy", "numba", "c", or "auto", the best there is for each.

    Raises UserError for another name, and for "c" where the extension was not built; the choice then stays as it was.
    """
    global _choice
    _choice = _checked(name, "kernels.use")


def using() -> str:
    """What is chosen, by `use` or by RETRO_NP_KERNELS: "numpy", "numba", "c" or "auto". Raises UserError as `use`."""
    global _choice
    if _choice is None:
        _choice = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
    return _choice


def table() -> list[tuple[str, str, tuple[str, ...]]]:
    """A row a kernel: its name, the kind that runs now, and the kinds that could, best first. Raises as `using`."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return [(name, _running(name), _available(name)) for name in sorted(_kernels)]


@functools.cache
def c_extension():
    """The compiled module retro_np._c, or None where it was not built."""
    try:
        return importlib.import_module("retro_np._c")
    except ImportError:
        return None


def check_shapes(name: str, **arrays) -> None:
    """Raise UserError unless each array has its shape: Numba would read on behind the end of a shorter one.

    arrays: name=(array, shape), an array that is None being passed over.
    """
    for which, (array, shape) in arrays.items():
        if array is not None and array.shape != tuple(shape):
            raise UserError(f"{name}: {which} is {array.shape}, and must be {tuple(shape)}")


def _of_one_type(arguments) -> bool:
    """Whether all arrays of floating-point numbers among them are float32, or all float64, in native byte order."""
    types = {a.dtype for a in arguments if isinstance(a, np.ndarray) and a.dtype.kind not in "biu"}
    return len(types) == 1 and types <= COMPILED_TYPES


def _available(name):
    return tuple(kind for kind in _kernels[name] if kind != "c" or c_extension() is not None)


def _running(name):
    choice, available = using(), _available(name)
    if choice == "auto":
        return available[0]
    return choice if choice in available else "numpy"


def _checked(name, where):
    if name not in CHOICES:
        raise UserError(f"{where}: no kernels {name!r}; choose one of {', '.join(CHOICES)}")
    if name == "c" and c_extension() is None:
        raise UserError(
            f"{where}: the C kernels are not built; install a C compiler and Python's headers and reinstall "
            "(pip install --force-reinstall --no-deps .), or choose numpy, numba or auto"
        )
    return name
