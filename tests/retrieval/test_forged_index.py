"""Forged graph files, loaded and searched in a forked process, because a fault in hnswlib would end the process.

Ground truth: the numbers that hnswlib wrote, one of which is changed, and what hnswlib reads of them.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hostile.graphs import Case, forked, header_of, lists_of, mutated, nodes_of, outcomes, tried
from support import SMALL

from retro_np.errors import UserError
from retro_np.retrieval.build import build_database
from retro_np.retrieval.graph import HEADER, LINKS, LIST_BYTES, WORDS_PER_LIST
from retro_np.retrieval.index import load_hnsw
from retro_np.retrieval.manifest import file_facts, write_manifest
from retro_np.retrieval.verify import verify_database

FREE = ("mult", "top", "entry")  # fields of the header that the keys do not determine
N = 90  # nodes


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("forged"), N)


@pytest.fixture
def case(own):
    yield own
    own.restore()


@pytest.fixture
def refusal(case):
    """A function that changes a copy of the graph's words and returns the line with which loading it is refused."""

    def change(edit):
        words = np.frombuffer(case.data, np.uint32).copy()
        edit(words)
        case.path.write_bytes(words.tobytes())
        with pytest.raises(UserError) as error:
            load_hnsw(case.path, case.keys)
        return str(error.value)

    return change


def test_a_graph_of_our_own_is_searched(case):
    assert forked(tried, case) == "searched"


@pytest.mark.parametrize("seed", range(3))
def test_no_forged_graph_ends_the_process_and_a_fifth_gets_past_the_check(case, seed):
    counts = forked(outcomes, case, seed, range(120))
    assert set(counts) == {"searched", "refused"}
    assert counts["searched"] >= 24


@pytest.mark.parametrize("name", [name for name in HEADER.names if name not in FREE])
def test_a_header_that_does_not_fit_the_keys_is_refused(case, refusal, name):
    for change in (1, -1, 2**31, 2**63):

        def edit(words, change=change):
            header_of(words)[name] = (int(header_of(words)[name][0]) + change) % 2**64

        line = refusal(edit)
        assert line.startswith(f"{case.path} is not a graph of its shard's keys (its header says otherwise)")
        assert line.endswith("build the database again in another folder, or search with --exact")


@pytest.mark.parametrize(("name", "value"), [("top", -1), ("top", 2**31 - 1), ("entry", 2**32 - 1), ("entry", N)])
def test_an_entry_that_does_not_exist_is_refused(refusal, name, value):
    assert "its header says otherwise" in refusal(lambda words: header_of(words).__setitem__(name, value))


def test_an_entry_below_the_highest_layer_is_refused(refusal):
    def below(words):
        places, filled = lists_of(words)
        header_of(words)["entry"] = next(i for i, place in enumerate(places) if place not in filled)

    assert "its entry is not a node of the highest layer" in refusal(below)


def test_a_highest_layer_without_nodes_is_refused(refusal):
    def higher(words):
        header_of(words)["top"] += 1

    assert "its entry is not a node of the highest layer" in refusal(higher)


@pytest.mark.parametrize("number", [2 * LINKS + 1, 2**16 + 1, 2**32 - 1])
def test_more_links_than_fit_and_nodes_marked_as_deleted_are_refused(refusal, number):
    for node in (0, N - 1):
        line = refusal(lambda words, node=node: nodes_of(words).__setitem__((node, 0), number))
        assert "a node links to one that does not exist" in line


@pytest.mark.parametrize("target", [N, 2**31, 2**32 - 1])
def test_a_link_to_a_node_that_does_not_exist_is_refused(refusal, target):
    for node, slot in ((0, 1), (N - 1, 2 * LINKS)):
        line = refusal(lambda words, at=(node, slot): nodes_of(words).__setitem__(at, target))
        assert "a node links to one that does not exist" in line


@pytest.mark.parametrize(("slot", "value"), [(1, LINKS + 1), (1, 2**16), (2, N), (WORDS_PER_LIST, 2**32 - 1)])
def test_a_list_above_layer_0_with_a_wrong_number_is_refused(refusal, slot, value):
    def edit(words):
        words[lists_of(words)[1][-1] + slot] = value

    assert "a node links to one that does not exist" in refusal(edit)


def test_a_link_to_a_node_that_is_not_in_the_layer_is_refused(refusal):
    def edit(words):
        places, filled = lists_of(words)
        words[filled[0] + 1 : filled[0] + 3] = 1, next(i for i, place in enumerate(places) if place not in filled)

    assert "a node links to one that is not in the same layer" in refusal(edit)


@pytest.mark.parametrize("change", [1, 4, -4, LIST_BYTES, -LIST_BYTES, 2**31])
def test_lists_of_another_size_are_refused(case, refusal, change):
    _, filled = lists_of(np.frombuffer(case.data, np.uint32))
    for place in filled:
        line = refusal(lambda words, at=place: words.__setitem__(at, (int(words[at]) + change) % 2**32))
        assert "is not a graph of its shard's keys" in line


@pytest.mark.parametrize("label", [0, 2**31, N])
def test_labels_that_repeat_or_are_not_in_the_graph_are_refused(refusal, label):
    line = refusal(lambda words: nodes_of(words).__setitem__((5, -2), label))
    assert "it does not have one entry for each key" in line


@pytest.mark.parametrize("kept", [0, 1, 95, 96, 97, 5000, -LIST_BYTES, -4, -1])
@pytest.mark.parametrize("added", [0, 1, 4, LIST_BYTES, 10_000])
def test_a_graph_that_is_cut_or_extended_is_refused(case, kept, added):
    case.path.write_bytes(case.data[:kept] + bytes(added))
    if len(case.data[:kept]) + added != len(case.data):
        with pytest.raises(UserError, match=r"not the length|wrong sizes"):
            load_hnsw(case.path, case.keys)


def test_a_missing_graph_is_refused(case, tmp_path):
    shutil.copy(case.folder / "equal.npy", tmp_path)
    with pytest.raises(UserError, match="No such file"):
        load_hnsw(tmp_path / "index.hnsw", case.keys)


@pytest.mark.parametrize("value", [-1, 5, N + 1, 2**62])
def test_rows_of_equal_keys_that_do_not_fit_together_are_refused(case, value):
    first = case.equal.copy()
    first[N] = value
    first[5] = 4
    case.restore(first)
    with pytest.raises(UserError, match=r"equal.npy does not name the first of equal keys"):
        load_hnsw(case.path, case.keys)


def test_a_search_in_a_graph_of_other_links_gives_true_distances(case):
    """Links that lead only to node 0 make results worse, but a distance is always that of its row."""
    words = np.frombuffer(case.data, np.uint32).copy()
    nodes_of(words)[:, 1 : 1 + 2 * LINKS] = 0
    case.path.write_bytes(words.tobytes())
    index = load_hnsw(case.path, case.keys)
    rows, distances = index.search_graph(case.keys[:20], 3)
    np.testing.assert_allclose(distances, ((case.keys[:20, None] - case.keys[rows]) ** 2).sum(-1), rtol=1e-5)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "db"
    build_database(corpus, folder, replace(SMALL, shard_bytes=9000, d_key=24), "hashing")
    return folder


def test_verify_names_each_forged_graph_or_finds_that_it_works(folder, tmp_path):
    """The manifest is made to fit, so that only the contents can tell."""
    copy = shutil.copytree(folder, tmp_path / "db")
    file = copy / "shards" / "00000" / "index.hnsw"
    data, manifest = file.read_bytes(), json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]

    def verify():
        counts = [0, 0]
        for number in range(6):
            file.write_bytes(mutated(data, np.random.default_rng(number)))
            manifest["files"] = file_facts(copy)
            write_manifest(copy, manifest)
            broken = verify_database(copy).broken
            assert all(str(file) in line and "\n" not in line for line in broken)
            counts[bool(broken)] += 1
        return counts

    works, broken = forked(verify)
    assert works + broken == 6
    assert broken >= 2
