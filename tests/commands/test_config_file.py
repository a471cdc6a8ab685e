"""Settings from TOML and from a run's config.json. Ground truth: the same settings as options, and their bytes."""

import contextlib
import dataclasses
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import typer
from support import SMALL, refused, run, write_corpus

from retro_np import EncoderConfig, RetroConfig, load_params, retro
from retro_np.cli import run as command
from retro_np.commands import app
from retro_np.commands.options import read_sections
from retro_np.errors import UserError
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.training.config import TrainingConfig

EXAMPLE = Path(__file__).parents[2] / "docs" / "run.toml"
SECTIONS = {"model": RetroConfig, "encoder": EncoderConfig, "training": TrainingConfig, "data": None}
TOML = """
[model]
d_model = 16
d_ffw = 24
n_heads = 2
d_head = 8
n_layers = 2
cca_layers = [2]
cca_positions = false
[encoder]
n_layers = 1
ca_layers = []
[training]
steps = 4
sequence_length = 16
batch_size = 2
learning_rate = 0.01
beta2 = 0.9
"""
OPTIONS = (
    "--d-model 16 --d-ffw 24 --n-heads 2 --d-head 8 --n-layers 2 --cca-layers 2 --no-cca-positions --encoder-layers 1 "
    "--no-conditioning --steps 4 --sequence-length 16 --batch-size 2 --learning-rate 0.01 --beta2 0.9"
)


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return build_database(write_corpus(folder / "docs", 12), folder / "db", SMALL, "hashing").path


@pytest.fixture
def toml(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path / "run.toml"


def trained(db, out, *arguments):
    """A run's configuration, the bytes of its checkpoint, and what the command said besides its progress."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert command(list(map(str, ["train", db, "-o", out, *arguments]))) in (None, 0)
    said = [line for line in err.getvalue().splitlines() if not line.startswith("training: ")]
    return json.loads((out / "config.json").read_text()), (out / "checkpoint.safetensors").read_bytes(), said


def test_a_file_and_the_same_options_train_the_same_bytes_and_options_override_the_file(db, toml, tmp_path):
    by_file = trained(db, tmp_path / "file", "--config", toml)
    assert by_file[:2] == trained(db, tmp_path / "options", *OPTIONS.split())[:2]
    config, _, _ = trained(db, tmp_path / "both", "--config", toml, "--steps", "2", "--encoder-ca-layers", "1")
    assert config["training"] == by_file[0]["training"] | {"steps": 2}
    assert config["model"]["encoder"] == by_file[0]["model"]["encoder"] | {"ca_layers": [1]}


def test_a_runs_own_configuration_repeats_it_to_the_same_bytes(db, toml, tmp_path):
    config, data, _ = trained(db, tmp_path / "first", "--config", toml)
    assert trained(db, tmp_path / "second", "--config", tmp_path / "first" / "config.json") == (config, data, [])


def test_a_baselines_own_configuration_repeats_and_prolongs_it(db, toml, tmp_path):
    config, data, _ = trained(db, tmp_path / "first", "--config", toml, "--baseline")
    settings = ("--config", tmp_path / "first" / "config.json")
    assert config["model"]["encoder"] is None
    assert trained(db, tmp_path / "second", *settings) == (config, data, [])
    assert trained(db, tmp_path / "first", *settings, "--steps", "5")[0]["training"]["segments"] == [4]


def test_no_layers_of_cca_are_written_as_the_help_says_and_make_a_baseline(db, toml, tmp_path):
    for name, option in (("layers", ("--cca-layers", "()")), ("baseline", ("--baseline",))):
        trained(db, tmp_path / name, "--config", toml, *option)
    (by_layers, config), (baseline, _) = (load_params(tmp_path / name) for name in ("layers", "baseline"))
    assert not config.retrieves
    assert np.array_equal(by_layers["readout"], baseline["readout"])


def test_two_sections_of_the_encoder_are_one_line(db, toml, tmp_path):
    toml.write_text(TOML + "[model.encoder]\nn_layers = 2\n")
    line = refused("train", db, "-o", tmp_path / "run", "--config", toml)
    assert "both [encoder] and [model.encoder]" in line


def test_a_prolonged_run_is_repeated_with_its_segments(db, toml, tmp_path):
    trained(db, tmp_path / "first", "--config", toml)
    config, data, _ = trained(db, tmp_path / "first", "--config", toml, "--steps", "7")
    assert config["training"]["segments"] == [4]
    assert trained(db, tmp_path / "second", "--config", tmp_path / "first" / "config.json")[:2] == (config, data)


def test_a_run_is_prolonged_again_and_again_with_its_own_configuration(db, toml, tmp_path):
    settings = ("--config", tmp_path / "first" / "config.json")
    trained(db, tmp_path / "first", "--config", toml)
    trained(db, tmp_path / "first", *settings, "--steps", "6")
    elsewhere = trained(db, tmp_path / "second", *settings, "--steps", "8")[:2]
    assert trained(db, tmp_path / "first", *settings, "--steps", "8")[:2] == elsewhere
    assert elsewhere[0]["training"]["segments"] == [4, 6]


def test_another_database_is_said_in_one_line(db, toml, tmp_path):
    trained(db, tmp_path / "first", "--config", toml)
    other = build_database(write_corpus(tmp_path / "docs", 12, seed=3), tmp_path / "db", SMALL, "hashing").path
    _, _, err = trained(other, tmp_path / "second", "--config", tmp_path / "first" / "config.json")
    fault = "is of a run with another database and tokenizer, so this run will not repeat it"
    assert err == [f"{tmp_path}/first/config.json {fault}"]


def test_retrofit_follows_the_baseline_starts_copying_and_is_repeated_only_with_its_checkpoint(db, toml, tmp_path):
    trained(db, tmp_path / "baseline", "--config", toml, "--baseline")
    checkpoint = tmp_path / "baseline" / "checkpoint.safetensors"
    steps = ("--steps", "3", "--sequence-length", "16", "--retrofit", checkpoint)
    config, data, _ = trained(db, tmp_path / "retrofit", *steps, "--cca-layers", "2", "--copying-start")
    baseline, small = load_params(checkpoint)
    params, model = load_params(tmp_path / "retrofit" / "checkpoint.safetensors")
    sizes = ("d_model", "d_ffw", "n_heads", "d_head")
    assert [getattr(model.encoder, size) for size in sizes] == [16, 24, 2, 8]
    tokens = np.arange(2, 34)[None]
    assert model == replace(small, cca_layers=(2,), encoder=model.encoder, copying_start=True)
    assert np.array_equal(retro(params, model, tokens, None)[0], retro(baseline, small, tokens, None)[0])
    settings = ("--config", tmp_path / "retrofit" / "config.json")
    line = refused("train", db, "-o", tmp_path / "again", *settings)
    assert "began from a checkpoint" in line
    assert "--retrofit" in line
    assert trained(db, tmp_path / "again", *settings, "--retrofit", checkpoint) == (config, data, [])


def test_a_file_may_not_contradict_the_database_or_an_option_that_fixes_the_sizes(db, toml, tmp_path):
    assert "[model] d_model is 16, but --preset has 896" in refused(
        "train", db, "-o", tmp_path / "run", "--config", toml, "--preset", "retro-172m"
    )
    toml.write_text(TOML.replace("[model]", "[model]\nvocabulary_size = 17"))
    assert f"run.toml: [model] vocabulary_size is 17, but {db} has 300; leave it out of the file" in refused(
        "train", db, "-o", tmp_path / "run", "--config", toml
    )


def test_settings_of_the_optimiser_and_of_the_log_reach_the_run(db, toml, tmp_path):
    optimiser = ("--clip", "0.5", "--schedule", "linear", "--beta1", "0.8", "--min-learning-rate", "0")
    config, _, _ = trained(db, tmp_path / "run", "--config", toml, *optimiser, "--eval-every", "2", "--log", "csv")
    settings = {name: config["training"][name] for name in ("clip", "schedule", "beta1", "beta2", "min_learning_rate")}
    assert settings == {"clip": 0.5, "schedule": "linear", "beta1": 0.8, "beta2": 0.9, "min_learning_rate": 0.0}
    header, *lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert [bool(line.split(",")[header.split(",").index("valid_bpb")]) for line in lines] == [False, True, False, True]
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert "choose tensorboard, csv, wandb" in refused("train", db, "-o", tmp_path / "no", "--log", "paper")


def test_a_log_that_is_not_continued_is_said_in_one_line(db, toml, tmp_path):
    trained(db, tmp_path / "run", "--config", toml, "--log", "csv")
    _, _, said = trained(db, tmp_path / "run", "--config", toml, "--steps", "5")
    assert f"{tmp_path}/run has a log for csv, which only --log csv continues" in said
    trained(db, tmp_path / "run", "--config", toml, "--steps", "6", "--log", "csv")
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1 + 6


def test_a_run_keeps_its_number_of_steps_unless_steps_are_given(db, tmp_path):
    options = OPTIONS.replace("--steps 4 ", "").split()
    first = trained(db, tmp_path / "run", *options, "--steps", "4")
    config, data, said = trained(db, tmp_path / "run", *options)
    assert (config, data) == first[:2]
    assert said == [f"{tmp_path}/run holds a run of 4 steps; without --steps it keeps this number"]


def test_fewer_steps_than_those_of_a_files_prolonged_run_are_one_line_with_their_number(db, toml, tmp_path):
    for steps in ("4", "7"):
        trained(db, tmp_path / "run", "--config", toml, "--steps", steps)
    config = tmp_path / "run" / "config.json"
    line = refused("train", db, "-o", tmp_path / "new", "--config", config, "--steps", "4")
    assert f"{config}: the run has 7 steps, since it was prolonged after step 4: give at least --steps 7" in line


def test_a_runs_folder_stands_for_its_checkpoint(db, toml, tmp_path):
    trained(db, tmp_path / "run", "--config", toml, "--baseline")
    file = tmp_path / "run" / "checkpoint.safetensors"
    small = ("--steps", "1", "--sequence-length", "16", "--cca-layers", "2")
    by_folder, by_file = (
        trained(db, tmp_path / name, "--retrofit", path, *small)
        for name, path in (("a", tmp_path / "run"), ("b", file))
    )
    assert by_folder == by_file
    sample = ("sample", tmp_path / "a", db, "--length", "3", "--page", tmp_path / "a" / "page.html")
    assert command(list(map(str, sample))) in (None, 0)
    assert load_params(tmp_path / "run")[1] == load_params(file)[1]
    assert f"{tmp_path} holds no model: give a run's folder, " in refused("sample", tmp_path, db)
    message = refused("train", db, "-o", tmp_path / "c", "--retrofit", tmp_path)
    assert f"{tmp_path} holds no model: give a run's folder, " in message


BUILD = """
[build]
corpus = ["docs"]
out = "db"
embedder = "hashing"
chunk_size = 8
vocabulary_size = 300
held_out = 0
exclude = ["module_00*"]
limit_mb = 1
"""


def test_a_build_takes_all_its_options_from_a_file_and_typed_ones_override_it(tmp_path):
    write_corpus(tmp_path / "docs", 8)
    (tmp_path / "build.toml").write_text(BUILD)
    for options in ((), ("-o", "other", "--vocabulary-size", "290")):
        status, out, err = run("build", "--config", "build.toml", *options, cwd=tmp_path)
        assert status == 0, err
        assert "train: 7 documents" in out
    manifests = [json.loads((tmp_path / db / "manifest.json").read_text()) for db in ("db", "other")]
    assert [(m["chunk_size"], m["vocabulary_size"]) for m in manifests] == [(8, 300), (8, 290)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("corpsu = []", "[build]: unknown key corpsu; did you mean corpus?"),
        ("corpus = 'docs'", "[build] corpus must be a list or null, not 'docs'"),
        ("out = 3", "[build] out must be a text or null, not 3"),
        ("config = 'other.toml'", "[build]: unknown key config; choose from corpus, out, source"),
        ("out = 'db'\nlimit_mb = inf", "--limit-mb must be a finite number, not inf"),
        ("out = 'db'\ndeduplicate = 2", "deduplicate must be from 0 to 1, not 2.0"),
        ("out = 'db'\ncorpus = ['a']\ntrain = ['b']", "leave out CORPUS and --source"),
        ("out = 'db'\nchunk_size = 0", "chunk_size must be a whole number of at least 1, not 0"),
    ],
)
def test_a_bad_section_of_a_build_is_one_line_with_the_file(line, fault, tmp_path):
    (tmp_path / "build.toml").write_text(f"[build]\n{line}\n")
    said = refused("build", "--config", tmp_path / "build.toml")
    assert said.startswith(f"retro-np: {tmp_path}/build.toml: ")
    assert fault in said


BAD = {
    "[model": "is not TOML (Expected ']'",
    "a = '\udc80'": "is not TOML ('utf-8' codec can't decode",
    "a = " + "[" * 9999: "is not TOML (maximum recursion depth exceeded",
    "a." * 300 + "a = 1": "has a line with more than 200 dots",
    "#" * (1 << 18) + "#": "has more than 262,144 bytes",
    "{": "is not JSON (",
    '{"training": {"clip": NaN}}': "is not JSON (NaN is not a JSON number)",
    "[trainign]": "unknown section trainign; did you mean training?",
    "steps = 3": "unknown section steps; choose from build, model, encoder, training, data",
    "training = 3": "[training] must be a section with keys, not 3",
    "[training]\nstep = 3": "[training]: unknown key step; did you mean steps?",
    "[training]\nsteps = true": "[training] steps must be a whole number, not True",
    "[training]\nsteps = 1.5": "[training] steps must be a whole number, not 1.5",
    "[training]\nsteps = 0x" + "f" * 9999: "[training] steps must be a whole number, not a number that is too large",
    "[training]\nclip = 'x'": "[training] clip must be a number, not 'x'",
    "[training]\nsegments = 3": "[training] segments must be a list, not 3",
    "[training]\neval_chunks = 'x'": "[training] eval_chunks must be a whole number or null, not 'x'",
    "[model]\ncca_layers = [1, true]": "[model] cca_layers, entry 2 must be a whole number, not True",
    "[model]\ntie_readout = 1": "[model] tie_readout must be true or false, not 1",
    "[model.encoder]\nd_modell = 3": "[model] encoder: unknown key d_modell; did you mean d_model?",
    "[model]\nencoder = 3": "[model] encoder must be a section or null, not 3",
    "[encoder]\nd_model = 2024-01-01": "[encoder] d_model must be a whole number, not datetime.date(2024, 1, 1)",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30])
def test_a_bad_file_is_one_line_with_file_and_key(text, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as raised:
        read_sections(path, SECTIONS)
    assert str(raised.value).startswith(f"{path}")
    assert BAD[text] in str(raised.value)


@pytest.mark.parametrize("text", ["[training]\nbatch_size = 0", "[model]\nd_model = 15", "[encoder]\nd_head = 0"])
def test_a_value_out_of_range_is_one_line_that_names_the_file(text, db, tmp_path):
    (tmp_path / "bad.toml").write_text(text)
    line = refused("train", db, "-o", tmp_path / "run", "--config", tmp_path / "bad.toml")
    assert line.startswith(f"retro-np: {tmp_path}/bad.toml: ")
    assert text.split("\n")[1].split(" =")[0] in line


def test_what_is_no_file_is_one_line(db, tmp_path):
    assert "config.json: No such file" in refused("train", db, "-o", tmp_path / "run", "--config", tmp_path)
    assert "is not an ordinary file" in refused("train", db, "-o", tmp_path / "run", "--config", "/dev/null")
    assert "No such file" in refused("train", db, "-o", tmp_path / "run", "--config", tmp_path / "none.toml")


def test_old_names_of_fields_are_read(tmp_path):
    (tmp_path / "old.toml").write_text("[training]\nlent = 0.5\nlent_steps = 9\n")
    assert read_sections(tmp_path / "old.toml", SECTIONS)["training"] == {"oracle_share": 0.5, "oracle_steps": 9}


def test_the_example_of_the_documentation_names_every_setting_with_its_default():
    sections = read_sections(EXAMPLE, SECTIONS)
    assert sections["training"] == {
        name: value for name, value in asdict(TrainingConfig()).items() if name not in ("eval_chunks", "segments")
    }
    defaults = {p.name: p.default for p in typer.main.get_command(app).commands["train"].params}
    layers = tuple(map(int, defaults.pop("cca_layers").split(",")))
    model = RetroConfig(vocabulary_size=300, **sections["model"], encoder=EncoderConfig(**sections["encoder"]))
    assert model.cca_layers == layers
    assert {name: defaults.get(name, value) for name, value in sections["model"].items()} | {"cca_layers": layers} == (
        sections["model"]
    )
    assert sections["encoder"].keys() == EncoderConfig.__dataclass_fields__.keys()
    assert set(sections["model"]) == RetroConfig.__dataclass_fields__.keys() - {
        "vocabulary_size",
        "chunk_size",
        "encoder",
        "padding_id",  # the database's
    }


def test_the_example_of_the_documentation_names_every_setting_of_a_build_with_its_default():
    named = read_sections(EXAMPLE, {"build": None})["build"]
    defaults = {p.name: p.default for p in typer.main.get_command(app).commands["build"].params}
    assert {name: defaults[name] or [] for name in named.keys() - {"corpus", "out"}} == {
        name: named[name] for name in named.keys() - {"corpus", "out"}
    }
    fields = {f.name: f.default for f in dataclasses.fields(BuildConfig)}
    without = {
        "limit_bytes",
        "shard_bytes",
        "duplicates",
        "d_key",
    }  # named otherwise, or without a default
    assert {name for name, value in fields.items() if value is not None} - without <= named.keys()


def test_the_example_of_the_documentation_builds_and_trains(tmp_path):
    write_corpus(tmp_path / "docs", 8)
    small = ("--embedder", "hashing", "--vocabulary-size", "300", "--chunk-size", "8")
    status, _, err = run("build", "docs", "--config", EXAMPLE, *small, cwd=tmp_path)
    assert status == 0, err
    small = ("--steps", "1", "--sequence-length", "16", "--batch-size", "1")
    config, _, _ = trained(tmp_path / "runs" / "db", tmp_path / "run", "--config", EXAMPLE, *small)
    plain, _, _ = trained(tmp_path / "runs" / "db", tmp_path / "plain", *small)
    assert config == plain


def test_a_file_with_no_cca_layers_trains_a_baseline_that_its_own_configuration_repeats(db, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[model]\nd_model = 16\nn_heads = 2\nd_head = 8\nn_layers = 2\ncca_layers = []\n[training]\nsteps = 1\n"
    )
    config, data, _ = trained(db, tmp_path / "first", "--config", path, "--sequence-length", "16")
    assert config["model"]["encoder"] is None
    again = ("--config", tmp_path / "first" / "config.json")
    assert trained(db, tmp_path / "second", *again)[:2] == (config, data)
    assert trained(db, tmp_path / "first", *again)[:2] == (config, data)


def test_default_layers_that_the_baseline_does_not_have_are_refused_with_their_option(db, toml, tmp_path):
    trained(db, tmp_path / "baseline", "--config", toml, "--baseline")
    line = refused("train", db, "-o", tmp_path / "retrofit", "--retrofit", tmp_path / "baseline", "--steps", "1")
    assert "cca_layers is 2,4, but the model has 2 layers: give --cca-layers" in line
