"""RETROfit

A trained baseline gets CCA and an encoder, and only these are trained.

A baseline learns to retrieve from 3 % as many sequences as it was trained on, and comes close to a RETRO from scratch.
RETRO[OFF] is exactly the original model (§4.2)."""

import numpy as np

from retro_np.evaluation.compare import ON, more_or_fewer
from retro_np.experiments.experiment import Experiment, Figures, Lab, Picture, Verdict, described
from retro_np.report.plots import COLOURS, new_axes, save_plot


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
    axes = new_axes(xlabel="steps of RETROfit as a share of the baseline's steps (%)", ylabel="bits per byte")
    shares = [100 * run["share"] for run in figures["runs"]]
    axes.plot(shares, [run[ON]["bpb"] for run in figures["runs"]], "o-", color=COLOURS[ON], label="RETROfit[ON]")
    axes.axhline(figures["baseline"]["bpb"], color=COLOURS["baseline"], label="baseline = RETROfit[OFF]")
    axes.axhline(figures["RETRO"]["bpb"], color=COLOURS[ON], linestyle="--", label="RETRO[ON] from scratch")
    save_plot(axes, path)


def verdict(figures: Figures) -> Verdict:
    """Whether a tenth of the steps suffices to beat the baseline, the longest run gains at least half as much as a
    RETRO from scratch, and RETROfit[OFF] equals the baseline bit for bit."""
    baseline = figures["baseline"]["bpb"]
    same = all(run["off_equals_baseline"] for run in figures["runs"])
    shares = [run["share"] for run in figures["runs"] if run[ON]["bpb"] < baseline]
    longest = figures["runs"][-1]
    earliest = f"after {100 * shares[0]:.1f} % of the baseline's steps" if shares else "at none of these lengths"
    close = baseline - longest[ON]["bpb"] >= 0.5 * (baseline - figures["RETRO"]["bpb"])
    return same and bool(shares) and shares[0] <= 0.1 and close, (
        f"RETROfit beats its baseline {earliest}. After {100 * longest['share']:.0f} % it needs "
        f"{more_or_fewer(1 - longest[ON]['bpb'] / baseline)} than the baseline, and a RETRO trained from scratch "
        f"{more_or_fewer(1 - figures['RETRO']['bpb'] / baseline)}. With retrieval off, "
        + ("every loss equals the baseline's bit for bit." if same else "not every loss equals the baseline's.")
    )


EXPERIMENT = Experiment(*described(__doc__), measure, draw, verdict, over_seeds=False, position=6)
