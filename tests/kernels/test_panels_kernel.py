"""The product with a prepacked matrix: C against NumPy on each vector unit; refused arguments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY
from support import VECTOR_UNITS, needs_c

from retro_np import kernels
from retro_np.kernels.panels import prepack, prepacked_matmul
from retro_np.kernels.threads import use_threads


@needs_c
@pytest.mark.parametrize("unit", VECTOR_UNITS)
@MANY
@given(
    rows=st.sampled_from([0, 1, 3, 4, 7, 51, 160, 161]),
    depth=st.sampled_from([0, 1, 5, 64, 130]),
    width=st.sampled_from([1, 63, 64, 128, 192]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_each_vector_unit_equals_numpy_with_any_number_of_threads(unit, rows, depth, width, dtype):
    extension = kernels.c_extension()
    best = extension.vector_unit()
    if VECTOR_UNITS.index(unit) > VECTOR_UNITS.index(best):
        pytest.skip("not on this processor")
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((rows, depth)).astype(dtype), rng.standard_normal((depth, width)).astype(dtype)
    kernels.use("numpy")
    expected = prepacked_matmul(x, prepack(matrix))
    kernels.use("c")
    try:
        extension.vector_unit(unit)
        products = []
        for threads in (1, 3):
            use_threads(threads)
            products.append(prepacked_matmul(x[::1], prepack(np.asfortranarray(matrix))))
    finally:
        extension.vector_unit(best)
    assert products[0].tobytes() == products[1].tobytes()
    assert products[0].dtype == dtype
    np.testing.assert_allclose(products[0], expected, atol=200 * np.finfo(dtype).eps * max(1, depth) ** 0.5)


def call(**changes):
    arguments = {
        "x": np.zeros((3, 5)),
        "panels": np.zeros((2, 5, 64)),
        "out": np.zeros((3, 128)),
        "first": 0,
        "last": 2,
    }
    kernels.c_extension().multiply_panels(*(arguments | changes).values())


@needs_c
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be an array"),
        ({"x": np.zeros((3, 5), int)}, TypeError, "x must be float32 or float64"),
        ({"x": np.zeros((5, 3)).T}, ValueError, "x must be C-contiguous"),
        ({"panels": np.zeros((2, 5, 64), np.float32)}, TypeError, "panels must have the type of x"),
        ({"panels": np.zeros((2, 4, 64))}, ValueError, "panels must be \\(P, 5, 64\\)"),
        ({"panels": np.zeros((2, 5, 32))}, ValueError, "panels must be \\(P, 5, 64\\)"),
        ({"out": np.zeros((3, 127))}, ValueError, "out must be \\(3, 128\\)"),
        ({"out": np.zeros((3, 128), np.float32)}, TypeError, "out must have the type of x"),
        ({"out": np.broadcast_to(np.zeros(128), (3, 128))}, ValueError, "out must be C-contiguous"),
        ({"last": 3}, ValueError, "panels 0 to 3 are not within 0 to 2"),
        ({"first": -1}, ValueError, "panels -1 to 2 are not within 0 to 2"),
    ],
)
def test_the_error_of_the_c_function_for_a_wrong_argument_names_it(changes, error, words):
    call()
    with pytest.raises(error, match=words):
        call(**changes)
