"""Incremental decoding with a key–value cache, for sampling: a new token costs one token's work.

There is no pullback. The blocks are those of `attention.py`, `cca.py` and `encoder.py`, but the keys and values of
earlier tokens come from the cache. A test compares the logits with those of the full forward pass."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.nn.attention import attend_to, position_table, project
from retro_np.nn.cca import read_part
from retro_np.nn.encoder import encode
from retro_np.nn.model import blocks_of, encoder_table, readout
from retro_np.nn.operators import linear, present, rms_norm
from retro_np.nn.scope import ROOT
from retro_np.tree import Array, Tree

CACHE_STEP = 256  # positions by which a cache grows


@dataclass
class Cache:
    """What decoding remembers of one sequence.

    length: tokens so far.
    self_keys: keys and values of self-attention, by layer, (1, 1, capacity, h, c); it grows by CACHE_STEP.
    chunk_activations: H of the current chunk after ATTN of layer min(P), (1, < m, d).
    cca_keys: keys and values of the neighbours that the current positions attend to, by layer, each (1, k, r, h, c).
    key_mask: (1, k, r), False at padding; None: there are no neighbours to attend to.
    tables: by attention, the farthest distance and the projected positions from that distance down."""

    length: int = 0
    self_keys: dict[int, tuple[Array, ...]] = field(default_factory=dict)
    chunk_activations: Array | None = None
    cca_keys: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    key_mask: Array | None = None
    tables: dict[int, tuple[int, Array]] = field(default_factory=dict)


def extend(
    params: Tree, config: RetroConfig, cache: Cache, tokens: Array, neighbours: Array | None, only_last: bool = False
) -> Array:
    """Process the next tokens of one sequence, update the cache, and return the logits (t, V). Algorithm 1, one step.

    tokens: (t,), one of the segments that `segments` gives. neighbours: (k, r), those of the chunk that the first token
    completes, if it completes one; None: retrieval off. only_last: return the logits of the last token alone, (1, V).
    """
    blocks = blocks_of(config)
    h, _ = blocks.embed(params, tokens[None], ROOT, **{} if config.is_retro else {"first": cache.length})
    if config.reads_itself:
        _enter_memory(params, config, cache, neighbours)
    for p, layer in enumerate(params["layers"], start=1):
        remember = partial(_remember, cache, p)
        if p in cache.cca_keys and config.reads_itself:
            h = _read_memory(layer, h, cache, p, config, remember)
            h, _ = blocks.ffw(layer["ffw"], h)
            continue
        if config.is_retro:
            h = h + _self_attention(layer["attention"], h, config.n_heads, cache, p)
        else:
            h, _ = blocks.attention(layer["attention"], h, first=cache.length, remember=remember)
        if p in config.cca_layers and not config.reads_itself:
            if p == min(config.cca_layers):
                _enter_chunk(params, config, cache, h, neighbours)
            if cache.key_mask is not None:
                h = h + _cross_attention(layer["cca"], h, cache, p, config.chunk_size)
        h, _ = blocks.ffw(layer["ffw"], h)
    cache.length += len(tokens)
    normed, _ = blocks.norm(params, h[:, -1:] if only_last else h)
    return linear(normed[0], readout(params, config))[0]


def segments(past: int, count: int, chunk_size: int) -> list[int]:
    """The lengths into which `count` tokens after `past` earlier ones must be cut.

    A chunk's last token starts a new segment, because the chunk retrieves there."""
    lengths = []
    while count:
        room = chunk_size - (past + 1) % chunk_size  # tokens before the next one that must start a segment
        lengths.append(min(count, room))
        past, count = past + lengths[-1], count - lengths[-1]
    return lengths


def _enter_chunk(params: Tree, config: Any, cache: Cache, h: Array, neighbours: Array | None) -> None:
    """Remember H of the current chunk. When the first token of h completes it, encode the chunk's neighbours."""
    m, earlier = config.chunk_size, cache.chunk_activations
    activations = h if earlier is None else np.concatenate([earlier, h], axis=1)
    if (cache.length + 1) % m:  # the chunk is not complete
        cache.chunk_activations = activations
        return
    cache.chunk_activations = activations[:, m:]
    cache.key_mask, cache.cca_keys = None, {}
    if neighbours is not None and read_part(neighbours, config).size:
        tokens = read_part(neighbours, config)[None]
        table = encoder_table(params, config)
        pad = {"padding_id": config.padding_id}
        encoded, _ = encode(params["encoder"], table, tokens, activations[:, :m], config.encoder, **pad)
        cache.key_mask = present(tokens, config.padding_id)
        for p in config.cca_layers:
            cache.cca_keys[p] = _keys_and_values(params["layers"][p - 1]["cca"], encoded, config.n_heads)


def _enter_memory(params: Tree, config: Any, cache: Cache, neighbours: Array | None) -> None:
    """When the next token completes a chunk, encode the chunk's neighbours, which a decoder of others does itself."""
    from retro_np.nn import memory

    if (cache.length + 1) % config.chunk_size:
        return
    cache.key_mask, cache.cca_keys = None, {}
    if neighbours is not None and read_part(neighbours, config).size:
        states, mask, rows = memory.encode_neighbours(params, config, read_part(neighbours, config)[None, None])
        cache.key_mask = (mask[rows] & (rows >= 0)[..., None])[0]
        for p in config.cca_layers:
            keys, values, _ = memory.neighbour_keys(params["layers"][p - 1], states[p], config, memory.FROZEN)
            cache.cca_keys[p] = keys[rows[0]], values[rows[0]]


def _read_memory(layer: Tree, h: Array, cache: Cache, p: int, config: Any, remember: Any) -> Array:
    from retro_np.nn import memory

    first = (cache.length + 1) % config.chunk_size  # index of the first query in its attending chunk
    settings: Any = *cache.cca_keys[p], cache.key_mask, first, config
    return memory.reading_attention(
        layer, h, lambda q: memory.attend_to_neighbours(q, *settings), config, ROOT, cache.length, remember
    )[0]


def _self_attention(weights: Tree, h: Array, n_heads: int, cache: Cache, p: int) -> Array:
    normed, _ = rms_norm(h, weights["norm"])
    keys, values = _remember(cache, p, *_keys_and_values(weights, normed[:, None], n_heads))
    farthest = cache.length + h.shape[1] - 1
    table = _positions(weights, cache, p, farthest, farthest + 1, span=(max(2 * farthest, 127), 0))
    update, _ = attend_to(weights, normed[:, None], keys, values, table, causal_offset=cache.length)
    return update[:, 0]


def _remember(cache: Cache, p: int, *new: Array) -> Any:
    """Add keys and values, (1, 1, t, h, c) each, to layer p's cache, and return those of all tokens so far."""
    start, end = cache.length, cache.length + new[0].shape[2]
    if p not in cache.self_keys or cache.self_keys[p][0].shape[2] < end:
        old, capacity = cache.self_keys.get(p, ()), -(-end // CACHE_STEP) * CACHE_STEP
        cache.self_keys[p] = tuple(np.empty((1, 1, capacity, *array.shape[3:]), array.dtype) for array in new)
        for buffer, array in zip(cache.self_keys[p], old, strict=False):
            buffer[:, :, :start] = array[:, :, :start]
    for buffer, array in zip(cache.self_keys[p], new, strict=True):
        buffer[:, :, start:end] = array
    return tuple(buffer[:, :, :end] for buffer in cache.self_keys[p])


def _cross_attention(weights: Tree, h: Array, cache: Cache, p: int, chunk_size: int) -> Array:
    normed, _ = rms_norm(h, weights["norm"])
    keys, values = cache.cca_keys[p]
    n, r = h.shape[1], keys.shape[2]
    first = (cache.length - (chunk_size - 1)) % chunk_size  # index of the first query in its attending chunk
    farthest = first + n - 1 + chunk_size - 1
    table = _positions(weights, cache, -p, farthest, n + r - 1, span=(2 * chunk_size - 2, chunk_size - r))
    update, _ = attend_to(weights, normed[:, None], keys, values, table, key_mask=cache.key_mask)
    return update[:, 0]


def _keys_and_values(weights: Tree, context: Array, n_heads: int) -> Any:
    return tuple(project(context, weights[w], n_heads)[0] for w in ("w_k", "w_v"))


def _positions(weights: Tree, cache: Cache, name: int, farthest: int, count: int, span: tuple[int, int]) -> Any:
    """The projected positions of `count` distances from `farthest` down.

    They are cut from a cached table, which covers the distances of `span` from its first down to its last."""
    if "w_r" not in weights:
        return None
    if cache.tables.get(name, (-1,))[0] < farthest:
        first, last = span
        cache.tables[name] = first, position_table(weights, first, first - last + 1)[0]
    first, table = cache.tables[name]
    return table[first - farthest :][:count]
