"""`retro-np train`, `sample`."""

import time
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any

from typer import Argument, Context, Option

from retro_np.commands import options
from retro_np.commands.options import chosen, console, group_of, is_typed, naming, open_database, read_sections
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.progress import counted, say
from retro_np.training.config import TrainingConfig

MODEL_OPTIONS = group_of(
    RetroConfig, "Model", leave_out=("vocabulary_size", "chunk_size", "encoder", "padding_id"),
    hidden=("share_embeddings", "tie_readout", "cca_positions", "retrieved_part"),
    d_model={"default": 128}, d_ffw={"default": 512}, n_heads={"default": 4}, d_head={"default": 32},
    n_layers={"default": 4}, cca_layers={"default": (2, 4)},
    copying_start={"rich_help_panel": "Encoder"},  # Its two long names would make the other column of texts narrow.
)  # fmt: skip
# By default the encoder has the decoder's values of these fields.
FOLLOWING = ("d_model", "d_ffw", "n_heads", "d_head")
ENCODER_OPTIONS = group_of(
    EncoderConfig, "Encoder", prefix="encoder_", hidden=(*FOLLOWING, "ca_layers"),
    n_layers={"names": ("--encoder-layers",)}, **{field: {"default": None} for field in FOLLOWING},
)  # fmt: skip
TRAINING_OPTIONS = group_of(
    TrainingConfig, "Training",
    hidden=("retrieval_off", "oracle_share", "oracle_steps", "random_share", "min_learning_rate", "beta1", "beta2",
            "eval_chunks", "segments"),
    neighbours={"names": ("-k", "--neighbours")},
)  # fmt: skip
GROUPS = {"model": MODEL_OPTIONS, "encoder": ENCODER_OPTIONS, "training": TRAINING_OPTIONS}
# What each section of a file of settings may contain
KEYS = {"model": RetroConfig, "encoder": EncoderConfig, "training": TrainingConfig, "data": None}
# The options of `train` that --baseline, --retrofit and --preset exclude
SIZE_OPTIONS = {"d_model", "d_ffw", "n_heads", "d_head", "n_layers", "tie_readout"}
CCA_FIELDS = {"cca_layers", "cca_positions", "share_embeddings", "retrieved_part", "copying_start"}
CCA_OPTIONS = CCA_FIELDS | {"conditioning"} | {option.name for option in ENCODER_OPTIONS.values()}
OF_PAPER_FORM = CCA_OPTIONS - {"cca_layers", "retrieved_part"}
OF_RETRIEVAL = {"neighbours", "retrieval_off", "oracle_share", "oracle_steps", "random_share", "paper_form"}
EXCLUDED = {"preset": SIZE_OPTIONS | CCA_OPTIONS | {"dropout"}, "retrofit": SIZE_OPTIONS}
EXCLUDED["baseline"] = CCA_OPTIONS | OF_RETRIEVAL
OF_OTHERS = ("paper_form", "rank", "from_scratch")  # options for --retrofit of a model of others
PAPER_FORM_HELP = "For --retrofit of a model of others: the paper's CCA and encoder."
BUNDLED_HELP = "Use the bundled model. Without DB, a DB of part of the standard library is built in runs/pretrained."
PRETRAINED_DATABASE, PRETRAINED_BYTES = Path("runs/pretrained/db"), 3_000_000  # builds in half a minute


@options.with_options(MODEL_OPTIONS, ENCODER_OPTIONS, TRAINING_OPTIONS)
def train(
    context: Context,
    db: options.DatabasePath,
    out: Annotated[Path, Option("-o", "--out", help="The run's folder. A run in it goes on.")],
    config: Annotated[Path | None, Option(help="Take options from a TOML file, or a run's config.json.")] = None,
    baseline: Annotated[bool, Option("--baseline", help="Train without retrieval: no CCA, no encoder.")] = False,
    retrofit: Annotated[Path | None, Option(help="Give this trained model a memory, and train only that.")] = None,
    paper_form: Annotated[bool, Option("--paper-form", help=PAPER_FORM_HELP)] = False,
    rank: Annotated[int | None, Option(hidden=True, help="Of the memory's changes of low rank.")] = None,
    from_scratch: Annotated[bool, Option("--from-scratch", hidden=True, help="Begin untrained.")] = False,
    preset: Annotated[str | None, Option(help="Instead of sizes, one of the paper's table 2: retro-172m, ….")] = None,
    log: Annotated[list[str] | None, Option(help="Also log for tensorboard, csv or wandb; repeatable.")] = None,
    conditioning: Annotated[bool, Option(hidden=True, help="Let the encoder attend to the retrieving chunk.")] = True,
    **values: Any,
) -> None:
    """Train a RETRO or a baseline, or RETROfit a trained model.

    --retrofit trains CCA and encoder on a baseline of ours. A model of others (smollm2, a folder, a .gguf file) gets a
    memory that reads with the model's own weights, or with --baseline an adaptation; docs/models.md.
    CCA is chunked cross-attention (paper §2.4). If interrupted, run the same command to resume from the last
    checkpoint. The result is the same, bit for bit, as without the interruption. More --steps prolong a finished run
    (--config RUN/config.json gives its other options); without --steps it keeps its own number.

    docs/run.toml lists all settings of a file, which options override.

    Example: `retro-np train runs/db -o runs/retro --steps 500`"""
    import numpy as np

    from retro_np.checkpoint import checkpoint_file, read_meta
    from retro_np.files import sha256_of
    from retro_np.nn.decoders import DecoderConfig
    from retro_np.parameters import count_parameters, is_retrieval
    from retro_np.pretrained.bundled import trained_on
    from retro_np.pretrained.models import is_whole_model_of_ours, load_model, own_file, read_pretrained
    from retro_np.sequences import check_fit
    from retro_np.training import loggers, loop, memory
    from retro_np.tree import named_leaves

    typed = [name for name in context.params if is_typed(context, name)]
    of_others = retrofit is not None and not own_file(retrofit)
    _refuse_clashes(typed, of_others)
    if retrofit is not None and not of_others and not is_whole_model_of_ours(retrofit):
        raise UserError(f"{retrofit} is a model of others with what was added to it: give --retrofit that model itself")
    other = read_pretrained(retrofit) if retrofit is not None and of_others else None
    file = read_sections(config, KEYS | ({} if other is None else {"model": DecoderConfig}))
    database = open_database(db)
    stored_encoder = file["model"].pop("encoder", {})  # None in the config.json of a baseline
    if stored_encoder and file["encoder"]:
        raise UserError(f"{config} has both [encoder] and [model.encoder]: leave one of them out")
    file["encoder"] |= stored_encoder or {}
    if other is not None and not paper_form and (file["encoder"] or not OF_PAPER_FORM.isdisjoint(typed)):
        raise UserError("an encoder and its options belong to the paper's form: add --paper-form, or leave them out")
    known = memory.settings_in(out).get("model", file["model"])  # gives the layers if no option does
    if baseline:
        left_out = CCA_FIELDS | {"adapted_layers", "begin_id"}
        file["model"] = {field: value for field, value in file["model"].items() if field not in left_out}
    replaced = {name: [field for field, option in GROUPS[name].items() if option.name in typed] for name in GROUPS}
    kept = {name: {f: value for f, value in file[name].items() if f not in replaced[name]} for name in GROUPS}
    start: dict[str, Any] = {}
    of_database: dict[str, Any] = {"vocabulary_size": database.vocabulary_size, "chunk_size": database.chunk_size}
    of_database["padding_id"] = database.padding
    with naming(config, [key for section in kept.values() for key in section]):
        fields, sizes, settings = (chosen(group, values) | kept[name] for name, group in GROUPS.items())
        if other is not None and not paper_form:
            given = {*kept["training"], *replaced["training"]}
            settings |= {field: value for field, value in memory.MEMORY_SETTINGS.items() if field not in given}
            settings |= {"random_share": 0.0} if baseline else {}
            if not settings["neighbours"]:
                raise UserError("neighbours (-k) is 0, but a memory is trained on what it reads: give at least 1")
        earlier = file["training"].get("steps", settings["steps"])
        if (segments := kept["training"].get("segments")) and settings["steps"] != earlier:
            if settings["steps"] < earlier:
                fault = f"the run has {earlier} steps, since it was prolonged after step {segments[-1]}"
                raise UserError(f"{fault}: give at least --steps {earlier}, or remove segments from a copy of the file")
            settings["segments"] = (*segments, earlier)  # --steps prolongs the file's run.
        training = TrainingConfig(**settings)
        layers = () if baseline else fields["cca_layers"]
        if retrofit is not None:
            weights, model = load_model(other or retrofit, database)
            model = replace(model, **{field: fields[field] for field in {"dropout", *CCA_FIELDS} - {"cca_layers"}})
            given = {*kept["model"], *replaced["model"]}
            if paper_form and "share_embeddings" not in given:
                shared = sizes.get("d_model") in (None, model.d_model)
                model = replace(model, share_embeddings=known.get("share_embeddings", shared))
            if other is not None and "cca_layers" not in given:
                layers = memory.stored_layers(known)
                if not layers and (paper_form or baseline or memory.is_base_of_bundled(other)):
                    layers = memory.default_layers(model, paper_form)
                elif not layers:
                    check_fit(model, database, training.sequence_length)
                    layers = memory.scanned_layers(other, database, model, training)
                    console.print(f"An untrained memory gains most in the layers {', '.join(map(str, layers))}.")
        elif preset is not None:
            model = replace(RetroConfig.preset(preset), **of_database)
        else:
            model = RetroConfig(**fields | of_database | {"cca_layers": ()})
        if preset is None and (other or not baseline):
            if other is not None and not layers:
                raise UserError("cca_layers is empty, but a memory needs layers that read: give --cca-layers")
            if max(layers, default=0) > model.n_layers and not model.cca_layers:
                shown = ",".join(map(str, layers))
                raise UserError(f"cca_layers is {shown}, but the model has {model.n_layers} layers: give --cca-layers")
            if not conditioning:
                sizes["ca_layers"] = ()
            encoder = EncoderConfig(**{field: getattr(model, field) for field in FOLLOWING} | sizes)
            rng = np.random.default_rng(training.seed)
            if other is not None and retrofit is not None:
                begun = memory.settings_in(out).get("data", file["data"]).get("begun_from")
                untrained = from_scratch or begun == other.sha256 or (begun is None and not training.steps)
                rank = kept["model"].get("rank", memory.RANK) if rank is None else rank
                memory_form = memory.UNTRAINED if untrained else memory.SHIPPED
                form = memory.PAPER_FORM if paper_form else memory.ADAPTED if baseline else memory_form
                added: dict[str, Any] = {"config": model, "layers": layers, "rank": rank, "encoder": encoder}
                model, start = memory.begin(other, database, form, rng, **added)
                # A path is stored whole, so that the base is found from any folder, and is never taken for a hub name.
                start["base"]["name"] = str(retrofit.resolve() if retrofit.exists() else retrofit)
                if form == memory.SHIPPED:
                    fault = "untrained, since the bundled one has another base, other layers or another rank."
                    as_bundled = "as the bundled one; --from-scratch begins untrained."
                    console.print(f"The memory begins {as_bundled if 'trained_on' in start else fault}")
            elif retrofit is not None:
                params, model = loop.retrofit(weights, model, layers, encoder, rng)
                start = {"begin_from": (params, sha256_of(checkpoint_file(retrofit))), "trainable": is_retrieval}
                start["trained_on"] = trained_on(retrofit)
            else:
                model = replace(model, cca_layers=layers, encoder=encoder if layers else None)
    data = {**database.identity, "begun_from": start["begin_from"][1] if start else None}
    sources = dict.fromkeys(of_database, f"{db}")
    _compare(config, kept | {"data": file["data"]}, model, data, sources, "--retrofit" if retrofit else "--preset")
    stored = database.split("train").neighbours.shape[1]
    if model.retrieves and training.neighbours > stored > 0:
        fault = f"-k is {training.neighbours:,}, but {db} stores {stored} neighbours per training chunk"
        raise UserError(f"{fault}: choose fewer")
    leaves = named_leaves(start["begin_from"][0]) if start else []
    trained = f"; {sum(leaf.size for name, leaf in leaves if start['trainable'](name)):,} are trained" if start else ""
    counts = f"{count_parameters(model):,} parameters, {count_parameters(model, True):,} with embeddings"
    console.print(counts + trained)
    start["callbacks"] = [loggers.logger(kind, out) for kind in dict.fromkeys(log or ())]
    for kind in (kind for kind, files in loggers.LOG_FILES.items() if kind not in (log or ()) and any(out.glob(files))):
        say(f"{out} has a log for {kind}, which only --log {kind} continues")
    start["keep_steps"] = "steps" not in file["training"] and "steps" not in typed
    loop.train(database, model, training, out, **start)
    best = ", best.safetensors the one of the lowest valid_loss" if (out / loop.BEST).exists() else ""
    console.print(f"{out}/checkpoint.safetensors holds the model after step {read_meta(out)['step']}{best}.")


def _refuse_clashes(typed: list[str], of_others: bool) -> None:
    """Raise UserError for options that exclude each other. of_others: whether --retrofit names a model of others."""
    for option, excluded in EXCLUDED.items():
        both = {"baseline", "retrofit"} if of_others else set()  # adapts the model without retrieval
        clash = [name for name in typed if name in excluded | EXCLUDED.keys() - {option} - both]
        if option in typed and clash:
            names = ", ".join("--" + name.replace("_", "-") for name in clash)
            raise UserError(f"--{option} excludes {names}; leave out one or the other")
    forms = [name for name in OF_OTHERS if name in typed]
    if forms and (not of_others or ("paper_form" in forms and len(forms) > 1)):
        fault = "--paper-form, --rank and --from-scratch are for --retrofit of a model of others"
        raise UserError(f"{fault}, and --paper-form excludes the other two")


def _compare(
    config: Path | None, kept: dict[str, Any], model: RetroConfig, data: dict[str, Any], sources: dict[str, str],
    source: str,
) -> None:  # fmt: skip
    """Say in what this run's data differs from the run of a file.

    kept: the file's sections. sources, source: where the model has a field from, and where the others. Raises UserError
    for a value that the model does not have, and if the file's run began from a checkpoint and this one does not."""
    for section, whole in (("model", model), ("encoder", model.encoder)):
        for field, value in kept[section].items():
            if whole is not None and (actual := getattr(whole, field)) != value:
                fault = f"{config}: [{section}] {field} is {shortened(value)}"
                raise UserError(f"{fault}, but {sources.get(field, source)} has {actual}; leave it out of the file")
    run = kept["data"]
    if data["begun_from"] is None and (begun := run.get("begun_from") or run.get("frozen")):
        raise UserError(f"{config} is of a run that began from a checkpoint ({begun!s:.6}…): name it with --retrofit")
    differing = [f"{n:.40}" for n, value in run.items() if n not in ("frozen", "trained_on") and data.get(n) != value]
    differing = ["baseline" if name == "begun_from" else name for name in differing]
    if differing:
        say(f"{config} is of a run with another {' and '.join(differing[:9])}, so this run will not repeat it")


def sample(
    context: Context,
    checkpoint: options.OptionalModel = None,
    db: Annotated[Path | None, Argument(metavar="DB", help="A database, for a model that retrieves.")] = None,
    memory: options.ShippedMemory = False,
    pretrained: Annotated[bool, Option("--pretrained", help=BUNDLED_HELP)] = False,
    prompt: Annotated[str, Option(help="The text to continue.")] = "def read_json(path):\n    ",
    length: Annotated[int, Option(min=1, help="Tokens to sample.")] = 128,
    chat: Annotated[bool, Option("--chat", help="The prompt is a user's turn in the model's chat template.")] = False,
    k: options.K = 2,
    retrieval: Annotated[bool, Option(help="Retrieve at the end of each chunk.")] = True,
    temperature: options.Temperature = 0.8,
    top_k: Annotated[int | None, Option(min=1, help="Sample only from this many of the likeliest tokens.")] = None,
    top_p: options.TopP = 0.95, seed: options.Seed = 0,
    page: Annotated[Path | None, Option(help="Also write an HTML page to this file.")] = None,
    embedder: options.EmbedderSpec = None,
) -> None:  # fmt: skip
    """Continue a prompt, and show what was retrieved.

    Colours mark the tokens that a chunk shares with its retrieved text. Where nothing is retrieved, the text appears
    token by token. It ends where the model ends a text or its turn.

    Example: `retro-np sample smollm2 --prompt "The capital of France is"`"""
    from retro_np.evaluation.own_text import WithoutDatabase
    from retro_np.files import check_output
    from retro_np.generation import generate
    from retro_np.pretrained.bundled import RETRO
    from retro_np.pretrained.models import is_whole_model_of_ours, load_model, own_file, read_pretrained
    from retro_np.report import samples
    from retro_np.retrieval.manifest import read_manifest
    from retro_np.retrieval.rows import without_surrogates

    checkpoint, db = options.with_memory(memory, checkpoint, db)
    if pretrained:
        if memory or db is not None:
            raise UserError("--pretrained replaces MODEL; give at most a DB")
        checkpoint, db = Path(RETRO), checkpoint  # The first argument, if any, is the database.
    elif checkpoint is None:
        raise UserError("give a MODEL, such as smollm2, and a DB if it retrieves, or --memory DB, or --pretrained")
    own, model = own_file(checkpoint), None
    if own and db is not None:
        database = open_database(db, embedder)
    elif pretrained:
        from retro_np.experiments.pretrained import pretrained_database

        options.refuse_typed(context, ["embedder"], "the bundled database has its own embedder")
        database = pretrained_database(PRETRAINED_DATABASE, PRETRAINED_BYTES)
    else:
        model = read_pretrained(checkpoint)
        database = WithoutDatabase(model.tokenizer, model.config.chunk_size, str(checkpoint))
        if model.config.retrieves and retrieval:
            raise UserError(f"{checkpoint} retrieves: give a DB, or --no-retrieval")
        if db is not None:
            read_manifest(db)  # so that a wrong name is noticed
    foreign = model or (None if is_whole_model_of_ours(checkpoint) else read_pretrained(checkpoint))
    inputs = [own or checkpoint, *([database.path] if model is None else [])]
    path = None if page is None else check_output(page, "--page", inputs, samples.is_page)
    if chat and foreign is not None:
        from retro_np.pretrained.chat import chat_tokens

        tokens = chat_tokens(foreign, without_surrogates(prompt))
    elif chat:
        raise UserError(f"{checkpoint} has no chat template: leave out --chat")
    else:
        tokens = samples.prompt_tokens(database, prompt, foreign)
    params, config = (model.params, model.config) if model else load_model(foreign or checkpoint, database)
    if not (config.retrieves and retrieval):
        reason = "--no-retrieval is given" if config.retrieves else f"{checkpoint} does not retrieve"
        options.refuse_typed(context, ("k", "embedder"), reason)
    if model is not None and db is not None:
        say(f"{checkpoint} does not retrieve, so {db} is not read")
    positions = getattr(config, "max_positions", length + len(tokens))
    if 0 < (room := positions + 1 - len(tokens)) < length:  # The last token is not read.
        say(f"the model has {positions:,} positions, so the text ends after {counted(room, 'more token')}")
        length = room
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    stop = {database.end_of_text, *(foreign.stop if foreign else ())}
    retrieves, started = config.retrieves and retrieval, time.perf_counter()
    k = min(k, database.n_chunks) if retrieves else 0
    call: dict[str, Any] = {"database": database, "k": k, "stop_token": stop}
    if not retrieves:
        call["on_token"] = samples.token_printer(database, "" if chat else prompt)
    new, retrieved = generate(params, config, tokens, length, **call, **settings)
    seconds, chunks = time.perf_counter() - started, samples.show_chunks(tokens, new, retrieved, database)
    parts = [{"heading": prompt, "chunks": chunks}]
    if retrieves:
        off: list[samples.Chunk] = []
        if foreign is not None:  # Without its memory, it is the model that others trained.
            plain, _ = generate(params, config, tokens, length, **call | {"k": 0}, **settings)
            off = samples.show_chunks(tokens, plain, [], database)
            parts.append({"heading": "The same with retrieval off", "chunks": off})
        samples.print_sample(console, chunks, off)
    else:
        samples.print_text("\n")
    if path is not None:
        settings = {"checkpoint": checkpoint, **({"database": database.path} if model is None else {}), **settings}
        facts = {name: str(value) for name, value in settings.items()}
        samples.write_page(path, "A sample and what it retrieved", parts, facts)
        console.print(f"The page is {page}.")
    say(f"{counted(len(new), 'token')} in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s")
