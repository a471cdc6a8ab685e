"""Whatever number an option is given, a command works or ends in one line. Ground truth: each command in a process."""

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
import typing
from pathlib import Path

import pytest
from support import write_corpus

from retro_np.cli import INTERRUPTED, main
from retro_np.commands import app

QUICK = ["9999999999", "1" + 19 * "0", "nan"]
ALL = [*QUICK, "-1", "0", "1e300", "9" * 5000]
SECONDS = 1  # A command that takes longer, such as one with 10¹⁸ steps, is interrupted, and may say so.
MAX_BYTES = 8 << 30
REFUSED = ("experiment", "demo")  # because they would take minutes
COMMANDS = {  # arguments with which a command works or, if it is one of REFUSED, is refused
    "build": "{folder}/docs -o {new} --embedder hashing --chunk-size 8 --vocabulary-size 300 --held-out 0.5",
    "search": "{folder}/db index",
    "train": "{folder}/db -o {new} --d-model 16 --d-ffw 16 --n-heads 1 --d-head 16 --n-layers 2 --encoder-layers 1 "
    "--cca-layers 2 --sequence-length 16 --steps 1 --batch-size 1",
    "evaluate": "{folder}/run/checkpoint.safetensors {folder}/db -o {new} --sequence-length 16 --stride 8 --limit 4",
    "sample": "{folder}/run/checkpoint.safetensors {folder}/db --length 4",
    "inspect": "{folder}/run/checkpoint.safetensors {folder}/db --prompt return --length 4 -o {new}.html",
    "gradcheck": "FFW",
    "experiment": "nonesuch",
    "demo": "-o {folder}/docs",
}


def numeric_options(command: str) -> list[str]:
    """The names of a command's options that take a number."""
    callback = next(c.callback for c in app.registered_commands if c.callback.__name__ == command)
    options = []
    for name, hint in typing.get_type_hints(callback, include_extras=True).items():
        if typing.get_origin(hint) is typing.Annotated and {int, float} & {
            hint.__origin__,
            *typing.get_args(hint.__origin__),
        }:
            declared = [d for d in hint.__metadata__[0].param_decls or () if d.startswith("--")]
            options.append(declared[0] if declared else "--" + name.replace("_", "-"))
    return options


def outcome(arguments: list[str], seconds: float = 0) -> tuple[int | str, str]:
    """The exit status of a command in this process, or its traceback, and what it writes to standard error.

    seconds: when SIGALRM is sent; 0 stands for never.
    """
    sys.argv = ["retro-np", *arguments]
    out, err = io.StringIO(), io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        return error.code, err.getvalue()
    except BaseException:
        return traceback.format_exc(), err.getvalue()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def try_values(command: str, folder: str, *values: str) -> None:
    """Run a command as usual and with each value for each option. Print as JSON what neither works nor is refused."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    usual = outcome([command, *COMMANDS[command].format(folder=folder, new=f"{folder}/{command}").split()])
    failures = [] if usual[0] == (2 if command in REFUSED else 0) else [usual]
    cases = itertools.product(numeric_options(command), values)
    for number, (option, value) in enumerate(cases):
        new = f"{folder}/{command}{number}"
        arguments = COMMANDS[command].format(folder=folder, new=new).split()
        status, err = outcome([command, *arguments, option, value], SECONDS)
        lines = err.splitlines()
        refused = status == 2 and len(lines) == 1 and lines[0].startswith("retro-np: ")
        if not (status == 0 or refused or status == INTERRUPTED):
            failures.append([option, value[:30], status, err[-2000:]])
    print(json.dumps(failures))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, its database, and a model."""
    folder = tmp_path_factory.mktemp("extreme")
    write_corpus(folder / "docs", 8)
    for arguments in (["build", *COMMANDS["build"].split()], ["train", *COMMANDS["train"].split()]):
        new = {"build": "db", "train": "run"}[arguments[0]]
        status, err = outcome([a.format(folder=folder, new=folder / new) for a in arguments])
        assert status == 0, err
    return folder


def test_every_command_with_a_numeric_option_is_tried():
    assert {c.callback.__name__ for c in app.registered_commands if numeric_options(c.callback.__name__)} == set(
        COMMANDS
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "values"),
    [pytest.param("search", QUICK), pytest.param("train", QUICK)]
    + [pytest.param(command, ALL, marks=pytest.mark.slow) for command in COMMANDS],
)
def test_a_command_works_or_refuses_in_one_line_whatever_number_it_is_given(command, values, folder):
    child = subprocess.run([sys.executable, __file__, command, folder, *values], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == []


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_more_neighbours_than_training_chunks_have_are_refused_before_anything_is_written(command, folder, tmp_path):
    arguments = COMMANDS[command].format(folder=folder, new=tmp_path / "new").split()
    split = ["--split", "train"] if command == "evaluate" else []
    status, err = outcome([command, *arguments, *split, "-k", "33"])
    assert (status, err.count("\n")) == (2, 1)
    assert "-k" in err
    assert not (tmp_path / "new").exists()
    assert outcome([command, *arguments, *split, "-k", "32"]) == (0, "")


if __name__ == "__main__":
    try_values(*sys.argv[1:])
