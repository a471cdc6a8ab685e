"""The commands as a user runs them, each in its own process. Ground truth: what the library itself returns."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support import EXPECT_C, refused, run, write_corpus

from retro_np import Database, load_params
from retro_np.evaluation.bits_per_byte import score

SIZES = ["--d-model", "16", "--d-ffw", "32", "--n-heads", "2", "--d-head", "8", "--n-layers", "2"]
RETRIEVAL = ["--cca-layers", "2", "--encoder-layers", "1"]
STEPS = ["--steps", "6", "--sequence-length", "64", "--batch-size", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A corpus, a database with BERT's keys, a baseline and a RETRO, all made by commands."""
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "docs", documents=12)
    for arguments in (
        (
            "build",
            folder / "docs",
            "-o",
            folder / "db",
            "--chunk-size",
            "16",
            "--vocabulary-size",
            "300",
            "--held-out",
            "0.25",
        ),
        ("train", folder / "db", "-o", folder / "baseline", "--baseline", *SIZES, *STEPS),
        ("train", folder / "db", "-o", folder / "retro", *SIZES, *RETRIEVAL, *STEPS),
    ):
        status, _, err = run(*arguments)
        assert status == 0, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [],
        ["build"],
        ["search"],
        ["train"],
        ["evaluate"],
        ["sample"],
        ["inspect"],
        ["experiment"],
        ["pretrain"],
        ["gradcheck"],
        ["info"],
        ["demo"],
    ],
)
def test_every_command_has_a_help_text_of_more_than_15_words(command):
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert len(out.split()) > 15


@pytest.mark.slow
def test_search_prints_what_the_database_finds(work):
    status, out, err = run("search", work / "db", "return value index", "-k", "3")
    assert status == 0, err
    database = Database.open(work / "db")
    ids, _ = database.search("return value index", 3)
    for chunk in ids:
        assert database.documents[int(database.document_of(chunk))]["name"] in out


def test_a_search_for_more_chunks_than_exist_shows_all(work):
    status, out, _ = run("search", work / "db", "value", "-k", "1000")
    assert status == 0
    assert f"holds {Database.open(work / 'db').n_chunks} chunks" in out


@pytest.mark.slow
def test_evaluate_prints_and_saves_the_librarys_figures(work, tmp_path):
    status, out, err = run(
        "evaluate", work / "retro" / "checkpoint.safetensors", work / "db", "--baseline",
        work / "baseline" / "checkpoint.safetensors", "-o", tmp_path, "--sequence-length", "64", "--stride", "32",
    )  # fmt: skip
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    params, config = load_params(work / "retro" / "checkpoint.safetensors")
    losses = score(params, config, Database.open(work / "db"), k=2, sequence_length=64, stride=32)
    assert results["models"]["RETRO[ON]"]["bpb"] == pytest.approx(losses.bits_per_byte())
    assert f"{losses.bits_per_byte():.4f}" in out
    assert next(iter(results["models"])) == "baseline"


def test_sample_shows_what_was_retrieved_and_writes_a_page_that_escapes_text(work, tmp_path):
    prompt = "<script>alert(1)</script> " + "return value " * 12
    status, out, err = run(
        "sample", work / "retro" / "checkpoint.safetensors", work / "db", "--prompt", prompt, "--length", "20",
        "--page", tmp_path / "page.html",
    )  # fmt: skip
    assert status == 0, err
    assert "squared distance" in out
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "module_" in page


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "x", "value " * 400], ids=["empty", "one token", "longer than n"])
def test_prompts_of_any_length_work(work, prompt):
    status, _, err = run(
        "sample", work / "retro" / "checkpoint.safetensors", work / "db", "--prompt", prompt, "--length", "3"
    )
    assert status == 0, err


def test_retrofit_does_not_change_the_baseline(work, tmp_path):
    baseline = work / "baseline" / "checkpoint.safetensors"
    status, _, err = run("train", work / "db", "-o", tmp_path, "--retrofit", baseline, *RETRIEVAL, *STEPS)
    assert status == 0, err
    retro_params, config = load_params(tmp_path / "checkpoint.safetensors")
    baseline_params, _ = load_params(baseline)
    assert config.retrieves
    assert np.array_equal(retro_params["readout"], baseline_params["readout"])
    assert np.array_equal(retro_params["layers"][1]["ffw"]["w_in"], baseline_params["layers"][1]["ffw"]["w_in"])


def test_info_names_kernels_blas_and_weights():
    status, out, _ = run("info")
    assert status == 0
    for word in ("exact_search", "BLAS", "threads", "all-MiniLM-L6-v2", "C extension"):
        assert word in out
    assert ("missing" in out) == (not EXPECT_C)  # The row of the C extension says whether it was built.


@pytest.mark.slow
def test_a_missing_or_wrong_input_gives_one_line_and_status_2(work, tmp_path):
    checkpoint, db = work / "retro" / "checkpoint.safetensors", work / "db"
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "bad.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    assert "holds no text" in refused("build", tmp_path / "empty", "-o", tmp_path / "db")
    assert "is a binary file" in refused("build", tmp_path / "binary", "-o", tmp_path / "db")
    assert "no corpus at" in refused("build", tmp_path / "nowhere", "-o", tmp_path / "db")
    assert "no database at" in refused("search", tmp_path, "text")
    assert "no checkpoint at" in refused("evaluate", tmp_path / "none.safetensors", db)
    assert "bad.safetensors" in refused("evaluate", tmp_path / "bad.safetensors", db)
    assert "stride must be a multiple of the chunk size, " in refused("evaluate", checkpoint, db, "--stride", "17")
    assert "no split" in refused("evaluate", checkpoint, db, "--split", "held-out")
    assert "--cca-layers" in refused("train", db, "-o", tmp_path / "run", "--cca-layers", "two")
    assert "no preset" in refused("train", db, "-o", tmp_path / "run", "--preset", "gpt")
    assert "already has chunked" in refused("train", db, "-o", tmp_path / "run", "--retrofit", checkpoint)
    assert "no folder" in refused("search", db, "text", "--embedder", tmp_path / "nowhere")
    assert "no corpus is named" in refused("build", "", "-o", tmp_path / "db")
    assert "--limit-mb must be a finite number, not nan" in refused(
        "build", work / "docs", "-o", tmp_path / "db", "--limit-mb", "nan"
    )
    assert "chunk_size must be at most 65,536" in refused(
        "build", work / "docs", "-o", tmp_path / "db", "--chunk-size", 10**14
    )
    assert "is a file" in refused("evaluate", checkpoint, db, "-o", tmp_path / "binary")
    assert "so it is a RETRO" in refused("evaluate", checkpoint, db, "--baseline", checkpoint, "-o", tmp_path / "out")
    assert "is a folder" in refused("sample", checkpoint, db, "--prompt", "x", "--page", tmp_path / "empty")
    assert "temperature must be at least 0 and finite, not inf" in refused(
        "sample", checkpoint, db, "--prompt", "x", "--temperature", "inf"
    )
    assert "--pretrained replaces MODEL" in refused("sample", "--pretrained", checkpoint, db, "--prompt", "x")
    assert refused("train", db, "-o", tmp_path / "run", "--d-model", 7).startswith("retro-np: d_model must be even")
    assert "learning_rate must be in (0, 1], not nan" in refused(
        "train", db, "-o", tmp_path / "run", "--learning-rate", "nan"
    )
    assert "minutes must be above 0 and at most 10,000, not inf" in refused(
        "demo", "--minutes", "inf", "-o", tmp_path / "demo"
    )
    assert "holds other files" in refused("demo", "-o", work)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--preset", "retro-172m", "--baseline"], "--preset excludes --baseline"),
        (["--preset", "retro-172m", "--d-model", "16"], "--preset excludes --d-model"),
        (["--retrofit", "x", "--n-layers", "2"], "--retrofit excludes --n-layers"),
        (["--baseline", "--cca-layers", "2"], "--baseline excludes --cca-layers"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(tmp_path, options, refusal):
    assert refusal in refused("train", tmp_path / "db", "-o", tmp_path / "run", *options)


@pytest.mark.slow
def test_names_with_brackets_and_a_prompt_that_is_not_utf_8_work(tmp_path, work):
    write_corpus(tmp_path / "docs", documents=1)
    (tmp_path / "docs" / "[bold]x[").mkdir()
    (tmp_path / "docs" / "[bold]x[" / "nope].txt").write_text("value return index\n" * 40)
    db = tmp_path / "[" / "a]"
    status, out, err = run("build", tmp_path / "docs", "-o", db, "--held-out", "0", "--vocabulary-size", "270")
    assert status == 0, err
    assert str(db) in out.replace("\n", "")
    status, out, err = run("search", db, "value return", "-k", "2")
    assert status == 0, err
    assert "[bold]x[/nope].txt" in out
    checkpoint = work / "retro" / "checkpoint.safetensors"
    status, _, err = run("sample", checkpoint, work / "db", "--prompt", b"\xff\xfe".decode("utf-8", "surrogateescape"))
    assert status == 0, err


def test_an_interrupt_says_how_to_resume(tmp_path, work):
    command = [sys.executable, "-c", "from retro_np.cli import main; main()", "train", str(work / "db"), "-o"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "run"), *SIZES, *RETRIEVAL, *STEPS, "--steps", "100000", "--checkpoint-every", "1"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Background jobs of a shell ignore it.
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)  # Wait until the first step has ended, because Numba's compiler may swallow an interrupt.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "retro-np: interrupted; run the same command to resume"


@pytest.mark.slow
def test_a_checkpoint_with_a_different_tokenizer_is_refused_even_if_the_sizes_agree(work, tmp_path):
    write_corpus(tmp_path / "docs", documents=12, seed=77)
    arguments = ("--chunk-size", "16", "--vocabulary-size", "300", "--held-out", "0")
    status, _, err = run("build", tmp_path / "docs", "-o", tmp_path / "db", *arguments)
    assert status == 0, err
    checkpoint = work / "retro" / "checkpoint.safetensors"
    assert "a different tokenizer" in refused("sample", checkpoint, tmp_path / "db", "--prompt", "x")
    assert "a different tokenizer" in refused("evaluate", checkpoint, tmp_path / "db", "-o", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(work, tmp_path):
    with safe_open(work / "retro" / "checkpoint.safetensors", "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["readout"][:, 5] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors", metadata)
    broken, db = tmp_path / "nan.safetensors", work / "db"
    window = ("--sequence-length", "64", "--stride", "32")
    assert "not finite" in refused("evaluate", broken, db, "-o", tmp_path / "out", *window)
    assert "not finite" in refused("sample", broken, db, "--prompt", "x")


@pytest.mark.slow
def test_a_checkpoint_with_a_different_vocabulary_size_is_refused(work, tmp_path):
    write_corpus(tmp_path / "docs", documents=6, seed=9)
    status, _, err = run(
        "build", tmp_path / "docs", "-o", tmp_path / "db", "--chunk-size", "16", "--vocabulary-size", "280"
    )
    assert status == 0, err
    line = refused("sample", work / "retro" / "checkpoint.safetensors", tmp_path / "db", "--prompt", "x")
    assert "has a different tokenizer" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["inspekt"], "No such command 'inspekt'"),
        (["search"], "Missing argument 'DB'; see retro-np search --help"),
        (["inspect", "a", "b", "--foo"], "No such option: --foo"),
        (["sample", "-k", "many", "a", "b"], "Invalid value for '-k'"),
    ],
    ids=str,
)
def test_a_wrong_command_line_gives_one_line(arguments, line):
    assert line in refused(*arguments)


def test_without_arguments_the_commands_are_listed():
    status, out, err = run()
    assert status == 0, err
    assert "retro-np demo" in out
    assert "inspect" in out


def test_the_gradcheck_command_fails_if_the_tolerance_is_out_of_reach():
    status, out, err = run("gradcheck", "rms_norm", "--tolerance", "1e-30")
    assert status == 2
    assert "FAILS" in out
    assert "finite differences" in err


def test_the_gradcheck_command_checks_only_the_named_operators():
    status, out, err = run("gradcheck", "attention")
    assert status == 0, err
    assert "attention, causal" in out
    assert "rms_norm" not in out
    assert "no operator's name contains 'convolution'" in refused("gradcheck", "convolution")


@pytest.mark.slow
def test_the_gradcheck_command_shows_every_operator_below_1e_6():
    status, out, err = run("gradcheck")
    assert status == 0, err
    for name in ("rms_norm", "CCA", "ENCODER", "RETRO[ON], loss"):
        assert name in out


@pytest.mark.slow
@pytest.mark.parametrize("models", ["bundled", "trained here"])
def test_the_demo_writes_its_files_and_a_second_run_reuses_them(tmp_path, models):
    scratch = ["--from-scratch"] if models == "trained here" else []
    status, out, err = run("demo", "--minutes", "0.5", "-o", tmp_path / "demo", *scratch)
    assert status == 0, err
    assert "RETRO needs" in out
    assert ("models trained here" if scratch else "bundled models") in " ".join(out.split())
    files = [
        "plan.json", "results.json", "losses.npz", "bpb_alpha.png", "samples.html", "inspect.html",
        "baseline/checkpoint.safetensors", "retro/checkpoint.safetensors", "db/manifest.json",
    ]  # fmt: skip
    assert (tmp_path / "demo" / "loss.png").exists() == bool(scratch)
    stamps = {name: (tmp_path / "demo" / name).stat().st_mtime_ns for name in files}
    status, second_out, err = run("demo", "-o", tmp_path / "demo", *scratch)
    assert status == 0, err
    assert {name: (tmp_path / "demo" / name).stat().st_mtime_ns for name in stamps} == stamps
    assert out.splitlines()[-8:] == second_out.splitlines()[-8:]
    assert "holds a demo with minutes 0.5" in refused("demo", "--minutes", "3", "-o", tmp_path / "demo", *scratch)
    opposite = [] if scratch else ["--from-scratch"]
    assert "holds a demo with from_scratch" in refused("demo", "-o", tmp_path / "demo", *opposite)
    assert Path(tmp_path / "demo" / "samples.html").read_text().count("<section") > 3


@pytest.mark.slow
def test_sampling_from_the_bundled_model_needs_only_a_prompt(tmp_path):
    status, out, err = run("sample", "--pretrained", "--prompt", "import json\n", "--length", "40", cwd=tmp_path)
    assert status == 0, err
    assert (tmp_path / "runs" / "pretrained" / "db" / "manifest.json").exists()
    assert len(out.splitlines()) > 5
    database = tmp_path / "runs" / "pretrained" / "db"
    status, second_out, err = run("sample", "--pretrained", database, "--prompt", "import json\n", "--length", "40")
    assert status == 0, err
    assert second_out == out
