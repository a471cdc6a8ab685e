"""In-context retrieval: a baseline reads the neighbours at the start of its context, without cross-attention.

The neighbours of the previous chunk precede the text, the nearest one last. Nothing is trained. Each chunk needs its
own forward pass, because its neighbours differ from those of other chunks. For a decoder that others trained, an empty
line ends each neighbour, and the end-of-text in it is left out."""

import itertools
from collections.abc import Sequence

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import ScoredTokens, scored_tokens
from retro_np.evaluation.likelihood import read, readout_nats
from retro_np.progress import counted
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.retrieval.tokenizer import encode
from retro_np.retrieval.vocabulary import PADDING
from retro_np.sequences import check_fit, evaluation_windows, sequence_neighbours
from retro_np.tree import Tree

SEPARATOR, ANY_LETTER = "\n\n", "x"
NOTHING = np.empty(0, np.int64)


def prepended(
    params: Tree, config: RetroConfig, database: Database, *, k: int = 2, sequence_length: int = 512,
    stride: int | None = None, limit: int | None = None, retrieval: Retrieval | None = None,
) -> ScoredTokens:  # fmt: skip
    """Score held-out tokens with k neighbours in the model's context.

    The arguments are those of `frozen_model`, and k is that of `score`. If neighbours and context exceed
    sequence_length, the start of the context is dropped. Raises UserError if less than two chunks could be left."""
    check_fit(config, database, sequence_length)
    retrieval = retrieval or Retrieval.own(database, "valid")
    split, skipped, separator = retrieval.split, [database.padding], separator_of(config, database)
    check_room(config, k, sequence_length, separator)
    if len(separator):
        skipped.append(database.end_of_text)

    def predict(window, tokens, targets):
        neighbours = sequence_neighbours(retrieval.database, split, window, k)
        return (prepended_nats(params, config, tokens, targets, neighbours, sequence_length, skipped, separator),)

    windows = evaluation_windows(split, sequence_length, stride, limit)
    return scored_tokens(split, windows, predict, "prepended neighbours", limit)[0]


def separator_of(config: RetroConfig, database: Database) -> np.ndarray:
    """The tokens between a neighbour and what follows it: none for our own models, whose text has no such separator."""
    if config.is_retro:
        return NOTHING
    before, whole = (encode(database.tokenizer, text) for text in (ANY_LETTER, ANY_LETTER + SEPARATOR))
    return np.array(whole[len(before) :], np.int64)  # without the space that SentencePiece adds to a text


def check_room(config: RetroConfig, k: int, sequence_length: int, separator: np.ndarray = NOTHING) -> None:
    """Raise UserError if a sequence has no room for k neighbours, their separators, and two chunks of context."""
    m = config.chunk_size
    if (total := k * (2 * m + len(separator)) + 2 * m) > sequence_length:
        remedy = "use fewer, or a longer sequence"
        if 4 * m + len(separator) > (positions := getattr(config, "max_positions", total)):
            remedy = f"the model has {positions:,} positions, so build another database with a smaller --chunk-size"
        between = f" and a separator of {counted(len(separator), 'token')}" if len(separator) else ""
        parts = f"{counted(k, 'neighbour')} of {2 * m} tokens{between}, with {2 * m} tokens of context"
        fault = f"{parts}, need {total} tokens, more than the {sequence_length} of a sequence"
        raise UserError(f"{fault}: {remedy}")


def prepended_nats(
    params: Tree, config: RetroConfig, tokens: np.ndarray, targets: np.ndarray, neighbours: np.ndarray, length: int,
    skipped: Sequence[int] = (PADDING,), separator: np.ndarray = NOTHING,
) -> np.ndarray:  # fmt: skip
    """Negative log-likelihood of each target, with neighbours in front of its context. (B, n) float64, 0 for −1.

    tokens, targets: (B, n); neighbours: (B, l, k, 2m). The neighbours of chunk u are read where CCA reads them: by
    chunk u's last token and by all but the last token of the next chunk. length: how many tokens the model may read.
    skipped: the tokens of neighbours that are not read. separator: what follows each neighbour."""
    nats, (m, n) = np.zeros(tokens.shape), (config.chunk_size, tokens.shape[1])
    for u in range(-1, n // m):  # the chunk whose neighbours are read; −1 for the first chunk, which reads none
        begin, end = max(0, (u + 1) * m - 1), min((u + 2) * m - 1, n)
        windows, prompts = np.flatnonzero((targets[:, begin:end] >= 0).any(axis=1)), []
        for b in windows:
            passages = [row[~np.isin(row, skipped)] for row in (neighbours[b, u, ::-1] if u >= 0 else ())]
            retrieved = np.concatenate([NOTHING, *(part for row in passages if len(row) for part in (row, separator))])
            prompts.append(np.concatenate([retrieved, tokens[b, :end][-(length - len(retrieved)) :]]))
        if prompts:
            # Padding follows the text, so no token sees it.
            padded = np.array(list(itertools.zip_longest(*prompts, fillvalue=0)), np.int64).T
            for b, hidden, text in zip(windows, read(params, config, padded), prompts, strict=True):
                part = hidden[len(text) + begin - end : len(text)]
                nats[b, begin:end] = readout_nats(params, config, part, targets[b, begin:end])
    return nats
