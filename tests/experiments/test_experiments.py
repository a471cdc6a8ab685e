"""Ground truth: a second run, sums by hand, and made-up figures with a known verdict."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import fresh_python, refused, write_corpus

import retro_np.experiments as package
from retro_np import load_params
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import score
from retro_np.evaluation.compare import OFF, ON, SHUFFLE_SEED, SHUFFLED
from retro_np.experiments import ablations, database_size, leakage, model_size, neighbours, random_neighbours, retrofit
from retro_np.experiments.experiment import (
    IN_WORDS,
    OVER_SEEDS,
    described,
    experiments,
    find_experiment,
    open_lab,
    run_experiment,
)
from retro_np.experiments.lab import SCALES, mean_and_spread
from retro_np.experiments.pretrained import make_pretrained
from retro_np.experiments.second_corpus import RELEASE
from retro_np.files import sha256_of
from retro_np.parameters import count_parameters
from retro_np.pretrained.bundled import BUNDLED
from retro_np.pretrained.models import load_pretrained
from retro_np.training.loop import CHECKPOINT

NAMES = list(experiments())
RECORDS = Path(__file__).parents[2] / "docs" / "experiments"  # made by full runs
# The experiments that are left out have their own test files.
RUN_HERE = sorted(set(NAMES) - {"knowledge", "question-answering", "samples"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for a lab, with a stand-in for the second corpus."""
    out = tmp_path_factory.mktemp("experiments")
    models = out / "corpora" / RELEASE.replace("==", "-") / "transformers" / "models"
    for number, path in enumerate(sorted(write_corpus(out / "texts", 40).iterdir())):
        model = models / f"model{number}"
        model.mkdir(parents=True)
        (model / f"modeling_{path.name}").write_text(path.read_text() * 4)
        (model / f"modeling_tf_{path.name}").write_text("never read")
    return out


@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_has_a_title_and_says_what_the_paper_shows(name):
    experiment = find_experiment(name)
    assert experiment is experiments()[name]
    title, paper = described(experiment)
    assert title
    assert len(paper) > 40


def test_each_experiment_has_a_record():
    assert {path.stem for path in RECORDS.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_is_recorded_of_an_experiment_follows_from_its_recorded_figures(name):
    record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    experiment, figures = find_experiment(name), record["figures"] | {"comparisons": record["comparisons"]}
    agrees, sentence = experiment.verdict(figures)
    assert (IN_WORDS[agrees], sentence) == (record["verdict"], record["sentence"])
    assert described(experiment) == (record["title"], record["paper"])


def test_all_experiments_have_their_place_in_the_list_and_their_number_of_seeds():
    assert list(OVER_SEEDS) == NAMES
    assert NAMES[0] == "random-neighbours"
    assert NAMES[-1] == "pretrained"


def test_a_new_experiment_needs_only_a_new_file_in_the_package(tmp_path, monkeypatch):
    source = '''"""New

Nothing."""
measure = lambda lab: {"seeds": lab.seeds}
draw = lambda figures, path: path.write_bytes(b"PNG")
verdict = lambda figures: (True, f"{figures['seeds']} seeds.")
'''
    (tmp_path / "brand_new.py").write_text(source)
    (tmp_path / "helper.py").write_text("")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "retro_np.experiments.brand_new", raising=False)
    assert list(experiments()) == [*NAMES, "brand-new"]
    assert described(find_experiment("brand-new")) == ("New", "Nothing.")
    assert run_experiment("brand-new", tmp_path / "out", "tiny", seeds=2)["sentence"] == "2 seeds."
    assert (tmp_path / "out" / "tiny" / "brand-new.png").read_bytes() == b"PNG"
    for name in ("helper", "lab", "brand_new", "random_neighbours", "os"):
        with pytest.raises(UserError, match="no experiment"):
            find_experiment(name)


def test_finding_an_experiment_imports_no_other_experiment():
    code = (
        "import sys; from retro_np.experiments.experiment import find_experiment; find_experiment('leakage'); "
        "print('retro_np.experiments.leakage' in sys.modules, 'retro_np.experiments.subsets' in sys.modules)"
    )
    out, err, status = fresh_python(code)
    assert (out, status) == ("True False", 0), err


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_HERE)
def test_a_second_run_of_an_experiment_gives_the_same_figures(name, folder):
    seeds = 2 if OVER_SEEDS[name] else None
    first = run_experiment(name, folder, "tiny", seeds)
    second = run_experiment(name, folder, "tiny", seeds)
    assert json.dumps(first["figures"]) == json.dumps(second["figures"])
    written = json.loads((folder / "tiny" / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert list(written["figures"]) == list(first["figures"])
    assert written["command"] == f"retro-np experiment {name} --scale tiny" + (" --seeds 2" if seeds else "")
    assert written["seeds"] == (seeds or 1)
    assert first["sentence"].endswith(".")
    assert first["verdict"] in IN_WORDS.values()
    assert json.dumps(first["comparisons"]) == json.dumps(second["comparisons"])
    assert (folder / "tiny" / f"{name}.png").stat().st_size > 1000
    assert not (folder / f"{name}.json").exists()  # only a full run writes this file


@pytest.fixture(scope="module")
def lab(tmp_path_factory, corpus):
    """A tiny lab, its database, and its models of two seeds."""
    folder = tmp_path_factory.mktemp("lab")
    with open_lab(folder, "tiny") as lab:
        database = lab.database(write_corpus(folder / "texts", 40), "texts")
        yield lab, database, [lab.pair(database, seed) for seed in (0, 1)]


@pytest.mark.slow
def test_each_seed_has_its_own_models(lab):
    _, _, pairs = lab
    for first, second in zip(*pairs, strict=True):
        assert first.name != second.name
        assert not np.array_equal(first.params["embedding"], second.params["embedding"])


def test_each_condition_has_the_losses_that_score_returns(lab):
    lab, database, ((baseline, retro), _) = lab
    window = {"sequence_length": 128, "stride": 64, "limit": lab.limit(database)}
    lines = lab.conditions(database, baseline, retro)
    expected = {
        "baseline": (baseline, {"k": 0}), OFF: (retro, {"k": 0}), ON: (retro, {"k": 2}),
        SHUFFLED: (retro, {"k": 2, "shuffle_seed": SHUFFLE_SEED}),
    }  # fmt: skip
    for name, (model, condition) in expected.items():
        plain = score(model.params, model.config, database, **condition, **window)
        assert np.array_equal(lines[name].nats, plain.nats), name
    reread = lab.conditions(database, baseline, retro)  # read from the stored scores
    assert all(np.array_equal(reread[name].nats, lines[name].nats) for name in lines)


def test_an_error_names_the_damaged_file_of_the_lab(lab):
    lab, database, ((baseline, retro), _) = lab
    lab.conditions(database, baseline, retro)
    lab.leakage(database)
    for path in (lab.folder / "scores").iterdir():
        contents = path.read_bytes()
        for damaged in (b"", contents[:100]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path.name} is damaged"):
                lab.conditions(database, baseline, retro), lab.leakage(database)
        path.write_bytes(contents)


def test_several_seeds_for_a_one_seed_experiment_and_a_folder_named_like_the_result_are_refused(tmp_path):
    with pytest.raises(UserError, match="trains models of one seed"):
        run_experiment("model-size", tmp_path, "tiny", seeds=2)
    (tmp_path / "tiny" / "leakage.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"leakage\.png was not written by this command"):
        run_experiment("leakage", tmp_path, "tiny")
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == ["leakage.png"]


def test_plots_do_not_import_pyplot(tmp_path):
    code = "import sys; from retro_np.report.plots import plot_bars; plot_bars({'a': 1}, sys.argv[1], 'share'); "
    code = code.replace("sys.argv[1]", repr(str(tmp_path / "bars.png"))) + "print('matplotlib.pyplot' in sys.modules)"
    out, err, status = fresh_python(code, MPLBACKEND="TkAgg")
    assert (out, status) == ("False", 0), err
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_nan_and_infinity_become_null(tmp_path, monkeypatch):
    odd = find_experiment("subsets")
    monkeypatch.setattr(odd, "measure", lambda lab: {"a": [float("nan"), 1.0], "b": float("inf")})
    monkeypatch.setattr(odd, "draw", lambda figures, path: None)
    monkeypatch.setattr(odd, "verdict", lambda figures: (None, "Odd."))
    run_experiment("subsets", tmp_path, "tiny")
    written = json.loads((tmp_path / "tiny" / "subsets.json").read_text(), parse_constant=pytest.fail)
    assert written["figures"] == {"a": [None, 1.0], "b": None}


@pytest.mark.slow
def test_pretrain_writes_the_trained_models_in_half_precision(folder, tmp_path):
    with open_lab(folder, "tiny") as lab:
        files = make_pretrained(lab, tmp_path)
        baseline, retro = lab.pair(lab.database(), 0)
    for path, model in zip(files[:2], (baseline, retro), strict=True):
        assert load_params(path)[1] == model.config
        stored = load_file(path)["embedding"]
        assert stored.dtype == np.float16
        assert np.array_equal(stored, model.params["embedding"].astype(np.float16))
    assert files[2].read_bytes() == (lab.database().path / "tokenizer.json").read_bytes()


def test_the_bundled_folder_has_two_models_of_one_decoder_their_licences_and_nothing_else():
    assert sorted(path.name for path in BUNDLED.iterdir()) == [
        "LICENSE", "LICENSE-MiniLM", "README.md", "baseline.safetensors", "retro.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 8_000_000
    (baseline, plain, _), (retro, config, _) = load_pretrained("baseline"), load_pretrained()
    assert not plain.retrieves
    assert config.retrieves
    assert (plain.d_model, plain.n_layers, plain.vocabulary_size) == (
        config.d_model, config.n_layers, config.vocabulary_size,
    )  # fmt: skip
    assert baseline["embedding"].dtype == retro["embedding"].dtype == np.float32


def test_the_model_card_has_the_recorded_figures_and_the_hashes_of_its_files():
    card = " ".join((BUNDLED / "README.md").read_text(encoding="utf-8").split())
    root = Path(__file__).parents[2]
    figures = json.loads((root / "docs" / "experiments" / "pretrained.json").read_text(encoding="utf-8"))["figures"]
    assert figures["bytes_of_files"] == sum(
        (BUNDLED / name).stat().st_size for name in ("baseline.safetensors", "retro.safetensors", "tokenizer.json")
    )
    for (name, line), parameters in zip(figures["lines"].items(), [figures["parameters"]] * 4, strict=True):
        assert f"| {name} | {parameters[name != 'baseline']:,} | {line['bpb']:.4f} |" in card
    for name in ("baseline", "retro"):
        _, config, _ = load_pretrained(name)
        assert count_parameters(config, True) == figures["parameters"][name != "baseline"]
        assert sha256_of(BUNDLED / f"{name}.safetensors") in card
    assert f"{figures['held_out']['documents']} held-out modules" in card


@pytest.mark.slow
def test_the_losses_of_a_lab_equal_those_of_score(folder):
    with open_lab(folder, "tiny") as lab:
        database = lab.database()
        _, retro = lab.pair(database, 0)
        scored = lab.scored(database, retro, k=1)
        window = {"sequence_length": SCALES["tiny"].sequence_length, "stride": SCALES["tiny"].sequence_length // 2}
        plain = score(retro.params, retro.config, database, k=1, limit=lab.limit(database), **window)
        assert np.array_equal(scored.nats, plain.nats)
        assert lab.scored(database, retro, k=1).bits_per_byte() == scored.bits_per_byte()
        assert (folder / "tiny" / "models" / retro.name / CHECKPOINT).exists()


@pytest.mark.slow
def test_a_mistake_is_reported_in_one_line_that_says_what_to_do(tmp_path):
    assert "choose from random-neighbours, leakage" in refused("experiment", "perplexity", "-o", tmp_path)
    assert "choose from tiny, small" in refused("experiment", "leakage", "--scale", "huge", "-o", tmp_path)
    line = refused("experiment", "second-corpus", "--scale", "tiny", "-o", tmp_path)
    assert f"pip install --no-deps --target {tmp_path}" in line
    asked = "give a MODEL, such as smollm2, and a DB if it retrieves, or --memory DB, or --pretrained"
    assert asked in refused("sample")
    with pytest.raises(UserError, match="no experiment"):
        find_experiment("os")


def test_the_equal_baseline_is_interpolated_and_extrapolated_in_the_logarithm_of_the_parameters():
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
def test_the_control_requires_a_gain_with_every_seed_no_gain_if_shuffled_and_off_near_the_baseline(
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
    runs[1][ON]["bpb"] = 1.95  # less than half of the gain of a RETRO from scratch
    assert retrofit.verdict(fitted)[0] is False
    runs[0][ON]["bpb"], runs[1][ON]["bpb"] = 2.1, 1.9
    assert retrofit.verdict(fitted)[0] is False
    size = {"width": 8, "parameters": {"baseline": 100, "RETRO": 150}, "equal_baseline": 1000.0}
    sizes = [size | {"lines": {"baseline": {"bpb": 2.0}, OFF: {"bpb": 2.01}, ON: {"bpb": on}}} for on in (1.9, 1.85)]
    assert model_size.verdict({"sizes": sizes})[0] is True
    assert model_size.verdict({"sizes": sizes[::-1]})[0] is False  # the gain shrinks
    assert model_size.verdict({"sizes": [sizes[0], sizes[1] | {"equal_baseline": 300.0}]})[0] is False
    sizes[0]["lines"][OFF]["bpb"] = 2.03
    assert model_size.verdict({"sizes": sizes})[0] is False
    rows = {name: {ON: {"bpb": bpb}} for name, bpb in ablations.PAPER.items()}
    assert ablations.verdict({"steps": 300, "rows": rows, "paper": ablations.PAPER})[0] is True
    curves = {"baseline": [2.1] * 16 + [2.0], OFF: [2.1] * 16 + [2.0], ON: [2.05] * 16 + [1.9]}
    figures = {"alphas": [i / 16 for i in range(17)], "curves": curves, "share_of_chunks": [0.1] * 17, "chunk_size": 16}
    assert leakage.verdict(figures)[0] is True
    curves[ON][2] = 2.11
    assert leakage.verdict(figures)[0] is False
    assert "RETRO[ON] is below its baseline at every α above 12.5 %." in leakage.verdict(figures)[1]
    curves[ON][2], curves[ON][-1] = 2.05, 1.99
    assert leakage.verdict(figures)[0] is False
