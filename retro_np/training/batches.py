"""Which tokens, targets and neighbours a step sees: a function of the seed and the step's number."""

import numpy as np

from retro_np.errors import UserError
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.neighbours import sequence_neighbours


def sequence_rows(n_rows: int, length: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The chunks of each sequence of a step. Returns (batch_size, length) row numbers of the split; −1 is padding.

    An epoch cuts the stream of chunks, from an offset of its own, into sequences and takes them in an order of its
    own; both are drawn from (seed, epoch). The stream is a ring, so that no chunk is left over at its end.
    """
    per_epoch = max(1, n_rows // length)
    rows = np.full((batch_size, length), -1)
    orders: dict[int, tuple[int, np.ndarray]] = {}
    for b in range(batch_size):
        epoch, place = divmod(step * batch_size + b, per_epoch)
        if epoch not in orders:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
            orders[epoch] = int(rng.integers(n_rows)), rng.permutation(per_epoch)
        offset, order = orders[epoch]
        if n_rows < length:
            rows[b, :n_rows] = np.arange(n_rows)
        else:
            rows[b] = (offset + order[place] * length + np.arange(length)) % n_rows
    return rows


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


def training_batch(database: Database, split: Split, k: int, *, sequence_length, batch_size, seed, step):
    """Tokens (B, n), targets (B, n) and neighbours (B, l, k, 2m), None for k = 0, of a step."""
    length = sequence_chunks(sequence_length, database.chunk_size)
    rows = sequence_rows(len(split.tokens), length, batch_size, seed, step)
    tokens, targets = tokens_and_targets(split, rows)
    return tokens, targets, sequence_neighbours(database, split, rows, k) if k else None


def sequence_chunks(sequence_length: int, chunk_size: int) -> int:
    """How many chunks a sequence has. Raises UserError where it is not whole chunks."""
    if sequence_length < chunk_size or sequence_length % chunk_size:
        raise UserError(f"a sequence of {sequence_length} tokens is not whole chunks of {chunk_size}: take a multiple")
    return sequence_length // chunk_size
