"""A model that is already trained, with its tokenizer. Its parameters are read when they are first used."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.nn.decoders import DecoderConfig
from retro_np.pretrained.layouts import AGAIN, UNSUPPORTED, Layout, Weights, params_reader
from retro_np.retrieval import folders
from retro_np.tree import Tree

check_settings = partial(folders.check_settings, hint=UNSUPPORTED)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, eq=False)
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

    @property
    def start(self) -> int | None:
        """The id that an empty prompt stands for: begin-of-text, else one that ends a text. None: it has neither."""
        ids = (self.tokenizer.token_to_id(self.special.get(role, "")) for role in ("bos_token", "eos_token"))
        return next((i for i in (*ids, *sorted(self.stop)) if i is not None), None)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights' file; of several, the SHA-256 of their SHA-256, one after the other."""
        hashes = [sha256_of(path) for path in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def foreign_decoder(
    name: str, files: Iterable[Path], fields: dict[str, Any], weights: Weights, layout: Layout, tokenizer: Tokenizer,
    special: dict[str, str | None], chat_template: Any, stop: list[Any],
) -> Pretrained:  # fmt: skip
    """A model that another library stored, whose parts are checked against each other.

    fields: of the DecoderConfig, without padding_id. stop: ids that end an answer, besides the special eos_token.
    Raises UserError for sizes that no model has, for weights of other sizes, and for a tokenizer with more ids than the
    weights have embeddings."""
    texts = {role: text for role, text in special.items() if role in ROLES and isinstance(text, str)}
    ids = {role: tokenizer.token_to_id(text) for role, text in texts.items()}
    padding = ids.pop("pad_token", None)
    rows, largest = fields["vocabulary_size"], max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    try:
        read = params_reader(weights, DecoderConfig(**fields), layout)
        if largest >= rows:
            fault = f"its tokenizer has a token of id {largest:,}, but the weights have {rows:,} embeddings"
            raise UserError(f"{fault}, so they belong to different models: {AGAIN}")
        config = DecoderConfig(**fields, padding_id=None if padding in ids.values() else padding)
    except UserError as error:
        raise UserError(f"{weights.path}: {str(error).removeprefix(f'{weights.path}: ')}") from error
    if not isinstance(chat_template, str | None):
        raise folders.refusal(weights.path, "chat_template", chat_template, f"it must be a text: {AGAIN}")
    ends = frozenset(i for i in [*stop, ids.get("eos_token")] if type(i) is int and 0 <= i < rows)
    return Pretrained(name, tuple(files), config, tokenizer, read, chat_template, texts, ends)
