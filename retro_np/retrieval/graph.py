"""Check a shard's graph before hnswlib gets it, because hnswlib trusts every number in it.

The file index.hnsw is a HEADER; then, for each node, its number of links, 2 · LINKS links, its key and its label; then,
for each node, the size in bytes of its lists above layer 0, and these lists. A list is a number of links and LINKS
links. Numbers after the header are words of 32 bits, except labels. SECURITY.md says why
hnswlib reads nothing out of bounds in what passes `check_graph`. A graph that passes may still be a bad one:
`retro-np verify` compares its keys and measures its recall."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.retrieval.manifest import REBUILD

LINKS = 16  # links per node and layer (M); layer 0 has twice as many
EF_CONSTRUCTION = 200
HINT = f"{REBUILD}, or search with --exact"
SIZES = ("offset_level0", "max_elements", "count", "node_size", "label_offset", "key_offset")
LIMITS = [("max_links", np.uintp), ("max_links0", np.uintp), ("links", np.uintp), ("mult", "f8"), ("ef", np.uintp)]
HEADER = np.dtype([*((name, np.uintp) for name in SIZES), ("top", np.int32), ("entry", np.uint32), *LIMITS])
WORD, WORDS_PER_NODE, WORDS_PER_LIST = 4, 1 + 2 * LINKS, 1 + LINKS  # without a node's key and label
LIST_BYTES = WORD * WORDS_PER_LIST
# n nodes have about n / 15 lists above layer 0, in about log₁₆ n layers. More than n + 64, or than 64, are refused.
MAX_TOP = 64
NODES_PER_BLOCK = 1024


def first_rows(path: Path | str, first: np.ndarray, size: int) -> np.ndarray:
    """The rows whose keys are in the graph, ascending: the first row with each key.

    path: the file equal.npy, which holds `first` (see `HnswIndex`). size: the number of keys. Raises UserError unless
    `first` is empty or has for each row the first row of its group."""
    rows = np.arange(size)
    if not len(first):
        return rows
    if len(first) != size or not ((first >= 0) & (first <= rows)).all() or not np.array_equal(first[first], first):
        raise UserError(f"{path} does not name the first of equal keys for each of {size:,} keys: {HINT}")
    return np.flatnonzero(first == rows)


def check_graph(path: Path | str, keys: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Read a graph file: what `hnswlib.Index(params=...)` needs besides its settings.

    keys: (n, d_key), at least one. labels: the rows of `keys` that are in the graph, ascending. The copies of the keys
    in the file are not compared. Raises UserError unless hnswlib can search the graph without leaving its memory."""
    try:
        return _checked(path, keys.shape[1], labels)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a graph of its shard's keys ({error}): {HINT}") from error


def _checked(path, width, labels) -> dict[str, Any]:
    n, key_at, label_at = len(labels), WORDS_PER_NODE * WORD, (WORDS_PER_NODE + width) * WORD
    node_size = label_at + np.dtype(np.uintp).itemsize
    lists_at = HEADER.itemsize + n * node_size
    size = os.path.getsize(path)
    n_lists, rest = divmod(size - lists_at - n * WORD, LIST_BYTES)
    if rest or not 0 <= n_lists <= n + MAX_TOP:
        raise ValueError(f"{size:,} bytes are not the length for {n:,} keys of width {width}")
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    [header] = data[: HEADER.itemsize].view(HEADER)
    top, entry = int(header["top"]), int(header["entry"])
    limits = (LINKS, 2 * LINKS, LINKS, header["mult"], EF_CONSTRUCTION)  # A search does not use `mult`.
    expected = np.array((0, n, n, node_size, label_at, key_at, top, entry, *limits), HEADER)
    if header.tobytes() != expected.tobytes() or entry >= n or not 0 <= top <= MAX_TOP:
        raise ValueError("its header says otherwise")
    node = np.dtype([("links", f"V{key_at}"), ("key", f"V{WORD * width}"), ("label", np.uintp)])
    nodes = data[HEADER.itemsize : lists_at].view(node)

    def examine(rows):
        links = nodes["links"][rows].copy().view(np.uint32).reshape(-1, WORDS_PER_NODE)
        if links[:, 0].max() > 2 * LINKS or links[:, 1:].max() >= n:
            raise ValueError("a node links to one that does not exist")
        if not np.array_equal(nodes["label"][rows], labels[rows]):
            raise ValueError("it does not have one entry for each key, in order")

    threads.parallel_for(examine, threads.blocks(n, NODES_PER_BLOCK))
    levels, lists = _checked_lists(data[lists_at:].view(np.uint32), n, top, entry)
    numbers = {"cur_element_count": n, "max_elements": n, "max_level": top, "enterpoint_node": entry, "ep_added": True}
    parts = {"element_levels": levels, "data_level0": nodes.view(np.int8), "link_lists": lists.view(np.int8)}
    lookup = {"label_lookup_external": labels, "label_lookup_internal": np.arange(n, dtype=np.uint32)}
    return numbers | parts | lookup


def _checked_lists(words, n, top, entry) -> tuple[np.ndarray, np.ndarray]:
    """Each node's highest layer, and all lists above layer 0. words: the size of each node's lists, then all lists."""
    # Most words are zero, because most nodes have no lists. Few others can be the size of lists: the search for the
    # next size starts after the lists of the last one.
    candidates = np.flatnonzero(words - np.uint32(1) < top * LIST_BYTES)
    heights, rest = np.divmod(words[candidates].astype(np.int64), LIST_BYTES)
    candidates, heights = candidates[rest == 0], heights[rest == 0]
    following = np.searchsorted(candidates, candidates + 1 + heights * WORDS_PER_LIST).tolist()
    chosen, number = [], 0
    while number < len(candidates):  # once for each node that has lists
        chosen.append(number)
        number = following[number]
    places, heights = candidates[chosen], heights[chosen]
    below = np.cumsum(heights) - heights  # the number of lists before each node's own
    nodes = places - below * WORDS_PER_LIST
    if len(words) != n + heights.sum() * WORDS_PER_LIST or (nodes >= n).any():
        raise ValueError("its lists above layer 0 have wrong sizes")
    levels = np.zeros(n, np.int32)
    levels[nodes] = heights
    if not top == levels.max() == levels[entry]:
        raise ValueError("its entry is not a node of the highest layer")
    layers = np.arange(heights.sum()) - np.repeat(below, heights) + 1
    at = np.repeat(places, heights) + 1 + (layers - 1) * WORDS_PER_LIST
    lists = words[at[:, None] + np.arange(WORDS_PER_LIST)]
    if np.count_nonzero(words) != len(places) + np.count_nonzero(lists):
        raise ValueError("its lists above layer 0 have wrong sizes")
    counts, links = lists[:, :1], lists[:, 1:]
    if (counts > LINKS).any() or (links >= n).any():
        raise ValueError("a node links to one that does not exist")
    if not ((levels[links] >= layers[:, None]) | (np.arange(LINKS) >= counts)).all():  # The rest is not in use.
        raise ValueError("a node links to one that is not in the same layer")
    return levels, lists.reshape(-1)
