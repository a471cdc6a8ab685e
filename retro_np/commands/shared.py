"""Options, tables and checks that several commands share."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from retro_np.errors import UserError
from retro_np.progress import safe_console

if TYPE_CHECKING:
    from retro_np.retrieval.database import Database

console = safe_console()

DatabasePath = Annotated[Path, Argument(metavar="DB", help="A database made by `retro-np build`.")]
CheckpointPath = Annotated[Path, Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")]
EmbedderPath = Annotated[Path | None, Option("--embedder", help="A BERT's folder. Default: the database's embedder.")]
K = Annotated[int, Option("-k", "--neighbours", min=1, help="Neighbours per chunk.")]
MAX_SIZE = 1 << 20  # A larger sequence or batch would overflow array sizes before memory runs out.
SequenceLength = Annotated[int, Option(min=1, max=MAX_SIZE, help="Tokens per sequence, n: one or more whole chunks.")]
Temperature = Annotated[float, Option(min=0, help="Temperature of sampling; 0 is greedy.")]
TopP = Annotated[float, Option(min=0, max=1, help="Sample only the likeliest tokens, whose probabilities sum to this.")]
Seed = Annotated[int, Option(min=0, help="Random seed.")]


def open_database(path: Path, embedder: Path | None = None, index: str = "hnsw") -> "Database":
    """Open a database for a command. embedder: the folder of the BERT that the user named, if any."""
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.database import Database

    return Database.open(path, load_bert(embedder) if embedder else None, index)


def finite(option: str, value: float) -> float:
    """The value of an option. Raises UserError if it is infinite or NaN."""
    if not math.isfinite(value):
        raise UserError(f"{option} must be a finite number, not {value}")
    return value


def print_results(results: dict[str, Any]) -> None:
    """Print the table and the sentence of an evaluation."""
    title = {"valid": "held-out documents", "train": "training documents"}[results["settings"]["split"]]
    table = Table("", "bits per byte", "relative to the first row", "without leakage (α = 12.5 %)", title=title)
    first = next(iter(results["models"].values()))["bpb"]
    for name, figures in results["models"].items():
        filtered = figures["bpb_no_leakage"]
        without_leakage = "no chunks left" if filtered is None else f"{filtered:.4f}"
        table.add_row(name, f"{figures['bpb']:.4f}", f"{100 * (figures['bpb'] / first - 1):+.2f} %", without_leakage)
    console.print(table)
    console.print(results["sentence"])
