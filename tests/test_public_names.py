"""Ground truth: the names that the package declares, and its source as a type checker reads it."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import retro_np
from retro_np import BuildConfig, EncoderConfig, RetroConfig, TrainingConfig


def imports_for_type_checkers() -> dict[str, str]:
    """{name: its module without "retro_np."}, from the block `if TYPE_CHECKING` of the package's __init__.py."""
    tree = ast.parse(Path(retro_np.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {name.name: line.module.removeprefix("retro_np.") for line in block.body for name in line.names}


def test_every_public_name_resolves_and_is_listed():
    assert [name for name in retro_np.__all__ if getattr(retro_np, name, None) is None] == []
    assert set(retro_np.__all__) <= set(dir(retro_np))


def test_type_checkers_see_the_names_that_load_on_first_use():
    assert imports_for_type_checkers() == retro_np._ON_FIRST_USE
    assert retro_np._ON_FIRST_USE.keys() <= set(retro_np.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'retro_np' has no attribute 'transformer'"):
        retro_np.transformer  # noqa: B018


def test_gradcheck_is_the_function_and_checking_its_module():
    assert callable(retro_np.gradcheck)
    assert retro_np.checking.gradcheck is retro_np.gradcheck


def test_the_version_is_a_literal_that_an_installer_reads_without_importing_numpy():
    source = Path(retro_np.__file__).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE) == [retro_np.__version__]


@pytest.mark.parametrize("config", [RetroConfig, EncoderConfig, TrainingConfig, BuildConfig])
def test_every_field_of_a_configuration_has_a_line_in_the_docstring(config):
    documented = re.findall(r"^ {4}(\w+): \S", config.__doc__, re.MULTILINE)
    assert [field.name for field in dataclasses.fields(config)] == documented
