"""Numba and C against the NumPy oracle, which other tests compare with the reference and PyTorch; refused arguments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY
from support import EXPECT_C, VECTOR_UNITS, needs_c

from retro_np import gradcheck, kernels
from retro_np.kernels import attention
from retro_np.kernels.attention import attention_backward, attention_forward
from retro_np.kernels.threads import use_threads
from retro_np.nn.checks import checks

KINDS = ["numba", "c"] if EXPECT_C else ["numba"]


@st.composite
def problems(draw, dtype=None):
    """(arrays, masks), including n = 1, odd head sizes, masked keys, items without keys and several tiles."""
    sizes = st.one_of(st.integers(1, 5), st.sampled_from([16, 17, 31, 32, 33, 40, 70]))
    batch, g, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(sizes)
    k, r = draw(st.integers(0, 3)), draw(sizes)
    h, c = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8, 12, 16, 17, 20]))
    dtype = dtype or draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    masks = {"causal_offset": draw(st.sampled_from([None, None, 0, 1, r - 1, -2])), "key_mask": None}
    if draw(st.booleans()):
        masks["key_mask"] = rng.random((batch, k, r)) < 0.6
        masks["key_mask"][0] &= draw(st.booleans())  # possibly an item without keys
    positions = ()
    if draw(st.booleans()):
        count = n + r - 1 if masks["causal_offset"] is None else min(n + r - 1, n + max(0, masks["causal_offset"]))
        positions = normal(count, h, c), normal(h, c), normal(h, c)
    return (normal(batch, g, n, h, c), normal(batch, k, r, h, c), normal(batch, k, r, h, c), *positions), masks


def results(kind, arrays, masks, dout, dlse=None):
    """out, lse and the gradients."""
    kernels.use(kind)
    out, lse = attention_forward(*arrays, **masks)
    return [out, lse, *(g for g in attention_backward(dout, lse, *arrays, **masks, dlse=dlse) if g is not None)]


def cotangents(arrays):
    """dout and dlse."""
    rng, (batch, g, n, h, _), dtype = np.random.default_rng(1), arrays[0].shape, arrays[0].dtype
    return rng.standard_normal(arrays[0].shape).astype(dtype), rng.standard_normal((batch, h, g, n)).astype(dtype)


def same_bits(arrays, others):
    return all(array.tobytes() == other.tobytes() for array, other in zip(arrays, others, strict=True))


def assert_close(actual, expected):
    """Equal within rounding: sums of up to a few hundred terms are taken in a different order."""
    assert len(actual) == len(expected)
    for array, oracle in zip(actual, expected, strict=True):
        assert array.dtype == oracle.dtype
        eps = np.finfo(oracle.dtype).eps
        scale = max(1.0, np.abs(oracle[np.isfinite(oracle)]).max(initial=0))
        np.testing.assert_allclose(array, oracle, rtol=0, atol=400 * eps * scale)


@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(problem=problems())
def test_each_kind_equals_the_numpy_oracle(kind, problem):
    arrays, masks = problem
    dout, dlse = cotangents(arrays)
    assert_close(results(kind, arrays, masks, dout), results("numpy", arrays, masks, dout))
    assert_close(results(kind, arrays, masks, dout, dlse), results("numpy", arrays, masks, dout, dlse))


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
@MANY
@given(problem=problems())
def test_no_gradient_of_lse_and_one_of_zeros_give_the_same_bits(kind, problem):
    arrays, masks = problem
    dout, dlse = cotangents(arrays)
    assert same_bits(results(kind, arrays, masks, dout), results(kind, arrays, masks, dout, np.zeros_like(dlse)))


@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(problem=problems())
def test_a_group_of_queries_beside_others_gives_the_bits_that_it_gives_alone(kind, problem):
    (q, *arrays), masks = problem
    kernels.use(kind)
    out, lse = attention_forward(q, *arrays, **masks)
    for group in range(q.shape[1]):
        alone = attention_forward(q[:, group : group + 1], *arrays, **masks)
        assert same_bits(alone, (out[:, group : group + 1], lse[:, :, group : group + 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_done_one_by_one_in_any_order_give_the_same_bits(kind, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = (2, 3, 40, 3, 5), (2, 2, 40, 3, 5), (2, 2, 40, 3, 5), (79, 3, 5), (3, 5), (3, 5)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    expected = results(kind, arrays, {}, *cotangents(arrays))

    def one_by_one(tasks, q, keys):
        return [slice(task, task + 1) for task in rng.permutation(tasks).tolist()]

    monkeypatch.setattr(attention, "_task_blocks", one_by_one)
    assert same_bits(results(kind, arrays, {}, *cotangents(arrays)), expected)


@needs_c
@pytest.mark.parametrize("unit", VECTOR_UNITS)
@MANY
@given(problem=problems())
def test_each_vector_unit_equals_the_numpy_oracle(unit, problem):
    extension = kernels.c_extension()
    best = extension.vector_unit()
    if unit in VECTOR_UNITS[VECTOR_UNITS.index(best) + 1 :]:
        with pytest.raises(ValueError, match=f"this processor has no vector unit {unit}"):
            extension.vector_unit(unit)
        return
    arrays, masks = problem
    try:
        extension.vector_unit(unit)
        actual = results("c", arrays, masks, *cotangents(arrays))
    finally:
        extension.vector_unit(best)
    assert_close(actual, results("numpy", arrays, masks, *cotangents(arrays)))


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
@MANY
@given(problem=problems())
def test_one_thread_and_three_give_the_same_bits(kind, problem):
    arrays, masks = problem
    use_threads(1)
    one_thread = results(kind, arrays, masks, *cotangents(arrays))
    use_threads(3)
    assert same_bits(one_thread, results(kind, arrays, masks, *cotangents(arrays)))


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
def test_gradcheck_passes_with_each_kind_set(kind):
    kernels.use(kind)
    for check in checks():
        if "attention" in check.name or check.name in ("ATTN", "ATTN_enc", "CCA", "CA_enc", "FFW", "rms_norm", "gelu"):
            assert gradcheck(check.f, *check.arrays), check.name


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
def test_a_query_without_keys_gives_zero_and_no_gradient(kind):
    arrays = tuple(np.ones((1, 1, 2, 1, 3), np.float32) for _ in range(3))
    out, lse, *grads = results(kind, arrays, {"key_mask": np.zeros((1, 1, 2), bool)}, arrays[0])
    assert not out.any()
    assert np.isposinf(lse).all()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
@pytest.mark.parametrize("dlse_there", [1.0, np.inf, np.nan])
def test_the_gradient_of_lse_has_no_effect_for_a_query_without_keys(kind, dlse_there):
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal((1, 2, 3, 2, 4)) for _ in range(3))
    masks = {"causal_offset": -1, "key_mask": np.ones((1, 2, 3), bool)}  # query 0 of each group has no key
    dout, dlse = cotangents(arrays)
    dlse[..., 0] = 0
    expected = results(kind, arrays, masks, dout, dlse)
    dlse[..., 0] = dlse_there
    assert same_bits(results(kind, arrays, masks, dout, dlse), expected)


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
def test_logits_of_hundreds_do_not_overflow(kind):
    q = np.full((1, 1, 1, 1, 4), 40.0, np.float32)
    keys = np.stack([q[0], -q[0], q[0] * 0.99], axis=2).reshape(1, 1, 3, 1, 4)
    values = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 1, 4)
    out, lse = results(kind, (q, keys, values), {}, q)[:2]
    np.testing.assert_allclose(out.reshape(-1), values[0, 0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(lse, 3200.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF])
def test_nan_in_a_query_or_a_key_comes_out_as_nan(kind, payload):
    nan = np.array(payload, np.uint32).view(np.float32)
    for argument in (0, 1):
        arrays = [np.ones((1, 1, 3, 1, 5), np.float32) for _ in range(3)]
        arrays[argument][0, 0, 1] = nan
        out, lse = results(kind, tuple(arrays), {}, arrays[2])[:2]
        assert np.isnan(out[0, 0, 1]).all()
        assert np.isnan(lse[0, 0, 0, 1])


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
def test_the_content_of_a_masked_key_does_not_change_the_logits(kind):
    arrays, mask = [np.ones((1, 1, 3, 1, 5), np.float32) for _ in range(3)], np.array([[[True, True, False]]])
    expected = results(kind, tuple(arrays), {"key_mask": mask}, arrays[2])[:2]
    for value in (3e38, -3e38, np.inf, np.nan):
        arrays[1][0, 0, 2] = value
        with np.errstate(over="ignore", invalid="ignore"):
            actual = results(kind, tuple(arrays), {"key_mask": mask}, arrays[2])[:2]
        assert same_bits(actual, expected)


@pytest.mark.parametrize("kind", ["numpy", *KINDS])
def test_no_item_and_no_group_give_empty_results(kind):
    positions = np.ones((5, 2, 4)), np.ones((2, 4)), np.ones((2, 4))
    for batch, g in ((0, 1), (1, 0)):
        arrays = np.ones((batch, g, 3, 2, 4)), np.ones((batch, 1, 3, 2, 4)), np.ones((batch, 1, 3, 2, 4)), *positions
        out, _, dq, *_, dtable, _, _ = results(kind, arrays, {}, arrays[0])
        assert out.shape == dq.shape == arrays[0].shape
        assert not dtable.any()


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_are_not_aligned_give_what_their_copies_give(kind):
    arrays = [np.random.default_rng(i).standard_normal((1, 1, 3, 1, 4)) for i in range(3)]
    shifted = []
    for array in arrays:
        memory = np.empty(array.nbytes + 1, np.uint8)[1:].view(np.float64)
        memory[:] = array.reshape(-1)
        shifted.append(memory.reshape(array.shape))
    assert_close(results(kind, tuple(shifted), {}, arrays[0]), results("numpy", tuple(arrays), {}, arrays[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_are_not_contiguous_give_what_their_copies_give(kind):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((2, 1, 6, 2, 8))
    q, keys, values = wide[..., ::2], wide[:, :, ::-1, :, :4], wide[:, :, :, ::-1, 4:]
    dout = rng.standard_normal((4, 2, 6, 1, 2)).T
    actual = results(kind, (q, keys, values), {"causal_offset": 0}, dout)
    copies = [array.copy() for array in (q, keys, values)]
    assert_close(actual, results(kind, copies, {"causal_offset": 0}, dout.copy()))


def call(**changes):
    """Call the C function with one argument changed."""
    f = np.zeros
    arguments = {
        "q": f((2, 1, 3, 2, 4)), "keys": f((2, 1, 5, 2, 4)), "values": f((2, 1, 5, 2, 4)), "table": f((7, 2, 4)),
        "u": f((2, 4)), "v": f((2, 4)), "key_mask": np.ones((2, 1, 5), bool), "causal_offset": None,
        "out": f((2, 1, 3, 2, 4)), "lse": f((2, 2, 1, 3)), "first": 0, "last": 4,
    }  # fmt: skip
    kernels.c_extension().attention_forward(*(arguments | changes).values())


def call_backward(**changes):
    f = np.zeros
    arguments = {
        "dout": f((2, 1, 3, 2, 4)), "lse": f((2, 2, 1, 3)), "dlse": f((2, 2, 1, 3)), "q": f((2, 1, 3, 2, 4)),
        "keys": f((2, 1, 5, 2, 4)), "values": f((2, 1, 5, 2, 4)), "table": f((7, 2, 4)), "u": f((2, 4)),
        "v": f((2, 4)), "key_mask": None, "causal_offset": 0, "dq": f((2, 1, 3, 2, 4)), "dkeys": f((2, 1, 5, 2, 4)),
        "dvalues": f((2, 1, 5, 2, 4)), "dtable": f((2, 7, 2, 4)), "du": f((2, 2, 4)), "dv": f((2, 2, 4)), "first": 0,
        "last": 4,
    }  # fmt: skip
    kernels.c_extension().attention_backward(*(arguments | changes).values())


def read_only(array):
    array.flags.writeable = False
    return array


REFUSED = [
    ({"q": [1.0]}, TypeError, "q must be an array"),
    ({"q": np.zeros((2, 1, 3, 2, 4), int)}, TypeError, "q must be float32 or float64"),
    ({"q": np.zeros((2, 1, 3, 2, 4), ">f8")}, TypeError, "q must be float32 or float64"),
    ({"q": np.zeros((2, 3, 2, 4))}, ValueError, "q must have five dimensions"),
    ({"q": np.zeros((2, 1, 3, 2, 0))}, ValueError, "q has heads of size 0"),
    ({"keys": np.zeros((2, 1, 5, 2, 4), np.float32)}, TypeError, "keys must have the type of q"),
    ({"values": np.zeros((2, 1, 4, 2, 4))}, ValueError, "values has size 4 along axis 2, not 5"),
    ({"keys": np.zeros((2, 1, 5, 2, 8))[..., ::2]}, ValueError, "keys must be C-contiguous"),
    ({"values": np.zeros(8 * 80 + 1, np.uint8)[1:].view(np.float64).reshape(2, 1, 5, 2, 4)}, ValueError, "aligned"),
    ({"table": np.zeros((8, 2, 4))}, ValueError, "table has 8 distances, more than n \\+ r - 1 = 7"),
    ({"u": None}, TypeError, "table, u and v must all be arrays, or all be None"),
    ({"u": np.zeros((2, 3))}, ValueError, "u has size 3 along axis 1, not 4"),
    ({"key_mask": np.ones((2, 1, 5))}, TypeError, "key_mask must be bool"),
    ({"key_mask": np.ones((2, 1, 4), bool)}, ValueError, "key_mask has size 4 along axis 2, not 5"),
    ({"causal_offset": 0.5}, TypeError, "causal_offset must be an integer"),
    ({"causal_offset": 10**30}, OverflowError, ""),
    ({"first": 3, "last": 2}, ValueError, "tasks 3 to 2 are not within 0 to 4"),
    ({"last": 5}, ValueError, "tasks 0 to 5 are not within 0 to 4"),
    ({"first": -1}, ValueError, "tasks -1"),
]
FORWARD_ONLY = [
    ({"out": read_only(np.zeros((2, 1, 3, 2, 4)))}, ValueError, "out is read-only"),
    ({"out": np.zeros((2, 1, 3, 2, 4), np.float32)}, TypeError, "out must have the type of q"),
    ({"lse": np.zeros((2, 2, 1, 4))}, ValueError, "lse has size 4 along axis 3, not 3"),
]
BACKWARD_ONLY = [
    ({"dq": read_only(np.zeros((2, 1, 3, 2, 4)))}, ValueError, "dq is read-only"),
    ({"dout": np.zeros((2, 1, 3, 2, 5))}, ValueError, "dout has size 5 along axis 4, not 4"),
    ({"dlse": np.zeros((2, 2, 1, 4))}, ValueError, "dlse has size 4 along axis 3, not 3"),
    ({"dlse": np.zeros((2, 2, 3))}, ValueError, "dlse must have four dimensions"),
    ({"dlse": np.zeros((2, 2, 1, 3), np.float32)}, TypeError, "dlse must have the type of q"),
    ({"dlse": np.zeros((2, 2, 1, 6))[..., ::2]}, ValueError, "dlse must be C-contiguous"),
    ({"dlse": np.zeros(97, np.uint8)[1:].view(np.float64).reshape(2, 2, 1, 3)}, ValueError, "dlse must be aligned"),
    ({"dlse": 0.0}, TypeError, "dlse must be an array"),
    ({"dkeys": np.zeros((2, 1, 5, 2, 4), np.float32)}, TypeError, "dkeys must have the type of q"),
    ({"dtable": np.zeros((2, 6, 2, 4))}, ValueError, "dtable has size 6 along axis 1, not 7"),
    ({"dtable": np.zeros((0, 7, 2, 4)), "last": 0}, ValueError, "dtable needs at least one part"),
    ({"dtable": None}, TypeError, "dtable, du and dv must be arrays if table is one"),
    ({"du": np.zeros((1, 2, 4))}, ValueError, "du has size 1 along axis 0, not 2"),
    ({"table": None, "u": None, "v": None}, TypeError, "dtable, du and dv must be arrays if table is one"),
]


@needs_c
@pytest.mark.parametrize(
    ("function", "changes", "error", "words"),
    [(call, *case) for case in REFUSED + FORWARD_ONLY] + [(call_backward, *case) for case in REFUSED + BACKWARD_ONLY],
)
def test_the_error_of_a_c_function_for_a_wrong_argument_names_it(function, changes, error, words):
    function()
    with pytest.raises(error, match=words or None):
        function(**changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short", ["keys", "values", "table", "u", "v", "key_mask", "dout", "lse", "dlse"])
def test_no_kind_reads_beyond_the_end_of_an_array(kind, short):
    f = np.ones
    arrays = {"q": f((2, 1, 3, 2, 4)), "keys": f((2, 1, 5, 2, 4)), "values": f((2, 1, 5, 2, 4)), "table": f((7, 2, 4))}
    arrays |= {"u": f((2, 4)), "v": f((2, 4)), "key_mask": f((2, 1, 5), bool)}
    arrays |= {"dout": f((2, 1, 3, 2, 4)), "lse": f((2, 2, 1, 3)), "dlse": f((2, 2, 1, 3))}
    arrays[short] = arrays[short][..., :-1] if short != "table" else f((8, 2, 4))
    kernels.use(kind)
    with pytest.raises(ValueError, match=r"table|must be|axis"):
        attention_backward(arrays.pop("dout"), arrays.pop("lse"), **arrays)


@pytest.mark.parametrize("length", [1, 300])
def test_the_task_blocks_cover_every_task_once(length):
    q = np.zeros((1, 1, length, 2, 8))
    for tasks in range(40):
        blocks = attention._task_blocks(tasks, q, q)
        assert [task for block in blocks for task in range(block.start, block.stop)] == list(range(tasks))
