"""Hostile values: JSON that parses but is not what was asked for, texts that steer a terminal, arrays that lie.

Every function takes a NumPy generator, so that a case can be repeated from its seed and number.
"""

import io
import json
import pickle
import re
from typing import Any

import numpy as np

# Each sequence has parameters or a form that rich never sends, so that what comes from a text can be told from colours.
PAYLOADS = (
    "\x1b[2J", "\x1b[31;7;9m", "\x1b]0;title\x07", "\x1b]52;c;aGFjaw==\x07", "\x1b]8;;http://x\x1b\\link", "\x1b[13A",
    "\x1b[6n", "\x1bc", "\x1b#8", "\x1bP1$r0m\x1b\\", "\x9b2J", "\x9d0;t\x9c", "\x90q\x9c", "\x07", "\x08\x08", "\x0e",
    "\x7f", "\x85", "\u202ereversed", "\u2066isolated", "\u200f", "\u061c", "\x00", "\r\x1b[7K", "\x0b", "\x0c",
)  # fmt: skip
ODD_TEXTS = (
    "",
    " ",
    ".",
    "..",
    "/",
    "../..",
    "\n",
    "a\nb",
    "a" * 300,
    "\ud800",
    "x\udfffy",
    "\u2028",
    "é" * 9,
    "0",
    "None",
    "[red]markup[/red]",
    "<script>alert(1)</script>",
    "%s{0}{name}",
    "/etc/passwd",
    "~",
    "$HOME",
    "-x",
    "--help",
    "*",
)
ODD_NUMBERS = (
    0, 1, -1, 2, 3, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
    -(2**63), -(10**30), 10**4000, 0.5, -0.0, 1e308, 1e-320, 1.0, True, False,
)  # fmt: skip
# JSON texts that `json.dumps` cannot write, as the whole value of an entry.
RAW_JSON = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "1" + "0" * 30, "1" * 5000, "[" * 3000 + "]" * 3000,
    '{"a":' * 2000 + "0" + "}" * 2000, '"\\ud800"', '"\\u0000"', '{"a":1,"a":2}', "-0", "1E+2",
)  # fmt: skip
RAW_MARK = "raw json "  # a string with this prefix is replaced by the JSON text that follows it
TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
COLOURS = re.compile(r"\x1b\[(?!31;7;9m)[0-9;]*m")
MOVES = re.compile(r"\x1b\[\?25[lh]|\x1b\[2K|\x1b\[(?!13A)\d*A|\r")  # what rich's progress bars send to a terminal


def pick(rng: np.random.Generator, options):
    """One of several options."""
    return options[int(rng.integers(len(options)))]


def sent(output: str, in_colour: bool, to_terminal: bool) -> str | None:
    """The first control character or escape sequence in what a command printed that no colour and no bar explains."""
    if in_colour or to_terminal:
        output = COLOURS.sub("", output)
    if to_terminal:
        output = MOVES.sub("", output)
    found = TERMINAL.search(output)
    return None if found is None else repr(output[max(0, found.start() - 30) : found.end() + 30])


def odd_text(rng) -> str:
    """A text that is unusual as a name or steers a terminal."""
    return pick(rng, ODD_TEXTS) if rng.random() < 0.5 else f"a{pick(rng, PAYLOADS)}b"


def odd_value(rng, depth: int = 0) -> Any:
    """A value of any JSON type."""
    kind = int(rng.integers(8 if depth < 2 else 6))
    if kind < 2:
        return pick(rng, ODD_NUMBERS)
    if kind == 2:
        return odd_text(rng)
    if kind == 3:
        return pick(rng, (None, [], {}, "2024-01-01", "1", "nan", [[]], [None], {"": None}))
    if kind in (4, 5):
        return RAW_MARK + pick(rng, RAW_JSON)
    if kind == 6:
        return [odd_value(rng, depth + 1) for _ in range(int(rng.integers(4)))]
    return {odd_text(rng): odd_value(rng, depth + 1) for _ in range(int(rng.integers(3)))}


def near_value(rng, old: Any) -> Any:
    """A value that resembles an old one: of the same type, but another."""
    if type(old) is int:
        return old + int(rng.integers(-3, 4)) if rng.random() < 0.6 else pick(rng, ODD_NUMBERS[:19])
    if isinstance(old, float):
        return pick(rng, (old * 2, -old, 0.0, 1e30, 1e-30))
    if isinstance(old, str):
        return odd_text(rng) if rng.random() < 0.5 else old[: int(rng.integers(len(old) + 1))] + pick(rng, PAYLOADS)
    return odd_value(rng)


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    paths = [path]
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            paths += _paths(part, (*path, key))
    return paths


def mutated(rng, value: Any, paths: list[tuple] | None = None) -> Any:
    """A copy of a JSON value with one to three changes: entries replaced, removed, renamed, doubled or added.

    paths: the entries to choose from, as `_paths` lists them; None for all.
    """
    value = json.loads(json.dumps(value))
    for _ in range(int(pick(rng, (1, 1, 1, 2, 3)))):
        path = pick(rng, paths if paths is not None else _paths(value))
        if not path:
            if rng.random() < 0.1:
                return odd_value(rng)
            continue
        try:
            parent = value
            for key in path[:-1]:
                parent = parent[key]
            key = path[-1]
            old, action = parent[key], rng.random()
            if action < 0.5:
                parent[key] = odd_value(rng)
            elif action < 0.8:
                parent[key] = near_value(rng, old)
            elif action < 0.88:
                del parent[key]
            elif isinstance(parent, list):
                parent.insert(key, old)
            elif action < 0.94:
                parent[odd_text(rng)] = parent.pop(key)
            else:
                parent[odd_text(rng)] = old
        except (KeyError, IndexError, TypeError, AttributeError):  # An earlier change removed this entry.
            continue
    return value


def dumped(value: Any, **options) -> bytes:
    """A JSON value as bytes, with the raw texts that `odd_value` chose."""
    text = json.dumps(value, **options)
    if RAW_MARK in text:
        text = re.sub(f'"{RAW_MARK}((?:[^"\\\\]|\\\\.)*)"', lambda match: json.loads(f'"{match[1]}"'), text)
    return text.encode("utf-8", "surrogatepass")


TOML_LINES = (
    "[model", "[[model]]", "[model.encoder]", "a = ", "= 1", "steps = 1_0", "steps = 0xfffffffffffffffffffff",
    "x = nan", "clip = inf", "clip = -inf", "seed = -0", "date = 2024-01-01T00:00:00Z", "a.b.c.d = 1", '"" = 1',
    "steps = {a = 1}", "a = " + "[" * 3000, "a." * 150 + "a = 1", "a." * 5000 + "a = 1", '"\x1b[2J" = 1',
    "s = '''\u202ereversed'''",
)  # fmt: skip


def toml(value: Any) -> str:
    """A value as TOML, as far as TOML can say it. Keys are quoted, and what it cannot say is text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value if value is not None else "none")


def settings(rng, data: bytes) -> bytes:
    """A file of settings that resembles a run's config.json: as JSON, or as TOML with odd lines."""
    value = mutated(rng, json.loads(data))
    if rng.random() < 0.4 or not isinstance(value, dict):
        return dumped(value)
    lines = []
    for name, section in value.items():
        pairs = section.items() if isinstance(section, dict) else [("steps", section)]
        pairs = [(key, part) for key, part in pairs if part is not None]  # TOML has no null.
        lines += [f"[{toml(name)}]", *(f"{toml(key)} = {toml(part)}" for key, part in pairs)]
    for _ in range(int(pick(rng, (0, 0, 1, 2)))):
        lines.insert(int(rng.integers(len(lines) + 1)), pick(rng, TOML_LINES))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_lines(rng, data: bytes) -> bytes:
    """Lines of JSON with one line changed, removed, doubled, cut or replaced."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return dumped(odd_value(rng)) + b"\n"
    number, action = int(rng.integers(len(lines))), rng.random()
    if action < 0.75:
        lines[number] = dumped(mutated(rng, json.loads(lines[number]))) + b"\n"
    elif action < 0.8:
        del lines[number]
    elif action < 0.85:
        lines.insert(number, lines[number])
    elif action < 0.9:
        lines[number] = dumped(odd_value(rng)) + b"\n"
    elif action < 0.95:
        rng.shuffle(lines)
    else:
        lines[number] = pick(rng, (b"\n", lines[number][:-2], b"\xff\xfe\n", b"{}\n", b"null\n", b"\x00\n", b"{\n"))
    return b"".join(lines)


class Canary:
    """An object whose unpickling creates a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


ODD_DTYPES = (
    "<f8", "<f4", "<f2", ">f4", ">i8", "<i8", "<i4", "<i2", "|i1", "|u1", "<u2", "<u4", "<u8", "|b1", "<c8", "<U4",
    "|S8", "|V4", "<M8[s]", "<m8[ns]",
)  # fmt: skip


def saved(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def npy(header: str, body: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with a header of any text."""
    size = 2 if version == (1, 0) else 4
    text = header.encode("utf-8" if version == (3, 0) else "latin1", "replace")
    text += b" " * (-(len(text) + 9 + size) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(size, "little") + text + body


def mutated_array(rng, array: np.ndarray, canary: str) -> bytes:
    """A .npy file that resembles an array: other values, another dtype or shape, a header that lies, objects, no .npy.

    canary: the file that an unpickled object would create.
    """
    array, action = np.array(array), rng.random()
    body, descr = array.tobytes(), np.lib.format.dtype_to_descr(array.dtype)
    if action < 0.45 and array.dtype.kind in "iuf" and array.size:  # values that no check of the header sees
        odd = [0, 1, np.iinfo(np.int64).max, -1, 2**31, 65_535, 300, array.size, array.size - 1, 10**6]
        odd += [np.nan, np.inf, -np.inf, 1e38, 1e-45, -1e300] if array.dtype.kind == "f" else []
        flat = array.reshape(-1)
        for _ in range(int(pick(rng, (1, 1, 2, 9)))):
            with np.errstate(all="ignore"):
                value = np.asarray(pick(rng, odd)).astype(array.dtype, casting="unsafe")
            flat[pick(rng, (slice(None), int(rng.integers(flat.size)), int(rng.integers(flat.size))))] = value
        if rng.random() < 0.2:
            flat[:] = flat[::-1].copy()
        return saved(array)
    if action < 0.57:  # another shape, rightly declared
        shapes = [(), (0,), (1,), (array.size,), (1, array.size), (*array.shape, 1), (0, *array.shape[1:]), (2, 2, 2)]
        shapes += [array.shape[::-1], tuple(n + 1 for n in array.shape), tuple(max(0, n - 1) for n in array.shape)]
        return saved(np.resize(array, pick(rng, shapes)))
    if action < 0.67:  # another dtype, rightly declared
        with np.errstate(all="ignore"):
            try:
                return saved(array.astype(pick(rng, ODD_DTYPES)))
            except (ValueError, TypeError):
                return saved(np.zeros(array.shape, pick(rng, ODD_DTYPES[:14])))
    if action < 0.71:
        return saved(np.asfortranarray(array) if array.ndim > 1 else np.flip(array))
    if action < 0.86:  # a header that lies
        shape = pick(rng, (
            tuple(n * 10**6 for n in array.shape), (2**62, 4), (-1,), (-5, 8), (10**30,), (array.size + 1,), (2**63,),
            (1.5,), ("a",), (True,), [3], 7, None, (0, 2**63 - 1), (1,) * 65, (2**32, 2**32),
        ))  # fmt: skip
        dtype = pick(rng, (
            descr, "<f99", "|O", "|V0", "|S0", "", 5, None, [("a", "<f4"), ("b", "|O")], [("a", "<i8", (2**40,))],
            "<U0",
            [], ("<f4", (2, 2)), "|V2147483647",
        ))  # fmt: skip
        order = pick(rng, (False, True, 1, "no", None))
        fields = {"descr": descr, "fortran_order": False, "shape": array.shape}
        fields |= pick(rng, ({"shape": shape}, {"shape": shape}, {"descr": dtype}, {"fortran_order": order},
                             {"descr": dtype, "shape": shape}, {"extra": 1}))  # fmt: skip
        header = repr(fields) if rng.random() < 0.9 else "{" * 200 + "'descr'"
        return npy(header, body if rng.random() < 0.7 else body[: len(body) // 2], pick(rng, ((1, 0), (2, 0), (3, 0))))
    if action < 0.92:  # objects
        return saved(np.array([Canary(canary)] * max(1, len(array) if array.ndim else 1), object), allow_pickle=True)
    if action < 0.95:
        file = io.BytesIO()
        np.savez(file, a=array)
        return file.getvalue()
    if action < 0.97:
        return saved(np.zeros(array.shape[:1], [("version", "<u4"), ("counts", "<f4", 3)]))
    return pick(rng, (b"", b"\x93NUMPY", saved(array)[:-1], saved(array) + b"\0", b"text", pickle.dumps(Canary(canary)),
                      b"\x93NUMPY\x09\x00" + saved(array)[8:], saved(array)[:70]))  # fmt: skip


def parses_as_npy(data: bytes) -> bool:
    """Whether NumPy reads the header of a .npy file."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        reader.get(version, np.lib.format.read_array_header_2_0)(file)
    except Exception:
        return False
    return True


def parses_as_json(data: bytes) -> bool:
    """Whether Python's parser takes a file."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def parses_as_lines(data: bytes) -> bool:
    """Whether Python's parser takes every line of a file."""
    return all(parses_as_json(line) for line in data.splitlines() if line.strip())
