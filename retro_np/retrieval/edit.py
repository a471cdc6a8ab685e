"""Edit a database without building it anew: add documents, remove documents, compact. How an edit is made: journal.py.

Added documents become shards of their own, and every chunk's list of neighbours is merged with what they offer, so that
it ends as if all shards had been there from the first. Removed ones are listed in tombstones, and from then on nothing
finds or reads them; `compact` deletes their bytes.
"""

import functools
import hashlib
import itertools
import json
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import disk_full_said, locked, mapped, remove_folder, remove_partial, write_array, write_atomically
from retro_np.retrieval import stages
from retro_np.retrieval.corpus import Source, check_apart, find_corpus
from retro_np.retrieval.database import Database
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.documents import chained, survey, write_records
from retro_np.retrieval.journal import REQUEST as EDIT_REQUEST
from retro_np.retrieval.journal import begin_edit, finish_edit
from retro_np.retrieval.manifest import (
    DOCUMENTS,
    DUPLICATES,
    HASHING,
    MANIFEST,
    REQUEST,
    SPLITS,
    TOKENIZER,
    WORK,
    file_facts,
    file_names,
    manifest_bytes,
    sealed,
    shard_dir,
    shard_name,
    tombstones_of,
)
from retro_np.retrieval.neighbours import is_in
from retro_np.retrieval.texts import FACTS, Text, corpus_digest, write_text_shard, write_texts
from retro_np.retrieval.workers import workers


def add_documents(
    path, source: str | Path | list[Source], *, embedder=None, dask: str | None = None, include=(), exclude=()
) -> Database:
    """Add the documents of a corpus to what a database retrieves; none of them is held out.

    Those that are there already, of the same name and text, and those too like a held-out document are passed over.
    Stopped anywhere, the same call goes on. Raises UserError as `build_database` does.
    """
    path = Path(path)
    corpus = find_corpus(source, leave_out=path, include=tuple(include), exclude=tuple(exclude))
    check_apart(path, corpus)
    with _editing(path, embedder) as database:
        weights = _weights(database, corpus.sources)
        database.check_embedder(database.embedder)  # before an edit is begun that could not be finished
        request = {"kind": "add", "sources": [[s.name, s.weight] for s in corpus.sources]}
        edit = begin_edit(path, request | {"include": list(include), "exclude": list(exclude)})
        facts = _new_texts(database, corpus, edit / WORK)
        if facts["splits"]["train"]["documents"]:
            with workers(dask) as run:
                _add(run, database, edit, facts["splits"]["train"], weights)
        else:
            remove_folder(edit)
            print(f"{path} has every document already, or left it out before: nothing was added", file=sys.stderr)
    return Database.open(path, embedder)


def remove_documents(path, documents: list[int | str]) -> Database:
    """Take documents, by number (int) or by name (str), out of a database: no search, value or batch shows them again.

    A name that several documents have takes out all of them. Raises UserError for one that is not there.
    """
    path = Path(path)
    with _editing(path) as database:
        gone = _numbers(database, documents)
        if not len(gone):
            print(f"these documents were removed from {path} before: nothing has changed", file=sys.stderr)
        else:
            edit = begin_edit(path, {"kind": "remove", "documents": gone.tolist()})
            for split in SPLITS:
                stored = database.split(split)
                rows = np.flatnonzero(np.isin(np.asarray(stored.documents), gone))
                write_array(edit / tombstones_of(split), np.union1d(stored.removed, rows))
            out = set(gone.tolist())
            records = (r | {"removed": True} if r["id"] in out else r for r in database.documents)
            write_records(edit / DOCUMENTS, records)
            _make(database, edit, {})
    return Database.open(path)


def compact(path, *, dask: str | None = None) -> Database:
    """Delete the bytes of removed documents and join small shards; ids are given anew, neighbours looked for anew.

    The tokenizer, and what the hashing embedder counted, stay as they are.
    """
    path = Path(path)
    with _editing(path) as database:
        removed = any(len(database.split(split).removed) for split in SPLITS)
        groups = {split: _groups(database, split) for split in SPLITS}
        if not removed and all(len(group) == 1 for those in groups.values() for group in those):
            print(f"{path} holds nothing to compact", file=sys.stderr)
        else:
            edit = begin_edit(path, {"kind": "compact"})
            with workers(dask) as run:
                _compact(run, database, edit, groups)
    return Database.open(path)


@contextmanager
def _editing(path: Path, embedder=None) -> Iterator[Database]:
    """The database, locked, with an edit that was made before in place."""
    if not (path / MANIFEST).is_file():
        Database.open(path)  # says what is wrong
    with locked(path, "edit"), disk_full_said(path):
        finish_edit(path)
        remove_partial(path)
        yield Database.open(path, embedder)


def _weights(database, sources) -> dict[str, float | None]:
    """The weight of each source, after an edit. Raises UserError where some have one and others not."""
    weights = {source["name"]: source["weight"] for source in database.manifest["sources"]}
    for source in sources:
        if source.weight is not None or source.name not in weights:
            weights[source.name] = source.weight
    if len({weight is None for weight in weights.values()}) > 1:
        raise UserError(
            f"some sources of {database.path} would have a weight and some not ({weights}): give the new one a weight, "
            "as in --source NAME=PLACE:0.1, or leave it out"
        )
    return weights


def _new_texts(database, corpus, work) -> dict:
    changed = f"the corpus changed while it was added to {database.path}: remove {work.parent}, and add it again"
    if (work / FACTS).exists():
        facts = json.loads((work / FACTS).read_bytes())
        if corpus_digest(corpus) != facts["digest"]:
            raise UserError(changed)
        return facts
    marks = array("Q", (_mark(r["name"], r["sha256"]) for r in database.documents if not r.get("removed")))
    # what was left out before is passed over too, unless what it was like has been removed since
    freed = {r["name"] for r in database.documents if r["split"] == "valid" and r.get("removed")}
    left_out = chained([database.path / DUPLICATES])
    marks.extend(_mark(r["name"], r["sha256"]) for r in left_out if r["held_out"] not in freed)
    there = np.sort(np.asarray(marks))

    def split_of(document):
        text = Text(0, document.name, document.source, document.replaced, document.text)
        return None if is_in(_mark(text.name, text.sha256), there) else "train"

    return write_texts(corpus, work, split_of, database.manifest["shard_bytes"], changed)


def _mark(name: str, sha256: str) -> np.uint64:
    """Eight bytes that stand for a document's name and text."""
    digest = hashlib.sha256(json.dumps([name, sha256]).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "big"))


def _add(run, database, edit, facts, weights) -> None:
    work, path, tokenizer = edit / WORK, database.path, database.path / TOKENIZER
    left_out = _left_out(run, database, edit, facts)
    base = [database.folders(shard_dir(split)) for split in SPLITS]
    numbering = len(database.documents), left_out
    folders = stages.write_tokens(
        run, edit, work, tokenizer, {"train": facts}, database.chunk_size, len(base[0]), numbering
    )
    pieces = [stages.record_file(work, "train", number) for number in range(facts["shards"])]
    if not (edit / DOCUMENTS).exists():
        write_records(edit / DOCUMENTS, chained([path / DOCUMENTS, *pieces]))
    stages.write_keys(run, work, tokenizer, folders, database.embedder, database.manifest["key_dtype"])
    stages.write_indexes(run, folders)
    old = [stages.Indexed(*those) for those in zip(base[0], database.first_ids, database.hidden_rows, strict=True)]
    new = stages.indexed(folders, database.n_chunks)
    queries = [stages.Queries(f"train/{folder.name}", folder, [*old, *new]) for folder in folders]
    for split, those in zip(SPLITS, base, strict=True):
        for folder in those:
            name = f"{split}/{folder.name}"
            queries.append(stages.Queries(name, folder, new, path / "neighbours" / name))
    candidates = database.manifest["neighbours"] + database.manifest["extra_candidates"]
    stages.write_neighbours(run, edit, work, queries, candidates, database.margin, database.training_neighbours)
    _make(database, edit, weights)


def _left_out(run, database, edit, facts) -> np.ndarray:
    """The numbers of new documents that are too like a held-out one; they are added to the list of duplicates."""
    work, config = edit / WORK, database.manifest["duplicates"]
    found: list[Path] = []
    if config is not None:
        held = work / "held" / f"{shard_name(0)}.jsonl"
        if not held.exists():
            write_text_shard(held, _held_texts(database))
        training = stages.text_files(work, "train", facts)
        found = stages.write_duplicates(run, work, training, [held], DedupConfig(**config))
    write_records(edit / DUPLICATES, chained([database.path / DUPLICATES, *found]))
    return np.array([record["number"] for record in chained(found)], np.int64)


def _held_texts(database) -> Iterator[Text]:
    """The held-out documents, their texts made of their tokens again."""
    split = database.split("valid")
    row = 0
    for record in database.documents:
        if record["split"] == "valid":
            if not record.get("removed"):
                text = database.text(split.tokens[row : row + record["chunks"]].reshape(-1))
                yield Text(record["id"], record["name"], record["source"], 0, text)
            row += record["chunks"]


def _numbers(database, documents) -> np.ndarray:
    """Numbers of documents that are not removed yet, of numbers (int) and names (str)."""
    if isinstance(documents, str) or any(isinstance(document, bool) for document in documents):
        raise UserError("documents to remove are a list of numbers and names")
    wanted, found, seen = set(documents), [], set()
    for record in database.documents:
        called = {record["id"], record["name"]} & wanted
        seen |= called
        if called and not record.get("removed"):
            found.append(record["id"])
    for missing in sorted(map(str, wanted - seen)):
        raise UserError(
            f"{database.path} has no document {missing!r}: give a number or a name of its documents.jsonl, which holds "
            f"{len(database.documents):,}"
        )
    return np.array(found, np.int64)


def _groups(database, split) -> list[list[int]]:
    """Which shards of a split become one: neighbours in order that together hold no more than a shard should."""
    counted = database.manifest["splits"].values()
    chunks, size = (sum(split[name] for split in counted) for name in ("chunks", "bytes"))
    most = database.manifest["shard_bytes"] * max(1, chunks) // max(1, size)
    kept = [len(rows) for rows in _kept_rows(database, split)]
    groups: list[list[int]] = [[]]
    total = 0
    for number, count in enumerate(kept):
        if total and count and total + count > most:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += count
    return groups


def _kept_rows(database, split) -> list[np.ndarray]:
    """The rows of each shard of a split that were not removed."""
    stored = database.split(split)
    bounds = itertools.pairwise(stored.documents.starts)
    return [np.setdiff1d(np.arange(start, stop), stored.removed) - start for start, stop in bounds]


def _compact(run, database, edit, groups) -> None:
    kept = [record for record in database.documents if not record.get("removed")]
    numbers = np.full(len(database.documents), -1, np.int64)
    numbers[[record["id"] for record in kept]] = np.arange(len(kept))
    write_records(edit / DOCUMENTS, (record | {"id": int(numbers[record["id"]])} for record in kept))
    gone = {record["name"] for record in database.documents if record.get("removed")}
    duplicates = chained([database.path / DUPLICATES])
    write_records(edit / DUPLICATES, (r for r in duplicates if not gone & {r["name"], r["held_out"]}))
    folders = {}
    for split in SPLITS:
        write_array(edit / tombstones_of(split), np.empty(0, np.int64))
        rows, old = _kept_rows(database, split), database.folders(shard_dir(split))
        folders[split] = []
        for number, group in enumerate(groups[split]):
            folder = edit / shard_dir(split) / shard_name(number)
            folders[split].append(folder)
            join = functools.partial(_joined, [old[i] for i in group], [rows[i] for i in group])
            for name in ("documents", "keys", "tokens"):
                if not (folder / f"{name}.npy").exists():
                    write_array(folder / f"{name}.npy", join(name, numbers))
    stages.write_indexes(run, folders["train"])
    candidates = database.manifest["neighbours"] + database.manifest["extra_candidates"]
    queries = stages.all_queries(folders["train"], folders["valid"])
    stages.write_neighbours(run, edit, edit / WORK, queries, candidates, database.margin, database.training_neighbours)
    unchanged = [name for name in database.manifest["files"] if name in (TOKENIZER, REQUEST, HASHING)]
    _make(database, edit, {}, unchanged)


def _joined(folders, rows, name, numbers) -> np.ndarray:
    parts = [mapped(folder / f"{name}.npy") for folder in folders]
    joined = np.concatenate([part[kept] for part, kept in zip(parts, rows, strict=True)])
    return numbers[joined] if name == "documents" else joined


def _make(database, edit, weights, unchanged=None) -> None:
    """Write the new manifest, by which the edit is made, and move it into place. unchanged: old files that stay."""
    old = database.manifest
    splits, rows = survey(chained([edit / DOCUMENTS]), SPLITS)
    weights = {source["name"]: source["weight"] for source in old["sources"]} | weights
    files = {name: old["files"][name] for name in (old["files"] if unchanged is None else unchanged)}
    # a source whose last rows went, or that brought none, can't be drawn from in training
    kept = [s["name"] for s in old["sources"] if s["name"] in rows or not s["rows"]] + [*rows]
    files |= file_facts([edit], [name for name in file_names(edit) if name != EDIT_REQUEST])
    manifest = {key: value for key, value in old.items() if key not in ("sha256", "files")} | {
        "generation": old["generation"] + 1,
        "splits": splits,
        "sources": [{"name": n, "weight": w, "rows": rows.get(n, [])} for n, w in weights.items() if n in kept],
        "files": dict(sorted(files.items())),
    }
    write_atomically(edit / MANIFEST, manifest_bytes(sealed(manifest)))
    finish_edit(database.path)
