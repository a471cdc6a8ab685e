"""The layout of a database: file names, manifest.json, and the hashes that every file is checked against."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from retro_np.errors import UserError
from retro_np.files import PARTIAL, sha256_of, write_atomically
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
SPLITS = {"train": "shards", "valid": "splits/valid"}  # the folder of each split's shards


def shard_dir(split: str) -> str:
    """The folder of a split's shards."""
    return SPLITS[split]


def tombstones_of(split: str) -> str:
    """The file that lists the removed rows of a split."""
    return TOMBSTONES if split == "train" else f"{SPLITS[split]}/{TOMBSTONES}"


def shard_name(number: int) -> str:
    """The folder name of a shard, numbered from 0."""
    return f"{number:05d}"


def read_manifest(path: Path) -> dict[str, Any]:
    """A database's manifest, checked against its own hash, with old names of entries replaced by the current ones.

    Raises UserError if the manifest is missing, has been changed, has another format or lacks an entry.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        unfinished = (Path(path) / REQUEST).is_file()
        build = "its build was not finished; run the same retro-np build again"
        hint = build if unfinished else "retro-np build makes one"
        raise UserError(f"no database at {path}: {hint}")
    try:
        stored = file.read_bytes()
        manifest = json.loads(stored)
        intact = manifest["sha256"] == manifest_sha256(manifest) and stored == manifest_bytes(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise UserError(f"{file} has been changed or damaged (its own SHA-256 differs): {REBUILD}")
    manifest = new_names(manifest)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file} has format {manifest.get('format')}, but this version reads {FORMAT}: {REBUILD}")
    try:
        complete = _is_complete(manifest)
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{file} is not a valid manifest: {REBUILD}")
    return manifest


def _is_complete(manifest: dict) -> bool:
    """Whether all entries are there, with their types, and every file is inside the database's folder."""
    embedder, files = manifest["embedder"], manifest["files"]
    names = ("generation", "chunk_size", "vocabulary_size", "neighbours", "extra_candidates", "shard_bytes")
    numbers = [*(manifest[name] for name in names), embedder["d_key"], embedder["margin"]]
    numbers += [file["bytes"] for file in files.values()]
    texts = [manifest["tokenizer"], manifest["key_dtype"], manifest["corpus"], embedder["name"], embedder["sha256"]]
    texts += [file["sha256"] for file in files.values()] + [source["name"] for source in manifest["sources"]]
    weights = [source["weight"] for source in manifest["sources"]]
    bounds = [bound for source in manifest["sources"] for start, stop in source["rows"] for bound in (start, stop)]
    counts = [split[n] for split in manifest["splits"].values() for n in ("documents", "chunks", "tokens", "bytes")]
    return (
        all(type(number) is int and number >= 0 for number in (*numbers, *bounds, *counts))
        and all(isinstance(text, str) for text in texts)
        and all(weight is None or (type(weight) in (int, float) and weight > 0) for weight in weights)
        and list(manifest["splits"]) == list(SPLITS)
        and all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in files)
        and {TOKENIZER, DOCUMENTS, *map(tombstones_of, SPLITS)} <= files.keys()
    )


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
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in (WORK, EDIT)]
        paths += [Path(parent) / name for name in names if not name.startswith(".") and not name.endswith(PARTIAL)]
    return sorted(name for name in (p.relative_to(folder).as_posix() for p in paths) if name != MANIFEST)


def file_facts(folders: Iterable[Path], names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of each file, in the first folder that has it. Files are hashed in parallel."""
    folders, facts = list(folders), {}

    def measure(name):
        file = next(folder / name for folder in folders if (folder / name).is_file())
        facts[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    threads.parallel_for(measure, names)
    return {name: facts[name] for name in sorted(names)}


def broken_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """One line for each file that is missing or differs from the manifest."""
    complaints: dict[str, str] = {}

    def examine(name):
        file, expected = path / name, manifest["files"][name]
        if not file.is_file():
            complaints[name] = f"{file} is missing"
        elif file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            complaints[name] = f"{file} does not match the manifest (its SHA-256 differs)"

    threads.parallel_for(examine, manifest["files"])
    return [complaints[name] for name in sorted(complaints)]
