"""Databases with tokenizers that others trained. Ground truth: transformers' ids and the documents' own texts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from foreign_tokenizers import byte_level_parts, json_of
from support import EMBEDDER, SMALL, TRAINING, small_config, write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from retro_np import load_pretrained
from retro_np.commands import app
from retro_np.errors import UserError
from retro_np.kernels.substring import common_prefix_lengths, longest_common_substring
from retro_np.nn.decoders import DecoderConfig
from retro_np.retrieval import manifest as layout
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.hashing import HASHED
from retro_np.retrieval.tokenizer import load_tokenizer, tokenizer_sha256
from retro_np.retrieval.verify import verify_database
from retro_np.retrieval.vocabulary import special_ids
from retro_np.sequences import check_fit, evaluation_windows, model_tokens, scored_windows, tokens_and_targets
from retro_np.training.curriculum import insert_oracle_neighbours
from retro_np.training.loop import train

FIRST = 69_000  # A wide tokenizer's ids exceed 65,535.


def without_special(first=0):
    """A byte-level tokenizer without special tokens, whose token 0 (or `first`) is the exclamation mark."""
    vocabulary, merges = byte_level_parts()
    tokens = sorted(vocabulary.keys() - {"<|endoftext|>"}, key=vocabulary.get)
    tokenizer = Tokenizer(models.BPE({token: first + number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def of_kind(kind):
    tokenizer = {"real 0": without_special, "wide": lambda: without_special(FIRST)}.get(kind)
    return tokenizer() if tokenizer else Tokenizer.from_str(json_of(kind).decode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "docs")
    (folder / "marks.py").write_text("!!!! a ! b !! c !\n" * 20)
    (folder / "spelled.py").write_text("<|endoftext|> and </s> and <unk> are text here: 中文 🙂\n" * 9)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "real 0", "wide", "legacy llama"])
def foreign(request, folder, tmp_path_factory):
    """A database with a tokenizer that another trained, and that tokenizer."""
    path = tmp_path_factory.mktemp("databases") / "db"
    return build_database(folder, path, SMALL, EMBEDDER, tokenizer=of_kind(request.param)), of_kind(request.param)


@pytest.fixture(scope="module")
def real_0(folder, tmp_path_factory):
    """A database in which id 0 is an exclamation mark, with keys of its own hashing embedder."""
    return build_database(folder, tmp_path_factory.mktemp("real") / "db", SMALL, HASHED, tokenizer=without_special())


def test_chunks_hold_the_ids_of_each_document_then_end_of_text_and_padding(foreign, folder):
    database, tokenizer = foreign
    tokenizer.encode_special_tokens = True
    for split in map(database.split, ("train", "valid")):
        for start, stop in document_runs(split.documents[:]):
            text = (folder / database.documents[int(split.documents[start])]["name"]).read_text()
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            stored = split.tokens[start:stop].ravel().tolist()
            assert stored[: len(ids) + 1] == [*ids, database.end_of_text]
            assert set(stored[len(ids) + 1 :]) <= {database.padding}


def test_texts_of_whole_documents_are_the_corpus(foreign, folder):
    database, _ = foreign
    split = database.split("train")
    for start, stop in document_runs(split.documents[:]):
        name = database.documents[int(split.documents[start])]["name"]
        assert database.text(split.tokens[start:stop].ravel()) == (folder / name).read_text()


def test_the_manifest_names_padding_and_end_of_text(foreign):
    database, tokenizer = foreign
    special, valid = special_ids(load_tokenizer(tokenizer)), database.split("valid")
    named = {
        (database.padding, database.end_of_text),
        (valid.padding, valid.end_of_text),
        (database.manifest["padding"], database.manifest["end_of_text"]),
    }
    assert named == {special}
    assert database.vocabulary_size == 1 + max(*special, *tokenizer.get_vocab().values())


def test_a_missing_value_is_the_databases_padding(foreign):
    database, _ = foreign
    last = int(np.flatnonzero(np.diff(database.split("train").documents[:]))[0])  # the first document's last chunk
    assert np.all(database.value(-1) == database.padding)
    assert np.all(database.value(last)[database.chunk_size :] == database.padding)
    assert database.padding not in database.value(last)[:1]


def test_a_database_with_a_foreign_tokenizer_is_verified(foreign):
    assert verify_database(foreign[0].path, EMBEDDER).broken == []


def test_ids_above_65535_are_stored_as_uint32(foreign):
    database, _ = foreign
    assert database.split("train").tokens.dtype == (np.uint32 if database.vocabulary_size > 2**16 else np.uint16)


def test_a_chunks_own_text_finds_it(foreign):
    database, _ = foreign
    for chunk in (0, 7, database.n_chunks - 1):
        ids, distances = database.search(database.text(database.value(chunk)[: database.chunk_size]), database.n_chunks)
        assert chunk in ids[distances == 0]


def test_add_remove_and_compact_keep_a_foreign_database_whole(folder, tmp_path):
    path = tmp_path / "db"
    build_database(folder, path, SMALL, HASHED, tokenizer=without_special())
    extra = write_corpus(tmp_path / "extra", 5, seed=3)
    add_documents(path, extra)
    database = remove_documents(path, [0, "marks.py"])
    assert verify_database(path).broken == []
    split = database.split("train")
    assert np.all(split.tokens[split.removed] == database.padding)
    compacted = compact(path)
    assert verify_database(path).broken == []
    assert not np.any(np.all(compacted.split("train").tokens[:] == compacted.padding, axis=1))


def test_token_0_is_a_target_and_its_bytes_count(real_0):
    split = real_0.split("train")
    rows = np.arange(len(split.tokens))[:, None]
    tokens, targets = tokens_and_targets(split, rows)
    assert np.any(targets == 0)
    assert not np.isin(targets, [real_0.padding]).any()
    following = np.roll(tokens, -1, axis=1)[:, :-1]
    assert np.array_equal(targets[:, :-1], np.where(following == real_0.padding, -1, following))
    windows = scored_windows(split, *evaluation_windows(split, 2 * real_0.chunk_size), description="")
    assert all(not np.isin(targets, split.end_of_text).any() for _, _, targets in windows)


def test_a_letter_is_a_feature_and_token_0_which_is_a_mark_padding_and_end_of_text_are_none(real_0):
    embed, padding, end = real_0.embedder.embed_tokens, real_0.padding, real_0.end_of_text
    a, b = (real_0.tokenizer.token_to_id(letter) for letter in "ab")
    empty = embed(np.array([[padding, padding]]))[0]
    assert np.array_equal(embed(np.array([[end, 0]]))[0], empty)
    assert not np.array_equal(embed(np.array([[a, padding]]))[0], empty)
    pair = embed(np.array([[a, b]]))[0]
    assert all(np.array_equal(pair, embed(np.array([[a, none, b]]))[0]) for none in (0, padding, end))
    assert not np.array_equal(pair, embed(np.array([[b, a]]))[0])


def test_a_query_of_the_hashing_embedder_has_the_key_of_its_tokens(real_0):
    text = "!!!! a !"
    ids = np.array([real_0.tokenizer.encode(text).ids])
    key = real_0.embedder.embed([text, "return the value of the index of the chunk"], show_progress=False)[0]
    assert np.array_equal(key, real_0.embedder.embed_tokens(ids)[0])


@pytest.mark.parametrize("padding", [0, 9])
def test_only_padding_matches_nothing(padding):
    tokens, values = np.array([0, 9, 0, 9, 5]), np.array([[[0, 9, 0, 5, 9, 0]]])
    expected = {0: ([0, 1, 0, 1, 1], 1), 9: ([1, 0, 1, 0, 1], 1)}[padding]
    assert common_prefix_lengths(tokens, values[0], padding).tolist() == expected[0]
    assert longest_common_substring(tokens[None], values, padding).tolist() == [expected[1]]
    assert longest_common_substring(tokens[None], values, 7).tolist() == [3]


def test_an_oracle_neighbour_is_padded_with_the_databases_padding():
    tokens = np.zeros((1, 8), np.int64)  # Each token is the real token 0.
    neighbours = np.full((1, 2, 1, 8), 5)
    insert_oracle_neighbours(neighbours, tokens, 1.0, np.random.default_rng(0), padding=9)
    assert set(neighbours[0, 1, 0].tolist()) == {0, 9}


def test_a_model_of_ours_trains_on_a_foreign_database(real_0, tmp_path):
    config = small_config(real_0, padding_id=real_0.padding)
    train(real_0, config, TRAINING, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_a_decoder_trains_on_a_database_whose_padding_and_end_of_text_it_has_no_rows_for(real_0, tmp_path):
    vocabulary_size = min(real_0.padding, real_0.end_of_text)
    config = DecoderConfig(vocabulary_size, 8, 8, 1, 8, 1, chunk_size=real_0.chunk_size, max_positions=16)
    training = replace(TRAINING, sequence_length=16, steps=8, batch_size=16, eval_every=4)  # every document's end
    train(real_0, config, training, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="sequence_length of at most 16"):
        train(real_0, config, replace(training, sequence_length=32), tmp_path / "long")
    assert not (tmp_path / "long").exists()


def command(*arguments):
    """Run a command that must succeed; return what it printed."""
    answer = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def test_the_commands_build_search_and_train_with_a_models_tokenizer_json(folder, tmp_path):
    db, model = tmp_path / "db", tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes(json_of("gpt2"))
    built = "build", folder, "-o", db, "--embedder", "hashing", "--chunk-size", 8, "--tokenizer"
    for tokenizer in (model, model / "tokenizer.json"):  # the same request
        command(*built, tokenizer)
    found = json.loads(command("search", db, "中文 🙂", "-k", 1, "--json"))
    assert found["chunk"] + found["continuation"] in (folder / "spelled.py").read_text()
    sizes = "--d-model", 8, "--d-ffw", 8, "--n-heads", 1, "--d-head", 8, "--n-layers", 1, "--cca-layers", 1
    command("train", db, "-o", tmp_path / "run", *sizes, "--steps", 1, "--sequence-length", 16)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["padding_id"] == Database.open(db).padding == 500


def test_a_models_name_stands_for_its_tokenizer(folder, tmp_path):
    command("build", folder, "-o", tmp_path / "db", "--embedder", "hashing", "--tokenizer", "baseline")
    database, (_, _, tokenizer) = Database.open(tmp_path / "db"), load_pretrained("baseline")
    assert database.manifest["tokenizer"] == tokenizer_sha256(tokenizer)


def forged(database, path, **changes):
    """A copy of a database's manifest with other entries and a right hash, in the database's own folder."""
    stored = {name: value for name, value in database.manifest.items() if name not in ("sha256", *changes)}
    layout.write_manifest(path, stored | {name: value for name, value in changes.items() if value is not None})


@pytest.mark.parametrize(
    "changes", [{"padding": 3}, {"end_of_text": 0}, {"padding": None, "end_of_text": None}, {"padding": "x"}]
)
def test_a_manifest_with_other_special_ids_than_its_tokenizers_is_refused(folder, tmp_path, changes):
    database = build_database(folder, tmp_path / "db", SMALL, HASHED, tokenizer=without_special())
    forged(database, tmp_path / "db", **changes)
    with pytest.raises(UserError, match=r"manifest.* build the database again in another folder"):
        Database.open(tmp_path / "db")


def test_another_tokenizer_is_another_request(folder, tmp_path):
    build_database(folder, tmp_path / "db", SMALL, HASHED, tokenizer=without_special())
    with pytest.raises(UserError, match="was started with tokenizer"):
        build_database(folder, tmp_path / "db", SMALL, HASHED, tokenizer=of_kind("gpt2"))


def test_a_model_with_other_padding_than_the_databases_does_not_fit(real_0):
    check_fit(small_config(real_0, padding_id=real_0.padding), real_0)
    with pytest.raises(UserError, match=r"the model has padding_id 0, and the database .* has 499: use the database"):
        check_fit(small_config(real_0), real_0)


def test_a_decoder_may_have_more_embeddings_than_a_tokenizer_has_tokens_but_not_fewer(real_0):
    size = real_0.vocabulary_size - 2  # without the ids that the database adds
    sizes = {"d_model": 8, "d_ffw": 8, "n_heads": 1, "d_head": 8, "n_layers": 1, "chunk_size": real_0.chunk_size}
    for larger in (size, size + 5):
        config = DecoderConfig(vocabulary_size=larger, **sizes)
        check_fit(config, real_0)
        assert model_tokens(config, np.array([0, larger - 1, larger, real_0.end_of_text])).max() < larger
    with pytest.raises(UserError, match=f"vocabulary_size {size - 1}, and the database .* has {size}"):
        check_fit(DecoderConfig(vocabulary_size=size - 1, **sizes), real_0)
