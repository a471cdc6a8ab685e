"""One progress bar for everything that may take longer than two seconds."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PATIENCE = 2.0  # seconds before anything is shown: short work stays silent
LOG_EVERY = 30.0  # seconds between lines where standard error is a file


@contextmanager
def progress_bar(description: str, total: int | None, start: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yield `advance(steps=1, note="")`; show a bar on standard error once the work has lasted two seconds.

    total: None where it is not known. start: what an earlier run had already done, so that speed and time left are
    this run's alone. unit: what a step is, for the speed, like "chunks". Threads may call `advance`.
    Where standard error is no terminal, a line is printed now and then instead of a bar.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )
    began = time.monotonic()
    said = began - LOG_EVERY + PATIENCE
    done, shown, lock = start, False, threading.Lock()

    def counted() -> str:
        of = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        return f"{of} {unit}".rstrip()

    def speed(now: float) -> str:
        return f"{(done - start) / max(now - began, 1e-9):,.0f} {unit}/s" if unit else ""

    task = bar.add_task(description, total=total, completed=start, done=counted(), note="")

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, said, shown
        with lock:
            done += steps
            now = time.monotonic()
            note = " ".join(part for part in (speed(now), note) if part)
            bar.update(task, advance=steps, done=counted(), note=note)
            if console.is_terminal:
                if not shown and now - began > PATIENCE:
                    bar.start()
                    shown = True
            elif now - said > LOG_EVERY and done != total:
                left = (
                    ""
                    if total is None
                    else f", about {(now - began) / max(done - start, 1) * (total - done):.0f} s left"
                )
                print(f"{description}: {counted()}{left} {note}".rstrip(), file=sys.stderr)
                said = now

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
