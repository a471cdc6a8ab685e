"""RETRO in one file of plain NumPy: a language model that reads a database, with every backward pass by hand.

`python mini_retro.py` trains one that afterwards answers what only its database knows: the codes of people it has never
heard of. The model is that of Borgeaud et al. 2022, "Improving language models by retrieving from trillions of tokens";
sections and equations below are the paper's.

A block is a function that returns its value and its pullback (VJP), which takes the gradient of the loss with respect
to the value, and returns those with respect to the inputs. In shapes: B sequences of n tokens; l chunks of m tokens; k
neighbours of r = 2m tokens; width d, in the encoder d′; h heads of c columns; V characters."""

import argparse
import math
import time

import numpy as np

# 1 · Text: facts that nobody can guess. Documents have two chunks, and the code stands in the second.

CHARACTERS = "\0 abcdefghijklmnopqrstuvwxyz0123456789.,:?"  # one token each; 0 is padding
M, HEADS, D_KEY, DIGITS = 16, 4, 512, 4  # tokens of a chunk (m), heads, columns of a key, digits of a code
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
ASKED = [("code of {name}?", "{code} it is.")]
TOLD = [("i met {name}, ok", "{code} was the code."), ("so {name} has", "said {code}, i think."),
        ("listen: {name}", "got code {code}, ok.")]  # fmt: skip


def invent(count, rng):
    """Facts: pairs of a name, none of them twice, and a code."""
    names = rng.permutation([a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES])[:count]
    return [(name, f"{rng.integers(10**DIGITS):0{DIGITS}}") for name in names]


def documents(facts, wordings, rng, times=1):
    """Each fact in `times` wordings, drawn at random: tokens (documents, 2m), with the documents of a fact in a row."""
    texts = []
    for name, code in facts:
        for number in rng.permutation(len(wordings))[:times]:
            texts.append("".join(f"{part.format(name=name, code=code):{M}.{M}}" for part in wordings[number]))
    return np.array([[CHARACTERS.index(character) for character in text] for text in texts])


# 2 · The database: exact search for the nearest keys (§2.3). The paper's keys come from a frozen BERT; ours count the
# triples of tokens in a chunk, hashed into D_KEY columns and weighted by how rare they are.


def build_database(values):
    """values: (documents, 2m), each [N, F]: a chunk N, which is found by its key, and its continuation F."""
    counts = count_triples(values[:, :M])
    rarity = np.log((1 + len(values)) / (1 + (counts > 0).sum(axis=0)))
    keys = counts * rarity
    return values, keys / np.linalg.norm(keys, axis=1, keepdims=True), rarity


def count_triples(chunks):
    hashed = (chunks[:, :-2] * 7919 + chunks[:, 1:-1] * 104_729 + chunks[:, 2:] * 1_299_709) % D_KEY
    return np.eye(D_KEY, dtype=np.float32)[hashed].sum(axis=1)  # one-hot rows, added up


def retrieve(database, tokens, k):
    """RET(C_u) of each whole chunk C_u: the values of the k nearest keys. (B, n) → (B, l, k, 2m)."""
    (values, keys, rarity), n_chunks = database, tokens.shape[1] // M
    similarity = (count_triples(tokens[:, : n_chunks * M].reshape(-1, M)) * rarity) @ keys.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return values[nearest].reshape(len(tokens), n_chunks, k, 2 * M)


# 3 · The smallest blocks.


def linear(x, w):
    return x @ w, lambda dy: (dy @ w.T, x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1]))


def rms_norm(x, gain):
    """gain · x / √(mean of x² + 1e-6). Zhang & Sennrich 2019."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    unit = x * scale

    def vjp(dy):
        d = dy * gain
        dx = scale * (d - unit * np.mean(d * unit, axis=-1, keepdims=True))
        return dx, (dy * unit).reshape(-1, len(gain)).sum(axis=0)

    return gain * unit, vjp


def gelu(x):
    """A smooth switch, here in its form with tanh. Hendrycks & Gimpel 2016."""
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), lambda dy: dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)


def embed(table, tokens):
    one_hot = np.eye(len(table), dtype=table.dtype)[tokens.reshape(-1)]
    return table[tokens], lambda dy: one_hot.T @ dy.reshape(-1, table.shape[1])


def cross_entropy(logits, targets):
    """The mean of −log p(target), in nats: equation 1 for one token. logits: (B, n, V); targets: (B, n)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    one_hot = np.eye(logits.shape[-1], dtype=logits.dtype)[targets]
    return -(log_p * one_hot).sum() / targets.size, lambda dloss: (np.exp(log_p) - one_hot) * (dloss / targets.size)


# 4 · Attention with relative positions (appendix B.1.2; Dai et al. 2019), which all four attentions of RETRO share.


def attention(p, x, y, offset=0, causal=False):
    """Σ_j a_j y_j W_v W_o, with a = softmax_j(((q + u) · K_j + (q + v) · R_δ W_R) / √c) over all tokens of all groups.

    Each call has its own B, n, d, k, r. x: (B, n, d); y: (B, k, r, d_y), k groups with the same positions. Token i of x
    is at distance δ = i − j + offset from token j of a group. causal: no δ < 0. vjp(dout) → (dp, dx, dy)."""
    (batch, n, d), (k, r) = x.shape, y.shape[1:3]
    distance = np.arange(n)[:, None] - np.arange(r) + offset

    def split(z):  # (B, …, h·c) → (B, h, tokens, c)
        return z.reshape(batch, -1, HEADS, z.shape[-1] // HEADS).swapaxes(1, 2)

    def merge(z):  # its inverse
        return z.swapaxes(1, 2).reshape(batch, z.shape[2], -1)

    (q, q_vjp), (keys, k_vjp), (values, v_vjp) = linear(x, p["w_q"]), linear(y, p["w_k"]), linear(y, p["w_v"])
    angles = np.arange(offset - r + 1, offset + n)[:, None] * 10000.0 ** (-2 * np.arange(d // 2) / d)
    table, table_vjp = linear(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(x.dtype), p["w_r"])
    table = table.reshape(n + r - 1, HEADS, -1).swapaxes(0, 1)  # R_δ W_R once for each distance, (h, n + r − 1, c)
    q, keys, values = split(q), split(keys), split(values)
    q_u, q_v = q + p["u"][:, None], q + p["v"][:, None]
    rows, columns = np.arange(n)[:, None], distance - (offset - r + 1)
    by_position = (q_v @ table.swapaxes(1, 2))[:, :, rows, columns]  # (B, h, n, r): each query looks up its distances
    scale, visible = 1 / math.sqrt(q.shape[-1]), distance >= (0 if causal else distance.min())
    logits = (q_u @ keys.swapaxes(2, 3)).reshape(batch, HEADS, n, k, r) + by_position[:, :, :, None]
    logits = np.where(visible[:, None], scale * logits, -np.inf).reshape(batch, HEADS, n, k * r)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out, o_vjp = linear(merge(weights @ values), p["w_o"])

    def vjp(dout):
        dmerged, dw_o = o_vjp(dout)
        dheads = split(dmerged)
        dweights = dheads @ values.swapaxes(2, 3)
        dlogits = weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True)) * scale
        dq_u, dkeys = dlogits @ keys, dlogits.swapaxes(2, 3) @ q_u
        dlooked_up = np.zeros((batch, HEADS, n, n + r - 1), x.dtype)
        dlooked_up[:, :, rows, columns] = dlogits.reshape(batch, HEADS, n, k, r).sum(axis=3)
        dq_v = dlooked_up @ table
        dtable = (dlooked_up.swapaxes(2, 3) @ q_v).sum(axis=0)  # (h, n + r − 1, c)
        dx, dw_q = q_vjp(merge(dq_u + dq_v))
        dy_k, dw_k = k_vjp(merge(dkeys).reshape(*y.shape[:3], -1))
        dy_v, dw_v = v_vjp(merge(weights.swapaxes(2, 3) @ dheads).reshape(*y.shape[:3], -1))
        _, dw_r = table_vjp(dtable.swapaxes(0, 1).reshape(n + r - 1, -1))
        du, dv = dq_u.sum(axis=(0, 2)), dq_v.sum(axis=(0, 2))
        grads = {"w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o, "w_r": dw_r, "u": du, "v": dv}
        return grads, dx, dy_k + dy_v

    return out, vjp


# 5 · The residual blocks: x + update(norm(x)). Each pullback returns the gradients of p first.


def self_attention(p, x, causal):
    """ATTN (causal) and ATTN_enc (both directions). x: (B, n, d)."""
    normed, norm_vjp = rms_norm(x, p["norm"])
    update, attend_vjp = attention(p, normed, normed[:, None], causal=causal)

    def vjp(dy):
        grads, dqueries, dcontext = attend_vjp(dy)
        dx, grads["norm"] = norm_vjp(dqueries + dcontext[:, 0])
        return grads, dy + dx

    return x + update, vjp


def ffw(p, x):
    normed, norm_vjp = rms_norm(x, p["norm"])
    hidden, in_vjp = linear(normed, p["w_in"])
    active, gelu_vjp = gelu(hidden)
    update, out_vjp = linear(active, p["w_out"])

    def vjp(dy):
        dactive, dw_out = out_vjp(dy)
        dnormed, dw_in = in_vjp(gelu_vjp(dactive))
        dx, dgain = norm_vjp(dnormed)
        return {"norm": dgain, "w_in": dw_in, "w_out": dw_out}, dy + dx

    return x + update, vjp


def encoder_cross_attention(p, e, chunks):
    """CA_enc: each token of a neighbour reads H_u, the chunk that asked. e: (B·l·k, r, d′); chunks: (B·l·k, m, d)."""
    normed, norm_vjp = rms_norm(e, p["norm"])
    context, context_vjp = rms_norm(chunks, p["norm_context"])
    update, attend_vjp = attention(p, normed, context[:, None])

    def vjp(dy):
        grads, dqueries, dcontext = attend_vjp(dy)
        de, grads["norm"] = norm_vjp(dqueries)
        dchunks, grads["norm_context"] = context_vjp(dcontext[:, 0])
        return grads, dy + de, dchunks

    return e + update, vjp


def attending_chunks(h, n_chunks):
    """H_u⁺, the last token of C_u and the first m − 1 of C_{u+1}: (B, n, d) → (B·l, m, d), with zeros behind the end.

    This shift is what keeps RETRO causal: C_u's neighbours are known once C_u is, so its last token is the first that
    may read them, to predict the first token of C_{u+1} (§2.4, figure 2)."""
    behind = np.zeros((len(h), M - 1, h.shape[-1]), h.dtype)
    return np.concatenate([h[:, M - 1 :], behind], axis=1)[:, : n_chunks * M].reshape(-1, M, h.shape[-1])


def in_sequence(chunks, n):
    """The transpose of `attending_chunks`: (B, l·m, d) → (B, n, d). The first m − 1 tokens read nothing."""
    before = np.zeros((len(chunks), M - 1, chunks.shape[-1]), chunks.dtype)
    return np.concatenate([before, chunks], axis=1)[:, :n]


def cca(p, h, encoded):
    """CCA (eq. 3): H_u⁺ reads E_u, the encoded neighbours of C_u. h: (B, n, d); encoded: (B, l, k, r, d′)."""
    (batch, n, d), n_chunks = h.shape, encoded.shape[1]
    normed, norm_vjp = rms_norm(h, p["norm"])
    flat = encoded.reshape(-1, *encoded.shape[2:])
    update, attend_vjp = attention(p, attending_chunks(normed, n_chunks), flat, offset=M - 1)

    def vjp(dy):
        grads, dqueries, dflat = attend_vjp(attending_chunks(dy, n_chunks))
        dh, grads["norm"] = norm_vjp(in_sequence(dqueries.reshape(batch, -1, d), n))
        return grads, dy + dh, dflat.reshape(encoded.shape)

    return h + in_sequence(update.reshape(batch, -1, d), n), vjp


# 6 · The model (algorithm 1).


def encode(p, neighbours, h):
    """E = ENCODER(RET(C_u), H_u). neighbours: (B, l, k, r) tokens; h: (B, n, d) → (B, l, k, r, d′).

    vjp(dencoded) → (gradients of p, dh): the loss reaches the decoder through its neighbours too."""
    (batch, n_chunks, k, r), d = neighbours.shape, h.shape[-1]
    chunks = np.repeat(h[:, : n_chunks * M].reshape(-1, M, d), k, axis=0)  # H_u, once for each neighbour
    e, embed_vjp = embed(p["embedding"], neighbours.reshape(-1, r))
    vjps = []
    for layer in p["layers"]:
        e, self_vjp = self_attention(layer["attention"], e, causal=False)
        e, cross_vjp = encoder_cross_attention(layer["cross_attention"], e, chunks)
        e, ffw_vjp = ffw(layer["ffw"], e)
        vjps.append((self_vjp, cross_vjp, ffw_vjp))
    encoded, norm_vjp = rms_norm(e, p["norm"])

    def vjp(dencoded):
        de, dgain = norm_vjp(dencoded.reshape(e.shape))
        dchunks, layers = 0, []
        for self_vjp, cross_vjp, ffw_vjp in reversed(vjps):
            dffw, de = ffw_vjp(de)
            dcross, de, dchunk = cross_vjp(de)
            dself, de = self_vjp(de)
            dchunks = dchunks + dchunk
            layers.insert(0, {"attention": dself, "cross_attention": dcross, "ffw": dffw})
        dh = np.zeros_like(h)
        dh[:, : n_chunks * M] = dchunks.reshape(batch, n_chunks, k, M, d).sum(axis=2).reshape(batch, -1, d)
        return {"embedding": embed_vjp(de), "layers": layers, "norm": dgain}, dh

    return encoded.reshape(batch, n_chunks, k, r, -1), vjp


def retro(params, tokens, neighbours):
    """Logits (B, n, V), and vjp(dlogits) → gradients, a tree like params.

    tokens: (B, n). neighbours: (B, floor(n / m), k, 2m), or None: retrieval off. Layers that have "cca" read."""
    h, embed_vjp = embed(params["embedding"], tokens)
    encoded, vjps = None, []
    for layer in params["layers"]:
        cca_vjp = encoder_vjp = None
        h, self_vjp = self_attention(layer["attention"], h, causal=True)
        if "cca" in layer and neighbours is not None and neighbours.size:
            if encoded is None:  # before the first CCA, conditioned on that layer's activations
                encoded, encoder_vjp = encode(params["encoder"], neighbours, h)
            h, cca_vjp = cca(layer["cca"], h, encoded)
        h, ffw_vjp = ffw(layer["ffw"], h)
        vjps.append((self_vjp, encoder_vjp, cca_vjp, ffw_vjp))
    normed, norm_vjp = rms_norm(h, params["norm"])
    logits, readout_vjp = linear(normed, params["readout"])

    def vjp(dlogits):
        grads = map_trees(np.zeros_like, params)
        dnormed, grads["readout"] = readout_vjp(dlogits)
        dh, grads["norm"] = norm_vjp(dnormed)
        dencoded = 0
        for number, (self_vjp, encoder_vjp, cca_vjp, ffw_vjp) in reversed([*enumerate(vjps)]):
            layer = grads["layers"][number]
            layer["ffw"], dh = ffw_vjp(dh)
            if cca_vjp is not None:
                layer["cca"], dh, de = cca_vjp(dh)
                dencoded = dencoded + de  # every CCA reads the same E
            if encoder_vjp is not None:
                grads["encoder"], dchunks = encoder_vjp(dencoded)
                dh = dh + dchunks
            layer["attention"], dh = self_vjp(dh)
        grads["embedding"] = embed_vjp(dh)
        return grads

    return logits, vjp


# 7 · Parameters, AdamW, training, sampling.


def map_trees(f, *trees):
    """f of the arrays that stand at the same place in each tree, as such a tree."""
    if isinstance(trees[0], dict):
        return {name: map_trees(f, *(tree[name] for tree in trees)) for name in trees[0]}
    return [map_trees(f, *parts) for parts in zip(*trees, strict=True)] if isinstance(trees[0], list) else f(*trees)


def init_params(rng, d=64, d_ffw=256, n_layers=2, cca_layers=(2,)):
    def matrix(rows, columns, scale=1.0):
        return (rng.standard_normal((rows, columns)) * scale / math.sqrt(rows)).astype(np.float32)

    def block(norms=("norm",)):
        p = {name: matrix(d, d, 0.5 if name == "w_o" else 1) for name in ("w_q", "w_k", "w_v", "w_r", "w_o")}
        p |= {name: np.zeros((HEADS, d // HEADS), np.float32) for name in ("u", "v")}
        return p | {name: np.ones(d, np.float32) for name in norms}

    def layer(**crossing):
        dense = {"norm": np.ones(d, np.float32), "w_in": matrix(d, d_ffw), "w_out": matrix(d_ffw, d, 0.5)}
        return {"attention": block(), **crossing, "ffw": dense}

    def part(layers):
        embedding = rng.standard_normal((len(CHARACTERS), d)).astype(np.float32)
        return {"embedding": embedding, "layers": layers, "norm": np.ones(d, np.float32)}

    decoder = part([layer(cca=block()) if p in cca_layers else layer() for p in range(1, n_layers + 1)])
    encoder = part([layer(cross_attention=block(("norm", "norm_context")))])
    return decoder | {"readout": matrix(d, len(CHARACTERS)), "encoder": encoder}


def adamw(params, grads, moments, step, rate, decay=0.01, b1=0.9, b2=0.98):
    """One step in place, with gradients clipped to a norm of 1. Loshchilov & Hutter 2019."""
    squares = []
    map_trees(lambda g: squares.append(float((g * g).sum())), grads)
    clip = 1 / max(1.0, math.sqrt(sum(squares)))

    def update(p, g, m, v):
        m += (1 - b1) * (g * clip - m)
        v += (1 - b2) * ((g * clip) ** 2 - v)
        p -= rate * (m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + 1e-8) + (decay * p if p.ndim > 1 else 0))

    map_trees(update, params, grads, *moments)


def train(params, texts, database, steps, rng, k=2, batch=32, rate=3e-3):
    moments, begin = [map_trees(np.zeros_like, params) for _ in range(2)], time.perf_counter()
    for step in range(1, steps + 1):
        tokens = texts[rng.integers(len(texts), size=batch)]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits, model_vjp = retro(params, inputs, retrieve(database, inputs, k))
        loss, loss_vjp = cross_entropy(logits, targets)
        schedule = min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        adamw(params, model_vjp(loss_vjp(1.0)), moments, step, rate * schedule)
        if step in (1, steps) or step % 200 == 0:
            print(f"step {step}: {loss:.3f} nats per token, {time.perf_counter() - begin:.0f} s", flush=True)


def sample(params, tokens, length, read=None, temperature=0.0, rng=None):
    """Continue each sequence: (B, n) → (B, length). read: tokens → neighbours of their whole chunks; None: off."""
    prompt = tokens.shape[1]
    for _ in range(length):
        logits = retro(params, tokens, read and read(tokens))[0][:, -1:]
        if temperature:  # With Gumbel noise, the largest logit is a sample of their softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        tokens = np.concatenate([tokens, logits.argmax(axis=-1)], axis=1)
    return tokens[:, prompt:]


def main():
    parser = argparse.ArgumentParser(description="Train a RETRO that answers what only its database knows.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    if settings.steps < 1 or settings.seed < 0:
        parser.error("--steps begins at 1, and --seed at 0")
    rng = np.random.default_rng(settings.seed)
    facts = invent(2200, rng)
    told, asked, params = documents(facts, TOLD, rng, times=2), documents(facts, ASKED, rng), init_params(rng)
    train(params, asked[:-200], build_database(told[:-400]), settings.steps, rng)
    database = build_database(told)  # now with people who are new to the model
    questions, codes = asked[-200:, :M], asked[-200:, M : M + DIGITS]
    own = lambda tokens: retrieve(database, tokens, k=2)  # noqa: E731
    for name, read in {"on": own, "off": None, "of others": lambda t: np.roll(own(t), 1, axis=0)}.items():
        answers = sample(params, questions, DIGITS, read)
        example = "".join(CHARACTERS[token] for token in [*questions[0], *answers[0]])
        print(f"retrieval {name}: {(answers == codes).all(axis=1).mean():.1%} of {len(codes)} right, as {example!r}")


if __name__ == "__main__":
    main()
