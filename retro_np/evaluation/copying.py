"""The copy bound: what a baseline would gain by copying from its neighbours. A yardstick for a corpus, before training.

At each position the run of tokens that ends there is looked for in the neighbours that CCA would read; the token behind
the longest match, of length s, is given a weight λ and the baseline's own prediction the rest. `gain`: one λ for every
s ≥ 1; `gain_by_length`: one for each s. Both are tuned on every second document and scored on the others, and the other
way round.
"""

import numpy as np

from retro_np.config import RetroConfig
from retro_np.evaluation.bits_per_byte import bits_per_byte, nats_of
from retro_np.kernels.substring import extend_runs
from retro_np.nn.model import retro
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import evaluation_windows, scored_windows, sequence_chunks, sequence_neighbours

LONGEST = 8  # matches of so many tokens and more count as one length
WEIGHTS = np.linspace(0, 0.98, 50)


def copy_bound(
    params,
    config: RetroConfig,
    database: Database,
    *,
    k: int = 2,
    sequence_length: int = 256,
    limit: int | None = None,
    retrieval: Retrieval | None = None,
) -> dict:
    """The share of its bits that a baseline (or RETRO[OFF]) saves by copying from the k neighbours of held-out chunks.

    The rest as in `score`. Returns bpb, gain, gain_by_length (shares), and per match length its share of positions
    and how often the token behind the match is the right one.
    """
    retrieval = retrieval or Retrieval.own(database, "valid")
    length = sequence_chunks(sequence_length, config.chunk_size)
    stride = max(1, length // 2)
    rows, first = evaluation_windows(retrieval.split, length, stride, limit)
    byte_lengths = token_byte_lengths(database.tokenizer)
    found = []
    with progress_bar("copy bound", len(rows)) as advance:
        for window, tokens, targets in scored_windows(retrieval.split, rows, first):
            neighbours = sequence_neighbours(retrieval.database, retrieval.split, window, k)
            match, copied = longest_matches(tokens, neighbours)
            nats = nats_of(retro(params, config, tokens, None)[0], targets)
            b, t = np.nonzero(targets)
            documents = retrieval.split.documents[window[:, 0]][b]
            hit = copied[b, t] == targets[b, t]
            found.append([nats[b, t], byte_lengths[targets[b, t]], documents, match[b, t], hit])
            advance(len(window))
    nats, n_bytes, documents, match, hit = (np.concatenate(part) for part in zip(*found, strict=True))
    half = np.unique(documents, return_inverse=True)[1] % 2
    plain = bits_per_byte(nats, n_bytes)
    gains = [
        1 - bits_per_byte(_tuned(nats, hit, kind, half), n_bytes) / plain for kind in (np.minimum(match, 1), match)
    ]
    share = np.bincount(match, minlength=LONGEST + 1) / len(match)
    right = np.bincount(match, hit, LONGEST + 1) / np.maximum(np.bincount(match, minlength=LONGEST + 1), 1)
    return {
        "bpb": plain, "gain": gains[0], "gain_by_length": gains[1], "positions": share.tolist(),
        "right": right.tolist(),
    }  # fmt: skip


def longest_matches(tokens, neighbours) -> tuple[np.ndarray, np.ndarray]:
    """The longest match of what ends at each position, and the token behind it, in what CCA reads there.

    tokens: (B, n); neighbours: (B, l, k, 2m). Returns lengths (B, n), at most LONGEST, and tokens (B, n), 0 where none.
    """
    batch, n_chunks, k, r = neighbours.shape
    m = r // 2
    lengths, copied = np.zeros(tokens.shape, np.int64), np.zeros(tokens.shape, np.int64)
    behind = np.zeros_like(neighbours)
    behind[..., :-1] = neighbours[..., 1:]
    runs = np.zeros(neighbours.shape, np.int32)
    for i in range(-LONGEST, m):  # the places before are only there for their runs
        place = (np.arange(n_chunks) + 1) * m - 1 + i
        inside = (place >= 0) & (place < tokens.shape[1])
        token = np.where(inside, tokens[:, np.clip(place, 0, tokens.shape[1] - 1)], 0)
        runs = extend_runs(runs, token[..., None, None], neighbours)
        if i < 0:
            continue
        useful = np.where(behind != 0, runs, 0).reshape(batch, n_chunks, k * r)
        best = useful.argmax(axis=-1)[..., None]
        longest = np.take_along_axis(useful, best, -1)[..., 0]
        token = np.take_along_axis(behind.reshape(batch, n_chunks, k * r), best, -1)[..., 0]
        at = place[inside]
        lengths[:, at] = np.minimum(longest, LONGEST)[:, inside]
        copied[:, at] = np.where(longest > 0, token, 0)[:, inside]
    return lengths, copied


def _tuned(nats, hit, kind, half) -> np.ndarray:
    """Nats with the best weight of each kind but 0, tuned on the other half of the documents."""
    out = nats.astype(np.float64)
    likelihood = np.exp(-out)
    for some in range(1, int(kind.max(initial=0)) + 1):
        for part in (0, 1):
            tune, score = (kind == some) & (half != part), (kind == some) & (half == part)
            costs = [-np.log((1 - w) * likelihood[tune] + w * hit[tune]).sum() for w in WEIGHTS]
            weight = WEIGHTS[int(np.argmin(costs))]
            out[score] = -np.log((1 - weight) * likelihood[score] + weight * hit[score])
    return out
