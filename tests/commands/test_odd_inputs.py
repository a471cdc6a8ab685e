"""Texts in any encoding and inputs at any kind of location: a command works, or ends in one line.

Ground truth: the text that the test encoded; the documents that it wrote. Commands run in this process.
"""

import json
import os
import socket
import sys

import numpy as np
import pytest
from support import SMALL, json_lines, small_config, write_corpus

from retro_np import save_params
from retro_np.cli import main
from retro_np.parameters import init_params
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import find_corpus
from retro_np.retrieval.database import Database

TEXT = "déjà vu à l'école, caf\xe9 et thé\n" * 20
ENCODINGS = (
    "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin-1",
    "iso8859-15", "cp1252", "cp850", "cp437", "mac-roman", "cp037", "gb18030", "euc_jis_2004", "shift_jisx0213",
)  # fmt: skip
EACH_ENCODING = pytest.mark.parametrize("encoding", ENCODINGS)
BUILD = ["--embedder", "hashing", "--chunk-size", "8", "--vocabulary-size", "300", "--held-out", "0"]


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command and returns its status and what it printed to standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["retro-np", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def assert_one_line(outcome):
    """A command was refused with status 2 and one line on standard error."""
    status, _, err = outcome
    assert status == 2
    assert err.startswith("retro-np: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint and its database, with keys of the hashing embedder."""
    folder = tmp_path_factory.mktemp("model")
    database = build_database(write_corpus(folder / "docs", 8), folder / "db", SMALL, "hashing")
    config = small_config(database)
    save_params(folder / "checkpoint.safetensors", init_params(config, np.random.default_rng(0)), config)
    return folder / "checkpoint.safetensors", folder / "db"


@EACH_ENCODING
def test_a_document_in_any_encoding_is_right_or_counted_as_replaced_or_skipped(tmp_path, encoding):
    (tmp_path / "encoded").write_bytes(TEXT.encode(encoding))
    (tmp_path / "plain").write_text("text")
    skipped = []
    documents = {document.name: document for document in find_corpus(tmp_path).documents(skipped.append)}
    if encoding.startswith("utf-8"):
        assert documents["encoded"].text.removeprefix("\ufeff") == TEXT
        assert documents["encoded"].replaced == 0
    elif encoding.startswith(("utf-16", "utf-32")):
        assert skipped == ["encoded"]
        assert set(documents) == {"plain"}
    else:
        assert documents["encoded"].replaced >= 20 * 5  # the accents of each line


def test_utf_16_is_recognised_by_its_mark_where_no_byte_is_nul(tmp_path):
    (tmp_path / "chinese").write_bytes("中文".encode("utf-16"))
    (tmp_path / "plain").write_text("text")
    skipped = []
    assert [document.name for document in find_corpus(tmp_path).documents(skipped.append)] == ["plain"]
    assert skipped == ["chinese"]


def test_a_build_from_a_folder_of_18_encodings_counts_what_it_replaced_and_skipped(tmp_path, command):
    folder = tmp_path / "docs"
    folder.mkdir()
    for encoding in ENCODINGS:
        (folder / encoding).write_bytes(TEXT.encode(encoding))
    status, out, err = command("build", folder, "-o", tmp_path / "db", *BUILD)
    assert status == 0, err
    manifest = Database.open(tmp_path / "db").manifest
    assert manifest["skipped"] == 6
    assert all(name.startswith(("utf-16", "utf-32")) for name in manifest["skipped_names"])
    assert manifest["splits"]["train"]["documents"] == 12
    replaced = manifest["splits"]["train"]["replaced"]
    assert replaced == sum(document.replaced for document in find_corpus(folder).documents()) > 1000
    assert f"Replaced by U+FFFD: {replaced:,} invalid UTF-8 sequences" in out
    assert "Skipped: 6 files " in out


@pytest.mark.slow
@EACH_ENCODING
def test_inspect_shows_a_file_rightly_or_prints_what_it_replaced_or_refuses_it(tmp_path, command, model, encoding):
    (tmp_path / "text").write_bytes(TEXT.encode(encoding))
    outcome = command("inspect", *model, "--file", tmp_path / "text", "-o", tmp_path / "page.html")
    if encoding.startswith(("utf-16", "utf-32")):
        assert "convert it to UTF-8" in assert_one_line(outcome)
        return
    status, out, err = outcome
    assert status == 0, err
    (document,) = find_corpus(tmp_path / "text").documents()
    assert document.replaced > 0 or encoding.startswith("utf-8")
    assert (f"Replaced by U+FFFD: {document.replaced:,} invalid UTF-8 sequence" in out) == (document.replaced > 0)


def test_inspect_drops_a_byte_order_mark(tmp_path, command, model):
    pages = []
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / name).write_bytes("return value index".encode(encoding))
        assert command("inspect", *model, "--file", tmp_path / name, "-o", tmp_path / "page.html")[0] == 0
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize("text", ["text " * 2000 + "\0", "\0", "中文".encode("utf-16-be").decode("latin-1")])
def test_inspect_refuses_a_file_with_a_nul_anywhere_or_a_mark_of_utf_16(tmp_path, command, model, text):
    (tmp_path / "text").write_bytes(b"\xfe\xff" * ("\0" not in text) + text.encode("latin-1"))
    line = assert_one_line(command("inspect", *model, "--file", tmp_path / "text", "-o", tmp_path / "page.html"))
    assert "convert it to UTF-8" in line
    assert not (tmp_path / "page.html").exists()


@pytest.fixture
def odd(tmp_path):
    """A folder with an input of each odd kind."""
    for name, target in {"loop": "loop", "circle": "back", "back": "circle", "broken": "nowhere"}.items():
        os.symlink(target, tmp_path / name)
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("text")
    return tmp_path


ODD = ["loop", "loop/x", "circle", "broken", "fifo", "fifo.jsonl", "socket", "file/x", "file/", "x" * 300, "x/" * 3000,
       "nowhere", "\udcff\udcfe", "/dev/zero", "/dev/null", "/dev/fd/0/x", "\x1b[2J", "a\nb", "folder", "folder.jsonl",
       "hub:", "hub:broken/x@y#"]  # fmt: skip


@pytest.mark.parametrize("name", ODD, ids=lambda name: ascii(name[:12]))
def test_a_corpus_at_an_odd_location_is_refused_in_one_line(odd, command, name, monkeypatch):
    monkeypatch.chdir(odd)
    assert_one_line(command("build", name, "-o", "db", *BUILD))
    assert not os.path.lexists("db")


FILES = [name for name in ODD if name != "file/" and not name.startswith("hub:")]


@pytest.mark.parametrize("name", FILES, ids=lambda name: ascii(name[:12]))
def test_a_file_to_inspect_at_an_odd_location_is_refused_in_one_line(odd, command, model, name, monkeypatch):
    monkeypatch.chdir(odd)
    line = assert_one_line(command("inspect", *model, "--file", name, "-o", "page.html"))
    assert "name one with --file" in line
    assert not os.path.lexists("page.html")


def test_documents_with_odd_names_can_be_built_and_searched(tmp_path, command):
    names = [b"\xff\xfe", b"\x1b[2J", b"a\nb", b"=x:0.5", b"x" * 255, "\u202e中".encode(), b" ", b"-", b"[red]"]
    folder = os.path.join(os.fsencode(tmp_path), b"\xff folder")
    os.mkdir(folder)
    for name in names:
        with open(os.path.join(folder, name), "w") as file:
            file.write("return value index")
    status, _, err = command("build", os.fsdecode(folder), "-o", tmp_path / "db", *BUILD)
    assert status == 0, err
    database = Database.open(tmp_path / "db")
    assert {record["name"] for record in database.documents} == {name.decode("utf-8", "replace") for name in names}
    status, out, err = command("search", tmp_path / "db", "value", "-k", "20")
    assert status == 0, err
    assert "\x1b" not in out + err


def test_a_hub_cache_is_refused_with_advice_and_its_links_are_counted(tmp_path, command):
    snapshot = tmp_path / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number in range(3):
        (tmp_path / "blobs" / f"hash{number}").write_text("return value index")
        os.symlink(f"../../blobs/hash{number}", snapshot / f"{number}.txt")
    line = assert_one_line(command("build", snapshot, "-o", tmp_path / "db", *BUILD))
    assert "3 files skipped: binary, special, or links that lead to no file inside the folder" in line
    assert "cp -rL" in line
    (snapshot / "README").write_text("return value index")
    status, out, err = command("build", snapshot, "-o", tmp_path / "db", *BUILD)
    assert status == 0, err
    assert "Skipped: 3 files " in out
    assert "0.txt" in out
    manifest = json.loads((tmp_path / "db" / "manifest.json").read_bytes())
    assert (manifest["skipped"], manifest["skipped_names"]) == (3, ["0.txt", "1.txt", "2.txt"])


@pytest.mark.parametrize(
    "texts",
    [
        ["return value"],
        ["x"],
        ["\n"],
        ["", "return value index " * 9, "", ""],
        list("abcdef"),
        ["x"] * 20,
        ["é" * 9000],
    ],
    ids=["one document", "one character", "one line end", "empty ones", "one token", "equal ones", "one long word"],
)
def test_a_tiny_corpus_can_be_built_searched_and_verified_and_training_on_it_ends_well(tmp_path, command, texts):
    corpus, db = json_lines(tmp_path / "c.jsonl", {str(i): text for i, text in enumerate(texts)}), tmp_path / "db"
    status, _, err = command("build", corpus, "-o", db, *BUILD)
    assert status == 0, err
    database = Database.open(db)
    assert database.n_chunks > 0
    first = database.text(database.value(0)[: database.chunk_size])
    ids, _ = database.search(first, 1)
    assert database.text(database.value(ids[0])[: database.chunk_size]) == first
    assert command("search", db, "return", "-k", "5")[0] == 0
    assert command("verify", db)[0] == 0
    sizes = ["--d-model", "16", "--d-ffw", "16", "--n-heads", "1", "--d-head", "16", "--n-layers", "2"]
    sizes += ["--encoder-layers", "1", "--cca-layers", "2", "--batch-size", "1", "--steps", "1"]
    outcome = command("train", db, "-o", tmp_path / "run", *sizes, "--sequence-length", "16")
    if outcome[0] != 0:
        assert_one_line(outcome)


def test_a_corpus_of_one_document_that_is_held_out_is_refused(tmp_path, command):
    corpus = json_lines(tmp_path / "c.jsonl", {"held": "return value"})
    line = assert_one_line(command("build", corpus, "-o", tmp_path / "db", *BUILD[:-1], "0.999"))
    assert "held out" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--memory", ""), ("demo", "-o", ""), ("evaluate", "retro", "--text", ""), ("verify", ""),
        ("inspect", "retro", "", "text"), ("sample", "--memory", ""), ("train", "db", "-o", "run", "--config", ""),
        ("sample", "retro", "db", "--embedder", ""), ("build", "docs", "-o", "db", "--tokenizer="),
    ],
)  # fmt: skip
def test_an_empty_path_does_not_stand_for_the_current_folder(tmp_path, command, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "docs", 2)
    assert "it is empty: give the name of a file or folder" in assert_one_line(command(*arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
