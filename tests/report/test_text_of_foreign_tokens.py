"""Text that is shown, for tokenizers of others. Ground truth: the documents' own texts, and text.encode()."""

import numpy as np
import pytest
from foreign_tokenizers import json_of, original
from support import EMBEDDER, SMALL, write_corpus
from tokenizers import Tokenizer

from retro_np.evaluation.own_text import WithoutDatabase
from retro_np.generation import Retrieved
from retro_np.progress import visible
from retro_np.report.samples import prompt_tokens, show_chunks, token_printer
from retro_np.retrieval.build import build_database
from retro_np.retrieval.tokenizer import encode

TEXT = "for x in 今天 🙂:\n    return  café <s> x"


@pytest.fixture(scope="module", params=["gpt2", "legacy llama"])
def foreign(request, tmp_path_factory):
    """A database with a byte-level, and one with a SentencePiece-style tokenizer."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "docs", 8)
    tokenizer = Tokenizer.from_str(json_of(request.param).decode())
    return build_database(folder, tmp_path_factory.mktemp("shown") / "db", SMALL, EMBEDDER, tokenizer=tokenizer), folder


def test_a_value_is_shown_as_it_stands_in_its_document(foreign):
    database, folder = foreign
    ids = np.arange(database.n_chunks)
    values, reached = database.value(ids), {}
    retrieved = [Retrieved(0, ids[i : i + 1], np.zeros(1), values[i : i + 1]) for i in ids]
    assert len(retrieved) > 50
    for i, item in enumerate(retrieved):
        (chunk,) = show_chunks([5] * database.chunk_size, [], [item], database)
        (value,) = chunk.values
        text = (folder / value.document).read_text()
        shown = "".join(token.text for token in value.neighbour)
        begin = reached.get(value.document, 0)
        assert text[begin:].startswith(shown), i
        reached[value.document] = begin + len(shown)


def test_a_prompt_is_shown_as_it_was_typed(foreign):
    database, _ = foreign
    chunks = show_chunks(prompt_tokens(database, TEXT), [], [], database)
    assert "".join(token.text for chunk in chunks for token in chunk.tokens) == TEXT


def test_a_prompt_has_the_mark_before_its_text_and_not_the_one_behind_it():
    database = WithoutDatabase(Tokenizer.from_str(json_of("bert").decode()), 8, "bert")
    for text in ("def add", ""):
        begin, *ids, end = original("bert")(text)["input_ids"]
        assert prompt_tokens(database, text) == [begin, *ids]
        assert database.tokenizer.id_to_token(end) == "[SEP]"


def test_a_continuation_is_printed_with_its_spaces_and_whole_characters(foreign, capsys):
    database, _ = foreign
    show, ids = token_printer(database), encode(database.tokenizer, f"x {TEXT}")
    n = next(n for n in range(1, 9) if database.text(ids[:n]) == "x")
    for token in ids[n:]:
        show(token)
    assert capsys.readouterr().out == visible(f" {TEXT}")
