"""A corpus becomes text shards: the first stage of a build, and the only one that reads the corpus.

work/texts/train/00000.jsonl and work/texts/valid/00000.jsonl hold a document a line. Whatever comes after is a function
of these files, so the corpus is read once, however many shards, workers and stops there are; they go when all is done.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.files import replacing, sha256_of, write_json
from retro_np.progress import progress_bar
from retro_np.retrieval.corpus import Corpus, Document
from retro_np.retrieval.manifest import SPLITS, shard_name

FACTS = "texts.json"
NAMED = 20  # skipped files that are named; the others are counted
OVERHEAD = 64  # bytes that a document counts for in a shard beside its text: it has a chunk and a line of its own


class Text(NamedTuple):
    """A line of a text shard. number: the document's place among those taken from the corpus, from 0."""

    number: int
    name: str
    source: str
    replaced: int
    text: str

    @property
    def sha256(self) -> str:
        """What the text is known by."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def write_texts(
    corpus: Corpus, work: Path, split_of: Callable[[Document], str | None], shard_bytes: int, changed: str
) -> dict:
    """Cut the documents of a corpus into text shards of about so many bytes; return the facts, of texts.json.

    split_of: which split a document is for; None leaves it out. Where a run before this one was stopped, the shards
    that it finished are held against the corpus as it is now. Raises UserError, with what `changed` says, where they
    differ. Memory: one document.
    """
    skipped: list[str] = []
    facts = {"documents": 0, "skipped": 0, "splits": {}}

    def on_skip(name: str) -> None:
        facts["skipped"] += 1
        if len(skipped) < NAMED:
            skipped.append(name)

    digest = hashlib.sha256()
    with ExitStack() as stack, progress_bar("reading", None, unit="documents") as advance:
        shards = {split: stack.enter_context(_Shards(work / "texts" / split, shard_bytes, changed)) for split in SPLITS}
        for document in corpus.documents(on_skip):
            text = document.text.encode()
            _digest(digest, document.name, text)
            facts["documents"] += 1
            split = split_of(document)
            if split is not None:
                number = sum(those.documents for those in shards.values())
                shards[split].add(Text(number, document.name, document.source, document.replaced, document.text))
            advance(note=f"{sum(s.bytes for s in shards.values()) / 1e6:,.0f} MB")
        for split, those in shards.items():
            those.finish()
            facts["splits"][split] = {"shards": those.number, "documents": those.documents, "bytes": those.bytes}
    facts |= {"digest": digest.hexdigest(), "skipped_names": skipped}
    write_json(work / FACTS, facts)
    return facts


def write_text_shard(path: Path, texts: Iterable[Text]) -> None:
    """Write a text shard of documents that come from elsewhere, whole or not at all."""
    with replacing(path) as file:
        for text in texts:
            file.write(_line(text))


def corpus_digest(corpus: Corpus) -> str:
    """What `write_texts` knows a corpus by: names and texts, in order."""
    digest = hashlib.sha256()
    with progress_bar("comparing with the corpus", None, unit="documents") as advance:
        for document in corpus.documents():
            _digest(digest, document.name, document.text.encode())
            advance()
    return digest.hexdigest()


def read_texts(path: Path) -> Iterator[Text]:
    """The documents of a text shard, one at a time."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Text(*json.loads(line))


class Lines:
    """The lines of a file by number, as bytes. The file is mapped, and eight bytes a line are held in memory."""

    def __init__(self, path: Path):
        self._bytes = b""
        if path.stat().st_size:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = line_ends(self._bytes)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        """The line of a number, from 0, its newline included."""
        number = range(len(self))[number]
        return self._bytes[self._ends[number - 1] if number else 0 : self._ends[number]]


def line_ends(data, block: int = 1 << 24) -> np.ndarray:
    """Where each line of bytes ends, its newline included, (lines,) int64. Looked at in blocks: data may be mapped."""
    ends = [np.empty(0, np.int64)]
    for start in range(0, len(data), block):
        part = np.frombuffer(data[start : start + block], np.uint8)
        ends.append(np.flatnonzero(part == ord("\n")) + (start + 1))
    return np.concatenate(ends)


def _digest(digest, name: str, text: bytes) -> None:
    digest.update(json.dumps([name, len(text)]).encode())
    digest.update(text)


def _line(text: Text) -> bytes:
    return (json.dumps(text, ensure_ascii=False) + "\n").encode()


class _Shards:
    """The text shards of a split, one of them open. A file that is there already is compared instead of written."""

    def __init__(self, home: Path, shard_bytes: int, changed: str):
        self.home, self.shard_bytes, self.changed = home, shard_bytes, changed
        self.number, self.documents, self.bytes = 0, 0, 0  # shards closed so far, and what they all hold
        self._stack = ExitStack()
        self._size, self._file, self._hash = 0, None, None

    def __enter__(self):
        self._stack.__enter__()
        self._open()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def add(self, text: Text) -> None:
        line, size = _line(text), len(text.text.encode())
        if self._size >= self.shard_bytes:
            self._close()
            self._open()
        self._hash.update(line)
        if self._file is not None:
            self._file.write(line)
        self._size += size + OVERHEAD
        self.documents += 1
        self.bytes += size

    def finish(self) -> None:
        self._close()

    def _open(self):
        self._path = self.home / f"{shard_name(self.number)}.jsonl"
        self._size, self._hash = 0, hashlib.sha256()
        self._file = None if self._path.exists() else self._stack.enter_context(replacing(self._path))

    def _close(self):
        self._stack.close()  # renames what was written
        if self._file is None and sha256_of(self._path) != self._hash.hexdigest():
            raise UserError(self.changed)
        self.number += 1
