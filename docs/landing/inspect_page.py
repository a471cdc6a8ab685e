"""Write inspect.html, the page of `retro-np inspect` that the essay shows: `python docs/landing/inspect_page.py`.

The bundled RETRO reads a module of Python 3.11's standard library that it was not trained on. Its database contains the
other modules. Building the database takes about two minutes."""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from retro_np import load_pretrained
from retro_np.experiments.pretrained import pretrained_database
from retro_np.experiments.recipe import NEIGHBOURS
from retro_np.report.inspection import inspect, write_inspection

MODULE = "distutils/command/install_headers.py"  # Similar modules share many of its lines.


def write_page(page, database):
    """Write the page about MODULE. database: a Database of the standard library."""
    params, config, _ = load_pretrained("retro")
    split = database.split("valid")
    names = np.array([database.documents[int(number)]["name"] for number in split.documents])
    tokens = np.asarray(split.tokens[np.flatnonzero(names == MODULE)]).reshape(-1)
    inspection = inspect(params, config, database, tokens[tokens != split.padding], k=NEIGHBOURS)
    facts = {
        "held-out module": MODULE,
        "database": f"{database.n_chunks:,} chunks of {database.chunk_size} tokens of the other modules",
    }
    write_inspection(page, "A module that the model never saw", facts, inspection)


def main():
    parser = argparse.ArgumentParser(description="Write the page of retro-np inspect that the essay shows.")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("inspect.html"))
    parser.add_argument("--database", type=Path, help="folder of the database, to be built or used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_page(arguments.to, pretrained_database(arguments.database or Path(folder) / "db"))


if __name__ == "__main__":
    main()
