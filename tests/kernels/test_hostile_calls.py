"""Kernels with hostile arguments refuse them or give what NumPy gives; attention's mask for every causal offset."""

import ctypes
import runpy
import sys
from functools import partial

import hostile_calls
import numpy as np
import pytest
from hostile_calls import NUMBERS, hostile_call
from support import needs_c

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import attention, rowwise
from retro_np.kernels.attention import attention_backward, attention_forward

OFFSETS = [s * 2**63 + d for s in (-1, 0, 1) for d in (-3, -2, -1, 0, 1, 2) if -(2**63) <= s * 2**63 + d < 2**63]


@needs_c
@pytest.mark.parametrize("seed", range(8))
def test_hostile_arguments_are_refused_by_the_c_kernels_or_give_what_numpy_gives(seed):
    rng = np.random.default_rng(seed)
    outcomes = {hostile_call(rng, ("c",)) for _ in range(400)}
    assert {"returned", "refused: UserError", "C returned", "C refused: TypeError", "C refused: ValueError"} <= outcomes


@pytest.mark.slow
def test_hostile_arguments_are_refused_by_the_numba_kernels_or_give_what_numpy_gives():
    rng = np.random.default_rng(0)
    assert {hostile_call(rng, ("numba",)) for _ in range(600)} >= {"returned", "refused: UserError"}


@pytest.mark.parametrize("kind", ["numpy", "numba", pytest.param("c", marks=needs_c)])
@pytest.mark.parametrize("offset", [*OFFSETS, 10**30, -(10**30)])
def test_attention_sees_the_keys_up_to_the_query_plus_any_offset(kind, offset):
    kernels.use(kind)
    rng = np.random.default_rng(0)
    q, keys, values, dout = (rng.standard_normal((1, 1, n, 1, 4)) for n in (5, 7, 7, 5))
    seen = np.array([[j <= i + offset for j in range(7)] for i in range(5)])  # Python's integers do not overflow
    logits = np.where(seen, q[0, 0, :, 0] @ keys[0, 0, :, 0].T / 2, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, initial=-1e300, keepdims=True))
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    out, lse = attention_forward(q, keys, values, causal_offset=offset)
    np.testing.assert_allclose(out[0, 0, :, 0], weights @ values[0, 0, :, 0], atol=1e-12)
    _, _, dvalues, *_ = attention_backward(dout, lse, q, keys, values, causal_offset=offset)
    np.testing.assert_allclose(dvalues[0, 0, :, 0], weights.T @ dout[0, 0, :, 0], atol=1e-12)


@needs_c
@pytest.mark.parametrize("offset", OFFSETS)
def test_the_c_function_itself_takes_every_offset_of_64_bits(offset):
    rng = np.random.default_rng(1)
    q, keys, values = (rng.standard_normal((2, 1, n, 1, 3)) for n in (40, 9, 9))
    out, lse = np.empty_like(q), np.empty((2, 1, 1, 40))
    kernels.c_extension().attention_forward(q, keys, values, None, None, None, None, offset, out, lse, 0, 2)
    right, right_lse = attention._forward_numpy(q, keys, values, causal_offset=offset)
    np.testing.assert_allclose(out, right, atol=1e-12)
    np.testing.assert_allclose(lse, right_lse, atol=1e-12)


@needs_c
def test_an_empty_array_whose_sizes_multiply_to_more_than_any_memory_is_refused():
    module = kernels.c_extension()
    row = ctypes.c_float * 0  # ctypes, unlike NumPy, makes empty arrays of any size
    huge = (row * 2**62)()
    with pytest.raises(ValueError, match="queries is larger than any memory"):
        module.nearest(huge, huge, 0, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))


@pytest.mark.parametrize("kind", ["numpy", "numba"])
@pytest.mark.parametrize("index", [np.nan, np.inf, 1e300, -1.0, 0.5])
def test_an_index_that_is_not_an_integer_is_refused(kind, index):
    kernels.use(kind)
    with pytest.raises(UserError, match=r"scatter_add: indices has shape .* and type float64; .* an array of integers"):
        rowwise.scatter_add(np.ones((2, 3)), np.array([0, index]), 2)


@pytest.mark.parametrize("kind", ["numpy", "numba"])
@pytest.mark.parametrize("change", [{"step": 0}, {"step": -3}, {"betas": (1.0, 0.5)}, {"betas": (0.9, -0.1)}], ids=str)
def test_a_step_or_a_beta_for_which_adamw_is_not_defined_is_refused(kind, change):
    kernels.use(kind)
    p, g, m, v = np.ones((4, 3))
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.0, "step": 1} | change
    with pytest.raises(UserError, match=r"adamw_step: step must be at least 1 and betas in \[0, 1\)"):
        rowwise.adamw_step(p, g, m, v, **settings)
    np.testing.assert_array_equal([p, m, v], 1)


@pytest.mark.parametrize("kind", ["numpy", "numba", pytest.param("c", marks=needs_c)])
def test_what_is_not_an_array_is_refused_and_named(kind):
    kernels.use(kind)
    arrays = {name: np.ones((1, 1, 2, 1, 3)) for name in ("q", "keys", "values")}
    for name in arrays:
        for thing in (None, 3, [1.0], "text", b"bytes", object(), memoryview(b"12345678"), np.float64(2)):
            with pytest.raises(UserError, match=rf"attention_forward: {name} is .*; it must be an array of floating"):
                partial(attention_forward, **arrays | {name: thing})()


@pytest.mark.parametrize("faults", [False, True])
def test_the_program_exits_with_status_1_if_a_call_is_at_fault_and_with_0_if_none_is(faults, monkeypatch, capsys):
    def broken(name):
        raise ZeroDivisionError(name)

    if faults:
        monkeypatch.setattr(kernels, "use", broken)
    monkeypatch.setattr(sys, "argv", ["hostile_calls.py", "9", "0", "numpy"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(hostile_calls.__file__, run_name="__main__")
    assert ended.value.code == int(faults)
    assert ("'FAULT ZeroDivisionError': 9" in capsys.readouterr().out) == faults


def test_the_numbers_of_the_hostile_calls_include_the_limits_of_64_bits():
    assert {2**63 - 1, -(2**63), 2**63} <= {n for n in NUMBERS if type(n) is int}
