"""Chunked cross-attention: how the decoder reads its neighbours. Paper §2.4, eq. 3."""

import numpy as np

from retro_np.nn.attention import attend
from retro_np.nn.operators import rms_norm
from retro_np.nn.scope import ROOT


def attending_chunks(h, n_chunks, chunk_size):
    """H_u^+ for u = 1 … l: the last token of C_u and the first m − 1 of C_{u+1}. h: (B, n, d) → (B, l, m, d).

    The first m − 1 positions attend to nothing; what lacks of the last attending chunk is zero.
    """
    batch, n, d = h.shape
    shifted = np.zeros((batch, n_chunks * chunk_size, d), h.dtype)
    shifted[:, : n - (chunk_size - 1)] = h[:, chunk_size - 1 :]
    return shifted.reshape(batch, n_chunks, chunk_size, d)


def attended_sequence(chunks, n):
    """The way back: (B, l, m, d) → (B, n, d), zero in the first m − 1 positions. The transpose of attending_chunks."""
    batch, n_chunks, m, d = chunks.shape
    sequence = np.zeros((batch, n, d), chunks.dtype)
    sequence[:, m - 1 :] = chunks.reshape(batch, n_chunks * m, d)[:, : n - (m - 1)]
    return sequence


def cca(params, h, encoded, key_mask, n_heads, chunk_size, scope=ROOT):
    """Residual block h + CCA(norm(h), E). Paper §2.4, eq. 3; positions B.1.2.

    h: (B, n, d). encoded: (B, l, k, r, d'), the encoded neighbours of each whole chunk, l = floor(n / m) ≥ 1. With more
    chunks than that, what would read the last of them is not there, and they change nothing.
    key_mask: (B, l, k, r), False at padding. A chunk with no key left leaves h as it is.
    vjp(dy) -> (gradients of params, dh, dencoded).
    """
    batch, n_chunks, k, r, d_context = encoded.shape
    n = h.shape[1]
    normed, norm_vjp = rms_norm(h, params["norm"])
    queries = attending_chunks(normed, n_chunks, chunk_size)
    update, attend_vjp = attend(
        params,
        queries.reshape(batch * n_chunks, 1, chunk_size, -1),
        encoded.reshape(batch * n_chunks, k, r, d_context),
        n_heads,
        offset=chunk_size - 1,
        key_mask=key_mask.reshape(batch * n_chunks, k, r),
        scope=scope,
    )
    dropped, drop_vjp = scope.drop(attended_sequence(update.reshape(queries.shape), n))

    def vjp(dy):
        (dupdate,) = drop_vjp(dy)
        dchunks = attending_chunks(dupdate, n_chunks, chunk_size)
        grads, dqueries, dencoded = attend_vjp(dchunks.reshape(update.shape))
        dnormed = attended_sequence(dqueries.reshape(queries.shape), n)
        dh, dgain = norm_vjp(dnormed)
        return grads | {"norm": dgain}, dy + dh, dencoded.reshape(encoded.shape)

    return h + dropped, vjp
