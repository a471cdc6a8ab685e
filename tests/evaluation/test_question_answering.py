"""Ground truth: the format spelt out, full forward passes, AdamW steps by hand, and a table of SQuAD's rules."""

from dataclasses import replace

import foreign_models as foreign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import EncoderConfig, RetroConfig, adamw_init, adamw_update, init_params, retro, retro_loss
from retro_np.errors import UserError
from retro_np.evaluation.question_answering import (
    answer,
    answer_chunks,
    answers_of,
    exact_match,
    fine_tune,
    fits,
    normalised,
    passage_values,
    qa_batch,
    question_chunks,
)
from retro_np.experiments import question_answering as experiment
from retro_np.experiments.lab import SCALES, Lab
from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.operators import log_softmax
from retro_np.optim import clip_by_global_norm
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.corpus import held_out
from retro_np.retrieval.tokenizer import decode, encode
from retro_np.training.batches import sequence_rows
from retro_np.training.config import TrainingConfig
from retro_np.tree import named_leaves

M = 64
QUESTIONS, ANSWERS = ["value of token", "who is self", ""], ["index", "a chunk, a neighbour", "*args"]


@pytest.fixture(scope="module")
def tokenizer(database):
    return database.tokenizer


def test_a_question_chunk_ends_with_answer_and_a_colon_and_is_padded_on_the_left(tokenizer):
    ending = encode(tokenizer, " answer:")
    for row, question in zip(question_chunks(tokenizer, QUESTIONS, M), QUESTIONS, strict=True):
        assert len(row) == M
        assert decode(tokenizer, row[-len(ending) :]) == " answer:"
        assert row[M - 1] == ending[-1]
        assert decode(tokenizer, row) == f"question: {question} \n answer:"
        padding = np.flatnonzero(row == 0)
        assert padding.tolist() == list(range(len(padding)))


def test_question_and_answer_chunks_are_the_tokens_of_the_complete_text_and_end_of_text(tokenizer):
    rows = np.hstack([question_chunks(tokenizer, QUESTIONS, M), answer_chunks(tokenizer, ANSWERS, M)])
    for row, q, a in zip(rows, QUESTIONS, ANSWERS, strict=True):
        assert row[row != 0].tolist() == [*encode(tokenizer, f"question: {q} \n answer: {a}"), 1]
        end = int(np.flatnonzero(row == 1)[0])
        assert end >= M
        assert not row[end + 1 :].any()


def test_a_passage_is_cut_or_padded_to_two_chunks(tokenizer):
    passages = [("retro.py", "def f(x):"), ("retro.py", "def f(x):\n" + "    x += 1\n" * 50)]
    rows = passage_values(tokenizer, passages, M)
    for row, (title, source) in zip(rows, passages, strict=True):
        tokens = encode(tokenizer, f"title: {title}, source: {source}")
        assert row.tolist() == (tokens + [0] * (2 * M))[: 2 * M]
    assert rows[0, -1] == 0
    assert rows[1, -1] != 0


def test_fits_says_which_questions_and_answers_are_accepted(tokenizer):
    texts = ["x" * length for length in range(40)]
    for m in (24, 30):
        question_fits = fits(tokenizer, texts, ["a"] * len(texts), m)
        answer_fits = fits(tokenizer, [""] * len(texts), texts, m)
        assert 0 < question_fits.sum() < len(texts)
        assert 0 < answer_fits.sum() < len(texts)
        for text, as_question, as_answer in zip(texts, question_fits, answer_fits, strict=True):
            for accepted, make in ((as_question, question_chunks), (as_answer, answer_chunks)):
                if accepted:
                    make(tokenizer, [text], m)
                else:
                    with pytest.raises(UserError, match="tokens, but its chunk has room for"):
                        make(tokenizer, [text], m)


def test_targets_are_the_answer_and_its_end_one_position_early(tokenizer):
    questions, answers = question_chunks(tokenizer, QUESTIONS, M), answer_chunks(tokenizer, ANSWERS, M)
    tokens, targets = qa_batch(questions, answers, 0)
    assert tokens.shape == targets.shape == (3, 2 * M - 1)
    for row, text in enumerate(ANSWERS):
        expected = [*encode(tokenizer, f" {text}"), 1]
        positions = np.flatnonzero(targets[row] >= 0)  # −1 where there is nothing to predict
        assert positions.tolist() == list(range(M - 1, M - 1 + len(expected)))
        assert targets[row, positions].tolist() == expected
        assert tokens[row, positions[1:]].tolist() == expected[:-1]
        assert tokens[row, :M].tolist() == questions[row].tolist()


def random_questions(m, k, seed, n=5):
    """Random questions and answers (n, m), passages (9, 2m) and each question's rows of them (n, k)."""
    rng = np.random.default_rng(seed)
    questions, answers = rng.integers(2, 11, (n, m)), rng.integers(2, 11, (n, m))
    questions[0, : m // 2] = 0
    answers[np.arange(n), rng.integers(0, m, n)] = 1
    answers[np.cumsum(answers == 1, axis=1) - (answers == 1) > 0] = 0
    passages = rng.integers(2, 11, (9, 2 * m))
    passages[0, m:] = 0
    return questions, answers, passages, rng.integers(0, 9, (n, k))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_that_of_two_complete_chunks_with_neighbours_for_the_first_chunk(m, k, seed):
    config, (questions, answers, passages, passage_rows) = replace(CONFIG, chunk_size=m), random_questions(m, k, seed)
    params = perturbed_params(config, seed)
    loss, _ = retro_loss(params, config, *qa_batch(questions, answers, 0), passages[passage_rows][:, None])
    sequence = np.concatenate([questions, answers], axis=1)
    neighbours = np.stack([passages[passage_rows], np.zeros((5, k, 2 * m), int)], axis=1)
    log_p = log_softmax(retro(params, config, sequence, neighbours)[0])
    nats = [-log_p[b, m - 1 + i, a] for b in range(5) for i, a in enumerate(answers[b]) if a != 0]
    assert float(loss) == pytest.approx(np.mean(nats), rel=1e-10)


@pytest.mark.parametrize("with_passages", [True, False])
def test_fine_tuning_takes_adamws_steps_along_the_gradients_of_retro_loss(with_passages):
    questions, answers, passages, passage_rows = random_questions(3, 2, seed=1)
    training = TrainingConfig(steps=3, batch_size=2, learning_rate=1e-2, warmup=0, seed=4)
    start = perturbed_params(CONFIG)
    given_passages = passages if with_passages else None
    tuned = fine_tune(start, CONFIG, questions, answers, given_passages, passage_rows, training)

    params = perturbed_params(CONFIG)
    state = adamw_init(params)
    for step, rate in enumerate([1e-2, 0.55e-2, 1e-3]):  # a cosine down to a tenth of the peak
        rows = sequence_rows(5, 1, 2, 4, step)[:, 0]
        sequence = np.concatenate([questions[rows], answers[rows]], axis=1)
        targets = np.where(np.arange(1, 6) >= 3, sequence[:, 1:], 0)
        neighbours = passages[passage_rows[rows]][:, None] if with_passages else None
        _, vjp = retro_loss(params, CONFIG, sequence[:, :-1], targets, neighbours)
        grads = vjp(1.0)
        clip_by_global_norm(grads, 1.0)
        adamw_update(params, grads, state, lr=rate)
    for (name, array), (_, expected) in zip(named_leaves(tuned), named_leaves(params), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    for (name, array), (_, original) in zip(named_leaves(start), named_leaves(perturbed_params(CONFIG)), strict=True):
        assert np.array_equal(array, original), name
    assert not np.array_equal(tuned["embedding"], start["embedding"])


def test_a_loss_that_is_not_finite_stops_fine_tuning_and_names_the_step():
    questions, answers, passages, passage_rows = random_questions(3, 2, seed=1)
    params = perturbed_params(CONFIG)
    params["readout"][:] = np.nan
    with pytest.raises(UserError, match="step 0"):
        fine_tune(params, CONFIG, questions, answers, passages, passage_rows, TrainingConfig(steps=1, batch_size=2))


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_answers_are_the_most_likely_tokens_of_the_full_forward_pass(m, k, seed):
    config, (questions, _, passages, passage_rows) = replace(CONFIG, chunk_size=m), random_questions(m, max(k, 1), seed)
    params = perturbed_params(config, seed)
    context = passages[passage_rows[0]] if k else None  # k = 0: closed book
    tokens = list(questions[0])
    while len(tokens) < 2 * m and 1 not in tokens[m:]:
        logits, _ = retro(params, config, np.array([tokens]), None if context is None else context[None, None])
        logits[..., 0] = -np.inf  # padding is never sampled
        tokens.append(int(logits[0, -1].argmax()))
    assert answer(params, config, questions[0], context, 1).tolist() == [token for token in tokens[m:] if token != 1]


def test_answers_of_reads_each_questions_own_passages_and_returns_texts(database):
    rng, config = np.random.default_rng(3), replace(CONFIG, vocabulary_size=database.vocabulary_size)
    params = perturbed_params(config)
    questions, passages = rng.integers(2, 290, (4, 3)), rng.integers(2, 290, (6, 6))
    passage_rows = rng.integers(0, 6, (4, 2))
    texts = answers_of(params, config, database.tokenizer, questions, passages, passage_rows)
    for text, question, rows in zip(texts, questions, passage_rows, strict=True):
        assert text == decode(database.tokenizer, answer(params, config, question, passages[rows], 1)).strip()


def test_with_a_foreign_tokenizer_chunks_have_its_padding_and_end_of_text_and_its_token_0_is_a_target():
    tokenizer = foreign.tokenizer()
    padding, end = map(tokenizer.token_to_id, (foreign.PAD, foreign.END))
    zero = tokenizer.decode([0])
    questions, answers = question_chunks(tokenizer, ["f"], 32), answer_chunks(tokenizer, [f"a{zero}"], 32)
    question = tokenizer.encode("question: f \n answer:").ids
    assert questions[0].tolist() == [padding] * (32 - len(question)) + question
    expected = [*tokenizer.encode(f" a{zero}").ids, end]
    assert 0 in expected
    assert answers[0].tolist() == expected + [padding] * (32 - len(expected))
    assert passage_values(tokenizer, [("t", "s")], 32)[0, -1] == padding
    _, targets = qa_batch(questions, answers, padding)
    assert targets[0].tolist() == [-1] * 31 + expected + [-1] * (32 - len(expected))


def test_an_answer_ends_at_a_foreign_end_of_text_and_may_contain_the_tokens_0_and_1():
    m, padding, end = 4, 12, 13
    config = replace(CONFIG, vocabulary_size=14, chunk_size=m, padding_id=padding, cca_layers=(), encoder=None)
    kinds = set()
    for seed in range(60):
        params = perturbed_params(config, seed)
        params["readout"][:, [0, 1, end]] *= 3  # so that answers have these tokens
        tokens = [padding, 2, 3, 4]
        while len(tokens) < 2 * m and end not in tokens:
            logits, _ = retro(params, config, np.array([tokens]), None)
            logits[..., padding] = -np.inf  # padding is never sampled
            tokens.append(int(logits[0, -1].argmax()))
        expected = [token for token in tokens[m:] if token != end]
        assert answer(params, config, np.array(tokens[:m]), None, end).tolist() == expected
        kinds |= {*expected, *([end] if end in tokens else [])}
    assert {0, 1, end} <= kinds


def test_a_decoder_of_others_is_not_fine_tuned_on_questions_and_the_error_says_so():
    questions, answers, _, _ = random_questions(3, 1, seed=1)
    config = DecoderConfig(32, 8, 16, 2, 4, 2)
    with pytest.raises(UserError, match="has no padding for questions: train a model for the database"):
        fine_tune({}, config, questions, answers, None, None, TrainingConfig(steps=1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Answer", "answer"),
        ("a cat, an owl and the\tdog.\n", "cat owl and dog"),
        ("theatre Anatomy banana", "theatre anatomy banana"),
        ("U.S.A.", "usa"),
        ("self, file_name=None", "self filenamenone"),
        ("an", ""),
        ("", ""),
        ("(The) end!", "end"),
        ("Zoë's", "zoës"),
    ],
)
def test_texts_are_normalised_as_in_squad(text, expected):
    assert normalised(text) == expected


def test_an_exact_match_needs_a_complete_accepted_answer():
    assert exact_match("The United States", ["USA", "united states"])
    assert not exact_match("United States of America", ["USA", "united states"])
    assert not exact_match("", ["USA"])
    assert not exact_match("USA", [])


@pytest.mark.slow
def test_a_model_learns_to_answer_what_only_its_passages_say():
    """Ground truth by construction: each question pairs a random key with a random value."""
    rng, n, n_trained = np.random.default_rng(0), 2000, 1900
    keys, values = rng.integers(10, 30, n), rng.integers(30, 50, n)
    questions, answers, passages = np.zeros((n, 4), int), np.zeros((n, 4), int), np.zeros((n, 8), int)
    questions[:, 2], questions[:, 3] = keys, 2
    answers[:, 0], answers[:, 1] = values, 1
    passages[:, 0], passages[:, 1] = keys, values
    config = RetroConfig(
        50, 32, 64, 2, 16, 2, (2,), 4, EncoderConfig(32, 64, 2, 16, 1), share_embeddings=True, tie_readout=True,
        copying_start=True,
    )  # fmt: skip
    training = TrainingConfig(steps=150, batch_size=32, learning_rate=1e-2, warmup=10)
    params = fine_tune(
        init_params(config, rng), config, questions[:n_trained], answers[:n_trained], passages, np.arange(n)[:, None],
        training,
    )  # fmt: skip

    def accuracy(passages_of):
        given_answers = (answer(params, config, questions[i], passages_of(i), 1) for i in range(n_trained, n))
        return np.mean(
            [tokens.tolist() == [value] for tokens, value in zip(given_answers, values[n_trained:], strict=True)]
        )

    assert accuracy(lambda i: passages[i : i + 1]) > 0.9
    assert accuracy(lambda i: None) < 0.3  # 0.05 by chance


SOURCE = '''import os

class Chunk(dict):
    @property
    def first(self): return 1

    async def read(self, path, *, mode="r", **options):
        """Read."""
        def each(line):
            return line
        return each

    @classmethod
    def make(cls,
             value):
        return cls(value)

def nothing():
    pass
'''


def test_functions_are_found_with_their_source_and_their_arguments_without_self():
    functions = {name: (arguments, source) for name, arguments, source in experiment.functions_in(SOURCE)}
    assert {name: arguments for name, (arguments, _) in functions.items()} == {
        "first": 0, "read": 3, "each": 1, "make": 1, "nothing": 0,
    }  # fmt: skip
    assert functions["each"][1] == "def each(line):\n            return line"
    assert functions["read"][1].startswith('async def read(self, path, *, mode="r", **options):\n        """Read."""\n')
    assert list(experiment.functions_in("def f(:")) == []
    assert list(experiment.functions_in("x = '\0'")) == []


def test_questions_ask_for_names_that_occur_once_with_arguments_in_the_first_line():
    functions = [experiment.Function("m.py", "train", *definition) for definition in experiment.functions_in(SOURCE)]
    named = [f.name for f, ask in zip(functions, experiment.asked(functions), strict=True) if ask]
    assert sorted(named) == ["each", "read"]
    assert not experiment.asked(functions * 2).any()
    each = next(f for f in functions if f.name == "each")
    assert (each.question, each.answer) == ("definition of each", "def each(line):")


def test_functions_are_those_of_the_documents_and_have_their_splits(tmp_path, embedder):
    (tmp_path / "docs").mkdir()
    for number in range(12):
        (tmp_path / "docs" / f"m{number}.py").write_text(f"def f{number}(é):\n    return '{number}'\n" * (number + 1))
    build = BuildConfig(chunk_size=8, vocabulary_size=280, held_out=0.4, duplicates=None)
    database = build_database(tmp_path / "docs", tmp_path / "db", build, embedder)
    functions = experiment.functions_of(database)
    assert len({f.split for f in functions}) == 2
    assert sorted(f.module for f in functions) == sorted(f"m{n}.py" for n in range(12) for _ in range(n + 1))
    for f in functions:
        number = f.module[1:-3]
        assert f.source == f"def f{number}(é):\n    return '{number}'"
        assert (f.split == "valid") == held_out(f.module, 0.4)


def figures(closed_book, open_book):
    return {
        "exact_match": dict.fromkeys(experiment.PASSAGES_GIVEN, closed_book) | {experiment.OPEN: open_book},
        "recall": {part: {str(k): 0.5 for k in experiment.PASSAGE_COUNTS} for part in ("train", "test")},
        "questions": {"train": 1000, "test": 10},
    }


def test_the_verdict_agrees_if_passages_help_and_the_figure_is_drawn(tmp_path):
    agrees, sentence = experiment.verdict(figures(0.1, 0.4))
    assert agrees
    assert "40.0 %" in sentence
    assert not experiment.verdict(figures(0.1, 0.1))[0]
    experiment.draw(figures(0.1, 0.4), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_experiment_measures_and_reuses_its_models(tmp_path, monkeypatch):
    lab = Lab(tmp_path, SCALES["tiny"])
    measured = experiment.measure(lab)
    assert set(measured["exact_match"]) == set(experiment.PASSAGES_GIVEN)
    assert measured["recall"]["test"]["1"] <= measured["recall"]["test"]["20"]
    assert measured["questions"]["train"] > measured["questions"]["test"] > 0
    monkeypatch.setattr(experiment.qa, "fine_tune", None)
    assert experiment.measure(lab) == measured
