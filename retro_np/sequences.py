"""Between the data layer and the model: rows of a split become tokens, targets and neighbours. Paper §2.3, §2.4.

`retrieval` and `nn` do not import each other. Training, evaluation and sampling turn chunks of a database into the
arrays that `retro` takes with the functions of this module.
"""

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.neighbours import keep_first
from retro_np.retrieval.tokenizer import END_OF_TEXT

WINDOWS_PER_BATCH = 8


def check_fit(config: RetroConfig, database: Database) -> None:
    """Raise UserError unless model and database have the same vocabulary and chunks."""
    for name in ("vocabulary_size", "chunk_size"):
        ours, theirs = getattr(config, name), getattr(database, name)
        if ours != theirs:
            raise UserError(
                f"the model has {name} {ours}, and the database {database.path} has {theirs}: "
                "use the database that the model was trained with, or train one for this"
            )


def sequence_chunks(sequence_length: int, chunk_size: int) -> int:
    """How many chunks a sequence has. Raises UserError where it is not whole chunks."""
    if sequence_length < chunk_size or sequence_length % chunk_size:
        raise UserError(f"a sequence of {sequence_length} tokens is not whole chunks of {chunk_size}: take a multiple")
    return sequence_length // chunk_size


def tokens_and_targets(split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, n) of chunk rows (B, l), and each position's target: the next token of the same document, else 0."""
    batch, length = rows.shape
    m = split.tokens.shape[1]
    # one chunk further than the sequence: its first token is the last position's target
    following = np.where(rows[:, -1:] >= 0, rows[:, -1:] + 1, -1)
    following[following == len(split.tokens)] = -1
    wide = np.concatenate([rows, following], axis=1)
    present = wide >= 0
    tokens = np.where(present[..., None], split.tokens[wide], 0).astype(np.int64)
    documents = np.where(present, split.documents[wide], -1)
    targets = np.empty_like(tokens[:, :length])
    targets[..., :-1] = tokens[:, :length, 1:]
    same = (documents[:, :length] == documents[:, 1:]) & (wide[:, 1:] == wide[:, :length] + 1)
    targets[..., -1] = np.where(same, tokens[:, 1:, 0], 0)
    return tokens[:, :length].reshape(batch, length * m), targets.reshape(batch, length * m)


def batch_of(database: Database, split: Split, rows: np.ndarray, k: int):
    """Tokens (B, n), targets (B, n) and neighbours (B, l, k, 2m) of chunk rows (B, l); k = 0: no neighbours, None."""
    tokens, targets = tokens_and_targets(split, rows)
    return tokens, targets, sequence_neighbours(database, split, rows, k) if k else None


def sequence_neighbours(database, split, rows: np.ndarray, k: int) -> np.ndarray:
    """Tokens of the k neighbours of each chunk of each sequence: (B, l, k, 2m), padding where there is none.

    rows: (B, l) row numbers of the split, −1 for padding. In the training split no neighbour comes from a document
    that any chunk of the sequence is of: a chunk of A that retrieved from B would leak into B's tokens behind it.
    Raises UserError for training chunks whose neighbours were not looked for.
    """
    if split.name == "train" and not database.training_neighbours:
        raise UserError(f"{database.path} was built without the neighbours of training chunks: build one that has them")
    present = rows >= 0
    ids = np.where(present[..., None], split.neighbours[np.maximum(rows, 0)], -1)
    ids = np.where(database.removed(ids), -1, ids)
    if split.name == "train":
        documents = np.where(present, split.documents[np.maximum(rows, 0)], -1)
        return database.value(choose_neighbours(ids, database.document_of(ids), documents[:, None, :], k))
    return database.value(choose_neighbours(ids, database.document_of(ids), np.empty(0, np.int64), k))


def choose_neighbours(candidates, candidate_documents, excluded_documents, k: int) -> np.ndarray:
    """The first k candidates of each row that come from none of its excluded documents; −1 where fewer remain.

    candidates, candidate_documents: (..., K), nearest first, −1 missing; excluded_documents: (..., E), its leading
    axes broadcast against theirs. Returns ids (..., k).
    """
    allowed = (candidate_documents[..., :, None] != excluded_documents[..., None, :]).all(axis=-1)
    return keep_first(candidates, np.zeros(candidates.shape, np.float32), allowed, k)[0]


def evaluation_windows(split: Split, length: int, stride: int, limit: int | None = None):
    """Windows over each document, on its own grid of chunks, so that each token is scored once.

    length, stride: in chunks; the first window of a document scores all of its tokens, each later one its last
    stride · m. Returns rows (windows, length), −1 beyond a document's end, and first (windows,), the position from
    which a window scores. limit: only the first so many chunks of the split.
    """
    documents = split.documents[:limit]
    rows, first = [], []
    m = split.tokens.shape[1]
    for begin, end in document_runs(documents):
        for window in range(begin, max(begin + 1, end - length + stride), stride):
            row = np.arange(window, window + length)
            rows.append(np.where(row < end, row, -1))
            first.append(0 if window == begin else (length - stride) * m)
    return np.array(rows).reshape(-1, length), np.array(first, dtype=np.int64)


def scored_windows(split: Split, rows: np.ndarray, first: np.ndarray):
    """Go through evaluation windows in batches: yields rows (B, l), tokens and targets (B, n).

    rows, first: of `evaluation_windows`. Windows of one length come together: little padding. A target that is not
    scored is 0.
    """
    lengths = (rows >= 0).sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    for batch in np.split(order, range(WINDOWS_PER_BATCH, len(order), WINDOWS_PER_BATCH)):
        window = rows[batch, : lengths[batch].max(initial=0)]
        tokens, targets = tokens_and_targets(split, window)
        targets[targets == END_OF_TEXT] = 0
        targets[np.arange(tokens.shape[1]) < first[batch][:, None]] = 0
        yield window, tokens, targets
