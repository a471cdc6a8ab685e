"""The training loop. A run that resumes at any step ends with exactly the parameters of an uninterrupted run."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.checkpoint import load_checkpoint, save_checkpoint
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.files import locked, outputs, remove_partial, write_atomically, write_json
from retro_np.files.untrusted import has_types, parse_json, read_json
from retro_np.nn.model import retro_loss
from retro_np.nn.scope import every
from retro_np.optim import adamw_init, adamw_update, clip_by_global_norm, learning_rate
from retro_np.parameters import init_params, parameter_shapes
from retro_np.progress import progress_bar
from retro_np.renamed import new_names
from retro_np.retrieval.database import Database
from retro_np.sequences import check_fit, sequence_chunks
from retro_np.training.batches import Batch, training_batch
from retro_np.training.config import TrainingConfig
from retro_np.training.curriculum import with_curriculum
from retro_np.tree import Tree, map_tree, named_leaves

CHECKPOINT, SETTINGS, LOG = "checkpoint.safetensors", "config.json", "log.jsonl"


def retrofit(
    baseline: Tree, baseline_config: RetroConfig, cca_layers: Sequence[int], encoder: EncoderConfig,
    rng: np.random.Generator,
) -> tuple[Tree, RetroConfig]:  # fmt: skip
    """Add fresh chunked cross-attention and a fresh encoder to a trained baseline. Paper §4.2.

    baseline, baseline_config: the model, as `load_params` returns it. cca_layers: the layers, counted from 1, that get
    cross-attention. encoder: the neighbour encoder's sizes. rng: draws the new parameters.
    Returns (params, config). The baseline's arrays are shared, not copied, and with retrieval off the model equals the
    baseline bit for bit. To train only the new parameters, pass `trainable=retro_np.parameters.is_retrieval` to
    `train`. Raises UserError if the baseline has cross-attention, and if cca_layers is empty or does not fit."""
    if baseline_config.retrieves:
        raise UserError("RETROfit starts from a baseline, but this checkpoint already has chunked cross-attention")
    if not cca_layers:
        raise UserError("RETROfit trains chunked cross-attention: name at least one layer for it")
    config = replace(baseline_config, cca_layers=tuple(cca_layers), encoder=encoder)
    baseline_leaves = dict(named_leaves(baseline))
    if config.copying_start:  # the encoder's own embedding, if it has one, starts as a copy of the decoder's
        baseline_leaves["encoder.embedding"] = baseline["embedding"].copy()
    return map_tree(lambda name, fresh: baseline_leaves.get(name, fresh), init_params(config, rng)), config


def loss_and_gradients(
    params: Tree, config: RetroConfig, batch: Batch, micro_batches: int = 1,
    dropout_key: tuple[int, ...] | None = None, trainable: Callable[[str], bool] = every,
) -> tuple[float, Tree]:  # fmt: skip
    """Loss and gradients of a batch, computed in `micro_batches` equal parts to save memory.

    Each part is weighted by its share of the batch's targets. Arguments otherwise as in `retro_loss`."""
    tokens, targets, neighbours = batch
    n_targets = max(int(np.count_nonzero(targets)), 1)
    loss, grads = 0.0, None
    for part, rows in enumerate(np.split(np.arange(len(tokens)), micro_batches)):
        key = None if dropout_key is None else (*dropout_key, part)
        share = np.count_nonzero(targets[rows]) / n_targets
        inputs = tokens[rows], targets[rows], None if neighbours is None else neighbours[rows]
        part_loss, vjp = retro_loss(params, config, *inputs, dropout_key=key, trainable=trainable)
        loss += share * float(part_loss)
        part_grads = vjp(share)
        if grads is None:
            grads = part_grads
        else:
            for (_, total), (_, addend) in zip(named_leaves(grads), named_leaves(part_grads), strict=True):
                if total is not None:
                    total += addend
    return loss, grads


def train(
    database: Database, config: RetroConfig, training: TrainingConfig, out: Path | str, *,
    begin_from: tuple[Tree, str] | None = None, trainable: Callable[[str], bool] = every, description: str = "training",
) -> Tree:  # fmt: skip
    """Train a model on a database's training split.

    database: gives the sequences and their neighbours. config: the model; its vocabulary_size and chunk_size must be
    the database's. training: steps, batches, learning rate, seed.
    out: the run's folder, created if necessary. It receives config.json, checkpoint.safetensors (for `load_params` and
        `generate`) and log.jsonl (per step: loss in nats per token, learning rate, gradient norm, tokens per second).
    begin_from: (params, name) to start from these parameters instead of fresh ones. The arrays are copied. The name,
        any text, identifies them, because a run resumes only if it started from the same parameters.
    trainable: decides from a parameter's dotted name whether it is trained. The other parameters do not change.
    description: the label of the progress bar.

    Returns the trained parameters. If `out` holds a run with the same settings, training resumes at its last checkpoint
    and ends with the same bytes as an uninterrupted run; a finished run is only read. Raises UserError if `out` holds
    a different run or is in use, if the model does not fit the database, and if the loss is not finite. Then the
    error names the step, and the last checkpoint remains."""
    out = Path(out)
    check_fit(config, database)
    if not database.manifest["splits"]["train"]["chunks"]:
        raise UserError(f"{database.path} has no training documents: add some with retro-np add")
    sequence_chunks(training.sequence_length, config.chunk_size)
    frozen = [name for name, _ in named_leaves(parameter_shapes(config)) if not trainable(name)]
    start = {"begun_from": begin_from[1] if begin_from else None, "frozen": frozen}
    identity = {"model": config.to_dict(), "training": asdict(training), "data": {**database.identity, **start}}
    identity = json.loads(json.dumps(identity))  # as a checkpoint stores it: tuples become lists
    outputs.claim(out, outputs.RUN)
    with locked(out, "training run"):
        remove_partial(out)
        if (out / CHECKPOINT).exists():
            params, state, _, stored = load_checkpoint(out / CHECKPOINT)
            _check_same_run(out / CHECKPOINT, stored, identity)
        else:
            if (out / SETTINGS).exists():  # The run's checkpoint was removed, or it was killed before the first one.
                _check_same_run(out / SETTINGS, read_json(out / SETTINGS), identity)
            params = begin_from[0] if begin_from else init_params(config, np.random.default_rng(training.seed))
            params = map_tree(lambda _, array: array.copy(), params)  # training must not change the caller's arrays
            state = adamw_init(params, trainable)
            write_json(out / SETTINGS, identity)  # first, because it marks the folder as a run's
            save_checkpoint(out / CHECKPOINT, params, state, config, identity)
        _cut_log(out / LOG, state["step"])
        _take_steps(database, config, training, out, params, state, identity, trainable, description)
    return params


def _take_steps(database, config, training, out, params, state, identity, trainable, description) -> None:
    """Train from the state's step to the last one, in place. Logs each step and saves a checkpoint at intervals."""
    split = database.split("train")
    k = training.neighbours if config.retrieves else 0
    settings = {name: getattr(training, name) for name in ("sequence_length", "batch_size", "seed")}
    with progress_bar(description, training.steps, state["step"]) as advance, (out / LOG).open("a") as log:
        advance(0, note="the first step compiles the kernels")
        for step in range(state["step"], training.steps):
            start_time = time.perf_counter()
            tokens, targets, neighbours = training_batch(database, split, k, step=step, **settings)
            if neighbours is not None:
                neighbours = with_curriculum(neighbours, tokens, training, step)
            line = train_step(params, state, config, (tokens, targets, neighbours), training, step, trainable)
            line["tokens_per_s"] = speed = tokens.size / (time.perf_counter() - start_time)
            log.write(json.dumps(line) + "\n")
            advance(note=f"loss {line['loss']:.3f}, {speed:.0f} tokens/s")
            if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
                log.flush()
                save_checkpoint(out / CHECKPOINT, params, state, config, identity)


def train_step(
    params: Tree, state: Tree, config: RetroConfig, batch: Batch, training: TrainingConfig, step: int,
    trainable: Callable[[str], bool] = every,
) -> dict[str, Any]:  # fmt: skip
    """Take one step of AdamW on a batch, in place.

    state: from `adamw_init`. Returns the line for the log: step, loss, learning_rate and gradient_norm. If the loss or
    the gradient is not finite, nothing is changed, and UserError names the step."""
    key = (training.seed, step)
    loss, grads = loss_and_gradients(params, config, batch, training.micro_batches, key, trainable)
    norm = clip_by_global_norm(grads, training.clip)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"step {step}: the loss is {loss}, the gradient norm {norm}; use a lower learning rate")
    rate = learning_rate(step, peak=training.learning_rate, warmup=training.warmup, steps=training.steps)
    adamw_update(params, grads, state, lr=rate, weight_decay=training.weight_decay)
    return {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}


def read_log(out: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, one per step. An empty list if there is no log."""
    path = Path(out) / LOG
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _cut_log(log: Path, step: int) -> None:
    """Remove the log's lines from `step` on, because these steps will run again."""
    if not log.exists():
        return
    lines = []
    for line in log.read_bytes().splitlines():
        try:
            logged = parse_json(line, str(log))
        except UserError:  # A killed run may leave half a line. Nothing depends on the log.
            break
        if has_types(logged, {"step": int}) and logged["step"] < step:
            lines.append(line + b"\n")
    write_atomically(log, b"".join(lines))


def _check_same_run(path: Path, stored: dict, requested: dict) -> None:
    """Raise UserError, naming the first difference, if the checkpoint at path belongs to a different run."""
    for section, settings in requested.items():
        previous = new_names(stored.get(section, {}))
        for name, value in settings.items():
            if name != "checkpoint_every" and value != previous.get(name):
                fault = f"{path} was trained with {name} = {previous.get(name)}, and now it is {value}"
                raise UserError(f"{fault}; use the same value, or give the new run another folder")
