"""Samples next to what they retrieved, coloured by the runs of tokens in common, as in the paper's tables 6 and 7."""

import codecs
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retro_np.errors import UserError
from retro_np.files import remove_partial, write_atomically
from retro_np.generation import Retrieved
from retro_np.kernels.substring import common_prefix_lengths
from retro_np.progress import one_line, visible
from retro_np.retrieval.database import Database
from retro_np.retrieval.rows import without_surrogates
from retro_np.retrieval.tokenizer import encode, token_texts
from retro_np.retrieval.vocabulary import vocabulary

if TYPE_CHECKING:
    from retro_np.pretrained.decoder import Pretrained

MAX_SHOWN_RUN_TOKENS = 5  # longer runs have the same colour
# The colours of runs of 0, 1, … 5 tokens: one hue, lighter to darker, so that lightness alone tells them apart.
BACKGROUNDS = ("", "#f1e7c8", "#f3cf86", "#f0ab57", "#d97b3a", "#9c4a1f")
FOREGROUNDS = ("", "#1a1a1a", "#1a1a1a", "#1a1a1a", "#1a1a1a", "#ffffff")
# How our pages start: with the generator or, up to version 0.2, as one of the two templates did.
OUR_PAGE = re.compile(
    rb'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="(generator" content="retro_np"'
    rb"|viewport.*(--line: #8884; --soft: #8882;|'unsafe-inline'; script-src 'sha256-))", re.DOTALL,
)  # fmt: skip


@dataclass(frozen=True)
class Token:
    """A token as shown. `inspect` fills in on, off and reads."""

    text: str
    run: int  # tokens in the shared run that ends here, at most MAX_SHOWN_RUN_TOKENS
    prompt: bool = False
    on: float | None = None  # nats with retrieval; None where the token is not predicted
    off: float | None = None  # nats without retrieval
    reads: list[int] = field(default_factory=list)  # attention weights of the k · 2m retrieved tokens


@dataclass(frozen=True)
class Value:
    """A retrieved value [N, F], its document, and its squared distance from the chunk that retrieved it."""

    document: str
    distance: float
    neighbour: list[Token]
    continuation: list[Token]


@dataclass(frozen=True)
class Chunk:
    """A chunk, numbered from 0, and the values that it retrieved for the next one. `inspect` fills in the figures."""

    number: int
    tokens: list[Token]
    values: list[Value]
    bits_on: float | None = None  # bits per byte with retrieval; None where no token was scored
    bits_off: float | None = None
    leakage: float | None = None  # r(C) of a complete chunk


def prompt_tokens(database: Database, text: str, model: "Pretrained | None" = None) -> list[int]:
    """The tokens of a prompt that a user typed. What another's tokenizer puts before a text, such as <s>, is included.

    An empty text becomes end-of-text, which precedes a document, or what another's model has for this. Raises UserError
    if it has nothing."""
    probe = database.tokenizer.encode("x")
    marks = itertools.takewhile(lambda pair: pair[1], zip(probe.ids, probe.special_tokens_mask, strict=True))
    tokens = [*(token for token, _ in marks), *encode(database.tokenizer, without_surrogates(text))]
    start = database.end_of_text if model is None or model.start is None else model.start
    if not tokens and model is not None and start >= model.config.vocabulary_size:
        raise UserError(f"{model.name} has no token that begins or ends a text: give a prompt")
    return tokens or [start]


def token_printer(database: Database, prompt: str = "") -> Callable[[int], None]:
    """A function that prints one token after another to standard output; a character once it has all its tokens.

    prompt: printed before the first token, and so only if there is one."""
    waiting = [prompt]
    pieces, decoder = vocabulary(database.tokenizer).pieces, codecs.getincrementaldecoder("utf-8")("replace")

    def show(token: int) -> None:
        text = decoder.decode(pieces[token] if token < len(pieces) else b"")
        print_text(waiting.pop() + text if waiting else text)

    return show


def print_text(text: str) -> None:
    """Write a text to standard output at once, as it is except for invisible characters."""
    try:
        print(visible(text), end="", flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def show_chunks(
    prompt: Sequence[int] | np.ndarray, sample: Sequence[int] | np.ndarray, retrieved: list[Retrieved],
    database: Database, figures: Sequence[Sequence[Any]] = (),
) -> list[Chunk]:  # fmt: skip
    """Cut a prompt and its sample into chunks, and find the runs that they share with what was retrieved.

    figures: the fields on, off and reads of each token of the prompt and the sample, if they are known.
    A token of chunk u + 1 gets the length of the longest run that ends at it and is part of a value retrieved by chunk
    u. A token of a value gets the length of the longest such run in chunk u + 1. Missing neighbours are left out."""
    m, n_prompt = database.chunk_size, len(prompt)
    tokens = np.concatenate([prompt, sample]).astype(np.int64)
    runs, values = np.zeros(len(tokens), np.int64), {}
    for item in retrieved:
        reader = slice((item.chunk + 1) * m, (item.chunk + 2) * m)
        runs[reader] = common_prefix_lengths(tokens[reader], item.values, database.padding)
        rows = zip(item.ids, item.distances, item.values, strict=True)
        values[item.chunk] = [_value(database, *row, tokens[reader]) for row in rows if row[0] >= 0]
    shown_tokens = _tokens(database, tokens, runs, True, n_prompt, figures)
    return [Chunk(u, shown_tokens[i : i + m], values.get(u, [])) for u, i in enumerate(range(0, len(tokens), m))]


def _value(database, chunk_id, distance, value, reader):
    m = database.chunk_size
    runs = common_prefix_lengths(value, reader[None], database.padding) if len(reader) else np.zeros(2 * m, np.int64)
    shown_tokens = _tokens(database, value, runs, database.begins(chunk_id))
    document = database.documents[int(database.document_of(chunk_id))]["name"]
    return Value(document, float(distance), shown_tokens[:m], shown_tokens[m:])


def _tokens(database, tokens, runs, begins, n_prompt=0, figures=()):
    texts, runs = token_texts(database.tokenizer, tokens, begins), np.minimum(runs, MAX_SHOWN_RUN_TOKENS).tolist()
    prompt = [t < n_prompt for t in range(len(tokens))]
    return [Token(*fields) for fields in zip(texts, runs, prompt, *figures, strict=True)]


def print_sample(console: Console, chunks: list[Chunk], off: Sequence[Chunk] = ()) -> None:
    """Print a table of the chunks, each next to the values that it retrieved for the next chunk.

    off: the chunks of a sample of the same prompt with retrieval off, shown beside the others."""
    table = Table(show_lines=True, expand=True)
    table.add_column("chunk", width=5)
    table.add_column("text (prompt dim), coloured by the run shared with what the previous chunk retrieved", ratio=1)
    if off:
        table.add_column("with retrieval off, from the same seed", ratio=1)
    table.add_column("retrieved at the chunk's end: N | F, coloured by the run shared with the next chunk", ratio=1)
    columns = (chunks, off) if off else (chunks,)
    for number, row in enumerate(itertools.zip_longest(*columns)):
        values = Text()
        for value in row[0].values if row[0] else ():
            heading = f"{one_line(value.document)} (squared distance {value.distance:.3f})\n", "italic"
            texts = _styled(value.neighbour), (" | ", "bold"), _styled(value.continuation)
            values.append_text(Text.assemble(heading, *texts, "\n"))
        table.add_row(str(number), *(_styled(chunk.tokens if chunk else ()) for chunk in row), values)
    console.print(table)
    runs = {run: f" {run} " for run in range(MAX_SHOWN_RUN_TOKENS)} | {MAX_SHOWN_RUN_TOKENS: " ≥ 5 "}
    console.print(Text.assemble("tokens in common: ", *((text, _style(run)) for run, text in runs.items())))


def _styled(tokens):  # A Text would drop some control characters, which are therefore made visible.
    styles = [_style(token.run) or ("dim" if token.prompt else "") for token in tokens]
    return Text.assemble(*((visible(token.text), style) for token, style in zip(tokens, styles, strict=True)))


def _style(run):
    return f"{FOREGROUNDS[run]} on {BACKGROUNDS[run]}" if run else ""


def write_page(path: Path | str, title: str, samples: list[dict[str, Any]], facts: dict[str, str]) -> None:
    """Write samples as one self-contained HTML page.

    samples: dicts with "heading" and "chunks". facts: name → text, listed at the top. All text is escaped."""
    write_template(path, "samples.html", title=title, samples=samples, facts=facts)


def is_page(start: bytes) -> bool:
    """Whether a file with these first bytes is a page that this package wrote. See `check_output`."""
    return OUR_PAGE.match(start) is not None


def write_template(path: Path | str, template: str, **context: Any) -> None:
    """Render a template of this folder as one page. All text is escaped, and its invisible characters are visible."""
    from jinja2 import Environment  # only a page needs it

    def finalize(value):
        return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=finalize)
    source = files("retro_np.report").joinpath(template).read_text(encoding="utf-8")
    colours = list(zip(range(MAX_SHOWN_RUN_TOKENS + 1), BACKGROUNDS, FOREGROUNDS, strict=True))
    page = environment.from_string(source).render(colours=colours, longest=MAX_SHOWN_RUN_TOKENS, **context)
    remove_partial(Path(path).parent, prefix=Path(path).name)  # left by a killed process
    write_atomically(path, page.encode())
