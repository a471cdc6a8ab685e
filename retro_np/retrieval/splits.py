"""Which documents are held out: those that say so, a share of the bytes, or, by default, a share of the names' hashes.

valid is for tuning and test for reporting. Neither of them is trained on, and neither can be retrieved."""

from collections.abc import Callable
from itertools import count

import numpy as np

from retro_np.errors import UserError
from retro_np.files import hash_fraction
from retro_np.retrieval.config import BuildConfig
from retro_np.retrieval.corpus import Corpus, _ignore, held_out, order_of_hashes
from retro_np.retrieval.manifest import SPLITS
from retro_np.retrieval.sources import Document, Entry

SplitOf = Callable[[Document], str]
ANEW = "pass --split-field none, which divides all rows anew, also those for test"
Place = tuple[float, int]  # the hash of a document's name, and its position in the corpus


def split_chooser(corpus: Corpus, config: BuildConfig) -> SplitOf:
    """A function that returns a document's split. It is called with the documents of one pass, in their order.

    Documents that carry a split keep it. For others held_out_bytes decides (see `boundaries`), or, if that is None,
    held_out, for valid alone. Raises UserError for a share where documents carry a split, and for a part that would be
    empty; the function raises it if some documents carry a split and others do not."""
    has_splits, positions = bool(next(corpus.entries(_ignore)).split), count()
    ends: tuple[Place, Place] = (config.held_out, 0), (config.held_out, 0)
    if has_splits:
        _check_parts(corpus, config)
    elif config.held_out_bytes is not None:
        ends = boundaries(corpus, config.held_out_bytes)
    elif all(held_out(name, config.held_out) for name in corpus.names()):
        where = ", ".join(source.location for source in corpus.sources)
        raise UserError(f"every document of the corpus is held out: give more, or --held-out 0 ({where})")

    def split_of(document: Document) -> str:
        _check_alike(document, has_splits)
        if has_splits:
            return document.split
        place = hash_fraction(document.name), next(positions)
        return "valid" if place < ends[0] else "test" if place < ends[1] else "train"

    return split_of


def boundaries(corpus: Corpus, share: float) -> tuple[Place, Place]:
    """Where valid and test end in the order of the names' hashes, which is the same on every machine.

    The end of test is nearest to this share of all bytes, and the end of valid to half of what is held out, so that
    valid, test and their sum are exact to within one document. A document has the bytes of its file, or of its text if
    it is a row. At least one document is valid, and one is for training; if only one is held out, it is valid. Raises
    UserError for a corpus of one document. Memory: 16 bytes per document, and about 40 while the ends are computed."""
    hashes, sizes, order = order_of_hashes(corpus)
    if len(sizes) < 2:
        hint = "cut it into several, or give --held-out 0 in place of --held-out-bytes"
        raise UserError(f"a corpus of one document cannot be split: {hint}")
    ends = np.cumsum(np.asarray(sizes)[order])  # the bytes of the first 1, 2, … documents
    held = 1 + int(np.abs(ends[:-1] - share * ends[-1]).argmin())
    valid = 1 + int(np.abs(ends[: max(1, held - 1)] - ends[held - 1] / 2).argmin())
    first, second = ((hashes[number], number) for number in order[[valid, held]].tolist())
    return first, second


def _check_parts(corpus: Corpus, config: BuildConfig) -> None:
    """Raise UserError if a part that a source or a field stands for has no text, or if a share was asked for."""
    if config.held_out_bytes is not None or config.held_out not in (0, BuildConfig.held_out):
        raise UserError("the documents say which are held out: leave out --held-out and --held-out-bytes")
    given, is_part = {source.split for source in corpus.sources}, config.limit_bytes is not None
    needed = {"train", *given}  # "", the rows' own splits, stands for valid or test.
    missing = needed if is_part else needed - (given - {""})  # `find_corpus` has found text in each source.
    for entry in corpus.entries(_ignore) if missing else ():  # reads on until all parts are found
        _check_alike(entry, has_split=True)
        missing -= {entry.split, "train" if entry.split == "train" else ""} if entry.size else set()
        if not missing:
            return
    for name in sorted(missing, key=["train", "", *SPLITS].index):
        hint = f"add such rows, or {ANEW}" if "" in given else f"give some with --{name}"
        raise UserError(f"no text is in the split {name or 'valid or test'}: {'raise --limit-mb' if is_part else hint}")


def _check_alike(document: Document | Entry, has_split: bool) -> None:
    """Raise UserError unless a document has a split if and only if those before it have."""
    if bool(document.split) != has_split:
        fault = f"has {'no' if has_split else 'a'} split, unlike the documents before it: give every source one"
        raise UserError(f"{document.row or document.name} {fault}, or --exclude it, or {ANEW}")
