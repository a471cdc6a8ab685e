"""Read .gguf files, the format of llama.cpp, versions 2 and 3: metadata, and tensors of many quantised types.

A file is a header (metadata by key, then name, shape, type and offset of each tensor) and the tensors' bytes:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A stranger may have written the file, so every number is
checked against its size before anything is allocated. The library gguf turns blocks of quantised numbers to float32."""

import math
import os
import struct
from array import array
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.pretrained.layouts import AGAIN, UNSUPPORTED, Weights
from retro_np.tree import Array

# The types of values in the metadata: letters of `struct`; then texts and arrays
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
VERSIONS, DEFAULT_ALIGNMENT, MAX_DIMENSIONS = (2, 3), 32, 4
NUMBERS_PER_BLOCK = 1 << 17  # dequantised at once


class Stored(NamedTuple):
    """A tensor in the file: its shape, the number of its type, and its first byte, counted from the first tensor's."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header:
    """Values at a file's current position. Each raises UserError if it is larger than what is left of the file."""

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

    def text(self) -> str:
        """The next text."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """The next value of the metadata: a number, a text, or a list of either."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            return [self.text() for _ in range(count)]  # ends at the end of the file
        letter = NUMBERS[kind]
        return array(letter.replace("?", "B"), self.take(count * struct.calcsize("<" + letter))).tolist()

    def tensor(self) -> Stored:
        """The next tensor's shape, type and offset."""
        if (n_dimensions := self.number("I")) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {n_dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))[::-1]  # The last dimension is stored first.
        return Stored(shape, self.number("I"), self.number("Q"))


def read_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """A file's metadata by key, and its tensors. Only the header is read until a tensor is.

    Raises UserError for a file that is truncated, damaged or big-endian, and if gguf is not installed."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, Stored] = {}
    with reporting(f"{path} is damaged or not a GGUF file", AGAIN), path.open("rb") as file:
        header = Header(file, path)
        if (magic := header.take(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        version = header.number("I")
        if version not in VERSIONS:
            fault = "is big-endian" if version >> 24 in VERSIONS else f"has version {version} of the format"
            raise UserError(f"{path} {fault}; only little-endian files of version 2 or 3 are supported")
        n_tensors, n_entries = header.number("Q"), header.number("Q")
        for _ in range(n_entries):
            key = header.text()
            metadata[key] = header.value(header.number("I"))
        for _ in range(n_tensors):
            name = header.text()
            tensors[name] = header.tensor()
        if len(tensors) < n_tensors or len(metadata) < n_entries:
            raise ValueError("a name comes twice")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
        return metadata, _weights(path, tensors, start, header.left + file.tell() - start)


def _weights(path: Path, tensors: dict[str, Stored], start: int, size: int) -> Weights:
    """The tensors, whose bytes begin at `start` and are `size` bytes. Raises UserError if they do not fit there."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(f"{path} needs gguf, which is not installed: pip install gguf") from error

    types: dict[int, GGMLQuantizationType] = {}
    for kind in {tensor.kind for tensor in tensors.values()}:
        try:
            types[kind] = GGMLQuantizationType(kind)
            dequantize(np.zeros(GGML_QUANT_SIZES[types[kind]][1], np.uint8)[None], types[kind])
        except (ValueError, NotImplementedError) as error:
            shown = types[kind].name if kind in types else kind
            raise UserError(f"{path}: gguf does not dequantise tensors of type {shown}; {UNSUPPORTED}") from error
    row_bytes, total = {}, 0
    for name, (shape, kind, offset) in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[types[kind]]
        if not shape or not math.prod(shape) or shape[-1] % block:
            raise ValueError(f"{name!r:.99} has a shape that its type cannot have, {shape}")
        row_bytes[name] = shape[-1] // block * block_bytes
        n_bytes = math.prod(shape[:-1]) * row_bytes[name]
        total += n_bytes
        if max(offset + n_bytes, total) > size:  # or they overlap, and would need more memory than the file has bytes
            raise UserError(f"{path} is not complete: it ends before the end of {name!r:.99}; {AGAIN}")

    def read(name: str) -> Array:
        shape, kind, offset = tensors[name]
        tensor = np.empty(shape, np.float32)
        rows, step = tensor.reshape(-1, shape[-1]), max(1, NUMBERS_PER_BLOCK // shape[-1])
        with reporting(f"{name!r:.99} cannot be read from {path}", AGAIN), path.open("rb") as file:
            file.seek(start + offset)
            for part in (rows[first : first + step] for first in range(0, len(rows), step)):
                raw = np.fromfile(file, np.uint8, len(part) * row_bytes[name]).reshape(len(part), row_bytes[name])
                with np.errstate(all="ignore"):  # The caller refuses what is not finite.
                    part[:] = dequantize(raw, types[kind])
        return tensor

    return Weights(path, {name: tensor.shape for name, tensor in tensors.items()}, read)
