"""Fixtures that several test modules share."""

import os
import shutil

import pytest
from support import EMBEDDER, SHARDS, SMALL, CountingEmbedder, write_corpus

from retro_np import kernels
from retro_np.kernels import threads
from retro_np.retrieval.build import build_database


@pytest.fixture(autouse=True)
def _restore_kernels_and_threads():
    """Restore the kernels and the number of threads after each test."""
    kernel_choice, n_threads = kernels.using(), threads.count()
    yield
    kernels.use(kernel_choice)
    threads.use_threads(n_threads)


@pytest.fixture(scope="session")
def embedder():
    return CountingEmbedder()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "docs")


@pytest.fixture(scope="session")
def database(corpus, tmp_path_factory, embedder):
    return build_database(corpus, tmp_path_factory.mktemp("databases") / "db", SMALL, embedder)


@pytest.fixture
def no_flushing(monkeypatch):
    """Flushing is slow, and it matters only when the machine crashes."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The path of a database with several shards, which tests copy."""
    folder = tmp_path_factory.mktemp("edit")
    return build_database(write_corpus(folder / "docs"), folder / "db", SHARDS, EMBEDDER).path


@pytest.fixture
def db(built, tmp_path):
    """A copy of that database, which the test may edit."""
    return shutil.copytree(built, tmp_path / "db")


@pytest.fixture(scope="module")
def additions(tmp_path_factory):
    """A corpus of further documents, with names that `built` does not have."""
    folder = write_corpus(tmp_path_factory.mktemp("more") / "more", 12, seed=5)
    for path in list(folder.iterdir()):
        path.rename(folder / f"added_{path.name}")
    return folder
