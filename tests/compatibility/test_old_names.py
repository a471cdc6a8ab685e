"""Commands, options and configuration fields of version 0.1.0 are accepted. Ground truth: that version's own list."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from retro_np.commands import app
from retro_np.renamed import OPTIONS, replace_old_options
from retro_np.retrieval.build import BuildConfig
from retro_np.training.config import TrainingConfig

OLD = json.loads((Path(__file__).parent / "files" / "commands.json").read_text())
CURRENT = typer.main.get_command(app).commands


def default(value):
    """A default in the form that JSON stores."""
    return str(value) if isinstance(value, Path) else value


def test_every_old_command_still_exists():
    assert CURRENT.keys() >= OLD.keys()


@pytest.mark.parametrize("command", OLD)
def test_every_old_option_is_accepted_with_the_same_default(command):
    current = {option: p for p in CURRENT[command].params for option in (*p.opts, *p.secondary_opts)}
    for old in OLD[command]:
        if old["param_type_name"] == "option":
            for option in (*old["opts"], *old["secondary_opts"]):
                _, name = replace_old_options([command, option])
                assert name in current, option
                parameter = current[name]
                facts = default(parameter.default), parameter.required, parameter.nargs
                assert facts == (old["default"], old["required"], old["nargs"]), option


@pytest.mark.parametrize("command", OLD)
def test_arguments_have_the_old_order(command):
    arguments = [p for p in CURRENT[command].params if p.param_type_name == "argument"]
    old = [p for p in OLD[command] if p["param_type_name"] == "argument"]
    assert [(default(p.default), p.nargs) for p in arguments] == [(p["default"], p["nargs"]) for p in old]
    assert all(p.required <= earlier["required"] for p, earlier in zip(arguments, old, strict=True))


@pytest.mark.parametrize(("command", "option"), [(command, old) for command in OPTIONS for old in OPTIONS[command]])
def test_an_old_option_is_replaced_and_its_new_name_is_printed(command, option, capsys):
    new = OPTIONS[command][option]
    assert replace_old_options([command, option, "1"]) == [command, new, "1"]
    assert replace_old_options([command, f"{option}=1"]) == [command, f"{new}=1"]
    line = f"retro-np: {option} is now called {new}; the old name works until version 0.3\n"
    assert capsys.readouterr().err == 2 * line


@pytest.mark.parametrize("arguments", [["search", "db", "--lent"], ["train", "db", "--", "--lent"], ["--lent"], []])
def test_text_that_looks_like_an_old_option_is_not_changed(arguments, capsys):
    assert replace_old_options(arguments) == arguments
    assert capsys.readouterr().err == ""


def test_replace_and_attributes_accept_old_fields():
    changed = replace(TrainingConfig(), lent=0.5, lent_steps=3)
    assert changed == TrainingConfig(oracle_share=0.5, oracle_steps=3)
    assert (changed.lent, changed.lent_steps) == (0.5, 3)
    assert replace(BuildConfig(extra_candidates=5), spares=9).extra_candidates == 9


def test_an_old_field_of_one_configuration_is_unknown_to_another():
    with pytest.raises(TypeError, match="'lent'"):
        BuildConfig(lent=1)
    with pytest.raises(AttributeError, match="'BuildConfig' object has no attribute 'lent'"):
        BuildConfig().lent  # noqa: B018


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (TrainingConfig, {"lent": 0.5, "lent_steps": 3}, {"oracle_share": 0.5, "oracle_steps": 3}),
        (BuildConfig, {"spares": 3}, {"extra_candidates": 3}),
    ],
)
def test_an_old_field_is_accepted_and_its_new_name_is_printed(config, old, new, capsys):
    assert config(**old) == config(**new)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(old)
    for line, (field, successor) in zip(sorted(printed), zip(old, new, strict=True), strict=True):
        assert line.startswith(f"retro-np: {config.__name__}({field}=…) is now called {successor}=…;")
