"""What retrieval saves on each source of text: here the standard library's packages."""

import numpy as np

from retro_np.evaluation.bits_per_byte import bits_per_byte
from retro_np.evaluation.compare import ON
from retro_np.experiments.experiment import Experiment
from retro_np.report.plots import plot_bars

MODULES, OTHERS = "single modules", "other packages"
MOST_SUBSETS = 10


def measure(lab):
    """bpb of baseline and RETRO[ON], mean over seeds, and mean r(C), of each package of the held-out documents."""
    database = lab.database()
    ratios = lab.leakage(database)
    scored = [lab.conditions(database, *lab.pair(database, seed)) for seed in range(lab.seeds)]
    losses = scored[0][ON]
    package = np.array([_package(database.documents[int(number)]["name"]) for number in losses.documents])
    names, where = np.unique(package, return_inverse=True)
    sizes = np.bincount(where, losses.bytes)
    largest = names[np.argsort(-sizes)][:MOST_SUBSETS]
    package[~np.isin(package, largest)] = OTHERS
    subsets = {}
    for name in dict.fromkeys([*largest.tolist(), OTHERS]):
        rows = package == name
        if not losses.bytes[rows].sum():
            continue
        line = {"documents": len(np.unique(losses.documents[rows])), "bytes": int(losses.bytes[rows].sum())}
        for condition in ("baseline", ON):
            line[condition] = float(
                np.mean([bits_per_byte(one[condition].nats[rows], losses.bytes[rows]) for one in scored])
            )
        subsets[name] = line | {"gain": 1 - line[ON] / line["baseline"], "mean_r": float(ratios[rows].mean())}
    return {"subsets": subsets}


def _package(name: str) -> str:
    head, _, tail = name.partition("/")
    return head if tail else MODULES


def draw(figures, path):
    """A bar a subset, the most saved first."""
    lines = dict(sorted(figures["subsets"].items(), key=lambda item: -item[1]["gain"]))
    plot_bars(
        {name: 100 * line["gain"] for name, line in lines.items()}, path,
        "% of the baseline's bits that RETRO[ON] saves; r: mean r(C)",
        notes={name: f"r = {line['mean_r']:.2f}" for name, line in lines.items()},
    )  # fmt: skip


def verdict(figures):
    """Whether all subsets gain, and whether those gain more whose chunks share more with what they retrieve."""
    lines = figures["subsets"]
    gains, shared = (np.array([line[key] for line in lines.values()]) for key in ("gain", "mean_r"))
    ranks = [np.argsort(np.argsort(values)) for values in (gains, shared)]
    correlation = float(np.corrcoef(ranks)[0, 1]) if len(lines) > 2 else float("nan")
    best, worst = max(lines, key=lambda n: lines[n]["gain"]), min(lines, key=lambda n: lines[n]["gain"])
    return bool(np.mean(gains > 0) > 0.5), (
        f"{int((gains > 0).sum())} of {len(lines)} subsets gain: most {best} ({100 * lines[best]['gain']:.2f} %), "
        f"least {worst} ({100 * lines[worst]['gain']:.2f} %); the gain's rank correlation with mean r(C) is "
        f"{correlation:.2f}."
    )


EXPERIMENT = Experiment(
    "What is saved, source by source",
    "On the Pile's subsets RETRO beats its baseline of 7.5B parameters on all but a few, most where documents have "
    "much in common, as on GitHub (§4.1).",
    measure,
    draw,
    verdict,
)
