"""Documents from a folder, a file, JSONL, or Python's own standard library."""

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from retro_np.errors import UserError

STDLIB = "stdlib"
STDLIB_WITHOUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON and file names can hold one, UTF-8 cannot
SNIFFED = 8192  # bytes looked at for a NUL, which no text file has


@dataclass(frozen=True)
class Document:
    """A text, its name, and the corpus it is from; `replaced`: how much of it was no text and became U+FFFD."""

    name: str
    text: str
    source: str
    replaced: int = 0


class Place(NamedTuple):
    """Where a document is: a file, or the line of a .jsonl file that begins at an offset. size: bytes, about."""

    name: str
    path: Path
    size: int
    offset: int | None = None


@dataclass(frozen=True)
class Corpus:
    """A list of where documents are, sorted by name. Texts are read again whenever they are needed, one at a time."""

    source: str
    places: list[Place]
    skipped: list[str] = field(default_factory=list)  # binary files

    def names(self) -> list[str]:
        """The names of all documents, sorted."""
        return [place.name for place in self.places]

    def documents(self) -> Iterator[Document]:
        """Read the documents, in order. Raises UserError for a file that cannot be read."""
        lines: BinaryIO | None = None
        try:
            for place in self.places:
                if place.offset is None:
                    yield _clean(place.name, _read(place.path), self.source)
                else:
                    lines = lines or place.path.open("rb")
                    yield _read_line(place, lines, self.source)
        finally:
            if lines is not None:
                lines.close()

    def where(self, holds: Callable[[str], bool]) -> "Corpus":
        """The part whose names fulfil a condition."""
        return replace(self, places=[place for place in self.places if holds(place.name)])


def read_corpus(source: str | Path) -> Iterator[Document]:
    """All documents of a corpus, sorted by name. See `find_corpus`."""
    return find_corpus(source).documents()


def find_corpus(source: str | Path, leave_out: str | Path | None = None) -> Corpus:
    """List what a corpus holds: `stdlib`, a folder, a .jsonl file with `text` on each line, or one text file.

    In a folder every regular file is a document, but hidden ones, binary ones (a NUL in the first 8 KiB) and links
    that lead out of it. leave_out: a folder inside it that is no part of it. Raises UserError for a missing or empty
    corpus, a single binary file, a bad line of JSONL, a file that cannot be read.
    """
    if str(source) == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [path for path in _walk(root, STDLIB_WITHOUT, None) if path.suffix == ".py"]
        return _checked(Corpus(STDLIB, _places(root, found)), root)
    if not str(source):
        raise UserError("no corpus is named: give a folder, a text file, a .jsonl file, or the name stdlib")
    path = Path(source)
    name = path.resolve().name
    if path.is_dir():
        found = _walk(path, frozenset(), leave_out)
        binary = {file for file in found if _is_binary(file)}
        skipped = [_name(path, file) for file in found if file in binary]
        return _checked(Corpus(name, _places(path, [f for f in found if f not in binary]), skipped), path)
    if not path.is_file():
        raise UserError(f"no corpus at {path}: give a folder, a text file, a .jsonl file, or the name stdlib")
    if path.suffix == ".jsonl":
        return _checked(Corpus(name, _list_lines(path)), path)
    if _is_binary(path):
        raise UserError(f"{path} is a binary file (it has a NUL byte), and a corpus is text: give another")
    return _checked(Corpus(name, _places(path.parent, [path])), path)


def place_of(name: str) -> float:
    """A number in [0, 1) that depends on a name alone: the first 8 bytes of its SHA-256 over 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def held_out(name: str, share: float) -> bool:
    """Whether a document is kept from training, tokenizer and database: the same on every machine."""
    return place_of(name) < share


def limited(corpus: Corpus, limit_bytes: int | None) -> Corpus:
    """A slice of at most so many bytes, at least one document, taken in an order that the names' hashes settle.

    A document too long for what is left is passed over. The order is not that of `held_out`, so that a slice holds
    its share of held-out documents.
    """
    if limit_bytes is None:
        return corpus
    order = sorted(corpus.places, key=lambda place: place_of("slice " + place.name))
    taken, total = [], 0
    for place in order:
        if total + place.size <= limit_bytes:
            taken.append(place)
            total += place.size
    return replace(corpus, places=sorted(taken or order[:1], key=_order))


def _order(place: Place):
    return place.name, place.offset or 0


def _name(root: Path, path: Path) -> str:
    return LONE_SURROGATE.sub("\ufffd", path.relative_to(root).as_posix())


def _places(root: Path, paths: list[Path]) -> list[Place]:
    return sorted((Place(_name(root, path), path, path.stat().st_size) for path in paths), key=_order)


def _walk(root: Path, without: frozenset[str], leave_out: str | Path | None) -> list[Path]:
    """Regular files below root; nothing hidden, no link that leads out."""
    real_root = root.resolve()
    left_out = None if leave_out is None else Path(leave_out).resolve()
    found = []
    for folder, folders, names in os.walk(root, onerror=_refuse):
        here = Path(folder)
        folders[:] = [f for f in folders if not f.startswith(".") and f not in without]
        folders[:] = [f for f in folders if left_out is None or (here / f).resolve() != left_out]
        for name in names:
            path = here / name
            inside = not path.is_symlink() or path.resolve().is_relative_to(real_root)
            if not name.startswith(".") and inside and path.is_file():
                found.append(path)
    return sorted(found)


def _refuse(error: OSError):
    raise UserError(
        f"cannot read {error.filename} ({error.strerror}): mend that, or move it out of the corpus"
    ) from error


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        error.filename = path
        _refuse(error)


def _is_binary(path: Path) -> bool:
    return b"\0" in _read(path, SNIFFED)


def _checked(corpus: Corpus, where: Path) -> Corpus:
    if not any(place.size for place in corpus.places):
        hint = f" ({len(corpus.skipped)} binary files were left out)" if corpus.skipped else ""
        raise UserError(f"{where} holds no text to build from{hint}: give a corpus with at least one document")
    return corpus


def _decoded(data: bytes) -> tuple[str, int]:
    """UTF-8 text, and how often U+FFFD stands for bytes that were none."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def _clean(name: str, data: bytes, source: str) -> Document:
    text, replaced = _decoded(data)
    return Document(name, text, source, replaced)


def _list_lines(path: Path) -> list[Place]:
    """The documents of a JSONL file, sorted by name: `name` or `id` where given, else file and line."""
    places, seen, offset = [], set(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}:{number}"
                record, _ = _parsed(f"{path}:{number}", line)
                given = [record[key] for key in ("name", "id") if record.get(key) is not None]
                name = LONE_SURROGATE.sub("\ufffd", str(given[0] if given else where))
                name = f"{name} ({where})" if name in seen else name
                seen.add(name)
                places.append(Place(name, path, len(record["text"].encode("utf-8", "replace")), offset))
            offset += len(line)
    return sorted(places, key=_order)


def _parsed(where: str, line: bytes) -> tuple[dict, int]:
    text, replaced = _decoded(line)
    try:
        record = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): each line of a .jsonl file is one object") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where} has no `text` string: each line is an object like {{"text": "…"}}')
    return record, replaced


def _read_line(place: Place, file: BinaryIO, source: str) -> Document:
    file.seek(place.offset)
    record, replaced = _parsed(f"{place.path} at byte {place.offset}", file.readline())
    text, surrogates = LONE_SURROGATE.subn("\ufffd", record["text"])
    return Document(place.name, text, source, replaced + surrogates)
