"""Files that are there whole or not at all, and the hashes that they are known by."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from retro_np.errors import UserError

PARTIAL = ".partial"  # ends the name of a file that is being written
LONGEST_STEM = 40


@contextmanager
def replacing(path) -> Iterator[BinaryIO]:
    """Open a file beside `path`; once written, flush it to the disk and rename it. A reader sees old or new, whole."""
    path = Path(path)
    with disk_full_said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = beside_of(path)
        try:
            with beside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:  # what was written of it may be what fills the disk
            beside.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def beside_of(path: Path) -> Path:
    """Where to write what will be renamed to `path`: a name that no other thread, process or machine writes under."""
    name = path.name[:LONGEST_STEM]  # with what is added it must be no longer than names may be
    return path.with_name(f"{name}.{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}{PARTIAL}")


def remove_partial(folder) -> None:
    """Remove what killed processes had begun to write below a folder. Only where no other process may be writing."""
    for path in list(Path(folder).rglob("*" + PARTIAL)):
        path.unlink(missing_ok=True)


def allow_open_files(number: int) -> None:
    """Raise the soft limit of open files, as far as the hard one allows, where so many may be wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def remove_folder(folder) -> None:
    """Remove a folder with all that it holds, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_full_said(path) -> Iterator[None]:
    """Turn the system's error for a full disk into the user's one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full, {path} was not written: free some space and run the same again"
            ) from error
        raise


def flush_folder(folder) -> None:
    """Bring a folder's names to the disk, so that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def visible(folder) -> Iterator[Path]:
    """What a folder holds, but for a lock and what a killed process had not finished."""
    return (path for path in Path(folder).iterdir() if path.name != ".lock" and path.suffix != PARTIAL)


def check_folder(path) -> None:
    """Raise UserError where a folder for results can't be: before the work, not after it."""
    path = Path(path)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file: give the name of a folder, new or begun before")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"nothing can be written in {nearest}: give another folder")


def check_output(path, option: str, kept: Iterable = ()) -> Path:
    """Where a file is to be written, links followed; checked before the work.

    option: what names it on the command line. kept: files and folders that the command reads. Raises UserError where
    the file can't be written, where it is none (a folder, a device), and where it would take the place of what is kept.
    """
    path = Path(path).resolve()
    check_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {option} the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no ordinary file: give {option} the name of one")
    for place in (Path(one).resolve() for one in kept):
        if path == place or place in path.parents:
            raise UserError(f"{path} would take the place of what the command reads: give {option} another name")
    return path


def write_atomically(path, data: bytes) -> None:
    """Write bytes under a name, whole or not at all."""
    with replacing(path) as file:
        file.write(data)


def write_array(path, array: np.ndarray) -> None:
    """Write an array as .npy, whole or not at all."""
    with replacing(path) as file:
        np.save(_Written(file), array, allow_pickle=False)


def mapped(path) -> np.ndarray:
    """The array of a .npy file, mapped: what is looked at is read. Nothing is unpickled."""
    return np.load(path, allow_pickle=False, mmap_mode="r")


class _Written:
    """A file that NumPy takes for none of the system's: it then writes by `write`, whose errors say a disk is full."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


def write_json(path, value) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def sha256_of(path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder, purpose: str) -> Iterator[None]:
    """Hold a folder for one process. Raises UserError where another holds it; a killed process holds nothing."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the name of a folder, new or begun before")
    with disk_full_said(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{folder} is in use by another {purpose}: wait for it, or give another folder"
                ) from error
            yield
