"""Ground truth: matches by plain loops, the sums by hand, and `score`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_config

from retro_np import EncoderConfig, RetroConfig, init_params
from retro_np.evaluation.bits_per_byte import ScoredTokens, score
from retro_np.evaluation.copying import MAX_MATCH_TOKENS, _nats_with_copying, copy_bound, longest_matches
from retro_np.evaluation.knn_lm import MIXTURE_WEIGHTS


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 5), chunks=st.integers(1, 4), k=st.integers(1, 3))
def test_the_longest_match_equals_plain_loops(seed, m, chunks, k):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 4, (1, m * chunks))
    neighbours = rng.integers(0, 4, (1, chunks, k, 2 * m))
    lengths, copied = longest_matches(tokens, neighbours)
    for t in range(m * chunks):
        u = (t + 1) // m - 1  # the chunk whose neighbours position t reads
        best, continuations = 0, {-1}
        for j in range(k if u >= 0 else 0):
            value = neighbours[0, u, j]
            for end in range(2 * m - 1):
                run = 0
                while (
                    run < MAX_MATCH_TOKENS and run <= min(end, t) and value[end - run] != 0
                    and value[end - run] == tokens[0, t - run]
                ):  # fmt: skip
                    run += 1
                if value[end + 1] != 0 and run >= best and run > 0:
                    continuations = {int(value[end + 1])} | (continuations if run == best else set())
                    best = run
        assert lengths[0, t] == best
        assert copied[0, t] in continuations


def test_the_weight_of_a_copy_is_tuned_on_the_other_half_of_the_documents():
    scored, half = ScoredTokens(np.arange(40), np.full(40, 2), np.full(40, 2.0)), np.repeat([0, 1], 20)
    hit = half == 0  # copying is always right in the first half, and never in the second
    nats = _nats_with_copying(scored, hit, np.ones(40, np.int64), half)
    assert (nats[half == 0] == 2.0).all()  # The weight tuned on the second half is 0.
    np.testing.assert_allclose(nats[half == 1], 2.0 - np.log(1 - MIXTURE_WEIGHTS[-1]))  # tuned on the first half


def test_the_copy_bound_is_what_a_weight_on_the_copied_token_saves(database, monkeypatch):
    encoder = EncoderConfig(16, 16, 2, 8, 1)
    config = RetroConfig(database.vocabulary_size, 16, 16, 2, 8, 2, (2,), database.chunk_size, encoder)
    params = init_params(config, np.random.default_rng(0))
    monkeypatch.setattr("retro_np.evaluation.knn_lm.MIXTURE_WEIGHTS", np.array([0.0]))
    unmixed = copy_bound(params, config, database, sequence_length=32)
    assert unmixed["gain"] == unmixed["gain_by_length"] == pytest.approx(0)
    monkeypatch.setattr("retro_np.evaluation.knn_lm.MIXTURE_WEIGHTS", np.array([0.2]))
    mixed = copy_bound(params, config, database, sequence_length=32)
    # an untrained model gives each token 1 / V; where the copy is right, the mixture gives it 0.2 + 0.8 / V
    assert 0 < mixed["gain"] < 1
    right = sum(s * r for s, r in zip(mixed["positions"][1:], mixed["right"][1:], strict=True))
    matched = sum(mixed["positions"][1:])
    chance = np.exp(-np.log(database.vocabulary_size))
    saved = right * np.log((0.2 + 0.8 * chance) / chance) + (matched - right) * np.log(0.8)
    assert mixed["gain"] == pytest.approx(saved / np.log(database.vocabulary_size), abs=0.02)


@pytest.mark.parametrize("limit", [None, 105])  # a full window ends at 105, so its last target is beyond the limit
def test_the_copy_bound_starts_from_the_baselines_bits_and_copying_saves_some(database, limit):
    config = small_config(database, cca_layers=(), encoder=None)
    params = init_params(config, np.random.default_rng(0))
    bound = copy_bound(params, config, database, sequence_length=32, limit=limit)
    plain = score(params, config, database, k=0, sequence_length=32, stride=16, limit=limit)
    assert bound["bpb"] == pytest.approx(plain.bits_per_byte(), rel=1e-6)
    assert sum(bound["positions"]) == pytest.approx(1)
    # An untrained model knows nothing, and about a tenth of the copied tokens are right.
    assert 0 < bound["gain"] <= bound["gain_by_length"] + 0.02 < 1
    assert bound["right"][0] == 0
