"""Ground truth: chunks, values and distances computed from the documents in plain Python."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import SMALL, CountingEmbedder, all_bytes

from retro_np.errors import UserError
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.corpus import find_corpus, held_out
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import add_documents
from retro_np.retrieval.embedders import load_embedder
from retro_np.retrieval.tokenizer import encode
from retro_np.retrieval.verify import verify_database
from retro_np.sequences import sequence_neighbours


def plain_chunks(database, corpus, split, share):
    """[(document number, tokens)] of a split, as plain lists."""
    m, chunks = database.chunk_size, []
    for number, document in enumerate(corpus.documents()):
        if held_out(document.name, share) == (split == "valid"):
            tokens = [*encode(database.tokenizer, document.text), 1]
            tokens += [0] * (-len(tokens) % m)
            chunks += [(number, tokens[i : i + m]) for i in range(0, len(tokens), m)]
    return chunks


@pytest.mark.parametrize("split", ["train", "valid"])
def test_each_document_is_cut_into_chunks_from_its_own_start(database, corpus, split):
    plain = plain_chunks(database, find_corpus(corpus), split, SMALL.held_out)
    stored = database.split(split)
    assert stored.tokens[:].tolist() == [tokens for _, tokens in plain]
    assert stored.documents[:].tolist() == [number for number, _ in plain]


def test_a_value_is_a_chunk_and_its_continuation_in_the_same_document(database, corpus):
    plain = plain_chunks(database, find_corpus(corpus), "train", SMALL.held_out)
    for i, (number, tokens) in enumerate(plain):
        follows = i + 1 < len(plain) and plain[i + 1][0] == number
        assert database.value(i).tolist() == tokens + (plain[i + 1][1] if follows else [0] * database.chunk_size)


def test_values_have_the_shape_of_their_ids_and_missing_ones_are_padding(database):
    ids = np.array([[0, -1], [3, 1]])
    values = database.value(ids)
    assert values.shape == (2, 2, 2 * database.chunk_size)
    assert not values[0, 1].any()
    assert values[1, 0].tolist() == database.value(3).tolist()
    for wrong in (-2, database.n_chunks):
        with pytest.raises(UserError, match="chunk ids go from 0"):
            database.value([wrong])


def test_neighbours_of_a_training_chunk_are_the_nearest_chunks_of_other_documents(database, embedder):
    split = database.split("train")
    documents = split.documents[:]
    keys = embedder.embed([database.text(tokens) for tokens in split.tokens[:]])
    for row in range(0, len(split.tokens), 7):
        distances = ((keys - keys[row]) ** 2).sum(axis=1)
        distances[documents == documents[row]] = np.inf
        nearest = np.sort(distances)[: split.neighbours.shape[1]]
        np.testing.assert_allclose(split.distances[[row]][0], nearest, rtol=1e-4, atol=1e-4)
        assert documents[row] not in documents[split.neighbours[[row]][0]]


def test_neighbours_beyond_the_stored_ones_are_padding(database):
    split = database.split("valid")
    values = sequence_neighbours(database, split, np.array([[0, 1, -1]]), 40)
    stored = SMALL.neighbours + SMALL.extra_candidates
    assert values.shape == (1, 3, 40, 2 * database.chunk_size)
    assert values[0, :2, :stored].any(axis=-1).all()
    assert not values[0, :2, stored:].any()
    assert not values[0, 2].any()  # a row of padding retrieves nothing


def test_search_finds_a_chunk_by_its_own_text_at_distance_zero(database):
    text = database.text(database.value(5)[: database.chunk_size])
    ids, distances = database.search(text, 3)
    assert distances[0] == 0
    assert database.text(database.value(ids[0])[: database.chunk_size]) == text
    ids, distances = database.search([text, "other"], 3)
    assert ids.shape == distances.shape == (2, 3)


def test_a_search_for_more_than_all_chunks_returns_all_of_them_and_then_missing_ones(database):
    ids, distances = database.search("value", 10 * database.n_chunks)
    assert sorted(ids[: database.n_chunks]) == list(range(database.n_chunks))
    assert (ids[database.n_chunks :] == -1).all()
    assert np.isinf(distances[database.n_chunks :]).all()
    with pytest.raises(UserError, match="at least 1, not 0"):
        database.search("value", 0)


def test_deleted_chunks_are_never_found(database, tmp_path):
    copy = shutil.copytree(database.path, tmp_path / "db")
    deleted, _ = database.search("value", 5)
    opened = Database.open(copy, CountingEmbedder())
    opened._deleted = np.sort(deleted)
    ids, _ = opened.search("value", database.n_chunks)
    assert not set(deleted) & set(ids)
    assert (ids >= 0).sum() == database.n_chunks - 5


def test_many_shards_hold_the_same_chunks_and_neighbours_as_one(corpus, database, tmp_path, embedder):
    many = build_database(corpus, tmp_path / "db", BuildConfig(**vars(SMALL) | {"shard_bytes": 3000}), embedder)
    assert len(list((tmp_path / "db" / "shards").iterdir())) > 3
    assert many.n_chunks == database.n_chunks
    ids = np.arange(database.n_chunks)
    assert np.array_equal(many.value(ids), database.value(ids))
    for split in ("train", "valid"):
        np.testing.assert_allclose(database.split(split).distances[:], many.split(split).distances[:], rtol=1e-5)
    opened = [Database.open(path, embedder, index="exact") for path in (many.path, database.path)]
    many_ids, ids = (exact.search(["value index", "class"], 9)[0] for exact in opened)
    assert np.array_equal(many_ids, ids)


def test_the_same_corpus_gives_the_same_bytes(corpus, database, tmp_path, embedder):
    build_database(corpus, tmp_path / "db", SMALL, embedder)
    assert all_bytes(tmp_path / "db") == all_bytes(database.path)


def test_a_finished_database_is_reused_and_different_settings_are_refused(corpus, database, embedder):
    expected = all_bytes(database.path)
    build_database(corpus, database.path, SMALL, embedder)
    assert all_bytes(database.path) == expected
    with pytest.raises(UserError, match="was started with chunk_size = 8, not 4; give the same value"):
        build_database(corpus, database.path, BuildConfig(**vars(SMALL) | {"chunk_size": 4}), embedder)


def test_the_error_for_a_flipped_byte_names_its_file(database, tmp_path):
    copy = shutil.copytree(database.path, tmp_path / "db")
    rng = np.random.default_rng(0)
    for path in sorted(p for p in copy.rglob("*") if p.is_file() and p.name != ".lock"):
        intact = path.read_bytes()
        for position in {0, len(intact) - 1, int(rng.integers(len(intact)))} if intact else {None}:
            data = bytearray(intact or b"!")
            if position is not None:
                data[position] ^= 1
            path.write_bytes(data)
            with pytest.raises(UserError, match=path.name):
                Database.open(copy)
        path.write_bytes(intact)
    Database.open(copy)


def test_a_folder_without_a_finished_database_is_refused(tmp_path, database):
    with pytest.raises(UserError, match="no database at"):
        Database.open(tmp_path)
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        Database.open(tmp_path)


def test_a_wrong_embedder_is_refused(database):
    wrong_embedder = CountingEmbedder()
    wrong_embedder.sha256 = "ab" * 32
    with pytest.raises(UserError, match=r"was built with embedder counting .*; pass the former: --embedder FOLDER "):
        Database.open(database.path, wrong_embedder)


def test_a_hashing_database_refuses_a_wrong_embedder(corpus, tmp_path, embedder):
    path = build_database(corpus, tmp_path / "db", SMALL, "hashing").path
    with pytest.raises(UserError, match=r"was built with embedder hashing .*; leave out --embedder, or build another"):
        Database.open(path, embedder)


def test_hashing_as_the_embedder_of_a_database_names_the_one_that_made_its_keys(corpus, tmp_path, database):
    hashed = build_database(corpus, tmp_path / "db", SMALL, "hashing")
    keys = Database.open(hashed.path, "hashing").embedder.embed(["return self"])
    assert np.array_equal(keys, hashed.embedder.embed(["return self"]))

    def add(path, embedder):
        return add_documents(path, corpus, embedder=embedder)

    for command in (Database.open, verify_database, add):
        with pytest.raises(UserError, match=r"was built with embedder counting \(.*, not hashing; pass the former: "):
            command(database.path, load_embedder("hashing"))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda db: db.search("a", 0), "at least 1, not 0"),
        (lambda db: db.search("a", 1.5), "whole number"),
        (lambda db: db.search_keys(np.zeros((1, 3)), 1), r"keys must be \(N, 16\)"),
        (lambda db: db.search_keys(np.full((1, 16), np.nan), 1), "NaN or infinite"),
        (lambda db: db.value([0.0]), "are integers"),
        (lambda db: db.document_of(-2), "chunk ids go from 0"),
        (lambda db: db.split("dev"), "has no split 'dev'"),
        (lambda db: Database.open(db.path, index="flat"), "hnsw or exact"),
    ],
)
def test_the_error_for_an_invalid_argument_says_what_is_valid(database, call, complaint):
    with pytest.raises(UserError, match=complaint):
        call(database)


def test_odd_queries_find_neighbours(database):
    ids, distances = database.search(["", "lone \ud800", "x" * 10_000], 2)
    assert (ids >= 0).all()
    assert np.isfinite(distances).all()
    assert database.search([], 2)[0].shape == (0, 2)
    assert database.value([]).shape == (0, 2 * database.chunk_size)


def test_files_that_the_manifest_does_not_list_are_not_read(database, tmp_path):
    copy = shutil.copytree(database.path, tmp_path / "db")
    (copy / "shards" / "00001").mkdir()
    (copy / "shards" / "00001" / "tokens.npy").write_bytes(b"whatever")
    (copy / "shards" / "notes.txt").write_text("mine")
    assert Database.open(copy).n_chunks == database.n_chunks


@pytest.mark.parametrize("index", ["hnsw", "exact"])
def test_search_returns_the_smallest_of_all_distances(database, embedder, index):
    keys = np.load(database.path / "shards" / "00000" / "keys.npy").astype(np.float64)
    texts = [f"class value {i} return" * (1 + i % 3) for i in range(12)]
    distances = ((embedder.embed(texts)[:, None].astype(np.float64) - keys) ** 2).sum(axis=-1)
    ids, nearest = Database.open(database.path, embedder, index=index).search(texts, 5)
    np.testing.assert_allclose(nearest, np.sort(distances)[:, :5], rtol=1e-4)  # float32 keys and sums
    np.testing.assert_allclose(np.take_along_axis(distances, ids, 1), nearest, rtol=1e-4)


odd_texts = st.text(max_size=30) | st.sampled_from(
    ["", "a", "\0", "line\n" * 200, "<padding token><end of text>", "\ud800 lone", "x" * 500]
)


@pytest.mark.slow
@given(st.lists(odd_texts, min_size=1, max_size=8), st.integers(1, 5), st.sampled_from([50, 1000]))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_odd_documents_are_built_and_every_neighbour_is_from_another_document(tmp_path_factory, texts, m, shard_bytes):
    assume(any(texts))  # a corpus without a single byte is refused
    folder = tmp_path_factory.mktemp("odd")
    (folder / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = BuildConfig(m, 300, None, 0.0, "float16", 2, 3, None, shard_bytes)
    database = build_database(folder / "c.jsonl", folder / "db", config, CountingEmbedder())
    split = database.split("train")
    sources = database.document_of(split.neighbours[:])
    assert not (sources == split.documents[:][:, None]).any()
    others = len(split.tokens) - np.bincount(split.documents[:])[split.documents[:]]
    assert ((split.neighbours[:] >= 0).sum(axis=1) == np.minimum(others, 5)).all()


def test_the_manifest_stores_the_embedders_ef_margin_or_the_default_64(corpus, database, tmp_path):
    wide = CountingEmbedder()
    wide.ef_margin = 7
    assert database.ef_margin == database.manifest["embedder"]["margin"] == 64
    assert build_database(corpus, tmp_path / "db", SMALL, wide).ef_margin == 7
    assert Database.open(tmp_path / "db").manifest["embedder"]["margin"] == 7


def test_chunks_are_embedded_from_their_tokens_if_the_embedder_reads_tokens(database):
    chunks = database.split("train").tokens[:5]
    opened = Database.open(database.path, CountingEmbedder())
    assert np.array_equal(opened.embed_chunks(chunks), CountingEmbedder().embed([opened.text(row) for row in chunks]))
    reader = CountingEmbedder()
    reader.embed_tokens = lambda tokens: np.repeat(tokens[:, :1], 16, axis=1)
    assert Database.open(database.path, reader).embed_chunks(chunks)[:, 5].tolist() == chunks[:, 0].tolist()


def test_an_unknown_name_of_an_embedder_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="embedder must be \"hashing\" or an object that embeds, not 'bert'"):
        build_database(corpus, tmp_path / "db", SMALL, "bert")


def test_ids_of_any_integer_type_give_the_same_values(database):
    for dtype in (np.int8, np.uint8, np.uint64):
        ids = np.array([3, 0], dtype)
        assert np.array_equal(database.value(ids), database.value([3, 0]))
