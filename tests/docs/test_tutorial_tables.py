"""Tables that tutorials 10 to 13 quote in their code. Ground truth: the recorded results."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))


def quoted(number, name):
    """The value that is assigned to a name in a tutorial."""
    (source,) = (ROOT / "tutorials").glob(f"{number}_*.py")
    (value,) = (
        node.value
        for node in ast.parse(source.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    )
    return eval(compile(ast.Expression(value), source.name, "eval"), {})


def experiment(name):
    return json.loads((ROOT / f"docs/experiments/{name}.json").read_text("utf-8"))


def test_tutorial_10_quotes_the_recorded_bits_per_byte():
    lines = experiment("wikitext-style")["figures"]["lines"]
    assert quoted("10", "RECORDED") == {name: round(line["bpb"], 6) for name, line in lines.items()}


def test_tutorial_11_quotes_the_recorded_times_of_kernels():
    milliseconds = json.loads((ROOT / "benchmarks/results/kernels.json").read_text("utf-8"))["milliseconds"]
    for name, of in quoted("11", "MEASURED").items():
        rows = {row: times for row, times in milliseconds.items() if row.partition(": ")[2].startswith(name)}
        assert {row.partition(":")[0] for row in rows} == {"attention_forward", "attention_backward"}
        for kind, ms in of.items():
            assert ms == pytest.approx(sum(round(times[kind], 1) for times in rows.values()))


def test_tutorial_11_quotes_the_steps_of_the_product():
    page = (ROOT / "csrc/README.md").read_text("utf-8")
    rows = {name.split(" (")[0]: float(number) for name, number in re.findall(r"^\| (.+) \| ([\d.]+) \|$", page, re.M)}
    assert len(rows) == 6
    for name, number in quoted("11", "STEPS").items():
        assert next(of for row, of in rows.items() if row.startswith(name)) == number
    assert f"reaches {quoted('11', 'BLAS')} GFLOP/s" in page


def test_tutorial_12_quotes_the_recorded_times_of_searches():
    costs = importlib.import_module("scale_costs")
    tables = {table["size"]: table for table in costs.results("search")["tables"]}
    for keys, seconds in quoted("12", "GRAPH_OF_DOCS").items():
        assert seconds == pytest.approx(costs.query_seconds(keys), abs=5e-6)
    for keys, seconds in quoted("12", "EXACT_OF_DOCS").items():
        assert seconds == pytest.approx(tables[keys]["exact"]["retro_np"]["single"]["seconds"], rel=0.01)
    pairs = costs.chunks_of(costs.SIZES[-1]) * costs.shards_of(costs.SIZES[-1])
    assert quoted("12", "BUILD_SECONDS") == pytest.approx(costs.neighbours_seconds(costs.SIZES[-1]) / pairs, abs=5e-7)


CONDITIONS = {
    "trained memory": "on", "trained memory, others' neighbours": "others", "untrained memory": "untrained",
    "package's memory": "shipped", "package's memory, others' neighbours": "shipped, others", "kNN-LM": "knn-lm",
    "retrieved text in the prompt": "in-context", "adapted without retrieval": "adapted",
    "the paper's form": "paper-form", "the paper's form, others'": "paper-form, others",
}  # fmt: skip
AGAINST = {
    "translations, trained memory against the prompt": ("translations", "on", "in-context"),
    "translations, trained memory against the adapted model": ("translations", "on", "adapted"),
    "documentation, trained memory against the prompt": ("documentation", "on", "in-context"),
    "documentation, trained memory against the adapted model": ("documentation", "on", "adapted"),
    "documentation without near-copies, the same": ("documentation, similarity below 0.1", "on", "adapted"),
    "no shared content, trained memory against SmolLM2": ("no shared content", "on", "base"),
    "no shared content, package's memory against SmolLM2": ("no shared content", "shipped", "base"),
}


def test_tutorial_13_quotes_the_recorded_gains_of_a_memory():
    recorded = {}
    for row in experiment("retrofit-lm")["comparisons"]:
        if row["alpha"] is None:
            numbers = row["difference_percent"], *(row["interval_percent"] or ())
            recorded[row["corpus"], row["of"], row["against"]] = tuple(round(number, 1) for number in numbers)
    for corpus, of in quoted("13", "RECORDED").items():
        for condition, numbers in of.items():
            assert numbers == recorded[corpus, CONDITIONS[condition], "base"]
    against = quoted("13", "AGAINST")
    assert against == {name: recorded[compared] for name, compared in AGAINST.items()}


def test_tutorial_13_quotes_the_recorded_times_of_a_token():
    seconds = experiment("retrofit-lm")["figures"]["seconds_per_token"]
    names = {"memory": "on", "memory, neighbours encoded already": "on, neighbours encoded", "prompt": "in-context"}
    expected = {name: round(seconds[of] / seconds["base"], 2) for name, of in names.items()}
    assert quoted("13", "TIMES") == expected
