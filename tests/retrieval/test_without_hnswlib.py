"""Without hnswlib, in a new interpreter. Ground truth: exact search over all keys in this interpreter."""

import json
import shutil

import numpy as np
import pytest
from exact_lists import assert_lists_are_exact
from support import EMBEDDER, fresh_python, json_lines

from retro_np.kernels.search import exact_search
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import compact
from retro_np.retrieval.index import HnswIndex
from retro_np.retrieval.verify import verify_database

NOTICE = "hnswlib is not installed: search compares every key (pip install hnswlib for the graph index)"
BLOCKED = """
import json, sys
sys.modules["hnswlib"] = None
sys.path.insert(0, "tests")
from support import EMBEDDER, SHARDS
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import add_documents
from retro_np.retrieval.verify import verify_database
def show(database, texts):
    ids, distances = database.search(texts, 7)
    report = verify_database(database.path, EMBEDDER)
    kinds = sorted({type(shard.index).__name__ for shard in database._shards})
    print(json.dumps([ids.tolist(), distances.tolist(), kinds, report.broken, report.checked]))
"""
TEXTS = ["class value return", "neighbour", "zqxj"]


def in_new_interpreter(code):
    """The lines that `show` printed, parsed. The notice must be on standard error exactly once."""
    out, err, status = fresh_python(BLOCKED + code)
    assert status == 0, err
    assert err.count(NOTICE) == 1
    return [json.loads(line) for line in out.splitlines()]


def assert_exact(database, ids, distances):
    keys = np.concatenate([np.load(folder / "keys.npy") for folder in database.folders("shards")])
    true_ids, true_distances = exact_search(EMBEDDER.embed(TEXTS), keys, 7)
    assert ids == true_ids.tolist()
    assert np.array_equal(np.array(distances, np.float32), true_distances)


@pytest.fixture(scope="module")
def without_graphs(tmp_path_factory, corpus):
    """A database that was built and then edited without hnswlib, and what `show` printed before and after the edit."""
    folder = tmp_path_factory.mktemp("db")
    added = json_lines(folder / "added.jsonl", {"added": TEXTS[-1]})
    outputs = in_new_interpreter(f"""
show(build_database({str(corpus)!r}, {str(folder / "db")!r}, SHARDS, EMBEDDER), {TEXTS})
show(add_documents({str(folder / "db")!r}, {str(added)!r}, embedder=EMBEDDER), {TEXTS})
""")
    return folder / "db", outputs


def test_a_database_is_built_searched_edited_and_verified_without_hnswlib(without_graphs):
    path, outputs = without_graphs
    database = Database.open(path, EMBEDDER)
    assert not list(path.rglob("index.hnsw"))
    for ids, distances, kinds, broken, checked in outputs:
        assert kinds == ["ExactIndex"]
        assert broken == []
        assert any("no graph index and must be searched exactly" in line for line in checked)
        assert len(ids) == len(distances) == len(TEXTS)
    assert_exact(database, *outputs[-1][:2])
    assert outputs[-1][1][-1][0] == 0  # the added text is found
    assert outputs[0][1][-1][0] > 0
    assert_lists_are_exact(database)


def test_a_database_without_graphs_opens_with_hnswlib_and_finds_the_same_chunks(without_graphs):
    path, outputs = without_graphs
    ids, distances = Database.open(path, EMBEDDER).search(TEXTS, 7)
    assert [ids.tolist(), distances.tolist()] == outputs[-1][:2]
    report = verify_database(path, EMBEDDER)
    assert report.broken == []
    assert any("no graph index" in line for line in report.checked)


def test_compacting_gives_a_database_without_graphs_its_graphs(without_graphs, tmp_path):
    path = shutil.copytree(without_graphs[0], tmp_path / "db")
    database = compact(path)
    assert all(database.has_graph(folder) for folder in database.folders("shards"))
    assert len(list(path.rglob("index.hnsw"))) == len(database.folders("shards"))
    assert all(type(shard.index) is HnswIndex for shard in database._shards)
    assert verify_database(path, EMBEDDER).broken == []
    assert_lists_are_exact(database)


@pytest.mark.slow
def test_a_database_with_graphs_is_searched_exactly_and_edited_without_hnswlib(db, tmp_path):
    added = json_lines(tmp_path / "added.jsonl", {"added": TEXTS[-1]})
    graphs = len(list(db.rglob("index.hnsw")))
    old = Database.open(db, EMBEDDER)
    first, second = in_new_interpreter(f"""
show(Database.open({str(db)!r}, EMBEDDER), {TEXTS})
show(add_documents({str(db)!r}, {str(added)!r}, embedder=EMBEDDER), {TEXTS})
""")
    assert first[2] == second[2] == ["ExactIndex"]
    assert first[3] == second[3] == []
    assert f"not checked: {graphs} graph indexes (hnswlib is not installed)" in second[4]
    edited = Database.open(db, EMBEDDER)
    assert [edited.has_graph(folder) for folder in edited.folders("shards")] == [True] * graphs + [False]
    assert len(edited.documents) == len(old.documents) + 1
    assert_exact(edited, *second[:2])
    assert_lists_are_exact(edited)
    assert verify_database(db, EMBEDDER).broken == []
    assert len(list(db.rglob("index.hnsw"))) == graphs
