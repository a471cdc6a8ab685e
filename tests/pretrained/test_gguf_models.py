"""Models in .gguf files. Ground truth: the library gguf, which writes the files, and the same weights in a folder."""

import struct

import foreign_models as foreign
import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import UserError, load_pretrained
from retro_np.pretrained import gguf_file
from retro_np.pretrained.gguf_file import read_gguf
from retro_np.pretrained.models import read_pretrained
from retro_np.tree import named_leaves

KINDS = tuple(foreign.SETTINGS)
DEQUANTISED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
DEQUANTISED += ["IQ4_NL", "IQ4_XS"]
NOT_DEQUANTISED = ["F64", "I8", "I32", "Q8_K"]


def assert_same(params, expected):
    for (name, array), (other, wanted) in zip(named_leaves(params), named_leaves(expected), strict=True):
        assert name == other
        assert array.dtype == np.float32
        assert np.array_equal(array, wanted), name


@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_has_the_parameters_of_the_folder_with_the_dequantised_weights(kind, quantised, tmp_path):
    weights = foreign.tensors(kind)
    params, config, _ = load_pretrained(foreign.write_gguf(tmp_path / "a.gguf", kind, weights, quantised))
    stored = foreign.gguf_tensors(kind, weights)
    rounded = {name: foreign.rounded(array, quantised) if array.ndim == 2 else array for name, array in stored.items()}
    # Rounding is by rows of the stored matrices, so a permutation of rows before or after it is the same.
    back = {foreign.gguf_name(name): name for name in weights}
    unpermuted = {back[name]: foreign.unpermuted(kind, back[name], array) for name, array in rounded.items()}
    expected, others, _ = load_pretrained(foreign.write_folder(tmp_path / "folder", kind, unpermuted))
    assert_same(params, expected)
    assert config.norm_eps == np.float32(1e-5)
    fields = {"norm_eps": others.norm_eps, "biases": others.biases}
    assert vars(config) | fields == vars(others)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_readout_of_its_own_is_not_tied(kind, tmp_path):
    weights = foreign.tensors(kind) | {"lm_head.weight": np.ones((foreign.VOCABULARY, foreign.WIDTH), np.float32)}
    params, config, _ = load_pretrained(foreign.write_gguf(tmp_path / "a.gguf", kind, weights))
    assert not config.tie_readout
    assert np.array_equal(params["readout"], np.ones((foreign.WIDTH, foreign.VOCABULARY)))


def test_biases_of_llamas_queries_and_keys_are_permuted_as_their_rows(tmp_path):
    weights = foreign.tensors("llama")
    for i in range(foreign.LAYERS):
        for part in "qkvo":
            name = f"model.layers.{i}.self_attn.{part}_proj"
            weights[f"{name}.bias"] = np.arange(len(weights[f"{name}.weight"]), dtype=np.float32)
    params, config, _ = load_pretrained(foreign.write_gguf(tmp_path / "a.gguf", "llama", weights))
    expected = load_pretrained(foreign.write_folder(tmp_path / "folder", "llama", weights, attention_bias=True))[0]
    assert config.biases == ("w_q", "w_k", "w_v", "w_o")
    assert_same(params, expected)


def one_tensor(path, kind, data, shape):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", data, raw_shape=shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", DEQUANTISED)
def test_every_type_that_the_library_dequantises_is_read_in_blocks_of_rows(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "NUMBERS_PER_BLOCK", 1100)  # two rows
    kind = GGMLQuantizationType[name]
    raw = np.random.default_rng(0).integers(0, 256, (7, 512 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]))
    raw = raw.astype(np.uint8)
    _, weights = read_gguf(one_tensor(tmp_path / "a.gguf", kind, raw, raw.shape))
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind)
    assert weights.shapes == {"x": (7, 512)}
    assert np.array_equal(weights.read("x").view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", NOT_DEQUANTISED)
def test_a_type_that_the_library_does_not_dequantise_is_refused_by_name(name, tmp_path):
    kind = GGMLQuantizationType[name]
    path = one_tensor(tmp_path / "a.gguf", kind, np.zeros((1, 2 * GGML_QUANT_SIZES[kind][1]), np.uint8), None)
    with pytest.raises(UserError, match=rf"not dequantise tensors of type \d+ \(.*\b{name}\b.*\): it is not supported"):
        read_gguf(path)


VALUES = {
    "uint8": st.integers(0, 2**8 - 1), "int8": st.integers(-(2**7), 2**7 - 1), "uint16": st.integers(0, 2**16 - 1),
    "int16": st.integers(-(2**15), 2**15 - 1), "uint32": st.integers(0, 2**32 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1), "float32": st.floats(width=32, allow_nan=False),
    "uint64": st.integers(0, 2**64 - 1), "int64": st.integers(-(2**63), 2**63 - 1),
    "float64": st.floats(allow_nan=False), "bool": st.booleans(), "string": st.text(min_size=1),
    "array": st.one_of(
        *(st.lists(x, min_size=1, max_size=5) for x in (st.integers(-9, 9), st.text(), st.booleans()))
    ),
}  # fmt: skip


@settings(deadline=None)
@given(entries=st.lists(st.sampled_from([*VALUES]).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind]))))
def test_metadata_of_every_type_are_what_the_library_wrote(entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for number, (kind, value) in enumerate(entries):
        getattr(writer, f"add_{kind}")(f"x.{number}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, weights = read_gguf(path)
    assert metadata.pop("general.architecture") == "llama"
    assert metadata == {f"x.{number}": value for number, (_, value) in enumerate(entries)}
    assert weights.shapes == {}


def test_version_2_has_the_same_layout(tmp_path):
    path = foreign.write_gguf(tmp_path / "a.gguf", "qwen2")
    expected = load_pretrained(path)[0]
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    path.write_bytes(data)
    assert_same(load_pretrained(path)[0], expected)


def test_another_alignment_is_obeyed(tmp_path):
    path = foreign.write_gguf(tmp_path / "a.gguf", "llama", add=lambda writer: writer.add_custom_alignment(1024))
    assert_same(load_pretrained(path)[0], load_pretrained(foreign.write_gguf(tmp_path / "b.gguf", "llama"))[0])


def test_a_big_endian_file_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.close()
    with pytest.raises(
        UserError, match=r"a.gguf is big-endian; only little-endian files of version 2 or 3 are supported"
    ):
        read_pretrained(tmp_path / "a.gguf")


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    data = foreign.write_gguf(tmp_path / "whole.gguf", "llama").read_bytes()
    path = tmp_path / "a.gguf"
    for size in (*range(0, len(data), 997), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a.gguf is not complete: it ends") as error:
            read_pretrained(path)
        assert "\n" not in str(error.value)


def test_chat_template_special_tokens_and_padding_are_those_of_the_metadata(tmp_path):
    model = read_pretrained(foreign.write_gguf(tmp_path / "a.gguf", "llama"))
    assert model.chat_template == "{{ x }}"
    assert model.special == {"eos_token": foreign.END, "pad_token": foreign.PAD}
    assert (model.config.padding_id, model.stop) == (260, {259})
    assert model.tokenizer.encode("the a").ids == foreign.tokenizer().encode("the a").ids
