"""`retro-np tutorials`, the tutorials in a wheel, and answers of unusual forms.

Ground truth: the files of the clone, an installed wheel, and our answers to the exercises."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import fresh_python, refused, run

from retro_np import UserError, tutorials
from retro_np.commands import tutorials as command
from retro_np.tutorials import copy_tutorials
from retro_np.tutorials.checks import judge

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py"))


def test_every_notebook_is_copied_with_mini_retro_and_its_pictures(tmp_path):
    assert copy_tutorials(tmp_path / "copies") == (len(SOURCES), [])
    assert sorted(path.stem for path in (tmp_path / "copies").glob("*.ipynb")) == SOURCES
    assert (tmp_path / "copies" / "mini_retro.py").read_bytes() == (ROOT / "tutorials" / "mini_retro.py").read_bytes()
    for path in (tmp_path / "copies").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        prose = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", "\n".join(prose)) if "://" not in link]
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_a_second_copy_adds_what_is_missing_and_overwrites_nothing(tmp_path):
    assert copy_tutorials(tmp_path) == copy_tutorials(tmp_path) == (len(SOURCES), [])
    edited, missing = tmp_path / f"{SOURCES[4]}.ipynb", tmp_path / f"{SOURCES[5]}.ipynb"
    whole = missing.read_bytes()
    edited.write_text("mine")
    missing.unlink()
    assert copy_tutorials(tmp_path) == (len(SOURCES), [edited.name])
    assert edited.read_text() == "mine"
    assert missing.read_bytes() == whole


@pytest.mark.parametrize("name", ["pictures", f"{SOURCES[-1]}.ipynb", "mini_retro.py"])
@pytest.mark.parametrize("kind", ["the other", "a link to nowhere"])
def test_something_else_in_the_place_of_a_file_or_folder_is_one_line_before_the_first_copy(tmp_path, name, kind):
    if kind == "a link to nowhere":
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    elif name == "pictures":
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
    line = refused("tutorials", tmp_path, "--no-open")
    way_out = "rename it, or give another folder"
    assert line == f"retro-np: {tmp_path / name} is in the way, so nothing was copied: {way_out}"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_command_says_where_the_notebooks_are_and_refuses_a_file_in_their_place(tmp_path):
    status, out, err = run("tutorials", tmp_path / "here", "--no-open")
    assert (status, err) == (0, "")
    assert out == f"{len(SOURCES)} notebooks are in {tmp_path / 'here'}\n"
    (tmp_path / "file").write_text("")
    assert refused("tutorials", tmp_path / "file", "--no-open").startswith(f"retro-np: {tmp_path / 'file'} is a file")


def in_place_of_jupyter(monkeypatch, program):
    """Let the command start a Python program in place of Jupyter. Returns the list of the command lines."""
    lines, start = [], command.subprocess.Popen
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        command.subprocess, "Popen", lambda line: lines.append(line) or start([sys.executable, "-c", program])
    )
    return lines


def test_the_command_opens_jupyter_on_the_copies(tmp_path, monkeypatch):
    lines = in_place_of_jupyter(monkeypatch, "")
    command.tutorials(tmp_path)
    assert lines == [[sys.executable, "-m", "jupyterlab", str(tmp_path)]]


def test_the_command_opens_jupyter_on_notebooks_that_a_reader_has_edited_and_names_them(tmp_path, monkeypatch, capsys):
    copy_tutorials(tmp_path)
    lines = in_place_of_jupyter(monkeypatch, "")
    for number, more in ((0, ""), (1, " and 1 more")):
        (tmp_path / f"{SOURCES[number]}.ipynb").write_text("mine")
        command.tutorials(tmp_path)
        said = f"Left as found, since the contents differ from this version's: {SOURCES[0]}.ipynb{more}"
        assert capsys.readouterr().out.splitlines() == [f"{len(SOURCES)} notebooks are in {tmp_path}", said]
        assert len(lines) == number + 1


def test_if_jupyter_ends_with_an_error_one_line_says_how_to_open_the_copies_otherwise(tmp_path, monkeypatch):
    in_place_of_jupyter(monkeypatch, "raise SystemExit(3)")
    with pytest.raises(UserError) as caught:
        command.tutorials(tmp_path / "my copies")
    by_hand = f"jupyter lab '{tmp_path / 'my copies'}'"
    assert str(caught.value) == f"Jupyter ended with status 3: open the copies with {by_hand}; --no-open only copies"


@pytest.mark.skipif(sys.platform == "win32", reason="there os.kill ends the process")
def test_an_interrupt_is_left_to_jupyter_which_goes_on_until_it_ends_by_itself(tmp_path, monkeypatch):
    interrupt = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)"
    in_place_of_jupyter(monkeypatch, f"{interrupt}; raise SystemExit(3)")
    with pytest.raises(UserError, match="status 3"):
        command.tutorials(tmp_path)


def test_without_jupyter_the_command_copies_and_says_in_one_line_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        command.tutorials(tmp_path / "my copies")
    assert str(caught.value) == (
        'Jupyter is not installed, so the copies were not opened: pip install ".[tutorials]" in a clone, '
        f"or pip install jupyterlab; then jupyter lab '{tmp_path / 'my copies'}'"
    )
    assert (tmp_path / "my copies" / f"{SOURCES[0]}.ipynb").exists()


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


# The checks of exercises, for answers of unusual forms


class Raises:
    """An answer that cannot be read as an array or compared."""

    def __array__(self, *_, **__):
        raise RuntimeError("no array")

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = object.__hash__


def exits(*_):
    raise SystemExit(1)


def yields(*_):
    yield 1


def in_float32(x):
    """An answer whose floats are float32, those of its pullback's results, too."""
    if callable(x):
        return lambda *arguments, **options: in_float32(x(*arguments, **options))
    if type(x) in (tuple, list):
        return type(x)(map(in_float32, x))
    if type(x) is dict:
        return {key: in_float32(part) for key, part in x.items()}
    return np.float32(x) if isinstance(x, float | np.ndarray) and np.asarray(x).dtype == np.float64 else x


MODULES = [importlib.import_module(f"retro_np.tutorials.checks.tutorial_{source[:2]}") for source in SOURCES]
CHECKS = [check for module in MODULES for name, check in vars(module).items() if name.startswith("check_")]
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.number)


@pytest.mark.slow
@each_check
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from float32's range
def test_a_check_accepts_our_answer_in_float32(check, capsys):
    assert check(*map(in_float32, judge.answers_of(check))) is True, capsys.readouterr().out


@pytest.mark.slow
@each_check
def test_a_check_reports_an_answer_that_exits_or_cannot_be_compared(check, capsys):
    for answer, message in ((exits, "SystemExit: 1"), (lambda *_: Raises(), ""), (lambda *_: (Raises(), exits), "")):
        assert check(*[answer] * len(check.names)) is False
        said = capsys.readouterr().out
        assert said.startswith(f"{check.number} is not right yet: ")
        assert message in said


@pytest.mark.slow
@each_check
def test_a_check_says_of_a_generator_what_it_is(check, capsys):
    assert check(*[yields] * len(check.names)) is False
    said = capsys.readouterr().out
    assert said.startswith(f"{check.number} is not right yet: wrong form: {check.names[0]} returns a generator: ")


@each_check
def test_a_check_with_an_argument_missing_or_too_many_says_which_functions_it_asks_for(check, capsys):
    names = f"check_{check.number.replace('.', '_')}({', '.join(check.names)})"
    for functions in ([exits] * (len(check.names) - 1), [exits] * (len(check.names) + 1)):
        assert check(*functions) is False
        said = capsys.readouterr().out
        assert said.startswith(f"{check.number} is not answered yet: the check asks for {len(check.names)} function")
        assert said.endswith(f", {names}, not for {len(functions)}\n")


@pytest.mark.parametrize(
    ("got", "form"),
    [
        (object(), "an object"),
        (10**40, "an int"),
        (1j, "a complex"),
        ((x for x in "ab"), "a generator"),
        (map(abs, [1, 2]), "a map"),
    ],
)
@pytest.mark.parametrize(
    ("expected", "asked"), [(1.5, "the number 1.5"), (("a", "b"), "a tuple of 2"), ({"a", "b"}, "a set of 2")]
)
def test_a_wrong_form_is_named_with_the_right_article(got, form, expected, asked):
    assert judge.compare(got, expected, "it").startswith(f"wrong form: it is {form}; asked for is {asked}")
