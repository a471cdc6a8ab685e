"""The nats of targets. Ground truth: PyTorch, and the former formulas, with the logits of a whole batch at once."""

import itertools

import numpy as np
import pytest
import torch
from support import small_config

from retro_np import DecoderConfig, init_params, retro
from retro_np.evaluation import likelihood
from retro_np.evaluation.bits_per_byte import nats_of, score_tokens, scored_tokens
from retro_np.evaluation.prepending import prepended
from retro_np.nn.model import hidden_states, readout
from retro_np.sequences import evaluation_windows, sequence_neighbours

DECODER = DecoderConfig(300, 24, 40, 4, 6, 2, n_kv_heads=2, max_positions=64, chunk_size=8)


@pytest.fixture(scope="module", params=[{}, {"cca_layers": (), "encoder": None}], ids=["RETRO", "baseline"])
def model(request, database):
    config = small_config(database, **request.param)
    return init_params(config, np.random.default_rng(0)), config


def whole(params, config, tokens, targets, neighbours=None):
    """The nats from the logits of all positions at once: the formula of versions up to 0.2.0."""
    return nats_of(retro(params, config, tokens, neighbours)[0], targets)


def test_figures_of_our_own_models_are_those_of_the_former_formula_bit_for_bit(model, database):
    params, config = model
    split = database.split("valid")

    def predict(window, tokens, targets):
        return (whole(params, config, tokens, targets, sequence_neighbours(database, split, window, 2)),)

    former, _ = scored_tokens(split, evaluation_windows(split, 32), predict, "")
    scored = score_tokens(params, config, database, sequence_length=32, stride=16)
    assert np.array_equal(scored.nats, former.nats)
    assert scored.nats.dtype == former.nats.dtype


def former_prepended(params, config, tokens, targets, neighbours, length):
    """`prepended_nats` as it was in version 0.2.0."""
    nats, (m, n) = np.zeros(tokens.shape), (config.chunk_size, tokens.shape[1])
    for u in range(-1, n // m):
        begin, end = max(0, (u + 1) * m - 1), min((u + 2) * m - 1, n)
        windows, prompts = np.flatnonzero((targets[:, begin:end] >= 0).any(axis=1)), []
        for b in windows:
            retrieved = neighbours[b, u, ::-1].reshape(-1) if u >= 0 else tokens[b, :0]
            retrieved = retrieved[retrieved != 0]
            prompts.append(np.concatenate([retrieved, tokens[b, :end][-(length - len(retrieved)) :]]))
        if prompts:
            padded = np.array(list(itertools.zip_longest(*prompts, fillvalue=0)), np.int64).T
            hidden = hidden_states(params, config, padded, None)
            read = np.stack([h[len(text) + begin - end : len(text)] for h, text in zip(hidden, prompts, strict=True)])
            nats[windows, begin:end] = nats_of(read @ readout(params, config), targets[windows, begin:end])
    return nats


def test_prepended_figures_of_our_own_models_are_those_of_the_former_formula_bit_for_bit(model, database):
    params, config = model
    split = database.split("valid")

    def predict(window, tokens, targets):
        neighbours = sequence_neighbours(database, split, window, 1)
        return (former_prepended(params, config, tokens, targets, neighbours, 32),)

    former, _ = scored_tokens(split, evaluation_windows(split, 32), predict, "")
    assert np.array_equal(prepended(params, config, database, k=1, sequence_length=32).nats, former.nats)


def batch(rng, config):
    tokens = rng.integers(0, config.vocabulary_size, (5, 24))
    targets = rng.integers(0, config.vocabulary_size, tokens.shape)
    targets[rng.random(tokens.shape) < 0.3] = -1
    return tokens, targets


@pytest.mark.parametrize("limit", [1, 24 * 40, 2000, 1 << 24])
def test_nats_of_a_decoder_do_not_depend_on_how_many_rows_are_computed_together(limit, monkeypatch):
    rng = np.random.default_rng(1)
    params, (tokens, targets) = init_params(DECODER, rng), batch(rng, DECODER)
    monkeypatch.setattr(likelihood, "MAX_NUMBERS", limit)
    nats, hidden = likelihood.token_nats(params, DECODER, tokens, targets)
    logits = torch.tensor(retro(params, DECODER, tokens, None)[0]).permute(0, 2, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none", ignore_index=-1)
    np.testing.assert_allclose(nats, expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden, hidden_states(params, DECODER, tokens, None), rtol=1e-5, atol=1e-5)


def test_no_array_of_a_decoders_evaluation_has_more_numbers_than_the_limit(monkeypatch):
    rng, sizes = np.random.default_rng(2), []
    params, (tokens, targets) = init_params(DECODER, rng), batch(rng, DECODER)
    for name in ("linear", "hidden_states"):
        function = getattr(likelihood, name)

        def watched(*arguments, function=function):
            result = function(*arguments)
            sizes.append((result[0] if isinstance(result, tuple) else result).size)
            return result

        monkeypatch.setattr(likelihood, name, watched)
    monkeypatch.setattr(likelihood, "MAX_NUMBERS", 2000)
    likelihood.token_nats(params, DECODER, tokens, targets)
    assert len(sizes) > 10
    assert max(sizes) <= 2000


def test_a_token_that_a_database_adds_is_no_error_for_a_decoder():
    params, rng = init_params(DECODER, np.random.default_rng(0)), np.random.default_rng(3)
    tokens, targets = batch(rng, DECODER)
    tokens[:, 20:], targets[:, 19:] = 301, -1  # behind the text
    nats, _ = likelihood.token_nats(params, DECODER, tokens, targets)
    expected, _ = likelihood.token_nats(params, DECODER, tokens[:, :20], targets[:, :20])
    np.testing.assert_allclose(nats[:, :20], expected, rtol=1e-5, atol=1e-5)
