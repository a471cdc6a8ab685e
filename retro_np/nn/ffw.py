"""The feed-forward block."""

from retro_np.nn.operators import gelu, linear, rms_norm
from retro_np.nn.scope import ROOT


def ffw(params, h, scope=ROOT):
    """Feed-forward residual block, h + W_out · gelu(W_in · norm(h)). h: (..., d). Paper §2.4, FFW.

    vjp(dy) -> (gradients of params, dh).
    """
    normed, norm_vjp = rms_norm(h, params["norm"])
    hidden, in_vjp = linear(normed, params["w_in"], scope.trains("w_in"))
    active, gelu_vjp = gelu(hidden)
    update, out_vjp = linear(active, params["w_out"], scope.trains("w_out"))
    dropped, drop_vjp = scope.drop(update)

    def vjp(dy):
        (dupdate,) = drop_vjp(dy)
        dactive, dw_out = out_vjp(dupdate)
        (dhidden,) = gelu_vjp(dactive)
        dnormed, dw_in = in_vjp(dhidden)
        dh, dgain = norm_vjp(dnormed)
        return {"norm": dgain, "w_in": dw_in, "w_out": dw_out}, dy + dh

    return h + dropped, vjp
