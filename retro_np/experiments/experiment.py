"""Run an experiment by name and leave what it found: NAME.json and NAME.png. What one is made of: `Experiment`."""

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.experiments.lab import SCALES, Lab
from retro_np.files import check_folder, locked, remove_partial, write_json

NAMES = (
    "random-neighbours", "leakage", "database-size", "neighbours", "model-size", "retrofit", "ablations", "subsets",
    "chunk-size", "second-corpus", "wikitext-style", "knowledge", "question-answering", "samples", "pretrained",
)  # fmt: skip
SEEDS = 3  # where a claim hangs on their spread


@dataclass(frozen=True)
class Experiment:
    """One figure or table. A module of an experiment has one, as EXPERIMENT.

    paper: what the paper shows, and where. measure(lab) → figures, plain values for JSON. draw(figures, path) → a
    picture. verdict(figures) → whether the shape agrees (None: there is nothing to agree with), and one sentence on it
    with figures. over_seeds: whether it trains models of `lab.seeds` seeds, or of one.
    """

    title: str
    paper: str
    measure: Callable[[Lab], dict]
    draw: Callable[[dict, Path], None]
    verdict: Callable[[dict], tuple[bool | None, str]]
    over_seeds: bool = True


def find_experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UserError for another."""
    if name not in NAMES:
        raise UserError(f"no experiment {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"retro_np.experiments.{name.replace('-', '_')}").EXPERIMENT


def run_experiment(name: str, out: Path, scale: str = "small", seeds: int | None = None) -> dict:
    """Measure, or go on measuring; write NAME.json and NAME.png. Returns what the JSON holds.

    The two lie in OUT, those of another scale than small in OUT/SCALE, where models and databases are which other
    experiments use again. seeds: None: three, or one where the experiment is of one. Raises UserError for more there.
    """
    experiment = find_experiment(name)
    if seeds not in (None, 1) and not experiment.over_seeds:
        raise UserError(f"{name} is measured with models of one seed: leave --seeds out")
    seeds = seeds or (SEEDS if experiment.over_seeds else 1)
    out = Path(out)
    place = result_folder(out, scale)
    for file in (place / f"{name}.json", place / f"{name}.png"):
        if file.is_dir():
            raise UserError(f"{file} is a folder, and a result is to be written there: give another folder with -o")
    with open_lab(out, scale, seeds) as lab:
        began = time.perf_counter()
        figures = json.loads(json.dumps(experiment.measure(lab), default=_plain))
        seconds = time.perf_counter() - began
    agrees, sentence = experiment.verdict(figures)
    result = {
        "experiment": name,
        "title": experiment.title,
        "paper": experiment.paper,
        "command": f"retro-np experiment {name}" + _options(scale, seeds if experiment.over_seeds else SEEDS),
        "scale": asdict(SCALES[scale]),
        "seeds": seeds,
        "machine": {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "processor": _processor(), "retro_np": importlib.metadata.version("retro-np"), "numpy": np.__version__,
        },
        "seconds": round(seconds, 1),  # of this command; what an earlier one left was found, not made
        "agrees": agrees,
        "verdict": sentence,
        "figures": figures,
    }  # fmt: skip
    experiment.draw(figures, place / f"{name}.png")
    write_json(place / f"{name}.json", _finite(result))
    return result


def result_folder(out: Path, scale: str) -> Path:
    """Where results of a scale are written: those of a tiny run do not replace a large one's."""
    return out if scale == "small" else out / scale


@contextlib.contextmanager
def open_lab(out: Path, scale: str, seeds: int = 3) -> Iterator[Lab]:
    """The lab in OUT/SCALE, while no other process works in it. Raises UserError for an unknown scale."""
    if scale not in SCALES:
        raise UserError(f"no scale {scale!r}; there are {', '.join(SCALES)}")
    check_folder(out)
    lab = Lab(out / scale, SCALES[scale], seeds)
    with locked(lab.folder, "experiment"):
        remove_partial(lab.folder)
        yield lab


def _options(scale, seeds):
    return ("" if scale == "small" else f" --scale {scale}") + ("" if seeds == SEEDS else f" --seeds {seeds}")


def _finite(value):
    """The same without NaN and infinities, which JSON does not have: null in their place."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
