"""How Numba compiles our loops."""

import numba


def jit(function):
    """Compile on first use, to code that lets go of the GIL, kept on disk where there is a place for it.

    `reassoc` lets the compiler sum a row in several lanes at once, `contract` fuse a product with a sum; neither
    changes from one call to the next, so results repeat to the bit.
    """
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nothing can be written, neither beside the package nor at home: compiled anew each time
        return numba.njit(**options)(function)
