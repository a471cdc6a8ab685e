"""`retro-np train`, `evaluate`, `sample`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from retro_np.commands.shared import (
    CheckpointPath,
    DatabasePath,
    EmbedderPath,
    K,
    Seed,
    console,
    finite,
    open_database,
    print_results,
)
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError

# options of `train` that say what a model is; the retrieval's own, and those that another choice has settled already
RETRIEVED_IN_TRAINING = {"neighbours", "retrieval_off", "oracle_share", "oracle_steps"}
RETRIEVAL_OPTIONS = RETRIEVED_IN_TRAINING | {
    "cca_layers", "encoder_layers", "conditioning", "cca_positions", "share_embeddings", "retrieved_part",
    "copying_start",
}  # fmt: skip
SETTLED_BY_BASELINE = {"d_model", "d_ffw", "n_heads", "d_head", "n_layers", "tie_readout"}
SETTLED_BY_PRESET = SETTLED_BY_BASELINE | RETRIEVAL_OPTIONS - RETRIEVED_IN_TRAINING | {"dropout"}
PRETRAINED_DATABASE, PRETRAINED_BYTES = Path("runs/pretrained/db"), 3_000_000  # a slice: built in half a minute


def train(
    context: typer.Context,
    db: DatabasePath,
    out: Annotated[Path, typer.Option("-o", "--out", help="The run's folder, new or begun before.")],
    baseline: Annotated[bool, typer.Option("--baseline", help="Without retrieval: no CCA, no encoder.")] = False,
    retrofit: Annotated[
        Path | None, typer.Option(help="A baseline's checkpoint: freeze it, train CCA and encoder alone.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A model of table 2, e.g. retro-172m, instead of the sizes.")
    ] = None,
    d_model: int = 128,
    d_ffw: int = 512,
    n_heads: int = 4,
    d_head: int = 32,
    n_layers: int = 4,
    cca_layers: Annotated[str, typer.Option(help="Layers with cross-attention, from 1, with commas.")] = "2,4",
    encoder_layers: Annotated[int, typer.Option(min=1)] = 2,
    conditioning: Annotated[bool, typer.Option(help="Whether the encoder reads the chunk that retrieved.")] = True,
    cca_positions: bool = True,
    share_embeddings: Annotated[bool, typer.Option(help="The encoder reads the decoder's embeddings.")] = False,
    tie_readout: Annotated[bool, typer.Option(help="The readout is the embeddings' transpose.")] = False,
    retrieved_part: Annotated[str, typer.Option(help="NF, N or F: what of a value is read.")] = "NF",
    copying_start: Annotated[bool, typer.Option(help="Encoder and CCA begin by copying. Not the paper's.")] = False,
    retrieval_off: Annotated[float, typer.Option(help="Share of sequences given no neighbours.")] = 0.0,
    oracle_share: Annotated[
        float, typer.Option(help="Share of chunks that first get an oracle neighbour: their own continuation, noised.")
    ] = 0.0,
    oracle_steps: Annotated[int, typer.Option(min=0, help="Steps over which that share falls to 0.")] = 0,
    dropout: float = 0.0,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    sequence_length: Annotated[int, typer.Option(min=1, help="n, tokens; whole chunks.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="Parts of a step, to save memory.")] = 1,
    neighbours: Annotated[int, typer.Option("-k", "--neighbours", min=0)] = 2,
    learning_rate: float = 1e-3,
    warmup: Annotated[int, typer.Option(min=0)] = 50,
    weight_decay: float = 0.1,
    seed: Seed = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
) -> None:
    """Train a RETRO, its baseline (--baseline), or RETROfit a trained baseline (--retrofit CHECKPOINT).

    Stopped anywhere, the same command goes on from the last checkpoint and ends in the same bytes.
    """
    import numpy as np

    from retro_np.checkpoint import load_model
    from retro_np.files import sha256_of
    from retro_np.nn.scope import every
    from retro_np.parameters import count_parameters, is_retrieval
    from retro_np.training.config import TrainingConfig
    from retro_np.training.loop import retrofit as make_retrofit
    from retro_np.training.loop import train as run_training

    refuse_contradictions(context)
    database = open_database(db)
    layers = () if baseline else parse_layers(cca_layers)
    encoder = EncoderConfig(d_model, d_ffw, n_heads, d_head, encoder_layers, (1,) if conditioning else ())
    training = TrainingConfig(
        steps, sequence_length, batch_size, micro_batches, neighbours, learning_rate, warmup, weight_decay,
        seed=seed, checkpoint_every=checkpoint_every, retrieval_off=retrieval_off,
        oracle_share=oracle_share, oracle_steps=oracle_steps,
    )  # fmt: skip
    begin_from, trainable = None, every
    if retrofit is not None:
        trained, config = load_model(retrofit, database)
        encoder = replace(encoder, d_model=config.d_model) if share_embeddings else encoder
        config = replace(
            config, cca_positions=cca_positions, share_embeddings=share_embeddings, retrieved_part=retrieved_part,
            dropout=dropout, copying_start=copying_start,
        )  # fmt: skip
        params, config = make_retrofit(trained, config, parse_layers(cca_layers), encoder, np.random.default_rng(seed))
        begin_from, trainable = (params, sha256_of(retrofit)), is_retrieval
    elif preset is not None:
        config = replace(RetroConfig.preset(preset, database.vocabulary_size), chunk_size=database.chunk_size)
    else:
        config = RetroConfig(
            database.vocabulary_size, d_model, d_ffw, n_heads, d_head, n_layers, layers, database.chunk_size,
            None if baseline else encoder, dropout, share_embeddings, tie_readout, cca_positions, retrieved_part,
            copying_start and not baseline,
        )  # fmt: skip
    console.print(f"{count_parameters(config):,} parameters, and {count_parameters(config, True):,} with embeddings")
    run_training(database, config, training, out, begin_from=begin_from, trainable=trainable)
    console.print(f"{out}/checkpoint.safetensors holds step {steps}.")


def evaluate(
    checkpoint: CheckpointPath,
    db: DatabasePath,
    baseline: Annotated[Path | None, typer.Option(help="A baseline's checkpoint to evaluate beside it.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where results.json, losses.npz and the plot go.")] = Path(
        "runs/evaluation"
    ),
    split: Annotated[str, typer.Option(help="valid or train.")] = "valid",
    k: K = 2,
    sequence_length: Annotated[int, typer.Option(min=1, help="n, tokens; whole chunks.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens that the window slides; whole chunks.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many chunks.")] = None,
    retrieve_from: Annotated[
        list[Path] | None,
        typer.Option(help="Another database to retrieve from, or several as one.", show_default=False),
    ] = None,
    fraction: Annotated[float, typer.Option(help="Retrieve from a random share of its documents.")] = 1.0,
    fraction_seed: Annotated[int, typer.Option(min=0, help="Which share.")] = 0,
) -> None:
    """Bits per byte of held-out documents: RETRO with retrieval on, off, and with the neighbours of others; bpb(α)."""
    from retro_np.checkpoint import load_model
    from retro_np.evaluation.compare import evaluate as evaluate_models
    from retro_np.evaluation.leakage import NEIGHBOURS
    from retro_np.report.plots import plot_leakage
    from retro_np.retrieval.join import Union
    from retro_np.retrieval.join import retrieve_from as retrieve_elsewhere

    database = open_database(db)
    models = {"RETRO": load_model(checkpoint, database)}
    if baseline is not None:
        models["baseline"] = load_model(baseline, database)
    retrieval = None
    k = k if retrieve_from else min(k, max(1, database.n_chunks))
    if split == "valid" and k > database.split(split).neighbours.shape[1]:
        retrieve_from = retrieve_from or [db]  # the database keeps fewer than asked for: they are looked for anew
    if retrieve_from or fraction != 1:
        if split != "valid":
            raise UserError("--retrieve-from and --fraction are for held-out documents: leave out --split")
        places = retrieve_from or [db]
        parts = [open_database(place).fraction(finite("--fraction", fraction), fraction_seed) for place in places]
        joined = parts[0] if len(parts) == 1 else Union(parts)
        k = min(k, max(1, joined.n_chunks))
        retrieval = retrieve_elsewhere(database, joined, max(k, NEIGHBOURS))
    results = evaluate_models(
        models, database, out, split=split, k=k, sequence_length=sequence_length, stride=stride, limit=limit,
        retrieval=retrieval,
    )  # fmt: skip
    plot_leakage(results["alphas"], results["bpb_alpha"], out / "bpb_alpha.png")
    print_results(results)
    console.print(f"Everything is in {out}: results.json, losses.npz, bpb_alpha.png")


def sample(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.", show_default=False)
    ] = None,
    db: Annotated[
        Path | None, typer.Argument(metavar="DB", help="A database that `retro-np build` made.", show_default=False)
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="The checkpoint in the box, instead of CHECKPOINT; without DB, one of a "
                     "part of the standard library is built in runs/pretrained."),
    ] = False,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def read_json(path):\n    ",
    length: Annotated[int, typer.Option(min=1, help="Tokens to sample.")] = 128,
    k: K = 2,
    retrieval: Annotated[bool, typer.Option(help="Retrieve at each chunk's end.")] = True,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Seed = 0,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page as well.")] = None,
    embedder: EmbedderPath = None,
) -> None:  # fmt: skip
    """Go on from a prompt, with what was retrieved beside it; colours show the tokens that both have in common.

    retro-np sample --pretrained --prompt "import json" works right after installation.
    """
    from retro_np.checkpoint import load_model
    from retro_np.files import check_output
    from retro_np.report.samples import print_sample, sample_chunks, write_page

    if pretrained:
        from retro_np.experiments.pretrained import pretrained_database
        from retro_np.pretrained.bundled import RETRO, bundled_file

        if db is not None:
            raise UserError("--pretrained stands for a CHECKPOINT: give the one or the other, and at most a DB")
        checkpoint, db = bundled_file(RETRO), checkpoint  # the one place that may be named is the database
    elif checkpoint is None or db is None:
        raise UserError("a sample takes a CHECKPOINT and a DB, or --pretrained")
    part = PRETRAINED_DATABASE, PRETRAINED_BYTES
    database = pretrained_database(*part) if db is None else open_database(db, embedder)
    params, config = load_model(checkpoint, database)
    if page is not None:
        place = check_output(page, "--page", [checkpoint, database.path])
    k = min(k, database.n_chunks)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    chunks = sample_chunks(params, config, database, prompt, length, k if retrieval else 0, **settings)
    print_sample(console, chunks)
    if page is not None:
        facts = {"checkpoint": str(checkpoint), "database": str(database.path)}
        facts |= {name: str(value) for name, value in settings.items()}
        write_page(place, "A sample, and what it retrieved", [{"heading": prompt, "chunks": chunks}], facts)
        console.print(f"The page is {page}.")


def refuse_contradictions(context: typer.Context) -> None:
    """Raise UserError where `train` is given options of which one would be dropped without a word."""
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    chosen = [name for name in ("preset", "retrofit", "baseline") if name in given]
    settled = {"preset": SETTLED_BY_PRESET, "retrofit": SETTLED_BY_BASELINE, "baseline": RETRIEVAL_OPTIONS}
    for kind in chosen:
        clash = [name for name in given if name in settled[kind] or (name in chosen and name != kind)]
        if clash:
            options = ", ".join("--" + name.replace("_", "-") for name in clash)
            raise UserError(f"--{kind} leaves no room for {options}: leave out the one or the other")


def parse_layers(text: str) -> tuple[int, ...]:
    """`2,4` → (2, 4)."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"--cca-layers are numbers with commas, like 2,4, not {text!r}") from error
