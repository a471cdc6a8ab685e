"""Our chunks of 16 tokens against the paper's of 64: what is gained, and how much of it without leakage."""

from retro_np.evaluation.compare import LINES, OFF
from retro_np.evaluation.leakage import NO_LEAKAGE
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import Lab, mean_and_spread, savings, spreads
from retro_np.report.plots import plot_bars

SIZES = (recipe.BUILD.chunk_size, 64)


def measure(lab: Lab):
    """For each size of chunk: the usual lines by seed, the gains over the baseline, and the copy bound."""
    sizes = []
    for size in SIZES:
        database = lab.database(chunk_size=size)
        ratios = lab.leakage(database)
        by_seed, bound = lab.over_seeds(database, ratios)
        sizes.append(
            {
                "chunk_size": size,
                "lines": {name: spreads([one[name] for one in by_seed]) for name in LINES},
                "gains": spreads([savings(one) for one in by_seed]),
                "off": mean_and_spread(one[OFF]["bpb"] / one["baseline"]["bpb"] - 1 for one in by_seed),
                "copy_bound": bound,
                "chunks_without_leakage": float((ratios <= NO_LEAKAGE).mean()),
            }
        )
    return {"sizes": sizes}


def draw(figures, path):
    """Two bars a size: bits saved by all chunks, and by those that do not leak."""
    bars, dots = {}, {}
    for size in figures["sizes"]:
        for figure, of in (("bpb", "all chunks"), ("bpb_no_leakage", "r(C) ≤ 12.5 %")):
            name = f"m = {size['chunk_size']}, {of}"
            bars[name] = 100 * size["gains"][figure]["mean"]
            dots[name] = [100 * gain for gain in size["gains"][figure]["seeds"]]
    plot_bars(bars, path, "% of its baseline's bits that RETRO[ON] saves; dots: seeds", dots=dots)


def verdict(figures):
    """What each size gains. The paper has but one."""
    said = []
    for size in figures["sizes"]:
        change = {figure: f"{-100 * share['mean']:+.2f} %" for figure, share in size["gains"].items()}
        said.append(
            f"with chunks of {size['chunk_size']} RETRO[ON] needs {change['bpb']} bits against its baseline (copy "
            f"bound {-100 * size['copy_bound']['gain']:+.2f} %), {change['bpb_no_leakage']} at α = 12.5 %, which holds "
            f"{100 * size['chunks_without_leakage']:.0f} % of chunks, and OFF {100 * size['off']['mean']:+.2f} %"
        )
    sentence = "; ".join(said) + "."
    return None, sentence[0].upper() + sentence[1:]


EXPERIMENT = Experiment(
    "Chunks of 16 tokens or of 64",
    "All of the paper's models have chunks of 64 tokens. The recipe's are shorter; what that does is shown here.",
    measure,
    draw,
    verdict,
)
