"""Commands, options and configuration fields of version 0.1.0 are accepted. Ground truth: that version's own list."""

import json
from pathlib import Path

import pytest
import typer

from retro_np.commands import app
from retro_np.renamed import OPTIONS, replace_old_options
from retro_np.retrieval.build import BuildConfig
from retro_np.training.config import TrainingConfig

OLD = json.loads((Path(__file__).parent / "files" / "commands.json").read_text())
TODAY = typer.main.get_command(app).commands


def default(value):
    """A default as JSON holds it."""
    return str(value) if isinstance(value, Path) else value


def test_every_old_command_is_there():
    assert TODAY.keys() >= OLD.keys()


@pytest.mark.parametrize("command", OLD)
def test_every_old_option_is_accepted_with_the_same_default(command):
    today = {option: each for each in TODAY[command].params for option in (*each.opts, *each.secondary_opts)}
    for old in OLD[command]:
        if old["param_type_name"] == "option":
            for option in (*old["opts"], *old["secondary_opts"]):
                (name,) = replace_old_options([option])
                assert name in today, option
                each = today[name]
                facts = default(each.default), each.required, each.nargs
                assert facts == (old["default"], old["required"], old["nargs"]), option


@pytest.mark.parametrize("command", OLD)
def test_arguments_are_taken_in_the_old_order(command):
    arguments = [each for each in TODAY[command].params if each.param_type_name == "argument"]
    old = [each for each in OLD[command] if each["param_type_name"] == "argument"]
    assert [(default(each.default), each.required, each.nargs) for each in arguments] == [
        (each["default"], each["required"], each["nargs"]) for each in old
    ]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_old_option_is_replaced_and_its_new_name_told(option, capsys):
    assert replace_old_options([option, "1"]) == [OPTIONS[option], "1"]
    assert replace_old_options([f"{option}=1"]) == [f"{OPTIONS[option]}=1"]
    line = f"retro-np: {option} is now called {OPTIONS[option]}; the old name works until version 0.3\n"
    assert capsys.readouterr().err == 2 * line


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (TrainingConfig, {"lent": 0.5, "lent_steps": 3}, {"oracle_share": 0.5, "oracle_steps": 3}),
        (BuildConfig, {"spares": 3}, {"extra_candidates": 3}),
    ],
)
def test_an_old_field_is_accepted_and_its_new_name_told(config, old, new, capsys):
    assert config(**old) == config(**new)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(old)
    for line, (field, successor) in zip(sorted(told), zip(old, new, strict=True), strict=True):
        assert line.startswith(f"retro-np: {config.__name__}({field}=…) is now called {successor}=…;")
