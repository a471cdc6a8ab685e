"""Ground truth: every import statement of the package, including those inside functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import retro_np

PACKAGE = Path(retro_np.__file__).parent
# A module may import from its own layer and from earlier ones.
LAYERS = [
    {
        "errors", "tree", "config", "runtime", "renamed", "reference", "reference_decoders", "checking",
        "parameters", "optim", "kernels", "nn",
    },
    {"files", "progress", "retrieval"},
    {"sequences"},
    {"checkpoint", "generation", "training", "evaluation", "pretrained", "report", "info", "torch"},
    {"experiments"},
    {"commands", "cli", "__main__", "tutorials"},
]  # fmt: skip


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The modules of the package that a file imports, at any level. The package's own __init__ is left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("retro_np.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            package = node.module.removeprefix("retro_np").removeprefix(".")
            for alias in node.names:  # a submodule, or a name of the module
                submodule = f"{package}.{alias.name}".removeprefix(".")
                names.add(submodule if submodule in MODULES else package)
    return names & MODULES


# A wheel also has the tutorials' checks and mini_retro.py, which are no modules of the package.
FILES = [path for path in PACKAGE.rglob("*.py") if "_tutorials" not in path.parts]
MODULES = {module_name(path) for path in FILES} - {""}
IMPORTS = {module_name(path): imported(path) for path in FILES if module_name(path)}


def top(module):
    return module.split(".")[0]


def edges(sources, targets):
    """The imports from one group of top-level modules into another."""
    return {(a, b) for a, bs in IMPORTS.items() for b in bs if top(a) in sources and top(b) in targets}


def test_every_module_belongs_to_one_layer_and_imports_from_no_later_layer():
    layer_of = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert {top(module) for module in MODULES} <= layer_of.keys()
    assert not {(a, b) for a, bs in IMPORTS.items() for b in bs if layer_of[top(b)] > layer_of[top(a)]}


def test_no_imports_form_a_cycle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which shows the cycle


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ({"retrieval"}, {"nn"}),
        ({"sequences"}, {"nn"}),
        ({"generation", "checkpoint", "report", "pretrained"}, {"training"}),
        ({"evaluation", "generation", "training", "checkpoint"}, {"report"}),
        ({"training", "checkpoint", "generation"}, {"evaluation"}),
    ],
    ids=lambda names: " ".join(sorted(names)),
)
def test_the_source_modules_do_not_import_the_target_modules(sources, targets):
    assert not edges(sources, targets)


def test_only_question_answering_trains_during_evaluation():
    assert {a for a, _ in edges({"evaluation"}, {"training"})} == {"evaluation.question_answering"}


def test_the_references_import_only_the_configuration_and_each_other():
    assert IMPORTS["reference"] == {"config", "reference_decoders"}
    assert IMPORTS["reference_decoders"] == set()


def test_the_imports_that_these_tests_look_for_are_found():
    assert ("training.loop", "nn.model") in edges({"training"}, {"nn"})
    assert "kernels" in IMPORTS["info"]  # from retro_np import kernels
    assert "checkpoint" in IMPORTS["commands.models"]  # inside a function
