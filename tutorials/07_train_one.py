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
# A language model that is given neighbours need not read them. If it predicts about as well from the words before, no
# gradient asks it to, and its loss does not show the difference. So this tutorial trains a small RETRO on texts where
# nothing else helps: each holds a code that was drawn by chance, and that stands in one other document.
#
# Afterwards you can
#
# - set a task that only retrieval can solve, and say in bits what a guess costs;
# - train a RETRO and read its log;
# - tell a model that reads its neighbours from one that merely has some, by three losses: true neighbours, none, and
#   those of others;
# - see in the weights of chunked cross-attention which retrieved token a copy came from, and why it is not the one
#   that is copied;
# - say which aids a model of this size was given, and what it does without them.
#
# Two small models are trained, each in some ten seconds of one core.

# %%
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import EncoderConfig, RetroConfig
from retro_np.evaluation.bits_per_byte import nats_of, score
from retro_np.experiments import facts as world
from retro_np.experiments.knowledge import answers, found_share
from retro_np.experiments.lab import Model
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.model import retro
from retro_np.parameters import count_parameters
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.tokenizer import token_texts
from retro_np.sequences import sequence_neighbours
from retro_np.training.config import TrainingConfig, learning_rate
from retro_np.training.loop import read_log, train

# %% [markdown]
# ## A world of facts
#
# `retro_np.experiments.facts` invents names and gives each a code of five different digits. A fact has two documents,
# in two of four wordings, and each document is two chunks of 16 bytes: the first names, the second holds the code.

# %%
facts = world.invent(700, seed=7)
known, unseen = facts[:600], facts[600:]
m = world.CHUNK
for fact in known[:3]:
    for wording in (fact.told, fact.asked):
        text = world.document(fact, wording)
        print(f"{text[:m]!r} | {text[m:]!r}")

# %% [markdown]
# Name and code have nothing to do with each other. Whoever has not read the other document can only guess one of
# **30,240** codes, and pays **14.9 bits** for it; a name, of five syllables out of a hundred, costs **33.2 bits** at
# least, whatever is retrieved. So the least loss is known beforehand, and whatever lies below it has been looked up.

# %%
codes = math.perm(10, world.DIGITS)
guess, name = math.log2(codes), world.NAME_SYLLABLES * math.log2(len(world.SYLLABLES))
print(f"{codes:,} codes, {guess:.1f} bits; a name {name:.1f} bits")
assert 1 / codes == world.CHANCE

# %% [markdown]
# ## The database
#
# One token a byte (the smallest vocabulary: 256 bytes, padding, end-of-text), chunks of 16, and a tenth of the
# documents held out. Keys are hashed pairs of bytes: two chunks with the same name in them lie near each other. The
# nearest of them is wanted, *k = 1*; no other has anything to say.

# %%
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
home = Path(temporary.name)
build = BuildConfig(chunk_size=m, vocabulary_size=258, held_out=0.1, neighbours=4, extra_candidates=8, d_key=512)
corpus = world.write_facts(home / "known.jsonl", known, ("told", "asked"))
database = build_database(corpus, home / "known", build, "hashing")
held = database.split("valid")
name_rows = np.arange(0, len(held.tokens), 2)  # each document is two chunks: one that names, one with the code
neighbours = sequence_neighbours(database, held, name_rows[:, None], k=1)[:, 0]  # (N, k, 2m)
print(f"{len(name_rows)} documents are held out")
for row, value in list(zip(name_rows, neighbours, strict=True))[:3]:
    print(f"{database.text(held.tokens[row])!r} retrieves {database.text(value[0])!r}")

# %% [markdown]
# A held-out document's other half is mostly in the database, and found. Where both fell to the held-out tenth, or where
# the hashed key puts another name first, the nearest chunk names somebody else, and no model can be right.

# %%
whose = [database.documents[i]["name"].split()[0] for i in database.document_of(held.neighbours[name_rows, 0])]
asked = [database.documents[i]["name"].split()[0] for i in held.documents[name_rows]]
can_know = np.array(whose) == np.array(asked)
in_database = {record["name"].split()[0] for record in database.documents if record["split"] == "train"}
alone, missed = sum(name not in in_database for name in asked), np.sum(~can_know)
print(f"{100 * can_know.mean():.1f} % of held-out documents find their other half; of {missed} others,", end=" ")
print(f"{alone} have none in the database, and {missed - alone} find another nearer")

# %% [markdown]
# ## The model and its aids
#
# Two layers of decoder, one of encoder, and CCA in the second layer.

# %%
encoder = EncoderConfig(64, 256, n_heads=4, d_head=16, n_layers=1, ca_layers=(1,))
config = RetroConfig(
    database.vocabulary_size, 64, 256, n_heads=4, d_head=16, n_layers=2, cca_layers=(2,), chunk_size=m,
    encoder=encoder, copying_start=True,
)  # fmt: skip
training = TrainingConfig(
    steps=200, sequence_length=8 * m, batch_size=4, neighbours=1, learning_rate=4e-3, warmup=20,
    retrieval_off=0.2, oracle_share=0.5, oracle_steps=100,
)  # fmt: skip
print(f"{count_parameters(config, embeddings=True):,} parameters")

# %% [markdown]
# The paper trains models of a hundred million parameters and more on hundreds of billions of tokens, and they find
# out by themselves that neighbours are worth reading. Two hundred steps are too few for that: a decoder that does not
# copy learns nothing from its neighbours, and an encoder that is not read learns nothing from the decoder; each waits
# for the other. Three things break the circle. None is the paper's, and all can be turned off.
#
# - `copying_start`: encoder and CCA begin as a rough copying machine. The encoder adds to each retrieved token a
#   shadow of the one after it; queries and keys of CCA begin equal, so that a token finds itself among the retrieved
#   ones, and brings home the shadow of what came next.
# - `oracle_share`: in the first hundred steps some chunks are lent, as a neighbour, a noised copy of themselves and
#   their own continuation, from half of them falling to none. That is cheating, of a kind that only training sees:
#   copying then pays on every token, not only on codes.
# - the task itself: chunks of 16 bytes, one neighbour, five digits that never repeat within a code.
#
# `retrieval_off` is there for a fair comparison: a fifth of all sequences get no neighbours, so that the model without
# retrieval is one that was trained to do without.
#
# ## Training


# %%
def trained(name, config, training):
    params = train(database, config, training, home / name, description=name)
    return Model(params, config, name), np.array([line["loss"] for line in read_log(home / name)])


model, losses = trained("aided", config, training)

# %% [markdown]
# The log has a line for each step. The loss is that of the batch before its step: the mean in nats of all its
# targets, names among them, which is why it cannot come near zero.

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
axes.axvspan(0, training.oracle_steps, color="#dddddd")
axes.text(4, 0.2, "some chunks are lent\ntheir own continuation", fontsize=9)
axes.plot(losses, color="#2b7bba", linewidth=1)
axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, 4))
plt.show()
print(read_log(home / "aided")[-1].keys())

# %% [markdown]
# ## Three losses
#
# `evaluate` scores the held-out documents, here a window for each; `nats` has a sum for each chunk, so two a document.
# It does so with their own neighbours; with none (*k = 0*: chunked cross-attention is skipped, RETRO[OFF]); and with
# `shuffle_seed`, where each chunk is given the neighbours of another one.


# %%
def bits_of_chunks(model, **settings):
    """Mean bits of a chunk that names, and of one that holds a code."""
    losses = score(model.params, model.config, database, sequence_length=2 * m, stride=2 * m, **settings)
    return losses.nats.reshape(-1, 2).mean(axis=0) / np.log(2)


CONDITIONS = {"true neighbours": {"k": 1}, "none": {"k": 0}, "those of others": {"k": 1, "shuffle_seed": 0}}
bits = {name: bits_of_chunks(model, **settings) for name, settings in CONDITIONS.items()}
for name, (naming, coding) in bits.items():
    print(f"{name:16} {naming:5.1f} bits a chunk that names, {coding:5.1f} a chunk with a code")

# %%
figure, axes = plt.subplots(figsize=(6, 2))
axes.barh(list(bits), [coding for _, coding in bits.values()], color=["#2b7bba", "#8c8c8c", "#e07b1f"])
axes.axvline(guess, color="black", linewidth=1, linestyle="--")
axes.annotate("a guess", (guess, -0.3), xytext=(4, 0), textcoords="offset points", fontsize=9)
axes.invert_yaxis()
axes.set_xlabel("bits a chunk with a code")
plt.show()

# %% [markdown]
# Three things to read off.
#
# With true neighbours a chunk with a code costs far less than a guess, and without any more than a guess (the words
# around the code are to be paid for, too, and two hundred steps do not teach that all digits are equally likely): what
# is gained is the code, nothing else is to be had. The chunks that name cost the same in all three rows: the tokens of
# C₁ use no retrieval (§2.2), so that they are a check of the plumbing. (It is more than the name's own bits, since the
# wording is in them, and the syllables are not learnt to the last.) And with the neighbours of others the model is
# *worse* than with none. It believes what it reads; it has not learnt to doubt, because in training its neighbour
# nearly always told the truth.

# %%
names, coding = np.array(list(bits.values())).T
assert np.allclose(names, names[0], rtol=1e-4)
assert coding[0] < guess / 2
assert coding[1] > 0.95 * guess
assert coding[2] > coding[1]

# %% [markdown]
# The row of the others is the test for whether a model *reads*. A gain over a baseline can come from more parameters
# or from a luckier run; a loss from being handed somebody else's neighbours can only come from reading them.
#
# ## Names it never saw
#
# Nothing about these codes is in the weights. `answers` asks for the codes of a hundred names that were in no training
# text, with a database that tells them: the share that greedy decoding gives fully right, all five digits. (`shift`
# hands each question the neighbours of the next one.)

# %%
told = build_database(
    world.write_facts(home / "unseen.jsonl", unseen, ("told",)), home / "told", replace(build, held_out=0.0), "hashing"
)
ON, OFF, OTHERS = (answers(model, unseen, told, **how) for how in ({}, {"k": 0}, {"shift": 1}))
found = found_share(unseen, told)
print(f"found {100 * found:.0f} %; right without retrieval {100 * OFF['right']:.0f} %", end=", ")
print(f"with the neighbours of others {100 * OTHERS['right']:.0f} %")
print(f"right with retrieval: {100 * ON['right']:.0f} %")
assert ON["right"] > 0.9
assert OFF["right"] == OTHERS["right"] == 0

# %% [markdown]
# ## Where it looks
#
# `attention_maps` gives the weights of every attention. Those of CCA are (B, l, h, m, k, r): for each chunk *u* and
# head, what each of the *m* positions of the attending chunk H_u⁺ reads in each of the *k* values of *r = 2m* tokens.
# H_1⁺ begins with the last token of C_1, which predicts the first of C_2; so row *i* below is the step that predicts
# token *i* of the chunk with the code.

# %%
tokens, places = world.questions(told.tokenizer, unseen)  # (N, 2m), and where each code stands
ids, _ = told.search_keys(told.embed_chunks(tokens[:, :m]), 1)
retrieved = np.zeros((len(unseen), 2, 1, 2 * m), np.int64)
retrieved[:, 0] = told.value(ids)
maps = attention_maps(model.params, model.config, tokens, retrieved)
for name, weights in maps.items():
    print(f"{name:34} {weights.shape}")
(cca_name,) = (name for name in maps if name.endswith("cca"))
reads = maps[cca_name][:, 0, :, :, 0].mean(axis=1)  # (N, m, r): chunk 1, the mean of all heads, its one neighbour


# %%
def draw_reads(n):
    predicted = token_texts(told.tokenizer, tokens[n, m:])
    value = token_texts(told.tokenizer, retrieved[n, 0, 0])
    rows = int(np.count_nonzero(tokens[n, m:]))
    _figure, axes = plt.subplots(figsize=(7, 0.24 * rows + 1))
    axes.imshow(reads[n, :rows], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    read_at = token_texts(told.tokenizer, tokens[n, m - 1 : m - 1 + rows])
    axes.set_yticks(range(rows), [f"{a!r} → {b!r}" for a, b in zip(read_at, predicted, strict=False)], fontsize=8)
    axes.set_xticks(range(len(value)), value, family="monospace", fontsize=9)
    axes.axvline(m - 0.5, color="#e07b1f", linewidth=1)
    axes.set(xlabel="retrieved: N | F", ylabel="token at hand → predicted")
    plt.show()


draw_reads(0)

# %% [markdown]
# A dark diagonal runs through the code, and it lies on the tokens at hand, not on those that are predicted: to predict
# the digit after a 3, the query looks for the 3. The encoded 3 is no longer the 3 alone. The encoder's self-attention,
# in its first head, has added to it what comes after it, and the value brings that home. Look one further, then find
# the same: two steps make a copy. Olsson et al. (2022) found the same two in ordinary transformers and named them an
# induction head; here they lie in two networks, and `copying_start` has put them there, for training to sharpen. Both
# in figures, for the digits of all hundred codes:

# %%
rows = np.arange(len(unseen))[:, None]
pairs = zip(retrieved[:, 0, 0], tokens[rows, places], strict=True)
there = np.array([[np.flatnonzero(value == digit)[-1] for digit in code] for value, code in pairs])  # in the value
queries = places[:, 1:] - m  # the rows of H⁺ that predict the second digit and those after it
at_hand, to_come = (reads[rows, queries, where].mean() for where in (there[:, :-1], there[:, 1:]))
(inner,) = (w for name, w in maps.items() if name.startswith("encoder") and name.endswith(".attention"))
one_further = inner[:, 0, 0, 0][rows, there[:, :-1], there[:, 1:]].mean()  # chunk 1, neighbour 1, head 1
print(f"CCA's weight on the digit at hand in the value: {at_hand:.2f}, on the one to come: {to_come:.2f}")
print(f"the first encoder head's weight on the token one further: {one_further:.2f}")
assert at_hand > 0.6
assert to_come < 0.2
assert one_further > 0.6

# %% [markdown]
# ## Break it: no aids
#
# The same model from ordinary random weights, nothing lent, as many steps on the same batches.

# %%
without_aids, plain_losses = trained(
    "plain", replace(config, copying_start=False), replace(training, oracle_share=0.0, oracle_steps=0)
)
figure, axes = plt.subplots(figsize=(6, 2.8))
axes.plot(losses, color="#2b7bba", linewidth=1, label="with aids")
axes.plot(plain_losses, color="#e07b1f", linewidth=1, label="without")
axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, 4))
axes.legend(frameon=False)
plt.show()
PLAIN = answers(without_aids, unseen, told)
print(f"right, without aids, with retrieval: {100 * PLAIN['right']:.0f} %; {PLAIN['bits']:.1f} bits a code")
assert PLAIN["right"] < 0.1
assert PLAIN["bits"] > max(0.6 * guess, 4 * ON["bits"])

# %% [markdown]
# It has the same neighbours, in which the same answers stand, and gives none of them. Nothing is broken: it has learnt
# the wordings and the syllables, as the other has, has perhaps begun to read, and would find out about its neighbours
# with many more steps. Its loss curve alone looks much like the other's, a little above it, since most tokens are
# names either way. Whoever trains a RETRO without the three losses above does not know which of the two it is.
#
# ## Exercises
#
# **1.** A code's price and whether it is right. `logits` (N, n, V) are those of `tokens` (N, n), and `places` (N, 5)
# are the positions of the digits. Return the share of codes whose digits are all the likeliest tokens at their places,
# and the mean bits of a code.


# %% tags=["exercise"]
def graded(logits, tokens, places): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def graded(logits, tokens, places):
    rows = np.arange(len(tokens))[:, None]
    before = logits[rows, places - 1].astype(np.float64)  # what stands at t is predicted at t − 1
    digits = tokens[rows, places]
    right = (before.argmax(axis=-1) == digits).all(axis=1)
    log_sums = np.log(np.exp(before - before.max(-1, keepdims=True)).sum(-1)) + before.max(-1)
    nats = log_sums - np.take_along_axis(before, digits[..., None], -1)[..., 0]
    return right.mean(), nats.sum(axis=1).mean() / np.log(2)


# %% tags=["check"]
for who, given, expected in ((model, retrieved, ON), (model, None, OFF), (without_aids, retrieved, PLAIN)):
    right, price = graded(retro(who.params, who.config, tokens, given)[0], tokens, places)
    assert right == expected["right"], (right, expected)
    assert np.isclose(price, expected["bits"], rtol=1e-4), (price, expected)
print("right: as the experiment grades them")

# %% [markdown]
# **2.** The control: who lends neighbours to whom. For *n* chunks give a permutation in which no chunk keeps its own,
# at random (the same for the same seed, another for another). Mind that a random permutation alone keeps one in
# place two times out of three.


# %% tags=["exercise"]
def lenders(n, seed): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def lenders(n, seed):
    order = np.random.default_rng(seed).permutation(n)
    lent = np.empty(n, int)
    lent[order] = np.roll(order, 1)  # each from the one before it in a random ring
    return lent


# %% tags=["check"]
for n in (2, 3, 10, len(unseen)):
    for seed in range(20):
        lent = lenders(n, seed)
        assert np.array_equal(np.sort(lent), np.arange(n)), (n, seed)
        assert not np.any(lent == np.arange(n)), (n, seed)
assert not np.array_equal(lenders(100, 0), lenders(100, 1)), "another seed, another permutation"
assert np.array_equal(lenders(100, 0), lenders(100, 0)), "the same seed, the same permutation"
assert len(np.unique((lenders(100, 0) - np.arange(100)) % 100)) > 30, "a permutation with a pattern is not at random"
logits = retro(model.params, model.config, tokens, retrieved[lenders(len(tokens), 0)])[0]
nats = nats_of(logits[np.arange(len(tokens))[:, None], places - 1], tokens[np.arange(len(tokens))[:, None], places])
assert nats.sum(axis=1).mean() / np.log(2) > guess
print("right: a derangement, and with it the model is worse off than a guess")

# %% [markdown]
# **3.** The learning rate of a step, counted from 0 (appendix C): linear from 1e-7 at step 0 to `peak` at step
# `warmup`, from there half a cosine to a tenth of the peak at the last step, `steps − 1`.


# %% tags=["exercise"]
def rate(step, peak, warmup, steps): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def rate(step, peak, warmup, steps):
    if step < warmup:
        return 1e-7 + (peak - 1e-7) * step / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2)


# %% tags=["check"]
for step in range(training.steps):
    expected = learning_rate(step, peak=4e-3, warmup=20, steps=training.steps)
    assert np.isclose(rate(step, 4e-3, 20, training.steps), expected, rtol=1e-9), step
assert np.isclose(rate(199, 4e-3, 20, 200), 4e-4)
print("right: the rate of each step of the run above")
