"""Ground truth: the tokens that a text must have, and the text to which they decode."""

import numpy as np
import pytest
from database_model import D_KEY, written
from support import WORDS

from retro_np.retrieval.build import HASHED, BuildConfig, build_database
from retro_np.retrieval.verify import verify_database
from retro_np.retrieval.vocabulary import vocabulary


def assert_large(database, text, tokens, number):
    """Check that a stored document decodes to its text and, unless `tokens` is None, has those tokens."""
    m, split = database.chunk_size, database.split("train")
    stored = split.tokens[:][split.documents[:] == number].reshape(-1)
    used = int(np.flatnonzero(stored)[-1]) + 1
    assert stored[used - 1] == 1
    assert len(stored) - used < m
    if tokens is not None:
        assert np.array_equal(stored[: used - 1], tokens)
    pieces = vocabulary(database.tokenizer).pieces
    assert b"".join([pieces[token] for token in stored[: used - 1].tolist()]) == text.encode()
    assert verify_database(database.path).broken == []
    other_rows = np.flatnonzero(split.documents[:] != number)
    sources = split.neighbours[:][split.documents[:] == number]
    assert np.array_equal(np.unique(sources[sources >= 0]), other_rows)


def large(tmp_path, text):
    """A database of one large document and of a small one."""
    corpus = written(tmp_path / "c.jsonl", [("small", "a few words of another document"), ("large", text)])
    config = BuildConfig(256, 1000, held_out=0.0, neighbours=2, extra_candidates=0, d_key=D_KEY)
    return build_database(corpus, tmp_path / "db", config, HASHED)


@pytest.mark.slow
def test_a_document_may_be_a_million_equal_lines(tmp_path):
    text = "x = 1\n" * 10**6
    database = large(tmp_path, text)
    assert_large(database, text, database.tokenizer.encode(text).ids, 1)


@pytest.mark.slow
def test_a_document_may_be_one_line_of_50_mb(tmp_path):
    words = np.random.default_rng(0).choice(WORDS, 9_000_000)
    text = " ".join(words.tolist())
    assert len(text) > 50e6
    database = large(tmp_path, text)
    # A word and the space before it are encoded independently of the rest.
    spelt = {word: database.tokenizer.encode(" " + word).ids for word in WORDS}
    tokens = database.tokenizer.encode(str(words[0])).ids
    for word in words[1:].tolist():
        tokens += spelt[word]
    assert_large(database, text, tokens, 1)


@pytest.mark.slow
def test_a_document_may_be_megabytes_without_a_space(tmp_path):
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
    text = np.random.default_rng(0).choice(letters, 5_000_000).tobytes().decode()
    assert_large(large(tmp_path, text), text, None, 1)
