"""`retro-np tutorials`."""

import importlib.util
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from retro_np.commands.options import console
from retro_np.errors import UserError


def tutorials(
    folder: Annotated[Path, Argument(help="Folder of the copies, which you may change.")] = Path("retro-tutorials"),
    open_jupyter: Annotated[bool, Option("--open/--no-open", help="Open JupyterLab on the copies.")] = True,
) -> None:
    """Copy the tutorials into a folder and open Jupyter.

    They are notebooks that run by themselves, from top to bottom. No file of the folder is overwritten: what is
    missing is added, and a file that differs from this version's is left as it is.

    Example: `retro-np tutorials --no-open`"""
    from retro_np.tutorials import copy_tutorials

    count, kept = copy_tutorials(folder)
    console.print(f"{count} notebooks are in {folder}", soft_wrap=True)
    if kept:
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        console.print(f"Left as found, since the contents differ from this version's: {kept[0]}{more}", soft_wrap=True)
    if not open_jupyter:
        return
    by_hand = f"jupyter lab {shlex.quote(str(folder))}"
    if importlib.util.find_spec("jupyterlab") is None:
        install = 'pip install ".[tutorials]" in a clone, or pip install jupyterlab'
        raise UserError(f"Jupyter is not installed, so the copies were not opened: {install}; then {by_hand}")
    sys.stdout.flush()
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", str(folder)])
    status = None
    while status is None:
        with suppress(KeyboardInterrupt):  # Jupyter handles Ctrl-C by itself.
            status = process.wait()
    if status:
        raise UserError(f"Jupyter ended with status {status}: open the copies with {by_hand}; --no-open only copies")
