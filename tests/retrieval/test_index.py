"""Ground truth: exact search, which test_search_kernel.py compares with a sort of all distances."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hostile.graphs import forked

from retro_np import load_bert
from retro_np.errors import UserError
from retro_np.kernels.search import merge_lists
from retro_np.retrieval.corpus import find_corpus
from retro_np.retrieval.hashing import BUCKETS, HashingEmbedder, count_features
from retro_np.retrieval.index import EfGate, ExactIndex, HnswIndex, build_hnsw, load_hnsw
from retro_np.retrieval.tokenizer import train_tokenizer

RNG = np.random.default_rng(0)


@pytest.mark.slow
def test_hnsw_finds_what_exact_search_finds_among_real_keys():
    texts = []
    for document in find_corpus("stdlib").documents():
        texts += [document.text[i : i + 230] for i in range(0, min(len(document.text), 6000), 230)]
        if len(texts) > 1200:
            break
    keys = load_bert().embed(texts[:1200], show_progress=False)
    true_ids, _ = ExactIndex(keys).search(keys, 10)
    for parts in (1, 3):  # one graph, and shards whose lists are merged
        bounds = [part[0] for part in np.array_split(np.arange(len(keys)), parts)]
        lists = [build_hnsw(part).search_graph(keys, 10) for part in np.array_split(keys, parts)]
        lists = [(ids + first, distances) for first, (ids, distances) in zip(bounds, lists, strict=True)]
        merged, _ = merge_lists(lists, 10)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(merged, true_ids, strict=True)])
        assert recall >= 0.95


def test_the_graph_finds_hashed_keys_with_their_larger_ef_margin(tmp_path):
    """Random signs leave keys far from each other, which is hard for a graph."""
    tokens = RNG.integers(2, 900, (6000, 64)) * (RNG.random((6000, 64)) < 0.9)
    counts = np.zeros(BUCKETS, np.uint32)
    count_features(tokens, counts)
    tokenizer = train_tokenizer(["a few words"], 258)
    embedder = HashingEmbedder(tokenizer, counts, len(tokens))
    keys = embedder.embed_tokens(tokens)
    build_hnsw(keys, tmp_path / "index")
    graph = load_hnsw(tmp_path / "index", keys, embedder.ef_margin)
    ids, _ = graph.search_graph(keys[:300], 10)
    true_ids, _ = ExactIndex(keys).search(keys[:300], 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, true_ids, strict=True)])
    assert recall >= 0.95


def test_the_graph_finds_equal_keys_among_other_keys():
    base = RNG.standard_normal((50, 16)).astype(np.float32)
    keys = RNG.permutation(np.repeat(base, 120, axis=0))
    index = build_hnsw(keys)
    assert index.n_entries == 50
    ids, distances = index.search_graph(base, 10)
    true_ids, true_distances = ExactIndex(keys).search(base, 10)
    assert np.array_equal(ids, true_ids)
    assert np.array_equal(distances, true_distances)
    ids, distances = index.search(base, 130)
    assert np.array_equal(distances, ExactIndex(keys).search(base, 130)[1])


def test_the_same_keys_give_the_same_file_and_a_loaded_index_gives_the_same_answers(tmp_path):
    keys = RNG.standard_normal((500, 13)).astype(np.float32)
    built = build_hnsw(keys, tmp_path / "a")
    build_hnsw(keys, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    queries = RNG.standard_normal((20, 13)).astype(np.float32)
    for array, answer in zip(load_hnsw(tmp_path / "a", keys).search(queries, 7), built.search(queries, 7), strict=True):
        assert np.array_equal(array, answer)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_distances_equal_those_of_exact_search(dtype):
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
def test_results_beyond_the_number_of_keys_are_missing(n, tmp_path):
    keys = RNG.standard_normal((n, 6)).astype(np.float32)
    build_hnsw(keys, tmp_path / "index")
    for index in (load_hnsw(tmp_path / "index", keys), ExactIndex(keys)):
        ids, distances = index.search(np.zeros((2, 6), np.float32), 5)
        assert ids.shape == distances.shape == (2, 5)
        assert (np.sort(ids[:, :n]) == np.arange(n)).all()
        assert (ids[:, n:] == -1).all()
        assert np.isinf(distances[:, n:]).all()


def test_the_graph_holds_the_keys_of_all_rows():
    keys = np.repeat(RNG.standard_normal((40, 6)).astype(np.float32), 2, axis=0)
    index = build_hnsw(keys)
    assert index.n_entries == 40
    assert np.array_equal(index.graph_keys(np.arange(80)), keys)


def test_searches_of_different_k_at_once_give_what_each_gives_alone():
    """hnswlib keeps ef in the graph, so no search may change it while another one runs. Without a margin, ef is k."""
    keys = RNG.standard_normal((2000, 32)).astype(np.float32)
    index = HnswIndex(build_hnsw(keys).graph, keys, np.empty(0, np.int64), ef_margin=0)
    queries, sizes = RNG.standard_normal((40, 30, 32)).astype(np.float32), [1 + 9 * (i % 20) for i in range(40)]
    alone = list(map(index.search_graph, queries, sizes))
    for _ in range(3):
        with ThreadPoolExecutor(40) as pool:
            for answer, expected in zip(pool.map(index.search_graph, queries, sizes), alone, strict=True):
                assert np.array_equal(answer[0], expected[0])
                assert np.array_equal(answer[1], expected[1])


def test_searches_of_the_same_k_run_at_once():
    gate, inside = EfGate(SimpleNamespace(set_ef=lambda ef: None)), threading.Barrier(4)

    def search(_):
        with gate.at(7):
            inside.wait(timeout=20)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(search, range(4)))


def test_a_search_of_another_k_waits_and_is_not_overtaken():
    order = []
    gate = EfGate(SimpleNamespace(set_ef=lambda ef: None))

    def search(ef):
        with gate.at(ef):
            order.append(ef)

    others = [threading.Thread(target=search, args=(ef,)) for ef in (9, 7, 7)]
    with gate.at(7):
        for other in others:
            other.start()
            time.sleep(0.05)
        assert not order
    for other in others:
        other.join()
    assert order == [9, 7, 7]


def test_a_process_forked_during_a_search_can_search():
    gate, ended = EfGate(SimpleNamespace(set_ef=lambda ef: None)), threading.Event()

    def search():
        with gate.at(7):
            ended.wait()

    thread = threading.Thread(target=search)
    thread.start()
    while not gate._states:
        time.sleep(0.001)

    def child():
        with gate.at(9):
            return "searched"

    try:
        assert forked(child) == "searched"
    finally:
        ended.set()
        thread.join()


def test_an_index_is_pickled_with_its_graph():
    keys = RNG.standard_normal((300, 8)).astype(np.float32)
    index = build_hnsw(keys)
    copy = pickle.loads(pickle.dumps(index))
    for array, other in zip(index.search_graph(keys[:3], 5), copy.search_graph(keys[:3], 5), strict=True):
        assert np.array_equal(array, other)


def test_a_folder_whose_name_is_not_utf8_can_hold_an_index(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    keys = RNG.standard_normal((300, 8)).astype(np.float32)
    built = build_hnsw(keys, folder / "index.hnsw")
    loaded = load_hnsw(folder / "index.hnsw", keys)
    for array, other in zip(built.search_graph(keys[:3], 5), loaded.search_graph(keys[:3], 5), strict=True):
        assert np.array_equal(array, other)


def test_a_query_of_another_width_is_refused():
    """hnswlib would read beyond the query."""
    index = build_hnsw(RNG.standard_normal((300, 64)).astype(np.float32))
    for search in (index.search, index.search_graph):
        for width in (1, 63, 65):
            with pytest.raises(UserError, match="width"):
                search(np.zeros((1, width), np.float32), 5)


@pytest.mark.parametrize("margin", [0, 10**30])
def test_any_margin_gives_k_neighbours(margin):
    keys = RNG.standard_normal((300, 8)).astype(np.float32)
    ids, distances = HnswIndex(build_hnsw(keys).graph, keys, np.empty(0, np.int64), margin).search_graph(keys[:3], 5)
    assert (ids[:, 0] == np.arange(3)).all()
    assert (distances[:, 0] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 40])
def test_a_stored_key_that_is_not_finite_is_named_when_the_graph_finds_it(bad, count):
    """The graph was made from keys that are finite, so it leads there."""
    keys = RNG.standard_normal((300, 8)).astype(np.float32)
    queries, graph = keys[:count] + np.float32(1e-3), build_hnsw(keys).graph
    forged = keys.copy()
    forged[count // 2, 3] = bad
    with pytest.raises(UserError, match=f"row {count // 2} holds NaN or infinity"):
        HnswIndex(graph, forged, np.empty(0, np.int64)).search_graph(queries, 5)


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        build_hnsw(np.array([[1.0, np.nan]], np.float32))
