"""Threads for the kernels: parts of a job run on a pool of Python threads, while C and Numba release the GIL.
OpenMP is not used: its threads and BLAS's would wait by spinning on each other's cores. A job is cut into parts that do
not depend on the number of threads, and their sums are added in order, so the bits do not depend on it either."""

import contextlib
import contextvars
import operator
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from retro_np.errors import UserError

THREADS_VARIABLE = "RETRO_NP_THREADS"

_pool: ThreadPoolExecutor | None = None
_count: int | None = None  # None until the environment is read
_worker = threading.local()


def count() -> int:
    """The number of threads: from `use_threads` or RETRO_NP_THREADS (UserError unless positive), else `cores`."""
    global _count
    if _count is None:
        _count = _checked(os.environ.get(THREADS_VARIABLE) or cores(), THREADS_VARIABLE)
    return _count


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(number: int) -> None:
    """Set the number of threads from now on. Raises UserError for fewer than one."""
    global _count
    _count = _checked(number, "use_threads")
    end()


def parallel_for(job: Callable[[Any], object], parts: Iterable[Any]) -> None:
    """Call job(part) for each part, on all threads including the caller's, and return when all are done.
    After an exception no part is started, and the first one is raised. A call from a job runs its parts in sequence."""
    global _pool
    parts = list(parts)
    workers = min(count(), len(parts))
    if workers <= 1 or getattr(_worker, "busy", False):
        for part in parts:
            job(part)
        return
    waiting, failed = iter(parts), list[BaseException]()  # this iterator needs no lock, which Ctrl-C could leave locked

    def work() -> None:
        _worker.busy = True
        try:
            for part in waiting:
                if failed:
                    return
                job(part)
        except BaseException as error:
            failed.append(error)
        finally:
            _worker.busy = False

    pool = _pool = _pool or ThreadPoolExecutor(max(1, count() - 1), thread_name_prefix="retro_np")
    others = []
    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down, so the caller works alone
        others += [pool.submit(contextvars.copy_context().run, work) for _ in range(workers - 1)]
    work()
    for other in others:
        other.result()
    if failed:
        raise failed[0]


def blocks(length: int, size: int) -> list[slice]:
    """Slices of `size` that cover `length`; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def end() -> None:
    """End the pool's threads, unless a job of theirs calls. The next job starts new ones."""
    if _pool is not None and not getattr(_worker, "busy", False):
        _pool.shutdown()
    _forget_pool()


def _forget_pool() -> None:
    """Drop a pool of another size, or one whose threads did not survive a fork."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _checked(number: int | str, where: str) -> int:
    try:
        checked = int(number) if isinstance(number, str) else operator.index(number)
    except (TypeError, ValueError):
        checked = 0
    if checked < 1:
        raise UserError(f"{where}: the number of threads must be an integer of at least 1, not {number!r}")
    return checked
