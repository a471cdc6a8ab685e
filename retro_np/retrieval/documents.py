"""Read documents.jsonl one line at a time: the records of all documents, without holding them in memory."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.files import replacing
from retro_np.files.untrusted import has_types, parse_json
from retro_np.retrieval.manifest import COUNTS, DOCUMENTS, REBUILD, SPLITS
from retro_np.retrieval.texts import Lines

RECORD: dict[str, type] = dict.fromkeys(("name", "source", "split", "sha256"), str)
RECORD |= dict.fromkeys(("id", "bytes", "tokens", "chunks", "replaced"), int)
DUPLICATE: dict[str, type] = {"number": int, "name": str, "source": str, "held_out": str, "sha256": str}


class Documents(Sequence[dict[str, Any]]):
    """The records of documents, by number: id, name, source, split, bytes, tokens, chunks, replaced, sha256.

    The record of a document that was removed and not yet compacted has "removed": true. Reading a line that is not a
    record, or is the record of another number, raises UserError."""

    def __init__(self, path: Path, splits: Iterable[str] = tuple(SPLITS)):
        self.path: Path = path
        self._splits = tuple(splits)
        self._lines = Lines(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._splits)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: Any) -> Any:
        """The record of one document, or the list of records of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        record = checked_record(self._lines[number], RECORD, f"{self.path}:{number + 1}")
        if record["id"] != number or record["split"] not in self._splits or not record["chunks"]:
            raise UserError(f"{self.path}:{number + 1} is not the record of document {number}: {REBUILD}")
        return record


def checked_record(line: bytes, fields: dict[str, type], where: str) -> dict[str, Any]:
    """The JSON object in a line. Raises UserError unless it has these fields; see `untrusted.has_types`."""
    record = parse_json(line, where, hint=REBUILD)
    if not has_types(record, fields):
        raise UserError(f"{where} does not have the fields {', '.join(fields)} with their types: {REBUILD}")
    return record


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write one record, any value that JSON can express, per line, atomically."""
    with replacing(path) as file:
        for record in records:
            file.write((json.dumps(record) + "\n").encode())


def chained(paths: Iterable[Path], fields: dict[str, type] | None = None) -> Iterator[dict[str, Any]]:
    """The records of several files, with one file open at a time. Raises UserError for a line without these fields."""
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield checked_record(line, fields or {}, f"{path}:{number}")


def document_runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of each document. numbers: (N,), each row's document, ≥ 0; its rows are contiguous."""
    return itertools.pairwise(np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist())


def completed(folder: Path, manifest: dict[str, Any], weights: dict[str, float | None]) -> dict[str, Any]:
    """A manifest with the counts of the splits and the rows of the sources, from the records in a folder.

    manifest: what is known of the splits and sources. weights: of further sources, and changed ones. A source that has
    lost all its rows, or a further one without rows, is left out, because training cannot draw from it."""
    splits, rows = summarise(chained([folder / DOCUMENTS], RECORD), manifest["splits"])
    kept = {*rows, *(source["name"] for source in manifest["sources"] if not source["rows"])}
    weights = {source["name"]: source["weight"] for source in manifest["sources"]} | weights
    sources = [{"name": n, "weight": weight, "rows": rows.get(n, [])} for n, weight in weights.items() if n in kept]
    return manifest | {"splits": splits, "sources": sources}


def summarise(records: Iterable[dict[str, Any]], splits: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A manifest's facts about all documents, from their records in order of id.

    Returns the counts of each split, {split: {"documents", "chunks", "tokens", "bytes", "replaced"}}, which exclude
    removed documents, and the training rows of each source, {source: [[start, stop], …]}, which include them."""
    counts = {split: dict.fromkeys(COUNTS, 0) for split in splits}
    rows: dict[str, list[list[int]]] = {}
    row = 0
    for record in records:
        if record["split"] == "train":
            runs = rows.setdefault(record["source"], [])
            if not runs or runs[-1][1] != row:
                runs.append([row, row])
            row += record["chunks"]
            runs[-1][1] = row
        if not record.get("removed"):
            split = counts[record["split"]]
            split["documents"] += 1
            for name in ("chunks", "tokens", "bytes", "replaced"):
                split[name] += record[name]
    return counts, rows
