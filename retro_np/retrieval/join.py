"""Swap the database at evaluation: retrieve from another database, several, or a fraction of one (paper §4.1)."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.embedders import Embedder
from retro_np.retrieval.index import QUERIES_PER_BLOCK
from retro_np.retrieval.neighbours import Shard
from retro_np.retrieval.sharded import Sharded


class DatabaseUnion(Database):
    """Several databases, searched as one. Chunk ids and document numbers continue from one database to the next.

    Raises UserError for none, for one given twice, and if chunk sizes, tokenizers or embedders differ."""

    def __init__(self, databases: list[Database]):
        if not databases:
            raise UserError("a union needs at least one database")
        first = databases[0]
        if len({database.manifest["sha256"] for database in databases}) < len(databases):
            raise UserError("a database is in the union twice, which would repeat all its neighbours: give it once")
        for other in databases[1:]:
            check_values_fit(first, other)
            if not _same_keys(first, other):
                fault = f"the keys of {first.path} and {other.path} were made by different embedders"
                raise UserError(f"{fault}: build one of them with --like {first.path}")
        self._share(first)  # The others have the same chunk size, tokenizer and embedder.
        self.databases: list[Database] = databases
        self.training_neighbours = False
        self.path: Path = Path(" + ".join(str(database.path) for database in databases))
        chunks = list(itertools.accumulate((database.n_chunks for database in databases), initial=0))
        documents = itertools.accumulate((len(database.documents) for database in databases), initial=0)
        numbers = [part + start for d, start in zip(databases, documents, strict=False) for part in d._documents.parts]
        self._documents = Sharded(numbers)
        self._deleted = np.concatenate([d._deleted + start for d, start in zip(databases, chunks, strict=False)])
        self._tokens = Sharded(
            [part for database in databases for part in database._tokens.parts], self._deleted, self.padding
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return DatabaseUnion, (self.databases,)

    @property
    def identity(self) -> dict[str, Any]:
        """The identities of all databases."""
        return {"union": [database.identity for database in self.databases]}

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder that made all keys."""
        return self.databases[0].embedder

    @property
    def documents(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The records of all documents."""
        return list(itertools.chain.from_iterable(database.documents for database in self.databases))

    def without(self, sha256s: set[str]) -> "DatabaseUnion":
        """See `Database.without`."""
        return DatabaseUnion([database.without(sha256s) for database in self.databases])

    @cached_property
    def _shards(self) -> list[Shard]:
        return list(itertools.chain.from_iterable(database._shards for database in self.databases))

    def _check_unedited(self) -> None:
        for database in self.databases:
            database._check_unedited()


@dataclass(frozen=True)
class Retrieval:
    """A split, and the database to which the ids of its neighbours belong."""

    split: Split
    database: Database

    @classmethod
    def own(cls, database: Database, split_name: str) -> "Retrieval":
        """A split with the neighbours that were computed when the database was built."""
        return cls(database.split(split_name), database)


def retrieve_from(
    database: Database, source: Database, candidates: int | None = None, split: str | Split = "valid",
    sha256s: Collection[str] = (),
) -> Retrieval:  # fmt: skip
    """Held-out chunks of a database, with neighbours from another database, a fraction of one, or a union.

    A document of the source with the same text as a held-out one is left out. candidates: neighbours per chunk, or None
    for as many as the database stores. split: "valid", "test", or the chunks of other documents, and then sha256s has
    the hashes of their texts. Raises UserError if chunk sizes or tokenizers differ."""
    check_values_fit(database, source)
    candidates = candidates or database.manifest["neighbours"] + database.manifest["extra_candidates"]
    keys = None
    if isinstance(split, str):
        name = database.split_name(split)
        keys = database.keys(name) if _same_keys(database, source) else None
        split, sha256s = database.split(name), {r["sha256"] for r in database.documents if r["split"] == name}
    source = source.without(set(sha256s))
    shape = len(split.tokens), candidates
    ids, distances = np.empty(shape, np.int64), np.empty(shape, np.float32)
    with progress_bar(f"neighbours in {source.path}", len(ids), unit="queries") as advance:
        for rows in threads.blocks(len(ids), QUERIES_PER_BLOCK):
            queries = source.embed_chunks(split.tokens[rows]) if keys is None else keys[rows]
            ids[rows], distances[rows] = source.search_keys(queries, candidates)
            advance(len(ids[rows]))
    return Retrieval(replace(split, neighbours=ids, distances=distances), source)


def check_values_fit(database: Database, source: Database) -> None:
    """Raise UserError unless a model of one can read the values of the other: same chunk size, same tokenizer."""
    for name in ("chunk_size", "tokenizer"):
        if database.manifest[name] != source.manifest[name]:
            fault = f"{database.path} and {source.path} differ in their {name.replace('_', ' ')}"
            raise UserError(f"{fault}: build one of them with --like {database.path}")


def _same_keys(database, source) -> bool:
    return database.manifest["embedder"]["sha256"] == source.manifest["embedder"]["sha256"]
