"""The hashing embedder. Ground truth: TF-IDF cosines of dictionaries of counts; for texts, the keys of their tokens."""

import math
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from foreign_tokenizers import MAKERS, json_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_corpus
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import write_array
from retro_np.kernels.hashing import BUCKETS
from retro_np.retrieval.build import build_database
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.hashing import (
    HASHED,
    HashingEmbedder,
    count_features,
    feature_ids,
    load_hashing,
    save_hashing,
)
from retro_np.retrieval.tokenizer import encode, train_tokenizer
from retro_np.retrieval.vocabulary import special_ids, vocabulary

TEXTS = ["def f(x): return x", "", "class Token:\n    pass\n", "naïve café 🙂", "for i in range(10): print(i)\n" * 90]


def chunks(rows=300, width=64, seed=0):
    """Rows of shared phrases, so that some rows resemble each other."""
    rng = np.random.default_rng(seed)
    phrases = rng.zipf(1.2, (60, 8)).clip(0, 297) + 2
    return phrases[rng.integers(0, 60, (rows, width // 8))].reshape(rows, width)


def counted(tokenizer, tokens, d_key=128):
    counts = np.zeros(BUCKETS, np.uint32)
    count_features(tokens, counts)
    return HashingEmbedder(tokenizer, counts, len(tokens), d_key)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def embedder(tokenizer):
    return counted(tokenizer, chunks())


def test_the_embedder_has_a_name_and_a_hash_and_makes_keys_of_length_one(embedder):
    assert (embedder.name, embedder.d_key, len(embedder.sha256)) == ("hashing", 128, 64)
    keys = embedder.embed_tokens(chunks())
    assert (keys.shape, keys.dtype) == ((300, 128), np.float32)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, atol=1e-6)


def test_cosines_of_keys_equal_those_of_tf_idf_up_to_projection_noise(tokenizer):
    tokens = chunks()
    bags = [Counter(row) + Counter(pairwise(row)) for row in tokens.tolist()]
    n_chunks = Counter(feature for bag in bags for feature in bag)
    weight = {feature: math.sqrt(math.log(1 + len(bags) / (1 + n))) for feature, n in n_chunks.items()}
    features = {feature: i for i, feature in enumerate(weight)}
    table = np.zeros((len(bags), len(features)))
    for row, bag in zip(table, bags, strict=True):
        for feature, count in bag.items():
            row[features[feature]] = count * weight[feature]
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    keys = counted(tokenizer, tokens, 4096).embed_tokens(tokens)
    # The standard deviation of a cosine's noise is at most about √(2 / d_key) = 0.022. There are 45,000 pairs.
    assert np.abs(keys @ keys.T - table @ table.T).max() < 5 * 0.022


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.text(max_size=40), max_size=6))
def test_the_key_of_a_text_depends_only_on_its_tokens(embedder, texts):
    keys = embedder.embed(texts, show_progress=False)
    assert (keys.shape, keys.dtype) == ((len(texts), 128), np.float32)
    for key, text in zip(keys, texts, strict=True):
        ids = np.array(encode(embedder.tokenizer, text), np.int64)
        np.testing.assert_array_equal(key, embedder.embed_tokens(ids[None])[0])


def test_texts_of_very_different_lengths_are_embedded_in_several_batches(embedder, monkeypatch):
    expected = embedder.embed(TEXTS * 3)
    monkeypatch.setattr("retro_np.retrieval.hashing.MAX_BATCH_TOKENS", 50)
    np.testing.assert_array_equal(embedder.embed(TEXTS * 3), expected)


def test_lone_surrogates_are_replaced(embedder):
    np.testing.assert_array_equal(embedder.embed(["a\udc80b"]), embedder.embed(["a\ufffdb"]))


def test_anything_but_a_list_of_texts_is_refused(embedder):
    with pytest.raises(UserError, match=r"pass \[text\]"):
        embedder.embed("text")
    with pytest.raises(UserError, match="text 1 is NoneType"):
        embedder.embed(["a", None])


def test_rare_tokens_weigh_more_than_common_ones(embedder):
    common = int(np.argmax(embedder.counts))
    rare = int(np.flatnonzero(embedder.counts == 1)[0])
    unseen = int(np.flatnonzero(embedder.counts == 0)[0])
    assert embedder.weights[common] < embedder.weights[rare] < embedder.weights[unseen]


@pytest.mark.parametrize("rows", [0, 1])
def test_weights_are_positive_even_if_nothing_was_counted(tokenizer, rows):
    assert counted(tokenizer, chunks(rows)).weights.min() >= 1


def test_a_loaded_embedder_is_saved_to_the_same_bytes(embedder, tmp_path):
    save_hashing(embedder, tmp_path / "a.npy")
    loaded = load_hashing(tmp_path / "a.npy", embedder.tokenizer)
    save_hashing(loaded, tmp_path / "b.npy")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (loaded.sha256, loaded.chunks, loaded.d_key) == (embedder.sha256, 300, 128)
    np.testing.assert_array_equal(loaded.embed_tokens(chunks()), embedder.embed_tokens(chunks()))


def test_an_unpickled_copy_makes_the_same_keys_and_its_pickle_is_small(embedder):
    data = pickle.dumps(embedder)
    assert len(data) < 4e6
    np.testing.assert_array_equal(pickle.loads(data).embed(TEXTS), embedder.embed(TEXTS))


def test_every_property_that_changes_keys_changes_the_hash(embedder, tokenizer):
    other_counts = embedder.counts.copy()
    other_counts[5] += 1
    others = [
        HashingEmbedder(tokenizer, embedder.counts, 300, 64),
        HashingEmbedder(tokenizer, embedder.counts, 301, 128),
        HashingEmbedder(tokenizer, other_counts, 300, 128),
        HashingEmbedder(train_tokenizer(TEXTS, 290), embedder.counts, 300, 128),
    ]
    assert len({embedder.sha256, *(other.sha256 for other in others)}) == 5
    assert HashingEmbedder(tokenizer, embedder.counts.copy(), 300, 128).sha256 == embedder.sha256


def test_invalid_counts_are_refused(tokenizer):
    with pytest.raises(UserError, match="use count_features"):
        HashingEmbedder(tokenizer, np.zeros(3, np.uint32), 1)
    with pytest.raises(UserError, match="d_key must be at least 1, not 0"):
        HashingEmbedder(tokenizer, np.zeros(BUCKETS, np.uint32), 1, 0)
    with pytest.raises(UserError, match="was counted in 2 of 1 chunks"):
        HashingEmbedder(tokenizer, np.full(BUCKETS, 2, np.uint32), 1)


def damaged(change):
    def write(embedder, path):
        save_hashing(embedder, path)
        path.write_bytes(change(path.read_bytes()))

    return write


def changed(name, value):
    def write(embedder, path):
        save_hashing(embedder, path)
        record = np.load(path)
        record[name] = value
        write_array(path, record)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda embedder, path: None, "no feature counts at"),
        (damaged(lambda data: b""), "does not hold an array of a record"),
        (damaged(lambda data: data[:-1]), "does not hold an array of a record"),
        (damaged(lambda data: data[:40]), "does not hold an array of a record"),
        (damaged(lambda data: b"PK" + data), "does not hold an array of a record"),
        (damaged(lambda data: data * 3), "does not hold an array of a record"),
        (lambda embedder, path: write_array(path, embedder.counts), "does not hold an array of a record"),
        (changed("version", 99), "has version 99, but this version reads 1"),
        (changed("d_key", 0), "is damaged"),
        (changed("chunks", 1), "is damaged"),
        (changed("tokenizer", 0), "another tokenizer"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(embedder, tmp_path, write, message):
    path = tmp_path / "hashing.npy"
    write(embedder, path)
    with pytest.raises(UserError, match=message) as error:
        load_hashing(path, embedder.tokenizer)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", MAKERS)
def test_words_of_a_tokenizer_of_others_have_one_feature_for_all_spellings_and_punctuation_has_none(kind):
    tokenizer = Tokenizer.from_str(json_of(kind).decode())
    size = len(vocabulary(tokenizer).pieces)
    features = feature_ids(np.arange(size + 3)[:, None], tokenizer)[:, 0]
    words = {}
    for number, piece in enumerate(vocabulary(tokenizer).pieces):
        text = piece.decode(errors="replace")
        has_letters = any(letter.isalnum() or ord(letter) > 127 for letter in text)
        assert (features[number] > 1) == (has_letters and number not in special_ids(tokenizer))
        if features[number]:
            word = piece if "\ufffd" in text else text.strip().lower()
            assert words.setdefault(word, features[number]) == features[number]
    assert len(set(words.values())) == len(words) > 100
    assert not features[size:].any()  # ids without a text


def test_features_of_a_tokenizer_of_others_stand_side_by_side_where_punctuation_was_between_them():
    tokenizer = Tokenizer.from_str(json_of("gpt2").decode())
    number_of = {piece: number for number, piece in enumerate(vocabulary(tokenizer).pieces)}
    rows = np.array([[number_of[letter] for letter in letters] for letters in ([b"a", b",", b"b"], [b"A", b"b", b"!"])])
    first, second = feature_ids(rows, tokenizer)
    np.testing.assert_array_equal(first, second)
    assert first[0] > 1 < first[1] != first[0]
    assert first[2] == 0


@pytest.mark.parametrize(("kind", "width"), [(None, 128), ("gpt2", 1024)])
def test_the_default_width_of_keys_depends_on_whose_tokenizer_it_is(tmp_path, kind, width):
    corpus = write_corpus(tmp_path / "corpus")
    given = None if kind is None else Tokenizer.from_str(json_of(kind).decode())
    config = BuildConfig(chunk_size=16, vocabulary_size=300)
    assert build_database(corpus, tmp_path / "db", config, HASHED, tokenizer=given).d_key == width
    assert build_database(corpus, tmp_path / "db", config, HASHED, tokenizer=given).d_key == width  # the same request
