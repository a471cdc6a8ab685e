"""Decoders that others trained, Llama's family and GPT-2, as plain loops like those of `reference.py`.

This module imports nothing of the project."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Tree = Any  # nested dicts and lists of arrays
Vectors = list[np.ndarray]  # one vector per token


def decode(params: Tree, config: Any, x: Sequence[int]) -> Vectors:
    """The logits of one sequence x of n tokens, one vector per token. params: in float64; config: a DecoderConfig."""
    h = [params["embedding"][token] for token in x]
    if config.architecture == "gpt2":
        h = [h[t] + params["positions"][t] for t in range(len(h))]
    for layer in params["layers"]:
        h = self_attention(layer["attention"], config, h)
        h = [feed_forward(layer["ffw"], config, h_t) for h_t in h]
    readout = params["embedding"].T if config.tie_readout else params["readout"]
    return [norm(params, config, h_t) @ readout for h_t in h]


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
    """x W + b; without a bias x W."""
    y = x @ params[f"w_{name}"]
    return np.asarray(y + params[f"b_{name}"] if f"b_{name}" in params else y)


def gelu(x: float) -> float:
    """x Φ(x) in its tanh form. Hendrycks & Gimpel 2016."""
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(logits: list[float]) -> list[float]:
    """exp(l_j) / Σ exp(l), with the largest logit subtracted so that nothing overflows."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]
