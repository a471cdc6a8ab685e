"""Ablations

What each part of the model and of the recipe contributes. Paper table 13, and our own parts."""

from dataclasses import replace
from typing import Any

from retro_np.config import RetroConfig
from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.report.plots import plot_bars
from retro_np.training.config import TrainingConfig

PAPER = {
    "RETRO": 0.822, "no query conditioning": 0.829, "no CCA positions": 0.826, "deeper encoder": 0.821,
    "shared embeddings": 0.823, "neighbour alone (N)": 0.950, "continuation alone (F)": 0.895,
    "no retrieval": 0.987, "1 neighbour in training": 0.858, "4 neighbours in training": 0.847,
    "CCA in the first layer alone": 0.827, "CCA in the last layer alone": 0.831, "CCA in every layer": 0.860,
}  # fmt: skip
PAPER_SHOWS = f"Bits per byte of C4 in table 13: {', '.join(f'{name} {bpb:.3f}' for name, bpb in PAPER.items())}."


def variants(retro: RetroConfig, training: TrainingConfig) -> dict[str, tuple[RetroConfig, TrainingConfig]]:
    """The model and training configuration of each row, by name."""
    encoder: Any = retro.encoder
    ordinary_start, no_oracle = {"copying_start": False}, {"oracle_share": 0.0, "oracle_steps": 0}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # to the model and to the training
        "RETRO": ({}, {}),
        "no query conditioning": ({"encoder": replace(encoder, ca_layers=())}, {}),
        "no CCA positions": ({"cca_positions": False}, {}),
        "deeper encoder": ({"encoder": replace(encoder, n_layers=2)}, {}),
        "neighbour alone (N)": ({"retrieved_part": "N"}, {}), "continuation alone (F)": ({"retrieved_part": "F"}, {}),
        "CCA in the first layer alone": ({"cca_layers": (1,)}, {}),
        "CCA in the last layer alone": ({"cca_layers": (retro.n_layers,)}, {}),
        "CCA in every layer": ({"cca_layers": tuple(range(1, retro.n_layers + 1))}, {}),
        "ours: ordinary start": (ordinary_start, {}),
        "shared embeddings": ({"share_embeddings": True}, {}),
        "1 neighbour in training": ({}, {"neighbours": 1}), "4 neighbours in training": ({}, {"neighbours": 4}),
        "ours: no oracle neighbours": ({}, no_oracle),
        "ours: a fifth of sequences without neighbours": ({}, {"retrieval_off": 0.2}),
        "ours: no sequences without neighbours": ({}, {"retrieval_off": 0.0}),
        "ours: ordinary start, no oracle neighbours": (ordinary_start, no_oracle),
    }  # fmt: skip
    return {name: (replace(retro, **model), replace(training, **run)) for name, (model, run) in changes.items()}


def measure(lab: Lab) -> Figures:
    """Bits per byte of each row with retrieval on and off, and of a baseline trained for as many steps."""
    database, steps = lab.database(), max(2, lab.scale.steps // 4)  # Differences show early.
    limit = lab.limit(database) // 4
    baseline_config, retro_config = lab.configs(database)
    rows = {}
    for name, (config, training) in variants(retro_config, lab.training(retro_config, 0, steps=steps)).items():
        model = lab.trained(database, config, training)
        rows[name] = {ON: lab.bits(database, model, limit=limit), OFF: lab.bits(database, model, k=0, limit=limit)}
    baseline = lab.trained(database, baseline_config, lab.training(baseline_config, 0, steps=steps))
    rows["no retrieval"] = {ON: lab.bits(database, baseline, k=0, limit=limit)}
    return {"steps": steps, "rows": rows, "paper": PAPER}


def changes(figures: Figures) -> dict[str, float]:
    """The change in bits per byte relative to the full model, by row, the best first."""
    rows = figures["rows"]
    change = {name: line[ON]["bpb"] / rows["RETRO"][ON]["bpb"] - 1 for name, line in rows.items()}
    return {name: change[name] for name in sorted(change, key=change.__getitem__)}


def draw(figures: Figures, path: Picture) -> None:
    """Bars of bits per byte relative to the full model."""
    label = f"change in bits relative to RETRO after {figures['steps']} steps (%)"
    plot_bars(changes(figures), path, label, scale=100)


def verdict(figures: Figures) -> Verdict:
    """Whether most of the paper's rows are on the same side of the full model as in the paper."""
    paper, change = figures["paper"], changes(figures)
    compared = [name for name in paper if name != "RETRO"]
    agreeing = [name for name in compared if (change[name] > 0) == (paper[name] > paper["RETRO"])]
    small = sum(abs(change[name]) < 0.003 for name in compared)
    values = {"compared": compared, "agreeing": agreeing, "change": change, "worst": list(change)[-3:][::-1]}
    return len(agreeing) > len(compared) / 2, sentence(__name__, figures, small=small, **values)
