"""Compare everything that a database stores and returns with its model (`database_model.py`)."""

import hashlib
import json

import numpy as np
import pytest
from database_model import D_KEY

from retro_np.errors import UserError
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import decode
from retro_np.retrieval.verify import verify_database
from retro_np.sequences import sequence_neighbours
from retro_np.training.batches import sequence_rows, training_batch


def assert_equal(path, model, rng):
    embedder = None if (path / "hashing.npy").exists() else model.embedder
    assert verify_database(path, embedder).broken == []
    database = Database.open(path, embedder)
    assert not (path / "edit").exists()
    assert not (path / "work").exists()
    assert database.manifest["generation"] == model.edits
    assert_records(database, model)
    assert list(database.manifest["splits"]) == model.splits
    for split in model.splits:
        assert_rows(database, model, split)
        assert_neighbours(database, model, split)
    assert_values(database, model)
    assert_search(database, model, rng)
    assert_sequences(database, model, rng)


def assert_records(database, model):
    actual = [(r["name"], r["source"], r["split"], r["tokens"], r["chunks"]) for r in database.documents]
    assert actual == [(d.name, d.source, d.split, d.tokens, len(d.chunks)) for d in model.documents]
    data = [d.text.encode() for d in model.documents]
    actual = [(r["bytes"], r["sha256"]) for r in database.documents]
    assert actual == [(len(text), hashlib.sha256(text).hexdigest()) for text in data]
    assert [r["id"] for r in database.documents] == list(range(len(model.documents)))
    assert [bool(r.get("removed")) for r in database.documents] == [d.gone for d in model.documents]
    for split, counts in database.manifest["splits"].items():
        remaining = [d for _, d in model.of_split(split) if not d.gone]
        assert counts["documents"] == len(remaining)
        assert counts["chunks"] == sum(len(d.chunks) for d in remaining)
        assert counts["tokens"] == sum(d.tokens for d in remaining)
        assert counts["bytes"] == sum(len(d.text.encode()) for d in remaining)
    listed = [json.loads(line) for line in (database.path / "duplicates.jsonl").read_text().splitlines()]
    assert [r["name"] for r in listed] == [name for name, _, _ in model.left_out]
    assert all(r["held_out"] in resembled for r, (_, _, resembled) in zip(listed, model.left_out, strict=True))
    rows = model.rows("train")
    rows_by_source = {s["name"]: [i for a, b in s["rows"] for i in range(a, b)] for s in database.manifest["sources"]}
    for source, source_rows in rows_by_source.items():
        assert source_rows == [i for i, (_, d, _) in enumerate(rows) if d.source == source]
    assert sum(map(len, rows_by_source.values())) == len(rows)


def assert_rows(database, model, split):
    stored, rows = database.split(split), model.rows(split)
    blank = [0] * model.config.chunk_size
    assert stored.tokens[:].tolist() == [blank if d.gone else d.chunks[position] for _, d, position in rows]
    assert stored.documents[:].tolist() == [number for number, _, _ in rows]
    keys = np.asarray(database.keys(split)[:], np.float32)
    expected = [d.keys[position] * (not d.gone) for _, d, position in rows]
    assert np.array_equal(keys, np.array(expected, np.float32).reshape(-1, D_KEY))


def assert_neighbours(database, model, split):
    """A list covers the documents that existed when it was made and those added since. A removal does not change it."""
    stored, width, known = database.split(split), model.config.neighbours + model.config.extra_candidates, {}
    ids, distances = stored.neighbours[:], stored.distances[:]
    for row, (number, document, position) in enumerate(model.rows(split)):
        key = document.keys[position]
        query = (number, key.tobytes())
        if query not in known:
            visible = lambda n, d, number=number, born=document.born: n != number and d.removed > born  # noqa: E731
            known[query] = model.nearest(key, width, visible)
        assert ids[row].tolist() == known[query][0].tolist()
        assert np.array_equal(distances[row], known[query][1])


def values_of(model):
    """[N, F] of each chunk, (chunks, 2m) as a list."""
    blank, values = [0] * model.config.chunk_size, []
    for _, d, position in model.rows("train"):
        following = d.chunks[position + 1] if position + 1 < len(d.chunks) else blank
        values.append(2 * blank if d.gone else d.chunks[position] + following)
    return values


def assert_values(database, model):
    rows, values = model.rows("train"), values_of(model)
    ids = np.arange(-1, len(rows))
    assert database.n_chunks == len(rows)
    assert database.value(ids).tolist() == [[0] * 2 * model.config.chunk_size, *values]
    assert database.document_of(ids).tolist() == [-1, *(number for number, _, _ in rows)]
    assert database.removed(ids).tolist() == [False, *(d.gone for _, d, _ in rows)]
    assert database.n_removed == sum(d.gone for _, d, _ in rows)
    for invalid_id in (-2, len(rows)):
        with pytest.raises(UserError, match="chunk ids go from 0"):
            database.value([invalid_id])


def assert_search(database, model, rng):
    """Search by text and key, also with texts of removed chunks, and k below, at and above the number of chunks."""
    live = sum(not d.gone for _, d, _ in model.rows("train"))
    rows = model.rows("train")
    sample = [rows[i] for i in rng.choice(len(rows), min(3, len(rows)), replace=False)] if rows else []
    removed = [row for row in rows if row[1].gone][:2]
    texts = ["", "value"] + [decode(model.tokenizer, d.chunks[position]) for _, d, position in sample + removed]
    queries = model.embedder.embed(texts, show_progress=False).astype(np.float32)
    for k in {1, max(1, live), live + 3}:
        expected = [model.nearest(query, k, lambda _, d: not d.gone) for query in queries]
        for ids, distances in (
            database.search(texts, k),
            database.search_keys(queries, k),
            database.search_keys(queries, k, exact=True),
        ):
            assert ids.tolist() == [nearest.tolist() for nearest, _ in expected]
            assert np.array_equal(distances, np.array([row for _, row in expected]))


def assert_sequences(database, model, rng):
    """Consecutive chunks get no neighbour from any of their documents and no removed neighbour."""
    k, length, values, sources = model.config.neighbours, 3, values_of(model), model.rows("train")
    for split in model.splits:
        stored, rows = database.split(split), model.rows(split)
        if not rows:
            continue
        starts = rng.integers(-1, len(rows), 4)
        picked = starts[:, None] + np.arange(length)
        picked = np.where((picked < len(rows)) & (picked >= 0), picked, -1)
        expected = []
        for sequence in picked:
            numbers = {rows[row][0] for row in sequence if row >= 0 and split == "train"}
            for row in sequence:
                listed = stored.neighbours[[row]][0] if row >= 0 else []
                allowed = [i for i in listed if i >= 0 and not sources[i][1].gone and sources[i][0] not in numbers]
                allowed = [values[i] for i in allowed[:k]]
                expected.append(allowed + [[0] * 2 * model.config.chunk_size] * (k - len(allowed)))
        neighbours = sequence_neighbours(database, stored, picked, k)
        assert neighbours.reshape(len(expected), k, -1).tolist() == expected
    if not model.rows("train"):
        return
    m, split = model.config.chunk_size, database.split("train")
    tokens, _, _ = training_batch(database, split, k, sequence_length=2 * m, batch_size=3, seed=1, step=0)
    drawn = sequence_rows(len(split.tokens), 2, 3, 1, 0)
    chunks = [value[:m] for value in values]
    assert tokens.tolist() == [[t for row in rows for t in (chunks[row] if row >= 0 else [0] * m)] for rows in drawn]
