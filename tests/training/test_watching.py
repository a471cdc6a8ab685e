"""What one sees of a run: validation, the log, callbacks, loggers.

Ground truth: `score`, runs without validation, and what the packages themselves read back from their files.
"""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from support import TRAINING, all_bytes, small_config

from retro_np import load_params, score
from retro_np.checkpoint import load_checkpoint, load_model
from retro_np.errors import UserError
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.training import loop
from retro_np.training.loggers import logger
from retro_np.training.loop import read_log, train, validation
from retro_np.tree import named_leaves

WATCHED = replace(TRAINING, eval_every=3)


def curve(out, name="valid_loss"):
    """(step, value) of each step that was evaluated."""
    return [(line["step"], line[name]) for line in read_log(out) if name in line]


def without_speed(out):
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in read_log(out)]


def bits_of(params):
    return {name: array.tobytes() for name, array in named_leaves(params)}


@pytest.mark.parametrize("change", [{}, {"cca_layers": (), "encoder": None}], ids=["retro", "baseline"])
@pytest.mark.parametrize(("length", "chunks"), [(32, None), (32, 7), (8, None), (8, 5), (256, 40)])
def test_the_validation_bits_per_byte_are_those_of_score(database, tmp_path, change, length, chunks):
    config = small_config(database, **change)
    training = replace(WATCHED, steps=2, sequence_length=length, eval_chunks=chunks)
    params = train(database, config, training, tmp_path)
    stride = max(8, length // 16 * 8)
    losses = score(params, config, database, k=2, sequence_length=length, stride=stride, limit=chunks)
    tokens = sum(int(n) for n in losses.tokens)
    (line,) = (line for line in read_log(tmp_path) if "valid_bpb" in line)
    assert line["valid_bpb"] == pytest.approx(losses.bits_per_byte(), rel=1e-6)  # float32 means of batches
    assert line["valid_loss"] == pytest.approx(losses.nats.sum() / tokens, rel=1e-6)


def test_evaluations_come_after_every_nth_step_and_after_the_last(database, tmp_path):
    train(database, small_config(database), WATCHED, tmp_path)
    assert [step for step, _ in curve(tmp_path)] == [2, 5, 7]


def test_validation_does_not_change_what_is_learned_by_a_bit(database, tmp_path):
    config = small_config(database, dropout=0.2)
    watched = train(database, config, WATCHED, tmp_path / "watched")
    unwatched = train(database, config, TRAINING, tmp_path / "unwatched")
    assert bits_of(watched) == bits_of(unwatched)
    names = ("step", "loss", "learning_rate", "gradient_norm")
    logs = [[[line[name] for name in names] for line in read_log(tmp_path / run)] for run in ("watched", "unwatched")]
    assert logs[0] == logs[1]


def test_the_best_checkpoint_has_the_parameters_of_the_lowest_validation_loss(database, tmp_path, monkeypatch):
    config, seen, losses = small_config(database), [], iter([3.0, 2.0, 2.5, 2.0])

    def scripted(*_):
        def evaluate(params):
            seen.append(bits_of(params))
            return {"valid_loss": next(losses), "valid_bpb": 1.0}

        return evaluate

    monkeypatch.setattr(loop, "validation", scripted)
    last = train(database, config, replace(TRAINING, eval_every=2), tmp_path)
    assert bits_of(load_params(tmp_path / "best.safetensors")[0]) == seen[1]
    assert bits_of(load_params(tmp_path / "checkpoint.safetensors")[0]) == bits_of(last) == seen[3]
    assert load_model(tmp_path / "best.safetensors", database)[1] == config
    with pytest.raises(UserError, match="holds only parameters"):
        load_checkpoint(tmp_path / "best.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [3, 4, 6, 7])
def test_a_watched_run_that_was_interrupted_ends_with_the_same_files_and_the_same_log(database, tmp_path, stopped):
    def stop(line):
        if line["step"] == stopped:
            raise KeyboardInterrupt

    config = small_config(database)
    train(database, config, WATCHED, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(database, config, WATCHED, tmp_path / "stopped", callbacks=[stop])
    train(database, config, WATCHED, tmp_path / "stopped")
    assert all_bytes(tmp_path / "stopped") == all_bytes(tmp_path / "whole")
    assert without_speed(tmp_path / "stopped") == without_speed(tmp_path / "whole")


def test_how_a_run_is_watched_may_change_when_it_resumes(database, tmp_path):
    def stop(line):
        if line["step"] == 4:
            raise KeyboardInterrupt

    config = small_config(database)
    with pytest.raises(KeyboardInterrupt):
        train(database, config, WATCHED, tmp_path / "changed", callbacks=[stop])
    changed = replace(TRAINING, eval_every=1, eval_chunks=9, checkpoint_every=2)
    params = train(database, config, changed, tmp_path / "changed")
    assert bits_of(params) == bits_of(train(database, config, TRAINING, tmp_path / "whole"))
    best, _ = load_params(tmp_path / "changed" / "best.safetensors")
    evaluate = validation(database, config, changed)  # The losses before and after the change cover different chunks.
    losses = [loss for step, loss in curve(tmp_path / "changed") if step >= 3]
    assert evaluate(best)["valid_loss"] <= min(losses)


@pytest.mark.parametrize("content", [b"damaged", b""])
def test_a_damaged_best_checkpoint_is_refused_with_the_way_out_and_stays(database, tmp_path, content):
    def stop(line):
        raise KeyboardInterrupt

    config = small_config(database)
    with pytest.raises(KeyboardInterrupt):
        train(database, config, WATCHED, tmp_path, callbacks=[stop])
    (tmp_path / "best.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"best\.safetensors .*, or remove it"):
        train(database, config, WATCHED, tmp_path)
    assert (tmp_path / "best.safetensors").read_bytes() == content
    train(database, config, TRAINING, tmp_path)  # Without validation the file is of no concern.


def test_a_database_that_holds_nothing_out_is_refused_before_training_starts(corpus, embedder, tmp_path):
    nothing = build_database(corpus, tmp_path / "db", BuildConfig(8, 300, held_out=0.0, neighbours=4), embedder)
    with pytest.raises(UserError, match=r"db holds out no text .* without --eval-every"):
        train(nothing, small_config(nothing), WATCHED, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_validation_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(database, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validation", lambda *_: lambda params: {"valid_loss": math.nan, "valid_bpb": math.nan})
    with pytest.raises(UserError, match="step 4: valid_loss is nan"):
        train(database, small_config(database), replace(TRAINING, eval_every=5), tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 3
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1, 2, 3]


def test_callbacks_receive_each_line_of_the_log_when_it_is_in_the_file(database, tmp_path):
    seen = []

    def compare(line):
        assert json.loads((tmp_path / "log.jsonl").read_bytes().splitlines()[-1]) == line
        seen.append(line)
        line.clear()  # A callback's changes reach no other callback.

    received = []
    train(database, small_config(database), WATCHED, tmp_path, callbacks=iter([compare, received.append]))
    assert len(seen) == 8
    assert received == read_log(tmp_path)


@pytest.mark.parametrize("callbacks", [print, None, 3, "csv", ["csv"], [print, None], {"csv": print}], ids=repr)
def test_what_is_no_list_of_functions_is_refused_before_training_begins(callbacks, database, tmp_path):
    with pytest.raises(UserError, match=r"^callbacks must be a list of functions that take a line"):
        train(database, small_config(database), TRAINING, tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [2, 3, 7])
def test_after_a_callbacks_exception_the_log_has_the_steps_line_and_the_run_resumes(database, tmp_path, step):
    def fail(line):
        if line["step"] == step:
            raise RuntimeError("of the callback")

    config = small_config(database)
    with pytest.raises(RuntimeError, match="of the callback"):
        train(database, config, TRAINING, tmp_path / "run", callbacks=[fail])
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == (8 if step == 7 else 3)
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(step + 1))
    train(database, config, TRAINING, tmp_path / "run")
    train(database, config, TRAINING, tmp_path / "whole")
    assert all_bytes(tmp_path / "run") == all_bytes(tmp_path / "whole")


def scalars(out):
    """{tag: [(step, value), …]}, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows(out):
    """{column: [(step, value), …]} of log.csv."""
    with (out / "log.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return {name: [(int(line["step"]), float(line[name])) for line in lines if line[name]] for name in lines[0]}


READERS = {"csv": rows, "tensorboard": scalars}


def assert_has_the_log(kind, out):
    """Each value of log.jsonl once, and no other. TensorBoard's scalars are float32."""
    read = READERS[kind](out)
    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "valid_loss", "valid_bpb"):
        assert [step for step, _ in read[name]] == [step for step, _ in curve(out, name)], name
        values = [value for _, value in curve(out, name)]
        assert [value for _, value in read[name]] == pytest.approx(values, rel=1e-7 if kind == "tensorboard" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_a_logger_writes_the_curves_of_a_run_that_was_interrupted_and_prolonged(kind, database, tmp_path):
    if kind == "tensorboard":
        pytest.importorskip("tensorboard")

    def stop(line):
        if line["step"] == 4:
            raise KeyboardInterrupt

    config = small_config(database)
    with pytest.raises(KeyboardInterrupt):
        train(database, config, WATCHED, tmp_path, callbacks=[logger(kind, tmp_path), stop])
    assert [step for step, _ in READERS[kind](tmp_path)["loss"]] == [0, 1, 2, 3, 4]  # as it happens
    train(database, config, WATCHED, tmp_path, callbacks=[logger(kind, tmp_path)])
    assert_has_the_log(kind, tmp_path)
    train(database, config, replace(WATCHED, steps=10), tmp_path, callbacks=[logger(kind, tmp_path)])
    assert len(read_log(tmp_path)) == 10
    assert_has_the_log(kind, tmp_path)
    files = all_bytes(tmp_path)
    train(database, config, replace(WATCHED, steps=10), tmp_path, callbacks=[logger(kind, tmp_path)])
    assert all_bytes(tmp_path) == files


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "disabled"])
def test_weights_and_biases_gets_each_step_in_its_offline_mode_unless_told_otherwise(
    mode, database, tmp_path, monkeypatch
):
    runs = []

    class Run:
        def __init__(self, project=None, dir=None, config=None, name=None, mode=None, **settings):
            self.settings, self.lines = {"dir": dir, "mode": mode, **settings}, []
            runs.append(self)

        def log(self, data, step=None, commit=None):
            self.lines.append({"step": step, **data})

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    train(database, small_config(database), WATCHED, tmp_path, callbacks=[logger("wandb", tmp_path)])
    prolonged = replace(WATCHED, steps=10)
    train(database, small_config(database), prolonged, tmp_path, callbacks=[logger("wandb", tmp_path)])
    assert [run.settings for run in runs] == [{"dir": str(tmp_path), "mode": mode or "offline"}] * 2
    assert runs[0].lines == read_log(tmp_path)[:8]
    assert runs[1].lines == read_log(tmp_path)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_whose_package_is_missing_says_what_to_install_before_training(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        logger(package, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_of_logger_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match="'mlflow': choose tensorboard, csv, wandb"):
        logger("mlflow", tmp_path)


def test_a_link_in_place_of_tensorboards_folder_is_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="tensorboard is a link"):
        logger("tensorboard", tmp_path / "run")


def test_events_that_another_program_wrote_into_the_folder_stay(database, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "config.json").touch()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.mine").write_text("of the user")
    logger("tensorboard", tmp_path)({"step": 0, "loss": 1.0})
    assert (tmp_path / "tensorboard" / "events.out.tfevents.1.mine").read_text() == "of the user"


def test_a_csv_file_that_the_logger_did_not_write_is_refused_and_stays(tmp_path):
    (tmp_path / "log.csv").write_text("my,own\n1,2\n")
    with pytest.raises(UserError, match=r"log\.csv exists, and this command did not write it"):
        logger("csv", tmp_path)
    assert (tmp_path / "log.csv").read_text() == "my,own\n1,2\n"


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from support import TRAINING, small_config
from retro_np import Database
from retro_np.training.loop import train
database = Database.open({database!r})
training = replace(TRAINING, steps=40, checkpoint_every=40, eval_every=5)

def kill(line):
    if line["step"] == 17:
        os.kill(os.getpid(), signal.SIGKILL)

train(database, small_config(database), training, {out!r}, callbacks=[kill])
"""


def test_the_log_of_a_killed_run_has_every_step_that_was_taken(database, tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), database=str(database.path), out=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script], env=os.environ).returncode == -signal.SIGKILL
    assert [line["step"] for line in read_log(tmp_path)] == list(range(18))
    assert [step for step, _ in curve(tmp_path)] == [4, 9, 14]
