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
# # 9 · Sampling with a memory
#
# A fact has changed, and your language model still says the old one. How do you correct it? If the fact is in the
# weights, you have to train. A RETRO reads its database while it writes, so you edit a document, and the next answer is
# another one. In this tutorial you sample from a small RETRO. You teach it a fact without any training, correct a fact
# and fail the first time, and make it forget one, down to the bytes.
#
# *Reading: about 40 minutes · runs in 8 s on one core · needs tutorials 1 and 7.*
#
# Afterwards you can
#
# - write the sampling loop of a RETRO in twenty lines;
# - say when a sampling RETRO searches, by what, and which of its tokens can know what was found;
# - read a sample that is coloured by what it shares with the retrieved text;
# - edit a database with `add_documents`, `remove_documents` and `compact`, and say what each of them leaves behind;
# - name two cases in which the answer stands in the database and is not given.
#
# Previous: [tutorial 8](08_is_it_leakage.ipynb) · Next: [tutorial 10](10_retrofit_and_knn_lm.ipynb) · Where the model
# and its task come from: [tutorial 7](07_train_one.ipynb) · A sampling loop in one file without the
# library: [mini_retro.py](mini_retro.py)

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import Database, EncoderConfig, RetroConfig, generate, retro
from retro_np.experiments import facts as world
from retro_np.report.samples import BACKGROUNDS, FOREGROUNDS, MAX_SHOWN_RUN_TOKENS, show_chunks
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.tokenizer import encode
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import train
from retro_np.tutorials.checks.tutorial_09 import check_9_1, check_9_2, check_9_3

# %% [markdown]
# The model is like the aided one of [tutorial 7](07_train_one.ipynb), trained here within seconds on fewer people. Its
# training text has invented names with a code of five digits each. Two documents tell each fact, so a code can be
# predicted by whoever retrieves the fact's other document. A token is a byte, and a chunk has $m = 16$ of them.

# %%
facts = world.invent(700, seed=7)
known, unseen = facts[:600], facts[600:]
temporary = tempfile.TemporaryDirectory()  # It is removed when the notebook ends.
m, home = world.CHUNK, Path(temporary.name)
build = BuildConfig(chunk_size=m, vocabulary_size=258, held_out=0.0, neighbours=4, extra_candidates=8, d_key=512)
corpus = world.write_facts(home / "known.jsonl", known, ("told", "asked"))
training_database = build_database(corpus, home / "known", build, "hashing")
config = RetroConfig(
    training_database.vocabulary_size, 64, 256, n_heads=4, d_head=16, n_layers=2, cca_layers=(2,), chunk_size=m,
    encoder=EncoderConfig(64, 256, n_heads=4, d_head=16, n_layers=1), copying_start=True,
)  # fmt: skip
training = TrainingConfig(
    steps=200, sequence_length=8 * m, batch_size=4, neighbours=1, learning_rate=4e-3, warmup=20,
    retrieval_off=0.2, oracle_share=0.5, oracle_steps=100,
)  # fmt: skip
params = train(training_database, config, training, home / "run")

# %% [markdown]
# ## The memory
#
# The model's memory is another database, of people whom the model has never met. Building it needs no model, since it
# stores only texts and keys. But its texts have to be cut into the same tokens and chunks as those of the training.

# %%
path = home / "memory"
memory = build_database(world.write_facts(home / "told.jsonl", unseen[:40], ("told",)), path, build, "hashing")
for fact in unseen[:3]:
    print(world.document(fact, fact.told))

# %% [markdown]
# ## The sampling loop
#
# To write with a memory is to repeat three steps. When a chunk has become whole, search for it. Run the model. Choose
# the next token. Here is the loop:


# %%
def sample(prompt, length, database=None, k=1, temperature=0.0, seed=0):
    """The `length` tokens that our model writes after a prompt. database: None turns retrieval off."""
    rng = np.random.default_rng(seed)
    tokens, retrieved = list(prompt), []  # retrieved: the k values [N, F] of each whole chunk
    for _ in range(length):
        while database is not None and len(retrieved) < len(tokens) // m:  # A chunk has become whole: search.
            start = len(retrieved) * m
            key = database.embed_chunks(np.array([tokens[start : start + m]]))
            ids, _distances = database.search_keys(key, k)
            retrieved.append(database.value(ids[0]))  # (k, 2m)
        neighbours = np.array([retrieved]) if retrieved else None  # (1, whole chunks, k, 2m)
        logits, _vjp = retro(params, config, np.array([tokens]), neighbours)
        scores = logits[0, -1].astype(np.float64)  # of the token after the last one
        scores[config.padding_id] = -np.inf  # Padding is never written.
        if temperature == 0:
            token = scores.argmax()
        else:
            p = np.exp((scores - scores.max()) / temperature)
            token = rng.choice(len(p), p=p / p.sum())
        tokens.append(int(token))
    return tokens[len(prompt) :]


# %% [markdown]
# The temperature divides the logits before the softmax. At 1 the model's own distribution is sampled. Towards 0 all
# weight moves to the likeliest token, and at 0 the loop takes that one without drawing.
#
# To ask for a code, give the model a document in the *other* wording, up to the place where the code begins, and let it
# go on for five tokens. A text to be continued is called a *prompt*.


# %%
def question(fact, before=""):
    """A prompt: the fact's document in the wording that asks, up to its code."""
    return before + world.document(fact, fact.asked).partition(fact.code)[0]


for fact in unseen[:3]:
    prompt = encode(memory.tokenizer, question(fact))
    answers = [memory.text(np.array(sample(prompt, 5, database))) for database in (memory, None)]
    print(f"{question(fact)!r:24} {answers[0]} with the memory, {answers[1]} without")

# %% [markdown]
# With the memory the model gives the codes of strangers. Without the memory it gives codes too, and just as fluently.
# Nothing in the text of an answer tells you which of the two you are reading.
#
# Our loop is wasteful. To choose the next token it runs the whole model on all tokens so far. The library's `generate`
# keeps the keys and values of every attention, so each token passes through the model once. It also keeps the encoded
# neighbours until the next chunk is whole. It can also draw from only the likeliest tokens, with `top_k` or `top_p`. At
# temperature 0 it writes the same tokens as our loop:


# %%
def ask(fact, database, before="", **settings):
    """The model's answer, and what it retrieved. database: None turns retrieval off."""
    prompt = encode(memory.tokenizer, question(fact, before))
    settings = {"k": 1, "temperature": 0} | settings
    tokens, retrieved = generate(params, config, prompt, world.DIGITS, database=database, **settings)
    return memory.text(tokens), retrieved


prompt, length = encode(memory.tokenizer, question(unseen[0])), 40
generated, _retrieved = generate(params, config, prompt, length, database=memory, k=1, temperature=0)
assert sample(prompt, length, memory) == list(generated)
slow, fast = sum(range(len(prompt), len(prompt) + length)), len(prompt) + length - 1
print(f"to write {length} tokens after {len(prompt)}, our loop runs {slow:,} tokens through the model, generate {fast}")
right = np.mean([ask(fact, memory)[0] == fact.code for fact in unseen[:20]])
print(f"{100 * right:.0f} % of 20 answers are right with the memory")
assert right >= 0.9
assert not any(ask(fact, None)[0] == fact.code for fact in unseen[:20])

# %% [markdown]
# ## How sure is it?
#
# Taking the likeliest token hides how sure the model was. So look at the probabilities of the ten digits at each of the
# five places, each time after the right digits before it, with the memory and without. Then let the model draw its
# answer at temperature 1, fifty times.

# %%
fact = unseen[0]
whole = np.array([encode(memory.tokenizer, question(fact) + fact.code)])
places = whole.shape[1] - world.DIGITS + np.arange(world.DIGITS)
alphabet = [encode(memory.tokenizer, digit)[0] for digit in "0123456789"]
value = ask(fact, memory)[1][0].values[None, None]  # (1, 1, k, 2m)
tables = {}  # the probabilities of the ten digits at the five places, (5, 10)
for name, database, neighbours in (("with the memory", memory, value), ("without", None, None)):
    logits = retro(params, config, whole, neighbours)[0][0, places - 1].astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    of_code = np.prod(p[np.arange(world.DIGITS), whole[0, places]])
    tables[name] = p[:, alphabet]
    drawn = Counter(ask(fact, database, temperature=1.0, seed=seed)[0] for seed in range(50))
    often = ", ".join(f"{code} ({times})" for code, times in drawn.most_common(3))
    print(f"{name}: p({fact.code}) = {of_code:.5f}, which is {-np.log2(of_code):.1f} bits")
    print(f"    50 draws gave {len(drawn)} different answers, most often {often}")
    assert (drawn[fact.code] > 25) == (database is not None)

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
for axes, (name, table) in zip(panels, tables.items(), strict=True):
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(title=name, xlabel="next digit", xticks=range(10))
    axes.set_yticks(range(world.DIGITS), list(fact.code))
panels[0].set_ylabel("right digit")
figure.colorbar(image, ax=panels, label="probability")
plt.show()

# %% [markdown]
# *Figure 9.1.* A model that has read the answer puts nearly all probability on one digit in each row. A model that has
# not read it spreads the probability over many digits.
#
# A model that knows does *not* say the same each time. At temperature 1 it says the right code most times, and now and
# then draws a wrong digit, because beside a dark square a little probability is left for the other digits. The model
# without its memory hardly ever says the same code twice. If you want the fact, take temperature 0; if you want to know
# how sure the model is, draw several times and compare.
#
# ## When it searches
#
# A chunk's key is made of all its $m$ tokens, so nothing can be searched for before the last of them is there. At that
# moment its key is made, the database is searched, and what was found is encoded. The last token of the chunk $C_u$ is
# the first position of the attending chunk $H_u^+$, and so the first that reads what was found. The first token of
# $C_{u+1}$ is therefore predicted with the answer at hand. What was computed before stays as it is.

# %%
prompt = encode(memory.tokenizer, question(unseen[0]))
_tokens, retrieved = generate(params, config, prompt, 50 - len(prompt), database=memory, k=1, seed=1)
print("searches at the end of chunks", [item.chunk for item in retrieved], "counted from 0")

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7, 1.6))
axes.axvspan(0, len(prompt), color="#dddddd")
axes.annotate("prompt", (1, 0.8), fontsize=9)
for item in retrieved:
    end = (item.chunk + 1) * m
    axes.axvline(end, color="black", linewidth=1)
    height = 0.15 + 0.18 * item.chunk
    axes.plot([end, min(end + m, 50)], [height, height], color="#2b7bba", linewidth=4, solid_capstyle="butt")
    axes.annotate(rf"$\mathrm{{RET}}(C_{item.chunk + 1})$", (end + 0.5, height + 0.05), fontsize=9, color="#2b7bba")
axes.set(xlim=(0, 55), ylim=(0, 1), yticks=[], xlabel="token; blue: predicted with what was found at its left end")
plt.show()

# %% [markdown]
# *Figure 9.2.* Each whole chunk is searched for once, at its end (black), and what was found serves the next $m$ tokens
# (blue).
#
# Fifty tokens are three whole chunks and two tokens more, so there are three searches. The prompt's chunks are searched
# for, too. This is how a question gets its answer, since the name stands in the prompt.
#
# ## Colours
#
# Did the model copy its answer, or did it happen to write the same? The paper's tables 6 and 7 colour each sampled
# token by a number: the length of the longest run of tokens that ends at this token and also stands in a value that its
# chunk could read. `show_chunks` cuts prompt and sample into chunks and pairs each with what it retrieved at its end.
# In the retrieved text the colours mark what the next chunk has in common with it.


# %% tags=["hide-input"]
def draw_row(axes, y, x, pieces, divider=None):
    for i, piece in enumerate(pieces):
        box = {"facecolor": BACKGROUNDS[piece.run] or "white", "edgecolor": "none", "pad": 1.5}
        colour = "#777777" if piece.prompt else FOREGROUNDS[piece.run] or "black"
        axes.text(x + i, y, piece.text, family="monospace", fontsize=9, color=colour, bbox=box, ha="center")
    if divider:
        axes.plot([x + divider - 0.5] * 2, [y - 0.25, y + 0.55], color="#2b7bba", linewidth=1, zorder=4)


# %% tags=["hide-input"]
def draw_sample(chunks):
    _figure, axes = plt.subplots(figsize=(9, 0.45 * len(chunks) + 0.6))
    for chunk in chunks:
        draw_row(axes, -chunk.number, 0, chunk.tokens)
        for value in chunk.values[:1]:
            draw_row(axes, -chunk.number, m + 7, value.neighbour + value.continuation, divider=m)
    axes.text(-0.5, 1.2, "run of", fontsize=8)
    for run in range(MAX_SHOWN_RUN_TOKENS + 1):
        style = {"facecolor": BACKGROUNDS[run] or "white", "edgecolor": "#cccccc", "pad": 2}
        label = f"{run}" if run < MAX_SHOWN_RUN_TOKENS else "≥ 5"
        axes.text(4 + 3 * run, 1.2, label, fontsize=8, bbox=style, color=FOREGROUNDS[run] or "black")
    axes.text(m + 7, 1.2, "retrieved at the chunk's end, N | F", fontsize=9, color="#2b7bba")
    axes.set(xlim=(-1, 3 * m + 8), ylim=(-len(chunks) + 0.5, 2))
    axes.axis("off")
    plt.show()


# %%
answer, retrieved = ask(unseen[0], memory)
chunks = show_chunks(prompt, encode(memory.tokenizer, answer), retrieved, memory)
draw_sample(chunks)
runs = [piece.run for piece in chunks[1].tokens if not piece.prompt]
print(f"{answer}: runs {runs}")

# %% [markdown]
# *Figure 9.3.* The code's digits darken from left to right, because each ends a longer run that also stands in the
# value. Grey letters are the prompt.
#
# The run includes the space before the code, and it is counted only up to five. Five tokens in a row hardly agree by
# chance here, so the colour is strong evidence of copying. In ordinary text it is weaker evidence, because short runs
# agree everywhere.
#
# ## A document more
#
# The code of `unseen[50]` is told nowhere. The nearest chunk names somebody else, and the model gives that person's
# code, since it has not learned to doubt ([tutorial 7](07_train_one.ipynb)). Then one document is added.


# %%
def tell(fact, database_path, name=None):
    """Add the document that tells a fact."""
    document = {"name": name or f"{fact.name} told", "text": world.document(fact, fact.told)}
    corpus = home / f"{document['name']}.jsonl"
    corpus.write_text(json.dumps(document) + "\n")
    return add_documents(database_path, corpus)


fact = unseen[50]
before, retrieved = ask(fact, memory)
print(f"the code is {fact.code}; the answer is {before}, read in {memory.text(retrieved[0].values[0])!r}")
memory = tell(fact, path)
after, retrieved = ask(fact, memory)
print(f"with the document added it is {after}, read in {memory.text(retrieved[0].values[0])!r}")
assert before != fact.code == after

# %% [markdown]
# The answer is right, and no weight has changed. On disk, the new document is a *shard* of its own, a folder with its
# own tokens, keys and index, and a search asks all shards. The new chunks are numbered on from the last chunk of the
# first shard, so no older id has changed.
#
# ## Break it: a correction that is not heard
#
# It turns out that the code was wrong. Add a document that tells the new code, in the same words.

# %%
corrected = replace(fact, code=world.invent_code(np.random.default_rng(1)))
memory = tell(corrected, path, name=f"{fact.name} corrected")
_answer, retrieved = ask(fact, memory, k=2)
heard, _retrieved = ask(fact, memory)
print(f"old {fact.code}, new {corrected.code}; the answer is {heard}")
for chunk, distance, value in zip(retrieved[0].ids, retrieved[0].distances, retrieved[0].values, strict=True):
    print(f"  chunk {chunk} at {distance:.3f}: {memory.text(value)!r}")
assert heard == fact.code
assert retrieved[0].distances[0] == retrieved[0].distances[1]

# %% [markdown]
# The model still gives the old code. A key is made of the chunk $N$ alone, and the first chunks of both documents are
# the same. So both are equally near, and of equals the lower id comes first, which is the older document. A database
# has no idea of what is true or what is new. To correct a fact, you must also remove the document that tells the old
# one.

# %%
memory = remove_documents(path, [f"{fact.name} told"])
print(f"old {fact.code}, new {corrected.code}; the answer is {ask(fact, memory)[0]}")
assert ask(fact, memory)[0] == corrected.code

# %% [markdown]
# ## Break it: a question that lies across the grid
#
# Put eight characters in front of questions that begin with "about" or "enter". The question is the same, but the
# chunks are cut elsewhere. The first one ends after two letters of the name, and the second one within the code. When
# the code is to be written, the search that would find it has not been made yet.

# %%
before = "listen, "
asking = [f for f in unseen[:40] if not question(f).startswith(f.name)]
prompt = encode(memory.tokenizer, question(asking[0], before))
for start in range(0, len(prompt), m):
    print(repr(memory.text(prompt[start : start + m])))
shares = [np.mean([ask(f, memory, start)[0] == f.code for f in asking]) for start in ("", before)]
print(f"right on the grid: {100 * shares[0]:.0f} %; off it: {100 * shares[1]:.0f} %")
assert shares[1] < 0.3
assert shares[0] >= 0.9

# %% [markdown]
# This is the price of searching only once in $m$ tokens. The gain is that search is cheap: kNN-LM, in
# [tutorial 10](10_retrofit_and_knn_lm.ipynb), searches at each token. For question answering, the paper pads each
# question on the left, so that its end is the end of a chunk (§4.3).
#
# ## Forget
#
# Somebody asks to be forgotten. `remove_documents` enters the document's chunks in a list of *tombstones*. From then on
# no search finds them, and their values are padding. But the bytes stay, since files are not rewritten for the sake of
# one document. `compact` writes new files. The function below looks for a fact's code in the files of tokens, and for
# its name in all other files.


# %%
def traces(database_path, fact):
    """Which files of a database hold the fact's code as tokens, or its name."""
    database = Database.open(database_path)
    code, found = encode(database.tokenizer, fact.code), []
    for file in sorted(p for p in database_path.rglob("*") if p.is_file()):
        if file.name == "tokens.npy":
            stored = np.load(file)
            wanted = np.array(code, stored.dtype).tobytes()
        else:
            stored, wanted = np.frombuffer(file.read_bytes(), np.uint8), fact.name.encode()
        if wanted in stored.tobytes():
            found.append(file.relative_to(database_path).as_posix())
    return found


forgotten = unseen[5]
print("told:     ", ask(forgotten, memory)[0] == forgotten.code, traces(path, forgotten))
memory = remove_documents(path, [f"{forgotten.name} told"])
print("removed:  ", ask(forgotten, memory)[0] == forgotten.code, traces(path, forgotten))
assert any(name.endswith("tokens.npy") for name in traces(path, forgotten))
memory = compact(path)
print("compacted:", ask(forgotten, memory)[0] == forgotten.code, traces(path, forgotten))
assert not traces(path, forgotten)
assert ask(forgotten, memory)[0] != forgotten.code

# %% [markdown]
# The three lines say: told and found; no longer found, but still on disk; gone. After `compact` neither the document's
# text nor its chunks' keys are left, and the chunks have new numbers. What stays was made from the whole corpus: the
# tokenizer, and the counts behind the hashed keys (`hashing.npy`).
#
# What *weights* have learned cannot be taken back like this. Had the document been in the training text, they might
# still know it. So a memory that can be edited is a good place for facts.
#
# ## A language model with a memory
#
# Our model can say five digits. Does the same work with a model that can speak? [Tutorial
# 13](13_a_memory_for_a_language_model.ipynb) gives a memory to SmolLM2, a language model of 135 million parameters that
# others trained. The command `retro-np demo --memory FOLDER` lets it read a folder of yours. On the source of this
# package, of which twelve files were held out, the [README](../README.md) records 1.2998 bits per byte without the
# memory and 1.1802 with it: −9.20 % [−12.06, −6.39]. With the neighbours of others it needs 1.2538, which is −3.54 %.
# So a part of the gain, less than half of it, does not come from what was read. The memory's few weights were trained
# on texts that include other Python code, which helps by itself. On translations of a book, where the database has
# other translations, a memory that was trained for them saves 28.5 % of the bits ([EXPERIMENTS.md](../EXPERIMENTS.md),
# `retrofit-lm`). The loop that samples from such a model is the one above.
#
# ## Exercises
#
# **9.1** At the end of which chunks, counted from 0, does the loop search, for a prompt of `n_prompt` tokens and
# `length` new ones? Return a list of numbers. Mind that the last new token is written, but no longer read.


# %% tags=["exercise"]
def searches(n_prompt, length, m): ...


# %% tags=["check"]
check_9_1(searches)

# %% [markdown]
# **9.2** The colours. For each of the tokens `(n,)`, return the length of the longest run of tokens that ends at it and
# also stands in one of the values `(k, r)`. Token 0 is padding and matches nothing. Plain loops are fine.


# %% tags=["exercise"]
def run_lengths(tokens, values): ...


# %% tags=["check"]
check_9_2(run_lengths)

# %% [markdown]
# **9.3** Forget a fact. Take the document `name` out of the database in the folder `path`, so that no file holds a
# trace of it. Return the names of the documents that are left: `database.documents` has a record for each of them, with
# its `"name"`.


# %% tags=["exercise"]
def forget(path, name): ...


# %% tags=["check"]
check_9_3(forget)

# %% [markdown]
# ## What you have gained
#
# - Sampling with a memory is a loop of three steps: search whenever a chunk has become whole, run the model, choose a
#   token. `generate` does the same, and runs each token through the model once.
# - What the database holds changes what the model says, with no training at all. Adding is easy, correcting means also
#   removing, and forgetting means rewriting files.
# - The answer may stand in the database and not be given: if an older document is as near, or if the question lies
#   across the grid of chunks.
# - An answer that was read and one that was made up look alike. Their probabilities do not, and neither do the colours.
#
# Next: [tutorial 10 · RETROfit and kNN-LM](10_retrofit_and_knn_lm.ipynb)
