"""The feed-forward block."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

from retro_np.nn.operators import gelu, linear, rms_norm
from retro_np.nn.scope import ROOT, Scope
from retro_np.tree import Array, Pullback, Tree


def ffw(params: Tree, h: Array, scope: Scope = ROOT) -> tuple[Array, Pullback]:
    """Feed-forward residual block, h + W_out · gelu(W_in · norm(h)). h: (..., d). Paper §2.4, FFW.

    Returns (..., d) and vjp(dy) -> (gradients of params, dh)."""
    normed, norm_vjp = rms_norm(h, params["norm"])
    hidden, in_vjp = linear(normed, params["w_in"], scope.trains("w_in"))
    active, gelu_vjp = gelu(hidden)
    update, out_vjp = linear(active, params["w_out"], scope.trains("w_out"))
    dropped, drop_vjp = scope.drop(update)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        (dupdate,) = drop_vjp(dy)
        dactive, dw_out = out_vjp(dupdate)
        (dhidden,) = gelu_vjp(dactive)
        dnormed, dw_in = in_vjp(dhidden)
        dh, dgain = norm_vjp(dnormed)
        return {"norm": dgain, "w_in": dw_in, "w_out": dw_out}, dy + dh

    return h + dropped, vjp
