"""bpb(α): how much of what retrieval saves is copying from near-duplicates. Paper §2.6, eq. 5."""

import numpy as np

from retro_np.evaluation.compare import OFF, ON
from retro_np.evaluation.leakage import ALPHAS, NO_LEAKAGE, filtered_bits_per_byte
from retro_np.experiments.experiment import Experiment
from retro_np.report.plots import plot_leakage

LINES = ("baseline", OFF, ON)


def measure(lab):
    """The mean curve over seeds of each line, and the share of chunks that each α leaves."""
    database = lab.database()
    ratios = lab.leakage(database)
    curves = {name: [] for name in LINES}
    for seed in range(lab.seeds):
        losses = lab.conditions(database, *lab.pair(database, seed))
        for name in LINES:
            curves[name].append(filtered_bits_per_byte(losses[name], ratios))
    return {
        "alphas": ALPHAS,
        "share_of_chunks": [float(np.mean(ratios <= alpha)) for alpha in ALPHAS],
        "chunk_size": database.chunk_size,
        "curves": {
            name: [None if None in column else float(np.mean(column)) for column in zip(*rows, strict=True)]
            for name, rows in curves.items()
        },
    }


def draw(figures, path):
    """bpb(α) over α."""
    plot_leakage(figures["alphas"], figures["curves"], path)


def verdict(figures):
    """Whether ON's curve falls more than the baseline's as leakage is let in, and lies below it at every α."""
    at = figures["alphas"].index(NO_LEAKAGE)
    if figures["curves"][ON][at] is None:
        return None, "Every chunk that was evaluated has more than 12.5 % in common with what it retrieves."
    fall = {name: curve[at] - curve[-1] for name, curve in figures["curves"].items()}
    gain = {a: 1 - figures["curves"][ON][a] / figures["curves"]["baseline"][a] for a in (at, len(ALPHAS) - 1)}
    left, longest = 100 * figures["share_of_chunks"][at], int(NO_LEAKAGE * figures["chunk_size"])
    pairs = zip(figures["curves"][ON], figures["curves"]["baseline"], strict=True)
    above = [a for a, (on, plain) in zip(figures["alphas"], pairs, strict=True) if on is not None and on >= plain]
    where = "at every α" if not above else f"but for α up to {100 * max(above):.1f} %"
    return fall[ON] > fall["baseline"] and not above, (
        f"From α = 12.5 % to 100 % bits per byte change by {-fall[ON]:+.4f} with retrieval and by "
        f"{-fall['baseline']:+.4f} for the baseline, below which RETRO[ON] lies {where}. It saves "
        f"{100 * gain[len(ALPHAS) - 1]:.2f} % of all bits "
        f"and {100 * gain[at]:.2f} % at α = 12.5 %, where {left:.0f} % of the chunks are left, those with at most "
        f"{longest} tokens in a row in common with a neighbour."
    )


EXPERIMENT = Experiment(
    "Bits per byte over the leakage that is let in",
    "Filtered evaluation: RETRO's bpb falls faster with α than its baseline's, which falls too, and stays below it at "
    "every α (§4.4, eq. 5).",
    measure,
    draw,
    verdict,
)
