"""The folder in which experiments work. It stores databases, trained models and scores, so that each is made once.

Each file is named by a hash of everything that it depends on, except the version of this package. So an interrupted
experiment resumes where it stopped, and experiments that need the same model share it. Upgrades need a new folder."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.evaluation.bits_per_byte import Losses, score
from retro_np.evaluation.compare import ON, conditions
from retro_np.evaluation.copying import copy_bound
from retro_np.evaluation.leakage import Bits, bits, chunk_leakage
from retro_np.experiments import recipe
from retro_np.files import replacing
from retro_np.files.untrusted import reporting
from retro_np.parameters import is_retrieval
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import STDLIB
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import retrofit, train
from retro_np.tree import Tree


@dataclass(frozen=True)
class Scale:
    """How large an experiment is. `small` is for results; `tiny` only shows that the experiment runs."""

    name: str
    limit_bytes: int | None  # bytes of the corpus to use; None for all
    vocabulary_size: int
    d_model: int
    n_layers: int
    steps: int
    batch_size: int
    sequence_length: int
    evaluated_tokens: int  # held-out tokens, approximately
    few_tokens: int  # held-out tokens for evaluations that are much slower
    widths: tuple[int, ...]  # values of d_model where models of several sizes are compared


SCALES = {
    "tiny": Scale("tiny", 400_000, 512, 32, 2, 6, 2, 128, 512, 128, (16, 32)),
    "small": Scale("small", None, 2048, 128, 4, 1200, 8, 256, 256_000, 24_000, (32, 64, 128)),
}


@dataclass(frozen=True)
class Model:
    """A trained model, its configuration, and a name that no other model has."""

    params: Tree
    config: RetroConfig
    name: str


@dataclass(frozen=True)
class Lab:
    """A folder, a scale, and the number of seeds over which a claim is tested."""

    folder: Path
    scale: Scale
    seeds: int = 3

    def limit(self, database: Database) -> int:
        """The number of held-out chunks to evaluate."""
        return self.scale.evaluated_tokens // database.chunk_size

    def configs(self, database: Database, d_model: int | None = None) -> tuple[RetroConfig, RetroConfig]:
        """The recipe's baseline and RETRO at this scale. d_model replaces the scale's width."""
        width, n_layers = d_model or self.scale.d_model, self.scale.n_layers
        retro = recipe.retro_config(database.vocabulary_size, database.chunk_size, d_model=width, n_layers=n_layers)
        return recipe.baseline_of(retro), retro

    def training(self, config: RetroConfig, seed: int, steps: int | None = None, **changes: Any) -> TrainingConfig:
        """The recipe's training of a baseline or a RETRO at this scale. changes: fields of the TrainingConfig."""
        sizes = {"batch_size": self.scale.batch_size, "sequence_length": self.scale.sequence_length}
        return replace(recipe.training_config(config, steps or self.scale.steps, seed), **(sizes | changes))

    def database(self, corpus: Path | str = STDLIB, name: str = "stdlib", **changes: Any) -> Database:
        """Build or open a database with the recipe's settings. changes: fields of the BuildConfig."""
        of_scale = {"limit_bytes": self.scale.limit_bytes, "vocabulary_size": self.scale.vocabulary_size}
        config = replace(recipe.BUILD, **(of_scale | changes))
        return build_database(corpus, self.folder / "databases" / named(name, asdict(config)), config, recipe.EMBEDDER)

    def trained(self, database: Database, config: RetroConfig, training: TrainingConfig, **start: Any) -> Model:
        """Train a model, or load it if it was trained before. start: arguments of `train`, for a RETROfit."""
        kind = "retrofit" if start else "retro" if config.retrieves else "baseline"
        begun_from = start["begin_from"][1] if start else None
        name = named(kind, [config.to_dict(), asdict(training), database.identity, begun_from])
        params = train(database, config, training, self.folder / "models" / name, description=name, **start)
        return Model(params, config, name)

    def scored(self, database: Database, model: Model, **changes: Any) -> Losses:
        """A model's losses on held-out chunks. changes: arguments of `score`, for example k = 0: retrieval off."""
        length = self.scale.sequence_length
        windows = {"sequence_length": length, "stride": length // 2, "limit": self.limit(database)}
        settings = {"k": recipe.NEIGHBOURS, "retrieval": None, **windows, **changes}
        facts = [model.name, database.identity, settings | {"retrieval": identity_of(settings["retrieval"])}]
        score_it = partial(score, model.params, model.config, database, description=f"evaluating {model.name}")
        return Losses(**self.stored("scores", facts, lambda: vars(score_it(**settings))))

    def bits(self, database: Database, model: Model, ratios: np.ndarray | None = None, **settings: Any) -> Bits:
        """`bits` of a model's losses. ratios: from `leakage`; None computes them. settings: as in `scored`."""
        losses = self.scored(database, model, **settings)
        ratios = self.leakage(database) if ratios is None else ratios
        return bits(losses, ratios[: len(losses.nats)])

    def pair(self, database: Database, seed: int, d_model: int | None = None) -> tuple[Model, Model]:
        """The recipe's baseline and RETRO of a seed, trained on the same tokens."""
        baseline, retro = self.configs(database, d_model)
        baseline_model = self.trained(database, baseline, self.training(baseline, seed))
        return baseline_model, self.trained(database, retro, self.training(retro, seed))

    def retrofitted(self, database: Database, baseline: Model, retro_config: RetroConfig, steps: int) -> Model:
        """A baseline to which the recipe's CCA and encoder are added and trained, for this number of steps.

        Every sequence gets neighbours. A sequence without them would teach nothing, because the decoder is frozen."""
        start, encoder = replace(baseline.config, copying_start=True), retro_config.encoder
        assert encoder is not None  # the configuration of a RETRO
        params, config = retrofit(baseline.params, start, retro_config.cca_layers, encoder, np.random.default_rng(0))
        training = self.training(config, 0, steps, retrieval_off=0.0)
        return self.trained(database, config, training, begin_from=(params, baseline.name), trainable=is_retrieval)

    def conditions(self, database: Database, baseline: Model, retro: Model) -> dict[str, Losses]:
        """The losses of the baseline, RETRO[OFF], RETRO[ON] and RETRO[ON] with the neighbours of other chunks."""
        lines = conditions(baseline, retro, recipe.NEIGHBOURS)
        return {name: self.scored(database, model, **settings) for name, (model, settings) in lines.items()}

    def table(self, database: Database, baseline: Model, retro: Model) -> dict[str, Bits]:
        """`bits` of each of the `conditions`."""
        ratios = self.leakage(database)
        return {name: bits(losses, ratios) for name, losses in self.conditions(database, baseline, retro).items()}

    def over_seeds(self, database: Database) -> dict[str, Any]:
        """`mean_and_spread` of `table` ("lines") and `savings` ("gains") over seeds; first baseline's copy bound."""
        pairs = [self.pair(database, seed) for seed in range(self.seeds)]
        tables = [self.table(database, *pair) for pair in pairs]
        baseline, length, limit = pairs[0][0], self.scale.sequence_length, self.limit(database)
        lines = {name: spreads([table[name] for table in tables]) for name in tables[0]}
        bound = copy_bound(baseline.params, baseline.config, database, sequence_length=length, limit=limit)
        return {"lines": lines, "gains": spreads([savings(table) for table in tables]), "copy_bound": bound}

    def leakage(self, database: Database, retrieval: Retrieval | None = None) -> np.ndarray:
        """r(C) of each evaluated chunk."""
        settings: dict[str, Any] = {"limit": self.limit(database), "retrieval": retrieval}
        facts = [database.identity, identity_of(retrieval), settings["limit"]]
        return self.stored("leakage", facts, lambda: {"r": chunk_leakage(database, **settings)})["r"]

    def stored(self, kind: str, facts: Any, measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays by name, measured if no file of the lab has them. Raises UserError for a damaged file."""
        path = self.folder / "scores" / f"{named(kind, facts)}.npz"
        if not path.exists():
            with replacing(path) as file:
                np.savez(file, **measure())  # type: ignore[arg-type]
        hint = "remove it and run the same command again"
        with reporting(f"{path} is damaged", hint), np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


def identity_of(retrieval: Retrieval | None) -> list[Any] | str:
    """What identifies neighbours from another database: their number per chunk and that database's identity."""
    return [retrieval.split.neighbours.shape[1], retrieval.database.identity] if retrieval else ""


def savings(lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The share of its baseline's bits that RETRO[ON] saves, for each figure of `bits`; None if a figure is missing."""
    on, baseline = lines[ON], lines["baseline"]
    return {figure: None if on[figure] is None else 1 - on[figure] / baseline[figure] for figure in on}


def mean_and_spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, minimum and maximum of a figure over seeds, and the figure of each seed. NaN if a seed has None."""
    seeds = np.array(list(values), float)
    return {"mean": seeds.mean().item(), "from": seeds.min().item(), "to": seeds.max().item(), "seeds": seeds.tolist()}


def spreads(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`mean_and_spread` of each figure. rows: the figures of each seed."""
    return {figure: mean_and_spread(row[figure] for row in rows) for figure in rows[0]}


def named(kind: str, facts: Any) -> str:
    """A name for what depends on these facts: `kind` and the start of their hash."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{kind}-{digest[:12]}"
