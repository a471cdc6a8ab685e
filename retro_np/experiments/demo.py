"""`retro-np demo`: build, train, evaluate and sample on Python's standard library, in ten minutes on two cores."""

import itertools
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from retro_np.errors import UserError
from retro_np.evaluation.compare import evaluate
from retro_np.evaluation.leakage import chunk_leakage
from retro_np.experiments import recipe
from retro_np.experiments.pretrained import BUNDLED_BUILD
from retro_np.files import locked, outputs, remove_partial, write_atomically, write_json
from retro_np.files.untrusted import read_json
from retro_np.generation import generate
from retro_np.parameters import count_parameters
from retro_np.pretrained.bundled import BASELINE, RETRO, bundled_file, trained_on
from retro_np.pretrained.models import load_pretrained
from retro_np.report.inspection import inspect, write_inspection
from retro_np.report.plots import plot_leakage, plot_losses
from retro_np.report.samples import prompt_tokens, show_chunks, write_page
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import STDLIB, Corpus, find_corpus
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import document_runs
from retro_np.training.loop import CHECKPOINT, read_log, train

PROMPT = 'def read_json(path):\n    """Read a JSON file and return the object in it."""\n'
INSPECTED_CHUNKS = 32  # shown on the page


def run_demo(
    minutes: float | None, out: Path | str, seed: int | None, from_scratch: bool, console: Console
) -> dict[str, Any]:
    """Run the demo, or resume it with the plan in `out`, and return the results of the evaluation.

    minutes, seed: None takes the plan's, or 10 and 0 for a new demo. Raises UserError if `out` has another plan."""
    out = Path(out)
    outputs.claim(out, outputs.DEMO)
    with locked(out, "demo"):
        remove_partial(out)
        asked = {"corpus": STDLIB, "minutes": minutes, "seed": seed, "from_scratch": from_scratch}
        plan = stored_plan(out, asked) or _plan(out, minutes, seed, from_scratch)
        console.rule("1 · the database", align="left")
        build = replace(recipe.BUILD, limit_bytes=plan["limit_bytes"], **({} if from_scratch else BUNDLED_BUILD))
        database = build_database(STDLIB, out / "db", build, recipe.EMBEDDER)
        describe_slice(database, find_corpus(STDLIB), "modules of the standard library", console)
        models = _trained(out, plan, database, console) if from_scratch else _bundled(out, console)
        console.rule("3 · evaluation on held-out modules", align="left")
        if (results := stored_results(out)) is None:
            results = evaluate(
                models, database, out, split="valid", k=recipe.NEIGHBOURS, sequence_length=256, stride=128,
                limit=plan["evaluated_chunks"], trained_on=() if from_scratch else trained_on(RETRO),
            )  # fmt: skip
            plot_leakage(results["alphas"], results["bpb_alpha"], out / "bpb_alpha.png")
        console.rule("4 · samples", align="left")
        params, config = models["RETRO"]
        if not (out / "samples.html").exists():
            _write_samples(out, params, config, database, results, plan)
        if not (out / "inspect.html").exists():
            _write_inspection(out, params, config, database)
        return results


def stored_plan(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The plan of the demo in a folder; empty if there is none. Raises UserError unless it is what is asked for.

    asked: what a plan must have; None for anything. A plan without a corpus is of the standard library."""
    if not (path := out / "plan.json").exists():
        return {}
    plan = {"corpus": STDLIB} | read_json(path, hint=f"remove {out}, or choose another folder with -o")
    for name, value in asked.items():
        if value is not None and value != plan.get(name):
            fault = f"{out} holds a demo with {name} {plan.get(name)}, not {value}"
            raise UserError(f"{fault}; use the same options to resume it, or choose another folder with -o")
    return plan


def stored_results(out: Path, mark: outputs.Mark = outputs.RESULTS) -> dict[str, Any] | None:
    """The results of the evaluation in a demo's folder; None if it is still to be done. mark: what they must have."""
    if not (path := out / "results.json").exists():
        return None
    if not outputs.is_mark(path, mark):
        raise UserError(f"{path} is damaged; remove it, and the demo will evaluate again")
    return read_json(path)


def _plan(out, minutes, seed, from_scratch) -> dict:
    """The request, and how much text and evaluation fit into the time; stored in plan.json."""
    minutes = 10.0 if minutes is None else minutes
    if not 0 < minutes <= 10_000:
        raise UserError(f"minutes must be above 0 and at most 10,000, not {minutes}")
    # What two cores process per minute. Training from scratch also needs the neighbours of training chunks.
    n_bytes, chunks = (350_000, 500) if from_scratch else (3_000_000, 2_000)
    plan = {
        "corpus": STDLIB, "minutes": minutes, "seed": seed or 0, "from_scratch": from_scratch,
        "limit_bytes": max(300_000, int(n_bytes * minutes)),  # Less text is too little to learn from and to hold out.
        "evaluated_chunks": max(64, int(chunks * minutes)),
    }  # fmt: skip
    write_json(out / "plan.json", plan)
    return plan


def _bundled(out, console) -> dict:
    """The bundled models, whose files are copied to where training would have written."""
    console.rule("2 · the two bundled models (--from-scratch trains new ones)", align="left")
    models = {}
    for name, bundled in (("baseline", BASELINE), ("RETRO", RETRO)):
        models[name] = load_pretrained(bundled)[:2]
        if not (path := out / bundled / CHECKPOINT).exists():
            write_atomically(path, bundled_file(bundled).read_bytes())
        size = f"{count_parameters(models[name][1], True):,} parameters"
        console.print(f"{name}: {size}, trained on Python 3.11's standard library")
    return models


def _trained(out, plan, database, console) -> dict:
    """Both models, trained for as long as the plan allows."""
    config = recipe.retro_config(database.vocabulary_size, database.chunk_size)
    configs = {"baseline": recipe.baseline_of(config), "RETRO": config}
    if "steps" not in plan:  # the number that fits into the time, from a few timed steps of each model
        seconds = 0.0
        for config in configs.values():
            training = recipe.training_config(config, 4, 0)
            log: list[dict[str, Any]] = []
            with tempfile.TemporaryDirectory() as folder:
                train(database, config, training, folder, description="", callbacks=[log.append])
            seconds += training.batch_size * training.sequence_length / sorted(line["tokens_per_s"] for line in log)[-2]
        steps = max(20, int(0.55 * 60 * plan["minutes"] / seconds))  # The rest of the time is for the other stages.
        plan |= {"steps": steps, "models": {name: asdict(config) for name, config in configs.items()}}
        write_json(out / "plan.json", plan)
    models = {}
    for name, config in configs.items():
        console.rule(f"2 · from scratch: {name}, {count_parameters(config, True):,} parameters", align="left")
        training = recipe.training_config(config, plan["steps"], plan["seed"])
        models[name] = train(database, config, training, out / name.lower(), description=name), config
        console.print(f"{training.steps} steps of {training.batch_size * training.sequence_length} tokens")
    plot_losses({"baseline": read_log(out / "baseline"), "RETRO[ON]": read_log(out / "retro")}, out / "loss.png")
    return models


def describe_slice(database: Database, corpus: Corpus, documents: str, console: Console) -> None:
    """Print how much of a corpus a database holds. documents: what they are called."""
    training, held_out = (database.manifest["splits"][name] for name in ("train", "valid"))
    n_documents = sum(1 for _ in corpus.names())
    console.print(
        f"{training['documents'] + held_out['documents']} of {n_documents} {documents} "
        f"({(training['bytes'] + held_out['bytes']) / 1e6:.1f} MB, chosen by a hash of the name), "
        f"{held_out['documents']} of them held out; {training['chunks']:,} chunks of {database.chunk_size} tokens "
        "in the database"
    )


def _write_samples(out, params, config, database, results, plan) -> None:
    """Write a page of samples that continue our own prompt and the first chunks of held-out modules."""
    split, prompts = database.split("valid"), {"a prompt of our own": PROMPT}
    for start, _ in itertools.islice(document_runs(split.documents[:]), 2):
        prompts[database.documents[int(split.documents[start])]["name"]] = database.text(split.tokens[start])
    settings = {"temperature": 0.8, "top_p": 0.95, "seed": plan["seed"], "stop_token": database.end_of_text}
    samples = []
    for name, prompt in prompts.items():
        tokens = prompt_tokens(database, prompt)
        sample = generate(params, config, tokens, 128, database=database, k=recipe.NEIGHBOURS, **settings)
        samples.append({"heading": f"From {name}", "chunks": show_chunks(tokens, *sample, database)})
    figures = {name: f"{line['bpb']:.4f} bits per byte" for name, line in results["models"].items()}
    write_page(out / "samples.html", "Samples of RETRO and what they retrieved", samples, figures)


def _write_inspection(out, params, config, database) -> None:
    """Write a page about the start of the held-out module that shares the longest runs with what it retrieved."""
    split = database.split("valid")
    leakage = chunk_leakage(database, limit=4000)
    long_runs = [run for run in document_runs(split.documents[: len(leakage)]) if run[1] - run[0] >= INSPECTED_CHUNKS]
    start, _ = max(long_runs, key=lambda run: leakage[run[0] : run[0] + INSPECTED_CHUNKS].mean(), default=(0, 0))
    tokens = split.tokens[start : start + INSPECTED_CHUNKS].reshape(-1)
    inspection = inspect(params, config, database, tokens[tokens != split.padding], k=recipe.NEIGHBOURS)
    facts = {"held-out module": database.documents[int(split.documents[start])]["name"]}
    write_inspection(out / "inspect.html", "A held-out module under RETRO", facts, inspection)
