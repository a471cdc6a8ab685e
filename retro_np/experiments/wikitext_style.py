"""Ways to use one corpus besides training on it: kNN-LM, a cache, neighbours in the context, RETROfit, RETRO."""

import math

from retro_np.evaluation.continuous_cache import continuous_cache
from retro_np.evaluation.knn_lm import datastore, frozen_model, knn_lm
from retro_np.evaluation.prepending import prepended
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import bits
from retro_np.report.plots import plot_bars

KNN, CACHE, PREPENDED, RETROFIT, RETRO = "kNN-LM", "continuous cache", "prepended neighbours", "RETROfit", "RETRO"
LINES = ("baseline", CACHE, KNN, PREPENDED, RETROFIT, RETRO)
DATASTORE = 2**18  # training tokens that kNN-LM looks among: exact search of more would take longer than all the rest
TINY_DATASTORE = 2**12
RETROFIT_SHARE = 0.25  # of the baseline's steps
PERPLEXITIES = {"baseline": 22.96, KNN: 19.54, RETRO: 18.97}  # paper, Wikitext103


def measure(lab):
    """bpb of each way, of the first seed's models; and what was tuned."""
    database, scale = lab.database(), lab.scale
    baseline, retro = lab.pair(database, 0)
    retrofitted = lab.retrofitted(database, baseline, retro.config, RETROFIT_SHARE)
    window = {"sequence_length": scale.sequence_length}
    held_out = window | {"limit": lab.limit(database)}
    model = baseline.params, baseline.config, database

    size = TINY_DATASTORE if scale.name == "tiny" else DATASTORE
    keys, values = datastore(*model, size, **window)
    plain, hidden, documents = frozen_model(*model, **held_out)
    with_neighbours, of_knn = knn_lm(plain, hidden, documents, keys, values)
    with_cache, of_cache = continuous_cache(plain, hidden, documents)
    k = min(recipe.NEIGHBOURS, scale.sequence_length // (4 * database.chunk_size))  # half of the context at most
    scored = {
        "baseline": plain, CACHE: with_cache, KNN: with_neighbours,
        PREPENDED: prepended(*model, k=k, **held_out),
    }  # fmt: skip
    losses = {name: tokens.losses(database, limit=lab.limit(database)) for name, tokens in scored.items()}
    losses |= {RETROFIT: lab.scored(database, retrofitted), RETRO: lab.scored(database, retro)}
    ratios = lab.leakage(database)
    return {
        "lines": {name: bits(losses[name], ratios) for name in LINES},
        "knn": {
            "datastore": len(keys),
            "of": database.manifest["splits"]["train"]["tokens"],
            "alpha_and_weight": of_knn,
        },
        "cache": {"theta_and_weight": of_cache},
        "prepended": {"k": k},
    }


def draw(figures, path):
    """A bar a way, all chunks; a dot where only those without leakage are counted."""
    lines = {name: figures["lines"][name] for name in LINES}
    plot_bars(
        {name: line["bpb"] for name, line in lines.items()}, path,
        "bits per byte of held-out documents; dots: chunks without leakage (α = 12.5 %)",
        dots={name: [line["bpb_no_leakage"]] for name, line in lines.items()},
        notes={name: f"{line['bpb']:.3f}" for name, line in lines.items()},
    )  # fmt: skip


def verdict(figures):
    """The order of baseline, kNN-LM and RETRO against the paper's."""
    bpb = {name: figures["lines"][name]["bpb"] for name in LINES}
    saved = {name: 1 - bpb[name] / bpb["baseline"] for name in LINES[1:]}
    papers = {name: 1 - math.log(PERPLEXITIES[name]) / math.log(PERPLEXITIES["baseline"]) for name in (KNN, RETRO)}
    order = bpb[RETRO] < bpb[KNN] < bpb["baseline"]
    ours = ", ".join(f"{name} {100 * share:.2f} %" for name, share in saved.items())
    return order, (
        f"Of the baseline's bits are saved: {ours}; the paper's kNN-LM saves {100 * papers[KNN]:.1f} % on Wikitext103, "
        f"its RETRO {100 * papers[RETRO]:.1f} %. kNN-LM here looks among {figures['knn']['datastore']:,} of "
        f"{figures['knn']['of']:,} training tokens."
    )


EXPERIMENT = Experiment(
    "One corpus, six ways to use it",
    "On Wikitext103 the baseline's test perplexity is 22.96, kNN-LM's on it 19.54, RETRO's with Wikipedia as database "
    "18.97 (§4.1, table 4). The cache, prepended neighbours and RETROfit stand beside them here.",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
