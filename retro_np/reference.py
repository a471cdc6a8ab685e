"""The paper's equations as plain loops, one token at a time: slow, in float64, and the ground truth of the tests.

This module shares no code with `nn/` or `kernels/`. Sequences are lists of vectors. Indices count from 0 where the
paper's count from 1; the comments name the paper's quantities."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from retro_np.config import RetroConfig

Tree = Any  # nested dicts and lists of arrays
Vectors = list[np.ndarray]  # one vector per token


@np.errstate(under="ignore")
def retro(params: Tree, config: RetroConfig, tokens: np.ndarray, neighbours: np.ndarray | None = None) -> np.ndarray:
    """Logits by loops. Borgeaud et al. 2022, §2.4, algorithm 1.

    tokens: (B, n), integers. neighbours: (B, floor(n / m), k, r), integers, or None: retrieval off.
    Returns (B, n, V) in float64, whatever the dtype of the parameters. The input is not checked; there is no dropout.
    """
    params, decode_one = _in_float64(params), decode
    if not config.is_retro:
        from retro_np import reference_decoders

        decode_one = partial(reference_decoders.decode, encode=encode_neighbours, cca=chunked_cross_attention)
    retrieved = [None] * len(tokens) if neighbours is None else neighbours
    return np.array([decode_one(params, config, tokens[b], retrieved[b]) for b in range(len(tokens))])


def decode(params: Tree, config: RetroConfig, x: Sequence[int], retrieved: Any) -> Vectors:
    """Algorithm 1 for one sequence x of n tokens; retrieved[u][j] is the value RET(C_u)_j, or retrieved is None."""
    m, layers = config.chunk_size, config.cca_layers if retrieved is not None else ()  # m, P
    h = [params["embedding"][token] for token in x]  # H ← EMB(X)
    for p in range(1, config.n_layers + 1):
        layer = params["layers"][p - 1]
        h = self_attention(layer["attention"], h, config.n_heads, visible=lambda i, j: j <= i)  # H ← ATTN(H)
        if layers and p == min(layers):  # E ← ENCODER(RET, H), conditioned on this H
            encoded = encode_neighbours(params, config, h, retrieved)
        if p in layers:  # H ← CCA(H, E)
            h = chunked_cross_attention(layer["cca"], h, encoded, config.n_heads, m)
        h = [ffw(layer["ffw"], h_t) for h_t in h]  # H ← FFW(H)
    readout = params["embedding"].T if config.tie_readout else params["readout"]
    return [rms_norm(h_t, params["norm"]) @ readout for h_t in h]  # O ← READ(H)


def encode_neighbours(params: Tree, config: RetroConfig, h: Vectors, retrieved: Any) -> Any:
    """For each whole chunk C_u and each of its values: which tokens are real, and what encode_neighbour gives."""
    m, encoded = config.chunk_size, []
    for u in range(len(h) // m):
        chunk = h[u * m : (u + 1) * m]  # H_u
        values = [read_part(value, config) for value in retrieved[u]]
        encoded.append([(is_real(value, config), encode_neighbour(params, config, value, chunk)) for value in values])
    return encoded


def encode_neighbour(params: Tree, config: RetroConfig, value: Sequence[int], chunk: Vectors) -> Vectors:
    """ENCODER(RET(C_u)_j, H_u) for one value of r tokens: a list of r vectors of width d′, after the encoder's norm."""
    encoder: Any = config.encoder
    real = is_real(value, config)
    table = params["embedding"] if config.share_embeddings else params["encoder"]["embedding"]
    e = [table[token] for token in value]  # E ← EMB_enc(RET(C_u)_j)
    for p in range(1, encoder.n_layers + 1):
        layer = params["encoder"]["layers"][p - 1]
        # E ← ATTN_enc(E): bidirectional, with padding masked as a key
        e = self_attention(layer["attention"], e, encoder.n_heads, visible=lambda i, j: real[j])
        if p in encoder.ca_layers:  # E ← CA_enc(E, H_u)
            e = encoder_cross_attention(layer["cross_attention"], e, chunk, encoder.n_heads)
        e = [ffw(layer["ffw"], e_i) for e_i in e]  # E ← FFW_enc(E)
    return [rms_norm(e_i, params["encoder"]["norm"]) for e_i in e]


def self_attention(params: Tree, h: Vectors, n_heads: int, visible: Callable[[int, int], bool]) -> Vectors:
    """ATTN and ATTN_enc: h_i + attention of norm(h_i) to all j that are visible from i. Distance i − j (B.1.2)."""
    normed = [rms_norm(h_i, params["norm"]) for h_i in h]
    updated = []
    for i in range(len(h)):
        keys = [(normed[j], i - j) for j in range(len(h)) if visible(i, j)]
        updated.append(h[i] + attention(params, normed[i], keys, n_heads))
    return updated


def encoder_cross_attention(params: Tree, e: Vectors, chunk: Vectors, n_heads: int) -> Vectors:
    """CA_enc: retrieved token i′ attends to the tokens i of H_u. Distance i′ − i (B.1.2)."""
    context = [rms_norm(h_i, params["norm_context"]) for h_i in chunk]
    updated = []
    for i_retrieved in range(len(e)):
        keys = [(context[i], i_retrieved - i) for i in range(len(chunk))]
        updated.append(e[i_retrieved] + attention(params, rms_norm(e[i_retrieved], params["norm"]), keys, n_heads))
    return updated


def chunked_cross_attention(params: Tree, h: Vectors, encoded: list[Any], n_heads: int, m: int) -> Vectors:
    """CCA (eq. 3): the attending chunk H_u^+ attends to E_u, all k · r tokens under one softmax.

    encoded[u] is a list of (whether each token is real, their encoded vectors). The first m − 1 tokens do not change.
    """
    updated = list(h)
    for u in range(len(encoded)):
        for i in range(m):  # H_u^+: the last token of C_u and the first m − 1 of C_{u+1}
            t = (u + 1) * m - 1 + i
            if t >= len(h):  # the last attending chunk may be cut short
                continue
            keys = []
            for is_real, e in encoded[u]:  # every neighbour has the same positions
                for i_retrieved in range(len(e)):
                    if is_real[i_retrieved]:
                        keys.append((e[i_retrieved], i - i_retrieved + m - 1))  # distance i − i′ + m − 1 (B.1.2)
            updated[t] = h[t] + attention(params, rms_norm(h[t], params["norm"]), keys, n_heads)
    return updated


def attention(params: Tree, query: np.ndarray, keys: list[tuple[np.ndarray, int]], n_heads: int) -> np.ndarray:
    """W_o · Σ_j a_j W_v y_j for one query; keys is a list of (y_j, distance to it). Zero if there is no key.

    a = softmax_j(((q + u) · k_j + (q + v) · W_R R_δ) / √c) in each head (Dai et al. 2019). Without W_R: q · k_j / √c.
    """
    if not keys:
        return np.zeros(params["w_o"].shape[1])
    q = query @ params["w_q"]
    c = len(q) // n_heads
    heads = []
    for head in range(n_heads):
        columns = slice(head * c, (head + 1) * c)
        logits = []
        for y, distance in keys:
            k = y @ params["w_k"][:, columns]
            if "w_r" in params:
                r = position(distance, len(query)) @ params["w_r"][:, columns]
                logit = (q[columns] + params["u"][head]) @ k + (q[columns] + params["v"][head]) @ r
            else:
                logit = q[columns] @ k
            logits.append(logit / math.sqrt(c))
        out = np.zeros(c)
        for a, (y, _) in zip(softmax(logits), keys, strict=True):
            out += a * (y @ params["w_v"][:, columns])
        heads.append(out)
    return np.asarray(np.concatenate(heads) @ params["w_o"])


def position(distance: int, d: int) -> np.ndarray:
    """R_δ: the sines and then the cosines of δ ω_i, with ω_i = 10000^(−2i/d) for i = 0 … d/2 − 1."""
    angles = [distance * 10000 ** (-2 * i / d) for i in range(d // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def ffw(params: Tree, h: np.ndarray) -> np.ndarray:
    """FFW and FFW_enc: h + W_out · gelu(W_in · norm(h))."""
    hidden = rms_norm(h, params["norm"]) @ params["w_in"]
    return np.asarray(h + np.array([gelu(x) for x in hidden]) @ params["w_out"])


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """gain · x / √(mean of x² + 1e-6). Zhang & Sennrich 2019."""
    return np.asarray(gain * x / math.sqrt(sum(x_i**2 for x_i in x) / len(x) + 1e-6))


def gelu(x: float) -> float:
    """x Φ(x) in its tanh form. Hendrycks & Gimpel 2016."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(logits: list[float]) -> list[float]:
    """exp(l_j) / Σ exp(l), with the largest logit subtracted so that nothing overflows."""
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def read_part(value: Sequence[int], config: RetroConfig) -> Sequence[int]:
    """The tokens of a value [N, F] that the encoder reads: both parts, N alone or F alone (table 13)."""
    m = config.chunk_size
    return {"NF": value, "N": value[:m], "F": value[m:]}[config.retrieved_part]


def is_real(value: Sequence[int], config: RetroConfig) -> list[bool]:
    """Whether each token of a value is no padding."""
    return [token not in (config.padding_id, -1) for token in value]


def _in_float64(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        return {name: _in_float64(part) for name, part in tree.items()}
    return [_in_float64(part) for part in tree] if isinstance(tree, list) else np.asarray(tree, np.float64)
