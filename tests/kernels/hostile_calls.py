"""Calls of the kernels with hostile arguments: odd shapes, strides, dtypes, objects, counts and numbers.

`hostile_call(rng)` makes one call and returns how it ended. It raises AssertionError if the call neither refuses its
arguments nor gives what NumPy gives. Run as a program, `python tests/kernels/hostile_calls.py CALLS [SEED [KINDS]]`
makes many calls, prints how they ended, and exits with status 1 if one was at fault; `.ci/run` does so under the
sanitizers.
"""

import sys
from collections import Counter

import numpy as np

from retro_np import kernels
from retro_np.kernels import attention, bert, decoders, hashing, panels, rowwise, search, substring

# MemoryError: a size that is possible but larger than this machine.
REFUSALS = (ValueError, TypeError, BufferError, OverflowError, MemoryError)
NUMBERS = (
    0, -1, 1, 2, 3, 7, 300, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**63, 10**30, -(10**30), 1.5, float("nan"),
    float("inf"), -0.0, 1e-320, True, None, "3", b"", (), [1], np.int8(3), np.uint64(2**64 - 1), np.float32(2), object,
)  # fmt: skip
# Numbers of entries to allocate, without those that might just fit, because they would take the memory.
COUNTS = tuple(n for n in NUMBERS if not isinstance(n, int) or abs(n) < 400 or abs(n) > 2**60)
OBJECTS = (None, 3, 1.5, "array", b"bytes", bytearray(64), [], [[1.0]], {}, object(), np.float32(1), np.empty(0, "S3"))
DTYPES = ("f2", "f4", "f8", "g", ">f4", ">f8", "c8", "i1", "u8", "i8", ">i8", "?", "O", "U3", "M8[s]", "i4,f4")


@np.errstate(all="ignore")
def hostile_array(rng, array):
    """The array, changed in one way that its kernel may not expect."""
    change = rng.integers(12)
    axis = int(rng.integers(max(1, array.ndim)))
    if change == 0:
        return OBJECTS[rng.integers(len(OBJECTS))]
    if change == 1:
        return array.astype(DTYPES[rng.integers(len(DTYPES))]) if array.dtype.kind in "fiub" else array
    if change == 2:
        read_only = array.copy()
        read_only.flags.writeable = False
        return read_only
    if change == 3 and not array.dtype.hasobject:  # not aligned
        memory = np.zeros(array.nbytes + 1, np.uint8)
        shifted = memory[1:].view(array.dtype).reshape(array.shape)
        shifted[...] = array
        return shifted
    if change == 4 and array.ndim:
        return np.repeat(array, 2, axis=axis)[tuple([slice(None)] * axis + [slice(None, None, 2)])]
    if change == 5:
        return np.asfortranarray(array)
    if change == 6 and array.ndim:
        return np.flip(np.ascontiguousarray(np.flip(array, axis)), axis)
    if change == 7 and array.ndim:  # one entry too many or too few along an axis, or none
        size = max(0, array.shape[axis] + int(rng.choice([-1, 1, -array.shape[axis], 5])))
        return np.resize(array, (*array.shape[:axis], size, *array.shape[axis + 1 :]))
    if change == 8:
        return array[None] if rng.integers(2) or not array.ndim else array[0] if len(array) else array.reshape(-1)
    if change == 9 and array.ndim:
        return np.broadcast_to(array[:1], array.shape) if len(array) else array.T
    if change == 10:
        return memoryview(np.ascontiguousarray(array)) if array.dtype.kind in "fiub" else array.tolist()
    return array.T


def hostile(rng, arguments, counts=()):
    """Arguments of which up to three are changed. counts: positions of numbers that are sizes."""
    arguments = list(arguments)
    for _ in range(rng.integers(4)):
        i = int(rng.integers(len(arguments)))
        if isinstance(arguments[i], np.ndarray) and rng.integers(8):
            arguments[i] = hostile_array(rng, arguments[i])
        else:
            numbers = COUNTS if i in counts else NUMBERS
            arguments[i] = numbers[rng.integers(len(numbers))]
    if rng.integers(50) == 0:
        arguments = arguments[:-1] if rng.integers(2) else [*arguments, None]
    return arguments


def attention_arguments(rng, dtype):
    """q, keys, values, table, u, v, causal_offset and key_mask of small attentions of every kind."""
    batch, g, n, k, r = map(int, rng.integers(0, (4, 3, 40, 3, 20)))
    h, c = map(int, rng.integers(1, (3, 9)))

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    q, keys, values = normal(batch, g, n, h, c), normal(batch, k, r, h, c), normal(batch, k, r, h, c)
    positions = (normal(max(0, n + r - 1), h, c), normal(h, c), normal(h, c)) if rng.integers(2) else (None,) * 3
    offset = None
    if rng.integers(2):
        offset = int(rng.choice([0, 1, -1, n, r, -n, 2**63 - 1, 2**63 - 2, -(2**63), -(2**63) + 1, 2**31, -(2**31)]))
    mask = rng.integers(0, 2, (batch, k, r)).astype(bool) if rng.integers(2) else None
    return q, keys, values, *positions, offset, mask


def public_call(rng):
    """A kernel, its arguments, and whether the kernel changes its first arguments in place."""
    dtype = rng.choice(["f4", "f8"])

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    n, d = int(rng.integers(0, 40)), int(rng.integers(1, 20))
    name = rng.choice(sorted(CALLS))
    function, counts, changed, arguments = CALLS[name](rng, normal, n, d)
    return name, function, hostile(rng, arguments, counts), changed


def _attention_forward(rng, normal, n, d):
    *arrays, offset, mask = attention_arguments(rng, normal(1).dtype)

    def call(q, keys, values, table, u, v, causal_offset, key_mask):
        return attention.attention_forward(q, keys, values, table, u, v, causal_offset=causal_offset, key_mask=key_mask)

    return call, (), 0, (*arrays, offset, mask)


def _attention_backward(rng, normal, n, d):
    *arrays, offset, mask = attention_arguments(rng, normal(1).dtype)
    _, lse = attention._forward_numpy(*arrays, causal_offset=offset, key_mask=mask)
    dlse = normal(*lse.shape) if rng.integers(2) else None
    arguments = normal(*arrays[0].shape), lse, *arrays, offset, mask, dlse

    def call(dout, lse, q, keys, values, table, u, v, causal_offset, key_mask, dlse):
        others = {"causal_offset": causal_offset, "key_mask": key_mask, "dlse": dlse}
        return attention.attention_backward(dout, lse, q, keys, values, table, u, v, **others)

    return call, (), 0, arguments


def _adamw_step(rng, normal, n, d):
    def call(p, g, m, v, lr, beta, eps, decay, step):
        return rowwise.adamw_step(p, g, m, v, lr=lr, betas=(beta, beta), eps=eps, decay=decay, step=step)

    return call, (), 4, (normal(n, d), normal(n, d), normal(n, d), normal(n, d) ** 2, 1e-2, 0.9, 1e-8, 0.1, 3)


def _search(rng, normal, n, d):
    return search.exact_search, (2,), 0, (normal(n, d), normal(int(rng.integers(0, 200)), d), int(rng.integers(1, 9)))


def _count(rng, normal, n, d):
    return hashing.count_features, (), 2, (rng.integers(0, 9, (n, d)), np.zeros(hashing.BUCKETS, np.uint32))


def _project(rng, normal, n, d):
    weights = rng.integers(0, 9, hashing.BUCKETS, dtype=np.int32)
    return hashing.project_features, (2,), 0, (rng.integers(0, 9, (n % 8, d)), weights, int(rng.integers(1, 99)))


def _rotary(rng, normal, n, d):
    angles, heads = int(rng.integers(0, 5)), int(rng.integers(0, 4))
    return decoders.rotary, (), 0, (normal(angles * (n % 7), heads, 2, d), normal(angles, d), normal(angles, d))


def _panels(rng, normal, n, d):
    matrix = normal(d, int(rng.choice([0, 3, 64, 128])))
    return lambda x, w: panels.prepacked_matmul(x, panels.prepack(w)), (), 0, (normal(n, d), matrix)


CALLS = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "rms_norm_forward": lambda rng, normal, n, d: (rowwise.rms_norm_forward, (), 0, (normal(n, d), normal(d), 1e-6)),
    "rms_norm_backward": lambda rng, normal, n, d: (
        rowwise.rms_norm_backward, (), 0, (normal(n, d), normal(n, d), normal(d), normal(n) ** 2),
    ),
    "gelu_forward": lambda rng, normal, n, d: (rowwise.gelu_forward, (), 0, (normal(n),)),
    "gelu_backward": lambda rng, normal, n, d: (rowwise.gelu_backward, (), 0, (normal(n), normal(n))),
    "norm_forward": lambda rng, normal, n, d: (
        decoders.norm_forward, (), 0, (normal(n, d), normal(d), rng.choice([None, 1]) and normal(d), 1e-5),
    ),
    "norm_backward": lambda rng, normal, n, d: (
        decoders.norm_backward, (), 0,
        (normal(n, d), normal(n, d), normal(d), rng.choice([None, 1]) and normal(d), 1e-5),
    ),
    "swiglu_forward": lambda rng, normal, n, d: (decoders.swiglu_forward, (), 0, (normal(n), normal(n))),
    "swiglu_backward": lambda rng, normal, n, d: (decoders.swiglu_backward, (), 0, (normal(n), normal(n), normal(n))),
    "rotary": _rotary,
    "scatter_add": lambda rng, normal, n, d: (rowwise.scatter_add, (2,), 0, (normal(n, d), rng.integers(0, 7, n), 7)),
    "adamw_step": _adamw_step,
    "add_layer_norm": lambda rng, normal, n, d: (
        bert.add_layer_norm, (), 1, (normal(n, d), normal(d), normal(n, d), normal(d), normal(d), 1e-6),
    ),
    "add_gelu_erf": lambda rng, normal, n, d: (
        bert.add_gelu_erf, (), 1, (normal(n, d).astype("f4"), normal(d).astype("f4")),
    ),
    "exact_search": _search,
    "count_features": _count,
    "project_features": _project,
    "prepacked_matmul": _panels,
    "longest_common_substring": lambda rng, normal, n, d: (
        substring.longest_common_substring, (), 0, (rng.integers(0, 4, (n, d)), rng.integers(0, 4, (n, 2, 7))),
    ),
}  # fmt: skip


def copied(argument):
    """A copy of an argument that has the same strides, alignment and flags."""
    if not isinstance(argument, np.ndarray) or argument.dtype.hasobject or not argument.flags.writeable:
        return argument
    copy = np.empty_like(argument)
    if not argument.flags.aligned:
        copy = np.zeros(argument.nbytes + 1, np.uint8)[1:].view(argument.dtype).reshape(argument.shape)
    copy[...] = argument
    return copy


def outcome_of(function, arguments, changed):
    """("refused", the exception), or ("returned", the results and the arguments that were changed)."""
    arguments = [copied(argument) for argument in arguments]
    try:
        with np.errstate(all="ignore"):
            result = function(*arguments)
    except REFUSALS as error:
        return "refused", error
    results = list(result) if isinstance(result, tuple) else [result]
    return "returned", [*results, *(a for a in arguments[:changed] if isinstance(a, np.ndarray))]


def assert_equal_to_numpy(results, expected, where):
    """Raise AssertionError unless the results are NumPy's, up to the rounding of their dtype."""
    assert len(results) == len(expected), where
    for result, right in zip(results, expected, strict=True):
        assert (result is None) == (right is None), where
        if right is None:
            continue
        result, right = np.asarray(result), np.asarray(right)
        assert (result.shape, result.dtype) == (right.shape, right.dtype), (where, result.dtype, right.dtype)
        if right.dtype.kind in "fc":
            tolerance = 2e-3 if right.dtype.itemsize <= 4 else 1e-9
            np.testing.assert_allclose(result, right, rtol=tolerance, atol=tolerance, err_msg=str(where))
        else:
            np.testing.assert_array_equal(result, right, err_msg=str(where))


def described(argument):
    """A short description of an argument, for a message."""
    if isinstance(argument, np.ndarray):
        return f"{argument.dtype}{argument.shape}"
    return f"{type(argument).__name__}({argument!r:.40})"


def hostile_call(rng: np.random.Generator, kinds: tuple[str, ...] = ("c", "numba")) -> str:
    """Make one call with hostile arguments, of a public kernel or of the C module. Returns how it ended.

    Raises AssertionError if the result is not NumPy's, and whatever a call raises that is not a refusal.
    """
    if "c" in kinds and rng.integers(2):
        return hostile_call_of_c(rng)
    name, function, arguments, changed = public_call(rng)
    where = f"{name}({', '.join(map(described, arguments))})"
    before = kernels.using()
    try:
        kernels.use("numpy")
        how, expected = outcome_of(function, arguments, changed)
        for kind in kinds:
            kernels.use(kind)
            other, results = outcome_of(function, arguments, changed)
            assert not (how == "refused" and other == "returned"), (kind, where, expected)
            if how == other == "returned":
                assert_equal_to_numpy(results, expected, (kind, where))
    except Exception as error:
        error.add_note(where)
        raise
    finally:
        kernels.use(before)
    return how if how == "returned" else f"refused: {type(expected).__name__}"


def hostile_call_of_c(rng):
    """Call a function of the C module directly. What it accepts must equal NumPy's result."""
    module, dtype = kernels.c_extension(), rng.choice(["f4", "f8"])
    names = "nearest", "nearest_screened", "attention_forward", "attention_backward", "multiply_panels", "decoders"
    name = rng.choice(names)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    n, d, m, k = (int(rng.integers(low, high)) for low, high in ((0, 9), (1, 20), (0, 90), (1, 5)))
    if name.startswith("nearest"):
        queries, keys = normal(n, d), normal(m, d)
        lists = np.full((n, k), -1, np.int64), np.full((n, k), np.inf, dtype)
        screens = (queries @ keys.T, search._lower_norms(queries), search._lower_norms(keys))
        arguments = (queries, keys, *(screens if name == "nearest_screened" else ()), 0, *lists)
    elif name == "multiply_panels":
        w = normal(d, 64 * int(rng.integers(0, 3)))
        packed = w.reshape(d, w.shape[1] // 64, 64).swapaxes(0, 1).copy()
        arguments = normal(n, d), packed, np.zeros((n, w.shape[1]), dtype), 0, len(packed)
    elif name == "decoders":
        name, arguments = _decoder_arguments(rng, normal, m, d, k)
    else:
        q, keys, values, table, u, v, offset, mask = attention_arguments(rng, dtype)
        (batch, g, n, h, _), parts = q.shape, min(8, len(q))
        out, lse = np.zeros(q.shape, dtype), np.zeros((batch, h, g, n), dtype)
        if name == "attention_forward":
            arguments = q, keys, values, table, u, v, mask, offset, out, lse, 0, h * batch * g
        else:
            sums = [None if x is None else np.zeros((parts, *x.shape), dtype) for x in (table, u, v)]
            _, lse = attention._forward_numpy(q, keys, values, table, u, v, causal_offset=offset, key_mask=mask)
            tasks = h * (batch if table is None else parts)
            gradients = [np.zeros(x.shape, dtype) for x in (q, keys, values)]
            dout, dlse = normal(*q.shape), normal(*lse.shape) if rng.integers(2) else None
            arguments = dout, lse, dlse, q, keys, values, table, u, v, mask, offset, *gradients, *sums, 0, tasks
    changed = hostile(rng, arguments)
    where = f"_c.{name}({', '.join(map(described, changed))})"
    try:
        getattr(module, name)(*changed)
    except REFUSALS as error:
        return f"C refused: {type(error).__name__}"
    except Exception as error:
        error.add_note(where)
        raise
    if not any(a is not b for a, b in zip(arguments, changed, strict=False)):
        assert_equal_to_numpy(*_results_of_c(name, arguments), where)
    return "C returned"


def _decoder_arguments(rng, normal, n, d, parts):
    """The name and the arguments of one of the loops of csrc/decoders.c."""
    bias = normal(d) if rng.integers(2) else None
    norm = normal(n, d), normal(d), bias, 1e-5
    sums = normal(parts, d), None if bias is None else normal(parts, d)
    pairs, angles = normal(n * parts, n % 3, 2, d), normal(n, d)
    calls = {
        "norm_forward": (*norm, normal(n, d), 0, n),
        "norm_backward": (normal(n, d), *norm, normal(n, d), *sums, 0, parts),
        "swiglu_forward": (normal(n), normal(n), normal(n), 0, n),
        "swiglu_backward": (normal(n), normal(n), normal(n), normal(n), normal(n), 0, n),
        "rotary": (pairs, angles, normal(n, d), np.zeros_like(pairs), 0, len(pairs)),
    }
    name = rng.choice(sorted(calls))
    return name, calls[name]


def _results_of_c(name, arguments):
    """What the C function wrote, and what NumPy gives."""
    if name.startswith("norm"):
        count, oracle = (4, decoders._norm_forward) if name == "norm_forward" else (5, decoders._norm_backward)
        first, *sums = arguments[count:-2]
        expected = oracle(*arguments[:count])
        return [first, *(s if s is None else s.sum(axis=0) for s in sums)], list(expected if sums else [expected])
    if name.startswith("swiglu"):
        count, oracle = (2, decoders._swiglu_forward) if name == "swiglu_forward" else (3, decoders._swiglu_backward)
        expected = oracle(*arguments[:count])
        return list(arguments[count:-2]), list(expected if count == 3 else [expected])
    if name == "rotary":
        return [arguments[3]], [decoders._rotary(*arguments[:3])] if len(arguments[1]) else [arguments[3]]
    if name == "multiply_panels":
        x, packed, out, *_ = arguments
        return [out], [x @ packed.swapaxes(0, 1).reshape(x.shape[1], -1)]
    if name.startswith("nearest"):
        ids, distances = arguments[-2:]
        return [ids, distances], list(search._search_numpy(arguments[0], arguments[1], ids.shape[1]))
    if name == "attention_forward":
        *arrays, mask, offset, out, lse, _, _ = arguments
        return [out, lse], list(attention._forward_numpy(*arrays, causal_offset=offset, key_mask=mask))
    dout, lse, dlse, *arrays, mask, offset = arguments[:11]
    *gradients, dtable, du, dv = arguments[11:17]
    sums = [None if x is None else x.sum(axis=0) for x in (dtable, du, dv)]
    others = {"causal_offset": offset, "key_mask": mask, "dlse": dlse}
    return [*gradients, *sums], list(attention._backward_numpy(dout, lse, *arrays, **others))


def main(calls: int, seed: int, kinds: tuple[str, ...]) -> int:
    """Make many calls, and print how they ended. Returns the number of faults."""
    rng, outcomes, faults = np.random.default_rng(seed), Counter(), 0
    for number in range(calls):
        try:
            outcomes[hostile_call(rng, kinds)] += 1
        except Exception as error:
            outcomes[f"FAULT {type(error).__name__}"] += 1
            faults += 1
            if faults <= 40:
                print(f"call {number}: {type(error).__name__}: {str(error)[:300]!r} {getattr(error, '__notes__', '')}")
    print(f"{calls} calls, seed {seed}:", dict(outcomes.most_common()))
    return faults


if __name__ == "__main__":
    given = sys.argv[1:]
    kinds = tuple(given[2].split(",")) if given[2:] else ("c",)
    sys.exit(1 if main(int(given[0]), int(given[1]) if given[1:] else 0, kinds) else 0)
