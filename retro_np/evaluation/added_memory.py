"""Ways to give a model that is not trained any further a memory: the rows that `evaluate` adds to its own."""

from collections.abc import Collection
from typing import Any

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import ScoredTokens
from retro_np.evaluation.knn_lm import continuous_cache, datastore, frozen_model, knn_lm
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
) -> dict[str, tuple[ScoredTokens, dict[str, Any]]]:  # fmt: skip
    """Score the tokens of a split with each of these methods, while the model's own retrieval is off.

    methods: "in-context", see `prepending.py`; "knn-lm", whose datastore has this many `keys`, see `knn_lm.py`;
    "cache", the continuous cache. The other arguments are those of `score`. Memory: the hidden states of all
    scored tokens and of the datastore. Returns each method's tokens, and its settings with what was tuned."""
    model = params, config, database
    windows: dict[str, Any] = {"sequence_length": sequence_length, "stride": stride, "limit": limit}
    windows["retrieval"] = retrieval
    scored: dict[str, tuple[ScoredTokens, dict[str, Any]]] = {}
    if IN_CONTEXT in methods:
        scored[IN_CONTEXT] = prepended(*model, k=k, **windows), {"k": k}
    if {KNN_LM, CACHE} & set(methods):
        frozen = frozen_model(*model, **windows)
        if KNN_LM in methods:
            stored, values = datastore(*model, keys, sequence_length=sequence_length)
            tokens, choices = knn_lm(*frozen, stored, values)
            scored[KNN_LM] = tokens, {"datastore": len(stored), "alpha_and_weight": choices}
        if CACHE in methods:
            tokens, choices = continuous_cache(*frozen)
            scored[CACHE] = tokens, {"theta_and_weight": choices}
    return scored
