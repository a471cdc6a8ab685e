"""Ground truth: files that the test wrote with json, gzip and pyarrow; the package datasets reads some of them."""

import contextlib
import gzip
import json
import socket
import sys
import tracemalloc

import pytest

from retro_np.errors import UserError
from retro_np.retrieval.corpus import find_corpus, limited

LINES = [
    {"text": "one", "name": "b"},
    {"text": "two \ud800", "id": 7},
    {"text": "three"},
    {"text": "", "name": "b", "id": 1},
    {"text": "five", "name": "", "id": "i\udfff"},
]
DOCUMENTS = [("b", "one", 0), ("7", "two \ufffd", 1), ("c.jsonl:3", "three", 0), ("b", "", 0), ("i\ufffd", "five", 0)]


def documents_of(source):
    corpus = find_corpus(source)
    documents = list(corpus.documents())
    names = [document.name for document in documents]
    assert names == list(corpus.names()) == [document.name for document in corpus.documents()]
    assert names == list(limited(corpus, 10**9).names())
    return [(document.name, document.text, document.replaced) for document in documents]


def write_lines(path, lines):
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_each_line_of_jsonl_is_a_document_and_lone_surrogates_are_replaced(tmp_path, name):
    expected = [(n.replace("c.jsonl", name), text, replaced) for n, text, replaced in DOCUMENTS]
    assert documents_of(write_lines(tmp_path / name, LINES)) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a"}\n{}\n', ":2 has no `text`"),
        ('{"text": "a"}\n\nx\n', ":3 is not JSON .Expecting value, column 1"),
        ('{"text": "a"}\n[1]\n', ":2 has"),
        ("", "no text"),
        ('{"text": ""}\n \n', "no text"),
        ('{"text": 3}', ":1 has"),
        ("[" * 100_000, ":1 is not JSON"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line_number(tmp_path, content, complaint):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(UserError, match=complaint):
        documents_of(tmp_path / "c.jsonl")


def test_jsonl_may_have_invalid_utf8_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000b"}\n \t\r\n\n{"text": "\xe9"}')
    assert documents_of(path) == [("c.jsonl:1", "a\0b", 0), ("c.jsonl:4", "\ufffd", 1)]
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "a"}')
    assert documents_of(path) == [("c.jsonl:2", "a", 0)]


ODD_LINES = {  # a line and its document's name and text, or None if the line is refused
    '{"text": "a", "id": NaN}': ("nan", "a"),
    '{"text": "a", "id": -1e999}': ("-inf", "a"),
    '{"text": "a", "text": "b"}': ("c.jsonl:1", "b"),
    '{"text": "a", "id": 0}': ("0", "a"),
    '{"text": "a", "name": false, "id": 1}': ("False", "a"),
    '{"text": "a", "name": {"b": [1]}}': ("{'b': [1]}", "a"),
    '{"text": "a", "name": "\\u0000\\u001b[2J"}': ("\0\x1b[2J", "a"),
    '{"text": "\\ud83d\\ude00\\ud83d"}': ("c.jsonl:1", "\U0001f600\ufffd"),
    '{"text": "a\u2028\x85b"}\r': ("c.jsonl:1", "a\u2028\x85b"),
    '{"text": "a", "name": "' + "n" * 10**6 + '"}': ("n" * 10**6, "a"),
    '{"text": "a", "id": ' + "9" * 5000 + "}": None,
    '{"text": "a", "id": ' + "[" * 10**5 + "]" * 10**5 + "}": None,
    '{"text": "a", "id": ' + '{"b":' * 10**5 + "1" + "}" * 10**5 + "}": None,
    '{"text": ["a"]}': None,
    '{"text": null}': None,
    '{"Text": "a"}': None,
    '[{"text": "a"}]': None,
    '{"text": "a"} {"text": "b"}': None,
    '{"text": "a"}\r{"text": "b"}': None,
    '{"text": "a",}': None,
    "{'text': 'a'}": None,
    '{"text": "a\x01"}': None,
    "\0": None,
}


@pytest.mark.parametrize(("line", "document"), ODD_LINES.items(), ids=lambda value: ascii(value)[:30])
def test_an_odd_line_of_json_is_read_by_the_rules_of_json_or_refused_in_one_line(tmp_path, line, document):
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n", encoding="utf-8", newline="")
    if document is not None:
        assert [(name, text) for name, text, _ in documents_of(path)] == [document]
        return
    with pytest.raises(UserError, match=r"c.jsonl:1 (has no `text`|is not JSON)") as caught:
        find_corpus(path)
    assert "\n" not in str(caught.value)


def test_a_name_of_any_depth_is_read_or_refused_in_one_line(tmp_path):
    path, deepest = tmp_path / "c.jsonl", 0
    for depth in range(50, 1200, 3):
        name = "[" * depth + "1" + "]" * depth
        path.write_text('{"text": "a", "id": ' + name + "}")
        with contextlib.suppress(UserError):
            assert [document.name for document in find_corpus(path).documents()] == [name]
            deepest = depth
    assert deepest > 100


def damaged(data, damage):
    middle = len(data) // 2
    return {
        "truncated": data[:middle],
        "without its end": data[:-4],
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "wrong checksum": data[:-8] + bytes(4) + data[-4:],
        "with trailing garbage": data + b"garbage",
        "not gzip": b'{"text": "a"}\n',
    }[damage]


@pytest.mark.parametrize(
    "damage", ["truncated", "without its end", "flipped", "wrong checksum", "with trailing garbage", "not gzip"]
)
def test_damaged_gzip_data_are_refused_with_the_line_number(tmp_path, damage):
    path = write_lines(tmp_path / "c.jsonl.gz", [{"text": f"{i * i * 7919 % 10007}"} for i in range(5000)])
    path.write_bytes(damaged(path.read_bytes(), damage))
    with pytest.raises(UserError, match=r"c.jsonl.gz:\d+ (cannot be unpacked|is not JSON)") as caught:
        documents_of(path)
    line = int(str(caught.value).split(".gz:")[1].split()[0])
    expected = {"not gzip": (1, 1), "truncated": (1500, 3500), "flipped": (1500, 3500)}.get(damage, (5001, 5001))
    assert expected[0] <= line <= expected[1]
    assert "\n" not in str(caught.value)


def test_jsonl_is_read_one_line_at_a_time(tmp_path):
    path = tmp_path / "c.jsonl"
    with path.open("w") as file:
        for _ in range(20):
            file.write(json.dumps({"text": "x" * 1_000_000}) + "\n")
    tracemalloc.start()
    total = sum(len(document.text) for document in find_corpus(path).documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20_000_000
    assert peak < 8_000_000  # a line's bytes, text, record and encoding, and the previous document


def test_a_text_file_is_one_document_and_a_missing_file_is_named_in_the_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert documents_of(tmp_path / "a.txt") == [("a.txt", "caf\ufffd", 1)]
    corpus = find_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.txt \(No such file"):
        list(corpus.documents())


@pytest.fixture
def _no_network(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path.parent


@pytest.mark.usefixtures("_no_network")
def test_a_folder_of_jsonl_is_streamed_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "json"  # also the name of a format of datasets
    folder.mkdir()
    write_lines(folder / "data.jsonl", [{"text": "one", "id": 7}, {"text": "two", "id": None}, {"text": "", "id": 9}])
    assert documents_of(f"hub:{folder}") == [("7", "one", 0), ("json:1", "two", 0), ("9", "", 0)]
    (document, *_) = find_corpus(f"hub:{folder}").documents()
    assert document.source == "json"


@pytest.mark.usefixtures("_no_network")
def test_a_folder_of_parquet_is_streamed_in_the_order_of_its_files(tmp_path):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "p" / "b.parquet", text=["three"], name=["n3"], picture=[b"\x89"])
    write_parquet(tmp_path / "p" / "a.parquet", text=["one", ""], name=["n1", "n2"], picture=[b"\x89", None])
    assert documents_of(f"hub:{tmp_path / 'p'}") == [("n1", "one", 0), ("n2", "", 0), ("n3", "three", 0)]


@pytest.mark.usefixtures("_no_network")
def test_splits_and_configurations_of_a_dataset_can_be_chosen(tmp_path, capsys):
    pytest.importorskip("datasets")
    folder = write_parquet(tmp_path / "d" / "train.parquet", text=["train"])
    write_parquet(folder / "test.parquet", text=["test"])
    assert documents_of(f"hub:{folder}") == [("d:0", "train", 0)]
    assert capsys.readouterr().err.count("only train is read of its splits train, test; to read another one: hub:") == 1
    assert documents_of(f"hub:{folder}#test") == [("d:0", "test", 0)]
    assert documents_of(f"hub:{folder}@default#test") == [("d:0", "test", 0)]
    for choice, reason in (("#valid", "its splits are train, test"), ("@other", ".*")):
        with pytest.raises(UserError, match=rf"cannot be read \({reason}"):
            find_corpus(f"hub:{folder}{choice}")


@pytest.mark.usefixtures("_no_network")
def test_a_dataset_without_texts_is_refused(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"no `text` string in row 0 \(it has content"):
        find_corpus(f"hub:{write_parquet(tmp_path / 'a' / 'a.parquet', content=['one'])}")
    with pytest.raises(UserError, match="no `text` string in row 0"):
        find_corpus(f"hub:{write_parquet(tmp_path / 'b' / 'a.parquet', text=[3])}")
    with pytest.raises(UserError, match="holds no text"):
        find_corpus(f"hub:{write_parquet(tmp_path / 'c' / 'a.parquet', text=['', ''])}")
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        find_corpus(f"hub:{tmp_path / 'd'}")
    folder = write_parquet(tmp_path / "e" / "a.parquet", text=["one"])
    (folder / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read after row 0") as caught:
        documents_of(f"hub:{folder}")
    assert "\n" not in str(caught.value)


def test_a_missing_datasets_package_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install retro-np\[hub\]"):
        find_corpus(f"hub:{tmp_path}")
