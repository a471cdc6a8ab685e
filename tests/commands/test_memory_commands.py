"""The commands on a memory of a decoder of others, from its training to its page.

Ground truth: the calls in Python, and runs in one piece."""

import json
import re
import shutil

import numpy as np
import pytest
from memory_runs import OPTIONS, build, interrupted_in_step, run_here, write_decoder
from safetensors.numpy import load_file
from support import all_bytes

from retro_np import Database, generate, generation
from retro_np.checkpoint import read_meta
from retro_np.evaluation.bits_per_byte import score
from retro_np.parameters import is_retrieval
from retro_np.pretrained.models import load_model
from retro_np.report import inspection
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.training.config import TrainingConfig
from retro_np.training.memory import MEMORY_SETTINGS

WATCHED = (*OPTIONS, "--eval-every", "3")
FORMS = pytest.mark.parametrize("form", ["run", "untrained", "paper"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A decoder, a database with its tokenizer, and three runs: trained, untrained, and in the paper's form."""
    work = tmp_path_factory.mktemp("memory commands")
    build(work / "db", write_decoder(work / "model") / "tokenizer.json")
    for name, options in (
        ("run", (*WATCHED, "--steps", 5)), ("untrained", (*OPTIONS, "--steps", 0)),
        ("paper", (*OPTIONS, "--steps", 3, "--paper-form", "--encoder-layers", 1)),
    ):  # fmt: skip
        assert run_here("train", work / "db", "--retrofit", work / "model", "-o", work / name, *options) == 0
    return work


def stored_model(run):
    return json.loads((run / "config.json").read_text())["model"]


# What can be done with a run


@FORMS
def test_a_run_is_evaluated_by_its_name(work, tmp_path, form):
    window = {"sequence_length": 32, "stride": 16}
    options = ("--sequence-length", 32, "--stride", 16, "--limit", 3)
    assert run_here("evaluate", work / form, work / "db", "-o", tmp_path / "out", *options) == 0
    models = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    database = Database.open(work / "db")
    params, config = load_model(work / form, database)
    for name, k in (("RETRO[OFF]", 0), ("RETRO[ON]", 2)):
        losses = score(params, config, database, k=k, limit=3, **window)
        assert models[name]["bpb"] == pytest.approx(losses.bits_per_byte(), rel=1e-6)
    assert models["RETRO[ON]"]["bpb"] != models["RETRO[OFF]"]["bpb"]


@FORMS
def test_without_retrieval_a_run_samples_what_its_base_samples(work, capsys, form):
    printed = []
    for model, off in ((form, ("--no-retrieval",)), ("model", ())):
        assert run_here("sample", work / model, *off, "--length", 20, "--prompt", "def f") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0]) > 20


@FORMS
def test_a_run_samples_with_a_database_and_shows_what_it_retrieved(work, capsys, form):
    assert run_here("sample", work / form, work / "db", "--length", 20, "--prompt", "def f") == 0
    assert "(squared distance" in capsys.readouterr().out


@FORMS
def test_a_run_is_inspected_on_a_prompt_and_on_a_text(work, tmp_path, form):
    texts = (("--prompt", "def f", "--length", 20), ("for value in index: token = not self and chunk",))
    for number, text in enumerate(texts):
        page = tmp_path / f"{number}.html"
        assert run_here("inspect", work / form, work / "db", *text, "-o", page) == 0
        assert "module_" in page.read_text()


def test_the_best_parameters_of_a_run_are_a_model_too(work, tmp_path):
    best = work / "run" / "best.safetensors"
    assert run_here("inspect", best, work / "db", "def f(x): return", "-o", tmp_path / "page.html") == 0


def test_a_sample_with_a_database_stops_where_the_base_stops(work, monkeypatch, tmp_path):
    stops, real = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda *a, **o: (stops.append(o["stop_token"]), real(*a, **o))[1])
    ends = [7, 9]
    model = shutil.copytree(work / "model", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert run_here("train", work / "db", "--retrofit", model, "-o", tmp_path / "run", *OPTIONS, "--steps", 0) == 0
    for options in ((work / "db",), (work / "db", "--no-retrieval"), ("--no-retrieval",)):
        assert run_here("sample", tmp_path / "run", *options, "--length", 2, "--prompt", "def f") == 0
    page = tmp_path / "page.html"
    assert run_here("inspect", tmp_path / "run", work / "db", "--prompt", "def f", "--length", 2, "-o", page) == 0
    assert len(stops) == 5  # The first is sampled with retrieval on and off.
    assert all(set(ends) <= set(stop) for stop in stops)


def test_a_run_finds_a_base_that_was_named_by_a_relative_path(work, monkeypatch, tmp_path):
    monkeypatch.chdir(work)
    assert run_here("train", "db", "--retrofit", "model", "-o", tmp_path / "run", *OPTIONS, "--steps", 0) == 0
    monkeypatch.chdir(tmp_path)
    assert run_here("sample", "run", work / "db", "--length", 2, "--prompt", "def f") == 0


def test_a_sample_with_tokens_that_no_text_has_is_inspected(work):
    database = Database.open(work / "db")
    params, config = load_model(work / "run", database)
    spare = config.vocabulary_size - 1
    assert spare >= len(token_byte_lengths(database.tokenizer))
    shown = inspection.inspect(params, config, database, [65, 66, spare, 67] * 5, k=1, n_prompt=2)
    assert np.isfinite(shown.bits_on)


# What a run is


def test_a_runs_settings_are_the_recipes_but_for_those_given(work):
    training = json.loads((work / "run" / "config.json").read_text())["training"]
    given = {"sequence_length": 32, "batch_size": 2, "warmup": 1, "checkpoint_every": 2, "eval_every": 3, "steps": 5}
    expected = vars(TrainingConfig(**MEMORY_SETTINGS | given))
    assert training == json.loads(json.dumps(expected))
    assert json.loads((work / "paper" / "config.json").read_text())["training"]["random_share"] == 0


def test_runs_hold_only_what_was_trained(work):
    for form, encoder in (("run", False), ("untrained", False), ("paper", True)):
        names = {name.removeprefix("adamw.m.").removeprefix("adamw.v.") for name in load_file(checkpoint(work / form))}
        assert all(map(is_retrieval, names))
        assert any(name.startswith("encoder.") for name in names) == encoder
        assert any(name.endswith(".gate") for name in names) != encoder
        assert read_meta(work / form)["base"]["name"] == str(work / "model")


def checkpoint(run):
    return run / "checkpoint.safetensors"


def test_rank_and_layers_are_options_and_the_number_of_trained_parameters_is_said(work, train, tmp_path, capsys):
    assert train(tmp_path, *OPTIONS, "--steps", 0, "--rank", 3, "--cca-layers", "2") == 0
    stored = load_file(checkpoint(tmp_path))
    trained = sum(array.size for name, array in stored.items() if not name.startswith("adamw."))
    assert re.search(
        rf"^[\d,]+ parameters, [\d,]+ with embeddings; {trained:,} are trained$", capsys.readouterr().out, re.M
    )
    assert stored["layers.1.cca.down_q"].shape == (32, 3)
    assert not any(name.startswith("layers.0.") for name in stored)
    assert (stored_model(tmp_path)["rank"], stored_model(tmp_path)["cca_layers"]) == (3, [2])


def test_a_run_keeps_its_layers_if_none_are_named(work, train, tmp_path):
    for steps in (2, 4):
        layers = ("--cca-layers", "1") if steps == 2 else ()
        assert train(tmp_path, *OPTIONS, "--steps", steps, *layers) == 0
    assert stored_model(tmp_path)["cca_layers"] == [1]
    assert read_meta(tmp_path)["step"] == 4


# Resuming


@pytest.mark.parametrize("form", ["run", "paper"])
def test_a_run_is_repeated_by_its_settings_file_bit_for_bit(work, train, tmp_path, form):
    paper = ("--paper-form",) if form == "paper" else ()
    assert train(tmp_path / "again", "--config", work / form / "config.json", *paper) == 0
    assert all_bytes(tmp_path / "again") == all_bytes(work / form)


def test_an_interrupted_command_resumes_to_the_bytes_of_one_in_one_piece(work, train, tmp_path, monkeypatch):
    with interrupted_in_step(3, monkeypatch):
        assert train(tmp_path / "out", *WATCHED, "--steps", 5) == 130
    assert train(tmp_path / "out", *WATCHED, "--steps", 5) == 0
    assert all_bytes(tmp_path / "out") == all_bytes(work / "run")


@pytest.mark.parametrize("form", ["run", "untrained", "paper"])
def test_more_steps_prolong_a_run_which_its_file_then_repeats(work, train, tmp_path, form):
    shutil.copytree(work / form, tmp_path / "out", ignore=shutil.ignore_patterns(".lock"))
    paper = ("--paper-form",) if form == "paper" else ()
    assert train(tmp_path / "out", "--config", work / form / "config.json", "--steps", 7, *paper) == 0
    assert read_meta(tmp_path / "out")["step"] == 7
    assert train(tmp_path / "again", "--config", tmp_path / "out" / "config.json", *paper) == 0
    assert all_bytes(tmp_path / "again") == all_bytes(tmp_path / "out")


def test_an_untrained_memory_trains_on_as_if_from_the_beginning(work, train, tmp_path):
    shutil.copytree(work / "untrained", tmp_path / "out", ignore=shutil.ignore_patterns(".lock"))
    for out in ("out", "whole"):
        assert train(tmp_path / out, *OPTIONS, "--steps", 3) == 0
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_the_base_is_not_written(work, train, tmp_path):
    before = all_bytes(work / "model")
    assert train(tmp_path, *OPTIONS, "--steps", 2) == 0
    assert all_bytes(work / "model") == before


# Mistakes


def test_a_database_of_another_tokenizer_is_refused(work, refused, database, tmp_path):
    for arguments in (
        ("train", database.path, "--retrofit", work / "model", "-o", tmp_path / "out"),
        ("evaluate", work / "run", database.path, "-o", tmp_path / "out"),
        ("sample", work / "run", database.path),
    ):
        assert "has a different tokenizer (" in refused(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_database_of_another_chunk_size_is_refused(work, refused, tmp_path):
    build(tmp_path / "db", work / "model" / "tokenizer.json", chunk_size=16)
    for arguments in (
        ("evaluate", work / "run", tmp_path / "db", "-o", tmp_path / "out"), ("sample", work / "run", tmp_path / "db"),
        ("inspect", work / "run", tmp_path / "db", "text", "-o", tmp_path / "page.html"),
    ):  # fmt: skip
        assert "the model has chunk_size 8, and the database" in refused(*arguments)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--sequence-length", "72"), "the model has 64 positions, fewer than a sequence of 72 tokens"),
        (("--sequence-length", "30"), "sequence_length"),
        (("--cca-layers", "9"), "cca_layers is 9, but the model has 2 layers: give --cca-layers"),
        (("--cca-layers", "0"), "cca_layers"),
        (("--cca-layers", "()"), "cca_layers is empty, but a memory needs layers that read: give --cca-layers"),
        (("--rank", "0"), "rank must be a whole number from 1 to 32, not 0"),
        (("--rank", "33"), "rank must be a whole number from 1 to 32, not 33"),
        (("--rank", "2", "--paper-form"), "--paper-form excludes the other two"),
        (("--encoder-layers", "1"), "belong to the paper's form: add --paper-form, or leave them out"),
        (("--copying-start",), "belong to the paper's form: add --paper-form, or leave them out"),
        (("--d-model", "8"), "--retrofit excludes --d-model"),
        (("-k", "0"), "neighbours (-k) is 0, but a memory is trained on what it reads"),
        (("--steps", "-1"), "steps"),
    ],
)
def test_options_that_do_not_fit_are_refused_and_nothing_is_written(work, capsys, tmp_path, options, fault):
    arguments = ("--retrofit", work / "model", "-o", tmp_path / "out", "--steps", 1, *OPTIONS, *options)
    assert run_here("train", work / "db", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert fault in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_window_beyond_the_models_positions_is_refused(work, refused, tmp_path):
    line = refused("evaluate", work / "run", work / "db", "-o", tmp_path / "out", "--sequence-length", 72)
    assert "64 positions" in line


def test_a_run_with_a_memory_gets_no_second_one(work, refused, tmp_path):
    line = refused("train", work / "db", "--retrofit", work / "run", "-o", tmp_path / "out")
    assert "is a model of others with what was added to it: give --retrofit that model itself" in line


@pytest.mark.parametrize("option", [("--paper-form",), ("--rank", "2"), ("--from-scratch",)])
def test_the_forms_of_a_memory_need_a_model_of_others(work, refused, tmp_path, option):
    line = refused("train", work / "db", *option, "-o", tmp_path / "out")
    assert "--paper-form, --rank and --from-scratch are for --retrofit of a model of others" in line


def test_a_run_with_an_encoder_is_repeated_only_with_its_form(work, refused, tmp_path):
    settings = ("--config", work / "paper" / "config.json")
    line = refused("train", work / "db", "--retrofit", work / "model", "-o", tmp_path / "out", *settings)
    assert "add --paper-form" in line


def test_a_runs_settings_need_its_base(work, refused, tmp_path):
    line = refused("train", work / "db", "--config", work / "run" / "config.json", "-o", tmp_path / "out")
    assert line.startswith("retro-np: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["weights", "gone"])
def test_a_run_whose_base_changed_or_is_gone_is_refused_by_each_command(work, refused, tmp_path, change):
    model, run = shutil.copytree(work / "model", tmp_path / "model"), tmp_path / "run"
    assert run_here("train", work / "db", "--retrofit", model, "-o", run, *OPTIONS, "--steps", 0) == 0
    if change == "gone":
        shutil.rmtree(model)
    else:
        write_decoder(model, seed=1)
    fault = f"no model at {model}" if change == "gone" else f"{model} is now another model"
    for arguments in (
        ("evaluate", run, work / "db", "-o", tmp_path / "out"), ("sample", run, work / "db"),
        ("inspect", run, work / "db", "text", "-o", tmp_path / "page.html"),
    ):  # fmt: skip
        assert fault in refused(*arguments)
    resumed = refused("train", work / "db", "--retrofit", model, "-o", run, *OPTIONS, "--steps", 2)
    assert "no model at" in resumed if change == "gone" else "begun_from" in resumed


def test_a_model_samples_with_its_memory_what_python_samples(work):
    database = Database.open(work / "db")
    params, config = load_model(work / "run", database)
    on, retrieved = generate(params, config, np.arange(12) + 60, 12, database=database, temperature=0)
    off, nothing = generate(params, config, np.arange(12) + 60, 12, database=database, k=0, temperature=0)
    assert len(retrieved) == 2
    assert not nothing
    assert not np.array_equal(on, off)
