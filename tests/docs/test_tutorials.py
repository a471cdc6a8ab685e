"""Ground truth: what a run of a tutorial's source printed, and mistakes that its exercises' checks must notice.

RETRO_NP_NOTEBOOKS names a folder of freshly executed notebooks, which are tested in addition to the committed ones.
"""

import json
import os
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext") if not os.environ.get("CI") else __import__("jupytext")

TUTORIALS = Path(__file__).parents[2] / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))
FIGURE = re.compile(r"\*\*([^*\n]*\d[^*\n]*)\*\*")
EXERCISE = re.compile(r"\d+\.")  # a bold number that begins an exercise
FRESH = os.environ.get("RETRO_NP_NOTEBOOKS")
FOLDERS = [TUTORIALS, Path(FRESH)] if FRESH else [TUTORIALS]


def cells_of(path):
    return [cell for cell in jupytext.read(path).cells if cell.source.strip()]


def printed(cell):
    """What a cell of an executed notebook printed, with each run of white space replaced by one space."""
    outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]  # progress, which is not committed
    text = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)
    return re.sub(r"\s+", " ", text)


def printed_near(cells, index):
    """What was printed near a cell: by the last two printing cells before it, and by the next printing cell."""
    earlier, later = ([text for text in map(printed, part) if text] for part in (cells[:index], cells[index:]))
    return " … ".join(earlier[-2:] + later[:1])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_source(source):
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    assert [c.source for c in notebook.cells] == [c.source for c in jupytext.read(source).cells]
    assert [c.cell_type for c in notebook.cells] == [c.cell_type for c in jupytext.read(source).cells]


@pytest.mark.parametrize(
    "folder", [TUTORIALS] + ([Path(FRESH)] if FRESH else []), ids=["committed", "fresh"][: 1 + bool(FRESH)]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_figure_in_a_text_was_printed_by_a_nearby_cell(source, folder):
    cells = json.loads((folder / f"{source.stem}.ipynb").read_text())["cells"]
    missing = []
    for index, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            stated = [f for f in FIGURE.findall("".join(cell["source"])) if not EXERCISE.fullmatch(f)]
            output = printed_near(cells, index)
            missing += [figure for figure in stated if not has_figure(output, re.sub(r"\s+", " ", figure))]
    assert missing == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_line_of_prose_is_rendered_as_a_list_item_by_mistake(source):
    prose = [cell.source for cell in cells_of(source) if cell.cell_type == "markdown"]
    assert [line for text in prose for line in text.splitlines() if re.match(r"[+*] ", line)] == []


def has_figure(text, figure):
    """Whether a text contains a figure by itself, not as a part of another number."""
    return re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d)", text) is not None


def test_a_figure_is_not_found_inside_another_number():
    assert has_figure("it is 3.0, or 14", "3.0")
    assert not has_figure("13.0 3.05 3.0,5 1,3.0", "3.0")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_check_of_each_exercise_accepts_the_answer_and_fails_for_a_mistake(source, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(TUTORIALS)
    mistakes = iter(json.loads((TUTORIALS / "mistakes" / f"{source.stem[:2]}.json").read_text()))
    namespace, answer, checked = {"__name__": "__main__"}, None, 0
    for cell in cells_of(source):
        if cell.cell_type != "code":
            continue
        code = compile(cell.source, f"{source.name}: {cell.source[:40]!r}", "exec")
        exec(code, namespace)
        tags = cell.metadata.get("tags", [])
        if "answer" in tags:
            answer = cell.source
        if "check" in tags:
            entry, checked = next(mistakes), checked + 1
            for mistake in entry if isinstance(entry, list) else [entry]:
                assert answer.count(mistake["old"]) == 1, mistake
                exec(answer.replace(mistake["old"], mistake["new"]), namespace)
                with pytest.raises((AssertionError, ValueError, IndexError, TypeError)):
                    exec(code, namespace)
                exec(answer, namespace)
    assert checked >= 2
    assert next(mistakes, None) is None
