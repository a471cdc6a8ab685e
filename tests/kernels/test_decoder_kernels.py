"""The norms, SwiGLU and rotary positions of decoders: C against the NumPy oracles, and both against PyTorch's autograd,
finite differences, complex numbers and arithmetic in extended precision."""

from functools import partial

import numpy as np
import pytest
from foreign_models import write_folder
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY
from support import EXPECT_C, VECTOR_UNITS, fresh_python, needs_c

from retro_np import gradcheck, kernels
from retro_np.errors import UserError
from retro_np.kernels.decoders import norm_backward, norm_forward, rotary, swiglu_backward, swiglu_forward
from retro_np.kernels.threads import use_threads
from retro_np.nn import decoders

KINDS = ["numpy", "c"] if EXPECT_C else ["numpy"]
DTYPES = st.sampled_from([np.float32, np.float64])
# Rows and entries that fill vectors, blocks of threads and parts of sums, or leave a rest of each.
SHAPES = [(0, 4), (1, 1), (1, 576), (3, 5), (63, 17), (200, 33), (2100, 48)]
LENGTHS = st.one_of(st.integers(0, 70), st.sampled_from([32767, 32768, 32769, 70_001]))
# Repetitions, angles T, heads and pairs of a head: few pairs or none, vectors and a rest, several blocks of threads
TURNS = [
    (0, 3, 2, 4),
    (2, 5, 0, 4),
    (2, 3, 2, 0),
    (1, 1, 1, 1),
    (3, 1, 2, 33),
    (2, 5, 3, 32),
    (1, 7, 2, 47),
    (2, 601, 3, 17),
]


@pytest.fixture(autouse=True)
def _restore_the_unit():
    module = kernels.c_extension()
    unit = module and module.vector_unit()
    yield
    if module:
        module.vector_unit(unit)


@pytest.fixture(params=VECTOR_UNITS)
def unit(request):
    """Each vector unit that the processor has."""
    try:
        return kernels.c_extension().vector_unit(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")


@st.composite
def norm_problems(draw, dtype=DTYPES):
    """dy, and the arguments of norm_forward; rows far from zero, which only LayerNorm shifts."""
    rng, dtype = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(dtype)
    shape, scale, offset = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([1e-3, 1.0, 20.0])), draw(st.booleans())
    x = scale * rng.standard_normal(shape) + 3 * offset
    dy, gain, bias = rng.standard_normal(shape), rng.standard_normal(shape[1]), rng.standard_normal(shape[1])
    arrays = [array.astype(dtype) for array in (dy, x, gain, bias)]
    return [*arrays[:3], draw(st.sampled_from([None, arrays[3]])), draw(st.sampled_from([1e-6, 1e-5, 0.1]))]


def swiglu_arrays(seed, length, dtype, scale=1.0):
    """dy, gate and up."""
    dy, gate, up = np.random.default_rng(seed).standard_normal((3, length))
    return [array.astype(dtype) for array in (dy, scale * gate, up)]


def rotary_arrays(seed, turns, dtype):
    """x, and the cosines and sines of any angles."""
    rng, (repetitions, angles, heads, d) = np.random.default_rng(seed), turns
    angle = rng.uniform(-7, 7, (angles, d))
    x = rng.standard_normal((repetitions * angles, heads, 2, d))
    return [array.astype(dtype) for array in (x, np.cos(angle), np.sin(angle))]


def results(kind, function, *arguments):
    """What a kernel of this kind returns, without None, as a list."""
    kernels.use(kind)
    out = function(*arguments)
    return [array for array in (out if isinstance(out, tuple) else (out,)) if array is not None]


def assert_close(actual, expected, sizes, roundings):
    """Equal within `roundings` of numbers of the size of the terms, which may cancel."""
    assert [(a.dtype, a.shape) for a in actual] == [(e.dtype, e.shape) for e in expected]
    for array, oracle, size in zip(actual, expected, sizes, strict=True):
        np.testing.assert_allclose(array, oracle, rtol=0, atol=roundings * np.finfo(oracle.dtype).eps * size)


# The norms


@needs_c
@MANY
@given(problem=norm_problems(), unit=st.sampled_from(VECTOR_UNITS))
def test_the_norm_in_c_equals_the_oracle(problem, unit):
    if VECTOR_UNITS.index(unit) <= VECTOR_UNITS.index(best_unit()):
        kernels.c_extension().vector_unit(unit)
    _, x, gain, bias, _ = problem
    size = unit_size(problem) * np.abs(gain).max(initial=1) + (0 if bias is None else np.abs(bias).max(initial=0))
    # A sum of d terms, in two orders; the mean's rounding grows where rows lie far from zero beside their spread.
    expected, actual = (results(kind, norm_forward, *problem[1:]) for kind in ("numpy", "c"))
    assert_close(actual, expected, [size], roundings=20 + x.shape[1] ** 0.5)


@needs_c
@MANY
@given(problem=norm_problems())
def test_the_pullback_of_the_norm_in_c_equals_the_oracle(problem):
    dy, x, gain, bias, eps = problem
    expected, actual = (results(kind, norm_backward, *problem) for kind in ("numpy", "c"))
    centred = x if bias is None else x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred * centred, axis=-1) + eps).min(initial=np.inf)
    size, many = np.abs(dy).max(initial=1), unit_size(problem)
    sizes = [scale * size * np.abs(gain).max(initial=1) * many**2, size * many * max(1, len(x)) ** 0.5, size * len(x)]
    assert_close(actual, expected, sizes[: len(expected)], roundings=20 + x.shape[1] ** 0.5)


def unit_size(problem):
    """The largest number that the mean and the scale are taken of, in units of the row's spread."""
    _, x, _, bias, eps = problem
    centred = x if bias is None else x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return np.abs(x / spread).max(initial=1)


def best_unit():
    """The fastest vector unit of this processor."""
    module = kernels.c_extension()
    for unit in reversed(VECTOR_UNITS):
        try:
            return module.vector_unit(unit)
        except ValueError:
            continue
    raise AssertionError("not even the plain unit")


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_norm_and_its_gradients_equal_pytorch_autograd(kind, with_bias):
    import torch

    rng = np.random.default_rng(0)
    dy, x = rng.standard_normal((2, 130, 37)) + 2
    gain, bias = rng.standard_normal((2, 37))
    leaves = [torch.tensor(array, requires_grad=True) for array in (x, gain, bias)][: 3 if with_bias else 2]
    if with_bias:
        y = torch.nn.functional.layer_norm(leaves[0], (37,), leaves[1], leaves[2], 1e-5)
    else:
        y = torch.nn.functional.rms_norm(leaves[0], (37,), leaves[1], 1e-5)
    y.backward(torch.tensor(dy))
    arguments = x, gain, bias if with_bias else None, 1e-5
    actual = [*results(kind, norm_forward, *arguments), *results(kind, norm_backward, dy, *arguments)]
    for array, tensor in zip(actual, [y.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("norm",), ("norm", "norm_bias")])
def test_the_pullback_of_the_norm_equals_finite_differences(kind, names):
    rng = np.random.default_rng(1)
    kernels.use(kind)
    gradcheck(partial(decoders.norm, eps=1e-5), {name: rng.standard_normal(7) for name in names}, rng.random((2, 3, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm_of_rows_a_thousand_times_their_spread_from_zero_keeps_six_digits_less_three(kind):
    x = 1000 + np.random.default_rng(2).standard_normal((5, 300))
    ones, zeros = np.ones((2, 300), np.float32) * [[1], [0]]
    (y,) = results(kind, norm_forward, x.astype(np.float32), ones.astype("f"), zeros.astype("f"), 1e-5)
    x = x.astype(np.float32).astype(np.float64)  # the rounding of x itself is not the norm's
    np.testing.assert_allclose(y, (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), atol=1e-3)


# SwiGLU


@needs_c
@MANY
@given(seed=st.integers(0, 2**32 - 1), length=LENGTHS, dtype=DTYPES, scale=st.sampled_from([1e-3, 1, 20, 300]))
def test_swiglu_in_c_equals_the_oracle(seed, length, dtype, scale):
    dy, gate, up = swiglu_arrays(seed, length, dtype, scale)
    size = np.abs(gate).max(initial=1) * np.abs(up).max(initial=1)
    expected, actual = (results(kind, swiglu_forward, gate, up) for kind in ("numpy", "c"))
    assert_close(actual, expected, [size], roundings=5)
    expected, actual = (results(kind, swiglu_backward, dy, gate, up) for kind in ("numpy", "c"))
    assert_close(actual, expected, [size * np.abs(dy).max(initial=1)] * 2, roundings=8)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_and_its_gradients_equal_pytorch_autograd(kind):
    import torch

    dy, gate, up = swiglu_arrays(0, 200, np.float64, scale=4)
    leaves = [torch.tensor(array, requires_grad=True) for array in (gate, up)]
    y = torch.nn.functional.silu(leaves[0]) * leaves[1]
    y.backward(torch.tensor(dy))
    actual = [*results(kind, swiglu_forward, gate, up), *results(kind, swiglu_backward, dy, gate, up)]
    for array, tensor in zip(actual, [y.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pullback_of_swiglu_equals_finite_differences(kind):
    kernels.use(kind)
    gradcheck(decoders.swiglu, *np.random.default_rng(3).standard_normal((2, 3, 5)))


def in_extended_precision(gate):
    """gate · σ(gate) and its slope."""
    wide = gate.astype(np.longdouble)
    sigmoid, rest = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
    return wide * sigmoid, sigmoid * (1 + wide * rest)


def gates(dtype):
    """Numbers for which exp(−|gate|) is normal."""
    rng, end = np.random.default_rng(4), 87 if dtype == np.float32 else 708
    return np.concatenate([rng.uniform(-end, end, 20_000), rng.uniform(-20, 20, 20_000)]).astype(dtype)


@needs_c
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_swiglu_in_c_is_within_5_units_in_the_last_place(dtype, unit):
    kernels.use("c")
    gate = gates(dtype)
    exact, _ = in_extended_precision(gate)
    error = np.abs(swiglu_forward(gate, np.ones_like(gate)) - exact) / np.spacing(np.abs(exact).astype(dtype))
    assert error.max() < 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_of_swiglu_is_within_2_roundings_of_1(kind, dtype):
    gate = gates(dtype)
    _, slope = in_extended_precision(gate)
    dgate, _ = results(kind, swiglu_backward, np.ones_like(gate), gate, np.ones_like(gate))
    assert np.abs(dgate - slope).max() < 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_of_large_gates_is_their_product_or_zero_and_so_is_its_slope(kind):
    gate = np.array([-3e38, -1e4, -200, 200, 1e4, 1e38], np.float32)
    up = np.full_like(gate, 2)
    kernels.use(kind)
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_array_equal(swiglu_forward(gate, up), 2 * np.maximum(gate, 0))
        dgate, dup = swiglu_backward(np.ones_like(gate), gate, up)
    np.testing.assert_array_equal(dgate, 2 * (gate > 0))
    np.testing.assert_array_equal(dup, np.maximum(gate, 0))


@needs_c
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinite_gates_nan_and_gates_with_denormal_results_give_what_numpy_gives(dtype, unit):
    gate = np.array([np.inf, -np.inf, np.nan, 1e-40, -1e-40, 0.0, -0.0, *np.linspace(-110, -85, 101)], dtype)
    gate = np.append(gate, np.linspace(-760, -690, 141).astype(dtype))
    # Products of denormal numbers lose digits alike, but not to the last bit.
    tolerance = {"rtol": 8 * np.finfo(dtype).eps, "atol": 800 * float(np.finfo(dtype).smallest_subnormal)}
    dy, up = np.ones_like(gate), np.full_like(gate, -1.5)
    with np.errstate(invalid="ignore"):
        expected, actual = (
            [*results(kind, swiglu_forward, gate, up), *results(kind, swiglu_backward, dy, gate, up)]
            for kind in ("numpy", "c")
        )
    for array, oracle in zip(actual, expected, strict=True):
        np.testing.assert_allclose(array, oracle, **tolerance)
    assert np.signbit(actual[0][5:7]).tolist() == [True, False]  # 0.0 and −0.0 times −1.5


# Rotary positions


@needs_c
@MANY
@given(
    seed=st.integers(0, 2**32 - 1), turns=st.sampled_from(TURNS), dtype=DTYPES, unit=st.sampled_from(VECTOR_UNITS),
    threads=st.sampled_from([1, 2, 5]),
)  # fmt: skip
def test_rotary_in_c_equals_the_oracle(seed, turns, dtype, unit, threads):
    if VECTOR_UNITS.index(unit) <= VECTOR_UNITS.index(best_unit()):
        kernels.c_extension().vector_unit(unit)
    use_threads(threads)
    arrays = rotary_arrays(seed, turns, dtype)
    expected, actual = (results(kind, rotary, *arrays) for kind in ("numpy", "c"))
    # A sum of two products: its rounding and those of the products, of which a fused addition saves one.
    assert_close(actual, expected, [2 * np.abs(arrays[0]).max(initial=1)], roundings=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_multiplies_each_pair_with_the_complex_number_of_its_row_and_angle(kind, dtype):
    x, cos, sin = rotary_arrays(0, (2, 5, 3, 19), dtype)
    (y,) = results(kind, rotary, x, cos, sin)
    for row in range(10):
        for head in range(3):
            expected = (x[row, head, 0] + 1j * x[row, head, 1]) * (cos[row % 5] + 1j * sin[row % 5])
            np.testing.assert_allclose(y[row, head, 0] + 1j * y[row, head, 1], expected, atol=20 * np.finfo(dtype).eps)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_rotary_in_pytorch_is_rotary_with_the_opposite_sines(kind):
    import torch

    x, cos, sin = rotary_arrays(1, (3, 4, 2, 11), np.float64)
    leaf, dy = torch.tensor(x, requires_grad=True), np.random.default_rng(2).standard_normal(x.shape)
    angles = torch.tensor((cos + 1j * sin).reshape(1, 4, 1, 11))
    turned = torch.complex(leaf[:, :, 0], leaf[:, :, 1]).reshape(3, 4, 2, 11) * angles
    torch.stack((turned.real, turned.imag), dim=3).reshape(x.shape).backward(torch.tensor(dy))
    np.testing.assert_allclose(results(kind, rotary, dy, cos, -sin)[0], leaf.grad.numpy(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("x", "angles"),
    {
        "triples": ((6, 2, 3, 4), 3), "single numbers": ((6, 2, 1, 4), 3), "none": ((6, 2, 0, 4), 3),
        "rows and a rest": ((7, 2, 2, 4), 3), "fewer rows than angles": ((2, 2, 2, 4), 3),
        "no angle": ((6, 2, 2, 4), 0), "neither a row nor an angle": ((0, 2, 2, 4), 0),
    }.values(),
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_refuses_what_is_not_pairs_or_no_whole_number_of_turns(kind, x, angles):
    kernels.use(kind)
    table = np.ones((angles, 4), np.float32)
    with pytest.raises(UserError, match=rf"it must be pairs, \(N, h, 2, d\), N a multiple of {angles}$"):
        rotary(np.ones(x, np.float32), table, table)


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_of_other_or_mixed_types_is_numpys(kind):
    half = rotary_arrays(2, (2, 3, 2, 5), np.float16)
    for types in (("e", "e", "e"), ("g", "g", "g"), ("f", "d", "d"), ("d", "f", "f"), (">f", ">f", ">f")):
        x, cos, sin = (array.astype(dtype) for array, dtype in zip(half, types, strict=True))
        (y,) = results(kind, rotary, x, cos, sin)
        assert y.dtype == x.dtype
        a, b, cos, sin = x[:, :, 0], x[:, :, 1], np.tile(cos, (2, 1))[:, None], np.tile(sin, (2, 1))[:, None]
        np.testing.assert_array_equal(y, np.stack((a * cos - b * sin, b * cos + a * sin), axis=2).astype(x.dtype))


# All of them


@needs_c
@pytest.mark.parametrize("with_bias", [False, True])
def test_results_do_not_depend_on_the_number_of_threads_by_a_bit(with_bias):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 2111, 70), dtype=np.float32)
    gain, bias = rng.standard_normal((2, 70), dtype=np.float32)
    norm = x, gain, bias if with_bias else None, 1e-5
    gated = x.reshape(-1), dy.reshape(-1)[::-1].copy()
    pairs, angles = x[:2000].reshape(2000, 7, 2, 5), dy[:100, :10].reshape(2, 100, 5)
    runs = []
    for threads in (1, 2, 3, 7):
        use_threads(threads)
        arrays = [*results("c", norm_forward, *norm), *results("c", norm_backward, dy, *norm)]
        arrays += [*results("c", swiglu_forward, *gated), *results("c", swiglu_backward, dy.reshape(-1), *gated)]
        runs.append([array.tobytes() for array in [*arrays, *results("c", rotary, pairs, *angles)]])
    assert len(runs[0]) == 7 + with_bias
    assert all(run == runs[0] for run in runs)


@needs_c
def test_arrays_that_are_not_contiguous_aligned_or_writable_give_the_same():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((6, 10))
    gain = np.frombuffer(b"\0" + np.ones(10).tobytes(), np.uint8)[1:].view(np.float64)
    gain.flags.writeable = False
    assert not gain.flags.aligned
    (expected,) = results("numpy", norm_forward, x, np.ones(10), None, 1e-5)
    (actual,) = results("c", norm_forward, np.asfortranarray(x), gain, None, 1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-14)
    (expected,) = results("numpy", swiglu_forward, x[:, 1].copy(), x[:, 2].copy())
    np.testing.assert_allclose(results("c", swiglu_forward, x[:, 1], x[:, 2])[0], expected, rtol=1e-14)
    pairs = np.asfortranarray(rng.standard_normal((6, 3, 2, 10)))
    (expected,) = results("numpy", rotary, pairs.copy(), np.tile(x[:3, :1], 10), np.ones((3, 10)))
    (actual,) = results("c", rotary, pairs, np.broadcast_to(x[:3, :1], (3, 10)), np.broadcast_to(gain, (3, 10)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)


X, D = np.ones((5, 4), np.float32), np.ones(4, np.float32)
PAIRS = np.ones((5, 3, 2, 4), np.float32)
REFUSED = {
    "gain": lambda: norm_forward(X, D[:3], None, 1e-5),
    "bias": lambda: norm_forward(X, D, D[:3], 1e-5),
    "dy": lambda: norm_backward(X[:4], X, D, None, 1e-5),
    "x": lambda: norm_forward(D, D, None, 1e-5),
    "up": lambda: swiglu_forward(D, D[:3]),
    "swiglu's dy": lambda: swiglu_backward(D[:3], D, D),
    "x without heads": lambda: rotary(PAIRS[:, 0], X, X),
    "cos": lambda: rotary(PAIRS, X[:, :3], X),
    "fewer sines than cosines": lambda: rotary(PAIRS, X, X[:1]),
    "integers to turn": lambda: rotary(PAIRS.astype(int), X, X),
    "complex sines": lambda: rotary(PAIRS, X, X.astype(complex)),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_an_array_of_another_shape_is_refused(kind, case):
    kernels.use(kind)
    with pytest.raises(UserError, match="must be an array of floating-point numbers"):
        REFUSED[case]()


OUT, TURNED = np.empty((5, 4), np.float32), np.empty(PAIRS.shape, np.float32)
REFUSED_BY_C = {
    "the first row before 0": (ValueError, "within 0 to 5", lambda c: c.norm_forward(X, D, None, 0.1, OUT, -1, 5)),
    "a row too many": (ValueError, "within 0 to 5", lambda c: c.norm_forward(X, D, None, 0.1, OUT, 0, 6)),
    "a part too many": (
        ValueError, "within 0 to 1", lambda c: c.norm_backward(X, X, D, None, 0.1, OUT, OUT[:1], None, 0, 2),
    ),
    "a bias without dbias": (
        TypeError, "both be arrays", lambda c: c.norm_backward(X, X, D, D, 0.1, OUT, OUT[:1], None, 0, 1),
    ),
    "dbias without a bias": (
        TypeError, "both be arrays", lambda c: c.norm_backward(X, X, D, None, 0.1, OUT, OUT[:1], OUT[1:2], 0, 1),
    ),
    "dbias of other parts": (
        ValueError, "dbias has size 2", lambda c: c.norm_backward(X, X, D, D, 0.1, OUT, OUT[:1], OUT[1:3], 0, 1),
    ),
    "a gain too short": (
        ValueError, "gain has size 3 along axis 0, not 4", lambda c: c.norm_forward(X, D[:3], None, 0.1, OUT, 0, 5),
    ),
    "a y of another type": (
        TypeError, "y must have the type of x", lambda c: c.norm_forward(X, D, None, 0.1, OUT.astype("d"), 0, 5),
    ),
    "integers": (TypeError, "gate must be float32", lambda c: c.swiglu_forward(*np.ones((3, 4), int), 0, 4)),
    "an up too short": (ValueError, "up has size 3", lambda c: c.swiglu_forward(D, D[:3], OUT[0], 0, 4)),
    "an entry too many": (
        ValueError, "within 0 to 4", lambda c: c.swiglu_backward(D, D, D, OUT[0], OUT[1], 3, 5),
    ),
    "triples to turn": (
        ValueError, "x has size 3 along axis 2", lambda c: c.rotary(PAIRS.reshape(5, 2, 3, 4), X, X, TURNED, 0, 5),
    ),
    "turned triples": (
        ValueError, "y has size 3 along axis 1, not 2", lambda c: c.rotary(PAIRS[:, :2].copy(), X, X, TURNED, 0, 5),
    ),
    "no angle": (ValueError, "cos and sin have no rows", lambda c: c.rotary(PAIRS, X[:0], X[:0], TURNED, 0, 5)),
    "a sine too few": (ValueError, "sin has size 4 along axis 0", lambda c: c.rotary(PAIRS, X, X[:4], TURNED, 0, 5)),
    "angles too short": (
        ValueError, "cos has size 3 along axis 1, not 4", lambda c: c.rotary(PAIRS, OUT[:, :3].copy(), X, TURNED, 0, 5),
    ),
    "a row to turn too many": (ValueError, "within 0 to 5", lambda c: c.rotary(PAIRS, X, X, TURNED, 0, 6)),
    "cosines of another type": (
        TypeError, "cos must have the type of x", lambda c: c.rotary(PAIRS, X.astype("d"), X, TURNED, 0, 5),
    ),
    "integers to turn": (
        TypeError, "x must be float32", lambda c: c.rotary(PAIRS.astype(int), X, X, TURNED, 0, 5),
    ),
}  # fmt: skip


@needs_c
@pytest.mark.parametrize("case", REFUSED_BY_C)
def test_the_c_functions_themselves_refuse_what_does_not_fit(case):
    error, message, call = REFUSED_BY_C[case]
    with pytest.raises(error, match=message):
        call(kernels.c_extension())


USES_A_DECODER = """
import sys
import numpy as np
from retro_np import generate, load_pretrained
from retro_np.nn.model import hidden_states
params, config, _ = load_pretrained(sys.argv[1])
tokens = np.arange(8)
hidden_states(params, config, tokens[None], None)
print(len(generate(params, config, tokens, 3)[0]), "numba" in sys.modules, "llvmlite" in sys.modules)
"""


@needs_c
def test_loading_a_decoder_and_decoding_import_no_numba(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    out, err, status = fresh_python(USES_A_DECODER.replace("sys.argv[1]", repr(str(folder))))
    assert (out, status) == ("3 False False", 0), err
