"""Write the essay "RETRO in ten minutes": `python docs/landing/make.py OUT` writes OUT/index.html and OUT/landing/.

essay.html has the text. Its figures come from the records: docs/experiments/*.json, and learning_curve.json beside this
file. The pages of `retro-np inspect` and the drawings are committed here and are copied."""

import argparse
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import jinja2
from drawing import HEIGHT, WIDTH, drawing
from markupsafe import Markup, escape
from pictures import M, gains, learning_curve, staircase

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "experiments"
PROJECT = HERE.parents[1] / "pyproject.toml"
ASSETS = ("essay.css", "essay.js", "inspect.html", "inspect-code.html", "retro.svg")
PARTS = ("text", "key", "database", "sequence", "search", "decoder", "encoder", "cca", "shift", "back")
SYMBOL = re.compile(r"\*([A-Za-z]+)(?:_(\w+?))?(\+?)\*")
# The steps of the drawing: the parts that a step adds, and what a phone shows of it: rectangles (x, y, width, height)
STEPS = (
    (("text",), [(8, 34, 384, 98)]),
    (("key", "database"), [(140, 34, 340, 98), (386, 34, 330, 98)]),
    (("sequence",), [(8, 150, 340, 100)]),
    (("search",), [(8, 120, 450, 128), (450, 122, 262, 136)]),
    (("decoder",), [(8, 272, 340, 356)]),
    (("encoder",), [(120, 356, 336, 52), (396, 250, 316, 242)]),
    (("cca",), [(16, 424, 350, 66)]),
    (PARTS, []),
)
BACK = [(8, 254, 372, 374), (372, 290, 340, 200)]


def symbols(words: str) -> str:
    """What stands between asterisks, as *C_1*, set as a symbol."""

    def one(match: re.Match[str]) -> str:
        name, index, plus = match.groups()
        low = f"<sub>{index}</sub>" if index else ""
        raised = '<sup class="over">+</sup>' if plus else ""
        return f'<span class="sym"><i>{name}</i>{low}{raised}</span>'

    return SYMBOL.sub(one, words)


def record(name: str) -> dict[str, Any]:
    """A recorded experiment."""
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def comparison(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one comparison with these keys and values, over all chunks."""
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in ({"alpha": None} | wanted).items()))
    return row


def saved(row: dict[str, Any], digits: int = 2) -> str:
    """How many bits are saved."""
    return f"{-row['difference_percent']:.{digits}f} %"


def cost(row: dict[str, Any], digits: int = 2) -> str:
    """How many bits more are needed."""
    return f"{row['difference_percent']:.{digits}f} %"


def interval(row: dict[str, Any], digits: int = 2) -> str:
    """The interval of what is saved."""
    lower, upper = row["interval_percent"]
    return f"{-upper:.{digits}f} to {-lower:.{digits}f} %"


def step_figure(number: int) -> str:
    """The drawing in one of its STEPS: what came before is pale, and what comes later is paler."""
    added, crops = STEPS[number]
    before = {part for parts, _ in STEPS[:number] for part in parts}
    opacity = {part: "1" if part in added else ".6" if part in before else ".3" for part in PARTS}
    return copies(opacity, (0, 0, WIDTH, HEIGHT), crops)


def back_figure() -> str:
    """The drawing with the gradients lit."""
    opacity = {part: ".4" for part in PARTS} | dict.fromkeys(("decoder", "encoder", "cca"), ".75")
    return copies(opacity | {"back": "1", "shift": ".07"}, (8, 256, 704, 372), BACK)


def copies(opacity: dict[str, str], whole: tuple[int, ...], crops: list[tuple[int, ...]]) -> str:
    """A copy of the drawing for wide screens and, if there are crops, copies for phones. opacity: of each part."""
    style = ";".join(f"--p-{part}:{value}" for part, value in opacity.items())
    boxes = [("wide" if crops else "whole", whole), *(("narrow", crop) for crop in crops)]
    return "".join(
        f'<svg viewBox="{" ".join(map(str, box))}" class="retro {kind}" style="{style}" aria-hidden="true">'
        '<use href="#retro"/></svg>'
        for kind, box in boxes
    )


def learned(curve: dict[str, Any]) -> dict[str, Any]:
    """What the essay says about the learning curve."""
    runs = [run["curve"] for run in curve["runs"]]
    asked = curve["asked"]
    finals = [round(asked * run[-1]["on"]["right"]) for run in runs]
    begun = [next(row["step"] for row in run if row["on"]["right"] >= 0.1) for run in runs]
    dark = max(row["step"] for run in runs for row in run if row["step"] < min(begun))
    lucky = max(round(asked * row["on"]["right"]) for run in runs for row in run if row["step"] <= dark)
    flat = max(round(asked * row[name]["right"]) for run in runs for row in run for name in ("off", "others"))
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
    believed = round(asked * curve["example"]["believed"])
    return {
        "believed": believed,
        "finals": finals,
        "begun": (min(begun), max(begun)),
        "dark": dark,
        "lucky": words.get(lucky, lucky),
        "flat": flat,
        "runs": words.get(len(runs), len(runs)),
    }


def listed(items: list[Any]) -> str:
    """1, 2 and 3."""
    return ", ".join(map(str, items[:-1])) + f" and {items[-1]}"


def repository() -> str:
    """The address of the package's source, empty until pyproject.toml has one."""
    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["retro_np"]["repository"]


def context() -> dict[str, Any]:
    """Everything that essay.html refers to."""
    curve = json.loads((HERE / "learning_curve.json").read_text(encoding="utf-8"))
    stdlib, memory, knowledge = record("pretrained"), record("retrofit-lm"), record("knowledge")
    runs, rivals = record("random-neighbours")["figures"], record("wikitext-style")["figures"]["lines"]
    parts = stdlib["figures"]["parts"]
    apart = stdlib["figures"]["without_near_copies"]
    copies = parts["similarity"][-1]
    on = {"of": "on", "against": "baseline"}
    whole, new = comparison(stdlib["comparisons"], **on), comparison(apart["comparisons"], **on)
    translations, manual = {"corpus": "translations", "against": "base"}, {"corpus": "documentation", "against": "base"}
    seconds = memory["figures"]["seconds_per_token"]
    person = curve["example"]
    words = ["the", "code", "of", person["name"], person["code"], "opens", "the", "gate", "at", "night"]
    return {
        "drawing": Markup(drawing()), "curve": curve, "learned": learned(curve), "person": person,
        "step": lambda number: Markup(step_figure(number)), "back": Markup(back_figure()),
        "shifts": [(shift, Markup(staircase(shift, words))) for shift in (M, M - 1, M - 2)],
        "learning_curve": Markup(learning_curve(curve)), "listed": listed,
        "gains": Markup(gains([
            ("all modules", f"{whole['documents']} held out", whole),
            ("near-copies", f"{copies['documents']} modules", copies),
            ("the others", f"{new['documents']} modules", new),
        ])),
        "stdlib": stdlib, "whole": whole, "new": new, "copies": copies,
        "others": comparison(stdlib["comparisons"], of="others", against="baseline"),
        "off": comparison(stdlib["comparisons"], of="off", against="baseline"),
        "sizes": stdlib["figures"]["parameters"], "millions": lambda count: f"{count / 1e6:.1f}",
        "three": f"{100 * runs['gain']['from']:.2f} to {100 * runs['gain']['to']:.2f} %",
        "copied": runs["copy_bound"]["gain"],
        "cached": 1 - rivals["continuous cache"]["bpb"] / rivals["baseline"]["bpb"],
        "match": {row["token"]: row for row in parts["match"]},
        "swapped": knowledge["figures"]["lines"]["other codes in the database"]["right"]["mean"],
        "known": knowledge["figures"],
        "memory": {name: comparison(memory["comparisons"], of=name, **translations)
                   for name in ("on", "others", "in-context", "paper-form", "paper-form, others")},
        "manual": comparison(memory["comparisons"], of="on", **manual),
        "adapted": comparison(memory["comparisons"], of="adapted", **manual),
        "neighbours": comparison(memory["comparisons"], of="knn-lm", **manual),
        "manual_new": comparison(
            memory["comparisons"], corpus="documentation, similarity below 0.1", of="on", against="adapted"
        ),
        "apart": comparison(memory["comparisons"], corpus="no shared content", of="on", against="base"),
        "trained": memory["figures"]["trained_parameters"]["on"], "slower": seconds["on"] / seconds["base"],
        "prompted": seconds["in-context"] / seconds["base"],
        "saved": saved, "cost": cost, "interval": interval, "repository": repository(),
        "chunk": lambda words, kind: Markup(f'<code class="chunk {kind}">{escape(words)}</code>'),
    }  # fmt: skip


def page() -> str:
    """The essay's HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(symbols((HERE / "essay.html").read_text(encoding="utf-8")))
    return template.render(context())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the essay RETRO in ten minutes.")
    parser.add_argument("out", type=Path, help="folder of index.html")
    out = parser.parse_args().out
    mine = [out / "index.html", *(out / "landing" / name for name in ASSETS)]
    if any(path.is_file() for path in (out, *out.parents)) or any(path.exists() for path in mine):
        parser.error(f"{out} already has a page or is a file; give an empty folder")
    (out / "landing").mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(page(), encoding="utf-8")
    for name in ASSETS:
        shutil.copyfile(HERE / name, out / "landing" / name)


if __name__ == "__main__":
    main()
