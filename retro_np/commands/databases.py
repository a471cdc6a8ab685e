"""`retro-np build`, `search`, `add`, `remove`, `compact`, `verify`."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Context, Option

from retro_np.commands import options
from retro_np.commands.options import DatabasePath, EmbedderSpec, console, finite, group_of, is_typed, open_database
from retro_np.errors import UserError
from retro_np.progress import counted, one_line
from retro_np.retrieval.config import READING, BuildConfig
from retro_np.retrieval.sources import LOCATION_FORMS, SKIPPED

MAX_DOCUMENT_DIGITS = 18  # A --document with more digits is a name, not a number.

Corpus = Annotated[list[str] | None, Argument(metavar="CORPUS", help=f"The texts: {LOCATION_FORMS}.")]
Sources = Annotated[list[str] | None, Option("--source", help="NAME=LOCATION or NAME=LOCATION:WEIGHT; repeatable.")]
DASK_HELP = "`local`, or tcp://HOST:PORT of a scheduler whose workers see the same folders; for trusted networks only."
Dask = Annotated[str | None, Option(help=DASK_HELP)]

# The settings that `build` and `add` share, and those that `build` has in another unit or form
OTHERWISE = ("limit_bytes", "shard_bytes", "duplicates")
ADD_OPTIONS = group_of(BuildConfig, "Reading", leave_out=BuildConfig.__dataclass_fields__.keys() - READING)
INDEXING_OPTIONS = group_of(
    BuildConfig, "Cutting and indexing", leave_out=(*READING, *OTHERWISE),
    hidden=("tokenizer_bytes", "training_neighbours"), d_key={"default": None},
)  # fmt: skip
BUILD_OPTIONS = ADD_OPTIONS | INDEXING_OPTIONS
# Of each group, a file may have one, and an option replaces all of it; those of the second line may stand together.
UNITS = {"limit_mb", "limit_bytes"}, {"shard_mb", "shard_bytes"}, {"deduplicate", "duplicates"}
ALTERNATIVES = *UNITS[:2], {"held_out", "held_out_bytes"}, {"corpus", "source", "train", "valid", "test"}


def _from_file(context: Context, path: Path | None) -> Path | None:
    """Let a file's section [build] give what is not typed: options by their names, and fields without an option."""
    keys = {name: hint for name, hint in get_type_hints(build).items() if name not in ("context", "config")}
    context.default_map = options.read_sections(path, {"build": keys | get_type_hints(BuildConfig)})["build"]
    if double := next((sorted(names) for names in UNITS if names <= context.default_map.keys()), None):
        raise UserError(f"{path}: [build] has both {' and '.join(double)}: give one of them")
    return path


SPLIT_HELP = "In place of CORPUS, documents {}; repeatable."
DUPLICATE_HELP = "Leave out training documents of at least this 13-gram Jaccard similarity to a held-out one; 0: none."


@options.with_options(BUILD_OPTIONS)
def build(
    context: Context,
    corpus: Corpus = None,
    out: Annotated[Path | None, Option("-o", "--out", help="The database's folder.")] = None,
    source: Sources = None,
    train: Annotated[list[str] | None, Option(help=SPLIT_HELP.format("to train on and retrieve"))] = None,
    valid: Annotated[list[str] | None, Option(help=SPLIT_HELP.format("held out for tuning"))] = None,
    test: Annotated[list[str] | None, Option(help=SPLIT_HELP.format("held out for reporting"))] = None,
    embedder: Annotated[str | None, Option(help=f"`hashing`, {options.EMBEDDERS}. Default: all-MiniLM-L6-v2.")] = None,
    like: Annotated[Path | None, Option(help="Use the chunk size, tokenizer and embedder of this database.")] = None,
    deduplicate: Annotated[float, Option(help=DUPLICATE_HELP)] = 0.8,
    limit_mb: Annotated[float | None, Option(help="Use only about this many MB of the corpus.")] = None,
    shard_mb: Annotated[float, Option(help="MB of text per shard; one shard must fit into memory.")] = 32,
    dask: Dask = None,
    config: Annotated[Path | None, Option(is_eager=True, callback=_from_file, help="A TOML file of options.")] = None,
    **values: Any,
) -> None:  # fmt: skip
    """Build a retrieval database from text.

    Trains a tokenizer, cuts documents into chunks, embeds each chunk with a frozen BERT, indexes these keys, and finds
    each chunk's neighbours. If interrupted, run the same command to resume. Databases built with `--like DB` can be
    searched together with DB.

    To mix corpora: `--source code=src/:0.55 --source prose=docs/:0.45`

    Example: `retro-np build stdlib -o runs/db --limit-mb 1`"""
    from retro_np.retrieval.build import build_database
    from retro_np.retrieval.deduplicate import DedupConfig
    from retro_np.retrieval.embedders import load_embedder

    if out is None:
        raise UserError("name the folder of the database: -o DB")
    typed = {name for name in context.params if is_typed(context, name)}
    replaced = {name for names in ALTERNATIVES if names & typed for name in names - typed}
    stored = {name: value for name, value in (context.default_map or {}).items() if name not in replaced}
    otherwise = {name: stored[name] for name in OTHERWISE if name in stored}
    parts: Any = {"corpus": corpus, "source": source, "train": train, "valid": valid, "test": test}
    settings = options.chosen(BUILD_OPTIONS, values | dict.fromkeys(replaced)) | otherwise
    template = None if like is None else open_database(like, embedder)
    if "vocabulary_size" in typed and ("tokenizer" in settings or template is not None):
        raise UserError("--vocabulary-size is for a tokenizer that is trained: leave it out, or --tokenizer and --like")
    with options.naming(config, stored.keys() - typed):
        if template is not None:
            if "tokenizer" in settings:
                raise UserError("--like determines the tokenizer; leave out --tokenizer")
            if settings["chunk_size"] not in (BuildConfig.chunk_size, template.chunk_size):
                raise UserError(f"{like} has chunks of {template.chunk_size} tokens; leave out --chunk-size")
            settings |= {"tokenizer": str(template.path / "tokenizer.json"), "chunk_size": template.chunk_size}
        if limit_mb is not None:
            settings["limit_bytes"] = int(finite("--limit-mb", limit_mb) * 1e6)
        settings.setdefault("shard_bytes", int(finite("--shard-mb", shard_mb) * 1e6))
        if not 0 <= deduplicate <= 1:
            raise UserError(f"deduplicate must be from 0 to 1, not {deduplicate}")
        threshold = {"threshold": deduplicate} if "deduplicate" in typed | stored.keys() else {}
        if duplicates := (settings.get("duplicates") or {}) | threshold:
            settings["duplicates"] = DedupConfig(**duplicates) if duplicates.get("threshold", 1) else None
        build_config = BuildConfig(**settings)
        sources = _sources(**{name: value for name, value in parts.items() if name not in replaced and value})
    database_embedder = template.embedder if template else load_embedder(embedder)
    _describe(build_database(sources, out, build_config, database_embedder, dask, _tokenizer(build_config.tokenizer)))


def search(
    db: DatabasePath,
    text: Annotated[str, Argument(metavar="TEXT", help="The text to search for.")],
    k: Annotated[int, Option("-k", "--neighbours", min=1, help="Number of results.")] = 5,
    exact: Annotated[bool, Option("--exact", help="Compare with every key instead of using the index.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per line.")] = False,
    embedder: EmbedderSpec = None,
) -> None:
    """Show the chunks whose keys are nearest to a text, each with its continuation.

    Example: `retro-np search runs/db "parse a JSON file" -k 3`"""
    database = open_database(db, embedder, "exact" if exact else "hnsw")
    ids, distances = database.search(text, min(k, database.n_chunks + 1))
    m = database.chunk_size
    n_found = int((ids >= 0).sum())
    for rank, (chunk, distance) in enumerate(zip(ids[:n_found], distances, strict=False), start=1):
        record = database.documents[int(database.document_of(chunk))]
        value = database.value(chunk)
        parts = database.text(value[:m], database.begins(chunk)), database.text(value[m:], begins=False)
        if as_json:
            result = {"rank": rank, "distance": float(distance), "id": int(chunk), "document": record["id"]}
            result |= {"name": record["name"], "source": record["source"], "chunk": parts[0], "continuation": parts[1]}
            console.print(json.dumps(result), soft_wrap=True)  # one line of printable ASCII
        else:
            title = f"{rank}  squared distance {distance:.3f}  document {record['id']}  {record['name']}"
            console.rule(title, align="left")
            console.print(parts[0])
            if parts[1]:
                console.print("⟶", style="bold", end=" ")
                console.print(parts[1], style="dim")
    if n_found < len(ids) and not as_json:
        console.print(f"The database holds {counted(n_found, 'chunk')}, and nothing else can be shown.")


@options.with_options(ADD_OPTIONS)
def add(
    db: DatabasePath, corpus: Corpus = None, source: Sources = None, embedder: EmbedderSpec = None,
    dask: Dask = None, **values: Any,
) -> None:  # fmt: skip
    """Add documents to a database and update all neighbours.

    Documents that are already in the database, or resemble a held-out document, are skipped. No new document is held
    out. If interrupted, run the same command to resume.

    Example: `retro-np add runs/db notes.txt`"""
    from retro_np.retrieval.edit import add_documents
    from retro_np.retrieval.embedders import load_embedder

    sources, reading = _sources(corpus, source), options.chosen(ADD_OPTIONS, values)
    _describe(add_documents(db, sources, embedder=load_embedder(embedder) if embedder else None, dask=dask, **reading))


def remove(
    db: DatabasePath,
    document: Annotated[list[str] | None, Option(help="A document's number or name; repeatable.")] = None,
    name: Annotated[list[str] | None, Option(help="A document's name, even if it is a number; repeatable.")] = None,
) -> None:
    """Remove documents from a database.

    Searches, samples, batches and evaluations no longer use them. `retro-np compact` deletes their bytes.

    Example: `retro-np remove runs/db --document 12 --document json/decoder.py`"""
    from retro_np.retrieval.edit import remove_documents

    documents = [int(d) if d.isdecimal() and len(d) <= MAX_DOCUMENT_DIGITS else d for d in document or []]
    if not documents and not name:
        raise UserError("no document is named; give --document NUMBER, as search shows it, or --document NAME")
    _describe(remove_documents(db, [*documents, *(name or [])]))


def compact(db: DatabasePath, dask: Dask = None) -> None:
    """Delete the bytes of removed documents and join small shards.

    This renumbers chunks and documents. If interrupted, run the same command to resume.

    Example: `retro-np compact runs/db`"""
    from retro_np.retrieval.edit import compact as compact_database

    _describe(compact_database(db, dask=dask))


def verify(db: DatabasePath, embedder: EmbedderSpec = None) -> None:
    """Check every hash and every invariant of a database.

    The exit status is 2 if anything is broken.

    Example: `retro-np verify runs/db`"""
    from retro_np.retrieval.embedders import load_embedder
    from retro_np.retrieval.verify import verify_database

    report = verify_database(db, load_embedder(embedder) if embedder else None)
    for verdict, lines in (("ok", report.checked), ("BROKEN", report.broken)):
        for line in lines:
            console.print(f"{verdict}: {one_line(line)}")
    if report.broken:
        raise UserError(f"{db} has defects ({len(report.broken)}); restore it, or build it again in another folder")


def _tokenizer(name: str | None) -> Any:
    """The tokenizer that --tokenizer names: of a model, unless it is a tokenizer.json or a folder with one."""
    is_model = name is not None and name.endswith((".gguf", ".safetensors"))
    is_file = name is None or name.endswith(".json") or (os.path.isfile(name) and not is_model)
    if is_file or os.path.isfile(os.path.join(str(name), "tokenizer.json")):
        return name
    from retro_np.pretrained.models import read_pretrained

    return read_pretrained(str(name)).tokenizer


def _sources(corpus: list[str] | None = None, source: list[str] | None = None, **by_split: list[str]) -> Any:
    """The corpus that a command names: a single unnamed location unchanged, otherwise a list of sources.

    by_split: the locations of train, valid and test. One with the name of an earlier one gets a number at its end."""
    from retro_np.retrieval.corpus import parse_source

    corpora = [*(corpus or []), *(source or [])]
    if not by_split:
        return corpora[0] if len(corpora) == 1 and not source else list(map(parse_source, corpora))
    if corpora:
        raise UserError("--train, --valid and --test name all documents: leave out CORPUS and --source")
    if "train" not in by_split:
        raise UserError("--valid and --test hold documents out of those of --train: name at least one --train")
    sources: dict[str, Any] = {}
    for split, part in ((split, parse_source(spec)) for split, specs in by_split.items() for spec in specs):
        names = (f"{part.name}-{number}" if number > 1 else part.name for number in itertools.count(1))
        name = next(name for name in names if name not in sources)
        sources[name] = replace(part, name=name, split=split)
    return list(sources.values())


def _describe(database: Any) -> None:
    """Print what a database holds, in a few lines."""
    manifest = database.manifest
    for name, split in manifest["splits"].items():
        documents, tokens, chunks, size = (counted(split[n + "s"], n) for n in ("document", "token", "chunk", "byte"))
        console.print(f"{name}: {documents}, {tokens} in {chunks} of {database.chunk_size}, {size}")
    if replaced := sum(split["replaced"] for split in manifest["splits"].values()):
        console.print(f"Replaced by U+FFFD: {counted(replaced, 'invalid UTF-8 sequence')}")
    if manifest["skipped"]:
        example = one_line(manifest["skipped_names"][0])
        console.print(f"Skipped: {counted(manifest['skipped'], 'file')} ({SKIPPED}), for example {example}")
    duplicates = database.path / "duplicates.jsonl"
    if count := duplicates.read_bytes().count(b"\n"):
        console.print(f"Left out as near-duplicates of held-out ones: {counted(count, 'document')}, see {duplicates}")
    if removed := database.n_removed:
        console.print(f"Removed: {counted(removed, 'chunk')}; retro-np compact {database.path} deletes the bytes")
    console.print(f"Search it with: retro-np search {database.path} TEXT")
