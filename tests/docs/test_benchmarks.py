"""The benchmarks and their pages. Ground truth: results that the benchmarks wrote, and short runs of benchmarks."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import needs_c

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name, *options):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_performance_page_shows_what_the_benchmarks_wrote():
    assert run("report", "--check").returncode == 0, "run python benchmarks/report.py"


def test_the_experiments_page_shows_what_was_recorded():
    assert run("experiments", "--check").returncode == 0, "run python benchmarks/experiments.py"


def test_a_limit_of_a_result_does_not_outlive_the_verdict_that_it_was_written_for(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    page = importlib.import_module("experiments")
    for name, (verdict, *said) in page.LIMITS.items():
        assert page.word_and_reason(name, page.recorded()[name]) == said
        other = {"verdict": next(word for word in page.WORDS if word != verdict)}
        assert page.word_and_reason(name, other) == [page.WORDS[other["verdict"]]]


@pytest.mark.slow
@pytest.mark.oracle
def test_the_pytorch_port_computes_the_same_loss_and_is_timed(tmp_path):
    completed = run("train_step", "--rounds", 1, "--without", "compile,retro-pytorch", "-o", tmp_path / "step.json")
    assert completed.returncode == 0, completed.stderr
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert set(rows) == {"retro_np", "PyTorch, eager"}
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.oracle
def test_a_kernel_is_timed_in_each_of_its_implementations(tmp_path):
    completed = run("kernels", "--rounds", 1, "--only", "rms_norm", "-o", tmp_path / "kernels.json")
    assert completed.returncode == 0, completed.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["milliseconds"]
    assert all({"numpy", "numba", "PyTorch"} <= set(row) for row in rows.values())


@needs_c
def test_every_step_from_the_plain_loop_to_the_kernel_computes_the_same_product(tmp_path):
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    source, out = BENCHMARKS / "product_steps.c", tmp_path / "product_steps"
    include = BENCHMARKS.parent / "csrc"
    flags = ["-O3", "-std=c11", "-ffp-contract=fast", f"-I{include}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(out), "-lm"], check=True)
    printed = subprocess.run([str(out)], capture_output=True, text=True, check=True).stdout
    assert printed.count("GFLOP/s") >= 3
    assert "WRONG" not in printed
