"""Ground truth: PyTorch's AdamW, closed forms, and uninterrupted runs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TRAINING, all_bytes, small_config

from retro_np import EncoderConfig, adamw_init, adamw_update, init_params, load_params, retro, save_params
from retro_np.checkpoint import load_checkpoint, read_meta, read_tensors, save_checkpoint, write_tensors
from retro_np.errors import UserError
from retro_np.files import locked
from retro_np.optim import clip_by_global_norm
from retro_np.parameters import is_retrieval
from retro_np.sequences import tokens_and_targets
from retro_np.training import loop
from retro_np.training.batches import sequence_rows, training_batch
from retro_np.training.config import learning_rate
from retro_np.training.loop import loss_and_gradients, read_log, retrofit, train
from retro_np.tree import map_tree, named_leaves


@pytest.mark.oracle
def test_adamw_takes_the_same_steps_as_pytorchs():
    import torch

    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((5, 4)), "norm": rng.standard_normal(4)}
    reference = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in params.items()}
    optimiser = torch.optim.AdamW(
        [{"params": [reference["w"]], "weight_decay": 0.1}, {"params": [reference["norm"]], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    state = adamw_init(params)
    for _ in range(20):
        grads = {name: rng.standard_normal(array.shape) for name, array in params.items()}
        adamw_update(params, grads, state, lr=0.01)
        for name, grad in grads.items():
            reference[name].grad = torch.tensor(grad)
        optimiser.step()
    for name, array in params.items():
        np.testing.assert_allclose(array, reference[name].detach().numpy(), rtol=1e-12)


def test_frozen_parameters_are_neither_moved_nor_decayed_nor_tracked():
    params = {"a": np.ones((2, 2), np.float32), "b": np.ones((2, 2), np.float32)}
    state = adamw_init(params, lambda name: name == "b")
    assert state["m"]["a"] is None
    adamw_update(params, {"a": None, "b": np.ones((2, 2), np.float32)}, state, lr=0.1)
    assert np.array_equal(params["a"], np.ones((2, 2)))
    assert not np.any(params["b"] == 1)
    assert params["b"].dtype == np.float32


def test_the_schedule_warms_up_from_1e_7_and_ends_at_a_tenth_of_the_peak():
    rates = [learning_rate(step, peak=2e-4, warmup=750, steps=5000) for step in range(5000)]
    assert rates[0] == 1e-7
    assert rates[750] == max(rates) == 2e-4
    assert rates[-1] == pytest.approx(2e-5)
    assert all(np.diff(rates[:751]) > 0)
    assert all(np.diff(rates[750:]) <= 0)
    assert rates[750 + 2125] == pytest.approx(2e-4 * 0.55, rel=1e-3)  # half-way through the cosine


def test_clipping_scales_large_gradients_to_the_limit_and_does_not_change_small_ones():
    grads = {"a": np.full(4, 3.0), "b": [np.full((2, 2), 4.0), None]}
    assert clip_by_global_norm(grads, 1.0) == pytest.approx(10.0)
    assert np.sqrt((grads["a"] ** 2).sum() + (grads["b"][0] ** 2).sum()) == pytest.approx(1.0)
    original = grads["a"].copy()
    clip_by_global_norm(grads, 2.0)
    assert np.array_equal(grads["a"], original)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_visits_each_chunk_once_except_for_the_remainder(n_rows, length, batch, seed):
    per_epoch = max(1, n_rows // length)
    steps = -(-per_epoch // batch)
    rows = np.concatenate([sequence_rows(n_rows, length, batch, seed, step) for step in range(steps)])[:per_epoch]
    visited = rows[rows >= 0]
    assert len(np.unique(visited)) == len(visited) == min(n_rows, per_epoch * length)


def test_targets_are_the_next_tokens_of_the_same_document(database):
    split = database.split("train")
    rows = sequence_rows(len(split.tokens), 4, 6, 0, 0)
    tokens, targets = tokens_and_targets(split, rows)
    m = database.chunk_size
    for b in range(len(rows)):
        for t in range(4 * m):
            row, i = rows[b, t // m], t % m
            next_row, j = (row, i + 1) if i + 1 < m else (row + 1, 0)
            same = next_row < len(split.tokens) and split.documents[[row]] == split.documents[[next_row]]
            expected = int(split.tokens[[next_row]][0, j]) if same else 0
            assert tokens[b, t] == split.tokens[[row]][0, i]
            assert targets[b, t] == expected


def test_a_step_in_micro_batches_equals_a_step_in_one_batch(database):
    config = small_config(database)
    params = map_tree(lambda _, a: a.astype(np.float64), init_params(config, np.random.default_rng(0)))
    batch = training_batch(database, database.split("train"), 2, sequence_length=32, batch_size=4, seed=0, step=0)
    expected_loss, expected = loss_and_gradients(params, config, batch)
    for parts in (2, 4):
        loss, grads = loss_and_gradients(params, config, batch, micro_batches=parts)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        for (name, expected_grad), (_, grad) in zip(named_leaves(expected), named_leaves(grads), strict=True):
            np.testing.assert_allclose(expected_grad, grad, rtol=1e-9, atol=1e-13, err_msg=name)


def test_training_lowers_the_loss(database, tmp_path):
    train(database, small_config(database), replace(TRAINING, steps=40), tmp_path)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def interrupt_training(monkeypatch, database, config, training, out):
    """Stop a run in its sixth step, as Ctrl-C does; its checkpoint then holds step 3."""
    steps = []

    def stop_in_step_six(*arguments, **settings):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(1)
        return adamw_update(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "adamw_update", stop_in_step_six)
        with pytest.raises(KeyboardInterrupt):
            train(database, config, training, out)
    assert load_checkpoint(out / "checkpoint.safetensors")[1]["step"] == 3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(database, tmp_path, monkeypatch, dropout):
    config = small_config(database, dropout=dropout)
    train(database, config, TRAINING, tmp_path / "uninterrupted")
    interrupt_training(monkeypatch, database, config, TRAINING, tmp_path / "resumed")
    train(database, config, TRAINING, tmp_path / "resumed")
    assert all_bytes(tmp_path / "resumed") == all_bytes(tmp_path / "uninterrupted")
    assert [line["step"] for line in read_log(tmp_path / "resumed")] == list(range(8))


def test_a_checkpoint_with_the_old_names_of_settings_resumes_to_the_same_bytes(database, tmp_path, monkeypatch):
    config, training = small_config(database), replace(TRAINING, oracle_share=0.5, oracle_steps=6)
    train(database, config, training, tmp_path / "uninterrupted")
    interrupt_training(monkeypatch, database, config, training, tmp_path / "old")
    path = tmp_path / "old" / "checkpoint.safetensors"
    tensors, meta = read_tensors(path)
    stored = meta["run"]["training"]
    stored |= {"lent": stored.pop("oracle_share"), "lent_steps": stored.pop("oracle_steps")}
    write_tensors(path, tensors, meta)
    assert "oracle_share" not in read_meta(path)["run"]["training"]
    with pytest.raises(UserError, match=r"oracle_share = 0\.5, and now it is 0\.25"):
        train(database, config, replace(training, oracle_share=0.25), tmp_path / "old")
    train(database, config, training, tmp_path / "old")
    assert all_bytes(tmp_path / "old") == all_bytes(tmp_path / "uninterrupted")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from support import TRAINING, small_config
from dataclasses import replace
from retro_np import Database
from retro_np.training.loop import train
database = Database.open({database!r})
train(database, small_config(database), replace(TRAINING, steps=60, checkpoint_every=1), {out!r})
"""


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bytes(database, tmp_path):
    def start(out):
        script = SCRIPT.format(tests=str(Path(__file__).parents[1]), database=str(database.path), out=str(out))
        return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)

    def steps(out):
        return len((out / "log.jsonl").read_bytes().splitlines()) if (out / "log.jsonl").exists() else 0

    assert start(tmp_path / "uninterrupted").wait(timeout=120) == 0
    for n_steps in (1, 17, 40):
        process = start(tmp_path / "killed")
        while process.poll() is None and steps(tmp_path / "killed") < n_steps:
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    last = start(tmp_path / "killed")
    assert last.wait(timeout=120) == 0, last.stderr.read().decode()
    assert all_bytes(tmp_path / "killed") == all_bytes(tmp_path / "uninterrupted")


def test_a_folder_with_a_different_run_is_refused_and_the_difference_is_named(database, tmp_path):
    train(database, small_config(database), replace(TRAINING, steps=1), tmp_path)
    with pytest.raises(UserError, match=r"learning_rate = 0\.01, and now it is 0\.5"):
        train(database, small_config(database), replace(TRAINING, steps=1, learning_rate=0.5), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(
    database, tmp_path, monkeypatch
):
    def broken(params, *arguments, **settings):
        loss, grads = gradients(params, *arguments, **settings)
        calls.append(1)
        return (float("nan"), grads) if len(calls) == 5 else (loss, grads)

    calls, gradients = [], loop.loss_and_gradients
    monkeypatch.setattr(loop, "loss_and_gradients", broken)
    with pytest.raises(UserError, match="step 4: the loss is nan"):
        train(database, small_config(database), TRAINING, tmp_path)
    params, state, _, _ = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["step"] == 3
    assert all(np.isfinite(array).all() for _, array in named_leaves(params))


def test_retrofit_trains_only_cca_and_encoder_and_equals_the_baseline_with_retrieval_off(database, tmp_path):
    baseline_config = small_config(database, cca_layers=(), encoder=None)
    baseline_params = train(database, baseline_config, TRAINING, tmp_path / "baseline")
    baseline_params = map_tree(lambda _, array: array.copy(), baseline_params)
    encoder = EncoderConfig(8, 16, 2, 4, 1, (1,))
    params, config = retrofit(baseline_params, baseline_config, (2, 3), encoder, np.random.default_rng(1))
    initial = {name: array.copy() for name, array in named_leaves(params)}
    train(database, config, TRAINING, tmp_path / "fit", begin_from=(params, "baseline"), trainable=is_retrieval)
    retro_params, _ = load_params(tmp_path / "fit" / "checkpoint.safetensors")
    for name, array in named_leaves(retro_params):
        assert np.array_equal(array, initial[name]) != is_retrieval(name), name
    tokens, _, neighbours = training_batch(
        database, database.split("train"), 2, sequence_length=32, batch_size=2, seed=0, step=0
    )
    off, _ = retro(retro_params, config, tokens, None)
    assert np.array_equal(off, retro(baseline_params, baseline_config, tokens, None)[0])
    assert not np.array_equal(off, retro(retro_params, config, tokens, neighbours)[0])


def test_a_model_with_a_different_vocabulary_size_is_refused(database, tmp_path):
    with pytest.raises(UserError, match="vocabulary_size 77, and the database"):
        train(database, small_config(database, vocabulary_size=77), TRAINING, tmp_path)


def test_a_sequence_length_that_is_not_a_multiple_of_the_chunk_size_is_refused(database, tmp_path):
    with pytest.raises(UserError, match="sequence_length must be a multiple of the chunk size, 8, not 30"):
        train(database, small_config(database), replace(TRAINING, sequence_length=30), tmp_path)


def test_every_run_writes_its_configuration(database, tmp_path):
    train(database, small_config(database), replace(TRAINING, steps=1), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model"]["n_layers"] == 3
    assert written["training"]["steps"] == 1
    assert written["data"]["database"] == database.manifest["sha256"]


def test_two_simultaneous_runs_in_one_folder_are_refused(database, tmp_path):
    with locked(tmp_path, "training run"), pytest.raises(UserError, match="in use by another training run"):
        train(database, small_config(database), TRAINING, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_training_does_not_change_the_arrays_that_it_starts_from(database, tmp_path):
    config = small_config(database)
    params = init_params(config, np.random.default_rng(0))
    copies = map_tree(lambda _, array: array.copy(), params)
    train(database, config, replace(TRAINING, steps=1), tmp_path, begin_from=(params, "fresh"))
    for (name, array), (_, copy) in zip(named_leaves(params), named_leaves(copies), strict=True):
        assert np.array_equal(array, copy), name


def test_a_run_with_different_frozen_weights_is_refused(database, tmp_path):
    train(database, small_config(database), replace(TRAINING, steps=1), tmp_path, trainable=lambda name: name != "norm")
    with pytest.raises(UserError, match="frozen"):
        train(database, small_config(database), replace(TRAINING, steps=1), tmp_path)


def test_adamw_matches_gradients_by_name_and_refuses_wrong_gradients_before_it_changes_anything():
    params = {"a": np.ones((2, 2)), "b": np.ones((2, 2))}
    state = adamw_init(params)
    for wrong in ({"a": np.ones((2, 2))}, {"a": np.ones((2, 2)), "b": np.ones(2)}):
        with pytest.raises(UserError, match="b: gradient and moments must"):
            adamw_update(params, wrong, state, lr=0.1)
    assert state["step"] == 0
    adamw_update(params, {"b": np.zeros((2, 2)), "a": np.ones((2, 2))}, state, lr=0.1, weight_decay=0)
    assert np.all(params["b"] == 1)
    assert np.all(params["a"] < 1)


@pytest.mark.parametrize("moment_name", ["m", "v"])
@pytest.mark.parametrize("moment", [np.zeros((2, 2), np.float32), np.zeros((1,), np.float32), None])
def test_adamw_refuses_moments_of_the_wrong_shape_before_it_changes_anything(moment_name, moment):
    params = {"w": np.ones((3, 3), np.float32)}
    state = adamw_init(params)
    state[moment_name] = {"w": moment}
    with pytest.raises(UserError, match="w: gradient and moments must"):
        adamw_update(params, {"w": params["w"]}, state, lr=0.1)
    assert state["step"] == 0
    assert (params["w"] == 1).all()


def test_a_damaged_log_does_not_stop_a_run_from_resuming(database, tmp_path):
    train(database, small_config(database), replace(TRAINING, steps=2), tmp_path)
    checkpoint = (tmp_path / "checkpoint.safetensors").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 0, "loss": 1.0}\n5\n\xff\xfe\n')
    train(database, small_config(database), replace(TRAINING, steps=2), tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == checkpoint
    assert [line["step"] for line in read_log(tmp_path)] == [0]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_checkpoint_that_was_converted_to_another_precision_never_trains_in_half_precision(database, tmp_path, dtype):
    config, training = small_config(database), replace(TRAINING, checkpoint_every=1)
    path = tmp_path / "run" / "checkpoint.safetensors"
    train(database, config, replace(training, steps=3), tmp_path / "run")
    tensors, meta = read_tensors(path)
    meta["run"]["training"]["steps"] = training.steps
    write_tensors(path, {name: array.astype(dtype) for name, array in tensors.items()}, meta)
    params = train(database, config, training, tmp_path / "run")
    expected = np.float32 if dtype == np.float16 else np.float64
    assert {array.dtype for _, array in named_leaves(params)} == {np.dtype(expected)}
    assert {array.dtype for array in read_tensors(path)[0].values()} == {np.dtype(expected)}
    assert np.isfinite([line["loss"] for line in read_log(tmp_path / "run")]).all()


def test_values_that_are_not_finite_are_never_saved_over_finite_ones(database, tmp_path):
    config = small_config(database)
    params = train(database, config, replace(TRAINING, steps=1), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    before, (_, state, _, run) = path.read_bytes(), load_checkpoint(path)
    for value in (np.nan, np.inf, -np.inf):
        state["v"]["norm"][3] = value
        with pytest.raises(
            UserError, match=r"adamw\.v\.norm is not finite everywhere, so .*checkpoint\.safetensors was"
        ):
            save_checkpoint(path, params, state, config, run)
        broken = map_tree(
            lambda _, array, value=value: np.where(np.arange(array.size) == 0, value, 1).reshape(array.shape), params
        )
        with pytest.raises(UserError, match="is not finite everywhere"):
            save_params(path, broken, config)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir() if "partial" in file.name] == []


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"step": -1}, {"step": 2.0}, {"step": 10**30}, {"step": None}, {"run": []}, {"run": "run"},
        {"run": {"model": 1}}, {"run": {"training": []}}, {"run": {"data": "x"}}, {"config": []}, {"config": None},
        {"config": {"n_layers": 10**7}}, {"config": {"n_layers": 10**30}}, {"config": {"d_head": 10**19}},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_with_odd_metadata_is_refused_in_one_line(database, tmp_path, change):
    config = small_config(database)
    path = tmp_path / "run" / "checkpoint.safetensors"
    train(database, config, replace(TRAINING, steps=1), tmp_path / "run")
    tensors, meta = read_tensors(path)
    if isinstance(change.get("config"), dict):
        change = {"config": meta["config"] | change["config"]}
    write_tensors(path, tensors, meta | change)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) or "must be" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_moment_is_refused_by_its_name(database, tmp_path):
    config, path = small_config(database), tmp_path / "run" / "checkpoint.safetensors"
    train(database, config, replace(TRAINING, steps=1), tmp_path / "run")
    tensors, meta = read_tensors(path)
    write_tensors(path, {name: array for name, array in tensors.items() if name != "adamw.v.norm"}, meta)
    with pytest.raises(UserError, match=rf"{path}: adamw\.v\.norm is absent, .*: use another checkpoint"):
        train(database, config, replace(TRAINING, steps=2), tmp_path / "run")
