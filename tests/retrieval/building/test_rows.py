"""Rows with fields. Ground truth: files that the test wrote with json, gzip, zstandard, pyarrow and datasets."""

import gzip
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from support import SMALL, fresh_python

from retro_np.errors import UserError
from retro_np.retrieval.build import build_database
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import Source, find_corpus, limited
from retro_np.retrieval.documents import Documents

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
zstandard = pytest.importorskip("zstandard")

ROWS = [
    {"body": f"text {i} of some words", "title": 10 + i, "part": part, "picture": "x" * i}
    for i, part in enumerate(["train", "valid", "validation", "dev", "val", "test"])
]
SPLITS = ["train", "valid", "valid", "valid", "valid", "test"]
FIELDS = {"text_field": "body", "name_field": "title", "split_field": "part"}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)


def write_parquet_folder(path, rows):
    path.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), path / "b")


WRITERS = {  # a name that is no hint, except .jsonl, and a function of the path and the rows
    "rows.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(lines(rows))),
    "two.jsonl": lambda path, rows: path.write_bytes(
        zstandard.compress(lines(rows[:3])) + zstandard.compress(lines(rows[3:]))
    ),
    "gzip.data": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "zstd": lambda path, rows: path.write_bytes(zstandard.compress(lines(rows))),
    "rows.txt": lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2),
    "parquet": write_parquet_folder,
    "saved": write_saved,
    "inner/saved": write_saved,
}
EACH_FORMAT = pytest.mark.parametrize("name", WRITERS)


def written(folder, name, rows=ROWS):
    """What the corpus is called, after its rows were written."""
    (folder / name).parent.mkdir(exist_ok=True)
    WRITERS[name](folder / name, rows)
    return folder / name.split("/")[0]


def read(location, **fields):
    return [(d.name, d.text, d.split) for d in find_corpus(location, **fields).documents()]


def refusal(location, **fields):
    with pytest.raises(UserError) as caught:
        read(location, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EACH_FORMAT
def test_the_named_fields_of_every_format_give_text_name_and_split(tmp_path, name):
    expected = [(str(row["title"]), row["body"], split) for row, split in zip(ROWS, SPLITS, strict=True)]
    corpus = find_corpus(written(tmp_path, name), **FIELDS)
    assert [(d.name, d.text, d.split) for d in corpus.documents()] == expected
    assert [entry.split for entry in corpus.entries(lambda name: None)] == SPLITS
    assert len(list(limited(corpus, 10**6).documents())) == len(ROWS)


@EACH_FORMAT
@pytest.mark.parametrize("field", ["text_field", "name_field", "split_field"])
def test_a_missing_field_is_one_line_that_lists_the_fields_there_are(tmp_path, name, field):
    message = refusal(written(tmp_path, name), **FIELDS | {field: "absent"})
    assert "`absent`" in message
    assert "(it has body, title, part, picture)" in message


@EACH_FORMAT
def test_a_field_called_split_is_used_if_its_first_row_is_a_split_and_said_once(tmp_path, name, capsys):
    rows = [{"text": row["body"], "split": row["part"]} for row in ROWS]
    location = written(tmp_path, name, rows)
    corpus = find_corpus(location)
    for _ in range(2):
        assert [document.split for document in corpus.documents()] == SPLITS
    assert capsys.readouterr().err.count("the field `split` of its rows decides") == 1
    assert [split for *_, split in read(location, split_field="none")] == [""] * len(ROWS)
    assert capsys.readouterr().err == ""


@EACH_FORMAT
def test_a_field_called_split_with_other_words_is_ignored(tmp_path, name, capsys):
    rows = [{"text": text, "split": split} for text, split in (("a", "left"), ("b", "right"), ("c", "training"))]
    location = written(tmp_path, name, rows)
    capsys.readouterr()
    assert [split for *_, split in read(location)] == ["", "", ""]
    assert capsys.readouterr().err == ""
    assert "`split`" in refusal(location, split_field="split")


@pytest.mark.parametrize("value", [None, "", 1, "training", ["train"]])
def test_a_row_without_a_split_is_one_line_with_its_place(tmp_path, value):
    rows = [{"text": "one", "split": "train"}, {"text": "two", "split": value}]
    for fields in ({}, {"split_field": "split"}):
        assert "rows.jsonl:2" in refusal(written(tmp_path, "rows.jsonl", rows), **fields)


@pytest.mark.parametrize("value", [None, "", True, [1], {"a": 1}])
def test_a_row_without_a_name_is_one_line_with_its_place(tmp_path, value):
    rows = [{"text": "one", "key": "a"}, {"text": "two", "key": value}]
    assert "rows.jsonl:2 has no name in `key`" in refusal(written(tmp_path, "rows.jsonl", rows), name_field="key")


@EACH_FORMAT
def test_a_split_in_a_later_row_alone_is_not_ignored(tmp_path, name):
    location = written(tmp_path, name, [{"text": "a", "split": "left"}, {"text": "b", "split": "test"}])
    assert "has test in `split`" in refusal(location)


@pytest.mark.parametrize("kind", ["parquet", "saved", "class labels"])
def test_a_split_in_a_later_file_alone_is_not_ignored(tmp_path, kind):
    label = datasets.ClassLabel(names=["test"]) if kind == "class labels" else datasets.Value("string")
    value = 0 if kind == "class labels" else "test"
    later = datasets.Dataset.from_dict(
        {"text": ["b", "c"], "split": [value] * 2},
        features=datasets.Features({"text": datasets.Value("string"), "split": label}),
    )
    for name, rows in (("a", datasets.Dataset.from_dict({"text": ["a"]})), ("b", later)):
        (rows.save_to_disk if kind == "saved" else rows.to_parquet)(tmp_path / name)
    assert "b has test in `split` in row 0, unlike the first row" in refusal(tmp_path)


@pytest.mark.parametrize("missing", ["state.json", "dataset_info.json"])
def test_half_of_a_saved_dataset_is_refused_and_can_be_excluded(tmp_path, missing):
    location = written(tmp_path, "inner/saved")
    (location / "a.md").write_text("text")
    (location / "saved" / missing).unlink()
    assert "saved is half of what save_to_disk writes" in refusal(location)
    assert read(location, exclude=["saved"]) == [("a.md", "text", "")]


@pytest.mark.parametrize("fields", [{"text_field": "body"}, {"name_field": "title"}])
def test_fields_are_refused_where_there_are_only_texts(tmp_path, fields):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "rows.jsonl").write_bytes(lines(ROWS))
    assert "c has no rows, only texts: leave out --text-field and --name-field" in refusal(tmp_path / "c", **fields)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "c" / "rows")
    assert len(read(tmp_path / "c", text_field="body")) == 1 + len(ROWS)


def test_the_word_of_a_split_may_have_capitals_and_blanks(tmp_path):
    rows = [{"text": "one", "split": "Train"}, {"text": "two", "split": " TEST"}]
    assert [split for *_, split in read(written(tmp_path, "rows.jsonl", rows))] == ["train", "test"]


def test_the_split_of_a_source_overrides_that_of_its_rows_and_this_is_said(tmp_path, capsys):
    rows = [{"text": "one", "split": "test"}]
    sources = [Source("a", str(written(tmp_path, "rows.jsonl", rows)), None, "train")]
    sources.append(Source("b", str(written(tmp_path, "rows.jsonl.gz", rows))))
    assert [document.split for document in find_corpus(sources).documents()] == ["train", "test"]
    assert "a was given as train, so the field `split` of its rows is ignored" in capsys.readouterr().err
    assert "decides nothing" in refusal(sources[:1], split_field="split")


def write_dict(path, **splits):
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(path)
    return path


def test_the_splits_of_a_saved_dataset_dict_are_ours(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(3)]
    path = write_dict(tmp_path / "d", train=rows[:1], validation=rows[1:2], test=rows[2:])
    names = ["d/train:0", "d/validation:0", "d/test:0"]
    assert read(path) == list(zip(names, [row["text"] for row in rows], ["train", "valid", "test"], strict=True))
    assert [split for *_, split in read(path, split_field="none")] == ["", "", ""]
    assert read(path / "validation") == [("validation:0", "text 1", "")]
    assert "has the split train, but was given as test" in refusal([Source("d", str(path), None, "test")])


def test_a_saved_split_with_another_name_is_refused(tmp_path):
    path = write_dict(tmp_path / "d", train=[{"text": "a"}], unsupervised=[{"text": "b"}])
    assert "has the split unsupervised, none of train, valid" in refusal(path)
    assert len(read(path, split_field="none")) == 2


def test_a_saved_dataset_becomes_a_database_of_its_texts(tmp_path):
    rows = [{"text": f"text {i} " * 30, "id": str(i)} for i in range(12)]
    path = write_dict(tmp_path / "d", train=rows[:6], validation=rows[6:9], test=rows[9:])
    build_database(path, tmp_path / "db", replace(SMALL, held_out=BuildConfig.held_out), "hashing")
    records = [(record["name"], record["split"]) for record in Documents(tmp_path / "db" / "documents.jsonl")]
    assert sorted(records) == sorted(
        (row["id"], "train" if i < 6 else "valid" if i < 9 else "test") for i, row in enumerate(rows)
    )


def test_a_folder_of_texts_and_parquet_gives_both(tmp_path):
    write_parquet_folder(tmp_path / "c", [{"text": f"row {i}"} for i in range(3)])
    (tmp_path / "c" / "README.md").write_text("card")
    names = ["README.md", "a.parquet:0", "a.parquet:1", "b:0"]
    assert [name for name, *_ in read(tmp_path / "c")] == names
    assert [name for name, *_ in read(tmp_path / "c", exclude=["*.md"])] == names[1:]
    assert "README.md is a text and has no field `part`" in refusal(tmp_path / "c", split_field="part")


@EACH_FORMAT
@pytest.mark.parametrize("value", [None, 3, ["a"], {"b": "a"}], ids=str)
def test_a_text_that_is_no_string_is_refused_with_its_row(tmp_path, name, value):
    rows = [{"text": "a"}, {"text": None}] if value is None else [{"text": value}, {"text": value}]
    message = refusal(written(tmp_path, name, rows))
    assert f" but {'null' if value is None else value}: leave such rows out" in message
    row = int(value is None)  # lines are counted from 1, rows from 0
    assert f":{row + 1} has no `text` string" in message or f" has no `text` string in row {row}" in message


@pytest.mark.parametrize("name", ["rows.txt", "saved", "hub:parquet"])
def test_class_labels_in_the_field_split_have_the_names_of_their_feature(tmp_path, name):
    label = datasets.ClassLabel(names=["test", "train", "validation"])
    features = datasets.Features({"text": datasets.Value("string"), "split": label})
    rows = datasets.Dataset.from_dict({"text": list("abcd"), "split": [1, 2, 1, 0]}, features=features)
    path = tmp_path / name.removeprefix("hub:")
    if name == "saved":
        rows.save_to_disk(path)
    elif name == "rows.txt":
        rows.to_parquet(path)
    else:
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    assert [split for *_, split in read(name.replace(path.name, str(path)))] == ["train", "valid", "train", "test"]


def test_a_hub_location_of_a_saved_dataset_is_the_saved_dataset(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(3)]
    path = write_dict(tmp_path / "d", train=rows[:1], validation=rows[1:2], test=rows[2:])
    assert read(f"hub:{path}") == read(path)
    assert read(f"hub:{path}#test") == [("d:0", "text 2", "")]  # one part of it has no split
    assert read(f"hub:{path}/test") == read(path / "test") == [("test:0", "text 2", "")]
    assert f"has no parts: give {path}/test" in refusal(f"hub:{path}/test#test")


def test_a_saved_split_without_rows_is_left_out(tmp_path):
    path = write_dict(tmp_path / "d", train=[{"text": "a"}])
    datasets.Dataset.from_dict({"text": []}).save_to_disk(path / "test")
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(path) == [("d/train:0", "a", "train")]
    assert "holds no text: give a corpus with at least one document" in refusal(path / "test")


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.txt", "saved"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_data_that_break_off_are_refused_in_one_line(tmp_path, name, share):
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(map(str, rng.integers(0, 10**6, 40)))} for _ in range(300)]
    location = written(tmp_path, name, rows)
    files = sorted(path for path in [location, *location.glob("*.arrow")] if path.is_file())
    files[-1].write_bytes(files[-1].read_bytes()[: int(share * files[-1].stat().st_size)])
    assert "damaged or incomplete" in refusal(location)


MISSING = [
    ("pyarrow.parquet", "rows.txt", "pyarrow"),
    ("pyarrow", "rows.jsonl.zst", "pyarrow"),
    ("datasets", "saved", "retro-np[hub]"),
]


@pytest.mark.parametrize(("package", "name", "extra"), MISSING)
def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, package, name, extra):
    location = written(tmp_path, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {extra}" in refusal(location, text_field="body")


def test_a_text_stays_a_text_unless_it_is_called_jsonl(tmp_path):
    for name, text in {"a.json": '{"text": "x"}\n', "b.txt": "PAR1 is how parquet begins", "c": "PAR1"}.items():
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == [(name, text, "")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.txt", "saved"])
def test_memory_holds_a_part_of_the_rows(tmp_path, name):
    rng = np.random.default_rng(0)
    rows = [{"text": rng.bytes(50_000).hex()} for _ in range(1200)]  # 120 MB
    location = written(tmp_path, name, rows)
    if name == "rows.txt":
        parquet.write_table(pyarrow.Table.from_pylist(rows), location, row_group_size=100)
    del rows
    code = f"""
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import find_corpus
import datasets, pyarrow.parquet
resident = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before, peak, total = resident(), 0, 0
for document in find_corpus({str(location)!r}).documents():
    total, peak = total + len(document.text), max(peak, resident())
print(total, (peak - before) // 1024)
"""
    output, errors, status = fresh_python(code)
    assert status == 0, errors
    total, megabytes = map(int, output.split())
    assert total == 120_000_000
    assert megabytes < 90  # all rows take 120 MB in a table and as much again as texts
