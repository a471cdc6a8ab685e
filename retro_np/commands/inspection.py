"""`retro-np inspect`."""

import os
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from retro_np.commands import options
from retro_np.commands.options import console, open_database
from retro_np.errors import UserError


def inspect(
    checkpoint: options.CheckpointPath, db: options.DatabasePath,
    text: Annotated[str | None, Argument(metavar="TEXT", help="The text to inspect.")] = None,
    out: Annotated[Path, Option("-o", "--out", help="The HTML page.")] = Path("inspect.html"),
    file: Annotated[Path | None, Option(help="Inspect the text of this file.")] = None,
    prompt: Annotated[str | None, Option(help="Inspect a sample that continues this prompt.")] = None,
    length: Annotated[int, Option(min=1, help="Tokens to sample after --prompt.")] = 128,
    k: options.K = 2, temperature: options.Temperature = 0.8, top_p: options.TopP = 0.95, seed: options.Seed = 0,
    embedder: options.EmbedderSpec = None,
) -> None:  # fmt: skip
    """Write a page about a text or a sample and what it retrieved.

    The page shows what each chunk retrieved, how much retrieval saves on each token, and which retrieved tokens the
    model attended to. It is one HTML file that needs no network. If the text is long, only its beginning is shown.

    Example: `retro-np inspect runs/retro/checkpoint.safetensors runs/db --file notes.txt`"""
    from retro_np.checkpoint import load_model
    from retro_np.files import check_output
    from retro_np.generation import generate
    from retro_np.report.inspection import MAX_PAGE_TOKENS, check_request, write_inspection
    from retro_np.report.inspection import inspect as inspect_tokens
    from retro_np.report.samples import is_page, prompt_tokens
    from retro_np.retrieval.tokenizer import END_OF_TEXT

    inputs = [source for source in (text, file, prompt) if source is not None]
    if len(inputs) != 1:
        raise UserError("inspect takes exactly one of TEXT, --file PATH and --prompt TEXT")
    page = check_output(out, "-o", [checkpoint, db, *([file] if file else [])], is_page)
    database = open_database(db, embedder)
    model = load_model(checkpoint, database)
    tokens = prompt_tokens(database, read_text(inputs[0]) if isinstance(inputs[0], Path) else inputs[0])
    n_prompt = 0 if prompt is None else len(tokens)
    retrieved: list[Any] = []
    if n_prompt >= MAX_PAGE_TOKENS:
        raise UserError(f"the prompt has {n_prompt:,} tokens, but a page shows at most {MAX_PAGE_TOKENS:,}; shorten it")
    check_request(model[1], min(len(tokens) + (0 if prompt is None else length), MAX_PAGE_TOKENS), k)
    k = min(k, database.n_chunks)
    facts = {"checkpoint": str(checkpoint), "database": str(database.path), "neighbours": str(k)}
    if prompt is not None:
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        sample, retrieved = generate(*model, tokens, length, database=database, k=k, stop_token=END_OF_TEXT, **settings)
        tokens = [*tokens, *sample]
        facts |= {name: str(value) for name, value in settings.items()} | {"in italics": "the prompt"}
    if len(tokens) > MAX_PAGE_TOKENS:
        facts["shown"] = f"the first {MAX_PAGE_TOKENS:,} of {len(tokens):,} tokens"
        console.print(f"The page shows {facts['shown']}.")
    shown = tokens[:MAX_PAGE_TOKENS]
    inspection = inspect_tokens(*model, database, shown, k=k, n_prompt=n_prompt, retrieved=retrieved)
    write_inspection(page, "A text under RETRO" if prompt is None else "A sample of RETRO", facts, inspection)
    console.print(f"{inspection.bits_on:.4f} bits per byte with retrieval, {inspection.bits_off:.4f} without.")
    console.print(f"The page is {out}.")


def read_text(path: Path) -> str:
    """A file's text without a byte order mark; invalid UTF-8 is replaced. Raises UserError if it is not a text file."""
    from retro_np.retrieval.sources import NOT_TEXT, file_document, kind_of

    if not os.path.isfile(path):
        problem = f"{path} is not a file" if os.path.exists(path) else f"there is no file {path}"
        raise UserError(f"{problem}; name one with --file, or give the text itself")
    document = file_document(str(path), path.name, "")
    if kind_of(str(path)) != "text" or "\0" in document.text:
        raise UserError(f"{path} {NOT_TEXT}")
    if document.replaced:
        console.print(f"{document.replaced:,} invalid UTF-8 sequences were replaced by U+FFFD")
    return document.text.removeprefix("\ufeff")
