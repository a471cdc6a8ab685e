"""Corpora that a stranger may have written: lines of JSON, names that steer a terminal or are not UTF-8, links."""

import gzip
import os
from pathlib import Path

from hostile.values import dumped, mutated_lines, odd_text, odd_value, pick

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
    """Write a changed .jsonl or .jsonl.gz corpus."""
    data = changed_lines(rng, data)
    if rng.random() < 0.25:
        packed = gzip.compress(data, 1)
        packed = pick(rng, (packed, packed[:-5], packed[: len(packed) // 2], b"\x1f\x8b" + packed[2:9], data))
        path, data = folder / "c.jsonl.gz", packed
    else:
        path = folder / "c.jsonl"
    path.write_bytes(data)
    return path


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
