"""What the tests of this folder share: valid databases, a checkpoint and an interrupted run, made once."""

import pytest
from hostile import commands, parsers


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with what hostile inputs are made from."""
    folder = tmp_path_factory.mktemp("base")
    parsers.prepare(folder)
    commands.prepare(folder)
    return folder
