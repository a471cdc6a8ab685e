"""Text shards: the first stage of a build, and the only one that reads the corpus.

work/texts/train/00000.jsonl and so on for valid and test hold one document per line, until the end of the build.
Later stages read them. A repeated build reads the corpus again only to check that it has not changed."""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.files import remove_folder, replacing, write_json
from retro_np.files.untrusted import parse_json, read_json
from retro_np.progress import progress_bar
from retro_np.retrieval.corpus import Corpus
from retro_np.retrieval.manifest import SPLITS, shard_name
from retro_np.retrieval.sources import Document

FACTS = "texts.json"
MAX_NAMED_FILES = 20  # Skipped files beyond these are only counted.
OVERHEAD_BYTES = 64  # Each document adds this to its shard's size, since it needs its own chunk and line.


class Text(NamedTuple):
    """A line of a text shard. number: the document's position in the corpus, from 0, not counting those left out."""

    number: int
    name: str
    source: str
    replaced: int
    text: str

    @property
    def sha256(self) -> str:
        """The text's SHA-256 in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@contextmanager
def undone(is_new: bool, work: Path, request: Path) -> Iterator[None]:
    """After a UserError before all texts are written, remove them and the request, so that other settings can follow.

    is_new: whether this process wrote the request. A build or an edit that an earlier process began keeps both."""
    try:
        yield
    except UserError:
        if is_new and not (work / FACTS).exists():
            request.unlink(missing_ok=True)
            remove_folder(request.parent)
        raise


def write_texts(
    corpus: Corpus, work: Path, split_of: Callable[[Document], str | None], shard_bytes: int, changed: str
) -> dict[str, Any]:
    """Write the documents of a corpus to text shards of about shard_bytes; return the facts stored in texts.json.

    split_of: returns a document's split, or None to leave it out. What an earlier run finished is compared with the
    corpus. Raises UserError with the message `changed` if they differ. Memory: one document."""
    if (work / FACTS).exists():
        facts = read_json(work / FACTS, hint=f"remove {work} and run the same command again")
        if has_changed(corpus, facts["digest"]):
            raise UserError(changed)
        return facts
    facts = {"skipped": 0, "skipped_names": [], "splits": {}}

    def on_skip(name: str) -> None:
        facts["skipped"] += 1
        if len(facts["skipped_names"]) < MAX_NAMED_FILES:
            facts["skipped_names"].append(name)

    digest = hashlib.sha256()
    with ExitStack() as stack, progress_bar("reading", None, unit="documents") as advance:
        shards = {split: stack.enter_context(_Shards(work / "texts" / split, shard_bytes)) for split in SPLITS}
        for document in corpus.documents(on_skip):
            text = document.text.encode()
            _digest(digest, document, text)
            if (split := split_of(document)) is not None:
                number = sum(writer.documents for writer in shards.values())
                shards[split].add(Text(number, document.name, document.source, document.replaced, document.text))
            advance(note=f"{sum(s.bytes for s in shards.values()) / 1e6:,.0f} MB")
    for split, writer in shards.items():
        if split != "test" or writer.documents:  # A database has the part test only if there are documents for it.
            facts["splits"][split] = {name: getattr(writer, name) for name in ("shards", "documents", "bytes")}
    facts["digest"] = digest.hexdigest()
    write_json(work / FACTS, facts)
    return facts


def has_changed(corpus: Corpus, stored: str) -> bool:
    """Whether the SHA-256 of a corpus's names, texts and splits differs from the one that `write_texts` stored.

    A dataset of the Hub would have to be downloaded again, so a corpus with one counts as unchanged."""
    if any(source.location.startswith("hub:") for source in corpus.sources):
        return False
    digest = hashlib.sha256()
    with progress_bar("comparing with the corpus", None, unit="documents") as advance:
        for document in corpus.documents():
            _digest(digest, document, document.text.encode())
            advance()
    return digest.hexdigest() != stored


def read_texts(path: Path) -> Iterator[Text]:
    """Read the documents of a text shard, one at a time."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield parse_text(line, f"{path}:{number}")


def parse_text(line: bytes, where: str) -> Text:
    """The document in a line of a text shard. Raises UserError for another line."""
    fields = parse_json(line, where, list)
    if [type(field) for field in fields] != list(Text.__annotations__.values()):
        raise UserError(f"{where} does not hold a document: the file is damaged; build in another folder")
    return Text(*fields)


class Lines:
    """The lines of a file by number, as bytes. The file is memory-mapped. An index in memory takes 8 bytes per line."""

    def __init__(self, path: Path):
        self._bytes: bytes | mmap.mmap = b""
        if path.stat().st_size:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = np.fromiter((match.end() for match in re.finditer(b"\n", self._bytes)), np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        """Line `number`, counted from 0, with its newline."""
        number = range(len(self))[number]
        return self._bytes[self._ends[number - 1] if number else 0 : self._ends[number]]


def _digest(digest, document: Document, text: bytes) -> None:
    digest.update(json.dumps([document.name, len(text), *[document.split] * bool(document.split)]).encode())
    digest.update(text)


class _Shards(ExitStack):
    """Writes the text shards of a split, one at a time."""

    def __init__(self, folder: Path, shard_bytes: int):
        super().__init__()
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards, self.documents, self.bytes = 0, 0, 0  # shards opened, documents and bytes written
        self._open()

    def add(self, text: Text) -> None:
        size = len(text.text.encode())
        if self._size >= self.shard_bytes:
            self._open()
        self._file.write((json.dumps(text, ensure_ascii=False) + "\n").encode())
        self._size += size + OVERHEAD_BYTES
        self.documents += 1
        self.bytes += size

    def _open(self):
        self.close()  # renames the last shard
        self._file = self.enter_context(replacing(self.folder / f"{shard_name(self.shards)}.jsonl"))
        self._size = 0
        self.shards += 1
