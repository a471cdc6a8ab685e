"""Sampling token by token, with retrieval at the end of each chunk. Paper §2.4."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from retro_np import runtime
from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.info import check_memory
from retro_np.kernels import blas_threads, threads
from retro_np.nn.incremental import Cache, extend, segments
from retro_np.nn.memory import model_neighbours
from retro_np.nn.operators import log_softmax
from retro_np.parameters import check_tree
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import DatabaseUnion
from retro_np.sequences import check_fit
from retro_np.tree import Tree

MAX_NEIGHBOURS_PER_CHUNK = 1024  # the paper uses up to 100
PROMPT_PART = 512  # tokens of a prompt that a model without retrieval reads at a time


@dataclass(frozen=True)
class Retrieved:
    """The neighbours that one chunk of a sequence retrieved. chunk counts from 0 and includes the prompt's chunks."""

    chunk: int
    ids: np.ndarray  # (k,) chunk ids of the database, −1 missing
    distances: np.ndarray  # (k,) squared L2
    values: np.ndarray  # (k, 2m) tokens


def generate(
    params: Tree, config: RetroConfig, prompt_tokens: np.ndarray | Sequence[int], length: int, *,
    database: Database | DatabaseUnion | None = None, k: int = 2, temperature: float = 1.0, top_k: int | None = None,
    top_p: float = 1.0, seed: int = 0, stop_token: int | Collection[int] | None = None,
    on_token: Callable[[int], object] = lambda token: None,
) -> tuple[np.ndarray, list[Retrieved]]:  # fmt: skip
    """Sample a continuation of a prompt.

    prompt_tokens: (n,) integers, n ≥ 1. A prompt longer than a training sequence works, but its relative positions go
        beyond those of training.
    length: the number of tokens to sample.
    database: its embedder embeds each complete chunk, and its index finds the chunk's neighbours. None, or a model
        without chunked cross-attention: retrieval off.
    k: neighbours per chunk; 0 turns retrieval off.
    temperature: divides the logits; 0 always takes the most likely token.
    top_k: sample from the top_k most likely tokens only; None keeps all of them.
    top_p: sample from the fewest most likely tokens whose probabilities add up to top_p (Holtzman et al. 2020).
    seed: random seed.
    stop_token: sampling stops after this token, or one of these, which is returned as the last one.
    on_token: called with each new token.

    Padding is never sampled. Returns the new tokens, (≤ length,) int64, and one Retrieved for each chunk that
    retrieved, the prompt's chunks first. Raises UserError for a prompt or a setting out of range, for logits that are
    not finite, if the model and the database have different vocabularies or chunk sizes, and if a decoder that others
    trained has no position for each token of prompt and continuation but the last, which is not read."""
    prompt = np.asarray(prompt_tokens)
    if prompt.ndim != 1 or len(prompt) == 0 or not np.issubdtype(prompt.dtype, np.integer):
        raise UserError(f"a prompt must be at least one integer token, not {prompt.dtype} of shape {prompt.shape}")
    if prompt.min() < 0 or prompt.max() >= config.vocabulary_size:
        raise UserError(f"the prompt has tokens outside the vocabulary of {config.vocabulary_size}")
    if (room := (positions := getattr(config, "max_positions", np.inf)) + 1 - len(prompt)) < length:
        fault = f"the prompt has {len(prompt):,} tokens, and the model {positions:,} positions"
        raise UserError(f"{fault}: give {f'a length of at most {room:,}' if room > 0 else 'a shorter prompt'}")
    for name, value, valid, allowed in (
        ("length", length, length >= 0, "at least 0"), ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("k", k, 0 <= k <= MAX_NEIGHBOURS_PER_CHUNK, f"from 0 to {MAX_NEIGHBOURS_PER_CHUNK:,} neighbours per chunk"),
        ("temperature", temperature, 0 <= temperature < np.inf, "at least 0 and finite"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
    ):  # fmt: skip
        if not valid:
            raise UserError(f"{name} must be {allowed}, not {value:,}")
    if database is not None:
        check_fit(config, database)
    heads = getattr(config, "kv_heads", config.n_heads)
    needed = 4 * 2 * heads * config.d_head * config.n_layers * (len(prompt) + length)
    check_memory(needed, f"keys and values of {len(prompt) + length:,} tokens", "a length (--length) of", length)
    check_tree(params, config, retrieving=bool(config.retrieves and k and database is not None))
    rng = np.random.Generator(np.random.Philox(seed))
    retrieved: list[Retrieved] = []

    def retrieve(number: int, chunk: np.ndarray) -> np.ndarray | None:
        if database is None or not config.retrieves or not k:
            return None
        ids, distances = database.search_keys(database.embed_chunks(chunk[None]), k)
        retrieved.append(Retrieved(number, ids[0], distances[0], database.value(ids[0])))
        return np.asarray(model_neighbours(params, config, retrieved[-1].values))

    choose = partial(
        sample_token, rng=rng, temperature=temperature, top_k=top_k, top_p=top_p, padding_id=config.padding_id
    )
    with contextlib.nullcontext() if config.is_retro else spinning_blas():
        return decode_tokens(params, config, prompt, length, choose, retrieve, stop_token, on_token), retrieved


def decode_tokens(
    params: Tree, config: RetroConfig, prompt: np.ndarray, length: int, choose: Callable[[np.ndarray], int],
    retrieve: Callable[[int, np.ndarray], np.ndarray | None], stop_token: int | Collection[int] | None = None,
    on_token: Callable[[int], object] = lambda token: None,
) -> np.ndarray:  # fmt: skip
    """The decoding loop: the `length` tokens after a prompt (n,), or those up to and including a stop_token, int64.

    choose(logits (V,)) returns the next token. retrieve(number of the chunk, its tokens (m,)) returns the chunk's
    neighbours (k, 2m), or None for no neighbours. It is called when the next token after a complete chunk is needed."""
    m, cache, tokens = config.chunk_size, Cache(), prompt.astype(np.int64)
    stops = stop_token if isinstance(stop_token, Collection) else [stop_token]
    for _ in range(length):
        waiting = len(tokens) - cache.length
        if config.is_retro or config.retrieves:
            counts = segments(cache.length, waiting, m)
        else:
            counts = [part.stop - part.start for part in threads.blocks(waiting, PROMPT_PART)]
        for count in counts:
            start = cache.length
            neighbours = None if (start + 1) % m else retrieve(start // m, tokens[start + 1 - m : start + 1])
            part = tokens[start : start + count]
            logits = extend(params, config, cache, part, neighbours, only_last=not config.is_retro)[-1]
        tokens = np.append(tokens, choose(logits))
        on_token(int(tokens[-1]))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def sample_token(
    logits: np.ndarray, rng: np.random.Generator, temperature: float = 1, top_k: int | None = None, top_p: float = 1,
    padding_id: int | None = 0,
) -> int:  # fmt: skip
    """Draw one token from logits (V,), never padding. temperature, top_k, top_p: as in `generate`.

    Raises UserError for logits that are not finite."""
    logits = logits.astype(np.float64)
    if not np.all(np.isfinite(logits)):
        raise UserError("the model's logits are not finite: its weights are damaged; use another checkpoint")
    if padding_id is not None:
        logits[padding_id] = -np.inf
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    with np.errstate(over="ignore", under="ignore"):  # a temperature near 0 leaves only the most likely token
        probabilities = np.exp(log_softmax((logits[order] - logits[order[0]]) / temperature))
    mass_before = np.cumsum(probabilities) - probabilities
    cumulative = np.cumsum(probabilities * (mass_before < top_p))  # The token that crosses top_p is included.
    index = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(index, len(order) - 1)])


@contextlib.contextmanager
def spinning_blas() -> Iterator[None]:
    """Let OpenBLAS's idle threads spin, for a series of short products: to wake them takes as long as such a product.

    Nothing changes within another such context, or if the import of this package did not let them sleep. Nor does it
    while another thread of Python exists, which may be multiplying. If one exists at the end, the threads spin on until
    the end of the next context."""
    setting = "BLAS threads sleep"
    if setting not in runtime.tuned or os.environ.get(runtime.TIMEOUT) != runtime.SLEEP:
        yield
        return
    try:
        if runtime.tuned[setting]:
            _restarted(runtime.SPIN)
        yield
    finally:
        if os.environ.get(runtime.TIMEOUT) == runtime.SPIN or not runtime.tuned[setting]:
            runtime.tuned[setting] = _restarted(runtime.SLEEP)


def _restarted(timeout: str) -> bool:
    """Whether BLAS's threads could start again with this setting. If not, later processes get the usual one."""
    os.environ[runtime.TIMEOUT] = timeout
    threads.end()
    if not (done := blas_threads.restart()):
        os.environ[runtime.TIMEOUT] = runtime.SLEEP
    return done
