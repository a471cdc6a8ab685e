"""RETRO in PyTorch, written for speed on a CPU, with the same parameters and results as retro_np.

The logits of Transformer-XL positions take one product and a shift by reshaping. They are passed to
scaled_dot_product_attention as its bias. Padding is masked. Dropout and ablations are left out.
"""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy, embedding, gelu, pad, rms_norm, scaled_dot_product_attention


def tensors(tree):
    """The package's tree of arrays as leaves that autograd tracks."""
    if isinstance(tree, dict):
        return {name: tensors(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [tensors(part) for part in tree]
    return torch.tensor(np.asarray(tree), requires_grad=True)


def leaves(tree):
    """All tensors of a tree."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


def loss(params, config, tokens, targets, neighbours):
    """Mean nats per target without padding, as in `retro_np.retro_loss`. tokens, targets, neighbours: long tensors."""
    h = embedding(tokens, params["embedding"])
    encoded = None
    for p, layer in enumerate(params["layers"], start=1):
        h = h + _self_attention(layer["attention"], h, config.n_heads, None)
        if p in config.cca_layers:
            if encoded is None:
                encoded, mask = _encode(params, config, neighbours, h)
            h = h + _cca(layer["cca"], h, encoded, mask, config)
        h = h + _ffw(layer["ffw"], h)
    logits = _norm(h, params["norm"]) @ params["readout"]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)


def _encode(params, config, neighbours, h):
    encoder, (batch, chunks, k, r) = params["encoder"], neighbours.shape
    e = embedding(neighbours.flatten(0, 2), encoder["embedding"])  # (B·l·k, r, d')
    present = (neighbours != 0).flatten(0, 2)
    mask = torch.zeros_like(present, dtype=e.dtype).masked_fill(~present, -math.inf)[:, None, None]
    context = h[:, : chunks * config.chunk_size].unflatten(1, (chunks, config.chunk_size)).flatten(0, 1)
    heads = config.encoder.n_heads
    for p, layer in enumerate(encoder["layers"], start=1):
        e = e + _self_attention(layer["attention"], e, heads, mask)
        if p in config.encoder.ca_layers:
            a = layer["cross_attention"]
            queries = _norm(e, a["norm"]).unflatten(0, (-1, k))
            e = e + _attend(a, queries, _norm(context, a["norm_context"])[:, None], 0, None, heads).flatten(0, 1)
        e = e + _ffw(layer["ffw"], e)
    e = _norm(e, encoder["norm"])
    # CCA sees the k neighbours of a chunk as one row of keys
    return e.unflatten(0, (batch * chunks, k)), mask.reshape(batch * chunks, 1, 1, k * r)


def _cca(a, h, encoded, mask, config):
    m, n = config.chunk_size, h.shape[1]
    covered = len(encoded) // len(h) * m
    shifted = pad(_norm(h, a["norm"])[:, m - 1 :], (0, 0, 0, covered - (n - m + 1)))
    queries = shifted.reshape(len(encoded), 1, m, -1)
    update = _attend(a, queries, encoded, m - 1, mask, config.n_heads)
    return pad(update.reshape(len(h), covered, -1), (0, 0, m - 1, 0))[:, :n]


def _self_attention(a, h, n_heads, mask):
    normed = _norm(h, a["norm"])[:, None]
    return _attend(a, normed, normed, 0, mask, n_heads, causal=mask is None)[:, 0]


def _attend(a, queries, context, offset, mask, n_heads, causal=False):
    """queries (B, g, n, d), context (B, k, r, d_context): distance of query i and key j is i − j + offset."""
    (g, n), (k, r) = queries.shape[1:3], context.shape[1:3]
    q, keys, values = (
        (x @ a[w]).flatten(1, 2).unflatten(-1, (n_heads, -1)).transpose(1, 2)
        for x, w in ((queries, "w_q"), (context, "w_k"), (context, "w_v"))
    )
    rows = sinusoids(n - 1 + offset, n + r - 1, queries.shape[-1]) @ a["w_r"]
    table = rows.unflatten(-1, (n_heads, -1)).permute(1, 2, 0)  # (h, c, T)
    bias = positions_as_bias(q + a["v"][:, None], table, (g, n), (k, r))
    if causal:
        bias = bias + causal_mask(n)
    elif mask is not None:
        bias = bias + mask
    out = scaled_dot_product_attention(q + a["u"][:, None], keys, values, attn_mask=bias)
    return out.transpose(1, 2).flatten(-2).unflatten(1, (g, n)) @ a["w_o"]


def positions_as_bias(q, table, queries, keys):
    """The positions' part of the logits, (B, h, g·n, k·r). q: (B, h, g·n, c), including v; table: (h, c, n + r − 1)."""
    (g, n), (k, r) = queries, keys
    if table.shape[-1] < n + r - 1:  # add the distances that no query sees
        table = pad(table, (0, n + r - 1 - table.shape[-1]))
    by_distance = q @ table / math.sqrt(q.shape[-1])
    # Row i starts at column n − 1 − i: drop n − 1 numbers, and read rows that are one shorter.
    flat = by_distance.unflatten(2, (g, n)).flatten(-2)[..., n - 1 : n - 1 + n * (n + r - 2)]
    bias = flat.unflatten(-1, (n, n + r - 2))[..., :r]
    return bias.unsqueeze(4).expand(-1, -1, -1, -1, k, -1).reshape(*q.shape[:3], k * r)


_constants = {}


def sinusoids(first, count, d):
    """The sinusoids R of `count` falling distances from `first`, computed once."""
    if (first, count, d) not in _constants:
        angles = torch.arange(first, first - count, -1, dtype=torch.float64)[:, None]
        angles = angles * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        _constants[first, count, d] = torch.cat([angles.sin(), angles.cos()], -1).float()
    return _constants[first, count, d]


def causal_mask(n):
    """−∞ above the diagonal, computed once."""
    if n not in _constants:
        _constants[n] = torch.full((n, n), -math.inf).triu(1)
    return _constants[n]


def _ffw(f, h):
    return gelu(_norm(h, f["norm"]) @ f["w_in"], approximate="tanh") @ f["w_out"]


def _norm(x, gain):
    return rms_norm(x, gain.shape, gain, 1e-6)
