"""What is not supported is refused by name, in one line, before weights are read. Ground truth: the exact refusals."""

import json
import sys

import foreign_models as foreign
import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file, save_file

from retro_np import UserError, load_pretrained
from retro_np.files import untrusted
from retro_np.pretrained import folder as model_folder
from retro_np.pretrained.decoder import max_spare
from retro_np.pretrained.models import read_pretrained


def refused(path, expected):
    """Opening the model is refused in one line that contains the text."""
    with pytest.raises(UserError) as error:
        read_pretrained(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
REFUSED = {  # an architecture, a setting, its value, and a part of the error
    "rope scaling of transformers 4": ("llama", "rope_scaling", {"type": "linear"}, "rope_scaling.type is 'linear'"),
    "rope scaling of transformers 5": ("llama", "rope_parameters", LLAMA3, "rope_parameters.rope_type is 'llama3'"),
    "rope scaling by its factor alone": ("qwen2", "rope_scaling", {"factor": 2.0}, "rope_scaling.factor is 2.0"),
    "rope scaling that is no object": ("qwen2", "rope_scaling", "yarn", "rope_scaling is 'yarn'; it must be an object"),
    "partial rotary": ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
    "partial rotary of today": ("qwen2", "rope_parameters", {"partial_rotary_factor": 0.25}, "factor is 0.25"),
    "sliding windows": ("qwen2", "use_sliding_window", True, "use_sliding_window is True"),
    "sliding layers": ("qwen2", "layer_types", ["full_attention", "sliding_attention"], "layer_types is ['full"),
    "a sliding window of Llama": ("llama", "sliding_window", 4096, "sliding_window is 4096"),
    "mixture of experts": ("llama", "num_local_experts", 8, "num_local_experts is 8"),
    "quantised layers": ("llama", "quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}"),
    "an activation": ("llama", "hidden_act", "gelu", "hidden_act is 'gelu'"),
    "another activation": ("gpt2", "activation_function", "relu", "activation_function is 'relu'"),
    "gelu by the error function": ("gpt2", "activation_function", "gelu", "activation_function is 'gelu'"),
    "scaling by layer": ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
    "reordered attention": ("gpt2", "reorder_and_upcast_attn", True, "reorder_and_upcast_attn is True"),
    "no scaling": ("gpt2", "scale_attn_weights", False, "scale_attn_weights is False"),
    "cross-attention": ("gpt2", "add_cross_attention", True, "add_cross_attention is True"),
    "other code": ("llama", "auto_map", {"AutoModel": "x.Y"}, "auto_map is {'AutoModel'"),
    "an unknown setting": ("llama", "logit_scale\n", 0.5, "logit_scale is 0.5; it is not supported (docs/models.md"),
    "another architecture": ("llama", "model_type", "mistral", "model_type is 'mistral'; only llama, qwen2, gpt2 are"),
    "an architecture that is no text": ("llama", "model_type", {}, "model_type is {}; only llama, qwen2, gpt2 are"),
    "another head": ("llama", "architectures", ["LlamaForSequenceClassification"], "architectures is ['LlamaForS"),
    "groups of unequal size": ("llama", "num_key_value_heads", 3, "n_kv_heads must divide n_heads (4), not 3"),
    "odd heads": ("llama", "head_dim", 7, "d_head must be even"),
    "heads without width": ("llama", "head_dim", 0, "d_head must be a whole number from 1 to"),
    "no hidden units": ("gpt2", "n_inner", 0, "d_ffw must be a whole number from 1 to"),
    "no heads": ("llama", "num_attention_heads", 0, "num_attention_heads is 0; it must be a whole number, at least 1"),
    "no width": ("llama", "hidden_size", ..., "hidden_size is None; it must be a whole number, at least 1"),
    "an epsilon that is none": ("llama", "rms_norm_eps", "x", "norm_eps must be a number from 1e-30 to 1, not 'x'"),
    "a base that is none": ("llama", "rope_theta", [], "rotary_base must be a number from 1 to"),
    "another width": ("llama", "hidden_size", 64, "has shape (262, 32), but its configuration needs (262, 64)"),
    "another vocabulary": ("gpt2", "vocab_size", 300, "transformer.wte.weight has shape (262, 32), but its conf"),
    "more layers": ("gpt2", "n_layer", 3, "the tensor transformer.h.2.ln_1.weight is missing"),
    "very many layers": ("gpt2", "n_layer", 10_000, "has only 28 tensors for 10,000 layers"),
    "fewer layers": ("llama", "num_hidden_layers", 1, "'model.layers.1.input_layernorm.weight' is not a"),
    "biases that are absent": ("llama", "attention_bias", True, "model.layers.0.self_attn.q_proj.bias is missing"),
    "a readout that is absent": ("llama", "tie_word_embeddings", False, "the tensor lm_head.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_changes_the_model_is_refused_by_name(case, tmp_path, monkeypatch):
    kind, key, value, expected = REFUSED[case]
    monkeypatch.setattr(model_folder, "read_tensor", None)  # The weights are not read.
    refused(foreign.write_folder(tmp_path, kind, **{key: value}), expected)


HARMLESS = {
    "llama": {"pretraining_tp": 2, "use_cache": False, "attention_dropout": 0.1, "_name_or_path": "x",
              "transformers.js_config": {"a": 1}, "is_llama_config": True, "rope_interleaved": False, "use_mrope": None,
              "mlp_bias": False, "rope_scaling": {"rope_type": "default"}, "architectures": None, "temperature": 0.7},
    "qwen2": {"use_mrope": False, "layer_types": ["full_attention"] * 2, "max_window_layers": 2, "dtype": "bfloat16"},
    "gpt2": {"summary_type": "cls_index", "task_specific_params": {"x": 1}, "embd_pdrop": 0.1, "n_inner": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_settings_without_an_effect_on_the_model_are_accepted(kind, tmp_path):
    weights = foreign.tensors(kind)
    if kind == "gpt2":  # n_inner None is four times the width
        for i in range(foreign.LAYERS):
            at, (d, f) = f"transformer.h.{i}.mlp.", (foreign.WIDTH, 4 * foreign.WIDTH)
            weights |= {at + "c_fc.weight": np.ones((d, f), np.float32), at + "c_fc.bias": np.ones(f, np.float32)}
            weights[at + "c_proj.weight"] = np.ones((f, d), np.float32)
    load_pretrained(foreign.write_folder(tmp_path, kind, weights, **HARMLESS[kind]))


def test_a_missing_shard_is_named(tmp_path):
    folder = foreign.write_folder(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard)
    load_pretrained(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing, but model.safetensors.index.json names it")
    save_file({name: weights[name] for name in names[10:]}, folder / "model-00002-of-00002.safetensors")
    refused(folder, f"model-00002-of-00002.safetensors lacks '{names[9]}', which model.safetensors.index.json places")


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}, {"x": "../model.safetensors"}, {"x": "/etc/x"}, {"x": ""}])
def test_an_index_names_files_beside_it(weight_map, tmp_path):
    folder = foreign.write_folder(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "weight_map does not name a file for each tensor")


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_read_but_the_conversion_is_named(pickled, tmp_path):
    folder = foreign.write_folder(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / pickled)
    convert = f"transformers.AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('{folder}')"
    refused(folder, f"model.safetensors is missing; make it from {pickled}, which may run code and is not read, with")
    refused(folder, convert)


@pytest.mark.parametrize(("name", "expected"), [
    ("config.json", "holds no model: give a run's folder, or one with config.json of a model"),
    ("model.safetensors", "model.safetensors is missing: download the whole model again, or give the path of a .gguf"),
    ("tokenizer.json", "tokenizer.json is missing; make it from others with Python: transformers.AutoTokenizer.from_"),
])  # fmt: skip
def test_a_missing_file_is_named(name, expected, tmp_path):
    folder = foreign.write_folder(tmp_path, "llama")
    (folder / name).unlink()
    refused(folder, expected)


def test_a_tokenizer_with_more_ids_than_embeddings_is_of_another_model(tmp_path):
    weights = foreign.tensors("llama")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:260]
    folder = foreign.write_folder(tmp_path / "folder", "llama", weights, vocab_size=260)
    expected = "its tokenizer has 261 ids, but the weights have 260 embeddings, so they belong to different models"
    refused(folder, expected)
    refused(foreign.write_gguf(tmp_path / "a.gguf", "llama", weights), expected)


@pytest.mark.parametrize(("rows", "is_read"), [(261, True), (773, True), (774, False), (49_152, False)])
def test_a_tokenizer_with_far_fewer_ids_than_embeddings_is_of_another_model(rows, is_read, tmp_path):
    weights = foreign.tensors("llama") | {"model.embed_tokens.weight": np.ones((rows, foreign.WIDTH), np.float32)}
    folder = foreign.write_folder(tmp_path / "folder", "llama", weights, vocab_size=rows)
    for path in (folder, foreign.write_gguf(tmp_path / "a.gguf", "llama", weights)):
        if is_read:
            assert read_pretrained(path).config.vocabulary_size == rows
        else:
            refused(path, f"its tokenizer has 261 ids, but the weights have {rows:,} embeddings, so they belong to")


# The ids of published tokenizers (len of transformers' AutoTokenizer) and vocab_size in config.json
PUBLISHED = {
    "GPT-2": (50_257, 50_257), "Phi-2": (50_295, 51_200), "Pythia 12B": (50_277, 50_688), "GPT-J": (50_257, 50_400),
    "Qwen2 0.5B": (151_646, 151_936), "Qwen2.5 7B": (151_665, 152_064), "DeepSeek Coder 1.3B": (32_022, 32_256),
    "DeepSeek LLM 7B": (100_015, 102_400), "Llama 3": (128_256, 128_256), "OLMo 1B": (50_280, 50_304),
    "BLOOM": (250_680, 250_880), "SmolLM2": (49_152, 49_152),
}  # fmt: skip


def test_no_published_model_is_refused_for_its_vocabulary_and_the_mismatches_of_two_are():
    spare = {name: rows - size for name, (size, rows) in PUBLISHED.items()}
    assert all(0 <= spare[name] <= max_spare(size) for name, (size, _) in PUBLISHED.items())
    for size, rows in ((1_000, 49_152), (32_000, 49_152), (49_152, 151_936), (50_257, 128_256), (128_256, 151_936)):
        assert rows - size > max_spare(size)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tensors_of_no_known_part_are_refused_by_name(kind, tmp_path):
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    expected = "'model.layers.0.self_attn.q_norm.weight' is not a tensor of this architecture; it is not supported"
    refused(foreign.write_folder(tmp_path, kind, foreign.tensors(kind) | extra), expected)


def test_quantised_integers_are_refused_by_name_when_they_are_read(tmp_path):
    weights = foreign.tensors("llama")
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.int8)
    with pytest.raises(UserError, match=r"model.norm.weight holds int8, not floating-point numbers: convert it"):
        load_pretrained(foreign.write_folder(tmp_path, "llama", weights))


REFUSED_METADATA = {
    "rope scaling": (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type is 'yarn'"),
    "its factor": (lambda w: w.add_float32("llama.rope.scaling.factor", 2.0), "llama.rope.scaling.factor is 2.0"),
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count is 8"),
    "sliding windows": (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window is 64"),
    "partial rotary": (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count is 4"),
    "widths": (lambda w: w.add_value_length(4), "llama.attention.value_length is 4"),
    "several files": (lambda w: w.add_uint16("split.count", 3), "split.count is 3"),
    "an adapter": (lambda w: w.add_type("adapter"), "general.type is 'adapter'"),
    "anything else": (lambda w: w.add_float32("llama.logit_scale", 2.0), "llama.logit_scale is 2.0; it is not"),
    "frequencies": (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "'rope_freqs.weight' is"),
    "a chat template": (lambda w: w.add_int32("tokenizer.chat_template", 7), "chat_template is 7; it must be a text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_METADATA)
def test_metadata_that_change_the_model_are_refused_by_name(case, tmp_path):
    add, expected = REFUSED_METADATA[case]

    def added(writer):
        for entries in writer.kv_data:  # The library refuses a second value.
            entries.pop("llama.rope.dimension_count", 0)
            entries.pop("tokenizer.chat_template", 0)
        add(writer)

    refused(foreign.write_gguf(tmp_path / "a.gguf", "llama", add=added), expected)


def test_experts_of_number_zero_are_none(tmp_path):
    def add(writer: GGUFWriter):
        writer.add_expert_count(0)
        writer.add_string("llama.rope.scaling.type", "none")
        writer.add_causal_attention(True)
        writer.add_key_length(8)

    load_pretrained(foreign.write_gguf(tmp_path / "a.gguf", "llama", add=add))


def test_another_architecture_of_a_gguf_file_is_refused_by_name(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "a.gguf", "general.architecture is 'gemma'; only llama, qwen2, gpt2 are supported: use another")


@pytest.mark.parametrize("name", ["block_count", "head_count", "embedding_length"])
def test_a_missing_size_is_named(name, tmp_path):
    path = foreign.write_gguf(tmp_path / "a.gguf", "llama", leave_out=[name])
    refused(path, f"{name} is None; it must be a whole number, at least 1")


def test_without_gguf_the_package_is_named(tmp_path, monkeypatch):
    path = foreign.write_gguf(tmp_path / "a.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    refused(path, "a.gguf needs the package gguf: pip install gguf")


def test_a_shape_or_type_that_lies_is_refused_before_anything_is_allocated(tmp_path):
    path = foreign.write_gguf(tmp_path / "a.gguf", "llama")
    data = path.read_bytes()
    at = data.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight")  # n_dims 4, dim 8, type 4, offset 8
    for change, expected in (
        (data[: at + 4] + (2**62).to_bytes(8, "little") + data[at + 12 :], "ends before the end of 'blk.0.attn_norm"),
        (data[: at + 4] + bytes(8) + data[at + 12 :], "'blk.0.attn_norm.weight' has a shape that its type cannot have"),
        (data[:at] + (2**31).to_bytes(4, "little") + data[at + 4 :], "a tensor has 2,147,483,648 dimensions"),
        (data[: at + 12] + (99).to_bytes(4, "little") + data[at + 16 :], "gguf does not dequantise tensors of type 99"),
        (data[: at + 16] + (2**63).to_bytes(8, "little") + data[at + 24 :], "ends before the end of 'blk.0.attn_norm"),
    ):
        path.write_bytes(change)
        refused(path, expected)


def test_tensors_may_not_overlap_to_take_more_memory_than_the_file_has(tmp_path):
    path = foreign.write_gguf(tmp_path / "a.gguf", "llama")
    data = bytearray(path.read_bytes())
    big = b"token_embd.weight"
    for name in (b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight", b"blk.0.ffn_gate.weight", b"blk.1.ffn_gate.weight"):
        at, source = data.index(name) + len(name), data.index(big) + len(big)
        data[at : at + 32] = data[source : source + 32]  # n_dims 4, dims 16, type 4, offset 8
    path.write_bytes(data)
    refused(path, "is not complete")


def test_a_file_that_became_shorter_after_it_was_opened_is_refused(tmp_path):
    path = foreign.write_gguf(tmp_path / "a.gguf", "llama")
    folder = foreign.write_folder(tmp_path / "folder", "llama")
    for file, model in ((path, read_pretrained(path)), (folder / "model.safetensors", read_pretrained(folder))):
        file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(UserError):
            _ = model.params


def test_opening_a_folder_reads_only_the_headers_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted.np, "fromfile", None)
    assert read_pretrained(foreign.write_folder(tmp_path, "llama")).config.n_layers == foreign.LAYERS
