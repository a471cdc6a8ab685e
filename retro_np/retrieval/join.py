"""Swap the database at evaluation: retrieve from another one, from several as one, or from a fraction (paper §4.1)."""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from retro_np.errors import UserError
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.neighbours import merge_lists

QUERIES_A_BLOCK = 1024


class Union:
    """Several databases that are searched as one. Ids, and numbers of documents, go on from one to the next.

    Raises UserError where chunk sizes, tokenizers or embedders differ: their ids or their distances would not compare.
    """

    def __init__(self, databases: list[Database]):
        if not databases:
            raise UserError("a union is of at least one database")
        first = databases[0]
        if len({database.manifest["sha256"] for database in databases}) < len(databases):
            raise UserError("a database stands twice in the union: each of its neighbours would, too; give it once")
        for other in databases[1:]:
            check_values_fit(first, other)
            if other.manifest["embedder"]["sha256"] != first.manifest["embedder"]["sha256"]:
                raise UserError(
                    f"{first.path} and {other.path} have keys of different embedders, whose distances do not compare: "
                    f"build the one with --like {first.path}"
                )
        self.databases = databases
        self.path = " + ".join(str(database.path) for database in databases)
        self.chunk_size, self.vocabulary_size, self.d_key = first.chunk_size, first.vocabulary_size, first.d_key
        self.tokenizer, self.text, self.embed_chunks = first.tokenizer, first.text, first.embed_chunks
        self._first_chunk = np.cumsum([0, *(database.n_chunks for database in databases)])
        self._first_document = np.cumsum([0, *(len(database.documents) for database in databases)])

    @property
    def n_chunks(self) -> int:
        """How many chunks there are in all."""
        return int(self._first_chunk[-1])

    @property
    def embedder(self):
        """What makes a query's key."""
        return self.databases[0].embedder

    @property
    def documents(self) -> list:
        """The records of all documents."""
        return list(itertools.chain.from_iterable(database.documents for database in self.databases))

    search = Database.search  # by this class's own embedder and search_keys

    def search_keys(self, keys: np.ndarray, k: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As `Database.search_keys`."""
        found = []
        for database, first in zip(self.databases, self._first_chunk, strict=False):
            ids, distances = database.search_keys(keys, k, exact)
            found.append((np.where(ids >= 0, ids + first, -1), distances))
        return merge_lists(found, k)

    def value(self, ids) -> np.ndarray:
        """As `Database.value`."""
        out = np.zeros((*np.shape(ids), 2 * self.chunk_size), np.int64)
        return self._gathered(ids, lambda database, local: database.value(local), out)

    def document_of(self, ids) -> np.ndarray:
        """As `Database.document_of`."""
        out = np.full(np.shape(ids), -1)
        return self._gathered(ids, lambda database, local: database.document_of(local), out, self._first_document)

    def removed(self, ids) -> np.ndarray:
        """As `Database.removed`."""
        return self._gathered(ids, lambda database, local: database.removed(local), np.zeros(np.shape(ids), bool))

    def without(self, sha256s: set[str]) -> "Union":
        """As `Database.without`."""
        return Union([database.without(sha256s) for database in self.databases])

    def _gathered(self, ids, read, out, added=None):
        ids = np.asarray(ids)
        if ids.size and (ids.min() < -1 or ids.max() >= self.n_chunks):
            raise UserError(f"chunk ids go from 0 to {self.n_chunks - 1} (−1: none) in {self.path}, not {ids.max()}")
        owner = np.searchsorted(self._first_chunk, ids, side="right") - 1
        for number, database in enumerate(self.databases):
            here = (owner == number) & (ids >= 0)
            if here.any():
                found = read(database, ids[here] - self._first_chunk[number])
                out[here] = found if added is None else found + added[number]
        return out


@dataclass(frozen=True)
class Retrieval:
    """A split, and the database that the ids of its neighbours are of."""

    split: Split
    database: Database | Union

    @classmethod
    def own(cls, database: Database, split_name: str) -> "Retrieval":
        """The neighbours that were looked for when the database was built."""
        return cls(database.split(split_name), database)


def retrieve_from(database: Database, source: Database | Union, candidates: int | None = None) -> Retrieval:
    """The held-out chunks of a database with neighbours that are looked for in another, or a part of it, or several.

    A document of the source that has the very text of a held-out one is left out. candidates: how many neighbours;
    None: as many as the database keeps. Raises UserError for other chunks or another tokenizer.
    """
    check_values_fit(database, source)
    manifest = database.manifest
    candidates = candidates or manifest["neighbours"] + manifest["extra_candidates"]
    split, keys = database.split("valid"), database.keys("valid")
    held = {record["sha256"] for record in database.documents if record["split"] == "valid"}
    source = source.without(held)
    first = source.databases[0] if isinstance(source, Union) else source
    same = first.manifest["embedder"]["sha256"] == manifest["embedder"]["sha256"]
    ids = np.empty((len(split.tokens), candidates), np.int64)
    distances = np.empty(ids.shape, np.float32)
    with progress_bar(f"neighbours in {source.path}", len(ids), unit="queries") as advance:
        for start in range(0, len(ids), QUERIES_A_BLOCK):
            rows = slice(start, min(start + QUERIES_A_BLOCK, len(ids)))
            queries = keys[rows] if same else source.embed_chunks(split.tokens[rows])
            ids[rows], distances[rows] = source.search_keys(queries, candidates)
            advance(rows.stop - start)
    return Retrieval(replace(split, neighbours=ids, distances=distances), source)


def check_values_fit(ours: Database, theirs: Database | Union) -> None:
    """Raise UserError unless the values of one can be read by a model of the other: same chunks, same tokenizer."""
    first = theirs.databases[0] if isinstance(theirs, Union) else theirs
    for name in ("chunk_size", "tokenizer"):
        if ours.manifest[name] != first.manifest[name]:
            raise UserError(
                f"{ours.path} and {theirs.path} have another {name.replace('_', ' ')} each: build the one with "
                f"--like {ours.path}"
            )
