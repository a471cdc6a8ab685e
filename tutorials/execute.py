"""Make the notebooks from their sources: python tutorials/execute.py [NAME …] runs them and writes the outputs.

A tutorial is edited in its .py (jupytext's percent format); the .ipynb beside it, which is what GitHub shows, is made
here. `--to FOLDER` writes them there, not executed, for nbmake. Once pyproject.toml names the repository, each notebook
has badges that open it in Colab and Binder.
"""

import argparse
import os
import re
import sys
import tomllib
from pathlib import Path

try:
    import jupytext
    import nbformat
    from nbclient import NotebookClient
except ModuleNotFoundError as error:
    sys.stderr.write(f'execute.py: {error.name} is missing; pip install -e ".[tutorials]"\n')
    sys.exit(2)

HERE = Path(__file__).parent
LIMIT = 240  # seconds a cell, on a machine that has other work too
BRANCH = "main"
BADGES = """[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{name}/blob/{branch}/tutorials/{file})
[![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/{name}/{branch}?labpath=tutorials%2F{file})
In Colab, first run `%pip install "retro-np[tutorials] @ git+{repository}"`."""


def sources(names=()) -> list[Path]:
    """The tutorials' sources, in order: all, or those whose names begin so."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def repository() -> str:
    """The repository's address in pyproject.toml; empty until it is filled in."""
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"].get("retro_np", {}).get("repository", "").strip().rstrip("/").removesuffix(".git")


def badges(address: str, file: str) -> str:
    """The lines that open a notebook in Colab and Binder. Raises ValueError if the address is not one of GitHub."""
    name = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    if not name:
        raise ValueError(f'repository = "{address}" in pyproject.toml: write "https://github.com/OWNER/NAME", or ""')
    return BADGES.format(name=name[1], branch=BRANCH, file=file, repository=address)


def notebook(source: Path, address: str | None = None):
    """A notebook of a source, without outputs. Its cells are numbered, so that the same source gives the same file.

    address: of the repository, that of pyproject.toml by default; with one, badges stand under the title."""
    made = jupytext.read(source)
    if address := repository() if address is None else address:
        title, _, rest = made.cells[0].source.partition("\n")
        made.cells[0]["source"] = f"{title}\n\n{badges(address, f'{source.stem}.ipynb')}\n{rest}"
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    return made


def executed(made):
    """The same notebook with outputs, without standard error (progress), the times of cells, and what checks return."""
    os.environ.pop("MPLBACKEND", None)  # Another backend than the notebook's would show no figures.
    NotebookClient(made, timeout=LIMIT, resources={"metadata": {"path": HERE}}, record_timing=False).execute()
    for cell in made.cells:
        if cell.cell_type == "code":
            kinds = {"execute_result"} if "check" in cell.metadata.get("tags", []) else set()
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o.output_type not in kinds]
    made.metadata.pop("language_info", None)  # names the interpreter's version
    return made


def main() -> None:
    """Execute tutorials, or write them elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="tutorials, by the beginning of their names; none: all")
    parser.add_argument("--to", help="write notebooks there, not executed")
    options = parser.parse_args()
    unknown = [name for name in options.names if not name or not sources([name])]
    if unknown:
        parser.error(f"there is no tutorial {', '.join(map(repr, unknown))}: give the beginning of a name, as 05")
    folder = HERE if options.to is None else Path(options.to)
    targets = {source: folder / f"{source.stem}.ipynb" for source in sources(options.names)}
    if options.to is not None:
        there = [path for path in (folder, *folder.parents) if path.is_file()] or [
            *filter(Path.exists, targets.values())
        ]
        if not options.to or there:
            parser.error(f"--to {options.to!r}: give an empty folder{f', since {there[0]} is there' if there else ''}")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        address = repository()
        made = {source: notebook(source, address) for source in targets}
    except ValueError as error:
        parser.error(str(error))
    for source, target in targets.items():
        nbformat.write(executed(made[source]) if options.to is None else made[source], target)
        print(source.stem)


if __name__ == "__main__":
    main()
