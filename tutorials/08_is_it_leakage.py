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
# A model with a database can look the answers up. If the text that it is evaluated on stands in the database, or most
# of it does, its bits per byte fall as far as one likes and say nothing. The paper (Borgeaud et al. 2022) takes this
# seriously enough to give it a section (2.6) and a measure of its own. This tutorial first makes the mistake, with a
# splendid result, and then takes the result apart.
#
# Afterwards you can
#
# - compute the 13-gram Jaccard similarity of two texts, and say which edits bring it below 0.8;
# - say what r(C) and bpb(α) are, and read a plot of the latter;
# - name three ways in which the text to be predicted gets into what is retrieved, and what stops each of them;
# - say when a gain from retrieval is leakage, and why the control of tutorial 7, others' neighbours, cannot tell.
#
# The model is the one that comes with the package, trained on Python's standard library without the modules that are
# evaluated here. The library is that of the reader's own Python, so the figures differ a little from one version to
# the next: the text says only which way a figure goes, and the cells' asserts hold it to that.

# %%
import json
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np.evaluation.bits_per_byte import score
from retro_np.evaluation.copying import copy_bound
from retro_np.evaluation.leakage import ALPHAS, chunk_leakage, filtered_bits_per_byte
from retro_np.experiments.pretrained import BUNDLED_BUILD
from retro_np.kernels.substring import longest_common_substring
from retro_np.pretrained.models import load_pretrained
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.deduplicate import DedupConfig, detection_probability, grams, jaccard, signatures
from retro_np.retrieval.documents import chained

# %% [markdown]
# ## Two texts that are nearly one
#
# A text is made into the set of its 13-grams, all runs of thirteen words, and two texts are as similar as
# |A ∩ B| / |A ∪ B|, their sets' **Jaccard similarity**. The paper (§2.1) leaves out of the training set each document
# whose similarity with an evaluated one is 0.8 or more.
#
# A run of thirteen words is hardly ever found in two texts that were written apart. But neither does it survive an
# edit: one changed word takes all thirteen grams that it is in. Two hundred words, and more and more of them changed:

# %%
words = [f"word{i}" for i in range(200)]


def edited(changes):
    """The text with so many words changed, far enough from each other that no gram holds two."""
    out = list(words)
    for i in np.linspace(20, 180, changes).astype(int):
        out[i] = "other"
    return " ".join(out)


for changes in (0, 1, 2, 3, 6, 10):
    print(f"{changes:2} words changed: {jaccard(' '.join(words), edited(changes)):.3f}")

# %% [markdown]
# One changed word in two hundred leaves **0.871**, two leave **0.757**: to the filter that is no duplicate any more.
# With *c* changes, 13c grams of 188 are gone from each side, so the similarity is (188 − 13c) / (188 + 13c). The
# threshold catches copies, re-formatted ones too (white space is between words, whatever it is), and lets through
# what somebody has gone over.
#
# Comparing each document with each is out of the question, for the paper's 1.8 billion above all. Of each set only a
# signature is kept, the minima of 128 hash functions over its grams (MinHash, Broder 1997): the share of equal minima
# estimates the similarity. Signatures are cut into 32 bands of four, and only pairs that agree in a whole band are
# looked at further, by their exact similarity. So a pair may be overlooked, but no document is left out on an estimate.
# At similarity *s* a pair is found with probability 1 − (1 − s⁴)³²:

# %%
settings = DedupConfig()
for changes in (0, 1, 2, 10):
    one, other = signatures([" ".join(words), edited(changes)], settings)
    exact = jaccard(" ".join(words), edited(changes))
    print(f"{np.mean(one == other):.3f} of the minima are equal; exact: {exact:.3f}", end="; ")
    print(f"found with probability {detection_probability(exact, settings):.4f}")
assert detection_probability(0.8, settings) > 0.9999

# %% [markdown]
# ## A corpus with copies in it
#
# Thirty modules of the standard library, and five to be evaluated. Which are held out is settled by a hash of the
# document's name, the same on every machine, so that the model has never seen these five. Some kind soul has kept
# copies of them as `copies/bz2.py` and so on. These are other names, with other hashes: they go to the database. And
# nothing is filtered.

# %%
HELD = ["bz2", "copyreg", "sched", "secrets", "timeit"]
OTHERS = [
    "bisect", "cmd", "codeop", "contextlib", "copy", "csv", "filecmp", "fileinput", "fnmatch", "getopt", "glob",
    "gzip", "heapq", "hmac", "linecache", "lzma", "numbers", "pprint", "profile", "queue", "random", "reprlib",
    "shelve", "shlex", "stat", "string", "tabnanny", "tempfile", "textwrap", "weakref",
]  # fmt: skip
library = Path(sysconfig.get_paths()["stdlib"])
text = {name: (library / f"{name}.py").read_text(encoding="utf-8") for name in HELD + OTHERS}
plain = {f"{name}.py": text[name] for name in HELD + OTHERS}
copies = {f"copies/{name}.py": text[name] for name in HELD}
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
home = Path(temporary.name)


def built(name, documents, **changes):
    """A database of these documents, cut as the model in the package wants it."""
    corpus = home / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"name": n, "text": t}) + "\n" for n, t in documents.items()))
    build = BuildConfig(chunk_size=16, d_key=256, neighbours=16, extra_candidates=16, **BUNDLED_BUILD)
    return build_database(corpus, home / name, replace(build, **changes), "hashing")


leaky = built("leaky", plain | copies, duplicates=None)
for name, facts in leaky.manifest["splits"].items():
    print(f"{name:6} {facts['documents']} documents, {facts['chunks']:,} chunks")
assert leaky.manifest["splits"]["valid"]["documents"] == len(HELD)

# %%
params, config, _ = load_pretrained()


def scored(database, k=2, **settings):
    return score(params, config, database, k=k, sequence_length=256, stride=128, **settings)


off = scored(leaky, k=0)
on, shuffled = scored(leaky), scored(leaky, shuffle_seed=0)
for name, losses in (("without retrieval", off), ("with retrieval", on), ("with the neighbours of others", shuffled)):
    print(f"{name:30} {losses.bits_per_byte():.3f} bits per byte")
saving = {"copies": 1 - on.bits_per_byte() / off.bits_per_byte()}
print(f"{100 * saving['copies']:.1f} % saved by retrieval")
assert saving["copies"] > 0.08
assert 1 - shuffled.bits_per_byte() / off.bits_per_byte() < 0.2 * saving["copies"]

# %% [markdown]
# So much is saved, by a model of two million parameters that has never seen these modules. (In the paper's figures on
# C4 ten times the parameters save a baseline a seventh.) And the control agrees: with the neighbours of others the
# gain is gone, so it is the neighbours that did it. All of that is true. The control shows *that* a model reads, which
# is what it is for. Whether what it reads should have been there, it cannot say.
#
# ## What the gain is made of
#
# For an evaluated chunk C take its ten nearest values; let *s* be the longest run of tokens that C has in common with
# any one of them, and r(C) = s / m. It is 0 where no token is shared, and 1 where all of C stands in a value. (A
# document's last chunk, with padding in it, does not get there.)

# %%
chunk = np.array([[11, 12, 13, 14, 15, 16, 17, 18]])
values = np.array([[[3, 11, 12, 3, 13, 14, 15, 3, 3, 3, 3, 3, 3, 3, 3, 3], [18, 17, 16, 15, 14, 13, 12, 11, *[0] * 8]]])
s = longest_common_substring(chunk, values)
print(f"s = {s[0]}, r(C) = {s[0] / chunk.shape[1]}")

# %% [markdown]
# The longest run is 13, 14, 15: **r(C) = 0.375**. The second value holds all eight tokens and counts for one, because
# they stand the other way round; a run is what can be copied.

# %%
ratios = {"copies": chunk_leakage(leaky)}
figure, axes = plt.subplots(figsize=(5, 2.5))
axes.hist(ratios["copies"], bins=np.arange(18) / 16 - 1 / 32, color="#e07b1f", edgecolor="white")
axes.set(xlabel="r(C)", ylabel="evaluated chunks")
plt.show()
print(f"{100 * np.mean(ratios['copies'] == 1):.0f} % of all chunks stand in a value from end to end")
assert np.mean(ratios["copies"] == 1) > 0.9

# %% [markdown]
# Nearly every chunk stands there from end to end. What was measured is whether the model can copy, and hardly anything
# is left by which its use for new text could be told.
#
# ## Mended
#
# The same corpus with the filter on, as it is by default. What it left out stands in `duplicates.jsonl`, with the
# held-out document that it resembles.

# %%
mended = built("mended", plain | copies)
dropped = list(chained([mended.path / "duplicates.jsonl"]))
for record in dropped:
    print({key: record[key] for key in ("name", "held_out", "estimated", "exact")})
assert [record["exact"] for record in dropped] == [1.0] * len(HELD)

on_mended, ratios["mended"] = scored(mended), chunk_leakage(mended)
saving["mended"] = 1 - on_mended.bits_per_byte() / off.bits_per_byte()
print(f"saved: {100 * saving['mended']:.1f} %, with the copies it was {100 * saving['copies']:.1f} %")
assert saving["mended"] < 0.5 * saving["copies"]

# %% [markdown]
# This is the honest figure, for a database of thirty modules that have little to do with the five, and it is a small
# one. (With the whole library there is more to find: the README says what that gives.)
#
# ## Past the filter
#
# The second mistake is quieter. Somebody has taken the lower half of each of the five modules into a larger file of
# their own. No file has a similarity of 0.8 with a *held-out* module, and the filter, which is on and compares with
# those alone, sees nothing.

# %%
halves = {}
for name, host in zip(HELD, OTHERS, strict=False):
    lines = text[name].splitlines(keepends=True)
    halves[f"legacy/{name}.py"] = text[host] + "".join(lines[len(lines) // 2 :])
    print(f"legacy/{name}.py: {jaccard(text[name], halves[f'legacy/{name}.py']):.2f} like {name}.py")
passed = built("passed", plain | halves)
assert not list(chained([passed.path / "duplicates.jsonl"]))

on_passed, ratios["halves"] = scored(passed), chunk_leakage(passed)
saving["halves"] = 1 - on_passed.bits_per_byte() / off.bits_per_byte()
print(f"saved: {100 * saving['halves']:.1f} %")
assert saving["halves"] > 1.5 * saving["mended"]

# %% [markdown]
# Retrieval seems to pay again, and no filter on documents can tell. **bpb(α)** (eq. 5) can: it asks the model only
# about chunks that share little with what was retrieved, the bits of all chunks with r(C) ≤ α over their bytes. bpb(1)
# is the plain figure; the paper calls α = 12.5 % no local leakage. Model with and model without are compared on the
# *same* chunks (left, with the halves): those that stand in no other text are harder for both, so that both curves rise
# to the left, and only what lies between them says anything.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
below = {}
for name, losses, colour in (("mended", on_mended, "#2b7bba"), ("halves", on_passed, "#e07b1f")):
    pair = [filtered_bits_per_byte(each, ratios[name]) for each in (off, losses)]
    without, given = (np.array([np.nan if b is None else b for b in bits]) for bits in pair)
    below[name] = 1 - given / without
    right.plot(ALPHAS, 100 * below[name], color=colour, marker="o", markersize=3, label=name)
left.plot(ALPHAS, without, color="#8c8c8c", marker="o", markersize=3, label="without retrieval")
left.plot(ALPHAS, given, color="#e07b1f", marker="o", markersize=3, label="with, halves in the database")
right.axhline(0, color="black", linewidth=0.5)
left.set(xlabel="α", ylabel="bpb(α)", ylim=(0, None))
right.set(xlabel="α", ylabel="% of bits saved")
for axes in (left, right):
    axes.legend(frameon=False, fontsize=8)
figure.tight_layout()
plt.show()
for alpha in (1.0, 0.5, 0.125):
    shares = ", ".join(f"{name} {100 * curve[ALPHAS.index(alpha)]:5.1f} %" for name, curve in below.items())
    print(f"α = {alpha:5}: saved with {shares}, of {np.sum(ratios['halves'] <= alpha)} chunks with halves")
assert below["halves"][ALPHAS.index(0.5)] < 0.5 * below["halves"][-1]

# %% [markdown]
# The gain falls as α does, and that is the shape of leakage: among chunks of which no more than half stands in a value
# little is left of it, as with the mended database. A model that had learnt something from its neighbours beyond their
# wording would keep a part of its gain on the left. Document filters work on documents, bpb(α) on what the model in
# fact got to read; they are two nets, and the second is the finer one. It cannot clean a corpus, only say what a
# figure is worth.
#
# A caution: α is a share. It stands for a run of at most 8 tokens where chunks have 64, but of 2 where they have 16,
# and two tokens of Python in a row are found nearly everywhere. So at our scale α = 12.5 % leaves few and odd chunks
# (printed above), and the curve says more than its left end.
#
# ## The third way: the sequence itself
#
# No copy is needed where a text retrieves from itself. In training each sequence is part of the database. Its chunk
# C_u is its own nearest neighbour, at distance 0, and the F of that neighbour is C_{u+1}, which is what is to be
# predicted next. The paper (§2.3) therefore leaves out what comes from a sequence's own document.

# %%
split = mended.split("train")
tokens, documents = np.asarray(split.tokens), np.asarray(split.documents)
followed = np.flatnonzero(documents[1:] == documents[:-1])[::20]  # chunks that another follows; some are enough
found, _ = mended.search_keys(mended.embed_chunks(tokens[followed]), 33)


def told(ids):
    """The share of chunks whose next chunk stands in their value from end to end."""
    following = tokens[followed + 1]
    return np.mean(longest_common_substring(following, mended.value(ids)[:, None]) >= (following != 0).sum(axis=1))


foreign = mended.document_of(found) != documents[followed][:, None]
first_foreign = np.where(foreign.any(axis=1), found[np.arange(len(found)), foreign.argmax(axis=1)], -1)
print(f"the nearest value tells {100 * told(found[:, 0]):.0f} % of the next chunks;", end=" ")
print(f"the nearest of another document {100 * told(first_foreign):.1f} %")
assert told(found[:, 0]) > 0.9
assert told(first_foreign) < 0.1

# %% [markdown]
# A model trained without that rule would learn to copy F and little else, and be helpless the day its text is new. Its
# training loss would be splendid. (`build_database` and `sequence_neighbours` both keep the rule, the second for all
# documents that a sequence holds pieces of.)
#
# ## What copying alone would gain
#
# One more yardstick, which needs no retrieval model. `copy_bound` lets a model *without* retrieval bet, at each
# position, on the token that comes after the longest match of its last tokens in the neighbours, with a weight tuned
# for each length of match. What RETRO gains beyond that, it gains by more than copying; and what it falls short of is
# copying that it has not learnt. Even with the mended database copying by rule saves several times what this small
# model does.

# %%
bounds = {
    name: copy_bound(params, config, database, sequence_length=256)
    for name, database in (("copies", leaky), ("mended", mended))
}
figure, axes = plt.subplots(figsize=(5, 2.5))
for (name, bound), colour, shift in zip(bounds.items(), ("#e07b1f", "#2b7bba"), (-0.2, 0.2), strict=True):
    axes.bar(np.arange(9) + shift, 100 * np.array(bound["right"]), 0.4, color=colour, label=name)
    print(f"{name}: % of tokens by length of match", " ".join(f"{100 * share:.0f}" for share in bound["positions"]))
    print(f"{name}: copying saves {100 * bound['gain_by_length']:.0f} %, RETRO {100 * saving[name]:.0f} %")
axes.set(xlabel="tokens that match (8: 8 or more)", ylabel="% right after them")
axes.legend(frameon=False)
plt.show()
assert bounds["copies"]["gain_by_length"] > 3 * bounds["mended"]["gain_by_length"]

# %% [markdown]
# ## When is a gain leakage?
#
# - If it is gone with others' neighbours, the model reads. If it is not, the gain has nothing to do with retrieval.
# - If bpb(α) of the two models meet as α falls, the gain is copying of text that both sides share. For a search
#   engine that may be just what is wanted (the code that one writes often stands elsewhere); as a claim about
#   language modelling it is leakage.
# - A figure stands beside its bpb at α = 12.5 %, or on a corpus newer than the database, as the paper's Wikipedia of
#   September 2021 is.
#
# ## Exercises
#
# **1.** The Jaccard similarity of the 13-gram sets of two lists of words. Where a text has fewer words than *size*, it
# has one gram, of them all.


# %% tags=["exercise"]
def similarity(a, b, size=13): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def similarity(a, b, size=13):
    def grams_of(words):
        return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}

    ours, theirs = grams_of(a), grams_of(b)
    return len(ours & theirs) / len(ours | theirs)


# %% tags=["check"]
rng = np.random.default_rng(0)
for length in (5, 12, 13, 14, 60, 200):
    a = [f"w{i}" for i in rng.integers(0, 1000, length)]
    b = [*a[: length // 2], "new", *a[length // 2 :], *a[:20]]  # some of it comes a second time
    assert np.isclose(similarity(a, b), jaccard(" ".join(a), " ".join(b))), length
    assert similarity(a, a) == 1
assert len(grams([" ".join(a)])[0]) == len(a) - 12
print("right: as the filter computes it")

# %% [markdown]
# **2.** r(C): the longest run of tokens that a chunk (m,) has in common with any one of its values (k, r), over m.
# Token 0 is padding and matches nothing.


# %% tags=["exercise"]
def leakage(chunk, values): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def leakage(chunk, values):
    longest = 0
    for value in values:
        for i in range(len(chunk)):
            for j in range(len(value)):
                run = 0
                while i + run < len(chunk) and j + run < len(value) and chunk[i + run] == value[j + run] != 0:
                    run += 1
                longest = max(longest, run)
    return longest / len(chunk)


# %% tags=["check"]
rng = np.random.default_rng(1)
apart = leakage(np.array([1, 2, 3, 4]), np.array([[9, 9, 1, 2], [3, 4, 9, 9]]))
assert apart == 0.5, f"a run ends where a value ends: 0.5, not {apart}"
for words in (3, 8):
    for _ in range(50):
        some_chunk, some_values = rng.integers(0, words, 8), rng.integers(0, words, (3, 16))
        expected = longest_common_substring(some_chunk[None], some_values[None])[0] / 8
        assert leakage(some_chunk, some_values) == expected, (some_chunk, some_values)
print("right: as the kernel computes it")

# %% [markdown]
# **3.** bpb(α), from the nats and the bytes of each chunk and its r(C); None where no byte is left. It is a ratio of
# two sums: a mean of ratios would give a chunk of ten bytes the weight of one of sixty.


# %% tags=["exercise"]
def filtered(nats, n_bytes, ratios, alpha): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def filtered(nats, n_bytes, ratios, alpha):
    kept = ratios <= alpha
    if n_bytes[kept].sum() == 0:
        return None
    return nats[kept].sum() / np.log(2) / n_bytes[kept].sum()


# %% tags=["check"]
for losses, name in ((off, "copies"), (on, "copies"), (off, "halves"), (on_passed, "halves")):
    for alpha, expected in zip(ALPHAS, filtered_bits_per_byte(losses, ratios[name]), strict=True):
        got = filtered(losses.nats, losses.bytes, ratios[name], alpha)
        assert (got is None) == (expected is None), alpha
        assert got is None or np.isclose(got, expected), alpha
print("right: as the library computes it")
