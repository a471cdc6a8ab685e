"""Swap the database at evaluation: retrieve from another database, several, or a fraction of one (paper §4.1)."""

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.kernels.search import merge_lists
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.embedders import Embedder
from retro_np.retrieval.index import QUERIES_PER_BLOCK


class DatabaseUnion:
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
        self.databases: list[Database] = databases
        self.path: str = " + ".join(str(database.path) for database in databases)
        self.manifest: dict[str, Any] = first.manifest  # the others have the same chunk size, tokenizer and embedder
        self.identity: dict[str, Any] = {"union": [database.identity for database in databases]}
        self.chunk_size: int = first.chunk_size
        self.vocabulary_size: int = first.vocabulary_size
        self.d_key: int = first.d_key
        self.tokenizer: Tokenizer = first.tokenizer
        self.text: Callable[..., str] = first.text
        self.embed_chunks: Callable[..., np.ndarray] = first.embed_chunks
        self._first_chunk = np.cumsum([0, *(database.n_chunks for database in databases)])
        self._first_document = np.cumsum([0, *(len(database.documents) for database in databases)])
        self.n_chunks: int = int(self._first_chunk[-1])

    search: Callable[..., tuple[np.ndarray, np.ndarray]] = Database.search  # calls search_keys below
    _checked_ids: Callable[..., np.ndarray] = Database._checked_ids

    @property
    def embedder(self) -> Embedder:
        """The embedder that made all keys."""
        return self.databases[0].embedder

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The records of all documents."""
        return list(itertools.chain.from_iterable(database.documents for database in self.databases))

    def search_keys(self, keys: np.ndarray, k: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """See `Database.search_keys`."""
        lists = []
        for database, first in zip(self.databases, self._first_chunk, strict=False):
            ids, distances = database.search_keys(keys, k, exact)
            lists.append((np.where(ids >= 0, ids + first, -1), distances))
        return merge_lists(lists, k)

    def value(self, ids: Any) -> np.ndarray:
        """See `Database.value`."""
        return self._gathered(ids, Database.value, np.zeros((*np.shape(ids), 2 * self.chunk_size), np.int64))

    def document_of(self, ids: Any) -> np.ndarray:
        """See `Database.document_of`."""
        return self._gathered(ids, Database.document_of, np.full(np.shape(ids), -1), self._first_document)

    def removed(self, ids: Any) -> np.ndarray:
        """See `Database.removed`."""
        return self._gathered(ids, Database.removed, np.zeros(np.shape(ids), bool))

    def without(self, sha256s: set[str]) -> "DatabaseUnion":
        """See `Database.without`."""
        return DatabaseUnion([database.without(sha256s) for database in self.databases])

    def _gathered(
        self, ids: Any, read: Callable[..., np.ndarray], out: np.ndarray, offsets: Iterable[int] = itertools.repeat(0)
    ) -> np.ndarray:
        """Fill `out` with what `read` returns for each id in its own database, plus that database's offset."""
        ids = self._checked_ids(ids)
        owner = np.searchsorted(self._first_chunk, ids, side="right") - 1
        for number, (database, offset) in enumerate(zip(self.databases, offsets, strict=False)):
            selected = (owner == number) & (ids >= 0)
            if selected.any():
                out[selected] = read(database, ids[selected] - self._first_chunk[number]) + offset
        return out


@dataclass(frozen=True)
class Retrieval:
    """A split, and the database to which the ids of its neighbours belong."""

    split: Split
    database: Database | DatabaseUnion

    @classmethod
    def own(cls, database: Database, split_name: str) -> "Retrieval":
        """A split with the neighbours that were computed when the database was built."""
        return cls(database.split(split_name), database)


def retrieve_from(
    database: Database, source: Database | DatabaseUnion, candidates: int | None = None, split: str | Split = "valid",
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


def check_values_fit(database: Database, source: Database | DatabaseUnion) -> None:
    """Raise UserError unless a model of one can read the values of the other: same chunk size, same tokenizer."""
    for name in ("chunk_size", "tokenizer"):
        if database.manifest[name] != source.manifest[name]:
            fault = f"{database.path} and {source.path} differ in their {name.replace('_', ' ')}"
            raise UserError(f"{fault}: build one of them with --like {database.path}")


def _same_keys(database, source) -> bool:
    return database.manifest["embedder"]["sha256"] == source.manifest["embedder"]["sha256"]
