"""The kinds of place that documents come from, each as a stream: folders, text files, lines of JSON, Hub datasets.

A stream's order does not depend on the file system, and it holds one document at a time, of a folder also the names
beside the way down to it. A file is an entry before it is a document: its name and size are known, its text is not.
"""

import codecs
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

from retro_np.errors import UserError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON and file names can hold one, UTF-8 cannot
SNIFFED = 8192  # bytes looked at for a NUL, which no text file has
HUB_PLACE = re.compile(r"hub:(.+?)(?:@([^@#/]+))?(?:#([^#/]+))?", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A text, its name, and the source it is from; `replaced`: how much of it was no text and became U+FFFD."""

    name: str
    text: str
    source: str
    replaced: int = 0


class Entry(NamedTuple):
    """A document before it is read. size: bytes, of its file or of its text in UTF-8."""

    name: str
    size: int
    read: Callable[[], Document]


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, so that UTF-8 can hold it."""
    return LONE_SURROGATE.sub("\ufffd", text)


def checked_texts(texts: list[str]) -> list[str]:
    """Texts as an embedder takes them, without lone surrogates. Raises UserError for one alone and for no text."""
    if isinstance(texts, str):
        raise UserError("embed takes a list of texts, not one text: put it in brackets")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {i} is {type(text).__name__}, not a string")
    return [without_surrogates(text) for text in texts]


def folder_files(
    root: str,
    source: str,
    on_skip: Callable[[str], None],
    taken: Callable[[str], bool],
    entered: Callable[[str], bool],
    leave_out: str | None = None,
) -> Iterator[Entry]:
    """The text files below a folder, in the order of their relative paths (by code point).

    taken, entered: whether a file, a folder is wanted, by its relative path. Never wanted are the hidden, links to
    folders or out of root, what is no regular file, and the folder leave_out; the names of binary files go to
    on_skip. Raises UserError for what cannot be read.
    """
    base, real = os.path.join(os.fsencode(root), b""), os.path.realpath(os.fsencode(root))
    # a relative path that climbs out of root is met nowhere
    left_out = None if leave_out is None else os.path.relpath(os.path.realpath(os.fsencode(leave_out)), real) + b"/"
    pending = [b""]  # relative paths, the next one last; a folder's ends in a slash
    while pending:
        relative = pending.pop()
        name = without_surrogates(os.fsdecode(relative))
        if not relative or relative.endswith(b"/"):
            if relative != left_out and (not relative or entered(name.removesuffix("/"))):
                pending += [relative + key for key in reversed(_sorted_names(base + relative))]
        elif taken(name):
            path = os.fsdecode(base + relative)
            size = _size_of(path, os.fsdecode(real), left_out)
            if size is not None:
                if is_binary(path):
                    on_skip(name)
                else:
                    yield Entry(name, size, partial(_file_document, path, name, source))


def _sorted_names(folder: bytes) -> list[bytes]:
    """What a folder shows; folders have a slash at their end, so that sorting here sorts the whole paths."""
    try:
        with os.scandir(folder) as entries:
            shown = (entry for entry in entries if not entry.name.startswith(b"."))
            return sorted(entry.name + b"/" * entry.is_dir(follow_symlinks=False) for entry in shown)
    except OSError as error:
        _refuse(error, os.fsdecode(folder))


def _size_of(path: str, real_root: str, left_out: bytes | None) -> int | None:
    """Bytes of a regular file; None for anything else, and for a link to what is outside or left out."""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            target = os.path.relpath(os.path.realpath(path), real_root)
            if target.split("/")[0] == ".." or (left_out and os.fsencode(target).startswith(left_out)):
                return None
            if not os.path.exists(path):  # it leads nowhere, or in a circle
                return None
            status = os.stat(path)
    except OSError as error:
        _refuse(error, path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def text_file(path: str, source: str) -> Iterator[Entry]:
    """One text file; its name is without its folder."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        _refuse(error, path)
    name = without_surrogates(os.path.basename(path))
    yield Entry(name, size, partial(_file_document, path, name, source))


def _file_document(path: str, name: str, source: str) -> Document:
    text, replaced = _decoded(_read(path))
    return Document(name, text, source, replaced)


def is_binary(path: str) -> bool:
    """Whether a file has a NUL in its first 8 KiB. Raises UserError where it cannot be read."""
    return b"\0" in _read(path, SNIFFED)


def _read(path: str, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        _refuse(error, path)


def _refuse(error: OSError, path: str) -> NoReturn:
    reason = error.strerror or error
    raise UserError(
        f"cannot read {without_surrogates(path)} ({reason}): mend that, or move it out of the corpus"
    ) from error


def _decoded(data: bytes) -> tuple[str, int]:
    """UTF-8 text, and how often U+FFFD stands for bytes that were none."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def json_lines(path: str, source: str) -> Iterator[Entry]:
    """A document for each line of a .jsonl or .jsonl.gz file that is not blank, in the order of the lines.

    Its name is what `name` or else `id` holds, or else file:line. Raises UserError, which names the line, where one
    is no object with a `text` string, and where compressed data end early or are damaged.
    """
    file_name, number = without_surrogates(os.path.basename(path)), 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for line in file:
                number += 1
                record, replaced = _parsed(f"{without_surrogates(path)}:{number}", line)
                if record is not None:
                    yield _row_entry(record, f"{file_name}:{number}", source, replaced)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{without_surrogates(path)}:{number + 1} cannot be unpacked ({error}): the file is not whole gzip data, "
            f"fetch it again"
        ) from error
    except OSError as error:
        _refuse(error, path)


def _parsed(where: str, line: bytes) -> tuple[dict | None, int]:
    """The object of a line, None for a blank one, and how many of its bytes were replaced."""
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return None, 0
    text, replaced = _decoded(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where} is not JSON ({reason}): each line of a .jsonl file is one object") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where} has no `text` string: each line is an object like {{"text": "…"}}')
    return record, replaced


def _row_entry(record: dict, where: str, source: str, replaced: int = 0) -> Entry:
    """A document that came with its text: of a line of JSON, or of a dataset's row."""
    given = [record[key] for key in ("name", "id") if record.get(key) not in (None, "")]
    name, text = without_surrogates(str(given[0] if given else where)), record["text"]
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        text, surrogates = LONE_SURROGATE.subn("\ufffd", text)
        replaced, size = replaced + surrogates, len(text.encode())
    return Entry(name, size, partial(Document, name, text, source, replaced))


def hub_name(place: str) -> str:
    """What `hub:NAME[@CONFIG][#SPLIT]` calls its dataset: NAME, or of a local folder the folder's own name."""
    name, _, _ = _hub_parts(place)
    return os.path.basename(os.path.realpath(name)) if os.path.isdir(name) else name


def hub_dataset(place: str) -> Any:
    """Open `hub:NAME[@CONFIG][#SPLIT]` as a stream; the split is train unless given. Returns an IterableDataset.

    NAME is a dataset of the Hugging Face Hub, or a local folder that holds data files, for which no network is asked.
    Only the columns text, name and id are read. Raises UserError without the package, the dataset, or its text.
    """
    name, config, split = _hub_parts(place)
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{place} is read with the package datasets: pip install retro-np[hub]") from error
    # an absolute path cannot be taken for a dataset of the Hub, nor for a format such as `json`
    where = os.path.abspath(name) if os.path.isdir(name) else name
    try:
        dataset = datasets.load_dataset(where, config, split=split or "train", streaming=True)
        columns = dataset.column_names
    except Exception as error:  # of many kinds: the Hub's, the network's, the file formats'
        raise _unreadable(place, error) from error
    if columns is None:
        return dataset
    if "text" not in columns:
        raise UserError(f"{place} has no column `text` (it has {', '.join(columns)}): give a dataset of texts")
    return dataset.select_columns([column for column in ("text", "name", "id") if column in columns])


def hub_rows(place: str, dataset: Any, source: str) -> Iterator[Entry]:
    """A document for each row of an opened dataset, in its order; a text that is null is empty.

    Its name is what `name` or else `id` holds, or else NAME:row, from 0. Raises UserError where a row cannot be read.
    """
    label, rows, number = hub_name(place), iter(dataset), -1
    while True:
        try:
            record = next(rows, None)
        except Exception as error:  # as above
            raise _unreadable(place, error, f" after row {number}") from error
        if record is None:
            return
        number += 1
        if not isinstance(record.get("text", 0), str | None):
            raise UserError(f"{place} has no `text` string in row {number}: give a dataset of texts")
        yield _row_entry(record | {"text": record["text"] or ""}, f"{label}:{number}", source)


def _hub_parts(place: str) -> tuple[str, str | None, str | None]:
    match = HUB_PLACE.fullmatch(place)
    if not match:
        raise UserError(f"{place} names no dataset: write hub:NAME, hub:NAME@CONFIG or hub:NAME#SPLIT")
    return match.groups()


def _unreadable(place: str, error: Exception, where: str = "") -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return UserError(f"{place} cannot be read{where} ({reason}): check its name, and the network if it is on the Hub")
