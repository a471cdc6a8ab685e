"""Ground truth: the paper's equations, written as loops in `reference.py`, and values worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from strategies import MANY, baseline_of, cases

from retro_np import reference
from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.nn.model import retro

# float64 after a few hundred roundings, which RMSNorm of a small vector may amplify
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@MANY
@given(cases())
def test_logits_equal_the_reference(case):
    logits, _ = retro(*case.arguments)
    np.testing.assert_allclose(logits, reference.retro(*case.arguments), **EXACT)


@MANY
@given(cases())
def test_logits_without_retrieval_equal_the_reference(case):
    logits, _ = retro(case.params, case.config, case.tokens, None)
    np.testing.assert_allclose(logits, reference.retro(case.params, case.config, case.tokens, None), **EXACT)


@MANY
@given(cases())
def test_logits_of_a_baseline_equal_the_reference(case):
    params, config = baseline_of(case)
    logits, _ = retro(params, config, case.tokens, case.neighbours)
    np.testing.assert_allclose(logits, reference.retro(params, config, case.tokens, None), **EXACT)


@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("change", [{}, {"chunk_size": 1}, {"n_heads": 1}, {"cca_layers": (1,)}], ids=str)
def test_logits_equal_the_reference_at_chosen_shapes(k, change):
    config = replace(CONFIG, **change)
    m, rng = config.chunk_size, np.random.default_rng(k)
    tokens = rng.integers(0, config.vocabulary_size, (1, 3 * m + 1))
    neighbours = rng.integers(0, config.vocabulary_size, (1, tokens.shape[1] // m, k, 2 * m))
    params = perturbed_params(config)
    logits, _ = retro(params, config, tokens, neighbours)
    np.testing.assert_allclose(logits, reference.retro(params, config, tokens, neighbours), **EXACT)


def test_the_reference_position_vector_equals_its_formula():
    half = 10000**-0.5
    by_hand = [math.sin(3), math.sin(3 * half), math.cos(3), math.cos(3 * half)]
    np.testing.assert_allclose(reference.position(3, 4), by_hand, rtol=1e-14)
    np.testing.assert_allclose(reference.position(-3, 4), np.array([-1, -1, 1, 1]) * by_hand, rtol=1e-14)


def test_the_reference_attention_to_two_keys_equals_the_result_by_hand():
    ones = np.ones((1, 1))
    # With d = 2, R_0 = (0, 1) and R_1 = (sin 1, cos 1); w_r selects the sine.
    params = {"w_q": np.array([[1.0], [0.0]]), "w_k": ones, "w_v": ones, "w_o": np.array([[1.0, 2.0]])}
    params |= {"w_r": np.array([[1.0], [0.0]]), "u": np.array([[0.5]]), "v": np.array([[0.25]])}
    query, keys = np.array([2.0, 9.0]), [(np.array([3.0]), 0), (np.array([-1.0]), 1)]
    first, second = 2.5 * 3, 2.5 * -1 + 2.25 * math.sin(1)
    weight = 1 / (1 + math.exp(second - first))
    update = 3 * weight - (1 - weight)
    np.testing.assert_allclose(reference.attention(params, query, keys, 1), [update, 2 * update], rtol=1e-14)


def test_retrieval_does_not_change_the_first_m_minus_1_logits_of_the_reference():
    m, rng = CONFIG.chunk_size, np.random.default_rng(0)
    params, tokens = perturbed_params(CONFIG), rng.integers(1, 11, (1, 3 * m))
    on = reference.retro(params, CONFIG, tokens, rng.integers(1, 11, (1, 3, 2, 2 * m)))
    off = reference.retro(params, CONFIG, tokens, None)
    assert np.array_equal(on[:, : m - 1], off[:, : m - 1])
    assert np.all(np.any(on[:, m - 1 :] != off[:, m - 1 :], axis=-1))
