"""Checkpoints that a stranger may have written: safetensors files whose header or tensors lie, and runs around them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from hostile import values
from hostile.values import dumped, mutated, mutated_lines, odd_text, odd_value, pick

from retro_np import EncoderConfig, RetroConfig, init_params
from retro_np.checkpoint import save_checkpoint
from retro_np.optim import adamw_init
from retro_np.parameters import is_retrieval
from retro_np.pretrained.models import read_pretrained
from retro_np.training.memory import add_memory

DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "I32", "I16", "I8", "I4",
    "U64", "U8",
    "BOOL", "C64", "f32", "X", "", None, 5, [], "F32\x1b[2J",
)  # fmt: skip
SIZES = (
    0,
    1,
    2,
    3,
    7,
    255,
    10**5,
    10**7,
    10**9,
    2**31,
    2**40,
    2**63,
    10**19,
    10**30,
    -1,
    1.0,
    "4",
    None,
    True,
    [],
    1e30,
)


def build(path: Path, vocabulary_size: int, chunk_size: int, run: dict | None = None) -> Path:
    """Write a tiny model's checkpoint of a training run, as `train` does."""
    config = RetroConfig(vocabulary_size, 4, 4, 1, 4, 2, (2,), chunk_size, EncoderConfig(4, 4, 1, 4, 1, (1,)))
    params = init_params(config, np.random.default_rng(0))
    save_checkpoint(
        path, params, adamw_init(params), config, run or {"model": config.to_dict(), "training": {}, "data": {}}
    )
    return path


def build_added(path: Path, model: Path) -> None:
    """Write the checkpoint of a run that trained a memory of a model of others."""
    base = read_pretrained(model)
    config = replace(base.config, chunk_size=8)
    params, config = add_memory(base.params, config, (1,), np.random.default_rng(0), begin_id=1, rank=1)
    run = {"model": config.to_dict(), "training": {}, "data": {}}
    named = {"base": {"name": str(model), "sha256": base.sha256}}
    save_checkpoint(path, params, adamw_init(params, is_retrieval), config, run, named, is_retrieval)


def parts(data: bytes) -> tuple[dict, bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, body: bytes) -> bytes:
    """A safetensors file."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def parses(data: bytes) -> bool:
    """Whether the header has its length and is JSON."""
    size = int.from_bytes(data[:8], "little")
    return len(data) >= 8 + size and values.parses_as_json(data[8 : 8 + size])


def changed(rng, data: bytes) -> bytes:
    """A safetensors file that resembles another one."""
    header, body = parts(data)
    action = rng.random()
    if action < 0.55:
        meta = json.loads(header["__metadata__"]["retro_np"])
        return joined(dumped(header | {"__metadata__": {"retro_np": _changed_meta(rng, meta)}}), body)
    if action < 0.6:
        odd = pick(
            rng,
            (odd_value(rng), {"retro_np": odd_value(rng)}, {"retro_np": "not JSON"}, {"a": "b"}, {odd_text(rng): "x"}),
        )
        return joined(dumped(header | {"__metadata__": odd}), body)
    name = pick(rng, [key for key in header if key != "__metadata__"])
    entry = dict(header[name])
    if action < 0.68:
        entry["dtype"] = pick(rng, DTYPES)
        if rng.random() < 0.5:  # every tensor has the type, and the offsets may fit it
            header = {
                key: value if key == "__metadata__" else value | {"dtype": entry["dtype"]}
                for key, value in header.items()
            }
    elif action < 0.76:
        size = int(np.prod(entry["shape"]))
        entry["shape"] = pick(rng, (
            entry["shape"][::-1], [size], [1, size], [size, 1, 1], [], [0], [-1], [2**63, 2], [2**32, 2**32], [10**30],
            [1.5], ["a"],
            None, "a", [size * 2], {}, [True] * 2, [1] * 70,
        ))  # fmt: skip
    elif action < 0.84:
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = pick(rng, (
            [0, stop - start], [start, stop + 4], [start + 1, stop + 1], [stop, start], [-4, 0], [0, 2**63], [2**64,
            2**64], [start],
            [], None, [start, stop, stop], ["0", "4"], [start, start], [0.0, 4.0], [len(body),
            len(body) + stop - start],
        ))  # fmt: skip
    elif action < 0.88:
        header = {key: value for key, value in header.items() if key != name}
        return joined(dumped(header), body)
    elif action < 0.92:
        header = {odd_text(rng) if key == name else key: value for key, value in header.items()}
        return joined(dumped(header), body)
    elif action < 0.97:
        array = np.frombuffer(body[: len(body) // 4 * 4], np.float32).copy()
        array[int(rng.integers(len(array)))] = pick(rng, (np.nan, np.inf, -np.inf, 3e38, 1e-45))
        return joined(dumped(header), array.tobytes() + body[len(body) // 4 * 4 :])
    else:
        size = pick(rng, (0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data), 100_000_001))
        return pick(
            rng,
            (data[: int(rng.integers(len(data)))], b"", data + b"x", size.to_bytes(8, "little") + data[8:], b"{}" * 9),
        )
    return joined(dumped(header | {name: entry}), body)


def changed_base(rng, data: bytes, names: tuple[str, ...]) -> bytes:
    """A file of what was added to a model, with another model, or none. names: of models and other files."""
    header, body = parts(data)
    meta = json.loads(header["__metadata__"]["retro_np"])
    action = rng.random()
    if action < 0.5:
        meta["base"]["name"] = pick(rng, (*names, odd_text(rng), "x" * 5000, "x" * 5000 + ".safetensors", "owner/name"))
    elif action < 0.9:
        meta["base"] = mutated(rng, meta["base"]) if action < 0.7 else odd_value(rng)
    else:
        del meta["base"]
    changed = dumped(meta).decode("utf-8", "surrogatepass")
    return joined(dumped(header | {"__metadata__": {"retro_np": changed}}), body)


def _changed_meta(rng, meta: dict) -> str:
    action = rng.random()
    if action < 0.4:
        config = dict(meta["config"])
        for _ in range(int(pick(rng, (1, 1, 2)))):
            key = pick(rng, [*config])
            if isinstance(config[key], dict) and config[key] and rng.random() < 0.7:
                config[key] = dict(config[key]) | {pick(rng, [*config[key]]): pick(rng, (*SIZES, [1, 2], [10**9]))}
            else:
                config[key] = pick(rng, (*SIZES, odd_value(rng), [1, 1], [10**9], [2**63]))
        meta = meta | {"config": config}
    elif action < 0.55:
        meta = meta | {"step": odd_value(rng)}
    elif action < 0.75:
        run = dict(meta["run"])
        run[pick(rng, ("model", "training", "data"))] = odd_value(rng)
        meta = meta | {"run": pick(rng, (run, run, odd_value(rng)))}
    elif action < 0.97:
        meta = mutated(rng, meta)
    else:
        return pick(rng, ("", "null", "[]", "NaN", "{" * 5, "[" * 10**5, "\ud800", '{"config": {"config": {}}}'))
    return dumped(meta).decode("utf-8", "surrogatepass")


RUN_FILES = ("config.json", "log.jsonl", "best.safetensors")


def changed_run(rng, name: str, data: bytes) -> bytes:
    """Other contents for a file of a run."""
    if rng.random() < 0.1:
        return pick(rng, (b"", b"\x00", b"\xff\xfe", b"[" * 10**5, data[: len(data) // 2]))
    if name == "best.safetensors":
        return changed(rng, data)
    return dumped(mutated(rng, json.loads(data))) if name == "config.json" else mutated_lines(rng, data)
