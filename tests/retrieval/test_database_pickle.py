"""A database that is sent to another process. Ground truth: what it answers in this process."""

import concurrent.futures
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
from support import EMBEDDER

from retro_np import Database
from retro_np.errors import UserError
from retro_np.retrieval.edit import remove_documents
from retro_np.retrieval.join import DatabaseUnion

QUERIES = np.random.default_rng(0).standard_normal((7, EMBEDDER.d_key)).astype(np.float32)


def answer(database):
    ids, distances = database.search_keys(QUERIES, 5)
    return ids.tolist(), distances.tolist(), database.value(ids).tolist()


def parts_of(database):
    names = {record["sha256"] for record in database.documents[:9]}
    return [database, database.fraction(0.5), database.without(names), database.fraction(0.5, seed=1).without(names)]


def test_a_pickle_of_a_database_or_a_part_of_one_answers_as_the_original(db):
    for database in parts_of(Database.open(db, EMBEDDER)):
        copy = pickle.loads(pickle.dumps(database))
        assert answer(copy) == answer(database)
        assert copy.identity == database.identity
    assert len(pickle.dumps(Database.open(db, EMBEDDER))) < 10_000


def test_a_part_of_a_database_is_made_without_opening_the_database_again(db, monkeypatch):
    database = Database.open(db, EMBEDDER)
    monkeypatch.setattr(Database, "open", None)
    assert [part.n_removed > 0 for part in parts_of(database)[1:]] == [True, True, True]


def test_a_pickle_of_a_union_answers_as_the_original(db, tmp_path):
    other = shutil.copytree(db, tmp_path / "other")
    remove_documents(other, [1, 2])
    union = DatabaseUnion([Database.open(db), Database.open(other)])
    assert answer(pickle.loads(pickle.dumps(union))) == answer(union)


def test_a_database_that_was_sent_to_a_spawned_worker_answers_as_here(db, monkeypatch):
    monkeypatch.chdir(db.parent)
    database = Database.open(db.name)  # a relative path, which means something else to a worker elsewhere
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(answer, database).result() == answer(database)


def test_a_pickle_of_a_database_that_was_edited_since_is_refused(db):
    data = pickle.dumps(Database.open(db))
    remove_documents(db, [0])
    with pytest.raises(UserError, match="was edited since it was sent to this process"):
        pickle.loads(data)
