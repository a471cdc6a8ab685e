"""A model of a database in plain lists. `test_database_model.py` compares a real database with it."""

import hashlib
import json
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from support import CountingEmbedder, all_bytes

from retro_np.errors import UserError
from retro_np.retrieval.build import HASHED, BuildConfig, build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.tokenizer import decode

D_KEY = 16
NEVER = 10**9
WORD = re.compile(rb"[a-z0-9_\x80-\xff]+|[!-/:-@\[-^`{|}~]")


@dataclass
class Document:
    """A document of the model. born: the edit that added it. removed: the edit that removed it."""

    name: str
    text: str
    source: str
    split: str
    chunks: list = field(default_factory=list)
    tokens: int = 0  # tokens with end-of-text, without padding
    keys: np.ndarray | None = None  # (chunks, D_KEY) float32, rounded to the stored type
    born: int = 0
    removed: int = NEVER

    @property
    def gone(self):
        return self.removed < NEVER


def distances_of(query, keys):
    """Squared distances of float32 keys (N, 16) from a query, in float32: the squares are summed pairwise."""
    parts = (keys - query) ** 2
    while parts.shape[1] > 1:
        half = parts.shape[1] // 2
        parts = parts[:, :half] + parts[:, half:]
    return parts[:, 0]


def grams(text):
    """The set of all runs of 13 consecutive lower-case words, or of the one run of all words if there are fewer."""
    words = WORD.findall(text.encode().lower())
    return {tuple(words[i : i + 13]) for i in range(max(1, len(words) - 12))} if words else set()


def similarity(a, b):
    a, b = grams(a), grams(b)
    return len(a & b) / len(a | b) if a and b else 0.0


class Model:
    """What a database should hold. left_out: (name, text, names of the held-out documents that it resembles)."""

    def __init__(self, config, deduplicated):
        self.config, self.deduplicated = config, deduplicated
        self.documents, self.left_out, self.edits = [], [], 0
        self.embedder = self.tokenizer = None
        self.splits = ["train", "valid"]

    def split_of(self, name):
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        return "valid" if fraction < self.config.held_out else "train"

    def like_held_out(self, text, held_out, threshold=0.8):
        """The names of the held-out documents in `held_out` that a text resembles too closely."""
        alike = [(d.name, similarity(text, d.text)) for d in held_out] if self.deduplicated else []
        return [name for name, share in alike if share >= threshold]

    def filled(self, documents):
        """Set the chunks and keys of documents."""
        m = self.config.chunk_size
        for document in documents:
            ids = [*self.tokenizer.encode(document.text).ids, 1]
            document.tokens = len(ids)
            ids += [0] * (-len(ids) % m)
            document.chunks = [ids[i : i + m] for i in range(0, len(ids), m)]
            known = {}
            for chunk in map(tuple, document.chunks):
                if chunk not in known:
                    known[chunk] = self.key_of(chunk)
            document.keys = np.array([known[tuple(chunk)] for chunk in document.chunks], np.float32)
        return documents

    def key_of(self, chunk):
        """The key of one chunk, from its tokens if the embedder reads tokens, otherwise from its text."""
        if hasattr(self.embedder, "embed_tokens"):
            key = self.embedder.embed_tokens(np.array([chunk]))
        else:
            key = self.embedder.embed([decode(self.tokenizer, chunk)])
        return key.astype(self.config.key_dtype).astype(np.float32)[0]

    def of_split(self, split):
        return [(number, d) for number, d in enumerate(self.documents) if d.split == split]

    def rows(self, split):
        """(document number, document, chunk position in the document) of each chunk of a split."""
        return [(number, d, position) for number, d in self.of_split(split) for position in range(len(d.chunks))]

    def nearest(self, query, k, visible):
        """Ids and distances of the k nearest chunks of the visible training documents."""
        rows = self.rows("train")
        ids = np.array([i for i, (number, d, _) in enumerate(rows) if visible(number, d)], np.int64)
        if not len(ids):
            return np.full(k, -1), np.full(k, np.inf, np.float32)
        keys = np.concatenate([d.keys for number, d in self.of_split("train") if visible(number, d)])
        distances = distances_of(query, keys)
        order = np.lexsort((ids, distances))[:k]
        missing = k - len(order)
        distances = np.pad(distances[order], (0, missing), constant_values=np.inf)
        return np.pad(ids[order], (0, missing), constant_values=-1), distances


# Strategies


def texts(m):
    """Odd texts, and texts that end at or near a chunk boundary (without merges, a byte is a token)."""
    edges = st.sampled_from([0, 1, m - 2, m - 1, m, m + 1, 2 * m - 1, 2 * m])
    odd = ["", "a", "\0", "\0" * 40, "\ud800 lone \udfff", "line\n" * 60, "x" * 300, "é\u2028\r\n\x85", "\ufeffb🙂"]
    edges = edges.map(lambda n: "q" * max(0, n))
    return edges | st.sampled_from(odd) | st.sampled_from([*ALIKE, "return value " * 20]) | st.text(max_size=40)


LONG = " ".join(f"word{i}" for i in range(40))
ALIKE = [LONG, LONG.upper(), LONG + " more"]
names = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h", "3", "0", "déjà vu", "x/y.py"])


@st.composite
def plans(draw):
    """A configuration, an embedder, the documents of a build, and edits."""
    m = draw(st.sampled_from([1, 2, 5, 8]))
    pairs = st.tuples(names, texts(m))
    first = draw(st.lists(pairs, min_size=1, max_size=8))
    if draw(st.integers(0, 3)) == 0:
        first.append(("equal", "ab\n" * (300 * m)))  # many equal lines
    share = draw(st.sampled_from([0.0, 0.3]))
    if share:  # a held-out document and one that resembles it, before the others
        first = [("held 3", LONG), ("like", draw(st.sampled_from(ALIKE))), *first]
    elif draw(st.booleans()):  # each document carries its split
        first = [("like", draw(st.sampled_from(ALIKE))), ("other", "of train"), ("held", "for valid"), *first]
        splits = st.sampled_from(["train", "valid", "test"])
        first = [
            (*pair, s)
            for pair, s in zip(first, ["train", "train", "valid", *map(draw, [splits] * (len(first) - 3))], strict=True)
        ]
    config = BuildConfig(
        chunk_size=m,
        vocabulary_size=draw(st.sampled_from([258, 300])),
        held_out=share,
        key_dtype=draw(st.sampled_from(["float32", "float16"])),
        neighbours=draw(st.integers(1, 3)),
        extra_candidates=draw(st.integers(0, 4)),
        shard_bytes=draw(st.sampled_from([1, 150, 600, 10**6])),
        duplicates=draw(st.sampled_from([None, DedupConfig()])),
        d_key=D_KEY,
    )
    embedder = draw(st.sampled_from([HASHED, "counting"]))
    add = st.tuples(st.just("add"), st.lists(pairs, min_size=1, max_size=4))
    remove = st.tuples(st.just("remove"), st.lists(st.integers(0, 9) | names, min_size=1, max_size=3))
    edits = draw(st.lists(add | remove | st.just(("compact", None)) | st.just(("again", None)), max_size=5))
    return config, embedder, first, edits


def written(path, pairs):
    """A .jsonl file of documents, with the field `split` if there is one."""
    rows = (dict(zip(("name", "text", "split"), pair, strict=False)) for pair in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def clean(text):
    """The text as it can be stored: UTF-8 has no lone surrogates."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# Operations


def build(model, path, pairs, embedder):
    """Build the model and the database. Returns the database, or None if the build must be refused."""
    corpus = written(path.parent / "first.jsonl", pairs)
    documents = [
        Document(name, clean(text), "first.jsonl", *split or [model.split_of(name)]) for name, text, *split in pairs
    ]
    by_split = {split: [d for d in documents if d.split == split] for split in ("train", "valid", "test")}
    held_out = by_split["valid"] + by_split["test"]
    model.splits = [split for split in by_split if by_split[split] or split == "valid"]
    like = {id(d): model.like_held_out(d.text, held_out) if d.split == "train" else [] for d in documents}
    like |= {id(d): model.like_held_out(d.text, by_split["test"], threshold=1) for d in by_split["valid"]}
    refused = None
    if not any(text for _, text, *_ in pairs):
        refused = "holds no text"
    elif len(held_out) == len(documents):
        refused = "every document of the corpus is held out"
    elif all(like[id(d)] for d in by_split["train"]):
        refused = "every training document resembles a held-out one"
    elif by_split["valid"] and all(like[id(d)] for d in by_split["valid"]):
        refused = "every document of valid is in test as well"
    embedder = CountingEmbedder() if embedder == "counting" else HASHED
    if refused:
        with pytest.raises(UserError, match=refused):
            build_database(corpus, path, model.config, embedder)
        return None
    database = build_database(corpus, path, model.config, embedder)
    model.tokenizer, model.embedder = database.tokenizer, database.embedder
    model.left_out = [(d.name, d.text, like[id(d)]) for d in by_split["train"] + by_split["valid"] if like[id(d)]]
    model.documents = model.filled([d for d in documents if not like[id(d)]])
    return database


def add(model, path, pairs):
    """Append the new documents. One that was left out stays out while the document that it resembles exists."""
    corpus = written(path.parent / f"more{len(list(path.parent.iterdir()))}.jsonl", pairs)
    options = {"embedder": None if path.joinpath("hashing.npy").exists() else model.embedder}
    if not any(text for _, text in pairs):
        with pytest.raises(UserError, match="holds no text"):
            add_documents(path, corpus, **options)
        return
    known = {(d.name, d.text) for d in model.documents if not d.gone}
    freed = {d.name for d in model.documents if d.split != "train" and d.gone}
    # If a text resembles several held-out documents, the file names one: the text can be added once that is removed.
    listed = [json.loads(line) for line in (path / "duplicates.jsonl").read_text().splitlines()]
    known |= {(n, t) for (n, t, _), r in zip(model.left_out, listed, strict=True) if r["held_out"] not in freed}
    new = [Document(n, clean(t), corpus.name, "train") for n, t in pairs if (n, clean(t)) not in known]
    hashes = all_bytes(path)
    add_documents(path, corpus, **options)
    if not new:
        assert all_bytes(path) == hashes
        return
    model.edits += 1
    held_out = [d for d in model.documents if d.split != "train" and not d.gone]
    for document in new:
        document.born = model.edits
        like = model.like_held_out(document.text, held_out)
        if like:
            model.left_out.append((document.name, document.text, like))
        else:
            model.documents += model.filled([document])


def remove(model, path, requested):
    """Remove documents by number or by name. A name, which may be digits, removes every document that has it."""
    numbers, known = set(), set()
    for number, document in enumerate(model.documents):
        matches = {w for w in requested if w in (number, document.name)}
        known |= matches
        numbers |= {number} if matches and not document.gone else set()
    hashes = all_bytes(path)
    if set(requested) - known:
        with pytest.raises(UserError, match="has no document"):
            remove_documents(path, requested)
        assert all_bytes(path) == hashes
        return
    remove_documents(path, requested)
    if not numbers:
        assert all_bytes(path) == hashes
        return
    model.edits += 1
    for number in numbers:
        model.documents[number].removed = model.edits


def compacted(model, path):
    """Forget the removed documents, and find all neighbours again."""
    generation = Database.open(path).manifest["generation"]
    gone = {d.name for d in model.documents if d.gone}
    listed = [json.loads(line) for line in (path / "duplicates.jsonl").read_text().splitlines()]
    compact(path)
    if gone:
        pairs = zip(model.left_out, listed, strict=True)
        model.left_out = [o for o, r in pairs if not gone & {r["name"], r["held_out"]}]
    model.edits += Database.open(path).manifest["generation"] - generation
    model.documents = [d for d in model.documents if not d.gone]
    for document in model.documents:
        document.born = model.edits
