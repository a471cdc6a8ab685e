"""AdamW and gradient clipping. Paper, appendix C."""

import math
from collections.abc import Callable

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels.rowwise import adamw_step
from retro_np.nn.scope import every
from retro_np.tree import Array, Tree, map_tree, named_leaves


def adamw_init(params: Tree, trainable: Callable[[str], bool] = every) -> Tree:
    """The state of AdamW before the first step: {"step": 0, "m": moments, "v": moments}.

    trainable: decides from a parameter's dotted name whether it is trained.
    The moments are trees like params, zeros in the shape and dtype of each trainable parameter, None for the rest."""
    m, v = (map_tree(lambda name, p: np.zeros_like(p) if trainable(name) else None, params) for _ in range(2))
    return {"step": 0, "m": m, "v": v}


def adamw_update(
    params: Tree, grads: Tree, state: Tree, *,
    lr: float | Callable[[str], float], weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> None:  # fmt: skip
    """Take one step of AdamW, changing params and state in place. Loshchilov & Hutter 2019.

    grads: a tree like params, as a pullback returns it; state: from `adamw_init`. The defaults are the paper's.
    lr: the learning rate, or a function that gives it by a parameter's dotted name.
    Weight decay is decoupled and applies to arrays with two or more axes, so that gains do not decay. A parameter whose
    gradient is None is frozen: it does not change or decay, and its moments, which may be None, do not change.
    Raises UserError, and changes nothing, if a gradient or a moment is absent or its shape is not its parameter's,
    or if a trained parameter is not a floating-point array."""
    by_name = [dict(named_leaves(tree)) for tree in (grads, state["m"], state["v"])]
    updates = []  # (name, parameter, gradient, moment m, moment v) of each trained parameter
    for name, p in named_leaves(params):  # Everything is checked before anything changes.
        arrays = [tree.get(name) for tree in by_name]
        if name in by_name[0] and arrays[0] is None:
            continue
        if any(array is None or np.shape(array) != p.shape for array in arrays) or p.dtype.kind != "f":
            fault = f"must be present and have shape {p.shape}, and the parameter must be floating-point"
            hint = "a parameter that was frozen in adamw_init has no moments"
            raise UserError(f"{name}: gradient and moments {fault}; {hint}")
        updates.append((name, p, *arrays))
    state["step"] += 1
    for name, p, g, m, v in updates:
        decay, rate = weight_decay if p.ndim >= 2 else 0, lr(name) if callable(lr) else lr
        adamw_step(p, g, m, v, lr=rate, betas=betas, eps=eps, decay=decay, step=state["step"])


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def clip_by_global_norm(grads: Tree, limit: float) -> float:
    """Scale the gradients in place so that their global norm is at most `limit`. Returns the norm before scaling.

    If an entry is NaN or infinite, the norm is not finite, and nothing is scaled."""
    present = [grad for _, grad in named_leaves(grads) if grad is not None]
    unit, norm = 1.0, _norm(present)
    if not 1e-15 < norm < math.inf:  # Squares overflow or vanish, but not those of multiples of the largest entry.
        unit = float(np.max([np.abs(grad).max(initial=0) for grad in present], initial=0)) or 1.0
        norm = _norm([grad / unit for grad in present])
    if norm * unit > limit:
        for grad in present:
            grad /= unit
            grad *= limit / norm
    return norm * unit


def _norm(arrays: list[Array]) -> float:
    return math.sqrt(sum(float(np.dot(array.reshape(-1), array.reshape(-1))) for array in arrays))
