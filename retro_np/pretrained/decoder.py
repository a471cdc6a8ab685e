"""A model that is already trained, with its tokenizer. Its parameters are read when they are first used."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.nn.decoders import DecoderConfig
from retro_np.pretrained.layouts import AGAIN, UNSUPPORTED, Layout, Weights, params_reader
from retro_np.progress import one_line
from retro_np.retrieval.folders import OFF, Known, refusal
from retro_np.tree import Tree

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Pretrained:
    """A trained model, as `read_pretrained` returns it.

    name: what it was asked for by. files: of the weights. chat_template: a Jinja template of conversations, or None.
    special: the texts of the tokens bos_token, eos_token, pad_token and unk_token, as far as the model has them, which
    a template may use. stop: the ids that end an answer. read: reads the parameters; see `params`."""

    name: str
    files: tuple[Path, ...]
    config: RetroConfig
    tokenizer: Tokenizer = field(repr=False)
    read: Callable[[], Tree] = field(repr=False)
    chat_template: str | None = field(default=None, repr=False)
    special: dict[str, str] = field(default_factory=dict)
    stop: frozenset[int] = frozenset()

    @cached_property
    def params(self) -> Tree:
        """The parameters, float32. Raises UserError if the files hold numbers that are not finite, or were changed."""
        return self.read()

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights' file; of several, the SHA-256 of their SHA-256, one after the other."""
        hashes = [sha256_of(path) for path in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def check_settings(path: Path, settings: dict[str, Any], known: Known) -> None:
    """Raise UserError for a setting that has a value not in `known`, or, for other settings, that asks for anything."""
    for key, value in settings.items():
        if value not in known.get(key, OFF):
            raise refusal(path, one_line(f"{key:.80}"), value, UNSUPPORTED)


def size(path: Path, settings: dict[str, Any], key: str) -> int:
    """A setting that must be a whole number of at least 1. Raises UserError for any other value."""
    if type(value := settings.get(key)) is not int or value < 1:
        raise refusal(path, key, value, f"it must be a whole number, at least 1: {AGAIN}")
    return value


def foreign_decoder(
    name: str, files: tuple[Path, ...], fields: dict[str, Any], weights: Weights, layout: Layout, tokenizer: Tokenizer,
    special: dict[str, str], chat_template: Any, stop: list[Any],
) -> Pretrained:  # fmt: skip
    """A model that another library stored, whose parts are checked against each other.

    fields: of the DecoderConfig, without padding_id. stop: ids that end an answer, besides the special eos_token.
    Raises UserError for sizes that no model has, for weights of other sizes, and for a tokenizer with more ids than the
    weights have embeddings."""
    roles = {role: tokenizer.token_to_id(special[role]) for role in ROLES if role in special}
    padding = roles.get("pad_token")
    if padding in [roles.get(role) for role in ROLES if role != "pad_token"]:  # It also stands for something else.
        padding = None
    rows, largest = fields["vocabulary_size"], max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    try:
        config = DecoderConfig(**fields)
        read = params_reader(weights, config, layout)
        if largest >= rows:
            fault = f"its tokenizer has a token of id {largest:,}, but the weights have {rows:,} embeddings"
            raise UserError(f"{fault}, so they belong to different models: {AGAIN}")
        config = DecoderConfig(**fields, padding_id=padding)
    except UserError as error:
        raise UserError(str(error) if str(weights.path) in str(error) else f"{weights.path}: {error}") from error
    if chat_template is not None and not isinstance(chat_template, str):
        raise refusal(weights.path, "chat_template", chat_template, f"it must be a text: {AGAIN}")
    ends = frozenset(i for i in [*stop, roles.get("eos_token")] if type(i) is int and 0 <= i < rows)
    return Pretrained(name, files, config, tokenizer, read, chat_template, special, ends)
