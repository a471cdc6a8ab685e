"""The layout of a database: file names, manifest.json, and the hashes that every file is checked against."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files import PARTIAL, sha256_of, write_atomically
from retro_np.files.untrusted import has_types, parse_json
from retro_np.kernels import threads
from retro_np.renamed import new_names

FORMAT = 2
REBUILD = "build the database again in another folder"
MANIFEST = "manifest.json"
REQUEST = "build.json"  # the settings that the build was started with
TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.jsonl"
DUPLICATES = "duplicates.jsonl"  # training documents left out because they resemble a held-out one
TOMBSTONES = "tombstones.npy"
HASHING = "hashing.npy"  # the feature counts of the hashing embedder
WORK, EDIT = "work", "edit"  # folders of an unfinished build and an unfinished edit; not part of the database
SPLITS = {"train": "shards", "valid": "splits/valid", "test": "splits/test"}  # the folder of each split's shards
MAX_CHUNK_SIZE, MAX_STORED_NEIGHBOURS = 65_536, 10_000  # far beyond use: larger values are mistakes
EMBEDDER_LIMIT = 2**20  # An embedder's d_key and margin are below it.
FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\:\x00-\x1f\x7f-\x9f]{1,255}")  # in the database's own folder
SHARD_FILE = re.compile(
    r"shards/[0-9]{5,6}/((tokens|documents|keys|equal)\.npy|index\.hnsw)"
    r"|splits/(valid|test)/(tombstones\.npy|[0-9]{5,6}/(tokens|documents|keys)\.npy)"
    r"|neighbours/(train|valid|test)/[0-9]{5,6}/(ids|distances)\.npy"
)
TOP_FILES = (TOKENIZER, DOCUMENTS, DUPLICATES, TOMBSTONES, HASHING, REQUEST)
COUNTS = {name: int for name in ("documents", "chunks", "tokens", "bytes", "replaced")}  # each split's facts
TYPES: dict[str, type] = {
    "generation": int, "chunk_size": int, "vocabulary_size": int, "tokenizer": str, "embedder": dict, "key_dtype": str,
    "neighbours": int, "extra_candidates": int, "shard_bytes": int, "corpus": str, "skipped": int,
    "skipped_names": list, "splits": dict, "sources": list, "files": dict,
}  # fmt: skip


def tombstones_of(split: str) -> str:
    """The file that lists the removed rows of a split."""
    return TOMBSTONES if split == "train" else f"{SPLITS[split]}/{TOMBSTONES}"


def shard_name(number: int) -> str:
    """The folder name of a shard, numbered from 0."""
    return f"{number:05d}"


def read_manifest(path: Path) -> dict[str, Any]:
    """A database's manifest, checked against its own hash, with old names of entries replaced by the current ones.

    Raises UserError if the manifest is missing, has been changed, has another format or lacks an entry."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        unfinished = "its build was not finished; run the same retro-np build again"
        hint = unfinished if file.with_name(REQUEST).is_file() else "retro-np build makes one"
        raise UserError(f"no database at {path}: {hint}")
    hint = f"it has been changed or damaged (its own SHA-256 differs): {REBUILD}"
    stored = file.read_bytes()
    manifest, intact = parse_json(stored, str(file), hint=hint), False
    with suppress(RecursionError, UnicodeError):
        intact = manifest.get("sha256") == manifest_sha256(manifest) and stored == manifest_bytes(manifest)
    if not intact:
        raise UserError(f"{file}: {hint}")
    manifest = new_names(manifest)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file} has format {manifest.get('format')!r}, but this version reads {FORMAT}: {REBUILD}")
    if not _is_complete(manifest):
        raise UserError(f"{file} is not a valid manifest: {REBUILD}")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether all entries have values that a database can have. A right hash proves nothing: anyone can compute it."""
    if not has_types(manifest, TYPES):
        return False
    embedder, files, duplicates = manifest["embedder"], manifest["files"], manifest.get("duplicates")
    return (
        1 <= manifest["chunk_size"] <= MAX_CHUNK_SIZE
        and 1 <= manifest["vocabulary_size"] < 2**32
        and all(type(manifest.get(name, 0)) is int for name in ("padding", "end_of_text"))  # 0 and 1 if absent
        and manifest["neighbours"] + manifest["extra_candidates"] <= MAX_STORED_NEIGHBOURS
        and manifest["shard_bytes"] >= 1
        and manifest["key_dtype"] in ("float16", "float32")
        and isinstance(manifest.get("training_neighbours", True), bool)
        and has_types(embedder, {"name": str, "sha256": str, "d_key": int, "margin": int})
        and 1 <= embedder["d_key"] < EMBEDDER_LIMIT
        and embedder["margin"] < EMBEDDER_LIMIT
        and (duplicates is None or _is_deduplication(duplicates))
        and all(isinstance(name, str) for name in manifest["skipped_names"])
        and bool(manifest["skipped_names"]) == bool(manifest["skipped"])
        and list(manifest["splits"]) in (list(SPLITS), list(SPLITS)[:2])  # test only if documents are held out for it
        and all(has_types(split, COUNTS) for split in manifest["splits"].values())
        and all(map(_is_source, manifest["sources"]))
        and {TOKENIZER, DOCUMENTS, DUPLICATES, *map(tombstones_of, manifest["splits"])} <= files.keys()
        and all(SHARD_FILE.fullmatch(name) or FILE_NAME.fullmatch(name) for name in files)
        and all(has_types(file, {"bytes": int, "sha256": str}) for file in files.values())
        and files[TOKENIZER]["sha256"] == manifest["tokenizer"]
    )


def _is_deduplication(settings: dict[str, Any]) -> bool:
    counts = dict.fromkeys(("words", "hashes", "bands"), int)
    return has_types(settings, counts) and type(settings.get("threshold")) in (int, float) and len(settings) == 4


def _is_source(source: Any) -> bool:
    if not has_types(source, {"name": str, "rows": list}) or "weight" not in source:
        return False
    bounds, weight = source["rows"], source["weight"]
    is_weight = weight is None or (type(weight) in (int, float) and 0 < weight < math.inf)
    pairs = all(isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in bounds)
    return is_weight and pairs and all(0 <= start <= stop < 2**62 for start, stop in bounds)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The hash of a manifest without its entry "sha256"."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The exact bytes of manifest.json, so that no change to the file goes unnoticed."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with its own hash."""
    write_atomically(folder / MANIFEST, manifest_bytes(manifest | {"sha256": manifest_sha256(manifest)}))


def file_names(folder: Path) -> list[str]:
    """The sorted names of a database's files, without the manifest and the leftovers of unfinished builds and edits."""
    paths = (path.relative_to(folder) for path in folder.rglob("[!.]*") if not path.is_dir() and path.suffix != PARTIAL)
    return sorted(path.as_posix() for path in paths if path.parts[0] not in (WORK, EDIT, MANIFEST))


def file_facts(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of files in a folder, {} for one that is missing.

    names: the files; None for all with names that a build gives to files of a database."""
    if names is None:
        names = [name for name in file_names(folder) if name in TOP_FILES or SHARD_FILE.fullmatch(name)]
    facts: dict[str, dict[str, Any]] = {name: {} for name in names}

    def measure(name):
        if os.path.isfile(folder / name):  # False for a name that is too long as well
            facts[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}

    threads.parallel_for(measure, facts)
    return facts


def broken_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """One line for each file that is missing or differs from the manifest."""
    facts, faults = file_facts(path, sorted(manifest["files"])), []
    for name, measured in facts.items():
        if not measured or not measured.items() <= manifest["files"][name].items():
            fault = "does not match the manifest (its SHA-256 differs)" if measured else "is missing"
            faults.append(f"{path / name} {fault}")
    return faults
