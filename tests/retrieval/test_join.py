"""Ground truth: exact search over the keys of all databases, sorted in NumPy."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from support import SMALL, write_corpus

from retro_np.errors import UserError
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import remove_documents
from retro_np.retrieval.join import DatabaseUnion, Retrieval, retrieve_from
from retro_np.sequences import sequence_neighbours
from retro_np.training.batches import training_batch


@pytest.fixture(scope="module")
def other(database, tmp_path_factory, embedder):
    """A second database, with the tokenizer of the first, one of its held-out documents, and new documents."""
    folder = tmp_path_factory.mktemp("other")
    corpus = write_corpus(folder / "docs", documents=15, seed=11)
    held_out = next(record for record in database.documents if record["split"] == "valid")
    rows = np.flatnonzero(np.asarray(database.split("valid").documents) == held_out["id"])
    (corpus / "copied.py").write_text(database.text(database.split("valid").tokens[rows].reshape(-1)))
    config = replace(SMALL, tokenizer=str(database.path / "tokenizer.json"), held_out=0.0, shard_bytes=4000)
    return build_database(corpus, folder / "db", config, embedder)


def all_keys(*databases):
    return np.concatenate([np.asarray(database.keys("train")[:], np.float32) for database in databases])


def test_a_union_finds_the_nearest_chunks_of_all_databases(database, other, embedder):
    union, keys = DatabaseUnion([database, other]), all_keys(database, other)
    queries = embedder.embed(["class value return", "neighbour", "def index token"])
    ids, distances = union.search_keys(queries, 9)
    true_distances = ((queries[:, None].astype(np.float64) - keys) ** 2).sum(axis=-1)
    np.testing.assert_allclose(distances, np.sort(true_distances)[:, :9], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(true_distances, ids, 1), distances, rtol=1e-5)
    assert union.n_chunks == len(keys)
    for number in (0, database.n_chunks - 1, database.n_chunks, union.n_chunks - 1):
        inside = number - database.n_chunks
        owner, local = (database, number) if inside < 0 else (other, inside)
        assert union.value(number).tolist() == owner.value(local).tolist()
        record = union.documents[int(union.document_of(number))]
        assert record == owner.documents[int(owner.document_of(local))]
    missing = np.array([[-1, 0]])
    assert not union.value(missing)[0, 0].any()
    assert union.document_of(missing)[0, 0] == -1
    with pytest.raises(UserError, match="chunk ids go from 0"):
        union.value([union.n_chunks])


def test_a_union_of_one_database_finds_what_that_database_finds(database, embedder):
    queries = embedder.embed(["class value return"])
    for array, expected in zip(
        DatabaseUnion([database]).search_keys(queries, 5), database.search_keys(queries, 5), strict=True
    ):
        assert np.array_equal(array, expected)


def test_databases_that_cannot_be_compared_are_refused(database, corpus, tmp_path, other):
    chunks = build_database(corpus, tmp_path / "chunks", replace(SMALL, chunk_size=4), "hashing")
    with pytest.raises(UserError, match="differ in their chunk size"):
        DatabaseUnion([database, chunks])
    tokens = build_database(corpus, tmp_path / "tokens", replace(SMALL, vocabulary_size=290), "hashing")
    with pytest.raises(UserError, match="differ in their tokenizer"):
        retrieve_from(database, tokens)
    config = replace(SMALL, tokenizer=str(database.path / "tokenizer.json"))
    keys = build_database(corpus, tmp_path / "keys", config, "hashing")
    with pytest.raises(UserError, match="were made by different embedders"):
        DatabaseUnion([database, keys])
    with pytest.raises(UserError, match="needs at least one database"):
        DatabaseUnion([])
    # A database with other keys can be swapped in: its own embedder embeds the chunks.
    assert retrieve_from(database, keys, 3).split.neighbours.shape == (len(database.split("valid").tokens), 3)


def test_held_out_chunks_retrieve_from_another_database_but_never_their_own_text(database, other):
    retrieval = retrieve_from(database, other, 7)
    keys, queries = all_keys(other), np.asarray(database.keys("valid")[:], np.float32)
    held_out_texts = {record["sha256"] for record in database.documents if record["split"] == "valid"}
    copied = [record["id"] for record in other.documents if record["sha256"] in held_out_texts]
    assert len(copied) == 1
    true_distances = ((queries[:, None].astype(np.float64) - keys) ** 2).sum(axis=-1)
    true_distances[:, other.document_of(np.arange(other.n_chunks)) == copied[0]] = np.inf
    np.testing.assert_allclose(retrieval.split.distances, np.sort(true_distances)[:, :7], rtol=1e-5)
    values = sequence_neighbours(retrieval.database, retrieval.split, np.array([[0, 1]]), 2)
    assert values[0].tolist() == other.value(retrieval.split.neighbours[:2, :2]).tolist()


def test_swapping_in_the_same_database_changes_nothing(database):
    stored, swapped = Retrieval.own(database, "valid"), retrieve_from(database, database)
    assert np.array_equal(stored.split.distances[:], swapped.split.distances)
    assert np.array_equal(stored.split.neighbours[:], swapped.split.neighbours)


@pytest.mark.parametrize("index", ["hnsw", "exact"])
def test_a_fraction_finds_what_exact_search_finds_among_its_documents(database, embedder, index):
    opened, keys = Database.open(database.path, embedder, index), all_keys(database)
    queries = embedder.embed(["class value return", "neighbour"])
    true_distances = ((queries[:, None].astype(np.float64) - keys) ** 2).sum(axis=-1)
    smaller = set()
    for share in (0.05, 0.3, 0.8, 1.0):
        part = opened.fraction(share, seed=3)
        included = ~part.removed(np.arange(opened.n_chunks))
        documents = set(np.unique(opened.document_of(np.flatnonzero(included))).tolist())
        assert smaller <= documents  # a larger share includes a smaller one
        smaller = documents
        allowed = np.where(included, true_distances, np.inf)
        _, distances = part.search_keys(queries, 6)
        np.testing.assert_allclose(distances, np.sort(allowed)[:, :6], rtol=1e-5)
    assert len(smaller) == opened.manifest["splits"]["train"]["documents"]
    assert not opened.removed(np.arange(opened.n_chunks)).any()  # the whole database is unchanged
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(UserError, match="a fraction of a database"):
            opened.fraction(share)


def test_training_on_a_fraction_reads_only_its_documents(database):
    part = database.fraction(0.3, seed=3)
    split, deleted = part.split("train"), part.removed(np.arange(database.n_chunks))
    seen = set()
    for step in range(20):
        settings = {"sequence_length": 4 * SMALL.chunk_size, "batch_size": 2, "seed": 0, "step": step}
        tokens, _, neighbours = training_batch(part, split, 2, **settings)
        assert (tokens != 0).any(axis=1).all()
        seen |= {tuple(chunk) for chunk in tokens.reshape(-1, SMALL.chunk_size).tolist()}
        seen |= {tuple(chunk) for chunk in neighbours[..., : SMALL.chunk_size].reshape(-1, SMALL.chunk_size).tolist()}
    chunks = [tuple(chunk) for chunk in database.split("train").tokens[:].tolist()]
    included = {chunk for chunk, is_deleted in zip(chunks, deleted, strict=True) if not is_deleted}
    assert seen - included <= {(0,) * SMALL.chunk_size}
    assert len(seen) > len(included) / 2
    assert part.identity != database.identity


def test_a_removed_document_is_in_no_fraction_and_no_union(database, other, tmp_path, embedder):
    shutil.copytree(other.path, tmp_path / "db")
    removed = int(other.document_of(0))
    edited = remove_documents(tmp_path / "db", [removed])
    edited = Database.open(edited.path, embedder)
    queries = embedder.embed(["class"])
    for searched in (edited.fraction(0.9), DatabaseUnion([database, edited]).databases[1], edited):
        ids, _ = searched.search_keys(queries, searched.n_chunks)
        assert removed not in searched.document_of(ids[ids >= 0])


def test_a_union_of_a_database_with_itself_is_refused(database):
    with pytest.raises(UserError, match="is in the union twice"):
        DatabaseUnion([database, Database.open(database.path)])


def test_a_union_is_searched_by_text_like_a_database(database, other, embedder):
    union = DatabaseUnion([Database.open(database.path, embedder), other])
    ids, distances = union.search(["class value return"], 5)
    expected = union.search_keys(embedder.embed(["class value return"]), 5)
    assert np.array_equal(ids, expected[0])
    assert np.array_equal(distances, expected[1])


def test_a_union_is_searched_with_the_embedder_that_its_databases_contain(corpus, tmp_path):
    one = build_database(corpus, tmp_path / "one", SMALL, "hashing")
    remove_documents(shutil.copytree(one.path, tmp_path / "two"), [0])
    databases = [Database.open(tmp_path / name) for name in ("one", "two")]
    ids, distances = DatabaseUnion(databases).search("class value return", 4)
    expected = Database.open(tmp_path / "one").search("class value return", 2)[1]
    assert np.array_equal(distances[::2], expected)
    assert np.array_equal(distances[1::2], expected)
    assert len(set(ids.tolist())) == 4
