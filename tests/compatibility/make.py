"""Make `files/` with version 0.1.0 (commit 5116341): databases, runs and checkpoints that the current code must read.

    cd /tmp && python3 -m venv old && old/bin/pip install REPOSITORY_AT_5116341
    old/bin/python PATH/tests/compatibility/make.py

Writes old.tar.gz (two corpora, databases, runs, checkpoints), expected.json (what the old version computed from them)
and commands.json (its commands and their parameters).
"""

# ruff: noqa: E402, SIM905 - variables must be set before NumPy is imported; command lines are easier to read as strings

import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# With these, OpenBLAS uses the same kernels on every x86-64 processor with AVX2. It reads them when NumPy is imported.
VARIABLES = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}
os.environ.update(VARIABLES)

import numpy as np
import typer
from recorded import arrays_of, environment, file_hashes, pack, parameters_sha256, write

from retro_np import Database, generate, load_params, save_params
from retro_np.cli import app
from retro_np.parameters import write_tensors
from retro_np.report.samples import prompt_tokens

FILES = Path(__file__).parent / "files"
WORDS = (
    "a chunk of text is kept with the key that a frozen encoder gives it and every later chunk looks for its nearest "
    "neighbours among them so the model reads what others wrote about ships tides lamps gardens winters and letters"
).split()
CHECKPOINTS = ("params.safetensors", "float16.safetensors")
MODEL = (
    "--d-model 8 --d-ffw 16 --n-heads 2 --d-head 4 --n-layers 2 --cca-layers 2 --encoder-layers 1 --share-embeddings "
    "--tie-readout --sequence-length 32 --batch-size 2 --steps 9 --checkpoint-every 3 --warmup 2 --learning-rate 0.01"
).split()
CURRICULUM = "--lent 0.5 --lent-steps 6 --retrieval-off 0.25".split()
BUILD = (
    "corpus --embedder hashing --d-key 16 --chunk-size 8 --vocabulary-size 280 --held-out 0.25 --deduplicate 0.8 "
    "--neighbours 2 --spares 3 --shard-mb 0.001"
).split()
QUERIES = ["ships and tides", "the model reads letters", "winter"]
WINDOW = "--sequence-length 32 --stride 16".split()
SAMPLE = {"length": 24, "k": 2, "temperature": 0.8, "top_p": 0.95, "seed": 3}
PROMPT = "the model reads what others wrote about ships"

# Runs the command line until a function is called for the n-th time, and then ends the process as a kill would.
KILLED = """
import importlib, os, sys
module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = importlib.import_module(module)
real = getattr(module, name)
def counted(*arguments, **options):
    global calls
    calls -= 1
    if calls == 0:
        os._exit(9)
    return real(*arguments, **options)
setattr(module, name, counted)
sys.argv[1:] = sys.argv[4:]
from retro_np.cli import main
main()
"""


def main() -> None:
    """Make everything in a temporary folder and pack it."""
    assert importlib.metadata.version("retro-np") == "0.1.0"
    FILES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_corpus(Path("corpus"), 12, seed=1)
        write_corpus(Path("more"), 3, seed=2)
        make()
        write(FILES / "expected.json", record())
        # Only the edit folders of these databases are packed: `finished` has the other files.
        edits = ["half_added/edit", "not_moved/edit"]
        databases = ["finished", "unfinished", "edited", *edits]
        pack(FILES / "old.tar.gz", ["corpus", "more", *databases, "run", "stopped", *CHECKPOINTS])
    write(FILES / "commands.json", commands())


def write_corpus(folder: Path, documents: int, seed: int) -> None:
    """Text files of 15 to 60 random words each."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(documents):
        words = [rng.choice(WORDS) for _ in range(rng.randint(15, 60))]
        lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        (folder / f"{folder.name}_{number:02d}.txt").write_text("\n".join(lines) + ".\n")


def make() -> None:
    """The databases, runs and checkpoints."""
    run("build", *BUILD, "-o", "finished")
    killed("retro_np.retrieval.stages", "write_indexes", 1, "build", *BUILD, "-o", "unfinished")
    for name, *call in (
        ("half_added", "retro_np.retrieval.stages", "write_indexes", 1),  # stopped while the new files were made
        ("not_moved", "retro_np.retrieval.edit", "finish_edit", 2),  # stopped when all were made, but not yet in place
    ):
        shutil.copytree("finished", name)
        killed(*call, "add", name, "more")
    shutil.copytree("finished", "edited")
    run("add", "edited", "more")
    shutil.copytree("edited", "added")
    run("remove", "edited", "--document", "corpus_03.txt", "--document", "more_01.txt")
    run("train", "finished", "-o", "run", *MODEL)
    killed("retro_np.training.loop", "take_step", 8, "train", "finished", "-o", "stopped", *MODEL, *CURRICULUM)
    shutil.copytree("stopped", "resumed")
    run("train", "finished", "-o", "resumed", *MODEL, *CURRICULUM)
    params, config = load_params("resumed/checkpoint.safetensors")
    save_params("params.safetensors", params, config)
    halves = {name: array.astype(np.float16) for name, array in arrays_of(params)}
    write_tensors("float16.safetensors", halves, {"config": config.to_dict()})
    for log in (Path("run/log.jsonl"), Path("stopped/log.jsonl")):  # With fixed speeds, the archive is reproducible.
        lines = [json.loads(line) | {"tokens_per_s": 1000.0} for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def record() -> dict:
    """What the old version read from these files and computed from them."""
    shutil.copytree("edited", "compacted")
    run("compact", "compacted")
    run("evaluate", "run/checkpoint.safetensors", "finished", *WINDOW, "-o", "evaluation")
    database = Database.open("finished")
    params, config = load_params("run/checkpoint.safetensors")
    tokens, retrieved = generate(params, config, prompt_tokens(database, PROMPT), database=database, **SAMPLE)
    return {
        "environment": environment(),
        "variables": VARIABLES,
        "build": BUILD,
        "train": MODEL,
        "curriculum": CURRICULUM,
        "window": WINDOW,
        "searches": {name: {query: search(name, query) for query in QUERIES} for name in ("finished", "edited")},
        "finished": file_hashes("finished"),
        "added": file_hashes("added"),
        "compacted": file_hashes("compacted"),
        "parameters": {
            name: parameters_sha256(load_params(name)[0]) for name in ("run/checkpoint.safetensors", *CHECKPOINTS)
        },
        "models": json.loads(Path("evaluation/results.json").read_text())["models"],
        "sample": {
            "prompt": PROMPT,
            "settings": SAMPLE,
            "tokens": tokens.tolist(),
            "retrieved": [r.ids.tolist() for r in retrieved],
        },
    }


def search(database: str, query: str) -> list[dict]:
    """The three results that `retro-np search --json` prints."""
    return [json.loads(line) for line in run("search", database, query, "-k", "3", "--json").splitlines()]


def commands() -> dict[str, list[dict]]:
    """Every command's parameters: their names, their defaults, and whether they are required."""
    facts = ("param_type_name", "name", "opts", "secondary_opts", "default", "required", "nargs")
    return {
        name: [{fact: plain(getattr(parameter, fact)) for fact in facts} for parameter in command.params]
        for name, command in typer.main.get_command(app).commands.items()
    }


def plain(value: object) -> object:
    """A value in the form that JSON stores."""
    return str(value) if isinstance(value, Path) else value


def run(*arguments: str) -> str:
    """Run a command and return its standard output."""
    return python("-c", "from retro_np.cli import main; main()", *arguments).stdout


def killed(module: str, function: str, call: int, *arguments: str) -> None:
    """Run a command that ends at the start of a function's n-th call, as if it were killed."""
    python("-c", KILLED, module, function, str(call), *arguments, status=9)


def python(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    """Run this interpreter, and check the status."""
    completed = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert completed.returncode == status, (arguments, completed.stderr)
    return completed


if __name__ == "__main__":
    main()
