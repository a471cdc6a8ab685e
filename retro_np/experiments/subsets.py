"""Savings by source

The sources are the packages of the standard library.

With 7.5B parameters, RETRO beats its baseline on all subsets of the Pile (table 15) or all but two (the text of §4.1).
The lead is largest on GitHub."""

import numpy as np

from retro_np.evaluation.compare import ON
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import plot_bars

OTHERS = "other packages"


def measure(lab: Lab) -> Figures:
    """Mean bits per byte over seeds of baseline and RETRO[ON], and mean r(C), for each package with held-out text."""
    database = lab.database()
    ratios = lab.leakage(database)
    scored = [lab.conditions(database, *lab.pair(database, seed)) for seed in range(lab.seeds)]
    losses = scored[0][ON]
    modules = [database.documents[int(number)]["name"] for number in losses.documents]
    package = np.array([name.partition("/")[0] if "/" in name else "single modules" for name in modules])
    names, index = np.unique(package, return_inverse=True)
    largest = names[np.argsort(-np.bincount(index, losses.bytes))][:10]
    package[~np.isin(package, largest)] = OTHERS
    subsets = {}
    for subset in dict.fromkeys([*largest.tolist(), OTHERS]):
        rows = package == subset
        if n_bytes := int(losses.bytes[rows].sum()):
            bpb = [[lines[name][rows].bits_per_byte() for name in ("baseline", ON)] for lines in scored]
            baseline, on = np.mean(bpb, axis=0)
            line = {"documents": len(np.unique(losses.documents[rows])), "bytes": n_bytes, "baseline": baseline, ON: on}
            subsets[subset] = line | {"gain": 1 - on / baseline, "mean_r": ratios[rows].mean()}
    return {"subsets": subsets}


def draw(figures: Figures, path: Picture) -> None:
    """Bars of the share of bits saved, the largest first."""
    lines = sorted(figures["subsets"].items(), key=lambda item: -item[1]["gain"])
    gains = {name: line["gain"] for name, line in lines}
    notes = {name: f"r = {line['mean_r']:.2f}" for name, line in lines}
    label = "share of the baseline's bits that RETRO[ON] saves (%); r: mean r(C)"
    plot_bars(gains, path, label, scale=100, notes=notes)


def verdict(figures: Figures) -> Verdict:
    """Whether most subsets gain. The sentence also says whether gains are larger where more text is shared."""
    lines = figures["subsets"]
    gains, ratios = (np.array([line[key] for line in lines.values()]) for key in ("gain", "mean_r"))
    ranks = [np.argsort(np.argsort(values)) for values in (gains, ratios)]
    correlation = float(np.asarray(np.corrcoef(ranks))[0, 1]) if len(lines) > 2 else float("nan")
    ordered = sorted(lines, key=lambda name: lines[name]["gain"])
    values = {"gaining": int((gains > 0).sum()), "best": ordered[-1], "worst": ordered[0], "correlation": correlation}
    return bool(np.mean(gains > 0) > 0.5), sentence(__name__, figures, **values)
