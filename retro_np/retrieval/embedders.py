"""What an embedder must offer, and how a user names one. An embedder turns a text into its key, a vector."""

import importlib
import operator
import os
import re
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.progress import one_line
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.index import EF_MARGIN
from retro_np.retrieval.tokenizer import decode, encode_batch

OBJECT = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")  # MODULE:OBJECT


class Embedder(Protocol):
    """Any object with these attributes can build and search a database; it needs no base class.

    More attributes are optional: `embed_tokens` (see TokenEmbedder), which may also stand in the place of `embed`;
    `embed_queries`, like `embed`, for texts that are searched with; and `ef_margin`, the number of candidates that a
    graph search for its keys keeps beyond k (an int, by default EF_MARGIN)."""

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


@runtime_checkable
class TokenEmbedder(Protocol):
    """An embedder that also reads tokens, and is therefore fast: chunks are not decoded to text first."""

    def embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The keys (N, d_key) float32 of rows of tokens (N, t), padded with 0. A key depends on its row only."""


def load_embedder(spec: str | Path | None = None) -> Embedder:
    """The embedder that a user names: a folder (see `load_bert`), MODULE:OBJECT, or None for all-MiniLM-L6-v2.

    OBJECT is an embedder, or a class or function that makes one without arguments. MODULE is imported, also from the
    current folder, which runs its code. Raises UserError if there is no such embedder or if it breaks the protocol."""
    match = OBJECT.fullmatch(str(spec))
    if spec is None or not match or os.path.exists(spec):
        return load_bert(spec)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, name = match.groups()
    step = f"{module} does not import"
    try:
        imported = importlib.import_module(module)
        step = f"{module} has no {name}"
        embedder = operator.attrgetter(name)(imported)
        step = f"{name}() fails"
        if isinstance(embedder, type) or (callable(embedder) and not hasattr(embedder, "sha256")):
            embedder = embedder()
    except (Exception, SystemExit) as error:
        raise _refusal(f"embedder {spec}", f"{step} ({type(error).__name__}: {error})") from error
    return checked_embedder(embedder, f"embedder {spec}")


def checked_embedder(embedder: Any, origin: str = "the embedder", tried: bool = True) -> Embedder:
    """An object that keeps to the protocol. tried: whether two texts are embedded. origin: the object in errors.

    Raises UserError for an attribute that is missing or of another type, and for keys of another shape."""
    methods = [m for m in ("embed", "embed_queries", "embed_tokens") if callable(getattr(embedder, m, None))]
    if isinstance(embedder, type) or not {"embed", "embed_tokens"} & set(methods):
        raise _refusal(origin, f"{embedder!r:.80} is no object with a method embed or embed_tokens")
    for key, default in (("name", None), ("sha256", None), ("d_key", None), ("ef_margin", EF_MARGIN)):
        value, is_text = getattr(embedder, key, default), key in ("name", "sha256")
        kind: Any = str if is_text else int | np.integer
        if not isinstance(value, kind) or isinstance(value, bool) or not (value if is_text else value > 0):
            wanted = "a text" if is_text else "a whole number of at least 1"
            raise _refusal(origin, f"{key} must be {wanted}, not {value!r:.80}")
    for method in methods if tried else ():
        try:
            call, tokens = getattr(embedder, method), np.full((2, 4), 2)
            keys = call(tokens) if method == "embed_tokens" else call(["a", "b"], show_progress=False)
            shape = np.asarray(keys, np.float32).shape
        except Exception as error:
            raise _refusal(origin, f"{method} fails for two texts ({type(error).__name__}: {error})") from error
        if shape != (2, embedder.d_key):
            raise _refusal(origin, f"{method} must return keys of shape (N, d_key), not {shape} for two texts")
    return embedder


def _refusal(origin: str, fault: str) -> UserError:
    return UserError(f"{origin}: {one_line(fault):.300}; see 'An embedder of one's own' in docs/database.md")


def ef_margin_of(embedder: Embedder) -> int:
    """The embedder's own `ef_margin`, or the default."""
    return int(getattr(embedder, "ef_margin", EF_MARGIN))


def embed_chunks(embedder: Embedder, tokenizer: Tokenizer, chunks: np.ndarray) -> np.ndarray:
    """The keys of chunks of tokens (N, m), from the tokens if the embedder reads them, otherwise from their text."""
    if isinstance(embedder, TokenEmbedder):
        return embedder.embed_tokens(chunks)
    return embedder.embed([decode(tokenizer, chunk) for chunk in chunks.tolist()], show_progress=False)


def embed_queries(embedder: Any, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The keys of texts to search with, from `embed_queries`, `embed` or `embed_tokens`, whichever there is first."""
    for method in ("embed_queries", "embed"):
        if hasattr(embedder, method):
            return getattr(embedder, method)(texts, show_progress=False)
    keys = [embedder.embed_tokens(np.array([row], np.int64))[0] for row in encode_batch(tokenizer, texts)]
    return np.array(keys, np.float32).reshape(len(texts), embedder.d_key)
