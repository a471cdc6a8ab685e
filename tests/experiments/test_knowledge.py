"""Ground truth: random codes, which only the database contains, and greedy decoding."""

import json

import numpy as np
import pytest

from retro_np import generate, init_params
from retro_np.evaluation.compare import OFF, ON, SHUFFLED
from retro_np.experiments import knowledge, recipe
from retro_np.experiments.experiment import run_experiment
from retro_np.experiments.facts import CHUNK, DIGITS, WORDINGS, document, invent, questions, write_facts
from retro_np.experiments.knowledge import ANSWER_LINES, REMAINING, REMOVED, SWAPPED, verdict
from retro_np.experiments.lab import SCALES, Lab, Model

FACTS = invent(12, seed=3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), SCALES["tiny"], 1)


@pytest.fixture(scope="module")
def told_database(lab):
    return knowledge._database(lab, "told", FACTS, ("told",))


def test_a_document_has_two_chunks_the_first_with_the_name_and_the_second_with_the_code(told_database):
    for fact in FACTS:
        assert fact.told != fact.asked
        for wording in range(len(WORDINGS)):
            text = document(fact, wording)
            assert fact.name in text[:CHUNK]
            assert fact.code in text[CHUNK:]
            assert len(text) < 2 * CHUNK  # room for the end-of-text token
    assert told_database.n_chunks == 2 * len(FACTS)


def test_the_positions_of_a_question_are_those_of_its_code(told_database):
    tokens, positions = questions(told_database.tokenizer, FACTS)
    for fact, row, position in zip(FACTS, tokens, positions, strict=True):
        assert told_database.text(row) == document(fact, fact.asked)
        assert told_database.text(row[position]) == fact.code
        assert len(fact.code) == DIGITS


def test_other_codes_replaces_the_codes_and_keeps_names_and_wordings():
    changed = knowledge.other_codes(FACTS, seed=0)
    assert [(f.name, f.told, f.asked) for f in changed] == [(f.name, f.told, f.asked) for f in FACTS]
    assert all(new.code != old.code for new, old in zip(changed, FACTS, strict=True))


def test_the_documents_that_tell_the_codes_come_before_those_that_ask_for_them(tmp_path):
    lines = write_facts(tmp_path / "f.jsonl", FACTS, ("told", "asked")).read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    assert names == [f"{fact.name} {suffix}" for suffix in ("told", "asked") for fact in FACTS]


def greedy(model, database, told_database, fact):
    """The code that `generate` gives with greedy decoding and its own retrieval."""
    text_before_code = WORDINGS[fact.asked][1]
    prompt = questions(told_database.tokenizer, [fact])[0][0, : CHUNK + len(text_before_code)]
    tokens, _ = generate(model.params, model.config, prompt, DIGITS, database=database, k=1, temperature=0)
    return told_database.text(tokens)


def test_the_share_of_right_answers_equals_that_of_greedy_decoding(told_database):
    config = recipe.retro_config(told_database.vocabulary_size, CHUNK, d_model=16, n_layers=2)
    model = Model(init_params(config, np.random.default_rng(0)), config, "untrained")
    for k, database in ((1, told_database), (0, None)):
        decoded = np.mean([greedy(model, database, told_database, fact) == fact.code for fact in FACTS])
        assert knowledge.answers(model, FACTS, told_database, k=k)["right"] == decoded


@pytest.mark.slow
def test_the_experiment_runs_and_its_verdict_does_not_agree_with_the_claim_after_six_steps(tmp_path):
    result = run_experiment("knowledge", tmp_path, "tiny", 1)
    lines = result["figures"]["lines"]
    assert set(lines) == set(ANSWER_LINES)
    for name in ANSWER_LINES:
        assert 0 <= lines[name]["right"]["mean"] <= 1
        assert lines[name]["bits"]["mean"] > 0
    assert result["verdict"] == "disagrees"
    assert (tmp_path / "tiny" / "knowledge.png").stat().st_size > 0


def test_the_verdict_depends_on_every_condition():
    def lines(**changed):
        shares = {name: 1.0 if name in (ON, SWAPPED, REMAINING) else 0.0 for name in ANSWER_LINES} | changed
        right = {name: dict.fromkeys(("mean", "from", "to"), share) for name, share in shares.items()}
        return {name: {"right": share, "bits": {"mean": 1.0}} for name, share in right.items()}

    other_figures = {"asked": 1, "chance": 0.1, "chance_bits": 3.3, "old_codes_after_swap": {"mean": 0.0}, "found": 1.0}
    assert verdict({"lines": lines(), **other_figures})[0]
    for name in ANSWER_LINES:
        assert not verdict({"lines": lines(**{name: 0.5}), **other_figures})[0]


@pytest.mark.slow
def test_answers_need_retrieval_and_follow_the_database(tmp_path):
    lab = Lab(tmp_path, SCALES["small"], 1)
    figures = knowledge.measure(lab)
    right = {name: figures["lines"][name]["right"]["mean"] for name in ANSWER_LINES}
    assert right[ON] >= 0.9
    assert right[SWAPPED] >= 0.9  # the new codes, from a database with other codes for the same names
    assert right[REMAINING] >= 0.9
    # The probability that at least two of 256 guesses at one of 30,240 codes are right is about 1 in 28,000.
    assert max(right[name] for name in (OFF, SHUFFLED, REMOVED)) <= 1 / 256
    assert figures["old_codes_after_swap"]["mean"] <= 1 / 256
    assert figures["lines"][OFF]["bits"]["mean"] > 0.95 * figures["chance_bits"]

    database, (facts, told_database), _ = knowledge.setting(lab)
    model = knowledge.train_model(lab, database, 0)  # loaded from the lab
    for source, lower, upper in ((told_database, 0.9, 1), (None, 0, 0.05)):
        decoded = np.mean([greedy(model, source, told_database, fact) == fact.code for fact in facts[:20]])
        assert lower <= decoded <= upper
