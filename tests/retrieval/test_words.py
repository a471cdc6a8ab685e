"""Near-duplicates in every script. Ground truth: the definition of a word in plain Python, which tells scripts apart by
the names of their characters; Jaccard similarity of Python sets; copies that the test planted in texts of random words.
"""

import functools
import json
import re
import tracemalloc
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SMALL, json_lines

from retro_np.kernels.minhash import gram_hashes
from retro_np.retrieval import words
from retro_np.retrieval.build import build_database
from retro_np.retrieval.corpus import held_out
from retro_np.retrieval.deduplicate import DedupConfig, band_index, find_duplicates, grams, jaccard, signatures
from retro_np.retrieval.words import word_bytes

CONFIG = DedupConfig()
NAMES_WITHOUT_SPACES = (
    "CJK", "HIRAGANA", "KATAKANA", "HENTAIGANA", "BOPOMOFO", "THAI", "LAO ", "TIBETAN", "MYANMAR", "KHMER", "TAI ",
    "NEW TAI", "BUGINESE", "BALINESE", "BATAK", "JAVANESE", "YI ", "LINEAR", "CUNEIFORM", "EGYPTIAN", "ANATOLIAN",
    "TANGUT", "NUSHU", "KHITAN", "HANGZHOU", "VERTICAL KANA", "VERTICAL IDEO", "MASU", "OLD CHINESE", "VIETNAMESE ALT",
    "CYPRO-MINOAN", "IDEOGRAPHIC ITER", "IDEOGRAPHIC NUMBER", "IDEOGRAPHIC ANNO", "IDEOGRAPHIC CLOSING",
    "IDEOGRAPHIC LEVEL", "IDEOGRAPHIC RISING", "IDEOGRAPHIC DEPARTING", "IDEOGRAPHIC ENTERING", "HANGUL SINGLE",
    "HANGUL DOUBLE",
)  # fmt: skip
VARIATION_SELECTOR = re.compile("VARIATION SELECTOR|MONGOLIAN FREE VARIATION SELECTOR")


@functools.cache
def kind(character):
    """Whether a character separates words, does not count, is a part of a word, or a word of its own."""
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if character in "\u200b\u2800\u3164\uffa0" or category[0] == "Z" or category == "Cc":
        return "space"
    if character in "\u034f\u115f\u1160\u17b4\u17b5" or category == "Cf" or VARIATION_SELECTOR.match(name):
        return "nothing"
    if character == "_":
        return "part"
    plain = name.replace("HALFWIDTH ", "").replace("COMBINING ", "")
    unnamed = category == "Lo" and not name  # Tangut ideographs have no name in some versions of Python.
    is_word = category[0] not in "LMN" or plain.startswith(NAMES_WITHOUT_SPACES) or unnamed
    return "word" if is_word and category != "Cs" else "part"


def words_of(text):
    """The words of a text by the definition at the top of words.py. The rule for rows of marks is left out."""
    text = "".join(character for character in text if kind(character) != "nothing")
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    found, run = [], ""
    for character in text + " ":
        if kind(character) == "part":
            run += character
            continue
        found += [run] if 0 < len(run) <= 32 else list(run)
        run = ""
        found += [character] if kind(character) == "word" else []
    return found


def slow_jaccard(text_a, text_b, length=13):
    sets = []
    for found in (words_of(text_a), words_of(text_b)):
        size = min(length, len(found))
        sets.append({tuple(found[i : i + size]) for i in range(len(found) - size + 1)} if found else set())
    a, b = sets
    return len(a & b) / len(a | b) if a | b else 0.0


def words_in(data):
    """The words that the kernel finds in bytes, by the regular expression of its own tests."""
    found = re.findall(rb"[A-Za-z0-9_\x80-\xff]+|[^\x00-\x20\x7f]", data)
    return [word.lower().decode("utf-8", "surrogatepass") for word in found]


def letters(*ranges):
    """The letters and marks in ranges of code points."""
    codes = [code for first, last in ranges for code in range(ord(first), ord(last) + 1)]
    return np.array([chr(code) for code in codes if unicodedata.category(chr(code))[0] in "LM"])


LATIN = letters("az")
# Alphabet, letters per word, what stands between words, and what ends a sentence.
SCRIPTS = {
    "Chinese": (letters("一鿕"), (1, 3), "", "。"),
    "rare Chinese": (letters("㐀䶵", "\U00020000\U0002a6d6", "\U00030000\U0003134a"), (1, 3), "", "。"),
    "Japanese": (letters("ぁゖ", "ァヺ", "亜腕"), (1, 5), "", "。"),
    "half-width kana": (letters("ｦﾝ"), (1, 5), "", "｡"),
    "Thai": (letters("กฮ", "ะฺ", "เ์"), (2, 7), "", " "),
    "Lao": (letters("ກຮ", "ະູ", "ເໄ"), (2, 7), "", " "),
    "Khmer": (letters("កឳ", "ា៓"), (2, 7), "", "។"),
    "Burmese": (letters("ကဿ"), (2, 7), "", "။"),
    "Tibetan": (letters("ཀཬ", "ཱྀ"), (1, 3), "་", "།"),
    "Javanese": (letters("ꦀꦲ", "꦳꧀"), (2, 7), "", "꧉"),
    "Yi": (letters("ꀀꒌ"), (1, 3), "", "。"),
    "Ethiopic": (letters("ሀቈ", "በኈ", "ነኰ", "ወዐ", "ዘጐ"), (2, 5), "፡", "።"),
    "Korean": (letters("가힣"), (1, 5), " ", ". "),
    "Korean without spaces": (letters("가힣"), (1, 5), "", "."),
    "Arabic": (letters("ءغ", "فو"), (2, 7), " ", "، "),
    "Hindi": (letters("अह", "ा्"), (2, 7), " ", "। "),
    "Greek": (letters("αω", "άώ"), (2, 8), " ", ". "),
    "emoji": (np.array([*map(chr, range(0x1F300, 0x1F5FF))]), (1, 4), "\u200d", "\ufe0f"),
    "mixed": (letters("az", "ая", "一龥", "かん"), (1, 6), " ", "。"),
    "no-break spaces": (LATIN, (2, 9), "\u00a0", ". "),
    "thin spaces": (LATIN, (2, 9), "\u2009", ".\u2009"),
    "ideographic spaces": (LATIN, (2, 9), "\u3000", "."),
    "line separators": (LATIN, (2, 9), "\u2028", "."),
    "zero-width spaces": (LATIN, (2, 9), "\u200b", "."),
    "next lines": (LATIN, (2, 9), "\x85", "."),
    "English without spaces": (LATIN, (2, 9), "", "."),
    "letters alone": (LATIN, (2, 9), "", ""),
    "capitals without spaces": (letters("АЯ"), (2, 9), "", ""),
}
EACH_SCRIPT = pytest.mark.parametrize("script", SCRIPTS)


def sentences_of(rng, script, count=40):
    """Random sentences of 8 to 20 words from a vocabulary of 400."""
    alphabet, (shortest, longest), gap, end = SCRIPTS[script]
    vocabulary = ["".join(rng.choice(alphabet, rng.integers(shortest, longest + 1))) for _ in range(400)]
    return [gap.join(rng.choice(vocabulary, rng.integers(8, 21))) + end for _ in range(count)]


def edited(rng, script, sentences, changes=2):
    """The text without one sentence, and with some letters replaced."""
    text = list("".join(sentence for i, sentence in enumerate(sentences) if i != 5))
    for position in rng.choice(len(text), changes, replace=False):
        text[position] = rng.choice(SCRIPTS[script][0])
    return "".join(text)


def planted(script, seed=0):
    """A text, two edited copies, and a text of other words in the same script."""
    rng = np.random.default_rng(seed)
    sentences = sentences_of(rng, script)
    return "".join(sentences), [edited(rng, script, sentences) for _ in range(2)], "".join(sentences_of(rng, script))


@EACH_SCRIPT
def test_edited_copies_are_found_in_every_script_and_other_texts_are_not(script):
    original, copies, other = planted(script)
    exact = [slow_jaccard(original, copy) for copy in copies]
    assert all(0.82 < similarity < 0.97 for similarity in exact)  # the copies are near the original, but not equal
    index = band_index(signatures([original], CONFIG), CONFIG)
    found = find_duplicates([*copies, other], index, [original].__getitem__)
    assert [(record.row, record.exact) for record in found] == [(i, pytest.approx(exact[i])) for i in range(2)]


def test_a_build_leaves_out_the_copies_of_every_script_and_nothing_else(tmp_path):
    texts, copied = {}, set()
    for number, script in enumerate(SCRIPTS):
        original, copies, other = planted(script, number)
        held, *training = _names(script, number)
        texts |= dict(zip([held, *training], [original, *copies, other], strict=True))
        copied |= set(training[:2])
    config = replace(SMALL, chunk_size=64, training_neighbours=False)
    build_database(json_lines(tmp_path / "c.jsonl", texts), tmp_path / "db", config, "hashing")
    records = [json.loads(line) for line in (tmp_path / "db" / "duplicates.jsonl").read_text().splitlines()]
    assert {record["name"] for record in records} == copied
    for record in records:
        assert record["exact"] == pytest.approx(
            slow_jaccard(texts[record["name"]], texts[record["held_out"]]), abs=1e-6
        )


def _names(script, number):
    """Names of which the first is held out and three are not."""
    names = [f"{script} {number}.{i}" for i in range(100)]
    held = [name for name in names if held_out(name, SMALL.held_out)]
    return [held[0], *[name for name in names if name not in held][:3]]


CHARACTERS = [
    *"éÉßςاक가ก็中ሰ፡·“aB_7-²٣ﾞ \n\x85\u00ad\ufeff\u00a0\u2009\u200b\u2028\u3000\ue000\U000e0041\ud800",
    "e\u0301", "ك\u064b", "か\u3099", "❤\ufe0f", "👩\u200d👧", "x" * 20,
]  # fmt: skip


@settings(deadline=None)
@given(
    pieces=st.lists(st.sampled_from(CHARACTERS), max_size=60),
    suffix=st.lists(st.sampled_from(CHARACTERS), max_size=10),
    length=st.integers(1, 14),
)
def test_jaccard_is_that_of_sets_of_words_as_defined(pieces, suffix, length):
    text, other = "".join(pieces), "".join(pieces[5:] + suffix)
    assert words_in(word_bytes(text)) == [word.lower() for word in words_of(text)]
    assert jaccard(text, other, length) == pytest.approx(slow_jaccard(text, other, length), abs=1e-15)


def test_each_character_of_unicode_is_a_space_or_a_part_or_a_word_as_defined():
    codes = [*range(128, 0x32000), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
    characters = [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
    pieces = [f"a{character}b" for character in characters]
    found = word_bytes("\n".join(pieces)).splitlines()  # NFC joins nothing with an a or across a line
    expected = [words_of(piece) for piece in pieces]
    wrong = [
        ascii(piece) for piece, line, right in zip(pieces, found, expected, strict=True) if words_in(line) != right
    ]
    assert wrong == []


@settings(deadline=None)
@given(st.text())
def test_composed_and_decomposed_copies_are_equal(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    np.testing.assert_array_equal(*grams([composed, decomposed]))


@pytest.mark.parametrize("script", ["Greek", "no-break spaces", "mixed"])
def test_upper_and_lower_case_are_equal(script):
    text = planted(script)[0]
    assert jaccard(text.lower(), text.upper()) == 1


SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]


@pytest.mark.parametrize("space", [*SPACES, "\u200b", "\u2800", "\u3164", "\uffa0"], ids=ascii)
def test_every_space_separates_words_as_an_ascii_space_does(space):
    words_ = ["".join(word) for word in np.random.default_rng(0).choice(LATIN, (200, 5))]
    assert jaccard(" ".join(words_), space.join(words_)) == 1


@pytest.mark.parametrize("invisible", "\u00ad\u200c\u200d\u200e\u202e\u2060\ufeff\ufe0f\u034f\u061c\U000e0100")
def test_invisible_characters_do_not_count(invisible):
    text = planted("Greek")[0]
    assert jaccard(text, re.sub("(?<=[αειου])", invisible, text)) == 1


@settings(deadline=None)
@given(st.lists(st.sampled_from(["if", "If", "x" * 32, "(", " ", "\n", "\0", "= ", "_1"]), max_size=60).map(" ".join))
def test_ascii_text_is_compared_as_it_is(text):
    assert word_bytes(text) == text.encode()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["x" * 32, "Y", "_1", "(", " ", "\n", "\0", "~"]), max_size=60).map("".join))
def test_ascii_text_has_the_same_words_beside_text_that_is_not_ascii(text):
    assert [*words_in(word_bytes(text)), "é"] == words_in(word_bytes(text + " é"))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["中", "é ", "x", "\u3000", "\n", "❤\ufe0f ", "e\u0301", "z" * 9]), max_size=80))
def test_a_text_rewritten_in_pieces_has_the_words_of_the_whole_text(pieces):
    text, whole = "".join(pieces), words.PIECE
    expected = word_bytes(text)
    try:
        words.PIECE = re.compile(r"(?s).{1,3}\S*")
        assert words_in(word_bytes(text)) == words_in(expected)
    finally:
        words.PIECE = whole


LONG = ["x" * 10**7, "中" * 3_400_000, "é" * 5_000_000, "\u0301\u0316" * 2_500_000, "\u0f73" * 3_400_000]


@pytest.mark.parametrize("text", [*LONG, "\u0301\u200d\u0316" * 1_500_000], ids=lambda text: ascii(text[:3]))
def test_a_line_of_10_mb_without_spaces_takes_linear_time_and_moderate_memory(text):
    word_bytes("é")  # builds the tables
    tracemalloc.start()
    data = word_bytes(text)  # hours if it were quadratic
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6 + 2 * len(data)
    assert len(gram_hashes(np.frombuffer(data, np.uint8), 13)) <= len(text)
