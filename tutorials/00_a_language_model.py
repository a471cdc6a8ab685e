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
# # 0 · A language model in NumPy
#
# Read this line of Python: `for i in range(`. You have an idea of what comes next. It may be `n` or `len`, and it is
# surely not `%`. A *language model* is a function that turns such ideas into numbers: given a text so far, it gives
# every possible next token a probability. That is all it does. How does one build such a function, how does one say
# how good it is, and how does it learn? Here you build one from nothing: first a table of counts, then a transformer
# that learns to write something that looks like Python.
#
# *Reading: about 55 minutes · runs in 25 s on one core · needs NumPy and the chain rule.*
#
# *On the path “Understand it” of the book's contents, read as far as the end of “A decoder block”, and then the two
# sections “Break it: without the mask” and “What this model cannot know”. If you know transformers, go on with
# tutorial 1.*
#
# Afterwards you can
#
# - measure any language model in nats and in bits per byte, and say why bytes;
# - derive the gradient $p - y$ of softmax and cross-entropy, and the pullback of an embedding;
# - explain attention from nothing: queries, keys, values, the causal mask and heads;
# - say what each part of a decoder block is for, and what each line of AdamW does;
# - write a training loop and a sampling loop.
#
# Next: [1 · Chunks, neighbours, and a database](01_chunks_neighbours_and_a_database.ipynb), which gives a language
# model something to read. · All letters: [symbols](../docs/symbols.md)
#
# The backward passes that are used here without a derivation are derived in [tutorial
# 3](03_backward_passes_by_hand.ipynb). The transformer is due to [Vaswani et al.
# 2017](https://arxiv.org/abs/1706.03762).

# %%
# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread.

# %%
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from retro_np.nn.attention import relative_attention
from retro_np.nn.operators import gelu, linear, rms_norm
from retro_np.tree import map_tree, named_leaves
from retro_np.tutorials.checks.tutorial_00 import check_0_1, check_0_2, check_0_3, check_0_4

BLUE, ORANGE, GREY, NAVY, SAND = "#2b7bba", "#e07b1f", "#8c8c8c", "#14334d", "#f2b880"

# %% [markdown]
# ## A text, and its tokens
#
# We need a text that is on every machine that runs Python. Python's own standard library is one. We train on some of
# its modules and *hold out* five others. A model is judged by the modules that it has never seen, because a model
# that learned its text by heart would look perfect on that text.
#
# A model does not read letters. It reads *tokens*: integers, each of which stands for a piece of text. The set of all
# tokens is the *vocabulary* $\mathcal{V}$. The simplest choice is used here: a token is one byte, so that
# $|\mathcal{V}| = 256$. An ASCII character is one byte, and every other character is two to four bytes.

# %%
LIBRARY = Path(os.__file__).parent
NAMES = """
argparse ast bdb calendar cmd codecs configparser contextlib copy csv dataclasses
difflib doctest enum fractions ftplib functools gettext heapq inspect locale mailbox
optparse pdb pickle pstats queue sched selectors shutil smtplib socket ssl
statistics string subprocess tarfile tempfile threading tokenize trace typing uuid
weakref
"""
TRAIN = NAMES.split()
HELD_OUT = ["textwrap", "shelve", "timeit", "shlex", "fileinput"]
VOCABULARY = 256  # tokens


def tokens_of(modules):
    """The bytes of some modules, one after the other, as a row of integers."""
    texts = [(LIBRARY / f"{name}.py").read_bytes() for name in modules]
    return np.frombuffer(b"".join(texts), np.uint8).astype(int)


def text_of(tokens):
    """The text of a row of bytes, with � for what cannot be shown."""
    text = bytes(list(tokens)).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


train, held_out = tokens_of(TRAIN), tokens_of(HELD_OUT)
print(f"{len(TRAIN)} modules to train on, {len(HELD_OUT)} held out")
print(list(b"for i in"), "is", repr(text_of([102, 111, 114, 32, 105, 32, 105, 110])))
print("\n".join(text_of(held_out).splitlines()[30:36]))

# %% [markdown]
# *The numbers in this tutorial come from Python 3.11. Another version has slightly other modules, and the last digit
# of a number may differ.*
#
# ## The first model: a table of counts
#
# Let $x_1, x_2, \ldots$ be the tokens of a text. A model gives $p(x_{t+1} \mid x_1, \ldots, x_t)$, the probability of
# the next token given all tokens up to $t$. A very simple model looks at the last token alone.
# It needs no learning. We count how often each byte follows each byte, and divide each row of counts by its sum. This
# is a *bigram* model.
#
# Each count starts at one instead of zero. The reason comes in a moment.

# %%
counts = np.ones((VOCABULARY, VOCABULARY))
np.add.at(counts, (train[:-1], train[1:]), 1)
bigram = counts / counts.sum(axis=1, keepdims=True)  # row: last byte; column: next byte

# %% tags=["hide-input"]
shown = [ord(character) for character in "abcdefghijklmnopqrstuvwxyz_ .,:=()\n"]
names = [{" ": "␣", "\n": "⏎"}.get(chr(i), chr(i)) for i in shown]
figure, axes = plt.subplots(figsize=(6.4, 5.4))
image = axes.imshow(bigram[np.ix_(shown, shown)], cmap="Blues", vmax=0.6)
axes.set_xticks(range(len(shown)), names, fontsize=7)
axes.set_yticks(range(len(shown)), names, fontsize=7)
axes.set(xlabel="next byte", ylabel="last byte", title="probability of the next byte, given the last one")
figure.colorbar(image, shrink=0.8, label="probability", extend="max")
plt.show()

# %% [markdown]
# *Figure 0.1.* A table of counts knows some English and some Python: after `q` comes `u`, after `:` comes the end of
# the line, and after `(` hardly ever a blank.
#
# A model that gives probabilities can also write. Draw a token from the probabilities, add it to the text, and
# repeat. This is *sampling*, and every language model does it in the same way.


# %%
def draw(p, rng):
    """A token, drawn with probabilities p."""
    return int(rng.choice(len(p), p=p))


rng = np.random.default_rng(0)
written = list(b"def ")
for _ in range(160):
    written.append(draw(bigram[written[-1]], rng))
print(text_of(written))

# %% [markdown]
# Most pairs of letters look right, and nothing else does. What cannot be shown as a character is printed as �. To do
# better we first need to say what "better" means.
#
# ## How good is a model? Cross-entropy
#
# A good model gives a high probability to what really comes. By the rule of conditional probability, the probability
# of a whole text is a product over its tokens,
#
# $$p(x_1, \ldots, x_n) = \prod_{t=0}^{n-1} p(x_{t+1} \mid x_1, \ldots, x_t).$$
#
# In the first factor, $t = 0$, nothing is given yet. The cells below leave this one factor out, since a table of
# bigrams needs a last byte.
#
# A product of thousands of small numbers underflows, so we take its logarithm, which turns the product into a sum. We
# also change the sign, so that the numbers are positive. What each token contributes is its *surprise*
# $-\ln p(x_{t+1} \mid x_1, \ldots, x_t)$. A token that was certain has surprise 0. A token that had probability one
# half has surprise $\ln 2$. The mean surprise over a text is the **cross-entropy**:
#
# $$\mathcal{L} = -\frac{1}{n} \sum_{t=0}^{n-1} \ln p(x_{t+1} \mid x_1, \ldots, x_t).$$
#
# This is the number that training makes smaller, so it is also called the *loss*. With the natural logarithm its unit
# is the *nat*. With the logarithm to base 2 its unit is the *bit*, and one nat is $1 / \ln 2$ bits.

# %%
for p in (1.0, 0.5, 0.25, 0.01, 1 / 256):
    nats = math.log(1 / p)
    print(f"probability {p:.4f}: surprise {nats:.3f} nats = {nats / math.log(2):.3f} bits")

# %% [markdown]
# The last row is a model that knows nothing. It gives each of 256 bytes the same probability and pays 8.000 bits for
# each, which is what the byte takes on a disk. That is no accident. A model with a mean surprise of 2 bits can
# compress a text to 2 bits a byte, and a few bits more for the whole text. Better prediction is better compression.
#
# Now three models on the held-out modules: the one that knows nothing, one that knows how often each byte occurs, and
# the bigram table.

# %%
frequencies = np.bincount(train, minlength=VOCABULARY) + 1.0
unigram = frequencies / frequencies.sum()
surprise = {  # the loss of each held-out byte but the first, in nats
    "every byte alike": np.full(len(held_out) - 1, math.log(VOCABULARY)),
    "frequency of each byte": -np.log(unigram[held_out[1:]]),
    "bigrams": -np.log(bigram[held_out[:-1], held_out[1:]]),
}
for name, nats in surprise.items():
    bits = nats.mean() / math.log(2)
    print(f"{name:23} {nats.mean():.2f} nats = {bits:.2f} bits a byte")

# %% tags=["hide-input"]
begin = text_of(held_out).index("text to spaces before")  # a line of textwrap.py
line = slice(begin - 1, begin + 53)  # The surprise of byte t stands at place t − 1.
figure, axes = plt.subplots(figsize=(9, 2.4))
axes.bar(range(54), surprise["bigrams"][line] / math.log(2), color=BLUE)
axes.set_xticks(range(54), text_of(held_out[1:][line]).replace(" ", "␣").replace("\n", "⏎"), fontsize=8)
axes.set(ylabel="surprise in bits", title="where the table of bigrams is surprised", xlim=(-1, 54))
axes.axhline(8, color=GREY, linestyle=":")
axes.text(0, 8.1, "every byte alike", va="bottom", color=GREY, fontsize=8)
plt.show()

# %% [markdown]
# *Figure 0.2.* Four of the five highest bars stand at the beginning of a word, where the last byte says little about
# what follows.
#
# ### Break it: a count of zero
#
# Why did the counts start at one? Without that, a pair that never occurs in the training text has probability 0. If
# it occurs once in the held-out text, its surprise is infinite, and so is the mean.

# %%
unsmoothed = (counts - 1) / np.maximum((counts - 1).sum(axis=1, keepdims=True), 1)
with np.errstate(divide="ignore"):
    nats = -np.log(unsmoothed[held_out[:-1], held_out[1:]])
new = np.isinf(nats).sum()
print(f"cross-entropy {nats.mean()}, because {new} of {len(nats):,} pairs are new")

# %% [markdown]
# A language model must never say "impossible". The models below cannot, as we shall see.
#
# ### Why bits per *byte*
#
# Tokens need not be bytes. Suppose that another model has tokens of two bytes each, and knows how often each of them
# occurs. It has half as many tokens to predict, and each of them is harder. Nats per token cannot compare the two
# models fairly.


# %%
def in_pairs(tokens):
    """Two bytes become one token."""
    pairs = tokens[: len(tokens) // 2 * 2].reshape(-1, 2)
    return pairs[:, 0] * VOCABULARY + pairs[:, 1]


pair_counts = np.bincount(in_pairs(train), minlength=VOCABULARY**2) + 0.01
pair_nats = -np.log((pair_counts / pair_counts.sum())[in_pairs(held_out)])
byte_nats = surprise["frequency of each byte"]
for size, nats in ((1, byte_nats), (2, pair_nats)):
    per_byte = nats.sum() / math.log(2) / (size * len(nats))
    print(f"tokens of {size}: {nats.mean():.2f} nats a token, {per_byte:.2f} bits a byte")

# %% [markdown]
# Per token the second model looks far worse. It is the better one: it needs fewer bits for the same text. So the number
# that one compares is
#
# $$\text{bits per byte} = \frac{\text{nats of the whole text}}{\ln 2 \cdot \text{bytes of the whole text}},$$
#
# in which the number of tokens no longer occurs. The bytes of a text are the same for every model. RETRO's paper
# reports bits per byte for this reason, and so does this book wherever it scores ordinary text. In the rest of this
# tutorial a token is a byte, so bits per token and bits per byte are the same number.
#
# ## From a table to a function
#
# The obvious next step is to look at two bytes instead of one, then at three. This road ends soon. A table for a
# context of $n$ bytes has $256^n$ rows, and nearly all of them stay empty, because no text is long enough to fill
# them. And a table learns nothing about one context from another, even if the two differ in a single blank.
#
# So we replace the table by a *function* with parameters. It maps a context to $|\mathcal{V}|$ numbers
# $z_1, z_2, \ldots$, one for each token of the vocabulary. They are called *logits* and may be any real numbers. The
# **softmax** makes probabilities of them:
#
# $$p_a = \frac{e^{z_a}}{\sum_b e^{z_b}}.$$
#
# Here $a$ and $b$ are tokens of the vocabulary. All $p_a$ are positive, so the model never says "impossible". They
# sum to 1. Adding the same number to all logits changes nothing, because it cancels. The code uses this: it subtracts
# the largest logit first, so that no exponential overflows. In floating point, a very small $p_a$ may still be
# rounded to 0. [Tutorial 3](03_backward_passes_by_hand.ipynb) writes the loss in a form that is safe from that.
#
# ### The gradient $p - y$
#
# To learn, we ask how the loss changes with each logit. The loss of one token is
#
# $$\mathcal{L} = -\ln p_\text{true} = -z_\text{true} + \ln \sum_b e^{z_b}.$$
#
# Differentiate both terms with respect to $z_a$. The first gives $-1$ for the true token and 0 for the others. The
# second is the logarithm of a sum. By the chain rule it gives one over the sum, times $e^{z_a}$, which is $p_a$
# again. Write $y$ for the vector that is 1 at the true token and 0 elsewhere. Then
#
# $$\frac{\partial \mathcal{L}}{\partial z_a} = p_a - y_a.$$
#
# This is the most useful line of the tutorial. The gradient is what the model said, minus what was true. A step
# against it raises the true token's logit and lowers all others, each of these in proportion to its probability.
#
# In this book, a differentiable function returns two things: its value and its **pullback**. The pullback is a
# function that takes the gradient of the loss with respect to the *value*, and returns the gradients with respect to
# the *inputs*. In code the pullback is called `vjp`, for vector–Jacobian product; tutorial 3 says why. We write
# $\mathrm{d}x$, in code `dx`, for $\partial \mathcal{L} / \partial x$. Here is cross-entropy in that form.


# %%
def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(logits, targets):
    """The mean of −ln p(target), in nats, and its pullback.

    logits: (..., |𝒱|); targets: (...), integers."""
    p = softmax(logits)
    p_true = np.take_along_axis(p, targets[..., None], axis=-1)

    def vjp(dloss):
        dlogits = p.copy()
        np.put_along_axis(dlogits, targets[..., None], p_true - 1, axis=-1)  # p − y
        return dlogits * (dloss / targets.size)

    return -np.log(p_true).mean(), vjp


z, true = np.array([2.0, 1.0, 0.0, -1.0]), np.array(1)
loss, loss_vjp = cross_entropy(z, true)
p, dz = softmax(z), loss_vjp(1.0)
measured = []
for nudge in 1e-6 * np.eye(4):  # one logit after the other
    more, less = cross_entropy(z + nudge, true)[0], cross_entropy(z - nudge, true)[0]
    measured.append((more - less) / 2e-6)
print("p − y   ", np.round(dz, 4))
print("measured", np.round(measured, 4))
assert np.allclose(dz, measured, atol=1e-8)

# %% tags=["hide-input"]
figure, grid = plt.subplots(1, 3, figsize=(8, 2.2), sharey=True)
for axes, bars, title in zip(
    grid, (p, np.eye(4)[true], dz), ("$p$: what the model said", "$y$: what was true", "$p - y$"), strict=True
):
    axes.bar(range(4), bars, color=[ORANGE if i == true else BLUE for i in range(4)])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=title, xticks=range(4), xlabel="token")
plt.show()

# %% [markdown]
# *Figure 0.3.* The gradient of the loss: negative at the true token (orange), whose logit should grow, and positive
# at the others. Its entries sum to 0.
#
# The cell above the figure also measured the gradient: it moved each logit by a millionth in both directions and
# looked at the loss. Such a measurement is called a *finite difference*, and this book checks pullbacks with it.
#
# ## Embedding: a table that learns
#
# How does an integer enter a function of real numbers? By a table lookup. An **embedding** is a matrix with one row
# for each token. The value for token $x_t$ is row $x_t$ of the matrix.
#
# Its pullback follows from one remark: a row of the table gets a gradient from each place where it was used. If byte
# 32 occurs at three places, the gradients of the three places add up in row 32. This is a *scatter-add*. There is a
# famous mistake in it, so look closely.

# %%
table, looked_up = np.zeros((4, 2)), np.array([3, 1, 3, 3])
dy = np.array([[1.0], [10.0], [100.0], [1000.0]]) * np.ones(2)  # a gradient for each place

wrong = np.zeros_like(table)
wrong[looked_up] += dy
right = np.zeros_like(table)
np.add.at(right, looked_up, dy)
print("with +=        row 3 gets", wrong[3], " row 1 gets", wrong[1])
print("with np.add.at row 3 gets", right[3], " row 1 gets", right[1])

# %% [markdown]
# `wrong[looked_up] += dy` is executed as `wrong[looked_up] = wrong[looked_up] + dy`. The right side is computed for
# all places first. Then row 3 is assigned three times, and only the last assignment remains. NumPy raises no error,
# and with tokens that occur only once the result is even right. `np.add.at` adds once for each place.


# %%
def embed(table, tokens):
    """table[tokens] and its pullback. table: (|𝒱|, d); tokens: integers of any shape."""

    def vjp(dy):
        dtable = np.zeros_like(table)
        np.add.at(dtable, tokens.reshape(-1), dy.reshape(-1, table.shape[1]))
        return dtable

    return table[tokens], vjp


# %% [markdown]
# `embed` and `cross_entropy` are enough for a first model that *learns*. Let the table have $|\mathcal{V}|$ columns,
# and take its rows as logits. Then each byte has its own logits for the next byte: this is the bigram model again. This
# time its parameters are found by *gradient descent*. We do not use the whole text at each step, but 512 places of it,
# drawn at random: a *batch*. Its gradient moves the table a little. The steps become smaller towards the end, so that
# the noise of the batches averages out.

# %%
rng, table = np.random.default_rng(1), np.zeros((VOCABULARY, VOCABULARY))
for step in range(1, 1501):
    at = rng.integers(len(train) - 1, size=512)
    logits, embed_vjp = embed(table, train[at])
    loss, loss_vjp = cross_entropy(logits, train[at + 1])
    table -= 80 * (1 - step / 1500) * embed_vjp(loss_vjp(1.0))
    if step in (1, 10, 100, 1500):
        held_loss, _ = cross_entropy(table[held_out[:-1]], held_out[1:])
        print(f"step {step:4}: {held_loss / math.log(2):.2f} bits a byte, held out")
print(f"counted:   {surprise['bigrams'].mean() / math.log(2):.2f}")

# %% [markdown]
# Gradient descent finds nearly what counting found. For this model that is no gain. But gradient descent also works
# where nothing can be counted, and all that is missing now is a better function.
#
# ## Attention: reading what came before
#
# After `self.` one wants to know which names followed `self.` earlier in this file. So a token must be able to fetch
# something from another place in the text, and it must find that place by what stands there. **Attention** is the
# part of a transformer that does this. It is a Python dictionary made soft.
#
# A dictionary stores pairs of a key and a value. Asked with a query, it returns the value whose key *equals* the
# query: all or nothing. Attention makes three vectors from each token:
#
# - a **query**: what this token is looking for;
# - a **key**: what this token offers to be found by;
# - a **value**: what this token hands over if it is found.
#
# The query is compared with every key. The comparison is an inner product, which is large if the two vectors point
# the same way. These *scores* go through a softmax, which makes *weights* that are positive and sum to 1. The result
# is the mean of all values under these weights. If one key fits far better than all others, its weight is nearly 1,
# and attention returns its value, as a dictionary does. If several fit, it returns a mixture. Every step has a
# derivative, so the queries, keys and values can be learned.

# %%
K = np.array([[1.9, 0.3], [0.4, 1.8], [-1.6, 0.7], [1.3, 1.3]])  # four keys of two numbers
values = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 3.0], [0.0, 3.0]])  # and their values
query = np.array([2.0, 0.8])
scores = K @ query / math.sqrt(2)  # The reason for the division comes below.
weights = softmax(scores)
result = weights @ values
print("scores ", np.round(scores, 2))
print("weights", np.round(weights, 2))
print("result ", np.round(result, 2))

# %% tags=["hide-input"]
colours = [BLUE, SAND, GREY, ORANGE]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.1))
for j in range(4):
    left.annotate("", K[j], (0, 0), arrowprops={"arrowstyle": "->", "color": colours[j], "lw": 2})
    left.text(*(1.12 * K[j]), f"$K_{j + 1}$", color=colours[j], ha="center", va="center")
    right.scatter(*values[j], s=900 * weights[j] + 20, color=colours[j])
    right.text(values[j, 0] + 0.65 * (1 - values[j, 0] / 2), values[j, 1], f"$V_{j + 1}$", va="center", ha="center")
left.annotate("", query, (0, 0), arrowprops={"arrowstyle": "->", "color": "black", "lw": 2.5})
left.text(query[0] + 0.1, query[1] + 0.15, "query")
left.set(xlim=(-2.3, 2.8), ylim=(-0.4, 2.4), title="1. compare the query with each key", xticks=[], yticks=[])
middle.bar([f"$K_{j + 1}$" for j in range(4)], weights, color=colours)
middle.set(title="2. the softmax makes weights", ylabel="weight", ylim=(0, 1))
right.scatter(*result, marker="x", color="black", s=90)
right.text(result[0] + 0.2, result[1] - 0.15, "result")
right.set(title="3. the weighted mean of the values", xticks=[], yticks=[], xlim=(-1, 5), ylim=(-0.8, 3.8))
plt.tight_layout()
plt.show()

# %% [markdown]
# *Figure 0.4.* Attention is a soft lookup: the keys that point the way of the query get most of the weight, and the
# result lies between their values.
#
# Now for a whole text of $n$ tokens. Each token is represented by a row of $d$ numbers, its *activations* $h_t$. At
# first these are its embedding. The rows together are the matrix $H$. Three learned matrices make all queries, keys
# and values at once, and the rest is what we have just done:
#
# $$\begin{gathered} Q = H W_Q, \qquad K = H W_K, \qquad V = H W_V, \\
# Z = \frac{Q K^\top}{\sqrt{c}}, \qquad A = \operatorname{softmax}(Z), \qquad O = A V. \end{gathered}$$
#
# Row $i$ of $Q$ is the query $Q_i$ of token $i$, and row $j$ of $K$ is the key $K_j$ of token $j$. So
# $Z_{ij} = Q_i \cdot K_j / \sqrt{c}$ is the score that query $i$ gives to key $j$, where $c$ is the number of columns
# of a query. The softmax goes along each row: row $i$ of $A$ says how much token $i$ reads from each token, and row
# $i$ of $O$ is what it gets. ($V$, the values, is not $\mathcal{V}$, the vocabulary.)
#
# **Why divide by $\sqrt{c}$?** Take two vectors of $c$ independent random numbers with mean 0 and variance 1. Their
# inner product has variance $c$. For a large $c$ the scores would lie so far apart that the softmax gives nearly all
# weight to one key. There its derivative is nearly zero, and nothing is learned. The division keeps the variance of the
# scores at 1.

# %%
rng = np.random.default_rng(2)
for c in (4, 64, 1024):
    q, keys = rng.standard_normal((200, 1, c)), rng.standard_normal((200, 16, c))
    raw = (q @ keys.swapaxes(1, 2))[:, 0]  # the scores of 200 queries, 16 keys each
    top, top_divided = softmax(raw).max(axis=1), softmax(raw / math.sqrt(c)).max(axis=1)
    print(f"c = {c:4}: variance of the scores {raw.var():6.1f}, ", end="")
    print(f"largest weight {top.mean():.2f}; with the division {top_divided.mean():.2f}")

# %% [markdown]
# ### The causal mask
#
# A language model predicts token $t + 1$ from the tokens up to $t$. In training, the whole text is there, and all its
# predictions are made at once: row $t$ of the result predicts token $t + 1$. So row $t$ must not read any later row.
# If it could, it would read the answer. The **causal mask** sets the scores of all later keys to $-\infty$. Their
# weights are then exactly 0.


# %%
def attention(q, keys, values, causal=True):
    """One head of attention. q, keys, values: (n, c). Returns O, (n, c), and A, (n, n)."""
    scores = q @ keys.T / math.sqrt(q.shape[1])
    if causal:
        later = np.arange(len(keys)) > np.arange(len(q))[:, None]  # key j after query i
        scores = np.where(later, -np.inf, scores)
    weights = softmax(scores)
    return weights @ values, weights


# %% tags=["hide-input"]
rng, word = np.random.default_rng(5), "for i in x"
n, d = len(word), 8
Q, K, values = (rng.standard_normal((n, d)) for _ in range(3))
Z = Q @ K.T / math.sqrt(d)
_, A = attention(Q, K, values)
masked = np.where(np.arange(n) > np.arange(n)[:, None], np.nan, Z)
figure, grid = plt.subplots(1, 3, figsize=(10, 3.3))
titles = ("scores $Z$", "$Z$ with the causal mask", "weights $A$: each row sums to 1")
for axes, matrix, title in zip(grid, (Z, masked, np.where(np.isnan(masked), np.nan, A)), titles, strict=True):
    image = axes.imshow(
        matrix, cmap="Blues" if "A" in title else "PuOr", vmin=0 if "A" in title else -3, vmax=1 if "A" in title else 3
    )
    axes.set_xticks(range(n), word.replace(" ", "␣"))
    axes.set_yticks(range(n), word.replace(" ", "␣"))
    axes.set(title=title, xlabel="key: is read")
    figure.colorbar(image, shrink=0.75)
grid[0].set_ylabel("query: reads")
plt.tight_layout()
plt.show()

# %% [markdown]
# *Figure 0.5.* From scores to weights, with random queries and keys. The white triangle is masked: no token reads a
# later one. The first token has only itself to read, so its weight there is 1.
#
# ### Heads
#
# One softmax gives a token one thing to look for. But a token may want several things at a time: the byte before, the
# last opening bracket, the beginning of the line. So let $Q$, $K$ and $V$ have $d$ columns, and cut these into *heads*.
# With `n_heads` heads, each has $c$ columns, which is $d$ divided by `n_heads`. Each head has its own scores, its own
# softmax and its own result. The results are put side by side, $d$ columns again, and a last matrix $W_O$ mixes them.
#
# The library's `relative_attention` does this for a batch of texts and all heads, and it returns the pullback, which
# [tutorial 3](03_backward_passes_by_hand.ipynb) derives. Its arrays have five axes: batch, groups, tokens, heads and
# columns. Groups are a matter of [tutorial 4](04_relative_positions.ipynb), and until then that axis has length 1.
# `causal_offset=0` switches the causal mask on, and without it there is no mask. Tutorial 4 says what is relative about
# this attention. We give it the `Q`, `K` and `values` of figure 0.5: ten tokens, eight columns, and now two heads of
# four. Head by head, `relative_attention` gives what `attention` above gives:

# %%
n_heads = 2
shape = (1, 1, n, n_heads, d // n_heads)  # batch, groups, tokens, heads, columns of a head
q, keys, vals = (z.reshape(shape) for z in (Q, K, values))
theirs, _ = relative_attention(q, keys, vals, causal_offset=0)
for head in range(n_heads):
    ours, _ = attention(q[0, 0, :, head], keys[0, 0, :, head], vals[0, 0, :, head])
    assert np.allclose(ours, theirs[0, 0, :, head])
print(f"{n_heads} heads of {d // n_heads} columns: equal to the library's")

# %% [markdown]
# ### Attention does not see order
#
# One thing is missing. A score depends on *what* a token is, not on *where* it stands. Exchange two earlier tokens,
# and the last one gets the same result:

# %%
order = [1, 0, *range(2, n)]  # exchange the first two tokens
before, _ = attention(Q, K, values)
after, _ = attention(Q[order], K[order], values[order])
print(f"largest change of the last row: {np.abs(before[-1] - after[-1]).max():.0e}")
assert np.allclose(before[-1], after[-1])

# %% [markdown]
# So the position must be put in by hand. The first transformers added a vector to each token's embedding, a fixed one
# for each position: sines and cosines of the position, from fast waves to slow ones. The model below does so, too.
# [Tutorial 4](04_relative_positions.ipynb) shows a better way, which RETRO uses.


# %%
def sinusoids(n, d):
    """A row for each position t: sin and cos of t / 10000^(2a/d), a < d/2. (n, d)"""
    angles = np.arange(n)[:, None] * 10000.0 ** (-2 * np.arange(d // 2) / d)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7, 2.6))
image = axes.imshow(sinusoids(64, 64).T, cmap="PuOr", aspect="auto")
axes.set(xlabel="position", ylabel="column", title="one vector for each position")
figure.colorbar(image)
plt.show()

# %% [markdown]
# *Figure 0.6.* Each column of the picture is one position's vector. The upper rows of each half tell neighbouring
# positions apart. The lower rows change slowly and tell near from far.

# %% [markdown]
# ## A decoder block
#
# A transformer is a stack of *blocks*, all of one form. One that predicts the next token is called a *decoder*. Picture
# one row of $d$ numbers for each token, which flows through all of them: $h_t$, the token's *activations*. No block
# replaces them. Each block reads them, computes updates and adds them. This is called a *residual* connection. It has
# two effects. What an early block has found is still there for a late one. And on the way back the gradient of the sum
# reaches the first block undiminished, however many blocks lie between.
#
# A block makes two updates.
#
# **Attention** moves information *between* tokens. It is the only place where a token learns of another.
#
# **The feed-forward network**, FFW, works on each token *alone*. It decides what to make of what attention brought.
# It is two matrices with a curved function between them, because two matrices in a row would be only one matrix. For
# a token's row $x$, its update is
#
# $$\operatorname{gelu}(x\, W_\text{in})\, W_\text{out}, \qquad \operatorname{gelu}(z) = \tfrac12\, z\,
# \Bigl(1 + \tanh\bigl(\sqrt{2/\pi}\,(z + 0.044715\, z^3)\bigr)\Bigr).$$
#
# $W_\text{in}$ has $4d$ columns here. Each column is a question that is asked of the token's row. $\operatorname{gelu}$
# works on each number alone. It passes on what is positive and stops nearly all that is negative. The rows of
# $W_\text{out}$ are what is added for each question that was answered with yes.
#
# **The norm** stands before each of the two. The activations grow from block to block, since every block adds to them.
# RMSNorm divides a row by its root mean square, and multiplies each column by a learned number, its gain. The gains
# together are the vector $\gamma$. The sign $\odot$ multiplies entry by entry, and a tiny $\varepsilon$ prevents a
# division by zero:
#
# $$\operatorname{norm}(x) = \gamma \odot \frac{x}{\sqrt{\frac{1}{d} \sum_a x_a^2 + \varepsilon}}.$$
#
# So attention and FFW see rows of about the same size in each block and at each time of training. From here on, ATTN
# and FFW are the names of the whole halves of a block, with norm and residual connection. For all rows at once,
#
# $$\operatorname{FFW}(H) = H + \operatorname{gelu}(\operatorname{norm}(H)\, W_\text{in})\, W_\text{out}.$$


# %% tags=["hide-input"]
def box(axes, x, y, width, text, colour):
    axes.add_patch(plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=colour, edgecolor=NAVY))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": NAVY, "lw": 1.4})


figure, axes = plt.subplots(figsize=(12, 3.2))
axes.add_patch(plt.Rectangle((2.75, -0.75), 6.5, 3.2, facecolor="#f3f3f3", edgecolor=GREY, linestyle="--"))
axes.text(6, 2.1, "one block; our model has two, one after the other", ha="center", color="#555555", fontsize=9)
box(axes, 0, 0, 1.1, "tokens", "white")
box(axes, 1.75, 0, 1.5, "embedding\n+ position", SAND)
for x, name in ((4, "attention"), (7, "feed-\nforward")):
    box(axes, x, 1.3, 0.9, "norm", "white")
    box(axes, x + 1.25, 1.3, 1.2, name, "#a8cbe6")
    arrow(axes, (x, 0), (x, 1.0))
    arrow(axes, (x + 0.45, 1.3), (x + 0.65, 1.3))
    arrow(axes, (x + 1.25, 1.0), (x + 1.25, 0.2))
arrow(axes, (0.55, 0), (1.0, 0))
arrow(axes, (2.5, 0), (5.05, 0))
arrow(axes, (5.45, 0), (8.05, 0))
arrow(axes, (8.45, 0), (9.65, 0))
for x in (5.25, 8.25):
    axes.text(x, 0, "⊕", ha="center", va="center", fontsize=17, color=NAVY)
box(axes, 10.1, 0, 0.9, "norm", "white")
box(axes, 11.4, 0, 1.2, "readout", SAND)
box(axes, 12.95, 0, 1.3, "softmax: $p$", "white")
arrow(axes, (10.55, 0), (10.8, 0))
arrow(axes, (12.0, 0), (12.3, 0))
axes.text(6, -0.5, "the activations $h_t$ flow along this line; each $\\oplus$ adds an update", ha="center", fontsize=9)
axes.set(xlim=(-0.7, 13.7), ylim=(-0.9, 2.6))
axes.axis("off")
plt.show()

# %% [markdown]
# *Figure 0.7.* A decoder: attention and the feed-forward network read the activations through a norm, and add their
# updates to them.
#
# Here are both halves of the block in code. Read each function downwards for its value. Then read its pullback: it
# names the same steps in reverse order. `linear`, `rms_norm` and `gelu` come from the library, each with its
# pullback, and [tutorial 3](03_backward_passes_by_hand.ipynb) derives them all. Their pullbacks return a tuple, one
# gradient for each input, and a tuple of one entry if there is one input: hence `(dhidden,)`. At the end of each
# pullback stands `dy + …`: the residual connection, which hands the gradient through.
#
# From here on, an array holds a batch of texts, which are computed side by side. In shapes, $B$ is the number of texts
# and $n$ the number of tokens in each, so the activations have the shape `(B, n, d)`.


# %%
def attend(params, h, n_heads, causal=True):
    """h + attention(norm(h)) · W_o. h: (B, n, d)."""
    cut = (len(h), 1, h.shape[1], n_heads, -1)
    normed, norm_vjp = rms_norm(h, params["norm"])
    q, q_vjp = linear(normed, params["w_q"])
    keys, keys_vjp = linear(normed, params["w_k"])
    values, values_vjp = linear(normed, params["w_v"])
    heads = (z.reshape(cut) for z in (q, keys, values))
    masked = {"causal_offset": 0} if causal else {}
    result, attention_vjp = relative_attention(*heads, **masked)
    update, out_vjp = linear(result.reshape(h.shape), params["w_o"])

    def vjp(dy):
        dresult, dw_o = out_vjp(dy)
        dq, dkeys, dvalues = attention_vjp(dresult.reshape(cut))
        through_q, dw_q = q_vjp(dq.reshape(h.shape))
        through_keys, dw_k = keys_vjp(dkeys.reshape(h.shape))
        through_values, dw_v = values_vjp(dvalues.reshape(h.shape))
        dh, dgain = norm_vjp(through_q + through_keys + through_values)
        grads = {"norm": dgain, "w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o}
        return grads, dy + dh

    return h + update, vjp


def ffw(params, h):
    """h + gelu(norm(h) · W_in) · W_out. h: (B, n, d)."""
    normed, norm_vjp = rms_norm(h, params["norm"])
    hidden, in_vjp = linear(normed, params["w_in"])
    active, gelu_vjp = gelu(hidden)
    update, out_vjp = linear(active, params["w_out"])

    def vjp(dy):
        dactive, dw_out = out_vjp(dy)
        (dhidden,) = gelu_vjp(dactive)
        dnormed, dw_in = in_vjp(dhidden)
        dh, dgain = norm_vjp(dnormed)
        return {"norm": dgain, "w_in": dw_in, "w_out": dw_out}, dy + dh

    return h + update, vjp


# %% [markdown]
# ## The whole model
#
# The model is the embedding, the blocks, a last norm and a matrix, the *readout*, that makes logits of each row. Its
# parameters are a tree: a dict of arrays, with a list of layers in it. Its pullback returns the gradients as a tree
# of the same form. Two helpers of the library go through such trees. `named_leaves` gives each array with its name,
# and `map_tree` makes a new tree by changing each array.


# %%
def language_model(params, tokens, n_heads=4, causal=True):
    """Logits of each next token, and vjp(dlogits) → gradients, a tree like params.

    tokens: (B, n). Returns logits (B, n, |𝒱|)."""
    h, embed_vjp = embed(params["embedding"], tokens)
    h = h + sinusoids(*h.shape[1:]).astype(h.dtype)
    vjps = []
    for layer in params["layers"]:
        h, attend_vjp = attend(layer["attention"], h, n_heads, causal)
        h, ffw_vjp = ffw(layer["ffw"], h)
        vjps.append((attend_vjp, ffw_vjp))
    normed, norm_vjp = rms_norm(h, params["norm"])
    logits, readout_vjp = linear(normed, params["readout"])

    def vjp(dlogits):
        dnormed, dreadout = readout_vjp(dlogits)
        dh, dgain = norm_vjp(dnormed)
        layers = []
        for attend_vjp, ffw_vjp in reversed(vjps):
            dffw, dh = ffw_vjp(dh)
            dattention, dh = attend_vjp(dh)
            layers.insert(0, {"attention": dattention, "ffw": dffw})
        grads = {"embedding": embed_vjp(dh), "layers": layers}
        return grads | {"norm": dgain, "readout": dreadout}

    return logits, vjp


def fresh_params(rng, d=64, n_layers=2, dtype=np.float32):
    """Matrices that keep the size of a row, gains of one, and a readout near zero."""

    def matrix(rows, columns, scale=1.0):
        entries = rng.standard_normal((rows, columns)) * scale / math.sqrt(rows)
        return entries.astype(dtype)

    def layer():
        attention = {name: matrix(d, d) for name in ("w_q", "w_k", "w_v")}
        attention |= {"w_o": matrix(d, d, 0.5), "norm": np.ones(d, dtype)}
        dense = {"w_in": matrix(d, 4 * d), "w_out": matrix(4 * d, d, 0.5)}
        return {"attention": attention, "ffw": dense | {"norm": np.ones(d, dtype)}}

    params = {"embedding": (0.5 * rng.standard_normal((VOCABULARY, d))).astype(dtype)}
    params |= {"layers": [layer() for _ in range(n_layers)], "norm": np.ones(d, dtype)}
    return params | {"readout": matrix(d, VOCABULARY, 0.1)}


def loss_and_gradients(params, texts, **options):
    """The loss of predicting each token from those before it. texts: (B, n + 1).

    The gradients come as a function, for they are not always needed."""
    logits, model_vjp = language_model(params, texts[:, :-1], **options)
    loss, loss_vjp = cross_entropy(logits, texts[:, 1:])
    return loss, lambda: model_vjp(loss_vjp(1.0))


params = fresh_params(np.random.default_rng(0))
for name, p in named_leaves(params):
    if name.startswith(("layers.0", "embedding", "readout")):
        print(f"{name:24} {p.shape!s:10} {p.size:7,}")
print(f"in all {sum(p.size for _, p in named_leaves(params)):,} parameters")

# %% [markdown]
# Two checks come before any training. A fresh model knows nothing, so its loss must be near $\ln 256$. And a finite
# difference must agree with the pullback. For that we take a small model in double precision and move *all* its
# parameters by a tiny step in a random direction. The change of the loss must be what the gradients say for this
# direction.

# %%
texts = held_out[:640].reshape(10, 64)
loss, _ = loss_and_gradients(params, texts)
print(f"loss of a fresh model: {loss:.2f} nats; ln 256 = {math.log(256):.2f}")

rng = np.random.default_rng(3)
small = fresh_params(rng, d=8, dtype=np.float64)
direction = {name: rng.standard_normal(p.shape) for name, p in named_leaves(small)}


def loss_along(step):
    moved = map_tree(lambda name, p: p + step * direction[name], small)
    return loss_and_gradients(moved, texts)[0]


slope = (loss_along(1e-6) - loss_along(-1e-6)) / 2e-6
gradients = loss_and_gradients(small, texts)[1]()
said = sum(np.sum(g * direction[name]) for name, g in named_leaves(gradients))
print(f"slope measured {slope:.6f}, from the gradients {said:.6f}")
assert abs(slope - said) < 1e-6 * abs(said) + 1e-8

# %% [markdown]
# ## AdamW: how a gradient becomes a step
#
# Plain gradient descent subtracts $\eta\, \mathrm{d}\theta$ from a parameter $\theta$. Here $\mathrm{d}\theta$ is the
# parameter's gradient, `g` in the code below, and $\eta$ is the *learning rate*. It worked for the table. It works
# badly here, for two reasons. Each gradient comes from one small batch and is noisy. And some parameters have much
# larger gradients than others, so that no one rate fits all.
#
# **AdamW** ([Kingma & Ba 2015](https://arxiv.org/abs/1412.6980),
# [Loshchilov & Hutter 2019](https://arxiv.org/abs/1711.05101)) keeps two running means for each parameter: $\mu$ of
# the gradient and $\nu$ of its square. The numbers $\beta_1$ and $\beta_2$, here 0.9 and 0.95, say how slowly the two
# change. At step $\tau$,
#
# $$\mu \leftarrow \beta_1\, \mu + (1 - \beta_1)\, \mathrm{d}\theta, \qquad
# \nu \leftarrow \beta_2\, \nu + (1 - \beta_2)\, (\mathrm{d}\theta)^2,$$
#
# $$\theta \leftarrow \theta - \eta \left( \frac{\hat\mu}{\sqrt{\hat\nu} + \varepsilon} + \lambda\, \theta \right),
# \qquad
# \hat\mu = \frac{\mu}{1 - \beta_1^\tau}, \quad \hat\nu = \frac{\nu}{1 - \beta_2^\tau}.$$
#
# - $\mu$, the **first moment**, is *momentum*. What points the same way in many batches adds up, and what changes its
#   sign from batch to batch cancels.
# - $\sqrt{\nu}$, from the **second moment**, is the usual size of the parameter's gradient. The division by it gives
#   each parameter steps of about $\eta$, whether its gradients are large or small.
# - Both means start at zero and are too small in the first steps. The hats correct for that.
# - $\lambda\, \theta$ is **weight decay**: it pulls each weight towards zero, so that only what the data keep asking
#   for stays large. It is *decoupled*: it stands outside the fraction. If it were added to $\mathrm{d}\theta$ instead,
#   it would be divided by $\sqrt{\nu}$ as well, and the parameters with large gradients would hardly decay.
#
# The figure shows on the left what momentum and the division by $\sqrt{\nu}$ do, in a long valley that is 50 times as
# steep in one direction as in the other. On the right it shows what decoupling does to two kinds of weights, 500 of
# each. Their gradients are nothing but noise, and one kind has ten times as much of it as the other.


# %%
def adamw(params, gradients, means, squares, step, rate, decay=0.1, betas=(0.9, 0.95)):
    """One step, in place. params: a tree; means, squares: arrays by parameters' names."""
    (beta1, beta2), epsilon = betas, 1e-8
    gradients = dict(named_leaves(gradients))
    for name, p in named_leaves(params):
        g = gradients[name]
        means[name] += (1 - beta1) * (g - means[name])
        squares[name] += (1 - beta2) * (g * g - squares[name])
        mean = means[name] / (1 - beta1**step)  # the hats of the equations
        square = squares[name] / (1 - beta2**step)
        if p.ndim > 1:  # Gains do not decay.
            p -= rate * decay * p
        p -= rate * mean / (np.sqrt(square) + epsilon)


def zeros_like(params):
    return {name: np.zeros_like(p) for name, p in named_leaves(params)}


# %% tags=["hide-input"]
steepness, paths = np.array([50.0, 1.0]), {}
for name, rate in (("gradient descent", 0.038), ("with momentum", 0.038), ("AdamW", 0.13)):
    p, path, mean, moments = (
        np.array([1.0, -4.0]),
        [],
        np.zeros(2),
        (zeros_like({"p": 0 * steepness}) for _ in range(2)),
    )
    means, squares = moments
    for step in range(1, 41):
        path.append(p.copy())
        g = steepness * p
        mean = 0.8 * mean + 0.2 * g
        if name == "AdamW":
            adamw({"p": p}, {"p": g}, means, squares, step, rate, decay=0)
        else:
            p -= rate * (mean if "momentum" in name else g)
    paths[name] = np.array(path)

rng, noise, decayed = np.random.default_rng(4), np.array([5.0, 0.5]), {}
for decoupled in (False, True):
    weights, sizes = np.ones((500, 2)), []
    means, squares = (zeros_like({"w": weights}) for _ in range(2))
    for step in range(1, 301):
        sizes.append(weights.mean(axis=0))
        g = noise * rng.standard_normal(weights.shape) + (0 if decoupled else 0.1 * weights)
        adamw({"w": weights}, {"w": g}, means, squares, step, 0.05, decay=0.1 if decoupled else 0)
    decayed[decoupled] = np.array(sizes)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
x, y = np.meshgrid(np.linspace(-4.4, 1.2, 100), np.linspace(-1.2, 1.2, 100))
left.contour(x, y, 25 * y**2 + 0.5 * x**2, levels=[0.3, 1.5, 5, 12, 25], colors="#cccccc", linewidths=0.8)
for (name, path), colour in zip(paths.items(), (GREY, ORANGE, BLUE), strict=True):
    left.plot(path[:, 1], path[:, 0], ".-", color=colour, label=name, markersize=4, linewidth=1)
left.plot(0, 0, "k+", markersize=12)
left.set(title="40 steps in a narrow valley", xlabel="the flat direction", ylabel="the steep direction")
left.legend(fontsize=8)
for decoupled, style in ((True, "-"), (False, "--")):
    for column, (colour, name) in enumerate(((ORANGE, "much noise"), (BLUE, "little noise"))):
        kind = "decoupled" if decoupled else "inside the gradient"
        right.plot(decayed[decoupled][:, column], style, color=colour)
        if not decoupled:
            right.text(305, decayed[decoupled][-1, column], f"{kind},\n{name}", color=colour, va="center", fontsize=8)
right.text(305, decayed[True][-1].mean(), "decoupled,\nmuch or little noise", va="center", fontsize=8)
right.set(
    title="what weight decay does to two kinds of weights",
    xlabel="step",
    ylabel="mean weight",
    xlim=(0, 440),
    ylim=(-0.05, 1.05),
)
plt.tight_layout()
plt.show()
for name, path in paths.items():
    print(f"{name:16}: after 40 steps {np.hypot(*path[-1]):.2f} from the minimum")

# %% [markdown]
# *Figure 0.8.* Left: gradient descent zigzags across the steep direction and creeps along the flat one, momentum
# takes most of the zigzag out, and AdamW sets out at the same speed in both. Right: decoupled decay shrinks both kinds
# of weights alike, and the effect of decay inside the gradient depends on the noise.
#
# ## The training loop
#
# Everything is there. A step takes a batch of texts from random places, computes the loss and the gradients and takes
# one step of AdamW. The learning rate rises in the first 50 steps, while the moments are still rough. Then it falls
# along a cosine, so that the noise of the last batches does little harm. Every 50 steps we look at the held-out
# modules.

# %%
n, batch, steps = 64, 16, 1200
rng = np.random.default_rng(0)
params = fresh_params(rng)
means, squares = zeros_like(params), zeros_like(params)
places = np.random.default_rng(1).integers(len(held_out) - n, size=200)
held_texts = held_out[places[:, None] + np.arange(n + 1)]
curve, begin = [], time.perf_counter()
for step in range(1, steps + 1):
    starts = rng.integers(len(train) - n, size=batch)
    texts = train[starts[:, None] + np.arange(n + 1)]
    loss, pullback = loss_and_gradients(params, texts)
    rate = 1e-2 * min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    adamw(params, pullback(), means, squares, step, rate)
    if step == 1 or step % 50 == 0:
        held_loss, _ = loss_and_gradients(params, held_texts)
        curve.append((step, loss / math.log(2), held_loss / math.log(2)))
    if step == 1 or step % 200 == 0:
        print("step {:4}: {:.1f} bits a byte on the batch, {:.1f} held out".format(*curve[-1]))
assert time.perf_counter() - begin < 200

# %% tags=["hide-input"]
curve = np.array(curve)
table_bits = surprise["bigrams"].mean() / math.log(2)
frequency_bits = surprise["frequency of each byte"].mean() / math.log(2)
figure, axes = plt.subplots(figsize=(6.5, 3.4))
axes.plot(curve[:, 0], curve[:, 1], color=SAND, label="the training batch")
axes.plot(curve[:, 0], curve[:, 2], "o-", color=BLUE, markersize=3, label="held-out modules")
axes.axhline(table_bits, color=ORANGE, linestyle="--", label="table of bigrams, held-out modules")
axes.axhline(frequency_bits, color=NAVY, linestyle="-.", label="frequency of each byte, held-out modules")
axes.axhline(8, color=GREY, linestyle=":", label="every byte alike")
axes.set(xlabel="step", ylabel="bits a byte", ylim=(0, 8.3), title="a transformer learns to predict Python")
axes.legend(fontsize=8)
plt.show()
print(f"on the held-out modules: frequencies {frequency_bits:.1f}, table of bigrams {table_bits:.1f}, ", end="")
print(f"transformer {curve[-1, 2]:.1f} bits a byte")
assert curve[-1, 2] < table_bits - 0.8

# %% [markdown]
# *Figure 0.9.* The model passes the table of bigrams after some 200 steps, and goes on learning.
#
# It passes the frequencies of the bytes first and the bigrams next. What it gains after that must come from bytes
# further back. It is a tiny model that has read a million bytes in a few seconds. The largest of today differ from it
# in size, in text and in many details, but not in what you have just read.
#
# ## The sampling loop
#
# To write, the model reads the last $n$ tokens and gives the probabilities of the next. Logits may be divided by a
# *temperature* before the softmax. Below 1 it makes the likely tokens more likely still. As it goes to 0, only the
# likeliest remains.


# %%
def sample(params, prompt, length, rng, temperature=0.8, causal=True):
    tokens = list(prompt)
    for _ in range(length):
        logits, _ = language_model(params, np.array([tokens[-n:]]), causal=causal)
        tokens.append(draw(softmax(logits[0, -1].astype(float) / temperature), rng))
    return tokens


prompt = b"    def __init__(self"
fresh = fresh_params(np.random.default_rng(0))
for when, model, length in (("before training", fresh, 60), ("after", params, 400)):
    print(f"{when}:\n{text_of(sample(model, prompt, length, np.random.default_rng(7)))}\n")

# %% [markdown]
# It means nothing, and yet it is unmistakably Python: lines are indented, names have underscores, `self` is often
# followed by a point, and calls have brackets. All of this was learned by predicting one byte at a time.
#
# Where did the gain over the table come from? Here is the line of figure 0.2 again, with both models.

# %% tags=["hide-input"]
window = held_out[line.start - 10 : line.stop + 1]  # ten bytes more, so that the first letter has a context
logits, _ = language_model(params, window[None, :-1])
bits = -np.log2(np.take_along_axis(softmax(logits.astype(float)), window[None, 1:, None], axis=-1))[0, 10:, 0]
figure, axes = plt.subplots(figsize=(9, 2.4))
axes.bar(np.arange(54) - 0.2, surprise["bigrams"][line] / math.log(2), 0.4, color=SAND, label="table of bigrams")
axes.bar(np.arange(54) + 0.2, bits, 0.4, color=BLUE, label="transformer")
axes.set_xticks(range(54), text_of(held_out[1:][line]).replace(" ", "␣").replace("\n", "⏎"), fontsize=8)
axes.set(ylabel="surprise in bits", title="the same line, two models", xlim=(-1, 54))
axes.legend(fontsize=8)
plt.show()
table_line = surprise["bigrams"][line].mean() / math.log(2)
print(f"on this line: table {table_line:.1f}, transformer {bits.mean():.1f} bits a byte")

# %% [markdown]
# *Figure 0.10.* The transformer gains at most letters inside words, where several letters together say more than the
# last one alone.
#
# It does not gain everywhere. At some letters it is more surprised than the table. A model that is surer of itself
# wins more when it is right, and pays more when it is wrong.
#
# ### What the heads look for
#
# The weights of attention can be looked at. Here are those of all eight heads on one line of code, four heads in each
# of the two blocks.

# %% tags=["hide-input"]
code = b"if self.width > width:"
h = params["embedding"][list(code)][None] + sinusoids(len(code), 64).astype(np.float32)
maps = []
for layer in params["layers"]:
    normed, _ = rms_norm(h[0], layer["attention"]["norm"])
    for head in range(4):
        columns = slice(16 * head, 16 * head + 16)
        q, keys = (normed @ layer["attention"][name][:, columns] for name in ("w_q", "w_k"))
        maps.append(attention(q, keys, normed)[1])
    h, _ = ffw(layer["ffw"], attend(layer["attention"], h, 4)[0])
figure, grid = plt.subplots(2, 4, figsize=(14, 7.4), sharey=True, layout="constrained")
ticks = code.decode().replace(" ", "␣")
for number, axes in enumerate(grid.flat):
    image = axes.imshow(maps[number], cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_yticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_title(f"block {number // 4 + 1}, head {number % 4 + 1}")
figure.supxlabel("is read")
figure.supylabel("reads")
figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
plt.show()
far = [np.mean([np.tril(A, -4).sum(axis=1)[4:].mean() for A in part]) for part in (maps[:4], maps[4:])]
print(f"weight on bytes more than 3 back: block 1 {far[0]:.1f}, block 2 {far[1]:.1f}")
assert far[1] > far[0]

# %% [markdown]
# *Figure 0.11.* The heads of the first block mostly read the last few bytes. Those of the second reach further back,
# and some of them pick out one byte and read it from many places.
#
# A diagonal means that a head reads at one distance: the byte itself, or one just before it. A vertical stripe means
# that a head reads one byte from every distance. Nobody told the heads what to look for.
#
# ## Break it: without the mask
#
# The causal mask looks like a detail. Our model has two decoder blocks. Trained with the mask for 1,200 steps, it needs
# 2.4 bits for each byte of the held-out modules, where the table of bigrams needs 3.4. Now train the same model without
# the mask, and for 300 steps only.

# %%
rng = np.random.default_rng(0)
cheat, cheat_steps = fresh_params(rng), 300
means, squares = zeros_like(cheat), zeros_like(cheat)
for step in range(1, cheat_steps + 1):
    starts = rng.integers(len(train) - n, size=batch)
    texts = train[starts[:, None] + np.arange(n + 1)]
    loss, pullback = loss_and_gradients(cheat, texts, causal=False)
    adamw(cheat, pullback(), means, squares, step, 1e-2 * min(1, step / 50))
logits, _ = language_model(cheat, held_texts[:, :-1], causal=False)
p = softmax(logits.astype(float))
bits = -np.log2(np.take_along_axis(p, held_texts[:, 1:, None], axis=-1)[..., 0])
print(f"with the mask: {curve[-1, 2]:.1f} bits a byte; table of bigrams: {table_bits:.1f}")
print(f"without the mask: {bits[:, :-1].mean():.1f} bits a byte at all places but the last")
print(f"at the last place: {bits[:, -1].mean():.1f}")
print("it writes", repr(text_of(sample(cheat, prompt, 60, np.random.default_rng(7), causal=False))))
assert bits[:, :-1].mean() < 1
assert bits[:, -1].mean() > table_bits

# %% [markdown]
# The loss is far better than that of the model with the mask, after a quarter of the training. It is worthless. The
# model has learned to look one place to the right, where the answer stands. At the last place of a text there is
# nothing to the right, and there the model is worse than a table. A model that writes is always at the last place, so
# what it writes is nothing like Python.
#
# Keep this in mind for the rest of the book. *A loss that is too good is a leak until shown otherwise.* RETRO fetches
# text from a database, and text can leak in from there in several ways.
# [Tutorial 5](05_chunked_cross_attention.ipynb) and [tutorial 8](08_is_it_leakage.ipynb) look for such leaks.
#
# ## What this model cannot know
#
# On the whole, the model with the mask predicts better, the more it has read. Here is its loss by place in the window,
# the $n$ tokens that it is given at a time, here 64.

# %% tags=["hide-input"]
places = np.random.default_rng(2).integers(len(held_out) - n, size=1200)
windows = held_out[places[:, None] + np.arange(n + 1)]
logits, _ = language_model(params, windows[:, :-1])
bits = -np.log2(np.take_along_axis(softmax(logits), windows[:, 1:, None], axis=-1))[..., 0]
mean, error = bits.mean(axis=0), bits.std(axis=0) / math.sqrt(len(bits))
figure, axes = plt.subplots(figsize=(6.5, 3))
axes.fill_between(range(1, n + 1), mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.25, linewidth=0)
axes.plot(range(1, n + 1), mean, color=BLUE)
axes.axhline(table_bits, color=ORANGE, linestyle="--")
axes.text(n, table_bits + 0.03, "table of bigrams", color=ORANGE, ha="right", va="bottom", fontsize=8)
axes.set(
    xlabel="bytes that the model has read in its window",
    ylabel="bits a byte",
    title="more context, less surprise",
    xscale="log",
    ylim=(0, 4.2),
)
axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
plt.show()
print(
    f"{mean[0]:.1f} bits after one byte, {mean[4:8].mean():.1f} after 5 to 8, {mean[32:].mean():.1f} after more than 32"
)

# %% [markdown]
# *Figure 0.12.* The first few bytes of context help most. After that, this small model gains only a little from more.
# The band shows how far the mean of these 1,200 windows may be off: on each side two standard errors. A standard error
# is the standard deviation, divided by the root of the number of windows.
#
# What a language model knows comes from two places: its weights, and the $n$ tokens in front of it. Weights hold what
# was seen often in training. The context holds what was said just now. What was said once, in another text, is in
# neither. To know more, one makes the model larger, or the context longer. RETRO takes a third way: it looks things
# up. The next tutorial shows how one looks up text in the middle of predicting it.
#
# ## Exercises
#
# Write each answer into the cell with the dots. The cell below it judges what you wrote and gives a hint for the
# mistakes that we know.
#
# **0.1** A model was scored on several documents. `nats` holds the summed surprise of each document, and `n_bytes`
# its bytes. Return the bits per byte of all of them together.


# %% tags=["exercise"]
def bits_per_byte(nats, n_bytes): ...


# %% tags=["check"]
check_0_1(bits_per_byte)

# %% [markdown]
# **0.2** Positions can be learned, too. Then a second table holds a row for each position, and its row $t$ is added
# to the embedding of token $t$ in *every* text of the batch. Write this with its pullback. `table` has shape (|𝒱|,
# d), `positions` (n, d) and `tokens` (B, n). Return the value (B, n, d) and the pullback, a function that takes `dy`
# of shape (B, n, d) and returns `dtable, dpositions`.


# %% tags=["exercise"]
def embed_with_positions(table, positions, tokens): ...


# %% tags=["check"]
check_0_2(embed_with_positions)

# %% [markdown]
# **0.3** Causal attention with heads. `q`, `keys` and `values` have shape (n, d). Cut their columns into `n_heads`
# heads, let each attend by itself under the causal mask, and put the results side by side: (n, d).


# %% tags=["exercise"]
def many_heads(q, keys, values, n_heads): ...


# %% tags=["check"]
check_0_3(many_heads)

# %% [markdown]
# **0.4** Sampling programs often draw from the likeliest tokens only. `logits` has shape (|𝒱|,). Divide them by the
# temperature, keep the `top` largest, and return probabilities (|𝒱|,) that are 0 for all others and sum to 1. No two
# logits are equal.


# %% tags=["exercise"]
def likeliest(logits, temperature, top): ...


# %% tags=["check"]
check_0_4(likeliest)

# %% [markdown]
# ## What you have gained
#
# - You can say how good a language model is, in nats and in bits per byte, and compare two models with different
#   tokens.
# - You have the gradient $p - y$, and you know why an embedding's pullback adds.
# - You know attention as a soft lookup, what the mask prevents, and what norm, residual connection and FFW are for.
# - You have written a transformer with its gradients, AdamW, a training loop and a sampling loop: all that a language
#   model needs to learn and to write.
# - You have seen a leak: a loss that was too good.
#
# The functions `embed`, `cross_entropy` and `ffw` and the two loops return in [`mini_retro.py`](mini_retro.py), which
# is all of RETRO in one file of plain NumPy.
#
# Next: [tutorial 1 · Chunks, neighbours, and a database](01_chunks_neighbours_and_a_database.ipynb)
