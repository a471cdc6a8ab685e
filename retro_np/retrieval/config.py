"""The settings of a build: one frozen dataclass. It loads quickly, because the command line reads it at every start."""

from dataclasses import dataclass

import numpy as np

from retro_np.errors import UserError
from retro_np.renamed import accept_old_names
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.manifest import MAX_CHUNK_SIZE, MAX_STORED_NEIGHBOURS

# The default width of hashed keys: with our own tokenizers, and with those of others, which have longer tokens
D_KEY, D_KEY_OF_OTHERS = 128, 1024
NEAR_DUPLICATE = DedupConfig()
READING = ("include", "exclude", "text_field", "name_field", "split_field")  # the fields about how a corpus is read


@accept_old_names
@dataclass(frozen=True)
class BuildConfig:
    """How to cut and index a corpus. Raises UserError for values that are out of range.

    chunk_size: tokens per chunk (m), 1 to 65,536.
    vocabulary_size: entries of a tokenizer to train, at least 258.
    tokenizer: an existing tokenizer.json, or a folder with one; None trains one on the training documents. The command
        takes the name of a model and a .gguf file as well.
    held_out: share of the documents that are held out, in [0, 1), chosen by a hash of the document's name.
    key_dtype: stored type of keys, "float16" or "float32".
    neighbours: neighbours stored per chunk (k), at least 1.
    extra_candidates: further neighbours stored, at least 0, in place of those from a training sequence's own documents.
    limit_bytes: bytes of text to take from the corpus, approximately, at least 1; None for the whole corpus.
    shard_bytes: bytes of text per shard, approximately, at least 1; memory holds one shard.
    tokenizer_bytes: bytes of text to train a tokenizer on, approximately, at least 1.
    duplicates: how to find training documents that resemble a held-out one, to leave them out; None keeps them all.
    include: glob patterns of the files to read in folders; empty for all.
    exclude: glob patterns of the files to leave out in folders.
    d_key: width of the hashing embedder's keys, at least 1; None: 128, or 1,024 with a tokenizer of others.
    training_neighbours: whether to find neighbours of training chunks. Only training needs them, and they take long.
    held_out_bytes: in place of held_out, a share of the documents' bytes in (0, 1), exact to within one document: half
        for valid and half for test. None holds out by name, and for valid alone.
    text_field: the field with the text in rows of JSONL, parquet and datasets.
    name_field: the field with the name in such rows; None takes `name`, or `id`.
    split_field: the field that says train, valid or test in such rows; None takes `split` if there is one, and "none"
        ignores it."""

    chunk_size: int = 64
    vocabulary_size: int = 4096
    tokenizer: str | None = None
    held_out: float = 0.1
    key_dtype: str = "float32"
    neighbours: int = 10
    extra_candidates: int = 22
    limit_bytes: int | None = None
    shard_bytes: int = 32_000_000
    tokenizer_bytes: int = 16_000_000
    duplicates: DedupConfig | None = NEAR_DUPLICATE
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    d_key: int | None = None
    training_neighbours: bool = True
    held_out_bytes: float | None = None
    text_field: str = "text"
    name_field: str | None = None
    split_field: str | None = None

    def __post_init__(self) -> None:
        from retro_np.retrieval.tokenizer import MIN_VOCABULARY_SIZE

        minima = {"chunk_size": 1, "neighbours": 1, "extra_candidates": 0, "shard_bytes": 1, "tokenizer_bytes": 1}
        minima |= {} if self.d_key is None else {"d_key": 1}
        minima |= {"vocabulary_size": MIN_VOCABULARY_SIZE if self.tokenizer is None else 0}
        minima |= {} if self.limit_bytes is None else {"limit_bytes": 1}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
                raise UserError(f"{name} must be a whole number of at least {minimum}, not {value!r}")
        if not isinstance(self.held_out, int | float) or not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be in [0, 1), not {self.held_out!r}")
        share = self.held_out_bytes
        if share is not None and not (isinstance(share, int | float) and 0 < share < 1):
            raise UserError(f"held_out_bytes must be in (0, 1), or None, not {share!r}")
        if share is not None and self.held_out != BuildConfig.held_out:
            raise UserError("held_out and held_out_bytes exclude each other: give one of them")
        for name, kind in (("text_field", str), ("name_field", str | None), ("split_field", str | None)):
            if not isinstance(value := getattr(self, name), kind) or value == "":
                raise UserError(f"{name} must be the name of a field, not {value!r}")
        if not isinstance(self.duplicates, DedupConfig | None):
            raise UserError(f"duplicates must be a DedupConfig or None, not {self.duplicates!r}")
        if self.chunk_size > MAX_CHUNK_SIZE or self.neighbours + self.extra_candidates > MAX_STORED_NEIGHBOURS:
            maxima = f"at most {MAX_CHUNK_SIZE:,}, and neighbours + extra_candidates at most {MAX_STORED_NEIGHBOURS:,}"
            raise UserError(f"chunk_size must be {maxima}")
        if self.key_dtype not in ("float16", "float32"):
            raise UserError(f"key_dtype must be float16 or float32, not {self.key_dtype}")
