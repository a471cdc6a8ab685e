"""`retro-np build`, `search`, `add`, `remove`, `compact`, `verify`."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from retro_np.commands import options
from retro_np.commands.options import DatabasePath, EmbedderSpec, console, finite, group_of, is_typed, open_database
from retro_np.errors import UserError
from retro_np.progress import one_line
from retro_np.retrieval.config import BuildConfig

if TYPE_CHECKING:
    from retro_np.retrieval.corpus import Source

LOCATIONS = "A folder, a text file, rows as .jsonl, .jsonl.gz, .jsonl.zst or parquet, `stdlib`, or hub:DATASET."
MAX_DOCUMENT_DIGITS = 18  # A --document with more digits is a name, not a number.

Corpus = Annotated[list[str] | None, Argument(metavar="CORPUS", help=f"{LOCATIONS} Or use --source.")]
Sources = Annotated[list[str] | None, Option("--source", help="NAME=LOCATION or NAME=LOCATION:WEIGHT; repeatable.")]
DASK_HELP = "`local`, or tcp://HOST:PORT of a scheduler whose workers see the same folders; for trusted networks only."
Dask = Annotated[str | None, Option(help=DASK_HELP)]

# The settings that `build` and `add` share, and those that `build` has in another unit or form
READING = ("include", "exclude", "text_field", "name_field", "split_field")
OTHERWISE = ("limit_bytes", "shard_bytes", "duplicates")
ADD_OPTIONS = group_of(BuildConfig, "Reading", leave_out=BuildConfig.__dataclass_fields__.keys() - READING)
INDEXING_OPTIONS = group_of(
    BuildConfig, "Cutting and indexing", leave_out=(*READING, *OTHERWISE), hidden=("tokenizer_bytes",),
    key_dtype={"names": ("--keys",)}, vocabulary_size={"max": 1 << 20}, d_key={"default": None},
)  # fmt: skip
BUILD_OPTIONS = options.Group(BuildConfig, ADD_OPTIONS.options | INDEXING_OPTIONS.options)
SPLIT_HELP = "In place of CORPUS, a location of documents that are {}; repeatable."


@options.with_options(BUILD_OPTIONS)
def build(
    context: Context,
    corpus: Corpus = None,
    out: Annotated[Path | None, Option("-o", "--out", help="The database's folder.")] = None,
    source: Sources = None,
    train: Annotated[list[str] | None, Option(help=SPLIT_HELP.format("trained on and retrieved"))] = None,
    valid: Annotated[list[str] | None, Option(help=SPLIT_HELP.format("held out for tuning"))] = None,
    test: Annotated[list[str] | None, Option(help=SPLIT_HELP.format("held out for reporting"))] = None,
    embedder: Annotated[str | None, Option(help=f"`hashing`, {options.EMBEDDERS}. Default: all-MiniLM-L6-v2.")] = None,
    like: Annotated[Path | None, Option(help="Use the chunk size, tokenizer and embedder of this database.")] = None,
    deduplicate: Annotated[
        float, Option(min=0, max=1, help="Leave out training documents with at least this 13-gram Jaccard similarity "
                                         "to a held-out document; 0 keeps all.")
    ] = 0.8,
    limit_mb: Annotated[float | None, Option(help="Use only about this many MB of the corpus.")] = None,
    shard_mb: Annotated[float, Option(help="MB of text per shard; one shard must fit into memory.")] = 32,
    dask: Dask = None,
    config: Annotated[Path | None, Option(help="Take settings from the section [build] of a TOML file.")] = None,
    **values: Any,
) -> None:  # fmt: skip
    """Build a retrieval database from text.

    Trains a tokenizer, cuts documents into chunks, embeds each chunk with a frozen BERT, indexes these keys, and finds
    each chunk's neighbours. If interrupted, run the same command to resume. Databases built with `--like DB` can be
    searched together with DB.

    To mix corpora: `--source code=src/:0.55 --source prose=docs/:0.45`

    Example: `retro-np build stdlib -o runs/db --limit-mb 1`"""
    from retro_np.retrieval.build import HASHED, build_database
    from retro_np.retrieval.deduplicate import DedupConfig
    from retro_np.retrieval.embedders import load_embedder

    if out is None:
        raise UserError("name the folder of the database: -o DB")
    stored = options.read_sections(config, {"build": BuildConfig})
    settings = BUILD_OPTIONS.chosen(context, values, stored["build"])
    template = None if like is None else open_database(like)
    if template is not None:
        if "tokenizer" in settings or embedder is not None:
            raise UserError("--like determines tokenizer and embedder; leave out --tokenizer and --embedder")
        if settings["chunk_size"] not in (BuildConfig.chunk_size, template.chunk_size):
            raise UserError(f"{like} has chunks of {template.chunk_size} tokens; leave out --chunk-size")
        settings |= {"tokenizer": str(template.path / "tokenizer.json"), "chunk_size": template.chunk_size}
    if limit_mb is not None:
        settings["limit_bytes"] = int(finite("--limit-mb", limit_mb) * 1e6)
    if "shard_bytes" not in settings or is_typed(context, "shard_mb"):
        settings["shard_bytes"] = int(finite("--shard-mb", shard_mb) * 1e6)
    duplicates = {"threshold": deduplicate} if is_typed(context, "deduplicate") else settings.get("duplicates")
    with options.naming(config, {"build": BUILD_OPTIONS.kept(context, stored["build"])}):
        if duplicates:
            settings["duplicates"] = DedupConfig(**duplicates) if duplicates.get("threshold", 1) else None
        build_config = BuildConfig(**settings)
    by_split = {"train": train or [], "valid": valid or [], "test": test or []}
    if any(by_split.values()) and (corpus or source):
        raise UserError("--train, --valid and --test name all documents: leave out CORPUS and --source")
    sources = _split_sources(by_split) if any(by_split.values()) else _sources(corpus, source)
    database_embedder = template.embedder if template else embedder if embedder == HASHED else load_embedder(embedder)
    _describe(build_database(sources, out, build_config, database_embedder, dask))


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
    for rank, (chunk, distance) in enumerate(zip(ids, distances, strict=True), start=1):
        if chunk < 0:
            if not as_json:
                console.print(f"The database holds {rank - 1} chunks, and all are shown.")
            break
        record = database.documents[int(database.document_of(chunk))]
        value = database.value(chunk)
        parts = database.text(value[:m]), database.text(value[m:])
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


@options.with_options(ADD_OPTIONS)
def add(
    context: Context, db: DatabasePath, corpus: Corpus = None, source: Sources = None, embedder: EmbedderSpec = None,
    dask: Dask = None, **values: Any,
) -> None:  # fmt: skip
    """Add documents to a database and update all neighbours.

    Documents that are already in the database, or resemble a held-out document, are skipped. No new document is held
    out. If interrupted, run the same command to resume.

    Example: `retro-np add runs/db notes.txt`"""
    from retro_np.retrieval.edit import add_documents
    from retro_np.retrieval.embedders import load_embedder

    sources, reading = _sources(corpus, source), ADD_OPTIONS.chosen(context, values, {})
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


def _sources(locations: list[str] | None, named: list[str] | None) -> Any:
    """The corpus that a command names: a single unnamed location unchanged, otherwise a list of sources."""
    from retro_np.retrieval.corpus import parse_sources

    corpora = [*(locations or []), *(named or [])]
    if not corpora:
        raise UserError("no corpus is named; give a folder, a text or .jsonl file, stdlib, or --source NAME=LOCATION")
    return corpora[0] if len(corpora) == 1 and not named else parse_sources(corpora)


def _split_sources(specs: dict[str, list[str]]) -> list["Source"]:
    """The sources of each split. One with the name of an earlier one gets a number at its end."""
    from retro_np.retrieval.corpus import parse_source

    if not specs["train"]:
        raise UserError("--valid and --test hold documents out of those of --train: name at least one --train")
    sources: dict[str, Source] = {}
    for source in (replace(parse_source(spec), split=split) for split, each in specs.items() for spec in each):
        first = next(iter(sources.values()), source)
        if (source.weight is None) != (source.split != "train" or first.weight is None):
            raise UserError(f"--{source.split} {source.location}: give every --train a weight, or none, and no other")
        names = (f"{source.name}-{number}" if number > 1 else source.name for number in itertools.count(1))
        name = next(name for name in names if name not in sources)
        sources[name] = replace(source, name=name)
    return list(sources.values())


def _describe(database: Any) -> None:
    """Print what a database holds, in a few lines."""
    manifest = database.manifest
    for name, split in manifest["splits"].items():
        console.print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {split['chunks']:,} chunks of "
            f"{database.chunk_size}, {split['bytes']:,} bytes"
        )
    if replaced := sum(split["replaced"] for split in manifest["splits"].values()):
        console.print(f"{replaced:,} invalid UTF-8 sequences were replaced by U+FFFD")
    if manifest["skipped"]:
        kinds = "binary, special, or links that lead to no file inside the folder"
        example = one_line(manifest["skipped_names"][0])
        console.print(f"{manifest['skipped']:,} files were skipped ({kinds}), for example {example}")
    duplicates = database.path / "duplicates.jsonl"
    if count := duplicates.read_bytes().count(b"\n"):
        console.print(f"{count:,} documents were left out as near-duplicates of held-out ones: {duplicates}")
    if removed := database.n_removed:
        console.print(f"{removed:,} chunks are removed; retro-np compact {database.path} deletes their bytes")
    console.print(f"Search it with: retro-np search {database.path} TEXT")
