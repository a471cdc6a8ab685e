"""The example in each help works. Ground truth: the commands, run on small stand-ins for its files."""

import shlex

import pytest
import typer
from support import write_corpus

from retro_np.cli import run
from retro_np.commands import app

COMMANDS = typer.main.get_command(app).commands
SIZES = (
    "--d-model 16 --d-ffw 16 --n-heads 1 --d-head 16 --n-layers 2 --cca-layers 2 --batch-size 1 --sequence-length 64"
)
# What makes an example quick. A later option replaces an earlier one.
QUICK = {
    "build": "--embedder hashing --vocabulary-size 300 --held-out 0.3",
    "train": f"--steps 2 {SIZES}",
    "evaluate": "--sequence-length 64 --stride 64 --limit 2",
}
SLOW = {"sample": "--length 4", "experiment": "--scale tiny --seeds 1", "pretrain": "", "demo": "--minutes 0.5"}
LAYER = """
import numpy as np
def my_function(x):
    return np.sin(x), lambda dy: (dy * np.cos(x),)
"""


def example(name):
    (line,) = (line.strip() for line in COMMANDS[name].help.splitlines() if "Example" in line)
    return shlex.split(line.removeprefix("Example: `").removesuffix("`"))[1:]


def test_the_examples_work_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs = write_corpus(tmp_path / "docs", 14)
    (docs / "json").mkdir()
    (docs / "json" / "decoder.py").write_text("value index token chunk\n" * 30)
    (tmp_path / "notes.txt").write_text("return value, else raise\n" * 30)
    (tmp_path / "my_layer.py").write_text(LAYER)
    for name in (name for name in COMMANDS if name not in SLOW):
        arguments = ["docs" if argument == "stdlib" else argument for argument in example(name)]
        assert run([*arguments, *QUICK.get(name, "").split()]) in (None, 0), name


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_examples_that_train_or_build_the_bundled_database_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([*example(name), *SLOW[name].split()]) in (None, 0)
