"""Ground truth: the same texts held out in a database, and what the commands print."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support import SMALL, TRAINING, json_lines, refused, run, small_config

from retro_np import Database, UserError, evaluate, init_params, save_params, score, trained_on
from retro_np.evaluation.compare import OFF, ON, SHUFFLED
from retro_np.evaluation.own_text import own_text
from retro_np.experiments.demo import _bundled
from retro_np.pretrained.bundled import BASELINE, RETRO, bundled_file
from retro_np.retrieval.build import HASHED, BuildConfig, build_database
from retro_np.retrieval.corpus import Source
from retro_np.training.loop import train

WINDOW = {"sequence_length": 32, "stride": 16}
OPTIONS = ["--sequence-length", "32", "--stride", "16"]


@pytest.fixture(scope="module")
def model(database):
    config = small_config(database)
    return init_params(config, np.random.default_rng(0)), config


def held_out_texts(database, corpus):
    names = [record["name"] for record in database.documents if record["split"] == "valid"]
    return {name: (corpus / name).read_text() for name in names}


@pytest.mark.slow
def test_texts_of_ones_own_are_scored_like_the_same_texts_held_out(model, database, corpus, tmp_path):
    texts = held_out_texts(database, corpus)
    retrieval = own_text(database, [json_lines(tmp_path / "texts.jsonl", texts)], 10)
    for condition in ({"k": 0}, {"k": 2}, {"k": 2, "shuffle_seed": 0}):
        plain = score(*model, database, **condition, **WINDOW)
        own = score(*model, database, "text", retrieval=retrieval, **condition, **WINDOW)
        assert np.array_equal(own.bytes, plain.bytes)
        np.testing.assert_allclose(own.nats, plain.nats, rtol=1e-5)
    results = evaluate({"RETRO": model}, database, tmp_path / "out", retrieval=retrieval, **WINDOW)
    counts = database.manifest["splits"]["valid"]
    assert {name: results["database"][name] for name in counts} == counts
    assert results["settings"]["split"] == "text"
    assert [document["name"] for document in results["documents"]] == list(texts)
    losses = score(*model, database, **WINDOW)
    for document, nats, n_bytes in zip(results["documents"], *losses.per_document()[1:], strict=True):
        assert document["bpb"][ON] == pytest.approx(nats / n_bytes / np.log(2))
        assert document["bytes"] == n_bytes


def test_texts_equal_to_training_documents_are_left_out_and_counted(model, database, corpus, tmp_path):
    texts = held_out_texts(database, corpus)
    first, second, *_ = texts
    stored = next(record for record in database.documents if record["split"] == "train")
    texts["a copy"] = (corpus / stored["name"]).read_text()
    known = {record["sha256"][:16] for record in database.documents if record["name"] == first}
    path = json_lines(tmp_path / "texts.jsonl", texts)
    retrieval = own_text(database, [path, corpus / second], 10, trained_on=known)
    assert retrieval.left_out == {"in_database": 1, "trained_on": 1, "repeated": 1}  # second comes twice
    assert [record["name"] for record in retrieval.records] == list(texts)[1:-1]
    with pytest.raises(UserError, match=r"no document is left to score \(1 are training documents"):
        own_text(database, [corpus / stored["name"]], 10)
    unknown = own_text(database, [path], 10)
    with pytest.raises(UserError, match="pass trained_on to own_text"):
        evaluate({"RETRO": model}, database, tmp_path / "out", retrieval=unknown, trained_on=known, **WINDOW)


@pytest.fixture(scope="module")
def work(corpus, tmp_path_factory):
    """A database whose keys need no weights, two runs, and a text."""
    folder = tmp_path_factory.mktemp("work")
    database = build_database(corpus, folder / "db", SMALL, HASHED)
    for name, change in (("retro", {}), ("baseline", {"cca_layers": (), "encoder": None})):
        train(database, small_config(database, **change), TRAINING, folder / name)
    (folder / "letters").mkdir()
    (folder / "letters" / "one.txt").write_text("return self if value else None\n" * 5)
    (folder / "letters" / "two.txt").write_text("while token in chunk: yield neighbour\n" * 9)
    return folder


@pytest.mark.slow
def test_the_command_scores_a_folder_of_texts_with_runs_by_their_folders(work, tmp_path):
    rivals = [str(shutil.copytree(work / name, tmp_path / name)) for name in ("retro", "baseline")]
    others = ["--baseline", work / "baseline", "--against", rivals[0], "--against", rivals[1]]
    text = ["--text", work / "letters", "--text", work / "letters" / "two.txt", "--token-losses"]
    status, out, err = run("evaluate", work / "retro", work / "db", *others, *text, "-o", tmp_path / "out", *OPTIONS)
    assert status == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"]) == ["baseline", OFF, ON, SHUFFLED, *rivals]
    figures = {name: line["bpb"] for name, line in results["models"].items()}
    assert (figures[ON], figures["baseline"]) == tuple(figures[name] for name in rivals)
    same = [c for c in results["comparisons"] if (c["of"], c["against"]) == ("on", rivals[0])]
    assert [(c["difference_percent"], c["interval_percent"]) for c in same] == [(0.0, None)]  # of two documents
    assert [document["name"] for document in results["documents"]] == ["one.txt", "two.txt"]
    assert "1 text left out: given twice." in out
    assert (tmp_path / "out" / "tokens.npz").exists()
    assert f"one.txt: baseline {results['documents'][0]['bpb']['baseline']:.4f}" in out
    assert "the token to come" in out


@pytest.mark.parametrize("name", ["retro", "db"])
def test_an_evaluation_into_the_folder_of_a_run_or_a_database_is_refused(work, name):
    before = sorted(work.rglob("*"))
    line = refused("evaluate", work / "retro", work / "db", "-o", work / name, *OPTIONS)
    kind = {"retro": "a training run", "db": "a database"}[name]
    assert line.endswith(f"{name} holds {kind}: give a new folder for the evaluation")
    assert sorted(work.rglob("*")) == before


def test_the_example_of_the_evaluation_page_runs(work, tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "runs").mkdir()
    for name in ("retro", "db"):
        (tmp_path / "runs" / name).symlink_to(work / name)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    results = json.loads(Path("runs/evaluation/results.json").read_text())
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{results['left_out']} {results['sentence']}"
    assert last == "639 documents are in the training text of the bundled RETRO"


def test_one_text_has_no_interval_and_the_output_says_so(work, tmp_path):
    text = ["--text", work / "letters" / "one.txt", "-o", tmp_path / "out"]
    status, out, err = run("evaluate", work / "retro", work / "db", *text, *OPTIONS)
    assert status == 0, err
    assert "no interval: a bootstrap needs at least 6 documents" in " ".join(out.split())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {comparison["interval_percent"] for comparison in results["comparisons"]} == {None}


@pytest.mark.slow
def test_text_with_a_split_and_a_missing_text_are_refused(work, tmp_path):
    command = ["evaluate", work / "retro", work / "db", "-o", tmp_path / "out", *OPTIONS]
    assert "leave out --split" in refused(*command, "--text", work / "letters", "--split", "valid")
    assert "no corpus at" in refused(*command, "--text", tmp_path / "missing")
    assert "holds no model" in refused("evaluate", work / "letters", work / "db", "-o", tmp_path / "out")


@pytest.mark.slow
def test_a_split_without_chunks_is_refused_with_the_way_out(corpus, tmp_path):
    assert run("build", corpus, "-o", tmp_path / "db", "--held-out", "0", "--embedder", "hashing",
               "--vocabulary-size", "300", "--chunk-size", "8")[0] == 0  # fmt: skip
    database = Database.open(tmp_path / "db")
    config = small_config(database)
    save_params(tmp_path / "model.safetensors", init_params(config, np.random.default_rng(0)), config)
    line = refused("evaluate", tmp_path / "model.safetensors", tmp_path / "db", "-o", tmp_path / "out", *OPTIONS)
    assert "has no chunks in its split 'valid': build it with --held-out-bytes" in line
    assert "--text" in line


def test_the_error_for_a_database_with_a_test_part_alone_names_that_part(corpus, tmp_path):
    rows = json_lines(tmp_path / "rows.jsonl", {"one": "return self if value else None\n" * 9})
    sources = [Source("train", str(corpus), split="train"), Source("test", str(rows), split="test")]
    database = build_database(sources, tmp_path / "db", replace(SMALL, held_out=BuildConfig.held_out), HASHED)
    config = small_config(database)
    model = init_params(config, np.random.default_rng(0)), config
    with pytest.raises(UserError, match="no chunks in its split 'valid': use --split test, or build it with"):
        score(*model, database, **WINDOW)
    assert score(*model, database, "test", **WINDOW).bytes.sum()


def test_a_model_is_not_compared_with_itself(work, tmp_path):
    against = ["--against", work / "retro" / "checkpoint.safetensors", "-o", tmp_path / "out"]
    status, out, err = run("evaluate", work / "retro", work / "db", *against, *OPTIONS)
    assert status == 0, err
    assert "is left out, since its model is scored already" in " ".join(out.split())
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["models"]) == [OFF, ON, SHUFFLED]


def test_the_bundled_models_carry_hashes_of_what_they_were_trained_on(tmp_path, database):
    known = trained_on(RETRO)
    assert known == trained_on(bundled_file(RETRO)) == trained_on(BASELINE)
    assert len(known) == 639
    assert {len(digest) for digest in known} == {16}
    config = small_config(database)
    save_params(tmp_path / "model.safetensors", init_params(config, np.random.default_rng(0)), config)
    assert trained_on(tmp_path / "model.safetensors") == frozenset()


def test_the_models_that_the_demo_copies_carry_the_hashes_too(tmp_path):
    models = _bundled(tmp_path, Console(quiet=True))
    for name in models:
        assert trained_on(tmp_path / name.lower() / "checkpoint.safetensors") == trained_on(name.lower())


@pytest.mark.slow
def test_a_run_that_began_from_a_model_carries_on_what_the_model_was_trained_on(database, model, tmp_path):
    digests = ["0123456789abcdef", "fedcba9876543210"]
    training = replace(TRAINING, eval_every=1)
    train(database, model[1], training, tmp_path / "run", begin_from=(model[0], "a name"), trained_on=set(digests))
    for name in ("checkpoint", "best"):
        assert trained_on(tmp_path / "run" / f"{name}.safetensors") == set(digests)


def test_a_database_whose_held_out_documents_were_all_trained_on_is_refused(database, model, tmp_path):
    known = {record["sha256"] for record in database.documents if record["split"] == "valid"}
    with pytest.raises(UserError, match="a model was trained on all"):
        evaluate({"RETRO": model}, database, tmp_path / "out", trained_on=known, **WINDOW)


@pytest.mark.slow
def test_a_text_without_a_token_to_score_is_one_line(work, tmp_path):
    (tmp_path / "short.txt").write_text("x")
    text = ["--text", tmp_path / "short.txt", "-o", tmp_path / "out"]
    assert "no token can be scored" in refused("evaluate", work / "retro", work / "db", *text, *OPTIONS)


@pytest.mark.parametrize("wrong", ["0123456789abcdef", [1], ["xyz"], ["0123"], {"a": 1}, None])
def test_other_things_in_place_of_these_hashes_are_refused(wrong, model, tmp_path):
    from retro_np.checkpoint import write_tensors
    from retro_np.tree import named_leaves

    path = tmp_path / "model.safetensors"
    write_tensors(path, dict(named_leaves(model[0])), {"config": model[1].to_dict(), "trained_on": wrong})
    with pytest.raises(UserError, match="'trained_on' in its metadata is not a list of hashes"):
        trained_on(path)
