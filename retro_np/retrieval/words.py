"""Texts as the words by which near-duplicates are compared, in any script.

The kernel in `retro_np/kernels/minhash.py` separates words by ASCII characters only, and takes every byte from 0x80 for
a part of a word. `word_bytes` rewrites a text so that the kernel finds the words that docs/database.md defines."""

import functools
import re
import unicodedata

import numpy as np

from retro_np.kernels.minhash import KIND, PART, SINGLE, SPACE

IGNORED, ASCII = 3, 4  # kinds of character, beside those of the kernel, which itself separates ASCII's signs
MAX_WORD = 32  # characters of a word; longer runs are hardly words
LONG_RUN = re.compile(rf"\b\w{{{MAX_WORD + 1},}}", re.ASCII)
MAX_ATTACHED = 30  # marks in a row (UAX #15, stream-safe text); longer rows do not count, since sorting is quadratic
PIECE = re.compile(r"(?s).{1,500000}\S{0,500000}")  # Pieces save memory. They end before a space if there is one.
IS_PART = (KIND == PART).tobytes()  # whether a byte is part of a word
CATEGORIES = {"Z": SPACE, "Cc": SPACE, "Cf": IGNORED, "L": PART, "M": PART, "N": PART, "Cs": PART}  # others: SINGLE
# First and last code points of blocks. These decide against the categories.
BLANK = (0x200B, 0x200B), (0x2800, 0x2800), (0x3164, 0x3164), (0xFFA0, 0xFFA0)
UNSEEN = (0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF)
WITHOUT_SPACES = (
    (0x0E00, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A00, 0x1AAF), (0x1B00, 0x1B7F), (0x1BC0, 0x1BFF),
    (0x2E80, 0x312F), (0x3190, 0x31BF), (0x31F0, 0x31FF), (0x3400, 0xA4CF), (0xA980, 0xA9FF), (0xAA60, 0xAADF),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x10000, 0x100FF), (0x10600, 0x1077F), (0x116D0, 0x116FF),
    (0x12000, 0x1467F), (0x16FE0, 0x1B2FF), (0x20000, 0x3FFFF),
)  # fmt: skip


def word_bytes(text: str) -> bytes:
    """A text's words in UTF-8, extended to lone surrogates. The bytes of most ASCII texts are those of the text."""
    if not text.isascii():
        return b"".join(_rewritten(piece[0]) for piece in PIECE.finditer(text))
    if b"\1" * (MAX_WORD + 1) in text.encode().translate(IS_PART):  # The kernel lacks only the spaces in long runs.
        text = LONG_RUN.sub(lambda run: run[0].replace("", " "), text)
    return text.encode()


def _rewritten(text: str) -> bytes:
    """`word_bytes` of a piece of text."""
    (kind_of, is_attached), nfc = _unicode(), functools.partial(unicodedata.normalize, "NFC")
    codes = _codes(text)
    attached, counts = is_attached[codes], kind_of[codes] != IGNORED
    counts[attached] &= _run_lengths(attached) <= MAX_ATTACHED
    codes = _codes(nfc(nfc(_text(codes[counts])).casefold()))
    kinds = kind_of[codes]
    codes[kinds == SPACE] = ord(" ")
    kinds[kinds == PART] = np.where(_run_lengths(kinds == PART) > MAX_WORD, SINGLE, PART)
    gaps = np.flatnonzero((kinds[1:] == SINGLE) | (kinds[:-1] == SINGLE)) + 1
    return _text(np.insert(codes, gaps, ord(" "))).encode("utf-8", "surrogatepass")


def _codes(text: str) -> np.ndarray:
    """A text's code points, (characters,) uint32."""
    return np.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), np.uint32)


def _text(codes: np.ndarray) -> str:
    return codes.tobytes().decode("utf-32-le", "surrogatepass")


def _run_lengths(mask: np.ndarray) -> np.ndarray:
    """For each True of a mask (N,), in order, the length of its run."""
    starts, ends = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2).T
    return np.repeat(ends - starts, ends - starts)


@functools.cache
def _unicode() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point, (0x110000,): its kind, uint8, and whether it is a mark or does not count, bool."""
    kinds, marks = np.full(0x110000, SINGLE, np.uint8), [0xFF9E, 0xFF9F]  # NFC may move these two letters
    for code in (*range(0x20000), *range(0xE0000, 0xE0200)):
        category = unicodedata.category(chr(code))
        kinds[code] = CATEGORIES.get(category, CATEGORIES.get(category[0], SINGLE))
        if category[0] == "M":
            marks.append(code)
    for first, last in WITHOUT_SPACES:
        kinds[first : last + 1][kinds[first : last + 1] == PART] = SINGLE
    for kind, blocks in ((SPACE, BLANK), (IGNORED, UNSEEN)):
        for first, last in blocks:
            kinds[first : last + 1] = kind
    kinds[:128] = np.where(KIND[:128] == PART, PART, ASCII)
    attached = kinds == IGNORED
    attached[marks] = True
    return kinds, attached
