"""Memories and adaptations of version 0.2.0 work with the current code. Ground truth: that version's results.

`make_memory.py` made the files; how exactly results must match, `test_old_files.py` says."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from memory_runs import train_memory
from recorded import environment, parameters_sha256
from support import run

from retro_np import Database, generate, load_pretrained
from retro_np.nn.memory import is_added
from retro_np.tree import named_leaves

FILES = Path(__file__).parent / "files"
EXPECTED = json.loads((FILES / "memory.json").read_text())
SAME_ENVIRONMENT = environment() == EXPECTED["environment"]
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _old_files(tmp_path, monkeypatch):
    for name, value in EXPECTED["variables"].items():
        monkeypatch.setenv(name, value)
    with tarfile.open(FILES / "memory.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def added(params):
    """What was added to the decoder, by name."""
    return {name: array for name, array in named_leaves(params) if is_added(name)}


@pytest.mark.parametrize("name", EXPECTED["added"])
def test_what_an_old_run_added_is_loaded_bit_for_bit(name):
    assert parameters_sha256(added(load_pretrained(Path(name))[0])) == EXPECTED["added"][name]


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_an_old_run_has_the_same_bits_per_byte(name):
    status, _, err = run("evaluate", name, "db", *EXPECTED["window"], "-o", "evaluation")
    assert status == 0, err
    models = json.loads(Path("evaluation", "results.json").read_text())["models"]
    assert models.keys() == EXPECTED["models"][name].keys()
    for condition, expected in EXPECTED["models"][name].items():
        assert models[condition]["bpb"] == pytest.approx(expected, rel=1e-12 if SAME_ENVIRONMENT else TOLERANCE)


def test_an_old_run_samples_the_same_tokens():
    sample = EXPECTED["sample"]
    params, config, tokenizer = load_pretrained(Path("run"))
    prompt = tokenizer.encode(sample["prompt"]).ids
    tokens, retrieved = generate(params, config, prompt, database=Database.open("db"), **sample["settings"])
    assert tokens.tolist() == sample["tokens"]
    assert [chunk.ids.tolist() for chunk in retrieved] == sample["retrieved"]


def test_a_stopped_old_run_is_resumed_to_the_same_parameters():
    _, trained = train_memory(Database.open("db"), Path("model"), Path("stopped"))
    expected = added(load_pretrained(Path("run"))[0])
    assert added(trained).keys() == expected.keys()
    for name, array in added(trained).items():
        np.testing.assert_allclose(array, expected[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def test_an_old_run_is_not_trained_further():
    before = Path("run", "checkpoint.safetensors").read_bytes()
    train_memory(Database.open("db"), Path("model"), Path("run"))
    assert Path("run", "checkpoint.safetensors").read_bytes() == before
