"""Trees: nested dicts and lists of arrays. Parameters, gradients and the optimiser's state are trees."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray  # an array of any shape and dtype
Tree = Any  # a dict or a list of trees, or a leaf: an array, a shape, None
Pullback = Callable[..., Any]  # vjp(dy) -> the gradients of a function's arguments, given that of its value


def named_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) in the order of the tree. A name is `layers.0.attention.w_q`, for example."""
    if not isinstance(tree, dict | list):
        yield prefix, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from named_leaves(value, f"{prefix}.{key}" if prefix else str(key))


def map_tree(f: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """A tree of the same form in which each leaf is replaced by f(dotted name, leaf)."""
    if isinstance(tree, dict):
        return {key: map_tree(f, value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_tree(f, value, f"{prefix}.{i}" if prefix else str(i)) for i, value in enumerate(tree)]
    return f(prefix, tree)
