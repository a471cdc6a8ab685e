"""Ground truth: neighbours by exact search over all chunks, one build of all documents, the bytes before an edit."""

import itertools
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from exact_lists import assert_lists_are_exact, numbers_of, rows_of
from support import EMBEDDER, SHARDS, SMALL, CountingEmbedder, all_bytes, json_lines

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import _permutation
from retro_np.files import locked
from retro_np.retrieval import edit as editing
from retro_np.retrieval import journal
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import parse_source
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.verify import verify_database
from retro_np.training.batches import training_batch
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import train

pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.mark.slow
def test_after_an_add_all_neighbours_equal_those_of_exact_search(db, additions):
    old = Database.open(db)
    split = old.split("train")
    database = add_documents(db, additions, embedder=EMBEDDER)
    assert len(database.documents) == len(old.documents) + 12
    assert len(database.folders("shards")) > len(old.folders("shards")) > 2
    assert database.manifest["generation"] == 1
    assert np.array_equal(database.split("train").tokens[: old.n_chunks], split.tokens[:])
    with pytest.raises(UserError, match="was edited since it was opened"):  # its ids may have changed
        old.split("train")
    assert_lists_are_exact(database)
    assert verify_database(db, EMBEDDER).broken == []


@pytest.mark.slow
def test_without_training_neighbours_only_held_out_chunks_have_neighbours_even_after_edits(corpus, additions, tmp_path):
    full = build_database(corpus, tmp_path / "whole", SHARDS, EMBEDDER)
    reduced = build_database(corpus, tmp_path / "reduced", replace(SHARDS, training_neighbours=False), EMBEDDER)
    edits = [
        lambda path: Database.open(path, EMBEDDER),
        lambda path: add_documents(path, additions, embedder=EMBEDDER),
        lambda path: remove_documents(path, [int(numbers_of(Database.open(path), "train")[0])]),
        compact,
    ]
    for edit in edits:
        full, reduced = edit(tmp_path / "whole"), edit(tmp_path / "reduced")
        assert np.array_equal(reduced.split("valid").neighbours[:], full.split("valid").neighbours[:])
        assert reduced.split("train").neighbours.shape == (full.n_chunks, 0)
        assert verify_database(reduced.path, EMBEDDER).broken == []
        with pytest.raises(UserError, match="was built with --no-training-neighbours"):
            training_batch(reduced, reduced.split("train"), 2, sequence_length=16, batch_size=1, seed=0, step=0)


def test_consecutive_adds_give_the_chunks_keys_and_neighbours_of_one_build(tmp_path, built, additions):
    """All databases use the same tokenizer and hold out no documents."""
    parts = [sorted(additions.iterdir())[i : i + 4] for i in (0, 4, 8)]
    for number, part in enumerate(parts):
        json_lines(tmp_path / f"{number}.jsonl", {path.name: path.read_text() for path in part})
    config = replace(SHARDS, held_out=0.0, tokenizer=str(built / "tokenizer.json"))
    sources = [str(tmp_path / f"{number}.jsonl") for number in range(3)]
    expected_database = build_database(list(map(parse_source, sources)), tmp_path / "whole", config, EMBEDDER)
    build_database(sources[0], tmp_path / "parts", config, EMBEDDER)
    for source in sources[1:]:
        edited = add_documents(tmp_path / "parts", source, embedder=EMBEDDER)
    for expected, array in zip(rows_of(expected_database), rows_of(edited), strict=True):
        assert np.array_equal(expected, array)
    assert np.array_equal(expected_database.keys("train")[:], edited.keys("train")[:])
    assert list(expected_database.documents) == list(edited.documents)
    assert expected_database.manifest["sources"] == edited.manifest["sources"]


def test_adding_twice_changes_no_byte(db, additions, capsys):
    add_documents(db, additions, embedder=EMBEDDER)
    expected = all_bytes(db)
    add_documents(db, additions, embedder=EMBEDDER)
    assert all_bytes(db) == expected
    assert "nothing was added" in capsys.readouterr().err


def test_a_near_duplicate_of_a_held_out_document_is_listed_once_instead_of_added(db, built, tmp_path):
    database = Database.open(db)
    original = database.documents[numbers_of(database, "valid")[0]]
    text = (built.parent / "docs" / original["name"]).read_text()
    corpus = json_lines(tmp_path / "c.jsonl", {"copy": text, "near": text + "\nmore", "own": "a text of its own"})
    listed = (db / "duplicates.jsonl").read_text()
    added = add_documents(db, corpus, embedder=EMBEDDER)
    assert [r["name"] for r in added.documents[len(database.documents) :]] == ["own"]
    records = [json.loads(line) for line in (db / "duplicates.jsonl").read_text()[len(listed) :].splitlines()]
    assert [(r["name"], r["held_out"]) for r in records] == [("copy", original["name"]), ("near", original["name"])]
    assert records[0]["exact"] == 1.0
    expected = all_bytes(db)
    add_documents(db, corpus, embedder=EMBEDDER)
    assert all_bytes(db) == expected


def test_if_all_new_documents_are_near_duplicates_no_chunk_is_added(db, built, tmp_path):
    database = Database.open(db)
    original = database.documents[numbers_of(database, "valid")[0]]
    text = (built.parent / "docs" / original["name"]).read_text()
    added = add_documents(db, json_lines(tmp_path / "c.jsonl", {"copy": text}), embedder=EMBEDDER)
    assert added.n_chunks == database.n_chunks
    assert verify_database(db, EMBEDDER).broken == []
    compact(db)
    expected = all_bytes(db)
    compact(db)
    assert all_bytes(db) == expected


def test_a_near_duplicate_can_be_added_after_its_held_out_document_is_removed(db, built, tmp_path):
    database = Database.open(db)
    original = database.documents[numbers_of(database, "valid")[0]]
    text = (built.parent / "docs" / original["name"]).read_text()
    corpus = json_lines(tmp_path / "c.jsonl", {"copy": text})
    add_documents(db, corpus, embedder=EMBEDDER)
    remove_documents(db, [original["id"]])
    added = add_documents(db, corpus, embedder=EMBEDDER)
    assert added.documents[-1]["name"] == "copy"
    assert verify_database(db, EMBEDDER).broken == []


def test_a_removed_document_can_be_added_again(db, built):
    database = Database.open(db)
    record = database.documents[numbers_of(database, "train")[2]]
    remove_documents(db, [record["id"]])
    added = add_documents(db, built.parent / "docs" / record["name"], embedder=EMBEDDER)
    assert added.documents[-1]["name"] == record["name"]
    assert added.documents[-1]["sha256"] == record["sha256"]
    assert len(added.documents) == len(database.documents) + 1


def test_new_documents_do_not_retrieve_removed_documents(db, additions):
    database = Database.open(db)
    removed = numbers_of(database, "train")[:5]
    remove_documents(db, removed)
    added = add_documents(db, additions, embedder=EMBEDDER)
    lists = added.split("train").neighbours[database.n_chunks :]
    assert not np.isin(added.document_of(lists), removed).any()
    assert (lists >= 0).all()


@pytest.mark.parametrize(
    ("built_with", "added_with", "weights"),
    [
        (["a={a}"], ["b={b}"], {"a": None, "b": None}),
        (["a={a}:2"], ["b={b}:3"], {"a": 2.0, "b": 3.0}),
        (["a={a}:2"], ["a={b}"], {"a": 2.0}),  # a known source keeps its weight
        (["a={a}:2"], ["a={b}:5"], {"a": 5.0}),
        (["a={a}"], ["b={b}:3"], None),
        (["a={a}:2"], ["b={b}"], None),
    ],
)
def test_either_all_sources_have_weights_or_none(tmp_path, built_with, added_with, weights):
    files = {name: json_lines(tmp_path / f"{name}.jsonl", {name: f"text of {name} " * 9}) for name in "ab"}
    build_database(
        list(map(parse_source, (s.format(**files) for s in built_with))),
        tmp_path / "db",
        replace(SMALL, held_out=0.0),
        EMBEDDER,
    )
    expected = all_bytes(tmp_path / "db")
    new = list(map(parse_source, (s.format(**files) for s in added_with)))
    if weights is None:
        with pytest.raises(UserError, match=r"only some sources of .* would have a weight"):
            add_documents(tmp_path / "db", new, embedder=EMBEDDER)
        assert all_bytes(tmp_path / "db") == expected
        return
    sources = add_documents(tmp_path / "db", new, embedder=EMBEDDER).manifest["sources"]
    assert {source["name"]: source["weight"] for source in sources} == weights
    spans = [span for source in sources for span in source["rows"]]
    assert spans[0][0] == 0
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


def test_documents_are_removed_by_number_and_by_name(db):
    database = Database.open(db)
    first, second, third = numbers_of(database, "train")[:3]
    held_out = numbers_of(database, "valid")[0]
    name = database.documents[second]["name"]
    removed = remove_documents(db, [first, name, np.int64(third), held_out])
    assert [r["id"] for r in removed.documents if r.get("removed")] == sorted([first, second, third, held_out])
    rows = np.isin(removed.split("train").documents[:], [first, second, third])
    assert np.array_equal(removed.removed(np.arange(removed.n_chunks)), rows)
    assert not removed.split("train").tokens[:][rows].any()
    assert not removed.split("valid").tokens[:][removed.split("valid").documents[:] == held_out].any()
    assert verify_database(db, EMBEDDER).broken == []


def test_a_number_is_not_a_name_and_a_name_removes_all_documents_that_have_it(tmp_path):
    names = ["2", "0", "same", "same", "other"]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"name": n, "text": f"text {i} " * 9}) + "\n" for i, n in enumerate(names)))
    build_database(path, tmp_path / "db", replace(SMALL, held_out=0.0), EMBEDDER)
    assert [r.get("removed", False) for r in remove_documents(tmp_path / "db", [2]).documents] == [0, 0, 1, 0, 0]
    assert [r.get("removed", False) for r in remove_documents(tmp_path / "db", ["same"]).documents] == [0, 0, 1, 1, 0]
    assert [r.get("removed", False) for r in remove_documents(tmp_path / "db", ["0"]).documents] == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("unknown", [999, "999", "nobody.py", -1, ""])
def test_an_unknown_document_is_refused_in_one_line_and_nothing_changes(db, unknown):
    expected = all_bytes(db)
    with pytest.raises(UserError, match="has no document") as error:
        remove_documents(db, [0, unknown])
    assert "\n" not in str(error.value)
    assert all_bytes(db) == expected


def test_removing_twice_changes_nothing(db, capsys):
    remove_documents(db, [1, 2])
    expected = all_bytes(db)
    remove_documents(db, [2, 1, 2])
    assert all_bytes(db) == expected
    assert "nothing was removed" in capsys.readouterr().err
    assert remove_documents(db, []).n_removed
    assert all_bytes(db) == expected


def test_a_wrong_or_missing_embedder_is_refused_before_an_edit_starts(db, additions, monkeypatch):
    def missing():
        raise UserError("no BERT here")

    monkeypatch.setattr("retro_np.retrieval.database.load_bert", missing)
    wrong_embedder = CountingEmbedder()
    wrong_embedder.sha256 = "ab" * 32
    expected = all_bytes(db)
    for embedder, complaint in ((wrong_embedder, "was built with embedder counting"), (None, "no BERT here")):
        with pytest.raises(UserError, match=complaint):
            add_documents(db, additions, embedder=embedder)
        assert all_bytes(db) == expected


def test_a_folder_without_a_database_is_not_edited(tmp_path, additions):
    for edit in (lambda p: add_documents(p, additions), lambda p: remove_documents(p, [0]), compact):
        with pytest.raises(UserError, match="no database at"):
            edit(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_database_cannot_be_added_to_itself(db):
    expected = all_bytes(db)
    for folder, complaint in (
        (db, "is both the corpus and the database: give"),
        (db / "manifest.json", "is inside the database"),
    ):
        with pytest.raises(UserError, match=complaint):
            add_documents(db, folder, embedder=EMBEDDER)
    assert all_bytes(db) == expected


def test_a_reader_waits_while_another_process_moves_an_edit_into_place(db, monkeypatch):
    """The reader opens the database while another thread holds its lock, and gets the edited database."""

    def stopped(path):
        if (path / "edit" / "manifest.json").exists():
            raise KeyboardInterrupt  # after the edit is committed, before its files are moved

    monkeypatch.setattr(editing, "finish_edit", stopped)
    with pytest.raises(KeyboardInterrupt):
        remove_documents(db, [0])
    monkeypatch.setattr(editing, "finish_edit", journal.finish_edit)
    assert (db / "edit" / "manifest.json").exists()
    is_locked = threading.Event()

    def hold():
        with locked(db, "edit"):
            is_locked.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    is_locked.wait()
    assert Database.open(db).documents[0]["removed"]
    holder.join()
    with locked(db, "edit"):
        monkeypatch.setattr(journal, "LOCK_TIMEOUT", 0.1)
        (db / "edit").mkdir()
        (db / "edit" / "manifest.json").write_bytes((db / "manifest.json").read_bytes())
        with pytest.raises(UserError, match="in use by another edit"):
            Database.open(db)


def test_training_refuses_a_database_whose_documents_are_all_removed(db, tmp_path):
    database = remove_documents(db, numbers_of(Database.open(db), "train"))
    config = RetroConfig(300, 16, 16, n_heads=2, d_head=8, n_layers=2, cca_layers=(), chunk_size=8)
    with pytest.raises(UserError, match="has no training documents"):
        train(database, config, TrainingConfig(steps=1, sequence_length=64), tmp_path / "run")


def test_the_control_of_an_evaluation_does_not_use_neighbours_of_removed_chunks():
    removed = np.array([0, 3, 4])
    shuffled = _permutation(9, removed, 5)
    others = np.setdiff1d(np.arange(9), removed)
    assert sorted(shuffled[others]) == others.tolist()
    assert (shuffled[others] != others).all()
