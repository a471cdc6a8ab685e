"""exact_search: NumPy against plain Python with exact small integers, and C against NumPy bit for bit."""

import contextlib
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXPECT_C

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import search, threads
from retro_np.kernels.search import exact_search

METHODS = {  # constants of retro_np/kernels/search.py that force one method of the C code, in small parts
    "few": {"MIN_SCREENED_QUERIES": 10**9, "KEYS_PER_JOB": 11},
    "crowded": {
        "MIN_SCREENED_QUERIES": 0,
        "MIN_KEYS_PER_SCREENED_NEIGHBOUR": 10**9,
        "KEYS_PER_JOB": 50,
        "QUERIES_PER_JOB": 2,
    },
    "screened": {
        "MIN_SCREENED_QUERIES": 0,
        "MIN_KEYS_PER_SCREENED_NEIGHBOUR": 1e-3,
        "MAX_PRODUCT_QUERIES": 3,
        "MAX_PRODUCT_KEYS": 66,
        "QUERIES_PER_JOB": 2,
    },
}
KINDS = ["numpy", "c"] if EXPECT_C else ["numpy"]


@st.composite
def problems(draw):
    """Queries, keys and k. Integers give ties and exact sums; with normal draws the order of a sum changes its bits."""
    n, m = draw(st.integers(0, 5)), draw(st.one_of(st.integers(0, 9), st.integers(60, 140)))
    d = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 40]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        queries, keys = rng.integers(-1, 2, (n, d)), rng.integers(-1, 2, (m, d))
    else:
        queries, keys = rng.normal(size=(n, d)), rng.normal(size=(m, d))
        keys[m // 2 :] = keys[: m - m // 2]  # each key twice, far apart
    return queries.astype(dtype), keys.astype(dtype), draw(st.sampled_from([1, 2, 7, 70, 200]))


def run(kind, *args):
    kernels.use(kind)
    return exact_search(*args)


@contextlib.contextmanager
def forced(method):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in METHODS[method].items():
            patch.setattr(search, name, value)
        yield


def needs_c():
    if EXPECT_C:
        return False
    with pytest.raises(UserError, match="C compiler"):
        kernels.use("c")
    return True


def by_sorting(queries, keys, k):
    """Plain Python: measure, sort by (distance, id), cut and pad. Exact for small integers."""
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


@settings(deadline=None)
@given(problem=problems(), cut=st.integers(0, 140))
def test_merged_lists_of_two_parts_are_the_lists_of_all_keys(problem, cut):
    queries, keys, k = problem
    cut = min(cut, len(keys))
    (ids, distances), rest = run("numpy", queries, keys[cut:], k), run("numpy", queries, keys[:cut], k)
    merged = search.merge_lists([(np.where(ids >= 0, ids + cut, -1), distances), rest], k)
    for array, expected in zip(merged, run("numpy", queries, keys, k), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_merged_lists_with_fewer_entries_than_k_end_in_missing_ones():
    lists = [(np.array([[7, 3]]), np.float32([[1, np.inf]])), (np.array([[5, -1]]), np.float32([[1, np.inf]]))]
    ids, distances = search.merge_lists(lists, 6)
    np.testing.assert_array_equal(ids, [[5, 7, 3, -1, -1, -1]])
    np.testing.assert_array_equal(distances, np.float32([[1, 1] + [np.inf] * 4]))
    assert distances.dtype == np.float32


def test_the_extension_is_built_unless_the_environment_says_otherwise():
    assert (kernels.c_extension() is not None) == EXPECT_C


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(problem=problems())
def test_ids_and_distances_equal_sorting_in_plain_python(kind, problem):
    queries, keys, k = problem
    ids, distances = run(kind, np.rint(queries), np.rint(keys), k)
    expected_ids, expected_distances = by_sorting(np.rint(queries), np.rint(keys), k)
    assert ids.dtype == np.int64
    assert distances.dtype == queries.dtype
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(distances, expected_distances)


@settings(deadline=None)
@given(problem=problems())
def test_distances_equal_plain_python_in_float64_up_to_rounding(problem):
    queries, keys, k = problem
    ids, distances = run("numpy", queries, keys, k)
    pairs = (
        keys[ids].astype(np.float64) - queries[:, None].astype(np.float64) if len(keys) else np.zeros((len(ids), k, 1))
    )
    expected = np.where(ids >= 0, np.sum(pairs**2, axis=-1), np.inf)
    # a sum of d ≤ 40 positive terms, each rounded three times: relative error below 50 ε
    np.testing.assert_allclose(distances, expected, rtol=50 * np.finfo(queries.dtype).eps, atol=0)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(problem=problems())
def test_c_equals_the_numpy_oracle_bit_for_bit(method, problem):
    if needs_c():
        return
    with forced(method):
        ids, distances = run("c", *problem)
    expected_ids, expected_distances = run("numpy", *problem)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(distances, expected_distances)


def hard(rng, n, d, dtype):
    """Named sets of vectors for which rounding, overflow and underflow are worst."""
    normal, small = rng.normal(size=(n, d)), rng.integers(-2, 3, (n, d))
    tiny, largest = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    return {
        "one vector": np.ones((n, d)),
        "zeros": np.zeros((n, d)),
        "near one another, far from the origin": 1000 + 1e-6 * normal,
        "ties far from the origin": 4096 + small / 2048,
        "in steps of the last bit": 1 + small * np.finfo(dtype).eps,
        "squares near the largest number": normal * np.sqrt(float(largest)) / 4,
        "squares beyond it": small * np.sqrt(float(largest)) * 2,
        "products beyond it that cancel": np.where(np.arange(d) % 2, -1, 1) * np.sqrt(float(largest)) + normal,
        "the largest numbers": np.sign(small) * float(largest),
        "a few too large": np.where(rng.random((n, 1)) < 0.2, 1e30, 1) * normal,
        "squares that underflow": normal * np.sqrt(float(np.finfo(dtype).tiny)),
        "denormals": small * float(tiny),
        "of every size": normal * 10.0 ** rng.integers(-30, 18, (n, 1)),
    }


HARD = list(hard(np.random.default_rng(0), 1, 1, np.float32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", HARD)
def test_c_equals_the_numpy_oracle_bit_for_bit_where_rounding_is_at_its_worst(case, dtype, method):
    if needs_c():
        return
    for d in (1, 17, 64):
        vectors = hard(np.random.default_rng(d), 150, d, dtype)[case].astype(dtype)
        queries, keys = vectors[:7], vectors[4:]  # three are keys themselves
        for k in (1, 6, 200):
            expected = run("numpy", queries, keys, k)
            for n_threads in (1, 2, 3):
                threads.use_threads(n_threads)
                with forced(method):
                    actual = run("c", queries, keys, k)
                for array, expected_array in zip(actual, expected, strict=True):
                    assert array.tobytes() == expected_array.tobytes()


@settings(deadline=None)
@given(case=st.sampled_from(HARD), d=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_no_distance_is_below_its_bound_however_the_product_was_rounded(case, d, seed):
    vectors = hard(np.random.default_rng(seed), 20, d, np.float32)[case].astype(np.float32)
    vectors = vectors[(vectors.astype(np.float64) ** 2).sum(axis=1) < 1e38]
    norms = search._lower_norms(vectors).astype(np.float64)
    lengths = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1))
    product = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    product -= d * 2.0**-24 * np.outer(lengths, lengths) + d * float(np.finfo(np.float32).tiny)  # the worst case
    bound = norms[:, None] - 2 * product + norms
    assert (search._distances(vectors[:, None], vectors[None]) >= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(problem=problems(), shift=st.integers(1, 70))
def test_a_distance_depends_on_neither_the_key_s_position_nor_the_query_s(kind, problem, shift):
    queries, keys, _ = problem
    k = max(1, len(keys))
    ids, distances = run(kind, queries, keys, k)
    rolled_ids, rolled = run(kind, queries[::-1], np.roll(keys, shift, axis=0), k)
    np.testing.assert_array_equal(rolled[::-1], distances)
    original_ids = np.where(rolled_ids[::-1] >= 0, (rolled_ids[::-1] - shift) % max(1, len(keys)), -1)
    np.testing.assert_array_equal(np.sort(original_ids, axis=1), np.sort(ids, axis=1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_keys_of_a_different_dtype_give_what_converted_keys_give(kind, dtype, method, monkeypatch):
    monkeypatch.setattr(search, "MAX_CONVERTED_KEYS", 7)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(3, 20)).astype(np.float32)
    keys = rng.integers(-2, 3, (50, 20)).astype(dtype)
    for k in (1, 9, 60):
        expected = run(kind, queries, keys.astype("f4"), k)
        with forced(method):
            actual = run(kind, queries, keys, k)
        for array, expected_array in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)


def test_keys_mapped_from_a_file_give_what_they_give_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(50, 20)).astype(np.float32), rng.normal(size=(400, 20)).astype(np.float32)
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    for array, expected_array in zip(exact_search(queries, mapped, 3), exact_search(queries, keys, 3), strict=True):
        np.testing.assert_array_equal(array, expected_array)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_are_not_contiguous_give_what_their_copies_give(kind):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(6, 40)), rng.normal(size=(90, 40))
    expected = run(kind, queries[::2, 1::3].copy(), keys[::-1, 1::3].copy(), 5)
    for actual, expected_array in zip(run(kind, queries[::2, 1::3], keys[::-1, 1::3], 5), expected, strict=True):
        np.testing.assert_array_equal(actual, expected_array)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distance_too_large_for_its_type_is_inf_and_keeps_its_id(kind):
    queries, keys = np.full((1, 2), 3e38, np.float32), np.float32([[-3e38, 0], [0, 3e38], [3e38, 3e38]])
    ids, distances = run(kind, queries, keys, 4)
    np.testing.assert_array_equal(ids, [[2, 0, 1, -1]])
    np.testing.assert_array_equal(distances, np.float32([[0, np.inf, np.inf, np.inf]]))


GOOD = np.zeros((2, 3), np.float32)
REFUSED = {
    "queries of one dimension": ((GOOD[0], GOOD, 1), "queries has shape"),
    "keys of three dimensions": ((GOOD, GOOD[None], 1), "keys has shape"),
    "queries of integers": ((GOOD.astype(int), GOOD, 1), "queries has shape .* and type int64"),
    "queries of float16": ((GOOD.astype(np.float16), GOOD, 1), "queries are float16"),
    "keys of integers": ((GOOD, GOOD.astype(int), 1), "keys has shape .* and type int64"),
    "widths that differ": ((GOOD, GOOD[:, :2], 1), "width 3 and keys 2"),
    "k of zero": ((GOOD, GOOD, 0), "k is 0"),
    "k that is not an integer": ((GOOD, GOOD, 1.5), "k is 1.5"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_the_error_for_an_unusable_argument_names_it(kind, case):
    arguments, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        run(kind, *arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["queries", "keys"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_entry_that_is_not_finite_is_refused_with_array_and_row(kind, bad, name, dtype, method, monkeypatch):
    monkeypatch.setattr(search, "MAX_CONVERTED_KEYS", 8)
    arrays = {"queries": np.zeros((30, 5), np.float32), "keys": np.zeros((30, 5), dtype)}
    arrays[name][[17, 21], 4] = bad
    with forced(method), pytest.raises(UserError, match=f"{name}: row 17 holds NaN or infinity"):
        run(kind, arrays["queries"], arrays["keys"], 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 60])
@pytest.mark.parametrize("bad", ["queries", "keys"])
def test_an_entry_that_is_not_finite_is_refused_even_with_nothing_to_compare_it_with(kind, count, bad):
    arrays = {"queries": np.zeros((0, 5)), "keys": np.zeros((0, 5))} | {bad: np.full((count, 5), np.nan)}
    with pytest.raises(UserError, match=f"{bad}: row 0 holds NaN"):
        run(kind, *arrays.values(), 2)


def lists(n, k, dtype=np.float32):
    return np.full((n, k), -1, np.int64), np.full((n, k), np.inf, dtype)


def call_c(name, **changed):
    """Call the C function with good arguments, except for the changed ones. Returns the lists."""
    ids, distances = lists(2, 2)
    arguments = {"queries": GOOD, "keys": np.zeros((4, 3), np.float32)}
    if name == "nearest_screened":
        arguments |= {"products": np.zeros((2, 4), np.float32)}
        arguments |= {"query_norms": np.zeros(2, np.float32), "key_norms": np.zeros(4, np.float32)}
    arguments |= {"first_id": 0, "ids": ids, "distances": distances} | changed
    getattr(kernels.c_extension(), name)(*arguments.values())
    return arguments["ids"], arguments["distances"]


def read_only(array):
    array.flags.writeable = False
    return array


BOTH = {
    "no buffer": ({"queries": [[1.0]]}, TypeError, "queries must be an array"),
    "one dimension": ({"keys": GOOD[0]}, ValueError, "keys must have two dimensions"),
    "float16": ({"queries": GOOD.astype(np.float16)}, TypeError, "queries must be float32 or float64"),
    "a foreign byte order": ({"queries": GOOD.astype(">f4")}, TypeError, "queries must be float32 or float64"),
    "types that differ": ({"keys": np.zeros((4, 3))}, TypeError, "keys must have the type of queries"),
    "distances of the wrong type": ({"distances": np.zeros((2, 2))}, TypeError, "distances must have the type"),
    "ids of four bytes": ({"ids": np.zeros((2, 2), np.int32)}, TypeError, "ids must be int64"),
    "ids without a sign": ({"ids": np.zeros((2, 2), np.uint64)}, TypeError, "ids must be int64"),
    "columns apart": ({"keys": np.zeros((4, 6), np.float32)[:, ::2]}, ValueError, "keys must be C-contiguous"),
    "Fortran's order": ({"ids": np.zeros((2, 2), np.int64, "F")}, ValueError, "ids must be C-contiguous"),
    "widths that differ": ({"keys": np.zeros((4, 2), np.float32)}, ValueError, "keys must have 3 columns"),
    "too few rows of ids": ({"ids": np.zeros((1, 2), np.int64)}, ValueError, "ids must have 2 rows"),
    "too few columns of distances": (
        {"distances": np.zeros((2, 1), "f4")},
        ValueError,
        "distances must have 2 columns",
    ),
    "lists without columns": (dict(zip(("ids", "distances"), lists(2, 0), strict=True)), ValueError, "ids must have k"),
    "ids that are read-only": ({"ids": read_only(np.zeros((2, 2), np.int64))}, ValueError, "ids is read-only"),
    "distances that are": ({"distances": read_only(np.zeros((2, 2), "f4"))}, ValueError, "distances is read-only"),
    "an id below zero": ({"first_id": -1}, ValueError, "first_id must leave"),
    "ids beyond a word": ({"first_id": 2**63 - 3}, ValueError, "first_id must leave"),
    "a first id beyond one": ({"first_id": 2**70}, ValueError, "first_id must leave"),
    "a first id that is not an integer": ({"first_id": 2.0}, TypeError, "first_id must be an integer"),
    "a misaligned matrix": (
        {"queries": np.frombuffer(bytes(25), np.uint8)[1:].view(np.float32).reshape(2, 3)},
        ValueError,
        "queries must be aligned",
    ),
}
C_REFUSED = {(function, case): BOTH[case] for function in ("nearest", "nearest_screened") for case in BOTH}
C_REFUSED |= {
    ("nearest", "NaN"): ({"keys": np.float32([[0] * 3, [0, np.nan, 0]])}, ValueError, "keys: row 1 holds NaN"),
    ("nearest", "inf"): ({"queries": np.float32([[np.inf, 0, 0], [0] * 3])}, ValueError, "queries: row 0 holds NaN"),
}
C_REFUSED |= {
    ("nearest_screened", f"{name}: {message}"): ({name: array}, error, f"{name} {message}")
    for name, array, error, message in [
        ("products", np.zeros((2, 3), np.float32), ValueError, "must have 4 columns"),
        ("products", np.zeros((1, 4), np.float32), ValueError, "must have 2 rows"),
        ("products", np.zeros((2, 4)), TypeError, "must have the type of queries"),
        ("products", np.zeros((2, 8), np.float32)[:, ::2], ValueError, "must be C-contiguous"),
        ("query_norms", np.zeros(3, np.float32), ValueError, "must have 2 entries"),
        ("query_norms", np.zeros((2, 1), np.float32), ValueError, "must have one dimension"),
        ("key_norms", np.zeros(3, np.float32), ValueError, "must have 4 entries"),
        ("key_norms", np.zeros(4, np.int64), TypeError, "must have the type of queries"),
        ("key_norms", None, TypeError, "must be an array"),
    ]
}


@pytest.mark.parametrize(("function", "case"), C_REFUSED)
def test_the_c_function_itself_refuses_wrong_arguments(function, case):
    changed, error, message = C_REFUSED[function, case]
    if needs_c():
        return
    call_c(function)  # the arguments that are not changed are good
    with pytest.raises(error, match=message):
        call_c(function, **changed)


def test_keys_that_the_products_exclude_are_not_measured_and_the_other_keys_are():
    if needs_c():
        return
    keys = np.float32([[3, 0, 0], [1, 0, 0], [0, 0, 0], [2, 0, 0]])
    norms = np.float32([-np.inf, 1, 10, 4])  # the third is wrong on purpose, so its key is excluded
    ids, distances = call_c("nearest_screened", keys=keys, key_norms=norms, first_id=10)
    np.testing.assert_array_equal(ids, [[11, 13]] * 2)
    np.testing.assert_array_equal(distances, np.float32([[1, 4]] * 2))


def test_a_long_search_in_c_lets_other_threads_run_and_can_be_interrupted():
    if needs_c():
        return
    queries, keys = np.zeros((100_000, 64), np.float32), np.zeros((40_000, 64), np.float32)  # 20 s of work
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])  # runs only where the GIL is free
    start = time.perf_counter()
    kernels.use("c")  # before the timer: without C nothing would catch its signal
    old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            exact_search(queries, keys, 1)
    finally:
        signal.signal(signal.SIGINT, old_handler)
    assert time.perf_counter() - start < 5
