"""Forged graph files (index.hnsw): one of our own with a few numbers changed, or cut, or longer.

`mutated` makes one, `tried` loads and searches it, and `outcomes` does that many times in a forked process, so that a
crash or a hang is counted. `retro_np.retrieval.graph` describes the file.
"""

import os
import pickle
import signal
from collections import Counter
from pathlib import Path

import numpy as np
from hostile.values import pick

from retro_np.errors import UserError
from retro_np.retrieval.graph import HEADER, LINKS, WORDS_PER_LIST
from retro_np.retrieval.index import build_hnsw, load_hnsw

ODD_WORDS = (
    0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 67, 68, 69, 136, 255, 2**15, 2**16, 2**16 + 1, 2**31 - 1, 2**31, 2**32 - 1,
)  # fmt: skip
ODD_SIZES = (*ODD_WORDS, 2**32, 2**32 + 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 68, 2**64 - 1)
ODD_FLOATS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0)
WORDS_OF_LABEL = 2


class Case:
    """A graph of our own to be forged: a folder, keys with equal ones among them, and the graph's bytes."""

    def __init__(self, folder: Path, n: int = 90, width: int = 6, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.folder, self.path = folder, folder / "index.hnsw"
        keys = rng.standard_normal((n, width)).astype(np.float32)
        self.keys = keys[np.r_[0:n, 0 : n // 10]]
        build_hnsw(self.keys, self.path)
        self.data = self.path.read_bytes()
        self.equal = np.load(folder / "equal.npy")

    def restore(self, first: np.ndarray | None = None) -> None:
        """Write the graph as it was, and equal.npy as it was or with other contents."""
        self.path.write_bytes(self.data)
        np.save(self.folder / "equal.npy", self.equal if first is None else first)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A graph file that resembles `data`. About a third of them can be searched: links go elsewhere, keys change."""
    words = np.frombuffer(data, np.uint32).copy()
    for _ in range(int(pick(rng, (1, 1, 1, 2, 3)))):
        pick(rng, MUTATIONS)(words, rng)
    data = words.tobytes()
    if rng.random() < 0.1:
        data = pick(rng, (_cut, _extended, _repeated, _random_bytes))(data, rng)
    return data


def header_of(words):
    """The header of a graph file as a view, (1,) HEADER. words: the file as an array of uint32."""
    return words[: HEADER.itemsize // 4].view(HEADER)


def nodes_of(words):
    """The nodes of layer 0 as a view, (n, words per node)."""
    header = header_of(words)[0]
    n, size = int(header["count"]), int(header["node_size"]) // 4
    if not 0 < n * size <= len(words) - HEADER.itemsize // 4 or size < 1 + 2 * LINKS + WORDS_OF_LABEL:
        return np.zeros((1, 1 + 2 * LINKS + WORDS_OF_LABEL), np.uint32)  # An earlier change spoilt the header.
    return words[HEADER.itemsize // 4 :][: n * size].reshape(n, size)


def lists_of(words):
    """The places of the sizes of the nodes' lists above layer 0, and the places of those that are not zero."""
    nodes = nodes_of(words)
    places, filled, place = [], [], HEADER.itemsize // 4 + nodes.size
    while place < len(words) and len(places) < len(nodes):
        places.append(place)
        if words[place]:
            filled.append(place)
        place += 1 + int(words[place]) // 4
    return places, filled


def _header_field(words, rng):
    name = pick(rng, HEADER.names)
    header = header_of(words)
    if name == "mult":
        header[name] = pick(rng, ODD_FLOATS)
    elif rng.random() < 0.5:
        header[name] += np.array(pick(rng, (1, 2, 2**16)), header.dtype[name])
    else:
        header[name] = np.array(pick(rng, ODD_SIZES), np.uint64).astype(header.dtype[name])


def _entry(words, rng):
    header, (places, filled) = header_of(words), lists_of(words)
    if filled:
        place = pick(rng, filled)
        header["entry"] = places.index(place)
        header["top"] = words[place] // (4 * WORDS_PER_LIST) if rng.random() < 0.7 else header["top"]


def _count_of_links(words, rng):
    nodes = nodes_of(words)
    nodes[rng.integers(len(nodes)), 0] = pick(rng, ODD_WORDS)


def _deleted(words, rng):
    nodes = nodes_of(words)
    nodes[rng.integers(len(nodes)), 0] |= np.uint32(2 ** int(rng.integers(5, 32)))


def _link(words, rng):
    nodes = nodes_of(words)
    value = pick(rng, (*ODD_WORDS, len(nodes), len(nodes) - 1))
    nodes[rng.integers(len(nodes)), rng.integers(1, 1 + 2 * LINKS)] = value


def _links_elsewhere(words, rng):
    """Many links to other nodes that exist: to itself, to one node, or anywhere."""
    nodes = nodes_of(words)
    rows = rng.integers(len(nodes), size=int(rng.integers(1, len(nodes) + 1)))
    targets = pick(rng, (rows[:, None], 0, len(nodes) - 1, rng.integers(len(nodes), size=(len(rows), 2 * LINKS))))
    nodes[rows, 1 : 1 + 2 * LINKS] = targets
    nodes[rows, 0] = int(rng.integers(2 * LINKS + 1))


def _label(words, rng):
    nodes = nodes_of(words)
    if rng.random() < 0.5:
        value = np.array([pick(rng, ODD_SIZES)], np.uint64).view(np.uint32)
        nodes[rng.integers(len(nodes)), -WORDS_OF_LABEL:] = value
    else:
        nodes[:, -WORDS_OF_LABEL:] = rng.permutation(nodes[:, -WORDS_OF_LABEL:])


def _key(words, rng):
    nodes = nodes_of(words)
    keys = nodes[:, 1 + 2 * LINKS : -WORDS_OF_LABEL].view(np.float32)
    if keys.size:
        rows = rng.integers(len(nodes), size=int(pick(rng, (1, 5, len(nodes)))))
        keys[rows, rng.integers(keys.shape[1])] = pick(rng, ODD_FLOATS)


def _size_of_lists(words, rng):
    places, filled = lists_of(words)
    place = pick(rng, filled if filled and rng.random() < 0.5 else places or [0])
    change = pick(rng, (*ODD_WORDS, 4 * WORDS_PER_LIST, 8 * WORDS_PER_LIST))
    words[place] = change if rng.random() < 0.5 else (int(words[place]) + change) % 2**32


def _upper_list(words, rng):
    _, filled = lists_of(words)
    if filled:
        place = pick(rng, filled)
        offset = 1 + int(rng.integers(max(1, min(int(words[place]) // 4, len(words) - place - 1))))
        words[min(place + offset, len(words) - 1)] = pick(rng, ODD_WORDS)


def _upper_links_elsewhere(words, rng):
    """Links of layer 1 to other nodes that have lists."""
    places, filled = lists_of(words)
    for place in filled:
        if rng.random() < 0.5 and place + WORDS_PER_LIST < len(words):
            targets = [places.index(pick(rng, filled)) for _ in range(LINKS)]
            words[place + 1 : place + 1 + WORDS_PER_LIST] = [int(rng.integers(LINKS + 1)), *targets]


def _anywhere(words, rng):
    words[rng.integers(len(words))] = pick(rng, (*ODD_WORDS, int(rng.integers(2**32))))


MUTATIONS = (
    _header_field, _entry, _count_of_links, _deleted, _link, _links_elsewhere, _links_elsewhere, _label, _key, _key,
    _size_of_lists, _upper_list, _upper_links_elsewhere, _upper_links_elsewhere, _anywhere,
)  # fmt: skip


def _cut(data, rng):
    return data[: int(rng.integers(len(data) + 1))]


def _extended(data, rng):
    return data + rng.bytes(int(pick(rng, (1, 4, 68, 72, 1000))))


def _repeated(data, rng):
    start, stop = sorted(int(i) for i in rng.integers(len(data), size=2))
    return data[:stop] + data[start:]


def _random_bytes(data, rng):
    start, size = int(rng.integers(len(data))), int(pick(rng, (1, 4, 100)))
    return data[:start] + rng.bytes(len(data[start : start + size])) + data[start + size :]


def mutated_equal(first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The array of equal.npy with one number changed, another length or another dtype."""
    first = first.copy()
    if rng.random() < 0.7:
        first[rng.integers(len(first))] = pick(rng, (-1, 0, 1, 5, len(first), 2**31, -(2**63), 2**63 - 1))
        return first
    others = (
        first[:-1],
        first[:0],
        np.arange(len(first)),
        first.astype(float),
        first.astype(np.uint8),
        first[None],
        first[::-1],
    )
    return pick(rng, others)


def tried(case: Case) -> str:
    """Load the case's files and search them in several ways. Returns "searched", or "refused" with its one line."""
    try:
        index = load_hnsw(case.path, case.keys)
    except UserError as error:
        line = str(error)
        return "refused" if "\n" not in line and str(case.folder) in line else f"refused with {line!r}"
    queries = np.concatenate([case.keys[:3], 1e3 * case.keys[3:4]])
    for k in (1, 7, index.n_entries):
        rows, distances = index.search_graph(queries, k)
        assert rows.shape == distances.shape == (4, k)
        assert ((rows >= 0) & (rows < len(case.keys))).all()
        assert (np.diff(distances, axis=1) >= 0).all()
    index.graph_keys(np.arange(len(case.keys)))
    return "searched"


def forked(function, *arguments, timeout: int = 60):
    """The result of a call in a forked process. Raises AssertionError if the process dies or takes too long."""
    readable, writable = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(timeout)
            try:
                result = function(*arguments)
            except BaseException as error:
                result = error
            with open(writable, "wb") as file:
                pickle.dump(result, file)
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as file:
        data = file.read()
    _, status = os.waitpid(process, 0)
    assert status == 0, f"the process ended with signal {os.WTERMSIG(status)}"
    result = pickle.loads(data)
    if isinstance(result, BaseException):
        raise result
    return result


def outcomes(case: Case, seed: int, numbers: range) -> Counter:
    """How many forged graphs were searched and how many refused. Number i of a seed is always the same graph."""
    counts = Counter[str]()
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        equal = mutated_equal(case.equal, rng) if rng.random() < 0.05 else case.equal
        np.save(case.folder / "equal.npy", equal)
        data = mutated(case.data, rng)
        case.path.write_bytes(data)
        try:
            counts[tried(case)] += 1
        except Exception as error:
            raise AssertionError(f"forged graph {number} of seed {seed}: {error!r}") from error
    return counts
