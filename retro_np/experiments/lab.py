"""Where experiments work: databases, trained models and scores, each made once, kept, and found again.

A lab is a folder. What is asked of it is named by a hash of everything that it hangs on but this package's version, so
an experiment that was stopped goes on where it was, and two experiments that want the same model train it once. After
an upgrade take another folder.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, score
from retro_np.evaluation.compare import OFF, ON, SHUFFLE_SEED, SHUFFLED
from retro_np.evaluation.copying import copy_bound
from retro_np.evaluation.leakage import ALPHAS, NO_LEAKAGE, chunk_leakage, filtered_bits_per_byte
from retro_np.experiments import recipe
from retro_np.files import replacing, write_array
from retro_np.nn.scope import every
from retro_np.parameters import is_retrieval
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import STDLIB
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import retrofit, train
from retro_np.tree import Tree

DAMAGED = (ValueError, EOFError, KeyError, zipfile.BadZipFile)  # what NumPy raises for a file that is cut short


@dataclass(frozen=True)
class Scale:
    """How large an experiment is. `small` is for figures that one looks at; `tiny` only shows that it runs."""

    name: str
    limit_bytes: int | None  # of the corpus
    vocabulary_size: int
    d_model: int
    n_layers: int
    steps: int
    batch_size: int
    sequence_length: int
    evaluated_tokens: int  # of the held-out ones, about
    few_tokens: int  # where one evaluation costs as much as many
    widths: tuple[int, ...]  # d_model, where models of several sizes are compared


SCALES = {
    "tiny": Scale("tiny", 400_000, 512, 32, 2, 6, 2, 128, 512, 128, (16, 32)),
    "small": Scale("small", None, 2048, 128, 4, 1200, 8, 256, 256_000, 24_000, (32, 64, 128)),
}


@dataclass(frozen=True)
class Model:
    """A trained model, its configuration, and a name that tells it from every other."""

    params: Tree
    config: RetroConfig
    name: str


@dataclass(frozen=True)
class Lab:
    """A folder to work in, a scale, and how many seeds a claim is held against."""

    folder: Path
    scale: Scale
    seeds: int = 3

    def limit(self, database: Database) -> int:
        """How many held-out chunks are evaluated."""
        return self.scale.evaluated_tokens // database.chunk_size

    def configs(self, database: Database, d_model: int | None = None) -> tuple[RetroConfig, RetroConfig]:
        """The recipe's baseline and RETRO at this scale, or of another width."""
        scale = self.scale
        retro = recipe.retro_config(
            database.vocabulary_size, database.chunk_size, d_model=d_model or scale.d_model, n_layers=scale.n_layers
        )
        return recipe.baseline_of(retro), retro

    def training(self, config: RetroConfig, seed: int, **changes) -> TrainingConfig:
        """The recipe's training at this scale: of a baseline, or of a RETRO."""
        scale = self.scale
        settings = {"batch_size": scale.batch_size, "sequence_length": scale.sequence_length, **changes}
        return replace(recipe.training_config(config, settings.pop("steps", scale.steps), seed), **settings)

    def database(self, corpus=STDLIB, name: str = "stdlib", **changes) -> Database:
        """A database of the recipe's kind. changes: fields of its BuildConfig."""
        scale = self.scale
        settings = {"limit_bytes": scale.limit_bytes, "vocabulary_size": scale.vocabulary_size, **changes}
        config = replace(recipe.BUILD, **settings)
        return build_database(corpus, self.folder / "databases" / named(name, asdict(config)), config, recipe.EMBEDDER)

    def trained(
        self,
        database: Database,
        config: RetroConfig,
        training: TrainingConfig,
        *,
        begin_from: tuple[Tree, str] | None = None,
        trainable: Callable[[str], bool] = every,
    ) -> Model:
        """Train a model, or read the one that was trained. begin_from, trainable: as in `train`."""
        kind = "retro" if config.retrieves else "baseline"
        facts = [config.to_dict(), asdict(training), database.identity, begin_from and begin_from[1]]
        name = named(kind if trainable is every else "retrofit", facts)
        params = train(
            database, config, training, self.folder / "models" / name, begin_from=begin_from, trainable=trainable,
            description=name,
        )  # fmt: skip
        return Model(params, config, name)

    def scored(
        self,
        database: Database,
        model: Model,
        *,
        k: int = recipe.NEIGHBOURS,
        shuffle_seed: int | None = None,
        retrieval: Retrieval | None = None,
        label: str = "",
        limit: int | None = None,
    ) -> Losses:
        """What a model pays for held-out chunks; k = 0: retrieval off. label: tells this `retrieval` from others."""
        scale = self.scale
        limit = limit or self.limit(database)
        source = identity_of(retrieval, label)
        facts = [model.name, database.identity, k, shuffle_seed, source, limit, scale.sequence_length]
        path = self.folder / "scores" / f"{named('scores', facts)}.npz"
        if not path.exists():
            losses = score(
                model.params, model.config, database, k=k, sequence_length=scale.sequence_length,
                stride=scale.sequence_length // 2, limit=limit, shuffle_seed=shuffle_seed,
                retrieval=retrieval, description=f"evaluating {model.name}",
            )  # fmt: skip
            with replacing(path) as file:
                np.savez(file, nats=losses.nats, bytes=losses.bytes, documents=losses.documents)
        with readable(path), np.load(path, allow_pickle=False) as found:
            return Losses(found["nats"], found["bytes"], found["documents"])

    def pair(self, database: Database, seed: int, d_model: int | None = None) -> tuple[Model, Model]:
        """The recipe's baseline and RETRO of a seed, trained for the same tokens."""
        return tuple(
            self.trained(database, config, self.training(config, seed)) for config in self.configs(database, d_model)
        )

    def retrofit_steps(self, share: float) -> int:
        """A share of the baseline's steps."""
        return max(1, round(share * self.scale.steps))

    def retrofitted(self, database: Database, baseline: Model, retro_config: RetroConfig, share: float) -> Model:
        """A baseline with the recipe's CCA and encoder, which alone are trained, for a share of its steps.

        No sequence goes without neighbours: it would teach nothing, since the decoder is frozen.
        """
        start = replace(baseline.config, copying_start=True)
        params, config = retrofit(
            baseline.params, start, retro_config.cca_layers, retro_config.encoder, np.random.default_rng(0)
        )
        training = self.training(config, 0, steps=self.retrofit_steps(share), retrieval_off=0.0)
        return self.trained(database, config, training, begin_from=(params, baseline.name), trainable=is_retrieval)

    def conditions(self, database: Database, baseline: Model | None, retro: Model) -> dict[str, Losses]:
        """The lines of the usual table: baseline, OFF, ON, ON with the neighbours of others."""
        lines = {} if baseline is None else {"baseline": self.scored(database, baseline, k=0)}
        lines[OFF] = self.scored(database, retro, k=0)
        lines[ON] = self.scored(database, retro)
        lines[SHUFFLED] = self.scored(database, retro, shuffle_seed=SHUFFLE_SEED)
        return lines

    def over_seeds(self, database: Database, ratios: np.ndarray) -> tuple[list[dict], dict]:
        """`bits` of each line of the usual table by seed; and the copy bound of the first seed's baseline.

        ratios: of `leakage`.
        """
        pairs = [self.pair(database, seed) for seed in range(self.seeds)]
        by_seed = [
            {name: bits(losses, ratios) for name, losses in self.conditions(database, *pair).items()} for pair in pairs
        ]
        baseline, _ = pairs[0]
        bound = copy_bound(
            baseline.params, baseline.config, database, sequence_length=self.scale.sequence_length,
            limit=self.limit(database),
        )  # fmt: skip
        return by_seed, bound

    def leakage(self, database: Database, retrieval: Retrieval | None = None, label: str = "") -> np.ndarray:
        """r(C) of each evaluated chunk."""
        limit = self.limit(database)
        facts = [database.identity, identity_of(retrieval, label), limit]
        path = self.folder / "scores" / f"{named('leakage', facts)}.npy"
        if not path.exists():
            write_array(path, chunk_leakage(database, limit=limit, retrieval=retrieval))
        with readable(path):
            return np.load(path, allow_pickle=False)


def identity_of(retrieval: Retrieval | None, label: str):
    """What tells neighbours from elsewhere: the label and the other database's identity; nothing for its own."""
    return [label, retrieval.database.identity] if retrieval else ""


@contextlib.contextmanager
def readable(path: Path):
    """Around the reading of a file of the lab: where it is damaged, UserError says which."""
    try:
        yield
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: remove it, and the same command makes it again") from error


def bits(losses: Losses, ratios: np.ndarray) -> dict:
    """bpb, and bpb at α = 12.5 %, which stands beside it wherever a figure does."""
    return {
        "bpb": losses.bits_per_byte(),
        "bpb_no_leakage": filtered_bits_per_byte(losses, ratios)[ALPHAS.index(NO_LEAKAGE)],
    }


def savings(lines: dict[str, dict]) -> dict:
    """The share of its baseline's bits that RETRO[ON] saves, by figure of `bits`; None where a figure is missing."""
    on, baseline = lines[ON], lines["baseline"]
    return {figure: None if on[figure] is None else 1 - on[figure] / baseline[figure] for figure in on}


def mean_and_spread(values) -> dict:
    """Mean, and from the least to the greatest: what a figure over seeds is shown as. NaN where one is None."""
    values = [float("nan") if value is None else float(value) for value in values]
    return {"mean": float(np.mean(values)), "from": min(values), "to": max(values), "seeds": values}


def spreads(rows: list[dict]) -> dict:
    """`mean_and_spread` of each figure of rows that have the same figures, a row a seed."""
    return {figure: mean_and_spread(row[figure] for row in rows) for figure in rows[0]}


def named(kind: str, facts) -> str:
    """A name for what hangs on these facts: `kind` and the beginning of their hash."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{kind}-{digest[:12]}"
