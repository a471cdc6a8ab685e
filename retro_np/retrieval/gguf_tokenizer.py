"""A tokenizer from the metadata of a .gguf file, which has no tokenizer.json.

Of byte-level BPE, the metadata hold the tokens, the merges and the name of a pre-tokenizer, whose regular expression is
the one of the models' own tokenizer.json. SentencePiece's BPE has scores in place of merges."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from retro_np.files.untrusted import reporting
from retro_np.progress import one_line
from retro_np.retrieval.tokenizer import checked, with_end
from retro_np.retrieval.vocabulary import MAX_VOCABULARY_SIZE, pre_tokenizer_kinds

# The pre-tokenizers' names, by the kind that they are of. A file that names none has GPT-2's.
PRE_TOKENIZER_NAMES: dict[str, tuple[str, ...]] = {"gpt-2": ("gpt-2", "default", "phi-2")}
PRE_TOKENIZER_NAMES |= {"smollm": ("smollm", "starcoder", "refact"), "qwen2": ("qwen2", "deepseek-r1-qwen")}
PRE_TOKENIZER_NAMES |= {"llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3")}
PRE_TOKENIZERS = {name: kind for kind, names in PRE_TOKENIZER_NAMES.items() for name in names}
WHOLE_WORDS = "llama3"  # the kind that takes a word of the vocabulary without looking at the merges
COMPOSING = "qwen2"  # the kind that composes characters first (NFC)
CONTROL, USER_DEFINED = 3, 4  # types of tokens
USUAL_IDS = {"bos": 1, "eos": 2}  # of begin- and end-of-text in SentencePiece
MAX_WORK = 1 << 26  # the work of finding merges, in characters; Llama 2's vocabulary takes 1,600,000
OTHER_FILE = "use another file, or a folder with the model's tokenizer.json"
GGML = "tokenizer.ggml."  # what the names of the metadata about a tokenizer begin with


def tokenizer_from_gguf(metadata: dict[str, Any], where: str = "the .gguf file") -> Tokenizer:
    """The tokenizer that a .gguf file's metadata describe.

    metadata: names and values, arrays as lists. where: what errors call the file. Raises UserError for metadata that
    are missing or damaged, and, by name, for a tokenizer or pre-tokenizer that is not supported."""
    fields = {name.removeprefix(GGML): value for name, value in metadata.items() if name.startswith(GGML)}
    with reporting(f"{where} does not hold a tokenizer that is supported", OTHER_FILE):
        model, architecture = _shown(fields.get("model")), _shown(metadata.get("general.architecture"))
        if model not in BUILDERS or architecture.startswith("gemma"):  # Gemma's scores do not give the order of merges.
            known = " and ".join(BUILDERS)
            raise ValueError(f"it has the tokenizer {model} of {architecture}, which is not supported ({known} are)")
        tokens = _list(fields, "tokens", str)
        ids = {token: number for number, token in enumerate(tokens)}
        if not 0 < len(ids) == len(tokens) <= MAX_VOCABULARY_SIZE:
            raise ValueError(f"its tokens must be different, 1 to {MAX_VOCABULARY_SIZE:,} in number")
        types = _list(fields, "token_type", int, len(ids)) if "token_type" in fields else []
        tokenizer = BUILDERS[model](fields, ids)
        added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (CONTROL, USER_DEFINED)]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
        if marks := _marks(fields, ids):
            named = [{"id": role, "ids": [ids[token]], "tokens": [token]} for role, token in marks.items()]
            around = [role for role in ("bos", "$A", "eos") if role in ("$A", *marks)]
            tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
        number = fields.get("eos_token_id")
        end = tokens[number] if type(number) is int and 0 <= number < len(tokens) else None
        return with_end(checked(tokenizer, f"the tokenizer of {where}"), end)


def _byte_level(fields: dict[str, Any], ids: dict[str, int]) -> Tokenizer:
    name, merges = _shown(fields.get("pre", "default")), _pairs(fields)
    if (kind := PRE_TOKENIZERS.get(name)) is None:
        raise ValueError(f"it has the pre-tokenizer {name}, which is not known ({', '.join(PRE_TOKENIZERS)} are)")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=kind == WHOLE_WORDS))
    if kind == COMPOSING:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer_kinds()[kind]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], ids: dict[str, int]) -> Tokenizer:
    merges = _pairs(fields) if "merges" in fields else _merges(fields, ids)
    unknown, prefixed = fields.get("unknown_token_id", 0), fields.get("add_space_prefix", True)
    if type(unknown) is not int or not 0 <= unknown < len(ids) or type(prefixed) is not bool:
        raise ValueError(f"{GGML}unknown_token_id or add_space_prefix has a wrong value")
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=list(ids)[unknown], fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefixed else [spaces])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return tokenizer


def _marks(fields: dict[str, Any], ids: dict[str, int]) -> dict[str, str]:
    """The tokens that a model's prompt has around its text, by role. What the metadata leave out is as in llama.cpp."""
    marks, tokens, usual = {}, list(ids), USUAL_IDS if fields["model"] == "llama" else {}
    is_llama_3 = PRE_TOKENIZERS.get(_shown(fields.get("pre"))) == WHOLE_WORDS and "bos_token_id" in fields
    for role, usually in {"bos": bool(usual) or is_llama_3, "eos": False}.items():
        adds, number = fields.get(f"add_{role}_token", usually), fields.get(f"{role}_token_id", usual.get(role, -1))
        if type(adds) is not bool or (adds and (type(number) is not int or not 0 <= number < len(ids))):
            raise ValueError(f"{GGML}{role}_token_id or add_{role}_token has a wrong value")
        if adds:
            marks[role] = tokens[number]
    return marks


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _pairs(fields: dict[str, Any]) -> list[Any]:
    """The merges that the metadata list."""
    return [tuple(merge.split(" ")) for merge in _list(fields, "merges", str)]


def _merges(fields: dict[str, Any], ids: dict[str, int]) -> list[Any]:
    """The merges that give each token from two others: the best score first, then the longest left and right part."""
    if sum(len(token) ** 2 for token in ids) > MAX_WORK:
        raise ValueError("it has tokens that are too long to find their merges")
    merges = []
    for token, score in zip(ids, _list(fields, "scores", float, len(ids)), strict=True):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(score, (left, right)) for left, right in pairs if left in ids and right in ids]
    merges.sort(key=lambda merge: (merge[0], *map(len, merge[1])), reverse=True)
    return [pair for _, pair in merges]


def _list(fields: dict[str, Any], name: str, kind: type, length: int | None = None) -> list[Any]:
    """A list in the metadata, of values of one type. Raises ValueError for anything else, and for another length."""
    values = fields.get(name)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ValueError(f"its metadata have no list {GGML}{name} of {kind.__name__}")
    if length not in (None, len(values)):
        raise ValueError(f"{GGML}{name} has {len(values):,} entries, not {length:,}")
    return values


def _shown(name: Any) -> str:
    return f"{one_line(str(name)):.60}"
