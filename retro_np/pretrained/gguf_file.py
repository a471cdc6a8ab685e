"""Models in .gguf files, the format of llama.cpp, versions 2 and 3: metadata, and tensors of many quantised types.

A file is a header (metadata by key, then name, shape, type and offset of each tensor) and the tensors' bytes:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A stranger may have written the file, so every number is
checked against its size before anything is allocated. The library gguf turns blocks of quantised numbers to float32.
The metadata hold configuration and tokenizer."""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.nn.decoders import MATRICES
from retro_np.pretrained.decoder import AGAIN, GGUF, UNSUPPORTED, Pretrained, Weights, check_settings, foreign_decoder
from retro_np.retrieval.folders import ANY, Known, refusal, sizes
from retro_np.retrieval.gguf_tokenizer import tokenizer_from_gguf
from retro_np.retrieval.rows import needed
from retro_np.tree import Array

# The types of values in the metadata: letters of `struct`; then texts and arrays
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
VERSIONS, DEFAULT_ALIGNMENT, MAX_DIMENSIONS = (2, 3), 32, 4
NUMBERS_PER_BLOCK = 1 << 17  # dequantised at once
# Our fields and the entries that give them, after the name of the architecture and a dot
ENTRIES = {"d_model": "embedding_length", "d_ffw": "feed_forward_length", "n_layers": "block_count"}
ENTRIES |= {"n_heads": "attention.head_count", "max_positions": "context_length"}
OPTIONAL_ENTRIES = {"n_kv_heads": "attention.head_count_kv", "rotary_base": "rope.freq_base"}
EPS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all must be that of a head
KNOWN_ENTRIES: Known = dict.fromkeys((*ENTRIES.values(), *OPTIONAL_ENTRIES.values(), *EPS, "vocab_size"), ANY)
KNOWN_ENTRIES |= {"attention.causal": (True,), "rope.scaling.type": ("none",)}
OF_THIS_FILE: Known = {"general.type": ("model",), "split.count": (0, 1)}
TOKEN_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
Places = dict[str, tuple[tuple[int, ...], int, int]]  # by name: shape, number of the type, place after the header


def open_gguf(path: Path, name: str) -> Pretrained:
    """The model in a .gguf file. Only the header is read.

    Raises a UserError that says what is damaged or missing, or which part of the model is not supported."""
    metadata, weights = read_gguf(path)
    check_settings(path, {key: metadata[key] for key in OF_THIS_FILE.keys() & metadata.keys()}, OF_THIS_FILE)
    kind = metadata.get("general.architecture")
    if kind not in list(GGUF):
        raise refusal(path, "general.architecture", kind, f"only {', '.join(GGUF)} are supported: use another model")
    layout, settings = GGUF[kind], {key: value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    fields = sizes(path, settings, {ours: f"{kind}.{theirs}" for ours, theirs in ENTRIES.items()})
    width = settings.get(f"{kind}.attention.key_length", fields["d_model"] // fields["n_heads"])
    known = KNOWN_ENTRIES | dict.fromkeys(WIDTHS, (width,))
    check_settings(path, settings, {f"{kind}.{key}": values for key, values in known.items()})
    fields |= {ours: settings[f"{kind}.{key}"] for ours, key in OPTIONAL_ENTRIES.items() if f"{kind}.{key}" in settings}
    biased = ((w, "attention" if w[-1] in "qkvo" else "ffw") for w in MATRICES)
    fields |= {
        "architecture": "gpt2" if kind == "gpt2" else "llama",
        "d_head": width,
        "vocabulary_size": weights.shapes.get(layout.name("embedding"), (1,))[0],
        "norm_eps": settings.get(f"{kind}.{EPS[kind != 'gpt2']}"),
        "biases": tuple(w for w, block in biased if layout.name(f"layers.0.{block}.b{w[1:]}") in weights.shapes),
        "tie_readout": layout.name("readout") not in weights.shapes,
    }
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    ids = {role: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for role, theirs in TOKEN_ROLES.items()}
    special = {role: tokenizer.id_to_token(i) for role, i in ids.items() if type(i) is int and 0 <= i < 2**32}
    template: Any = metadata.get("tokenizer.chat_template")
    return foreign_decoder(name, fields, weights, layout, tokenizer, special, template, [ids["eos_token"]])


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

    def numbers(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        """The next numbers, of a type of `struct`."""
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize("<" + letter)))

    def number(self, letter: str) -> Any:
        """The next number."""
        return self.numbers(letter)[0]

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
        return list(self.numbers(NUMBERS[kind], count))


def read_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """A file's metadata by key, and its tensors. Only the header is read until a tensor is.

    Raises UserError for a file that is truncated, damaged or big-endian, and if gguf is not installed."""
    metadata: dict[str, Any] = {}
    tensors: Places = {}
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
            name, n_dimensions = header.text(), header.number("I")
            if n_dimensions > MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {n_dimensions:,} dimensions")
            shape = header.numbers("Q", n_dimensions)[::-1]  # The last dimension is stored first.
            tensors[name] = shape, header.number("I"), header.number("Q")
        if len(tensors) < n_tensors or len(metadata) < n_entries:
            raise ValueError("a name comes twice")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
        return metadata, _weights(path, tensors, start, header.left + file.tell() - start)


def _weights(path: Path, tensors: Places, start: int, size: int) -> Weights:
    """The tensors, whose bytes begin at `start` and are `size` bytes. Raises UserError if they do not fit there."""
    constants, quants = (needed(f"gguf.{module}", str(path), "gguf") for module in ("constants", "quants"))
    for kind in {kind for _, kind, _ in tensors.values()}:
        with reporting(f"{path}: gguf does not dequantise tensors of type {kind}", UNSUPPORTED):
            raw = np.zeros((1, constants.GGML_QUANT_SIZES[kind][1]), np.uint8)
            quants.dequantize(raw, constants.GGMLQuantizationType(kind))
    row_bytes, total = {}, 0
    for name, (shape, kind, offset) in tensors.items():
        block, block_bytes = constants.GGML_QUANT_SIZES[kind]
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
                    part[:] = quants.dequantize(raw, constants.GGMLQuantizationType(kind))
        return tensor

    return Weights(path, [path], {name: shape for name, (shape, _, _) in tensors.items()}, read)
