"""What several commands take and show."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from retro_np.errors import UserError

console = Console(markup=False, highlight=False)  # names and paths may hold brackets

DatabasePath = Annotated[Path, typer.Argument(metavar="DB", help="A database that `retro-np build` made.")]
CheckpointPath = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")]
EmbedderPath = Annotated[
    Path | None,
    typer.Option("--embedder", help="A BERT's folder. Default: the one that made the database's keys."),
]
K = Annotated[int, typer.Option("-k", "--neighbours", min=1, help="Neighbours of a chunk.")]
Seed = Annotated[int, typer.Option(min=0, help="Settles everything that is drawn.")]


def open_database(path: Path, embedder: Path | None = None, index: str = "hnsw"):
    """Open a database for a command, with the embedder named on its line."""
    from retro_np.retrieval.bert import load_bert
    from retro_np.retrieval.database import Database

    return Database.open(path, load_bert(embedder) if embedder else None, index)


def finite(option: str, value: float) -> float:
    """The value of an option that may be no infinity and no NaN."""
    if not math.isfinite(value):
        raise UserError(f"{option} is a number, not {value}")
    return value


def print_results(results: dict) -> None:
    """The table of an evaluation."""
    table = Table("", "bits per byte", "against the first", "without leakage (α = 12.5 %)", title="held-out documents")
    first = None
    for name, figures in results["models"].items():
        first = first or figures["bpb"]
        change = f"{100 * (figures['bpb'] / first - 1):+.2f} %"
        filtered = figures["bpb_no_leakage"]
        table.add_row(name, f"{figures['bpb']:.4f}", change, "no chunk left" if filtered is None else f"{filtered:.4f}")
    console.print(table)
    console.print(results["sentence"])
