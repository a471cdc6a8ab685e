"""A finished run goes on when its steps are raised. Ground truth: the same training in one piece, from config.json."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support import TRAINING, all_bytes, small_config

from retro_np import TrainingConfig
from retro_np.checkpoint import load_checkpoint, read_meta, read_tensors, write_tensors
from retro_np.errors import UserError
from retro_np.training import loop
from retro_np.training.loop import read_log, train
from retro_np.tree import named_leaves

PROLONGED = replace(TRAINING, steps=13)


def stop_at(step):
    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    return stop


def rates(out):
    return [line["learning_rate"] for line in read_log(out)]


def stored_training(out):
    """The TrainingConfig in config.json."""
    return TrainingConfig(**json.loads((out / "config.json").read_text())["training"])


def values(out):
    """All values of the log, except speeds."""
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in read_log(out)]


@pytest.fixture(scope="module")
def config(database):
    return small_config(database, dropout=0.1)


@pytest.fixture(scope="module")
def finished(database, config, tmp_path_factory):
    """A run that was finished after 8 steps and prolonged to 13."""
    out = tmp_path_factory.mktemp("finished")
    for training in (TRAINING, PROLONGED):
        train(database, config, training, out)
    return out


@pytest.fixture
def prolonged(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "prolonged", ignore=shutil.ignore_patterns(".lock"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        pytest.param("cosine", (8, 13, 14, 20), marks=pytest.mark.slow),
        ("linear", (8, 13)),
        pytest.param("constant", (8, 13), marks=pytest.mark.slow),
    ],
)
def test_a_prolonged_run_is_repeated_by_its_configuration_bit_for_bit(database, config, tmp_path, schedule, ends):
    training = replace(TRAINING, schedule=schedule, eval_every=3)
    for steps in ends:
        train(database, config, replace(training, steps=steps), tmp_path / "prolonged")
    stored = stored_training(tmp_path / "prolonged")
    assert stored == replace(training, steps=ends[-1], segments=ends[:-1])
    train(database, config, stored, tmp_path / "repeated")
    assert all_bytes(tmp_path / "repeated") == all_bytes(tmp_path / "prolonged")
    assert values(tmp_path / "repeated") == values(tmp_path / "prolonged")


def test_each_segment_follows_the_schedule_over_all_steps_up_to_its_end(database, config, tmp_path):
    for steps in (8, 13, 20):
        train(database, config, replace(TRAINING, steps=steps), tmp_path / "prolonged")
        train(database, config, replace(TRAINING, steps=steps), tmp_path / f"{steps}")
    in_one = {steps: rates(tmp_path / f"{steps}") for steps in (8, 13, 20)}
    assert rates(tmp_path / "prolonged") == in_one[8] + in_one[13][8:] + in_one[20][13:]


@pytest.mark.parametrize("step", [8, 9, 11, 12])
def test_a_prolonged_run_that_is_interrupted_resumes_to_the_same_bytes(database, config, tmp_path, step):
    for out in (tmp_path / "whole", tmp_path / "stopped"):
        train(database, config, TRAINING, out)
    train(database, config, PROLONGED, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(database, config, PROLONGED, tmp_path / "stopped", callbacks=[stop_at(step)])
    train(database, config, PROLONGED, tmp_path / "stopped")
    assert all_bytes(tmp_path / "stopped") == all_bytes(tmp_path / "whole")
    assert values(tmp_path / "stopped") == values(tmp_path / "whole")


@pytest.mark.parametrize("step", [3, 7, 8, 9])
def test_a_repetition_of_a_prolonged_run_that_is_interrupted_resumes_to_the_same_bytes(
    database, config, prolonged, tmp_path, step
):
    repeated = stored_training(prolonged)
    with pytest.raises(KeyboardInterrupt):
        train(database, config, repeated, tmp_path / "repeated", callbacks=[stop_at(step)])
    train(database, config, repeated, tmp_path / "repeated")
    assert all_bytes(tmp_path / "repeated") == all_bytes(prolonged)


def test_a_run_says_once_that_it_is_prolonged_and_which_schedule_it_follows(database, config, tmp_path, capsys):
    train(database, config, TRAINING, tmp_path)
    assert capsys.readouterr().err == ""
    train(database, config, PROLONGED, tmp_path)
    line = f"{tmp_path} continues from step 8 to 13: the schedule is cosine over 13 steps\n"
    assert capsys.readouterr().err == line
    train(database, config, PROLONGED, tmp_path)
    assert capsys.readouterr().err == ""


def test_the_configuration_of_a_prolonged_run_given_back_to_its_own_folder_changes_nothing(database, config, prolonged):
    files = all_bytes(prolonged)
    train(database, config, stored_training(prolonged), prolonged)
    assert all_bytes(prolonged) == files


def test_a_prolonged_run_whose_checkpoint_was_removed_is_repeated_from_the_start(database, config, prolonged):
    files = all_bytes(prolonged)
    (prolonged / "checkpoint.safetensors").unlink()
    train(database, config, PROLONGED, prolonged)
    assert all_bytes(prolonged) == files


@pytest.mark.parametrize("steps", [1, 8, 13, 100])
def test_a_run_that_keeps_its_steps_changes_nothing_whatever_number_is_requested(
    database, config, prolonged, steps, capsys
):
    files = all_bytes(prolonged)
    train(database, config, replace(TRAINING, steps=steps), prolonged, keep_steps=True)
    assert all_bytes(prolonged) == files
    line = f"{prolonged} holds a run of 13 steps; without --steps it keeps this number\n"
    assert capsys.readouterr().err == ("" if steps == 13 else line)


def test_an_unfinished_run_that_keeps_its_steps_is_finished(database, config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(database, config, TRAINING, tmp_path / "stopped", callbacks=[stop_at(4)])
    train(database, config, replace(TRAINING, steps=1000), tmp_path / "stopped", keep_steps=True)
    train(database, config, TRAINING, tmp_path / "whole")
    assert all_bytes(tmp_path / "stopped") == all_bytes(tmp_path / "whole")


@pytest.mark.parametrize("steps", [9, 100])
def test_an_unfinished_run_cannot_be_prolonged_and_one_line_says_to_finish_it(database, config, tmp_path, steps):
    with pytest.raises(KeyboardInterrupt):
        train(database, config, TRAINING, tmp_path, callbacks=[stop_at(4)])
    files = all_bytes(tmp_path)
    with pytest.raises(UserError, match=rf"is at step 3 of 8: finish it first with steps = 8, .* to {steps}"):
        train(database, config, replace(TRAINING, steps=steps), tmp_path)
    assert all_bytes(tmp_path) == files


@pytest.mark.parametrize("steps", [1, 8, 12])
def test_fewer_steps_than_were_trained_are_refused_in_one_line(database, config, prolonged, steps):
    files = all_bytes(prolonged)
    with pytest.raises(UserError, match=f"was trained with steps = 13, and now it is {steps}"):
        train(database, config, replace(TRAINING, steps=steps), prolonged)
    assert all_bytes(prolonged) == files


@pytest.mark.parametrize(("steps", "segments"), [(13, (5,)), (20, (8,)), (20, (13,)), (20, (8, 12))])
def test_other_segments_than_the_runs_own_are_refused(database, config, prolonged, steps, segments):
    with pytest.raises(UserError, match="was trained with segments = "):
        train(database, config, replace(TRAINING, steps=steps, segments=segments), prolonged)


def test_a_prolonged_run_keeps_every_other_setting(database, config, tmp_path):
    train(database, config, TRAINING, tmp_path)
    for change in ({"beta1": 0.8}, {"schedule": "linear"}, {"min_learning_rate": 0.0}, {"clip": 2.0}, {"seed": 1}):
        with pytest.raises(UserError, match=f"was trained with {next(iter(change))} = "):
            train(database, config, replace(PROLONGED, **change), tmp_path)


@pytest.mark.parametrize("steps", [8, 13])
def test_a_run_of_an_older_version_resumes_or_goes_on_though_it_names_no_new_setting(database, config, tmp_path, steps):
    """The files of older versions have none of the settings that were added since."""
    added = ("schedule", "min_learning_rate", "beta1", "beta2", "eval_every", "eval_chunks", "segments")
    train(database, config, TRAINING, tmp_path / "new")
    if steps == 8:
        with pytest.raises(KeyboardInterrupt):
            train(database, config, TRAINING, tmp_path / "old", callbacks=[stop_at(4)])
    else:
        train(database, config, TRAINING, tmp_path / "old")
        train(database, config, PROLONGED, tmp_path / "new")
    path = tmp_path / "old" / "checkpoint.safetensors"
    tensors, meta = read_tensors(path)
    for name in added:
        del meta["run"]["training"][name]
    write_tensors(path, tensors, meta)
    (tmp_path / "old" / "config.json").write_text(json.dumps(meta["run"]))
    with pytest.raises(UserError, match=r"beta2 = 0\.95, and now it is 0\.9"):
        train(database, config, replace(TRAINING, steps=steps, beta2=0.9), tmp_path / "old")
    train(database, config, replace(TRAINING, steps=steps), tmp_path / "old")
    assert all_bytes(tmp_path / "old") == all_bytes(tmp_path / "new")


@pytest.mark.parametrize("segments", ["8", [0], [8, 8], [9, 4], [13], [None], {"a": 1}, 4], ids=str)
def test_odd_segments_in_a_checkpoint_are_refused_in_one_line(database, config, prolonged, segments):
    path = prolonged / "checkpoint.safetensors"
    tensors, meta = read_tensors(path)
    meta["run"]["training"]["segments"] = segments
    write_tensors(path, tensors, meta)
    for steps in (13, 20):
        with pytest.raises(UserError, match="segments") as error:
            train(database, config, replace(TRAINING, steps=steps), prolonged)
        assert "\n" not in str(error.value)


def test_the_segments_stand_in_the_checkpoint_too(database, config, prolonged):
    assert read_meta(prolonged / "checkpoint.safetensors")["run"]["training"]["segments"] == [8]
    assert load_checkpoint(prolonged / "checkpoint.safetensors")[1]["step"] == 13


def test_numbers_of_numpy_are_stored_as_pythons(database, config, tmp_path):
    training = replace(TRAINING, steps=np.int64(8), learning_rate=np.float32(0.01), eval_every=np.int32(4))
    train(database, config, training, tmp_path)
    assert stored_training(tmp_path).steps == 8
    assert all(
        np.isfinite(array).all() for _, array in named_leaves(load_checkpoint(tmp_path / "checkpoint.safetensors")[0])
    )


@pytest.mark.parametrize("steps", [8, 14])
def test_a_prolongation_that_was_interrupted_leaves_no_trace_in_a_run_with_other_steps(
    database, config, tmp_path, steps
):
    first = replace(TRAINING, eval_every=3, checkpoint_every=8)
    for out in ("interrupted", "whole"):
        train(database, config, first, tmp_path / out)
    with pytest.raises(KeyboardInterrupt):
        train(database, config, replace(first, steps=24), tmp_path / "interrupted", callbacks=[stop_at(12)])
    for out in ("interrupted", "whole"):
        train(database, config, replace(first, steps=steps), tmp_path / out)
    assert all_bytes(tmp_path / "interrupted") == all_bytes(tmp_path / "whole")
    assert values(tmp_path / "interrupted") == values(tmp_path / "whole")


def test_best_parameters_of_a_step_that_is_not_taken_again_are_removed(database, config, tmp_path, monkeypatch, capsys):
    first = replace(TRAINING, eval_every=8)
    train(database, config, first, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", killed)  # after best.safetensors was written
        patch.setattr(loop, "_best_so_far", lambda *_: float("inf"))  # so that step 16 is the best
        with pytest.raises(KeyboardInterrupt):
            train(database, config, replace(first, steps=20, checkpoint_every=16), tmp_path)
    assert read_meta(tmp_path / "best.safetensors")["run"]["step"] == 16
    train(database, config, first, tmp_path)
    assert "best.safetensors was of step 16, which is not a step of this run: removed" in capsys.readouterr().err
    assert not (tmp_path / "best.safetensors").exists()
