"""Ground truth: the bytes of an uninterrupted build."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hnswlib
import numpy as np
import pytest
from support import SMALL, CountingEmbedder, Interrupter, all_bytes, write_corpus

from retro_np import files
from retro_np.errors import UserError
from retro_np.retrieval import index, shards, texts
from retro_np.retrieval.build import build_database

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from support import SMALL, CountingEmbedder
from retro_np.retrieval import build, shards
shards.CHUNKS_PER_SAVE = 16
class Slow(CountingEmbedder):
    def embed(self, texts, show_progress=False):
        time.sleep(0.02)
        return super().embed(texts)
build.build_database({corpus!r}, {out!r}, SMALL, Slow())
"""


@pytest.fixture
def reference(tmp_path, monkeypatch, embedder):
    """A corpus, and the bytes of its database."""
    monkeypatch.setattr(shards, "CHUNKS_PER_SAVE", 16)
    corpus = write_corpus(tmp_path / "docs", documents=40, seed=3)
    build_database(corpus, tmp_path / "whole", SMALL, embedder)
    return corpus, all_bytes(tmp_path / "whole")


def start(corpus, out):
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), corpus=str(corpus), out=str(out))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("files", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 20))])
def test_a_killed_build_ends_in_the_same_bytes(tmp_path, reference, files):
    corpus, expected = reference
    out = tmp_path / "killed"
    process = start(corpus, out)
    # the number of files determines the moment and the stage of the kill
    while process.poll() is None and sum(1 for p in out.rglob("*") if p.is_file()) < files:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read().decode()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists()
    resumed = start(corpus, out)
    assert resumed.wait(timeout=120) == 0, resumed.stderr.read().decode()
    assert all_bytes(out) == expected


@pytest.mark.slow
def test_a_build_interrupted_before_or_after_any_change_to_its_folder_ends_in_the_same_bytes(
    tmp_path, monkeypatch, embedder
):
    """Interrupt at every rename and every removal, with KeyboardInterrupt, which Ctrl-C raises."""
    monkeypatch.setattr(shards, "CHUNKS_PER_SAVE", 128)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # Flushing is slow, and only matters if the machine crashes.
    corpus = write_corpus(tmp_path / "docs", documents=4, seed=4)
    config, interrupter = replace(SMALL, shard_bytes=1500), Interrupter(monkeypatch)  # two shards
    total = interrupter.count_changes(lambda: build_database(corpus, tmp_path / "whole", config, embedder))
    expected = all_bytes(tmp_path / "whole")
    assert (tmp_path / "whole" / "shards" / "00001").exists()
    assert total >= 15
    for stop in [(change, when) for change in range(1, total + 1) for when in ("before", "after")]:
        interrupter.interrupt(lambda: build_database(corpus, tmp_path / "stopped", config, embedder), *stop)
        build_database(corpus, tmp_path / "stopped", config, embedder)
        assert all_bytes(tmp_path / "stopped") == expected, stop
        shutil.rmtree(tmp_path / "stopped")


def test_an_index_truncated_by_a_full_disk_is_written_again(tmp_path, reference, embedder, monkeypatch):
    corpus, expected = reference

    class Truncated(hnswlib.Index):  # hnswlib does this silently on a full disk
        def save_index(self, path):
            super().save_index(path)
            os.truncate(path, 1000)

    monkeypatch.setattr(index, "hnswlib", SimpleNamespace(Index=Truncated))
    with pytest.raises(UserError, match="the disk is full"):
        build_database(corpus, tmp_path / "db", SMALL, embedder)
    monkeypatch.setattr(index, "hnswlib", hnswlib)
    build_database(corpus, tmp_path / "db", SMALL, embedder)
    assert all_bytes(tmp_path / "db") == expected


@pytest.mark.slow
def test_a_second_build_in_the_same_folder_is_refused_while_the_first_runs(tmp_path, reference):
    corpus, expected = reference
    first = start(corpus, tmp_path / "db")
    while not (tmp_path / "db" / "build.json").exists():
        assert first.poll() is None, first.stderr.read().decode()
        time.sleep(0.002)
    with pytest.raises(UserError, match="in use by another build"):
        build_database(corpus, tmp_path / "db", SMALL, CountingEmbedder())
    assert first.wait(timeout=120) == 0, first.stderr.read().decode()
    assert all_bytes(tmp_path / "db") == expected


def test_a_full_disk_is_reported_in_one_line_and_the_build_resumes(tmp_path, reference, embedder, monkeypatch):
    corpus, expected = reference
    written = []

    def full(path, array):
        if len(written) == 8:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_array(path, array)

    write_array = shards.write_array
    monkeypatch.setattr(shards, "write_array", full)
    with pytest.raises(UserError, match="the disk is full"):
        build_database(corpus, tmp_path / "db", SMALL, embedder)
    monkeypatch.setattr(shards, "write_array", write_array)
    build_database(corpus, tmp_path / "db", SMALL, embedder)
    assert all_bytes(tmp_path / "db") == expected


def test_a_folder_with_other_files_is_left_unchanged(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    corpus = write_corpus(tmp_path / "docs", documents=5)
    with pytest.raises(UserError, match="holds other files"):
        build_database(corpus, tmp_path / "out", SMALL, CountingEmbedder())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "change", [{"chunk_size": 4}, {"key_dtype": "float16"}, {"held_out": 0.3}, {"extra_candidates": 1}]
)
def test_an_unfinished_build_is_not_resumed_with_different_settings(tmp_path, embedder, monkeypatch, change):
    corpus = write_corpus(tmp_path / "docs", documents=8)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "embed_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_database(corpus, tmp_path / "db", SMALL, embedder)
    expected = all_bytes(tmp_path / "db")
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"was started with {name} = .*, not {value}; give the same value"):
        build_database(corpus, tmp_path / "db", replace(SMALL, **change), embedder)
    (corpus / "module_00.py").write_text("changed")
    with pytest.raises(UserError, match="another corpus "):
        build_database(corpus, tmp_path / "db", SMALL, embedder)
    assert all_bytes(tmp_path / "db") == expected
    (tmp_path / "db" / "build.json").write_text("[")
    with pytest.raises(UserError, match=r"build\.json is damaged"):
        build_database(corpus, tmp_path / "db", SMALL, embedder)


def test_an_impossible_request_leaves_no_folder_behind(tmp_path, embedder):
    corpus = write_corpus(tmp_path / "docs", documents=3)
    with pytest.raises(UserError, match="every document of"):
        build_database(corpus, tmp_path / "db", replace(SMALL, held_out=0.9999999), embedder)
    with pytest.raises(UserError, match="vocabulary_size must be a whole number of at least 258, not 100"):
        replace(SMALL, vocabulary_size=100)
    assert not (tmp_path / "db").exists()


def test_a_database_inside_its_corpus_is_not_read(tmp_path, embedder):
    corpus = write_corpus(tmp_path / "docs", documents=6)
    first = build_database(corpus, corpus / "db", SMALL, embedder)
    second = build_database(corpus, corpus / "db", SMALL, embedder)
    assert len(first.documents) == len(second.documents) == 6


def test_a_corpus_that_changed_while_reading_was_interrupted_is_read_anew(tmp_path, embedder, monkeypatch):
    corpus = write_corpus(tmp_path / "docs", documents=12)
    config = replace(SMALL, shard_bytes=2000)

    def stopped(shards):
        if shards.shards == 3:
            raise KeyboardInterrupt
        opened(shards)

    with monkeypatch.context() as patch:
        opened = texts._Shards._open
        patch.setattr(texts._Shards, "_open", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_database(corpus, tmp_path / "db", config, embedder)
    assert list((tmp_path / "db" / "work").rglob("*.jsonl"))
    for path in sorted(corpus.iterdir())[6:]:
        path.write_text("changed")
    build_database(corpus, tmp_path / "db", config, embedder)
    build_database(corpus, tmp_path / "other", config, embedder)
    assert all_bytes(tmp_path / "db") == all_bytes(tmp_path / "other")


def test_an_existing_tokenizer_is_reused_unchanged(tmp_path, embedder, database):
    corpus = write_corpus(tmp_path / "docs", documents=6, seed=9)
    config = replace(SMALL, tokenizer=str(database.path / "tokenizer.json"))
    second = build_database(corpus, tmp_path / "db", config, embedder)
    assert (second.path / "tokenizer.json").read_bytes() == (database.path / "tokenizer.json").read_bytes()
    assert second.manifest["tokenizer"] == database.manifest["tokenizer"]


class Broken(CountingEmbedder):
    """An embedder whose keys of a shard's texts are altered by a function; the two texts of the first trial are not."""

    def __init__(self, alter):
        super().__init__()
        self.alter = alter

    def embed(self, texts, show_progress=False):
        keys = super().embed(texts)
        return self.alter(keys) if len(texts) > 2 else keys


def test_keys_too_large_for_the_stored_type_are_refused_with_their_chunk(tmp_path):
    corpus = write_corpus(tmp_path / "docs", documents=6)
    broken = Broken(lambda keys: np.where(np.arange(len(keys))[:, None] == 3, 1e6, keys))
    with pytest.raises(UserError, match=r"not finite in float16 for chunk 3 .* --key-dtype float32, or correct"):
        build_database(corpus, tmp_path / "db", replace(SMALL, key_dtype="float16"), broken)


def test_a_full_disk_while_writing_an_array_is_reported(tmp_path, monkeypatch):
    """NumPy's own error for a full disk has no errno that would identify it."""

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "SimpleNamespace", lambda write: SimpleNamespace(write=functools.partial(full, write)))
    with pytest.raises(UserError, match="the disk is full"):
        files.write_array(tmp_path / "a.npy", np.zeros(10))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_size": 1.5}, {"neighbours": "16"}, {"limit_bytes": float("nan")}, {"d_key": True},
        {"extra_candidates": None}, {"held_out": "a"}, {"held_out": float("nan")}, {"duplicates": 0.8},
        {"shard_bytes": 0}, {"d_key": 0},
    ],
)  # fmt: skip
def test_an_invalid_setting_is_refused(wrong):
    with pytest.raises(UserError):
        replace(SMALL, **wrong)
