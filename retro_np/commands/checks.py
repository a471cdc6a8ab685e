"""`retro-np gradcheck`, `info`, `demo`."""

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, Option

from retro_np.commands.shared import Seed, console, print_results
from retro_np.errors import UserError


def gradcheck(
    name: Annotated[str, Argument(metavar="NAME", help="Check only operators whose names contain NAME: CCA, ….")] = "",
    tolerance: Annotated[float, Option(help="The largest error that passes.")] = 1e-6,
    seed: Seed = 0,
) -> None:
    """Check every backward pass against finite differences.

    This covers every operator and the whole model, in float64. All checks together take about a minute.

    Example: `retro-np gradcheck attention`
    """
    from retro_np.checking import GradientError
    from retro_np.checking import gradcheck as check_gradients
    from retro_np.nn.checks import checks
    from retro_np.progress import progress_bar

    table = Table("operator", "source", "worst error", title="pullback against central differences, float64")
    failures = []
    matching = [check for check in checks(seed) if name in check.name]
    if not matching:
        names = "; ".join(check.name for check in checks(seed))
        raise UserError(f"no operator's name contains {name!r}; choose from: {names}")
    with progress_bar("checking", len(matching)) as advance:
        for check in matching:
            try:
                outcome = f"{check_gradients(check.f, *check.arrays, tolerance=tolerance, seed=seed):.1e}"
            except GradientError as error:
                failures.append(f"{check.name}: {error}")
                outcome = "FAILS"
            table.add_row(check.name, check.source, outcome)
            advance(note=check.name)
    console.print(table)
    if failures:
        raise UserError("; ".join(failures))
    console.print(f"{len(matching)} of {len(matching)} passed: no error above {tolerance:g}")


def info() -> None:
    """Show what is installed and which kernels run.

    Example: `retro-np info`
    """
    from retro_np.info import facts

    table = Table(show_header=False)
    for row in facts():
        table.add_row(*row)
    console.print(table)


def demo(
    minutes: Annotated[float | None, Option(min=0.5, help="Approximate duration in minutes. Default: 10.")] = None,
    from_scratch: Annotated[bool, Option("--from-scratch", help="Train both models first.")] = False,
    out: Annotated[Path, Option("-o", "--out", help="Folder of the results.")] = Path("runs/demo"),
    seed: Annotated[int | None, Option(min=0, help="Random seed.")] = None,
) -> None:
    """Go through all steps on Python's standard library.

    The steps are database, baseline, RETRO, evaluation and samples. The two models are the bundled ones; with
    --from-scratch they are trained. If interrupted, run the same command to resume. A finished demo is shown again.

    Example: `retro-np demo --minutes 5`
    """
    from retro_np.experiments.demo import run_demo

    print_results(run_demo(minutes, out, seed, from_scratch, console))
    loss = "loss.png, " if from_scratch else ""
    console.print(
        f"{out} contains results.json, losses.npz, {loss}bpb_alpha.png, samples.html, inspect.html, the database db/, "
        f"and the {'models trained here' if from_scratch else 'bundled models'}, baseline/ and retro/."
    )
