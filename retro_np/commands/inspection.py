"""`retro-np inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from retro_np.commands.shared import CheckpointPath, DatabasePath, EmbedderPath, K, Seed, console, open_database
from retro_np.errors import UserError


def inspect(
    checkpoint: CheckpointPath,
    db: DatabasePath,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to inspect.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page.")] = Path("inspect.html"),
    file: Annotated[Path | None, typer.Option(help="A file with the text, instead of TEXT.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Inspect a sample that goes on from this instead.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens to sample after --prompt.")] = 128,
    k: K = 2,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Seed = 0,
    embedder: EmbedderPath = None,
) -> None:
    """A page on a text, or on a sample: what each chunk retrieved, what each token gained by it, and what it read.

    One HTML file that needs no network. Of a long text its beginning is shown, and the page says so.
    """
    from retro_np.checkpoint import load_model
    from retro_np.files import check_output
    from retro_np.generation import generate
    from retro_np.report.inspection import MOST_TOKENS, check_request, write_inspection
    from retro_np.report.inspection import inspect as inspected
    from retro_np.report.samples import prompt_tokens
    from retro_np.retrieval.tokenizer import END_OF_TEXT

    if sum(given is not None for given in (text, file, prompt)) != 1:
        raise UserError("inspect takes one of TEXT, --file PATH and --prompt TEXT")
    place = check_output(out, "-o", [checkpoint, db, *([file] if file else [])])
    database = open_database(db, embedder)
    params, config = load_model(checkpoint, database)
    if file is not None:
        text = read_text(file)
    tokens = prompt_tokens(database, prompt if text is None else text)
    n_prompt, retrieved = 0, []
    if prompt is not None:
        n_prompt = len(tokens)
        if n_prompt >= MOST_TOKENS:
            raise UserError(f"the prompt has {n_prompt:,} tokens, and a page shows {MOST_TOKENS:,} in all: cut it")
    shown = min(len(tokens) + (length if prompt is not None else 0), MOST_TOKENS)
    check_request(config, shown, k)
    k = min(k, database.n_chunks)
    facts = {"checkpoint": str(checkpoint), "database": str(database.path), "neighbours": str(k)}
    if prompt is not None:
        settings = {"temperature": temperature, "top_p": top_p, "seed": seed}
        sample, retrieved = generate(
            params, config, tokens, length, database=database, k=k, stop_token=END_OF_TEXT, **settings
        )  # fmt: skip
        tokens = [*tokens, *sample]
        facts |= {name: str(value) for name, value in settings.items()} | {"in italics": "the prompt"}
    if len(tokens) > MOST_TOKENS:
        facts["shown"] = f"the first {MOST_TOKENS:,} of {len(tokens):,} tokens"
        console.print(f"The page shows {facts['shown']}.")
    found = inspected(
        params, config, database, tokens[:MOST_TOKENS], k=k, n_prompt=n_prompt, retrieved=retrieved
    )  # fmt: skip
    write_inspection(place, "A text under RETRO" if prompt is None else "A sample of RETRO", facts, found)
    console.print(f"{found.bits_on:.4f} bits per byte with retrieval, {found.bits_off:.4f} without. The page is {out}.")


def read_text(path: Path) -> str:
    """A file's text; bytes that are not UTF-8 are replaced. Raises UserError where there is no such file."""
    if not path.is_file():
        what = f"{path} is no file" if path.exists() else f"there is no file {path}"
        raise UserError(f"{what}: name one with --file, or give the text itself")
    return path.read_bytes().decode("utf-8", "replace")
