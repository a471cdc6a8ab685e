"""RETRO in PyTorch, for its autograd: vectorised and in float64.

The port uses the package's parameter tree and configuration, and shares no other code with it.
"""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy, gelu


def retro_logits(params, config, tokens, neighbours):
    """(B, n, V) as a NumPy array."""
    return _logits(_tensors(params), config, tokens, neighbours).detach().numpy()


def retro_pullback(params, config, tokens, neighbours, cotangent):
    """The gradient of Σ logits · cotangent: a tree of arrays like params, zero where autograd has no path."""
    tensors = _tensors(params)
    (_logits(tensors, config, tokens, neighbours) * torch.tensor(cotangent)).sum().backward()
    return _gradients(tensors)


def retro_loss(params, config, tokens, targets, neighbours):
    """(mean nats over targets that are not 0, a tree of gradients)."""
    tensors = _tensors(params)
    logits = _logits(tensors, config, tokens, neighbours)
    if not np.any(targets):
        return 0.0, _gradients(tensors)
    loss = cross_entropy(logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten(), ignore_index=0)
    loss.backward()
    return loss.item(), _gradients(tensors)


def _logits(params, config, tokens, neighbours):
    tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
    n, m = tokens.shape[1], config.chunk_size
    causal = torch.ones(n, n).tril().bool()
    h = params["embedding"][tokens]
    encoded = None
    for p, layer in enumerate(params["layers"], start=1):
        h = h + _self_attention(layer["attention"], h, config.n_heads, causal)
        if neighbours is not None and p in config.cca_layers and n >= m:
            if encoded is None:
                values = torch.tensor(np.asarray(neighbours), dtype=torch.long)
                values = {"NF": values, "N": values[..., :m], "F": values[..., m:]}[config.retrieved_part]
                encoded = _encode(params, config, values, h)
            h = h + _chunked_cross_attention(layer["cca"], h, encoded, values != 0, config)
        h = h + _ffw(layer["ffw"], h)
    readout = params["embedding"].T if config.tie_readout else params["readout"]
    return _norm(h, params["norm"]) @ readout


def _encode(params, config, values, h):
    encoder, weights = config.encoder, params["encoder"]
    (chunks, _, r), m = values.shape[1:], config.chunk_size
    e = (params["embedding"] if config.share_embeddings else weights["embedding"])[values]
    conditions = h[:, : chunks * m].unflatten(1, (chunks, m))[:, :, None]  # (B, l, 1, m, d)
    keys = (values != 0)[..., None, :].expand(*values.shape, r)
    distances = torch.arange(r)[:, None] - torch.arange(m)
    for p, layer in enumerate(weights["layers"], start=1):
        e = e + _self_attention(layer["attention"], e, encoder.n_heads, keys)
        if p in encoder.ca_layers:
            a = layer["cross_attention"]
            context = _norm(conditions, a["norm_context"])
            e = e + _attention(a, _norm(e, a["norm"]), context, distances, None, encoder.n_heads)
        e = e + _ffw(layer["ffw"], e)
    return _norm(e, weights["norm"])


def _self_attention(a, h, n_heads, mask):
    n = h.shape[-2]
    normed = _norm(h, a["norm"])
    return _attention(a, normed, normed, torch.arange(n)[:, None] - torch.arange(n), mask, n_heads)


def _chunked_cross_attention(a, h, encoded, present, config):
    # Each position gathers the neighbours of the chunk that it attends to, which needs no shifting and no padding.
    n, m = h.shape[1], config.chunk_size
    k, r = present.shape[2:]
    offset = torch.arange(n - m + 1)  # position − (m − 1)
    chunk, i = offset // m, offset % m
    queries = _norm(h[:, m - 1 :], a["norm"])[:, :, None]
    context = encoded[:, chunk].flatten(2, 3)
    mask = present[:, chunk].flatten(2, 3)[:, :, None]
    distances = (i[:, None] - torch.arange(r) + m - 1).repeat(1, k)[:, None]  # (positions, 1, k · r)
    update = _attention(a, queries, context, distances, mask, config.n_heads)[:, :, 0]
    return torch.cat([torch.zeros_like(h[:, : m - 1]), update], dim=1)


def _attention(a, queries, context, distances, mask, n_heads):
    """queries (…, Q, d), context (…, K, d_context), distances (…, Q, K), mask (…, Q, K) or None → (…, Q, d)."""
    sources = {"w_q": queries, "w_k": context, "w_v": context}
    q, k, v = ((x @ a[name]).unflatten(-1, (n_heads, -1)) for name, x in sources.items())
    c = q.shape[-1]
    if "w_r" in a:
        logits = torch.einsum("...qhc,...khc->...hqk", q + a["u"], k)
        if distances.numel():
            first = int(distances.min())
            rows = _sinusoids(torch.arange(first, int(distances.max()) + 1), queries.shape[-1]) @ a["w_r"]
            gathered = rows.unflatten(-1, (n_heads, -1))[distances - first]
            logits = logits + torch.einsum("...qhc,...qkhc->...hqk", q + a["v"], gathered)
    else:
        logits = torch.einsum("...qhc,...khc->...hqk", q, k)
    logits = logits / math.sqrt(c)
    if mask is None:
        weights = logits.softmax(-1)
    else:
        mask = mask.unsqueeze(-3)
        weights = logits.masked_fill(~mask, -1e30).softmax(-1) * mask  # The product makes a row without keys zero.
    return torch.einsum("...hqk,...khc->...qhc", weights, v).flatten(-2) @ a["w_o"]


def _sinusoids(distances, d):
    angles = distances[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _ffw(f, h):
    return gelu(_norm(h, f["norm"]) @ f["w_in"], approximate="tanh") @ f["w_out"]


def _norm(x, gain):
    return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _tensors(tree):
    if isinstance(tree, dict):
        return {name: _tensors(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_tensors(part) for part in tree]
    return torch.tensor(np.asarray(tree, np.float64), requires_grad=True)


def _gradients(tree):
    if isinstance(tree, dict):
        return {name: _gradients(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_gradients(part) for part in tree]
    return np.zeros(tuple(tree.shape)) if tree.grad is None else tree.grad.numpy()
