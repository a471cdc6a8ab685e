"""Ground truth: plain loops over what CCA reads, sets of 13 words in Python, and sums by hand."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import EMBEDDER, SMALL, small_config

from retro_np import Database, evaluate, init_params, score, score_tokens
from retro_np.errors import UserError
from retro_np.evaluation import breakdown as module
from retro_np.evaluation.bits_per_byte import Losses
from retro_np.evaluation.bootstrap import paired_bootstrap
from retro_np.evaluation.breakdown import MATCHES, match_kinds, nearest_similarities, part_of
from retro_np.evaluation.compare import OFF, ON
from retro_np.evaluation.copying import longest_matches
from retro_np.retrieval.build import build_database
from retro_np.retrieval.join import Retrieval
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import evaluation_windows

WINDOW = {"sequence_length": 32, "stride": 16}
SYLLABLES = ["ba", "do", "ki", "lu", "mo", "ne", "pa", "ri", "so", "tu"]
NAMES = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]


@pytest.fixture(scope="module")
def texts():
    """Documents by (split, name): held-out ones share a tenth, all or none of their words with a training one."""
    rng = np.random.default_rng(4)
    fresh = [" ".join(rng.choice(NAMES, 150)) for _ in range(12)]
    texts = {("train", f"t{i}"): fresh[i] for i in range(6)}
    texts["valid", "new"], texts["test", "new too"] = fresh[6], fresh[7]
    texts["test", "some"] = " ".join([*fresh[8].split(), *fresh[1].split()[:40]])
    texts["test", "half"] = " ".join([*fresh[9].split()[:60], *fresh[2].split()[40:130]])
    return texts


@pytest.fixture(scope="module")
def three_splits(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    rows = [json.dumps({"split": split, "name": name, "text": text}) for (split, name), text in texts.items()]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return build_database(folder / "rows.jsonl", folder / "db", replace(SMALL, held_out=0.1), EMBEDDER)


@pytest.fixture(scope="module")
def model(three_splits):
    config = small_config(three_splits)
    return init_params(config, np.random.default_rng(0)), config


def word_grams(text):
    words = text.split()
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_the_nearest_similarity_is_that_of_sets_of_13_words(texts, three_splits):
    split = three_splits.split("test")
    found = nearest_similarities(three_splits, split)
    documents = split.documents[:]
    training = [word_grams(text) for (part, _), text in texts.items() if part == "train"]
    for row, number in enumerate(documents):
        held = word_grams(texts["test", three_splits.documents[int(number)]["name"]])
        assert found[row] == pytest.approx(max(len(held & grams) / len(held | grams) for grams in training))
    assert np.array_equal(nearest_similarities(three_splits, split, 5), found[:5])
    assert len(np.unique(found)) == 3


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 5), chunks=st.integers(1, 4), k=st.integers(1, 3))
def test_a_token_is_retrieved_if_it_stands_in_what_cca_reads_to_predict_it(seed, m, chunks, k):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(2, 9, (2, 1, m * chunks))
    neighbours = rng.integers(0, 9, (1, chunks, k, 2 * m))
    lengths, copied = longest_matches(tokens, neighbours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sequence_neighbours", lambda *_: neighbours)
        patch.setattr(module, "scored_tokens", lambda _, __, predict, *___: (None, [predict(None, tokens, targets)[1]]))
        (kinds,) = match_kinds(SimpleNamespace(split=SimpleNamespace(padding=0), database=None), None, k, None)
    for t in range(m * chunks):
        u = (t + 1) // m - 1  # the chunk whose neighbours position t reads
        read = set() if u < 0 else set(neighbours[0, u].reshape(-1).tolist())
        target = int(targets[0, t])
        expected = 0 if lengths[0, t] > 0 and copied[0, t] == target else 1 if target in read else 2
        assert kinds[t] == expected, (t, u)


def test_a_part_has_the_difference_and_interval_of_its_rows_alone():
    rng = np.random.default_rng(0)
    against = Losses(rng.gamma(5, 1, 60), np.full(60, 4), np.repeat(np.arange(12), 5))
    of = Losses(against.nats * rng.uniform(0.7, 1.2, 60), against.bytes, against.documents)
    rows = against.documents < 8
    part, rest = part_of(of, against, rows), part_of(of, against, ~rows)
    alone = paired_bootstrap(*(Losses(x.nats[rows], x.bytes[rows], x.documents[rows]) for x in (of, against)))
    assert part["difference_percent"] == alone.difference_percent
    assert part["interval_percent"] == list(alone.interval_percent)
    assert (part["documents"], part["share_of_bytes"], part["share_of_tokens"]) == (8, 2 / 3, 2 / 3)
    total = 100 * (of.nats.sum() / against.nats.sum() - 1)
    assert part["contribution_percent"] + rest["contribution_percent"] == pytest.approx(total)
    nothing = part_of(of, against, np.zeros(60, bool))
    assert (nothing["difference_percent"], nothing["interval_percent"], nothing["documents"]) == (None, None, 0)


@pytest.fixture(scope="module")
def evaluation(model, three_splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    baseline = small_config(three_splits, cca_layers=(), encoder=None)
    models = {"RETRO": model, "baseline": (init_params(baseline, np.random.default_rng(1)), baseline)}
    other = {"runs/other": (init_params(model[1], np.random.default_rng(2)), model[1])}
    results = evaluate(models, three_splits, folder, **WINDOW, split="test", against=other, token_losses=True)
    return results, folder, models | other


def test_the_parts_of_each_kind_sum_to_the_whole_difference(evaluation):
    results, _, _ = evaluation
    (whole,) = (c for c in results["comparisons"] if (c["of"], c["against"]) == ("on", "baseline"))
    for kind in ("leakage", "match", "similarity"):
        parts = results["parts"][kind]
        assert sum(part["contribution_percent"] for part in parts) == pytest.approx(whole["difference_percent"])
        assert sum(part["share_of_bytes"] for part in parts) == pytest.approx(1)
    assert [part["documents"] for part in results["parts"]["similarity"]] == [1, 1, 1]
    assert [part["token"] for part in results["parts"]["match"]] == list(MATCHES)


def test_every_pair_of_interest_is_compared(evaluation):
    results, folder, _ = evaluation
    pairs = [(c["of"], c["against"]) for c in results["comparisons"]]
    conditions = ["off", "on", "others", "runs/other"]
    assert pairs == [(of, "baseline") for of in conditions] + [("on", name) for name in conditions if name != "on"]
    losses = np.load(folder / "losses.npz")
    nats = {name: losses[f"{line}/document_nats"].sum() for name, line in (("on", ON), ("off", OFF))}
    on_off = results["comparisons"][4]
    assert on_off["difference_percent"] == pytest.approx(100 * (nats["on"] / nats["off"] - 1))
    assert on_off["interval_percent"] is None  # of three documents
    assert (on_off["seeds"], on_off["alpha"], on_off["documents"]) == (1, None, 3)


def test_the_figures_without_near_copies_are_those_of_the_other_documents(texts, evaluation, three_splits):
    results, folder, _ = evaluation
    clean, losses = results["without_near_copies"], np.load(folder / "losses.npz")
    names = [three_splits.documents[int(number)]["name"] for number in losses["document_ids"]]
    rows = [names.index("new too"), names.index("some")]  # "some" has a similarity of 28 / 288, just below 0.1
    n_bytes = losses["document_bytes"][rows].sum()
    for name, bpb in clean["models"].items():
        assert bpb == pytest.approx(losses[f"{name}/document_nats"][rows].sum() / n_bytes / np.log(2))
    assert (clean["documents"], clean["bytes"]) == (2, n_bytes)
    gain = 100 * (clean["models"][ON] / clean["models"]["baseline"] - 1)
    assert clean["comparisons"][1]["difference_percent"] == pytest.approx(gain)
    assert f"{abs(gain):.2f} % {'fewer' if gain < 0 else 'more'} bits than the baseline" in results["sentence"]
    assert "in the 2 documents without a near-copy" in results["sentence"]


def test_the_file_of_token_losses_has_the_losses_of_the_chunks(evaluation, three_splits, model):
    _, folder, _ = evaluation
    tokens, losses = np.load(folder / "tokens.npz"), np.load(folder / "losses.npz")
    split, m = three_splits.split("test"), three_splits.chunk_size
    assert np.array_equal(tokens["tokens"], split.tokens[:].reshape(-1)[tokens["positions"]])
    assert np.array_equal(tokens["documents"], split.documents[:][tokens["positions"] // m])
    assert np.array_equal(tokens["bytes"], token_byte_lengths(three_splits.tokenizer)[tokens["tokens"]])
    chunks, n = tokens["positions"] // m, len(losses["documents"])
    assert np.array_equal(losses["tokens"], np.bincount(chunks, minlength=n))
    names = [name for name in losses if name.endswith("/nats")]
    assert sorted(names) == sorted(name for name in tokens if name.endswith("/nats"))
    for name in names:
        np.testing.assert_allclose(np.bincount(chunks, tokens[name], n), losses[name], rtol=1e-12)
    public = score_tokens(*model, three_splits, "test", k=2, **WINDOW)
    assert np.array_equal(public.nats, tokens[f"{ON}/nats"])


def test_another_run_is_scored_with_retrieval_if_it_retrieves(evaluation, three_splits):
    results, _, models = evaluation
    other = score(*models["runs/other"], three_splits, "test", k=2, **WINDOW)
    assert results["models"]["runs/other"]["bpb"] == other.bits_per_byte()


def test_a_token_file_of_an_earlier_evaluation_does_not_stay(model, three_splits, tmp_path):
    evaluate({"RETRO": model}, three_splits, tmp_path, **WINDOW, split="test", limit=4, token_losses=True)
    assert (tmp_path / "tokens.npz").exists()
    results = evaluate({"RETRO": model}, three_splits, tmp_path, **WINDOW, split="test", limit=4, parts=False)
    assert not (tmp_path / "tokens.npz").exists()
    assert (results["parts"], results["without_near_copies"]) == (None, None)


def test_documents_that_a_model_was_trained_on_are_left_out_and_counted(model, three_splits, tmp_path):
    records = [record for record in three_splits.documents if record["split"] == "test"]
    known = [records[0]["sha256"][:16], records[1]["sha256"], "0" * 16]
    results = evaluate({"RETRO": model}, three_splits, tmp_path, **WINDOW, split="test", trained_on=known)
    losses = score(*model, three_splits, "test", **WINDOW)
    last = losses.documents == records[2]["id"]
    assert results["left_out"] == {"trained_on": 2}
    assert (results["scored_documents"], results["trained_on"]) == (1, 0)
    assert results["models"][ON]["bpb"] == pytest.approx(losses.nats[last].sum() / losses.bytes[last].sum() / np.log(2))
    assert all(comparison["documents"] == 1 for comparison in results["comparisons"])
    files = np.load(tmp_path / "losses.npz")
    assert np.array_equal(files["rows"], np.flatnonzero(last & (losses.tokens > 0)))
    assert np.array_equal(files[f"{ON}/nats"], losses.nats[files["rows"]])
    assert (results["chunks"], results["bytes"]) == (len(files["rows"]), files["bytes"].sum())
    assert files["document_ids"].tolist() == [records[2]["id"]]
    assert all(len(files[name]) == results["chunks"] for name in ("bytes", "documents", "tokens", "r", "similarity"))
    swapped = Retrieval.own(three_splits, "test")
    same = evaluate(
        {"RETRO": model}, three_splits, tmp_path, **WINDOW, split="test", trained_on=known, retrieval=swapped
    )
    assert same["models"] == results["models"]


def test_training_documents_that_a_model_was_trained_on_are_scored_and_counted(model, three_splits, tmp_path):
    known = [record["sha256"][:16] for record in three_splits.documents if record["split"] != "valid"]
    window = {**WINDOW, "limit": 20}  # each document has more
    results = evaluate({"RETRO": model}, three_splits, tmp_path, **window, split="train", trained_on=known[:1])
    assert (results["scored_documents"], results["trained_on"], results["left_out"]["trained_on"]) == (1, 1, 0)
    assert results["sentence"].endswith("over the one document, near-copies of the training text included.")
    assert results["near_copies"] is None


def test_when_each_document_is_a_near_copy_the_sentence_says_so(model, three_splits, tmp_path):
    others = [r["sha256"] for r in three_splits.documents if r["split"] == "test" and r["name"] != "half"]
    results = evaluate({"RETRO": model}, three_splits, tmp_path, **WINDOW, split="test", trained_on=others)
    assert (results["near_copies"], results["without_near_copies"]) == (1, None)
    assert "over the one document, and there is none without a near-copy" in results["sentence"]


def test_a_run_named_like_a_condition_and_different_windows_are_refused(model, three_splits, tmp_path):
    with pytest.raises(UserError, match="cannot be called 'on'"):
        evaluate({"RETRO": model}, three_splits, tmp_path, **WINDOW, split="test", against={"on": model})
    with pytest.raises(UserError, match="stride must be at most"):
        evaluation_windows(three_splits.split("valid"), 16, 32)


def test_without_a_test_part_valid_serves_for_test(database, tmp_path):
    assert isinstance(database, Database)
    config = small_config(database)
    params = init_params(config, np.random.default_rng(0))
    results = evaluate({"RETRO": (params, config)}, database, tmp_path, **WINDOW, limit=4, split="test")
    assert results["settings"]["split"] == "valid"
