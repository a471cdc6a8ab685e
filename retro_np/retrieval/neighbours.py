"""Which values a chunk is given: the nearest ones, but none of any document in its training sequence. Paper §2.3."""

from collections.abc import Callable

import numpy as np

QUERIES_A_BLOCK = 256

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def precompute_neighbours(
    keys,
    documents,
    search: Search,
    exact: Search,
    document_of,
    candidates: int,
    own_chunks=None,
    advance=lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest `candidates` values of each chunk of a shard, in order. Returns ids and squared distances (N, K).

    keys: (N, d_key) and documents: (N,) of the shard's chunks. search, exact: (queries, k) -> ids, distances.
    own_chunks: None for chunks that are not in the database; for those that are, how many chunks each document has
    there, in all shards. A chunk's own document is left out: more are fetched and filtered, then many more, and where
    too few remain exact search fetches as many as must suffice. −1, inf: none left.
    """
    ids = np.full((len(keys), candidates), -1, np.int64)
    distances = np.full((len(keys), candidates), np.inf, np.float32)
    for start in range(0, len(keys), QUERIES_A_BLOCK):
        rows = np.arange(start, min(start + QUERIES_A_BLOCK, len(keys)))
        queries = np.asarray(keys[rows], np.float32)
        if own_chunks is None:
            ids[rows], distances[rows] = search(queries, candidates)
        else:
            own_documents = documents[rows]
            enough = candidates + int(own_chunks[own_documents].max())
            short = np.arange(len(rows))
            for method, fetched in ((search, 2 * candidates), (search, 8 * candidates), (exact, enough)):
                found, distance = method(queries[short], min(fetched, enough))
                allowed = document_of(found) != own_documents[short, None]
                ids[rows[short]], distances[rows[short]] = keep_first(found, distance, allowed, candidates)
                short = np.flatnonzero(ids[rows, -1] < 0)
                if not len(short):
                    break
        advance(len(rows))
    return ids, distances


def keep_first(ids, distances, allowed, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row that are allowed and there (id ≥ 0), in their order; −1 and inf fill the rest."""
    allowed = allowed & (ids >= 0)
    order = np.argsort(~allowed, axis=-1, kind="stable")[..., :k]
    kept = np.take_along_axis(allowed, order, -1)
    first = np.where(kept, np.take_along_axis(ids, order, -1), -1)
    nearest = np.where(kept, np.take_along_axis(distances, order, -1), np.inf)
    missing = k - first.shape[-1]
    if missing > 0:
        room = [(0, 0)] * (first.ndim - 1) + [(0, missing)]
        first, nearest = np.pad(first, room, constant_values=-1), np.pad(nearest, room, constant_values=np.inf)
    return first, nearest.astype(np.float32)


def sequence_neighbours(database, split, rows: np.ndarray, k: int) -> np.ndarray:
    """Tokens of the k neighbours of each chunk of each sequence: (B, l, k, 2m), padding where there is none.

    rows: (B, l) row numbers of the split, −1 for padding. In the training split no neighbour comes from a document
    that any chunk of the sequence is of: a chunk of A that retrieved from B would leak into B's tokens behind it.
    """
    present = rows >= 0
    ids = np.where(present[..., None], split.neighbours[np.maximum(rows, 0)], -1)
    ids = np.where(database.removed(ids), -1, ids)
    if split.name == "train":
        documents = np.where(present, split.documents[np.maximum(rows, 0)], -1)
        return database.value(choose_neighbours(ids, database.document_of(ids), documents[:, None, :], k))
    return database.value(choose_neighbours(ids, database.document_of(ids), np.empty(0, np.int64), k))


def choose_neighbours(candidates, candidate_documents, excluded_documents, k: int) -> np.ndarray:
    """The first k candidates of each row that come from none of its excluded documents; −1 where fewer remain.

    candidates, candidate_documents: (..., K), nearest first, −1 missing; excluded_documents: (..., E), its leading
    axes broadcast against theirs. Returns ids (..., k).
    """
    allowed = (candidate_documents[..., :, None] != excluded_documents[..., None, :]).all(axis=-1)
    return keep_first(candidates, np.zeros(candidates.shape, np.float32), allowed, k)[0]
