"""A larger database, the same model

With 4B, 36B, 180B, 900B and 1.7T tokens in the database, a model of 7.5B parameters needs .78, .77, .75, .71 and .66
bits per byte of C4, a corpus of web text (§4.1, table 14)."""

import itertools

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Figures, Picture, Verdict, sentence
from retro_np.experiments.lab import Lab, spreads
from retro_np.report.plots import COLOURS, new_plot
from retro_np.retrieval.join import retrieve_from

TRAINING_SHARE = 0.2
DATABASE_SHARES = (0.2, 0.5, 1.0)


def measure(lab: Lab) -> Figures:
    """Bits per byte of the same models with each share of the database, for each seed."""
    database = lab.database()
    training_set = database.fraction(TRAINING_SHARE)
    baseline, _ = lab.pair(training_set, 0)
    retrievals = {str(share): retrieve_from(database, database.fraction(share)) for share in DATABASE_SHARES}
    ratios = lab.leakage(database, retrievals["1.0"])
    _, config = lab.configs(database)
    models = [lab.trained(training_set, config, lab.training(config, seed)) for seed in range(lab.seeds)]
    lines = {"baseline": [lab.bits(database, baseline, ratios, k=0)]}
    lines[OFF] = [lab.bits(database, model, ratios, k=0) for model in models]
    for share, retrieval in retrievals.items():
        lines[share] = [lab.bits(database, model, ratios, retrieval=retrieval) for model in models]
    spread = {name: spreads(rows) for name, rows in lines.items()}
    return {"trained_on": TRAINING_SHARE, "shares": DATABASE_SHARES, "lines": spread}


def draw(figures: Figures, path: Picture) -> None:
    """Bits per byte against the share of the database, with a dot for every seed."""
    with new_plot(path, "share of the database (the models were trained with a fifth)") as axes:
        lines = [figures["lines"][str(share)]["bpb"] for share in figures["shares"]]
        axes.plot(figures["shares"], [line["mean"] for line in lines], color=COLOURS[ON], label=ON)
        axes.plot(figures["shares"], [line["seeds"] for line in lines], "o", color=COLOURS[ON])
        for name in ("baseline", OFF):
            axes.axhline(figures["lines"][name]["bpb"]["mean"], color=COLOURS[name], linestyle="--", label=name)
        axes.set_xticks(figures["shares"])


def verdict(figures: Figures) -> Verdict:
    """Whether each larger share of the database lowers bits per byte, for every seed."""
    rows = [figures["lines"][str(share)]["bpb"]["seeds"] for share in figures["shares"]]
    by_seed = zip(*rows, strict=True)
    falls = all(smaller > larger for values in by_seed for smaller, larger in itertools.pairwise(values))
    return falls, sentence(__name__, figures, trained_on=TRAINING_SHARE)
