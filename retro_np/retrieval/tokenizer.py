"""Tokenizers: byte-level BPE that is trained here, and any tokenizer.json of the tokenizers library.

Text that spells a special token is encoded as plain text, so no text encodes to padding or end-of-text."""

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from retro_np.errors import UserError
from retro_np.files import write_atomically
from retro_np.files.untrusted import parse_json, reporting
from retro_np.retrieval.folders import read_settings
from retro_np.retrieval.vocabulary import END_MARK, ENDS, MAX_VOCABULARY_SIZE, SPECIAL, Special, is_ours, vocabulary

MIN_VOCABULARY_SIZE = len(SPECIAL) + 256  # the special tokens and all bytes
TOKENS_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # The second one has priority.
EXPECTED = "give the tokenizer.json of a database or of a model"
EVERYDAY = "A text with Capitals,\n\ttwo  lines, é, 文 and 🙂.\n"
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


def load_tokenizer(source: Path | str | Tokenizer) -> Tokenizer:
    """A checked tokenizer from a tokenizer.json, from a folder that has one, or from the library's own object.

    Of our own tokenizers only the vocabulary and merges are used. Any other encodes text that spells a special token as
    plain text, and neither cuts nor pads; its end-of-text is the one that the files beside it name (see `with_end`).
    Raises UserError for anything else, and for one that is not supported."""
    if isinstance(source, Tokenizer):
        where = "the tokenizer given"
        with reporting(f"{where} is not a tokenizer that can be stored", EXPECTED):
            return parse_tokenizer(source.to_str().encode(), where)
    path = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: {EXPECTED}")
    first, second = (read_settings(path.with_name(name)) for name in TOKENS_FILES)
    end = (first | second).get("eos_token")
    tokenizer = parse_tokenizer(path.read_bytes(), str(path))
    return with_end(tokenizer, end.get("content") if isinstance(end, dict) else end)


def parse_tokenizer(data: bytes, where: str) -> Tokenizer:
    """A checked tokenizer from the bytes of a tokenizer.json. where: what errors call it. See `load_tokenizer`."""
    state = parse_json(data, f"{where} is not a tokenizer: the file", hint=EXPECTED)
    with reporting(f"{where} is not a tokenizer", EXPECTED):
        if is_ours(state):
            merges = [tuple(pair) for pair in state["model"]["merges"]]
            return _byte_level(models.BPE(vocab=state["model"]["vocab"], merges=merges))
        if "merges" in state["model"] and state["model"].get("continuing_subword_prefix"):
            raise ValueError("its BPE has a continuing_subword_prefix")  # The library may abort the process.
        return checked(Tokenizer.from_str(data.decode()), where)


def checked(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """A tokenizer of a stranger, set up to encode plain text. Raises UserError if it is not supported."""
    with reporting(f"{where} is not a tokenizer", EXPECTED):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None  # It would make the ids random.
        vocabulary(tokenizer)
        return tokenizer


def with_end(tokenizer: Tokenizer, token: Any) -> Tokenizer:
    """A tokenizer whose end-of-text is the special token that its model's files name, if that is known to end a text.

    A token with another name than ENDS may end a turn of a chat, so it counts only if the tokenizer has none of ENDS.
    It is noted in the post-processor, which changes no id, so that it is stored with the tokenizer."""
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    known = vocabulary(tokenizer)
    is_new = number not in (None, *known.special) and (token in ENDS or known.special.end_of_text >= known.size)
    if number is None or not is_new or known.pieces[number]:  # The last: a text may encode to it.
        return tokenizer
    noted = Tokenizer.from_str(tokenizer.to_str())
    note = {"id": END_MARK, "ids": [number], "tokens": [token]}
    parts = [processors.TemplateProcessing("$A", special_tokens=[note]), *filter(None, [tokenizer.post_processor])]
    noted.post_processor = processors.Sequence(parts)
    return checked(noted, "the tokenizer")


def save_tokenizer(tokenizer: Tokenizer, path: Path | str) -> None:
    """Write tokenizer.json atomically."""
    write_atomically(path, tokenizer_bytes(tokenizer))


def _byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer without normaliser, prefix space and added tokens, so that decoding returns the text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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
    """The token ids of each text, on all cores. To save memory long texts are cut, where possible between tokens.

    With another's tokenizer they are cut only where that is known to change no id, and otherwise encoded whole."""
    known = vocabulary(tokenizer)
    at_seams_only = known.special != Special()
    groups = [pieces_of(text, at_seams_only) if known.cuttable else [text] for text in texts]
    pieces = [piece for group in groups for piece in group]
    batches = (pieces[i : i + PIECES_PER_BATCH] for i in range(0, len(pieces), PIECES_PER_BATCH))
    tokenizer.encode_special_tokens = True  # which a tokenizer forgets when it is pickled
    encode_pieces = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    with reporting("the tokenizer cannot encode a text", EXPECTED):  # for example without a token for unknown words
        encoded = itertools.chain.from_iterable(map(encode_pieces, batches))
        return [[token for _ in group for token in next(encoded).ids] for group in groups]


def pieces_of(text: str, at_seams_only: bool = False) -> list[str]:
    """The text in pieces of MIN_PIECE_CHARACTERS or a little more, each up to the next boundary between tokens.

    A text without such a boundary is cut all the same, at twice this length, unless at_seams_only."""
    pieces, start = [], 0
    while len(text) - start > MIN_PIECE_CHARACTERS:
        stop = len(text) if at_seams_only else start + 2 * MIN_PIECE_CHARACTERS
        seam = SEAM.search(text, start + MIN_PIECE_CHARACTERS, stop)
        end = seam.end() if seam else stop
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def decode(tokenizer: Tokenizer, ids: Iterable[int], begins: bool = True) -> str:
    """The text of token ids. Padding and end-of-text add nothing; an incomplete character becomes U+FFFD.

    begins: whether the ids are the beginning of a text, where the space that SentencePiece adds is left out."""
    return b"".join(_pieces(tokenizer, ids, begins)).decode("utf-8", "replace")


def changes_texts(tokenizer: Tokenizer) -> bool:
    """Whether tokens lose a part of a text: capitals, line breaks, double spaces, or characters that are not known."""
    try:
        return decode(tokenizer, encode(tokenizer, EVERYDAY)) != EVERYDAY
    except UserError:  # The tokenizer cannot encode each character.
        return True


def token_texts(tokenizer: Tokenizer, ids: Iterable[int], begins: bool = True) -> list[str]:
    """The text of each token; joined, what `decode` returns. A character of several tokens is given to the last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in _pieces(tokenizer, ids, begins)]
    if rest := decoder.decode(b"", final=True):
        texts[-1] += rest
    return texts


def _pieces(tokenizer: Tokenizer, ids: Iterable[int], begins: bool) -> list[bytes]:
    """The bytes of each token. An id that is not in the vocabulary, as a wider readout may give, has none."""
    known = vocabulary(tokenizer)
    pieces = [known.pieces[token] if 0 <= token < len(known.pieces) else b"" for token in map(int, ids)]
    first = next((i for i, piece in enumerate(pieces) if piece), None)
    if begins and known.prefixed and first is not None:
        pieces[first] = pieces[first].removeprefix(b" ")
    return pieces


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of each token's text, (V,) int64; 0 for padding and end-of-text.

    The space that SentencePiece adds to a text is counted with the text's first token."""
    return np.array([len(piece) for piece in vocabulary(tokenizer).pieces], dtype=np.int64)
