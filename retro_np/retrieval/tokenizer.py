"""Byte-level BPE, with the tokenizers library: lossless, and no text can spell padding or end-of-text."""

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

PADDING, END_OF_TEXT = 0, 1
# A raw space never stands in a token that merges make (byte-level BPE writes the space byte as Ġ), so that neither
# merges nor any text can produce these two.
SPECIAL = ("<padding token>", "<end of text>")
SMALLEST_VOCABULARY = len(SPECIAL) + 256
PIECE, PIECES_A_BATCH = 1 << 16, 32  # characters of a long text, and texts, that are encoded at once
# Byte-level BPE first splits a text into words, each with at most one space before it: between two printing characters
# a single space begins a word, and a single line's end is one.
SEAM = re.compile(r"(?<=[!-~])(?:\n(?=[!-~])|(?= [!-~]))")


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016) on texts: ids 0 padding, 1 end-of-text, then bytes, then merges.

    A small corpus may give fewer merges than asked for. Raises UserError for a vocabulary without room for all bytes.
    """
    check_vocabulary_size(vocabulary_size)
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces_of(text)), trainer)
    # Anew from vocabulary and merges: the trainer makes its special tokens "added" ones, looked for in every text.
    model = json.loads(tokenizer.to_str())["model"]
    return _byte_level(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]))


def check_vocabulary_size(vocabulary_size: int) -> None:
    """Raise UserError for a vocabulary without room for two special tokens and all bytes."""
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocabulary_size} is too small: all bytes and two special tokens take "
            f"{SMALLEST_VOCABULARY}; ask for that or more"
        )


def load_tokenizer(path) -> Tokenizer:
    """Read a tokenizer.json that `save_tokenizer` wrote. Raises UserError for another kind or a broken file.

    Vocabulary and merges are checked and all the rest is made anew, so the file cannot bring in a normaliser, added
    tokens, or anything else that would make encoding lose text.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: give the tokenizer.json of a database")
    try:
        state = json.loads(path.read_bytes())
        vocabulary, merges = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"]]
        known = _is_byte_level(state) and _is_closed(vocabulary, merges)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a tokenizer ({type(error).__name__}): give the tokenizer.json of a database"
        ) from error
    if not known:
        raise UserError(f"{path} is not a tokenizer that retro-np build made: give the tokenizer.json of a database")
    return _byte_level(models.BPE(vocab=vocabulary, merges=merges))


def save_tokenizer(tokenizer: Tokenizer, path) -> None:
    """Write tokenizer.json, whole or not at all."""
    write_atomically(path, tokenizer_bytes(tokenizer))


def _byte_level(model: models.BPE) -> Tokenizer:
    """No normaliser, no prefix space, no added tokens: what comes in comes out."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _is_byte_level(state: dict) -> bool:
    pre_tokenizer = state["pre_tokenizer"]
    return (
        state["model"]["type"] == "BPE"
        and not state["normalizer"]
        and not state["added_tokens"]
        and pre_tokenizer["type"] == "ByteLevel"
        and pre_tokenizer["add_prefix_space"] is False
    )


def _is_closed(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether ids are 0 … V − 1, ours come first, each byte is there, and each merge makes a token from tokens."""
    ids = list(vocabulary.values())
    tokens = set(vocabulary) - set(SPECIAL)
    alphabet = set(_byte_of_character())
    return (
        all(type(i) is int for i in ids)
        and sorted(ids) == list(range(len(ids)))
        and [vocabulary.get(token) for token in SPECIAL] == [PADDING, END_OF_TEXT]
        and alphabet <= tokens
        and all(token and set(token) <= alphabet for token in tokens)
        and all({left, right, left + right} <= tokens for left, right in merges)
    )


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """What tokenizer.json holds."""
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """The content hash that a manifest knows a tokenizer by."""
    return hashlib.sha256(tokenizer_bytes(tokenizer)).hexdigest()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without an end-of-text."""
    return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, on all cores. A long text is cut where no token can stand across, so that it costs no
    more memory than its pieces; where there is no such place, as in megabytes without a space, it is cut anyway.
    """
    pieces = [pieces_of(text) for text in texts]
    encoded = iter(_encoded(tokenizer, [piece for those in pieces for piece in those]))
    return [[token for _ in those for token in next(encoded)] for those in pieces]


def _encoded(tokenizer, pieces):
    for start in range(0, len(pieces), PIECES_A_BATCH):
        for encoding in tokenizer.encode_batch_fast(pieces[start : start + PIECES_A_BATCH]):
            yield encoding.ids


def pieces_of(text: str) -> list[str]:
    """The text in pieces of PIECE characters and what more there is to the next place where no token stands across."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        seam = SEAM.search(text, start + PIECE, start + 2 * PIECE)
        end = seam.end() if seam else start + 2 * PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids; padding and end-of-text say nothing, a character cut in two becomes U+FFFD."""
    pieces = vocabulary_bytes(tokenizer)
    return b"".join([pieces[int(token)] for token in ids]).decode("utf-8", "replace")


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, (V,) int64; 0 for padding and end-of-text."""
    return np.array([len(piece) for piece in vocabulary_bytes(tokenizer)], dtype=np.int64)


@functools.lru_cache(maxsize=4)
def vocabulary_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes that each token stands for; none for padding and end-of-text."""
    table = _byte_of_character()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return tuple(b"" if token in SPECIAL else bytes(table[character] for character in token) for token in tokens)


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token; a character whose bytes several tokens share is given whole to the last of them.

    Joined they are `decode`'s text.
    """
    pieces = vocabulary_bytes(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(pieces[int(token)]) for token in ids]
    rest = decoder.decode(b"", final=True)
    if rest:
        texts[-1] += rest
    return texts


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
