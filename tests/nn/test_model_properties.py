"""Ground truth: properties of the model that hold for any numbers, such as causality, padding and frozen parameters."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY, baseline_of, cases

from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.nn.model import retro, retro_loss
from retro_np.tree import map_tree, named_leaves

ROUNDING = {"rtol": 1e-9, "atol": 1e-10}  # float64, with the terms of a sum in a different order


def other_token(tokens, vocabulary_size):
    """Replace each token by a different one, never padding."""
    return tokens % (vocabulary_size - 1) + 1


def assert_equal_trees(actual, expected, compare):
    expected = dict(named_leaves(expected))
    for name, grad in named_leaves(actual):
        compare(grad, expected[name], err_msg=name)


@MANY
@given(case=cases(), number=st.integers(0, 63))
def test_a_token_changes_its_own_logits_and_leaves_earlier_logits_exactly_equal(case, number):
    t = number % case.tokens.shape[1]
    changed = case.tokens.copy()
    changed[:, t] = other_token(changed[:, t], case.config.vocabulary_size)
    logits, _ = retro(*case.arguments)
    changed_logits, _ = retro(case.params, case.config, changed, case.neighbours)
    assert np.array_equal(logits[:, :t], changed_logits[:, :t])
    assert np.all(np.any(logits[:, t] != changed_logits[:, t], axis=-1))


@MANY
@given(case=cases(retrieving=True), number=st.integers(0, 63))
def test_a_neighbour_changes_no_logit_before_its_chunks_last_token_but_some_later_ones(case, number):
    batch, chunks, k, _ = case.neighbours.shape
    u, first = number % chunks, (number % chunks + 1) * case.config.chunk_size - 1
    changed = case.neighbours.copy()
    j = number % k
    changed[:, u, j] = other_token(changed[:, u, j], case.config.vocabulary_size)
    logits, _ = retro(*case.arguments)
    changed_logits, _ = retro(case.params, case.config, case.tokens, changed)
    assert np.array_equal(logits[:, :first], changed_logits[:, :first])
    assert np.any(logits[:, first:] != changed_logits[:, first:], axis=(1, 2)).sum() == batch


@MANY
@given(case=cases())
def test_a_row_changes_no_logit_of_another_row(case):
    tokens, neighbours = np.repeat(case.tokens[:1], 2, axis=0), np.repeat(case.neighbours[:1], 2, axis=0)
    logits, _ = retro(case.params, case.config, tokens, neighbours)
    tokens[1] = other_token(tokens[1], case.config.vocabulary_size)
    neighbours[1] = other_token(neighbours[1], case.config.vocabulary_size)
    changed_logits, _ = retro(case.params, case.config, tokens, neighbours)
    assert np.array_equal(logits[0], changed_logits[0])


@MANY
@given(case=cases())
def test_the_order_of_neighbours_does_not_matter(case):
    permuted = case.neighbours[:, :, case.rng.permutation(case.neighbours.shape[2])]
    expected, _ = retro(*case.arguments)
    logits, _ = retro(case.params, case.config, case.tokens, permuted)
    np.testing.assert_allclose(logits, expected, **ROUNDING)


@MANY
@given(case=cases())
def test_a_neighbour_of_padding_equals_a_missing_neighbour(case):
    padding = np.zeros_like(case.neighbours, shape=(*case.neighbours.shape[:2], 1, case.neighbours.shape[3]))
    targets = case.targets
    expected, expected_vjp = retro_loss(case.params, case.config, case.tokens, targets, case.neighbours)
    padded = np.concatenate([padding, case.neighbours, padding], axis=2)
    loss, vjp = retro_loss(case.params, case.config, case.tokens, targets, padded)
    np.testing.assert_allclose(loss, expected, **ROUNDING)
    assert_equal_trees(vjp(1.0), expected_vjp(1.0), partial(np.testing.assert_allclose, **ROUNDING))


@MANY
@given(case=cases())
def test_neighbours_of_padding_only_equal_retrieval_off_exactly(case):
    off, _ = retro(case.params, case.config, case.tokens, None)
    logits, _ = retro(case.params, case.config, case.tokens, np.zeros_like(case.neighbours))
    assert np.array_equal(logits, off)


@MANY
@given(case=cases())
def test_retrieval_off_equals_the_baseline_with_the_same_weights_exactly(case):
    params, config = baseline_of(case)
    off, off_vjp = retro_loss(case.params, case.config, case.tokens, case.targets, None)
    baseline, baseline_vjp = retro_loss(params, config, case.tokens, case.targets, None)
    assert off == baseline
    off_grads = dict(named_leaves(off_vjp(1.0)))
    for name, grad in named_leaves(baseline_vjp(1.0)):
        np.testing.assert_array_equal(off_grads.pop(name), grad, err_msg=name)
    assert not any(grad.any() for grad in off_grads.values())  # CCA and the encoder


@MANY
@given(case=cases())
def test_without_a_target_the_loss_and_all_gradients_are_zero(case):
    loss, vjp = retro_loss(case.params, case.config, case.tokens, np.zeros_like(case.targets), case.neighbours)
    assert loss == 0
    grads = dict(named_leaves(vjp(1.0)))
    assert {name: grad.shape for name, grad in grads.items()} == {n: a.shape for n, a in named_leaves(case.params)}
    assert not any(grad.any() for grad in grads.values())


@MANY
@given(case=cases(), empty=st.booleans())
def test_the_loss_of_a_batch_is_the_mean_of_its_rows_weighted_by_their_targets(case, empty):
    def doubled(x):
        return np.concatenate([x, other_token(x, case.config.vocabulary_size)])

    tokens, neighbours = doubled(case.tokens), doubled(case.neighbours)
    targets = np.concatenate([case.targets, 0 * case.targets if empty else case.targets[::-1, ::-1]])
    loss, vjp = retro_loss(case.params, case.config, tokens, targets, neighbours)
    mean, total = 0, map_tree(lambda _, array: np.zeros_like(array), case.params)
    for row in range(len(tokens)):
        rows = slice(row, row + 1)
        share = np.count_nonzero(targets[row]) / np.count_nonzero(targets)
        row_loss, row_vjp = retro_loss(case.params, case.config, tokens[rows], targets[rows], neighbours[rows])
        mean += share * row_loss
        row_grads = dict(named_leaves(row_vjp(share)))
        total = map_tree(lambda name, array, grads=row_grads: array + grads[name], total)
    np.testing.assert_allclose(loss, mean, **ROUNDING)
    largest = max(np.abs(grad).max() for _, grad in named_leaves(total))
    expected = dict(named_leaves(total))
    for name, grad in named_leaves(vjp(1.0)):
        np.testing.assert_allclose(grad, expected[name], rtol=1e-9, atol=1e-11 * largest, err_msg=name)


@MANY
@given(case=cases(), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_frozen_leaves_have_no_gradient_and_the_others_do_not_change(case, share):
    frozen = {name for name, _ in named_leaves(case.params) if case.rng.random() < share}
    batch = (case.params, case.config, case.tokens, case.targets, case.neighbours)
    loss, vjp = retro_loss(*batch, trainable=lambda name: name not in frozen)
    full_loss, full_vjp = retro_loss(*batch)
    assert loss == full_loss
    grads, full = dict(named_leaves(vjp(1.0))), dict(named_leaves(full_vjp(1.0)))
    assert {name for name, grad in grads.items() if grad is None} == frozen
    for name in grads.keys() - frozen:
        np.testing.assert_allclose(grads[name], full[name], **ROUNDING, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@MANY
@given(case=cases())
def test_logits_loss_and_gradients_have_the_dtype_of_the_parameters(dtype, case):
    params = map_tree(lambda _, array: array.astype(dtype), case.params)
    logits, logits_vjp = retro(params, case.config, case.tokens, case.neighbours)
    config = replace(case.config, dropout=0.25)
    loss, loss_vjp = retro_loss(params, config, case.tokens, case.targets, case.neighbours, dropout_key=(1, 2))
    grads = [*named_leaves(logits_vjp(np.ones_like(logits))), *named_leaves(loss_vjp(1.0))]
    dtypes = {"logits": logits.dtype, "loss": loss.dtype} | {name: grad.dtype for name, grad in grads}
    assert {name for name, actual in dtypes.items() if actual != dtype} == set()


RNG = np.random.default_rng(0)
PARAMS = perturbed_params(CONFIG)
TOKENS = RNG.integers(1, CONFIG.vocabulary_size, (2, 11))
NEIGHBOURS = RNG.integers(1, CONFIG.vocabulary_size, (2, 3, 2, 6))
DROPPING = replace(CONFIG, dropout=0.3)


@pytest.mark.parametrize("key", [7, (3, 1000)], ids=str)
def test_the_same_dropout_key_drops_the_same_entries(key):
    first, first_vjp = retro_loss(PARAMS, DROPPING, TOKENS, TOKENS, NEIGHBOURS, dropout_key=key)
    second, second_vjp = retro_loss(PARAMS, DROPPING, TOKENS, TOKENS, NEIGHBOURS, dropout_key=key)
    assert first == second
    assert_equal_trees(first_vjp(1.0), second_vjp(1.0), np.testing.assert_array_equal)


@pytest.mark.parametrize("keys", [(7, 8), ((3, 4), (3, 5)), ((3, 4), (4, 3))], ids=str)
def test_a_different_dropout_key_changes_every_position(keys):
    first, second = (retro(PARAMS, DROPPING, TOKENS, NEIGHBOURS, dropout_key=key)[0] for key in keys)
    assert np.all(np.any(first != second, axis=-1))


def test_nothing_is_dropped_without_a_key():
    expected, _ = retro(PARAMS, CONFIG, TOKENS, NEIGHBOURS)
    assert np.array_equal(retro(PARAMS, DROPPING, TOKENS, NEIGHBOURS)[0], expected)
    assert not np.array_equal(retro(PARAMS, DROPPING, TOKENS, NEIGHBOURS, dropout_key=1)[0], expected)


def altered(array, value):
    array = array.copy()
    array[(-1,) * array.ndim] = value
    return array


BAD_TOKENS = {
    "too large": altered(TOKENS, CONFIG.vocabulary_size),
    "negative": altered(TOKENS, -1),
    "floats": TOKENS.astype(float),
    "booleans": TOKENS > 3,
    "one row without its axis": TOKENS[0],
    "an axis too many": TOKENS[None],
    "no token": TOKENS[:, :0],
}
BAD_NEIGHBOURS = {
    "too large": altered(NEIGHBOURS, CONFIG.vocabulary_size),
    "negative": altered(NEIGHBOURS, -1),
    "floats": NEIGHBOURS.astype(float),
    "without the axis k": NEIGHBOURS[:, :, 0],
    "a chunk too few": NEIGHBOURS[:, :-1],
    "a chunk too many": np.concatenate([NEIGHBOURS, NEIGHBOURS[:, :1]], axis=1),
    "a row too few": NEIGHBOURS[:1],
}


@pytest.mark.parametrize("tokens", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens"):
        retro(PARAMS, CONFIG, tokens, None)


@pytest.mark.parametrize("neighbours", BAD_NEIGHBOURS.values(), ids=BAD_NEIGHBOURS)
def test_bad_neighbours_are_refused(neighbours):
    with pytest.raises(ValueError, match="neighbours"):
        retro(PARAMS, CONFIG, TOKENS, neighbours)


BAD_TARGETS = BAD_TOKENS | {"negative": altered(TOKENS, -2), "a column too few": TOKENS[:, 1:]}  # −1: no target


@pytest.mark.parametrize("targets", BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_bad_targets_are_refused(targets):
    with pytest.raises(ValueError, match="targets"):
        retro_loss(PARAMS, CONFIG, TOKENS, targets, NEIGHBOURS)


@pytest.mark.parametrize("change", [{"n_layers": 4}, {"vocabulary_size": 12}, {"cca_layers": (1, 2)}], ids=str)
def test_parameters_of_another_model_are_refused(change):
    with pytest.raises(ValueError, match="config"):
        retro(PARAMS, replace(CONFIG, **change), TOKENS, NEIGHBOURS)


def test_a_cotangent_may_have_any_dtype_but_only_the_shape_of_the_logits():
    params = map_tree(lambda _, array: array.astype(np.float32), PARAMS)
    logits, vjp = retro(params, CONFIG, TOKENS, NEIGHBOURS)
    assert {grad.dtype for _, grad in named_leaves(vjp(np.ones(logits.shape)))} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="logits"):
        vjp(np.ones(logits.size))


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="B and n ≥ 1"):
        retro(PARAMS, CONFIG, TOKENS[:0], None)
