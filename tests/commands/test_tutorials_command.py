"""`retro-np tutorials`, and the tutorials in a wheel. Ground truth: the files of the clone, and an installed wheel."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import fresh_python, run

from retro_np import UserError, tutorials
from retro_np.commands import tutorials as command
from retro_np.tutorials import copy_tutorials

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py"))


def test_every_notebook_is_copied_with_mini_retro_and_its_pictures(tmp_path):
    assert copy_tutorials(tmp_path / "copies") == len(SOURCES)
    assert sorted(path.stem for path in (tmp_path / "copies").glob("*.ipynb")) == SOURCES
    assert (tmp_path / "copies" / "mini_retro.py").read_bytes() == (ROOT / "tutorials" / "mini_retro.py").read_bytes()
    for path in (tmp_path / "copies").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        prose = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", "\n".join(prose)) if "://" not in link]
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_a_second_copy_changes_nothing_and_a_changed_file_is_never_overwritten(tmp_path):
    copy_tutorials(tmp_path)
    copy_tutorials(tmp_path)
    changed, missing = tmp_path / f"{SOURCES[4]}.ipynb", tmp_path / f"{SOURCES[5]}.ipynb"
    changed.write_text("mine")
    missing.unlink()
    with pytest.raises(UserError, match=rf"{changed.name} was changed, .* or give another folder"):
        copy_tutorials(tmp_path)
    assert changed.read_text() == "mine"
    assert not missing.exists()


def test_the_command_says_where_the_notebooks_are_and_refuses_a_file_in_their_place(tmp_path):
    status, out, err = run("tutorials", tmp_path / "here", "--no-open")
    assert (status, err) == (0, "")
    assert out == f"{len(SOURCES)} notebooks are in {tmp_path / 'here'}\n"
    (tmp_path / "file").write_text("")
    status, _, err = run("tutorials", tmp_path / "file", "--no-open")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"retro-np: {tmp_path / 'file'} is a file")


def test_the_command_opens_jupyter_on_the_copies(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command.os, "execv", lambda *line: called.append(line))
    command.tutorials(tmp_path)
    assert called == [(sys.executable, [sys.executable, "-m", "jupyterlab", str(tmp_path)])]


def test_without_jupyter_the_command_copies_and_says_in_one_line_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "retro-np\[tutorials\]"'):
        command.tutorials(tmp_path)
    assert (tmp_path / f"{SOURCES[0]}.ipynb").exists()


def test_importing_the_package_does_not_load_the_tutorials():
    out, err, status = fresh_python("import retro_np, sys; print('retro_np.tutorials' in sys.modules)")
    assert (out, status) == ("False", 0), err


def test_in_a_clone_the_checks_are_those_of_its_folder():
    assert Path(tutorials.__path__[0]) == ROOT / "tutorials"


@pytest.mark.slow
def test_from_a_wheel_a_notebook_imports_what_it_needs_and_a_check_judges(tmp_path):
    def python(*arguments, **options):
        done = subprocess.run([str(x) for x in arguments], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    clone, venv = tmp_path / "clone", tmp_path / "venv"  # Without git's ignored files, as a user has it.
    clone.mkdir()
    if (ROOT / ".git").exists():
        names = python("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    else:  # an unpacked archive, in which an installation has left its files
        made = {"build", "__pycache__", "retro_np.egg-info"}
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.suffix != ".so")
        names = [str(path) for path in files if not made & set(path.parts) and path.parts[0][:8] != ".pytest_"]
    for path in (ROOT / name for name in names if name):
        if path.is_file():
            (clone / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (clone / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    make = "import sys; from setuptools import build_meta as m; print(m.{}(sys.argv[1]))"
    (tmp_path / "dist").mkdir()
    python(sys.executable, "-c", make.format("build_sdist"), tmp_path / "dist", cwd=clone)
    (source,) = (tmp_path / "dist").glob("*.tar.gz")
    python("tar", "-xf", source, "-C", tmp_path)  # The wheel is built from the source distribution.
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    python(sys.executable, "-m", "pip", "wheel", unpacked, "-w", tmp_path / "dist", *options)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert not any(name.startswith("tutorials/") or name.endswith(f"_tutorials/{SOURCES[0]}.py") for name in packed)

    python(sys.executable, "-m", "venv", venv)
    inside = venv / "bin" / "python"
    python(inside, "-m", "pip", "install", *options, wheel)
    site = python(inside, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    others = python(sys.executable, "-c", "import numpy; print(numpy.__file__)").strip()
    Path(site, "others.pth").write_text(str(Path(others).parents[1]))  # NumPy and the rest; our wheel is found first
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"MPLBACKEND": "Agg"}
    copy = "import sys; from retro_np.cli import main; sys.argv = ['retro-np', 'tutorials', '.', '--no-open']; main()"
    python(inside, "-c", copy, cwd=outside, env=environment)
    (notebook,) = outside.glob("05_*.ipynb")
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    begin = "\n".join("".join(cell["source"]) for cell in cells[:2])
    answer = "import retro_np; print(retro_np.__file__); check_5_1(lambda t, m: (t + 1) // m - 1)"
    lines = python(inside, "-c", begin + "\n" + answer, cwd=outside, env=environment).splitlines()
    assert lines[-2].startswith(site)
    assert lines[-1].startswith("5.1 is right: ")
