"""The landing essay. Ground truth: the records, and headless Chromium."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsers import chromium
from contrast import contrast, luminance
from figures import facts_of, figures_in

ROOT = Path(__file__).parents[2]
LANDING = ROOT / "docs/landing"
VOID = {"meta", "link", "br", "img", "input", "hr"}
SIZES = "const names = ['scrollWidth', 'clientWidth']; return names.map((name) => document.documentElement[name])"


# The essay, as text


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a built essay."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, LANDING / "make.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def essay(site):
    return Page((site / "index.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page's elements, the text of each, its ids, and elements that were closed wrongly."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.open, self.faults, self.words, self.hidden = [], [], [], [], 0
        self.feed(content)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if not {"style", "script", "svg", "title"} & set(self.open):
            self.words.append(data)

    def text(self):
        return " ".join("".join(self.words).split())

    def attributes(self, name):
        return [(tag, attrs[name]) for tag, attrs in self.elements if name in attrs]


def test_the_essay_is_balanced_html_with_unique_ids(essay):
    assert essay.faults == []
    ids = [value for _, value in essay.attributes("id")]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in essay.elements].count("h1") == 1
    for _, names in essay.attributes("aria-labelledby"):
        assert set(names.split()) <= set(ids)
    assert all(address[1:] in ids for _, address in essay.attributes("href") if address.startswith("#"))


def test_the_essay_asks_no_other_host_for_anything(site, essay):
    loaded = [value for name in ("src", "href") for tag, value in essay.attributes(name) if tag != "a"]
    assert loaded
    for address in loaded:
        assert address.startswith("#") or (site / address).is_file(), address
    for name in ("essay.css", "essay.js"):
        assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|import\(", (site / "landing" / name).read_text())
    for name in ("inspect.html", "inspect-code.html"):
        assert "default-src 'none'" in (site / "landing" / name).read_text()
        assert (site / "landing" / name).stat().st_size < 400_000


def test_the_essays_links_lead_to_pages_of_the_book(essay):
    for tag, address in essay.attributes("href"):
        if tag != "a" or address.startswith(("https://arxiv.org/", "landing/")):
            continue
        source = ROOT / address.partition("#")[0].removesuffix(".html")
        known = (".md", ".py", ".ipynb")
        found = any(source.with_suffix(end).is_file() for end in known)
        assert found or address == "book.html", address


def test_the_essay_takes_about_ten_minutes(essay):
    assert 1400 <= len(re.findall(r"[A-Za-z]{2,}", essay.text())) <= 2150


def test_a_figure_that_stands_in_the_essays_source_is_a_known_fact():
    source = re.sub(r"{{.*?}}|{%.*?%}|<head>.*?</head>", " ", (LANDING / "essay.html").read_text(), flags=re.DOTALL)
    facts = facts_of("docs/landing/essay.html")
    assert [figure.text for figure in figures_in(source) if not facts & set(figure.values)] == []


def test_the_essays_figures_are_those_of_the_records(essay):
    def record(name):
        return json.loads((ROOT / "docs/experiments" / f"{name}.json").read_text())

    def difference(rows, **wanted):
        (row,) = (row for row in rows if wanted.items() <= row.items() and row["alpha"] is None)
        return row["difference_percent"]

    words, stdlib, memory = essay.text(), record("pretrained"), record("retrofit-lm")
    on = {"of": "on", "against": "baseline"}
    whole = difference(stdlib["comparisons"], **on)
    new = difference(stdlib["figures"]["without_near_copies"]["comparisons"], **on)
    assert f"RETRO needs {-whole:.2f} % fewer bits than the other" in words
    assert f"Without them, {-new:.2f} % remains" in words
    said_of = {
        "on": "SmolLM2 needs {:.1f} % fewer bits", "in-context": "instead, it saves {:.1f} %",
        "others": "of other chunks it saves {:.1f} %, and the interval contains zero",
    }  # fmt: skip
    for of, said in said_of.items():
        saved = -difference(memory["comparisons"], corpus="translations", of=of, against="base")
        assert said.format(saved) in words
    for of, corpus, said in (
        ("paper-form", "translations", "did not learn to read: it saves {:.1f} %"),
        ("paper-form, others", "translations", "{:.1f} % with the neighbours of others"),
        ("on", "documentation", "tested on others: it saves {:.1f} %"),
        ("adapted", "documentation", "without retrieval, saves {:.1f} %"),
    ):
        saved = -difference(memory["comparisons"], corpus=corpus, of=of, against="base")
        assert said.format(saved) in words
    (row,) = (row for row in memory["comparisons"] if (row["corpus"], row["of"], row["against"], row["alpha"])
              == ("documentation", "on", "adapted", None))  # fmt: skip
    assert row["interval_percent"][0] < 0 < row["interval_percent"][1]
    copied = record("random-neighbours")["figures"]["copy_bound"]["gain"]
    lines = record("wikitext-style")["figures"]["lines"]
    cached = 1 - lines["continuous cache"]["bpb"] / lines["baseline"]["bpb"]
    assert f"This rule, with no RETRO in it, saves {100 * copied:.2f} % on this text" in words
    assert f"Without any database, it saves {100 * cached:.2f} %" in words
    assert -whole < 100 * min(copied, cached)
    assert "fails the third, because either machine saves more" in words
    apart = difference(memory["comparisons"], corpus="no shared content", of="on", against="base")
    assert f"the memory costs {apart:.1f} %" in words
    swapped = record("knowledge")["figures"]["lines"]["other codes in the database"]["right"]["mean"]
    assert f"{100 * swapped:.1f} % of the answers were the new codes" in words


@pytest.mark.parametrize(
    ("address", "said"), [("", "no public address yet"), ("https://a.b/c", "git clone https://a.b/c ")]
)
def test_the_essay_says_where_the_source_is(address, said, monkeypatch):
    monkeypatch.syspath_prepend(LANDING)
    import make

    monkeypatch.setattr(make, "repository", lambda: address)
    page = Page(make.page())
    assert page.faults == []
    assert said in page.text()


def test_the_learning_curve_is_what_the_essay_says(essay):
    curve = json.loads((LANDING / "learning_curve.json").read_text())
    person, words = curve["example"], essay.text()
    assert person["said"]["on"] == person["code"]
    assert person["said"]["others"] == person["other_code"]
    assert person["said"]["off"] != person["code"]
    *first, last = (round(curve["asked"] * run["curve"][-1]["on"]["right"]) for run in curve["runs"])
    answered = f"{', '.join(map(str, first))} and {last} of the {curve['asked']} questions"
    assert f"After {curve['steps']:,} steps, the models answer {answered}" in words
    assert not any(row[name]["right"] for run in curve["runs"] for row in run["curve"] for name in ("off", "others"))
    assert "they answer none at any time" in words


def test_without_javascript_all_steps_and_staircases_are_in_the_page(essay):
    classes = [value.split() for _, value in essay.attributes("class")]
    assert sum("step" in names for names in classes) == 8
    assert sum("shift" in names for names in classes) == 3
    assert essay.attributes("hidden") == []
    assert [value for _, value in essay.attributes("data-shift")] == ["4", "3", "2"]
    assert not [tag for tag, _ in essay.elements if tag in ("button", "input", "select")]  # The script makes them.


# The essay, in a browser


@pytest.fixture(scope="module")
def browser():
    driver = chromium("1200,1000")
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, site):
    """The essay in a fresh tab of a wide window, without errors before and after the test."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get((site / "index.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def shown(browser, selector):
    return [part for part in browser.find_elements("css selector", selector) if part.is_displayed()]


def test_the_steps_of_the_drawing_follow_buttons_and_arrow_keys(opened):
    from selenium.webdriver.common.keys import Keys

    def heading():
        (step,) = shown(opened, ".step")
        return step.find_element("css selector", "h3").text

    headings = [opened.execute_script("return arguments[0].textContent", h)
                for h in opened.find_elements("css selector", ".step h3")]  # fmt: skip
    back, forward = opened.find_elements("css selector", ".steps button")
    assert heading() == headings[0]
    assert not back.is_enabled()
    for number, expected in enumerate(headings[1:], 2):
        forward.click()
        assert heading() == expected
        assert opened.find_element("css selector", ".where").text == f"step {number} of {len(headings)}"
    assert not forward.is_enabled()
    back.click()
    back.send_keys(Keys.ARROW_LEFT)
    assert heading() == headings[-3]
    back.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert heading() == headings[-1]
    opened.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert heading() == headings[-2]


def test_a_step_lights_its_part_of_the_drawing(opened):
    lit = "return getComputedStyle(arguments[0]).getPropertyValue(`--p-${arguments[1]}`)"
    for step in opened.find_elements("css selector", ".step")[:2]:
        drawing = step.find_element("css selector", "svg.wide")
        values = [float(opened.execute_script(lit, drawing, part)) for part in ("text", "database", "cca")]
        assert values == ([1, 0.3, 0.3] if "Cut" in step.get_property("textContent") else [0.6, 1, 0.3])


def test_dragging_the_bars_up_by_one_row_makes_the_leak_appear(opened):
    from selenium.webdriver import ActionChains

    def state():
        (part,) = shown(opened, ".shift")
        return part.get_attribute("data-shift"), part.find_element("css selector", "h3").text

    assert state() == ("3", "Shift m − 1: RETRO")
    assert shown(opened, "#shift .s-leak") == []
    bar = shown(opened, ".bars rect")[0]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", bar)
    row = bar.size["height"] / 4
    ActionChains(opened).click_and_hold(bar).move_by_offset(0, round(-0.3 * row)).perform()
    assert state()[0] == "3"
    assert shown(opened, ".bars")[0].get_attribute("transform")  # The bars follow the pointer.
    ActionChains(opened).move_by_offset(0, round(-0.7 * row)).release().perform()
    assert state() == ("2", "Shift m − 2: a leak")
    assert len(shown(opened, "#shift .s-leak")) == 4  # two predictions that were seen, and the arrows to them
    assert "has seen its own answer" in shown(opened, ".shift .says")[0].text
    assert opened.find_element("css selector", "#shift output").text == "m − 2"
    assert not shown(opened, ".bars")[0].get_attribute("transform")
    ActionChains(opened).click_and_hold(shown(opened, ".bars rect")[0]).move_by_offset(
        0, round(2.1 * row)
    ).release().perform()
    assert state() == ("4", "Shift m: too late")


def test_the_slider_moves_the_bars_with_the_keyboard_and_says_where_they_are(opened):
    from selenium.webdriver.common.keys import Keys

    slider = opened.find_element("css selector", "#shift input")
    assert opened.find_element("css selector", f"label[for={slider.get_attribute('id')}]").text == "shift"
    for key, name, text in ((Keys.ARROW_RIGHT, "m − 2", "leak"), (Keys.ARROW_LEFT, "m − 1", "RETRO"),
                            (Keys.HOME, "m", "too late"), (Keys.END, "m − 2", "leak")):  # fmt: skip
        slider.send_keys(key)
        assert slider.get_attribute("aria-valuetext") == name
        assert text in shown(opened, ".shift h3")[0].text


def test_the_hosted_pages_answer_when_a_token_is_pointed_at(opened):
    from selenium.webdriver import ActionChains

    for frame in opened.find_elements("css selector", "iframe"):
        opened.execute_script("arguments[0].loading = 'eager'; arguments[0].scrollIntoView({block: 'center'})", frame)
        opened.switch_to.frame(frame)
        token = opened.find_elements("css selector", ".chunk:nth-child(2) .t")[6]
        opened.execute_script("arguments[0].focus()", token)
        assert "nats with retrieval" in opened.find_element("id", "status").text
        opened.switch_to.default_content()
        ActionChains(opened).move_to_element(opened.find_element("css selector", "h1")).perform()


@pytest.mark.parametrize("width", [375, 390, 700, 1200])
def test_no_part_of_the_essay_is_wider_than_the_window(opened, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for _ in range(8):
        content, window = opened.execute_script(SIZES)
        assert content <= window <= width
        opened.execute_script("document.querySelectorAll('.steps button')[1].click()")


TEXTS = """
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const words = walker.currentNode.data.trim();
  const element = walker.currentNode.parentElement;
  if (!words || element.closest("svg, script, :disabled") || !element.checkVisibility()) continue;
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  found.push([words, getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]);
}
return found;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_words_have_readable_contrast_in_both_themes(opened, theme):
    from selenium.webdriver.support.ui import Select

    def hexadecimal(colour):
        return "#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", colour)[:3])

    Select(opened.find_element("css selector", "#theme select")).select_by_value(theme)
    texts = opened.execute_script(TEXTS)
    assert len(texts) > 100
    poor = [
        (words, ink, ground) for words, ink, ground in texts if contrast(hexadecimal(ink), hexadecimal(ground)) < 4.5
    ]
    assert poor == []
    is_dark = (
        luminance(hexadecimal(opened.find_element("tag name", "body").value_of_css_property("background-color"))) < 0.1
    )
    assert is_dark == (theme == "dark")
    paper = opened.find_element("css selector", ".shift:not([hidden]) .paper").value_of_css_property("fill")
    assert (luminance(hexadecimal(paper)) < 0.1) == is_dark  # The drawings follow the page's switch.


def test_without_javascript_everything_is_shown(site):
    driver = chromium(scripts=False)
    try:
        driver.get((site / "index.html").as_uri())
        assert len(shown(driver, ".step svg.wide, .step svg.whole")) == 8
        assert len(shown(driver, ".shift")) == 3
        assert shown(driver, ".with-script, button, input, select") == []
    finally:
        driver.quit()
