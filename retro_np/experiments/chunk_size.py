"""Chunks of 16 or of 64 tokens

All of the paper's models have chunks of 64 tokens. This experiment shows the effect of our shorter chunks."""

import numpy as np

from retro_np.evaluation.compare import OFF
from retro_np.evaluation.leakage import NO_LEAKAGE
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Figures, Picture, Verdict, sentence
from retro_np.experiments.lab import Lab, mean_and_spread
from retro_np.report.plots import plot_bars


def measure(lab: Lab) -> Figures:
    """For each chunk size: the bits of each condition by seed, the gains over the baseline, and the copy bound."""
    sizes = []
    for size in (recipe.BUILD.chunk_size, 64):
        database = lab.database(chunk_size=size)
        figures = lab.over_seeds(database)
        off, baseline = (np.array(figures["lines"][name]["bpb"]["seeds"]) for name in (OFF, "baseline"))
        remaining = (lab.leakage(database) <= NO_LEAKAGE).mean()
        figures |= {"off": mean_and_spread(off / baseline - 1), "chunks_without_leakage": remaining}
        sizes.append({"chunk_size": size} | figures)
    return {"sizes": sizes}


def draw(figures: Figures, path: Picture) -> None:
    """Two bars per size: the bits saved on all chunks, and on chunks without leakage."""
    bars = {}
    for size in figures["sizes"]:
        bars[f"m = {size['chunk_size']}, all chunks"] = size["gains"]["bpb"]
        bars[f"m = {size['chunk_size']}, r(C) ≤ 12.5 %"] = size["gains"]["bpb_no_leakage"]
    plot_bars(bars, path, "share of its baseline's bits that RETRO[ON] saves (%); dots: seeds", scale=100)


def verdict(figures: Figures) -> Verdict:
    """What retrieval saves with each size. The paper has only one size."""
    return None, sentence(__name__, figures)
