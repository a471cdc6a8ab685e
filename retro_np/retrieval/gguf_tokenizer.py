"""A tokenizer from the metadata of a .gguf file, which has no tokenizer.json.

Of byte-level BPE, the metadata hold the tokens, the merges and the name of a pre-tokenizer, whose regular expression is
the one of the models' own tokenizer.json. SentencePiece's BPE has scores in place of merges."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.progress import one_line
from retro_np.retrieval.tokenizer import checked
from retro_np.retrieval.vocabulary import MAX_VOCABULARY_SIZE, pre_tokenizer_kinds

# The pre-tokenizers' names, by the kind that they are of. A file that names none has GPT-2's.
NAMES = {
    "gpt-2": ("gpt-2", "default", "phi-2"),
    "smollm": ("smollm", "starcoder", "refact"),
    "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3"),
    "qwen2": ("qwen2", "deepseek-r1-qwen"),
}
KINDS = {name: kind for kind, names in NAMES.items() for name in names}
WHOLE_WORDS = "llama3"  # the kind that takes a word of the vocabulary without looking at the merges
COMPOSING = "qwen2"  # the kind that composes characters first (NFC)
CONTROL, USER_DEFINED = 3, 4  # types of tokens
MAX_WORK = 1 << 26  # the work of finding merges, in characters; Llama 2's vocabulary takes 1,600,000
HINT = "use another file, or a folder with the model's tokenizer.json"
KEY = "tokenizer.ggml."


def tokenizer_from_gguf(metadata: dict[str, Any], where: str = "the .gguf file") -> Tokenizer:
    """The tokenizer that a .gguf file's metadata describe.

    metadata: names and values, arrays as lists. where: what errors call the file. Raises UserError for metadata that
    are missing or damaged, and, by name, for a tokenizer or pre-tokenizer that is not supported."""
    model, architecture = (one_line(f"{metadata.get(name)}")[:60] for name in (KEY + "model", "general.architecture"))
    if model not in MODELS or architecture.startswith("gemma"):  # Gemma's scores do not give the order of merges.
        fault = f"the tokenizer {model} of {architecture}, which is not supported ({' and '.join(MODELS)} are)"
        raise UserError(f"{where} has {fault}: {HINT}")
    tokens = _list(metadata, "tokens", str, where)
    ids = {token: number for number, token in enumerate(tokens)}
    if not 0 < len(ids) == len(tokens) <= MAX_VOCABULARY_SIZE:
        raise UserError(f"{where}: its tokens must be different, 1 to {MAX_VOCABULARY_SIZE:,} in number: {HINT}")
    types = _list(metadata, "token_type", int, where, len(ids)) if KEY + "token_type" in metadata else []
    with reporting(f"{where} does not hold a tokenizer", HINT):
        tokenizer = MODELS[model](metadata, ids, where)
        added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (CONTROL, USER_DEFINED)]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
        return checked(tokenizer, f"the tokenizer of {where}")


def _byte_level(metadata: dict[str, Any], ids: dict[str, int], where: str) -> Tokenizer:
    name = one_line(f"{metadata.get(KEY + 'pre', 'default')}")[:60]
    if name not in KINDS:
        raise UserError(f"{where} has the pre-tokenizer {name}, which is not known ({', '.join(KINDS)} are): {HINT}")
    kind, merges = KINDS[name], [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str, where)]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=kind == WHOLE_WORDS))
    if kind == COMPOSING:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer_kinds()[kind]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], ids: dict[str, int], where: str) -> Tokenizer:
    if KEY + "merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str, where)]
    else:
        merges = _merges(ids, _list(metadata, "scores", float, where, len(ids)), where)
    unknown, prefixed = metadata.get(KEY + "unknown_token_id", 0), metadata.get(KEY + "add_space_prefix", True)
    if type(unknown) is not int or not 0 <= unknown < len(ids) or type(prefixed) is not bool:
        raise UserError(f"{where}: {KEY}unknown_token_id or add_space_prefix has a wrong value: {HINT}")
    name = list(ids)[unknown]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=name, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefixed else [spaces])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return tokenizer


def _merges(ids: dict[str, int], scores: list[float], where: str) -> list[tuple[str, str]]:
    """The merges that give each token from two others: the best score first, and then the longest left part."""
    if sum(len(token) ** 2 for token in ids) > MAX_WORK:
        raise UserError(f"{where} has tokens that are too long to find their merges: {HINT}")
    merges = []
    for token, score in zip(ids, scores, strict=True):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(score, len(left), (left, right)) for left, right in pairs if left in ids and right in ids]
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [pair for *_, pair in merges]


def _list(metadata: dict[str, Any], name: str, kind: type, where: str, length: int | None = None) -> list[Any]:
    """A list in the metadata, of values of one type. Raises UserError for anything else, and for another length."""
    values = metadata.get(KEY + name)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise UserError(f"{where}: its metadata have no list {KEY}{name} of {kind.__name__}: {HINT}")
    if length not in (None, len(values)):
        raise UserError(f"{where}: {KEY}{name} has {len(values):,} entries, but there are {length:,} tokens: {HINT}")
    return values


MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}
