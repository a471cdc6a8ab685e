"""RETROfit: a trained baseline gets CCA and an encoder, and only these are trained. Paper §4.2."""

from pathlib import Path

import numpy as np

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Experiment, Figures, Verdict
from retro_np.experiments.lab import Lab
from retro_np.report.plots import COLOURS, new_axes, save_plot

RETROFIT_SHARES = (0.025, 0.05, 0.1, 0.25)  # of the baseline's training steps


def measure(lab: Lab) -> Figures:
    """Bits per byte after RETROfits of several lengths, each with its own schedule; of the baseline; and of RETRO."""
    database = lab.database()
    baseline, retro = lab.pair(database, 0)
    plain = lab.scored(database, baseline, k=0)
    runs = []
    for share in RETROFIT_SHARES:
        model = lab.retrofitted(database, baseline, retro.config, share)
        same = np.array_equal(lab.scored(database, model, k=0).nats, plain.nats)
        runs.append({
            "share": share, "steps": lab.retrofit_steps(share), ON: lab.bits(database, model),
            "off_equals_baseline": same,
        })  # fmt: skip
    return {
        "baseline_steps": lab.scale.steps, "baseline": lab.bits(database, baseline, k=0),
        "RETRO": lab.bits(database, retro), "runs": runs,
    }  # fmt: skip


def draw(figures: Figures, path: Path) -> None:
    """Bits per byte over RETROfit's steps."""
    axes = new_axes(xlabel="RETROfit's steps, % of the baseline's", ylabel="bits per byte")
    shares = [100 * run["share"] for run in figures["runs"]]
    axes.plot(shares, [run[ON]["bpb"] for run in figures["runs"]], "o-", color=COLOURS[ON], label="RETROfit[ON]")
    axes.axhline(figures["baseline"]["bpb"], color=COLOURS["baseline"], label="baseline = RETROfit[OFF]")
    axes.axhline(figures["RETRO"]["bpb"], color=COLOURS[ON], linestyle="--", label="RETRO[ON] from scratch")
    save_plot(axes, path)


def verdict(figures: Figures) -> Verdict:
    """Whether a tenth of the steps suffices to beat the baseline, the longest run has at least half of the gain of a
    RETRO from scratch, and OFF equals the baseline bit for bit.
    """
    plain = figures["baseline"]["bpb"]
    same = all(run["off_equals_baseline"] for run in figures["runs"])
    below = [run["share"] for run in figures["runs"] if run[ON]["bpb"] < plain]
    last = figures["runs"][-1]
    first = f"after {100 * below[0]:.1f} % of the baseline's steps" if below else "at none of these lengths"
    close = plain - last[ON]["bpb"] >= 0.5 * (plain - figures["RETRO"]["bpb"])
    return same and bool(below) and below[0] <= 0.1 and close, (
        f"RETROfit beats its baseline {first}. After {100 * last['share']:.0f} % it changes the baseline's bits by "
        f"{100 * (last[ON]['bpb'] / plain - 1):+.2f} %, and a RETRO trained from scratch by "
        f"{100 * (figures['RETRO']['bpb'] / plain - 1):+.2f} %. With retrieval off, "
        + ("every loss equals the baseline's bit for bit." if same else "not every loss equals the baseline's.")
    )


EXPERIMENT = Experiment(
    "RETROfit",
    "A baseline is given retrieval with 3 % of its training sequences and comes close to a RETRO from scratch; with "
    f"{OFF} the model is exactly the original (§4.2).",
    measure, draw, verdict, over_seeds=False, position=6,
)  # fmt: skip
