"""How much of a retrieval gain is copying from near-duplicates: r(C) and bpb(α). Paper §2.6, eq. 5."""

import numpy as np

from retro_np.evaluation.bits_per_byte import Losses, bits_per_byte
from retro_np.kernels.substring import longest_common_substring
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval

NEIGHBOURS = 10
ALPHAS = tuple(i / 16 for i in range(17))
NO_LEAKAGE = 2 / 16  # at most this share of a chunk in one run counts as no local leakage (paper §2.6)
BATCH = 256


def chunk_leakage(
    database: Database, split_name: str = "valid", limit: int | None = None, retrieval: Retrieval | None = None
) -> np.ndarray:
    """r(C) = s / m of each chunk, s the longest token run it shares with one of its 10 nearest training values.

    retrieval: where the values are from; None: the database. Returns (chunks,) in [0, 1]. Where fewer than 10
    neighbours a chunk were kept, those there are.
    """
    retrieval = retrieval or Retrieval.own(database, split_name)
    split = retrieval.split
    chunks = len(split.tokens[:limit])
    ratios = np.zeros(chunks)
    with progress_bar("longest common substrings", chunks) as advance:
        for start in range(0, chunks, BATCH):
            rows = slice(start, min(start + BATCH, chunks))
            values = retrieval.database.value(split.neighbours[rows][:, :NEIGHBOURS])
            tokens = split.tokens[rows]
            ratios[rows] = longest_common_substring(tokens, values) / tokens.shape[1]
            advance(rows.stop - rows.start)
    return ratios


def filtered_bits_per_byte(losses: Losses, ratios, alphas=ALPHAS) -> list[float | None]:
    """bpb(α) for each α: the bits of all chunks with r(C) ≤ α over their bytes; None where no chunk is left. Eq. 5."""
    figures = []
    for alpha in alphas:
        kept = (ratios <= alpha) & (losses.bytes > 0)
        figures.append(bits_per_byte(losses.nats[kept], losses.bytes[kept]) if kept.any() else None)
    return figures
