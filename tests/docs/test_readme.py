"""Ground truth: the README, run and looked up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retro_np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_example(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_first_example_runs_and_prints_an_error_below_1e_6(tmp_path):
    done = run_example(EXAMPLES[0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1e-6


def test_every_file_that_the_readme_names_is_there():
    package = Path(retro_np.__file__).parent
    named = re.findall(r"`((?:retro_np|csrc|tests|docs|\.ci)/[^`]+)`|\]\((docs/[^)]+)\)", README)
    paths = [Path(one or other) for one, other in named]
    assert len(paths) > 30
    # the package may be installed elsewhere than beside the tests
    homes = [package.joinpath(*path.parts[1:]) if path.parts[0] == "retro_np" else ROOT / path for path in paths]
    assert [str(home) for home in homes if not home.exists()] == []


def test_every_public_name_is_in_the_readme():
    assert [name for name in retro_np.__all__ if f"`{name}`" not in README] == []


def test_every_module_of_the_paper_is_in_its_map():
    """Modules that compute something of the paper; what serves them all (files, progress, …) has no section."""
    package = Path(retro_np.__file__).parent
    folders = ("nn", "retrieval", "training", "evaluation")
    modules = [path.relative_to(package).as_posix() for f in folders for path in (package / f).glob("[a-z]*.py")]
    serving = {"nn/checks.py", "nn/scope.py", "retrieval/sharded.py", "retrieval/documents.py"}
    serving |= {"retrieval/manifest.py", "training/checkpoint.py"}
    assert sorted(m for m in modules if f"`retro_np/{m}`" not in README and m not in serving) == []


@pytest.mark.slow
def test_the_second_example_runs_on_what_the_demo_left(tmp_path):
    demo = "from retro_np.cli import main; import sys; sys.argv = ['retro-np', 'demo', '--minutes', '0.5']; main()"
    done = subprocess.run([sys.executable, "-c", demo], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    done = run_example(EXAMPLES[1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
