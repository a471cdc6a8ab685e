"""The control: true neighbours, those of other chunks, none. Does the model read what it retrieves?"""

import numpy as np

from retro_np.evaluation.compare import LINES, OFF, ON, SHUFFLED
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import mean_and_spread, savings, spreads
from retro_np.report.plots import plot_bars


def measure(lab):
    """Each line's bpb by seed, and the copy bound of the first seed's baseline."""
    database = lab.database()
    ratios = lab.leakage(database)
    by_seed, bound = lab.over_seeds(database, ratios)
    lines = {name: spreads([one[name] for one in by_seed]) for name in LINES}
    gain = mean_and_spread(savings(one)["bpb"] for one in by_seed)
    return {"lines": lines, "gain": gain, "copy_bound": bound, "mean_r": float(np.mean(ratios))}


def draw(figures, path):
    """A bar a line, with every seed as a dot; the axis does not begin at 0."""
    lines = {name: figures["lines"][name]["bpb"] for name in LINES}
    seeds = {name: line["seeds"] for name, line in lines.items()}
    values = [value for each in seeds.values() for value in each]
    room = max(max(values) - min(values), 1e-3)
    plot_bars(
        {name: line["mean"] for name, line in lines.items()}, path, "bits per byte of held-out documents; dots: seeds",
        dots=seeds, limits=(min(values) - room, max(values) + room / 4),
    )  # fmt: skip


def verdict(figures):
    """ON below the baseline beyond the spread of seeds, shuffled no better than OFF, OFF within 1 % of the baseline."""
    line = {name: figures["lines"][name]["bpb"] for name in LINES}
    apart = line[ON]["to"] < line["baseline"]["from"]
    control = line[SHUFFLED]["mean"] >= line[OFF]["mean"]
    alike = abs(line[OFF]["mean"] / line["baseline"]["mean"] - 1) <= 0.01
    gain, bound = figures["gain"], figures["copy_bound"]["gain"]
    strict = {name: figures["lines"][name]["bpb_no_leakage"]["mean"] for name in LINES}
    return apart and control and alike, (
        f"RETRO[ON] needs {_share(gain['mean'])} than the baseline ({_share(gain['from'])} to {_share(gain['to'])} "
        f"over seeds); copying the neighbours' next tokens into the baseline's predictions gives {_share(bound)}. OFF "
        f"is {100 * (line[OFF]['mean'] / line['baseline']['mean'] - 1):+.2f} % from the baseline, and with the "
        f"neighbours of others it is {100 * (line[SHUFFLED]['mean'] / line[OFF]['mean'] - 1):+.2f} % from OFF. At "
        f"α = 12.5 % the baseline needs {strict['baseline']:.4f} bits per byte, ON {strict[ON]:.4f}."
    )


def _share(gain):
    return f"{abs(100 * gain):.2f} % {'fewer' if gain > 0 else 'more'} bits"


EXPERIMENT = Experiment(
    "True, shuffled and no neighbours",
    "RETRO without retrieval performs like its baseline, and retrieval lowers bits per byte by a constant share at "
    "every size (§4.1). The paper has no shuffled neighbours; they tell reading from merely having an encoder.",
    measure,
    draw,
    verdict,
)
