"""Trees: nested dicts, lists, tuples and dataclasses of arrays, and functions of trees.

Parameters, gradients and the optimiser's state are trees of dicts and lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from retro_np.errors import GradientError, GradientFormError

Array = np.ndarray  # an array of any shape and dtype
Tree = Any  # a dict or a list of trees, or a leaf: an array, a shape, None
Pullback = Callable[..., Any]  # vjp(dy) -> the gradients of a function's arguments, given that of its value


def named_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) in the order of the tree. A name is `layers.0.attention.w_q`, for example."""
    return flatten(tree, prefix, dict | list)


def map_tree(f: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """A tree of the same form in which each leaf is replaced by f(dotted name, leaf)."""
    return unflatten(tree, (f(name, leaf) for name, leaf in named_leaves(tree, prefix)), dict | list)


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


def flatten(tree: Tree, prefix: str = "", containers: Any = object) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf), like `named_leaves` for a tree that may also have tuples, namedtuples and dataclasses.

    containers: the types that are entered, if not all of these."""
    parts = children(tree) if isinstance(tree, containers) else None
    if parts is None:
        yield prefix, tree
    for name, part in parts or ():
        yield from flatten(part, f"{prefix}.{name}" if prefix else name, containers)


def unflatten(tree: Tree, leaves: Iterator[Any], containers: Any = object) -> Tree:
    """A tree of the same form with other leaves, which come in the order of `flatten` with the same containers."""
    named = children(tree) if isinstance(tree, containers) else None
    if named is None:
        return next(leaves)
    parts = [unflatten(part, leaves, containers) for _, part in named]
    if isinstance(tree, list):
        return parts
    if isinstance(tree, tuple):
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    clone, put = copy(tree), dict.__setitem__ if isinstance(tree, dict) else object.__setattr__
    for key, part in zip(tree if isinstance(tree, dict) else dict(named), parts, strict=True):
        put(clone, key, part)  # even if a dataclass is frozen
    return clone


def as_numpy(leaf: Any) -> Any:
    """Another library's array as a NumPy array; anything else as it is."""
    if isinstance(leaf, np.ndarray | np.generic) or not hasattr(leaf, "__array__"):
        return leaf
    return np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf)


def kind_of(leaf: Any) -> str:
    """NumPy's letter for the kind of an array or a number: "f", "c", "i" …; "O" for anything else."""
    return np.asarray(leaf).dtype.kind if isinstance(leaf, np.ndarray | np.generic | complex | float) else "O"


def index_of(entry: int, shape: tuple[int, ...]) -> str:
    """How messages call an entry of a flat array: "index (1, 2)"."""
    return f"index {tuple(map(int, np.unravel_index(entry, shape)))}"


def outputs_of(value: Any) -> list[Array]:
    """The value's leaves as arrays. Raises GradientFormError if one is not real, or if none is floating-point."""
    outputs = [np.asarray(as_numpy(leaf)) for _, leaf in flatten(value)]
    for output in outputs:
        if output.dtype.kind not in "fiub":
            advice = "return real and imaginary parts as two outputs" if output.dtype.kind == "c" else "return arrays"
            raise GradientFormError(f"the value is {output.dtype}, not real numbers: {advice}")
    if not any(output.dtype.kind == "f" and output.size for output in outputs):
        raise GradientFormError("the value has no floating-point output, so it has no gradient")
    return outputs


def flat_outputs(value: Any) -> Array:
    """(outputs,) the value's floating-point leaves as one vector, in float64."""
    floats = [output for output in outputs_of(value) if output.dtype.kind == "f"]
    return np.concatenate([output.reshape(-1).astype(np.float64) for output in floats])


class LeafFunction:
    """f at its arguments, as a function of their floating-point leaves. Raises TypeError if one is complex.

    names: of the parameters. template: all leaves. paths: for each of them the argument's position and its dotted name.
    numbers: of the floating-point leaves that are not empty (ValueError if there is none). shapes, ends: of those, and
    where each ends in a flat vector of all their entries. frozen: leaves whose gradient may be left out."""

    def __init__(self, f: Callable[..., Any], arguments: tuple[Any, ...], frozen: Iterable[int | str] = ()) -> None:
        try:
            parameters = inspect.signature(f).parameters.values()
            names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        except (TypeError, ValueError):  # f is a builtin
            names = []
        self.f, self.arguments, self.names = f, arguments, (names + [""] * len(arguments))[: len(arguments)]
        template = [as_numpy(leaf) for _, leaf in flatten(arguments)]
        self.template = [leaf.copy("K") if isinstance(leaf, np.ndarray) else leaf for leaf in template]
        self.paths = [(i, path) for i, argument in enumerate(arguments) for path, _ in flatten(argument)]
        self.numbers = [n for n, leaf in enumerate(self.template) if kind_of(leaf) == "f" and np.size(leaf)]
        self.shapes = [np.shape(self.template[n]) for n in self.numbers]
        self.ends = np.cumsum([np.size(self.template[n]) for n in self.numbers])
        self.frozen = {number for name in frozen for number in self.named(name)}
        if any(kind_of(leaf) == "c" for leaf in self.template):
            raise TypeError("an argument is complex: pass its real and imaginary parts as two arguments")
        if not self.numbers:
            types = self.types(range(len(self.template))) or "there is none"
            raise ValueError(f"nothing was checked, because no argument is floating-point: {types}")

    def label(self, number: int) -> str:
        """What a leaf is called."""
        position, path = self.paths[number]
        return f"argument {position}" + (f", {path}" if path else "")

    def place(self, entry: int) -> tuple[str, int]:
        """What an entry of the flat vector is called, and the position of its argument."""
        leaf = int(np.searchsorted(self.ends, entry, side="right"))
        offset, number = entry - (self.ends[leaf - 1] if leaf else 0), self.numbers[leaf]
        return f"{self.label(number)}, {index_of(offset, self.shapes[leaf])}", self.paths[number][0]

    def types(self, numbers: Iterable[int]) -> str:
        """The dtypes or types of some leaves."""
        shown = [(np.size(x), getattr(x, "dtype", type(x).__name__)) for x in map(self.template.__getitem__, numbers)]
        return ", ".join(sorted({f"{'' if size else 'empty '}{kind}" for size, kind in shown}))

    def named(self, name: int | str) -> set[int]:
        """The numbers of the leaves with this name or position, or within what has it. Raises ValueError if none."""
        matching = set()
        for number, (position, path) in enumerate(self.paths):
            roots = ("", f"{position}.", f"{self.names[position]}.", f"argument {position}.")
            if position == name or any(f"{x}{path}.".startswith(f"{name}.".replace(", ", ".")) for x in roots):
                matching.add(number)
        if not matching:
            raise ValueError(f"there is no argument, and no leaf of one, with the name {name!r}")
        return matching

    def by_argument(self, option: Any) -> list[Any]:
        """An option's value for each argument: of a sequence, a dict by name, or one value for all. None if missing."""
        if isinstance(option, Mapping):
            option = {self.paths[n][0]: value for name, value in option.items() for n in self.named(name)}
            return [option.get(i) for i in range(len(self.names))]
        if isinstance(option, Sequence) and len(option) != len(self.names):
            raise ValueError(f"there are {len(option)} tolerances for {len(self.names)} arguments")
        return list(option) if isinstance(option, Sequence) else [option] * len(self.names)

    def copies(self, dtype: Any) -> list[Array]:
        """The floating-point leaves, copied, in the same memory order."""
        return [np.array(self.template[n], dtype=dtype) for n in self.numbers]

    def filled(self, leaves: list[Array]) -> list[Any]:
        """All leaves, with these in place of the floating-point ones."""
        every = list(self.template)
        for n, leaf in zip(self.numbers, leaves, strict=True):
            every[n] = leaf if isinstance(every[n], np.ndarray) else leaf[()]
        return every

    def call(self, leaves: list[Array], watched: bool = True) -> tuple[Any, Pullback]:
        """f with these leaves. Returns (value, pullback). If watched, a changed container is a GradientError."""
        arguments = unflatten(self.arguments, iter(self.filled(leaves)))
        before = [(path, id(leaf)) for path, leaf in flatten(arguments)] if watched else None
        result = self.f(*arguments)
        if watched and [(path, id(leaf)) for path, leaf in flatten(arguments)] != before:
            raise GradientError("f changes a dict, list or dataclass among its arguments: work on a copy")
        if not isinstance(result, tuple | list) or len(result) != 2 or callable(result[0]) == callable(result[1]):
            shown = f"a tuple of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__
            raise TypeError(f"f must return (value, pullback), not {shown}; put several outputs into one tuple")
        return (result[1], result[0]) if callable(result[0]) else (result[0], result[1])

    def evaluate(self, leaves: list[Array]) -> Array:
        """(outputs,) the value, or NaN where f raises an exception."""
        try:
            return flat_outputs(self.call(leaves, watched=False)[0])
        except Exception:
            return np.array([np.nan])

    def pull(self, value: Any, vjp: Pullback, cotangent: Array) -> list[Any]:
        """`gradients` for a flat cotangent, (outputs,). GradientError if the pullback writes into its cotangent."""
        outputs = outputs_of(value)
        ends = np.cumsum([output.size * (output.dtype.kind == "f") for output in outputs])
        pairs = zip(np.split(cotangent, ends[:-1]), outputs, strict=True)
        parts = [np.resize(dy if len(dy) else [0], y.shape).astype(y.dtype) for dy, y in pairs]
        before = [part.tobytes() for part in parts]
        answer = vjp(unflatten(value, (part if part.ndim else part[()] for part in parts)))
        if [part.tobytes() for part in parts] != before:
            raise GradientError("the pullback writes into its cotangent, which its caller may need: copy it first")
        return self.gradients(answer)

    def gradients(self, answer: Any) -> list[Any]:
        """What a pullback answers for each leaf: an array, a number or None. Raises GradientFormError."""
        every = list(range(len(self.arguments)))
        floating = sorted({self.paths[n][0] for n in self.numbers})
        trained = sorted({self.paths[n][0] for n in self.numbers if n not in self.frozen})
        several = isinstance(answer, tuple | list) and not hasattr(answer, "_fields")
        shapes = {self.label(n): np.shape(leaf) for n, leaf in enumerate(self.template) if kind_of(leaf) == "f"}
        text = f"the pullback returned {len(answer) if several else 1} gradients for {len(every)} arguments"
        failure: tuple[str, int | None] = f"{text}; return a tuple", None
        for group in (trained, floating, every):  # The tuple around a single gradient may be left out.
            bare = len(group) == 1 and (not several or children(self.arguments[group[0]]) is not None)
            for answers in [[answer]] * bare + [answer] * (several and len(answer) == len(group)):
                given, leaves = dict(zip(group, answers, strict=True)), []
                try:
                    for position, argument in enumerate(self.arguments):
                        leaves += aligned(argument, given.get(position), shapes, f"argument {position}")
                    return [leaves[n] for n in self.numbers]
                except ValueError as error:
                    failure = str(error), position
        raise GradientFormError(*failure)

    def flat(self, gradients: list[Any]) -> Array:
        """(entries,) the gradients of the floating-point leaves as one vector in float64; None gives zeros."""
        filled = [np.zeros(shape) if g is None else g for g, shape in zip(gradients, self.shapes, strict=True)]
        return np.concatenate([np.array(gradient, np.float64).reshape(-1) for gradient in filled])


def aligned(tree: Tree, other: Tree, shapes: dict[str, tuple[int, ...]], path: str) -> list[Any]:
    """The leaves of a gradient `other` in the order of `flatten(tree)`, the argument's, as NumPy arrays.

    path: of the tree. shapes: of the leaves that need a gradient, by path. None stands for all leaves of a part. Raises
    ValueError if `other` has a part too many or too few, or a gradient of another shape, or one that is not real."""
    named = children(tree)
    if named is None:
        gradient, shape = as_numpy(other), shapes.get(path)
        if shape is None or gradient is None:
            return [gradient]
        array = np.asarray(gradient)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{path}: the gradient is {array.dtype}, not real numbers")
        if array.shape != shape:
            extra = max(array.ndim - len(shape), 0)
            axes = ", ".join(map(str, range(extra)))
            advice = f": sum it over axis {axes}" if axes and array.shape[extra:] == shape else ""
            raise ValueError(f"{path}: the gradient has shape {array.shape}, but the argument {shape}{advice}")
        return [gradient]
    parts = {name: None for name, _ in named} if other is None else dict(children(other) or ())
    if isinstance(tree, tuple) and isinstance(other, tuple | list) and len(tree) == len(other):  # perhaps a namedtuple
        parts = {name: part for (name, _), part in zip(named, other, strict=True)}
    paths = {name: f"{path}.{name}" if "," in path else f"{path}, {name}" for name, _ in named}
    if not parts and named:
        shown = f"an array of shape {np.shape(other)}" if hasattr(other, "shape") else f"a {type(other).__name__}"
        kind = type(tree).__name__
        raise ValueError(f"{path} is a {kind} of {len(named)}, but its gradient is {shown}: return a {kind}")
    surplus = [name for name in parts if name not in paths]
    for name, part in named:
        if name not in parts and any(f"{paths[name]}.{leaf}".rstrip(".") in shapes for leaf, _ in flatten(part)):
            instead = f"; it returned one for {surplus[0]!r}" if surplus else ""
            raise ValueError(f"{paths[name]}: the pullback returned no gradient with that name{instead}")
    if surplus:
        raise ValueError(f"{path}: the pullback returned a gradient for {surplus[0]!r}, which it does not have")
    return [leaf for name, part in named for leaf in aligned(part, parts.get(name), shapes, paths[name])]
