"""Ground truth: databases that are well, and the same with one thing broken and the manifest sealed over it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support import SMALL, CountingEmbedder

from retro_np.errors import UserError
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import remove_documents
from retro_np.retrieval.index import build_hnsw
from retro_np.retrieval.manifest import file_facts, file_names, manifest_bytes, sealed
from retro_np.retrieval.verify import verify_database


@pytest.fixture(scope="module")
def well(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "db"
    build_database(corpus, folder, replace(SMALL, shard_bytes=9000, d_key=24), "hashing")
    remove_documents(folder, [1])
    return folder


@pytest.fixture
def copy(well, tmp_path):
    return shutil.copytree(well, tmp_path / "db")


def seal(folder):
    """Give the files that are there a manifest with their hashes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = file_facts([folder], file_names(folder))
    (folder / "manifest.json").write_bytes(manifest_bytes(sealed(manifest)))


def test_a_database_that_is_well_is_said_to_be(well):
    report = verify_database(well)
    assert not report.broken
    assert len(report.checked) >= 8
    assert any("what exact search finds" in line for line in report.checked)
    assert any("what hashing makes" in line for line in report.checked)


def test_every_broken_file_is_named(copy):
    broken = ["shards/00000/keys.npy", "documents.jsonl"]
    for name in broken:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 4
        (copy / name).write_bytes(data)
    (copy / "tokenizer.json").unlink()
    report = verify_database(copy)
    assert len(report.broken) == 3
    for name in (*broken, "tokenizer.json"):
        assert any(name in line for line in report.broken)


def test_a_broken_manifest_is_refused(copy):
    data = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(data.replace('"chunk_size": 8', '"chunk_size": 9'))
    with pytest.raises(UserError, match="its own SHA-256 differs"):
        verify_database(copy)
    with pytest.raises(UserError, match="no database at"):
        verify_database(copy / "nowhere")


def change(name, edit):
    def broken(folder):
        array = np.load(folder / name)
        np.save(folder / name, edit(array))

    return broken


def swapped(array):
    array[[0, 1]] = array[[1, 0]]
    return array


def put(place, value):
    def edit(array):
        array[place] = value
        return array

    return edit


def other_index(folder):
    keys = np.load(folder / "shards" / "00000" / "keys.npy")
    build_hnsw(keys[::-1].copy(), folder / "shards" / "00000" / "index.hnsw")


def fewer_lines(folder):
    lines = (folder / "documents.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "documents.jsonl").write_bytes(b"".join(lines[:-1]))


@pytest.mark.parametrize(
    ("breaking", "complaint"),
    [
        (
            change("shards/00000/tokens.npy", put((0, 0), 60000)),
            "a token that there is not, or an end out of place",
        ),
        (change("shards/00000/tokens.npy", put((0, 2), 0)), "a token that there is not, or an end out of place"),
        (change("shards/00000/tokens.npy", put((0, 2), 1)), "a token that there is not, or an end out of place"),
        (change("shards/00001/documents.npy", put(0, 0)), "rows 0 to"),
        (change("shards/00000/tokens.npy", lambda a: a[:-1]), "tokens are"),
        (change("shards/00000/keys.npy", put((3, 0), np.nan)), "the key of chunk 3 is not finite"),
        (change("shards/00000/keys.npy", lambda a: a.astype(np.float16)), "keys are"),
        (change("shards/00000/keys.npy", swapped), "is not what hashing makes of it"),
        (change("neighbours/train/00000/ids.npy", put((5, 0), -2)), "the list of chunk 5 "),
        (change("neighbours/train/00000/ids.npy", put((5, 0), 5)), "the list of chunk 5 "),
        (change("neighbours/valid/00000/distances.npy", lambda a: a[:, ::-1].copy()), "the list of chunk 0 "),
        (change("neighbours/valid/00000/distances.npy", lambda a: a * 0.5), "neighbours/valid: the list of chunk"),
        (change("tombstones.npy", lambda a: a[:-1]), "tombstones.npy: it lists"),
        (other_index, "index.hnsw finds"),
        (fewer_lines, "it counts"),
    ],
)
def test_what_makes_no_sense_is_named_though_its_hash_is_right(copy, breaking, complaint):
    breaking(copy)
    seal(copy)
    report = verify_database(copy)
    assert any(complaint in line for line in report.broken), report


def test_an_embedder_that_is_not_here_is_said_and_no_breakage(database, monkeypatch):
    def missing():
        raise UserError("no BERT here")

    monkeypatch.setattr("retro_np.retrieval.database.load_bert", missing)
    report = verify_database(database.path)
    assert not report.broken
    assert any("not checked" in line and "no BERT here" in line for line in report.checked)
    assert not verify_database(database.path, CountingEmbedder()).broken


def forget(*path):
    def broken(manifest):
        for name in path[:-1]:
            manifest = manifest[name]
        del manifest[path[-1]]

    return broken


def climb(manifest):
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    "breaking",
    [forget("files"), forget("embedder", "margin"), forget("sources", 0, "weight"), forget("splits", "valid"), climb],
)
def test_a_manifest_that_is_sealed_over_nonsense_is_one_line(copy, breaking):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    breaking(manifest)
    (copy / "manifest.json").write_bytes(manifest_bytes(sealed(manifest)))
    for look in (Database.open, verify_database):
        with pytest.raises(UserError, match="does not hold what a manifest holds"):
            look(copy)


@pytest.mark.parametrize("name", ["tombstones.npy", "documents.jsonl", "shards/00000/tokens.npy", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\x97garbage", b"\x93NUMPY\x01\x00"])
def test_files_that_are_sealed_and_hold_something_else_are_said_to(copy, name, content):
    (copy / name).write_bytes(content)
    seal(copy)
    try:
        broken = verify_database(copy).broken
    except UserError as error:
        broken = [str(error)]
    assert broken
