"""`retro-np build`, `search`, `add`, `remove`, `compact`, `verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from retro_np.commands.shared import DatabasePath, EmbedderPath, K, console, finite, open_database
from retro_np.errors import UserError

Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source", help="NAME=PLACE or NAME=PLACE:WEIGHT, as often as there are sources.", show_default=False
    ),
]
Include = Annotated[list[str] | None, typer.Option(help="Only files of a folder that match this glob; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="No files of a folder that match this glob; repeatable.")]
Dask = Annotated[
    str | None,
    typer.Option(
        help="`local`, or tcp://HOST:PORT of a scheduler whose workers see the same folders. Trusted networks only."
    ),
]
MOST_DIGITS = 19  # of a number
PLACES = "A folder, a text file, a .jsonl or .jsonl.gz with `text` a line, `stdlib`, or hub:DATASET."


def build(
    corpus: Annotated[list[str] | None, typer.Argument(help=PLACES + " Instead: --source.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The database's folder, new or begun before.", show_default=False)
    ] = None,
    source: Sources = None,
    include: Include = None,
    exclude: Exclude = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="m, tokens in a chunk.")] = 64,
    vocabulary_size: Annotated[int, typer.Option(min=1, help="Tokens of the BPE to train.")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer.json instead of training one.")] = None,
    held_out: Annotated[float, typer.Option(min=0, help="Share of documents kept for evaluation.")] = 0.1,
    deduplicate: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out training documents of this 13-gram Jaccard similarity with a "
                            "held-out one; 0: none.")
    ] = 0.8,
    keys: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    neighbours: Annotated[int, typer.Option(min=1, help="Neighbours kept for each chunk.")] = 10,
    extra_candidates: Annotated[int, typer.Option(min=0, help="More, for those that a sequence excludes.")] = 22,
    training_neighbours: Annotated[
        bool, typer.Option(help="Of training chunks too; without: built sooner, to evaluate and to sample with.")
    ] = True,
    limit_mb: Annotated[float | None, typer.Option(help="Take a slice of the corpus of about so many MB.")] = None,
    shard_mb: Annotated[float, typer.Option(help="MB of text in a shard: what memory must hold.")] = 32,
    embedder: Annotated[
        str | None,
        typer.Option(help="`hashing`, or a BERT's folder. Default: all-MiniLM-L6-v2, found where it is installed."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Chunks, tokenizer and embedder of this database, so that both can be searched as one."),
    ] = None,
    d_key: Annotated[int | None, typer.Option(min=1, help="Width of a hashing key, 128 if not said.")] = None,
    dask: Dask = None,
) -> None:  # fmt: skip
    """Build a retrieval database from text.

    Trains a tokenizer, cuts documents into chunks, makes a key of each with a frozen BERT, indexes the keys, and finds
    each chunk's neighbours. Stopped anywhere, the same command goes on. Python's own library as corpus:
    `retro-np build stdlib -o runs/db --limit-mb 1`; a mixture: `--source code=src/:0.55 --source prose=docs/:0.45`
    """
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.build import HASHED, BuildConfig, build_database
    from retro_np.retrieval.deduplicate import DedupConfig

    if out is None:
        raise UserError("no folder is named for the database: give -o DB")
    if like is not None:
        if tokenizer is not None or embedder is not None:
            raise UserError("--like settles tokenizer and embedder: leave out --tokenizer and --embedder")
        model = open_database(like)
        if chunk_size not in (BuildConfig.chunk_size, model.chunk_size):
            raise UserError(f"{like} has chunks of {model.chunk_size} tokens: leave out --chunk-size")
        tokenizer, chunk_size = like / "tokenizer.json", model.chunk_size
    config = BuildConfig(
        chunk_size=chunk_size,
        vocabulary_size=vocabulary_size,
        tokenizer=str(tokenizer) if tokenizer else None,
        held_out=held_out,
        key_dtype=keys,
        neighbours=neighbours,
        extra_candidates=extra_candidates,
        limit_bytes=None if limit_mb is None else int(finite("--limit-mb", limit_mb) * 1e6),
        shard_bytes=int(finite("--shard-mb", shard_mb) * 1e6),
        duplicates=DedupConfig(threshold=deduplicate) if deduplicate else None,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        d_key=BuildConfig.d_key if d_key is None else d_key,
        training_neighbours=training_neighbours,
    )
    sources = _sources(corpus, source)
    if like is not None:
        chosen = model.embedder
    else:
        chosen = HASHED if embedder == HASHED else load_bert(Path(embedder) if embedder else None)
    _describe(build_database(sources, out, config, chosen, dask))


def search(
    db: DatabasePath,
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: K = 5,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
    embedder: EmbedderPath = None,
) -> None:
    """Show the values whose keys are nearest to a text: chunk N, and its continuation F below it."""
    database = open_database(db, embedder, "exact" if exact else "hnsw")
    ids, distances = database.search(text, min(k, database.n_chunks + 1))
    m = database.chunk_size
    for rank, (chunk, distance) in enumerate(zip(ids, distances, strict=True), start=1):
        if chunk < 0:
            if not as_json:
                console.print(f"The database holds {rank - 1} chunks: that is all.")
            break
        record = database.documents[int(database.document_of(chunk))]
        value = database.value(chunk)
        parts = database.text(value[:m]), database.text(value[m:])
        if as_json:
            found = {"rank": rank, "distance": float(distance), "id": int(chunk), "document": record["id"]}
            found |= {"name": record["name"], "source": record["source"], "chunk": parts[0], "continuation": parts[1]}
            print(json.dumps(found))
        else:
            title = f"{rank}  squared distance {distance:.3f}  document {record['id']}  {record['name']}"
            console.rule(title, align="left")
            console.print(parts[0])
            if parts[1]:
                console.print("⟶", style="bold", end=" ")
                console.print(parts[1], style="dim")


def add(
    db: DatabasePath,
    corpus: Annotated[list[str] | None, typer.Argument(help=PLACES, show_default=False)] = None,
    source: Sources = None,
    include: Include = None,
    exclude: Exclude = None,
    embedder: EmbedderPath = None,
    dask: Dask = None,
) -> None:
    """Add documents to what a database retrieves, as shards of their own, and bring all neighbours up to date.

    Documents that are there already, and those too like a held-out one, are passed over. None of the new ones is held
    out. Stopped anywhere, the same command goes on.
    """
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.edit import add_documents

    sources = _sources(corpus, source)
    loaded = load_bert(embedder) if embedder else None
    options = {"include": tuple(include or ()), "exclude": tuple(exclude or ())}
    _describe(add_documents(db, sources, embedder=loaded, dask=dask, **options))


def remove(
    db: DatabasePath,
    document: Annotated[
        list[str] | None, typer.Option(help="A document's number or name; repeatable.", show_default=False)
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="A name that looks like a number; repeatable.", show_default=False)
    ] = None,
) -> None:
    """Remove documents: no search, sample, batch or evaluation shows them again. `compact` then deletes their bytes."""
    from retro_np.retrieval.edit import remove_documents

    given = [int(text) if text.isdecimal() and len(text) < MOST_DIGITS else text for text in document or []]
    if not given and not name:
        raise UserError("no document is named: give --document NUMBER, as search shows it, or --document NAME")
    _describe(remove_documents(db, [*given, *(name or [])]))


def compact(db: DatabasePath, dask: Dask = None) -> None:
    """Delete the bytes of removed documents and join small shards. Chunk and document numbers are given anew."""
    from retro_np.retrieval.edit import compact as compact_database

    _describe(compact_database(db, dask=dask))


def verify(db: DatabasePath) -> None:
    """Check every hash and every invariant of a database, and name what is broken. Exit status 2 if anything is."""
    from retro_np.retrieval.verify import verify_database

    report = verify_database(db)
    for line in report.checked:
        console.print(f"well: {line}")
    for line in report.broken:
        console.print(f"BROKEN: {line}")
    if report.broken:
        raise UserError(
            f"{db} is broken in {len(report.broken)} places: restore it, or build it anew in another folder"
        )


def _sources(places: list[str] | None, named: list[str] | None):
    """Sources of what a command was given; one place without a name or a weight stays what it is."""
    from retro_np.retrieval.corpus import sources_of

    places, named = places or [], named or []
    if len(places) + len(named) == 0:
        raise UserError("no corpus is named: give a folder, a text file, a .jsonl file, stdlib, or --source NAME=PLACE")
    if len(places) == 1 and not named:
        return places[0]
    return sources_of([*places, *named])


def _describe(database) -> None:
    """What a database holds, in a few lines."""
    manifest = database.manifest
    for name, split in manifest["splits"].items():
        console.print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {split['chunks']:,} chunks of "
            f"{database.chunk_size}, {split['bytes']:,} bytes"
        )
    replaced = sum(split["replaced"] for split in manifest["splits"].values())
    if replaced:
        console.print(f"{replaced:,} places were not UTF-8 and became U+FFFD")
    if manifest["skipped"]:
        console.print(f"{manifest['skipped']:,} binary files were left out, the first {manifest['skipped_names'][0]}")
    listed = database.path / "duplicates.jsonl"
    with listed.open("rb") as file:
        left_out = sum(1 for _ in file)
    if left_out:
        console.print(f"{left_out:,} training documents were too like a held-out one and are left out: see {listed}")
    removed = database.n_removed
    if removed:
        console.print(f"{removed:,} chunks were removed; retro-np compact {database.path} deletes their bytes")
    console.print(f"{database.path}: search it with retro-np search {database.path} TEXT")
