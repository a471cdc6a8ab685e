"""Atomic writes, locked folders, and the hashes that identify files and names."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from retro_np.errors import UserError

PARTIAL = ".partial"  # the suffix of a file that is being written
LOCK = ".lock"
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota error


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """Open a temporary file that is flushed to the disk and renamed to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part. Raises UserError for a full disk.
    """
    path = Path(path)
    with reporting_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # The part that was written may be what fills the disk.
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A unique temporary name in the folder of `path`, shortened because file systems limit the length of a name."""
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}{PARTIAL}")


def remove_partial(folder: Path | str) -> None:
    """Remove the unfinished files of killed processes below a folder. No other process may be writing there."""
    for path in list(Path(folder).rglob("*" + PARTIAL)):
        path.unlink(missing_ok=True)


def allow_open_files(number: int) -> None:
    """Raise the process's limit on open files to `number`, or as far as the system allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def remove_folder(folder: Path | str) -> None:
    """Remove a folder and everything in it, if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reporting_full_disk(path: Path | str) -> Iterator[None]:
    """Turn the system's error for a full disk into a one-line UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(f"the disk is full, {path} was not written: free space and try again") from error
        raise


def flush_folder(folder: Path | str) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    if os.name != "nt":  # Windows cannot open a folder.
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def visible(folder: Path | str) -> Iterator[Path]:
    """The entries of a folder, without the lock file and the unfinished files of killed processes."""
    return (path for path in Path(folder).iterdir() if path.name != LOCK and path.suffix != PARTIAL)


def check_folder(path: Path | str) -> None:
    """Raise UserError if no output folder can be created at `path`. Call it before the work starts."""
    path = Path(path)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file: give the name of a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{nearest} is not writable: give another folder")


def check_output(path: Path | str, option: str, inputs: Iterable[Path | str] = ()) -> Path:
    """The resolved path of an output file, checked before the work starts.

    option: the command-line option that names the file. inputs: files and folders that the command reads. Raises
    UserError if the file cannot be written, is a folder or a device, or would overwrite an input.
    """
    path = Path(path).resolve()
    check_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {option} the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not an ordinary file: give {option} another name")
    for source in (Path(name).resolve() for name in inputs):
        if path == source or source in path.parents:
            raise UserError(f"{path} would overwrite an input of the command: give {option} another name")
    return path


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write bytes to a file, all of them or none."""
    with replacing(path) as file:
        file.write(data)


def write_array(path: Path | str, array: np.ndarray) -> None:
    """Write an array as .npy, all of it or nothing."""
    with replacing(path) as file:
        # NumPy does not see the file descriptor, so it calls `write`, whose errors report a full disk.
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def mapped(path: Path | str) -> np.ndarray:
    """Memory-map the array of a .npy file. Nothing is unpickled."""
    return np.load(path, allow_pickle=False, mmap_mode="r")


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON, all of it or nothing."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends only on a name: the first 8 bytes of its SHA-256, divided by 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


@contextmanager
def locked(folder: Path | str, purpose: str) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock if the process is killed.

    Raises UserError if another process has locked the folder, and ModuleNotFoundError if filelock is not installed.
    """
    from filelock import FileLock, Timeout

    check_folder(folder)
    with reporting_full_disk(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(Path(folder) / LOCK).acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{folder} is in use by another {purpose}: wait for it, or give another folder") from error
        with lock:
            yield
