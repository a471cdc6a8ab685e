"""Streams of documents, one for each kind of location: folders, text files, and files and datasets of rows.

A stream's order does not depend on the file system. Memory holds one document or batch of rows at a time and, for a
folder, the names in the folders on the current path. An Entry knows a document's name and size; a file of text is read
on demand. What a file holds is told by its first bytes; only lines of JSON are told by the name, .jsonl."""

import codecs
import functools
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retro_np.errors import UserError
from retro_np.files import outputs
from retro_np.progress import say
from retro_np.retrieval import rows as readers
from retro_np.retrieval.rows import NO_FIELD, SPLIT_NAMES, Fields, Row, listed, split_of, without_surrogates

STDLIB = "stdlib"
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
LOCATION_FORMS = "a folder, a text, rows (.jsonl, .jsonl.gz, .jsonl.zst, parquet, save_to_disk), hub:DATASET, or stdlib"
MAGIC = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes of files
PACKED = {".gz": "gzip", ".zst": "zstd"}  # also recognised by the name, so that damage is noticed
SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # files that `save_to_disk` writes to a folder
OURS = outputs.DATABASE.marks | outputs.RUN.marks  # files by which a folder is recognised as a database or run
SKIPPED = "binary, special, or links that lead to no file inside the folder, or databases and runs"
SNIFFED_BYTES = 8192  # A file with a NUL in its first bytes is binary.
NOT_TEXT = "is a binary file or UTF-16 (it has a NUL byte or a mark of UTF-16): convert it to UTF-8, as with iconv"

OnSkip = Callable[[str], None]
Takes = Callable[[str], bool]


@dataclass(frozen=True)
class Document:
    """A text, its name and its source's name. replaced: how many invalid byte sequences or surrogates became U+FFFD.

    split: train, valid or test, or "" if the source does not say. row: the row, as messages say it; "" for a text."""

    name: str
    text: str
    source: str
    replaced: int = 0
    split: str = ""
    row: str = ""


class Entry(NamedTuple):
    """A document that has not been read yet. size: bytes of its file, or of its text in UTF-8. Others: see Document."""

    name: str
    size: int
    read: Callable[[], Document]
    split: str = ""
    row: str = ""


class RowReader:
    """Makes documents of one source's rows, in one pass over them. Its first row tells whether `split` is a field.

    split: the split of the whole source, or "". tell: is given a line about a field of the split that is used."""

    def __init__(self, source: str, split: str, fields: Fields, tell: Callable[[str], None]):
        self.source, self.split, self.tell = source, split, tell
        self.fields = replace(fields, split=NO_FIELD) if split and fields.split else fields
        self.by_field = not split and fields.split is not None  # whether the user decided about the rows' splits
        # Whether a row with a split, not the first, is an error. None: the first row is still to come.
        self.ignores = None if fields.split is None else False

    def entries(self, rows: Iterable[Row], split: str = "") -> Iterator[Entry]:
        """The document of each row. split: of all rows. Raises UserError for a row without text, name or split."""
        for row in rows:
            stated = split_of(row.record.get("split"))
            if self.ignores is None and not split and not self.split:
                self.ignores = not stated
                if stated:
                    self.fields = replace(self.fields, split="split")
                    where = "the field `split` of its rows decides what trains, validates and tests"
                    self.tell(f"{self.source}: {where}; to ignore it: --split-field {NO_FIELD}")
            elif self.ignores is not False and stated and stated != (split or self.split):
                if not (given := split or self.split):
                    fault = f"{row.place} has {stated} in `split`{row.number}, unlike the first row"
                    raise UserError(f"{fault}: use --split-field split, or --split-field {NO_FIELD} to train on it")
                self.tell(f"{self.source} was given as {given}, so the field `split` of its rows is ignored")
            yield self._entry(row, split)

    def text(self, path: str, name: str, size: int) -> Entry:
        """The document of a text file. Raises UserError if a field was named for the split."""
        if self.by_field and self.fields.split != NO_FIELD:
            fault = f"{name} is a text and has no field `{self.fields.split}`"
            raise UserError(f"{fault}: leave the file out, as with --exclude, or leave out --split-field")
        return Entry(name, size, partial(file_document, path, name, self.source), self.split)

    def saved(self, folder: str, name: str) -> Iterator[Entry]:
        """The documents of a folder that `save_to_disk` wrote. Its splits are ours, unless a field was named."""
        for split, rows in readers.saved_rows(folder, name, self.fields):
            if split and not self.by_field and (self.split or split not in SPLIT_NAMES):
                reason = f"but was given as {self.split}" if self.split else f"none of {', '.join(SPLIT_NAMES)}"
                fault = f"{without_surrogates(folder)} has the split {split}, {reason}"
                raise UserError(f"{fault}: give the folders of its splits instead, such as its folder {split}")
            yield from self.entries(rows, "" if self.by_field else SPLIT_NAMES.get(split, ""))

    def _entry(self, row: Row, split: str) -> Entry:
        (record, name, place, number, replaced), fields = row, self.fields
        text, keys, there = record.get(fields.text), (fields.name,) if fields.name else ("name", "id"), listed(record)
        if not isinstance(text, str):
            instead = f"but {_shown(text)}" if fields.text in record else f"(it has {there})"
            advice = "leave such rows out, or name the field of the text with --text-field"
            raise UserError(f"{place} has no `{fields.text}` string{number} {instead}: {advice}")
        given = next((record[key] for key in keys if record.get(key) not in (None, "")), None)
        if fields.name and isinstance(given, bool | bytes | list | dict | None):
            fault = f"{place} has no name in `{fields.name}`{number} (it has {there})"
            raise UserError(f"{fault}: name another field with --name-field, or leave the option out")
        if not split and fields.split not in (None, NO_FIELD):
            split = split_of(record.get(fields.split))
            if not split:
                fault = f"{place} has {_shown(record.get(fields.split))} in `{fields.split}`{number} (it has {there})"
                raise UserError(f"{fault}: write {', '.join(SPLIT_NAMES)}, or ignore it with --split-field {NO_FIELD}")
        text, surrogates = readers.LONE_SURROGATE.subn("\ufffd", text)
        name = without_surrogates(str(name if given is None else given))
        read = partial(Document, name, text, self.source, replaced + surrogates)
        return Entry(name, len(text.encode()), read, split or self.split, place + number)


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.80}"


def opener(
    location: str, name: str, split: str, fields: Fields, takes: Takes, enters: Takes, leave_out: Path | str | None
) -> Callable[[OnSkip], Iterator[Entry]]:
    """A function that iterates over the entries of the source `name`. It can be called any number of times.

    split, fields: see `RowReader`. takes, enters, leave_out: see `folder_files`. Raises UserError for a location that
    does not exist or is binary."""
    tell = functools.cache(say)  # a line is said in the first pass alone
    reader = lambda: RowReader(name, split, fields, tell)  # noqa: E731
    if location == STDLIB:
        return lambda on_skip: folder_files(
            sysconfig.get_paths()["stdlib"], reader(), on_skip,
            lambda path: path.endswith(".py") and takes(path),
            lambda path: path.rpartition("/")[2] not in STDLIB_EXCLUDED and enters(path),
        )  # fmt: skip
    if location.startswith("hub:"):
        folder, *chosen = readers.hub_parts(location)
        saved = saved_files(os.listdir(folder)) if os.path.isdir(folder) else set()
        if any(chosen) and saved and "dataset_dict.json" not in saved:
            raise UserError(f"{location} names a part of a saved dataset that has no parts: give {folder}")
        if any(chosen) or not saved:
            dataset = readers.hub_dataset(location, reader().fields)  # once, so that no pass reads another revision
            return lambda on_skip: reader().entries(readers.hub_rows(dataset, location, default_name(location)))
        location = folder
    if os.path.isdir(location):
        return lambda on_skip: folder_files(location, reader(), on_skip, takes, enters, leave_out)
    if not os.path.isfile(location):
        raise UserError(f"no corpus at {location}: give {LOCATION_FORMS}")
    kind, base = kind_of(location), without_surrogates(os.path.basename(location))
    if kind == "parquet":
        return lambda on_skip: reader().entries(readers.parquet_rows(location, base, reader().fields))
    if kind in PACKED.values() or location.endswith((".jsonl", *(f".jsonl{suffix}" for suffix in PACKED))):
        packing = kind if kind in PACKED.values() else PACKED.get(os.path.splitext(location)[1], "")
        return lambda on_skip: reader().entries(readers.json_rows(location, packing))
    if kind == "binary":
        raise UserError(f"{location} {NOT_TEXT}")
    return lambda on_skip: iter([reader().text(location, base, _size_of(location, "/", None) or 0)])


def folder_files(
    root: str, reader: RowReader, on_skip: OnSkip, takes: Takes, enters: Takes, leave_out: Path | str | None = None
) -> Iterator[Entry]:
    """The text files below a folder, in the order of their relative paths (by code point).

    Parquet files, and folders that `save_to_disk` wrote, give a document for each row; lines of JSON are one text.
    takes, enters: whether to take a file or enter a folder, given its relative path. Hidden files and files below
    leave_out are never taken. on_skip is called with the name of each other file that is skipped: binary files, special
    files, and links to anything but a file inside root and outside leave_out; so is the folder of a database or run.
    Raises UserError for a file that cannot be read, and for half of what `save_to_disk` wrote."""
    base, real = os.path.join(os.fsencode(root), b""), os.path.realpath(os.fsencode(root))
    # If leave_out is outside root, this path starts with "..". No relative path below root does.
    left_out = None if leave_out is None else os.path.relpath(os.path.realpath(os.fsencode(leave_out)), real) + b"/"
    pending = [b""]  # a stack of relative paths; those of folders end in a slash
    while pending:
        relative = pending.pop()
        name = without_surrogates(os.fsdecode(relative))
        if not relative or relative.endswith(b"/"):
            if relative != left_out and (not relative or enters(name.removesuffix("/"))):
                keys = _sorted_names(base + relative)
                names, folder = set(map(os.fsdecode, keys)), os.fsdecode(base + relative)[:-1]
                if any(outputs.is_mark(Path(folder, file), OURS[file]) for file in names & OURS.keys()):
                    on_skip(name or folder)
                elif saved := saved_files(names):
                    if all(takes(name + file) for file in saved):
                        yield from reader.saved(folder, name[:-1] or default_name(root))
                elif any(file.endswith(".arrow") for file in names) and any(takes(name + f) for f in names & SAVED[1]):
                    fault = f"{without_surrogates(folder)} is half of what save_to_disk writes (.arrow without .json)"
                    raise UserError(f"{fault}: write it again with save_to_disk, or leave it out, as with --exclude")
                else:
                    pending += [relative + key for key in reversed(keys)]
        elif takes(name):
            path = os.fsdecode(base + relative)
            size = _size_of(path, os.fsdecode(real), left_out)
            kind = None if size is None else kind_of(path)
            if kind == "parquet":
                yield from reader.entries(readers.parquet_rows(path, name, reader.fields))
            elif size is None or kind != "text":
                on_skip(name)
            else:
                yield reader.text(path, name, size)


def saved_files(names: Iterable[str]) -> set[str]:
    """The files by which a folder with these names is recognised as one that `save_to_disk` wrote; empty for others."""
    there = set(names)
    return next((files for files in SAVED if files <= there), set())


def _sorted_names(folder: bytes) -> list[bytes]:
    """The visible names in a folder. A folder's name ends in a slash, so that sorting names sorts whole paths."""
    with readers.reading(os.fsdecode(folder)), os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith(b"."))
        return sorted(entry.name + b"/" * entry.is_dir(follow_symlinks=False) for entry in visible)


def _size_of(path: str, real_root: str, left_out: bytes | None) -> int | None:
    """The size of a regular file in bytes. None for anything else, and for a link that leads outside or to left_out."""
    with readers.reading(path):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            target = os.path.relpath(os.path.realpath(path), real_root)
            is_outside = target.split("/")[0] == ".." or (left_out and os.fsencode(target).startswith(left_out))
            if is_outside or not os.path.exists(path):  # The second is a broken or circular link.
                return None
            status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def file_document(path: str, name: str, source: str) -> Document:
    """The document in a text file. Raises UserError if it cannot be read."""
    with readers.reading(path), open(path, "rb") as file:
        text, replaced = readers.decoded(file.read())
    return Document(name, text, source, replaced)


def kind_of(path: str) -> str:
    """What a file's bytes are: text, binary, parquet, gzip or zstd. Raises UserError if it cannot be read.

    A file is binary if it has a NUL in its first 8 KiB or begins like UTF-16; if it then begins with PAR1, parquet."""
    with readers.reading(path), open(path, "rb") as file:
        start = file.read(SNIFFED_BYTES)
    is_binary = b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    kinds = (kind for magic, kind in MAGIC.items() if start.startswith(magic) and (is_binary or kind != "parquet"))
    return next(kinds, "binary" if is_binary else "text")


def default_name(location: str) -> str:
    """The name of a source without one: that of the resolved file or folder, of the Hub's dataset, or stdlib."""
    if location.startswith("hub:"):
        location = readers.hub_parts(location)[0]
        if not os.path.isdir(location):
            return without_surrogates(location)
    with suppress(ValueError):  # for a string that can name no file
        return without_surrogates(os.path.basename(os.path.realpath(location))) or location
    return location
