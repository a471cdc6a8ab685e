"""Hashes and archives of files. Old versions and the tests run this module, so it does not import retro_np."""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RENAMED = ("manifest.json", "build.json")  # files in which entries have been renamed since 0.1.0


def environment() -> dict[str, str]:
    """What determines the last bits of a float, besides the code."""
    kernels = os.environ.get("RETRO_NP_KERNELS", "auto"), "C" if importlib.util.find_spec("retro_np._c") else "no C"
    return {
        "machine": platform.machine(),
        "vector units": " ".join(np.show_config(mode="dicts")["SIMD Extensions"]["found"]),
        "kernels": ", ".join(kernels),
        **{name: _version(name) for name in ("numpy", "hnswlib")},
    }


def _version(name):
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else "not installed"


def file_hashes(folder: Path | str) -> dict[str, str]:
    """SHA-256 of each file of a database, without the two in which entries have been renamed."""
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    names = sorted(name for name in files if name not in (*RENAMED, ".lock"))
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in names}


def arrays_of(params, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The dotted name and array of each parameter."""
    if isinstance(params, np.ndarray):
        yield prefix[:-1], params
    else:
        for name, part in params.items() if isinstance(params, dict) else enumerate(params):
            yield from arrays_of(part, f"{prefix}{name}.")


def parameters_sha256(params) -> str:
    """SHA-256 of all parameters: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays_of(params), key=lambda named: named[0]):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def pack(path: Path, names: list[str]) -> None:
    """Write a .tar.gz that depends only on the files' contents."""
    with gzip.GzipFile(path, "wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for file in sorted(file for name in names for file in [Path(name), *Path(name).rglob("*")] if file.is_file()):
            if file.name != ".lock":
                entry = tarfile.TarInfo(file.as_posix())
                entry.size = file.stat().st_size
                archive.addfile(entry, io.BytesIO(file.read_bytes()))


def write(path: Path, value: dict) -> None:
    """Write JSON, one entry of the outermost object per line."""
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
