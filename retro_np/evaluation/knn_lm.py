"""kNN-LM (Khandelwal et al. 2020), as the paper compares with it: p = λ p_kNN + (1 − λ) p_LM, of a frozen model.

The datastore holds a key for each of some training tokens: the hidden state that the readout predicts the token from.
p_kNN(w) ∝ Σ exp(−α d) over those of the 10 keys nearest to a hidden state, by squared L2, whose token is w. λ and α are
tuned on every second held-out document and scored on the others, and the other way round, as is all that is mixed into
a frozen model's predictions here and in `continuous_cache.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, nats_of
from retro_np.kernels.search import exact_search
from retro_np.nn.model import hidden_states, readout
from retro_np.nn.operators import linear
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import check_fit, evaluation_windows, scored_windows, sequence_chunks

NEIGHBOURS = 10  # paper, Wikitext103
ALPHAS = 2.0 ** np.arange(-10, 3)
WEIGHTS = np.linspace(0, 0.98, 50)  # λ; 0 comes first, so it stays where nothing is gained
QUERIES_A_BLOCK = 8192


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens that are scored, in the order of the text, and what was paid for each.

    places: (N,), row of the split · m + position in the chunk; tokens: (N,); nats: (N,) float64.
    """

    places: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray

    def losses(self, database: Database, split_name: str = "valid", limit: int | None = None) -> Losses:
        """The same by chunk, as `score` has it; limit: only the first so many chunks of the split."""
        documents = np.array(database.split(split_name).documents[:limit])
        chunks = self.places // database.chunk_size
        n_bytes = token_byte_lengths(database.tokenizer)[self.tokens]
        return Losses(*(np.bincount(chunks, of, len(documents)) for of in (self.nats, n_bytes)), documents)


def knn_lm(
    scored: ScoredTokens, hidden: np.ndarray, documents: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> tuple[ScoredTokens, list]:
    """Mix the tokens of the nearest keys into what a frozen model predicts.

    scored, hidden: of `frozen_model`; documents: (N,) of each token; keys, values: of `datastore`. Returns the tokens
    with new nats, and (α, λ) of either half of the documents. Raises UserError for an empty datastore.
    """
    ids, distances = nearest_keys(hidden, keys)
    hits = values[ids] == scored.tokens[:, None]
    return tuned(scored, documents, lambda alpha: knn_probability(distances, hits, alpha), ALPHAS)


def knn_probability(distances: np.ndarray, hits: np.ndarray, alpha: float) -> np.ndarray:
    """Σ softmax(−α d) over the neighbours that are hits. distances: (N, k), ascending, inf: none; hits: (N, k)."""
    weights = np.exp(-alpha * (distances - distances[:, :1]).astype(np.float64))
    return (weights * hits).sum(axis=1) / weights.sum(axis=1)


def nearest_keys(hidden: np.ndarray, keys: np.ndarray, k: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray]:
    """Ids and squared distances (N, k) of the keys nearest to hidden states (N, d), by exact search."""
    if not len(keys):
        raise UserError("the datastore is empty: kNN-LM needs training tokens to look among")
    ids, distances = np.empty((len(hidden), k), np.int64), np.empty((len(hidden), k), hidden.dtype)
    with progress_bar(f"nearest of {len(keys):,} keys", len(hidden), unit="tokens") as advance:
        for start in range(0, len(hidden), QUERIES_A_BLOCK):
            rows = slice(start, start + QUERIES_A_BLOCK)
            ids[rows], distances[rows] = exact_search(hidden[rows], keys, k)
            advance(len(ids[rows]))
    return ids, distances


def datastore(
    params, config: RetroConfig, database: Database, size: int | None, *, sequence_length: int = 512, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Keys (size, d) and the tokens (size,) that followed, of training tokens with contexts like those of evaluation.

    size: at most so many tokens, of windows drawn at random without replacement; None: all. Memory goes with size · d.
    """
    split = database.split("train")
    length = sequence_chunks(sequence_length, config.chunk_size)
    rows, first = evaluation_windows(split, length, max(1, length // 2))
    if size is not None:
        order = np.random.default_rng(seed).permutation(len(rows))
        count = np.cumsum((rows[order] >= 0).sum(axis=1) * config.chunk_size - first[order])
        drawn = np.sort(order[: np.searchsorted(count, size) + 1])
        rows, first = rows[drawn], first[drawn]
    scored, hidden = _read(params, config, split, rows, first, "datastore")
    return hidden[:size], scored.tokens[:size]


def frozen_model(
    params, config: RetroConfig, database: Database, *, sequence_length: int = 512, limit: int | None = None
) -> tuple[ScoredTokens, np.ndarray, np.ndarray]:
    """A model without retrieval at the held-out tokens that `score` scores, in windows half of which overlap.

    limit: chunks of the split to score, from its start. Returns the tokens, the hidden state (N, d) that each is
    predicted from, and the document (N,) of each.
    """
    check_fit(config, database)
    split, m = database.split("valid"), config.chunk_size
    length = sequence_chunks(sequence_length, m)
    rows, first = evaluation_windows(split, length, max(1, length // 2), limit)
    scored, hidden = _read(params, config, split, rows, first, "hidden states")
    within = np.searchsorted(scored.places, len(split.tokens[:limit]) * m)  # the last window looks one token further
    scored = ScoredTokens(scored.places[:within], scored.tokens[:within], scored.nats[:within])
    return scored, hidden[:within], split.documents[scored.places // m]


def places_of(window: np.ndarray, b: np.ndarray, t: np.ndarray, m: int) -> np.ndarray:
    """Where the token stands that position t of window b predicts: row · m + position in the chunk."""
    return window[b, t // m] * m + t % m + 1  # the token behind a chunk's last is the first of the next row


def in_order(found: Iterable[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Parts, each a tuple of places and further arrays of a row a place, as whole arrays sorted by place."""
    places, *others = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(places, kind="stable")
    return tuple(array[order] for array in (places, *others))


def tuned(
    scored: ScoredTokens, documents: np.ndarray, probability: Callable[[float], np.ndarray], settings: Iterable[float]
) -> tuple[ScoredTokens, list]:
    """Mix another prediction in, with the setting and weight that are best for the other half of the documents.

    probability(setting) → (N,), what the other prediction gives each token. documents: (N,); halves are every second.
    Returns the tokens with new nats, and (setting, λ) of either half.
    """
    half = np.unique(documents, return_inverse=True)[1].reshape(-1) % 2
    best = [(np.inf, 0.0, 0.0)] * 2
    for setting in settings:
        other = probability(setting)
        for weight in WEIGHTS:
            paid = np.bincount(half, mixed(scored.nats, other, weight), minlength=2)
            for part in (0, 1):
                if paid[1 - part] < best[part][0]:
                    best[part] = paid[1 - part], float(setting), float(weight)
    nats = scored.nats.copy()
    for part, (_, setting, weight) in enumerate(best):
        here = half == part
        nats[here] = mixed(scored.nats, probability(setting), weight)[here]
    return replace(scored, nats=nats), [choice[1:] for choice in best]


def mixed(nats: np.ndarray, probability: np.ndarray, weight: float) -> np.ndarray:
    """−log((1 − λ) exp(−nats) + λ p); for λ = 0 the nats to the bit. nats, probability: (N,)."""
    with np.errstate(divide="ignore"):
        return -np.logaddexp(np.log1p(-weight) - nats, np.log(weight) + np.log(probability))


def _read(params, config, split, rows, first, description) -> tuple[ScoredTokens, np.ndarray]:
    """A model without retrieval over windows: the scored tokens, and the hidden states that predict them."""
    found = []
    with progress_bar(description, len(rows)) as advance:
        for window, tokens, targets in scored_windows(split, rows, first):
            hidden = hidden_states(params, config, tokens, None)
            nats = nats_of(linear(hidden, readout(params, config))[0], targets)
            b, t = np.nonzero(targets)
            places = places_of(window, b, t, config.chunk_size)
            found.append((places, targets[b, t], nats[b, t].astype(np.float64), hidden[b, t]))
            advance(len(window))
    places, tokens, nats, hidden = in_order(found)
    return ScoredTokens(places, tokens, nats), hidden
