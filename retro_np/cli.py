"""`retro-np`: runs a command and turns a user's mistake into one line. The commands are in `commands/`."""

import sys
from typing import Any

from retro_np.errors import UserError
from retro_np.renamed import replace_old_options

PROGRAM, INTERRUPTED = "retro-np", 130


def main() -> None:
    """The entry point. Exit status 2 stands for a user's mistake or a missing package, 130 for an interrupt."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # A terminal may not be UTF-8.
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (UserError, OSError, MemoryError, OverflowError, ModuleNotFoundError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            from retro_np.info import PACKAGES

            package = str(error.name).partition(".")[0].replace("_", "-")
            if package not in PACKAGES:
                raise
            print(f"{PROGRAM} needs {package}: pip install {package}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, MemoryError):
            line = f"not enough memory ({line}): choose smaller sizes"
        elif isinstance(error, OverflowError):
            line = f"a number is too large ({line}): choose a smaller one"
        elif isinstance(error, OSError) and error.strerror:
            line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"{PROGRAM}: {line}", file=sys.stderr)
        sys.exit(2)
    if status == INTERRUPTED:
        print(f"{PROGRAM}: interrupted; run the same command to resume", file=sys.stderr)
    sys.exit(status)


def run(arguments: list[str]) -> int | None:
    """Run a command line. Returns its exit status; None means success."""
    import typer

    from retro_np.commands import app

    usage_error: Any = typer.BadParameter.__base__  # UsageError, which typer does not export
    try:
        return app(replace_old_options(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else PROGRAM
        line = " ".join(error.format_message().split()).rstrip(".")
        raise UserError(f"{line}; see {command} --help") from error
    except typer.Abort:  # Ctrl-C in some versions of typer; others return the status
        return INTERRUPTED
