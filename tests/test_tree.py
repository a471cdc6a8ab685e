"""Trees, and trees as arguments of the gradient checker. Ground truth: leaves that were put in, known gradients."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_np import gradcheck
from retro_np.checking import GradientFormError
from retro_np.tree import aligned, flatten, named_leaves, unflatten

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2))
Pair = namedtuple("Pair", "w b")


@dataclass
class Layer:
    w: Any
    b: Any


@dataclass(frozen=True)
class FrozenLayer:
    w: Any
    b: Any


def trees():
    """Nested dicts, lists, tuples, namedtuples and dataclasses."""
    leaves = st.none() | st.integers() | st.text(max_size=3)

    def node(parts):
        two = st.tuples(parts, parts)
        several = st.lists(parts, max_size=3)
        pairs = two.map(lambda ab: Pair(*ab)) | two.map(lambda ab: Layer(*ab)) | two.map(lambda ab: FrozenLayer(*ab))
        return several | several.map(tuple) | st.dictionaries(st.text("abc", max_size=2), parts, max_size=3) | pairs

    return st.recursive(leaves, node, max_leaves=12)


@given(trees())
def test_a_tree_is_restored_from_its_leaves(tree):
    restored = unflatten(tree, iter([leaf for _, leaf in flatten(tree)]))
    assert restored == tree
    assert type(restored) is type(tree)


@given(trees())
def test_a_tree_with_other_leaves_has_them_under_the_same_names(tree):
    names = [name for name, _ in flatten(tree)]
    before = list(flatten(tree))
    assert list(flatten(unflatten(tree, iter(range(len(names)))))) == list(zip(names, range(len(names)), strict=True))
    assert list(flatten(tree)) == before


@given(trees())
def test_dicts_and_lists_have_the_names_of_named_leaves(tree):
    tree = {"layers": [tree, 1]}
    if not any(isinstance(leaf, tuple | Layer | FrozenLayer) for _, leaf in named_leaves(tree)):
        assert list(flatten(tree)) == list(named_leaves(tree))


def test_a_leaf_has_a_dotted_name():
    tree = {"layers": [Layer(1, (2, Pair(3, FrozenLayer(4, None))))], "x": 5}
    names = ["layers.0.w", "layers.0.b.0", "layers.0.b.1.w", "layers.0.b.1.b.w", "layers.0.b.1.b.b", "x"]
    assert list(flatten(tree)) == list(zip(names, [1, 2, 3, 4, None, 5], strict=True))


def test_a_kind_of_dict_keeps_its_type_and_keys_that_are_not_strings():
    tree = OrderedDict([(2, "a"), ((1, 1), "b")])
    assert list(flatten(tree)) == [("2", "a"), ("(1, 1)", "b")]
    assert unflatten(tree, iter("cd")) == OrderedDict([(2, "c"), ((1, 1), "d")])
    assert type(unflatten(tree, iter("cd"))) is OrderedDict


def test_a_class_of_dataclasses_is_a_leaf():
    assert list(flatten([Layer])) == [("0", Layer)]


# A gradient beside its argument


SHAPES = {"p, w": (4, 2), "p, b": (2,)}


@pytest.mark.parametrize("argument", [{"w": W, "b": W[0]}, Pair(W, W[0]), Layer(W, W[0])])
@pytest.mark.parametrize("build", [lambda w, b: {"w": w, "b": b}, lambda w, b: {"b": b, "w": w}, Pair, Layer])
def test_gradients_come_in_the_order_of_the_argument(argument, build):
    dw, db = aligned(argument, build(2 * W, 2 * W[0]), SHAPES, "p")
    assert np.array_equal(dw, 2 * W)
    assert np.array_equal(db, 2 * W[0])


def test_none_stands_for_all_leaves_of_a_part():
    assert aligned({"w": W, "b": [W[0], W[1]]}, {"w": None, "b": None}, {}, "p") == [None, None, None]


def test_a_part_without_floating_point_leaves_may_be_left_out():
    leaves = aligned({"rows": [np.arange(3)], "w": W}, {"w": W}, {"p, w": W.shape}, "p")
    assert leaves[0] is None
    assert leaves[1] is W


MISTAKES = [
    (X, "p is a dict of 2, but its gradient is an array of shape (3, 4): return a dict"),
    ("W", "p is a dict of 2, but its gradient is a str: return a dict"),
    ({"w": W}, "p, b: the pullback returned no gradient with that name"),
    ({"w": W, "bias": X}, "p, b: the pullback returned no gradient with that name; it returned one for 'bias'"),
    ({"w": W, "b": W[0], "c": X}, "p: the pullback returned a gradient for 'c', which it does not have"),
    ([W, W[0]], "p, w: the pullback returned no gradient with that name; it returned one for '0'"),
    ({"w": W.T, "b": W[0]}, "p, w: the gradient has shape (2, 4), but the argument (4, 2)"),
    ({"w": W, "b": W}, "p, b: the gradient has shape (4, 2), but the argument (2,): sum it over axis 0"),
    ({"w": W, "b": 1.5}, "p, b: the gradient has shape (), but the argument (2,)"),
    ({"w": W, "b": W[0] + 0j}, "p, b: the gradient is complex128, not real numbers"),
    ({"w": W, "b": ["x", "y"]}, "p, b: the gradient is <U1, not real numbers"),
]


@pytest.mark.parametrize(("gradient", "sentence"), MISTAKES)
def test_a_gradient_of_another_form_than_its_argument_is_described(gradient, sentence):
    with pytest.raises(ValueError, match=r"^p") as raised:
        aligned({"w": W, "b": W[0]}, gradient, SHAPES, "p")
    assert str(raised.value) == sentence


def test_a_part_of_a_part_is_named_with_a_dot():
    with pytest.raises(ValueError, match=r"^p, layers\.0\.w: the gradient has shape"):
        aligned({"layers": [{"w": W}]}, {"layers": [{"w": X}]}, {"p, layers.0.w": W.shape}, "p")


# Arguments and values that are trees


def verdict(f, argument):
    return gradcheck(f, argument, raise_exception=False).rows[0].verdict


TREES = {
    "dict": (lambda w, b: {"w": w, "b": b}, lambda p: (p["w"], p["b"])),
    "list": (lambda w, b: [w, b], tuple),
    "tuple": (lambda w, b: (w, b), tuple),
    "namedtuple": (Pair, tuple),
    "dataclass": (Layer, lambda p: (p.w, p.b)),
    "frozen dataclass": (FrozenLayer, lambda p: (p.w, p.b)),
    "nested": (
        lambda w, b: {"layers": [Layer(w, (b, None))], "mode": "sum"},
        lambda p: (p["layers"][0].w, p["layers"][0].b[0]),
    ),
}


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(("factor", "expected"), [(1, "right"), (2, "wrong")])
def test_an_argument_may_be_a_tree(kind, factor, expected):
    build, parts = TREES[kind]

    def f(tree):
        w, b = parts(tree)
        return X @ w + b, lambda dy: build(X.T @ dy, factor * dy.sum(axis=0))

    assert verdict(f, build(W, W[0])) == expected


@pytest.mark.parametrize("kind", [kind for kind in TREES if kind != "nested"])  # Outputs are neither None nor strings.
@pytest.mark.parametrize(("factor", "expected"), [(1, "right"), (2, "wrong")])
def test_there_may_be_several_outputs(kind, factor, expected):
    build, parts = TREES[kind]

    def vjp(dvalue):
        dproduct, dtotal = parts(dvalue)
        return dproduct @ W.T + factor * dtotal

    assert verdict(lambda x: (build(x @ W, x.sum()), vjp), X) == expected


def test_an_output_may_consist_of_integers():
    def f(x):
        def vjp(dvalue):
            assert dvalue["position"].dtype == np.int64
            return dvalue["sine"] * np.cos(x)

        return {"position": x.argmax(axis=0), "sine": np.sin(x)}, vjp

    assert gradcheck(f, X)


def test_integer_leaves_are_skipped_and_their_gradients_may_be_left_out():
    def f(p):
        return p["x"][p["rows"]], lambda dy: {"x": np.eye(3)[:, p["rows"]] @ dy}

    assert gradcheck(f, {"x": X, "rows": np.array([1, 2, 1])})


def test_a_wrong_leaf_is_named_by_its_path():
    def f(p):
        return p["layers"][0].w * 3, lambda dy: {"layers": [Layer(2 * dy, None)]}

    report = gradcheck(f, {"layers": [Layer(W, None)]}, raise_exception=False)
    assert report.rows[0].where.startswith("layers.0.w, index (")


def test_a_gradient_for_a_leaf_of_a_dataclass_must_have_its_name():
    with pytest.raises(GradientFormError, match="argument 0, b: the pullback returned no gradient with that name"):
        gradcheck(lambda p: (X @ p.w + p.b, lambda dy: {"w": X.T @ dy}), Layer(W, W[0]))
