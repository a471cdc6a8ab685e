"""Decoders that others trained: the blocks of Llama and GPT-2, forward and backward.

They stand in the decoder loop of `model.py` in place of the paper's blocks. Llama's family (Touvron et al. 2023: Llama,
SmolLM2, TinyLlama; with biases Qwen2) has RMSNorm, rotary positions, key–value heads that each serve a group of query
heads, and SwiGLU. GPT-2 (Radford et al. 2019) has LayerNorm, learned positions, a bias beside each matrix, and GELU. A
part that only some models have is run if its parameters are in the tree."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from numbers import Integral, Real
from typing import Any

import numpy as np

from retro_np.config import RetroConfig, check_numbers, shown
from retro_np.errors import UserError
from retro_np.kernels.attention import attention_weights
from retro_np.kernels.decoders import norm_backward, norm_forward, swiglu_backward, swiglu_forward
from retro_np.kernels.decoders import rotary as turn
from retro_np.nn.attention import relative_attention
from retro_np.nn.operators import embedding, gelu, linear
from retro_np.nn.scope import ROOT, Blocks, Scope
from retro_np.tree import Array, Pullback, Tree, named_leaves

ARCHITECTURES_OF_DECODERS = ("llama", "gpt2")
MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_in", "w_out")


@dataclass(frozen=True)
class DecoderConfig(RetroConfig):
    """A decoder that others trained. `retro`, `retro_loss`, `generate` and the others take it like a RetroConfig.

    The fields of RetroConfig keep their meaning. Raises UserError (a ValueError) for values that no such model can
    have.

    architecture: "llama" or "gpt2".
    n_kv_heads: heads of keys and values, a divisor of n_heads; None: n_heads. Ainslie et al. 2023.
    norm_eps: the ε of the norms.
    rotary_base: θ of Llama's rotary positions.
    max_positions: the longest sequence, in tokens.
    biases: the matrices with a bias beside them, some of w_q, w_k, w_v, w_o, w_gate, w_in and w_out.
    cca_layers: layers that read neighbours. Without an encoder the decoder encodes them itself (nn/memory.py), and only
        the memory is trained; with one, they have the paper's chunked cross-attention.
    adapted_layers: layers whose own attention has trained changes of low rank.
    rank: of these changes, and of those of a memory; None: without them a memory trains its gates alone.
    changed: the matrices that they change, some of w_q, w_k, w_v and w_o.
    begin_id: the token that begins a neighbour where the decoder encodes it; None: neighbours begin without one.
    padding_id: None, since most of these tokenizers have no padding."""

    architecture: str = "llama"
    n_kv_heads: int | None = None
    norm_eps: float = 1e-5
    rotary_base: float = 10_000.0
    max_positions: int = 2048
    biases: tuple[str, ...] = ()
    padding_id: int | None = None
    adapted_layers: tuple[int, ...] = ()
    rank: int | None = None
    changed: tuple[str, ...] = MATRICES[:4]
    begin_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES_OF_DECODERS:
            raise UserError(f"architecture must be llama or gpt2, not {self.architecture!r:.40}")
        groups: Any = self.kv_heads
        is_count = isinstance(groups, Integral) and not isinstance(groups, bool)
        if not is_count or not 1 <= groups <= self.n_heads or self.n_heads % groups:
            raise UserError(f"n_kv_heads must divide n_heads ({self.n_heads}), not {shown(groups)}")
        if self.n_kv_heads is not None:
            object.__setattr__(self, "n_kv_heads", int(groups))  # JSON cannot store NumPy's numbers.
        for name, least, largest in (("norm_eps", 1e-30, 1), ("rotary_base", 1, 1e30)):
            value: Any = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number or not least <= value <= largest:
                raise UserError(f"{name} must be a number from {least:g} to {largest:g}, not {value!r:.40}")
            object.__setattr__(self, name, float(value))
        if self.architecture == "llama" and self.d_head % 2:
            raise UserError(f"d_head must be even, since rotary positions turn pairs of numbers, not {self.d_head}")
        matrices = [name for name in MATRICES if name != "w_gate" or self.architecture == "llama"]
        if not isinstance(self.biases, list | tuple) or not all(name in matrices for name in self.biases):
            raise UserError(f"biases must be some of {', '.join(matrices)}, not {self.biases!r:.80}")
        object.__setattr__(self, "biases", tuple(name for name in matrices if name in self.biases))
        check_numbers(self, "", "adapted_layers")
        if not isinstance(self.changed, list | tuple) or not all(name in MATRICES[:4] for name in self.changed):
            raise UserError(f"changed must be some of {', '.join(MATRICES[:4])}, not {self.changed!r:.80}")
        object.__setattr__(self, "changed", tuple(name for name in MATRICES[:4] if name in self.changed))
        for name, least, largest in (("rank", 1, self.d_model), ("begin_id", 0, self.vocabulary_size - 1)):
            value = getattr(self, name)
            is_count = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and not (is_count and least <= value <= largest):
                raise UserError(f"{name} must be a whole number from {least} to {largest}, not {shown(value)}")
            object.__setattr__(self, name, None if value is None else int(value))
        if self.adapted_layers and self.rank is None:
            raise UserError("adapted_layers need a rank: give one, such as 16")

    @property
    def reads_itself(self) -> bool:  # type: ignore[override]
        """Whether the decoder encodes the neighbours itself, and one softmax covers them and its own tokens."""
        return bool(self.cca_layers) and self.encoder is None

    @property
    def kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


def decoder_shapes(config: DecoderConfig, paper_shapes: Callable[[RetroConfig], Tree]) -> Tree:
    """The parameter tree with a shape at each leaf. Matrices are (d_in, d_out), and heads are blocks of columns.

    paper_shapes: `parameter_shapes`, for what a decoder has in the paper's form."""
    d, f, is_llama = config.d_model, config.d_ffw, config.architecture == "llama"
    inner, groups = config.n_heads * config.d_head, config.kv_heads * config.d_head
    norm = {"norm": (d,)} if is_llama else {"norm": (d,), "norm_bias": (d,)}

    def block(**matrices: tuple[int, int]) -> Tree:
        biases = {f"b{name[1:]}": shape[1:] for name, shape in matrices.items() if name in config.biases}
        return norm | matrices | biases

    matrices = {"w_q": (d, inner), "w_k": (d, groups), "w_v": (d, groups), "w_o": (inner, d)}
    changes: Tree = {}
    for name in config.changed if config.rank else ():
        changes |= {f"down_{name[2:]}": (matrices[name][0], config.rank)}
        changes |= {f"up_{name[2:]}": (config.rank, matrices[name][1])}
    added: dict[int, Tree] = {p: {"cca": {"gate": (config.n_heads,)} | changes} for p in config.cca_layers}
    tree: Tree = {"embedding": (config.vocabulary_size, d), **norm}
    if config.encoder is not None and config.cca_layers:  # the paper's form
        paper = RetroConfig(**{field.name: getattr(config, field.name) for field in fields(RetroConfig)})
        shapes = paper_shapes(paper)
        added = {p: {"cca": shapes["layers"][p - 1]["cca"]} for p in config.cca_layers}
        tree["encoder"] = shapes["encoder"]
    gate = {"w_gate": (d, f)} if is_llama else {}
    own, feed_forward = block(**matrices), block(**gate, w_in=(d, f), w_out=(f, d))
    tree["layers"] = [
        {"attention": own | (changes if p in config.adapted_layers else {}), **added.get(p, {}), "ffw": feed_forward}
        for p in range(1, config.n_layers + 1)
    ]
    tree |= {} if is_llama else {"positions": (config.max_positions, d)}
    return tree | ({} if config.tie_readout else {"readout": (d, config.vocabulary_size)})


def first_trained(params: Tree, config: DecoderConfig, scope: Scope) -> int:
    """The first layer with a trained parameter, counted from 1; 0 if one below trains."""
    parts = [name.split(".") for name, _ in named_leaves(params) if scope.trainable(name)]
    layers = {"embedding": 0, "positions": 0, "encoder": min(config.cca_layers, default=0)}
    numbers = (int(part[1]) + 1 if part[0] == "layers" else layers.get(part[0]) for part in parts)
    return min((p for p in numbers if p is not None), default=config.n_layers + 1)


def decoder_blocks(config: DecoderConfig) -> Blocks:
    """The four functions of which the decoder consists."""
    attention, feed_forward = partial(self_attention, config=config), partial(ffw, config=config)
    return Blocks(partial(embed, config=config), attention, feed_forward, partial(norm, eps=config.norm_eps))


def embed(params: Tree, tokens: Array, scope: Scope, config: DecoderConfig, first: int = 0) -> tuple[Array, Pullback]:
    """The tokens' embeddings and, in GPT-2, those of their positions, which count from `first`.

    tokens: (B, n). Returns (B, n, d) and vjp(dy) -> gradients. Raises UserError beyond the model's positions."""
    last = first + tokens.shape[1]
    if last > config.max_positions:
        raise UserError(f"the model has {config.max_positions} positions, not {last}: give it a shorter text")
    h, embedding_vjp = embedding(params["embedding"], tokens, scope.trains("embedding"))
    learned = "positions" in params
    dropped, drop_vjp = scope.at("embedding").drop(h + params["positions"][first:last] if learned else h)

    def vjp(dy: Array) -> Tree:
        (dh,) = drop_vjp(dy)
        grads = {"embedding": embedding_vjp(dh)[0]}
        if learned and scope.trains("positions"):
            grads["positions"] = np.zeros_like(params["positions"])
            grads["positions"][first:last] = dh.sum(axis=0)
        return grads

    return dropped, vjp


def self_attention(
    params: Tree, h: Array, config: DecoderConfig, scope: Scope = ROOT, first: int = 0,
    remember: Callable[[Array, Array], tuple[Array, Array]] | None = None,
) -> tuple[Array, Pullback]:  # fmt: skip
    """Residual block h + W_o · attention(norm(h)), causal; each head of keys and values serves a group of query heads.

    h: (B, n, d), at the positions from `first` on. remember: for decoding with a cache; takes keys and values,
    (B, 1, n, n_kv_heads, c), and returns those of all positions, (B, 1, first + n, n_kv_heads, c).
    Returns (B, n, d) and vjp(dy) -> (gradients of params, dh). Vaswani et al. 2017; Ainslie et al. 2023."""
    (batch, n, _), heads = h.shape, config.kv_heads
    normed, norm_vjp = norm(params, h, config.norm_eps)
    (_, queries, keys, values), project_vjp = projected(params, normed, first, config, scope)
    if remember is not None:
        keys, values = remember(keys, values)
    out, attention_vjp = relative_attention(queries, keys, values, causal_offset=first)
    if scope.watch is not None:
        weights = attention_weights(queries, keys, causal_offset=first)
        scope.watch(scope.path, weights.reshape(batch, config.n_heads, 1, n, 1, -1))
    update, o_vjp = affine(params, ungrouped(out).reshape(batch, n, -1), "o", scope)
    dropped, drop_vjp = scope.drop(update)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        grads, dout = o_vjp(*drop_vjp(dy))
        dheads = dout.reshape(batch, n, -1, config.d_head)
        project_grads, dnormed = project_vjp(*attention_vjp(grouped(dheads, heads)))
        norm_grads, dh = norm_vjp(dnormed)
        return grads | project_grads | norm_grads, dy + dh

    return h + dropped, vjp


def projected(
    params: Tree, normed: Array, first: int, config: DecoderConfig, scope: Scope
) -> tuple[tuple[Array, Array, Array, Array], Pullback]:
    """Queries, keys and values of tokens at the positions from `first` on.

    normed: (B, n, d). Returns (q, queries, keys, values): q (B, n, h·c) before positions, queries (B, g, n, h_kv, c),
    keys and values (B, 1, n, h_kv, c); and vjp(dqueries, dkeys, dvalues, dq=None) -> (gradients of params, dnormed),
    where dq is the gradient of other uses of q."""
    (batch, n, _), heads, c = normed.shape, config.kv_heads, config.d_head
    q, q_vjp = affine(params, normed, "q", scope)
    k, k_vjp = affine(params, normed, "k", scope)
    v, v_vjp = affine(params, normed, "v", scope)
    queries, place_q_vjp = placed(q.reshape(batch, n, -1, c), first, config)
    keys, place_k_vjp = placed(k.reshape(batch, n, heads, c), first, config)

    def vjp(dqueries: Array, dkeys: Array, dvalues: Array, dq: Array | None = None) -> tuple[Tree, Array]:
        (dplaced_q,), (dk,) = place_q_vjp(ungrouped(dqueries)), place_k_vjp(dkeys[:, 0])
        own_dq = dplaced_q.reshape(q.shape)
        q_grads, dnormed_q = q_vjp(own_dq if dq is None else own_dq + dq)
        k_grads, dnormed_k = k_vjp(dk.reshape(k.shape))
        v_grads, dnormed_v = v_vjp(dvalues.reshape(v.shape))
        return q_grads | k_grads | v_grads, dnormed_q + dnormed_k + dnormed_v

    return (q, grouped(queries, heads), keys[:, None], v.reshape(batch, 1, n, heads, c)), vjp


def ffw(params: Tree, h: Array, config: DecoderConfig, scope: Scope = ROOT) -> tuple[Array, Pullback]:
    """Feed-forward residual block. With x = norm(h): h + W_out swiglu(W_gate x, W_in x), or h + W_out gelu(W_in x).

    h: (B, n, d). Returns (B, n, d) and vjp(dy) -> (gradients of params, dh). Shazeer 2020, SwiGLU."""
    normed, norm_vjp = norm(params, h, config.norm_eps)
    hidden, in_vjp = affine(params, normed, "in", scope)
    if gated := "w_gate" in params:
        gate, gate_vjp = affine(params, normed, "gate", scope)
        active, active_vjp = swiglu(gate, hidden)
    else:
        active, active_vjp = gelu(hidden)
    update, out_vjp = affine(params, active, "out", scope)
    dropped, drop_vjp = scope.drop(update)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        grads, dactive = out_vjp(*drop_vjp(dy))
        *dgate, dhidden = active_vjp(dactive)
        in_grads, dnormed = in_vjp(dhidden)
        if gated:
            gate_grads, dnormed_gate = gate_vjp(*dgate)
            in_grads, dnormed = in_grads | gate_grads, dnormed + dnormed_gate
        norm_grads, dh = norm_vjp(dnormed)
        return grads | in_grads | norm_grads, dy + dh

    return h + dropped, vjp


def norm(params: Tree, h: Array, eps: float) -> tuple[Array, Pullback]:
    """LayerNorm (Ba et al. 2016) if there is a bias, else RMSNorm.

    h: (..., d). Returns (..., d) and vjp(dy) -> (gradients of norm and norm_bias, dh)."""
    arguments = h.reshape(-1, h.shape[-1]), params["norm"], params.get("norm_bias"), eps

    def vjp(dy: Array) -> tuple[Tree, Array]:
        dx, dgain, dbias = norm_backward(dy.reshape(arguments[0].shape), *arguments)
        return {"norm": dgain} | ({} if dbias is None else {"norm_bias": dbias}), dx.reshape(h.shape)

    return norm_forward(*arguments).reshape(h.shape), vjp


def grouped(x: Array, kv_heads: int) -> Array:
    """Queries (B, n, h, c) as (B, g, n, h_kv, c): head i reads head i // g of the keys, so to the attention kernel the
    g queries of such a head are groups."""
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).transpose(0, 3, 1, 2, 4)


def ungrouped(x: Array) -> Array:
    """The inverse of `grouped`, (B, g, n, h_kv, c) → (B, n, h, c)."""
    return x.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], x.shape[2], -1, x.shape[4])


def placed(x: Array, first: int, config: DecoderConfig) -> tuple[Array, Pullback]:
    """Queries or keys at the positions from `first` on: turned in Llama, unchanged in GPT-2, which embeds positions."""
    return rotary(x, first, config.rotary_base) if config.architecture == "llama" else (x, lambda dy: (dy,))


def rotary(x: Array, first: int, base: float) -> tuple[Array, Pullback]:
    """Turn each pair of numbers (x_i, x_{i + c/2}) by the angle t · base^(−2i/c) at position t. Su et al. 2021.

    x: (B, n, h, c), at the positions first, first + 1, …. Returns the same shape and vjp(dy) -> (dx,)."""
    batch, n, heads, c = x.shape
    cos, sin = _angles(first, n, c, base, x.dtype)
    pairs = batch * n, heads, 2, c // 2
    turned = turn(x.reshape(pairs), cos, sin).reshape(x.shape)
    return turned, lambda dy: (turn(dy.reshape(pairs), cos, -sin).reshape(x.shape),)


@lru_cache(maxsize=64)
def _angles(first: int, count: int, c: int, base: float, dtype: np.dtype) -> tuple[Array, Array]:
    """Cosines and sines, (count, c / 2) each, computed in float64."""
    angles = np.outer(np.arange(first, first + count), base ** (-np.arange(0, c, 2) / c))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def swiglu(gate: Array, up: Array) -> tuple[Array, Pullback]:
    """y = gate · σ(gate) · up, elementwise. Returns the same shape and vjp(dy) -> (dgate, dup). Shazeer 2020."""
    flat = gate.reshape(-1), up.reshape(-1)

    def vjp(dy: Array) -> tuple[Array, Array]:
        dgate, dup = swiglu_backward(dy.reshape(-1), *flat)
        return dgate.reshape(gate.shape), dup.reshape(up.shape)

    return swiglu_forward(*flat).reshape(gate.shape), vjp


def affine(params: Tree, x: Array, name: str, scope: Scope = ROOT) -> tuple[Array, Pullback]:
    """y = x W + b, or x W if there is no bias b. x: (..., d_in); W: (d_in, d_out); b: (d_out,).

    With changes of low rank (see `changed`) they are added. Returns (..., d_out) and vjp(dy) -> (gradients of w_NAME,
    b_NAME and the changes, dx)."""
    w, b = f"w_{name}", f"b_{name}"
    y, linear_vjp = linear(x, params[w], scope.trains(w))
    if b in params:
        y += params[b]
    y, changed_vjp = changed(y, params, x, name, scope)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        dx, dw = linear_vjp(dy)
        grads, dchange = changed_vjp(dy)
        grads |= {w: dw} | ({b: dy.reshape(-1, dy.shape[-1]).sum(axis=0)} if b in params else {})
        return grads, dx + dchange if f"down_{name}" in params else dx

    return y, vjp


def changed(y: Array, params: Tree, x: Array, name: str, scope: Scope) -> tuple[Array, Pullback]:
    """y + x D U, a change of low rank r to y = x W; y if params has no such change. LoRA, Hu et al. 2022.

    y: (..., d_out); x: (..., d_in); D: (d_in, r), down_NAME; U: (r, d_out), up_NAME.
    Returns (..., d_out) and vjp(dy) -> (gradients of D and U, the change's part of dx), ({}, 0) without a change."""
    down, up = f"down_{name}", f"up_{name}"
    if down not in params:
        return y, lambda dy: ({}, 0)
    low, down_vjp = linear(x, params[down], scope.trains(down))
    change, up_vjp = linear(low, params[up], scope.trains(up))

    def vjp(dy: Array) -> tuple[Tree, Array]:
        dlow, dup = up_vjp(dy)
        dx, ddown = down_vjp(dlow)
        return {down: ddown, up: dup}, dx

    return y + change, vjp
