"""The model that a database is held against: plain lists, as `test_database_model.py` says."""

import hashlib
import json
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import CountingEmbedder, all_bytes
from hypothesis import strategies as st

from retro_np.errors import UserError
from retro_np.retrieval.build import HASHED, BuildConfig, build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.neighbours import sequence_neighbours
from retro_np.retrieval.tokenizer import decode
from retro_np.retrieval.verify import verify_database
from retro_np.training.batches import sequence_rows, training_batch

D_KEY = 16
NEVER = 10**9
WORD = re.compile(rb"[a-z0-9_\x80-\xff]+|[!-/:-@\[-^`{|}~]")


@dataclass
class Document:
    """A document of the model. born, removed: the edit that it came with, and the one that took it out."""

    name: str
    text: str
    source: str
    split: str
    chunks: list = field(default_factory=list)
    tokens: int = 0  # with the end-of-text, without padding
    keys: np.ndarray | None = None  # (chunks, D_KEY) float32, as far as the stored type holds them
    born: int = 0
    removed: int = NEVER

    @property
    def gone(self):
        return self.removed < NEVER


def distances_of(query, keys):
    """Squared distances of float32 keys (N, 16) from a query, in float32: squares, added up in halves."""
    parts = (keys - query) ** 2
    while parts.shape[1] > 1:
        half = parts.shape[1] // 2
        parts = parts[:, :half] + parts[:, half:]
    return parts[:, 0]


def grams(text):
    """The set of 13 words in a row, of bytes in lower case; of all words where there are fewer."""
    words = WORD.findall(text.encode().lower())
    return {tuple(words[i : i + 13]) for i in range(max(1, len(words) - 12))} if words else set()


def similarity(a, b):
    a, b = grams(a), grams(b)
    return len(a & b) / len(a | b) if a and b else 0.0


class Model:
    """What a database should hold. documents are in order of number; left_out: (name, text, names of held-out ones)."""

    def __init__(self, config, deduplicated):
        self.config, self.deduplicated = config, deduplicated
        self.documents, self.left_out, self.edits = [], [], 0
        self.embedder = self.tokenizer = None

    def split_of(self, name):
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        return "valid" if place < self.config.held_out else "train"

    def like_held_out(self, text, held):
        """The names of those among the held-out documents that a text is too like, those that it may be too like."""
        alike = [(d.name, similarity(text, d.text)) for d in held] if self.deduplicated else []
        return [name for name, share in alike if share >= 0.8]

    def filled(self, documents):
        """Add chunks and keys to documents."""
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
        """The key of one chunk, of its text, or of its tokens where the embedder reads tokens."""
        if hasattr(self.embedder, "embed_tokens"):
            made = self.embedder.embed_tokens(np.array([chunk]))
        else:
            made = self.embedder.embed([decode(self.tokenizer, chunk)])
        return made.astype(self.config.key_dtype).astype(np.float32)[0]

    def of_split(self, split):
        return [(number, d) for number, d in enumerate(self.documents) if d.split == split]

    def rows(self, split):
        """(document number, document, place in it) of each chunk of a split."""
        return [(number, d, place) for number, d in self.of_split(split) for place in range(len(d.chunks))]

    def nearest(self, query, k, visible):
        """Ids and distances of the k nearest chunks of the training documents that are visible."""
        rows = self.rows("train")
        ids = np.array([i for i, (number, d, _) in enumerate(rows) if visible(number, d)], np.int64)
        if not len(ids):
            return np.full(k, -1), np.full(k, np.inf, np.float32)
        keys = np.concatenate([d.keys for number, d in self.of_split("train") if visible(number, d)])
        far = distances_of(query, keys)
        order = np.lexsort((ids, far))[:k]
        short = k - len(order)
        far = np.pad(far[order], (0, short), constant_values=np.inf)
        return np.pad(ids[order], (0, short), constant_values=-1), far


# What documents are drawn from


def texts(m):
    """Texts that are odd, and texts that end where a chunk does: without merges a byte is a token."""
    edges = st.sampled_from([0, 1, m - 2, m - 1, m, m + 1, 2 * m - 1, 2 * m])
    odd = ["", "a", "\0", "\0" * 40, "\ud800 lone \udfff", "line\n" * 60, "x" * 300, "é\u2028\r\n\x85", "\ufeffb🙂"]
    edges = edges.map(lambda n: "q" * max(0, n))
    return edges | st.sampled_from(odd) | st.sampled_from([*ALIKE, "return value " * 20]) | st.text(max_size=40)


LONG = " ".join(f"word{i}" for i in range(40))
ALIKE = [LONG, LONG.upper(), LONG + " more"]
names = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h", "3", "0", "déjà vu", "x/y.py"])


@st.composite
def plans(draw):
    """A configuration, the documents of a build, and edits."""
    m = draw(st.sampled_from([1, 2, 5, 8]))
    pairs = st.tuples(names, texts(m))
    first = draw(st.lists(pairs, min_size=1, max_size=8))
    if draw(st.integers(0, 3)) == 0:
        first.append(("equal", "ab\n" * (300 * m)))  # many equal lines
    share = draw(st.sampled_from([0.0, 0.3]))
    if share:  # a held-out document and one like it, in front so that others come after it
        first = [("held 3", LONG), ("like", draw(st.sampled_from(ALIKE))), *first]
    config = BuildConfig(
        chunk_size=m,
        vocabulary_size=draw(st.sampled_from([258, 300])),
        held_out=share,
        key_dtype=draw(st.sampled_from(["float32", "float16"])),
        neighbours=draw(st.integers(1, 3)),
        spares=draw(st.integers(0, 4)),
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
    """A .jsonl file of documents."""
    path.write_text("".join(json.dumps({"name": name, "text": text}) + "\n" for name, text in pairs))
    return path


def clean(text):
    """What can be stored of a text: UTF-8 has no lone surrogates."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# What the model does


def build(model, path, pairs, embedder):
    """Build model and database. Returns the database, or None where it is refused, as it should be."""
    corpus = written(path.parent / "first.jsonl", pairs)
    documents = [Document(name, clean(text), "first.jsonl", model.split_of(name)) for name, text in pairs]
    held = [d for d in documents if d.split == "valid"]
    like = {id(d): model.like_held_out(d.text, held) if d.split == "train" else [] for d in documents}
    refused = None
    if not any(text for _, text in pairs):
        refused = "holds no text"
    elif len(held) == len(documents):
        refused = "every document of the corpus is held out"
    elif all(like[id(d)] for d in documents if d.split == "train"):
        refused = "every training document is too like"
    given = CountingEmbedder() if embedder == "counting" else HASHED
    if refused:
        with pytest.raises(UserError, match=refused):
            build_database(corpus, path, model.config, given)
        return None
    database = build_database(corpus, path, model.config, given)
    model.tokenizer, model.embedder = database.tokenizer, database.embedder
    model.left_out = [(d.name, d.text, like[id(d)]) for d in documents if like[id(d)]]
    model.documents = model.filled([d for d in documents if not like[id(d)]])
    return database


def add(model, path, pairs):
    """Documents that are not there yet, and were not left out for what is there still, become the last ones."""
    corpus = written(path.parent / f"more{len(list(path.parent.iterdir()))}.jsonl", pairs)
    options = {"embedder": None if path.joinpath("hashing.npy").exists() else model.embedder}
    if not any(text for _, text in pairs):
        with pytest.raises(UserError, match="holds no text"):
            add_documents(path, corpus, **options)
        return
    there = {(d.name, d.text) for d in model.documents if not d.gone}
    freed = {d.name for d in model.documents if d.split == "valid" and d.gone}
    # of several that it is like, the list names one: which are freed is for what it says
    listed = [json.loads(line) for line in (path / "duplicates.jsonl").read_text().splitlines()]
    there |= {(n, t) for (n, t, _), r in zip(model.left_out, listed, strict=True) if r["held_out"] not in freed}
    new = [Document(n, clean(t), corpus.name, "train") for n, t in pairs if (n, clean(t)) not in there]
    before = all_bytes(path)
    add_documents(path, corpus, **options)
    if not new:
        assert all_bytes(path) == before
        return
    model.edits += 1
    held = [d for d in model.documents if d.split == "valid" and not d.gone]
    for document in new:
        document.born = model.edits
        like = model.like_held_out(document.text, held)
        if like:
            model.left_out.append((document.name, document.text, like))
        else:
            model.documents += model.filled([document])


def remove(model, path, wanted):
    """Those of a number, and all of a name, which may be made of digits."""
    found, known = set(), set()
    for number, document in enumerate(model.documents):
        fits = {w for w in wanted if w in (number, document.name)}
        known |= fits
        found |= {number} if fits and not document.gone else set()
    before = all_bytes(path)
    if set(wanted) - known:
        with pytest.raises(UserError, match="has no document"):
            remove_documents(path, wanted)
        assert all_bytes(path) == before
        return
    remove_documents(path, wanted)
    if not found:
        assert all_bytes(path) == before
        return
    model.edits += 1
    for number in found:
        model.documents[number].removed = model.edits


def compacted(model, path):
    """What was removed is forgotten, and all lists are made anew."""
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


# Everything that a database shows, against the model


def assert_equal(path, model, rng):
    given = None if (path / "hashing.npy").exists() else model.embedder
    assert verify_database(path, given).broken == []
    database = Database.open(path, given)
    assert not (path / "edit").exists()
    assert not (path / "work").exists()
    assert database.manifest["generation"] == model.edits
    assert_records(database, model)
    for split in ("train", "valid"):
        assert_rows(database, model, split)
        assert_neighbours(database, model, split)
    assert_values(database, model)
    assert_search(database, model, rng)
    assert_sequences(database, model, rng)


def assert_records(database, model):
    told = [(r["name"], r["source"], r["split"], r["tokens"], r["chunks"]) for r in database.documents]
    assert told == [(d.name, d.source, d.split, d.tokens, len(d.chunks)) for d in model.documents]
    data = [d.text.encode() for d in model.documents]
    told = [(r["bytes"], r["sha256"]) for r in database.documents]
    assert told == [(len(each), hashlib.sha256(each).hexdigest()) for each in data]
    assert [r["id"] for r in database.documents] == list(range(len(model.documents)))
    assert [bool(r.get("removed")) for r in database.documents] == [d.gone for d in model.documents]
    for split, counts in database.manifest["splits"].items():
        left = [d for _, d in model.of_split(split) if not d.gone]
        assert counts["documents"] == len(left)
        assert counts["chunks"] == sum(len(d.chunks) for d in left)
        assert counts["tokens"] == sum(d.tokens for d in left)
        assert counts["bytes"] == sum(len(d.text.encode()) for d in left)
    listed = [json.loads(line) for line in (database.path / "duplicates.jsonl").read_text().splitlines()]
    assert [r["name"] for r in listed] == [name for name, _, _ in model.left_out]
    assert all(r["held_out"] in held for r, (_, _, held) in zip(listed, model.left_out, strict=True))
    rows = model.rows("train")
    of_source = {s["name"]: [i for a, b in s["rows"] for i in range(a, b)] for s in database.manifest["sources"]}
    for source, those in of_source.items():
        assert those == [i for i, (_, d, _) in enumerate(rows) if d.source == source]
    assert sum(map(len, of_source.values())) == len(rows)


def assert_rows(database, model, split):
    stored, rows = database.split(split), model.rows(split)
    blank = [0] * model.config.chunk_size
    assert stored.tokens[:].tolist() == [blank if d.gone else d.chunks[place] for _, d, place in rows]
    assert stored.documents[:].tolist() == [number for number, _, _ in rows]
    keys = np.asarray(database.keys(split)[:], np.float32)
    true = [d.keys[place] * (not d.gone) for _, d, place in rows]
    assert np.array_equal(keys, np.array(true, np.float32).reshape(-1, D_KEY))


def assert_neighbours(database, model, split):
    """A list is of all that was there when it was last made, and of what came since: only an edit renews it."""
    stored, width, known = database.split(split), model.config.neighbours + model.config.spares, {}
    ids, distances = stored.neighbours[:], stored.distances[:]
    for row, (own, document, place) in enumerate(model.rows(split)):
        key = document.keys[place]
        which = (own, key.tobytes())
        if which not in known:
            visible = lambda n, d, own=own, born=document.born: n != own and d.removed > born  # noqa: E731
            known[which] = model.nearest(key, width, visible)
        assert ids[row].tolist() == known[which][0].tolist()
        assert np.array_equal(distances[row], known[which][1])


def values_of(model):
    """[N, F] of each chunk, (chunks, 2m) as a list."""
    blank, values = [0] * model.config.chunk_size, []
    for _, d, place in model.rows("train"):
        following = d.chunks[place + 1] if place + 1 < len(d.chunks) else blank
        values.append(2 * blank if d.gone else d.chunks[place] + following)
    return values


def assert_values(database, model):
    rows, values = model.rows("train"), values_of(model)
    ids = np.arange(-1, len(rows))
    assert database.n_chunks == len(rows)
    assert database.value(ids).tolist() == [[0] * 2 * model.config.chunk_size, *values]
    assert database.document_of(ids).tolist() == [-1, *(number for number, _, _ in rows)]
    assert database.removed(ids).tolist() == [False, *(d.gone for _, d, _ in rows)]
    assert database.n_removed == sum(d.gone for _, d, _ in rows)
    for wrong in (-2, len(rows)):
        with pytest.raises(UserError, match="chunk ids go from 0"):
            database.value([wrong])


def assert_search(database, model, rng):
    """By text, and by the keys of some chunks, removed ones among them; fewer than there are, as many, and more."""
    live = sum(not d.gone for _, d, _ in model.rows("train"))
    rows = model.rows("train")
    some = [rows[i] for i in rng.choice(len(rows), min(3, len(rows)), replace=False)] if rows else []
    removed = [row for row in rows if row[1].gone][:2]
    texts = ["", "value"] + [decode(model.tokenizer, d.chunks[place]) for _, d, place in some + removed]
    queries = model.embedder.embed(texts, show_progress=False).astype(np.float32)
    for k in {1, max(1, live), live + 3}:
        expected = [model.nearest(query, k, lambda _, d: not d.gone) for query in queries]
        for ids, distances in (
            database.search(texts, k),
            database.search_keys(queries, k),
            database.search_keys(queries, k, exact=True),
        ):
            assert ids.tolist() == [found.tolist() for found, _ in expected]
            assert np.array_equal(distances, np.array([far for _, far in expected]))


def assert_sequences(database, model, rng):
    """Chunks in a row as training sees them: no neighbour of any of their documents, none that was removed."""
    k, length, values, sources = model.config.neighbours, 3, values_of(model), model.rows("train")
    for split in ("train", "valid"):
        stored, rows = database.split(split), model.rows(split)
        if not rows:
            continue
        starts = rng.integers(-1, len(rows), 4)
        picked = starts[:, None] + np.arange(length)
        picked = np.where((picked < len(rows)) & (picked >= 0), picked, -1)
        expected = []
        for sequence in picked:
            own = {rows[row][0] for row in sequence if row >= 0 and split == "train"}
            for row in sequence:
                listed = stored.neighbours[[row]][0] if row >= 0 else []
                found = [i for i in listed if i >= 0 and not sources[i][1].gone and sources[i][0] not in own]
                found = [values[i] for i in found[:k]]
                expected.append(found + [[0] * 2 * model.config.chunk_size] * (k - len(found)))
        made = sequence_neighbours(database, stored, picked, k)
        assert made.reshape(len(expected), k, -1).tolist() == expected
    if not model.rows("train"):
        return
    m, split = model.config.chunk_size, database.split("train")
    tokens, _, _ = training_batch(database, split, k, sequence_length=2 * m, batch_size=3, seed=1, step=0)
    drawn = sequence_rows(len(split.tokens), 2, 3, 1, 0)
    chunks = [value[:m] for value in values]
    assert tokens.tolist() == [[t for row in rows for t in (chunks[row] if row >= 0 else [0] * m)] for rows in drawn]
