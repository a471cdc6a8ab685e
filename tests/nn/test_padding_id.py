"""Ground truth: ids are names. With other names for the same tokens, padding among them, a model computes the same."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import MANY, Case, cases
from support import assert_same_gradients

from retro_np import EncoderConfig, RetroConfig, UserError, reference
from retro_np.generation import decode_tokens, generate, sample_token
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.checks import perturbed_params
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.incremental import Cache, extend, segments
from retro_np.nn.model import hidden_states, retro, retro_loss
from retro_np.tree import map_tree

TABLES = ("embedding", "encoder.embedding")  # one row for each token; the readout has one column for each
SIZES = {"vocabulary_size": 7, "d_model": 4, "d_ffw": 4, "n_heads": 1, "d_head": 2, "n_layers": 1}
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # BLAS and the loss may add a row's terms in another order


@dataclasses.dataclass
class Renamed:
    """A case with padding 0, and the same case in which token i is called names[i]."""

    case: Case
    other: Case
    names: np.ndarray


@st.composite
def renamed_cases(draw, retrieving: bool = False) -> Renamed:
    """Mostly, another token than the first is padding in the renamed case."""
    case = draw(cases(retrieving))
    names = np.array(draw(st.permutations(range(case.config.vocabulary_size))))
    return Renamed(case, renamed(case, names), names)


def renamed(case: Case, names: np.ndarray) -> Case:
    arrays = {name: names[getattr(case, name)] for name in ("tokens", "targets", "neighbours")}
    params = map_tree(lambda name, array: with_names(name, array, names), case.params)
    config = dataclasses.replace(case.config, padding_id=int(names[0]))
    return dataclasses.replace(case, config=config, params=params, **arrays)


def with_names(name: str, array: np.ndarray, names: np.ndarray) -> np.ndarray:
    if name in TABLES:
        return array[np.argsort(names)]
    return array[:, np.argsort(names)] if name == "readout" else array


def without_padding(case: Case) -> Case:
    """The same case for a model without padding: −1 in neighbours and targets in its place."""

    def absent(ids):
        return np.where(ids == case.config.padding_id, -1, ids)

    config = dataclasses.replace(case.config, padding_id=None)
    changed = {name: absent(getattr(case, name)) for name in ("targets", "neighbours")}
    return dataclasses.replace(case, config=config, **changed)


def loss_of(case: Case, **options):
    return retro_loss(case.params, case.config, case.tokens, case.targets, case.neighbours, **options)


@MANY
@given(pair=renamed_cases())
def test_other_names_of_the_tokens_change_no_hidden_state_by_a_bit(pair):
    assert np.array_equal(hidden_states(*pair.case.arguments), hidden_states(*pair.other.arguments))


@MANY
@given(pair=renamed_cases())
def test_other_names_of_the_tokens_give_the_logits_other_names(pair):
    logits, _ = retro(*pair.other.arguments)
    np.testing.assert_allclose(logits[..., pair.names], retro(*pair.case.arguments)[0], **ROUNDING)


@MANY
@given(pair=renamed_cases())
def test_other_names_of_the_tokens_leave_the_loss_and_give_the_gradients_other_names(pair):
    loss, vjp = loss_of(pair.other)
    expected, expected_vjp = loss_of(pair.case)
    np.testing.assert_allclose(loss, expected, **ROUNDING)
    gradients = map_tree(lambda name, array: with_names(name, array, pair.names), expected_vjp(1.0))
    assert_same_gradients(vjp(1.0), gradients, rtol=1e-8, floor=1e-12)


@MANY
@given(pair=renamed_cases())
def test_other_names_of_the_tokens_leave_what_each_attention_attends_to(pair):
    expected, maps = attention_maps(*pair.case.arguments), attention_maps(*pair.other.arguments)
    assert maps.keys() == expected.keys()
    for name, weights in maps.items():
        assert np.array_equal(weights, expected[name]), name


@MANY
@given(pair=renamed_cases())
def test_the_loop_reference_agrees_with_any_token_as_padding(pair):
    np.testing.assert_allclose(retro(*pair.other.arguments)[0], reference.retro(*pair.other.arguments), **ROUNDING)


@MANY
@given(pair=renamed_cases())
def test_the_loop_reference_agrees_without_padding(pair):
    case = without_padding(pair.other)
    np.testing.assert_allclose(retro(*case.arguments)[0], reference.retro(*case.arguments), **ROUNDING)


@MANY
@given(pair=renamed_cases())
def test_minus_1_in_neighbours_of_a_model_without_padding_equals_padding_to_the_bit(pair):
    case = without_padding(pair.other)
    assert np.array_equal(retro(*case.arguments)[0], retro(*pair.other.arguments)[0])


@MANY
@given(pair=renamed_cases())
def test_minus_1_in_a_model_without_padding_leaves_the_loss_and_the_gradients(pair):
    case = without_padding(pair.other)
    (loss, vjp), (expected, expected_vjp) = loss_of(case), loss_of(pair.other)
    assert loss == expected
    assert_same_gradients(vjp(1.0), expected_vjp(1.0), rtol=1e-8, floor=1e-12)


@MANY
@given(pair=renamed_cases())
def test_minus_1_as_a_target_equals_padding_as_a_target(pair):
    targets = np.where(pair.other.targets == pair.other.config.padding_id, -1, pair.other.targets)
    assert loss_of(dataclasses.replace(pair.other, targets=targets))[0] == loss_of(pair.other)[0]


@MANY
@given(pair=renamed_cases(retrieving=True))
def test_every_id_is_a_real_token_of_a_model_without_padding(pair):
    """Each token of the neighbours, and each target, has an effect, whatever its id. The target is the only one, since
    another one with the same probability would leave the mean as it is."""
    config = dataclasses.replace(pair.case.config, padding_id=None)
    case = dataclasses.replace(pair.case, config=config)
    first = int(np.argwhere(case.targets[0] > 0)[0, 0])
    for name, place in (("neighbours", (0, 0, 0, 0)), ("targets", (0, first))):
        if name == "neighbours" and config.retrieved_part == "F":
            place = (0, 0, 0, config.chunk_size)
        array = case.neighbours.copy() if name == "neighbours" else np.full_like(case.targets, -1)
        array[place] = 0
        zero = dataclasses.replace(case, **{name: array})
        array = array.copy()
        array[place] = -1
        missing = dataclasses.replace(case, **{name: array})
        assert loss_of(zero)[0] != loss_of(missing)[0]


def decoded(case: Case, choose, length: int = 7):
    """A continuation of the case's first row, whose chunks retrieve the case's neighbours in turn."""
    values = case.neighbours[0]

    def retrieve(number, chunk):
        return values[number % len(values)] if len(values) else None

    return decode_tokens(case.params, case.config, case.tokens[0], length, choose, retrieve)


@MANY
@given(pair=renamed_cases(retrieving=True), temperature=st.sampled_from([0, 1.0]))
def test_other_names_of_the_tokens_give_the_sampled_tokens_other_names(pair, temperature):
    def tokens_of(case):
        rng = np.random.default_rng(0)
        return decoded(case, lambda logits: sample_token(logits, rng, temperature, padding_id=case.config.padding_id))

    assert np.array_equal(tokens_of(pair.other), pair.names[tokens_of(pair.case)])


@pytest.mark.parametrize("padding_id", [0, 3, 6])
def test_padding_is_never_sampled_whatever_its_id(padding_id):
    config = RetroConfig(**SIZES, padding_id=padding_id)
    params = map_tree(lambda name, array: 0 * array if name == "readout" else array, perturbed_params(config))
    sampled, _ = generate(params, config, [1, 2], 100)  # Without padding, all tokens are as likely.
    assert set(sampled) == set(range(7)) - {padding_id}


@MANY
@given(pair=renamed_cases(), is_padded=st.booleans())
def test_a_cache_decodes_the_logits_of_the_full_pass_with_any_padding_and_with_none(pair, is_padded):
    case, cache, logits = pair.other if is_padded else without_padding(pair.other), Cache(), []
    tokens, m = case.tokens[0], case.config.chunk_size
    for count in segments(0, len(tokens), m):
        start = cache.length
        values = None if (start + 1) % m else case.neighbours[0, start // m]
        logits.append(extend(case.params, case.config, cache, tokens[start : start + count], values))
    np.testing.assert_allclose(np.concatenate(logits), retro(*case.arguments)[0][0], **ROUNDING)


@pytest.mark.parametrize("kind", [RetroConfig, DecoderConfig])
@pytest.mark.parametrize("padding_id", [7, -1, 2**70, 0.0, 1.5, "0", True, np.nan, (0,)], ids=repr)
def test_an_id_outside_the_vocabulary_or_no_integer_is_refused_as_padding(padding_id, kind):
    with pytest.raises(UserError, match="padding_id must be a whole number from 0 to 6, not"):
        kind(**SIZES, padding_id=padding_id)


@pytest.mark.parametrize("padding_id", [None, 0, 6, np.int64(3)], ids=repr)
def test_any_token_or_none_may_be_padding_and_survives_json(padding_id):
    config = RetroConfig(**SIZES, padding_id=padding_id)
    assert config.to_dict()["padding_id"] == padding_id
    assert type(config.padding_id) in (int, type(None))
    assert RetroConfig(**config.to_dict()) == config


def test_padding_is_0_unless_a_configuration_says_otherwise():
    assert RetroConfig(**SIZES).padding_id == 0
    assert DecoderConfig(**SIZES).padding_id is None


@pytest.mark.parametrize(("padding_id", "id_"), [(3, -1), (None, -2), (3, 7), (None, 7)])
def test_ids_that_are_neither_tokens_nor_padding_are_refused_in_neighbours(padding_id, id_):
    encoder = EncoderConfig(4, 4, 1, 2, 1, ())
    config = RetroConfig(**SIZES, cca_layers=(1,), chunk_size=2, encoder=encoder, padding_id=padding_id)
    neighbours = np.full((1, 1, 1, 4), id_)
    with pytest.raises(UserError, match=f"neighbours contain {id_}, which is not in the vocabulary"):
        retro(perturbed_params(config), config, np.ones((1, 2), int), neighbours)
