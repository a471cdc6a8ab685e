"""`retro-np gradcheck`, `info`, `demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from retro_np.commands.shared import Seed, console, print_results
from retro_np.errors import UserError


def gradcheck(
    name: Annotated[str, typer.Argument(help="Only operators whose name holds this, e.g. CCA.")] = "",
    tolerance: Annotated[float, typer.Option(help="The largest error that passes.")] = 1e-6,
    seed: Seed = 0,
) -> None:
    """Check every operator's backward pass, and the whole model's, against finite differences in float64.

    About a minute for all of them.
    """
    from retro_np.checking import GradientError
    from retro_np.checking import gradcheck as check_gradients
    from retro_np.nn.checks import checks
    from retro_np.progress import progress_bar

    table = Table("operator", "source", "worst error", title="pullback against central differences, float64")
    failures = []
    chosen = [check for check in checks(seed) if name in check.name]
    if not chosen:
        raise UserError(f"no operator's name holds {name!r}; there are {', '.join(c.name for c in checks(seed))}")
    with progress_bar("checking", len(chosen)) as advance:
        for check in chosen:
            try:
                shown = f"{check_gradients(check.f, *check.arrays, tolerance=tolerance, seed=seed):.1e}"
            except GradientError as error:
                failures.append(f"{check.name}: {error}")
                shown = "FAILS"
            table.add_row(check.name, check.source, shown)
            advance(note=check.name)
    console.print(table)
    if failures:
        raise UserError("; ".join(failures))
    console.print(f"all {len(chosen)} below {tolerance:g}")


def info() -> None:
    """What is installed, which kernel runs where, and what is missing."""
    from retro_np.info import facts

    table = Table(show_header=False)
    for name, value in facts():
        table.add_row(name, value)
    console.print(table)


def demo(
    minutes: Annotated[
        float | None, typer.Option(min=0.5, help="About how long it may take, 10 if not said.", show_default=False)
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train both models here, instead of those in the box.")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int | None, typer.Option(min=0, help="Settles everything that is drawn.")] = None,
) -> None:
    """The whole path on Python's standard library: database, baseline, RETRO, evaluation, samples.

    The two models are those in the box, or trained anew. What it makes is in runs/demo. Started again it goes on where
    it was, or shows what is there.
    """
    from retro_np.experiments.demo import run_demo

    print_results(run_demo(minutes, out, seed, from_scratch, console))
    loss = "loss.png, " if from_scratch else ""
    console.print(
        f"In {out}: results.json, losses.npz, {loss}bpb_alpha.png, samples.html, inspect.html, db/, and a checkpoint "
        f"in baseline/ and retro/, {'trained here' if from_scratch else 'those in the box'}"
    )
