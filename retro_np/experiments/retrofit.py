"""RETROfit

A trained baseline gets CCA and an encoder, and only these are trained.

A baseline learns to retrieve from 3 % as many sequences as it was trained on, and comes close to a RETRO from scratch.
RETRO[OFF] is exactly the original model (§4.2)."""

import numpy as np

from retro_np.evaluation.compare import ON
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import COLOURS, new_plot


def measure(lab: Lab) -> Figures:
    """Bits per byte of the baseline, of RETRO, and of RETROfits of several lengths, each with its own schedule."""
    database = lab.database()
    baseline, retro = lab.pair(database, 0)
    baseline_nats = lab.scored(database, baseline, k=0).nats
    runs = []
    for share in (0.025, 0.05, 0.1, 0.25):  # shares of the baseline's training steps
        steps = max(1, round(share * lab.scale.steps))
        model = lab.retrofitted(database, baseline, retro.config, steps)
        same = np.array_equal(lab.scored(database, model, k=0).nats, baseline_nats)
        run = {"share": share, "steps": steps, ON: lab.bits(database, model)}
        runs.append(run | {"off_equals_baseline": same})
    bits = {"baseline": lab.bits(database, baseline, k=0), "RETRO": lab.bits(database, retro)}
    return {"baseline_steps": lab.scale.steps, **bits, "runs": runs}


def draw(figures: Figures, path: Picture) -> None:
    """Bits per byte against RETROfit's steps."""
    with new_plot(path, "steps of RETROfit as a share of the baseline's steps (%)") as axes:
        shares = [100 * run["share"] for run in figures["runs"]]
        axes.plot(shares, [run[ON]["bpb"] for run in figures["runs"]], "o-", color=COLOURS[ON], label="RETROfit[ON]")
        axes.axhline(figures["baseline"]["bpb"], color=COLOURS["baseline"], label="baseline = RETROfit[OFF]")
        axes.axhline(figures["RETRO"]["bpb"], color=COLOURS[ON], linestyle="--", label="RETRO[ON] from scratch")


def verdict(figures: Figures) -> Verdict:
    """Whether a tenth of the steps suffices to beat the baseline, the longest run gains at least half as much as a
    RETRO from scratch, and RETROfit[OFF] equals the baseline bit for bit."""
    baseline, runs = figures["baseline"]["bpb"], figures["runs"]
    same = all(run["off_equals_baseline"] for run in runs)
    winning, longest = [run for run in runs if run[ON]["bpb"] < baseline], runs[-1]
    early = bool(winning) and winning[0]["share"] <= 0.1
    close = baseline - longest[ON]["bpb"] >= 0.5 * (baseline - figures["RETRO"]["bpb"])
    return same and early and close, sentence(__name__, figures, same=same, winning=winning, longest=longest)
