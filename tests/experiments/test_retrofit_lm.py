"""Ground truth: what `score` and the bootstrap give for the models of the lab, and made-up records."""

import json

import numpy as np
import pytest

from retro_np.evaluation.bits_per_byte import score_tokens
from retro_np.evaluation.bootstrap import paired_bootstrap
from retro_np.experiments import retrofit_lm
from retro_np.experiments.experiment import open_lab, run_experiment
from retro_np.experiments.retrofit_lm import SIZE_OF_SCALE, UNRELATED, UNTRAINED, verdict
from retro_np.training.memory import MEMORY_SETTINGS

CONDITIONS = {
    "off", "on", "others", "adapted", "in-context", "knn-lm", "cache", "on+in-context", "on+knn-lm", "on+cache",
    "untrained", "untrained, others",
}  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of a run with two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("retrofit-lm")
    return run_experiment("retrofit-lm", folder, "tiny", seeds=2), folder


def test_each_condition_is_compared_with_the_base_on_each_corpus(record):
    for name, further in (("asyncio", {"paper-form", "paper-form, others"}), ("email", set()), (UNRELATED, None)):
        records = [r for r in record[0]["comparisons"] if r["corpus"] == name and r["against"] == "base"]
        expected = {"on", "others", UNTRAINED, f"{UNTRAINED}, others"} if further is None else CONDITIONS | further
        assert {r["of"] for r in records if r["alpha"] is None} == expected
        for each in records:
            trained = each["of"] in ("off", "on", "others") or each["of"].startswith("on+")
            assert each["seeds"] == (2 if trained else 1)
            if each["of"] == "off":
                interval = [0, 0] if each["documents"] >= 6 else None
                assert (each["difference_percent"], each["interval_percent"]) == (0, interval)
    fields = {"corpus", "of", "against", "alpha", "difference_percent", "interval_percent", "documents", "seeds"}
    assert all(set(each) - {"note"} == fields for each in record[0]["comparisons"])
    assert {"adapted", "in-context", "others"} <= {r["against"] for r in record[0]["comparisons"] if r["of"] == "on"}


def test_a_comparison_is_the_bootstrap_of_the_losses_of_the_labs_models(record):
    with open_lab(record[1], "tiny", 2) as lab:
        bench = retrofit_lm._benches(lab, retrofit_lm._tiny_decoder(), SIZE_OF_SCALE["tiny"])["email"]
        models = [bench.trained(UNTRAINED, seed) for seed in range(2)]
    split, windows = bench.retrieval.split, {"sequence_length": 128, "stride": 128, "retrieval": bench.retrieval}
    scored = [score_tokens(m.params, m.config, bench.database, k=2, **windows) for m in models]
    base = score_tokens(bench.plain.params, bench.plain.config, bench.database, k=0, **windows)
    losses = [tokens.losses(bench.database, split) for tokens in (*scored, base)]
    (found,) = (
        r
        for r in record[0]["comparisons"]
        if (r["corpus"], r["of"], r["against"], r["alpha"]) == ("email", "on", "base", None)
    )
    expected = paired_bootstrap(losses[:2], losses[2])
    assert found["difference_percent"] == pytest.approx(expected.difference_percent, abs=1e-5)
    assert found["interval_percent"] == pytest.approx(expected.interval_percent, abs=1e-5)
    assert found["documents"] == expected.documents == len(np.unique(split.documents))
    assert not np.array_equal(
        models[0].params["layers"][4]["cca"]["gate"], models[1].params["layers"][4]["cca"]["gate"]
    )


def test_only_documents_of_more_than_two_chunks_are_scored_and_only_their_first_window(record):
    with open_lab(record[1], "tiny", 2) as lab:
        benches = retrofit_lm._benches(lab, retrofit_lm._tiny_decoder(), SIZE_OF_SCALE["tiny"])
    for bench in benches.values():
        whole, split = bench.database.split("valid"), bench.retrieval.split
        for number in np.unique(split.documents):
            rows = whole.tokens[np.flatnonzero(whole.documents[:] == number)]
            assert len(rows) > 2
            assert np.array_equal(split.tokens[split.documents == number], rows[: 128 // 16])
    unrelated = benches[UNRELATED]
    assert np.array_equal(unrelated.retrieval.split.tokens, benches["email"].retrieval.split.tokens)
    assert unrelated.retrieval.database.path == benches["asyncio"].database.path


def test_forms_have_their_parameters_and_each_condition_its_time(record):
    figures = record[0]["figures"]
    parameters = figures["trained_parameters"]
    assert parameters["on"] - parameters["adapted"] == 2 * 4  # a gate for each head; of six layers, two read
    assert parameters["paper-form"] > parameters["on"]
    times = figures["seconds_per_token"]
    assert set(times) == {
        "base", "off", "on", "on, neighbours encoded", "adapted", "paper-form", "in-context", "knn-lm", "cache",
    }  # fmt: skip
    assert all(0 < seconds < 1 for seconds in times.values())
    assert all(facts["off_equals_base"] for facts in figures["corpora"].values())


def test_a_run_that_resumes_reads_the_stored_scores(record, monkeypatch):
    monkeypatch.setattr(retrofit_lm, "score_tokens", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr(retrofit_lm, "added_memory", lambda *_, **__: pytest.fail("scored again"))
    again = run_experiment("retrofit-lm", record[1], "tiny", seeds=2)
    assert json.dumps(again["figures"]) == json.dumps(record[0]["figures"])
    assert again["comparisons"] == record[0]["comparisons"]


def test_the_settings_of_a_memory_are_those_of_its_training(record):
    configs = [json.loads(path.read_text()) for path in (record[1] / "tiny" / "models").glob("*/config.json")]
    memories = [run for run in configs if run["training"]["random_share"]]
    assert {run["training"]["learning_rate"] for run in memories} == {MEMORY_SETTINGS["learning_rate"]}
    assert sorted(run["training"]["seed"] for run in memories) == [0, 0, 1, 1]
    assert all(run["data"]["base" if "base" in run["data"] else "begun_from"] for run in configs)


@pytest.mark.parametrize(
    ("on", "others", "same", "agrees"),
    [
        (-1.0, -0.5, True, True), (0.1, -0.5, True, False), (-1.0, 0.1, True, False), (-1.0, -0.5, False, False),
    ],
)  # fmt: skip
def test_the_verdict_requires_clear_gains_over_base_and_others_and_that_off_equals_the_base(
    record, on, others, same, agrees
):
    figures = json.loads(json.dumps(record[0]["figures"])) | {"comparisons": []}
    for each in json.loads(json.dumps(record[0]["comparisons"])):
        if each["of"] == "on" and each["corpus"] != UNRELATED:
            high = {"base": on, "others": others}.get(each["against"], 0)
            each["interval_percent"] = [-3, high]
        figures["comparisons"].append(each)
    figures["corpora"]["email"]["off_equals_base"] = same
    assert verdict(figures)[0] is agrees
