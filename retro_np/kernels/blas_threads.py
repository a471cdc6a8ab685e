"""Start the threads of a loaded OpenBLAS again, so that they follow the variables that the process has set since."""

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

TASKS = Path("/proc/self/task")  # a folder per thread
OWN_THREADS = 1  # what openblas_get_parallel returns, unless OpenBLAS was built without threads or with OpenMP's
MAX_WAIT_SECONDS = 1.0
POLL_SECONDS = 0.001


def restart() -> bool:
    """Make the OpenBLAS that NumPy is linked with read its variables again, and end its threads. The next product
    starts as many new ones, and results keep their bits. OpenBLAS itself ends its threads before each fork.

    A thread that is ended during a product would leave that product waiting for ever. Therefore products use one thread
    for a moment, until those of OpenBLAS sleep. Returns False, and changes nothing, if they never do, for other BLAS
    libraries, and where no /proc tells which threads sleep."""
    from numpy.linalg import _umath_linalg

    library = ctypes.CDLL(_umath_linalg.__file__)  # It also finds the functions of the libraries that this one needs.
    functions: list[Any] = [_function(library, name) for name in ("get_parallel", "get_num_threads", "set_num_threads")]
    functions += [getattr(library, name, None) for name in ("openblas_read_env", "blas_thread_shutdown_")]
    if not all(functions) or not TASKS.exists():
        return False
    get_parallel, get_num_threads, set_num_threads, read_variables, end_threads = functions
    if get_parallel() != OWN_THREADS:
        return False
    count = get_num_threads()
    set_num_threads(1)
    try:
        if asleep := _wait_for_sleep():
            read_variables()
            end_threads()
    finally:
        set_num_threads(count)
    return asleep


def _function(library: ctypes.CDLL, name: str) -> Any:
    """A public function of OpenBLAS, or None. Builds of OpenBLAS may add a prefix and a suffix to its name."""
    names = (f"{prefix}openblas_{name}{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", ""))
    return next((getattr(library, name) for name in names if hasattr(library, name)), None)


def _wait_for_sleep() -> bool:
    """Wait until all threads that are not Python's sleep. Returns False if that takes too long."""
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)  # also before the first look: a product that has begun wakes its threads meanwhile
        python = {str(thread.native_id) for thread in threading.enumerate()}
        if not any(_runs(task) for task in TASKS.iterdir() if task.name not in python):
            return True
    return False


def _runs(task: Path) -> bool:
    try:
        status = (task / "stat").read_text()
    except OSError:  # the thread has ended
        return False
    return status.rpartition(")")[2].split()[0] != "S"
