"""A closed or full standard stream gives success or one line. Ground truth: a shell that closes and fills streams."""

import os
import subprocess
import sys

import pytest
from support import SMALL, write_corpus

from retro_np.retrieval.build import build_database

PROGRAM = "from retro_np.cli import main; main()"


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    return build_database(write_corpus(folder / "docs", 8), folder / "db", SMALL, "hashing").path


def shell(redirection: str, *arguments, program: str = PROGRAM, unbuffered: str = "") -> tuple[int, str, str]:
    """Run the program under a shell that redirects its streams. Returns its exit status, output and errors."""
    script = f'set -o pipefail; "$0" -c "$@" {redirection}'
    child = subprocess.run(
        ["bash", "-c", script, sys.executable, program, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered, "COLUMNS": "160"},
    )  # fmt: skip
    return child.returncode, child.stdout, child.stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_command_works_without_a_stream_that_it_does_not_need(db, streams):
    status, out, err = shell(streams, "search", db, "value index")
    assert (status, err) == (0, "")
    assert bool(out) == (">&-" not in streams.replace("2>&-", ""))


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["search", "{db}", "value"], ["--help"]])
def test_a_full_output_is_one_line(db, arguments, unbuffered):
    arguments = [argument.format(db=db) for argument in arguments]
    status, _, err = shell(">/dev/full", *arguments, unbuffered=unbuffered)
    assert status == 2
    assert err.startswith("retro-np: ")
    assert err.endswith("No space left on device\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["search", "{db}", "value"], ["--help"]])
def test_a_pipe_that_its_reader_has_closed_is_one_line(db, arguments):
    late = f"import sys; sys.stdin.read(); {PROGRAM}"  # starts when `true` has ended, which closes the pipe
    arguments = [argument.format(db=db) for argument in arguments]
    status, _, err = shell("< <(sleep 0.2) | true", *arguments, program=late)
    assert (status, err) == (2, "retro-np: standard output was closed before everything was written\n")


@pytest.mark.parametrize(("streams", "shown"), [(">&-", True), ("2>/dev/full", False), ("2>&- >&-", False)])
def test_a_mistake_has_status_2_and_is_told_if_errors_can_be_written(tmp_path, streams, shown):
    status, out, err = shell(streams, "search", tmp_path / "nowhere", "x")
    assert (status, out) == (2, "")
    assert err == (f"retro-np: no database at {tmp_path}/nowhere: retro-np build makes one\n" if shown else "")


def test_no_file_of_a_command_gets_the_number_of_a_closed_stream(tmp_path):
    program = (
        "import os\n"
        "from retro_np import cli\n"
        "def run(arguments):\n"
        "    file = open(arguments[0], 'w')\n"
        "    print(file.fileno(), file=file)\n"
        "cli.run = run\n"
        "cli.main()"
    )
    status, _, _ = shell("<&- >&- 2>&-", tmp_path / "file", program=program)
    assert status == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_a_child_process_inherits_open_streams(tmp_path):
    program = (
        "import subprocess, sys\n"
        "from retro_np import cli\n"
        "check = 'import os; [os.fstat(number) for number in range(3)]'\n"
        "cli.run = lambda arguments: subprocess.run([sys.executable, '-c', check]).returncode\n"
        "cli.main()"
    )
    assert shell("<&- >&- 2>&-", program=program)[0] == 0
