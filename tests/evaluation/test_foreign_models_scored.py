"""A decoder that others trained, evaluated by commands. Ground truth: transformers' logits, one window at a time."""

import dataclasses
import inspect
import json
import math
import shutil

import foreign_models as foreign
import numpy as np
import pytest
import torch
import transformers
from foreign_tokenizers import sentencepiece_parts
from support import EMBEDDER, refused, run, write_corpus

from retro_np.commands import evaluation as commands
from retro_np.evaluation.bits_per_byte import score_tokens
from retro_np.evaluation.own_text import WithoutDatabase, own_text
from retro_np.evaluation.prepending import prepended
from retro_np.pretrained.models import load_model, read_pretrained
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.hashing import HASHED
from retro_np.sequences import sequence_neighbours

POSITIONS, M = 128, 8
WINDOW = ["--sequence-length", "64", "--stride", "32"]
ROWS = ["without retrieval", "in-context", "knn-lm", "cache"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny Llama, two texts, and a database with the model's tokenizer."""
    work = tmp_path_factory.mktemp("foreign")
    model = foreign.write_folder(work / "model", "llama", max_position_embeddings=POSITIONS)
    (work / "one.txt").write_text("It's 12 o'clock — 今天天气很好 🙂.\n" * 9)
    (work / "two.txt").write_text("def f(x):\n    return x\n")
    held, tokenizer = {"held_out": 0.35, "neighbours": 4, "extra_candidates": 6}, str(model / "tokenizer.json")
    config = BuildConfig(chunk_size=M, tokenizer=tokenizer, **held)
    build_database(write_corpus(work / "corpus"), work / "db", config, EMBEDDER)
    return work


@pytest.fixture(scope="module")
def oracle(work):
    return oracle_of(work / "model")


def oracle_of(*arguments, **settings):
    """A function that returns a model's log-probabilities after each of some tokens, (n, V)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(*arguments, dtype=torch.float32, **settings).eval()

    def log_probabilities(tokens):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0].double(), dim=-1).numpy()

    return log_probabilities


def bits_per_byte(texts, tokenizer, oracle, length, stride):
    """Of all tokens but each text's first. Each window predicts the tokens that no window before it has predicted."""
    nats = n_bytes = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        predicted = 1
        for start in range(0, len(ids), stride):
            end = min(start + length, len(ids) - 1)  # the last token that this window predicts
            log_p = oracle(ids[start:end])
            nats -= sum(log_p[t - 1 - start, ids[t]] for t in range(predicted, end + 1))
            predicted = end + 1
            if predicted == len(ids):
                break
        n_bytes += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return nats / math.log(2) / n_bytes


def results_of(work, out, *arguments):
    status, _, err = run("evaluate", work / "model", *arguments, "-o", out)
    assert status == 0, err
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (128, 64), (7, 3)])
def test_bits_per_byte_of_a_text_are_those_of_transformers(work, oracle, tmp_path, length, stride):
    texts = ["--text", work / "one.txt", "--text", work / "two.txt"]
    results = results_of(work, tmp_path / "out", *texts, "--sequence-length", length, "--stride", stride)
    read = [(work / name).read_text() for name in ("one.txt", "two.txt")]
    expected = bits_per_byte(read, foreign.tokenizer(), oracle, length, stride)
    assert results["models"]["without retrieval"]["bpb"] == pytest.approx(expected, rel=2e-5)
    assert results["scored_documents"] == 2
    assert results["settings"]["sequence_length"] == length


def test_a_page_about_a_text_has_the_figure_of_an_evaluation_though_prompts_begin_with_a_token(tmp_path, monkeypatch):
    vocabulary, merges = sentencepiece_parts()
    weights, rng = foreign.tensors("llama"), np.random.default_rng(0)
    weights["model.embed_tokens.weight"] = rng.standard_normal((600, foreign.WIDTH), dtype=np.float32)
    folder = foreign.write_folder(tmp_path / "model", "llama", weights, vocab_size=600)
    marking = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True).backend_tokenizer
    assert marking.encode("add").ids[0] == 1
    marking.save(str(folder / "tokenizer.json"))
    config = BuildConfig(chunk_size=M, tokenizer=str(folder / "tokenizer.json"), neighbours=4, extra_candidates=6)
    build_database(write_corpus(tmp_path / "corpus"), tmp_path / "db", config, HASHED)
    text, pages = "def add(a, b):\n    return a + b\n", []
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr("retro_np.report.inspection.write_inspection", lambda *arguments: pages.append(arguments[-1]))
    for source in ({"text": text}, {"file": tmp_path / "text.txt"}):
        commands.inspect(folder, tmp_path / "db", out=tmp_path / "page.html", **source)
    status, _, err = run("evaluate", folder, "--text", tmp_path / "text.txt", "-o", tmp_path / "out")
    assert status == 0, err
    expected = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["without retrieval"]["bpb"]
    assert [page.bits_off for page in pages] == pytest.approx([expected] * 2, rel=1e-6)
    assert [len(chunk.tokens) for chunk in pages[0].chunks][:-1] == [M] * (len(pages[0].chunks) - 1)


def test_half_of_the_sequence_is_the_default_stride_of_such_a_model(work, tmp_path):
    results = results_of(work, tmp_path / "out", "--text", work / "one.txt")
    assert (results["settings"]["sequence_length"], results["settings"]["stride"]) == (POSITIONS, POSITIONS // 2)


def test_a_model_with_fewer_positions_than_a_chunk_is_evaluated_without_options(work, oracle, tmp_path):
    foreign.write_folder(tmp_path / "model", "llama", max_position_embeddings=40)
    (tmp_path / "out").mkdir()
    results = results_of(tmp_path, tmp_path / "out", "--text", work / "one.txt")
    expected = bits_per_byte([(work / "one.txt").read_text()], foreign.tokenizer(), oracle, 40, 20)
    assert results["models"]["without retrieval"]["bpb"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", ["model", "baseline"])
def test_nats_of_a_text_are_the_same_to_the_bit_whatever_the_chunk_size(work, name):
    model = read_pretrained(work / "model" if name == "model" else name)
    nats = []
    for m in (1, 32):
        nothing, config = WithoutDatabase(model.tokenizer, m, name), dataclasses.replace(model.config, chunk_size=m)
        texts = own_text(nothing, [work / "one.txt", work / "two.txt"], 10)
        window = {"sequence_length": 64, "stride": 32}
        nats.append(score_tokens(model.params, config, nothing, retrieval=texts, **window).nats)
    assert np.array_equal(*nats)


def test_methods_with_a_memory_have_rows_and_intervals(work, tmp_path):
    also = ["--also", "in-context,knn-lm", "--also", "cache", "--keys", "900", "-k", "1"]
    results = results_of(work, tmp_path / "out", work / "db", *WINDOW, *also)
    assert list(results["models"]) == ROWS
    pairs = {(record["of"], record["against"]): record for record in results["comparisons"]}
    assert list(pairs) == [(name, ROWS[0]) for name in ROWS[1:]]
    for record in pairs.values():
        low, high = record["interval_percent"]
        assert low <= record["difference_percent"] <= high
    assert results["models"]["knn-lm"]["bpb"] <= results["models"][ROWS[0]]["bpb"]  # random weights: tokens alone help
    assert results["settings"]["keys"] == 900


def test_prepended_passages_are_followed_by_an_empty_line_and_the_text(work, oracle):
    from retro_np import Database

    database = Database.open(work / "db", EMBEDDER)
    params, config = load_model(work / "model", database)
    scored = prepended(params, config, database, k=2, sequence_length=64)
    split, line = database.split("valid"), foreign.tokenizer().encode("\n\n").ids
    tokens, documents = np.asarray(split.tokens), np.asarray(split.documents)
    checked = 0
    for position, token, nats in list(zip(scored.positions, scored.tokens, scored.nats, strict=True))[::5]:
        row, t = divmod(int(position), M)
        first = int(np.flatnonzero(documents == documents[row])[0])
        if not 1 <= row - first < 4:  # the document's first window, without its first chunk, which reads nothing
            continue
        values = sequence_neighbours(database, split, np.array([[row - 1]]), 2)[0, 0]
        kept = [[i for i in value if i not in (database.padding, database.end_of_text)] for value in values[::-1]]
        passages = [i for value in kept if value for i in (*value, *line)]
        end = min((row - first + 1) * M - 1, 8 * M)  # what is read up to the end of the token's chunk
        text = tokens[first:].reshape(-1).astype(int)[:end][-(64 - len(passages)) :]
        place = len(passages) + len(text) - (end - (row - first) * M - t) - 1
        expected = -oracle([*passages, *np.where(text < 262, text, 0)])[place, token]
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-4)
        checked += 1
    assert checked > 5


def test_a_text_without_a_database_retrieves_nothing_and_has_no_leakage(work):
    model = read_pretrained(work / "model")
    nothing = WithoutDatabase(model.tokenizer, model.config.chunk_size, "model")
    texts = own_text(nothing, [work / "one.txt"], 10)
    assert texts.split.neighbours.shape == (len(texts.split.tokens), 0)
    scored = score_tokens(model.params, model.config, nothing, retrieval=texts, sequence_length=64, stride=64)
    assert len(scored.nats) == len(foreign.tokenizer().encode((work / "one.txt").read_text()).ids) - 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give a DB, or --text FILE"),
        (["--text", "TEXT", "--sequence-length", "192"], "the model has 128 positions, fewer than a sequence of 192"),
        (["--text", "TEXT", "--also", "knn-lm"], "give a DB, or only --also cache"),
        (["--text", "TEXT", "--also", "magic"], "no method 'magic': choose from in-context, knn-lm, cache"),
        (["--text", "TEXT", "-k", "2"], "no model here retrieves: leave out -k"),
        (
            ["DB", "--also", "in-context", "-k", "9", *WINDOW],
            "9 neighbours of 16 tokens and a separator of 2 tokens, with 16 tokens of context, need 178 tokens, more",
        ),
        (["DB", "--keys", "9"], "--also knn-lm is not given: leave out --keys"),
        (["DB", "--fraction", "0.5"], "no model here retrieves: leave out --fraction"),
        (["DB", "--retrieve-from", "DB"], "no model here retrieves: leave out --retrieve-from"),
        (["DB", "--also", "in-context", "--fraction-seed", "1"], "--fraction is not given: leave out --fraction-seed"),
        (["--text", "TEXT", "--embedder", "hashing"], "nothing is searched without a DB: leave out --embedder"),
        (["DB", "--also", "cache", "--split", "train", *WINDOW], "leave out --split, or --also"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(work, tmp_path, arguments, line):
    names = {"TEXT": work / "one.txt", "DB": work / "db"}
    options = [names.get(argument, argument) for argument in arguments]
    assert line in refused("evaluate", work / "model", *options, "-o", tmp_path / "out")


def test_a_model_with_fewer_positions_than_a_chunk_is_told_a_chunk_size_with_which_it_is_evaluated(work, tmp_path):
    model = foreign.write_folder(tmp_path / "model", "llama", max_position_embeddings=5)
    for options in ([], ["--sequence-length", "5"], ["--sequence-length", "16"]):
        line = refused("evaluate", model, work / "db", *options, "-o", tmp_path / "out")
        assert "the model has 5 positions, fewer than a chunk of" in line
        assert line.endswith("build another database with a --chunk-size of at most 5")
    config = BuildConfig(chunk_size=5, tokenizer=str(model / "tokenizer.json"), held_out=0.2)
    build_database(work / "corpus", tmp_path / "db", config, HASHED)
    status, _, err = run("evaluate", model, tmp_path / "db", "-o", tmp_path / "out")
    assert status == 0, err


def test_a_sequence_for_which_a_model_lacks_positions_is_shortened_to_whole_chunks(work, tmp_path):
    model = foreign.write_folder(tmp_path / "model", "llama", max_position_embeddings=30)
    line = refused("evaluate", model, work / "db", "--sequence-length", "32", "-o", tmp_path / "out")
    assert line.endswith("give a sequence_length of at most 24")


def test_a_model_without_room_for_one_neighbour_is_told_to_use_smaller_chunks(work, tmp_path):
    model = foreign.write_folder(tmp_path / "model", "llama", max_position_embeddings=33)
    arguments = "evaluate", model, work / "db", "--also", "in-context", "-k", "1", "-o", tmp_path / "out"
    assert refused(*arguments).endswith(
        "the model has 33 positions, so build another database with a smaller --chunk-size"
    )


def test_a_database_of_another_tokenizer_and_a_model_that_retrieves_are_refused(work, database, tmp_path):
    line = refused("evaluate", work / "model", database.path, "-o", tmp_path / "out")
    assert f"--tokenizer {work / 'model'}" in line
    assert "retro retrieves: give a DB" in refused(
        "evaluate", "retro", "--text", work / "one.txt", "-o", tmp_path / "out"
    )


def test_our_own_baseline_scores_a_text_without_a_database(work, tmp_path):
    status, out, err = run(
        "evaluate", "baseline", "--text", work / "one.txt", "--also", "cache", "-o", tmp_path / "out"
    )
    assert status == 0, err
    assert "without retrieval" in out
    assert "cache" in out
    assert "changes texts" not in out
    assert not (tmp_path / "out" / "bpb_alpha.png").exists()


def test_a_tokenizer_that_changes_texts_is_named_beside_the_figure(work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "model")
    state = json.loads(foreign.tokenizer().to_str())
    state["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(state))
    status, out, err = run("evaluate", tmp_path / "model", "--text", work / "one.txt", "-o", tmp_path / "out")
    assert status == 0, err
    assert "The tokenizer changes texts, so the bytes are those of the texts as it reads them." in " ".join(out.split())


@pytest.mark.slow
@pytest.mark.oracle
def test_bits_per_byte_of_smollm2_are_those_of_transformers_to_four_digits(tmp_path):
    model = read_pretrained("smollm2")
    texts = [
        inspect.getsource(json.decoder)[:1500],
        "The moon is the Earth's only natural satellite. 今天天气很好 🙂\n",
    ]
    for number, text in enumerate(texts):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    nothing = WithoutDatabase(model.tokenizer, model.config.chunk_size, "smollm2")
    split = own_text(nothing, [tmp_path / "texts"], 10)
    window = {"sequence_length": 256, "stride": 128}
    losses = score_tokens(model.params, model.config, nothing, retrieval=split, **window).losses(nothing, split.split)
    oracle = oracle_of(model.files[0].parent, gguf_file=model.files[0].name)
    expected = bits_per_byte(texts, model.tokenizer, oracle, 256, 128)
    assert f"{losses.bits_per_byte():.4f}" == f"{expected:.4f}"
