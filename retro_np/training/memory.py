"""Give a decoder that others trained a memory: where it begins, and what its training needs. See nn/memory.py."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from retro_np.checkpoint import base_of, read_meta
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.files.untrusted import read_json
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.memory import StateCache, is_added, model_neighbours
from retro_np.parameters import init_params
from retro_np.pretrained.bundled import MEMORY, begun_as_bundled, trained_on
from retro_np.pretrained.models import load_model
from retro_np.progress import progress_bar
from retro_np.training.batches import training_batch
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import batch_loss, retrofit
from retro_np.tree import Tree, named_leaves

UNTRAINED, SHIPPED, ADAPTED, PAPER_FORM = "untrained", "shipped", "adapted", "paper-form"  # what `begin` adds
RANK = 16
# The layers of SmolLM2-135M's 30 that gain most, as shares of the depth
LAYER_SHARES = (18 / 30, 19 / 30, 21 / 30, 22 / 30, 23 / 30, 24 / 30, 25 / 30)
GATE = 0.5  # where the gates begin if they are trained
# The settings of a training that differ from those of a model's own. A quarter of the chunks read random neighbours.
MEMORY_SETTINGS: dict[str, Any] = {
    "steps": 100, "learning_rate": 4e-3, "warmup": 10, "weight_decay": 0.0, "random_share": 0.25,
    "checkpoint_every": 10,
}  # fmt: skip


def settings_in(out: Path) -> dict[str, dict[str, Any]]:
    """The sections of the settings of the run in a folder: model, training and data, as far as they are there."""
    stored = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    return {name: section for name, section in stored.items() if isinstance(section, dict)}


def stored_layers(stored: dict[str, Any]) -> tuple[int, ...]:
    """The layers of a run's stored model that read, or are adapted; none if it names none."""
    layers = stored.get("cca_layers") or stored.get("adapted_layers")
    return tuple(layers) if isinstance(layers, list | tuple) and all(type(p) is int for p in layers) else ()


def default_layers(config: RetroConfig, paper_form: bool = False) -> tuple[int, ...]:
    """The layers of the recipe. In the paper's form these are every third layer from the sixth on (B.2)."""
    if paper_form:
        return tuple(range(min(6, config.n_layers), config.n_layers + 1, 3))
    return tuple(sorted({max(1, round(share * config.n_layers)) for share in LAYER_SHARES}))


def is_base_of_bundled(base: Any) -> bool:
    """Whether a Pretrained is the model for which the package has a memory."""
    known = base_of(read_meta(MEMORY), MEMORY)
    return known is not None and known["sha256"] == base.sha256


def scanned_layers(base: Any, database: Any, config: RetroConfig, training: TrainingConfig) -> tuple[int, ...]:
    """The layers in which an untrained memory needs the fewest bits, each by itself, on a training's first batch.

    They are as many as `default_layers` names. base, config: as in `begin`."""
    sizes = {"sequence_length": training.sequence_length, "batch_size": training.batch_size, "seed": training.seed}
    batch = training_batch(database, database.split("train"), training.neighbours, step=0, **sizes)
    parts, rng = partial(begin, base, database, UNTRAINED, config=config), np.random.default_rng(training.seed)
    losses, layers = {}, range(1, config.n_layers + 1)
    whole, start = parts(rng=rng, layers=layers)
    encoded = model_neighbours(start["begin_from"][0], whole, batch[2], StateCache())  # for all layers at once
    with progress_bar("finding the layers that gain most", config.n_layers, unit="layers") as advance:
        for p in layers:
            one, start = parts(rng=rng, layers=(p,))
            losses[p] = batch_loss(start["begin_from"][0], one, (*batch[:2], encoded))
            advance()
    count = len(default_layers(config))
    return tuple(sorted(sorted(losses, key=losses.__getitem__)[:count]))


def begin(
    base: Any, database: Any, form: str, rng: np.random.Generator, *, config: RetroConfig | None = None,
    layers: Sequence[int] = (), rank: int = RANK, encoder: EncoderConfig | None = None,
) -> tuple[RetroConfig, dict[str, Any]]:  # fmt: skip
    """Add to a decoder of others what is trained. Returns its configuration, and how `train` starts.

    base: a Pretrained. form: "untrained" for a memory; "shipped" for the package's, or an untrained one if it does not
    fit; "adapted" for changes of the model's own attention; "paper-form" for the paper's CCA and encoder. rng: draws
    new parameters. config: of base for the database; None: as it is. layers: none for `default_layers`. encoder: of the
    paper's form; None for one as wide as the decoder. Raises the UserErrors of what it calls."""
    config = cast(DecoderConfig, load_model(base, database)[1] if config is None else config)
    layers = layers or default_layers(config, form == PAPER_FORM)
    start: dict[str, Any] = {"base": {"name": base.name, "sha256": base.sha256}, "trainable": is_added}
    begun, begins_as = None, base.sha256
    if form == PAPER_FORM:
        encoder = encoder or EncoderConfig(config.d_model, config.d_ffw, config.n_heads, config.d_head)
        params, config = cast(tuple[Tree, DecoderConfig], retrofit(base.params, config, layers, encoder, rng))
    elif form == ADAPTED:
        params, config = adapt(base.params, config, layers, rng, rank)
    else:
        # A neighbour begins with the database's end-of-text, or with the decoder's own beginning.
        own = database.end_of_text
        begin_id = own if own < base.config.vocabulary_size else base.start
        params, config = add_memory(base.params, config, layers, rng, begin_id=begin_id, rank=rank)
        begun = begun_as_bundled(params, config, base.sha256) if form == SHIPPED else None
    if begun is not None:
        params, begins_as, start["trained_on"] = begun, sha256_of(MEMORY), trained_on(MEMORY)
    return config, start | {"begin_from": (params, begins_as)}


def add_memory(
    params: Tree, config: DecoderConfig, layers: Sequence[int], rng: np.random.Generator, *,
    begin_id: int | None = None, rank: int | None = RANK, gate: float = GATE,
) -> tuple[Tree, DecoderConfig]:  # fmt: skip
    """Add a memory to a decoder: cross-attention that begins as a copy of each layer's own attention.

    params, config: the decoder, whose arrays are shared, not copied. layers: those that read, counted from 1. begin_id:
    the token that begins a neighbour, which the decoder encodes. rank: of the changes of queries, keys, values and
    outputs, which begin as zero; None: only the gates can be trained. gate: what is added to the neighbours' logits.
    Returns (params, config). With retrieval off, the model equals the decoder to the bit. To train only the memory,
    pass `trainable=retro_np.parameters.is_retrieval` to `train`. Raises UserError if the model retrieves or is adapted
    already, and for layers that it does not have."""
    _check_layers(config, layers)
    config = replace(config, cca_layers=tuple(layers), rank=rank, begin_id=begin_id)
    params = init_params(config, rng, given=dict(named_leaves(params)))
    for p in config.cca_layers:
        params["layers"][p - 1]["cca"]["gate"][...] = gate
    return params, config


def adapt(
    params: Tree, config: DecoderConfig, layers: Sequence[int], rng: np.random.Generator, rank: int = RANK
) -> tuple[Tree, DecoderConfig]:
    """Add changes of low rank, which begin as zero, to a decoder's own attention: what a memory is compared with.

    layers: those whose queries, keys, values and outputs are changed, counted from 1. Arguments otherwise, and errors,
    as in `add_memory`. Returns (params, config). To train only the changes, pass `trainable=is_added` (nn/memory.py) to
    `train`. LoRA, Hu et al. 2022."""
    _check_layers(config, layers)
    config = replace(config, adapted_layers=tuple(layers), rank=rank)
    return init_params(config, rng, given=dict(named_leaves(params))), config


def _check_layers(config: DecoderConfig, layers: Sequence[int]) -> None:
    if config.retrieves or config.adapted_layers:
        already = "retrieves already" if config.retrieves else "is adapted already"
        raise UserError(f"a memory or an adaptation is added to a model without one, but this model {already}")
    if not layers:
        raise UserError("a memory needs layers that read it, and an adaptation layers that change: name at least one")
