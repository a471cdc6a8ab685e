"""exact_search: NumPy against plain Python with exact arithmetic of small integers, C against NumPy to the bit."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import search
from retro_np.kernels.search import exact_search

EXPECT_C = os.environ.get("RETRO_NP_EXPECT_C") != "0"
KINDS = ["numpy", "c"] if EXPECT_C else ["numpy"]


@pytest.fixture(autouse=True)
def _choice_is_put_back():
    before = kernels.using()
    yield
    kernels.use(before)


@st.composite
def problems(draw):
    """Queries, keys and k. Integers make ties and exact sums; in normal draws the order of a sum shows in its bits."""
    n, m = draw(st.integers(0, 5)), draw(st.one_of(st.integers(0, 9), st.integers(60, 140)))
    d = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 40]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        queries, keys = rng.integers(-1, 2, (n, d)), rng.integers(-1, 2, (m, d))
    else:
        queries, keys = rng.normal(size=(n, d)), rng.normal(size=(m, d))
        keys[m // 2 :] = keys[: m - m // 2]  # each twice, far apart
    return queries.astype(dtype), keys.astype(dtype), draw(st.sampled_from([1, 2, 7, 70, 200]))


def run(kind, *args):
    kernels.use(kind)
    return exact_search(*args)


def by_sorting(queries, keys, k):
    """Plain Python: measure, sort by (distance, id), cut and fill up. Exact for small integers."""
    ids, distances = [], []
    for query in queries.tolist():
        pairs = sorted(
            (sum((a - b) ** 2 for a, b in zip(query, key, strict=True)), j) for j, key in enumerate(keys.tolist())
        )
        pairs = (pairs + [(np.inf, -1)] * k)[:k]
        distances.append([distance for distance, _ in pairs])
        ids.append([j for _, j in pairs])
    shape = (len(queries), k)
    return np.array(ids, np.int64).reshape(shape), np.array(distances, queries.dtype).reshape(shape)


def test_the_extension_is_built_unless_the_environment_says_otherwise():
    assert (kernels.c_extension() is not None) == EXPECT_C


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(problem=problems())
def test_ids_and_distances_are_those_of_sorting_in_plain_python(kind, problem):
    queries, keys, k = problem
    ids, distances = run(kind, np.rint(queries), np.rint(keys), k)
    expected_ids, expected_distances = by_sorting(np.rint(queries), np.rint(keys), k)
    assert ids.dtype == np.int64
    assert distances.dtype == queries.dtype
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(distances, expected_distances)


@settings(deadline=None)
@given(problem=problems())
def test_distances_are_those_of_plain_python_in_float64_up_to_rounding(problem):
    queries, keys, k = problem
    ids, distances = run("numpy", queries, keys, k)
    pairs = (
        keys[ids].astype(np.float64) - queries[:, None].astype(np.float64) if len(keys) else np.zeros((len(ids), k, 1))
    )
    expected = np.where(ids >= 0, np.sum(pairs**2, axis=-1), np.inf)
    # a sum of d ≤ 40 positive terms, each rounded three times: relative error below 50 ε
    np.testing.assert_allclose(distances, expected, rtol=50 * np.finfo(queries.dtype).eps, atol=0)


@settings(deadline=None)
@given(problem=problems())
def test_c_equals_the_numpy_oracle_to_the_bit(problem):
    if not EXPECT_C:
        with pytest.raises(UserError, match="C compiler"):
            kernels.use("c")
        return
    ids, distances = run("c", *problem)
    expected_ids, expected_distances = run("numpy", *problem)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(distances, expected_distances)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(problem=problems(), shift=st.integers(1, 70))
def test_a_distance_depends_on_neither_the_key_s_position_nor_the_query_s(kind, problem, shift):
    queries, keys, _ = problem
    k = max(1, len(keys))
    ids, distances = run(kind, queries, keys, k)
    rolled_ids, rolled = run(kind, queries[::-1], np.roll(keys, shift, axis=0), k)
    np.testing.assert_array_equal(rolled[::-1], distances)
    back = np.where(rolled_ids[::-1] >= 0, (rolled_ids[::-1] - shift) % max(1, len(keys)), -1)
    np.testing.assert_array_equal(np.sort(back, axis=1), np.sort(ids, axis=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_keys_of_another_dtype_give_what_converted_keys_give(kind, dtype, monkeypatch):
    monkeypatch.setattr(search, "CONVERTED_KEYS", 7)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(3, 20)).astype(np.float32)
    keys = rng.integers(-2, 3, (50, 20)).astype(dtype)
    for k in (1, 9, 60):
        for found, expected in zip(run(kind, queries, keys, k), run(kind, queries, keys.astype("f4"), k), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_are_not_contiguous_give_what_their_copies_give(kind):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(6, 40)), rng.normal(size=(90, 40))
    expected = run(kind, queries[::2, 1::3].copy(), keys[::-1, 1::3].copy(), 5)
    for found, wanted in zip(run(kind, queries[::2, 1::3], keys[::-1, 1::3], 5), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distance_too_large_for_its_type_is_inf_and_keeps_its_id(kind):
    queries, keys = np.full((1, 2), 3e38, np.float32), np.float32([[-3e38, 0], [0, 3e38], [3e38, 3e38]])
    ids, distances = run(kind, queries, keys, 4)
    np.testing.assert_array_equal(ids, [[2, 0, 1, -1]])
    np.testing.assert_array_equal(distances, np.float32([[0, np.inf, np.inf, np.inf]]))


GOOD = np.zeros((2, 3), np.float32)
REFUSED = {
    "queries of one dimension": ((GOOD[0], GOOD, 1), "queries have shape"),
    "keys of three dimensions": ((GOOD, GOOD[None], 1), "keys have shape"),
    "queries of integers": ((GOOD.astype(int), GOOD, 1), "queries are int64"),
    "queries of float16": ((GOOD.astype(np.float16), GOOD, 1), "queries are float16"),
    "keys of integers": ((GOOD, GOOD.astype(int), 1), "keys are int64"),
    "widths that differ": ((GOOD, GOOD[:, :2], 1), "width 3 and keys 2"),
    "k of zero": ((GOOD, GOOD, 0), "k is 0"),
    "k that is no integer": ((GOOD, GOOD, 1.5), "k is 1.5"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_search_can_use_is_refused_by_name(kind, case):
    arguments, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        run(kind, *arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["queries", "keys"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_entry_that_is_not_finite_is_refused_with_array_and_row(kind, bad, name, dtype, monkeypatch):
    monkeypatch.setattr(search, "CONVERTED_KEYS", 8)
    arrays = {"queries": np.zeros((30, 5), np.float32), "keys": np.zeros((30, 5), dtype)}
    arrays[name][[17, 21], 4] = bad
    with pytest.raises(UserError, match=f"{name}: row 17 holds NaN or infinity"):
        run(kind, arrays["queries"], arrays["keys"], 2)


def call_c(**changed):
    """The C function itself, with good arguments but those changed."""
    arguments = {"queries": GOOD, "keys": np.zeros((4, 3), np.float32), "k": 2}
    arguments |= {"ids": np.zeros((2, 2), np.int64), "distances": np.zeros((2, 2), np.float32)} | changed
    return kernels.c_extension().nearest(*arguments.values())


def read_only(array):
    array.flags.writeable = False
    return array


C_REFUSED = {
    "no buffer": ({"queries": [[1.0]]}, TypeError, "queries must be an array"),
    "one dimension": ({"keys": GOOD[0]}, ValueError, "keys must have two dimensions"),
    "float16": ({"queries": GOOD.astype(np.float16)}, TypeError, "queries must be float32 or float64"),
    "a foreign byte order": ({"queries": GOOD.astype(">f4")}, TypeError, "queries must be float32 or float64"),
    "types that differ": ({"keys": GOOD.astype(np.float64)}, TypeError, "keys must have the type of queries"),
    "distances of another type": ({"distances": np.zeros((2, 2))}, TypeError, "distances must have the type"),
    "ids of four bytes": ({"ids": np.zeros((2, 2), np.int32)}, TypeError, "ids must be int64"),
    "ids without a sign": ({"ids": np.zeros((2, 2), np.uint64)}, TypeError, "ids must be int64"),
    "columns apart": ({"keys": np.zeros((4, 6), np.float32)[:, ::2]}, ValueError, "keys must be C-contiguous"),
    "Fortran's order": ({"ids": np.zeros((2, 2), np.int64, "F")}, ValueError, "ids must be C-contiguous"),
    "widths that differ": ({"keys": np.zeros((4, 2), np.float32)}, ValueError, "keys have 2 columns and queries 3"),
    "too few rows of ids": ({"ids": np.zeros((1, 2), np.int64)}, ValueError, r"ids must be \(2, 2\)"),
    "too few columns of distances": ({"distances": np.zeros((2, 1), "f4")}, ValueError, r"distances must be \(2, 2\)"),
    "ids that are read-only": ({"ids": read_only(np.zeros((2, 2), np.int64))}, ValueError, "ids is read-only"),
    "bytes as distances": ({"distances": read_only(np.zeros((2, 2), "f4"))}, ValueError, "distances is read-only"),
    "k of zero": ({"k": 0}, ValueError, "k must be at least 1"),
    "k that is no integer": ({"k": 2.0}, TypeError, "k must be an integer"),
    "k beyond a word": ({"k": 2**70}, ValueError, "ids must be"),
    "a misaligned matrix": (
        {"queries": np.frombuffer(bytes(25), np.uint8)[1:].view(np.float32).reshape(2, 3)},
        ValueError,
        "queries must be aligned",
    ),
    "NaN in keys": ({"keys": np.float32([[0, 0, 0], [0, np.nan, 0]])}, ValueError, "keys: row 1 holds NaN"),
    "inf in queries": ({"queries": np.float32([[np.inf, 0, 0], [0, 0, 0]])}, ValueError, "queries: row 0 holds NaN"),
}


@pytest.mark.parametrize("case", C_REFUSED)
def test_the_c_function_refuses_it_by_itself(case):
    changed, error, message = C_REFUSED[case]
    if not EXPECT_C:
        with pytest.raises(UserError, match="C compiler"):
            kernels.use("c")
        return
    call_c()  # the arguments that are not changed are good
    with pytest.raises(error, match=message):
        call_c(**changed)


def test_a_long_search_in_c_lets_other_threads_run_and_hears_ctrl_c():
    if not EXPECT_C:
        with pytest.raises(UserError, match="C compiler"):
            kernels.use("c")
        return
    queries, keys = np.zeros((100_000, 64), np.float32), np.zeros((40_000, 64), np.float32)  # 20 s of work
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])  # runs only where the GIL is free
    start = time.perf_counter()
    kernels.use("c")  # before the timer: without C nothing would catch its signal
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        exact_search(queries, keys, 1)
    assert time.perf_counter() - start < 5
