"""The page about reliability. Ground truth: what its benchmark wrote."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text(encoding="utf-8"))


def test_the_page_shows_what_the_benchmark_wrote():
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, "run python benchmarks/reliability.py --write"


def test_the_run_had_a_million_inputs_for_parsers_and_ten_thousand_for_commands():
    assert FIGURES["parts"]["parsers"]["inputs"] >= 10**6
    assert FIGURES["parts"]["commands"]["inputs"] >= 10**4


def test_at_least_half_of_the_inputs_got_past_hash_and_first_parser():
    assert all(2 * row["past"] >= row["inputs"] for row in FIGURES["parts"].values())


def test_no_input_failed():
    assert [row["failures"] for row in FIGURES["parts"].values() if any(row["failures"].values())] == []
