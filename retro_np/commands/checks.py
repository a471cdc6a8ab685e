"""`retro-np gradcheck`, `info`, `demo`."""

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, Context, Exit, Option

from retro_np.commands.evaluation import print_results
from retro_np.commands.options import Seed, console, finite, is_typed
from retro_np.commands.user_function import user_function
from retro_np.errors import UserError
from retro_np.progress import progress_bar, say


def gradcheck(
    name: Annotated[str, Argument(metavar="FILE.py:FUNCTION|NAME", help="Your function, or an operator: CCA, ….")] = "",
    shape: Annotated[list[str] | None, Option(metavar="X=3,4", help="Shape of X, repeatable. X= is a scalar.")] = None,
    frozen: Annotated[list[str] | None, Option(help="What needs no gradient, repeatable: a parameter, a leaf.")] = None,
    tolerance: Annotated[float, Option(min=0, help="Largest error that passes. For files the default is 3e-9.")] = 1e-6,
    seed: Seed = 0,
    *,
    context: Context,
) -> None:
    """Check your backward pass, or all of ours, against finite differences.

    FUNCTION returns (value, vjp), as `retro_np.gradcheck` describes. Its arguments come from example() in FILE.py. It
    returns a tuple or list of them, a dict of named ones, or a single array or number. A tree that is the only argument
    is returned as (tree,). With --shape, example() is not called: each parameter without a default needs one, and
    normal numbers are drawn. The exit status is 1 if the gradient is wrong or cannot be told, and 2 for a wrong call.

    Without a file, this checks every operator and the whole model, in float64. All checks take about ten seconds.

    Example: `retro-np gradcheck my_layer.py:my_function --shape x=3,4`"""
    from retro_np.checking import gradcheck as check_gradients

    tolerance = finite("--tolerance", tolerance)
    if ".py" in name or ":" in name:
        chosen = tolerance if is_typed(context, "tolerance") else None
        with user_function(name, shape or [], seed) as (f, args):
            report = check_gradients(f, *args, raise_exception=False, frozen=frozen or (), tolerance=chosen, seed=seed)
        console.print(str(report), soft_wrap=True)
        if not report:
            say(report.message)
            raise Exit(1)
        console.print(f"{name} passed: no error above {report.error:.1e}")
        return
    if shape or frozen:
        raise UserError("--shape and --frozen need FILE.py:FUNCTION")
    from retro_np.nn.checks import checks

    table = Table("operator", "source", "worst error", title="pullback against central differences, float64")
    failures = []
    matching = [check for check in checks(seed) if name in check.name]
    if not matching:
        raise UserError(f"no operator's name contains {name!r}; choose from: {'; '.join(c.name for c in checks())}")
    with progress_bar("checking", len(matching)) as advance:
        for check in matching:
            report = check_gradients(check.f, *check.arrays, raise_exception=False, tolerance=tolerance, seed=seed)
            table.add_row(check.name, check.source, f"{report.error:.1e}" if report else "FAILS")
            failures += [] if report else [f"{check.name}: {report.message}"]
            advance(note=check.name)
    console.print(table)
    if failures:
        raise UserError("; ".join(failures))
    console.print(f"{len(matching)} of {len(matching)} passed: no error above {tolerance:g}")


def info() -> None:
    """Show what is installed and which kernels run.

    Example: `retro-np info`"""
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

    Example: `retro-np demo --minutes 5`"""
    from retro_np.experiments.demo import run_demo

    print_results(run_demo(minutes, out, seed, from_scratch, console))
    loss = "loss.png, " if from_scratch else ""
    console.print(
        f"{out} contains results.json, losses.npz, {loss}bpb_alpha.png, samples.html, inspect.html, the database db/, "
        f"and the {'models trained here' if from_scratch else 'bundled models'}, baseline/ and retro/."
    )
