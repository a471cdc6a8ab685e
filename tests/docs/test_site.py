"""The book. Ground truth: the files that it is built from, sites with planted faults, and a browser without a network.

RETRO_NP_SITE names a book that was built before; otherwise it is built here."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browsers import chromium

import retro_np

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "site"
NOTEBOOKS = sorted(ROOT.glob("tutorials/[0-9][0-9]_*.ipynb"))
LISTED = ROOT / "docs" / "references.md"
PAGES = sorted({*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")} - {LISTED})
REFERENCES = LISTED.read_text(encoding="utf-8")
PAPER = re.compile(r"https?://(?:arxiv\.org|aclanthology\.org|doi\.org)/[\w./()-]*\w")
# "Dai et al. 2019", "Zhang & Sennrich (2019)", "Shazeer 2020"
CITED = re.compile(r"([A-ZÀ-Þ][\w’'-]+(?: & [A-ZÀ-Þ][\w’'-]+| et al\.)),? \(?((?:19|20)\d\d)")
OPENED = (
    "index.html", "book.html", "tutorials/00_a_language_model.html", "tutorials/05_chunked_cross_attention.html",
    "tutorials/07_train_one.html", "api/model.html", "docs/symbols.html", "docs/gradcheck.html", "EXPERIMENTS.html",
)  # fmt: skip


def prose(path: Path) -> str:
    """A page's text, or the text of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_every_paper_that_a_page_cites_is_among_the_references(path):
    text = prose(path)
    missing = {address for address in PAPER.findall(text) if address not in REFERENCES}
    missing |= {" ".join(work) for work in CITED.findall(text) if f"**{' '.join(work)}**" not in REFERENCES}
    assert missing == set()


def test_the_reference_of_the_package_has_every_public_name_once(monkeypatch):
    monkeypatch.syspath_prepend(SITE)
    build = pytest.importorskip("build", reason="needs the extra `book`")
    names = " ".join(build.API.values()).split()
    assert sorted([*names, "reference", "__version__"]) == sorted(retro_np.__all__)


def test_a_docstring_becomes_a_list_with_code_and_formulas(monkeypatch):
    monkeypatch.syspath_prepend(SITE)
    from docstrings import as_rest

    lines = [
        "y of H_u^+, *raw*.",
        "",
        "h: (B, n, d). n_heads: as in",
        "    cca.",
        "k: a number.",
        "Returns vjp(dy).",
        "",
    ]
    assert as_rest([*lines, "    >>> h"], ["h", "n_heads", "k"]) == [
        "", "y of \\ :math:`H_u^+`\\ , \\*raw\\*.",
        "", "- \\ ``h``\\ : \\ ``(B, n, d)``\\ . \\ ``n_heads``\\ : as in cca.", "- \\ ``k``\\ : a number.",
        "", "Returns \\ ``vjp(dy)``\\ .",
        "", "::", "", "       >>> h", "",
    ]  # fmt: skip


def test_the_check_of_links_finds_planted_faults(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SITE)
    from links import problems

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text('<a href="../a.html#here">a</a> <a href="https://x.org/">x</a>')
    (tmp_path / "a.html").write_text('<p id="here"><a href="folder/">folder</a> <a href="#here">here</a>')
    assert problems(tmp_path) == []
    faults = {
        '<a href="b.html">b</a>': "a.html links b.html, which does not exist",
        '<a href="folder/#x">x</a>': "a.html links folder/#x, which has no such anchor",
        '<img src="folder/index.html">': "a.html shows folder/index.html without alternative text",
        '<script src="https://x.org/y.js"></script>': "a.html loads https://x.org/y.js",
    }
    for fault, sentence in faults.items():
        (tmp_path / "a.html").write_text(f'<p id="here">{fault}')
        assert problems(tmp_path) == [sentence]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built book. The build fails for a warning, a broken link or a figure without caption."""
    if os.environ.get("RETRO_NP_SITE"):
        return Path(os.environ["RETRO_NP_SITE"])
    if not os.environ.get("CI"):
        pytest.importorskip("furo", reason="needs the extra `book`")
    out = tmp_path_factory.mktemp("site") / "book"
    built = subprocess.run([sys.executable, SITE / "build.py", out], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def address(site):
    """The address at which the book is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    driver = chromium()
    yield driver
    driver.quit()


def open_page(browser, address, width=1300, theme="light"):
    """Open a page in a window of this width and in this theme, and wait until its formulas are typeset."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(address)
    browser.execute_async_script(
        "const done = arguments[0]; window.MathJax ? MathJax.startup.promise.then(() => done()) : done()"
    )


TEXT_OUTSIDE_CODE = """
const copy = (document.querySelector('article') || document.body).cloneNode(true);
copy.querySelectorAll('pre, code, script, style, mjx-container').forEach(element => element.remove());
return copy.textContent;
"""

# WCAG 2's ratio of luminances, of each element that has text of its own
PALE_TEXT = """
const channels = colour => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const luminance = rgb => rgb.slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const background = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour[3] > 128) return colour;
  }
  return [255, 255, 255, 255];
};
const seen = new Set(), pale = [];
const elements = 'h1, h2, p, li, td, th, a, code, pre, pre span, button, label, dt';
for (const element of document.body.querySelectorAll(elements)) {
  if (element.closest('svg, .linenos, .headerlink, .copybtn, [hidden]')) continue;
  if (![...element.childNodes].some(node => node.nodeType == 3 && node.data.trim()) || !element.offsetParent) continue;
  const style = getComputedStyle(element), paint = background(element), key = style.color + paint;
  if (seen.has(key)) continue;
  seen.add(key);
  const [dark, light] = [luminance(channels(style.color)), luminance(paint)].sort((a, b) => a - b);
  const ratio = (light + 0.05) / (dark + 0.05);
  if (ratio < (element.closest('pre') ? 3 : 4.5)) pale.push(`${element.textContent.slice(0, 30)}: ${ratio.toFixed(1)}`);
}
return pale;
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", OPENED)
def test_a_page_opens_without_errors_and_loads_nothing_from_elsewhere(browser, address, page):
    open_page(browser, address + page)
    errors = [entry for entry in browser.get_log("browser") if "/favicon.ico" not in entry["message"]]
    assert errors == []  # The browser asks for this icon by itself.
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith(address)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", OPENED)
def test_every_formula_of_a_page_is_typeset(browser, address, page):
    open_page(browser, address + page)
    formulas = browser.find_elements("css selector", ".math")
    assert len(browser.find_elements("css selector", ".math mjx-container")) == len(formulas)
    assert browser.find_elements("css selector", "mjx-merror") == []
    assert "$" not in browser.execute_script(TEXT_OUTSIDE_CODE)
    assert formulas or not page.startswith(("tutorials", "docs/symbols"))


@pytest.mark.slow
@pytest.mark.parametrize("page", OPENED)
def test_a_page_is_no_wider_than_a_telephone(browser, address, page):
    open_page(browser, address + page, width=375)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375


@pytest.mark.slow
@pytest.mark.parametrize("page", OPENED)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_in_both_themes(browser, address, page, theme):
    open_page(browser, address + page, theme=theme)
    body = browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).colorScheme"
    )
    assert browser.execute_script(PALE_TEXT) == [], body


@pytest.mark.slow
def test_the_search_finds_where_a_term_is_explained(browser, address):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(browser, address + "book.html")
    browser.find_element("css selector", "input.sidebar-search").send_keys("chunked cross-attention", Keys.ENTER)
    links = WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", "#search-results li a"))
    assert "search.html?q=" in browser.current_url
    WebDriverWait(browser, 20).until(
        lambda b: any(
            "05_chunked_cross_attention.html" in link.get_attribute("href")
            for link in b.find_elements("css selector", "#search-results li a")
        )
    )
    assert links
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_pages_follow_one_another(site):
    text = (site / "tutorials" / "05_chunked_cross_attention.html").read_text(encoding="utf-8")
    assert re.search(r'class="prev-page" href="04_relative_positions.html"', text)
    assert re.search(r'class="next-page" href="06_the_neighbour_encoder_and_algorithm_1.html"', text)


@pytest.mark.slow
def test_a_function_of_the_reference_leads_to_its_line(site):
    text = (site / "api" / "nn.cca.html").read_text(encoding="utf-8")
    line = next(
        n for n, line in enumerate((ROOT / "retro_np/nn/cca.py").open(encoding="utf-8"), 1) if "def cca(" in line
    )
    assert f'href="../source/retro_np/nn/cca.py.html#L-{line}"' in text
    assert f'id="L-{line}"' in (site / "source/retro_np/nn/cca.py.html").read_text(encoding="utf-8")


def test_a_new_build_removes_the_files_of_the_old_book_and_no_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SITE))
    import build  # the module of docs/site

    site, out = tmp_path / "site", tmp_path / "out"
    for name in ("book.html", "old/page.html"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("old")
    build.place(site, out)
    (out / "notes.txt").write_text("a reader's own")
    (site / "old/page.html").unlink()
    (site / "book.html").write_text("new")
    build.place(site, out)
    assert (out / "book.html").read_text() == "new"
    assert (out / "notes.txt").read_text() == "a reader's own"
    assert not (out / "old/page.html").exists()


@pytest.mark.parametrize("there", ["a file", "a folder with a page"])
def test_a_folder_that_is_no_book_is_refused_and_kept(there, tmp_path):
    out = tmp_path / "thesis"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "book.html").write_text("mine")
    refused = subprocess.run([sys.executable, SITE / "build.py", out], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("build.py: ")
    assert refused.stderr.count("\n") == 1
    assert (out if there == "a file" else out / "book.html").read_text() == "mine"
