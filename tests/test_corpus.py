"""Ground truth: the files that the test wrote."""

import json
import os

import pytest

from retro_np.errors import UserError
from retro_np.retrieval.corpus import find_corpus, held_out, limited, read_corpus


def texts_of(source):
    return {document.name: document.text for document in find_corpus(source).documents()}


def test_a_folder_gives_every_text_file_below_it_in_sorted_order(tmp_path):
    for name, text in {"b.txt": "bee", "a/z.py": "zed", "a/c.md": "sea"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(texts_of(tmp_path).items()) == [("a/c.md", "sea"), ("a/z.py", "zed"), ("b.txt", "bee")]


def test_hidden_and_binary_files_and_links_out_of_the_folder_are_left_out(tmp_path):
    (tmp_path / "secret").write_text("outside")
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("hidden")
    (folder / "binary").write_bytes(b"\x7fELF\0\0")
    (folder / "text").write_text("text")
    os.symlink(tmp_path / "secret", folder / "link")
    assert texts_of(folder) == {"text": "text"}
    assert find_corpus(folder).skipped == ["binary"]


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café ".encode() + b"\xe9\xe8 ")
    (document,) = find_corpus(tmp_path).documents()
    assert document.text == "café \ufffd\ufffd "
    assert document.replaced == 2


def test_jsonl_gives_a_document_a_line_and_replaces_lone_surrogates(tmp_path):
    path = tmp_path / "c.jsonl"
    lines = [
        {"text": "one", "name": "b"},
        {"text": "two \ud800", "id": 7},
        {"text": "three"},
        {"text": "", "name": "b"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    documents = {d.name: (d.text, d.replaced) for d in find_corpus(path).documents()}
    assert documents == {
        "b": ("one", 0), "7": ("two \ufffd", 1), "c.jsonl:3": ("three", 0), "b (c.jsonl:4)": ("", 0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}\n", ":1 has no `text`"),
        ('{"text": "a"}\nx\n', ":2 is not JSON"),
        ("", "no text"),
        ('{"text": 3}', ":1 has"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, content, complaint):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(UserError, match=complaint):
        find_corpus(tmp_path / "c.jsonl")


def test_what_holds_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no corpus at"):
        find_corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no text"):
        find_corpus(tmp_path)
    (tmp_path / "binary").write_bytes(b"\0")
    with pytest.raises(UserError, match="1 binary files"):
        find_corpus(tmp_path)
    with pytest.raises(UserError, match="is a binary file"):
        find_corpus(tmp_path / "binary")


def test_the_standard_library_is_modules_without_its_tests():
    names = find_corpus("stdlib").names()
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def test_the_held_out_share_is_about_what_was_asked_for():
    names = [f"m{i}.py" for i in range(20_000)]
    share = sum(held_out(name, 0.1) for name in names) / len(names)
    assert abs(share - 0.1) < 0.0085  # four standard deviations of 20,000 draws
    assert not any(held_out(name, 0.0) for name in names)


def test_a_slice_is_within_its_bytes_and_a_larger_one_holds_no_less(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02d}").write_text("x" * 100)
    small, large = (limited(find_corpus(tmp_path), size).names() for size in (1000, 2500))
    assert (len(small), len(large)) == (10, 25)
    assert set(small) < set(large)


def test_the_names_order_and_texts_of_a_slice_do_not_depend_on_the_file_system(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / name).write_text(name * 10)
    assert [d.name for d in read_corpus(tmp_path)] == ["a", "b", "c"]
    assert limited(find_corpus(tmp_path), 25).names() == limited(find_corpus(tmp_path), 29).names()
    assert len(limited(find_corpus(tmp_path), 1).names()) == 1  # a slice is never empty


def test_a_slice_holds_its_share_of_held_out_documents(tmp_path):
    for i in range(600):
        (tmp_path / f"m{i}").write_text("x" * 10)
    names = limited(find_corpus(tmp_path), 3000).names()
    share = sum(held_out(name, 0.3) for name in names) / len(names)
    assert abs(share - 0.3) < 0.11  # four standard deviations of 300 draws


def test_a_folder_left_out_is_no_part_of_the_corpus(tmp_path):
    for name in ("text", "db/tokens"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert find_corpus(tmp_path, leave_out=tmp_path / "db").names() == ["text"]


def test_bytes_of_jsonl_that_are_not_utf8_and_a_mark_at_its_start_are_no_mistake(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000b"}\n{"text": "\xe9"}\n')
    assert [(d.text, d.replaced) for d in find_corpus(path).documents()] == [("a\0b", 0), ("\ufffd", 1)]


def test_files_without_a_byte_are_no_corpus(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        find_corpus(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "there").write_text("text")
    corpus = find_corpus(tmp_path)
    (tmp_path / "there").unlink()
    with pytest.raises(UserError, match=r"cannot read .*there"):
        list(corpus.documents())
