"""RETROfit: a trained baseline is given CCA and an encoder, which alone are trained. Paper §4.2."""

import numpy as np

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import bits
from retro_np.report.plots import COLOURS, figure_and_axes, finish

SHARES = (0.025, 0.05, 0.1, 0.25)  # of the baseline's training steps


def measure(lab):
    """bpb after several lengths of RETROfit, each a run with its own schedule; the baseline, and RETRO from scratch."""
    database = lab.database()
    ratios = lab.leakage(database)
    baseline, retro = lab.pair(database, 0)
    plain = lab.scored(database, baseline, k=0)
    runs = []
    for share in SHARES:
        model = lab.retrofitted(database, baseline, retro.config, share)
        off = lab.scored(database, model, k=0)
        runs.append({
            "share": share,
            "steps": lab.retrofit_steps(share),
            ON: bits(lab.scored(database, model), ratios),
            "off_equals_baseline": bool(np.array_equal(off.nats, plain.nats)),
        })  # fmt: skip
    return {
        "baseline_steps": lab.scale.steps,
        "baseline": bits(plain, ratios),
        "RETRO": bits(lab.scored(database, retro), ratios),
        "runs": runs,
    }


def draw(figures, path):
    """bpb over RETROfit's steps."""
    figure, axes = figure_and_axes()
    shares = [100 * run["share"] for run in figures["runs"]]
    axes.plot(shares, [run[ON]["bpb"] for run in figures["runs"]], "o-", color=COLOURS[ON], label="RETROfit[ON]")
    axes.axhline(figures["baseline"]["bpb"], color=COLOURS["baseline"], label="baseline = RETROfit[OFF]")
    axes.axhline(figures["RETRO"]["bpb"], color=COLOURS[ON], linestyle="--", label="RETRO[ON] from scratch")
    axes.set_xlabel("RETROfit's steps, % of the baseline's")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False)
    finish(figure, axes, path)


def verdict(figures):
    """Whether a tenth of the steps is enough to be below the baseline, the longest run comes close to a RETRO from
    scratch (by half of its gain, at least), and OFF is the baseline to the bit.
    """
    plain = figures["baseline"]["bpb"]
    same = all(run["off_equals_baseline"] for run in figures["runs"])
    below = [run["share"] for run in figures["runs"] if run[ON]["bpb"] < plain]
    last = figures["runs"][-1]
    first = f"from {100 * below[0]:.1f} % of its steps on" if below else "at none of these lengths"
    close = plain - last[ON]["bpb"] >= 0.5 * (plain - figures["RETRO"]["bpb"])
    return same and bool(below) and below[0] <= 0.1 and close, (
        f"RETROfit is below its baseline {first}; after {100 * last['share']:.0f} % it needs "
        f"{100 * (last[ON]['bpb'] / plain - 1):+.2f} % bits, a RETRO from scratch "
        f"{100 * (figures['RETRO']['bpb'] / plain - 1):+.2f} %. With retrieval off every loss equals the baseline's"
        + (" to the bit." if same else ", but not to the bit.")
    )


EXPERIMENT = Experiment(
    "RETROfit",
    "A baseline is given retrieval with 3 % of its training sequences and comes close to a RETRO from scratch; with "
    f"{OFF} the model is exactly the original (§4.2).",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
