"""Embedders of one's own. Ground truth: the keys that they are written to make, and exhaustive search in NumPy."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support import SMALL, CountingEmbedder

from retro_np import cli
from retro_np.errors import UserError
from retro_np.retrieval import shards
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.embedders import checked_embedder, load_embedder
from retro_np.retrieval.verify import verify_database

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

class TooWide(Lengths):
    d_key = 2**20

class Surrogate(Lengths):
    name = "half \\udc80"

class Raising(Lengths):
    @property
    def d_key(self): raise SystemExit(0)

class RaisingMethod(Lengths):
    @property
    def embed_queries(self): raise KeyError("no\\nqueries")

class RaisingAlways:
    def __getattr__(self, name): raise OSError(name)

class Unprintable(Lengths):
    class name:
        def __repr__(self): raise SystemExit(0)
    name = name()

class Averages(Lengths):
    def embed(self, texts, show_progress=True): return [[len(text), text.count("e") / len(text)] for text in texts]

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
# name: what the error says after "embedder own_lengths:NAME"
FAULTS = {
    "missing": r" cannot be imported or made \(AttributeError: .*'missing'\)",
    "number": ": 3 is no object with a method embed or embed_tokens",
    "Empty": ": <own_lengths.* is no object with a method embed or embed_tokens",
    "Parameters": r" cannot be imported or made \(TypeError: .*'width'\)",
    "leave": r" cannot be imported or made \(SystemExit: bye\)",
    "Wide": r": embed fails for N = 2 \(the keys have the shape \(2, 2\), not \(N, d_key\) = \(2, 3\)\)",
    "Flat": r": embed fails for N = 2 \(the keys have the shape \(2,\), not \(N, d_key\) = \(2, 2\)\)",
    "Silent": r": embed fails for N = 2 \(TypeError: .*'show_progress'\)",
    "Failing": r": embed fails for N = 2 \(RuntimeError: two lines\)",
    "Averages": r": embed fails for N = 2 \(ZeroDivisionError: .*\)",  # an empty text is among the two
    "Words": r": embed fails for N = 2 \(the keys have the shape \(2,\), .*\)",
    "Nameless": r": name fails \(it must be a text of Unicode characters, not None\)",
    "Hashless": r": sha256 fails \(it must be a text of Unicode characters, not b'5e'\)",
    "Surrogate": r": name fails \(it must be a text of Unicode characters, not 'half \\udc80'\)",
    "Unprintable": r": name fails \(SystemExit: 0\)",
    "Textual": r": d_key fails \(it must be a whole number from 1 to 1,048,575, not '2'\)",
    "Truthful": r": d_key fails \(it must be a whole number from 1 to 1,048,575, not True\)",
    "TooWide": r": d_key fails \(it must be a whole number from 1 to 1,048,575, not 1048576\)",
    "Negative": r": ef_margin fails \(it must be a whole number from 1 to 1,048,575, not -1\)",
    "Raising": r": d_key fails \(SystemExit: 0\)",
    "RaisingMethod": r": embed_queries fails \(KeyError: 'no\\nqueries'\)",
    "RaisingAlways": r": embed fails \(OSError: embed\)",
    "Queries": r": embed_queries fails for N = 2 \(the keys have the shape \(2, 5\), .*\)",
    "Tokens": r": embed_tokens fails for N = 2 \(the keys have the shape \(2, 5\), .*\)",
}
ADVICE = ": correct it and run the same command again (docs/database.md, An embedder of one's own)"


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
    assert re.fullmatch(f"embedder own_lengths:{name}{FAULTS[name]}{re.escape(ADVICE)}", str(error.value))


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "1 +", "raise SystemExit(3)", "0 / 0", "\0"])
def test_a_module_that_does_not_import_is_refused_in_one_line(tmp_path, monkeypatch, source):
    (tmp_path / "unimportable.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match=r"^embedder unimportable:E cannot be imported or made [^\n]*$"):
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
    with pytest.raises(UserError, match=r"^the embedder: .* is no object with a method embed or embed_tokens: "):
        build_database(corpus, tmp_path / "db", SMALL, wrong)
    assert not (tmp_path / "db").exists()


def test_a_database_is_not_opened_with_an_object_that_is_no_embedder(database):
    with pytest.raises(UserError, match="is no object with a method embed or embed_tokens"):
        Database.open(database.path, object())


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


def raising(error):
    def fail(keys):
        raise error

    return fail


class Broken(CountingEmbedder):
    """Returns what `alter` makes of the keys, except in the trial, which has two texts. Counts the texts."""

    def __init__(self, alter=None):
        super().__init__()
        self.alter, self.seen = alter, 0

    def embed(self, texts, show_progress=False):
        self.seen += len(texts)
        keys = super().embed(texts)
        return self.alter(keys) if self.alter and len(texts) > 2 else keys


def changed(value):
    """The keys with one value of the second replaced."""
    return lambda keys: np.where(np.arange(len(keys))[:, None] == 1, np.float32(value), keys)


RAISED = [ZeroDivisionError("a\nb"), SystemExit(0), Panic(), UserError("other"), MemoryError(), ImportError("m")]
UNFIT = {
    "is not finite, or too long for float32": [
        changed(np.nan), changed(-np.inf), changed(1e19), lambda k: k.astype(float) + 1e300,
    ],
    "fails for N = 3 (TypeError: Cannot cast": [
        lambda k: k + 1j, lambda k: k.astype(str), lambda k: k.astype(object),
    ],
    "not (N, d_key) = (3, 16)": [
        lambda k: k[1:], lambda k: k[:, :5], lambda k: k[None], lambda k: None, lambda k: iter(k),
    ],
}  # fmt: skip


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_an_embedder_raises_after_its_trial_becomes_one_line_that_names_embedder_method_and_reason(error):
    embedder = checked_embedder(Broken(raising(error)))
    with pytest.raises(UserError) as refused:
        embedder.embed(["one", "two", "three"])
    assert str(refused.value).startswith("embedder counting: embed fails for N = 3 (")
    assert type(error).__name__ in str(refused.value)
    assert str(refused.value).endswith(ADVICE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("fault", "alter"), [(fault, alter) for fault, alters in UNFIT.items() for alter in alters])
def test_keys_that_cannot_be_compared_are_refused_after_the_trial_too(fault, alter):
    embedder = checked_embedder(Broken(alter))
    with pytest.raises(UserError, match=re.escape(fault)) as refused:
        embedder.embed(["one", "two", "three"])
    assert str(refused.value).startswith("embedder counting: embed ")


def test_an_interrupt_in_an_embedder_stays_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        checked_embedder(Broken(raising(KeyboardInterrupt()))).embed(["one", "two", "three"])


class Tensor:
    """As another library's array: no ndarray, but it converts itself."""

    def __init__(self, keys):
        self.keys = keys

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.keys, dtype)


@pytest.mark.parametrize("alter", [np.ndarray.tolist, Tensor, np.float64, np.asfortranarray, np.longdouble])
def test_real_numbers_of_any_kind_become_the_same_keys(alter):
    texts = ["one", "two", "three"]
    keys = checked_embedder(Broken(alter)).embed(texts)
    assert keys.dtype == np.float32
    assert keys.flags.c_contiguous
    assert np.array_equal(keys, CountingEmbedder().embed(texts))


class Reusing(CountingEmbedder):
    """Writes to its input, and returns the same array each time."""

    buffer = np.zeros((9, 16), np.float32)

    def embed(self, texts, show_progress=False):
        keys = self.buffer[: len(texts)]
        keys[:] = super().embed(texts)
        texts.clear()
        return keys


def test_an_embedder_may_change_its_input_and_reuse_its_output():
    embedder, texts = checked_embedder(Reusing()), ["one", "two"]
    first, second = embedder.embed(texts), embedder.embed(["three"])
    assert texts == ["one", "two"]
    assert np.array_equal(np.concatenate([first, second]), CountingEmbedder().embed(["one", "two", "three"]))


class Shrinking(CountingEmbedder):
    """Its attributes fail, or say something else, from the second time on."""

    reads = 0

    @property
    def d_key(self):
        self.reads += 1
        return 16 if self.reads <= 2 else 1 // 0  # the first time is in CountingEmbedder's own initialiser


def test_attributes_are_read_once():
    embedder = checked_embedder(Shrinking())
    assert [embedder.d_key, embedder.d_key] == [16, 16]
    assert embedder.embed(["one"]).shape == (1, 16)


def test_a_checked_embedder_survives_pickling():
    copy = pickle.loads(pickle.dumps(checked_embedder(CountingEmbedder(), "embedder a:b")))
    assert np.array_equal(copy.embed(["one"]), CountingEmbedder().embed(["one"]))
    assert (copy.origin, copy.d_key) == ("embedder a:b", 16)


def test_a_build_that_its_embedder_ended_is_resumed_by_the_corrected_one(corpus, database, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNKS_PER_SAVE", 16)
    failing, corrected = Broken(), Broken()
    failing.alter = lambda keys: keys if failing.seen < 100 else sys.exit(0)
    with pytest.raises(UserError, match=r"embedder counting: embed fails for N = \d+ \(SystemExit: 0\)"):
        build_database(corpus, tmp_path / "db", SMALL, failing)
    resumed = build_database(corpus, tmp_path / "db", SMALL, corrected)
    assert resumed.manifest["files"] == database.manifest["files"]
    assert corrected.seen < sum(split["chunks"] for split in database.manifest["splits"].values()) - 60


@pytest.mark.parametrize("use", [Database.search, Database.embed_chunks], ids=["search", "embed_chunks"])
def test_a_fault_of_the_embedder_after_the_build_is_one_line_too(database, use):
    opened = Database.open(database.path, Broken(raising(SystemExit(0))))
    argument = (["a", "b", "c"], 2) if use is Database.search else (database.split("train").tokens[:3],)
    with pytest.raises(UserError, match=r"^embedder counting: embed fails for N = 3 \(SystemExit: 0\): correct it"):
        use(opened, *argument)


def test_a_fault_of_the_embedder_is_no_defect_of_the_database_that_it_verifies(database):
    with pytest.raises(UserError, match=r"^embedder counting: embed fails for N = 100 \(OSError: offline\)"):
        verify_database(database.path, Broken(raising(OSError("offline"))))


def test_an_embedder_with_the_right_hash_and_another_width_is_refused(database):
    wide = CountingEmbedder()
    wide.d_key = 17
    with pytest.raises(UserError, match=r"built with embedder counting \(c0c0c0…, d_key 16\), not .* d_key 17\)"):
        Database.open(database.path, wide)


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
    """Embeds tokens alone: how many there are, and their sum, which would be too large for the stored type, uint16."""

    name, sha256, d_key = "only tokens", "07" * 32, 2

    def embed_tokens(self, tokens):
        keys = np.stack([(tokens > 0).sum(axis=1), (tokens * 1000).sum(axis=1) // 1000], axis=1).astype(np.float32)
        tokens[:] = 0  # which may not reach the caller
        return keys + tokens[:, :1]


def test_an_embedder_of_tokens_alone_builds_a_database_and_searches_it(corpus, tmp_path):
    database = build_database(corpus, tmp_path / "db", SMALL, checked_embedder(OnlyTokens()))
    tokens = database.tokenizer.encode("for token in self").ids
    _, distances = database.search("for token in self", 1)
    keys = OnlyTokens().embed_tokens(np.array(database.split("train").tokens, np.int64))
    expected = ((keys - [len(tokens), sum(tokens)]) ** 2).sum(axis=1).min()
    np.testing.assert_allclose(distances[0], expected, rtol=1e-6)
    assert database.search([], 1)[0].shape == (0, 1)


def test_the_example_of_the_database_page_builds_databases_and_searches_them(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "letters.py").write_text(example)
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(["zebra zoo\n", "apple pie\n", "banana cream\n"] * 3):
        (tmp_path / "docs" / f"{i}.txt").write_text(text * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["--embedder", "letters:Letters"]
    cli.run(["build", "docs", "-o", "db", "--vocabulary-size", "300", *own])
    cli.run(["build", "docs", "-o", "like", "--like", "db", *own])
    for folder in ("db", "like"):
        capsys.readouterr()
        cli.run(["search", folder, "zebra zoo", *own])
        assert "zebra" in capsys.readouterr().out
