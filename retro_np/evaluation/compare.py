"""Evaluate models side by side, and say in one sentence whether retrieval helped."""

from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, score
from retro_np.evaluation.leakage import ALPHAS, NEIGHBOURS, NO_LEAKAGE, chunk_leakage, filtered_bits_per_byte
from retro_np.files import check_folder, replacing, write_json
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval

OFF, ON, SHUFFLED = "RETRO[OFF]", "RETRO[ON]", "RETRO[ON], neighbours of others"
LINES = ("baseline", OFF, ON, SHUFFLED)
SHUFFLE_SEED = 0


def conditions(models: dict) -> dict[str, tuple]:
    """Name → (parameters, config, retrieve, shuffle seed) of each line of the table, from models by name."""
    lines = {}
    if "baseline" in models:
        lines["baseline"] = (*models["baseline"], False, None)
    params, config = models["RETRO"]
    lines[OFF if config.retrieves else "without retrieval"] = (params, config, False, None)
    if config.retrieves:
        lines[ON] = (params, config, True, None)
        lines[SHUFFLED] = (params, config, True, SHUFFLE_SEED)
    return lines


def evaluate(
    models: dict,
    database: Database,
    out,
    *,
    split="valid",
    k=2,
    sequence_length=512,
    stride=256,
    limit=None,
    retrieval: Retrieval | None = None,
):
    """Score a split under each model and condition; write results.json and losses.npz to `out`.

    models: {"RETRO": (params, config)} and, if there, {"baseline": (params, config)}. The rest as in `score`.
    losses.npz holds each condition's nats and bytes, by chunk and by document, and r(C) of each chunk.
    Returns what results.json holds.
    """
    out = Path(out)
    check_folder(out)
    if "baseline" in models and models["baseline"][1].retrieves:
        raise UserError("the baseline has chunked cross-attention, and so is a RETRO: give a checkpoint without")
    losses: dict[str, Losses] = {}
    for name, (params, config, retrieve, shuffle_seed) in conditions(models).items():
        if shuffle_seed is not None and split == "train":
            continue  # the neighbours of another training chunk may be of the document itself
        losses[name] = score(
            params, config, database, split, k=k if retrieve else 0, sequence_length=sequence_length, stride=stride,
            limit=limit, shuffle_seed=shuffle_seed, retrieval=retrieval, description=f"evaluating {name}",
        )  # fmt: skip
    retrieval = retrieval or Retrieval.own(database, split)
    ratios = chunk_leakage(database, split, limit, retrieval)
    curves = {name: filtered_bits_per_byte(loss, ratios) for name, loss in losses.items()}
    at_no_leakage = ALPHAS.index(NO_LEAKAGE)
    figures = {
        name: {"bpb": loss.bits_per_byte(), "bpb_no_leakage": curves[name][at_no_leakage]}
        for name, loss in losses.items()
    }
    results = {
        "database": {"path": str(database.path), **database.identity, **database.manifest["splits"][split]},
        "settings": {
            "split": split, "k": k, "sequence_length": sequence_length, "stride": stride, "limit": limit,
            "leakage_neighbours": min(NEIGHBOURS, retrieval.split.neighbours.shape[1]),
            "retrieved_from": str(retrieval.database.path),
        },
        "chunks": len(ratios),
        "bytes": int(next(iter(losses.values())).bytes.sum()),
        "models": figures,
        "alphas": list(ALPHAS),
        "bpb_alpha": curves,
        "sentence": verdict(figures),
    }  # fmt: skip
    _save_losses(out / "losses.npz", losses, ratios)
    write_json(out / "results.json", results)
    return results


def verdict(figures: dict) -> str:
    """Whether retrieval helped, and by how much; and whether it was the neighbours, or only having some."""
    if ON not in figures:
        return "This model has no chunked cross-attention: there is no retrieval to judge."
    on, parts = figures[ON]["bpb"], []
    for name in ("baseline", OFF):
        if name in figures:
            gain = 100 * (1 - on / figures[name]["bpb"])
            parts.append(f"{abs(gain):.2f} % {'fewer' if gain > 0 else 'more'} bits than {name}")
    sentence = f"With retrieval on, RETRO needs {' and '.join(parts)}"
    if SHUFFLED not in figures:
        return sentence + "."
    own = 100 * (1 - on / figures[SHUFFLED]["bpb"])
    if own > 0.05:
        return f"{sentence}; {own:.2f} % of its bits it saves by what its own neighbours say, not others'."
    return (
        f"{sentence}; but with the neighbours of other chunks it does as well ({own:+.2f} %): "
        "this model does not use what it retrieves."
    )


def _save_losses(path, losses, ratios):
    arrays = {"r": ratios}
    for name, loss in losses.items():
        numbers, nats, n_bytes = loss.per_document()
        arrays |= {"bytes": loss.bytes, "documents": loss.documents, f"{name}/nats": loss.nats}
        arrays |= {"document_ids": numbers, "document_bytes": n_bytes, f"{name}/document_nats": nats}
    with replacing(path) as file:
        np.savez(file, **arrays)
