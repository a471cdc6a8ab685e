"""The retrieval database: open it, search it, read its values. Its format: the design in README.md and `build.py`."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.corpus import LONE_SURROGATE
from retro_np.retrieval.index import ExactIndex, load_hnsw
from retro_np.retrieval.neighbours import keep_first
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import decode, load_tokenizer

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Split:
    """The chunks of a split, in order of document: tokens (N, m), documents (N,), neighbours (N, K), distances (N, K).

    Documents are line numbers of documents.jsonl; neighbours are chunk ids, −1 missing, nearest first. In the split
    "train" row i is chunk i of the database.
    """

    name: str
    tokens: Sharded
    documents: Sharded
    neighbours: Sharded
    distances: Sharded


class Database:
    """A key–value store of chunks (paper §2.3): keys BERT(N), values [N, F]. Open it with `Database.open`."""

    def __init__(self, path: Path, manifest: dict, embedder, index: str):
        self.path = path
        self.manifest = manifest
        self._embedder = embedder
        self._index_kind = index
        self.chunk_size: int = manifest["chunk_size"]
        self.vocabulary_size: int = manifest["vocabulary_size"]
        self.d_key: int = manifest["embedder"]["d_key"]
        self.tokenizer = load_tokenizer(path / "tokenizer.json")
        with (path / "documents.jsonl").open(encoding="utf-8") as file:
            self.documents: list[dict] = [json.loads(line) for line in file]
        self._tokens = self._sharded("shards", "tokens.npy")
        self._documents = self._sharded("shards", "documents.npy")
        self._tombstones = np.load(path / "tombstones.npy", allow_pickle=False)

    @classmethod
    def open(cls, path, embedder=None, index: str = "hnsw") -> "Database":
        """Open a finished database; every file is held against its hash before anything reads it.

        embedder: what makes a query's key; None: all-MiniLM-L6-v2, loaded at the first search by text. index: "hnsw"
        or "exact". Raises UserError where there is no database, where a file has changed, where embedders differ.
        """
        path = Path(path)
        if index not in ("hnsw", "exact"):
            raise UserError(f"an index is hnsw or exact, not {index!r}")
        manifest = read_manifest(path)
        for name, known in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise UserError(f"{file} is missing: build the database anew in another folder")
            if file.stat().st_size != known["bytes"] or sha256_of(file) != known["sha256"]:
                raise UserError(f"{file} is not what the manifest says (its SHA-256 differs): build the database anew")
        database = cls(path, manifest, embedder, index)
        if embedder is not None:
            database.check_embedder(embedder)
        return database

    @property
    def n_chunks(self) -> int:
        """How many chunks can be retrieved (those of the training split)."""
        return len(self._tokens)

    @property
    def identity(self) -> dict:
        """The manifest's hash, which tells this database from any other, and the tokenizer's: what its ids mean."""
        return {"database": self.manifest["sha256"], "tokenizer": self.manifest["tokenizer"]}

    @cached_property
    def embedder(self):
        """The embedder that keys were made with. Raises UserError where the one at hand is another."""
        if self._embedder is None:
            self._embedder = load_bert()
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
        wanted = min(k + len(self._tombstones), self.n_chunks)
        found = []
        for index, start in zip(self._exact if exact else self._indexes, self._tokens.starts, strict=False):
            ids, distances = index.search(keys, max(1, min(wanted, len(index.keys))))
            found.append((np.where(ids >= 0, ids + start, -1), distances))
        ids, distances = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
        order = np.lexsort((ids, distances))
        ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
        return keep_first(ids, distances, ~self.removed(ids), k)

    def value(self, ids) -> np.ndarray:
        """[N, F] of chunk ids of any shape: (..., 2m) tokens, the chunk and its continuation in the same document.

        Padding for id −1, and for F where the document ends. Raises UserError for an id that there is not.
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
        """Whether each chunk id was taken out of the database: it is never found, though its value can be read."""
        return np.isin(ids, self._tombstones)

    def split(self, name: str) -> Split:
        """The chunks of "train" or "valid" with their precomputed neighbours. Raises UserError for another name."""
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.path} has no split {name!r}: it has {', '.join(self.manifest['splits'])}")
        home = "shards" if name == "train" else f"splits/{name}"
        return Split(
            name,
            self._sharded(home, "tokens.npy"),
            self._sharded(home, "documents.npy"),
            self._sharded(f"neighbours/{name}", "ids.npy"),
            self._sharded(f"neighbours/{name}", "distances.npy"),
        )

    def text(self, tokens) -> str:
        """The text of a row of tokens."""
        return decode(self.tokenizer, np.asarray(tokens).tolist())

    def embed_chunks(self, chunks: np.ndarray) -> np.ndarray:
        """Keys (N, d_key) of chunks of tokens (N, m)."""
        return self.embedder.embed([self.text(chunk) for chunk in chunks], show_progress=False)

    @cached_property
    def _indexes(self):
        if self._index_kind == "exact":
            return self._exact
        folders = self._folders("shards")
        return [load_hnsw(folder / "index.hnsw", _map(folder / "keys.npy")) for folder in folders]

    @cached_property
    def _exact(self):
        return [ExactIndex(keys) for keys in self._sharded("shards", "keys.npy").parts]

    def _sharded(self, home: str, name: str) -> Sharded:
        return Sharded([_map(folder / name) for folder in self._folders(home)])

    def _folders(self, home: str) -> list[Path]:
        """The shards below a folder: those whose hashes were checked, whatever else lies there."""
        parents = (self.path / name for name in self.manifest["files"] if name.startswith(home + "/"))
        return sorted({file.parent for file in parents})

    def _checked_ids(self, ids) -> np.ndarray:
        ids = np.asarray(ids, np.int64) if np.size(ids) == 0 else np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"chunk ids are integers, not {ids.dtype}")
        if ids.size and (ids.min() < -1 or ids.max() >= self.n_chunks):
            wrong = ids.min() if ids.min() < -1 else ids.max()
            raise UserError(f"chunk ids go from 0 to {self.n_chunks - 1} (−1: none) in {self.path}, not {wrong}")
        return ids.astype(np.int64)


def read_manifest(path: Path) -> dict:
    """A database's manifest, checked against its own hash. Raises UserError where there is none, or it has changed."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        begun = (Path(path) / "build.json").is_file()
        hint = "its build was not finished: run the same retro-np build again" if begun else "retro-np build makes one"
        raise UserError(f"no database at {path}: {hint}")
    try:
        written = file.read_bytes()
        manifest = json.loads(written)
        intact = manifest["sha256"] == manifest_sha256(manifest) and written == manifest_bytes(manifest)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{file} has been changed or damaged (its own SHA-256 differs): build the database anew")
    if manifest["format"] != FORMAT:
        raise UserError(f"{file} is of format {manifest['format']}, and this version reads {FORMAT}: build it anew")
    return manifest


def manifest_sha256(manifest: dict) -> str:
    """The hash of a manifest without the entry that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_bytes(manifest: dict) -> bytes:
    """What manifest.json holds, to the byte, so that no change to it goes unseen."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _map(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False, mmap_mode="r")
