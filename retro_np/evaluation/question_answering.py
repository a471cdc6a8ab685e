"""Questions, with passages in the neighbours' place: format, fine-tuning, greedy answers, exact match. Paper §4.3, C.4.

    chunk 1, m tokens      padding …  question: {q} \\n answer:
    chunk 2, m tokens      {a} end-of-text  padding …
    neighbours of chunk 1  k passages "title: {title}, source: {source}", 2m tokens each

The question's last token is the first that reads the passages (eq. 3), and it is the one that the answer's first token
is predicted from: this is why the question is padded on its left.
"""

import re
import string
from collections.abc import Iterable

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.generation import sample_token
from retro_np.nn.incremental import Cache, extend, segments
from retro_np.optim import adamw_init
from retro_np.progress import progress_bar
from retro_np.retrieval.tokenizer import END_OF_TEXT, PADDING, decode, encode_batch
from retro_np.training.batches import sequence_rows
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import train_step
from retro_np.tree import Tree, map_tree

QUESTION, ANSWER = "question: {} \n answer:", " {}"
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def question_chunks(tokenizer, questions: list[str], m: int) -> np.ndarray:
    """Questions as whole first chunks, (N, m), padding on the left. Raises UserError for one that does not fit."""
    return _padded(tokenizer, map(QUESTION.format, questions), m, left=True)


def answer_chunks(tokenizer, answers: list[str], m: int) -> np.ndarray:
    """Answers with their end-of-text as second chunks, (N, m). Raises UserError for one that does not fit."""
    return _padded(tokenizer, map(ANSWER.format, answers), m, end=[END_OF_TEXT])


def passage_values(tokenizer, passages: list[tuple[str, str]], m: int) -> np.ndarray:
    """(title, source) of each passage as a neighbour, (N, 2m), cut where it is longer and padded where shorter."""
    return _padded(tokenizer, [f"title: {title}, source: {source}" for title, source in passages], 2 * m, cut=True)


def fits(tokenizer, questions: list[str], answers: list[str], m: int) -> np.ndarray:
    """Which questions and answers, (N,) bool, have room in a chunk each: those that the functions above take."""
    lengths = [
        _lengths(tokenizer, map(QUESTION.format, questions)),
        _lengths(tokenizer, map(ANSWER.format, answers)) + 1,
    ]
    return np.max(lengths, axis=0) <= m


def qa_batch(questions: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, (B, 2m − 1) each, of question and answer chunks (B, m): loss on the answer and its end alone.

    The second chunk's last token predicts nothing, and without it that chunk is incomplete and asks for no neighbours.
    """
    sequence = np.concatenate([questions, answers], axis=1)
    tokens, targets = sequence[:, :-1], sequence[:, 1:].copy()
    targets[:, : questions.shape[1] - 1] = PADDING
    return tokens, targets


def fine_tune(
    params: Tree,
    config: RetroConfig,
    questions: np.ndarray,
    answers: np.ndarray,
    passages: np.ndarray | None,
    found: np.ndarray | None,
    training: TrainingConfig,
    description: str = "fine-tuning",
) -> Tree:
    """Train all weights to answer. questions, answers: (N, m); the given parameters stay as they are.

    passages: (P, 2m), of which found (N, k) are each question's; None: closed book. Of `training` count steps,
    batch_size, micro_batches, the learning rate with its warm-up, weight_decay, clip and seed. Raises UserError where
    the loss is not finite.
    """
    params = map_tree(lambda _, array: array.copy(), params)
    state = adamw_init(params)
    with progress_bar(description, training.steps) as advance:
        for step in range(training.steps):
            rows = sequence_rows(len(questions), 1, training.batch_size, training.seed, step)[:, 0]
            neighbours = None if passages is None else passages[found[rows]][:, None]
            batch = (*qa_batch(questions[rows], answers[rows]), neighbours)
            line = train_step(params, state, config, batch, training, step, advice="lower the learning rate")
            advance(note=f"loss {line['loss']:.3f}")
    return params


def answer(params: Tree, config: RetroConfig, question: np.ndarray, passages: np.ndarray | None) -> np.ndarray:
    """The likeliest token after the likeliest, as far as end-of-text or the second chunk's end: (≤ m,) tokens.

    question: (m,), of `question_chunks`; passages: (k, 2m), None: closed book. End-of-text is not returned.
    """
    m, cache, tokens = config.chunk_size, Cache(), []
    for count in segments(0, m, m):
        given = passages if cache.length == m - 1 else None
        logits = extend(params, config, cache, question[cache.length : cache.length + count], given)[-1]
    while len(tokens) < m:
        token = sample_token(logits, None, temperature=0)
        if token == END_OF_TEXT:
            break
        tokens.append(token)
        if len(tokens) < m:  # the token that ends a chunk would open another one, for nothing
            logits = extend(params, config, cache, np.array([token]), None)[-1]
    return np.array(tokens, dtype=np.int64)


def answers_of(
    params: Tree,
    config: RetroConfig,
    tokenizer,
    questions: np.ndarray,
    passages: np.ndarray | None = None,
    found: np.ndarray | None = None,
    description: str = "answering",
) -> list[str]:
    """The text of each question's answer; arguments as in `fine_tune` and `answer`."""
    texts = []
    with progress_bar(description, len(questions), unit="questions") as advance:
        for row, question in enumerate(questions):
            given = None if passages is None else passages[found[row]]
            texts.append(decode(tokenizer, answer(params, config, question, given)).strip())
            advance()
    return texts


def exact_match(prediction: str, accepted: Iterable[str]) -> bool:
    """Whether a prediction is one of the accepted answers, once all are normalised. Rajpurkar et al. 2016 (SQuAD)."""
    return normalised(prediction) in {normalised(each) for each in accepted}


def normalised(text: str) -> str:
    """Lower case, without punctuation (ASCII), without a, an and the, one space for all white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def _lengths(tokenizer, texts) -> np.ndarray:
    return np.array([len(tokens) for tokens in encode_batch(tokenizer, list(texts))], np.int64)


def _padded(tokenizer, texts, width, *, left=False, cut=False, end=()) -> np.ndarray:
    """Tokens of texts, each followed by `end`, as rows of a width."""
    texts = list(texts)
    rows = np.full((len(texts), width), PADDING, np.int64)
    for row, text, tokens in zip(rows, texts, encode_batch(tokenizer, texts), strict=True):
        tokens = [*tokens, *end][: width if cut else None]
        if len(tokens) > width:
            raise UserError(f"{text!r} has {len(tokens)} tokens with its end, and its chunk has room for {width}")
        place = width - len(tokens) if left else 0
        row[place : place + len(tokens)] = tokens
    return rows
