"""A stranger's text changes only the text of a page. Ground truth: an HTML parser, and a page of harmless text."""

import re
import tempfile
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retro_np.progress import visible
from retro_np.report.inspection import Inspection, write_inspection
from retro_np.report.plots import new_plot
from retro_np.report.samples import Chunk, Token, Value, is_page, write_page

HOSTILE = (
    "</script><script>alert(1)</script>", "<!--", "-->", "<b onclick='x'>", "]]>", "</span></div>", "'",
    "&lt;", '" onload="x', "&#27;", "{{ 7 * 7 }}", "{% raw %}", "</title>", "</style>", "<base href=//x>",
    "javascript:alert(1)",
    "\x1b[2J", "\u202e", "\u2066", "\udcff", "\x00", "\x85", "\x9b", "\r", "\x0c", "\u2028", "\ufeff", "\U000e0041",
    "\n",
)  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=6)), min_size=1, max_size=5).map("".join)
# The first lines of a page of version 0.2
OLD_HEAD = (
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
)


class Page(HTMLParser):
    """The tags with their attributes, the text outside scripts and styles, and what scripts and styles contain."""

    def __init__(self, page: str):
        super().__init__()
        self.structure, self.code, self.text, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.structure.append((tag, attrs))
        self.open = [tag]

    def handle_endtag(self, tag):
        self.structure.append(tag)
        self.open = []

    def handle_data(self, data):
        (self.code if self.open in (["script"], ["style"]) else self.text).append(data)

    def handle_comment(self, data):
        self.structure.append(("comment", data))

    def handle_decl(self, decl):
        self.structure.append(("declaration", decl))

    def handle_pi(self, data):
        self.structure.append(("instruction", data))


def pages(text: str) -> dict[str, bytes]:
    """Both pages, with a text in each token, name, fact, heading and title that they show."""
    tokens = [Token(text, 0, prompt=True), Token(text, 3, on=1.0, off=2.0), Token(text, 0, on=1.0, off=0.5)]
    chunks = [Chunk(u, tokens, [Value(text, 0.5, tokens, tokens)], 1.0, 2.0, 0.1) for u in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        sample, inspection = Path(folder, "samples.html"), Path(folder, "inspect.html")
        write_page(sample, text, [{"heading": text, "chunks": chunks}], {text: text})
        write_inspection(inspection, text, {text: text}, Inspection(chunks, 1.0, 2.0))
        return {path.name: path.read_bytes() for path in (sample, inspection)}


HARMLESS = {name: Page(page.decode()) for name, page in pages("harmless").items()}


@given(texts)
@example("".join(HOSTILE))
@settings(deadline=None, max_examples=20)
def test_a_hostile_text_changes_nothing_but_the_text_of_a_page(text):
    for name, data in pages(text).items():
        page = Page(data.decode())
        assert page.structure == HARMLESS[name].structure
        assert page.code == HARMLESS[name].code
        assert "".join(page.text) == "".join(HARMLESS[name].text).replace("harmless", visible(text))


@given(texts)
@example("".join(HOSTILE))
@settings(deadline=None, max_examples=20)
def test_a_page_contains_no_control_character_and_no_bidirectional_override(text):
    for data in pages(text).values():
        characters = set(data.decode()) - {"\n", "\t"}
        assert not [c for c in characters if unicodedata.category(c) in ("Cc", "Zl", "Zp")]
        assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]", data.decode())


@pytest.mark.parametrize("name", ["samples.html", "inspect.html"])
def test_a_page_loads_nothing_and_runs_only_its_own_script(name):
    metas = [dict(attrs) for tag, *rest in HARMLESS[name].structure if tag == "meta" for attrs in rest]
    (policy,) = (meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert policy.count("script-src 'sha256-") == (name == "inspect.html")


def test_our_pages_are_recognised():
    assert [is_page(data[:4096]) for data in pages("text").values()] == [True, True]
    sample = (
        b"<title>A sample and what it retrieved</title>\n<style>\n  :root { color-scheme: light dark; --line: #8884;"
    )
    policy = (
        b"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script"
    )
    assert is_page(OLD_HEAD + sample + b" --soft: #8882; }\n")
    assert is_page(OLD_HEAD + policy + b"-src 'sha256-abc'\">\n<title>A text under RETRO</title>\n")


@pytest.mark.parametrize(
    "data",
    [
        b"notes\n", b"<!doctype html>\n<title>mine</title>", OLD_HEAD + b"<title>mine</title>\n<style>\n  body {}",
        b"about <meta name=\"generator\" content=\"retro_np\">", b"<!DOCTYPE html>\n" + OLD_HEAD,
    ],
)  # fmt: skip
def test_other_files_are_not_taken_for_our_pages(data):
    assert not is_page(data)


def test_a_plot_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    with new_plot(path, "x"):
        pass
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(file, **options):
        file.write(b"half")
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"), new_plot(path, "x") as axes:
        monkeypatch.setattr(axes.figure, "savefig", fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plot.png"]
    assert path.read_bytes() == before
