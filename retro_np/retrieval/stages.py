"""The stages of a build that work on shards, as tasks: what is there already is left alone.

A build and an edit put them together (`build.py`, `edit.py`); a shard's own work is in `shards.py`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from retro_np.files import mapped, remove_folder, write_array
from retro_np.retrieval import shards
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.manifest import shard_dir, shard_name
from retro_np.retrieval.workers import Runner, Task

GROUP = 16  # index shards whose lists wait to be merged


class Indexed(NamedTuple):
    """A shard to search in: its folder, the id of its first chunk, and its rows that are not to be found."""

    folder: Path
    first: int
    hidden: np.ndarray


class Queries(NamedTuple):
    """A shard whose chunks look for neighbours in some shards; `known` holds the lists that others gave before."""

    name: str  # SPLIT/NNNNN
    folder: Path
    shards: list[Indexed]
    known: Path | None = None


def indexed(folders: list[Path], first: int = 0) -> list[Indexed]:
    """Shards in order, of which nothing is hidden; first: the id of the first chunk of all."""
    found = []
    for folder in folders:
        found.append(Indexed(folder, first, np.empty(0, np.int64)))
        first += chunk_count(folder)
    return found


def all_queries(training: list[Path], held: list[Path]) -> list[Queries]:
    """Every shard looks for neighbours in every training shard."""
    shards = indexed(training)
    splits = {"train": training, "valid": held}
    return [Queries(f"{split}/{folder.name}", folder, shards) for split, those in splits.items() for folder in those]


def chunk_count(folder: Path) -> int:
    """How many chunks a shard has."""
    return len(mapped(folder / "tokens.npy"))


def write_tokens(
    run: Runner, out: Path, work: Path, tokenizer: Path, splits: dict, m: int, first_shard: int, numbering
) -> list[Path]:
    """Tokenise every text shard in `work`; return the shards' folders, the training ones first.

    splits: facts of `write_texts`; first_shard: the number that the first training shard gets.
    """
    tasks, folders = [], []
    for split, facts in splits.items():
        for number in range(facts["shards"]):
            shift = first_shard if split == "train" else 0
            folder = out / shard_dir(split) / shard_name(shift + number)
            folders.append(folder)
            if not (folder / "tokens.npy").exists():
                texts, records = _texts(work, split, number), record_file(work, split, number)
                arguments = (texts, folder, records, tokenizer, m, numbering)
                tasks.append(Task(shards.tokenise_shard, arguments, _lines(texts)))
    run("tokenising", "documents", tasks)
    return folders


def record_file(work: Path, split: str, number: int) -> Path:
    """Where the records of a text shard's documents are, until all are brought together."""
    return work / "documents" / split / f"{shard_name(number)}.jsonl"


def write_duplicates(
    run: Runner, work: Path, training: list[Path], held: list[Path], config: DedupConfig
) -> list[Path]:
    """Compare training text shards with held-out ones; return the files of what was found, in order."""
    signed = [work / "signatures" / f"{path.stem}.npy" for path in held]
    tasks = [
        Task(shards.sign_shard, (path, out, config), _lines(path))
        for path, out in zip(held, signed, strict=True)
        if not out.exists()
    ]
    run("signatures of held-out documents", "documents", tasks)
    found = [work / "duplicates" / path.name for path in training]
    tasks = [
        Task(shards.compare_shard, (path, held, signed, out, config), _lines(path))
        for path, out in zip(training, found, strict=True)
        if not out.exists()
    ]
    run("looking for duplicates", "documents", tasks)
    return found


def text_files(work: Path, split: str, facts: dict) -> list[Path]:
    """The text shards of a split, whose facts `write_texts` gave."""
    return [_texts(work, split, number) for number in range(facts["shards"])]


def _texts(work, split, number):
    return work / "texts" / split / f"{shard_name(number)}.jsonl"


def _lines(path):
    with path.open("rb") as file:
        return sum(1 for _ in file)


def write_counts(run: Runner, work: Path, folders: list[Path]) -> np.ndarray:
    """How many chunks hold each hashed feature, summed over shards."""
    files = [work / "counts" / f"{folder.name}.npy" for folder in folders]
    tasks = [
        Task(shards.count_shard, (folder, file), chunk_count(folder))
        for folder, file in zip(folders, files, strict=True)
        if not file.exists()
    ]
    run("counting features", "chunks", tasks)
    return sum(np.load(file, allow_pickle=False) for file in files)


def write_keys(run: Runner, work: Path, tokenizer: Path, folders: list[Path], embedder, dtype: str) -> None:
    """The keys of every shard."""
    tasks = [
        Task(
            shards.embed_shard,
            (folder, work / "keys" / folder.parent.name / folder.name, tokenizer, embedder, dtype),
            chunk_count(folder),
        )
        for folder in folders
        if not (folder / "keys.npy").exists()
    ]
    run("keys", "chunks", tasks)


def write_indexes(run: Runner, folders: list[Path]) -> None:
    """The index of every shard: with one thread each, so that the same keys give the same graph."""
    tasks = [Task(shards.index_shard, (f,), chunk_count(f)) for f in folders if not (f / "index.hnsw").exists()]
    run("indexing", "chunks", tasks, side_by_side=True)


def write_neighbours(
    run: Runner, out: Path, work: Path, queries: list[Queries], candidates: int, margin: int, training: bool
) -> None:
    """neighbours/SPLIT/NNNNN of every query shard: each index shard is asked in turn, and the lists are merged.

    They are merged every GROUP index shards, so that no more lists than that lie on the disk. training: False gives
    training shards lists of no entry.
    """
    for query in queries:
        if not training and query.name.startswith("train/"):
            write_array(_home(out, query) / "ids.npy", np.empty((chunk_count(query.folder), 0), np.int64))
            write_array(_home(out, query) / "distances.npy", np.empty((chunk_count(query.folder), 0), np.float32))
    left = [query for query in queries if not _is_done(out, query)]
    most = max((len(query.shards) for query in left), default=0)
    for start in range(0, most, GROUP):
        group = [(query, query.shards[start : start + GROUP]) for query in left if len(query.shards) > start]
        group = [(query, those) for query, those in group if not _has_lists(_merged(out, work, query, start))]
        asked = {shard.folder: shard for _, those in group for shard in those}
        tasks = []
        for folder, shard in asked.items():  # shard by shard, so that its index is loaded once
            for query, those in group:
                part = _part(work, query, shard)
                if any(folder == other.folder for other in those) and not part.exists():
                    arguments = (query.folder, folder, part, shard.first, shard.hidden, candidates, margin)
                    tasks.append(Task(shards.query_shard, arguments, chunk_count(query.folder)))
        run(f"neighbours in {len(asked)} of {most} shards", "queries", tasks)
        merges = []
        for query, those in group:
            known = _merged(out, work, query, start - GROUP) if start else query.known
            parts = [_part(work, query, shard) for shard in those]
            arguments = (parts, _merged(out, work, query, start), candidates, known)
            merges.append(Task(shards.merge_shard, arguments, chunk_count(query.folder)))
        run("merging", "chunks", merges)
        for query, those in group:
            for shard in those:
                _part(work, query, shard).unlink(missing_ok=True)
    shards.forget_shard()
    remove_folder(work / "neighbours")


def _home(out, query):
    return out / "neighbours" / query.name


def _merged(out, work, query, start):
    """Where the lists of the index shards up to a group, by its start, are: the last group's are the result."""
    last = start + GROUP >= len(query.shards)
    return _home(out, query) if last else work / "neighbours" / query.name / f"merged{start:05d}"


def _has_lists(folder):
    return (folder / "distances.npy").exists()  # written second


def _part(work, query, shard):
    return work / "neighbours" / query.name / f"{shard.folder.name}.npy"


def _is_done(out, query):
    return _has_lists(_home(out, query))
