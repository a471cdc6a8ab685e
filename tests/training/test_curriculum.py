"""Ground truth: the rules of lending, checked token by token; the matches by plain loops; the sums by hand."""

from dataclasses import replace
from statistics import mode

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_config

from retro_np import EncoderConfig, RetroConfig, init_params, retro
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import score
from retro_np.evaluation.copying import LONGEST, WEIGHTS, _tuned, copy_bound, longest_matches
from retro_np.parameters import COPIED
from retro_np.training.config import TrainingConfig
from retro_np.training.curriculum import MAX_NOISE, insert_oracle_neighbours, with_curriculum

LENT = TrainingConfig(steps=10, oracle_share=0.5, oracle_steps=8, retrieval_off=0.3, seed=3)


def batch(rng, sequences=4, chunks=6, k=2, m=8):
    tokens = rng.integers(1, 1000, (sequences, chunks * m))
    return tokens, rng.integers(1000, 2000, (sequences, chunks, k, 2 * m))


def test_what_is_lent_is_the_chunk_and_what_follows_noised_and_shifted():
    rng = np.random.default_rng(0)
    m, agreements = 32, []
    tokens, neighbours = batch(rng, m=m)
    before = neighbours.copy()
    insert_oracle_neighbours(neighbours, tokens, 1.0, rng)
    changed = (neighbours != before).any(axis=-1)
    assert (changed.sum(axis=2) == 1).all()  # one neighbour of each chunk
    for b, u, j in zip(*np.nonzero(changed), strict=True):
        agreement = []
        for shift in range(-m // 2, m // 2 + 1):
            place = u * m + shift + np.arange(2 * m)
            inside = (place >= 0) & (place < tokens.shape[1])
            same = neighbours[b, u, j][inside] == tokens[b, place[inside]]
            beyond = neighbours[b, u, j][~inside] == 0
            agreement.append(np.mean(same) if beyond.all() else 0)
        agreements.append(max(agreement))
        assert np.isin(neighbours[b, u, j], [0, *tokens.reshape(-1)]).all()
    assert min(agreements) > 1 - MAX_NOISE - 0.35  # noise is drawn token by token
    assert np.mean(agreements) == pytest.approx(1 - MAX_NOISE / 2, abs=0.1)


def test_the_share_falls_to_none_and_some_sequences_have_no_neighbours():
    rng = np.random.default_rng(1)
    tokens, neighbours = batch(rng, sequences=64)
    oracle_share, off = [], []
    for step in range(10):
        seen = with_curriculum(neighbours, tokens, LENT, step)
        empty = (seen == 0).all(axis=(1, 2, 3))
        off.append(empty.mean())
        oracle_share.append((seen != neighbours).any(axis=(2, 3))[~empty].mean())
    assert oracle_share[8] == oracle_share[9] == 0
    once = with_curriculum(neighbours, tokens, TrainingConfig(oracle_share=1.0, oracle_steps=1), 0)
    assert (once != neighbours).any(axis=(2, 3)).all()  # the first step has the whole share
    assert oracle_share[0] == pytest.approx(0.5, abs=0.12)
    assert oracle_share[4] == pytest.approx(0.25, abs=0.12)
    assert np.mean(off) == pytest.approx(0.3, abs=0.08)
    assert np.array_equal(with_curriculum(neighbours, tokens, LENT, 2), with_curriculum(neighbours, tokens, LENT, 2))
    assert with_curriculum(neighbours, tokens, TrainingConfig(), 0) is neighbours  # the paper's training


@pytest.mark.parametrize(
    "wrong", [{"retrieval_off": 1.5}, {"oracle_share": -0.1}, {"oracle_steps": -1}, {"oracle_share": float("nan")}]
)
def test_a_share_is_from_0_to_1(wrong):
    with pytest.raises(UserError, match=r"in \[0, 1[\])]"):
        TrainingConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"oracle_share": 0.5}, "go together"), ({"oracle_steps": 5}, "go together"),
        ({"retrieval_off": 1.0}, r"in \[0, 1\)"),
        ({"neighbours": 0, "retrieval_off": 0.5}, "have no effect"),
        ({"neighbours": 0, "oracle_share": 0.5, "oracle_steps": 3}, "have no effect"),
    ],
)  # fmt: skip
def test_options_of_training_that_would_do_nothing_are_refused(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        TrainingConfig(**wrong)


def test_what_is_lent_begins_before_and_behind_the_chunk_and_at_another_place_under_another_seed():
    m = 8
    tokens = np.arange(1, 1 + 40 * 12 * m).reshape(40, -1)  # a token says where it stands
    neighbours = np.zeros((40, 12, 2, 2 * m), np.int64)
    seen = [with_curriculum(neighbours, tokens, replace(LENT, seed=seed), 0) for seed in (3, 4)]
    assert not np.array_equal(*seen)
    starts = []
    inner = seen[0][:, 1:9]  # chunks that no copy of leaves the sequence
    for b, u, j in zip(*np.nonzero(inner.any(axis=-1)), strict=True):
        begin = inner[b, u, j] - 1 - b * 12 * m - np.arange(2 * m)  # where the copy would begin, token by token
        starts.append(mode(begin.tolist()) - (u + 1) * m)
    assert set(starts) <= set(range(-m // 2, m // 2 + 1))
    assert len(set(starts)) > m // 2


def test_cca_begins_by_matching_equal_tokens_where_that_is_asked_for():
    encoder = EncoderConfig(16, 32, 2, 8, 1, (1,))
    config = RetroConfig(60, 16, 32, 2, 8, 2, (2,), 4, encoder, copying_start=True)
    params = init_params(config, np.random.default_rng(0))
    cca, attention = params["layers"][1]["cca"], params["encoder"]["layers"][0]["attention"]
    assert np.array_equal(cca["w_k"], cca["w_q"])
    np.testing.assert_allclose(cca["w_o"], COPIED * cca["w_v"].T, rtol=1e-6)
    distances = np.arange(-20, 21)
    logits = sinusoids(distances, 16) @ attention["w_r"][:, :8] @ attention["v"][0]
    assert distances[np.argmax(logits)] == -1  # i − j: the next token
    assert not attention["w_q"][:, :8].any()  # by position alone
    assert np.array_equal(params["encoder"]["embedding"], params["embedding"])
    plain = init_params(replace(config, copying_start=False), np.random.default_rng(0))["layers"][1]["cca"]
    assert not np.array_equal(plain["w_k"], plain["w_q"])
    with pytest.raises(UserError, match="copying_start needs"):
        replace(config, share_embeddings=False, encoder=replace(encoder, d_model=8))


def sinusoids(distances, width):
    """R_δ as the paper's appendix B has it, here by its formula."""
    angles = distances[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_a_fresh_model_that_begins_by_copying_reads_most_where_its_token_stands():
    encoder = EncoderConfig(64, 128, 2, 32, 1, (1,))
    config = RetroConfig(500, 64, 128, 2, 32, 1, (1,), 8, encoder, copying_start=True)
    rng = np.random.default_rng(0)
    params = init_params(config, rng)
    params["readout"] = params["embedding"].T.copy()  # shows which tokens are in the stream
    added = np.zeros(16)
    for _ in range(40):  # one draw's sum is noisy: each token looks a little like others
        tokens, value = rng.integers(2, 500, (1, 16)), rng.permutation(np.arange(2, 500))[:16]
        value[5] = tokens[0, 10]  # position 10 reads this neighbour
        on = retro(params, config, tokens, value[None, None, None].repeat(2, axis=1))[0][0, 10]
        added += (on - retro(params, config, tokens, None)[0][0, 10])[value]
    assert set(np.argsort(-added)[:2]) == {5, 6}  # the token itself, and its shadow: the one behind it


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 5), chunks=st.integers(1, 4), k=st.integers(1, 3))
def test_the_longest_match_is_the_one_that_loops_find(seed, m, chunks, k):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 4, (1, m * chunks))
    neighbours = rng.integers(0, 4, (1, chunks, k, 2 * m))
    lengths, copied = longest_matches(tokens, neighbours)
    for t in range(m * chunks):
        u = (t + 1) // m - 1  # the chunk whose neighbours position t reads
        best = 0
        behind = {0}
        for j in range(k if u >= 0 else 0):
            value = neighbours[0, u, j]
            for end in range(2 * m - 1):
                run = 0
                while (
                    run < LONGEST and run <= min(end, t) and value[end - run] != 0
                    and value[end - run] == tokens[0, t - run]
                ):  # fmt: skip
                    run += 1
                if value[end + 1] != 0 and run >= best and run > 0:
                    behind = {int(value[end + 1])} | (behind if run == best else set())
                    best = run
        assert lengths[0, t] == best
        assert copied[0, t] in behind


def test_a_copys_weight_is_tuned_on_the_other_half_of_the_documents():
    nats, half = np.full(40, 2.0), np.repeat([0, 1], 20)
    hit = half == 0  # copying is always right in one half, and never in the other
    found = _tuned(nats, hit, np.ones(40, np.int64), half)
    assert (found[half == 0] == nats[half == 0]).all()  # the other half says: never copy
    np.testing.assert_allclose(found[half == 1], 2.0 - np.log(1 - WEIGHTS[-1]))  # and this one: always


def test_the_copy_bound_is_what_a_weight_on_the_copied_token_saves(database, monkeypatch):
    encoder = EncoderConfig(16, 16, 2, 8, 1)
    config = RetroConfig(database.vocabulary_size, 16, 16, 2, 8, 2, (2,), database.chunk_size, encoder)
    params = init_params(config, np.random.default_rng(0))
    monkeypatch.setattr("retro_np.evaluation.copying.WEIGHTS", np.array([0.0]))
    nothing = copy_bound(params, config, database, sequence_length=32)
    assert nothing["gain"] == nothing["gain_by_length"] == pytest.approx(0)
    monkeypatch.setattr("retro_np.evaluation.copying.WEIGHTS", np.array([0.2]))
    some = copy_bound(params, config, database, sequence_length=32)
    # a model that knows nothing pays log2 V a token; where the copy is right it pays for 0.2 + 0.8 / V instead
    assert 0 < some["gain"] < 1
    right = sum(s * r for s, r in zip(some["positions"][1:], some["right"][1:], strict=True))
    matched = sum(some["positions"][1:])
    chance = np.exp(-np.log(database.vocabulary_size))
    saved = right * np.log((0.2 + 0.8 * chance) / chance) + (matched - right) * np.log(0.8)
    assert some["gain"] == pytest.approx(saved / np.log(database.vocabulary_size), abs=0.02)


def test_the_copy_bound_starts_from_the_baselines_bits_and_weights_save_some(database):
    config = small_config(database, cca_layers=(), encoder=None)
    params = init_params(config, np.random.default_rng(0))
    found = copy_bound(params, config, database, sequence_length=32)
    plain = score(params, config, database, k=0, sequence_length=32, stride=16)
    assert found["bpb"] == pytest.approx(plain.bits_per_byte(), rel=1e-6)
    assert sum(found["positions"]) == pytest.approx(1)
    # an untrained model knows nothing, and a tenth of the tokens behind a match is right
    assert 0 < found["gain"] <= found["gain_by_length"] + 0.02 < 1
    assert found["right"][0] == 0


def test_a_model_without_copying_start_is_the_papers_to_the_bit():
    encoder = EncoderConfig(16, 32, 2, 8, 1, (1,))
    config = RetroConfig(60, 16, 32, 2, 8, 2, (2,), 4, encoder)
    tokens = np.arange(1, 13)[None]
    params = init_params(config, np.random.default_rng(0))
    named = retro(params, replace(config, copying_start=True), tokens, None)[0]
    assert np.array_equal(named, retro(params, config, tokens, None)[0])  # an option of the start alone
