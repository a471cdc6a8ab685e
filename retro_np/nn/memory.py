"""A memory for a frozen decoder that others trained: attention that reads neighbours beside the sequence's own tokens.

The decoder itself, causal, encodes each neighbour. In a layer with chunked cross-attention, the keys and values of the
neighbours come from their normed hidden states at that layer's input, by the layer's own matrices, and join the layer's
own keys and values under one softmax. Chunks read as in the paper (§2.4): H_u^+ reads the neighbours of C_u.

Parallel Context Windows (Ratner et al. 2023) is this with untrained weights; CEPE (Yen et al. 2024) trains an encoder.
What is trained here are a gate for each head and low-rank changes (LoRA, Hu et al. 2022) of the queries, keys, values
and outputs of the neighbours. The decoder gets no gradient."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from retro_np.config import RetroConfig
from retro_np.kernels import ignore_underflow
from retro_np.kernels.attention import attention_weights
from retro_np.kernels.rowwise import scatter_add
from retro_np.kernels.threads import blocks
from retro_np.nn.attention import attention_with_lse
from retro_np.nn.cca import attended_sequence, attending_chunks, read_part
from retro_np.nn.decoders import (
    DecoderConfig,
    affine,
    changed,
    decoder_blocks,
    grouped,
    norm,
    placed,
    projected,
    ungrouped,
)
from retro_np.nn.operators import present
from retro_np.nn.scope import Scope
from retro_np.parameters import is_retrieval
from retro_np.tree import Array, Pullback, Tree

TOKENS_PER_PART = 4096  # of neighbours that are encoded together
# Neighbours that are encoded together for the same bits, and of what their tokens are then a multiple. BLAS has other
# kernels for the rest of a matrix than for its blocks, and other threads for other sizes.
SAME_SIZE, SAME_ROWS = 16, 48
FROZEN = Scope(trainable=lambda name: False)


class Neighbours(NamedTuple):
    """Encoded neighbours of a batch of sequences.

    states: by layer with cross-attention, counted from 1, its normed input at each token of U neighbours, (U, r, d).
    mask: (U, r), False at padding. rows: (B, l, k), the neighbours that each chunk retrieved, −1 where one is missing.
    """

    states: dict[int, Array]
    mask: Array
    rows: Array


@dataclass
class StateCache:
    """Neighbours that are encoded already, by their tokens; the ones used last, in at most `limit` bytes.

    They belong to one model: another model needs another cache. same_bits: whether the states of a neighbour have the
    same bits whatever is encoded beside it, and so whatever the cache holds. This takes about a tenth more time."""

    limit: int = 1 << 30
    same_bits: bool = False
    kept: OrderedDict[bytes, dict[int, Array]] = field(default_factory=OrderedDict, repr=False)
    used: int = 0  # bytes of what is kept

    def get(self, tokens: Array) -> dict[int, Array] | None:
        """The states of a neighbour (r,) by layer, (r, d) each; None if they are not kept."""
        key = tokens.tobytes()
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def put(self, tokens: Array, states: dict[int, Array]) -> None:
        """Keep a neighbour's states, and drop those that were not used for the longest time."""
        size = sum(array.nbytes for array in states.values())
        if size > self.limit or tokens.tobytes() in self.kept:
            return
        self.kept[tokens.tobytes()] = {p: array.copy() for p, array in states.items()}
        self.used += size
        while self.used > self.limit:
            _, dropped = self.kept.popitem(last=False)
            self.used -= sum(array.nbytes for array in dropped.values())


def model_neighbours(
    params: Tree, config: RetroConfig, neighbours: Array | None, cache: StateCache | None = None
) -> Any:
    """What a model reads in place of a database's neighbours, (B, l, k, 2m) tokens or None.

    To a decoder that others trained, the ids that a database adds are padding. cache: neighbours that such a decoder
    has encoded already; with one, it encodes the others."""
    if neighbours is None or not isinstance(config, DecoderConfig):
        return neighbours
    absent = -1 if config.padding_id is None else config.padding_id
    neighbours = np.where(neighbours < config.vocabulary_size, neighbours, absent)
    if cache is None or not config.reads_itself or not neighbours.size:
        return neighbours
    return encode_neighbours(params, config, read_part(neighbours, config), cache)


def encode_neighbours(
    params: Tree, config: DecoderConfig, neighbours: Array | Neighbours, cache: StateCache | None = None
) -> Neighbours:
    """Let the decoder read each different neighbour once, after its begin-of-text token, whose key is dropped.

    neighbours: (B, l, k, r), integers, config.padding_id or −1 at padding, which stands at the end. A neighbour that is
    all padding is missing. cache: gives and keeps the states of neighbours that are encoded already."""
    if isinstance(neighbours, Neighbours):
        return neighbours
    flat = neighbours.reshape(-1, neighbours.shape[-1]).astype(np.int64)  # Tokens may be unsigned, and −1 is not.
    real = present(flat, config.padding_id)
    flat, is_there = np.where(real, flat, -1), real.any(axis=1)
    rows = np.full(len(flat), -1)
    values = flat[:1]  # if all are missing, one of them, so that arrays are not empty
    if is_there.any():
        values, inverse = np.unique(flat[is_there], axis=0, return_inverse=True)
        rows[is_there] = inverse.reshape(-1)  # NumPy 2.0.0 gives it another axis.
    known = [None if cache is None else cache.get(value) for value in values]
    unknown = [u for u, states in enumerate(known) if states is None]
    width = (len(values), flat.shape[1], config.d_model)
    states = {p: np.empty(width, params["embedding"].dtype) for p in config.cca_layers}
    for u, kept in enumerate(known):
        for p, array in (kept or {}).items():
            states[p][u] = array
    size = SAME_SIZE if cache is not None and cache.same_bits else 0
    for part in blocks(len(unknown), size or max(1, TOKENS_PER_PART // (1 + flat.shape[1]))):
        _encode(params, config, values, np.array(unknown[part]), states, size)
    if cache is not None:
        for u in unknown:
            cache.put(values[u], {p: array[u] for p, array in states.items()})
    return Neighbours(states, values >= 0, rows.reshape(neighbours.shape[:-1]))


def _encode(
    params: Tree, config: DecoderConfig, values: Array, chosen: Array, states: dict[int, Array], size: int
) -> None:
    """Write the states of the chosen values (U, r). size: encode this number of them; 0: all."""
    tokens, last = np.maximum(values[chosen], 0), max(config.cca_layers)
    if config.begin_id is not None:
        tokens = np.insert(tokens, 0, config.begin_id, axis=1)
    n = tokens.shape[1]
    if size:  # What is behind a token does not change its state.
        rows = max(0, min(-n % SAME_ROWS, config.max_positions - n))
        tokens = np.pad(tokens, ((0, size - len(tokens)), (0, rows)), mode="edge")
    embed, attention, feed_forward, _ = decoder_blocks(config)
    h, _ = embed(params, tokens, FROZEN)
    for p, layer in enumerate(params["layers"][:last], start=1):
        if p in states:
            states[p][chosen] = norm(layer["attention"], h, config.norm_eps)[0][: len(chosen), n - values.shape[1] : n]
        if p < last:
            h, _ = attention(layer["attention"], h, scope=FROZEN)
            h, _ = feed_forward(layer["ffw"], h, scope=FROZEN)


def is_added(name: str) -> bool:
    """Whether a parameter is one that a memory or an adaptation adds to a decoder of others, and trains."""
    return is_retrieval(name) or name.rsplit(".", 1)[-1].startswith(("down_", "up_"))


Reader = Callable[[Array], tuple[Array, Array, Pullback]]


def read_chunks(layer: Tree, neighbours: Neighbours, p: int, n: int, config: DecoderConfig, scope: Scope) -> Reader:
    """How layer p of a sequence of n tokens reads: read(q) -> (out, lse, vjp(dout, dlse) -> (gradients, dq)).

    q, out: (B, n, h, c), queries before positions; lse: (B, n, h), −inf where there is nothing to read."""
    keys, values, keys_vjp = neighbour_keys(layer, neighbours.states[p], config, scope)
    rows, m = neighbours.rows, config.chunk_size
    batch, n_chunks, k = rows.shape
    used = np.maximum(rows, 0).reshape(-1, k)
    mask = neighbours.mask[used] & (rows.reshape(-1, k) >= 0)[..., None]

    def read(q: Array) -> tuple[Array, Array, Pullback]:
        chunks = attending_chunks(q.reshape(batch, n, -1), n_chunks, m).reshape(batch * n_chunks, m, *q.shape[2:])
        out, lse, out_vjp = attend_to_neighbours(chunks, keys[used], values[used], mask, 0, config)
        if scope.watch is not None:
            turned = grouped(placed(chunks, keys.shape[1] + 1, config)[0], config.kv_heads)
            weights = attention_weights(turned, keys[used], key_mask=mask)
            scope.watch(scope.path, weights.reshape(len(used), config.n_heads, 1, m, k, -1))

        def in_sequence(x: Array) -> Array:
            return attended_sequence(x.reshape(batch, n_chunks, m, -1), n).reshape(batch, n, *x.shape[2:])

        def in_chunks(x: Array) -> Array:
            return attending_chunks(x.reshape(batch, n, -1), n_chunks, m).reshape(-1, m, *x.shape[2:])

        def vjp(dout: Array, dlse: Array) -> tuple[Tree, Array]:
            dq, dkeys, dvalues = out_vjp(in_chunks(dout), in_chunks(dlse))

            def gathered(d: Array) -> Array:
                total: Array = scatter_add(d.reshape(used.size, -1), used.reshape(-1), len(keys))
                return total.reshape(keys.shape)

            return keys_vjp(gathered(dkeys), gathered(dvalues)), in_sequence(dq)

        lse_in_sequence = in_sequence(lse)
        lse_in_sequence[:, : m - 1] = -np.inf
        return in_sequence(out), lse_in_sequence, vjp

    return read


def neighbour_keys(layer: Tree, states: Array, config: DecoderConfig, scope: Scope) -> tuple[Array, Array, Pullback]:
    """Keys, at the positions 1 … r, and values of neighbours: the layer's own with their changes.

    states: (U, r, d). Returns keys and values (U, r, h_kv, c), and vjp(dkeys, dvalues) -> gradients of the changes."""
    shape = (*states.shape[:2], config.kv_heads, config.d_head)
    k, k_vjp = changed(affine(layer["attention"], states, "k", FROZEN)[0], layer["cca"], states, "k", scope)
    v, v_vjp = changed(affine(layer["attention"], states, "v", FROZEN)[0], layer["cca"], states, "v", scope)
    keys, place_vjp = placed(k.reshape(shape), 1, config)

    def vjp(dkeys: Array, dvalues: Array) -> Tree:
        (dk,) = place_vjp(dkeys)
        return k_vjp(dk.reshape(k.shape))[0] | v_vjp(dvalues.reshape(v.shape))[0]

    return keys, v.reshape(shape), vjp


def attend_to_neighbours(
    q: Array, keys: Array, values: Array, mask: Array, first: int, config: DecoderConfig
) -> tuple[Array, Array, Pullback]:
    """Attention of queries to neighbours. All keys lie in the past: query i is at position r + 1 + first + i.

    q: (R, m, h, c); keys, values: (R, k, r, h_kv, c); mask: (R, k, r), False at padding.
    Returns out (R, m, h, c), lse (R, m, h), −inf without a key, and vjp(dout, dlse) -> (dq, dkeys, dvalues)."""
    turned, place_vjp = placed(q, keys.shape[2] + 1 + first, config)
    (out, lse), attention_vjp = attention_with_lse(grouped(turned, config.kv_heads), keys, values, key_mask=mask)

    def vjp(dout: Array, dlse: Array) -> tuple[Array, Array, Array]:
        by_head = dlse.reshape(*dlse.shape[:2], config.kv_heads, -1).transpose(0, 2, 3, 1)
        dgrouped, dkeys, dvalues = attention_vjp(grouped(dout, config.kv_heads), np.ascontiguousarray(by_head))
        return place_vjp(ungrouped(dgrouped))[0], dkeys, dvalues

    by_token = lse.transpose(0, 3, 1, 2).reshape(q.shape[:3])
    return ungrouped(out), np.where(np.isposinf(by_token), -np.inf, by_token), vjp


@ignore_underflow
def neighbours_share(own_lse: Array, read_lse: Array, gate: Array) -> Array:
    """λ of `join`, (B, n, h)."""
    with np.errstate(over="ignore"):
        share: Array = 1 / (1 + np.exp(own_lse - read_lse - gate))
    return share


@ignore_underflow
def join(own: Array, own_lse: Array, read: Array, read_lse: Array, gate: Array) -> tuple[Array, Array, Pullback]:
    """One softmax over two sets of keys, from their separate results: own + λ (read − own).

    λ = σ(read_lse − own_lse + gate), for each token and head, is the share of the weights that the neighbours get.
    own, read: (B, n, h, c); own_lse, read_lse: (B, n, h); gate: (h,), added to the neighbours' logits.
    Returns the joint result, λ · read, which is the neighbours' part of it, and
    vjp(djoint, dpart) -> (down, down_lse, dread, dread_lse, dgate)."""
    share = neighbours_share(own_lse, read_lse, gate)
    weight = share[..., None]

    @ignore_underflow
    def vjp(djoint: Array, dpart: Array) -> tuple[Array, ...]:
        dshare = (djoint * (read - own) + dpart * read).sum(axis=-1)
        dlogit = dshare * share * (1 - share)
        return djoint * (1 - weight), -dlogit, weight * (djoint + dpart), dlogit, dlogit.sum(axis=(0, 1))

    return own + weight * (read - own), weight * read, vjp


def chunked_reading(
    layer: Tree, h: Array, neighbours: Neighbours, p: int, config: DecoderConfig, scope: Scope
) -> tuple[Array, Pullback]:
    """`reading_attention` of layer p in which each chunk's tokens read the neighbours of the chunk before."""
    read = read_chunks(layer, neighbours, p, h.shape[1], config, scope.at("cca"))
    return reading_attention(layer, h, read, config, scope)


def reading_attention(
    layer: Tree, h: Array, read: Reader, config: DecoderConfig, scope: Scope, first: int = 0, remember: Any = None
) -> tuple[Array, Pullback]:
    """Residual block: self-attention whose softmax also covers the neighbours that each chunk retrieved.

    layer: a layer's parameters; its attention is frozen, its cca trained. h: (B, n, d), at the positions from `first`
    on. read: from `read_chunks`. scope: that of the layer. remember: as in `decoders.self_attention`.
    Returns (B, n, d) and vjp(dy) -> (gradients of cca, dh)."""
    params, changes, inner = layer["attention"], layer["cca"], scope.at("cca")
    (batch, n, _), heads, c = h.shape, config.kv_heads, config.d_head
    normed, norm_vjp = norm(params, h, config.norm_eps)
    (q, queries, keys, values), project_vjp = projected(params, normed, first, config, FROZEN)
    if remember is not None:
        keys, values = remember(keys, values)
    (out, lse), own_vjp = attention_with_lse(queries, keys, values, causal_offset=first)

    reading_q, change_q_vjp = changed(q, changes, normed, "q", inner)
    found, found_lse, read_vjp = read(reading_q.reshape(batch, n, -1, c))
    own_lse = lse.transpose(0, 3, 1, 2).reshape(batch, n, -1)
    joint, part, join_vjp = join(ungrouped(out), own_lse, found, found_lse, changes["gate"])
    if scope.watch is not None:
        weights = attention_weights(queries, keys, causal_offset=first)
        scope.watch(f"{scope.path}.attention", weights.reshape(batch, config.n_heads, 1, n, 1, -1))
        scope.watch(f"{scope.path}.share", neighbours_share(own_lse, found_lse, changes["gate"]))
    update, o_vjp = affine(params, joint.reshape(batch, n, -1), "o", FROZEN)
    update, change_o_vjp = changed(update, changes, part.reshape(batch, n, -1), "o", inner)
    dropped, drop_vjp = scope.at("attention").drop(update)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        (dupdate,) = drop_vjp(dy)
        _, djoint = o_vjp(dupdate)
        o_grads, dpart = change_o_vjp(dupdate)
        # dpart is 0 without a change of the outputs, and gets the dtype of the others.
        dpart = np.broadcast_to(np.asarray(dpart, dy.dtype), djoint.shape).reshape(found.shape)
        down, down_lse, dfound, dfound_lse, dgate = join_vjp(djoint.reshape(found.shape), dpart)
        read_grads, dreading_q = read_vjp(dfound, dfound_lse)
        dreading_q = dreading_q.reshape(q.shape)
        q_grads, dnormed_change = change_q_vjp(dreading_q)
        by_head = down_lse.reshape(batch, n, heads, -1).transpose(0, 2, 3, 1)
        downs = own_vjp(grouped(down, heads), np.ascontiguousarray(by_head))
        _, dnormed = project_vjp(*downs, dreading_q)
        _, dh = norm_vjp(dnormed + dnormed_change)
        return {"gate": dgate} | q_grads | read_grads | o_grads, dy + dh

    return h + dropped, vjp
