"""Names of the package. Ground truth: its source, parsed."""

import ast
from collections import defaultdict
from pathlib import Path

import retro_np

PACKAGE = Path(retro_np.__file__).parent


def constants() -> dict[str, dict[str, str]]:
    """{constant: {module: the expression that is assigned to it}}."""
    values: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(path for path in PACKAGE.rglob("*.py") if "_tutorials" not in path.parts):
        module = path.relative_to(PACKAGE).as_posix()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                (target,), value = node.targets, node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=True))
                for name, expression in pairs:
                    if isinstance(name, ast.Name) and name.id.isupper() and not name.id.startswith("_"):
                        text = ast.unparse(expression)
                        if not text.endswith(f".{name.id})"):  # not a conversion of another module's constant
                            values[name.id][module] = text
    return values


def test_a_constant_has_one_value_in_the_whole_package():
    several = {name: values for name, values in constants().items() if len(set(values.values())) > 1}
    assert several == {}


def test_a_bound_is_called_max_or_min():
    assert [name for name in constants() if name.split("_")[0] in ("MOST", "LEAST", "FEW", "LONGEST", "SHORTEST")] == []
