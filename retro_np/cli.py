"""`retro-np`: the program, and what it does with a mistake. Its commands are in `commands/`."""

import sys

import typer

from retro_np.commands import checks, databases, experiments, inspection, models
from retro_np.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    name="retro-np",
    help="RETRO, the retrieval-enhanced transformer, in NumPy. Start with `retro-np demo`, which does all of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    databases.build, databases.search, databases.add, databases.remove, databases.compact, databases.verify,
    models.train, models.evaluate, models.sample, inspection.inspect, experiments.experiment, experiments.pretrain,
    checks.gradcheck, checks.info, checks.demo,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """The entry point: a user's mistake is one line and status 2, an interrupt status 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer's answer to Ctrl-C, which it takes before we see it
            print("retro-np: stopped; the same command goes on from what is there", file=sys.stderr)
        raise
    except (UserError, OSError, MemoryError, OverflowError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, MemoryError):
            line = f"not enough memory ({line}): ask for smaller sizes"
        elif isinstance(error, OverflowError):
            line = f"a number is too large ({line}): give a smaller one"
        elif isinstance(error, OSError) and error.strerror:
            line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"retro-np: {line}", file=sys.stderr)
        sys.exit(2)
