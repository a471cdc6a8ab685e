"""A training run's state in one file: parameters, optimiser, step, configuration."""

import json
import math
from dataclasses import asdict, dataclass

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.parameters import (
    config_from,
    in_single_precision,
    load_params,
    read_meta,
    read_tensors,
    tree_from,
    write_tensors,
)
from retro_np.retrieval.database import Database
from retro_np.tree import Tree, leaves, map_tree


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults suit a model of a few million parameters; paper §2.5 and appendix C give the rest."""

    steps: int = 1000
    sequence_length: int = 512  # n, whole chunks
    batch_size: int = 4  # sequences a step
    micro_batches: int = 1  # parts that a step is split into, to save memory
    neighbours: int = 2  # k; 0 trains with retrieval off
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50  # steps; has no influence on what is learned
    retrieval_off: float = 0.0  # share of sequences that are given no neighbours
    lent: float = 0.0  # share of chunks that are lent their own continuation at first, see `curriculum.py`
    lent_steps: int = 0  # after which none is

    def __post_init__(self):
        for name in ("steps", "sequence_length", "batch_size", "micro_batches", "checkpoint_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} is a whole number of at least 1, not {getattr(self, name)}")
        if self.neighbours < 0 or self.warmup < 0 or self.seed < 0:
            raise UserError("neighbours, warmup and seed are at least 0")
        if not 0 < self.learning_rate <= 1 or not self.clip > 0 or not 0 <= self.weight_decay < math.inf:
            raise UserError("learning_rate is above 0 and at most 1, clip above 0, weight_decay at least 0")
        if not 0 <= self.retrieval_off < 1 or not 0 <= self.lent <= 1 or self.lent_steps < 0:
            raise UserError("retrieval_off is a share below 1, lent one from 0 to 1, lent_steps at least 0")
        if (self.lent > 0) != (self.lent_steps > 0):
            raise UserError("lent and lent_steps go together: how many chunks are lent, and for how many steps")
        if not self.neighbours and (self.lent or self.retrieval_off):
            raise UserError(
                "without neighbours (k = 0) there are none to lend or to leave out: leave those options out"
            )
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"a batch of {self.batch_size} sequences does not split into {self.micro_batches} equal parts"
            )


def save_checkpoint(path, params: Tree, state: Tree, config: RetroConfig, run: dict) -> None:
    """Write parameters, AdamW's moments and step, and `run` (plain values: what identifies the run)."""
    tensors = dict(leaves(params))
    for moment in ("m", "v"):
        for name, array in leaves(state[moment], f"adamw.{moment}"):
            if array is not None:
                tensors[name] = array
    write_tensors(path, tensors, {"config": config.to_dict(), "run": run, "step": state["step"]})


def load_checkpoint(path) -> tuple[Tree, Tree, RetroConfig, dict]:
    """Read a checkpoint that a run can go on from. Returns (params, AdamW's state, config, run)."""
    tensors, meta = read_tensors(path)
    config = config_from(meta, path)
    if "run" not in meta or "step" not in meta:
        raise UserError(
            f"{path} holds parameters alone: evaluate it or sample from it, but training can't resume there"
        )
    params = tree_from(tensors, config, path)
    moments = {
        moment: map_tree(lambda name, _, moment=moment: tensors.get(f"adamw.{moment}.{name}"), params)
        for moment in ("m", "v")
    }
    return params, {"step": meta["step"], **moments}, config, meta["run"]


def load_model(path, database: Database) -> tuple[Tree, RetroConfig]:
    """Parameters and configuration of a checkpoint that is to work on a database.

    Raises UserError, beside what `load_params` raises, where vocabulary or chunks are not the database's, and where a
    training run's checkpoint was made with another tokenizer: the same ids would be other tokens.
    """
    params, config = load_params(path)
    check_fit(config, database)
    trained = read_meta(path)
    for name in ("run", "data", "tokenizer"):
        if trained is not None and not isinstance(trained, dict):
            raise UserError(f"{path}: its metadata hold no {name!r} of a training run: take another checkpoint")
        trained = None if trained is None else trained.get(name)
    ours = database.identity["tokenizer"]
    if trained not in (None, ours):  # None: parameters alone, which know of no tokenizer
        raise UserError(
            f"{path} was trained with another tokenizer ({trained!s:.6}…) than {database.path} has ({ours[:6]}…): use "
            "the database that it was trained with, or build this one with --tokenizer"
        )
    return in_single_precision(params), config


def check_fit(config: RetroConfig, database: Database) -> None:
    """Raise UserError unless model and database have the same vocabulary and chunks."""
    for name in ("vocabulary_size", "chunk_size"):
        ours, theirs = getattr(config, name), getattr(database, name)
        if ours != theirs:
            raise UserError(
                f"the model has {name} {ours}, and the database {database.path} has {theirs}: "
                "use the database that the model was trained with, or train one for this"
            )


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
