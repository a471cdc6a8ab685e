"""`retro-np demo --memory FOLDER`: a frozen language model that reads a folder, in five minutes on two cores."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from retro_np.errors import UserError
from retro_np.evaluation.compare import OFF, ON, evaluate
from retro_np.evaluation.own_text import HASH_DIGITS, OwnText
from retro_np.experiments.demo import describe_slice, stored_plan, stored_results
from retro_np.files import locked, outputs, remove_partial, write_json
from retro_np.generation import generate
from retro_np.pretrained.bundled import MEMORY, trained_on
from retro_np.pretrained.models import load_model, read_pretrained
from retro_np.progress import counted, progress_bar
from retro_np.report.inspection import inspect, write_inspection
from retro_np.report.samples import print_sample, show_chunks, write_page
from retro_np.retrieval.build import HASHED, build_database
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import Corpus, find_corpus, limited, order_of_hashes
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.documents import document_runs

NEIGHBOURS = 2
# What two cores process in five minutes
LIMIT_BYTES, HELD_OUT_DOCUMENTS, SCORED_CHUNKS, SAMPLED_TOKENS = 10_000_000, 12, 8, 96
HELD_OUT_SHARE = 0.2  # This share of the documents is held out, but at most HELD_OUT_DOCUMENTS.
BYTES_PER_TOKEN = 6  # English and code have fewer, so that a document of as many for each token of a chunk is longer
CONTEXT = 1024  # tokens: what is scored, behind its neighbours where they stand in the context


def run_memory_demo(
    folder: Path | str, out: Path | str, seed: int | None, console: Console, memory: Path | str = MEMORY
) -> dict[str, Any]:
    """Run the demo, or resume it with the plan in `out`, and return the results of the evaluation.

    folder: texts, of which some are held out and the others are retrieved. seed: of the samples; None takes the plan's,
    or 0 for a new demo. memory: the checkpoint of a memory, or its run's folder; its base is read as well.
    Raises UserError if `out` has another plan, if the base is missing, and for a folder with too little text."""
    folder, out = Path(folder).resolve(), Path(out)
    outputs.claim(out, outputs.DEMO)
    plan = stored_plan(out, {"corpus": str(folder), "seed": seed})
    model = read_pretrained(memory)
    inside = out.resolve().relative_to(folder).as_posix() if out.resolve().is_relative_to(folder) else ""
    exclude = (f"/{re.escape(inside)}/",) if inside else ()  # what the demo itself writes
    corpus = find_corpus(folder, exclude=exclude)
    plan = plan or {
        "corpus": str(folder), "seed": seed or 0, "limit_bytes": LIMIT_BYTES,
        "evaluated_chunks": HELD_OUT_DOCUMENTS * SCORED_CHUNKS,
    }  # fmt: skip
    m = model.config.chunk_size
    build = BuildConfig(chunk_size=m, limit_bytes=plan["limit_bytes"], exclude=exclude, training_neighbours=False)
    part = limited(corpus, build.limit_bytes)
    build = replace(build, held_out=_share_of_hashes(folder, part, BYTES_PER_TOKEN * m))
    with locked(out, "demo"):
        remove_partial(out)
        write_json(out / "plan.json", plan)
        console.rule("1 · the database", align="left")
        database = build_database(folder, out / "db", build, HASHED, tokenizer=model.tokenizer)
        describe_slice(database, corpus, f"documents in {folder}", console)
        params, config = load_model(model, database)
        positions = getattr(config, "max_positions", CONTEXT)
        beginnings = _beginnings(database, trained_on(memory))
        console.rule("2 · evaluation on the beginnings of held-out documents", align="left")
        if (results := stored_results(out, outputs.has_keys("documents", "comparisons"))) is None:
            length = min(CONTEXT, positions // m * m)
            results = evaluate(
                {"RETRO": (params, config)}, database, out, k=NEIGHBOURS, sequence_length=length, stride=length,
                retrieval=beginnings, also=["in-context"],
            )  # fmt: skip
        gains = [line["bpb"][OFF] - line["bpb"][ON] if line["bytes"] else 0.0 for line in results["documents"]]
        number, split = int(np.argmax(gains)), beginnings.split
        tokens = split.tokens[split.documents == number].reshape(-1)
        tokens = tokens[~np.isin(tokens, database.special)]
        name = beginnings.records[number]["name"]
        facts = {"document": f"{name}, which gains the most of {counted(len(gains), 'held-out document')}"}
        console.rule("3 · samples", align="left")
        if not (out / "samples.html").exists():
            prompt = tokens[: 2 * m]
            call: dict[str, Any] = {"stop_token": {database.end_of_text, *model.stop}, "seed": plan["seed"]}
            call |= {"database": database, "temperature": 0.8, "top_p": 0.95}
            length = min(SAMPLED_TOKENS, positions - len(prompt))
            with progress_bar("sampling", 2 * length) as advance:
                call["on_token"] = lambda token: advance()
                drawn = [generate(params, config, prompt, length, k=k, **call) for k in (NEIGHBOURS, 0)]
            on, off = (show_chunks(prompt, *sample, database) for sample in drawn)
            print_sample(console, on, off)
            parts = [{"heading": "With the memory", "chunks": on}, {"heading": "Without it", "chunks": off}]
            write_page(out / "samples.html", "The beginning of a held-out document, continued", parts, facts)
        if not (out / "inspect.html").exists():
            inspection = inspect(params, config, database, tokens, k=NEIGHBOURS)
            write_inspection(out / "inspect.html", "A held-out document, read with a memory", facts, inspection)
        return results


def _share_of_hashes(folder: Path, corpus: Corpus, least: int) -> float:
    """Which share of the hashes of names to hold out, so that enough documents of at least `least` bytes are."""
    hashes, sizes, order = order_of_hashes(corpus)
    long = order[np.asarray(sizes)[order] >= least]
    if len(long) < 3:
        fault = f"{folder} has {counted(len(long), 'text')} of {least:,} bytes or more"
        raise UserError(f"{fault}: give at least 3, of which one is held out and the others are retrieved")
    held = min(HELD_OUT_DOCUMENTS, max(1, round(HELD_OUT_SHARE * len(long))))
    return float(hashes[long[held]])  # Hashes below this one are held out: that many of the long documents.


def _beginnings(database: Database, known: frozenset[str]) -> OwnText:
    """The first chunks of each held-out document that has several, and on which the memory was not trained."""
    split = database.split("valid")
    runs = [run for run in document_runs(split.documents[:]) if run[1] - run[0] > 1]  # The first chunk reads nothing.
    records = [database.documents[int(split.documents[start])] for start, _ in runs]
    fresh = [i for i, record in enumerate(records) if record["sha256"][:HASH_DIGITS] not in known]
    if not fresh:
        fault = "are shorter than a chunk, or the memory was trained on them"
        raise UserError(f"the held-out documents of {database.path} {fault}: give another folder")
    parts = [np.arange(*runs[i])[:SCORED_CHUNKS] for i in fresh]
    rows, numbers = np.concatenate(parts), np.repeat(np.arange(len(parts)), list(map(len, parts)))
    arrays: Any = split.tokens[rows], numbers, split.neighbours[rows], split.distances[rows]
    part = Split("valid", *arrays, **database.special._asdict())
    return OwnText(part, database, [records[i] for i in fresh], {"trained_on": len(records) - len(fresh)})
