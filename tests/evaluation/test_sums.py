"""Rows of `evaluate` that mix two memories. Ground truth: mixtures computed here, with every weight tried."""

import numpy as np
import pytest
from memory_runs import M, build, train_memory, write_decoder

from retro_np import Database, evaluate
from retro_np.evaluation.knn_lm import MIXTURE_WEIGHTS
from retro_np.pretrained.models import load_pretrained

WINDOWS = {"sequence_length": 6 * M, "stride": 2 * M, "limit": 40}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The figures of a memory with every row, and the nats of each token."""
    work = tmp_path_factory.mktemp("sums")
    model = write_decoder(work / "model")
    database = Database.open(build(work / "db", model / "tokenizer.json"))
    train_memory(database, model, work / "run")
    memory = load_pretrained(work / "run")[:2]
    also = ("in-context", "knn-lm", "cache")
    settings = {"k": 1, "keys": 300, "also": also, "token_losses": True, "parts": False}
    figures = evaluate({"RETRO": memory}, database, work / "out", **settings, **WINDOWS)
    with np.load(work / "out" / "tokens.npz") as tokens:
        return figures, dict(tokens)


def best_of_other_half(first, second, documents):
    """Nats of the mixture whose weight is the best for the documents of the other half, by trying each."""
    half = np.unique(documents, return_inverse=True)[1] % 2
    mixtures = [-np.log((1 - w) * np.exp(-first) + w * np.exp(-second)) for w in MIXTURE_WEIGHTS]
    best = [min(mixtures, key=lambda nats: nats[half != which].sum()) for which in (0, 1)]
    return np.where(half == 0, *best)


def test_the_memory_is_mixed_with_each_other_method(results):
    figures, tokens = results
    rows = {"in-context", "knn-lm", "cache", "on+in-context", "on+knn-lm", "on+cache"}
    assert rows <= figures["models"].keys()
    assert rows <= {name.removesuffix("/nats") for name in tokens}


def test_the_sum_with_a_prompt_is_the_mixture_that_is_best_for_the_other_half_of_the_documents(results):
    _, tokens = results
    on, prompt = tokens["RETRO[ON]/nats"], tokens["in-context/nats"]
    expected = best_of_other_half(on, prompt, tokens["documents"])
    assert np.any(expected != on)  # The prompt changes something.
    np.testing.assert_allclose(tokens["on+in-context/nats"], expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["knn-lm", "cache"])
def test_a_sum_needs_no_more_bits_than_the_memory_where_its_weight_is_chosen(results, name):
    _, tokens = results
    half = np.unique(tokens["documents"], return_inverse=True)[1] % 2
    on, both = tokens["RETRO[ON]/nats"], tokens[f"on+{name}/nats"]
    assert not np.array_equal(on, both)
    # Random weights predict badly, so each half's choice helps the other as well.
    assert all(both[half == which].sum() < on[half == which].sum() for which in (0, 1))
