"""Options, tables and checks that several commands share."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from retro_np.errors import UserError
from retro_np.progress import safe_console

if TYPE_CHECKING:
    from retro_np.retrieval.database import Database

console = safe_console()

DatabasePath = Annotated[Path, Argument(metavar="DB", help="A database made by `retro-np build`.")]
CheckpointPath = Annotated[Path, Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")]
EMBEDDERS = "a folder as sentence-transformers saves it, or MODULE:OBJECT, which runs the module"
EmbedderSpec = Annotated[str | None, Option("--embedder", help=f"A{EMBEDDERS[1:]}. Default: the database's embedder.")]
K = Annotated[int, Option("-k", "--neighbours", min=1, help="Neighbours per chunk.")]
MAX_SIZE = 1 << 20  # A larger sequence or batch would overflow array sizes before memory runs out.
SequenceLength = Annotated[int, Option(min=1, max=MAX_SIZE, help="Tokens per sequence, n: one or more whole chunks.")]
Temperature = Annotated[float, Option(min=0, help="Temperature of sampling; 0 is greedy.")]
TopP = Annotated[float, Option(min=0, max=1, help="Sample only the likeliest tokens, whose probabilities sum to this.")]
Seed = Annotated[int, Option(min=0, help="Random seed.")]


def open_database(path: Path, embedder: str | None = None, index: str = "hnsw") -> "Database":
    """Open a database for a command. embedder: what the user named, if anything (see `embedders.load_embedder`)."""
    from retro_np.retrieval.database import Database
    from retro_np.retrieval.embedders import load_embedder

    return Database.open(path, load_embedder(embedder) if embedder else None, index)


def finite(option: str, value: float) -> float:
    """The value of an option. Raises UserError if it is infinite or NaN."""
    if not math.isfinite(value):
        raise UserError(f"{option} must be a finite number, not {value}")
    return value
