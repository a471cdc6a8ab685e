"""The gradcheck page and its benchmark. Ground truth: runs of the page's examples, and what the benchmark wrote."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gradcheck.md").read_text(encoding="utf-8")
# Each Python block, and what the page says that it prints.
EXAMPLES = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL)
# The imports and the arrays that the later examples use.
FIRST = "".join(re.findall(r"^(?:import|from|x, w, b =) .*\n", EXAMPLES[1][0] + EXAMPLES[2][0], re.MULTILINE))
# Each command, its exit status if the page gives one, and what it prints.
COMMANDS = re.findall(r"```console\n\$ (.*?)(?:  # exit status (\d))?\n(.*?)```", PAGE, re.DOTALL)
FILES = {named[1]: code for code, _ in EXAMPLES if (named := re.match(r"# (\w+\.py)\n", code))}
FIGURE = re.compile(r"index \([^)]*\)|random direction \d+|-?\d+(\.\d+)?(e[+-]?\d+)?")  # an entry, or a number
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
benchmark = importlib.import_module("gradcheck")
X, INTEGERS = np.ones(3), np.arange(3)
KIND = "transposed matrix"
BENCHMARK = [sys.executable, str(BENCHMARKS / "gradcheck.py")]


def without_figures(text):
    """What was printed, with a # for figures, which depend on how NumPy and BLAS round, and without runs of spaces."""
    return re.sub(r"[ ─-]+", " ", FIGURE.sub("#", text)).strip()


def run(command, cwd):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the page shows."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path


def example(code, shown):
    """A test's parameters."""
    oracle = re.search(r"^(?:import|from) (jax|autograd|torch)\b", code, re.MULTILINE)
    return pytest.param(code, shown, marks=[pytest.mark.oracle] if oracle else [])


@pytest.mark.slow
@pytest.mark.parametrize(("code", "shown"), [example(*found) for found in EXAMPLES])
def test_each_example_runs_and_prints_what_the_page_shows(code, shown, folder):
    completed = run([sys.executable, "-c", FIRST + code], folder)
    assert completed.returncode == 0, completed.stderr
    assert without_figures(completed.stdout) == without_figures(shown)


@pytest.mark.parametrize(("command", "status", "shown"), COMMANDS)
def test_each_command_prints_what_the_page_shows(command, status, shown, folder):
    assert command.startswith("retro-np ")
    code = "import sys; sys.argv[0] = 'retro-np'; from retro_np.cli import main; main()"
    completed = run([sys.executable, "-c", code, *command.split()[1:]], folder)
    assert completed.returncode == int(status or 0)
    assert without_figures(completed.stdout + completed.stderr) == without_figures(shown)


def test_the_page_has_examples_and_commands():
    assert len(EXAMPLES) >= 7
    assert len(COMMANDS) >= 1


def test_the_test_suite_of_the_page_passes(folder):
    completed = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_layer.py"], folder)
    assert completed.returncode == 0, completed.stdout
    assert "1 passed" in completed.stdout


def test_the_page_shows_what_the_benchmark_wrote():
    assert run([*BENCHMARK, "--check"], ROOT).returncode == 0, "run python benchmarks/gradcheck.py --write"


@pytest.mark.slow
@pytest.mark.parametrize("peers", ["", pytest.param("torch,torch-fast", marks=pytest.mark.oracle)])
def test_the_benchmark_counts_what_each_checker_says(peers, tmp_path):
    out = tmp_path / "gradcheck.json"
    options = ["--only", KIND, "--seeds", "2", "--peers", peers, "-o", str(out)]
    completed = run([*BENCHMARK, *options], ROOT)
    assert completed.returncode == 0, completed.stderr
    figures = json.loads(out.read_text())
    assert list(figures["kinds"]) == [KIND]
    assert list(figures["checkers"]) == ["retro_np", *filter(None, peers.split(","))]
    for row in figures["checkers"].values():
        assert row["cpu_seconds"] > 0
        assert row["twins"].get("wrong", []) == []
    assert figures["checkers"]["retro_np"]["bugs"] == {}


def test_peers_that_are_not_installed_are_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("jax", "autograd") else name)
    options = argparse.Namespace(peers="torch,jax,autograd", seeds=3, peer_seeds=1)
    assert benchmark.chosen(options) == {"retro_np": 3, "torch": 1}
    assert "pip install jax autograd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "gradients", "expected"),
    [
        ((X,), X, [X]),
        ((X, X), (X, None), [X, None]),
        ((X, INTEGERS, X), (X, X), [X, None, X]),
        (({"a": X, "b": [INTEGERS, X]},), {"b": [None, X], "a": X}, [X, None, X]),
    ],
)
def test_the_gradients_of_trees_are_split_as_their_arguments(arguments, gradients, expected):
    split = benchmark.matched(arguments, benchmark.one_per_argument(gradients, arguments))
    assert [part is whole for part, whole in zip(split, expected, strict=True)] == [True] * len(expected)
