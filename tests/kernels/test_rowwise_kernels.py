"""Loops over rows: Numba against the NumPy oracles, which other tests compare with PyTorch and math.erf; threads."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY
from support import fresh_python

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import bert, rowwise
from retro_np.kernels.threads import blocks, parallel_for, use_threads


@st.composite
def matrices(draw, count):
    """`count` matrices of one shape, and a generator for further random numbers."""
    shape = draw(st.sampled_from([(0, 4), (1, 1), (3, 5), (70, 16), (200, 33), (2000, 24)]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1e-3, 1.0, 20.0]))
    return [(scale * rng.standard_normal(shape)).astype(dtype) for _ in range(count)], rng


def numpy_and_numba(function, *arrays, **options):
    """What NumPy and Numba return, or the changed copies of the arrays if nothing. Also compares 1 and 3 threads."""
    results = []
    for kind, threads in (("numpy", 1), ("numba", 1), ("numba", 3)):
        kernels.use(kind)
        use_threads(threads)
        copies = [np.array(array) for array in arrays]
        out = function(*copies, **options)
        out = copies if out is None else out if isinstance(out, tuple) else (out,)
        results.append(out)
    oracle, one, three = results
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, three, strict=True))
    return oracle, one


def assert_close(function, *arrays, terms=1, min_scale=1e-6, **options):
    """terms: how many a sum adds, in any order. min_scale: the size of the terms, in case they cancel."""
    oracle, actual = numpy_and_numba(function, *arrays, **options)
    for expected, array in zip(oracle, actual, strict=True):
        assert array.dtype == expected.dtype
        scale = max(min_scale, np.abs(expected).max(initial=0))
        tolerance = 30 * np.finfo(expected.dtype).eps * max(1, terms) ** 0.5 * scale
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance)


@MANY
@given(drawn=matrices(2))
def test_rms_norm_and_its_pullback_equal_the_oracle(drawn):
    (x, dy), rng = drawn
    gain = rng.standard_normal(x.shape[1]).astype(x.dtype)
    assert_close(rowwise.rms_norm_forward, x, gain, terms=x.shape[1])
    _, scale = rowwise.rms_norm_forward(x, gain)
    parts = float((np.abs(dy * gain) * scale[:, None]).max(initial=1e-6))
    assert_close(rowwise.rms_norm_backward, dy, x, gain, scale, terms=x.size, min_scale=parts)


@MANY
@given(drawn=matrices(2))
def test_gelu_and_its_pullback_equal_the_oracle(drawn):
    (x, dy), _ = drawn
    flat, dflat = x.reshape(-1), dy.reshape(-1)
    # 1 + tanh and 1 − tanh² cancel, so the difference has the rounding of its terms
    assert_close(rowwise.gelu_forward, flat, min_scale=float(np.abs(flat).max(initial=1)))
    assert_close(rowwise.gelu_backward, dflat, flat, terms=10, min_scale=float(np.abs(dflat).max(initial=1)))


def test_gelu_of_large_inputs_is_the_identity_or_zero_and_so_is_its_slope():
    x = np.array([-1e4, -40, -10, 10, 40, 1e4], np.float32)
    for kind in ("numpy", "numba"):
        kernels.use(kind)
        np.testing.assert_array_equal(rowwise.gelu_forward(x), np.maximum(x, 0))
        np.testing.assert_array_equal(rowwise.gelu_backward(np.ones_like(x), x), x > 0)


def test_tanh_in_float32_equals_numpy_s_to_5e_7():
    import numba

    from retro_np.kernels.rowwise_numba import _tanh32

    x = np.linspace(-12, 12, 100001).astype(np.float32)
    y = numba.vectorize([numba.float32(numba.float32)])(_tanh32.py_func)(x)
    np.testing.assert_allclose(y, np.tanh(x.astype(np.float64)), atol=5e-7)


@MANY
@given(drawn=matrices(1), vocabulary=st.integers(1, 60))
def test_scatter_add_equals_the_oracle(drawn, vocabulary):
    (x,), rng = drawn
    indices = rng.integers(0, vocabulary, len(x))
    assert_close(rowwise.scatter_add, x, indices, terms=len(x), count=vocabulary)
    kernels.use("numba")
    by_loop = np.zeros((vocabulary, x.shape[1]))
    np.add.at(by_loop, indices, x)
    np.testing.assert_allclose(
        rowwise.scatter_add(x, indices, vocabulary), by_loop, atol=1e-3 * np.abs(x).max(initial=1e-3)
    )


@MANY
@given(drawn=matrices(4), step=st.integers(1, 1000), decay=st.sampled_from([0.0, 0.1]))
def test_adamw_equals_the_oracle(drawn, step, decay):
    (p, g, m, v), _ = drawn
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "decay": decay, "step": step}
    assert_close(rowwise.adamw_step, p, g, m, v * v, terms=10, **options)


def test_adamw_moves_an_array_that_is_not_contiguous():
    p, g = np.ones((4, 6)), np.ones((4, 6))
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.0, "step": 1}
    kernels.use("numba")
    rowwise.adamw_step(p.T, g.T, np.zeros((6, 4)), np.zeros((6, 4)), **options)
    np.testing.assert_allclose(p, 0.9)


@MANY
@given(drawn=matrices(2))
def test_layer_norm_equals_the_oracle(drawn):
    (x, residual), rng = drawn
    bias, gain, shift = rng.standard_normal((3, x.shape[1])).astype(x.dtype)
    assert_close(bert.add_layer_norm, x, bias, residual, gain, shift, 1e-3, terms=1000)


@MANY
@given(drawn=matrices(1))
def test_gelu_by_erf_equals_the_oracle(drawn):
    (x,), rng = drawn
    x = x.astype(np.float32)
    assert_close(bert.add_gelu_erf, x, rng.standard_normal(x.shape[1]).astype(np.float32), min_scale=1.0)


def test_parallel_for_does_every_part_once_and_raises_what_a_part_raises():
    use_threads(3)
    done = []
    parallel_for(done.append, range(50))
    assert sorted(done) == list(range(50))
    parallel_for(lambda part: parallel_for(done.append, [part]), range(50, 60))  # a nested job uses one thread
    assert sorted(done) == list(range(60))
    with pytest.raises(ZeroDivisionError):
        parallel_for(lambda part: 1 / part, [1, 2, 0, 3])


IN_A_THREAD = """
import threading, time
from retro_np.kernels.threads import parallel_for, use_threads
use_threads(2)
done = []
def work():
    time.sleep(0.5)
    parallel_for(done.append, range(9))
    print(sorted(done))
threading.Thread(target=work).start()
"""


def test_work_continues_in_a_thread_that_outlives_the_main_thread():
    assert fresh_python(IN_A_THREAD) == (str(list(range(9))), "", 0)


WITHOUT_A_CACHE = """
import numba, numpy as np
real = numba.njit
def njit(*args, cache=False, **options):
    if cache:
        raise RuntimeError("cannot cache function")
    return real(*args, **options)
numba.njit = njit
from retro_np.kernels import bert, rowwise
print(rowwise.gelu_forward(np.array([-50.0, 50.0])))
"""


def test_if_compiled_code_cannot_be_cached_each_process_compiles_it():
    out, err, status = fresh_python(WITHOUT_A_CACHE, RETRO_NP_KERNELS="numba")
    assert status == 0, err
    assert "50." in out


def test_blocks_cover_a_length_once():
    for length in range(12):
        for size in range(1, 5):
            covered = [i for block in blocks(length, size) for i in range(length)[block]]
            assert covered == list(range(length))


@pytest.mark.parametrize("number", ["0", "-1", "two", 1.5, None])
def test_a_number_of_threads_that_is_not_a_positive_integer_is_refused(number):
    with pytest.raises(UserError, match="the number of threads must be"):
        use_threads(number)


STEP = """
import hashlib, json, retro_np, numpy as np
from retro_np.tree import named_leaves
encoder = retro_np.EncoderConfig(64, 128, 2, 32, 2, (1,))
config = retro_np.RetroConfig(300, 128, 256, 2, 64, 3, (2, 3), 16, encoder, dropout=0.1)
rng = np.random.default_rng(0)
params = retro_np.init_params(config, rng)
tokens, targets = rng.integers(1, 300, (2, 4, 160))
neighbours = rng.integers(1, 300, (4, 10, 2, 32))
neighbours[rng.random(neighbours.shape) < 0.1] = 0
loss, vjp = retro_np.retro_loss(params, config, tokens, targets, neighbours, dropout_key=(0, 1))
retro_np.adamw_update(params, vjp(1.0), retro_np.adamw_init(params), lr=1e-3)
print(json.dumps([float(loss), {name: hashlib.sha256(p.tobytes()).hexdigest() for name, p in named_leaves(params)}]))
"""


@pytest.mark.parametrize("kind", ["numpy", "auto"])
def test_a_training_step_has_the_same_bits_with_one_thread_and_two(kind):
    printed = []
    for threads in ("1", "2"):
        environment = {"RETRO_NP_THREADS": threads, "RETRO_NP_KERNELS": kind}
        environment |= {name: threads for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        out, err, status = fresh_python(STEP, **environment)
        assert status == 0, err
        printed.append(json.loads(out))
    assert printed[0] == printed[1]
    assert len(set(printed[0][1].values())) > 10


X, D = np.ones((5, 4), np.float32), np.ones(4, np.float32)
SHORT = {
    "gain": lambda: rowwise.rms_norm_forward(X, D[:3]),
    "dy": lambda: rowwise.rms_norm_backward(X[:4], X, D, X[:, 0]),
    "scale": lambda: rowwise.rms_norm_backward(X, X, D, X[:4, 0]),
    "gelu's dy": lambda: rowwise.gelu_backward(D[:3], D),
    "indices": lambda: rowwise.scatter_add(X, np.zeros(4, int), 3),
    "an index too high": lambda: rowwise.scatter_add(X, np.array([0, 1, 2, 3, 0]), 3),
    "an index below zero": lambda: rowwise.scatter_add(X, np.array([0, 1, -1, 2, 0]), 3),
    "moments": lambda: rowwise.adamw_step(D, D, D[:3], D, lr=0.1, betas=(0.9, 0.95), eps=1e-8, decay=0, step=1),
    "residual": lambda: bert.add_layer_norm(X.copy(), D, X[:4], D, D, 1e-6),
    "bias": lambda: bert.add_gelu_erf(X.copy(), D[:2]),
}


@pytest.mark.parametrize("case", SHORT)
def test_numba_does_not_read_beyond_the_end_of_an_array(case):
    kernels.use("numba")
    with pytest.raises(UserError, match=r"must be|outside"):
        SHORT[case]()
