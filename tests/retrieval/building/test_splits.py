"""Ground truth: the names and texts that the test wrote, and sums of their sizes."""

import json
import random
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from exact_lists import assert_lists_are_exact
from hypothesis import example, given
from hypothesis import strategies as st
from support import EMBEDDER, SHARDS, SMALL, Interrupter, all_bytes, refused, run, write_corpus

from retro_np.errors import UserError
from retro_np.files import hash_fraction
from retro_np.retrieval.build import build_database
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import Corpus, Source
from retro_np.retrieval.database import Database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.join import retrieve_from
from retro_np.retrieval.manifest import write_manifest
from retro_np.retrieval.sources import Document, Entry
from retro_np.retrieval.splits import split_chooser
from retro_np.retrieval.verify import verify_database

pytestmark = pytest.mark.usefixtures("no_flushing")
NO_DUPLICATES = replace(SMALL, held_out=0.1, duplicates=None)


def corpus_of(documents):
    """A corpus without files, of (name, size) pairs."""
    return Corpus([Source("s", "s")], lambda on_skip: (Entry(name, size, list) for name, size in documents))


def splits_by_bytes(documents, share):
    split_of = split_chooser(corpus_of(documents), BuildConfig(held_out_bytes=share))
    return [split_of(Document(name, "", "s")) for name, _ in documents]


def names_of(database):
    """{split: the sorted names of its documents}."""
    records = [record for record in database.documents if not record.get("removed")]
    return {s: sorted(r["name"] for r in records if r["split"] == s) for s in database.manifest["splits"]}


def folders(path, **texts):
    """A source for each split: a folder with a document for each name."""
    for split, documents in texts.items():
        (path / split).mkdir()
        for name, text in documents.items():
            (path / split / name).write_text(text)
    return [Source(split, str(path / split), split=split) for split in texts]


def words(seed, number=60):
    return " ".join(f"w{random.Random(seed * 1000 + i).randrange(10**6)}" for i in range(number)) + "\n"


sizes = st.lists(st.integers(0, 10) | st.integers(0, 10**7), min_size=2, max_size=40).filter(any)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(sizes, shares, st.booleans())
@example([2, 2, 1, 2], 0.875, False)
def test_a_share_of_bytes_and_each_of_its_halves_are_exact_to_within_one_document(sizes, share, repeated):
    documents = [("same" if repeated else f"document {i}", size) for i, size in enumerate(sizes)]
    splits = splits_by_bytes(documents, share)
    valid, test = (sum(size for size, s in zip(sizes, splits, strict=True) if s == name) for name in ("valid", "test"))
    for held, target in (
        (valid + test, share * sum(sizes)),
        (valid, share / 2 * sum(sizes)),
        (test, share / 2 * sum(sizes)),
    ):
        assert abs(held - target) <= max(sizes) * (1 + 1e-9)
    assert "train" in splits
    assert "valid" in splits
    assert splits.count("train") == len(sizes) - 1 or "test" in splits  # a single held-out document is for valid


@given(sizes, shares, shares)
def test_a_larger_share_of_bytes_holds_out_what_a_smaller_one_does(sizes, a, b):
    documents = [(f"document {i}", size) for i, size in enumerate(sizes)]
    smaller, larger = (splits_by_bytes(documents, share) for share in sorted((a, b)))
    assert all(small == "train" or large != "train" for small, large in zip(smaller, larger, strict=True))


@given(sizes, shares, st.randoms())
def test_the_order_of_the_documents_does_not_matter_for_a_share_of_bytes(sizes, share, rng):
    documents = [(f"document {i}", size) for i, size in enumerate(sizes)]
    shuffled = rng.sample(documents, len(documents))
    assert dict(zip(shuffled, splits_by_bytes(shuffled, share), strict=True)) == dict(
        zip(documents, splits_by_bytes(documents, share), strict=True)
    )


def test_a_share_of_bytes_is_taken_in_the_order_of_the_names_hashes():
    documents = [(f"document {i}", 10) for i in range(100)]
    splits = dict(zip((name for name, _ in documents), splits_by_bytes(documents, 0.2), strict=True))
    order = sorted(splits, key=hash_fraction)
    assert [splits[name] for name in order] == ["valid"] * 10 + ["test"] * 10 + ["train"] * 80


def test_choosing_a_share_of_bytes_keeps_no_names_in_memory():
    documents = corpus_of((f"{i:0500d}", i % 100) for i in range(20_000))
    once = list(documents.entries(None))
    tracemalloc.start()
    split_of = split_chooser(Corpus([], lambda on_skip: iter(once)), BuildConfig(held_out_bytes=0.3))
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * 20_000
    assert current < 20_000
    assert split_of(Document(once[0].name, "", "s")) in ("train", "valid", "test")


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_built_database_holds_a_share_of_bytes_out_whatever_its_shards(tmp_path, packed):
    texts = {f"d{i}": words(i, 5 + 7 * i) for i in range(20)}
    if packed:
        corpus = tmp_path / "rows.jsonl"
        corpus.write_text("".join(json.dumps({"name": n, "text": t}) + "\n" for n, t in texts.items()))
    else:
        corpus = folders(tmp_path, docs=texts)[0].location
    config = replace(NO_DUPLICATES, held_out_bytes=0.3)
    database = build_database(corpus, tmp_path / "db", config, EMBEDDER)
    total, largest = sum(map(len, texts.values())), max(map(len, texts.values()))
    held = {split: database.manifest["splits"][split]["bytes"] for split in ("valid", "test")}
    assert abs(sum(held.values()) - 0.3 * total) <= largest
    assert all(abs(n_bytes - 0.15 * total) <= largest for n_bytes in held.values())
    small = build_database(corpus, tmp_path / "small", replace(config, shard_bytes=500), EMBEDDER)
    assert names_of(small) == names_of(database)
    assert len(small.folders("splits/test")) > 1
    assert verify_database(small.path, EMBEDDER).broken == []
    assert_lists_are_exact(small)


def test_each_source_with_a_split_gives_that_split(tmp_path):
    texts = {"train": {"a": words(1), "b": words(2)}, "valid": {"a": words(3)}, "test": {"c": words(4), "d": words(5)}}
    database = build_database(folders(tmp_path, **texts), tmp_path / "db", NO_DUPLICATES, "hashing")
    assert names_of(database) == {"train": ["a", "b"], "valid": ["a"], "test": ["c", "d"]}
    assert database.held_out_splits == ["valid", "test"]
    assert [source["name"] for source in database.manifest["sources"]] == ["train"]
    for split, documents in texts.items():
        stored = database.split(split)
        rows = [np.flatnonzero(np.asarray(stored.documents) == n) for n in np.unique(np.asarray(stored.documents))]
        assert [database.text(stored.tokens[each].reshape(-1)) for each in rows] == list(documents.values())
    assert verify_database(database.path).broken == []


def test_the_split_of_each_row_is_that_of_its_field(tmp_path):
    splits = ["train", "validation", "test", "train", "dev", "train"]
    rows = [{"text": words(i), "name": f"d{i}", "split": split} for i, split in enumerate(splits)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    database = build_database(tmp_path / "rows.jsonl", tmp_path / "db", NO_DUPLICATES, EMBEDDER)
    assert names_of(database) == {"train": ["d0", "d3", "d5"], "valid": ["d1", "d4"], "test": ["d2"]}
    ignored = replace(NO_DUPLICATES, held_out=0, split_field="none")
    database = build_database(tmp_path / "rows.jsonl", tmp_path / "other", ignored, EMBEDDER)
    assert len(names_of(database)["train"]) == 6


def test_without_test_documents_a_database_has_two_splits(tmp_path):
    sources = folders(tmp_path, train={"a": words(1)}, valid={"b": words(2)})
    database = build_database(sources, tmp_path / "db", NO_DUPLICATES, EMBEDDER)
    assert list(database.manifest["splits"]) == ["train", "valid"]
    assert not [name for name in database.manifest["files"] if "test" in name]
    assert not (tmp_path / "db" / "splits" / "test").exists()


def test_documents_that_equal_or_resemble_one_that_is_held_out_from_them_are_left_out(tmp_path):
    texts = {seed: words(seed) for seed in range(9)}
    near = {seed: texts[seed] + "one more\n" for seed in texts}
    sources = folders(
        tmp_path,
        train={"own": texts[0], "like valid": near[1], "like test": near[2], "in both": texts[3], "equal": texts[4]},
        valid={"v1": texts[1], "v3": texts[3], "near test": near[5]},
        test={"t2": texts[2], "t3": texts[3], "t4": texts[4], "t5": texts[5]},
    )
    database = build_database(sources, tmp_path / "db", replace(SMALL, held_out=0.1), EMBEDDER)
    assert names_of(database) == {"train": ["own"], "valid": ["near test", "v1"], "test": ["t2", "t3", "t4", "t5"]}
    lines = [json.loads(line) for line in (database.path / "duplicates.jsonl").read_text().splitlines()]
    left_out = {(line["source"], line["name"]): line["held_out"] for line in lines}
    resembled = {"equal": "t4", "in both": "t3", "like test": "t2", "like valid": "v1"}
    assert left_out == {("train", name): held for name, held in resembled.items()} | {("valid", "v3"): "t3"}
    everything = build_database(sources, tmp_path / "all", NO_DUPLICATES, EMBEDDER)
    assert [split["documents"] for split in everything.manifest["splits"].values()] == [5, 3, 4]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The path of a database with three splits and several shards in each."""
    folder = tmp_path_factory.mktemp("three")
    sources = [
        Source(s, str(write_corpus(folder / s, 10, i)), split=s) for i, s in enumerate(("train", "valid", "test"))
    ]
    return build_database(sources, folder / "db", replace(SHARDS, held_out=0.1), EMBEDDER).path


@pytest.mark.slow
def test_edits_keep_a_test_part_whole(three, tmp_path, additions):
    db = shutil.copytree(three, tmp_path / "db")
    held = Database.open(db, EMBEDDER).documents
    copied = next(record["name"] for record in held if record["split"] == "test")
    shutil.copytree(additions, tmp_path / "more")
    shutil.copy(three.parent / "test" / copied, tmp_path / "more" / "like test.py")
    database = add_documents(db, tmp_path / "more", embedder=EMBEDDER)
    assert "like test.py" not in names_of(database)["train"]
    assert len(names_of(database)["train"]) == 10 + 12
    assert_lists_are_exact(database)
    gone = [record["id"] for record in database.documents if record["split"] == "test"][:6]
    remove_documents(db, gone)
    assert len(Database.open(db).split("test").removed) > 0
    assert verify_database(db, EMBEDDER).broken == []
    compact(db)
    database = Database.open(db, EMBEDDER)
    assert [split["documents"] for split in database.manifest["splits"].values()] == [22, 10, 4]
    assert len(database.split("test").removed) == 0
    assert_lists_are_exact(database)
    assert verify_database(db, EMBEDDER).broken == []


def test_an_interrupted_build_of_three_splits_ends_in_the_same_bytes(tmp_path, monkeypatch):
    texts = {"train": {"a": words(1), "b": words(2)}, "valid": {"c": words(3), "d": words(4)}, "test": {"e": words(5)}}
    sources, config = folders(tmp_path, **texts), replace(SMALL, held_out=0.1, shard_bytes=300)
    interrupter = Interrupter(monkeypatch)
    total = interrupter.count_changes(lambda: build_database(sources, tmp_path / "whole", config, EMBEDDER))
    expected = all_bytes(tmp_path / "whole")
    for change in range(2, total + 1, 9):
        interrupter.interrupt(lambda: build_database(sources, tmp_path / "db", config, EMBEDDER), change, "after")
        build_database(sources, tmp_path / "db", config, EMBEDDER)
        assert all_bytes(tmp_path / "db") == expected, change
        shutil.rmtree(tmp_path / "db")


def test_a_defect_of_the_test_part_is_found(three, tmp_path):
    db = shutil.copytree(three, tmp_path / "db")
    assert verify_database(db, EMBEDDER).broken == []
    keys = next((db / "splits" / "test").glob("*/keys.npy"))
    keys.write_bytes(keys.read_bytes()[:-4] + b"\0\0\0\1")
    assert any("splits/test" in line for line in verify_database(db, EMBEDDER).broken)


def test_a_manifest_that_conceals_or_invents_a_test_part_is_refused(three, db, tmp_path):
    concealed = shutil.copytree(three, tmp_path / "concealed")
    for path, splits in ((concealed, ["train", "valid"]), (db, ["train", "valid", "test"])):
        manifest = json.loads((path / "manifest.json").read_text())
        counts = manifest["splits"]["valid"]
        manifest["splits"] = {split: manifest["splits"].get(split, counts) for split in splits}
        write_manifest(path, {name: value for name, value in manifest.items() if name != "sha256"})
    with pytest.raises(UserError, match="is not the record of document"):
        list(Database.open(concealed).documents)
    assert verify_database(concealed, EMBEDDER).broken != []
    with pytest.raises(UserError, match="is not a valid manifest"):
        Database.open(db)


def test_rows_for_valid_or_test_are_not_added_to_what_is_retrieved(three, tmp_path, capsys):
    db = shutil.copytree(three, tmp_path / "db")
    rows = [{"text": words(i), "name": f"new {s}", "split": s} for i, s in enumerate(("train", "valid", "test"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    database = add_documents(db, tmp_path / "rows.jsonl", embedder=EMBEDDER)
    assert [record["name"] for record in database.documents if record["name"].startswith("new")] == ["new train"]
    assert "left out, since an edit holds nothing out: 2 documents, such as new valid" in capsys.readouterr().err


def test_a_database_without_a_test_part_says_once_that_valid_serves_as_both(database, capsys):
    database = Database.open(database.path)
    valid, test, keys = database.split("valid"), database.split("test"), database.keys("test")
    assert test.name == "valid" == database.split_name("test")
    assert np.array_equal(test.tokens[:], valid.tokens[:])
    assert np.array_equal(keys[:], database.keys("valid")[:])
    assert capsys.readouterr().err.count("has no test part") == 1
    with pytest.raises(UserError, match="no split 'held-out'"):
        database.split("held-out")


def test_documents_with_given_texts_are_left_out_of_a_split(three):
    database = Database.open(three, EMBEDDER)
    for split in ("valid", "test", "train"):
        stored = database.split(split)
        numbers = np.unique(np.asarray(stored.documents))[1:3]
        without = database.split(split, without={database.documents[int(n)]["sha256"] for n in numbers})
        rows = np.flatnonzero(np.isin(np.asarray(stored.documents), numbers))
        assert np.array_equal(without.removed, rows)
        assert not np.asarray(without.tokens[rows]).any()
        assert np.array_equal(np.delete(without.tokens[:], rows, 0), np.delete(stored.tokens[:], rows, 0))


def test_neighbours_of_the_test_part_are_found_in_another_database(three, database):
    source = Database.open(three, EMBEDDER)
    retrieval = retrieve_from(source, source, split="test")
    assert np.array_equal(retrieval.split.neighbours, source.split("test").neighbours[:])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_build_that_holds_no_text_out_says_so(tmp_path, capsys, share):
    texts = {name: "" if hash_fraction(name) < 0.3 else words(1) for name in "abcdefgh"}
    assert 0 < list(texts.values()).count("") < len(texts)
    corpus = folders(tmp_path, docs=texts)[0].location
    for _ in range(2):
        build_database(corpus, tmp_path / "db", replace(SMALL, held_out=share), EMBEDDER)
        assert capsys.readouterr().err.count("holds out no text: to evaluate a model, build another folder") == 1


def test_a_part_that_would_be_empty_or_a_mixture_is_refused(tmp_path):
    train, valid, test, plain = folders(
        tmp_path, train={"a": words(1)}, valid={"b": words(2)}, test={"b": words(2)}, plain={"a": words(1)}
    )
    plain, build = (
        replace(plain, split=""),
        lambda sources, **change: build_database(
            sources, tmp_path / "db", replace(SMALL, **{"held_out": 0.1} | change), EMBEDDER
        ),
    )
    for sources, change, complaint in (
        ([valid, test], {}, "no text is in the split train: give some with --train"),
        ([train, valid], {"held_out": 0.3}, "the documents say which are held out: leave out --held-out"),
        ([train, valid], {"held_out_bytes": 0.3}, "the documents say which are held out: leave out --held-out"),
        ([train, valid], {"limit_bytes": 1}, "no text is in the split .*: raise --limit-mb"),
        (
            [plain],
            {"held_out_bytes": 0.3},
            "one document cannot be split: .* --held-out 0 in place of --held-out-bytes",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            build(sources, **change)
        assert not (tmp_path / "db").exists()
    for sources, complaint in (
        ([train, replace(plain, name="x")], "a has no split, unlike the documents before it"),
        ([replace(plain, name="x"), train], "a has a split, unlike the documents before it"),
        ([train, valid, test], "every document of valid is in test as well"),
    ):
        with pytest.raises(UserError, match=complaint):
            build(sources)
        shutil.rmtree(tmp_path / "db", ignore_errors=True)


def test_after_a_row_that_is_refused_the_same_folder_can_be_built_and_added_to_with_other_settings(tmp_path):
    rows = [{"text": words(i), "split": split} for i, split in enumerate(["train", "valid", "train", "first"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small, ignore = replace(NO_DUPLICATES, held_out=0, shard_bytes=200), {"split_field": "none"}  # a shard per document
    with pytest.raises(UserError, match=r"rows.jsonl:4 has 'first' in `split`.*--split-field none"):
        build_database(tmp_path / "rows.jsonl", tmp_path / "db", small, EMBEDDER)
    assert [path.name for path in (tmp_path / "db").iterdir()] == [".lock"]
    build_database(tmp_path / "rows.jsonl", tmp_path / "db", replace(small, **ignore), EMBEDDER)
    before, more = all_bytes(tmp_path / "db"), tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row | {"name": "new"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"more.jsonl:4 has 'first' in `split`.*--split-field none"):
        add_documents(tmp_path / "db", more, embedder=EMBEDDER)
    assert all_bytes(tmp_path / "db") == before
    assert not (tmp_path / "db" / "edit").exists()
    assert len(add_documents(tmp_path / "db", more, embedder=EMBEDDER, **ignore).documents) == 8


def test_a_build_that_was_killed_while_reading_resumes_after_a_row_is_refused(tmp_path, monkeypatch):
    rows = [{"text": words(i)} for i in range(6)]
    good, path = "".join(json.dumps(row) + "\n" for row in rows), tmp_path / "rows.jsonl"
    config = replace(NO_DUPLICATES, held_out=0, shard_bytes=200)
    path.write_text(good)
    interrupter = Interrupter(monkeypatch)
    interrupter.interrupt(lambda: build_database(path, tmp_path / "db", config, EMBEDDER), 4, "after")
    kept = {name: data for name, data in all_bytes(tmp_path / "db").items() if "train" in str(name)}
    assert kept
    path.write_text(good + '{"text": null}')
    with pytest.raises(UserError, match=r"rows.jsonl:7 has no `text` string but null"):
        build_database(path, tmp_path / "db", config, EMBEDDER)
    assert kept.items() <= all_bytes(tmp_path / "db").items()
    path.write_text(good)
    assert len(build_database(path, tmp_path / "db", config, EMBEDDER).documents) == 6


@pytest.mark.parametrize("splits", [["valid", "test"], ["train"]])
def test_a_field_that_holds_all_or_nothing_out_is_refused(tmp_path, splits):
    rows = [{"text": words(i), "split": split} for i, split in enumerate(splits)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    missing = "train" if "train" not in splits else "valid or test"
    with pytest.raises(UserError, match=f"the split {missing}: .*--split-field none, .* anew, also those for test"):
        build_database(tmp_path / "rows.jsonl", tmp_path / "db", NO_DUPLICATES, EMBEDDER)


@pytest.mark.parametrize("held", ["valid", "test"])
def test_rows_for_training_and_one_other_part_are_enough_and_an_empty_valid_is_said(tmp_path, capsys, held):
    rows = [{"text": words(i), "name": f"d{i}", "split": split} for i, split in enumerate(["train", held, "train"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    database = build_database(tmp_path / "rows.jsonl", tmp_path / "db", NO_DUPLICATES, EMBEDDER)
    assert names_of(database) == {"train": ["d0", "d2"], "valid": []} | {held: ["d1"]}
    told = "holds out text for test alone: evaluate with --split test, and train without --eval-every"
    assert (told in capsys.readouterr().err) == (held == "test")


@pytest.mark.parametrize(
    "change", [{"held_out_bytes": 0.3}, {"training_neighbours": False}, {"split_field": "none"}], ids=str
)
def test_a_build_with_a_newer_setting_is_not_resumed_without_it(tmp_path, change):
    corpus = folders(tmp_path, docs={f"d{i}": words(i) for i in range(6)})[0].location
    build_database(corpus, tmp_path / "db", replace(NO_DUPLICATES, **change), EMBEDDER)
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"was started with {name} = {value}, not "):
        build_database(corpus, tmp_path / "db", NO_DUPLICATES, EMBEDDER)
    plain = build_database(corpus, tmp_path / "plain", NO_DUPLICATES, EMBEDDER)
    assert name not in json.loads((plain.path / "build.json").read_text())
    with pytest.raises(UserError, match=f"was started with {name} = .*, not {value}"):
        build_database(corpus, plain.path, replace(NO_DUPLICATES, **change), EMBEDDER)


def test_a_finished_build_notices_that_the_split_of_a_row_has_changed(tmp_path):
    corpus = tmp_path / "rows.jsonl"
    for splits in (["train", "valid", "train"], ["train", "valid", "valid"]):
        rows = [{"text": words(i), "split": split} for i, split in enumerate(splits)]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if splits[2] == "train":
            build_database(corpus, tmp_path / "db", NO_DUPLICATES, EMBEDDER)
    with pytest.raises(UserError, match="its documents have changed"):
        build_database(corpus, tmp_path / "db", NO_DUPLICATES, EMBEDDER)


@pytest.mark.parametrize(
    "wrong",
    [
        {"held_out_bytes": 0}, {"held_out_bytes": 1.0}, {"held_out_bytes": "a"}, {"held_out_bytes": float("nan")},
        {"held_out_bytes": 0.1, "held_out": 0.2}, {"text_field": None}, {"text_field": ""}, {"split_field": 3},
    ],
)  # fmt: skip
def test_an_invalid_setting_of_splits_or_fields_is_refused(wrong):
    with pytest.raises(UserError):
        replace(NO_DUPLICATES, **wrong)


def test_the_command_prints_the_three_splits(tmp_path):
    folders(
        tmp_path,
        **{s: {f"{s} {i}": words(10 * n + i) for i in range(n)} for n, s in ((3, "train"), (2, "valid"), (1, "test"))},
    )
    options = [x for split in ("train", "valid", "test") for x in (f"--{split}", tmp_path / split)]
    small = ["--embedder", "hashing", "--vocabulary-size", "300"]
    status, out, err = run("build", *options, "-o", tmp_path / "db", *small)
    assert status == 0, err
    documents = [line.partition(",")[0] for line in out.splitlines()[:3]]
    assert documents == ["train: 3 documents", "valid: 2 documents", "test: 1 document"]
    (tmp_path / "empty").mkdir()
    line = refused("build", *options[:2], "--valid", tmp_path / "empty", "-o", tmp_path / "new", *small)
    assert "empty holds no text" in line
    line = refused("build", *options[:2], "--valid", tmp_path / "train", "-o", tmp_path / "new", *small)
    assert "train is given twice" in line
