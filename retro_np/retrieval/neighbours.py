"""Which values a chunk is given: the nearest ones, but none of any document in its training sequence. Paper §2.3."""

from collections.abc import Callable

import numpy as np

QUERIES_A_BLOCK = 256

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def precompute_neighbours(
    keys, documents, search: Search, exact: Search, document_of, candidates: int, own: bool, advance=lambda n: None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest `candidates` values of each chunk of a split, in order. Returns ids and squared distances (N, K).

    keys: (N, d_key) and documents: (N,) of the split's chunks. search, exact: (queries, k) -> ids, distances.
    own: whether the split is in the database itself, so that a chunk's own document must be left out: more are
    fetched and filtered, and where too few remain exact search fetches as many as must suffice. −1, inf: none left.
    """
    ids = np.full((len(keys), candidates), -1, np.int64)
    distances = np.full((len(keys), candidates), np.inf, np.float32)
    chunks_of = np.bincount(documents) if own and len(documents) else None
    for start in range(0, len(keys), QUERIES_A_BLOCK):
        rows = np.arange(start, min(start + QUERIES_A_BLOCK, len(keys)))
        queries = np.asarray(keys[rows], np.float32)
        if not own:
            ids[rows], distances[rows] = search(queries, candidates)
        else:
            own_documents = documents[rows]
            found = search(queries, 2 * candidates)
            kept = keep_first(*found, document_of(found[0]) != own_documents[:, None], candidates)
            short = np.flatnonzero(kept[0][:, -1] < 0)
            if len(short):
                enough = candidates + int(chunks_of[own_documents[short]].max())
                found = exact(queries[short], enough)
                more = keep_first(*found, document_of(found[0]) != own_documents[short, None], candidates)
                kept[0][short], kept[1][short] = more
            ids[rows], distances[rows] = kept
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
    ids = np.asarray(split.neighbours[np.maximum(rows, 0)])
    allowed = np.broadcast_to((rows >= 0)[..., None], ids.shape).copy()
    if split.name == "train":
        sources = database.document_of(ids)
        documents = np.where(rows >= 0, split.documents[np.maximum(rows, 0)], -1)
        for b, present in enumerate(documents):
            allowed[b] &= ~np.isin(sources[b], present)
    chosen, _ = keep_first(ids, np.zeros(ids.shape, np.float32), allowed, k)
    return database.value(chosen)
