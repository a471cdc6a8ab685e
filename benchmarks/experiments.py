"""EXPERIMENTS.md's results from docs/experiments/NAME.json and .png, which `retro-np experiment NAME` wrote.

python benchmarks/experiments.py          rewrite the section
python benchmarks/experiments.py --check  exit with 1 where the section is not what the results say
"""

import json

from report import ROOT, main

from retro_np.experiments.experiment import NAMES

RECORDS = ROOT / "docs" / "experiments"
AGREEMENT = {
    True: "The shape agrees.",
    False: "The shape does not agree.",
    None: "There is no shape to agree with.",
}


def record(name):
    """What an experiment left, as Markdown; and where nothing was recorded, so much."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        return [f"### {name}", "No full run of this experiment has been recorded yet."]
    found = json.loads(path.read_text(encoding="utf-8"))
    machine = found["machine"]
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    minutes = f"{found['seconds'] / 60:.0f} minutes" if found["seconds"] >= 90 else f"{found['seconds']:.0f} s"
    return [
        f"### {name}: {found['title'][0].lower()}{found['title'][1:]}",
        f"*The paper.* {found['paper']}",
        f"*Here.* {found['verdict']} **{AGREEMENT[found['agrees']]}**",
        f"![{found['title']}](docs/experiments/{name}.png)",
        f"`{found['command']}`: {seeds}, {machine['cores']} cores ({machine['processor']}), "
        f"{minutes} beyond what it found in the lab. "
        f"All figures: [docs/experiments/{name}.json](docs/experiments/{name}.json).",
    ]


def section():
    """All experiments, in the order in which `retro-np experiment` lists them."""
    return "\n\n".join(part for name in NAMES for part in record(name))


if __name__ == "__main__":
    main(ROOT / "EXPERIMENTS.md", "experiments.py", {"results": section()}, __doc__)
