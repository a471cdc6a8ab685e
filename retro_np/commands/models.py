"""`retro-np train`, `sample`."""

from dataclasses import replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any

from typer import Argument, Context, Option

from retro_np.commands import options
from retro_np.commands.options import console, group_of, is_typed, naming, open_database, read_sections, with_options
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.progress import say
from retro_np.training.config import TrainingConfig

MODEL_OPTIONS = group_of(
    RetroConfig, "Model", leave_out=("vocabulary_size", "chunk_size", "encoder"),
    hidden=("share_embeddings", "tie_readout", "cca_positions", "retrieved_part"),
    d_model={"default": 128}, d_ffw={"default": 512}, n_heads={"default": 4}, d_head={"default": 32},
    n_layers={"default": 4}, cca_layers={"default": "2,4", "metavar": "2,4"},
)  # fmt: skip
FOLLOWING = ("d_model", "d_ffw", "n_heads", "d_head")  # of the encoder, by default as in the decoder
ENCODER_OPTIONS = group_of(
    EncoderConfig, "Encoder", prefix="encoder_", hidden=(*FOLLOWING, "ca_layers"),
    n_layers={"names": ("--encoder-layers",)}, **{field: {"default": None} for field in FOLLOWING},
)  # fmt: skip
TRAINING_OPTIONS = group_of(
    TrainingConfig, "Training",
    hidden=("retrieval_off", "oracle_share", "oracle_steps", "min_learning_rate", "beta1", "beta2", "eval_chunks",
            "segments"),
    neighbours={"names": ("-k", "--neighbours")}, sequence_length={"max": options.MAX_SIZE},
    batch_size={"max": options.MAX_SIZE}, weight_decay={"max": 1000},
)  # fmt: skip
GROUPS = {"model": MODEL_OPTIONS, "encoder": ENCODER_OPTIONS, "training": TRAINING_OPTIONS}
SECTIONS: dict[str, type] = {**{name: group.config for name, group in GROUPS.items()}, "data": dict}
# The options of `train` that --baseline, --retrofit and --preset exclude
SIZE_OPTIONS = {"d_model", "d_ffw", "n_heads", "d_head", "n_layers", "tie_readout"}
CCA_FIELDS = {"cca_layers", "cca_positions", "share_embeddings", "retrieved_part", "copying_start"}
CCA_OPTIONS = CCA_FIELDS | {"conditioning"} | {option.name for option in ENCODER_OPTIONS.options.values()}
EXCLUDED = {
    "preset": SIZE_OPTIONS | CCA_OPTIONS | {"dropout"},
    "retrofit": SIZE_OPTIONS,
    "baseline": CCA_OPTIONS | {"neighbours", "retrieval_off", "oracle_share", "oracle_steps"},
}
BUNDLED_HELP = "Use the bundled model. Without DB, a DB of part of the standard library is built in runs/pretrained."
PRETRAINED_DATABASE, PRETRAINED_BYTES = Path("runs/pretrained/db"), 3_000_000  # builds in half a minute


@with_options(MODEL_OPTIONS, ENCODER_OPTIONS, TRAINING_OPTIONS)
def train(
    context: Context,
    db: options.DatabasePath,
    out: Annotated[Path, Option("-o", "--out", help="The run's folder: a new one, or that of an interrupted run.")],
    config: Annotated[
        Path | None, Option(help="Take settings from a TOML file, or a run's config.json. Options override them.")
    ] = None,
    baseline: Annotated[bool, Option("--baseline", help="Train without retrieval: no CCA, no encoder.")] = False,
    retrofit: Annotated[Path | None, Option(help="Train only CCA and encoder, on this baseline's checkpoint.")] = None,
    preset: Annotated[str | None, Option(help="Instead of sizes, one of the paper's table 2: retro-172m, ….")] = None,
    log: Annotated[list[str] | None, Option(help="Also log for tensorboard, csv or wandb; repeatable.")] = None,
    conditioning: Annotated[bool, Option(hidden=True, help="Let the encoder attend to the retrieving chunk.")] = True,
    **values: Any,
) -> None:
    """Train a RETRO or a baseline, or RETROfit a trained baseline.

    CCA is chunked cross-attention (paper §2.4). If interrupted, run the same command to resume from the last
    checkpoint. The result is the same, bit for bit, as without the interruption. More --steps prolong a finished run.

    A file has the sections [model], [encoder] and [training]. Its keys are the options' names with _ for -, and those
    of ablations, which docs/run.toml lists.

    Example: `retro-np train runs/db -o runs/retro --steps 500`"""
    import numpy as np

    from retro_np.checkpoint import load_model
    from retro_np.files import sha256_of
    from retro_np.parameters import count_parameters, is_retrieval
    from retro_np.pretrained.bundled import trained_on
    from retro_np.training import loggers, loop

    refuse_contradictions(context)
    file = read_sections(config, SECTIONS)
    database = open_database(db)
    stored_encoder = file["model"].pop("encoder", {})  # None in the config.json of a baseline
    if stored_encoder and file["encoder"]:
        raise UserError(f"{config} has both [encoder] and [model.encoder]: leave one of them out")
    file["encoder"] |= stored_encoder or {}
    if baseline:
        file["model"] = {field: value for field, value in file["model"].items() if field not in CCA_FIELDS}
    kept = {name: group.kept(context, file[name]) for name, group in GROUPS.items()}
    start: dict[str, Any] = {}
    with naming(config, kept):
        fields, sizes, settings = (group.chosen(context, values, file[name]) for name, group in GROUPS.items())
        earlier = file["training"]
        if earlier.get("segments") and settings["steps"] > earlier.get("steps", settings["steps"]):
            settings["segments"] = (*earlier["segments"], earlier["steps"])  # --steps prolongs the file's run.
        training = TrainingConfig(**settings)
        layers = () if baseline else fields["cca_layers"]
        if retrofit is not None:
            weights, model = load_model(retrofit, database)
            model = replace(model, **{field: fields[field] for field in {"dropout", *CCA_FIELDS} - {"cca_layers"}})
        elif preset is not None:
            model = replace(RetroConfig.preset(preset, database.vocabulary_size), chunk_size=database.chunk_size)
        else:
            ids = {"vocabulary_size": database.vocabulary_size, "chunk_size": database.chunk_size}
            model = RetroConfig(**fields | ids | {"cca_layers": ()})
        if preset is None and not baseline:
            if not conditioning:
                sizes["ca_layers"] = ()
            encoder = EncoderConfig(**{field: getattr(model, field) for field in FOLLOWING} | sizes)
            if retrofit is not None:
                params, model = loop.retrofit(weights, model, layers, encoder, np.random.default_rng(training.seed))
                start = {"begin_from": (params, sha256_of(retrofit)), "trainable": is_retrieval}
                start["trained_on"] = trained_on(retrofit)
            else:
                model = replace(model, cca_layers=layers, encoder=encoder if layers or stored_encoder == {} else None)
    for section, whole in (("model", model), ("encoder", model.encoder)):
        for field, value in kept[section].items():
            if whole is not None and getattr(whole, field) != value:
                source = db if field in ("vocabulary_size", "chunk_size") else "--retrofit" if retrofit else "--preset"
                fault = f"{config}: [{section}] {field} is {shortened(value)}, but {source} has {getattr(whole, field)}"
                raise UserError(f"{fault}; leave it out of the file")
    _compare(config, file["data"], database.identity, start)
    stored = database.split("train").neighbours.shape[1]
    if model.retrieves and training.neighbours > stored > 0:
        fault = f"-k is {training.neighbours:,}, but {db} stores {stored} neighbours per training chunk"
        raise UserError(f"{fault}: choose fewer")
    console.print(f"{count_parameters(model):,} parameters, {count_parameters(model, True):,} with embeddings")
    start["callbacks"] = [loggers.logger(kind, out) for kind in dict.fromkeys(log or ())]
    loop.train(database, model, training, out, **start)
    best = ", best.safetensors the one of the lowest valid_loss" if training.eval_every else ""
    console.print(f"{out}/checkpoint.safetensors holds the model after step {training.steps}{best}.")


def _compare(path: Path | None, run: dict[str, Any], identity: dict[str, str], start: dict[str, Any]) -> None:
    """Say how a new run differs from the one whose config.json is given, as far as the settings do not say it.

    run: the file's section `data`. Raises UserError if the run began from a checkpoint, and none is given."""
    if not start and (begun := run.get("begun_from") or run.get("frozen")):
        raise UserError(f"{path} is of a run that began from a checkpoint ({begun!s:.6}…): name it with --retrofit")
    now = {**identity, "begun_from": start["begin_from"][1] if start else None}
    differing = [f"{n:.40}" for n, value in run.items() if n not in ("frozen", "trained_on") and now.get(n) != value]
    if differing:
        say(f"{path} is of a run with another {' and '.join(differing[:9])}, so this run will not repeat it")


def sample(
    checkpoint: Annotated[Path | None, Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")] = None,
    db: Annotated[Path | None, Argument(metavar="DB", help="A database made by `retro-np build`.")] = None,
    pretrained: Annotated[bool, Option("--pretrained", help=BUNDLED_HELP)] = False,
    prompt: Annotated[str, Option(help="The text to continue.")] = "def read_json(path):\n    ",
    length: Annotated[int, Option(min=1, help="Tokens to sample.")] = 128,
    k: options.K = 2,
    retrieval: Annotated[bool, Option(help="Retrieve at the end of each chunk.")] = True,
    temperature: options.Temperature = 0.8,
    top_k: Annotated[int | None, Option(min=1, help="Sample only from this many of the likeliest tokens.")] = None,
    top_p: options.TopP = 0.95, seed: options.Seed = 0,
    page: Annotated[Path | None, Option(help="Also write an HTML page to this file.")] = None,
    embedder: options.EmbedderSpec = None,
) -> None:  # fmt: skip
    """Continue a prompt, and show what was retrieved.

    Colours mark the tokens that a chunk shares with its retrieved text.

    Example: `retro-np sample --pretrained --prompt "import json"`"""
    from retro_np.checkpoint import load_model
    from retro_np.files import check_output
    from retro_np.report.samples import is_page, print_sample, sample_chunks, write_page

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
    typed = [name for name in context.params if is_typed(context, name)]
    for option, excluded in EXCLUDED.items():
        clash = [name for name in typed if name in excluded | EXCLUDED.keys() - {option}]
        if option in typed and clash:
            names = ", ".join("--" + name.replace("_", "-") for name in clash)
            raise UserError(f"--{option} excludes {names}; leave out one or the other")
