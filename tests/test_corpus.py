"""Ground truth: the files that the test wrote."""

import json
import os

import pytest

from retro_np.errors import UserError
from retro_np.retrieval.corpus import find_corpus, held_out, limited


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
