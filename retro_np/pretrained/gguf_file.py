"""Read .gguf files, the format of llama.cpp, versions 2 and 3: metadata, and tensors of many quantised types.

A file is a header (metadata by key, then name, shape, type and offset of each tensor) and the tensors' bytes:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A stranger may have written the file, so every number is
checked against its size before anything is allocated. The library gguf turns blocks of quantised numbers to float32."""

import math
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.pretrained.layouts import AGAIN, UNSUPPORTED, Weights
from retro_np.tree import Array

MAGIC, VERSIONS = b"GGUF", (2, 3)
# The types of values in the metadata: letters of `struct`, then texts and arrays.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
MIN_ENTRY_BYTES, MIN_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # of a key and its value, of a tensor in the header
DEFAULT_ALIGNMENT, MAX_DIMENSIONS = 32, 4
NUMBERS_PER_BLOCK = 1 << 20  # dequantised at once


class Stored(NamedTuple):
    """A tensor in the file: its shape, the number of its type, and its first byte, counted from the first tensor's."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header:
    """Values at the current position of a file, none of which is larger than what is left of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.left = file, path, os.fstat(file.fileno()).st_size

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > self.left:
            raise UserError(f"{self.path} is not complete: it ends in the middle of its header; {AGAIN}")
        self.left -= size
        return self.file.read(size)

    def number(self, letter: str) -> Any:
        """The next number, of a type of `struct`."""
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def count(self, item_bytes: int) -> int:
        """The next number, which counts items of at least so many bytes."""
        if (count := self.number("Q")) * item_bytes > self.left:
            raise UserError(f"{self.path} is not complete: its header counts {count:,} items; {AGAIN}")
        return count

    def text(self) -> str:
        """The next text."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """The next value of the metadata: a number, a text, or a list of either."""
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY or (item := self.number("I")) not in (TEXT, *NUMBERS):
            raise UserError(f"{self.path}: a value of its metadata is of no known type: {AGAIN}")
        if item == TEXT:
            return [self.text() for _ in range(self.count(8))]
        size = struct.calcsize("<" + NUMBERS[item])
        return array(NUMBERS[item].replace("?", "B"), self.take(self.count(size) * size)).tolist()


def read_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """A file's metadata by key, and its tensors. Only the header is read until a tensor is.

    Raises UserError for a file that is truncated, damaged or big-endian, and if gguf is not installed."""
    with reporting(f"{path} is not a GGUF file", AGAIN), path.open("rb") as file:
        header = Header(file, path)
        if header.take(4) != MAGIC:
            raise UserError(f"{path} does not begin like a GGUF file: {AGAIN}")
        version = header.number("I")
        if version not in VERSIONS:
            fault = "is big-endian" if version in [v << 24 for v in VERSIONS] else f"has version {version} of GGUF"
            raise UserError(f"{path} {fault}; only little-endian files of version 2 or 3 are supported")
        n_tensors, n_entries = header.count(MIN_TENSOR_BYTES), header.count(MIN_ENTRY_BYTES)
        metadata = _unique(path, n_entries, lambda: (header.text(), header.value(header.number("I"))))
        stored = _unique(path, n_tensors, lambda: (header.text(), _stored(header)))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{path}: general.alignment is {alignment!r:.40}, not a power of two: {AGAIN}")
        start = -(-file.tell() // alignment) * alignment
        size = header.left + file.tell() - start
    return metadata, _weights(path, stored, start, size)


def _unique(path: Path, count: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
    """So many entries by their names. Raises UserError for a name that comes twice."""
    entries: dict[str, Any] = {}
    for _ in range(count):
        name, value = read()
        if name in entries:
            raise UserError(f"{path} has {name!r:.99} twice: {AGAIN}")
        entries[name] = value
    return entries


def _stored(header: Header) -> Stored:
    n_dimensions = header.number("I")
    if n_dimensions > MAX_DIMENSIONS:
        raise UserError(f"{header.path}: a tensor has {n_dimensions:,} dimensions: {AGAIN}")
    shape = tuple(header.number("Q") for _ in range(n_dimensions))[::-1]  # The last dimension is stored first.
    return Stored(shape, header.number("I"), header.number("Q"))


def _weights(path: Path, stored: dict[str, Stored], start: int, size: int) -> Weights:
    """The tensors, whose bytes begin at `start` and are `size` bytes. Raises UserError if they do not fit there."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(f"{path} needs gguf, which is not installed: pip install gguf") from error

    row_bytes, total = {}, 0
    for name, (shape, kind, offset) in stored.items():
        block, block_bytes = GGML_QUANT_SIZES.get(kind, (1, 1))
        if not math.prod(shape) or not shape or shape[-1] % block:
            raise UserError(f"{path}: {name!r:.99} has a shape that its type cannot have, {shape}: {AGAIN}")
        row_bytes[name] = shape[-1] // block * block_bytes
        n_bytes = math.prod(shape[:-1]) * row_bytes[name]
        total += n_bytes
        if offset + n_bytes > size:
            raise UserError(f"{path} is not complete: it ends before the end of {name!r:.99}; {AGAIN}")
    if total > size:  # They overlap. Read one by one, they would need more memory than the file's size suggests.
        raise UserError(f"{path}: its tensors overlap: {AGAIN}")
    for kind in {tensor.kind for tensor in stored.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), GGMLQuantizationType(kind))
        except (KeyError, NotImplementedError) as error:
            shown = GGMLQuantizationType(kind).name if kind in GGML_QUANT_SIZES else f"of number {kind}"
            raise UserError(
                f"{path}: the tensors' type {shown} is not one that gguf can read; {UNSUPPORTED}"
            ) from error

    def read(name: str) -> Array:
        shape, kind, offset = stored[name]
        tensor = np.empty(shape, np.float32)
        rows = tensor.reshape(-1, shape[-1])
        step = max(1, NUMBERS_PER_BLOCK // shape[-1])
        with path.open("rb") as file:
            file.seek(start + offset)
            for part in (rows[first : first + step] for first in range(0, len(rows), step)):
                raw = np.fromfile(file, np.uint8, len(part) * row_bytes[name])
                if len(raw) < len(part) * row_bytes[name]:
                    raise UserError(f"{path} is not complete: it ends before the end of {name!r:.99}; {AGAIN}")
                with np.errstate(all="ignore"):  # What is not finite is refused by the caller.
                    part[:] = dequantize(raw.reshape(len(part), -1), GGMLQuantizationType(kind))
        return tensor

    return Weights(path, {name: tensor.shape for name, tensor in stored.items()}, read)
