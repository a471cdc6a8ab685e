"""The results in EXPERIMENTS.md, made from docs/experiments/NAME.json and .png, which `retro-np experiment NAME` wrote.

python benchmarks/experiments.py          rewrite the section
python benchmarks/experiments.py --check  exit with 1 if the section differs from the results
"""

import json
import re
from collections import Counter

from report import ROOT, main, table

from retro_np.commands.experiments import AGREEMENT
from retro_np.experiments.experiment import experiments

RECORDS = ROOT / "docs" / "experiments"


# Where a recorded result carries less than the verdict of its experiment's rule: that verdict, what is said, and why
IN_PART, NOT_SETTLED = "in part", "not settled"
LIMITS = {
    "neighbours": ("agrees", IN_PART, "at widths 64 and 128, with one seed; at width 32 the curve is flat"),
    "retrofit-lm": (
        "agrees",
        NOT_SETTLED,
        "the paper's form was trained on far less than 3 % of the sequences of pretraining",
    ),
    "ablations": ("disagrees", NOT_SETTLED, "after 300 steps of one seed, most changes are too small to tell"),
    "knowledge": ("agrees", IN_PART, "with a claim of which the paper gives no figures"),
    "samples": ("disagrees", NOT_SETTLED, "the difference in the prompt's document is below two standard errors"),
}
WORDS = {"agrees": "yes", "disagrees": "no", "cannot be told": "nothing to compare with"}
ROWS = (
    "The rows: *on*, with the trained memory; *others*, with the neighbours of other chunks; *in-context*, retrieved "
    "text in the prompt; *knn-lm* and *cache*, two memories that need no training; *adapted*, the model trained in as "
    "many steps without retrieval; *untrained*, the memory before any training; *shipped*, the memory of the package, "
    "which was trained on the translations, Python source and the reference of a command line, and not on "
    "documentation or man pages; *paper-form*, a fresh encoder and cross-attention; + mixes two predictions. The "
    "columns: the translations; *documentation*, the manual of CMake; the man pages; and *no shared content*, the "
    "manual again, with the translations as database and a memory trained on these. Otherwise *on* and *adapted* were "
    "trained on other documents of the same corpus. On documentation, *on* begins with *shipped*, so it has had more "
    "training than *adapted*. The trained memory has three seeds, every other row one."
)
NOTES = {
    "pretrained": "What is left without near-copies depends on how much of one long module is scored, and is not "
    "settled ([tutorial 8](tutorials/08_is_it_leakage.ipynb)).",
}
FEW = 12  # comparisons with the model without a memory that fit into a sentence


def recorded():
    """The results of the experiments of which a full run was recorded, by name, in the order of the list."""
    files = {name: RECORDS / f"{name}.json" for name in experiments()}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def overview():
    """How many results agree with the paper, and which."""
    results = recorded()
    counts = Counter(word_and_reason(name, result)[0] for name, result in results.items())
    rows = [
        [f"[{result['title']}](#{anchor(result['title'], name)})", ": ".join(word_and_reason(name, result))]
        for name, result in results.items()
    ]
    return (
        f"Of the {sum(counts.values()) - counts[WORDS['cannot be told']]} results that the paper has something to say "
        f"about, **{counts[WORDS['disagrees']]} do not agree with it, {counts[WORDS['agrees']]} agree, "
        f"{counts[IN_PART]} agree in part, and {counts[NOT_SETTLED]} are not settled**.\n\n"
        + table(["experiment", "agrees with the paper"], rows)
    )


def anchor(title, name):
    """The anchor that GitHub and the book give to a result's heading."""
    return re.sub(r"[^\w\- ]", "", f"{title} ({name})".lower()).replace(" ", "-")


def differences(result):
    """A table of the differences to the model without a memory on whole corpora, in per cent with their intervals."""
    corpora = result["figures"].get("corpora", {})
    whole = [each for each in result["comparisons"] if each["against"] == "base" and each["corpus"] in corpora]
    whole = [each for each in whole if each["alpha"] is None]
    if len(whole) <= FEW:
        return []
    # The memory of the package was trained on some documents of a corpus. There its figure says nothing.
    known = {name for name, facts in corpora.items() if facts["shipped_trained_on"]}
    whole = [each for each in whole if not (each["of"].startswith("shipped") and each["corpus"] in known)]
    cells = {(each["of"], each["corpus"]): shown(each) for each in whole}
    names = dict.fromkeys(each["of"] for each in whole if each["of"] != "off")  # OFF is the base, bit for bit
    rows = [[name, *(cells.get((name, corpus), "") for corpus in corpora)] for name in names]
    asked = {"corpus": "man pages, similarity below 0.1", "of": "shipped", "against": "base", "alpha": None}
    (apart,) = (each for each in result["comparisons"] if asked.items() <= each.items())
    copies = f" On the {apart['documents']} of {corpora['man pages']['documents']} man pages without a near-copy, "
    copies += f"*shipped* has {shown(apart)}."
    return [ROWS + copies, table(["change of the model's bits per byte, % [95 % interval]", *corpora], rows)]


def shown(comparison):
    """A difference in per cent and its interval."""
    ends = comparison["interval_percent"]
    return f"{comparison['difference_percent']:+.1f}" + (f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "")


def word_and_reason(name, result):
    """Whether a result agrees with the paper, in the words of the table at the top: one word, or one and its reason."""
    verdict, *limit = LIMITS.get(name, (None,))
    return limit if verdict == result["verdict"] else [WORDS[result["verdict"]]]


def agreement(name, result):
    """The same as a sentence."""
    word, *reason = word_and_reason(name, result)
    sentence = {
        IN_PART: "This agrees with the paper in part", NOT_SETTLED: "Whether this agrees with the paper is not settled",
    }  # fmt: skip
    return f"{sentence[word]}: {reason[0]}." if reason else AGREEMENT[result["verdict"]]


def record(name, result):
    """The result of an experiment as Markdown paragraphs. result: None if no full run was recorded."""
    if result is None:
        return [f"### {name}", "No full run of this experiment has been recorded yet."]
    machine = result["machine"]
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    time = f"{result['seconds'] / 60:.0f} minutes" if result["seconds"] >= 90 else f"{result['seconds']:.0f} s"
    return [
        f"### {result['title']} (`{name}`)",
        f"*The paper.* {result['paper']}",
        f"*Here.* {result['sentence']} **{agreement(name, result)}**",
        *filter(None, [NOTES.get(name)]),
        *differences(result),
        f"![{result['title']}](docs/experiments/{name}.png)",
        f"`{result['command']}`: {seeds}, {machine['cores']} cores ({machine['processor']}), {time}, not counting "
        f"what was already in the lab. All figures: [docs/experiments/{name}.json](docs/experiments/{name}.json).",
    ]


def section():
    """All experiments, in the order in which `retro-np experiment` lists them."""
    results = recorded()
    return "\n\n".join(part for name in experiments() for part in record(name, results.get(name)))


if __name__ == "__main__":
    main(ROOT / "EXPERIMENTS.md", "experiments.py", {"overview": overview(), "results": section()}, __doc__)
