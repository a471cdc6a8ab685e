"""Number of neighbours at evaluation

A model of 172M parameters, trained with 2 neighbours, needs .84, .83, .82, .82, .83 and .85 bits per byte of C4 with
k = 1, 2, 3, 10, 40 and 100 neighbours. The best k is between 2 and 40 (§4.1, table 14)."""

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import new_plot
from retro_np.retrieval.join import retrieve_from

NEIGHBOUR_COUNTS = (1, 2, 3, 5, 10, 20, 40, 100)


def measure(lab: Lab) -> Figures:
    """Bits per byte of a RETRO of each width, for each k."""
    database, scale = lab.database(), lab.scale
    limit = scale.few_tokens // database.chunk_size
    retrieval = retrieve_from(database, database, max(NEIGHBOUR_COUNTS))
    models = {}
    for width in scale.widths:
        _, retro = lab.pair(database, 0, d_model=width)
        on = [lab.bits(database, retro, k=k, limit=limit, retrieval=retrieval) for k in NEIGHBOUR_COUNTS]
        models[str(width)] = {OFF: lab.bits(database, retro, k=0, limit=limit), ON: on}
    return {"counts": NEIGHBOUR_COUNTS, "chunks": limit, "models": models}


def draw(figures: Figures, path: Picture) -> None:
    """Change in bits per byte relative to k = 0, against k, one line per width."""
    label, counts = "change in bits relative to retrieval off (%)", figures["counts"]
    with new_plot(path, "neighbours k at evaluation", label, xscale="log", xticks=counts, xticklabels=counts) as axes:
        for width, lines in figures["models"].items():
            change = [100 * (line["bpb"] / lines[OFF]["bpb"] - 1) for line in lines[ON]]
            axes.plot(counts, change, marker="o", markersize=4, label=f"width {width}")
        axes.minorticks_off()


def verdict(figures: Figures) -> Verdict:
    """Whether every width's best k is between 2 and 40, and k = 100 is worse."""
    bpb = {width: [line["bpb"] for line in lines[ON]] for width, lines in figures["models"].items()}
    best = {width: figures["counts"][values.index(min(values))] for width, values in bpb.items()}
    agrees = all(2 <= best[width] <= 40 and values[-1] > min(values) for width, values in bpb.items())
    return agrees, sentence(__name__, figures, bpb=bpb, best=best)
