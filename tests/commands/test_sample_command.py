"""`sample` and `inspect` with a decoder that others trained. Ground truth: transformers' greedy `generate`."""

import json
import re
import shutil

import foreign_models as foreign
import numpy as np
import pytest
import torch
import transformers
from support import refused, run, write_corpus
from tokenizers import Tokenizer

from retro_np import Database, UserError, generate
from retro_np.evaluation.own_text import WithoutDatabase
from retro_np.pretrained.models import load_model, read_pretrained
from retro_np.progress import visible
from retro_np.report.inspection import inspect
from retro_np.report.samples import prompt_tokens, token_printer
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.hashing import HASHED

M = 8
PROMPT = "It's the 今天 of"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("sampled")
    model = foreign.write_folder(work / "model", "llama", max_position_embeddings=48)
    held = {"held_out": 0.2, "neighbours": 4, "extra_candidates": 6}
    config = BuildConfig(chunk_size=M, tokenizer=str(model / "tokenizer.json"), **held)
    build_database(write_corpus(work / "corpus"), work / "db", config, HASHED)
    return work


@pytest.fixture(scope="module")
def greedy(work):
    """The tokens that transformers appends to PROMPT, without padding and up to end-of-text."""
    ids = foreign.tokenizer().encode(PROMPT).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "model").eval()
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 259, "suppress_tokens": [260]}
    with torch.no_grad():
        return ids, model.generate(torch.tensor([ids]), pad_token_id=260, **settings)[0, len(ids) :].tolist()


def test_the_text_is_the_prompt_and_what_transformers_appends_to_it(work, greedy):
    status, out, err = run("sample", work / "model", "--prompt", PROMPT, "--length", "20", "--temperature", "0")
    assert status == 0, err
    text = foreign.tokenizer().decode(greedy[1])  # without special tokens
    assert out.rstrip("\ufffd\n") == PROMPT + visible(text).rstrip("\ufffd\n")
    assert re.fullmatch(r"\d+ tokens? in [\d.]+ s, [\d.]+ tokens/s\n", err)


def test_sampling_stops_at_each_of_several_tokens_and_never_at_padding(work, greedy):
    ids, new = greedy
    model = read_pretrained(work / "model")
    settings = {"temperature": 0, "stop_token": {new[3], new[7]}}
    assert generate(model.params, model.config, ids, 20, **settings)[0].tolist() == new[:4]
    assert model.config.padding_id == 260
    drawn = generate(model.params, model.config, [5], 40, temperature=1e6)[0]
    assert 260 not in drawn
    assert len(set(drawn.tolist())) > 20


def test_prompt_and_length_beyond_the_positions_are_refused_in_python_and_shortened_by_the_command(work):
    model = read_pretrained(work / "model")
    with pytest.raises(UserError, match="40 tokens, and the model 48 positions: give a length of at most 9"):
        generate(model.params, model.config, [5] * 40, 10)
    with pytest.raises(UserError, match="49 tokens, and the model 48 positions: give a shorter prompt"):
        generate(model.params, model.config, [5] * 49, 1)
    line = refused("sample", work / "model", "--prompt", "~" * 49)
    assert "the prompt has 49 tokens, and the model 48 positions: give a shorter prompt" in line
    status, _, err = run("sample", work / "model", "--prompt", "~" * 48)
    assert status == 0, err
    assert "the model has 48 positions, so the text ends after 1 more token" in err


def test_an_empty_prompt_is_the_models_own_token_or_refused_if_it_has_none(tmp_path):
    folder, own = foreign.write_folder(tmp_path / "model", "llama"), foreign.tokenizer()
    roles = {"bos_token": foreign.PAD, "eos_token": foreign.END}
    for left, expected in ((roles, 260), ({"eos_token": foreign.END}, 259), ({}, 259)):  # ids in foreign.tokenizer()
        (folder / "tokenizer_config.json").write_text(json.dumps(left))
        model = read_pretrained(folder)
        assert prompt_tokens(WithoutDatabase(model.tokenizer, M, "x"), "", model) == [expected], left
    plain = Tokenizer.from_str(own.to_str().replace(foreign.END, "<end>"))
    plain.save(str(folder / "tokenizer.json"))
    weights = foreign.tensors("llama")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:261]
    foreign.save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 261, "eos_token_id": None}))
    line = refused("sample", folder, "--prompt", "", "--length", "2")
    assert f"{folder} has no token that begins or ends a text: give a prompt" in line


def test_a_model_without_retrieval_needs_no_database_and_refuses_its_options(work):
    assert "does not retrieve: leave out -k" in refused("sample", work / "model", work / "db", "-k", "2")
    line = refused("sample", work / "model", work / "db", "--embedder", "hashing")
    assert "does not retrieve: leave out --embedder" in line
    assert f"no database at {work / 'nowhere'}" in refused("sample", work / "model", work / "nowhere")
    line = refused("sample", "retro", "--no-retrieval", "-k", "3")
    assert "--no-retrieval is given: leave out -k" in line
    assert "its own embedder: leave out --embedder" in refused("sample", "--pretrained", "--embedder", "hashing")
    assert "retro retrieves: give a DB, or --no-retrieval" in refused("sample", "retro")
    assert "no model at nothing/at/all" in refused("sample", "nothing/at/all")
    status, out, err = run("sample", work / "model", work / "db", "--prompt", "a", "--length", "2")
    assert status == 0, err
    assert f"does not retrieve, so {work / 'db'} is not read" in " ".join(err.split())
    status, out, err = run("sample", "retro", "--no-retrieval", "--prompt", "import json", "--length", "5")
    assert status == 0, err
    assert out.startswith("import json")
    assert "│" not in out


def test_a_character_of_several_tokens_is_printed_once_it_is_whole(work, capsys):
    show = token_printer(Database.open(work / "db"))
    for token in [*foreign.tokenizer().encode("é🙂").ids, 261, 259, *foreign.tokenizer().encode("\x1b[2J").ids]:
        show(token)
    assert capsys.readouterr().out == "é🙂␛[2J"


def test_a_page_about_such_a_model_has_its_nats_and_values_and_no_claim_about_reading(work):
    database = Database.open(work / "db")
    params, config = load_model(work / "model", database)
    tokens = foreign.tokenizer().encode("for value in self: return value\n").ids
    page = inspect(params, config, database, tokens, k=2)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(work / "model").eval()
    with torch.no_grad():
        log_p = torch.log_softmax(oracle(torch.tensor([tokens])).logits[0].double(), dim=-1).numpy()
    shown = [token for chunk in page.chunks for token in chunk.tokens]
    expected = [-log_p[t - 1, tokens[t]] for t in range(1, len(tokens))]
    np.testing.assert_allclose([token.off for token in shown[1:]], expected, rtol=1e-4, atol=1e-4)
    assert page.bits_on is None
    assert {token.on for token in shown} == {None}
    assert [len(chunk.values) for chunk in page.chunks] == [2] * (len(tokens) // M) + [0] * (len(tokens) % M > 0)
    assert all(chunk.leakage is not None for chunk in page.chunks[: len(tokens) // M])


def test_inspect_says_beside_its_figure_that_a_tokenizer_changes_texts(work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "model")
    state = json.loads(foreign.tokenizer().to_str()) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(state))
    config = BuildConfig(chunk_size=M, tokenizer=str(tmp_path / "model" / "tokenizer.json"), neighbours=1)
    build_database(write_corpus(tmp_path / "corpus"), tmp_path / "db", config, HASHED)
    for folder, expected in ((work, False), (tmp_path, True)):
        status, out, err = run("inspect", folder / "model", folder / "db", "a text", "-o", tmp_path / "page.html")
        assert status == 0, err
        shown = " ".join(out.split()), (tmp_path / "page.html").read_text()
        assert ["The tokenizer changes texts, so the bytes are" in text for text in shown] == [expected] * 2


def test_inspect_writes_a_page_without_cross_attention(work, tmp_path):
    text = "for value in self:\n    return value\n"
    status, out, err = run("inspect", work / "model", work / "db", text, "-o", tmp_path / "page.html")
    assert status == 0, err
    assert re.search(r"\d bits per byte\.", out)
    page = (tmp_path / "page.html").read_text()
    assert "The model does not read what is retrieved." in page
    assert "cross-attention" not in page
    assert "with retrieval" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert json.loads(re.search(r'id="read"[^>]*>(.*?)</script>', page)[1])[0] == [[]] * M
    assert "too long for a page" in refused("inspect", work / "model", work / "db", "--prompt", "~" * 48)
