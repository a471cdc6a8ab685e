"""Sampling: token by token, retrieving at the end of each chunk. Paper §2.4."""

from dataclasses import dataclass

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.nn.incremental import Cache, extend, segments
from retro_np.nn.operators import log_softmax
from retro_np.sequences import check_fit

MOST_NEIGHBOURS = 1024  # of a chunk; the paper goes to 100


@dataclass(frozen=True)
class Retrieved:
    """What the chunk number `chunk` of a sequence (prompt included, from 0) retrieved at its end."""

    chunk: int
    ids: np.ndarray  # (k,) chunk ids of the database, −1 missing
    distances: np.ndarray  # (k,) squared L2
    values: np.ndarray  # (k, 2m) tokens


def generate(
    params,
    config: RetroConfig,
    prompt_tokens,
    length: int,
    *,
    database=None,
    k: int = 2,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> tuple[np.ndarray, list[Retrieved]]:
    """Sample `length` tokens after a prompt of at least one.

    database: retrieve from it at each chunk's end (its own embedder makes the query's key); None: retrieval off.
    temperature 0 is greedy; top_k keeps the k most likely tokens, top_p the fewest that hold that probability
    (Holtzman et al. 2020). Padding is never sampled. stop_token ends the sample early (it is returned last).
    The prompt may be longer than a training sequence; distances beyond what training saw are then extrapolated.
    Returns the new tokens, (≤ length,), and what was retrieved, prompt's chunks included.
    """
    prompt = np.asarray(prompt_tokens)
    _check_request(prompt, config, length, k, temperature, top_k, top_p)
    if database is not None:
        check_fit(config, database)
    rng = np.random.Generator(np.random.Philox(seed))
    m, cache = config.chunk_size, Cache()
    tokens, retrieved = list(map(int, prompt)), []
    logits = None
    while len(tokens) < len(prompt) + length:
        for count in segments(cache.length, len(tokens) - cache.length, m):
            begin = cache.length
            neighbours = None
            if (begin + 1) % m == 0 and database is not None and config.retrieves and k:
                retrieved.append(_retrieve(database, tokens[begin + 1 - m : begin + 1], begin // m, k))
                neighbours = retrieved[-1].values
            logits = extend(params, config, cache, np.array(tokens[begin : begin + count]), neighbours)[-1]
        tokens.append(sample_token(logits, rng, temperature, top_k, top_p))
        if tokens[-1] == stop_token:
            break
    return np.array(tokens[len(prompt) :], dtype=np.int64), retrieved


def sample_token(logits, rng, temperature=1.0, top_k=None, top_p=1.0) -> int:
    """Draw one token from logits (V,), never padding."""
    logits = logits.astype(np.float64)
    if not np.all(np.isfinite(logits)):
        raise UserError("the model's logits are not finite: its weights are damaged, take another checkpoint")
    logits[0] = -np.inf
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest token alone
        probabilities = np.exp(log_softmax((logits[order] - logits[order[0]]) / temperature))
    before = np.cumsum(probabilities) - probabilities
    kept = before < top_p  # the token that crosses top_p is in
    kept[0] = True
    cumulative = np.cumsum(probabilities * kept)
    drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(drawn, len(order) - 1)])


def _retrieve(database, chunk, number, k) -> Retrieved:
    ids, distances = database.search_keys(database.embed_chunks(np.array([chunk])), k)
    return Retrieved(number, ids[0], distances[0], database.value(ids[0]))


def _check_request(prompt, config, length, k, temperature, top_k, top_p):
    if prompt.ndim != 1 or len(prompt) == 0 or not np.issubdtype(prompt.dtype, np.integer):
        raise UserError(f"a prompt is a row of at least one token, not {prompt.dtype} of shape {prompt.shape}")
    if prompt.min() < 0 or prompt.max() >= config.vocabulary_size:
        raise UserError(f"the prompt holds tokens outside the vocabulary of {config.vocabulary_size}")
    if length < 0 or k < 0 or not 0 <= temperature < np.inf:
        raise UserError("length, k and temperature are at least 0, and the temperature is finite")
    if k > MOST_NEIGHBOURS:
        raise UserError(f"k is {k:,}: a chunk reads at most {MOST_NEIGHBOURS:,} neighbours, more take all memory")
    if not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError("top_p is above 0 and at most 1, top_k at least 1")
