"""For tests of edits: what a database holds, and the neighbour lists that exact search over all keys gives."""

import numpy as np

from retro_np.kernels.search import exact_search


def lists_by_exact_search(database, split):
    """The nearest chunks of every chunk of a split, by exact search and without those of its own document."""
    stored, keys = database.split(split), np.asarray(database.keys("train")[:], np.float32)
    documents, width = database.split("train").documents[:], stored.neighbours.shape[1]
    ids, distances = exact_search(np.asarray(database.keys(split)[:], np.float32), keys, len(keys))
    lists = np.full((len(ids), width), -1), np.full((len(ids), width), np.inf, np.float32)
    for row, number in enumerate(stored.documents[:]):
        allowed = [i for i, near in enumerate(ids[row]) if split != "train" or documents[near] != number][:width]
        lists[0][row, : len(allowed)], lists[1][row, : len(allowed)] = ids[row, allowed], distances[row, allowed]
    return lists


def assert_lists_are_exact(database):
    for split in database.manifest["splits"]:
        ids, distances = lists_by_exact_search(database, split)
        assert np.array_equal(database.split(split).neighbours[:], ids)
        assert np.array_equal(database.split(split).distances[:], distances)


def rows_of(database, split="train"):
    """Tokens, documents, neighbours and distances of a split, read into memory."""
    stored = database.split(split)
    return [np.asarray(part) for part in (stored.tokens, stored.documents, stored.neighbours, stored.distances)]


def numbers_of(database, split):
    return [r["id"] for r in database.documents if r["split"] == split and not r.get("removed")]
