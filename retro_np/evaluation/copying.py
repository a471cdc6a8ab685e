"""The copy bound: what a baseline would gain by copying from neighbours. It rates a corpus before a RETRO is trained.

At each position, find the longest run of tokens, ending there, that also occurs in a neighbour which CCA would read at
this position. Let s be its length. The token after the match gets the weight λ, and the baseline's own prediction the
rest. `gain` uses one λ for every s ≥ 1, and `gain_by_length` one for each s. λ is tuned as in `knn_lm.py`."""

from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.evaluation.bits_per_byte import ScoredTokens, bits_per_byte, scored_tokens
from retro_np.evaluation.knn_lm import tuned
from retro_np.evaluation.likelihood import token_nats
from retro_np.kernels.substring import extend_runs
from retro_np.retrieval.database import Database
from retro_np.sequences import evaluation_windows, sequence_neighbours
from retro_np.tree import Tree

MAX_MATCH_TOKENS = 8  # longer matches count as this length


def copy_bound(
    params: Tree, config: RetroConfig, database: Database, *, k: int = 2, sequence_length: int = 256,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The share of its bits that a baseline, or RETRO[OFF], would save by copying from the k neighbours of its chunks.

    Arguments as in `score`, on the held-out documents, with windows that overlap by half. Returns "bpb" without
    copying, the shares "gain" and "gain_by_length", and two lists with an entry for each match length from 0
    to 8: the share of "positions" with that length, and how often the token after the match is "right"."""
    split = database.split("valid")
    windows = evaluation_windows(split, sequence_length, limit=limit)

    def predict(window, tokens, targets):
        neighbours = sequence_neighbours(database, split, window, k)
        matches = longest_matches(tokens, neighbours, split.padding)
        return token_nats(params, config, tokens, targets)[0], *matches

    scored, (match, copied) = scored_tokens(split, windows, predict, "copy bound", limit)
    losses, hit = scored.by_token(database, split), copied == scored.tokens
    half, bpb = np.unique(losses.documents, return_inverse=True)[1] % 2, losses.bits_per_byte()
    copying = [_nats_with_copying(scored, hit, lengths, half) for lengths in (np.minimum(match, 1), match)]
    gain, gain_by_length = (1 - bits_per_byte(nats, losses.bytes) / bpb for nats in copying)
    counts = np.bincount(match, minlength=MAX_MATCH_TOKENS + 1)
    right = np.bincount(match, hit, MAX_MATCH_TOKENS + 1) / np.maximum(counts, 1)
    by_length = {"positions": (counts / len(match)).tolist(), "right": right.tolist()}
    return {"bpb": bpb, "gain": gain, "gain_by_length": gain_by_length, **by_length}


def longest_matches(tokens: np.ndarray, neighbours: np.ndarray, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The longest run that ends at each position and occurs in what CCA reads there, and the token after that match.

    tokens: (B, n); neighbours: (B, l, k, 2m). Returns lengths (B, n), at most MAX_MATCH_TOKENS, and tokens (B, n), −1
    where nothing matches."""
    batch, n_chunks, _, r = neighbours.shape
    m, following = r // 2, _padded(neighbours[..., 1:], padding, (0, 0), (0, 0), (0, 0), (0, 1))
    padded, first = _padded(tokens, padding, (0, 0), (MAX_MATCH_TOKENS, m)), np.arange(m - 1, n_chunks * m, m)
    runs, longest = np.zeros(neighbours.shape, np.int32), np.zeros((2, batch, n_chunks, m), np.int64)
    for i in range(-MAX_MATCH_TOKENS, m):  # Runs start before position first, where the neighbours are first read.
        runs = extend_runs(runs, padded[:, first + i + MAX_MATCH_TOKENS][..., None, None], neighbours, padding)
        if i >= 0:
            matches = np.where(following != padding, runs, 0).reshape(batch, n_chunks, -1)
            best = matches.argmax(axis=-1)[..., None]
            for part, values in zip(longest, (matches, following.reshape(matches.shape)), strict=True):
                part[..., i] = np.take_along_axis(values, best, -1)[..., 0]
    lengths, copied = np.pad(longest.reshape(2, batch, -1), [(0, 0), (0, 0), (m - 1, 0)])[..., : tokens.shape[1]]
    return np.minimum(lengths, MAX_MATCH_TOKENS), np.where(lengths > 0, copied, -1)


def _padded(tokens: np.ndarray, padding: int, *widths: tuple[int, int]) -> np.ndarray:
    return np.pad(tokens, widths, constant_values=padding)


def _nats_with_copying(scored: ScoredTokens, hit, lengths, half) -> np.ndarray:
    """The nats (N,) with copying: each match length above 0 has its λ, tuned on the other half of the documents."""
    nats = scored.nats.copy()
    for length in range(1, int(lengths.max(initial=0)) + 1):
        rows = lengths == length
        # A copy has probability 1 if it is right, so only λ is tuned.
        nats[rows] = tuned(scored[rows], half[rows], lambda _: hit[rows], [0])[0].nats  # noqa: B023
    return nats
