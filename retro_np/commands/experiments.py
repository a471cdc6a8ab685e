"""`retro-np experiment`, `pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from retro_np.commands.shared import console


def experiment(
    name: Annotated[str | None, typer.Argument(help="Which; without a name they are listed.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where results, models and databases go.")] = Path(
        "runs/experiments"
    ),
    scale: Annotated[str, typer.Option(help="small, or tiny to see that it runs.")] = "small",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="How many, where a claim hangs on them. Default: three.")
    ] = None,
) -> None:
    """A figure or table of the paper, in small: NAME.json and NAME.png in OUT. Stopped, the same command goes on."""
    from retro_np.experiments.experiment import NAMES, find_experiment, result_folder, run_experiment

    if name is None:
        for each in NAMES:
            console.print(f"{each:20} {find_experiment(each).title}")
        return
    result = run_experiment(name, out, scale, seeds)
    console.print(result["verdict"])
    agreement = {None: "There is no shape to agree with.", True: "The shape agrees with the paper's."}
    console.print(agreement.get(result["agrees"], "The shape does not agree with the paper's."))
    console.print(f"{result_folder(out, scale) / name}.json and .png hold the figures; {result['seconds']:.0f} s.")


def pretrain(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where lab and files go.")] = Path("runs/experiments"),
    scale: Annotated[str, typer.Option(help="small, or tiny to see that it runs.")] = "small",
) -> None:
    """Train what is in the box: a baseline and a RETRO of the small-scale recipe on the standard library.

    OUT/pretrained then holds retro.safetensors, baseline.safetensors and tokenizer.json, as retro_np/pretrained does;
    of the tiny scale, OUT/tiny/pretrained.
    """
    from retro_np.experiments.experiment import open_lab, result_folder
    from retro_np.experiments.pretrained import make_pretrained

    with open_lab(out, scale) as lab:
        for path in make_pretrained(lab, result_folder(out, scale) / "pretrained"):
            console.print(f"{path}: {path.stat().st_size:,} bytes")
