"""Corpora that a stranger may have written: lines of JSON, names that steer a terminal or are not UTF-8, links."""

import gzip
import os
import shutil
from pathlib import Path

import pyarrow
from hostile.values import dumped, mutated_lines, odd_text, odd_value, pick
from pyarrow import parquet

FILE_NAMES = (
    b"plain.txt", b"a\x1b[2Jb.txt", b"\xff\xfe.txt", b"\xed\xa0\x80.txt", b"new\nline.txt", b"-o", b"a\x07.py",
    b"\xc2\x9b2J.txt",
    "\u202etxt.exe".encode(), b"[red]x[bold].txt", b" ", b"a" * 250, b"..a", b"*.txt", "é".encode(), b"\r\x1b[7K.md",
)  # fmt: skip
CONTENTS = (
    b"plain text of several words, " * 9, b"", b"\x00binary", b"\xff\xfea\x00b\x00", b"\xff\xff\xff",
    b"a\x1b[2J b\x07 " * 9,
    b"\xed\xa0\x80 lone", "\u202eright to left ".encode() * 9, b"\r\n" * 50, b"x" * 20_000, b"\xef\xbb\xbfwith a mark",
    b"\x85\x9b ",
)  # fmt: skip


def changed_lines(rng, data: bytes) -> bytes:
    """A .jsonl corpus with odd lines."""
    if rng.random() < 0.3:
        record = {
            "text": odd_text(rng) * 5,
            "name": odd_value(rng) if rng.random() < 0.5 else odd_text(rng),
            "id": odd_value(rng),
        }
        return data + dumped(record) + b"\n"
    return mutated_lines(rng, data)


def write_file(rng, folder: Path, data: bytes) -> Path:
    """Write a changed corpus: lines of JSON, plain or packed, a parquet file, or a dataset that was saved to disk."""
    kind = rng.random()
    if kind < 0.3:
        return _write_table(rng, folder, is_saved=kind < 0.15)
    data = changed_lines(rng, data)
    if kind < 0.4:
        path, data = folder / pick(rng, ("c.jsonl.zst", "c")), changed_bytes(rng, bytes(pyarrow.compress(data, "zstd")))
    elif kind < 0.6:
        packed = gzip.compress(data, 1)
        packed = pick(rng, (packed, packed[:-5], packed[: len(packed) // 2], b"\x1f\x8b" + packed[2:9], data))
        path, data = folder / "c.jsonl.gz", packed
    else:
        path = folder / "c.jsonl"
    path.write_bytes(data)
    return path


def _write_table(rng, folder: Path, is_saved: bool) -> Path:
    """Write a parquet file, or a folder as by `save_to_disk`, of odd rows; one of the files is damaged."""
    texts = [odd_text(rng).encode("utf-8", "replace").decode() for _ in range(int(rng.integers(1, 200)))]
    table = pyarrow.table({"text": texts, "id": range(len(texts)), "split": pick(rng, (["train"], ["x"])) * len(texts)})
    path = folder / ("saved" if is_saved else "c.parquet")
    if not is_saved:
        parquet.write_table(table, path)
        path.write_bytes(changed_bytes(rng, path.read_bytes()))
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    with pyarrow.ipc.new_stream(path / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    files = [{"filename": pick(rng, ("data-00000-of-00001.arrow",) * 5 + ("../c.parquet", "/etc/passwd", ""))}]
    state = {"_data_files": files, "_fingerprint": "a", "_format_columns": None, "_format_kwargs": {}}
    state |= {"_format_type": None, "_output_all_columns": False, "_split": None}
    (path / "state.json").write_bytes(dumped(state))
    (path / "dataset_info.json").write_bytes(dumped({"features": None}))
    damaged = pick(rng, sorted(path.iterdir()))
    damaged.write_bytes(changed_bytes(rng, damaged.read_bytes()))
    return path


def changed_bytes(rng, data: bytes) -> bytes:
    """Data of which some bytes are changed or the end is missing, or the same data."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(0, 5))):
        changed[int(rng.integers(len(data)))] = int(rng.integers(256))
    return bytes(changed[: int(rng.integers(1, len(data)))] if rng.random() < 0.2 else changed)


def write_folder(rng, folder: Path) -> Path:
    """Write a folder of a few files with odd names, contents, links and other kinds of files."""
    root = os.fsencode(folder / os.fsdecode(pick(rng, (b"corpus", b"corpus", b"c\x1b[2J", b"\xff\xfe", b"new\nline"))))
    os.makedirs(root, exist_ok=True)
    for number in range(int(rng.integers(1, 7))):
        name = pick(rng, FILE_NAMES)
        path = os.path.join(root, name if number else b"first " + name[:200])
        if os.path.lexists(path):
            continue
        action = rng.random()
        if action < 0.75:
            with open(path, "wb") as file:
                file.write(pick(rng, CONTENTS))
        elif action < 0.8:
            os.symlink(path, path)  # a loop
        elif action < 0.86:
            os.symlink(pick(rng, (b"/etc/passwd", b"../user/notes.txt", b"missing", b".", b"first plain.txt")), path)
        elif action < 0.9:
            os.mkfifo(path)
        elif action < 0.95:
            os.makedirs(os.path.join(path, b"\xfe inner"))
            with open(os.path.join(path, b"\xfe inner", name[:60]), "wb") as file:
                file.write(pick(rng, CONTENTS))
        else:
            os.mkdir(path, 0o700)
    return Path(os.fsdecode(root))
