"""Arrays of any kind: the functions give what they give for plain arrays, or refuse them in one line.

Ground truth: the same calls with contiguous arrays in native byte order.
"""

import numpy as np
import pytest

from retro_np import adamw_init, adamw_update, generate, hidden_states, init_params, kernels, retro, retro_loss
from retro_np.errors import UserError
from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.tree import map_tree, named_leaves

RNG = np.random.default_rng(0)
PARAMS = map_tree(lambda _, array: array.astype(np.float32), perturbed_params(CONFIG))
TOKENS, TARGETS = RNG.integers(1, CONFIG.vocabulary_size, (2, 2, 11))
NEIGHBOURS = RNG.integers(0, CONFIG.vocabulary_size, (2, 3, 2, 6))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def every_second(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


def backwards(array):
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


def unaligned(array):
    shifted = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


class Subclass(np.ndarray):
    """An array of a type of its own."""


def subclass(array):
    return array.view(Subclass)


LAYOUTS = [np.asfortranarray, read_only, every_second, backwards, unaligned, big_endian, subclass]
TOKEN_KINDS = [np.ndarray.tolist, *(lambda a, t=t: a.astype(t) for t in ("i1", "u1", "i2", "u4", ">i4", "u8"))]


def results(params, tokens, targets, neighbours):
    loss, vjp = retro_loss(params, CONFIG, tokens, targets, neighbours)
    logits, _ = retro(params, CONFIG, tokens, neighbours)
    hidden = hidden_states(params, CONFIG, tokens, neighbours)
    sample, _ = generate(params, CONFIG, np.asarray(tokens)[0], 5, temperature=0)
    return {"loss": loss, "logits": logits, "hidden": hidden, "sample": sample, "grads": vjp(1.0)}


PLAIN = dict(named_leaves(results(PARAMS, TOKENS, TARGETS, NEIGHBOURS)))


def assert_plain(found):
    for name, array in named_leaves(found):
        np.testing.assert_allclose(array, PLAIN[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["numpy", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_tokens_of_any_layout_give_what_plain_arrays_give(layout, kind):
    kernels.use(kind)
    params = map_tree(lambda _, array: layout(array), PARAMS)
    assert_plain(results(params, *map(layout, (TOKENS, TARGETS, NEIGHBOURS))))


@pytest.mark.parametrize("convert", TOKEN_KINDS)
def test_tokens_of_any_kind_of_integer_and_lists_give_what_int64_gives(convert):
    assert_plain(results(PARAMS, *map(convert, (TOKENS, TARGETS, NEIGHBOURS))))


def test_parameters_mapped_from_files_give_what_plain_arrays_give(tmp_path):
    def mapped(name, array):
        np.save(tmp_path / f"{name}.npy", array)
        return np.load(tmp_path / f"{name}.npy", mmap_mode="r")

    assert_plain(results(map_tree(mapped, PARAMS), TOKENS, TARGETS, NEIGHBOURS))


@pytest.mark.parametrize("layout", [np.asfortranarray, every_second, backwards, unaligned, big_endian])
def test_adamw_moves_parameters_of_any_layout_as_it_moves_plain_arrays(layout):
    grads = retro_loss(PARAMS, CONFIG, TOKENS, TARGETS, NEIGHBOURS)[1](1.0)
    moved = []
    for form in (np.copy, layout):
        params = map_tree(lambda _, array, form=form: form(array), PARAMS)
        state = adamw_init(params)
        for _ in range(2):
            adamw_update(params, map_tree(lambda _, array, form=form: form(array), grads), state, lr=1e-2)
        moved.append(params)
    for (name, plain), (_, other) in zip(*map(named_leaves, moved), strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.complex64, bool, object])
def test_parameters_that_are_not_float32_or_wider_are_refused_in_one_line(dtype):
    params = map_tree(lambda _, array: array.astype(dtype), init_params(CONFIG, np.random.default_rng(0)))
    for call in (
        lambda: retro(params, CONFIG, TOKENS, NEIGHBOURS),
        lambda: retro_loss(params, CONFIG, TOKENS, TARGETS, None),
        lambda: generate(params, CONFIG, [1, 2], 3),
    ):
        with pytest.raises(UserError, match=r"^parameter embedding is \w+: convert the parameters to float32 .*$"):
            call()


@pytest.mark.parametrize("tokens", [TOKENS.astype(float), TOKENS == 1, TOKENS.astype(str), TOKENS.astype(object)])
def test_tokens_that_are_not_integers_are_refused_in_one_line(tokens):
    for call in (
        lambda: retro(PARAMS, CONFIG, tokens, NEIGHBOURS),
        lambda: retro_loss(PARAMS, CONFIG, TOKENS, tokens, NEIGHBOURS),
        lambda: generate(PARAMS, CONFIG, tokens[0], 3),
    ):
        with pytest.raises(UserError, match=r"^[^\n]*integer[^\n]*$"):
            call()
