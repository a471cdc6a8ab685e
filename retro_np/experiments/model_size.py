"""Models of several widths, with and without retrieval: and how wide a baseline would have to be to equal a RETRO."""

import itertools

import numpy as np

from retro_np.evaluation.compare import LINES, OFF, ON
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import bits, savings
from retro_np.parameters import count_parameters
from retro_np.report.plots import COLOURS, figure_and_axes, finish

WORTH = 5  # of the paper's «about ten times»


def measure(lab):
    """bpb of each line at each width, and parameters without embeddings."""
    database = lab.database()
    ratios = lab.leakage(database)
    sizes = []
    for width in lab.scale.widths:
        models = lab.pair(database, 0, d_model=width)
        losses = lab.conditions(database, *models)
        baseline, retro = (count_parameters(model.config) for model in models)
        lines = {name: bits(losses[name], ratios) for name in LINES}
        sizes.append({"width": width, "parameters": {"baseline": baseline, "RETRO": retro}, "lines": lines})
    for size in sizes:
        size["equal_baseline"] = equal_baseline(sizes, size["lines"][ON]["bpb"])
    return {"sizes": sizes}


def equal_baseline(sizes: list[dict], bpb: float) -> float:
    """Parameters of the baseline that has this bpb, by bpb as a straight line over log parameters between neighbours.

    Beyond the sizes that were measured the nearest two go on.
    """
    points = sorted((size["lines"]["baseline"]["bpb"], np.log(size["parameters"]["baseline"])) for size in sizes)
    at = int(np.clip(np.searchsorted([point[0] for point in points], bpb), 1, len(points) - 1))
    (low, first), (high, second) = points[at - 1], points[at]
    return float(np.exp(first + (second - first) * (bpb - low) / (high - low)))


def draw(figures, path):
    """bpb over parameters, a line a condition."""
    figure, axes = figure_and_axes()
    for name in LINES:
        kind = "baseline" if name == "baseline" else "RETRO"
        axes.plot(
            [size["parameters"][kind] for size in figures["sizes"]],
            [size["lines"][name]["bpb"] for size in figures["sizes"]],
            marker="o", color=COLOURS[name], label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("parameters without embeddings")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False)
    finish(figure, axes, path)


def verdict(figures):
    """Whether at every size OFF is within 1 % of the baseline and ON like a baseline of WORTH times RETRO's size,
    and whether the gain stays or grows with size.
    """
    sizes = figures["sizes"]
    gains = [savings(size["lines"])["bpb"] for size in sizes]
    offs = [size["lines"][OFF]["bpb"] / size["lines"]["baseline"]["bpb"] - 1 for size in sizes]
    parts = [
        f"width {size['width']}: {-100 * gain:+.2f} % (OFF {100 * off:+.2f} %), like a baseline of "
        f"{size['equal_baseline']:,.0f} parameters, {size['equal_baseline'] / size['parameters']['baseline']:.2f} "
        f"times the baseline's and {size['equal_baseline'] / size['parameters']['RETRO']:.2f} times RETRO's"
        for size, gain, off in zip(sizes, gains, offs, strict=True)
    ]
    alike = all(abs(off) <= 0.01 for off in offs)
    lasting = gains[0] > 0 and all(later >= 0.9 * earlier for earlier, later in itertools.pairwise(gains))
    worth = all(size["equal_baseline"] >= WORTH * size["parameters"]["RETRO"] for size in sizes)
    return alike and lasting and worth, "Bits of RETRO[ON] against its baseline, " + "; ".join(parts) + "."


EXPERIMENT = Experiment(
    "Bits per byte over the model's size",
    "C4 bpb at 172M, 425M, 1.5B, 7.5B: baseline .98 .92 .84 .78, RETRO off the same, on .82 .77 .71 .66: a gain that "
    "does not shrink with size, worth about ten times the parameters (§4.1, figure 1).",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
