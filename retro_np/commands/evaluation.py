"""`retro-np evaluate` and `inspect`: what retrieval saves, over all documents and on each token of one text."""

import os
from pathlib import Path
from typing import Annotated, Any

from rich.table import Column, Table
from typer import Argument, Context, Option

from retro_np.commands import options
from retro_np.commands.options import console, is_typed, open_database
from retro_np.errors import UserError
from retro_np.progress import counted

TITLES = {"valid": "held-out documents", "test": "test documents", "train": "training documents", "text": "texts"}
PARTS = {
    "leakage": "r(C), the longest run shared with a neighbour, as a share of the chunk", "match": "the token to come",
    "similarity": "13-gram similarity of the document to the nearest training document",
}  # fmt: skip
SHOWN_DOCUMENTS, CURVES = 20, "bpb_alpha.png"
OWN_READING = "The tokenizer changes texts, so the bytes are those of the texts as it reads them."
ALSO = ("in-context", "knn-lm", "cache")
LEFT_OUT = {"trained_on": "in a model's training text", "in_database": "in the database", "repeated": "given twice"}


def evaluate(
    context: Context, checkpoint: options.OptionalModel = None,
    db: Annotated[Path | None, Argument(metavar="DB", help="A database. With --text, some models need none.")] = None,
    memory: options.ShippedMemory = False,
    baseline: Annotated[Path | None, Option(help="A model without retrieval, to compare with.")] = None,
    against: Annotated[list[Path] | None, Option(help="Also compare with this model; repeatable.")] = None,
    out: Annotated[Path, Option("-o", "--out", help="Folder of the results.")] = Path("runs/evaluation"),
    split: Annotated[str, Option(help="The documents to score: valid (to tune), test (to report) or train.")] = "valid",
    text: Annotated[list[Path] | None, Option(help="Score this text instead: any corpus; repeatable.")] = None,
    k: options.K = 2, sequence_length: options.SequenceLength = 512,
    stride: Annotated[int, Option(min=1, help="Tokens by which the window moves, a multiple of the chunk size.")] = 256,
    limit: Annotated[int | None, Option(min=1, help="Score only this many chunks; without DB, tokens.")] = None,
    retrieve_from: Annotated[list[Path] | None, Option(help="Retrieve from this database instead; repeatable.")] = None,
    fraction: Annotated[float, Option(help="Retrieve from a random share of the documents.")] = 1.0,
    fraction_seed: Annotated[int, Option(min=0, help="Random seed of that share.")] = 0,
    parts: Annotated[bool, Option(help="Also say what the gain is made of. Reads all training documents.")] = True,
    token_losses: Annotated[bool, Option("--token-losses", help="Write the loss of each token to tokens.npz.")] = False,
    also: Annotated[list[str] | None, Option(help=f"Also with a memory: {', '.join(ALSO)}; repeatable.")] = None,
    keys: Annotated[int, Option(min=1, help="Training tokens in the datastore of knn-lm.")] = 1 << 16,
    embedder: options.EmbedderSpec = None,
) -> None:  # fmt: skip
    """Measure bits per byte of held-out documents or other texts, with 95 % intervals.

    The conditions are RETRO with retrieval on, with retrieval off, with the neighbours of other chunks, the baseline,
    and other models. Tune on valid, and report test. Writes results.json, losses.npz and bpb_alpha.png.
    For a model that others trained, --stride is by default half of --sequence-length.

    Example: `retro-np evaluate runs/retro runs/db`"""
    from retro_np.evaluation.compare import evaluate as evaluate_models
    from retro_np.evaluation.compare import model_name
    from retro_np.evaluation.leakage import LEAKAGE_NEIGHBOURS
    from retro_np.evaluation.own_text import WithoutDatabase, own_text
    from retro_np.files import outputs
    from retro_np.nn.decoders import DecoderConfig
    from retro_np.pretrained.bundled import trained_on
    from retro_np.pretrained.models import load_model, own_file, read_pretrained
    from retro_np.report.plots import plot_leakage
    from retro_np.retrieval import join
    from retro_np.retrieval.tokenizer import changes_texts
    from retro_np.sequences import check_fit

    checkpoint, db = options.with_memory(memory, checkpoint, db)
    if checkpoint is None:
        raise UserError("give a MODEL, such as smollm2, or --memory")
    also = [name for names in also or () for name in names.split(",")]
    if "knn-lm" not in also:
        options.refuse_typed(context, ["keys"], "--also knn-lm is not given")
    if db is None:
        options.refuse_typed(context, ["embedder"], "nothing is searched without a DB")
    outputs.claim(out, outputs.EVALUATION)  # before a long search
    opened: dict[Path, Any] = {}
    if db is not None:
        database = open_database(db, embedder)
    elif text and not retrieve_from and fraction == 1:
        model = opened[checkpoint] = read_pretrained(checkpoint)
        database = WithoutDatabase(model.tokenizer, 1, str(checkpoint))  # so that any length is whole chunks
        if model.config.retrieves:
            raise UserError(f"{checkpoint} retrieves: give a DB")
    else:
        raise UserError("give a DB, or --text FILE to score a text of your own without one")
    files = {"RETRO": checkpoint} | ({"baseline": baseline} if baseline else {})
    own = {path: own_file(path) for path in (*files.values(), *(against or ()))}
    scored = {(own[path] or path).resolve() for path in files.values()}
    others = {str(path): path for path in against or () if (own[path] or path).resolve() not in scored}
    for same in {str(path) for path in against or ()} - others.keys():
        console.print(f"--against {same} is left out, since its model is scored already.")
    models, rivals = (
        {name: load_model(opened.get(path, path), database) for name, path in part.items()} for part in (files, others)
    )
    hashes = frozenset[str]().union(*(trained_on(file) for file in own.values() if file))
    configs = [config for _, config in (*models.values(), *rivals.values())]
    if "in-context" not in also and not any(config.retrieves for config in configs):
        options.refuse_typed(context, ("k", "retrieve_from", "fraction", "fraction_seed"), "no model here retrieves")
    if fraction == 1:
        options.refuse_typed(context, ["fraction_seed"], "--fraction is not given")
    positions = [config.max_positions for config in configs if isinstance(config, DecoderConfig)]
    if positions or db is None:
        m = database.chunk_size
        if not is_typed(context, "sequence_length"):
            sequence_length = min([sequence_length, *(max(m, n // m * m) for n in positions)])
        stride = stride if is_typed(context, "stride") else max(1, sequence_length // 2 // m) * m
    for config in configs:
        check_fit(config, database, sequence_length)
    retrieval: join.Retrieval | None = None
    share, databases = options.finite("--fraction", fraction), map(open_database, retrieve_from or ())
    sources = [each.fraction(share, fraction_seed) for each in (databases if retrieve_from else [database])]
    source = sources[0] if len(sources) == 1 else join.DatabaseUnion(sources)
    k = min(k, max(1, source.n_chunks))
    candidates = max(k, LEAKAGE_NEIGHBOURS)
    if text:
        if is_typed(context, "split"):
            raise UserError("--text replaces the split; leave out --split")
        retrieval = own_text(database, text, candidates, source=source, trained_on=hashes)
    elif source is not database or k > database.split(split).neighbours.shape[1] > 0:
        if split == "train":
            searches = "--retrieve-from, --fraction and a -k above the stored neighbours are for held-out documents"
            raise UserError(f"{searches}; leave out --split")
        retrieval = join.retrieve_from(database, source, candidates, split)
    results = evaluate_models(
        models, database, out, split=split, k=k, sequence_length=sequence_length, stride=stride, limit=limit,
        retrieval=retrieval, against=rivals, trained_on=hashes, parts=parts and db is not None,
        token_losses=token_losses, also=also, keys=keys,
    )  # fmt: skip
    (out / CURVES).unlink(missing_ok=True)  # An earlier evaluation may have written it.
    name = model_name(models["RETRO"][1])
    if db is not None:
        plot_leakage(results["alphas"], results["bpb_alpha"], out / CURVES, name)
    print_results(results, name)
    if changes_texts(database.tokenizer):
        console.print(OWN_READING)
    if results["settings"]["split"] == "valid":
        serves = "has no test part, so these documents serve for both" if len(database.held_out_splits) == 1 else ""
        console.print(f"Valid is for tuning; {f'{db} {serves}' if serves else 'report --split test'}.")
    *written, last = ["results.json", "losses.npz", *["tokens.npz"] * token_losses, *[CURVES] * (db is not None)]
    console.print(f"{out} contains {', '.join(written)} and {last}.")


def print_results(results: dict[str, Any], model: str = "RETRO") -> None:
    """Print the tables and the sentence of an evaluation. model: its name."""
    from retro_np.evaluation.compare import SHORT_NAMES, shown

    clean, models = results.get("without_near_copies"), results["models"]  # an old demo's results lack what came later
    scopes = {"all documents": ({name: line["bpb"] for name, line in models.items()}, results.get("comparisons", []))}
    if clean is not None:
        scopes = {"without near-copies": (clean["models"], clean["comparisons"])} | scopes
    table, first = Table(Column("", overflow="fold"), title=TITLES[results["settings"]["split"]]), next(iter(models))
    for scope in scopes:
        table.add_column(f"bits per byte, {scope}")
        table.add_column("relative to the first row")
    for name in models:
        cells = []
        for bpb, comparisons in scopes.values():
            pair = [SHORT_NAMES.get(each, each) for each in (name, first)]
            differences = [_difference(record) for record in comparisons if [record["of"], record["against"]] == pair]
            cells += [f"{bpb[name]:.4f}", *(differences or [""])]
        table.add_row(shown(name, model), *cells)
    console.print(table)
    composition = results.get("parts") or {}
    for kind in (kind for kind in PARTS if kind in composition):
        table = Table(PARTS[kind], "bytes", "documents", f"{composition['of']} against {composition['against']}")
        for part in composition[kind]:
            name = part["token"] if kind == "match" else f"{part['from']:g} to {part['to']:g}"
            table.add_row(name, f"{100 * part['share_of_bytes']:.1f} %", f"{part['documents']}", _difference(part))
        console.print(table)
    for document in results.get("documents", ())[:SHOWN_DOCUMENTS]:
        scored = {shown(name, model): bpb for name, bpb in document["bpb"].items() if bpb is not None}
        figures = ", ".join(f"{name} {bpb:.4f}" for name, bpb in scored.items())
        console.print(f"{document['name']}: {figures or 'no scored bytes'}")
    for reason, count in results.get("left_out", {}).items():
        if count:
            console.print(f"{counted(count, 'text')} left out: {LEFT_OUT[reason]}.")
    if known := results.get("trained_on"):
        console.print(f"Of {counted(results['scored_documents'], 'document')}, a model was trained on {known}.")
    for scope, (_, comparisons) in scopes.items():
        for note in {record["note"] for record in comparisons if "note" in record}:
            console.print(f"{note} ({scope})")
    console.print(results["sentence"])


def _difference(record: dict[str, Any]) -> str:
    """A difference and its interval, for example `-5.75 % [-10.73, -2.70]`."""
    if record["difference_percent"] is None:
        return ""
    shown = f"{record['difference_percent']:+.2f} %"
    return shown + (" [{:+.2f}, {:+.2f}]".format(*record["interval_percent"]) if record["interval_percent"] else "")


def inspect(
    checkpoint: options.OptionalModel = None,
    # Not a Path, which would change a TEXT that stands here after --memory
    db: Annotated[str | None, Argument(metavar="DB", help="A database made by `retro-np build`.")] = None,
    text: Annotated[str | None, Argument(metavar="TEXT", help="The text to inspect.")] = None,
    memory: options.ShippedMemory = False,
    out: Annotated[Path, Option("-o", "--out", help="The HTML page.")] = Path("inspect.html"),
    file: Annotated[Path | None, Option(help="Inspect the text of this file.")] = None,
    prompt: Annotated[str | None, Option(help="Inspect a sample that continues this prompt.")] = None,
    length: Annotated[int, Option(min=1, help="Tokens to sample after --prompt.")] = 128,
    k: options.K = 2, temperature: options.Temperature = 0.8, top_p: options.TopP = 0.95, seed: options.Seed = 0,
    embedder: options.EmbedderSpec = None,
) -> None:  # fmt: skip
    """Write a page about a text or a sample and what it retrieved.

    The page shows what each chunk retrieved, how much retrieval saves on each token, and which retrieved tokens the
    model attended to. For a model that does not retrieve, it shows the nats of each token instead. It is one HTML file
    that needs no network. If the text is long, only its beginning is shown.

    Example: `retro-np inspect runs/retro/checkpoint.safetensors runs/db --file notes.txt`"""
    from retro_np.files import check_output
    from retro_np.generation import generate
    from retro_np.pretrained.models import is_whole_model_of_ours, load_model, own_file, read_pretrained
    from retro_np.report.inspection import check_request, page_tokens, write_inspection
    from retro_np.report.inspection import inspect as inspect_tokens
    from retro_np.report.samples import is_page, prompt_tokens
    from retro_np.retrieval.rows import without_surrogates
    from retro_np.retrieval.tokenizer import changes_texts, encode

    checkpoint, db, text = options.with_memory(memory, checkpoint, db, text)
    if checkpoint is None or db is None:
        raise UserError("give a MODEL, such as retro, or --memory, and a DB")
    inputs = [source for source in (text, file, prompt) if source is not None]
    if len(inputs) != 1:
        raise UserError("inspect takes exactly one of TEXT, --file PATH and --prompt TEXT")
    page = check_output(out, "-o", [own_file(checkpoint) or checkpoint, db, *([file] if file else [])], is_page)
    database = open_database(Path(db), embedder)
    opened = None if prompt is None or is_whole_model_of_ours(checkpoint) else read_pretrained(checkpoint)
    model = load_model(opened or checkpoint, database)
    if prompt is None:  # As in an evaluation, nothing stands before the text.
        tokens = encode(database.tokenizer, without_surrogates(read_text(file) if file else text or ""))
    else:
        tokens = prompt_tokens(database, prompt, opened)
    n_prompt, most = 0 if prompt is None else len(tokens), page_tokens(model[1])
    retrieved: list[Any] = []
    check_request(model[1], n_prompt + 1 if n_prompt else min(len(tokens), most), k)
    k = min(k, database.n_chunks)
    facts = {"checkpoint": str(checkpoint), "database": str(database.path), "neighbours": str(k)}
    if prompt is not None:
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        stop = {database.end_of_text, *(opened.stop if opened else ())}
        sample, retrieved = generate(*model, tokens, length, database=database, k=k, stop_token=stop, **settings)
        tokens = [*tokens, *sample]
        facts |= {name: str(value) for name, value in settings.items()} | {"in italics": "the prompt"}
    if len(tokens) > most:
        facts["shown"] = f"the first {most:,} of {len(tokens):,} tokens"
        console.print(f"The page shows {facts['shown']}.")
    facts |= {"bytes": OWN_READING} if changes_texts(database.tokenizer) else {}
    inspection = inspect_tokens(*model, database, tokens[:most], k=k, n_prompt=n_prompt, retrieved=retrieved)
    name = "RETRO" if inspection.bits_on is not None and model[1].is_retro else checkpoint.name
    write_inspection(page, f"A text under {name}" if prompt is None else f"A sample of {name}", facts, inspection)
    on = "" if inspection.bits_on is None else f"{inspection.bits_on:.4f} bits per byte with retrieval, "
    console.print(f"{on}{inspection.bits_off:.4f} {'without' if on else 'bits per byte'}.")
    if "bytes" in facts:
        console.print(OWN_READING)
    console.print(f"The page is {out}.")


def read_text(path: Path) -> str:
    """A file's text without a byte order mark; invalid UTF-8 is replaced. Raises UserError if it is not a text file."""
    from retro_np.retrieval.sources import NOT_TEXT, file_document, kind_of

    if not os.path.isfile(path):
        problem = f"{path} is not a file" if os.path.exists(path) else f"there is no file {path}"
        raise UserError(f"{problem}; name one with --file, or give the text itself")
    document = file_document(str(path), path.name, "")
    if kind_of(str(path)) != "text" or "\0" in document.text:
        raise UserError(f"{path} {NOT_TEXT}")
    if document.replaced:
        console.print(f"Replaced by U+FFFD: {counted(document.replaced, 'invalid UTF-8 sequence')}")
    return document.text.removeprefix("\ufeff")
