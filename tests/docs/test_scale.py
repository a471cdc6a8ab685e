"""The scale page and its arithmetic. Ground truth: arithmetic by hand, and the files of a real database."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_np.retrieval.build import build_database
from retro_np.retrieval.config import D_KEY, BuildConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
scale, costs = map(importlib.import_module, ("scale", "scale_costs"))
LINE = {100: 1.0, 1000: 3.0, 10_000: 7.0}


def test_the_page_shows_the_results_of_the_arithmetic():
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--check"]
    assert subprocess.run(command, timeout=600).returncode == 0, "run python benchmarks/scale.py"


def test_bytes_equal_those_computed_by_hand():
    chunks = costs.chunks_of(10**9)
    assert chunks == 15_625_000  # 10⁹ / 64
    assert chunks * costs.key_bytes(384, "float16") == 12_000_000_000  # 15,625,000 × 384 × 2
    assert chunks * costs.key_bytes(384, "float32") == 24_000_000_000
    assert chunks * costs.token_bytes() == 2_000_000_000  # 10⁹ × 2
    assert chunks * costs.token_bytes(128_000) == 4_000_000_000
    assert chunks * costs.list_bytes() == 6_000_000_000  # 15,625,000 × 32 × 12
    assert chunks * costs.code_bytes(48) == 875_000_000  # 15,625,000 × 56
    assert costs.machines_for(10**12, 1024) == 63  # 15.625 × 10⁹ × 1024 = 16 × 10¹² bytes, divided by 256 × 10⁹: 62.5
    assert costs.tokens_in(256 * 10**9, 1000) == 16_384_000_000  # 256 million chunks


def test_the_papers_figures_equal_those_computed_by_hand():
    # 977,563 + 0.04 × 3,423,740 + 236,918 + 13,288 + 374,952 = 1,739,670.6 million; 1,772.8 million documents
    tokens, documents = costs.paper_tokens()
    assert tokens == pytest.approx(1_739_670.6e6)
    assert documents == pytest.approx(1_772.8e6)
    assert costs.paper_value_bytes(768, "float32", 2) == 3584  # 3072 + 128 × 4
    assert costs.knn_lm_bytes() == 4100
    assert [round(size / costs.chunks_of(tokens)) for tokens, size in costs.PAPER_INDEX.items()] == [3440, 3401]


@pytest.mark.parametrize(("keys", "value"), [(100, 1), (1000, 3), (10**3.5, 5), (10**5, 11), (10, -1)])
def test_measurements_are_interpolated_and_extrapolated_in_the_logarithm_of_the_keys(keys, value):
    assert costs.by_log(LINE, keys) == pytest.approx(value)


def test_a_query_searches_every_shard_and_the_time_for_all_neighbours_grows_with_the_square_of_the_tokens():
    shard = BuildConfig.shard_bytes
    shards = costs.shards_of(10**12, shard)
    assert costs.search_seconds(10**12, shard) == pytest.approx(
        shards * costs.query_seconds(costs.keys_per_shard(shard))
    )
    assert costs.neighbours_seconds(2 * 10**12) == pytest.approx(4 * costs.neighbours_seconds(10**12))
    assert costs.shards_of(1000) == 1


def test_of_any_number_of_shards_there_are_two_temporary_lists():
    assert costs.temporary_list_bytes(64, shard=10**9) == 384  # one chunk, one shard: a list of 32 × 12 bytes
    assert costs.temporary_list_bytes(10**12) == 15_625_000_000 * 2 * 384  # before and after a shard is searched


def test_a_stage_takes_the_inverse_of_its_measured_rate_per_chunk():
    seconds = costs.stage_seconds()
    assert 1 / seconds["keys by MiniLM"] == costs.results("embed")["rows"]["retro_np"]["chunks_a_second"]
    assert all(stage > 0 for stage in seconds.values())


def test_the_files_of_a_real_database_have_the_computed_sizes(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for part in range(10):
        text = " ".join(map(str, rng.integers(0, 10**6, 6000)))
        (tmp_path / "corpus" / f"{part}.txt").write_text(text)
    database = build_database(tmp_path / "corpus", tmp_path / "db", BuildConfig(vocabulary_size=300), "hashing")
    header, chunks = 128, database.n_chunks  # header: bytes of a .npy file before its data
    files = {name: facts["bytes"] for name, facts in database.manifest["files"].items()}
    width = D_KEY
    assert files["shards/00000/keys.npy"] - header == chunks * costs.key_bytes(width)
    assert files["shards/00000/tokens.npy"] - header == chunks * costs.token_bytes()
    assert files["shards/00000/documents.npy"] - header == chunks * costs.ID_BYTES
    lists = files["neighbours/train/00000/ids.npy"] + files["neighbours/train/00000/distances.npy"]
    assert lists - 2 * header == chunks * costs.list_bytes()
    shard_files = [name for name in files if name.startswith(("shards/00000/", "neighbours/train/00000/"))]
    assert len(shard_files) == costs.FILES_PER_SHARD
    # The number of a node's layers is random.
    assert files["shards/00000/index.hnsw"] == pytest.approx(chunks * costs.node_bytes(width), rel=0.01)


def test_numbers_are_rounded_and_have_units():
    assert scale.size(12_000_000_000) == "12 GB"
    assert scale.size(1.75e15) == "1.75 PB"
    assert scale.count(15_625_000_000) == "15.6 billion"
    assert scale.span(3 * 86_400) == "3 days"
    assert scale.span(0.0105) == "10.50 ms"


@pytest.mark.slow
def test_the_benchmark_measures_what_the_arithmetic_needs(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--count", "12000", "-o", str(tmp_path / "scale.json")]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0, completed.stderr
    figures = json.loads((tmp_path / "scale.json").read_text())
    assert 4 + 32 * 4 + 8 < figures["node"]["file"] < 160  # M = 16: 32 links, a label, and a few upper layers
    assert figures["sha256_bytes_a_second"] > 1e7
    assert all(row["settings"][-1]["reranked"] > 0.5 for table in figures["quantised"] for row in table["rows"])
