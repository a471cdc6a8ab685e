"""The results in EXPERIMENTS.md, made from docs/experiments/NAME.json and .png, which `retro-np experiment NAME` wrote.

python benchmarks/experiments.py          rewrite the section
python benchmarks/experiments.py --check  exit with 1 if the section differs from the results
"""

import json

from report import ROOT, main

from retro_np.commands.experiments import AGREEMENT
from retro_np.experiments.experiment import experiments

RECORDS = ROOT / "docs" / "experiments"


def record(name):
    """The result of an experiment as Markdown paragraphs."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        return [f"### {name}", "No full run of this experiment has been recorded yet."]
    result = json.loads(path.read_text(encoding="utf-8"))
    machine = result["machine"]
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    time = f"{result['seconds'] / 60:.0f} minutes" if result["seconds"] >= 90 else f"{result['seconds']:.0f} s"
    return [
        f"### {result['title']} (`{name}`)",
        f"*The paper.* {result['paper']}",
        f"*Here.* {result['sentence']} **{AGREEMENT[result['verdict']]}**",
        f"![{result['title']}](docs/experiments/{name}.png)",
        f"`{result['command']}`: {seeds}, {machine['cores']} cores ({machine['processor']}), {time}, not counting "
        f"what was already in the lab. All figures: [docs/experiments/{name}.json](docs/experiments/{name}.json).",
    ]


def section():
    """All experiments, in the order in which `retro-np experiment` lists them."""
    return "\n\n".join(part for name in experiments() for part in record(name))


if __name__ == "__main__":
    main(ROOT / "EXPERIMENTS.md", "experiments.py", {"results": section()}, __doc__)
