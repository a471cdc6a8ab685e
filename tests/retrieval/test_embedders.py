"""Embedders of one's own. Ground truth: the keys that they are written to make, and exhaustive search in NumPy."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import SMALL, CountingEmbedder

from retro_np.errors import UserError
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.embedders import checked_embedder, load_embedder

PAGE = Path(__file__).parents[2] / "docs" / "database.md"
MODULE = """
import numpy as np

class Lengths:
    name, sha256, d_key = "lengths", "5e" * 32, 2
    def embed(self, texts, show_progress=True):
        return np.array([[len(text), text.count("e")] for text in texts], np.float32).reshape(-1, 2)

class Parameters(Lengths):
    def __init__(self, width): pass

class Wide(Lengths):
    d_key = 3

class Silent(Lengths):
    def embed(self, texts): return 1

class Failing(Lengths):
    def embed(self, texts, show_progress=True): raise RuntimeError("two\\nlines")

class Flat(Lengths):
    def embed(self, texts, show_progress=True): return np.zeros(2)

class Words(Lengths):
    def embed(self, texts, show_progress=True): return texts

class Nameless(Lengths):
    name = None

class Hashless(Lengths):
    sha256 = b"5e"

class Textual(Lengths):
    d_key = "2"

class Truthful(Lengths):
    d_key = True

class Negative(Lengths):
    ef_margin = -1

class Queries(Lengths):
    def embed_queries(self, texts, show_progress=True): return np.zeros((len(texts), 5))

class Tokens(Lengths):
    def embed_tokens(self, tokens): return np.zeros((len(tokens), 5))

class Outer:
    inner = Lengths

class Empty: pass

lengths = Lengths()
number = 3
def make(): return lengths
def leave(): raise SystemExit("bye")
"""
# name: what the error says after "embedder own_lengths:NAME: "
FAULTS = {
    "missing": r"own_lengths has no missing \(AttributeError: .*\)",
    "number": "3 is no object with a method embed or embed_tokens",
    "Empty": "<own_lengths.Empty object .* is no object with a method embed or embed_tokens",
    "Parameters": r"Parameters\(\) fails \(TypeError: .*'width'\)",
    "leave": r"leave\(\) fails \(SystemExit: bye\)",
    "Wide": r"embed must return keys of shape \(N, d_key\), not \(2, 2\) for two texts",
    "Flat": r"embed must return keys of shape \(N, d_key\), not \(2,\) for two texts",
    "Silent": r"embed fails for two texts \(TypeError: .*'show_progress'\)",
    "Failing": r"embed fails for two texts \(RuntimeError: two lines\)",
    "Words": r"embed fails for two texts \(ValueError: .*\)",
    "Nameless": "name must be a text, not None",
    "Hashless": "sha256 must be a text, not b'5e'",
    "Textual": "d_key must be a whole number of at least 1, not '2'",
    "Truthful": "d_key must be a whole number of at least 1, not True",
    "Negative": "ef_margin must be a whole number of at least 1, not -1",
    "Queries": r"embed_queries must return keys of shape \(N, d_key\), not \(2, 5\) for two texts",
    "Tokens": r"embed_tokens must return keys of shape \(N, d_key\), not \(2, 5\) for two texts",
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module own_lengths in the current folder, which is not importable yet."""
    (tmp_path / "own_lengths.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield
    sys.modules.pop("own_lengths", None)


@pytest.mark.parametrize("name", ["Lengths", "lengths", "make", "Outer.inner"])
def test_an_object_a_class_or_a_function_of_a_module_in_the_current_folder_gives_an_embedder(module, name):
    embedder = load_embedder(f"own_lengths:{name}")
    assert np.array_equal(embedder.embed(["here", "a"]), [[4, 2], [1, 0]])


@pytest.mark.parametrize("name", FAULTS)
def test_an_object_that_breaks_the_protocol_is_refused_in_one_line_that_says_how(module, name):
    with pytest.raises(UserError) as error:
        load_embedder(f"own_lengths:{name}")
    way_out = "; see 'An embedder of one's own' in docs/database.md"
    assert re.fullmatch(f"embedder own_lengths:{name}: {FAULTS[name]}{re.escape(way_out)}", str(error.value))


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "1 +", "raise SystemExit(3)", "0 / 0", "\0"])
def test_a_module_that_does_not_import_is_refused_in_one_line(tmp_path, monkeypatch, source):
    (tmp_path / "unimportable.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match=r"^embedder unimportable:E: unimportable does not import [^\n]*$"):
        load_embedder("unimportable:E")


def test_a_folder_whose_name_has_a_colon_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model:v1").mkdir()
    with pytest.raises(UserError, match=r"model:v1/config\.json is missing"):
        load_embedder("model:v1")


def test_nothing_named_is_minilm():
    assert load_embedder(None).name == "all-MiniLM-L6-v2"


@pytest.mark.parametrize("wrong", [3, object(), CountingEmbedder, {"name": "x"}])
def test_a_build_refuses_an_object_that_is_no_embedder_before_it_writes_anything(corpus, tmp_path, wrong):
    with pytest.raises(UserError, match=r"^the embedder: .* is no object with a method embed or embed_tokens; see"):
        build_database(corpus, tmp_path / "db", SMALL, wrong)
    assert not (tmp_path / "db").exists()


def test_a_database_is_not_opened_with_an_object_that_is_no_embedder(database):
    with pytest.raises(UserError, match="is no object with a method embed or embed_tokens"):
        Database.open(database.path, object())


class WithQueries(CountingEmbedder):
    """Embeds queries as other texts than they are."""

    def embed_queries(self, texts, show_progress=False):
        return self.embed([text[::-1] for text in texts])


def test_texts_that_are_searched_with_are_embedded_by_embed_queries(corpus, tmp_path):
    database = build_database(corpus, tmp_path / "db", SMALL, WithQueries())
    expected = database.search_keys(WithQueries().embed(["hcraes siht"]), 3)
    for actual, wanted in zip(database.search(["this search"], 3), expected, strict=True):
        assert np.array_equal(actual, wanted)


class OnlyTokens:
    """Embeds tokens alone: how many there are, and their sum."""

    name, sha256, d_key = "only tokens", "07" * 32, 2

    def embed_tokens(self, tokens):
        return np.stack([(tokens > 0).sum(axis=1), tokens.sum(axis=1, dtype=np.int64)], axis=1).astype(np.float32)


def test_an_embedder_of_tokens_alone_builds_a_database_and_searches_it(corpus, tmp_path):
    database = build_database(corpus, tmp_path / "db", SMALL, checked_embedder(OnlyTokens()))
    tokens = database.tokenizer.encode("for token in self").ids
    _, distances = database.search("for token in self", 1)
    keys = OnlyTokens().embed_tokens(np.asarray(database.split("train").tokens))
    expected = ((keys - [len(tokens), sum(tokens)]) ** 2).sum(axis=1).min()
    np.testing.assert_allclose(distances[0], expected, rtol=1e-6)
    assert database.search([], 1)[0].shape == (0, 1)


def test_the_example_of_the_database_page_builds_and_searches_a_database_from_the_command_line(tmp_path):
    (example,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "letters.py").write_text(example)
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(["zebra zoo\n", "apple pie\n", "banana cream\n"] * 3):
        (tmp_path / "docs" / f"{i}.txt").write_text(text * 20)
    build = ["build", "docs", "-o", "db", "--embedder", "letters:Letters", "--vocabulary-size", "300"]
    for arguments in (build, ["search", "db", "zebra zoo", "--embedder", "letters:Letters"]):
        command = [sys.executable, "-c", "from retro_np.cli import main; main()", *arguments]
        completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert completed.returncode == 0, completed.stderr
    assert "zebra" in completed.stdout
