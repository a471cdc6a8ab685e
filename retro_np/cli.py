"""`retro-np`: the program, and what it does with a mistake. Its commands are in `commands/`."""

import sys

import typer

from retro_np.commands import checks, databases, experiments, inspection, models
from retro_np.errors import UserError
from retro_np.renamed import replace_old_options

PROGRAM, INTERRUPTED = "retro-np", 130
UsageError = typer.BadParameter.__base__  # of every mistake on the command line itself

app = typer.Typer(
    name=PROGRAM,
    help="RETRO, the retrieval-enhanced transformer, in NumPy. Start with `retro-np demo`, which does all of them.",
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
        status = app(replace_old_options(sys.argv[1:]) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except UsageError as error:
        asked = error.ctx.command_path if error.ctx else PROGRAM
        line = " ".join(error.format_message().split()).rstrip(".")
        print(f"{PROGRAM}: {line}; see {asked} --help", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:  # how typer, which takes Ctrl-C before we see it, says so in some versions; in others by 130
        status = INTERRUPTED
    except (UserError, OSError, MemoryError, OverflowError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, MemoryError):
            line = f"not enough memory ({line}): ask for smaller sizes"
        elif isinstance(error, OverflowError):
            line = f"a number is too large ({line}): give a smaller one"
        elif isinstance(error, OSError) and error.strerror:
            line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"{PROGRAM}: {line}", file=sys.stderr)
        sys.exit(2)
    if status == INTERRUPTED:
        print(f"{PROGRAM}: stopped; the same command goes on from what is there", file=sys.stderr)
    sys.exit(status)  # of a command that returned: None
