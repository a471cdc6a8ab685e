"""Settings of the process that make NumPy faster: idle BLAS threads sleep, and freed memory is kept.

Together they save a quarter of a training step (`benchmarks/train_step.py`), and they change no result. Set
RETRO_NP_TUNE=0 to leave the process alone."""

import ctypes
import os
import sys

OPENBLAS_PTHREADS = 1  # what openblas_get_parallel returns for a build with threads of its own
RESTART = ("openblas_read_env", "blas_thread_shutdown_")  # functions of OpenBLAS, in this order
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h

tuned: dict[str, bool] = {}  # each setting, and whether it took effect


def tune() -> None:
    """Make both settings and record in `tuned` which of them worked. Before or after NumPy's import is the same."""
    if os.environ.get("RETRO_NP_TUNE", "").lower() in ("0", "no", "off", "false"):
        return
    tuned["BLAS threads sleep"] = _let_blas_sleep()
    tuned["freed memory is kept"] = _keep_freed_memory()


def _let_blas_sleep() -> bool:
    """Make OpenBLAS's threads sleep as soon as a product is done.

    By default they spin for some 25 ms while they wait for the next product, on the cores that our kernels need.
    OpenBLAS reads the variable when it is loaded. Where NumPy has loaded it already, its idle threads start again."""
    name = "OPENBLAS_THREAD_TIMEOUT"  # log₂ of the processor cycles that a thread spins; 4 is the minimum
    if os.environ.setdefault(name, "4") != "4":
        return False
    if "numpy" not in sys.modules or _restart_blas_threads():
        return True
    del os.environ[name]
    return False


def _restart_blas_threads() -> bool:
    """Make the OpenBLAS that NumPy is linked with read its variables again, and end its threads. The next product starts
    as many new ones. OpenBLAS does the same before each fork, and like a fork it must not happen during a product.

    Returns False, and changes nothing, for other libraries and for an OpenBLAS that waits on OpenMP's threads."""
    from numpy.linalg import _umath_linalg

    library = ctypes.CDLL(_umath_linalg.__file__)  # A name is looked up in the libraries that it is linked with, too.
    names = (f"{prefix}openblas_get_parallel{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", ""))
    kind = next((getattr(library, name)() for name in names if hasattr(library, name)), None)
    if kind != OPENBLAS_PTHREADS or not all(hasattr(library, name) for name in RESTART):
        return False
    for name in RESTART:
        getattr(library, name)()
    return True


def _keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations. Other C libraries are left alone.
    By default, each array above 32 MB is mapped from the system again, which zeroes it page by page on first use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1))  # one arena for all threads
    return bool(mallopt and all(mallopt(*setting) for setting in settings))
