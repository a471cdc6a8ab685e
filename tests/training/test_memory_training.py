"""A memory is trained on a decoder of others. Ground truth: the same training in one piece, the decoder itself, and
the batches without random neighbours."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from memory_runs import TRAINING, M, begin, build, fitted_config, train_memory, write_decoder
from safetensors.numpy import load_file
from support import all_bytes

from retro_np import Database, UserError, retro, retro_loss
from retro_np.checkpoint import load_checkpoint, load_params, read_meta, read_tensors, write_tensors
from retro_np.optim import adamw_init
from retro_np.parameters import is_retrieval
from retro_np.pretrained.models import read_pretrained
from retro_np.sequences import sequence_chunks, sequence_neighbour_ids, sequence_neighbours
from retro_np.training import loop, memory
from retro_np.training.batches import irrelevant, mixture_rows, training_batch
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import RATE_OF_GATES, read_log, train, train_step
from retro_np.training.memory import (
    GATE,
    MEMORY_SETTINGS,
    add_memory,
    default_layers,
    scanned_layers,
    settings_in,
    stored_layers,
)
from retro_np.tree import map_tree, named_leaves

SAMPLED = {"sequence_length": 32, "batch_size": 8, "seed": 3}
FILES = ("checkpoint.safetensors", "best.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder") / "model")


@pytest.fixture(scope="module")
def database(model, tmp_path_factory):
    return Database.open(build(tmp_path_factory.mktemp("memory") / "db", model / "tokenizer.json"))


@pytest.fixture(scope="module")
def finished(database, model, tmp_path_factory):
    """A run of five steps that was not interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train_memory(database, model, out)
    return out


def leaves(params):
    return dict(named_leaves(params))


def stop_at(step):
    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_interrupted_training_ends_in_the_bytes_of_one_in_one_piece(database, model, finished, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        train_memory(database, model, tmp_path, callbacks=[stop_at(step)])
    _, resumed = train_memory(database, model, tmp_path)
    assert all_bytes(tmp_path) == all_bytes(finished)
    stored = load_file(finished / FILES[0])
    assert all(np.array_equal(leaf, stored[name]) for name, leaf in named_leaves(resumed) if is_retrieval(name))


@pytest.mark.parametrize("first", [0, 3])
def test_a_prolonged_memory_is_repeated_by_its_own_settings_bit_for_bit(database, model, tmp_path, first):
    for steps in (first, 5):
        train_memory(database, model, tmp_path / "prolonged", replace(TRAINING, steps=steps))
    segments = (first,) if first else ()
    train_memory(database, model, tmp_path / "whole", replace(TRAINING, segments=segments))
    assert all_bytes(tmp_path / "prolonged") == all_bytes(tmp_path / "whole")


def test_no_step_leaves_the_memory_as_it_begins(database, model, tmp_path):
    params, trained = train_memory(database, model, tmp_path, replace(TRAINING, steps=0))
    stored = load_file(tmp_path / FILES[0])
    for name, leaf in named_leaves(params):
        assert np.array_equal(leaf, leaves(trained)[name])
        assert not is_retrieval(name) or np.array_equal(leaf, stored[name])
    assert read_meta(tmp_path)["step"] == 0
    assert not read_log(tmp_path)


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_the_size_of_the_cache_changes_no_byte_of_what_is_trained(database, model, finished, tmp_path, cache_mb):
    train_memory(database, model, tmp_path, replace(TRAINING, cache_mb=cache_mb))
    for file in FILES:
        assert {n: a.tobytes() for n, a in load_file(tmp_path / file).items()} == {
            n: a.tobytes() for n, a in load_file(finished / file).items()
        }


def test_a_run_resumes_with_another_size_of_the_cache(database, model, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_memory(database, model, tmp_path, replace(TRAINING, cache_mb=0), callbacks=[stop_at(2)])
    train_memory(database, model, tmp_path)
    assert all_bytes(tmp_path) == all_bytes(finished)


def test_a_runs_files_hold_what_was_trained_its_moments_and_the_name_of_its_base(database, model, finished):
    params, _, base = begin(model, database)
    trained = {name for name in leaves(params) if is_retrieval(name)}
    moments = {f"adamw.{kind}.{name}" for kind in "mv" for name in trained}
    assert trained
    assert [set(load_file(finished / file)) for file in FILES] == [trained | moments, trained]
    assert [read_meta(finished / file)["base"] for file in FILES] == [base, base]


def test_a_run_without_moments_is_refused_by_its_name(database, model, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.safetensors"
    tensors, meta = read_tensors(file)
    write_tensors(file, {name: array for name, array in tensors.items() if not name.startswith("adamw.")}, meta)
    with pytest.raises(UserError, match=rf"{file}: adamw\.m\.layers\.0\.cca\.\w+ is absent"):
        train_memory(database, model, tmp_path / "run", replace(TRAINING, steps=7))


def test_frozen_arrays_are_shared_and_keep_their_bytes(database, model, tmp_path):
    params, _, _ = begin(model, database)
    before = {name: leaf.tobytes() for name, leaf in named_leaves(params)}
    _, config, base = begin(model, database)
    options = {"begin_from": (params, base["sha256"]), "trainable": is_retrieval, "base": base}
    trained = leaves(train(database, config, TRAINING, tmp_path, **options))
    for name, leaf in named_leaves(params):
        assert leaf.tobytes() == before[name], name
        assert np.shares_memory(leaf, trained[name]) != is_retrieval(name), name


def test_a_resumed_run_shares_the_frozen_arrays_too(database, model, tmp_path):
    train_memory(database, model, tmp_path, replace(TRAINING, steps=2))
    params, trained = train_memory(database, model, tmp_path, replace(TRAINING, steps=2))
    for name, leaf in named_leaves(params):
        assert np.shares_memory(leaf, leaves(trained)[name]) != is_retrieval(name), name


def test_the_first_step_moves_a_gate_ten_times_as_far_as_a_matrix(database, model):
    # Adam's first step is the learning rate, whatever the size of the gradient.
    params, config, _ = begin(model, database)
    params = map_tree(lambda name, leaf: leaf.copy(), params)
    before, state = map_tree(lambda name, leaf: leaf.copy(), params), adamw_init(params, is_retrieval)
    training = replace(TRAINING, warmup=0, clip=1e6)
    batch = training_batch(database, database.split("train"), 2, step=0, **SAMPLED)
    train_step(params, state, config, batch, training, 0, is_retrieval)
    moved = {name: np.abs(leaf - leaves(before)[name]).max() for name, leaf in named_leaves(params)}
    for name, distance in moved.items():
        rate = training.learning_rate * is_retrieval(name)
        if name.endswith(".gate"):
            rate *= 10
        elif ".down_" in name:  # has no gradient where its partner is 0
            rate = 0
        assert distance == pytest.approx(rate, rel=1e-3), name
    assert RATE_OF_GATES == 10
    assert any(name.endswith(".gate") for name in moved)


def test_a_memory_begins_as_a_copy_of_the_layers_own_attention(database, model):
    params, config, _ = begin(model, database)
    added = {name: leaf for name, leaf in named_leaves(params) if is_retrieval(name)}
    assert all((leaf == GATE).all() for name, leaf in added.items() if name.endswith(".gate"))
    assert all((leaf == 0).all() for name, leaf in added.items() if ".up_" in name)
    assert all(leaf.any() for name, leaf in added.items() if ".down_" in name)
    assert (config.cca_layers, config.rank, config.begin_id, config.encoder) == ((1, 2), 2, 259, None)


def test_without_a_rank_only_the_gates_are_trained(database, model):
    params, config, _ = begin(model, database)
    bare, config = add_memory(*plain(params, config), (2,), np.random.default_rng(0), rank=None)
    assert [name for name in leaves(bare) if is_retrieval(name)] == ["layers.1.cca.gate"]
    assert config.rank is None


def plain(params, config):
    """The decoder without its memory."""
    layers = [{name: part for name, part in layer.items() if name != "cca"} for layer in params["layers"]]
    return params | {"layers": layers}, replace(config, cca_layers=(), rank=None)


def test_a_model_with_a_memory_and_layers_that_it_lacks_are_refused(database, model):
    params, config, _ = begin(model, database)
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="this model retrieves already"):
        add_memory(params, config, (1,), rng)
    for layers, fault in (
        ((), "name at least one"),
        ((3,), "cca_layers"),
        ((0,), "cca_layers"),
        ((2, 2), "cca_layers"),
    ):
        with pytest.raises(UserError, match=fault):
            add_memory(*plain(params, config), layers, rng)


def test_retrieval_off_equals_the_decoder_to_the_bit_after_training(database, model, tmp_path):
    params, config, _ = begin(model, database)
    _, trained = train_memory(database, model, tmp_path)
    tokens = np.random.default_rng(1).integers(0, 259, (2, 32))
    off = retro(trained, config, tokens, None)[0]
    assert np.array_equal(off, retro(*plain(params, config), tokens, None)[0])
    neighbours = np.random.default_rng(2).integers(0, 259, (2, 4, 2, 2 * M))
    assert not np.array_equal(retro(trained, config, tokens, neighbours)[0], off)


def test_a_file_of_what_was_added_is_not_read_without_its_base(finished):
    for read in (load_params, load_checkpoint):
        with pytest.raises(UserError, match=r"holds only what was added to .*: read it with load_pretrained"):
            read(finished / FILES[0])


def test_a_run_on_another_base_is_not_resumed(database, model, finished, tmp_path):
    other = write_decoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"was trained with begun_from = .*, and now it is"):
        train_memory(database, other, finished)


def test_layers_are_those_of_the_recipe_of_the_run_or_of_the_paper(model, database):
    _, config, _ = begin(model, database)
    thirty = replace(config, n_layers=30, cca_layers=())
    assert default_layers(thirty) == (18, 19, 21, 22, 23, 24, 25)  # counted from 1
    assert default_layers(thirty, True) == (6, 9, 12, 15, 18, 21, 24, 27, 30)
    assert default_layers(replace(thirty, n_layers=1)) == (1,)
    assert default_layers(replace(thirty, n_layers=4), True) == (4,)
    assert stored_layers({"cca_layers": [3, 7]}) == (3, 7)
    assert stored_layers({"cca_layers": [], "adapted_layers": [3, 7]}) == (3, 7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_scan_finds_the_layer_in_which_an_untrained_memory_needs_the_fewest_bits(
    database, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(memory, "LAYER_SHARES", (0.5,))  # names one of two layers
    base = read_pretrained(write_decoder(tmp_path / "model", seed=seed))
    training = replace(TRAINING, seed=seed)
    tokens, targets, neighbours = batch(database, batch_size=TRAINING.batch_size, seed=seed)
    config, losses = fitted_config(base, database), {}
    for p in (1, 2):
        params, one = add_memory(base.params, config, (p,), np.random.default_rng(9), begin_id=259)
        losses[p] = float(retro_loss(params, one, tokens, targets, neighbours)[0])
    assert abs(losses[1] - losses[2]) > 1e-5
    assert scanned_layers(base, database, config, training) == (min(losses, key=losses.__getitem__),)


@pytest.mark.parametrize("stored", ["{}", '{"model": 5}', '{"model": {"cca_layers": ["a"]}}', "[]", '{"model": null}'])
def test_damaged_layers_of_a_run_are_not_taken(tmp_path, stored):
    assert settings_in(tmp_path) == {}
    (tmp_path / "config.json").write_text(stored)
    if stored == "[]":
        with pytest.raises(UserError, match=r"config\.json"):
            settings_in(tmp_path)
        return
    assert stored_layers(settings_in(tmp_path).get("model", {})) == ()


def test_the_settings_of_a_memory_are_settings_of_a_training():
    assert TrainingConfig(**MEMORY_SETTINGS).random_share == 0.25


# Random neighbours


def batch(database, step=0, share=0.0, **change):
    return training_batch(database, database.split("train"), 2, step=step, random_share=share, **SAMPLED | change)


def drawn_at_random(database, step, share, **change):
    """The chunks whose neighbours differ from what they retrieved."""
    return (batch(database, step, share, **change)[2] != batch(database, step, **change)[2]).any(axis=(2, 3))


def test_without_a_random_share_a_batch_is_what_its_rows_retrieved(database):
    split = database.split("train")
    length = sequence_chunks(SAMPLED["sequence_length"], database.chunk_size)
    rows = mixture_rows([[(0, len(split.tokens))]], [1], length, SAMPLED["batch_size"], SAMPLED["seed"], 4)
    assert np.array_equal(batch(database, step=4)[2], sequence_neighbours(database, split, rows, 2))


def test_a_random_share_changes_neither_tokens_nor_targets(database):
    for part in (0, 1):
        assert np.array_equal(batch(database, share=0.5)[part], batch(database)[part])


def test_a_quarter_of_the_chunks_reads_random_neighbours(database):
    chosen = np.concatenate([drawn_at_random(database, step, 0.25).ravel() for step in range(40)])
    # 1,280 chunks, some of which draw by chance what they retrieved
    assert 0.18 < chosen.mean() < 0.3


def test_with_a_share_of_one_every_chunk_reads_chunks_of_the_database(database):
    tokens, _, neighbours = batch(database, share=1.0)
    known = {tuple(value) for value in database.value(np.arange(database.n_chunks))}
    assert {tuple(value) for value in neighbours.reshape(-1, 2 * M)} <= known | {(database.padding,) * 2 * M}
    assert drawn_at_random(database, 0, 1.0).mean() > 0.8
    assert neighbours.shape[:2] == (len(tokens), 32 // M)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_random_neighbours_never_come_from_a_document_of_the_sequence(database, batch_size):
    split = database.split("train")
    for step in range(5):
        rows = mixture_rows([[(0, len(split.tokens))]], [1], 4, batch_size, 0, step)
        ids = sequence_neighbour_ids(database, split, rows, 2)
        drawn = irrelevant(database, split, rows, ids, np.random.default_rng(step))
        for b in range(batch_size):
            own = set(np.asarray(split.documents)[rows[b]])
            assert not own & set(database.document_of(drawn[b][drawn[b] >= 0]).ravel())
            if batch_size > 1:
                assert set(drawn[b].ravel()) <= {-1, *np.delete(ids, b, axis=0).ravel()}


def test_random_neighbours_are_determined_by_seed_and_step(database):
    first = batch(database, share=0.5)[2]
    assert np.array_equal(batch(database, share=0.5)[2], first)
    chosen = drawn_at_random(database, 0, 0.5)
    assert not np.array_equal(drawn_at_random(database, 1, 0.5), chosen)
    assert not np.array_equal(drawn_at_random(database, 0, 0.5, seed=4), chosen)


def test_training_passes_the_share_to_its_batches(database, model, tmp_path, monkeypatch):
    shares, make = [], loop.training_batch
    monkeypatch.setattr(loop, "training_batch", lambda *a, **o: (shares.append(o["random_share"]), make(*a, **o))[1])
    train_memory(database, model, tmp_path, replace(TRAINING, steps=1, random_share=0.5))
    assert shares == [0.5]
