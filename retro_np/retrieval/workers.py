"""Who does the work on shards: this process, or the workers of a Dask cluster that see the same folders.

A task is a function of `shards.py` and its arguments, pure, so the result is the same bytes either way. Dask pickles
tasks, and who can send a pickle can run code: use a cluster on trusted networks only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.progress import progress_bar

LOCAL = "local"
PATIENCE = "30s"  # for a scheduler that may still be starting


class Task(NamedTuple):
    """A call still to be made: function(*arguments, advance=…), of so many steps."""

    function: Callable
    arguments: tuple
    steps: int


Runner = Callable[..., None]


def run_here(description: str, unit: str, tasks: list[Task], side_by_side: bool = False) -> None:
    """Do tasks in this process, one after another, or side by side on all threads where each would leave cores idle."""
    with progress_bar(description, sum(task.steps for task in tasks), unit=unit) as advance:

        def do(task):
            task.function(*task.arguments, advance=advance)

        if side_by_side:
            threads.parallel_for(do, tasks)
        else:
            for task in tasks:
                do(task)


@contextmanager
def workers(address: str | None) -> Iterator[Runner]:
    """Yield what runs tasks: `run_here` for None, else Dask: "local", a cluster of our own, or a scheduler's address.

    Raises UserError where dask is not installed, and where no scheduler answers. A worker that dies is made good by the
    others; a task that raises stops all.
    """
    if address is None:
        yield run_here
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UserError('--dask needs dask and distributed: pip install "retro-np[dask]"') from error
    if address == LOCAL:
        one_thread = {threads.VARIABLE: "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        settings = {"n_workers": threads.cores(), "threads_per_worker": 1, "dashboard_address": None, "env": one_thread}
        with LocalCluster(**settings) as cluster, Client(cluster) as client:
            yield _on(client)
        return
    try:
        client = Client(address, timeout=PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(f"no Dask scheduler answers at {address}: give tcp://HOST:8786, or local") from error
    with client:
        yield _on(client)


def _on(client: Any) -> Runner:
    from distributed import as_completed

    def run(description: str, unit: str, tasks: list[Task], side_by_side: bool = False) -> None:
        with progress_bar(description, sum(task.steps for task in tasks), unit=unit) as advance:
            steps = {}
            for task in tasks:
                # results are files, not values: a task done before must be done again where its file has gone
                future = client.submit(task.function, *task.arguments, pure=False)
                steps[future] = task.steps
            try:
                for future in as_completed(list(steps)):
                    future.result()  # raises what the task raised
                    advance(steps[future])
            finally:
                client.cancel([future for future in steps if not future.done()])

    return run
