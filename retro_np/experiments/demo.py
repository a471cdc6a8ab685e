"""`retro-np demo`: build, train, evaluate and sample on Python's standard library, in ten minutes on two cores.

The demo builds a database of the installed standard library, takes the bundled models or trains new ones by the same
recipe, evaluates them on held-out modules, and samples.
"""

import itertools
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from retro_np.checkpoint import save_params
from retro_np.errors import UserError
from retro_np.evaluation.compare import evaluate
from retro_np.evaluation.leakage import chunk_leakage
from retro_np.experiments import recipe
from retro_np.experiments.pretrained import pretrained_database
from retro_np.files import locked, remove_partial, visible, write_json
from retro_np.optim import adamw_init
from retro_np.parameters import count_parameters, init_params
from retro_np.pretrained.bundled import BASELINE, RETRO, load_pretrained
from retro_np.report.inspection import inspect, write_inspection
from retro_np.report.plots import plot_leakage, plot_losses
from retro_np.report.samples import sample_chunks, write_page
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import STDLIB, find_corpus
from retro_np.retrieval.documents import document_runs
from retro_np.training.batches import training_batch
from retro_np.training.loop import CHECKPOINT, read_log, train, train_step

DEFAULT_MINUTES = 10.0
MAX_MINUTES = 10_000.0
# The bytes of text and the held-out chunks that two cores process per minute, by from_scratch. Training from scratch
# also needs the neighbours of training chunks.
BYTES_PER_MINUTE = {False: 3_000_000, True: 350_000}
CHUNKS_PER_MINUTE = {False: 2_000, True: 500}
TRAINING_SHARE_OF_TIME = 0.55
MIN_CORPUS_BYTES = 300_000  # less text is too little to learn from and to hold out
WINDOW: dict[str, Any] = {"sequence_length": 256, "stride": 128}
PROMPT = 'def read_json(path):\n    """Read a JSON file and return the object in it."""\n'
SAMPLES = 3
INSPECTED_CHUNKS, CANDIDATE_CHUNKS = 32, 4000  # shown on the page, and considered for it


def run_demo(
    minutes: float | None, out: Path | str, seed: int | None, from_scratch: bool, console: Console
) -> dict[str, Any]:
    """Run the demo, or resume it with the plan in `out`, and return the results of the evaluation.

    minutes, seed: None takes the plan's values, or ten minutes and seed 0 for a new demo. Raises UserError if `out`
    holds a demo with a different plan.
    """
    out = Path(out)
    with locked(out, "demo"):
        remove_partial(out)
        plan = _plan(out, minutes, seed, from_scratch)
        console.rule("1 · the database", align="left")
        if from_scratch:
            build = replace(recipe.BUILD, limit_bytes=plan["limit_bytes"])
            database = build_database(STDLIB, out / "db", build, recipe.EMBEDDER)
        else:
            database = pretrained_database(out / "db", plan["limit_bytes"])
        _describe_slice(database, console)
        models = _trained(out, plan, database, console) if from_scratch else _bundled(out, console)
        console.rule("3 · evaluation on held-out modules", align="left")
        results = _evaluate(out, models, database, plan)
        console.rule("4 · samples", align="left")
        params, config = models["RETRO"]
        if not (out / "samples.html").exists():
            _write_samples(out, params, config, database, results, plan)
        if not (out / "inspect.html").exists():
            _write_inspection(out, params, config, database)
        return results


def _plan(out, minutes, seed, from_scratch) -> dict:
    """The request, and how much text and evaluation fit into the time; stored in plan.json."""
    path = out / "plan.json"
    if path.exists():
        names = {"minutes", "seed", "from_scratch", "limit_bytes", "evaluated_chunks"}
        plan = _read(path, names, f"remove {out}, or choose another folder with -o")
        for name, value in (("minutes", minutes), ("seed", seed), ("from_scratch", from_scratch)):
            if value is not None and value != plan[name]:
                raise UserError(
                    f"{out} holds a demo with {name} {plan[name]}, not {value}; "
                    "use the same options to resume it, or choose another folder with -o"
                )
        return plan
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"minutes must be above 0 and at most {MAX_MINUTES:,.0f}, not {minutes}")
    if any(visible(out)):
        raise UserError(f"{out} holds other files; choose another folder with -o")
    plan = {
        "minutes": minutes,
        "seed": 0 if seed is None else seed,
        "from_scratch": from_scratch,
        "limit_bytes": max(MIN_CORPUS_BYTES, int(BYTES_PER_MINUTE[from_scratch] * minutes)),
        "evaluated_chunks": max(64, int(CHUNKS_PER_MINUTE[from_scratch] * minutes)),
    }
    write_json(path, plan)
    return plan


def _read(path, names, remedy) -> dict:
    """A JSON object with these names. Raises UserError with the remedy if the file is damaged."""
    try:
        content = json.loads(path.read_bytes())
        if names <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is damaged; {remedy}")


def _bundled(out, console) -> dict:
    """The bundled models, also written to the files that training would have written."""
    console.rule("2 · the two bundled models (--from-scratch trains new ones)", align="left")
    models = {"baseline": load_pretrained(BASELINE)[:2], "RETRO": load_pretrained(RETRO)[:2]}
    for name, (params, config) in models.items():
        path = out / name.lower() / CHECKPOINT
        if not path.exists():
            save_params(path, params, config)
        console.print(
            f"{name}: {count_parameters(config, True):,} parameters, trained on Python 3.11's standard library"
        )
    return models


def _trained(out, plan, database, console) -> dict:
    """Both models, trained for as long as the plan allows."""
    config = recipe.retro_config(database.vocabulary_size, database.chunk_size)
    configs = {"baseline": recipe.baseline_of(config), "RETRO": config}
    plan = _plan_training(out, plan, database, configs)
    models = {}
    for name, config in configs.items():
        console.rule(f"2 · from scratch: {name}, {count_parameters(config, True):,} parameters", align="left")
        training = recipe.training_config(config, plan["steps"], plan["seed"])
        models[name] = train(database, config, training, out / name.lower(), description=name), config
        console.print(f"{training.steps} steps of {training.batch_size * training.sequence_length} tokens")
    plot_losses({"baseline": read_log(out / "baseline"), "RETRO[ON]": read_log(out / "retro")}, out / "loss.png")
    return models


def _plan_training(out, plan, database, configs) -> dict:
    """The plan with the number of steps that fit into the time, from a few timed steps of each model."""
    if "steps" in plan:
        return plan
    seconds = 0.0
    for config in configs.values():
        params, training = init_params(config, np.random.default_rng(0)), recipe.training_config(config, 1, 0)
        state = adamw_init(params)
        k, times = training.neighbours if config.retrieves else 0, []
        for step in range(4):
            start = time.perf_counter()
            batch = training_batch(
                database, database.split("train"), k, sequence_length=training.sequence_length,
                batch_size=training.batch_size, seed=0, step=step,
            )  # fmt: skip
            train_step(params, state, config, batch, training, step)
            times.append(time.perf_counter() - start)
        seconds += sorted(times)[1]
    steps = max(20, int(TRAINING_SHARE_OF_TIME * 60 * plan["minutes"] / seconds))
    plan = plan | {"steps": steps, "models": {name: asdict(config) for name, config in configs.items()}}
    write_json(out / "plan.json", plan)
    return plan


def _describe_slice(database, console) -> None:
    training, held_out = database.manifest["splits"]["train"], database.manifest["splits"]["valid"]
    n_modules = sum(1 for _ in find_corpus(STDLIB).names())
    console.print(
        f"{training['documents'] + held_out['documents']} of the standard library's {n_modules} modules "
        f"({(training['bytes'] + held_out['bytes']) / 1e6:.1f} MB, chosen by a hash of the name), "
        f"{held_out['documents']} of them held out; {training['chunks']:,} chunks of {database.chunk_size} tokens "
        "in the database"
    )


def _evaluate(out, models, database, plan) -> dict:
    path = out / "results.json"
    if path.exists():
        return _read(path, {"models", "sentence", "settings"}, "remove it, and the demo will evaluate again")
    results = evaluate(models, database, out, k=recipe.NEIGHBOURS, limit=plan["evaluated_chunks"], **WINDOW)
    plot_leakage(results["alphas"], results["bpb_alpha"], out / "bpb_alpha.png")
    return results


def _write_samples(out, params, config, database, results, plan) -> None:
    """Write a page of samples that continue our own prompt and the first chunks of held-out modules."""
    split = database.split("valid")
    prompts = [("a prompt of our own", PROMPT)]
    for start, _ in itertools.islice(document_runs(split.documents[:]), SAMPLES - 1):
        name = database.documents[int(split.documents[start])]["name"]
        prompts.append((name, database.text(split.tokens[start])))
    settings = {"temperature": 0.8, "top_p": 0.95, "seed": plan["seed"]}
    samples = [
        {"heading": f"From {name}", "chunks": sample_chunks(params, config, database, prompt, 128, 2, **settings)}
        for name, prompt in prompts
    ]
    figures = {name: f"{line['bpb']:.4f} bits per byte" for name, line in results["models"].items()}
    write_page(out / "samples.html", "Samples of RETRO and what they retrieved", samples, figures)


def _write_inspection(out, params, config, database) -> None:
    """Write a page about the start of the held-out module that shares the longest runs with what it retrieved."""
    split = database.split("valid")
    leakage = chunk_leakage(database, limit=CANDIDATE_CHUNKS)
    long_runs = [run for run in document_runs(split.documents[: len(leakage)]) if run[1] - run[0] >= INSPECTED_CHUNKS]
    start, _ = max(long_runs, key=lambda run: leakage[run[0] : run[0] + INSPECTED_CHUNKS].mean(), default=(0, 0))
    tokens = split.tokens[start : start + INSPECTED_CHUNKS].reshape(-1)
    facts = {"held-out module": database.documents[int(split.documents[start])]["name"]}
    inspection = inspect(params, config, database, tokens[tokens != 0], k=recipe.NEIGHBOURS)
    write_inspection(out / "inspect.html", "A held-out module under RETRO", facts, inspection)
