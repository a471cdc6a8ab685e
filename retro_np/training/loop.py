"""The training loop. A run that resumes at any step ends with exactly the parameters of an uninterrupted run."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np

from retro_np.checkpoint import CHECKPOINT, load_checkpoint, load_params, read_meta, save_checkpoint, write_tensors
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.files import locked, outputs, remove_partial, write_json
from retro_np.files.untrusted import has_types, read_json
from retro_np.info import check_memory
from retro_np.nn.memory import StateCache, model_neighbours
from retro_np.nn.model import retro_loss
from retro_np.nn.operators import present
from retro_np.nn.scope import every
from retro_np.optim import adamw_init, adamw_update, clip_by_global_norm
from retro_np.parameters import init_params, parameter_shapes
from retro_np.progress import progress_bar, say
from retro_np.renamed import new_names
from retro_np.retrieval.database import Database
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import (
    NO_TARGET,
    check_fit,
    evaluation_windows,
    model_tokens,
    scored_windows,
    sequence_neighbours,
)
from retro_np.training.batches import Batch, training_batch
from retro_np.training.config import TrainingConfig, learning_rate
from retro_np.training.curriculum import with_curriculum
from retro_np.training.loggers import LOG, cut_log, read_log  # noqa: F401  # callers import read_log from here
from retro_np.tree import Tree, map_tree, named_leaves

BEST, SETTINGS = "best.safetensors", "config.json"
RATE_OF_GATES = 10  # times the learning rate, for the gates of a memory (nn/memory.py)
WATCHING = ("checkpoint_every", "eval_every", "eval_chunks", "cache_mb")  # settings that do not change what is learned


def retrofit(
    baseline: Tree, baseline_config: RetroConfig, cca_layers: Sequence[int], encoder: EncoderConfig | None,
    rng: np.random.Generator,
) -> tuple[Tree, RetroConfig]:  # fmt: skip
    """Add fresh chunked cross-attention and a fresh encoder to a trained baseline. Paper §4.2.

    baseline, baseline_config: the model, as `load_params` returns it. cca_layers: the layers, counted from 1, that get
    cross-attention. encoder: the neighbour encoder's sizes; None for a decoder that others trained, which then encodes
    its neighbours itself (nn/memory.py). rng: draws the new parameters.
    Returns (params, config). The baseline's arrays are shared, not copied, and with retrieval off the model equals the
    baseline bit for bit. To train only the new parameters, pass `trainable=retro_np.parameters.is_retrieval` to
    `train`. Raises UserError if the baseline has cross-attention, and if cca_layers is empty or does not fit."""
    if baseline_config.retrieves:
        raise UserError("RETROfit starts from a baseline, but this checkpoint already has chunked cross-attention")
    if not cca_layers:
        raise UserError("RETROfit trains chunked cross-attention: name at least one layer for it")
    config = replace(baseline_config, cca_layers=tuple(cca_layers), encoder=encoder)
    if not config.is_retro:
        return init_params(config, rng, given=dict(named_leaves(baseline))), config
    baseline_leaves = dict(named_leaves(baseline))
    if config.copying_start:  # the encoder's own embedding, if it has one, starts as a copy of the decoder's
        baseline_leaves["encoder.embedding"] = baseline["embedding"].copy()
    return map_tree(lambda name, fresh: baseline_leaves.get(name, fresh), init_params(config, rng)), config


def loss_and_gradients(
    params: Tree, config: RetroConfig, batch: Batch, micro_batches: int = 1,
    dropout_key: tuple[int, ...] | None = None, trainable: Callable[[str], bool] = every,
    cache: StateCache | None = None,
) -> tuple[float, Tree]:  # fmt: skip
    """Loss and gradients of a batch, computed in `micro_batches` equal parts to save memory.

    Each part is weighted by its share of the batch's targets. cache: of neighbours that a frozen decoder has encoded.
    Arguments otherwise as in `retro_loss`."""
    tokens, targets, neighbours = _seen_by(config, batch)
    counted = present(targets, config.padding_id)
    n_targets = max(int(np.count_nonzero(counted)), 1)
    loss, grads = 0.0, None
    for number, rows in enumerate(np.split(np.arange(len(tokens)), micro_batches)):
        key = None if dropout_key is None else (*dropout_key, number)
        share = np.count_nonzero(counted[rows]) / n_targets
        part = None if neighbours is None else neighbours[rows]
        inputs = tokens[rows], targets[rows], model_neighbours(params, config, part, cache)
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


def batch_loss(params: Tree, config: RetroConfig, batch: Batch) -> float:
    """The loss of a batch alone. Its neighbours may be encoded."""
    return float(retro_loss(params, config, *_seen_by(config, batch), trainable=lambda _: False)[0])


def _seen_by(config: RetroConfig, batch: Batch) -> Batch:
    """A batch as a model takes it: ids that a database adds to the vocabulary of others are padding, or no targets."""
    tokens, targets, neighbours = batch
    return model_tokens(config, tokens), np.where(targets < config.vocabulary_size, targets, NO_TARGET), neighbours


def train(
    database: Database, config: RetroConfig, training: TrainingConfig, out: Path | str, *,
    begin_from: tuple[Tree, str] | None = None, trainable: Callable[[str], bool] = every, description: str = "training",
    callbacks: Iterable[Callable[[dict[str, Any]], object]] = (), trained_on: Iterable[str] = (),
    keep_steps: bool = False, base: dict[str, str] | None = None,
) -> Tree:  # fmt: skip
    """Train a model on a database's training split.

    database: gives the sequences and their neighbours. config: the model; its vocabulary_size and chunk_size must be
    the database's. training: steps, batches, learning rate, seed.
    out: the run's folder, created if necessary. It receives config.json, checkpoint.safetensors (for `load_params` and
        `generate`) and log.jsonl (per step: loss in nats per token, learning rate, gradient norm, tokens per second).
        With eval_every, some steps also have valid_loss (nats per token) and valid_bpb, and best.safetensors has the
        parameters of the lowest valid_loss up to the last checkpoint.
    begin_from: (params, name) to start from these parameters instead of fresh ones. They are not changed. The name,
        any text, identifies them, because a run resumes only if it started from the same parameters.
    trainable: decides from a parameter's dotted name whether it is trained. The other parameters do not change.
    description: the label of the progress bar.
    trained_on: hashes of the documents that these parameters were trained on; the checkpoints carry them on.
    callbacks: each is called with each line of the log, a dict, once it is written. See `training/loggers.py`. What one
        of them raises ends the training, after the step's checkpoint if one is due. The log keeps the step's line, and
        the same call resumes at the last checkpoint.
    base: name and sha256 of the model that others trained to which begin_from adds what is trained. The run's files
        then hold only that.
    keep_steps: whether a run in `out` keeps its own number of steps, whatever `training.steps` is, and says so.

    Returns the trained parameters. If `out` holds a run with the same settings, training resumes at its last checkpoint
    and ends with the same bytes as an uninterrupted run; a finished run is only read, or prolonged if `steps` is more.
    Raises UserError if `out` holds a different run or is in use, if the model does not fit the database, if nothing is
    held out for eval_every, if a callback cannot be called, and if a loss is not finite. Then the error names the
    step, and the last checkpoint remains."""
    out, called = Path(out), tuple(callbacks) if isinstance(callbacks, Iterable) else (None,)
    if not all(map(callable, called)):
        raise UserError(f"callbacks must be a list of functions that take a line (a dict), not {shortened(callbacks)}")
    check_fit(config, database, training.sequence_length)
    if not database.manifest["splits"]["train"]["chunks"]:
        raise UserError(f"{database.path} has no training documents: add some with retro-np add")
    cache, added = None, {"base": base} if base else {}
    if config.reads_itself:
        cache = StateCache(training.cache_mb << 20, same_bits=True)
        each = 4 * 2 * config.chunk_size * config.d_model * len(config.cca_layers)  # bytes of an encoded neighbour
        needed = min(cache.limit, each * database.n_chunks)
        check_memory(needed, "the encoded neighbours that are kept", "cache_mb (--cache-mb)", needed >> 20)
    evaluate = validation(database, config, training, cache) if training.eval_every else None
    frozen = [name for name, _ in named_leaves(parameter_shapes(config)) if not trainable(name)]
    start: dict[str, Any] = {"begun_from": begin_from[1] if begin_from else None, "frozen": frozen}
    start |= {"trained_on": sorted(trained_on)} if trained_on else {}
    identity = {"model": config.to_dict(), "training": asdict(training), "data": {**database.identity, **start}}
    identity = json.loads(json.dumps(identity, default=np.generic.item))  # as a checkpoint stores it
    outputs.claim(out, outputs.RUN)
    with locked(out, "training run"):
        remove_partial(out)
        settings = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
        if (out / CHECKPOINT).exists():
            whole = named_leaves(begin_from[0] if base and begin_from else {})
            given = {name: leaf for name, leaf in whole if not trainable(name)}
            params, state, _, stored = load_checkpoint(out / CHECKPOINT, given)
            _resume(out / CHECKPOINT, stored, identity, state["step"], keep_steps)
        else:
            if settings:  # The run's checkpoint was removed, or it was killed before the first one.
                _resume(out / SETTINGS, settings, identity, 0, keep_steps)
            params = begin_from[0] if begin_from else init_params(config, np.random.default_rng(training.seed))
            # Training must not change the caller's arrays.
            params = map_tree(lambda name, array: array.copy() if trainable(name) else array, params)
            state = adamw_init(params, trainable)
        training = TrainingConfig(**identity["training"])
        if state["step"] < training.steps or not settings or settings["training"].get("steps") != training.steps:
            write_json(out / SETTINGS, identity)  # first, because it marks the folder as a run's
        if not (out / CHECKPOINT).exists():
            save_checkpoint(out / CHECKPOINT, params, state, config, identity, added, trainable if base else every)
        cut_log(out / LOG, state["step"])
        rest = trainable, description, evaluate, called, cache, added
        _take_steps(database, config, training, out, params, state, identity, *rest)
    return params


def _take_steps(
    database, config, training, out, params, state, identity, trainable, description, evaluate, callbacks, cache, base
):
    """Train from the state's step to the last one, in place. Logs each step and saves a checkpoint at intervals."""
    selects = trainable if base else every  # tells which parameters the run's files hold
    split, k = database.split("train"), training.neighbours if config.retrieves else 0
    names = ("sequence_length", "batch_size", "seed", "random_share")
    settings = {name: getattr(training, name) for name in names}
    if training.segments[-1:] == (state["step"],):
        schedule = f"the schedule is {training.schedule} over {training.steps} steps"
        say(f"{out} continues from step {state['step']} to {training.steps}: {schedule}")
    given = {name: leaf for name, leaf in named_leaves(params) if not selects(name)}
    best, kept = _best_so_far(out / BEST, state["step"], training, evaluate, given), {}
    with progress_bar(description, training.steps, state["step"]) as advance, (out / LOG).open("a") as log:
        advance(0, note="the first step compiles the kernels")
        for step in range(state["step"], training.steps):
            start_time = time.perf_counter()
            tokens, targets, neighbours = training_batch(database, split, k, step=step, **settings)
            if neighbours is not None:
                neighbours = with_curriculum(neighbours, tokens, training, step, database.padding)
            if cache is not None and neighbours is not None:
                # Only the last token would read the last chunk's neighbours, which cost as much as the others.
                neighbours[:, -1] = database.padding
            line = train_step(params, state, config, (tokens, targets, neighbours), training, step, trainable, cache)
            line["tokens_per_s"] = speed = tokens.size / (time.perf_counter() - start_time)
            saves = (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps
            if evaluate and ((step + 1) % training.eval_every == 0 or step + 1 == training.segment_end(step)):
                advance(0, note="evaluating on held-out documents")
                line |= evaluate(params)
                if not math.isfinite(line["valid_loss"]):
                    raise UserError(f"step {step}: valid_loss is {line['valid_loss']}; use a lower learning rate")
                if not line["valid_loss"] >= best:  # The file of a stranger may give NaN.
                    best, place = line["valid_loss"], {"step": step + 1, "segment_end": training.segment_end(step)}
                    kept = {name: leaf.copy() for name, leaf in named_leaves(params) if selects(name)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            advance(note=f"loss {line['loss']:.3f}, {speed:.0f} tokens/s")
            try:
                for callback in callbacks:
                    callback(dict(line))
            finally:
                if saves and kept:  # first: if it is then later than the checkpoint, the same steps lead to it again
                    run = {"data": identity["data"]} | place
                    write_tensors(out / BEST, kept, {"config": config.to_dict(), "run": run, **base})
                    kept = {}
                if saves:
                    save_checkpoint(out / CHECKPOINT, params, state, config, identity, base, selects)


def _best_so_far(path: Path, step: int, training: TrainingConfig, evaluate: Callable | None, given: Tree) -> float:
    """The loss of the best parameters, measured again, since other chunks may have been evaluated; inf without any.

    step: how far the run is. Parameters of a later step that the run will not take again are removed, and that is said:
    the process was killed before it had saved the checkpoint of that step, and `steps` is now different."""
    if not evaluate or not path.exists():
        return math.inf
    try:
        run = read_meta(path).get("run", {})
        known = has_types(run, {"step": int, "segment_end": int})
        if known and run["step"] > step and run["segment_end"] != training.segment_end(step):
            path.unlink()
            say(f"{path} was of step {run['step']}, which is not a step of this run: removed")
            return math.inf
        return evaluate(load_params(path, given)[0])["valid_loss"] if step < training.steps else math.inf
    except UserError as error:
        raise UserError(f"{error}, or remove it: the best parameters are then those from here on") from error


def validation(
    database: Database, config: RetroConfig, training: TrainingConfig, cache: StateCache | None = None
) -> Callable[[Tree], dict[str, float]]:
    """A function that evaluates parameters on the held-out documents (split valid) and changes nothing. Paper §4.1.

    The function returns {"valid_loss": nats per token, "valid_bpb": bits per byte}. Its windows have the training's
    sequence_length and move by half of it, so valid_bpb is what `score` gives with these settings. training: gives also
    the neighbours and eval_chunks. Raises UserError if no held-out token can be scored."""
    split, limit = database.split("valid"), training.eval_chunks
    windows = evaluation_windows(split, training.sequence_length, limit=limit)
    byte_lengths, k = token_byte_lengths(database.tokenizer), training.neighbours if config.retrieves else 0
    if limit is not None:  # The first token of the next chunk is not scored either.
        split = replace(split, tokens=Sharded([split.tokens[:limit]]))
    parts = [targets[targets >= 0] for _, _, targets in scored_windows(split, *windows, description="")]
    n_tokens, n_bytes = sum(map(len, parts)), sum(int(byte_lengths[part].sum()) for part in parts)
    if not n_tokens:
        hint = "build another with --valid or --held-out-bytes 0.1, or train without --eval-every"
        raise UserError(f"{database.path} holds out no text for tuning (valid) to evaluate training on: {hint}")

    def evaluate(params: Tree) -> dict[str, float]:
        nats = 0.0
        for rows, tokens, targets in scored_windows(split, *windows, description=""):
            neighbours = sequence_neighbours(database, split, rows, k) if k else None
            inputs = model_tokens(config, tokens), targets, model_neighbours(params, config, neighbours, cache)
            loss, _ = retro_loss(params, config, *inputs)
            nats += float(loss) * int((targets >= 0).sum())
        return {"valid_loss": nats / n_tokens, "valid_bpb": nats / (math.log(2) * n_bytes)}

    return evaluate


def train_step(
    params: Tree, state: Tree, config: RetroConfig, batch: Batch, training: TrainingConfig, step: int,
    trainable: Callable[[str], bool] = every, cache: StateCache | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Take one step of AdamW on a batch, in place.

    state: from `adamw_init`. Returns the line for the log: step, loss, learning_rate and gradient_norm. If the loss or
    the gradient is not finite, nothing is changed, and UserError names the step."""
    key = (training.seed, step)
    loss, grads = loss_and_gradients(params, config, batch, training.micro_batches, key, trainable, cache)
    norm = clip_by_global_norm(grads, training.clip)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"step {step}: the loss is {loss}, the gradient norm {norm}; use a lower learning rate")
    rate = learning_rate(
        step, peak=training.learning_rate, warmup=training.warmup, steps=training.segment_end(step),
        schedule=training.schedule, end=training.min_learning_rate,
    )  # fmt: skip
    betas = training.beta1, training.beta2

    def rate_of(name: str) -> float:
        return rate * RATE_OF_GATES if name.endswith(".gate") else rate

    adamw_update(params, grads, state, lr=rate_of, weight_decay=training.weight_decay, betas=betas)
    return {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}


def _resume(path: Path, stored: dict, requested: dict, step: int, keep_steps: bool) -> None:
    """Give the requested run the segments of the run at path, which ends here if the requested steps are more.

    step: how far the run at path is. keep_steps: as in `train`. Raises UserError if it must be finished first, and,
    naming the first difference, if it is a different run."""
    previous = {section: new_names(stored.get(section, {})) for section in requested}
    previous["model"] = {"padding_id": RetroConfig.padding_id, **previous["model"]}  # 0.1.0 did not store it.
    previous["training"] = before = {**asdict(TrainingConfig()), "segments": [], **previous["training"]}
    now = requested["training"]
    if has_types(before, {"steps": int, "segments": list}):
        if keep_steps and now["steps"] != before["steps"]:
            now["steps"] = before["steps"]
            say(f"{path.parent} holds a run of {now['steps']} steps; without --steps it keeps this number")
        if now["steps"] > before["steps"] and path.name == CHECKPOINT:
            if step < before["steps"]:
                fault = f"{path} is at step {step} of {before['steps']}: finish it first with steps = {before['steps']}"
                raise UserError(f"{fault}, then raise steps to {now['steps']}, or give the new run another folder")
            ends = [*before["segments"], before["steps"]] if before["steps"] else []
            before |= {"steps": now["steps"], "segments": ends}
        now["segments"] = now["segments"] or before["segments"]
    for section, settings in requested.items():
        for name, value in settings.items():
            if name not in WATCHING and value != previous[section].get(name):
                fault = f"{path} was trained with {name} = {previous[section].get(name)}, and now it is {value}"
                same = f"use the same value (--config {path.parent / SETTINGS} gives all of them)"
                raise UserError(f"{fault}; {same}, or give the new run another folder")
