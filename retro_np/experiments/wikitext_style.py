"""One corpus, six ways to use it

On Wikitext103 the baseline has a test perplexity of 22.96, kNN-LM on top of it 19.54, and a RETROfit of it, with
Wikipedia as database, 18.97 (§4.1, table 4). The cache, prepended neighbours and RETRO from scratch are our
additions."""

import math

from retro_np.evaluation.added_memory import CACHE, IN_CONTEXT, KNN_LM, added_memory
from retro_np.evaluation.leakage import bits
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import plot_bars
from retro_np.retrieval.join import Retrieval

CONTINUOUS_CACHE, KNN, PREPENDED = "continuous cache", "kNN-LM", "prepended neighbours"
RETROFIT, FULL_RETRO = "RETROfit", "RETRO"
MEMORIES = {CACHE: CONTINUOUS_CACHE, KNN_LM: KNN, IN_CONTEXT: PREPENDED}
METHODS = ("baseline", *MEMORIES.values(), RETROFIT, FULL_RETRO)
PERPLEXITIES = {"baseline": 22.96, KNN: 19.54, RETROFIT: 18.97}  # paper, Wikitext103


def measure(lab: Lab) -> Figures:
    """Bits per byte of each method with the first seed's models, and the settings that were tuned."""
    database, limit, length = lab.database(), lab.limit(lab.database()), lab.scale.sequence_length
    baseline, retro = lab.pair(database, 0)
    retrofitted = lab.retrofitted(database, baseline, retro.config, round(0.25 * lab.scale.steps))
    scored = added_memory(
        MEMORIES, baseline.params, baseline.config, database, Retrieval.own(database, "valid"),
        k=min(recipe.NEIGHBOURS, length // (4 * database.chunk_size)),  # at most half of the context
        keys=2**12 if lab.scale.name == "tiny" else 2**18,  # Exact search of more takes longer than the rest does.
        sequence_length=length, stride=length // 2, limit=limit,
    )  # fmt: skip
    ratios, settings = lab.leakage(database), {method: chosen for method, (_, chosen) in scored.items()}
    lines = {"baseline": lab.bits(database, baseline, k=0)}
    lines |= {name: bits(scored[key][0].losses(database, limit=limit), ratios) for key, name in MEMORIES.items()}
    lines |= {RETROFIT: lab.bits(database, retrofitted), FULL_RETRO: lab.bits(database, retro)}
    settings[KNN_LM]["of"] = database.manifest["splits"]["train"]["tokens"]
    return {"lines": lines, "knn": settings[KNN_LM], "cache": settings[CACHE], "prepended": settings[IN_CONTEXT]}


def draw(figures: Figures, path: Picture) -> None:
    """Bars of bits per byte on all chunks, and dots for chunks without leakage."""
    bpb, dots = ({name: line[key] for name, line in figures["lines"].items()} for key in ("bpb", "bpb_no_leakage"))
    label = "bits per byte of held-out documents; dots: chunks without leakage (α = 12.5 %)"
    plot_bars(bpb, path, label, dots=dots, notes={name: f"{value:.3f}" for name, value in bpb.items()})


def verdict(figures: Figures) -> Verdict:
    """Whether RETROfit, kNN-LM and the baseline are in the paper's order."""
    bpb = {name: line["bpb"] for name, line in figures["lines"].items()}
    paper = {name: 1 - math.log(PERPLEXITIES[name]) / math.log(PERPLEXITIES["baseline"]) for name in (KNN, RETROFIT)}
    agrees = bpb[RETROFIT] < bpb[KNN] < bpb["baseline"]
    return agrees, sentence(__name__, figures, methods=METHODS, paper=paper)
