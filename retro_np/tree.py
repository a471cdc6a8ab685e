"""Nested dicts and lists of arrays: parameters, gradients, optimiser state."""

from collections.abc import Callable, Iterator
from typing import Any

Tree = Any  # a dict or list of trees, or a leaf: an array, a shape, None


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) in the order of the tree: `layers.0.attention.w_q`."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def map_tree(f: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """A tree of the same form, each leaf replaced by f(dotted name, leaf)."""
    if isinstance(tree, dict):
        return {key: map_tree(f, value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_tree(f, value, f"{prefix}.{i}" if prefix else str(i)) for i, value in enumerate(tree)]
    return f(prefix, tree)
