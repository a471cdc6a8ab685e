"""`retro-np build`, `search`, `add`, `remove`, `compact`, `verify`."""

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from retro_np.commands.shared import DatabasePath, EmbedderPath, console, finite, open_database
from retro_np.errors import UserError
from retro_np.progress import one_line

LOCATIONS = "A folder, a text file, a .jsonl or .jsonl.gz file with a `text` per line, `stdlib`, or hub:DATASET."
MAX_DOCUMENT_DIGITS = 18  # A --document with more digits is a name, not a number.

Corpus = Annotated[list[str] | None, Argument(metavar="CORPUS", help=f"{LOCATIONS} Or use --source.")]
Sources = Annotated[list[str] | None, Option("--source", help="NAME=LOCATION or NAME=LOCATION:WEIGHT; repeatable.")]
Include = Annotated[list[str] | None, Option(help="Read only files that match this glob; repeatable.")]
Exclude = Annotated[list[str] | None, Option(help="Skip files that match this glob; repeatable.")]
DASK_HELP = "`local`, or tcp://HOST:PORT of a scheduler whose workers see the same folders; for trusted networks only."
Dask = Annotated[str | None, Option(help=DASK_HELP)]


def build(
    corpus: Corpus = None,
    out: Annotated[Path | None, Option("-o", "--out", help="The database's folder.")] = None,
    source: Sources = None, include: Include = None, exclude: Exclude = None,
    chunk_size: Annotated[int, Option(min=1, help="Tokens per chunk, m.")] = 64,
    vocabulary_size: Annotated[int, Option(min=1, max=1 << 20, help="Entries of the tokenizer to train.")] = 4096,
    tokenizer: Annotated[Path | None, Option(help="Use this tokenizer.json instead of training one.")] = None,
    held_out: Annotated[float, Option(min=0, help="Share of documents held out for evaluation.")] = 0.1,
    deduplicate: Annotated[
        float, Option(min=0, max=1, help="Leave out training documents with at least this 13-gram Jaccard similarity "
                                         "to a held-out document; 0 keeps all.")
    ] = 0.8,
    keys: Annotated[str, Option(help="Type of the keys: float32 or float16.")] = "float32",
    neighbours: Annotated[int, Option(min=1, help="Neighbours stored per chunk.")] = 10,
    extra_candidates: Annotated[
        int, Option(min=0, help="Extra candidates per chunk, to replace neighbours from the sequence's own documents.")
    ] = 22,
    training_neighbours: Annotated[
        bool, Option(help="Find training chunks' neighbours. Without them the build is faster, but nothing can train.")
    ] = True,
    limit_mb: Annotated[float | None, Option(help="Use only about this many MB of the corpus.")] = None,
    shard_mb: Annotated[float, Option(help="MB of text per shard; one shard must fit into memory.")] = 32,
    embedder: Annotated[
        str | None, Option(help="`hashing`, or the folder of a BERT. Default: the installed all-MiniLM-L6-v2.")
    ] = None,
    like: Annotated[Path | None, Option(help="Use the chunk size, tokenizer and embedder of this database.")] = None,
    d_key: Annotated[int | None, Option(min=1, help="Width of hashing keys. Default: 128.")] = None,
    dask: Dask = None,
) -> None:  # fmt: skip
    """Build a retrieval database from text.

    Trains a tokenizer, cuts documents into chunks, embeds each chunk with a frozen BERT, indexes these keys, and finds
    each chunk's neighbours. If interrupted, run the same command to resume. Databases built with `--like DB` can be
    searched together with DB.

    To mix corpora: `--source code=src/:0.55 --source prose=docs/:0.45`

    Example: `retro-np build stdlib -o runs/db --limit-mb 1`"""
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.build import HASHED, BuildConfig, build_database
    from retro_np.retrieval.deduplicate import DedupConfig

    if out is None:
        raise UserError("name the folder of the database: -o DB")
    if like is not None:
        if tokenizer is not None or embedder is not None:
            raise UserError("--like determines tokenizer and embedder; leave out --tokenizer and --embedder")
        template = open_database(like)
        if chunk_size not in (BuildConfig.chunk_size, template.chunk_size):
            raise UserError(f"{like} has chunks of {template.chunk_size} tokens; leave out --chunk-size")
        tokenizer, chunk_size = like / "tokenizer.json", template.chunk_size
    config = BuildConfig(
        chunk_size, vocabulary_size, str(tokenizer) if tokenizer else None, held_out, keys, neighbours,
        extra_candidates, limit_bytes=None if limit_mb is None else int(finite("--limit-mb", limit_mb) * 1e6),
        shard_bytes=int(finite("--shard-mb", shard_mb) * 1e6),
        duplicates=DedupConfig(threshold=deduplicate) if deduplicate else None,
        include=tuple(include or ()), exclude=tuple(exclude or ()), d_key=d_key or BuildConfig.d_key,
        training_neighbours=training_neighbours,
    )  # fmt: skip
    sources = _sources(corpus, source)
    database_embedder: Any = HASHED
    if like is not None:
        database_embedder = template.embedder
    elif embedder != HASHED:
        database_embedder = load_bert(Path(embedder) if embedder else None)
    _describe(build_database(sources, out, config, database_embedder, dask))


def search(
    db: DatabasePath,
    text: Annotated[str, Argument(metavar="TEXT", help="The text to search for.")],
    k: Annotated[int, Option("-k", "--neighbours", min=1, help="Number of results.")] = 5,
    exact: Annotated[bool, Option("--exact", help="Compare with every key instead of using the index.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per line.")] = False,
    embedder: EmbedderPath = None,
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


def add(
    db: DatabasePath, corpus: Corpus = None, source: Sources = None, include: Include = None, exclude: Exclude = None,
    embedder: EmbedderPath = None, dask: Dask = None,
) -> None:  # fmt: skip
    """Add documents to a database and update all neighbours.

    Documents that are already in the database, or resemble a held-out document, are skipped. No new document is held
    out. If interrupted, run the same command to resume.

    Example: `retro-np add runs/db notes.txt`"""
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.edit import add_documents

    sources = _sources(corpus, source)
    options = {"include": tuple(include or ()), "exclude": tuple(exclude or ())}
    _describe(add_documents(db, sources, embedder=load_bert(embedder) if embedder else None, dask=dask, **options))


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


def verify(db: DatabasePath) -> None:
    """Check every hash and every invariant of a database.

    The exit status is 2 if anything is broken.

    Example: `retro-np verify runs/db`"""
    from retro_np.retrieval.verify import verify_database

    report = verify_database(db)
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
        console.print(f"{count:,} training documents were left out as near-duplicates of held-out ones: {duplicates}")
    if removed := database.n_removed:
        console.print(f"{removed:,} chunks are removed; retro-np compact {database.path} deletes their bytes")
    console.print(f"Search it with: retro-np search {database.path} TEXT")
