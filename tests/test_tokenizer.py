"""Ground truth: the text itself (byte-level BPE is lossless)."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np.errors import UserError
from retro_np.retrieval.tokenizer import (
    SMALLEST_VOCABULARY,
    SPECIAL,
    decode,
    encode,
    load_tokenizer,
    token_byte_lengths,
    token_texts,
    tokenizer_bytes,
    tokenizer_sha256,
    train_tokenizer,
)

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "naïve café — ½ 🙂 " * 20, f"{SPECIAL[0]} and {SPECIAL[1]} " * 50]
TOKENIZER = train_tokenizer(TEXTS, 400)
texts = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(TEXTS + list(SPECIAL))


@given(texts)
@settings(deadline=None)
def test_decoding_gives_the_text_back(text):
    assert decode(TOKENIZER, encode(TOKENIZER, text)) == text


@given(texts)
@settings(deadline=None)
def test_no_text_spells_padding_or_end_of_text(text):
    assert all(token >= 2 for token in encode(TOKENIZER, text))


@given(texts)
@settings(deadline=None)
def test_byte_lengths_of_tokens_sum_to_those_of_the_text(text):
    assert token_byte_lengths(TOKENIZER)[encode(TOKENIZER, text)].sum() == len(text.encode())


@given(texts)
@settings(deadline=None)
def test_texts_of_tokens_join_to_the_text(text):
    assert "".join(token_texts(TOKENIZER, encode(TOKENIZER, text))) == text


def test_padding_and_end_of_text_are_ids_0_and_1_and_say_nothing():
    assert decode(TOKENIZER, [0, 1, *encode(TOKENIZER, "a"), 1, 0]) == "a"
    assert token_byte_lengths(TOKENIZER)[:2].tolist() == [0, 0]


def test_training_twice_gives_the_same_bytes():
    assert tokenizer_bytes(train_tokenizer(TEXTS, 400)) == tokenizer_bytes(TOKENIZER)


def test_a_saved_tokenizer_loads_as_itself(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_bytes(TOKENIZER))
    assert tokenizer_sha256(load_tokenizer(path)) == tokenizer_sha256(TOKENIZER)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(TEXTS, SMALLEST_VOCABULARY - 1)


@pytest.mark.parametrize("content", ["", "{}", "not json", json.dumps({"model": {"type": "BPE"}})])
def test_a_broken_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)
