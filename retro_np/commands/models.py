"""`retro-np train`, `evaluate`, `sample`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from retro_np.commands import shared
from retro_np.commands.shared import console, open_database
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError

# The options of `train` that --baseline, --retrofit and --preset exclude
SIZE_OPTIONS = {"d_model", "d_ffw", "n_heads", "d_head", "n_layers", "tie_readout"}
CCA_OPTIONS = {
    "cca_layers", "encoder_layers", "conditioning", "cca_positions", "share_embeddings", "retrieved_part",
    "copying_start",
}  # fmt: skip
EXCLUDED = {
    "preset": SIZE_OPTIONS | CCA_OPTIONS | {"dropout"},
    "retrofit": SIZE_OPTIONS,
    "baseline": CCA_OPTIONS | {"neighbours", "retrieval_off", "oracle_share", "oracle_steps"},
}
BUNDLED_HELP = "Use the bundled model. Without DB, a DB of part of the standard library is built in runs/pretrained."
PRETRAINED_DATABASE, PRETRAINED_BYTES = Path("runs/pretrained/db"), 3_000_000  # builds in half a minute


def train(
    context: Context,
    db: shared.DatabasePath,
    out: Annotated[Path, Option("-o", "--out", help="The run's folder: a new one, or that of an interrupted run.")],
    baseline: Annotated[bool, Option("--baseline", help="Train without retrieval: no CCA, no encoder.")] = False,
    retrofit: Annotated[Path | None, Option(help="Train only CCA and encoder, on this baseline's checkpoint.")] = None,
    preset: Annotated[str | None, Option(help="Instead of sizes, one of the paper's table 2: retro-172m, ….")] = None,
    d_model: Annotated[int, Option(help="Width of the decoder, d.")] = 128,
    d_ffw: Annotated[int, Option(help="Width of the feed-forward layers.")] = 512,
    n_heads: Annotated[int, Option(help="Attention heads.")] = 4,
    d_head: Annotated[int, Option(help="Width of a head.")] = 32,
    n_layers: Annotated[int, Option(help="Layers of the decoder.")] = 4,
    cca_layers: Annotated[str, Option(help="Layers with CCA, from 1, separated by commas.")] = "2,4",
    encoder_layers: Annotated[int, Option(min=1, help="Layers of the encoder.")] = 2,
    conditioning: Annotated[bool, Option(help="Let the encoder attend to the retrieving chunk.")] = True,
    cca_positions: Annotated[bool, Option(help="Use relative positions in CCA.")] = True,
    share_embeddings: Annotated[bool, Option(help="Use the decoder's embeddings in the encoder.")] = False,
    tie_readout: Annotated[bool, Option(help="Use the transposed embeddings as readout.")] = False,
    retrieved_part: Annotated[str, Option(help="The part of a value that the encoder reads: NF, N or F.")] = "NF",
    copying_start: Annotated[bool, Option(help="Initialise encoder and CCA to copy tokens. Not in the paper.")] = False,
    retrieval_off: Annotated[float, Option(help="Share of sequences trained without neighbours.")] = 0.0,
    oracle_share: Annotated[
        float, Option(help="Share of chunks that get an oracle neighbour (a noisy copy of their text) at step 0.")
    ] = 0.0,
    oracle_steps: Annotated[int, Option(min=0, help="Steps over which that share falls to 0.")] = 0,
    dropout: Annotated[float, Option(help="Dropout rate.")] = 0.0,
    steps: Annotated[int, Option(min=1, help="Training steps.")] = 1000,
    sequence_length: shared.SequenceLength = 512,
    batch_size: Annotated[int, Option(min=1, max=shared.MAX_SIZE, help="Sequences per step.")] = 4,
    micro_batches: Annotated[int, Option(min=1, help="Split each step into parts, to save memory.")] = 1,
    neighbours: Annotated[int, Option("-k", "--neighbours", min=0, help="Neighbours per chunk; 0: no retrieval.")] = 2,
    learning_rate: Annotated[float, Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[int, Option(min=0, help="Warm-up steps before the cosine decay.")] = 50,
    weight_decay: Annotated[float, Option(max=1000, help="Weight decay of AdamW.")] = 0.1,
    seed: shared.Seed = 0,
    checkpoint_every: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 50,
) -> None:
    """Train a RETRO or a baseline, or RETROfit a trained baseline.

    CCA is chunked cross-attention (paper §2.4). If interrupted, run the same command to resume from the last
    checkpoint. The result is the same, bit for bit, as without the interruption.

    Example: `retro-np train runs/db -o runs/retro --steps 500`"""
    import numpy as np

    from retro_np.checkpoint import load_model
    from retro_np.files import sha256_of
    from retro_np.parameters import count_parameters, is_retrieval
    from retro_np.training import loop
    from retro_np.training.config import TrainingConfig

    refuse_contradictions(context)
    database = open_database(db)
    layers = () if baseline else parse_layers(cca_layers)
    RetroConfig(1, d_model, d_ffw, n_heads, d_head, n_layers)  # An error in a shared size names the decoder's option.
    encoder = EncoderConfig(d_model, d_ffw, n_heads, d_head, encoder_layers, (1,) if conditioning else ())
    training = TrainingConfig(
        steps, sequence_length, batch_size, micro_batches, neighbours, learning_rate, warmup, weight_decay,
        seed=seed, checkpoint_every=checkpoint_every, retrieval_off=retrieval_off, oracle_share=oracle_share,
        oracle_steps=oracle_steps,
    )  # fmt: skip
    start: dict[str, Any] = {}
    if retrofit is not None:
        weights, config = load_model(retrofit, database)
        encoder = replace(encoder, d_model=config.d_model) if share_embeddings else encoder
        config = replace(
            config, cca_positions=cca_positions, share_embeddings=share_embeddings, retrieved_part=retrieved_part,
            dropout=dropout, copying_start=copying_start,
        )  # fmt: skip
        params, config = loop.retrofit(weights, config, parse_layers(cca_layers), encoder, np.random.default_rng(seed))
        start = {"begin_from": (params, sha256_of(retrofit)), "trainable": is_retrieval}
    elif preset is not None:
        config = replace(RetroConfig.preset(preset, database.vocabulary_size), chunk_size=database.chunk_size)
    else:
        config = RetroConfig(
            database.vocabulary_size, d_model, d_ffw, n_heads, d_head, n_layers, layers, database.chunk_size,
            None if baseline else encoder, dropout, share_embeddings, tie_readout, cca_positions, retrieved_part,
            copying_start and not baseline,
        )  # fmt: skip
    stored = database.split("train").neighbours.shape[1]
    if config.retrieves and neighbours > stored > 0:
        raise UserError(f"-k is {neighbours:,}, but {db} stores {stored} neighbours per training chunk: choose fewer")
    console.print(f"{count_parameters(config):,} parameters, {count_parameters(config, True):,} with embeddings")
    loop.train(database, config, training, out, **start)
    console.print(f"{out}/checkpoint.safetensors holds the model after step {steps}.")


def evaluate(
    checkpoint: shared.CheckpointPath,
    db: shared.DatabasePath,
    baseline: Annotated[Path | None, Option(help="Checkpoint of a baseline, to compare with.")] = None,
    out: Annotated[Path, Option("-o", "--out", help="Folder of the results.")] = Path("runs/evaluation"),
    split: Annotated[str, Option(help="The documents to score: valid (held out) or train.")] = "valid",
    k: shared.K = 2,
    sequence_length: shared.SequenceLength = 512,
    stride: Annotated[int, Option(min=1, help="Tokens by which the window moves, a multiple of the chunk size.")] = 256,
    limit: Annotated[int | None, Option(min=1, help="Score only this many chunks.")] = None,
    retrieve_from: Annotated[list[Path] | None, Option(help="Retrieve from this database instead; repeatable.")] = None,
    fraction: Annotated[float, Option(help="Retrieve from a random share of the documents.")] = 1.0,
    fraction_seed: Annotated[int, Option(min=0, help="Random seed of that share.")] = 0,
) -> None:
    """Measure bits per byte of held-out documents.

    The conditions are RETRO with retrieval on, with retrieval off, with the neighbours of other chunks, and the
    baseline. Writes results.json, losses.npz and bpb_alpha.png.

    Example: `retro-np evaluate runs/retro/checkpoint.safetensors runs/db`"""
    from retro_np.checkpoint import load_model
    from retro_np.evaluation.compare import evaluate as evaluate_models
    from retro_np.evaluation.leakage import LEAKAGE_NEIGHBOURS
    from retro_np.report.plots import plot_leakage
    from retro_np.retrieval import join

    database = open_database(db)
    models = {"RETRO": load_model(checkpoint, database)}
    if baseline is not None:
        models["baseline"] = load_model(baseline, database)
    retrieval = None
    k = k if retrieve_from else min(k, max(1, database.n_chunks))
    if k > database.split(split).neighbours.shape[1] > 0:
        retrieve_from = retrieve_from or [db]  # Search again, because the database stores fewer than k neighbours.
    if retrieve_from or fraction != 1:
        if split != "valid":
            options = "--retrieve-from, --fraction and a -k above the stored neighbours"
            raise UserError(f"{options} are for held-out documents; leave out --split")
        folders = retrieve_from or [db]
        parts = [open_database(path).fraction(shared.finite("--fraction", fraction), fraction_seed) for path in folders]
        source = parts[0] if len(parts) == 1 else join.DatabaseUnion(parts)
        k = min(k, max(1, source.n_chunks))
        retrieval = join.retrieve_from(database, source, max(k, LEAKAGE_NEIGHBOURS))
    results = evaluate_models(
        models, database, out, split=split, k=k, sequence_length=sequence_length, stride=stride, limit=limit,
        retrieval=retrieval,
    )  # fmt: skip
    plot_leakage(results["alphas"], results["bpb_alpha"], out / "bpb_alpha.png")
    shared.print_results(results)
    console.print(f"{out} contains results.json, losses.npz and bpb_alpha.png.")


def sample(
    checkpoint: Annotated[Path | None, Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")] = None,
    db: Annotated[Path | None, Argument(metavar="DB", help="A database made by `retro-np build`.")] = None,
    pretrained: Annotated[bool, Option("--pretrained", help=BUNDLED_HELP)] = False,
    prompt: Annotated[str, Option(help="The text to continue.")] = "def read_json(path):\n    ",
    length: Annotated[int, Option(min=1, help="Tokens to sample.")] = 128,
    k: shared.K = 2,
    retrieval: Annotated[bool, Option(help="Retrieve at the end of each chunk.")] = True,
    temperature: shared.Temperature = 0.8,
    top_k: Annotated[int | None, Option(min=1, help="Sample only from this many of the likeliest tokens.")] = None,
    top_p: shared.TopP = 0.95, seed: shared.Seed = 0,
    page: Annotated[Path | None, Option(help="Also write an HTML page to this file.")] = None,
    embedder: shared.EmbedderPath = None,
) -> None:  # fmt: skip
    """Continue a prompt, and show what was retrieved.

    Colours mark the tokens that a chunk shares with its retrieved text.

    Example: `retro-np sample --pretrained --prompt "import json"`"""
    from retro_np.checkpoint import load_model
    from retro_np.files import check_output
    from retro_np.report.samples import print_sample, sample_chunks, write_page
    from retro_np.report.shown import is_page

    if pretrained:
        from retro_np.experiments.pretrained import pretrained_database
        from retro_np.pretrained.bundled import RETRO, bundled_file

        if db is not None:
            raise UserError("--pretrained replaces CHECKPOINT; give at most a DB")
        checkpoint, db = bundled_file(RETRO), checkpoint  # The first argument, if any, is the database.
    elif checkpoint is None or db is None:
        raise UserError("give a CHECKPOINT and a DB, or --pretrained")
    database = pretrained_database(PRETRAINED_DATABASE, PRETRAINED_BYTES) if db is None else open_database(db, embedder)
    params, config = load_model(checkpoint, database)
    path = None if page is None else check_output(page, "--page", [checkpoint, database.path], is_page)
    k = min(k, database.n_chunks)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    chunks = sample_chunks(params, config, database, prompt, length, k if retrieval else 0, **settings)
    print_sample(console, chunks)
    if path is not None:
        facts = {"checkpoint": str(checkpoint), "database": str(database.path)}
        facts |= {name: str(value) for name, value in settings.items()}
        write_page(path, "A sample and what it retrieved", [{"heading": prompt, "chunks": chunks}], facts)
        console.print(f"The page is {page}.")


def refuse_contradictions(context: Context) -> None:
    """Raise UserError if `train` is given options that another option would silently override."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    for option, excluded in EXCLUDED.items():
        clash = [name for name in typed if name in excluded | EXCLUDED.keys() - {option}]
        if option in typed and clash:
            options = ", ".join("--" + name.replace("_", "-") for name in clash)
            raise UserError(f"--{option} excludes {options}; leave out one or the other")


def parse_layers(text: str) -> tuple[int, ...]:
    """`2,4` → (2, 4). Raises UserError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"--cca-layers must be numbers separated by commas, such as 2,4, not {text!r}") from error
