"""Ground truth: exact search; for exact search, sorting all distances (test_search_kernel.py)."""

import numpy as np
import pytest

from retro_np import load_bert
from retro_np.errors import UserError
from retro_np.retrieval.corpus import find_corpus
from retro_np.retrieval.index import ExactIndex, build_hnsw, load_hnsw

RNG = np.random.default_rng(0)


def test_hnsw_finds_what_exact_search_finds_among_real_keys():
    texts = []
    for document in find_corpus("stdlib").documents():
        texts += [document.text[i : i + 230] for i in range(0, min(len(document.text), 6000), 230)]
        if len(texts) > 1200:
            break
    keys = load_bert().embed(texts[:1200], show_progress=False)
    found, _ = build_hnsw(keys).search(keys, 10)
    true, _ = ExactIndex(keys).search(keys, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, true, strict=True)])
    assert recall >= 0.95


def test_the_same_keys_give_the_same_file_and_a_loaded_index_the_same_answers(tmp_path):
    keys = RNG.standard_normal((500, 13)).astype(np.float32)
    built = build_hnsw(keys, tmp_path / "a")
    build_hnsw(keys, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    queries = RNG.standard_normal((20, 13)).astype(np.float32)
    for ours, theirs in zip(load_hnsw(tmp_path / "a", keys).search(queries, 7), built.search(queries, 7), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_distances_are_those_of_exact_search(dtype):
    keys = RNG.standard_normal((300, 9)).astype(dtype)
    queries = RNG.standard_normal((10, 9)).astype(np.float32)
    ids, distances = build_hnsw(keys).search(queries, 5)
    true_ids, true_distances = ExactIndex(keys).search(queries, 5)
    same = ids == true_ids
    assert same.mean() > 0.9
    np.testing.assert_allclose(distances[same], true_distances[same], rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_many_equal_keys_are_all_found():
    keys = np.ones((3000, 4), np.float32)
    keys[5] = 2
    ids, distances = build_hnsw(keys).search(np.ones((3, 4), np.float32), 50)
    assert (distances == 0).all()
    assert all(len(set(row)) == 50 for row in ids)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_more_than_there_is_comes_as_padding(n, tmp_path):
    keys = RNG.standard_normal((n, 6)).astype(np.float32)
    build_hnsw(keys, tmp_path / "index")
    for index in (load_hnsw(tmp_path / "index", keys), ExactIndex(keys)):
        ids, distances = index.search(np.zeros((2, 6), np.float32), 5)
        assert ids.shape == distances.shape == (2, 5)
        assert (np.sort(ids[:, :n]) == np.arange(n)).all()
        assert (ids[:, n:] == -1).all()
        assert np.isinf(distances[:, n:]).all()


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        build_hnsw(np.array([[1.0, np.nan]], np.float32))
