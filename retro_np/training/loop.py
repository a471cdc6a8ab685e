"""The training loop: resumable at any step, to the same bits."""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from retro_np.checkpoint import load_checkpoint, save_checkpoint
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.files import locked, remove_partial, write_atomically, write_json
from retro_np.nn.model import retro_loss
from retro_np.nn.scope import every
from retro_np.optim import adamw_init, adamw_update, clip_by_global_norm, learning_rate
from retro_np.parameters import init_params, parameter_shapes
from retro_np.progress import progress_bar
from retro_np.renamed import new_names
from retro_np.retrieval.database import Database
from retro_np.sequences import check_fit, sequence_chunks
from retro_np.training.batches import training_batch
from retro_np.training.config import TrainingConfig
from retro_np.training.curriculum import with_curriculum
from retro_np.tree import Tree, leaves, map_tree

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


def retrofit(
    baseline: Tree, baseline_config: RetroConfig, cca_layers, encoder: EncoderConfig, rng
) -> tuple[Tree, RetroConfig]:
    """Give a baseline fresh CCA and encoder (paper §4.2): with retrieval off it stays the baseline to the bit."""
    if baseline_config.retrieves:
        raise UserError("RETROfit starts from a baseline, and this checkpoint already has chunked cross-attention")
    if not cca_layers:
        raise UserError("RETROfit trains chunked cross-attention: name at least one layer for it")
    config = replace(baseline_config, cca_layers=tuple(cca_layers), encoder=encoder)
    trained = dict(leaves(baseline))
    if config.copying_start:  # the encoder's table begins as the decoder's; where both share one, there is none
        trained["encoder.embedding"] = baseline["embedding"].copy()
    return map_tree(lambda name, fresh: trained.get(name, fresh), init_params(config, rng)), config


def loss_and_gradients(
    params, config, tokens, targets, neighbours, *, micro_batches=1, dropout_key=None, trainable=every
):
    """Loss and gradients of a batch, taken in `micro_batches` equal parts that together equal the whole.

    Each part counts by its share of targets, since the loss is the mean over the targets of the batch.
    """
    total = max(np.count_nonzero(targets), 1)
    loss, grads = 0.0, None
    for part, rows in enumerate(np.split(np.arange(len(tokens)), micro_batches)):
        key = None if dropout_key is None else (*dropout_key, part)
        part_neighbours = None if neighbours is None else neighbours[rows]
        share = np.count_nonzero(targets[rows]) / total
        part_loss, vjp = retro_loss(
            params, config, tokens[rows], targets[rows], part_neighbours, dropout_key=key, trainable=trainable
        )
        loss += share * float(part_loss)
        part_grads = vjp(share)
        if grads is None:
            grads = part_grads
        else:
            for (_, whole), (_, more) in zip(leaves(grads), leaves(part_grads), strict=True):
                if whole is not None:
                    whole += more
    return loss, grads


def train(
    database: Database,
    config: RetroConfig,
    training: TrainingConfig,
    out,
    *,
    begin_from: tuple[Tree, str] | None = None,
    trainable=every,
    description: str = "training",
) -> Tree:
    """Train on the database's training split, and leave checkpoint.safetensors, log.jsonl and config.json in `out`.

    begin_from: (parameters, a name that identifies them) to start from; None: fresh ones from the seed.
    A run that was stopped goes on from its last checkpoint and ends in the same bytes as one that was not; a finished
    one is read and returned. Raises UserError where `out` holds another run or is in use by one, where the loss is not
    finite (the step is named, the last good checkpoint kept), and where the model does not fit the database.
    """
    out = Path(out)
    check_fit(config, database)
    if not database.manifest["splits"]["train"]["chunks"]:
        raise UserError(f"every training document of {database.path} was removed: add some, with retro-np add")
    sequence_chunks(training.sequence_length, config.chunk_size)
    frozen = [name for name, _ in leaves(parameter_shapes(config)) if not trainable(name)]
    identity = run_identity(config, training, database.identity, begin_from[1] if begin_from else None, frozen)
    with locked(out, "training run"):
        remove_partial(out)
        if (out / CHECKPOINT).exists():
            params, state, _, found = load_checkpoint(out / CHECKPOINT)
            same_run(out / CHECKPOINT, {section: new_names(facts) for section, facts in found.items()}, identity)
        else:
            params = begin_from[0] if begin_from else init_params(config, np.random.default_rng(training.seed))
            params = map_tree(lambda _, array: array.copy(), params)  # the caller's arrays stay as they are
            state = adamw_init(params, trainable)
            save_checkpoint(out / CHECKPOINT, params, state, config, identity)
        write_json(out / "config.json", identity)
        _forget_after(out / LOG, state["step"])
        _take_steps(database, config, training, out, params, state, identity, trainable, description)
    return params


def _take_steps(database, config, training, out, params, state, identity, trainable, description) -> None:
    """From the state's step to the last one, in place; a line of the log each, a checkpoint now and then."""
    checkpoint = out / CHECKPOINT
    split = database.split("train")
    k = training.neighbours if config.retrieves else 0
    tokens_a_step = training.batch_size * training.sequence_length
    start = state["step"]
    with progress_bar(description, training.steps, start) as advance, (out / LOG).open("a") as log:
        advance(0, note="the first step compiles the kernels, once")
        for step in range(start, training.steps):
            began = time.perf_counter()
            tokens, targets, neighbours = training_batch(
                database, split, k, sequence_length=training.sequence_length, batch_size=training.batch_size,
                seed=training.seed, step=step,
            )  # fmt: skip
            if neighbours is not None:
                neighbours = with_curriculum(neighbours, tokens, training, step)
            line = train_step(
                params, state, config, (tokens, targets, neighbours), training, step, trainable,
                f"{checkpoint} is of an earlier step. Try a lower learning rate in another folder",
            )  # fmt: skip
            line["tokens_per_s"] = speed = tokens_a_step / (time.perf_counter() - began)
            log.write(json.dumps(line) + "\n")
            advance(note=f"loss {line['loss']:.3f}, {speed:.0f} tokens/s")
            if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
                log.flush()
                save_checkpoint(checkpoint, params, state, config, identity)


def train_step(params, state, config, batch, training: TrainingConfig, step: int, trainable=every, advice="") -> dict:
    """One step of AdamW on a batch (tokens, targets, neighbours), in place. Returns step, loss, rate and norm.

    Raises UserError with the step's number and the advice where loss or gradient is not finite; nothing has changed.
    """
    loss, grads = loss_and_gradients(
        params, config, *batch, micro_batches=training.micro_batches, dropout_key=(training.seed, step),
        trainable=trainable,
    )  # fmt: skip
    norm = clip_by_global_norm(grads, training.clip)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"step {step}: the loss is {loss} and the gradient's norm {norm}; training stopped, {advice}")
    rate = learning_rate(step, peak=training.learning_rate, warmup=training.warmup, steps=training.steps)
    adamw_update(params, grads, state, lr=rate, weight_decay=training.weight_decay)
    return {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}


def read_log(out) -> list[dict]:
    """The lines of a run's log.jsonl."""
    path = Path(out) / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _forget_after(log: Path, step: int) -> None:
    """Drop the log's lines of steps that the checkpoint does not hold: they are about to be run again."""
    if not log.exists():
        return
    kept = []
    for line in log.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):  # the line that a kill cut short, or damage: the log is no state
            break
    write_atomically(log, b"".join(kept))


def same_run(path, found: dict, wanted: dict) -> None:
    """Raise UserError, naming the first difference, unless the checkpoint at path is of the run that is wanted."""
    for section in wanted:
        for name, value in wanted[section].items():
            other = found.get(section, {}).get(name)
            if name != "checkpoint_every" and value != other:
                raise UserError(
                    f"{path} was trained with {name} = {other}, and now it is {value}; "
                    "give the same, or another folder for another run"
                )


def run_identity(
    config: RetroConfig, training: TrainingConfig, database_identity: dict, begun_from: str | None, frozen: list[str]
) -> dict:
    """What makes two runs the same run: model, training, data, the weights it began from, and those it leaves."""
    identity = {
        "model": config.to_dict(),
        "training": asdict(training),
        "data": {**database_identity, "begun_from": begun_from, "frozen": frozen},
    }
    return json.loads(json.dumps(identity))  # as it comes back from a checkpoint: lists for tuples
