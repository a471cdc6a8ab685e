"""Find training documents that are near-duplicates of held-out ones: MinHash, banding, then the exact similarity.

The similarity of two documents is the Jaccard similarity of their sets of 13-grams, |A ∩ B| / |A ∪ B|. The paper (§2.1)
drops training documents at 0.8 or more. MinHash signatures (Broder 1997) estimate it. Banding the signatures finds the
few promising pairs without comparing them all (Indyk & Motwani 1998; Leskovec, Rajaraman & Ullman, chapter 3). Pairs
that may reach the threshold are compared exactly, so that no document is dropped because of an estimate.
`words.py` defines a text's words, and retro_np/kernels/minhash.py their grams."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels.minhash import NO_GRAM, gram_hashes, minhash, mix, multipliers
from retro_np.retrieval.words import word_bytes

MIN_DETECTION = 0.9  # The bands must detect this share of pairs at the threshold. The default bands miss 5 in 10⁸.
STANDARD_ERRORS = 4  # A pair is compared exactly unless its estimate is this far below the threshold.
MAX_WORDS_PER_GRAM, MAX_HASHES = 1000, 65_536  # Larger values are mistakes.
BATCH_BYTES = 1 << 23  # bytes of text whose signatures are computed together
CACHED_DOCUMENTS = 64  # held-out documents whose grams are kept, since their copies often stand together
# MinHash is used where it detects this share of pairs. With 0.1 to 64 MB of held-out text it took 0.3 to 0.9 times as
# long as the exact comparison (benchmarks/deduplicate_methods.py).
SURE_DETECTION = 0.999
TABLE_BITS = 28  # at most; of the table of a GramIndex


@dataclass(frozen=True)
class DedupConfig:
    """Which documents count as near-duplicates, and how they are found. Raises UserError for invalid settings."""

    threshold: float = 0.8  # Documents of at least this Jaccard similarity are dropped.
    words: int = 13  # words per gram
    hashes: int = 128  # hashes per signature
    bands: int = 32  # bands per signature, each of hashes / bands entries

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Real) or not 0 < self.threshold <= 1:
            raise UserError(f"deduplication: threshold must be a number in (0, 1], not {self.threshold!r}")
        for name, maximum in (("words", MAX_WORDS_PER_GRAM), ("hashes", MAX_HASHES), ("bands", MAX_HASHES)):
            if not isinstance(value := getattr(self, name), Integral) or not 1 <= value <= maximum:
                raise UserError(f"deduplication: {name} must be a whole number from 1 to {maximum}, not {value!r}")
        if self.hashes % self.bands:
            raise UserError(f"deduplication: {self.hashes} hashes cannot be divided evenly into {self.bands} bands")

    @property
    def compares_exactly(self) -> bool:
        """Whether to compare all pairs exactly, since MinHash would miss some at the threshold. Else it is faster."""
        return detection_probability(self.threshold, self) < SURE_DETECTION


class Duplicate(NamedTuple):
    """A training document (its row in the batch), the held-out row it resembles, and their similarity."""

    row: int
    held: int
    estimated: float
    exact: float


@dataclass(frozen=True)
class BandIndex:
    """An index of held-out signatures by band, made by `band_index`. Equal signatures are stored once.

    config: the settings. signatures: (U, hashes) uint32, in the order of their first held-out rows. members: the
    held-out rows of each, ascending. keys: (bands, U) uint64, sorted within each band. order: (bands, U), the signature
    of each key."""

    config: DedupConfig
    signatures: np.ndarray
    members: list[list[int]]
    keys: np.ndarray
    order: np.ndarray


class GramIndex:
    """An index of held-out documents by gram. It finds all that share a gram with a text.

    parts: (2, G) uint64 arrays that `postings` made; they may be memory-mapped. counts: the documents of each part,
    whose rows follow those of the parts before. config: the settings. A table of up to 256 MiB excludes most grams that
    no document has."""

    def __init__(self, parts: Sequence[np.ndarray], counts: Sequence[int], config: DedupConfig):
        self.config, self._parts, self._starts = config, parts, np.cumsum([0, *counts])
        self._sizes = [np.bincount(part[1].view(np.int64), minlength=n) for part, n in zip(parts, counts, strict=True)]
        self.signatures: dict[int, np.ndarray] = {}  # of documents that were found
        bits = min(TABLE_BITS, (8 * sum(len(part[0]) for part in parts)).bit_length() + 1)
        self._shift, self._table = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        for part in parts:
            self._table[part[0] >> self._shift] = True

    def similarities(self, text: str, minimum: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The rows of documents that share a gram with a text, ascending, and their Jaccard similarities with it.

        Those of less than `minimum` are left out. Of equal documents of a part only the first is returned."""
        text_grams, size = _gram_hashes(text, self.config.words), 0
        known, parts = _unique(text_grams[self._table[text_grams >> self._shift]]), []
        for part, sizes, start in zip(self._parts, self._sizes, self._starts, strict=False):
            low, high = np.searchsorted(part[0], known), np.searchsorted(part[0], known, side="right")
            positions = np.repeat(high - np.cumsum(high - low), high - low) + np.arange((high - low).sum())
            common = np.bincount(part[1][positions].view(np.int64), minlength=len(sizes))
            near = np.flatnonzero((common > 0) & (common > minimum * sizes - 0.5))  # since |A ∪ B| is at least |B|
            size = size or (len(_unique(text_grams)) if len(near) else 0)
            parts.append((start + near, common[near] / (size + sizes[near] - common[near])))
        rows, shares = map(np.concatenate, zip(*parts, strict=True))
        return rows[shares >= minimum], shares[shares >= minimum]


def grams(texts: Sequence[str], words: int = 13) -> list[np.ndarray]:
    """Each text's set of grams: sorted unique hashes, (grams,) uint64."""
    return [_unique(_gram_hashes(text, words)) for text in texts]


def _gram_hashes(text, words):
    """The hashes of a text's grams in order, (grams,) uint64."""
    return gram_hashes(np.frombuffer(word_bytes(text), np.uint8), words)


def signatures(texts: Iterable[str], config: DedupConfig) -> np.ndarray:
    """MinHash signatures of texts, (N, hashes) uint32. Every entry is 0xFFFFFFFF for a text without words."""
    factors, parts = multipliers(config.hashes), []
    for batch in grouped(map(word_bytes, texts), len, BATCH_BYTES):
        offsets = np.cumsum([0, *map(len, batch)])
        parts.append(minhash(np.frombuffer(b"".join(batch), np.uint8), offsets, config.words, factors))
    return np.concatenate(parts)


def grouped(items: Iterable[Any], size_of: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Consecutive items in lists. Each list ends where its items' sizes reach the limit; the last may be empty."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= limit:
            yield group
            group, size = [], 0
    yield group


def jaccard(text_a: str, text_b: str, words: int = 13) -> float:
    """The exact Jaccard similarity of two texts' grams, in [0, 1]. It is 0 if either text has no words."""
    return _similarity(*grams([text_a, text_b], words))


def band_index(held_signatures: np.ndarray, config: DedupConfig) -> BandIndex:
    """Index held-out signatures (H, hashes) for `candidates`.

    Raises UserError unless they fit the settings, and the bands detect pairs at the threshold."""
    if (detection := detection_probability(config.threshold, config)) < MIN_DETECTION:
        found = f"only {100 * detection:.0f} % of the pairs at the threshold {config.threshold}"
        fault = f"deduplication: {config.bands} bands of {config.hashes // config.bands} hashes detect {found}"
        raise UserError(f"{fault}: compare exactly, or give more bands, up to {config.hashes}")
    held_signatures, members = _checked(held_signatures, config), dict[bytes, list[int]]()
    for row in np.flatnonzero((held_signatures != NO_GRAM).any(axis=1)).tolist():  # without grams nothing is similar
        members.setdefault(held_signatures[row].tobytes(), []).append(row)
    unique = held_signatures[np.array([rows[0] for rows in members.values()], np.int64)]
    keys = _band_keys(unique, config)
    order = np.argsort(keys, axis=1, kind="stable")
    return BandIndex(config, unique, list(members.values()), np.take_along_axis(keys, order, axis=1), order)


def index_of_held(
    parts: Sequence[np.ndarray], counts: Sequence[int], config: DedupConfig, exact: bool
) -> BandIndex | GramIndex:
    """The index of held-out shards: `parts` of signatures, or if `exact` of postings. counts: the documents of each."""
    return GramIndex(parts, counts, config) if exact else band_index(np.concatenate(parts), config)


def candidates(signatures: np.ndarray, index: BandIndex) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The signatures that agree in a band and whose estimate is at most 4 standard errors below the threshold.

    signatures: (N, hashes) uint32 of training documents. Yields, for each of them that agrees with an indexed one in a
    band, its row, the rows (P,) int64 of index.signatures, and the estimates (P,) float64, the shares of equal hashes,
    by descending estimate and ascending row. Raises UserError for signatures of other settings."""
    config, threshold = index.config, index.config.threshold
    standard_error = math.sqrt(threshold * (1 - threshold) / config.hashes)
    min_equal = math.ceil((threshold - STANDARD_ERRORS * standard_error) * config.hashes - 1e-9)
    keys = list(zip(index.keys, _band_keys(_checked(signatures, config), config), strict=True))
    low, high = (np.stack([np.searchsorted(*pair, side=side) for pair in keys], 1) for side in ("left", "right"))
    for row in np.flatnonzero((low < high).any(axis=1)).tolist():
        bands = zip(index.order, low[row], high[row], strict=True)
        near = _unique(np.concatenate([band[start:stop] for band, start, stop in bands]))
        equal = np.count_nonzero(index.signatures[near] == signatures[row], axis=1)
        best = np.argsort(-equal, kind="stable")[: np.count_nonzero(equal >= min_equal)]
        yield row, near[best], equal[best] / config.hashes


def detection_probability(similarity: float, config: DedupConfig) -> float:
    """The probability that a pair of Jaccard similarity s agrees in a band: 1 − (1 − s^(hashes/bands))^bands."""
    return 1 - (1 - similarity ** (config.hashes // config.bands)) ** config.bands


def find_duplicates(
    texts: Sequence[str], index: BandIndex | GramIndex, held_text: Callable[[int], str]
) -> list[Duplicate]:
    """The texts whose exact similarity with a held-out document reaches the threshold.

    index: made by `band_index`, which misses few, or a GramIndex, which misses none. held_text: returns the text of a
    held-out row; called only for rows that are compared. Returns at most one record per text, in order of the texts:
    that of the held-out document with the best estimate among those that reach the threshold."""
    if isinstance(index, GramIndex):
        return list(_compared_by_grams(texts, index, held_text))
    config, duplicates = index.config, list[Duplicate]()
    grams_of = functools.lru_cache(CACHED_DOCUMENTS)(lambda held: grams([held_text(held)], config.words)[0])

    @functools.cache
    def others(signature):  # with this signature but other grams than its first document, each once
        row_of = {hashlib.sha256(grams_of(row)).digest(): row for row in reversed(index.members[signature])}
        return sorted(row_of.values())[1:]

    def documents(signature):
        yield index.members[signature][0]
        yield from others(signature)

    for row, near, estimates in candidates(signatures(texts, config), index):
        text_grams = grams([texts[row]], config.words)[0]
        matches = (
            Duplicate(row, held, estimate, exact)
            for signature, estimate in zip(near.tolist(), estimates.tolist(), strict=True)
            for held in documents(signature)
            if (exact := _similarity(text_grams, grams_of(held))) >= config.threshold
        )
        duplicates += itertools.islice(matches, 1)
    return duplicates


def _compared_by_grams(texts, index, held_text):
    config, signed = index.config, index.signatures
    for number, text in enumerate(texts):
        rows, exact = index.similarities(text, config.threshold)
        if len(rows):
            held = rows.tolist()
            signed |= {row: signatures([held_text(row)], config)[0] for row in held if row not in signed}
            estimates = (np.stack([signed[row] for row in held]) == signatures([text], config)).mean(axis=1)
            best = int(np.argmax(estimates))
            yield Duplicate(number, held[best], float(estimates[best]), float(exact[best]))


def postings(texts: Iterable[str], words: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """Which documents have which gram: (2, G) uint64, the sorted hashes of grams and the row of a document beside each.

    Of documents with the same grams only the first has entries; its row is also returned for each of them, (N,)."""
    rows: dict[bytes, int] = {}
    sets, first = [np.empty(0, np.uint64)], []
    for row, text in enumerate(texts):
        (text_grams,) = grams([text], words)
        first.append(rows.setdefault(hashlib.sha256(text_grams.tobytes()).digest(), row))
        sets.append(text_grams if first[-1] == row else text_grams[:0])
    hashes, owners = np.concatenate(sets), np.repeat(np.arange(len(sets), dtype=np.uint64), list(map(len, sets))) - 1
    order = np.argsort(hashes)
    return np.stack([hashes[order], owners[order]]), np.array(first, np.int64)


def nearest_similarity(texts: Iterable[str], held_texts: Iterable[str], words: int = 13) -> np.ndarray:
    """For each held-out document the largest Jaccard similarity of its grams with those of a training document.

    texts: the training documents, read once, one at a time. held_texts: the held-out documents. words: per gram.
    Returns (held-out documents,) float64 in [0, 1]; 0 for a document without words. The similarities are exact. Memory:
    one training document, and about 40 bytes for each gram of the held-out documents."""
    part, first = postings(held_texts, words)
    index, nearest = GramIndex([part], [len(first)], DedupConfig(words=words)), np.zeros(len(first))
    for text in texts:
        rows, similarities = index.similarities(text)
        nearest[rows] = np.maximum(nearest[rows], similarities)
    return nearest[first]


def _unique(values):
    """The sorted unique values. np.unique uses a hash table, which takes a minute for 15 million."""
    values, first = np.sort(values), np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def _similarity(a, b) -> float:
    """Jaccard similarity of two sets, given as sorted arrays."""
    merged = np.sort(np.concatenate([a, b]), kind="stable")  # a stable sort merges sorted runs quickly
    common = np.count_nonzero(merged[1:] == merged[:-1])
    return common / (len(a) + len(b) - common) if common else 0.0


def _band_keys(signatures, config):
    """(bands, N) uint64: a hash of each band's entries."""
    entries = signatures.reshape(len(signatures), config.bands, config.hashes // config.bands)
    keys = np.zeros((config.bands, len(signatures)), np.uint64)
    for entry in entries.T:
        keys = mix(keys + entry + np.uint64(1))
    return keys


def _checked(signatures, config):
    signatures = np.asarray(signatures)
    if signatures.ndim != 2 or signatures.shape[1] != config.hashes or signatures.dtype != np.uint32:
        fault = f"signatures must be uint32 (documents, {config.hashes}), not {signatures.dtype} {signatures.shape}"
        raise UserError(f"{fault}: compute them with these settings")
    return signatures
