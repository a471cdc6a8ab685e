"""Ground truth: table 2 of the paper, and the parameters before they were saved."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from retro_np import (
    EncoderConfig,
    RetroConfig,
    count_parameters,
    init_params,
    load_params,
    load_pretrained,
    retro_loss,
    save_params,
)  # fmt: skip
from retro_np.checkpoint import load_model, write_tensors
from retro_np.errors import UserError
from retro_np.nn.checks import CONFIG
from retro_np.pretrained.bundled import bundled_file
from retro_np.tree import named_leaves

TABLE_2 = {
    "baseline-132m": 132e6, "retro-172m": 172e6, "baseline-368m": 368e6, "retro-425m": 425e6,
    "baseline-1.3b": 1309e6, "retro-1.5b": 1451e6, "baseline-7b": 6982e6, "retro-7.5b": 7532e6,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), TABLE_2.items())
def test_presets_have_the_parameter_counts_of_table_2(name, expected):
    assert abs(count_parameters(RetroConfig.preset(name)) - expected) < max(1e6, 5e-4 * expected)


def test_the_parameter_count_equals_the_sizes_of_the_arrays():
    params = init_params(CONFIG, np.random.default_rng(0))
    sizes = {name: array.size for name, array in named_leaves(params)}
    assert count_parameters(CONFIG, embeddings=True) == sum(sizes.values())
    tables = sizes["embedding"] + sizes["encoder.embedding"] + sizes["readout"]
    assert count_parameters(CONFIG) == sum(sizes.values()) - tables


def test_fresh_parameters_are_float32_and_a_function_of_the_generator():
    first, second = (dict(named_leaves(init_params(CONFIG, np.random.default_rng(3)))) for _ in range(2))
    assert all(array.dtype == np.float32 for array in first.values())
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saved_parameters_come_back_bit_for_bit_with_their_configuration(tmp_path, dtype):
    params = init_params(CONFIG, np.random.default_rng(0))
    params["norm"] = params["norm"].astype(dtype)
    save_params(tmp_path / "a.safetensors", params, CONFIG)
    loaded, config = load_params(tmp_path / "a.safetensors")
    assert config == CONFIG
    for (name, array), (loaded_name, loaded_array) in zip(named_leaves(params), named_leaves(loaded), strict=True):
        assert name == loaded_name
        assert array.dtype == loaded_array.dtype
        assert np.array_equal(array, loaded_array)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    params = init_params(CONFIG, np.random.default_rng(0))
    for name in ("a", "b"):
        save_params(tmp_path / name, params, CONFIG)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_missing_cut_short_or_not_a_checkpoint_is_refused_and_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"no checkpoint at .*a\.safetensors"):
        load_params(path)
    save_params(path, init_params(CONFIG, np.random.default_rng(0)), CONFIG)
    complete = path.read_bytes()
    for broken in (b"", b"hello", complete[: len(complete) // 2], complete[:-1]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.safetensors"):
            load_params(path)


def save_readout(path, change):
    """Write a checkpoint with a changed readout. Returns its path."""
    params = init_params(CONFIG, np.random.default_rng(0))
    tensors = dict(named_leaves(params))
    tensors["readout"] = change(tensors["readout"])
    save_file(tensors, path, {"retro_np": json.dumps({"config": CONFIG.to_dict()})})  # without our own checks
    return path


def test_tensors_that_are_not_finite_floating_point_numbers_are_refused_and_named(tmp_path):
    with pytest.raises(UserError, match=r"readout holds int32"):
        load_params(save_readout(tmp_path / "integers", lambda array: array.astype(np.int32)))
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match=r"readout is not finite everywhere"):
            load_params(save_readout(tmp_path / "broken", lambda array, value=value: np.full_like(array, value)))


def test_tensors_that_numpy_cannot_hold_are_refused(tmp_path):
    header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="x holds F8_E4M3, not floating-point numbers: convert it to float32"):
        load_params(tmp_path / "x")


@pytest.mark.parametrize("run", [5, [], {"data": 3}, {"data": {"tokenizer": 5}}])
def test_metadata_of_the_wrong_form_is_refused(tmp_path, run):
    tensors = dict(named_leaves(init_params(CONFIG, np.random.default_rng(0))))
    write_tensors(tmp_path / "x", tensors, {"config": CONFIG.to_dict(), "run": run})
    sizes = {"vocabulary_size": CONFIG.vocabulary_size, "chunk_size": CONFIG.chunk_size}
    database = SimpleNamespace(**sizes, padding=0, path="db", identity={"tokenizer": "abcdefgh"})
    with pytest.raises(UserError, match=r"is missing from the metadata|has a different tokenizer"):
        load_model(tmp_path / "x", database)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 5}, {"n_layers": 0}, {"cca_layers": (4,)}, {"cca_layers": (2, 2)}, {"encoder": None},
        {"dropout": 1.0}, {"retrieved_part": "NN"}, {"share_embeddings": True}, {"chunk_size": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_no_model_can_have_is_a_value_error(change):
    with pytest.raises(ValueError, match=r" (must be|needs) "):
        RetroConfig(**vars(CONFIG) | change)


def test_a_model_with_an_encoder_but_no_cross_attention_is_a_baseline():
    config = RetroConfig(11, 6, 8, 2, 4, 3, (), 3, EncoderConfig())
    assert "encoder" not in init_params(config, np.random.default_rng(0))
    assert not config.retrieves


def test_an_unknown_preset_is_refused_with_the_names_of_the_presets():
    with pytest.raises(UserError, match="retro-172m"):
        RetroConfig.preset("retro-1t")


@pytest.mark.parametrize("name", ["retro", "baseline"])
def test_the_bundled_models_compute_in_float32_however_they_are_loaded(name):
    (params, config), (same, *_) = load_params(bundled_file(name)), load_pretrained(name)
    assert {array.dtype for _, array in named_leaves(params)} == {np.dtype(np.float32)}
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(named_leaves(params), named_leaves(same), strict=True))
    tokens = np.random.default_rng(0).integers(2, config.vocabulary_size, (2, 65))
    loss, _ = retro_loss(params, config, tokens[:, :-1], tokens[:, 1:], None)
    assert loss.dtype == np.float32
    # Random tokens cost somewhat more than ln V nats, since the model expects text.
    assert np.log(config.vocabulary_size) < loss < 2.5 * np.log(config.vocabulary_size)
