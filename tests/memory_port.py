"""A decoder of others that reads neighbours, in PyTorch and float64, for its autograd: one sequence at a time.

Llama's and GPT-2's blocks, a memory as one softmax over all keys of a sequence, and the paper's form with the encoder
and the cross-attention of torch_port.py. The port uses the package's parameter tree and configuration, and no other
code of the package."""

import math

import numpy as np
import torch
import torch_port
from torch.nn.functional import cross_entropy, gelu, layer_norm, rms_norm, silu

from retro_np.tree import named_leaves


def memory_logits(params, config, tokens, neighbours):
    """(B, n, V) as a NumPy array."""
    return _logits(torch_port._tensors(params), config, tokens, neighbours).detach().numpy()


def memory_loss(params, config, tokens, targets, neighbours):
    """(mean nats over the targets that count, {name of a parameter: its gradient}).

    The states of neighbours, which a memory reads, are constants, as they are where their encoder is frozen."""
    tensors = torch_port._tensors(params)
    wanted = torch.tensor(np.where(targets == config.padding_id, -1, targets)).flatten()
    logits = _logits(tensors, config, tokens, neighbours).flatten(0, 1)
    loss = cross_entropy(logits, wanted, ignore_index=-1)
    loss.backward()
    return loss.item(), dict(named_leaves(torch_port._gradients(tensors)))


def _logits(w, config, tokens, neighbours):
    retrieved = [None] * len(tokens) if neighbours is None else neighbours
    return torch.stack([_row(w, config, row, values) for row, values in zip(tokens, retrieved, strict=True)])


def _row(w, config, row, values):
    """(n, V). values: (l, k, r) of one sequence, or None."""
    m = config.chunk_size
    if values is not None:
        values = {"NF": values, "N": values[..., :m], "F": values[..., m:]}[config.retrieved_part]
        values = torch.tensor(np.where(values == config.padding_id, -1, values))
    layers = config.cca_layers if values is not None and values.numel() else ()
    h, encoded = _embedded(w, torch.tensor(row)), None
    for p, layer in enumerate(w["layers"], start=1):
        reads_itself = p in layers and config.encoder is None
        read = (layer["cca"], *_states(w, config, values, p), values.shape[-1]) if reads_itself else None
        h = h + _attention(layer["attention"], config, h, read)
        if p in layers and config.encoder is not None:
            real = values >= 0
            if encoded is None:
                encoded = _encoded(w, config, values, h)
            h = h + torch_port._chunked_cross_attention(layer["cca"], h[None], encoded, real[None], config)[0]
        h = h + _ffw(layer["ffw"], config, h)
    return _norm(w, config, h) @ (w["embedding"].T if config.tie_readout else w["readout"])


def _encoded(w, config, values, h):
    """The paper's encoder. That of torch_port.py takes 0 as padding, so each token gets the next id, and a new row."""
    shifted = dict(w if config.share_embeddings else w["encoder"])
    shifted["embedding"] = torch.cat([torch.zeros_like(shifted["embedding"][:1]), shifted["embedding"]])
    weights = {**w, **shifted} if config.share_embeddings else {**w, "encoder": shifted}
    # The values are cut to the part that is read, so the encoder must not cut them again.
    return torch_port._encode(weights, _Whole(config), (values + 1)[None], h[None])


class _Whole:
    """A configuration whose encoder reads its values whole."""

    retrieved_part = "NF"

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name):
        return getattr(self._config, name)


def _states(w, config, values, p):
    """Of all real tokens of a row's values: what layer p has there (K, d), their chunks (K,) and positions (K,)."""
    states, chunks, positions = [], [], []
    begin = [] if config.begin_id is None else [config.begin_id]
    with torch.no_grad():
        for u, of_chunk in enumerate(values.tolist()):
            for value in of_chunk:
                real = [token for token in value if token >= 0]  # Padding stands at the end.
                if real:
                    h = _embedded(w, torch.tensor(begin + real))
                    for layer in w["layers"][: p - 1]:
                        h = h + _attention(layer["attention"], config, h, None)
                        h = h + _ffw(layer["ffw"], config, h)
                    states.append(_norm(w["layers"][p - 1]["attention"], config, h)[len(begin) :])
                    chunks += [u] * len(real)
                    positions += range(1, len(real) + 1)
        width = w["embedding"].shape[1]
        stacked = torch.cat([torch.zeros(0, width, dtype=torch.float64), *states])
    return stacked, torch.tensor(chunks), torch.tensor(positions)


def _attention(a, config, h, read):
    """The update of self-attention; with `read`, one softmax over the own keys and those of the row's neighbours."""
    n, c, m = len(h), config.d_head, config.chunk_size
    x, at = _norm(a, config, h), torch.arange(n)
    q, k, v = (_heads(_affine(a, x, name), config) for name in "qkv")
    logits = _turned(q, at, config) @ _turned(k, at, config).mT / math.sqrt(c)
    logits = logits.masked_fill(at[:, None] < at, -torch.inf)
    if read is None:
        return _affine(a, _merged(logits.softmax(-1) @ v), "o")
    changes, states, chunks, positions, r = read
    q2 = _turned(_heads(_affine(a, x, "q") + _change(changes, x, "q"), config), r + 1 + (at + 1) % m, config)
    k2, v2 = (_heads(_affine(a, states, name) + _change(changes, states, name), config) for name in "kv")
    cross = q2 @ _turned(k2, positions, config).mT / math.sqrt(c) + changes["gate"][:, None, None]
    cross = cross.masked_fill(((at + 1) // m - 1)[:, None] != chunks, -torch.inf)
    weights = torch.cat([logits, cross], -1).softmax(-1)
    part = _merged(weights[..., n:] @ v2)
    return _affine(a, _merged(weights[..., :n] @ v) + part, "o") + _change(changes, part, "o")


def _heads(x, config):
    """(T, h·c) or (T, h_kv·c) → (h, T, c), heads of keys and values repeated."""
    split = x.unflatten(-1, (-1, config.d_head)).transpose(0, 1)
    return split.repeat_interleave(config.n_heads // len(split), 0)


def _merged(x):
    return x.transpose(0, 1).flatten(1)


def _turned(x, positions, config):
    if config.architecture == "gpt2":
        return x
    c = x.shape[-1]
    angles = positions[:, None] * config.rotary_base ** (-torch.arange(0, c, 2, dtype=torch.float64) / c)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _ffw(f, config, h):
    x = _norm(f, config, h)
    hidden = _affine(f, x, "in")
    active = silu(_affine(f, x, "gate")) * hidden if "w_gate" in f else gelu(hidden, approximate="tanh")
    return _affine(f, active, "out")


def _norm(w, config, x):
    d = x.shape[-1:]
    if config.architecture == "gpt2":
        return layer_norm(x, d, w["norm"], w["norm_bias"], config.norm_eps)
    return rms_norm(x, d, w["norm"], config.norm_eps)


def _affine(w, x, name):
    y = x @ w[f"w_{name}"] + _change(w, x, name)
    return y + w[f"b_{name}"] if f"b_{name}" in w else y


def _change(w, x, name):
    return x @ w[f"down_{name}"] @ w[f"up_{name}"] if f"down_{name}" in w else 0


def _embedded(w, tokens):
    h = w["embedding"][tokens]
    return h + w["positions"][: len(tokens)] if "positions" in w else h
