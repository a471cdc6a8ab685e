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
# A language model is trained already, and only then does one wish that it had a memory. There are two classical ways.
# **kNN-LM** (Khandelwal et al. 2020) changes nothing in the model: it notes what the model's hidden state was before
# each token of a corpus, and mixes the tokens that came after similar states into the prediction. **RETROfit** (§4.2)
# freezes the model and trains only what RETRO adds to it, chunked cross-attention and the neighbour encoder. Here
# both are added to one small model, over one corpus.
#
# Afterwards you can
#
# - RETROfit a baseline, and show that with retrieval off it is the baseline still, to the bit;
# - build a datastore for kNN-LM, and write its mixture down;
# - say what each of the two can find that the other cannot, and why: *what* is compared, *when*, and who learned to
#   read;
# - place the other systems of the paper's table 3 by the same questions.

# %%
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

# %% [markdown]
# ## A corpus of which half of the answer stands elsewhere
#
# `retro_np.experiments.facts` invents names, each with a code of five digits. Two documents tell of each name, in other
# words; a document is two chunks, one that names and one that holds the code. Nothing in a name hints at its code. A
# tenth of the documents is held out, whole: then the other document of the same name is, as a rule, in the database.

# %%
facts = invent(600, seed=0)
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
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
# ## The baseline
#
# A plain decoder of two layers. One token is one byte, so it learns soon how names and sentences go, and it can only
# guess the digits.

# %%
baseline_config = RetroConfig(database.vocabulary_size, 64, 256, n_heads=4, d_head=16, n_layers=2, chunk_size=m)
training = TrainingConfig(
    steps=400, sequence_length=8 * m, batch_size=4, neighbours=1, learning_rate=4e-3, warmup=30, seed=0
)
baseline = train(database, baseline_config, training, folder / "baseline")
print(f"{count_parameters(baseline_config, embeddings=True):,} numbers, trained for {training.steps} steps")

# %% [markdown]
# ## RETROfit
#
# `retrofit` puts fresh chunked cross-attention (here in layer 2) and a fresh encoder around the trained weights, which
# are taken over as they are. `train` is told what may change by a predicate of a parameter's name. `is_retrieval` says
# yes to what RETRO adds: names that begin with `encoder.` or contain `.cca.`; where it says no, no gradient is made,
# no moment kept, and no weight decayed.
#
# (`copying_start` lets encoder and cross-attention begin as a rough copying machine; it is this library's, not the
# paper's, and saves a small model most of the steps that it takes to find out that neighbours are worth reading.)

# %%
encoder = EncoderConfig(64, 256, n_heads=4, d_head=16, n_layers=1, ca_layers=(1,))
start, config = retrofit(
    baseline, replace(baseline_config, copying_start=True), (2,), encoder, np.random.default_rng(1)
)
fit = replace(training, steps=200)
retrofitted = train(database, config, fit, folder / "retrofit", begin_from=(start, "baseline"), trainable=is_retrieval)
shapes = dict(named_leaves(parameter_shapes(config)))
trained = sum(int(np.prod(shape)) for name, shape in shapes.items() if is_retrieval(name))
print(f"{len(shapes)} arrays; {sum(map(is_retrieval, shapes))} are trained, {trained:,} numbers")
before, after = dict(named_leaves(baseline)), dict(named_leaves(retrofitted))
assert all(np.array_equal(before[name], after[name]) for name in before)
print("not one number of the baseline has changed")

# %% [markdown]
# To compare anything, every way must be scored at the same tokens. `frozen_model` scores a plain model and keeps the
# hidden state that each token was predicted from; the function below does the same with neighbours.

# %%
window = 8 * m
plain, hidden, documents = knn_lm.frozen_model(baseline, baseline_config, database, sequence_length=window)


def scored(params, config, k):
    """A model with k neighbours at the same held-out tokens; k = 0: retrieval off."""

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
print(f"retrieval off: the baseline's {len(off.nats)} losses, differing by {np.abs(off.nats - same.nats).max()}")

# %% [markdown]
# They differ by **0.0**, to the last bit. With no neighbours the cross-attention adds nothing, and all else is the
# baseline. That is what freezing buys: whoever has a trained model can add retrieval and cannot lose by it, since it
# can be switched off.
#
# ### Break it
#
# Let one more array train, the gains of the last norm: 64 numbers.

# %%
leaky = train(
    database, config, replace(fit, steps=10), folder / "leaky", begin_from=(start, "baseline"),
    trainable=lambda name: is_retrieval(name) or name == "norm",
)  # fmt: skip
off_leaky = scored(leaky, config, 0)
changed = np.mean(off_leaky.nats != same.nats)
assert changed > 0.9
print(f"after ten steps more than 90 % of the losses with retrieval off are others: {changed > 0.9}")

# %% [markdown]
# ## kNN-LM
#
# A **datastore**: for each training token, the hidden state that it was predicted from is the key, and the token itself
# is the value. At each token to be predicted, the ten nearest keys vote:
#
# $$p_\text{kNN}(w) \propto \sum_{i \,:\, \text{value}_i = w} e^{-\alpha\, \lVert h - \text{key}_i \rVert^2},
# \qquad p = \lambda\, p_\text{kNN} + (1 - \lambda)\, p_\text{LM}$$
#
# Two numbers are tuned, α and λ, and must not be tuned where they are scored: `knn_lm` tunes them on every second
# held-out document, scores the others, and the other way round.

# %%
keys, values = knn_lm.datastore(baseline, baseline_config, database, None, sequence_length=window)
with_knn, chosen = knn_lm.knn_lm(plain, hidden, documents, keys, values)
print(f"datastore: {len(keys):,} keys of {keys.shape[1]} columns, one a training token")
print(f"keys of the chunks, which RETRO compares: {database.n_chunks:,}")
print(f"bits per byte: baseline {bits(plain):.3f}, kNN-LM {bits(with_knn):.3f}; (α, λ) of either half: {chosen}")
assert bits(with_knn) < bits(plain)

# %% [markdown]
# There is a key for each token, where RETRO has one for each chunk. For the paper's figures this is 15 TB against
# 215 GB for 4 billion tokens (tutorial 12).
#
# ### Fool yourself
#
# The datastore must not hold what is scored. If it does, every state finds itself, at distance 0, and its own token.

# %%
more_keys, more_values = np.concatenate([keys, hidden]), np.concatenate([values, plain.tokens])
leaked, _ = knn_lm.knn_lm(plain, hidden, documents, more_keys, more_values)
assert bits(leaked) < bits(plain) / 2
print(f"with the held-out documents in the datastore: {bits(leaked):.3f} bits per byte, less than half")

# %% [markdown]
# ## On the same neighbours
#
# The two retrieve different things, so part of the difference may be what is found and part how it is read. So give
# every method exactly RETRO's neighbours, the nearest chunk [N, F] of the chunk before:
#
# - **prepended**: the baseline finds the neighbour's text in front of its context, and nothing else changes;
# - **kNN-LM on the neighbour**: the datastore of a token holds just the tokens of its chunk's neighbour;
# - **RETROfit** reads it by cross-attention.
#
# Beside them, the **continuous cache** (Grave et al. 2017), kNN-LM's elder: its datastore is the document itself, so
# far.

# %%
values_of_rows = sequence_neighbours(database, valid, np.arange(len(valid.tokens))[None], 1)[0].reshape(-1, 2 * m)
states = hidden_states(baseline, baseline_config, values_of_rows, None)[:, :-1]  # each with the token after it:
following = values_of_rows[:, 1:]
row = plain.positions // m  # the chunk that a token is in; what it may read was found by the chunk before, row − 1
later = np.asarray(valid.documents)[row - 1] == documents  # in a document's first chunk nothing is retrieved yet
distances = np.sum((hidden[:, None] - states[row - 1]) ** 2, axis=-1)
distances[(following[row - 1] == 0) | ~later[:, None]] = np.inf  # padding, and what is not there, has no vote
order = np.argsort(distances, axis=1, kind="stable")[:, : knn_lm.KNN_NEIGHBOURS]
hits = np.take_along_axis(following[row - 1], order, 1) == plain.tokens[:, None]
distances = np.take_along_axis(distances, order, 1)


def vote(alpha):
    """What the neighbour's tokens give each token; where there is no neighbour, what the model does."""
    with np.errstate(invalid="ignore"):
        probability = knn_lm.knn_probability(distances, hits, alpha)
    return np.where(np.isnan(probability), np.exp(-plain.nats), probability)


# %%
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
    print(f"{name:20} {bits(way):.3f} bits per byte, {100 * (bits(way) / bits(plain) - 1):+6.1f} %")
assert bits(on) < min(bits(way) for name, way in ways.items() if name != "RETROfit")

# %% [markdown]
# Which tokens are they? Sort them by what they are: those of the first chunk, where the name is and RETRO has retrieved
# nothing yet; the words of the second; the digits.

# %%
text = np.array([database.text([token]) for token in plain.tokens])
digit = np.char.isdigit(text)
kinds = {"first chunk: the name": ~later, "second chunk: words": later & ~digit, "the code": later & digit}
colours = {
    "prepended": "#c0c0c0",
    "kNN-LM, neighbour": "#f2b98a",
    "kNN-LM, all tokens": "#e07b1f",
    "RETROfit": "#2b7bba",
}
saved = {
    name: [(plain.nats - ways[name].nats)[which].mean() / np.log(2) for which in kinds.values()] for name in colours
}

# %%
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for number, (name, colour) in enumerate(colours.items()):
    axis.bar(np.arange(3) + 0.2 * (number - 1.5), saved[name], 0.18, color=colour, label=name)
axis.axhline(0, color="black", linewidth=0.8)
axis.set_xticks(range(3), list(kinds))
axis.set_ylabel("bits saved a token")
axis.legend(frameon=False)
plt.show()
for name, of in saved.items():
    print(f"{name:20}" + "".join(f"{kind}: {number:+.2f}   " for kind, number in zip(kinds, of, strict=True)))
print(f"a digit that can only be guessed costs {-np.log2(CHANCE) / DIGITS:.2f} bits")
of_all, of_neighbour, by_reading = saved["kNN-LM, all tokens"], saved["kNN-LM, neighbour"], saved["RETROfit"]
assert by_reading[0] == 0
assert of_all[0] > 0
assert by_reading[2] > of_neighbour[2] > 5 * abs(of_all[2])
assert of_neighbour[1] < by_reading[1] - 0.1

# %% [markdown]
# **0.00** is what RETROfit saves in the first chunk: C_1 is predicted without retrieval, by construction (eq. 1). Each
# of five different digits is worth **2.98** bits to whoever can only guess, and RETROfit saves most of that. It alone
# was trained for it, two hundred steps of its own numbers; but at the words, where the neighbour says nothing, that
# training saves nothing. The continuous cache is not in the picture: a document of thirty bytes has nothing to look
# back to.
#
# kNN-LM, over all tokens, helps from the first token on, where a name goes on as it does elsewhere in the corpus. At
# the digits it saves next to nothing. Look at what it finds there: the first digit of a code, and the tokens that
# followed the ten nearest states.

# %%
place = np.flatnonzero(kinds["the code"] & (row == example + 1))[0]
ids = knn_lm.nearest_keys(hidden[place : place + 1], keys)[0][0]
print(f"context:   {database.text(valid.tokens[row[place] - 1])!r}, then {database.text(valid.tokens[row[place]])!r}")
print(f"token:     {str(text[place])!r}")
print(f"kNN-LM:    {[database.text([token]) for token in values[ids]]}")
print(f"neighbour: {database.text(values_of_rows[row[place] - 1])!r}")

# %% [markdown]
# A hidden state says what the *model* takes to come next. A model that was never able to guess a code does not keep the
# name in mind when the code begins, and then all codes look alike to it. kNN-LM can find only what the frozen model
# thought worth knowing; RETRO compares chunks by what stands in them, whatever the model makes of it.
#
# So what kNN-LM lacked was the *finding*: given RETRO's neighbour as its datastore, it saves a good part of the digits'
# bits, too. But it pays for them at the words, where the neighbour has other wordings and the weight λ is the same.
# Cross-attention was trained to tell when the neighbour has something to say. And the baseline, with the same neighbour
# before its eyes, was never taught to look there: what it has not seen in training confuses it.
#
# In large models this is milder, since they have learned to read contexts. The paper's comparison is Wikitext103 (§4.1,
# table 4): test perplexity 22.96 for the baseline, 19.54 for kNN-LM, 18.97 for RETRO with Wikipedia as its database.
#
# ## Table 3, in a page
#
# Other systems answer the same questions otherwise: how often is retrieved, with what *retriever*, is it *trained*, and
# how does what was found *enter* the model?
#
# | system | a retrieval for each | retriever | what was found |
# | --- | --- | --- | --- |
# | continuous cache (Grave et al. 2017) | token | frozen: the LSTM's own states | is added to the probabilities |
# | kNN-LM (Khandelwal et al. 2020) | token | frozen: the Transformer's own states | is added to the probabilities |
# | SPALM (Yogatama et al. 2021) | token | frozen, as above | is added by a trained gate |
# | DPR (Karpukhin et al. 2020) | prompt | trained by contrast | is where an answer is extracted from |
# | REALM (Guu et al. 2020) | prompt | trained end to end | is put before the prompt |
# | RAG (Lewis et al. 2020) | prompt | DPR, fine-tuned | is read by cross-attention |
# | FiD (Izacard & Grave 2021) | prompt | DPR, frozen | is read by cross-attention |
# | EMDR² (Sachan et al. 2021) | prompt | trained end to end, by expectation–maximisation | is read by cross-attention |
# | RETRO | chunk of 64 tokens | a frozen BERT | is read by chunked cross-attention |
#
# **A token at a time.** Cache, kNN-LM and SPALM share the datastore of this notebook. The cache looks back in the
# document, kNN-LM through a corpus; both mix with one fixed weight. SPALM lets the model learn, from its hidden state,
# how much to take from the neighbours at each token. All are cheap to add, and dear in keys and searches: one a token.
#
# **A prompt at a time.** DPR, REALM, RAG, FiD and EMDR² are built for questions: one search, by the question, in a
# collection of passages, and then an answer. DPR trains two encoders such that a question and a passage that answers
# it are near each other, and others far; a reader then marks the answer in the passage. REALM lets the answer's
# likelihood train the retriever as well, and must therefore make all keys anew while it trains. RAG and FiD generate
# the answer: RAG fine-tunes DPR's question encoder with the generator; FiD leaves the retriever as it is, encodes
# each passage alone and lets the decoder attend to all of them together, so that many passages can be read. EMDR²
# trains both, with the retrieved passages as latent variables.
#
# **A chunk at a time.** RETRO asks again every 64 tokens, so that a long text is not stuck with what its beginning
# asked for. Its retriever is frozen, which is what makes it *large*: keys are made once and training's neighbours are
# looked up once, from 10¹² tokens where the others reach 10⁹. What it gives up is a retriever that learns what helps.
# From FiD it has that each neighbour is encoded alone; new are the chunks, and that training is the usual language
# modelling, of all text.
#
# On questions FiD stays ahead: 51.4 % exact matches on Natural Questions, RETRO 45.5, a closed book 30.4 (§4.3).
#
# ## Exercises
#
# **1.** p_kNN whole: from hidden states (N, d), the datastore's `keys` and `values`, return (N, vocabulary), each row a
# distribution. `nearest_keys(hidden, keys)` gives ids and squared distances (N, 10).


# %% tags=["exercise"]
def knn_distribution(hidden, keys, values, alpha, vocabulary): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def knn_distribution(hidden, keys, values, alpha, vocabulary):
    ids, distances = knn_lm.nearest_keys(hidden, keys)
    weights = np.exp(-alpha * (distances - distances[:, :1]).astype(np.float64))
    out = np.zeros((len(hidden), vocabulary))
    np.add.at(out, (np.arange(len(hidden))[:, None], values[ids]), weights)
    return out / out.sum(axis=1, keepdims=True)


# %% tags=["check"]
some = slice(0, 200)
ids, far = knn_lm.nearest_keys(hidden[some], keys)
for alpha in (0.1, 1.0):
    answer = knn_distribution(hidden[some], keys, values, alpha, database.vocabulary_size)
    assert answer.shape == (200, database.vocabulary_size), answer.shape
    assert np.allclose(answer.sum(axis=1), 1), "a row is a distribution"
    for token in range(database.vocabulary_size):
        expected = knn_lm.knn_probability(far, values[ids] == token, alpha)
        assert np.allclose(answer[:, token], expected), f"token {token}, α = {alpha}"
print("right: rows sum to one, and agree with the library at every token")

# %% [markdown]
# **2.** SPALM's gate chooses a weight for each token. How good could a gate be at best? Given the model's `nats` (N,)
# and the other prediction's probability `p` (N,), return the nats (N,) if at each token the better of the two was taken
# alone, in hindsight.


# %% tags=["exercise"]
def hindsight(nats, p): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def hindsight(nats, p):
    return np.minimum(nats, -np.log(np.maximum(p, 1e-300)))


# %% tags=["check"]
ids, far = knn_lm.nearest_keys(hidden, keys)
probability = knn_lm.knn_probability(far, values[ids] == plain.tokens[:, None], 1.0)
best = hindsight(plain.nats, probability)
assert best.shape == plain.nats.shape, best.shape
assert np.all(np.isfinite(best)), "a token of which p is 0 still has the model's nats"
for weight in np.linspace(0, 0.98, 8):
    assert np.all(best <= knn_lm.mixed(plain.nats, probability, weight) + 1e-9), f"λ = {weight:.2f} is better somewhere"
assert np.all(np.isclose(best, plain.nats) | np.isclose(np.exp(-best), probability)), "neither the one nor the other"
print("right: no fixed weight is better at any token, and each is one of the two")

# %% [markdown]
# **3.** What share of a RETRO's numbers, embeddings left out, does RETROfit train? From a baseline's and a RETRO's
# configuration.


# %% tags=["exercise"]
def share_trained(baseline, retro): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def share_trained(baseline, retro):
    return 1 - count_parameters(baseline) / count_parameters(retro)


# %% tags=["check"]
for plain_name, name in (("baseline-132m", "retro-172m"), ("baseline-7b", "retro-7.5b")):
    preset = RetroConfig.preset(name)
    shapes = [(name, shape) for name, shape in named_leaves(parameter_shapes(preset)) if not name.endswith("embedding")]
    added = sum(int(np.prod(shape)) for name, shape in shapes if is_retrieval(name))
    share = share_trained(RetroConfig.preset(plain_name), preset)
    assert np.isclose(share, added / count_parameters(preset)), f"{name}: {share}"
    print(f"{name}: {100 * share:.1f} %")
print("right: the larger the model, the smaller the share")
