"""The corpus of a database: documents streamed from one or more sources, held-out documents, and slices."""

import math
import os
import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import hash_fraction
from retro_np.progress import counted
from retro_np.renamed import accept_old_names
from retro_np.retrieval.rows import NO_FIELD, Fields
from retro_np.retrieval.sources import LOCATION_FORMS, SKIPPED, STDLIB, Document, Entry, OnSkip, default_name, opener  # noqa: F401

SPEC_NAME = re.compile(r"([A-Za-z0-9_.-]+)=(.*)", re.DOTALL)
SPEC_WEIGHT = re.compile(r"(.*):([+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf))", re.DOTALL | re.I)
SLICE = "slice "  # before a name, so that the hashes of a slice differ from those of `held_out`


def _ignore(name: str) -> None:
    """The default on_skip, which does nothing."""


@accept_old_names
@dataclass(frozen=True)
class Source:
    """Where documents come from, and what share of the training mixture they get. Weights need not sum to 1.

    split: train, valid or test for all documents, or "" if the rows or the build decide."""

    name: str
    location: str
    weight: float | None = None
    split: str = ""


@dataclass(frozen=True)
class Corpus:
    """The documents of one or more sources, in a fixed order. Each pass reads them again, one at a time."""

    sources: list[Source]
    entries: Callable[[OnSkip], Iterator[Entry]]

    def names(self) -> Iterator[str]:
        """The documents' names in order. A plain file is read only as far as is needed to see whether it is binary."""
        return (entry.name for entry in self.entries(_ignore))

    def documents(self, on_skip: OnSkip = _ignore) -> Iterator[Document]:
        """Read the documents in order. on_skip is called with the name of each file of a folder that is skipped.

        Sources keep the order in which they were given. A folder is read in the order of its relative paths, other
        sources line by line. Raises UserError for a file that is missing or unreadable and for a bad line of JSONL."""
        return (replace(entry.read(), split=entry.split, row=entry.row) for entry in self.entries(on_skip))


def parse_source(text: str) -> Source:
    """Parse `name=location:weight`; the name and the weight are optional.

    A location may contain `:` and `=` itself. Only `:` with a number at the end is a weight, and the first `=` ends a
    name only if nothing but letters, digits and `_.-` precedes it. The default name is that of the resolved file or
    folder, of the dataset, or stdlib. Raises UserError for an empty name or location, and for a weight of 0 or less."""
    location, weight = text, None
    if (match := SPEC_WEIGHT.fullmatch(text)) and match[1] != "hub" and not match[1].endswith("=hub"):
        location, weight = match[1], float(match[2])
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{text} has the weight {match[2]}: a source's weight must be a number above 0")
    if location.startswith("="):
        raise UserError(f"{text} has an empty name: write name=location, or the location alone")
    name, location = match.groups() if (match := SPEC_NAME.fullmatch(location)) else (None, location)
    if not location:
        raise UserError(f"{text or 'an empty source'} names no location: give {LOCATION_FORMS}")
    return Source(name or default_name(location), location, weight)


def _check_sources(sources: list[Source], database: Path | str | None) -> None:
    """Raise UserError if two share a location or a name, if one is inside the database's folder, where a build would
    read what it writes, or if some, but not all, of those to train on have weights."""
    places = [os.path.realpath(s.location) if os.path.exists(s.location) else s.location for s in sources]
    folder, are_weighted = database and os.path.realpath(database), any(source.weight is not None for source in sources)
    for i, source in enumerate(sources):
        if places[i] in places[:i]:
            raise UserError(f"{source.location} is given twice: give each location once, in one split")
        if folder and os.path.exists(source.location) and Path(places[i]).is_relative_to(folder):
            where = "both the corpus and the database" if places[i] == folder else f"inside the database {database}"
            raise UserError(f"{source.location} is {where}: give another folder")
        if source.name in [other.name for other in sources[:i]]:
            raise UserError(f"two sources are called {source.name}: give each its own name, as in NAME=LOCATION")
        if (source.weight is not None) != (are_weighted and source.split in ("", "train")):
            fault = f"{source.name} has {'no' if source.weight is None else 'a'} weight, unlike other sources"
            raise UserError(f"{fault}: give every source to train on a weight, or none, and no other source")


def find_corpus(
    source: str | Path | list[Source], leave_out: str | Path | None = None, include: Sequence[str] = (),
    exclude: Sequence[str] = (), text_field: str = "text", name_field: str | None = None,
    split_field: str | None = None,
) -> Corpus:  # fmt: skip
    """The documents at one location or of several sources. A location is not parsed for a name or a weight.

    A location is `stdlib`, a folder, a text file, a file of rows (JSON lines in a file called .jsonl, also packed by
    gzip or zstd; parquet), a folder that `save_to_disk` wrote, or `hub:NAME[@CONFIG][#SPLIT]`. Every file of a folder
    is a document, except hidden and binary files, files below leave_out, and links out of it; its parquet files and
    saved datasets are rows (see `sources.folder_files`). include, exclude: patterns for relative paths in folders, as
    in .gitignore. A file is taken if the include patterns match it, or none is given, and the exclude patterns do not.
    text_field, name_field, split_field: see `rows.Fields`. Raises UserError for a location that does not exist, holds
    no text, is given twice or is inside leave_out, for a name given twice, if only some sources to train on have a
    weight, for a binary file, and for a field that no source can have."""
    sources = source if isinstance(source, list) else [Source(default_name(str(source)), str(source))]
    if not sources or not sources[0].location:
        raise UserError(f"no corpus is named: give {LOCATION_FORMS}")
    _check_sources(sources, leave_out)
    if split_field not in (None, NO_FIELD) and all(source.split for source in sources):
        raise UserError(f"every source has a split, so the field `{split_field}` decides nothing: leave it out")
    included, excluded = _matcher(include), _matcher(exclude)

    takes = lambda file: (not include or included(file)) and not excluded(file)  # noqa: E731
    enters = lambda folder: not excluded(folder + "/")  # noqa: E731
    fields = Fields(text_field, name_field, split_field)
    streams = [opener(each.location, each.name, each.split, fields, takes, enters, leave_out) for each in sources]
    for each, stream in zip(sources, streams, strict=True):
        _check_text(each, stream, bool(include or exclude))
    if (name_field or text_field != Fields.text) and not any(e.row for stream in streams for e in stream(_ignore)):
        fault = f"{', '.join(each.location for each in sources)} has no rows, only texts: leave out --text-field and"
        raise UserError(f"{fault} --name-field, or name a file of rows itself (of JSON lines: one called .jsonl)")
    return Corpus(sources, lambda on_skip: chain.from_iterable(stream(on_skip) for stream in streams))


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether patterns as in .gitignore match a relative path, which ends in a slash if it is a folder's.

    The last pattern that matches the path decides; if none does, the folder around it is asked. A `./` in front anchors
    a pattern. Raises UserError for a pattern that is not a glob or can match nothing."""
    from pathspec import GitIgnoreSpec

    parts: list = []
    for pattern in patterns:
        line = f"/{pattern[2:]}" if pattern.startswith("./") else pattern
        try:
            with warnings.catch_warnings(action="error", category=FutureWarning):  # brackets in brackets
                parts += GitIgnoreSpec.from_lines([line.replace("\n", "\r")]).patterns
        except (ValueError, re.error, FutureWarning) as error:
            raise UserError(f"the pattern {pattern!r} is not a glob ({error}): check its brackets") from error
        if not line.strip("/") or parts[-1].include is None:
            raise UserError(f"the pattern {pattern!r} matches nothing: give one such as *.py or src/**")

    def matches(path: str) -> bool:
        line = path.replace("\n", "\r")  # A dot in the library's expressions matches no newline.
        while line:
            for part in reversed(parts):
                ends = [match.groupdict().get("ps_d") and match.end("ps_d") for match in part.regex.finditer(line)]
                if None in ends or len(line) in ends:  # The group ps_d is the slash after a folder that matches.
                    return part.include
            line = line[: line.rstrip("/").rfind("/") + 1]
        return False

    return matches


def held_out(name: str, share: float) -> bool:
    """Whether a document is held out of training, tokenizer and database. The answer is the same on every machine."""
    return hash_fraction(name) < share


def limited(corpus: Corpus, limit_bytes: int | None) -> Corpus:
    """A slice of at most limit_bytes, but at least one document, taken in the order of the names' hashes.

    Documents that no longer fit are skipped. The hashes differ from those of `held_out`, so that a slice has its share
    of held-out documents. Memory: 9 bytes per document of the whole corpus, and about 30 while the slice is chosen."""
    if limit_bytes is None:
        return corpus
    hashes, sizes, order = order_of_hashes(corpus, SLICE)
    chosen, bytes_left = np.zeros(len(order), bool), limit_bytes
    for number in order:
        if sizes[number] <= bytes_left:
            chosen[number] = True
            bytes_left -= sizes[number]
    if not chosen.any():
        chosen[order[:1]] = True
    return replace(corpus, entries=partial(_chosen, corpus, hashes, chosen))


def order_of_hashes(corpus: Corpus, prefix: str = "") -> tuple[array, array, np.ndarray]:
    """The hash of each document's name with a prefix, each document's size, and the order of the hashes."""
    hashes, sizes = array("d"), array("q")
    for entry in corpus.entries(_ignore):
        hashes.append(hash_fraction(prefix + entry.name))
        sizes.append(entry.size)
    return hashes, sizes, np.argsort(np.asarray(hashes), kind="stable")


def _chosen(corpus: Corpus, hashes: array, chosen: np.ndarray, on_skip: OnSkip) -> Iterator[Entry]:
    for expected, is_chosen, entry in zip_longest(hashes, chosen, corpus.entries(on_skip)):
        # `chosen` goes by position, so a document that was added or deleted meanwhile would shift it.
        if entry is None or expected != hash_fraction(SLICE + entry.name):
            where = "at its end" if entry is None else f"at {entry.name}"
            raise UserError(f"the corpus changed {where} while it was read: run the same command again")
        if is_chosen:
            yield entry


def _check_text(source: Source, stream: Callable[[OnSkip], Iterator[Entry]], patterns: bool) -> None:
    skipped: list[str] = []
    if not any(entry.size for entry in stream(skipped.append)):
        hint = " that matches the patterns" * patterns
        if skipped:
            hint += f" ({counted(len(skipped), 'file')} skipped: {SKIPPED}; cp -rL copies what links lead to)"
        if packed := next((name for name in skipped if name.endswith((".gz", ".zst"))), ""):
            hint += f"; rows are read if their file is named itself, such as {os.path.join(source.location, packed)}"
        raise UserError(f"{source.location} holds no text{hint}: give a corpus with at least one document")
