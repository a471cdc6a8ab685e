"""RETRO in one file, tutorials/mini_retro.py. Ground truth: the library with the same parameters, search by plain
loops, and finite differences."""

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_np import EncoderConfig, RetroConfig, adamw_init, adamw_update, gradcheck, init_params, retro
from retro_np.nn.model import retro_loss
from retro_np.optim import clip_by_global_norm
from retro_np.tree import map_tree, named_leaves

FILE = Path(__file__).parents[2] / "tutorials/mini_retro.py"
MAX_LINES = 400
ALLOWED = {"numpy", "argparse", "math", "time", "sys", "pathlib", "dataclasses", "collections"}
spec = importlib.util.spec_from_file_location("mini_retro", FILE)
mini = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mini)
M, V = mini.M, len(mini.CHARACTERS)
CONFIGS = {
    "one CCA": {"n_layers": 2, "cca_layers": (2,), "encoder": EncoderConfig(8, 12, 4, 3, 1, ca_layers=(1,))},
    "two CCA": {"n_layers": 3, "cca_layers": (1, 3), "encoder": EncoderConfig(12, 8, 4, 2, 2, ca_layers=(1, 2))},
}


def case(name, n, k, seed=0, dtype=np.float64):
    """A configuration, parameters without any zero or one, tokens, targets and neighbours."""
    config = RetroConfig(V, 16, 24, n_heads=mini.HEADS, d_head=5, chunk_size=M, **CONFIGS[name])
    rng = np.random.default_rng(seed)
    params = map_tree(lambda _, a: (a + 0.3 * rng.standard_normal(a.shape)).astype(dtype), init_params(config, rng))
    tokens = rng.integers(1, V, (2, n + 1))  # 0 is padding, which the file leaves out
    return config, params, tokens[:, :-1], tokens[:, 1:], rng.integers(1, V, (2, n // M, k, 2 * M))


def loss_and_gradients(params, inputs, targets, neighbours):
    logits, model_vjp = mini.retro(params, inputs, neighbours)
    loss, loss_vjp = mini.cross_entropy(logits, targets)
    return loss, model_vjp(loss_vjp(1.0))


def test_it_is_one_short_file_that_imports_numpy_alone():
    source = FILE.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names if isinstance(node, ast.Import)}
    assert "numpy" in names
    assert names <= ALLOWED
    assert {node.module for node in imports if isinstance(node, ast.ImportFrom)} <= ALLOWED


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", [M - 1, M, 2 * M - 1, 2 * M, 3 * M + 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_the_librarys(name, n, k):
    config, params, inputs, targets, neighbours = case(name, n, k)
    np.testing.assert_allclose(
        mini.retro(params, inputs, neighbours)[0], retro(params, config, inputs, neighbours)[0], rtol=0, atol=1e-10
    )
    loss, grads = loss_and_gradients(params, inputs, targets, neighbours)
    expected, vjp = retro_loss(params, config, inputs, targets, neighbours)
    assert loss == pytest.approx(expected, abs=1e-10)
    expected_grads = dict(named_leaves(vjp(1.0)))
    assert {leaf for leaf, _ in named_leaves(grads)} == expected_grads.keys()
    for leaf, grad in named_leaves(grads):
        np.testing.assert_allclose(grad, expected_grads[leaf], rtol=0, atol=1e-10, err_msg=leaf)


def test_with_retrieval_off_values_and_gradients_equal_the_librarys():
    config, params, inputs, targets, _ = case("two CCA", 2 * M, 1)
    loss, grads = loss_and_gradients(params, inputs, targets, None)
    expected, vjp = retro_loss(params, config, inputs, targets, None)
    assert loss == pytest.approx(expected, abs=1e-10)
    wanted = dict(named_leaves(vjp(1.0)))
    for leaf, grad in named_leaves(grads):
        np.testing.assert_allclose(grad, 0 if wanted[leaf] is None else wanted[leaf], rtol=0, atol=1e-10, err_msg=leaf)


def test_gradients_equal_finite_differences():
    _, params, inputs, targets, neighbours = case("one CCA", M + 3, 2)

    def f(tree):
        logits, model_vjp = mini.retro(tree, inputs, neighbours)
        loss, loss_vjp = mini.cross_entropy(logits, targets)
        return loss, lambda dloss: (model_vjp(loss_vjp(dloss)),)

    assert gradcheck(f, params).error < 1e-6


def test_no_logit_depends_on_a_later_token_through_the_neighbours_that_a_chunk_retrieves():
    rng = np.random.default_rng(0)
    params, values = mini.init_params(rng), rng.integers(1, V, (30, 2 * M))
    database, tokens = mini.build_database(values), rng.integers(1, V, (1, 4 * M))
    before = mini.retro(params, tokens, mini.retrieve(database, tokens, 2))[0]
    for t in (0, M - 1, M, 2 * M - 2, 3 * M):
        changed = tokens.copy()
        changed[:, t] = changed[:, t] % (V - 1) + 1
        after = mini.retro(params, changed, mini.retrieve(database, changed, 2))[0]
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.allclose(after[:, t:], before[:, t:])


def test_search_is_exact():
    rng = np.random.default_rng(1)
    values, tokens = rng.integers(1, 6, (40, 2 * M)), rng.integers(1, 6, (3, 2 * M + 5))
    database = mini.build_database(values)
    found = mini.retrieve(database, tokens, 3)
    assert found.shape == (3, 2, 3, 2 * M)

    def counts(chunk):
        columns = np.zeros(mini.D_KEY)
        for a, b, c in zip(chunk, chunk[1:], chunk[2:], strict=False):
            columns[(a * 7919 + b * 104_729 + c * 1_299_709) % mini.D_KEY] += 1
        return columns

    keys = np.array([counts(value[:M]) for value in values])
    keys *= np.log((1 + len(values)) / (1 + (keys > 0).sum(axis=0)))
    rarity = database[2]
    for sequence in range(3):
        for u in range(2):
            query = counts(tokens[sequence, u * M : (u + 1) * M]) * rarity
            cosines = [query @ key / np.linalg.norm(key) for key in keys]
            best = sorted(cosines, reverse=True)[:3]
            got = [cosines[int(np.flatnonzero((values == value).all(axis=1))[0])] for value in found[sequence, u]]
            np.testing.assert_allclose(got, best, rtol=1e-5)
    assert mini.retrieve(database, tokens[:, : M - 1], 2).shape == (3, 0, 2, 2 * M)


def test_adamw_equals_the_librarys():
    _, params, inputs, targets, neighbours = case("one CCA", 2 * M, 1, dtype=np.float64)
    ours, theirs = (map_tree(lambda _, a: a.copy(), params) for _ in range(2))
    moments, state = [mini.map_trees(np.zeros_like, ours) for _ in range(2)], adamw_init(theirs)
    for step in range(1, 4):
        mini.adamw(ours, loss_and_gradients(ours, inputs, targets, neighbours)[1], moments, step, 1e-2)
        grads = loss_and_gradients(theirs, inputs, targets, neighbours)[1]
        clip_by_global_norm(grads, 1.0)
        adamw_update(theirs, grads, state, lr=1e-2, weight_decay=0.01, betas=(0.9, 0.98))
    expected = dict(named_leaves(theirs))
    for leaf, array in named_leaves(ours):
        np.testing.assert_allclose(array, expected[leaf], rtol=0, atol=1e-10, err_msg=leaf)


def test_its_parameters_are_those_of_a_retro_of_the_library():
    encoder = EncoderConfig(64, 256, mini.HEADS, 16, 1, ca_layers=(1,))
    config = RetroConfig(
        V, 64, 256, n_heads=mini.HEADS, d_head=16, n_layers=2, cca_layers=(2,), chunk_size=M, encoder=encoder
    )
    params, rng = mini.init_params(np.random.default_rng(0)), np.random.default_rng(1)
    tokens, neighbours = rng.integers(1, V, (2, 2 * M)), rng.integers(1, V, (2, 2, 2, 2 * M))
    expected = retro(params, config, tokens, neighbours)[0]
    np.testing.assert_allclose(mini.retro(params, tokens, neighbours)[0], expected, rtol=1e-4, atol=1e-5)


def test_names_are_all_different_and_documents_have_two_chunks():
    rng = np.random.default_rng(0)
    facts = mini.invent(500, rng)
    assert len({name for name, _ in facts}) == 500
    for wordings in (mini.ASKED, mini.TOLD):
        for (name, code), document in zip(facts, mini.documents(facts, wordings, rng), strict=True):
            text = "".join(mini.CHARACTERS[token] for token in document)
            assert len(text) == 2 * M
            assert name in text[:M]
            assert code in text[M:]


def test_a_fact_that_is_told_twice_is_told_in_two_wordings():
    rng = np.random.default_rng(0)
    facts = mini.invent(50, rng)
    pairs = mini.documents(facts, mini.TOLD, rng, times=2).reshape(50, 2, 2 * M)
    for (name, code), pair in zip(facts, pairs, strict=True):
        one, other = ("".join(mini.CHARACTERS[token] for token in document) for document in pair)
        assert one != other
        assert all(name in text[:M] and code in text[M:] for text in (one, other))


def test_a_sample_continues_greedily_or_by_chance():
    rng = np.random.default_rng(0)
    params, tokens = mini.init_params(rng), rng.integers(1, V, (3, M))
    database = mini.build_database(rng.integers(1, V, (9, 2 * M)))
    asked = []

    def read(sequence):
        asked.append(sequence.shape[1])
        return mini.retrieve(database, sequence, 2)

    greedy = mini.sample(params, tokens, 5, read)
    assert asked == [M, M + 1, M + 2, M + 3, M + 4]
    whole = np.concatenate([tokens, greedy], axis=1)
    for t in range(5):
        logits = mini.retro(params, whole[:, : M + t], mini.retrieve(database, whole[:, : M + t], 2))[0]
        np.testing.assert_array_equal(logits[:, -1].argmax(axis=-1), greedy[:, t])
    p = np.exp(mini.retro(params, tokens[:1], None)[0][0, -1].astype(np.float64) / 2)
    drawn = mini.sample(params, np.repeat(tokens[:1], 4000, axis=0), 1, None, temperature=2.0, rng=rng)
    shares = np.bincount(drawn[:, 0], minlength=V) / 4000
    assert np.abs(shares - p / p.sum()).max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_answer_what_only_its_database_knows(seed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mini_retro.py", "--seed", str(seed)])
    mini.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("retrieval")]
    shares = [float(line.partition(": ")[2].partition("%")[0]) for line in lines]
    assert [line.partition(":")[0] for line in lines] == ["retrieval on", "retrieval off", "retrieval of others"]
    assert shares[0] >= 90
    assert max(shares[1:]) <= 15


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--seed", "-1"]], ids=" ".join)
def test_a_number_below_the_first_is_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mini_retro.py", *wrong])
    with pytest.raises(SystemExit) as refusal:
        mini.main()
    assert refusal.value.code == 2
    assert "--steps begins at 1, and --seed at 0" in capsys.readouterr().err
