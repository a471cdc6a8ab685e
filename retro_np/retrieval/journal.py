"""How an edit of a database takes effect completely or not at all, wherever it is killed.

An edit writes its files below edit/, in the layout of a database, and writes its manifest there last. Before that, the
database is unchanged. After that, the edit is committed: the same process, or whoever opens the database next, moves
the files into place. Each move can be repeated, so a kill between moves does no harm. The manifest is moved last.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files import flush_folder, locked, remove_folder, write_json
from retro_np.retrieval.manifest import EDIT, MANIFEST, read_manifest

EDIT_REQUEST = "request.json"
LOCK_TIMEOUT = 10.0  # seconds


def recover_edit(path: Path) -> None:
    """Move the files of a committed edit into place, or wait until the process that does so has finished.

    Raises UserError if another process holds the database for more than LOCK_TIMEOUT seconds.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT
    while (path / EDIT / MANIFEST).exists():
        try:
            with locked(path, "edit"):
                finish_edit(path)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def edited_since(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether an edit may have replaced files since the manifest was read. The manifest itself is replaced last."""
    if (path / EDIT / MANIFEST).exists():
        return True
    try:
        return read_manifest(path)["sha256"] != manifest.get("sha256")
    except UserError:  # The manifest is gone or damaged.
        return True


def finish_edit(path: Path) -> None:
    """Move an edit's files into place if the edit is committed. The caller holds the database's lock."""
    edit = path / EDIT
    if (edit / MANIFEST).exists():
        new, old = read_manifest(edit), read_manifest(path)
        for name in new["files"]:
            if (edit / name).exists():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (edit / name).replace(path / name)
                flush_folder((path / name).parent)
        for name in set(old["files"]) - set(new["files"]):
            (path / name).unlink(missing_ok=True)
            _remove_empty((path / name).parent, path)
        (edit / MANIFEST).replace(path / MANIFEST)
        flush_folder(path)
    elif (edit / EDIT_REQUEST).exists() and _stored_request(edit).get("base") == read_manifest(path)["sha256"]:
        return  # The edit is unfinished and can be resumed. Any other folder is left over from a finished edit.
    remove_folder(edit)


def begin_edit(path: Path, request: dict[str, Any]) -> Path:
    """The folder where an edit writes its files: a new one, or that of the same edit if it was interrupted.

    The caller holds the database's lock. Raises UserError if another edit was interrupted.
    """
    edit = path / EDIT
    finish_edit(path)
    request = json.loads(json.dumps(request | {"base": read_manifest(path)["sha256"]}))
    if (edit / EDIT_REQUEST).exists():
        stored = _stored_request(edit)
        if stored != request:
            raise UserError(
                f"another edit of {path} was interrupted ({stored.get('kind')}): run the same command again to "
                f"finish it, or remove {edit} to abandon it"
            )
        return edit
    remove_folder(edit)
    write_json(edit / EDIT_REQUEST, request)
    return edit


def _stored_request(edit: Path) -> dict:
    try:
        return dict(json.loads((edit / EDIT_REQUEST).read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{edit / EDIT_REQUEST} is damaged: remove {edit} to abandon the edit") from error


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root:
        if folder.exists():  # An earlier, interrupted attempt may have removed it.
            if os.listdir(folder):
                return
            folder.rmdir()
        folder = folder.parent
