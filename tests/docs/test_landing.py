"""The drawing of the whole and the landing essay. Ground truth: a fresh drawing, the records, and headless Chromium."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LANDING = ROOT / "docs/landing"
sys.path.insert(0, str(LANDING))

import drawing  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
DRAWINGS = ("retro.svg", "retro-1.svg", "retro-5.svg", "retro-6.svg")


def test_the_committed_drawings_are_those_that_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["drawing.py", "--to", str(tmp_path)])
    drawing.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(DRAWINGS)
    for name in DRAWINGS:
        assert (tmp_path / name).read_text() == (LANDING / name).read_text(), "python docs/landing/drawing.py"


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_accessible_and_says_where_the_reader_is(name):
    root = ElementTree.parse(LANDING / name).getroot()
    assert root.get("role") == "img"
    labels = [root.find(f"{SVG}{tag}") for tag in ("title", "desc")]
    assert root.get("aria-labelledby") == " ".join(label.get("id") for label in labels)
    assert all(label.text for label in labels)
    words = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    assert words.count("you are here") == (name != "retro.svg")
    for part in ("frozen BERT", "database", "neighbour encoder", "cross-attention to H1", "dE", "dH", "the next token"):
        assert part in words, part


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_letter_of_a_drawing_is_smaller_than_eleven_pixels_at_a_width_of_700(name):
    sizes = [float(size) for size in re.findall(r"font-size[:=]\"?([\d.]+)", (LANDING / name).read_text())]
    assert min(sizes) * 700 / drawing.WIDTH > 11
