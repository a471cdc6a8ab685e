"""The pages in Markdown. Ground truth: the files that they name, the package's modules, and a run of an example."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retro_np

ROOT = Path(__file__).parents[2]
PACKAGE = Path(retro_np.__file__).parent  # the package may be installed elsewhere
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "tutorials/*.md", "csrc/*.md", "retro_np/pretrained/*/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names old paths
)
NAMED = re.compile(r"`((?:retro_np|csrc|tests|docs|benchmarks|tutorials|\.ci|\.github)/[^`\s]*)`")
LINKED = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")
MAP = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


def in_source_tree(path: str) -> Path:
    return PACKAGE.parent / path if path.startswith("retro_np/") else ROOT / path


def named_files(page: Path) -> list[Path]:
    text = page.read_text(encoding="utf-8")
    linked = [(page.parent / path).resolve().relative_to(ROOT) for path in LINKED.findall(text)]
    return [in_source_tree(str(path)) for path in [*NAMED.findall(text), *linked]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page):
    assert [str(path) for path in named_files(page) if not any(path.parent.glob(path.name))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_line_is_left_out_of_the_book_as_a_comment(page):
    assert [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("%")] == []


def test_the_pages_name_many_files():
    assert len({path for page in PAGES for path in named_files(page)}) > 100


def test_every_module_that_implements_the_paper_is_in_the_map():
    folders = ("nn", "retrieval", "training", "evaluation")
    modules = [path.relative_to(PACKAGE).as_posix() for f in folders for path in (PACKAGE / f).glob("[a-z]*.py")]
    # These modules serve the other modules and belong to no section of the paper.
    helpers = {"nn/checks.py", "nn/scope.py", "retrieval/sharded.py", "retrieval/documents.py", "retrieval/manifest.py"}
    assert sorted(m for m in modules if f"`retro_np/{m}`" not in MAP and m not in helpers) == []


def test_every_new_import_path_of_the_changelog_exists():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in changelog.splitlines() if line.startswith("| `retro_np.")]
    assert len(rows) > 10
    for old, new in rows:
        modules, names = re.findall(r"`(retro_np[\w.]*)`", new), re.findall(r"`(\w+)`", new.partition("`:")[2] or old)
        for module in filter(lambda name: name != "retro_np", modules):
            contents = vars(importlib.import_module(module))
            assert [name for name in names if name not in {*contents, "retro_np"}] == [], new


@pytest.mark.slow
def test_the_example_of_the_database_page_runs_on_the_demos_database(tmp_path):
    page = (ROOT / "docs" / "database.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    demo = "from retro_np.cli import main; import sys; sys.argv = ['retro-np', 'demo', '--minutes', '0.5']; main()"
    for code in (demo, example):
        completed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip()
