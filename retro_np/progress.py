"""One progress bar for everything that may take longer than two seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PATIENCE = 2.0  # seconds before anything is shown: short work stays silent
LOG_EVERY = 30.0  # seconds between lines where standard error is a file


@contextmanager
def progress_bar(description: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(steps=1, note="")`; show a bar on standard error once the work has lasted two seconds.

    start: what an earlier run had already done, so that the time left is estimated from this run alone.
    Where standard error is no terminal, a line is printed now and then instead of a bar.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )
    task = bar.add_task(description, total=total, completed=start, note="")
    began = time.monotonic()
    said = began - LOG_EVERY + PATIENCE
    done, shown = start, False

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, said, shown
        done += steps
        bar.update(task, advance=steps, note=note)
        now = time.monotonic()
        if console.is_terminal:
            if not shown and now - began > PATIENCE:
                bar.start()
                shown = True
        elif now - said > LOG_EVERY and done < total:
            left = (now - began) / max(done - start, 1) * (total - done)
            print(f"{description}: {done} of {total}, about {left:.0f} s left {note}".rstrip(), file=sys.stderr)
            said = now

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
