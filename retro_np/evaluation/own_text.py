"""Documents of one's own, scored like held-out ones: tokenised, cut into chunks, searched for in a database."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, bits_per_byte
from retro_np.retrieval.corpus import find_corpus
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.join import DatabaseUnion, Retrieval, retrieve_from
from retro_np.retrieval.manifest import COUNTS
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import encode, tokenizer_sha256
from retro_np.retrieval.vocabulary import vocabulary

HASH_DIGITS = 16  # A text is recognised by this many digits of its SHA-256, even among billions of texts.


class WithoutDatabase(Database):
    """Stands for a database where nothing is retrieved: a tokenizer and a chunk size, but no documents.

    name: what errors call it, such as the model that the tokenizer is of."""

    def __init__(self, tokenizer: Tokenizer, chunk_size: int, name: str):
        facts = vocabulary(tokenizer)
        self.path, self.tokenizer, self.chunk_size = Path(name), tokenizer, chunk_size
        self.vocabulary_size, self.special = len(facts.pieces), facts.special
        self.padding, self.end_of_text = facts.special
        self.documents, self.part, self._deleted = [], "", np.empty(0, np.int64)  # type: ignore[assignment]
        self._tokens = self._documents = Sharded([self._deleted])

    @property
    def identity(self) -> dict[str, Any]:
        """The tokenizer's hash."""
        return {"tokenizer": tokenizer_sha256(self.tokenizer)}


@dataclass(frozen=True)
class OwnText(Retrieval):
    """The chunks of other documents than a database's, and their neighbours.

    records: name, source, bytes, tokens, chunks and sha256 of each document, by its number in the split. left_out: how
    many were left out since they equal one of the database's training documents, one of the model's, or one before."""

    records: list[dict[str, Any]]
    left_out: dict[str, int]

    def counts(self) -> dict[str, int]:
        """The documents, and their chunks, tokens, bytes and replaced byte sequences, as a manifest counts a split."""
        return {name: sum(record.get(name, 1) for record in self.records) for name in COUNTS}

    def figures(self, losses: Mapping[str, Losses]) -> list[dict[str, Any]]:
        """Each document's name, source, scored bytes, and bits per byte by condition; None for one without bytes."""
        numbers, _, n_bytes = next(iter(losses.values())).per_document()
        nats = {name: loss.per_document()[1] for name, loss in losses.items()}
        return [
            {"name": self.records[number]["name"], "source": self.records[number]["source"], "bytes": int(size)}
            | {"bpb": {name: bits_per_byte(part[i], size) if size else None for name, part in nats.items()}}
            for i, (number, size) in enumerate(zip(numbers, n_bytes, strict=True))
        ]


def own_text(
    database: Database, locations: Sequence[str | Path], candidates: int, *,
    source: Database | DatabaseUnion | None = None, trained_on: Collection[str] = (),
) -> OwnText:  # fmt: skip
    """Read documents and find their chunks' neighbours; `evaluate`, `score` and `score_tokens` take it as retrieval.

    database: its tokenizer and chunk size are used; of a WithoutDatabase nothing is retrieved. locations: see
    `find_corpus`. candidates: neighbours per chunk. source: retrieve from this database instead. trained_on: as in
    `evaluate`. Documents that equal a training document are left out, and equal texts count once. Raises UserError for
    a location without text, and if no document is left.
    """
    training = (record for record in database.documents if record["split"] == "train" and not record.get("removed"))
    known = {"in_database": {record["sha256"][:HASH_DIGITS] for record in training}}
    known |= {"trained_on": {digest[:HASH_DIGITS] for digest in trained_on}, "repeated": set()}
    m, left_out = database.chunk_size, dict.fromkeys(known, 0)
    records: list[dict[str, Any]] = []
    parts: list[np.ndarray] = []
    for document in (each for path in locations for each in find_corpus(path, split_field="none").documents()):
        text = document.text.encode()
        digest = hashlib.sha256(text).hexdigest()
        reason = next((reason for reason, hashes in known.items() if digest[:HASH_DIGITS] in hashes), None)
        if text and reason:
            left_out[reason] += 1
        elif text:
            known["repeated"].add(digest[:HASH_DIGITS])
            ids = [*encode(database.tokenizer, document.text), database.end_of_text]
            padded = np.pad(np.array(ids, np.uint32), (0, -len(ids) % m), constant_values=database.padding)
            parts.append(padded.reshape(-1, m))
            record = {"name": document.name, "source": document.source, "bytes": len(text), "tokens": len(ids)}
            records.append(record | {"chunks": len(parts[-1]), "replaced": document.replaced, "sha256": digest})
    if not records:
        reason = f"{sum(left_out.values())} are training documents of {database.path} or of the model"
        raise UserError(f"no document is left to score ({reason}): give other texts with --text")
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    none = np.empty((len(numbers), 0), np.int64)
    arrays: Any = np.concatenate(parts), numbers, none, none  # in memory
    split = Split("text", *arrays, **database.special._asdict())
    if isinstance(database, WithoutDatabase):
        return OwnText(split, database, records, left_out)
    found = retrieve_from(database, source or database, candidates, split, {record["sha256"] for record in records})
    return OwnText(found.split, found.database, records, left_out)
