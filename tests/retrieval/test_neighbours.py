"""Ground truth: plain loops over every chunk of every document, and NumPy's concatenate for sharded arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, CountingEmbedder, write_corpus

from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.sharded import Sharded
from retro_np.sequences import choose_neighbours, sequence_neighbours


@given(st.data())
def test_chosen_neighbours_equal_those_of_a_loop_over_allowed_documents(data):
    batch, length, stored, k = (data.draw(st.integers(1, 4)) for _ in range(4))
    k += data.draw(st.integers(0, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sources = rng.integers(0, 5, size=30)  # chunk -> document
    candidates = rng.integers(-1, 30, size=(batch, length, stored))
    candidate_documents = np.where(candidates >= 0, sources[candidates], -1)
    excluded = rng.integers(-1, 5, size=(batch, 3))
    chosen = choose_neighbours(candidates, candidate_documents, excluded[:, None, :], k)
    for b in range(batch):
        for u in range(length):
            first = [c for c in candidates[b, u] if c >= 0 and sources[c] not in excluded[b]][:k]
            assert chosen[b, u].tolist() == first + [-1] * (k - len(first))


def test_a_training_batch_gets_the_nearest_values_from_outside_its_documents(database):
    split = database.split("train")
    m, k, n = database.chunk_size, 4, len(split.tokens)
    rng = np.random.default_rng(1)
    rows = np.array([np.arange(start, start + 12) for start in rng.integers(0, n - 12, size=8)])
    rows[0, 9:] = -1
    values = sequence_neighbours(database, split, rows, k)
    assert values.shape == (8, 12, k, 2 * m)
    spanned = []
    for b, row in enumerate(rows):
        documents = {int(split.documents[i]) for i in row if i >= 0}
        spanned.append(len(documents))
        for u, i in enumerate(row):
            neighbours = split.neighbours[int(i)] if i >= 0 else []
            allowed = [c for c in neighbours if c >= 0 and int(database.document_of(c)) not in documents][:k]
            expected = [database.value(c).tolist() for c in allowed] + [[0] * 2 * m] * (k - len(allowed))
            assert values[b, u].tolist() == expected
    assert max(spanned) > 1  # otherwise the test would not cover several documents


def test_held_out_chunks_may_retrieve_from_every_training_document(database):
    split = database.split("valid")
    rows = np.arange(min(6, len(split.tokens)))[None]
    values = sequence_neighbours(database, split, rows, 3)
    assert values[0].tolist() == database.value(split.neighbours[:6, :3]).tolist()
    assert not set(database.document_of(split.neighbours[:]).reshape(-1).tolist()) & set(split.documents[:].tolist())


def test_no_sequence_gets_a_removed_chunk(database):
    split = database.split("valid")
    opened = Database.open(database.path)
    deleted = int(split.neighbours[0][0])
    opened._deleted = np.array([deleted])
    first = sequence_neighbours(opened, split, np.array([[0]]), 1)[0, 0, 0]
    assert first.tolist() == database.value(split.neighbours[0][1]).tolist()


@pytest.mark.parametrize("shard_bytes", [60, 10**6])
def test_a_document_longer_than_a_shard_retrieves_none_of_its_own_chunks(tmp_path, shard_bytes):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "long").write_text("the same line again\n" * 60)  # equal keys: its nearest chunks are all its own
    (folder / "other").write_text("something else\n" * 4)
    config = BuildConfig(4, 258, None, 0.0, "float32", 2, 1, None, shard_bytes)
    database = build_database(folder, tmp_path / "db", config, CountingEmbedder())
    split = database.split("train")
    keys = np.concatenate([np.load(p) for p in sorted((tmp_path / "db" / "shards").glob("*/keys.npy"))])
    documents = split.documents[:]
    for row in range(len(documents)):
        distances = ((keys - keys[row]).astype(np.float64) ** 2).sum(axis=1)
        distances[documents == documents[row]] = np.inf
        nearest = np.sort(distances)[:3]
        np.testing.assert_allclose(split.distances[row], nearest, rtol=1e-4, atol=1e-3)  # float32 sums
        ids = split.neighbours[row]
        assert (ids >= 0).tolist() == np.isfinite(nearest).tolist()
        assert documents[row] not in documents[ids[ids >= 0]]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.data())
def test_sharded_arrays_are_indexed_like_one_array(sizes, data):
    sizes[0] += 1
    parts = np.split(np.arange(3 * sum(sizes)).reshape(-1, 3), np.cumsum(sizes)[:-1])
    joined, sharded = np.concatenate(parts), Sharded(parts)
    n = len(joined)
    row = st.integers(-n, n - 1)
    rows = data.draw(row | st.lists(row, min_size=1, max_size=6).map(np.array) | st.slices(n))
    assert sharded.shape == joined.shape
    assert np.array_equal(sharded[rows], joined[rows])
    assert np.array_equal(sharded[rows, :2], joined[rows][..., :2])
    assert np.array_equal(np.asarray(sharded), joined)
    for outside in (n, -n - 1):
        with pytest.raises(IndexError):
            sharded[outside]


@pytest.mark.slow
def test_bert_finds_a_chunk_by_its_own_text_and_shards_do_not_change_the_result(tmp_path):
    corpus, bert = write_corpus(tmp_path / "docs", documents=4, seed=2), load_bert()
    config = BuildConfig(**vars(SMALL) | {"held_out": 0.0, "chunk_size": 32})
    single = build_database(corpus, tmp_path / "single", config, bert)
    sharded = build_database(corpus, tmp_path / "sharded", BuildConfig(**vars(config) | {"shard_bytes": 900}), bert)
    assert single.d_key == bert.d_key
    assert single.n_chunks == sharded.n_chunks > 20
    texts = [single.text(single.value(i)[:32]) for i in range(single.n_chunks)]
    ids, distances = single.search(texts, 1)
    assert [texts[i] for i in ids[:, 0]] == texts
    assert distances.max() < 1e-9  # keys have length one; batches other than the build's may change their last bits
    np.testing.assert_allclose(single.split("train").distances[:], sharded.split("train").distances[:], atol=1e-5)
    opened = Database.open(tmp_path / "single")  # loads BERT on the first search
    assert opened.search(texts[3], 1)[0].tolist() == [3]
