"""Ground truth: PyTorch's autograd in float64, on a port that shares no code with the package."""

import numpy as np
import pytest
from hypothesis import given
from strategies import MANY, cases
from support import assert_same_gradients

from retro_np import reference
from retro_np.nn.model import retro, retro_loss
from retro_np.tree import map_tree

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def port():
    import torch_port  # imported here, so that tests without oracles do not need PyTorch

    return torch_port


@MANY
@given(case=cases())
def test_the_port_equals_the_reference(port, case):
    expected = reference.retro(*case.arguments)
    np.testing.assert_allclose(port.retro_logits(*case.arguments), expected, rtol=1e-10, atol=1e-10)


@MANY
@given(case=cases())
def test_the_loss_and_every_gradient_equal_autograd(port, case):
    loss, vjp = retro_loss(case.params, case.config, case.tokens, case.targets, case.neighbours)
    expected, gradients = port.retro_loss(case.params, case.config, case.tokens, case.targets, case.neighbours)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert_same_gradients(vjp(1.0), gradients, rtol=1e-8, floor=1e-12)


@MANY
@given(case=cases())
def test_the_loss_and_every_gradient_without_retrieval_equal_autograd(port, case):
    loss, vjp = retro_loss(case.params, case.config, case.tokens, case.targets, None)
    expected, gradients = port.retro_loss(case.params, case.config, case.tokens, case.targets, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert_same_gradients(vjp(1.0), gradients, rtol=1e-8, floor=1e-12)


@MANY
@given(case=cases())
def test_the_pullback_of_a_random_cotangent_equals_autograd(port, case):
    logits, vjp = retro(*case.arguments)
    cotangent = case.rng.standard_normal(logits.shape)
    assert_same_gradients(vjp(cotangent), port.retro_pullback(*case.arguments, cotangent), rtol=1e-8, floor=1e-12)


@MANY
@given(case=cases())
def test_gradients_in_float32_equal_autograd_to_float32_precision(port, case):
    params = map_tree(lambda _, array: array.astype(np.float32), case.params)
    loss, vjp = retro_loss(params, case.config, case.tokens, case.targets, case.neighbours)
    # The port gets the rounded parameters, so only the arithmetic differs: a few hundred roundings of 6e-8 each.
    expected, gradients = port.retro_loss(params, case.config, case.tokens, case.targets, case.neighbours)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(vjp(1.0), gradients, rtol=1e-3, floor=1e-4)
