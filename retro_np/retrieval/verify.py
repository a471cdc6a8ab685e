"""`retro-np verify`: check that a database's files match its manifest, and that their contents are consistent.

First every file is compared with its hash. If all hashes match, the contents are checked, because a bug could have
written a valid manifest for inconsistent files.
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
from retro_np.retrieval.documents import summarise
from retro_np.retrieval.embedders import Embedder, TokenEmbedder
from retro_np.retrieval.index import INDEX, ExactIndex, hnswlib_installed, load_hnsw
from retro_np.retrieval.journal import recover_edit
from retro_np.retrieval.manifest import SPLITS, broken_files, file_names, read_manifest, shard_dir, tombstones_of
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import END_OF_TEXT

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


def verify_database(path: str | Path, embedder: Embedder | None = None) -> Report:
    """Check every hash, and then the contents. Raises UserError if there is no database or its manifest is damaged."""
    path, report = Path(path), Report()
    recover_edit(path)
    manifest = read_manifest(path)
    report.note(f"{len(manifest['files'])} files match the manifest's hashes", broken_files(path, manifest))
    others = sorted(set(file_names(path)) - set(manifest["files"]))
    if others:
        report.checked.append(f"{len(others)} other files, such as {others[0]}, are not part of the database")
    if report.broken:
        return report
    try:
        database = Database(path, manifest, embedder, "hnsw")
    except (ValueError, TypeError, KeyError, IndexError, EOFError) as error:
        report.broken.append(f"{path}: its files cannot be read as a database ({error})")
        return report
    report.note(f"{len(database.documents):,} documents are numbered in order", _problems(_documents, database))
    checks = {
        "each document's chunks are contiguous and end with end-of-text": _chunks,
        "every chunk has a finite key": _keys,
        "the removed chunks are those of removed documents": _tombstones,
        "neighbours are sorted, from other documents, and at the stored distances (sampled)": _neighbours,
    }
    for statement, check in checks.items():
        report.note(statement, [line for split in SPLITS for line in _problems(check, database, split)])
    if not report.broken:
        try:
            _indexes(database, report)
        except (UserError, ValueError, EOFError, IndexError) as error:
            report.broken.append(f"an index does not fit its shard's keys ({error})")
        _embedder(database, report)
    return report


def _problems(check, *arguments) -> list[str]:
    """The problems that a check finds. A file that cannot be checked is a problem too."""
    try:
        return list(check(*arguments))
    except (ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError) as error:
        subject = " of ".join([check.__name__.strip("_"), *map(str, arguments[1:])])
        return [f"{subject}: a file has the wrong contents ({type(error).__name__}: {error})"]


def _documents(database) -> Iterator[str]:
    for number, record in enumerate(database.documents):
        if record["id"] != number or record["split"] not in SPLITS or record["chunks"] < 1:
            yield f"documents.jsonl: line {number + 1} is document {record['id']} of split {record['split']!r}"
            return
    counted, _ = summarise(database.documents, SPLITS)
    if counted != database.manifest["splits"]:
        yield f"manifest.json: it counts {database.manifest['splits']}, but documents.jsonl has {counted}"


def _chunks(database, split) -> Iterator[str]:
    records = iter(record for record in database.documents if record["split"] == split)
    for folder in database.folders(shard_dir(split)):
        tokens, documents = _map(folder, "tokens"), _map(folder, "documents")
        if tokens.shape != (len(documents), database.chunk_size):
            yield f"{folder}: tokens are {tokens.shape}, not {(len(documents), database.chunk_size)}"
            continue
        edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
        for begin, end in itertools.pairwise(edges):
            record = next(records, None)
            if record is None or record["id"] != documents[begin] or record["chunks"] != end - begin:
                yield f"{folder}: rows {begin} to {end - 1} belong to document {documents[begin]}, not to {record}"
                return
        for start in range(0, len(tokens), ROWS_PER_CHECK):
            block = tokens[start : start + ROWS_PER_CHECK].astype(np.int64)
            last = np.isin(np.arange(start, start + len(block)) + 1, edges)
            wrong = np.flatnonzero(~_ends_correctly(block, last) | (block >= database.vocabulary_size).any(axis=1))
            if len(wrong):
                yield f"{folder}: chunk {start + wrong[0]} has an unknown token or a misplaced end-of-text"
                return
    if next(records, None) is not None:
        yield f"{database.path / shard_dir(split)}: documents.jsonl lists documents without chunks"


def _ends_correctly(tokens, last) -> np.ndarray:
    """Whether each chunk is only text or, if it is a document's last one, text, end-of-text and padding."""
    ends = (tokens == END_OF_TEXT).sum(axis=1)
    after_end = np.cumsum(tokens == END_OF_TEXT, axis=1) > 0
    padded = ((tokens == 0) == (after_end & (tokens != END_OF_TEXT))).all(axis=1)
    return padded & (ends == last)


def _keys(database, split) -> Iterator[str]:
    dtype = np.dtype(database.manifest["key_dtype"])
    for folder in database.folders(shard_dir(split)):
        keys, rows = _map(folder, "keys"), len(_map(folder, "tokens"))
        if keys.shape != (rows, database.d_key) or keys.dtype != dtype:
            yield f"{folder}: keys are {keys.shape} {keys.dtype}, not {(rows, database.d_key)} {dtype}"
            continue
        for start in range(0, rows, ROWS_PER_CHECK):
            bad = np.flatnonzero(~np.isfinite(keys[start : start + ROWS_PER_CHECK]).all(axis=1))
            if len(bad):
                yield f"{folder}: the key of chunk {start + bad[0]} is not finite"
                break


def _tombstones(database, split) -> Iterator[str]:
    rows = np.load(database.path / tombstones_of(split), allow_pickle=False)
    removed = np.array([record["id"] for record in database.documents if record.get("removed")], np.int64)
    expected = np.flatnonzero(np.isin(np.asarray(database.split(split).documents), removed))
    if not np.array_equal(rows, expected):
        yield f"{tombstones_of(split)}: it lists {len(rows)} chunks, but removed documents have {len(expected)}"


def _neighbours(database, split) -> Iterator[str]:
    stored, keys, all_keys = database.split(split), *(_stored(database, name, "keys") for name in (split, "train"))
    width, rows = database.manifest["neighbours"] + database.manifest["extra_candidates"], len(stored.tokens)
    if split == "train" and not database.training_neighbours:
        width = 0
    if stored.neighbours.shape != (rows, width) or stored.distances.shape != (rows, width):
        yield f"neighbours/{split}: the lists are {stored.neighbours.shape}, not {(rows, width)}"
        return
    if not width:
        return
    rng = np.random.default_rng(0)
    for start in range(0, rows, LISTS_PER_CHECK):
        block = slice(start, min(start + LISTS_PER_CHECK, rows))
        ids, distances = stored.neighbours[block], stored.distances[block]
        missing = ids < 0
        is_valid = (ids >= -1) & (ids < database.n_chunks) & (missing == np.isinf(distances)) & ~np.isnan(distances)
        is_valid[:, 1:] &= distances[:, 1:] >= distances[:, :-1]
        if is_valid.all() and split == "train":
            is_valid &= missing | (database.document_of(ids) != stored.documents[block][:, None])
        if is_valid.all():
            sample = rng.integers(0, len(ids), min(8, len(ids)))
            queries = np.asarray(keys[sample + start], np.float32)
            actual = listed_distances(queries, all_keys, np.maximum(ids[sample], 0)) if database.n_chunks else 0
            is_valid[sample] &= missing[sample] | (actual == distances[sample])
        if not is_valid.all():
            row = start + int(np.argmin(is_valid.all(axis=1)))
            yield f"neighbours/{split}: the list of chunk {row} is not sorted, or has a wrong neighbour or distance"
            return


def _indexes(database, report) -> None:
    """Check the graph indexes: their keys, and their recall on a sample."""
    folders = database.folders(shard_dir("train"))
    graphs = [folder for folder in folders if database.has_graph(folder)]
    if len(graphs) < len(folders):
        report.checked.append(f"{len(folders) - len(graphs)} shards have no graph index and are searched exactly")
    if graphs and not hnswlib_installed():
        report.checked.append(f"not checked: {len(graphs)} graph indexes (hnswlib is not installed)")
        return
    rng, recalls, weights = np.random.default_rng(0), [], []
    with progress_bar("indexes against exact search", len(graphs), unit="shards") as advance:
        for folder in graphs:
            keys = _map(folder, "keys")
            if len(keys):
                index = load_hnsw(folder / INDEX, keys, database.ef_margin)
                rows = rng.integers(0, len(keys), SAMPLED_KEYS)
                queries = np.asarray(keys[rows], np.float32)
                _, exact = ExactIndex(keys).search(queries, min(SAMPLED_K, len(keys)))
                defect = index.defect(rows)
                if defect:
                    report.broken.append(f"{folder}: {INDEX} {defect}")
                    continue
                _, distances = index.search_graph(queries, min(SAMPLED_K, index.n_entries))
                # Equal keys are equally good answers, so distances are compared, not rows.
                recalls.append(float(np.mean(distances <= exact[:, -1:])))
                if recalls[-1] < MIN_RECALL:
                    report.broken.append(f"{folder}: {INDEX} finds {recalls[-1]:.0%} of what exact search finds")
                weights.append(len(keys))
            advance()
    if recalls and not report.broken:
        recall = np.average(recalls, weights=weights)
        report.checked.append(f"{len(graphs)} indexes find {recall:.1%} of what exact search finds (sampled, @10)")


def _embedder(database, report) -> None:
    """Compare keys with those that the embedder makes: all keys if it is fast, otherwise a sample."""
    try:
        embedder = database.embedder
    except UserError as error:
        report.checked.append(f"not checked: keys against the embedder ({error})")
        return
    is_fast = isinstance(embedder, TokenEmbedder)
    size, rng = database.n_chunks, np.random.default_rng(0)
    rows = np.arange(size) if is_fast else np.sort(rng.choice(size, min(SAMPLED_KEYS, size), replace=False))
    tokens, keys = _stored(database, "train", "tokens"), _stored(database, "train", "keys")
    wrong_rows: list[int] = []
    with progress_bar("keys against the embedder", len(rows), unit="chunks") as advance:
        for start in range(0, len(rows), LISTS_PER_CHECK):
            block = rows[start : start + LISTS_PER_CHECK]
            stored, recomputed = np.asarray(keys[block], np.float32), database.embed_chunks(tokens[block])
            wrong = np.abs(stored - recomputed).max(axis=1) > KEY_TOLERANCE * np.abs(stored).max(initial=1e-9)
            wrong_rows += block[wrong].tolist()
            advance(len(block))
    sample = "" if is_fast else f" (a sample of {len(rows)})"
    problems = [f"the key of chunk {row} differs from the one that {embedder.name} makes" for row in wrong_rows[:1]]
    report.note(f"keys match those that {embedder.name} makes{sample}", problems)


def _stored(database, split, name):
    """The stored tokens or keys, including those of removed chunks."""
    return Sharded([_map(folder, name) for folder in database.folders(shard_dir(split))])


def _map(folder, name):
    return mapped(folder / f"{name}.npy")
