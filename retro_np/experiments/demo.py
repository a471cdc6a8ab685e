"""`retro-np demo`: the whole path on Python's standard library, in about ten minutes on two cores."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.experiments.compare import compare
from retro_np.files import locked, remove_partial, visible, write_json
from retro_np.nn.model import retro
from retro_np.parameters import count_parameters, init_params
from retro_np.report.plots import plot_losses
from retro_np.report.samples import sample_chunks, write_page
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.corpus import STDLIB, find_corpus
from retro_np.retrieval.database import Database
from retro_np.training.adamw import adamw_init, adamw_update
from retro_np.training.batches import training_batch
from retro_np.training.checkpoint import TrainingConfig
from retro_np.training.loop import loss_and_gradients, read_log, train

DEFAULT_MINUTES = 10.0
MOST_MINUTES = 10_000.0
# How the time is shared out: BERT's keys, training of both models, evaluation. The rest is tokenizer, index, samples.
EMBEDDING, TRAINING, EVALUATION = 0.35, 0.42, 0.12
BYTES_A_CHUNK = 230  # of 64 tokens of this corpus, measured; only the plan hangs on it
SMALLEST_SLICE = 300_000  # bytes: below that there is nothing to learn, nor to hold out
PROMPT = 'def read_json(path):\n    """Read a JSON file and return the object in it."""\n'
SAMPLES = 3


def run_demo(minutes: float | None, out: Path, seed: int | None, console: Console) -> dict:
    """Build, train, evaluate, sample; leave everything in `out` and print one table. Returns the results.

    minutes, seed: None: the plan's that is in `out`, else ten minutes and seed 0. What is there is reused; a demo that
    was stopped goes on with the plan that it had made. Raises UserError where `out` holds a demo of another plan.
    """
    out = Path(out)
    with locked(out, "demo"):
        remove_partial(out)
        bert = load_bert()
        plan = _plan(out, minutes, seed, bert, console)
        console.rule("1 · the database", align="left")
        database = build_database(STDLIB, out / "db", BuildConfig(limit_bytes=plan["limit_bytes"]), bert)
        _describe_slice(database, plan, console)
        plan = _plan_training(out, plan, database, console)
        training = TrainingConfig(steps=plan["steps"], seed=plan["seed"], **TRAINING_SETTINGS)
        models = {}
        for number, (name, config) in enumerate(model_configs(database).items(), start=2):
            console.rule(f"{number} · {name}, {count_parameters(config, True):,} parameters", align="left")
            params = train(database, config, training, out / name.lower(), description=name)
            console.print(f"{training.steps} steps of {training.batch_size * training.sequence_length} tokens")
            models[name] = (params, config)
        plot_losses({"baseline": read_log(out / "baseline"), "RETRO[ON]": read_log(out / "retro")}, out / "loss.png")
        console.rule("4 · evaluation on held-out modules", align="left")
        results = _evaluate(out, models, database, plan)
        console.rule("5 · samples", align="left")
        if not (out / "samples.html").exists():
            _write_samples(out, *models["RETRO"], database, results, plan)
        return results


TRAINING_SETTINGS = {"sequence_length": 512, "batch_size": 4, "learning_rate": 2e-3, "warmup": 30}


def model_configs(database: Database) -> dict[str, RetroConfig]:
    """The demo's two models: the same decoder, without and with retrieval."""
    retro_config = RetroConfig(
        vocabulary_size=database.vocabulary_size,
        d_model=128,
        d_ffw=512,
        n_heads=4,
        d_head=32,
        n_layers=4,
        cca_layers=(2, 4),
        chunk_size=database.chunk_size,
        encoder=EncoderConfig(d_model=128, d_ffw=512, n_heads=4, d_head=32, n_layers=1, ca_layers=(1,)),
    )
    return {"baseline": replace(retro_config, cca_layers=(), encoder=None), "RETRO": retro_config}


def _plan(out, minutes, seed, bert, console) -> dict:
    """How much of the library fits: from BERT's speed, measured once and written down."""
    path = out / "plan.json"
    if path.exists():
        plan = _read_plan(path)
        for name, value in (("minutes", minutes), ("seed", seed)):
            if value is not None and value != plan[name]:
                raise UserError(
                    f"{out} holds a demo of {name} {plan[name]}, and {value} is asked for: "
                    "leave the option out to go on with it, or give another folder with -o"
                )
        return plan
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if not 0 < minutes <= MOST_MINUTES:
        raise UserError(f"a demo takes from half a minute to {MOST_MINUTES:,.0f} minutes, not {minutes}")
    if any(visible(out)):
        raise UserError(f"{out} holds other files: give a new folder for the demo")
    texts = []
    for document in find_corpus(STDLIB).documents():
        texts += [document.text[i : i + BYTES_A_CHUNK] for i in range(0, len(document.text), 8 * BYTES_A_CHUNK)]
        if len(texts) > 256:
            break
    bert.embed(texts[:32], show_progress=False)  # the first products also start BLAS's threads
    began = time.perf_counter()
    bert.embed(texts[:256], show_progress=False)
    speed = 256 / (time.perf_counter() - began)
    chunks = EMBEDDING * 60 * minutes * speed
    plan = {
        "minutes": minutes,
        "seed": 0 if seed is None else seed,
        "chunks_per_s": round(speed, 1),
        "limit_bytes": max(SMALLEST_SLICE, int(chunks * BYTES_A_CHUNK)),
    }
    write_json(path, plan)
    console.print(
        f"BERT makes {speed:.0f} keys a second here: {minutes:g} minutes leave room for "
        f"{plan['limit_bytes'] / 1e6:.1f} MB of text"
    )
    return plan


def _read_plan(path) -> dict:
    try:
        plan = json.loads(path.read_bytes())
        if {"minutes", "seed", "limit_bytes"} <= plan.keys():
            return plan
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is damaged: remove {path.parent}, or give another folder with -o")


def _plan_training(out, plan, database, console) -> dict:
    """How many steps fit, and how many chunks to evaluate: from a few steps of each model, measured once."""
    if "steps" in plan:
        return plan
    seconds, forward = 0.0, 0.0
    settings = {name: TRAINING_SETTINGS[name] for name in ("sequence_length", "batch_size")}
    for config in model_configs(database).values():
        params = init_params(config, np.random.default_rng(0))
        state = adamw_init(params)
        k = 2 if config.retrieves else 0
        times = []
        for step in range(4):
            began = time.perf_counter()
            batch = training_batch(database, database.split("train"), k, seed=0, step=step, **settings)
            _, grads = loss_and_gradients(params, config, *batch)
            adamw_update(params, grads, state, lr=1e-4)
            times.append(time.perf_counter() - began)
        seconds += sorted(times)[1]
        began = time.perf_counter()
        retro(params, config, batch[0], batch[2])
        forward += 2 * (time.perf_counter() - began)  # evaluated twice each: ON and shuffled, OFF and baseline
    steps = max(20, int(TRAINING * 60 * plan["minutes"] / seconds))
    windows = EVALUATION * 60 * plan["minutes"] / forward * settings["batch_size"]
    held = database.manifest["splits"]["valid"]["chunks"]
    evaluated = min(held, max(64, int(windows * 256 / database.chunk_size)))
    plan = plan | {"steps": steps, "evaluated_chunks": evaluated, "models": _model_dicts(database)}
    write_json(out / "plan.json", plan)
    return plan


def _model_dicts(database):
    return {name: asdict(config) for name, config in model_configs(database).items()}


def _describe_slice(database, plan, console) -> None:
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
        return json.loads(path.read_text())
    return compare(models, database, out, limit=plan["evaluated_chunks"])


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
