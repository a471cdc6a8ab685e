"""Files that a stranger may have written. Ground truth: NumPy's and PyTorch's own files, and the exact refusals."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retro_np.errors import UserError
from retro_np.files.untrusted import mapped, parse_json, read_json, read_safetensors

DTYPES = (np.uint16, np.uint32, np.int64, np.float16, np.float32, np.float64)
RECORD = np.dtype([("id", "<i8"), ("distance", "<f4")])


def saved(path, array, **options):
    np.save(path, array, **options)
    return path


@given(array=st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0))))
def test_an_array_that_numpy_saved_is_mapped_with_the_same_bits(tmp_path_factory, array):
    path = saved(tmp_path_factory.mktemp("a") / "a.npy", array)
    result = mapped(path, (np.int8, array.dtype), (None,) * array.ndim)
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert result.tobytes() == array.tobytes()
    mapped(path, array.dtype, array.shape)
    if array.size:
        with pytest.raises(ValueError, match="read-only"):
            result[...] = 0


def test_a_structured_array_is_mapped(tmp_path):
    array = np.array([(1, 0.5), (-1, np.inf)], RECORD)
    assert np.array_equal(mapped(saved(tmp_path / "a.npy", array), RECORD, (2,)), array)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def header(text):
    data = text.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"
HOSTILE = {
    "nothing": b"",
    "only the magic": b"\x93NUMPY",
    "a header beyond the file": header(GOOD)[:40],
    "too few numbers": header(GOOD) + bytes(20),
    "too many numbers": header(GOOD) + bytes(28),
    "another version": header(GOOD).replace(b"\x01\x00", b"\x02\x00", 1) + bytes(24),
    "sizes of an exabyte": header(GOOD.replace("(2, 3)", f"({2**60}, 3)")) + bytes(24),
    "sizes of a hundred digits": header(GOOD.replace("(2, 3)", f"({'9' * 100}, 3)")) + bytes(24),
    "a negative size": header(GOOD.replace("(2, 3)", "(-2, -3)")) + bytes(24),
    "sizes whose product overflows to the right one": header(GOOD.replace("(2, 3)", f"({2**63 + 1}, 6)")) + bytes(24),
    "more dimensions": header(GOOD.replace("(2, 3)", "(2, 3, 1)")) + bytes(24),
    "Fortran order": header(GOOD.replace("False", "True")) + bytes(24),
    "code for a shape": header(GOOD.replace("(2, 3)", "(lambda: (2, 3))()")) + bytes(24),
    "another byte order": header(GOOD.replace("<f4", ">f4")) + bytes(24),
    "another type": header(GOOD.replace("<f4", "<i4")) + bytes(24),
    "a string type": header(GOOD.replace("<f4", "<U1")) + bytes(24),
    "a subarray type": header(GOOD.replace("'<f4'", "('<f4', (1,))")) + bytes(24),
    "deep nesting": header(GOOD.replace("(2, 3)", "(" * 20_000)) + bytes(24),
    "text": b"1.0 2.0 3.0\n",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_does_not_hold_the_array_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "keys.npy"
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"keys\.npy does not hold an array of float32 of shape \(any × 3\): restore it"
    ) as e:
        mapped(path, np.float32, (None, 3), "restore it")
    assert "\n" not in str(e.value)


def test_nothing_is_unpickled(tmp_path):
    canary = tmp_path / "canary"
    pickled, archive = io.BytesIO(), io.BytesIO()
    np.save(pickled, np.array([Bomb(canary)], object), allow_pickle=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.npy", pickled.getvalue())
    for data in (pickled.getvalue(), archive.getvalue(), pickle.dumps(Bomb(canary))):
        (tmp_path / "a.npy").write_bytes(data)
        with pytest.raises(UserError, match="does not hold an array"):
            mapped(tmp_path / "a.npy", (np.float32, object), (None,))
    assert not canary.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.parametrize("name", ["folder", "loop", "pipe"])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda path: mapped(path, np.float32, (None,)), read_json):
        with pytest.raises(UserError, match=f"{name} (cannot be read|is not an ordinary file)"):
            read(tmp_path / name)


NOT_JSON = {
    "nothing": b"",
    "half a value": b'{"a": ',
    "not a number": b'{"a": NaN}',
    "an infinity": b"[-Infinity]",
    "deep nesting of lists": b"[" * 100_000,
    "deep nesting of objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b"9" * 5_000,
    "bytes that are not text": b"\xff\xfe\xfd",
    "a name without quotes": b"{a: 1}",
}


@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused_in_one_line(data):
    with pytest.raises(UserError, match=r"^the request is not JSON .*: send another one$") as error:
        parse_json(data, "the request", hint="send another one")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("data", "kind"), [("[]", dict), ("1", dict), ("null", list), ("{}", list), ('"a"', dict)])
def test_json_of_another_kind_is_refused(data, kind):
    with pytest.raises(UserError, match=r"the request does not hold a JSON (object|list)"):
        parse_json(data, "the request", kind)


@pytest.mark.slow
@given(value=st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)))
def test_every_other_json_value_is_read_as_pythons_parser_reads_it(value):
    assert parse_json(json.dumps(value), "the request") == value


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_every_float_type_have_pytorchs_values(tmp_path, name):
    import torch
    from safetensors.torch import save_file

    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(getattr(torch, name))
    save_file({"a": tensor, "none": tensor[:0]}, tmp_path / "a.safetensors", {"key": "value"})
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    expected = np.float64 if name == "float64" else np.float32
    assert {array.dtype for array in tensors.values()} == {np.dtype(expected)}
    assert np.array_equal(tensors["a"], tensor.to(torch.float64).numpy().astype(expected))
    assert tensors["none"].shape == (0, 5)
    assert metadata == {"key": "value"}


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int64", "int8", "bool", "complex64"])
def test_a_tensor_of_another_type_is_refused_by_name_unless_it_is_not_selected(tmp_path, name):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(3).to(getattr(torch, name))}, path)
    with pytest.raises(UserError, match=r"a\.safetensors: b holds \w+, not floating-point numbers: convert"):
        read_safetensors(path)
    assert list(read_safetensors(path, lambda name: name == "a")[0]) == ["a"]


def safetensors(entry, metadata=None, data=bytes(8)):
    text = json.dumps({"__metadata__": metadata or {}, "a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_TENSORS = {
    "nothing": b"",
    "a header of an exabyte": (2**60).to_bytes(8, "little") + b"{}",
    "a truncated header": safetensors(F32)[:30],
    "truncated data": safetensors(F32)[:-1],
    "too much data": safetensors(F32) + b"\0",
    "a type that does not exist": safetensors(F32 | {"dtype": "F128"}),
    "more numbers than the file holds": safetensors(F32 | {"shape": [2**62]}),
    "a negative size": safetensors(F32 | {"shape": [-2]}),
    "offsets that end before they begin": safetensors(F32 | {"data_offsets": [8, 0]}),
    "metadata that are not text": safetensors(F32, {"a": [1]}),
    "deep nesting": (10**5).to_bytes(8, "little") + b"[" * 10**5,
}


@pytest.mark.parametrize("data", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is not a complete safetensors file .*; use another one$") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_files_in_a_folder_whose_name_is_not_utf8_are_read(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    os.mkdir(folder)
    with open(f"{folder}/a.safetensors", "wb") as file:
        file.write(safetensors(F32))
    assert np.array_equal(read_safetensors(f"{folder}/a.safetensors")[0]["a"], np.zeros(2))
    np.save(f"{folder}/a.npy", np.arange(3))
    assert np.array_equal(mapped(f"{folder}/a.npy", np.int64, (3,)), np.arange(3))


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    for read in (lambda path: mapped(path, np.float32, (None,)), read_json):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")


def test_half_a_character_is_refused_and_two_halves_are_one_character():
    assert parse_json(r'{"a": "\ud83d\ude00"}', "the request") == {"a": "\U0001f600"}
    for text in (r'{"a": "\ud83d"}', r'{"\uDE00": 1}', r'["\ude00\ud83d"]', '["\ud83d"]'):
        with pytest.raises(UserError, match=r"the request holds half a character \(a lone surrogate\)"):
            parse_json(text, "the request", list if text[0] == "[" else dict)
