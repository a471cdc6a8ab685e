"""What a database is built from: documents of one source or of several, streamed; which are held out; a slice."""

import hashlib
import math
import os
import re
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.retrieval.sources import (
    LONE_SURROGATE,
    Document,
    Entry,
    folder_files,
    hub_dataset,
    hub_name,
    hub_rows,
    is_binary,
    json_lines,
    text_file,
    without_surrogates,
)

__all__ = [
    "LONE_SURROGATE", "STDLIB", "Corpus", "Document", "Source", "find_corpus", "held_out", "limited", "parse_source",
    "place_of", "read_corpus", "sources_of",
]  # fmt: skip

STDLIB = "stdlib"
STDLIB_WITHOUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
KINDS = "a folder, a text file, a .jsonl or .jsonl.gz file, hub:NAME, or the name stdlib"
SPEC_NAME = re.compile(r"([A-Za-z0-9_.-]+)=(.*)", re.DOTALL)
SPEC_WEIGHT = re.compile(r"(.*):([+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf))", re.DOTALL | re.I)

OnSkip = Callable[[str], None]


def _pass_over(name: str) -> None:
    """A binary file that nobody asked about."""


@dataclass(frozen=True)
class Source:
    """A place that documents are from, what it is called, and its share of the training mixture, of any scale."""

    name: str
    place: str
    weight: float | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents of some sources, in an order of their own: read afresh, one at a time, whenever they are needed."""

    sources: list[Source]
    entries: Callable[[OnSkip], Iterator[Entry]]

    def names(self) -> Iterator[str]:
        """The documents' names, in their order; of a plain file no more is read than whether it is binary."""
        return (entry.name for entry in self.entries(_pass_over))

    def documents(self, on_skip: OnSkip = _pass_over) -> Iterator[Document]:
        """Read the documents, in order; binary files are passed over and their names told to on_skip.

        Sources come as they were given; a folder in the order of its relative paths, other sources in that of their
        lines. Raises UserError for a file that cannot be read, or is gone, and for a bad line of JSONL.
        """
        return (entry.read() for entry in self.entries(on_skip))

    def where(self, holds: Callable[[str], bool]) -> "Corpus":
        """The part whose names fulfil a condition."""
        return replace(self, entries=lambda on_skip: (entry for entry in self.entries(on_skip) if holds(entry.name)))


def parse_source(text: str) -> Source:
    """A source from `name=place:weight`, where name and weight may be left out.

    A place may hold `:` and `=` itself: `:` and a number at the end is the weight, and the first `=` ends the name
    where only letters, digits and `_.-` stand before it. Without a name a source is called as its place is: the
    resolved file or folder, the dataset, or stdlib. Raises UserError for an empty name or place and a weight that is
    not above 0.
    """
    place, weight = text, None
    if (match := SPEC_WEIGHT.fullmatch(text)) and match[1] != "hub" and not match[1].endswith("=hub"):
        place, weight = match[1], float(match[2])
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{text} has the weight {match[2]}: a source's weight is a number above 0")
    if place.startswith("="):
        raise UserError(f"{text} has an empty name: write name=place, or the place alone")
    name, place = match.groups() if (match := SPEC_NAME.fullmatch(place)) else (None, place)
    if not place:
        raise UserError(f"{text or 'an empty source'} names no place: give {KINDS}")
    return Source(name or _own_name(place), place, weight)


def sources_of(specs: Iterable[str]) -> list[Source]:
    """Several sources, see `parse_source`. Raises UserError where two have one name, or only some have weights."""
    sources = [parse_source(spec) for spec in specs]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are called {name}: give each a name of its own, as in NAME=PLACE")
    bare = [source.name for source in sources if source.weight is None]
    if 0 < len(bare) < len(sources):
        raise UserError(f"{bare[0]} has no weight and others have: give every source a weight, or none")
    return sources


def find_corpus(
    source: str | Path | list[Source],
    leave_out: str | Path | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Corpus:
    """The documents of a place, which is taken as it stands, or of several sources.

    A place is `stdlib`, a folder, a .jsonl or .jsonl.gz file with `text` on each line, a text file, or
    `hub:NAME[@CONFIG][#SPLIT]`. In a folder every regular file is a document, but hidden ones, binary ones (a NUL in
    the first 8 KiB), links that lead out of it, and what is below the folder leave_out. include, exclude: patterns for
    the relative paths in folders (see `pattern_parts`); a file is taken where an include fits, or none is given, and
    no exclude does. Raises UserError for a place that is missing or holds no text, and for a single binary file.
    """
    sources = source if isinstance(source, list) else [_place(source)]
    if not sources:
        raise UserError(f"no corpus is named: give {KINDS}")
    included, excluded = _one_of(include), _one_of(exclude)

    def entered(name: str) -> bool:
        return not excluded(name)

    def wanted(name: str) -> bool:
        return (not include or included(name)) and not excluded(name)

    streams = [_stream(each, wanted, entered, leave_out) for each in sources]
    for each, stream in zip(sources, streams, strict=True):
        _check_text(each, stream, bool(include or exclude))
    return Corpus(sources, lambda on_skip: (entry for stream in streams for entry in stream(on_skip)))


def check_apart(database: Path, corpus: Corpus) -> None:
    """Raise UserError where a source is a database's own folder, or lies in it: it would take in what it writes."""
    home = Path(database).resolve()
    for source in corpus.sources:
        if os.path.exists(source.place) and Path(source.place).resolve().is_relative_to(home):
            raise UserError(f"{source.place} is the database {database} itself, or in it: give texts from elsewhere")


def read_corpus(source: str | Path | list[Source]) -> Iterator[Document]:
    """All documents of a corpus, in its order. See `find_corpus`."""
    return find_corpus(source).documents()


def pattern_parts(pattern: str) -> tuple[str, ...]:
    """The parts of a pattern for relative paths, as in .gitignore; upper and lower case differ.

    A pattern fits a file, and a folder with all that is below it. `*`, `?` and `[…]` stand for anything but a slash,
    `**` for any number of folders, at the end for all that is below. One without a slash, but at its end, fits at any
    depth, others from the top; a slash at the end fits folders alone. Raises UserError for an empty one.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if not parts:
        raise UserError(f"the pattern {pattern!r} fits nothing: give one such as *.py or src/**")
    anchored, folder = "/" in pattern.rstrip("/"), pattern.endswith("/")
    return (*(() if anchored else ("**",)), *parts, *(("**",) if folder else ()))


def place_of(name: str) -> float:
    """A number in [0, 1) that depends on a name alone: the first 8 bytes of its SHA-256 over 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def held_out(name: str, share: float) -> bool:
    """Whether a document is kept from training, tokenizer and database: the same on every machine."""
    return place_of(name) < share


def limited(corpus: Corpus, limit_bytes: int | None) -> Corpus:
    """A slice of at most so many bytes, at least one document, taken in an order that the names' hashes settle.

    A document too long for what is left is passed over. The order is not that of `held_out`, so that a slice holds
    its share of held-out documents. It remembers 9 bytes a document of the whole corpus, and takes about 30 to find.
    """
    if limit_bytes is None:
        return corpus
    hashes, sizes = array("d"), array("q")
    for entry in corpus.entries(_pass_over):
        hashes.append(_slice_order(entry.name))
        sizes.append(entry.size)
    order = np.argsort(np.asarray(hashes), kind="stable")
    chosen, left, smallest = np.zeros(len(order), bool), limit_bytes, min(sizes, default=0)
    for number in order:
        if sizes[number] <= left:
            chosen[number] = True
            left -= sizes[number]
        if left < smallest:
            break
    if not chosen.any():
        chosen[order[:1]] = True
    return replace(corpus, entries=partial(_chosen, corpus, hashes, chosen))


def _slice_order(name: str) -> float:
    return place_of("slice " + name)


def _chosen(corpus: Corpus, hashes: array, chosen: np.ndarray, on_skip: OnSkip) -> Iterator[Entry]:
    number = -1
    for number, entry in enumerate(corpus.entries(on_skip)):
        # the choice goes by number: with a document more or less it would be of others
        if number >= len(hashes) or hashes[number] != _slice_order(entry.name):
            raise UserError(f"the corpus changed while it was read, at {entry.name}: leave it alone and run again")
        if chosen[number]:
            yield entry
    if number + 1 < len(hashes):
        raise UserError("the corpus changed while it was read, a document is gone: leave it alone and run again")


def _place(place: str | Path) -> Source:
    if not str(place):
        raise UserError(f"no corpus is named: give {KINDS}")
    return Source(_own_name(str(place)), str(place))


def _own_name(place: str) -> str:
    if place == STDLIB:
        return STDLIB
    if place.startswith("hub:"):
        return without_surrogates(hub_name(place))
    return without_surrogates(os.path.basename(os.path.realpath(place))) or place


def _one_of(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a relative path fits one of the patterns, or is below a folder that does."""
    if not patterns:
        return lambda path: False
    fits = re.compile("|".join(map(_expression, patterns)), re.DOTALL).fullmatch
    return lambda path: fits(path) is not None


def _expression(pattern: str) -> str:
    *before, last = pattern_parts(pattern)
    folders = "".join("(?:[^/]+/)*" if part == "**" else _segment(part) + "/" for part in before)
    expression = folders + (".+" if last == "**" else _segment(last)) + "(?:/.*)?"
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is no glob ({error}): mend what is in brackets") from error
    return expression


def _segment(part: str) -> str:
    """A regular expression for what `*`, `?` and `[…]` stand for within a name."""
    tokens = re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL)
    return "".join(_wildcard(token) for token in tokens)


def _wildcard(token: str) -> str:
    if token in ("*", "?"):
        return "[^/]*" if token == "*" else "[^/]"
    if len(token) == 1:
        return re.escape(token)
    negated = token.startswith("[!")
    inside = "".join("\\" + c if c in "\\[]^&~|" else c for c in token[1 + negated : -1])
    return f"(?!/)[{'^' * negated}{inside}]"


def _stream(source: Source, wanted, entered, leave_out) -> Callable[[OnSkip], Iterator[Entry]]:
    """What opens a source's entries, any number of times."""
    place, name = source.place, source.name
    if place == STDLIB:
        return lambda on_skip: folder_files(
            sysconfig.get_paths()["stdlib"], name, on_skip,
            lambda path: path.endswith(".py") and wanted(path),
            lambda path: path.rpartition("/")[2] not in STDLIB_WITHOUT and entered(path),
        )  # fmt: skip
    if place.startswith("hub:"):
        dataset = hub_dataset(place)  # once, so that every pass is over the same revision
        return lambda on_skip: hub_rows(place, dataset, name)
    if os.path.isdir(place):
        return lambda on_skip: folder_files(place, name, on_skip, wanted, entered, leave_out)
    if not os.path.isfile(place):
        raise UserError(f"no corpus at {place}: give {KINDS}")
    if place.endswith((".jsonl", ".jsonl.gz")):
        return lambda on_skip: json_lines(place, name)
    if is_binary(place):
        raise UserError(f"{place} is a binary file (it has a NUL byte), and a corpus is text: give another")
    return lambda on_skip: text_file(place, name)


def _check_text(source: Source, stream: Callable[[OnSkip], Iterator[Entry]], patterns: bool) -> None:
    skipped: list[str] = []
    if not any(entry.size for entry in stream(skipped.append)):
        hint = " that the patterns let through" if patterns else ""
        hint += f" ({len(skipped)} binary files were left out)" if skipped else ""
        raise UserError(f"{source.place} holds no text to build from{hint}: give a corpus with at least one document")
