"""Run the tasks of a build in this process, or on the workers of a Dask cluster that see the same folders.

A task is a pure function of `shards.py` with its arguments, so the bytes written are the same in either case. Dask
pickles tasks, and whoever can send a worker a pickle can run code there: use a cluster on trusted networks only."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.progress import progress_bar

LOCAL = "local"
SCHEDULER_TIMEOUT = "30s"  # The scheduler may still be starting.


class Task(NamedTuple):
    """A call to make: function(*arguments, advance=…). steps: its length for the progress bar."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    steps: int


Runner = Callable[..., None]


def run_here(description: str, unit: str, tasks: list[Task], parallel: bool = False) -> None:
    """Run tasks in this process, one after another. parallel: in threads, for tasks that use one core each."""
    with progress_bar(description, sum(task.steps for task in tasks), unit=unit) as advance:
        for group in [tasks] if parallel else [[task] for task in tasks]:
            threads.parallel_for(lambda task: task.function(*task.arguments, advance=advance), group)


@contextmanager
def workers(address: str | None) -> Iterator[Runner]:
    """Yield a function that runs tasks, with the signature of `run_here`.

    address: None runs them in this process, "local" on a Dask cluster started for the purpose, and a scheduler's
    address on that scheduler's cluster. If a worker dies, the others run its tasks. An exception in a task ends the
    run. Raises UserError if dask is not installed or no scheduler answers."""
    if address is None:
        yield run_here
        return
    try:
        from distributed import Client, LocalCluster, as_completed
    except ImportError as error:
        raise UserError('--dask needs dask and distributed: pip install "retro-np[dask]"') from error
    with ExitStack() as stack:
        if address == LOCAL:
            env = {threads.THREADS_VARIABLE: "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            settings = {"n_workers": threads.cores(), "threads_per_worker": 1, "dashboard_address": None, "env": env}
            address = stack.enter_context(LocalCluster(**settings)).scheduler_address
        try:
            client = stack.enter_context(Client(address, timeout=SCHEDULER_TIMEOUT))
        except Exception as error:  # The errors of unknown protocols share no base class.
            raise UserError(f"no Dask scheduler answers at {address}: give tcp://HOST:8786, or local") from error

        def run(description: str, unit: str, tasks: list[Task], parallel: bool = False) -> None:
            with progress_bar(description, sum(task.steps for task in tasks), unit=unit) as advance:
                # pure=False: results are files, so a task must run again if its file has been deleted
                steps = {client.submit(task.function, *task.arguments, pure=False): task.steps for task in tasks}
                try:
                    for future in as_completed(list(steps)):
                        future.result()  # raises the task's exception
                        advance(steps[future])
                finally:
                    client.cancel([future for future in steps if not future.done()])

        yield run
