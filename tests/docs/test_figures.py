"""The figures on the pages in Markdown. Ground truth: what experiments and benchmarks recorded, and facts.toml.

A section may give the figures of the records that it names: `leakage` or leakage.json, and search.json or search.py of
the benchmarks. What is between the markers of a generated section is compared where it is generated."""

import re
from functools import lru_cache
from pathlib import Path

import pytest
from figures import (
    ROOT,
    constants_of_package,
    facts_of,
    figures_in,
    has,
    has_rounded,
    numbers_in,
    numbers_of_json,
    without_generated,
)

import retro_np

PAGES = [ROOT / name for name in ("README.md", "EXPERIMENTS.md", "tutorials/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ROOT / "docs" / "experiments", ROOT / "benchmarks" / "results"
RECORDS = {path.stem: path for folder in FOLDERS for path in folder.glob("*.json")}


@lru_cache
def recorded(name):
    return numbers_of_json(RECORDS[name])


@lru_cache
def constants():
    """Settings in the package's code, and its model cards."""
    return constants_of_package(Path(retro_np.__file__).parent)


def unknown_figures(text, facts=frozenset()):
    """The figures of a page that are neither recorded nor a setting of the package nor among the facts."""
    text = without_generated(text)
    exact = constants() | facts
    for code in re.findall(r"```.*?```", text, re.DOTALL):
        exact |= numbers_in(code)  # a program on the page, which another test runs
    missing = []
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        named = [name for name in RECORDS if re.search(rf"`{name}`|\b{name}\.(?:json|py)\b", section)]
        records = set().union(*map(recorded, named))
        missing += [x.text for x in figures_in(section) if not (has(exact, x) or has_rounded(records, x))]
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_figure_of_a_page_is_recorded_or_a_setting_of_the_package_or_among_the_facts(page):
    missing = unknown_figures(page.read_text(encoding="utf-8"), facts_of(page.relative_to(ROOT).as_posix()))
    assert not missing, ", ".join(missing)


def test_a_figure_may_be_rounded_and_must_be_of_a_record_that_its_section_names():
    saved = "Retrieval saves 5.62 % (`random-neighbours`)."
    assert unknown_figures(saved) == []
    assert unknown_figures(saved.replace("5.62", "5.6")) == []
    assert unknown_figures(saved.replace("5.62", "91.2345")) == ["91.2345 %"]
    assert unknown_figures("Retrieval saves 5.62 %.\n\n## `random-neighbours`") == ["5.62 %"]
