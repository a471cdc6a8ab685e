"""Between the data layer and the model: turn rows of a split into tokens, targets and neighbours. Paper §2.3, §2.4.

`retrieval` and `nn` do not import each other. Training, evaluation and sampling call this module, which joins them."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.join import DatabaseUnion
from retro_np.retrieval.neighbours import keep_first
from retro_np.retrieval.vocabulary import vocabulary

WINDOWS_PER_BATCH = 8
NO_TARGET = -1  # a target where there is nothing to predict


def check_fit(config: RetroConfig, database: Database | DatabaseUnion, sequence_length: int | None = None) -> None:
    """Raise UserError unless the model and the database have the same vocabulary size, chunk size and padding.

    The vocabulary of a decoder that others trained may be larger than the tokenizer's, and it needs no padding. If a
    sequence_length is given, it must be whole chunks, and such a decoder must have as many positions."""
    facts: dict[str, Any] = {"vocabulary_size": database.vocabulary_size, "padding_id": database.padding}
    if not config.is_retro:
        facts = {"vocabulary_size": max(config.vocabulary_size, vocabulary(database.tokenizer).size)}
    for name, stored in (facts | {"chunk_size": database.chunk_size}).items():
        needed = getattr(config, name)
        if needed != stored:
            fault = f"the model has {name} {needed}, and the database {database.path} has {stored}"
            raise UserError(f"{fault}: use the database that it was trained with, or train a model for this database")
    if sequence_length is not None:
        m, positions = database.chunk_size, getattr(config, "max_positions", math.inf)
        if m > positions:
            fault = f"the model has {positions:,} positions, fewer than a chunk of {database.path} has tokens, {m:,}"
            raise UserError(f"{fault}: build another database with a --chunk-size of at most {positions:,}")
        if sequence_length > positions:
            fault = f"the model has {positions:,} positions, fewer than a sequence of {sequence_length:,} tokens"
            raise UserError(f"{fault}: give a sequence_length of at most {positions // m * m:,}")
        sequence_chunks(sequence_length, m)


def model_tokens(config: RetroConfig, tokens: np.ndarray) -> np.ndarray:
    """The tokens that a model reads in place of a database's.

    A decoder that others trained has no rows for the ids that a database adds for padding and end-of-text: they become
    0. They stand at a document's end, where no position that is scored sees them."""
    return tokens if config.is_retro else np.where(tokens < config.vocabulary_size, tokens, 0)


def sequence_chunks(sequence_length: int, chunk_size: int, name: str = "sequence_length") -> int:
    """The number of chunks in a sequence. Raises UserError, with `name`, unless it is a positive whole number."""
    if sequence_length < chunk_size or sequence_length % chunk_size:
        raise UserError(f"{name} must be a multiple of the chunk size, {chunk_size}, not {sequence_length}")
    return sequence_length // chunk_size


def tokens_and_targets(split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of sequences of chunks, and each position's target.

    rows: (B, l) row numbers of the split, −1 for padding. Returns tokens and targets, (B, n) int64 each, n = l · m. A
    target is the next token of the same document, or −1 if there is none."""
    batch, length = rows.shape
    m = split.tokens.shape[1]
    # Read one chunk beyond the sequence, because its first token is the target of the last position.
    last = rows[:, -1:]
    extended = np.concatenate([rows, np.where((last >= 0) & (last + 1 < len(split.tokens)), last + 1, -1)], axis=1)
    present = extended >= 0
    tokens = np.where(present[..., None], split.tokens[extended], split.padding).astype(np.int64)
    tokens = tokens.reshape(batch, (length + 1) * m)
    documents = np.where(present, split.documents[extended], -1)
    same = (documents[:, :length] == documents[:, 1:]) & (extended[:, 1:] == extended[:, :length] + 1)
    targets = tokens[:, 1 : length * m + 1].copy()
    targets[:, m - 1 :: m][~same] = NO_TARGET
    targets[targets == split.padding] = NO_TARGET
    return tokens[:, : length * m].copy(), targets


def sequence_neighbours(database: Database | DatabaseUnion, split: Split, rows: np.ndarray, k: int) -> np.ndarray:
    """The k neighbours of each chunk of each sequence: tokens (B, l, k, 2m) int64, all padding where one is missing.

    The arguments and errors are those of `sequence_neighbour_ids`."""
    return database.value(sequence_neighbour_ids(database, split, rows, k))


def sequence_neighbour_ids(database: Database | DatabaseUnion, split: Split, rows: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k neighbours of each chunk of each sequence, (B, l, k) int64, −1 where one is missing.

    rows: (B, l) row numbers of the split, −1 for padding. In the training split, a neighbour never comes from a
    document that occurs anywhere in the sequence: a chunk of document A that retrieved from B would leak B's tokens
    into the predictions that follow. Raises UserError if the database has no neighbours of training chunks."""
    if split.name == "train" and not (isinstance(database, Database) and database.training_neighbours):
        raise UserError(f"{database.path} was built with --no-training-neighbours: to train, rebuild it without that")
    present = rows >= 0
    ids = np.where(present[..., None], split.neighbours[np.maximum(rows, 0)], -1)
    ids = np.where(database.removed(ids), -1, ids)
    excluded = np.empty(0, np.int64)
    if split.name == "train":
        excluded = np.where(present, split.documents[np.maximum(rows, 0)], -1)[:, None, :]
    return choose_neighbours(ids, database.document_of(ids), excluded, k)


def choose_neighbours(
    candidates: np.ndarray, candidate_documents: np.ndarray, excluded_documents: np.ndarray, k: int
) -> np.ndarray:
    """The first k candidates of each row that do not come from its excluded documents.

    candidates, candidate_documents: (..., K), nearest first, −1 where missing. excluded_documents: (..., E), broadcast
    over the leading axes. Returns ids (..., k), −1 where fewer than k remain."""
    allowed = (candidate_documents[..., :, None] != excluded_documents[..., None, :]).all(axis=-1)
    return keep_first(candidates, np.zeros(candidates.shape, np.float32), allowed, k)[0]


def evaluation_windows(
    split: Split, sequence_length: int, stride: int | None = None, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of l chunks that slide over each document and score each of its tokens once.

    sequence_length, stride: in tokens, whole chunks; stride None is half of sequence_length. The first window of a
    document scores all of its tokens, and each later one its last `stride` tokens. limit: use only this many chunks,
    from the start of the split. Returns rows (windows, l), −1 beyond the document's end, and each window's first scored
    position (windows,). Raises UserError for lengths that do not fit together."""
    m = split.tokens.shape[1]
    length = sequence_chunks(sequence_length, m)
    step = max(1, length // 2) if stride is None else sequence_chunks(stride, m, "stride")
    if step > length:
        raise UserError(f"stride must be at most sequence_length ({sequence_length} tokens), not {stride}")
    rows, first_scored = [], []
    for begin, end in document_runs(split.documents[:limit]):
        for window in range(begin, max(begin + 1, end - length + step), step):
            row = np.arange(window, window + length)
            rows.append(np.where(row < end, row, -1))
            first_scored.append(0 if window == begin else (length - step) * m)
    return np.array(rows, dtype=np.int64).reshape(-1, length), np.array(first_scored, dtype=np.int64)


def scored_windows(
    split: Split, rows: np.ndarray, first_scored: np.ndarray, description: str = "evaluating"
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield evaluation windows in batches, behind a progress bar: rows (B, l), tokens (B, n) and targets (B, n).

    rows, first_scored: from `evaluation_windows`. Windows of similar length share a batch. Unscored targets are −1."""
    lengths = (rows >= 0).sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    with progress_bar(description, len(rows)) as advance:
        for batch in np.split(order, range(WINDOWS_PER_BATCH, len(order), WINDOWS_PER_BATCH)) if len(rows) else ():
            window = rows[batch, : lengths[batch].max(initial=0)]
            tokens, targets = tokens_and_targets(split, window)
            targets[targets == split.end_of_text] = NO_TARGET
            targets[np.arange(tokens.shape[1]) < first_scored[batch][:, None]] = NO_TARGET
            yield window, tokens, targets
            advance(len(window))
