"""Trees: nested dicts and lists of arrays. Parameters, gradients and the optimiser's state are trees."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass
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


def children(tree: Tree) -> list[tuple[str, Any]] | None:
    """The named parts of a dict, list, tuple, namedtuple or dataclass; None for anything else, which is a leaf."""
    if isinstance(tree, dict):
        return [(str(key), part) for key, part in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return [(str(number), part) for number, part in enumerate(tree)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    return None


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf). Unlike `named_leaves`, it also enters tuples, namedtuples and dataclasses."""
    parts = children(tree)
    if parts is None:
        yield prefix, tree
    for name, part in parts or ():
        yield from flatten(part, f"{prefix}.{name}" if prefix else name)


def unflatten(tree: Tree, leaves: Iterator[Any]) -> Tree:
    """A tree of the same form with other leaves, which come in the order of `flatten`."""
    named = children(tree)
    if named is None:
        return next(leaves)
    parts = [unflatten(part, leaves) for _, part in named]
    if isinstance(tree, list):
        return parts
    if isinstance(tree, tuple):
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    clone, put = copy(tree), dict.__setitem__ if isinstance(tree, dict) else object.__setattr__
    for key, part in zip(tree if isinstance(tree, dict) else dict(named), parts, strict=True):
        put(clone, key, part)  # even if a dataclass is frozen
    return clone
