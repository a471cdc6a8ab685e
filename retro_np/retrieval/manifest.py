"""What a database is made of: the layout's names, manifest.json, and the hashes that every file is held against."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from retro_np.errors import UserError
from retro_np.files import PARTIAL, sha256_of
from retro_np.kernels import threads
from retro_np.renamed import new_names

FORMAT = 2
MANIFEST = "manifest.json"
REQUEST = "build.json"  # what a build was asked for
TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.jsonl"
DUPLICATES = "duplicates.jsonl"  # training documents that were left out: too like a held-out one
TOMBSTONES = "tombstones.npy"
HASHING = "hashing.npy"  # what the hashing embedder counted
WORK, EDIT = "work", "edit"  # folders of an unfinished build, and of an unfinished edit: no part of a database
SPLITS = {"train": "shards", "valid": "splits/valid"}  # where the shards of each split lie


def shard_dir(split: str) -> str:
    """The folder of a split's shards: "shards" of the training documents, which alone can be retrieved."""
    return SPLITS[split]


def tombstones_of(split: str) -> str:
    """The file that lists the rows removed from a split."""
    return TOMBSTONES if split == "train" else f"{SPLITS[split]}/{TOMBSTONES}"


def shard_name(number: int) -> str:
    """The folder's name of a shard, from 0."""
    return f"{number:05d}"


def read_manifest(path: Path) -> dict:
    """A database's manifest, checked against its own hash. Raises UserError where there is none, or it has changed."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        begun = (Path(path) / REQUEST).is_file()
        hint = "its build was not finished: run the same retro-np build again" if begun else "retro-np build makes one"
        raise UserError(f"no database at {path}: {hint}")
    try:
        written = file.read_bytes()
        manifest = json.loads(written)
        intact = manifest["sha256"] == manifest_sha256(manifest) and written == manifest_bytes(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise UserError(f"{file} has been changed or damaged (its own SHA-256 differs): build the database anew")
    manifest = new_names(manifest)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file} is of format {manifest.get('format')}, and this version reads {FORMAT}: build it anew")
    try:
        whole = _is_whole(manifest)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{file} does not hold what a manifest holds: build the database anew")
    return manifest


def _is_whole(manifest: dict) -> bool:
    """Whether all entries are there, of their types, and every file lies in the database's folder."""
    embedder, files = manifest["embedder"], manifest["files"]
    numbers = [
        manifest[n]
        for n in ("generation", "chunk_size", "vocabulary_size", "neighbours", "extra_candidates", "shard_bytes")
    ]
    numbers += [embedder["d_key"], embedder["margin"], *(known["bytes"] for known in files.values())]
    texts = [manifest["tokenizer"], manifest["key_dtype"], manifest["corpus"], embedder["name"], embedder["sha256"]]
    texts += [known["sha256"] for known in files.values()] + [source["name"] for source in manifest["sources"]]
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


def sealed(manifest: dict) -> dict:
    """The manifest with its own hash as last entry."""
    return manifest | {"sha256": manifest_sha256(manifest)}


def manifest_sha256(manifest: dict) -> str:
    """The hash of a manifest without the entry that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_bytes(manifest: dict) -> bytes:
    """What manifest.json holds, to the byte, so that no change to it goes unseen."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def file_names(folder: Path) -> list[str]:
    """Every file of a database but its manifest, sorted; not what an unfinished build, edit or write left there."""
    found = []
    for here, folders, names in os.walk(folder):
        if Path(here) == folder:
            folders[:] = [name for name in folders if name not in (WORK, EDIT)]
        found += [Path(here) / name for name in names if not name.startswith(".") and not name.endswith(PARTIAL)]
    return sorted(name for name in (p.relative_to(folder).as_posix() for p in found) if name != MANIFEST)


def file_facts(folders: Iterable[Path], names: list[str]) -> dict[str, dict]:
    """Size and SHA-256 of each file, found in the first of the folders that has it. Hashed on all threads."""
    folders, facts = list(folders), {}

    def measure(name):
        file = next(folder / name for folder in folders if (folder / name).is_file())
        facts[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    threads.parallel_for(measure, names)
    return {name: facts[name] for name in sorted(names)}


def broken_files(path: Path, manifest: dict) -> list[str]:
    """One line for each file that is missing, or not what the manifest says; none where all is well."""
    found = {}

    def examine(name):
        file, known = path / name, manifest["files"][name]
        if not file.is_file():
            found[name] = f"{file} is missing"
        elif file.stat().st_size != known["bytes"] or sha256_of(file) != known["sha256"]:
            found[name] = f"{file} is not what the manifest says (its SHA-256 differs)"

    threads.parallel_for(examine, manifest["files"])
    return [found[name] for name in sorted(found)]
