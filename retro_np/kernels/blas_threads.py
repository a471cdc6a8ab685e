"""Start the threads of a loaded OpenBLAS again, so that they follow the variables that the process has set since."""

import ctypes
import sys
from typing import Any

OWN_THREADS = 1  # what openblas_get_parallel returns, unless OpenBLAS was built without threads or with OpenMP's


def restart() -> bool:
    """Make the OpenBLAS that NumPy is linked with read its variables again, and end its threads. The next product
    starts as many new ones, and results keep their bits. OpenBLAS itself ends its threads before each fork.

    A thread that is ended during a product would leave that product waiting for ever. Returns False, and changes
    nothing, if another thread of Python exists, which may be multiplying, and for other BLAS libraries."""
    from numpy.linalg import _umath_linalg

    if len(sys._current_frames()) > 1:
        return False
    library = ctypes.CDLL(_umath_linalg.__file__)  # It also finds the functions of the libraries that this one needs.
    functions: list[Any] = [_function(library, name) for name in ("get_parallel", "get_num_threads", "set_num_threads")]
    functions += [getattr(library, name, None) for name in ("openblas_read_env", "blas_thread_shutdown_")]
    if not all(functions):
        return False
    get_parallel, get_num_threads, set_num_threads, read_variables, end_threads = functions
    if get_parallel() != OWN_THREADS:
        return False
    count = get_num_threads()
    read_variables()
    end_threads()
    set_num_threads(count)
    return True


def _function(library: ctypes.CDLL, name: str) -> Any:
    """A public function of OpenBLAS, or None. Builds of OpenBLAS may add a prefix and a suffix to its name."""
    names = (f"{prefix}openblas_{name}{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", ""))
    return next((getattr(library, name) for name in names if hasattr(library, name)), None)
