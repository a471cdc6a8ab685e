"""Models in others' formats that a stranger may have written: folders as transformers writes them, and .gguf files."""

import json
import struct
from pathlib import Path

import foreign_models
import gguf
import numpy as np
from hostile import checkpoints, databases, values
from hostile.values import dumped, mutated, odd_text, odd_value, pick
from safetensors.numpy import load_file, save

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
WORDS = (0, 1, 2, 3, 4, 5, 7, 31, 32, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
KEYS = ("expert_count", "rope.scaling.factor", "attention.sliding_window", "attention.key_length", "rope.freq_base",
        "rope.dimension_count", "attention.head_count_kv", "x")  # fmt: skip


def build_folder(folder: Path, kind: str) -> dict[str, bytes]:
    """The files of a valid folder, whose weights are in two files for Qwen2, by their names."""
    foreign_models.write_folder(folder, kind)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "a"}, "unk_token": "b"}))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if kind == "qwen2":
        weights = load_file(folder / "model.safetensors")
        names = sorted(weights)
        parts = dict(zip(SHARDS, (names[:9], names[9:]), strict=True))
        del files["model.safetensors"]
        files |= {shard: save({name: weights[name] for name in part}) for shard, part in parts.items()}
        weight_map = {name: shard for shard, part in parts.items() for name in part}
        files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def changed_folder(rng, files: dict[str, bytes]) -> tuple[dict[str, bytes], str]:
    """Other contents for one file of a folder, and its name."""
    names = sorted(files)
    name = pick(rng, ["config.json"] * 5 + [n for n in names if n.endswith(".safetensors")] * 2 + names)
    data = files[name]
    if rng.random() < 0.04:
        return {other: content for other, content in files.items() if other != name}, name
    if name.endswith(".safetensors"):
        header, body = checkpoints.parts(data)
        meta = {"__metadata__": {"retro_np": "{}"}} if rng.random() < 0.1 else {"__metadata__": {"format": "pt"}}
        data = _changed_tensors(rng, header | meta, body, data)
    elif name == "tokenizer.json":
        state = json.loads(data)
        paths = [path for path in values._paths(state) if path and path[:2] not in (("model", "vocab"),)]
        data = dumped(mutated(rng, state, paths)) if rng.random() < 0.6 else databases._mutated_tokenizer(rng, data)
    else:
        data = dumped(mutated(rng, json.loads(data)))
    return files | {name: data}, name


def _changed_tensors(rng, header: dict, body: bytes, data: bytes) -> bytes:
    """A file of weights with another name, type, shape or place of a tensor, or other numbers."""
    name, action = pick(rng, [key for key in header if key != "__metadata__"]), rng.random()
    entry = dict(header[name])
    if action < 0.2:
        entry["dtype"] = pick(rng, checkpoints.DTYPES)
    elif action < 0.4:
        entry["shape"] = pick(rng, (entry["shape"][::-1], [], [0], [-1], [2**63, 2], [*entry["shape"], 1], None, [1.5]))
    elif action < 0.5:
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = pick(rng, ([0, stop - start], [start, stop + 4], [stop, start], [2**64, 2**64], None))
    elif action < 0.7:
        other = pick(rng, (odd_text(rng), "lm_head.weight", "score.weight", *header))
        return checkpoints.joined(dumped({other if key == name else key: part for key, part in header.items()}), body)
    elif action < 0.85:
        numbers = np.frombuffer(body[: len(body) // 4 * 4], np.float32).copy()
        numbers[int(rng.integers(len(numbers)))] = pick(rng, (np.nan, np.inf, -np.inf, 3e38, 1e-45))
        return checkpoints.joined(dumped(header), numbers.tobytes())
    else:
        return pick(
            rng, (data[: int(rng.integers(len(data)))], data + b"x", b"", (2**63).to_bytes(8, "little") + data[8:])
        )
    return checkpoints.joined(dumped(header | {name: entry}), body)


class Gguf:
    """The parts of a valid .gguf file, from which others are written."""

    def __init__(self, path: Path, kind: str, quantised: str):
        foreign_models.write_gguf(path, kind, quantised=quantised)
        reader = gguf.GGUFReader(path)
        self.data = path.read_bytes()
        self.body = self.data[reader.data_offset :]
        self.metadata = []
        for name, field in reader.fields.items():
            if not name.startswith("GGUF."):
                self.metadata.append((name, [int(kind) for kind in field.types], field.contents()))
        self.tensors = [
            (t.name, [int(n) for n in t.shape], int(t.tensor_type), t.data_offset - reader.data_offset)
            for t in reader.tensors
        ]


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(types: list[int], value) -> bytes:
    """A value with its type. What its type cannot hold becomes 0 or a text."""
    if types[0] == 9:
        items = value if isinstance(value, list) else [value]
        kind = types[-1] if types[-1] != 9 else 8
        return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(_value([kind], item)[4:] for item in items)
    if types[0] == 8:
        return struct.pack("<I", 8) + _text(value if isinstance(value, str) else repr(value)[:99])
    try:
        return struct.pack("<I" + NUMBERS[types[0]], types[0], value)
    except (struct.error, OverflowError, TypeError):
        return struct.pack("<I" + NUMBERS[types[0]], types[0], 0)


def written(metadata, tensors, body, version=3, counts=(0, 0), alignment=32) -> bytes:
    """A .gguf file. counts: what its numbers of tensors and of entries are increased by."""
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", (len(tensors) + counts[0]) % 2**64, (len(metadata) + counts[1]) % 2**64)
    head += b"".join(_text(name) + _value(types, value) for name, types, value in metadata)
    for name, shape, kind, offset in tensors:
        dims = b"".join(struct.pack("<Q", n % 2**64) for n in shape)
        head += _text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset % 2**64)
    return head + b"\0" * (-len(head) % alignment) + body


def changed_gguf(rng, base: Gguf) -> bytes:
    """A .gguf file that resembles a valid one."""
    metadata, tensors, action = list(base.metadata), list(base.tensors), rng.random()
    if action < 0.45:
        for _ in range(int(pick(rng, (1, 1, 2)))):
            _change_metadata(rng, metadata)
        return written(metadata, tensors, base.body)
    if action < 0.75:
        number = int(rng.integers(len(tensors)))
        name, shape, kind, offset = tensors[number]
        what = rng.random()
        if what < 0.2:
            name = pick(rng, (odd_text(rng), "rope_freqs.weight", "output.weight", *(tensor[0] for tensor in tensors)))
        elif what < 0.5:
            axis = int(rng.integers(len(shape)))
            shape = pick(
                rng, (shape[::-1], [], [1] * 5, [*shape, 1], [*shape[:axis], pick(rng, WORDS), *shape[axis + 1 :]])
            )
        elif what < 0.75:
            kind = pick(rng, (*range(42), 99, 2**32 - 1))
            if rng.random() < 0.3:
                tensors = [(*tensor[:2], kind, tensor[3]) for tensor in tensors]
        else:
            offset = pick(rng, (0, 32, offset + 32, offset + 1, *WORDS, len(base.body), 2**64 - len(base.body)))
            if rng.random() < 0.3:
                tensors = [(*tensor[:3], offset) for tensor in tensors]
        tensors[number] = (name, shape, kind, offset)
        return written(metadata, tensors, base.body)
    if action < 0.85:
        counts = pick(rng, WORDS), pick(rng, (0, 0, *WORDS))
        return written(metadata, tensors, base.body, pick(rng, (2, 3, 3)), counts[:: pick(rng, (1, -1))])
    if action < 0.92:
        body = rng.integers(0, 256, len(base.body)).astype(np.uint8).tobytes()
        return written(metadata, tensors, body)
    data, at = base.data, int(rng.integers(len(base.data) - len(base.body)))
    if action < 0.97:
        size = pick(rng, (1, 4, 8))
        return data[:at] + (pick(rng, WORDS) % 256**size).to_bytes(size, "little") + data[at + size :]
    return pick(rng, (data[:at], data[: int(rng.integers(len(data)))], b"", b"GGUF", b"GGUF" + b"\xff" * 40))


def _change_metadata(rng, metadata: list) -> None:
    number, action = int(rng.integers(len(metadata))), rng.random()
    name, types, value = metadata[number]
    if action < 0.35:
        if isinstance(value, list) and value and rng.random() < 0.7:
            value = list(value)
            value[int(rng.integers(len(value)))] = odd_value(rng)
        else:
            value = values.near_value(rng, value) if rng.random() < 0.5 else odd_value(rng)
        metadata[number] = name, types, value
    elif action < 0.6:
        kind = int(rng.integers(13))
        metadata[number] = name, pick(rng, ([kind], [9, kind])), pick(rng, (value, odd_value(rng)))
    elif action < 0.7:
        del metadata[number]
    elif action < 0.8:
        metadata[number] = pick(rng, (odd_text(rng), metadata[0][0], name + "x")), types, value
    elif action < 0.85:
        metadata.append(metadata[number])
    else:
        key = f"{metadata[0][2]}.{pick(rng, KEYS)}"
        metadata.append((key, [pick(rng, (4, 5, 6, 8, 10))], pick(rng, (0, 1, 8, -1, 0.5, 2**31, "yarn", "none"))))


def begins(data: bytes) -> bool:
    """Whether a file begins as a .gguf file does."""
    return data[:4] == b"GGUF" and data[4:8] in (struct.pack("<I", 2), struct.pack("<I", 3)) and len(data) > 100
