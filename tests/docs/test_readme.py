"""The README. Ground truth: runs of its examples, and the files and public names of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import retro_np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TREE = re.search(r"```\n(retro_np/ .*?)```", README, re.DOTALL)[1].splitlines()
MAX_LINES = 150
FIGURE = re.compile(r"\d+\.\d+")


def run_example(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_first_example_trains_a_model_and_prints_what_retrieval_saves(tmp_path):
    completed = run_example(EXAMPLES[0], tmp_path)
    assert completed.returncode == 0, completed.stderr
    sentence, retrieved = completed.stdout.splitlines()
    shown = re.search(r"# (With retrieval on.*) …", EXAMPLES[0])[1]
    # The figures depend on this Python's standard library.
    assert FIGURE.sub("#", sentence).startswith(FIGURE.sub("#", shown))
    assert len(retrieved) > 2


def test_the_second_example_prints_an_error_below_1e_6(tmp_path):
    completed = run_example(EXAMPLES[1], tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert 0 < float(completed.stdout) < 1e-6


def test_every_public_name_is_in_the_readme():
    assert [name for name in retro_np.__all__ if f"`{name}`" not in README] == []


def test_the_tree_lists_exactly_the_contents_of_the_top_folder_and_the_package():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    top = [path for path in ROOT.iterdir() if not any(path.match(pattern.rstrip("/")) for pattern in ignored)]
    top = [path for path in top if path.name in (".ci", ".github") or path.name[0] != "."]
    package = [path for path in Path(retro_np.__file__).parent.iterdir() if path.name[0] not in "_."]
    package = [path for path in package if path.suffix == ".py" or (path / "__init__.py").exists()]
    expected = [path.name + "/" * path.is_dir() for path in top if path.name != "README.md"]
    expected += ["  " + path.name + "/" * path.is_dir() for path in package]
    assert sorted(re.match(r" *\S+", line)[0] for line in TREE) == sorted(expected)


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= MAX_LINES
