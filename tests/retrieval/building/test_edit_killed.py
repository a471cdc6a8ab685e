"""Ground truth: the bytes of a database before an edit, and after an uninterrupted edit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import EMBEDDER, SMALL, Interrupter, all_bytes, json_lines, write_corpus

from retro_np.errors import UserError
from retro_np.retrieval import edit as editing
from retro_np.retrieval import manifest
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.journal import finish_edit
from retro_np.retrieval.manifest import FORMAT, read_manifest, write_manifest

pytestmark = pytest.mark.usefixtures("no_flushing")


EDITS = {
    "add": lambda db, corpus: add_documents(db, corpus, embedder=EMBEDDER),
    "remove": lambda db, corpus: remove_documents(db, [0, "held", 2]),
    "compact": lambda db, corpus: compact(db),
}


@pytest.fixture
def small(tmp_path):
    """A database of several shards with removed documents, and a corpus to add that contains a duplicate."""
    texts = {name: f"{name} is a text of some length, " * 5 for name in ("a", "held", "c", "d", "e")}
    corpus = json_lines(tmp_path / "c.jsonl", texts)
    config = replace(SMALL, held_out=0.2, shard_bytes=200, neighbours=2, extra_candidates=1)
    database = build_database(corpus, tmp_path / "small", config, EMBEDDER)
    assert len(database.folders("shards")) > 1
    remove_documents(tmp_path / "small", ["d", "e"])
    held_out = [r["name"] for r in database.documents if r["split"] == "valid"]
    added = {"copy": texts[held_out[0]], "x": "a new document that says little", "y": "and another " * 9}
    return tmp_path / "small", json_lines(tmp_path / "new.jsonl", added)


def outside_the_edit(db):
    """The bytes of a database without the files of an unfinished edit."""
    present = all_bytes(db).items()
    return {name: value for name, value in present if not name.startswith("edit/") and ".partial" not in name}


STEP = 3  # Every third change is interrupted. All of them would take minutes.


@pytest.mark.slow
@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_interrupted_at_any_change_to_the_folder_is_atomic_and_resumes_to_the_same_bytes(
    tmp_path, monkeypatch, small, kind
):
    base, corpus = small
    old, work, interrupter = outside_the_edit(base), tmp_path / "stopped", Interrupter(monkeypatch)
    shutil.copytree(base, work)
    total = interrupter.count_changes(lambda: EDITS[kind](work, corpus))
    new, outcomes = all_bytes(work), set()
    assert total >= 10
    assert new != old
    for number, change in enumerate(range(1, total + 1, STEP)):
        when = ("before", "after")[number % 2]
        shutil.rmtree(work)
        shutil.copytree(base, work)
        interrupter.interrupt(lambda: EDITS[kind](work, corpus), change, when)
        Database.open(work)
        present = outside_the_edit(work)
        assert present in (old, new), (change, when)
        outcomes.add(present == new)
        EDITS[kind](work, corpus)
        assert all_bytes(work) == new, (change, when)
    assert outcomes == {False, True}


def test_moving_files_into_place_can_be_interrupted_at_any_move(tmp_path, monkeypatch):
    """Only the journal, with files that are unchanged, changed, added, and deleted with their folders."""
    monkeypatch.setattr(manifest, "_is_complete", lambda manifest: True)  # these manifests lack most entries
    unchanged, deleted = ["a", "shards/00000/x"], ["shards/00001/x", "shards/00001/y", "neighbours/valid/00000/z"]
    added = ["b", "shards/00000/y", "neighbours/train/00000/z"]

    def write(folder, names, text, manifest_names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        listed = {"format": FORMAT, "note": text, "files": dict.fromkeys(manifest_names)}
        write_manifest(folder, listed)

    def prepare(path):
        shutil.rmtree(path, ignore_errors=True)
        write(path, [*unchanged, *deleted], "old", [*unchanged, *deleted])
        write(path / "edit", ["shards/00000/x", *added], "new", [*unchanged, *added])
        (path / "edit" / "request.json").write_text(json.dumps({"base": read_manifest(path)["sha256"]}))
        return path

    path, interrupter = prepare(tmp_path / "db"), Interrupter(monkeypatch)
    total = interrupter.count_changes(lambda: finish_edit(path))
    expected = all_bytes(path)
    assert sorted(expected) == sorted(["manifest.json", *unchanged, *added])
    assert sorted(p.name for p in path.rglob("*") if p.is_dir()) == ["00000", "00000", "neighbours", "shards", "train"]
    folders = sorted(p for p in path.rglob("*") if p.is_dir())
    for change in range(1, total + 1):
        for when in ("before", "after"):
            prepare(path)
            interrupter.interrupt(lambda: finish_edit(path), change, when)
            finish_edit(path)
            assert all_bytes(path) == expected, (change, when)
            assert sorted(p for p in path.rglob("*") if p.is_dir()) == folders, (change, when)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from support import CountingEmbedder
from retro_np.retrieval import edit, journal, shards
shards.CHUNKS_PER_SAVE = 4
class Slow(CountingEmbedder):
    def embed(self, texts, show_progress=False):
        time.sleep(0.01)
        return super().embed(texts)
flush = journal.flush_folder
def slow(folder):
    time.sleep(0.005)
    flush(folder)
journal.flush_folder = slow
print("started", flush=True)
{call}
"""
CALLS = {
    "add": "edit.add_documents({db!r}, {corpus!r}, embedder=Slow())",
    "remove": "edit.remove_documents({db!r}, list(range(20)))",
    "compact": "edit.compact({db!r})",
}


def start(kind, db, corpus):
    call = CALLS[kind].format(db=str(db), corpus=str(corpus))
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), call=call)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n", process.stderr.read().decode()
    return process


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(6)])
def test_a_killed_edit_is_atomic_and_resumes_to_the_same_bytes(tmp_path, db, additions, kind, seed, monkeypatch):
    monkeypatch.setattr(editing.stages.shards, "CHUNKS_PER_SAVE", 4)
    calls = {
        "add": lambda path: add_documents(path, additions, embedder=EMBEDDER),
        "remove": lambda path: remove_documents(path, list(range(20))),
        "compact": compact,
    }
    remove_documents(db, [20, 21])
    old = outside_the_edit(db)
    uninterrupted = shutil.copytree(db, tmp_path / "copy")
    start_time = time.monotonic()
    calls[kind](uninterrupted)
    seconds, new = time.monotonic() - start_time, all_bytes(uninterrupted)
    process = start(kind, db, additions)
    while process.poll() is None and not (db / "edit").exists():
        time.sleep(0.0005)
    time.sleep(random.Random(seed).random() * seconds)  # each seed kills at a different moment
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    Database.open(db)
    assert outside_the_edit(db) in (old, new)
    calls[kind](db)
    assert all_bytes(db) == new


@pytest.mark.slow
def test_a_second_edit_is_refused_while_the_first_runs(db, additions):
    first = start("add", db, additions)
    while not (db / "edit").exists():
        assert first.poll() is None, first.stderr.read().decode()
        time.sleep(0.0005)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        for another in (lambda: compact(db), lambda: remove_documents(db, [0])):
            with pytest.raises(UserError, match="in use by another"):
                another()
        assert Database.open(db).manifest["generation"] == 0  # readers do not wait
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait(timeout=120) == 0, first.stderr.read().decode()
    assert Database.open(db).manifest["generation"] == 1


def test_an_unfinished_edit_refuses_another_edit_and_can_be_abandoned(db, additions, monkeypatch):
    expected = all_bytes(db)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(editing.stages, "write_indexes", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_documents(db, additions, embedder=EMBEDDER)
    unfinished = all_bytes(db)
    assert outside_the_edit(db) == expected
    for another in (
        lambda: remove_documents(db, [0]),
        lambda: add_documents(db, additions / "added_module_00.py", embedder=EMBEDDER),
        lambda: add_documents(db, additions, embedder=EMBEDDER, exclude=("*_00.py",)),
    ):
        with pytest.raises(UserError, match=r"another edit of .* was interrupted \(add\)"):
            another()
        assert all_bytes(db) == unfinished
    shutil.rmtree(db / "edit")
    assert all_bytes(db) == expected
    assert remove_documents(db, [0]).manifest["generation"] == 1


def test_a_corpus_that_changed_while_an_add_was_interrupted_is_refused(db, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "more", 3, seed=8)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(editing.stages, "write_indexes", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_documents(db, corpus, embedder=EMBEDDER)
    (corpus / "module_01.py").write_text("changed")
    with pytest.raises(UserError, match="the corpus changed while it was added"):
        add_documents(db, corpus, embedder=EMBEDDER)
    assert Database.open(db).manifest["generation"] == 0
