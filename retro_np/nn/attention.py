"""Relative attention as blocks of the model: projections around the kernel, and self-attention."""

from retro_np.kernels.attention import attention_backward, attention_forward, attention_weights
from retro_np.nn.operators import linear, rms_norm
from retro_np.nn.positions import sinusoids
from retro_np.nn.scope import ROOT


def relative_attention(q, keys, values, table=None, u=None, v=None, *, causal_offset=None, key_mask=None):
    """The kernel as value and pullback: shapes and meaning in `kernels.attention.attention_forward`."""
    parts = (q, keys, values, table, u, v)
    masks = {"causal_offset": causal_offset, "key_mask": key_mask}
    out, lse = attention_forward(*parts, **masks)

    def vjp(dout):
        grads = attention_backward(dout, lse, *parts, **masks)
        return grads if table is not None else grads[:3]

    return out, vjp


def attend(params, queries, context, n_heads, *, offset=0, causal=False, key_mask=None, scope=ROOT):
    """W_o · attention(W_q queries, W_k context, W_v context), before the residual.

    queries: (B, g, n, d), normalised; context: (B, k, r, d_context); distance of query i and key j: i − j + offset.
    Returns (B, g, n, d) and vjp(dy) -> (gradients of params, dqueries, dcontext).
    """

    def heads(x):
        return x.reshape(*x.shape[:-1], n_heads, -1)

    def flat(x):
        return x.reshape(*x.shape[:-2], -1)

    n, r = queries.shape[2], context.shape[2]
    q, q_vjp = linear(queries, params["w_q"], scope.trains("w_q"))
    keys, k_vjp = linear(context, params["w_k"], scope.trains("w_k"))
    values, v_vjp = linear(context, params["w_v"], scope.trains("w_v"))
    positions = ()
    if "w_r" in params:  # absent in the ablation without positions
        farthest = n - 1 + offset
        count = farthest + 1 if causal else n + r - 1  # a causal query sees no distance below zero
        rows = sinusoids(farthest, count, queries.shape[-1], queries.dtype.name)
        positions = (heads(rows @ params["w_r"]), params["u"], params["v"])
    masks = {"causal_offset": offset if causal else None, "key_mask": key_mask}
    out, attention_vjp = relative_attention(heads(q), heads(keys), heads(values), *positions, **masks)
    if scope.watch is not None:
        scope.watch(scope.path, attention_weights(heads(q), heads(keys), *positions, **masks))
    update, o_vjp = linear(flat(out), params["w_o"], scope.trains("w_o"))

    def vjp(dy):
        dout, dw_o = o_vjp(dy)
        dq, dkeys, dvalues, *dpositions = attention_vjp(heads(dout))
        dqueries, dw_q = q_vjp(flat(dq))
        dcontext_k, dw_k = k_vjp(flat(dkeys))
        dcontext_v, dw_v = v_vjp(flat(dvalues))
        grads = {"w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o}
        if positions:
            dtable, grads["u"], grads["v"] = dpositions
            grads["w_r"] = rows.T @ flat(dtable) if scope.trains("w_r") else None  # the sinusoids are constants
        return grads, dqueries, dcontext_k + dcontext_v

    return update, vjp


def self_attention(params, h, n_heads, *, causal, key_mask=None, scope=ROOT):
    """Residual block h + attention(norm(h)): ATTN (causal) and ATTN_enc (bi-directional, key_mask). Paper §2.4.

    h: (B, n, d); key_mask: (B, n), False at padding. vjp(dy) -> (gradients of params, dh).
    """
    normed, norm_vjp = rms_norm(h, params["norm"])
    mask = None if key_mask is None else key_mask[:, None]
    grouped = normed[:, None]
    update, attend_vjp = attend(params, grouped, grouped, n_heads, causal=causal, key_mask=mask, scope=scope)
    dropped, drop_vjp = scope.drop(update[:, 0])

    def vjp(dy):
        (dupdate,) = drop_vjp(dy)
        grads, dqueries, dcontext = attend_vjp(dupdate[:, None])
        dnormed, dgain = norm_vjp((dqueries + dcontext)[:, 0])
        return grads | {"norm": dgain}, dy + dnormed

    return h + dropped, vjp
