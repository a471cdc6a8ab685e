"""A synthetic corpus of facts: invented names, each with a code that nothing but a document about the name tells.

A document is two chunks of CHUNK tokens, one token a byte: the first names, the second holds the code. WORDINGS say the
same in different ways and put the code in different places, so two documents of one fact share name and code and
little else. Nothing in a name hints at its code: whoever has not read a document about it can only guess.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_np.files import write_atomically
from retro_np.retrieval.tokenizer import encode_batch

CHUNK = 16
WORDINGS = (  # the chunk that names, and what stands before and behind the code in the next
    ("about {}", " it is ", "."),
    ("{} says:", " ", ", of old"),
    ("{}, code", "d as ", "."),
    ("enter {}", " with ", "."),
)
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
NAME_SYLLABLES = 5  # so that a chunk that names has CHUNK bytes; and fewer would have names too like each other
DIGITS = 5  # of a code, no two alike
CHANCE = 1 / math.perm(10, DIGITS)


@dataclass(frozen=True)
class Fact:
    """A name, its code, and the WORDINGS of its two documents: the one that tells it, and the one that asks for it."""

    name: str
    code: str
    told: int
    asked: int


def invent(count: int, seed: int) -> list[Fact]:
    """So many facts about different names."""
    rng = np.random.default_rng(seed)
    names: dict[str, None] = {}  # a set that keeps its order
    while len(names) < count:
        names["".join(rng.choice(SYLLABLES, NAME_SYLLABLES))] = None
    wordings = [rng.permutation(len(WORDINGS))[:2].tolist() for _ in names]
    return [Fact(name, invent_code(rng), *pair) for name, pair in zip(names, wordings, strict=True)]


def invent_code(rng: np.random.Generator) -> str:
    """DIGITS different digits."""
    return "".join(map(str, rng.permutation(10)[:DIGITS]))


def document(fact: Fact, wording: int) -> str:
    """The text of a fact in one of the WORDINGS."""
    naming, before, behind = WORDINGS[wording]
    return naming.format(fact.name) + before + fact.code + behind


def write_facts(path: Path, facts: list[Fact], ways: tuple[str, ...]) -> Path:
    """A .jsonl corpus: each fact's document of each way ("told", "asked"), named by the fact's name and the way.

    All documents of one way come before those of the next: two of one fact stand too far apart to be in one training
    sequence, where the one could be neither retrieved for the other nor kept from its sight.
    """
    records = ({"name": f"{f.name} {way}", "text": document(f, getattr(f, way))} for way in ways for f in facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return path


def questions(tokenizer, facts: list[Fact]) -> tuple[np.ndarray, np.ndarray]:
    """The documents that ask, with the answer: tokens (N, 2 · CHUNK), padded, and the places of the code (N, DIGITS).

    tokenizer: one without merges. What is asked for begins behind the first chunk: that is all that retrieval sees.
    """
    tokens = np.zeros((len(facts), 2 * CHUNK), np.int64)
    for row, text in zip(tokens, encode_batch(tokenizer, [document(f, f.asked) for f in facts]), strict=True):
        row[: len(text)] = text
    first = np.array([CHUNK + len(WORDINGS[f.asked][1]) for f in facts])
    return tokens, first[:, None] + np.arange(DIGITS)
