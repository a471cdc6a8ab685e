"""The commands about databases as a user runs them. Ground truth: what the library itself returns."""

import gzip
import json
import shutil

import pytest
from support import all_bytes, refused, run, write_corpus

from retro_np import Database
from retro_np.evaluation.compare import ON
from retro_np.retrieval.edit import remove_documents

HASHING = ["--embedder", "hashing", "--chunk-size", "16", "--vocabulary-size", "300"]


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    """A database of two weighted sources of different kinds."""
    folder = tmp_path_factory.mktemp("cli_database")
    write_corpus(folder / "code", documents=14)
    with gzip.open(folder / "prose.jsonl.gz", "wt") as file:
        for number in range(10):
            file.write(json.dumps({"name": f"story {number}", "text": f"once upon a time {number} " * 20}) + "\n")
    sources = ["--source", f"code={folder}/code:0.75", "--source", f"prose={folder}/prose.jsonl.gz:0.25"]
    status, out, err = run("build", *sources, "-o", folder / "db", *HASHING, "--held-out", "0.2", "--deduplicate", "0")
    assert status == 0, err
    assert "train: " in out
    return folder / "db"


@pytest.fixture
def copy(db, tmp_path):
    return shutil.copytree(db, tmp_path / "db")


def test_sources_and_their_weights_are_in_the_manifest(db):
    database = Database.open(db)
    code, prose = database.manifest["sources"]
    assert (code["name"], code["weight"], prose["name"], prose["weight"]) == ("code", 0.75, "prose", 0.25)
    assert code["rows"][0][1] == prose["rows"][0][0]
    assert prose["rows"][-1][1] == database.n_chunks
    assert {record["source"] for record in database.documents} == {"code", "prose"}


def test_search_prints_what_the_library_finds_as_json(db):
    status, out, err = run("search", db, "once upon a time", "-k", "4", "--json")
    assert status == 0, err
    database = Database.open(db)
    ids, distances = database.search("once upon a time", 4)
    printed = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in printed] == ids.tolist()
    assert [line["distance"] for line in printed] == pytest.approx(distances.tolist())
    assert [line["rank"] for line in printed] == [1, 2, 3, 4]
    for line in printed:
        value = database.value(line["id"])
        assert line["chunk"] == database.text(value[:16])
        assert line["continuation"] == database.text(value[16:])
        assert database.documents[line["document"]]["name"] == line["name"]


def test_search_in_a_terminal_shows_rank_distance_document_chunk_and_continuation(db):
    status, out, _ = run("search", db, "once upon a time", "-k", "2", "--exact")
    assert status == 0
    database = Database.open(db, index="exact")
    ids, distances = database.search("once upon a time", 2)
    for rank, (chunk, distance) in enumerate(zip(ids, distances, strict=True), 1):
        record = database.documents[int(database.document_of(chunk))]
        assert f"{rank}  squared distance {distance:.3f}  document {record['id']}  {record['name']}" in out


def test_verify_names_the_broken_file(copy):
    status, out, err = run("verify", copy)
    assert status == 0, err
    assert "BROKEN" not in out
    assert out.splitlines()[0].startswith("ok: ")
    data = bytearray((copy / "tombstones.npy").read_bytes())
    data[-1] ^= 1
    (copy / "tombstones.npy").write_bytes(data)
    status, out, err = run("verify", copy)
    assert status == 2
    assert "BROKEN: " in out
    assert "tombstones.npy" in out
    assert "has defects (1); restore it" in err


@pytest.mark.slow
def test_documents_are_added_and_removed_and_the_database_is_compacted(copy, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tale.txt").write_text("the zanzibar lighthouse keeper wrote letters every evening " * 30)
    status, out, err = run("add", copy, "--source", f"tales={tmp_path}/more:0.1")
    assert status == 0, err
    result = json.loads(run("search", copy, "zanzibar lighthouse keeper wrote letters", "-k", "1", "--json")[1])
    assert result["name"] == "tale.txt"
    assert run("verify", copy)[0] == 0
    status, out, err = run("remove", copy, "--document", "tale.txt")
    assert status == 0, err
    assert "retro-np compact" in out
    assert "zanzibar" not in run("search", copy, "zanzibar lighthouse keeper", "-k", "1000", "--json")[1]
    assert run("compact", copy)[0] == 0
    assert run("verify", copy)[0] == 0
    compacted = all_bytes(copy)
    assert "nothing to compact" in run("compact", copy)[2]
    assert all_bytes(copy) == compacted


@pytest.mark.slow
def test_mistakes_give_one_line(db, copy, tmp_path):
    assert "no corpus is named" in refused("build", "-o", tmp_path / "x", *HASHING)
    assert "name the folder of the database" in refused("build", "stdlib", *HASHING)
    assert "a number above 0" in refused("build", "--source", "a=stdlib:-1", "-o", tmp_path / "x", *HASHING)
    assert "has no document 'nobody'" in refused("remove", db, "--document", "nobody")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a text")
    assert "give every source a weight" in refused("add", db, tmp_path / "text")
    assert "no database at" in refused("add", tmp_path, "stdlib")
    assert "no database at" in refused("verify", tmp_path)
    assert "no database at" in refused("compact", tmp_path)
    assert "leave out --tokenizer" in refused(
        "build", "stdlib", "-o", tmp_path / "x", "--like", db, "--tokenizer", db / "tokenizer.json"
    )
    assert "--deduplicate" in run("build", "--help")[1]
    assert "no Dask scheduler answers" in refused(
        "build", "stdlib", "-o", tmp_path / "y", *HASHING, "--dask", "nonsense://there"
    )


@pytest.mark.slow
def test_a_model_is_evaluated_with_a_second_database_with_two_databases_or_with_a_fraction(db, tmp_path):
    second = tmp_path / "second"
    corpus = write_corpus(tmp_path / "docs", documents=6, seed=4)
    assert run("build", corpus, "-o", second, "--like", db, "--held-out", "0")[0] == 0
    sizes = ["--d-model", "16", "--d-ffw", "32", "--n-heads", "2", "--d-head", "8", "--n-layers", "2"]
    steps = ["--steps", "3", "--sequence-length", "64", "--batch-size", "2", "--cca-layers", "2"]
    status, _, err = run("train", db, "-o", tmp_path / "run", *sizes, *steps)
    assert status == 0, err
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    figures = {}
    for name, options in {
        "default": [],
        "same": ["--retrieve-from", db],
        "second": ["--retrieve-from", second],
        "two": ["--retrieve-from", db, "--retrieve-from", second],
        "half": ["--fraction", "0.5"],
    }.items():
        out = tmp_path / f"results of {name}"
        window = ["--sequence-length", "64", "--stride", "32"]
        status, _, err = run("evaluate", checkpoint, db, "-o", out, *window, *options)
        assert status == 0, err
        results = json.loads((out / "results.json").read_text())
        figures[name] = results["models"][ON]["bpb"]
    assert figures["same"] == figures["default"]
    assert len({figures[name] for name in ("default", "second", "half")}) == 3
    window = ["--sequence-length", "64", "--stride", "32", "-o", tmp_path / "z"]
    assert "must be in (0, 1], not 0.0" in refused("evaluate", checkpoint, db, "--fraction", "0", *window)
    assert "leave out --split" in refused("evaluate", checkpoint, db, "--fraction", "0.5", "--split", "train", *window)


def test_a_removed_document_is_not_trained_on(copy):
    from retro_np.training.batches import training_batch

    database = remove_documents(copy, [0])
    split = database.split("train")
    removed_tokens = set(split.tokens.parts[0][:1].ravel().tolist()) - {0}
    assert removed_tokens
    rows = int((split.documents[:] == 0).sum())
    assert not split.tokens[:rows].any()
    for step in range(20):
        tokens, targets, _ = training_batch(database, split, 2, sequence_length=64, batch_size=2, seed=0, step=step)
        assert (targets[tokens == 0] == -1).all()
