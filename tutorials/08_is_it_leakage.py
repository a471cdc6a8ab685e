# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8 · Is it leakage?
#
# You give your model a database, and its bits per byte fall by a sixth. Should you celebrate? A model with a database
# can look things up. If the text that it is tested on stands in the database, or most of it does, the figure falls as
# far as you like and says nothing. The paper takes this seriously enough to give it a section and a measure of its own
# ([Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426), §2.6). We shall first make the mistake, with a splendid
# result, and then take the result apart. At the end we do the same with this project's own headline.
#
# *Reading: about 60 minutes · runs in 25 s on one core · needs tutorials 1 and 7.*
#
# Afterwards you can
#
# - compute the 13-gram Jaccard similarity of two texts, and say which edits bring it below 0.8;
# - say what $s(C)$ and $\mathrm{bpb}(\alpha)$ are, and read a plot of the latter;
# - name four ways in which the text to be predicted gets into what is retrieved, and what stops or shows each of them;
# - say when a gain from retrieval is leakage, and why the control of [tutorial 7](07_train_one.ipynb), the neighbours
#   of others, cannot tell;
# - ask of any comparison whether it was made at equal tokens or at equal compute.
#
# *On the path "Understand it" of the book's contents, read to the end of "What the gain is made of", then "The curve
# that tells", "This project's own headline" and "When is a gain leakage?". These sections say in a sentence what they
# need of the rest.*
#
# The model is the one that comes with the package. It was trained on Python's standard library, without the modules
# that are evaluated here. Two aids helped it to learn, which tutorial 7 describes in "Aids for the impatient". Its
# first weights were a rough copying machine. And for the first third of training, some chunks got better neighbours
# than any search could find. The evaluation uses no such neighbours. The keys of its database are those of tutorial 1,
# hashed tokens, which find text that shares words. The library is that of your own Python, so the figures differ a
# little from one version to the next. The text therefore says which way a figure goes, and `assert` statements check
# it.
#
# Previous: [tutorial 7](07_train_one.ipynb) · Next: [tutorial 9](09_sampling_with_a_memory.ipynb) · The chunks and
# their neighbours: [tutorial 1](01_chunks_neighbours_and_a_database.ipynb) · The command:
# [evaluation](../docs/evaluation.md)

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import json
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import count_parameters, evaluate, paired_bootstrap, retro_loss, score
from retro_np.evaluation.copying import copy_bound
from retro_np.evaluation.leakage import ALPHAS, chunk_leakage, filtered_bits_per_byte
from retro_np.experiments.pretrained import BUNDLED_BUILD
from retro_np.kernels.substring import longest_common_substring
from retro_np.pretrained.models import load_pretrained
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.deduplicate import DedupConfig, detection_probability, jaccard, signatures
from retro_np.retrieval.documents import chained
from retro_np.retrieval.tokenizer import token_texts
from retro_np.tutorials.checks.tutorial_08 import check_8_1, check_8_2, check_8_3

BLUE, ORANGE, GREY = "#2b7bba", "#e07b1f", "#8c8c8c"

# %% [markdown]
# ## A splendid result
#
# Our corpus has thirty modules of the standard library, and six more to be evaluated. Which modules are held out is
# settled by a hash of the name, the same on every machine, so the bundled model has never seen these six. Now some kind
# soul has kept copies of them, as `backup/bz2.py` and so on. Those are other names with other hashes, so the copies go
# into the database. Nothing is filtered.

# %%
HELD = ["bz2", "copyreg", "email/_encoded_words", "sched", "secrets", "timeit"]
OTHERS = [
    "bisect", "cmd", "codeop", "contextlib", "copy", "csv", "filecmp", "fileinput", "fnmatch", "getopt", "glob",
    "gzip", "heapq", "hmac", "linecache", "lzma", "numbers", "pprint", "profile", "queue", "random", "reprlib",
    "shelve", "shlex", "stat", "string", "tabnanny", "tempfile", "textwrap", "weakref",
]  # fmt: skip
library = Path(sysconfig.get_paths()["stdlib"])


def texts(names, folder=""):
    """Modules of the library, by the name that each has in the corpus."""
    return {f"{folder}{name}.py": (library / f"{name}.py").read_text(encoding="utf-8") for name in names}


plain, copies = texts(HELD + OTHERS), texts(HELD, "backup/")
temporary = tempfile.TemporaryDirectory()  # It is removed when the notebook ends.
home = Path(temporary.name)


def built(name, documents, **changes):
    """A database of these documents, cut into chunks as the bundled model wants it."""
    corpus = home / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"name": n, "text": t}) + "\n" for n, t in documents.items()))
    build = BuildConfig(chunk_size=16, d_key=256, neighbours=16, extra_candidates=16, **BUNDLED_BUILD)
    return build_database(corpus, home / name, replace(build, **changes), "hashing")


leaky = built("leaky", plain | copies, duplicates=None)
for name, counts in leaky.manifest["splits"].items():
    print(f"{name:6} {counts['documents']} documents, {counts['chunks']:,} chunks")
assert leaky.manifest["splits"]["valid"]["documents"] == len(HELD)

# %% [markdown]
# Three scores, as in tutorial 7: without retrieval, with it, and with the neighbours of other chunks. All three are of
# the same model. The unit is bits per byte, the bits that the model needs for the text divided by the text's bytes, as
# in [tutorial 0](00_a_language_model.ipynb). Each chunk may read $k = 2$ neighbours. The model sees a document through
# a window of 256 tokens that moves on by 128, so after the first window each scored token has at least 128 before it.

# %%
params, config, _ = load_pretrained()


def scored(database, k=2, **settings):
    return score(params, config, database, k=k, sequence_length=256, stride=128, **settings)


off = scored(leaky, k=0)
on, others = scored(leaky), scored(leaky, shuffle_seed=0)
for name, losses in (("without retrieval", off), ("with retrieval", on), ("with the neighbours of others", others)):
    print(f"{name:30} {losses.bits_per_byte():.3f} bits per byte")
saving = {"copies": 1 - on.bits_per_byte() / off.bits_per_byte()}
print(f"{100 * saving['copies']:.1f} % saved by retrieval")
assert saving["copies"] > 0.08
assert 1 - others.bits_per_byte() / off.bits_per_byte() < 0.2 * saving["copies"]

# %% [markdown]
# That much is saved on modules that the model has never seen. For comparison: on the corpus C4, the paper's baseline
# with 132 million parameters needs 0.98 bits per byte, and the one with 1.3 billion needs 0.84. Those 14 % took ten
# times the parameters. We saved more, with a database and a model of two million.
#
# The control agrees, too. With the neighbours of others the gain is gone, so it is the neighbours that did it. All of
# this is true. But the control shows only *that* a model reads, which is what it is for. It cannot say whether the text
# that the model reads should have been there.
#
# ## What the gain is made of
#
# The paper's measure asks, for each evaluated chunk $C$, how much of it stands in what was retrieved. Take the values
# of its ten nearest neighbours. Find the longest run of consecutive tokens that $C$ has in common with any one of them,
# and divide the run's length by $m$:
#
# $$s(C) = \frac{\text{tokens in the longest common run}}{m}.$$
#
# The paper writes $r(C)$; here $r$ is the length of a neighbour. Our model reads only two of the ten neighbours, so the
# measure is on the strict side: it counts text that the model may not have seen. $s(C)$ is 0 if no token is shared, and
# 1 if all of $C$ stands in a value from end to end. A small example, with a chunk of eight tokens and two values:

# %%
chunk = np.array([[11, 12, 13, 14, 15, 16, 17, 18]])
values = np.array([[[3, 11, 12, 3, 13, 14, 15, 3, 3, 3, 3, 3, 3, 3, 3, 3], [18, 17, 16, 15, 14, 13, 12, 11, *[0] * 8]]])
run = longest_common_substring(chunk, values)
print(f"longest run: {run[0]} tokens, so s(C) = {run[0] / chunk.shape[1]}")

# %% [markdown]
# The longest run is 13, 14, 15, so $s(C) =$ **0.375**. The second value holds all eight tokens, but in reverse order,
# so its longest run is a single token. A run is what can be copied. Now the evaluated chunks:

# %%
ratios = {"copies": chunk_leakage(leaky)}
print(f"{100 * np.mean(ratios['copies'] == 1):.0f} % of the evaluated chunks stand in a value from end to end")
assert np.mean(ratios["copies"] == 1) > 0.9

# %% [markdown]
# Nearly all of them stand in a value from end to end. So the experiment has measured whether the model can copy, and
# not what retrieval is worth on new text.
#
# ## Two texts that are nearly one
#
# How do you keep copies out of a database? By comparing documents before you build it. The paper compares sets of
# *13-grams*. In this book these are all runs of thirteen words of a text. The *Jaccard similarity* of two texts is
#
# $$J = \frac{\text{number of grams in both sets}}{\text{number of grams in at least one of them}}.$$
#
# Each training document with $J \ge 0.8$ to an evaluated document is left out (§2.1). Texts that were written apart
# hardly ever share a run of thirteen words. But such a run does not survive an edit either: one changed word destroys
# all thirteen grams that it is part of. Take a text of two hundred words, and change more and more of them:

# %%
words = [f"word{i}" for i in range(200)]


def edited(changes):
    """The text with that many words changed, far enough from each other that no gram holds two of them."""
    out = list(words)
    for i in np.linspace(20, 180, changes).astype(int):
        out[i] = "other"
    return " ".join(out)


for changes in (0, 1, 2, 3, 6, 10):
    print(f"{changes:2} words changed: {jaccard(' '.join(words), edited(changes)):.3f}")

# %% [markdown]
# One changed word in two hundred leaves a similarity of **0.871**, and two leave **0.757**. With two, the filter no
# longer takes the text for a duplicate. Why so fast? Each text has 188 grams. Each changed word takes thirteen of them
# out of what both have, and adds thirteen new ones to what at least one of them has:
#
# $$J = \frac{188 - 13 \cdot \text{words changed}}{188 + 13 \cdot \text{words changed}}.$$
#
# The threshold catches copies, also reformatted ones, since white space does not count. It lets through what somebody
# has gone over with a pen.
#
# Comparing each document with each other one is out of the question for the 1.8 billion of the paper. So of each set
# only a *signature* is kept: the minima of 128 hash functions over its grams
# ([Broder 1997](https://doi.org/10.1109/SEQUEN.1997.666900)). The share of equal minima in two signatures estimates
# $J$. The signature is cut into 32 bands of four minima, and only documents that agree in a whole band are looked at
# further, by their exact similarity. One band agrees with probability $J^4$, so a pair is found with probability
# $1 - (1 - J^4)^{32}$. A pair may be overlooked, but no document is left out because of an estimate.

# %%
settings = DedupConfig()
for changes in (0, 1, 2, 10):
    one, other = signatures([" ".join(words), edited(changes)], settings)
    exact = jaccard(" ".join(words), edited(changes))
    print(f"{changes:2} changed: {np.mean(one == other):.3f} of the minima are equal; J = {exact:.3f}", end="; ")
    print(f"found with probability {detection_probability(exact, settings):.4f}")
assert detection_probability(0.8, settings) > 0.9999

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
changed = np.arange(11)
left.plot(changed, [jaccard(" ".join(words), edited(c)) for c in changed], color=BLUE, marker="o", markersize=4)
similarities = np.linspace(0, 1, 101)
right.plot(similarities, [detection_probability(j, settings) for j in similarities], color=BLUE)
left.axhline(0.8, color="black", linestyle="--", linewidth=1)
left.annotate("left out above", (10, 0.8), xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9)
right.axvline(0.8, color="black", linestyle="--", linewidth=1)
left.set(xlabel="words changed, of 200", ylabel="Jaccard similarity J", ylim=(0, 1.05), xticks=changed[::2])
right.set(xlabel="Jaccard similarity J", ylabel="probability of being found", ylim=(0, 1.05))
figure.tight_layout()
plt.show()

# %% [markdown]
# *Figure 8.1.* The filter sees only texts that are nearly equal. A text with two changed words in two hundred passes
# (left), although the signatures would have found the pair (right). Dashed: the threshold.
#
# ## Mended
#
# Build the same corpus again, now with the filter, which is on by default. Each document that is left out is listed in
# `duplicates.jsonl`, together with the held-out document that it resembles.

# %%
mended = built("mended", plain | copies)
dropped = list(chained([mended.path / "duplicates.jsonl"]))
for record in dropped:
    print(
        f"{record['name']:30} is like {record['held_out']:24} estimated {record['estimated']}, exact {record['exact']}"
    )
assert [record["exact"] for record in dropped] == [1.0] * len(HELD)

on_mended, ratios["mended"] = scored(mended), chunk_leakage(mended)
saving["mended"] = 1 - on_mended.bits_per_byte() / off.bits_per_byte()
print(f"saved: {100 * saving['mended']:.1f} %; with the copies it was {100 * saving['copies']:.1f} %")
assert saving["mended"] < 0.5 * saving["copies"]

# %% [markdown]
# Without the copies, little of the saving is left. And even here not every likeness is gone: `bz2.py` has much in
# common with `lzma.py`, which is in the database. Figure 8.3 will show that this little is not even certain to be a
# gain.
#
# ## Past the filter: halves
#
# The second mistake is quieter. This time nobody has kept whole copies. But the lower half of each of the six modules
# has been pasted to the end of another file. None of these files has a similarity of 0.8 with a held-out module. The
# filter is on, and sees nothing.

# %%
halves = {}
for name, host in zip(HELD, OTHERS, strict=False):
    lines = plain[f"{name}.py"].splitlines(keepends=True)
    halves[f"legacy/{name}.py"] = plain[f"{host}.py"] + "".join(lines[len(lines) // 2 :])
    print(f"legacy/{name}.py: J = {jaccard(plain[f'{name}.py'], halves[f'legacy/{name}.py']):.2f} with {name}.py")
passed = built("passed", plain | halves)
assert not list(chained([passed.path / "duplicates.jsonl"]))

on_halves, ratios["halves"] = scored(passed), chunk_leakage(passed)
saving["halves"] = 1 - on_halves.bits_per_byte() / off.bits_per_byte()
print(f"saved: {100 * saving['halves']:.1f} %")
assert saving["halves"] > 1.5 * saving["mended"]

# %% [markdown]
# Retrieval seems to pay again. A filter on documents cannot tell why, but $s(C)$ can, since it looks at what each chunk
# retrieved. Here is a chunk of which half stands in a value, and then the distribution of $s(C)$ under each of the
# three databases.


# %% tags=["hide-input"]
def draw_common_run(database, row):
    """A chunk and the value that shares the longest run of tokens with it, one above the other."""
    split = database.split("valid")
    chunk, values = split.tokens[row], database.value(split.neighbours[row][:10])
    runs = [longest_common_substring(chunk[None], value[None, None])[0] for value in values]
    value, length = values[np.argmax(runs)], max(runs)
    starts = [(i, j) for i in range(len(chunk)) for j in range(len(value))]
    i, j = next(p for p in starts if length and np.array_equal(chunk[p[0] :][:length], value[p[1] :][:length]))
    _figure, axes = plt.subplots(figsize=(11, 1.3))
    for y, tokens, start, label in ((1, chunk, i, "C"), (0, value, j, "[N, F]")):
        x = 0
        axes.text(-2, y, label, ha="right", va="center", fontsize=10)
        for position, piece in enumerate(token_texts(database.tokenizer, tokens)):
            piece, shared = piece.replace("\n", "⏎"), start <= position < start + length
            box = {"facecolor": ORANGE if shared else "#eeeeee", "edgecolor": "white", "pad": 2}
            axes.text(x, y, piece, family="monospace", fontsize=8, color="white" if shared else "black", bbox=box)
            x += len(piece) + 0.8
    axes.set(xlim=(-2, 130), ylim=(-0.5, 1.6))
    axes.axis("off")
    plt.show()


half = int(np.flatnonzero((ratios["halves"] == 0.5) & (ratios["mended"] < 0.5))[0])
draw_common_run(passed, half)

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 3, figsize=(10, 2.4), sharex=True, sharey=True)
for axes, (name, colour) in zip(panels, {"mended": BLUE, "halves": ORANGE, "copies": GREY}.items(), strict=True):
    share = np.ones(len(ratios[name])) * 100 / len(ratios[name])
    axes.hist(ratios[name], bins=np.arange(18) / 16 - 1 / 32, weights=share, color=colour, edgecolor="white")
    axes.set(title=name, xlabel="s(C)", ylim=(0, 100))
    print(
        f"{name:7} {100 * np.mean(ratios[name] == 1):3.0f} % of the chunks stand in a value from end to end", end="; "
    )
    print(f"of {100 * np.mean(ratios[name] <= 0.5):3.0f} % no more than half does")
panels[0].set_ylabel("% of evaluated chunks")
figure.tight_layout()
plt.show()

# %% [markdown]
# *Figure 8.2.* Above: a chunk and the longest run of tokens (orange) that it shares with a value. Below: with copies
# nearly all chunks stand at 1, with halves about half of them do, and with the mended database few.
#
# ## The curve that tells
#
# The paper's $\mathrm{bpb}(\alpha)$, its equation 5, asks the model only about chunks that share little with what was
# retrieved. As above, $s(C)$ is the longest run of tokens that $C$ has in common with a retrieved value, as a share of
# the chunk's length. $\mathrm{bpb}(\alpha)$ is the bits per byte of all chunks with $s(C)$ up to a threshold $\alpha$:
#
# $$\mathrm{bpb}(\alpha) = \frac{\sum_{s(C) \le \alpha} -\log_2 p(C)}{\sum_{s(C) \le \alpha} \mathrm{bytes}(C)}.$$
#
# $\mathrm{bpb}(1)$ is the plain figure. For $\alpha = 12.5\,\%$ the paper speaks of no local leakage.
#
# We draw it for two databases. *mended* is the corpus without the copies. *halves* is the corpus with the lower half of
# each of the six modules pasted to the end of another file, which a filter on documents does not notice.
#
# The model with retrieval and the one without have to be compared on the *same* chunks. Chunks that stand in no other
# text are harder for both, so both curves rise to the left, and only the distance between them says something. How much
# does that distance depend on the six documents that happened to be held out? A *bootstrap* answers: draw six documents
# out of the six, with replacement, thousands of times, and see how far the saving varies. The range of the middle 95 %
# of the draws is called the interval. In the figure, the bars of the right panel show it; in print, it stands in
# brackets.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
without, given = (filtered_bits_per_byte(losses, ratios["halves"]) for losses in (off, on_halves))
left.plot(ALPHAS[2:], without[2:], color=GREY, marker="o", markersize=3, label="without retrieval")
left.plot(ALPHAS[2:], given[2:], color=ORANGE, marker="o", markersize=3, label="with the halves to read")
below = {}
for name, losses, colour, sideways in (("mended", on_mended, BLUE, -0.008), ("halves", on_halves, ORANGE, 0.008)):
    kept = {alpha: ratios[name] <= alpha for alpha in ALPHAS[2::2]}
    below[name] = {alpha: paired_bootstrap(losses[rows], off[rows]) for alpha, rows in kept.items()}
    differences = below[name].values()
    saved = -np.array([d.difference_percent for d in differences])
    bounds = -np.array([d.interval_percent or (np.nan, np.nan) for d in differences])  # none for fewer than 6 documents
    reach = np.abs(bounds[:, ::-1].T - saved)
    at = np.array(list(kept)) + sideways
    right.errorbar(at, saved, reach, color=colour, marker="o", markersize=4, capsize=2, linewidth=1, label=name)
right.axhline(0, color="black", linewidth=0.5)
left.set(xlabel="α", ylabel="bpb(α)", title="halves")
right.set(xlabel="α", ylabel="% of bits saved", title="saved, of the chunks up to α")
for axes in (left, right):
    axes.legend(frameon=False, fontsize=8)
figure.tight_layout()
plt.show()
for alpha in (1.0, 0.5, 0.125):
    for name in ("mended", "halves"):
        result, chunks = below[name][alpha], np.sum(ratios[name] <= alpha)
        low, high = sorted(-x for x in result.interval_percent or (np.nan, np.nan))
        print(f"α = {alpha:5}, {name}: saved {-result.difference_percent:5.1f} % [{low:5.1f}, {high:5.1f}]", end=" ")
        print(f"of the bits of {chunks} chunks, {result.documents} documents")
assert below["halves"][0.5].difference_percent > 0.5 * below["halves"][1.0].difference_percent

# %% [markdown]
# *Figure 8.3.* Nearly all of the gain from the halves is made on chunks of which more than half stands in a value. For
# $\alpha$ up to a half hardly anything is left of this gain, as with the mended database.
#
# The gain falls as $\alpha$ does. That is the shape of leakage. A model that had learned something from its neighbours
# beyond their wording would keep a part of its gain on the left. Filters on documents and $\mathrm{bpb}(\alpha)$ are
# two nets, and the second has the finer mesh. It cannot clean a corpus, though. It only says what a figure is worth.
#
# A caution: $\alpha$ is a share. In the paper's chunks of 64 tokens, $\alpha = 12.5\,\%$ allows a run of eight tokens.
# In ours of 16 it allows two, and two tokens of Python in a row occur nearly everywhere. So few chunks are left there,
# as the last two lines show. If fewer than six documents are left, there is no interval. Read the curve, not its left
# end.
#
# ## Past the filter: families
#
# The third way is the one that fools honest people. Python's `encodings` are tables of characters. `iso8859_6.py` and
# `palmos.py` are held out; their sisters `iso8859_1.py`, `iso8859_5.py` and so on are not. Nobody has copied anything,
# no similarity reaches 0.8, and yet the tables are *near-copies* of each other, which here means a similarity of at
# least 0.1. `evaluate`, which is also a command, knows this trap. It finds for each held-out document the most similar
# training document, and reports all figures twice: over all documents, and over those without a near-copy.
#
# Until now RETRO was compared with itself without retrieval. Here its rival is a *baseline*, the same decoder without
# encoder and cross-attention, trained on the same text. It comes with the package, too.

# %%
SISTERS = ["iso8859_1", "iso8859_5", "iso8859_8", "iso8859_9", "iso8859_15"]
tables = texts([f"encodings/{name}" for name in ("iso8859_6", "palmos", *SISTERS)])
more = texts(["email/contentmanager", "xml/sax/xmlreader"])  # These two are held out as well.
family = built("family", plain | more | tables)
assert not list(chained([family.path / "duplicates.jsonl"]))
baseline, baseline_config, _ = load_pretrained("baseline")
models = {"RETRO": (params, config), "baseline": (baseline, baseline_config)}
results = evaluate(models, family, home / "results", sequence_length=256, stride=128)


def against_baseline(figures):
    """RETRO[ON] against the baseline: percent of bits, and the interval over documents."""
    (row,) = (r for r in figures["comparisons"] if (r["of"], r["against"]) == ("on", "baseline") and not r.get("alpha"))
    low, high = row["interval_percent"] or (np.nan, np.nan)
    return f"{row['difference_percent']:+6.2f} % [{low:+.2f}, {high:+.2f}] over {row['documents']} documents"


print("bits that RETRO needs more (+) or fewer (-) than its baseline")
print("all documents       ", against_baseline(results))
print("without near-copies ", against_baseline(results["without_near_copies"]))
for part in results["parts"]["similarity"]:
    print(f"of this, similarity {part['from']:4} to {part['to']:4}: {part['contribution_percent']:+5.2f} %", end="")
    print(f", from {100 * part['share_of_bytes']:2.0f} % of the bytes")
clean, whole = results["without_near_copies"]["models"], {n: f["bpb"] for n, f in results["models"].items()}
assert whole["RETRO[ON]"] / whole["baseline"] < 0.98 < clean["RETRO[ON]"] / clean["baseline"]

# %% [markdown]
# Over all documents there is a saving that one would gladly report, if one does not look at its interval. The
# contributions in the last three lines add up to this saving, and they tell where it comes from: all of it from
# documents that have a near-copy in the database. These documents are the two tables, and `bz2.py`, which has much in
# common with `lzma.py`. Without the three, nothing is saved.
#
# ## The sequence itself
#
# The fourth way needs no copy at all. In training, each sequence is itself a part of the database. Its chunk $C_u$ is
# its own nearest neighbour, at the distance 0, and the continuation $F$ of that neighbour is $C_{u+1}$, the very text
# that is to be predicted next. The paper therefore leaves out neighbours that come from the sequence's own document
# (§2.3). What would happen without this rule? Search for training chunks as if there were none:

# %%
split = mended.split("train")
tokens, documents = np.asarray(split.tokens), np.asarray(split.documents)
followed = np.flatnonzero(documents[1:] == documents[:-1])[::20]  # every 20th of the chunks that another one follows
found, _ = mended.search_keys(mended.embed_chunks(tokens[followed]), 33)


def share_told(ids):
    """The share of chunks whose next chunk stands in their value from end to end."""
    following = tokens[followed + 1]
    return np.mean(longest_common_substring(following, mended.value(ids)[:, None]) >= (following != 0).sum(axis=1))


foreign = mended.document_of(found) != documents[followed][:, None]
first_foreign = np.where(foreign.any(axis=1), found[np.arange(len(found)), foreign.argmax(axis=1)], -1)
print(f"the nearest value gives away {100 * share_told(found[:, 0]):.0f} % of the next chunks;", end=" ")
print(f"the nearest of another document, {100 * share_told(first_foreign):.1f} %")
assert share_told(found[:, 0]) > 0.9
assert share_told(first_foreign) < 0.1

# %% [markdown]
# Without the rule, training would pay a model for copying $F$, and for little else. The training loss would be
# splendid, and the model would be helpless on new text. `build_database` and `sequence_neighbours` both keep the rule,
# the second one for all documents of which a sequence holds a piece.
#
# ## What copying alone would gain
#
# One more yardstick, which needs no retrieval model at all. Let our model, *without* retrieval, place a bet at each
# position. It looks for the longest run of its last tokens that also stands in the neighbours, and gives a part of its
# probability to the token that comes after that match. The size of this part is tuned for each length of match: on
# one half of the documents for the other half, so that nobody sees the answers. `copy_bound` computes what such a rule
# saves. If RETRO saves more, it does more than copy. If RETRO saves less, there is copying that it has not learned.

# %%
bound = copy_bound(params, config, mended, sequence_length=256)
print(f"nothing matches at {100 * bound['positions'][0]:.0f} % of the positions")
print(f"mended: copying by rule saves {100 * bound['gain_by_length']:.1f} %, RETRO {100 * saving['mended']:.1f} %")
assert bound["gain_by_length"] > 2 * saving["mended"]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.5, 2.8))
right, share = 100 * np.array(bound["right"]), 100 * np.array(bound["positions"])
axes.bar(range(1, 9), right[1:], color=BLUE)
for length in range(1, 9):
    text = f"{share[length]:.0f} %" if share[length] >= 1 else "< 1 %"
    axes.annotate(text, (length, right[length]), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
axes.set(xlabel="tokens that match (8: eight or more)", ylabel="% right after them", ylim=(0, 110))
plt.show()

# %% [markdown]
# *Figure 8.4.* The longer the match, the safer the bet. The numbers above the bars say how many of all positions have a
# match of this length.
#
# Even with the mended database, copying by rule saves several times what this small model does. This figure is cheap to
# obtain. Compute it before you train.
#
# ## This project's own headline
#
# Now put the project on the table. The rival is the *baseline*, the same decoder without encoder and cross-attention,
# trained on the same text. A module *has a near-copy* if a training document has a similarity of at least 0.1 to it: of
# the runs of thirteen words that stand in either, at least a tenth stand in both. The project has evaluated the bundled
# RETRO on held-out modules of the whole library twice, each time against the baseline. The command `retro-np demo`,
# whose figures stand in the [README](../README.md), scores the first 20,000 chunks. The experiment `pretrained`
# ([EXPERIMENTS.md](../EXPERIMENTS.md)) scores the first 16,000. Both reach the same 58 modules. In percent of the
# baseline's bits, with an interval of 95 % over modules:
#
# | RETRO | chunks | all 58 modules | the 43 without near-copies |
# | --- | --- | --- | --- |
# | with its own neighbours | 20,000 | −3.65 % [−10.26, −0.73] | −0.27 % [−1.94, +0.76] |
# | | 16,000 | −5.75 % [−10.73, −2.70] | −1.17 % [−1.95, −0.47] |
# | with the neighbours of others | 20,000 | +2.27 % [+1.43, +3.15] | +1.55 % [+0.72, +2.11] |
# | | 16,000 | +2.14 % [+1.34, +3.30] | +1.07 % [+0.71, +1.51] |
#
# You can read this table now. The neighbours of others cost bits, so the model reads. Its own neighbours save bits,
# over all modules clearly so. And most of that saving goes away with the fifteen modules that have near-copies. It was
# made of text that a module shares with the database. An example is the family of character tables in `encodings`: some
# of them are held out, and their sisters are not.
#
# But does *anything* remain without them? One run says yes: the interval leaves out zero. The other run cannot tell. It
# is the same model on the same modules, so how can that be? Both runs stop within the 58th module,
# `pydoc_data/topics.py`. That is 0.76 MB of English prose, Python's help texts, with no near-copy. The demo scores
# 4,000 chunks more of it, and has 774,595 bytes without near-copies where the experiment has 564,981. On what the demo
# scores of this one file, RETRO needs 1.72 % *more* bits than the baseline; on the other 42 modules, it needs 1.49 %
# fewer. The two results differ only in how much of the file is mixed in.
#
# So whether this RETRO saves anything on text without near-copies depends on one file, and is not settled. Note how
# quietly this happens. Bits per byte count bytes, so one long document can outweigh many short ones. Ask of each figure
# not only how many documents it has, but how large the largest is.
#
# The other experiments say where the gain is made.
#
# - `leakage`: over three trainings, RETRO saves 5.62 % of its baseline's bits on all chunks, and *needs* 0.81 % more at
#   $\alpha = 12.5\,\%$, where 1 % of the chunks remain. The paper's RETRO is below its baseline at every $\alpha$.
# - `random-neighbours`: copying by rule saves 7.98 % of the baseline's bits. That is more than RETRO's 5.62 %. The rule
#   lets the baseline bet on the token that comes after the longest match in the neighbours, as in "What copying alone
#   would gain".
# - `second-corpus`: on a corpus whose documents share much text, the goal was to save 5 %, and 1 % at $\alpha =
#   12.5\,\%$. RETRO saves 22.52 % on all chunks, and needs 1.97 % more bits at $\alpha = 12.5\,\%$. So the second goal
#   was missed.
# - `subsets`: retrieval saves 39.32 % of the bits of `encodings`, more than anywhere else in the library. Sorted
#   by what they save, the library's parts are nearly in the order of their mean $s(C)$. The rank correlation of the two
#   orders is 0.82, and 1 would be the same order.
#
# So the gain of our small models is mostly copying, and a simple rule copies better. The paper's large models do more
# than copy, by its figures. Whether a language model that can already write gains more from a memory is the question of
# [tutorial 13](13_a_memory_for_a_language_model.ipynb).
#
# ## Equal tokens or equal compute?
#
# One question is left, and it is not about leakage. RETRO and its baseline were trained on equally many *tokens*. Did
# they cost the same? Take a training step of each:

# %%
rng = np.random.default_rng(0)
inputs, targets = rng.integers(1, config.vocabulary_size, (2, 2, 256))
neighbours = rng.integers(1, config.vocabulary_size, (2, 256 // 16, 2, 32))


def seconds(*model_and_neighbours):
    """Of forward and backward pass on a batch: the least of three."""
    (params, config), neighbours = model_and_neighbours
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        _loss, vjp = retro_loss(params, config, inputs, targets, neighbours)
        vjp()
        times.append(time.perf_counter() - begin)
    return min(times)


ratio = seconds(models["RETRO"], neighbours) / seconds(models["baseline"], None)
print(f"a step of RETRO takes {ratio:.1f} times as long as one of its baseline")
more = count_parameters(config) / count_parameters(baseline_config) - 1
print(f"its encoder reads {neighbours.size / inputs.size:.0f} tokens for each token of the decoder", end="; ")
print(f"encoder and cross-attention add {100 * more:.0f} % to the baseline's parameters, without embeddings")
assert 1.3 < ratio < 6

# %% [markdown]
# It takes about twice as long. With $k = 2$ neighbours of $2m$ tokens for each chunk of $m$, the encoder reads four
# tokens for each one that the decoder reads, and it is not small. In the paper's largest model that matters little: its
# encoder keeps its size while the decoder grows, and RETRO has only 8 % more parameters than its baseline there.
#
# So in the time in which our RETRO is trained, its baseline could take about twice as many steps. Neither has gone
# through the whole training text even once, so more steps would still help. Nothing recorded in
# [EXPERIMENTS.md](../EXPERIMENTS.md) shows RETRO ahead of its baseline at equal compute, and you should not expect it
# at this scale. The record that comes closest, `model-size`, compares by parameters. To be as good as the RETRO of
# width 128, a model without retrieval would need, by extrapolation, 1.67 times the parameters of the baseline that was
# trained. This is 1.08 times those of the RETRO, if embeddings are not counted. So a parameter spent on retrieval was
# worth little more than one spent on the decoder.
#
# ## When is a gain leakage?
#
# - If the gain is gone with the neighbours of others, the model reads. If it stays, it does not come from what was
#   retrieved.
# - If the two curves of $\mathrm{bpb}(\alpha)$ meet as $\alpha$ falls, the gain is copying of text that the database
#   shares. That may be just what you want: the code that one writes often stands elsewhere. As a claim about language
#   modelling it is leakage.
# - If the gain shrinks to nothing without the documents that have near-copies, it came from the near-copies.
# - If the gain is no larger than what copying by rule saves, nothing better than copying has been shown.
#
# Report a gain together with what is left of it at a small $\alpha$, or on a text newer than the database, as the paper
# does with Wikipedia articles of September 2021. And say whether it was made at equal tokens or at equal compute.
#
# ## Exercises
#
# **8.1** Write the Jaccard similarity of the sets of grams of two lists of words. A gram is a run of `size` words. A
# text with fewer words than that has one gram, of all its words.


# %% tags=["exercise"]
def similarity(a, b, size=13): ...


# %% tags=["check"]
check_8_1(similarity)

# %% [markdown]
# **8.2** Write $s(C)$: the longest run of tokens that a chunk `(m,)` has in common with any one of its values `(k, r)`,
# divided by $m$. Token 0 is padding and matches nothing. Plain loops are fine.


# %% tags=["exercise"]
def leakage(chunk, values): ...


# %% tags=["check"]
check_8_2(leakage)

# %% [markdown]
# **8.3** Write $\mathrm{bpb}(\alpha)$, from each chunk's nats, bytes and $s(C)$, all of shape `(chunks,)`. Return None
# if no byte is left.


# %% tags=["exercise"]
def filtered(nats, n_bytes, ratios, alpha): ...


# %% tags=["check"]
check_8_3(filtered)

# %% [markdown]
# ## What you have gained
#
# - Four ways in which the answer gets into what is retrieved: copies, parts of other files, families of near-copies,
#   and the sequence itself. A filter on documents stops the first, a rule of retrieval the last. The two in between
#   show in $\mathrm{bpb}(\alpha)$ and in figures without near-copies.
# - $s(C)$ says how much of a chunk could have been copied, and $\mathrm{bpb}(\alpha)$ what is left of a gain where
#   little could be. The neighbours of others show that a model reads, and cannot show that it should.
# - A gain comes with an interval over documents, with the question whether one long document decides it, and with the
#   question of what it cost.
# - The gain of this project's own small models is mostly copying. The project says so, and you can check it.
#
# Next: [tutorial 9 · Sampling with a memory](09_sampling_with_a_memory.ipynb)
