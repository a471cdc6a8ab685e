"""Samples next to what they retrieved, coloured by the runs of tokens in common, as in the paper's tables 6 and 7."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retro_np.config import RetroConfig
from retro_np.generation import generate
from retro_np.progress import one_line, visible
from retro_np.report.shown import BACKGROUNDS, FOREGROUNDS, MAX_SHOWN_RUN_TOKENS, Chunk, show_chunks, write_template
from retro_np.retrieval.database import Database
from retro_np.retrieval.rows import LONE_SURROGATE
from retro_np.retrieval.tokenizer import END_OF_TEXT, encode
from retro_np.sequences import check_fit
from retro_np.tree import Tree


def sample_chunks(
    params: Tree, config: RetroConfig, database: Database, prompt: str, length: int, k: int, **settings: Any
) -> list[Chunk]:
    """Continue a text prompt; cut the result into coloured chunks. k = 0: no retrieval. settings: as in `generate`."""
    check_fit(config, database)
    tokens = prompt_tokens(database, prompt)
    settings |= {"database": database, "k": k, "stop_token": END_OF_TEXT}
    return show_chunks(tokens, *generate(params, config, tokens, length, **settings), database)


def prompt_tokens(database: Database, text: str) -> list[int]:
    """The tokens of a text that a user typed. An empty text becomes end-of-text, which precedes a document."""
    return encode(database.tokenizer, LONE_SURROGATE.sub("\ufffd", text)) or [END_OF_TEXT]


def print_sample(console: Console, chunks: list[Chunk]) -> None:
    """Print a table of the chunks, each next to the values that it retrieved for the next chunk."""
    table = Table(show_lines=True, expand=True)
    table.add_column("chunk", width=5)
    table.add_column("text (prompt dim), coloured by the run shared with what the previous chunk retrieved", ratio=1)
    table.add_column("retrieved at the chunk's end: N | F, coloured by the run shared with the next chunk", ratio=1)
    for chunk in chunks:
        values = Text()
        for value in chunk.values:
            values.append(f"{one_line(value.document)} (squared distance {value.distance:.3f})\n", style="italic")
            values.append_text(_styled(value.neighbour))
            values.append(" | ", style="bold")
            values.append_text(_styled(value.continuation))
            values.append("\n")
        table.add_row(str(chunk.number), _styled(chunk.tokens), values)
    console.print(table)
    legend = Text("tokens in common: ")
    for run in range(MAX_SHOWN_RUN_TOKENS + 1):
        legend.append(f" {run if run < MAX_SHOWN_RUN_TOKENS else '≥ 5'} ", style=_style(run))
    console.print(legend)


def _styled(tokens):
    text = Text()  # which would drop some control characters
    for token in tokens:
        text.append(visible(token.text), style=_style(token.run) or ("dim" if token.prompt else ""))
    return text


def _style(run):
    return f"{FOREGROUNDS[run]} on {BACKGROUNDS[run]}" if run else ""


def write_page(path: Path | str, title: str, samples: list[dict[str, Any]], facts: dict[str, str]) -> None:
    """Write samples as one self-contained HTML page.
    samples: dicts with "heading" and "chunks". facts: name → text, listed at the top. All text is escaped."""
    write_template(path, "samples.html", title=title, samples=samples, facts=facts)
