"""documents.jsonl read a line at a time: the records of all documents, without holding them."""

import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from retro_np.files import replacing
from retro_np.retrieval.texts import Lines


class Documents(Sequence):
    """The records of documents, by number: id, name, source, split, bytes, tokens, chunks, replaced, sha256.

    A document that was removed and not yet compacted has "removed": true.
    """

    def __init__(self, path: Path):
        self._lines = Lines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number):
        """The record of a document, or a list of those of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return json.loads(self._lines[number])


def read_records(path: Path) -> Iterator[dict]:
    """The records of a file, one at a time."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write records, a line each, whole or not at all."""
    with replacing(path) as file:
        for record in records:
            file.write((json.dumps(record) + "\n").encode())


def in_order(*streams: Iterable[dict]) -> Iterator[dict]:
    """Records of several streams, each in order of id, in order of id."""
    return heapq.merge(*streams, key=lambda record: record["id"])


def chained(paths: Iterable[Path]) -> Iterator[dict]:
    """The records of several files, one file open at a time."""
    for path in paths:
        yield from read_records(path)


def document_runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """(begin, end) of the rows of each document. numbers: (N,), the document of each row, ≥ 0, its rows together."""
    return itertools.pairwise(np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist())


def survey(records: Iterable[dict], splits: Iterable[str]) -> tuple[dict, dict[str, list[list[int]]]]:
    """What a manifest says of all documents, in order of id: counts of each split, and where each source's rows are.

    Returns {split: {"documents", "chunks", "tokens", "bytes", "replaced"}}, removed documents left out, and {source:
    [[start, stop], …]}, rows of the training split, removed ones included.
    """
    counted = {split: {"documents": 0, "chunks": 0, "tokens": 0, "bytes": 0, "replaced": 0} for split in splits}
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
            split = counted[record["split"]]
            split["documents"] += 1
            for name in ("chunks", "tokens", "bytes", "replaced"):
                split[name] += record[name]
    return counted, rows
