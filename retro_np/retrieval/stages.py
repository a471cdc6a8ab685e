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
SHARDS_PER_MERGE = 16  # Lists of neighbours are merged each time this many index shards have been searched.


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


def write_tokens(
    run: Runner, out: Path, work: Path, tokenizer: Path, splits: dict[str, Any], m: int, first_shard: int,
    numbering: Numbering,
) -> dict[str, list[Path]]:  # fmt: skip
    """Tokenise the text shards in `work`. Returns the folders of each split's new shards.

    splits: the "splits" that `write_texts` returned. first_shard: the number of the first training shard."""
    tasks = []
    folders: dict[str, list[Path]] = {split: [] for split in splits}
    for split, facts in splits.items():
        for number, texts in enumerate(text_files(work, split, facts)):
            folder = out / SPLITS[split] / shard_name(number + (first_shard if split == "train" else 0))
            folders[split].append(folder)
            if not (folder / "tokens.npy").exists():
                arguments = (texts, folder, record_file(work, split, number), tokenizer, m, numbering)
                tasks.append(Task(shards.tokenise_shard, arguments, _lines(texts)))
    run("tokenising", "documents", tasks)
    return folders


def record_file(work: Path, split: str, number: int) -> Path:
    """The temporary file with the records of a text shard's documents."""
    return work / "documents" / split / f"{shard_name(number)}.jsonl"


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


def text_files(work: Path, split: str, facts: dict[str, Any]) -> list[Path]:
    """The text shards of a split. facts: what `write_texts` returned for that split."""
    return [work / "texts" / split / f"{shard_name(number)}.jsonl" for number in range(facts["shards"])]


def _lines(path):
    with path.open("rb") as file:
        return sum(1 for _ in file)


def write_counts(run: Runner, work: Path, folders: list[Path]) -> np.ndarray:
    """The number of chunks that hold each hashed feature, (BUCKETS,), summed over shards."""
    files = [work / "counts" / f"{folder.name}.npy" for folder in folders]
    run("counting features", "chunks", _missing(shards.count_shard, chunk_count, folders, files))
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
    """Write neighbours/SPLIT/NNNNN for every query shard: search each index shard in turn and merge the lists.

    Merges of SHARDS_PER_MERGE index shards limit the lists on disk. manifest: that of the database, with its settings.
    If it is not for training, training shards get empty lists."""
    candidates, margin = manifest["neighbours"] + manifest["extra_candidates"], manifest["embedder"]["margin"]
    for query in queries:
        if not manifest.get("training_neighbours", True) and query.name.startswith("train/"):
            for name, dtype in (("ids", np.int64), ("distances", np.float32)):
                write_array(_result(out, query) / f"{name}.npy", np.empty((chunk_count(query.folder), 0), dtype))
    queries = [query for query in queries if not (_result(out, query) / LAST_LIST).exists()]
    total = max((len(query.shards) for query in queries), default=0)

    def is_merged(query, start):  # A later group counts too: after its merge, this group's lists are deleted.
        groups = range(start, total, SHARDS_PER_MERGE)
        return any((_merged(out, work, query, later) / LAST_LIST).exists() for later in groups)

    for start in range(0, total, SHARDS_PER_MERGE):
        group = [(query, query.shards[start : start + SHARDS_PER_MERGE]) for query in queries]
        group = [(query, index) for query, index in group if index and not is_merged(query, start)]
        pairs = [(query, shard) for query, index in group for shard in index]
        pairs.sort(key=lambda pair: pair[1].folder.name)  # shard by shard, so that each index is loaded once
        todo = [(query.folder, shard, _part(work, query, shard)) for query, shard in pairs]
        todo = [(folder, shard, part) for folder, shard, part in todo if not part.exists()]
        tasks = [Task(shards.query_shard, (*call, candidates, margin), chunk_count(call[0])) for call in todo]
        n_shards = len({shard.folder for _, shard in pairs})
        run(f"neighbours in {n_shards} of {total} shards", "queries", tasks)
        merges = []
        for query, index in group:
            known = _merged(out, work, query, start - SHARDS_PER_MERGE) if start else query.known
            parts, merged = [_part(work, query, shard) for shard in index], _merged(out, work, query, start)
            merges.append(Task(shards.merge_shard, (parts, merged, candidates, known), chunk_count(query.folder)))
        run("merging", "chunks", merges)
        for query, shard in pairs:
            _part(work, query, shard).unlink(missing_ok=True)
        for query, _ in group if start else ():
            remove_folder(_merged(out, work, query, start - SHARDS_PER_MERGE))
    shards.cached_shard.cache_clear()  # frees the last index
    remove_folder(work / "neighbours")


def _result(out, query):
    return out / "neighbours" / query.name


def _merged(out, work, query, start):
    """The folder of the lists merged up to the group of index shards that begins at `start`; at the end, the result."""
    is_last = start + SHARDS_PER_MERGE >= len(query.shards)
    return _result(out, query) if is_last else work / "neighbours" / query.name / f"merged{start:05d}"


def _part(work, query, shard):
    return work / "neighbours" / query.name / f"{shard.folder.name}.npy"
