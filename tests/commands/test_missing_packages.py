"""A missing package gives one line that says what to install. Ground truth: interpreters that cannot import it."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from support import EXPECT_C, fresh_python

from retro_np.info import PACKAGES, kernel_table

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
SCRIPT = """
import importlib.metadata, sys

missing = {missing!r}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

version = importlib.metadata.version

def version_without(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = version_without
sys.meta_path.insert(0, Block())
sys.argv[1:] = {arguments!r}
from retro_np.cli import main
main()
"""


def run_without(missing: list[str], *arguments: str) -> tuple[str, str, int]:
    """Run a command in an interpreter that cannot import some packages. Returns its output, errors and status."""
    return fresh_python(SCRIPT.format(missing=missing, arguments=list(map(str, arguments))), COLUMNS="200")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("typer", ["info"]),
        ("typer", []),
        ("rich", ["info"]),
        ("tokenizers", ["build", ".", "-o", "db", "--embedder", "hashing"]),
        ("safetensors", ["evaluate", "checkpoint", "db"]),
        ("matplotlib", ["evaluate", "checkpoint", "db"]),
        ("jinja2", ["inspect", "checkpoint", "db", "text"]),
    ],
    ids=str,
)
def test_a_missing_package_gives_one_line_and_status_2(package, arguments):
    out, err, status = run_without([package], *arguments)
    assert (out, status) == ("", 2), err
    assert err == f"retro-np needs {package}: pip install {package}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", [["hnswlib"], ["numba"], ["numba", "hnswlib", "tokenizers", "safetensors"]], ids=str
)
def test_info_says_which_packages_are_not_installed(missing):
    out, err, status = run_without([*missing, "llvmlite"], "info")
    assert (err, status) == ("", 0)
    for package in missing:
        assert re.search(rf"│ {package} +│ not installed: pip install {package} +│", out)
    assert ("missing" in out) == (not EXPECT_C)  # The row of the C extension says whether it was built.


def test_info_names_the_kinds_of_each_kernel():
    out, err, status = run_without(["numba", "llvmlite"], "info")
    assert (err, status) == ("", 0)
    for name, _, installed in kernel_table():
        kind, *others = (kind for kind in installed if kind != "numba")
        row = f"{kind}; also available: {', '.join(others)}" if others else kind
        assert re.search(rf"│   {name} +│ {row} +│", out), name
    assert "numba;" not in out


def test_a_missing_module_that_is_not_a_dependency_gives_a_traceback():
    _, err, status = fresh_python(
        "import retro_np.cli\n"
        "def run(arguments): import a_module_that_does_not_exist\n"
        "retro_np.cli.run = run\n"
        "retro_np.cli.main()"
    )
    assert status == 1
    assert "ModuleNotFoundError: No module named 'a_module_that_does_not_exist'" in err


def test_info_lists_every_dependency():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["hub"]]
    required += project["optional-dependencies"]["dask"]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in required} <= set(PACKAGES)


def test_the_program_is_installed_under_its_name():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="retro-np")
    assert script.value == "retro_np.cli:main"
