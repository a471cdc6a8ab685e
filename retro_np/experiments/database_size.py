"""A database larger than the training set: trained on a fifth, evaluated with a fifth, a half and all of it."""

import itertools

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import bits, spreads
from retro_np.report.plots import COLOURS, figure_and_axes, finish
from retro_np.retrieval.join import retrieve_from

TRAINED_ON = 0.2
SHARES = (0.2, 0.5, 1.0)


def measure(lab):
    """bpb with each share of the database, over seeds: the same checkpoints, which saw the least share in training."""
    database = lab.database()
    training_set = database.fraction(TRAINED_ON)
    baseline, _ = lab.pair(training_set, 0)
    retrievals = [retrieve_from(database, database.fraction(share)) for share in SHARES]
    ratios = lab.leakage(database, retrievals[-1], "all")
    lines = {"baseline": [], OFF: [], **{str(share): [] for share in SHARES}}
    _, config = lab.configs(database)
    for seed in range(lab.seeds):
        retro = lab.trained(training_set, config, lab.training(config, seed))
        lines[OFF].append(bits(lab.scored(database, retro, k=0), ratios))
        for share, retrieval in zip(SHARES, retrievals, strict=True):
            losses = lab.scored(database, retro, retrieval=retrieval, label=f"fraction {share}")
            lines[str(share)].append(bits(losses, ratios))
    lines["baseline"].append(bits(lab.scored(database, baseline, k=0), ratios))
    tokens = database.manifest["splits"]["train"]["tokens"]
    return {
        "trained_on": TRAINED_ON,
        "shares": SHARES,
        "tokens_of_database": [round(share * tokens) for share in SHARES],  # about: shares are of documents
        "lines": {name: spreads(rows) for name, rows in lines.items()},
    }


def draw(figures, path):
    """bpb over the share of the database, seeds as dots."""
    figure, axes = figure_and_axes()
    lines = [figures["lines"][str(share)]["bpb"] for share in figures["shares"]]
    axes.plot(figures["shares"], [line["mean"] for line in lines], color=COLOURS[ON], label=ON)
    for share, line in zip(figures["shares"], lines, strict=True):
        axes.plot([share] * len(line["seeds"]), line["seeds"], "o", color=COLOURS[ON])
    for name in ("baseline", OFF):
        axes.axhline(figures["lines"][name]["bpb"]["mean"], color=COLOURS[name], linestyle="--", label=name)
    axes.set_xticks(figures["shares"])
    axes.set_xlabel("share of the database; trained on a fifth")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False)
    finish(figure, axes, path)


def verdict(figures):
    """Whether each larger database lowers bpb, for every seed."""
    rows = [figures["lines"][str(share)]["bpb"] for share in figures["shares"]]
    by_seed = list(zip(*(row["seeds"] for row in rows), strict=True))
    falls = all(smaller > larger for values in by_seed for smaller, larger in itertools.pairwise(values))
    shown = ", ".join(
        f"{row['mean']:.4f} with {100 * share:.0f} %" for share, row in zip(figures["shares"], rows, strict=True)
    )
    off = figures["lines"][OFF]["bpb"]["mean"]
    return falls, (
        f"Mean bits per byte {shown} of the database, {off:.4f} with none: from a fifth to all of it "
        f"{100 * (1 - rows[-1]['mean'] / rows[0]['mean']):.2f} % fewer."
    )


EXPERIMENT = Experiment(
    "A larger database, the same model",
    "7.5B parameters, C4 bpb with 4B, 36B, 180B, 900B, 1.7T tokens in the database: .78 .77 .75 .71 .66 (§4.1).",
    measure,
    draw,
    verdict,
)
