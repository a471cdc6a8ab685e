"""The core needs only NumPy. Ground truth: fresh interpreters in which no other package can be imported.

These tests themselves need only NumPy and pytest.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retro_np

PACKAGE = Path(retro_np.__file__).parent
MAX_CORE_LINES = 2400
CHECKER = ("retro_np.checking",)
MAX_CHECKER_LINES = 600
MODULES = ("__init__", "config", "errors", "tree", "runtime", "parameters", "optim", "checking", "reference")
BLOCKED = (
    "hnswlib", "numba", "llvmlite", "tokenizers", "safetensors", "rich", "typer", "click", "matplotlib", "jinja2",
    "filelock", "threadpoolctl", "scipy", "torch", "fcntl", "resource",
)  # fmt: skip
BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
GRADIENTS = """
from retro_np import gradcheck
from retro_np.nn.checks import checks
errors = {check.name: gradcheck(check.f, *check.arrays).error for check in checks() if not check.long}
"""
MODEL = """
import json
import numpy as np
from retro_np import adamw_init, adamw_update, init_params, reference, retro, retro_loss
from retro_np.nn.checks import CONFIG, perturbed_params
rng = np.random.default_rng(0)
m, vocabulary = CONFIG.chunk_size, CONFIG.vocabulary_size
tokens, neighbours = rng.integers(1, vocabulary, (2, 3 * m + 1)), rng.integers(0, vocabulary, (2, 3, 2, 2 * m))
"""


def printed(code: str, cwd: Path) -> str:
    """What a fresh interpreter prints if it can import only NumPy and the portable standard library."""
    process = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def assert_gradients_pass(report: str) -> None:
    errors = json.loads(report)
    assert len(errors) > 15
    assert max(errors.values()) < 1e-6


def test_every_gradient_check_passes():
    assert_gradients_pass(printed(GRADIENTS + "import json; print(json.dumps(errors))", PACKAGE.parent))


def test_the_model_equals_the_reference():
    code = (
        MODEL
        + """
params = perturbed_params(CONFIG)
arguments = params, CONFIG, tokens, neighbours
print(np.max(np.abs(retro(*arguments)[0] - reference.retro(*arguments))))
"""
    )
    assert float(printed(code, PACKAGE.parent)) < 1e-10


def test_a_step_of_adamw_lowers_the_loss():
    code = (
        MODEL
        + """
params = init_params(CONFIG, rng)
state = adamw_init(params)
first, vjp = retro_loss(params, CONFIG, tokens, tokens, neighbours)
adamw_update(params, vjp(1.0), state, lr=1e-3)
second, _ = retro_loss(params, CONFIG, tokens, tokens, neighbours)
print(json.dumps([float(first), float(second)]))
"""
    )
    first, second = json.loads(printed(code, PACKAGE.parent))
    assert second < first


def test_the_core_has_at_most_2400_lines_and_the_checker_600():
    code = """
import json
from retro_np import gradcheck, retro
names = [name for name in sys.modules if name.partition(".")[0] == "retro_np"]
print(json.dumps({name: sys.modules[name].__file__ for name in names}))
"""
    files = {name: Path(file) for name, file in json.loads(printed(code, PACKAGE.parent)).items()}
    sources = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.suffix == ".py"}
    lines = {name: len(source.splitlines()) for name, source in sources.items()}
    assert {"retro_np.nn.model", "retro_np.kernels.attention", "retro_np.reference", "retro_np.optim"} <= lines.keys()
    counted = {name: count for name, count in lines.items() if name not in CHECKER}
    assert sum(counted.values()) <= MAX_CORE_LINES, counted
    assert sum(lines[name] for name in CHECKER) <= MAX_CHECKER_LINES


def test_the_core_runs_when_its_files_are_copied_without_the_rest(tmp_path):
    copy = tmp_path / "retro_np"
    copy.mkdir()
    for module in MODULES:
        shutil.copy(PACKAGE / f"{module}.py", copy)
    for folder in ("nn", "kernels"):
        shutil.copytree(PACKAGE / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        GRADIENTS
        + """
import json
files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "retro_np"]
print(json.dumps(errors))
print(json.dumps(files))
"""
    )
    errors, files = printed(code, tmp_path).splitlines()
    assert_gradients_pass(errors)
    assert [file for file in json.loads(files) if not Path(file).is_relative_to(tmp_path)] == []


@pytest.mark.parametrize(("name", "package"), [("save_params", "safetensors"), ("load_params", "safetensors")])
def test_a_name_whose_package_is_missing_says_what_to_install(name, package):
    code = f"""
import retro_np
assert "{name}" in dir(retro_np)
try:
    retro_np.{name}
except ImportError as error:
    print(error)
"""
    expected = f"retro_np.{name} needs {package}, which is not installed: pip install {package}"
    assert printed(code, PACKAGE.parent).strip() == expected
