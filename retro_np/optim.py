"""AdamW, the learning rate's schedule, and clipping. Paper §2.5, appendix C."""

import math

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels.rowwise import adamw_step
from retro_np.nn.scope import every
from retro_np.tree import Tree, leaves, map_tree


def adamw_init(params: Tree, trainable=every) -> Tree:
    """Zero moments for each parameter whose dotted name is trainable, None for the frozen ones."""

    def moment(name, array):
        return np.zeros_like(array) if trainable(name) else None

    return {"step": 0, "m": map_tree(moment, params), "v": map_tree(moment, params)}


def adamw_update(params, grads, state, *, lr, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8) -> None:
    """One step of AdamW in place (Loshchilov & Hutter 2019; the paper's β, ε and decay are the defaults).

    The decay is decoupled and takes hold of arrays of two axes or more; gains are not decayed. Where a gradient is
    None the parameter is frozen: neither moved nor decayed, and its moments (None, too, if so begun) are let be.
    Raises UserError, before anything has moved, where gradients or moments are not those of params.
    """
    grads, first_moments, second_moments = (dict(leaves(tree)) for tree in (grads, state["m"], state["v"]))
    for name, p in leaves(params):  # all is looked at before anything moves
        g = grads.get(name)
        if name in grads and g is None:
            continue
        beside = (g, first_moments.get(name), second_moments.get(name))
        if any(array is None or np.shape(array) != p.shape for array in beside) or p.dtype.kind != "f":
            raise UserError(
                f"{name}: its gradient or a moment is absent or of another shape, its moments were begun as frozen, or "
                "it is no floating-point array"
            )
    state["step"] += 1
    for name, p in leaves(params):
        if grads[name] is not None:
            decay = weight_decay if p.ndim >= 2 else 0
            moments = first_moments[name], second_moments[name]
            adamw_step(p, grads[name], *moments, lr=lr, betas=betas, eps=eps, decay=decay, step=state["step"])


def clip_by_global_norm(grads: Tree, limit: float) -> float:
    """Scale gradients in place so that their norm, all together, is at most `limit`. Returns the norm before."""
    present = [grad for _, grad in leaves(grads) if grad is not None]
    norm = math.sqrt(sum(float(np.dot(grad.reshape(-1), grad.reshape(-1))) for grad in present))
    if norm > limit:
        for grad in present:
            grad *= limit / norm
    return norm


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, start: float = 1e-7) -> float:
    """The rate of step 0, 1, …, steps − 1: linear from 1e-7 to the peak, then a cosine down to a tenth of it."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
