"""A synthetic corpus of facts: invented names, each with a code that only a document about the name contains.

A document is two chunks of CHUNK tokens, one token per byte: the first with the name, the second with the code.
WORDINGS say the same in different ways, with the code at different positions, so that two documents about one fact
share little else. A name says nothing about its code: without a document, a model can only guess."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from retro_np.retrieval.documents import write_records
from retro_np.retrieval.tokenizer import encode_batch

CHUNK = 16
WORDINGS = (  # the chunk with the name, and the text before and after the code in the next chunk
    ("about {}", " it is ", "."), ("{} says:", " ", ", of old"),
    ("{}, code", "d as ", "."), ("enter {}", " with ", "."),
)  # fmt: skip
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
NAME_SYLLABLES = 5  # The first chunk then has CHUNK bytes. Shorter names would be too similar.
DIGITS = 5  # digits of a code, all different
CHANCE = 1 / math.perm(10, DIGITS)


@dataclass(frozen=True)
class Fact:
    """A name, its code, and the indices in WORDINGS of its two documents: one tells the code, the other asks for it."""

    name: str
    code: str
    told: int
    asked: int


def invent(count: int, seed: int) -> list[Fact]:
    """Invent `count` facts with different names."""
    rng = np.random.default_rng(seed)
    names: dict[str, None] = {}  # used as an ordered set
    while len(names) < count:
        names["".join(rng.choice(SYLLABLES, NAME_SYLLABLES))] = None
    wordings = [rng.permutation(len(WORDINGS))[:2].tolist() for _ in names]
    return [Fact(name, invent_code(rng), *pair) for name, pair in zip(names, wordings, strict=True)]


def invent_code(rng: np.random.Generator) -> str:
    """A random code of DIGITS different digits."""
    return "".join(map(str, rng.permutation(10)[:DIGITS]))


def document(fact: Fact, wording: int) -> str:
    """The text of a fact. wording: an index in WORDINGS."""
    naming, before, after = WORDINGS[wording]
    return naming.format(fact.name) + before + fact.code + after


def write_facts(path: Path, facts: list[Fact], roles: tuple[str, ...]) -> Path:
    """Write a JSON Lines corpus with each fact's document for each of `roles` ("told", "asked"). Returns its path.

    A document's name is the fact's name and the role. All documents of one role come before those of the next, so that
    no training sequence contains both documents about a fact, where the first could be read without retrieval."""
    records = ({"name": f"{f.name} {role}", "text": document(f, getattr(f, role))} for role in roles for f in facts)
    write_records(path, records)
    return path


def questions(tokenizer: Tokenizer, facts: list[Fact]) -> tuple[np.ndarray, np.ndarray]:
    """The documents that ask, with their answers: padded tokens (N, 2 · CHUNK), and the codes' positions (N, DIGITS).

    tokenizer: one without merges, so that a token is a byte."""
    tokens = np.zeros((len(facts), 2 * CHUNK), np.int64)
    for row, text in zip(tokens, encode_batch(tokenizer, [document(f, f.asked) for f in facts]), strict=True):
        row[: len(text)] = text
    code_start = np.array([CHUNK + len(WORDINGS[f.asked][1]) for f in facts])
    return tokens, code_start[:, None] + np.arange(DIGITS)
