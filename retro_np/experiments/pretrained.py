"""The checkpoint in the box: a baseline and a RETRO of the recipe, trained on Python's standard library.

`retro_np/pretrained/` holds both in half precision, and their tokenizer; `retro-np pretrain` is what made them.
Held-out modules, chosen by a hash of the name, were seen by neither tokenizer nor training; nor was one like them.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from retro_np.checkpoint import read_meta, write_tensors
from retro_np.evaluation.compare import LINES
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import Lab, Model, bits
from retro_np.files import sha256_of
from retro_np.parameters import count_parameters
from retro_np.pretrained.bundled import BASELINE, BUNDLED, RETRO, bundled_file, load_pretrained
from retro_np.report.plots import plot_bars
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import STDLIB
from retro_np.retrieval.database import Database
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.training.loop import CHECKPOINT
from retro_np.tree import leaves

BUNDLED_BUILD = {"tokenizer": str(BUNDLED / TOKENIZER), "training_neighbours": False}


def pretrained_database(out: Path, limit_bytes: int | None = None) -> Database:
    """The standard library of this Python, cut with the tokenizer in the box, without training chunks' neighbours.

    limit_bytes: only a slice of it, about so many bytes. Built, or opened where it is there.
    """
    config = replace(recipe.BUILD, **BUNDLED_BUILD, limit_bytes=limit_bytes)
    return build_database(STDLIB, out, config, recipe.EMBEDDER)


def make_pretrained(lab: Lab, out: Path) -> list[Path]:
    """Train what is in the box, seed 0 of the recipe, or find it trained in the lab; write it to `out`.

    Returns the files: the two models in half precision, with the run that made them in their metadata, and the
    tokenizer.
    """
    database = lab.database()
    files = []
    for name, model in zip((BASELINE, RETRO), lab.pair(database, 0), strict=True):
        halves = {leaf: array.astype(np.float16) for leaf, array in leaves(model.params)}
        run = read_meta(lab.folder / "models" / model.name / CHECKPOINT)["run"]
        files.append(out / f"{name}.safetensors")
        write_tensors(files[-1], halves, {"config": model.config.to_dict(), "run": run})
    files.append(out / TOKENIZER)
    files[-1].write_bytes((database.path / TOKENIZER).read_bytes())
    return files


def measure(lab):
    """bpb of both models with retrieval on, off and shuffled; and what the box holds."""
    database = lab.database(name="stdlib-box", vocabulary_size=recipe.BUILD.vocabulary_size, **BUNDLED_BUILD)
    models = [Model(*load_pretrained(name)[:2], sha256_of(bundled_file(name))) for name in (BASELINE, RETRO)]
    losses = lab.conditions(database, *models)
    ratios = lab.leakage(database)
    return {
        "lines": {name: bits(losses[name], ratios) for name in LINES},
        "parameters": [count_parameters(model.config, True) for model in models],
        "bytes_of_files": sum(path.stat().st_size for path in BUNDLED.iterdir() if path.suffix != ".md"),
        "held_out": database.manifest["splits"]["valid"],
        "run": read_meta(bundled_file(RETRO))["run"]["training"],
    }


def draw(figures, path):
    """A bar a line."""
    values = {name: figures["lines"][name]["bpb"] for name in LINES}
    notes = {name: f"{value:.4f}" for name, value in values.items()}
    plot_bars(values, path, "bits per byte of held-out modules", notes=notes)


def verdict(figures):
    """There is nothing of the paper to agree with."""
    shown = ", ".join(f"{name} {figures['lines'][name]['bpb']:.4f}" for name in LINES)
    baseline, retro = figures["parameters"]
    return None, (
        f"The checkpoint in the box ({figures['bytes_of_files'] / 1e6:.1f} MB; {retro:,} parameters, its baseline "
        f"{baseline:,}) on {figures['held_out']['documents']} held-out modules, bits per byte: {shown}."
    )


EXPERIMENT = Experiment(
    "The checkpoint in the box",
    "The paper's checkpoints were never published. These are of the recipe, on the standard library of Python 3.11.",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
