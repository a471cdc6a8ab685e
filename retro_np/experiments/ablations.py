"""What each part of the model and of the recipe is worth. Paper table 13, and the parts that are ours."""

from dataclasses import replace

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import bits
from retro_np.report.plots import plot_bars

SHARE_OF_STEPS = 0.25  # of the recipe's: many models, and differences that show early
PAPER = {
    "RETRO": 0.822, "no query conditioning": 0.829, "no CCA positions": 0.826, "deeper encoder": 0.821,
    "shared embeddings": 0.823, "neighbour alone (N)": 0.950, "continuation alone (F)": 0.895,
    "no retrieval": 0.987, "1 neighbour in training": 0.858, "4 neighbours in training": 0.847,
    "CCA in the first layer alone": 0.827, "CCA in the last layer alone": 0.831, "CCA in every layer": 0.860,
}  # fmt: skip


def variants(retro, training):
    """Name → (configuration, training) of each row."""
    encoder, last = retro.encoder, retro.n_layers
    models = {
        "RETRO": retro,
        "no query conditioning": replace(retro, encoder=replace(encoder, ca_layers=())),
        "no CCA positions": replace(retro, cca_positions=False),
        "deeper encoder": replace(retro, encoder=replace(encoder, n_layers=2)),
        "neighbour alone (N)": replace(retro, retrieved_part="N"),
        "continuation alone (F)": replace(retro, retrieved_part="F"),
        "CCA in the first layer alone": replace(retro, cca_layers=(1,)),
        "CCA in the last layer alone": replace(retro, cca_layers=(last,)),
        "CCA in every layer": replace(retro, cca_layers=tuple(range(1, last + 1))),
        "ours: ordinary start": replace(retro, copying_start=False),
        "shared embeddings": replace(retro, share_embeddings=True),
    }
    rows = {name: (config, training) for name, config in models.items()}
    rows["1 neighbour in training"] = retro, replace(training, neighbours=1)
    rows["4 neighbours in training"] = retro, replace(training, neighbours=4)
    rows["ours: nothing lent"] = retro, replace(training, oracle_share=0.0, oracle_steps=0)
    rows["ours: a fifth without neighbours"] = retro, replace(training, retrieval_off=0.2)
    rows["ours: none without neighbours"] = retro, replace(training, retrieval_off=0.0)
    rows["ours: neither start nor loan"] = (
        models["ours: ordinary start"],
        replace(training, oracle_share=0.0, oracle_steps=0),
    )
    return rows


def measure(lab):
    """bpb of each row with retrieval on and off, and of the baseline trained as long."""
    database, steps = lab.database(), max(2, int(SHARE_OF_STEPS * lab.scale.steps))
    limit = lab.limit(database) // 4
    ratios = lab.leakage(database)[:limit]
    baseline_config, retro_config = lab.configs(database)
    rows = {}
    for name, (config, training) in variants(retro_config, lab.training(retro_config, 0, steps=steps)).items():
        model = lab.trained(database, config, training)
        rows[name] = {
            ON: bits(lab.scored(database, model, limit=limit), ratios),
            OFF: bits(lab.scored(database, model, k=0, limit=limit), ratios),
        }
    baseline = lab.trained(database, baseline_config, lab.training(baseline_config, 0, steps=steps))
    rows["no retrieval"] = {ON: bits(lab.scored(database, baseline, k=0, limit=limit), ratios)}
    return {"steps": steps, "rows": rows, "paper": PAPER}


def draw(figures, path):
    """A bar a row: bits against the full model."""
    whole = figures["rows"]["RETRO"][ON]["bpb"]
    change = {name: 100 * (line[ON]["bpb"] / whole - 1) for name, line in figures["rows"].items()}
    label = f"% bits against RETRO, after {figures['steps']} steps"
    plot_bars(dict(sorted(change.items(), key=lambda item: item[1])), path, label)


def verdict(figures):
    """Of the rows that the paper has too, how many lie on the same side of the full model."""
    rows, paper = figures["rows"], figures["paper"]
    whole = rows["RETRO"][ON]["bpb"]
    change = {name: line[ON]["bpb"] / whole - 1 for name, line in rows.items() if name != "RETRO"}
    both = [name for name in paper if name != "RETRO"]
    same = [name for name in both if (change[name] > 0) == (paper[name] > paper["RETRO"])]
    worst = sorted(change, key=change.get)[-3:][::-1]
    return len(same) > len(both) / 2, (
        f"{len(same)} of {len(both)} rows lie on the side of the full model where the paper has them; most is lost by "
        + ", ".join(f"{name} ({100 * change[name]:+.2f} %)" for name in worst)
        + "."
    )


EXPERIMENT = Experiment(
    "Ablations",
    "Table 13, C4 bpb, RETRO .822: no query conditioning .829, no CCA positions .826, shared embeddings .823, 6-layer "
    "encoder .821, N alone .950, F alone .895, no retrieval .987, 1 / 4 training neighbours .858 / .847, CCA in the "
    "first layer alone .827, the last .831, all .860.",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
