"""Ground truth: files written by the test, and slices chosen from a list of all documents."""

import errno
import gzip
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_np.errors import UserError
from retro_np.files import hash_fraction
from retro_np.retrieval import sources
from retro_np.retrieval.corpus import (
    Corpus,
    Source,
    find_corpus,
    held_out,
    limited,
    parse_source,
)
from retro_np.retrieval.sources import Document, Entry


def texts_of(source, **settings):
    return {document.name: document.text for document in find_corpus(source, **settings).documents()}


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def corpus_of(sizes):
    """A corpus without files, in which document i is named mI."""

    def entries(on_skip):
        for i, size in enumerate(sizes):
            yield Entry(f"m{i}", int(size), lambda i=i: Document(f"m{i}", "", "s"))

    return Corpus([Source("s", "s")], entries)


def test_a_folder_gives_every_text_file_below_it_in_sorted_order(tmp_path):
    for name, text in {"b.txt": "bee", "a/z.py": "zed", "a/c.md": "sea"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(texts_of(tmp_path).items()) == [("a/c.md", "sea"), ("a/z.py", "zed"), ("b.txt", "bee")]


def test_hidden_files_binary_files_and_links_out_of_the_folder_are_left_out(tmp_path):
    (tmp_path / "secret").write_text("outside")
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("hidden")
    (folder / "binary").write_bytes(b"\x7fELF\0\0")
    (folder / "text").write_text("text")
    os.symlink(tmp_path / "secret", folder / "link")
    skipped = []
    assert [document.text for document in find_corpus(folder).documents(skipped.append)] == ["text"]
    assert skipped == ["binary", "link"]


def test_databases_and_runs_in_a_folder_are_no_text_but_other_files_of_their_names_are(tmp_path):
    marks = {
        "db/build.json": '{"chunk_size": 1, "vocabulary_size": 1, "sources": 1, "held_out": 1, "key_dtype": 1}',
        "run/config.json": '{"model": {"vocabulary_size": 1, "cca_layers": 1}, "training": {"sequence_length": 1}, '
        '"data": {"tokenizer": 1}}',
        "site/build.json": '{"chunk_size": 1}',
        "site/config.json": "model",
    }
    for name, text in marks.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).with_name("a.txt").write_text("text")
    skipped = []
    corpus = find_corpus(tmp_path)
    assert [entry.name for entry in corpus.entries(skipped.append)] == [
        "site/a.txt", "site/build.json", "site/config.json"
    ]  # fmt: skip
    assert skipped == ["db/", "run/"]


def test_a_folder_of_packed_rows_alone_is_refused_with_the_way_to_read_them(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(UserError, match=f"file is named itself, such as {tmp_path}/rows.jsonl.gz"):
        find_corpus(tmp_path)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café ".encode() + b"\xe9\xe8 ")
    (document,) = find_corpus(tmp_path).documents()
    assert document.text == "café \ufffd\ufffd "
    assert document.replaced == 2


def test_a_location_without_text_is_refused(tmp_path):
    for location in (tmp_path / "nowhere", "a\0b", "\ud800"):
        with pytest.raises(UserError, match="no corpus at"):
            find_corpus(location)
    with pytest.raises(UserError, match="holds no text"):
        find_corpus(tmp_path)
    (tmp_path / "binary").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"\(1 file skipped: binary, "):
        find_corpus(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    skipped = r"holds no text \(3 files skipped: binary, special, or links .*; cp -rL copies what links lead to\)"
    with pytest.raises(UserError, match=skipped):
        find_corpus(tmp_path)
    with pytest.raises(UserError, match="holds no text that matches the patterns: give a corpus with at least one"):
        find_corpus(tmp_path, include=("*.txt",))
    with pytest.raises(UserError, match="is a binary file"):
        find_corpus(tmp_path / "binary")


def test_stdlib_is_all_modules_except_tests():
    names = list(find_corpus("stdlib").names())
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def test_the_held_out_share_is_close_to_the_requested_share():
    names = [f"m{i}.py" for i in range(20_000)]
    share = sum(held_out(name, 0.1) for name in names) / len(names)
    assert abs(share - 0.1) < 0.0085  # four standard deviations of 20,000 draws
    assert not any(held_out(name, 0.0) for name in names)


def test_a_slice_keeps_to_its_bytes_and_a_larger_slice_contains_it(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02d}").write_text("x" * 100)
    small, large = (list(limited(find_corpus(tmp_path), size).names()) for size in (1000, 2500))
    assert (len(small), len(large)) == (10, 25)
    assert set(small) < set(large)


def test_a_slice_does_not_depend_on_the_order_of_the_file_system(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / name).write_text(name * 10)
    assert [d.name for d in find_corpus(tmp_path).documents()] == ["a", "b", "c"]
    corpus = find_corpus(tmp_path)
    assert list(limited(corpus, 25).names()) == list(limited(corpus, 29).names())
    assert len(list(limited(corpus, 1).names())) == 1  # a slice is never empty


def test_a_slice_holds_its_share_of_held_out_documents(tmp_path):
    for i in range(600):
        (tmp_path / f"m{i}").write_text("x" * 10)
    names = list(limited(find_corpus(tmp_path), 3000).names())
    share = sum(held_out(name, 0.3) for name in names) / len(names)
    assert abs(share - 0.3) < 0.11  # four standard deviations of 300 draws


def test_the_folder_leave_out_is_not_part_of_the_corpus(tmp_path):
    for name in ("text", "db/tokens"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert list(find_corpus(tmp_path, leave_out=tmp_path / "db").names()) == ["text"]


def test_a_corpus_of_empty_files_is_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        find_corpus(tmp_path)


def test_a_file_that_disappears_while_reading_is_named_in_the_error(tmp_path):
    write_files(tmp_path, "a", "b", "c")
    documents = find_corpus(tmp_path).documents()
    assert next(documents).name == "a"
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=r"cannot read .*b \(No such file"):
        next(documents)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["scandir", "lstat", "open"])
def test_a_file_or_folder_that_cannot_be_read_is_named_in_the_error(tmp_path, monkeypatch, name, number):
    write_files(tmp_path, "folder/a")
    corpus, reason = find_corpus(tmp_path), os.strerror(number)

    def fail(path, *arguments):
        raise OSError(number, reason, path)

    monkeypatch.setattr(*((sources, "open", fail, False) if name == "open" else (os, name, fail)))
    with pytest.raises(UserError, match=f"cannot read {tmp_path}.* \\({reason}\\): fix that, or leave the file out"):
        list(corpus.documents())


PARTS = st.sampled_from(["a", "b", "a.py", "a-b", "a b", "é", "a!", "\U0001f600", "\uffff"])


@given(st.sets(st.lists(PARTS, min_size=1, max_size=3).map("/".join), min_size=1))
def test_a_folder_is_read_in_the_order_of_its_relative_paths(tmp_path_factory, names):
    names = {name for name in names if not any(other.startswith(name + "/") for other in names)}
    folder = tmp_path_factory.mktemp("folder")
    write_files(folder, *names)
    corpus = find_corpus(folder)
    assert list(corpus.names()) == sorted(names)
    assert [(d.name, d.text) for d in corpus.documents()] == [(name, name) for name in sorted(names)]


def test_invalid_utf8_in_file_names_is_replaced(tmp_path):
    for name in (b"\xe9.py", b"b"):
        with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
            file.write("text")
    assert texts_of(tmp_path) == {"b": "text", "\ufffd.py": "text"}
    assert list(limited(find_corpus(tmp_path), 100).names()) == ["b", "\ufffd.py"]


def test_only_links_to_files_inside_the_folder_are_followed_and_all_others_are_named(tmp_path):
    write_files(tmp_path, "folder/inner/file", "folder/db/tokens", "outside/file")
    folder = tmp_path / "folder"
    for name, target in {
        "inside": "inner/file", "loop": "loop", "nowhere": "gone", "to-folder": "inner", "built": "db/tokens",
        "out": "../outside/file", "out-folder": "../outside", "to-pipe": "pipe", "zero": "/dev/zero",
    }.items():  # fmt: skip
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe")
    skipped = []
    documents = list(find_corpus(folder, leave_out=folder / "db").documents(skipped.append))
    assert {document.name: document.text for document in documents} == {
        "inner/file": "folder/inner/file", "inside": "folder/inner/file",
    }  # fmt: skip
    assert skipped == ["built", "loop", "nowhere", "out", "out-folder", "pipe", "to-folder", "to-pipe", "zero"]
    os.symlink(folder, tmp_path / "alias")
    assert list(find_corpus(tmp_path / "alias").names()) == ["built", "db/tokens", "inner/file", "inside"]


FILES = [
    "Makefile",
    "a.py",
    "docs/a.md",
    "src/a.py",
    "src/deep/er/b.py",
    "src/tests/a.py",
    "tests/a.PY",
    "tests/b.py",
    "zzz",
]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("*.py", [1, 3, 4, 5, 7]),  # at any depth; upper and lower case differ
        ("/*.py", [1]),
        ("./a.py", [1]),
        ("src/*.py", [3]),
        ("src/**", [3, 4, 5]),
        ("src", [3, 4, 5]),
        ("src/**/*.py", [3, 4, 5]),
        ("**/tests/*.py", [5, 7]),
        ("tests", [5, 6, 7]),
        ("tests/", [5, 6, 7]),
        ("/tests/", [6, 7]),
        ("a.py/", []),
        ("[ab].py", [1, 3, 4, 5, 7]),
        ("[!a].p?", [4, 7]),
        ("**", range(9)),
        ("s*/a.py", [3]),
        ("er/b.py", []),
    ],
)
def test_a_pattern_includes_and_excludes_the_files_that_it_matches(tmp_path, pattern, matching):
    write_files(tmp_path, *FILES)
    taken = [FILES[i] for i in matching]
    if taken:
        assert list(find_corpus(tmp_path, include=(pattern,)).names()) == taken
    else:
        with pytest.raises(UserError, match="holds no text that matches the patterns"):
            find_corpus(tmp_path, include=(pattern,))
    if pattern != "**":
        assert list(find_corpus(tmp_path, exclude=(pattern,)).names()) == [name for name in FILES if name not in taken]


def test_exclude_overrides_include_and_an_empty_pattern_is_refused(tmp_path):
    write_files(tmp_path, *FILES)
    assert list(find_corpus(tmp_path, include=("*.py", "*.md"), exclude=("src/", "tests")).names()) == FILES[1:3]
    for pattern in ("", "/", "./"):
        with pytest.raises(UserError, match="matches nothing"):
            find_corpus(tmp_path, exclude=(pattern,))


def test_an_excluded_folder_is_not_entered(tmp_path, monkeypatch):
    write_files(tmp_path, "in/a", "out/a")
    entered, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: entered.append(folder) or scandir(folder))
    assert list(find_corpus(tmp_path, exclude=("out",)).names()) == ["in/a"]
    assert {os.path.relpath(folder, os.fsencode(tmp_path)) for folder in entered} == {b".", b"in"}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 600))
def test_a_slice_equals_one_chosen_from_a_list_of_all_documents(sizes, limit):
    documents = [(f"m{i}", size) for i, size in enumerate(sizes)]
    taken, total = [], 0
    for name, size in sorted(documents, key=lambda document: hash_fraction("slice " + document[0])):
        if total + size <= limit:
            taken.append(name)
            total += size
    taken = taken or [min((name for name, _ in documents), key=lambda name: hash_fraction("slice " + name))]
    corpus = limited(corpus_of(sizes), limit)
    assert list(corpus.names()) == [d.name for d in corpus.documents()] == [n for n, _ in documents if n in taken]


def test_a_slice_can_be_taken_of_a_slice_of_the_files_that_match(tmp_path):
    write_files(tmp_path, *(f"m{i:02d}" for i in range(50)))
    corpus = find_corpus(tmp_path, include=("*[02468]",))
    assert list(limited(corpus, 30).names()) == [d.name for d in limited(corpus, 30).documents()]
    assert len(list(limited(corpus, 30).names())) == 10
    part = limited(limited(corpus, 30), 15)
    assert len(list(part.names())) == 5
    assert set(part.names()) < set(limited(corpus, 30).names())


@pytest.mark.parametrize("change", ["added", "deleted"])
def test_a_slice_of_a_corpus_that_changed_is_refused(tmp_path, change):
    write_files(tmp_path, "a", "b", "c")
    corpus = limited(find_corpus(tmp_path), 2)
    if change == "added":
        write_files(tmp_path, "aa")
    else:
        (tmp_path / "c").unlink()
    with pytest.raises(UserError, match=r"the corpus changed at (aa|its end) while it was read"):
        list(corpus.names())


def test_a_slice_needs_at_most_32_bytes_per_document_to_make_and_9_to_keep():
    corpus = corpus_of(np.ones(20_000, int))
    list(corpus.names())
    tracemalloc.start()
    slice_of = limited(corpus, 100)
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert current < 9 * 20_000 * 1.2 + 20_000  # a growing array is up to 1/8 larger than its contents
    assert peak < 32 * 20_000 + 20_000
    assert len(list(slice_of.names())) == 100


def test_sources_keep_their_order_and_each_document_names_its_source(tmp_path):
    write_files(tmp_path, "z/b", "z/a", "a/c", "one")
    corpus = find_corpus(list(map(parse_source, [f"code={tmp_path}/z:2", f"{tmp_path}/a:1", f"x={tmp_path}/one:0.5"])))
    assert [(d.source, d.name) for d in corpus.documents()] == [("code", "a"), ("code", "b"), ("a", "c"), ("x", "one")]
    assert [(s.name, s.weight) for s in corpus.sources] == [("code", 2), ("a", 1), ("x", 0.5)]
    assert list(corpus.names()) == ["a", "b", "c", "one"] == list(corpus.names())
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="empty holds no text"):
        find_corpus(list(map(parse_source, [f"{tmp_path}/a", f"{tmp_path}/empty"])))


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("code=src/:0.55", Source("code", "src/", 0.55)),
        ("code=src/", Source("code", "src/", None)),
        ("/x/src/:3", Source("src", "/x/src/", 3.0)),
        ("stdlib", Source("stdlib", "stdlib", None)),
        ("py=stdlib:1e-2", Source("py", "stdlib", 0.01)),
        ("hub:org/name", Source("org/name", "hub:org/name", None)),
        ("web=hub:org/name@en#train:2", Source("web", "hub:org/name@en#train", 2.0)),
        ("hub:org/name@en", Source("org/name", "hub:org/name@en", None)),
        ("hub:12", Source("12", "hub:12", None)),
        ("a=hub:12", Source("a", "hub:12", None)),
        ("./a=b", Source("a=b", "./a=b", None)),
        ("a=b=c", Source("a", "b=c", None)),
        ("/x/a:b", Source("a:b", "/x/a:b", None)),
        ("./a b=c:7:.5", Source("a b=c:7", "./a b=c:7", 0.5)),
    ],
)
def test_a_spec_is_parsed_into_name_location_and_weight(spec, source):
    assert parse_source(spec) == source


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "names no location"),
        ("a=", "names no location"),
        (":0.5", "names no location"),
        ("=src", "empty name"),
        ("src:0", "weight"),
        ("src:-1", "weight"),
        ("src:nan", "weight"),
        ("src:inf", "weight"),
        ("hub:", "names no dataset"),
    ],
)
def test_an_invalid_spec_is_refused(spec, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_source(spec)


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        (["{0}:1", "{1}"], "b has no weight, unlike other sources: give every source to train on a weight, or none"),
        (["{0}", "x={0}"], "a is given twice: give each location once"),
        (["x={0}", "y={0}/.", "{1}"], "is given twice: give each location once"),
        (["x={0}", "x={1}"], "two sources are called x"),
        ([], "no corpus is named"),
    ],
)
def test_sources_share_no_name_or_location_and_all_have_weights_or_none(tmp_path, sources, complaint):
    write_files(tmp_path, "a/a", "b/b")
    with pytest.raises(UserError, match=complaint):
        find_corpus([parse_source(source.format(tmp_path / "a", tmp_path / "b")) for source in sources])


@pytest.mark.parametrize("pattern", ["[z-a]", "x[z-a]/y"])
def test_an_invalid_pattern_is_refused_in_one_line(tmp_path, pattern):
    (tmp_path / "a").write_text("a")
    with pytest.raises(UserError, match="is not a glob"):
        find_corpus(tmp_path, include=(pattern,))
