"""Bits per byte of whole documents under a model, with a sliding window. Paper §2.6 and appendix C."""

import math
from dataclasses import dataclass

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.nn.model import retro
from retro_np.nn.operators import log_softmax
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import check_fit, evaluation_windows, scored_windows, sequence_chunks, sequence_neighbours


@dataclass(frozen=True)
class Losses:
    """What a model paid for each chunk of a split.

    nats, bytes: (chunks,), summed over the chunk's scored tokens and over the bytes of text that they stand for;
    documents: (chunks,). A document's first token and its end-of-text are not scored: neither nats nor bytes.
    """

    nats: np.ndarray
    bytes: np.ndarray
    documents: np.ndarray

    def per_document(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document numbers, and the nats and bytes of each."""
        numbers, where = np.unique(self.documents, return_inverse=True)
        sums = (np.bincount(where, weights, minlength=len(numbers)) for weights in (self.nats, self.bytes))
        return numbers, *sums

    def bits_per_byte(self) -> float:
        """The figure over all chunks."""
        return bits_per_byte(self.nats, self.bytes)


def bits_per_byte(nats, n_bytes) -> float:
    """Compression rate of a text under a model: nats / (ln 2 · bytes).

    nats: summed negative log-likelihoods, any shape; n_bytes: UTF-8 bytes of the original text, of the same shape.
    Returns a float in bits per byte. Raises ValueError where no byte is left, as after a leakage filter. Paper eq. 5.
    """
    total = float(np.sum(n_bytes))
    if total <= 0:
        raise UserError("no byte is left to divide by: the texts are empty, or a filter took all of them")
    return float(np.sum(nats, dtype=np.float64)) / (math.log(2) * total)


def score(
    params,
    config: RetroConfig,
    database: Database,
    split_name: str = "valid",
    *,
    k: int = 2,
    sequence_length: int = 512,
    stride: int = 256,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    retrieval: Retrieval | None = None,
    description: str = "evaluating",
) -> Losses:
    """Score a split. k = 0: retrieval off, RETRO[OFF]; otherwise RETRO[ON] with k neighbours.

    sequence_length, stride: tokens, multiples of m; each scored token but a document's first ones has at least
    sequence_length − stride tokens of context. limit: chunks of the split to score, from its start; None: all.
    shuffle_seed: not None gives each chunk the neighbours of another, the control that shows whether they matter.
    retrieval: where neighbours are from, see `join.retrieve_from`; None: the database's own.
    """
    check_fit(config, database)
    m = config.chunk_size
    length, step = sequence_chunks(sequence_length, m), sequence_chunks(stride, m)
    if step > length:
        raise UserError(f"a stride of {stride} tokens would leave out what lies between windows of {sequence_length}")
    retrieval = retrieval or Retrieval.own(database, split_name)
    split = retrieval.split
    if len(split.tokens) == 0:
        raise UserError(f"{database.path} has no chunk in its split {split_name!r}: build it with --held-out above 0")
    if shuffle_seed is not None and split_name == "train":
        raise UserError(
            "in the training split, another chunk's neighbours may come from the document itself: use the split valid"
        )
    shuffled = _permutation(len(split.tokens), split.removed, shuffle_seed)
    rows, first = evaluation_windows(split, length, step, limit)
    lengths = token_byte_lengths(database.tokenizer)
    chunks = len(split.tokens[:limit])
    nats, n_bytes = np.zeros(chunks), np.zeros(chunks)
    with progress_bar(description, len(rows)) as advance:
        for window, tokens, targets in scored_windows(split, rows, first):
            neighbours = None
            if k and config.retrieves:
                neighbour_rows = window if shuffled is None else np.where(window >= 0, shuffled[window], -1)
                neighbours = sequence_neighbours(retrieval.database, split, neighbour_rows, k)
            token_nats = nats_of(retro(params, config, tokens, neighbours)[0], targets)
            # a target belongs to the chunk it stands in, which for a chunk's last position is the one after
            b, t = np.nonzero(targets)
            chunk = window[b, t // m] + (t % m == m - 1)
            scored = chunk < chunks
            np.add.at(nats, chunk[scored], token_nats[b, t][scored])
            np.add.at(n_bytes, chunk[scored], lengths[targets[b, t][scored]])
            advance(len(window))
    if not np.all(np.isfinite(nats)):
        raise UserError(
            f"{description}: the model's losses are not finite; its weights are damaged, take another checkpoint"
        )
    return Losses(nats, n_bytes, np.array(split.documents[:limit]))


def nats_of(logits, targets) -> np.ndarray:
    """Negative log-likelihood of each target in nats, (B, n); 0 where the target is padding."""
    picked = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return np.where(targets == 0, 0, -picked)


def _permutation(n: int, removed, seed: int | None):
    """A permutation that leaves no chunk its own neighbours (a rotation of a shuffled order), or None. Removed chunks
    neither lend nor borrow.
    """
    if seed is None:
        return None
    order = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(n), removed))
    shuffled = np.arange(n)
    shuffled[order] = np.roll(order, 1)
    return shuffled
