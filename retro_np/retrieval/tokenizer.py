"""Byte-level BPE with the tokenizers library. It is lossless, and no text can encode to padding or end-of-text."""

import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from retro_np.errors import UserError
from retro_np.files import write_atomically
from retro_np.files.untrusted import parse_json, reporting

PADDING, END_OF_TEXT = 0, 1
# Byte-level BPE writes the space byte as Ġ. These names contain raw spaces, so neither merges nor texts produce them.
SPECIAL = ("<padding token>", "<end of text>")
MIN_VOCABULARY_SIZE = len(SPECIAL) + 256  # the special tokens and all bytes
MAX_VOCABULARY_SIZE = 2**20  # The trainer allocates memory for all of them at once.
EXPECTED = "give the tokenizer.json of a database"
MIN_PIECE_CHARACTERS, PIECES_PER_BATCH = 1 << 16, 32
# Byte-level BPE first splits a text into words with at most one leading space. Between two printing characters, a
# single space starts a word, and a single line break is a word of its own. No token crosses such a boundary.
SEAM = re.compile(r"(?<=[!-~])(?:\n(?=[!-~])|(?= [!-~]))")


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016). Ids: 0 padding, 1 end-of-text, then bytes, then merges.

    A small corpus may yield fewer merges. Raises UserError for under 258 or over MAX_VOCABULARY_SIZE entries."""
    if not MIN_VOCABULARY_SIZE <= vocabulary_size <= MAX_VOCABULARY_SIZE:
        limits = f"from {MIN_VOCABULARY_SIZE} to {MAX_VOCABULARY_SIZE:,}"
        raise UserError(f"vocabulary_size must be {limits}, not {vocabulary_size}")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces_of(text)), trainer)
    # The trainer marks its special tokens as "added", so a text could encode to them. Start again without the mark.
    model = json.loads(tokenizer.to_str())["model"]
    return _byte_level(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json that `save_tokenizer` wrote. Raises UserError for any other file.

    Only the checked vocabulary and merges are used, so that nothing else in the file can make encoding lossy."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: {EXPECTED}")
    state = parse_json(path.read_bytes(), f"{path} is not a tokenizer: the file", hint=EXPECTED)
    with reporting(f"{path} is not a tokenizer", EXPECTED):
        vocabulary, merges = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"]]
        if not _is_ours(state, vocabulary, merges):
            raise UserError(f"{path} is not a tokenizer that retro-np build made: {EXPECTED}")
        return _byte_level(models.BPE(vocab=vocabulary, merges=merges))


def save_tokenizer(tokenizer: Tokenizer, path: Path | str) -> None:
    """Write tokenizer.json atomically."""
    write_atomically(path, tokenizer_bytes(tokenizer))


def _byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer without normaliser, prefix space and added tokens, so that decoding returns the text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _is_ours(state: dict, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether ids are 0 … V − 1, special tokens are first, each byte has a token, and merges join tokens to a token."""
    ids, tokens, alphabet = list(vocabulary.values()), set(vocabulary) - set(SPECIAL), set(_byte_of_character())
    split = state["pre_tokenizer"]
    return (
        (state["model"]["type"], split["type"], split["add_prefix_space"]) == ("BPE", "ByteLevel", False)
        and not state["normalizer"]
        and not state["added_tokens"]
        and all(type(i) is int for i in ids)
        and sorted(ids) == list(range(len(ids)))
        and [vocabulary.get(token) for token in SPECIAL] == [PADDING, END_OF_TEXT]
        and alphabet <= tokens
        and all(token and set(token) <= alphabet for token in tokens)
        and all({left, right, left + right} <= tokens for left, right in merges)
    )


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """The bytes of tokenizer.json."""
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """The content hash by which a manifest identifies a tokenizer."""
    return hashlib.sha256(tokenizer_bytes(tokenizer)).hexdigest()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, without end-of-text."""
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, on all cores. To save memory long texts are cut, where possible between tokens."""
    groups = [pieces_of(text) for text in texts]
    pieces = [piece for group in groups for piece in group]
    batches = (pieces[i : i + PIECES_PER_BATCH] for i in range(0, len(pieces), PIECES_PER_BATCH))
    encoded = (encoding.ids for batch in batches for encoding in tokenizer.encode_batch_fast(batch))
    return [[token for _ in group for token in next(encoded)] for group in groups]


def pieces_of(text: str) -> list[str]:
    """The text in pieces of MIN_PIECE_CHARACTERS or a little more, each up to the next boundary between tokens."""
    pieces, start = [], 0
    while len(text) - start > MIN_PIECE_CHARACTERS:
        stop = start + 2 * MIN_PIECE_CHARACTERS
        seam = SEAM.search(text, start + MIN_PIECE_CHARACTERS, stop)
        end = seam.end() if seam else stop
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids. Padding and end-of-text add nothing; an incomplete character becomes U+FFFD."""
    pieces = vocabulary_bytes(tokenizer)
    return b"".join([pieces[int(token)] for token in ids]).decode("utf-8", "replace")


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of each token's text, (V,) int64; 0 for padding and end-of-text."""
    return np.array([len(piece) for piece in vocabulary_bytes(tokenizer)], dtype=np.int64)


@functools.lru_cache(maxsize=4)
def vocabulary_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes of each token's text; empty for padding and end-of-text."""
    table, vocabulary = _byte_of_character(), tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return tuple(b"" if token in SPECIAL else bytes(table[character] for character in token) for token in tokens)


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token; joined, what `decode` returns. A character of several tokens is given to the last one."""
    pieces = vocabulary_bytes(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(pieces[int(token)]) for token in ids]
    if rest := decoder.decode(b"", final=True):
        texts[-1] += rest
    return texts


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet. Printable Latin-1 stands for itself, and U+0100 onwards for the other bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
