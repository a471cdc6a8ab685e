"""Find an experiment by name, run it, and write its result: NAME.json and NAME.png.

An experiment is a figure or table of the paper, or a comparison of our own: a module of this package that defines

    measure(lab) → figures          plain values for JSON; what is in "comparisons" stands beside them in the record
    draw(figures, picture)          writes the PNG file
    verdict(figures) → Verdict      whether it agrees with the paper (None: nothing to compare), and a summary

Its name is the module's, with dashes. Its docstring begins with the title and ends with what the paper shows."""

import contextlib
import importlib
import json
import pkgutil
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from types import ModuleType
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
# The order of the list, and whether an experiment trains models with `lab.seeds` seeds, as any other does, or with one
OVER_SEEDS = {
    "random-neighbours": True, "leakage": True, "database-size": True, "neighbours": False, "model-size": False,
    "retrofit": False, "retrofit-lm": True, "ablations": False, "subsets": True, "chunk-size": True,
    "second-corpus": True, "wikitext-style": False, "knowledge": True, "question-answering": False, "samples": False,
    "pretrained": False,
}  # fmt: skip

IN_WORDS = {True: "agrees", False: "disagrees", None: "cannot be told"}  # as a record says it

Figures = dict[str, Any]
Picture = Path  # the PNG file to draw
Verdict = tuple[bool | None, str]


def described(experiment: ModuleType) -> tuple[str, str]:
    """An experiment's title and what the paper shows: the first and the last paragraph of its docstring.

    A module whose PAPER_SHOWS is computed from its figures has that in place of the last paragraph."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in (experiment.__doc__ or "").split("\n\n")]
    return paragraphs[0], getattr(experiment, "PAPER_SHOWS", paragraphs[-1])


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


def experiments() -> dict[str, ModuleType]:
    """All experiments by name, in the order of OVER_SEEDS, others last. This imports every module of the package."""
    found = {name: importlib.import_module(path) for name, path in _modules().items()}
    order = [*OVER_SEEDS, *found]
    return {name: found[name] for name in sorted(found, key=order.index) if hasattr(found[name], "measure")}


def find_experiment(name: str) -> ModuleType:
    """The experiment with this name, importing only its module. Raises UserError for an unknown name."""
    path = _modules().get(name)
    experiment = importlib.import_module(path) if path else None
    if experiment is None or not hasattr(experiment, "measure"):
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
    default_seeds = SEEDS if OVER_SEEDS.get(name, True) else 1
    seeds = seeds or default_seeds
    if seeds > default_seeds == 1:
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
    (title, paper), (agrees, sentence) = described(experiment), experiment.verdict(figures)
    given = {"scale": (scale, "small"), "seeds": (seeds, default_seeds)}
    options = "".join(f" --{option} {value}" for option, (value, default) in given.items() if value != default)
    versions = {"retro_np": retro_np.__version__, "numpy": np.__version__}
    result = {
        "experiment": name, "title": title, "paper": paper,
        "command": f"retro-np experiment {name}{options}", "scale": asdict(SCALES[scale]), "seeds": seeds,
        "machine": {"cores": cores(), "processor": _processor(), **versions},
        "seconds": round(seconds, 1),  # This run alone. Earlier runs may have left models and scores.
        "verdict": IN_WORDS[agrees], "sentence": sentence,
        "comparisons": figures.get("comparisons", []),
        "figures": {key: value for key, value in figures.items() if key != "comparisons"},
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
