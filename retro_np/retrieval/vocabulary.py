"""What a tokenizer's tokens stand for: their bytes, the ids that no text encodes to, and where a text may be cut.

Everything is read from the tokenizer's JSON, so that the same rules hold for a tokenizer of any origin: byte-level BPE
(GPT-2, SmolLM2, Llama 3, Qwen2), SentencePiece's BPE and Unigram models (Llama 2, T5) and WordPiece (BERT)."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers

PADDING, END_OF_TEXT = 0, 1  # the ids in our own tokenizers
# Byte-level BPE writes the space byte as Ġ. These names contain raw spaces, so neither merges nor texts produce them.
SPECIAL = ("<padding token>", "<end of text>")
MAX_VOCABULARY_SIZE = 2**20  # The trainer and the tables of tokens allocate memory for all of them at once.
# What the special tokens of other tokenizers are called. The first name that a tokenizer has counts.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]")
PADS = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")
END_MARK = "end of text, by the model"  # names the end-of-text that `tokenizer.with_end` stores in a post-processor
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's token of one byte
WITHOUT_SPACE = frozenset(".?!,")  # WordPiece's decoder puts no space before these.


class Special(NamedTuple):
    """The two ids that a database writes itself. No text encodes to them."""

    padding: int = PADDING
    end_of_text: int = END_OF_TEXT


@dataclass(frozen=True)
class Vocabulary:
    """Facts about a tokenizer.

    size: the ids of its own tokens are below it. special: see `Special`; what the tokenizer lacks has an id from `size`
    on. pieces: the bytes of each id's text, empty for ids that no text encodes to. prefixed: whether a text begins with
    a space that it does not have. cuttable: whether no token crosses a SEAM (see `tokenizer.py`)."""

    size: int
    special: Special
    pieces: tuple[bytes, ...]
    prefixed: bool
    cuttable: bool


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The facts about a tokenizer. Raises ValueError for one that is not supported, by the name of its part."""
    state, ids = json.loads(tokenizer.to_str()), tokenizer.get_vocab(with_added_tokens=True)
    own, size, text_of = is_ours(state), 1 + max(ids.values(), default=-1), _text_of(state)
    if not 0 < size <= MAX_VOCABULARY_SIZE or len(set(ids.values())) < len(ids):
        raise ValueError(f"its ids must be different and below {MAX_VOCABULARY_SIZE:,}")
    hidden = set(SPECIAL) if own else _hidden(tokenizer, state)
    special, after = Special(), iter((size, size + 1))
    if not own:
        ends = (*_noted_end(state), *ENDS)
        named = [next((ids[name] for name in names if name in hidden), None) for names in (PADS, ends)]
        special = Special(*(next(after) if number is None else number for number in named))
    table = [b""] * max(size, *(number + 1 for number in special))
    unknown, added = _unknown(state["model"]), {token["content"] for token in state["added_tokens"]}
    for token, number in ids.items():
        if token not in hidden:
            text = text_of("\ufffd" if token == unknown else token)
            table[number] = token.encode() if token in added and token != unknown else text
    first = b"".join(table[number] for number in tokenizer.encode("x", add_special_tokens=False).ids)
    return Vocabulary(size, special, tuple(table), first.startswith(b" "), own or _is_cuttable(state))


def special_ids(tokenizer: Tokenizer) -> Special:
    """The ids of padding and end-of-text: 0 and 1 for our own tokenizers.

    For others: the special token with one of the names PADS and ENDS, or the end-of-text that its model's files name.
    What a tokenizer lacks gets an id after its vocabulary: V, then V + 1."""
    return vocabulary(tokenizer).special


def is_ours(state: dict[str, Any]) -> bool:
    """Whether a tokenizer's JSON is one that `train_tokenizer` makes, whose encoding is lossless.

    Ids are 0 … V − 1, special tokens are first, each byte has a token, and merges join tokens to a token."""
    model, split = state["model"], state.get("pre_tokenizer") or {}
    ids, alphabet = model["vocab"], set(byte_of_character())
    tokens = set(ids) - set(SPECIAL) if isinstance(ids, dict) else set()
    return (
        (model.get("type"), split.get("type"), split.get("add_prefix_space")) == ("BPE", "ByteLevel", False)
        and not state.get("normalizer")
        and not state.get("added_tokens")
        and alphabet <= tokens
        and all(type(i) is int for i in ids.values())
        and sorted(ids.values()) == list(range(len(ids)))
        and [ids.get(token) for token in SPECIAL] == [PADDING, END_OF_TEXT]
        and all(token and set(token) <= alphabet for token in tokens)
        and all({left, right, left + right} <= tokens for left, right in model["merges"])
    )


def _hidden(tokenizer: Tokenizer, state: dict[str, Any]) -> set[str]:
    """The special tokens that the model makes from no text. Text that spells one is not looked up among them."""
    model, splits = state["model"], tokenizer.pre_tokenizer
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    made = special & {entry if isinstance(entry, str) else entry[0] for entry in model["vocab"]}  # Unigram adds scores.
    if model["type"] == "BPE":  # Such a model makes a token from its merges, or takes a word of the vocabulary whole.
        merged = {"".join(pair) for pair in model["merges"]}
        is_word = lambda token: model["ignore_merges"] and (not splits or len(splits.pre_tokenize_str(token)) == 1)  # noqa: E731
        made = {token for token in made if token in merged or len(token) == 1 or is_word(token)}
    return special - made - {_unknown(model)}


def _noted_end(state: dict[str, Any]) -> list[str]:
    post_processor = state["post_processor"] or {}
    parts = post_processor.get("processors", [post_processor])
    return [name for part in parts for name in part.get("special_tokens", {}).get(END_MARK, {}).get("tokens", ())]


def _unknown(model: dict[str, Any]) -> str | None:
    """The token for text that the model does not know."""
    number = model.get("unk_id")
    return model.get("unk_token") if number is None else model["vocab"][number][0]


def _text_of(state: dict[str, Any]) -> Callable[[str], bytes]:
    """The function that gives a token's bytes, according to the decoder."""
    decoder = state["decoder"] or {"type": "none"}
    parts = {part["type"]: part for part in decoder.get("decoders", [decoder])}
    if parts.keys() == {"ByteLevel"}:
        table = byte_of_character()
        return lambda token: bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()
    if parts.keys() == {"WordPiece"}:
        prefix = parts["WordPiece"]["prefix"]
        closing = WITHOUT_SPACE if parts["WordPiece"]["cleanup"] else ()
        joins = lambda token: token.startswith(prefix) or token in closing  # noqa: E731
        return lambda token: (token.removeprefix(prefix) if joins(token) else f" {token}").encode()
    mark = parts.get("Metaspace", {}).get("replacement") or parts.get("Replace", {}).get("pattern", {}).get("String")
    if not mark or parts.keys() - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        kinds = "byte-level, SentencePiece's and WordPiece are"
        raise ValueError(f"its decoder, {' + '.join(parts)}, is not supported; {kinds}")
    is_byte = BYTE.fullmatch if "ByteFallback" in parts else lambda token: None
    return lambda token: bytes.fromhex(token[3:5]) if is_byte(token) else token.replace(mark, " ").encode()


def byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet. Printable Latin-1 stands for itself, and U+0100 onwards for the other bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(digits: str) -> str:
    """The regular expression of Llama 3 and Qwen2, which differ in how many digits a token may have."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@functools.cache
def pre_tokenizer_kinds() -> dict[str, pre_tokenizers.PreTokenizer]:
    """The pre-tokenizers that are known not to let a token cross a SEAM, as the models' own tokenizer.json has them."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return {"gpt-2": gpt2, "smollm": digits, "llama3": _split(_words(r"\p{N}{1,3}")), "qwen2": _split(_words(r"\p{N}"))}


def _is_cuttable(state: dict[str, Any]) -> bool:
    """Whether a text may be cut at each SEAM, which follows from known parts alone."""
    known = [_form(json.loads(kind.__getstate__())) for kind in pre_tokenizer_kinds().values()]
    is_known = _form(state["pre_tokenizer"]) in known and all(token["special"] for token in state["added_tokens"])
    return is_known and state["normalizer"] in (None, {"type": "NFC"})  # It joins nothing to a space or a line break.


def _form(pre_tokenizer: Any) -> str:
    return json.dumps(pre_tokenizer).replace('"trim_offsets": true', '"trim_offsets": false')  # It changes no id.
