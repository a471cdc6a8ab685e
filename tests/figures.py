"""The figures in a text, and whether a source has them: output, code, recorded results or tests/docs/facts.toml.

A figure is a decimal, a percentage, or an integer of at least three digits. Years and the numbers of figures, tables,
sections, equations and exercises are none, nor are numbers in links, in names as SmolLM2-135M and in fenced code."""

import ast
import json
import math
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "tests" / "docs" / "facts.toml"
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "M": 1e6, "B": 1e9, "T": 1e12}
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"
POWER = r"(?:\s*(?:\\cdot|\\times|·|×)\s*10\^\{?(?P<power>-?\d+)\}?)?"
NUMBER = re.compile(
    rf"(?<![\w.])(?<!\d,)(?P<digits>{DIGITS}){POWER}(?!\d|[.,]\d)"
    r"(?P<after>\s?\\?%|(?:\s|-)(?:thousand|million|billion|trillion)\b|[MBT]\b)?"
)
LABELS = re.compile(
    r"(?:figures?|tables?|sections?|exercises?|eqs?\.|equations?|appendix|appendices|tutorials?|algorithms?|lines?"
    r"|version|python|numpy|pytorch|§+)"
    r"(?:\s|\*|~|&nbsp;)*\(?[A-Z]?\.?\d+(?:\.\d+)*\)?(?:(?:,\s*|\s*(?:and|to|or|–|-)\s*)[A-Z]?\.?\d+(?:\.\d+)+\b)*",
    re.IGNORECASE,
)
NO_TEXT = [
    re.compile(pattern, re.DOTALL | re.MULTILINE)
    for pattern in (
        r"^```.*?^```|^~~~.*?^~~~|^ {4}(?:retro-np|pip|python|jupyter) [^\n]*",  # code
        r"<!--.*?-->|<[a-zA-Z/][^<>]*>",
        r"\]\([^)]*\)|https?://\S+|\bdoi:\S+|arXiv:\S+",
    )
]
NAME = re.compile(r"\b[A-Za-z]\w*(?:[-‑][\w.]+)+")  # SmolLM2-135M, all-MiniLM-L6-v2
NUMBERED = re.compile(r"^#+ [\d.]+ ·|^\s*(?:[-*]\s+)?\*\*(?:Exercise )?\d+(?:\.\d+)*\.?\*\*", re.MULTILINE)


GENERATED = re.compile(r"<!-- ([\w -]+): python .*?<!-- end of \1 -->", re.DOTALL)


class Figure(NamedTuple):
    """A figure as it stands in a text. values: what it may mean, 3.5 % also 0.035. decimals: as it was written."""

    text: str
    values: tuple[float, ...]
    unit: float
    decimals: int


def figures_in(markdown):
    """The figures of a Markdown text, in order."""
    text = without_generated(markdown)
    for pattern in NO_TEXT:
        text = pattern.sub(" ", text)
    text = re.sub(r"`[^`\n]*[A-Za-z_/][^`\n]*`", " ", text)  # names and code; a number in backticks is a figure
    text = re.sub(r"(?<=\d)\\,(?=\d{3})", ",", text.replace("{,}", ",").replace("{.}", "."))
    for pattern in (NUMBERED, NAME, LABELS):
        text = pattern.sub(" ", text)
    return [figure for match in NUMBER.finditer(powers(text)) if (figure := figure_of(match))]


def without_generated(markdown):
    """A page without what a program writes between its markers, and checks there."""
    return GENERATED.sub(" ", markdown)


def powers(text):
    """10⁻⁹ as 10^-9."""
    return re.sub(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda match: "10^" + match[1].translate(SUPERSCRIPTS), text)


def figure_of(match):
    """The figure of a match of NUMBER; None if it is too small an integer, or a year."""
    digits, after = match["digits"], (match["after"] or "").strip(" -\\\n")
    value = float(digits.replace(",", ""))
    if after == "%":
        if digits in ("0", "100"):
            return None
    elif digits.isdigit() and not after and (len(digits) < 3 or 1950 <= value <= 2029):
        return None
    if "e" in digits and "." not in digits:  # an order of magnitude, as 1e-7
        return None
    unit = 0.01 if after == "%" else SCALES.get(after, 1.0)
    values = (value, value * unit)
    if match["power"] is not None:
        unit = 10.0 ** int(match["power"])
        values = (value * unit,)
    mantissa, _, exponent = digits.partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return Figure(match[0].strip(), values, unit, decimals)


def numbers_in(text):
    """All numbers of an output, of code or of a text, as a set of floats."""
    found = set()
    for match in NUMBER.finditer(powers(text.replace("_", ""))):
        value = float(match["digits"].replace(",", ""))
        after = (match["after"] or "").strip(" -\\\n")
        found |= {value, value * (0.01 if after == "%" else SCALES.get(after, 1.0))}
        if match["power"] is not None:
            found.add(value * 10.0 ** int(match["power"]))
    return found


def has(numbers, figure):
    """Whether a figure is among numbers, digit by digit."""
    return any(math.isclose(value, number, rel_tol=1e-9) for value in figure.values for number in numbers)


def has_rounded(numbers, figure):
    """Whether a figure is one of the numbers, rounded as it was written; its sign is left to the text."""
    value, step = figure.values[-1], figure.unit * 10.0**-figure.decimals
    return any(abs(abs(number) - value) <= 0.5001 * step for number in numbers) or has(numbers, figure)


def numbers_of_json(path):
    """All numbers in a JSON file, those within its texts, too."""
    found = set()

    def walk(part):
        if isinstance(part, dict):
            for key, value in part.items():
                walk(key), walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)
        elif isinstance(part, str):
            found.update(numbers_in(part))
        elif isinstance(part, int | float) and not isinstance(part, bool):
            found.add(float(part))

    walk(json.loads(path.read_text(encoding="utf-8")))
    return found


def constants_of_package(folder):
    """The numbers that stand in the code of a package, and in its model cards."""
    found = set()
    for path in sorted(Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                found.add(float(node.value))
            elif isinstance(node, ast.BinOp) and not any(isinstance(x, ast.Name | ast.Call) for x in ast.walk(node)):
                found |= {float(value) for value in [constant(node)] if value is not None}
    for card in sorted(Path(folder).rglob("*.md")):
        found |= numbers_in(card.read_text(encoding="utf-8"))
    return found


def constant(node):
    """The value of an expression of numbers, as 10**6 or 2.0**-10; None if it has none."""
    try:
        value = eval(compile(ast.Expression(node), "constant", "eval"), {"__builtins__": {}})
        return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None
    except Exception:
        return None


def facts_of(page):
    """The numbers that facts.toml lets stand on a page: a tutorial's two digits, or a path as "docs/scale.md"."""
    rows = tomllib.loads(FACTS.read_text(encoding="utf-8")).get("fact", [])
    rows = [row for row in rows if any(fnmatch(page, name) for name in row["pages"])]
    return set().union(*(numbers_in(str(number)) for row in rows for number in row["numbers"]))
