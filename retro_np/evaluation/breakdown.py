"""What a gain is made of: by what a chunk shares with its neighbours, by token, and by nearest training document.

A model that copies from near-copies of its test documents gains without having learnt much. So a gain is divided by
r(C) (paper §2.6), by whether a token could be copied, and by the largest 13-gram Jaccard similarity of a document to a
training document. A build leaves out only training documents of at least 0.8 (paper §2.1)."""

import itertools
from typing import Any

import numpy as np

from retro_np.evaluation.bits_per_byte import Losses, ScoredTokens, scored_tokens
from retro_np.evaluation.bootstrap import Difference, paired_bootstrap
from retro_np.evaluation.copying import longest_matches
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.deduplicate import nearest_similarity
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.join import Retrieval
from retro_np.sequences import sequence_neighbours

LEAKAGE_EDGES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # of r(C): a bin includes its upper edge, the first one also 0
NEAR_COPY = 0.1  # A document of at least this similarity to a training document belongs to a family of near-copies.
SIMILARITY_EDGES = (0.0, 0.02, NEAR_COPY, 1.0)  # A bin includes its lower edge, the last one also 1.
MATCHES = ("behind the longest match", "elsewhere in what was retrieved", "not retrieved")


def breakdown(
    of: ScoredTokens, against: ScoredTokens, database: Database, retrieval: Retrieval, *,
    windows: tuple[np.ndarray, np.ndarray], k: int, limit: int | None, ratios: np.ndarray,
    similarity: np.ndarray | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Split the difference between two conditions into parts: "leakage", "match" and, if similarity is given,
    "similarity". Each is a list of parts, see `part_of`.

    of, against: from `score_tokens`. windows, k, limit: those of the condition `of`. ratios: (chunks,), from
    `chunk_leakage`. similarity: (chunks,), from `nearest_similarities`."""
    chunks = of.positions // database.chunk_size
    kinds = {"leakage": _binned(ratios[chunks], LEAKAGE_EDGES, "left")}
    kinds["match"] = [{"token": name} for name in MATCHES], match_kinds(retrieval, windows, k, limit)
    kinds |= {} if similarity is None else {"similarity": _binned(similarity[chunks], SIMILARITY_EDGES, "right")}
    one, other = (tokens.by_token(database, retrieval.split) for tokens in (of, against))
    return {
        kind: [name | part_of(one, other, numbers == i) for i, name in enumerate(names)]
        for kind, (names, numbers) in kinds.items()
    }


def part_of(of: Losses, against: Losses, rows: np.ndarray) -> dict[str, Any]:
    """The difference between two conditions on some rows, and what share of all rows and bytes these are.

    rows: a mask. Returns "share_of_tokens" (of rows), "share_of_bytes", "contribution_percent" (the bits that change
    here as a share of all bits of `against`; all parts sum to the total difference), and the entries of `stated`."""
    part = of[rows], against[rows]
    n_bytes = int(part[0].bytes.sum())
    return {
        "share_of_tokens": float(np.mean(rows)), "share_of_bytes": n_bytes / float(of.bytes.sum()),
        "contribution_percent": 100 * float((part[0].nats.sum() - part[1].nats.sum()) / against.nats.sum()),
        **stated(paired_bootstrap(*part) if n_bytes else None),
    }  # fmt: skip


def stated(difference: Difference | None) -> dict[str, Any]:
    """A difference as results.json holds it: difference_percent, interval_percent, documents, and a note if any."""
    nothing = {"difference_percent": None, "interval_percent": None, "documents": 0}
    facts = nothing if difference is None else vars(difference)
    return {name: list(fact) if isinstance(fact, tuple) else fact for name, fact in facts.items() if fact != ""}


def match_kinds(retrieval: Retrieval, windows: tuple[np.ndarray, np.ndarray], k: int, limit: int | None) -> np.ndarray:
    """For each scored token the number of its kind in MATCHES, (N,): where it stands in what CCA reads to predict it.

    That is the k values which the last complete chunk retrieved; before the first one, nothing. The match is the one
    that `longest_matches` finds. windows, limit: as in `scored_tokens`."""

    def predict(window, tokens, targets):
        neighbours = sequence_neighbours(retrieval.database, retrieval.split, window, k)
        batch, n_chunks, _, r = neighbours.shape
        lengths, copied = longest_matches(tokens, neighbours, retrieval.split.padding)
        first = r // 2 - 1  # The last token of a chunk is the first that reads the chunk's neighbours.
        read = np.roll(targets, -first, axis=1).reshape(batch, n_chunks, -1, 1)
        there = (read == neighbours.reshape(batch, n_chunks, 1, -1)).any(axis=-1)
        retrieved = np.roll(there.reshape(batch, -1), first, axis=1) & (np.arange(targets.shape[1]) >= first)
        behind = (lengths > 0) & (copied == targets)
        return np.zeros(targets.shape), np.where(behind, 0, np.where(retrieved, 1, 2))

    return scored_tokens(retrieval.split, windows, predict, "matches with neighbours", limit)[1][0]


def nearest_similarities(database: Database, split: Split, limit: int | None = None) -> np.ndarray:
    """For each chunk of a split, its document's largest 13-gram Jaccard similarity to a training document, (chunks,).

    Texts are decoded from tokens. limit: only the documents of the first chunks. Memory: the grams of these."""
    documents, training = np.asarray(split.documents), database.split("train")
    runs = [run for run in document_runs(documents) if limit is None or run[0] < limit]
    texts = (database.text(training.tokens[start:stop].ravel()) for start, stop in document_runs(training.documents[:]))
    held_texts = (database.text(split.tokens[start:stop].ravel()) for start, stop in runs)
    return np.repeat(nearest_similarity(texts, held_texts), [stop - start for start, stop in runs])[:limit]


def _binned(values, edges, side) -> tuple[list[dict[str, Any]], np.ndarray]:
    bins = [{"from": low, "to": high} for low, high in itertools.pairwise(edges)]
    return bins, np.searchsorted(edges[1:-1], values, side)
