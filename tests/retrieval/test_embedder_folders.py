"""Ground truth: sentence-transformers' encode_document and encode_query on the same folder, which it saved itself or
which is written as its older versions write one; and transformers' BertModel, with the mean written in PyTorch.
"""

import base64
import copy
import json
import random

import numpy as np
import pytest
from embedder_folders import (
    ARCHITECTURES,
    MODES,
    TEXTS,
    VOCABULARY,
    D,
    current,
    encoder,
    files_of,
    mutated,
    old,
    plain,
    saved,
    tensors,
    write_folder,
)
from safetensors.numpy import save
from tokenizers import Tokenizer

from retro_np import load_bert
from retro_np.errors import UserError
from retro_np.retrieval.weights import find_bert, read_bert

FORMS = {
    "plain": (plain(), False),
    "plain, cased": (plain(lowercase=False), False),
    "old": (old(), True),
    "old, not normalised": (old(normalise=False, layers=2), False),
    "current": (current(layers=2), True),
    "current, not normalised, cased": (current(normalise=False, lowercase=False), False),
}
FRAME = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


def expected_keys(folder, normalise, max_length):
    """The keys by transformers and PyTorch alone."""
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), BertModel.from_pretrained(str(folder)).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    keys = (states * mask).sum(1) / mask.sum(1)
    return (torch.nn.functional.normalize(keys, dim=-1) if normalise else keys).numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("form", FORMS)
def test_keys_equal_those_of_transformers_for_each_form_of_the_files(tmp_path, form):
    files, normalise = FORMS[form]
    folder = write_folder(tmp_path / "bert", files)
    expected = expected_keys(folder, normalise, 32 if form.startswith("plain") else 24)
    np.testing.assert_allclose(load_bert(folder).embed(TEXTS), expected, atol=2e-6, rtol=1e-5)


def edited(base, edits):
    """The files of a form after edits, {file: {path: value}}. The value `...` removes a setting."""
    files = copy.deepcopy(base)
    for name, changes in edits.items():
        if not isinstance(changes, dict):
            files[name] = changes
            continue
        files.setdefault(name, {})
        for place, value in changes.items():
            *parents, last = place.split("/")
            inner = files[name]
            for part in parents:
                inner = inner[int(part) if isinstance(inner, list) else part]
            last = int(last) if isinstance(inner, list) else last
            if value is ...:
                del inner[last]
            else:
                inner[last] = value
    return files


POOLING, SENTENCE, LIBRARY = "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"
WORDS, SETTINGS = "tokenizer.json", "tokenizer_config.json"
EXTRA = {"id": len(VOCABULARY), "content": "[NEW]", "single_word": False, "lstrip": False, "rstrip": False}
EXTRA |= {"normalized": False, "special": True}

# name: (form, edits); the keys are those of the form
ACCEPTED = {
    "a list with the mean": (current(), {POOLING: {"pooling_mode": ["mean"]}}),
    "the mean in both forms": (old(), {POOLING: {"pooling_mode": "mean"}}),
    "only the mean": (old(), {POOLING: {"include_prompt": ..., "pooling_mode_lasttoken": ...}}),
    "a class named by its package": (
        current(), {"modules.json": {"1/type": "sentence_transformers.sentence_transformer.modules.Pooling"}},
    ),
    "a class named by its file": (old(), {"modules.json": {"1/type": "sentence_transformers.models.Pooling.Pooling"}}),
    "no names": (old(), {"modules.json": {"0/name": ..., "1/name": ..., "0/idx": ...}}),
    "normalisation without a folder": (old(), {"modules.json": {"2/path": ""}}),
    "unknown but off": (old(), {POOLING: {"future": False}, SENTENCE: {"future": None}, LIBRARY: {"future": {}}}),
    "lower case twice": (old(), {SENTENCE: {"do_lower_case": True}}),
    "empty prompts": (old(), {LIBRARY: {"prompts": {"query": "", "document": ""}}}),
    "a measure of similarity": (old(), {LIBRARY: {"similarity_fn_name": "euclidean"}}),
    "a default prompt": (old(), {LIBRARY: {"default_prompt_name": "document"}}),
    "no prompt to leave out": (current(), {POOLING: {"include_prompt": False}}),
    "accents said twice": (old(), {SETTINGS: {"strip_accents": True}}),
    "a class that obeys": (
        old(lowercase=False), {SETTINGS: {"do_lower_case": True, "tokenizer_class": "PreTrainedTokenizerFast"}},
    ),
    "nothing in tokenizer_config.json": (plain(), {SETTINGS: b"{}"}),
    "an activation by default": (plain(), {"config.json": {"hidden_act": ..., "layer_norm_eps": ...}}),
    "heads of a classifier": (plain(), {"config.json": {"architectures": ["BertForSequenceClassification"]}}),
    "padding in tokenizer.json": (plain(), {WORDS: {"padding": {
        "strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }}}),
}  # fmt: skip

# name: (form, edits, what the error names)
REFUSED = {
    "an unknown mode in a list": (current(), {POOLING: {"pooling_mode": ["cls", "median"]}}, [POOLING, "pooling_mode"]),
    "an empty list of modes": (current(), {POOLING: {"pooling_mode": []}}, [POOLING, "pooling_mode"]),
    "the two forms disagree": (old(), {POOLING: {"pooling_mode": "cls"}}, [POOLING, "pooling_mode is 'cls'"]),
    "a flag that is no flag": (old(), {POOLING: {"pooling_mode_max_tokens": 1.5}}, ["pooling_mode_max_tokens is 1.5"]),
    "a prompt that is no text": (old(), {LIBRARY: {"prompts": {"query": 3}}}, [LIBRARY, "prompts"]),
    "a list of prompts": (old(), {LIBRARY: {"prompts": ["query"]}}, [LIBRARY, "prompts"]),
    "a default prompt that is not there": (old(), {LIBRARY: {"default_prompt_name": "x"}}, ["default_prompt_name"]),
    "prompts without modules": (
        plain(), {LIBRARY: {"prompts": {"query": "q"}}}, ["modules.json is missing", "has prompts"],
    ),
    "no padding": (plain(), {"config.json": {"model_type": "roberta", "pad_token_id": None}}, ["pad_token_id is None"]),
    "padding beyond the positions": (
        plain(), {"config.json": {"model_type": "xlm-roberta", "pad_token_id": 30}}, ["pad_token_id is 30"],
    ),
    "other buckets": (
        plain(), {"config.json": {"model_type": "mpnet", "relative_attention_num_buckets": 64}},
        ["relative_attention_num_buckets is 64"],
    ),
    "the text twice": (
        plain(), {WORDS: {"post_processor/single": [FRAME[0], FRAME[1], FRAME[1], plain()[WORDS][
            "post_processor"]["single"][2]]}}, [WORDS, "post_processor"],
    ),
    "fewer added tokens": (
        old(), {SETTINGS: {"added_tokens_decoder/4": ...}}, [SETTINGS, "added_tokens_decoder"],
    ),
    "a causal model": (plain(), {"config.json": {"is_causal": True}}, ["config.json", "is_causal"]),
    "text that is not cleaned": (plain(), {WORDS: {"normalizer/clean_text": False}}, [SETTINGS, "clean_text"]),
    "words between spaces": (plain(), {WORDS: {"pre_tokenizer": {"type": "WhitespaceSplit"}}}, ["pre_tokenizer"]),
    "one word": (plain(), {WORDS: {"pre_tokenizer": None}}, [SETTINGS, "pre_tokenizer"]),
    "[SEP] spelt out": (plain(), {WORDS: {"added_tokens": []}}, ["cls_token is '[CLS]'"]),
    "no mean": (old(), {POOLING: {"pooling_mode_mean_tokens": False}}, [POOLING, "pooling_mode"]),
    "no mode": (current(), {POOLING: {"pooling_mode": ...}}, [POOLING, "pooling_mode"]),
    "a mode that is no text": (current(), {POOLING: {"pooling_mode": {"mean": True}}}, [POOLING, "pooling_mode"]),
    "an unknown mode": (old(), {POOLING: {"pooling_mode_median": True}}, [POOLING, "pooling_mode_median"]),
    "another width": (current(), {POOLING: {"embedding_dimension": 8}}, [POOLING, "embedding_dimension is 8"]),
    "dense": (
        old(), {"modules.json": {"2/type": "sentence_transformers.models.Dense"}}, ["modules.json", "module 2"],
    ),
    "a class with the model": (old(), {"modules.json": {"1/type": "pooling.Pooling"}}, ["modules.json", "module 1"]),
    "a sparse class": (
        old(), {"modules.json": {"1/type": "sentence_transformers.sparse_encoder.models.Pooling"}}, ["module 1"],
    ),
    "normalised first": (
        old(), {"modules.json": [old()["modules.json"][0], *[
            module | {"idx": i} for i, module in zip((1, 2), old()["modules.json"][:0:-1], strict=True)
        ]]}, ["modules.json", "the list of modules"],
    ),
    "twice a transformer": (old(), {"modules.json": [
        old()["modules.json"][0], old()["modules.json"][0] | {"idx": 1, "name": "1"},
    ]}, ["modules.json", "the list of modules"]),
    "no pooling": (old(), {"modules.json": old()["modules.json"][:1]}, ["modules.json", "the list of modules"]),
    "no modules": (old(), {"modules.json": []}, ["modules.json", "the list of modules"]),
    "one name twice": (old(), {"modules.json": {"2/name": "1"}}, ["modules.json", "the list of modules"]),
    "another order": (old(), {"modules.json": {"1/idx": 2}}, ["modules.json", "module 1"]),
    "a module that is no object": (old(), {"modules.json": {"1": "Pooling"}}, ["modules.json", "module 1"]),
    "arguments of a module": (old(), {"modules.json": {"0/kwargs": ["task"]}}, ["modules.json", "kwargs"]),
    "a transformer in a folder": (old(), {"modules.json": {"0/path": "0_BERT"}}, ["modules.json", "path", "move"]),
    "a path out of the model": (old(), {"modules.json": {"1/path": "../1_Pooling"}}, ["modules.json", "path"]),
    "a path of two lines": (old(), {"modules.json": {"1/path": "1\n_Pooling"}}, ["modules.json", "path"]),
    "a long path": (old(), {"modules.json": {"1/path": "1" * 300}}, ["modules.json", "path"]),
    "the pooling is missing": (old(), {"modules.json": {"1/path": "9_Pooling"}}, ["9_Pooling/config.json is missing"]),
    "modules.json is missing": (plain(), {POOLING: old()[POOLING]}, ["modules.json is missing", "1_Pooling"]),
    "tokens are normalised": (
        current(), {"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}, ["module_input_name"],
    ),
    "an unknown setting": (old(), {SENTENCE: {"layer": -2}}, [SENTENCE, "layer is -2"]),
    "arguments of the model": (old(), {SENTENCE: {"model_args": {"x": 1}}}, [SENTENCE, "model_args"]),
    "an expansion": (current(), {SENTENCE: {"query_expansion": {"length": 32}}}, [SENTENCE, "query_expansion"]),
    "another output": (current(), {SENTENCE: {"module_output_name": "sentence_embedding"}}, ["module_output_name"]),
    "a short maximum": (old(), {SENTENCE: {"max_seq_length": 1}}, [SENTENCE, "max_seq_length is 1"]),
    "no number as maximum": (plain(), {SETTINGS: {"model_max_length": "9"}}, [SETTINGS, "model_max_length"]),
    "fewer columns": (current(), {LIBRARY: {"truncate_dim": 8}}, [LIBRARY, "truncate_dim"]),
    "a cross-encoder": (current(), {LIBRARY: {"model_type": "CrossEncoder"}}, [LIBRARY, "model_type"]),
    "no lower case": (old(), {SETTINGS: {"do_lower_case": False}}, [SETTINGS, "do_lower_case is False"]),
    "lower case by default": (old(lowercase=False), {SETTINGS: {"do_lower_case": ...}}, [SETTINGS, "do_lower_case"]),
    "accents": (old(), {SETTINGS: {"strip_accents": False}}, [SETTINGS, "strip_accents"]),
    "Chinese": (old(), {SETTINGS: {"tokenize_chinese_chars": False}}, [SETTINGS, "tokenize_chinese_chars"]),
    "cut on the left": (old(), {SETTINGS: {"truncation_side": "left"}}, [SETTINGS, "truncation_side"]),
    "padded on the left": (old(), {SETTINGS: {"padding_side": "left"}}, [SETTINGS, "padding_side"]),
    "another class": (old(), {SETTINGS: {"tokenizer_class": "BertJapaneseTokenizer"}}, [SETTINGS, "tokenizer_class"]),
    "another [CLS]": (old(), {SETTINGS: {"cls_token": "[MASK]"}}, [SETTINGS, "cls_token"]),
    "another [SEP]": (old(), {"special_tokens_map.json": {"sep_token": {"content": "[PAD]"}}}, ["sep_token"]),
    "another [UNK]": (old(), {SETTINGS: {"unk_token": "[PAD]"}}, [SETTINGS, "unk_token"]),
    "padding is a letter": (old(), {SETTINGS: {"pad_token": "a"}}, [SETTINGS, "pad_token"]),
    "another special token": (old(), {SETTINGS: {"additional_special_tokens": ["abc"]}}, ["additional_special_tokens"]),
    "a special token that is no text": (old(), {SETTINGS: {"extra_special_tokens": 5}}, ["extra_special_tokens is 5"]),
    "added tokens without names": (old(), {SETTINGS: {"added_tokens_decoder": [1]}}, ["added_tokens_decoder 0 is 1"]),
    "another added token": (old(), {"added_tokens.json": {"abc": 7}}, ["added_tokens.json", "abc is 7"]),
    "an added token that strips": (
        old(), {SETTINGS: {"added_tokens_decoder/4/lstrip": True}}, [SETTINGS, "added_tokens_decoder 4"],
    ),
    "a decoder": (plain(), {"config.json": {"is_decoder": True}}, ["config.json", "is_decoder"]),
    "a decoder by its class": (plain(), {"config.json": {"architectures": ["BertForCausalLM"]}}, ["architectures"]),
    "relative positions": (
        plain(), {"config.json": {"position_embedding_type": "relative_key"}}, ["config.json", "absolute positions"],
    ),
    "quantised": (plain(), {"config.json": {"quantization_config": {"bits": 4}}}, ["quantization_config"]),
    "code with the model": (plain(), {"config.json": {"auto_map": {"AutoModel": "a.B"}}}, ["auto_map"]),
    "other weights": (plain(), {"config.json": {"transformers_weights": "b.safetensors"}}, ["transformers_weights"]),
    "no token types": (plain(), {"config.json": {"type_vocab_size": 0}}, ["config.json", "type_vocab_size"]),
    "no epsilon": (plain(), {"config.json": {"layer_norm_eps": None}}, ["config.json", "layer_norm_eps"]),
    "an activation that is no text": (plain(), {"config.json": {"hidden_act": ["gelu"]}}, ["hidden_act"]),
    "an adapter": (plain(), {"adapter_config.json": {"r": 8}}, ["adapter_config.json"]),
    "a chat": (plain(), {"chat_template.jinja": b"{{ messages }}"}, ["chat_template.jinja"]),
    "another kind of encoder": (old(), {"sentence_roberta_config.json": {"max_seq_length": 9}}, ["sentence_roberta"]),
    "tokenizer cuts on the left": (plain(), {WORDS: {"truncation": {
        "direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0,
    }}}, [WORDS, "direction of truncation"]),
    "a token without an embedding": (plain(), {"config.json": {"vocab_size": 9}}, [WORDS, "vocab_size", "9"]),
    "an added token without an embedding": (
        plain(), {WORDS: {"added_tokens": [*plain()[WORDS]["added_tokens"], EXTRA]}}, [WORDS, "a token's id"],
    ),
    "a frame without an embedding": (
        plain(), {WORDS: {"post_processor/special_tokens/[CLS]/ids": [10**6]}}, [WORDS, "a token's id is 1000000"],
    ),
    "no frame": (plain(), {WORDS: {"post_processor": None}}, [WORDS, "post_processor"]),
    "half a frame": (plain(), {WORDS: {"post_processor/single": FRAME}}, [WORDS, "post_processor"]),
    "another type": (
        plain(), {WORDS: {"post_processor/single/1/Sequence/type_id": 1}}, [WORDS, "post_processor"],
    ),
    "no unknown": (plain(), {WORDS: {"model/unk_token": "[NONE]"}}, [WORDS, "unk_token"]),
    "another mark of pieces": (plain(), {WORDS: {"model/continuing_subword_prefix": "@@"}}, ["continuing_subword"]),
    "a panic while reading": (
        plain(), {WORDS: {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}}, [WORDS],
    ),
    "a panic while splitting": (plain(), {WORDS: {"pre_tokenizer": {"type": "FixedLength", "length": 0}}}, [WORDS]),
    "a panic while framing": (plain(), {WORDS: {"post_processor/special_tokens/[SEP]": ...}}, [WORDS]),
    "nested without end": (old(), {"modules.json": b"[" * 100_000}, ["modules.json"]),
    "no JSON number": (old(), {"config.json": b'{"hidden_size": NaN}'}, ["config.json", "NaN"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_folder_that_says_the_same_otherwise_has_the_same_keys_and_hash(tmp_path, name):
    base, edits = ACCEPTED[name]
    same, other = (load_bert(write_folder(tmp_path / str(i), f)) for i, f in enumerate((base, edited(base, edits))))
    assert np.array_equal(same.embed(TEXTS), other.embed(TEXTS))
    changed = set(edits) & {"config.json", "tokenizer.json"}  # files that are hashed
    assert changed or same.sha256 == other.sha256


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_asks_for_other_keys_is_refused_in_one_line_that_names_the_setting(tmp_path, name):
    base, edits, named = REFUSED[name]
    folder = write_folder(tmp_path / "bert", edited(base, edits))
    with pytest.raises(UserError) as error:
        load_bert(folder)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in [str(folder), *named] if part not in message] == []


def test_the_published_folder_keeps_its_hash():
    assert read_bert(find_bert()).sha256 == "e1618072d3648d2b165064f899a9277fcef9dce83b3b96f32fa769ee6f794871"


@pytest.mark.parametrize("kind", ["F64", "F16", "BF16"])
def test_weights_of_other_precisions_are_computed_with_in_float32(tmp_path, kind):
    import torch
    from safetensors.torch import save as save_torch

    stored = {name: torch.tensor(tensor) for name, tensor in tensors(np.random.default_rng(3)).items()}
    half = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    rounded = {name: tensor.to(half) for name, tensor in stored.items()}
    folders = {
        "half": plain() | {"model.safetensors": save_torch(rounded)},
        "full": plain() | {"model.safetensors": save_torch({name: t.float() for name, t in rounded.items()})},
    }
    keys, expected = (load_bert(write_folder(tmp_path / name, f)).embed(TEXTS) for name, f in folders.items())
    assert keys.dtype == np.float32
    assert np.array_equal(keys, expected)


def test_the_names_gamma_and_beta_of_the_oldest_files_are_weight_and_bias(tmp_path):
    stored = tensors(np.random.default_rng(5))
    oldest = {}
    for name, tensor in stored.items():
        oldest[f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")] = tensor
    assert sum(name.endswith((".gamma", ".beta")) for name in oldest) == 6
    expected = load_bert(write_folder(tmp_path / "new", plain() | {"model.safetensors": save(stored)})).embed(TEXTS)
    keys = load_bert(write_folder(tmp_path / "oldest", plain() | {"model.safetensors": save(oldest)})).embed(TEXTS)
    assert np.array_equal(keys, expected)


def test_a_weight_that_is_stored_under_two_names_is_refused(tmp_path):
    stored = tensors(np.random.default_rng(5))
    stored["embeddings.LayerNorm.gamma"] = np.ones(D, np.float32)
    with pytest.raises(UserError, match=r"model\.safetensors stores embeddings\.LayerNorm\.weight twice"):
        load_bert(write_folder(tmp_path / "bert", plain() | {"model.safetensors": save(stored)}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, value):
    stored = tensors(np.random.default_rng(5))
    stored["encoder.layer.0.output.dense.bias"][3] = value
    with pytest.raises(UserError, match=r"model\.safetensors: encoder\.layer\.0\.output\.dense\.bias .* not finite"):
        load_bert(write_folder(tmp_path / "bert", plain() | {"model.safetensors": save(stored)}))


@pytest.mark.parametrize("kind", ["modernbert", "albert", "electra", "deberta-v2", "t5", "nomic_bert", None, [1]])
def test_the_error_for_another_architecture_names_it_and_those_that_are_understood(tmp_path, kind):
    folder = write_folder(tmp_path / "bert", edited(plain(), {"config.json": {"model_type": kind}}))
    with pytest.raises(UserError) as error:
        load_bert(folder)
    expected = f"model_type is {kind!r}; only {', '.join(ARCHITECTURES)} are understood: use another model"
    assert str(error.value) == f"{folder / 'config.json'}: {expected}"


def test_the_error_for_pickled_weights_says_how_to_convert_them(tmp_path):
    files = plain()
    folder = write_folder(tmp_path / "bert", files | {"pytorch_model.bin": files.pop("model.safetensors")})
    with pytest.raises(UserError) as error:
        load_bert(folder)
    assert "\n" not in str(error.value)
    assert f"transformers.AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')" in str(error.value)


CHANGES = {
    "pooling": {POOLING: {"pooling_mode": "cls"}},
    "the order of pooling": {POOLING: {"pooling_mode": ["mean", "cls"]}},
    "a prompt for documents": {LIBRARY: {"prompts": {"document": "abc "}}},
    "a prompt for queries": {LIBRARY: {"prompts": {"query": "abc "}}},
    "a prompt that is not pooled": {LIBRARY: {"prompts": {"query": "abc "}}, POOLING: {"include_prompt": False}},
    "lower case": {SENTENCE: {"do_lower_case": True}},
    "the maximum length": {SETTINGS: {"model_max_length": 23}},
    "normalisation": {"modules.json": {"2": ...}},
}


def test_each_setting_that_changes_keys_changes_the_hash(tmp_path):
    base, *others = (
        load_bert(write_folder(tmp_path / str(i), edited(current(lowercase=False), edits))).sha256
        for i, edits in enumerate([{}, {POOLING: {"pooling_mode": ["cls", "mean"]}}, *CHANGES.values()])
    )
    assert len({base, *others}) == len(CHANGES) + 2


def test_a_prompt_that_sentence_transformers_does_not_use_is_said_in_one_line(tmp_path, capsys):
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}}
    folder = write_folder(tmp_path / "bert", edited(current(), {LIBRARY: prompts}))
    load_bert(folder)
    said = capsys.readouterr().err
    assert said.startswith(f"{folder / LIBRARY}: the prompt 'passage' is not used")
    assert said.count("\n") == 1


WORDS_AND_MARKS = [
    "abc Abé 文文 x.", "", "hello <pad> world! <s> [MASK] <mask> x " * 3, "  two  spaces ", "a\nb", "abc " * 40,
    "Abc [SEP] </s>",
]  # fmt: skip
PROMPTS = [
    {}, {"query": "abc: "}, {"document": "abc: ", "query": "x "}, {"document": "  "}, {"query": "a [SEP] </s> <pad>"},
    {"query": "abc: ", "passage": "x: "}, {"document": "abc " * 50},
]  # fmt: skip


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The folder of a random encoder, by architecture and case."""
    made = {}

    def folder_of(architecture, lowercase=True):
        if (architecture, lowercase) not in made:
            folder = tmp_path_factory.mktemp("encoders") / f"{architecture} {lowercase}"
            made[architecture, lowercase] = encoder(folder, architecture, lowercase)
        return made[architecture, lowercase]

    return folder_of


def assert_equal_keys(folder, model):
    """Compare with a SentenceTransformer. Its sums have another order, and a state is up to 10 in size."""
    bert = load_bert(folder)
    for mine, theirs in ((bert.embed, model.encode_document), (bert.embed_queries, model.encode_query)):
        np.testing.assert_allclose(mine(WORDS_AND_MARKS), theirs(WORDS_AND_MARKS), atol=3e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("modes", [*MODES, ["cls", "mean"], ["max", "mean_sqrt_len_tokens", "max"]], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_equal_those_of_sentence_transformers_for_each_pooling(tmp_path, encoders, architecture, modes):
    normalise = len(modes) % 2 == 0
    assert_equal_keys(tmp_path / "model", saved(tmp_path / "model", encoders(architecture), modes, normalise))


@pytest.mark.oracle
@pytest.mark.parametrize("modes", [["cls_token", "max_tokens"], ["lasttoken", "mean_tokens", "weightedmean_tokens"]])
def test_keys_equal_those_of_sentence_transformers_for_several_modes_in_older_files(tmp_path, modes):
    from sentence_transformers import SentenceTransformer

    flags = {"pooling_mode_mean_tokens": False} | {f"pooling_mode_{mode}": True for mode in modes}
    folder = write_folder(tmp_path / "model", edited(old(), {POOLING: flags}))
    assert_equal_keys(folder, SentenceTransformer(str(folder), device="cpu"))


@pytest.mark.oracle
@pytest.mark.parametrize("tokens", [{}, {"sep_token": "[SEP]"}], ids=str)
def test_a_sep_that_is_not_named_is_refused_where_it_would_count_as_the_prompts(tmp_path, encoders, tokens):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    saved(folder, encoders("bert"), include_prompt=False, prompts={"query": "abc "})
    settings = {"tokenizer_class": "TokenizersBackend", "pad_token": "[PAD]"} | tokens
    (folder / SETTINGS).write_text(json.dumps(settings))
    if tokens:
        assert_equal_keys(folder, SentenceTransformer(str(folder), device="cpu"))
    else:
        with pytest.raises(UserError, match=r"sep_token is None; it must be '\[SEP\]'"):
            load_bert(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_keys_equal_those_of_sentence_transformers_for_each_prompt(tmp_path, encoders, number):
    base, prompts = encoders(ARCHITECTURES[number % 5]), PROMPTS[number]
    for default in (None, "query", *prompts):
        assert_equal_keys(
            tmp_path / str(default), saved(tmp_path / str(default), base, prompts=prompts, default=default)
        )


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(MODES)))
def test_keys_equal_those_of_sentence_transformers_without_the_states_of_the_prompt(tmp_path, encoders, number):
    base = encoders(ARCHITECTURES[(number + 2) % 5])
    for i, prompts in enumerate(PROMPTS[:5]):
        model = saved(tmp_path / str(i), base, MODES[number], include_prompt=False, prompts=prompts)
        assert_equal_keys(tmp_path / str(i), model)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_keys_equal_those_of_sentence_transformers_for_all_settings_together(tmp_path, encoders, seed):
    rng, folder = random.Random(seed), tmp_path / "model"
    base = encoders(rng.choice(ARCHITECTURES), rng.random() < 0.5)
    modes = rng.choice([*MODES, rng.sample(MODES, 3)])
    prompts, length = rng.choice(PROMPTS[:-1]), rng.choice([None, 12, 30])
    assert_equal_keys(folder, saved(folder, base, modes, seed % 2 == 0, rng.random() < 0.5, prompts, None, length))


@pytest.mark.oracle
@pytest.mark.parametrize("length", [2, 7, 57])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_equal_those_of_sentence_transformers_for_each_length(tmp_path, encoders, architecture, length):
    assert_equal_keys(tmp_path / "model", saved(tmp_path / "model", encoders(architecture), length=length))


@pytest.mark.oracle
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_equal_those_of_sentence_transformers_for_each_case(tmp_path, encoders, architecture, lowercase):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    assert_equal_keys(folder, saved(folder, encoders(architecture, lowercase)))
    write_folder(folder, edited(files_of(folder), {SENTENCE: {"do_lower_case": True}}))
    assert_equal_keys(folder, SentenceTransformer(str(folder), device="cpu"))


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta"])
def test_the_advice_for_a_model_saved_with_do_lower_case_gives_the_keys_from_before(tmp_path, encoders, architecture):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer, folder = Transformer(str(encoders(architecture)), do_lower_case=True), tmp_path / "model"
    model = SentenceTransformer(modules=[transformer, Pooling(D, "mean")], device="cpu")
    model.save(str(folder), create_model_card=False)
    with pytest.raises(UserError, match=r"\['Lowercase'\], which .* set tokenizer_class to TokenizersBackend "):
        load_bert(folder)
    write_folder(folder, edited(files_of(folder), {SETTINGS: {"tokenizer_class": "TokenizersBackend"}}))
    assert_equal_keys(folder, model)


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_equal_those_of_sentence_transformers_if_the_weights_have_a_head(tmp_path, encoders, architecture):
    import transformers
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    saved(folder, encoders(architecture))
    transformers.AutoModelForMaskedLM.from_pretrained(str(folder)).save_pretrained(folder)
    assert_equal_keys(folder, SentenceTransformer(str(folder), device="cpu"))


@pytest.mark.oracle
@pytest.mark.parametrize("normalizers", [["Precompiled"], ["Precompiled", "Replace"], []], ids=str)
def test_keys_equal_those_of_sentence_transformers_for_each_form_of_xlm_rs_tokenizer(tmp_path, encoders, normalizers):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    saved(folder, encoders("xlm-roberta"))
    nothing_replaced = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024)).decode()  # a trie without branches
    charsmap = {"type": "Precompiled", "precompiled_charsmap": nothing_replaced}
    parts = [charsmap, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}][: len(normalizers)]
    splitter = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normalizer = {"type": "Sequence", "normalizers": parts} if len(parts) == 2 else parts[0] if parts else None
    older = edited(files_of(folder), {WORDS: {"normalizer": normalizer, "pre_tokenizer": splitter}})
    write_folder(folder, older)
    assert_equal_keys(folder, SentenceTransformer(str(folder), device="cpu"))


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_maps_equal_those_of_transformers(encoders, architecture):
    import torch
    import transformers

    bert = load_bert(encoders(architecture))
    text = "hello <pad> world"
    ids = torch.tensor(bert.word_pieces([text]))
    model = transformers.AutoModel.from_pretrained(str(bert.files.folder), attn_implementation="eager").eval()
    with torch.no_grad():
        expected = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]
    np.testing.assert_allclose(bert.attention_maps(text)[1], expected.numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def forms(encoders, tmp_path_factory):
    """The files of folders of each architecture as sentence-transformers saves them, and those of older versions."""
    folder = tmp_path_factory.mktemp("forms")
    for i, architecture in enumerate(ARCHITECTURES):
        modes, prompts = ["cls", ["cls", "mean"], "mean"][i % 3], {"query": "x ", "document": "abc: "}
        saved(folder / architecture, encoders(architecture), modes, True, architecture != "roberta", prompts)
    lowered = edited(old(lowercase=False), {SENTENCE: {"do_lower_case": True}, LIBRARY: {"prompts": {"query": "q: "}}})
    bare = files_of(encoders("bert"))
    return [*(files_of(folder / name) for name in ARCHITECTURES), old(), current(lowercase=False), lowered, bare]


def keys_or_refusal(path):
    try:
        bert = load_bert(path)
        return bert.embed(WORDS_AND_MARKS), bert.embed_queries(WORDS_AND_MARKS)
    except UserError as error:
        return str(error)


def type_of_panic():
    """The class that a panic of the tokenizers library has. It is no Exception, and no module has its name."""
    try:
        Tokenizer.from_str(json.dumps(plain()[WORDS] | {"pre_tokenizer": {"type": "FixedLength", "length": 0}})).encode(
            "a"
        )
    except BaseException as error:
        return type(error)


def assert_refused_or_equal(folder, forms, rng, count):
    """A folder after each of `count` mutations: refused in one line, or with the keys of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    equal = 0
    for trial in range(count):
        files, name = mutated(rng, rng.choice(forms))
        path = write_folder(folder / str(trial), files)
        keys = keys_or_refusal(path)
        if isinstance(keys, str):
            assert "\n" not in keys
            continue
        try:
            model = SentenceTransformer(str(path), device="cpu")
            expected = model.encode_document(WORDS_AND_MARKS), model.encode_query(WORDS_AND_MARKS)
        except (Exception, type_of_panic()):  # It refuses the folder, or its tokenizer panics.
            continue
        equal += 1
        for mine, theirs in zip(keys, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=3e-5, rtol=1e-4, err_msg=f"{trial} {name} {files.get(name)}")
    assert equal > count / 10


@pytest.mark.oracle
def test_a_mutated_folder_is_refused_or_has_the_keys_of_sentence_transformers(tmp_path, forms):
    assert_refused_or_equal(tmp_path, forms, random.Random(0), 60)


@pytest.mark.oracle
@pytest.mark.slow
def test_thousands_of_mutated_folders_are_refused_or_have_the_keys_of_sentence_transformers(tmp_path, forms):
    assert_refused_or_equal(tmp_path, forms, random.Random(1), 3_000)
