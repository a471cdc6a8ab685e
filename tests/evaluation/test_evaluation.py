"""Ground truth: documents scored token by token, each token in its own window."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from support import small_config

from retro_np import RetroConfig, init_params, retro
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import Losses, _permutation, bits_per_byte, score, score_tokens
from retro_np.evaluation.compare import LINES, OFF, ON, SHUFFLE_SEED, SHUFFLED, evaluate, verdict
from retro_np.evaluation.leakage import bits, chunk_leakage, filtered_bits_per_byte
from retro_np.nn.operators import log_softmax
from retro_np.retrieval.join import Retrieval
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import sequence_neighbours


@pytest.fixture(scope="module")
def model(database):
    config = small_config(database)
    return init_params(config, np.random.default_rng(0)), config


def plain_losses(params, config, database, n, stride, k):
    """Nats and bytes of each chunk of "valid".

    Windows start at multiples of the stride; the first window that contains a token scores it.
    """
    split, m = database.split("valid"), database.chunk_size
    lengths = token_byte_lengths(database.tokenizer)
    documents = split.documents[:]
    nats, n_bytes = np.zeros(len(documents)), np.zeros(len(documents))
    for document in np.unique(documents):
        rows = np.flatnonzero(documents == document)
        tokens = split.tokens[rows].reshape(-1).astype(int)
        for t in range(1, len(tokens)):
            if tokens[t] in (0, 1):
                continue
            start = max(0, -(-(t - n) // stride)) * stride
            window = rows[start // m : (start + n) // m]
            neighbours = sequence_neighbours(database, split, window[None], k) if k else None
            logits, _ = retro(params, config, tokens[start : start + n][None], neighbours)
            nats[rows[t // m]] -= log_softmax(logits[0, t - 1 - start])[tokens[t]]
            n_bytes[rows[t // m]] += lengths[tokens[t]]
    return nats, n_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("n", "stride", "k"), [(32, 16, 2), (32, 32, 0), (16, 8, 0)])
def test_a_sliding_window_scores_each_token_once_with_its_own_context(model, database, n, stride, k):
    losses = score(*model, database, k=k, sequence_length=n, stride=stride)
    nats, n_bytes = plain_losses(*model, database, n, stride, k)
    np.testing.assert_allclose(losses.nats, nats, rtol=1e-4, atol=1e-4)
    assert np.array_equal(losses.bytes, n_bytes)


def test_shuffled_neighbours_are_those_of_other_chunks(model, database):
    params, config = model
    retrieval = Retrieval.own(database, "valid")
    order = _permutation(len(retrieval.split.tokens), retrieval.split.removed, 5)
    assert (order != np.arange(len(order))).all()
    lists = np.asarray(retrieval.split.neighbours)[order]
    permuted = replace(retrieval, split=replace(retrieval.split, neighbours=lists))
    window = {"k": 2, "sequence_length": 32, "stride": 16}
    losses = score(params, config, database, shuffle_seed=5, **window)
    assert np.array_equal(losses.nats, score(params, config, database, retrieval=permuted, **window).nats)
    assert not np.array_equal(losses.nats, score(params, config, database, **window).nats)


def test_bytes_are_those_of_the_documents_without_their_first_tokens(model, database):
    losses = score(*model, database, k=0, sequence_length=32, stride=16)
    numbers, _, n_bytes = losses.per_document()
    split, lengths = database.split("valid"), token_byte_lengths(database.tokenizer)
    for number, counted in zip(numbers, n_bytes, strict=True):
        row = np.flatnonzero(split.documents[:] == number)[0]
        assert counted == database.documents[number]["bytes"] - lengths[split.tokens[[row]][0, 0]]


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(database):
    config = RetroConfig(database.vocabulary_size, 4, 4, 1, 2, 1, (), database.chunk_size)
    params = init_params(config, np.random.default_rng(0))
    params["readout"][:] = 0
    losses = score(params, config, database, k=0, sequence_length=32, stride=16)
    split = database.split("valid")
    scored = int((split.tokens[:] > 1).sum()) - len(np.unique(split.documents[:]))
    expected = scored * math.log2(database.vocabulary_size) / losses.bytes.sum()
    assert losses.bits_per_byte() == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_is_nats_divided_by_ln_2_and_by_bytes():
    assert bits_per_byte([math.log(2) * 8, 0], [3, 1]) == pytest.approx(2)
    with pytest.raises(ValueError, match="no bytes are left"):
        bits_per_byte([], [])


def test_filtered_bits_per_byte_counts_only_the_chunks_that_pass_the_filter():
    losses = Losses(np.array([1.0, 2.0, 4.0]), np.array([1, 1, 2]), np.zeros(3, int))
    figures = filtered_bits_per_byte(losses, np.array([0.5, 0.0, 1.0]), (0.0, 0.5, 1.0))
    assert figures == pytest.approx([2 / math.log(2), 1.5 / math.log(2), 7 / 4 / math.log(2)])
    assert filtered_bits_per_byte(losses, np.array([0.5, 0.5, 1.0]), (0.0,)) == [None]
    assert bits(losses, np.array([0.5, 0.125, 1.0])) == pytest.approx(
        {"bpb": 7 / 4 / math.log(2), "bpb_no_leakage": 2 / math.log(2)}
    )
    assert bits(losses, np.ones(3))["bpb_no_leakage"] is None


def test_leakage_is_the_longest_run_shared_with_a_value_divided_by_the_chunk_size(database):
    split, m = database.split("valid"), database.chunk_size
    ratios = chunk_leakage(database)
    for row in range(0, len(ratios), 5):
        chunk = split.tokens[[row]][0].tolist()
        runs = {tuple(chunk[i:j]) for i in range(m) for j in range(i + 1, m + 1) if 0 not in chunk[i:j]}
        best = 0
        for value in database.value(split.neighbours[[row]][0][:10]).tolist():
            shared = {tuple(value[i : i + s]) for s in range(1, m + 1) for i in range(2 * m - s + 1)} & runs
            best = max([best, *(len(run) for run in shared)])
        assert ratios[row] == best / m


@pytest.fixture(scope="module")
def evaluation(model, database, tmp_path_factory):
    """The results of `evaluate`, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate({"RETRO": model}, database, folder, sequence_length=32, stride=16), folder


def test_filtered_curves_end_at_the_figure_for_all_chunks(evaluation):
    results, _ = evaluation
    for name, curve in results["bpb_alpha"].items():
        assert curve[-1] == pytest.approx(results["models"][name]["bpb"])


def test_evaluate_writes_its_results_and_its_losses(evaluation):
    results, folder = evaluation
    assert set(results["models"]) == {OFF, ON, SHUFFLED}
    saved = np.load(folder / "losses.npz")
    assert saved[f"{ON}/nats"].sum() == pytest.approx(saved[f"{ON}/document_nats"].sum())
    assert saved["r"].shape == saved["bytes"].shape == (results["chunks"],)
    assert json.loads((folder / "results.json").read_text()) == results


def test_evaluate_scores_each_condition_as_score_does_and_accepts_a_path_as_text(model, database, tmp_path):
    config = small_config(database, cca_layers=(), encoder=None)
    baseline = init_params(config, np.random.default_rng(1)), config
    window = {"sequence_length": 32, "stride": 16, "limit": 9}
    figures = evaluate({"RETRO": model, "baseline": baseline}, database, str(tmp_path), **window)["models"]
    expected = {
        "baseline": score(*baseline, database, k=0, **window), OFF: score(*model, database, k=0, **window),
        ON: score(*model, database, k=2, **window),
        SHUFFLED: score(*model, database, k=2, shuffle_seed=SHUFFLE_SEED, **window),
    }  # fmt: skip
    assert list(figures) == list(LINES)
    leakage = chunk_leakage(database, limit=9)
    assert figures == {name: bits(losses, leakage) for name, losses in expected.items()}


@pytest.mark.parametrize("names", [[], ["baseline"], ["RETRO", "base"]])
def test_evaluate_refuses_missing_and_unknown_model_names(model, database, tmp_path, names):
    with pytest.raises(UserError, match="models must be"):
        evaluate(dict.fromkeys(names, model), database, tmp_path, sequence_length=32, stride=16)


def test_evaluate_refuses_a_baseline_with_cross_attention(model, database, tmp_path):
    with pytest.raises(UserError, match="the baseline has chunked cross-attention"):
        evaluate({"RETRO": model, "baseline": model}, database, tmp_path, sequence_length=32, stride=16)


def test_the_verdict_says_when_retrieval_is_not_used():
    sentence = verdict({OFF: {"bpb": 2.0}, ON: {"bpb": 1.9}, SHUFFLED: {"bpb": 2.0}}, 3)
    assert "5.00 % fewer bits than RETRO[OFF]" in sentence
    assert "its own neighbours save 5.00 %" in sentence
    sentence = verdict({OFF: {"bpb": 2.0}, ON: {"bpb": 1.9}, SHUFFLED: {"bpb": 1.9}}, 3)
    assert "does not use what it retrieves" in sentence


@pytest.mark.parametrize(
    ("documents", "clean", "near_copies", "said"),
    [
        (9, 6, 3, "in the 6 documents without a near-copy in the training text (a 13-gram similarity of 0.1 or more). "
                  "Over all 9 documents, it needs 5.00 %"),
        (9, 5, 4, "in the 5 documents without a near-copy in the training text (a 13-gram similarity of 0.1 or more), "
                  "too few for an interval. Over all 9 documents"),
        (3, 1, 2, "in the one document without a near-copy in the training text (a 13-gram similarity of 0.1 or more), "
                  "too few for an interval. Over all 3 documents"),
        (3, 0, 3, "5.00 % fewer bits than RETRO[OFF] over all 3 documents, and there is none without a near-copy"),
        (1, 0, 1, "over the one document, and there is none without a near-copy"),
        (3, 0, None, "over all 3 documents, near-copies of the training text included"),
    ],
)  # fmt: skip
def test_the_sentence_says_which_documents_its_figure_is_over(documents, clean, near_copies, said):
    part = {"documents": clean, "models": {OFF: 2.0, ON: 1.8}} if clean else None
    sentence = verdict({OFF: {"bpb": 2.0}, ON: {"bpb": 1.9}}, documents, part, near_copies)
    assert said in sentence
    assert sentence.startswith(f"With retrieval on, RETRO needs {'10.00' if clean else '5.00'} % fewer bits")


WRONG = {
    "params": (None, "params must be of type dict, not NoneType"), "config": ({}, "config must be of type RetroConfig"),
    "database": ("runs/db", "database must be of type Database, not str"), "k": (-1, "k must be a whole number of at"),
    "sequence_length": (32.0, "sequence_length must be a whole number"), "limit": (0, "limit must be a whole number"),
    "shuffle_seed": (-1, "shuffle_seed must be a whole number of at least 0, not -1"),
    "retrieval": ([], "retrieval must be of type"), "stride": (True, "stride must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(model, database, name):
    arguments = {"params": model[0], "config": model[1], "database": database, "sequence_length": 32, "stride": 16}
    with pytest.raises((UserError, TypeError)) as error:
        score_tokens(**arguments | {name: WRONG[name][0]})
    assert str(error.value).startswith(WRONG[name][1])


def test_a_model_that_is_no_pair_is_refused(model, database, tmp_path):
    with pytest.raises(UserError, match=r"the model 'RETRO' must be a pair \(params, config\)"):
        evaluate({"RETRO": (*model, database.tokenizer)}, database, tmp_path, sequence_length=32, stride=16)


def test_lengths_that_do_not_fit_and_a_missing_split_are_refused(model, database):
    with pytest.raises(UserError, match="stride must be at most"):
        score(*model, database, sequence_length=16, stride=32)
    with pytest.raises(UserError, match="stride must be a multiple of the chunk size, 8, not 3"):
        score(*model, database, sequence_length=32, stride=3)
    with pytest.raises(UserError, match="no split 'held-out'"):
        score(*model, database, "held-out", sequence_length=32, stride=16)
