"""Ground truth: n-grams counted by hand, and the texts in the database."""

import json

import numpy as np
import pytest

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments.experiment import run_experiment
from retro_np.experiments.samples import (
    MEASURES,
    PROMPT_CHUNKS,
    TINY_PROMPTS,
    n_grams,
    prompts_and_rests,
    repeated,
    shared,
    verdict,
)


def test_n_grams_are_the_slices_at_each_position_except_those_with_padding():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 5, (3, 2, 11))
    slices = [tuple(row[i : i + 4].tolist()) for row in rows.reshape(-1, 11) for i in range(8)]
    assert n_grams(rows) == [gram for gram in slices if 0 not in gram]


def test_shares_equal_counts_by_hand():
    text = np.array([5, 6, 7, 8, 9])
    sample = np.array([1, 5, 6, 7, 8, 2, 5, 6, 7, 8])  # seven 4-grams, 5 6 7 8 twice
    assert shared(sample, text) == pytest.approx(2 / 7)
    assert repeated(sample) == pytest.approx(1 / 7)
    assert shared(sample, text[None, ::-1]) == 0
    assert shared(text, np.stack([text, text])) == 1


def test_a_sample_shorter_than_an_n_gram_shares_and_repeats_nothing():
    assert shared(np.array([1, 2, 3]), np.array([1, 2, 3, 4])) == repeated(np.array([1, 2, 3])) == 0


def test_prompt_and_rest_are_the_text_of_a_held_out_document(database):
    parts = prompts_and_rests(database, 3)
    assert len({number for number, _, _ in parts}) == len(parts) == 3
    split = database.split("valid")
    for number, prompt, rest in parts:
        assert database.documents[number]["split"] == "valid"
        assert len(prompt) == PROMPT_CHUNKS * database.chunk_size
        text = database.text(split.tokens[np.flatnonzero(split.documents[:] == number)].reshape(-1))
        assert database.text([*prompt, *rest]) == text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def result(folder):
    return run_experiment("samples", folder, "tiny", 1)


@pytest.mark.slow
def test_the_experiment_writes_figures_texts_and_a_page(result, folder):
    figures = result["figures"]
    assert figures["prompts"] == TINY_PROMPTS == len(figures["texts"])
    for name in MEASURES:
        for line in (ON, OFF):
            assert all(0 <= share <= 1 for share in figures["shares"][name][line]["seeds"])
    page = (folder / figures["page"]).read_text(encoding="utf-8")
    for text in figures["texts"]:
        assert text["prompt"]
        assert text[ON] != text[OFF]
        assert f"{text['document']}, {ON}" in page


@pytest.mark.slow
def test_the_verdict_follows_the_difference(result):
    figures = json.loads(json.dumps(result["figures"]))
    for gain in (0.01, 0.0, -0.01):
        figures["gain"]["mean"] = gain
        agrees, sentence = verdict(figures)
        assert agrees is (gain > 0)
        assert f"{100 * gain:+.1f}" in sentence
