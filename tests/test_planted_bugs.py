"""The gradient checker on wrong and on correct functions. Ground truth: planted bugs, their twins, scaled functions."""

from functools import cache

import numpy as np
import pytest
from planted_bugs import BUGS
from scaled_functions import PAIRS

from retro_np import gradcheck
from retro_np.checking import GradientError
from retro_np.tree import flatten

LARGE = 50_000  # entries of an argument, from which on a check takes seconds
KINDS = tuple(dict.fromkeys(bug.kind for bug in BUGS))
SEEDS = [pytest.param(0), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
MAX_UNDECIDED = 0.05  # the share of the pairs that may end in "cannot tell"


def is_large(bug):
    return any(np.size(leaf) >= LARGE for _, leaf in flatten(bug.arguments(np.random.default_rng(0))))


def cases():
    """(bugs of one kind, seed): the large ones apart, because they are slow with every seed."""
    for kind in KINDS:
        bugs = [bug for bug in BUGS if bug.kind == kind]
        large = [bug for bug in bugs if is_large(bug)]
        small = [bug for bug in bugs if bug not in large]
        for seed in range(3):
            if small:
                marks = [pytest.mark.slow] if seed else []
                yield pytest.param(small, seed, id=f"{kind}, seed {seed}", marks=marks)
            if large:
                yield pytest.param(large, seed, id=f"{kind}, large, seed {seed}", marks=pytest.mark.slow)


CASES = list(cases())


def test_there_are_at_least_100_bugs_and_200_pairs_with_names_of_their_own():
    assert len({(bug.kind, bug.name) for bug in BUGS}) == len(BUGS) >= 100
    assert len({pair.name for pair in PAIRS}) == len(PAIRS) >= 200


def is_caught(bug, seed):
    try:
        gradcheck(bug.wrong, *bug.arguments(np.random.default_rng(seed)))
    except GradientError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("bugs", "seed"), CASES)
def test_every_planted_bug_is_caught(bugs, seed):
    assert [bug.name for bug in bugs if not is_caught(bug, seed)] == []


@pytest.mark.parametrize(("bugs", "seed"), CASES)
def test_every_correct_twin_passes(bugs, seed):
    for bug in {bug.operator: bug for bug in bugs}.values():  # The bugs of an operator have the same twin.
        report = gradcheck(bug.correct, *bug.arguments(np.random.default_rng(seed)), raise_exception=False)
        assert report, f"{bug.name}\n{report.message}"


@cache
def failures(seed):
    """(name, report) of each pair of a correct function and a scale for which the report is false."""
    reports = (
        (pair.name, gradcheck(pair.f, *pair.arguments(np.random.default_rng(seed)), raise_exception=False))
        for pair in PAIRS
    )
    return [(name, report) for name, report in reports if not report]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_no_correct_function_is_called_wrong_at_any_scale(seed):
    wrong = [name for name, report in failures(seed) if any(row.verdict == "wrong" for row in report.rows)]
    assert wrong == []


@pytest.mark.parametrize("seed", SEEDS)
def test_at_most_5_percent_of_the_correct_functions_cannot_be_judged(seed):
    assert len(failures(seed)) <= MAX_UNDECIDED * len(PAIRS), [name for name, _ in failures(seed)]


# What the error says about some of them, as regular expressions
SENTENCES = {
    "sine of double: doubled in place": "argument 0: f overwrites it: work on a copy",
    "sine of double: one entry cleared by the pullback": "argument 0: the pullback overwrites it: work on a copy",
    "embedding: tokens shifted in place": "argument 1: f overwrites it",
    "cube: accumulates into a buffer": r"index .*: called again, the pullback returns \S+ instead of",
    "cube: cache popped": "the pullback fails when it is called again: IndexError: pop from empty list",
    "cube: cache overwritten by the next forward call": "after another call of f, the pullback of the first call",
    "cube: value depends on earlier calls": "f returns another value when it is called again",
    "cube: value buffer reused by the next forward call": "f or its pullback overwrites the value that f had returned",
    "dropout: value with noise of 1e-6": "f returns another value when it is called again",
    "dropout: gradient with noise of 1e-8": r"index .*: called again, the pullback returns \S+ instead of",
    "sine with buffer: one buffer for all pullbacks": "called again, the pullback overwrites its earlier gradient",
    "addition: both are one array": "the gradient of argument 0 shares its buffer with the gradient of argument 1",
    "half square: argument for a cotangent of 1": "the gradient of argument 0 shares its buffer with argument 0",
    "softmax: centred in place": "the pullback writes into its cotangent, which its caller may need: copy it first",
    "affine layer: no db": "argument 2, .*: None was returned; name it in frozen= if it is not trained",
    "affine layer: db is zero": "argument 2, .*: the gradient is zero, although the argument matters",
    "affine layer: dw flat": r"argument 1: the gradient has shape \(4,\), but the argument \(2, 2\)",
    "affine layer: gradient missing": "the pullback returned 2 gradients for 3 arguments",
    "column plus row: not summed": r"argument 0: the gradient has shape \(4, 4\), but the argument \(4, 1\)",
    "real part of spectrum: value complex": "the value is complex128.*return real and imaginary parts as two outputs",
    "real spectrum: gradient complex": "argument 0: the gradient is complex128, not real numbers",
    "layer with tree: key misspelt": "argument 1, b: .*no gradient with that name; it returned one for 'bias'",
    "layer with tree: surplus key": "argument 1: the pullback returned a gradient for 'c', which it does not have",
    "layer with tree: array for dict": "argument 1 is a dict of 2, but its gradient is an array.*: return a dict",
    "parabola: sign of bend": r"argument 0, bend, index .*: wrong sign\?",
    "cosine: clipped at 1e3": "the pullback is not linear in its cotangent: is it clipped, or",
    "layer: values of dw": "argument 1, .*: is something computed in float32 on the way",
    "layer: type of dw": "argument 1: the gradient is float32, although the argument is float64",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_error_says_what_was_planted(name):
    (bug,) = (bug for bug in BUGS if bug.name == name)
    with pytest.raises(GradientError, match=SENTENCES[name]):
        gradcheck(bug.wrong, *bug.arguments(np.random.default_rng(0)))
