"""Ground truth: a word that occurs in only one document, searched for in all text that a database shows."""

import numpy as np
import pytest
from database_model import D_KEY, Model
from support import write_corpus
from typer.testing import CliRunner

from retro_np.commands import app
from retro_np.retrieval.build import HASHED, BuildConfig, build_database
from retro_np.retrieval.edit import compact, remove_documents
from retro_np.retrieval.verify import verify_database
from retro_np.sequences import sequence_neighbours
from retro_np.training.batches import training_batch

SECRET = "zqxjkv"  # letters that the tokenizer does not merge


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_removed_text_is_shown_nowhere_and_is_in_no_file_after_compacting(tmp_path, split):
    config = BuildConfig(8, 300, held_out=0.2, neighbours=4, extra_candidates=6, shard_bytes=4000, d_key=D_KEY)
    model = Model(config, False)
    name = next(n for n in (f"hush{i}.py" for i in range(99)) if model.split_of(n) == split)
    corpus = write_corpus(tmp_path / "docs", 12)
    (corpus / name).write_text(f"value {SECRET} index\n" * 8)
    path = tmp_path / "db"
    database = build_database(corpus, path, config, HASHED)
    assert SECRET not in (path / "tokenizer.json").read_text()
    number = next(r["id"] for r in database.documents if r["name"] == name)
    rows = np.flatnonzero(database.split(split).documents[:] == number)
    texts = [database.text(row) for row in database.split(split).tokens[rows]]
    keys = np.asarray(database.keys(split)[:][rows], np.float32)
    encodings = [database.tokenizer.encode(SECRET).ids, database.tokenizer.encode(" " + SECRET).ids]
    encodings = [np.array(encoding, "<u2").tobytes() for encoding in encodings]

    def shown_texts(database):
        """All text that a database shows."""
        n_chunks = database.n_chunks
        for ids, _ in (
            database.search([SECRET, *texts], n_chunks),
            database.search_keys(keys, n_chunks),
            database.search_keys(keys, n_chunks, exact=True),
        ):
            yield from (database.text(value) for value in database.value(ids).reshape(-1, 16))
        yield from (database.text(value) for value in database.value(np.arange(n_chunks)))
        for split_name in ("train", "valid"):
            split_data = database.split(split_name)
            yield from (database.text(row) for row in split_data.tokens[:])
            values = sequence_neighbours(database, split_data, np.arange(len(split_data.tokens))[:, None], 10)
            yield from (database.text(value) for value in values.reshape(-1, 16))
        for step in range(20):
            options = {"sequence_length": 64, "batch_size": 4, "seed": 0, "step": step}
            tokens, targets, values = training_batch(database, database.split("train"), 4, **options)
            yield from (database.text(row) for row in (*tokens, *targets, *values.reshape(-1, 16)))
        for options in ([], ["--exact"]):
            line = ["search", str(path), f"value {SECRET} index", "-k", "9999", "--json", *options]
            answer = CliRunner().invoke(app, line)
            assert answer.exit_code == 0
            yield answer.stdout

    def files():
        return [p.read_bytes() for p in path.rglob("*") if p.is_file()]

    assert any(SECRET in text for text in shown_texts(database))
    assert any(encoding in data for data in files() for encoding in encodings)
    removed = remove_documents(path, [name])
    assert not any(SECRET in text or name in text for text in shown_texts(removed))
    compacted = compact(path)
    assert not any(SECRET in text or name in text for text in shown_texts(compacted))
    for data in files():
        assert SECRET.encode() not in data
        assert name.encode() not in data
        assert not any(encoding in data for encoding in encodings)
    assert verify_database(path).broken == []
