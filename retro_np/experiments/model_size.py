"""Bits per byte by model size

With 172M, 425M, 1.5B and 7.5B parameters, RETRO[ON] needs .82, .77, .71 and .66 bits per byte of C4. RETRO[OFF] and the
baselines of 132M to 7B parameters need .98, .92, .84 and .78. The gain does not shrink with size and is worth about ten
times the parameters (§4.1, figure 1, table 14)."""

import itertools

import numpy as np

from retro_np.evaluation.compare import LINES, OFF, ON
from retro_np.experiments.experiment import Figures, Picture, Verdict, sentence
from retro_np.experiments.lab import Lab, savings
from retro_np.parameters import count_parameters
from retro_np.report.plots import COLOURS, new_plot


def measure(lab: Lab) -> Figures:
    """Bits per byte of each condition at each width, and the numbers of parameters without embeddings."""
    database = lab.database()
    sizes: list[Figures] = []
    for width in lab.scale.widths:
        pair = lab.pair(database, 0, d_model=width)
        counts = {kind: count_parameters(model.config) for kind, model in zip(("baseline", "RETRO"), pair, strict=True)}
        sizes.append({"width": width, "parameters": counts, "lines": lab.table(database, *pair)})
    for size in sizes:
        size["equal_baseline"] = equal_baseline(sizes, size["lines"][ON]["bpb"])
    return {"sizes": sizes}


def equal_baseline(sizes: list[Figures], bpb: float) -> float:
    """The parameter count of a baseline with this bpb, interpolated or extrapolated linearly in its logarithm."""
    points = sorted((size["lines"]["baseline"]["bpb"], np.log(size["parameters"]["baseline"])) for size in sizes)
    i = int(np.clip(np.searchsorted([point[0] for point in points], bpb), 1, len(points) - 1))
    (low, first), (high, second) = points[i - 1 : i + 1]
    return float(np.exp(first + (second - first) * (bpb - low) / (high - low)))


def draw(figures: Figures, path: Picture) -> None:
    """Bits per byte against parameters, one line per condition."""
    with new_plot(path, "parameters without embeddings", xscale="log") as axes:
        for name in LINES:
            kind = "baseline" if name == "baseline" else "RETRO"
            points = [(size["parameters"][kind], size["lines"][name]["bpb"]) for size in figures["sizes"]]
            axes.plot(*np.transpose(points), marker="o", color=COLOURS[name], label=name)


def verdict(figures: Figures) -> Verdict:
    """Whether RETRO[OFF] is always within 1 % of the baseline, RETRO[ON] as good as a baseline of five times its size
    (half of the paper's "about ten times"), and the gain does not shrink with size."""
    sizes = figures["sizes"]
    gains = [savings(size["lines"])["bpb"] for size in sizes]
    offs = [size["lines"][OFF]["bpb"] / size["lines"]["baseline"]["bpb"] - 1 for size in sizes]
    off_is_close = all(abs(off) <= 0.01 for off in offs)
    gain_lasts = gains[0] > 0 and all(later >= 0.9 * earlier for earlier, later in itertools.pairwise(gains))
    worth_parameters = all(size["equal_baseline"] >= 5 * size["parameters"]["RETRO"] for size in sizes)
    return off_is_close and gain_lasts and worth_parameters, sentence(__name__, figures)
