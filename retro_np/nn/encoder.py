"""The neighbour encoder, conditioned on the chunk that retrieved. Paper §2.4, algorithm 1, ENCODER."""

from retro_np.nn.attention import attend, self_attention
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import embedding, rms_norm
from retro_np.nn.scope import ROOT


def encoder_cross_attention(params, e, h_chunks, n_heads, scope=ROOT):
    """CA_enc: residual block e + CA(norm(e), norm_context(H_u)). Queries: the neighbours; keys, values: the chunk.

    e: (C, k, r, d'), the k neighbours of each of C chunks; h_chunks: (C, m, d).
    vjp(dy) -> (gradients of params, de, dh_chunks).
    """
    normed, norm_vjp = rms_norm(e, params["norm"])
    context, context_vjp = rms_norm(h_chunks, params["norm_context"])
    update, attend_vjp = attend(params, normed, context[:, None], n_heads, scope=scope)
    dropped, drop_vjp = scope.drop(update)

    def vjp(dy):
        (dupdate,) = drop_vjp(dy)
        grads, dnormed, dcontext = attend_vjp(dupdate)
        de, dgain = norm_vjp(dnormed)
        dh_chunks, dgain_context = context_vjp(dcontext[:, 0])
        return grads | {"norm": dgain, "norm_context": dgain_context}, dy + de, dh_chunks

    return e + dropped, vjp


def encode(params, table, tokens, h_chunks, config, scope=ROOT, table_trains=True):
    """ENCODER(RET(C_u)_j, H_u) for all chunks u and neighbours j at once, with the encoder's final norm.

    params: the tree's "encoder"; table: (V, d'), its embedding or the decoder's where shared. tokens: (C, k, r),
    0 is padding, which is no key. h_chunks: (C, m, d), the activations H_u. config: EncoderConfig.
    table_trains: whether the table wants a gradient.
    Returns (C, k, r, d') and vjp(dy) -> (gradients of params, dtable, dh_chunks).
    """
    chunks, k, r = tokens.shape
    single = (chunks * k, r, config.d_model)  # one neighbour a row: self-attention stays within it
    grouped = (chunks, k, r, config.d_model)
    key_mask = (tokens != 0).reshape(chunks * k, r)
    embedded, embedding_vjp = embedding(table, tokens, table_trains)
    e, drop_vjp = scope.at("embedding").drop(embedded)
    e = e.reshape(single)
    pullbacks = []
    for p, layer in enumerate(params["layers"]):
        place = scope.at(f"layers.{p}")
        e, attention_vjp = self_attention(
            layer["attention"], e, config.n_heads, causal=False, key_mask=key_mask, scope=place.at("attention")
        )
        cross_vjp = None
        if p + 1 in config.ca_layers:
            e, cross_vjp = encoder_cross_attention(
                layer["cross_attention"], e.reshape(grouped), h_chunks, config.n_heads, place.at("cross_attention")
            )
            e = e.reshape(single)
        e, ffw_vjp = ffw(layer["ffw"], e, place.at("ffw"))
        pullbacks.append((attention_vjp, cross_vjp, ffw_vjp))
    out, norm_vjp = rms_norm(e.reshape(grouped), params["norm"])

    def vjp(dy):
        de, dgain = norm_vjp(dy)
        de = de.reshape(single)
        dh_chunks = 0 * h_chunks
        layers = []
        for attention_vjp, cross_vjp, ffw_vjp in reversed(pullbacks):
            grads = {}
            grads["ffw"], de = ffw_vjp(de)
            if cross_vjp is not None:
                grads["cross_attention"], de, dh = cross_vjp(de.reshape(grouped))
                de, dh_chunks = de.reshape(single), dh_chunks + dh
            grads["attention"], de = attention_vjp(de)
            layers.insert(0, grads)
        (dembedded,) = drop_vjp(de.reshape(grouped))
        (dtable,) = embedding_vjp(dembedded)
        return {"layers": layers, "norm": dgain}, dtable, dh_chunks

    return out, vjp
