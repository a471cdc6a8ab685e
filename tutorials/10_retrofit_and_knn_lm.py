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
# # 10 · RETROfit and kNN-LM
#
# Somebody has trained a language model, and only now wishes that it had a memory. Must the training begin again? Two
# methods say no. **kNN-LM** ([Khandelwal et al. 2020](https://arxiv.org/abs/1911.00172)) changes nothing in the model.
# It writes down the model's *hidden state* at every token of a corpus, the vector that the readout turns into logits,
# together with the token that came next, and later looks up what came next after similar states. **RETROfit**
# ([Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426), §4.2) freezes the model and trains only the parts that
# RETRO adds to it: chunked cross-attention and the encoder. Here you give both memories to one small model, over one
# corpus, and find out what each of them can and cannot know.
#
# *Reading: about 40 minutes · runs in 25 s on one core · needs tutorials 1, 5 and 7.*
#
# Afterwards you can
#
# - RETROfit a model, and show that with retrieval off it is the old model to the last bit;
# - build a datastore for kNN-LM and write its mixture down;
# - compare methods fairly: on the same tokens, on the same neighbours, at equal tokens and at equal compute;
# - place the other systems of the paper's table 3 by three questions.
#
# Previous: [tutorial 9, sampling with a memory](09_sampling_with_a_memory.ipynb). Next: [tutorial 11, one kernel, three
# ways](11_one_kernel_three_ways.ipynb). If you want to go on with memories for trained models, go straight to [tutorial
# 13](13_a_memory_for_a_language_model.ipynb).

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import EncoderConfig, RetroConfig, count_parameters, retro
from retro_np.evaluation import bits_per_byte, knn_lm
from retro_np.evaluation.prepending import prepended
from retro_np.experiments.facts import CHANCE, CHUNK, DIGITS, invent, write_facts
from retro_np.nn.model import hidden_states
from retro_np.parameters import is_retrieval, parameter_shapes
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.sequences import sequence_neighbours
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import retrofit, train
from retro_np.tree import named_leaves
from retro_np.tutorials.checks.tutorial_10 import check_10_1, check_10_2, check_10_3

BLUE, ORANGE, SAND, GREY = "#2b7bba", "#e07b1f", "#f2b98a", "#b0b0b0"

# %% [markdown]
# ## A corpus whose answers stand elsewhere
#
# To see a memory at work, we need text that a small model cannot predict without one. `retro_np.experiments.facts`
# invents such text. It makes up names, and gives each name a code of five different digits. Two documents state each
# fact, in different words. A document has two chunks of 16 bytes: the first contains the name and the second the code.
# Nothing in a name hints at its code.
#
# A tenth of the documents is held out. For most of them, the other document about the same name is in the database.

# %%
facts = invent(600, seed=0)
temporary = tempfile.TemporaryDirectory()  # It is deleted when the notebook ends.
folder = Path(temporary.name)
corpus = write_facts(folder / "facts.jsonl", facts, ("told", "asked"))
build = BuildConfig(
    chunk_size=CHUNK, vocabulary_size=258, held_out=0.1, neighbours=4, extra_candidates=12, d_key=512, duplicates=None
)
database = build_database(corpus, folder / "db", build, "hashing")
m, valid = database.chunk_size, database.split("valid")
names = np.array([record["name"].split()[0] for record in database.documents])
nearest = valid.neighbours[::2][:, 0]  # of each held-out document's first chunk
found = names[database.document_of(nearest)] == names[valid.documents[::2]]
print(f"{len(database.documents)} documents; {database.n_chunks} chunks to retrieve, {len(valid.tokens)} held out")
print(f"{100 * found.mean():.0f} % of the held-out documents have the other one of their name as nearest neighbour")
example = 2 * np.flatnonzero(found)[0]
n, f = database.value(nearest[example // 2]).reshape(2, m)
print(f"a held-out document: {database.text(valid.tokens[example])!r}, {database.text(valid.tokens[example + 1])!r}")
print(f"nearest: N {database.text(n)!r}, F {database.text(f)!r}")
assert found.mean() > 0.6

# %% [markdown]
# Read the example once more. The first chunk names `vuficowebi`. Its nearest chunk N in the database names
# `vuficowebi`, too, and the continuation F of that chunk contains the code. Whoever reads F can write down the code
# without guessing.
#
# ## The model that is there already
#
# Our trained model is a plain decoder of two layers. A token is a byte here. The model soon learns how names and
# sentences go on. At the digits of a held-out document it can only guess, as you will see.

# %%
baseline_config = RetroConfig(database.vocabulary_size, 64, 256, n_heads=4, d_head=16, n_layers=2, chunk_size=m)
training = TrainingConfig(
    steps=400, sequence_length=8 * m, batch_size=4, neighbours=1, learning_rate=4e-3, warmup=30, seed=0
)
baseline = train(database, baseline_config, training, folder / "baseline")
print(f"{count_parameters(baseline_config, embeddings=True):,} parameters, trained for {training.steps} steps")

# %% [markdown]
# ## RETROfit: train only what is new
#
# `retrofit` puts a fresh encoder and fresh chunked cross-attention, here in layer 2, around the trained weights. The
# trained weights themselves are taken over unchanged.
#
# Then `train` must know which parameters may change. It takes a predicate, a function from a parameter's name to True
# or False. The predicate `is_retrieval` is true for what RETRO adds: names that begin with `encoder.` or contain
# `.cca.`. For all other parameters no gradient is computed, AdamW keeps no moments, and no weight decays.
#
# One option is ours and not the paper's. With `copying_start` encoder and cross-attention begin as a rough copying
# machine. A large model finds out by itself that neighbours are worth reading. A small one would need many more steps
# for that ([tutorial 7](07_train_one.ipynb)).

# %%
encoder = EncoderConfig(64, 256, n_heads=4, d_head=16, n_layers=1, ca_layers=(1,))
start, config = retrofit(
    baseline, replace(baseline_config, copying_start=True), (2,), encoder, np.random.default_rng(1)
)
fit = replace(training, steps=200)
retrofitted = train(database, config, fit, folder / "retrofit", begin_from=(start, "baseline"), trainable=is_retrieval)
shapes = dict(named_leaves(parameter_shapes(config)))
trained = sum(int(np.prod(shape)) for name, shape in shapes.items() if is_retrieval(name))
print(f"{len(shapes)} arrays; {sum(map(is_retrieval, shapes))} of them are trained, {trained:,} parameters")
before, after = dict(named_leaves(baseline)), dict(named_leaves(retrofitted))
assert all(np.array_equal(before[name], after[name]) for name in before)
print("no parameter of the baseline has changed")

# %% [markdown]
# ### Off is the old model
#
# Two models can only be compared on the same tokens. `frozen_model` scores the baseline and also returns the hidden
# state from which each token was predicted; kNN-LM will need these states. Our own function `scored` does the same job
# with neighbours, on the same windows of text.

# %%
window = 8 * m
plain, hidden, documents = knn_lm.frozen_model(baseline, baseline_config, database, sequence_length=window)


def scored(params, config, k):
    """The losses of a model with k neighbours at the same held-out tokens; k = 0 turns retrieval off."""

    def predict(rows, tokens, targets):
        neighbours = sequence_neighbours(database, valid, rows, k) if k else None
        return (bits_per_byte.nats_of(retro(params, config, tokens, neighbours)[0], targets),)

    windows = bits_per_byte.evaluation_windows(valid, window, window // 2)
    return bits_per_byte.scored_tokens(valid, windows, predict, "evaluating")[0]


def bits(tokens):
    """Bits per byte."""
    return tokens.losses(database).bits_per_byte()


off, on = scored(retrofitted, config, 0), scored(retrofitted, config, 1)
same = scored(baseline, baseline_config, 0)
assert np.array_equal(off.nats, same.nats)
print(f"retrieval off against the baseline: {len(off.nats)} losses, differing by {np.abs(off.nats - same.nats).max()}")

# %% [markdown]
# The difference is **0.0**, to the last bit. Without neighbours the cross-attention adds nothing, and everything else
# is the baseline. This is what freezing buys: with retrieval off, nothing of the trained model is lost. With retrieval
# *on* the model may do worse than before, if what it retrieves misleads it. [Tutorial
# 13](13_a_memory_for_a_language_model.ipynb) measures this with the neighbours of other chunks and with a database that
# shares nothing with the text.
#
# ### Break it
#
# How fragile is this? Let one more array train: the gains of the last norm, 64 numbers out of more than a hundred
# thousand.

# %%
leaky = train(
    database, config, replace(fit, steps=10), folder / "leaky", begin_from=(start, "baseline"),
    trainable=lambda name: is_retrieval(name) or name == "norm",
)  # fmt: skip
off_leaky = scored(leaky, config, 0)
changed = np.mean(off_leaky.nats != same.nats)
assert changed > 0.9
print(f"{leaky['norm'].size} more numbers, ten steps: more than 90 % of the losses with retrieval off have changed")

# %% [markdown]
# ## kNN-LM: look up the hidden state
#
# kNN-LM keeps a **datastore** with one entry for each token of the corpus. The *key* $K_j$ is the hidden state from
# which token $j$ was predicted. The *value* $w_j$ is the token itself. To predict the token after a hidden state $h_t$,
# the ten nearest keys vote, and near keys have more to say. Ten is the number of the RETRO paper's own comparison, on
# articles of Wikipedia (the data set Wikitext103). In the sum, $j$ goes over these ten:
#
# $$p_\text{kNN}(w) \;\propto\! \sum_{j \,:\, w_j = w}\! e^{-\beta\, \lVert h_t - K_j \rVert^2},
# \qquad p = \lambda\, p_\text{kNN} + (1 - \lambda)\, p_\text{LM}.$$
#
# The RETRO paper and our code call $\beta$ alpha. In this book $\alpha$ is the threshold of the leakage filter
# ([tutorial 8](08_is_it_leakage.ipynb)). Both $\beta$ and the share $\lambda$ must be tuned, but not on the text that
# they are scored on. The function `knn_lm` therefore tunes them on every second held-out document and scores the other
# documents. Then it exchanges the two halves.

# %%
keys, values = knn_lm.datastore(baseline, baseline_config, database, None, sequence_length=window)
with_knn, chosen = knn_lm.knn_lm(plain, hidden, documents, keys, values)
print(f"datastore: {len(keys):,} keys of {keys.shape[1]} columns, one for each training token")
print(f"RETRO's database: {database.n_chunks:,} keys, one for each chunk")
print(f"bits per byte: baseline {bits(plain):.2f}, kNN-LM {bits(with_knn):.2f}")
print("chosen for either half:", " and ".join(f"β = {beta:g}, λ = {weight:.1f}" for beta, weight in chosen))
assert bits(with_knn) < bits(plain)

# %% [markdown]
# kNN-LM needs fewer bits, and no weight was trained for it. Its price is the number of keys: one for each token, where
# RETRO has one for each chunk. In [tutorial 12](12_from_here_to_1_75_trillion_tokens.ipynb) you will see what this
# factor means at the paper's sizes.
#
# ### Fool yourself
#
# The datastore must not contain the text that is scored. If it does, every hidden state finds itself at distance 0, and
# beside it the very token that is to be predicted.

# %%
more_keys, more_values = np.concatenate([keys, hidden]), np.concatenate([values, plain.tokens])
leaked, _ = knn_lm.knn_lm(plain, hidden, documents, more_keys, more_values)
assert bits(leaked) < bits(plain) / 2
print(f"with the held-out documents in the datastore: {bits(leaked):.2f} bits per byte")

# %% [markdown]
# ## Everybody gets the same neighbours
#
# RETROfit and kNN-LM differ in two ways at once: in what they *find* and in how they *read* it. To take the two apart,
# give three methods exactly what RETRO retrieves, the nearest value $[N, F]$ of the chunk before:
#
# - **prepended**: the neighbour's text is put in front of the baseline's context, and nothing else changes;
# - **kNN-LM on the neighbour**: the datastore at a token holds only the tokens of this $[N, F]$;
# - **RETROfit** reads the neighbour by cross-attention.
#
# One more method belongs beside them, the forerunner of kNN-LM. The **continuous cache** ([Grave et al.
# 2017](https://arxiv.org/abs/1612.04426)) uses the hidden states of the same document, up to the current token, as its
# datastore.
#
# The first half of the next cell serves kNN-LM on the neighbour. It computes the hidden states of the neighbour's
# tokens, their distances from $h_t$, and which of them have the true token as their value. Then all methods are scored.

# %%
values_of_rows = sequence_neighbours(database, valid, np.arange(len(valid.tokens))[None], 1)[0].reshape(-1, 2 * m)
states = hidden_states(baseline, baseline_config, values_of_rows, None)[:, :-1]  # each with the token after it:
following = values_of_rows[:, 1:]
row = plain.positions // m  # the chunk that a token is in; what it may read was retrieved by the chunk row − 1
later = np.asarray(valid.documents)[row - 1] == documents  # False in a document's first chunk: nothing retrieved yet
distances = np.sum((hidden[:, None] - states[row - 1]) ** 2, axis=-1)
distances[(following[row - 1] == 0) | ~later[:, None]] = np.inf  # Padding has no vote, nor has a missing neighbour.
order = np.argsort(distances, axis=1, kind="stable")[:, : knn_lm.KNN_NEIGHBOURS]
hits = np.take_along_axis(following[row - 1], order, 1) == plain.tokens[:, None]
distances = np.take_along_axis(distances, order, 1)


def vote(beta):
    """The probability that the neighbour's tokens give each token; without a neighbour, the model's own."""
    with np.errstate(invalid="ignore"):
        probability = knn_lm.knn_probability(distances, hits, beta)
    return np.where(np.isnan(probability), np.exp(-plain.nats), probability)


ways = {
    "baseline": plain,
    "continuous cache": knn_lm.continuous_cache(plain, hidden, documents)[0],
    "kNN-LM, all tokens": with_knn,
    "prepended": prepended(baseline, baseline_config, database, k=1, sequence_length=window),
    "kNN-LM, neighbour": knn_lm.tuned(plain, documents, vote, knn_lm.KNN_ALPHAS)[0],
    "RETROfit": on,
}
assert all(np.array_equal(way.positions, plain.positions) for way in ways.values())
for name, way in ways.items():
    print(f"{name:20} {bits(way):.2f} bits per byte, {100 * (bits(way) / bits(plain) - 1):+4.0f} %")
assert bits(on) < min(bits(way) for name, way in ways.items() if name != "RETROfit")

# %% [markdown]
# RETROfit is far ahead. Where does it save its bits? Sort the tokens into three kinds: those of the first chunk, where
# the name is and nothing has been retrieved yet; the words of the second chunk; and the digits.

# %%
text = np.array([database.text([token]) for token in plain.tokens])
digit = np.char.isdigit(text)
kinds = {
    "first chunk: the name": ~later,
    "second chunk: words": later & ~digit,
    "second chunk: the code": later & digit,
}
colours = {"prepended": GREY, "kNN-LM, neighbour": SAND, "kNN-LM, all tokens": ORANGE, "RETROfit": BLUE}


def saving(way, which):
    """Bits saved at each token of a kind: the mean over documents, and twice its standard error."""
    saved, which_document = (plain.nats - way.nats)[which] / np.log(2), documents[which]
    counts = np.bincount(which_document)
    means = np.bincount(which_document, saved)[counts > 0] / counts[counts > 0]
    return means.mean(), 2 * means.std() / np.sqrt(len(means))


saved = {name: np.array([saving(ways[name], which) for which in kinds.values()]) for name in colours}
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for number, (name, colour) in enumerate(colours.items()):
    places = np.arange(3) + 0.2 * (number - 1.5)
    axis.bar(places, saved[name][:, 0], 0.18, yerr=saved[name][:, 1], color=colour, label=name, ecolor="#404040")
axis.axhline(0, color="black", linewidth=0.8)
axis.axhline(-np.log2(CHANCE) / DIGITS, 0.68, 1, color="black", linewidth=0.8, linestyle=":")
axis.text(2.45, -np.log2(CHANCE) / DIGITS + 0.06, "all that can be saved", fontsize=8, ha="right")
axis.set_xticks(range(3), list(kinds))
axis.set(ylabel="bits saved at a token", title="What each method saves, by kind of token", ylim=(-0.9, 3.5))
axis.legend(frameon=False, fontsize=8, loc="upper left")
plt.show()
print(f"{'bits saved at a token of':24}" + "".join(f"{kind:>12}" for kind in ("the name", "words", "the code")))
for name, of in saved.items():
    print(f"{name:24}" + "".join(f"{round(mean, 1) + 0.0:+12.1f}" for mean in of[:, 0]))
print(f"a digit that can only be guessed costs {-np.log2(CHANCE) / DIGITS:.2f} bits")
of_all, of_neighbour, by_reading = (
    saved[name][:, 0] for name in ("kNN-LM, all tokens", "kNN-LM, neighbour", "RETROfit")
)
assert by_reading[0] == 0
assert of_all[0] > 0
assert by_reading[2] > of_neighbour[2] > 5 * abs(of_all[2])
assert of_neighbour[1] < by_reading[1] - 0.1

# %% [markdown]
# *Figure 10.1.* Only kNN-LM on the neighbour and RETROfit save much at the code. Of these two, only RETROfit loses
# nothing at the words. Lines on the bars are two standard errors over documents.
#
# In the first chunk RETROfit saves **0.0** bits, by construction: the first chunk of a document is predicted without
# retrieval (equation 1 of the paper). A digit of the code costs **2.98** bits if one can only guess it, and RETROfit
# saves most of them. At the words the neighbour has nothing to say, and there RETROfit loses nothing. It is also the
# only method here that was trained for its task, for two hundred steps. The continuous cache is missing from the
# picture, since a document of about thirty bytes has little to look back to.
#
# kNN-LM over all tokens saves a little in the first chunk, and at the code almost nothing. Look at what it finds there.
# The token to predict is the first digit of the code in our example. The third line of the output lists the tokens that
# followed the ten nearest hidden states:

# %%
place = np.flatnonzero(kinds["second chunk: the code"] & (row == example + 1))[0]
ids = knn_lm.nearest_keys(hidden[place : place + 1], keys)[0][0]
print(f"context:   {database.text(valid.tokens[row[place] - 1])!r}, then {database.text(valid.tokens[row[place]])!r}")
print(f"token:     {str(text[place])!r}")
print(f"kNN-LM:    {', '.join(database.text([token]) for token in values[ids])}")
print(f"neighbour: {database.text(values_of_rows[row[place] - 1])!r}")

# %% [markdown]
# The ten tokens are digits, but nine of them are wrong. A hidden state describes what *the model*
# expects next. This model was never able to predict a code, so it had little reason to keep the name in mind when a
# code begins. To this model all codes look alike. kNN-LM finds only what the frozen model thought worth remembering.
# RETRO compares chunks by the text in them, whatever the model makes of that text.
#
# So kNN-LM failed at *finding*. Given RETRO's neighbour as its datastore, it saves a good part of the digits' bits,
# too. But it pays for them at the words. There the neighbour has other words, and the share $\lambda$ is the same at
# every token. Cross-attention, in contrast, was trained to tell when the neighbour has something to say.
#
# And the baseline with the neighbour in front of its context? It was never trained to use such a text. It saves nothing
# at the code and loses at the words. Large language models have learned to use their context, so with them prepending
# is a strong rival of RETRO. [Tutorial 13](13_a_memory_for_a_language_model.ipynb) has such a model and measures it.
#
# ## Equal tokens, or equal compute?
#
# RETROfit took two hundred more steps than the baseline. Would the baseline have caught up with two hundred more steps
# of its own? That would be a comparison at **equal tokens**. It still favours RETRO, because RETRO's step costs more.
# At **equal compute**, the baseline may take as many steps as fit into RETRO's time.
#
# How much more does a step cost? Count the products with weights, which are most of the work. The scores of attention
# and the search come on top of them, and are not counted here. In the decoder, each weight is used once for each token
# of the text. The encoder reads $k \cdot r$ tokens for each chunk of $m$, so with $r = 2m$ its weights are used $2k$
# times for each token of the text. Only the matrices for keys and values in its cross-attention are used once, since
# they meet the text and not the neighbours. In CCA, the matrices for keys and values are used $2k$ times, too.


# %%
def reads_neighbours(path, last):
    """Whether a matrix is multiplied with each token of the neighbours, and not with each token of the text."""
    if "cca" in path:
        return last in ("w_k", "w_v")
    return "encoder" in path and not ("cross_attention" in path and last in ("w_k", "w_v"))


def products(config, k):
    """Multiplications with weights for each token of the text, readout included."""
    total = 0
    for name, shape in named_leaves(parameter_shapes(config)):
        *path, last = name.split(".")
        if len(shape) == 2 and last not in ("embedding", "w_r", "u", "v"):
            total += shape[0] * shape[1] * (2 * k if reads_neighbours(path, last) else 1)
    return total


for name, base in (("retro-172m", "baseline-132m"), ("retro-425m", "baseline-368m"), ("retro-7.5b", "baseline-7b")):
    factor = products(RetroConfig.preset(name), 2) / products(RetroConfig.preset(base), 2)
    print(f"{name:11} {factor:.2f} times its baseline's products, with two neighbours")
small = products(config, 1) / products(baseline_config, 1)
print(f"{'ours':11} {small:.2f} times its baseline's products, with one neighbour")

# %% [markdown]
# At the paper's largest size, retrieval costs a tenth more: **1.10** times the products with weights. The encoder has
# the same size for all models, and the decoder outgrows it. Our decoder is small, so here retrieval more than doubles
# the cost: a full training step of this RETRO has **2.28** times the products of a full training step of its baseline.
# So at our size, equal tokens flatter RETRO. Let us give the baseline both: as many tokens as RETROfit had, and as much
# compute. This is generous to the baseline, since RETROfit leaves out the gradients of frozen weights.

# %%
longer = {}
for name, steps in (("equal tokens", 400 + 200), ("equal compute", 400 + round(200 * small))):
    longer[name] = train(database, baseline_config, replace(training, steps=steps), folder / name)
    of_longer = scored(longer[name], baseline_config, 0)
    at_codes = (of_longer.nats[kinds["second chunk: the code"]] / np.log(2)).mean()
    print(f"baseline, {name + ':':14} {steps} steps, {bits(of_longer):.1f} bits per byte, {at_codes:.0f} bits a digit")
    assert bits(of_longer) > bits(on) + 0.2
print(f"RETROfit:                  200 steps after 400, {bits(on):.1f} bits per byte")

# %% [markdown]
# On this corpus more compute did not help: a digit still costs what a guess costs. The training text has the other
# document of most names, but in this many steps the baseline did not learn their codes by heart. RETROfit looks them
# up. That is the case *for* retrieval, in its purest form.
#
# Most text is not like this, and there the comparison can turn. Here is what the project's experiment recorded on
# Python's standard library, at equal tokens ([EXPERIMENTS.md](../EXPERIMENTS.md), `wikitext-style`; the numbers are
# from `docs/experiments/wikitext-style.json`):

# %%
RECORDED = {  # bits per byte of the same held-out tokens; source: docs/experiments/wikitext-style.json
    "baseline": 1.421601, "prepended neighbours": 1.421077, "RETROfit": 1.382184, "kNN-LM": 1.355566, "RETRO": 1.339846,
    "continuous cache": 1.127744,
}  # fmt: skip
shares = {name: 100 * (1 - value / RECORDED["baseline"]) for name, value in RECORDED.items() if name != "baseline"}
figure, axis = plt.subplots(figsize=(6, 2.3), layout="constrained")
axis.barh(list(shares), list(shares.values()), color=[GREY, BLUE, ORANGE, BLUE, SAND])
for number, share in enumerate(shares.values()):
    axis.text(share + 0.3, number, f"{share:.2f} %", va="center", fontsize=8)
axis.set(xlabel="bits saved against the baseline, %", xlim=(0, 24), title="Python's standard library, equal tokens")
plt.show()
for name, share in shares.items():
    print(f"{name:20} saves {share:5.2f} %")

# %% [markdown]
# *Figure 10.2.* On source code, looking back in the same document saves most by far. One seed.
#
# Four things in this figure are uncomfortable, and you should know them.
#
# - The winner is the cache. It saves **20.67 %** where RETRO saves **5.75 %**, because a Python module repeats its own
#   names all the time. RETRO never retrieves from the document that it is reading.
# - kNN-LM ran with 8 % of its datastore. It searched 261,663 of 3,307,071 training tokens, while RETRO searched its
#   whole database. What kNN-LM saves with all of them has not been measured; it may be more than RETRO does.
# - RETROfit goes on from the baseline, for a quarter of the baseline's steps, so it alone has seen more tokens. It
#   still saves only **2.77 %**. In the paper RETROfit comes close to a RETRO that was trained from scratch. Here it
#   does not.
# - For the other methods this is a comparison at equal tokens, with small models that have seen
#   three quarters of their corpus once. Such a baseline still improves quickly, so a few hundred more steps may be
#   worth more than retrieval. The project has recorded no comparison at equal compute on this corpus, and claims none.
#
# What the **5.75 %** consist of is the subject of [tutorial 8](08_is_it_leakage.ipynb): much of it is copying from
# near-copies.
#
# In the paper, on Wikitext103 (§4.1, table 4), the baseline has a test perplexity, which is $e$ to the mean loss in
# nats, of 22.96, kNN-LM 19.54, and a RETROfit of the baseline, with Wikipedia as its database, 18.97. There RETROfit is
# ahead of kNN-LM. Here it is behind.
#
# ## Table 3, in a page
#
# Other systems answer the same questions differently. How often does the system retrieve? What is its *retriever*, the
# part that searches, and is it trained? How does what was found *enter* the model?
#
# | system | a retrieval for each | retriever | what was found |
# | --- | --- | --- | --- |
# | continuous cache | token | frozen: the model's own states | is added to the probabilities |
# | kNN-LM | token | frozen: the model's own states | is added to the probabilities |
# | SPALM | token | frozen, as above | is mixed with the hidden state, by a trained gate |
# | DPR | prompt | trained on pairs | is where an answer is extracted from |
# | REALM | prompt | trained with the model | is put before the prompt |
# | RAG | prompt | DPR, trained further | is read by cross-attention |
# | FiD | prompt | DPR, frozen | is read by cross-attention |
# | EMDR² | prompt | trained with the model | is read by cross-attention |
# | RETRO | chunk of 64 tokens | a frozen BERT | is read by chunked cross-attention |
#
# **A token at a time.** The cache ([Grave et al. 2017](https://arxiv.org/abs/1612.04426)), kNN-LM ([Khandelwal et al.
# 2020](https://arxiv.org/abs/1911.00172)) and SPALM ([Yogatama et al. 2021](https://arxiv.org/abs/2102.02557)) use the
# kind of datastore that you built here. The cache looks back in the document, kNN-LM looks through a corpus, and both
# mix with one fixed share. SPALM has a trained gate, which mixes the hidden state with what was found, in another
# proportion at each token. All three are expensive in keys and in searches, since they need one of each for every
# token.
#
# **A prompt at a time.** DPR, REALM, RAG, FiD and EMDR² are built for questions. The question is searched for once, in
# a collection of passages, and then answered.
#
# - DPR ([Karpukhin et al. 2020](https://arxiv.org/abs/2004.04906)) trains two encoders so that a question lies near the
#   passages that answer it and far from others. A reader then marks the answer in the passage.
# - REALM ([Guu et al. 2020](https://arxiv.org/abs/2002.08909)) also trains the retriever, by the probability of the
#   answer. So it must compute all keys again and again while it trains.
# - RAG ([Lewis et al. 2020](https://arxiv.org/abs/2005.11401)) generates the answer, and trains DPR's encoder of
#   questions further, together with the part that writes.
# - FiD ([Izacard & Grave 2021](https://arxiv.org/abs/2007.01282)) leaves the retriever as it is. It encodes each
#   passage alone, and its decoder attends to all of them together. So it can read many passages.
# - EMDR² ([Sachan et al. 2021](https://arxiv.org/abs/2106.05346)) trains retriever and reader together. Its examples do
#   not say which passages are the right ones, so the training estimates that, too.
#
# **A chunk at a time.** RETRO asks again every 64 tokens. So a long text is not stuck with what its beginning asked
# for. RETRO's retriever is frozen, and that is what allows a *large* database: keys are computed once, and the
# neighbours for training are looked up once. The paper's database has some $10^{12}$ tokens, where those of the other
# systems reach $10^9$. The price is a retriever that never learns what helps. Each neighbour is encoded alone, as in
# FiD. What RETRO adds is the chunks, and a training that is ordinary language modelling on all text.
#
# On questions FiD stays ahead. On the data set Natural Questions, 51.4 % of its answers are exactly right. RETRO has
# 45.5 %, and a model without a database 30.4 % (§4.3).
#
# ## Exercises
#
# Write your answer into the cell with the dots and run the cell below it.
#
# **10.1** The whole distribution $p_\text{kNN}$, not only the probability of the true token. Given hidden states (n, d)
# and the datastore's `keys` and `values`, return (n, vocabulary), each row a distribution. `beta` is $\beta$.
# `knn_lm.nearest_keys(hidden, keys)` returns the ids and the squared distances of the ten nearest keys, (n, 10) each.


# %% tags=["exercise"]
def knn_distribution(hidden, keys, values, beta, vocabulary): ...


# %% tags=["check"]
check_10_1(knn_distribution)

# %% [markdown]
# **10.2** The share $\lambda$ could be another one for each token. How good could such a choice be at best? Given the
# model's `nats` (n,) and the other prediction's probability `p` (n,) of the true token, return the nats (n,) if at each
# token the better of the two had been chosen in hindsight. `p` may be 0.


# %% tags=["exercise"]
def hindsight(nats, p): ...


# %% tags=["check"]
check_10_2(hindsight)

# %% [markdown]
# **10.3** What share of a RETRO's parameters does RETROfit train, embeddings not counted? You get the configurations of
# a baseline and of the RETRO that has grown out of it. `count_parameters(config)` counts without embeddings.


# %% tags=["exercise"]
def share_trained(baseline, retro): ...


# %% tags=["check"]
check_10_3(share_trained)

# %% [markdown]
# ## What you have gained
#
# - RETROfit adds retrieval to a trained model and keeps that model: off is the old model to the bit. You have seen how
#   one more trained array breaks this promise. The promise says nothing about retrieval on, which may help or harm.
# - kNN-LM trains no weights, and needs one key for every token. It finds what the frozen model's hidden states
#   distinguish, and nothing else.
# - A fair comparison gives all methods the same tokens and the same neighbours, and says whether it is made at equal
#   tokens or at equal compute. For small models the difference is large.
# - The other systems differ in three answers: how often they retrieve, what retrieves, and how the model reads it.
#
# Next: [tutorial 11, one kernel, three ways](11_one_kernel_three_ways.ipynb).
