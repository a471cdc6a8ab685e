"""The forward pass a few tokens at a time: what has been computed is kept, so that a new token costs one token.

No pullback here: this is for sampling. The blocks are those of `attention.py`, `cca.py` and `encoder.py`, with keys
and values of earlier tokens taken from a cache; a test holds the logits to the full forward's.
"""

from dataclasses import dataclass, field

import numpy as np

from retro_np.config import RetroConfig
from retro_np.kernels.attention import attention_forward
from retro_np.nn.encoder import encode
from retro_np.nn.ffw import ffw
from retro_np.nn.model import read_part
from retro_np.nn.operators import rms_norm
from retro_np.nn.positions import sinusoids


@dataclass
class Cache:
    """What one sequence has left behind so far."""

    length: int = 0  # tokens seen
    self_keys: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # layer → keys, values
    chunk_activations: np.ndarray | None = None  # H of the current chunk after ATTN of layer min(P): (1, ≤ m, d)
    cca_keys: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # of the chunk attended to now
    key_mask: np.ndarray | None = None  # (1, k, r); None: nothing to attend to
    tables: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)  # attention → farthest, projected positions


def extend(params, config: RetroConfig, cache: Cache, tokens: np.ndarray, neighbours: np.ndarray | None) -> np.ndarray:
    """Take in the next tokens of one sequence; return their logits, (t, V). The cache is changed.

    tokens: (t,), a segment (see `segments`). neighbours: (k, r) for the
    chunk that the first of them ends, if it ends one; None: retrieval off. Algorithm 1, one step.
    """
    h = params["embedding"][tokens][None]
    for p, layer in enumerate(params["layers"], start=1):
        h = h + _self_attention(layer["attention"], h, config.n_heads, cache, p)
        if p in config.cca_layers:
            if p == min(config.cca_layers):
                _enter_chunk(params, config, cache, h, neighbours)
            if cache.key_mask is not None:
                h = h + _cross_attention(layer["cca"], h, config.n_heads, cache, p, config.chunk_size)
        h, _ = ffw(layer["ffw"], h)
    cache.length += len(tokens)
    normed, _ = rms_norm(h, params["norm"])
    readout = params["embedding"].T if config.tie_readout else params["readout"]
    return normed[0] @ readout


def segments(past: int, count: int, chunk_size: int) -> list[int]:
    """Lengths into which `count` tokens after `past` ones must be cut: a chunk's last token opens a new one."""
    lengths = []
    while count:
        until = chunk_size - (past + 1) % chunk_size  # tokens before the next last token of a chunk
        lengths.append(min(count, until))
        past, count = past + lengths[-1], count - lengths[-1]
    return lengths


def _enter_chunk(params, config, cache, h, neighbours):
    """Keep H of the current chunk; once its last token has come, encode its neighbours and attend to them from then."""
    m = config.chunk_size
    first = h[:, :1]
    if (cache.length + 1) % m == 0:  # h begins with the last token of a chunk
        chunk = first if cache.chunk_activations is None else np.concatenate([cache.chunk_activations, first], axis=1)
        cache.chunk_activations = h[:, 1:]
        cache.key_mask, cache.cca_keys = None, {}
        if neighbours is not None and read_part(neighbours, config).size:
            _encode_for_cca(params, config, cache, read_part(neighbours, config), chunk)
    else:
        kept = cache.chunk_activations
        cache.chunk_activations = h if kept is None else np.concatenate([kept, h], axis=1)


def _encode_for_cca(params, config, cache, neighbours, chunk):
    table = params["embedding"] if config.share_embeddings else params["encoder"]["embedding"]
    encoded, _ = encode(params["encoder"], table, neighbours[None], chunk, config.encoder)
    cache.key_mask = (neighbours != 0)[None]
    for p in config.cca_layers:
        weights = params["layers"][p - 1]["cca"]
        cache.cca_keys[p] = tuple(_heads(encoded @ weights[w], config.n_heads) for w in ("w_k", "w_v"))


def _self_attention(weights, h, n_heads, cache, p):
    normed, _ = rms_norm(h, weights["norm"])
    new = tuple(_heads(normed[:, None] @ weights[w], n_heads) for w in ("w_k", "w_v"))
    if p in cache.self_keys:
        new = tuple(np.concatenate(pair, axis=2) for pair in zip(cache.self_keys[p], new, strict=True))
    cache.self_keys[p] = new
    farthest = cache.length + h.shape[1] - 1
    table = _positions(weights, cache, p, farthest, farthest + 1, span=(max(2 * farthest, 127), 0))
    return _attend(weights, normed, *new, table, n_heads, causal_offset=cache.length)


def _cross_attention(weights, h, n_heads, cache, p, chunk_size):
    normed, _ = rms_norm(h, weights["norm"])
    keys, values = cache.cca_keys[p]
    n, r = h.shape[1], keys.shape[2]
    place = (cache.length - (chunk_size - 1)) % chunk_size  # of the first query in the attending chunk
    farthest = place + n - 1 + chunk_size - 1
    table = _positions(weights, cache, -p, farthest, n + r - 1, span=(2 * chunk_size - 2, chunk_size - r))
    return _attend(weights, normed, keys, values, table, n_heads, key_mask=cache.key_mask)


def _positions(weights, cache, name, farthest, count, span):
    """Projected positions of `count` distances from `farthest` down, cut from a table that is made once for a span."""
    if "w_r" not in weights:
        return None
    first, table = cache.tables.get(name, (-1, None))
    if first < farthest:
        first, last = span
        rows = sinusoids(first, first - last + 1, weights["w_r"].shape[0], weights["w_r"].dtype.name)
        table = (rows @ weights["w_r"]).reshape(-1, *weights["u"].shape)
        cache.tables[name] = first, table
    return table[first - farthest :][:count]


def _attend(weights, normed, keys, values, table, n_heads, **masks):
    q = _heads(normed[:, None] @ weights["w_q"], n_heads)
    out, _ = attention_forward(q, keys, values, table, weights.get("u"), weights.get("v"), **masks)
    return out.reshape(1, normed.shape[1], -1) @ weights["w_o"]


def _heads(x, n_heads):
    return x.reshape(*x.shape[:-1], n_heads, -1)
