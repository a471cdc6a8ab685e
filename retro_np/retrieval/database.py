"""The retrieval database: open it, search it, read its values. Its layout is described in `build.py`."""

import itertools
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import allow_open_files, hash_fraction
from retro_np.files.untrusted import mapped
from retro_np.kernels.search import merge_lists
from retro_np.progress import say
from retro_np.retrieval import manifest as layout
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.documents import Documents
from retro_np.retrieval.embedders import Embedder, checked_embedder, embed_chunks, embed_queries
from retro_np.retrieval.hashing import HASHED, load_hashing
from retro_np.retrieval.index import INDEX, hnswlib_installed
from retro_np.retrieval.journal import edited_since, recover_edit
from retro_np.retrieval.neighbours import Shard, search_shard
from retro_np.retrieval.sharded import Sharded, is_in, shard_array
from retro_np.retrieval.tokenizer import decode, load_tokenizer
from retro_np.retrieval.vocabulary import END_OF_TEXT, PADDING, Special, vocabulary

EXTRA_OPEN_FILES = 256  # besides a database's own files, which are memory-mapped
MAX_RESULTS = 10**9  # entries of one answer: a larger request is refused before memory is allocated


class EditedError(UserError):
    """The files just opened may belong to a later edit, after which ids refer to different chunks."""


@dataclass(frozen=True)
class Split:
    """The chunks of a split, in the order of their documents.

    tokens: (N, m). documents: (N,), line numbers of documents.jsonl. neighbours: (N, K), chunk ids, nearest first, −1
    if missing. distances: (N, K), squared L2. Row i of "train" is chunk i of the database. sources: each one's weight
    in training (or None) and its rows in "train". removed: sorted rows of removed documents, which read as padding.
    padding, end_of_text: the database's ids of these."""

    name: str
    tokens: Sharded
    documents: Sharded
    neighbours: Sharded | np.ndarray
    distances: Sharded | np.ndarray
    sources: tuple[tuple[float | None, tuple[tuple[int, int], ...]], ...] = ()
    removed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    padding: int = PADDING
    end_of_text: int = END_OF_TEXT


class Database:
    """A key–value store of chunks (paper §2.3): keys BERT(N), values [N, F]. Open it with `Database.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any], embedder: Embedder | str | None, index: str):
        self.path: Path = path
        self.manifest: dict[str, Any] = manifest
        self.part: str = ""  # describes the fraction of the documents; empty for the whole database
        self._told = False  # whether `split_name` has said that there is no test part
        self._embedder, self._index_kind = embedder, index
        self.chunk_size: int = manifest["chunk_size"]
        self.vocabulary_size: int = manifest["vocabulary_size"]
        self.special: Special = Special(manifest.get("padding", PADDING), manifest.get("end_of_text", END_OF_TEXT))
        self.padding: int = self.special.padding
        self.end_of_text: int = self.special.end_of_text
        self.d_key: int = manifest["embedder"]["d_key"]
        self.ef_margin: int = manifest["embedder"]["margin"]
        self.training_neighbours: bool = manifest.get("training_neighbours", True)
        self.tokenizer: Tokenizer = load_tokenizer(path / layout.TOKENIZER)
        self.documents: Documents = Documents(path / layout.DOCUMENTS, manifest["splits"])
        facts = vocabulary(self.tokenizer)
        if (len(facts.pieces), facts.special) != (self.vocabulary_size, self.special):
            stated = f"{self.vocabulary_size:,} tokens, padding {self.padding} and end-of-text {self.end_of_text}"
            raise UserError(f"{path}: its tokenizer does not have what the manifest says ({stated}): {layout.REBUILD}")
        self._documents = self._sharded("train", "documents")
        self._deleted = self._removed_rows("train")  # sorted ids that no search finds
        self._tokens = self._sharded("train", "tokens", self._deleted)
        if any(stop > self.n_chunks for source in manifest["sources"] for _, stop in source["rows"]):
            raise UserError(f"{path}: the manifest names rows that no shard has: {layout.REBUILD}")

    @classmethod
    def open(cls, path: Path | str, embedder: Embedder | str | None = None, index: str = "hnsw") -> "Database":
        """Open a finished database. Every file is checked against its hash before anything reads it.

        embedder: makes the keys of queries. None loads, on the first search by text, the one that made the database's
        keys: its own hashing embedder, or the installed all-MiniLM-L6-v2. "hashing" stands for the former alone. index:
        "hnsw", or "exact" to compare with every key; shards without a graph, or an installation without hnswlib, are
        always searched exactly. Raises UserError if there is no database at `path`, if a file has changed, or if a
        different embedder made the keys."""
        path = Path(path)
        if index not in ("hnsw", "exact"):
            raise UserError(f"index must be hnsw or exact, not {index!r}")
        recover_edit(path)
        manifest = layout.read_manifest(path)
        allow_open_files(len(manifest["files"]) + EXTRA_OPEN_FILES)
        try:
            if broken := layout.broken_files(path, manifest):
                n_more = f", and {len(broken) - 1} more files are broken (retro-np verify names them)"
                raise UserError(f"{broken[0]}{n_more if broken[1:] else ''}: {layout.REBUILD}")
            database = cls(path, manifest, embedder, index)
        except (UserError, FileNotFoundError):
            if edited_since(path, manifest):  # The files changed meanwhile.
                return cls.open(path, embedder, index)
            raise
        if embedder is not None:
            _ = database.embedder  # checks it
        return database

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the path; a worker process opens the database there. An edit in the meantime is an error."""
        facts = self.manifest["sha256"], self.part, self._deleted
        return _reopened, (Path(os.path.abspath(self.path)), self._embedder, self._index_kind, *facts)

    @property
    def n_chunks(self) -> int:
        """The number of chunks in the training split, which can be retrieved."""
        return len(self._tokens)

    @property
    def n_removed(self) -> int:
        """The number of chunks that were removed and not yet compacted."""
        return len(self._deleted)

    @property
    def first_ids(self) -> list[int]:
        """The id of each shard's first chunk."""
        return self._tokens.starts[:-1].tolist()

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the meaning of ids: the manifest's and the tokenizer's hashes, and the fraction, if any."""
        identity = {"database": self.manifest["sha256"], "tokenizer": self.manifest["tokenizer"]}
        return identity | {"part": self.part} if self.part else identity

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder that made the keys (see `open`). Raises UserError if only a different one is available."""
        given, built, is_hashed = self._embedder, self.manifest["embedder"], layout.HASHING in self.manifest["files"]
        if given is None or (isinstance(given, str) and given == HASHED and is_hashed):
            given = load_hashing(self.path / layout.HASHING, self.tokenizer) if is_hashed else load_bert()
        name = given if isinstance(given, str) else ""
        if not isinstance(given, str):
            embedder = checked_embedder(given, tried=False)
            if (embedder.sha256, embedder.d_key) == (built["sha256"], built["d_key"]):
                return embedder
            name = f"{embedder.name} ({embedder.sha256[:6]}…, d_key {embedder.d_key})"
        names = f"{built['name']} ({built['sha256'][:6]}…, d_key {built['d_key']}), not {name}"
        advice = "leave out --embedder" if is_hashed else "pass the former: --embedder FOLDER or MODULE:OBJECT"
        hint = f"{advice}, or build another database: retro-np build CORPUS -o DB"
        raise UserError(f"{self.path} was built with embedder {names}; {hint}")

    def search(self, text: str | list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k values whose keys are nearest to the key of a text.

        Returns ids and squared L2 distances, (k,), or (N, k) for a list; −1 and inf if fewer. k < 1 is a UserError."""
        texts = [text] if isinstance(text, str) else list(text)
        ids, distances = self.search_keys(embed_queries(self.embedder, self.tokenizer, texts), k)
        return (ids[0], distances[0]) if isinstance(text, str) else (ids, distances)

    def search_keys(self, keys: np.ndarray, k: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Like `search`, for the keys (N, d_key) of queries: ids and distances (N, k). exact: compare with every key.

        Raises UserError for keys of the wrong width, for a key that is not finite, and for k < 1."""
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise UserError(f"k must be a whole number of at least 1, not {k!r}")
        k, keys = int(k), np.asarray(keys, np.float32)
        if keys.ndim != 2 or keys.shape[1] != self.d_key:
            raise UserError(f"keys must be (N, {self.d_key}), not {keys.shape}")
        if not np.all(np.isfinite(keys)):
            raise UserError("a query key is NaN or infinite: check the embedder that made it")
        if k * max(1, len(keys)) > MAX_RESULTS:
            raise UserError(f"{k:,} neighbours of {len(keys):,} keys are more than {MAX_RESULTS:,}: ask for fewer")
        lists = []
        reads_indexes = any("index" not in vars(shard) for shard in self._shards)
        for shard, start, deleted in zip(self._shards, self._tokens.starts, self.deleted_rows, strict=False):
            rows, distances = search_shard(shard, keys, min(k, max(1, len(shard.keys))), deleted=deleted, exact=exact)
            lists.append((np.where(rows >= 0, rows + start, -1), distances))
        if reads_indexes:
            self._check_unedited()
        return merge_lists(lists, k)

    def value(self, ids: Any) -> np.ndarray:
        """[N, F] of chunk ids of any shape: (..., 2m) tokens, the chunk and its continuation in the same document.

        Id −1, a removed chunk, and F where the document ends give padding. Raises UserError for an id out of range."""
        ids = self._checked_ids(ids)
        out = np.full((*ids.shape, 2 * self.chunk_size), self.padding, np.int64)
        if not self.n_chunks:
            return out
        chunk = np.maximum(ids, 0)
        following = np.minimum(chunk + 1, self.n_chunks - 1)
        continues = (ids >= 0) & (chunk + 1 < self.n_chunks) & (self._documents[chunk] == self._documents[following])
        out[..., : self.chunk_size] = np.where((ids >= 0)[..., None], self._tokens[chunk], self.padding)
        out[..., self.chunk_size :] = np.where(continues[..., None], self._tokens[following], self.padding)
        return out

    def document_of(self, ids: Any) -> np.ndarray:
        """The document number of each chunk id, −1 for −1. Raises UserError for an id that does not exist."""
        ids = self._checked_ids(ids)  # all −1 if there are no chunks
        return np.where(ids >= 0, self._documents[np.maximum(ids, 0)], -1) if self.n_chunks else ids

    def removed(self, ids: Any) -> np.ndarray:
        """Whether each chunk id was removed: no search finds it, and its value is padding."""
        return is_in(ids, self._deleted)

    def fraction(self, share: float, seed: int = 0) -> "Database":
        """The same database with a random share of its documents: only these are found and trained on (paper §4.1).

        Seed and name decide about a document; a larger share includes a smaller. Raises UserError outside (0, 1]."""
        if not 0 < share <= 1:
            raise UserError(f"a fraction of a database must be in (0, 1], not {share}")
        if share == 1:
            return self
        is_other = lambda record: hash_fraction(f"fraction {seed} {record['name']}") >= share  # noqa: E731
        part = self._without_rows(self._rows_of(self._documents, is_other))
        part.part = f"{share} of the documents, seed {seed}"
        return part

    def without(self, sha256s: set[str]) -> "Database":
        """The same database, in which no search finds a document whose text has one of these SHA-256 hashes."""
        return self._without_rows(self._rows_of(self._documents, lambda record: record["sha256"] in sha256s))

    def _rows_of(self, documents: Sharded, condition: Callable[[dict[str, Any]], bool]) -> np.ndarray:
        """The rows whose document's record fulfils a condition. documents: (N,), each row's document."""
        return np.flatnonzero(np.array([condition(record) for record in self.documents], bool)[np.asarray(documents)])

    def _without_rows(self, rows: np.ndarray) -> "Database":
        """The same database, in which no search finds these training rows."""
        part = Database.__new__(Database)  # `copy` would go through a pickle, and open and hash every file again.
        part._share(self)
        part._deleted = np.union1d(self._deleted, rows)
        part._tokens = self._sharded("train", "tokens", part._deleted)
        return part

    def _share(self, database: "Database") -> None:
        """Take over what another database knows, except what depends on the rows that are found."""
        own = ("_shards", "deleted_rows")
        self.__dict__ |= {name: value for name, value in vars(database).items() if name not in own}

    @property
    def held_out_splits(self) -> list[str]:
        """The splits that cannot be retrieved: valid, for tuning, and test, for reporting, if documents are in it."""
        return [name for name in self.manifest["splits"] if name != "train"]

    def split_name(self, name: str) -> str:
        """The stored split that serves as train, valid or test. Raises UserError for another name.

        If there is no test part, as in databases of older versions, valid serves as both. The first call says so."""
        if name == "test" and name not in self.manifest["splits"]:
            if not self._told:
                say(f"{self.path} has no test part: its held-out documents (valid) serve for tuning and for reporting")
            self._told, name = True, "valid"
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.path} has no split {name!r}: it has {', '.join(self.manifest['splits'])}")
        return name

    def split(self, name: str, without: Collection[str] = ()) -> Split:
        """The chunks of "train", "valid" or "test" (see `split_name`) with their precomputed neighbours.

        without: SHA-256 hashes of texts. Documents with these texts count as removed, see `Split.removed`."""
        name = self.split_name(name)
        documents, ids, distances = (self._sharded(name, array) for array in ("documents", "ids", "distances"))
        removed = self._deleted if name == "train" else self._removed_rows(name)
        if without:
            removed = np.union1d(removed, self._rows_of(documents, lambda record: record["sha256"] in without))
        sources = _present(self.manifest["sources"], removed) if name == "train" else ()
        if self.part and all(weight is None for weight, _ in sources):
            # Most rows of a fraction are deleted. Joining the rest in one source avoids sequences of padding.
            sources = ((1.0, tuple(itertools.chain.from_iterable(ranges for _, ranges in sources))),)
        tokens = self._sharded(name, "tokens", removed)
        return Split(name, tokens, documents, ids, distances, sources, removed, *self.special)

    def keys(self, split: str) -> Sharded:
        """The stored keys of a split's chunks, (N, d_key), in the stored dtype; zeros for removed chunks."""
        split = self.split_name(split)
        return self._sharded(split, "keys", self._removed_rows(split))

    def text(self, tokens: Any, begins: bool = True) -> str:
        """The text of a row of tokens. begins: whether they are the beginning of a text (see `tokenizer.decode`)."""
        return decode(self.tokenizer, np.asarray(tokens).tolist(), begins)

    def begins(self, chunk: int) -> bool:
        """Whether a chunk of the training split, by its id, is the first of its document."""
        number, previous = self.document_of([chunk, chunk - 1])  # −1, before the first chunk, is of no document
        return bool(number != previous)

    def embed_chunks(self, chunks: np.ndarray) -> np.ndarray:
        """The keys (N, d_key) float32 of chunks of tokens (N, m)."""
        return embed_chunks(self.embedder, self.tokenizer, np.asarray(chunks))

    def folders(self, parent: str) -> list[Path]:
        """The shards in a folder of the database, in order. Only folders that the manifest lists are included."""
        files = (self.path / name for name in self.manifest["files"] if name.startswith(parent + "/"))
        folders = {file.parent for file in files if file.parent != self.path / parent}
        return sorted(folders, key=lambda folder: int(folder.name))

    def has_graph(self, shard: Path) -> bool:
        """Whether the manifest lists a graph index of a shard. A shard that was built without hnswlib has none."""
        return (shard / INDEX).relative_to(self.path).as_posix() in self.manifest["files"]

    @cached_property
    def _shards(self) -> list[Shard]:
        graphs, folders = self._index_kind == "hnsw" and hnswlib_installed(), self.folders(layout.SPLITS["train"])
        margins = [self.ef_margin if graphs and self.has_graph(folder) else None for folder in folders]
        return list(map(Shard, folders, self._sharded("train", "keys").parts, self._documents.parts, margins))

    @cached_property
    def deleted_rows(self) -> list[np.ndarray]:
        """The deleted rows of each shard, numbered within the shard."""
        shards = np.split(self._deleted, np.searchsorted(self._deleted, self.first_ids[1:]))
        return [rows - start for rows, start in zip(shards, self.first_ids, strict=True)]

    def _removed_rows(self, split: str) -> np.ndarray:
        file = self.path / layout.tombstones_of(split)
        rows = np.array(mapped(file, np.int64, (None,), layout.REBUILD))
        n_rows = sum(len(shard_array(folder, "tokens")) for folder in self.folders(layout.SPLITS[split]))
        if len(rows) and not (rows[0] >= 0 and rows[-1] < n_rows and (rows[1:] > rows[:-1]).all()):
            raise UserError(f"{file} does not list rows of the split in order: {layout.REBUILD}")
        return rows

    def _sharded(self, split: str, name: str, blank: np.ndarray | None = None) -> Sharded:
        """An array of all shards of a split, checked against what the manifest says about it."""
        shards = self.folders(layout.SPLITS[split])
        folders = self.folders(f"neighbours/{split}") if name in ("ids", "distances") else shards
        stored = self.manifest["neighbours"] + self.manifest["extra_candidates"]
        stored = stored if self.training_neighbours or split != "train" else 0
        width = {"tokens": self.chunk_size, "keys": self.d_key, "ids": stored, "distances": stored}.get(name)
        token_type = np.uint16 if self.vocabulary_size <= 2**16 else np.uint32
        dtype = {"tokens": token_type, "keys": self.manifest["key_dtype"]}.get(name)
        try:
            if not shards or [folder.name for folder in folders] != [folder.name for folder in shards]:
                raise UserError(f"{self.path} does not have the {name} of all shards of {split}: {layout.REBUILD}")
            rows = [len(shard_array(shard, "tokens")) for shard in shards]
            parts = [shard_array(f, name, n, width, dtype) for f, n in zip(folders, rows, strict=True)]
            if name in ("tokens", "documents"):
                end = self.vocabulary_size if name == "tokens" else len(self.documents)
                _check_numbers(parts, folders, name, end)
        finally:
            self._check_unedited()
        return Sharded(parts, blank, self.padding if name == "tokens" else 0)

    def _check_unedited(self) -> None:
        """Raise EditedError if files that were just opened may belong to an edit."""
        if edited_since(self.path, self.manifest):
            raise EditedError(f"{self.path} was edited since it was opened: open it again")

    def _checked_ids(self, ids: Any) -> np.ndarray:
        ids = np.asarray(ids, np.int64) if np.size(ids) == 0 else np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"chunk ids are integers, not {ids.dtype}")
        if ids.size and (ids.min() < -1 or ids.max() >= self.n_chunks):
            wrong = ids.min() if ids.min() < -1 else ids.max()
            raise UserError(f"chunk ids go from 0 to {self.n_chunks - 1} (−1: none) in {self.path}, not {wrong}")
        return ids.astype(np.int64)


def _reopened(path, embedder, index, sha256, part, deleted) -> Database:
    database = Database.open(path, embedder, index)
    if database.manifest["sha256"] != sha256:
        raise EditedError(f"{path} was edited since it was sent to this process: send it again")
    database = database._without_rows(deleted)
    database.part = part
    return database


def _check_numbers(parts, folders, name, end) -> None:
    """Raise UserError unless all numbers are from 0 to end − 1, and those of documents never fall."""
    last = 0
    for folder, part in zip(folders, parts, strict=True):
        in_order = name == "tokens" or not len(part) or (part[0] >= last and (part[1:] >= part[:-1]).all())
        if not in_order or (len(part) and part.max() >= end):
            raise UserError(f"{folder / name}.npy holds numbers of {name} that do not exist: {layout.REBUILD}")
        last = part[-1] if name == "documents" and len(part) else last


def _present(sources, removed) -> tuple:
    """The weight and row ranges of each source without removed rows. A source that lost all its rows is left out."""
    present = []
    for source in sources:
        ranges = []
        for start, stop in source["rows"]:
            removed_rows = removed[np.searchsorted(removed, start) : np.searchsorted(removed, stop)].tolist()
            gaps = itertools.pairwise([start - 1, *removed_rows, stop])
            ranges += [(before + 1, end) for before, end in gaps if before + 1 < end]
        if ranges or not source["rows"]:
            present.append((source["weight"], tuple(ranges)))
    return tuple(present)
