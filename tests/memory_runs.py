"""What the tests of trained memories share: a tiny decoder of others, a database with its tokenizer, and a training."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import foreign_models as foreign
import numpy as np
import pytest
from support import write_corpus

from retro_np import Database
from retro_np.cli import main
from retro_np.parameters import is_retrieval
from retro_np.pretrained.models import read_pretrained
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.training import loop
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import train
from retro_np.training.memory import add_memory

POSITIONS, M = 64, 8
TRAINING = TrainingConfig(
    steps=5, sequence_length=32, batch_size=2, learning_rate=2e-3, warmup=1, weight_decay=0.0, random_share=0.25,
    checkpoint_every=2, eval_every=3, eval_chunks=20,
)  # fmt: skip
OPTIONS = ("--sequence-length", "32", "--batch-size", "2", "--warmup", "1", "--checkpoint-every", "2")


def write_decoder(folder: Path, kind: str = "llama", seed: int = 0, **settings) -> Path:
    """A folder with a tiny random decoder, whose matrices are so small that attention is not all on one token."""
    weights = {name: 0.2 * array if array.ndim > 1 else array for name, array in foreign.tensors(kind, seed).items()}
    positions = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    if kind == "gpt2":
        weights["transformer.wpe.weight"] = np.zeros((POSITIONS, foreign.WIDTH), np.float32)
    return foreign.write_folder(folder, kind, weights, **{positions: POSITIONS} | settings)


def build(path: Path, tokenizer: Path, chunk_size: int = M) -> Path:
    """A database of random code, with a tokenizer from a file."""
    config = BuildConfig(
        chunk_size=chunk_size, tokenizer=str(tokenizer), held_out=0.3, neighbours=4, extra_candidates=6
    )
    build_database(write_corpus(path.parent / f"corpus of {path.name}"), path, config, "hashing")
    return path


def begin(model: Path, database: Database):
    """The arguments of `train` with which the memory of a decoder begins: params, config, and its base."""
    base = read_pretrained(model)
    params, config = add_memory(
        base.params, fitted_config(base, database), (1, 2), np.random.default_rng(0), begin_id=259, rank=2
    )
    return params, config, {"name": str(model), "sha256": base.sha256}


def fitted_config(base, database: Database):
    """The model's configuration with the database's chunk size."""
    return replace(base.config, chunk_size=database.chunk_size)


def train_memory(database: Database, model: Path, out: Path, training: TrainingConfig = TRAINING, **options):
    """Train a memory. Returns the parameters that it began with, and the trained ones."""
    params, config, base = begin(model, database)
    given = {"begin_from": (params, base["sha256"]), "trainable": is_retrieval, "base": base}
    return params, train(database, config, training, out, **given | options)


def run_here(*arguments) -> int:
    """Run retro-np in this process. Returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["retro-np", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code


@contextlib.contextmanager
def interrupted_in_step(number: int, monkeypatch):
    """Ctrl-C comes in this step of a training."""
    step = loop.train_step

    def interrupted(*arguments):
        if arguments[5] == number:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        yield
