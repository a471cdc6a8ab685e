"""The text of `retro-np COMMAND --help`. Ground truth: the commands' own parameters."""

import re
import shlex

import pytest
import typer

from retro_np.cli import run
from retro_np.commands import app

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_has_a_help_text_that_ends_with_a_full_stop(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_one_example_that_its_parser_accepts(name):
    examples = [line.strip() for line in COMMANDS[name].help.splitlines() if "Example" in line]
    assert len(examples) == 1
    program, command, *arguments = shlex.split(examples[0].removeprefix("Example: `").removesuffix("`"))
    assert (program, command) == ("retro-np", name)
    context = COMMANDS[name].make_context(name, arguments)
    assert len(arguments) == 0 or any(context.params.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_fits_two_screens_of_50_lines_and_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    run([name, "--help"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 2 * 50
    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"--[\w-]*…", out) == []  # No name is cut.


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_shows_one_short_sentence_for_each_command(name):
    summary = COMMANDS[name].help.splitlines()[0]
    assert summary.endswith(".")
    assert len(summary) <= 80
