"""Read documents.jsonl one line at a time: the records of all documents, without holding them in memory."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.files import replacing
from retro_np.retrieval.texts import Lines


class Documents(Sequence[dict[str, Any]]):
    """The records of documents, by number: id, name, source, split, bytes, tokens, chunks, replaced, sha256.

    The record of a document that was removed and not yet compacted has "removed": true.
    """

    def __init__(self, path: Path):
        self._lines = Lines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: Any) -> Any:
        """The record of one document, or the list of records of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return json.loads(self._lines[number])


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one record per line, atomically."""
    with replacing(path) as file:
        for record in records:
            file.write((json.dumps(record) + "\n").encode())


def chained(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The records of several files, with one file open at a time."""
    for path in paths:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def document_runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of each document. numbers: (N,), each row's document, ≥ 0; its rows are contiguous."""
    return itertools.pairwise(np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist())


def summarise(records: Iterable[dict[str, Any]], splits: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A manifest's facts about all documents, from their records in order of id.

    Returns the counts of each split, {split: {"documents", "chunks", "tokens", "bytes", "replaced"}}, which exclude
    removed documents, and the training rows of each source, {source: [[start, stop], …]}, which include them.
    """
    counts = {split: {"documents": 0, "chunks": 0, "tokens": 0, "bytes": 0, "replaced": 0} for split in splits}
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
