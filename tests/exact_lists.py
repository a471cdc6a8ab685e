"""What tests of edits read in a database, and exact search over everything, which its lists are held against."""

import numpy as np

from retro_np.kernels.search import exact_search


def lists_by_exact_search(database, split):
    """What the neighbours of every chunk of a split should be: a sort of all distances, its own document left out."""
    stored, keys = database.split(split), np.asarray(database.keys("train")[:], np.float32)
    documents, width = database.split("train").documents[:], stored.neighbours.shape[1]
    ids, distances = exact_search(np.asarray(database.keys(split)[:], np.float32), keys, len(keys))
    found = np.full((len(ids), width), -1), np.full((len(ids), width), np.inf, np.float32)
    for row, own in enumerate(stored.documents[:]):
        kept = [i for i, near in enumerate(ids[row]) if split == "valid" or documents[near] != own][:width]
        found[0][row, : len(kept)], found[1][row, : len(kept)] = ids[row, kept], distances[row, kept]
    return found


def assert_lists_are_exact(database):
    for split in ("train", "valid"):
        ids, distances = lists_by_exact_search(database, split)
        assert np.array_equal(database.split(split).neighbours[:], ids)
        assert np.array_equal(database.split(split).distances[:], distances)


def rows_of(database, split="train"):
    """Tokens, documents, neighbours and distances of a split, read into memory."""
    stored = database.split(split)
    return [np.asarray(part) for part in (stored.tokens, stored.documents, stored.neighbours, stored.distances)]


def numbers_of(database, split):
    return [r["id"] for r in database.documents if r["split"] == split and not r.get("removed")]
