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
# # 7 · Train one
#
# Lay a page with the answer beside a language model. Will it read the page? Nothing forces it to. At first it cannot
# read, so the page does not help, and a page that does not help teaches nobody to read. Tutorials 3 to 6 have built
# every part of RETRO, forward and backward. In this tutorial you train a RETRO, and you watch it find out, within a few
# hundred steps, that its neighbours are worth reading.
#
# *Reading: about 55 minutes · runs in 35 s on one core · needs tutorials 0, 1, 5 and 6.*
#
# *On the path “Understand it” of the book's contents, read as far as the end of “Does it know the names by heart?”, and
# take all gradients as given.*
#
# Afterwards you can
#
# - set a task that only retrieval can solve, and say in bits what a guess costs;
# - write the training loop of a RETRO in twenty lines;
# - tell a model that reads its neighbours from one that merely has some, by three losses: with its own neighbours, with
#   none, and with those of others;
# - find out what a model has learned by heart, and why the price of a guess is a poor yardstick for it;
# - see in the weights of chunked cross-attention how a retrieved token is copied;
# - say which two aids let a small model learn this in a fraction of the steps.
#
# Previous: [tutorial 6](06_the_neighbour_encoder_and_algorithm_1.ipynb) · Next:
# [tutorial 8](08_is_it_leakage.ipynb) · The same kind of task in a single file of plain NumPy, which imports nothing
# of this library: [mini_retro.py](mini_retro.py)

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import EncoderConfig, RetroConfig, retro, retro_loss
from retro_np.evaluation.bits_per_byte import score, score_tokens
from retro_np.experiments import facts as world
from retro_np.experiments.knowledge import answers, found_share
from retro_np.experiments.lab import Model
from retro_np.nn.attention_maps import attention_maps
from retro_np.optim import adamw_init, adamw_update, clip_by_global_norm
from retro_np.parameters import count_parameters, init_params
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.tokenizer import token_texts
from retro_np.sequences import sequence_neighbours, tokens_and_targets
from retro_np.training.config import TrainingConfig, learning_rate
from retro_np.training.loop import read_log, train
from retro_np.tutorials.checks.tutorial_07 import check_7_1, check_7_2, check_7_3

# %% [markdown]
# ## A world in which only the database knows
#
# We need texts whose next words cannot be guessed, but can be looked up. `retro_np.experiments.facts` invents them. It
# makes up names, and gives each name a code of five different digits. A fact, a name with its code, is told in two
# documents. The two are worded differently. Each document has two chunks of up to $m = 16$ bytes: the first chunk has
# the name, the second has the code.

# %%
facts = world.invent(1100, seed=7)
known, unseen = facts[:1000], facts[1000:]  # The unseen facts are kept from the training text.
m = world.CHUNK
for fact in known[:3]:
    for wording in (fact.told, fact.asked):
        text = world.document(fact, wording)
        print(f"{text[:m]!r} | {text[m:]!r}")

# %% [markdown]
# There are four wordings, and each fact is told in two of them. With X for the name and Y for the code, they are
# *about X it is Y.*, *X says: Y, of old*, *X, coded as Y.* and *enter X with Y.*
#
# A name says nothing about its code. A reader of one document can predict the code only if the other document is at
# hand. Everybody else has to guess one of **30,240** codes.
#
# What does a guess cost? [Tutorial 0](00_a_language_model.ipynb) measured a prediction by its surprise: a token of
# probability $p$ costs $-\log_2 p$ bits, and the costs of the tokens add up. A code therefore costs
#
# $$\text{bits of a code} = -\sum_{i=1}^{5} \log_2 p(\text{digit } i \mid \text{all that stands before it}).$$
#
# A model that knows only that the five digits differ pays $\log_2$ of the number of codes, **14.9** bits. A model
# that knows the code pays almost nothing. A name is made of five random syllables out of a hundred. All its letters
# together cost **33.2** bits to somebody who knows how names are made, but not this one.

# %%
codes = math.perm(10, world.DIGITS)
guess, name_bits = math.log2(codes), world.NAME_SYLLABLES * math.log2(len(world.SYLLABLES))
print(f"{codes:,} codes: a guess costs {guess:.1f} bits; a name costs {name_bits:.1f} bits")
assert 1 / codes == world.CHANCE

# %% [markdown]
# This is why the task is useful. The price of a guess is known before any training. If a model pays less for a code
# that it has never read in training, it has looked the code up.
#
# ## The database
#
# A token is a byte, a chunk has 16 tokens, and about a tenth of the documents is held out. The keys are hashed bytes
# and pairs of bytes, as in [tutorial 1](01_chunks_neighbours_and_a_database.ipynb), so chunks that contain the same
# name have keys close to each other. The database keeps the four nearest neighbours of each chunk. The model reads only
# the first of them, $k = 1$, because no other chunk has anything to say. In the shapes below, $B$ is the number of
# documents, questions or sequences that are handled together.

# %%
temporary = tempfile.TemporaryDirectory()  # It is removed when the notebook ends.
home = Path(temporary.name)
build = BuildConfig(chunk_size=m, vocabulary_size=258, held_out=0.1, neighbours=4, extra_candidates=8, d_key=512)
corpus = world.write_facts(home / "known.jsonl", known, ("told", "asked"))
database = build_database(corpus, home / "known", build, "hashing")
held = database.split("valid")
name_rows = np.arange(0, len(held.tokens), 2)  # Of a document's two chunks, the first has the name.
neighbours = sequence_neighbours(database, held, name_rows[:, None], k=1)[:, 0]  # (B, k, 2m)
print(f"{len(name_rows)} documents are held out")
for row, value in list(zip(name_rows, neighbours, strict=True))[:3]:
    print(f"{database.text(held.tokens[row])!r} retrieves {database.text(value[0])!r}")

# %% [markdown]
# The chunk with the name retrieves the fact's other document, and the code stands in it. Is that so for every held-out
# document? A retrieval model can only be as good as its search, so it is worth counting.

# %%
owners = [database.documents[i]["name"].split()[0] for i in database.document_of(held.neighbours[name_rows, 0])]
asked = [database.documents[i]["name"].split()[0] for i in held.documents[name_rows]]
found = np.array(owners) == np.array(asked)
both_held_out = np.array([asked.count(name) == 2 for name in asked])
print(f"{found.sum()} of {len(found)} held-out documents find their fact's other document")
print(f"{np.sum(~found)} do not; for {np.sum(~found & both_held_out)} of these, the other document is held out, too")
assert found.mean() > 0.9
assert not (found & both_held_out).any()

# %% [markdown]
# Documents are held out at random. For a few facts this has hit both documents, so the answer is not in the database at
# all. The other four of the twelve are mistakes of the search.
#
# ## The model
#
# A small RETRO will do. It has two decoder layers, one encoder layer, and chunked cross-attention in the second decoder
# layer. Its weights begin at random.

# %%
config = RetroConfig(
    database.vocabulary_size, 64, 256, n_heads=4, d_head=16, n_layers=2, cca_layers=(2,), chunk_size=m,
    encoder=EncoderConfig(64, 256, n_heads=4, d_head=16, n_layers=1, ca_layers=(1,)),
)  # fmt: skip
print(f"{count_parameters(config, embeddings=True):,} parameters")

# %% [markdown]
# ## A batch
#
# A step of training needs three arrays. `tokens` are what the model reads: here four sequences of eight chunks each.
# `targets` are the same texts, one token further on, since each position predicts the next token. `neighbours` are the
# retrieved chunks with their continuations, $k$ of them for each chunk. The search was done when the database was
# built: the keys do not change during training, so the neighbours do not either.

# %%
split = database.split("train")


def draw_batch(rng, batch_size=4, n_chunks=8):
    """tokens and targets (B, n), neighbours (B, n_chunks, k, 2m). Each sequence holds four documents of two chunks."""
    first = 2 * rng.integers((len(split.tokens) - n_chunks) // 2 + 1, size=batch_size)
    rows = first[:, None] + np.arange(n_chunks)  # which chunks of the training text, (B, n_chunks)
    tokens, targets = tokens_and_targets(split, rows)
    return tokens, targets, sequence_neighbours(database, split, rows, k=1)


tokens, targets, neighbours = draw_batch(np.random.default_rng(0))
print(f"tokens {tokens.shape}, targets {targets.shape}, neighbours {neighbours.shape}")
print("reads:   ", repr(database.text(tokens[0, :20])))
print("predicts:", repr(database.text(targets[0, :20])))

# %% [markdown]
# Two details are hidden in the calls. Where a document ends there is nothing to predict, and the target is $-1$. And
# `sequence_neighbours` leaves out neighbours that come from a document of the sequence itself, because such a neighbour
# would contain the very text that is to be predicted. [Tutorial 8](08_is_it_leakage.ipynb) shows what happens without
# that rule.
#
# ## The training loop
#
# Here is the whole of it. Most of its lines you have met before. Two things are new: some sequences lose their
# neighbours, and the gradients are clipped.


# %%
def train_by_hand(config, steps, look=None, peak=4e-3, warmup=20, share_off=0.2, seed=0):
    """Train a model from random weights. look(step, params) is called before each step, and after the last one."""
    rng = np.random.default_rng(seed)
    params = init_params(config, rng)
    state = adamw_init(params)  # AdamW's two running means for each parameter, zero at first
    losses = []
    for step in range(steps):
        if look:
            look(step, params)
        tokens, targets, neighbours = draw_batch(rng)
        neighbours[rng.random(len(neighbours)) < share_off] = database.padding  # These sequences get no neighbours.
        loss, loss_vjp = retro_loss(params, config, tokens, targets, neighbours)  # forward
        grads = loss_vjp(1.0)  # backward
        clip_by_global_norm(grads, 1.0)
        rate = learning_rate(step, peak=peak, warmup=warmup, steps=steps)
        adamw_update(params, grads, state, lr=rate)  # changes params and state
        losses.append(float(loss))
    if look:
        look(steps, params)
    return params, np.array(losses)


# %% [markdown]
# In the order of the lines:
#
# 1. **A batch**, drawn at random. About a fifth of the sequences lose their neighbours, so that the model also learns
#    to do without.
# 2. **Forward.** `retro_loss` is algorithm 1 of the paper followed by the cross-entropy of tutorial 0: the mean of
#    $-\ln p$ over all targets, in nats.
# 3. **Backward.** The pullback takes the gradient of the loss with respect to itself, which is 1, and returns a tree of
#    gradients that has the form of `params`. Encoder and decoder are trained together, because the gradient reaches the
#    encoder through chunked cross-attention.
# 4. **Clipping.** If the length of all gradients, taken together as one vector, exceeds 1, they are scaled down to it,
#   so that an unusual batch cannot throw the model off.
# 5. **The schedule.** The learning rate rises linearly during the warm-up, and then falls along half a cosine to a
#    tenth of its peak. Exercise 7.3 is to write it.
# 6. **AdamW**, as in [tutorial 0](00_a_language_model.ipynb): it turns each gradient into a step of about the size of
#    the learning rate, against the gradient.
#
# ## An exam
#
# How will we know whether the model reads? We ask for the codes of a hundred strangers: people who stand in no training
# text. A new database has one of the two documents about each of them. The model reads the *other* document up to the
# code, and then has to give five digits. The exam is held three times:
#
# - **on**: each question reads the neighbour that it retrieved;
# - **off**: no question has a neighbour;
# - **others**: each question reads the neighbour that another question retrieved.
#
# `answers` returns two figures: the share of codes with all five digits right, when the likeliest token is taken each
# time, and the mean bits per code.

# %%
told = build_database(
    world.write_facts(home / "unseen.jsonl", unseen, ("told",)), home / "told", replace(build, held_out=0.0), "hashing"
)
print(f"the search finds the right document for {100 * found_share(unseen, told):.0f} % of the questions")
CONDITIONS = {"on": {}, "off": {"k": 0}, "others": {"shift": 1}}
# This `shift` has nothing to do with CCA's: question i reads what question i - 1 retrieved.
COLOURS = {"on": "#2b7bba", "off": "#8c8c8c", "others": "#e07b1f"}


def exam(params, config):
    """(right, bits) for each of the three conditions, (3, 2)."""
    model = Model(params, config, "exam")
    return np.array([list(answers(model, unseen, told, **how).values()) for how in CONDITIONS.values()])


# %% [markdown]
# ## It learns to read
#
# Now train, and hold the exam every hundred steps. The cell takes half a minute.

# %%
STEPS, EVERY = 1500, 100
curve = {}  # step → what `exam` returns


def look(step, params):
    if step % EVERY == 0:
        curve[step] = exam(params, config)


params, losses = train_by_hand(config, STEPS, look)
at, results = np.array(list(curve)), np.array(list(curve.values()))  # (looks,), (looks, 3, 2)

print("        right, %              bits per code")
print("steps     on    off  others     on    off  others")
for step in (0, 100, 200, 300, 400, 600, 800, 1000, 1500):
    (on, off, others), prices = (100 * curve[step][:, 0], curve[step][:, 1])
    print(f"{step:5} {on:6.0f} {off:6.0f} {others:7.0f} " + " ".join(f"{price:6.1f}" for price in prices))
assert curve[STEPS][0, 0] > 0.8
assert results[:, 1:, 0].max() <= 0.02
assert curve[STEPS][0, 1] < 2 < guess - 2 < curve[STEPS][1, 1]

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for i, (name, colour) in enumerate(COLOURS.items()):
    width = 5 if name == "off" else 1.5  # "off" and "others" lie on each other
    left.plot(at, 100 * results[:, i, 0], color=colour, marker="o", markersize=3, linewidth=width, label=name)
    right.plot(at, results[:, i, 1], color=colour, marker="o", markersize=3)
    right.annotate(name, (at[-1], results[-1, i, 1]), xytext=(6, -3), textcoords="offset points", color=colour)
right.axhline(guess, color="black", linewidth=1, linestyle="--")
right.annotate("a guess", (at[-1], guess), xytext=(-44, -12), textcoords="offset points", fontsize=9)
left.set(xlabel="steps of training", ylabel="codes entirely right, %", ylim=(-3, 103))
right.set(xlabel="steps of training", ylabel="bits per code", ylim=(-1.5, 45), xlim=(None, 1800))
left.legend(frameon=False, loc="center right", fontsize=9, title="neighbours")
figure.tight_layout()
plt.show()

# %% [markdown]
# *Figure 7.1.* Nobody told this model to read its neighbours, and it learns to. Right: its own neighbours make codes
# cheaper from about step 100 on. Left: the first codes come out right between the steps 200 and 300, and in the end
# nearly every answer is right, about people whom the model has never met.
#
# Take the right panel from left to right. At step 0 a code costs much more than a guess, because the model does not
# even know that digits come. The vocabulary has 258 tokens, the 256 bytes, padding and the end of a text. Five tokens,
# all equally likely, would cost $5 \log_2 258 \approx 40$ bits. At step 100 the three curves are still close to each
# other: the model has learned that digits follow, and what was retrieved makes little difference. Then the curves part.
# With its own neighbours the model pays less and less for a code. Without neighbours it goes on paying for a guess, and
# even a little more: after a small training text, it does not think all codes equally likely.
#
# The curve of the others is the instructive one. It *rises*, to about twice the price of a guess. The more the model
# trusts its neighbours, the more it pays where they speak of somebody else. It has not learned to doubt, since in
# training its neighbour usually told the truth.
#
# ## Three losses
#
# The exam was about strangers. The usual evaluation is the loss on held-out documents, and it can be taken under the
# same three conditions. `score` returns the nats of each chunk, from which we take the mean for chunks with a name and
# for chunks with a code. Its option `shuffle_seed` gives each chunk the neighbours of another one.


# %%
def bits_of_chunks(params, config, **condition):
    """For each held-out document, the bits of the chunk with the name and of the chunk with the code, (B, 2)."""
    losses = score(params, config, database, sequence_length=2 * m, stride=2 * m, **condition)
    return losses.nats.reshape(-1, 2) / np.log(2)


SCORED = {"on": {"k": 1}, "off": {"k": 0}, "others": {"k": 1, "shuffle_seed": 0}}
of_documents = {name: bits_of_chunks(params, config, **condition) for name, condition in SCORED.items()}
bits = {name: each.mean(axis=0) for name, each in of_documents.items()}
for name, (naming, coding) in bits.items():
    print(f"{name:6} {naming:5.1f} bits per chunk with a name, {coding:5.1f} per chunk with a code")
print(f"to guess, a name costs {name_bits:.1f} bits with all its letters, and a code {guess:.1f}")
codes_on = of_documents["on"][:, 1]
print(f"on, if the fact's other document was found: {codes_on[found].mean():.1f} bits per chunk with a code", end="; ")
print(f"if not: {codes_on[~found].mean():.1f}")
assert codes_on[found].mean() < 1 < guess / 2 < codes_on[~found].mean()
names, coding = np.array(list(bits.values())).T
assert np.allclose(names, names[0], rtol=1e-4)
assert coding[0] < guess / 2 < 0.9 * guess < coding[1] < coding[2]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 2))
axes.barh(list(bits), coding, color=COLOURS.values())
axes.axvline(guess, color="black", linewidth=1, linestyle="--")
axes.annotate("a guess", (guess, -0.3), xytext=(4, 0), textcoords="offset points", fontsize=9)
axes.invert_yaxis()
axes.set(xlabel="bits per chunk with a code", ylabel="neighbours")
plt.show()

# %% [markdown]
# *Figure 7.2.* Own neighbours save almost the whole price of a code. With the neighbours of others, a code costs more
# than without neighbours.
#
# Three comparisons are in these numbers.
#
# - **On against off** is the gain. It is nearly the price of a code. With retrieval on, nearly all of the price that
#   remains is paid for the few documents above that did not find their fact's other document.
# - **Others against off** is the test for reading. The gain over *off* does not prove that a model reads: a model
#   trained with neighbours may merely be worse without any. And a gain over another model, one that never retrieves,
#   may come from additional parameters or from a luckier run. If the neighbours of somebody else make a model *worse*
#   than no neighbours do, this can only come from reading them.
# - **Chunks with a name** cost the same in all three rows. They are the first chunks of their documents, and the paper
#   lets the tokens of $C_1$ use no retrieval (§2.2). If these numbers differed, something would be wired wrongly.
#
# ## Does it know the names by heart?
#
# Look at the chunks with a name once more. They cost less than the **33.2** bits of a random name. Has the model
# learned the names by heart? It could have. The held-out documents are new, but nearly all their people are not: the
# fact's other document is in the training text, and the model has gone through that text about a dozen times.
#
# But the two figures are not about the same tokens. A document's first token is not scored, since nothing stands before
# it. In two of the four wordings, *X says:* and *X, coded as*, this token is the first letter of the name, one of 20.
# That letter is given away. On the other hand, these two wordings begin alike, and the character after the name costs 1
# bit, because it tells one wording from the other. The words "about" and "enter" cost nothing: their first letter,
# which is not scored, gives away the rest. So let us compute the price of a guess for exactly the tokens that are
# scored.
#
# This price is the first yardstick. There is a second one, which needs no computation: documents about strangers, in
# the same wordings. We take the hundred of the exam. Retrieval is off in all rows below. `score_tokens` returns the
# nats of each scored token, so we can look at single syllables, too. From the second one on, they are scored in every
# wording.


# %%
first_letter, syllable = (math.log2(len(each)) for each in ({s[0] for s in world.SYLLABLES}, world.SYLLABLES))
told_and_asked = world.write_facts(home / "strangers.jsonl", unseen, ("told", "asked"))
strangers = build_database(told_and_asked, home / "strangers", replace(build, held_out=0.0), "hashing")
groups = {  # database, split, how many of its chunks, and which of its documents count
    "read in training, word for word": (database, "train", 800, slice(None)),
    "held out, of known people": (database, "valid", None, ~both_held_out),
    "of strangers": (strangers, "train", None, slice(None)),  # All documents of this database are in this split.
}
print(f"a guess costs {first_letter:.1f} bits for a first letter and {syllable:.1f} for a syllable\n")
print("documents                           name  a guess    syllables 2 to 5          code  a guess")
beyond = {}  # bits of name and code, less those of a guess
for name, (base, part, limit, counted) in groups.items():
    each = score_tokens(params, config, base, part, k=0, limit=limit, sequence_length=2 * m, stride=2 * m)
    chunks = np.asarray(base.split(part).tokens)[:limit:2]
    token_bits = np.zeros((len(chunks), 2 * m))  # 0 for what is not scored
    token_bits.ravel()[each.positions] = each.nats / np.log(2)
    name_first = np.array([base.text(chunk)[0] not in "ae" for chunk in chunks])  # neither "about" nor "enter"
    fair = (name_bits - name_first * (first_letter - 1))[counted].mean()
    naming, coding = token_bits.reshape(-1, 2, m)[counted].sum(axis=2).mean(axis=0)
    letters = np.where(name_first, 0, len("about "))[:, None] + np.arange(2 * world.NAME_SYLLABLES)
    by_syllable = np.take_along_axis(token_bits, letters, axis=1)[counted].mean(axis=0).reshape(-1, 2).sum(axis=1)
    print(f"{name:31} {naming:8.1f} {fair:8.1f}", *(f"{b:6.1f}" for b in by_syllable[1:]), end=" ")
    print(f"{coding:8.1f} {guess:8.1f}")
    beyond[name] = naming - fair, coding - guess
(read, _), (known_name, known_code), (strange_name, strange_code) = beyond.values()
assert read < known_name - 3 < known_name < strange_name - 3
assert abs(known_name) < 2
assert known_code < strange_code

# %% [markdown]
# The first yardstick says no. A name of known people costs about what a guess costs, **31.6** bits, once the letter
# that was given away is counted. What looked like memory was a mistake in our arithmetic.
#
# The second yardstick says yes. The names of strangers are made of the same syllables and told in the same wordings,
# and they cost about six bits more than the names of known people. How can both be true? Look at the syllables. After a
# few letters, the model bets on the names that it has met and that begin like this. If the name is one of them, the
# last syllables become cheaper. If it is not, they become dearer, even dearer than a guess, since whoever bets on what
# he remembers has less left for all the rest. A stranger's name loses such bets. A known one in a new document wins
# some and loses some, and here this happens to come out near the price of a guess. What the model has read word for
# word costs clearly less.
#
# The codes show the same on a smaller scale: even without retrieval, those of known people are about a bit cheaper than
# those of strangers.
#
# Take two habits from this. Compute the price of a guess for exactly the tokens that are scored. And to find out what a
# model remembers, compare it with itself, on texts that differ only in whether it has met them.
#
# ## Break it: stop too early
#
# Now the same loop, with the learning rate's schedule cut down to two hundred steps. What does such a model know, and
# would its training loss tell you?

# %%
short, short_losses = train_by_hand(config, 200)
stopped = exam(short, config)
for name, (share, price) in zip(CONDITIONS, stopped, strict=True):
    print(f"{name:6} {100 * share:3.0f} % right, {price:4.1f} bits per code")
assert stopped[0, 0] < 0.1
assert stopped[0, 1] < stopped[1, 1] < stopped[2, 1]

# %% tags=["hide-input"]
smooth = np.convolve(losses, np.ones(25) / 25, "valid")
answers_from = next(step for step, result in curve.items() if result[0, 0] > 0.1)
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(losses, color="#2b7bba", alpha=0.25, linewidth=0.8)
axes.plot(np.arange(len(smooth)) + 12, smooth, color="#2b7bba", label=f"{STEPS:,} steps (bold: mean of 25)")
axes.plot(short_losses, color="#e07b1f", linewidth=1, label="200 steps")
axes.axvline(answers_from, color="black", linewidth=1, linestyle="--")
note = "first exam with more than one code in ten right"
axes.annotate(note, (answers_from, 2.4), xytext=(4, 0), textcoords="offset points", fontsize=9)
axes.set(xlabel="step", ylabel="training loss, nats per token", ylim=(0, 4))
axes.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# *Figure 7.3.* After a steep beginning, the training loss falls slowly. Nothing in it marks the step from which codes
# come out right.
#
# The exam tells what this model is. It *has begun* to read: its own neighbours make a code cheaper than none, 13.2 bits
# against 16.2, and those of others make it dearer. But each code stands in the neighbour digit for digit, and this
# model gives not one of the hundred codes right. The other model, with more steps, gives nearly all.
#
# The training loss does not tell this. Only five of the nearly thirty tokens of a document are a code, and the loss
# also falls for what the model learns about names. Whoever looks at such a curve alone does not know whether the model
# reads.
#
# ## Aids for the impatient
#
# Our task is easy to read: chunks of 16 bytes, one neighbour, five digits that never repeat within a code. Where text
# is less obliging the wait is longer. A decoder that does not copy learns nothing from its neighbours, and an encoder
# that is not read learns nothing from the decoder; each waits for the other. The paper's models are trained on
# hundreds of billions of tokens, and can wait. Small models get two aids here. Neither is the paper's, and each can be
# turned off: the run above did without both.
#
# - `copying_start` sets the first weights so that encoder and chunked cross-attention are a rough copying machine. In
#   the encoder, each retrieved token receives an impression of the token after it. In chunked cross-attention, the
#   matrices of queries and keys begin equal, so that a token finds its like among the retrieved ones, and with it what
#   came after.
# - `oracle_share` makes the neighbours better than a search would, for a while. During the first `oracle_steps` some
#   chunks receive, in place of a neighbour, a noisy copy of themselves with their own continuation. At first half of
#   the chunks do, and the share falls to none. Copying then pays on every token, not only on codes. In an
#   evaluation this would be cheating, and none uses it.
#
# This time we call the library's `train`. It is the loop above with what a long run needs besides: files, a log, a
# progress bar, and checkpoints from which an interrupted run resumes and ends with the same bytes.

# %%
aided_config = replace(config, copying_start=True)
training = TrainingConfig(
    steps=200, sequence_length=8 * m, batch_size=4, neighbours=1, learning_rate=4e-3, warmup=20, retrieval_off=0.2,
    oracle_share=0.5, oracle_steps=100,
)  # fmt: skip
aided = train(database, aided_config, training, home / "aided")
aided_exam = exam(aided, aided_config)
print("the log has, for each step,", ", ".join(read_log(home / "aided")[-1]))
print("the run's folder has", ", ".join(sorted(path.name for path in (home / "aided").iterdir())))
print("\nright with retrieval on   bits per code")
for label, result in (("200 steps", stopped), ("1,500 steps", curve[STEPS]), ("200 steps, aided", aided_exam)):
    print(f"{label:18} {100 * result[0, 0]:3.0f} %   {result[0, 1]:4.1f}")
assert aided_exam[0, 0] > 0.9
assert aided_exam[1:, 0].max() == 0

# %% [markdown]
# With both aids the model answers after two hundred steps what the other has learned after many more. But the aided
# model did not find out by itself that its neighbours are worth reading; we told it.
#
# ## Where it looks
#
# `attention_maps` returns the weights $A$ of every attention. Those of chunked cross-attention have the shape
# `(B, n_chunks, n_heads, m, k, r)`: for chunk $u$ and for each head, what each of the $m$ positions of the attending
# chunk $H_u^+$ reads in each of the $k$ neighbours of $r = 2m$ tokens. $H_1^+$ begins with the last token of $C_1$,
# which predicts the first token of $C_2$. So the rows of the figure are the steps that predict the chunk with the code.

# %%
tokens, places = world.questions(told.tokenizer, unseen)  # (B, 2m), and where each code stands, (B, 5)
ids, _ = told.search_keys(told.embed_chunks(tokens[:, :m]), 1)
retrieved = np.zeros((len(unseen), 2, 1, 2 * m), np.int64)  # (B, n_chunks, k, r)
retrieved[:, 0] = told.value(ids)
maps = {
    "aided": attention_maps(aided, aided_config, tokens, retrieved),
    "by itself": attention_maps(params, config, tokens, retrieved),
}
for name, weights in maps["aided"].items():
    print(f"{name:34} {weights.shape}")
CCA, INNER = "layers.1.cca", "encoder.layers.0.attention"
reads = {name: each[CCA][:, 0, :, :, 0].mean(axis=1) for name, each in maps.items()}  # mean over heads: (B, m, r)

# %% tags=["hide-input"]
predicted, value = token_texts(told.tokenizer, tokens[0, m:]), token_texts(told.tokenizer, retrieved[0, 0, 0])
rows, columns = int(np.count_nonzero(tokens[0, m:])), int(np.count_nonzero(retrieved[0, 0, 0]))
read_at = token_texts(told.tokenizer, tokens[0, m - 1 : m - 1 + rows])
figure, panels = plt.subplots(1, 2, figsize=(11.5, 0.26 * rows + 1.2), sharey=True)
for axes, (name, weights) in zip(panels, reads.items(), strict=True):
    axes.imshow(weights[0, :rows, :columns], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(columns), value[:columns], family="monospace", fontsize=9)
    axes.axvline(m - 0.5, color="#e07b1f", linewidth=1)
    axes.set(title="learned by itself, 1,500 steps" if name == "by itself" else "aided, 200 steps")
    axes.set(xlabel="retrieved: N | F")
panels[0].set_yticks(range(rows), [f"{a!r} → {b!r}" for a, b in zip(read_at, predicted, strict=False)], fontsize=8)
panels[0].set_ylabel("token at hand → token to predict")
figure.tight_layout()
plt.show()

# %% [markdown]
# *Figure 7.4.* The weights of chunked cross-attention in one question, averaged over the heads. Both models read along
# the code as they write it. The aided one (left) looks at the digit *at hand*; the one that learned by itself (right)
# looks one token further, at the digit *to come*.
#
# There is a dark diagonal in each panel. In the right panel it lies one column further to the right. Take the right
# panel first. Having read an 8, the model looks at the digit that follows the 8 in what was retrieved. How can it find
# a digit that it does not know yet? The digit's key must say what stands before it. Now the left panel. The query looks
# for the 8 itself, and finds it. How can that help to predict the next digit? The 8's value must say what stands after
# it.
#
# In both cases another attention has been at work before, and has left in one token a trace of the token beside it.
# This is the encoder's self-attention within the neighbour. Here is what the two attentions do with the digits of all
# hundred codes. For each row we take the head that does it most.

# %%
each = np.arange(len(unseen))[:, None]
pairs = zip(retrieved[:, 0, 0], tokens[each, places], strict=True)
there = np.array([[np.flatnonzero(value == digit)[-1] for digit in code] for value, code in pairs])  # in the value
before, after = there[:, :-1], there[:, 1:]  # of two digits in a row, the first and the second: (B, 4)
queries = places[:, 1:] - m  # the rows of H⁺ that have the first of the two at hand
seen = {}
for name, weights in maps.items():
    cca = weights[CCA][:, 0, :, :, 0].swapaxes(0, 1)  # chunk 1, its one neighbour: (n_heads, B, m, r)
    inner = weights[INNER][:, 0, 0].swapaxes(0, 1)  # (n_heads, B, r, r)
    seen[name] = {
        "CCA reads the digit at hand": cca[:, each, queries, before],
        "CCA reads the digit to come": cca[:, each, queries, after],
        "encoder: a digit reads the one after it": inner[:, each, before, after],
        "encoder: a digit reads the one before it": inner[:, each, after, before],
    }
    seen[name] = {what: weight.mean(axis=(1, 2)).max() for what, weight in seen[name].items()}
for what in seen["aided"]:
    print(f"{what:41}", ", ".join(f"{name} {weights[what]:.2f}" for name, weights in seen.items()))
assert seen["aided"]["CCA reads the digit at hand"] > 0.6
assert seen["aided"]["encoder: a digit reads the one after it"] > 0.6
assert seen["by itself"]["CCA reads the digit to come"] > seen["aided"]["CCA reads the digit to come"]

# %% [markdown]
# Do the models really go by the digit at hand? They might count instead: "the third digit of the code". Here is a test.
# In the text that the models read, replace the code's digits with digits that the code does not have, and see whether
# they still give the next digit of the code.

# %%
digits, rng = tokens[each, places], np.random.default_rng(0)
misled = tokens.copy()
for row, code in enumerate(digits):
    misled[row, places[row]] = rng.permutation(np.setdiff1d(np.unique(digits), code))
for name, (weights, its_config) in {"aided": (aided, aided_config), "by itself": (params, config)}.items():
    shares = []
    for question in (tokens, misled):
        logits = retro(weights, its_config, question, retrieved)[0][each, places - 1]
        shares.append(100 * (logits.argmax(axis=-1) == digits)[:, 1:].mean())  # of the second digit and those after it
    print(f"{name:9} {shares[0]:3.0f} % of the digits are right after true digits, {shares[1]:3.0f} % after wrong ones")
    assert shares[1] < 0.6 * shares[0]

# %% [markdown]
# After wrong digits most answers are wrong, so the models go mostly by the digit at hand. There are two ways, then, to
# make a copy out of two attentions, and they are mirror images of each other.
#
# - The aided model was given one of them. A retrieved token reads the token *after* it, and its value carries what it
#   has read. The query looks for its own token.
# - The model that learned by itself has found the other one. A retrieved token reads the token *before* it, and its key
#   carries what it has read. The query looks for a token whose predecessor is its own.
#
# The second way is the one that [Olsson et al. 2022](https://arxiv.org/abs/2209.11895) study in ordinary transformers
# under the name *induction head*. Nobody put it here. Gradient descent found it, on a task that rewards copying. Its
# two steps lie in two networks: the first in the encoder, the second in the decoder.
#
# ## Exercises
#
# Write your answer in place of the dots and run the cell and the one below it.
#
# **7.1** Grade an exam. `logits`, of shape `(B, n, V)`, are a model's logits for `tokens`, of shape `(B, n)`. A row has
# one code, whose digits stand at the positions `places`, `(B, 5)`, counted from 0. Return two numbers: the share of
# rows in which each digit of the code is the likeliest token at its place, and the mean bits per code. Mind which
# position predicts which token.


# %% tags=["exercise"]
def graded(logits, tokens, places): ...


# %% tags=["check"]
check_7_1(graded)

# %% [markdown]
# **7.2** The control. To hand out the neighbours of others we need a list of lenders, one for each of `n_chunks`
# chunks: chunk `u` receives the neighbours of chunk `lenders(n_chunks, seed)[u]`. Return a random permutation in which
# no chunk lends to itself. The same seed gives the same permutation, another seed another one. A random permutation
# alone is not enough: it leaves at least one chunk in its place about two times out of three.


# %% tags=["exercise"]
def lenders(n_chunks, seed): ...


# %% tags=["check"]
check_7_2(lenders)

# %% [markdown]
# **7.3** The schedule (appendix C of the paper). Return the learning rate of a step, counted from 0. It rises linearly
# from $10^{-7}$ at step 0 to `peak` at step `warmup`. From there it falls along half a cosine to a tenth of the peak,
# which it reaches at the last step, `steps - 1`.


# %% tags=["exercise"]
def rate(step, peak, warmup, steps): ...


# %% tags=["check"]
check_7_3(rate)

# %% [markdown]
# ## What you have gained
#
# - The training loop of a RETRO is twenty lines: batch, loss, pullback, clipping, schedule, AdamW. Encoder and decoder
#   learn together.
# - On a task that only retrieval solves, a small model learns to read from random weights, without aids. The training
#   loss does not show it. Three losses do: with its own neighbours, with none, and with those of others.
# - A copy takes two attentions. One of them runs in the encoder, the other is chunked cross-attention, and the model
#   found this by itself.
# - Weights remember, too. After a dozen rounds through a small text, a name that occurs in it costs fewer bits than a
#   stranger's in the same wordings. The price of a guess did not show this, not even when it was computed for exactly
#   the tokens that are scored. What a model knows and what it looks up must be kept apart. The next tutorial asks
#   when a gain from retrieval is leakage.
#
# [mini_retro.py](mini_retro.py) does a similar experiment in one file, without the library.
# [learning_curve.py](../docs/landing/learning_curve.py) repeats the experiment of this tutorial for three seeds.
#
# Next: [tutorial 8 · Is it leakage?](08_is_it_leakage.ipynb)
