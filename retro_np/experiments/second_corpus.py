"""A corpus whose documents share text

The corpus is the models of a release of Hugging Face transformers, and one command fetches it. By the project's policy
each file contains its whole model. Many passages therefore occur in several files, also with changes. As with any
corpus, files too similar to a held-out one are left out.

Retrieval saves half of the bits on the Pile's GitHub (table 15). On C4 and Wikitext103 it saves bits at every
α (§4.4). Our own goal here is 5 % of the bits, and 1 % at α = 12.5 %."""

import numpy as np

from retro_np.errors import UserError
from retro_np.evaluation.compare import ON
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import COLOURS, new_plot

RELEASE = "transformers==4.46.3"
MODEL_FILES = {"include": ("*/modeling_*.py",), "exclude": ("*/modeling_tf_*.py", "*/modeling_flax_*.py")}
BINS = 16


def measure(lab: Lab) -> Figures:
    """Bits per byte by condition and seed, the copy bound, a histogram of r(C). Raises UserError without the corpus."""
    folder = lab.folder.parent / "corpora" / RELEASE.replace("==", "-")
    corpus = folder / "transformers" / "models"
    if not corpus.is_dir():
        raise UserError(f"the second corpus is missing; get it with: pip install --no-deps --target {folder} {RELEASE}")
    # With so much shared text, a model learns to read without chunks shorter than the paper's.
    database = lab.database(corpus, "transformers", chunk_size=64, **MODEL_FILES)
    documents = {split: facts["documents"] for split, facts in database.manifest["splits"].items()}
    histogram, _ = np.histogram(lab.leakage(database), bins=BINS, range=(0, 1))
    return {"corpus": RELEASE, "documents": documents, **lab.over_seeds(database), "r_histogram": histogram}


def draw(figures: Figures, path: Picture) -> None:
    """A histogram of r(C)."""
    label = "r(C): longest run shared with a neighbour, as a share of the chunk"
    with new_plot(path, label, "share of chunks") as axes:
        shares = np.array(figures["r_histogram"]) / sum(figures["r_histogram"])
        axes.bar(np.arange(BINS) / BINS, shares, width=1 / BINS, align="edge", color=COLOURS[ON], alpha=0.5)
        axes.axvline(0.125, color="#666666", linewidth=0.8)


def verdict(figures: Figures) -> Verdict:
    """Whether retrieval saves at least 5 % of the bits, and at least 1 % where nothing leaks, with every seed."""
    gains = figures["gains"]
    agrees = gains["bpb"]["from"] >= 0.05 and gains["bpb_no_leakage"]["from"] >= 0.01
    return agrees, sentence(__name__, figures)
