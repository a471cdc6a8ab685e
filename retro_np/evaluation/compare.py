"""Evaluate models with retrieval off, on, and with shuffled neighbours; say in a sentence whether retrieval helps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, score
from retro_np.evaluation.leakage import ALPHAS, LEAKAGE_NEIGHBOURS, bits, chunk_leakage, filtered_bits_per_byte
from retro_np.files import outputs, remove_partial, replacing, write_json
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.tree import Tree

OFF, ON, SHUFFLED = "RETRO[OFF]", "RETRO[ON]", "RETRO[ON], neighbours of others"
LINES = ("baseline", OFF, ON, SHUFFLED)
SHUFFLE_SEED = 0


def conditions(baseline: Any, retro: Any, retrieves: bool = True) -> dict[str, tuple[Any, bool, int | None]]:
    """The conditions that are compared: name → (model, whether it retrieves, shuffle seed).

    baseline, retro: models in any form; None leaves the baseline out. retrieves: whether retro has cross-attention."""
    lines: dict[str, tuple[Any, bool, int | None]] = {} if baseline is None else {"baseline": (baseline, False, None)}
    if not retrieves:
        return lines | {"without retrieval": (retro, False, None)}
    return lines | {OFF: (retro, False, None), ON: (retro, True, None), SHUFFLED: (retro, True, SHUFFLE_SEED)}


def evaluate(
    models: Mapping[str, tuple[Tree, RetroConfig]], database: Database, out: Path | str, *, split: str = "valid",
    k: int = 2, sequence_length: int = 512, stride: int = 256, limit: int | None = None,
    retrieval: Retrieval | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a RETRO under each condition, and a baseline for comparison; write results.json and losses.npz to `out`.

    models: {"RETRO": (params, config)}, or {"RETRO": (params, config), "baseline": (params, config)}. The RETRO is
        scored with retrieval on, off, and, unless split is "train", with the neighbours of other chunks.
    out: the folder of the results. losses.npz holds each condition's nats and bytes, and r(C) of each chunk.
    split, k, sequence_length, stride, limit, retrieval: as in `score` (split is its split_name).

    Returns what results.json holds. "models" has each condition's "bpb" and "bpb_no_leakage" (see `leakage.bits`),
    "bpb_alpha" its bpb(α) for each of "alphas", and "sentence" says whether retrieval helped. Raises UserError for any
    other name in models, for a folder that cannot be written, and as `score` does."""
    out = Path(out)
    outputs.claim(out, outputs.EVALUATION)
    remove_partial(out)
    if "RETRO" not in models or not models.keys() <= {"RETRO", "baseline"}:
        raise UserError(f'models must be {{"RETRO": …}} or {{"RETRO": …, "baseline": …}}, not {list(models)}')
    baseline, retro = models.get("baseline"), models["RETRO"]
    if baseline is not None and baseline[1].retrieves:
        raise UserError("the baseline has chunked cross-attention, so it is a RETRO: use another checkpoint")
    windows: dict[str, Any] = {"sequence_length": sequence_length, "stride": stride, "limit": limit}
    retrieval = retrieval or Retrieval.own(database, split)
    losses: dict[str, Losses] = {}
    for name, ((params, config), retrieve, seed) in conditions(baseline, retro, retro[1].retrieves).items():
        if seed is not None and split == "train":
            continue  # the neighbours of another training chunk may come from this chunk's own document
        losses[name] = score(
            params, config, database, split, k=k if retrieve else 0, **windows, shuffle_seed=seed, retrieval=retrieval,
            description=f"evaluating {name}",
        )  # fmt: skip
    ratios = chunk_leakage(database, split, limit, retrieval)
    figures = {name: bits(loss, ratios) for name, loss in losses.items()}
    results = {
        "database": {"path": str(database.path), **database.identity, **database.manifest["splits"][split]},
        "settings": {
            "split": split, "k": k, **windows, "retrieved_from": str(retrieval.database.path),
            "leakage_neighbours": min(LEAKAGE_NEIGHBOURS, retrieval.split.neighbours.shape[1]),
        },
        "chunks": len(ratios), "bytes": int(next(iter(losses.values())).bytes.sum()),
        "models": figures, "alphas": list(ALPHAS),
        "bpb_alpha": {name: filtered_bits_per_byte(loss, ratios) for name, loss in losses.items()},
        "sentence": verdict(figures),
    }  # fmt: skip
    arrays: dict[str, Any] = {"r": ratios}
    for name, loss in losses.items():
        numbers, nats, n_bytes = loss.per_document()
        arrays |= {"bytes": loss.bytes, "documents": loss.documents, f"{name}/nats": loss.nats}
        arrays |= {"document_ids": numbers, "document_bytes": n_bytes, f"{name}/document_nats": nats}
    with replacing(out / "losses.npz") as file:
        np.savez(file, **arrays)
    write_json(out / "results.json", results)
    return results


def more_or_fewer(saved: float) -> str:
    """A saved share of the bits in words, for example "5.62 % fewer bits"; "more bits" if it is negative."""
    return f"{100 * abs(saved):.2f} % {'fewer' if saved > 0 else 'more'} bits"


def verdict(figures: dict[str, dict[str, Any]]) -> str:
    """One sentence: by how much retrieval helped, and whether the model used the content of its own neighbours.

    figures: {condition: {"bpb": …}}, as in the results of `evaluate`."""
    if ON not in figures:
        return "This model has no chunked cross-attention, so there is no retrieval to judge."
    saved = {name: 1 - figures[ON]["bpb"] / line["bpb"] for name, line in figures.items()}
    phrases = {"baseline": "the baseline", OFF: OFF}
    parts = [f"{more_or_fewer(saved[name])} than {phrases[name]}" for name in phrases if name in figures]
    sentence = f"With retrieval on, RETRO needs {' and '.join(parts)}"
    if SHUFFLED not in figures:
        return sentence + "."
    saving = 100 * saved[SHUFFLED]
    if saving > 0.05:
        return f"{sentence}; its own neighbours save {saving:.2f} % compared with the neighbours of other chunks."
    others = f"but it does at least as well with the neighbours of other chunks ({saving:+.2f} %)"
    return f"{sentence}; {others}: this model does not use what it retrieves."
