"""The drawing of the whole. Ground truth: a fresh drawing, and WCAG 2's bounds."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from contrast import contrast

LANDING = Path(__file__).parents[2] / "docs/landing"
SVG = "{http://www.w3.org/2000/svg}"
DRAWINGS = ("retro.svg", "retro-1.svg", "retro-5.svg", "retro-6.svg")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of a fresh drawing."""
    folder = tmp_path_factory.mktemp("drawing")
    subprocess.run([sys.executable, LANDING / "drawing.py", "--to", folder], check=True)
    return folder


def test_the_committed_drawings_are_those_that_the_script_draws(drawn):
    assert sorted(path.name for path in drawn.iterdir()) == sorted(DRAWINGS)
    for name in DRAWINGS:
        assert (drawn / name).read_text() == (LANDING / name).read_text(), "python docs/landing/drawing.py"


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
    content = (LANDING / name).read_text()
    width = float(re.search(r'viewBox="0 0 (\d+)', content)[1])
    assert min(map(float, re.findall(r"font-size:([\d.]+)px", content))) * 700 / width > 11


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "ground"),
    [*((ink, ground) for ink in ("ink", "soft") for ground in ("paper", "decoder", "encoder", "stored")),
     *((ink, "paper") for ink in ("asks", "back", "here", "leak")), ("on", "asks"), ("on-found", "found")],
)  # fmt: skip
def test_words_in_a_drawing_have_readable_contrast(theme, ink, ground):
    style = ElementTree.parse(LANDING / "retro.svg").getroot().find(f"{SVG}style").text
    rule = re.search(rf"data-theme={theme}\],\.{theme}\) \.retro{{([^}}]*)}}", style)[1]
    colours = dict(pair.split(":") for pair in rule.split(";"))
    assert contrast(colours[f"--c-{ink}"], colours[f"--c-{ground}"]) >= 4.5
