"""Ground truth: intact databases, and copies with defects, most with a manifest that matches them."""

import io
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
from retro_np.retrieval.manifest import file_facts, write_manifest
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
    """Write to the manifest the hashes of the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = file_facts(folder)
    manifest["tokenizer"] = manifest["files"]["tokenizer.json"]["sha256"]
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


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def change(name, edit):
    def damage(folder):
        array = np.load(folder / name)
        np.save(folder / name, edit(array))

    return damage


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


def change_lines(edit):
    def damage(folder):
        lines = (folder / "documents.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "documents.jsonl").write_bytes(b"".join(edit(lines)))

    return damage


def one_token_more(lines):
    record = json.loads(lines[0])
    return [json.dumps(record | {"tokens": record["tokens"] + 1}).encode() + b"\n", *lines[1:]]


def ends_early(array):
    """The last chunk of the first document belongs to the second one."""
    array[np.flatnonzero(array == array[0])[-1]] += 1
    return array


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change("shards/00000/tokens.npy", put((0, 0), 60000)), "numbers of tokens that do not exist"),
        (change("shards/00000/tokens.npy", put((0, 2), 0)), "a misplaced end-of-text"),
        (change("shards/00000/tokens.npy", put((0, 2), 1)), "a misplaced end-of-text"),
        (change("shards/00001/documents.npy", put(0, 0)), "numbers of documents that do not exist"),
        (change("shards/00000/documents.npy", ends_early), "but documents.jsonl lists"),
        (change("shards/00000/tokens.npy", lambda a: a[:-1]), "documents.npy does not hold an array of int64 of shape"),
        (change("shards/00000/keys.npy", put((3, 0), np.nan)), "the key of chunk 3 is not finite"),
        (change("shards/00000/keys.npy", lambda a: a.astype(np.float16)), "does not hold an array of float32"),
        (change("shards/00000/keys.npy", swapped), "the key of chunk 0 differs from the one that hashing makes"),
        (change("neighbours/train/00000/ids.npy", put((5, 0), -2)), "the list of chunk 5 "),
        (change("neighbours/train/00000/ids.npy", put((5, 0), 5)), "the list of chunk 5 "),
        (change("neighbours/valid/00000/distances.npy", lambda a: a[:, ::-1].copy()), "the list of chunk 0 "),
        (change("neighbours/valid/00000/distances.npy", lambda a: a * 0.5), "neighbours/valid: the list of chunk"),
        (change("tombstones.npy", lambda a: a[:-1]), "tombstones.npy: it lists"),
        (other_index, "index.hnsw holds other keys"),
        (change_lines(lambda lines: lines[:-1]), "numbers of documents that do not exist"),
        (change_lines(one_token_more), "it counts"),
    ],
)
def test_inconsistent_contents_are_named_although_all_hashes_match(copy, damage, complaint):
    damage(copy)
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
    def damage(manifest):
        for name in path[:-1]:
            manifest = manifest[name]
        del manifest[path[-1]]

    return damage


def add_file_outside(manifest):
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": "0"}


REMOVED_ENTRIES = [("files",), ("embedder", "margin"), ("sources", 0, "weight"), ("splits", "valid")]


@pytest.mark.parametrize("damage", [*(forget(*path) for path in REMOVED_ENTRIES), add_file_outside])
def test_a_manifest_with_missing_or_unsafe_entries_is_refused(copy, damage):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    damage(manifest)
    write_manifest(copy, manifest)
    for read in (Database.open, verify_database):
        with pytest.raises(UserError, match="is not a valid manifest"):
            read(copy)


UNREAD = ("build.json", "duplicates.jsonl")  # what a build wrote for people and for its own repetition
CONTENTS = [b"", b"\x97garbage", b"\x93NUMPY\x01\x00", b"[" * 100_000, b'{"id": 1e400}\n', bytes(4096)]
CONTENTS += [npy(np.array([{}], object)), npy(np.full((3, 2), np.nan)), npy(np.arange(3))]


@pytest.mark.parametrize("part", range(6))
def test_files_with_unreadable_contents_are_reported_although_all_hashes_match(intact, tmp_path, part):
    names = [name for name in file_facts(intact) if name not in UNREAD]
    assert len(names) > 20
    for number, name in enumerate(names[part::6]):
        folder = shutil.copytree(intact, tmp_path / str(number))
        (folder / name).write_bytes(CONTENTS[(part + number) % len(CONTENTS)])
        update_hashes(folder)
        report = verify_database(folder)
        assert report.broken, name
        assert all("\n" not in line for line in report.broken)
