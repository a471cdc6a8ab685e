"""Evaluate models with retrieval off, on, and with shuffled neighbours; say in a sentence whether retrieval helps."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.added_memory import DATASTORE_KEYS, METHODS, added_memory, check_methods
from retro_np.evaluation.bits_per_byte import check_arguments, score_tokens
from retro_np.evaluation.bootstrap import MIN_DOCUMENTS, paired_bootstrap
from retro_np.evaluation.breakdown import NEAR_COPY, breakdown, nearest_similarities, stated
from retro_np.evaluation.leakage import ALPHAS, LEAKAGE_NEIGHBOURS, bits, chunk_leakage, filtered_bits_per_byte
from retro_np.evaluation.own_text import HASH_DIGITS, OwnText
from retro_np.files import outputs, remove_partial, replacing, write_json
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.sequences import evaluation_windows
from retro_np.tree import Tree

OFF, ON, SHUFFLED, PLAIN = "RETRO[OFF]", "RETRO[ON]", "RETRO[ON], neighbours of others", "without retrieval"
LINES = ("baseline", OFF, ON, SHUFFLED)
SHORT_NAMES = {OFF: "off", ON: "on", SHUFFLED: "others"}  # as in the records of comparisons
SHUFFLE_SEED = 0
OUR_NAME = "RETRO"
TOKEN_LOSSES = "tokens.npz"

Model = tuple[Tree, RetroConfig]


def model_name(config: RetroConfig) -> str:
    """What tables, pictures and sentences call a model that retrieves: one of others has a memory."""
    return OUR_NAME if config.is_retro else "memory"


def shown(condition: str, model: str = OUR_NAME) -> str:
    """What they call a condition: "RETRO[ON]" with the name of the model."""
    return condition.replace(OUR_NAME, model) if condition in SHORT_NAMES else condition


def conditions(baseline: Any, retro: Any, k: int, retrieves: bool = True) -> dict[str, tuple[Any, dict[str, int]]]:
    """The conditions that are compared: name → (model, arguments of `score`).

    baseline, retro: models in any form; None leaves the baseline out. retrieves: whether retro has cross-attention."""
    off, on, shuffled = {"k": 0}, {"k": k}, {"k": k, "shuffle_seed": SHUFFLE_SEED}
    lines = {} if baseline is None else {"baseline": (baseline, off)}
    three = {OFF: (retro, off), ON: (retro, on), SHUFFLED: (retro, shuffled)}
    return lines | (three if retrieves else {PLAIN: (retro, off)})


def evaluate(
    models: Mapping[str, Model], database: Database, out: Path | str, *, split: str = "valid", k: int = 2,
    sequence_length: int = 512, stride: int = 256, limit: int | None = None, retrieval: Retrieval | None = None,
    against: Mapping[str, Model] | None = None, trained_on: Collection[str] = (), parts: bool = True,
    token_losses: bool = False, also: Collection[str] = (), keys: int = DATASTORE_KEYS,
) -> dict[str, Any]:  # fmt: skip
    """Score a RETRO under each condition, and other models for comparison; write results.json and losses.npz to `out`.

    models: {"RETRO": (params, config)}, or {"RETRO": (params, config), "baseline": (params, config)}. The RETRO is
        scored with retrieval on, off, and, unless split is "train", with the neighbours of other chunks.
    out: the folder of the results. losses.npz holds each condition's nats and bytes, and r(C) of each scored chunk.
    split: "valid" (for tuning), "test" (for reporting; valid, if the database has no test part) or "train".
    k, sequence_length, stride, limit: as in `score`.
    retrieval: neighbours from another database, or an `own_text`, which is scored instead of a split.
    against: further models by name. Those with cross-attention retrieve.
    trained_on: SHA-256 hashes of texts, or their first 16 digits, as `retro_np.trained_on` returns them. Held-out
        documents with these texts are left out and counted. Of training documents they are only counted.
    parts: also find out what the gain is made of. This reads the texts of all training documents.
    token_losses: also write tokens.npz, with the nats of each token.
    also: "in-context", "knn-lm", "cache": what the model of the first row gains from such a memory (`added_memory.py`).
    keys: tokens in the datastore of "knn-lm".

    Returns what results.json holds (docs/evaluation.md). "models" has each condition's "bpb" and "bpb_no_leakage" (see
    `leakage.bits`), "comparisons" the differences and their intervals, "without_near_copies" both for documents without
    near-copies in the training text, "parts" what the gain is made of, and "sentence" says whether retrieval helped.
    Raises UserError for wrong names of models, for a folder that cannot be written, and as `score` does."""
    out = Path(out)
    outputs.claim(out, outputs.EVALUATION)
    remove_partial(out)
    if "RETRO" not in models or not models.keys() <= {"RETRO", "baseline"}:
        raise UserError(f'models must be {{"RETRO": …}} or {{"RETRO": …, "baseline": …}}, not {list(models)}')
    for name, model in {**models, **(against or {})}.items():
        if not isinstance(model, tuple) or len(model) != 2:
            raise UserError(f"the model {name!r} must be a pair (params, config), as load_params returns it")
    baseline, retro = models.get("baseline"), models["RETRO"]
    if baseline is not None and baseline[1].retrieves:
        raise UserError("the baseline has chunked cross-attention, so it is a RETRO: use another checkpoint")
    lines, called = conditions(baseline, retro, k, retro[1].retrieves), model_name(retro[1])
    for name, model in (against or {}).items():
        if name in (*LINES, PLAIN, *SHORT_NAMES.values(), *METHODS):
            raise UserError(f"another model cannot be called {name!r}, like a condition: give it another name")
        lines[name] = model, {"k": k}
    known = {digest[:HASH_DIGITS] for digest in trained_on}
    retrieval, left_out = _without(known, database, split, retrieval)
    split = retrieval.split.name
    windows: dict[str, Any] = {"sequence_length": sequence_length, "stride": stride, "limit": limit}
    if split == "train":
        lines.pop(SHUFFLED, None)  # The neighbours of another training chunk may come from this chunk's own document.
    first, scored = next(iter(lines)), {}
    (frozen, frozen_config), _ = lines[first]
    check_arguments(keys=(keys, 1))
    check_methods(also, frozen_config, database, retrieval, k, sequence_length)
    for name, ((params, config), condition) in lines.items():
        settings = {**condition, **windows, "retrieval": retrieval, "description": f"evaluating {shown(name, called)}"}
        scored[name] = score_tokens(params, config, database, split, **settings)
    on = {"on": scored[ON]} if ON in scored and frozen is retro[0] else {}
    memories = added_memory(also, frozen, frozen_config, database, retrieval, k=k, keys=keys, on=on, **windows)
    scored |= {name: tokens for name, (tokens, _) in memories.items()}
    whole = {name: tokens.losses(database, retrieval.split, limit) for name, tokens in scored.items()}
    main = ON if ON in lines else PLAIN
    rows = np.flatnonzero(whole[first].tokens)  # chunks with a scored token, so none of a document that is left out
    if not len(rows):
        raise UserError("no token can be scored, since a document's first one never is: give longer texts")
    ratios = chunk_leakage(database, split, limit, retrieval)
    similarity = nearest_similarities(database, retrieval.split, limit) if parts and split != "train" else None
    composition = None
    if parts and ON in lines:
        composition = {"of": "on", "against": SHORT_NAMES.get(first, first)} | breakdown(
            scored[ON], scored[first], database, retrieval, k=k, windows=evaluation_windows(retrieval.split, **windows),
            limit=limit, ratios=ratios, similarity=similarity,
        )  # fmt: skip
    losses, ratios = {name: loss[rows] for name, loss in whole.items()}, ratios[rows]
    numbers, _, document_bytes = losses[first].per_document()
    columns = {name: getattr(losses[first], name) for name in ("bytes", "documents", "tokens")}
    columns |= {"rows": rows, "r": ratios, "document_ids": numbers, "document_bytes": document_bytes}
    for name, loss in losses.items():
        columns |= {f"{name}/nats": loss.nats, f"{name}/document_nats": loss.per_document()[1]}
    clean = near_copies = None
    if similarity is not None:
        columns["similarity"] = similarity[rows]
        clean = _without_near_copies(losses, similarity[rows], first, main)
        near_copies = len(numbers) - (clean["documents"] if clean else 0)
    figures = {name: bits(loss, ratios) for name, loss in losses.items()}
    own = retrieval if isinstance(retrieval, OwnText) else None
    counts = own.counts() if own else database.manifest["splits"][split]
    results = {
        "database": {"path": str(database.path), **database.identity, **counts},
        "settings": {
            "split": split, "k": k, **windows, "retrieved_from": str(retrieval.database.path),
            **({"also": list(also), "keys": keys} if also else {}),
            "leakage_neighbours": min(LEAKAGE_NEIGHBOURS, retrieval.split.neighbours.shape[1]),
        },
        "chunks": len(rows), "bytes": int(document_bytes.sum()), "scored_documents": len(numbers),
        "near_copies": near_copies, "left_out": left_out,
        "trained_on": sum(database.documents[n]["sha256"][:HASH_DIGITS] in known for n in numbers.tolist() if not own),
        "models": figures, "alphas": list(ALPHAS),
        "bpb_alpha": {name: filtered_bits_per_byte(loss, ratios) for name, loss in losses.items()},
        "comparisons": compared(losses, first, main), "without_near_copies": clean, "parts": composition,
        "sentence": verdict(figures, len(numbers), clean, near_copies, called),
    }  # fmt: skip
    results |= {"documents": own.figures(whole)} if own else {}
    (out / TOKEN_LOSSES).unlink(missing_ok=True)  # An earlier evaluation may have written it.
    files = {"losses.npz": columns}
    if token_losses:
        each, row = scored[first], scored[first].by_token(database, retrieval.split)
        tokens = {"positions": each.positions, "tokens": each.tokens, "bytes": row.bytes, "documents": row.documents}
        files[TOKEN_LOSSES] = tokens | {f"{name}/nats": part.nats for name, part in scored.items()}
    for name, arrays in files.items():
        with replacing(out / name) as file:
            np.savez(file, **arrays)
    write_json(out / "results.json", results)
    return results


def compared(losses: Mapping[str, Any], first: str, main: str, alpha: float | None = None) -> list[dict[str, Any]]:
    """The differences with intervals: of each condition against `first`, and of `main` against each other one.

    losses: Losses by condition, or a list of them, one for each seed. alpha: what their chunks were filtered by."""
    pairs = [(name, first) for name in losses if name != first]
    pairs += [(main, name) for name in losses if name not in (main, first) and main != first]
    seeds = {name: len(loss) if isinstance(loss, list) else 1 for name, loss in losses.items()}
    return [
        {"of": SHORT_NAMES.get(of, of), "against": SHORT_NAMES.get(other, other), "alpha": alpha}
        | {**stated(paired_bootstrap(losses[of], losses[other])), "seeds": max(seeds[of], seeds[other])}
        for of, other in pairs
    ]


def _without_near_copies(losses, similarity, first, main) -> dict[str, Any] | None:
    """The figures for documents without a near-copy in the training text, or None if there are none."""
    part = {name: loss[similarity < NEAR_COPY] for name, loss in losses.items()}
    documents = len(np.unique(part[first].documents))
    return {
        "similarity_below": NEAR_COPY, "documents": documents, "bytes": int(part[first].bytes.sum()),
        "comparisons": compared(part, first, main), "models": {n: loss.bits_per_byte() for n, loss in part.items()},
    } if documents else None  # fmt: skip


def _without(known, database, split, retrieval) -> tuple[Retrieval, dict[str, int]]:
    """What to score, without the held-out documents that a model was trained on, and how many these were."""
    if isinstance(retrieval, OwnText):
        if known & {record["sha256"][:HASH_DIGITS] for record in retrieval.records}:
            raise UserError("a model was trained on one of the texts: pass trained_on to own_text, which leaves it out")
        return retrieval, retrieval.left_out
    retrieval = retrieval or Retrieval.own(database, split)
    lists, name = retrieval.split, retrieval.split.name
    records = [record for record in database.documents if record["split"] == name != "train"] if known else []
    held = [record["sha256"] for record in records if record["bytes"] and not record.get("removed")]
    matches = [digest for digest in held if digest[:HASH_DIGITS] in known]
    if matches and len(matches) == len(held):
        fault = f"a model was trained on all {len(matches)} documents of the split {name} of {database.path}"
        raise UserError(f"{fault}: evaluate with another database, or --text")
    part = replace(database.split(name, set(matches)), neighbours=lists.neighbours, distances=lists.distances)
    return replace(retrieval, split=part), {"trained_on": len(matches)}


def more_or_fewer(saved: float) -> str:
    """A saved share of the bits in words, for example "5.62 % fewer bits"; "more bits" if it is negative."""
    return f"{100 * abs(saved):.2f} % {'fewer' if saved > 0 else 'more'} bits"


def verdict(
    figures: dict[str, dict[str, Any]], documents: int, clean: dict[str, Any] | None = None,
    near_copies: int | None = None, model: str = OUR_NAME,
) -> str:  # fmt: skip
    """A sentence or two: by how much retrieval helped, and whether the model used the content of its own neighbours.

    figures: {condition: {"bpb": …}}. documents: how many were scored. clean: the figures for documents without
    near-copies in the training text, which then come first. near_copies: how many documents have one; None if nobody
    looked. All as in the results of `evaluate`. model: its name."""
    if ON not in figures:
        return "This model has no chunked cross-attention, so there is no retrieval to judge."
    bpb = {name: line["bpb"] for name, line in figures.items()}
    near = f"without a near-copy in the training text (a 13-gram similarity of {NEAR_COPY:g} or more)"
    everything = f"all {documents} documents" if documents > 1 else "the one document"
    sentence = f"With retrieval on, {model if model == OUR_NAME else 'the model'} needs "
    if clean is not None:
        few = ", too few for an interval" * (clean["documents"] < MIN_DOCUMENTS)
        scope = f"in the {clean['documents']} documents" if clean["documents"] > 1 else "in the one document"
        sentence += f"{_fewer_or_more(clean['models'], model)} {scope} {near}{few}. "
        sentence += f"Over {everything}, it needs {_fewer_or_more(bpb, model)}"
    else:
        scope = f"and there is none {near}" if near_copies else "near-copies of the training text included"
        sentence += f"{_fewer_or_more(bpb, model)} over {everything}, {scope}"
    if SHUFFLED not in figures:
        return sentence + "."
    saving = 100 * (1 - bpb[ON] / bpb[SHUFFLED])
    if saving > 0.05:
        return f"{sentence}; its own neighbours save {saving:.2f} % compared with the neighbours of other chunks."
    others = f"but it does at least as well with the neighbours of other chunks ({saving:+.2f} %)"
    return f"{sentence}; {others}: this model does not use what it retrieves."


def _fewer_or_more(bpb: dict[str, float], model: str) -> str:
    others = {"baseline": "the baseline", OFF: shown(OFF, model)}
    saved = {phrase: 1 - bpb[ON] / bpb[name] for name, phrase in others.items() if name in bpb}
    return " and ".join(f"{more_or_fewer(share)} than {phrase}" for phrase, share in saved.items())
