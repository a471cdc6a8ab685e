"""Settings of the process that make NumPy faster: idle BLAS threads sleep, and freed memory is kept.

Together they save a quarter of a training step (`benchmarks/train_step.py`), and they change no result. Set
RETRO_NP_TUNE=0 to leave the process alone."""

import ctypes
import os
import sys

TIMEOUT = "OPENBLAS_THREAD_TIMEOUT"  # log₂ of the processor cycles that an idle thread of OpenBLAS spins
SLEEP, SPIN = "4", "26"  # its smallest value, and its default of some 25 ms
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

    By default they spin while they wait for the next product, on the cores that our kernels need. OpenBLAS reads the
    variable when it is loaded; if NumPy has loaded it already, its threads start again."""
    if os.environ.setdefault(TIMEOUT, SLEEP) != SLEEP:
        return False
    if "numpy" in sys.modules:
        from retro_np.kernels import blas_threads

        if not blas_threads.restart():
            del os.environ[TIMEOUT]
            return False
    return True


def _keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations. Other C libraries are left alone.
    By default, each array above 32 MB is mapped from the system again, which zeroes it page by page on first use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1))  # one arena for all threads
    return bool(mallopt and all(mallopt(*setting) for setting in settings))
