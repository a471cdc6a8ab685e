"""Ground truth: neighbours by exact search over the remaining chunks, and the remaining records."""

from dataclasses import replace

import numpy as np
import pytest
from exact_lists import assert_lists_are_exact, numbers_of, rows_of
from support import EMBEDDER, SMALL, all_bytes, json_lines

from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import parse_source
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.verify import verify_database
from retro_np.training.batches import training_batch

pytestmark = pytest.mark.usefixtures("no_flushing")


def test_compacting_forgets_duplicates_of_a_removed_document(db, built, tmp_path):
    database = Database.open(db)
    first, second = (database.documents[number] for number in numbers_of(database, "valid")[:2])
    texts = {f"like {r['name']}": (built.parent / "docs" / r["name"]).read_text() for r in (first, second)}
    add_documents(db, json_lines(tmp_path / "c.jsonl", texts), embedder=EMBEDDER)
    remove_documents(db, [first["id"]])
    compact(db)
    listed = (db / "duplicates.jsonl").read_text()
    assert first["name"] not in listed
    assert second["name"] in listed


def test_all_documents_can_be_removed_and_new_ones_added_after_compacting(db, additions):
    database = Database.open(db)
    numbers = list(range(len(database.documents)))
    removed = remove_documents(db, numbers)
    assert (removed.search_keys(np.zeros((1, 16)), 3)[0] == -1).all()
    assert verify_database(db, EMBEDDER).broken == []
    empty = compact(db)
    assert (empty.n_chunks, empty.n_removed, len(empty.documents)) == (0, 0, 0)
    assert (empty.search_keys(np.zeros((1, 16)), 3)[0] == -1).all()
    assert empty.value([-1]).shape == (1, 16)
    assert verify_database(db, EMBEDDER).broken == []
    full = add_documents(db, additions, embedder=EMBEDDER)
    assert len(full.documents) == 12
    assert_lists_are_exact(full)
    assert verify_database(db, EMBEDDER).broken == []


def test_compacting_a_compact_database_changes_nothing(db, capsys):
    compact(db)
    expected = all_bytes(db)
    compact(db)
    assert all_bytes(db) == expected
    assert "nothing to compact" in capsys.readouterr().err


def test_compacting_joins_small_shards_and_lists_stay_exact(db, tmp_path):
    for number in range(4):
        corpus = json_lines(tmp_path / f"{number}.jsonl", {f"few {number}": f"value {number} index token"})
        database = add_documents(db, corpus, embedder=EMBEDDER)
    rows = rows_of(database)
    compacted = compact(db)
    assert len(compacted.folders("shards")) <= len(database.folders("shards")) - 3
    for expected, array in zip(rows, rows_of(compacted), strict=True):
        assert np.array_equal(expected, array)
    assert_lists_are_exact(compacted)
    assert sorted(p.name for p in (db / "shards").iterdir()) == [f.name for f in compacted.folders("shards")]


@pytest.mark.slow
def test_compacting_renumbers_documents_and_searches_for_new_neighbours(db, additions):
    add_documents(db, additions, embedder=EMBEDDER)
    database = remove_documents(db, [*range(0, 30, 3), 31, 40])
    rows = np.flatnonzero(~database.removed(np.arange(database.n_chunks)))
    values = database.value(rows)
    compacted = compact(db)
    remaining = [record for record in database.documents if not record.get("removed")]
    assert [r | {"id": 0} for r in compacted.documents] == [r | {"id": 0} for r in remaining]
    assert [r["id"] for r in compacted.documents] == list(range(len(remaining)))
    assert np.array_equal(compacted.value(np.arange(compacted.n_chunks)), values)
    assert compacted.n_removed == 0
    assert_lists_are_exact(compacted)
    assert verify_database(db, EMBEDDER).broken == []


def test_compacting_removes_a_shard_whose_only_document_was_removed(tmp_path):
    corpus = json_lines(tmp_path / "c.jsonl", {name: f"{name} is a text of some length " * 20 for name in "abcd"})
    config = replace(SMALL, held_out=0.0, shard_bytes=300)
    assert len(build_database(corpus, tmp_path / "db", config, EMBEDDER).folders("shards")) == 4
    remove_documents(tmp_path / "db", ["b"])
    compacted = compact(tmp_path / "db")
    assert [r["name"] for r in compacted.documents] == ["a", "c", "d"]
    assert len(compacted.folders("shards")) == 3
    assert sorted(p.name for p in (tmp_path / "db" / "shards").iterdir()) == ["00000", "00001", "00002"]
    assert_lists_are_exact(compacted)


def test_training_works_after_a_source_has_lost_all_its_documents(tmp_path):
    files = {name: json_lines(tmp_path / f"{name}.jsonl", {name: f"text of {name} " * 40}) for name in "ab"}
    sources = list(map(parse_source, (f"{name}={file}:1" for name, file in files.items())))
    build_database(sources, tmp_path / "db", replace(SMALL, held_out=0.0), EMBEDDER)
    options = {"sequence_length": 16, "batch_size": 4, "seed": 0, "step": 0}
    for edit in (lambda: remove_documents(tmp_path / "db", ["b"]), lambda: compact(tmp_path / "db")):
        database = edit()
        tokens, _, _ = training_batch(database, database.split("train"), 2, **options)
        assert tokens.any()
