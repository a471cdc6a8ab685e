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

from retro_np.errors import UserError

PADDING, END_OF_TEXT = 0, 1  # of the tokenizers that are trained here
# Byte-level BPE writes the space byte as Ġ. These names contain raw spaces, so neither merges nor texts produce them.
SPECIAL = ("<padding token>", "<end of text>")
MAX_VOCABULARY_SIZE = 2**20  # The trainer and the tables of tokens allocate memory for all of them at once.
# What the special tokens of other tokenizers are called. The first name that a tokenizer has counts.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]")
PADS = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")
UNKNOWN = "\ufffd".encode()  # stands for text that a tokenizer cannot represent
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
    """The facts about a tokenizer. Raises UserError for a tokenizer that is not supported, by the name of its part."""
    state, ids = json.loads(tokenizer.to_str()), tokenizer.get_vocab(with_added_tokens=True)
    own = is_ours(state)
    size = 1 + max(ids.values(), default=-1)
    if not 0 < size <= MAX_VOCABULARY_SIZE or len(set(ids.values())) < len(ids):
        raise UserError(f"its ids must be different and below {MAX_VOCABULARY_SIZE:,}: use another tokenizer")
    text_of, is_whole = _decoder(state)
    hidden = set(SPECIAL) if own else _hidden(state, is_whole)
    added = {token["content"] for token in state["added_tokens"]}
    unknown = None if is_whole else _unknown(state["model"])
    table = [b""] * (size + len(Special._fields))
    for token, number in ids.items():
        if token not in hidden:
            table[number] = UNKNOWN if token == unknown else token.encode() if token in added else text_of(token)
    special, rest = Special(), iter((size, size + 1))
    if not own:
        found = [next((ids[n] for n in names if n in hidden & ids.keys()), None) for names in (PADS, ENDS)]
        special = Special(*(next(rest) if number is None else number for number in found))
    first = b"".join(table[i] for i in tokenizer.encode("x", add_special_tokens=False).ids)
    pieces = tuple(table[: max(size, *(number + 1 for number in special))])
    return Vocabulary(size, special, pieces, first.startswith(b" "), own or _is_cuttable(state))


def special_ids(tokenizer: Tokenizer) -> Special:
    """The ids of padding and end-of-text: 0 and 1 for our own tokenizers.

    For others: the special token with one of the names PADS and ENDS. What a tokenizer lacks gets an id after its
    vocabulary: V, then V + 1."""
    return vocabulary(tokenizer).special


def is_ours(state: dict[str, Any]) -> bool:
    """Whether a tokenizer's JSON is one that `train_tokenizer` makes, whose encoding is lossless.

    Ids are 0 … V − 1, special tokens are first, each byte has a token, and merges join tokens to a token."""
    ids, merges = state["model"]["vocab"], [tuple(pair) for pair in state["model"].get("merges", ())]
    if state["model"].get("type", "BPE") != "BPE" or not isinstance(ids, dict):
        return False
    tokens, alphabet, split = set(ids) - set(SPECIAL), set(byte_of_character()), state.get("pre_tokenizer") or {}
    return (
        (split.get("type"), split.get("add_prefix_space")) == ("ByteLevel", False)
        and not state["normalizer"]
        and not state["added_tokens"]
        and all(type(i) is int for i in ids.values())
        and sorted(ids.values()) == list(range(len(ids)))
        and [ids.get(token) for token in SPECIAL] == [PADDING, END_OF_TEXT]
        and alphabet <= tokens
        and all(token and set(token) <= alphabet for token in tokens)
        and all({left, right, left + right} <= tokens for left, right in merges)
    )


def _hidden(state: dict[str, Any], is_whole: bool) -> set[str]:
    """The special tokens that no text encodes to, since plain text that spells one is split by the model as well."""
    model = state["model"]
    entries = model["vocab"]
    known = set(entries) if isinstance(entries, dict) else {entry[0] for entry in entries}
    if model["type"] == "BPE" and not model.get("ignore_merges"):  # Such a model makes a token from its merges alone.
        known = {"".join(pair) for pair in model["merges"]} | {token for token in known if len(token) == 1}
    known |= set() if is_whole else {_unknown(model)}
    return {token["content"] for token in state["added_tokens"] if token["special"]} - known


def _unknown(model: dict[str, Any]) -> str | None:
    """The token that stands for text which the model does not know."""
    number = model.get("unk_id")
    return model.get("unk_token") if number is None else model["vocab"][number][0]


def _decoder(state: dict[str, Any]) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether the vocabulary has a token for each byte, so that no text is unknown."""
    decoder, model = state["decoder"] or {"type": "Sequence", "decoders": []}, state["model"]
    parts = {part["type"]: part for part in decoder.get("decoders", [decoder])}
    if not parts and '"type": "ByteLevel"' in json.dumps(state["pre_tokenizer"]):
        parts = {"ByteLevel": {}}
    if parts.keys() == {"ByteLevel"}:
        table = byte_of_character()
        return functools.partial(_of_alphabet, table), isinstance(model["vocab"], dict) and table.keys() <= model[
            "vocab"
        ].keys()
    if parts.keys() == {"WordPiece"}:
        return functools.partial(_of_word, parts["WordPiece"]["prefix"], parts["WordPiece"]["cleanup"]), False
    replaced = parts.get("Replace", {"pattern": {"String": "▁"}, "content": " "})
    mark = parts["Metaspace"]["replacement"] if "Metaspace" in parts else replaced["pattern"].get("String")
    if not parts or parts.keys() - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"} or not mark:
        name = " and ".join(parts) or "none"
        raise UserError(
            f"its decoder ({name}) is not supported: use a byte-level, SentencePiece or WordPiece tokenizer"
        )
    falls_back = "ByteFallback" in parts
    known = set(model["vocab"]) if isinstance(model["vocab"], dict) else {entry[0] for entry in model["vocab"]}
    is_whole = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in known for byte in range(256))
    return functools.partial(_of_piece, mark, replaced["content"], falls_back), falls_back and is_whole


def _of_alphabet(table: dict[str, int], token: str) -> bytes:
    return bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()


def _of_piece(mark: str, content: str, falls_back: bool, token: str) -> bytes:
    byte = BYTE.fullmatch(token) if falls_back else None
    return bytes.fromhex(byte[1]) if byte else token.replace(mark, content).encode()


def _of_word(prefix: str, cleanup: bool, token: str) -> bytes:
    continues = token.startswith(prefix) or (cleanup and token in WITHOUT_SPACE)
    return (token.removeprefix(prefix) if continues else f" {token}").encode()


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
    """Whether a text may be cut at each SEAM: only where that follows from known parts."""

    def parts(pre_tokenizer: Any) -> Any:  # trim_offsets changes no id
        return re.sub(r'"trim_offsets": ?(true|false),? ?', "", json.dumps(pre_tokenizer))

    known = [parts(json.loads(kind.__getstate__())) for kind in pre_tokenizer_kinds().values()]
    return (
        (state["normalizer"] or {"type": "NFC"})["type"] == "NFC"  # It joins no character to a space or line break.
        and parts(state["pre_tokenizer"]) in known
        and all(token["special"] for token in state["added_tokens"])
    )
