"""What reaches the terminal: texts that cannot control it, messages, and progress bars."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

DELAY = 2.0  # Seconds before anything is shown, so that short work stays silent.
LINE_INTERVAL = 30.0  # Seconds between lines if no bar can be shown.
# Characters without a glyph of their own. Those that ordinary writing needs are hidden only where they join nothing:
# joiners and zero-width spaces after ASCII or after each other, variation selectors after what they cannot vary.
JOINERS, SELECTORS = "\u200b-\u200d", "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
INVISIBLE = re.compile(
    r"\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200e\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    rf"\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]|(?<=[\x00-\x7f{JOINERS}])[{JOINERS}]"
    rf"|(?<=[\x00-\x22\x24-\x29\x2b-\x2f\x3a-\x7f{JOINERS}{SELECTORS}])[{SELECTORS}]"
)


def visible(text: str) -> str:
    """A text with visible symbols or code points in place of its invisible characters, except tabs and line ends.

    Replaced are control characters, bidirectional controls, lone surrogates, line separators, tags, and characters of
    no width where writing has no use for them. Emoji sequences and joined scripts stay as they are."""
    return INVISIBLE.sub(_symbol, text)


def _symbol(match):
    code = ord(match[0][-1])
    return "\n" if match[0] == "\r\n" else chr(0x2400 + code) if code < 32 else f"[U+{code:04X}]"


def one_line(text: str) -> str:
    """A text on one line, without repeated spaces, and with its invisible characters visible."""
    return " ".join(visible(text).split())


def counted(n: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 document, 2,000 documents. plural: what takes the noun's place, else it gets an s."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def say(text: str) -> None:
    """Print `one_line` of a text to standard error. If that is closed or full, nothing is printed or raised."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    line = one_line(text).encode(encoding, "backslashreplace").decode(encoding)
    if sys.stderr is not None:  # `print` would take None for standard output.
        with contextlib.suppress(OSError, ValueError):  # ValueError: the program has closed the stream.
            print(line, file=sys.stderr)


def safe_console(**options: Any) -> "Console":
    """A rich console that sends no control sequence except its own. options: as in `rich.console.Console`.

    Invisible characters of every text are made visible; of a string, before it is laid out. Markup, highlighting and
    emoji codes are off, because names may contain brackets and colons."""
    from rich.console import Console

    class SafeConsole(Console):
        def render_str(self, text, **settings):
            return super().render_str(visible(text), **settings)

        def render(self, renderable, options=None):
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

        def print(self, *objects, **settings):
            try:
                super().print(*objects, **settings)
            except OSError as error:
                name = "standard error" if self.stderr else "standard output"
                raise OSError(error.errno, error.strerror, name) from error

    return SafeConsole(**{"markup": False, "highlight": False, "emoji": False} | options)


@contextlib.contextmanager
def progress_bar(description: str, total: int | None, start: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yield `advance(steps=1, note="")`; show a bar on standard error once the work has lasted two seconds.

    description: the label; without one nothing is shown. total: the number of steps, or None if it is unknown. start:
    steps that an earlier run has already done; they do not count towards the speed. unit: what a step processes, such
    as "chunks"; without it no speed is shown. Threads may call `advance`. If standard error is no terminal, or rich is
    missing, a line is printed now and then instead."""
    bar = None if not description or getattr(sys.stderr, "closed", True) or not sys.stderr.isatty() else _rich_bar()
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
            elif description and seconds > next_line and done != total:
                left = f", about {seconds / max(done - start, 1) * (total - done):.0f} s left" if total else ""
                say(f"{description}: {count.rstrip()}{left} {note}")
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
    except ModuleNotFoundError:
        return None
    names = "description", "fields[done]", "fields[note]"
    texts = [progress.TextColumn(f"{{task.{name}}}", markup=False) for name in names]
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    columns = texts[0], progress.BarColumn(), texts[1], *times, texts[2]
    return progress.Progress(*columns, console=safe_console(stderr=True), transient=True)
