"""What an embedder must offer, and how a user names one. An embedder turns a text into its key, a vector."""

import functools
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files.untrusted import reporting
from retro_np.progress import one_line
from retro_np.retrieval.batches import checked_texts
from retro_np.retrieval.bert import Bert, load_bert
from retro_np.retrieval.hashing import HASHED, HashingEmbedder
from retro_np.retrieval.index import EF_MARGIN
from retro_np.retrieval.manifest import EMBEDDER_LIMIT
from retro_np.retrieval.sources import without_surrogates
from retro_np.retrieval.tokenizer import decode, encode_batch
from retro_np.retrieval.vocabulary import END_OF_TEXT, PADDING, special_ids

OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # MODULE:OBJECT
EMBED_METHODS = ("embed", "embed_queries", "embed_tokens")
ADVICE = "correct it and run the same command again (docs/database.md, An embedder of one's own)"


class Embedder(Protocol):
    """Any object with these attributes can build and search a database; it needs no base class.

    More attributes are optional: `embed_queries`, like `embed`, for texts that are searched with; `embed_tokens`, which
    may also stand in the place of `embed`: the keys (N, d_key) of rows of tokens (N, t) int64, padded as the database's
    chunks are (`Database.padding`, by default 0), each of which depends on its row only; and `ef_margin`, the number of
    candidates that a graph search for its keys keeps beyond k (an int, by default EF_MARGIN)."""

    @property
    def name(self) -> str:
        """A human-readable name."""

    @property
    def sha256(self) -> str:
        """A hash of everything that determines a key: equal hashes, equal keys."""

    @property
    def d_key(self) -> int:
        """The width of a key."""

    def embed(self, texts: list[str], show_progress: bool = ...) -> np.ndarray:
        """The keys of N texts, (N, d_key) float32."""


class EmbedderError(UserError):
    """A fault of an embedder of one's own. Its text names the embedder and the method or attribute."""


_reporting = functools.partial(reporting, hint=ADVICE, kind=EmbedderError)


class CheckedEmbedder:
    """An embedder of one's own. Its attributes are read once, and each key that it makes is checked.

    own: the object. origin: its name in errors. Has the methods that the object has. Raises EmbedderError, also in
    place of what the object's code raises, for an attribute that is missing or of another type; and for keys that are
    not real numbers of shape (N, d_key), or whose squared distances may not be finite in float32."""

    embed: Callable[..., np.ndarray]

    def __init__(self, own: Any, origin: str):
        self.own, self.origin = own, origin or "the embedder"
        for method in EMBED_METHODS:
            with _reporting(f"{self.origin}: {method} fails"):
                if callable(getattr(own, method, None)):
                    setattr(self, method, functools.partial(self._keys, method))
        if issubclass(type(own), type) or not {"embed", "embed_tokens"} & vars(self).keys():
            fault = f"{shortened(own)} is no object with a method embed or embed_tokens"
            raise EmbedderError(f"{self.origin}: {one_line(fault)}: {ADVICE}")
        self.name, self.sha256 = self._text("name"), self._text("sha256")
        self.d_key, self.ef_margin = self._number("d_key", None), self._number("ef_margin", EF_MARGIN)
        self.origin = origin or f"embedder {one_line(self.name):.60}"

    def _text(self, key: str) -> str:
        with _reporting(f"{self.origin}: {key} fails"):
            value = getattr(self.own, key, None)
            if not isinstance(value, str) or not value or value != without_surrogates(value):
                raise ValueError(f"it must be a text of Unicode characters, not {shortened(value)}")
            return value

    def _number(self, key: str, default: int | None) -> int:
        with _reporting(f"{self.origin}: {key} fails"):
            value: Any = getattr(self.own, key, default)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value < EMBEDDER_LIMIT:
                raise ValueError(f"it must be a whole number from 1 to {EMBEDDER_LIMIT - 1:,}, not {shortened(value)}")
            return int(value)

    def _keys(self, method: str, inputs: Any, show_progress: bool = False) -> np.ndarray:
        """The keys of texts or rows of tokens. The object's method gets a copy of them, and never an empty list."""
        reads_tokens = method == "embed_tokens"
        inputs = np.array(inputs, np.int64) if reads_tokens else checked_texts(inputs)
        if not len(inputs):
            return np.empty((0, self.d_key), np.float32)
        options = {} if reads_tokens else {"show_progress": show_progress}
        with _reporting(f"{self.origin}: {method} fails for N = {len(inputs)}"):
            keys = np.asarray(getattr(self.own, method)(inputs.copy(), **options))
            if keys.shape != (shape := (len(inputs), self.d_key)):
                raise ValueError(f"the keys have the shape {keys.shape}, not (N, d_key) = {shape}")
            with np.errstate(all="ignore"):
                keys = keys.astype(np.float32, "C", "same_kind")
                is_fine = np.isfinite(4 * np.einsum("nd,nd->n", keys, keys))
            if not is_fine.all():
                culprit = shortened(inputs[np.argmin(is_fine)])
                raise ValueError(f"the key of {culprit} is not finite, or too long for float32")
            return keys


def load_embedder(spec: str | Path | None = None) -> Embedder | str:
    """The embedder that a user names: a folder (see `load_bert`), MODULE:OBJECT, or None for all-MiniLM-L6-v2.

    "hashing" is returned as it is: such an embedder belongs to a database, which builds or loads it.

    OBJECT is an embedder, or a class or function that makes one without arguments. MODULE is imported, also from the
    current folder, which runs its code. Raises UserError if there is no such embedder or if it breaks the protocol."""
    if spec == HASHED:
        return HASHED
    if spec is None or not OBJECT.fullmatch(str(spec)) or os.path.exists(spec):
        return load_bert(spec)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _reporting(f"embedder {spec} cannot be imported or made"):
        embedder = pkgutil.resolve_name(str(spec))
        if isinstance(embedder, type) or (callable(embedder) and not hasattr(embedder, "sha256")):
            embedder = embedder()
    return checked_embedder(embedder, f"embedder {spec}")


def checked_embedder(embedder: Any, origin: str = "", tried: bool = True) -> Embedder:
    """An embedder of the package as it is, and any other object as a CheckedEmbedder.

    origin: what errors call it. tried: whether each of its methods must embed two texts or rows, of which one is empty.
    Raises EmbedderError (see `CheckedEmbedder`)."""
    if issubclass(type(embedder), (Bert, HashingEmbedder, CheckedEmbedder)):
        return embedder
    checked = CheckedEmbedder(embedder, origin)
    for method in EMBED_METHODS if tried else ():
        if hasattr(checked, method):
            getattr(checked, method)([[2, 2], [END_OF_TEXT, PADDING]] if method == "embed_tokens" else ["a", ""])
    return checked


def embed_chunks(embedder: Any, tokenizer: Tokenizer, chunks: np.ndarray) -> np.ndarray:
    """The keys of chunks of tokens (N, m), from the tokens if the embedder reads them, otherwise from their text."""
    if hasattr(embedder, "embed_tokens"):
        return embedder.embed_tokens(chunks)
    return embedder.embed([decode(tokenizer, chunk) for chunk in chunks.tolist()], show_progress=False)


def embed_queries(embedder: Any, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The keys of texts to search with, from `embed_queries`, `embed` or `embed_tokens`, whichever there is first."""
    for method in ("embed_queries", "embed"):
        if hasattr(embedder, method):
            return getattr(embedder, method)(texts, show_progress=False)
    rows = encode_batch(tokenizer, checked_texts(texts))
    keys = [embedder.embed_tokens([row or [special_ids(tokenizer).padding]])[0] for row in rows]
    return np.array(keys, np.float32).reshape(len(texts), embedder.d_key)
