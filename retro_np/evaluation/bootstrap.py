"""The interval of a difference in bits per byte: a paired bootstrap over documents (Efron 1979; Koehn 2004).

Tokens of one document are not independent, so whole documents are drawn, with replacement, as often as there are
documents. Both conditions are summed over the same drawn documents: only the difference between them varies. Where
models were trained with several seeds, seeds are drawn as well, independently of the documents."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, check_arguments

INTERVAL = (0.025, 0.975)  # quantiles of the samples: a percentile interval of 95 %
# The interval lies between the least and the greatest difference of a document. By chance, all n documents differ to
# the same side of the true median with a probability of 2¹⁻ⁿ, which is below 5 % from six documents on.
MIN_DOCUMENTS = 6
DRAWS_PER_BLOCK = 1 << 20  # drawn documents in memory


@dataclass(frozen=True)
class Difference:
    """By how many percent one condition needs more bits per byte than another (fewer if negative), and an interval.

    documents: how many have scored bytes. interval_percent: of 95 %; None for fewer than six, which `note` explains."""

    difference_percent: float
    interval_percent: tuple[float, float] | None
    documents: int
    note: str = ""


def paired_bootstrap(
    of: Losses | Sequence[Losses], against: Losses | Sequence[Losses], *, samples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare the bits per byte of two conditions on the same chunks: 100 · (of / against − 1), and its interval.

    of, against: from `score`, or parts of both with the same chunks; or a list of them, one for each seed of a
    training. Of two lists, the same seeds are drawn. samples: bootstrap samples. seed: of the draws.
    Raises TypeError for other things than Losses. Raises UserError if the chunks differ, if losses are not finite, if
    samples < 1 or seed < 0, if there are no bytes, if `against` needs no bits, and for lists of different lengths."""
    check_arguments(samples=(samples, 1), seed=(seed, 0))
    lists = [[part] if isinstance(part, Losses) or not isinstance(part, Sequence) else part for part in (of, against)]
    for losses in itertools.chain(*lists):
        check_arguments(losses=(losses, Losses))
    seeds = max(1, *map(len, lists))
    if not {len(part) for part in lists} <= {1, seeds}:
        raise UserError(f"{len(lists[0])} and {len(lists[1])} seeds cannot be paired: give as many, or one")
    first = lists[0][0]
    for losses in itertools.chain(*lists):
        if not (np.array_equal(losses.documents, first.documents) and np.array_equal(losses.bytes, first.bytes)):
            raise UserError("the two conditions were scored on different texts: score both on the same chunks")
    has_bytes = first.per_document()[2] > 0
    nats = [np.stack([losses.per_document()[1][has_bytes] for losses in part]) for part in lists]
    pairs = np.stack([np.broadcast_to(part, (seeds, part.shape[1])) for part in nats], axis=1)  # (seeds, 2, documents)
    if not np.isfinite(pairs).all():
        raise UserError("losses are not finite, so they cannot be compared: score with undamaged weights")
    n = pairs.shape[2]
    if not n or pairs[:, 1].sum() <= 0:
        raise UserError("there is nothing to compare: the texts are empty, or the other condition needs no bits at all")
    difference = float(_percent(*pairs.sum(axis=(0, 2))))
    if n < MIN_DOCUMENTS:
        return Difference(difference, None, n, f"no interval: a bootstrap needs at least {MIN_DOCUMENTS} documents")
    rng, ratios = np.random.default_rng(seed), []
    for start in range(0, samples, block := max(1, DRAWS_PER_BLOCK // n)):
        size = min(block, samples - start)
        drawn = rng.integers(0, n, (size, n))
        sums = np.array([[nats[drawn].sum(axis=1) for nats in pair] for pair in pairs])  # (seeds, 2, size)
        if seeds > 1:
            of_seeds = rng.integers(0, seeds, (seeds, 1, size))
            sums = np.take_along_axis(sums, np.broadcast_to(of_seeds, sums.shape), axis=0)
        ratios.append(_percent(*sums.sum(axis=0)))
    low, high = np.quantile(np.concatenate(ratios), INTERVAL).tolist()
    return Difference(difference, (low, high), n)


def _percent(of, against):
    return 100 * (of / against - 1)
