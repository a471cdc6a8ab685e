"""True, shuffled and no neighbours

RETRO without retrieval performs like its baseline, and retrieval lowers bits per byte (§4.1). Shuffled neighbours are
our addition: they show whether the model reads its neighbours or only benefits from having an encoder."""

from retro_np.evaluation.compare import LINES, OFF, ON, SHUFFLED
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import plot_bars


def measure(lab: Lab) -> Figures:
    """Each condition's bits per byte by seed, and the copy bound of the first seed's baseline."""
    database = lab.database()
    figures = lab.over_seeds(database)
    gains = figures.pop("gains")
    return figures | {"gain": gains["bpb"], "mean_r": lab.leakage(database).mean()}


def draw(figures: Figures, path: Picture) -> None:
    """Bits per byte: a dot for every seed, a stroke for their mean. The axis does not start at 0."""
    lines = {name: line["bpb"] for name, line in figures["lines"].items()}
    lowest, highest = min(line["from"] for line in lines.values()), max(line["to"] for line in lines.values())
    margin = max(highest - lowest, 1e-3)
    limits = lowest - margin, highest + margin / 4
    plot_bars(lines, path, "bits per byte of held-out documents; dots: seeds", limits=limits)


def verdict(figures: Figures) -> Verdict:
    """Whether ON beats the baseline with every seed, OFF is within 1 % of it, and shuffled neighbours gain nothing."""
    line = {name: figures["lines"][name]["bpb"] for name in LINES}
    on_is_better = line[ON]["to"] < line["baseline"]["from"]
    shuffled_is_no_better = line[SHUFFLED]["mean"] >= line[OFF]["mean"]
    off_is_close = abs(line[OFF]["mean"] / line["baseline"]["mean"] - 1) <= 0.01
    return on_is_better and shuffled_is_no_better and off_is_close, sentence(__name__, figures)
