"""`retro-np verify`: whether a database is what its manifest says, and whether what it says makes sense.

First every file is held against its hash. Where all hashes are right, the invariants are checked: a manifest can be
sealed over nonsense, by a bug or by hand.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import mapped
from retro_np.kernels.search import listed_distances
from retro_np.progress import progress_bar
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import survey
from retro_np.retrieval.index import EQUAL
from retro_np.retrieval.journal import settle_edit
from retro_np.retrieval.manifest import SPLITS, broken_files, file_names, read_manifest, shard_dir, tombstones_of
from retro_np.retrieval.neighbours import Shard
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import END_OF_TEXT

ROWS = 65536  # looked at in one go
SAMPLE, SAMPLED_K = 100, 10  # keys of a shard that are searched for in its index, and neighbours asked for
LEAST_RECALL = 0.8  # of a shard's sample: the links of a graph that is worse are damaged
KEY_TOLERANCE = 1e-3  # BERT's keys depend a little on the batch; in float16 on rounding


@dataclass
class Report:
    """What was found to be well, and what is broken: a line each."""

    checked: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def note(self, what: str, complaints: list[str]) -> None:
        """Record a check."""
        self.broken += complaints
        if not complaints:
            self.checked.append(what)


def verify_database(path, embedder=None) -> Report:
    """Check every hash and every invariant. Raises UserError where there is no database, or its manifest is damaged."""
    path, report = Path(path), Report()
    settle_edit(path)
    manifest = read_manifest(path)
    report.note(f"{len(manifest['files'])} files have the manifest's hashes", broken_files(path, manifest))
    others = sorted(set(file_names(path)) - set(manifest["files"]))
    if others:
        report.checked.append(f"{len(others)} files are no part of the database and are not read, like {others[0]}")
    if report.broken:
        return report
    try:
        database = Database(path, manifest, embedder, "hnsw")
    except (ValueError, TypeError, KeyError, IndexError, EOFError) as error:
        report.broken.append(f"{path}: its files are not those of a database ({error})")
        return report
    report.note(f"{len(database.documents):,} documents are numbered in order", _told(_documents, database))
    checks = {
        "chunks are their documents' own, contiguous, and end where they end": _chunks,
        "keys are there for every chunk and finite": _keys,
        "removed chunks are those of removed documents": _tombstones,
        "neighbours are in order, of other documents, and at the distance that is written": _neighbours,
    }
    for what, check in checks.items():
        report.note(what, [line for split in SPLITS for line in _told(check, database, split)])
    if not report.broken:
        try:
            _indexes(database, report)
        except (UserError, ValueError, EOFError, IndexError) as error:
            report.broken.append(f"an index is not of its shard's keys ({error})")
        _embedder(database, report)
    return report


def _told(check, *arguments) -> list[str]:
    """What a check complains of; that it could not be made, because a file holds something else, is a complaint."""
    try:
        return list(check(*arguments))
    except (ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError) as error:
        where = " of ".join([check.__name__.strip("_"), *map(str, arguments[1:])])
        return [f"{where}: a file does not hold what it should ({type(error).__name__}: {error})"]


def _documents(database) -> Iterator[str]:
    for number, record in enumerate(database.documents):
        if record["id"] != number or record["split"] not in SPLITS or record["chunks"] < 1:
            yield f"documents.jsonl: line {number + 1} is document {record['id']} of split {record['split']!r}"
            return
    counted, _ = survey(database.documents, SPLITS)
    if counted != database.manifest["splits"]:
        yield f"manifest.json: it counts {database.manifest['splits']}, and documents.jsonl {counted}"


def _chunks(database, split) -> Iterator[str]:
    records = iter(record for record in database.documents if record["split"] == split)
    for folder in database.folders(shard_dir(split)):
        tokens, documents = _map(folder, "tokens"), _map(folder, "documents")
        if tokens.shape != (len(documents), database.chunk_size):
            yield f"{folder}: tokens are {tokens.shape} for {len(documents)} chunks of {database.chunk_size}"
            continue
        edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
        for begin, end in itertools.pairwise(edges):
            record = next(records, None)
            if record is None or record["id"] != documents[begin] or record["chunks"] != end - begin:
                yield f"{folder}: rows {begin} to {end - 1} are of document {documents[begin]}, not {record}"
                return
        for start in range(0, len(tokens), ROWS):
            block = tokens[start : start + ROWS].astype(np.int64)
            last = np.isin(np.arange(start, start + len(block)) + 1, edges)
            wrong = np.flatnonzero(~_well_ended(block, last) | (block >= database.vocabulary_size).any(axis=1))
            if len(wrong):
                yield f"{folder}: chunk {start + wrong[0]} holds a token that there is not, or an end out of place"
                return
    if next(records, None) is not None:
        yield f"{database.path / shard_dir(split)}: documents.jsonl lists documents that have no chunk"


def _well_ended(tokens, last) -> np.ndarray:
    """Whether each chunk is text throughout, or a document's last one: text, one end-of-text, padding."""
    ends = (tokens == END_OF_TEXT).sum(axis=1)
    behind = np.cumsum(tokens == END_OF_TEXT, axis=1) > 0
    padded = ((tokens == 0) == (behind & (tokens != END_OF_TEXT))).all(axis=1)
    return padded & (ends == last)


def _keys(database, split) -> Iterator[str]:
    dtype = np.dtype(database.manifest["key_dtype"])
    for folder in database.folders(shard_dir(split)):
        keys, rows = _map(folder, "keys"), len(_map(folder, "tokens"))
        if keys.shape != (rows, database.d_key) or keys.dtype != dtype:
            yield f"{folder}: keys are {keys.shape} {keys.dtype}, not {(rows, database.d_key)} {dtype}"
            continue
        for start in range(0, rows, ROWS):
            bad = np.flatnonzero(~np.isfinite(keys[start : start + ROWS]).all(axis=1))
            if len(bad):
                yield f"{folder}: the key of chunk {start + bad[0]} is not finite"
                break


def _tombstones(database, split) -> Iterator[str]:
    rows = np.load(database.path / tombstones_of(split), allow_pickle=False)
    removed = np.array([record["id"] for record in database.documents if record.get("removed")], np.int64)
    expected = np.flatnonzero(np.isin(np.asarray(database.split(split).documents), removed))
    if not np.array_equal(rows, expected):
        yield f"{tombstones_of(split)}: it lists {len(rows)} chunks, and removed documents have {len(expected)}"


def _neighbours(database, split) -> Iterator[str]:
    stored, keys, all_keys = database.split(split), _all_keys(database, split), _all_keys(database, "train")
    width, rows = database.manifest["neighbours"] + database.manifest["extra_candidates"], len(stored.tokens)
    if split == "train" and not database.training_neighbours:
        width = 0
    if stored.neighbours.shape != (rows, width) or stored.distances.shape != (rows, width):
        yield f"neighbours/{split}: {stored.neighbours.shape}, and there are {rows} chunks of {width} neighbours"
        return
    if not width:
        return
    rng = np.random.default_rng(0)
    for start in range(0, rows, ROWS // 8):
        some = slice(start, min(start + ROWS // 8, rows))
        ids, distances = stored.neighbours[some], stored.distances[some]
        missing = ids < 0
        right = (ids >= -1) & (ids < database.n_chunks) & (missing == np.isinf(distances)) & ~np.isnan(distances)
        right[:, 1:] &= distances[:, 1:] >= distances[:, :-1]
        if right.all() and split == "train":
            right &= missing | (database.document_of(ids) != stored.documents[some][:, None])
        if right.all():
            picked = rng.integers(0, len(ids), min(8, len(ids)))
            queries = np.asarray(keys[picked + start], np.float32)
            true = listed_distances(queries, all_keys, np.maximum(ids[picked], 0)) if database.n_chunks else 0
            right[picked] &= missing[picked] | (true == distances[picked])
        if not right.all():
            row = start + int(np.argmin(right.all(axis=1)))
            yield f"neighbours/{split}: the list of chunk {row} is not sorted, not there, of itself, or elsewhere"
            return


def _indexes(database, report) -> None:
    folders = database.folders(shard_dir("train"))
    rng, found_share, weights = np.random.default_rng(0), [], []
    with progress_bar("indexes against exact search", len(folders), unit="shards") as advance:
        for folder in folders:
            shard = Shard.open(folder, database.margin)
            size = len(shard.keys)
            if size:
                k = min(SAMPLED_K, size)
                rows = np.sort(rng.integers(0, size, SAMPLE))
                queries = np.asarray(shard.keys[rows], np.float32)
                _, far = Shard.open(folder, None).index.search(queries, k)
                index, first = shard.index, np.load(folder / EQUAL, allow_pickle=False)
                labels = np.unique(first) if len(first) else np.arange(size)
                if index.graph is None or not np.array_equal(np.sort(index.graph.get_ids_list()), labels):
                    report.broken.append(f"{folder}: index.hnsw has not one entry for each key")
                    continue
                if not np.array_equal(index.graph.get_items(first[rows] if len(first) else rows), queries):
                    report.broken.append(f"{folder}: index.hnsw finds other keys than the shard's")
                _, distances = index.search_graph(queries, min(k, len(labels)))
                # equal keys are as good as each other: distances are compared
                found_share.append(float(np.mean(distances <= far[:, -1:])))
                if found_share[-1] < LEAST_RECALL:
                    report.broken.append(f"{folder}: index.hnsw finds {found_share[-1]:.0%} of what exact search finds")
                weights.append(size)
            advance()
    if found_share and not report.broken:
        recall = np.average(found_share, weights=weights)
        report.checked.append(f"{len(folders)} indexes find {recall:.1%} of what exact search finds (sampled, @10)")


def _embedder(database, report) -> None:
    """Whether the keys are the embedder's, on a sample; where the embedder is not here, that is said."""
    try:
        embedder = database.embedder
    except UserError as error:
        report.checked.append(f"not checked: keys against the embedder ({error})")
        return
    every = hasattr(embedder, "embed_tokens")  # a quick one
    size, rng = database.n_chunks, np.random.default_rng(0)
    rows = np.arange(size) if every else np.sort(rng.choice(size, min(SAMPLE, size), replace=False))
    tokens, keys = _all_tokens(database), _all_keys(database, "train")
    complaints: list[str] = []
    with progress_bar("keys against the embedder", len(rows), unit="chunks") as advance:
        for start in range(0, len(rows), ROWS // 8):
            some = rows[start : start + ROWS // 8]
            stored = np.asarray(keys[some], np.float32)
            made = database.embed_chunks(tokens[some])
            wrong = np.abs(stored - made).max(axis=1) > KEY_TOLERANCE * np.abs(stored).max(initial=1e-9)
            complaints += [
                f"keys: that of chunk {row} is not what {embedder.name} makes of it" for row in some[wrong][:1]
            ]
            advance(len(some))
    what = "" if every else f" (a sample of {len(rows)})"
    report.note(f"keys are what {embedder.name} makes of their chunks{what}", complaints[:1])


def _all_tokens(database) -> Sharded:
    return Sharded([_map(folder, "tokens") for folder in database.folders(shard_dir("train"))])


def _all_keys(database, split) -> Sharded:
    """Keys as they lie there, removed ones too."""
    return Sharded([_map(folder, "keys") for folder in database.folders(shard_dir(split))])


def _map(folder, name):
    return mapped(folder / f"{name}.npy")
