"""Run an experiment by name and leave what it found: NAME.json and NAME.png. What one is made of: `Experiment`."""

import contextlib
import importlib
import importlib.metadata
import json
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


@dataclass(frozen=True)
class Experiment:
    """One figure or table. A module of an experiment has one, as EXPERIMENT.

    paper: what the paper shows, and where. measure(lab) → figures, plain values for JSON. draw(figures, path) → a
    picture. verdict(figures) → whether the shape agrees (None: there is nothing to agree with), and one sentence on it
    with figures.
    """

    title: str
    paper: str
    measure: Callable[[Lab], dict]
    draw: Callable[[dict, Path], None]
    verdict: Callable[[dict], tuple[bool | None, str]]


def find_experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UserError for another."""
    if name not in NAMES:
        raise UserError(f"no experiment {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"retro_np.experiments.{name.replace('-', '_')}").EXPERIMENT


def run_experiment(name: str, out: Path, scale: str = "small", seeds: int = 3) -> dict:
    """Measure, or go on measuring; write OUT/NAME.json and OUT/NAME.png. Returns what the JSON holds.

    Models and databases lie in OUT/SCALE and are used again by other experiments.
    """
    experiment = find_experiment(name)
    out = Path(out)
    with open_lab(out, scale, seeds) as lab:
        began = time.perf_counter()
        figures = json.loads(json.dumps(experiment.measure(lab), default=_plain))
        seconds = time.perf_counter() - began
    agrees, sentence = experiment.verdict(figures)
    result = {
        "experiment": name,
        "title": experiment.title,
        "paper": experiment.paper,
        "command": f"retro-np experiment {name}" + _options(scale, seeds),
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
    experiment.draw(figures, out / f"{name}.png")
    write_json(out / f"{name}.json", result)
    return result


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
    return ("" if scale == "small" else f" --scale {scale}") + ("" if seeds == 3 else f" --seeds {seeds}")


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
