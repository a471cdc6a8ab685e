"""Ground truth: transformers' Llama, Qwen2 and GPT-2 in float64, PyTorch's autograd, loops, and finite differences."""

import json
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from decoder_models import FAMILIES, FEW, SMOLLM2, Transformers, decoder_cases, decoder_configs, small_case
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_gradients, needs_c

from retro_np import UserError, gradcheck, init_params, kernels, reference
from retro_np.generation import generate
from retro_np.nn import decoders
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.incremental import Cache, extend
from retro_np.nn.model import hidden_states, retro, retro_loss
from retro_np.nn.scope import Scope
from retro_np.parameters import count_parameters, parameter_shapes
from retro_np.tree import map_tree, named_leaves

# float64 after a few hundred roundings, which a norm of a small vector may amplify
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# Two orders of summation of a gradient's terms, in float64; the floor is for W_q and W_k if there is a single key, and
# for GPT-2's bias of keys, which are zero in exact arithmetic.
SAME = {"rtol": 1e-8, "floor": 1e-12}
oracle = pytest.mark.oracle


@pytest.fixture(scope="module")
def port():
    with Transformers() as transformers:
        yield transformers


def grads_of(case, **options):
    """The leaves of the gradient of a case's loss, by name."""
    return dict(named_leaves(retro_loss(*case.loss_arguments, **options)[1](1.0)))


def cast(case, dtype):
    return replace(case, params=map_tree(lambda _, array: array.astype(dtype), case.params))


# Values and gradients


@oracle
@FEW
@given(case=decoder_cases())
def test_logits_equal_those_of_transformers(port, case):
    expected = port.logits(port.model(case.config, case.params), case.tokens)
    np.testing.assert_allclose(retro(*case.arguments)[0], expected, **EXACT)


@oracle
@FEW
@given(case=decoder_cases())
def test_the_loss_and_every_gradient_equal_autograd(port, case):
    loss, vjp = retro_loss(*case.loss_arguments)
    model = port.model(case.config, case.params)
    expected, gradients = port.loss(model, case.config, case.params, case.tokens, case.targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert_same_gradients(vjp(1.0), gradients, **SAME)


@oracle
@FEW
@given(case=decoder_cases())
def test_gradients_in_float32_equal_autograd_to_float32_precision(port, case):
    case = cast(case, np.float32)
    loss, vjp = retro_loss(*case.loss_arguments)
    # The port gets the rounded parameters, so only the arithmetic differs: a few hundred roundings of 6e-8 each.
    model = port.model(case.config, case.params)
    expected, gradients = port.loss(model, case.config, case.params, case.tokens, case.targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(vjp(1.0), gradients, rtol=1e-3, floor=1e-4)


@settings(max_examples=40, deadline=None)
@given(case=decoder_cases(any_biases=True))
def test_logits_equal_the_loop_reference(case):
    np.testing.assert_allclose(retro(*case.arguments)[0], reference.retro(*case.arguments), **EXACT)


@pytest.mark.parametrize("block", ["attention", "ffw", "norm"])
@settings(max_examples=6, deadline=None)
@given(case=decoder_cases(any_biases=True, at_least=3))
def test_the_pullback_of_a_block_equals_finite_differences(block, case):
    config, layer = case.config, case.params["layers"][0]
    h = case.rng.standard_normal((2, 4, config.d_model))
    norm = {name: array for name, array in layer["ffw"].items() if name.startswith("norm")}
    f, params = {
        "attention": (partial(decoders.self_attention, config=config), layer["attention"]),
        "ffw": (partial(decoders.ffw, config=config), layer["ffw"]),
        "norm": (partial(decoders.norm, eps=config.norm_eps), norm),
    }[block]
    # GPT-2's bias of keys shifts all logits of a query alike. Its gradient is 0, and differences see only rounding.
    is_zero = config.architecture == "gpt2" and "b_k" in params
    gradcheck(f, {k: a for k, a in params.items() if not (is_zero and k == "b_k")}, h)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_with_dropout_equals_finite_differences(family):
    case = small_case(family, n=3, n_layers=1, d_ffw=4, vocabulary_size=5, dropout=0.3, biases=("w_o",))
    loss = partial(retro_loss, config=case.config, tokens=case.tokens, targets=case.targets, neighbours=None)
    gradcheck(partial(loss, dropout_key=(3, 1)), case.params)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embeddings_and_each_blocks_update_are_dropped_once(family, monkeypatch):
    case, paths, drop = small_case(family), [], Scope.drop
    monkeypatch.setattr(Scope, "drop", lambda scope, x: (paths.append(scope.path), drop(scope, x))[1])
    retro(*case.arguments)
    assert paths == ["embedding"] + [f"layers.{p}.{block}" for p in range(2) for block in ("attention", "ffw")]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_without_a_key(family):
    case = small_case(family)
    dropping = replace(case.config, dropout=0.5)
    logits, _ = retro(*case.arguments)
    assert np.array_equal(retro(case.params, dropping, case.tokens, None)[0], logits)
    assert np.all(np.any(retro(case.params, dropping, case.tokens, None, dropout_key=1)[0] != logits, axis=-1))


# Positions, heads and masks


@FEW
@given(case=decoder_cases(any_biases=True), number=st.integers(0, 63))
def test_a_token_changes_its_own_logits_and_leaves_earlier_logits_exactly_equal(case, number):
    t = number % case.tokens.shape[1]
    changed = case.tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % case.config.vocabulary_size
    logits, _ = retro(*case.arguments)
    other, _ = retro(case.params, case.config, changed, None)
    assert np.array_equal(logits[:, :t], other[:, :t])
    assert np.all(np.any(logits[:, t] != other[:, t], axis=-1))


@FEW
@given(case=decoder_cases(any_biases=True))
def test_a_row_changes_no_logit_of_another_row(case):
    tokens = np.repeat(case.tokens[:1], 2, axis=0)
    logits, _ = retro(case.params, case.config, tokens, None)
    tokens[1] = (tokens[1] + 1) % case.config.vocabulary_size
    other, _ = retro(case.params, case.config, tokens, None)
    assert np.array_equal(logits[0], other[0])


@FEW
@given(case=decoder_cases(any_biases=True), cuts=st.sets(st.integers(1, 11)))
def test_a_cache_decodes_the_logits_of_the_full_pass_for_any_segments(case, cuts):
    tokens, cache = case.tokens[0], Cache()
    parts = np.split(tokens, sorted(cut for cut in cuts if cut < len(tokens)))
    logits = np.concatenate([extend(case.params, case.config, cache, part, None) for part in parts])
    np.testing.assert_allclose(logits, retro(*case.arguments)[0][0], **EXACT)
    assert cache.length == len(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_grows_beyond_its_first_capacity(family):
    case = small_case(family, n=300, max_positions=300)
    cache = Cache()
    logits = [extend(case.params, case.config, cache, part, None) for part in np.split(case.tokens[0], [100, 250, 251])]
    np.testing.assert_allclose(np.concatenate(logits), retro(*case.arguments)[0][0], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_logits_of_a_segment_are_computed_if_asked_for(family):
    case = small_case(family)
    last = extend(case.params, case.config, Cache(), case.tokens[0], None, only_last=True)
    np.testing.assert_allclose(last, retro(*case.arguments)[0][0, -1:], **EXACT)


@settings(max_examples=50, deadline=None)
@given(
    base=st.sampled_from([2, 10_000.0, 1e6]),
    half=st.integers(1, 4),
    first=st.integers(0, 1000),
    seed=st.integers(0, 99),
)
def test_rotary_products_depend_on_the_distance_of_query_and_key_alone(base, half, first, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, 3, 2 * half)).repeat(6, axis=2)

    def products(first):
        turned_q, turned_k = (decoders.rotary(x, first, base)[0] for x in (q, k))
        return np.einsum("bihc,bjhc->bhij", turned_q, turned_k)

    # An angle of up to 1,000 radians is rounded by 1e-13.
    near = products(0)
    np.testing.assert_allclose(products(first), near, atol=1e-10)
    np.testing.assert_allclose(near[..., 1:, 1:], near[..., :-1, :-1], atol=1e-10)


def test_rotary_turns_a_pair_by_its_angle():
    x = np.array([1.0, 0, 0, 2]).reshape(1, 1, 1, 4)  # The pairs are (x_0, x_2) and (x_1, x_3).
    y, _ = decoders.rotary(x, 3, 100.0)
    by_hand = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(y.ravel(), by_hand, rtol=1e-14)


def repeated(array, case):
    """Columns of keys or values, one head for each query head."""
    groups, c = case.config.kv_heads, case.config.d_head
    heads = array.reshape(*array.shape[:-1], groups, c)
    return heads.repeat(case.config.n_heads // groups, axis=-2).reshape(*array.shape[:-1], -1)


@FEW
@given(case=decoder_cases(families=("Llama", "Qwen2"), any_biases=True))
def test_grouped_heads_equal_full_heads_with_copied_weights_and_collect_their_gradients(case):
    shared = ("w_k", "w_v", "b_k", "b_v")
    params = map_tree(lambda name, a: repeated(a, case) if name.endswith(shared) else a, case.params)
    full = replace(case, params=params, config=replace(case.config, n_kv_heads=case.config.n_heads))
    np.testing.assert_allclose(retro(*case.arguments)[0], retro(*full.arguments)[0], **EXACT)
    groups, c = case.config.kv_heads, case.config.d_head

    def summed(name, grad):
        if not name.endswith(shared):
            return grad
        return grad.reshape(*grad.shape[:-1], groups, -1, c).sum(axis=-2).reshape(*grad.shape[:-1], -1)

    expected = map_tree(summed, retro_loss(*full.loss_arguments)[1](1.0))
    assert_same_gradients(retro_loss(*case.loss_arguments)[1](1.0), expected, **SAME)


@oracle
@FEW
@given(case=decoder_cases())
def test_attention_maps_equal_those_of_transformers_head_by_head(port, case):
    maps = attention_maps(*case.arguments)
    expected = port.attentions(port.model(case.config, case.params), case.tokens)
    assert list(maps) == [f"layers.{p}.attention" for p in range(case.config.n_layers)]
    for ours, theirs in zip(maps.values(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **EXACT)


@FEW
@given(case=decoder_cases(any_biases=True))
def test_attention_maps_are_causal_and_their_rows_sum_to_1(case):
    batch, n = case.tokens.shape
    for weights in attention_maps(*case.arguments).values():
        assert weights.shape == (batch, case.config.n_heads, n, n)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)
        assert not np.triu(weights, k=1).any()


# Frozen parameters, dtypes, kernels


@FEW
@given(case=decoder_cases(any_biases=True), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_frozen_leaves_have_no_gradient_and_the_others_do_not_change(case, share):
    frozen = {name for name, _ in named_leaves(case.params) if case.rng.random() < share}
    grads, full = grads_of(case, trainable=lambda name: name not in frozen), grads_of(case)
    assert {name for name, grad in grads.items() if grad is None} == frozen
    for name in grads.keys() - frozen:
        np.testing.assert_allclose(grads[name], full[name], **EXACT, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pullback_of_a_frozen_model_makes_no_array_of_a_weights_size(family):
    wide = {"vocabulary_size": 20_000, "d_model": 48, "d_ffw": 8000, "n_heads": 6, "d_head": 8, "max_positions": 9000}
    case = small_case(family, n=2, n_layers=1, tie_readout=True, **wide)
    smallest = 8 * 48 * 8000  # bytes of W_in; the activations have 2 · 8,000 numbers, the logits 2 · 20,000

    def peak_of(trainable):
        _, vjp = retro_loss(*case.loss_arguments, trainable=trainable)
        tracemalloc.start()
        vjp(1.0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_of(lambda name: name == "norm") < smallest < peak_of(lambda name: name.endswith("w_in"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@FEW
@given(case=decoder_cases(any_biases=True))
def test_logits_loss_and_gradients_have_the_dtype_of_the_parameters(dtype, case):
    case = cast(case, dtype)
    config = replace(case.config, dropout=0.25)
    logits, vjp = retro(*case.arguments)
    loss, loss_vjp = retro_loss(case.params, config, case.tokens, case.targets, None, dropout_key=(1, 2))
    grads = [*named_leaves(vjp(np.ones_like(logits))), *named_leaves(loss_vjp(1.0))]
    dtypes = {"logits": logits.dtype, "loss": loss.dtype} | {name: grad.dtype for name, grad in grads}
    dtypes["cached"] = extend(case.params, case.config, Cache(), case.tokens[0], None).dtype
    assert {name for name, actual in dtypes.items() if actual != dtype} == set()


@pytest.mark.parametrize("kind", ["numba", pytest.param("c", marks=needs_c)])
@settings(max_examples=15, deadline=None)
@given(case=decoder_cases(any_biases=True))
def test_all_kinds_of_kernels_give_the_same_logits_and_gradients(kind, case):
    kernels.use("numpy")
    expected, gradients = retro(*case.arguments)[0], retro_loss(*case.loss_arguments)[1](1.0)
    kernels.use(kind)
    np.testing.assert_allclose(retro(*case.arguments)[0], expected, **EXACT)
    assert_same_gradients(retro_loss(*case.loss_arguments)[1](1.0), gradients, **SAME)


# Targets and padding


def by_hand(case, counted):
    """The mean of −log p over the targets that count."""
    logits, _ = retro(*case.arguments)
    nats = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, case.targets[..., None], axis=-1)[..., 0]
    return nats[counted].mean()


@FEW
@given(case=decoder_cases(any_biases=True))
def test_a_target_of_minus_1_does_not_count_and_one_of_0_does(case):
    loss, _ = retro_loss(*case.loss_arguments)
    np.testing.assert_allclose(loss, by_hand(case, case.targets >= 0), rtol=1e-9)


@FEW
@given(case=decoder_cases(any_biases=True))
def test_a_target_of_padding_does_not_count_if_the_model_has_padding(case):
    case.targets[0, 0] = 1  # at least one counts
    padded = replace(case, config=replace(case.config, padding_id=0))
    loss, _ = retro_loss(*padded.loss_arguments)
    np.testing.assert_allclose(loss, by_hand(padded, case.targets > 0), rtol=1e-9)


def test_without_a_target_the_loss_and_all_gradients_are_zero():
    case = small_case("Llama")
    loss, vjp = retro_loss(case.params, case.config, case.tokens, np.full_like(case.targets, -1), None)
    assert loss == 0
    assert not any(grad.any() for _, grad in named_leaves(vjp(1.0)))


# Sampling


def test_greedy_sampling_takes_the_largest_logit_of_the_full_pass():
    case = small_case("Llama", n=5)
    sampled, retrieved = generate(case.params, case.config, case.tokens[0], 8, temperature=0)
    tokens = list(case.tokens[0])
    for _ in range(8):
        tokens.append(int(retro(case.params, case.config, np.array([tokens]), None)[0][0, -1].argmax()))
    assert list(sampled) == tokens[5:]
    assert retrieved == []


def test_token_0_is_sampled_by_a_model_without_padding_and_never_by_one_with_padding_0():
    case = small_case("GPT-2", n=3, max_positions=300, padding_id=None)
    params = map_tree(lambda name, a: a * 0 if name == "embedding" else a, case.params)  # All tokens are as likely.
    for padding_id, occurs in ((None, True), (0, False)):
        sampled, _ = generate(params, replace(case.config, padding_id=padding_id), [1, 2], 200)
        assert (0 in sampled) == occurs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_several_parts_is_read_like_one_part(family, monkeypatch):
    case = small_case(family, n=20)
    whole, _ = generate(case.params, case.config, case.tokens[0], 4, temperature=0)
    monkeypatch.setattr("retro_np.generation.PROMPT_PART", 7)
    assert np.array_equal(generate(case.params, case.config, case.tokens[0], 4, temperature=0)[0], whole)


# Mistakes

TOO_LONG = {
    "retro": lambda case, tokens: retro(case.params, case.config, tokens, None),
    "retro_loss": lambda case, tokens: retro_loss(case.params, case.config, tokens, tokens, None),
    "hidden_states": lambda case, tokens: hidden_states(case.params, case.config, tokens, None),
    "attention_maps": lambda case, tokens: attention_maps(case.params, case.config, tokens, None),
    "extend": lambda case, tokens: extend(case.params, case.config, Cache(), tokens[0], None),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", TOO_LONG)
def test_a_text_longer_than_the_models_positions_is_refused_in_one_line(call, family):
    case = small_case(family, n=25, max_positions=24)
    with pytest.raises(UserError, match=r"^the model has 24 positions, not \d+: give it a shorter text$"):
        TOO_LONG[call](case, case.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_as_long_as_the_models_positions_is_read_and_sampled(family):
    case = small_case(family, n=24, max_positions=24)
    assert retro(*case.arguments)[0].shape == (2, 24, 13)
    for prompt in (5, 24):  # The last new token is not read, so it needs no position.
        assert len(generate(case.params, case.config, case.tokens[0, :prompt], 25 - prompt)[0]) == 25 - prompt


@pytest.mark.parametrize(
    ("prompt", "length", "advice"), [(5, 21, "a length of at most 20"), (25, 1, "a shorter prompt")]
)
def test_a_continuation_beyond_the_models_positions_is_refused_before_a_token_is_sampled(prompt, length, advice):
    case = small_case("GPT-2", n=prompt, max_positions=24)
    with pytest.raises(UserError, match=f"^the prompt has {prompt} tokens, and the model 24 positions: give {advice}$"):
        generate(case.params, case.config, case.tokens[0], length, on_token=pytest.fail)


VALID = {"vocabulary_size": 13, "d_model": 12, "d_ffw": 10, "n_heads": 6, "d_head": 4, "n_layers": 2}
BAD = [
    {"architecture": "retro"}, {"architecture": None}, {"architecture": "LLAMA"}, {"architecture": "a\nb"},
    {"architecture": ["llama"]}, {"cca_layers": (3,)}, {"n_kv_heads": 4}, {"n_kv_heads": 0}, {"n_kv_heads": 12},
    {"n_kv_heads": -2}, {"n_kv_heads": 2.0}, {"n_kv_heads": True}, {"n_kv_heads": "2"}, {"norm_eps": 0},
    {"norm_eps": -1e-5}, {"norm_eps": float("nan")}, {"norm_eps": float("inf")}, {"norm_eps": "1e-5"},
    {"norm_eps": None}, {"norm_eps": True}, {"norm_eps": 10**400}, {"rotary_base": 0.5},
    {"rotary_base": float("nan")}, {"rotary_base": float("inf")}, {"rotary_base": 10**400}, {"rotary_base": [2]},
    {"max_positions": 0}, {"max_positions": 2.5}, {"max_positions": None}, {"max_positions": 2**31},
    {"biases": ("w_x",)}, {"biases": "w_q"}, {"biases": None}, {"biases": 3}, {"biases": ("b_q",)}, {"biases": ([],)},
    {"biases": {"w_q": 1}}, {"d_head": 3}, {"padding_id": 13}, {"padding_id": -1}, {"padding_id": 0.5},
    {"padding_id": True}, {"vocabulary_size": 0}, {"dropout": 1}, {"n_layers": 0}, {"architecture": "x" * 10_000},
    {"biases": ("w_q",) * 1000 + ("\n",)},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=lambda change: f"{change}"[:40])
def test_a_value_that_no_decoder_has_is_refused_in_one_short_line_that_names_its_field(change):
    with pytest.raises(UserError) as error:
        DecoderConfig(**VALID | change)
    (name,) = change
    assert name in str(error.value)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"biases": ("w_o",)}, {"n_kv_heads": 3}, {"architecture": "gpt2"}, {"d_ffw": 9}])
def test_parameters_of_another_decoder_are_refused(change):
    case = small_case("Qwen2")
    with pytest.raises(UserError, match="use the model's config"):
        retro(case.params, replace(case.config, **change), case.tokens, None)


# The parameter tree


def test_smollm2_has_134_515_008_parameters():
    assert count_parameters(SMOLLM2, embeddings=True) == 134_515_008


@oracle
@FEW
@given(config=decoder_configs())
def test_a_decoder_has_as_many_parameters_as_in_transformers(port, config):
    with port.torch.device("meta"):
        model = port.empty(config)
    assert count_parameters(config, embeddings=True) == sum(p.numel() for p in model.parameters())


@oracle
def test_smollm2_has_as_many_parameters_as_in_transformers(port):
    with port.torch.device("meta"):
        model = port.empty(SMOLLM2)
    assert count_parameters(SMOLLM2, embeddings=True) == sum(p.numel() for p in model.parameters())


@FEW
@given(config=decoder_configs(any_biases=True))
def test_fresh_parameters_have_the_shapes_of_the_tree_and_a_finite_loss_near_that_of_guessing(config):
    params = init_params(config, np.random.default_rng(0))
    assert map_tree(lambda _, array: array.shape, params) == parameter_shapes(config)
    assert {array.dtype for _, array in named_leaves(params)} == {np.dtype(np.float32)}
    tokens = np.random.default_rng(1).integers(0, config.vocabulary_size, (2, 8))
    loss, _ = retro_loss(params, config, tokens, tokens, None)
    assert 0 < loss < 3 + np.log(config.vocabulary_size)


@FEW
@given(config=decoder_configs(any_biases=True))
def test_a_configuration_survives_json(config):
    assert DecoderConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_a_default_number_of_kv_heads_follows_n_heads_and_numpys_numbers_become_pythons():
    config = DecoderConfig(11, 9, 12, n_heads=4, d_head=4, n_layers=2)  # an odd width: rotary positions turn heads
    assert (config.kv_heads, replace(config, n_heads=6).kv_heads) == (4, 6)
    numbers = replace(config, n_kv_heads=np.int64(2), norm_eps=np.float64(1e-5), rotary_base=np.float32(1e4))
    assert json.loads(json.dumps(numbers.to_dict()))["n_kv_heads"] == 2
    assert replace(config, biases=("w_v", "w_q", "w_q")) == replace(config, biases=["w_q", "w_v"])
