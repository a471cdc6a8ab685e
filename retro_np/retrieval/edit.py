"""Edit a database without rebuilding it: add documents, remove documents, compact. journal.py makes edits atomic.

Added documents become new shards. Each list of neighbours is merged with their chunks, as if all had been built
together. tombstones.npy lists the removed documents' chunks, which nothing finds or reads. `compact` deletes them."""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.files import locked, outputs, remove_folder, remove_partial, write_array
from retro_np.progress import counted, say
from retro_np.retrieval import manifest as layout
from retro_np.retrieval import stages
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import Source, find_corpus
from retro_np.retrieval.database import Database
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.documents import DUPLICATE, RECORD, chained, completed, document_runs, write_records
from retro_np.retrieval.embedders import Embedder
from retro_np.retrieval.index import hnswlib_installed
from retro_np.retrieval.journal import EDIT_REQUEST, begin_edit, finish_edit
from retro_np.retrieval.sharded import is_in, shard_array
from retro_np.retrieval.shards import IndexShard
from retro_np.retrieval.texts import Text, undone, write_texts
from retro_np.retrieval.workers import workers


def add_documents(
    path: str | Path, source: str | Path | list[Source], *, embedder: Embedder | str | None = None,
    dask: str | None = None, **reading: Any,
) -> Database:  # fmt: skip
    """Add the documents of a corpus to those that a database retrieves. None of them is held out.

    Documents whose name and text the database already has, near-duplicates of held-out documents, and documents that
    their source or a field of their row puts into valid or test, are skipped. reading: include, exclude, text_field,
    name_field and split_field, see `BuildConfig`.
    After an interruption, the same call resumes. Raises UserError as `build_database` does."""
    path = Path(path)
    corpus = find_corpus(source, leave_out=path, **reading)
    with _editing(path, embedder) as database:
        weights = _weights(database, corpus.sources)
        _ = database.embedder  # It is checked: an edit must not start if it could not be finished.
        request = {"kind": "add", "sources": [[s.name, s.weight] for s in corpus.sources], "include": [], "exclude": []}
        request |= {name: value for name, value in reading.items() if value != getattr(BuildConfig, name)}
        is_new = not (path / layout.EDIT / EDIT_REQUEST).exists()
        edit = begin_edit(path, request)
        with undone(is_new, edit / layout.WORK, edit / EDIT_REQUEST):
            facts = _new_texts(database, corpus, edit / layout.WORK)
        if facts["splits"]["train"]["documents"]:
            with workers(dask) as run:
                _add(run, database, edit, {"train": facts["splits"]["train"]}, weights)
        else:
            remove_folder(edit)
            say(f"{path}: nothing was added; every document is already there or was skipped before")
    return Database.open(path, embedder)


def remove_documents(path: str | Path, documents: list[int | str]) -> Database:
    """Remove documents, by number (int) or by name (str), from every search, value and batch of a database.

    A name removes all documents that have it. Raises UserError for a number or name that the database does not have."""
    path = Path(path)
    with _editing(path) as database:
        removed = _numbers(database, documents)
        if not removed:
            say(f"{path}: nothing was removed; these documents had been removed before")
        else:
            edit = begin_edit(path, {"kind": "remove", "documents": removed})
            for split in database.manifest["splits"]:
                stored = database.split(split)
                rows = np.flatnonzero(np.isin(np.asarray(stored.documents), removed))
                write_array(edit / layout.tombstones_of(split), np.union1d(stored.removed, rows))
            numbers = set(removed)
            records = (r | {"removed": True} if r["id"] in numbers else r for r in database.documents)
            write_records(edit / layout.DOCUMENTS, records)
            _commit(database, edit, {})
    return Database.open(path)


def compact(path: str | Path, *, dask: str | None = None) -> Database:
    """Delete the bytes of removed documents and join small shards. Documents and chunks get new ids and neighbours.

    Shards built without hnswlib get a graph if it is installed now. Tokenizer and feature counts do not change."""
    path = Path(path)
    with _editing(path) as database:
        groups = {split: _groups(database, split) for split in database.manifest["splits"]}
        has_removed = any(len(database.split(split).removed) for split in groups)
        to_index = hnswlib_installed() and not all(map(database.has_graph, database.folders(layout.SPLITS["train"])))
        if not has_removed and not to_index and all(len(group) == 1 for group in itertools.chain(*groups.values())):
            say(f"{path} holds nothing to compact")
        else:
            edit = begin_edit(path, {"kind": "compact"})
            with workers(dask) as run:
                _compact(run, database, edit, groups)
    return Database.open(path)


@contextmanager
def _editing(path: Path, embedder=None) -> Iterator[Database]:
    """Lock a database, finish an interrupted edit, and yield the database."""
    layout.read_manifest(path)  # Nothing is changed in a folder without a database.
    outputs.check_subfolders(path, outputs.DATABASE_FOLDERS)
    with locked(path, "edit"):
        finish_edit(path)
        remove_partial(path, outputs.DATABASE_FOLDERS)
        database = Database.open(path, embedder)
        for split in database.manifest["splits"]:  # Every array is checked before an edit begins.
            database.split(split), database.keys(split)
        yield database


def _weights(database, sources) -> dict[str, float | None]:
    """The weight of each source after an edit. Raises UserError if only some sources have one."""
    weights = {source["name"]: source["weight"] for source in database.manifest["sources"]}
    weights |= {s.name: s.weight for s in sources if s.weight is not None or s.name not in weights}
    if len({weight is None for weight in weights.values()}) > 1:
        fault = f"only some sources of {database.path} would have a weight ({weights})"
        raise UserError(f"{fault}: give every source a weight, as in --source NAME=LOCATION:0.1, or none")
    return weights


def _new_texts(database, corpus, work) -> dict:
    changed = f"the corpus changed while it was added to {database.path}: remove {work.parent} and add it again"
    known = array("Q", (_fingerprint(r["name"], r["sha256"]) for r in database.documents if not r.get("removed")))
    # Known duplicates are skipped too, unless the held-out document that they resemble has been removed since.
    removed = {r["name"] for r in database.documents if r["split"] != "train" and r.get("removed")}
    duplicates = chained([database.path / layout.DUPLICATES], DUPLICATE)
    known.extend(_fingerprint(r["name"], r["sha256"]) for r in duplicates if r["held_out"] not in removed)
    sorted_known, held_out = np.sort(np.asarray(known)), []

    def split_of(document):
        if document.split not in ("", "train"):
            held_out.append(document.name)
            return None
        sha256 = hashlib.sha256(document.text.encode()).hexdigest()
        return None if is_in(np.uint64(_fingerprint(document.name, sha256)), sorted_known) else "train"

    facts = write_texts(corpus, work, split_of, database.manifest["shard_bytes"], changed)
    if held_out:
        say(f"left out, since an edit holds nothing out: {counted(len(held_out), 'document')}, such as {held_out[0]}")
    return facts


def _fingerprint(name: str, sha256: str) -> int:
    """A 64-bit hash of a document's name and text."""
    return int.from_bytes(hashlib.sha256(json.dumps([name, sha256]).encode()).digest()[:8], "big")


def _add(run, database, edit, splits, weights) -> None:
    work, path, tokenizer = edit / layout.WORK, database.path, database.path / layout.TOKENIZER
    texts = stages.text_files(work, splits)
    left_out = _left_out(run, database, edit, texts["train"])
    old = {split: database.folders(layout.SPLITS[split]) for split in database.manifest["splits"]}
    numbering, m = (len(database.documents), left_out), database.chunk_size
    folders = stages.write_tokens(run, edit, tokenizer, texts, m, len(old["train"]), numbering)["train"]
    records = map(stages.record_file, texts["train"])
    if not (edit / layout.DOCUMENTS).exists():
        write_records(edit / layout.DOCUMENTS, chained([path / layout.DOCUMENTS, *records], RECORD))
    stages.write_keys(run, work, tokenizer, folders, database.embedder, database.manifest["key_dtype"])
    stages.write_indexes(run, folders)
    index = list(map(IndexShard, old["train"], database.first_ids, database.deleted_rows))
    added = stages.index_shards(folders, database.n_chunks)
    queries = [stages.QueryShard(f"train/{folder.name}", folder, [*index, *added]) for folder in folders]
    known = [(f"{split}/{folder.name}", folder) for split, shards in old.items() for folder in shards]
    queries += [stages.QueryShard(name, folder, added, path / "neighbours" / name) for name, folder in known]
    stages.write_neighbours(run, edit, work, queries, database.manifest)
    _commit(database, edit, weights)


def _left_out(run, database, edit, training) -> np.ndarray:
    """The numbers of new documents that nearly duplicate a held-out one. They are added to duplicates.jsonl."""
    work, config = edit / layout.WORK, database.manifest["duplicates"]
    held_path = work / "held" / f"{layout.shard_name(0)}.jsonl"
    if config is not None and not held_path.exists():
        write_records(held_path, _held_texts(database))
    config = None if config is None else DedupConfig(**config)
    duplicates = stages.write_duplicates(run, work, training, [held_path], config)
    write_records(edit / layout.DUPLICATES, chained([database.path / layout.DUPLICATES, *duplicates], DUPLICATE))
    return np.array([record["number"] for record in chained(duplicates, DUPLICATE)], np.int64)


def _held_texts(database) -> Iterator[Text]:
    """The held-out documents, with texts decoded from their tokens."""
    for split in map(database.split, reversed(database.held_out_splits)):  # test first, as in a build
        for start, stop in document_runs(split.documents[:]):
            record = database.documents[split.documents[start]]
            if not record.get("removed"):
                text = database.text(split.tokens[start:stop].reshape(-1))
                yield Text(record["id"], record["name"], record["source"], 0, text)


def _numbers(database, documents) -> list[int]:
    """The numbers of documents given by number (int) or name (str), without those that are removed already."""
    if isinstance(documents, str) or any(isinstance(document, bool) for document in documents):
        raise UserError("documents to remove must be a list of numbers and names")
    requested = set(documents)
    records = [record for record in database.documents if {record["id"], record["name"]} & requested]
    if missing := requested.difference(*((record["id"], record["name"]) for record in records)):
        hint = "give a number or name from its documents.jsonl"
        raise UserError(f"{database.path} has no document {min(map(str, missing))!r}: {hint}")
    return [record["id"] for record in records if not record.get("removed")]


def _groups(database, split) -> list[list[tuple[Path, np.ndarray]]]:
    """The shards of a split and their rows that are not removed, grouped in order so that each group fits one shard."""
    chunks, size = (sum(s[name] for s in database.manifest["splits"].values()) for name in ("chunks", "bytes"))
    max_chunks = database.manifest["shard_bytes"] * max(1, chunks) // max(1, size)
    groups: list[list[tuple[Path, np.ndarray]]] = [[]]
    total, stored = 0, database.split(split)
    bounds = itertools.pairwise(stored.documents.starts)
    for folder, (start, stop) in zip(database.folders(layout.SPLITS[split]), bounds, strict=True):
        rows = np.setdiff1d(np.arange(start, stop), stored.removed) - start
        if total and len(rows) and total + len(rows) > max_chunks:
            groups.append([])
            total = 0
        groups[-1].append((folder, rows))
        total += len(rows)
    return groups


def _compact(run, database, edit, groups) -> None:
    remaining = [record for record in database.documents if not record.get("removed")]
    new_ids = np.full(len(database.documents), -1, np.int64)
    new_ids[[record["id"] for record in remaining]] = np.arange(len(remaining))
    write_records(edit / layout.DOCUMENTS, (record | {"id": int(new_ids[record["id"]])} for record in remaining))
    removed = {record["name"] for record in database.documents if record.get("removed")}
    duplicates = chained([database.path / layout.DUPLICATES], DUPLICATE)
    write_records(edit / layout.DUPLICATES, (r for r in duplicates if not removed & {r["name"], r["held_out"]}))
    folders: dict[str, list[Path]] = {split: [] for split in groups}
    for split in groups:
        write_array(edit / layout.tombstones_of(split), np.empty(0, np.int64))
        for number, group in enumerate(groups[split]):
            folder = edit / layout.SPLITS[split] / layout.shard_name(number)
            folders[split].append(folder)
            for name in ("documents", "keys", "tokens"):
                if not (folder / f"{name}.npy").exists():
                    joined = np.concatenate([shard_array(shard, name)[rows] for shard, rows in group])
                    write_array(folder / f"{name}.npy", new_ids[joined] if name == "documents" else joined)
    stages.write_indexes(run, folders["train"])
    stages.write_neighbours(run, edit, edit / layout.WORK, stages.all_queries(folders), database.manifest)
    unchanged = {layout.TOKENIZER, layout.REQUEST, layout.HASHING} & database.manifest["files"].keys()
    _commit(database, edit, {}, unchanged)


def _commit(database, edit, weights, unchanged=None) -> None:
    """Write the new manifest, which commits the edit, and move the files into place. unchanged: old files to keep."""
    old = {name: value for name, value in database.manifest.items() if name != "sha256"}
    files = {name: old["files"][name] for name in (old["files"] if unchanged is None else unchanged)}
    files = dict(sorted((files | layout.file_facts(edit)).items()))
    changes = {"generation": old["generation"] + 1, "files": files}
    layout.write_manifest(edit, completed(edit, old | changes, weights))
    finish_edit(database.path)
