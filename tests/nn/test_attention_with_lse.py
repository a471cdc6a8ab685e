"""Attention whose log-sum-exp has a gradient. Ground truth: PyTorch's autograd in float64, and finite differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXPECT_C

from retro_np import gradcheck, kernels
from retro_np.nn.attention import attention_with_lse, relative_attention

KINDS = ["numpy", "numba", "c"] if EXPECT_C else ["numpy", "numba"]


@st.composite
def problems(draw):
    """(arrays, masks) in float64: groups of queries and keys, several tiles, items and queries without keys."""
    sizes = st.one_of(st.integers(1, 5), st.sampled_from([31, 32, 33, 40]))
    (batch, g, k, h, c), n, r = (draw(st.integers(1, 3)) for _ in range(5)), draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = {"causal_offset": draw(st.sampled_from([None, 0, 1, r - 1, -2])), "key_mask": None}
    if draw(st.booleans()):
        masks["key_mask"] = rng.random((batch, k, r)) < 0.6
        masks["key_mask"][0] &= draw(st.booleans())
    arrays = [rng.standard_normal((batch, *shape, h, c)) for shape in ((g, n), (k, r), (k, r))]
    if draw(st.booleans()):
        arrays += [rng.standard_normal((n + r - 1, h, c)), *rng.standard_normal((2, h, c))]
    return arrays, masks


def seen_by(q, keys, causal_offset=None, key_mask=None):
    """(B, 1, 1, n, k, r), True where query i may see key j of a group."""
    (n, r), i = (q.shape[2], keys.shape[2]), np.arange(q.shape[2])[:, None, None]
    causal = np.ones((n, 1, r), bool) if causal_offset is None else np.arange(r) <= i + causal_offset
    present = np.ones(keys.shape[:3], bool) if key_mask is None else key_mask
    return causal & present[:, None, None, None]


def attention_in_torch(torch, seen, q, keys, values, table=None, u=0.0, v=0.0):
    """out and lse for the queries that see a key; out is 0, and lse is left out of the graph, for the others."""
    (n, r), c = (q.shape[2], keys.shape[2]), q.shape[-1]
    logits = torch.einsum("bgnhc,bkrhc->bhgnkr", q + u, keys)
    if table is not None:
        rows = n - 1 - torch.arange(n)[:, None] + torch.arange(r)
        logits = logits + torch.einsum("bgnhc,nrhc->bhgnr", q + v, table[rows])[..., None, :]
    logits = (logits / c**0.5).masked_fill(~seen, -torch.inf).flatten(-2)
    some = seen.flatten(-2).any(-1, keepdim=True)
    logits = torch.where(some, logits, 0.0)
    weights = torch.where(some, logits.softmax(-1), 0.0)
    out = torch.einsum("bhgns,bshc->bgnhc", weights, values.flatten(1, 2))
    return out, torch.where(some[..., 0], logits.logsumexp(-1), torch.inf)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)  # PyTorch takes most of the time
@given(problem=problems())
def test_out_and_lse_and_the_gradients_of_both_equal_autograd(kind, problem):
    import torch

    kernels.use(kind)
    arrays, masks = problem
    (out, lse), vjp = attention_with_lse(*arrays, **masks)
    rng = np.random.default_rng(1)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
    right, right_lse = attention_in_torch(torch, torch.tensor(seen_by(*arrays[:2], **masks)), *leaves)
    np.testing.assert_allclose(out, right.detach(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(lse, right_lse.detach(), rtol=1e-10, atol=1e-10)
    has_key = torch.isfinite(right_lse)
    scalar = (right * torch.tensor(dout)).sum() + (right_lse[has_key] * torch.tensor(dlse)[has_key]).sum()
    expected = torch.autograd.grad(scalar, leaves)
    for gradient, right_gradient in zip(vjp(dout, dlse), expected, strict=True):
        np.testing.assert_allclose(gradient, right_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_positions", [False, True])
def test_the_gradient_of_out_and_lse_in_one_number_equals_finite_differences(kind, with_positions):
    kernels.use(kind)
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 4, 2, 3), (2, 2, 5, 2, 3), (2, 2, 5, 2, 3)] + [(8, 2, 3), (2, 3), (2, 3)] * with_positions
    arrays, mask = [rng.standard_normal(shape) for shape in shapes], rng.random((2, 2, 5)) < 0.7
    of_out, of_lse = rng.standard_normal((2, 3, 4, 2, 3)), rng.standard_normal((2, 2, 3, 4))

    def f(*arrays):
        (out, lse), vjp = attention_with_lse(*arrays, causal_offset=2, key_mask=mask)
        # Both are squared, so that their gradients differ from entry to entry.
        value = np.sum(of_out * out**2) + np.sum(of_lse * lse**2)
        return value, lambda dy: vjp(dy * 2 * of_out * out, dy * 2 * of_lse * lse)

    assert gradcheck(f, *arrays)


@pytest.mark.parametrize("kind", KINDS)
def test_two_softmaxes_joined_by_their_lse_equal_one_over_all_keys(kind):
    kernels.use(kind)
    rng = np.random.default_rng(0)
    q, keys, values, dout = (rng.standard_normal((2, 1, n, 2, 4)) for n in (6, 9, 9, 6))
    (out_1, lse_1), vjp_1 = attention_with_lse(q, keys[:, :, :5], values[:, :, :5])
    (out_2, lse_2), vjp_2 = attention_with_lse(q, keys[:, :, 5:], values[:, :, 5:])
    share = (1 / (1 + np.exp(lse_1 - lse_2))).transpose(0, 2, 3, 1)[..., None]  # the second softmax's share
    out, vjp = relative_attention(q, keys, values)
    np.testing.assert_allclose(out_1 + share * (out_2 - out_1), out, rtol=1e-12)
    dlse_2 = (np.sum(dout * (out_2 - out_1), axis=-1, keepdims=True) * share * (1 - share))[..., 0].transpose(
        0, 3, 1, 2
    )
    dq_1, dkeys_1, dvalues_1 = vjp_1(dout * (1 - share), -dlse_2)
    dq_2, dkeys_2, dvalues_2 = vjp_2(dout * share, dlse_2)
    joined = dq_1 + dq_2, np.concatenate([dkeys_1, dkeys_2], 2), np.concatenate([dvalues_1, dvalues_2], 2)
    for gradient, right in zip(joined, vjp(dout), strict=True):
        np.testing.assert_allclose(gradient, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_relative_attention_gives_the_bits_of_attention_with_lse_whose_lse_is_not_used(kind):
    kernels.use(kind)
    q, keys, values, dout = np.random.default_rng(0).standard_normal((4, 1, 2, 7, 2, 4))
    out, vjp = relative_attention(q, keys, values, causal_offset=0)
    (same_out, _), other_vjp = attention_with_lse(q, keys, values, causal_offset=0)
    assert out.tobytes() == same_out.tobytes()
    for dlse in (None, np.zeros((1, 2, 2, 7))):
        for gradient, other in zip(vjp(dout), other_vjp(dout, dlse), strict=True):
            assert gradient.tobytes() == other.tobytes()
