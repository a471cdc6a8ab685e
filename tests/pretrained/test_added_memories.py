"""A run's file holds what was added to a model of others, and names that model. Ground truth: the model itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from memory_runs import M, build, train_memory, write_decoder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from retro_np import Database, UserError, load_params, load_pretrained, retro
from retro_np.parameters import is_retrieval
from retro_np.pretrained.models import load_model, own_file, read_pretrained
from retro_np.tree import named_leaves

TOKENS = np.random.default_rng(1).integers(0, 259, (2, 32))
NEIGHBOURS = np.random.default_rng(2).integers(0, 259, (2, 4, 2, 2 * M))
FILE = "checkpoint.safetensors"


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def work(kind, tmp_path_factory):
    """A decoder, a database with its tokenizer, and a run that trained a memory."""
    work = tmp_path_factory.mktemp(kind)
    model = write_decoder(work / "model", kind)
    database = Database.open(build(work / "db", model / "tokenizer.json"))
    _, trained = train_memory(database, model, work / "run")
    return work, database, trained


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    work = tmp_path_factory.mktemp("one")
    model = write_decoder(work / "model")
    database = Database.open(build(work / "db", model / "tokenizer.json"))
    train_memory(database, model, work / "run")
    return work


@pytest.fixture
def run(llama, tmp_path):
    """A copy of a run, to be damaged."""
    return shutil.copytree(llama / "run", tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def rewrite(file, change_meta=lambda meta: meta, **tensors):
    """Write a file again with other metadata and other tensors."""
    with safe_open(file, "numpy") as opened:
        meta = json.loads(opened.metadata()["retro_np"])
    meta = change_meta(meta)
    save_file(load_file(file) | tensors, file, {"retro_np": json.dumps(meta)})


def test_a_loaded_run_has_the_trained_memory_and_the_models_own_weights(work):
    folder, _, trained = work
    params, config, tokenizer = load_pretrained(folder / "run")
    for name, leaf in named_leaves(trained):
        assert np.array_equal(leaf, dict(named_leaves(params))[name]), name
    assert config.cca_layers == (1, 2)
    assert tokenizer.to_str() == read_pretrained(folder / "model").tokenizer.to_str()


@pytest.mark.parametrize("file", [FILE, "best.safetensors"])
def test_with_retrieval_off_a_loaded_run_equals_its_base_to_the_bit(work, file):
    params, config, _ = load_pretrained(work[0] / "run" / file)
    base, base_config, _ = load_pretrained(work[0] / "model")
    assert np.array_equal(retro(params, config, TOKENS, None)[0], retro(base, base_config, TOKENS, None)[0])
    assert not np.array_equal(retro(params, config, TOKENS, NEIGHBOURS)[0], retro(base, base_config, TOKENS, None)[0])


def test_a_loaded_run_keeps_what_its_base_says_of_texts_and_their_end(work):
    model, run = (read_pretrained(work[0] / name) for name in ("model", "run"))
    assert (run.stop, run.chat_template, run.special) == (model.stop, model.chat_template, model.special)
    assert run.files == [work[0] / "run" / FILE, *model.files]


def test_a_run_is_ready_for_its_database_by_its_name(work):
    folder, database, trained = work
    params, config = load_model(folder / "run", database)
    assert config.chunk_size == M
    assert {name for name, _ in named_leaves(params)} == {name for name, _ in named_leaves(trained)}


def refusal(call, *arguments):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_base_whose_weights_changed_is_refused_by_its_hash(llama, run, tmp_path):
    model = shutil.copytree(llama / "model", tmp_path / "model")
    rewrite(run / FILE, lambda meta: meta | {"base": meta["base"] | {"name": str(model)}})
    assert load_pretrained(run)[1].cca_layers == (1, 2)
    write_decoder(model, seed=1)
    line = refusal(load_pretrained, run)
    assert f"{run / FILE} was trained on {model} (" in line
    assert f"{model} is now another model" in line
    assert f"retro-np train DB --retrofit {model}" in line


def test_a_missing_base_is_named_with_the_run(run, tmp_path):
    gone = tmp_path / "gone" / "model"
    rewrite(run / FILE, lambda meta: meta | {"base": meta["base"] | {"name": str(gone)}})
    line = refusal(load_pretrained, run)
    assert line.startswith(f"{run / FILE} holds only what was added to a model: no model at {gone}: give ")


def test_a_file_of_what_was_added_is_not_a_model_by_itself(run):
    assert "read it with load_pretrained" in refusal(load_params, run)


def test_a_base_that_is_a_model_of_ours_is_refused_also_the_file_itself(run):
    for name in (run, run / FILE, run / "best.safetensors", "retro", "baseline", "x" * 5000 + ".safetensors"):
        rewrite(run / FILE, lambda meta, name=name: meta | {"base": meta["base"] | {"name": str(name)}})
        assert "is a model of ours, to which nothing is added" in refusal(load_pretrained, run)


@pytest.mark.parametrize(
    "base", [{}, [], 0, False, "smollm2", {"name": "x"}, {"name": 5, "sha256": ""}, {"name": "x", "sha256": None}]
)
def test_damaged_metadata_of_a_base_is_refused(run, base):
    rewrite(run / FILE, lambda meta: meta | {"base": base})
    fault = f"{run / FILE}: 'base' in its metadata does not name a model: use another checkpoint"
    assert [refusal(call, run / FILE) for call in (load_pretrained, load_params)] == [fault] * 2


def test_more_metadata_of_a_base_is_not_looked_at(run):
    rewrite(run / FILE, lambda meta: meta | {"base": meta["base"] | {"file": "x", "label": 5}})
    assert load_pretrained(run)[1].cca_layers == (1, 2)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("layers.0.cca.gate", np.zeros(5, np.float32)), ("layers.1.cca.up_q", np.zeros((2, 31), np.float32)),
        ("layers.1.cca.down_o", np.full((32, 2), np.nan, np.float32)), ("embedding", np.zeros((9, 32), np.float32)),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_their_names(run, name, array):
    rewrite(run / FILE, **{name: array})
    assert f"{run / FILE}: {name} is " in refusal(load_pretrained, run)


def test_a_file_without_a_part_of_the_memory_is_refused(run):
    tensors = load_file(run / FILE)
    with safe_open(run / FILE, "numpy") as opened:
        meta = opened.metadata()
    del tensors["layers.1.cca.down_v"]
    save_file(tensors, run / FILE, meta)
    assert "layers.1.cca.down_v is absent" in refusal(load_pretrained, run)


def test_a_configuration_of_another_base_is_refused(run):
    with safe_open(run / FILE, "numpy") as opened:
        config = json.loads(opened.metadata()["retro_np"])["config"]
    for change in ({"d_model": 48}, {"n_layers": 3}, {"vocabulary_size": 300}, {"n_kv_heads": 4}):
        rewrite(run / FILE, lambda meta, change=change: meta | {"config": config | change})
        assert f"{run / FILE}: " in refusal(load_pretrained, run)


def test_a_run_is_read_from_another_folder(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_pretrained(llama / "run")[1].cca_layers == (1, 2)


def test_a_runs_file_is_much_smaller_than_its_base(llama):
    stored = load_file(llama / "run" / "best.safetensors")
    assert sum(array.size for array in stored.values()) == 2 * (4 + 2 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32))
    assert all(map(is_retrieval, stored))


@pytest.mark.parametrize(
    "change", [{"max_positions": 9}, {"rotary_base": 7.0}, {"norm_eps": 0.5}, {"padding_id": 3}, {"biases": ["w_q"]}]
)
def test_a_file_that_would_change_its_base_is_refused(run, change):
    with safe_open(run / FILE, "numpy") as opened:
        config = json.loads(opened.metadata()["retro_np"])["config"]
    rewrite(run / FILE, lambda meta: meta | {"config": config | change})
    assert refusal(load_pretrained, run).startswith(f"{run / FILE}: its configuration is not that of ")


@pytest.mark.parametrize("change", [{"rank": 0}, {"cca_layers": [9]}, {"changed": ["x"]}, {"begin_id": -1}])
def test_a_damaged_configuration_names_its_file(run, change):
    with safe_open(run / FILE, "numpy") as opened:
        config = json.loads(opened.metadata()["retro_np"])["config"]
    rewrite(run / FILE, lambda meta: meta | {"config": config | change})
    assert refusal(load_pretrained, run).startswith(f"{run / FILE}: {next(iter(change))} ")


def test_a_folder_with_the_name_of_smollm2_does_not_stand_for_it(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama / "run", tmp_path / "smollm2", ignore=shutil.ignore_patterns(".lock"))
    assert own_file("smollm2") is None
    assert own_file(Path("smollm2")) == Path("smollm2", FILE)
