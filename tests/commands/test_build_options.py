"""The options of `build` that name splits, fields and embedders. Ground truth: the documents that the test wrote."""

import json
from pathlib import Path

import pytest
from support import refused, run

from retro_np.retrieval.database import Database

SMALL_BUILD = ("--embedder", "hashing", "--chunk-size", "8", "--vocabulary-size", "300", "--deduplicate", "0")
EMBEDDER = """
import numpy as np
class Lengths:
    name, sha256, d_key = "lengths", "ab" * 32, 2
    def embed(self, texts, show_progress=False):
        return np.array([[len(text), text.count("e")] for text in texts], np.float32).reshape(-1, 2)
"""


@pytest.fixture
def folders(tmp_path):
    """Three folders of one name, each with its own documents."""
    for split, count in (("train", 4), ("valid", 2), ("test", 1)):
        (tmp_path / split / "docs").mkdir(parents=True)
        for number in range(count):
            words = f"{split} {number} value index token chunk neighbour\n" * 20
            (tmp_path / split / "docs" / f"{split}{number}.txt").write_text(words)
    return {split: tmp_path / split / "docs" for split in ("train", "valid", "test")}


def names_of(folder: Path) -> dict[str, set[str]]:
    database, names = Database.open(folder), {}
    for record in database.documents:
        names.setdefault(record["split"], set()).add(record["name"])
    return names


def test_train_valid_and_test_name_the_documents_of_each_split(folders, tmp_path):
    arguments = [part for split, folder in folders.items() for part in (f"--{split}", folder)]
    status, _, err = run("build", "-o", tmp_path / "db", *arguments, *SMALL_BUILD)
    assert status == 0, err
    names = names_of(tmp_path / "db")
    assert {split: len(found) for split, found in names.items()} == {"train": 4, "valid": 2, "test": 1}
    assert all(name.rpartition("/")[2].startswith(split) for split, found in names.items() for name in found)


def test_each_of_the_three_can_be_repeated_also_with_weights(folders, tmp_path):
    train = ("--train", f"{folders['train']}:0.7", "--train", f"{folders['test']}:0.3")
    status, _, err = run("build", "-o", tmp_path / "db", *train, "--valid", folders["valid"], *SMALL_BUILD)
    assert status == 0, err
    sources = json.loads((tmp_path / "db" / "manifest.json").read_text())["sources"]
    assert [(source["name"], source["weight"]) for source in sources] == [("docs", 0.7), ("docs-2", 0.3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{train}", "--train", "{test}"], "name all documents: leave out CORPUS and --source"),
        (["--source", "a={train}", "--valid", "{valid}"], "name all documents: leave out CORPUS and --source"),
        (["--valid", "{valid}"], "name at least one --train"),
        (["--train", "{train}:1", "--train", "{test}"], "give every source to train on a weight, or none"),
        (["--train", "{train}", "--test", "{test}:1"], "give every source to train on a weight, or none, and no other"),
        (["--train", "{train}", "--valid", "nowhere"], "nowhere"),
    ],
)
def test_splits_that_do_not_fit_together_are_one_line(arguments, line, folders, tmp_path):
    arguments = [argument.format(**folders) for argument in arguments]
    assert line in refused("build", "-o", tmp_path / "db", *arguments, *SMALL_BUILD)
    assert not (tmp_path / "db").exists()


@pytest.mark.slow
def test_fields_of_rows_are_named_by_options_also_when_rows_are_added(tmp_path):
    def rows(name, numbers):
        lines = ({"body": f"text {i} value index\n" * 30, "key": f"{name} {i}", "part": "dev" * (i % 2) or "train"}
                 for i in numbers)  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    fields = ("--text-field", "body", "--name-field", "key", "--split-field", "part")
    status, _, err = run("build", rows("a.jsonl", range(6)), "-o", tmp_path / "db", *fields, *SMALL_BUILD)
    assert status == 0, err
    assert names_of(tmp_path / "db") == {
        "train": {f"a.jsonl {i}" for i in (0, 2, 4)}, "valid": {f"a.jsonl {i}" for i in (1, 3, 5)}
    }  # fmt: skip
    status, _, err = run("add", tmp_path / "db", rows("b.jsonl", [6, 8]), *fields)
    assert status == 0, err
    assert {"b.jsonl 6", "b.jsonl 8"} <= names_of(tmp_path / "db")["train"]


def build_settings(folder, settings, *options):
    """The settings of a build by a file and options."""
    (folder / "run.toml").write_text(f"[build]\nembedder = 'hashing'\nvocabulary_size = 300\n{settings}")
    status, _, err = run("build", "--config", folder / "run.toml", "-o", folder / "db", *options)
    assert status == 0, err
    return json.loads((folder / "db" / "build.json").read_text())


def test_a_typed_threshold_leaves_the_other_settings_of_a_files_duplicates(folders, tmp_path):
    settings = f"corpus = ['{folders['train']}']\nduplicates = {{threshold = 0.2, words = 5}}"
    stored = build_settings(tmp_path, settings, "--deduplicate", "0.3")["duplicates"]
    assert (stored["threshold"], stored["words"]) == (0.3, 5)


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ("held_out = 0.3", ["--held-out-bytes", "0.4"], {"held_out": 0.1, "held_out_bytes": 0.4}),
        ("held_out_bytes = 0.3", ["--held-out", "0.4"], {"held_out": 0.4}),
        ("limit_bytes = 2000", ["--limit-mb", "0.003"], {"limit_bytes": 3000}),
        ("shard_bytes = 2000", ["--shard-mb", "0.003"], {"shard_bytes": 3000}),
    ],
)
def test_an_option_replaces_what_a_file_says_in_another_way(settings, options, expected, folders, tmp_path):
    stored = build_settings(tmp_path, settings, folders["train"], *options)
    assert {name: stored.get(name) for name in expected} == expected
    assert ("held_out_bytes" in stored) == ("held_out_bytes" in expected)


@pytest.mark.parametrize("typed", ["corpus", "train"])
def test_the_documents_that_options_name_replace_all_those_of_a_file(typed, folders, tmp_path):
    in_file = f"train = ['{folders['valid']}']\nvalid = ['{folders['test']}']"
    options = [folders["train"], "--held-out", "0"]
    if typed == "train":
        in_file, options = f"corpus = ['{folders['valid']}']", ["--train", folders["train"], "--test", folders["test"]]
    build_settings(tmp_path, in_file, *options)
    assert names_of(tmp_path / "db") == {
        "train": {f"train{i}.txt" for i in range(4)}, **({"test": {"test0.txt"}} if typed == "train" else {})
    }  # fmt: skip


@pytest.mark.parametrize("option", ["--tokenizer", "--like"])
def test_a_vocabulary_size_beside_a_finished_tokenizer_is_refused(option, folders, database, tmp_path):
    value = database.path if option == "--like" else database.path / "tokenizer.json"
    line = refused("build", folders["train"], "-o", tmp_path / "db", option, value, "--vocabulary-size", "300")
    assert "--vocabulary-size is for a tokenizer that is trained: leave it out" in line
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("pair", [("limit_bytes", "limit_mb"), ("shard_bytes", "shard_mb")])
def test_one_setting_in_two_units_is_refused(pair, folders, tmp_path):
    (tmp_path / "run.toml").write_text(f"[build]\n{pair[0]} = 2000\n{pair[1]} = 1\n")
    line = refused("build", folders["train"], "-o", tmp_path / "db", "--config", tmp_path / "run.toml")
    assert f"[build] has both {pair[0]} and {pair[1]}: give one of them" in line


def test_an_embedder_of_ones_own_builds_searches_and_adds(folders, tmp_path):
    (tmp_path / "mine.py").write_text(EMBEDDER)
    embedder, db = ("--embedder", "mine:Lengths"), tmp_path / "db"
    for arguments in (
        ["build", folders["train"], "-o", db, "--held-out", "0", *SMALL_BUILD, *embedder],
        ["search", db, "value index", "-k", "1", *embedder],
        ["add", db, folders["valid"], *embedder],
    ):
        status, _, err = run(*arguments, cwd=tmp_path)
        assert status == 0, err
    assert json.loads((db / "manifest.json").read_text())["embedder"]["name"] == "lengths"


@pytest.mark.parametrize("spec", ["nowhere_at_all:Lengths", "json:nothing", "json:dumps"])
def test_an_embedder_that_does_not_import_or_breaks_the_protocol_is_one_line(spec, folders, tmp_path):
    line = refused("build", folders["train"], "-o", tmp_path / "db", *SMALL_BUILD, "--embedder", spec)
    assert line.startswith(f"retro-np: embedder {spec}")
