"""What is settled once for the process, before NumPy is loaded: BLAS threads that sleep, memory that is kept.

Both are worth a quarter of a training step together (`benchmarks/train_step.py`) and change no result. Set
RETRO_NP_TUNE=0 to leave the process as it is.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h

settled: dict[str, bool] = {}  # what was settled, and what could not be


def settle() -> None:
    """Do both, once."""
    if os.environ.get("RETRO_NP_TUNE", "").lower() in ("0", "no", "off", "false"):
        return
    settled["BLAS threads sleep"] = _let_blas_sleep()
    settled["freed memory is kept"] = _keep_freed_memory()


def _let_blas_sleep() -> bool:
    """Have OpenBLAS's threads sleep when a product is done.

    By default they wait for the next one by spinning, some 25 ms each time, on the cores that our kernels then want.
    The variable is read when OpenBLAS is loaded: where NumPy was imported before, nothing is done.
    """
    name = "OPENBLAS_THREAD_TIMEOUT"  # a power of two of processor cycles; 4 is the least
    if "numpy" in sys.modules and name not in os.environ:
        return False
    return os.environ.setdefault(name, "4") == "4"


def _keep_freed_memory() -> bool:
    """Have glibc keep memory that was freed for what is allocated next; another C library is let be.

    By default an array above 32 MB is mapped afresh from the system, and zeroed page by page at first touch, each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1))  # one arena: threads keep theirs, too
    return bool(mallopt and all(mallopt(*setting) for setting in settings))
