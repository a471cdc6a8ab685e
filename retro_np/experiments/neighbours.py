"""How many neighbours to read at evaluation, for models trained with two. The paper tunes k to the model."""

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import bits
from retro_np.report.plots import figure_and_axes, finish
from retro_np.retrieval.join import retrieve_from

COUNTS = (1, 2, 3, 5, 10, 20, 40, 100)


def measure(lab):
    """bpb by k of a RETRO of each width."""
    database, scale = lab.database(), lab.scale
    few = scale.few_tokens // database.chunk_size
    retrieval = retrieve_from(database, database, max(COUNTS))
    ratios = lab.leakage(database)[:few]
    models = {}
    for width in scale.widths:
        _, retro = lab.pair(database, 0, d_model=width)
        settings = {"limit": few, "retrieval": retrieval, "label": f"{max(COUNTS)} candidates"}
        models[str(width)] = {
            OFF: bits(lab.scored(database, retro, k=0, limit=few), ratios),
            ON: [bits(lab.scored(database, retro, k=k, **settings), ratios) for k in COUNTS],
        }
    return {"counts": COUNTS, "chunks": few, "models": models}


def draw(figures, path):
    """Bits against k = 0 over k, a line a width."""
    figure, axes = figure_and_axes()
    for width, lines in figures["models"].items():
        change = [100 * (line["bpb"] / lines[OFF]["bpb"] - 1) for line in lines[ON]]
        axes.plot(figures["counts"], change, marker="o", markersize=4, label=f"width {width}")
    axes.set_xscale("log")
    axes.set_xticks(figures["counts"], figures["counts"])
    axes.minorticks_off()
    axes.set_xlabel("neighbours k at evaluation")
    axes.set_ylabel("% bits against retrieval off")
    axes.legend(frameon=False)
    finish(figure, axes, path)


def verdict(figures):
    """Whether every width's best k lies between 2 and 40, and 100 is worse."""
    parts, agrees = [], True
    for width, lines in figures["models"].items():
        bpb = [line["bpb"] for line in lines[ON]]
        best = figures["counts"][bpb.index(min(bpb))]
        agrees &= 2 <= best <= 40 and bpb[-1] > min(bpb)
        parts.append(f"width {width} {best} ({min(bpb):.4f}; k = 1: {bpb[0]:.4f}, k = 100: {bpb[-1]:.4f})")
    return agrees, f"Best number of neighbours, {'; '.join(parts)}."


EXPERIMENT = Experiment(
    "Neighbours at evaluation",
    "172M parameters on C4: bpb .84, .83, .82, .82, .83, .85 for k = 1, 2, 3, 10, 40, 100; trained with 2, best "
    "between 2 and 40 (§4.1, figure 1).",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
