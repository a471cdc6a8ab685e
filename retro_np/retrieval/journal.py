"""How an edit of a database takes effect at once or not at all, wherever it is killed.

An edit writes its files below edit/, laid out as they will lie, and its manifest there last. Until then the database is
what it was. From then on the edit is made: whoever opens the database next, or the edit itself, moves the files into
place. Each move can be made twice, so it does not matter where a kill falls; the last one replaces the manifest.
"""

import json
import os
import time
from pathlib import Path

from retro_np.errors import UserError
from retro_np.files import disk_full_said, flush_folder, locked, remove_folder, write_json
from retro_np.retrieval.manifest import EDIT, MANIFEST, read_manifest

REQUEST = "request.json"
PATIENCE = 10.0  # seconds


def settle_edit(path: Path) -> None:
    """Finish an edit that was made and not yet moved into place, or wait for who is at it, which takes a moment.

    Raises UserError where another process holds the database longer than PATIENCE seconds.
    """
    end = time.monotonic() + PATIENCE
    while (path / EDIT / MANIFEST).exists():
        try:
            with locked(path, "edit"), disk_full_said(path):
                finish_edit(path)
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def edited_since(path: Path, manifest: dict) -> bool:
    """Whether files of a database may be others than its manifest, read before, says. Its own are renamed last."""
    if (path / EDIT / MANIFEST).exists():
        return True
    try:
        return read_manifest(path)["sha256"] != manifest.get("sha256")
    except UserError:  # it is there no more
        return True


def finish_edit(path: Path) -> None:
    """Move an edit's files into place, if it is made; the database's lock is held."""
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
    elif (edit / REQUEST).exists() and _begun(edit).get("base") == read_manifest(path)["sha256"]:
        return  # it is begun and not made; anything else is what an edit that is in place left behind
    remove_folder(edit)


def begin_edit(path: Path, request: dict) -> Path:
    """Where an edit writes its files: begun anew, or the same one that was stopped. The database's lock is held.

    Raises UserError where another edit was stopped half-way.
    """
    edit = path / EDIT
    finish_edit(path)
    wanted = json.loads(json.dumps(request | {"base": read_manifest(path)["sha256"]}))
    if (edit / REQUEST).exists():
        begun = _begun(edit)
        if begun != wanted:
            raise UserError(
                f"another edit of {path} was stopped half-way ({begun.get('kind')}): give the same command again to "
                f"finish it, or remove {edit} to give it up"
            )
        return edit
    remove_folder(edit)
    write_json(edit / REQUEST, wanted)
    return edit


def _begun(edit: Path) -> dict:
    try:
        return dict(json.loads((edit / REQUEST).read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{edit / REQUEST} is damaged: remove {edit} to give the edit up") from error


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root:
        if folder.exists():  # a kill may have fallen after it went
            if os.listdir(folder):
                return
            folder.rmdir()
        folder = folder.parent
