"""Decoders that others trained, Llama's family and GPT-2, as plain loops like those of `reference.py`.

A memory of theirs (nn/memory.py) is here as well. This module imports nothing of the project."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Tree = Any  # nested dicts and lists of arrays
Vectors = list[np.ndarray]  # one vector per token


def decode(params: Tree, config: Any, x: Sequence[int], retrieved: Any, encode: Any, cca: Any) -> Vectors:
    """The logits of one sequence x of n tokens, one vector per token. params: in float64; config: a DecoderConfig.

    retrieved[u][j] is the value RET(C_u)_j of a model with a memory or with the paper's cross-attention, or None.
    encode, cca: `encode_neighbours` and `chunked_cross_attention` of reference.py."""
    m, layers = config.chunk_size, config.cca_layers if retrieved is not None else ()
    h = embed(params, config, x)
    for p in range(1, config.n_layers + 1):
        layer = params["layers"][p - 1]
        if p in layers and config.encoder is None:
            read = [[states(params, config, value, p) for value in retrieved[u]] for u in range(len(x) // m)]
            h = reading_attention(layer["attention"], layer["cca"], config, h, read)
        else:
            h = self_attention(layer["attention"], config, h)
        if layers and p == layers[0] and config.encoder is not None:
            encoded = encode(params, config, h, retrieved)
        if p in layers and config.encoder is not None:
            h = cca(layer["cca"], h, encoded, config.n_heads, m)
        h = [feed_forward(layer["ffw"], config, h_t) for h_t in h]
    readout = params["embedding"].T if config.tie_readout else params["readout"]
    return [norm(params, config, h_t) @ readout for h_t in h]


def embed(params: Tree, config: Any, x: Sequence[int]) -> Vectors:
    """The tokens' embeddings, in GPT-2 plus those of their positions."""
    h = [params["embedding"][token] for token in x]
    return [h[t] + params["positions"][t] for t in range(len(h))] if config.architecture == "gpt2" else h


def states(params: Tree, config: Any, value: Sequence[int], p: int) -> list[Any]:
    """What layer p of the decoder itself has at each token of a value [N, F]: its normed input; None at padding.

    The part of the value that is read follows a token that begins a text, if the model has one, whose own state is left
    out."""
    m = config.chunk_size
    value = {"NF": value, "N": value[:m], "F": value[m:]}[config.retrieved_part]
    real = [token not in (config.padding_id, -1) for token in value]
    begin = [] if config.begin_id is None else [config.begin_id]
    h = embed(params, config, [*begin, *(value[j] if real[j] else 0 for j in range(len(value)))])
    for layer in params["layers"][: p - 1]:
        h = self_attention(layer["attention"], config, h)
        h = [feed_forward(layer["ffw"], config, h_t) for h_t in h]
    normed = [norm(params["layers"][p - 1]["attention"], config, h_t) for h_t in h[len(begin) :]]
    return [normed[j] if real[j] else None for j in range(len(value))]


def reading_attention(params: Tree, changes: Tree, config: Any, h: Vectors, read: Any) -> Vectors:
    """Self-attention in which token u m − 1 + i also sees the tokens of read[u][0], read[u][1], …, in one softmax.

    Keys of neighbours are at the positions 1 … r and their query i is at r + 1 + i. The gate of each head is added to
    their logits. What `changes` change are the neighbours' queries, keys and values, and their part of the output."""
    m, c, group = config.chunk_size, config.d_head, config.n_heads // (config.n_kv_heads or config.n_heads)

    def changed(x: np.ndarray, name: str) -> np.ndarray:
        y = affine(params, x, name)
        return np.asarray(y + x @ changes[f"down_{name}"] @ changes[f"up_{name}"] if f"down_{name}" in changes else y)

    normed = [norm(params, config, h_i) for h_i in h]
    q, k, v = ([affine(params, x, name) for x in normed] for name in ("q", "k", "v"))
    updated = []
    for t in range(len(h)):
        u = (t + 1) // m  # the number of whole chunks up to token t; it reads the neighbours of the last of them
        i, values = t + 1 - u * m, read[u - 1] if u else []
        joint, part = [], []
        for a in range(config.n_heads):
            own, shared = slice(a * c, (a + 1) * c), slice(a // group * c, (a // group + 1) * c)
            logits, seen, is_read = [], [], []
            for j in range(t + 1):
                logits.append(turned(q[t][own], t, config) @ turned(k[j][shared], j, config) / math.sqrt(c))
                seen.append(v[j][shared])
                is_read.append(0)
            for value in values:
                query = turned(changed(normed[t], "q")[own], len(value) + 1 + i, config)
                for j in range(len(value)):
                    if value[j] is not None:
                        key = turned(changed(value[j], "k")[shared], 1 + j, config)
                        logits.append(query @ key / math.sqrt(c) + changes["gate"][a])
                        seen.append(changed(value[j], "v")[shared])
                        is_read.append(1)
            weights = softmax(logits)
            joint.append(sum((w * x for w, x in zip(weights, seen, strict=True)), np.zeros(c)))
            part.append(sum((w * x * y for w, x, y in zip(weights, seen, is_read, strict=True)), np.zeros(c)))
        update = affine(params, np.concatenate(joint), "o")
        if "down_o" in changes:
            update = update + np.concatenate(part) @ changes["down_o"] @ changes["up_o"]
        updated.append(h[t] + update)
    return updated


def self_attention(params: Tree, config: Any, h: Vectors) -> Vectors:
    """h_i + W_o · (attention of each head to all j ≤ i). Query head a reads head ⌊a h_kv / h⌋ of keys and values."""
    c, group = config.d_head, config.n_heads // (config.n_kv_heads or config.n_heads)
    normed = [norm(params, config, h_i) for h_i in h]
    q, k, v = ([affine(params, x, name) for x in normed] for name in ("q", "k", "v"))
    updated = []
    for i in range(len(h)):
        heads = []
        for a in range(config.n_heads):
            own, shared = slice(a * c, (a + 1) * c), slice(a // group * c, (a // group + 1) * c)
            query = turned(q[i][own], i, config)
            logits = [query @ turned(k[j][shared], j, config) / math.sqrt(c) for j in range(i + 1)]
            weights = softmax(logits)
            heads.append(sum((weights[j] * v[j][shared] for j in range(i + 1)), np.zeros(c)))
        updated.append(h[i] + affine(params, np.concatenate(heads), "o"))
    return updated


def turned(x: np.ndarray, t: int, config: Any) -> np.ndarray:
    """Llama: the pair (x_i, x_{i + c/2}) as a complex number, times exp(√−1 · t · θ^(−2i/c)). Su et al. 2021."""
    if config.architecture == "gpt2":
        return x
    half = len(x) // 2
    pairs = []
    for i in range(half):
        angle = t * config.rotary_base ** (-2 * i / len(x))
        pairs.append(complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle)))
    return np.array([pair.real for pair in pairs] + [pair.imag for pair in pairs])


def feed_forward(params: Tree, config: Any, h: np.ndarray) -> np.ndarray:
    """Llama: h + W_out (silu(W_gate x) · W_in x), silu(z) = z / (1 + e^−z). GPT-2: h + W_out gelu(W_in x)."""
    x = norm(params, config, h)
    hidden = affine(params, x, "in")
    if config.architecture == "gpt2":
        active = [gelu(z) for z in hidden]
    else:
        gate = affine(params, x, "gate")
        active = [gate[i] / (1 + math.exp(-gate[i])) * hidden[i] for i in range(len(hidden))]
    return np.asarray(h + affine(params, np.array(active), "out"))


def norm(params: Tree, config: Any, x: np.ndarray) -> np.ndarray:
    """Llama: gain · x / √(mean of x² + ε). GPT-2: gain · (x − mean) / √(variance + ε) + bias."""
    if config.architecture == "llama":
        return np.asarray(params["norm"] * x / math.sqrt(sum(z**2 for z in x) / len(x) + config.norm_eps))
    mean = sum(x) / len(x)
    variance = sum((z - mean) ** 2 for z in x) / len(x)
    return np.asarray(params["norm"] * (x - mean) / math.sqrt(variance + config.norm_eps) + params["norm_bias"])


def affine(params: Tree, x: np.ndarray, name: str) -> np.ndarray:
    """x W + b + x D U; without a bias or a change of low rank, x W and what there is."""
    y = x @ params[f"w_{name}"]
    y = y + params[f"b_{name}"] if f"b_{name}" in params else y
    return np.asarray(y + x @ params[f"down_{name}"] @ params[f"up_{name}"] if f"down_{name}" in params else y)


def gelu(x: float) -> float:
    """x Φ(x) in its tanh form. Hendrycks & Gimpel 2016."""
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(logits: list[float]) -> list[float]:
    """exp(l_j) / Σ exp(l), with the largest logit subtracted so that nothing overflows."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]
