"""Samples beside what they retrieved, tokens coloured by longest common prefix, as in the paper's tables 6 and 7."""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retro_np.files import write_atomically
from retro_np.generation import Retrieved, generate
from retro_np.kernels.substring import common_prefix_lengths
from retro_np.retrieval.corpus import LONE_SURROGATE
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import END_OF_TEXT, encode, token_texts
from retro_np.sequences import check_fit

LONGEST = 5  # runs of five tokens and more have one colour
# background of 0, 1, … ≥ 5 tokens in common: one hue, lighter to darker, so that lightness alone tells them apart
BACKGROUNDS = ("", "#f1e7c8", "#f3cf86", "#f0ab57", "#d97b3a", "#9c4a1f")
FOREGROUNDS = ("", "#1a1a1a", "#1a1a1a", "#1a1a1a", "#1a1a1a", "#ffffff")


@dataclass(frozen=True)
class Piece:
    """One token as shown: its text, and the length, 0 … 5, of the common run that it ends."""

    text: str
    run: int
    prompt: bool = False


@dataclass(frozen=True)
class ShownNeighbour:
    """A retrieved value: where it is from, and its [N, F], coloured by what it shares with the next chunk."""

    document: str
    distance: float
    neighbour: list[Piece]
    continuation: list[Piece]


@dataclass(frozen=True)
class ShownChunk:
    """A chunk of the sequence, and what it retrieved for the chunk after it."""

    number: int
    pieces: list[Piece]
    neighbours: list[ShownNeighbour]


def sample_chunks(params, config, database: Database, prompt: str, length: int, k: int, **settings) -> list[ShownChunk]:
    """Sample from a text prompt and cut the result into coloured chunks. k = 0: retrieval off; settings: `generate`'s.

    An empty prompt begins a document: its one token is end-of-text.
    """
    check_fit(config, database)
    tokens = prompt_tokens(database, prompt)
    source = database if k else None
    sample, retrieved = generate(
        params, config, tokens, length, database=source, k=k, stop_token=END_OF_TEXT, **settings
    )
    return show_chunks(tokens, sample, retrieved, database)


def prompt_tokens(database: Database, text: str) -> list[int]:
    """The tokens of a text that somebody typed; of an empty one end-of-text, as before a document."""
    return encode(database.tokenizer, LONE_SURROGATE.sub("\ufffd", text)) or [END_OF_TEXT]


def show_chunks(prompt, sample, retrieved: list[Retrieved], database: Database) -> list[ShownChunk]:
    """Cut a prompt and its sample into chunks and colour them.

    A token of chunk u + 1 is coloured by the longest run of tokens, ending at it, that stands in a value retrieved by
    chunk u; a value's tokens by the longest run ending there that stands in chunk u + 1.
    """
    m = database.chunk_size
    tokens = np.concatenate([prompt, sample]).astype(np.int64)
    found = {item.chunk: item for item in retrieved}
    shown = []
    for number in range(-(-len(tokens) // m)):
        chunk = tokens[number * m : (number + 1) * m]
        following = tokens[(number + 1) * m : (number + 2) * m]
        before = found.get(number - 1)
        runs = common_prefix_lengths(chunk, before.values) if before else np.zeros(len(chunk), np.int64)
        is_prompt = number * m + np.arange(len(chunk)) < len(prompt)
        neighbours = []
        if number in found:
            item = found[number]
            for chunk_id, distance, value in zip(item.ids, item.distances, item.values, strict=True):
                if chunk_id >= 0:
                    neighbours.append(_shown_neighbour(database, chunk_id, distance, value, following))
        shown.append(ShownChunk(number, _pieces(database, chunk, runs, is_prompt), neighbours))
    return shown


def _shown_neighbour(database, chunk_id, distance, value, following):
    m = database.chunk_size
    runs = common_prefix_lengths(value, following[None]) if len(following) else np.zeros(len(value), np.int64)
    name = database.documents[int(database.document_of(chunk_id))]["name"]
    parts = [_pieces(database, value[part], runs[part]) for part in (slice(m), slice(m, None))]
    return ShownNeighbour(name, float(distance), *parts)


def _pieces(database, tokens, runs, prompt=None):
    prompt = np.zeros(len(tokens), bool) if prompt is None else prompt
    texts = token_texts(database.tokenizer, tokens)
    return [
        Piece(text, min(int(run), LONGEST), bool(given))
        for text, run, given in zip(texts, runs, prompt, strict=True)
        if text
    ]


def print_sample(console: Console, chunks: list[ShownChunk]) -> None:
    """A table in the terminal: each chunk, and beside it the values that it retrieved for the next."""
    table = Table(show_lines=True, expand=True)
    table.add_column("chunk", width=5)
    table.add_column("text (prompt dim), coloured by the run shared with what the chunk before it retrieved", ratio=1)
    table.add_column("retrieved at its end: N | F, coloured by the run shared with the next chunk", ratio=1)
    for chunk in chunks:
        beside = Text()
        for neighbour in chunk.neighbours:
            beside.append(f"{neighbour.document} (squared distance {neighbour.distance:.3f})\n", style="italic")
            beside.append_text(_styled(neighbour.neighbour))
            beside.append(" | ", style="bold")
            beside.append_text(_styled(neighbour.continuation))
            beside.append("\n")
        table.add_row(str(chunk.number), _styled(chunk.pieces), beside)
    console.print(table)
    legend = Text("tokens in common: ")
    for run in range(LONGEST + 1):
        legend.append(f" {run if run < LONGEST else '≥ 5'} ", style=_style(run))
    console.print(legend)


def _styled(pieces):
    text = Text()
    for piece in pieces:
        text.append(piece.text, style=_style(piece.run) or ("dim" if piece.prompt else ""))
    return text


def _style(run):
    return f"{FOREGROUNDS[run]} on {BACKGROUNDS[run]}" if run else ""


def write_page(path, title: str, samples: list[dict], facts: dict[str, str]) -> None:
    """One self-contained HTML page. samples: {"heading", "chunks"} each; facts: lines above them. Text is escaped."""
    template = files("retro_np.report").joinpath("samples.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    colours = list(zip(range(LONGEST + 1), BACKGROUNDS, FOREGROUNDS, strict=True))
    rendered = page.render(title=title, samples=samples, facts=facts, colours=colours, longest=LONGEST)
    write_atomically(path, rendered.encode())
