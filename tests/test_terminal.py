"""No text controls a terminal. Ground truth: Unicode's categories, and the control sequences of harmless texts."""

import errno
import io
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich import progress
from rich.table import Table
from rich.text import Text

from retro_np.progress import one_line, progress_bar, safe_console, say, visible

# What a terminal may obey, what reorders a line, and what cannot be encoded: the categories Cc, Cf, Cs, Zl and Zp,
# except tab, newline, and the format characters that joined scripts and emoji need.
NEEDED = "\t\n\u200b\u200c\u200d"
HOSTILE = (
    "\x1b[2J", "\x1b]52;c;aGk=\x07", "\x1b]8;;http://x.example\x1b\\link\x1b]8;;\x1b\\", "\x9b31m", "\r",
    "\x08", "\u202e", "\u2066", "\u061c", "\u2028", "\u2029", "\udcff", "\x00", "\x7f", "\x85", "\U000e0041",
    "\ufeff", "\u00ad", "\u2060", "\x0e", "\x0c", "\x0b", "[bold red]", "[link=http://x.example]", ":smile:",
)  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)), max_size=6).map("".join)


def is_dangerous(text: str) -> bool:
    categories = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return any(unicodedata.category(c) in categories and c not in NEEDED and not is_visible_format(c) for c in text)


def is_visible_format(character: str) -> bool:
    """Whether a format character has a glyph: signs around Arabic, Syriac and Kaithi numbers; Egyptian joiners."""
    visible_ones = "\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd\U00013430-\U0001343f"
    return re.match(f"[{visible_ones}]", character) is not None


@given(texts)
def test_a_visible_text_has_no_control_no_bidirectional_and_no_invisible_character(text):
    assert not is_dangerous(visible(text))
    visible(text).encode()
    assert visible(visible(text)) == visible(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b\u202ec\x7f\n\td\r\n", "a␀b[U+202E]c[U+007F]\n\td\n"),
        ("\x1b[2J\x9b31m", "␛[2J[U+009B]31m"),
        ("over\rwritten", "over␍written"),
        ("\udcff\ud800", "[U+DCFF][U+D800]"),
        ("a\u061cb\u2028c\u2029d", "a[U+061C]b[U+2028]c[U+2029]d"),
        ("ok\U000e0069\U000e0067", "ok[U+E0069][U+E0067]"),
        ("pay\u200dpal \u200b\ufeff x\ufe01\ufe02", "pay[U+200D]pal [U+200B][U+FEFF] x[U+FE01][U+FE02]"),
    ],
)
def test_invisible_characters_become_visible(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "plain text, a [tag] and :colons:\n\tindented",
        "👨‍👩‍👧 👁️‍🗨️ ❤️ #️⃣ 👍🏽 🇳🇿",
        "می‌خواهم", "क्‍ष", "ភាសា​ខ្មែរ", "ᠮᠣᠩᠭᠣᠯ", "עברית العربية", "葛󠄀城市", "café", "日本語　漢字",
    ],
)  # fmt: skip
def test_ordinary_writing_stays_as_it_is(text):
    assert visible(text) == text


def printed(text: str, **options) -> str:
    """Everything that a console shows of a text: in strings, styled texts, tables, rules, progress bars and errors."""
    stream = io.StringIO()
    console = safe_console(file=stream, width=100, log_path=False, **options)  # with the path, a link of its own
    styled = Text(text, style="bold")
    styled.append(text, style="red")
    table = Table("a", text, title=text, caption=text)
    table.add_row(text, styled)
    bar = progress.Progress(progress.TextColumn("{task.description}", markup=False), console=console)
    bar.add_task(text, total=1)
    for thing in (text, styled, table, bar.get_renderable(), ValueError(text), [text]):
        console.print(thing)
    console.rule(text)
    console.print(text, soft_wrap=True, style="dim")
    console.out(text)
    console.log(text)
    return stream.getvalue()


@given(texts)
def test_a_console_without_colours_prints_no_control_character(text):
    assert not is_dangerous(printed(text, color_system=None))


@given(texts)
def test_a_terminal_gets_only_the_sequences_that_a_harmless_text_gets(text):
    sent = set(re.findall(r"\x1b\[[0-9;]*m", printed("harmless", force_terminal=True)))
    rest = printed(text, force_terminal=True)
    for sequence in sorted(sent, key=len, reverse=True):
        rest = rest.replace(sequence, "")
    assert not is_dangerous(rest)


def test_a_string_is_laid_out_with_the_symbols_that_it_shows():
    stream = io.StringIO()
    safe_console(file=stream, width=20).print("\u202e" * 9)
    assert stream.getvalue().replace("\n", "") == "[U+202E]" * 9


def test_brackets_and_colons_of_a_text_are_not_codes():
    stream = io.StringIO()
    safe_console(file=stream, width=80).print("[bold]x[/bold] :smile:")
    assert stream.getvalue() == "[bold]x[/bold] :smile:\n"


def test_a_message_is_one_line_without_control_characters(capsys):
    say("a name\nof \x1b[31mtwo\x07  lines\udcff")
    assert capsys.readouterr() == ("", "a name of ␛[31mtwo␇ lines[U+DCFF]\n")
    assert one_line(" a\r\n\tb ") == "a b"


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["None", "closed", "full"])
def test_messages_and_progress_need_no_standard_error(monkeypatch, kind):
    stream = None if kind == "None" else Full() if kind == "full" else io.StringIO()
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("retro_np.progress.DELAY", -1.0)
    say("text")
    with progress_bar("work", 3) as advance:
        advance()


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch):
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", ascii_stream)
    say("naïve ␛")
    ascii_stream.flush()
    assert ascii_stream.buffer.getvalue() == b"na\\xefve \\u241b\n"
