"""The retrieval database: open it, search it, read its values. Its format: `build.py` and `manifest.py`."""

import copy
import itertools
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import allow_open_files, mapped
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.corpus import LONE_SURROGATE, place_of
from retro_np.retrieval.documents import Documents
from retro_np.retrieval.hashing import load_hashing
from retro_np.retrieval.journal import edited_since, settle_edit
from retro_np.retrieval.manifest import (
    DOCUMENTS,
    HASHING,
    TOKENIZER,
    broken_files,
    read_manifest,
    shard_dir,
    tombstones_of,
)
from retro_np.retrieval.neighbours import Shard, is_in, merge_lists, search_shard
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import decode, load_tokenizer

SPARE_FILES = 256  # open at once, beside a database's own, which are mapped
MOST_FOUND = 10**9  # entries of one answer: a mistake is refused before memory is asked for


class EditedError(UserError):
    """Files that were just opened may be those of an edit, under which ids mean something else."""


@dataclass(frozen=True)
class Split:
    """The chunks of a split, in order of document: tokens (N, m), documents (N,), neighbours (N, K), distances (N, K).

    Documents are line numbers of documents.jsonl; neighbours are chunk ids, −1 missing, nearest first. In the split
    "train" row i is chunk i of the database. Chunks of removed documents are padding. sources: each source's weight in
    training, None where none was given, and the row ranges that it has in the training split. removed: sorted rows of
    removed documents.
    """

    name: str
    tokens: Sharded
    documents: Sharded
    neighbours: Sharded
    distances: Sharded
    sources: tuple[tuple[float | None, tuple[tuple[int, int], ...]], ...] = ()
    removed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Database:
    """A key–value store of chunks (paper §2.3): keys BERT(N), values [N, F]. Open it with `Database.open`."""

    def __init__(self, path: Path, manifest: dict, embedder, index: str):
        self.path = path
        self.manifest = manifest
        self.part = ""  # which fraction of the documents this is; all of them
        self._embedder = embedder
        self._index_kind = index
        self.chunk_size: int = manifest["chunk_size"]
        self.vocabulary_size: int = manifest["vocabulary_size"]
        self.d_key: int = manifest["embedder"]["d_key"]
        self.margin: int = manifest["embedder"]["margin"]
        self.training_neighbours: bool = manifest.get("training_neighbours", True)
        self.tokenizer = load_tokenizer(path / TOKENIZER)
        self.documents = Documents(path / DOCUMENTS)
        self._hidden = np.load(path / tombstones_of("train"), allow_pickle=False)  # sorted ids that nothing finds
        self._tokens = self._sharded(shard_dir("train"), "tokens.npy", self._hidden)
        self._documents = self._sharded(shard_dir("train"), "documents.npy")

    @classmethod
    def open(cls, path, embedder=None, index: str = "hnsw") -> "Database":
        """Open a finished database; every file is held against its hash before anything reads it.

        embedder: what makes a query's key; None: all-MiniLM-L6-v2, loaded at the first search by text. index: "hnsw"
        or "exact". Raises UserError where there is no database, where a file has changed, where embedders differ.
        """
        path = Path(path)
        if index not in ("hnsw", "exact"):
            raise UserError(f"an index is hnsw or exact, not {index!r}")
        settle_edit(path)
        manifest = read_manifest(path)
        broken = broken_files(path, manifest)
        if broken and edited_since(path, manifest):  # while they were looked at
            return cls.open(path, embedder, index)
        if broken:
            more = f", and {len(broken) - 1} more files are broken (retro-np verify names them)" if broken[1:] else ""
            raise UserError(f"{broken[0]}{more}: build the database anew in another folder")
        allow_open_files(len(manifest["files"]) + SPARE_FILES)
        try:
            database = cls(path, manifest, embedder, index)
        except EditedError:
            return cls.open(path, embedder, index)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, EOFError) as error:  # sealed over what is no database
            raise UserError(
                f"{path} does not hold what a database holds ({type(error).__name__}): build it anew"
            ) from error
        if embedder is not None:
            database.check_embedder(embedder)
        return database

    @property
    def n_chunks(self) -> int:
        """How many chunks can be retrieved (those of the training split)."""
        return len(self._tokens)

    @property
    def n_removed(self) -> int:
        """How many chunks were removed, and lie in the files still."""
        return len(self._hidden)

    @property
    def first_ids(self) -> list[int]:
        """The id of each shard's first chunk."""
        return self._tokens.starts[:-1].tolist()

    @property
    def identity(self) -> dict:
        """The manifest's hash, which tells this database from any other, and the tokenizer's: what its ids mean."""
        whole = {"database": self.manifest["sha256"], "tokenizer": self.manifest["tokenizer"]}
        return whole | {"part": self.part} if self.part else whole

    @cached_property
    def embedder(self):
        """The embedder that keys were made with: the one given at opening, or the database's own counts, or the BERT
        that is installed. Raises UserError where the one at hand is another.
        """
        if self._embedder is None:
            own = HASHING in self.manifest["files"]
            self._embedder = load_hashing(self.path / HASHING, self.tokenizer) if own else load_bert()
            self.check_embedder(self._embedder)
        return self._embedder

    def check_embedder(self, embedder) -> None:
        """Raise UserError unless this is the embedder that made the keys."""
        built = self.manifest["embedder"]
        if embedder.sha256 != built["sha256"]:
            raise UserError(
                f"{self.path} was built with embedder {built['name']} ({built['sha256'][:6]}…), and this is "
                f"{embedder.name} ({embedder.sha256[:6]}…); pass --embedder, or build a database of its own: "
                "retro-np build CORPUS -o DB"
            )

    def search(self, text: str | list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k values whose keys are nearest to a text's: ids and squared distances, (k,), or (N, k) for a list.

        −1 and inf where the database holds fewer than k. Raises UserError for k < 1.
        """
        texts = [text] if isinstance(text, str) else list(text)
        texts = [LONE_SURROGATE.sub("\ufffd", t) if isinstance(t, str) else t for t in texts]
        ids, distances = self.search_keys(self.embedder.embed(texts, show_progress=False), k)
        return (ids[0], distances[0]) if isinstance(text, str) else (ids, distances)

    def search_keys(self, keys: np.ndarray, k: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, for keys (N, d_key) that are there already; exact: compare with every key."""
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise UserError(f"a search is for at least one neighbour, a whole number, not {k!r}")
        k, keys = int(k), np.asarray(keys, np.float32)
        if keys.ndim != 2 or keys.shape[1] != self.d_key:
            raise UserError(f"keys are (N, {self.d_key}), not {keys.shape}")
        if not np.all(np.isfinite(keys)):
            raise UserError("a key to search for is NaN or infinite: mend what made it")
        if k * max(1, len(keys)) > MOST_FOUND:
            raise UserError(
                f"{k:,} neighbours of {len(keys):,} keys are more than {MOST_FOUND:,} at once: ask for fewer"
            )
        found = [(np.empty((len(keys), 0), np.int64), np.empty((len(keys), 0), np.float32))]
        unread = any("index" not in vars(shard) for shard in self._shards)
        for shard, start, hidden in zip(self._shards, self._tokens.starts, self.hidden_rows, strict=False):
            most = min(k, max(1, len(shard.keys)))
            rows, distances = search_shard(shard, keys, most, hidden=hidden, exact=exact)
            found.append((np.where(rows >= 0, rows + start, -1), distances))
        if unread:  # files were opened just now
            self._check_unedited()
        return merge_lists(found, k)

    def value(self, ids) -> np.ndarray:
        """[N, F] of chunk ids of any shape: (..., 2m) tokens, the chunk and its continuation in the same document.

        Padding for id −1, for a removed chunk, and for F where the document ends. Raises UserError for an id that there
        is not.
        """
        ids = self._checked_ids(ids)
        out = np.zeros((*ids.shape, 2 * self.chunk_size), np.int64)
        if not self.n_chunks:
            return out
        here = np.maximum(ids, 0)
        following = np.minimum(here + 1, self.n_chunks - 1)
        same = (ids >= 0) & (here + 1 < self.n_chunks) & (self._documents[here] == self._documents[following])
        out[..., : self.chunk_size] = np.where((ids >= 0)[..., None], self._tokens[here], 0)
        out[..., self.chunk_size :] = np.where(same[..., None], self._tokens[following], 0)
        return out

    def document_of(self, ids) -> np.ndarray:
        """The document number of each chunk id, −1 for −1. Raises UserError for an id that there is not."""
        ids = self._checked_ids(ids)
        if not self.n_chunks:
            return np.full(ids.shape, -1)
        return np.where(ids >= 0, self._documents[np.maximum(ids, 0)], -1)

    def removed(self, ids) -> np.ndarray:
        """Whether each chunk id was taken out of the database: no search finds it, and its value is padding."""
        return is_in(ids, self._hidden)

    def fraction(self, share: float, seed: int = 0) -> "Database":
        """The same database with a random share of its documents, as in the paper's figures over size: only they are
        found, and trained on.

        Whether a document is among them is a function of the seed and its name: a larger share holds a smaller one.
        Raises UserError for a share that is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise UserError(f"a fraction of a database is above 0 and at most 1, not {share}")
        if share == 1:
            return self
        part = self._only(lambda record: place_of(f"fraction {seed} {record['name']}") < share)
        part.part = f"{share} of the documents, seed {seed}"
        return part

    def without(self, sha256s: set[str]) -> "Database":
        """The same database, where no document is found that has one of these texts, known by their SHA-256."""
        return self._only(lambda record: record["sha256"] not in sha256s)

    def _only(self, kept) -> "Database":
        """The same files, with only the documents found whose record `kept` says yes to."""
        dropped = np.array([not kept(record) for record in self.documents], bool)
        part = copy.copy(self)
        part._hidden = np.union1d(self._hidden, np.flatnonzero(dropped[np.asarray(self._documents)]))
        part._tokens = self._sharded(shard_dir("train"), "tokens.npy", part._hidden)
        for name in ("_shards", "hidden_rows"):
            part.__dict__.pop(name, None)
        return part

    def split(self, name: str) -> Split:
        """The chunks of "train" or "valid" with their precomputed neighbours. Raises UserError for another name."""
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.path} has no split {name!r}: it has {', '.join(self.manifest['splits'])}")
        home = shard_dir(name)
        removed = self._hidden if name == "train" else np.load(self.path / tombstones_of(name), allow_pickle=False)
        sources = _present(self.manifest["sources"], removed) if name == "train" else ()
        if self.part and all(weight is None for weight, _ in sources):
            # what is hidden is most of the rows: one source, of the others, so that no sequence is of padding
            sources = ((1.0, tuple(itertools.chain.from_iterable(ranges for _, ranges in sources))),)
        return Split(
            name,
            self._sharded(home, "tokens.npy", removed),
            self._sharded(home, "documents.npy"),
            self._sharded(f"neighbours/{name}", "ids.npy"),
            self._sharded(f"neighbours/{name}", "distances.npy"),
            sources,
            removed,
        )

    def keys(self, split: str) -> Sharded:
        """The keys of a split's chunks, (N, d_key), as they were stored; zeros for removed ones."""
        removed = np.load(self.path / tombstones_of(split), allow_pickle=False)
        return self._sharded(shard_dir(split), "keys.npy", removed)

    def text(self, tokens) -> str:
        """The text of a row of tokens."""
        return decode(self.tokenizer, np.asarray(tokens).tolist())

    def embed_chunks(self, chunks: np.ndarray) -> np.ndarray:
        """Keys (N, d_key) of chunks of tokens (N, m)."""
        if hasattr(self.embedder, "embed_tokens"):
            return self.embedder.embed_tokens(np.asarray(chunks))
        return self.embedder.embed([self.text(chunk) for chunk in chunks], show_progress=False)

    def folders(self, home: str) -> list[Path]:
        """The shards below a folder, in order: those whose hashes were checked, whatever else lies there."""
        parents = (self.path / name for name in self.manifest["files"] if name.startswith(home + "/"))
        folders = {file.parent for file in parents if file.parent != self.path / home}
        return sorted(folders, key=lambda folder: int(folder.name))

    @cached_property
    def _shards(self) -> list[Shard]:
        margin = None if self._index_kind == "exact" else self.margin
        return [Shard.open(folder, margin) for folder in self.folders(shard_dir("train"))]

    @cached_property
    def hidden_rows(self) -> list[np.ndarray]:
        """What is hidden of each shard, in its own rows."""
        starts = self._tokens.starts
        return [
            self._hidden[np.searchsorted(self._hidden, start) : np.searchsorted(self._hidden, stop)] - start
            for start, stop in itertools.pairwise(starts)
        ]

    def _sharded(self, home: str, name: str, blank=None) -> Sharded:
        rows = Sharded([mapped(folder / name) for folder in self.folders(home)], blank)
        self._check_unedited()
        return rows

    def _check_unedited(self) -> None:
        """Raise UserError where files that were just opened may be an edit's, whose ids mean something else."""
        if edited_since(self.path, self.manifest):
            raise EditedError(f"{self.path} was edited since it was opened: open it again")

    def _checked_ids(self, ids) -> np.ndarray:
        ids = np.asarray(ids, np.int64) if np.size(ids) == 0 else np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"chunk ids are integers, not {ids.dtype}")
        if ids.size and (ids.min() < -1 or ids.max() >= self.n_chunks):
            wrong = ids.min() if ids.min() < -1 else ids.max()
            raise UserError(f"chunk ids go from 0 to {self.n_chunks - 1} (−1: none) in {self.path}, not {wrong}")
        return ids.astype(np.int64)


def _present(sources, removed) -> tuple:
    """Weight and row ranges of each source, without removed rows; a source of which nothing is left is none."""
    found = []
    for source in sources:
        ranges = []
        for start, stop in source["rows"]:
            gone = removed[np.searchsorted(removed, start) : np.searchsorted(removed, stop)]
            edges = np.concatenate([[start - 1], gone, [stop]])
            gaps = zip(edges[:-1] + 1, edges[1:], strict=True)
            ranges += [(int(begin), int(end)) for begin, end in gaps if begin < end]
        if ranges or not source["rows"]:
            found.append((source["weight"], tuple(ranges)))
    return tuple(found)
