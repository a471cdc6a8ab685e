"""Ways to give a model that is not trained any further a memory: the rows that `evaluate` adds to its own."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import ScoredTokens
from retro_np.evaluation.knn_lm import Prediction, cache_prediction, datastore, frozen_model, knn_prediction, tuned
from retro_np.evaluation.prepending import check_room, prepended, separator_of
from retro_np.retrieval.database import Database
from retro_np.retrieval.join import Retrieval
from retro_np.tree import Tree

IN_CONTEXT, KNN_LM, CACHE = METHODS = "in-context", "knn-lm", "cache"
DATASTORE_KEYS = 1 << 16  # tokens in kNN-LM's datastore: 150 MB for a model of width 576


def check_methods(
    methods: Collection[str], config: RetroConfig, database: Database, retrieval: Retrieval, k: int, length: int
) -> None:
    """Raise UserError for an unknown method, and for one that cannot be run, before anything is scored.

    length: that of a sequence, in tokens. The other arguments are those of `added_memory`."""
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"there is no method {unknown[0]!r:.40}: choose from {', '.join(METHODS)}")
    if methods and retrieval.split.name == "train":
        raise UserError(f"{', '.join(methods)} are for held-out documents: leave out --split, or --also")
    if {IN_CONTEXT, KNN_LM} & set(methods) and not database.n_chunks:
        raise UserError(f"{IN_CONTEXT} and {KNN_LM} read a database: give a DB, or only --also {CACHE}")
    if IN_CONTEXT in methods:
        check_room(config, k, length, separator_of(config, database))


def added_memory(
    methods: Collection[str], params: Tree, config: RetroConfig, database: Database, retrieval: Retrieval, *,
    k: int, keys: int, sequence_length: int, stride: int, limit: int | None,
    on: Mapping[str, ScoredTokens] | None = None,
) -> dict[str, tuple[ScoredTokens, dict[str, Any]]]:  # fmt: skip
    """Score the tokens of a split with each of these methods, while the model's own retrieval is off.

    methods: "in-context", see `prepending.py`; "knn-lm", whose datastore has this many `keys`, see `knn_lm.py`;
    "cache", the continuous cache. on: the same tokens as models score them while they retrieve, by names such as "on";
    each method's prediction is also mixed into these, as "on+cache" and so on, with a weight that is tuned like those
    of `knn_lm.py`. The other arguments are those of `score`. Memory: the hidden states of all scored tokens and of the
    datastore. Returns each row's tokens, and its settings with what was tuned."""
    model = params, config, database
    windows: dict[str, Any] = {"sequence_length": sequence_length, "stride": stride, "limit": limit}
    windows["retrieval"] = retrieval
    scored: dict[str, tuple[ScoredTokens, dict[str, Any]]] = {}
    second: dict[str, tuple[Prediction, str, dict[str, Any]]] = {}  # what is mixed in, its setting, and facts about it
    if IN_CONTEXT in methods:
        prompted = prepended(*model, k=k, **windows)
        scored[IN_CONTEXT] = prompted, {"k": k}
        second[IN_CONTEXT] = (lambda _: np.exp(-prompted.nats), [0]), "zero", {"k": k}
    if {KNN_LM, CACHE} & set(methods):
        plain, hidden, documents = frozen_model(*model, **windows)
        if KNN_LM in methods:
            stored, values = datastore(*model, keys, sequence_length=sequence_length)
            prediction = knn_prediction(hidden, plain.tokens, stored, values)
            second[KNN_LM] = prediction, "alpha", {"datastore": len(stored)}
        if CACHE in methods:
            second[CACHE] = cache_prediction(hidden, plain.tokens, documents), "theta", {}
    for name, (prediction, setting, facts) in second.items():
        alone = {} if name == IN_CONTEXT else {name: plain}
        for row, first in (alone | {f"{each}+{name}": tokens for each, tokens in (on or {}).items()}).items():
            numbers = np.asarray(retrieval.split.documents)[first.positions // config.chunk_size]
            tokens, choices = tuned(first, numbers, *prediction)
            scored[row] = tokens, {**facts, f"{setting}_and_weight": choices}
    return scored
