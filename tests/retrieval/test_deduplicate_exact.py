"""The exact filter by grams. Ground truth: Jaccard similarity of Python sets of tuples of words, all pairs."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SMALL, json_lines
from test_deduplicate import edited, invented, planted, slow_jaccard
from test_words import SCRIPTS
from test_words import planted as planted_script
from test_words import slow_jaccard as jaccard_in_any_script

from retro_np.errors import UserError
from retro_np.files import hash_fraction
from retro_np.retrieval import deduplicate
from retro_np.retrieval.build import build_database
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.deduplicate import (
    DedupConfig,
    GramIndex,
    band_index,
    find_duplicates,
    nearest_similarity,
    postings,
    signatures,
)
from retro_np.retrieval.documents import Documents

DEFAULT = DedupConfig()
UNDETECTED = ({"threshold": 0.1}, "0 %"), ({"threshold": 0.3}, "23 %"), ({"bands": 8}, "20 %")


def indexed(held, parts, config=DEFAULT):
    groups = [held[i * len(held) // parts : (i + 1) * len(held) // parts] for i in range(parts)]
    return GramIndex([postings(group)[0] for group in groups], [len(group) for group in groups], config)


def graded(seed, count, rates=(0.002, 0.01, 0.03, 0.1)):
    """Held-out texts, and training texts that resemble them at every similarity from 0 to 1."""
    rng = np.random.default_rng(seed)
    originals = [invented(rng, int(length)) for length in rng.integers(60, 500, count)]
    near = [edited(rng, words, int(rate * len(words))) for words in originals for rate in rates]
    near += [words[: len(words) // part] + invented(rng, 200) for words in originals for part in (2, 3, 8)]
    texts = [" ".join(words) for words in near + [invented(rng, 300) for _ in range(count)]]
    return texts, [" ".join(words) for words in originals]


@pytest.mark.parametrize("threshold", [1e-9, 0.02, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_at_every_threshold_exactly_the_texts_that_reach_it_are_found(threshold):
    texts, held = graded(0, 12)
    texts.append(held[3])
    exact = np.array([[slow_jaccard(text, other) for other in held] for text in texts])
    duplicates = find_duplicates(texts, indexed(held, 3, DedupConfig(threshold=threshold)), held.__getitem__)
    assert [record.row for record in duplicates] == np.flatnonzero((exact >= threshold).any(axis=1)).tolist()
    assert len(duplicates) < len(texts)
    for record in duplicates:
        assert record.exact == pytest.approx(exact[record.row, record.held], abs=1e-15)


def test_the_records_are_those_of_minhash_where_its_bands_detect_the_threshold():
    texts, held = planted(11, 40, 5)
    rng = np.random.default_rng(1)
    held += held[:5] + [" ".join(edited(rng, text.split(), 1)) for text in held]
    by_bands = find_duplicates(texts, band_index(signatures(held, DEFAULT), DEFAULT), held.__getitem__)
    assert len(by_bands) > 50
    assert find_duplicates(texts, indexed(held, 4), held.__getitem__) == by_bands


@pytest.mark.parametrize(("settings", "share"), UNDETECTED)
def test_bands_that_would_miss_pairs_at_the_threshold_are_refused_and_compared_exactly(settings, share):
    config = DedupConfig(**settings)
    assert config.compares_exactly
    with pytest.raises(UserError, match=f"detect only {share}"):
        band_index(signatures(["a"], config), config)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.lists(st.sampled_from("abcé(中"), max_size=12).map(" ".join), max_size=8),
    held=st.lists(st.lists(st.sampled_from("abcé(中"), max_size=12).map(" ".join), max_size=8),
    words=st.integers(1, 4),
)
def test_the_nearest_similarity_is_the_largest_of_all_pairs(texts, held, words):
    expected = [max((slow_jaccard(text, other, words) for text in texts), default=0.0) for other in held]
    nearest = nearest_similarity(iter(texts), iter(held), words)
    assert nearest.shape == (len(held),)
    np.testing.assert_allclose(nearest, expected, atol=1e-15)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_the_nearest_similarity_is_exact_in_every_script(script):
    original, copies, other = planted_script(script)
    expected = max(jaccard_in_any_script(original, copy) for copy in copies)
    assert 0.8 < expected < 1
    nearest = nearest_similarity([*copies, other], [original, other])
    np.testing.assert_allclose(nearest, [expected, 1.0], atol=1e-15)


def test_a_full_table_of_grams_changes_no_result(monkeypatch):
    texts, held = graded(3, 8)
    expected = nearest_similarity(texts, held)
    monkeypatch.setattr(deduplicate, "TABLE_BITS", 2)
    np.testing.assert_array_equal(nearest_similarity(texts, held), expected)


def test_memory_does_not_grow_with_the_training_documents():
    rng = np.random.default_rng(0)
    held, peaks = [" ".join(invented(rng, 2000)) for _ in range(5)], []
    for count in (20, 200):
        texts = (" ".join(invented(rng, 2000)) for _ in range(count))
        tracemalloc.start()
        nearest_similarity(texts, held)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "sure"), [(0.1, 0.999), (0.8, 0.999), (0.8, 1.0)])
def test_a_build_leaves_out_the_documents_that_reach_the_threshold(tmp_path, monkeypatch, threshold, sure):
    monkeypatch.setattr(deduplicate, "SURE_DETECTION", sure)
    texts, held = graded(5, 10)
    names = (f"n{i}" for i in range(10_000))
    held_names = [name for name in (next(names) for _ in range(2000)) if hash_fraction(name) < SMALL.held_out]
    other_names = [name for name in names if hash_fraction(name) >= SMALL.held_out]
    documents = dict(zip(held_names, held, strict=False)) | dict(zip(other_names, texts, strict=False))
    config = BuildConfig(**vars(SMALL) | {"duplicates": DedupConfig(threshold=threshold), "shard_bytes": 20_000})
    build_database(json_lines(tmp_path / "c.jsonl", documents), tmp_path / "db", config, "hashing")
    kept = {record["name"] for record in Documents(tmp_path / "db" / "documents.jsonl")}
    near = {
        name
        for name, text in zip(other_names, texts, strict=False)
        if max(slow_jaccard(text, other) for other in held) >= threshold
    }
    assert 5 < len(near) < len(texts) - 5
    assert kept == documents.keys() - near
    records = [json.loads(line) for line in (tmp_path / "db" / "duplicates.jsonl").read_text().splitlines()]
    for record in records:
        exact = slow_jaccard(documents[record["name"]], documents[record["held_out"]])
        assert record["exact"] == pytest.approx(exact, abs=1e-6)
        assert abs(record["estimated"] - exact) < 0.25
