"""One progress bar for everything that may take longer than two seconds."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DELAY = 2.0  # Seconds before anything is shown, so that short work stays silent.
LINE_INTERVAL = 30.0  # Seconds between lines if no bar can be shown.


@contextmanager
def progress_bar(description: str, total: int | None, start: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yield `advance(steps=1, note="")`; show a bar on standard error once the work has lasted two seconds.

    total: the number of steps, or None if it is unknown. start: steps that an earlier run has already done; they do
    not count towards the speed. unit: what a step processes, such as "chunks"; without it no speed is shown. Threads
    may call `advance`. If standard error is not a terminal, or rich is missing, a line is printed now and then instead.
    """
    bar = _rich_bar() if sys.stderr.isatty() else None
    task = None if bar is None else bar.add_task(description, total=total, completed=start, done="", note="")
    started, next_line, done, lock = time.monotonic(), DELAY, start, threading.Lock()

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, next_line
        with lock:
            done += steps
            seconds = time.monotonic() - started
            count = f"{done:,} {unit}" if total is None else f"{done:,} of {total:,} {unit}"
            note = f"{(done - start) / max(seconds, 1e-9):,.0f} {unit}/s {note}" if unit else note
            if bar is not None:
                bar.update(task, advance=steps, done=count, note=note)
                if seconds > DELAY:
                    bar.start()
            elif seconds > next_line and done != total:
                left = f", about {seconds / max(done - start, 1) * (total - done):.0f} s left" if total else ""
                print(f"{description}: {count.rstrip()}{left} {note}".rstrip(), file=sys.stderr)
                next_line = seconds + LINE_INTERVAL

    try:
        yield advance
    finally:
        if bar is not None and bar.live.is_started:
            bar.stop()


def _rich_bar() -> Any:
    """A bar that has not been started, or None without rich."""
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    texts = [progress.TextColumn(f"{{task.{field}}}") for field in ("description", "fields[done]", "fields[note]")]
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    columns = texts[0], progress.BarColumn(), texts[1], *times, texts[2]
    return progress.Progress(*columns, console=Console(stderr=True), transient=True)
