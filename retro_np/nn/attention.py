"""Attention with relative positions as blocks of the model, in three parts: projections, position table, kernel."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

from typing import Any

from retro_np.kernels import ignore_underflow
from retro_np.kernels.attention import attention_backward, attention_forward, attention_weights
from retro_np.nn.operators import linear, rms_norm
from retro_np.nn.positions import sinusoids
from retro_np.nn.scope import ROOT, Scope
from retro_np.tree import Array, Pullback, Tree


def relative_attention(q: Array, keys: Array, values: Array, *positions: Array, **masks: Any) -> tuple[Array, Pullback]:
    """The attention kernel and its pullback. Shapes and meaning are those of `kernels.attention.attention_forward`.

    positions: table, u and v, or nothing; masks: causal_offset and key_mask.
    vjp(dout) -> (dq, dkeys, dvalues), followed by (dtable, du, dv) if there are positions."""
    (out, _), vjp = attention_with_lse(q, keys, values, *positions, **masks)
    return out, vjp


def attention_with_lse(q: Array, keys: Array, values: Array, *positions: Array, **masks: Any) -> tuple[Any, Pullback]:
    """Like `relative_attention`, with the value (out, lse), and vjp(dout, dlse) of both; a dlse of None is zero."""
    out, lse = attention_forward(q, keys, values, *positions, **masks)

    def vjp(dout: Array, dlse: Array | None = None) -> Any:
        return attention_backward(dout, lse, q, keys, values, *positions, dlse=dlse, **masks)[: 3 + len(positions)]

    return (out, lse), vjp


def project(x: Array, w: Array, n_heads: int, trainable: bool = True) -> tuple[Array, Pullback]:
    """Queries, keys or values of all heads, x W. x: (..., d_in); w: (d_in, h·c). Returns (..., h, c).

    vjp(dy) -> (dx, dw), where dw is None if w is not trainable."""
    y, vjp = linear(x, w, trainable)
    return y.reshape(*x.shape[:-1], n_heads, -1), vjp


@ignore_underflow
def position_table(params: Tree, farthest: int, count: int, trainable: bool = True) -> tuple[Any, Pullback]:
    """W_R R_δ for the `count` distances δ = farthest, farthest − 1, …; None in the ablation without positions.

    Returns (count, h, c) and vjp(dtable) -> {"w_r": gradient}, which is None if w_r is not trainable. Paper B.1.2."""
    if "w_r" not in params:
        return None, lambda dtable: {}
    w_r = params["w_r"]
    rows = sinusoids(farthest, count, len(w_r), w_r.dtype.name)

    @ignore_underflow
    def vjp(dtable: Array) -> Tree:
        return {"w_r": rows.T @ dtable.reshape(count, -1) if trainable else None}  # The sinusoids are constants.

    return (rows @ w_r).reshape(count, *params["u"].shape), vjp


def attend_to(
    params: Tree, queries: Array, keys: Array, values: Array, table: Any, scope: Scope = ROOT, **masks: Any
) -> tuple[Array, Pullback]:
    """W_o · attention(W_q queries, keys, values), with keys, values and position table already projected.

    queries: (B, g, n, d), normalised; keys, values: (B, k, r, h, c); table: from `position_table`, or None; masks:
    causal_offset and key_mask of the kernel.
    Returns (B, g, n, d) and vjp(dy) -> (gradients of w_q, w_o, u and v, dqueries, dkeys, dvalues, dtable)."""
    q, q_vjp = project(queries, params["w_q"], keys.shape[3], scope.trains("w_q"))
    positions = () if table is None else (table, params["u"], params["v"])
    out, attention_vjp = relative_attention(q, keys, values, *positions, **masks)
    if scope.watch is not None:
        scope.watch(scope.path, attention_weights(q, keys, *positions, **masks))
    update, o_vjp = linear(out.reshape(*queries.shape[:-1], -1), params["w_o"], scope.trains("w_o"))

    def vjp(dy: Array) -> tuple[Tree, Array, Array, Array, Array | None]:
        dout, dw_o = o_vjp(dy)
        dq, dkeys, dvalues, *dpositions = attention_vjp(dout.reshape(out.shape))
        dqueries, dw_q = q_vjp(dq)
        grads, dtable = {"w_q": dw_q, "w_o": dw_o}, None
        if positions:
            dtable, grads["u"], grads["v"] = dpositions
        return grads, dqueries, dkeys, dvalues, dtable

    return update, vjp


def attend(
    params: Tree, queries: Array, context: Array, n_heads: int, *,
    offset: int = 0, causal: bool = False, key_mask: Array | None = None, scope: Scope = ROOT,
) -> tuple[Array, Pullback]:  # fmt: skip
    """W_o · attention(W_q queries, W_k context, W_v context), before the residual.

    queries: (B, g, n, d), normalised; context: (B, k, r, d_context). Query i is at distance i − j + offset from key j.
    Returns (B, g, n, d) and vjp(dy) -> (gradients of params, dqueries, dcontext)."""
    n, r = queries.shape[2], context.shape[2]
    keys, k_vjp = project(context, params["w_k"], n_heads, scope.trains("w_k"))
    values, v_vjp = project(context, params["w_v"], n_heads, scope.trains("w_v"))
    count = n + offset if causal else n + r - 1  # A causal query sees no key at a negative distance.
    table, table_vjp = position_table(params, n - 1 + offset, count, scope.trains("w_r"))
    masks = {"causal_offset": offset if causal else None, "key_mask": key_mask}
    update, attention_vjp = attend_to(params, queries, keys, values, table, scope, **masks)

    def vjp(dy: Array) -> tuple[Tree, Array, Array]:
        grads, dqueries, dkeys, dvalues, dtable = attention_vjp(dy)
        dcontext_k, grads["w_k"] = k_vjp(dkeys)
        dcontext_v, grads["w_v"] = v_vjp(dvalues)
        return grads | table_vjp(dtable), dqueries, dcontext_k + dcontext_v

    return update, vjp


def self_attention(
    params: Tree, h: Array, n_heads: int, *, causal: bool, key_mask: Array | None = None, scope: Scope = ROOT
) -> tuple[Array, Pullback]:
    """Residual block h + attention(norm(h)): ATTN (causal) and ATTN_enc (bidirectional, key_mask). Paper §2.4.

    h: (B, n, d); key_mask: (B, n), False at padding. Returns (B, n, d) and vjp(dy) -> (gradients of params, dh)."""
    normed, norm_vjp = rms_norm(h, params["norm"])
    mask = None if key_mask is None else key_mask[:, None]
    grouped = normed[:, None]
    update, attend_vjp = attend(params, grouped, grouped, n_heads, causal=causal, key_mask=mask, scope=scope)
    dropped, drop_vjp = scope.drop(update[:, 0])

    def vjp(dy: Array) -> tuple[Tree, Array]:
        (dupdate,) = drop_vjp(dy)
        grads, dqueries, dcontext = attend_vjp(dupdate[:, None])
        dnormed, dgain = norm_vjp((dqueries + dcontext)[:, 0])
        return grads | {"norm": dgain}, dy + dnormed

    return h + dropped, vjp
