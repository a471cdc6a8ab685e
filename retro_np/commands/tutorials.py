"""`retro-np tutorials`."""

import importlib.util
import os
import sys
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

    They are notebooks that run by themselves, from top to bottom. Nothing that you have changed is overwritten: if the
    folder has other versions of these files, nothing is copied.

    Example: `retro-np tutorials --no-open`"""
    from retro_np.tutorials import copy_tutorials

    console.print(f"{copy_tutorials(folder)} notebooks are in {folder}", soft_wrap=True)
    if not open_jupyter:
        return
    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError('Jupyter is not installed, so the copies were not opened: pip install "retro-np[tutorials]"')
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(folder)])  # It handles Ctrl-C by itself.
