"""Chunked cross-attention: how the decoder reads its neighbours. Paper §2.4, eq. 3."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

import numpy as np

from retro_np.config import RetroConfig
from retro_np.nn.attention import attend
from retro_np.nn.operators import rms_norm
from retro_np.nn.scope import ROOT, Scope
from retro_np.tree import Array, Pullback, Tree


def attending_chunks(h: Array, n_chunks: int, chunk_size: int) -> Array:
    """H_u^+ for u = 1 … l: the last token of C_u and the first m − 1 of C_{u+1}. h: (B, n, d) → (B, l, m, d).

    The first m − 1 positions attend to nothing. A last attending chunk that is cut short is padded with zeros."""
    batch, n, d = h.shape
    shifted = np.zeros((batch, n_chunks * chunk_size, d), h.dtype)
    shifted[:, : n - (chunk_size - 1)] = h[:, chunk_size - 1 :]
    return shifted.reshape(batch, n_chunks, chunk_size, d)


def attended_sequence(chunks: Array, n: int) -> Array:
    """The transpose of attending_chunks: (B, l, m, d) → (B, n, d), zero in the first m − 1 positions."""
    batch, n_chunks, m, d = chunks.shape
    sequence = np.zeros((batch, n, d), chunks.dtype)
    sequence[:, m - 1 :] = chunks.reshape(batch, n_chunks * m, d)[:, : n - (m - 1)]
    return sequence


def cca(
    params: Tree, h: Array, encoded: Array, key_mask: Array, n_heads: int, chunk_size: int, scope: Scope = ROOT
) -> tuple[Array, Pullback]:
    """Residual block h + CCA(norm(h), E). Paper §2.4, eq. 3; positions B.1.2.

    h: (B, n, d). encoded: (B, l, k, r, d'), the encoded neighbours of each whole chunk, l = floor(n / m) ≥ 1. Further
    chunks have no effect, because no position attends to them.
    key_mask: (B, l, k, r), False at padding. If a chunk's keys are all masked, its attending positions keep their h.
    Returns (B, n, d) and vjp(dy) -> (gradients of params, dh, dencoded)."""
    batch, n_chunks, k, r, d_context = encoded.shape
    n = h.shape[1]
    normed, norm_vjp = rms_norm(h, params["norm"])
    queries = attending_chunks(normed, n_chunks, chunk_size)
    rows = batch * n_chunks  # Each attending chunk is a row, so that it attends only to its own neighbours.
    grouped, context = queries.reshape(rows, 1, chunk_size, -1), encoded.reshape(rows, k, r, d_context)
    mask = key_mask.reshape(rows, k, r)
    update, attend_vjp = attend(params, grouped, context, n_heads, offset=chunk_size - 1, key_mask=mask, scope=scope)
    dropped, drop_vjp = scope.drop(attended_sequence(update.reshape(queries.shape), n))

    def vjp(dy: Array) -> tuple[Tree, Array, Array]:
        (dupdate,) = drop_vjp(dy)
        dchunks = attending_chunks(dupdate, n_chunks, chunk_size)
        grads, dqueries, dencoded = attend_vjp(dchunks.reshape(update.shape))
        dnormed = attended_sequence(dqueries.reshape(queries.shape), n)
        dh, dgain = norm_vjp(dnormed)
        return grads | {"norm": dgain}, dy + dh, dencoded.reshape(encoded.shape)

    return h + dropped, vjp


def read_part(neighbours: Array, config: RetroConfig) -> Array:
    """The part of each value [N, F], (..., r), that the encoder reads: both, N alone or F alone (table 13)."""
    m = config.chunk_size
    return neighbours[..., {"NF": slice(None), "N": slice(m), "F": slice(m, None)}[config.retrieved_part]]
