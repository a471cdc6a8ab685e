"""Find an experiment by name, run it, and write its result: NAME.json and NAME.png.

Each module of this package that defines EXPERIMENT is an experiment. Its name is the module's, with dashes."""

import contextlib
import importlib
import json
import pkgutil
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

import retro_np.experiments
from retro_np.errors import UserError
from retro_np.evaluation.compare import OFF, ON, SHUFFLED, more_or_fewer
from retro_np.experiments.lab import SCALES, Lab
from retro_np.files import locked, outputs, remove_partial, write_json
from retro_np.kernels.threads import cores

SEEDS = 3  # seeds of an experiment whose claim depends on the spread over seeds

Figures = dict[str, Any]
Picture = Path  # the PNG file to draw
Verdict = tuple[bool | None, str]


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper, or a comparison of our own."""

    title: str
    paper: str  # what the paper shows, and where
    measure: Callable[[Lab], Figures]  # returns plain values for JSON
    draw: Callable[[Figures, Picture], None]
    verdict: Callable[[Figures], Verdict]  # whether it agrees (None: nothing to compare), and a summary
    over_seeds: bool = True  # whether to train models with `lab.seeds` seeds rather than with one
    position: int = 1000  # order in the list of experiments


def described(documentation: str | None) -> tuple[str, str]:
    """An experiment's title and what the paper shows: the first and the last paragraph of its module's docstring."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in (documentation or "").split("\n\n")]
    return paragraphs[0], paragraphs[-1]


def sentence(module: str, figures: Figures, **values: Any) -> str:
    """What verdicts.md says about the figures of an experiment, given the name of its module and further values."""
    texts = Environment(undefined=StrictUndefined)
    texts.globals |= {"ON": ON, "OFF": OFF, "SHUFFLED": SHUFFLED}
    texts.filters["percent"] = lambda share, digits=2: f"{100 * share:.{digits}f} %"
    texts.filters["fixed"] = lambda number, digits=4: f"{number:.{digits}f}"
    texts.filters["bits"] = more_or_fewer
    template = texts.from_string(files(retro_np.experiments).joinpath("verdicts.md").read_text(encoding="utf-8"))
    block = template.blocks[module.rpartition(".")[2]]
    return " ".join("".join(block(template.new_context(figures | values))).split())


def experiments() -> dict[str, Experiment]:
    """All experiments by name, in the order of their positions. This imports every module of the package."""
    found = {name: getattr(importlib.import_module(path), "EXPERIMENT", None) for name, path in _modules().items()}
    return dict(sorted(((name, one) for name, one in found.items() if one), key=lambda item: item[1].position))


def find_experiment(name: str) -> Experiment:
    """The experiment with this name, importing only its module. Raises UserError for an unknown name."""
    path = _modules().get(name)
    experiment = getattr(importlib.import_module(path), "EXPERIMENT", None) if path else None
    if experiment is None:
        raise UserError(f"no experiment {name!r}; choose from {', '.join(experiments())}")
    return experiment


def _modules():
    package = retro_np.experiments
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return {name.replace("_", "-"): f"{package.__name__}.{name}" for name in names}


def run_experiment(name: str, out: Path | str, scale: str = "small", seeds: int | None = None) -> dict[str, Any]:
    """Run an experiment, or resume it, and write NAME.json and NAME.png. Returns the contents of NAME.json.

    out: the folder for the results; unless the scale is small, they go to OUT/SCALE. Databases, models and scores are
    stored in OUT/SCALE, where other experiments find them. seeds: None means three, or one for an experiment that uses
    one seed. Raises UserError for an unknown name or scale, and if such an experiment is asked for several seeds."""
    experiment, out = find_experiment(name), Path(out)
    default_seeds = SEEDS if experiment.over_seeds else 1
    seeds = seeds or default_seeds
    if seeds != 1 and not experiment.over_seeds:
        raise UserError(f"{name} trains models of one seed; leave out --seeds")
    record, picture = (result_folder(out, scale) / f"{name}.{suffix}" for suffix in ("json", "png"))
    for file in (record, picture):
        if file.is_dir() or (file.exists() and not outputs.is_mark(record, outputs.has_keys("experiment", "figures"))):
            raise UserError(f"{file} was not written by this command; choose another folder with -o")
    with open_lab(out, scale, seeds) as lab:
        start = time.perf_counter()
        # NumPy's arrays and numbers become plain values.
        figures = json.loads(json.dumps(experiment.measure(lab), default=lambda value: value.tolist()))
        seconds = time.perf_counter() - start
    agrees, sentence = experiment.verdict(figures)
    given = {"scale": (scale, "small"), "seeds": (seeds, default_seeds)}
    options = "".join(f" --{option} {value}" for option, (value, default) in given.items() if value != default)
    result = {
        "experiment": name, "title": experiment.title, "paper": experiment.paper,
        "command": f"retro-np experiment {name}{options}", "scale": asdict(SCALES[scale]), "seeds": seeds,
        "machine": {
            "cores": cores(), "processor": _processor(), "retro_np": retro_np.__version__,
            "numpy": np.__version__,
        },
        "seconds": round(seconds, 1),  # This run alone. Earlier runs may have left models and scores.
        "agrees": agrees, "verdict": sentence, "figures": figures,
    }  # fmt: skip
    experiment.draw(figures, picture)
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN and no infinities.
    write_json(record, result)
    return result


def result_folder(out: Path, scale: str) -> Path:
    """The folder of a scale's results. A tiny run has its own, so that it does not replace a full run's results."""
    return out if scale == "small" else out / scale


@contextlib.contextmanager
def open_lab(out: Path, scale: str, seeds: int = SEEDS) -> Iterator[Lab]:
    """The lab in OUT/SCALE, locked against other processes. Raises UserError for an unknown scale."""
    if scale not in SCALES:
        raise UserError(f"no scale {scale!r}; choose from {', '.join(SCALES)}")
    outputs.claim(out, outputs.LAB)
    lab = Lab(out / scale, SCALES[scale], seeds)
    with locked(lab.folder, "experiment"):
        remove_partial(lab.folder, ("scores",))
        yield lab


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:(.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return model[1].strip() if model else platform.processor() or platform.machine()
