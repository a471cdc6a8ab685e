"""Streams of documents, one for each kind of location: folders, text files, lines of JSON, Hub datasets.

A stream's order does not depend on the file system. Memory holds one document at a time and, for a folder, the names in
the folders on the current path. An Entry knows a document's name and size; the text is read on demand."""

import codecs
import gzip
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retro_np.errors import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON and file names can hold one, UTF-8 cannot
STDLIB = "stdlib"
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
LOCATION_FORMS = "a folder, a text file, a .jsonl or .jsonl.gz file, hub:NAME, or the name stdlib"
SNIFFED_BYTES = 8192  # A file with a NUL in its first bytes is binary.
NOT_TEXT = "is a binary file or UTF-16 (it has a NUL byte or a mark of UTF-16): convert it to UTF-8, as with iconv"
HUB_LOCATION = re.compile(r"hub:(.+?)(?:@([^@#/]+))?(?:#([^#/]+))?", re.DOTALL)

OnSkip = Callable[[str], None]
Takes = Callable[[str], bool]


@dataclass(frozen=True)
class Document:
    """A text, its name and its source's name. replaced: how many invalid byte sequences or surrogates became U+FFFD."""

    name: str
    text: str
    source: str
    replaced: int = 0


class Entry(NamedTuple):
    """A document that has not been read yet. size: bytes of its file, or of its text in UTF-8."""

    name: str
    size: int
    read: Callable[[], Document]


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD, so that the text can be encoded in UTF-8."""
    return LONE_SURROGATE.sub("\ufffd", text)


def opener(
    location: str, name: str, takes: Takes, enters: Takes, leave_out: Path | str | None
) -> Callable[[OnSkip], Iterator[Entry]]:
    """A function that iterates over the entries of the source `name`. It can be called any number of times.

    takes, enters, leave_out: see `folder_files`. Raises UserError for a location that does not exist or is binary."""
    if location == STDLIB:
        return lambda on_skip: folder_files(
            sysconfig.get_paths()["stdlib"], name, on_skip,
            lambda path: path.endswith(".py") and takes(path),
            lambda path: path.rpartition("/")[2] not in STDLIB_EXCLUDED and enters(path),
        )  # fmt: skip
    if location.startswith("hub:"):
        dataset = hub_dataset(location)  # opened once, so that every pass reads the same revision
        return lambda on_skip: hub_rows(location, dataset, name)
    if os.path.isdir(location):
        return lambda on_skip: folder_files(location, name, on_skip, takes, enters, leave_out)
    if not os.path.isfile(location):
        raise UserError(f"no corpus at {location}: give {LOCATION_FORMS}")
    if location.endswith((".jsonl", ".jsonl.gz")):
        return lambda on_skip: json_lines(location, name)
    if is_binary(location):
        raise UserError(f"{location} {NOT_TEXT}")
    return lambda on_skip: text_file(location, name)


def folder_files(
    root: str, source: str, on_skip: OnSkip, takes: Takes, enters: Takes, leave_out: Path | str | None = None
) -> Iterator[Entry]:
    """The text files below a folder, in the order of their relative paths (by code point).

    takes, enters: whether to take a file or enter a folder, given its relative path. Hidden files and files below
    leave_out are never taken. on_skip is called with the name of each other file that is skipped: binary files, special
    files, and links to anything but a file inside root and outside leave_out. Raises UserError for unreadable ones."""
    base, real = os.path.join(os.fsencode(root), b""), os.path.realpath(os.fsencode(root))
    # If leave_out is outside root, this path starts with "..". No relative path below root does.
    left_out = None if leave_out is None else os.path.relpath(os.path.realpath(os.fsencode(leave_out)), real) + b"/"
    pending = [b""]  # a stack of relative paths; those of folders end in a slash
    while pending:
        relative = pending.pop()
        name = without_surrogates(os.fsdecode(relative))
        if not relative or relative.endswith(b"/"):
            if relative != left_out and (not relative or enters(name.removesuffix("/"))):
                pending += [relative + key for key in reversed(_sorted_names(base + relative))]
        elif takes(name):
            path = os.fsdecode(base + relative)
            size = _size_of(path, os.fsdecode(real), left_out)
            if size is None or is_binary(path):
                on_skip(name)
            else:
                yield Entry(name, size, partial(_file_document, path, name, source))


def _sorted_names(folder: bytes) -> list[bytes]:
    """The visible names in a folder. A folder's name ends in a slash, so that sorting names sorts whole paths."""
    with _reading(os.fsdecode(folder)), os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith(b"."))
        return sorted(entry.name + b"/" * entry.is_dir(follow_symlinks=False) for entry in visible)


def _size_of(path: str, real_root: str, left_out: bytes | None) -> int | None:
    """The size of a regular file in bytes. None for anything else, and for a link that leads outside or to left_out."""
    with _reading(path):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            target = os.path.relpath(os.path.realpath(path), real_root)
            is_outside = target.split("/")[0] == ".." or (left_out and os.fsencode(target).startswith(left_out))
            if is_outside or not os.path.exists(path):  # The second is a broken or circular link.
                return None
            status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def text_file(path: str, source: str) -> Iterator[Entry]:
    """The one entry of a text file. Its name does not include the folder."""
    with _reading(path):
        size = os.stat(path).st_size
    name = without_surrogates(os.path.basename(path))
    yield Entry(name, size, partial(_file_document, path, name, source))


def _file_document(path: str, name: str, source: str) -> Document:
    text, replaced = _decoded(_read(path))
    return Document(name, text, source, replaced)


def is_binary(path: str) -> bool:
    """Whether a file has a NUL in its first 8 KiB or begins like UTF-16. Raises UserError if it cannot be read."""
    start = _read(path, SNIFFED_BYTES)
    return b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _read(path: str, size: int = -1) -> bytes:
    with _reading(path), open(path, "rb") as file:
        return file.read(size)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn the system's error into a UserError that names the file or folder."""
    try:
        yield
    except OSError as error:
        reason, path = error.strerror or error, without_surrogates(path)
        raise UserError(f"cannot read {path} ({reason}): fix that, or leave the file out") from error


def _decoded(data: bytes) -> tuple[str, int]:
    """Bytes as UTF-8 text, and how many invalid byte sequences became U+FFFD."""
    text = data.decode("utf-8", "replace")
    return text, text.count("\ufffd") - data.count("\ufffd".encode())


def json_lines(path: str, source: str) -> Iterator[Entry]:
    """One document for each line of a .jsonl or .jsonl.gz file, in order; blank lines are skipped.

    A document is named by its `name`, else by its `id`, else file:line. Raises UserError, with the line's number, if a
    line is not an object with a `text` string, or if compressed data are truncated or damaged."""
    shown, number = without_surrogates(path), 0
    with _reading(path), gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                record, replaced = _parsed(f"{shown}:{number}", line)
                if record is not None:
                    yield _row_entry(record, f"{os.path.basename(shown)}:{number}", source, replaced)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            fault = f"{shown}:{number + 1} cannot be unpacked ({error})"
            raise UserError(f"{fault}: the gzip file is damaged or incomplete; download it again") from error


def _parsed(where: str, line: bytes) -> tuple[dict | None, int]:
    """The object in a line, or None if the line is blank, and how many invalid byte sequences were replaced."""
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return None, 0
    text, replaced = _decoded(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where} is not JSON ({reason}): each line of a .jsonl file must be an object") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where} has no `text` string: each line must be an object like {{"text": "…"}}')
    return record, replaced


def _row_entry(record: dict, fallback: str, source: str, replaced: int = 0) -> Entry:
    """The entry of a line of JSON or of a dataset's row, whose text is already in memory."""
    names = [record[key] for key in ("name", "id") if record.get(key) not in (None, "")]
    name, text = without_surrogates(str([*names, fallback][0])), record["text"]
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        text, surrogates = LONE_SURROGATE.subn("\ufffd", text)
        replaced, size = replaced + surrogates, len(text.encode())
    return Entry(name, size, partial(Document, name, text, source, replaced))


def default_name(location: str) -> str:
    """The name of a source without one: that of the resolved file or folder, of the Hub's dataset, or stdlib."""
    if location == STDLIB:
        return STDLIB
    if location.startswith("hub:"):
        location = _hub_parts(location)[0]
        if not os.path.isdir(location):
            return without_surrogates(location)
    with suppress(ValueError):  # for a string that can name no file
        return without_surrogates(os.path.basename(os.path.realpath(location))) or location
    return location


def hub_dataset(location: str) -> Any:
    """Open `hub:NAME[@CONFIG][#SPLIT]` as a stream, an IterableDataset. The default split is train.

    NAME is a dataset of the Hugging Face Hub, or a local folder of data files, which needs no network. Only the columns
    text, name and id are read. Raises UserError if the package, the dataset or its column text is missing."""
    name, config, split = _hub_parts(location)
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{location} needs the package datasets: pip install retro-np[hub]") from error
    # an absolute path cannot be mistaken for a dataset of the Hub or for a format such as `json`
    path = os.path.abspath(name) if os.path.isdir(name) else name
    try:
        dataset = datasets.load_dataset(path, config, split=split or "train", streaming=True)
        columns = dataset.column_names
    except Exception as error:  # errors of the Hub, the network and the file formats share no base class
        raise _unreadable(location, error) from error
    if columns is None:
        return dataset
    if "text" not in columns:
        raise UserError(f"{location} has no column `text` (it has {', '.join(columns)}): give a dataset of texts")
    return dataset.select_columns([column for column in ("text", "name", "id") if column in columns])


def hub_rows(location: str, dataset: Any, source: str) -> Iterator[Entry]:
    """One document for each row of an opened dataset, in order. A null text counts as empty.

    A document is named by its `name`, else its `id`, else NAME:row, from 0. Raises UserError for unreadable rows."""
    label, rows, number = default_name(location), iter(dataset), -1
    while True:
        try:
            record = next(rows, None)
        except Exception as error:  # as in hub_dataset
            raise _unreadable(location, error, f" after row {number}") from error
        if record is None:
            return
        number += 1
        if not isinstance(record.get("text", 0), str | None):
            raise UserError(f"{location} has no `text` string in row {number}: give a dataset of texts")
        yield _row_entry(record | {"text": record["text"] or ""}, f"{label}:{number}", source)


def _hub_parts(location: str) -> tuple[str, str | None, str | None]:
    if match := HUB_LOCATION.fullmatch(location):
        return match[1], match[2], match[3]
    raise UserError(f"{location} names no dataset: write hub:NAME, hub:NAME@CONFIG or hub:NAME#SPLIT")


def _unreadable(location: str, error: Exception, row: str = "") -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return UserError(f"{location} cannot be read{row} ({reason}): check its name, and the network if it is on the Hub")
