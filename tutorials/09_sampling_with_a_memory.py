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
# A model that reads its database while it writes knows what stands in there, and nothing has to be trained to change
# that. This tutorial samples from a small RETRO, adds a document and watches the answer change, corrects one (and
# fails, the first time), and forgets one, down to the bytes.
#
# Afterwards you can
#
# - say when a sampling RETRO searches, by what, and which of its tokens can know what was found;
# - read a sample that is coloured by its longest common prefix with what was retrieved;
# - edit a database with `add_documents`, `remove_documents` and `compact`, and say what each leaves behind;
# - name two cases in which the answer stands in the database and is not given.
#
# The model is that of tutorial 7, trained here again on all of its documents: names with a code each, of which it can
# only learn from a retrieved document. That takes some ten seconds of one core.

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np import Database, EncoderConfig, RetroConfig, generate
from retro_np.experiments import facts as world
from retro_np.kernels.substring import common_prefix_lengths
from retro_np.report.samples import BACKGROUNDS, FOREGROUNDS, MAX_SHOWN_RUN_TOKENS, show_chunks
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.tokenizer import encode
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import train

# %%
facts = world.invent(700, seed=7)
known, unseen = facts[:600], facts[600:]
temporary = tempfile.TemporaryDirectory()  # gone when the notebook ends
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
# Another database, of names that the model has never seen. It stores text and keys; the model is not asked. Its
# tokens and chunks must be the model's, so it is built in the same way.

# %%
path = home / "memory"
memory = build_database(world.write_facts(home / "told.jsonl", unseen[:40], ("told",)), path, build, "hashing")
for fact in unseen[:3]:
    print(world.document(fact, fact.told))

# %% [markdown]
# To ask for a code, give the model a document in *another* wording up to the place where the code begins, and let it
# go on for five tokens. Temperature 0 takes the likeliest token each time.


# %%
def question(fact, before=""):
    """A prompt: the fact's document in the wording that asks, up to its code."""
    return before + world.document(fact, fact.asked).partition(fact.code)[0]


def ask(fact, database, before="", **settings):
    """The model's answer, and what it retrieved. database: None: retrieval off."""
    prompt = encode(memory.tokenizer, question(fact, before))
    settings = {"k": 1, "temperature": 0} | settings
    tokens, retrieved = generate(params, config, prompt, world.DIGITS, database=database, **settings)
    return memory.text(tokens), retrieved


for fact in unseen[:3]:
    print(f"{question(fact)!r:24} {ask(fact, memory)[0]} with the memory, {ask(fact, None)[0]} without")
right = np.mean([ask(fact, memory)[0] == fact.code for fact in unseen[:20]])
assert right >= 0.9
assert not any(ask(fact, None)[0] == fact.code for fact in unseen[:20])

# %% [markdown]
# Sampled at temperature 1, a model that knows says the same each time, and one that guesses does not.

# %%
for database, name in ((memory, "with the memory"), (None, "without")):
    drawn = [ask(unseen[0], database, temperature=1.0, seed=seed)[0] for seed in range(12)]
    print(f"{name:16} {' '.join(sorted(set(drawn)))}")
    share = drawn.count(unseen[0].code) / len(drawn)
    assert share > 0.5 if database else share < 0.2

# %% [markdown]
# ## When it searches
#
# A chunk's key is made of all its *m* tokens, so that nothing can be searched for before the last of them is there.
# At that moment `generate` embeds the chunk, searches, and encodes what it finds; the last token of the chunk is the
# first position of the attending chunk H_u⁺, and the first that can read it. Of what comes before, nothing is
# computed again.

# %%
prompt = encode(memory.tokenizer, question(unseen[0]))
sample, retrieved = generate(params, config, prompt, 50 - len(prompt), database=memory, k=1, seed=1)
figure, axes = plt.subplots(figsize=(7, 1.6))
axes.axvspan(0, len(prompt), color="#dddddd")
axes.annotate("prompt", (1, 0.8), fontsize=9)
for item in retrieved:
    end = (item.chunk + 1) * m
    axes.axvline(end, color="black", linewidth=1)
    height = 0.15 + 0.18 * item.chunk
    axes.plot([end, min(end + m, 50)], [height, height], color="#2b7bba", linewidth=4, solid_capstyle="butt")
    axes.annotate(f"RET(C{item.chunk + 1})", (end + 0.5, height + 0.05), fontsize=9, color="#2b7bba")
axes.set(xlim=(0, 55), ylim=(0, 1), yticks=[], xlabel="token; blue: predicted with what the line before it found")
plt.show()
print("searches at the end of chunks", [item.chunk for item in retrieved], "counted from 0")

# %% [markdown]
# Fifty tokens are three whole chunks and two tokens, and there are three searches. The prompt's whole chunks are
# searched for as well: this is how a question gets its answer, since the name stands in the prompt.
#
# ## Colours
#
# The paper's tables 6 and 7 colour each sampled token by the longest run of tokens, ending at it, that also stands in
# a value that its chunk could read. `show_chunks` cuts prompt and sample into such chunks, each beside what it
# retrieved at its end, whose tokens are coloured by what the next chunk has of them.


# %%
def draw_row(axes, y, x, pieces, divider=None):
    for i, piece in enumerate(pieces):
        box = {"facecolor": BACKGROUNDS[piece.run] or "white", "edgecolor": "none", "pad": 1.5}
        colour = "#777777" if piece.prompt else FOREGROUNDS[piece.run] or "black"
        axes.text(x + i, y, piece.text, family="monospace", fontsize=9, color=colour, bbox=box, ha="center")
    if divider:
        axes.plot([x + divider - 0.5] * 2, [y - 0.25, y + 0.55], color="#2b7bba", linewidth=1)


# %%
def draw_sample(chunks):
    _figure, axes = plt.subplots(figsize=(9, 0.45 * len(chunks) + 0.6))
    for chunk in chunks:
        draw_row(axes, -chunk.number, 0, chunk.tokens)
        for value in chunk.values[:1]:
            draw_row(axes, -chunk.number, m + 4, value.neighbour + value.continuation, divider=m)
    for run in range(MAX_SHOWN_RUN_TOKENS + 1):
        style = {"facecolor": BACKGROUNDS[run] or "white", "edgecolor": "#cccccc", "pad": 2}
        label = f"{run}" if run < MAX_SHOWN_RUN_TOKENS else "≥ 5"
        axes.text(3 * run, 1.2, label, fontsize=8, bbox=style, color=FOREGROUNDS[run] or "black")
    axes.text(m + 3.5, 1.2, "retrieved at the chunk's end, N | F", fontsize=9, color="#2b7bba")
    axes.set(xlim=(-1, 3 * m + 5), ylim=(-len(chunks) + 0.5, 2))
    axes.axis("off")
    plt.show()


answer, retrieved = ask(unseen[0], memory)
chunks = show_chunks(prompt, encode(memory.tokenizer, answer), retrieved, memory)
draw_sample(chunks)
runs = [piece.run for piece in chunks[1].tokens if not piece.prompt]
print(f"{answer}: runs {runs}")

# %% [markdown]
# The prompt is grey. The code's digits darken from left to right: each is the end of a longer run that the value holds
# too, the space before the code included. A run of five tokens that agree by chance does not happen here, so the colour
# is a proof of copying. In ordinary text it is less of one, for short runs agree everywhere.
#
# ## A document more
#
# `unseen[50]` is told nowhere. The nearest chunk names somebody else, and the model, which has not learnt to doubt
# (tutorial 7), gives that one's code. One document is added, and the answer is right: no weight has changed.


# %%
def tell(fact, database_path, name=None):
    """Add the document that tells a fact."""
    document = {"name": name or f"{fact.name} told", "text": world.document(fact, fact.told)}
    corpus = home / f"{document['name']}.jsonl"
    corpus.write_text(json.dumps(document) + "\n")
    return add_documents(database_path, corpus)


fact = unseen[50]
before, retrieved = ask(fact, memory)
print(f"asked for {fact.code}: {before}, of {memory.text(retrieved[0].values[0])!r}")
memory = tell(fact, path)
after, retrieved = ask(fact, memory)
print(f"and with the document added: {after}, of {memory.text(retrieved[0].values[0])!r}")
assert before != fact.code == after

# %% [markdown]
# The new document is a shard of its own, with an index of its own, and a search asks both. Its chunks' ids go on where
# those of the first shard end, so that none has changed.
#
# ## Break it: a correction that is not heard
#
# The code was wrong; here is another. Add a document that tells the new one, in the same words.

# %%
corrected = replace(fact, code=world.invent_code(np.random.default_rng(1)))
memory = tell(corrected, path, name=f"{fact.name} corrected")
answer, retrieved = ask(fact, memory, k=2)
heard, _ = ask(fact, memory)
print(f"old {fact.code}, new {corrected.code}; the answer is {heard}")
for chunk, distance, value in zip(retrieved[0].ids, retrieved[0].distances, retrieved[0].values, strict=True):
    print(f"  chunk {chunk} at {distance:.3f}: {memory.text(value)!r}")
assert heard == fact.code
assert retrieved[0].distances[0] == retrieved[0].distances[1]

# %% [markdown]
# The old code is given still. Keys are made of N alone, and both documents name the same in the same words: they are
# equally near, and of equals the lower id, the older, comes first. A database has no idea of what is true or new. Who
# corrects must also take back.

# %%
memory = remove_documents(path, [f"{fact.name} told"])
print(f"old {fact.code}, new {corrected.code}; the answer is {ask(fact, memory)[0]}")
assert ask(fact, memory)[0] == corrected.code

# %% [markdown]
# ## Break it: a question that lies across the grid
#
# Put eight characters before questions that begin with "about" or "enter". All that is asked is the same, but chunks
# are cut elsewhere: the first ends after two letters of the name, and the second within the code. When the code is to
# be given, the search that would find it has not been made yet.

# %%
before = "listen, "
asking = [f for f in unseen[:40] if not question(f).startswith(f.name)]
prompt = encode(memory.tokenizer, question(asking[0], before))
for start in range(0, len(prompt), m):
    print(repr(memory.text(prompt[start : start + m])))
shares = [np.mean([ask(f, memory, some)[0] == f.code for f in asking]) for some in ("", before)]
print(f"right on the grid: {100 * shares[0]:.0f} %; off it: {100 * shares[1]:.0f} %")
assert shares[1] < 0.3
assert shares[0] >= 0.9

# %% [markdown]
# This is the price of searching once in *m* tokens, which makes the search cheap (kNN-LM searches at each token). The
# paper's answer in question answering (C.4) is to pad the question on the left, so that it ends with a chunk.
#
# ## Forget
#
# `remove_documents` lists the document's chunks in tombstones. From then on no search finds them and their values are
# padding. The bytes stay: files are not rewritten for one document. `compact` writes new ones.


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
# After `compact` neither its text nor its chunks' keys are left, and ids are given anew. What stays are sums over the
# whole corpus, the tokenizer and how often each pair of tokens occurred (`hashing.npy`). What cannot be taken back like
# this is what *weights* have learnt: had the document been in the training text, they might know it still. That a
# memory can be edited is an argument for keeping facts there (the paper makes the point for privacy), not a promise
# about the model.
#
# ## Exercises
#
# **1.** At the end of which chunks, counted from 0, does `generate` search, for a prompt of `n_prompt` tokens and
# `length` new ones? The last token drawn is not read by the model any more.


# %% tags=["exercise"]
def searches(n_prompt, length, m): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def searches(n_prompt, length, m):
    read = n_prompt + length - 1
    return list(range(read // m))


# %% tags=["check"]
for n_prompt, length in ((3, 5), (15, 1), (16, 1), (16, 16), (17, 16), (1, 48), (20, 29)):
    _, retrieved = generate(params, config, [65] * n_prompt, length, database=memory, k=1)
    assert list(searches(n_prompt, length, m)) == [item.chunk for item in retrieved], (n_prompt, length)
print("right: as generate does")

# %% [markdown]
# **2.** The colours: for each of the tokens (n,), the length of the longest run that ends at it and stands in one of
# the values (k, r). Token 0 is padding and matches nothing.


# %% tags=["exercise"]
def run_lengths(tokens, values): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def run_lengths(tokens, values):
    out = np.zeros(len(tokens), int)
    for i in range(len(tokens)):
        for value in values:
            for j in range(len(value)):
                run = 0
                while run <= min(i, j) and tokens[i - run] == value[j - run] != 0:
                    run += 1
                out[i] = max(out[i], run)
    return out


# %% tags=["check"]
rng = np.random.default_rng(0)
for _ in range(50):
    tokens, values = rng.integers(0, 3, 10), rng.integers(0, 3, (2, 12))
    assert np.array_equal(run_lengths(tokens, values), common_prefix_lengths(tokens, values)), (tokens, values)
print("right: as the report colours them")

# %% [markdown]
# **3.** Forget a fact: take the document `f"{fact.name} told"` out of the database at `path` so that no file holds a
# trace of it, and return the database.


# %% tags=["exercise"]
def forget(path, fact): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def forget(path, fact):
    remove_documents(path, [f"{fact.name} told"])
    return compact(path)


# %% tags=["check"]
another = tempfile.TemporaryDirectory()
trial = Path(another.name) / "memory"
build_database(home / "told.jsonl", trial, replace(build, neighbours=2), "hashing")
left = forget(trial, unseen[7])
assert traces(trial, unseen[7]) == [], f"it still stands in {traces(trial, unseen[7])}"
assert ask(unseen[7], left)[0] != unseen[7].code, "it is still answered"
assert traces(trial, unseen[8]), "another document has gone, too"
assert len(left.documents) == 39, f"{len(left.documents)} documents are left, of 40"
print("right: gone, and nothing else with it")
