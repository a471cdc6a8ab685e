"""Several cores for the kernels: parts of a job on a pool of Python threads, while C and Numba let go of the GIL.

No OpenMP: its threads and those of BLAS would wait for work by spinning, each on the other's core. A job is cut into
parts that do not depend on how many threads there are, and sums over parts are taken in the parts' order, so that every
result has the same bits for any number of threads.
"""

import contextlib
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from retro_np.errors import UserError

VARIABLE = "RETRO_NP_THREADS"

_pool: ThreadPoolExecutor | None = None
_count: int | None = None  # None: the environment has not been read


def count() -> int:
    """How many threads work: RETRO_NP_THREADS, `use_threads`, or else the cores. Raises UserError for no number."""
    global _count
    if _count is None:
        given = os.environ.get(VARIABLE)
        _count = _checked(given, VARIABLE) if given else cores()
    return _count


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(number: int) -> None:
    """Let so many threads work from here on. Raises UserError for fewer than one."""
    global _count
    _count = _checked(number, "use_threads")
    _forget_pool()


def parallel_for(job: Callable, parts: Iterable) -> None:
    """Call job(part) for each part, on all threads, the caller's among them; return when all are done.

    The first exception is raised, and parts not begun by then are left. A job that calls `parallel_for` itself runs its
    parts one after another.
    """
    parts = list(parts)
    workers = min(count(), len(parts))
    if workers <= 1 or getattr(_inside, "one", False):
        for part in parts:
            job(part)
        return
    waiting, failed = deque(parts), []  # a deque is shared without a lock, which Ctrl-C could leave locked

    def work():
        _inside.one = True
        try:
            while waiting and not failed:
                try:
                    part = waiting.popleft()
                except IndexError:  # another thread was quicker
                    return
                job(part)
        except BaseException as error:
            failed.append(error)
        finally:
            _inside.one = False

    others = []
    with contextlib.suppress(RuntimeError):  # the interpreter is ending: the caller does it alone
        others += [_threads().submit(work) for _ in range(workers - 1)]
    work()
    for other in others:
        other.result()
    if failed:
        raise failed[0]


def blocks(length: int, size: int) -> list[slice]:
    """Slices of `size`, the last one shorter, that cover `length`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


_inside = threading.local()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, count() - 1), thread_name_prefix="retro_np")
    return _pool


def _forget_pool() -> None:
    """A pool of another size, or of the process that this one was forked from, is of no use."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _checked(number, where) -> int:
    try:
        checked = int(number) if isinstance(number, str) else operator.index(number)
    except (TypeError, ValueError):
        checked = 0
    if checked < 1:
        raise UserError(f"{where} is a number of threads, 1 or more, and not {number!r}")
    return checked
