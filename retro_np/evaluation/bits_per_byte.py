"""Bits per byte of whole documents under a model, with a sliding window. Paper §4.1 and C.2."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.likelihood import nats_of as nats_of  # where it was before
from retro_np.evaluation.likelihood import token_nats
from retro_np.info import free_memory
from retro_np.nn.memory import StateCache
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.join import Retrieval
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import check_fit, evaluation_windows, scored_windows, sequence_neighbours
from retro_np.tree import Tree


@dataclass(frozen=True)
class Losses:
    """A model's loss on each chunk of a split.

    (chunks,) each. nats: the summed negative log-likelihood of a chunk's scored tokens; bytes: their UTF-8 bytes;
    documents: the number of its document; tokens: how many are scored (empty in the files of older versions). A
    document's first token and its end-of-text are not scored: they add neither nats nor bytes.

    Raises UserError unless nats, bytes and documents have the same length."""

    nats: np.ndarray
    bytes: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        shapes = [np.shape(array) for array in (self.nats, self.bytes, self.documents)]
        if len(shapes[0]) != 1 or len(set(shapes)) > 1:
            raise UserError(f"nats, bytes and documents of Losses must have the same length, not the shapes {shapes}")

    def __getitem__(self, rows: slice | np.ndarray) -> "Losses":
        """The losses on the chunks that a slice, a mask (chunks,) or row numbers select."""
        return Losses(*(column[rows] if len(column) else column for column in vars(self).values()))

    def per_document(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document numbers, nats and bytes, (documents,) each."""
        numbers, inverse = np.unique(self.documents, return_inverse=True)
        return numbers, np.bincount(inverse, self.nats), np.bincount(inverse, self.bytes)

    def bits_per_byte(self) -> float:
        """Bits per byte over all chunks."""
        return bits_per_byte(self.nats, self.bytes)


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a split, in the order of the text, and the loss on each.

    positions: (N,), row of the split · m + position in the chunk; tokens: (N,); nats: (N,) float64."""

    positions: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "ScoredTokens":
        """The tokens that a slice or a mask (N,) selects."""
        return ScoredTokens(self.positions[rows], self.tokens[rows], self.nats[rows])

    def losses(self, database: Database, split: str | Split = "valid", limit: int | None = None) -> Losses:
        """The losses per chunk, as `score` returns them. limit: only this many chunks, from the start of the split."""
        split = database.split(split) if isinstance(split, str) else split
        documents, chunks = np.array(split.documents[:limit]), self.positions // database.chunk_size
        columns = self.nats, self.by_token(database, split).bytes, None
        nats, n_bytes, counts = (np.bincount(chunks, values, len(documents)) for values in columns)
        return Losses(nats, n_bytes, documents, counts)

    def by_token(self, database: Database, split: Split) -> Losses:
        """The losses with a row for each token instead of each chunk, (N,)."""
        documents = np.asarray(split.documents)[self.positions // database.chunk_size]
        return Losses(self.nats, token_byte_lengths(database.tokenizer)[self.tokens], documents)


def bits_per_byte(nats: ArrayLike, n_bytes: ArrayLike) -> float:
    """Compression rate of a text under a model: nats / (ln 2 · bytes). Paper eq. 5.

    nats: summed negative log-likelihoods, any shape; n_bytes: UTF-8 bytes of the original text, same shape. Raises
    UserError (a ValueError) if no bytes are left, for example after a leakage filter."""
    total = float(np.sum(n_bytes))
    if total <= 0:
        raise UserError("no bytes are left: the texts are empty, or a filter removed all of them")
    return float(np.sum(nats, dtype=np.float64)) / (math.log(2) * total)


def score(
    params: Tree, config: RetroConfig, database: Database, split_name: str = "valid", *, k: int = 2,
    sequence_length: int = 512, stride: int = 256, limit: int | None = None, shuffle_seed: int | None = None,
    retrieval: Retrieval | None = None, description: str = "evaluating",
) -> Losses:  # fmt: skip
    """Compute the loss of one model on each chunk of a split, under one condition. `score_tokens` returns each token's.

    params, config: the model, as `load_params` returns it.
    database: built with the model's vocabulary and chunk size m.
    split_name: "valid", the held-out documents, or "train".
    k: neighbours per chunk; 0 turns retrieval off. k = 0 is RETRO[OFF] in the paper, k > 0 is RETRO[ON].
    sequence_length, stride: in tokens, multiples of m. A window of sequence_length tokens slides over each document by
        stride tokens, and scores each token once. Beyond a document's first window, each scored token therefore has at
        least sequence_length − stride tokens of context.
    limit: score only this many chunks, from the start of the split; None scores all of them.
    shuffle_seed: gives each chunk the neighbours of another chunk, drawn with this seed. This control shows whether the
        model uses the content of its neighbours.
    retrieval: neighbours from another database, made by `retrieval.join.retrieve_from`; None uses the database's own.
    description: the label of the progress bar.

    Returns Losses; its `bits_per_byte()` is the figure that the paper reports. Raises UserError if the model does not
    fit the database, if the split is empty, for lengths that do not fit together, and if a loss is not finite."""
    scored = score_tokens(
        params, config, database, split_name, k=k, sequence_length=sequence_length, stride=stride, limit=limit,
        shuffle_seed=shuffle_seed, retrieval=retrieval, description=description,
    )  # fmt: skip
    return scored.losses(database, retrieval.split if retrieval else split_name, limit)


def score_tokens(
    params: Tree, config: RetroConfig, database: Database, split_name: str = "valid", *, k: int = 2,
    sequence_length: int = 512, stride: int = 256, limit: int | None = None, shuffle_seed: int | None = None,
    retrieval: Retrieval | None = None, description: str = "evaluating", cache: StateCache | None = None,
) -> ScoredTokens:  # fmt: skip
    """Compute the loss of one model on each token of a split. Arguments and errors are those of `score`.

    cache: of neighbours that this decoder, which others trained, has encoded already; None: a cache of this call, in at
    most half of the memory that is free.
    Returns ScoredTokens in the order of the text, without each document's first token and its end-of-text."""
    check_arguments(params=(params, dict), config=(config, RetroConfig), database=(database, Database), k=(k, 0))
    check_arguments(sequence_length=(sequence_length, 1), stride=(stride, 1), retrieval=(retrieval, Retrieval | None))
    check_arguments(limit=(1 if limit is None else limit, 1), shuffle_seed=(shuffle_seed or 0, 0))
    check_fit(config, database, sequence_length)
    retrieval = retrieval or Retrieval.own(database, split_name)
    split, windows = retrieval.split, evaluation_windows(retrieval.split, sequence_length, stride, limit)
    if len(split.tokens) == 0:
        others = [f"use --split {name}, or " for name in database.held_out_splits if len(database.split(name).tokens)]
        remedy = f"{''.join(others)}build it with --held-out-bytes 0.1, or score a text of your own with --text"
        raise UserError(f"{database.path} has no chunks in its split {split_name!r}: {remedy}")
    if shuffle_seed is not None and split_name == "train":
        raise UserError("shuffled neighbours of training chunks may be of the chunk's own document: use split valid")
    shuffled = _permutation(len(split.tokens), split.removed, shuffle_seed)
    if cache is None and config.reads_itself:
        cache = StateCache(int(min(StateCache.limit, free_memory() / 2)))

    def predict(window, tokens, targets):
        rows = np.where(window >= 0, shuffled[window], -1)
        neighbours = sequence_neighbours(retrieval.database, split, rows, k) if k and config.retrieves else None
        return token_nats(params, config, tokens, targets, neighbours, cache)[:1]

    scored, _ = scored_tokens(split, windows, predict, description, limit)
    if not np.all(np.isfinite(scored.nats)):
        raise UserError(f"{description}: the losses are not finite; the weights are damaged: use another checkpoint")
    return scored


def check_arguments(**expected: tuple[Any, Any]) -> None:
    """Check arguments, each given as name=(value, type) or as name=(value, the least whole number that it may be).

    Raises TypeError for a value of another type, and UserError for one that is no such number."""
    for name, (value, kind) in expected.items():
        if isinstance(kind, int):
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < kind:
                raise UserError(f"{name} must be a whole number of at least {kind}, not {value!r:.40}")
        elif not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {getattr(kind, '__name__', kind)}, not {type(value).__name__}")


def scored_tokens(
    split: Split, windows: tuple[np.ndarray, np.ndarray], predict: Callable[..., tuple[np.ndarray, ...]],
    description: str, limit: int | None = None,
) -> tuple[ScoredTokens, list[np.ndarray]]:  # fmt: skip
    """Score windows with any predictor.

    windows: from `evaluation_windows`. predict(window, tokens, targets), with arrays as in `scored_windows`,
    returns the nats of the targets, (B, n), and any further arrays (B, n, …). limit: leave out the tokens after this
    many chunks of the split. Returns the scored tokens, and the further arrays as (N, …)."""
    parts, m = [], split.tokens.shape[1]
    for window, tokens, targets in scored_windows(split, *windows, description):
        b, t = np.nonzero(targets >= 0)
        # After a chunk's last token comes the first token of the next row.
        positions = window[b, t // m] * m + t % m + 1
        parts.append((positions, targets[b, t], *(array[b, t] for array in predict(window, tokens, targets))))
    joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    order = np.argsort(joined[0], kind="stable")[: np.count_nonzero(joined[0] < len(split.tokens[:limit]) * m)]
    positions, tokens, nats, *arrays = (array[order] for array in joined)
    return ScoredTokens(positions, tokens, nats.astype(np.float64)), arrays


def _permutation(n: int, removed, seed: int | None):
    """A permutation that gives no chunk its own neighbours, except without a seed. Removed chunks stay in place."""
    shuffled = np.arange(n)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(np.setdiff1d(shuffled, removed))
        shuffled[order] = np.roll(order, 1)  # a rotation has no fixed point
    return shuffled
