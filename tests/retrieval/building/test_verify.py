"""Ground truth: intact databases, and copies with one defect and a manifest that matches it."""

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
from retro_np.retrieval.manifest import file_facts, file_names, write_manifest
from retro_np.retrieval.verify import verify_database


@pytest.fixture(scope="module")
def intact(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "db"
    build_database(corpus, folder, replace(SMALL, shard_bytes=9000, d_key=24), "hashing")
    remove_documents(folder, [1])
    return folder


@pytest.fixture
def copy(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "db")


def update_hashes(folder):
    """Write the hashes of the present files to the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = file_facts([folder], file_names(folder))
    write_manifest(folder, manifest)


def test_an_intact_database_passes_every_check(intact):
    report = verify_database(intact)
    assert not report.broken
    assert len(report.checked) >= 8
    assert any("what exact search finds" in line for line in report.checked)
    assert any("that hashing makes" in line for line in report.checked)


def test_every_damaged_file_is_named(copy):
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


def test_a_damaged_manifest_is_refused(copy):
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


def put(index, value):
    def edit(array):
        array[index] = value
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
            "an unknown token or a misplaced end-of-text",
        ),
        (change("shards/00000/tokens.npy", put((0, 2), 0)), "an unknown token or a misplaced end-of-text"),
        (change("shards/00000/tokens.npy", put((0, 2), 1)), "an unknown token or a misplaced end-of-text"),
        (change("shards/00001/documents.npy", put(0, 0)), "rows 0 to"),
        (change("shards/00000/tokens.npy", lambda a: a[:-1]), "tokens are"),
        (change("shards/00000/keys.npy", put((3, 0), np.nan)), "the key of chunk 3 is not finite"),
        (change("shards/00000/keys.npy", lambda a: a.astype(np.float16)), "keys are"),
        (change("shards/00000/keys.npy", swapped), "the key of chunk 0 differs from the one that hashing makes"),
        (change("neighbours/train/00000/ids.npy", put((5, 0), -2)), "the list of chunk 5 "),
        (change("neighbours/train/00000/ids.npy", put((5, 0), 5)), "the list of chunk 5 "),
        (change("neighbours/valid/00000/distances.npy", lambda a: a[:, ::-1].copy()), "the list of chunk 0 "),
        (change("neighbours/valid/00000/distances.npy", lambda a: a * 0.5), "neighbours/valid: the list of chunk"),
        (change("tombstones.npy", lambda a: a[:-1]), "tombstones.npy: it lists"),
        (other_index, "index.hnsw holds other keys"),
        (fewer_lines, "it counts"),
    ],
)
def test_inconsistent_contents_are_named_although_all_hashes_match(copy, breaking, complaint):
    breaking(copy)
    update_hashes(copy)
    report = verify_database(copy)
    assert any(complaint in line for line in report.broken), report


def test_a_missing_embedder_is_reported_but_is_not_a_problem(database, monkeypatch):
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
def test_an_incomplete_manifest_with_a_valid_hash_is_refused_in_one_line(copy, breaking):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    breaking(manifest)
    write_manifest(copy, manifest)
    for read in (Database.open, verify_database):
        with pytest.raises(UserError, match="lacks entries of a manifest"):
            read(copy)


@pytest.mark.parametrize("name", ["tombstones.npy", "documents.jsonl", "shards/00000/tokens.npy", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\x97garbage", b"\x93NUMPY\x01\x00"])
def test_files_with_unreadable_contents_are_reported_although_all_hashes_match(copy, name, content):
    (copy / name).write_bytes(content)
    update_hashes(copy)
    try:
        broken = verify_database(copy).broken
    except UserError as error:
        broken = [str(error)]
    assert broken
