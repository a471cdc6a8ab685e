"""Ground truth: the full forward pass."""

from dataclasses import replace

import numpy as np
import pytest
from decoder_models import memory_cases, small_case
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import RetroConfig, generate, init_params, retro
from retro_np.errors import UserError
from retro_np.generation import sample_token
from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.nn.incremental import Cache, extend, segments
from retro_np.tree import map_tree


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_generation_with_a_cache_equals_the_full_forward_pass(data):
    m = data.draw(st.sampled_from([1, 2, 3, 5]))
    change = data.draw(st.sampled_from([{}, {"retrieved_part": "F"}, {"cca_positions": False}, {"cca_layers": (1, 3)}]))
    config = type(CONFIG)(**vars(CONFIG) | {"chunk_size": m} | change)
    dtype, tolerance = data.draw(st.sampled_from([(np.float32, 2e-4), (np.float64, 1e-10)]))
    params = map_tree(lambda _, a: a.astype(dtype), perturbed_params(config, data.draw(st.integers(0, 99))))
    n, k = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, n)
    neighbours = rng.integers(0, 11, (n // m, k, 2 * m))
    neighbours[rng.random((n // m, k)) < 0.2] = 0
    full, _ = retro(params, config, tokens[None], neighbours[None])
    logits = decoded_in_pieces(data, params, config, tokens, neighbours)
    np.testing.assert_allclose(logits, full[0], atol=tolerance, rtol=tolerance)


def decoded_in_pieces(data, params, config, tokens, neighbours):
    """The logits of one sequence from a cache, in pieces of random lengths, like a prompt followed by single tokens."""
    n, m, cache, outs = len(tokens), config.chunk_size, Cache(), []
    while cache.length < n:
        count = min(data.draw(st.integers(1, n)), n - cache.length)
        for length in segments(cache.length, count, m):
            begin = cache.length
            completes = neighbours is not None and (begin + 1) % m == 0
            retrieved = neighbours[begin // m] if completes else None
            outs.append(extend(params, config, cache, tokens[begin : begin + length], retrieved))
    return np.concatenate(outs)


@pytest.mark.parametrize("form", ["own", "paper"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_decoder_of_others_that_reads_neighbours_generates_the_logits_of_the_full_forward_pass(form, data):
    case = data.draw(memory_cases(form, adapted=data.draw(st.booleans())))
    full, _ = retro(*case.arguments)
    logits = decoded_in_pieces(data, case.params, case.config, case.tokens[0], case.neighbours[0])
    np.testing.assert_allclose(logits, full[0], atol=1e-10, rtol=1e-10)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_decoder_whose_memory_is_off_generates_the_logits_of_the_full_forward_pass(data):
    case = data.draw(memory_cases())
    full, _ = retro(case.params, case.config, case.tokens, None)
    logits = decoded_in_pieces(data, case.params, case.config, case.tokens[0], None)
    np.testing.assert_allclose(logits, full[0], atol=1e-10, rtol=1e-10)


@given(data=st.data(), case=memory_cases(retrieving=True))
@settings(max_examples=25, deadline=None)
def test_a_chunk_that_retrieves_nothing_ends_what_the_chunk_before_it_retrieved(data, case):
    m, neighbours = case.config.chunk_size, case.neighbours.copy()
    neighbours[0, 1::2] = -1 if case.config.padding_id is None else case.config.padding_id
    full, _ = retro(case.params, case.config, case.tokens, neighbours)
    cache, outs = Cache(), []
    for length in segments(0, case.tokens.shape[1], m):
        begin = cache.length
        chunk = begin // m if (begin + 1) % m == 0 else 1
        retrieved = None if chunk % 2 else neighbours[0, chunk]
        outs.append(extend(case.params, case.config, cache, case.tokens[0, begin : begin + length], retrieved))
    np.testing.assert_allclose(np.concatenate(outs), full[0], atol=1e-10, rtol=1e-10)


def model_for(database, config):
    config = replace(config, vocabulary_size=database.vocabulary_size, chunk_size=database.chunk_size)
    return perturbed_params(config), config


@pytest.fixture(scope="module")
def model(database):
    return model_for(database, CONFIG)


@pytest.mark.parametrize("encoder", [None, CONFIG.encoder], ids=["own", "paper"])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_greedy_sampling_of_a_decoder_that_reads_takes_the_most_likely_tokens_of_the_full_pass(
    family, encoder, database
):
    config = small_case(family, max_positions=64, padding_id=0, cca_layers=(1, 2), rank=2, encoder=encoder).config
    params, config = model_for(database, config)
    prompt = np.array([5, 7, 9])
    new, retrieved = generate(params, config, prompt, 30, database=database, k=2, temperature=0)
    assert_greedy(params, config, np.concatenate([prompt, new]), len(prompt), retrieved)
    off, _ = generate(params, config, prompt, 30, temperature=0)
    assert off.tolist() != new.tolist()


def assert_greedy(params, config, sequence, start, retrieved):
    """Assert that each token from `start` on is the most likely one, given what each chunk before it retrieved."""
    neighbours = np.stack([item.values for item in retrieved])[: (len(sequence) - 1) // config.chunk_size]
    logits, _ = retro(params, config, sequence[None, :-1], neighbours[None])
    logits[..., 0] = -np.inf  # padding is never sampled
    assert logits[0, start - 1 :].argmax(axis=-1).tolist() == sequence[start:].tolist()
    assert [item.chunk for item in retrieved] == list(range(len(retrieved)))


def test_greedy_sampling_takes_the_most_likely_tokens_of_the_full_forward_pass(model, database):
    params, config = model
    prompt = np.array([5, 7, 9])
    new, retrieved = generate(params, config, prompt, 30, database=database, k=2, temperature=0)
    assert_greedy(params, config, np.concatenate([prompt, new]), len(prompt), retrieved)


def test_generate_retrieves_the_chunks_that_a_search_for_the_text_finds(model, database):
    params, config = model
    prompt = np.arange(2, 20)
    _, retrieved = generate(params, config, prompt, 4, database=database, k=3)
    m = config.chunk_size
    for item in retrieved[:2]:
        ids, distances = database.search(database.text(prompt[item.chunk * m : (item.chunk + 1) * m]), 3)
        assert item.ids.tolist() == ids.tolist()
        np.testing.assert_allclose(item.distances, distances, rtol=1e-5)
        assert np.array_equal(item.values, database.value(ids))


@pytest.mark.parametrize(
    "prompt", [[3], list(range(2, 12)), list(range(2, 290))], ids=["one token", "ten tokens", "long"]
)
def test_prompts_of_any_length_work(model, database, prompt):
    new, _ = generate(*model, prompt, 5, database=database)
    assert new.shape == (5,)
    assert ((new > 0) & (new < database.vocabulary_size)).all()


def test_a_seed_determines_the_sample_and_another_seed_changes_it(model):
    first, repeated, different = (generate(*model, [4, 5], 40, seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert first == repeated != different


def test_a_thousand_neighbours_per_chunk_work_and_missing_ones_are_padded(model, database):
    _, retrieved = generate(*model, list(range(2, 12)), 2, database=database, k=1000)
    assert (retrieved[0].ids >= 0).sum() == min(1000, database.n_chunks)


def draws(logits, count=4000, **settings):
    rng = np.random.default_rng(0)
    tokens = [sample_token(np.array(logits), rng, **settings) for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_sampling_follows_the_softmax_and_never_draws_padding():
    logits = np.log([0.5, 0.1, 0.3, 0.1])
    np.testing.assert_allclose(draws(logits), [0, 0.2, 0.6, 0.2], atol=0.03)


def test_a_low_temperature_sharpens_the_distribution():
    logits = np.log([0.5, 0.1, 0.3, 0.1])
    np.testing.assert_allclose(draws(logits, temperature=0.5), np.array([0, 1, 9, 1]) / 11, atol=0.03)
    assert draws(logits, temperature=0)[2] == 1


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    logits = np.log([0.2, 0.15, 0.4, 0.25])
    np.testing.assert_allclose(draws(logits, top_k=2), [0, 0, 0.4 / 0.65, 0.25 / 0.65], atol=0.03)
    # without padding the probabilities are 0.5, 0.3125 and 0.1875, so the second crosses 0.6
    np.testing.assert_allclose(draws(logits, top_p=0.6), [0, 0, 0.4 / 0.65, 0.25 / 0.65], atol=0.03)
    assert draws(logits, top_p=1e-9)[2] == 1


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "at least one integer token"), ([[1]], {}, "at least one integer token"),
        ([1.5], {}, "at least one integer token"), ([10**6], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"), ([1], {"k": -1}, "k must be from 0 to 1,024 neighbours"),
        ([1], {"temperature": -1}, "temperature must be at least 0 and finite, not -1"),
        ([1], {"temperature": float("inf")}, "temperature must be at least 0 and finite, not inf"),
        ([1], {"top_p": 0}, r"top_p must be in \(0, 1\], not 0"), ([1], {"top_k": 0}, "top_k must be at least 1"),
        ([1], {"top_p": 1.5}, r"top_p must be in \(0, 1\], not 1\.5"),
        ([1], {"k": 10**8}, "k must be from 0 to 1,024 neighbours per chunk, not 100,000,000"),
    ],
    ids=str,
)  # fmt: skip
def test_a_prompt_or_setting_out_of_range_is_refused(model, prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(*model, prompt, 3, **settings)


def test_a_database_with_another_chunk_size_is_refused(database):
    config = RetroConfig(database.vocabulary_size, 4, 4, 1, 2, 1, (), database.chunk_size + 1)
    with pytest.raises(ValueError, match="chunk_size"):
        generate(init_params(config, np.random.default_rng(0)), config, [2], 1, database=database)
