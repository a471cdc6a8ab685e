"""Make `files/memory.*` with version 0.2.0: a tiny decoder of others, and runs that added a memory to it or adapted it.

    python tests/compatibility/make_memory.py

Writes memory.tar.gz (the decoder, a database with its tokenizer, a finished run, one that stopped at a checkpoint, an
adapted decoder) and memory.json (what this version computed from them)."""

# ruff: noqa: E402, SIM905 - variables must be set before NumPy is imported; options are easier to read as a string

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
# With these, OpenBLAS uses the same kernels on every x86-64 processor with AVX2. It reads them when NumPy is imported.
VARIABLES = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}
os.environ.update(VARIABLES)

import numpy as np
from memory_runs import TRAINING, begin, train_memory, write_decoder
from recorded import environment, pack, parameters_sha256, write
from support import write_corpus

from retro_np import Database, generate, load_pretrained
from retro_np.cli import run as command
from retro_np.nn.memory import is_added
from retro_np.training.loop import train
from retro_np.training.memory import adapt
from retro_np.tree import named_leaves

FILES = Path(__file__).parent / "files"
BUILD = "--embedder hashing --d-key 16 --chunk-size 8 --held-out 0.3 --neighbours 4 --extra-candidates 6".split()
WINDOW = ["--sequence-length", "32", "--stride", "16"]
SAMPLE = {"length": 16, "k": 2, "temperature": 0.8, "top_p": 0.95, "seed": 3}
PROMPT = "for value in index: token = not self and chunk"
STOPPED_AFTER = 3  # steps; the last checkpoint is that of step 2
RUNS = ("run", "adapted")


def main() -> None:
    """Make everything in a temporary folder and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model = write_decoder(Path("model"))
        write_corpus(Path("corpus"), 12)
        command(["build", "corpus", *BUILD, "--tokenizer", str(model / "tokenizer.json"), "-o", "db"])
        database = Database.open("db")
        train_memory(database, model, Path("run"))
        with contextlib.suppress(KeyboardInterrupt):
            train_memory(database, model, Path("stopped"), callbacks=[stop])
        adapt_decoder(database, model)
        for log in Path().glob("*/log.jsonl"):  # With fixed speeds, the archive is reproducible.
            lines = [json.loads(line) | {"tokens_per_s": 1000.0} for line in log.read_text().splitlines()]
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write(FILES / "memory.json", record(database))
        pack(FILES / "memory.tar.gz", ["model", "db", *RUNS, "stopped"])


def stop(line: dict) -> None:
    """Interrupt a training."""
    if line["step"] == STOPPED_AFTER - 1:
        raise KeyboardInterrupt


def adapt_decoder(database: Database, model: Path) -> None:
    """A run that adapts the decoder without retrieval."""
    base = begin(model, database)[2]
    params, config, _ = load_pretrained(model)
    config = replace(config, chunk_size=database.chunk_size)
    params, config = adapt(params, config, (1, 2), np.random.default_rng(0), rank=2)
    given = {"begin_from": (params, base["sha256"]), "trainable": is_added, "base": base}
    train(database, config, TRAINING, Path("adapted"), **given)


def added(name: str) -> dict:
    """What a run added, by name."""
    return {leaf: array for leaf, array in named_leaves(load_pretrained(Path(name))[0]) if is_added(leaf)}


def record(database: Database) -> dict:
    """What this version computes from these files."""
    models = {}
    for name in RUNS:
        command(["evaluate", name, "db", *WINDOW, "-o", f"evaluation of {name}"])
        lines = json.loads(Path(f"evaluation of {name}", "results.json").read_text())["models"]
        models[name] = {condition: line["bpb"] for condition, line in lines.items()}
    params, config, tokenizer = load_pretrained(Path("run"))
    tokens, retrieved = generate(params, config, tokenizer.encode(PROMPT).ids, database=database, **SAMPLE)
    return {
        "environment": environment(),
        "variables": VARIABLES,
        "window": WINDOW,
        "added": {name: parameters_sha256(added(name)) for name in RUNS},
        "models": models,
        "sample": {
            "prompt": PROMPT,
            "settings": SAMPLE,
            "tokens": tokens.tolist(),
            "retrieved": [chunk.ids.tolist() for chunk in retrieved],
        },
    }


if __name__ == "__main__":
    main()
