"""`retro-np`: build, search, train, evaluate, sample, gradcheck, info, demo.

Each command imports what it needs when it runs, so that `--help` answers at once.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError

app = typer.Typer(
    name="retro-np",
    help="RETRO, the retrieval-enhanced transformer, in NumPy. Start with `retro-np demo`, which does all of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(markup=False, highlight=False)  # names and paths may hold brackets

DatabasePath = Annotated[Path, typer.Argument(metavar="DB", help="A database that `retro-np build` made.")]
CheckpointPath = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")]
EmbedderPath = Annotated[
    Path | None,
    typer.Option("--embedder", help="A BERT's folder. Default: all-MiniLM-L6-v2, found where it is installed."),
]
# options of `train` that say what a model is; the retrieval's own, and those that another choice has settled already
RETRIEVAL_OPTIONS = {
    "cca_layers", "encoder_layers", "conditioning", "cca_positions", "share_embeddings", "retrieved_part", "neighbours",
}  # fmt: skip
SETTLED_BY_BASELINE = {"d_model", "d_ffw", "n_heads", "d_head", "n_layers", "tie_readout"}
SETTLED_BY_PRESET = SETTLED_BY_BASELINE | RETRIEVAL_OPTIONS - {"neighbours"} | {"dropout"}
INTERRUPTED = 130
K = Annotated[int, typer.Option("-k", "--neighbours", min=1, help="Neighbours of a chunk.")]
Seed = Annotated[int, typer.Option(min=0, help="Settles everything that is drawn.")]


@app.command()
def build(
    corpus: Annotated[str, typer.Argument(help="A folder, a text file, a .jsonl with `text` a line, or `stdlib`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The database's folder, new or begun before.")],
    chunk_size: Annotated[int, typer.Option(min=1, help="m, tokens in a chunk.")] = 64,
    vocabulary_size: Annotated[int, typer.Option(min=1, help="Tokens of the BPE to train.")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer.json instead of training one.")] = None,
    held_out: Annotated[float, typer.Option(min=0, help="Share of documents kept for evaluation.")] = 0.1,
    keys: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    neighbours: Annotated[int, typer.Option(min=1, help="Neighbours kept for each chunk.")] = 10,
    limit_mb: Annotated[float | None, typer.Option(help="Take a slice of the corpus of about so many MB.")] = None,
    embedder: EmbedderPath = None,
) -> None:
    """Build a retrieval database from text.

    Trains a tokenizer, cuts documents into chunks, makes a key of each with a frozen BERT, indexes the keys, and finds
    each chunk's neighbours. Stopped anywhere, the same command goes on. Python's own library as corpus:
    `retro-np build stdlib -o runs/db --limit-mb 1`
    """
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.build import BuildConfig, build_database

    config = BuildConfig(
        chunk_size=chunk_size,
        vocabulary_size=vocabulary_size,
        tokenizer=str(tokenizer) if tokenizer else None,
        held_out=held_out,
        key_dtype=keys,
        neighbours=neighbours,
        limit_bytes=None if limit_mb is None else int(finite("--limit-mb", limit_mb) * 1e6),
    )
    describe_database(build_database(corpus, out, config, load_bert(embedder)))


@app.command()
def search(
    db: DatabasePath,
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: K = 5,
    embedder: EmbedderPath = None,
) -> None:
    """Show the values whose keys are nearest to a text: chunk N, and its continuation F below it."""
    database = open_database(db, embedder)
    ids, distances = database.search(text, min(k, database.n_chunks + 1))
    m = database.chunk_size
    for rank, (chunk, distance) in enumerate(zip(ids, distances, strict=True), start=1):
        if chunk < 0:
            console.print(f"The database holds {rank - 1} chunks: that is all.")
            break
        document = database.documents[int(database.document_of(chunk))]
        value = database.value(chunk)
        console.rule(f"{rank}  squared distance {distance:.3f}  {document['name']}", align="left")
        console.print(database.text(value[:m]))
        console.print(database.text(value[m:]), style="dim")


@app.command()
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

    from retro_np.files import sha256_of
    from retro_np.nn.scope import every
    from retro_np.parameters import count_parameters, is_retrieval
    from retro_np.training.checkpoint import TrainingConfig, load_model
    from retro_np.training.loop import retrofit as make_retrofit
    from retro_np.training.loop import train as run_training

    refuse_contradictions(context)
    database = open_database(db)
    layers = () if baseline else parse_layers(cca_layers)
    encoder = EncoderConfig(d_model, d_ffw, n_heads, d_head, encoder_layers, (1,) if conditioning else ())
    training = TrainingConfig(
        steps, sequence_length, batch_size, micro_batches, neighbours, learning_rate, warmup, weight_decay,
        seed=seed, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    begin_from, trainable = None, every
    if retrofit is not None:
        trained, config = load_model(retrofit, database)
        encoder = replace(encoder, d_model=config.d_model) if share_embeddings else encoder
        config = replace(
            config, cca_positions=cca_positions, share_embeddings=share_embeddings, retrieved_part=retrieved_part,
            dropout=dropout,
        )  # fmt: skip
        params, config = make_retrofit(trained, config, parse_layers(cca_layers), encoder, np.random.default_rng(seed))
        begin_from, trainable = (params, sha256_of(retrofit)), is_retrieval
    elif preset is not None:
        config = replace(RetroConfig.preset(preset, database.vocabulary_size), chunk_size=database.chunk_size)
    else:
        config = RetroConfig(
            database.vocabulary_size, d_model, d_ffw, n_heads, d_head, n_layers, layers, database.chunk_size,
            None if baseline else encoder, dropout, share_embeddings, tie_readout, cca_positions, retrieved_part,
        )  # fmt: skip
    console.print(f"{count_parameters(config):,} parameters, and {count_parameters(config, True):,} with embeddings")
    run_training(database, config, training, out, begin_from=begin_from, trainable=trainable)
    console.print(f"{out}/checkpoint.safetensors holds step {steps}.")


@app.command()
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
) -> None:
    """Bits per byte of held-out documents: RETRO with retrieval on, off, and with the neighbours of others; bpb(α)."""
    from retro_np.experiments.compare import compare
    from retro_np.training.checkpoint import load_model

    database = open_database(db)
    models = {"RETRO": load_model(checkpoint, database)}
    if baseline is not None:
        models["baseline"] = load_model(baseline, database)
    results = compare(
        models, database, out, split=split, k=k, sequence_length=sequence_length, stride=stride, limit=limit
    )
    print_results(results)
    console.print(f"Everything is in {out}: results.json, losses.npz, bpb_alpha.png")


@app.command()
def sample(
    checkpoint: CheckpointPath,
    db: DatabasePath,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens to sample.")] = 128,
    k: K = 2,
    retrieval: Annotated[bool, typer.Option(help="Retrieve at each chunk's end.")] = True,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Seed = 0,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page as well.")] = None,
    embedder: EmbedderPath = None,
) -> None:
    """Go on from a prompt, with what was retrieved beside it; colours show the tokens that both have in common."""
    from retro_np.files import check_folder
    from retro_np.report.samples import print_sample, sample_chunks, write_page
    from retro_np.training.checkpoint import load_model

    database = open_database(db, embedder)
    params, config = load_model(checkpoint, database)
    if page is not None:
        check_folder(page.parent)
        if page.is_dir():
            raise UserError(f"{page} is a folder: give --page the name of a file")
    k = min(k, database.n_chunks)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    chunks = sample_chunks(params, config, database, prompt, length, k if retrieval else 0, **settings)
    print_sample(console, chunks)
    if page is not None:
        facts = {"checkpoint": str(checkpoint), "database": str(db)} | {n: str(v) for n, v in settings.items()}
        write_page(page, "A sample, and what it retrieved", [{"heading": prompt, "chunks": chunks}], facts)
        console.print(f"The page is {page}.")


@app.command()
def gradcheck(
    name: Annotated[str, typer.Argument(help="Only operators whose name holds this, e.g. CCA.")] = "",
    tolerance: Annotated[float, typer.Option(help="The largest error that passes.")] = 1e-6,
    seed: Seed = 0,
) -> None:
    """Check every operator's backward pass, and the whole model's, against finite differences in float64.

    About a minute for all of them.
    """
    from retro_np.gradcheck import GradientError
    from retro_np.gradcheck import gradcheck as check_gradients
    from retro_np.nn.checks import checks
    from retro_np.progress import progress_bar

    table = Table("operator", "source", "worst error", title="pullback against central differences, float64")
    failures = []
    chosen = [check for check in checks(seed) if name in check.name]
    if not chosen:
        raise UserError(f"no operator's name holds {name!r}; there are {', '.join(c.name for c in checks(seed))}")
    with progress_bar("checking", len(chosen)) as advance:
        for check in chosen:
            try:
                shown = f"{check_gradients(check.f, *check.arrays, tolerance=tolerance, seed=seed):.1e}"
            except GradientError as error:
                failures.append(f"{check.name}: {error}")
                shown = "FAILS"
            table.add_row(check.name, check.source, shown)
            advance(note=check.name)
    console.print(table)
    if failures:
        raise UserError("; ".join(failures))
    console.print(f"all {len(chosen)} below {tolerance:g}")


@app.command()
def info() -> None:
    """What is installed, which kernel runs where, and what is missing."""
    from retro_np.info import facts

    table = Table(show_header=False)
    for name, value in facts():
        table.add_row(name, value)
    console.print(table)


@app.command()
def demo(
    minutes: Annotated[
        float | None, typer.Option(min=0.5, help="About how long it may take, 10 if not said.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int | None, typer.Option(min=0, help="Settles everything that is drawn.")] = None,
) -> None:
    """The whole path on Python's standard library: database, baseline, RETRO, evaluation, samples.

    What it makes is in runs/demo. Started again it goes on where it was, or shows what is there.
    """
    from retro_np.experiments.demo import run_demo

    print_results(run_demo(minutes, out, seed, console))
    console.print(
        f"In {out}: results.json, losses.npz, loss.png, bpb_alpha.png, samples.html, db/, and a checkpoint in "
        "baseline/ and retro/"
    )


def open_database(path: Path, embedder: Path | None = None):
    """Open a database for a command, with the embedder named on its line."""
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.database import Database

    return Database.open(path, load_bert(embedder) if embedder else None)


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


def finite(option: str, value: float) -> float:
    """The value of an option that may be no infinity and no NaN."""
    if not math.isfinite(value):
        raise UserError(f"{option} is a number, not {value}")
    return value


def parse_layers(text: str) -> tuple[int, ...]:
    """`2,4` → (2, 4)."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"--cca-layers are numbers with commas, like 2,4, not {text!r}") from error


def describe_database(database) -> None:
    """What was built, in a few lines."""
    for name, split in database.manifest["splits"].items():
        console.print(
            f"{name}: {split['documents']} documents, {split['chunks']:,} chunks of {database.chunk_size} tokens, "
            f"{split['bytes']:,} bytes"
        )
    if database.manifest["replaced"]:
        console.print(f"{database.manifest['replaced']:,} places were not UTF-8 and became U+FFFD")
    skipped = json.loads((database.path / "build.json").read_text())["skipped"]
    if skipped:
        console.print(f"{len(skipped)} binary files were left out, the first of them {skipped[0]}")
    console.print(f"{database.path}: search it with retro-np search {database.path} TEXT")


def print_results(results: dict) -> None:
    """The table of an evaluation."""
    table = Table("", "bits per byte", "against the first", "without leakage (α = 12.5 %)", title="held-out documents")
    first = None
    for name, figures in results["models"].items():
        first = first or figures["bpb"]
        change = f"{100 * (figures['bpb'] / first - 1):+.2f} %"
        filtered = figures["bpb_no_leakage"]
        table.add_row(name, f"{figures['bpb']:.4f}", change, "no chunk left" if filtered is None else f"{filtered:.4f}")
    console.print(table)
    console.print(results["sentence"])


def main() -> None:
    """The entry point: a user's mistake is one line and status 2, an interrupt status 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer's answer to Ctrl-C, which it takes before we see it
            print("retro-np: stopped; the same command goes on from what is there", file=sys.stderr)
        raise
    except (UserError, OSError, MemoryError, OverflowError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, MemoryError):
            line = f"not enough memory ({line}): ask for smaller sizes"
        elif isinstance(error, OverflowError):
            line = f"a number is too large ({line}): give a smaller one"
        print(f"retro-np: {line}", file=sys.stderr)
        sys.exit(2)
