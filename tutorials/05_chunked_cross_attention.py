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
# # 5 · Chunked cross-attention
#
# A decoder reads its neighbours through one operator, CCA (Borgeaud et al. 2022, §2.4, eq. 3). Seen from afar it is
# the attention of tutorials 3 and 4, with keys and values taken from retrieved text. What is new is who reads what: a
# token may read what was retrieved by the last chunk that ends at it or before it, and by no later one.
#
# Afterwards you can
#
# - say of each token whose neighbours it reads, and draw it;
# - explain why the shift is *m* − 1: what *m* wastes, and what *m* − 2 gives away;
# - test any model for such a leak from outside, without reading its code;
# - say what padding, a missing neighbour and another order of the neighbours do;
# - write CCA's forward and its pullback alone.

# %%
import matplotlib.pyplot as plt
import numpy as np

from retro_np import EncoderConfig, RetroConfig, adamw_init, adamw_update, gradcheck, init_params, reference, retro
from retro_np.nn.attention import attend, relative_attention, self_attention
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.cca import attended_sequence, attending_chunks, cca
from retro_np.nn.checks import perturbed_params
from retro_np.nn.encoder import encode
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import cross_entropy, embedding, linear, log_softmax, rms_norm
from retro_np.nn.positions import sinusoids
from retro_np.nn.scope import ROOT

BLUE, ORANGE, GREY, PALE = "#2b7bba", "#e07b1f", "#8c8c8c", "#c9dff0"

# %% [markdown]
# ## Who may read what
#
# The sequence has *n* tokens, in chunks C_1 … C_l of *m*. Here *n* = 12 and *m* = 4. Each chunk retrieves *k*
# neighbours of *r* = 2 *m* tokens, RET(C_u), of which vectors E_u are made, one for each token. Text and figures count
# tokens and chunks from 1, as the paper does; code counts from 0.
#
# What may be read is said by the paper's eq. 1: token *t* of chunk C_u is predicted from the tokens before it, and from
# RET(C_1) … RET(C_{u−1}), those of the chunks *before its own*. C_u can be looked up once its last token, token *um*,
# is there. The output at token *um* predicts token *um* + 1, the first of C_{u+1}, so the earliest place that may use
# RET(C_u) is token *um* itself. It serves until RET(C_{u+1}) is there, which is *m* tokens later. These *m* tokens, the
# last of C_u and the first *m* − 1 of C_{u+1}, are the **attending chunk** H_u⁺. `attending_chunks` cuts a sequence so.
# Give it the tokens' numbers, of 12 tokens, and of 14, where two are left over that form no whole chunk:

# %%
n, m, k = 12, 4, 2
n_chunks, r = n // m, 2 * m  # chunks; tokens of a neighbour [N, F]
for length in (n, n + 2):
    numbers = np.arange(1.0, length + 1).reshape(1, length, 1)
    attending = attending_chunks(numbers, n_chunks, m)
    print(f"{length} tokens")
    for u in range(n_chunks):
        chunk = numbers[0, u * m : (u + 1) * m, 0].astype(int)
        print(f"  C_{u + 1} {chunk!s:15} is looked up; E_{u + 1} is read by tokens {attending[0, u, :, 0].astype(int)}")

# %% [markdown]
# The last attending chunk is cut short by the end of the sequence; its zeros stand for tokens that are not there.
# And tokens 1 … *m* − 1 are in no attending chunk: nothing has been looked up yet. The *l* attending chunks reach from
# token *m* to token *lm* + *m* − 1, and no sequence of *l* whole chunks is longer. So all that is ever to be done is to
# leave out the first *m* − 1 tokens, and to fill up with zeros at the end.


# %%
def draw_reading(axes, shift):
    """Chunks above, what each retrieved below; a line from each token to what it reads if the first `shift` do not."""
    colours = [PALE, BLUE, "#1b4f7a"]
    for t in range(n):
        colour = colours[t // m]
        axes.add_patch(plt.Rectangle((t + 0.06, 2), 0.88, 0.8, facecolor=colour, edgecolor="black", linewidth=0.6))
        axes.text(t + 0.5, 2.4, t + 1, ha="center", va="center", color="black" if t < m else "white", fontsize=8)
        u = (t - shift) // m
        if u >= 0:
            leak = t < (u + 1) * m - 1  # C_u has tokens after this one
            axes.plot([t + 0.5, u * m + 3], [1.95, 0.65], color=ORANGE if leak else GREY, linewidth=2 if leak else 1)
    for u in range(n_chunks):
        axes.add_patch(plt.Rectangle((u * m + 2, 0), 2, 0.6, facecolor=colours[u], edgecolor="black", linewidth=0.6))
        axes.text(u * m + 3, 0.3, f"$E_{u + 1}$", ha="center", va="center", color="black" if u == 0 else "white")
    axes.set(xlim=(0, n), ylim=(-0.1, 2.9))
    axes.axis("off")


figure, axes = plt.subplots(figsize=(7, 2))
draw_reading(axes, m - 1)
axes.set_title("each token, and what it reads (shade: the chunk)", fontsize=9)
plt.show()

# %% [markdown]
# `attended_sequence` is the way back: it lays attending chunks where they came from, zeros in the first *m* − 1 places,
# and cuts off what is beyond the end. Both only move numbers and fill up with zeros, so both are linear. Call the first
# S; then the second is its transpose: ⟨S x, y⟩ = ⟨x, Sᵀ y⟩ for all x and y. The pullback of a linear map is its
# transpose (tutorial 3), so each is the other's pullback too. That is half of CCA's backward pass.

# %%
rng = np.random.default_rng(0)
x, y = rng.standard_normal((1, n, 3)), rng.standard_normal((1, n_chunks, m, 3))
one, other = np.sum(attending_chunks(x, n_chunks, m) * y), np.sum(x * attended_sequence(y, n))
print(f"⟨S x, y⟩ = {one:.6f}   ⟨x, Sᵀ y⟩ = {other:.6f}")
assert np.isclose(one, other)

# %% [markdown]
# ## One layer of RETRO
#
# A small model for what follows. `perturbed_params` moves parameters away from their first values, where gains are one
# and the position biases u and v zero, so that a forgotten one shows. The neighbour encoder is next tutorial's; here it
# only makes vectors E (B, l, k, r, d′) of retrieved tokens, d′ its width. (`ca_layers=()` takes the part away in which
# it looks at the chunk.)
#
# RET is a database's answer to a chunk. For a test it suffices that it depends on each token of the chunk, and on
# nothing else: here the chunk's tokens seed a generator, which draws the neighbours' tokens.

# %%
encoder = EncoderConfig(d_model=6, d_ffw=12, n_heads=2, d_head=3, n_layers=1, ca_layers=())
config = RetroConfig(20, 8, 16, n_heads=2, d_head=4, n_layers=1, cca_layers=(1,), chunk_size=m, encoder=encoder)
params = perturbed_params(config)
layer = params["layers"][0]


def retrieve(tokens):
    """RET of each whole chunk: (B, n) → (B, l, k, r)."""
    chunks = tokens.reshape(len(tokens), -1, m)
    return np.array([[np.random.default_rng(chunk).integers(1, 20, (k, r)) for chunk in row] for row in chunks])


tokens = rng.integers(1, 20, (1, n))
print(f"retrieved by {tokens[0, :m]}:\n{retrieve(tokens)[0, 0]}")

# %% [markdown]
# `attention_maps` returns the weights of every attention. CCA's, laid out by the token that reads and the token that
# is read, show the staircase of the drawing: each token has *k r* keys under one softmax, and it is another *k r*
# every *m* tokens.

# %%
weights = attention_maps(params, config, tokens, retrieve(tokens))["layers.0.cca"][0, :, 0]  # first head
grid = np.zeros((n, n_chunks, k * r))
for u in range(n_chunks):
    for i in range(m):
        t = (u + 1) * m - 1 + i
        if t < n:
            grid[t, u] = weights[u, i].reshape(-1)
assert np.allclose(grid[m - 1 :].sum(axis=(1, 2)), 1)
figure, axes = plt.subplots(figsize=(7, 2.6))
image = axes.imshow(grid.reshape(n, -1), cmap="Blues", vmin=0, vmax=0.5)
for edge in range(r, n_chunks * k * r, r):
    axes.axvline(edge - 0.5, color="black", linewidth=1.2 if edge % (k * r) == 0 else 0.4)
axes.set(yticks=range(0, n, 2), yticklabels=range(1, n + 1, 2), ylabel="token", xticks=[7.5, 23.5, 39.5])
axes.set_xticklabels([f"$E_{u + 1}$: k · r = {k} · {r}" for u in range(n_chunks)], fontsize=8)
figure.colorbar(image, label="weight", shrink=0.8, extend="max")
plt.show()

# %% [markdown]
# ## Forward
#
# The sequence's activations are h (B, n, d). With x = norm(h), S for `attending_chunks` and A for relative attention
# with its five projections (that of the positions, W_r, among them),
#
# y = h + Sᵀ A(S x, E)
#
# In words: norm; cut into attending chunks; let chunk *u* attend to E_u, all *k r* vectors of it at once; lay the
# result back; add. (In training the library drops some of it out before it adds.) As chunks do not see one another,
# they are simply more rows of the batch: (B, l, …) is reshaped to (B l, …).
#
# `attend` is A, with the projections and without norm and residual; self-attention uses it, too. It takes queries (B,
# g, n, d), here (B l, 1, *m*, d), and a context (B, k, r, d′), in groups as `relative_attention` has them (tutorial 4):
# the queries of an attending chunk are one group, hence the `None` below, and each neighbour is a group of keys. Only
# the distance is CCA's own (B.1.2). Query *i* of an attending chunk (0 … m − 1) and key *i′* of a neighbour (0 … r − 1)
# are at distance *i* − *i′* + *m* − 1: N lies beside C_u and F beside C_{u+1}, and query 0 stands on C_u's last token,
# *m* − 1 places from its first. All *k* neighbours have the same positions.

# %%
h = rng.standard_normal((1, n, 8))
encoded, key_mask = rng.standard_normal((1, n_chunks, k, r, 6)), np.ones((1, n_chunks, k, r), bool)


def down(params, h, encoded, key_mask):
    """The value of CCA, a step a line, with what its pullback needs. ROOT: nothing is frozen or dropped out."""
    normed, norm_vjp = rms_norm(h, params["norm"])
    queries = attending_chunks(normed, n_chunks, m)[0]  # (l, m, d), of a batch of one
    update, attend_vjp = attend(params, queries[:, None], encoded[0], 2, offset=m - 1, key_mask=key_mask[0], scope=ROOT)
    return h + attended_sequence(update[None, :, 0], n), (norm_vjp, attend_vjp)


value, pullbacks = down(layer["cca"], h, encoded, key_mask)
library, library_vjp = cca(layer["cca"], h, encoded, key_mask, 2, m)
pairs = [[(np.ones(r), e) for e in encoded[0, u]] for u in range(n_chunks)]  # for the loops
by_loops = reference.chunked_cross_attention(layer["cca"], h[0], pairs, 2, m)
print(f"from the library {np.max(np.abs(value - library)):.0e}, from the loops {np.max(np.abs(value - by_loops)):.0e}")
assert np.allclose(value, library)
assert np.allclose(value, by_loops)

# %% [markdown]
# ## The off-by-one
#
# CCA leaves out the first *m* − 1 tokens; call that number its **shift**. Now take another. There is no need to write
# CCA anew: move the sequence under it. With a row of zeros in front, what CCA leaves out is that row and *m* − 2 of our
# tokens: the shift is *m* − 2, and each token reads one place too soon. Two rows make it *m* − 3. The other way round,
# without the first token, that one and the next *m* − 1 are left out: the shift is *m*. (E then has a chunk more than
# there are whole ones in what CCA is given; it goes by E.)


# %%
def cca_at(shift, params, h, encoded, key_mask, n_heads, m):
    """The library's CCA with another shift, at most m, and its pullback."""
    early, late = max(m - 1 - shift, 0), max(shift - (m - 1), 0)  # rows of zeros in front; tokens taken away there

    def moved(x):
        return np.pad(x, [(0, 0), (early, 0), (0, 0)])[:, late:]

    def back(x, first):
        """Our tokens again: those taken away as they were, in `first`, then what was moved."""
        return np.concatenate([first[:, :late], x[:, early:]], axis=1)

    y, cca_vjp = cca(params, moved(h), encoded, key_mask, n_heads, m)

    def vjp(dy):
        grads, dh, dencoded = cca_vjp(moved(dy))
        return grads, back(dh, dy), dencoded

    return back(y, h), vjp


# %%
def logits_of(tokens, neighbours, shift=m - 1):
    """Algorithm 1 of the paper with its one layer written out, to put another CCA into it."""
    h, _ = embedding(params["embedding"], tokens)
    h, _ = self_attention(layer["attention"], h, config.n_heads, causal=True)
    table, values = params["encoder"]["embedding"], neighbours.reshape(-1, k, r)
    e, _ = encode(params["encoder"], table, values, h.reshape(-1, m, 8), config.encoder)
    e = e.reshape(*neighbours.shape, -1)
    h, _ = cca_at(shift, layer["cca"], h, e, neighbours != 0, config.n_heads, m)
    h, _ = rms_norm(ffw(layer["ffw"], h)[0], params["norm"])
    return linear(h, params["readout"])[0]


assert np.allclose(logits_of(tokens, retrieve(tokens)), retro(params, config, tokens, retrieve(tokens))[0])
print("with shift m − 1: the library's model")

# %% [markdown]
# A language model's output at token *t* predicts token *t* + 1, and may depend on tokens 1 … *t* alone. Whether it does
# can be tried from outside: change one token, *look up its chunk's neighbours again*, and see which outputs move. Any
# that stands before the token knows something of what is still to come. The second step is what such tests forget: in
# this model, whose encoder does not look at the chunk, every one of the shifts below passes if the neighbours are held
# fixed. (The whole encoder looks at the chunk, and hands the leak on by a second way, which shows even with neighbours
# held fixed: tutorial 6.) A real database may answer a changed chunk as before; the retrieval of a test must hang on
# each token, as ours does.


# %%
def reach(model, tokens):
    """(n, n): whether the output at token t (column) moves when token s (row) is changed."""
    before, moves = model(tokens), []
    for s in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[0, s] = changed[0, s] % 19 + 1  # another token, not padding
        moves.append(np.abs(model(changed) - before)[0].max(axis=1) > 1e-9)
    return np.array(moves)


def leaks(moves):
    """Those of the pairs in which the output stands before the token."""
    return np.tril(moves, -1)


kept = retrieve(tokens)
print(" shift   leaks   leaks, neighbours held fixed   the first token that RET(C_1) helps to predict")
for shift in range(m, -1, -1):
    again = leaks(reach(lambda x, s=shift: logits_of(x, retrieve(x), s), tokens)).sum()
    fixed = leaks(reach(lambda x, s=shift: logits_of(x, kept, s), tokens)).sum()
    other = np.concatenate([kept[:, :1] % 19 + 1, kept[:, 1:]], axis=1)  # C_1 retrieves something else
    helped = np.abs(logits_of(tokens, other, shift) - logits_of(tokens, kept, shift))[0].max(axis=1) > 1e-9
    print(f"{shift:6} {again:7} {fixed:30} {np.argmax(helped) + 2:50}")

# %%
figure, panels = plt.subplots(2, 3, figsize=(9, 4.6), height_ratios=[1, 2])
for (above, below), shift in zip(panels.T, (m, m - 1, m - 2), strict=True):
    draw_reading(above, shift)
    above.set_title({m: "m: wasteful", m - 1: "m − 1: right", m - 2: "m − 2: a leak"}[shift])
    moves = reach(lambda x, s=shift: logits_of(x, retrieve(x), s), tokens)
    picture = np.ones((n, n, 3))
    picture[moves], picture[leaks(moves)] = [0.79, 0.87, 0.94], [0.88, 0.48, 0.12]
    below.imshow(picture)
    below.set(xticks=range(0, n, 2), yticks=range(0, n, 2), xlabel="output at token that moves")
    below.set_xticklabels(range(1, n + 1, 2))
    below.set_yticklabels(range(1, n + 1, 2))
panels[1, 0].set_ylabel("token that is changed")
plt.tight_layout()
plt.show()
assert not leaks(reach(lambda x: logits_of(x, retrieve(x)), tokens)).any()

# %% [markdown]
# With shift *m* − 2, token *um* − 1 reads what C_u retrieved, and its output is to predict token *um*, the last of C_u:
# one orange cell a chunk, three in all. With *m* − 3 there are three a chunk, since the output at *um* − 2 knows two
# tokens too many and that at *um* − 1 one. With shift *m* there are none, but RET(C_1) first helps with token *m* + 2:
# the first token of C_{u+1} has to be predicted with RET(C_{u−1}).
#
# Shift *m* − 1 is the only one by which RET(C_u) is read as soon as eq. 1 allows, and no sooner.
#
# ## What a leak is worth
#
# A leak is not a blemish in a diagram; a model learns to use it. Let the text be random, each token one of 15, with
# nothing to be learned about it: no honest model can need less than ln 15 nats a token, unless a copy of the text is to
# be had. Give it a database in two ways:
#
# - *what was asked*: RET(C_u) = [C_u, padding]. It says what the decoder has read, and nothing more.
# - *the text with its continuation*: RET(C_u) = [C_u, C_{u+1}], as if each document had a copy in the database. All
#   tokens from C_2 onward are in what may be read.
#
# The model is an embedding, CCA and a readout. (A document's real copy would itself be leakage of another kind: of
# the evaluation's text into the database. Tutorial 8 is about it. The shift cannot help there.)


# %%
def one_step(params, tokens, targets, neighbours, shift, m):
    """Each target's nats, and the gradients, of embedding, CCA and readout."""
    h, h_vjp = embedding(params["embedding"], tokens)
    e, e_vjp = embedding(params["values"], neighbours)
    y, cca_vjp = cca_at(shift, params["cca"], h, e, neighbours != 0, 2, m)
    logits, readout_vjp = linear(y, params["readout"])
    _, loss_vjp = cross_entropy(logits, targets)
    (dlogits,) = loss_vjp(1.0)
    dy, dreadout = readout_vjp(dlogits)
    dcca, dh, de = cca_vjp(dy)
    (dembedding,), (dvalues,) = h_vjp(dh), e_vjp(de)
    grads = {"embedding": dembedding, "values": dvalues, "cca": dcca, "readout": dreadout}
    return -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0], grads


# %%
def learned(shift, continued, steps=150, chunks=6):
    """Nats by a token's place in its chunk, the mean of the last 20 steps. Chunks 2 … l."""
    rng, seen, d = np.random.default_rng(1), [], 32
    narrow = {"d_model": d, "d_ffw": d, "n_heads": 2, "d_head": 16, "n_layers": 1}
    small = RetroConfig(16, **narrow, cca_layers=(1,), chunk_size=m, encoder=EncoderConfig(**narrow))
    fresh = init_params(small, rng)
    params = {"embedding": fresh["embedding"], "values": fresh["encoder"]["embedding"], "readout": fresh["readout"]}
    params["cca"] = fresh["layers"][0]["cca"]
    state = adamw_init(params)
    for _ in range(steps):
        text = rng.integers(1, 16, (16, chunks * m + 1))
        cut = text[:, :-1].reshape(16, chunks, 1, m)
        continuation = np.roll(cut, -1, axis=1) * (np.arange(chunks) < chunks - 1)[:, None, None] * continued
        retrieved = np.concatenate([cut, continuation], axis=-1)  # k = 1
        nats, grads = one_step(params, text[:, :-1], text[:, 1:], retrieved, shift, m)
        adamw_update(params, grads, state, lr=1e-2)
        seen.append(nats[:, m - 1 : -1].reshape(-1, m).mean(axis=0))
    return np.mean(seen[-20:], axis=0)


# %%
shifts = (m, m - 1, m - 2, m - 3)
results = {continued: [learned(shift, continued) for shift in shifts] for continued in (False, True)}
print(f"ln 15 = {np.log(15):.2f} nats")
for continued, rows in results.items():
    print("\nRET(C_u) =", "[C_u, C_{u+1}]" if continued else "[C_u, padding]")
    for shift, row in zip(shifts, rows, strict=True):
        print(f"  shift {shift}: " + "   ".join(f"{nats:.1f}" for nats in row), f"  mean {np.mean(row):.2f}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
styles = [(GREY, "m"), (BLUE, "m − 1"), (ORANGE, "m − 2"), ("#f3c79b", "m − 3")]
for axes, (continued, rows) in zip(panels, results.items(), strict=True):
    for offset, ((colour, name), row) in enumerate(zip(styles, rows, strict=True)):
        axes.bar(np.arange(1, m + 1) + 0.2 * (offset - 1.5), row, 0.19, color=colour, label=f"shift {name}")
    axes.axhline(np.log(15), color="black", linewidth=0.8, linestyle="--")
    axes.set(xticks=range(1, m + 1), xlabel="place of the predicted token in its chunk")
    axes.set_title(
        "$[C_u, C_{u+1}]$: the continuation too" if continued else "$[C_u$, padding]: what was asked", fontsize=9
    )
panels[0].set_ylabel("nats a token")
panels[1].legend(fontsize=8, loc="upper right")
plt.show()
(wasteful, right, leak, worse), (wasteful_f, right_f, _, _) = results.values()
assert min(right.min(), wasteful.min()) > 2.6  # nothing to be had honestly
assert leak[:-1].min() > 2.6
assert max(leak[-1], *worse[-2:], *right_f) < 0.5
assert wasteful_f[0] > 2.5

# %% [markdown]
# Left: random text cannot be predicted (**2.71** nats, dashed), and yet with shift *m* − 2 the last token of each chunk
# costs next to nothing: it stands in N, and N is read before it is predicted. With *m* − 3 the last two. A loss
# averaged over all tokens shows it as a fine success of retrieval. With *m* − 1, mended, nothing is below the line.
# (Some bars stand above it: a model that has seen little text believes in chance, and pays in the next batch.)
#
# Right: where the continuation is to be had, *m* − 1 has all of it, and *m* none of it for each chunk's first token.
# The leaky shifts look like the honest one here, so a database that holds the text hides this leak behind the other.
#
# ## Masks, and neighbours that are missing
#
# Neighbours are padded: at a document's end there is no F, and where a database has too few chunks there are fewer than
# *k*. Padding, token 0, must not be a key. `key_mask` sets such logits to −∞, so that they get no weight, and no
# gradient. What the vectors there hold is of no consequence:

# %%
found = retrieve(tokens)
found[0, 0, 0, 5:] = 0  # a neighbour that ends early
found[0, 1] = 0  # C_2 found nothing at all
mask = found != 0
rubbish = np.where(mask[..., None], encoded, 1e6)
y, vjp = cca(layer["cca"], h, encoded, mask, 2, m)
dy = rng.standard_normal(y.shape)
_, dh, dencoded = vjp(dy)
print("the same with 10⁶ at padding:", np.array_equal(y, cca(layer["cca"], h, rubbish, mask, 2, m)[0]))
print("gradient of E at padding:    ", np.abs(dencoded[~mask]).max())
print("tokens that CCA left as they were:", np.flatnonzero(np.all(y == h, axis=(0, 2))) + 1)
assert np.array_equal(dh[0, 7:11], dy[0, 7:11])

# %% [markdown]
# Tokens 1 … 3 read nothing yet; tokens 8 … 11 are C_2's attending chunk, and C_2 found nothing. There the update is
# zero, the residual passes through, and so does the gradient: dh = dy. The softmax over no key at all needs a case of
# its own. Break it, and take the textbook's formula for a row of −∞:

# %%
nothing = np.full(4, -np.inf)
with np.errstate(invalid="ignore"):
    shifted = nothing - nothing.max()
    print("textbook: ", np.exp(shifted) / np.exp(shifted).sum())
q, keys = rng.standard_normal((1, 1, 1, 1, 3)), rng.standard_normal((1, 1, 4, 1, 3))
print("library:  ", relative_attention(q, keys, keys, key_mask=np.zeros((1, 1, 4), bool))[0].ravel())

# %% [markdown]
# −∞ − (−∞) is not a number, and what it is added to is none either. The cure: subtract 0 where the maximum is −∞, so
# that all exponentials are 0, and divide by 1 where their sum is 0. The softmax's pullback (tutorial 3) is right as it
# stands, since all weights are 0. The other mistake, no mask at all, is silent: padding's embedding is a vector like
# any other, and takes its share of the weight.

# %%
unmasked = cca(layer["cca"], h, encoded, np.ones_like(mask), 2, m)[0]
wrong = np.abs(unmasked - y)[0].max(axis=1)
print("tokens whose output is wrong without the mask:", np.flatnonzero(wrong > 1e-9) + 1)

# %% [markdown]
# ## The order of the neighbours
#
# All *k* neighbours stand under one softmax and at the same positions, so their order says nothing. The order of
# tokens within each does. And if each neighbour is given twice, nothing changes either: weights are halved, and there
# are two of each. More neighbours are no louder. (If only one of several is given twice, it does count for more.)


# %%
def change(other_encoded):
    """How far the output moves, at most."""
    full = np.ones(other_encoded.shape[:-1], bool)
    return np.abs(cca(layer["cca"], h, other_encoded, full, 2, m)[0] - value).max()


print(f"neighbours exchanged       {change(encoded[:, :, ::-1]):.1f}")
print(f"each neighbour given twice {change(np.repeat(encoded, 2, axis=2)):.1f}")
print(f"one of two given twice     {change(encoded[:, :, [0, 0, 1]]):.1f}")
print(f"tokens in reverse order    {change(encoded[:, :, :, ::-1]):.1f}")

# %% [markdown]
# ## Backward
#
# y = h + Sᵀ A(S x, E), x = norm(h). Given dy, the gradient of a loss with respect to y, go through it from the
# outside inwards:
#
# | forward | pullback | why |
# | --- | --- | --- |
# | y = h + z | dh = dy, dz = dy | a sum hands its gradient to both |
# | z = Sᵀ a | da = S dz | transpose of the transpose: cut dz as x was cut |
# | a = A(q, E) | dq, dE, d(parameters) = A's pullback of da | tutorials 3 and 4 |
# | q = S x | dx = Sᵀ dq | lay it back where it came from |
# | x = norm(h) | dh = dh + norm's pullback of dx | h was used twice: in the sum, and here |
#
# The same library functions, in reverse order; `attending_chunks` and `attended_sequence` have changed places.

# %%
norm_vjp, attend_vjp = pullbacks
dy = rng.standard_normal(h.shape)
dchunks = attending_chunks(dy, n_chunks, m)[0]  # (l, m, d): what the first m − 1 tokens get does not enter
grads, dqueries, dencoded = attend_vjp(dchunks[:, None])
dnormed = attended_sequence(dqueries[None, :, 0], n)
dh_through_norm, grads["norm"] = norm_vjp(dnormed)
dh = dy + dh_through_norm

expected_grads, expected_dh, expected_dencoded = library_vjp(dy)
assert np.allclose(dh, expected_dh)
assert np.allclose(dencoded, expected_dencoded[0])
assert all(np.allclose(grads[name], expected_grads[name]) for name in expected_grads)
print("gradients:", ", ".join(f"{name} {grad.shape}" for name, grad in sorted(grads.items())))

# %% [markdown]
# Inside A, with p the projected positions and c a head's width. Projections act on all heads side by side, the second
# line on each head alone:
#
# | forward | pullback |
# | --- | --- |
# | a = o W_o | do = da W_oᵀ, dW_o = oᵀ da |
# | o = softmax(((q̂ + u)·k̂ + (q̂ + v)·p) / √c) v̂ | dq̂, dk̂, dv̂, dp, du, dv: `relative_attention`'s pullback |
# | q̂ = q W_q | dq = dq̂ W_qᵀ, dW_q = qᵀ dq̂ |
# | k̂ = E W_k | dE = dk̂ W_kᵀ, dW_k = Eᵀ dk̂ |
# | v̂ = E W_v | dE = dE + dv̂ W_vᵀ, dW_v = Eᵀ dv̂ |
# | p = R W_r | dW_r = Rᵀ dp; R, the sinusoids, are constants |
#
# Three sums are easily lost. E is used twice, as keys and as values, so dE has two terms. What all chunks share, the
# matrices, the biases u and v, and p, sums over all chunks (`linear` does it by treating them as more rows). And p is
# shared by the *k* neighbours of a chunk, which stand at the same positions: dp sums over them, too.
#
# Which retrieved vectors get a gradient from the output at one token? Those that it reads: the staircase again.

# %%
gradient = np.zeros((n, n_chunks, k * r))
for t in range(n):
    dy_t = np.zeros_like(h)
    dy_t[0, t] = rng.standard_normal(8)
    gradient[t] = np.linalg.norm(library_vjp(dy_t)[2][0], axis=-1).reshape(n_chunks, k * r)
figure, axes = plt.subplots(figsize=(7, 2.6))
image = axes.imshow(gradient.reshape(n, -1), cmap="Oranges", vmin=0)
for edge in range(r, n_chunks * k * r, r):
    axes.axvline(edge - 0.5, color="black", linewidth=1.2 if edge % (k * r) == 0 else 0.4)
axes.set(yticks=range(0, n, 2), yticklabels=range(1, n + 1, 2), ylabel="output at token", xticks=[7.5, 23.5, 39.5])
axes.set_xticklabels([f"gradient of $E_{u + 1}$" for u in range(n_chunks)], fontsize=8)
figure.colorbar(image, label="norm", shrink=0.8)
plt.show()
assert np.array_equal(gradient > 0, grid > 0)

# %% [markdown]
# ## Three wrong pullbacks
#
# Each of these runs without complaint. `gradcheck` says at once which argument's gradient is wrong, at which index, and
# sometimes why:


# %%
def broken(how):
    """The library's CCA with one line of its pullback spoilt."""

    def f(params, h, encoded):
        y, vjp = cca(params, h, encoded, key_mask, 2, m)

        def spoilt(dy):
            grads, dh, dencoded = vjp(dy)
            if how == "no residual":
                dh = dh - dy
            elif how == "laid back one late":  # Sᵀ of another shift
                dh = dy + np.roll(dh - dy, 1, axis=1)
            elif how == "last neighbour only":  # assigned where it should be added
                dencoded = dencoded * (np.arange(k) == k - 1)[:, None, None]
            return grads, dh, dencoded

        return y, spoilt

    return f


# %%
for how in ("nothing", "no residual", "laid back one late", "last neighbour only"):
    report = gradcheck(broken(how), layer["cca"], h, encoded, raise_exception=False)
    wrong = [f"{row.name}, {row.where}; {row.note}".rstrip("; ") for row in report.rows if row.verdict == "wrong"]
    print(f"{how:20} {' '.join(wrong) or 'passes'}")

# %% [markdown]
# ## Exercises
#
# Five steps, at the end of which the whole of CCA is yours, made of `linear`, `rms_norm`, `sinusoids` and
# `relative_attention`. Leave the folded cells folded, and the library's `nn/attention.py` and `nn/cca.py` closed.
#
# **1.** The (0-based) chunk whose neighbours token *t* (0-based) reads; −1 for none. It is one line; let it take
# arrays, too.


# %% tags=["exercise"]
def reads(t, m): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def reads(t, m):
    return (t + 1) // m - 1


# %% tags=["check"]
for length in range(1, 6):
    chunk_numbers = np.broadcast_to(np.arange(5.0)[None, :, None, None], (1, 5, length, 1))
    laid_out = attended_sequence(chunk_numbers + 1, 5 * length)[0, :, 0] - 1  # zero, where nothing is read, becomes −1
    assert np.array_equal(reads(np.arange(5 * length), length), laid_out), f"m = {length}"
print("right: as the library lays chunks out")

# %% [markdown]
# **2.** S and Sᵀ. `cut` makes attending chunks (B, l, m, d) of a sequence (B, n, d), and `lay_back` a sequence of *n*
# tokens of them. *n* need not be a multiple of *m*.


# %% tags=["exercise"]
def cut(h, n_chunks, m): ...


def lay_back(chunks, n): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def cut(h, n_chunks, m):
    b, n, d = h.shape
    out = np.zeros((b, n_chunks * m, d))
    out[:, : n - (m - 1)] = h[:, m - 1 :]
    return out.reshape(b, n_chunks, m, d)


def lay_back(chunks, n):
    b, n_chunks, m, d = chunks.shape
    out = np.zeros((b, n, d))
    out[:, m - 1 :] = chunks.reshape(b, n_chunks * m, d)[:, : n - (m - 1)]
    return out


# %% tags=["check"]
for length in (12, 14, 15, 4, 5):
    whole = length // m
    x, y = rng.standard_normal((2, length, 3)), rng.standard_normal((2, whole, m, 3))
    assert np.array_equal(cut(x, whole, m), attending_chunks(x, whole, m)), f"S, n = {length}"
    assert np.array_equal(lay_back(y, length), attended_sequence(y, length)), f"the way back, n = {length}"
    assert np.isclose(np.sum(cut(x, whole, m) * y), np.sum(x * lay_back(y, length)))
print("right: as the library moves them, and each the other's transpose")

# %% [markdown]
# **3.** Relative cross-attention with its projections and its pullback, out of `linear` and `relative_attention`.
#
# - `queries` (b, m, d) of *b* attending chunks; `context` (b, k, r, d′); `key_mask` (b, k, r).
# - Heads are cut off the last axis: `x.reshape(*x.shape[:-1], n_heads, -1)`. `relative_attention` takes q as
#   (b, 1, m, heads, c), keys and values as (b, k, r, heads, c); its pullback returns dq, dkeys, dvalues, dtable, du
#   and dv.
# - `sinusoids(first, count, d)` has the rows of distances first, first − 1, …; `relative_attention` wants
#   m + r − 1 of them, as wide as the queries' d, projected by `w_r` and cut into heads, from the largest distance that
#   occurs. Which is it?
#
# Return the value (b, m, d), and vjp(dy) → (a dict of gradients, dqueries, dcontext).


# %% tags=["exercise"]
def cross(params, queries, context, key_mask, n_heads): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def cross(params, queries, context, key_mask, n_heads):
    def heads(x):
        return x.reshape(*x.shape[:-1], n_heads, -1)

    m, r = queries.shape[1], context.shape[2]
    q, q_vjp = linear(queries[:, None], params["w_q"])
    keys, keys_vjp = linear(context, params["w_k"])
    values, values_vjp = linear(context, params["w_v"])
    rows = sinusoids(2 * m - 2, m + r - 1, queries.shape[-1])  # i = m − 1 and i′ = 0: the farthest apart
    table = heads(rows @ params["w_r"])
    given = (heads(q), heads(keys), heads(values), table, params["u"], params["v"])
    out, out_vjp = relative_attention(*given, key_mask=key_mask)
    y, y_vjp = linear(out.reshape(q.shape), params["w_o"])

    def vjp(dy):
        dout, dw_o = y_vjp(dy[:, None])
        dq, dkeys, dvalues, dtable, du, dv = out_vjp(heads(dout))
        dqueries, dw_q = q_vjp(dq.reshape(q.shape))
        dcontext_k, dw_k = keys_vjp(dkeys.reshape(keys.shape))
        dcontext_v, dw_v = values_vjp(dvalues.reshape(values.shape))
        grads = {"w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o, "u": du, "v": dv}
        return grads | {"w_r": rows.T @ dtable.reshape(len(rows), -1)}, dqueries[:, 0], dcontext_k + dcontext_v

    return y[:, 0], vjp


# %% tags=["check"]
inner = {name: array for name, array in layer["cca"].items() if name != "norm"}
queries, context = rng.standard_normal((n_chunks, m, 8)), rng.standard_normal((n_chunks, k, r, 6))
expected, _ = attend(inner, queries[:, None], context, 2, offset=m - 1, key_mask=mask[0], scope=ROOT)
assert np.allclose(cross(inner, queries, context, mask[0], 2)[0], expected[:, 0]), "the value"
assert gradcheck(cross, inner, queries, context, mask[0], 2)
print("right: the library's value, and a pullback that finite differences agree with")

# %% [markdown]
# **4.** CCA's value, with your `cut`, `cross` and `lay_back`: h (B, n, d), encoded (B, l, k, r, d′), key_mask (B, l, k,
# r). What is left over at the end is no whole chunk and looks nothing up, but it reads.


# %% tags=["exercise"]
def cca_value(params, h, encoded, key_mask, n_heads, m): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def cca_value(params, h, encoded, key_mask, n_heads, m):
    b, n_chunks = encoded.shape[:2]
    normed, _ = rms_norm(h, params["norm"])
    queries = cut(normed, n_chunks, m).reshape(b * n_chunks, m, -1)
    context, mask = (x.reshape(b * n_chunks, *x.shape[2:]) for x in (encoded, key_mask))
    update, _ = cross(params, queries, context, mask, n_heads)
    return h + lay_back(update.reshape(b, n_chunks, m, -1), h.shape[1])


# %% tags=["check"]
for length in (12, 14, 15):  # three whole chunks each
    longer, some = rng.standard_normal((2, length, 8)), rng.standard_normal((2, n_chunks, k, r, 6))
    marks = rng.integers(0, 2, (2, n_chunks, k, r)).astype(bool)
    marks[1, 0] = False
    mine = cca_value(layer["cca"], longer, some, marks, 2, m)
    for b in range(2):
        pairs = [list(zip(marks[b, u].astype(int), some[b, u], strict=True)) for u in range(n_chunks)]
        by_loops = reference.chunked_cross_attention(layer["cca"], longer[b], pairs, 2, m)
        assert np.allclose(mine[b], by_loops), f"n = {length}, sequence {b}"
print("right: as the paper's equation by loops")

# %% [markdown]
# **5.** The whole of it: value, and vjp(dy) → (gradients of params, dh, dencoded).


# %% tags=["exercise"]
def my_cca(params, h, encoded, key_mask, n_heads, m): ...


# %% jupyter={"source_hidden": true} tags=["answer"]
def my_cca(params, h, encoded, key_mask, n_heads, m):
    b, n_chunks = encoded.shape[:2]
    n = h.shape[1]
    normed, norm_vjp = rms_norm(h, params["norm"])
    queries = cut(normed, n_chunks, m)
    given = (x.reshape(b * n_chunks, *x.shape[2:]) for x in (queries, encoded, key_mask))
    update, cross_vjp = cross(params, *given, n_heads)
    y = h + lay_back(update.reshape(queries.shape), n)

    def vjp(dy):
        dupdate = cut(dy, n_chunks, m)
        grads, dqueries, dencoded = cross_vjp(dupdate.reshape(update.shape))
        dnormed = lay_back(dqueries.reshape(queries.shape), n)
        dh, dnorm = norm_vjp(dnormed)
        return grads | {"norm": dnorm}, dy + dh, dencoded.reshape(encoded.shape)

    return y, vjp


# %% tags=["check"]
longer, some = rng.standard_normal((2, 14, 8)), rng.standard_normal((2, n_chunks, k, r, 6))
given = (layer["cca"], longer, some, marks, 2, m)
dy = rng.standard_normal(longer.shape)
(mine, my_vjp), (theirs, their_vjp) = my_cca(*given), cca(*given)
assert np.allclose(mine, theirs), "the value"
(my_grads, *my_rest), (their_grads, *their_rest) = my_vjp(dy), their_vjp(dy)
assert my_grads.keys() == their_grads.keys()
assert all(np.allclose(my_grads[name], their_grads[name]) for name in their_grads), "the parameters' gradients"
assert all(np.allclose(a, b) for a, b in zip(my_rest, their_rest, strict=True)), "dh, dencoded"
assert gradcheck(my_cca, *given)
print("right: chunked cross-attention, forward and backward, is yours")
