"""How an edit of a database takes effect completely or not at all, wherever it is killed.

An edit writes its files below edit/, in the layout of a database, and writes its manifest there last. Before that, the
database is unchanged. After that, the edit is committed: the same process, or whoever opens the database next, moves
the files into place. Each move can be repeated, so a kill between moves does no harm. The manifest is moved last."""

import json
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files import flush_folder, locked, outputs, remove_folder, write_json
from retro_np.files.untrusted import read_json
from retro_np.retrieval.manifest import EDIT, MANIFEST, TOP_FILES, read_manifest

EDIT_REQUEST = "request.json"
LOCK_TIMEOUT = 10.0  # seconds


def recover_edit(path: Path) -> None:
    """Move the files of a committed edit into place, or wait until the process that does so has finished.

    Raises UserError if another process holds the database for more than LOCK_TIMEOUT seconds."""
    if (path / EDIT / MANIFEST).exists():
        read_manifest(path)  # Nothing is changed in a folder without a database.
        outputs.check_subfolders(path, outputs.DATABASE_FOLDERS)
        with locked(path, "edit", timeout=LOCK_TIMEOUT):
            finish_edit(path)


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
        # A manifest may name further files beside ours, which an edit leaves alone.
        is_ours = lambda name: "/" in name or name in TOP_FILES  # noqa: E731
        for name in new["files"]:
            if (edit / name).exists() and (is_ours(name) or not (path / name).exists()):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (edit / name).replace(path / name)
                flush_folder((path / name).parent)
        for name in filter(is_ours, set(old["files"]) - set(new["files"])):
            (path / name).unlink(missing_ok=True)
            for folder in list((path / name).parents)[: name.count("/")]:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        (edit / MANIFEST).replace(path / MANIFEST)
        flush_folder(path)
    elif (edit / EDIT_REQUEST).exists() and _stored_request(edit).get("base") == read_manifest(path)["sha256"]:
        return  # The edit is unfinished and can be resumed. Any other folder is left over from a finished edit.
    remove_folder(edit)


def begin_edit(path: Path, request: dict[str, Any]) -> Path:
    """The folder where an edit writes its files: a new one, or that of the same edit if it was interrupted.

    The caller holds the lock and has called `finish_edit`. Raises UserError if another edit was interrupted."""
    edit = path / EDIT
    request = json.loads(json.dumps(request | {"base": read_manifest(path)["sha256"]}))
    if (edit / EDIT_REQUEST).exists():
        if (stored := _stored_request(edit)) != request:
            fault = f"another edit of {path} was interrupted ({stored.get('kind')})"
            raise UserError(f"{fault}: run the same command again to finish it, or remove {edit} to abandon it")
        return edit
    remove_folder(edit)
    write_json(edit / EDIT_REQUEST, request)
    return edit


def _stored_request(edit: Path) -> dict:
    return read_json(edit / EDIT_REQUEST, hint=f"remove {edit} to abandon the edit")
