"""Files that are there whole or not at all."""

import errno
import os
from pathlib import Path

from retro_np.errors import UserError


def write_atomically(path, data: bytes) -> None:
    """Write beside the final name, flush to the disk, rename: a reader sees the old file or the new one."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk is full, {path} was not written: free some space and run the same again"
            ) from error
        raise
