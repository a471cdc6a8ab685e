"""The neighbour encoder, conditioned on the chunk that retrieved. Paper §2.4, algorithm 1, ENCODER."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

import numpy as np

from retro_np.config import EncoderConfig
from retro_np.nn.attention import attend, self_attention
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import embedding, present, rms_norm
from retro_np.nn.scope import ROOT, Scope
from retro_np.tree import Array, Pullback, Tree


def encoder_cross_attention(
    params: Tree, e: Array, h_chunks: Array, n_heads: int, scope: Scope = ROOT
) -> tuple[Array, Pullback]:
    """CA_enc: residual block e + CA(norm(e), norm_context(H_u)). Neighbours are the queries, the chunk keys and values.

    e: (C, k, r, d'), the k neighbours of each of C chunks; h_chunks: (C, m, d).
    Returns (C, k, r, d') and vjp(dy) -> (gradients of params, de, dh_chunks)."""
    normed, norm_vjp = rms_norm(e, params["norm"])
    context, context_vjp = rms_norm(h_chunks, params["norm_context"])
    update, attend_vjp = attend(params, normed, context[:, None], n_heads, scope=scope)
    dropped, drop_vjp = scope.drop(update)

    def vjp(dy: Array) -> tuple[Tree, Array, Array]:
        (dupdate,) = drop_vjp(dy)
        grads, dnormed, dcontext = attend_vjp(dupdate)
        de, dgain = norm_vjp(dnormed)
        dh_chunks, dgain_context = context_vjp(dcontext[:, 0])
        return grads | {"norm": dgain, "norm_context": dgain_context}, dy + de, dh_chunks

    return e + dropped, vjp


def encode(
    params: Tree, table: Array, tokens: Array, h_chunks: Array, config: EncoderConfig,
    scope: Scope = ROOT, table_trains: bool = True, padding_id: int | None = 0,
) -> tuple[Array, Pullback]:  # fmt: skip
    """ENCODER(RET(C_u)_j, H_u) for all chunks u and neighbours j together, including the encoder's final norm.

    params: the subtree "encoder". table: (V, d'), the encoder's embedding, or the decoder's if they are shared.
    tokens: (C, k, r), padding_id or −1 at padding, which is masked as a key. h_chunks: (C, m, d), the activations H_u.
    table_trains: whether the table gets a gradient.
    Returns (C, k, r, d') and vjp(dy) -> (gradients of params, dtable, dh_chunks)."""
    (chunks, k, r), heads = tokens.shape, config.n_heads
    single = (chunks * k, r, config.d_model)  # Each row is one neighbour, so that self-attention stays within it.
    grouped = (chunks, k, r, config.d_model)
    key_mask = present(tokens, padding_id).reshape(chunks * k, r)
    embedded, embedding_vjp = embedding(table, np.maximum(tokens, 0), table_trains)
    e, drop_vjp = scope.at("embedding").drop(embedded)
    e = e.reshape(single)
    pullbacks = []
    for p, layer in enumerate(params["layers"]):
        block = scope.at(f"layers.{p}")
        self_scope = block.at("attention")
        e, self_vjp = self_attention(layer["attention"], e, heads, causal=False, key_mask=key_mask, scope=self_scope)
        cross_vjp = None
        if p + 1 in config.ca_layers:
            e, cross_vjp = encoder_cross_attention(
                layer["cross_attention"], e.reshape(grouped), h_chunks, heads, block.at("cross_attention")
            )
            e = e.reshape(single)
        e, ffw_vjp = ffw(layer["ffw"], e, block.at("ffw"))
        pullbacks.append((self_vjp, cross_vjp, ffw_vjp))
    out, norm_vjp = rms_norm(e.reshape(grouped), params["norm"])

    def vjp(dy: Array) -> tuple[Tree, Array | None, Array]:
        de, dgain = norm_vjp(dy)
        de = de.reshape(single)
        dh_chunks = 0 * h_chunks
        layers: list[Tree] = []
        for self_vjp, cross_vjp, ffw_vjp in reversed(pullbacks):
            grads = {}
            grads["ffw"], de = ffw_vjp(de)
            if cross_vjp is not None:
                grads["cross_attention"], de, dh = cross_vjp(de.reshape(grouped))
                de, dh_chunks = de.reshape(single), dh_chunks + dh
            grads["attention"], de = self_vjp(de)
            layers.insert(0, grads)
        (dembedded,) = drop_vjp(de.reshape(grouped))
        (dtable,) = embedding_vjp(dembedded)
        return {"layers": layers, "norm": dgain}, dtable, dh_chunks

    return out, vjp
