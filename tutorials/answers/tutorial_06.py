"""Our answers to the exercises of tutorial 6: the encoder's block, both ways back, algorithm 1 backward, table 2."""

import numpy as np

from retro_np.nn.attention import attend
from retro_np.nn.cca import cca
from retro_np.nn.encoder import encode
from retro_np.nn.operators import rms_norm


def conditioned(params, e, chunks, n_heads):
    normed, norm_vjp = rms_norm(e, params["norm"])
    context, context_vjp = rms_norm(chunks, params["norm_context"])
    update, attend_vjp = attend(params, normed, context[:, None], n_heads)

    def vjp(dy):
        grads, dnormed, dcontext = attend_vjp(dy)
        de, dnorm = norm_vjp(dnormed)
        dchunks, dnorm_context = context_vjp(dcontext[:, 0])
        return grads | {"norm": dnorm, "norm_context": dnorm_context}, dy + de, dchunks

    return e + update, vjp


def encode_all(params, h, neighbours, n_heads=2):
    """As the notebook's, out of the library's `encode`. Returns E (B, ℓ, k, r, d'), and vjp(dE) → (gradients, dh)."""
    from retro_np import EncoderConfig

    B, n_chunks, k, r = neighbours.shape
    m, d = r // 2, h.shape[-1]
    crossing = tuple(p for p, layer in enumerate(params["layers"], start=1) if "cross_attention" in layer)
    sizes = {"d_model": len(params["norm"]), "d_ffw": 1, "n_heads": n_heads, "d_head": 1}  # encode asks for neither 1
    config = EncoderConfig(**sizes, n_layers=len(params["layers"]), ca_layers=crossing)
    chunks = h[:, : n_chunks * m].reshape(B * n_chunks, m, d)
    e, encode_vjp = encode(params, params["embedding"], neighbours.reshape(-1, k, r), chunks, config)

    def vjp(dencoded):
        grads, dtable, dchunks = encode_vjp(dencoded.reshape(e.shape))
        dh = np.zeros_like(h)
        dh[:, : n_chunks * m] = dchunks.reshape(B, n_chunks * m, d)
        return grads | {"embedding": dtable}, dh

    return e.reshape(B, n_chunks, k, r, -1), vjp


def read(encoder_params, cca_params, h, neighbours):
    e, encoder_vjp = encode_all(encoder_params, h, neighbours)
    y, cca_vjp = cca(cca_params, h, e, neighbours != 0, 2, neighbours.shape[-1] // 2)

    def vjp(dy):
        cca_grads, dh, de = cca_vjp(dy)
        encoder_grads, dcondition = encoder_vjp(de)
        return encoder_grads, cca_grads, dh + dcondition

    return y, vjp


def backward(dlogits, kept, P):
    dh, dreadout = kept["readout"](dlogits)
    dh, dnorm = kept["norm"](dh)
    dencoded, layers = 0, []
    for p in range(len(kept["layers"]), 0, -1):
        line, grads = kept["layers"][p - 1], {}
        grads["ffw"], dh = line["FFW"](dh)
        if p in P:
            grads["cca"], dh, de = line["CCA"](dh)
            dencoded = dencoded + de
        if p == min(P):
            encoder_grads, dcondition = kept["ENCODER"](dencoded)
            dh = dh + dcondition
        grads["attention"], dh = line["ATTN"](dh)
        layers.insert(0, grads)
    (dembedding,) = kept["EMB"](dh)
    return {"embedding": dembedding, "layers": layers, "norm": dnorm, "readout": dreadout, "encoder": encoder_grads}


def by_hand(d, d_ffw, n_heads, c, n_layers, P, e):
    def attention(width, context, n_heads, c):
        norm, biases = width, 2 * n_heads * c
        as_wide_as_what_asks, as_wide_as_what_is_read = 3 * width * n_heads * c, 2 * context * n_heads * c
        return norm + as_wide_as_what_asks + as_wide_as_what_is_read + biases

    def feed_forward(width, inner):
        return width + 2 * width * inner

    total = n_layers * (attention(d, d, n_heads, c) + feed_forward(d, d_ffw)) + d
    if not P:
        return total
    total += len(P) * attention(d, e.d_model, n_heads, c)
    total += e.n_layers * (attention(e.d_model, e.d_model, e.n_heads, e.d_head) + feed_forward(e.d_model, e.d_ffw))
    total += len(e.ca_layers) * (attention(e.d_model, d, e.n_heads, e.d_head) + d)
    return total + e.d_model
