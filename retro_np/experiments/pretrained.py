"""The bundled models

`retro-np pretrain` makes them and their tokenizer. Neither was trained on held-out modules or near-duplicates.

The paper's checkpoints were never published. These models follow our recipe, on Python 3.11's standard library."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.checkpoint import read_meta, write_tensors
from retro_np.evaluation.compare import evaluate
from retro_np.evaluation.own_text import HASH_DIGITS
from retro_np.experiments import recipe
from retro_np.experiments.corpora import corpus
from retro_np.experiments.experiment import Figures, Verdict, sentence
from retro_np.experiments.lab import Lab
from retro_np.files import write_atomically
from retro_np.parameters import count_parameters
from retro_np.pretrained.bundled import BASELINE, BUNDLED, MEMORY, RETRO, bundled_file, trained_on, write_memory
from retro_np.pretrained.models import SMOLLM2, load_pretrained, read_pretrained
from retro_np.renamed import new_names
from retro_np.report.plots import plot_bars
from retro_np.retrieval.build import build_database
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import STDLIB, Source
from retro_np.retrieval.database import Database
from retro_np.retrieval.hashing import HASHED
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import CHECKPOINT, train
from retro_np.training.memory import MEMORY_SETTINGS, UNTRAINED, begin
from retro_np.tree import named_leaves

MEMORY_CORPORA, MEMORY_STEPS = ("translations", "libraries", "command-reference"), 200
BUNDLED_BUILD: dict[str, Any] = {"tokenizer": str(BUNDLED / TOKENIZER), "training_neighbours": False}


def pretrained_database(out: Path, limit_bytes: int | None = None) -> Database:
    """Build or open a database of the standard library (about limit_bytes) with our tokenizer, not for training."""
    config = replace(recipe.BUILD, **BUNDLED_BUILD, limit_bytes=limit_bytes)
    return build_database(STDLIB, out, config, recipe.EMBEDDER)


def make_pretrained(lab: Lab, out: Path) -> list[Path]:
    """Train the recipe's baseline and RETRO with seed 0, or load them from the lab, and write them to `out`.

    Returns the files: both models in half precision, and the tokenizer. A model's metadata has the settings of its
    training and "trained_on", the content hashes of the training documents (see `bundled.trained_on`)."""
    database = lab.database()
    hashes = _training_hashes(database)
    models, tokenizer = [out / f"{name}.safetensors" for name in (BASELINE, RETRO)], out / TOKENIZER
    for path, model in zip(models, lab.pair(database, 0), strict=True):
        halves = {leaf: array.astype(np.float16) for leaf, array in named_leaves(model.params)}
        run = read_meta(lab.folder / "models" / model.name / CHECKPOINT)["run"]
        write_tensors(path, halves, {"config": model.config.to_dict(), "run": run, "trained_on": hashes})
    write_atomically(tokenizer, (database.path / TOKENIZER).read_bytes())
    return [*models, tokenizer]


def make_memory(lab: Lab, out: Path) -> list[Path]:
    """Train the memory that comes with the package for SmolLM2, on a third each of MEMORY_CORPORA, and write it.

    Returns the file. Its metadata has the settings of its training and "trained_on", as in `make_pretrained`."""
    base = read_pretrained(SMOLLM2)
    sources = [Source(name, str(corpus(name, lab.folder / "corpora")), 1.0) for name in MEMORY_CORPORA]
    size = lab.scale.limit_bytes
    build = BuildConfig(held_out=0.02, limit_bytes=size, neighbours=4, extra_candidates=12)
    database = build_database(sources, lab.folder / "databases" / "memory", build, HASHED, tokenizer=base.tokenizer)
    config, start = begin(base, database, UNTRAINED, np.random.default_rng(0))
    training = TrainingConfig(**MEMORY_SETTINGS | {"steps": MEMORY_STEPS if size is None else lab.scale.steps})
    train(database, config, training, lab.folder / "models" / "memory", description="memory", **start)
    write_memory(lab.folder / "models" / "memory", _training_hashes(database), out / MEMORY.name)
    return [out / MEMORY.name]


def _training_hashes(database: Database) -> list[str]:
    return sorted(record["sha256"][:HASH_DIGITS] for record in database.documents if record["split"] == "train")


def measure(lab: Lab) -> Figures:
    """Bits per byte of the baseline, and of RETRO with retrieval on, off and shuffled; the gain's parts; sizes."""
    database = lab.database(name="stdlib-bundled", vocabulary_size=recipe.BUILD.vocabulary_size, **BUNDLED_BUILD)
    files, length = [bundled_file(BASELINE), bundled_file(RETRO), BUNDLED / TOKENIZER], lab.scale.sequence_length
    models = {"baseline": load_pretrained(BASELINE)[:2], "RETRO": load_pretrained(RETRO)[:2]}
    results = evaluate(
        models, database, lab.folder / "scores" / "bundled", split="valid", k=recipe.NEIGHBOURS, sequence_length=length,
        stride=length // 2, limit=lab.limit(database), trained_on=trained_on(bundled_file(RETRO)),
    )  # fmt: skip
    return {
        "lines": results["models"], "held_out": database.manifest["splits"]["valid"],
        "comparisons": [{"corpus": STDLIB} | record for record in results["comparisons"]],
        **{name: results[name] for name in ("left_out", "without_near_copies", "parts")},
        "parameters": [count_parameters(config, True) for _, config in models.values()],
        "bytes_of_files": sum(path.stat().st_size for path in files),
        "run": new_names(read_meta(bundled_file(RETRO))["run"]["training"]),
    }  # fmt: skip


def draw(figures: Figures, path: Path) -> None:
    """Bars of bits per byte."""
    values = {name: line["bpb"] for name, line in figures["lines"].items()}
    notes = {name: f"{value:.4f}" for name, value in values.items()}
    plot_bars(values, path, "bits per byte of held-out modules", notes=notes)


def verdict(figures: Figures) -> Verdict:
    """The figures in a sentence. The paper published no models to compare with."""
    return None, sentence(__name__, figures)
