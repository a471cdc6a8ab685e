"""Ground truth: the bytes of a build that nobody killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, CountingEmbedder, all_bytes, write_corpus

from retro_np.errors import UserError
from retro_np.files import locked
from retro_np.retrieval import build as building
from retro_np.retrieval.build import build_database

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from conftest import SMALL, CountingEmbedder
from retro_np.retrieval import build
build.BLOCK = 16
class Slow(CountingEmbedder):
    def embed(self, texts, show_progress=False):
        time.sleep(0.02)
        return super().embed(texts)
build.build_database({corpus!r}, {out!r}, SMALL, Slow())
"""


@pytest.fixture
def whole(tmp_path, monkeypatch, embedder):
    """A corpus, and the bytes of its database."""
    monkeypatch.setattr(building, "BLOCK", 16)
    corpus = write_corpus(tmp_path / "docs", documents=40, seed=3)
    build_database(corpus, tmp_path / "whole", SMALL, embedder)
    return corpus, all_bytes(tmp_path / "whole")


def start(corpus, out):
    script = SCRIPT.format(tests=str(Path(__file__).parent), corpus=str(corpus), out=str(out))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("files", [1, 4, 9, 16, 25, 33])
def test_a_killed_build_ends_in_the_same_bytes(tmp_path, whole, files):
    corpus, expected = whole
    out = tmp_path / "killed"
    process = start(corpus, out)
    # killed as soon as so many files are there: at another moment of another stage each time
    while process.poll() is None and sum(1 for p in out.rglob("*") if p.is_file()) < files:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait()
    again = start(corpus, out)
    assert again.wait(timeout=120) == 0, again.stderr.read().decode()
    assert all_bytes(out) == expected


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(tmp_path, whole, embedder, monkeypatch):
    corpus, expected = whole
    written = []

    def full(path, array):
        if len(written) == 8:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_array(path, array)

    write_array = building.write_array
    monkeypatch.setattr(building, "write_array", full)
    with pytest.raises(UserError, match="the disk is full"):
        build_database(corpus, tmp_path / "db", SMALL, embedder)
    monkeypatch.setattr(building, "write_array", write_array)
    build_database(corpus, tmp_path / "db", SMALL, embedder)
    assert all_bytes(tmp_path / "db") == expected


def test_a_second_build_in_one_folder_is_told_so(tmp_path, embedder):
    corpus = write_corpus(tmp_path / "docs", documents=5)
    with locked(tmp_path / "db", "build"), pytest.raises(UserError, match="in use by another build"):
        build_database(corpus, tmp_path / "db", SMALL, embedder)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    corpus = write_corpus(tmp_path / "docs", documents=5)
    with pytest.raises(UserError, match="holds other files"):
        build_database(corpus, tmp_path / "out", SMALL, CountingEmbedder())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
