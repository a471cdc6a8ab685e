"""Ground truth: the curriculum's rules, checked token by token, and closed forms of the copying start."""

from dataclasses import replace
from statistics import mode

import numpy as np
import pytest

from retro_np import EncoderConfig, RetroConfig, init_params, retro
from retro_np.errors import UserError
from retro_np.nn.copying_start import COPY_SCALE
from retro_np.training.config import TrainingConfig
from retro_np.training.curriculum import MAX_NOISE, insert_oracle_neighbours, with_curriculum

CURRICULUM = TrainingConfig(steps=10, oracle_share=0.5, oracle_steps=8, retrieval_off=0.3, seed=3)


def batch(rng, sequences=4, chunks=6, k=2, m=8):
    tokens = rng.integers(1, 1000, (sequences, chunks * m))
    return tokens, rng.integers(1000, 2000, (sequences, chunks, k, 2 * m))


def test_an_oracle_neighbour_is_the_noised_and_shifted_chunk_with_its_continuation():
    rng = np.random.default_rng(0)
    m, agreements = 32, []
    tokens, neighbours = batch(rng, m=m)
    original = neighbours.copy()
    insert_oracle_neighbours(neighbours, tokens, 1.0, rng)
    changed = (neighbours != original).any(axis=-1)
    assert (changed.sum(axis=2) == 1).all()  # one neighbour of each chunk
    for b, u, j in zip(*np.nonzero(changed), strict=True):
        agreement = []
        for shift in range(-m // 2, m // 2 + 1):
            position = u * m + shift + np.arange(2 * m)
            inside = (position >= 0) & (position < tokens.shape[1])
            same = neighbours[b, u, j][inside] == tokens[b, position[inside]]
            padded = neighbours[b, u, j][~inside] == 0
            agreement.append(np.mean(same) if padded.all() else 0)
        agreements.append(max(agreement))
        assert np.isin(neighbours[b, u, j], [0, *tokens.reshape(-1)]).all()
    assert min(agreements) > 1 - MAX_NOISE - 0.35  # noise is drawn token by token
    assert np.mean(agreements) == pytest.approx(1 - MAX_NOISE / 2, abs=0.1)


def test_the_oracle_share_falls_to_zero_and_some_sequences_have_no_neighbours():
    rng = np.random.default_rng(1)
    tokens, neighbours = batch(rng, sequences=64)
    oracle_share, off = [], []
    for step in range(10):
        changed = with_curriculum(neighbours, tokens, CURRICULUM, step)
        empty = (changed == 0).all(axis=(1, 2, 3))
        off.append(empty.mean())
        oracle_share.append((changed != neighbours).any(axis=(2, 3))[~empty].mean())
    assert oracle_share[8] == oracle_share[9] == 0
    first_step = with_curriculum(neighbours, tokens, TrainingConfig(oracle_share=1.0, oracle_steps=1), 0)
    assert (first_step != neighbours).any(axis=(2, 3)).all()  # the first step has the full share
    assert oracle_share[0] == pytest.approx(0.5, abs=0.12)
    assert oracle_share[4] == pytest.approx(0.25, abs=0.12)
    assert np.mean(off) == pytest.approx(0.3, abs=0.08)
    assert np.array_equal(
        with_curriculum(neighbours, tokens, CURRICULUM, 2), with_curriculum(neighbours, tokens, CURRICULUM, 2)
    )
    assert with_curriculum(neighbours, tokens, TrainingConfig(), 0) is neighbours  # the default is the paper's training


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"retrieval_off": 1.5}, r"retrieval_off must be in \[0, 1\), not 1\.5"),
        ({"oracle_share": -0.1}, r"oracle_share must be in \[0, 1\], not -0\.1"),
        ({"oracle_share": float("nan")}, r"oracle_share must be in \[0, 1\], not nan"),
        ({"oracle_steps": -1}, "oracle_steps must be a whole number of at least 0, not -1"),
        ({"weight_decay": float("inf")}, r"weight_decay must be in \[0, 1000\], not inf"),
        ({"clip": 0}, "clip must be above 0 and finite, not 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
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
def test_settings_without_effect_are_refused(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        TrainingConfig(**wrong)


def test_oracle_neighbours_start_before_or_after_the_chunk_and_depend_on_the_seed():
    m = 8
    tokens = np.arange(1, 1 + 40 * 12 * m).reshape(40, -1)  # each token is its own position
    neighbours = np.zeros((40, 12, 2, 2 * m), np.int64)
    changed = [with_curriculum(neighbours, tokens, replace(CURRICULUM, seed=seed), 0) for seed in (3, 4)]
    assert not np.array_equal(*changed)
    starts = []
    inner = changed[0][:, 1:9]  # chunks whose copies stay within the sequence
    for b, u, j in zip(*np.nonzero(inner.any(axis=-1)), strict=True):
        begin = inner[b, u, j] - 1 - b * 12 * m - np.arange(2 * m)  # the start of the copy, according to each token
        starts.append(mode(begin.tolist()) - (u + 1) * m)
    assert set(starts) <= set(range(-m // 2, m // 2 + 1))
    assert len(set(starts)) > m // 2


def test_with_copying_start_fresh_cca_matches_equal_tokens():
    encoder = EncoderConfig(16, 32, 2, 8, 1, (1,))
    config = RetroConfig(60, 16, 32, 2, 8, 2, (2,), 4, encoder, copying_start=True)
    params = init_params(config, np.random.default_rng(0))
    cca, attention = params["layers"][1]["cca"], params["encoder"]["layers"][0]["attention"]
    assert np.array_equal(cca["w_k"], cca["w_q"])
    np.testing.assert_allclose(cca["w_o"], COPY_SCALE * cca["w_v"].T, rtol=1e-6)
    distances = np.arange(-20, 21)
    logits = sinusoids(distances, 16) @ attention["w_r"][:, :8] @ attention["v"][0]
    assert distances[np.argmax(logits)] == -1  # i − j: the next token
    assert not attention["w_q"][:, :8].any()  # position alone determines these logits
    assert np.array_equal(params["encoder"]["embedding"], params["embedding"])
    plain = init_params(replace(config, copying_start=False), np.random.default_rng(0))["layers"][1]["cca"]
    assert not np.array_equal(plain["w_k"], plain["w_q"])
    with pytest.raises(UserError, match="copying_start needs"):
        replace(config, share_embeddings=False, encoder=replace(encoder, d_model=8))


def sinusoids(distances, width):
    """R_δ by the formula of the paper's appendix B."""
    angles = distances[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_with_copying_start_a_fresh_model_reads_mainly_the_token_that_equals_the_current_one():
    encoder = EncoderConfig(64, 128, 2, 32, 1, (1,))
    config = RetroConfig(500, 64, 128, 2, 32, 1, (1,), 8, encoder, copying_start=True)
    rng = np.random.default_rng(0)
    params = init_params(config, rng)
    params["readout"] = params["embedding"].T.copy()  # shows which tokens are in the stream
    added = np.zeros(16)
    for _ in range(40):  # one draw is noisy, because random tokens resemble each other a little
        tokens, value = rng.integers(2, 500, (1, 16)), rng.permutation(np.arange(2, 500))[:16]
        value[5] = tokens[0, 10]  # position 10 reads this neighbour
        on = retro(params, config, tokens, value[None, None, None].repeat(2, axis=1))[0][0, 10]
        added += (on - retro(params, config, tokens, None)[0][0, 10])[value]
    assert set(np.argsort(-added)[:2]) == {5, 6}  # the matching token, and the next one, which the encoder added to it


def test_copying_start_changes_only_the_initial_parameters():
    encoder = EncoderConfig(16, 32, 2, 8, 1, (1,))
    config = RetroConfig(60, 16, 32, 2, 8, 2, (2,), 4, encoder)
    tokens = np.arange(1, 13)[None]
    params = init_params(config, np.random.default_rng(0))
    with_option = retro(params, replace(config, copying_start=True), tokens, None)[0]
    assert np.array_equal(with_option, retro(params, config, tokens, None)[0])
