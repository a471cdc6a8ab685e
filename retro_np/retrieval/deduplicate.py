"""Which training documents are near-duplicates of held-out ones: MinHash, banding, then the exact similarity.

Two documents resemble each other by the Jaccard similarity of their sets of 13-grams, |A ∩ B| / |A ∪ B|, and the paper
(§2.1) drops training documents at 0.8 or more. Signatures (Broder 1997) estimate it; cut into bands, they find the few
pairs worth an estimate without looking at the others (Indyk & Motwani 1998; Leskovec, Rajaraman & Ullman, chapter 3);
those that may reach the threshold are compared exactly, so that a document is never dropped on an estimate.
What a word and a gram are: retro_np/kernels/minhash.py.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels.minhash import NO_GRAM, band_matches, gram_hashes, minhash, mix, multipliers

LEAST_CAUGHT = 0.9  # of the pairs just at the threshold must agree in a band; the default settings lose 5 in 10⁸
ERRORS = 4  # standard errors below the threshold that an estimate may lie, and the pair still be compared exactly
FEW = 4  # held-out documents that are tried first for each training document, and mostly the only ones
MOST_WORDS, MOST_HASHES = 1000, 65_536  # far beyond use
BATCH = 1 << 23  # bytes of text that signatures are made of at once
KEPT = 1 << 25  # grams of held-out documents kept from one comparison to the next: 256 MiB


@dataclass(frozen=True)
class DedupConfig:
    """What a near-duplicate is, and how it is looked for. Raises UserError for numbers that mean nothing."""

    threshold: float = 0.8  # Jaccard similarity from which a document is dropped
    words: int = 13  # of a gram
    hashes: int = 128  # of a signature
    bands: int = 32  # that a signature is cut into, of hashes / bands entries each

    def __post_init__(self):
        try:
            threshold_is_a_share = 0 < self.threshold <= 1
            words, hashes, bands = (operator.index(number) for number in (self.words, self.hashes, self.bands))
        except TypeError:
            raise UserError("deduplication: threshold is a number; words, hashes and bands are integers") from None
        if not threshold_is_a_share:
            raise UserError(f"deduplication: threshold is a similarity above 0 and up to 1, not {self.threshold}")
        if not 1 <= words <= MOST_WORDS:
            raise UserError(f"deduplication: a gram has from 1 to {MOST_WORDS} words, not {words}")
        if not 1 <= hashes <= MOST_HASHES:
            raise UserError(f"deduplication: a signature has from 1 to {MOST_HASHES} hashes, not {hashes}")
        if bands < 1 or hashes % bands:
            raise UserError(f"deduplication: {hashes} hashes cannot be cut into {bands} bands of equal size")
        found = caught(self.threshold, self)
        if found < LEAST_CAUGHT:
            raise UserError(
                f"deduplication: {bands} bands of {hashes // bands} hashes would find {100 * found:.0f} %"
                f" of the pairs at the threshold {self.threshold}: give more bands, up to {hashes}"
            )


class Duplicate(NamedTuple):
    """A training document (its row in the batch), the held-out one that it resembles, and how much."""

    row: int
    held: int
    estimated: float
    exact: float


@dataclass(frozen=True)
class BandIndex:
    """Held-out signatures, ready to be looked up by band. Made by `band_index`; equal signatures stand in it once.

    signatures: (U, hashes) uint32, in the order of the first held-out row that has each. keys: (bands, U) uint64,
    sorted along each band, and order (bands, U) whose they are. members: held-out rows by signature, rising; those of u
    are members[starts[u] : starts[u + 1]].
    """

    signatures: np.ndarray
    keys: np.ndarray
    order: np.ndarray
    members: np.ndarray
    starts: np.ndarray

    def alike(self, held: int) -> np.ndarray:
        """All held-out rows that have the signature of this one, rising."""
        place = int(np.flatnonzero(self.members == held)[0])
        group = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.members[self.starts[group] : self.starts[group + 1]]


def grams(texts: Sequence[str], words: int = 13) -> list[np.ndarray]:
    """Each text's set of grams: sorted unique hashes, (grams,) uint64."""
    return [_unique(gram_hashes(np.frombuffer(_bytes(text), np.uint8), words)) for text in texts]


def signatures(texts: Sequence[str], config: DedupConfig) -> np.ndarray:
    """MinHash signatures of texts, (N, hashes) uint32; 0xFFFFFFFF throughout where a text has no word."""
    factors, parts, batch, size = multipliers(config.hashes), [np.empty((0, config.hashes), np.uint32)], [], 0
    for number, text in enumerate(texts):
        batch.append(_bytes(text))
        size += len(batch[-1])
        if size >= BATCH or number == len(texts) - 1:
            offsets = np.cumsum([0, *map(len, batch)])
            parts.append(minhash(np.frombuffer(b"".join(batch), np.uint8), offsets, config.words, factors))
            batch, size = [], 0
    return np.concatenate(parts)


def jaccard(text_a: str, text_b: str, words: int = 13) -> float:
    """The exact Jaccard similarity of two texts' grams, in [0, 1]; 0 where one has no word, or both have none."""
    return _similarity(*grams([text_a, text_b], words))


def band_index(held_signatures: np.ndarray, config: DedupConfig) -> BandIndex:
    """Get held-out signatures (H, hashes) ready for `candidates`. Raises UserError for those of other settings."""
    held_signatures = _checked(held_signatures, config)
    rows = np.flatnonzero((held_signatures != NO_GRAM).any(axis=1))  # what has no gram resembles nothing
    _, first, group = np.unique(held_signatures[rows], axis=0, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group.reshape(-1)]  # numbered by first appearance, no longer by value
    unique = held_signatures[rows[np.sort(first)]]
    keys = _band_keys(unique, config).T
    order = np.argsort(keys, axis=1, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(unique)))])
    keys = np.take_along_axis(keys, order, axis=1)
    return BandIndex(unique, keys, order, rows[np.argsort(group, kind="stable")], starts)


def candidates(
    signatures: np.ndarray, held: BandIndex | np.ndarray, config: DedupConfig, limit: int = FEW
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that agree in a band and whose estimate reaches the threshold, or is up to 4 standard errors short of it.

    signatures: (N, hashes) uint32 of training documents. held: a `band_index`, or the held-out signatures. limit:
    pairs kept for a training document, the best estimates. Held-out documents of equal signatures count as one, the
    first. Returns rows i (P,) and held-out rows j (P,) int64 and the share of equal hashes (P,) float64, sorted by i,
    then the best estimate first, then by j. Memory: N · (limit + bands). Raises UserError for other settings'
    signatures.
    """
    signatures = _checked(signatures, config)
    held = held if isinstance(held, BandIndex) else band_index(held, config)
    if held.signatures.shape[1] != config.hashes or len(held.keys) != config.bands:
        raise UserError("the index of held-out signatures has other hashes or bands than asked for: build it anew")
    i, unique, equal = _matches(signatures, held, config, limit)
    return i, held.members[held.starts[unique]], equal / config.hashes


def caught(similarity: float, config: DedupConfig) -> float:
    """The probability that a pair of such a Jaccard similarity agrees in a band: 1 − (1 − s^(hashes/bands))^bands."""
    return 1 - (1 - similarity ** (config.hashes // config.bands)) ** config.bands


def find_duplicates(
    texts: Sequence[str], held_index: BandIndex, held_text: Callable[[int], str], config: DedupConfig
) -> list[Duplicate]:
    """The texts of one batch that have an exact similarity of at least the threshold with a held-out document.

    held_text: gives the text of a held-out row; called for those that are compared alone. Returns at most one record a
    text, in the texts' order: the held-out document of the best estimate among those that reach the threshold. The
    candidates of a text are compared one after another until one does: no worse one hides a match.
    """
    marks, found = signatures(texts, config), []
    held_sets = _held_sets(held_index, held_text, config.words)
    i, j, estimates = candidates(marks, held_index, config)
    for row in np.unique(i).tolist():
        tried = slice(*np.searchsorted(i, [row, row + 1]).tolist())
        own = grams([texts[row]], config.words)[0]
        match = _first_match(own, j[tried], estimates[tried], held_sets, config.threshold)
        if match is None and tried.stop - tried.start == FEW:  # there may be more
            _, others, shares = candidates(marks[row : row + 1], held_index, config, len(held_index.signatures))
            match = _first_match(own, others[FEW:], shares[FEW:], held_sets, config.threshold)
        if match is not None:
            found.append(Duplicate(row, *match))
    return found


def _first_match(own, held, estimates, held_sets, threshold):
    """(held row, estimate, exact similarity) of the first candidate that reaches the threshold, or None."""
    for candidate, estimate in zip(held.tolist(), estimates.tolist(), strict=True):
        for row, its_grams in held_sets(candidate):
            exact = _similarity(own, its_grams)
            if exact >= threshold:
                return row, estimate, exact
    return None


def _held_sets(index: BandIndex, text: Callable[[int], str], words: int) -> Callable[[int], Iterator]:
    """A function that gives (row, grams) of a held-out row and of those with its signature and other grams.

    A thousand equal documents are compared once. The grams of those compared last are kept, as far as KEPT goes.
    """
    kept = {}

    def grams_of(held):
        if held not in kept:
            if sum(map(len, kept.values())) > KEPT:
                kept.clear()
            kept[held] = grams([text(held)], words)[0]
        return kept[held]

    @functools.cache
    def others(held):
        contents = {}
        for row in index.alike(held).tolist():
            contents.setdefault(hashlib.sha256(grams_of(row)).digest(), row)
        return list(contents.values())[1:]

    def held_sets(held):
        yield held, grams_of(held)
        for row in others(held):
            yield row, grams_of(row)

    return held_sets


def _unique(hashes):
    """np.unique, whose hash table takes a minute for fifteen million."""
    hashes, first = np.sort(hashes), np.ones(len(hashes), bool)
    np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
    return hashes[first]


def _similarity(a, b) -> float:
    """Jaccard similarity of two sets, sorted arrays."""
    both = np.sort(np.concatenate([a, b]), kind="stable")  # which merges two sorted runs
    common = np.count_nonzero(both[1:] == both[:-1])
    return common / (len(a) + len(b) - common) if common else 0.0


def _matches(signatures, held, config, limit):
    """(rows, places in held.signatures, equal entries) of the pairs in a band, the best `limit` of each row."""
    share = config.threshold
    least = math.ceil((share - ERRORS * math.sqrt(share * (1 - share) / config.hashes)) * config.hashes - 1e-9)
    keys = _band_keys(signatures, config)
    lows, highs = np.empty(keys.shape, np.int64), np.empty(keys.shape, np.int64)
    for band, sorted_keys in enumerate(held.keys):
        lows[:, band] = np.searchsorted(sorted_keys, keys[:, band], side="left")
        highs[:, band] = np.searchsorted(sorted_keys, keys[:, band], side="right")
    limit = min(limit, len(held.signatures))
    places, equal = band_matches(signatures, held.signatures, held.order, lows, highs, least, limit)
    there = places >= 0
    return np.nonzero(there)[0], places[there], equal[there]


def _band_keys(signatures, config):
    """(N, bands) uint64: a hash of each band's entries."""
    entries = signatures.reshape(len(signatures), config.bands, config.hashes // config.bands)
    keys = np.zeros(entries.shape[:2], np.uint64)
    for entry in np.moveaxis(entries, -1, 0):
        keys = mix(keys + entry + np.uint64(1))
    return keys


def _checked(signatures, config):
    signatures = np.asarray(signatures)
    if signatures.ndim != 2 or signatures.shape[1] != config.hashes or signatures.dtype != np.uint32:
        raise UserError(
            f"signatures are {signatures.dtype} {signatures.shape}, and must be uint32 (documents, {config.hashes}): "
            "make them with these settings"
        )
    return signatures


def _bytes(text: str) -> bytes:
    """UTF-8, lone surrogates as they would be encoded if they could: what has one may still be compared."""
    return text.encode("utf-8", "surrogatepass")
