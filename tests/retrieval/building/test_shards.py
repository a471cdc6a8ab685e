"""Ground truth: distances sorted in NumPy, texts tokenised in one piece, lines read by json, one merge of all lists."""

import json
import resource
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SMALL, write_corpus

from retro_np.kernels.search import exact_search, listed_distances, merge_lists
from retro_np.retrieval import index, texts, tokenizer
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import find_corpus
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import Documents, summarise
from retro_np.retrieval.index import build_hnsw
from retro_np.retrieval.neighbours import Shard, search_shard


@st.composite
def searches(draw):
    """Keys, many of them equal, their documents, rows to use as queries, and deleted rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    documents = np.repeat(np.arange(len(sizes)) * 3, sizes)
    keys = rng.integers(-2, 3, (len(documents), draw(st.integers(1, 20)))).astype(np.float32)
    rows = rng.integers(0, len(keys), draw(st.integers(1, 12)))
    deleted = np.flatnonzero(rng.random(len(keys)) < draw(st.sampled_from([0, 0.1, 0.5, 0.95, 1])))
    return keys, documents, rows, deleted, draw(st.booleans()), draw(st.integers(1, 40))


@pytest.mark.parametrize("max_exact", [0, 10**6])  # up to this many keys, no graph is used
@settings(deadline=None, max_examples=60)
@given(search=searches())
def test_a_shard_finds_all_allowed_rows_in_order_of_distance(max_exact, search):
    keys, documents, rows, deleted, exclude, k = search
    shard = Shard(None, keys, documents)
    old_limit, index.MAX_EXACT_KEYS = index.MAX_EXACT_KEYS, max_exact
    try:
        shard.__dict__["index"] = build_hnsw(keys)
        own = documents[rows] if exclude else None
        neighbours, distances = search_shard(shard, keys[rows], k, own=own, deleted=deleted)
    finally:
        index.MAX_EXACT_KEYS = old_limit
    for query, row in enumerate(rows):
        true_distances = ((keys - keys[row]).astype(np.float64) ** 2).sum(axis=1)
        allowed = np.ones(len(keys), bool)
        allowed[deleted] = False
        allowed &= (not exclude) | (documents != documents[row])
        count = min(k, int(allowed.sum()))
        ids = neighbours[query, :count]
        assert allowed[ids].all()
        assert len(set(ids.tolist())) == count
        assert (neighbours[query, count:] == -1).all()
        assert np.isinf(distances[query, count:]).all()
        assert np.array_equal(distances[query, :count], true_distances[ids])  # small whole numbers: no rounding
        assert (np.diff(distances[query, :count]) >= 0).all()
        if max_exact:
            assert np.array_equal(distances[query, :count], np.sort(true_distances[allowed])[:count])


@given(st.lists(st.lists(st.tuples(st.integers(-1, 50), st.integers(0, 5)), max_size=6), min_size=1, max_size=4),
       st.integers(1, 12))  # fmt: skip
def test_merging_lists_keeps_the_nearest_of_all(lists, k):
    def arrays(pairs):
        pairs = [(i, d if i >= 0 else np.inf) for i, d in pairs]
        return np.array([[i for i, _ in pairs]], np.int64), np.array([[d for _, d in pairs]], np.float32)

    ids, distances = merge_lists([arrays(pairs) for pairs in lists], k)
    expected = sorted((d, i) for pairs in lists for i, d in pairs if i >= 0)[:k]
    assert ids[0].tolist() == [i for _, i in expected] + [-1] * (k - len(expected))
    assert distances[0].tolist() == [d for d, _ in expected] + [np.inf] * (k - len(expected))


@given(st.integers(1, 70), st.sampled_from([np.float16, np.float32]), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_listed_distances_equal_those_of_exact_search_bit_for_bit(d, dtype, seed):
    rng = np.random.default_rng(seed)
    keys, queries = rng.standard_normal((30, d)).astype(dtype), rng.standard_normal((5, d)).astype(np.float32)
    ids, distances = exact_search(queries, keys, 7)
    assert np.array_equal(listed_distances(queries, keys, ids), distances)


TOKENIZER = tokenizer.train_tokenizer(["the quick brown fox\n\n  jumps over it's lazy dog 123\n" * 20], 300)
fragments = st.sampled_from([*"ab'st1.\n\t  é\u00a0\u2028\x1c_-", "the", " it's", "\n\n", "  ", "fox jumps"])


@given(st.lists(fragments, max_size=25).map("".join), st.integers(1, 9))
@settings(deadline=None, max_examples=300)
def test_a_text_in_pieces_has_the_tokens_of_the_text_in_one_piece(text, size):
    old_size, tokenizer.MIN_PIECE_CHARACTERS = tokenizer.MIN_PIECE_CHARACTERS, size
    try:
        pieces = tokenizer.pieces_of(text)
        ids = tokenizer.encode(TOKENIZER, text)
    finally:
        tokenizer.MIN_PIECE_CHARACTERS = old_size
    assert "".join(pieces) == text
    assert tokenizer.decode(TOKENIZER, ids) == text
    cuts = np.cumsum([len(piece) for piece in pieces[:-1]], dtype=int).tolist()
    if set(cuts) <= {seam.end() for seam in tokenizer.SEAM.finditer(text)}:
        assert ids == TOKENIZER.encode(text).ids


def test_real_text_in_pieces_has_the_same_tokens(monkeypatch):
    monkeypatch.setattr(tokenizer, "MIN_PIECE_CHARACTERS", 500)  # no line of these modules is longer
    texts_read = (document.text for document in find_corpus("stdlib").documents())
    for _, text in zip(range(40), texts_read, strict=False):
        assert tokenizer.encode(TOKENIZER, text) == TOKENIZER.encode(text).ids


@given(st.lists(st.text(alphabet="ab é\n\r\u2028\0", max_size=20), max_size=6))
@settings(deadline=None)
def test_each_line_of_a_file_is_found_by_its_number(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "lines"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), newline="")
    assert [json.loads(line) for line in texts.Lines(path)] == lines


def test_documents_behave_like_a_list_of_records(database):
    plain = [json.loads(line) for line in (database.path / "documents.jsonl").read_text().splitlines()]
    documents = Documents(database.path / "documents.jsonl")
    assert list(documents) == plain
    assert (documents[0], documents[-1], documents[3:7]) == (plain[0], plain[-1], plain[3:7])
    with pytest.raises(IndexError):
        documents[len(plain)]
    counted, rows = summarise(plain, ("train", "valid"))
    for split, counts in counted.items():
        for name in ("bytes", "tokens", "chunks"):
            assert counts[name] == sum(record[name] for record in plain if record["split"] == split)
    assert sum(stop - start for runs in rows.values() for start, stop in runs) == database.n_chunks


@pytest.mark.slow
def test_shards_have_about_the_requested_size(tmp_path, embedder):
    corpus = write_corpus(tmp_path / "docs", documents=60)
    database = build_database(corpus, tmp_path / "db", replace(SMALL, shard_bytes=6000), embedder)
    longest = max(record["bytes"] for record in database.documents)
    sizes = {folder: 0 for folder in database.folders("shards")}
    for record in database.documents:
        for folder in sizes:
            if record["id"] in np.load(folder / "documents.npy"):
                sizes[folder] += record["bytes"]
    assert len(sizes) > 4
    assert max(sizes.values()) <= 6000 + longest
    assert sum(sizes.values()) == database.manifest["splits"]["train"]["bytes"]


@pytest.mark.slow
def test_merging_the_lists_of_many_shards_gives_those_of_a_single_shard(tmp_path, embedder):
    corpus = write_corpus(tmp_path / "docs", documents=40)
    many, one = (
        build_database(corpus, tmp_path / str(size), replace(SMALL, shard_bytes=size), embedder)
        for size in (2500, 10**9)
    )
    assert len(many.folders("shards")) > 7
    assert len(one.folders("shards")) == 1
    for split in ("train", "valid"):
        for name in ("neighbours", "distances"):
            assert np.array_equal(getattr(many.split(split), name)[:], getattr(one.split(split), name)[:])


def test_shards_are_sorted_by_number_and_the_limit_of_open_files_is_raised(tmp_path, corpus, embedder):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    database = build_database(corpus, tmp_path / "db", replace(SMALL, shard_bytes=500), embedder)
    database.manifest["files"] = {f"shards/{number}/tokens.npy": {} for number in (100000, 99999, 5)}
    assert [folder.name for folder in database.folders("shards")] == ["5", "99999", "100000"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        opened = Database.open(database.path, embedder)
        assert opened.search("class value", 3)[0].min() >= 0
        assert opened.split("train").neighbours[:].max() >= 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
