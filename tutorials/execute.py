"""Make the notebooks from their sources: python tutorials/execute.py [NAME …] runs them and writes the outputs.

A tutorial is edited in its .py (jupytext's percent format); the .ipynb beside it, which is what GitHub shows, is made
here. `--to FOLDER` writes them there, not executed, for nbmake.
"""

import argparse
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LIMIT = 240  # seconds a cell, on a machine that has other work too


def sources(names=()) -> list[Path]:
    """The tutorials' sources, in order: all, or those whose names begin so."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def notebook(source: Path):
    """A notebook of a source, without outputs. Its cells are numbered, so that the same source gives the same file."""
    made = jupytext.read(source)
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    return made


def executed(made):
    """The same notebook with outputs; what went to standard error, progress, is left out, and when cells ran."""
    NotebookClient(made, timeout=LIMIT, resources={"metadata": {"path": HERE}}, record_timing=False).execute()
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    made.metadata.pop("language_info", None)  # names the interpreter's version
    return made


def main() -> None:
    """Execute tutorials, or write them elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="tutorials, by the beginning of their names; none: all")
    parser.add_argument("--to", type=Path, help="write notebooks there, not executed")
    options = parser.parse_args()
    unknown = [name for name in options.names if not sources([name])]
    if unknown:
        parser.error(f"there is no tutorial {', '.join(unknown)}: give the beginning of a name, as 05")
    if options.to:
        options.to.mkdir(parents=True, exist_ok=True)
    for source in sources(options.names):
        made = notebook(source) if options.to else executed(notebook(source))
        nbformat.write(made, (options.to or HERE) / f"{source.stem}.ipynb")
        print(source.stem)


if __name__ == "__main__":
    main()
