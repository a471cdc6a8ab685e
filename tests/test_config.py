"""Configurations from outside: sizes that no array can have, and odd JSON, are refused at once in one line."""

import json
import os

import numpy as np
import pytest

from retro_np import RetroConfig, count_parameters, init_params
from retro_np.config import MAX_LAYERS, MAX_MODEL_SIZE, PRESETS, EncoderConfig
from retro_np.errors import UserError
from retro_np.nn.checks import CONFIG

FIELDS = CONFIG.to_dict()
SIZES = ("vocabulary_size", "d_model", "d_ffw", "n_heads", "d_head", "n_layers", "chunk_size")
HUGE = (10**5, 10**7, 2**31, 10**19, 10**30, 10**5000)
DEEP = json.loads("[" * 900 + "]" * 900)
ODD = (
    -1, 0, 1.5, 1e400, float("nan"), True, False, None, "8", "", "\x1b[2J", "x" * 10**6, [], [1], [True], [[1]], [0],
    DEEP, {}, {"a": 1}, {"d_model": "x"}, 10**30, -(10**5000), [10**5000], ["1"], [1, 1], [None],
)  # fmt: skip


def refusal(fields):
    """The text of the error, which must be a UserError or a TypeError of one short line; None if there is none."""
    text = None
    try:
        RetroConfig(**fields)
    except (UserError, TypeError) as error:
        text = str(error)
    assert text is None or (len(text) < 300 and text.isprintable())
    return text


@pytest.mark.parametrize("name", SIZES)
def test_a_size_above_its_limit_is_refused_and_named(name):
    largest = MAX_LAYERS if name == "n_layers" else MAX_MODEL_SIZE
    for size in (size for size in HUGE if size > largest):
        assert f"{name} must be a whole number from 1 to {largest}, not" in refusal(FIELDS | {name: size})
        if name not in ("vocabulary_size", "chunk_size"):
            encoder = FIELDS["encoder"] | {name: size}
            assert f"encoder.{name} must be a whole number from 1" in refusal(FIELDS | {"encoder": encoder})


def test_the_largest_sizes_are_taken_and_their_parameters_counted():
    sizes = dict.fromkeys(SIZES, MAX_MODEL_SIZE) | {"d_model": MAX_MODEL_SIZE - 1, "n_layers": MAX_LAYERS}
    assert count_parameters(RetroConfig(**sizes)) > MAX_MODEL_SIZE**3 * MAX_LAYERS


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_odd_json_is_refused_in_one_line_or_comes_back_from_json(field):
    taken = [value for value in ODD if refusal(FIELDS | {field: value}) is None]
    for value in taken:
        config = RetroConfig(**FIELDS | {field: value})
        assert RetroConfig(**json.loads(json.dumps(config.to_dict()))) == config
    allowed = {"cca_layers": [[], [1]], "dropout": [0], "encoder": [{}], "padding_id": [0, None]}
    allowed |= {"tie_readout": [True, False], "cca_positions": [True, False]}
    allowed |= {"share_embeddings": [False], "copying_start": [False]}  # True needs an encoder of the decoder's width
    assert taken == allowed.get(field, [])


@pytest.mark.parametrize("field", FIELDS["encoder"])
def test_a_field_of_an_encoder_of_odd_json_is_refused_in_one_line_or_comes_back_from_json(field):
    for value in ODD:
        fields = FIELDS | {"encoder": FIELDS["encoder"] | {field: value}}
        if refusal(fields) is None:
            config = RetroConfig(**fields)
            assert RetroConfig(**json.loads(json.dumps(config.to_dict()))) == config
            assert field == "ca_layers"


@pytest.mark.parametrize("odd", [{"unknown": 1}, {"encoder": {"unknown": 1}}, {"encoder": [1, 2]}, {"encoder": "x"}])
def test_an_unknown_field_or_an_encoder_of_another_kind_is_refused(odd):
    assert refusal(FIELDS | odd) is not None


def test_layers_of_an_iterator_are_all_kept():
    assert RetroConfig(**FIELDS | {"cca_layers": (p for p in (3, 2))}).cca_layers == (2, 3)


def test_numpy_s_numbers_become_python_s():
    odd = {"d_ffw": np.int32(8), "tie_readout": np.bool_(True), "cca_layers": np.array([2]), "dropout": np.float32(0.5)}
    config = RetroConfig(**FIELDS | odd)
    assert (config.d_ffw, config.tie_readout, config.cca_layers, config.dropout) == (8, True, (2,), 0.5)
    assert (type(config.tie_readout), type(config.dropout)) == (bool, float)
    assert json.dumps(config.to_dict())


def test_a_model_larger_than_memory_is_refused_before_anything_is_allocated(monkeypatch):
    pages = {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)

    class NoNumbers:
        def standard_normal(self, shape, dtype):
            raise AssertionError("allocated")

    config = RetroConfig(10**6, 1000, 8, 2, 4, 1)  # 8 GB
    with pytest.raises(UserError, match=r"this model needs about 8.0 GB, but memory has 4.0 GB: use"):
        init_params(config, NoNumbers())
    pages["SC_PHYS_PAGES"] = 2_100_000
    with pytest.raises(AssertionError, match="allocated"):
        init_params(config, NoNumbers())


def test_the_paper_s_models_are_within_the_limits():
    for name in PRESETS:
        RetroConfig.preset(name)
    assert EncoderConfig().n_layers == 2


@pytest.mark.parametrize("vocabulary_size", ["x", [1], None])
def test_a_vocabulary_of_no_size_is_refused_before_padding_is_compared_with_it(vocabulary_size):
    assert "vocabulary_size must be a whole number" in refusal(FIELDS | {"vocabulary_size": vocabulary_size})
