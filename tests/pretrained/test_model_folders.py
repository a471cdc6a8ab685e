"""Models in the Hugging Face layout. Ground truth: transformers, which writes the folders and computes the logits."""

import json

import foreign_models as foreign
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from retro_np import UserError, load_pretrained, retro
from retro_np.pretrained.models import read_pretrained
from retro_np.tree import named_leaves

KINDS = tuple(foreign.SETTINGS)
TOLERANCE = 2e-4  # float32, with sums in another order; logits are about 1


@st.composite
def models(draw):
    """A random tiny model of each architecture, with random weights."""
    kind, heads = draw(st.sampled_from(KINDS)), draw(st.sampled_from((1, 2, 4)))
    layers, vocabulary = draw(st.integers(1, 3)), draw(st.integers(261, 270))
    tied = draw(st.booleans())
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=8 * heads, n_layer=layers, n_head=heads, n_positions=20,
            n_inner=draw(st.sampled_from((None, 24))), layer_norm_epsilon=draw(st.sampled_from((1e-5, 1e-3))),
            tie_word_embeddings=tied, activation_function=draw(st.sampled_from(("gelu_new", "gelu_pytorch_tanh"))),
        )  # fmt: skip
    else:
        fields = {"llama": {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}, "qwen2": {}}[kind]
        config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](
            vocab_size=vocabulary, hidden_size=8 * heads, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads])),
            head_dim=draw(st.sampled_from((8, 6))), max_position_embeddings=20, tie_word_embeddings=tied,
            rms_norm_eps=draw(st.sampled_from((1e-5, 1e-3))),
            rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from((10_000.0, 500.0)))}, **fields,
        )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 99)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return model


def saved(model, folder, **options):
    """The model's folder, with a tokenizer that fits."""
    model.save_pretrained(folder, **options)
    foreign.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@settings(max_examples=8, deadline=None)
@given(model=models(), data=st.data())
def test_logits_of_a_loaded_folder_equal_those_of_transformers(model, data, tmp_path_factory):
    folder = saved(model, tmp_path_factory.mktemp("model"), max_shard_size=data.draw(st.sampled_from(("9KB", "1GB"))))
    tokens = np.random.default_rng(0).integers(0, 261, (2, 12))
    params, config, _ = load_pretrained(folder)
    assert np.abs(retro(params, config, tokens, None)[0] - logits_of(model, tokens)).max() < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_settings_of_transformers_4_has_the_logits_of_transformers(kind, tmp_path):
    folder = foreign.write_folder(tmp_path, kind)
    tokens = np.arange(30)[None] * 7
    params, config, _ = load_pretrained(folder)
    expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder), tokens)
    assert np.allclose(retro(params, config, tokens, None)[0], expected, rtol=1e-4, atol=1e-3)  # logits up to 500


def as_stored(kind, params):
    """Our parameters under transformers' names, one matrix at a time."""
    stored = {}
    for i, layer in enumerate(params["layers"]):
        attention, ffw = layer["attention"], layer["ffw"]
        if kind == "gpt2":
            at = f"transformer.h.{i}."
            for part, ending in (("w", "weight"), ("b", "bias")):
                fused = np.concatenate([attention[f"{part}_{x}"] for x in "qkv"], axis=-1)
                stored |= {f"{at}attn.c_attn.{ending}": fused, f"{at}attn.c_proj.{ending}": attention[f"{part}_o"]}
                stored |= {f"{at}mlp.c_fc.{ending}": ffw[f"{part}_in"], f"{at}mlp.c_proj.{ending}": ffw[f"{part}_out"]}
            for name, block in (("ln_1", attention), ("ln_2", ffw)):
                stored |= {f"{at}{name}.weight": block["norm"], f"{at}{name}.bias": block["norm_bias"]}
            continue
        at = f"model.layers.{i}."
        stored |= {
            f"{at}input_layernorm.weight": attention["norm"],
            f"{at}post_attention_layernorm.weight": ffw["norm"],
        }
        stored |= {f"{at}self_attn.{x}_proj.weight": attention[f"w_{x}"].T for x in "qkvo"}
        stored |= {f"{at}self_attn.{x}_proj.bias": attention[f"b_{x}"] for x in "qkvo" if f"b_{x}" in attention}
        for name, ours in (("gate", "gate"), ("up", "in"), ("down", "out")):
            stored[f"{at}mlp.{name}_proj.weight"] = ffw[f"w_{ours}"].T
    if kind == "gpt2":
        stored |= {"transformer.wte.weight": params["embedding"], "transformer.wpe.weight": params["positions"]}
        return stored | {"transformer.ln_f.weight": params["norm"], "transformer.ln_f.bias": params["norm_bias"]}
    stored |= {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]}
    return stored | ({"lm_head.weight": params["readout"].T} if "readout" in params else {})


def assert_same_tensors(kind, params, expected):
    stored = as_stored(kind, params)
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(stored[name], array), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_read_from_every_type_and_from_several_files(kind, dtype, tmp_path):
    foreign.write_folder(tmp_path / "whole", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").to(getattr(torch, dtype))
    folder = saved(model, tmp_path / "parts", max_shard_size="20KB")
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 2
    expected = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    params = load_pretrained(folder)[0]
    assert {leaf.dtype.name for _, leaf in named_leaves(params)} == {"float32"}
    assert all(leaf.flags.c_contiguous for _, leaf in named_leaves(params))
    assert_same_tensors(kind, params, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_base_model_lack_the_prefix_and_are_the_same(kind, tmp_path):
    weights = foreign.tensors(kind, tied=True)
    bare = {name.removeprefix("transformer.").removeprefix("model."): array for name, array in weights.items()}
    assert bare.keys() != weights.keys()
    folder = foreign.write_folder(tmp_path, kind, bare, tie_word_embeddings=True)
    assert_same_tensors(kind, load_pretrained(folder)[0], weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_that_transformers_saved_has_its_states_read_out_by_the_embedding(kind, tmp_path):
    whole = foreign.write_folder(tmp_path / "whole", kind, foreign.tensors(kind, tied=True), tie_word_embeddings=True)
    base = transformers.AutoModel.from_pretrained(whole).eval()
    folder, tokens = saved(base, tmp_path / "base"), np.arange(30)[None] * 7
    assert json.loads((folder / "config.json").read_text())["architectures"][0].endswith("Model")
    params, config, _ = load_pretrained(folder)
    with torch.no_grad():
        states, embedding = base(torch.tensor(tokens)).last_hidden_state, base.get_input_embeddings().weight
        expected = (states @ embedding.T).numpy()
    assert np.allclose(retro(params, config, tokens, None)[0], expected, rtol=1e-4, atol=1e-3)  # logits up to 500
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"architectures is \['\w+Model'\]; it is not supported"):
        read_pretrained(folder)


def test_buffers_of_old_files_are_left_out(tmp_path):
    weights = foreign.tensors("gpt2")
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 40, 40), np.uint8) for i in range(foreign.LAYERS)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(foreign.LAYERS)}
    assert_same_tensors(
        "gpt2", load_pretrained(foreign.write_folder(tmp_path / "a", "gpt2", weights | masks))[0], weights
    )
    weights = foreign.tensors("llama")
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(foreign.LAYERS)}
    assert_same_tensors("llama", load_pretrained(foreign.write_folder(tmp_path, "llama", weights | angles))[0], weights)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {"rope_theta": 7.5}, {"rotary_base": 7.5}), ("llama", {"rope_theta": ...}, {"rotary_base": 10_000.0}),
        ("qwen2", {"rope_theta": ..., "rope_parameters": {"rope_theta": 7.5}}, {"rotary_base": 7.5}),
        ("llama", {"rms_norm_eps": 0.25}, {"norm_eps": 0.25}), ("llama", {"rms_norm_eps": ...}, {"norm_eps": 1e-6}),
        ("gpt2", {"layer_norm_epsilon": 0.25}, {"norm_eps": 0.25}),
        ("gpt2", {"layer_norm_epsilon": ...}, {"norm_eps": 1e-5}),
    ],
)  # fmt: skip
def test_numbers_of_the_configuration_are_read_or_have_transformers_defaults(kind, settings, expected, tmp_path):
    config = read_pretrained(foreign.write_folder(tmp_path, kind, **settings)).config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_of_its_own_is_stored_transposed(kind, tmp_path):
    readout = np.random.default_rng(1).standard_normal((foreign.VOCABULARY, foreign.WIDTH), dtype=np.float32)
    weights = foreign.tensors(kind) | {"lm_head.weight": readout}
    params, config, _ = load_pretrained(foreign.write_folder(tmp_path, kind, weights, tie_word_embeddings=False))
    assert not config.tie_readout
    assert np.array_equal(params["readout"], readout.T)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_readout_that_is_stored_must_equal_the_embedding(kind, tmp_path):
    weights = foreign.tensors(kind)
    embedding = weights["transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"]
    folder = foreign.write_folder(tmp_path, kind, weights | {"lm_head.weight": embedding})
    assert_same_tensors(kind, load_pretrained(folder)[0], weights)
    foreign.write_folder(tmp_path, kind, weights | {"lm_head.weight": embedding + np.float32(0.5)})
    with pytest.raises(
        UserError, match=r"lm_head.weight differs from the embedding.*: set tie_word_embeddings to false"
    ):
        load_pretrained(folder)


def test_float64_becomes_float32(tmp_path):
    weights = foreign.tensors("qwen2")
    folder = foreign.write_folder(
        tmp_path, "qwen2", {name: array.astype(np.float64) for name, array in weights.items()}
    )
    assert_same_tensors("qwen2", load_pretrained(folder)[0], weights)


def test_opening_reads_no_weights(tmp_path):
    """A number that is not finite is found when the parameters are read, and not before."""
    weights = foreign.tensors("llama")
    weights["model.norm.weight"][3] = np.nan
    model = read_pretrained(foreign.write_folder(tmp_path, "llama", weights))
    with pytest.raises(UserError, match=r"model.norm.weight is not finite everywhere, so it is damaged"):
        _ = model.params


@pytest.mark.parametrize("place", ["a string", "a list", "a file"])
def test_the_chat_template_is_found_where_transformers_puts_it(place, tmp_path):
    folder = foreign.write_folder(tmp_path, "llama")
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "a list":
        tokens["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ x }}"}]
    if place == "a file":
        tokens["chat_template"] = "an older one"
        (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert read_pretrained(folder).chat_template == "{{ x }}"


def test_special_tokens_come_from_either_file_and_stop_ids_from_all(tmp_path):
    folder = foreign.write_folder(tmp_path, "llama", eos_token_id=[258, 259])
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": foreign.END, "pad_token": foreign.PAD}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    model = read_pretrained(folder)
    assert model.special == {"eos_token": foreign.END, "pad_token": foreign.PAD}
    assert model.stop == {257, 258, 259}
    assert model.chat_template is None


@pytest.mark.parametrize("wrong", [10**9, "x", [-1], [[259], True], {"a": 1}, 1.5])
def test_an_end_of_text_that_is_no_id_of_the_model_is_ignored(wrong, tmp_path):
    folder = foreign.write_folder(tmp_path, "llama", eos_token_id=wrong)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    assert read_pretrained(folder).stop == {259}  # that of tokenizer_config.json


@pytest.mark.parametrize(("pad", "expected"), [(foreign.PAD, 260), (foreign.END, None), (None, None), ("absent", None)])
def test_padding_is_the_padding_token_unless_that_also_ends_a_text(pad, expected, tmp_path):
    folder = foreign.write_folder(tmp_path, "llama")
    tokens = foreign.TOKENIZER_CONFIG | {"pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert read_pretrained(folder).config.padding_id == expected


def test_the_hash_changes_with_the_weights_in_any_file(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(foreign.write_folder(tmp_path / "whole", "llama"))
    folder = saved(model, tmp_path / "parts", max_shard_size="20KB")
    before = read_pretrained(folder)
    assert before.sha256 == read_pretrained(folder).sha256
    shard = max(folder.glob("model-*.safetensors"))
    weights = load_file(shard)
    save_file({name: array + 1 for name, array in weights.items()}, shard)
    assert read_pretrained(folder).sha256 != before.sha256
