"""Read files that a stranger may have written: JSON, TOML, .npy and safetensors.

A right hash proves nothing: whoever wrote the file can compute it. So each file is checked against what it should
hold, and its sizes against its own length, before anything is allocated. Every failure is a UserError of one line."""

import json
import math
import os
import re
import stat
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from retro_np.errors import UserError
from retro_np.progress import one_line

DAMAGED = "the file is damaged; use another one"
MAX_SETTINGS_BYTES, MAX_LINE_DOTS = 1 << 18, 200  # tomllib's memory grows with the square of the dots in a key
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # two make a character, one does not
# The header that np.save writes. Evaluating it as Python, as NumPy does, is slow and accepts much more.
NPY_HEADER = re.compile(rb"\{'descr': (.+), 'fortran_order': False, 'shape': \((\d*(?:, \d+)*),?\), \} *\n")
NPY_MAGIC = b"\x93NUMPY\x01\x00"
Tensors = dict[str, np.ndarray]  # by name
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}  # safetensors' types and what is read from the file


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: the name of its type there, its shape, and its first byte in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int


@contextmanager
def reporting(subject: str, hint: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn whatever foreign code raises into an error of one line, also SystemExit and a panic of code in Rust.

    subject, hint: the line's beginning and end. kind: the class of the error; errors of this class pass unchanged."""
    try:
        yield
    except (kind, KeyboardInterrupt):
        raise
    except BaseException as error:
        reason = one_line(" ".join(traceback.format_exception_only(error))).removeprefix("ValueError: ")
        raise kind(f"{subject} ({reason:.300}): {hint}") from error


def loaded_json(data: bytes | str, where: str, hint: str, **options: Any) -> Any:
    """What json.loads returns, with these options. where, hint: the beginning and end of the UserError."""
    try:
        return json.loads(data, **options)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where} is not JSON ({reason}): {hint}") from error


def parse_json(data: bytes | str, where: str, kind: type = dict, hint: str = DAMAGED) -> Any:
    """The JSON value in `data`, an object unless `kind` is list.

    where: what the error calls the data. hint: what to do, the end of the error. Raises UserError for anything else,
    also for NaN, for infinities and for a value that is nested too deeply."""
    value = loaded_json(data, where, hint, parse_constant=_refuse_constant)
    if HALF_CHARACTER.search(data if isinstance(data, str) else data.decode("latin-1")):
        with reporting(f"{where} holds half a character (a lone surrogate)", hint):
            json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, kind):
        raise UserError(f"{where} does not hold a JSON {'list' if kind is list else 'object'}: {hint}")
    return value


def read_json(path: Path | str, kind: type = dict, hint: str = DAMAGED) -> Any:
    """The JSON value in a file; see `parse_json`. Raises UserError also for a file that cannot be read."""
    with _opened(path, hint) as file:
        return parse_json(file.read(), str(path), kind, hint)


def read_settings(path: Path | str) -> dict[str, Any]:
    """The keys and values of a TOML file, or of a JSON object, which begins with a brace.

    Raises FileNotFoundError, and UserError for any other file."""
    hint = "correct it, or give another file"
    with _opened(path, hint) as file:
        data = file.read(MAX_SETTINGS_BYTES + 1)
    if len(data) > MAX_SETTINGS_BYTES:
        raise UserError(f"{path} has more than {MAX_SETTINGS_BYTES:,} bytes, too many for settings: {hint}")
    if data.lstrip().startswith(b"{"):
        return parse_json(data, str(path), hint=hint)
    if max((line.count(b".") for line in data.splitlines()), default=0) > MAX_LINE_DOTS:
        raise UserError(f"{path} has a line with more than {MAX_LINE_DOTS} dots: {hint}")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML ({error}): {hint}") from error


def has_types(record: Any, fields: Mapping[str, type]) -> bool:
    """Whether a JSON value is an object with these fields, each of its type; whole numbers are from 0 to 2⁶² − 1."""
    return isinstance(record, dict) and all(
        type(record.get(name)) is kind and (kind is not int or 0 <= record[name] < 2**62)
        for name, kind in fields.items()
    )


def mapped(
    path: Path | str, dtypes: npt.DTypeLike | tuple[npt.DTypeLike, ...], shape: tuple[int | None, ...],
    hint: str = DAMAGED,
) -> np.ndarray:  # fmt: skip
    """Memory-map the array of a .npy file, read-only.

    dtypes: the dtype that the file must hold, or a tuple of them. shape: the sizes that it must have; None stands for
    any. Raises UserError if the file holds anything else, or is longer or shorter than its own header says."""
    allowed = [np.dtype(dtype) for dtype in (dtypes if isinstance(dtypes, tuple) else (dtypes,))]
    with _opened(path, hint) as file:
        start = file.read(len(NPY_MAGIC) + 2)
        header = file.read(int.from_bytes(start[-2:], "little")) if start.startswith(NPY_MAGIC) else b""
        offset, size = file.tell(), file.seek(0, 2)
    match = NPY_HEADER.fullmatch(header)
    sizes = tuple(int(number[:20]) for number in match[2].split(b",") if number.strip()) if match else ()
    for dtype in allowed:
        is_this = match and match[1].decode("latin-1") == repr(np.lib.format.dtype_to_descr(dtype))
        fits = len(sizes) == len(shape) and all(n in (None, m) for n, m in zip(shape, sizes, strict=True))
        if is_this and fits and offset + math.prod(sizes) * dtype.itemsize == size:
            # An empty array cannot be mapped.
            return np.memmap(path, dtype, "r", offset, sizes) if math.prod(sizes) else np.empty(sizes, dtype)
    names = " or ".join(str(dtype) if dtype.names is None else "a record" for dtype in allowed)
    wanted = " × ".join("any" if number is None else f"{number:,}" for number in shape)
    raise UserError(f"{path} does not hold an array of {names} of shape ({wanted}): {hint}")


def open_safetensors(path: Path | str, hint: str = DAMAGED) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Where each tensor of a safetensors file is stored, and the file's metadata. Only the header is read.

    hint: what to do, the end of an error. Raises UserError for a file that is missing or damaged."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise UserError(f"no safetensors file at {path}: {hint}")
    with reporting(f"{path} is not a complete safetensors file", hint):
        with safe_open(path, framework="numpy") as file:  # checks types, shapes and offsets against the file's size
            metadata = file.metadata() or {}
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    header.pop("__metadata__", None)

    def stored(dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
        return StoredTensor(dtype, tuple(shape), 8 + length + data_offsets[0])

    return {name: stored(**entry) for name, entry in header.items()}, metadata


def read_tensor(path: Path | str, name: str, stored: StoredTensor, hint: str = DAMAGED) -> np.ndarray:
    """One tensor of a safetensors file, without a second copy of it in memory, or of other tensors.

    Half precision is only for storage: float16 and bfloat16 become float32. float32 and float64 stay. Raises UserError
    for a tensor of another type, by name, and for a file that has become shorter since it was opened."""
    if stored.kind not in FLOATS:
        number = stored.kind.replace("I", "int").replace("U", "uint")
        raise UserError(f"{path}: {name} holds {number}, not floating-point numbers: convert it to float32")
    size = math.prod(stored.shape)
    with reporting(f"{path}: {name} cannot be read", hint):
        array = np.fromfile(path, FLOATS[stored.kind], size, offset=stored.offset)
    if array.size < size:
        raise UserError(f"{path} ends before the end of {name}: {hint}")
    if stored.kind == "BF16":  # NumPy has no bfloat16, whose 16 bits are the upper half of a float32.
        array = array.astype(np.uint32)
        array <<= 16
        array = array.view(np.float32)
    return array.astype(np.float64 if stored.kind == "F64" else np.float32, copy=False).reshape(stored.shape)


def read_safetensors(
    path: Path | str, selects: Callable[[str], bool] = lambda name: True, hint: str = DAMAGED
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file whose names are selected, and the file's metadata.

    The tensors are what `read_tensor` returns. Raises the errors of `open_safetensors` and `read_tensor`."""
    stored, metadata = open_safetensors(path, hint)
    return {name: read_tensor(path, name, tensor, hint) for name, tensor in stored.items() if selects(name)}, metadata


def checked_tensor(tensors: Tensors, path: Path | str, name: str, shape: tuple[int, ...], hint: str) -> np.ndarray:
    """One of the tensors of a file, by its name. Raises UserError unless it has this shape and is finite everywhere."""
    actual = f"of shape {tensors[name].shape}" if name in tensors else "absent"
    if actual != f"of shape {shape}":
        raise UserError(f"{path}: {name} is {actual}, but its configuration needs shape {shape}: {hint}")
    if not np.all(np.isfinite(tensors[name])):
        raise UserError(f"{path}: {name} is not finite everywhere, so the file is damaged: {hint}")
    return tensors[name]


@contextmanager
def _opened(path: Path | str, hint: str) -> Iterator[BinaryIO]:
    """Open an ordinary file to read. Raises FileNotFoundError if it is missing, and UserError if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # A pipe would be read for ever.
            raise UserError(f"{path} is not an ordinary file: {hint}")
        with Path(path).open("rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {hint}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
