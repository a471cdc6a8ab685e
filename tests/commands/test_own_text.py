"""A folder of one's own Markdown, from its split to the interval of a gain, by documented commands alone.

Ground truth: sentence-transformers for the keys, TensorBoard's own reader for the curve, a bootstrap of ten lines."""

import json

import numpy as np
import pytest
from support import all_bytes, run

from retro_np import Database, load_params

HEADINGS = ["Install", "Usage", "Why chunks", "Neighbours", "Keys", "Evaluation", "Licence"]
WORDS = ["the", "a", "chunk", "neighbour", "reads", "writes", "key", "value", "model", "token", "of", "and", "long"]
SIZES = ["--d-model", "16", "--d-ffw", "32", "--n-heads", "2", "--d-head", "8", "--n-layers", "2", "--cca-layers", "2"]
TRAINING = ["--sequence-length", "64", "--batch-size", "2", "--eval-every", "4", "--log", "tensorboard", *SIZES]
SHARE = 0.2


def done(*arguments):
    status, out, err = run(*arguments)
    assert status == 0, err
    return out + err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with notes of different lengths, an encoder with CLS pooling, a database and a run, made by commands."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(3)
    for number in range(80):
        sections = [
            f"## {rng.choice(HEADINGS)}\n\n{' '.join(rng.choice(WORDS, int(rng.integers(20, 120))))}.\n"
            for _ in range(int(rng.integers(1, 5)))
        ]
        path = folder / "notes" / f"topic {number % 3}" / f"note {number}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# Note {number}\n\n" + "\n".join(sections), encoding="utf-8")
    (folder / "notes" / "draft.txt").write_text("not for the corpus")
    save_cls_encoder(folder / "encoder")
    held = ["--held-out-bytes", str(SHARE), "--include", "*.md"]
    sizes = ["--chunk-size", "16", "--vocabulary-size", "300"]
    done("build", folder / "notes", "-o", folder / "db", *held, *sizes, "--embedder", folder / "encoder")
    done("train", folder / "db", "-o", folder / "run", "--steps", "8", *TRAINING)
    return folder


def save_cls_encoder(folder):
    """Save a small random BERT with CLS pooling and normalisation as sentence-transformers does."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    base = folder.parent / "base"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789#.,"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *WORDS[:9]]
    base.mkdir()
    (base / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n")
    BertTokenizerFast(str(base / "vocab.txt")).save_pretrained(base)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(dict.fromkeys(vocabulary)), **sizes)).save_pretrained(base)
    transformer = Transformer(str(base))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(folder))


@pytest.mark.slow
def test_each_split_holds_its_share_of_the_bytes(folder):
    documents = list(Database.open(folder / "db").documents)
    texts = {path.relative_to(folder / "notes").as_posix(): path for path in (folder / "notes").rglob("*.md")}
    assert {record["name"] for record in documents} <= texts.keys()  # near-copies of held-out notes are left out
    sizes = {name: path.stat().st_size for name, path in texts.items()}
    held = {split: [r["name"] for r in documents if r["split"] == split] for split in ("valid", "test")}
    share = SHARE * sum(sizes.values())
    assert abs(sum(sizes[name] for names in held.values() for name in names) - share) <= max(sizes.values())
    for names in held.values():
        assert abs(sum(map(sizes.get, names)) - share / 2) <= max(sizes.values())
        assert names


@pytest.mark.slow
def test_the_keys_are_those_of_sentence_transformers(folder):
    from sentence_transformers import SentenceTransformer

    database = Database.open(folder / "db")
    texts = [database.text(database.value(i)[:16]) for i in range(database.n_chunks)]
    expected = SentenceTransformer(str(folder / "encoder"), device="cpu").encode(texts)
    np.testing.assert_allclose(database.keys("train")[:], expected, atol=2e-6)


@pytest.mark.slow
def test_the_curve_that_tensorboard_reads_is_what_evaluate_measures(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("valid_bpb")}
    assert sorted(curve) == [3, 7]
    window = ["--split", "valid", "--sequence-length", "64", "--stride", "32"]
    done("evaluate", folder / "run", folder / "db", *window, "-o", folder / "valid")
    results = json.loads((folder / "valid" / "results.json").read_text())
    assert curve[7] == pytest.approx(results["models"]["RETRO[ON]"]["bpb"], rel=1e-5)


@pytest.mark.slow
def test_a_prolonged_run_is_repeated_from_its_configuration_to_the_same_bits(folder):
    said = done("train", folder / "db", "-o", folder / "run", "--steps", "12", *TRAINING)
    assert "from step 8" in said
    assert "cosine" in said
    done("train", folder / "db", "-o", folder / "again", "--config", folder / "run" / "config.json")
    (first, config), (again, same) = (load_params(folder / run / "checkpoint.safetensors") for run in ("run", "again"))
    assert config == same
    assert np.array_equal(first["embedding"], again["embedding"])
    files = [all_bytes(folder / run) for run in ("run", "again")]
    assert files[0]["checkpoint.safetensors"] == files[1]["checkpoint.safetensors"]


@pytest.mark.slow
def test_the_interval_is_that_of_a_bootstrap_over_documents(folder):
    window = ["--split", "test", "--sequence-length", "64", "--stride", "32"]
    done("evaluate", folder / "run", folder / "db", *window, "-o", folder / "test")
    results = json.loads((folder / "test" / "results.json").read_text())
    assert results["settings"]["split"] == "test"
    (found,) = (c for c in results["comparisons"] if (c["of"], c["against"], c["alpha"]) == ("on", "off", None))
    losses, rng = np.load(folder / "test" / "losses.npz"), np.random.default_rng(11)
    on, off = (losses[f"RETRO[{name}]/document_nats"] for name in ("ON", "OFF"))
    n = len(on)
    draws = rng.integers(0, n, (20_000, n))
    ratios = 100 * (on[draws].sum(axis=1) / off[draws].sum(axis=1) - 1)  # the bytes are the same, so they cancel
    assert found["difference_percent"] == pytest.approx(100 * (on.sum() / off.sum() - 1), abs=1e-6)
    interval = np.quantile(ratios, [0.025, 0.975])
    assert found["interval_percent"] == pytest.approx(interval, abs=0.05 * np.ptp(interval))
    assert found["documents"] == n


@pytest.mark.slow
def test_a_text_of_ones_own_is_scored(folder):
    (folder / "letter.md").write_text("# A letter\n\neach model reads a long text and writes a second chunk.\n" * 9)
    text = [
        "--text",
        folder / "letter.md",
        "--embedder",
        folder / "encoder",
        "--sequence-length",
        "64",
        "--stride",
        "32",
    ]
    done("evaluate", folder / "run", folder / "db", *text, "-o", folder / "letter")
    results = json.loads((folder / "letter" / "results.json").read_text())
    size = (folder / "letter.md").stat().st_size
    assert size - 30 <= results["bytes"] < size  # the first token does not count
    (comparison,) = (c for c in results["comparisons"] if (c["of"], c["against"]) == ("on", "off"))
    assert comparison["interval_percent"] is None  # one document has no interval
