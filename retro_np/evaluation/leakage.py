"""How much of the gain from retrieval is copying from near-duplicates: r(C) and bpb(α). Paper §2.6, eq. 5."""

from collections.abc import Iterable

import numpy as np

from retro_np.evaluation.bits_per_byte import Losses
from retro_np.kernels.substring import longest_common_substring
from retro_np.kernels.threads import blocks
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval

LEAKAGE_NEIGHBOURS = 10  # neighbours that each chunk is compared with (paper §2.6)
ALPHAS = tuple(i / 16 for i in range(17))
NO_LEAKAGE = 2 / 16  # a chunk with r(C) up to this share counts as free of leakage (paper §4.4)
CHUNKS_PER_BATCH = 256

Bits = dict[str, float | None]


def chunk_leakage(
    database: Database, split_name: str = "valid", limit: int | None = None, retrieval: Retrieval | None = None
) -> np.ndarray:
    """r(C) = s / m of each chunk C, where s is the longest run of tokens that C shares with one of its neighbours.

    C is compared with the values of its 10 nearest neighbours, or of all stored ones if there are fewer. split_name,
    limit and retrieval as in `score`. Returns (chunks,) float64 in [0, 1]."""
    retrieval = retrieval or Retrieval.own(database, split_name)
    tokens, neighbours = retrieval.split.tokens[:limit], retrieval.split.neighbours
    ratios = np.zeros(len(tokens))
    with progress_bar("longest common substrings", len(tokens)) as advance:
        for rows in blocks(len(tokens), CHUNKS_PER_BATCH):
            values = retrieval.database.value(neighbours[rows][:, :LEAKAGE_NEIGHBOURS])
            ratios[rows] = longest_common_substring(tokens[rows], values, retrieval.split.padding) / tokens.shape[1]
            advance(rows.stop - rows.start)
    return ratios


def filtered_bits_per_byte(losses: Losses, ratios: np.ndarray, alphas: Iterable[float] = ALPHAS) -> list[float | None]:
    """bpb(α) for each α: bits per byte of the chunks with r(C) ≤ α. Paper eq. 5.

    ratios: (chunks,), from `chunk_leakage`. An entry is None if no chunk passes the filter."""
    filters = ((ratios <= alpha) & (losses.bytes > 0) for alpha in alphas)
    return [losses[rows].bits_per_byte() if rows.any() else None for rows in filters]


def bits(losses: Losses, ratios: np.ndarray) -> Bits:
    """Bits per byte of all chunks ("bpb") and of those without leakage ("bpb_no_leakage", bpb(12.5 %))."""
    return {"bpb": losses.bits_per_byte(), "bpb_no_leakage": filtered_bits_per_byte(losses, ratios, [NO_LEAKAGE])[0]}
