"""`retro-np`: runs a command and turns a user's mistake into one line. The commands are in `commands/`."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from retro_np.errors import UserError
from retro_np.progress import say
from retro_np.renamed import replace_old_options

PROGRAM, INTERRUPTED = "retro-np", 130


def main() -> None:
    """The entry point. Exit status 2 stands for a user's mistake or a missing package, 130 for an interrupt."""
    _open_streams()
    warnings.showwarning = lambda message, *_: say(f"{PROGRAM}: {message}")
    stdout, stderr = sys.stdout, sys.stderr
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # None is ignored in a background job.
        with suppress(ValueError):  # Only the main thread sets handlers.
            signal.signal(signal.SIGINT, _interrupt)
            sys.unraisablehook = partial(_repeat_interrupt, sys.unraisablehook)
    try:
        status, line = _outcome(sys.argv[1:])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if problem := _flush(stdout):
            status, line = 2, f"{PROGRAM}: standard output: {problem}"
    except KeyboardInterrupt:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the process has ended
        status, line = INTERRUPTED, f"{PROGRAM}: interrupted; run the same command to resume"
        _flush(stdout)
    if line:
        say(line)
    _flush(stderr)
    sys.exit(status)


def _interrupt(*_: Any) -> None:
    """Raise KeyboardInterrupt, unless an earlier one is being handled: then files are being tidied up."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        raise KeyboardInterrupt


def _repeat_interrupt(otherwise: Callable[[Any], None], event: Any) -> None:
    """Repeat an interrupt that was lost because it came in a destructor. otherwise: what is done with other errors."""
    if event.exc_type is not KeyboardInterrupt:
        otherwise(event)
    else:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()


def _outcome(arguments: list[str]) -> tuple[int, str]:
    """The exit status of a command line, and the line about what went wrong, or ""."""
    try:
        return run(arguments) or 0, ""
    except (UserError, OSError, MemoryError, OverflowError, ModuleNotFoundError) as error:
        return 2, _line(error)
    except SystemExit as error:  # typer and rich exit if a reader has closed the pipe, and completion when it is done.
        if error.code and "completion" not in " ".join(arguments[:1]):
            return 2, f"{PROGRAM}: standard output was closed before everything was written"
        return 2 if error.code else 0, ""


def _open_streams():
    """Open the null device in place of closed standard streams, so that no file of a command gets their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with suppress(AttributeError, ValueError):  # a stream of another kind, or closed by the program
            stream.reconfigure(errors="replace")  # A terminal may not be UTF-8.
        setattr(sys, name, stream)


def _flush(stream):
    """The reason why a stream's text cannot be written, or "". The text is then dropped: the exit would flush again."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error.strerror
    except ValueError:  # closed by the program
        pass
    return ""


def _line(error):
    """The line for an error. Raises the error itself if a module is missing that no package of ours brings."""
    line = str(error)
    if isinstance(error, ModuleNotFoundError):
        from retro_np.info import PACKAGES

        package = str(error.name).partition(".")[0].replace("_", "-")
        if package not in PACKAGES:
            raise error
        return f"{PROGRAM} needs {package}: pip install {package}"
    if isinstance(error, MemoryError):
        line = f"not enough memory ({line}): choose smaller sizes"
    elif isinstance(error, OverflowError):
        line = f"a number is too large ({line}): choose a smaller one"
    elif isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{PROGRAM}: {line}"


def run(arguments: list[str]) -> int | None:
    """Run a command line. Returns its exit status; None means success."""
    import typer

    from retro_np.commands import app

    usage_error: Any = typer.BadParameter.__base__  # UsageError, which typer does not export
    try:
        return app(replace_old_options(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else PROGRAM
        raise UserError(f"{error.format_message().rstrip('.')}; see {command} --help") from error
    except typer.Abort:  # Ctrl-C in some versions of typer; others return the status
        return INTERRUPTED
