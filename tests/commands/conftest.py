"""What the tests of commands on a memory share. `work` is each module's folder with a decoder and its database."""

import pytest
from memory_runs import run_here


@pytest.fixture
def train(work):
    """A function that trains on the decoder, and returns the status."""
    return lambda out, *options: run_here("train", work / "db", "--retrofit", work / "model", "-o", out, *options)


@pytest.fixture
def refused(capsys):
    """A function that runs a command with a mistake, and returns the one line that it must print."""

    def run(*arguments):
        status = run_here(*arguments)
        err = capsys.readouterr().err
        assert (status, err.count("\n"), err.startswith("retro-np: ")) == (2, 1, True), err
        return err

    return run
