"""Tokenizers that others trained. Ground truth: transformers' own classes, the tokenizers library, the text itself."""

import json
import random
import unicodedata

import pytest
from foreign_tokenizers import BYTE_LEVEL, MAKERS, TEXTS, ids_by_transformers, json_of, original
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, processors

from retro_np.errors import UserError
from retro_np.retrieval import tokenizer as module
from retro_np.retrieval.tokenizer import (
    changes_texts,
    decode,
    encode,
    load_tokenizer,
    parse_tokenizer,
    token_byte_lengths,
    token_texts,
    tokenizer_bytes,
    train_tokenizer,
    with_end,
)
from retro_np.retrieval.vocabulary import SPECIAL, Special, pre_tokenizer_kinds, special_ids, vocabulary

TOKENIZERS = {kind: parse_tokenizer(json_of(kind), kind) for kind in MAKERS}
SPELLED = sorted({token["content"] for kind in MAKERS for token in json.loads(json_of(kind))["added_tokens"]})
parts = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from([*TEXTS[0].split(), *TEXTS[1].split()])
texts = st.lists(parts | st.text(" \n\t.'9é中🙂", max_size=5)).map("".join)
kinds = st.sampled_from(list(MAKERS))


@given(kinds, texts)
@settings(deadline=None)
def test_ids_are_those_of_transformers(kind, text):
    assert encode(TOKENIZERS[kind], text) == ids_by_transformers(kind, text)


@given(st.sampled_from([*BYTE_LEVEL, "legacy llama"]), texts)
@settings(deadline=None)
def test_a_lossless_tokenizers_text_and_its_bytes_come_back(kind, text):
    text, tokenizer = text.replace("▁", ""), TOKENIZERS[kind]  # SentencePiece takes ▁ for a space.
    ids = encode(tokenizer, text)
    text = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
    assert decode(tokenizer, ids) == "".join(token_texts(tokenizer, ids)) == text
    added = kind == "legacy llama" and bool(text)  # SentencePiece's own space
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode()) + added


@given(kinds, texts.map(lambda text: text.replace("'", "")))  # WordPiece's decoder joins what an apostrophe splits.
@settings(deadline=None)
def test_texts_are_those_of_the_tokenizers_library(kind, text):
    ids = encode(TOKENIZERS[kind], text)
    expected = original(kind).backend_tokenizer.decode(ids, skip_special_tokens=False)
    assert decode(TOKENIZERS[kind], ids) == expected.replace("<unk>", "\ufffd").replace("[UNK]", "\ufffd")


@given(kinds, st.lists(st.integers(-1, 700)), st.booleans())
@settings(deadline=None)
def test_texts_of_any_ids_join_to_their_text_even_beyond_the_vocabulary(kind, ids, begins):
    assert "".join(token_texts(TOKENIZERS[kind], ids, begins)) == decode(TOKENIZERS[kind], ids, begins)


@pytest.mark.parametrize("kind", MAKERS)
def test_tokenizers_without_bytes_for_unknown_characters_change_texts_and_the_others_do_not(kind):
    assert changes_texts(parse_tokenizer(json_of(kind), kind)) == (kind in ("t5", "bert"))


def test_a_space_is_left_out_only_at_the_beginning_of_a_text():
    tokenizer = TOKENIZERS["legacy llama"]
    ids = encode(tokenizer, "a b")
    assert [decode(tokenizer, ids[1:]), decode(tokenizer, ids[1:], begins=False)] == ["b", " b"]


@given(kinds, st.lists(st.sampled_from([*SPELLED, *SPECIAL, " ", "a", "\n", ".", "<"])).map("".join))
@settings(deadline=None)
def test_text_that_spells_a_special_token_encodes_neither_to_padding_nor_to_end_of_text(kind, text):
    assert not {*encode(TOKENIZERS[kind], text)} & {*special_ids(TOKENIZERS[kind])}


def test_padding_and_end_of_text_are_special_tokens_or_follow_the_vocabulary():
    sizes = {kind: original(kind).backend_tokenizer.get_vocab_size() for kind in MAKERS}
    found = {kind: tuple(special_ids(TOKENIZERS[kind])) for kind in MAKERS}
    assert found["gpt2"] == found["smollm"] == found["qwen2"] == (sizes["gpt2"], 0)
    assert found["llama"] == found["legacy llama"] == (sizes["llama"], 2)
    # A text could encode to the special pieces of Unigram and WordPiece, whose vocabularies list them with the others.
    assert found["t5"] == (sizes["t5"], sizes["t5"] + 1)
    assert found["bert"] == (sizes["bert"], sizes["bert"] + 1)
    assert special_ids(train_tokenizer(TEXTS, 300)) == Special(0, 1)
    assert all(vocabulary(TOKENIZERS[kind]).size == size for kind, size in sizes.items())


def test_a_special_token_that_a_model_makes_from_a_word_is_not_end_of_text():
    state = json.loads(json_of("gpt2"))
    state["model"]["ignore_merges"] = True
    assert special_ids(parse_tokenizer(json.dumps(state).encode(), "x")) == (500, 0)
    state["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    tokenizer = parse_tokenizer(json.dumps(state).encode(), "x")
    assert encode(tokenizer, "a <|endoftext|>")[-1] == 0
    assert special_ids(tokenizer) == (500, 501)
    assert decode(tokenizer, [0]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("added", "named", "expected"), [
    (["<turn>"], "<turn>", None),  # a turn of a chat ends with it, if there is another one that ends a text
    (["[EOS]", "<turn>"], "[EOS]", "[EOS]"), (["[EOS]"], "a", None), (["[EOS]"], "<none>", None), (["[EOS]"], 7, None),
])  # fmt: skip
def test_the_end_of_text_is_the_one_that_a_models_files_name_if_it_ends_texts(kind, added, named, expected, tmp_path):
    made = Tokenizer.from_str(json_of(kind).decode())
    made.add_special_tokens(added)
    made.save(str(tmp_path / "tokenizer.json"))
    before, size = load_tokenizer(tmp_path), made.get_vocab_size()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    tokenizer = load_tokenizer(tmp_path)
    if special_ids(before).end_of_text >= size:  # It has no other one.
        expected = expected or {"<turn>": "<turn>"}.get(named)
    assert special_ids(tokenizer).end_of_text == (made.token_to_id(expected) if expected else special_ids(before)[1])
    assert special_ids(load_tokenizer(tokenizer)) == special_ids(tokenizer)
    assert tokenizer_bytes(load_tokenizer(tokenizer)) == tokenizer_bytes(tokenizer)
    assert tokenizer.encode("a text").ids == before.encode("a text").ids


FRAMES = {
    "none": None,
    "RoBERTa's": processors.RobertaProcessing(("<b>", 500), ("<b>", 500)),
    "Llama 3's": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<b> $A", special_tokens=[("<b>", 500)])]
    ),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_naming_the_end_of_text_changes_no_tokens_around_a_prompt(frame):
    made = Tokenizer.from_str(json_of("gpt2").decode())
    made.add_special_tokens(["<b>", "</s>"])
    if FRAMES[frame]:
        made.post_processor = FRAMES[frame]
    before = load_tokenizer(made)
    after = with_end(before, "</s>")
    assert special_ids(after).end_of_text == 501
    pairs = [(each.encode("a b").ids, each.encode("a b").special_tokens_mask) for each in (before, after)]
    assert pairs[0] == pairs[1]
    assert (500 in pairs[1][0]) == (frame != "none")


def test_a_padding_token_that_has_a_known_name_is_padding():
    original_json = Tokenizer.from_str(json_of("gpt2").decode())
    original_json.add_special_tokens(["<|pad|>"])
    assert special_ids(load_tokenizer(original_json)) == Special(original_json.token_to_id("<|pad|>"), 0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_stored_tokenizer_is_loaded_and_stored_with_the_same_bytes(kind, tmp_path):
    stored = tokenizer_bytes(TOKENIZERS[kind])
    (tmp_path / "tokenizer.json").write_bytes(stored)
    assert tokenizer_bytes(load_tokenizer(tmp_path)) == stored
    assert tokenizer_bytes(load_tokenizer(TOKENIZERS[kind])) == stored


@given(st.sampled_from(list(pre_tokenizer_kinds())), texts, st.integers(1, 9))
@settings(deadline=None)
def test_cutting_a_text_at_seams_changes_no_id(kind, text, size):
    tokenizer = Tokenizer.from_str(json_of("qwen2" if kind == "qwen2" else "gpt2").decode())
    tokenizer.pre_tokenizer = pre_tokenizer_kinds()[kind]
    tokenizer = load_tokenizer(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_PIECE_CHARACTERS", size)
        assert vocabulary(tokenizer).cuttable
        assert encode(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False).ids


@given(st.sampled_from(["llama", "legacy llama", "t5", "bert"]), texts)
@settings(deadline=None)
def test_a_text_is_encoded_whole_where_no_seam_is_known(kind, text):
    tokenizer = TOKENIZERS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_PIECE_CHARACTERS", 1)
        assert encode(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_long_text_without_seams_is_not_cut(monkeypatch):
    monkeypatch.setattr(module, "MIN_PIECE_CHARACTERS", 4)
    assert "a" * 40 in module.pieces_of("a" * 40, at_seams_only=True)


def test_truncation_padding_and_dropout_in_the_file_are_switched_off():
    tokenizer = Tokenizer.from_str(json_of("gpt2").decode())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.model.dropout = 0.9
    assert encode(load_tokenizer(tokenizer), TEXTS[0]) == ids_by_transformers("gpt2", TEXTS[0])


def test_a_tokenizer_with_another_decoder_is_refused_by_name():
    tokenizer = Tokenizer.from_str(json_of("gpt2").decode())
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(UserError, match=r"the tokenizer given is not a tokenizer .*its decoder, CTC, is not supported"):
        load_tokenizer(tokenizer)


@pytest.mark.parametrize("number", [2**20, 2**32 - 1])
def test_ids_that_no_table_could_hold_are_refused(number):
    state = json.loads(json_of("gpt2"))
    state["model"]["vocab"]["zz"] = number
    with pytest.raises(UserError, match="its ids must be different and below 1,048,576"):
        parse_tokenizer(json.dumps(state).encode(), "x")


def mutated(state, rng):
    """A tokenizer's JSON with one value changed, anywhere in it."""
    place = state
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    odd = [None, -1, 0, 1.5, 2**33, "", "x", "<|endoftext|>", [], {}, [[]], True, {"type": "ByteLevel"}, "\ud7ff"]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = rng.choice(odd)
    return json.dumps(state).encode()


def parsed(data):
    """A tokenizer, or the text of the error."""
    try:
        return parse_tokenizer(data, "x/tokenizer.json")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_changed_tokenizer_file_works_or_is_an_error_of_one_line(kind):
    rng = random.Random(kind)
    for _ in range(40):
        tokenizer = parsed(mutated(json.loads(json_of(kind)), rng))
        if isinstance(tokenizer, str):
            assert "x/tokenizer.json" in tokenizer
            assert "\n" not in tokenizer
        else:
            ids = encode(tokenizer, "some text é 12")
            assert max(ids, default=0) < len(token_byte_lengths(tokenizer))
            assert isinstance(decode(tokenizer, ids), str)
            assert tokenizer_bytes(parsed(tokenizer_bytes(tokenizer))) == tokenizer_bytes(tokenizer)


def test_a_prefix_of_subwords_that_makes_the_library_abort_is_refused():
    state = json.loads(json_of("smollm"))
    state["model"]["continuing_subword_prefix"] = "x"
    with pytest.raises(UserError, match=r"not a tokenizer .*its BPE has a continuing_subword_prefix"):
        parse_tokenizer(json.dumps(state).encode(), "x")


def test_token_byte_lengths_cover_the_ids_that_a_database_adds():
    lengths = token_byte_lengths(TOKENIZERS["t5"])
    assert lengths[list(special_ids(TOKENIZERS["t5"]))].tolist() == [0, 0]
    assert len(lengths) == special_ids(TOKENIZERS["t5"]).end_of_text + 1
