"""Ground truth: the text itself (byte-level BPE is lossless)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retro_np
from retro_np.errors import UserError
from retro_np.retrieval.tokenizer import (
    MAX_VOCABULARY_SIZE,
    MIN_VOCABULARY_SIZE,
    decode,
    encode,
    load_tokenizer,
    token_byte_lengths,
    token_texts,
    tokenizer_bytes,
    tokenizer_sha256,
    train_tokenizer,
)
from retro_np.retrieval.vocabulary import SPECIAL, special_ids, vocabulary

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "naïve café — ½ 🙂 " * 20, f"{SPECIAL[0]} and {SPECIAL[1]} " * 50]
TOKENIZER = train_tokenizer(TEXTS, 400)
texts = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(TEXTS + list(SPECIAL))


@given(texts)
@settings(deadline=None)
def test_decoding_returns_the_text(text):
    assert decode(TOKENIZER, encode(TOKENIZER, text)) == text


@given(texts)
@settings(deadline=None)
def test_no_text_encodes_to_padding_or_end_of_text(text):
    assert all(token >= 2 for token in encode(TOKENIZER, text))


@given(texts)
@settings(deadline=None)
def test_byte_lengths_of_tokens_sum_to_the_texts_bytes(text):
    assert token_byte_lengths(TOKENIZER)[encode(TOKENIZER, text)].sum() == len(text.encode())


@given(texts)
@settings(deadline=None)
def test_texts_of_tokens_join_to_the_text(text):
    assert "".join(token_texts(TOKENIZER, encode(TOKENIZER, text))) == text


def test_padding_and_end_of_text_are_ids_0_and_1_and_decode_to_nothing():
    assert decode(TOKENIZER, [0, 1, *encode(TOKENIZER, "a"), 1, 0]) == "a"
    assert token_byte_lengths(TOKENIZER)[:2].tolist() == [0, 0]


def test_training_twice_gives_the_same_bytes():
    assert tokenizer_bytes(train_tokenizer(TEXTS, 400)) == tokenizer_bytes(TOKENIZER)


def test_a_saved_tokenizer_is_loaded_unchanged(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_bytes(TOKENIZER))
    assert tokenizer_sha256(load_tokenizer(path)) == tokenizer_sha256(TOKENIZER)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocabulary_size must be from 258 to 1,048,576, not 257"):
        train_tokenizer(TEXTS, MIN_VOCABULARY_SIZE - 1)


@pytest.mark.parametrize("size", [MAX_VOCABULARY_SIZE + 1, 9_999_999_999, 10**30])
def test_a_vocabulary_that_the_trainer_could_not_allocate_is_refused(size):
    with pytest.raises(UserError, match=f"vocabulary_size must be from 258 to .*, not {size}"):
        train_tokenizer(TEXTS, size)


def changed(change):
    """A tokenizer's bytes with its JSON changed."""

    def apply(data):
        state = json.loads(data)
        change(state)
        return json.dumps(state).encode()

    return apply


LOSSY = {  # valid for the library, but not as we train them: decoding would lose text, or a text could be padding
    "lower case": lambda state: state.update(normalizer={"type": "Lowercase"}),
    "added token": lambda state: state.update(added_tokens=[{"id": 0, "content": SPECIAL[0]}]),
    "prefix space": lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
    "no alphabet": lambda state: state["model"]["vocab"].pop("a"),
    "gap in ids": lambda state: state["model"]["vocab"].update(a=10**6),
    "id twice": lambda state: state["model"]["vocab"].update(a=70),
    "unknown merge": lambda state: state["model"]["merges"].append(["a", "Ġnowhere"]),
    "special merge": lambda state: state["model"]["merges"].append(["<padding", " token>"]),
    "other special": lambda state: state["model"]["vocab"].update({SPECIAL[0]: 1, SPECIAL[1]: 0}),
    "other model": lambda state: state["model"].update(type="WordPiece"),
}
BROKEN = [
    b"[" * 100_000,
    b'{"model": NaN}',
    b"",
    b"{}",
    b"not json",
    b"[]",
    b"\xff",
    b"null",
    tokenizer_bytes(TOKENIZER)[:2000],
]


@pytest.mark.parametrize("change", BROKEN, ids=lambda broken: repr(broken[:8]))
def test_the_error_for_a_broken_tokenizer_names_its_file(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(change)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("change", LOSSY.values(), ids=LOSSY)
def test_a_tokenizer_that_differs_from_ours_in_any_part_is_refused_or_has_other_special_ids(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(changed(change)(tokenizer_bytes(TOKENIZER)))
    try:
        special = special_ids(load_tokenizer(path))
    except UserError as error:
        assert re.search(r"tokenizer\.json is not a tokenizer", str(error))  # noqa: PT017
    else:
        assert min(special) >= TOKENIZER.get_vocab_size()


def test_training_in_another_process_gives_the_same_bytes():
    script = (
        "import sys; from retro_np.retrieval.tokenizer import train_tokenizer, tokenizer_sha256; "
        "import json; print(tokenizer_sha256(train_tokenizer(json.load(sys.stdin), 400)))"
    )
    root = str(Path(retro_np.__file__).parents[1])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root}
        command = [sys.executable, "-c", script]
        out = subprocess.run(
            command, input=json.dumps(TEXTS), capture_output=True, text=True, env=environment, check=True
        )
        assert out.stdout.strip() == tokenizer_sha256(TOKENIZER)


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1)))
@settings(deadline=None)
def test_any_ids_decode_to_the_same_text_as_their_joined_pieces(ids):
    assert "".join(token_texts(TOKENIZER, ids)) == decode(TOKENIZER, ids)


def test_every_byte_has_a_token_and_a_small_corpus_gives_fewer_merges_than_requested():
    small = train_tokenizer(["ab"], 4096)
    assert MIN_VOCABULARY_SIZE <= small.get_vocab_size() < 270
    assert set(vocabulary(small).pieces) >= {bytes([b]) for b in range(256)}
