"""Bits per byte by allowed leakage

With filtered evaluation on C4 and Wikitext103, the bits per byte of both models fall as α rises. RETRO's fall faster,
and they are lower at every α (§4.4, eq. 5)."""

import numpy as np

from retro_np.evaluation.compare import OFF, ON
from retro_np.evaluation.leakage import ALPHAS, NO_LEAKAGE, filtered_bits_per_byte
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import plot_leakage


def measure(lab: Lab) -> Figures:
    """Each condition's mean curve over seeds, and the share of chunks that remain at each α."""
    database = lab.database()
    ratios = lab.leakage(database)
    by_seed = [lab.conditions(database, *lab.pair(database, seed)) for seed in range(lab.seeds)]
    curves = {}
    for name in ("baseline", OFF, ON):
        rows = [filtered_bits_per_byte(losses[name], ratios) for losses in by_seed]
        curves[name] = [None if None in column else np.mean(column) for column in zip(*rows, strict=True)]
    shares = [np.mean(ratios <= alpha) for alpha in ALPHAS]
    return {"alphas": ALPHAS, "share_of_chunks": shares, "chunk_size": database.chunk_size, "curves": curves}


def draw(figures: Figures, path: Picture) -> None:
    """The curves."""
    plot_leakage(figures["alphas"], figures["curves"], path)


def verdict(figures: Figures) -> Verdict:
    """Whether RETRO[ON]'s curve falls by more than its baseline's as α rises, and is below it at every α."""
    curves, alphas, strict = figures["curves"], figures["alphas"], figures["alphas"].index(NO_LEAKAGE)
    if curves[ON][strict] is None:
        return None, "Every evaluated chunk shares more than 12.5 % of its tokens with what it retrieves."
    fall = {name: curve[strict] - curve[-1] for name, curve in curves.items()}
    rows = zip(alphas, curves[ON], curves["baseline"], strict=True)
    failing = [alpha for alpha, on, baseline in rows if on is not None and on >= baseline]
    agrees = fall[ON] > fall["baseline"] and not failing
    return agrees, sentence(__name__, figures, strict=strict, failing=failing)
