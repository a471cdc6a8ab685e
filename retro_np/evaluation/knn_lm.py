"""Two memories of hidden states that are mixed into a frozen model's predictions: kNN-LM and the continuous cache.

The mixture of a memory's prediction and the model's is p = λ p_memory + (1 − λ) p_LM.

kNN-LM (Khandelwal et al. 2020) is a method that the paper compares RETRO with. The datastore holds one key per training
token: the hidden state from which the readout predicts the token. To predict the next token w, take the 10 keys nearest
to the current hidden state, by squared L2 distance d. Then p_kNN(w) ∝ Σ exp(−α d), summed over the keys of token w.

The continuous cache (Grave et al. 2017) holds the last `window` positions i of the document, and
p_cache(w) ∝ Σ exp(θ h·h_i), summed over the positions that were followed by w.

α, θ and λ are tuned on one half of the held-out documents and scored on the other half, and vice versa (`tuned`)."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import ScoredTokens, scored_tokens
from retro_np.evaluation.likelihood import token_nats
from retro_np.kernels import Array, ignore_underflow
from retro_np.kernels.search import exact_search
from retro_np.kernels.threads import blocks
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.join import Retrieval
from retro_np.sequences import check_fit, evaluation_windows
from retro_np.tree import Tree

KNN_NEIGHBOURS = 10  # keys per token (paper, Wikitext103)
KNN_ALPHAS = 2.0 ** np.arange(-10, 3)
MIXTURE_WEIGHTS = np.linspace(0, 0.98, 50)  # λ; ties go to the first value, so λ is 0 if mixing does not help
TOKENS_PER_SEARCH = 8192
CACHE_SIZE = 1000  # positions
CACHE_THETAS = 3.0 ** np.arange(-7, 1)
CACHE_BLOCK = 256  # positions whose scores are computed together

# The probability of each token, NaN where there is none, by a setting; and the settings to choose from
Prediction = tuple[Callable[[float], Array], Iterable[float]]
Tuned = tuple[ScoredTokens, list[tuple[float, float]]]  # new nats, and (setting, λ) for each half of the documents


def knn_lm(scored: ScoredTokens, hidden: Array, documents: Array, keys: Array, values: Array) -> Tuned:
    """Mix the tokens of the nearest keys into a frozen model's predictions. Tunes α and λ, as in `tuned`.

    scored, hidden, documents: from `frozen_model`; keys, values: from `datastore`. Raises UserError without keys."""
    return tuned(scored, documents, *knn_prediction(hidden, scored.tokens, keys, values))


def knn_prediction(hidden: Array, tokens: Array, keys: Array, values: Array) -> Prediction:
    """p_kNN of tokens (N,), and the values of α to choose from. Arguments as in `knn_lm`."""
    ids, distances = nearest_keys(hidden, keys)
    hits = values[ids] == tokens[:, None]
    return lambda alpha: knn_probability(distances, hits, alpha), KNN_ALPHAS


@ignore_underflow
def knn_probability(distances: Array, hits: Array, alpha: float) -> Array:
    """p_kNN of the true tokens, (N,): the softmax of −α d, summed over the hits.

    distances: (N, k), inf where a key is missing, but not in a whole row; hits: (N, k) bool, if a key's token is the
    true one."""
    weights = np.exp(-alpha * (distances - distances.min(axis=1, keepdims=True)).astype(np.float64))
    return (weights * hits).sum(axis=1) / weights.sum(axis=1)


def nearest_keys(hidden: Array, keys: Array, k: int = KNN_NEIGHBOURS) -> tuple[Array, Array]:
    """Ids and squared distances, (N, k) each, of the keys nearest to hidden states (N, d), by exact search."""
    if not len(keys):
        raise UserError("the datastore is empty: kNN-LM needs training tokens to search")
    ids, distances = np.empty((len(hidden), k), np.int64), np.empty((len(hidden), k), hidden.dtype)
    with progress_bar(f"searching {len(keys):,} keys", len(hidden), unit="tokens") as advance:
        for rows in blocks(len(hidden), TOKENS_PER_SEARCH):
            ids[rows], distances[rows] = exact_search(hidden[rows], keys, k)
            advance(rows.stop - rows.start)
    return ids, distances


def continuous_cache(scored: ScoredTokens, hidden: Array, documents: Array, window: int = CACHE_SIZE) -> Tuned:
    """Mix the cache into a frozen model's predictions. Tunes θ and λ, as in `tuned`.

    scored, hidden, documents: from `frozen_model`. window: positions that the cache holds."""
    return tuned(scored, documents, *cache_prediction(hidden, scored.tokens, documents, window))


def cache_prediction(hidden: Array, tokens: Array, documents: Array, window: int = CACHE_SIZE) -> Prediction:
    """p_cache of tokens (N,), and the values of θ to choose from. Arguments as in `continuous_cache`."""
    return lambda theta: cache_probability(hidden, tokens, documents, theta, window), CACHE_THETAS


def cache_probability(hidden: Array, tokens: Array, documents: Array, theta: float, window: int = CACHE_SIZE) -> Array:
    """p_cache of each token: (N,) float64, NaN at the first token of a document, where the cache is empty.

    hidden: (N, d); tokens: (N,), the token that follows each hidden state; documents: (N,), ascending."""
    out = np.full(len(tokens), np.nan)
    for begin, end in document_runs(documents):
        for start in range(begin + 1, end, CACHE_BLOCK):
            stop, oldest = min(start + CACHE_BLOCK, end), max(begin, start - window)
            age = np.arange(start, stop)[:, None] - np.arange(oldest, stop)
            similarity = hidden[start:stop] @ hidden[oldest:stop].T
            distances = np.where((age > 0) & (age <= window), -similarity, np.inf)
            out[start:stop] = knn_probability(distances, tokens[start:stop, None] == tokens[oldest:stop], theta)
    return out


def datastore(
    params: Tree, config: RetroConfig, database: Database, size: int | None, *, sequence_length: int = 512
) -> tuple[Array, Array]:
    """Keys (size, d) and tokens (size,) of the training split, read in windows like those of evaluation.

    size: at most this many tokens, from random windows without replacement; None: all. Memory grows with size · d."""
    split = database.split("train")
    rows, first_scored = evaluation_windows(split, sequence_length)
    if size is not None:
        order = np.random.default_rng(0).permutation(len(rows))
        count = np.cumsum((rows[order] >= 0).sum(axis=1) * config.chunk_size - first_scored[order])
        drawn = np.sort(order[: np.searchsorted(count, size) + 1])
        rows, first_scored = rows[drawn], first_scored[drawn]
    scored, (hidden,) = _read(params, config, split, (rows, first_scored), "datastore")
    return hidden[:size], scored.tokens[:size]


def frozen_model(
    params: Tree, config: RetroConfig, database: Database, *, sequence_length: int = 512, stride: int | None = None,
    limit: int | None = None, retrieval: Retrieval | None = None,
) -> tuple[ScoredTokens, Array, Array]:  # fmt: skip
    """Read held-out documents with a model whose retrieval is off. Arguments as in `score`.

    stride: None lets windows overlap by half. retrieval: its split is read, and otherwise the documents of valid.
    Returns the tokens that `score` scores with this limit, their hidden states (N, d) and their documents (N,)."""
    check_fit(config, database, sequence_length)
    split = retrieval.split if retrieval else database.split("valid")
    windows = evaluation_windows(split, sequence_length, stride, limit)
    scored, (hidden,) = _read(params, config, split, windows, "hidden states", limit)
    return scored, hidden, np.asarray(split.documents)[scored.positions // config.chunk_size]


@ignore_underflow
def tuned(scored: ScoredTokens, documents: Array, second: Callable[[float], Array], settings: Iterable[float]) -> Tuned:
    """Mix a second prediction into the first, with a setting and a weight λ tuned on other documents.

    Documents alternate between two halves, each scored with the setting and the λ that are best for the other half.
    documents: (N,), the document of each token. second(setting) → (N,), the second prediction's probability of
    each token; where it is NaN, the first prediction stays. Returns the tokens with new nats, and (setting, λ) for each
    half."""

    def known(setting: float) -> Array:
        probability = second(setting)
        return np.where(np.isnan(probability), np.exp(-scored.nats), probability)

    half = np.unique(documents, return_inverse=True)[1].reshape(-1) % 2
    choices, losses = [], []
    for setting in settings:
        probability = known(setting)
        choices += [(float(setting), float(weight)) for weight in MIXTURE_WEIGHTS]
        losses += [np.bincount(half, mixed(scored.nats, probability, w), minlength=2) for w in MIXTURE_WEIGHTS]
    best = [choices[i] for i in np.argmin(losses, axis=0)[::-1]]
    mixed_nats = [mixed(scored.nats, known(setting), weight) for setting, weight in best]
    return replace(scored, nats=np.where(half == 0, *mixed_nats)), best


@ignore_underflow
def mixed(nats: Array, probability: Array, weight: float) -> Array:
    """The nats of the mixture, −log((1 − λ) exp(−nats) + λ p). Both arrays: (N,). λ = 0 returns nats exactly."""
    with np.errstate(divide="ignore"):
        return -np.logaddexp(np.log1p(-weight) - nats, np.log(weight) + np.log(probability))


def _read(params, config, split, windows, *settings) -> tuple[ScoredTokens, list[Array]]:
    """Read windows with retrieval off: the scored tokens, and the hidden states that predict them."""
    return scored_tokens(split, windows, lambda _, *batch: token_nats(params, config, *batch), *settings)
