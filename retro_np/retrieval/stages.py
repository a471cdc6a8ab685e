"""The stages of a build, each a set of tasks over shards. Files that exist already are not written again.

`build.py` and `edit.py` call the stages; `shards.py` holds the work on one shard."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retro_np.files import remove_folder, write_array
from retro_np.files.untrusted import mapped
from retro_np.retrieval import shards
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.embedders import Embedder
from retro_np.retrieval.hashing import BUCKETS
from retro_np.retrieval.index import INDEX, hnswlib_installed
from retro_np.retrieval.manifest import SPLITS, shard_name
from retro_np.retrieval.sharded import shard_array
from retro_np.retrieval.shards import IndexShard, Numbering
from retro_np.retrieval.workers import Runner, Task

LAST_LIST = "distances.npy"  # written after ids.npy


class QueryShard(NamedTuple):
    """A shard whose chunks need neighbours, and the shards to search. known: a folder with lists from other shards."""

    name: str  # SPLIT/NNNNN
    folder: Path
    shards: list[IndexShard]
    known: Path | None = None


def index_shards(folders: list[Path], first_id: int = 0) -> list[IndexShard]:
    """Index shards in order, without deleted rows. first_id: the id of the first chunk of the first shard."""
    first_ids = np.cumsum([first_id, *map(chunk_count, folders)]).tolist()
    return [IndexShard(folder, i, np.empty(0, np.int64)) for folder, i in zip(folders, first_ids, strict=False)]


def all_queries(folders: dict[str, list[Path]]) -> list[QueryShard]:
    """A QueryShard for every shard of all splits. Each searches all training shards."""
    index = index_shards(folders["train"])
    return [QueryShard(f"{name}/{folder.name}", folder, index) for name, paths in folders.items() for folder in paths]


def chunk_count(folder: Path) -> int:
    """The number of chunks in a shard."""
    return len(shard_array(folder, "tokens"))


def text_files(work: Path, splits: dict[str, Any]) -> dict[str, list[Path]]:
    """The text shards of each split. splits: the "splits" that `write_texts` returned."""
    files = {split: map(shard_name, range(facts["shards"])) for split, facts in splits.items()}
    return {split: [work / "texts" / split / f"{name}.jsonl" for name in names] for split, names in files.items()}


def record_file(texts: Path) -> Path:
    """The temporary file with the records of a text shard's documents."""
    return texts.parents[2] / "documents" / texts.parent.name / texts.name


def write_tokens(
    run: Runner, out: Path, tokenizer: Path, texts: dict[str, list[Path]], m: int, first_shard: int,
    numbering: Numbering,
) -> dict[str, list[Path]]:  # fmt: skip
    """Tokenise the text shards of each split. Returns the folders of each split's new shards.

    first_shard: the number of the first training shard."""
    tasks = []
    folders: dict[str, list[Path]] = {split: [] for split in texts}
    for split, paths in texts.items():
        for number, path in enumerate(paths, first_shard if split == "train" else 0):
            folder = out / SPLITS[split] / shard_name(number)
            folders[split].append(folder)
            if not (folder / "tokens.npy").exists():
                arguments = (path, folder, record_file(path), tokenizer, m, numbering)
                tasks.append(Task(shards.tokenise_shard, arguments, _lines(path)))
    run("tokenising", "documents", tasks)
    return folders


def write_duplicates(
    run: Runner, work: Path, texts: list[Path], held: list[Path], config: DedupConfig | None
) -> list[Path]:
    """Compare text shards with held-out ones. Returns a file of duplicates for each, or, without a config, no files."""
    if config is None:
        return []
    exact = config.compares_exactly
    signed = [work / ("grams" if exact else "signed") / path.parent.name / f"{path.stem}.npy" for path in held]
    tasks = _missing(shards.sign_shard, _lines, held, signed, config, exact)
    run("signatures of held-out documents", "documents", tasks)
    duplicates = [work / "left_out" / path.parent.name / path.name for path in texts]
    tasks = _missing(shards.compare_shard, _lines, texts, duplicates, held, signed, config, exact)
    run("looking for duplicates", "documents", tasks)
    return duplicates


def _missing(function, steps, inputs, outputs, *arguments):
    """A task for each input whose output does not exist. steps: a function of an input."""
    pairs = zip(inputs, outputs, strict=True)
    return [Task(function, (path, out, *arguments), steps(path)) for path, out in pairs if not out.exists()]


def _lines(path):
    with path.open("rb") as file:
        return sum(1 for _ in file)


def write_counts(run: Runner, work: Path, folders: list[Path], tokenizer: Path) -> np.ndarray:
    """The number of chunks that hold each hashed feature, (BUCKETS,), summed over shards."""
    files = [work / "counts" / f"{folder.name}.npy" for folder in folders]
    run("counting features", "chunks", _missing(shards.count_shard, chunk_count, folders, files, tokenizer))
    return sum((mapped(file, np.uint32, (BUCKETS,)) for file in files), start=np.zeros(BUCKETS, np.uint32))


def write_keys(run: Runner, work: Path, tokenizer: Path, folders: list[Path], embedder: Embedder, dtype: str) -> None:
    """Embed the chunks of every shard."""
    arguments = ((f, work / "keys" / f.parent.name / f.name, tokenizer, embedder, dtype) for f in folders)
    tasks = [Task(shards.embed_shard, a, chunk_count(a[0])) for a in arguments if not (a[0] / "keys.npy").exists()]
    run("keys", "chunks", tasks)


def write_indexes(run: Runner, folders: list[Path]) -> None:
    """Build the index of every shard. Each is built with one thread, so that the same keys give the same graph.

    Without hnswlib there are no indexes, and the shards are searched exactly."""
    if not hnswlib_installed():
        return
    tasks = [Task(shards.index_shard, (f,), chunk_count(f)) for f in folders if not (f / INDEX).exists()]
    run("indexing", "chunks", tasks, parallel=True)


def write_neighbours(run: Runner, out: Path, work: Path, queries: list[QueryShard], manifest: dict[str, Any]) -> None:
    """Write neighbours/SPLIT/NNNNN for every query shard. Each index shard is searched, and its lists are merged with
    those of the index shards before it.

    The index shards of a query shard are the last ones of any longer list, so that each index is loaded once. manifest:
    that of the database, with its settings. If it is not for training, training shards get empty lists."""
    candidates, margin = manifest["neighbours"] + manifest["extra_candidates"], manifest["embedder"]["margin"]

    def lists(query, left):
        """The folder of the lists while so many index shards are left to search."""
        if left == len(query.shards):
            return query.known
        return work / "neighbours" / query.name / shard_name(left) if left else out / "neighbours" / query.name

    left = {}
    for query in queries:
        if not manifest.get("training_neighbours", True) and query.name.startswith("train/"):
            for name, dtype in (("ids", np.int64), ("distances", np.float32)):
                write_array(lists(query, 0) / f"{name}.npy", np.empty((chunk_count(query.folder), 0), dtype))
        size = len(query.shards)
        left[query.name] = next((n for n in range(size) if (lists(query, n) / LAST_LIST).exists()), size)
    total = max(left.values(), default=0)
    for number in reversed(range(total)):
        todo = [query for query in queries if number < left[query.name]]
        calls = [(q.folder, q.shards[-1 - number], lists(q, number), lists(q, number + 1)) for q in todo]
        tasks = [Task(shards.query_shard, (*call, candidates, margin), chunk_count(call[0])) for call in calls]
        run(f"neighbours in {total - number} of {total} shards", "queries", tasks)
        for query in todo:
            if number + 1 < len(query.shards):
                remove_folder(lists(query, number + 1))
    shards.cached_shard.cache_clear()  # frees the last index
    remove_folder(work / "neighbours")
