"""`retro-np demo`: the whole path on Python's standard library, in some ten minutes on two cores.

It starts from the checkpoint in the box (`pretrained.py`), or trains anew by the same recipe; a database of this
machine's own standard library, evaluation and samples follow.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

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
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import document_runs
from retro_np.training.batches import training_batch
from retro_np.training.loop import CHECKPOINT, read_log, train, train_step

DEFAULT_MINUTES = 10.0
MOST_MINUTES = 10_000.0
# How a minute is spent, on two cores: so much text, and so many held-out chunks; training anew, a share of the time
BYTES_A_MINUTE = {False: 3_000_000, True: 350_000}  # from the box; from scratch, where training chunks' neighbours cost
CHUNKS_A_MINUTE = {False: 2_000, True: 500}
TRAINING = 0.55
SMALLEST_SLICE = 300_000  # bytes: below that there is nothing to learn, nor to hold out
WINDOW = {"sequence_length": 256, "stride": 128}
PROMPT = 'def read_json(path):\n    """Read a JSON file and return the object in it."""\n'
SAMPLES = 3
INSPECTED, LOOKED_THROUGH = 32, 4000  # chunks: of a page, and of those that it is chosen from


def run_demo(minutes: float | None, out: Path, seed: int | None, from_scratch: bool, console: Console) -> dict:
    """Build, train or take from the box, evaluate, sample; leave everything in `out`. Returns the results.

    minutes, seed: None: the plan's that is in `out`, else ten minutes and seed 0. What is there is reused; a demo that
    was stopped goes on with the plan that it had made. Raises UserError where `out` holds a demo of another plan.
    """
    out = Path(out)
    with locked(out, "demo"):
        remove_partial(out)
        plan = _plan(out, minutes, seed, from_scratch)
        console.rule("1 · the database", align="left")
        if from_scratch:
            config = replace(recipe.BUILD, limit_bytes=plan["limit_bytes"])
            database = build_database(STDLIB, out / "db", config, recipe.EMBEDDER)
        else:
            database = pretrained_database(out / "db", plan["limit_bytes"])
        _describe_slice(database, console)
        models = _trained(out, plan, database, console) if from_scratch else _from_the_box(out, database, console)
        console.rule("3 · evaluation on held-out modules", align="left")
        results = _evaluate(out, models, database, plan)
        console.rule("4 · samples", align="left")
        if not (out / "samples.html").exists():
            _write_samples(out, *models["RETRO"], database, results, plan)
        if not (out / "inspect.html").exists():
            _write_inspection(out, *models["RETRO"], database)
        return results


def _plan(out, minutes, seed, from_scratch) -> dict:
    """What was asked for, and how much text and evaluation fit; written down."""
    path = out / "plan.json"
    if path.exists():
        plan = _read_plan(path)
        for name, value in (("minutes", minutes), ("seed", seed), ("from_scratch", from_scratch)):
            if value is not None and value != plan[name]:
                raise UserError(
                    f"{out} holds a demo of {name} {plan[name]}, and {value} is asked for: "
                    "ask for the same to go on with it, or give another folder with -o"
                )
        return plan
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if not 0 < minutes <= MOST_MINUTES:
        raise UserError(f"a demo takes from half a minute to {MOST_MINUTES:,.0f} minutes, not {minutes}")
    if any(visible(out)):
        raise UserError(f"{out} holds other files: give a new folder for the demo")
    plan = {
        "minutes": minutes,
        "seed": 0 if seed is None else seed,
        "from_scratch": from_scratch,
        "limit_bytes": max(SMALLEST_SLICE, int(BYTES_A_MINUTE[from_scratch] * minutes)),
        "evaluated_chunks": max(64, int(CHUNKS_A_MINUTE[from_scratch] * minutes)),
    }
    write_json(path, plan)
    return plan


def _read_plan(path) -> dict:
    try:
        plan = json.loads(path.read_bytes())
        if {"minutes", "seed", "from_scratch", "limit_bytes", "evaluated_chunks"} <= plan.keys():
            return plan
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is damaged: remove {path.parent}, or give another folder with -o")


def _from_the_box(out, database, console) -> dict:
    """The models in the box, written where training would have left them."""
    console.rule("2 · two models from the box; --from-scratch trains them here", align="left")
    models = {"baseline": load_pretrained(BASELINE)[:2], "RETRO": load_pretrained(RETRO)[:2]}
    for name, (params, config) in models.items():
        path = out / name.lower() / CHECKPOINT
        if not path.exists():
            save_params(path, params, config)
        console.print(f"{name}: {count_parameters(config, True):,} parameters, trained on Python 3.11's library")
    return models


def _trained(out, plan, database, console) -> dict:
    """Both models, trained for as long as the plan has room."""
    configs = model_configs(database)
    plan = _plan_training(out, plan, database, configs)
    models = {}
    for name, config in configs.items():
        console.rule(f"2 · from scratch: {name}, {count_parameters(config, True):,} parameters", align="left")
        training = recipe.training_config(config, plan["steps"], plan["seed"])
        models[name] = train(database, config, training, out / name.lower(), description=name), config
        console.print(f"{training.steps} steps of {training.batch_size * training.sequence_length} tokens")
    plot_losses({"baseline": read_log(out / "baseline"), "RETRO[ON]": read_log(out / "retro")}, out / "loss.png")
    return models


def model_configs(database: Database) -> dict:
    """The demo's two models: the recipe's."""
    config = recipe.retro_config(database.vocabulary_size, database.chunk_size)
    return {"baseline": recipe.baseline_of(config), "RETRO": config}


def _plan_training(out, plan, database, configs) -> dict:
    """How many steps fit: from a few steps of each model, measured once."""
    if "steps" in plan:
        return plan
    seconds = 0.0
    for config in configs.values():
        params, training = init_params(config, np.random.default_rng(0)), recipe.training_config(config, 1, 0)
        state = adamw_init(params)
        k, times = training.neighbours if config.retrieves else 0, []
        for step in range(4):
            began = time.perf_counter()
            batch = training_batch(
                database, database.split("train"), k, sequence_length=training.sequence_length,
                batch_size=training.batch_size, seed=0, step=step,
            )  # fmt: skip
            train_step(params, state, config, batch, training, step)
            times.append(time.perf_counter() - began)
        seconds += sorted(times)[1]
    steps = max(20, int(TRAINING * 60 * plan["minutes"] / seconds))
    plan = plan | {"steps": steps, "models": {name: asdict(config) for name, config in configs.items()}}
    write_json(out / "plan.json", plan)
    return plan


def _describe_slice(database, console) -> None:
    train_part, held = database.manifest["splits"]["train"], database.manifest["splits"]["valid"]
    whole = sum(1 for _ in find_corpus(STDLIB).names())
    console.print(
        f"{train_part['documents'] + held['documents']} of the standard library's {whole} modules "
        f"({(train_part['bytes'] + held['bytes']) / 1e6:.1f} MB, chosen by a hash of the name), "
        f"{held['documents']} of them held out; {train_part['chunks']:,} chunks of {database.chunk_size} tokens "
        "in the database"
    )


def _evaluate(out, models, database, plan) -> dict:
    path = out / "results.json"
    if path.exists():
        try:
            results = json.loads(path.read_bytes())
            if results["models"] and results["sentence"]:
                return results
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{path} is damaged: remove it, and the demo evaluates again")
    results = evaluate(models, database, out, k=recipe.NEIGHBOURS, limit=plan["evaluated_chunks"], **WINDOW)
    plot_leakage(results["alphas"], results["bpb_alpha"], out / "bpb_alpha.png")
    return results


def _write_samples(out, params, config, database, results, plan) -> None:
    """A page of samples: a prompt of ours, and the beginnings of held-out modules."""
    split = database.split("valid")
    prompts = [("a prompt of our own", PROMPT)]
    seen = set()
    for row in range(len(split.tokens)):
        document = int(split.documents[row])
        if document not in seen and len(prompts) < SAMPLES:
            seen.add(document)
            prompts.append((database.documents[document]["name"], database.text(split.tokens[row])))
    settings = {"temperature": 0.8, "top_p": 0.95, "seed": plan["seed"]}
    samples = [
        {"heading": f"From {name}", "chunks": sample_chunks(params, config, database, prompt, 128, 2, **settings)}
        for name, prompt in prompts
    ]
    figures = {name: f"{line['bpb']:.4f} bits per byte" for name, line in results["models"].items()}
    write_page(out / "samples.html", "RETRO's samples, and what they retrieved", samples, figures)


def _write_inspection(out, params, config, database) -> None:
    """The beginning of a held-out module, taken apart: of the one that has most in common with what it retrieved."""
    split = database.split("valid")
    leakage = chunk_leakage(database, limit=LOOKED_THROUGH)
    long = [run for run in document_runs(split.documents[: len(leakage)]) if run[1] - run[0] >= INSPECTED]
    begin, _ = max(long, key=lambda run: leakage[run[0] : run[0] + INSPECTED].mean(), default=(0, 0))
    tokens = split.tokens[begin : begin + INSPECTED].reshape(-1)
    facts = {"held-out module": database.documents[int(split.documents[begin])]["name"]}
    inspection = inspect(params, config, database, tokens[tokens != 0], k=recipe.NEIGHBOURS)
    write_inspection(out / "inspect.html", "A held-out module under RETRO", facts, inspection)
