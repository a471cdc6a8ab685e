"""Question answering with passages as neighbours: format, fine-tuning, greedy answers, exact match. Paper §4.3, C.4.

    chunk 1, m tokens      padding …  question: {q} \\n answer:
    chunk 2, m tokens      {a} end-of-text  padding …
    neighbours of chunk 1  k passages "title: {title}, source: {source}", 2m tokens each

The question is padded on its left so that its last token ends the chunk. This token is the first that reads the
passages (eq. 3), and the answer's first token is predicted from it."""

import re
import string
from collections.abc import Iterable
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.generation import decode_tokens, sample_token
from retro_np.optim import adamw_init
from retro_np.progress import progress_bar
from retro_np.retrieval.tokenizer import decode, encode_batch
from retro_np.retrieval.vocabulary import special_ids
from retro_np.sequences import NO_TARGET
from retro_np.training.batches import sequence_rows
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import train_step
from retro_np.tree import Tree, map_tree

QUESTION, ANSWER = "question: {} \n answer:", " {}"


def question_chunks(tokenizer: Tokenizer, questions: list[str], m: int) -> np.ndarray:
    """Questions as first chunks, (N, m), padded on the left. Raises UserError for a question that does not fit."""
    return _padded(tokenizer, map(QUESTION.format, questions), m, left=True)


def answer_chunks(tokenizer: Tokenizer, answers: list[str], m: int) -> np.ndarray:
    """Answers and their end-of-text as second chunks, (N, m). Raises UserError for an answer that does not fit."""
    return _padded(tokenizer, map(ANSWER.format, answers), m, end=[special_ids(tokenizer).end_of_text])


def passage_values(tokenizer: Tokenizer, passages: list[tuple[str, str]], m: int) -> np.ndarray:
    """Passages, given as (title, source), as neighbours (N, 2m), cut or padded to this length."""
    return _padded(tokenizer, [f"title: {title}, source: {source}" for title, source in passages], 2 * m, cut=True)


def fits(tokenizer: Tokenizer, questions: list[str], answers: list[str], m: int) -> np.ndarray:
    """Whether question and answer fit into a chunk each, (N,) bool, so that the functions above accept them."""
    question_tokens = encode_batch(tokenizer, list(map(QUESTION.format, questions)))
    answer_tokens = encode_batch(tokenizer, list(map(ANSWER.format, answers)))
    return np.array([max(len(q), len(a) + 1) <= m for q, a in zip(question_tokens, answer_tokens, strict=True)], bool)


def qa_batch(questions: np.ndarray, answers: np.ndarray, padding: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, (B, 2m − 1) each, from question and answer chunks (B, m). Targets: the answer and its end.

    The second chunk's last token predicts nothing. Without this token the chunk is incomplete and has no neighbours."""
    sequence = np.concatenate([questions, answers], axis=1)
    tokens, targets = sequence[:, :-1], sequence[:, 1:].copy()
    targets[:, : questions.shape[1] - 1] = NO_TARGET
    targets[targets == padding] = NO_TARGET
    return tokens, targets


def fine_tune(
    params: Tree, config: RetroConfig, questions: np.ndarray, answers: np.ndarray, passages: np.ndarray | None,
    passage_rows: np.ndarray | None, training: TrainingConfig, description: str = "fine-tuning",
) -> Tree:  # fmt: skip
    """Train all weights to answer questions. Returns new parameters; `params` is not changed.

    questions, answers: (N, m). passages: (P, 2m); passage_rows: (N, k), each question's rows of passages; both None
    for a closed book. training: its steps, batch_size, micro_batches, learning_rate, warmup, weight_decay, clip and
    seed are used. Raises UserError for a decoder that others trained, and if the loss is not finite."""
    if not config.is_retro:
        raise UserError("a decoder that others trained has no padding for questions: train a model for the database")
    params = map_tree(lambda _, array: array.copy(), params)
    state = adamw_init(params)
    with progress_bar(description, training.steps) as advance:
        for step in range(training.steps):
            rows = sequence_rows(len(questions), 1, training.batch_size, training.seed, step)[:, 0]
            neighbours = None if passages is None or passage_rows is None else passages[passage_rows[rows]][:, None]
            batch = (*qa_batch(questions[rows], answers[rows], config.padding_id), neighbours)
            line = train_step(params, state, config, batch, training, step)
            advance(note=f"loss {line['loss']:.3f}")
    return params


def answer(
    params: Tree, config: RetroConfig, question: np.ndarray, passages: np.ndarray | None, end_of_text: int
) -> np.ndarray:
    """Decode greedily until end-of-text or the end of the second chunk: (≤ m,) int64, without end-of-text.

    question: (m,), from `question_chunks`; passages: (k, 2m), or None for a closed book. end_of_text: its id."""
    greedy = partial(sample_token, rng=np.random.default_rng(0), temperature=0, padding_id=config.padding_id)
    tokens = decode_tokens(params, config, question, config.chunk_size, greedy, lambda *_: passages, end_of_text)
    return tokens[tokens != end_of_text]


def answers_of(
    params: Tree, config: RetroConfig, tokenizer: Tokenizer, questions: np.ndarray, passages: np.ndarray | None = None,
    passage_rows: np.ndarray | None = None, description: str = "answering",
) -> list[str]:  # fmt: skip
    """The text of each question's answer; arguments as in `fine_tune` and `answer`."""
    texts, end_of_text = [], special_ids(tokenizer).end_of_text
    with progress_bar(description, len(questions), unit="questions") as advance:
        for row, question in enumerate(questions):
            retrieved = None if passages is None or passage_rows is None else passages[passage_rows[row]]
            texts.append(decode(tokenizer, answer(params, config, question, retrieved, end_of_text)).strip())
            advance()
    return texts


def exact_match(prediction: str, accepted: Iterable[str]) -> bool:
    """Whether a prediction equals an accepted answer after normalisation. Rajpurkar et al. 2016 (SQuAD)."""
    return normalised(prediction) in map(normalised, accepted)


def normalised(text: str) -> str:
    """The text in lower case, without ASCII punctuation and articles, and with single spaces."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


def _padded(tokenizer, texts, width, *, left=False, cut=False, end=()) -> np.ndarray:
    """The tokens of texts, each followed by `end`, as padded rows: (N, width)."""
    texts = list(texts)
    rows = np.full((len(texts), width), special_ids(tokenizer).padding, np.int64)
    for row, text, tokens in zip(rows, texts, encode_batch(tokenizer, texts), strict=True):
        tokens = [*tokens, *end][: width if cut else None]
        if len(tokens) > width:
            raise UserError(f"{text!r} needs {len(tokens)} tokens, but its chunk has room for {width}")
        start = width - len(tokens) if left else 0
        row[start : start + len(tokens)] = tokens
    return rows
