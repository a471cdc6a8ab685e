"""Ground truth: loops, PyTorch's autograd on a port with one softmax over all keys, finite differences, and the decoder
itself without its memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from decoder_models import FEW, DecoderCase, memory_cases, memory_configs, real_ids, small_case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import cases
from support import assert_same_gradients, fresh_python, needs_c

from retro_np import UserError, gradcheck, init_params, kernels, reference
from retro_np.config import EncoderConfig
from retro_np.nn import decoders, memory
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.checks import perturbed_params
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.memory import StateCache, encode_neighbours, is_added, model_neighbours
from retro_np.nn.model import hidden_states, retro, retro_loss
from retro_np.nn.scope import ROOT
from retro_np.parameters import is_retrieval, parameter_shapes
from retro_np.tree import map_tree, named_leaves

# The tolerances and their reasons are those of test_decoders.py.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SAME = {"rtol": 1e-8, "floor": 1e-12}
oracle = pytest.mark.oracle
FEWER = settings(max_examples=12, deadline=None)  # The port runs one sequence, and one neighbour, at a time.
FORMS = pytest.mark.parametrize("form", ["own", "paper"])
cases_of = {form: memory_cases(form) for form in ("own", "paper")}
SIZES = {"vocabulary_size": 5, "d_model": 4, "n_heads": 2, "n_kv_heads": 1, "d_head": 2, "d_ffw": 3}
WIDE = {"d_model": 8, "n_heads": 4, "n_kv_heads": 2, "d_ffw": 4}  # gradcheck takes a few directions, not every entry
SMALL = {
    "Llama": {"family": "Llama", "begin_id": 1},
    "Qwen2": {"family": "Qwen2", "changed": ("w_k", "w_o")},
    "GPT-2": {"family": "GPT-2", "begin_id": 0, "cca_layers": (2,)},
    "gates alone": {"family": "Llama", "rank": None, "cca_layers": (1,)},
    "the paper's Llama": {"family": "Llama", "encoder": EncoderConfig(4, 3, 1, 2, 1)} | WIDE,
    "the paper's GPT-2": {"family": "GPT-2", "encoder": EncoderConfig(8, 3, 1, 2, 1), "share_embeddings": True} | WIDE,
}


@pytest.fixture(scope="module")
def port():
    import memory_port  # Tests without oracles do not need PyTorch.

    return memory_port


def reading_case(name: str = "Llama", n: int = 7, **change) -> DecoderCase:
    """A small model of SMALL with two rows, which have missing, cut and repeated neighbours."""
    chosen = {"chunk_size": 2, "rank": 2, "cca_layers": (1, 2)} | SIZES | SMALL[name] | change
    family, m = chosen.pop("family"), chosen["chunk_size"]
    if family == "GPT-2":
        chosen["n_kv_heads"] = chosen["n_heads"]
    case = small_case(family, n, **chosen)
    neighbours = case.rng.integers(0, 5, (2, n // m, 2, 2 * m))
    neighbours[0, 0, 1, m + 1 :] = -1
    neighbours[1, 0] = -1
    neighbours[1, -1, 1] = neighbours[0, -1, 0]
    return replace(case, neighbours=neighbours)


def grads_of(case, **options):
    """The leaves of the gradient of a case's loss that are not None, by name."""
    leaves = named_leaves(retro_loss(*case.loss_arguments, **options)[1](1.0))
    return {name: grad for name, grad in leaves if grad is not None}


def logits_of(case, **change):
    return retro(*replace(case, **change).arguments)[0]


def base_of(case):
    """The case's decoder without its memory, with the same weights."""
    layers = [{name: part for name, part in layer.items() if name != "cca"} for layer in case.params["layers"]]
    params = {name: part for name, part in case.params.items() if name != "encoder"} | {"layers": layers}
    return replace(case, params=params, config=replace(case.config, cca_layers=(), encoder=None), neighbours=None)


def missing(case):
    """As many neighbours as the case has, all of padding."""
    pad = case.config.padding_id
    return np.full_like(case.neighbours, -1 if pad is None else pad)


def cast(case, dtype):
    return replace(case, params=map_tree(lambda _, array: array.astype(dtype), case.params))


def other_ids(case, tokens):
    """Each token replaced by another one that is not padding."""
    real = real_ids(case.config)
    assume(len(real) > 1)
    places = np.searchsorted(real, tokens) % len(real)
    return np.where(real[places] == tokens, real[(places + 1) % len(real)], real[places])


# Values and gradients


@FORMS
@FEW
@given(data=st.data())
def test_logits_equal_the_loop_reference(form, data):
    case = data.draw(cases_of[form])
    np.testing.assert_allclose(logits_of(case), reference.retro(*case.arguments), **EXACT)


@settings(max_examples=15, deadline=None)
@given(case=memory_cases(adapted=True), is_on=st.booleans())
def test_logits_of_a_decoder_with_adapted_layers_equal_the_loop_reference(case, is_on):
    case = case if is_on else replace(case, neighbours=None)
    np.testing.assert_allclose(logits_of(case), reference.retro(*case.arguments), **EXACT)


@oracle
@FORMS
@FEWER
@given(data=st.data())
def test_the_loss_and_every_gradient_equal_autograd(port, form, data):
    case = data.draw(cases_of[form])
    loss, vjp = retro_loss(*case.loss_arguments)
    expected, gradients = port.memory_loss(*case.loss_arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    trained = {name: grad for name, grad in named_leaves(vjp(1.0)) if grad is not None}
    assert_same_gradients(gradients | trained, gradients, **SAME)


@oracle
@FEWER
@given(case=memory_cases(adapted=True), form=st.sampled_from(["off", "own", "paper"]))
def test_the_gradients_of_adapted_layers_equal_autograd(port, case, form):
    config = replace(case.config, encoder=EncoderConfig(2, 3, 1, 2, 1) if form == "paper" else None)
    case = replace(case, config=config, params=perturbed_params(config))
    case = replace(case, neighbours=None) if form == "off" else case
    trained, (_, gradients) = grads_of(case, trainable=is_added), port.memory_loss(*case.loss_arguments)
    expected = is_retrieval if form == "own" else is_added
    assert trained.keys() == {name for name, _ in named_leaves(case.params) if expected(name)}
    assert_same_gradients(gradients | trained, gradients, **SAME)


@oracle
@FORMS
@FEWER
@given(data=st.data())
def test_gradients_in_float32_equal_autograd_to_float32_precision(port, form, data):
    case = cast(data.draw(cases_of[form]), np.float32)
    loss, vjp = retro_loss(*case.loss_arguments)
    expected, gradients = port.memory_loss(*case.loss_arguments)  # in float64, of the rounded parameters
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    trained = {name: grad for name, grad in named_leaves(vjp(1.0)) if grad is not None}
    assert_same_gradients(gradients | trained, gradients, rtol=1e-3, floor=1e-4)


def gradcheck_of_what_is_trained(case, trainable=is_added, **options):
    trained = {name: array for name, array in named_leaves(case.params) if trainable(name)}

    def loss(trained):
        params = map_tree(lambda name, array: trained.get(name, array), case.params)
        value, vjp = retro_loss(params, *case.loss_arguments[1:], trainable=trainable, **options)
        return value, lambda dloss: {name: grad for name, grad in named_leaves(vjp(dloss)) if name in trained}

    gradcheck(loss, trained)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_what_is_trained_equal_finite_differences(name):
    gradcheck_of_what_is_trained(reading_case(name, n=5, n_layers=2))


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_gradients_of_adapted_layers_equal_finite_differences(family):
    case = reading_case(family, n=4, cca_layers=(), begin_id=None, adapted_layers=(1, 2))
    gradcheck_of_what_is_trained(replace(case, neighbours=None))


def test_the_gradient_with_dropout_equals_finite_differences():
    gradcheck_of_what_is_trained(reading_case(n=4, dropout=0.3), dropout_key=(3, 1))


@st.composite
def parts(draw):
    """A configuration, and sizes of its parts: rows R, queries m, neighbours k of r tokens."""
    config = replace(draw(memory_configs()), begin_id=None)
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    return config, *sizes, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


FINITE_DIFFERENCES = settings(max_examples=5, deadline=None)


@FINITE_DIFFERENCES
@given(case=parts())
def test_the_pullback_of_the_joint_softmax_equals_finite_differences(case):
    config, batch, n, _, _, rng = case
    shape = batch, n, config.n_heads
    own, read = rng.standard_normal((2, *shape, config.d_head))
    own_lse, read_lse = rng.standard_normal((2, *shape))

    def joint(*arrays):
        value, part, vjp = memory.join(*arrays)
        return (value, part), lambda d: vjp(*d)

    gradcheck(joint, own, own_lse, read, read_lse, rng.standard_normal(config.n_heads))


@FINITE_DIFFERENCES
@given(case=parts(), first=st.integers(0, 3))
def test_the_pullback_of_attention_to_neighbours_equals_finite_differences(case, first):
    config, rows, m, k, r, rng = case
    q = rng.standard_normal((rows, m, config.n_heads, config.d_head))
    keys, values = rng.standard_normal((2, rows, k, r, config.kv_heads, config.d_head))
    mask = rng.random((rows, k, r)) < 0.7
    mask[0] = True
    some = mask.any(axis=(1, 2))  # The log-sum-exp of a query without keys is −inf, and has no derivative.

    def attention(*arrays):
        out, lse, vjp = memory.attend_to_neighbours(*arrays, mask, first, config)
        return (out, lse[some]), lambda d: vjp(d[0], np.zeros_like(lse) + _placed(d[1], some, lse))

    gradcheck(attention, q, keys, values)


def _placed(rows, where, like):
    array = np.zeros_like(like)
    array[where] = rows
    return array


@FINITE_DIFFERENCES
@given(case=parts())
def test_the_pullback_of_a_neighbours_keys_and_values_equals_finite_differences(case):
    config, count, r, _, _, rng = case
    p = config.cca_layers[0]
    layer, states = perturbed_params(config)["layers"][p - 1], rng.standard_normal((count, r, config.d_model))
    names = ("down_k", "up_k", "down_v", "up_v")
    changes = {name: array for name, array in layer["cca"].items() if name in names}
    assume(changes)

    def keys(changes):
        of_keys, of_values, vjp = memory.neighbour_keys(layer | {"cca": changes}, states, config, ROOT)
        return (of_keys, of_values), lambda d: vjp(*d)

    gradcheck(keys, changes)


@FINITE_DIFFERENCES
@given(seed=st.integers(0, 99), rank=st.integers(1, 3))
def test_the_pullback_of_a_change_of_low_rank_equals_finite_differences(seed, rank):
    normal = np.random.default_rng(seed).standard_normal
    params = {"down_v": normal((4, rank)), "up_v": normal((rank, 3))}
    y = normal((2, 3, 3))
    gradcheck(lambda p, x: decoders.changed(y, p, x, "v", ROOT), params, normal((2, 3, 4)))


def test_a_gate_of_minus_infinity_closes_the_memory_and_one_of_plus_infinity_reads_alone():
    rng = np.random.default_rng(0)
    own, read = rng.standard_normal((2, 1, 3, 2, 4))
    own_lse, read_lse = rng.standard_normal((2, 1, 3, 2))
    with np.errstate(all="raise"):
        joint, part, _ = memory.join(own, own_lse, read, read_lse, np.array([-1e4, 1e4]))
    assert np.array_equal(joint[:, :, 0], own[:, :, 0])
    np.testing.assert_allclose(joint[:, :, 1], read[:, :, 1], rtol=1e-14)
    assert not part[:, :, 0].any()


# What is trained


@FEW
@given(case=memory_cases())
def test_while_the_memory_reads_it_alone_has_gradients(case):
    logits, vjp = retro(*case.arguments)
    gradients = [*named_leaves(vjp(np.ones_like(logits)))]
    assert {name for name, grad in gradients if grad is not None} == grads_of(case).keys()
    assert grads_of(case).keys() == {name for name, _ in named_leaves(case.params) if ".cca." in name}


@FORMS
@FEW
@given(data=st.data(), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_frozen_leaves_have_no_gradient_and_the_others_are_the_same_to_the_bit(form, data, share):
    case = data.draw(cases_of[form])
    frozen = {name for name, _ in named_leaves(case.params) if case.rng.random() < share}
    grads, full = grads_of(case, trainable=lambda name: name not in frozen), grads_of(case)
    assert grads.keys() == full.keys() - frozen
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, full[name], err_msg=name)


@FEW
@given(case=memory_cases("paper", adapted=True), is_on=st.booleans())
def test_a_backward_pass_that_ends_early_gives_the_gradients_of_one_that_does_not_to_the_bit(case, is_on):
    case = case if is_on else replace(case, neighbours=None)
    grads, full = grads_of(case, trainable=is_added), grads_of(case)
    assert grads.keys() == {name for name, _ in named_leaves(case.params) if is_added(name)}
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, full[name], err_msg=name)


@FEW
@given(case=cases())
def test_a_retrofitted_retro_has_the_gradients_of_one_that_trains_wholly_to_the_bit(case):
    arguments = case.params, case.config, case.tokens, case.targets, case.neighbours
    full = dict(named_leaves(retro_loss(*arguments)[1](1.0)))
    for name, grad in named_leaves(retro_loss(*arguments, trainable=is_retrieval)[1](1.0)):
        assert (grad is not None) == is_retrieval(name)
        np.testing.assert_array_equal(full[name] if grad is None else grad, full[name], err_msg=name)


@pytest.mark.parametrize(
    ("trained", "layers"),
    [("layers.2.cca.gate", [3]), ("layers.1.cca.up_o", [2, 3]), ("layers.0.ffw.norm", [1, 2, 3]), ("norm", [])],
)
def test_the_backward_pass_ends_at_the_first_layer_with_a_trained_parameter(trained, layers, monkeypatch):
    case, visited = reading_case(n_layers=3, cca_layers=(2, 3)), []
    if trained.split(".")[-2:-1] != ["cca"]:
        case = base_of(case)
    plain = decoders.ffw

    def counting(params, h, config, scope=ROOT):
        y, vjp = plain(params, h, config, scope)
        return y, lambda dy: (visited.append(int(scope.path.split(".")[1]) + 1), vjp(dy))[1]

    monkeypatch.setattr(decoders, "ffw", counting)
    grads = grads_of(case, trainable=lambda name: name == trained)
    assert sorted(visited) == layers
    assert list(grads) == [trained]


# Retrieval off, causality, order


@FORMS
@FEW
@given(data=st.data())
def test_retrieval_off_equals_the_base_with_all_its_gradients_to_the_bit(form, data):
    case = replace(data.draw(cases_of[form]), neighbours=None)
    base = base_of(case)
    assert np.array_equal(logits_of(case), logits_of(base))
    assert np.array_equal(hidden_states(*case.arguments), hidden_states(*base.arguments))
    grads = grads_of(case)
    for name, grad in grads_of(base).items():
        np.testing.assert_array_equal(grads.pop(name), grad, err_msg=name)
    assert grads.keys() == {name for name, _ in named_leaves(case.params) if is_retrieval(name)}
    assert not any(grad.any() for grad in grads.values())


@FORMS
@FEW
@given(data=st.data(), key=st.sampled_from([None, 1]))
def test_missing_neighbours_equal_retrieval_off_to_the_bit(form, data, key):
    case = data.draw(cases_of[form])
    dropping = replace(case.config, dropout=0.2)
    logits, _ = retro(case.params, dropping, case.tokens, missing(case), dropout_key=key)
    off, _ = retro(case.params, dropping, case.tokens, None, dropout_key=key)
    assert np.array_equal(logits, off)


@FORMS
@FEW
@given(data=st.data())
def test_the_first_tokens_before_a_chunk_is_complete_equal_the_base_to_the_bit(form, data):
    case = data.draw(cases_of[form])
    m = case.config.chunk_size
    assert np.array_equal(logits_of(case)[:, : m - 1], logits_of(base_of(case))[:, : m - 1])


@FORMS
@FEW
@given(data=st.data(), number=st.integers(0, 63))
def test_a_token_changes_its_own_logits_and_leaves_earlier_logits_exactly_equal(form, data, number):
    case = data.draw(cases_of[form])
    t, tokens = number % case.tokens.shape[1], case.tokens.copy()
    tokens[:, t] = (tokens[:, t] + 1) % case.config.vocabulary_size
    logits, other = logits_of(case), logits_of(case, tokens=tokens)
    assert np.array_equal(logits[:, :t], other[:, :t])
    assert np.all(np.any(logits[:, t] != other[:, t], axis=-1))


@FORMS
@FEW
@given(data=st.data(), number=st.integers(0, 63))
def test_a_neighbour_changes_no_logit_before_its_chunks_last_token_but_some_later_ones(form, data, number):
    case = data.draw(memory_cases(form, retrieving=True))
    batch, chunks, k, _ = case.neighbours.shape
    u, first, neighbours = number % chunks, (number % chunks + 1) * case.config.chunk_size - 1, case.neighbours.copy()
    neighbours[:, u, number % k] = other_ids(case, neighbours[:, u, number % k])
    logits, other = logits_of(case), logits_of(case, neighbours=neighbours)
    assert np.array_equal(logits[:, :first], other[:, :first])
    assert np.any(logits[:, first:] != other[:, first:], axis=(1, 2)).sum() == batch


@FORMS
@FEW
@given(data=st.data())
def test_a_row_changes_no_logit_of_another_row(form, data):
    case = data.draw(cases_of[form])
    both = replace(case, tokens=case.tokens[[0, 0]], neighbours=case.neighbours[[0, 0]])
    tokens, neighbours = both.tokens.copy(), both.neighbours.copy()
    tokens[1], neighbours[1] = other_ids(case, tokens[1]), missing(both)[1]
    np.testing.assert_array_equal(logits_of(both)[0], logits_of(both, tokens=tokens, neighbours=neighbours)[0])


@FORMS
@FEW
@given(data=st.data())
def test_the_order_of_neighbours_does_not_matter(form, data):
    case = data.draw(cases_of[form])
    permuted = case.neighbours[:, :, case.rng.permutation(case.neighbours.shape[2])]
    np.testing.assert_allclose(logits_of(case, neighbours=permuted), logits_of(case), **EXACT)


@FEW
@given(case=memory_cases())
def test_a_missing_neighbour_beside_others_changes_nothing(case):
    wider = np.concatenate([missing(case)[:, :, :1], case.neighbours], axis=2)
    np.testing.assert_allclose(logits_of(case, neighbours=wider), logits_of(case), **EXACT)


@FEW
@given(case=memory_cases(retrieving=True))
def test_neighbours_of_any_integer_type_give_the_same_logits(case):
    cut = case.neighbours.copy()
    if case.config.padding_id is not None:  # then nothing is negative
        cut[0, 0, 0, case.config.chunk_size :] = case.config.padding_id
    logits = [logits_of(case, neighbours=cut.astype(dtype)) for dtype in (np.uint16, np.int32, np.int64)]
    assert np.array_equal(logits[0], logits[2])
    assert np.array_equal(logits[1], logits[2])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@FORMS
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_logits_loss_and_gradients_have_the_dtype_of_the_parameters(form, dtype, data):
    case = cast(data.draw(cases_of[form]), dtype)
    case = replace(case, config=replace(case.config, dropout=0.25))
    loss, vjp = retro_loss(*case.loss_arguments, dropout_key=(1, 2))
    dtypes = {"logits": logits_of(case).dtype, "loss": loss.dtype}
    dtypes |= {name: grad.dtype for name, grad in named_leaves(vjp(1.0)) if grad is not None}
    assert {name for name, actual in dtypes.items() if actual != dtype} == set()


@pytest.mark.parametrize("kind", ["numba", pytest.param("c", marks=needs_c)])
@settings(max_examples=15, deadline=None)
@given(case=memory_cases())
def test_all_kinds_of_kernels_give_the_same_logits_and_gradients(kind, case):
    kernels.use("numpy")
    expected, gradients = logits_of(case), grads_of(case)
    kernels.use(kind)
    np.testing.assert_allclose(logits_of(case), expected, **EXACT)
    assert_same_gradients(grads_of(case), gradients, **SAME)


# Encoding neighbours


def states_of(case, neighbours, cache=None):
    """The states of each neighbour, {layer: (B, l, k, r, d)}, 0 at padding."""
    encoded = encode_neighbours(case.params, case.config, neighbours, cache)
    real = (encoded.mask[encoded.rows] & (encoded.rows >= 0)[..., None])[..., None]
    return {p: array[encoded.rows] * real for p, array in encoded.states.items()}


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for p, array in actual.items():
        np.testing.assert_array_equal(array, expected[p], err_msg=f"layer {p}")


@FEW
@given(case=memory_cases())
def test_each_different_neighbour_is_encoded_once(case):
    assume(case.neighbours.size)
    encoded = encode_neighbours(case.params, case.config, case.neighbours)
    gone = -1 if case.config.padding_id is None else case.config.padding_id
    values = {tuple(value) for value in case.neighbours.reshape(-1, case.neighbours.shape[-1])}
    there = {value for value in values if set(value) != {gone}}
    assert {len(array) for array in encoded.states.values()} == {max(1, len(there))}
    assert len(set(encoded.rows.ravel()) - {-1}) == len(there)


@FEW
@given(case=memory_cases(), tokens=st.integers(1, 30))
def test_neighbours_encoded_in_parts_have_the_same_states(case, tokens):
    assume(case.neighbours.size)
    expected = states_of(case, case.neighbours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "TOKENS_PER_PART", tokens)
        for p, array in states_of(case, case.neighbours).items():
            np.testing.assert_allclose(array, expected[p], **EXACT)


@FEW
@given(case=memory_cases(), limit=st.sampled_from([0, 300, 1 << 30]))
def test_neighbours_encoded_beforehand_give_the_same_logits_and_gradients_to_the_bit(case, limit):
    cache, gradients = StateCache(limit), grads_of(case)
    for _ in range(2):  # The second time, some come from the cache.
        encoded = model_neighbours(case.params, case.config, case.neighbours, cache)
        assert np.array_equal(logits_of(case, neighbours=encoded), logits_of(case))
        grads = grads_of(replace(case, neighbours=encoded))
        assert grads.keys() == gradients.keys()
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad, gradients[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("limit", [1 << 30, 600, 0], ids=["all fit", "some fit", "none fits"])
def test_states_with_a_cache_equal_those_without_it_to_the_bit(limit, dtype):
    case, cache = cast(reading_case(n_layers=3, cca_layers=(2, 3)), dtype), StateCache(limit)
    pool = case.rng.integers(0, 5, (6, 4))
    pool[0] = -1
    pool[1, 2:] = -1
    for _ in range(12):
        neighbours = pool[case.rng.integers(0, 6, (2, 3, 2))]
        assert_equal_states(states_of(case, neighbours, cache), states_of(case, neighbours))


def test_only_neighbours_that_are_not_kept_are_encoded(monkeypatch):
    case, cache, encoded, encode = reading_case(), StateCache(), [], memory._encode
    monkeypatch.setattr(memory, "_encode", lambda *a: (encoded.extend(a[2][a[3]].tolist()), encode(*a))[1])
    first, second, third = [0, 1, 2, 3], [3, 3, 2, -1], [1, 1, 1, 1]
    for batch in ([first, second, first], [second, third], [third, first, second]):
        encode_neighbours(case.params, case.config, np.array(batch)[None, None], cache)
    assert sorted(encoded) == sorted([first, second, third])


SAME_BITS = """
import numpy as np
from retro_np.nn import memory
from retro_np.nn.decoders import DecoderConfig
from retro_np.parameters import init_params

config = DecoderConfig(97, 32, 64, n_heads=4, d_head=8, n_layers=3, cca_layers=(2, 3), chunk_size=8, max_positions=64)
params, rng = init_params(config, np.random.default_rng(0)), np.random.default_rng(1)
neighbours, differing = rng.integers(0, 97, (40, 16)), 0
whole = memory.encode_neighbours(params, config, neighbours[None, None], memory.StateCache(0, SAME))
for rows in (np.arange(3), np.arange(5, 24), np.arange(40)[::-3], np.array([17])):
    part = memory.encode_neighbours(params, config, neighbours[rows][None, None], memory.StateCache(0, SAME))
    for p, states in part.states.items():
        differing += np.sum(states[part.rows] != whole.states[p][whole.rows[:, :, rows]])
print(differing)
"""


@pytest.mark.parametrize("threads", ["1", "2", "3"])
@pytest.mark.parametrize("kernels", ["Haswell", "SkylakeX", "Nehalem"])
def test_a_neighbours_states_have_the_same_bits_whatever_is_encoded_beside_it(kernels, threads):
    variables = {"OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": threads}
    assert fresh_python(SAME_BITS.replace("SAME", "True"), **variables)[0] == "0"


@pytest.mark.parametrize("same_bits", [False, True])
def test_neighbours_that_are_longer_than_the_models_positions_are_refused_in_one_line(same_bits):
    case = reading_case()
    config = replace(case.config, max_positions=3)
    with pytest.raises(UserError, match="the model has 3 positions"):
        encode_neighbours(case.params, config, np.ones((1, 1, 1, 4), int), StateCache(same_bits=same_bits))


def kept(cache, *numbers):
    return [number for number in numbers if cache.get(np.array([number])) is not None]


def test_a_cache_holds_at_most_its_limit_whatever_the_sizes():
    cache, rng = StateCache(limit=1000), np.random.default_rng(0)
    for number in range(300):
        cache.put(np.array([number]), {1: np.zeros((rng.integers(1, 30), 2)), 4: np.zeros(rng.integers(1, 30))})
        held = sum(array.nbytes for states in cache.kept.values() for array in states.values())
        assert held == cache.used <= 1000
    assert len(cache.kept) > 1


def test_a_full_cache_drops_the_neighbour_that_was_not_used_for_the_longest_time():
    cache = StateCache(limit=3 * 80)
    for number in (1, 2, 3):
        cache.put(np.array([number]), {2: np.full(10, number)})
    cache.get(np.array([1]))
    cache.put(np.array([4]), {2: np.full(10, 4)})
    assert kept(cache, 1, 2, 3, 4) == [1, 3, 4]
    assert np.array_equal(cache.get(np.array([3]))[2], np.full(10, 3))


def test_a_neighbour_larger_than_the_limit_is_not_kept_and_drops_nothing():
    cache = StateCache(limit=100)
    cache.put(np.array([1]), {1: np.zeros(10)})
    cache.put(np.array([2]), {1: np.zeros(13)})
    assert kept(cache, 1, 2) == [1]


def test_a_cache_keeps_a_copy():
    cache, states = StateCache(), {1: np.zeros(3)}
    cache.put(np.array([1]), states)
    states[1][:] = 7
    assert not cache.get(np.array([1]))[1].any()


# The parameter tree


@FORMS
@FEW
@given(data=st.data())
def test_fresh_parameters_have_the_shapes_of_the_tree_and_a_finite_loss_near_that_of_guessing(form, data):
    case = data.draw(cases_of[form])
    params = init_params(case.config, np.random.default_rng(0))
    assert map_tree(lambda _, array: array.shape, params) == parameter_shapes(case.config)
    loss, _ = retro_loss(params, *case.loss_arguments[1:])
    assert 0 <= loss < 3 + np.log(case.config.vocabulary_size)


@FEW
@given(case=memory_cases(adapted=True))
def test_fresh_changes_of_low_rank_and_fresh_gates_change_nothing(case):
    fresh = dict(named_leaves(init_params(case.config, np.random.default_rng(0))))
    params = map_tree(lambda name, array: fresh[name].astype(float) if is_added(name) else array, case.params)
    unchanged = replace(case.config, rank=None, adapted_layers=())
    without = map_tree(lambda name, _: params_of(params, name), parameter_shapes(unchanged))
    assert np.array_equal(logits_of(case, params=params), logits_of(case, params=without, config=unchanged))


def params_of(params, name):
    return dict(named_leaves(params))[name]


@FORMS
@FEW
@given(data=st.data())
def test_a_configuration_survives_json(form, data):
    config = data.draw(memory_configs(form, adapted=data.draw(st.booleans())))
    assert DecoderConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [{"rank": 1}, {"changed": ("w_q", "w_o")}, {"cca_layers": (2,)}])
def test_parameters_of_another_memory_are_refused(change):
    case = reading_case(cca_layers=(1,), changed=("w_q",))
    with pytest.raises(UserError, match="use the model's config"):
        retro(case.params, replace(case.config, **change), case.tokens, case.neighbours)


VALID = {"vocabulary_size": 13, "d_model": 12, "d_ffw": 10, "n_heads": 6, "d_head": 4, "n_layers": 2}
BAD = [
    {"rank": 0}, {"rank": -1}, {"rank": 13}, {"rank": True}, {"rank": 2.5}, {"rank": "16"}, {"rank": (2,)},
    {"rank": 10**5000}, {"changed": ("w_gate",)}, {"changed": ("w_q", "q")}, {"changed": "w_q"}, {"changed": None},
    {"changed": 3}, {"changed": ([],)}, {"changed": {"w_q": 1}}, {"changed": ("\n" * 500,)}, {"begin_id": -1},
    {"begin_id": 13}, {"begin_id": True}, {"begin_id": 0.0}, {"begin_id": "0"}, {"begin_id": 10**5000},
    {"adapted_layers": (1,)}, {"adapted_layers": (0,)}, {"adapted_layers": (3,)}, {"adapted_layers": (1, 1)},
    {"adapted_layers": "1"}, {"adapted_layers": None}, {"adapted_layers": (1.5,)}, {"adapted_layers": (True,)},
    {"cca_layers": (0,)}, {"cca_layers": (3,)}, {"cca_layers": (2, 2)}, {"cca_layers": 1}, {"encoder": 3},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=lambda change: "".join(change))
def test_a_value_that_no_memory_has_is_refused_in_one_short_line_that_names_its_field(change):
    with pytest.raises(UserError) as error:
        DecoderConfig(**VALID | change)
    (name,) = change
    assert name in str(error.value)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["share_embeddings", "copying_start"])
def test_an_option_of_the_encoder_is_refused_without_an_encoder(name):
    with pytest.raises(UserError, match=rf"^{name} needs encoder\.d_model") as error:
        DecoderConfig(**VALID, cca_layers=(1,), **{name: True})
    assert "\n" not in str(error.value)


def test_adapted_layers_without_a_rank_are_refused_with_a_way_out():
    with pytest.raises(UserError, match=r"^adapted_layers need a rank: give one, such as 16$"):
        DecoderConfig(**VALID, adapted_layers=(2,))


@pytest.mark.parametrize("begin_id", [None, 1])
def test_a_neighbour_longer_than_the_models_positions_is_refused_in_one_line(begin_id):
    room = 4 if begin_id is None else 5  # [N, F] and what begins it
    case = reading_case(n=2, begin_id=begin_id, max_positions=room)
    assert logits_of(case).shape == (2, 2, 5)
    short = replace(case, config=replace(case.config, max_positions=room - 1))
    with pytest.raises(UserError, match=f"^the model has {room - 1} positions, not {room}: give it a shorter text$"):
        retro(*short.arguments)


# What was read


def mass_of(maps, case, p):
    """(own, read): the weights of layer p's own tokens and of its neighbours, summed, (B, h, n) each."""
    m, own = case.config.chunk_size, maps[f"layers.{p}.attention"].sum(axis=-1)
    read = np.zeros_like(own)
    by_chunk = maps[f"layers.{p}.cca"].sum(axis=(-1, -2))  # (B, l, h, m)
    for u in range(by_chunk.shape[1]):
        for i in range(m):
            if (t := (u + 1) * m - 1 + i) < own.shape[2]:
                read[:, :, t] = by_chunk[:, u, :, i]
    return own, read


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT-2"])
def test_the_weights_of_own_tokens_and_of_neighbours_sum_to_one(name):
    case = reading_case(name)
    maps = attention_maps(*case.arguments)
    for p in case.config.cca_layers:
        own, read = mass_of(maps, case, p - 1)
        np.testing.assert_allclose(own + read, 1, rtol=1e-12)
        assert 0 < read.max() < 1


def test_padding_and_tokens_without_neighbours_have_no_weight_and_read_none():
    case = reading_case()
    maps = attention_maps(*case.arguments)
    m = case.config.chunk_size
    assert np.all(maps["layers.0.cca"][0, 0, :, :, 1, m + 1 :] == 0)  # what `reading_case` cuts off
    _, read = mass_of(maps, case, 0)
    assert np.all(read[:, :, : m - 1] == 0)
    assert np.all(read[1, :, m - 1 : 2 * m - 1] == 0)  # The first chunk of the second row retrieved nothing.


def test_a_large_gate_makes_a_token_read_its_neighbours_alone():
    case = reading_case()
    params = map_tree(lambda name, a: np.full_like(a, 60.0) if name.endswith("gate") else a, case.params)
    own, read = mass_of(attention_maps(params, *case.arguments[1:]), case, 0)
    reading = read > 0
    np.testing.assert_allclose(read[reading], 1, rtol=1e-12)
    assert np.any(reading)
    assert np.any(own[~reading] == 1)
