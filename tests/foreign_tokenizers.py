"""Small tokenizers of the kinds that others train: transformers' own classes with a vocabulary trained here."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b  # 1234 and 12\n\n\nprint(add(1, 2))\n" * 30,
    "naïve café — ½, it's 20 °C; we'll see. 今天天气很好。 🙂 🙂 runs   of    spaces" * 30,
    Path(json.__file__).read_text(),
]
END = AddedToken("<|endoftext|>", special=True, normalized=False)


@functools.cache
def byte_level_parts():
    """(vocabulary, merges) of a byte-level BPE in which <|endoftext|> is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _parts(tokenizer)


@functools.cache
def sentencepiece_parts():
    """(vocabulary, merges) of a SentencePiece-style BPE: <unk>, <s>, </s>, bytes, then tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _parts(tokenizer)


def _parts(tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _gpt2():
    vocabulary, merges = byte_level_parts()
    return GPT2Tokenizer(vocab=vocabulary, merges=merges)


def _qwen2():
    vocabulary, merges = byte_level_parts()
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges)


def _smollm():
    made = _gpt2()
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def _llama():
    vocabulary, merges = sentencepiece_parts()
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def _legacy_llama():
    """As in the tokenizer.json of Llama 2 and TinyLlama: a normaliser writes ▁, and there is no pre-tokenizer."""
    made = _llama()
    prepended = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.backend_tokenizer.normalizer = normalizers.Sequence(prepended)
    made.backend_tokenizer.pre_tokenizer = None
    return made


def _t5():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return T5Tokenizer(vocab=[tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]])


def _bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return BertTokenizer(vocab=json.loads(tokenizer.to_str())["model"]["vocab"], do_lower_case=False)


MAKERS = {
    "gpt2": _gpt2, "smollm": _smollm, "qwen2": _qwen2, "llama": _llama, "legacy llama": _legacy_llama, "t5": _t5,
    "bert": _bert,
}  # fmt: skip
BYTE_LEVEL, SENTENCEPIECE = ("gpt2", "smollm", "qwen2"), ("llama", "legacy llama", "t5")


@functools.cache
def original(kind):
    """transformers' tokenizer of a kind."""
    return MAKERS[kind]()


def ids_by_transformers(kind, text):
    """The ids of plain text, without the special tokens that are added to a model's input."""
    return original(kind)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def json_of(kind):
    """The bytes of the tokenizer.json that transformers saves."""
    return original(kind).backend_tokenizer.to_str().encode()
