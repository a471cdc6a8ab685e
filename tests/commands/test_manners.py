"""What is expected of a command line: version, module, completion, help that fits, and no trace once it is removed.

Ground truth: processes, the package's metadata, and pip.
"""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from support import fresh_python, refused, run

import retro_np
from retro_np.commands import app
from retro_np.info import facts

REPOSITORY = Path(retro_np.__file__).parents[1]
ENVIRONMENT = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}


def program(*arguments, **environment):
    """Run `python -m retro_np`. Returns its exit status, output and errors."""
    command = [sys.executable, "-m", "retro_np", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment)
    return child.returncode, child.stdout, child.stderr


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_shown(option):
    assert run(option) == (0, f"retro-np {retro_np.__version__}\n", "")


def test_the_package_runs_as_a_module_and_refuses_in_one_line():
    assert program("--version") == (0, f"retro-np {retro_np.__version__}\n", "")
    assert program("verify", "nowhere") == (2, "", "retro-np: no database at nowhere: retro-np build makes one\n")


def test_the_help_of_train_has_panels():
    _, out, _ = program("train", "--help")
    assert [title for title in ("Options", "Model", "Encoder", "Training") if f"─ {title} ─" not in out] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["--oracle-share", "--no-cca-positions", "--beta1", "--no-conditioning", "--segments"]
)
def test_what_only_an_ablation_needs_is_accepted_but_not_in_the_help(option):
    assert option not in program("train", "--help")[1]
    train = typer.main.get_command(app).commands["train"]
    assert option in {name for parameter in train.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_completion_offers_commands_and_options():
    def completed(words, number):
        words = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_RETRO_NP_COMPLETE": "complete_bash"}
        status, out, err = program(**words)
        assert (status, err) == (0, "")
        return out.split()

    assert completed("retro-np ver", 1) == ["verify"]
    assert completed("retro-np train --n-la", 2) == ["--n-layers"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_completion_is_shown_and_installed(shell, tmp_path):
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    status, out, err = program("--show-completion", shell, **environment)
    assert (status, err) == (0, "")
    assert "_RETRO_NP_COMPLETE" in out
    status, out, err = program("--install-completion", shell, **environment)
    assert (status, err) == (0, "")
    assert any("_RETRO_NP_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_misspelt_command_or_option_is_one_line_with_a_suggestion():
    assert "Did you mean 'train'" in refused("trian")
    assert "--version" in refused("--versoin")
    assert "--n-layers" in refused("train", "db", "-o", "run", "--n-layer", "2")


def test_info_says_that_no_gpu_is_used_and_names_ports_that_use_one():
    (row,) = (value for name, value in facts() if name == "GPU")
    assert "none is used" in row
    assert "RETRO-pytorch" in row
    assert "Megatron-LM" in row


COMPILES = """
from retro_np import kernels
import numpy as np
from retro_np.kernels import rowwise
kernels.use("numba")
rowwise.gelu_forward(np.ones(3))
print(rowwise.__file__)
"""


@pytest.mark.parametrize("numba_cache", ["", "chosen"])
def test_compiled_code_is_cached_for_the_user_or_where_numba_is_told_and_numbas_setting_is_kept(numba_cache, tmp_path):
    chosen = numba_cache and str(tmp_path / numba_cache)
    code = COMPILES + "import numba; print(repr(numba.config.CACHE_DIR))"
    out, err, status = fresh_python(code, XDG_CACHE_HOME=str(tmp_path / "user"), NUMBA_CACHE_DIR=chosen)
    assert status == 0, err
    assert out.splitlines()[-1] == repr(chosen)
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.nbc")}
    assert folders == {numba_cache or "user"}


def test_without_a_place_for_compiled_code_each_process_compiles_and_leaves_nothing(tmp_path):
    shutil.copytree(REPOSITORY / "retro_np", tmp_path / "retro_np", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "file").write_text("")  # No folder can be made in a file.
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{COMPILES}"
    out, err, status = fresh_python(code, XDG_CACHE_HOME=str(tmp_path / "file"), NUMBA_CACHE_DIR="")
    assert (status, err) == (0, "")
    assert out.startswith(str(tmp_path))
    assert not list(tmp_path.rglob("*.nb?"))


@pytest.mark.slow
def test_nothing_can_be_imported_after_an_uninstallation(tmp_path):
    source = tmp_path / "source"
    parts = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info")
    shutil.copytree(REPOSITORY / "retro_np", source / "retro_np", ignore=parts)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    scratch = tmp_path / "venv"
    python = scratch / "bin" / "python"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "caches"), "NUMBA_CACHE_DIR": ""}

    def checked(*command):
        child = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        return child.stdout

    checked(sys.executable, "-m", "venv", "--without-pip", scratch)
    (packages,) = scratch.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))  # A path file in these is not read again.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    checked(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    checked(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert checked(python, "-c", COMPILES).startswith(str(packages))
    assert list((tmp_path / "caches").rglob("*.nbc"))
    checked(*pip, "--python", python, "uninstall", "-y", "retro-np")
    child = subprocess.run([python, "-c", "import retro_np"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'retro_np'" in child.stderr
