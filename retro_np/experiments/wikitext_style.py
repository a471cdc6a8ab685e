"""One corpus, six ways to use it

On Wikitext103 the baseline has a test perplexity of 22.96, kNN-LM on top of it 19.54, and RETRO, with Wikipedia as
database, 18.97 (§4.1, table 4). The cache, prepended neighbours and RETROfit are our additions."""

import math

from retro_np.evaluation.continuous_cache import continuous_cache
from retro_np.evaluation.knn_lm import datastore, frozen_model, knn_lm
from retro_np.evaluation.leakage import bits
from retro_np.evaluation.prepending import prepended
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment, Figures, Lab, Picture, Verdict, described, sentence
from retro_np.report.plots import plot_bars

CONTINUOUS_CACHE, KNN, PREPENDED = "continuous cache", "kNN-LM", "prepended neighbours"
RETROFIT, FULL_RETRO = "RETROfit", "RETRO"
METHODS = ("baseline", CONTINUOUS_CACHE, KNN, PREPENDED, RETROFIT, FULL_RETRO)
PERPLEXITIES = {"baseline": 22.96, KNN: 19.54, FULL_RETRO: 18.97}  # paper, Wikitext103


def measure(lab: Lab) -> Figures:
    """Bits per byte of each method with the first seed's models, and the settings that were tuned."""
    database, limit, length = lab.database(), lab.limit(lab.database()), lab.scale.sequence_length
    baseline, retro = lab.pair(database, 0)
    retrofitted = lab.retrofitted(database, baseline, retro.config, round(0.25 * lab.scale.steps))
    model = baseline.params, baseline.config, database

    size = 2**12 if lab.scale.name == "tiny" else 2**18  # Exact search of more takes longer than the rest does.
    keys, values = datastore(*model, size, sequence_length=length)
    baseline_tokens, hidden, documents = frozen_model(*model, sequence_length=length, limit=limit)
    with_neighbours, knn_settings = knn_lm(baseline_tokens, hidden, documents, keys, values)
    with_cache, cache_settings = continuous_cache(baseline_tokens, hidden, documents)
    k = min(recipe.NEIGHBOURS, length // (4 * database.chunk_size))  # at most half of the context
    scored = {"baseline": baseline_tokens, CONTINUOUS_CACHE: with_cache, KNN: with_neighbours}
    scored[PREPENDED] = prepended(*model, k=k, sequence_length=length, limit=limit)
    ratios, train = lab.leakage(database), database.manifest["splits"]["train"]
    lines = {name: bits(tokens.losses(database, limit=limit), ratios) for name, tokens in scored.items()}
    lines |= {RETROFIT: lab.bits(database, retrofitted), FULL_RETRO: lab.bits(database, retro)}
    return {
        "lines": {name: lines[name] for name in METHODS},
        "knn": {"datastore": len(keys), "of": train["tokens"], "alpha_and_weight": knn_settings},
        "cache": {"theta_and_weight": cache_settings}, "prepended": {"k": k},
    }  # fmt: skip


def draw(figures: Figures, path: Picture) -> None:
    """Bars of bits per byte on all chunks, and dots for chunks without leakage."""
    bpb, dots = ({name: line[key] for name, line in figures["lines"].items()} for key in ("bpb", "bpb_no_leakage"))
    label = "bits per byte of held-out documents; dots: chunks without leakage (α = 12.5 %)"
    plot_bars(bpb, path, label, dots=dots, notes={name: f"{value:.3f}" for name, value in bpb.items()})


def verdict(figures: Figures) -> Verdict:
    """Whether RETRO, kNN-LM and the baseline are in the paper's order."""
    bpb = {name: line["bpb"] for name, line in figures["lines"].items()}
    paper = {name: 1 - math.log(PERPLEXITIES[name]) / math.log(PERPLEXITIES["baseline"]) for name in (KNN, FULL_RETRO)}
    agrees = bpb[FULL_RETRO] < bpb[KNN] < bpb["baseline"]
    return agrees, sentence(__name__, figures, methods=METHODS, paper=paper)


EXPERIMENT = Experiment(*described(__doc__), measure, draw, verdict, over_seeds=False, position=11)
