"""A database on a disk where nothing can be written. Ground truth: what the same database answers where it can be."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from retro_np import Database
from retro_np.commands import app  # noqa: F401 - imported before the process loses its rights
from retro_np.errors import UserError
from retro_np.retrieval.edit import remove_documents

NOBODY = 65_534
QUERIES = ["for self in value", "import token", "neighbour"]


@pytest.fixture
def read_only(built):
    """A copy of a database that its reader may not change."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(built, folder / "db")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder / "db"
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
    shutil.rmtree(folder)


def answers(path, embedder):
    database = Database.open(path, embedder)
    return [[part.tolist() for part in database.search(query, 4)] for query in QUERIES]


def as_an_ordinary_user(function):
    """What a function returns in a process that may not write everywhere, as root may."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            result = json.dumps(function())
        except BaseException as error:
            result = json.dumps(f"{type(error).__name__}: {error}")
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(data)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_database_on_a_read_only_disk_is_searched_as_elsewhere(read_only, built, embedder):
    assert as_an_ordinary_user(lambda: answers(read_only, embedder)) == answers(built, embedder)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_an_edit_on_a_read_only_disk_is_refused_in_one_line(read_only, embedder):
    def edit():
        try:
            remove_documents(read_only, [0])
        except UserError as error:
            return str(error)

    assert as_an_ordinary_user(edit) == f"{read_only} is not writable: give another folder"
