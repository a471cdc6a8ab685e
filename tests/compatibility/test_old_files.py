"""Databases, runs and checkpoints of version 0.1.0 work with the current code. Ground truth: that version's results.

`make.py` made the files. Results must match bit for bit if the processor, the kernels, NumPy and hnswlib are those
that made the files; otherwise they must match within a tolerance.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from recorded import arrays_of, environment, file_hashes, parameters_sha256
from support import run

from retro_np import Database, generate, load_params
from retro_np.checkpoint import load_model
from retro_np.report.samples import prompt_tokens
from retro_np.tree import map_tree

FILES = Path(__file__).parent / "files"
EXPECTED = json.loads((FILES / "expected.json").read_text())
SAME_ENVIRONMENT = environment() == EXPECTED["environment"]
TOLERANCE = 1e-4  # Float32 may differ by this much after nine steps on another processor.


@pytest.fixture
def old_files(tmp_path, monkeypatch):
    """The old files, unpacked into the working directory, with OpenBLAS set up as it was when they were made."""
    for name, value in EXPECTED["variables"].items():
        monkeypatch.setenv(name, value)
    with tarfile.open(FILES / "old.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def succeed(*arguments):
    """Run a command that must succeed; return what it printed on standard output and standard error."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return out, err


def assert_same_files(folder, expected):
    """Every file has the recorded bytes.

    In another environment, the names are equal, and so are the integer files (tokens, documents).
    """
    hashes = file_hashes(folder)
    if not SAME_ENVIRONMENT:
        assert hashes.keys() == expected.keys()
        hashes, expected = (
            {name: value for name, value in files.items() if "tokens" in name or "documents" in name}
            for files in (hashes, expected)
        )
    assert hashes == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finished", "edited"])
def test_an_old_database_gives_the_same_search_results(old_files, name):
    database = Database.open(old_files / name)
    for query, expected in EXPECTED["searches"][name].items():
        ids, distances = database.search(query, 3)
        assert ids.tolist() == [result["id"] for result in expected]
        np.testing.assert_allclose(distances, [result["distance"] for result in expected], rtol=TOLERANCE)
        printed = [json.loads(line) for line in succeed("search", name, query, "-k", "3", "--json")[0].splitlines()]
        for result, recorded in zip(printed, expected, strict=True):
            assert result == recorded | {"distance": pytest.approx(recorded["distance"], rel=TOLERANCE)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finished", "edited"])
def test_an_old_database_is_verified(old_files, name):
    assert "BROKEN" not in succeed("verify", name)[0]


def test_the_held_out_part_of_an_old_database_serves_for_tuning_and_for_reporting(old_files, capsys):
    database = Database.open("finished")
    assert database.held_out_splits == ["valid"]
    assert np.array_equal(database.split("test").tokens[:], database.split("valid").tokens[:])
    assert "finished has no test part: its held-out documents (valid) serve for tuning" in capsys.readouterr().err


@pytest.mark.slow
def test_editing_an_old_database_gives_the_same_files_as_the_old_version(old_files):
    succeed("add", "finished", "more")
    succeed("remove", "finished", "--document", "corpus_03.txt", "--document", "more_01.txt")
    assert_same_files("finished", file_hashes("edited"))
    succeed("verify", "finished")


# half_added: stopped while the new files were made. not_moved: stopped when all were made, but not yet in place.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["half_added", "not_moved"])
def test_completing_an_interrupted_old_edit_gives_the_same_files(old_files, name):
    shutil.copytree("finished", name, dirs_exist_ok=True)
    if name == "half_added":
        assert not (old_files / name / "edit" / "manifest.json").exists()
        succeed("add", name, "more")
    else:
        assert (old_files / name / "edit" / "manifest.json").exists()
        Database.open(name)
    assert not (old_files / name / "edit").exists()
    assert_same_files(name, EXPECTED["added"])
    succeed("verify", name)


def test_compacting_an_old_edited_database_gives_the_same_files(old_files):
    succeed("compact", "edited")
    assert_same_files("edited", EXPECTED["compacted"])
    succeed("verify", "edited")


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_resuming_an_unfinished_old_build_gives_the_same_files(old_files, spelling):
    arguments = EXPECTED["build"]
    if spelling == "new":
        arguments = ["--extra-candidates" if option == "--spares" else option for option in arguments]
    assert (old_files / "unfinished" / "work").is_dir()
    succeed("build", *arguments, "-o", "unfinished")
    assert_same_files("unfinished", EXPECTED["finished"])
    succeed("verify", "unfinished")


def test_a_finished_old_build_is_reused(old_files):
    hashes = file_hashes("finished")
    _, err = succeed("build", *EXPECTED["build"], "-o", "finished")
    assert "already holds this database" in err
    assert file_hashes("finished") == hashes


def test_resuming_a_stopped_old_run_gives_the_same_parameters(old_files):
    step = json.loads((old_files / "stopped" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert step < 8  # the run has steps 0 to 8
    succeed("train", "finished", "-o", "stopped", *EXPECTED["train"], *EXPECTED["curriculum"])
    params, _ = load_params("stopped/checkpoint.safetensors")
    expected, _ = load_params("params.safetensors")  # the old version's, resumed from the same checkpoint
    for (name, array), (_, expected_array) in zip(arrays_of(params), arrays_of(expected), strict=True):
        np.testing.assert_allclose(array, expected_array, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    if SAME_ENVIRONMENT:
        assert parameters_sha256(params) == EXPECTED["parameters"]["params.safetensors"]


def test_a_finished_old_run_is_not_trained_further(old_files):
    checkpoint = (old_files / "run" / "checkpoint.safetensors").read_bytes()
    succeed("train", "finished", "-o", "run", *EXPECTED["train"])
    assert (old_files / "run" / "checkpoint.safetensors").read_bytes() == checkpoint


def test_an_old_run_has_the_same_bits_per_byte(old_files):
    succeed("evaluate", "run/checkpoint.safetensors", "finished", *EXPECTED["window"], "-o", "evaluation")
    models = json.loads((old_files / "evaluation" / "results.json").read_text())["models"]
    tolerance = 1e-12 if SAME_ENVIRONMENT else TOLERANCE
    assert models.keys() == EXPECTED["models"].keys()
    for name, expected in EXPECTED["models"].items():
        assert models[name] == pytest.approx(expected, rel=tolerance)


def test_an_old_run_samples_the_same_tokens(old_files):
    sample = EXPECTED["sample"]
    database = Database.open("finished")
    params, config = load_model("run/checkpoint.safetensors", database)
    tokens, retrieved = generate(
        params, config, prompt_tokens(database, sample["prompt"]), database=database, **sample["settings"]
    )
    assert tokens.tolist() == sample["tokens"]
    assert [chunk.ids.tolist() for chunk in retrieved] == sample["retrieved"]


@pytest.mark.parametrize("name", EXPECTED["parameters"])
def test_old_parameters_are_loaded_bit_for_bit(old_files, name):
    params, config = load_params(name)
    assert {array.dtype for _, array in arrays_of(params)} == {np.dtype(np.float32)}
    if name == "float16.safetensors":  # Half precision is for storage; the cast back is exact.
        params = map_tree(lambda _, array: array.astype(np.float16), params)
    assert parameters_sha256(params) == EXPECTED["parameters"][name]
    assert config.share_embeddings
    assert config.tie_readout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["params.safetensors", "float16.safetensors"])
def test_old_parameters_without_a_run_can_be_sampled_from(old_files, name):
    out, _ = succeed("sample", name, "finished", "--prompt", "ships and tides", "--length", "8")
    assert "corpus_" in out


@pytest.mark.slow
def test_a_warning_of_one_line_gives_the_new_name_of_each_old_option(old_files):
    shutil.rmtree("finished")
    _, err = succeed("build", *EXPECTED["build"], "-o", "finished")
    assert "retro-np: --spares is now called --extra-candidates; the old name works until version 0.3" in err
    _, err = succeed("train", "finished", "-o", "new", *EXPECTED["train"], *EXPECTED["curriculum"])
    for line in (
        "retro-np: --lent is now called --oracle-share; the old name works until version 0.3",
        "retro-np: --lent-steps is now called --oracle-steps; the old name works until version 0.3",
    ):
        assert err.splitlines().count(line) == 1
    assert_same_files("finished", EXPECTED["finished"])
