"""`retro-np verify`: check that a database's files match its manifest, and that their contents are consistent.

First every file is compared with its hash. If all match, the contents are checked, which a bug may have made wrong."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.kernels import threads
from retro_np.kernels.search import listed_distances
from retro_np.progress import counted, progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import summarise
from retro_np.retrieval.embedders import Embedder, EmbedderError
from retro_np.retrieval.graph import HINT
from retro_np.retrieval.index import INDEX, ExactIndex, hnswlib_installed
from retro_np.retrieval.journal import recover_edit
from retro_np.retrieval.manifest import HASHING, REBUILD, broken_files, file_names, read_manifest, tombstones_of

ROWS_PER_CHECK, LISTS_PER_CHECK = 65_536, 8192  # rows of a shard that are in memory at a time
SAMPLED_KEYS, SAMPLED_K = 100, 10  # keys of each shard to search for in its index, and neighbours of each
MIN_RECALL = 0.8  # A graph whose recall on the sample is lower counts as damaged.
KEY_TOLERANCE = 1e-3  # BERT's keys depend slightly on the batch, and float16 keys on rounding.


@dataclass
class Report:
    """The result of a verification: one line for each check that passed and for each problem."""

    checked: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def note(self, check: str, problems: list[str]) -> None:
        """Record the problems that a check found, or that it passed."""
        self.broken += problems
        if not problems:
            self.checked.append(check)


def verify_database(path: str | Path, embedder: Embedder | str | None = None) -> Report:
    """Check every hash, and then the contents. Raises UserError if there is no database or its manifest is damaged."""
    path, report = Path(path), Report()
    recover_edit(path)
    manifest = read_manifest(path)
    report.note(f"{counted(len(manifest['files']), 'file')} with the manifest's hashes", broken_files(path, manifest))
    if others := sorted(set(file_names(path)) - set(manifest["files"])):
        report.checked.append(f"{counted(len(others), 'other file')}, such as {others[0]}: not part of the database")
    if report.broken:
        return report
    try:
        with reporting(f"{path}: a file has the wrong contents", REBUILD):
            database = Database(path, manifest, embedder, "hnsw")
    except UserError as error:
        report.broken.append(str(error))
        return report
    if embedder is not None:
        _ = database.embedder  # It is checked: a wrong one says nothing about the database.
    report.note(f"{counted(len(database.documents), 'document')} numbered in order", _problem(_documents, database))
    checks = {
        "each document's chunks are contiguous and end with end-of-text": _chunks,
        "every chunk has a finite key": _keys,
        "the removed chunks are those of removed documents": _tombstones,
        "neighbours are sorted, from other documents, and at the stored distances (sampled)": _neighbours,
    }
    for statement, check in checks.items():
        report.note(statement, [line for split in manifest["splits"] for line in _problem(check, database, split)])
    if not report.broken:
        report.broken += [*_problem(_indexes, database, report), *_problem(_embedder, database, report)]
    return report


def _problem(check, database, *arguments) -> list[str]:
    """The first problem that a check finds, if any. An error that a file's contents cause is a problem too."""
    try:
        with reporting(f"{database.path}, {check.__name__[1:]}: a file has the wrong contents", REBUILD):
            return list(itertools.islice(check(database, *arguments), 1))
    except EmbedderError:
        raise
    except UserError as error:
        return [str(error)]


def _documents(database) -> Iterator[str]:
    stated, (found, _) = database.manifest["splits"], summarise(database.documents, database.manifest["splits"])
    if found != stated:
        yield f"manifest.json: it counts {stated}, but documents.jsonl has {found}"


def _chunks(database, split) -> Iterator[str]:
    tokens, documents = (database._sharded(split, name) for name in ("tokens", "documents"))
    ids, records = documents[:], (r for r in database.documents if r["split"] == split)
    firsts = np.union1d(documents.starts, np.flatnonzero(np.diff(ids)) + 1)  # No document is in two shards.
    stored = np.stack([ids[firsts[:-1]], np.diff(firsts)], axis=1).tolist()
    for document, record in itertools.zip_longest(stored, ([r["id"], r["chunks"]] for r in records)):
        if document != record:
            yield f"{split}: the shards hold document and chunks {document}, but documents.jsonl lists {record}"
    for block in threads.blocks(len(tokens), ROWS_PER_CHECK):
        rows, is_last = tokens[block], np.isin(np.arange(block.start, block.stop) + 1, firsts)
        # A chunk is only text or, if it is a document's last one, text, end-of-text and padding.
        is_end = rows == database.end_of_text
        is_padding = (np.cumsum(is_end, axis=1) > 0) & ~is_end
        wrong = np.flatnonzero((is_end.sum(axis=1) != is_last) | ((rows == database.padding) != is_padding).any(axis=1))
        if len(wrong):
            yield f"{split}: chunk {block.start + wrong[0]} has a misplaced end-of-text"


def _keys(database, split) -> Iterator[str]:
    keys = database._sharded(split, "keys")
    for block in threads.blocks(len(keys), ROWS_PER_CHECK):
        bad = np.flatnonzero(~np.isfinite(keys[block]).all(axis=1))
        if len(bad):
            yield f"{split}: the key of chunk {block.start + bad[0]} is not finite"


def _tombstones(database, split) -> Iterator[str]:
    stored = database.split(split)
    removed = np.array([record["id"] for record in database.documents if record.get("removed")], np.int64)
    rows = np.flatnonzero(np.isin(np.asarray(stored.documents), removed))
    if not np.array_equal(stored.removed, rows):
        yield f"{tombstones_of(split)}: it lists {len(stored.removed)} chunks, but removed documents have {len(rows)}"


def _neighbours(database, split) -> Iterator[str]:
    stored, keys, all_keys = database.split(split), *(database._sharded(name, "keys") for name in (split, "train"))
    rows, width = stored.neighbours.shape
    rng = np.random.default_rng(0)
    for block in threads.blocks(rows if width else 0, LISTS_PER_CHECK):
        ids, distances = stored.neighbours[block], stored.distances[block]
        missing = ids < 0
        is_valid = (ids >= -1) & (ids < database.n_chunks) & (missing == np.isinf(distances)) & ~np.isnan(distances)
        is_valid[:, 1:] &= distances[:, 1:] >= distances[:, :-1]
        if is_valid.all() and split == "train":
            is_valid &= missing | (database.document_of(ids) != stored.documents[block][:, None])
        if is_valid.all():
            sample = rng.integers(0, len(ids), min(8, len(ids)))
            queries = np.asarray(keys[sample + block.start], np.float32)
            actual = listed_distances(queries, all_keys, np.maximum(ids[sample], 0)) if database.n_chunks else 0
            is_valid[sample] &= missing[sample] | (actual == distances[sample])
        if not is_valid.all():
            row = block.start + int(np.argmin(is_valid.all(axis=1)))
            yield f"neighbours/{split}: the list of chunk {row} is not sorted, or has a wrong neighbour or distance"


def _indexes(database, report) -> Iterator[str]:
    """Check the graph indexes: their keys, and their recall on a sample."""
    graphs = [shard for shard in database._shards if database.has_graph(shard.folder)]
    if len(graphs) < len(database._shards):
        without = counted(len(database._shards) - len(graphs), "shard has", "shards have")
        report.checked.append(f"{without} no graph index and must be searched exactly")
    if graphs and not hnswlib_installed():
        report.checked.append(f"not checked: {len(graphs)} graph indexes (hnswlib is not installed)")
        return
    rng, recalls, weights = np.random.default_rng(0), [], []
    with progress_bar("indexes against exact search", len(graphs), unit="shards") as advance:
        for shard in graphs:
            keys, index, file = shard.keys, shard.index, shard.folder / INDEX
            if len(keys):
                rows, k = rng.integers(0, len(keys), SAMPLED_KEYS), min(SAMPLED_K, len(keys))
                queries = np.asarray(keys[rows], np.float32)
                if not np.array_equal(index.graph_keys(rows), queries):
                    yield f"{file} holds other keys: {HINT}"
                _, exact = ExactIndex(keys).search(queries, k)
                _, distances = index.search_graph(queries, min(k, index.n_entries))
                # Equal keys are equally good answers, so distances are compared, not rows.
                recalls.append(float(np.mean(distances <= exact[:, -1:])))
                if recalls[-1] < MIN_RECALL:
                    yield f"{file} finds {recalls[-1]:.0%} of what exact search finds: {HINT}"
                weights.append(len(keys))
            advance()
    if recalls:
        recall = np.average(recalls, weights=weights)
        share = f"{recall:.1%} of what exact search finds (sampled, @10)"
        report.checked.append(f"{counted(len(graphs), 'index finds', 'indexes find')} {share}")


def _embedder(database, report) -> Iterator[str]:
    """Compare keys with those that the embedder makes: all keys if it is fast, otherwise a sample."""
    try:
        embedder = database.embedder
    except UserError as error:
        if HASHING in database.manifest["files"]:  # The database has its own embedder.
            raise
        report.checked.append(f"not checked: keys against the embedder ({error})")
        return
    is_fast = hasattr(embedder, "embed_tokens")
    size, rng = database.n_chunks, np.random.default_rng(0)
    rows = np.arange(size) if is_fast else np.sort(rng.choice(size, min(SAMPLED_KEYS, size), replace=False))
    tokens, keys = (database._sharded("train", name) for name in ("tokens", "keys"))
    with progress_bar("keys against the embedder", len(rows), unit="chunks") as advance:
        for start in range(0, len(rows), LISTS_PER_CHECK):
            block = rows[start : start + LISTS_PER_CHECK]
            stored, recomputed = np.asarray(keys[block], np.float32), database.embed_chunks(tokens[block])
            wrong = np.abs(stored - recomputed).max(axis=1) > KEY_TOLERANCE * np.abs(stored).max(initial=1e-9)
            if wrong.any():
                yield f"the key of chunk {block[wrong][0]} differs from the one that {embedder.name} makes"
            advance(len(block))
    sample = "" if is_fast else f" (a sample of {len(rows)})"
    report.checked.append(f"keys match those that {embedder.name} makes{sample}")
